//! A job that may have killed the worker that had it is run while nothing else is at stake.
//!
//! That a job is delivered again is all that is left of a worker which vanished. Most often the job is innocent;
//! when it is not, it takes this worker down as well, and the broker counts a delivery against every job that was
//! with it. So a job that was tried before runs while the worker has no other in hand: those that run are waited for,
//! and those that come in meanwhile step aside, back into the queue under the attempt that they had.

use tokio::sync::{Semaphore, SemaphorePermit, watch};

/// Who may run beside whom.
#[derive(Debug)]
pub struct Quarantine {
    /// Jobs in hand: delivered, and not yet acked.
    hand: watch::Sender<usize>,
    /// For the one job that is alone, or waits to be.
    seat: Semaphore,
    /// Whether the seat is taken.
    taken: watch::Sender<bool>,
}

impl Default for Quarantine {
    fn default() -> Self {
        let (hand, taken) = (watch::Sender::new(0), watch::Sender::new(false));
        Self { hand, seat: Semaphore::new(1), taken }
    }
}

/// A job in hand, until it is dropped.
#[derive(Debug)]
pub struct InHand<'a>(&'a watch::Sender<usize>);

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// The one seat, until it is dropped.
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

impl Quarantine {
    /// Counts a job in, from its delivery to its ack.
    pub fn take(&self) -> InHand<'_> {
        self.hand.send_modify(|count| *count += 1);
        InHand(&self.hand)
    }

    /// Waits, on behalf of a job in hand, until there is no other one: those that run end, those that come in
    /// step aside. `None` when the job itself must step aside, as another one is before it.
    pub async fn alone(&self) -> Option<Seat<'_>> {
        let seat = Seat { taken: &self.taken, _seat: self.seat.try_acquire().ok()? };
        self.taken.send_replace(true);
        // The senders live as long as this.
        let _ = self.hand.subscribe().wait_for(|count| *count <= 1).await;
        Some(seat)
    }

    /// Whether a job must step aside, as one waits to be alone, or is.
    pub fn is_taken(&self) -> bool {
        *self.taken.borrow()
    }

    /// Waits until a job is alone, or waits to be: who has not begun by then must step aside.
    pub async fn begins(&self) {
        let _ = self.taken.subscribe().wait_for(|taken| *taken).await;
    }

    /// Waits until nobody is alone or waits to be: until then the worker takes no further job.
    pub async fn over(&self) {
        let _ = self.taken.subscribe().wait_for(|taken| !*taken).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, task::Poll};

    use futures_util::poll;

    use super::*;

    #[tokio::test]
    async fn one_alone_waits_for_those_in_hand_and_all_others_step_aside() {
        let quarantine = Quarantine::default();
        let (running, _suspect) = (quarantine.take(), quarantine.take());
        assert!(!quarantine.is_taken());
        let mut alone = pin!(quarantine.alone());
        assert!(poll!(&mut alone).is_pending());
        let late = quarantine.take();
        assert!(quarantine.is_taken(), "one waits to be alone");
        assert!(quarantine.alone().await.is_none(), "one at a time");
        quarantine.begins().await;
        let mut over = pin!(quarantine.over());
        assert!(poll!(&mut over).is_pending());
        drop(running);
        assert!(poll!(&mut alone).is_pending(), "the late one is on its way back");
        drop(late);
        let Poll::Ready(Some(seat)) = poll!(&mut alone) else { panic!("nobody else is there") };
        assert!(quarantine.is_taken() && poll!(&mut over).is_pending());
        drop(seat);
        over.await;
        assert!(!quarantine.is_taken());
        assert!(poll!(pin!(quarantine.begins())).is_pending());
        assert!(quarantine.alone().await.is_some());
    }

    /// A suspect that is let go of before its turn leaves the seat free.
    #[tokio::test]
    async fn a_seat_is_free_again_whatever_happens() {
        let quarantine = Quarantine::default();
        let (other, _suspect) = (quarantine.take(), quarantine.take());
        assert!(poll!(pin!(quarantine.alone())).is_pending());
        assert!(!quarantine.is_taken());
        drop(other);
        assert!(quarantine.alone().await.is_some());
    }
}
