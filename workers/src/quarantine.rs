//! A job that may have killed the worker that had it is run while nothing else is at stake.
//!
//! That a job is delivered again is all that is left of a worker which vanished. Most often the job is innocent;
//! when it is not, it takes this worker down as well, and the broker counts a delivery against every job that was
//! with it. So a job that was tried before runs alone, and every other one that comes in meanwhile steps aside: it
//! goes back to the queue under the attempt that it had.

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, Semaphore, SemaphorePermit, watch};

/// Who may run beside whom.
#[derive(Debug)]
pub struct Quarantine {
    running: RwLock<()>,
    /// For the one job that is alone, or waits to be.
    seat: Semaphore,
    /// Whether the seat is taken.
    taken: watch::Sender<bool>,
}

impl Default for Quarantine {
    fn default() -> Self {
        Self { running: RwLock::new(()), seat: Semaphore::new(1), taken: watch::Sender::new(false) }
    }
}

/// The one seat.
#[derive(Debug)]
pub struct Seat<'a> {
    taken: &'a watch::Sender<bool>,
    _seat: SemaphorePermit<'a>,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.taken.send_replace(false);
    }
}

/// The right to run, until it is dropped.
#[derive(Debug)]
pub enum Pass<'a> {
    /// While no other job runs.
    Alone(RwLockWriteGuard<'a, ()>, Seat<'a>),
    /// Beside others.
    Together(RwLockReadGuard<'a, ()>),
}

impl Quarantine {
    /// Waits until no other job runs; `None` when the job must step aside, as another one is before it.
    pub async fn alone(&self) -> Option<Pass<'_>> {
        let seat = Seat { taken: &self.taken, _seat: self.seat.try_acquire().ok()? };
        self.taken.send_replace(true);
        Some(Pass::Alone(self.running.write().await, seat))
    }

    /// Waits until a job is alone, or waits to be: who has not begun by then must step aside.
    pub async fn begins(&self) {
        // The sender lives as long as this.
        let _ = self.taken.subscribe().wait_for(|taken| *taken).await;
    }

    /// Lets a job run beside others; `None` when it must step aside, as one waits to be alone, or is.
    pub fn together(&self) -> Option<Pass<'_>> {
        self.running.try_read().ok().map(Pass::Together)
    }

    /// Waits until nobody is alone or waits to be: until then the worker takes no further job.
    pub async fn over(&self) {
        drop(self.running.read().await);
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, task::Poll};

    use futures_util::poll;

    use super::*;

    /// A suspect that is let go of before its turn leaves the seat free.
    #[tokio::test]
    async fn a_seat_is_free_again_whatever_happens() {
        let quarantine = Quarantine::default();
        let other = quarantine.together().unwrap();
        assert!(poll!(pin!(quarantine.alone())).is_pending());
        assert!(poll!(pin!(quarantine.begins())).is_pending());
        drop(other);
        assert!(quarantine.alone().await.is_some());
    }

    #[tokio::test]
    async fn one_alone_waits_for_those_that_run_and_all_others_step_aside() {
        let quarantine = Quarantine::default();
        let (first, second) = (quarantine.together().unwrap(), quarantine.together().unwrap());
        let mut alone = pin!(quarantine.alone());
        assert!(poll!(&mut alone).is_pending());
        assert!(quarantine.together().is_none(), "one waits to be alone");
        assert!(quarantine.alone().await.is_none(), "one at a time");
        quarantine.begins().await;
        let mut over = pin!(quarantine.over());
        assert!(poll!(&mut over).is_pending());
        drop(first);
        assert!(poll!(&mut alone).is_pending());
        drop(second);
        let Poll::Ready(Some(pass)) = poll!(&mut alone) else { panic!("nobody else is there") };
        assert!(quarantine.together().is_none() && poll!(&mut over).is_pending());
        assert!(quarantine.alone().await.is_none());
        drop(pass);
        over.await;
        assert!(quarantine.together().is_some());
        assert!(poll!(pin!(quarantine.begins())).is_pending());
        assert!(quarantine.alone().await.is_some());
    }
}
