//! The keys of one instance: a private CA, the server's certificate, another CA for the certificates of staff, the
//! signing key, the sealing keys.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_schemas::{clock, seal};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519,
};

use crate::state::{State, random_bytes, read, write_private};

const DAY: Duration = Duration::from_hours(24);
const CA_LIFE: Duration = Duration::from_hours(24 * 3_650);
const LEAF_LIFE: Duration = Duration::from_hours(24 * 90);

/// Paths of the key files, all with mode 0600.
#[derive(Debug, Clone)]
pub struct Pki {
    /// The CA's certificate: what clients trust.
    pub ca: PathBuf,
    /// The server's certificate, for `localhost`, the loopback addresses and this machine's name.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The certificate of the CA of staff: what the registration service trusts.
    pub staff_ca: PathBuf,
    /// A certificate of staff.
    pub staff: Identity,
    /// The folder of keys that sign access tokens.
    pub signing_keys: PathBuf,
    /// The folder of keys that seal images and reports.
    pub sealing_keys: PathBuf,
    /// The peppers of passwords.
    pub peppers: PathBuf,
}

/// A certificate with its private key.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

impl Pki {
    /// Makes what is missing, and a new server certificate every time: it is valid for 90 days from this start,
    /// and follows a change of the machine's name. The CA (10 years) stays.
    ///
    /// # Errors
    /// When a file cannot be read or written, or a key in it is damaged.
    pub fn prepare(state: &State) -> Result<Self> {
        let ca_key_file = state.keep("ca-key.pem", || new_key(&PKCS_ECDSA_P256_SHA256))?;
        let ca_key = KeyPair::from_pem(&read(&ca_key_file)?).context("the key of the CA is damaged")?;
        let ca = state.keep("ca.pem", || Ok(ca_params("Dermflow local CA").self_signed(&ca_key)?.pem()))?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let Identity { cert, key } = server(state, "server", &["localhost", "127.0.0.1", "::1", &host])?;
        let staff = staff(state, "staff")?;
        let signing_keys = state.folder("signing-keys")?;
        state.keep("signing-keys/19700101T000000Z.pem", || new_key(&PKCS_ED25519))?;
        let sealing_keys = state.folder("sealing")?;
        // Only into an empty folder: a key that was removed does not come back as another one.
        if seal::files(&sealing_keys)?.is_empty() {
            // A state of an earlier build has them in one file.
            let earlier = state.path("sealing-keys");
            if earlier.exists() {
                fs::rename(&earlier, sealing_keys.join("k1.key"))?;
            }
            state.keep("sealing/k1.key", || Ok(format!("k1 {}\n", STANDARD.encode(random_bytes()?))))?;
        }
        let pepper = || Ok(format!("p1 {}\n", STANDARD.encode(random_bytes()?)));
        Ok(Self {
            ca,
            cert,
            key,
            staff_ca: state.path("staff-ca.pem"),
            staff,
            signing_keys,
            sealing_keys,
            peppers: state.keep("password-pepper", pepper)?,
        })
    }
}

/// A certificate of the CA for a server of these names, in files that begin with `file`, with a new one of 90 days every
/// time. The private key stays.
///
/// # Errors
/// As [`Pki::prepare`].
pub fn server(state: &State, file: &str, names: &[&str]) -> Result<Identity> {
    let ca_key =
        KeyPair::from_pem(&read(&state.path("ca-key.pem"))?).context("the key of the CA is damaged")?;
    let key = state.keep(&format!("{file}-key.pem"), || new_key(&PKCS_ECDSA_P256_SHA256))?;
    let leaf_key = KeyPair::from_pem(&read(&key)?).context("the key of the server is damaged")?;
    let issuer = Issuer::new(ca_params("Dermflow local CA"), &ca_key);
    let leaf =
        leaf_params(names)?.signed_by(&leaf_key, &issuer).context("cannot issue the server's certificate")?;
    let cert = state.path(&format!("{file}.pem"));
    write_private(&cert, &leaf.pem())?;
    Ok(Identity { cert, key })
}

/// A certificate of staff for the file name `name`, with a new one of 90 days every time. The CA (10 years), and the
/// private keys, stay.
///
/// # Errors
/// As [`Pki::prepare`].
pub fn staff(state: &State, name: &str) -> Result<Identity> {
    let ca_key = state.keep("staff-ca-key.pem", || new_key(&PKCS_ECDSA_P256_SHA256))?;
    let ca_key = KeyPair::from_pem(&read(&ca_key)?).context("the key of the CA of staff is damaged")?;
    state.keep("staff-ca.pem", || Ok(ca_params("Dermflow staff CA").self_signed(&ca_key)?.pem()))?;
    let key = state.keep(&format!("{name}-key.pem"), || new_key(&PKCS_ECDSA_P256_SHA256))?;
    let leaf_key = KeyPair::from_pem(&read(&key)?).context("the key of staff is damaged")?;
    let mut leaf = params(name, LEAF_LIFE);
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let issuer = Issuer::new(ca_params("Dermflow staff CA"), &ca_key);
    let leaf = leaf.signed_by(&leaf_key, &issuer).context("cannot issue the certificate of staff")?;
    let cert = state.path(&format!("{name}.pem"));
    write_private(&cert, &leaf.pem())?;
    Ok(Identity { cert, key })
}

fn new_key(algorithm: &'static rcgen::SignatureAlgorithm) -> Result<String> {
    Ok(KeyPair::generate_for(algorithm).context("cannot make a key")?.serialize_pem())
}

fn params(name: &str, life: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    // A day back, for clients whose clock is slow.
    params.not_before = clock::now() - DAY;
    params.not_after = clock::now() + life;
    params.use_authority_key_identifier_extension = true;
    params
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = params(name, CA_LIFE);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(names: &[&str]) -> Result<CertificateParams> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut leaf = params("Dermflow", LEAF_LIFE);
    leaf.subject_alt_names =
        CertificateParams::new(names).context("a name of the server is no DNS name")?.subject_alt_names;
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    Ok(leaf)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{
        RootCertStore,
        client::{WebPkiServerVerifier, danger::ServerCertVerifier},
        crypto::aws_lc_rs::default_provider,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    };

    use super::*;

    #[test]
    fn the_certificate_is_trusted_for_its_names_and_no_other() {
        let dir = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
        let state = State::open(&dir).unwrap();
        write_private(&state.path("sealing-keys"), "k7 AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n")
            .unwrap();
        let first = Pki::prepare(&state).unwrap();
        let ca = read(&first.ca).unwrap();
        let pki = Pki::prepare(&state).unwrap();
        assert_eq!(read(&pki.ca).unwrap(), ca);
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&pki.ca).unwrap()).unwrap();
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::new(default_provider()))
                .build()
                .unwrap();
        let leaf = CertificateDer::from_pem_file(&pki.cert).unwrap();
        let verify = |name: &str| {
            let name = ServerName::try_from(name.to_owned()).unwrap();
            verifier.verify_server_cert(&leaf, &[], &name, &[], UnixTime::now()).is_ok()
        };
        assert!(verify("localhost") && verify("127.0.0.1") && verify("::1"));
        assert!(!verify("example.org") && !verify("127.0.0.2"));
        PrivateKeyDer::from_pem_file(pki.signing_keys.join("19700101T000000Z.pem")).unwrap();
        let sealing_keys = seal::Keys::read(&pki.sealing_keys).unwrap();
        assert_eq!(sealing_keys.newest().id, "k7", "of an earlier build");
        std::fs::remove_dir_all(dir).unwrap();
    }
}
