//! How fast the queue drains: what `Retry-After`, a job's place and its expected start are computed from.
//!
//! Every replica measures it in the record, which counts what all workers do for all replicas.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use dermflow_auth::users::Quota;
use dermflow_schemas::{
    clock,
    id::ClientId,
    job::Lane,
    limits::{DRAIN_INTERVAL, DRAIN_UNKNOWN, DRAIN_WINDOW, MAX_RETRY_AFTER},
};
use time::OffsetDateTime;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    access::Access,
    app::App,
    store::{Record, drain::Flow},
};

/// This replica's view, [`DRAIN_INTERVAL`] old at most while the database answers.
#[derive(Debug, Default)]
pub(crate) struct Drain {
    view: RwLock<View>,
}

#[derive(Debug, Clone, Default)]
struct View {
    flows: Vec<Flow>,
    /// Since when there are open jobs without a break.
    busy_since: Option<OffsetDateTime>,
    at: Option<OffsetDateTime>,
}

/// Where a queued job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// 1 and the open jobs before it: those that run, and those that start earlier.
    pub(crate) position: i64,
    /// Unknown while nothing drains.
    pub(crate) starts_in: Option<Duration>,
}

impl View {
    /// From when on ended jobs count, looking at them `now`: what ended before there was a queue says nothing of how fast one
    /// drains.
    fn since(&self, now: OffsetDateTime) -> OffsetDateTime {
        let window = now - DRAIN_WINDOW;
        self.busy_since.map_or(window, |busy_since| busy_since.max(window))
    }

    /// Jobs a second, of one client or of all; `None` when none ended of late.
    fn rate(&self, client: Option<ClientId>) -> Option<f64> {
        let ended: i64 = self
            .flows
            .iter()
            .filter(|flow| client.is_none_or(|client| flow.client == client))
            .map(|flow| flow.ended)
            .sum();
        let busy = (self.at? - self.busy_since?).as_seconds_f64();
        (ended > 0 && busy > 0.0).then(|| ended as f64 / busy.min(DRAIN_WINDOW.as_secs_f64()))
    }

    fn flow(&self, client: ClientId) -> Option<&Flow> {
        self.flows.iter().find(|flow| flow.client == client)
    }

    fn open(&self) -> i64 {
        self.flows.iter().map(|flow| flow.open).sum()
    }

    /// The bulk jobs that start before one with `ahead` others of its own client before it, if every client's
    /// share is its weight: nobody gets more than that, or than it has.
    fn bulk_before(&self, client: ClientId, ahead: i64, weight: impl Fn(ClientId) -> i16) -> i64 {
        let rounds = (ahead + 1) as f64 / f64::from(weight(client));
        let others = self.flows.iter().filter(|flow| flow.client != client);
        let served = |flow: &Flow| flow.open.min((rounds * f64::from(weight(flow.client))) as i64);
        ahead + others.map(served).sum::<i64>()
    }
}

impl Drain {
    fn view(&self) -> View {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// When a tenth of what a client has open will have ended: with large images that are fewer jobs than it may have.
    pub(crate) fn retry_after_quota(&self, client: ClientId, quota: Quota) -> Duration {
        let view = self.view();
        let open = view.flow(client).map_or(quota.jobs, |flow| flow.open.min(quota.jobs));
        wait_for((open as f64 / 10.0).max(1.0), view.rate(Some(client)))
    }

    /// When a twentieth of the queue will have drained.
    pub(crate) fn retry_after_full(&self) -> Duration {
        let view = self.view();
        wait_for((view.open() as f64 / 20.0).max(1.0), view.rate(None))
    }

    /// Where a queued bulk job stands.
    pub(crate) fn bulk_place(&self, client: ClientId, ticket: i64, access: &Access) -> Place {
        let view = self.view();
        let done = view.flow(client).map_or(0, |flow| flow.done);
        let ahead = (ticket - 1 - done).max(0);
        let before = view.bulk_before(client, ahead, |client| access.quota(client).weight);
        view.place(before)
    }
}

impl View {
    fn place(&self, before: i64) -> Place {
        let starts_in = self.rate(None).map(|rate| Duration::from_secs_f64(before as f64 / rate));
        Place { position: before + 1, starts_in }
    }
}

fn wait_for(jobs: f64, rate: Option<f64>) -> Duration {
    let wait = rate.map_or(DRAIN_UNKNOWN, |rate| Duration::from_secs_f64((jobs / rate).min(1e6)));
    wait.clamp(Duration::from_secs(1), MAX_RETRY_AFTER)
}

/// Where a queued job of `client` stands; `None` when it waits no longer, or the database is away.
pub(crate) async fn place(app: &App, client: ClientId, record: &Record) -> Option<Place> {
    if record.state.is_terminal() || record.started_at.is_some() {
        return None;
    }
    Some(match record.lane {
        Lane::Bulk => app.drain.bulk_place(client, record.ticket, &app.access),
        Lane::Interactive => {
            let before = app.store.interactive_before(record.accepted_at).await.ok()?;
            app.drain.view().place(before)
        }
    })
}

/// Keeps the view fresh until `stop`.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut tick = interval(DRAIN_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        let now = clock::now();
        let since = app.drain.view().since(now);
        match app.store.flows(since).await {
            Ok(flows) => {
                let mut view = app.drain.view.write().unwrap_or_else(PoisonError::into_inner);
                let busy = flows.iter().any(|flow| flow.open > 0);
                let busy_since = busy.then(|| view.busy_since.unwrap_or(now));
                *view = View { flows, busy_since, at: Some(now) };
            }
            Err(error) => tracing::debug!(%error, "the last view of the queue's speed holds"),
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn flow(client: u128, open: i64, ended: i64) -> Flow {
        Flow { client: Uuid::from_u128(client).into(), open, done: 0, ended }
    }

    fn view(flows: Vec<Flow>) -> View {
        let at = OffsetDateTime::UNIX_EPOCH;
        View { flows, busy_since: Some(at - Duration::from_mins(1)), at: Some(at) }
    }

    #[test]
    fn a_small_client_stands_behind_as_many_of_a_large_one_as_it_has_itself() {
        let view = view(vec![flow(1, 4_900, 0), flow(2, 50, 0), flow(3, 50, 0)]);
        let (large, small) = (Uuid::from_u128(1).into(), Uuid::from_u128(2).into());
        assert_eq!(view.bulk_before(small, 9, |_| 1), 9 + 10 + 10);
        assert_eq!(view.bulk_before(large, 999, |_| 1), 999 + 50 + 50);
        assert_eq!(view.bulk_before(small, 9, |client| if client == large { 3 } else { 1 }), 9 + 30 + 10);
    }

    #[test]
    fn the_wait_follows_from_the_rate() {
        let view = view(vec![flow(1, 500, 1_000), flow(2, 0, 500)]);
        assert_eq!(view.rate(None), Some(150.0));
        assert_eq!(view.rate(Some(Uuid::from_u128(2).into())), Some(50.0));
        assert_eq!(view.place(300), Place { position: 301, starts_in: Some(Duration::from_secs(2)) });
        assert_eq!(wait_for(600.0, Some(100.0)), Duration::from_secs(6));
        assert_eq!(wait_for(600.0, None), DRAIN_UNKNOWN);
        assert_eq!(wait_for(1e9, Some(0.1)), MAX_RETRY_AFTER);
    }

    /// Jobs that ended while there was no queue took no time of it.
    #[test]
    fn only_what_ended_since_there_is_a_queue_counts() {
        let at = OffsetDateTime::UNIX_EPOCH;
        let begun = View { busy_since: Some(at), ..view(vec![flow(1, 500, 110)]) };
        assert_eq!(begun.rate(None), None);
        let (now, long_ago) = (at + Duration::from_secs(2), at - Duration::from_hours(1));
        assert_eq!(begun.since(now), at);
        assert_eq!(View { busy_since: Some(long_ago), ..begun.clone() }.since(now), now - DRAIN_WINDOW);
        assert_eq!(View::default().since(now), now - DRAIN_WINDOW);
    }

    #[test]
    fn before_the_first_job_ends_nothing_is_known() {
        assert_eq!(view(vec![flow(1, 10, 0)]).place(3), Place { position: 4, starts_in: None });
    }
}
