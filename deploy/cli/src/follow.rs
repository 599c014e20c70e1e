//! Reads the two lists of a batch as they grow, until every file has its line.

use std::time::Duration;

use reqwest::{Method, header};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{Failure, Stop, access::Api, ledger::List, ndjson::Lines, pace::Patience, work::Work};

/// Seconds for which the server holds a read that it has nothing for.
const WAIT: u32 = 20;
/// The least time between two reads that gave nothing.
const EMPTY_EVERY: Duration = Duration::from_secs(1);
/// Between two looks at whether the batch has ended.
const STATUS_EVERY: Duration = Duration::from_secs(3);
/// Reads of both lists after the end of the batch before a file without a line is given up.
const LAST_READS: u32 = 3;

/// What reads a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Follower<'a> {
    pub(crate) api: &'a Api,
    pub(crate) work: &'a Work,
    pub(crate) patience: &'a Patience,
    pub(crate) batch: Uuid,
    /// The batch has files that we do not know: only its own end is the end.
    pub(crate) whole: bool,
}

impl Follower<'_> {
    /// Returns when every file has its line.
    ///
    /// # Errors
    /// When going on makes no sense, or the batch ended and some file has none.
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let done = self.work.until(|work| (!self.whole && work.unended() == 0).then_some(()));
        tokio::select! {
            () = done => return Ok(()),
            failure = self.stream(List::Results) => return Err(failure),
            failure = self.stream(List::Errors) => return Err(failure),
            ended = self.end() => ended?,
        }
        for _ in 0..LAST_READS {
            self.drain(List::Results).await?;
            self.drain(List::Errors).await?;
            if self.work.unended() == 0 {
                return Ok(());
            }
            sleep(STATUS_EVERY).await;
        }
        let (missing, batch) = (self.work.unended(), self.batch);
        Err(Failure::Unfinished(format!(
            "batch {batch} has ended, and the server has neither result nor error for {missing} of the files"
        )))
    }

    /// Reads a list for as long as it is not dropped.
    async fn stream(&self, list: List) -> Failure {
        loop {
            let begin = Instant::now();
            match self.persistently(list, WAIT).await {
                Ok(0) => sleep(EMPTY_EVERY.saturating_sub(begin.elapsed())).await,
                Ok(_) => {}
                Err(failure) => return failure,
            }
        }
    }

    /// Reads what there is.
    async fn drain(&self, list: List) -> Result<(), Failure> {
        while self.persistently(list, 0).await? > 0 {}
        Ok(())
    }

    /// One read that went well; the number of its lines.
    async fn persistently(&self, list: List, wait: u32) -> Result<usize, Failure> {
        let mut step = 0;
        loop {
            match self.read(list, wait).await {
                Ok(lines) => {
                    self.patience.alive();
                    return Ok(lines);
                }
                Err(Stop::Failure(failure)) => return Err(failure),
                Err(Stop::Trouble(trouble)) => {
                    step += 1;
                    self.patience.rest(trouble, step, &self.work.counters).await?;
                }
            }
        }
    }

    async fn read(&self, list: List, wait: u32) -> Result<usize, Stop> {
        let name = match list {
            List::Results => "results",
            List::Errors => "errors",
        };
        let cursor = self.work.cursor(list);
        let path = format!("/batches/{}/{name}?cursor={cursor}&wait={wait}", self.batch);
        let accept =
            |request: reqwest::RequestBuilder| request.header(header::ACCEPT, "application/x-ndjson");
        let mut lines = Lines::new(self.api.send(Method::GET, &path, accept).await?);
        let mut count = 0;
        while let Some(line) = lines.next_soon().await? {
            self.work.ended(list, line)?;
            count += 1;
        }
        if self.work.open() == 0 {
            self.work.counters.say("");
        }
        Ok(count)
    }

    /// Returns when nothing more can come: all is submitted, and the server has ended every job of the batch.
    async fn end(&self) -> Result<(), Failure> {
        self.work.until(|work| (work.open() == 0).then_some(())).await;
        let mut step = 0;
        loop {
            match self.api.get_once(&format!("/batches/{}", self.batch)).await {
                Ok(batch) => {
                    step = 0;
                    if matches!(
                        batch["status"].as_str(),
                        Some("completed" | "completed-with-errors" | "cancelled")
                    ) {
                        return Ok(());
                    }
                }
                Err(trouble) => {
                    step += 1;
                    self.patience.rest(trouble, step, &self.work.counters).await?;
                }
            }
            sleep(STATUS_EVERY).await;
        }
    }
}
