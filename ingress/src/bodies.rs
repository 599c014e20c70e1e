//! Memory for request bodies, taken as they arrive.
//!
//! When it runs out, the request that began last is given up, and so on backwards until those before it have what they
//! need: who came first goes on.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
};

use dermflow_schemas::{error::Code, limits::ROOM_PATIENCE};
use futures_util::poll;
use tokio::{
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// The memory, and the bodies that are on their way into it.
#[derive(Debug)]
pub(crate) struct Bodies {
    /// A permit a KiB.
    kib: Arc<Semaphore>,
    /// How many there are.
    all: usize,
    arriving: Mutex<Arriving>,
}

#[derive(Debug, Default)]
struct Arriving {
    last: u64,
    /// In the order in which they began: what each holds, in KiB, and how it is told to give up.
    bodies: BTreeMap<u64, (usize, CancellationToken)>,
}

impl Bodies {
    pub(crate) fn new(kib: usize) -> Arc<Self> {
        Arc::new(Self { kib: Arc::new(Semaphore::new(kib)), all: kib, arriving: Mutex::default() })
    }

    /// A permit a KiB, for who can wait for them.
    pub(crate) fn kib(&self) -> Arc<Semaphore> {
        self.kib.clone()
    }

    /// What is held of the memory, in bytes.
    pub(crate) fn held(&self) -> usize {
        (self.all - self.kib.available_permits()) * 1024
    }

    /// A body that begins to arrive, and holds nothing yet.
    pub(crate) fn begin(self: &Arc<Self>) -> Arrival {
        let given_up = CancellationToken::new();
        let mut arriving = self.arriving();
        arriving.last += 1;
        let number = arriving.last;
        arriving.bodies.insert(number, (0, given_up.clone()));
        Arrival { bodies: self.clone(), number, given_up, memory: None }
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what began after body `number`, the latest first, until `kib` are on their way back; false when even all
    /// of it is not enough.
    fn make_room(&self, number: u64, kib: usize) -> bool {
        let mut arriving = self.arriving();
        let newer = arriving.bodies.range(number + 1..);
        if newer.map(|(_, (held, _))| held).sum::<usize>() < kib {
            return false;
        }
        let mut room = 0;
        while room < kib
            && let Some((_, (held, given_up))) = arriving.bodies.pop_last()
        {
            room += held;
            given_up.cancel();
        }
        true
    }
}

/// A body on its way. Dropping it gives back what it holds.
#[derive(Debug)]
pub(crate) struct Arrival {
    bodies: Arc<Bodies>,
    number: u64,
    given_up: CancellationToken,
    memory: Option<OwnedSemaphorePermit>,
}

impl Arrival {
    /// Returns when the body was given up for one that began earlier.
    pub(crate) async fn given_up(&self) {
        self.given_up.cancelled().await;
    }

    /// Holds so many KiB, no fewer than before.
    ///
    /// # Errors
    /// [`Code::Overloaded`] when there is no room: this body began last, or uploads were in line for it before.
    pub(crate) async fn hold(&mut self, kib: usize) -> Result<(), Code> {
        let held = self.memory.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = kib.saturating_sub(held);
        if missing == 0 {
            return Ok(());
        }
        let (semaphore, free) = (self.bodies.kib(), self.bodies.kib.available_permits());
        let mut more = pin!(semaphore.acquire_many_owned(missing as u32));
        // In line before anybody gives up: what is left is this body's.
        let more = match poll!(more.as_mut()) {
            Poll::Ready(more) => more.ok(),
            Poll::Pending if self.bodies.make_room(self.number, missing.saturating_sub(free)) => select! {
                more = timeout(ROOM_PATIENCE, more) => more.ok().and_then(Result::ok),
                () = self.given_up.cancelled() => None,
            },
            Poll::Pending => None,
        };
        let more = more.ok_or(Code::Overloaded)?;
        match &mut self.memory {
            Some(memory) => memory.merge(more),
            None => self.memory = Some(more),
        }
        if let Some((held, _)) = self.bodies.arriving().bodies.get_mut(&self.number) {
            *held = kib;
        }
        Ok(())
    }

    /// The body is there: what it holds, which nobody can ask back any more.
    ///
    /// # Errors
    /// [`Code::Overloaded`] when it was given up at the last moment.
    pub(crate) fn arrived(mut self) -> Result<OwnedSemaphorePermit, Code> {
        let was_given_up = self.bodies.arriving().bodies.remove(&self.number).is_none();
        self.memory.take().filter(|_| !was_given_up).ok_or(Code::Overloaded)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.bodies.arriving().bodies.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn the_body_that_began_last_is_given_up_first() {
        let bodies = Bodies::new(10);
        let [mut first, mut second, mut third] = [(); 3].map(|()| bodies.begin());
        third.hold(4).await.unwrap();
        second.hold(4).await.unwrap();
        first.hold(2).await.unwrap();
        assert_eq!(third.hold(5).await, Err(Code::Overloaded), "nobody began later");
        let grown = tokio::spawn(async move {
            first.hold(5).await.unwrap();
            first
        });
        timeout(Duration::from_secs(5), third.given_up()).await.unwrap();
        assert!(timeout(Duration::from_millis(1), second.given_up()).await.is_err(), "one was enough");
        assert_eq!(third.arrived().unwrap_err(), Code::Overloaded);
        let first = timeout(Duration::from_secs(5), grown).await.unwrap().unwrap();
        assert_eq!(first.arrived().unwrap().num_permits(), 5);
    }

    #[tokio::test]
    async fn what_is_free_counts() {
        let bodies = Bodies::new(10);
        let [mut first, mut second] = [(); 2].map(|()| bodies.begin());
        first.hold(4).await.unwrap();
        second.hold(1).await.unwrap();
        let grown = tokio::spawn(async move { first.hold(10).await });
        timeout(Duration::from_secs(5), second.given_up()).await.unwrap();
        drop(second);
        grown.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_in_line_behind_an_upload_is_told_soon() {
        let bodies = Bodies::new(10);
        let [mut first, mut second] = [(); 2].map(|()| bodies.begin());
        second.hold(8).await.unwrap();
        let upload = tokio::spawn(bodies.kib().acquire_many_owned(10));
        tokio::task::yield_now().await;
        let refused = tokio::spawn(async move { first.hold(4).await });
        timeout(Duration::from_secs(5), second.given_up()).await.unwrap();
        drop(second);
        assert_eq!(refused.await.unwrap(), Err(Code::Overloaded));
        drop(upload.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn what_has_arrived_is_asked_back_from_nobody() {
        let bodies = Bodies::new(10);
        let [mut first, mut second] = [(); 2].map(|()| bodies.begin());
        second.hold(8).await.unwrap();
        let held = second.arrived().unwrap();
        assert_eq!(first.hold(3).await, Err(Code::Overloaded));
        drop(held);
        first.hold(10).await.unwrap();
        drop(first);
        assert_eq!(bodies.kib.available_permits(), 10);
        assert!(bodies.arriving().bodies.is_empty());
    }
}
