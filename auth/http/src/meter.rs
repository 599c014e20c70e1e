//! How much each client has done lately, on all replicas together, and each network whose callers have not shown who
//! they are. Pure: the time and what others tell come in as arguments.
//!
//! Every replica counts what it lets through, by client, kind and slot of time, and tells the others a few times a
//! second. Counts only grow within a slot, so that a message which is lost, late or doubled does no harm. What a client
//! has used is what it did in the window that ends now: ten slots, and of the oldest one the part that the window still
//! covers. What the others have not told yet is taken to be as much as we let through in the same time, so that the sum
//! hardly ever passes the limit. The window is long against a round of the exchange: 10 s and more.
//!
//! When the exchange is away, each replica grants its share of the limit, by the last number of replicas that it knew.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    net::IpAddr,
    time::Duration,
};

use dermflow_schemas::{
    id::ClientId,
    limits::{COUNT_SILENCE, COUNTED_NETWORKS},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::crowd::network;

/// Rounds of the exchange for which an entry is told after its last change, in case messages were lost.
const REPEATS: u32 = 10;

/// Counts that networks share when there are too many of them: who fills one knows only of few whom that concerns.
const SHARED: u64 = 1_024;

/// Slots of a window.
const SLOTS: usize = 10;

/// Who is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Subject {
    /// A client that has shown who it is.
    #[serde(rename = "c")]
    Client(ClientId),
    /// Everybody else from an IPv4 address, or from an IPv6 /64, by its 64 bits.
    #[serde(rename = "n")]
    Network(u64),
    /// One of the shares of all networks for which there is no count of their own, of this replica only.
    #[serde(skip)]
    Shared(u64),
}

impl Subject {
    /// The network of an address.
    pub fn network(address: IpAddr) -> Self {
        let octets = network(address);
        Self::Network(octets.into_iter().fold(0, |bits, octet| bits << 8 | u64::from(octet)))
    }
}

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// Requests of HTTP.
    #[serde(rename = "r")]
    Requests,
    /// Those that ask how far something is.
    #[serde(rename = "p")]
    Polls,
    /// Images that are submitted.
    #[serde(rename = "i")]
    Images,
}

/// How much of it is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// So much.
    pub quota: u64,
    /// In any time as long as this.
    pub window: Duration,
}

impl Policy {
    fn slot_millis(self) -> u64 {
        (self.window.as_millis() as u64 / SLOTS as u64).max(1)
    }

    /// The number of the slot, and how much of it has passed, 0 to 1.
    fn at(self, now: u64) -> (u64, f64) {
        let slot = self.slot_millis();
        (now / slot, (now % slot) as f64 / slot as f64)
    }
}

/// What is left of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// So much.
    pub amount: u64,
    /// Until nothing of what was used counts any more.
    pub reset: Duration,
}

/// What one replica let through, the latest slot first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    slot: u64,
    amounts: [u64; SLOTS + 1],
}

impl Counts {
    /// The same, seen from another slot. What another replica's clock puts into the future is of now.
    fn seen_from(self, slot: u64) -> Self {
        let mut amounts = [0; SLOTS + 1];
        for (age, amount) in self.amounts.into_iter().enumerate() {
            let age = (slot + age as u64).saturating_sub(self.slot) as usize;
            if let Some(sum) = amounts.get_mut(age) {
                *sum += amount;
            }
        }
        Self { slot, amounts }
    }

    fn add(self, other: Self) -> Self {
        let other = other.seen_from(self.slot).amounts;
        Self { slot: self.slot, amounts: std::array::from_fn(|age| self.amounts[age] + other[age]) }
    }

    /// In the window that ends when this much of the slot has passed.
    fn used(self, passed: f64) -> f64 {
        let [recent @ .., oldest] = self.amounts;
        recent.iter().sum::<u64>() as f64 + oldest as f64 * (1.0 - passed)
    }

    fn is_empty(self) -> bool {
        self.amounts == [0; SLOTS + 1]
    }
}

/// One line of what replicas tell each other.
pub type Line = (Subject, Kind, Counts);

#[derive(Debug, Default)]
struct Account {
    own: Counts,
    others: HashMap<Uuid, Counts>,
    /// Let through in this round of the exchange and in the one before: the others may have done as much, unheard.
    unheard: [u64; 2],
    /// Rounds since the last change.
    rounds: u32,
    /// Of its policy in milliseconds, for when nobody asks any more.
    slot: u64,
}

impl Account {
    /// Own counts and the others', seen from a slot.
    fn sum(&self, slot: u64) -> Counts {
        self.others.values().fold(self.own.seen_from(slot), |sum, counts| sum.add(*counts))
    }
}

/// The counts of one replica, and what it knows of the others'.
#[derive(Debug)]
pub struct Meter {
    replica: Uuid,
    accounts: HashMap<(Subject, Kind), Account>,
    /// How many of them are networks'.
    networks: usize,
    /// Which networks share a count is nobody's choice.
    shares: RandomState,
    /// When the others were heard last, by [`Meter::hear`]'s clock.
    heard: HashMap<Uuid, u64>,
    /// When our own message came back: the exchange works.
    echoed: Option<u64>,
    /// At the last look, ourselves included.
    replicas: u64,
}

impl Meter {
    /// A meter that knows of nobody else.
    pub fn new(replica: Uuid) -> Self {
        Self {
            replica,
            accounts: HashMap::new(),
            networks: 0,
            shares: RandomState::new(),
            heard: HashMap::new(),
            echoed: None,
            replicas: 1,
        }
    }

    /// Counts `amount` if the policy allows it at `now` (milliseconds of a clock that the replicas share).
    ///
    /// # Errors
    /// How long until it would be allowed, if nothing else came.
    pub fn take(
        &mut self,
        subject: Subject,
        kind: Kind,
        policy: Policy,
        amount: u64,
        now: u64,
    ) -> Result<(), Duration> {
        let subject = self.counted(subject, kind);
        let (slot, passed) = policy.at(now);
        let used = self.used(subject, kind, policy, now);
        let quota = self.quota(policy, now).max(amount) as f64;
        if used.used(passed) + amount as f64 > quota {
            return Err(wait(used, policy, quota - amount as f64, passed));
        }
        let account = self.account(subject, kind);
        account.own = account.own.seen_from(slot);
        account.own.amounts[0] += amount;
        account.unheard[0] += amount;
        (account.rounds, account.slot) = (0, policy.slot_millis());
        Ok(())
    }

    /// What is left.
    pub fn left(&self, subject: Subject, kind: Kind, policy: Policy, now: u64) -> Left {
        let (_, passed) = policy.at(now);
        let used = self.used(self.counted(subject, kind), kind, policy, now);
        let amount = (self.quota(policy, now) as f64 - used.used(passed)).max(0.0) as u64;
        Left { amount, reset: wait(used, policy, 0.0, passed) }
    }

    /// Clients have a count each, as staff has registered them all; networks, while there are not too many.
    fn counted(&self, subject: Subject, kind: Kind) -> Subject {
        match subject {
            Subject::Network(_) if self.is_too_many(subject, kind) => {
                Subject::Shared(self.shares.hash_one(subject) % SHARED)
            }
            _ => subject,
        }
    }

    fn is_too_many(&self, subject: Subject, kind: Kind) -> bool {
        matches!(subject, Subject::Network(_))
            && self.networks >= COUNTED_NETWORKS
            && !self.accounts.contains_key(&(subject, kind))
    }

    fn account(&mut self, subject: Subject, kind: Kind) -> &mut Account {
        let networks = &mut self.networks;
        self.accounts.entry((subject, kind)).or_insert_with(|| {
            *networks += usize::from(matches!(subject, Subject::Network(_)));
            Account::default()
        })
    }

    fn used(&self, subject: Subject, kind: Kind, policy: Policy, now: u64) -> Counts {
        let (slot, _) = policy.at(now);
        let Some(account) = self.accounts.get(&(subject, kind)) else {
            return Counts::default().seen_from(slot);
        };
        if !self.in_touch(now) {
            return account.own.seen_from(slot);
        }
        let mut used = account.sum(slot);
        used.amounts[0] += (self.replicas - 1) * account.unheard.iter().sum::<u64>();
        used
    }

    fn quota(&self, policy: Policy, now: u64) -> u64 {
        if self.in_touch(now) { policy.quota } else { policy.quota / self.replicas }
    }

    fn in_touch(&self, now: u64) -> bool {
        self.echoed.is_some_and(|echoed| now.saturating_sub(echoed) <= COUNT_SILENCE.as_millis() as u64)
    }

    /// Ends a round of the exchange: gives what the others should know.
    pub fn round(&mut self, now: u64) -> Vec<Line> {
        let silence = COUNT_SILENCE.as_millis() as u64;
        if let Some(echoed) = self.echoed.filter(|_| self.in_touch(now)) {
            // Against our own message, which stops coming back when theirs stop coming: then nobody is gone.
            self.heard.retain(|_, heard| echoed.saturating_sub(*heard) <= silence);
            self.replicas = 1 + self.heard.len() as u64;
        }
        let mut lines = Vec::new();
        self.accounts.retain(|(subject, kind), account| {
            account.unheard = [0, account.unheard[0]];
            account.rounds = account.rounds.saturating_add(1);
            if account.rounds <= REPEATS && !matches!(subject, Subject::Shared(_)) {
                lines.push((*subject, *kind, account.own));
            }
            let slot = now / account.slot.max(1);
            account.others.retain(|_, counts| !counts.seen_from(slot).is_empty());
            account.rounds <= REPEATS || !account.sum(slot).is_empty()
        });
        self.networks = self.accounts.keys().filter(|(who, _)| matches!(who, Subject::Network(_))).count();
        lines
    }

    /// Takes in what a replica tells, ourselves included.
    pub fn hear(&mut self, replica: Uuid, lines: &[Line], windows: impl Fn(Kind) -> Duration, now: u64) {
        if replica == self.replica {
            self.echoed = Some(now);
            return;
        }
        self.heard.insert(replica, now);
        for (subject, kind, counts) in lines {
            if self.is_too_many(*subject, *kind) {
                continue;
            }
            let account = self.account(*subject, *kind);
            if account.slot == 0 {
                let policy = Policy { quota: 0, window: windows(*kind) };
                (account.slot, account.rounds) = (policy.slot_millis(), REPEATS);
            }
            account.others.insert(replica, *counts);
        }
    }
}

/// How long until no more than `room` of what was used counts, when nothing else comes.
fn wait(used: Counts, policy: Policy, room: f64, passed: f64) -> Duration {
    let (mut excess, mut slots) = (used.used(passed) - room, 0.0);
    let oldest_first = used.amounts.iter().rev().enumerate();
    for (n, amount) in oldest_first.map(|(n, amount)| (n, *amount as f64)) {
        // Of the oldest slot only the rest still counts.
        let rest = if n == 0 { 1.0 - passed } else { 1.0 };
        if excess <= 0.0 {
            break;
        }
        let fades = (excess / (amount * rest).max(f64::MIN_POSITIVE)).min(1.0);
        slots += rest * fades;
        excess -= amount * rest;
    }
    Duration::from_millis((policy.slot_millis() as f64 * slots).ceil() as u64)
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::{limits::COUNT_INTERVAL, random::Rng};

    use super::*;

    /// Milliseconds that a message is on its way.
    const WAY: u64 = 5;
    const CLIENT: &str = "7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37";

    fn client() -> Subject {
        Subject::Client(CLIENT.parse().unwrap())
    }

    /// Several replicas that tell each other with a delay, and lose one message in `loss`.
    struct Simulation {
        meters: Vec<Meter>,
        /// When it arrives, from whom, what.
        sent: Vec<(u64, usize, Vec<Line>)>,
        policy: Policy,
        loss: u64,
        rng: Rng,
        now: u64,
    }

    impl Simulation {
        fn new(replicas: usize, quota: u64, window: u64, loss: u64, seed: u64) -> Self {
            let meters = (0..replicas).map(|n| Meter::new(Uuid::from_u128(n as u128 + 1))).collect();
            let policy = Policy { quota, window: Duration::from_secs(window) };
            let mut simulation =
                Self { meters, sent: Vec::new(), policy, loss, rng: Rng(seed), now: 1_000_000_000 };
            // They have found each other before anybody calls.
            simulation.run(3_000, |_| 0);
            simulation
        }

        /// Runs for some milliseconds; in each, replica `n` is asked `asked(n)` times a second on the average. Gives
        /// how often the answer was yes.
        fn run(&mut self, millis: u64, asked: impl Fn(usize) -> u64) -> u64 {
            let mut granted = 0;
            for _ in 0..millis {
                self.now += 1;
                for n in 0..self.meters.len() {
                    let times = asked(n) / 1_000 + u64::from(self.rng.number() % 1_000 < asked(n) % 1_000);
                    for _ in 0..times {
                        let taken = self.meters[n].take(client(), Kind::Requests, self.policy, 1, self.now);
                        granted += u64::from(taken.is_ok());
                    }
                    // Each has its own beat.
                    if self.now % COUNT_INTERVAL.as_millis() as u64 == n as u64 * 37 % 100 {
                        let lines = self.meters[n].round(self.now);
                        if self.loss == 0 || !self.rng.number().is_multiple_of(self.loss) {
                            self.sent.push((self.now + WAY, n, lines));
                        }
                    }
                }
                let now = self.now;
                for (_, from, lines) in self.sent.extract_if(.., |(at, ..)| *at <= now) {
                    for meter in &mut self.meters {
                        meter.hear(Uuid::from_u128(from as u128 + 1), &lines, |_| self.policy.window, now);
                    }
                }
            }
            granted
        }
    }

    #[test]
    fn the_limit_holds_over_replicas_within_a_tenth() {
        for (replicas, quota, window) in
            [(1, 200, 1), (2, 200, 10), (2, 10_000, 10), (3, 1_000, 10), (5, 10_000, 10), (4, 600, 60)]
        {
            for seed in 0..4 {
                for loss in [0, 4] {
                    let case =
                        format!("{replicas} replicas, {quota} in {window} s, seed {seed}, loss {loss}");
                    // Twice the limit, evenly, and all of it at one replica.
                    for uneven in [false, true] {
                        let mut simulation = Simulation::new(replicas, quota, window, loss, seed);
                        let offered = 2 * quota / window + 1;
                        let asked = |n| match (uneven, n) {
                            (false, _) => offered / replicas as u64 + 1,
                            (true, 0) => offered,
                            (true, _) => 0,
                        };
                        // Over many windows, and in the first one.
                        let first = simulation.run(window * 1_000, asked);
                        let later = simulation.run(5 * window * 1_000, asked) as f64 / 5.0;
                        for (what, granted) in [("first", first as f64), ("later", later)] {
                            let ratio = granted / quota as f64;
                            assert!(
                                (0.9..=1.1).contains(&ratio),
                                "{case}, {what}, uneven {uneven}: {ratio:.3}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_burst_at_once_on_all_replicas_does_not_pass_the_limit_by_more_than_a_tenth() {
        let mut simulation = Simulation::new(3, 3_000, 10, 0, 7);
        let granted = simulation.run(5_000, |_| 20_000);
        assert!((2_700..=3_300).contains(&granted), "{granted}");
    }

    #[test]
    fn below_the_limit_nothing_is_refused() {
        let mut simulation = Simulation::new(2, 1_000, 10, 0, 3);
        let mut refused = 0;
        for _ in 0..60_000 {
            simulation.run(1, |_| 0);
            if simulation.now.is_multiple_of(25) {
                let n = (simulation.now / 25 % 2) as usize;
                let taken =
                    simulation.meters[n].take(client(), Kind::Requests, simulation.policy, 2, simulation.now);
                refused += u32::from(taken.is_err());
            }
        }
        assert_eq!(refused, 0, "80 a second of 100");
    }

    #[test]
    fn without_the_exchange_each_grants_its_share() {
        let mut simulation = Simulation::new(4, 1_000, 10, 0, 1);
        // Nothing is heard any more, not even of oneself.
        simulation.loss = 1;
        simulation.run(3_000, |_| 0);
        let granted = simulation.run(10_000, |_| 500);
        assert!((900..=1_100).contains(&granted), "{granted}");
        let alone = simulation.run(20_000, |n| if n == 0 { 500 } else { 0 });
        assert!((450..=550).contains(&alone), "{alone} of two windows at one of four");
    }

    #[test]
    fn a_replica_that_is_gone_leaves_its_share_to_the_others() {
        let mut simulation = Simulation::new(2, 1_000, 10, 0, 1);
        simulation.meters.pop();
        simulation.run(3_000, |_| 0);
        assert_eq!(simulation.meters[0].replicas, 1);
        let granted = simulation.run(10_000, |_| 500);
        assert!((900..=1_100).contains(&granted), "{granted}");
    }

    #[test]
    fn who_is_refused_is_told_when_to_come_back() {
        let policy = Policy { quota: 100, window: Duration::from_secs(10) };
        let (mut meter, mut now) = (Meter::new(Uuid::nil()), 1_000_000);
        for _ in 0..1_000 {
            let Err(wait) = meter.take(client(), Kind::Requests, policy, 7, now) else { continue };
            now += wait.as_millis() as u64 + 1;
            assert!(meter.take(client(), Kind::Requests, policy, 7, now).is_ok(), "after {wait:?}");
        }
        assert!(now > 1_010_000, "nothing was refused");
    }

    #[test]
    fn what_is_left_is_told_and_nothing_is_kept_of_who_is_gone() {
        let policy = Policy { quota: 100, window: Duration::from_secs(10) };
        let mut meter = Meter::new(Uuid::nil());
        let now = 1_002_500;
        assert_eq!(meter.left(client(), Kind::Images, policy, now).amount, 100);
        meter.take(client(), Kind::Images, policy, 3, now).unwrap();
        let left = meter.left(client(), Kind::Images, policy, now);
        assert_eq!(left, Left { amount: 97, reset: Duration::from_millis(10_500) });
        assert_eq!(meter.left(client(), Kind::Polls, policy, now).amount, 100, "another kind");
        for round in 1..=300 {
            meter.round(now + round * 100);
        }
        assert!(meter.accounts.is_empty());
    }

    #[test]
    fn networks_without_number_take_no_memory_without_bound() {
        let policy = Policy { quota: 10, window: Duration::from_secs(10) };
        let (mut meter, now) = (Meter::new(Uuid::nil()), 1_000_000);
        let network = |n: usize| Subject::network(IpAddr::from((n as u32 + 1).to_be_bytes()));
        for n in 0..COUNTED_NETWORKS {
            assert!(meter.take(network(n), Kind::Requests, policy, 1, now).is_ok());
        }
        let mut take = |n| meter.take(network(n), Kind::Requests, policy, 1, now).is_ok();
        let granted = (COUNTED_NETWORKS..4 * COUNTED_NETWORKS).filter(|n| take(*n)).count();
        let most = 10 * SHARED as usize;
        assert!((most * 9 / 10..=most).contains(&granted), "{granted}: together as {SHARED}");
        assert!(meter.accounts.len() <= COUNTED_NETWORKS + SHARED as usize);
        assert!(meter.take(network(7), Kind::Requests, policy, 9, now).is_ok(), "who was there before");
        assert!(meter.take(client(), Kind::Requests, policy, 10, now).is_ok(), "who is known");
    }
}
