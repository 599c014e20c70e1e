//! What the connections of one submission share: the files to send, and when the next one may go.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use uuid::Uuid;

use crate::{
    Failure,
    ledger::{Ledger, List},
    ndjson::AppendFile,
    pace::{chance, pause},
    progress::Counters,
};

/// The queue of files, and the ledger that says when there is nothing more to do.
#[derive(Debug)]
pub(crate) struct Work {
    state: Mutex<State>,
    changed: Notify,
    pub(crate) counters: Arc<Counters>,
}

#[derive(Debug)]
struct State {
    ledger: Ledger,
    queue: VecDeque<usize>,
    /// The server has asked to be left alone until then.
    hold: Option<Instant>,
    /// Refusals since the last acceptance that asked for patience.
    refusals: u32,
}

/// What the queue has to give.
enum Next {
    Item(usize),
    NotBefore(Instant),
    /// Other connections have the rest in hand.
    Nothing,
    /// Every file is accepted or refused for good.
    Settled,
}

impl State {
    fn next(&mut self) -> Next {
        if self.ledger.open == 0 {
            return Next::Settled;
        }
        if self.queue.is_empty() {
            return Next::Nothing;
        }
        match self.hold.filter(|hold| *hold > Instant::now()) {
            Some(hold) => Next::NotBefore(hold),
            None => self.queue.pop_front().map_or(Next::Nothing, Next::Item),
        }
    }
}

impl Work {
    pub(crate) fn new(ledger: Ledger, counters: Arc<Counters>) -> Self {
        let queue = ledger.to_send().collect();
        let state = State { ledger, queue, hold: None, refusals: 0 };
        Self { state: Mutex::new(state), changed: Notify::new(), counters }
    }

    /// The next file; `None` when there is none before `deadline`, or none ever.
    pub(crate) async fn take(&self, deadline: Option<Instant>) -> Option<usize> {
        // "For ever" is a day, after which one looks again.
        let limit = || deadline.unwrap_or_else(|| Instant::now() + Duration::from_hours(24));
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let next = self.state().next();
            let until = match next {
                Next::Item(item) => return Some(item),
                Next::Settled => return None,
                Next::NotBefore(hold) => hold.min(limit()),
                Next::Nothing => limit(),
            };
            let _ = timeout_at(until, changed).await;
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return None;
            }
        }
    }

    /// Files whose outcome is unknown go first in the next upload.
    pub(crate) fn give_back(&self, items: impl IntoIterator<Item = usize>) {
        self.update(|state| items.into_iter().for_each(|item| state.queue.push_front(item)));
    }

    /// The server asks to offer a file again later; so the others wait too.
    pub(crate) fn again(&self, item: usize, after: Option<Duration>) {
        self.counters.retries.add(1);
        self.update(|state| {
            state.queue.push_back(item);
            let waiting = state.hold.is_some_and(|hold| hold > Instant::now());
            // Lines that were under way together are refused together: that is one refusal.
            state.refusals += u32::from(!waiting);
            let hold = Instant::now() + pause(state.refusals, after, chance());
            state.hold = Some(state.hold.map_or(hold, |known| known.max(hold)));
        });
    }

    /// The server has accepted a file.
    pub(crate) fn accepted(&self, item: usize, job: Option<String>) -> Result<(), Failure> {
        self.update(|state| {
            state.refusals = 0;
            state.ledger.accepted(item, job)
        })
    }

    /// A file will never become a job.
    pub(crate) fn refused(&self, item: usize, error: &Value) -> Result<(), Failure> {
        self.update(|state| state.ledger.refused(item, error))
    }

    /// A line of the server's lists.
    pub(crate) fn ended(&self, list: List, text: &[u8]) -> Result<(), Failure> {
        self.update(|state| state.ledger.ended(list, text))
    }

    /// The server has named the batch.
    pub(crate) fn named(&self, batch: Uuid) -> Result<(), Failure> {
        self.update(|state| state.ledger.named(batch))
    }

    pub(crate) fn key(&self) -> Uuid {
        self.state().ledger.key
    }

    pub(crate) fn batch(&self) -> Option<Uuid> {
        self.state().ledger.batch
    }

    pub(crate) fn cursor(&self, list: List) -> u64 {
        self.state().ledger.cursor(list)
    }

    /// Files that are neither accepted nor refused for good.
    pub(crate) fn open(&self) -> usize {
        self.state().ledger.open
    }

    /// Files without a line.
    pub(crate) fn unended(&self) -> usize {
        self.state().ledger.unended
    }

    pub(crate) fn files(&self) -> [AppendFile; 2] {
        self.state().ledger.files()
    }

    /// Waits until `condition` gives a value; it is asked after every change.
    pub(crate) async fn until<T>(&self, condition: impl Fn(&Self) -> Option<T>) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(value) = condition(self) {
                return value;
            }
            changed.await;
        }
    }

    fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let value = change(&mut self.state());
        self.changed.notify_waiters();
        value
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::{inputs::Inputs, journal::tests::Folder};

    fn work(folder: &Folder, files: usize) -> Work {
        let inputs = Inputs::of_images((0..files).map(|n| (n.to_string(), Bytes::new()))).unwrap();
        let counters = Arc::<Counters>::default();
        let ledger = Ledger::open(&folder.path("out"), &inputs, None, None, counters.clone()).unwrap();
        Work::new(ledger, counters)
    }

    #[tokio::test]
    async fn a_connection_waits_for_what_others_have_in_hand() {
        let folder = Folder::new();
        let work = work(&folder, 2);
        assert_eq!((work.take(None).await, work.take(None).await), (Some(0), Some(1)));
        assert_eq!(work.take(Some(Instant::now())).await, None);
        let (taken, ()) = tokio::join!(work.take(None), async { work.give_back([0]) });
        assert_eq!(taken, Some(0));
        work.accepted(0, None).unwrap();
        let (taken, ()) = tokio::join!(work.take(None), async {
            work.refused(1, &json!({})).unwrap();
        });
        assert_eq!(taken, None, "everything is settled");
        assert_eq!((work.open(), work.unended()), (0, 1));
    }

    #[tokio::test]
    async fn a_server_that_is_full_is_left_alone_for_as_long_as_it_asks() {
        let folder = Folder::new();
        let work = work(&folder, 3);
        let item = work.take(None).await.unwrap();
        let (begin, asked) = (Instant::now(), Duration::from_millis(400));
        work.again(item, Some(asked));
        assert_eq!(work.take(Some(begin + asked / 4)).await, None);
        assert_eq!(work.take(None).await, Some(1));
        assert!(begin.elapsed() >= asked);
        assert_eq!((work.take(None).await, work.take(None).await), (Some(2), Some(item)));
    }
}
