//! What fair bulk and cancellation need of ingress: a consumer per client with bulk jobs, wake-ups, and word to
//! the worker that runs a withdrawn job.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use dermflow_schemas::{
    error::Code,
    id::{ClientId, JobId},
    job::Lane,
    limits::{BULK_CLIENTS, BULK_CONSUMER_SEEN, PUBLISH_DEADLINE, WAKE_INTERVAL},
    queue,
};
use futures_util::TryStreamExt;
use tokio::time::{Instant, sleep_until, timeout};

use crate::{answer::Problem, app::App};

/// What this process remembers of clients with bulk jobs.
#[derive(Debug)]
pub(crate) struct Lanes {
    ack_wait: Duration,
    /// Consumers that were there: with this limit, at this time.
    seen: Mutex<HashMap<ClientId, (i64, Instant)>>,
    wakes: Mutex<Wakes>,
}

impl Lanes {
    /// Nothing is remembered. `ack_wait` is the one of every consumer.
    pub(crate) fn new(ack_wait: Duration) -> Self {
        Self { ack_wait, seen: Mutex::default(), wakes: Mutex::default() }
    }

    fn has_seen(&self, client: ClientId, max_ack_pending: i64) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(&client)
            .is_some_and(|(limit, at)| *limit == max_ack_pending && at.elapsed() < BULK_CONSUMER_SEEN)
    }

    fn see(&self, client: ClientId, max_ack_pending: i64) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= BULK_CLIENTS {
            seen.retain(|_, (_, at)| at.elapsed() < BULK_CONSUMER_SEEN);
        }
        // One that there is no room for is made sure of again at its next job.
        if seen.len() < BULK_CLIENTS {
            seen.insert(client, (max_ack_pending, Instant::now()));
        }
    }

    /// The consumer is gone, or not as it was.
    fn forget(&self, client: ClientId) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).remove(&client);
    }

    fn wakes<T>(&self, work: impl FnOnce(&mut Wakes) -> T) -> T {
        work(&mut self.wakes.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Before jobs of a client are published: makes sure that somebody can be asked for them.
pub(crate) async fn prepare(app: &App, lane: Lane, client: ClientId) -> Result<(), Problem> {
    match lane {
        Lane::Interactive => Ok(()),
        Lane::Bulk => ensure_consumer(app, client, app.access.quota(client).running).await,
    }
}

/// After a job was published: tells workers of it.
pub(crate) async fn announce(app: &Arc<App>, lane: Lane, client: ClientId) {
    if lane == Lane::Bulk {
        wake(app, client).await;
    }
}

/// Makes the consumer of a client's bulk jobs, at most `max_ack_pending` of which are with workers at once, or
/// changes its limit. Costs nothing when this process did so in the last [`BULK_CONSUMER_SEEN`].
pub(crate) async fn ensure_consumer(
    app: &App,
    client: ClientId,
    max_ack_pending: i64,
) -> Result<(), Problem> {
    if app.lanes.has_seen(client, max_ack_pending) {
        return Ok(());
    }
    let config = queue::bulk_consumer(client, app.lanes.ack_wait, max_ack_pending);
    let create = app.publisher.context().create_consumer_on_stream(config, queue::JOBS);
    match timeout(PUBLISH_DEADLINE, create).await {
        Ok(Ok(_)) => {
            app.lanes.see(client, max_ack_pending);
            Ok(())
        }
        Ok(Err(error)) => {
            tracing::warn!(%client, %error, "no consumer for bulk jobs");
            Err(Code::QueueUnavailable.into())
        }
        Err(_) => {
            tracing::warn!(%client, "no consumer for bulk jobs: no answer");
            Err(Code::QueueUnavailable.into())
        }
    }
}

/// Tells workers that `client` has new bulk jobs: at once, and again after [`WAKE_INTERVAL`] when there were more
/// meanwhile.
pub(crate) async fn wake(app: &Arc<App>, client: ClientId) {
    match app.lanes.wakes(|wakes| wakes.note(client, Instant::now())) {
        Wake::Now => publish_wake(app, client).await,
        Wake::Later(at) => {
            let app = app.clone();
            tokio::spawn(async move {
                sleep_until(at).await;
                app.lanes.wakes(|wakes| wakes.trailed(client, Instant::now()));
                publish_wake(&app, client).await;
            });
        }
        Wake::Planned => {}
    }
}

/// It may be lost: workers look at the stream once a second.
async fn publish_wake(app: &App, client: ClientId) {
    let publish = app.nats.publish(queue::wake_subject(client), Vec::new().into());
    let _ = timeout(WAKE_INTERVAL, publish).await;
}

/// Tells the worker that runs a job, if one does, that nobody wants it any more.
pub(crate) async fn cancel(app: &App, job: JobId) {
    let publish = app.nats.publish(queue::cancel_subject(job), Vec::new().into());
    let _ = timeout(PUBLISH_DEADLINE, publish).await;
}

/// Makes the consumers of clients whose bulk jobs wait without one: the broker has forgotten it as idle, or was
/// restored without it. Otherwise asks the broker two questions.
pub(crate) async fn repair(app: &App) {
    match timeout(PUBLISH_DEADLINE, orphans(app)).await {
        Ok(Ok(orphans)) => {
            for client in orphans {
                tracing::warn!(%client, "bulk jobs waited without a consumer");
                app.lanes.forget(client);
                let max_ack_pending = app.access.quota(client).running;
                if ensure_consumer(app, client, max_ack_pending).await.is_err() {
                    return;
                }
                publish_wake(app, client).await;
            }
        }
        Ok(Err(error)) => tracing::warn!(%error, "consumers of bulk jobs"),
        Err(_) => tracing::warn!("consumers of bulk jobs: no answer"),
    }
}

/// Gives the consumers of clients, which have these limits, those that staff has set since.
pub(crate) async fn align(app: &App, consumers: &HashMap<String, i64>) {
    // A view that is too old may be none at all, which knows of no limits.
    if app.access.is_stale() {
        return;
    }
    for (name, limit) in consumers {
        let Some(client) = queue::bulk_consumer_client(name) else { continue };
        let running = app.access.quota(client).running;
        if *limit != running {
            tracing::info!(%client, limit, running, "another limit of jobs in flight");
            app.lanes.forget(client);
            if ensure_consumer(app, client, running).await.is_err() {
                return;
            }
        }
    }
}

/// Clients with bulk jobs in the stream and no consumer for them.
async fn orphans(app: &App) -> Result<Vec<ClientId>, async_nats::Error> {
    let context = app.publisher.context();
    let mut clients = queue::clients_with_bulk(context).await?;
    if !clients.is_empty() {
        let names: HashSet<String> =
            context.get_stream_no_info(queue::JOBS).await?.consumer_names().try_collect().await?;
        clients.retain(|client| !names.contains(&queue::bulk_consumer_name(*client)));
    }
    Ok(clients)
}

/// When to tell workers of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    Now,
    Later(Instant),
    /// A later wake-up covers it.
    Planned,
}

/// The last wake-up of each client, and whether another one is planned: once in [`WAKE_INTERVAL`] at most, with
/// one behind the last job.
#[derive(Debug, Default)]
struct Wakes(HashMap<ClientId, (Instant, bool)>);

impl Wakes {
    fn note(&mut self, client: ClientId, now: Instant) -> Wake {
        if self.0.len() >= BULK_CLIENTS && !self.0.contains_key(&client) {
            self.0.retain(|_, (last, planned)| *planned || now < *last + WAKE_INTERVAL);
            if self.0.len() >= BULK_CLIENTS {
                return Wake::Now;
            }
        }
        match self.0.get_mut(&client) {
            Some((_, true)) => Wake::Planned,
            Some((last, planned)) if now < *last + WAKE_INTERVAL => {
                *planned = true;
                Wake::Later(*last + WAKE_INTERVAL)
            }
            _ => {
                self.0.insert(client, (now, false));
                Wake::Now
            }
        }
    }

    /// The planned one goes out.
    fn trailed(&mut self, client: ClientId, now: Instant) {
        if let Some(entry) = self.0.get_mut(&client) {
            *entry = (now, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(n: usize) -> ClientId {
        format!("00000000-0000-4000-8000-{n:012x}").parse().unwrap()
    }

    /// A job every millisecond for a second: 20 wake-ups or so, the first at once, one behind the last job.
    #[test]
    fn a_burst_costs_few_wake_ups_and_the_last_job_has_one() {
        let (mut wakes, begin) = (Wakes::default(), Instant::now());
        let (mut sent, mut planned) = (Vec::new(), None);
        for ms in 0..2_000 {
            let now = begin + Duration::from_millis(ms);
            if planned.is_some_and(|at| at <= now) {
                planned = None;
                wakes.trailed(client(1), now);
                sent.push(ms);
            }
            if ms >= 1_000 {
                continue;
            }
            match wakes.note(client(1), now) {
                Wake::Now => sent.push(ms),
                Wake::Later(at) => assert_eq!(planned.replace(at), None),
                Wake::Planned => assert!(planned.is_some()),
            }
        }
        assert_eq!(sent[0], 0);
        assert!((20..=22).contains(&sent.len()), "{sent:?}");
        assert!(sent.windows(2).all(|pair| pair[1] - pair[0] >= 50), "{sent:?}");
        assert!(*sent.last().unwrap() >= 999, "{sent:?}");
    }

    #[test]
    fn clients_do_not_share_a_wake_up_and_their_number_is_bounded() {
        let (mut wakes, now) = (Wakes::default(), Instant::now());
        for n in 0..BULK_CLIENTS + 5 {
            assert_eq!(wakes.note(client(n), now), Wake::Now);
        }
        assert_eq!(wakes.0.len(), BULK_CLIENTS);
        assert_eq!(wakes.note(client(0), now + WAKE_INTERVAL), Wake::Now);
        assert_eq!(wakes.note(client(BULK_CLIENTS), now + WAKE_INTERVAL), Wake::Now);
        assert!(wakes.0.len() <= 2, "{}", wakes.0.len());
    }
}
