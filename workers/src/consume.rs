//! The loop that gives executors work: asks for a job only when an executor is free, and drains at the end.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use async_nats::jetstream::{AckKind, Message};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    attempt::Attempts,
    executor::{Executors, Slot},
    pull::{Answer, Patience, Pull},
    schedule::{LINES, Line, Schedule},
};

/// How the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was told to stop, and every job is finished.
    Drained,
    /// It was told to stop, and some jobs did not finish within the grace; they will be redelivered.
    CutOff,
    /// An executor hung: the process must be started anew.
    Hung,
}

/// Every line, and what runs.
pub struct Consumer {
    /// In the order of [`LINES`].
    pulls: [Pull; LINES.len()],
    schedule: Schedule,
    executors: Executors,
    attempts: Arc<Attempts>,
    /// Jobs that are delivered and not yet acked, plus requests that may deliver one: never more than one above
    /// the number of executors, so that one can be published while the next one runs.
    places: Arc<Semaphore>,
    /// The executor that the next job will run on.
    slot: Option<Slot>,
    running: JoinSet<()>,
}

impl Consumer {
    /// A loop over the lines, in the order of [`LINES`], with `count` executors.
    pub fn new(
        pulls: [Pull; LINES.len()],
        executors: Executors,
        count: NonZeroUsize,
        attempts: Attempts,
    ) -> Self {
        Self {
            pulls,
            schedule: Schedule::default(),
            executors,
            attempts: Arc::new(attempts),
            places: Arc::new(Semaphore::new(count.get() + 1)),
            slot: None,
            running: JoinSet::new(),
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
                Some(ended) = self.running.join_next() => note_panic(ended),
                answer = next(&mut self.pulls) => self.heard(answer).await,
            }
        }
        tracing::info!(jobs = self.running.len(), "draining");
        // What waits for an executor in hand gets it.
        self.slot = None;
        let drained = timeout(grace, self.drain()).await.is_ok();
        match (hung.is_cancelled(), drained) {
            (true, _) => End::Hung,
            (false, true) => End::Drained,
            (false, false) => End::CutOff,
        }
    }

    /// Makes the requests that the free executor allows: one line after the other without waiting, and when
    /// all are empty, all at once with waiting, as far as there are places.
    async fn ask(&mut self) {
        if self.slot.is_none() || self.pulls.iter().any(Pull::answers_now) {
            return;
        }
        let order = self.schedule.order();
        if let Some(line) =
            order.into_iter().find(|line| !self.pull(*line).empty && self.pull(*line).is_ready())
        {
            self.ask_line(line, Patience::Now).await;
            return;
        }
        for line in LINES {
            if self.pull(line).is_ready() {
                self.ask_line(line, Patience::Wait).await;
            }
        }
    }

    async fn ask_line(&mut self, line: Line, patience: Patience) {
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            self.pull(line).ask(patience, place).await;
        }
    }

    fn pull(&mut self, line: Line) -> &mut Pull {
        &mut self.pulls[line as usize]
    }

    async fn heard(&mut self, answer: Answer) {
        match answer {
            Answer::Ready(Patience::Now) => {}
            // A line that no place was left to wait on is asked anew.
            Answer::Ready(Patience::Wait) => {
                self.pulls.iter_mut().filter(|pull| pull.is_ready()).for_each(|pull| pull.empty = false);
            }
            Answer::Job(message, place) => {
                // The next executor asks every line anew.
                self.pulls.iter_mut().for_each(|pull| pull.empty = false);
                self.schedule.took();
                match place.or_else(|| self.places.clone().try_acquire_owned().ok()) {
                    Some(place) => self.start(*message, place),
                    None => give_back(&message).await,
                }
            }
        }
    }

    /// Starts an attempt. Without an executor in hand it waits for one, kept alive meanwhile.
    fn start(&mut self, message: Message, place: OwnedSemaphorePermit) {
        let (attempts, slot) = (self.attempts.clone(), self.slot.take());
        self.running.spawn(async move {
            attempts.run(&message, slot).await;
            drop(place);
        });
    }

    /// Takes what open requests still deliver, and waits for what runs.
    async fn drain(&mut self) {
        while self.pulls.iter().any(Pull::is_asked) {
            let answer = next(&mut self.pulls).await;
            self.heard(answer).await;
        }
        while let Some(ended) = self.running.join_next().await {
            note_panic(ended);
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

/// An attempt that panicked outside an executor leaves its job to redelivery.
fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "an attempt panicked");
    }
}
