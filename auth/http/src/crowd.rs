//! How many connections one caller may have.

use std::net::IpAddr;

use dermflow_schemas::limits::{BROKEN_CONNECTIONS, BROKEN_MEMORY};
use prometheus::{IntCounter, Registry};
use tokio::time::sleep;

use crate::{
    metrics::add,
    shares::{Share, Shares},
};

/// Counts open connections by the [`network`] they come from, so that no caller takes the places of all others. Cheap
/// to clone; clones count together.
#[derive(Debug, Clone)]
pub struct Crowd {
    shares: Shares<Vec<u8>>,
    turned_away: IntCounter,
}

impl Crowd {
    /// At most `most` connections of one network. `turned_away` counts those beyond that.
    pub fn new(most: usize, turned_away: IntCounter) -> Self {
        Self { shares: Shares::new(most), turned_away }
    }

    /// A place for one more connection, until it is dropped; `None` when its network has as many as it may.
    pub(crate) fn admit(&self, address: IpAddr) -> Option<Share<Vec<u8>>> {
        let place = self.shares.take(network(address));
        if place.is_none() {
            self.turned_away.inc();
        }
        place
    }

    /// A connection was ended as its peer broke HTTP/2: for [`BROKEN_MEMORY`] its network goes without the places that it
    /// has none of after [`BROKEN_CONNECTIONS`]. What it has is left to it.
    pub(crate) fn punish(&self, address: IpAddr) {
        let places = self.shares.add(network(address), self.shares.most().div_ceil(BROKEN_CONNECTIONS));
        tokio::spawn(async move {
            sleep(BROKEN_MEMORY).await;
            drop(places);
        });
    }
}

/// Counts, for [`Crowd::new`], connections of networks that had as many as they may.
///
/// # Errors
/// When the registry has one already.
pub fn counter(registry: &Registry) -> Result<IntCounter, prometheus::Error> {
    let help = "Connections of addresses that had as many as they may.";
    add(registry, IntCounter::new("dermflow_connections_turned_away_total", help)?)
}

/// What counts as one caller: an IPv4 address, or an IPv6 /64, as who has one address of it has 2^64.
pub fn network(address: IpAddr) -> Vec<u8> {
    match address.to_canonical() {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets()[..8].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_is_an_address_of_four_bytes_or_a_network_of_eight() {
        let network = |text: &str| network(text.parse().unwrap());
        assert_eq!(network("192.0.2.7"), network("::ffff:192.0.2.7"));
        assert_ne!(network("192.0.2.7"), network("192.0.2.8"));
        assert_eq!(network("2001:db8:1:2::1"), network("2001:db8:1:2:ffff::9"));
        assert_ne!(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"));
    }

    #[test]
    fn who_has_too_many_is_turned_away_and_counted() {
        let turned_away = IntCounter::new("turned_away", "Turned away.").unwrap();
        let crowd = Crowd::new(1, turned_away.clone());
        let admit = |text: &str| crowd.admit(text.parse().unwrap());
        let first = admit("192.0.2.7");
        assert!(first.is_some() && admit("::ffff:192.0.2.7").is_none() && admit("192.0.2.8").is_some());
        assert_eq!(turned_away.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_breaks_connections_goes_without_for_a_while() {
        let crowd = Crowd::new(2, IntCounter::new("turned_away", "Turned away.").unwrap());
        let [flooding, other] = ["192.0.2.7", "192.0.2.8"].map(|address| address.parse().unwrap());
        let admits = |address| crowd.admit(address).is_some();
        crowd.punish(flooding);
        assert!(admits(flooding));
        crowd.punish(flooding);
        assert!(!admits(flooding) && admits(other));
        sleep(BROKEN_MEMORY).await;
        tokio::task::yield_now().await;
        assert!(admits(flooding));
    }
}
