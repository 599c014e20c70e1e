//! Loops to compare with, and figures.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use dermflow_local::{
    servers::{Given, Servers},
    stack::repo,
};
use dermflow_schemas::{
    envelope::{ImageEntry, Manifest, Payload},
    image::Format,
};
use dermflow_tests::lab::Lab;
use dermflow_workers::{
    analyse::analyse,
    engine::{self, Factory},
    model::Model,
};

/// Images a second of `threads` loops, each with a session of its own.
pub(crate) fn bare(
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
                for payload in payloads.iter().cycle() {
                    if stop.load(Ordering::Relaxed)
                        || analyse(&mut **engine, model, payload, 1, &|| false).is_err()
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
    let entry = ImageEntry { bytes: file.len(), format: Format::Jpeg, title: None, body_site: None };
    Payload { manifest: Manifest::new(vec![entry], None, None), images: vec![file.into()] }
}

/// Images a second of the better of one loop and one a core, with derm7.
pub(crate) async fn bare_rate(files: &[Vec<u8>]) -> Result<f64> {
    const BLOCK: Duration = Duration::from_secs(8);
    let cores = thread::available_parallelism()?.get();
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let model = Arc::new(Model::load(&repo().join("workers/models/derm7"), false)?);
    let make = engine::factory(&model, &servers.onnxruntime)?;
    let payloads: Vec<Payload> = files.iter().cloned().map(payload).collect();
    let one = bare(&model, &make, 1, &payloads, BLOCK)?;
    let all = bare(&model, &make, cores, &payloads, BLOCK)?;
    println!("bare loop: {one:.1} images/s on 1 thread, {all:.1} on {cores}");
    Ok(one.max(all))
}

/// Prints a figure with its goal, and whether it is met.
pub(crate) fn verdict(what: &str, figure: f64, met: bool, goal: &str) {
    let met = if met { "met" } else { "MISSED" };
    println!("{what}: {figure:.2} (goal: {goal}; {met})");
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
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
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
