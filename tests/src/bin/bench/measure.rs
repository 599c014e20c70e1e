//! Loops to compare with, and figures.

use std::{
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_local::{
    servers::{Given, Servers},
    stack::repo,
};
use dermflow_schemas::{
    envelope::{ImageEntry, Manifest, Payload},
    image::Format,
    limits::DECODE_DEADLINE,
};
use dermflow_tests::{client::Client, lab::Lab, wait::eventually};
use dermflow_workers::{
    analyse::analyse,
    child::Decoding,
    engine::{self, Factory, Runtime},
    model::Model,
};
use futures_util::{StreamExt, stream};
use tokio::task::JoinSet;

/// Images a second of `threads` loops, each with a session of its own.
pub(crate) fn bare(
    model: &Model,
    make: &Factory,
    threads: usize,
    payloads: &[Payload],
    time: Duration,
) -> Result<f64> {
    bare_decoding(&Decoding::Here, model, make, threads, payloads, time)
}

/// The same with another way to decode.
pub(crate) fn bare_decoding(
    decoding: &Decoding,
    model: &Model,
    make: &Factory,
    threads: usize,
    payloads: &[Payload],
    time: Duration,
) -> Result<f64> {
    let (done, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let mut engines = (0..threads).map(|_| make()).collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    thread::scope(|scope| {
        for engine in &mut engines {
            let (model, done, stop) = (model, &done, &stop);
            scope.spawn(move || {
                if decoding.enter().is_err() {
                    return;
                }
                for payload in payloads.iter().cycle() {
                    if stop.load(Ordering::Relaxed)
                        || analyse(&mut **engine, model, payload, 1, DECODE_DEADLINE, &|| false).is_err()
                    {
                        return;
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
    });
    Ok(done.load(Ordering::Relaxed) as f64 / begun.elapsed().as_secs_f64())
}

/// What a worker unpacks for one image file.
pub(crate) fn payload(file: Vec<u8>) -> Payload {
    let entry =
        ImageEntry { bytes: file.len(), format: Format::Jpeg, title: None, taken: None, body_site: None };
    Payload { manifest: Manifest::new(vec![entry], None, None), images: vec![file.into()] }
}

/// Images a second of the better of one loop and one a core, with the model of a folder.
pub(crate) async fn bare_rate(model: &Path, files: &[Vec<u8>]) -> Result<f64> {
    const BLOCK: Duration = Duration::from_secs(8);
    let cores = thread::available_parallelism()?.get();
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let model = Arc::new(Model::load(model, true)?);
    let make = engine::factory(&model, &Runtime::new(&servers.onnxruntime))?;
    let payloads: Vec<Payload> = files.iter().cloned().map(payload).collect();
    let one = bare(&model, &make, 1, &payloads, BLOCK)?;
    let all = bare(&model, &make, cores, &payloads, BLOCK)?;
    println!("bare loop: {one:.1} images/s on 1 thread, {all:.1} on {cores}");
    Ok(one.max(all))
}

/// Goals that were missed.
static MISSED: AtomicUsize = AtomicUsize::new(0);

/// Prints a figure with its goal, and whether it is met.
pub(crate) fn verdict(what: &str, figure: f64, met: bool, goal: &str) {
    MISSED.fetch_add(usize::from(!met), Ordering::Relaxed);
    let met = if met { "met" } else { "MISSED" };
    println!("{what}: {figure:.2} (goal: {goal}; {met})");
}

/// Every [`verdict`] was that its goal is met.
pub(crate) fn all_met() -> Result<()> {
    let missed = MISSED.load(Ordering::Relaxed);
    ensure!(missed == 0, "{missed} goal{} missed", if missed == 1 { "" } else { "s" });
    Ok(())
}

/// Sorts, and takes the value below which `percent` of them are; 0 when there are none.
pub(crate) fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get((values.len() * percent / 100).min(values.len().saturating_sub(1))).copied().unwrap_or(0.0)
}

/// Processor seconds, user and system, of every process of the system and of its children.
pub(crate) fn cpu_seconds(lab: &Lab) -> Result<Vec<(String, f64)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")? {
        // A process may end while it is looked at.
        if let Ok(stat) = fs::read_to_string(entry?.path().join("stat")) {
            let (id, rest) = stat.split_once(" (").context("stat")?;
            let fields: Vec<&str> = rest.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            // In USER_HZ, which is 100 on every architecture that we run on; living and ended threads of it.
            let ticks: f64 = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
            all.push((id.parse::<u32>()?, fields[1].parse::<u32>()?, ticks / 100.0));
        }
    }
    let of = |pid| all.iter().filter(|(id, parent, _)| *id == pid || *parent == pid).map(|(.., s)| s).sum();
    Ok(lab.pids().into_iter().map(|(name, pid)| (name, of(pid))).collect())
}

/// Peak resident memory of a process, in MB.
pub(crate) fn peak_rss_mb(pid: u32) -> Result<u64> {
    Ok(memory_kb(pid, "VmHWM:")? / 1024)
}

/// Resident memory of a process, in MB.
pub(crate) fn rss_mb(pid: u32) -> Result<f64> {
    Ok(memory_kb(pid, "VmRSS:")? as f64 / 1024.0)
}

fn memory_kb(pid: u32, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Makes the peak what is resident now (proc(5), `clear_refs`).
pub(crate) fn forget_peak(pid: u32) -> Result<()> {
    Ok(fs::write(format!("/proc/{pid}/clear_refs"), "5")?)
}

/// Open descriptors of a process.
pub(crate) fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}

/// A submission, and what became of it.
#[derive(Debug, Clone)]
pub(crate) struct Offered {
    pub(crate) status: u16,
    /// The error's code; empty when it was accepted.
    pub(crate) code: String,
    /// The job; empty when it was refused.
    pub(crate) job: String,
    /// Until the answer.
    pub(crate) millis: f64,
}

impl Offered {
    /// Whether it is a job: 200 when that has ended before the answer was written.
    pub(crate) fn is_accepted(&self) -> bool {
        [200, 202].contains(&self.status)
    }
}

/// Submits a job without waiting for its result.
pub(crate) async fn offer(client: &Client, body: String) -> Result<Offered> {
    let begun = Instant::now();
    let answer = client.analyze_raw(body, &[("prefer", "respond-async")]).await?;
    let millis = begun.elapsed().as_secs_f64() * 1e3;
    Ok(Offered { status: answer.status, code: answer.code().into(), job: answer.job().into(), millis })
}

/// Submits `jobs` bodies, in turn, `at_once` at a time.
pub(crate) async fn offer_all(
    client: Client,
    bodies: Arc<Vec<String>>,
    jobs: usize,
    at_once: usize,
) -> Result<Vec<Offered>> {
    let one = |n: usize| {
        let (client, body) = (client.clone(), bodies[n % bodies.len()].clone());
        async move { offer(&client, body).await }
    };
    stream::iter(0..jobs).map(one).buffer_unordered(at_once).collect::<Vec<_>>().await.into_iter().collect()
}

/// [`offer_all`], of which none may be refused.
pub(crate) async fn submit_all(
    client: Client,
    bodies: Arc<Vec<String>>,
    jobs: usize,
    at_once: usize,
) -> Result<Vec<Offered>> {
    let accepted = offer_all(client, bodies, jobs, at_once).await?;
    for offered in &accepted {
        ensure!(offered.is_accepted(), "{} {}", offered.status, offered.code);
    }
    Ok(accepted)
}

/// The jobs of those that were accepted.
pub(crate) fn jobs_of(offered: &[Offered]) -> Vec<String> {
    offered.iter().filter(|offered| offered.is_accepted()).map(|offered| offered.job.clone()).collect()
}

/// The milliseconds of each.
pub(crate) fn millis_of(offered: &[Offered]) -> Vec<f64> {
    offered.iter().map(|offered| offered.millis).collect()
}

/// A synchronous request in an open loop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sent {
    /// When it was due, in seconds since the loop began.
    pub(crate) due: f64,
    pub(crate) status: u16,
    /// From when it was due to the answer.
    pub(crate) millis: f64,
    /// Of these, in the model.
    pub(crate) model: f64,
}

/// Sends `per_second` synchronous requests a second, whatever becomes of those before.
pub(crate) async fn open_loop(
    client: &Client,
    body: &str,
    per_second: f64,
    time: Duration,
) -> Result<Vec<Sent>> {
    let period = Duration::from_secs_f64(1.0 / per_second);
    let (begun, mut calls) = (tokio::time::Instant::now(), JoinSet::new());
    for n in 0..(time.as_secs_f64() * per_second) as u32 {
        tokio::time::sleep_until(begun + period * n).await;
        let (client, body) = (client.clone(), body.to_owned());
        calls.spawn(async move {
            let answer = client.analyze_raw(body, &[]).await?;
            let millis = (begun + period * n).elapsed().as_secs_f64() * 1e3;
            let model = model_millis(answer.header("server-timing")).unwrap_or_default();
            anyhow::Ok(Sent { due: (period * n).as_secs_f64(), status: answer.status, millis, model })
        });
    }
    calls.join_all().await.into_iter().collect()
}

/// Prints how many answers are not a report, and which.
pub(crate) fn all_answered(sent: &[Sent]) {
    let mut wrong: Vec<u16> = sent.iter().map(|sent| sent.status).filter(|status| *status != 200).collect();
    verdict(&format!("answers other than 200, of {}", sent.len()), wrong.len() as f64, wrong.is_empty(), "0");
    let count = wrong.len();
    wrong.sort_unstable();
    wrong.dedup();
    if count > 0 {
        println!("statuses of these: {wrong:?}");
    }
}

/// The model's own time, as the server tells it.
pub(crate) fn model_millis(server_timing: &str) -> Result<f64> {
    let phase = server_timing.split(", ").find_map(|phase| phase.strip_prefix("model;dur="));
    Ok(phase.context("no model in Server-Timing")?.parse()?)
}

/// Waits until every job has ended.
pub(crate) async fn until_ended(lab: &Lab, within: Duration) -> Result<()> {
    let open = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";
    let ended = async || (lab.count(open).await.ok()? == 0).then_some(());
    eventually("every job has ended", within, ended).await
}

/// Every one of `jobs` has a report, and none was billed twice.
pub(crate) async fn check(lab: &Lab, jobs: &[String]) -> Result<()> {
    let rows = lab.sql("SELECT job::text FROM ingress.reports").await?;
    let reports: std::collections::HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let lost = jobs.iter().filter(|job| !reports.contains(*job)).count();
    let billed = lab.count("SELECT coalesce(sum(jobs), 0)::bigint FROM ingress.usage").await?;
    let doubled = billed - lab.count("SELECT count(*) FROM ingress.jobs WHERE state = 'succeeded'").await?;
    verdict(&format!("lost of {}", jobs.len()), lost as f64, lost == 0, "0");
    verdict("doubled", doubled as f64, doubled == 0, "0");
    Ok(())
}

/// Sorts, and takes the middle one.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

pub(crate) fn minimum(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

pub(crate) fn maximum(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}
