//! Listeners: an accept loop with a time-out on every step, which `axum::serve` does not have.
//!
//! Handshakes run in their own tasks, so that a stalled one blocks nobody; the version of HTTP comes from
//! ALPN, so that there is no reading ahead to guess it.

use std::{
    error::Error,
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::Path,
    pin::{Pin, pin},
    str::FromStr,
    sync::Arc,
};

use aws_lc_rs::digest::{SHA256, digest};
use axum::{
    Router,
    body::Body,
    http::{Request, request::Parts},
};
use dermflow_schemas::limits::{
    HANDSHAKE_TIMEOUT, HEADER_TIMEOUT, IDLE_TIMEOUT, INGRESS_DRAIN, MAX_CONNECTIONS, SHED_CONNECTIONS,
};
use hyper::{
    Response, StatusCode,
    body::Incoming,
    header,
    service::{Service, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulConnection},
    service::TowerToHyperService,
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::CertificateDer,
    server::{ClientCertVerifierBuilder, NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
    version::TLS13,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    sync::{Semaphore, watch},
    time::{Duration, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    balancer::Stream,
    certificate::{ServerCertificate, chain},
    clients::{Clients, Shown},
    door::{Door, Entered},
    dress::overloaded,
    patient::Patient,
    streams::{Streams, watched},
};

/// What an ACME server speaks to see a challenge answered (RFC 8737 §6.2).
pub(crate) const ACME_TLS: &[u8] = b"acme-tls/1";
/// HTTP/2 flow-control windows: with the defaults an upload of megabytes takes a round trip every 64 KiB.
const STREAM_WINDOW: u32 = 1024 * 1024;
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Requests at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 128;
/// Bytes of all headers of a request.
const MAX_HEADER_BYTES: u32 = 32 * 1024;
/// Between two HTTP/2 pings, and the wait for their answer.
const H2_PING: Duration = Duration::from_secs(20);
/// What a peer that never got as far as a request is given to read why it has to go.
const HANG_UP_TIMEOUT: Duration = Duration::from_secs(1);
/// What is in flight on a connection that takes no further request has to end: a batch of 50,000 lines, sent or read.
const LAST_ANSWERS: Duration = Duration::from_hours(1);
/// The pause after an accept that failed for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Where a request comes from, an extension of every request: the other end of its connection, or the caller that a
/// balancer of [`Balancers`](crate::balancer::Balancers) names.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// SHA-256 of the certificate that a connection's client has proved to own, an extension of its requests on a listener
/// that asks for one. The certificate of a balancer that ends TLS is not its callers'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Certificate(pub [u8; 32]);

/// What a connection's client shows at any time, an extension of its requests on a listener that asks for certificates: for
/// what goes on for longer than its certificate may be good.
#[derive(Clone)]
pub struct Shows(Arc<dyn Fn() -> Option<Certificate> + Send + Sync>);

impl Shows {
    /// The certificate, while it is good.
    pub fn certificate(&self) -> Option<Certificate> {
        (self.0)()
    }
}

impl fmt::Debug for Shows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shows({:?})", self.certificate())
    }
}

/// With what a listener shakes hands.
#[derive(Debug, Clone)]
pub enum Tls {
    /// See [`tls_config`] and [`mutual_tls_config`].
    Fixed(Arc<ServerConfig>),
    /// Clients may show a certificate.
    Asking(Arc<Clients>),
}

impl From<Arc<ServerConfig>> for Tls {
    fn from(config: Arc<ServerConfig>) -> Self {
        Self::Fixed(config)
    }
}

impl Tls {
    /// Follows the CA of clients, if they are asked, until `stop`.
    pub async fn follow(self, stop: CancellationToken) {
        match self {
            Self::Fixed(_) => stop.cancelled().await,
            Self::Asking(clients) => clients.follow(stop).await,
        }
    }

    fn acceptor(&self) -> TlsAcceptor {
        match self {
            Self::Fixed(config) => config.clone().into(),
            Self::Asking(clients) => clients.config().into(),
        }
    }

    /// What gives the certificate that was shown in a handshake, as long as it is good.
    fn shown(&self, chain: Option<&[CertificateDer<'_>]>) -> impl Fn() -> Option<Certificate> + use<> {
        let chain = chain.unwrap_or_default();
        let (fixed, shown) = match self {
            Self::Fixed(_) => (chain.first().map(fingerprint), None),
            Self::Asking(clients) => (None, Shown::new(clients.clone(), chain)),
        };
        move || shown.as_ref().map_or(fixed, Shown::certificate)
    }
}

/// Why the certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or holds no PEM of the kind.
    #[error("{0}: {1}")]
    Pem(String, String),
    /// Certificate and key do not belong together, or are of no known kind.
    #[error("certificate and key: {0}")]
    Pair(#[from] rustls::Error),
    /// The metrics cannot be made.
    #[error("metrics of the certificate: {0}")]
    Metrics(#[from] prometheus::Error),
    /// There is no CA to trust.
    #[error("the CA of clients: {0}")]
    Clients(#[from] VerifierBuilderError),
}

/// TLS 1.2 and 1.3 with rustls's suites, all of them AEAD with forward secrecy; ALPN h2, http/1.1, and acme-tls/1 for the
/// challenges that `certificate` answers.
///
/// # Errors
/// When rustls has none of this.
pub fn tls_config(certificate: Arc<ServerCertificate>) -> Result<Arc<ServerConfig>, TlsError> {
    let builder = ServerConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(certificate);
    config.alpn_protocols = alpn();
    config.alpn_protocols.push(ACME_TLS.to_vec());
    Ok(Arc::new(config))
}

/// TLS 1.3 for callers that own a certificate which `clients` has signed; the same ALPN.
///
/// Every connection proves it anew: a resumed session would outlive the certificate.
///
/// # Errors
/// When `clients` holds no certificate of a CA.
pub fn mutual_tls_config(
    certificate: Arc<ServerCertificate>,
    clients: &Path,
) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = verifier(clients)?.build()?;
    let builder = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13])?;
    let mut config = builder.with_client_cert_verifier(verifier).with_cert_resolver(certificate);
    config.alpn_protocols = alpn();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Believes certificates that a CA of the file has signed.
pub(crate) fn verifier(authorities: &Path) -> Result<ClientCertVerifierBuilder, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in chain(authorities)? {
        roots.add(authority)?;
    }
    Ok(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()))
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

pub(crate) fn alpn() -> Vec<Vec<u8>> {
    vec![b"h2".to_vec(), b"http/1.1".to_vec()]
}

/// Serves `router` over HTTPS until `stop`, then lets requests in flight finish.
pub async fn https(
    listener: TcpListener,
    tls: impl Into<Tls>,
    router: Router,
    door: impl Into<Door>,
    stop: CancellationToken,
) {
    https_or(listener, tls, router, async |_, _| (), door, stop).await;
}

/// The same; `refused` is told of every handshake that failed with an error of TLS, with the caller's address.
pub async fn https_or<F: Future<Output = ()> + Send>(
    listener: TcpListener,
    tls: impl Into<Tls>,
    router: Router,
    refused: impl Fn(IpAddr, rustls::Error) -> F + Clone + Send + 'static,
    door: impl Into<Door>,
    stop: CancellationToken,
) {
    let (tls, door, stopped) = (tls.into(), door.into(), stop.clone());
    let (balancers, overloaded) = (door.balancers.clone(), overloaded());
    let serve = move |stream: Stream, origin: IpAddr, is_surplus: bool| {
        let (tls, refused, balancers) = (tls.clone(), refused.clone(), balancers.clone());
        // A surplus connection ends with its first answer.
        let (router, stop) = if is_surplus {
            (overloaded.clone(), stopped.child_token())
        } else {
            (router.clone(), stopped.clone())
        };
        async move {
            let accepted = tls.acceptor().accept(Patient::new(stream)).into_fallible();
            let accepted = timeout(HANDSHAKE_TIMEOUT, accepted).await;
            let stream = match accepted {
                Ok(Ok(stream)) => stream,
                Ok(Err((error, stream))) => {
                    // Anything else is a connection that broke before it said who it is.
                    if let Ok(error) = error.downcast::<rustls::Error>() {
                        refused(origin, error).await;
                        hang_up(stream).await;
                    }
                    return End::Ordinary;
                }
                Err(_) => return End::Ordinary,
            };
            let session = stream.get_ref().1;
            if session.alpn_protocol() == Some(ACME_TLS) {
                // It has seen what it came for.
                hang_up(stream).await;
                return End::Ordinary;
            }
            let is_h2 = session.alpn_protocol() == Some(b"h2");
            let shows = Shows(Arc::new(tls.shown(session.peer_certificates())));
            let is_own = !balancers.forwards(origin);
            let builder = builder(is_h2);
            let (router, (heard, spoke)) = (TowerToHyperService::new(router), watch::channel(false));
            let stopping = stop.clone();
            let service = service_fn(move |mut request: Request<Incoming>| {
                heard.send_replace(true);
                if is_surplus {
                    stopping.cancel();
                }
                let caller = balancers.caller(origin, request.headers());
                request.extensions_mut().insert(Peer(caller));
                if is_own && let Some(certificate) = shows.certificate() {
                    request.extensions_mut().insert(certificate);
                    request.extensions_mut().insert(shows.clone());
                }
                let answer = router.call(request);
                async move { answer.await.map(watched) }
            });
            let connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
            let conversation = converse(connection, spoke, is_h2, &stop);
            // A peer of HTTP/2 may leave an answer waiting for longer.
            let end = timeout(if is_surplus { HEADER_TIMEOUT } else { Duration::MAX }, conversation).await;
            end.unwrap_or(End::Ordinary)
        }
    };
    accept(listener, door, stop, serve).await;
}

/// Serves a connection to its end, which we bring about when it is time to `stop` and when no request has come for too
/// long: requests in flight are answered first, and over HTTP/2 the peer is told, so that none is lost on its way.
///
/// `spoke` changes with each request.
async fn converse<C: GracefulConnection<Error = Box<dyn Error + Send + Sync>>>(
    mut connection: Pin<&mut C>,
    mut spoke: watch::Receiver<bool>,
    is_h2: bool,
    stop: &CancellationToken,
) -> End {
    // Between two requests of HTTP/1.1, hyper keeps the time.
    let idle = if is_h2 { IDLE_TIMEOUT } else { Duration::MAX };
    let silence = async {
        let mut allowed = HEADER_TIMEOUT;
        while let Ok(Ok(())) = timeout(allowed, spoke.changed()).await {
            allowed = idle;
        }
    };
    tokio::select! {
        // What else a peer does wrong on its own connection is its own affair.
        end = connection.as_mut() => return End::of(end),
        () = stop.cancelled() => {}
        () = silence => {}
    }
    connection.as_mut().graceful_shutdown();
    // Who has never sent a request may not even read that.
    let mut end = timeout(HANG_UP_TIMEOUT, connection.as_mut()).await;
    if end.is_err() && *spoke.borrow() {
        end = timeout(LAST_ANSWERS, connection).await;
    }
    end.map_or(End::Ordinary, End::of)
}

/// How a connection came to its end.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Ordinary,
    /// One side gave it up as the other broke HTTP/2 (RFC 9113 §7). So end streams that are reset at once
    /// (CVE-2023-44487), and headers without an end.
    Broken,
}

impl End {
    fn of(end: Result<(), Box<dyn Error + Send + Sync>>) -> Self {
        let Err(error) = end else { return Self::Ordinary };
        let is_broken =
            |error: &h2::Error| error.is_go_away() && error.reason() != Some(h2::Reason::NO_ERROR);
        // Hyper's error has it as its cause.
        let cause = error.source().and_then(|cause| cause.downcast_ref());
        if cause.is_some_and(is_broken) { Self::Broken } else { Self::Ordinary }
    }
}

/// Closes a connection so that its last words, the alert that says what was wrong, arrive: with bytes of the peer's still
/// unread, TCP would reset it.
async fn hang_up(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut rest = [0; 1024];
    let discard = async {
        stream.shutdown().await?;
        for _ in 0..64 {
            if stream.read(&mut rest).await? == 0 {
                break;
            }
        }
        io::Result::Ok(())
    };
    let _ = timeout(HANG_UP_TIMEOUT, discard).await;
}

pub(crate) fn fingerprint(certificate: &CertificateDer<'_>) -> Certificate {
    let mut fingerprint = [0; 32];
    fingerprint.copy_from_slice(digest(&SHA256, certificate).as_ref());
    Certificate(fingerprint)
}

fn builder(is_h2: bool) -> auto::Builder<Streams> {
    let mut builder = auto::Builder::new(Streams);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT).max_headers(100);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADER_BYTES)
        .keep_alive_interval(H2_PING)
        .keep_alive_timeout(H2_PING);
    if is_h2 { builder.http2_only() } else { builder.http1_only() }
}

/// Answers every plain request with 308 to `public_url`, without reading a body, and hangs up. `seen` is told before of
/// what came in clear, and from where. A path for which `challenge` has something is answered with that: an ACME server
/// asks for it in clear (RFC 8555 §8.3).
pub async fn redirect<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    public_url: Arc<str>,
    challenge: impl Fn(&str) -> Option<String> + Clone + Send + 'static,
    seen: impl Fn(Parts, IpAddr) -> F + Clone + Send + 'static,
    door: impl Into<Door>,
    stop: CancellationToken,
) {
    let (door, stopped) = (door.into(), stop.clone());
    let balancers = door.balancers.clone();
    let serve = move |stream: Stream, origin: IpAddr, _: bool| {
        let (public_url, challenge) = (public_url.clone(), challenge.clone());
        let (seen, balancers, stop) = (seen.clone(), balancers.clone(), stopped.clone());
        async move {
            let (heard, spoke) = watch::channel(false);
            let service = service_fn(move |request: Request<Incoming>| {
                heard.send_replace(true);
                let request = request.into_parts().0;
                let response = Response::builder().header(header::CONNECTION, "close");
                let (response, seen) = if let Some(answer) = challenge(request.uri.path()) {
                    let response = response.header(header::CONTENT_TYPE, "application/octet-stream");
                    (response.body(Body::from(answer)), None)
                } else {
                    let path = request.uri.path_and_query().map_or("/", |path| path.as_str());
                    let response = response
                        .status(StatusCode::PERMANENT_REDIRECT)
                        .header(header::LOCATION, format!("{public_url}{path}"));
                    // In a task of its own: who hangs up at once has sent it all the same.
                    let caller = balancers.caller(origin, &request.headers);
                    (response.body(Body::empty()), Some(tokio::spawn(seen(request, caller))))
                };
                async move {
                    if let Some(seen) = seen {
                        let _ = seen.await;
                    }
                    response
                }
            });
            let builder = builder(false);
            let stream = TokioIo::new(Patient::new(stream));
            converse(pin!(builder.serve_connection(stream, service)), spoke, false, &stop).await
        }
    };
    accept(listener, door, stop, serve).await;
}

/// Hands each connection to its own task: [`MAX_CONNECTIONS`] at once, and [`SHED_CONNECTIONS`] beyond them, of which
/// `serve` is told that they are surplus; more wait in the kernel's queue. One that does not get through the door is closed;
/// until a balancer has said where it comes from, it has one of those places. When it is time to stop, those that are open
/// have [`INGRESS_DRAIN`] to come to their end.
async fn accept<F: Future<Output = End> + Send + 'static>(
    listener: TcpListener,
    door: Door,
    stop: CancellationToken,
    serve: impl Fn(Stream, IpAddr, bool) -> F + Clone + Send + 'static,
) {
    let [places, surplus] = [MAX_CONNECTIONS, SHED_CONNECTIONS].map(|most| Arc::new(Semaphore::new(most)));
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = async {
                // Asked for after the connection is there: what becomes free while we wait for one is not surplus.
                let accepted = listener.accept().await?;
                let (permit, is_surplus) = tokio::select! {
                    biased;
                    permit = places.clone().acquire_owned() => (permit, false),
                    permit = surplus.clone().acquire_owned() => (permit, true),
                };
                io::Result::Ok((accepted, permit, is_surplus))
            } => accepted,
        };
        match accepted {
            Ok(((stream, peer), permit, is_surplus)) => {
                // Nagle's algorithm would hold an HTTP/2 answer back for 40 ms.
                let _ = stream.set_nodelay(true);
                let (door, serve) = (door.clone(), serve.clone());
                tasks.spawn(async move {
                    if let Some(Entered { stream, origin, place }) = door.enter(stream, peer.ip()).await {
                        let end = serve(stream, origin, is_surplus).await;
                        // A balancer's connection carries the requests of others, too.
                        if end == End::Broken && !door.balancers.forwards(origin) {
                            tracing::info!(%origin, "a connection was ended as its peer broke HTTP/2");
                            door.crowd.punish(origin);
                        }
                        drop(place);
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    if timeout(INGRESS_DRAIN, tasks.wait()).await.is_err() {
        tracing::warn!("requests were still in flight when the time to drain ended");
    }
}

/// A socket address that only this machine reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loopback(SocketAddr);

impl From<Loopback> for SocketAddr {
    fn from(address: Loopback) -> Self {
        address.0
    }
}

impl FromStr for Loopback {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address: SocketAddr = text.parse().map_err(|_| "not an address with a port".to_owned())?;
        if address.ip().is_loopback() { Ok(Self(address)) } else { Err("not a loopback address".into()) }
    }
}

/// Binds a listener.
///
/// # Errors
/// When the address is taken or is not ours; the error names the option and the address.
pub async fn bind(option: &str, address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|error| io::Error::new(error.kind(), format!("--{option} {address}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_internal_listener_stays_on_this_machine() {
        assert!("127.0.0.1:9443".parse::<Loopback>().is_ok());
        assert!("[::1]:9443".parse::<Loopback>().is_ok());
        assert!("0.0.0.0:9443".parse::<Loopback>().is_err());
        assert!("10.0.0.1:9443".parse::<Loopback>().is_err());
    }
}
