//! One connection of a submission: uploads, one after the other, whose answers are read while they are sent.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http_body::Frame;
use http_body_util::StreamBody;
use reqwest::{Body, Method, Response, header};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{Mutex as AsyncMutex, MutexGuard as AsyncGuard, Semaphore, mpsc},
    task::spawn_blocking,
    time::{Instant, timeout},
};
use uuid::Uuid;

use crate::{
    Failure, Stop,
    access::{ANSWER_WITHIN, Api, Trouble},
    inputs::Inputs,
    line,
    ndjson::Lines,
    pace::Patience,
    work::Work,
};

/// Lines of one upload, a fifth of what the server takes: what a cut costs stays small.
const UPLOAD_LINES: u64 = 10_000;
/// The time of one upload: a token that was fresh enough to begin with outlives it.
const UPLOAD_FOR: Duration = Duration::from_mins(2);
/// How long an upload is kept open for files that may still come back from other connections.
const IDLE: Duration = Duration::from_secs(1);
/// Between two looks at whether an upload still moves.
const LOOK: Duration = Duration::from_secs(5);
/// Bytes of one piece of a line: each piece that goes out shows that the upload moves.
const PIECE: usize = 256 * 1024;

/// What all connections of one submission work with.
#[derive(Debug)]
pub(crate) struct Uploader<'a> {
    pub(crate) api: &'a Api,
    pub(crate) work: &'a Work,
    pub(crate) patience: &'a Patience,
    pub(crate) inputs: Arc<Inputs>,
    pub(crate) subject: Option<Arc<str>>,
    /// Files that one upload has sent and the server has not answered yet.
    pub(crate) in_flight: usize,
    /// How long the server took to accept each file that this run sent, and when it had.
    pub(crate) accepted: Mutex<Vec<(Duration, Instant)>>,
    /// Held by the connection that has the batch made.
    pub(crate) opening: AsyncMutex<()>,
}

/// A line of the answer.
#[derive(Debug, Deserialize)]
struct Answer {
    batch: Option<Uuid>,
    line: Option<u64>,
    job: Option<String>,
    error: Option<Value>,
    complete: Option<bool>,
}

impl Uploader<'_> {
    /// Uploads until every file is accepted or refused for good.
    ///
    /// # Errors
    /// When going on makes no sense.
    pub(crate) async fn run(&self) -> Result<(), Failure> {
        let mut step = 0;
        while let Some(first) = self.work.take(None).await {
            let flight = Flight::new(self.work, first, self.in_flight);
            let outcome = self.upload(first, &flight).await;
            if flight.answered() {
                step = 0;
            }
            drop(flight);
            match outcome {
                Ok(()) => self.patience.alive(),
                Err(Stop::Failure(failure)) => return Err(failure),
                Err(Stop::Trouble(trouble)) => {
                    step += 1;
                    self.patience.rest(trouble, step, &self.work.counters).await?;
                }
            }
        }
        Ok(())
    }

    /// Tells the server that the batch is whole, if no upload of ours has: the last one may have been cut after its
    /// last line.
    ///
    /// # Errors
    /// When going on makes no sense.
    pub(crate) async fn close(&self) -> Result<(), Failure> {
        let mut step = 0;
        while let Some(batch) = self.work.batch() {
            match self.close_once(batch).await {
                Ok(()) => break,
                Err(trouble) => {
                    step += 1;
                    self.patience.rest(trouble, step, &self.work.counters).await?;
                }
            }
        }
        Ok(())
    }

    async fn close_once(&self, batch: Uuid) -> Result<(), Trouble> {
        let path = format!("/batches/{batch}");
        if self.api.get_once(&path).await?["status"] != "uploading" {
            return Ok(());
        }
        let response = self.api.send(Method::POST, &path, |request| {
            request.header(header::CONTENT_TYPE, self.inputs.media_type).body("")
        });
        let mut lines = Lines::new(response.await?);
        while let Some(line) = lines.next_soon().await? {
            if parse(line)?.complete == Some(true) {
                return Ok(());
            }
        }
        Err(Trouble::Again(None, "the upload was cut".into()))
    }

    async fn upload(&self, first: usize, flight: &Flight<'_>) -> Result<(), Stop> {
        let opening = self.opening().await;
        let (response, sender) = self.begin().await?;
        let mut lines = Lines::new(response);
        // Nothing is sent before the batch's name has come and is on disk.
        let batch = match lines.next_soon().await? {
            Some(line) => parse(line)?.batch,
            None => None,
        };
        let batch = batch.ok_or_else(|| Trouble::Final(None, "the server did not name the batch".into()))?;
        self.work.named(batch)?;
        drop(opening);
        self.patience.alive();
        self.work.counters.say("");
        let mut reading = std::pin::pin!(self.read(&mut lines, flight));
        tokio::select! {
            biased;
            read = &mut reading => return read,
            fed = self.feed(first, sender, flight) => fed?,
        }
        reading.await
    }

    /// The right to have the batch made; `None` when that is done.
    async fn opening(&self) -> Option<AsyncGuard<'_, ()>> {
        if self.work.batch().is_some() {
            return None;
        }
        let guard = self.opening.lock().await;
        self.work.batch().is_none().then_some(guard)
    }

    async fn begin(&self) -> Result<(Response, mpsc::Sender<Piece>), Stop> {
        let batch = self.work.batch();
        let path = batch.map_or("/batches".into(), |id| format!("/batches/{id}"));
        let mut sender = None;
        let response = self.api.send(Method::POST, &path, |mut request| {
            let (sending, receiving) = mpsc::channel(1);
            sender = Some(sending);
            if batch.is_none() {
                request = request.header("idempotency-key", self.work.key().to_string());
            }
            request
                .header(header::CONTENT_TYPE, self.inputs.media_type)
                .header(header::ACCEPT, "application/x-ndjson")
                .body(body(receiving))
        });
        let response = response.await?;
        let sender = sender.ok_or_else(|| Trouble::Again(None, "the upload was never begun".into()))?;
        Ok((response, sender))
    }

    /// Sends lines until there are no more, or enough.
    async fn feed(
        &self,
        first: usize,
        sender: mpsc::Sender<Piece>,
        flight: &Flight<'_>,
    ) -> Result<(), Failure> {
        let (begin, mut next, mut number) = (Instant::now(), Some(first), 0);
        while let Some(item) = next {
            match self.line(item).await {
                Ok(line) => {
                    number += 1;
                    flight.sent(number, item);
                    if !send(&sender, line, flight).await {
                        // The reader learns why.
                        return Ok(());
                    }
                }
                Err((code, title)) => {
                    self.work.refused(item, &json!({ "code": code, "title": title, "retry": "never" }))?;
                    flight.dropped(item);
                }
            }
            next = None;
            flight.room().await;
            if number < UPLOAD_LINES && begin.elapsed() < UPLOAD_FOR {
                next = self.work.take(Some(Instant::now() + IDLE)).await;
            }
            // A file that was in this upload already would be a repetition in it.
            next = next.filter(|item| flight.prepare(*item));
        }
        let _ = sender.send(Piece::End).await;
        Ok(())
    }

    async fn line(&self, item: usize) -> Result<Bytes, line::Unsendable> {
        let (inputs, subject) = (self.inputs.clone(), self.subject.clone());
        let built = spawn_blocking(move || line::build(&inputs.items[item], subject.as_deref())).await;
        let line = built.unwrap_or_else(|error| Err(("file-unreadable", error.to_string())))?;
        self.work.counters.bytes.add(line.len() as u64);
        Ok(line)
    }

    async fn read(&self, lines: &mut Lines, flight: &Flight<'_>) -> Result<(), Stop> {
        loop {
            let answer = match timeout(LOOK, lines.next()).await {
                Err(_) if flight.silent() < ANSWER_WITHIN => continue,
                Err(_) => return Err(Trouble::Again(None, "the upload does not move".into()).into()),
                Ok(line) => match line? {
                    Some(line) => parse(line)?,
                    None => return Err(Trouble::Again(None, "the upload was cut".into()).into()),
                },
            };
            flight.moved();
            match answer {
                Answer { complete: Some(true), .. } => return Ok(()),
                Answer { complete: Some(false), .. } => {
                    return Err(Trouble::Again(None, "the server ended the upload".into()).into());
                }
                Answer { line: Some(number), job, error, .. } => {
                    self.patience.alive();
                    if let Some((item, sent)) = flight.answer(number) {
                        if error.is_none() {
                            let now = Instant::now();
                            let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
                            accepted.push((now - sent, now));
                        }
                        self.settle(item, job, error)?;
                    }
                }
                Answer { .. } => {}
            }
        }
    }

    /// The server's word on one file.
    fn settle(&self, item: usize, job: Option<String>, error: Option<Value>) -> Result<(), Failure> {
        let Some(error) = error else { return self.work.accepted(item, job) };
        if !matches!(error["retry"].as_str(), Some("safe" | "same-key")) {
            return self.work.refused(item, &error);
        }
        let after = error["retry_after"].as_u64().map(Duration::from_secs);
        self.work.counters.say(error["title"].as_str().unwrap_or("the server asks to wait"));
        self.work.again(item, after);
        Ok(())
    }
}

fn parse(line: &[u8]) -> Result<Answer, Trouble> {
    let what = |error| Trouble::Final(None, format!("the server's answer cannot be read: {error}"));
    serde_json::from_slice(line).map_err(what)
}

/// Sends a line in pieces; false when nobody takes it any more.
async fn send(sender: &mpsc::Sender<Piece>, mut line: Bytes, flight: &Flight<'_>) -> bool {
    while !line.is_empty() {
        let piece = line.split_to(line.len().min(PIECE));
        if sender.send(Piece::Data(piece)).await.is_err() {
            return false;
        }
        flight.moved();
    }
    true
}

/// A piece of an upload.
#[derive(Debug)]
enum Piece {
    Data(Bytes),
    /// The upload is whole. Without it, the connection is cut: half a line must not look like the last one.
    End,
}

fn body(receiver: mpsc::Receiver<Piece>) -> Body {
    let frames = stream::unfold(Some(receiver), async |receiver| {
        let mut receiver = receiver?;
        match receiver.recv().await {
            Some(Piece::Data(data)) => Some((Ok(Frame::data(data)), Some(receiver))),
            Some(Piece::End) => None,
            None => Some((Err(io::Error::other("the upload was abandoned")), None)),
        }
    });
    Body::wrap(StreamBody::new(frames))
}

/// The files of one upload whose outcome is unknown. Dropping it gives them back.
#[derive(Debug)]
struct Flight<'a> {
    work: &'a Work,
    held: Mutex<Held>,
    /// One for each file that may be sent before another answer.
    room: Semaphore,
}

#[derive(Debug)]
struct Held {
    /// Taken from the queue and not sent yet.
    preparing: Option<usize>,
    /// By line, sent and not answered yet, and since when.
    sent: HashMap<u64, (usize, Instant)>,
    /// All that ever were in this upload.
    seen: HashSet<usize>,
    answered: bool,
    moved: Instant,
}

impl<'a> Flight<'a> {
    fn new(work: &'a Work, first: usize, in_flight: usize) -> Self {
        let held = Held {
            preparing: Some(first),
            sent: HashMap::new(),
            seen: [first].into(),
            answered: false,
            moved: Instant::now(),
        };
        Self { work, held: Mutex::new(held), room: Semaphore::new(in_flight.saturating_sub(1)) }
    }

    /// Takes charge of a file; false when it was in this upload before, and is given back at once.
    fn prepare(&self, item: usize) -> bool {
        let mut held = self.held();
        let new = held.seen.insert(item);
        if new {
            held.preparing = Some(item);
        } else {
            self.work.give_back([item]);
        }
        new
    }

    fn sent(&self, number: u64, item: usize) {
        let mut held = self.held();
        held.preparing = None;
        held.sent.insert(number, (item, Instant::now()));
    }

    /// Waits until another file may be sent.
    async fn room(&self) {
        if let Ok(room) = self.room.acquire().await {
            room.forget();
        }
    }

    fn dropped(&self, item: usize) {
        let mut held = self.held();
        held.preparing = held.preparing.filter(|known| *known != item);
        self.room.add_permits(1);
    }

    /// The file of a line that is answered, and when it was sent.
    fn answer(&self, number: u64) -> Option<(usize, Instant)> {
        let mut held = self.held();
        held.answered = true;
        let sent = held.sent.remove(&number)?;
        self.room.add_permits(1);
        Some(sent)
    }

    fn answered(&self) -> bool {
        self.held().answered
    }

    fn moved(&self) {
        self.held().moved = Instant::now();
    }

    fn silent(&self) -> Duration {
        self.held().moved.elapsed()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.work
            .give_back(held.preparing.take().into_iter().chain(held.sent.drain().map(|(_, (item, _))| item)));
    }
}
