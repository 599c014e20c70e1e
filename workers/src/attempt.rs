//! The life of one delivered message: open, analyse, report, publish, ack.
//!
//! An ack is sent only after the broker has acknowledged what replaces the job: its result, its next attempt or
//! its dead letter. An ack proves nothing and is not waited for: when it is lost the job runs again, and the
//! first result wins where results are recorded.

use std::{convert::Infallible, sync::Arc, time::Duration};

use async_nats::jetstream::{
    AckKind, Message,
    object_store::{GetError, GetErrorKind},
};
use bytes::Bytes;
use dermflow_schemas::{
    clock,
    envelope::{Carrier, Failure, JobHeader, Payload, Progress, ResultHeader, job_of},
    error::Code,
    fhir::Resource,
    id::JobId,
    limits::{
        BACKOFF, BROKER_PAUSE, MAX_ATTEMPTS, MAX_PAYLOAD_BYTES, MODEL_PAUSE, MODEL_PAUSE_MAX,
        OBJECT_DEADLINE, PUBLISH_DEADLINE, PULL_EXPIRES, RESULT_PATIENCE,
    },
    model::ModelRef,
    queue::{self, PublishError, Publisher},
    random,
    seal::{Content, Keyring, Sealed},
};
use time::OffsetDateTime;
use tokio::{
    io::AsyncReadExt,
    time::{Instant, interval_at, sleep, timeout},
};

use crate::{
    analyse::{Analysis, AnalysisError, analyse},
    cancel::{Cancels, Held},
    executor::{ExecutorError, Executors, Turn},
    model::Model,
    models::Models,
    quarantine::Quarantine,
    report::{self, Case},
    timing::Timing,
};

/// What every attempt needs.
pub struct Attempts {
    /// Into the streams.
    pub publisher: Publisher,
    /// Outside the streams.
    pub client: async_nats::Client,
    /// Opens payloads, seals reports.
    pub keys: Keyring,
    /// What the executors run, by number.
    pub models: Arc<Models>,
    /// The executors.
    pub executors: Executors,
    /// How long things may take.
    pub timing: Timing,
    /// What was withdrawn.
    pub cancels: Cancels,
    /// Who may run beside whom, of all jobs of the process.
    pub quarantine: Quarantine,
}

/// How an attempt ended.
enum Verdict {
    /// With a result, with or without a report.
    Result(ResultHeader, Bytes),
    /// Another attempt may do better; when there is none left, the job fails with this code.
    Again(Code),
    /// No attempt would do better until the model is mended: the job fails at once with this code, and its payload is
    /// kept.
    Mend(Code),
    /// It was never begun, as the process ends.
    GiveBack,
    /// The client withdrew it: nothing is published.
    Withdrawn,
    /// It was never begun, as a job that may take the process down has come before it.
    StepAside,
    /// It was never begun, as its model is another worker's.
    HandOn,
}

/// A job with what its message says about it.
struct Delivery {
    header: JobHeader,
    tail: Bytes,
    /// Attempts so far, this one included: redeliveries by the broker count.
    attempt: u32,
    began: OffsetDateTime,
    held: Held,
    /// Which model it is for, once that is known.
    model: Option<ModelRef>,
}

impl Attempts {
    /// Sees one message to its end, on the executor whose turn it is.
    pub async fn run(&self, message: &Message, turn: Turn) {
        let in_hand = self.quarantine.take();
        let done = tokio::select! {
            done = self.settle(message, turn) => done,
            never = keep_alive(message, self.timing.progress) => match never {},
        };
        if let Some(ack) = done
            && let Err(error) = message.ack_with(ack).await
        {
            tracing::warn!(%error, "an ack was not sent; the job will run again");
        }
        drop(in_hand);
        // The place of this job is taken until then, so that no other comes in.
        self.quarantine.over().await;
    }

    /// Returns the ack, or `None` when the message must be redelivered.
    async fn settle(&self, message: &Message, turn: Turn) -> Option<AckKind> {
        let delivered = message.info().map_or(1, |info| info.delivered);
        let (header, tail) = match JobHeader::decode(&message.payload) {
            Ok(decoded) => decoded,
            Err(error) => {
                tracing::error!(%error, "not a job envelope");
                drop(turn);
                return self.give_up_unread(message).await.then_some(AckKind::Term);
            }
        };
        let redelivered = u32::try_from(delivered - 1).unwrap_or(0);
        let attempt = header.attempt.saturating_add(redelivered);
        let held = self.cancels.hold(header.job);
        let mut delivery = Delivery { header, tail, attempt, began: clock::now(), held, model: None };
        let mut verdict = self.judge(&mut delivery, turn).await;
        if delivery.held.is_withdrawn() {
            verdict = Verdict::Withdrawn;
        }
        let (outcome, published) = match verdict {
            Verdict::GiveBack => return Some(AckKind::Nak(None)),
            Verdict::Withdrawn => ("withdrawn", true),
            Verdict::StepAside => ("aside", self.queue_again(&delivery, attempt, Duration::ZERO).await),
            Verdict::HandOn => {
                let age = clock::now() - delivery.header.accepted_at;
                let pause = pause_between_workers(age, random::fraction());
                ("handed on", self.queue_again(&delivery, attempt, pause).await)
            }
            Verdict::Result(header, report) => {
                let outcome = if report.is_empty() { "failed" } else { "report" };
                (outcome, self.publish_result(&delivery, &header, &report).await)
            }
            Verdict::Again(_) if attempt < MAX_ATTEMPTS => {
                let pause = pause_after(attempt, random::fraction());
                let parked = self.queue_again(&delivery, attempt + 1, pause).await;
                if parked {
                    self.note_progress(&delivery, true).await;
                }
                ("retry", parked)
            }
            Verdict::Again(code) | Verdict::Mend(code) => ("dead", self.give_up(&delivery, code).await),
        };
        let (job, lane) = (delivery.header.job, delivery.header.lane.as_str());
        let ms = clock::elapsed_ms(delivery.began, clock::now());
        let model = delivery.model.as_ref().map(tracing::field::display);
        tracing::info!(%job, attempt, lane, model, outcome, published, ms, "attempt");
        published.then_some(AckKind::Ack)
    }

    /// Everything up to the verdict.
    async fn judge(&self, delivery: &mut Delivery, turn: Turn) -> Verdict {
        if delivery.attempt > MAX_ATTEMPTS {
            return Verdict::Again(Code::AttemptsExhausted);
        }
        let slot = tokio::select! {
            biased;
            () = self.quarantine.begins() => return Verdict::StepAside,
            slot = turn => match slot {
                Some(slot) => slot,
                None => return Verdict::GiveBack,
            },
            () = delivery.held.token().cancelled() => return Verdict::Withdrawn,
        };
        // Tried before, it may be what ended its worker.
        let suspect = delivery.attempt > 1;
        let seat = if suspect { self.quarantine.alone().await } else { None };
        if seat.is_none() && (suspect || self.quarantine.is_taken()) {
            return Verdict::StepAside;
        }
        delivery.began = clock::now();
        if delivery.began > delivery.header.deadline {
            return delivery.failed(Code::DeadlineExceeded, None);
        }
        if delivery.held.is_withdrawn() {
            return Verdict::Withdrawn;
        }
        self.note_progress(delivery, false).await;
        let job = delivery.header.job;
        let payload = match self.payload(delivery).await {
            Ok(payload) => Arc::new(payload),
            Err((code, reason)) => {
                tracing::error!(%job, %code, reason, "the payload does not open");
                return Verdict::Again(code);
            }
        };
        let wanted = payload.manifest.model.as_ref();
        let Some((number, model)) = self.models.choose(job, wanted) else {
            return self.elsewhere(wanted).await;
        };
        delivery.model = Some(model.id.clone());
        let (own, attempt, files) = (model.clone(), delivery.attempt, payload.clone());
        let decoding = self.timing.decoding;
        let withdrawn = delivery.held.token().clone();
        let work = move |engine: &mut dyn crate::engine::Engine| {
            analyse(engine, &own, &files, attempt, decoding, &|| withdrawn.is_cancelled())
        };
        match self.executors.run(slot, self.timing.job, number, work).await {
            Ok(Ok(analysis)) => self.report(delivery, &payload, &analysis, model),
            Ok(Err(AnalysisError::Withdrawn)) => Verdict::Withdrawn,
            Ok(Err(error)) => {
                tracing::warn!(%job, attempt, %error, "the analysis failed");
                delivery.refused(&error)
            }
            Err(error @ (ExecutorError::Panicked | ExecutorError::Hung)) => {
                tracing::error!(%job, attempt, %error, "the analysis did not finish");
                Verdict::Again(Code::AttemptsExhausted)
            }
        }
    }

    /// What becomes of a job for a model that is not here: when no worker has it, one may have it again in a moment.
    async fn elsewhere(&self, wanted: Option<&ModelRef>) -> Verdict {
        let Some(wanted) = wanted else { return Verdict::Again(Code::ModelUnknown) };
        if queue::answered(&self.client, queue::model_subject(wanted)).await != Some(false) {
            return Verdict::HandOn;
        }
        tracing::warn!(model = %wanted, "no worker has the model");
        Verdict::Again(Code::ModelUnknown)
    }

    /// Fire and forget: the result repeats what it says.
    async fn note_progress(&self, delivery: &Delivery, parked: bool) {
        let job = delivery.header.job;
        let progress = Progress { job, attempt: delivery.attempt, started_at: delivery.began, parked };
        let body = serde_json::to_vec(&progress).unwrap_or_default();
        let _ = self.client.publish(queue::progress_subject(job), body.into()).await;
    }

    /// The payload, or what the job fails with when no further attempt gets at it, and why. All of it is
    /// transient: another worker may have the key, and a replica of the object store may be behind.
    async fn payload(&self, delivery: &Delivery) -> Result<Payload, (Code, String)> {
        let job = delivery.header.job;
        let bytes = match delivery.header.carrier {
            Carrier::Inline => delivery.tail.clone(),
            Carrier::Object => timeout(OBJECT_DEADLINE, self.object(job))
                .await
                .unwrap_or_else(|_| Err("the object store does not answer".into()))
                .map_err(|error| (no_object(&error), error.to_string()))?,
        };
        let sealed = Sealed { key_id: delivery.header.key.clone(), bytes };
        let plain = self.keys.open(Content::Payload(job), &sealed);
        let plain = plain.map_err(|error| (Code::PayloadUnreadable, error.to_string()))?;
        Payload::decode(plain).map_err(|error| (Code::PayloadUnreadable, error.to_string()))
    }

    async fn object(&self, job: JobId) -> Result<Bytes, async_nats::Error> {
        let store = self.publisher.context().get_object_store(queue::PAYLOADS).await?;
        let mut bytes = Vec::new();
        let limit = MAX_PAYLOAD_BYTES as u64 + 1;
        store.get(job.to_string()).await?.take(limit).read_to_end(&mut bytes).await?;
        if bytes.len() > MAX_PAYLOAD_BYTES { Err("the object is too large".into()) } else { Ok(bytes.into()) }
    }

    fn report(&self, delivery: &Delivery, payload: &Payload, analysis: &Analysis, model: &Model) -> Verdict {
        let (job, finished_at) = (delivery.header.job, clock::now());
        let report = report::build(&Case {
            job,
            accepted_at: delivery.header.accepted_at,
            finished_at,
            manifest: &payload.manifest,
            findings: &analysis.findings,
            model,
        });
        let report = Resource::DiagnosticReport(Box::new(report)).to_json();
        match self.keys.seal(Content::Report(job), report, finished_at) {
            Ok(Sealed { key_id, bytes }) => {
                let model_us = u64::try_from(analysis.in_model.as_micros()).unwrap_or(u64::MAX);
                let (attempt, began) = (delivery.attempt, delivery.began);
                let header = ResultHeader::succeeded(job, attempt, began, finished_at, model_us, key_id);
                Verdict::Result(header, bytes)
            }
            Err(error) => {
                tracing::error!(%job, %error, "the report cannot be sealed");
                Verdict::Again(Code::AttemptsExhausted)
            }
        }
    }

    async fn publish_result(&self, delivery: &Delivery, header: &ResultHeader, report: &[u8]) -> bool {
        let JobHeader { job, requeues, .. } = delivery.header;
        let id = delivery.header.message_id(delivery.attempt);
        let header = header.clone().after_requeues(requeues).of_model(delivery.model.as_ref());
        let body = header.encode(report);
        self.publish(queue::Message::new(queue::result_subject(job), id, body)).await
    }

    /// The job again as attempt `attempt`: stored now, delivered by the broker after `pause`.
    async fn queue_again(&self, delivery: &Delivery, attempt: u32, pause: Duration) -> bool {
        let JobHeader { job, lane, client, .. } = delivery.header;
        let header = delivery.header.clone().at_attempt(attempt);
        let body = header.encode(&delivery.tail);
        self.publish(queue::Message::retry(lane, client, job, clock::now() + pause, body)).await
    }

    /// The dead letter first: what follows may delete the payload.
    async fn give_up(&self, delivery: &Delivery, code: Code) -> bool {
        let JobHeader { job, lane, client, .. } = delivery.header;
        tracing::error!(%job, attempt = delivery.attempt, %code, "the job is given up");
        let id = delivery.header.message_id(delivery.attempt);
        let header = delivery.header.clone().at_attempt(delivery.attempts());
        let body = header.encode(&delivery.tail);
        if !self.bury(queue::dead_subject(lane, client), id, body, code).await {
            return false;
        }
        let Verdict::Result(header, report) = delivery.failed(code, None) else { return false };
        self.publish_result(delivery, &header, &report).await
    }

    /// A dead letter for a message that this build cannot read, as one of a newer build may be; and the end of
    /// its job, which messages of every version name.
    async fn give_up_unread(&self, message: &Message) -> bool {
        let Some(subject) = queue::dead_subject_of(&message.subject) else { return true };
        let job = job_of(&message.payload);
        let id = match (job, message.info()) {
            (Some(job), _) => format!("{job}:unread"),
            (None, Ok(info)) => format!("unread:{}:{}", info.stream, info.stream_sequence),
            (None, Err(_)) => String::new(),
        };
        let code = Code::PayloadUnreadable;
        if !self.bury(subject, id.clone(), message.payload.clone(), code).await {
            return false;
        }
        let Some(job) = job else { return true };
        let (failure, now) = (Failure { code, image: None }, clock::now());
        // Of any life of the job: how often it was put back is in what cannot be read.
        let header = ResultHeader::failed(job, failure, MAX_ATTEMPTS, now, now).after_requeues(u32::MAX >> 1);
        self.publish(queue::Message::new(queue::result_subject(job), id, header.encode(&[]))).await
    }

    /// The letter first waits as a result does; when there is no room for it, the job ends without one.
    async fn bury(&self, subject: String, id: String, body: Bytes, code: Code) -> bool {
        let mut letter = queue::Message::new(subject, id, body);
        letter.headers.insert(queue::REASON, code.to_string());
        match self.publisher.publish(letter.clone(), PUBLISH_DEADLINE).await {
            Ok(_) => true,
            // A job that cannot end would come back again and again, and keep workers from all others.
            Err(PublishError::Full) => {
                tracing::error!(subject = letter.subject, "no room for dead letters: a payload is not kept");
                true
            }
            Err(_) => self.publish(letter).await,
        }
    }

    /// Publishes, again and again while the broker is away, for [`RESULT_PATIENCE`] at most.
    async fn publish(&self, message: queue::Message) -> bool {
        let end = Instant::now() + RESULT_PATIENCE;
        loop {
            let Err(error) = self.publisher.publish(message.clone(), PUBLISH_DEADLINE).await else {
                return true;
            };
            let subject = message.subject.as_str();
            if Instant::now() > end {
                tracing::error!(subject, %error, "not published; the job is left to redelivery");
                return false;
            }
            tracing::warn!(subject, %error, "not published yet");
            sleep(BROKER_PAUSE).await;
        }
    }
}

/// The pause before the attempt after `attempt`: up to half as much again by `chance`, from 0 to 1, so that jobs
/// which failed together do not come back together.
fn pause_after(attempt: u32, chance: f64) -> Duration {
    let base = BACKOFF[(attempt.max(1) as usize - 1).min(BACKOFF.len() - 1)];
    base + base.mul_f64(chance.clamp(0.0, 1.0) / 2.0)
}

/// The pause of a job that is handed on, by its age: the longer it has waited, the longer it may. The broker gives the job
/// to the oldest request, and requests are made anew in a fixed time: by `chance`, from 0 to 1, it is not always the same
/// worker's.
fn pause_between_workers(age: time::Duration, chance: f64) -> Duration {
    (age.unsigned_abs() / 4).clamp(MODEL_PAUSE, MODEL_PAUSE_MAX)
        + PULL_EXPIRES.mul_f64(chance.clamp(0.0, 1.0))
}

/// What it means that an object cannot be had.
fn no_object(error: &async_nats::Error) -> Code {
    match error.downcast_ref::<GetError>().map(GetError::kind) {
        Some(GetErrorKind::NotFound) => Code::PayloadLost,
        _ => Code::AttemptsExhausted,
    }
}

impl Delivery {
    /// The attempts that were made: the delivery after the last one only finds that there were as many.
    fn attempts(&self) -> u32 {
        self.attempt.min(MAX_ATTEMPTS)
    }

    fn failed(&self, code: Code, image: Option<usize>) -> Verdict {
        let failure = Failure { code, image };
        let header =
            ResultHeader::failed(self.header.job, failure, self.attempts(), self.began, clock::now());
        Verdict::Result(header, Bytes::new())
    }

    fn refused(&self, error: &AnalysisError) -> Verdict {
        if let Some(code) = error.transient(self.attempt) {
            return Verdict::Again(code);
        }
        match error {
            AnalysisError::Undecodable(image, _) => self.failed(Code::ImageUndecodable, Some(*image)),
            AnalysisError::Unusable | AnalysisError::Engine(_) => Verdict::Mend(Code::AnalysisFailed),
            AnalysisError::Withdrawn => Verdict::Withdrawn,
        }
    }
}

/// Tells the broker, for as long as it is polled, that the job is being worked on.
async fn keep_alive(message: &Message, period: Duration) -> Infallible {
    let mut beat = interval_at(Instant::now() + period, period);
    loop {
        beat.tick().await;
        let _ = message.ack_with(AckKind::Progress).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dermflow_schemas::limits::{BULK_DEADLINE, INTERACTIVE_DEADLINE};

    #[test]
    fn the_pause_grows_and_is_spread() {
        for (attempt, base) in (1..).zip(BACKOFF) {
            assert_eq!(pause_after(attempt, 0.0), base);
            assert_eq!(pause_after(attempt, 1.0), base.mul_f64(1.5));
            assert!(pause_after(attempt, 0.3) < pause_after(attempt, 0.4));
        }
        assert_eq!(pause_after(0, 0.0), BACKOFF[0]);
        assert_eq!(pause_after(99, 0.0), BACKOFF[3]);
    }

    /// A job that nobody takes until its deadline is handed on a bounded number of times.
    #[test]
    fn a_job_is_handed_on_ever_more_slowly() {
        for (lane, most) in [(INTERACTIVE_DEADLINE, 60), (BULK_DEADLINE, 9_000)] {
            let (mut age, mut times) = (Duration::ZERO, 0);
            while age < lane {
                age += pause_between_workers(age.try_into().unwrap(), 0.0);
                times += 1;
            }
            assert!(times < most, "{times}");
        }
    }
}
