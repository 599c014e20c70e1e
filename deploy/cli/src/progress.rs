//! Counters that a submission keeps, and the two ways to show them.

use std::{
    fmt::Write,
    io::{IsTerminal, stderr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, interval, sleep};

/// Between two looks at the counters for the bar.
const BAR_EVERY: Duration = Duration::from_millis(200);
/// Between two lines where there is no terminal: a log of an hour has 360 of them.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A number that tasks add to and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where a submission stands; files, unless it says otherwise.
#[derive(Debug, Default)]
pub struct Counters {
    /// Files in all.
    pub total: Counter,
    /// Files that the server has accepted, those of earlier runs included.
    pub accepted: Counter,
    /// Jobs that ended with a report.
    pub succeeded: Counter,
    /// Jobs that ended without one.
    pub failed: Counter,
    /// Files that never became a job.
    pub refused: Counter,
    /// Requests and lines that were sent again, or will be.
    pub retries: Counter,
    /// Bytes of request lines handed to the network by this run.
    pub bytes: Counter,
    message: Mutex<String>,
}

impl Counters {
    /// Files with a line in the result file.
    pub fn ended(&self) -> u64 {
        self.succeeded.get() + self.failed.get() + self.refused.get()
    }

    pub(crate) fn say(&self, message: impl Into<String>) {
        *self.message.lock().unwrap_or_else(PoisonError::into_inner) = message.into();
    }

    /// What is being waited for; empty while all goes well.
    pub fn message(&self) -> String {
        self.message.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Shows the counters on standard error, as a bar on a terminal and as lines elsewhere, until it is dropped.
pub async fn show(counters: Arc<Counters>) {
    if stderr().is_terminal() { bar(&counters).await } else { lines(&counters).await }
}

async fn bar(counters: &Counters) {
    let bar = ProgressBar::new(0);
    let template = "{wide_bar} {pos}/{len} {per_sec} {eta} {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    // What an earlier run has done does not count for the rate.
    bar.set_position(counters.ended());
    bar.reset_eta();
    let mut ticks = interval(BAR_EVERY);
    loop {
        ticks.tick().await;
        bar.set_length(counters.total.get());
        bar.set_position(counters.ended());
        bar.set_message(detail(counters));
    }
}

async fn lines(counters: &Counters) {
    let (begin, before) = (Instant::now(), counters.ended());
    loop {
        sleep(LINE_EVERY).await;
        let ended = counters.ended();
        let rate = (ended - before.min(ended)) as f64 / begin.elapsed().as_secs_f64();
        let left = counters.total.get().saturating_sub(ended);
        let eta = if rate > 0.0 { format!("{:.0} s left", left as f64 / rate) } else { "waiting".into() };
        eprintln!("{ended}/{} done, {rate:.1}/s, {eta}, {}", counters.total.get(), detail(counters));
    }
}

fn detail(counters: &Counters) -> String {
    let mut text = format!("{} accepted", counters.accepted.get());
    let faults = counters.failed.get() + counters.refused.get();
    if faults > 0 {
        let _ = write!(text, ", {faults} failed");
    }
    let message = counters.message();
    if message.is_empty() { text } else { format!("{text} ({message})") }
}
