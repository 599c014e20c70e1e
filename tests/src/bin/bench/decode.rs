//! What it costs to decode in a process of its own.

use std::{sync::Arc, thread, time::Instant};

use anyhow::{Result, anyhow};
use dermflow_local::{
    servers::{Given, Servers},
    stack::programs,
};
use dermflow_schemas::{image::Format, limits::DECODE_DEADLINE};
use dermflow_tests::{
    client::sample_bytes,
    lab::{Lab, Setup, Worker},
};
use dermflow_workers::{
    child::Decoding,
    engine::{self, Runtime},
    frame::Frame,
    model::Model,
};

use crate::{
    BLOCK, BLOCKS, IMAGES, derm7,
    measure::{bare_decoding, maximum, median, minimum, payload, percentile},
    pipeline,
};

/// Decodings of each image, of each kind.
const TIMES: usize = 500;

/// One image at a time; the bare loop; the pipeline: each with and without, in turn.
pub(crate) async fn decode() -> Result<()> {
    let child = Decoding::InChild(programs()?.join("worker"));
    let model = Arc::new(Model::load(&derm7(), false)?);
    for name in IMAGES {
        let file = sample_bytes(name);
        let here = one_by_one(&Decoding::Here, &model, &file)?;
        let there = one_by_one(&child, &model, &file)?;
        println!("{name}: p50 {here:.2} ms here, {there:.2} ms in a child");
    }
    let servers = Servers::obtain(dermflow_local::stack::repo(), &Given::default(), |_| ()).await?;
    let make = engine::factory(&model, &Runtime::new(&servers.onnxruntime))?;
    let payloads: Vec<_> = IMAGES.iter().map(|name| payload(sample_bytes(name))).collect();
    let cores = thread::available_parallelism()?.get();
    let mut ratios = Vec::new();
    for n in 1..=BLOCKS {
        let here = bare_decoding(&Decoding::Here, &model, &make, cores, &payloads, BLOCK)?;
        let there = bare_decoding(&child, &model, &make, cores, &payloads, BLOCK)?;
        println!(
            "bare loop, block {n}: {here:.1} images/s here, {there:.1} in children, ratio {:.3}",
            there / here
        );
        ratios.push(there / here);
    }
    tell("bare loop", &mut ratios);
    let executors = cores.to_string();
    let workers = [Worker::derm7().decoding_in_process(), Worker::derm7()];
    let workers = workers.map(|worker| worker.arg("--executors", &executors));
    let mut lab = Lab::in_service(Setup { workers: workers.into(), ..Setup::default() }).await?;
    lab.stop_worker(1).await?;
    let mut ratios = Vec::new();
    for n in 1..=BLOCKS {
        let here = pipeline(lab.client(), BLOCK).await?;
        lab.stop_worker(0).await?;
        lab.restart_worker(1).await?;
        let there = pipeline(lab.client(), BLOCK).await?;
        lab.stop_worker(1).await?;
        lab.restart_worker(0).await?;
        println!(
            "pipeline, block {n}: {here:.1} images/s here, {there:.1} in children, ratio {:.3}",
            there / here
        );
        ratios.push(there / here);
    }
    tell("pipeline", &mut ratios);
    lab.stop().await
}

fn tell(what: &str, ratios: &mut [f64]) {
    println!("{what}: median {:.3}, {:.3} to {:.3}", median(ratios), minimum(ratios), maximum(ratios));
}

/// The median of milliseconds to decode a file for a model, on a thread that decodes like that.
fn one_by_one(decoding: &Decoding, model: &Model, file: &[u8]) -> Result<f64> {
    let work = || -> Result<f64> {
        decoding.enter()?;
        let mut millis = Vec::new();
        for _ in 0..TIMES {
            let begun = Instant::now();
            Frame::decode(file, Format::Jpeg, model.input(), begun + DECODE_DEADLINE)?;
            millis.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        Ok(percentile(&mut millis, 50))
    };
    thread::scope(|scope| scope.spawn(work).join()).map_err(|_| anyhow!("a decoder panicked"))?
}
