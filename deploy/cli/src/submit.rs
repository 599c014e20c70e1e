//! `dermflow submit`: many images as one batch, and their results in one file.
//!
//! [`Submission`] is the whole of it without a terminal.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::Duration,
};

use futures_util::future::try_join_all;
use serde::Serialize;
use tokio::{
    sync::Mutex,
    task::spawn_blocking,
    time::{Instant, interval},
};
use uuid::Uuid;

use crate::{
    Failure, access::Api, follow::Follower, inputs::Inputs, ledger::Ledger, ndjson::AppendFile,
    pace::Patience, progress::Counters, upload::Uploader, work::Work,
};

/// Between two times that the result file is brought to disk. What a power cut takes is fetched again.
const SYNC_EVERY: Duration = Duration::from_secs(1);

/// What to submit, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The images; none to follow [`Options::batch`] only.
    pub inputs: Inputs,
    /// The result file; its journal is beside it.
    pub out: PathBuf,
    /// Parallel uploads.
    pub concurrency: usize,
    /// Files that one upload has sent and the server has not answered yet.
    pub in_flight: usize,
    /// The patient's identifier, for all images.
    pub subject: Option<String>,
    /// The batch to add to or to follow, instead of a new one.
    pub batch: Option<Uuid>,
    /// Whether to wait for the results.
    pub wait: bool,
    /// How long to go on while no request succeeds.
    pub patience: Duration,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The batch; absent when no image was fit to be sent.
    pub batch: Option<Uuid>,
    /// Files.
    pub files: u64,
    /// Files that the server accepted.
    pub accepted: u64,
    /// Files with a report.
    pub succeeded: u64,
    /// Files whose job failed or was cancelled.
    pub failed: u64,
    /// Files that never became a job.
    pub refused: u64,
    /// Requests and lines that this run repeated.
    pub retries: u64,
    /// Bytes of request lines that this run sent.
    pub bytes: u64,
    /// Seconds that this run took.
    pub seconds: f64,
    /// How soon files were accepted; absent when this run sent none.
    pub acceptance: Option<Acceptance>,
    /// The result file.
    pub out: PathBuf,
}

/// How soon the files that this run sent were accepted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Acceptance {
    /// How many.
    pub files: usize,
    /// Seconds from the beginning of the run to the last of them.
    pub seconds: f64,
    /// Milliseconds from the first byte of a file on its way to the answer: the middle one.
    pub p50_ms: f64,
    /// 99 of 100 were not slower.
    pub p99_ms: f64,
    /// The slowest one.
    pub max_ms: f64,
}

impl Acceptance {
    fn of(begin: Instant, accepted: &[(Duration, Instant)]) -> Option<Self> {
        let last = accepted.iter().map(|(_, at)| *at).max()?;
        let mut ms: Vec<f64> = accepted.iter().map(|(took, _)| took.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let percentile =
            |percent: usize| ms.get(((ms.len() * percent).div_ceil(100)).saturating_sub(1)).copied();
        Some(Self {
            files: ms.len(),
            seconds: (last - begin).as_secs_f64(),
            p50_ms: percentile(50)?,
            p99_ms: percentile(99)?,
            max_ms: percentile(100)?,
        })
    }
}

impl Summary {
    /// The exit code of the process: 0 when every file went well, else 1.
    pub fn exit_code(&self) -> u8 {
        u8::from(self.failed + self.refused > 0)
    }
}

/// A submission whose result file and journal are open, and read.
#[derive(Debug)]
pub struct Submission {
    begin: Instant,
    work: Work,
    options: Options,
}

impl Submission {
    /// Opens the files. What an earlier run has done is in `counters` when this returns.
    ///
    /// # Errors
    /// [`Failure::Usage`] when there is nothing to do, or the result file belongs to other inputs.
    pub fn open(options: Options, counters: Arc<Counters>) -> Result<Self, Failure> {
        let begin = Instant::now();
        let Options { inputs, out, subject, batch, .. } = &options;
        if inputs.items.is_empty() && batch.is_none() {
            return Err(Failure::Usage("there are no images to submit".into()));
        }
        let ledger = Ledger::open(out, inputs, subject.as_deref(), *batch, counters.clone())?;
        Ok(Self { begin, work: Work::new(ledger, counters), options })
    }

    /// Submits what is not submitted yet, and writes one line a file into the result file. Repeated after any end,
    /// also that of the process, it goes on where it was; what is done already costs no request.
    ///
    /// # Errors
    /// [`Failure::Unfinished`] when the server cannot be reached, does not let us in, or cannot give what it should.
    pub async fn run(self, api: &Api) -> Result<Summary, Failure> {
        let Self { begin, work, options } = self;
        let Options { inputs, out, concurrency, in_flight, subject, wait, patience, .. } = options;
        let follows = inputs.items.is_empty();
        let patience = Patience::new(patience);
        let connections = concurrency.min(work.open()).max(1);
        let uploader = Uploader {
            api,
            work: &work,
            patience: &patience,
            inputs: Arc::new(inputs),
            subject: subject.map(Arc::from),
            in_flight,
            accepted: std::sync::Mutex::default(),
            opening: Mutex::default(),
        };
        // What is all done already needs no server, and a batch that is only followed is not ours to close.
        let done = work.unended() == 0;
        let upload = async {
            try_join_all((0..connections).map(|_| uploader.run())).await?;
            if done || follows { Ok(()) } else { uploader.close().await }
        };
        let collect = async {
            // Files that cannot be read are done without a batch.
            let batch = work.until(|work| {
                let nothing = !follows && work.unended() == 0;
                if nothing { Some(None) } else { work.batch().map(Some) }
            });
            match batch.await.filter(|_| wait) {
                Some(batch) => {
                    Follower { api, work: &work, patience: &patience, batch, whole: follows }.run().await
                }
                None => Ok(()),
            }
        };
        let outcome = tokio::select! {
            outcome = async { tokio::try_join!(upload, collect) } => outcome.map(drop),
            failure = keep_synced(work.files()) => Err(failure),
        };
        let synced = sync(work.files()).await;
        let accepted = uploader.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        let acceptance = Acceptance::of(begin, &accepted);
        outcome.and(synced)?;
        let counters = &work.counters;
        Ok(Summary {
            batch: work.batch(),
            files: counters.total.get(),
            accepted: counters.accepted.get(),
            succeeded: counters.succeeded.get(),
            failed: counters.failed.get(),
            refused: counters.refused.get(),
            retries: counters.retries.get(),
            bytes: counters.bytes.get(),
            seconds: begin.elapsed().as_secs_f64(),
            acceptance,
            out,
        })
    }
}

async fn keep_synced(files: [AppendFile; 2]) -> Failure {
    let mut ticks = interval(SYNC_EVERY);
    loop {
        ticks.tick().await;
        if let Err(failure) = sync(files.clone()).await {
            return failure;
        }
    }
}

async fn sync(files: [AppendFile; 2]) -> Result<(), Failure> {
    let synced = spawn_blocking(move || files.iter().try_for_each(AppendFile::sync)).await;
    let failed = |error: String| Failure::Unfinished(format!("cannot write the results: {error}"));
    synced.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_in_a_hundred_is_beyond_the_99th() {
        let begin = Instant::now();
        assert_eq!(Acceptance::of(begin, &[]), None);
        let ms = Duration::from_millis;
        let accepted: Vec<_> = (1..=200).map(|n| (ms(n), begin + ms(10 * n))).collect();
        let figures = Acceptance { files: 200, seconds: 2.0, p50_ms: 100.0, p99_ms: 198.0, max_ms: 200.0 };
        assert_eq!(Acceptance::of(begin, &accepted), Some(figures));
    }
}
