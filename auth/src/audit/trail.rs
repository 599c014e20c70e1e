//! The way into the audit trail for what has no transaction of its own: logins, refusals, reads.
//!
//! Events of concurrent requests go to the database in one statement. An answer leaves when its event is on disk, a
//! refusal too; when the event cannot be written, the answer is an error instead.
//!
//! What callers do without number must not become a flood of events: refusals, and questions how far a job is. Of each
//! kind, caller and network [`AUDIT_SINGLES`] a second are events of their own; the rest wait for each other for
//! [`AUDIT_TOGETHER`], and are one event that has their number and, of callers who are known, what each was about.

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
    limits::{
        AUDIT_ABOUT, AUDIT_GROUP, AUDIT_PATIENCE, AUDIT_QUEUE, AUDIT_SINGLES, AUDIT_SOURCES, AUDIT_TOGETHER,
        AUDIT_WRITERS,
    },
};
use prometheus::{IntCounter, Registry};
use serde_json::{Value, json};
use tokio::{
    sync::{
        Semaphore,
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    time::{Instant, sleep},
};

use super::{Action, Actor, Event, Outcome, Who};

type Reply = oneshot::Sender<Result<(), Code>>;
type Written = oneshot::Receiver<Result<(), Code>>;

/// Events that are written together or not at all, and who waits for that.
#[derive(Debug, Default)]
struct Entry {
    events: Vec<Event>,
    replies: Vec<Reply>,
    /// When it was put into the queue.
    queued: Option<Instant>,
}

impl Entry {
    fn add(&mut self, more: Self) {
        self.events.extend(more.events);
        self.replies.extend(more.replies);
    }

    /// Its turn has come too late: whoever waits for it has waited long enough.
    fn is_late(&self) -> bool {
        self.queued.is_some_and(|queued| queued.elapsed() > AUDIT_PATIENCE)
    }

    fn reply(self, outcome: Result<(), Code>) {
        for reply in self.replies {
            // Whoever asked may have hung up: its event is written all the same.
            let _ = reply.send(outcome);
        }
    }
}

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

/// Events of one kind that are written as one.
#[derive(Debug, Default)]
struct Together {
    times: u64,
    /// What they were about, each once.
    about: Vec<Value>,
    replies: Vec<Reply>,
}

impl Together {
    fn add(&mut self, event: &Event, is_known: bool, reply: Reply) {
        self.times += 1;
        self.replies.push(reply);
        if is_known
            && let Some(about) = about(event)
            && !self.about.contains(&about)
        {
            self.about.push(about);
        }
    }

    fn entry(self, Kind { source, user, client, action, code }: Kind) -> Entry {
        let who = Who { actor: user.map_or(Actor::Unknown, Actor::User), source, request: None };
        let mut detail = json!({ "times": self.times });
        if !self.about.is_empty() {
            detail["about"] = self.about.into();
        }
        let event = Event::new(action, who, clock::now()).client(client).detail(detail);
        let event = if let Some(code) = code { event.outcome(Outcome::Refused, code) } else { event };
        Entry { events: vec![event], replies: self.replies, queued: None }
    }
}

/// What an event was about: an object, a number within it, or both.
fn about(event: &Event) -> Option<Value> {
    let mut about = event.detail.as_object().cloned().unwrap_or_default();
    about.extend(event.object.iter().map(|object| (object.kind.to_owned(), json!(object.id))));
    (!about.is_empty()).then(|| about.into())
}

#[derive(Debug)]
struct Counts {
    /// Since when.
    since: Instant,
    /// Events of their own since then.
    singles: HashMap<Kind, u32>,
    together: HashMap<Kind, Together>,
    /// They are about to be written.
    is_due: bool,
}

impl Counts {
    fn new() -> Self {
        Self { since: Instant::now(), singles: HashMap::new(), together: HashMap::new(), is_due: false }
    }

    /// The kind that an event goes with, unless it is one of its own.
    fn group(&mut self, kind: Kind) -> Option<Kind> {
        if self.since.elapsed() >= Duration::from_secs(1) {
            (self.since, self.singles) = (Instant::now(), HashMap::new());
        }
        let is_told_apart = self.singles.contains_key(&kind) || self.singles.len() < AUDIT_SOURCES;
        let kind = if is_told_apart { kind } else { kind.folded() };
        let singles = self.singles.entry(kind).or_default();
        *singles += 1;
        (*singles > AUDIT_SINGLES).then_some(kind)
    }

    /// Adds an event to others of its kind. Says whether somebody has to see to it that they are written, and returns
    /// those of the kind when there is no room for more.
    fn join(&mut self, kind: Kind, event: &Event, reply: Reply) -> (bool, Option<Together>) {
        let is_first = !mem::replace(&mut self.is_due, true);
        let together = self.together.entry(kind).or_default();
        together.add(event, kind.user.is_some(), reply);
        let is_full = together.about.len() == AUDIT_ABOUT;
        (is_first, if is_full { self.together.remove(&kind) } else { None })
    }

    fn take(&mut self) -> HashMap<Kind, Together> {
        self.is_due = false;
        mem::take(&mut self.together)
    }
}

/// Counts, for [`Trail::start`], events that no answer waited for and that could not be written: an alarm.
///
/// # Errors
/// When the registry has one already.
pub fn counter(registry: &Registry) -> Result<IntCounter, prometheus::Error> {
    add(
        registry,
        IntCounter::new(
            "dermflow_audit_lost_total",
            "Failed handshakes, and credentials sent in clear, that are not in the audit trail.",
        )?,
    )
}

/// The way in. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Trail {
    entries: mpsc::Sender<Entry>,
    counts: Arc<Mutex<Counts>>,
    lost: IntCounter,
}

impl Trail {
    /// The way in; its other end runs until every clone is gone. `lost` counts what is missing.
    pub fn start(pool: Pool, lost: IntCounter) -> Self {
        let (entries, received) = mpsc::channel(AUDIT_QUEUE);
        tokio::spawn(write(pool, received));
        Self { entries, counts: Arc::new(Mutex::new(Counts::new())), lost }
    }

    /// Returns when the events are on disk.
    ///
    /// # Errors
    /// When too many wait, or the database is away.
    pub async fn record(&self, events: Vec<Event>) -> Result<(), Code> {
        let (reply, written) = oneshot::channel();
        self.enter(Entry { events, replies: vec![reply], queued: None });
        told(written).await
    }

    /// Returns when something that is done again and again is on disk, by itself or with others of its kind.
    ///
    /// # Errors
    /// See [`Trail::record`].
    pub async fn repeated(&self, event: Event) -> Result<(), Code> {
        self.grouped(event, None).await
    }

    /// Returns when it is on disk that `event` was refused with `code`, by itself or with others of its kind.
    ///
    /// # Errors
    /// See [`Trail::record`]. What was to be refused with `code` is to be answered with this one instead.
    pub async fn refused(&self, event: Event, code: Code) -> Result<(), Code> {
        self.grouped(event.outcome(Outcome::Refused, code), Some(code)).await
    }

    /// For what has no answer that could wait for its event: that it is missing is counted.
    pub fn unanswered(&self, written: Result<(), Code>) {
        if written.is_err() {
            self.lost.inc();
            tracing::error!("an event is not in the audit trail");
        }
    }

    async fn grouped(&self, event: Event, code: Option<Code>) -> Result<(), Code> {
        let kind = self.counts().group(Kind::of(&event, code));
        match kind {
            None => self.record(vec![event]).await,
            Some(kind) => told(self.join(kind, &event)).await,
        }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an event with others of its kind. The first one sees to it that all are written.
    fn join(&self, kind: Kind, event: &Event) -> Written {
        let (reply, written) = oneshot::channel();
        let (is_first, full) = self.counts().join(kind, event, reply);
        if is_first {
            let trail = self.clone();
            tokio::spawn(async move {
                sleep(AUDIT_TOGETHER).await;
                trail.write_together();
            });
        }
        if let Some(full) = full {
            self.enter(full.entry(kind));
        }
        written
    }

    fn write_together(&self) {
        let together = self.counts().take();
        let mut entries = together.into_iter().map(|(kind, together)| together.entry(kind)).peekable();
        while entries.peek().is_some() {
            let mut group = Entry::default();
            entries.by_ref().take(AUDIT_GROUP).for_each(|entry| group.add(entry));
            self.enter(group);
        }
    }

    /// Who waits for an entry for which there is no room is told that it is not written.
    fn enter(&self, mut entry: Entry) {
        entry.queued = Some(Instant::now());
        if let Err(TrySendError::Full(entry) | TrySendError::Closed(entry)) = self.entries.try_send(entry) {
            entry.reply(Err(Code::Overloaded));
        }
    }
}

async fn told(written: Written) -> Result<(), Code> {
    written.await.unwrap_or(Err(Code::DatabaseUnavailable))
}

async fn write(pool: Pool, mut entries: mpsc::Receiver<Entry>) {
    let writers = Arc::new(Semaphore::new(AUDIT_WRITERS));
    loop {
        let Ok(permit) = writers.clone().acquire_owned().await else { return };
        let Some(first) = entries.recv().await else { return };
        if first.is_late() {
            first.reply(Err(Code::DatabaseUnavailable));
            continue;
        }
        let mut group = first;
        while group.events.len() < AUDIT_GROUP
            && let Ok(more) = entries.try_recv()
        {
            group.add(more);
        }
        let pool = pool.clone();
        tokio::spawn(async move {
            let outcome = super::record(&pool, &group.events).await;
            if let Err(error) = &outcome {
                tracing::warn!(%error, events = group.events.len(), "audit trail");
            }
            group.reply(outcome.map_err(|_| Code::DatabaseUnavailable));
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use uuid::Uuid;

    use super::{super::Object, *};

    fn trail(room: usize) -> (Trail, mpsc::Receiver<Entry>) {
        let (entries, received) = mpsc::channel(room);
        let lost = IntCounter::new("lost", "Lost.").unwrap();
        (Trail { entries, counts: Arc::new(Mutex::new(Counts::new())), lost }, received)
    }

    fn kind(n: u32) -> Kind {
        let source = Some(Ipv4Addr::from(n).into());
        Kind { source, user: None, client: None, action: Action::Access, code: Some(Code::Forbidden) }
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_flood_a_few_are_events_of_their_own_by_source_and_kind() {
        let mut counts = Counts::new();
        let mut singles = |kind| (0..100).filter(|_| counts.group(kind).is_none()).count();
        let user = Some(Uuid::nil().into());
        for other in [
            kind(1),
            kind(2),
            Kind { code: Some(Code::Unauthenticated), ..kind(1) },
            Kind { user, ..kind(1) },
            Kind { client: user, ..kind(1) },
        ] {
            assert_eq!(singles(other), AUDIT_SINGLES as usize, "{other:?}");
        }
        assert_eq!(singles(kind(1)), 0);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(singles(kind(1)), AUDIT_SINGLES as usize, "in the next second");
    }

    #[tokio::test(start_paused = true)]
    async fn addresses_without_number_take_no_memory_without_bound() {
        let mut counts = Counts::new();
        let addresses = 2 * AUDIT_SOURCES as u32;
        let singles = (0..addresses).filter(|n| counts.group(kind(*n)).is_none()).count();
        assert_eq!(singles, AUDIT_SOURCES + AUDIT_SINGLES as usize);
        assert_eq!(counts.singles.len(), AUDIT_SOURCES + 1);
        let user = Some(Uuid::nil().into());
        let known = Kind { user, client: user, action: Action::StatusRead, code: None, ..kind(7) };
        let groups: Vec<_> = (0..=AUDIT_SINGLES).filter_map(|_| counts.group(known)).collect();
        assert_eq!(groups, [Kind { source: None, ..known }], "who is known is not mixed with strangers");
    }

    #[test]
    fn a_network_has_one_first_address() {
        let first = |text: &str| first_of_network(text.parse().unwrap()).to_string();
        assert_eq!(first("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!((first("192.0.2.7"), first("::ffff:192.0.2.7")), ("192.0.2.7".into(), "192.0.2.7".into()));
    }

    #[tokio::test(start_paused = true)]
    async fn no_answer_leaves_before_the_event_that_counts_it_is_written() {
        let (trail, mut received) = trail(AUDIT_QUEUE);
        let user = ClientId::from(Uuid::nil());
        let who = Who { actor: Actor::User(user), ..Who::part("test") };
        let (jobs, times) = (AUDIT_ABOUT + 8, 3);
        let objects: Vec<Object> = (0..jobs).map(|_| Object::job(Uuid::new_v4().into())).collect();
        let asked: Vec<_> = objects
            .iter()
            .flat_map(|object| vec![object.clone(); times])
            .map(|object| {
                let (trail, event) = (trail.clone(), Event::new(Action::StatusRead, who, clock::now()));
                tokio::spawn(async move { trail.repeated(event.object(Some(object))).await })
            })
            .collect();
        let (mut total, mut seen) = (0, 0);
        while total < jobs * times {
            let entry = received.recv().await.unwrap();
            let detail = &entry.events[0].detail;
            let about = detail["about"].as_array();
            assert!(about.is_none_or(|about| about.len() <= AUDIT_ABOUT));
            seen += about.map_or(1, Vec::len);
            let before = total;
            total += detail["times"].as_u64().unwrap_or(1) as usize;
            let waiting = |asked: &Vec<tokio::task::JoinHandle<_>>| {
                asked.iter().filter(|asked| !asked.is_finished()).count()
            };
            assert_eq!(waiting(&asked), jobs * times - before, "somebody did not wait");
            entry.reply(Ok(()));
            for _ in 0..jobs * times {
                tokio::task::yield_now().await;
            }
            assert_eq!(waiting(&asked), jobs * times - total, "others were answered");
        }
        assert_eq!(total, jobs * times);
        assert!((jobs..=jobs + AUDIT_SINGLES as usize + 2).contains(&seen), "{seen}");
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_an_error_and_counted_where_nobody_waits() {
        let (trail, _waiting) = trail(1);
        trail.enter(Entry::default());
        let event = || Event::new(Action::Access, Who::part("test"), clock::now());
        assert!(trail.record(vec![event()]).await.is_err());
        for _ in 0..2 * AUDIT_SINGLES {
            assert!(trail.refused(event(), Code::Forbidden).await.is_err());
        }
        assert_eq!(trail.lost.get(), 0);
        trail.unanswered(trail.refused(event(), Code::Forbidden).await);
        assert_eq!(trail.lost.get(), 1);
    }
}
