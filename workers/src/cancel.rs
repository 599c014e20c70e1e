//! Word from ingress that nobody wants a job any more. Core NATS: it may be lost, and then the job runs in vain
//! and its result is dropped where results are recorded.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use async_nats::Client;
use dermflow_schemas::{id::JobId, queue};
use futures_util::StreamExt;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The jobs in hand, which are never more than there are places, and whether each was withdrawn.
#[derive(Debug, Clone, Default)]
pub struct Cancels(Arc<Mutex<HashMap<JobId, (CancellationToken, usize)>>>);

impl Cancels {
    /// Notes that a job is in hand, for as long as the value lives. The same job may be in hand twice.
    pub fn hold(&self, job: JobId) -> Held {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (token, holders) = jobs.entry(job).or_default();
        *holders += 1;
        Held { job, token: token.clone(), cancels: self.clone() }
    }

    /// A job was withdrawn. What is not in hand is somebody else's.
    pub fn cancel(&self, job: JobId) {
        let jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((token, _)) = jobs.get(&job) {
            tracing::info!(%job, "withdrawn");
            token.cancel();
        }
    }

    /// Listens until the connection is closed.
    ///
    /// # Errors
    /// When it is closed already.
    pub async fn listen(&self, client: &Client) -> Result<JoinHandle<()>, async_nats::Error> {
        let (cancels, mut notes) = (self.clone(), client.subscribe(queue::ALL_CANCELS).await?);
        Ok(tokio::spawn(async move {
            while let Some(note) = notes.next().await {
                if let Some(job) = queue::last_token(&note.subject) {
                    cancels.cancel(job);
                }
            }
        }))
    }
}

/// A job in hand.
#[derive(Debug)]
pub struct Held {
    job: JobId,
    token: CancellationToken,
    cancels: Cancels,
}

impl Held {
    /// Whether the job was withdrawn since it is in hand.
    pub fn is_withdrawn(&self) -> bool {
        self.token.is_cancelled()
    }

    /// The same, for others to watch.
    pub fn token(&self) -> &CancellationToken {
        &self.token
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut jobs = self.cancels.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, holders)) = jobs.get_mut(&self.job) {
            *holders -= 1;
            if *holders == 0 {
                jobs.remove(&self.job);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dermflow_schemas::clock;

    #[test]
    fn only_what_is_in_hand_is_withdrawn_and_nothing_is_kept() {
        let cancels = Cancels::default();
        let [one, two] = [(); 2].map(|()| JobId::new(clock::now()));
        cancels.cancel(one);
        let (held, other) = (cancels.hold(one), cancels.hold(two));
        assert!(!held.is_withdrawn());
        let again = cancels.hold(one);
        drop(held);
        cancels.cancel(one);
        assert!(again.is_withdrawn() && !other.is_withdrawn());
        drop((again, other));
        assert!(cancels.0.lock().unwrap().is_empty());
        assert!(!cancels.hold(one).is_withdrawn(), "a later attempt is a new one");
    }
}
