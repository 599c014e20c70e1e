//! The checker of every fault test: the sets of Jepsen's queue test.
//!
//! **lost** = acknowledged − ended, **unexpected** = recorded − attempted: both must be empty. Every job has one
//! result, is billed once and only with a report, and a job that was never acknowledged is absent or has ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dermflow_schemas::queue;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::interval,
};
use tokio_postgres::Row;

use crate::{
    client::{Client, sample},
    form::scale,
    lab::Lab,
    wait::eventually,
};

/// How long a client goes on with an order that is refused.
const PATIENCE: Duration = Duration::from_mins(2);
/// Between two tries of a client that was refused.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How many of the acknowledged jobs are read back over HTTPS in the short form, in the long one all; the others are
/// looked up in the record.
const READ_BACK: usize = 50;
/// How long one of them may be answered with 429 or 503.
const READ_WITHIN: Duration = Duration::from_secs(10);
/// How many of them at once.
const READERS: usize = 8;

/// What clients have tried, and what they were promised. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Ledger(Arc<Mutex<Sets>>);

#[derive(Debug, Default)]
struct Sets {
    attempted: BTreeSet<String>,
    acknowledged: BTreeMap<String, String>,
    /// How often each status was the answer; 0 for none.
    refusals: BTreeMap<u16, u64>,
    slowest_refusal: Duration,
}

/// What came of everything.
#[derive(Debug)]
pub struct Tally {
    /// Orders that were tried.
    pub attempted: usize,
    /// Orders that were promised.
    pub acknowledged: usize,
    /// Jobs with a report.
    pub succeeded: usize,
    /// Jobs that failed, by error code, with their ids.
    pub failed: BTreeMap<String, Vec<String>>,
    /// Attempts beyond the first, of all jobs together.
    pub repeated: i64,
    /// Requests that were refused with 429 or 503, or got no answer.
    pub refusals: u64,
}

/// A request that differs from every other by its order number.
pub fn order(n: usize) -> Value {
    let mut request = sample("isic2017-nv.jpg");
    let identifier = json!({"name": "identifier", "valueIdentifier": {"value": format!("ORD-{n}")}});
    request["parameter"].as_array_mut().expect("a list").push(identifier);
    request
}

impl Ledger {
    fn sets(&self) -> MutexGuard<'_, Sets> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tries order `n` once, without waiting for its result. `None` when it is refused in a way that permits
    /// another try with the same key, or gets no answer.
    ///
    /// # Errors
    /// When it is refused for good, or acknowledged as another job than before.
    pub async fn attempt(&self, client: &Client, n: usize) -> Result<Option<String>> {
        let key = format!("order-{n}");
        self.sets().attempted.insert(key.clone());
        let headers = [("prefer", "respond-async"), ("idempotency-key", key.as_str())];
        let begun = Instant::now();
        let answer = client.analyze(&order(n), &headers).await;
        let job = match answer {
            // 200 when it is done already: the answer names the report, whose id is the job's.
            Ok(answer) if [200, 202].contains(&answer.status) => answer.job().to_owned(),
            Ok(answer) if ![429, 503].contains(&answer.status) => {
                bail!("order {n}: {} {}", answer.status, answer.text)
            }
            answer => {
                let mut sets = self.sets();
                *sets.refusals.entry(answer.as_ref().map_or(0, |answer| answer.status)).or_default() += 1;
                if answer.is_ok() {
                    sets.slowest_refusal = sets.slowest_refusal.max(begun.elapsed());
                }
                return Ok(None);
            }
        };
        let before = self.sets().acknowledged.insert(key, job.clone());
        ensure!(before.as_ref().is_none_or(|before| *before == job), "order {n} was {before:?}, is {job}");
        Ok(Some(job))
    }

    /// Tries order `n` until it is acknowledged, as a careful client does.
    ///
    /// # Errors
    /// When it is not within two minutes, or refused for good.
    pub async fn submit(&self, client: &Client, n: usize) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(job) = self.attempt(client, n).await? {
                return Ok(job);
            }
            ensure!(Instant::now() < deadline, "order {n} was not accepted within {PATIENCE:?}");
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    }

    /// Submits a range of orders, `at_once` at a time.
    ///
    /// # Errors
    /// As [`Ledger::submit`].
    pub async fn submit_all(
        &self,
        client: &Client,
        orders: Range<usize>,
        at_once: usize,
    ) -> Result<Vec<String>> {
        stream::iter(orders).map(|n| self.submit(client, n)).buffered(at_once).try_collect().await
    }

    /// Submits orders from number `from` on, `per_second` at most, until the load is ended.
    pub fn load(&self, client: &Client, from: usize, per_second: u64) -> Load {
        let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(from)));
        let mut clients = JoinSet::new();
        for _ in 0..LOAD_CLIENTS {
            let (ledger, client, stop, next) = (self.clone(), client.clone(), stop.clone(), next.clone());
            clients.spawn(async move {
                let mut pace = interval(Duration::from_secs(LOAD_CLIENTS) / per_second as u32);
                while !stop.load(Ordering::Relaxed) {
                    pace.tick().await;
                    ledger.submit(&client, next.fetch_add(1, Ordering::Relaxed)).await?;
                }
                Ok(())
            });
        }
        Load { ledger: self.clone(), stop, clients }
    }

    /// Orders that were promised so far.
    pub fn acknowledged(&self) -> usize {
        self.sets().acknowledged.len()
    }

    /// Requests that were refused or got no answer so far.
    pub fn refusals(&self) -> u64 {
        self.sets().refusals.values().sum()
    }

    /// The statuses of these refusals; 0 when one got no answer.
    pub fn refused_with(&self) -> Vec<u16> {
        self.sets().refusals.keys().copied().collect()
    }

    /// The longest that a refusal took so far.
    pub fn slowest_refusal(&self) -> Duration {
        self.sets().slowest_refusal
    }

    /// Forgets the refusals so far.
    pub fn reset_refusals(&self) {
        let mut sets = self.sets();
        (sets.refusals, sets.slowest_refusal) = (BTreeMap::new(), Duration::ZERO);
    }

    /// Waits until every job has ended, `within` at most, then checks all sets; prints and returns what it
    /// counted. An acknowledged job may have failed only with one of the codes `allowed`.
    ///
    /// # Errors
    /// With what is lost, unexpected, doubled, open or failed.
    pub async fn check(&self, lab: &Lab, allowed: &[&str], within: Duration) -> Result<Tally> {
        let open = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";
        let settled = async || (lab.count(open).await.ok()? == 0).then_some(());
        if let Err(late) = eventually("every job has ended", within, settled).await {
            let open = "SELECT id::text || ' ' || state || ' ' || attempts FROM ingress.jobs \
                        WHERE finished_at IS NULL LIMIT 10";
            let open: Vec<String> = lab.sql(open).await?.iter().map(|row| row.get(0)).collect();
            bail!("{late}; open: {open:?}");
        }
        let rows = "SELECT j.id::text, k.key, j.failure->>'code', j.state, j.attempts::bigint, r.job IS NOT NULL \
                    FROM ingress.jobs j LEFT JOIN ingress.idempotency_keys k ON k.job = j.id \
                    LEFT JOIN ingress.reports r ON r.job = j.id";
        let (tally, succeeded) = self.compare(&lab.sql(rows).await?, allowed)?;
        let billed = lab.count("SELECT coalesce(sum(jobs), 0)::bigint FROM ingress.usage").await?;
        ensure!(billed == tally.succeeded as i64, "{billed} billed of {}", tally.succeeded);
        self.read_back(lab, &succeeded).await?;
        // A damaged message stays: the broker counts it, and can neither read nor remove it.
        let damaged = tally.failed.get("payload-lost").map_or(0, Vec::len) as u64;
        let emptied = async || {
            let (jobs, results) = (lab.messages("JOBS").await.ok()?, lab.messages("RESULTS").await.ok()?);
            (jobs + results <= damaged).then_some(())
        };
        eventually("the queue is empty", within, emptied).await?;
        println!("{tally:?}");
        Ok(tally)
    }

    /// The tally, and the jobs with a report.
    fn compare(&self, rows: &[Row], allowed: &[&str]) -> Result<(Tally, BTreeSet<String>)> {
        let (mut reports, mut ended) = (BTreeSet::new(), BTreeMap::new());
        let (mut failed, mut repeated, mut unexpected) =
            (BTreeMap::<String, Vec<String>>::new(), 0, Vec::new());
        let sets = self.sets();
        let promised: BTreeSet<&String> = sets.acknowledged.values().collect();
        for row in rows {
            let (job, key): (String, Option<String>) = (row.get(0), row.get(1));
            let (code, state, attempts): (Option<String>, String, i64) = (row.get(2), row.get(3), row.get(4));
            ensure!(
                row.get::<_, bool>(5) == (state == "succeeded"),
                "{job}: {state}, report: {}",
                state != "succeeded"
            );
            // The key of a job that never was in the queue is free again.
            if key.as_ref().map_or(promised.contains(&job), |key| !sets.attempted.contains(key)) {
                unexpected.push(format!("{job} {key:?} {state}"));
            }
            if state == "succeeded" {
                reports.insert(job.clone());
            }
            if let Some(code) = code {
                if promised.contains(&job) {
                    ensure!(allowed.contains(&code.as_str()), "{job} was acknowledged and failed: {code}");
                }
                failed.entry(code).or_default().push(job.clone());
            }
            repeated += (attempts - 1).max(0);
            ended.insert(job, state);
        }
        let lost: Vec<_> = promised.iter().filter(|job| !ended.contains_key(**job)).collect();
        ensure!(lost.is_empty(), "lost: {lost:?}");
        ensure!(unexpected.is_empty(), "unexpected: {unexpected:?}");
        let tally = Tally {
            attempted: sets.attempted.len(),
            acknowledged: sets.acknowledged.len(),
            succeeded: reports.len(),
            failed,
            repeated,
            refusals: sets.refusals.values().sum(),
        };
        ensure!(promised.len() == tally.acknowledged, "two orders are one job");
        Ok((tally, reports))
    }

    /// Reads acknowledged jobs as their client does: one that succeeded has its own report, another one says why not.
    async fn read_back(&self, lab: &Lab, succeeded: &BTreeSet<String>) -> Result<()> {
        let jobs: Vec<String> = self.sets().acknowledged.values().cloned().collect();
        let step = scale((jobs.len() / READ_BACK).max(1), 1);
        let reads = jobs.iter().step_by(step).map(|job| read(lab, job, succeeded.contains(job)));
        stream::iter(reads).buffer_unordered(READERS).try_collect().await
    }
}

async fn read(lab: &Lab, job: &str, succeeded: bool) -> Result<()> {
    if !succeeded {
        let answer = lab.client().poll(job, READ_WITHIN).await?;
        ensure!(![200, 404].contains(&answer.status), "{job} failed: {} {}", answer.status, answer.text);
        return Ok(());
    }
    // No poll: of those a client has fewer a minute than the long form has jobs.
    let path = format!("/fhir/DiagnosticReport/{job}");
    let there =
        async || lab.client().get(&path).await.ok().filter(|answer| ![429, 503].contains(&answer.status));
    let answer = eventually(&path, READ_WITHIN, there).await?;
    let same = answer.body["id"] == job;
    ensure!(answer.status == 200 && same, "{job} succeeded: {} {}", answer.status, answer.text);
    Ok(())
}

/// Clients of a [`Load`].
const LOAD_CLIENTS: u64 = 8;

/// Clients that submit until they are told to end.
#[derive(Debug)]
pub struct Load {
    ledger: Ledger,
    stop: Arc<AtomicBool>,
    clients: JoinSet<Result<()>>,
}

impl Load {
    /// Goes on until `jobs` are acknowledged in all, then ends. Every order that was begun is acknowledged.
    ///
    /// # Errors
    /// When an order was not accepted.
    pub async fn end_after(mut self, jobs: usize) -> Result<()> {
        let enough = async || (self.ledger.acknowledged() >= jobs || self.clients.is_empty()).then_some(());
        let enough = eventually(&format!("{jobs} jobs are accepted"), Duration::from_mins(10), enough).await;
        self.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.clients.join_next().await {
            ended??;
        }
        enough
    }
}

/// Counts how often each job was begun by a worker, by the workers' own notes; sees nothing while the broker is away.
#[derive(Debug)]
pub struct Executions {
    counts: Arc<Mutex<BTreeMap<String, u32>>>,
    listening: JoinHandle<()>,
}

impl Executions {
    /// Begins to count.
    ///
    /// # Errors
    /// When the broker is away.
    pub async fn watch(lab: &Lab) -> Result<Self> {
        let client = lab.broker().await?;
        let mut notes = client.subscribe(queue::ALL_PROGRESS).await?;
        client.flush().await.context("the subscription is not there yet")?;
        let counts = Arc::<Mutex<BTreeMap<String, u32>>>::default();
        let shared = counts.clone();
        let listening = tokio::spawn(async move {
            while let Some(note) = notes.next().await {
                let job = note.subject.rsplit('.').next().unwrap_or_default().to_owned();
                *shared.lock().unwrap_or_else(PoisonError::into_inner).entry(job).or_default() += 1;
            }
            drop(client);
        });
        Ok(Self { counts, listening })
    }

    /// Jobs that were begun at least once, and those that were begun more than once.
    pub fn counts(&self) -> (usize, Vec<(String, u32)>) {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let repeated = counts.iter().filter(|(_, count)| **count > 1);
        (counts.len(), repeated.map(|(job, count)| (job.clone(), *count)).collect())
    }
}

impl Drop for Executions {
    fn drop(&mut self) {
        self.listening.abort();
    }
}
