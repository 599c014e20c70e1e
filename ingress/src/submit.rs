//! Steps 2 to 4 of a job's life: record, publish, wait.

use std::{sync::Arc, time::Duration};

use async_nats::Subscriber;
use aws_lc_rs::digest::{SHA256, digest};
use axum::http::header::CONTENT_LOCATION;
use dermflow_schemas::{
    clock,
    envelope::{Carrier, JobHeader, Payload, ResultHeader},
    error::{ApiError, Code},
    id::{ClientId, IdempotencyKey, JobId},
    job::{Lane, State},
    limits,
    queue::{self, Message, PublishError},
    seal::{Purpose, Sealed},
};
use futures_util::StreamExt;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, MissedTickBehavior, interval_at, timeout},
};

use crate::{
    answer::Problem,
    app::App,
    recorder,
    store::{Claim, NewJob, Record},
};

/// A checked request on its way into the queue.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) client: ClientId,
    pub(crate) lane: Lane,
    pub(crate) key: Option<IdempotencyKey>,
    pub(crate) payload: Payload,
    /// Accounts for the payload's memory until it is in the queue.
    pub(crate) memory: OwnedSemaphorePermit,
}

/// A job that is recorded and in the queue, or has been through it.
#[derive(Debug)]
pub(crate) struct Submitted {
    pub(crate) job: JobId,
    ended: bool,
    wake_up: Option<Subscriber>,
}

/// Records and publishes a job. When this returns a job, record and payload are on disk.
///
/// Runs to its end even when the caller hangs up half-way: a job is never left between record and queue by
/// a closed connection.
pub(crate) async fn submit(app: Arc<App>, submission: Submission) -> Result<Submitted, Problem> {
    tokio::spawn(record_and_publish(app, submission)).await.map_err(|error| internal(&error))?
}

async fn record_and_publish(app: Arc<App>, submission: Submission) -> Result<Submitted, Problem> {
    let Submission { client, lane, key, payload, memory: _memory } = submission;
    let images = payload.images.len();
    let (plain, digest) = blocking(move || {
        let plain = payload.encode();
        let digest = digest(&SHA256, &plain);
        (plain, digest)
    })
    .await?;
    let now = clock::now();
    let claim_check = plain.len() > limits::MAX_INLINE_BYTES;
    let header = JobHeader::new(JobId::new(now), client, lane, now, String::new());
    let job = NewJob {
        id: header.job,
        client,
        lane,
        images,
        accepted_at: now,
        deadline: header.deadline,
        claim_check,
    };
    match app.store.claim(&job, key.as_ref(), digest.as_ref()).await? {
        Claim::Conflict => Err(ApiError::from(Code::IdempotencyConflict).at("Idempotency-Key").into()),
        Claim::New => {
            let wake_up = listen(&app, header.job, lane).await;
            publish(&app, header, plain, claim_check).await?;
            Ok(Submitted { job: job.id, ended: false, wake_up })
        }
        Claim::Known(first) => {
            let wake_up = listen(&app, first.id, lane).await;
            if first.state == State::Accepted {
                // The first try died between record and queue, or never heard from the queue: go on with it. A
                // claim check is one object, which two must not write at once: there the first one may end.
                if claim_check && now - first.accepted_at < 2 * limits::OBJECT_PUT_DEADLINE {
                    return Err(Code::QueueUnavailable.into());
                }
                let header = JobHeader::new(first.id, client, first.lane, now, String::new());
                publish(&app, header, plain, claim_check).await?;
            }
            // What happened before anybody listened is in the record.
            let ended =
                app.store.find(first.id, client).await?.is_none_or(|record| record.state.is_terminal());
            Ok(Submitted { job: first.id, ended, wake_up })
        }
    }
}

/// Listens for a job's result on behalf of a caller who waits. Must begin before the job is published, or the
/// result could slip through.
async fn listen(app: &App, job: JobId, lane: Lane) -> Option<Subscriber> {
    match lane {
        Lane::Interactive => {
            let subscribe = app.nats.subscribe(queue::result_subject(job));
            timeout(limits::PUBLISH_DEADLINE, subscribe).await.ok()?.ok()
        }
        Lane::Bulk => None,
    }
}

/// Step 3: seals the payload and hands it to the broker, within the deadline.
async fn publish(
    app: &Arc<App>,
    mut header: JobHeader,
    plain: Vec<u8>,
    claim_check: bool,
) -> Result<(), Problem> {
    let (sealing, job) = (app.clone(), header.job);
    let sealed = blocking(move || sealing.keyring.seal(Purpose::Payload, job, plain)).await?;
    let sealed = sealed.map_err(|error| internal(&error))?;
    header.key = sealed.key_id;
    let body = if claim_check {
        put_object(app, job, &sealed.bytes).await?;
        header.carrier = Carrier::Object;
        header.encode(&[])
    } else {
        header.encode(&sealed.bytes)
    };
    let message = Message::job(header.lane, header.client, job, header.attempt, body);
    let sequence = app.publisher.publish(message, limits::PUBLISH_DEADLINE).await.map_err(|error| {
        tracing::warn!(%job, %error, "job not queued");
        Problem::from(match error {
            PublishError::Unknown | PublishError::Refused(_) => Code::QueueUnavailable,
            PublishError::Full => Code::QueueFull,
        })
    })?;
    // Without this mark the sweeper would take the job for one that never was in the queue.
    Ok(app.store.queued(job, sequence, clock::now(), header.deadline).await?)
}

async fn put_object(app: &App, job: JobId, sealed: &[u8]) -> Result<(), Problem> {
    let put = async {
        let bucket = app.publisher.context().get_object_store(queue::PAYLOADS).await?;
        bucket.put(job.to_string().as_str(), &mut &*sealed).await?;
        Ok::<(), async_nats::Error>(())
    };
    match timeout(limits::OBJECT_PUT_DEADLINE, put).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => {
            tracing::warn!(%job, %error, "payload not stored");
            Err(Code::QueueUnavailable.into())
        }
        Err(_) => Err(Code::QueueUnavailable.into()),
    }
}

/// Runs what takes milliseconds of processor time beside the event loop.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|error| internal(&error))
}

/// Logs what failed, and tells the caller that something did.
pub(crate) fn internal(error: &dyn std::error::Error) -> Problem {
    tracing::error!(%error, "internal");
    Code::Internal.into()
}

/// A terminal job with its report, if it has one.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) record: Record,
    pub(crate) report: Option<Vec<u8>>,
}

/// Step 4: waits until the job has ended, `budget` at most; `None` when it goes on.
///
/// The result's message wakes the waiter, which records the result itself: an answer leaves only when the
/// first result is on disk, whichever it is. Should the wake-up be lost, the record is looked at once a second.
pub(crate) async fn wait(
    app: &Arc<App>,
    submitted: Submitted,
    client: ClientId,
    budget: Duration,
) -> Result<Option<Ended>, Problem> {
    if submitted.ended || budget.is_zero() {
        return ended(app, submitted.job, client).await;
    }
    timeout(budget, ended_eventually(app, submitted, client)).await.ok().transpose()
}

async fn ended_eventually(app: &Arc<App>, submitted: Submitted, client: ClientId) -> Result<Ended, Problem> {
    let Submitted { job, mut wake_up, .. } = submitted;
    let mut tick = interval_at(Instant::now() + limits::WAITER_POLL, limits::WAITER_POLL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            Some(message) = async { wake_up.as_mut()?.next().await }, if wake_up.is_some() => Some(message),
            _ = tick.tick() => None,
        };
        if let Some(result) = message.and_then(|message| ResultHeader::decode(&message.payload).ok()) {
            // When the database is away the recorder tries again, and so does the next look.
            // In a task of its own: what has begun is finished when the caller hangs up.
            let app = app.clone();
            let _ = tokio::spawn(async move { recorder::record(&app, &[result]).await }).await;
        }
        match ended(app, job, client).await {
            Ok(Some(ended)) => return Ok(ended),
            Err(problem) if problem.is(Code::NotFound) => return Err(problem),
            Ok(None) | Err(_) => {}
        }
    }
}

/// The job's end, if it has come: another client's job, and a deleted one, is not found.
pub(crate) async fn ended(app: &App, job: JobId, client: ClientId) -> Result<Option<Ended>, Problem> {
    let record = app.store.find(job, client).await?.filter(|record| !record.deleted).ok_or(Code::NotFound)?;
    if !record.state.is_terminal() {
        return Ok(None);
    }
    let report = match record.state {
        State::Succeeded => Some(open(app, job).await?),
        _ => None,
    };
    Ok(Some(Ended { record, report }))
}

async fn open(app: &App, job: JobId) -> Result<Vec<u8>, Problem> {
    let sealed: Sealed = app.store.report(job).await?.ok_or(Code::NotFound)?;
    app.keyring.open(Purpose::Report, job, &sealed).map_err(|error| internal(&error))
}

/// The URL to poll, absolute as RFC 9110 §8.7 and FHIR's asynchronous pattern want it.
pub(crate) fn status_url(public_url: &str, job: JobId) -> String {
    format!("{public_url}/fhir/_async/{job}")
}

/// Points an error at the job that goes on.
pub(crate) fn with_status_url(problem: Problem, app: &App, job: JobId) -> Problem {
    problem.header(CONTENT_LOCATION, &status_url(&app.public_url, job))
}
