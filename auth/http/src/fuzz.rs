//! What the fuzz targets of `tests/fuzz` reach of the parsers, and nothing else.

use std::{io, net::IpAddr};

use hyper::{HeaderMap, header, header::HeaderValue};
use tokio::io::BufReader;

use crate::{balancer, forwarded};

/// The caller that `Forwarded` names of a request from `balancer`, of which only it and 10.0.0.0/8 are balancers.
pub fn forwarded(fields: &[&[u8]], balancer: IpAddr) -> IpAddr {
    let values = fields.iter().filter_map(|field| HeaderValue::from_bytes(field).ok());
    let headers: HeaderMap = values.map(|value| (header::FORWARDED, value)).collect();
    let is_balancer = |address| match address {
        IpAddr::V4(v4) if v4.octets()[0] == 10 => true,
        address => address == balancer,
    };
    forwarded::caller(&headers, balancer, is_balancer)
}

/// The address in a PROXY header that comes `chunk` bytes at once, and what follows it.
///
/// # Errors
/// When it is none.
pub async fn proxy(bytes: &[u8], chunk: usize) -> io::Result<(Option<IpAddr>, Vec<u8>)> {
    let mut stream = BufReader::with_capacity(chunk, bytes);
    let address = balancer::read_header(&mut stream).await?;
    let mut rest = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await?;
    Ok((address, rest))
}
