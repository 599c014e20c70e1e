//! How callers come in.

use std::{io::ErrorKind, net::IpAddr};

use prometheus::{IntCounter, Registry};
use tokio::net::TcpStream;

use crate::{
    balancer::{Balancers, Stream},
    crowd::Crowd,
    metrics::add,
    shares::Share,
};

/// How many connections a listener takes from one network, and which balancers are in front of it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Door {
    pub(crate) crowd: Crowd,
    pub(crate) balancers: Balancers,
    /// Counts connections of balancers that do not say where they come from.
    unnamed: Option<IntCounter>,
}

impl From<Crowd> for Door {
    /// Without balancers.
    fn from(crowd: Crowd) -> Self {
        Self { crowd, balancers: Balancers::default(), unnamed: None }
    }
}

/// Counts, for [`Door::new`], connections of balancers that begin with no PROXY header, or with a bad one.
///
/// # Errors
/// When the registry has one already.
pub fn counter(registry: &Registry) -> Result<IntCounter, prometheus::Error> {
    let help = "Connections of balancers that begin with no PROXY header, or with a bad one.";
    add(registry, IntCounter::new("dermflow_proxy_headers_refused_total", help)?)
}

/// A connection that may stay.
pub(crate) struct Entered {
    pub(crate) stream: Stream,
    /// Where it comes from: behind a balancer that says so, the balancer's caller.
    pub(crate) origin: IpAddr,
    pub(crate) place: Share<Vec<u8>>,
}

impl Door {
    /// Behind these balancers. The connections that they pass on count for the networks of their callers; `unnamed` counts
    /// those that do not say whose they are.
    pub fn new(crowd: Crowd, balancers: Balancers, unnamed: IntCounter) -> Self {
        Self { crowd, balancers, unnamed: Some(unnamed) }
    }

    /// Lets a connection of `peer` in; `None` when its network has as many as it may, or when a balancer does not say
    /// where it comes from.
    pub(crate) async fn enter(&self, stream: TcpStream, peer: IpAddr) -> Option<Entered> {
        match self.balancers.origin(stream, peer).await {
            Ok((stream, origin)) => {
                let place = self.crowd.admit(origin)?;
                Some(Entered { stream, origin, place })
            }
            Err(error) => {
                // Some look whether we are there in this way.
                if error.kind() != ErrorKind::UnexpectedEof {
                    self.unnamed.iter().for_each(IntCounter::inc);
                    tracing::info!(balancer = %peer, %error, "a balancer's connection begins without a PROXY header");
                }
                None
            }
        }
    }
}
