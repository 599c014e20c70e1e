//! Executors for callers who wait, and for nobody else: a backlog of bulk jobs does not keep them waiting for one.
//!
//! For each there is a request to the broker for the next interactive job, which so is delivered as soon as it comes in. The
//! other loop asks for interactive jobs as well, and first; whichever has one, it runs on the executor that is free first.

use std::{sync::Arc, time::Duration};

use dermflow_schemas::job::Lane;
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    attempt::Attempts,
    consume::{End, LAST_ANSWER},
    pull::{Answer, Patience, Pull},
    schedule::Source,
};

/// One such request, and its job: one at a time, none ahead.
pub struct Reserved {
    pull: Pull,
    attempts: Arc<Attempts>,
    place: Arc<Semaphore>,
}

impl Reserved {
    /// Asks with `pull`, which is of [`crate::schedule::Line::Interactive`]. There is one of these for each reserved executor
    /// of `attempts`.
    pub fn new(pull: Pull, attempts: Arc<Attempts>) -> Self {
        Self { pull, attempts, place: Arc::new(Semaphore::new(1)) }
    }

    /// Runs until `stop` is cancelled or an executor hangs, then finishes what is delivered, within `grace`.
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
            if self.pull.is_ready() {
                // Not while a job has the worker for itself: what came then would have to step aside.
                tokio::select! {
                    () = stop.cancelled() => continue,
                    () = self.attempts.quarantine.over() => {}
                }
                self.ask().await;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = hung.cancelled() => {}
                answer = self.pull.answer() => self.heard(answer).await,
            }
        }
        // What an open request still delivers.
        while self.pull.is_asked() {
            let Ok(answer) = timeout(LAST_ANSWER, self.pull.answer()).await else { return };
            self.heard(answer).await;
        }
    }

    async fn ask(&mut self) {
        if let Ok(place) = self.place.clone().try_acquire_owned() {
            self.pull.ask(Source::Interactive, Patience::Wait, place).await;
        }
    }

    async fn heard(&self, answer: Answer) {
        let Answer::Job(message, _place) = answer else { return };
        let (attempts, turn) = (self.attempts.clone(), self.attempts.executors.turn(Lane::Interactive));
        // A task of its own: what panics leaves its job to redelivery.
        let attempt = tokio::spawn(async move { attempts.run(&message, turn).await });
        if let Err(error) = attempt.await {
            tracing::error!(%error, "an attempt panicked");
        }
    }
}
