//! Balancers in front of a listener, and what they say of where a caller is.
//!
//! One that passes connections on begins each with a header of the PROXY protocol, version 1 or 2. One that speaks HTTP
//! with us names the caller of each request in `Forwarded` (RFC 7239). Nobody else's word counts.
//!
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>

use std::{
    io::{self, ErrorKind},
    net::IpAddr,
    str::FromStr,
    sync::Arc,
};

use dermflow_schemas::limits::{MAX_PROXY_HEADER_BYTES, PROXY_HEADER_TIMEOUT};
use hyper::HeaderMap;
use ipnet::IpNet;
use proxy_header::{Error, ParseConfig, ProxyHeader};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::forwarded;

/// Bytes that are read at once until the header is there. Most are shorter; what was read of what follows waits here.
/// Afterwards whoever reads does so with more room, past this buffer.
const CHUNK_BYTES: usize = 512;

/// Bytes of a header of version 1 (§2.1).
const MAX_V1_BYTES: usize = 107;

/// A connection, with what was read of it while there was a header to look for.
pub(crate) type Stream = BufReader<TcpStream>;

/// The network of a balancer: `10.1.0.0/16`, `2001:db8::/48`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network(IpNet);

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.parse::<IpAddr>().map(IpNet::from);
        let network: IpNet = address.or_else(|_| text.parse()).map_err(|_| "not a network".to_owned())?;
        if network.prefix_len() == 0 {
            return Err("everybody is no balancer".into());
        }
        Ok(Self(network.trunc()))
    }
}

/// The balancers in front of a listener. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Balancers {
    proxying: Arc<[Network]>,
    forwarding: Arc<[Network]>,
}

impl Balancers {
    /// Connections from `proxying` have to begin with a PROXY header; requests from `forwarding` name their caller in
    /// `Forwarded`. A request may come through both: from one of `forwarding`, passed on by one of `proxying`.
    pub fn new(proxying: &[Network], forwarding: &[Network]) -> Self {
        Self { proxying: proxying.into(), forwarding: forwarding.into() }
    }

    /// The connection of `peer`, without the header that a balancer has put in front, and where it comes from.
    ///
    /// # Errors
    /// When a balancer has not sent its header within [`PROXY_HEADER_TIMEOUT`], or something else.
    pub(crate) async fn origin(&self, stream: TcpStream, peer: IpAddr) -> io::Result<(Stream, IpAddr)> {
        let (mut stream, peer) = (BufReader::with_capacity(CHUNK_BYTES, stream), peer.to_canonical());
        if !is_in(&self.proxying, peer) {
            return Ok((stream, peer));
        }
        let source = timeout(PROXY_HEADER_TIMEOUT, read_header(&mut stream)).await??;
        Ok((stream, source.map_or(peer, |source| source.to_canonical())))
    }

    /// Whether requests on a connection from `origin` are others'.
    pub(crate) fn forwards(&self, origin: IpAddr) -> bool {
        is_in(&self.forwarding, origin)
    }

    /// Who has sent a request with these headers on a connection from `origin`.
    pub(crate) fn caller(&self, origin: IpAddr, headers: &HeaderMap) -> IpAddr {
        let is_balancer = |address| is_in(&self.forwarding, address);
        if self.forwards(origin) { forwarded::caller(headers, origin, is_balancer) } else { origin }
    }
}

fn is_in(networks: &[Network], address: IpAddr) -> bool {
    networks.iter().any(|Network(network)| network.contains(&address))
}

/// Reads a PROXY header and nothing of what follows it. Gives no address when the balancer speaks for itself, as for a
/// health check (`LOCAL`), or for a caller that has no IP address.
pub(crate) async fn read_header(stream: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Option<IpAddr>> {
    let config = ParseConfig { include_tlvs: false, ..ParseConfig::default() };
    let mut header = Vec::new();
    loop {
        let chunk = stream.fill_buf().await?;
        if chunk.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let (seen, arrived) = (header.len(), chunk.len());
        header.extend_from_slice(chunk);
        match ProxyHeader::parse(&header, config) {
            // One that comes in pieces is refused for that, and so is one that does not.
            Ok((_, length)) if header.starts_with(b"P") && length > MAX_V1_BYTES => {
                return Err(ErrorKind::InvalidData.into());
            }
            Ok((header, length)) => {
                stream.consume(length.saturating_sub(seen));
                return Ok(header.proxied_address().map(|addresses| addresses.source.ip()));
            }
            Err(Error::BufferTooShort) if header.len() < MAX_PROXY_HEADER_BYTES => stream.consume(arrived),
            Err(error) => return Err(io::Error::new(ErrorKind::InvalidData, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    /// The bytes before those of version and command (§2.2).
    const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

    fn v2(command: u8, family: u8, addresses: &[u8]) -> Vec<u8> {
        let length = (addresses.len() as u16).to_be_bytes();
        [SIGNATURE, &[command, family], &length, addresses].concat()
    }

    fn v4(command: u8) -> Vec<u8> {
        v2(command, 0x11, &[192, 0, 2, 7, 10, 0, 0, 1, 0x12, 0x34, 1, 187])
    }

    fn v6(source: &str) -> Vec<u8> {
        let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        v2(0x21, 0x21, &[&octets(source)[..], &octets("2001:db8::1"), &[0x12, 0x34, 1, 187]].concat())
    }

    /// What is read of `pieces`, sent one by one: the address, and what follows the header.
    async fn read(pieces: &[&[u8]]) -> io::Result<(Option<IpAddr>, Vec<u8>)> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let mut balancer = TcpStream::connect(listener.local_addr()?).await?;
        balancer.set_nodelay(true)?;
        let mut stream = BufReader::with_capacity(CHUNK_BYTES, listener.accept().await?.0);
        let write = async {
            for piece in pieces {
                balancer.write_all(piece).await?;
                tokio::task::yield_now().await;
            }
            balancer.shutdown().await
        };
        let read = async {
            let source = read_header(&mut stream).await?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).await?;
            io::Result::Ok((source, rest))
        };
        let (written, read) = tokio::join!(write, read);
        let read = read?;
        written?;
        Ok(read)
    }

    #[tokio::test]
    async fn a_header_is_taken_off_and_nothing_else() {
        // Longer than what is read at once, with the bytes of a header in it.
        let rest = [v4(0x21), vec![7; 3 * CHUNK_BYTES]].concat();
        let padding = |bytes: u16| [&[4][..], &bytes.to_be_bytes(), &vec![0; bytes.into()]].concat();
        let with_extension = v2(0x21, 0x11, &[&v4(0x21)[16..], &padding(1_000), &padding(2_000)].concat());
        let long = format!("PROXY TCP6 {0} {0} 65535 65535\r\n", ["ffff"; 8].join(":"));
        for (header, source) in [
            (v4(0x21), Some("192.0.2.7")),
            (with_extension, Some("192.0.2.7")),
            (v6("2001:db8:7::7"), Some("2001:db8:7::7")),
            (v4(0x20), None),
            (v2(0x20, 0, &[]), None),
            (v2(0x21, 0, &[]), None),
            (v2(0x21, 0x31, &[0; 216]), None),
            (b"PROXY TCP4 192.0.2.7 10.0.0.1 4660 443\r\n".to_vec(), Some("192.0.2.7")),
            (b"PROXY TCP6 2001:db8::7 2001:db8::1 4660 443\r\n".to_vec(), Some("2001:db8::7")),
            (long.into_bytes(), Some("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
        ] {
            let source = source.map(|source| source.parse::<IpAddr>().unwrap());
            let whole = [header.clone(), rest.clone()].concat();
            let bytewise: Vec<&[u8]> = header.chunks(1).chain([&rest[..]]).collect();
            for pieces in [vec![&whole[..]], bytewise] {
                let read = read(&pieces).await.ok();
                assert_eq!(read, Some((source, rest.clone())), "{header:?} in {} pieces", pieces.len());
            }
        }
    }

    #[tokio::test]
    async fn only_a_balancers_header_is_taken_off() {
        let (header, loopback) = (v4(0x21), IpAddr::from([127, 0, 0, 1]));
        for (network, source, rest) in
            [("127.0.0.0/8", [192, 0, 2, 7], &b"rest"[..]), ("10.0.0.0/8", [127, 0, 0, 1], &header)]
        {
            let balancers = Balancers::new(&[network.parse().unwrap()], &[]);
            let listener = TcpListener::bind((loopback, 0)).await.unwrap();
            let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            peer.write_all(&[&header[..], b"rest"].concat()).await.unwrap();
            let (stream, address) = listener.accept().await.unwrap();
            // As a listener for both versions of IP sees it.
            let IpAddr::V4(address) = address.ip() else { panic!("{address}") };
            let (mut stream, origin) =
                balancers.origin(stream, address.to_ipv6_mapped().into()).await.unwrap();
            let mut begins = vec![0; rest.len()];
            stream.read_exact(&mut begins).await.unwrap();
            assert_eq!((origin, &begins[..]), (source.into(), rest), "{network}");
        }
    }

    #[tokio::test]
    async fn what_is_no_header_is_an_error() {
        let header = v4(0x21);
        let with = |at: usize, byte: u8| {
            let mut header = header.clone();
            header[at] = byte;
            [header, vec![0; 64]].concat()
        };
        let oversized = [SIGNATURE, &[0x21, 0x11, 0xff, 0xff], &[0; MAX_PROXY_HEADER_BYTES]].concat();
        let endless = [b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 200]].concat();
        for (what, bytes) in [
            ("another signature", with(3, b'x')),
            ("version 3", with(12, 0x31)),
            ("another command", with(12, 0x22)),
            ("another family", with(13, 0x41)),
            ("too short for its addresses", with(15, 11)),
            ("longer than any", oversized),
            ("a line without end", endless),
            ("a line longer than any", [&b"PROXY UNKNOWN "[..], &[b'x'; 100], b"\r\n"].concat()),
            ("a name for an address", b"PROXY TCP4 localhost 10.0.0.1 1 443\r\n".to_vec()),
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec()),
            ("HTTP", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
        ] {
            // An end of the stream, which comes after it, would be another error.
            assert_eq!(read(&[&bytes]).await.unwrap_err().kind(), ErrorKind::InvalidData, "{what}");
        }
        for length in 0..header.len() {
            assert_eq!(read(&[&header[..length]]).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_network_is_some_addresses_and_never_all() {
        let is_in = |network: &str, address: &str| {
            is_in(&[network.parse().unwrap()], address.parse::<IpAddr>().unwrap().to_canonical())
        };
        assert!(is_in("10.1.0.0/16", "10.1.255.1") && !is_in("10.1.0.0/16", "10.2.0.1"));
        assert!(is_in("10.1.2.3/16", "::ffff:10.1.0.1"));
        assert!(is_in("10.1.2.3", "10.1.2.3") && !is_in("10.1.2.3", "10.1.2.4"));
        assert!(is_in("2001:db8::/48", "2001:db8:0:9::1") && !is_in("2001:db8::/48", "2001:db8:1::1"));
        for bad in ["", "balancer.example", "10.0.0.0/33", "0.0.0.0/0", "::/0", "10.0.0.0-10.0.0.9"] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }
}
