//! Steps 2 to 4 of a job's life: record, publish, wait.

use std::{sync::Arc, time::Duration};

use async_nats::Subscriber;
use aws_lc_rs::digest::{SHA256, digest};
use axum::http::header::CONTENT_LOCATION;
use dermflow_auth::audit::{Action, Event, Object, Who};
use dermflow_schemas::{
    clock,
    envelope::{Carrier, JobHeader, Payload, ResultHeader},
    error::{Code, Retry},
    id::{ClientId, JobId},
    job::{Lane, State},
    limits,
    model::ModelRef,
    queue,
    seal::{Content, SealError, Sealed},
};
use futures_util::StreamExt;
use time::OffsetDateTime;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    answer::Problem,
    app::App,
    bodies::Memory,
    commit::{Committed, Entry, prepare, publish_one},
    rates, retention,
    store::{
        Record,
        claim::{Member, NewJob},
    },
};

/// A checked request on its way into the queue.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) client: ClientId,
    /// The client, and by which way it came.
    pub(crate) who: Who,
    pub(crate) lane: Lane,
    /// What repeats of the request are known by.
    pub(crate) key: Option<String>,
    pub(crate) payload: Payload,
    /// From acceptance to the end, if the caller wants it shorter than the lane's.
    pub(crate) cancel_after: Option<Duration>,
    pub(crate) member: Option<Member>,
    pub(crate) patience: Patience,
    /// Accounts for the payload's memory until it is in the queue.
    pub(crate) memory: Memory,
}

/// Until when something waits for the client's quota or for room in the queue, rather than to be refused.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    pub(crate) end: Instant,
    /// Cancelled when there is nothing to wait for any more.
    pub(crate) over: CancellationToken,
}

impl Patience {
    /// Waits for nothing.
    pub(crate) fn none() -> Self {
        Self { end: Instant::now(), over: CancellationToken::new() }
    }

    /// Pauses until it may be tried again, for `most`; `false` when it may not.
    pub(crate) async fn pause(&self, most: Duration) -> bool {
        let pause = most.min(self.end.saturating_duration_since(Instant::now()));
        !pause.is_zero() && self.over.run_until_cancelled(sleep(pause)).await.is_some()
    }
}

/// A job that is recorded and in the queue, or has been through it.
#[derive(Debug)]
pub(crate) struct Submitted {
    pub(crate) job: JobId,
    /// It was never submitted before.
    pub(crate) is_new: bool,
    /// It had ended when it was submitted again.
    pub(crate) ended: bool,
    /// Whoever misses its answer has no key to ask for it again.
    pub(crate) keyless: bool,
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
    let Submission { client, who, lane, key, payload, cancel_after, member, patience, memory: _memory } =
        submission;
    let images = payload.images.len();
    rates::images(&app, client, images, &patience).await?;
    served(&app, client, key.as_deref(), payload.manifest.model.as_ref()).await?;
    let now = clock::now();
    let mut header = JobHeader::new(JobId::new(now), client, lane, now, cancel_after);
    let (quota, keyless) = (app.access.quota(client), key.is_none());
    // A report that is not kept is not searched for, either.
    let search = if quota.keeps_reports() { app.index.of(client, &payload.manifest) } else { Vec::new() };
    let Packed { sealed, bytes, digest } = pack(&app, header.job, payload).await?;
    header.key.clone_from(&sealed.key_id);
    let claim_check = bytes > limits::MAX_INLINE_BYTES;
    let job = NewJob {
        id: header.job,
        client,
        who,
        lane,
        images,
        bytes,
        accepted_at: now,
        deadline: header.deadline,
        claim_check,
        key,
        digest,
        quota,
        member,
        search,
    };
    let end = patience.end.max(Instant::now()) + limits::PUBLISH_DEADLINE;
    let wake_up = listen(&app, job.id, lane).await;
    let body = (!claim_check).then(|| header.encode(&sealed.bytes));
    prepare(&app, lane, client, end).await?;
    let mut entry = Entry { job, header: header.clone(), body, end };
    let committed = loop {
        match app.commits.commit(entry.clone()).await {
            Err(problem) if problem.retry() == Retry::Safe => {
                if !patience.pause(limits::POLL_INTERVAL).await {
                    return Err(problem);
                }
            }
            done => break done?,
        }
        // A job is accepted when there is room for it, and its time begins then.
        header.accept(clock::now(), cancel_after);
        (entry.job.accepted_at, entry.job.deadline) = (header.accepted_at, header.deadline);
        entry.body = (!claim_check).then(|| header.encode(&sealed.bytes));
        entry.header = header.clone();
    };
    match committed {
        Committed::Queued => Ok(Submitted { job: header.job, is_new: true, ended: false, keyless, wake_up }),
        Committed::Recorded => {
            check_in(&app, &mut header, &sealed).await?;
            Ok(Submitted { job: header.job, is_new: true, ended: false, keyless, wake_up })
        }
        Committed::Known(first) => {
            // Who submits a job again asks how far it is.
            let asked = Event::new(Action::StatusRead, who, now).client(Some(client));
            app.trail.repeated(asked.object(Some(Object::job(first.id)))).await?;
            let wake_up = listen(&app, first.id, lane).await;
            if first.state == State::Accepted {
                // The first try died between record and queue, or never heard from the queue: go on with it. A
                // claim check is one object, which two must not write at once: there the first one may end.
                if claim_check && now - first.accepted_at < 2 * limits::OBJECT_PUT_DEADLINE {
                    return Err(Code::QueueUnavailable.into());
                }
                let again = JobHeader::new(first.id, client, first.lane, now, cancel_after);
                revive(&app, again, header.job, sealed, claim_check).await?;
            }
            // What happened before anybody listened is in the record.
            let ended =
                app.store.find(first.id, client).await?.is_none_or(|record| record.state.is_terminal());
            Ok(Submitted { job: first.id, is_new: false, ended, keyless, wake_up })
        }
    }
}

/// Refuses a model that no worker has, unless the request may be the repeat of one from when one had it. Where no worker
/// answers at all, as those of older builds do not, the job is let in.
async fn served(
    app: &App,
    client: ClientId,
    key: Option<&str>,
    model: Option<&ModelRef>,
) -> Result<(), Problem> {
    let Some(model) = model else { return Ok(()) };
    let answered = |subject| queue::answered(&app.nats, subject);
    if answered(queue::model_subject(model)).await != Some(false)
        || answered(queue::ANY_MODEL.to_owned()).await != Some(true)
    {
        return Ok(());
    }
    match key {
        Some(key) if app.store.has_key(client, key).await? => Ok(()),
        _ => Err(Code::ModelUnknown.into()),
    }
}

/// A payload as it travels, and what is known of it.
struct Packed {
    sealed: Sealed,
    bytes: usize,
    digest: Vec<u8>,
}

async fn pack(app: &Arc<App>, job: JobId, payload: Payload) -> Result<Packed, Problem> {
    let app = app.clone();
    let packed = blocking(move || {
        let plain = payload.encode();
        let (bytes, digest) = (plain.len(), digest(&SHA256, &plain).as_ref().to_vec());
        let sealed = app.keyring.seal(Content::Payload(job), plain, clock::now())?;
        Ok::<_, SealError>(Packed { sealed, bytes, digest })
    });
    packed.await?.map_err(|error| internal(&error))
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

/// Publishes a job that is on record already, with a payload that was sealed for the id `packed_for`.
async fn revive(
    app: &Arc<App>,
    mut header: JobHeader,
    packed_for: JobId,
    sealed: Sealed,
    claim_check: bool,
) -> Result<(), Problem> {
    let (sealing, job) = (app.clone(), header.job);
    let resealed = blocking(move || {
        let plain = sealing.keyring.open(Content::Payload(packed_for), &sealed)?;
        sealing.keyring.seal(Content::Payload(job), plain, clock::now())
    });
    let sealed = resealed.await?.map_err(|error| internal(&error))?;
    header.key.clone_from(&sealed.key_id);
    if claim_check {
        return check_in(app, &mut header, &sealed).await;
    }
    publish_one(app, &header, header.encode(&sealed.bytes)).await
}

/// Puts a large payload into the object store, and its claim check into the queue.
async fn check_in(app: &Arc<App>, header: &mut JobHeader, sealed: &Sealed) -> Result<(), Problem> {
    put_object(app, header, &sealed.bytes).await?;
    header.carrier = Carrier::Object;
    publish_one(app, header, header.encode(&[])).await
}

async fn put_object(app: &App, header: &JobHeader, sealed: &[u8]) -> Result<(), Problem> {
    let job = header.job;
    let put = async {
        let bucket = app.publisher_of(header.lane).context().get_object_store(queue::PAYLOADS).await?;
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
    pub(crate) report: Option<Report>,
    /// The client has no way to ask again.
    pub(crate) last: bool,
    /// Until when the report can be asked for.
    pub(crate) expires: OffsetDateTime,
}

/// A report that was opened, and the memory that it takes until it has been sent.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) bytes: Vec<u8>,
    pub(crate) memory: Memory,
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
        return look(app, submitted.job, client, submitted.keyless).await;
    }
    timeout(budget, ended_eventually(app, submitted, client)).await.ok().transpose()
}

async fn ended_eventually(app: &Arc<App>, submitted: Submitted, client: ClientId) -> Result<Ended, Problem> {
    let Submitted { job, mut wake_up, keyless, .. } = submitted;
    let mut tick = interval_at(Instant::now() + limits::WAITER_POLL, limits::WAITER_POLL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            Some(message) = async { wake_up.as_mut()?.next().await }, if wake_up.is_some() => Some(message),
            _ = tick.tick() => None,
        };
        if let Some(result) = message.and_then(|message| ResultHeader::decode(&message.payload).ok()) {
            // When the database is away the recorder tries again, and so does the next look.
            app.awaited.record(result).await;
        }
        match look(app, job, client, keyless).await {
            Ok(Some(ended)) => return Ok(ended),
            Err(problem) if END.iter().any(|code| problem.is(*code)) => return Err(problem),
            Ok(None) | Err(_) => {}
        }
    }
}

/// What a look at a job ends with that no other will change.
const END: [Code; 3] = [Code::NotFound, Code::ReportRemoved, Code::ReportUnreadable];

/// The job's end, if it has come: another client's job, and a deleted one, is not found.
pub(crate) async fn ended(app: &App, job: JobId, client: ClientId) -> Result<Option<Ended>, Problem> {
    look(app, job, client, false).await
}

/// The same; `last` says whether its client has no way to ask again.
async fn look(app: &App, job: JobId, client: ClientId, last: bool) -> Result<Option<Ended>, Problem> {
    let (record, sealed) = app.store.find_with_report(job, client).await?.ok_or(Code::NotFound)?;
    let report = match record.state {
        state if !state.is_terminal() => return Ok(None),
        State::Succeeded => {
            let sealed = sealed.ok_or(Code::ReportRemoved)?;
            let memory = app.bounds.bodies.share(Some(client)).take(sealed.bytes.len())?;
            Some(Report { bytes: open(app, job, &sealed)?, memory })
        }
        _ if record.deleted_at.is_some() => return Err(Code::NotFound.into()),
        _ => None,
    };
    let expires = retention::kept_until(&record, last, app.access.quota(client), clock::now());
    Ok(Some(Ended { record, report, last, expires }))
}

/// Opens the report of a job. One that does not open is an error of its own, and everything else goes on.
pub(crate) fn open(app: &App, job: JobId, sealed: &Sealed) -> Result<Vec<u8>, Code> {
    app.keyring.open(Content::Report(job), sealed).map_err(|error| {
        tracing::error!(%job, %error, "the report cannot be opened");
        app.metrics.reports_unreadable.with_label_values(&[error.reason()]).inc();
        Code::ReportUnreadable
    })
}

/// The URL to poll, absolute as RFC 9110 §8.7 and FHIR's asynchronous pattern want it.
pub(crate) fn status_url(public_url: &str, job: JobId) -> String {
    format!("{public_url}/fhir/_async/{job}")
}

/// Points an error at the job that goes on.
pub(crate) fn with_status_url(problem: Problem, app: &App, job: JobId) -> Problem {
    problem.header(CONTENT_LOCATION, &status_url(&app.public_url, job))
}
