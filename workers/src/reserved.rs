//! Executors for callers who wait, and for nobody else: a backlog of bulk jobs costs them no time.
//!
//! Each asks the broker for the next interactive job and waits, so that one which comes in is delivered at once. The other
//! executors ask for interactive jobs as well, and first: of many, these ones have no more than their part.

use std::{future::ready, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    attempt::Attempts,
    consume::End,
    executor::Turn,
    pull::{Answer, Patience, Pull},
    schedule::Source,
};

/// One such executor: one job at a time, none ahead.
pub struct Reserved {
    pull: Pull,
    /// With executors of their own.
    attempts: Arc<Attempts>,
    place: Arc<Semaphore>,
}

impl Reserved {
    /// Asks with `pull`, which is of [`crate::schedule::Line::Interactive`]. There is one of these for each of the executors
    /// of `attempts`.
    pub fn new(pull: Pull, attempts: Arc<Attempts>) -> Self {
        Self { pull, attempts, place: Arc::new(Semaphore::new(1)) }
    }

    /// Runs until `stop` is cancelled or the executor hangs, then finishes what is delivered, within `grace`.
    pub async fn run(mut self, stop: CancellationToken, grace: Duration) -> End {
        let hung = self.attempts.executors.hung().clone();
        let late = async {
            tokio::select! {
                () = stop.cancelled() => {}
                () = hung.cancelled() => {}
            }
            sleep(grace).await;
        };
        let drained = tokio::select! {
            () = self.work(&stop) => true,
            () = late => false,
        };
        End::of(hung.is_cancelled(), drained)
    }

    async fn work(&mut self, stop: &CancellationToken) {
        let hung = self.attempts.executors.hung().clone();
        while !stop.is_cancelled() && !hung.is_cancelled() {
            if self.pull.is_ready()
                && let Ok(place) = self.place.clone().try_acquire_owned()
            {
                self.pull.ask(Source::Interactive, Patience::Wait, place).await;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                answer = self.pull.answer() => self.heard(answer).await,
            }
        }
        // What an open request still delivers.
        while self.pull.is_asked() {
            let answer = self.pull.answer().await;
            self.heard(answer).await;
        }
    }

    async fn heard(&self, answer: Answer) {
        let Answer::Job(message, _place) = answer else { return };
        let Some(slot) = self.attempts.executors.slot().await else { return };
        let (attempts, turn): (_, Turn) = (self.attempts.clone(), Box::pin(ready(Some(slot))));
        // A task of its own: what panics leaves its job to redelivery.
        let attempt = tokio::spawn(async move { attempts.run(&message, turn).await });
        if let Err(error) = attempt.await {
            tracing::error!(%error, "an attempt panicked");
        }
    }
}
