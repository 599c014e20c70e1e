//! Step 8 of a job's life: results and progress notes from the queue into the record.

use std::{pin::pin, sync::Arc, time::Duration};

use async_nats::jetstream::{AckKind, Message, consumer::pull::Stream, object_store::DeleteErrorKind};
use dermflow_auth::db::DbError;
use dermflow_schemas::{
    envelope::{EnvelopeError, Outcome, Progress, ResultHeader},
    id::JobId,
    limits::{
        MAX_WAITERS, NOTES_HELD, NOTES_TOGETHER, PUBLISH_DEADLINE, RECORD_BATCH, RECORD_BYTES, RECORD_GROUPS,
        RECORD_INTERVAL, WITHDRAWALS,
    },
    queue,
    seal::Sealed,
};
use futures_util::{FutureExt, StreamExt, stream};
use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    app::App,
    lanes,
    lost::{self, Found},
    store::{Open, Settled},
};

/// The pause after a failure of broker or database.
const PAUSE: Duration = Duration::from_millis(500);

/// A result as it came from a worker, with the sealed report.
type Received = (ResultHeader, Option<Sealed>);

/// The way into the record for results that callers wait for: those of one moment share a transaction, as the lock on
/// their client's load lets no second one go on.
#[derive(Debug)]
pub(crate) struct Awaited(mpsc::Sender<(Received, oneshot::Sender<()>)>);

/// Results on their way to [`run_awaited`].
pub(crate) type AwaitedResults = mpsc::Receiver<(Received, oneshot::Sender<()>)>;

impl Awaited {
    /// The way in, and its other end.
    pub(crate) fn new() -> (Self, AwaitedResults) {
        let (sender, receiver) = mpsc::channel(MAX_WAITERS);
        (Self(sender), receiver)
    }

    /// Returns when the record has a result, or could not take it. What has begun is finished when the caller hangs up.
    pub(crate) async fn record(&self, result: Received) {
        let (tried, outcome) = oneshot::channel();
        if self.0.send((result, tried)).await.is_ok() {
            let _ = outcome.await;
        }
    }
}

/// Records what callers wait for, [`RECORD_GROUPS`] transactions at once, until [`Awaited`] is gone. What fails is in
/// RESULTS still.
pub(crate) async fn run_awaited(app: Arc<App>, mut awaited: AwaitedResults) {
    let groups = Arc::new(Semaphore::new(RECORD_GROUPS));
    loop {
        let Ok(permit) = groups.clone().acquire_owned().await else { return };
        let Some(first) = awaited.recv().await else { return };
        let (mut bytes, mut group) = (size(&first.0), vec![first]);
        while group.len() < RECORD_BATCH
            && bytes < RECORD_BYTES
            && let Ok(next) = awaited.try_recv()
        {
            bytes += size(&next.0);
            group.push(next);
        }
        let app = app.clone();
        tokio::spawn(async move {
            let (results, tried): (Vec<Received>, Vec<_>) = group.into_iter().unzip();
            let recorded = record(&app, &results).await;
            // What they leave in the queue is no affair of those who wait for them, or for the next group.
            drop((tried, permit));
            match recorded {
                Ok(winners) => clean_up(&app, &winners).await,
                Err(error) => tracing::warn!(%error, results = results.len(), "results not recorded yet"),
            }
        });
    }
}

fn size((_, report): &Received) -> usize {
    report.as_ref().map_or(0, |report| report.bytes.len())
}

/// Drains RESULTS until `stop`, whatever fails on the way. The recorders of all replicas share the work.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        match subscribe(&app).await {
            Ok(messages) => record_from(&app, messages, &stop).await,
            Err(error) => tracing::warn!(%error, "recorder cannot reach the queue"),
        }
        pause(&stop).await;
    }
}

/// Records what comes until the broker no longer says that it is there, or `stop`. What still came for this request would
/// wait for the broker to deliver it again: it ends before the pause.
async fn record_from(app: &App, mut messages: Stream, stop: &CancellationToken) {
    let mut next = Instant::now();
    loop {
        let first = tokio::select! {
            () = stop.cancelled() => return,
            first = messages.next() => first,
        };
        match first {
            Some(Ok(first)) => {
                sleep_until(next).await;
                next = Instant::now() + RECORD_INTERVAL;
                let batch = ready_too(first, &mut messages);
                record_batch(app, batch, stop).await;
            }
            Some(Err(error)) => return tracing::warn!(%error, "recorder"),
            None => return,
        }
    }
}

async fn subscribe(app: &App) -> Result<Stream, async_nats::Error> {
    let consumer = queue::bind(app.publisher.context(), queue::RESULTS, queue::RECORDER).await?;
    let stream = consumer.stream().max_messages_per_batch(RECORD_BATCH).max_bytes_per_batch(RECORD_BYTES);
    Ok(stream.messages().await?)
}

async fn pause(stop: &CancellationToken) {
    let _ = timeout(PAUSE, stop.cancelled()).await;
}

/// Everything that has arrived already, so that a burst takes few transactions and a single result no delay.
fn ready_too(first: Message, messages: &mut Stream) -> Vec<Message> {
    let mut bytes = first.payload.len();
    let mut batch = vec![first];
    while batch.len() < RECORD_BATCH
        && bytes < RECORD_BYTES
        && let Some(Some(Ok(message))) = messages.next().now_or_never()
    {
        bytes += message.payload.len();
        batch.push(message);
    }
    batch
}

async fn record_batch(app: &App, batch: Vec<Message>, stop: &CancellationToken) {
    let (mut results, mut messages) = (Vec::new(), Vec::new());
    for message in batch {
        match ResultHeader::decode(&message.payload) {
            Ok(result) => {
                results.push(result);
                messages.push(message);
            }
            Err(error) => set_aside(&message, &error).await,
        }
    }
    // Until the record has them they stay in RESULTS: acknowledged is what is on disk.
    let (mut done, mut most) = (0, results.len());
    while done < results.len() {
        let end = results.len().min(done + most);
        let winners = match record(app, &results[done..end]).await {
            Ok(winners) => winners,
            Err(error) => {
                tracing::warn!(%error, results = end - done, "results not recorded yet");
                // It may be too much for one transaction.
                most = (most / 2).max(1);
                pause(stop).await;
                if stop.is_cancelled() {
                    return;
                }
                continue;
            }
        };
        for message in &messages[done..end] {
            if let Err(error) = message.ack().await {
                tracing::debug!(%error, "a recorded result will be delivered again");
            }
        }
        clean_up(app, &winners).await;
        done = end;
    }
}

/// A newer build's result is left for a replica that knows it; a broken one can help nobody, and its job is found lost.
async fn set_aside(message: &Message, error: &EnvelopeError) {
    tracing::error!(subject = %message.subject, %error, "unreadable result");
    let kind = match error {
        EnvelopeError::UnknownVersion(_) => AckKind::Nak(Some(Duration::from_secs(5))),
        EnvelopeError::Malformed(_) => AckKind::Term,
    };
    let _ = message.ack_with(kind).await;
}

/// Records results; of each job the first one wins. What is left to do for the winners is [`clean_up`]'s.
async fn record(app: &App, results: &[Received]) -> Result<Vec<Settled>, DbError> {
    let winners = app.store.settle(results).await?;
    app.metrics.late_results.with_label_values::<&str>(&[]).inc_by((results.len() - winners.len()) as u64);
    for winner in &winners {
        let result = results.iter().map(|(header, _)| header).find(|header| header.job == winner.id);
        if let Some(header) = result {
            observe(app, winner, header);
        }
    }
    Ok(winners)
}

fn observe(app: &App, winner: &Settled, header: &ResultHeader) {
    let (lane, state) = (winner.lane.as_str(), winner.state.as_str());
    app.metrics.jobs_ended.with_label_values(&[lane, state]).inc();
    // Workers of older builds do not say, and an attempt that did not come to a model has none.
    let (model, version) = header.model.split_once('@').unwrap_or((&header.model, ""));
    app.metrics.model_jobs.with_label_values(&[model, version, state]).inc();
    let queued = (header.started_at - winner.accepted_at).as_seconds_f64().max(0.0);
    app.metrics.queue_seconds.with_label_values(&[lane]).observe(queued);
    if header.outcome == Outcome::Succeeded {
        let seconds = app.metrics.model_seconds.with_label_values(&[lane, model, version]);
        seconds.observe(header.model_us as f64 / 1e6);
    }
}

/// Frees what ended jobs leave in the queue. What fails here is freed by the streams' limits.
pub(crate) async fn clean_up(app: &App, ended: &[Settled]) {
    let spent: Vec<JobId> = ended.iter().filter(|job| job.spent_claim_check).map(|job| job.id).collect();
    let delete = stream::iter(spent).for_each_concurrent(WITHDRAWALS, |id| async move {
        delete_object(app, id).await;
    });
    delete.await;
}

/// Removes a job that ended without a worker's result from the queue, wherever it waits, and stops the worker
/// that runs it. Whether it is out of the queue.
pub(crate) async fn withdraw(app: &App, id: JobId, stream_seq: Option<i64>) -> bool {
    lanes::cancel(app, id).await;
    let withdraw = async {
        let context = app.publisher.context();
        if let Some(stream_seq) = stream_seq {
            // After a loss the broker hands sequences out again: the message there may be another job's.
            let open = Open { id, stream_seq };
            if let Found::Own(_) = lost::find(context, open).await? {
                // It is an error when a worker has acked it meanwhile, and then there is nothing to do.
                let jobs = context.get_stream_no_info(queue::JOBS).await?;
                let _ = jobs.delete_message(stream_seq as u64).await;
            }
        }
        let retries = context.get_stream_no_info(queue::RETRIES).await?;
        for subject in [queue::retry_subject(id), queue::due_filter(id)] {
            retries.purge().filter(subject).await?;
        }
        Ok::<(), async_nats::Error>(())
    };
    briefly(id, "not withdrawn", withdraw).await
}

/// Removes a claim-checked payload. Whether it is gone.
pub(crate) async fn delete_object(app: &App, id: JobId) -> bool {
    let delete = async {
        let bucket = app.publisher.context().get_object_store(queue::PAYLOADS).await?;
        match bucket.delete(id.to_string()).await {
            Err(error) if error.kind() == DeleteErrorKind::NotFound => Ok(()),
            done => Ok::<(), async_nats::Error>(done?),
        }
    };
    briefly(id, "payload not removed", delete).await
}

/// Cleaning up is worth one try within [`PUBLISH_DEADLINE`]: a worker looks at the deadline of what is left, and
/// the streams' limits free it.
async fn briefly(id: JobId, failed: &str, work: impl Future<Output = Result<(), async_nats::Error>>) -> bool {
    match timeout(PUBLISH_DEADLINE, work).await {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => tracing::warn!(job = %id, %error, "{failed}"),
        Err(_) => tracing::warn!(job = %id, "{failed}: no answer"),
    }
    false
}

/// Takes workers' progress notes into the record until `stop`. They may be lost: results repeat them.
pub(crate) async fn run_progress(app: Arc<App>, stop: CancellationToken) {
    let mut notes = loop {
        match app.nats.queue_subscribe(queue::ALL_PROGRESS, queue::RECORDER.into()).await {
            Ok(notes) => break notes,
            Err(error) => tracing::warn!(%error, "progress"),
        }
        pause(&stop).await;
        if stop.is_cancelled() {
            return;
        }
    };
    loop {
        let first = tokio::select! {
            () = stop.cancelled() => return,
            first = notes.next() => first,
        };
        let Some(first) = first else { return };
        let mut held = vec![first];
        let end = sleep(NOTES_TOGETHER);
        let mut more = pin!(notes.by_ref().take(NOTES_HELD).take_until(end));
        while let Some(note) = more.next().await {
            held.push(note);
        }
        let held: Vec<Progress> =
            held.iter().filter_map(|message| serde_json::from_slice(&message.payload).ok()).collect();
        if let Err(error) = app.store.started(&held).await {
            tracing::debug!(%error, "progress not recorded");
        }
    }
}
