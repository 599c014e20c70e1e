//! How callers come in.

use std::{io::ErrorKind, net::IpAddr};

use tokio::net::TcpStream;

use crate::{
    balancer::{Balancers, Stream},
    crowd::Crowd,
    shares::Share,
};

/// How many connections a listener takes from one network, and which balancers are in front of it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Door {
    crowd: Crowd,
    pub(crate) balancers: Balancers,
}

impl From<Crowd> for Door {
    /// Without balancers.
    fn from(crowd: Crowd) -> Self {
        Self::new(crowd, Balancers::default())
    }
}

/// A connection that may stay.
pub(crate) struct Entered {
    pub(crate) stream: Stream,
    /// Where it comes from: behind a balancer that says so, the balancer's caller.
    pub(crate) origin: IpAddr,
    pub(crate) place: Share<Vec<u8>>,
}

impl Door {
    /// Behind these balancers. The connections that they pass on count for the networks of their callers.
    pub fn new(crowd: Crowd, balancers: Balancers) -> Self {
        Self { crowd, balancers }
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
                    tracing::info!(balancer = %peer, %error, "a balancer's connection begins without a PROXY header");
                }
                None
            }
        }
    }
}
