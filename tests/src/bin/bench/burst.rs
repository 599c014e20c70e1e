//! C: 5,000 jobs at once from one client, which is `dermflow submit`, while others want little and soon; then equal backlogs,
//! and a full queue.

use std::{
    io::Cursor,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::clock;
use dermflow_tests::{
    client::{Client, parameters, sample_bytes},
    desk::Desk,
    fairness::{Evenness, evenness},
    lab::{Lab, Setup, Worker},
};
use image::{DynamicImage, codecs::jpeg::JpegEncoder, imageops::FilterType};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::{process::Child, sync::oneshot};

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
/// Jobs of each of the clients whose shares are compared afterwards.
const EQUAL: usize = 600;
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
    desk: Desk,
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
        let photographs: Vec<_> = photographs.iter().map(|file| ("photograph.jpg", file.clone())).collect();
        let (desk, connections) = (Desk::new(lab, "demo", &photographs, LARGE)?, CONNECTIONS.to_string());
        let flags = ["--no-wait", "--json", "--quiet", "--in-flight", "1", "--concurrency", &connections];
        let submit = desk.start(&flags)?;
        Ok(Self { desk, submit })
    }

    async fn end(self, lab: &Lab) -> Result<Accepted> {
        let output = self.submit.wait_with_output().await?;
        drop(self.desk);
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "dermflow submit: {} {said}", output.status);
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

/// The burst with the model of a folder and this `sync_interval` of the broker, then a full queue.
pub(crate) async fn burst(model: &Path, sync_interval: &'static str) -> Result<()> {
    let photographs = photographs(IMAGES)?;
    println!("images: {} of {} kB", photographs.len(), photographs[0].len() / 1_000);
    let bare = bare_rate(model, &photographs).await?;
    let requests = photographs.iter().map(|file| parameters(std::slice::from_ref(file)).to_string());
    let bodies = Arc::new(requests.collect::<Vec<_>>());
    let worker = Worker::models(&[model.display().to_string()]).arg("--reserved-executors", "1");
    let workers = vec![worker; 2];
    let lab = Lab::in_service(Setup { workers, sync_interval, ..Setup::default() }).await?;
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
    let (stop, stopped) = oneshot::channel();
    let probing = tokio::spawn(probe(patient, bodies.clone(), stopped));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let asking = [lab.client(), &b, &c].map(|client| tokio::spawn(promises(client.clone())));
    let small = [b, c].map(|client| tokio::spawn(submit_all(client, bodies.clone(), SMALL, 4)));
    let flood = flood.end(&lab).await?;
    let mut jobs = flood.jobs;
    for submitted in small {
        jobs.extend(jobs_of(&submitted.await??));
    }
    until_ended(&lab, Duration::from_mins(10)).await?;
    let drained = begun.elapsed().as_secs_f64();
    drop(stop);
    let mut probed = probing.await?;
    for ((name, after), (_, before)) in cpu_seconds(&lab)?.into_iter().zip(before) {
        println!("{name}: {:.2} ms of processor a job", (after - before) / (LARGE + 2 * SMALL) as f64 * 1e3);
    }
    let goal = if sync_interval == "always" { 200.0 } else { 400.0 };
    let told = format!("at least {goal} with sync_interval {sync_interval}");
    verdict("accepted a second", flood.rate, flood.rate >= goal, &told);
    verdict("acceptance p99, ms", flood.p99_ms, flood.p99_ms <= 500.0, "at most 500");
    let ratio = drained / ((LARGE + 2 * SMALL) as f64 / bare);
    verdict("drained, in times of the bare loop", ratio, ratio <= 1.15, "at most 1.15");
    for client in ["b", "c"] {
        let times = worked_off(&lab, client).await? / alone;
        verdict(&format!("client {client}, in times of alone"), times, times <= 4.5, "at most 4.5");
    }
    let (idle99, busy99) = (percentile(&mut idle, 99), percentile(&mut probed.millis, 99));
    let times = busy99 / idle99;
    slowest(&lab).await?;
    println!(
        "synchronous under the burst: {} requests, p50 {:.0} ms, p99 {busy99:.0} ms; idle p99 {idle99:.0} ms",
        probed.millis.len(),
        percentile(&mut probed.millis, 50)
    );
    verdict("synchronous p99, in times of idle", times, times <= 3.0, "at most 3");
    verdict("synchronous requests that failed", probed.failed as f64, probed.failed == 0, "0");
    check(&lab, &jobs).await?;
    for (name, pid) in lab.pids().into_iter().filter(|(name, _)| name.starts_with("ingress")) {
        let rss = peak_rss_mb(pid)? as f64;
        verdict(&format!("{name}: peak RSS, MB"), rss, rss <= 512.0, "at most 512");
    }
    let mut promises = Vec::new();
    for asked in asking {
        promises.extend(asked.await??);
    }
    honest(&lab, promises).await?;
    even(&lab, &bodies).await?;
    lab.stop().await?;
    Box::pin(capped(&bodies, sync_interval)).await
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

/// What became of synchronous requests.
#[derive(Debug, Default)]
struct Probed {
    /// Of each that was answered with a report.
    millis: Vec<f64>,
    failed: usize,
}

/// One synchronous request a second, until `stopped`.
async fn probe(client: Client, bodies: Arc<Vec<String>>, mut stopped: oneshot::Receiver<()>) -> Probed {
    let (mut tick, mut probed) = (tokio::time::interval(Duration::from_secs(1)), Probed::default());
    for body in bodies.iter().cycle() {
        tokio::select! {
            _ = tick.tick() => {}
            _ = &mut stopped => break,
        }
        match synchronous(&client, body).await {
            Ok(millis) => probed.millis.push(millis),
            Err(error) => {
                println!("a synchronous request failed: {error:#}");
                probed.failed += 1;
            }
        }
    }
    probed
}

async fn synchronous(client: &Client, body: &str) -> Result<f64> {
    let begun = Instant::now();
    let answer = client.analyze_raw(body.to_owned(), &[]).await?;
    ensure!(answer.status == 200, "{} {}", answer.status, answer.text);
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// When a job would start, as the server told its client.
struct Promise {
    job: String,
    asked: OffsetDateTime,
    start: String,
}

/// Asks for the place of the client's newest queued job every half second, 60 times.
async fn promises(client: Client) -> Result<Vec<Promise>> {
    let mut promises = Vec::new();
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    for _ in 0..60 {
        tick.tick().await;
        let page = client.get("/jobs?status=queued&limit=1").await?;
        let Some(id) = page.body["jobs"][0]["id"].as_str() else { continue };
        let record = client.get(&format!("/jobs/{id}")).await?;
        // By the clock that the server goes by as well: its `Date` has whole seconds only.
        let asked = clock::now();
        if let Some(start) = record.body["queue"]["expected_start"].as_str() {
            promises.push(Promise { job: id.to_owned(), asked, start: start.to_owned() });
        }
    }
    Ok(promises)
}

/// Compares promised with real waits, those of more than a second.
async fn honest(lab: &Lab, promises: Vec<Promise>) -> Result<()> {
    let mut ratios = Vec::new();
    for Promise { job, asked, start } in promises {
        let query = format!(
            "SELECT extract(epoch FROM '{start}'::timestamptz - '{asked}'::timestamptz)::float8, \
             extract(epoch FROM started_at - '{asked}'::timestamptz)::float8 \
             FROM ingress.jobs WHERE id = '{job}' AND started_at IS NOT NULL"
        );
        let rows = lab.sql(&query).await?;
        let Some(row) = rows.first() else { continue };
        let (told, real): (f64, f64) = (row.get(0), row.get(1));
        if real > 1.0 {
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

/// Three clients with the same backlog get the same.
async fn even(lab: &Lab, bodies: &Arc<Vec<String>>) -> Result<()> {
    let names = ["even-1", "even-2", "even-3"];
    let mut submitting = Vec::new();
    for name in names {
        submitting.push(tokio::spawn(submit_all(lab.register(name).await?, bodies.clone(), EQUAL, 4)));
    }
    for submitted in submitting {
        submitted.await??;
    }
    until_ended(lab, Duration::from_mins(10)).await?;
    let Evenness { jain, windows } = evenness(lab, &names, EQUAL).await?;
    ensure!(windows > 0, "equal backlogs were worked off before a window was over");
    verdict("equal backlogs: least Jain's index of any 5 s", jain, jain >= 0.95, "at least 0.95");
    Ok(())
}

/// The queue holds [`CAP`] jobs and nobody works: exactly the excess is refused, soon.
async fn capped(bodies: &Arc<Vec<String>>, sync_interval: &'static str) -> Result<()> {
    let lab = Lab::in_service(Setup { sync_interval, ..Setup::without_workers() }).await?;
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
