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

/// Shows the counters on standard error, as a bar on a terminal and as lines elsewhere, until it is dropped. What
/// they hold when this is called was done by an earlier run, and does not count for the rate.
pub fn show(counters: Arc<Counters>) -> impl Future<Output = ()> {
    let since = Since::now(&counters);
    async move { if stderr().is_terminal() { bar(&counters, since).await } else { lines(&counters, since).await } }
}

/// From where on a rate is counted.
#[derive(Debug, Clone, Copy)]
struct Since {
    begin: Instant,
    ended: u64,
}

impl Since {
    fn now(counters: &Counters) -> Self {
        Self { begin: Instant::now(), ended: counters.ended() }
    }

    /// One line for a log.
    fn line(self, counters: &Counters, now: Instant) -> String {
        let (ended, total) = (counters.ended(), counters.total.get());
        let rate = (ended - self.ended) as f64 / (now - self.begin).as_secs_f64();
        let left = total.saturating_sub(ended);
        let eta = if rate > 0.0 { format!("{:.0} s left", left as f64 / rate) } else { "waiting".into() };
        format!("{ended}/{total} done, {rate:.1}/s, {eta}, {}", detail(counters))
    }
}

async fn bar(counters: &Counters, since: Since) {
    let bar = ProgressBar::new(0);
    let template = "{wide_bar} {pos}/{len} {per_sec} {eta} {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_position(since.ended);
    bar.reset_eta();
    let mut ticks = interval(BAR_EVERY);
    loop {
        ticks.tick().await;
        bar.set_length(counters.total.get());
        bar.set_position(counters.ended());
        bar.set_message(detail(counters));
    }
}

async fn lines(counters: &Counters, since: Since) {
    loop {
        sleep(LINE_EVERY).await;
        eprintln!("{}", since.line(counters, Instant::now()));
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::json;

    use super::*;
    use crate::{
        inputs::Inputs,
        journal::tests::Folder,
        ledger::{Ledger, List},
        submit::{Options, Submission},
    };

    #[test]
    fn what_an_earlier_run_has_done_does_not_count_for_the_rate() {
        let folder = Folder::new();
        let (out, names) = (folder.path("out"), (0..10).map(|n| (n.to_string(), Bytes::new())));
        let inputs = Inputs::of_images(names).unwrap();
        let mut earlier = Ledger::open(&out, &inputs, None, None, Arc::default()).unwrap();
        for n in 0..6 {
            let line = json!({"cursor": n + 1, "custom_id": n.to_string(), "job": "j", "report": {}});
            earlier.accepted(n, None).unwrap();
            earlier.ended(List::Results, line.to_string().as_bytes()).unwrap();
        }
        drop(earlier);

        let counters = Arc::<Counters>::default();
        let options = Options {
            inputs,
            out,
            concurrency: 1,
            in_flight: 1,
            subject: None,
            batch: None,
            wait: true,
            patience: Duration::ZERO,
        };
        let _submission = Submission::open(options, counters.clone()).unwrap();
        let since = Since::now(&counters);
        let after = |seconds| since.begin + Duration::from_secs(seconds);
        assert_eq!(since.line(&counters, after(10)), "6/10 done, 0.0/s, waiting, 6 accepted");
        counters.accepted.add(3);
        counters.succeeded.add(1);
        counters.refused.add(1);
        counters.say("the server is full");
        let line = "8/10 done, 0.1/s, 20 s left, 9 accepted, 1 failed (the server is full)";
        assert_eq!(since.line(&counters, after(20)), line);
    }
}
