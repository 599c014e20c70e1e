//! Memory for request bodies, taken as they arrive, and for answers until they are sent.
//!
//! When it runs out, the request that began last is given up, and so on backwards until those before it have what they
//! need: who came first goes on. One caller has no more than its share: beyond that it is its own requests that are given
//! up.

use std::{
    collections::{BTreeMap, HashMap},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::Poll,
};

use dermflow_schemas::{error::Code, id::ClientId, limits::ROOM_PATIENCE};
use futures_util::poll;
use tokio::{
    select,
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// A client; none is all those together of whom nobody knows who they are.
type Caller = Option<ClientId>;

/// The memory, and the bodies that are on their way into it.
#[derive(Debug)]
pub(crate) struct Bodies {
    /// A permit a KiB.
    kib: Arc<Semaphore>,
    /// How many there are.
    all: usize,
    /// How many of them one caller may have.
    most: usize,
    /// The same of each caller that has any.
    shares: Mutex<HashMap<Caller, Weak<Semaphore>>>,
    arriving: Mutex<Arriving>,
}

#[derive(Debug, Default)]
struct Arriving {
    last: u64,
    /// In the order in which they began.
    bodies: BTreeMap<u64, Begun>,
}

#[derive(Debug)]
struct Begun {
    caller: Caller,
    /// In KiB.
    held: usize,
    /// How it is told to give up.
    given_up: CancellationToken,
}

impl Bodies {
    /// `kib` of memory, of which one caller may have `most`.
    pub(crate) fn new(kib: usize, most: usize) -> Arc<Self> {
        let semaphore = Arc::new(Semaphore::new(kib));
        Arc::new(Self {
            kib: semaphore,
            all: kib,
            most,
            shares: Mutex::default(),
            arriving: Mutex::default(),
        })
    }

    /// What is held of the memory, in bytes.
    pub(crate) fn held(&self) -> usize {
        (self.all - self.kib.available_permits()) * 1024
    }

    /// The part of the memory that a caller may have. Those of whom nobody knows who they are have one together.
    pub(crate) fn share(self: &Arc<Self>, caller: Caller) -> Share {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let kib = shares.get(&caller).and_then(Weak::upgrade).unwrap_or_else(|| {
            shares.retain(|_, share| share.strong_count() > 0);
            let kib = Arc::new(Semaphore::new(self.most));
            shares.insert(caller, Arc::downgrade(&kib));
            kib
        });
        Share { bodies: self.clone(), caller, kib }
    }

    fn arriving(&self) -> MutexGuard<'_, Arriving> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what began after body `number`, the latest first, until `kib` are on their way back; false when even all
    /// of it is not enough. `only` is whose bodies are looked at.
    fn make_room(&self, number: u64, kib: usize, only: Option<Caller>) -> bool {
        let mut arriving = self.arriving();
        let (mut room, mut newest) = (0, Vec::new());
        let newer = arriving.bodies.range(number + 1..).rev();
        for (number, body) in newer.filter(|(_, body)| only.is_none_or(|caller| body.caller == caller)) {
            if room >= kib {
                break;
            }
            room += body.held;
            newest.push(*number);
        }
        if room < kib {
            return false;
        }
        for body in newest.iter().filter_map(|number| arriving.bodies.remove(number)) {
            body.given_up.cancel();
        }
        true
    }
}

/// The part of the memory that one caller may have.
#[derive(Debug)]
pub(crate) struct Share {
    bodies: Arc<Bodies>,
    caller: Caller,
    /// A permit a KiB.
    kib: Arc<Semaphore>,
}

impl Share {
    /// A body that begins to arrive, and holds nothing yet.
    pub(crate) fn begin(self) -> Arrival {
        let given_up = CancellationToken::new();
        let mut arriving = self.bodies.arriving();
        arriving.last += 1;
        let number = arriving.last;
        arriving.bodies.insert(number, Begun { caller: self.caller, held: 0, given_up: given_up.clone() });
        drop(arriving);
        Arrival { share: self, number, given_up, memory: None }
    }

    /// So much of it, when there is room.
    pub(crate) async fn wait(&self, kib: usize) -> Result<Memory, AcquireError> {
        // Who waits for its own share keeps nobody from the rest.
        let own = self.kib.clone().acquire_many_owned(kib as u32).await?;
        let all = self.bodies.kib.clone().acquire_many_owned(kib as u32).await?;
        Ok(Memory { all, own })
    }

    /// So much of it, for `bytes`.
    ///
    /// # Errors
    /// [`Code::Overloaded`] when there is no room.
    pub(crate) fn take(&self, bytes: usize) -> Result<Memory, Code> {
        let take = |kib: &Arc<Semaphore>| kib.clone().try_acquire_many_owned(kib_of(bytes) as u32);
        let own = take(&self.kib).map_err(|_| Code::Overloaded)?;
        Ok(Memory { all: take(&self.bodies.kib).map_err(|_| Code::Overloaded)?, own })
    }
}

/// Memory that is taken until it is dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    // First: whoever waits for its own share finds the rest of it free.
    all: OwnedSemaphorePermit,
    own: OwnedSemaphorePermit,
}

impl Memory {
    pub(crate) fn kib(&self) -> usize {
        self.all.num_permits()
    }

    /// Adds more of the same share.
    pub(crate) fn merge(&mut self, more: Self) {
        self.own.merge(more.own);
        self.all.merge(more.all);
    }

    /// So much of it; `None` when it has less.
    pub(crate) fn split(&mut self, kib: usize) -> Option<Self> {
        Some(Self { all: self.all.split(kib)?, own: self.own.split(kib)? })
    }
}

/// What stands for so many bytes.
pub(crate) fn kib_of(bytes: usize) -> usize {
    bytes.div_ceil(1024)
}

/// A body on its way. Dropping it gives back what it holds.
#[derive(Debug)]
pub(crate) struct Arrival {
    share: Share,
    number: u64,
    given_up: CancellationToken,
    memory: Option<Memory>,
}

impl Arrival {
    /// Returns when the body was given up for one that began earlier.
    pub(crate) async fn given_up(&self) {
        self.given_up.cancelled().await;
    }

    /// Holds so many KiB, no fewer than before.
    ///
    /// # Errors
    /// [`Code::Overloaded`] when there is no room: this body began last, of all or of its caller's, or uploads were in line
    /// for it before.
    pub(crate) async fn hold(&mut self, kib: usize) -> Result<(), Code> {
        let missing = kib.saturating_sub(self.memory.as_ref().map_or(0, Memory::kib));
        if missing == 0 {
            return Ok(());
        }
        let own = self.room(&self.share.kib, missing, Some(self.share.caller)).await?;
        let more = Memory { own, all: self.room(&self.share.bodies.kib, missing, None).await? };
        match &mut self.memory {
            Some(memory) => memory.merge(more),
            None => self.memory = Some(more),
        }
        if let Some(body) = self.share.bodies.arriving().bodies.get_mut(&self.number) {
            body.held = kib;
        }
        Ok(())
    }

    /// So many KiB more, which newer bodies, of `only` one caller or of all, have to leave when there are not enough.
    async fn room(
        &self,
        semaphore: &Arc<Semaphore>,
        missing: usize,
        only: Option<Caller>,
    ) -> Result<OwnedSemaphorePermit, Code> {
        let free = semaphore.available_permits();
        let mut more = pin!(semaphore.clone().acquire_many_owned(missing as u32));
        // In line before anybody gives up: what is left is this body's.
        let more = match poll!(more.as_mut()) {
            Poll::Ready(more) => more.ok(),
            Poll::Pending if self.share.bodies.make_room(self.number, missing.saturating_sub(free), only) => {
                select! {
                    more = timeout(ROOM_PATIENCE, more) => more.ok().and_then(Result::ok),
                    () = self.given_up.cancelled() => None,
                }
            }
            Poll::Pending => None,
        };
        more.ok_or(Code::Overloaded)
    }

    /// The body is there: what it holds, which nobody can ask back any more.
    ///
    /// # Errors
    /// [`Code::Overloaded`] when it was given up at the last moment.
    pub(crate) fn arrived(mut self) -> Result<Memory, Code> {
        let was_given_up = self.share.bodies.arriving().bodies.remove(&self.number).is_none();
        self.memory.take().filter(|_| !was_given_up).ok_or(Code::Overloaded)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.share.bodies.arriving().bodies.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;
    use uuid::Uuid;

    use super::*;

    #[tokio::test]
    async fn the_body_that_began_last_is_given_up_first() {
        let bodies = Bodies::new(10, 10);
        let [mut first, mut second, mut third] = [(); 3].map(|()| bodies.share(None).begin());
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
        assert_eq!(first.arrived().unwrap().kib(), 5);
    }

    #[tokio::test]
    async fn what_is_free_counts() {
        let bodies = Bodies::new(10, 10);
        let [mut first, mut second] = [(); 2].map(|()| bodies.share(None).begin());
        first.hold(4).await.unwrap();
        second.hold(1).await.unwrap();
        let grown = tokio::spawn(async move { first.hold(10).await });
        timeout(Duration::from_secs(5), second.given_up()).await.unwrap();
        drop(second);
        grown.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_in_line_behind_an_upload_is_told_soon() {
        let bodies = Bodies::new(10, 10);
        let [mut first, mut second] = [(); 2].map(|()| bodies.share(None).begin());
        second.hold(8).await.unwrap();
        let share = bodies.share(None);
        let upload = tokio::spawn(async move { share.wait(10).await });
        tokio::task::yield_now().await;
        let refused = tokio::spawn(async move { first.hold(4).await });
        timeout(Duration::from_secs(5), second.given_up()).await.unwrap();
        drop(second);
        assert_eq!(refused.await.unwrap(), Err(Code::Overloaded));
        drop(upload.await.unwrap().unwrap());
    }

    #[tokio::test]
    async fn what_has_arrived_is_asked_back_from_nobody() {
        let bodies = Bodies::new(10, 10);
        let [mut first, mut second] = [(); 2].map(|()| bodies.share(None).begin());
        second.hold(8).await.unwrap();
        let held = second.arrived().unwrap();
        assert_eq!(first.hold(3).await, Err(Code::Overloaded));
        drop(held);
        first.hold(10).await.unwrap();
        drop(first);
        assert_eq!(bodies.kib.available_permits(), 10);
        assert!(bodies.arriving().bodies.is_empty());
    }

    #[tokio::test]
    async fn one_caller_has_its_share_and_no_more() {
        let bodies = Bodies::new(10, 5);
        let [one, other] = [(); 2].map(|()| Some(ClientId::from(Uuid::new_v4())));
        let [mut first, mut second] = [(); 2].map(|()| bodies.share(one).begin());
        let mut others = bodies.share(other).begin();
        first.hold(2).await.unwrap();
        second.hold(3).await.unwrap();
        assert_eq!(second.hold(4).await, Err(Code::Overloaded), "its share is full");
        assert_eq!(bodies.share(one).take(1).unwrap_err(), Code::Overloaded);
        let waiting = bodies.share(one);
        let mut waiting = tokio::spawn(async move { waiting.wait(1).await });
        assert!(timeout(Duration::from_millis(1), &mut waiting).await.is_err());
        others.hold(5).await.unwrap();
        let others = others.arrived().unwrap();
        assert_eq!(bodies.held(), 10 * 1024);
        // Of its own bodies, the newest makes room.
        drop(others);
        waiting.abort();
        let _ = waiting.await;
        let grown = tokio::spawn(async move { first.hold(3).await });
        timeout(Duration::from_secs(5), second.given_up()).await.unwrap();
        drop(second);
        grown.await.unwrap().unwrap();
        assert_eq!(bodies.held(), 0);
        let [a, b] = [one, None].map(|caller| bodies.share(caller).take(5 * 1024).unwrap());
        assert_eq!(bodies.share(other).take(1).unwrap_err(), Code::Overloaded, "nothing is left");
        drop((a, b));
        bodies.share(other);
        assert_eq!(bodies.shares.lock().unwrap().len(), 1, "who has nothing is forgotten");
    }

    #[tokio::test]
    async fn a_callers_bodies_give_way_to_its_own_only_when_its_share_is_full() {
        let bodies = Bodies::new(10, 5);
        let [one, other] = [(); 2].map(|()| Some(ClientId::from(Uuid::new_v4())));
        let (mut first, mut others) = (bodies.share(one).begin(), bodies.share(other).begin());
        first.hold(4).await.unwrap();
        others.hold(4).await.unwrap();
        assert_eq!(first.hold(6).await, Err(Code::Overloaded));
        assert!(timeout(Duration::from_millis(1), others.given_up()).await.is_err(), "it is not in the way");
    }
}
