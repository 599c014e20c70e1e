//! The loop that gives executors work: asks for a job only when an executor is free, and drains at the end.

use std::{
    future::ready,
    hash::{BuildHasher, RandomState},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use async_nats::jetstream::{AckKind, Message};
use dermflow_schemas::{
    id::ClientId,
    job::Lane,
    limits::{ASK_AHEAD, BULK_RETRY, BULK_RETRY_MAX, PULL_ANSWER, PULL_EXPIRES},
    queue,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    attempt::Attempts,
    executor::{Executors, Slot, Turn},
    pull::{Answer, Patience, Pull},
    schedule::{LINES, Line, Schedule, Source},
    watch::{News, Watch},
};

/// How long an open request may still bring a job: with a broker that is gone, it never ends.
pub(crate) const LAST_ANSWER: Duration = PULL_EXPIRES.saturating_add(PULL_ANSWER);

/// How the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// It was told to stop, and every job is finished.
    Drained,
    /// It was told to stop, and some jobs did not finish within the grace; they will be redelivered.
    CutOff,
    /// An executor hung: the process must be started anew.
    Hung,
}

impl End {
    /// Of a loop in which an executor `hung` or none, and which `drained` within the grace or not.
    pub(crate) fn of(hung: bool, drained: bool) -> Self {
        match (hung, drained) {
            (true, _) => Self::Hung,
            (false, true) => Self::Drained,
            (false, false) => Self::CutOff,
        }
    }
}

/// Every line, and what runs.
pub struct Consumer {
    /// In the order of [`LINES`].
    pulls: [Pull; LINES.len()],
    watch: Watch,
    schedule: Schedule,
    executors: Executors,
    attempts: Arc<Attempts>,
    /// Jobs that are delivered and not yet acked, plus requests that may deliver one: never more than one above
    /// the number of executors, so that one can be published while the next one runs.
    places: Arc<Semaphore>,
    /// The executor that the next job will run on.
    slot: Option<Slot>,
    /// Attempts; of a bulk job with its client.
    running: JoinSet<Option<ClientId>>,
    /// When to ask clients that are held again, while there is nothing else to do, and how long after that.
    retry: (Instant, Duration),
}

impl Consumer {
    /// A loop over the lines, in the order of [`LINES`], with `count` executors.
    pub fn new(
        pulls: [Pull; LINES.len()],
        watch: Watch,
        executors: Executors,
        count: NonZeroUsize,
        attempts: Arc<Attempts>,
    ) -> Self {
        Self {
            pulls,
            watch,
            schedule: Schedule::new(RandomState::new().hash_one(std::process::id())),
            executors,
            attempts,
            places: Arc::new(Semaphore::new(count.get() + 1)),
            slot: None,
            running: JoinSet::new(),
            retry: (Instant::now(), BULK_RETRY),
        }
    }

    /// Runs until `stop` is cancelled or an executor hangs, then finishes what is delivered, within `grace`.
    pub async fn run(mut self, stop: CancellationToken, grace: Duration) -> End {
        let hung = self.executors.hung().clone();
        while !stop.is_cancelled() && !hung.is_cancelled() {
            self.ask().await;
            tokio::select! {
                () = stop.cancelled() => {}
                () = hung.cancelled() => {}
                slot = self.executors.slot(), if self.slot.is_none() => self.slot = slot,
                () = self.executors.soon_free(ASK_AHEAD), if !self.executors.is_soon_free(ASK_AHEAD) => {}
                Some(ended) = self.running.join_next() => self.ended(ended),
                news = self.watch.next() => self.learn(news),
                answer = next(&mut self.pulls) => self.heard(answer).await,
                () = sleep_until(self.retry.0), if self.slot.is_some() && self.schedule.only_held() => self.retry(),
            }
        }
        tracing::info!(jobs = self.running.len(), "draining");
        // What waits for an executor in hand gets it.
        self.slot = None;
        let drained = timeout(grace, self.drain()).await.is_ok();
        End::of(hung.is_cancelled(), drained)
    }

    /// Makes the request that the executor allows which is free, or soon will be: one source after the other without
    /// waiting, and when nobody has anything, the interactive line with waiting, which leaves a place for what the
    /// others report. Only with an executor in hand, as else another worker would serve who comes then sooner.
    async fn ask(&mut self) {
        if !self.may_ask() || self.pulls.iter().any(Pull::answers_now) {
            return;
        }
        let pulls = &self.pulls;
        match self.schedule.next(|line| pulls[line as usize].is_ready()) {
            Some(source) => self.ask_source(source, Patience::Now).await,
            None if self.slot.is_some() && self.pull(Line::Interactive).is_ready() => {
                self.ask_source(Source::Interactive, Patience::Wait).await;
            }
            None => {}
        }
    }

    fn may_ask(&self) -> bool {
        let ahead = || self.executors.is_soon_free(ASK_AHEAD) && !self.attempts.quarantine.is_taken();
        self.slot.is_some() || ahead()
    }

    async fn ask_source(&mut self, source: Source, patience: Patience) {
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            self.schedule.asked(source);
            self.pull(source.line()).ask(source, patience, place).await;
        }
    }

    fn learn(&mut self, news: News) {
        match news {
            News::Woken(client) => self.schedule.wake(client),
            News::Look(clients) => {
                if let Some(clients) = clients {
                    self.schedule.look_at(&clients);
                }
                self.schedule.look(Line::Due);
            }
        }
    }

    fn retry(&mut self) {
        self.schedule.retry();
        self.retry.1 = (2 * self.retry.1).min(BULK_RETRY_MAX);
    }

    fn ended(&mut self, ended: Result<Option<ClientId>, JoinError>) {
        match ended {
            Ok(Some(client)) => self.schedule.ended(client),
            Ok(None) => {}
            // An attempt that panicked outside an executor leaves its job to redelivery.
            Err(error) => tracing::error!(%error, "an attempt panicked"),
        }
    }

    fn pull(&mut self, line: Line) -> &mut Pull {
        &mut self.pulls[line as usize]
    }

    async fn heard(&mut self, answer: Answer) {
        match answer {
            Answer::Nothing(source) => {
                let was_held = self.schedule.only_held();
                self.schedule.nothing(source);
                // From the first one on: other answers do not put it off.
                if !was_held && self.schedule.only_held() {
                    self.retry.0 = Instant::now() + self.retry.1;
                }
            }
            Answer::Mended(line) => self.schedule.look(line),
            Answer::Job(message, place) => {
                let source = self.note(&message);
                self.retry.1 = BULK_RETRY;
                match place.or_else(|| self.places.clone().try_acquire_owned().ok()) {
                    Some(place) => self.start(*message, source, place),
                    None => give_back(&message).await,
                }
            }
        }
    }

    /// Tells the schedule of a job, and returns where it came from.
    fn note(&mut self, message: &Message) -> Source {
        let (source, more) = match message.info() {
            Ok(info) if info.stream == queue::RETRIES => (Source::Due, false),
            Ok(info) => match queue::bulk_client(&message.subject) {
                Some(client) => (Source::Bulk(client), info.pending > 0),
                None => (Source::Interactive, false),
            },
            Err(_) => (Source::Interactive, false),
        };
        let weight = message.headers.as_ref().and_then(|headers| headers.get(queue::WEIGHT));
        let weight = weight.and_then(|weight| weight.as_str().parse().ok()).unwrap_or(1);
        self.schedule.took(source, weight, more);
        source
    }

    /// Starts an attempt: who waits for it gets a reserved executor, if one is free. Without an executor in hand it waits for
    /// one, kept alive meanwhile: in the queue before this loop, which would otherwise get the next executor for a job that is not here yet, and might wait for that with
    /// the executor in hand.
    fn start(&mut self, message: Message, source: Source, place: OwnedSemaphorePermit) {
        let attempts = self.attempts.clone();
        let lane = if source == Source::Interactive { Lane::Interactive } else { Lane::Bulk };
        let reserved = if lane == Lane::Interactive { self.executors.reserved_now() } else { None };
        let turn: Turn = match reserved.or_else(|| self.slot.take()) {
            Some(slot) => Box::pin(ready(Some(slot))),
            None => self.executors.turn(lane),
        };
        let client = match source {
            Source::Bulk(client) => Some(client),
            Source::Interactive | Source::Due => None,
        };
        self.running.spawn(async move {
            attempts.run(&message, turn).await;
            drop(place);
            client
        });
    }

    /// Takes what open requests still deliver, and waits for what runs.
    async fn drain(&mut self) {
        while self.pulls.iter().any(Pull::is_asked) {
            let Ok(answer) = timeout(LAST_ANSWER, next(&mut self.pulls)).await else { break };
            self.heard(answer).await;
        }
        while let Some(ended) = self.running.join_next().await {
            self.ended(ended);
        }
    }
}

async fn next([first, second, third]: &mut [Pull; LINES.len()]) -> Answer {
    tokio::select! {
        answer = first.answer() => answer,
        answer = second.answer() => answer,
        answer = third.answer() => answer,
    }
}

/// A job that nobody asked for and that there is no room for: another worker shall have it, now.
async fn give_back(message: &Message) {
    if let Err(error) = message.ack_with(AckKind::Nak(None)).await {
        tracing::warn!(%error, "a job could not be given back; it waits for redelivery");
    }
}
