//! An upload to a batch: a body of lines that is read while its answer is written.
//!
//! A line is answered when its job is on disk. What an upload has in hand is bounded; beyond that the body is not
//! read, and the sender's socket waits. So it is when the client's quota or the queue is full, for a while.

use std::{
    collections::HashSet,
    convert::Infallible,
    future::pending,
    pin::pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
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
        UPLOAD_LINES, UPLOAD_PATIENCE, UPLOAD_SHOWN, UPLOAD_SILENCE,
    },
};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
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
    submit::{Patience, Submission, Submitted, blocking, submit},
};

/// The media type of answers.
pub(crate) const NDJSON: &str = "application/x-ndjson";

/// Who uploads what.
#[derive(Debug)]
pub(crate) struct Upload {
    pub(crate) id: Uuid,
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
    /// Cancelled when no line is to be taken any more: the server stops, or the caller may not go on.
    pub(crate) over: CancellationToken,
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
    /// No upload to the batch had brought the line before.
    is_new: bool,
    /// When it came.
    came: OffsetDateTime,
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
    /// When the last line came that no other upload had brought.
    heard: OffsetDateTime,
    /// Nobody reads the answers, or the sender is gone.
    is_gone: bool,
    running: JoinSet<Answered>,
    /// Why the caller may not go on.
    shut_out: Arc<OnceLock<Problem>>,
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
        shut_out: Arc::default(),
    };
    uploading.run(lines).await;
}

/// What happens to an upload.
enum Event {
    /// No line is to be taken any more.
    Over,
    Answered(Option<Answered>),
}

/// The upload cannot go on: nobody reads the answers, or the sender is gone.
struct Gone;

impl Uploading {
    async fn run(mut self, mut lines: Lines) {
        let (app, upload, shut_out) = (self.app.clone(), self.upload.clone(), self.shut_out.clone());
        let (id, batch) = (upload.id, upload.batch);
        let standing = async {
            let why = ends(&app, &upload).await;
            let _ = shut_out.set(why);
            upload.over.cancel();
            pending().await
        };
        let complete = tokio::select! {
            complete = self.take_in(&mut lines) => complete,
            never = standing => match never {},
        };
        // However it ended: the batch does not wait for it any more.
        let now = clock::now();
        let since = if self.is_gone { self.heard } else { now };
        let ended = app.store.end_upload(id, complete, since, now).await;
        let complete = complete && ended.is_ok();
        let Counts { lines: count, accepted, refused } = self.counts;
        tracing::info!(%batch, lines = count, accepted, refused, complete, "upload");
        let mut last = json!({"batch": batch, "lines": count, "accepted": accepted, "refused": refused,
                              "complete": complete});
        if let Some(problem) = shut_out.get() {
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
        complete && self.shut_out.get().is_none()
    }

    /// Reads to the end; `false` when the server cannot go on, or the caller may not.
    async fn read(&mut self, lines: &mut Lines) -> Result<bool, Gone> {
        loop {
            while !self.has_room() {
                let event = self.event().await;
                if !self.goes_on(event).await? {
                    return Ok(false);
                }
            }
            // Kept while other things happen: it has its place in line for memory, and its sender a time to be heard from.
            let mut next = pin!(lines.next());
            let next = loop {
                let event = tokio::select! {
                    biased;
                    event = self.event() => event,
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
    async fn event(&mut self) -> Event {
        tokio::select! {
            biased;
            () = self.upload.over.cancelled() => Event::Over,
            Some(answered) = self.running.join_next() => Event::Answered(answered.ok()),
        }
    }

    /// `false` when this was the end.
    async fn goes_on(&mut self, event: Event) -> Result<bool, Gone> {
        match event {
            Event::Over => Ok(false),
            Event::Answered(answered) => self.answered(answered).await,
        }
    }

    /// Takes a line in hand; `false` when it is one too many.
    fn take(&mut self, next: Next) -> bool {
        self.counts.lines += 1;
        let (came, over) = (clock::now(), self.counts.lines > MAX_BATCH_LINES);
        match next {
            Next::Line { number, bytes, memory } if !over => {
                self.in_hand += bytes.len();
                let (app, upload, seen) = (self.app.clone(), self.upload.clone(), self.seen.clone());
                let (end, ended) = oneshot::channel();
                let turn = Turn { before: std::mem::replace(&mut self.last_turn, ended), seen, _end: end };
                let taken = Taken { number, came, bytes, memory };
                self.running.spawn(line(app, upload, turn, taken));
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
                    let (problem, is_new) = refuse(&app, &upload, number, None, error.into()).await;
                    Answered { number, custom_id: None, outcome: Err(problem), is_new, came, bytes: 0 }
                });
                !over
            }
            Next::End => true,
        }
    }

    /// Tells what became of a line; `false` when others would fare no better.
    async fn answered(&mut self, answered: Option<Answered>) -> Result<bool, Gone> {
        let Some(Answered { number, custom_id, outcome, is_new, came, bytes }) = answered else {
            return Ok(false);
        };
        self.in_hand -= bytes;
        if is_new {
            self.heard = self.heard.max(came);
        }
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

/// Shows all replicas that an upload goes on, until it may not: its caller is shut out, or its batch is deleted.
async fn ends(app: &App, upload: &Upload) -> Problem {
    let every = |period| {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    let (mut look, mut show) = (every(ACCESS_INTERVAL), every(UPLOAD_SHOWN));
    loop {
        tokio::select! {
            _ = look.tick() => {
                if let Err(problem) = upload.pass.check(app).await {
                    return problem;
                }
            }
            _ = show.tick() => match app.store.upload_seen(upload.id, upload.batch, clock::now()).await {
                Ok(true) => {}
                Ok(false) => return Code::NotFound.into(),
                Err(error) => tracing::debug!(upload = %upload.id, %error, "an upload goes on, which nobody sees"),
            },
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

/// A line in hand, with what accounts for its memory.
struct Taken {
    number: usize,
    came: OffsetDateTime,
    bytes: Bytes,
    memory: Memory,
}

async fn line(app: Arc<App>, upload: Arc<Upload>, turn: Turn, taken: Taken) -> Answered {
    let Taken { number, came, bytes, memory } = taken;
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
    let (outcome, is_new) = match outcome {
        Ok(Submitted { job, is_new, .. }) => (Ok(job), is_new),
        Err(problem) => {
            // The name stands for the line that came first.
            let name = custom_id.as_deref().filter(|_| !is_repeated);
            let (problem, is_new) = refuse(&app, &upload, number, name, problem).await;
            (Err(problem), is_new)
        }
    };
    Answered { number, custom_id, outcome, is_new, came, bytes: length }
}

/// The answer to a line that is refused, when that is in the audit trail, and among the batch's errors if it is for good; and
/// whether no upload has had that answer for it before.
async fn refuse(
    app: &App,
    upload: &Upload,
    number: usize,
    name: Option<&str>,
    problem: Problem,
) -> (Problem, bool) {
    let noted = async {
        refused_part(app, upload.who, upload.client, Some(upload.batch), number, problem.code()).await?;
        // An upload that is too long is no fault of a line.
        if problem.retry() != Retry::Never || problem.is(Code::BatchTooLong) {
            return Ok::<_, Problem>(false);
        }
        Ok(app.store.refuse_line(upload.client, upload.batch, number, name, &problem.to_json()).await?)
    };
    match noted.await {
        Ok(is_new) => (problem, is_new),
        Err(failed) => (failed, false),
    }
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
) -> Result<Submitted, Problem> {
    let custom_id = member.custom_id.clone();
    let submission = Submission {
        client: upload.client,
        who: upload.who,
        lane: Lane::Bulk,
        key: Some(line_key(upload.batch, &custom_id)),
        payload,
        cancel_after: upload.cancel_after,
        member: Some(member),
        patience: Patience { end: Instant::now() + UPLOAD_PATIENCE, over: upload.over.clone() },
        memory,
    };
    let submitted = submit(app.clone(), submission).await?;
    if upload.mending {
        app.store.admit_line(upload.batch, &custom_id).await?;
    }
    Ok(submitted)
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
