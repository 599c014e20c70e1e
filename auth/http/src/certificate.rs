//! The certificate that a listener serves. It is exchanged while connections go on: from files that are followed on disk,
//! or by who has obtained a new one.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use dermflow_schemas::{clock, limits::CERTIFICATE_LOOK};
use prometheus::{IntGauge, Opts, Registry};
use rustls::{
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use time::OffsetDateTime;
use tokio::time::interval;
use tokio_util::sync::CancellationToken;
use x509_cert::{Certificate, der::Decode, ext::pkix::AuthorityKeyIdentifier};

use crate::serve::{ACME_TLS, TlsError, provider};

/// The certificate that is served, and those that answer an ACME server's challenges.
#[derive(Debug)]
pub struct ServerCertificate {
    current: RwLock<Option<Arc<CertifiedKey>>>,
    /// By name.
    challenges: RwLock<HashMap<String, Arc<CertifiedKey>>>,
    not_after: IntGauge,
    loaded: IntGauge,
    refused: IntGauge,
}

impl ServerCertificate {
    /// None yet: handshakes fail until there is one. `source` is the label of its metrics.
    ///
    /// # Errors
    /// When the metrics cannot be made.
    pub fn new(source: &str) -> Result<Arc<Self>, TlsError> {
        let gauge = |what, help| {
            let options = Opts::new(format!("dermflow_tls_certificate_{what}_seconds"), help);
            IntGauge::with_opts(options.const_label("source", source))
        };
        Ok(Arc::new(Self {
            current: RwLock::default(),
            challenges: RwLock::default(),
            not_after: gauge(
                "not_after",
                "When the certificate that is served ends (Unix time; 0: unknown).",
            )?,
            loaded: gauge("loaded", "Since when it is served (Unix time; 0: there is none).")?,
            refused: gauge(
                "refused",
                "When one was last found that cannot be served (Unix time; 0: never).",
            )?,
        }))
    }

    /// Registers the certificate's end, since when it is served, and when another one last was no good, in seconds of
    /// Unix time.
    ///
    /// # Errors
    /// When there are metrics of these names.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        [&self.not_after, &self.loaded, &self.refused]
            .into_iter()
            .try_for_each(|gauge| registry.register(Box::new(gauge.clone())))
    }

    /// Serves another one from the next handshake on.
    pub fn serve(&self, certified: CertifiedKey) {
        // Of a certificate that only this parser does not understand, the end is unknown.
        let validity = certified.cert.first().and_then(validity);
        let not_after = validity.map_or(0, |(_, not_after)| not_after.unix_timestamp());
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Some(certified.into());
        let now = clock::now().unix_timestamp();
        self.not_after.set(not_after);
        self.loaded.set(now);
        if (1..=now).contains(&not_after) {
            tracing::error!("the certificate has ended");
        }
    }

    /// Shows these certificates, by name, to an ACME server that asks for them (RFC 8737), and no others.
    pub fn answer_challenges(&self, challenges: HashMap<String, Arc<CertifiedKey>>) {
        *self.challenges.write().unwrap_or_else(PoisonError::into_inner) = challenges;
    }

    /// Notes that another one was found that cannot be served.
    pub fn refuse(&self) {
        self.refused.set(clock::now().unix_timestamp());
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // RFC 8737 §3: who validates a challenge speaks nothing else.
        if hello.alpn().is_some_and(|protocols| protocols.eq([ACME_TLS])) {
            let challenges = self.challenges.read().unwrap_or_else(PoisonError::into_inner);
            return challenges.get(hello.server_name()?).cloned();
        }
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A certificate chain and its key in two files (PEM), which are followed.
#[derive(Debug)]
pub struct CertificateFiles {
    certificate: PathBuf,
    key: PathBuf,
    /// The files as they were before they were read first.
    opened: [Stamp; 2],
    served: Arc<ServerCertificate>,
}

/// What tells one state of a file from another.
pub(crate) type Stamp = Option<(u64, u64, i64, i64)>;

impl CertificateFiles {
    /// Reads both files.
    ///
    /// # Errors
    /// When one of them is missing or damaged, or they do not belong together.
    pub fn open(certificate: &Path, key: &Path) -> Result<Self, TlsError> {
        let files = Self {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            opened: [stamp(certificate), stamp(key)],
            served: ServerCertificate::new("files")?,
        };
        files.read()?;
        Ok(files)
    }

    /// What is served of them.
    pub fn served(&self) -> Arc<ServerCertificate> {
        self.served.clone()
    }

    /// Looks at the files every [`CERTIFICATE_LOOK`] until `stop`, and serves what is new in them. Files that cannot be
    /// served, one of them not written yet among others, leave the certificate that is served in its place.
    pub async fn follow(self, stop: CancellationToken) {
        let read = || {
            self.read()?;
            tracing::info!("the certificate was renewed");
            Ok(())
        };
        let refused = |error, is_new| {
            self.served.refuse();
            if is_new {
                tracing::error!(%error, "the certificate stays as it was");
            }
        };
        follow([&self.certificate, &self.key], self.opened, read, refused, stop).await;
    }

    fn read(&self) -> Result<(), TlsError> {
        let chain = chain(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| pem(&self.key, &error))?;
        self.served.serve(CertifiedKey::from_der(chain, key, &provider())?);
        Ok(())
    }
}

/// Looks at files every [`CERTIFICATE_LOOK`] until `stop`, and reads them when they are not as they were when they were
/// `read` last. `refused` is told of the error when they are no good, and whether that is of files not seen before.
pub(crate) async fn follow<const N: usize>(
    files: [&Path; N],
    opened: [Stamp; N],
    read: impl Fn() -> Result<(), TlsError>,
    refused: impl Fn(TlsError, bool),
    stop: CancellationToken,
) {
    let mut look = interval(CERTIFICATE_LOOK);
    let (mut served, mut bad) = (opened, [None; N]);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        // Before they are read: what is written meanwhile is seen at the next look.
        let found = files.map(stamp);
        if found == served {
            continue;
        }
        match read() {
            Ok(()) => served = found,
            // Tried again at every look: what was in the way may go without a trace in the files.
            Err(error) => {
                refused(error, found != bad);
                bad = found;
            }
        }
    }
}

pub(crate) fn stamp(path: &Path) -> Stamp {
    let data = fs::metadata(path).ok()?;
    Some((data.ino(), data.size(), data.mtime(), data.mtime_nsec()))
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

/// What an ACME server knows a certificate by (RFC 9773 §4.1): the key identifier of its issuer, and its serial number as
/// DER has it; `None` when it does not say.
pub fn renewal_id(certificate: &CertificateDer<'_>) -> Option<[Vec<u8>; 2]> {
    let certificate = Certificate::from_der(certificate).ok()?.tbs_certificate;
    let (_, authority) = certificate.get::<AuthorityKeyIdentifier>().ok()??;
    let serial = certificate.serial_number.as_bytes().to_vec();
    Some([authority.key_identifier?.as_bytes().to_vec(), serial])
}

/// From when to when a certificate is valid; `None` when that cannot be read.
pub fn validity(certificate: &CertificateDer<'_>) -> Option<(OffsetDateTime, OffsetDateTime)> {
    let validity = Certificate::from_der(certificate).ok()?.tbs_certificate.validity;
    let [begins, ends] = [validity.not_before, validity.not_after].map(|at| {
        OffsetDateTime::from_unix_timestamp(i64::try_from(at.to_unix_duration().as_secs()).ok()?).ok()
    });
    Some((begins?, ends?))
}
