//! The certificates of clients, which a listener asks for and does not demand.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use dermflow_schemas::clock;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, UnixTime},
    server::{NoServerSessionStorage, danger::ClientCertVerifier},
};
use time::OffsetDateTime;
use tokio::time::Duration;
use tokio_util::sync::CancellationToken;

use crate::{
    certificate::{ServerCertificate, Stamp, follow, stamp, validity},
    serve::{ACME_TLS, Certificate, TlsError, alpn, fingerprint, provider, verifier},
};

/// A CA whose certificates clients may show, in a file that is followed.
///
/// A certificate of another CA, or one whose time is not now, fails the handshake, with the alert that says why; a client
/// without one is let in, and what it may do is for the routes to say. No session is resumed: it would carry the
/// certificate along unseen. On a connection that is open, a certificate that has ended since, or whose CA is no longer in
/// the file, counts as none.
pub struct Clients {
    file: PathBuf,
    /// The file as it was before it was read first.
    opened: Stamp,
    served: Arc<ServerCertificate>,
    trusted: RwLock<Arc<Trusted>>,
}

/// What is made of one state of the file.
struct Trusted {
    config: Arc<ServerConfig>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl fmt::Debug for Clients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Clients({})", self.file.display())
    }
}

impl Clients {
    /// For a listener that serves `served`. The versions of TLS and the ALPN are those of
    /// [`tls_config`](crate::serve::tls_config).
    ///
    /// # Errors
    /// When the file holds no certificate of a CA.
    pub fn open(file: &Path, served: Arc<ServerCertificate>) -> Result<Arc<Self>, TlsError> {
        let (opened, trusted) = (stamp(file), RwLock::new(trust(file, served.clone())?));
        Ok(Arc::new(Self { file: file.into(), opened, served, trusted }))
    }

    /// Looks at the file, as [`CertificateFiles`](crate::certificate::CertificateFiles) are looked at, until `stop`. A file
    /// without a certificate leaves everything as it was.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let read = || {
            let trusted = trust(&self.file, self.served.clone())?;
            *self.trusted.write().unwrap_or_else(PoisonError::into_inner) = trusted;
            tracing::info!("the CA of clients was exchanged");
            Ok(())
        };
        let refused = |error, is_new| {
            if is_new {
                tracing::error!(%error, "the CA of clients stays as it was");
            }
        };
        follow([&self.file], [self.opened], read, refused, stop).await;
    }

    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.trusted().config.clone()
    }

    fn trusted(&self) -> Arc<Trusted> {
        self.trusted.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn trust(file: &Path, served: Arc<ServerCertificate>) -> Result<Arc<Trusted>, TlsError> {
    let verifier = verifier(file)?.allow_unauthenticated().build()?;
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let mut config = builder.with_client_cert_verifier(verifier.clone()).with_cert_resolver(served);
    config.alpn_protocols = alpn();
    config.alpn_protocols.push(ACME_TLS.to_vec());
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(Trusted { config: Arc::new(config), verifier }))
}

/// What the client of one connection has proved to own.
pub(crate) struct Shown {
    clients: Arc<Clients>,
    chain: Vec<CertificateDer<'static>>,
    certificate: Certificate,
    /// When it ends; unknown of one that only our parser does not understand, which is good for no request.
    not_after: Option<OffsetDateTime>,
    /// By which state of the file it was judged, and how.
    judged: Mutex<(Arc<Trusted>, bool)>,
}

impl Shown {
    /// What a handshake with `config`, which is of `clients`, has shown.
    pub(crate) fn new(clients: Arc<Clients>, chain: &[CertificateDer<'_>]) -> Option<Self> {
        let first = chain.first()?;
        let (certificate, not_after) = (fingerprint(first), validity(first).map(|(_, not_after)| not_after));
        let chain: Vec<_> = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        let trusted = clients.trusted();
        let is_good = is_good(&trusted, &chain);
        Some(Self { clients, chain, certificate, not_after, judged: Mutex::new((trusted, is_good)) })
    }

    /// The certificate, while it is good.
    pub(crate) fn certificate(&self) -> Option<Certificate> {
        let trusted = self.clients.trusted();
        let mut judged = self.judged.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&judged.0, &trusted) {
            let is_good = is_good(&trusted, &self.chain);
            *judged = (trusted, is_good);
        }
        let is_over = self.not_after.is_none_or(|not_after| clock::now() > not_after);
        (judged.1 && !is_over).then_some(self.certificate)
    }
}

fn is_good(trusted: &Trusted, chain: &[CertificateDer<'_>]) -> bool {
    let now = u64::try_from(clock::now().unix_timestamp()).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    chain.split_first().is_some_and(|(first, rest)| {
        let verified = trusted.verifier.verify_client_cert(first, rest, now);
        verified.is_ok()
    })
}
