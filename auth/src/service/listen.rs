//! Where the service listens.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use anyhow::ensure;
use dermflow_http::serve::Loopback;

/// The options of the registration service.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeOptions {
    /// Where staff connects: HTTPS, on this machine or the internal network.
    #[arg(long, env = "DERMFLOW_STAFF_LISTEN", default_value = "127.0.0.1:9445")]
    listen: SocketAddr,
    /// Health and metrics, HTTPS; a loopback address.
    #[arg(long, env = "DERMFLOW_STAFF_INTERNAL_LISTEN", default_value = "127.0.0.1:9446")]
    pub(crate) internal_listen: Loopback,
    /// Certificate chain (PEM).
    #[arg(long, env = "DERMFLOW_TLS_CERT")]
    pub(crate) tls_cert: PathBuf,
    /// Private key (PEM).
    #[arg(long, env = "DERMFLOW_TLS_KEY")]
    pub(crate) tls_key: PathBuf,
    /// The CA that signs the certificates of staff, and of nobody else (PEM).
    #[arg(long, env = "DERMFLOW_STAFF_CA")]
    pub(crate) staff_ca: PathBuf,
    // No environment variable for these two: nothing that was set for something else opens the service.
    /// Listens on an address that the public may reach; needs the next option too.
    #[arg(long)]
    public: bool,
    /// Says it a second time.
    #[arg(long)]
    really_public: bool,
}

impl ServeOptions {
    /// Where to listen.
    ///
    /// # Errors
    /// When the public may reach it, and the options do not say twice that it may.
    pub(crate) fn address(&self) -> anyhow::Result<SocketAddr> {
        ensure!(
            is_internal(self.listen.ip()) || (self.public && self.really_public),
            "--listen {}: the public may reach this address; if that is meant, say --public and --really-public",
            self.listen
        );
        Ok(self.listen)
    }
}

/// Whether an address is of this machine, or of a network that the internet has no way into (RFC 1918, RFC 4193, RFC
/// 3927, RFC 4291 §2.5.6). "Every address of this machine" is not.
fn is_internal(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_private() || address.is_link_local(),
        IpAddr::V6(address) => {
            address.is_loopback() || address.is_unique_local() || address.is_unicast_link_local()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(listen: &str, public: bool, really_public: bool) -> ServeOptions {
        let file = PathBuf::new();
        let listen = listen.parse().unwrap();
        ServeOptions {
            listen,
            internal_listen: "127.0.0.1:1".parse().unwrap(),
            tls_cert: file.clone(),
            tls_key: file.clone(),
            staff_ca: file,
            public,
            really_public,
        }
    }

    #[test]
    fn a_public_address_is_said_twice() {
        for internal in
            ["127.0.0.1:1", "[::1]:1", "10.1.2.3:1", "192.168.0.9:1", "[fd00::1]:1", "[::ffff:10.0.0.1]:1"]
        {
            assert!(options(internal, false, false).address().is_ok(), "{internal}");
        }
        for public in
            ["0.0.0.0:1", "[::]:1", "203.0.113.7:1", "[2001:db8::1]:1", "100.64.0.1:1", "[::ffff:8.8.8.8]:1"]
        {
            assert!(options(public, false, false).address().is_err(), "{public}");
            assert!(options(public, true, false).address().is_err(), "{public}");
            assert!(options(public, false, true).address().is_err(), "{public}");
            assert!(options(public, true, true).address().is_ok(), "{public}");
        }
    }
}
