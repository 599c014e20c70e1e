//! Figures of the running system, each beside its goal: see [`USAGE`].
//!
//! Machines are shared and noisy: blocks alternate, ratios are taken side by side, medians are reported.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use dermflow_local::{
    servers::{Given, Servers},
    stack::repo,
};
use dermflow_schemas::envelope::Payload;
use dermflow_tests::{
    client::{Client, sample, sample_bytes},
    lab::{Lab, Setup, Worker},
};
use dermflow_workers::{
    engine::{self, Runtime},
    model::Model,
};
use futures_util::{StreamExt, stream};

use crate::measure::{
    all_met, bare, cpu_seconds, maximum, median, minimum, model_millis, payload, peak_rss_mb,
};

mod burst;
mod decode;
mod degradation;
mod hostile;
mod logins;
mod measure;
mod publish;
mod scale;
mod soak;
mod stages;
mod submit;
mod tls;
mod tokens;
mod upload;

const USAGE: &str = "usage: bench COMMAND
  sustained [--model FOLDER]  the pipeline against a bare ONNX Runtime loop
  latency                     what it adds to the model's own time
  decode                      what it costs to decode in a process of its own
  burst [--model FOLDER] [--sync 2m]
                              5,000 jobs at once, and what becomes of others; --sync: with this sync_interval
  submit                      10,000 images from four clients that are killed and go on
  degradation [ROW] [--long]  what goes wrong, case by case
  scale [elastic | --long]    1 to 16 workers (--long: 64); elastic: workers that come, leave and die
  upload [--short]            memory of ingress during 2 GB (--short: 256 MB) to a batch
  upload --parallel [--short] the same during 1 GB (256 MB) in eight uploads at once
  logins                      what 200 logins at once cost others, and what an unknown name costs
  stages                      what a worker's time for an image goes into
  tokens                      what checking a token costs, and what is not told of another client's job
  tls                         what TLS costs a request, on connections that are reused and on new ones
  hostile                     what stalled, slow and flooding connections cost others
  publish                     durable publications a second, single and in batches, and accepted jobs
Exit code 0: every goal is met; 1: one was missed, or the benchmark could not be finished.";

/// The images of a run, in turn.
const IMAGES: [&str; 4] = ["ham10000-mel.jpg", "ham10000-nv.jpg", "ham10000-bcc.jpg", "isic2017-mel.jpg"];
/// Requests in flight.
const IN_FLIGHT: usize = 32;
/// Pairs of blocks.
const BLOCKS: usize = 5;
/// One block.
const BLOCK: Duration = Duration::from_secs(10);
/// Requests of the latency run.
const REQUESTS: usize = 1_000;
/// Latency of the simulated model, in milliseconds.
const SIMULATED_MS: u64 = 20;

#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match Box::pin(run(&args)).await.and_then(|()| all_met()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &[&str]) -> Result<()> {
    match args {
        ["sustained"] => sustained(&derm7()).await,
        ["sustained", "--model", folder] => sustained(Path::new(folder)).await,
        ["latency"] => latency().await,
        ["decode"] => Box::pin(decode::decode()).await,
        ["burst"] => Box::pin(burst::burst(&derm7(), "always")).await,
        ["burst", "--sync", "2m"] => Box::pin(burst::burst(&derm7(), "2m")).await,
        ["burst", "--model", folder] => Box::pin(burst::burst(Path::new(folder), "always")).await,
        ["burst", "--model", folder, "--sync", "2m"] => Box::pin(burst::burst(Path::new(folder), "2m")).await,
        ["degradation"] => degradation::all(false).await,
        ["degradation", "--long"] => degradation::all(true).await,
        ["degradation", row] => degradation::one(row, false).await,
        ["degradation", row, "--long"] => degradation::one(row, true).await,
        ["scale"] => scale::scale(false).await,
        ["scale", "--long"] => scale::scale(true).await,
        ["scale", "elastic"] => scale::elastic(4, 16).await,
        ["upload"] => upload::memory(2_000_000_000).await,
        ["upload", "--short"] => upload::memory(256_000_000).await,
        ["upload", "--parallel"] => upload::parallel(1_000_000_000).await,
        ["upload", "--parallel", "--short"] => upload::parallel(256_000_000).await,
        ["logins"] => Box::pin(logins::logins()).await,
        ["submit"] => Box::pin(submit::submit()).await,
        ["stages"] => stages::stages().await,
        ["tokens"] => tokens::tokens().await,
        ["tls"] => Box::pin(tls::tls()).await,
        ["hostile"] => Box::pin(hostile::hostile()).await,
        ["publish"] => Box::pin(publish::publish()).await,
        _ => bail!("{USAGE}"),
    }
}

fn derm7() -> PathBuf {
    repo().join("workers/models/derm7")
}

/// Closed loop, [`IN_FLIGHT`] at once, against in-process loops with our own decode code.
async fn sustained(model: &Path) -> Result<()> {
    let cores = thread::available_parallelism()?.get();
    let lab =
        Lab::in_service(Setup { workers: vec![Worker::model(model); cores], ..Setup::default() }).await?;
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let model = Arc::new(Model::load(model, false)?);
    let make = engine::factory(&model, &Runtime::new(&servers.onnxruntime))?;
    let payloads: Vec<Payload> = IMAGES.iter().map(|name| payload(sample_bytes(name))).collect();
    let one = bare(&model, &make, 1, &payloads, BLOCK)?;
    let all = bare(&model, &make, cores, &payloads, BLOCK)?;
    let threads = if one > all { 1 } else { cores };
    println!("bare loop: {one:.1} images/s on 1 thread, {all:.1} on {cores}; compared with {threads}");
    pipeline(lab.client(), BLOCK).await?;
    let before = cpu_seconds(&lab)?;
    let (mut ratios, mut bares, mut images) = (Vec::new(), Vec::new(), 0.0);
    for n in 1..=BLOCKS {
        let bare = bare(&model, &make, threads, &payloads, BLOCK)?;
        let ours = pipeline(lab.client(), BLOCK).await?;
        println!("block {n}: bare {bare:.1}, pipeline {ours:.1} images/s, ratio {:.3}", ours / bare);
        ratios.push(ours / bare);
        bares.push(bare);
        images += ours * BLOCK.as_secs_f64();
    }
    let spread = maximum(&bares) / minimum(&bares) - 1.0;
    println!("ratio: median {:.3}, {:.3} to {:.3}", median(&mut ratios), minimum(&ratios), maximum(&ratios));
    println!("bare blocks differ by {:.0} % (above 15 %: void)", spread * 100.0);
    for ((name, after), (_, before)) in cpu_seconds(&lab)?.into_iter().zip(before) {
        println!("{name}: {:.2} ms of processor an image", (after - before) / images * 1e3);
    }
    for (name, pid) in lab.pids() {
        println!("{name}: peak RSS {} MB", peak_rss_mb(pid)?);
    }
    lab.stop().await
}

/// Images a second through TLS, token, record, queue and report.
async fn pipeline(client: &Client, time: Duration) -> Result<f64> {
    let requests: Vec<String> = IMAGES.iter().map(|name| sample(name).to_string()).collect();
    let begun = Instant::now();
    let call = |n: usize| {
        let (client, body) = (client.clone(), requests[n % IMAGES.len()].clone());
        async move { client.analyze_raw(body, &[]).await.map(|answer| answer.status) }
    };
    let going = stream::iter(0..).take_while(|_| std::future::ready(begun.elapsed() < time));
    let statuses: Vec<Result<u16>> = going.map(call).buffer_unordered(IN_FLIGHT).collect().await;
    for status in &statuses {
        let status = status.as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))?;
        ensure!(*status == 200, "a request answered {status}");
    }
    Ok(statuses.len() as f64 / begun.elapsed().as_secs_f64())
}

/// One request at a time; what is left of its latency when the model's own time is taken off.
async fn latency() -> Result<()> {
    for sync_interval in ["always", "2m"] {
        let setup = Setup { sync_interval, ..Setup::simulated(SIMULATED_MS) };
        let lab = Lab::in_service(setup).await?;
        let body = sample(IMAGES[0]).to_string();
        let mut added = Vec::new();
        for n in 0..REQUESTS + 50 {
            let begun = Instant::now();
            let answer = lab.client().analyze_raw(body.clone(), &[]).await?;
            let millis = begun.elapsed().as_secs_f64() * 1e3;
            ensure!(answer.status == 200, "a request answered {}", answer.status);
            if n >= 50 {
                added.push(millis - model_millis(answer.header("server-timing"))?);
            }
        }
        added.sort_by(f64::total_cmp);
        let (p50, p99) = (added[REQUESTS / 2], added[REQUESTS * 99 / 100]);
        println!(
            "sync_interval {sync_interval}: added latency p50 {p50:.1} ms, p99 {p99:.1} ms, {REQUESTS} requests"
        );
        lab.stop().await?;
    }
    Ok(())
}
