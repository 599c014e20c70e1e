//! Group commit: jobs of concurrent requests are recorded in one transaction and published together.
//!
//! Nobody waits for a group to fill: a group is what came in while the groups before it were on their way, at low
//! load a single job. Under load one commit, one sync of the broker's disk and one mark serve up to
//! [`GROUP_JOBS`] jobs. Each lane has groups of its own, so that nobody who waits for a result stands behind bulk.

use std::{collections::HashSet, future::poll_fn, sync::Arc, task::Poll};

use bytes::Bytes;
use dermflow_schemas::{
    clock,
    envelope::JobHeader,
    error::{ApiError, Code},
    id::{ClientId, JobId},
    job::Lane,
    limits::{GROUP_BYTES, GROUP_JOBS, GROUP_LEAST, GROUP_QUEUE, PUBLISH_DEADLINE},
    queue::{Message, PublishError},
};
use futures_util::future::join_all;
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, timeout_at},
};

use crate::{
    answer::Problem,
    app::App,
    lanes,
    store::{
        Queued, Record,
        claim::{Claim, NewJob},
    },
};

/// A job with its sealed payload.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) job: NewJob,
    pub(crate) header: JobHeader,
    /// The message's body; `None` when the payload goes to the object store once the job is on record.
    pub(crate) body: Option<Bytes>,
    /// When its caller is answered at the latest, but for what the database takes.
    pub(crate) end: Instant,
}

/// What came of an entry.
#[derive(Debug)]
pub(crate) enum Committed {
    /// Record and payload are on disk.
    Queued,
    /// The record is on disk; the payload has to be stored by the caller.
    Recorded,
    /// The key stands for this job already.
    Known(Box<Record>),
}

type Reply = oneshot::Sender<Result<Committed, Problem>>;

/// The way into a group. In the bulk lane, callers who wait for an answer go before lines of uploads.
#[derive(Debug, Clone)]
pub(crate) struct Commits {
    interactive: mpsc::Sender<(Entry, Reply)>,
    bulk: mpsc::Sender<(Entry, Reply)>,
    lines: mpsc::Sender<(Entry, Reply)>,
}

/// The entries of one lane on their way to [`run`], the first ones first.
#[derive(Debug)]
pub(crate) struct Entries(Vec<mpsc::Receiver<(Entry, Reply)>>);

impl Commits {
    /// The way in, and its other ends, one a lane.
    pub(crate) fn new() -> (Self, [Entries; 2]) {
        let (interactive, awaited) = mpsc::channel(GROUP_QUEUE);
        let (bulk, requests) = mpsc::channel(GROUP_QUEUE);
        let (lines, read) = mpsc::channel(GROUP_QUEUE);
        (Self { interactive, bulk, lines }, [Entries(vec![awaited]), Entries(vec![requests, read])])
    }

    /// Commits an entry with the next group that has room.
    pub(crate) async fn commit(&self, entry: Entry) -> Result<Committed, Problem> {
        let (reply, answer) = oneshot::channel();
        // A line's sender can be made to wait; a request that finds no room is one too many.
        match (entry.job.lane, &entry.job.member) {
            (_, Some(_)) => self.lines.send((entry, reply)).await.map_err(|_| Code::Overloaded)?,
            (Lane::Bulk, None) => self.bulk.try_send((entry, reply)).map_err(|_| Code::Overloaded)?,
            (Lane::Interactive, None) => {
                self.interactive.try_send((entry, reply)).map_err(|_| Code::Overloaded)?;
            }
        }
        answer.await.unwrap_or_else(|_| Err(Code::Internal.into()))
    }
}

impl Entries {
    /// `None` when every [`Commits`] is gone.
    async fn next(&mut self) -> Option<(Entry, Reply)> {
        poll_fn(|context| {
            let mut open = false;
            for entries in &mut self.0 {
                match entries.poll_recv(context) {
                    Poll::Ready(Some(entry)) => return Poll::Ready(Some(entry)),
                    Poll::Ready(None) => {}
                    Poll::Pending => open = true,
                }
            }
            if open { Poll::Pending } else { Poll::Ready(None) }
        })
        .await
    }

    fn next_now(&mut self) -> Option<(Entry, Reply)> {
        self.0.iter_mut().find_map(|entries| entries.try_recv().ok())
    }
}

/// Forms groups of a lane and commits one after the other, until every [`Commits`] is gone. With several at once each would
/// be smaller, so that what a transaction and a sync cost is paid for fewer jobs; and those of one client wait for each other
/// all the same, for the lock on its load.
pub(crate) async fn run(app: Arc<App>, mut entries: Entries) {
    while let Some(first) = entries.next().await {
        let (mut bytes, mut group) = (size(&first), vec![first]);
        while group.len() < GROUP_JOBS
            && bytes < GROUP_BYTES
            && let Some(next) = entries.next_now()
        {
            bytes += size(&next);
            group.push(next);
        }
        let app = app.clone();
        // A task of its own: what panics takes its group with it, and not the lane.
        if let Err(error) = tokio::spawn(async move { commit(&app, group).await }).await {
            tracing::error!(%error, "a group was not committed");
        }
    }
}

fn size((entry, _): &(Entry, Reply)) -> usize {
    entry.body.as_ref().map_or(0, Bytes::len)
}

async fn commit(app: &Arc<App>, group: Vec<(Entry, Reply)>) {
    // With a broker or a database that is slow, callers spend their time waiting for a group: nothing is recorded for who
    // would be told so only then.
    let least = Instant::now() + GROUP_LEAST;
    let (late, group): (Vec<_>, Vec<_>) = group.into_iter().partition(|(entry, _)| entry.end < least);
    for (_, reply) in late {
        let _ = reply.send(Err(Code::QueueUnavailable.into()));
    }
    if group.is_empty() {
        return;
    }
    app.metrics.group_jobs.with_label_values::<&str>(&[]).observe(group.len() as f64);
    let (entries, replies): (Vec<Entry>, Vec<Reply>) = group.into_iter().unzip();
    let outcomes = match record_and_publish(app, entries).await {
        Ok(outcomes) => outcomes,
        Err(problem) => replies.iter().map(|_| Err(problem.clone())).collect(),
    };
    for (reply, outcome) in replies.into_iter().zip(outcomes) {
        // Nobody is there to be answered when a caller hung up: its job goes on.
        let _ = reply.send(outcome);
    }
}

async fn record_and_publish(
    app: &Arc<App>,
    entries: Vec<Entry>,
) -> Result<Vec<Result<Committed, Problem>>, Problem> {
    let end = entries.iter().map(|entry| entry.end).fold(Instant::now() + PUBLISH_DEADLINE, Instant::min);
    let jobs: Vec<NewJob> = entries.iter().map(|entry| entry.job.clone()).collect();
    let claims = app.store.claim(&jobs).await?;
    let (mut outcomes, mut fresh, mut messages) = (Vec::new(), Vec::new(), Vec::new());
    for (entry, claim) in entries.into_iter().zip(claims) {
        let job = &entry.job;
        outcomes.push(match (claim, entry.body) {
            (Claim::New, Some(body)) => {
                fresh.push(Fresh { place: outcomes.len(), header: entry.header.clone() });
                messages.push(message(app, &entry.header, body));
                // Until the queue has acknowledged it.
                Err(Code::QueueUnavailable.into())
            }
            (Claim::New, None) => Ok(Committed::Recorded),
            (Claim::Known(first), _) => Ok(Committed::Known(first)),
            (Claim::Conflict, _) => {
                Err(ApiError::from(Code::IdempotencyConflict).at("Idempotency-Key").into())
            }
            (Claim::OverQuota, _) => Err(over_quota(app, job).into()),
        });
    }
    for (fresh, outcome) in fresh.iter().zip(publish(app, &fresh, messages, end).await) {
        outcomes[fresh.place] = outcome.map(|()| Committed::Queued);
    }
    Ok(outcomes)
}

/// A recorded job on its way to the queue, and its place in the group.
struct Fresh {
    place: usize,
    header: JobHeader,
}

fn message(app: &App, header: &JobHeader, body: Bytes) -> Message {
    let weight = u8::try_from(app.access.quota(header.client).weight).ok();
    Message::job(header.lane, header.client, header.job, header.attempt, weight, body)
}

/// Publishes recorded jobs of one lane.
async fn publish(
    app: &Arc<App>,
    fresh: &[Fresh],
    messages: Vec<Message>,
    end: Instant,
) -> Vec<Result<(), Problem>> {
    let Some(lane) = fresh.first().map(|fresh| fresh.header.lane) else { return Vec::new() };
    let left = end.saturating_duration_since(Instant::now());
    let published = app.publisher_of(lane).publish_all(messages, left).await;
    let headers = || fresh.iter().map(|fresh| &fresh.header);
    let clients = headers().zip(&published).filter(|(_, published)| published.is_ok());
    let clients: HashSet<ClientId> = clients.map(|(header, _)| header.client).collect();
    join_all(clients.into_iter().map(|client| lanes::announce(app, lane, client))).await;
    let marks: Vec<Queued> = headers()
        .zip(&published)
        .filter_map(|(header, published)| {
            let sequence = *published.as_ref().ok()?;
            Some(Queued { job: header.job, sequence, deadline: header.deadline })
        })
        .collect();
    let refused: Vec<JobId> = headers()
        .zip(&published)
        .filter(|(_, published)| matches!(published, Err(PublishError::Full)))
        .map(|(header, _)| header.job)
        .collect();
    let marked = mark(app, &marks).await;
    if !refused.is_empty()
        && let Err(error) = app.store.forget(&refused, clock::now()).await
    {
        tracing::warn!(%error, jobs = refused.len(), "refused jobs are left to the sweeper");
    }
    let outcome = |(header, published): (&JobHeader, Result<u64, PublishError>)| match published {
        Ok(_) => match &marked {
            Ok(marked) if marked.contains(&header.job) => Ok(()),
            Ok(_) => Err(Code::QueueUnavailable.into()),
            Err(problem) => Err(problem.clone()),
        },
        Err(error) => Err(not_queued(app, header.job, &error)),
    };
    headers().zip(published).map(outcome).collect()
}

/// Before a job of a client is committed: makes sure, until `end`, that workers can be asked for it. Not a group's
/// affair, as the first job of a client would hold the others up.
pub(crate) async fn prepare(app: &App, lane: Lane, client: ClientId, end: Instant) -> Result<(), Problem> {
    let prepared = timeout_at(end, lanes::prepare(app, lane, client)).await;
    prepared.unwrap_or_else(|_| Err(Code::QueueUnavailable.into()))
}

/// Without this mark the sweeper would take the jobs for ones that never were in the queue.
async fn mark(app: &App, marks: &[Queued]) -> Result<Vec<JobId>, Problem> {
    if marks.is_empty() {
        return Ok(Vec::new());
    }
    Ok(app.store.queued(marks, clock::now()).await?)
}

/// Publishes one job by itself.
pub(crate) async fn publish_one(app: &Arc<App>, header: &JobHeader, body: Bytes) -> Result<(), Problem> {
    let end = Instant::now() + PUBLISH_DEADLINE;
    prepare(app, header.lane, header.client, end).await?;
    let message = message(app, header, body);
    let left = end.saturating_duration_since(Instant::now());
    let published = app.publisher_of(header.lane).publish(message, left).await;
    let sequence = published.map_err(|error| not_queued(app, header.job, &error))?;
    lanes::announce(app, header.lane, header.client).await;
    let mark = Queued { job: header.job, sequence, deadline: header.deadline };
    let marked = self::mark(app, &[mark]).await?;
    if marked.is_empty() { Err(Code::QueueUnavailable.into()) } else { Ok(()) }
}

fn not_queued(app: &App, job: JobId, error: &PublishError) -> Problem {
    tracing::warn!(%job, %error, "job not queued");
    match error {
        PublishError::Unknown | PublishError::Refused(_) => Code::QueueUnavailable.into(),
        PublishError::Full => {
            let mut error = ApiError::from(Code::QueueFull);
            error.retry_after = Some(app.drain.retry_after_full());
            error.into()
        }
    }
}

fn over_quota(app: &App, job: &NewJob) -> ApiError {
    let quota = job.quota;
    let mut error = ApiError::from(Code::QuotaExceeded)
        .detail(format!("at most {} open jobs with {} bytes of images", quota.jobs, quota.bytes));
    error.retry_after = Some(app.drain.retry_after_quota(job.client, quota));
    error
}
