//! A CA of certificates of clients.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;
use aws_lc_rs::digest::{SHA256, digest};
use dermflow_schemas::clock;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use time::Duration;

/// A certificate with its private key, in files.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Identity {
    /// The SHA-256 of the certificate.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sha256(&self) -> Result<Vec<u8>> {
        Ok(digest(&SHA256, &CertificateDer::from_pem_file(&self.cert)?).as_ref().to_vec())
    }
}

/// A CA.
pub struct Authority {
    folder: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    /// A new one, of which the files are in `folder`.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn new(folder: &Path, name: &str) -> Result<Self> {
        let (mut params, key) = (CertificateParams::default(), KeyPair::generate()?);
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { folder: folder.into(), issuer: Issuer::new(params, key), pem })
    }

    /// Its certificate (PEM).
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate of a client of this name, good since yesterday and for so long from now.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn certify(&self, name: &str, life: Duration) -> Result<Identity> {
        let (mut params, key) = (CertificateParams::default(), KeyPair::generate()?);
        params.distinguished_name.push(DnType::CommonName, name);
        (params.not_before, params.not_after) = (clock::now() - Duration::DAY, clock::now() + life);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let file = |kind| self.folder.join(format!("{name}{kind}.pem"));
        let identity = Identity { cert: file(""), key: file("-key") };
        fs::write(&identity.cert, params.signed_by(&key, &self.issuer)?.pem())?;
        fs::write(&identity.key, key.serialize_pem())?;
        Ok(identity)
    }
}
