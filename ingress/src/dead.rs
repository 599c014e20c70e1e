//! Dead letters: payloads that workers gave up, and the way back into the queue.
//!
//! The way back has four steps, each safe to repeat: the record opens, the payload goes into JOBS under a message
//! id of its own, the record notes where, the dead letter is removed. The record opens first, so that no worker
//! runs a job that is not open; the letter goes last, so that the payload is always somewhere. What a crash, or a
//! full queue, leaves half-way is marked in the record, and [`resume`] goes on with it.

use std::sync::Arc;

use async_nats::jetstream::{
    message::StreamMessage,
    stream::{RawMessageErrorKind, Stream},
};
use bytes::Bytes;
use dermflow_auth::{
    audit::{Who, trail::Trail},
    token::Tokens,
};
use dermflow_http::rates::Rates;
use dermflow_schemas::{
    clock,
    envelope::{JobHeader, job_of},
    error::{ApiError, Code},
    id::{ClientId, JobId},
    job::{Lane, State},
    limits::{DEAD_PAGE_BYTES, PUBLISH_DEADLINE, SWEEP_INTERVAL},
    queue::{self, Message, PublishError, Publisher},
};
use time::OffsetDateTime;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Access, Gate},
    answer::Problem,
    letters::Letters,
    providers::Providers,
    retention::Answered,
    store::{Requeue, Store},
};

/// The state of the operators' process.
#[derive(Debug)]
pub(crate) struct Operators {
    /// The origin that clients see.
    pub(crate) public_url: String,
    pub(crate) store: Store,
    pub(crate) tokens: Tokens,
    pub(crate) providers: Providers,
    pub(crate) access: Access,
    pub(crate) trail: Trail,
    pub(crate) rates: Rates,
    pub(crate) publisher: Publisher,
}

impl Gate for Operators {
    fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    fn providers(&self) -> &Providers {
        &self.providers
    }

    fn access(&self) -> &Access {
        &self.access
    }

    fn trail(&self) -> &Trail {
        &self.trail
    }

    fn rates(&self) -> &Rates {
        &self.rates
    }

    fn store(&self) -> &Store {
        &self.store
    }

    /// No report is handed out here.
    async fn answered(&self, _: ClientId, _: Vec<Answered>) -> Result<(), Code> {
        Ok(())
    }
}

/// A dead letter. What is sealed in it stays sealed.
pub(crate) struct Letter {
    /// Its place in DEAD.
    pub(crate) sequence: u64,
    /// What it says about its job, unless a newer build wrote it.
    pub(crate) header: Option<JobHeader>,
    /// The job, if the message names one.
    pub(crate) job: Option<JobId>,
    /// Whose job, by the subject.
    pub(crate) client: Option<ClientId>,
    /// Which queue it was in, by the subject.
    pub(crate) lane: Option<Lane>,
    /// The stable code that it was given up with.
    pub(crate) reason: String,
    /// When.
    pub(crate) dead_at: OffsetDateTime,
    /// Length of the message.
    pub(crate) bytes: usize,
    tail: Bytes,
}

impl From<StreamMessage> for Letter {
    fn from(message: StreamMessage) -> Self {
        let decoded = JobHeader::decode(&message.payload).ok();
        let (header, tail) = decoded.map_or((None, Bytes::new()), |(header, tail)| (Some(header), tail));
        let reason = message.headers.get(queue::REASON).map(ToString::to_string);
        Self {
            sequence: message.sequence,
            job: job_of(&message.payload),
            client: queue::last_token(&message.subject),
            lane: message.subject.split('.').nth(1).and_then(|lane| lane.parse().ok()),
            reason: reason.unwrap_or_else(|| Code::Internal.to_string()),
            dead_at: message.time,
            bytes: message.payload.len(),
            header,
            tail,
        }
    }
}

/// A page of dead letters, and where the next one begins.
pub(crate) struct Page {
    pub(crate) letters: Vec<Letter>,
    pub(crate) next: Option<u64>,
}

async fn dead(operators: &Operators) -> Result<Stream<()>, Problem> {
    operators.publisher.context().get_stream_no_info(queue::DEAD).await.map_err(|error| away(&error))
}

fn away(error: &dyn std::error::Error) -> Problem {
    tracing::warn!(%error, "dead letters cannot be reached");
    Code::QueueUnavailable.into()
}

/// The first dead letter from `sequence` on.
pub(crate) async fn from_on(operators: &Operators, sequence: u64) -> Result<Option<Letter>, Problem> {
    let stream = dead(operators).await?;
    let get = stream.raw_message_builder().sequence(sequence).next_by_subject(queue::ALL_DEAD).send();
    match get.await {
        Ok(message) => Ok(Some(message.into())),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(away(&error)),
    }
}

/// One dead letter.
pub(crate) async fn get(operators: &Operators, sequence: u64) -> Result<Option<Letter>, Problem> {
    match dead(operators).await?.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message.into())),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(away(&error)),
    }
}

/// Up to `limit` dead letters after `cursor`, in the order in which they died.
pub(crate) async fn page(operators: &Operators, cursor: u64, limit: usize) -> Result<Page, Problem> {
    let (mut letters, mut bytes, mut after) = (Vec::new(), 0, cursor);
    while let Some(mut letter) = from_on(operators, after.saturating_add(1)).await? {
        if letters.len() == limit || bytes >= DEAD_PAGE_BYTES {
            return Ok(Page { letters, next: Some(after) });
        }
        letter.tail = Bytes::new();
        (bytes, after) = (bytes + letter.bytes, letter.sequence);
        letters.push(letter);
    }
    Ok(Page { letters, next: None })
}

fn refused(why: &str) -> Problem {
    ApiError::from(Code::RequeueRefused).detail(why).into()
}

/// Puts a dead letter back into the queue: the same job, as if it had never been tried. Repeated, also after the
/// letter is gone, it gives the same job.
pub(crate) async fn requeue(
    operators: &Operators,
    sequence: u64,
    operator: Who,
) -> Result<(JobId, State), Problem> {
    let place = i64::try_from(sequence).map_err(|_| Code::NotFound)?;
    let Some(letter) = get(operators, sequence).await? else {
        let gone = operators.store.requeued_from(place).await?.ok_or(Code::NotFound)?;
        return Ok((gone.job, gone.state));
    };
    let header = letter.header.as_ref().ok_or_else(|| refused("this version cannot read the letter"))?;
    let (job, now) = (header.job, clock::now());
    // The record says how often; the deadline is the same whichever number it is.
    let deadline = header.clone().requeued(1, now).deadline;
    let since = now - operators.access.quota(header.client).keeps_records();
    let requeue =
        operators.store.requeue(job, place, deadline, (since, now), operator).await?.map_err(refused)?;
    put_back(operators, &requeue, Some(letter)).await?;
    tracing::info!(%job, operator = operator.actor.id(), letter = sequence, "dead letter requeued");
    Ok((job, requeue.state))
}

/// Steps two to four, as far as they are still to be done.
async fn put_back(operators: &Operators, requeue: &Requeue, letter: Option<Letter>) -> Result<(), Problem> {
    if !requeue.pending {
        return Ok(());
    }
    let Some(letter) = letter else { return without_letter(operators, requeue).await };
    let is_open = !requeue.state.is_terminal();
    if is_open && !requeue.published {
        let sequence = publish(operators, requeue, &letter).await?;
        operators.store.requeue_published(requeue, sequence).await?;
    }
    // A job that ended in failure before it is known to have been in JOBS may still need its letter.
    if is_open || requeue.published || requeue.state != State::Failed {
        remove(operators, letter.sequence).await?;
    }
    Ok(operators.store.requeue_done(requeue).await?)
}

async fn publish(operators: &Operators, requeue: &Requeue, letter: &Letter) -> Result<u64, Problem> {
    let header = letter.header.clone().ok_or_else(|| refused("this version cannot read the letter"))?;
    let mut header = header.requeued(requeue.requeues, clock::now());
    header.deadline = requeue.deadline;
    let subject = queue::job_subject(header.lane, header.client);
    let message = Message::new(subject, header.message_id(header.attempt), header.encode(&letter.tail));
    let published = operators.publisher.publish(message, PUBLISH_DEADLINE).await;
    published.map_err(|error| {
        tracing::warn!(job = %requeue.job, %error, "dead letter not in the queue yet");
        match error {
            PublishError::Full => Code::QueueFull.into(),
            PublishError::Unknown | PublishError::Refused(_) => Code::QueueUnavailable.into(),
        }
    })
}

/// The letter of an open job is gone: published it was removed; else it was lost, and the job with it.
async fn without_letter(operators: &Operators, requeue: &Requeue) -> Result<(), Problem> {
    if !requeue.published && !requeue.state.is_terminal() {
        tracing::error!(job = %requeue.job, letter = requeue.letter, "the dead letter is lost");
        operators.store.settle_unpublished(requeue, clock::now()).await?;
    }
    Ok(operators.store.requeue_done(requeue).await?)
}

/// Removes a dead letter for good, bytes and all.
pub(crate) async fn purge(operators: &Operators, sequence: u64, operator: Who) -> Result<(), Problem> {
    let letter = get(operators, sequence).await?.ok_or(Code::NotFound)?;
    if !discard(operators, &letter, operator).await? {
        return Err(refused("the letter is on its way into the queue"));
    }
    let (job, operator) = (letter.job.map(tracing::field::display), operator.actor.id());
    tracing::info!(job, operator, letter = sequence, "dead letter purged");
    Ok(())
}

/// Removes a dead letter on behalf of `who`; not one that is on its way into the queue. Whether it is gone.
pub(crate) async fn discard(operators: &Operators, letter: &Letter, who: Who) -> Result<bool, Problem> {
    let place = i64::try_from(letter.sequence).map_err(|_| Code::NotFound)?;
    if operators.store.requeued_from(place).await?.is_some_and(|requeue| requeue.pending) {
        return Ok(false);
    }
    // The trail first: an entry for a letter that is still there does no harm.
    operators.store.purge(place, letter.client, letter.job, clock::now(), who).await?;
    remove(operators, letter.sequence).await?;
    Ok(true)
}

async fn remove(operators: &Operators, sequence: u64) -> Result<(), Problem> {
    use async_nats::jetstream::stream::DeleteMessageErrorKind::JetStream;
    match dead(operators).await?.delete_message(sequence).await {
        Ok(_) => Ok(()),
        // Somebody else was first.
        Err(error) if matches!(error.kind(), JetStream(_)) => Ok(()),
        Err(error) => Err(away(&error)),
    }
}

/// Goes on with what was left half-way, and removes letters past their retention, until `stop`.
pub(crate) async fn resume(operators: Arc<Operators>, stop: CancellationToken) {
    let (mut round, mut letters) = (interval(SWEEP_INTERVAL), Letters::default());
    round.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = round.tick() => {}
        }
        let work = resume_all(&operators);
        if timeout(2 * SWEEP_INTERVAL, work).await.is_err() {
            tracing::warn!("dead letters are still on their way into the queue");
        }
        if !matches!(timeout(2 * SWEEP_INTERVAL, letters.sweep(&operators)).await, Ok(Ok(()))) {
            tracing::warn!("dead letters past their retention are left to the next round");
        }
    }
}

async fn resume_all(operators: &Operators) {
    let pending = match operators.store.pending_requeues().await {
        Ok(pending) => pending,
        Err(error) => return tracing::warn!(%error, "requeued dead letters"),
    };
    for requeue in pending {
        let outcome = async {
            let letter = get(operators, requeue.letter as u64).await?;
            put_back(operators, &requeue, letter).await
        };
        if outcome.await.is_err() {
            tracing::warn!(job = %requeue.job, letter = requeue.letter, "not back in the queue yet");
        }
    }
}
