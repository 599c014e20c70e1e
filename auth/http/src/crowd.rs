//! How many connections one caller may have.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus::{IntCounter, Registry};

use crate::metrics::add;

/// Counts open connections by the [`network`] they come from, so that no caller takes the places of all others. Cheap
/// to clone; clones count together.
#[derive(Debug, Clone)]
pub struct Crowd {
    most: usize,
    turned_away: IntCounter,
    open: Arc<Mutex<HashMap<Vec<u8>, usize>>>,
}

impl Crowd {
    /// At most `most` connections of one network. `turned_away` counts those beyond that.
    pub fn new(most: usize, turned_away: IntCounter) -> Self {
        Self { most, turned_away, open: Arc::default() }
    }

    /// A place for one more connection, until it is dropped; `None` when its network has as many as it may.
    pub(crate) fn admit(&self, address: IpAddr) -> Option<Place> {
        let network = network(address);
        let mut open = self.open();
        let count = open.entry(network.clone()).or_default();
        if *count >= self.most {
            self.turned_away.inc();
            return None;
        }
        *count += 1;
        Some(Place { crowd: self.clone(), network })
    }

    fn open(&self) -> MutexGuard<'_, HashMap<Vec<u8>, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A connection that counts.
#[derive(Debug)]
pub(crate) struct Place {
    crowd: Crowd,
    network: Vec<u8>,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.crowd.open().entry(std::mem::take(&mut self.network)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
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
    fn who_leaves_makes_room_and_is_forgotten() {
        let turned_away = IntCounter::new("turned_away", "Turned away.").unwrap();
        let crowd = Crowd::new(2, turned_away.clone());
        let admit = |text: &str| crowd.admit(text.parse().unwrap());
        let (first, second) = (admit("192.0.2.7"), admit("::ffff:192.0.2.7"));
        assert!(first.is_some() && second.is_some() && admit("192.0.2.7").is_none());
        assert!(admit("192.0.2.8").is_some());
        drop(first);
        let third = admit("192.0.2.7");
        assert!(third.is_some());
        drop((second, third));
        assert!(crowd.open().is_empty());
        assert_eq!(turned_away.get(), 1);
    }
}
