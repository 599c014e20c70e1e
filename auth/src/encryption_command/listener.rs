//! What a listener agrees on with somebody who calls it.

use std::{
    net::{TcpStream, ToSocketAddrs},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use dermflow_schemas::limits::HANDSHAKE_TIMEOUT;
use rustls::{
    ClientConfig, ClientConnection, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use url::Url;

use super::{Finding, Protection};

const SOURCE: &str = "a TLS handshake with it, its certificate verified";

/// A handshake with the listener at `url`.
///
/// # Errors
/// When the URL or the CA cannot be read.
pub(super) async fn look(url: &str, ca: &Path) -> Result<Finding> {
    let parsed = Url::parse(url).with_context(|| format!("--listener {url}"))?;
    let host = parsed.host_str().with_context(|| format!("--listener {url}: no host"))?.to_owned();
    let port = parsed.port_or_known_default().unwrap_or(443);
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).with_context(|| ca.display().to_string())? {
        roots.add(certificate?)?;
    }
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from(host.clone())?;
    let shaken = tokio::task::spawn_blocking(move || handshake(&host, port, config, name)).await?;
    Ok(match shaken {
        Ok(seen) => Finding::link(format!("callers to {url}"), Protection::Tls, seen, SOURCE),
        Err(error) => {
            Finding::link(format!("callers to {url}"), Protection::Unknown, format!("{error:#}"), SOURCE)
        }
    })
}

/// A connection to the first of the host's addresses that takes one in time.
fn connect(host: &str, port: u16) -> Result<TcpStream> {
    let mut outcome = Err(anyhow!("the host has no address"));
    for address in (host, port).to_socket_addrs()? {
        outcome = TcpStream::connect_timeout(&address, HANDSHAKE_TIMEOUT).map_err(Into::into);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

fn handshake(host: &str, port: u16, config: ClientConfig, name: ServerName<'static>) -> Result<String> {
    let mut socket = connect(host, port).context("no connection")?;
    let limit: Option<Duration> = Some(HANDSHAKE_TIMEOUT);
    socket.set_read_timeout(limit)?;
    socket.set_write_timeout(limit)?;
    let mut tls = ClientConnection::new(Arc::new(config), name)?;
    while tls.is_handshaking() {
        tls.complete_io(&mut socket).context("no handshake")?;
    }
    let version = tls.protocol_version().context("no version of TLS")?;
    let suite = tls.negotiated_cipher_suite().context("no cipher suite")?;
    Ok(format!("{version:?}, {:?}", suite.suite()))
}
