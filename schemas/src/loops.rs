//! What goes on beside requests until the process is told to stop.

use std::{collections::HashMap, future::pending};

use tokio::task::{Id, JoinError, JoinSet};

/// Tasks of which none ends before it is told to: a process that has lost one is not what it says it is. Dropping them
/// ends them.
#[derive(Debug, Default)]
pub struct Loops {
    tasks: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

/// A loop ended that was not told to, or by a panic.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} {1}")]
pub struct Lost(&'static str, &'static str);

impl Loops {
    /// One more, by the name that it is known by when it is lost.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.names.insert(self.tasks.spawn(task).id(), name);
    }

    /// Returns as soon as one has ended. Cancel safe.
    pub async fn lost(&mut self) -> Lost {
        match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => Lost(self.name(id), "ended"),
            Some(Err(error)) => self.broken(&error),
            None => pending().await,
        }
    }

    /// Waits for all of them, when they have been told to end.
    ///
    /// # Errors
    /// When one panicked.
    pub async fn ended(mut self) -> Result<(), Lost> {
        let mut ended = Ok(());
        while let Some(task) = self.tasks.join_next_with_id().await {
            if let Err(error) = task {
                ended = Err(self.broken(&error));
            }
        }
        ended
    }

    fn broken(&self, error: &JoinError) -> Lost {
        Lost(self.name(error.id()), if error.is_panic() { "panicked" } else { "was cancelled" })
    }

    fn name(&self, id: Id) -> &'static str {
        self.names.get(&id).copied().unwrap_or("a loop")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{sync::oneshot, time::timeout};

    use super::*;

    #[tokio::test]
    async fn a_loop_that_panics_or_ends_is_lost() {
        let mut loops = Loops::default();
        let (panics, panicking) = oneshot::channel();
        let (ends, ending) = oneshot::channel();
        loops.spawn("the recorder", async { panicking.await.unwrap() });
        loops.spawn("the sweeper", async { ending.await.unwrap() });
        loops.spawn("the keeper", pending());
        assert!(timeout(Duration::from_millis(1), loops.lost()).await.is_err(), "all of them go on");
        drop(panics);
        assert_eq!(loops.lost().await.to_string(), "the recorder panicked");
        ends.send(()).unwrap();
        assert_eq!(loops.lost().await.to_string(), "the sweeper ended");
    }

    #[tokio::test]
    async fn those_that_were_told_to_end_are_waited_for() {
        let mut loops = Loops::default();
        let (end, ended) = oneshot::channel();
        loops.spawn("the recorder", async { ended.await.unwrap() });
        let mut waiting = tokio::spawn(loops.ended());
        assert!(timeout(Duration::from_millis(1), &mut waiting).await.is_err());
        end.send(()).unwrap();
        assert_eq!(waiting.await.unwrap(), Ok(()));
        let mut loops = Loops::default();
        loops.spawn("the sweeper", async { panic!("at its end") });
        loops.spawn("the keeper", async {});
        assert_eq!(loops.ended().await.unwrap_err().to_string(), "the sweeper panicked");
    }
}
