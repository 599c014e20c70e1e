//! C: 5,000 jobs at once from one client, which is `dermflow submit`, while others want little and soon.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_local::stack::programs;
use dermflow_tests::{
    client::{Client, parameters, sample_bytes},
    lab::{Lab, Setup, Worker},
};
use image::{DynamicImage, codecs::jpeg::JpegEncoder, imageops::FilterType};
use serde_json::Value;
use tokio::process::{Child, Command};

use crate::measure::{
    bare_rate, check, cpu_seconds, jobs_of, offer_all, peak_rss_mb, percentile, submit_all, until_ended,
    verdict,
};

/// Jobs of the client with the backlog.
const LARGE: usize = 4_900;
/// Jobs of each client that comes a second later.
const SMALL: usize = 50;
/// Connections of the large client, each of which posts an image when the one before it is accepted.
const CONNECTIONS: usize = 16;
/// About the bytes of one image.
const IMAGE_BYTES: usize = 138_000;
/// Different images.
const IMAGES: usize = 16;
/// Synchronous requests before the burst: about as many as during it.
const IDLE: usize = 60;
/// Jobs in hand when the queue is capped.
const CAP: usize = 1_000;

/// So many photographs of [`IMAGE_BYTES`], made from a sample at 1,024 × 768 pixels.
pub(crate) fn photographs(count: usize) -> Result<Vec<Vec<u8>>> {
    let sample = image::load_from_memory(&sample_bytes("ham10000-mel.jpg"))?;
    let large = sample.resize_exact(1_024, 768, FilterType::CatmullRom).into_rgb8();
    let mut photographs = Vec::new();
    for n in 0..count {
        let mut photograph = large.clone();
        // Detail that JPEG has to keep, another one in each, without a generator of random numbers.
        for (x, y, pixel) in photograph.enumerate_pixels_mut() {
            let noise = ((x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503) ^ (n as u32 * 97)) >> 7) & 7;
            pixel.0.iter_mut().for_each(|value| *value = value.saturating_add(noise as u8));
        }
        let photograph = DynamicImage::from(photograph);
        let encode = |quality| {
            let mut file = Cursor::new(Vec::new());
            photograph.write_with_encoder(JpegEncoder::new_with_quality(&mut file, quality))?;
            anyhow::Ok(file.into_inner())
        };
        let mut best = encode(30)?;
        for quality in (35..=95).step_by(5) {
            let next = encode(quality)?;
            if next.len().abs_diff(IMAGE_BYTES) < best.len().abs_diff(IMAGE_BYTES) {
                best = next;
            }
        }
        photographs.push(best);
    }
    Ok(photographs)
}

/// The large client: `dermflow submit` with a folder of images.
struct Flood {
    folder: PathBuf,
    submit: Child,
}

/// What `dermflow submit` says of its work.
struct Accepted {
    /// A second, from its start on.
    rate: f64,
    p99_ms: f64,
    jobs: Vec<String>,
}

impl Flood {
    /// Starts as the client `demo`, with [`LARGE`] names for `photographs`.
    fn start(lab: &Lab, photographs: &[Vec<u8>]) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("dermflow-burst-{}", uuid::Uuid::new_v4().simple()));
        let images = folder.join("images");
        fs::create_dir_all(&images)?;
        fs::write(folder.join("password"), lab.password("demo")?)?;
        for (n, photograph) in photographs.iter().enumerate() {
            fs::write(folder.join(n.to_string()), photograph)?;
        }
        for n in 0..LARGE {
            let photograph = folder.join((n % photographs.len()).to_string());
            fs::hard_link(photograph, images.join(format!("{n:05}.jpg")))?;
        }
        let mut command = Command::new(programs()?.join("dermflow"));
        command.args([
            "submit",
            "images",
            "--no-wait",
            "--json",
            "--quiet",
            "--in-flight",
            "1",
            "--concurrency",
        ]);
        command.arg(CONNECTIONS.to_string()).args(["--user", "demo", "--password-file", "password", "--url"]);
        command.arg(lab.url(0)).arg("--ca").arg(lab.ca()).current_dir(&folder);
        let submit = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        Ok(Self { folder, submit })
    }

    async fn end(self, lab: &Lab) -> Result<Accepted> {
        let output = self.submit.wait_with_output().await?;
        fs::remove_dir_all(self.folder)?;
        ensure!(output.status.success(), "dermflow submit: {}", output.status);
        let summary: Value = serde_json::from_slice(&output.stdout)?;
        let figure = |name: &str| summary["acceptance"][name].as_f64().with_context(|| summary.to_string());
        let batch = summary["batch"].as_str().context("no batch")?;
        let jobs = lab.sql(&format!("SELECT id::text FROM ingress.jobs WHERE batch = '{batch}'")).await?;
        let jobs: Vec<String> = jobs.iter().map(|row| row.get(0)).collect();
        ensure!(jobs.len() == LARGE, "{} jobs of {LARGE} images", jobs.len());
        Ok(Accepted { rate: LARGE as f64 / figure("seconds")?, p99_ms: figure("p99_ms")?, jobs })
    }
}

/// Seconds from the first acceptance of these clients' jobs to the last end.
async fn worked_off(lab: &Lab, client: &str) -> Result<f64> {
    let query = format!(
        "SELECT extract(epoch FROM max(finished_at) - min(accepted_at))::float8 FROM ingress.jobs \
         WHERE client = (SELECT id FROM auth.users WHERE username = '{client}')"
    );
    Ok(lab.sql(&query).await?.first().context("no row")?.get(0))
}

/// The burst with the model of a folder, then the same with a full queue.
pub(crate) async fn burst(model: &Path) -> Result<()> {
    let photographs = photographs(IMAGES)?;
    println!("images: {} of {} kB", photographs.len(), photographs[0].len() / 1_000);
    let bare = bare_rate(model, &photographs).await?;
    let requests = photographs.iter().map(|file| parameters(std::slice::from_ref(file)).to_string());
    let bodies = Arc::new(requests.collect::<Vec<_>>());
    let worker = Worker::models(&[model.display().to_string()]).arg("--reserved-executors", "1");
    let lab = Lab::in_service(Setup { workers: vec![worker; 2], ..Setup::default() }).await?;
    let alone = lab.register("alone").await?;
    submit_all(alone, bodies.clone(), SMALL, 4).await?;
    until_ended(&lab, Duration::from_mins(1)).await?;
    let alone = worked_off(&lab, "alone").await?;
    let mut idle = Vec::new();
    let patient = lab.register("patient").await?;
    for n in 0..IDLE {
        idle.push(synchronous(&patient, &bodies[n % IMAGES]).await?);
    }
    println!(
        "alone: {SMALL} jobs in {alone:.2} s; a synchronous request p50 {:.0} ms",
        percentile(&mut idle, 50)
    );

    let (b, c) = (lab.register("b").await?, lab.register("c").await?);
    let before = cpu_seconds(&lab)?;
    let (begun, flood) = (Instant::now(), Flood::start(&lab, &photographs)?);
    let probing = tokio::spawn(probe(patient, bodies.clone()));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let small = [b, c].map(|client| tokio::spawn(submit_all(client, bodies.clone(), SMALL, 4)));
    let places = tokio::spawn(promises(lab.client().clone()));
    let flood = flood.end(&lab).await?;
    for submitted in small {
        submitted.await??;
    }
    until_ended(&lab, Duration::from_mins(10)).await?;
    let drained = begun.elapsed().as_secs_f64();
    probing.abort();
    for ((name, after), (_, before)) in cpu_seconds(&lab)?.into_iter().zip(before) {
        println!("{name}: {:.2} ms of processor a job", (after - before) / (LARGE + 2 * SMALL) as f64 * 1e3);
    }
    verdict("accepted a second", flood.rate, flood.rate >= 200.0, "at least 200 with sync_interval always");
    verdict("acceptance p99, ms", flood.p99_ms, flood.p99_ms <= 500.0, "at most 500");
    let ratio = drained / ((LARGE + 2 * SMALL) as f64 / bare);
    verdict("drained, in times of the bare loop", ratio, ratio <= 1.15, "at most 1.15");
    for client in ["b", "c"] {
        let times = worked_off(&lab, client).await? / alone;
        verdict(&format!("client {client}, in times of alone"), times, times <= 4.5, "at most 4.5");
    }
    let mut waits: Vec<f64> = PROBES.lock().map(|found| found.clone()).unwrap_or_default();
    let (idle99, busy99) = (percentile(&mut idle, 99), percentile(&mut waits, 99));
    let times = busy99 / idle99;
    slowest(&lab).await?;
    println!(
        "synchronous under the burst: {} requests, p50 {:.0} ms, p99 {busy99:.0} ms; idle p99 {idle99:.0} ms",
        waits.len(),
        percentile(&mut waits, 50)
    );
    verdict("synchronous p99, in times of idle", times, times <= 3.0, "at most 3");
    check(&lab, &flood.jobs).await?;
    for (name, pid) in lab.pids().into_iter().filter(|(name, _)| name.starts_with("ingress")) {
        let rss = peak_rss_mb(pid)? as f64;
        verdict(&format!("{name}: peak RSS, MB"), rss, rss <= 512.0, "at most 512");
    }
    honest(&lab, places.await??).await?;
    lab.stop().await?;
    Box::pin(capped(&bodies)).await
}

/// Where the slowest synchronous requests spent their time.
async fn slowest(lab: &Lab) -> Result<()> {
    let phases = "SELECT 1e3 * extract(epoch FROM queued_at - accepted_at)::float8, \
                  1e3 * extract(epoch FROM started_at - queued_at)::float8, \
                  1e3 * extract(epoch FROM finished_at - started_at)::float8 \
                  FROM ingress.jobs WHERE lane = 'interactive' ORDER BY finished_at - accepted_at DESC LIMIT 3";
    for row in lab.sql(phases).await? {
        let [queued, started, finished]: [f64; 3] = [row.get(0), row.get(1), row.get(2)];
        println!(
            "slow: {queued:.0} ms until queued, {started:.0} more until started, {finished:.0} until finished"
        );
    }
    Ok(())
}

static PROBES: std::sync::Mutex<Vec<f64>> = std::sync::Mutex::new(Vec::new());

/// One synchronous request a second, until it is aborted.
async fn probe(client: Client, bodies: Arc<Vec<String>>) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    for body in bodies.iter().cycle() {
        tick.tick().await;
        if let (Ok(millis), Ok(mut probes)) = (synchronous(&client, body).await, PROBES.lock()) {
            probes.push(millis);
        }
    }
}

async fn synchronous(client: &Client, body: &str) -> Result<f64> {
    let begun = Instant::now();
    let answer = client.analyze_raw(body.to_owned(), &[]).await?;
    ensure!(answer.status == 200, "{} {}", answer.status, answer.text);
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// Asks for the place of the latest queued job every half second: the job, when it was asked, and the promise.
async fn promises(client: Client) -> Result<Vec<(String, String, String)>> {
    let mut promises = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    for _ in 0..60 {
        tick.tick().await;
        let page = client.get("/jobs?status=queued&limit=1").await?;
        let Some(id) = page.body["jobs"][0]["id"].as_str() else { continue };
        let record = client.get(&format!("/jobs/{id}")).await?;
        if let Some(start) = record.body["queue"]["expected_start"].as_str() {
            promises.push((id.to_owned(), record.header("date").to_owned(), start.to_owned()));
        }
    }
    Ok(promises)
}

/// Compares promised with real waits, those of more than two seconds.
async fn honest(lab: &Lab, promises: Vec<(String, String, String)>) -> Result<()> {
    let mut ratios = Vec::new();
    for (job, asked, promised) in promises {
        let query = format!(
            "SELECT extract(epoch FROM '{promised}'::timestamptz - '{asked}'::timestamptz)::float8, \
             extract(epoch FROM started_at - '{asked}'::timestamptz)::float8 FROM ingress.jobs WHERE id = '{job}'"
        );
        let rows = lab.sql(&query).await?;
        let Some(row) = rows.first() else { continue };
        let (told, real): (f64, f64) = (row.get(0), row.get(1));
        if real > 2.0 {
            ratios.push(told / real);
        }
    }
    let within = ratios.iter().filter(|ratio| (0.5..=2.0).contains(*ratio)).count();
    println!(
        "promised starts: {} asked, ratios promised / real p5 {:.2}, p50 {:.2}, p95 {:.2}",
        ratios.len(),
        percentile(&mut ratios, 5),
        percentile(&mut ratios, 50),
        percentile(&mut ratios, 95)
    );
    let share = within as f64 / ratios.len().max(1) as f64;
    verdict("promised starts within a factor of 2", share, share >= 0.95, "at least 0.95 of them");
    Ok(())
}

/// The queue holds [`CAP`] jobs and nobody works: exactly the excess is refused, soon.
async fn capped(bodies: &Arc<Vec<String>>) -> Result<()> {
    let lab = Lab::in_service(Setup::without_workers()).await?;
    let jetstream = lab.jetstream().await?;
    let mut config = jetstream.get_stream("JOBS").await?.cached_info().config.clone();
    config.max_messages = CAP as i64;
    jetstream.update_stream(&config).await?;
    let offered = offer_all(lab.client().clone(), bodies.clone(), CAP + 500, 4).await?;
    let accepted = jobs_of(&offered).len();
    verdict("accepted with a cap of 1,000", accepted as f64, accepted == CAP, "1,000 of 1,500");
    let refused = offered.iter().filter(|offered| offered.status == 503 && offered.code == "queue-full");
    let mut refused: Vec<f64> = refused.map(|offered| offered.millis).collect();
    verdict("refused as queue-full", refused.len() as f64, refused.len() == 500, "500");
    let p99 = percentile(&mut refused, 99);
    verdict("refusal p99, ms", p99, p99 <= 50.0, "at most 50");
    lab.stop().await
}
