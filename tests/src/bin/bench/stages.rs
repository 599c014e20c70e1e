//! What a worker's time for an image goes into, on one thread and its decoder, without the broker.

use std::{hint::black_box, io::Cursor, time::Instant};

use anyhow::{Context, Result};
use dermflow_local::{
    servers::{Given, Servers},
    stack::{programs, repo},
};
use dermflow_schemas::{envelope::Payload, fhir::Resource, limits::DECODE_DEADLINE};
use dermflow_tests::client::sample_bytes;
use dermflow_workers::{
    analyse::{analyse, ranked},
    child::Decoding,
    engine::{self, Question, Runtime},
    frame::Frame,
    heat,
    model::Model,
    outline::Outline,
    quality::Quality,
    report::{self, Case},
};
use time::OffsetDateTime;

use crate::{
    derm7,
    measure::{median, payload},
};

const RUNS: usize = 50;
const STAGES: [&str; 6] =
    ["decode and squash", "quality", "model", "domain and outline", "one heat map", "report (with one)"];

/// Medians of [`RUNS`], in milliseconds.
pub(crate) async fn stages() -> Result<()> {
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let model = Model::load(&derm7(), false)?;
    let mut engine = engine::factory(&model, &Runtime::new(&servers.onnxruntime))?()?;
    Decoding::InChild(programs()?.join("worker")).enter()?;
    let sample = sample_bytes("ham10000-mel.jpg");
    let mut large = Cursor::new(Vec::new());
    let pixels =
        image::load_from_memory(&sample)?.resize_exact(4_000, 3_000, image::imageops::FilterType::Triangle);
    pixels.write_to(&mut large, image::ImageFormat::Jpeg)?;
    for (name, file) in [("600 x 450", sample), ("4,000 x 3,000", large.into_inner())] {
        let mut payload: Payload = payload(file);
        payload.manifest.heat_maps = 1;
        let entry = payload.manifest.images[0].clone();
        let findings = analyse(&mut *engine, &model, &payload, 1, DECODE_DEADLINE, &|| false)?.findings;
        let mut times = [const { Vec::new() }; STAGES.len()];
        let mut size = 0;
        for _ in 0..RUNS {
            let mut begun = Instant::now();
            let mut stage = 0;
            let mut lap = || {
                times[stage].push(begun.elapsed().as_secs_f64() * 1_000.0);
                (stage, begun) = (stage + 1, Instant::now());
            };
            let deadline = Instant::now() + DECODE_DEADLINE;
            let frame = Frame::decode(payload.images[0].as_slice(), entry.format, model.input(), deadline)?;
            lap();
            black_box(Quality::of(&frame));
            lap();
            let answer = engine.classify(Question { frame: &frame, digest: "", attempt: 1 })?;
            lap();
            let opinion = model.opinion(&answer.logits).context("no opinion")?;
            let Frame { width, height, .. } = frame;
            black_box(answer.lesion.and_then(|map| Outline::of(&map, width, height)));
            lap();
            let activation = answer.activation.context("no activation")?;
            let first = &ranked(&opinion.conditions)[..1];
            black_box(heat::render(&model, &activation, first, width, height));
            lap();
            let at = OffsetDateTime::UNIX_EPOCH;
            let report = report::build(&Case {
                job: "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f".parse()?,
                accepted_at: at,
                finished_at: at,
                manifest: &payload.manifest,
                findings: &findings,
                model: &model,
            });
            size = Resource::DiagnosticReport(Box::new(report)).to_json().len();
            lap();
        }
        let map = findings[0].heat_maps[0].png.len();
        println!("{name}, report of {size} bytes, heat map of {map}:");
        for (stage, times) in STAGES.iter().zip(&mut times) {
            println!("  {stage}: {:.2} ms", median(times));
        }
    }
    Ok(())
}
