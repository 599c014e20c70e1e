//! The way into the audit trail for what has no transaction of its own: logins, refusals, reads.
//!
//! Events of concurrent requests go to the database in one statement, and nobody
//! waits for a group to fill. An answer that hands something out leaves when its event is on disk; when the event
//! cannot be written, the answer is an error instead. A refusal stays a refusal: that it is missing in the trail is
//! counted, and logged.
//!
//! What callers do without number must not become a flood of events: refusals, and questions how far a job is. Of each
//! kind, caller and address [`AUDIT_SINGLES`] a second are written before their answer leaves; the rest are counted,
//! and written as one event within about a second after, or as soon as they can be.

use std::{
    collections::HashMap,
    mem,
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use deadpool_postgres::Pool;
use dermflow_http::metrics::add;
use dermflow_schemas::{
    clock,
    error::Code,
    id::ClientId,
    limits::{AUDIT_GROUP, AUDIT_QUEUE, AUDIT_SINGLES, AUDIT_SOURCES, AUDIT_WRITERS},
};
use prometheus::{IntCounter, Registry};
use serde_json::json;
use time::OffsetDateTime;
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::interval,
};
use tokio_util::sync::CancellationToken;

use super::{Action, Actor, Event, Outcome, Who};

/// An answer's events, written together or not at all.
type Entry = (Vec<Event>, oneshot::Sender<bool>);

/// What is counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    /// The first address of the network that it came from.
    source: Option<IpAddr>,
    user: Option<ClientId>,
    /// Whose account or data it was about.
    client: Option<ClientId>,
    action: Action,
    /// With which code it was refused, if it was.
    code: Option<Code>,
}

impl Kind {
    fn of(event: &Event, code: Option<Code>) -> Self {
        let user = if let Actor::User(user) = event.who.actor { Some(user) } else { None };
        let source = event.who.source.map(first_of_network);
        Self { source, user, client: event.client, action: event.action, code }
    }

    /// What is left of it when too many are told apart: who is known stays so.
    fn folded(self) -> Self {
        match self.user {
            Some(_) => Self { source: None, ..self },
            None => Self { source: None, client: None, ..self },
        }
    }
}

/// The address that stands for all of an IPv6 /64; an IPv4 address stands for itself.
fn first_of_network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    written: u32,
    /// Not written, but counted.
    more: u64,
}

/// Counts, for [`Trail::start`], refusals that could not be written, and repetitions: an alarm.
///
/// # Errors
/// When the registry has one already.
pub fn counter(registry: &Registry) -> Result<IntCounter, prometheus::Error> {
    add(
        registry,
        IntCounter::new(
            "dermflow_audit_lost_total",
            "Refusals and repetitions that are not in the audit trail.",
        )?,
    )
}

/// The way in. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Trail {
    entries: mpsc::Sender<Entry>,
    /// Since the last look of [`count`].
    counts: Arc<Mutex<HashMap<Kind, Count>>>,
    lost: IntCounter,
}

impl Trail {
    /// The way in; its other end runs until every clone is gone. `lost` counts what is missing.
    pub fn start(pool: Pool, lost: IntCounter) -> Self {
        let (entries, received) = mpsc::channel(AUDIT_QUEUE);
        tokio::spawn(write(pool, received));
        Self { entries, counts: Arc::default(), lost }
    }

    /// Returns when the events are on disk.
    ///
    /// # Errors
    /// When too many wait, or the database is away.
    pub async fn record(&self, events: Vec<Event>) -> Result<(), Code> {
        let (reply, written) = oneshot::channel();
        self.entries.try_send((events, reply)).map_err(|_| Code::Overloaded)?;
        if written.await.unwrap_or(false) { Ok(()) } else { Err(Code::DatabaseUnavailable) }
    }

    /// Records something that is done again and again, or counts it.
    ///
    /// # Errors
    /// See [`Trail::record`].
    pub async fn repeated(&self, event: Event) -> Result<(), Code> {
        if self.admits(Kind::of(&event, None)) { self.record(vec![event]).await } else { Ok(()) }
    }

    /// Records that `event` was refused with `code`, or counts it.
    pub async fn refused(&self, event: Event, code: Code) {
        if !self.admits(Kind::of(&event, Some(code))) {
            return;
        }
        if self.record(vec![event.outcome(Outcome::Refused, code)]).await.is_err() {
            self.lose(1);
        }
    }

    fn lose(&self, events: u64) {
        self.lost.inc_by(events);
        tracing::error!(events, "not in the audit trail");
    }

    fn admits(&self, kind: Kind) -> bool {
        let mut counts = self.counts();
        let count = place(&mut counts, kind);
        if count.written < AUDIT_SINGLES {
            count.written += 1;
            true
        } else {
            count.more += 1;
            false
        }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<Kind, Count>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what was only counted; returns how many are still to be written.
    async fn write_counts(&self) -> u64 {
        let counts = mem::take(&mut *self.counts());
        let (now, mut left) = (clock::now(), 0);
        let more: Vec<(Kind, u64)> = counts
            .into_iter()
            .map(|(kind, count)| (kind, count.more))
            .filter(|(_, more)| *more > 0)
            .collect();
        for some in more.chunks(AUDIT_GROUP) {
            let events = some.iter().map(|(kind, more)| counted(*kind, *more, now)).collect();
            if self.record(events).await.is_err() {
                for (kind, more) in some {
                    place(&mut self.counts(), *kind).more += more;
                    left += more;
                }
            }
        }
        left
    }
}

/// The count of a kind, or of what is left of it when too many are told apart.
fn place(counts: &mut HashMap<Kind, Count>, kind: Kind) -> &mut Count {
    let has_room = counts.contains_key(&kind) || counts.len() < AUDIT_SOURCES;
    counts.entry(if has_room { kind } else { kind.folded() }).or_default()
}

fn counted(Kind { source, user, client, action, code }: Kind, times: u64, now: OffsetDateTime) -> Event {
    let who = Who { actor: user.map_or(Actor::Unknown, Actor::User), source, request: None };
    let event = Event::new(action, who, now).client(client).detail(json!({ "times": times }));
    if let Some(code) = code { event.outcome(Outcome::Refused, code) } else { event }
}

/// Writes counts every second until `stop`, and those that are left then. What cannot be written is tried again.
pub async fn count(trail: Trail, stop: CancellationToken) {
    let mut second = interval(Duration::from_secs(1));
    loop {
        let stopped = tokio::select! {
            () = stop.cancelled() => true,
            _ = second.tick() => false,
        };
        let left = trail.write_counts().await;
        if stopped {
            if left > 0 {
                trail.lose(left);
            }
            return;
        }
    }
}

async fn write(pool: Pool, mut entries: mpsc::Receiver<Entry>) {
    let writers = Arc::new(Semaphore::new(AUDIT_WRITERS));
    loop {
        let Ok(permit) = writers.clone().acquire_owned().await else { return };
        let Some(first) = entries.recv().await else { return };
        let (mut events, mut replies) = (first.0, vec![first.1]);
        while events.len() < AUDIT_GROUP
            && let Ok((more, reply)) = entries.try_recv()
        {
            events.extend(more);
            replies.push(reply);
        }
        let pool = pool.clone();
        tokio::spawn(async move {
            let outcome = super::record(&pool, &events).await;
            if let Err(error) = &outcome {
                tracing::warn!(%error, events = events.len(), "audit trail");
            }
            for reply in replies {
                // Whoever asked may have hung up: its event is written all the same.
                let _ = reply.send(outcome.is_ok());
            }
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn trail() -> Trail {
        let lost = IntCounter::new("lost", "Lost.").unwrap();
        Trail { entries: mpsc::channel(1).0, counts: Arc::default(), lost }
    }

    fn kind(n: u32) -> Kind {
        let source = Some(IpAddr::from(n.to_be_bytes()));
        Kind { source, user: None, client: None, action: Action::Access, code: Some(Code::Forbidden) }
    }

    #[test]
    fn a_flood_is_counted_by_source_and_kind() {
        let trail = trail();
        let written = (0..100).filter(|_| trail.admits(kind(1))).count();
        assert_eq!(written, AUDIT_SINGLES as usize);
        assert!(trail.admits(kind(2)), "another address");
        assert!(trail.admits(Kind { code: Some(Code::Unauthenticated), ..kind(1) }), "another code");
        assert!(trail.admits(Kind { user: Some(Uuid::nil().into()), ..kind(1) }), "another caller");
        let counts = trail.counts.lock().unwrap();
        assert_eq!(counts[&kind(1)].more, 100 - u64::from(AUDIT_SINGLES));
    }

    #[test]
    fn addresses_without_number_take_no_memory_without_bound() {
        let trail = trail();
        let addresses = 2 * AUDIT_SOURCES as u32;
        let written = (0..addresses).filter(|n| trail.admits(kind(*n))).count();
        assert_eq!(written, AUDIT_SOURCES + AUDIT_SINGLES as usize);
        let counts = trail.counts.lock().unwrap();
        assert_eq!(counts.len(), AUDIT_SOURCES + 1);
        let counted: u64 = counts.values().map(|count| u64::from(count.written) + count.more).sum();
        assert_eq!(counted, u64::from(addresses), "none is forgotten");
    }

    #[test]
    fn who_is_known_is_not_mixed_with_strangers() {
        let trail = trail();
        for n in 0..2 * AUDIT_SOURCES as u32 {
            trail.admits(kind(n));
        }
        let user = Some(Uuid::nil().into());
        let known = Kind { user, client: user, action: Action::StatusRead, code: None, ..kind(7) };
        assert!((0..=AUDIT_SINGLES).filter(|_| trail.admits(known)).count() == AUDIT_SINGLES as usize);
        let counts = trail.counts.lock().unwrap();
        assert_eq!(counts[&Kind { source: None, ..known }].more, 1);
    }

    #[test]
    fn a_network_has_one_first_address() {
        let first = |text: &str| first_of_network(text.parse().unwrap()).to_string();
        assert_eq!(first("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!((first("192.0.2.7"), first("::ffff:192.0.2.7")), ("192.0.2.7".into(), "192.0.2.7".into()));
    }

    #[tokio::test]
    async fn what_cannot_be_written_now_is_counted_on() {
        let trail = trail();
        for _ in 0..AUDIT_SINGLES + 3 {
            trail.admits(kind(1));
        }
        assert_eq!((trail.write_counts().await, trail.write_counts().await), (3, 3));
        assert_eq!(trail.lost.get(), 0);
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_lost_aloud_and_never_a_success() {
        let trail = trail();
        let event = || Event::new(Action::Access, Who::part("test"), clock::now());
        assert!(trail.record(vec![event()]).await.is_err());
        trail.refused(event(), Code::Forbidden).await;
        assert_eq!(trail.lost.get(), 1);
    }
}
