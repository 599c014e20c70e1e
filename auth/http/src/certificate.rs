//! The server's certificate, followed on disk: a renewed one is served from the next handshake on, and no connection
//! ends for it.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use dermflow_schemas::{clock, limits::CERTIFICATE_LOOK};
use prometheus::{IntGauge, Registry};
use rustls::{
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use x509_cert::{Certificate, der::Decode};

use crate::serve::{TlsError, provider};

/// A certificate chain and its key, as they are in two files (PEM).
#[derive(Debug)]
pub struct ServerCertificate {
    certificate: PathBuf,
    key: PathBuf,
    provider: Arc<CryptoProvider>,
    /// The files as they were before they were read first.
    opened: [Stamp; 2],
    current: RwLock<Arc<CertifiedKey>>,
    not_after: IntGauge,
    loaded: IntGauge,
    refused: IntGauge,
}

/// What tells one state of a file from another.
type Stamp = Option<(u64, u64, i64, i64)>;

impl ServerCertificate {
    /// Reads both files.
    ///
    /// # Errors
    /// When one of them is missing or damaged, or they do not belong together.
    pub fn open(certificate: &Path, key: &Path) -> Result<Arc<Self>, TlsError> {
        let provider = provider();
        let gauge = |what, help| IntGauge::new(format!("dermflow_tls_certificate_{what}_seconds"), help);
        let opened = [stamp(certificate), stamp(key)];
        let (current, not_after) = read(certificate, key, &provider)?;
        let served = Self {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            provider,
            opened,
            current: RwLock::new(current.into()),
            not_after: gauge(
                "not_after",
                "When the certificate that is served ends (Unix time; 0: unknown).",
            )?,
            loaded: gauge("loaded", "When it was read (Unix time).")?,
            refused: gauge(
                "refused",
                "When files were last found that cannot be served (Unix time; 0: never).",
            )?,
        };
        served.note(not_after);
        Ok(Arc::new(served))
    }

    /// Registers the certificate's end, when it was read, and when another one last was no good, in seconds of Unix time.
    ///
    /// # Errors
    /// When there are metrics of these names.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        [&self.not_after, &self.loaded, &self.refused]
            .into_iter()
            .try_for_each(|gauge| registry.register(Box::new(gauge.clone())))
    }

    /// Looks at the files every [`CERTIFICATE_LOOK`] until `stop`, and serves what is new in them. Files that cannot be
    /// served, one of them not written yet among others, leave the certificate that is served in its place.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let mut look = interval(CERTIFICATE_LOOK);
        let (mut served, mut refused) = (self.opened, [None; 2]);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = look.tick() => {}
            }
            // Before they are read: what is written meanwhile is seen at the next look.
            let found = [stamp(&self.certificate), stamp(&self.key)];
            if found == served {
                continue;
            }
            match read(&self.certificate, &self.key, &self.provider) {
                Ok((certificate, not_after)) => {
                    *self.current.write().unwrap_or_else(PoisonError::into_inner) = certificate.into();
                    self.note(not_after);
                    served = found;
                    tracing::info!("the certificate was renewed");
                }
                Err(error) => {
                    // Tried again at every look: what was in the way may go without a trace in the files.
                    self.refused.set(clock::now().unix_timestamp());
                    if found != refused {
                        tracing::error!(%error, "the certificate stays as it was");
                    }
                    refused = found;
                }
            }
        }
    }

    fn note(&self, not_after: i64) {
        let now = clock::now().unix_timestamp();
        self.not_after.set(not_after);
        self.loaded.set(now);
        if (1..=now).contains(&not_after) {
            tracing::error!("the certificate has ended");
        }
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

fn stamp(path: &Path) -> Stamp {
    let data = fs::metadata(path).ok()?;
    Some((data.ino(), data.size(), data.mtime(), data.mtime_nsec()))
}

/// The chain with its key, and when the first certificate of it ends.
fn read(certificate: &Path, key: &Path, provider: &CryptoProvider) -> Result<(CertifiedKey, i64), TlsError> {
    let chain = chain(certificate)?;
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| pem(key, &error))?;
    // Of a certificate that only this parser does not understand, the end is unknown: 0.
    let not_after = chain.first().and_then(not_after).unwrap_or(0);
    Ok((CertifiedKey::from_der(chain, key, provider)?, not_after))
}

/// The certificates of a file, at least one.
pub(crate) fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let certificates = certificates.map_err(|error| pem(path, &error))?;
    if certificates.is_empty() { Err(no_certificate(path)) } else { Ok(certificates) }
}

fn pem(path: &Path, error: &rustls::pki_types::pem::Error) -> TlsError {
    TlsError::Pem(path.display().to_string(), error.to_string())
}

fn no_certificate(path: &Path) -> TlsError {
    TlsError::Pem(path.display().to_string(), "no certificate".into())
}

fn not_after(certificate: &CertificateDer<'_>) -> Option<i64> {
    let certificate = Certificate::from_der(certificate).ok()?;
    i64::try_from(certificate.tbs_certificate.validity.not_after.to_unix_duration().as_secs()).ok()
}
