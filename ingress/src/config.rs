//! The options of an ingress process: flags, or the environment variables named beside them.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use clap::{Args, Parser, ValueEnum};
use dermflow_auth::{db::DatabaseOptions, password::PepperOptions};
use dermflow_http::{
    balancer::Network,
    certificate::ServerCertificate,
    clients::Clients,
    serve::{Loopback, Tls, TlsError, tls_config},
};
use dermflow_schemas::{limits, queue::NatsOptions, seal::SealingOptions};

pub use crate::acme::{AcmeOptions, ChallengeKind};

/// Takes skin images over HTTPS, queues them, and answers with FHIR R4 reports.
#[derive(Debug, Clone, Parser)]
#[command(name = "ingress", version)]
pub struct Options {
    /// Where clients connect: HTTPS.
    #[arg(long, env = "DERMFLOW_LISTEN", default_value = "0.0.0.0:8443")]
    pub listen: SocketAddr,
    /// Where plain HTTP is answered with 308.
    #[arg(long, env = "DERMFLOW_PLAIN_LISTEN", default_value = "0.0.0.0:8080")]
    pub plain_listen: SocketAddr,
    /// Health and metrics, HTTPS; a loopback address.
    #[arg(long, env = "DERMFLOW_INTERNAL_LISTEN", default_value = "127.0.0.1:9443")]
    pub internal_listen: Loopback,
    /// The origin that clients see, `https://host[:port]`: in links, redirects and tokens.
    #[arg(long, env = "DERMFLOW_PUBLIC_URL", default_value = "https://localhost:8443")]
    pub public_url: Origin,
    /// Networks of balancers that begin every connection, to HTTPS and to plain HTTP, with a PROXY header (version 1 or
    /// 2): the caller's address is the one in it. CIDR; repeated, or with commas between.
    #[arg(long = "balancer", env = "DERMFLOW_BALANCERS", value_name = "NETWORK", value_delimiter = ',')]
    pub balancers: Vec<Network>,
    /// Networks of balancers that speak HTTP with us and name their caller in `Forwarded` (RFC 7239).
    #[arg(
        long = "http-balancer",
        env = "DERMFLOW_HTTP_BALANCERS",
        value_name = "NETWORK",
        value_delimiter = ','
    )]
    pub http_balancers: Vec<Network>,
    /// Open connections of one IPv4 address or IPv6 /64, per listener; those of an HTTP balancer are its own.
    #[arg(long, env = "DERMFLOW_NETWORK_CONNECTIONS", default_value_t = limits::NETWORK_CONNECTIONS as u32,
          value_parser = clap::value_parser!(u32).range(1..=limits::MAX_CONNECTIONS as i64))]
    pub network_connections: u32,
    /// Certificate chain (PEM), of the internal listener only when there is an ACME server.
    #[arg(long, env = "DERMFLOW_TLS_CERT")]
    pub tls_cert: PathBuf,
    /// Private key (PEM).
    #[arg(long, env = "DERMFLOW_TLS_KEY")]
    pub tls_key: PathBuf,
    /// Certificates of clients on the public listener.
    #[command(flatten)]
    pub clients: ClientOptions,
    /// The public listener's certificate from an ACME server.
    #[command(flatten)]
    pub acme: AcmeOptions,
    /// Folder of the keys that sign access tokens: `auth signing-key add` makes one, and all replicas read the same.
    #[arg(long, env = "DERMFLOW_SIGNING_KEYS")]
    pub signing_keys: PathBuf,
    /// Identity providers whose access tokens are taken beside our own (TOML).
    #[arg(long, env = "DERMFLOW_PROVIDERS")]
    pub providers: Option<PathBuf>,
    /// The keys that seal images and reports.
    #[command(flatten)]
    pub sealing: SealingOptions,
    /// Seconds after which the broker hands a silent worker's job to another one.
    #[arg(long, env = "DERMFLOW_ACK_WAIT", default_value_t = limits::DEFAULT_ACK_WAIT.as_secs(),
          value_parser = clap::value_parser!(u64).range(1..=600))]
    pub ack_wait: u64,
    /// Nodes of the broker that keep each message: 1, or 3 in a cluster.
    #[arg(long, env = "DERMFLOW_REPLICAS", default_value_t = 1, value_parser = replicas)]
    pub replicas: usize,
    /// The broker.
    #[command(flatten)]
    pub nats: NatsOptions,
    /// The database.
    #[command(flatten)]
    pub database: DatabaseOptions,
    /// The peppers of passwords.
    #[command(flatten)]
    pub pepper: PepperOptions,
}

/// Serves the operators' API: lists, shows, requeues and purges dead letters. A process of its own, as the one
/// that clients reach must not be able to read dead letters.
#[derive(Debug, Clone, Parser)]
pub struct OperateOptions {
    /// Where operators connect, HTTPS; a loopback address.
    #[arg(long, env = "DERMFLOW_OPERATE_LISTEN", default_value = "127.0.0.1:9444")]
    pub listen: Loopback,
    /// The origin that clients see, which the operators' tokens are from.
    #[arg(long, env = "DERMFLOW_PUBLIC_URL", default_value = "https://localhost:8443")]
    pub public_url: Origin,
    /// Certificate chain (PEM).
    #[arg(long, env = "DERMFLOW_TLS_CERT")]
    pub tls_cert: PathBuf,
    /// Private key (PEM).
    #[arg(long, env = "DERMFLOW_TLS_KEY")]
    pub tls_key: PathBuf,
    /// Certificates of clients.
    #[command(flatten)]
    pub clients: ClientOptions,
    /// Folder of the keys that sign access tokens: `auth signing-key add` makes one, and all replicas read the same.
    #[arg(long, env = "DERMFLOW_SIGNING_KEYS")]
    pub signing_keys: PathBuf,
    /// Identity providers whose access tokens are taken beside our own (TOML).
    #[arg(long, env = "DERMFLOW_PROVIDERS")]
    pub providers: Option<PathBuf>,
    /// The broker.
    #[command(flatten)]
    pub nats: NatsOptions,
    /// The database.
    #[command(flatten)]
    pub database: DatabaseOptions,
}

/// Routes that may be closed to who shows no certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Group {
    /// `/fhir`, `/batches` and `/jobs`.
    Api,
    /// `/login` and `/oauth`.
    SignIn,
    /// What operators reach, in a process of their own.
    Operators,
}

/// Whose certificates are believed, and where one is needed.
#[derive(Debug, Clone, Default, Args)]
pub struct ClientOptions {
    /// The CA of certificates that clients may show (PEM); what is put in its place is believed within seconds.
    #[arg(long, env = "DERMFLOW_CLIENT_CA", value_name = "FILE")]
    pub client_ca: Option<PathBuf>,
    /// What is closed to clients that show none: a 403. With commas between.
    #[arg(
        long,
        env = "DERMFLOW_CLIENT_CERTIFICATES",
        value_name = "GROUPS",
        value_enum,
        value_delimiter = ',',
        requires = "client_ca"
    )]
    pub client_certificates: Vec<Group>,
}

impl ClientOptions {
    /// With what a listener that serves `served` shakes hands.
    pub(crate) fn tls(&self, served: Arc<ServerCertificate>) -> Result<Tls, TlsError> {
        match &self.client_ca {
            Some(file) => Ok(Tls::Asking(Clients::open(file, served)?)),
            None => Ok(tls_config(served)?.into()),
        }
    }

    pub(crate) fn need(&self, group: Group) -> bool {
        self.client_certificates.contains(&group)
    }
}

impl Options {
    /// See [`limits::DEFAULT_ACK_WAIT`].
    pub fn ack_wait(&self) -> Duration {
        Duration::from_secs(self.ack_wait)
    }
}

/// An even number of replicas survives no more failures than the odd one below it.
fn replicas(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ (1 | 3 | 5)) => Ok(count),
        _ => Err("not 1, 3 or 5".into()),
    }
}

/// An HTTPS origin without a slash at the end (RFC 6454 §6.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(String);

impl Origin {
    /// The origin.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its host, without the port.
    pub(crate) fn host(&self) -> &str {
        let authority = self.0.trim_start_matches("https://");
        authority.rsplit_once(':').map_or(authority, |(host, _)| host)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Origin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: axum::http::Uri = text.parse().map_err(|_| "not a URL".to_owned())?;
        match (
            uri.scheme_str(),
            uri.authority(),
            uri.path_and_query().map(axum::http::uri::PathAndQuery::as_str),
        ) {
            (Some("https"), Some(host), None | Some("/")) => Ok(Self(format!("https://{host}"))),
            _ => Err("not of the form https://host[:port]".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_url_is_an_https_origin() {
        assert_eq!("https://a.example:1/".parse::<Origin>().unwrap().as_str(), "https://a.example:1");
        for bad in ["http://a.example", "https://a.example/x", "a.example", "https://a/?q"] {
            assert!(bad.parse::<Origin>().is_err(), "{bad}");
        }
    }
}
