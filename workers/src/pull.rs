//! One line to the broker: asks one of its sources for one job at a time, and never loses an answer.
//!
//! The inbox lives as long as the process. A client library's `fetch` gives every request an inbox of its own;
//! a job that arrives in one that was just dropped is redelivered only after the ack wait.

use async_nats::{
    Client, Message as Raw, StatusCode, Subscriber,
    jetstream::{
        Context, Message,
        consumer::{PullConsumer, pull::BatchConfig},
    },
};
use dermflow_schemas::{
    limits::{BROKER_PAUSE, BULK_MOMENT, PULL_ANSWER, PULL_EXPIRES},
    queue,
};
use futures_util::StreamExt;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

use crate::schedule::{Line, Source};

/// How long the broker may take to answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// It answers at once, with a job or without; for a client's bulk jobs within [`BULK_MOMENT`].
    Now,
    /// It may wait [`PULL_EXPIRES`] for a job to come in.
    Wait,
}

/// What came back.
pub enum Answer {
    /// A job. It takes the place that was reserved for it, or has none when nobody asked (any more).
    Job(Box<Message>, Option<OwnedSemaphorePermit>),
    /// The source had none, now or within the wait that it was asked with.
    Nothing(Source),
    /// The line had trouble, which is over.
    Mended(Line),
}

enum State {
    Ready,
    Asked {
        source: Source,
        patience: Patience,
        overdue: Instant,
        place: OwnedSemaphorePermit,
    },
    /// The broker refused, lost the request, or is away: a task ends when it is worth asking again.
    Mending(AbortOnDropHandle<()>),
}

/// One line. Dropping it drops the inbox: [`Self::is_asked`] tells whether a job may still arrive.
pub struct Pull {
    line: Line,
    client: Client,
    context: Context,
    inbox: String,
    answers: Subscriber,
    /// Of the current request; the last token of its reply subject.
    number: u64,
    state: State,
}

impl Pull {
    /// Opens the inbox of a line.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn open(client: &Client, context: Context, line: Line) -> Result<Self, async_nats::Error> {
        let inbox = client.new_inbox();
        let answers = client.subscribe(format!("{inbox}.*")).await?;
        Ok(Self { line, client: client.clone(), context, inbox, answers, number: 0, state: State::Ready })
    }

    /// Whether a request may be made: none is open, and there is no trouble.
    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready)
    }

    /// Whether a request is open, so that a job may arrive.
    pub fn is_asked(&self) -> bool {
        matches!(self.state, State::Asked { .. })
    }

    /// Whether the answer to an open request is due at once.
    pub fn answers_now(&self) -> bool {
        matches!(self.state, State::Asked { patience: Patience::Now, .. })
    }

    /// Asks `source`, which is of this line, for one job, which will take `place`.
    pub async fn ask(&mut self, source: Source, patience: Patience, place: OwnedSemaphorePermit) {
        self.number += 1;
        let (no_wait, expires) = match (patience, source) {
            (Patience::Now, Source::Bulk(_)) => (true, Some(BULK_MOMENT)),
            (Patience::Now, _) => (true, None),
            (Patience::Wait, _) => (false, Some(PULL_EXPIRES)),
        };
        let request = BatchConfig { batch: 1, no_wait, expires, ..BatchConfig::default() };
        let request = serde_json::to_vec(&request).unwrap_or_default();
        let subject = queue::next_subject(source.stream(), &source.consumer());
        let reply = format!("{}.{}", self.inbox, self.number);
        if let Err(error) = self.client.publish_with_reply(subject, reply, request.into()).await {
            return self.mend(&error.to_string());
        }
        let overdue = Instant::now() + expires.unwrap_or_default() + PULL_ANSWER;
        self.state = State::Asked { source, patience, overdue, place };
    }

    /// Waits for the next answer. Cancel safe.
    pub async fn answer(&mut self) -> Answer {
        loop {
            tokio::select! {
                biased;
                Some(message) = self.answers.next() => {
                    if let Some(answer) = self.heard(message) {
                        return answer;
                    }
                }
                step = progress(&mut self.state) => match step {
                    Step::Overdue => self.mend("the answer is overdue"),
                    Step::Mended => {
                        tracing::info!(line = ?self.line, "asking for jobs again");
                        self.state = State::Ready;
                        return Answer::Mended(self.line);
                    }
                },
            }
        }
    }

    /// What a message in the inbox means; `None` when nothing follows from it.
    fn heard(&mut self, message: Raw) -> Option<Answer> {
        let Some(status) = message.status.filter(|status| *status != StatusCode::OK) else {
            let place = match std::mem::replace(&mut self.state, State::Ready) {
                State::Asked { place, .. } => Some(place),
                other => {
                    self.state = other;
                    None
                }
            };
            let message = Message { message, context: self.context.clone() };
            return Some(Answer::Job(Box::new(message), place));
        };
        let current = message.subject.rsplit('.').next() == Some(self.number.to_string().as_str());
        let State::Asked { source, .. } = self.state else { return None };
        if !current || status == StatusCode::IDLE_HEARTBEAT {
            return None;
        }
        if status == StatusCode::NOT_FOUND || status == StatusCode::TIMEOUT || passes(source, status) {
            self.state = State::Ready;
            return Some(Answer::Nothing(source));
        }
        self.mend(&format!("{status} {}", message.description.unwrap_or_default()));
        None
    }

    fn mend(&mut self, reason: &str) {
        let line = self.line;
        tracing::warn!(?line, reason, "the broker has no answer");
        let context = self.context.clone();
        self.state = State::Mending(AbortOnDropHandle::new(tokio::spawn(async move {
            sleep(BROKER_PAUSE).await;
            match line {
                Line::Interactive => drop(find(context, Source::Interactive).await),
                Line::Due => drop(find(context, Source::Due).await),
                // Any client's consumer may be gone; another one's is asked then.
                Line::Bulk => {}
            }
        })));
    }
}

/// Whether an answer only says that a client's consumer is not there: the broker forgets those that are idle.
fn passes(source: Source, status: StatusCode) -> bool {
    matches!(source, Source::Bulk(_))
        && (status == StatusCode::NO_RESPONDERS || status == StatusCode::REQUEST_TERMINATED)
}

enum Step {
    Overdue,
    Mended,
}

/// Waits until the state changes of itself; for ever when it does not.
async fn progress(state: &mut State) -> Step {
    match state {
        State::Ready => std::future::pending().await,
        State::Asked { overdue, .. } => {
            sleep_until(*overdue).await;
            Step::Overdue
        }
        State::Mending(task) => match task.await {
            Ok(()) => Step::Mended,
            Err(_) => std::future::pending().await,
        },
    }
}

/// Looks for a consumer until it is there. One that was deleted is created again by ingress.
pub async fn find(context: Context, source: Source) -> Box<PullConsumer> {
    let (stream, name) = (source.stream(), source.consumer());
    let mut known = String::new();
    loop {
        let reason = match timeout(PULL_ANSWER, queue::bind(&context, stream, &name)).await {
            Ok(Ok(consumer)) => return Box::new(consumer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_owned(),
        };
        if reason != known {
            tracing::warn!(line = name, reason, "the line's consumer cannot be reached; trying on");
            known = reason;
        }
        sleep(BROKER_PAUSE).await;
    }
}
