//! A balancer in front of an ingress process: it passes connections on as they are, and puts a header of the PROXY
//! protocol in front of each.
//!
//! The headers are written here byte by byte, from the specification, and not by the library that reads them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use tokio::{
    io::{AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{JoinHandle, JoinSet},
};

/// The twelve bytes that a header of version 2 begins with (§2.2).
pub const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// What version 2 says of a connection from `source`.
pub fn version_2(source: IpAddr) -> Vec<u8> {
    let (family, source, destination) = match source {
        IpAddr::V4(source) => (0x11, source.octets().to_vec(), Ipv4Addr::LOCALHOST.octets().to_vec()),
        IpAddr::V6(source) => (0x21, source.octets().to_vec(), Ipv6Addr::LOCALHOST.octets().to_vec()),
    };
    let addresses = [&source[..], &destination, &[0x12, 0x34], &[1, 187]].concat();
    [SIGNATURE, &[0x21, family, 0, addresses.len() as u8], &addresses].concat()
}

/// The same in version 1.
pub fn version_1(source: IpAddr) -> Vec<u8> {
    let (family, destination) = match source {
        IpAddr::V4(_) => ("TCP4", IpAddr::from(Ipv4Addr::LOCALHOST)),
        IpAddr::V6(_) => ("TCP6", IpAddr::from(Ipv6Addr::LOCALHOST)),
    };
    format!("PROXY {family} {source} {destination} 4660 443\r\n").into_bytes()
}

/// What version 2 says of a connection of the balancer's own, such as a health check.
pub fn local() -> Vec<u8> {
    [SIGNATURE, &[0x20, 0, 0, 0]].concat()
}

/// A connection to `to` from an address of this machine.
///
/// # Errors
/// When there is none.
pub async fn connect(from: IpAddr, to: SocketAddr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((from, 0).into())?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A running balancer, all of whose callers are at one address. Dropping it closes its connections.
#[derive(Debug)]
pub struct Balancer {
    port: u16,
    serving: JoinHandle<()>,
}

impl Balancer {
    /// One with the address `own`, which puts `header` in front of each connection to `to`.
    ///
    /// # Errors
    /// When it cannot listen.
    pub async fn start(own: IpAddr, to: SocketAddr, header: Vec<u8>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let header = header.clone();
                connections.spawn(async move {
                    let mut far = connect(own, to).await?;
                    far.write_all(&header).await?;
                    copy_bidirectional(&mut near, &mut far).await?;
                    anyhow::Ok(())
                });
            }
        });
        Ok(Self { port, serving })
    }

    /// Its origin.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
