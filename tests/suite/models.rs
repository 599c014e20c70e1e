//! Models: any folder works, a faulty model costs its own job only, a simulated one cannot pass for real; and what the
//! default model's reports say follows from the images, and from what else they say.

use std::{collections::BTreeMap, fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use dermflow_local::{
    servers::{Given, Servers},
    stack::{programs, repo},
};
use dermflow_schemas::{
    envelope::{ImageEntry, Manifest, Payload},
    fhir::Resource,
    image::{Format, hex},
    limits::DECODE_DEADLINE,
};
use dermflow_tests::{
    client::{distribution, observations, parameters, sample, sample_bytes, send},
    fhir,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use dermflow_workers::{
    analyse::analyse,
    decode::Picture,
    engine::{self, Engine, Question, Runtime},
    frame::Frame,
    model::Model,
    report::{self, Case},
};
use reqwest::Method;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::process::Command;

use super::api::noise;

const LONG: Duration = Duration::from_mins(1);

fn one(worker: Worker) -> Setup {
    Setup { workers: vec![worker], ack_wait: 2, ..Setup::default() }
}

// A classifier with other classes, another input and no ICD-11 codes runs without a change of code.
#[tokio::test(flavor = "multi_thread")]
async fn another_model_is_another_folder() -> Result<()> {
    let lab = Lab::start(one(Worker::tiny())).await?;
    let report = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?.body;
    let found = distribution(observations(&report, "condition-distribution")[0]);
    let codes: Vec<&str> = found.iter().map(|(code, _)| code.as_str()).collect();
    assert_eq!(codes.len(), 3);
    assert!(["red", "green", "blue"].iter().all(|code| codes.contains(code)), "{codes:?}");
    lab.stop().await
}

// A simulated model says so wherever a reader could look.
#[tokio::test(flavor = "multi_thread")]
async fn a_simulated_report_says_so() -> Result<()> {
    let lab = Lab::start(one(Worker::simulated(1))).await?;
    let report = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?.body;
    let labels: Vec<&str> = report["meta"]["security"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|label| label["code"].as_str())
        .collect();
    assert!(labels.contains(&"HTEST") && labels.contains(&"AIAST"), "{labels:?}");
    for text in [&report["conclusion"], &report["text"]["div"]] {
        assert!(text.as_str().unwrap().to_lowercase().contains("simulated"), "{text}");
    }
    lab.stop().await
}

// NaN is the model's fault and will be again: failed at the first attempt. The payload is kept, wherever it is, for a
// model that is mended.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_usable_result_fails_the_job_once() -> Result<()> {
    let mut lab = Lab::start(one(Worker::simulated(1).fault("nan"))).await?;
    let operator = lab.start_operate("olga").await?;
    let mut jobs = Vec::new();
    for request in [sample("ham10000-mel.jpg"), parameters(&[1, 2, 3].map(noise))] {
        let job = lab.client().submit(&request).await?;
        let answer = lab.client().poll(&job, LONG).await?;
        assert_eq!((answer.status, answer.code()), (500, "analysis-failed"), "{}", answer.text);
        jobs.push(job);
        assert_eq!(lab.messages("DEAD").await?, jobs.len() as u64);
    }
    assert_eq!(lab.count("SELECT max(attempts)::bigint FROM ingress.jobs").await?, 1);
    assert_eq!(lab.object_count().await?, 1);
    lab.stop_worker(0).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    let list = operator.get("/dead").await?.body;
    let letters = list["dead"].as_array().context("no list")?;
    assert_eq!(letters.len(), jobs.len());
    for (letter, job) in letters.iter().zip(&jobs) {
        let said = (letter["job"].as_str(), letter["reason"].as_str(), letter["attempts"].as_u64());
        assert_eq!(said, (Some(&**job), Some("analysis-failed"), Some(1)));
        let path = format!("/dead/{}/requeue", letter["sequence"]);
        let back = send(operator.request(Method::POST, &path)).await?;
        assert_eq!(back.status, 200, "{}", back.text);
        assert_eq!(lab.client().poll(job, LONG).await?.status, 200);
    }
    let emptied = async || {
        let left = (lab.messages("DEAD").await.ok()?, lab.object_count().await.ok()?);
        (left == (0, 0)).then_some(())
    };
    eventually("nothing of it is left", LONG, emptied).await?;
    lab.stop().await
}

// Where there is no room for dead letters, such jobs end all the same, at once, and keep nobody from the worker.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_ends_though_there_is_no_room_for_its_letter() -> Result<()> {
    let lab = Lab::start(one(Worker::simulated(1).fault("nan"))).await?;
    let jetstream = lab.jetstream().await?;
    let mut config = jetstream.get_stream("DEAD").await?.cached_info().config.clone();
    config.max_messages = 1;
    jetstream.update_stream(&config).await?;
    for _ in 0..3 {
        let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
        let answer = lab.client().poll(&job, Duration::from_secs(10)).await?;
        assert_eq!((answer.status, answer.code()), (500, "analysis-failed"), "{}", answer.text);
    }
    assert_eq!(lab.messages("DEAD").await?, 1);
    assert_eq!(lab.count("SELECT max(attempts)::bigint FROM ingress.jobs").await?, 1);
    ensure!(lab.logs()?.contains("no room for dead letters"), "nobody says so");
    lab.stop().await
}

// A panic costs the attempt, not the process: the job is published again and succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_model_is_tried_again() -> Result<()> {
    let mut lab = Lab::start(one(Worker::simulated(1).fault("panic").attempts(1))).await?;
    let answer = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(lab.count("SELECT attempts::bigint FROM ingress.jobs").await?, 2);
    assert!(lab.worker_is_alive(0));
    lab.stop().await
}

// A model that hangs is cut off at the job's time-out; the worker leaves, and its successor has the job.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_model_is_cut_off() -> Result<()> {
    let mut lab = Lab::start(one(Worker::simulated(1).fault("hang").attempts(1).timeout(2))).await?;
    let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
    let gone = async || (!lab.worker_is_alive(0)).then_some(());
    eventually("the worker leaves", LONG, gone).await?;
    lab.restart_worker(0).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    assert_eq!(lab.count("SELECT attempts::bigint FROM ingress.jobs").await?, 2);
    lab.stop().await
}

// A model that takes the whole process down on every attempt: the job ends in the dead letters with its sealed
// payload, and other jobs do not notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_kills_its_workers_ends_in_the_dead_letters() -> Result<()> {
    let mut lab = Lab::start(one(Worker::simulated(1).fault("abort"))).await?;
    let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
    let ended = async |lab: &Lab| {
        lab.client().get(&format!("/fhir/_async/{job}")).await.is_ok_and(|a| a.status != 202)
    };
    for _ in 0..20 {
        let gone = async || (!lab.worker_is_alive(0) || ended(&lab).await).then_some(());
        eventually("the worker dies or the job ends", LONG, gone).await?;
        if ended(&lab).await {
            break;
        }
        lab.restart_worker(0).await?;
    }
    let answer = lab.client().poll(&job, LONG).await?;
    assert_eq!((answer.status, answer.code()), (500, "attempts-exhausted"), "{}", answer.text);
    assert_eq!(lab.messages("DEAD").await?, 1);
    assert_eq!(lab.messages("JOBS").await?, 0);
    lab.stop_worker(0).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    assert_eq!(lab.client().analyze(&sample("ham10000-nv.jpg"), &[]).await?.status, 200);
    lab.stop().await
}

// What a worker cannot do without is one clear sentence at start.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_work_says_why() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    for (worker, reason) in [
        (Worker::derm7().arg("--ort-dylib", "/nowhere/libonnxruntime.so"), "/nowhere/libonnxruntime.so"),
        (Worker::derm7().arg("--model", "/nowhere"), "/nowhere"),
        (Worker::simulated(1).forbidden(), "--allow-simulated"),
        (Worker::derm7().arg("--sealing-keys", "/nowhere/keys"), "/nowhere/keys"),
    ] {
        let refused = lab.start_worker(worker).await.unwrap_err();
        assert!(format!("{refused:#}").contains(reason), "{refused:#}");
    }
    lab.stop().await
}

/// The default model in this process.
async fn derm7() -> Result<(Model, Box<dyn Engine>)> {
    loaded(&runtime().await?, "derm7")
}

/// What every model of a process shares.
async fn runtime() -> Result<Runtime> {
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    Ok(Runtime::new(&servers.onnxruntime))
}

/// A model of this repository in this process.
fn loaded(runtime: &Runtime, name: &str) -> Result<(Model, Box<dyn Engine>)> {
    let model = Model::load(&repo().join("workers/models").join(name), false)?;
    let engine = engine::factory(&model, runtime)?()?;
    Ok((model, engine))
}

fn images() -> PathBuf {
    repo().join("tests/images")
}

fn format_of(name: &str) -> Format {
    if name.strip_suffix(".png").is_some() { Format::Png } else { Format::Jpeg }
}

// REQ_004: decoding, squashing, network and arithmetic give what the training pipeline gives (`worker pixels`, onnxruntime
// in Python; `expected.py`), on 200 images, a half of them JPEG.
#[tokio::test]
async fn the_numbers_are_those_of_the_training_pipeline() -> Result<()> {
    const TOLERANCE: f64 = 1e-3;
    let (model, mut engine) = derm7().await?;
    let folder = repo().join("tests/parity");
    let table = fs::read_to_string(folder.join("expected.csv"))?;
    let mut lines = table.lines();
    let header: Vec<&str> = lines.next().context("no header")?.split(',').collect();
    let classes: Vec<&str> = model.classes.iter().map(|class| class.code.as_str()).collect();
    ensure!(header == [&["file", "skin", "clinical"], &classes[..]].concat(), "{header:?}");
    let (mut worst, mut images_seen) = ((0.0, String::new()), 0);
    for line in lines {
        let (name, expected) = line.split_once(',').context("no comma")?;
        let file = fs::read(folder.join(name))?;
        let frame = Frame::of(&Picture::decode(&file, format_of(name))?, model.input());
        let answer = engine.classify(Question { frame: &frame, digest: "", attempt: 1 })?;
        let opinion = model.opinion(&answer.logits).context("no opinion")?;
        let clinical = answer.modality.map(|logit| 1.0 / (1.0 + (-f64::from(logit)).exp()));
        let found = opinion.skin.into_iter().chain(clinical).chain(opinion.conditions);
        let expected: Vec<f64> = expected.split(',').map(str::parse).collect::<Result<_, _>>()?;
        let found: Vec<f64> = found.collect();
        assert_eq!(found.len(), expected.len());
        for ((code, found), expected) in header[1..].iter().zip(&found).zip(&expected) {
            let off = (found - expected).abs();
            if off > worst.0 {
                worst = (off, format!("{name} {code}: {found:.6} for {expected:.6}"));
            }
        }
        images_seen += 1;
    }
    println!("{images_seen} images, the largest difference: {worst:?}");
    assert_eq!(images_seen, 200);
    assert!(worst.0 <= TOLERANCE, "{worst:?}");
    Ok(())
}

/// The frames of a file as `worker pixels` writes it: binary PPM of 8 bits, one behind the other.
fn ppm(mut stream: &[u8]) -> Result<Vec<image::RgbImage>> {
    let mut frames = Vec::new();
    while !stream.is_empty() {
        let head = stream.splitn(4, |byte| *byte == b'\n').take(3).map(std::str::from_utf8);
        let head: Vec<&str> = head.collect::<Result<_, _>>()?;
        let [magic @ "P6", size, most @ "255"] = head[..] else { anyhow::bail!("no head: {head:?}") };
        let (width, height) = size.split_once(' ').context("no size")?;
        let (width, height) = (width.parse()?, height.parse()?);
        let start = [magic, size, most].iter().map(|line| line.len() + 1).sum::<usize>();
        let end = start + width as usize * height as usize * 3;
        let pixels = stream.get(start..end).context("cut short")?;
        frames.push(image::RgbImage::from_raw(width, height, pixels.to_vec()).context("no frame")?);
        stream = &stream[end..];
    }
    Ok(frames)
}

// The pixels that training and evaluation take from the program are those that the service's decoder and squashing make;
// of PNG, those that another decoder makes. A file that the service refuses ends it, named, behind the frames before it.
#[tokio::test]
async fn training_has_the_pixels_of_the_service() -> Result<()> {
    let pixels = async |options: &[&str], files: &[PathBuf]| {
        Command::new(programs()?.join("worker"))
            .arg("pixels")
            .args(options)
            .args(files)
            .output()
            .await
            .context("worker pixels")
    };
    let mut files = Vec::new();
    for folder in [images(), repo().join("tests/parity")] {
        let found = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        files.extend(
            found.into_iter().filter(|file| file.extension().is_some_and(|e| e == "jpg" || e == "png")),
        );
    }
    ensure!(files.len() == 209, "{} files", files.len());
    let (own, squashed) = (pixels(&[], &files).await?, pixels(&["--size", "192", "160"], &files).await?);
    let (own, squashed) = (ppm(&own.stdout)?, ppm(&squashed.stdout)?);
    ensure!(own.len() == files.len() && squashed.len() == files.len());
    for ((file, own), squashed) in files.iter().zip(&own).zip(&squashed) {
        let bytes = fs::read(file)?;
        let name = file.file_name().context("no name")?.to_string_lossy();
        let picture = Picture::decode(&bytes, format_of(&name))?;
        ensure!(*squashed == picture.squash(192, 160), "{name}, squashed");
        ensure!(*own == picture.squash(picture.width(), picture.height()), "{name}");
        if format_of(&name) == Format::Png {
            ensure!(*own == image::load_from_memory(&bytes)?.to_rgb8(), "{name}, decoded by another");
        }
    }

    let refused = pixels(&[], &[files[0].clone(), images().join("README.md"), files[1].clone()]).await?;
    ensure!(!refused.status.success() && ppm(&refused.stdout)? == own[..1], "{refused:?}");
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("README.md"), "{refused:?}");
    Ok(())
}

/// Whether this processor adds up products of 8-bit numbers without overflow (VNNI on x86-64), without which
/// `derm7-int8` is not for it.
pub(crate) fn has_dot_products() -> Result<bool> {
    Ok(!cfg!(target_arch = "x86_64") || fs::read_to_string("/proc/cpuinfo")?.contains("vnni"))
}

// The network in 8 bits says nearly what the one that it was made from says: of the 200 images of the comparison above.
#[tokio::test]
async fn eight_bits_say_nearly_the_same() -> Result<()> {
    if !has_dot_products()? {
        println!("nothing is shown: this processor has no VNNI");
        return Ok(());
    }
    let runtime = runtime().await?;
    let (model, mut engine) = loaded(&runtime, "derm7")?;
    let (small, mut small_engine) = loaded(&runtime, "derm7-int8")?;
    let folder = repo().join("tests/parity");
    let table = fs::read_to_string(folder.join("expected.csv"))?;
    let (mut most, mut same_first) = (Vec::new(), 0);
    for name in table.lines().skip(1).filter_map(|line| line.split(',').next()) {
        let picture = Picture::decode(&fs::read(folder.join(name))?, format_of(name))?;
        let conditions = |model: &Model, engine: &mut dyn Engine| -> Result<Vec<f64>> {
            let frame = Frame::of(&picture, model.input());
            let answer = engine.classify(Question { frame: &frame, digest: "", attempt: 1 })?;
            Ok(model.opinion(&answer.logits).context("no opinion")?.conditions)
        };
        let both = [conditions(&model, &mut *engine)?, conditions(&small, &mut *small_engine)?];
        most.push(both[0].iter().zip(&both[1]).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max));
        let first = |p: &[f64]| (0..p.len()).max_by(|a, b| p[*a].total_cmp(&p[*b]));
        same_first += usize::from(first(&both[0]) == first(&both[1]));
    }
    most.sort_by(f64::total_cmp);
    let (median, worst) = (most[most.len() / 2], most[most.len() - 1]);
    println!(
        "{same_first} of {} first choices, a probability by {median:.3}, at most {worst:.3}",
        most.len()
    );
    ensure!(most.len() == 200 && same_first >= 180 && median <= 0.04 && worst <= 0.4);
    ensure!(median > 0.0, "these are the same network");
    Ok(())
}

// How far a number of a report may be off where the network has a part in it. Pixels, and so the quality, are the same to the
// bit on every processor; the sums of the network are not, as the ONNX Runtime has other kernels for other vector units: a
// probability moves by some 1e-6. What is printed of it then moves by one step, where it was about to be rounded the other way.

/// In per cent: up to five steps of 0.01, in a sum of as many classes.
const PERCENT: f64 = 0.05;
/// One step, in pixels.
const PIXELS: f64 = 0.1;

/// Two documents are the same, but for numbers that were measured: those may be `off` by this, and points by [`PIXELS`].
fn alike(path: &str, off: f64, found: &Value, expected: &Value) -> Result<()> {
    // What is printed is decimal.
    let near = |a: f64, b: f64, off: f64| (a - b).abs() <= off + 1e-9;
    let off = if path.ends_with(".valueDecimal") || path.ends_with(".valueString") { PIXELS } else { off };
    match (found, expected) {
        (Value::Object(a), Value::Object(b)) => {
            ensure!(a.keys().eq(b.keys()), "{path}: {:?} for {:?}", a.keys(), b.keys());
            let off = if a.get("unit").is_some_and(|unit| unit == "pixels") { PIXELS } else { off };
            let exact = a.get("id").and_then(Value::as_str).is_some_and(|id| id.starts_with("quality-"));
            ensure!(!exact || a == b, "{path}: {found} for {expected}");
            a.iter().try_for_each(|(name, value)| alike(&format!("{path}.{name}"), off, value, &b[name]))
        }
        (Value::Array(a), Value::Array(b)) => {
            ensure!(a.len() == b.len(), "{path}: {} for {} items", a.len(), b.len());
            let mut pairs = a.iter().zip(b).enumerate();
            pairs.try_for_each(|(n, (a, b))| alike(&format!("{path}[{n}]"), off, a, b))
        }
        (Value::Number(a), Value::Number(b)) if is_measured(path) => {
            let (a, b) = (a.as_f64().unwrap_or(f64::NAN), b.as_f64().unwrap_or(f64::NAN));
            ensure!(near(a, b, off), "{path}: {a} for {b}");
            Ok(())
        }
        (Value::String(a), Value::String(b)) if is_measured(path) => {
            let (a_parts, b_parts) = (parts(a), parts(b));
            ensure!(a_parts.len() == b_parts.len(), "{path}: {a} for {b}");
            // Of a sentence only its per cents, not the number of an image.
            let measured = |n: usize| {
                path.ends_with(".valueString")
                    || a_parts.get(n + 1).is_some_and(|unit| unit.starts_with(" %"))
            };
            let mut pairs = a_parts.iter().zip(&b_parts).enumerate();
            let same = pairs.all(|(n, (a, b))| match (a.parse::<f64>(), b.parse::<f64>()) {
                (Ok(a), Ok(b)) if measured(n) => near(a, b, off),
                _ => a == b,
            });
            ensure!(same, "{path}: {a} for {b}");
            Ok(())
        }
        _ => {
            ensure!(found == expected, "{path}: {found} for {expected}");
            Ok(())
        }
    }
}

/// Whether an element has what was measured on the pixels, in numbers or words.
fn is_measured(path: &str) -> bool {
    const EXACT: [&str; 3] = [".identifier[", ".property[", ".referenceRange["];
    const MEASURED: [&str; 6] =
        [".value", ".valueDecimal", ".valueString", ".div", ".conclusion", ".dataAbsentReason.text"];
    MEASURED.iter().any(|end| path.ends_with(end)) && !EXACT.iter().any(|exact| path.contains(exact))
}

/// Numbers, and what is between them.
fn parts(text: &str) -> Vec<String> {
    let digit = |c: char| c.is_ascii_digit() || c == '.';
    let mut parts: Vec<String> = Vec::new();
    for c in text.chars() {
        match parts.last_mut() {
            Some(part) if part.ends_with(digit) == digit(c) => part.push(c),
            _ => parts.push(c.to_string()),
        }
    }
    parts
}

#[test]
fn only_what_was_measured_may_differ() {
    let same = |a: Value, b: Value| alike("report", PERCENT, &a, &b).is_ok();
    let quantity =
        |value: f64, unit: &str| json!({"component": [{"valueQuantity": {"unit": unit, "value": value}}]});
    assert!(
        same(quantity(61.4, "%"), quantity(61.45, "%")) && !same(quantity(61.4, "%"), quantity(61.46, "%"))
    );
    let pixels = |value: f64| quantity(value, "pixels");
    assert!(same(pixels(8.3), pixels(8.4)) && !same(pixels(8.3), pixels(8.5)));
    let quality = |value: f64| json!({"id": "quality-1", "valueQuantity": {"value": value}});
    assert!(same(quality(87.0), quality(87.0)) && !same(quality(87.0), quality(87.01)));
    let conclusion = |text: &str| json!({"conclusion": text});
    assert!(same(conclusion("Image 1: 61.42 %."), conclusion("Image 1: 61.38 %.")));
    assert!(!same(conclusion("Image 1: 61.42 %."), conclusion("Image 1: 61.36 %.")));
    assert!(!same(conclusion("Image 1: 61.42 %."), conclusion("Image 2: 61.42 %.")));
    let outline = |text: &str| json!({"valueString": text});
    assert!(same(outline("((10 20, 3 4))"), outline("((10.1 20, 3 3.9))")));
    assert!(!same(outline("((10 20, 3 4))"), outline("((10.2 20, 3 4))")));
    for (a, b) in [
        (json!({"code": "2C30"}), json!({"code": "2C32"})),
        (json!({"reference": "#image-1"}), json!({"reference": "#image-3"})),
        (json!({"width": 320}), json!({"width": 321})),
        (json!({"identifier": [{"value": "a1"}]}), json!({"identifier": [{"value": "a2"}]})),
        (
            json!({"referenceRange": [{"high": {"value": 16}}]}),
            json!({"referenceRange": [{"high": {"value": 12}}]}),
        ),
    ] {
        assert!(!same(a.clone(), b.clone()), "{a} {b}");
    }
}

/// Two views of one lesion, and two photographs of which one is too dark, each a case of its own.
const VIEWS: &[&str] = &["cases/ham10000-mel-a.jpg", "cases/ham10000-mel-b.jpg"];
const ONE_IS_DARK: &[&str] = &["cases/isic2017-nv-dark.jpg", "isic2017-nv.jpg"];

/// The report of image files as one case, with the heat map of the first class of each.
fn report_of(engine: &mut dyn Engine, model: &Model, names: &[&str]) -> Result<Value> {
    let images: Vec<Vec<u8>> = names.iter().map(|name| sample_bytes(name)).collect();
    let entries = names.iter().zip(&images).map(|(name, file)| ImageEntry {
        bytes: file.len(),
        format: format_of(name),
        title: None,
        taken: None,
        body_site: None,
    });
    let mut manifest = Manifest::new(entries.collect(), None, None);
    manifest.heat_maps = 1;
    let payload = Payload { manifest, images: images.into_iter().map(Into::into).collect() };
    let analysis = analyse(engine, model, &payload, 1, DECODE_DEADLINE, &|| false)?;
    let at = OffsetDateTime::UNIX_EPOCH;
    let report = report::build(&Case {
        job: "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f".parse()?,
        accepted_at: at,
        finished_at: at,
        manifest: &payload.manifest,
        findings: &analysis.findings,
        model,
    });
    Ok(serde_json::from_slice(&Resource::DiagnosticReport(Box::new(report)).to_json())?)
}

// The whole report of every sample image, and of two cases of two images, field by field, with the heat map of each first
// class: words and quality to the letter, what the network says as above. `DERMFLOW_WRITE_REPORTS=1` writes the expected ones
// anew.
#[tokio::test]
async fn the_reports_of_the_samples_are_the_expected_ones() -> Result<()> {
    let (model, mut engine) = derm7().await?;
    let expected: BTreeMap<String, Value> = serde_json::from_slice(&sample_bytes("expected.json"))?;
    let alone = expected.keys().map(|name| vec![name.as_str()]);
    let mut reports = BTreeMap::new();
    for names in alone.chain([VIEWS.to_vec(), ONE_IS_DARK.to_vec()]) {
        let mut report = report_of(&mut *engine, &model, &names)?;
        for media in report["contained"].as_array_mut().context("nothing contained")? {
            // The bytes of a picture follow from the last bit of a float.
            if let Some(content) = media.get_mut("content").and_then(Value::as_object_mut)
                && content.remove("data").is_some()
            {
                content.remove("hash");
                content.remove("size");
            }
        }
        reports.insert(names.join(", "), report);
    }
    let golden = images().join("reports.json");
    if std::env::var_os("DERMFLOW_WRITE_REPORTS").is_some() {
        fs::write(&golden, serde_json::to_string_pretty(&reports)? + "\n")?;
    }
    let golden: BTreeMap<String, Value> = serde_json::from_slice(&fs::read(golden)?)?;
    assert!(golden.keys().eq(reports.keys()));
    for (name, report) in &reports {
        alike(name, PERCENT, report, &golden[name])?;
    }
    Ok(())
}

// Evaluation has the outlines of the reports.
#[tokio::test]
async fn the_program_writes_the_outlines_of_the_reports() -> Result<()> {
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let (model, mut engine) = derm7().await?;
    let names = [VIEWS, &["isic2017-nv-exif6.jpg"]].concat();
    let outlines = async |model: &str, last: &str| {
        Command::new(programs()?.join("worker"))
            .arg("outlines")
            .arg("--ort-dylib")
            .arg(&servers.onnxruntime)
            .arg(repo().join(model))
            .args(names.iter().chain([&last]).map(|name| images().join(name)))
            .output()
            .await
            .context("worker outlines")
    };
    let told = outlines("workers/models/derm7", "README.md").await?;
    let error = String::from_utf8_lossy(&told.stderr);
    ensure!(!told.status.success() && error.contains("README.md"), "{error}");
    let lines: Vec<&str> = std::str::from_utf8(&told.stdout)?.lines().collect();
    assert_eq!(lines.len(), names.len());
    for (name, line) in names.iter().zip(lines) {
        let report = report_of(&mut *engine, &model, &[*name])?;
        let parts = resource(&report, "extent-1")?["component"].as_array().context("no parts")?;
        let polygon = parts.iter().find_map(|part| part["valueString"].as_str());
        assert_eq!(polygon, Some(line), "{name}");
    }
    let told = outlines("tests/models/tiny", names[0]).await?;
    let error = String::from_utf8_lossy(&told.stderr);
    ensure!(!told.status.success() && error.contains("no map of the lesion"), "{error}");
    Ok(())
}

// What is said of a case is the mean of what is said of its images, and of one that is too dark nothing is.
#[tokio::test]
async fn a_case_is_the_mean_of_its_good_images() -> Result<()> {
    let (model, mut engine) = derm7().await?;
    for (names, good) in [(VIEWS, &["1", "2"][..]), (ONE_IS_DARK, &["2"])] {
        let report = report_of(&mut *engine, &model, names)?;
        let of = |suffix: &str| -> Result<BTreeMap<String, f64>> {
            distribution_is_consistent(&model, &report, suffix)?;
            Ok(distribution(resource(&report, &format!("classification-{suffix}"))?).into_iter().collect())
        };
        let each = good.iter().map(|suffix| of(suffix)).collect::<Result<Vec<_>>>()?;
        ensure!(each.len() < 2 || each[0] != each[1], "the images are the same to the model");
        for (code, joint) in of("joint")? {
            let mean = each.iter().map(|one| one[&code]).sum::<f64>() / each.len() as f64;
            // Each number is rounded, up or down.
            ensure!((joint - mean).abs() <= 0.02, "{code}: {joint}, not {mean}");
        }
        let from: Vec<Value> = good.iter().map(|n| json!({"reference": format!("#image-{n}")})).collect();
        assert_eq!(resource(&report, "classification-joint")?["derivedFrom"], json!(from));
    }
    let report = report_of(&mut *engine, &model, ONE_IS_DARK)?;
    let quality = resource(&report, "quality-1")?;
    assert_eq!(quality["interpretation"][0]["text"], "Poor", "{quality}");
    let parts = quality["component"].as_array().context("no parts")?;
    let exposure = parts.iter().find(|part| part["code"]["coding"][0]["code"] == "image-quality-exposure");
    assert!(hundredths(&exposure.context("no exposure")?["valueQuantity"])? < 5_000, "{quality}");
    let refused = resource(&report, "classification-1")?;
    assert_eq!(refused["status"], "cancelled");
    assert_eq!(refused["dataAbsentReason"]["coding"][0]["code"], "not-performed");
    for absent in ["malignancy-1", "extent-1"] {
        assert!(resource(&report, absent).is_err(), "{absent}");
    }
    Ok(())
}

fn resource<'a>(report: &'a Value, id: &str) -> Result<&'a Value> {
    let contained = report["contained"].as_array().context("nothing contained")?;
    contained.iter().find(|resource| resource["id"] == id).with_context(|| format!("no {id}"))
}

/// Hundredths, as printed.
fn hundredths(quantity: &Value) -> Result<i64> {
    Ok((quantity["value"].as_f64().context("no value")? * 100.0).round() as i64)
}

/// A distribution sums to 100.00 %, and what follows from it does follow.
fn distribution_is_consistent(model: &Model, report: &Value, suffix: &str) -> Result<()> {
    let observation = resource(report, &format!("classification-{suffix}"))?;
    let classes: BTreeMap<String, i64> = distribution(observation)
        .into_iter()
        .map(|(code, percent)| (code, (percent * 100.0).round() as i64))
        .collect();
    ensure!(classes.len() == model.classes.len() && !classes.contains_key("other"), "{classes:?}");
    ensure!(classes.values().sum::<i64>() == 10_000, "{classes:?}");
    let entropy: f64 =
        classes.values().filter(|p| **p > 0).map(|p| *p as f64 / 10_000.0).map(|p| -p * p.ln()).sum();
    let printed = observation["component"].as_array().and_then(|parts| parts.last()).context("no entropy")?;
    let share = entropy / (classes.len() as f64).ln() * 10_000.0;
    ensure!((hundredths(&printed["valueQuantity"])? as f64 - share).abs() <= 1.0, "{share} {printed}");
    for indicator in &model.indicators {
        let found = resource(report, &format!("{}-{suffix}", indicator.id))?;
        ensure!(found["code"]["coding"][0]["code"] == indicator.code, "{found}");
        let value = hundredths(&found["valueQuantity"])?;
        if indicator.classes.is_empty() {
            let domain = resource(report, &format!("domain-{suffix}"));
            let confidence = domain.and_then(|d| hundredths(&d["component"][0]["valueQuantity"]));
            ensure!(suffix == "joint" || value == confidence?, "{suffix}: {value}");
            ensure!(
                Some(hundredths(&found["referenceRange"][0]["high"])?) == model.domain.map(i64::from),
                "{found}"
            );
        } else {
            let sum: i64 = indicator.classes.iter().map(|code| classes[code]).sum();
            ensure!(value == sum, "{}-{suffix}: {value}, not {sum}", indicator.id);
        }
        let threshold = hundredths(&found["referenceRange"][0]["high"])?;
        let reads = if value >= threshold { "H" } else { "N" };
        ensure!(found["interpretation"][0]["coding"][0]["code"] == reads, "{found}");
    }
    Ok(())
}

// REQ_004: in a report as it comes, every number follows from others, hashes are those of the data, and an image that is
// refused counts nowhere. In German, as the caller reads that.
#[tokio::test(flavor = "multi_thread")]
async fn a_live_report_agrees_with_itself() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let model = Model::load(&repo().join("workers/models/derm7"), false)?;
    let mut white = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_pixel(400, 300, image::Rgb([250, 250, 250]))
        .write_to(&mut white, image::ImageFormat::Png)?;
    let files = [sample_bytes("ham10000-mel.jpg"), white.into_inner(), sample_bytes("isic2017-nv.png")];
    let mut request = parameters(&files);
    let asked = json!({"name": "heatMap", "valueCode": "top-5"});
    request["parameter"][0]["part"][0]["valueAttachment"]["creation"] = json!("2026-02");
    request["parameter"].as_array_mut().context("no parameters")?.push(asked);
    let answer = lab.client().analyze(&request, &[("accept-language", "it, de-CH;q=0.9, en;q=0.5")]).await?;
    ensure!(answer.status == 200, "{}", answer.text);
    assert_eq!(answer.header("content-language"), "de");
    let report = &answer.body;
    assert_eq!(report["language"], "de");
    let told = [&report["conclusion"], &report["text"]["div"]].map(|text| text.as_str().unwrap_or_default());
    assert!(told[0].contains("Bild 2 wurde von der Motivprüfung"), "{told:?}");
    assert!(told.iter().all(|text| text.contains("Verdacht auf Malignität")), "{told:?}");
    let english = model.indicators.iter().find(|i| told.iter().any(|text| text.contains(&i.display)));
    assert!(english.is_none(), "{english:?}: {told:?}");
    for suffix in ["1", "3", "joint"] {
        distribution_is_consistent(&model, report, suffix)?;
    }

    let cancelled = resource(report, "classification-2")?;
    assert_eq!(cancelled["status"], "cancelled");
    assert_eq!(cancelled["dataAbsentReason"]["coding"][0]["code"], "not-performed");
    assert_eq!(resource(report, "domain-2")?["valueBoolean"], false);
    let joint = json!([{"reference": "#image-1"}, {"reference": "#image-3"}]);
    for id in ["classification-joint", "malignancy-joint", "has-condition-joint"] {
        assert_eq!(resource(report, id)?["derivedFrom"], joint);
    }
    for absent in ["malignancy-2", "extent-2", "heatmap-2-mel"] {
        assert!(resource(report, absent).is_err(), "{absent}");
    }

    for (n, file) in (1..).zip(&files) {
        let media = resource(report, &format!("image-{n}"))?;
        let taken = if n == 1 { &json!("2026-02") } else { &report["effectiveDateTime"] };
        assert_eq!(media["createdDateTime"], *taken);
        assert_eq!(media["identifier"][0]["value"], hex(digest(&SHA256, file).as_ref()));
        assert_eq!(media["content"]["hash"], STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, file)));
        assert_eq!(media["content"]["size"], file.len());
        let modality = resource(report, &format!("modality-{n}"))?;
        assert_eq!(media["modality"], modality["valueCodeableConcept"]);
        let confidences = [0, 1].map(|part| hundredths(&modality["component"][part]["valueQuantity"]));
        assert_eq!(confidences.into_iter().sum::<Result<i64>>()?, 10_000);
        let quality = resource(report, &format!("quality-{n}"))?;
        let parts = quality["component"].as_array().context("no parts")?[1..].iter();
        let least = parts.map(|part| hundredths(&part["valueQuantity"])).collect::<Result<Vec<_>>>()?;
        assert_eq!(Some(hundredths(&quality["valueQuantity"])?), least.into_iter().min());
    }

    for n in [1, 3] {
        let ranked = distribution(resource(report, &format!("classification-{n}"))?);
        for (code, _) in &ranked[..5] {
            let map = resource(report, &format!("heatmap-{n}-{code}"))?;
            let (content, reference) = (&map["content"], format!("#heatmap-{n}-{code}"));
            let file = STANDARD.decode(content["data"].as_str().context("no data")?)?;
            assert_eq!(content["hash"], STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, &file)));
            assert_eq!(content["size"], file.len());
            let picture = image::load_from_memory(&file)?;
            assert_eq!(picture.color(), image::ColorType::Rgb8);
            let image = resource(report, &format!("image-{n}"))?;
            for (side, drawn) in [("width", picture.width()), ("height", picture.height())] {
                assert_eq!((&map[side], &image[side]), (&json!(drawn), &json!(drawn)));
            }
            let links = report["media"].as_array().context("no media")?;
            let link = links.iter().find(|media| media["link"]["reference"] == reference.as_str());
            let comment = link.context("not linked")?["comment"].as_str().context("no comment")?;
            assert!(comment.starts_with("Heat map for ") && comment.ends_with(&format!(" on image {n}")));
        }
        assert!(resource(report, &format!("heatmap-{n}-{}", ranked[5].0)).is_err(), "five");
    }
    println!("{} bytes with ten heat maps", answer.text.len());
    let alone = lab.client().analyze(&parameters(&files[1..2]), &[]).await?;
    assert_eq!(alone.header("content-language"), "en");
    assert_eq!(alone.body["text"]["div"].as_str().unwrap().matches("<p>").count(), 1);
    assert!(
        alone.body["conclusion"]
            .as_str()
            .unwrap()
            .starts_with("No result: image 1 was refused by the domain check")
    );
    fhir::validate(&[("three images".into(), report.clone()), ("none".into(), alone.body)]).await?;
    lab.stop().await
}
