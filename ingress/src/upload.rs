//! An upload to a batch: a body of lines that is read while its answer is written.
//!
//! A line is answered when its job is on disk. What an upload has in hand is bounded; beyond that the body is not
//! read, and the sender's socket waits. So it is when the client's quota or the queue is full, for a while.

use std::{
    collections::HashSet,
    convert::Infallible,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    body::Body,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use dermflow_auth::audit::Who;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code, Retry},
    fhir::Language,
    id::{ClientId, JobId},
    job::Lane,
    limits::{
        ACCESS_INTERVAL, LINGER_BYTES, LINGER_TIMEOUT, MAX_BATCH_LINES, MAX_BODY_BYTES, UPLOAD_BYTES,
        UPLOAD_LEASE, UPLOAD_LINES, UPLOAD_PATIENCE, UPLOAD_SILENCE,
    },
};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Interval, MissedTickBehavior, interval, sleep, timeout},
};
use uuid::Uuid;

use crate::{
    answer::Problem,
    app::{App, Place},
    audited::refused_part,
    bodies::Memory,
    extract::Pass,
    lines::{self, Form, Line},
    ndjson::{Cut, Lines, Next},
    store::{batches::line_key, claim::Member},
    submit::{Submission, blocking, submit},
};

/// The media type of answers.
pub(crate) const NDJSON: &str = "application/x-ndjson";

/// Who uploads what.
#[derive(Debug)]
pub(crate) struct Upload {
    /// What it came with may end before it does.
    pub(crate) pass: Pass,
    pub(crate) client: ClientId,
    /// The client, and by which way it came.
    pub(crate) who: Who,
    pub(crate) batch: Uuid,
    pub(crate) form: Form,
    /// Of the reports.
    pub(crate) language: Language,
    /// From a line's acceptance to its job's end, if the caller wants it shorter than the lane's.
    pub(crate) cancel_after: Option<Duration>,
    /// Earlier uploads had lines refused, which this one may mend.
    pub(crate) mending: bool,
    /// The place among the uploads.
    pub(crate) _place: Place,
}

/// The URL of a batch.
pub(crate) fn batch_url(public_url: &str, batch: Uuid) -> String {
    format!("{public_url}/batches/{batch}")
}

/// Answers at once, and goes on reading and answering in a task of its own.
pub(crate) fn start(app: Arc<App>, upload: Upload, body: Body) -> Response {
    let url = batch_url(&app.public_url, upload.batch);
    let (answers, written) = mpsc::channel::<Bytes>(UPLOAD_LINES);
    tokio::spawn(run(app, upload, body, answers));
    let written = stream::unfold(written, |mut written| async {
        written.recv().await.map(|line| (Ok::<_, Infallible>(line), written))
    });
    let headers = [(header::CONTENT_TYPE, NDJSON.to_owned()), (header::LOCATION, url)];
    (StatusCode::OK, headers, Body::from_stream(written)).into_response()
}

/// What became of a line.
struct Answered {
    number: usize,
    custom_id: Option<String>,
    outcome: Result<JobId, Problem>,
    /// Of the line, in hand until now.
    bytes: usize,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    lines: usize,
    accepted: usize,
    refused: usize,
}

struct Uploading {
    app: Arc<App>,
    upload: Arc<Upload>,
    answers: mpsc::Sender<Bytes>,
    /// Digests of the names seen in this upload.
    seen: Arc<Mutex<HashSet<u128>>>,
    /// Ends with the turn of the last line.
    last_turn: oneshot::Receiver<Infallible>,
    counts: Counts,
    in_hand: usize,
    /// When the last line came.
    heard: OffsetDateTime,
    /// Nobody reads the answers, or the sender is gone.
    is_gone: bool,
    running: JoinSet<Answered>,
    /// Why the caller may not go on.
    shut_out: Option<Problem>,
}

async fn run(app: Arc<App>, upload: Upload, body: Body, answers: mpsc::Sender<Bytes>) {
    let lines = Lines::new(body, app.bounds.bodies.share(Some(upload.client)), MAX_BODY_BYTES);
    let uploading = Uploading {
        app,
        upload: Arc::new(upload),
        answers,
        seen: Arc::default(),
        last_turn: oneshot::channel().1,
        counts: Counts::default(),
        in_hand: 0,
        heard: clock::now(),
        is_gone: false,
        running: JoinSet::new(),
        shut_out: None,
    };
    uploading.run(lines).await;
}

/// What happens to an upload.
enum Event {
    /// The server is told to stop.
    Draining,
    /// It is time to look whether the caller may go on.
    Look,
    Answered(Option<Answered>),
}

/// The upload cannot go on: nobody reads the answers, or the sender is gone.
struct Gone;

impl Uploading {
    async fn run(mut self, mut lines: Lines) {
        let (app, batch) = (self.app.clone(), self.upload.batch);
        let complete = tokio::select! {
            complete = self.take_in(&mut lines) => complete,
            never = show(&app, batch) => match never {},
        };
        // However it ended: the batch does not wait for it any more.
        let now = clock::now();
        let since = if self.is_gone { self.heard } else { now };
        let ended = app.store.end_upload(batch, complete, since, now).await;
        let complete = complete && ended.is_ok();
        let Counts { lines: count, accepted, refused } = self.counts;
        tracing::info!(%batch, lines = count, accepted, refused, complete, "upload");
        let mut last = json!({"batch": batch, "lines": count, "accepted": accepted, "refused": refused,
                              "complete": complete});
        if let Some(problem) = &self.shut_out {
            last["error"] = problem.to_json();
        }
        if self.write(&last).await.is_ok() && !complete {
            // A connection that is closed with a body still arriving is reset, and the last lines with it.
            let _ = timeout(LINGER_TIMEOUT, discard(lines)).await;
        }
    }

    /// Takes all of it in and answers it; `false` when this was not all.
    async fn take_in(&mut self, lines: &mut Lines) -> bool {
        let batch = self.upload.batch;
        let first = json!({"batch": batch, "url": batch_url(&self.app.public_url, batch)});
        let ended = match self.write(&first).await {
            Ok(()) => self.read(lines).await,
            Err(gone) => Err(gone),
        };
        self.is_gone = ended.is_err();
        // What is in hand is finished, and told if anybody listens.
        let mut complete = ended.unwrap_or(false);
        while let Some(answered) = self.running.join_next().await {
            complete &= self.answered(answered.ok()).await.unwrap_or(false);
        }
        complete
    }

    /// Reads to the end; `false` when the server cannot go on, or the caller may not.
    async fn read(&mut self, lines: &mut Lines) -> Result<bool, Gone> {
        let mut look = interval(ACCESS_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            while !self.has_room() {
                let event = self.event(&mut look).await;
                if !self.goes_on(event).await? {
                    return Ok(false);
                }
            }
            // Kept while other things happen: it has its place in line for memory, and its sender a time to be heard from.
            let mut next = pin!(lines.next());
            let next = loop {
                let event = tokio::select! {
                    biased;
                    event = self.event(&mut look) => event,
                    next = &mut next => break next,
                };
                if !self.goes_on(event).await? {
                    return Ok(false);
                }
            };
            match next {
                Ok(Next::End) => return Ok(true),
                Err(Cut) => return Err(Gone),
                Ok(next) => {
                    if !self.take(next) {
                        return Ok(false);
                    }
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        self.running.is_empty() || (self.in_hand < UPLOAD_BYTES && self.running.len() < UPLOAD_LINES)
    }

    /// What happens first besides the next line. Cancel safe.
    async fn event(&mut self, look: &mut Interval) -> Event {
        let draining = self.app.draining.cancelled();
        tokio::select! {
            biased;
            () = draining => Event::Draining,
            _ = look.tick() => Event::Look,
            Some(answered) = self.running.join_next() => Event::Answered(answered.ok()),
        }
    }

    /// `false` when this was the end.
    async fn goes_on(&mut self, event: Event) -> Result<bool, Gone> {
        match event {
            Event::Draining => Ok(false),
            Event::Look => {
                self.shut_out = self.upload.pass.check(self.app.as_ref()).await.err();
                Ok(self.shut_out.is_none())
            }
            Event::Answered(answered) => self.answered(answered).await,
        }
    }

    /// Takes a line in hand; `false` when it is one too many.
    fn take(&mut self, next: Next) -> bool {
        self.counts.lines += 1;
        self.heard = clock::now();
        let over = self.counts.lines > MAX_BATCH_LINES;
        match next {
            Next::Line { number, bytes, memory } if !over => {
                self.in_hand += bytes.len();
                let (app, upload, seen) = (self.app.clone(), self.upload.clone(), self.seen.clone());
                let (end, ended) = oneshot::channel();
                let turn = Turn { before: std::mem::replace(&mut self.last_turn, ended), seen, _end: end };
                self.running.spawn(line(app, upload, turn, number, bytes, memory));
                true
            }
            Next::Line { number, .. } | Next::TooLong { number } => {
                let error = if over {
                    ApiError::from(Code::BatchTooLong).detail(format!("at most {MAX_BATCH_LINES} lines"))
                } else {
                    ApiError::from(Code::BodyTooLarge).detail(format!("limit {MAX_BODY_BYTES} bytes a line"))
                };
                let (app, upload) = (self.app.clone(), self.upload.clone());
                self.running.spawn(async move {
                    let outcome = refuse(&app, &upload, number, None, error.into()).await;
                    Answered { number, custom_id: None, outcome, bytes: 0 }
                });
                !over
            }
            Next::End => true,
        }
    }

    /// Tells what became of a line; `false` when others would fare no better.
    async fn answered(&mut self, answered: Option<Answered>) -> Result<bool, Gone> {
        let Some(Answered { number, custom_id, outcome, bytes }) = answered else { return Ok(false) };
        self.in_hand -= bytes;
        let mut goes_on = true;
        let answer = match outcome {
            Ok(job) => {
                self.counts.accepted += 1;
                json!({"line": number, "custom_id": custom_id, "job": job})
            }
            Err(problem) => {
                self.counts.refused += 1;
                goes_on = problem.retry() == Retry::Never;
                json!({"line": number, "custom_id": custom_id, "error": problem.to_json()})
            }
        };
        // Nobody is waited for twice.
        if self.is_gone || self.write(&answer).await.is_err() {
            self.is_gone = true;
            return Err(Gone);
        }
        Ok(goes_on)
    }

    async fn write(&self, line: &Value) -> Result<(), Gone> {
        let mut bytes = line.to_string().into_bytes();
        bytes.push(b'\n');
        match timeout(UPLOAD_SILENCE, self.answers.send(bytes.into())).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }
}

/// Shows all replicas that an upload to the batch goes on.
async fn show(app: &App, batch: Uuid) -> Infallible {
    loop {
        sleep(UPLOAD_LEASE / 3).await;
        if let Err(error) = app.store.upload_seen(batch, clock::now()).await {
            tracing::debug!(%batch, %error, "an upload goes on, which nobody sees");
        }
    }
}

async fn discard(lines: Lines) {
    let (mut rest, mut bytes) = (lines.into_rest(), 0);
    while let Some(Ok(chunk)) = rest.next().await {
        bytes += chunk.len();
        if bytes > LINGER_BYTES {
            return;
        }
    }
}

/// A line's turn to tell its name: lines are read side by side.
struct Turn {
    /// Ends with the turn of the line before.
    before: oneshot::Receiver<Infallible>,
    seen: Arc<Mutex<HashSet<u128>>>,
    /// Ends with this turn.
    _end: oneshot::Sender<Infallible>,
}

impl Turn {
    /// Whether a line before this one has its name. So of two lines the same one is refused, however often both are sent.
    async fn repeats(self, name: Option<&str>) -> bool {
        let _ = self.before.await;
        name.is_some_and(|name| {
            !self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(digest(name))
        })
    }
}

async fn line(
    app: Arc<App>,
    upload: Arc<Upload>,
    turn: Turn,
    number: usize,
    bytes: Bytes,
    memory: Memory,
) -> Answered {
    let (length, form) = (bytes.len(), upload.form);
    let (custom_id, payload) = match blocking(move || lines::parse(form, &bytes)).await {
        Ok(Line { custom_id, payload }) => (custom_id, payload.map_err(Problem::from)),
        Err(problem) => (None, Err(problem)),
    };
    let is_repeated = turn.repeats(custom_id.as_deref()).await;
    let payload = payload.and_then(|payload| {
        let repeated = || ApiError::from(Code::CustomIdRepeated).at("custom_id").into();
        if is_repeated { Err(repeated()) } else { Ok(payload) }
    });
    let outcome = match payload {
        Ok(mut payload) => {
            payload.manifest.language = upload.language;
            let custom_id = custom_id.clone().unwrap_or_default();
            let member = Member { batch: upload.batch, line: number, custom_id };
            accept(&app, &upload, member, payload, memory).await
        }
        Err(problem) => {
            drop(memory);
            Err(problem)
        }
    };
    let outcome = match outcome {
        Err(problem) => {
            // The name stands for the line that came first.
            let name = custom_id.as_deref().filter(|_| !is_repeated);
            refuse(&app, &upload, number, name, problem).await
        }
        accepted => accepted,
    };
    Answered { number, custom_id, outcome, bytes: length }
}

/// The answer to a line that is refused, when that is in the audit trail, and among the batch's errors if it is for good.
async fn refuse(
    app: &App,
    upload: &Upload,
    number: usize,
    name: Option<&str>,
    problem: Problem,
) -> Result<JobId, Problem> {
    refused_part(app, upload.who, upload.client, Some(upload.batch), number, problem.code()).await?;
    // An upload that is too long is no fault of a line.
    if problem.retry() == Retry::Never && !problem.is(Code::BatchTooLong) {
        app.store.refuse_line(upload.client, upload.batch, number, name, &problem.to_json()).await?;
    }
    Err(problem)
}

fn digest(name: &str) -> u128 {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, name.as_bytes());
    digest.as_ref().iter().take(16).fold(0, |number, byte| number << 8 | u128::from(*byte))
}

async fn accept(
    app: &Arc<App>,
    upload: &Upload,
    member: Member,
    payload: dermflow_schemas::envelope::Payload,
    memory: Memory,
) -> Result<JobId, Problem> {
    let custom_id = member.custom_id.clone();
    let submission = Submission {
        client: upload.client,
        who: upload.who,
        lane: Lane::Bulk,
        key: Some(line_key(upload.batch, &custom_id)),
        payload,
        cancel_after: upload.cancel_after,
        member: Some(member),
        patience: UPLOAD_PATIENCE,
        memory,
    };
    let submitted = submit(app.clone(), submission).await?;
    if upload.mending {
        app.store.admit_line(upload.batch, &custom_id).await?;
    }
    Ok(submitted.job)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn of_lines_with_one_name_the_first_has_it_whichever_is_read_first() {
        let (seen, mut last) = (Arc::default(), oneshot::channel().1);
        let mut turn = || {
            let (end, ended) = oneshot::channel();
            Turn { before: std::mem::replace(&mut last, ended), seen: Arc::clone(&seen), _end: end }
        };
        let [first, nameless, other, second] = [turn(), turn(), turn(), turn()];
        let mut second = Box::pin(second.repeats(Some("a")));
        assert_eq!(second.as_mut().now_or_never(), None);
        assert_eq!(first.repeats(Some("a")).now_or_never(), Some(false));
        assert_eq!(second.as_mut().now_or_never(), None, "the line before it has not told");
        assert_eq!(nameless.repeats(None).now_or_never(), Some(false));
        assert_eq!(other.repeats(Some("b")).now_or_never(), Some(false));
        assert_eq!(second.now_or_never(), Some(true));
    }
}
