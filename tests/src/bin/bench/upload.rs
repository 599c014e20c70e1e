//! Memory of ingress while large batches are uploaded, one or several at once, and the upload that other benchmarks fill
//! the queue with.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_tests::{
    client::Client,
    lab::{Lab, Setup},
};
use futures_util::{future::try_join_all, stream};
use reqwest::{Body, Method};
use serde_json::Value;

use crate::{
    burst::photographs,
    measure::{forget_peak, peak_rss_mb, rss_mb, verdict},
};

/// The longest upload.
const WITHIN: Duration = Duration::from_mins(20);

/// Uploads at once: half of them to one batch, the others to one each.
const PARALLEL: usize = 8;

/// What came of an upload.
pub(crate) struct Uploaded {
    /// Where to send more.
    batch: String,
    /// Of all lines.
    pub(crate) jobs: Vec<String>,
}

/// Uploads `lines` lines with `image` each to a new batch.
pub(crate) async fn upload(client: &Client, image: &[u8], lines: usize) -> Result<Vec<String>> {
    Ok(upload_to(client, "/batches", "line", image, lines).await?.jobs)
}

/// Uploads `lines` lines with `image` each, made while they are sent, and named after `name`; reads the answer
/// meanwhile. All must be accepted.
async fn upload_to(client: &Client, path: &str, name: &str, image: &[u8], lines: usize) -> Result<Uploaded> {
    let (image, name) = (STANDARD.encode(image), name.to_owned());
    let line = move |n| {
        let line = format!("{{\"custom_id\":\"{name}-{n}\",\"images\":[{{\"data\":\"{image}\"}}]}}\n");
        Ok::<_, std::convert::Infallible>(line)
    };
    let body = Body::wrap_stream(stream::iter((0..lines).map(line)));
    let request = client.request(Method::POST, path).header("content-type", "application/x-ndjson");
    let mut response = request.timeout(WITHIN).body(body).send().await?.error_for_status()?;
    let (mut jobs, mut rest, mut last) = (Vec::new(), Vec::new(), Value::Null);
    while let Some(chunk) = response.chunk().await? {
        rest.extend_from_slice(&chunk);
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            last = serde_json::from_slice(&rest[..end])?;
            rest.drain(..=end);
            jobs.extend(last["job"].as_str().map(str::to_owned));
        }
    }
    ensure!(last["complete"] == true && jobs.len() == lines, "{} of {lines} accepted; {last}", jobs.len());
    let batch = format!("/batches/{}", last["batch"].as_str().context("no batch")?);
    Ok(Uploaded { batch, jobs })
}

/// [`PARALLEL`] uploads at once, of `bytes` together, while nobody works: the bounds of ingress hold for their sum.
pub(crate) async fn parallel(bytes: usize) -> Result<()> {
    let image = photographs(1)?.remove(0);
    let lines = bytes / (image.len() * 4 / 3) / PARALLEL;
    let lab = Lab::in_service(Setup::without_workers()).await?;
    let (_, pid) =
        lab.pids().into_iter().find(|(name, _)| name.starts_with("ingress")).context("no ingress")?;
    let shared = upload_to(lab.client(), "/batches", "first", &image, 16).await?;
    forget_peak(pid)?;
    let (before, begun) = (rss_mb(pid)?, Instant::now());
    let paths = (0..PARALLEL).map(|n| if n % 2 == 0 { shared.batch.as_str() } else { "/batches" });
    let names: Vec<String> = (0..PARALLEL).map(|n| format!("upload-{n}")).collect();
    let uploads = paths.zip(&names).map(|(path, name)| upload_to(lab.client(), path, name, &image, lines));
    let uploaded = try_join_all(uploads).await?;
    let (seconds, peak) = (begun.elapsed().as_secs_f64(), peak_rss_mb(pid)? as f64);
    let jobs: HashSet<&String> = uploaded.iter().flat_map(|uploaded| &uploaded.jobs).collect();
    let recorded = lab.count("SELECT count(*) FROM ingress.jobs WHERE state = 'queued'").await?;
    println!("{PARALLEL} uploads of {lines} lines: {:.0} lines/s", jobs.len() as f64 / seconds);
    println!("RSS of ingress: {before:.0} MB before, {peak:.0} MB at the peak");
    verdict("peak RSS, MB", peak, peak <= 512.0, "at most 512");
    let lost = (PARALLEL * lines + shared.jobs.len()) as i64 - recorded;
    verdict("jobs that are not queued", lost as f64, lost == 0 && jobs.len() == PARALLEL * lines, "0");
    lab.stop().await
}

/// One upload of `bytes` while nobody works.
pub(crate) async fn memory(bytes: usize) -> Result<()> {
    let image = photographs(1)?.remove(0);
    let lines = bytes / (image.len() * 4 / 3);
    let lab = Lab::in_service(Setup::without_workers()).await?;
    let (_, pid) =
        lab.pids().into_iter().find(|(name, _)| name.starts_with("ingress")).context("no ingress")?;
    // What the first lines bring into being is there while ingress is idle, too.
    upload(lab.client(), &image, 16).await?;
    forget_peak(pid)?;
    let before = rss_mb(pid)?;
    let begun = Instant::now();
    upload(lab.client(), &image, lines).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let (peak, after) = (peak_rss_mb(pid)? as f64, rss_mb(pid)?);
    println!(
        "{lines} lines, {} MB in {seconds:.1} s: {:.0} lines/s, {:.1} MB/s",
        bytes / 1_000_000,
        lines as f64 / seconds,
        bytes as f64 / 1e6 / seconds
    );
    println!("RSS of ingress: {before:.0} MB before, {peak:.0} MB at the peak, {after:.0} MB afterwards");
    verdict("peak RSS above idle, MB", peak - before, peak - before <= 64.0, "at most 64");
    lab.stop().await
}
