//! Ports of the loopback address, of which no two programs of this machine are given the same.

use std::{
    net::{Ipv4Addr, TcpListener},
    os::unix::net::UnixListener,
    sync::{Mutex, PoisonError},
};

use anyhow::{Result, anyhow};

/// Below those that the system hands out for outgoing connections, so that a port stays free while its owner is
/// down.
const FROM: u16 = 20_000;
const COUNT: u16 = 11_500;

/// What tells other processes which ports this one was given; it ends with this one, however it ends.
static TAKEN: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port that is free now, and that no other process is given by this function while this one lives.
///
/// # Errors
/// When none is found.
pub fn free() -> Result<u16> {
    for _ in 0..1_000 {
        let bytes = uuid::Uuid::new_v4().into_bytes();
        let port = FROM + u16::from_le_bytes([bytes[0], bytes[1]]) % COUNT;
        if is_free(port) && take(port) {
            return Ok(port);
        }
    }
    Err(anyhow!("no free port between {FROM} and {}", FROM + COUNT))
}

/// Whether nobody listens on a port of the loopback address.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// Whether a port was given to nobody, and is this process's from now on. Between a look at a port and its first
/// use others look as well: the kernel gives an abstract socket address, which is no file, to one of them.
#[cfg(target_os = "linux")]
pub fn take(port: u16) -> bool {
    use std::os::{linux::net::SocketAddrExt, unix::net::SocketAddr};

    let bound = SocketAddr::from_abstract_name(format!("dermflow-port-{port}"))
        .and_then(|address| UnixListener::bind_addr(&address));
    bound.map(|listener| TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push(listener)).is_ok()
}

/// Elsewhere there is no such address, and the look must do.
#[cfg(not(target_os = "linux"))]
pub fn take(_: u16) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_once() {
        let port = free().unwrap();
        assert!(is_free(port));
        assert!(!take(port));
    }
}
