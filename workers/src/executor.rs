//! Threads that own an engine of each model, and the slots that count how many of them are free.

use std::{
    any::Any,
    future::ready,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    task::{Context, Poll, Waker},
    thread,
    time::Duration,
};

use dermflow_schemas::job::Lane;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot},
    task::coop::unconstrained,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    child::Decoding,
    engine::{Engine, EngineError, Factory},
};

/// Why work gave no result. In both cases another attempt may succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExecutorError {
    /// The work panicked, or there was no engine after a panic.
    #[error("the executor panicked")]
    Panicked,
    /// The work passed its limit. Its thread cannot be killed: the process must end.
    #[error("the executor did not finish in time")]
    Hung,
}

/// The right to use one executor; free again when the work on it is done, which for hung work is never.
#[derive(Debug)]
pub struct Slot {
    _permit: OwnedSemaphorePermit,
    /// To the executors that it is one of.
    work: SyncSender<(Work, Slot)>,
}

/// Work for an engine of the model with this number.
type Work = (usize, Box<dyn FnOnce(&mut dyn Engine) + Send>);

/// A place in the queue for an executor, first come, first served. `None` once an executor has hung, as the process must
/// end.
pub type Turn = Pin<Box<dyn Future<Output = Option<Slot>> + Send>>;

/// How nice executors are, and their decoders, when others are reserved for callers who wait, see nice(2): these get three
/// times as much of a core that both want. Not more, as what decodes has a deadline.
const NICE: i32 = 5;

/// Executor threads. A clone uses the same ones; they end when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Executors {
    all: Pool,
    /// For interactive jobs alone.
    reserved: Option<Pool>,
    hung: CancellationToken,
}

/// Threads that take work from one queue.
#[derive(Debug, Clone)]
struct Pool {
    slots: Arc<Semaphore>,
    work: SyncSender<(Work, Slot)>,
    pace: Arc<Pace>,
}

/// When executors will be free, judging by what their work took of late.
#[derive(Debug, Default)]
struct Pace {
    seen: Mutex<Seen>,
    begun: Notify,
}

#[derive(Debug, Default)]
struct Seen {
    /// A moving average.
    usual: Option<Duration>,
    /// When the work that goes on began.
    running: Vec<Instant>,
}

impl Pace {
    fn begin(&self, now: Instant) {
        self.see(|seen| seen.running.push(now));
        self.begun.notify_waiters();
    }

    fn end(&self, began: Instant, now: Instant) {
        self.see(|seen| {
            if let Some(place) = seen.running.iter().position(|known| *known == began) {
                seen.running.swap_remove(place);
            }
            let took = now - began;
            seen.usual = Some(seen.usual.map_or(took, |usual| (usual * 3 + took) / 4));
        });
    }

    /// When the first of those that work now should be free; `None` when none does, or nothing is known.
    fn next(&self) -> Option<Instant> {
        self.see(|seen| Some(*seen.running.iter().min()? + seen.usual?))
    }

    fn see<T>(&self, look: impl FnOnce(&mut Seen) -> T) -> T {
        look(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Pool {
    async fn start(
        count: NonZeroUsize,
        factories: &[Factory],
        decoding: &Decoding,
        nice: i32,
    ) -> Result<Self, EngineError> {
        // Never full: whoever hands over work holds a slot.
        let (work, queue) = sync_channel(count.get());
        let (queue, pace) = (Arc::new(Mutex::new(queue)), Arc::<Pace>::default());
        let mut starting = Vec::new();
        for number in 0..count.get() {
            let (ready, started) = oneshot::channel();
            let (queue, factories, decoding) = (queue.clone(), factories.to_vec(), decoding.clone());
            let pace = pace.clone();
            thread::Builder::new()
                .name(format!("executor-{number}"))
                .spawn(move || {
                    // Of this thread alone, and of what it starts. It goes on as well without.
                    let _ = rustix::process::nice(nice);
                    serve(&queue, &factories, &decoding, &pace, ready);
                })
                .map_err(|error| EngineError::Runtime(error.to_string()))?;
            starting.push(started);
        }
        for started in starting {
            started.await.unwrap_or_else(|_| Err(EngineError::Network("panicked while loading".into())))?;
        }
        Ok(Self { slots: Arc::new(Semaphore::new(count.get())), work, pace })
    }

    async fn slot(&self) -> Option<Slot> {
        self.slots.clone().acquire_owned().await.ok().map(|permit| self.of(permit))
    }

    fn of(&self, permit: OwnedSemaphorePermit) -> Slot {
        Slot { _permit: permit, work: self.work.clone() }
    }
}

impl Executors {
    /// Starts `count` threads, each with a decoder and with an engine of each factory of its own, and `reserved` ones besides,
    /// and waits until all have them.
    ///
    /// # Errors
    /// When an engine cannot be made, or a decoder cannot be started.
    pub async fn start(
        count: NonZeroUsize,
        reserved: Option<NonZeroUsize>,
        factories: &[Factory],
        decoding: &Decoding,
    ) -> Result<Self, EngineError> {
        // Without reserved ones there is nobody to let go first.
        let nice = if reserved.is_some() { NICE } else { 0 };
        let all = Pool::start(count, factories, decoding, nice).await?;
        let reserved = match reserved {
            Some(count) => Some(Pool::start(count, factories, decoding, 0).await?),
            None => None,
        };
        Ok(Self { all, reserved, hung: CancellationToken::new() })
    }

    /// Waits for a free executor that is not reserved. Who drops this has lost its place in the queue.
    pub async fn slot(&self) -> Option<Slot> {
        tokio::select! {
            biased;
            () = self.hung.cancelled() => None,
            slot = self.all.slot() => slot,
        }
    }

    /// A reserved executor, if there is one that is free.
    pub fn reserved_now(&self) -> Option<Slot> {
        let pool = self.reserved.as_ref().filter(|_| !self.hung.is_cancelled())?;
        pool.slots.clone().try_acquire_owned().ok().map(|permit| pool.of(permit))
    }

    /// Queues for an executor now, not when the turn is first waited for; an interactive job for a reserved one as well, and
    /// has whichever is free first.
    pub fn turn(&self, lane: Lane) -> Turn {
        let executors = self.clone();
        // What this task has done before must not keep it from queueing.
        let mut turn: Turn = Box::pin(unconstrained(async move {
            match executors.reserved.as_ref().filter(|_| lane == Lane::Interactive) {
                None => executors.slot().await,
                Some(reserved) => tokio::select! {
                    biased;
                    () = executors.hung.cancelled() => None,
                    slot = reserved.slot() => slot,
                    slot = executors.all.slot() => slot,
                },
            }
        }));
        match turn.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(slot) => Box::pin(ready(slot)),
            Poll::Pending => turn,
        }
    }

    /// Whether an executor that has work, and is not reserved, should be free in `lead`, or before.
    pub fn is_soon_free(&self, lead: Duration) -> bool {
        self.all.pace.next().is_some_and(|at| at <= Instant::now() + lead)
    }

    /// Waits for that; for ever when none has work.
    pub async fn soon_free(&self, lead: Duration) {
        loop {
            let mut begun = std::pin::pin!(self.all.pace.begun.notified());
            begun.as_mut().enable();
            match self.all.pace.next() {
                None => begun.await,
                Some(at) => tokio::select! {
                    () = sleep_until(at.checked_sub(lead).unwrap_or(at)) => return,
                    () = begun => {}
                },
            }
        }
    }

    /// Cancelled once an executor has hung.
    pub fn hung(&self) -> &CancellationToken {
        &self.hung
    }

    /// Runs `work` on an executor, with its engine of the factory number `model`, for at most `limit`.
    ///
    /// # Errors
    /// See [`ExecutorError`].
    pub async fn run<T: Send + 'static>(
        &self,
        slot: Slot,
        limit: Duration,
        model: usize,
        work: impl FnOnce(&mut dyn Engine) -> T + Send + 'static,
    ) -> Result<T, ExecutorError> {
        let (reply, done) = oneshot::channel();
        let work: Work = (
            model,
            Box::new(move |engine| {
                let _ = reply.send(work(engine));
            }),
        );
        slot.work.clone().try_send((work, slot)).map_err(|_| ExecutorError::Panicked)?;
        let Ok(reply) = timeout(limit, done).await else {
            self.hung.cancel();
            return Err(ExecutorError::Hung);
        };
        reply.map_err(|_| ExecutorError::Panicked)
    }
}

/// The life of an executor thread. An engine that panicked is in an unknown state and is made anew.
fn serve(
    queue: &Mutex<Receiver<(Work, Slot)>>,
    factories: &[Factory],
    decoding: &Decoding,
    pace: &Pace,
    ready: oneshot::Sender<Result<(), EngineError>>,
) {
    let decoder = decoding.enter().map_err(|error| EngineError::Decoder(error.to_string()));
    let made = decoder.and_then(|()| factories.iter().map(|make| make().map(Some)).collect());
    let mut engines: Vec<Option<Box<dyn Engine>>> = match made {
        Ok(engines) => engines,
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(((model, work), slot)) = next else { return };
        let (Some(engine), Some(factory)) = (engines.get_mut(model), factories.get(model)) else { continue };
        if engine.is_none() {
            *engine = factory().inspect_err(|error| tracing::error!(%error, "no engine after a panic")).ok();
        }
        // Without an engine the work is dropped, and with it the sender of its reply.
        if let Some(own) = engine.as_deref_mut() {
            let began = Instant::now();
            pace.begin(began);
            let outcome: Result<(), Box<dyn Any + Send>> = catch_unwind(AssertUnwindSafe(|| work(own)));
            pace.end(began, Instant::now());
            if outcome.is_err() {
                *engine = None;
            }
        }
        drop(slot);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;
    use crate::engine::{Answer, Question};
    use std::sync::atomic::{AtomicUsize, Ordering};

    const LIMIT: Duration = Duration::from_secs(10);

    struct Silent;

    impl Engine for Silent {
        fn classify(&mut self, _: Question<'_>) -> Result<Answer, EngineError> {
            unreachable!("these tests bring their own work")
        }
    }

    /// Executors and the number of engines made for them.
    async fn executors(count: usize) -> (Executors, Arc<AtomicUsize>) {
        let made = Arc::new(AtomicUsize::new(0));
        let counter = made.clone();
        let factory: Factory = Arc::new(move || {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(Silent))
        });
        let executors =
            Executors::start(NonZeroUsize::new(count).unwrap(), None, &[factory], &Decoding::Here)
                .await
                .unwrap();
        (executors, made)
    }

    #[tokio::test]
    async fn a_panic_costs_the_job_and_the_engine_but_not_the_executor() {
        let (executors, made) = executors(1).await;
        for attempt in 1..=3 {
            let slot = executors.slot().await.unwrap();
            let lost = executors.run(slot, LIMIT, 0, |_| -> u32 { panic!("as planned") }).await;
            assert_eq!(lost, Err(ExecutorError::Panicked));
            let slot = executors.slot().await.unwrap();
            assert_eq!(executors.run(slot, LIMIT, 0, |_| 7).await, Ok(7));
            assert_eq!(made.load(Ordering::SeqCst), attempt + 1);
        }
    }

    #[tokio::test]
    async fn a_hung_executor_keeps_its_slot_and_ends_the_process() {
        let (executors, _) = executors(2).await;
        let (release, wait) = std::sync::mpsc::channel::<()>();
        let (first, second) = (executors.slot().await.unwrap(), executors.slot().await.unwrap());
        let hung = executors.run(first, Duration::from_millis(20), 0, move |_| wait.recv()).await;
        assert!(matches!(hung, Err(ExecutorError::Hung)));
        assert!(executors.hung().is_cancelled());
        assert_eq!(executors.run(second, LIMIT, 0, |_| 7).await, Ok(7), "the others finish their work");
        assert!(executors.slot().await.is_none(), "no new work begins");
        drop(release);
    }

    #[tokio::test]
    async fn who_queued_first_is_first_though_nobody_has_waited_yet() {
        let (executors, _) = executors(1).await;
        let busy = executors.slot().await;
        let turn = executors.turn(Lane::Bulk);
        let mut later = std::pin::pin!(executors.slot());
        assert!(poll!(&mut later).is_pending());
        drop(busy);
        assert!(poll!(&mut later).is_pending(), "who came later was served first");
        let first = turn.await;
        assert!(first.is_some());
        drop(first);
        assert!(later.await.is_some());
        assert!(executors.turn(Lane::Bulk).await.is_some(), "a turn that came at once is kept");
    }

    /// Bulk never gets a reserved executor; an interactive job gets whichever is free first.
    #[tokio::test]
    async fn a_reserved_executor_is_for_interactive_jobs() {
        let factory: Factory = Arc::new(|| Ok(Box::new(Silent)));
        let one = NonZeroUsize::new(1).unwrap();
        let executors = Executors::start(one, Some(one), &[factory], &Decoding::Here).await.unwrap();
        let busy = executors.turn(Lane::Bulk).await.unwrap();
        let mut bulk = executors.turn(Lane::Bulk);
        assert!(poll!(&mut bulk).is_pending());
        let reserved = executors.turn(Lane::Interactive).await.unwrap();
        assert!(executors.reserved_now().is_none() && poll!(&mut bulk).is_pending());
        let mut interactive = executors.turn(Lane::Interactive);
        assert!(poll!(&mut interactive).is_pending());
        assert_eq!(executors.run(reserved, LIMIT, 0, |_| 7).await, Ok(7));
        let reserved = interactive.await.unwrap();
        assert!(poll!(&mut bulk).is_pending());
        drop(bulk);
        let interactive = executors.turn(Lane::Interactive);
        assert_eq!(executors.run(busy, LIMIT, 0, |_| 7).await, Ok(7));
        let shared = interactive.await.unwrap();
        assert!(executors.reserved_now().is_none());
        drop((reserved, shared));
        assert!(executors.reserved_now().is_some());
        executors.hung.cancel();
        assert!(executors.reserved_now().is_none() && executors.turn(Lane::Interactive).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_next_free_executor_is_foreseen_from_what_work_took() {
        let ms = Duration::from_millis;
        let (executors, _) = executors(1).await;
        let soon = |lead| timeout(ms(60_000), executors.soon_free(lead));
        assert!(soon(ms(0)).await.is_err(), "nobody works");
        let first = Instant::now();
        executors.all.pace.begin(first);
        assert!(soon(ms(0)).await.is_err(), "nothing is known");
        executors.all.pace.end(first, first + ms(100));
        let (long_ago, now) = (Instant::now(), Instant::now() + ms(1));
        executors.all.pace.begin(long_ago);
        executors.all.pace.begin(now);
        assert!(!executors.is_soon_free(ms(99)) && executors.is_soon_free(ms(100)));
        soon(ms(20)).await.unwrap();
        assert_eq!(Instant::now(), long_ago + ms(80));
        executors.all.pace.end(long_ago, long_ago + ms(200));
        soon(ms(0)).await.unwrap();
        assert_eq!(Instant::now(), now + ms(125), "three parts of what was usual, one of the last");
        executors.all.pace.end(now, now);
        let begun = async {
            tokio::task::yield_now().await;
            executors.all.pace.begin(Instant::now());
        };
        let (waited, ()) = tokio::join!(soon(ms(1_000)), begun);
        waited.unwrap();
    }

    #[tokio::test]
    async fn a_slot_is_free_again_when_its_work_is_done() {
        let (executors, _) = executors(2).await;
        for round in 0..100 {
            let slot = executors.slot().await.unwrap();
            assert_eq!(executors.run(slot, LIMIT, 0, move |_| round).await, Ok(round));
        }
    }

    /// What one model does to its engine costs the others nothing.
    #[tokio::test]
    async fn each_model_has_an_engine_of_its_own() {
        let made = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let factories = made.clone().map(|counter| -> Factory {
            Arc::new(move || {
                counter.fetch_add(1, Ordering::SeqCst);
                Ok(Box::new(Silent))
            })
        });
        let one = NonZeroUsize::new(1).unwrap();
        let executors = Executors::start(one, None, &factories, &Decoding::Here).await.unwrap();
        for (model, expected) in [(1, [1, 1]), (0, [1, 2]), (1, [1, 2])] {
            let slot = executors.slot().await.unwrap();
            assert_eq!(executors.run(slot, LIMIT, model, |_| 7).await, Ok(7));
            assert_eq!(made.each_ref().map(|count| count.load(Ordering::SeqCst)), expected);
            if expected == [1, 1] {
                let slot = executors.slot().await.unwrap();
                let lost = executors.run(slot, LIMIT, model, |_| -> u32 { panic!("as planned") }).await;
                assert_eq!(lost, Err(ExecutorError::Panicked));
                let slot = executors.slot().await.unwrap();
                assert_eq!(executors.run(slot, LIMIT, model, |_| 7).await, Ok(7));
            }
        }
        let slot = executors.slot().await.unwrap();
        assert_eq!(executors.run(slot, LIMIT, 2, |_| 7).await, Err(ExecutorError::Panicked));
    }

    #[tokio::test]
    async fn an_engine_that_cannot_be_made_is_an_error_at_start() {
        let factory: Factory = Arc::new(|| Err(EngineError::Misfit("as planned".into())));
        let failed = Executors::start(NonZeroUsize::new(2).unwrap(), None, &[factory], &Decoding::Here).await;
        assert!(matches!(failed, Err(EngineError::Misfit(_))));
    }
}
