//! Memory of ingress while a large batch is uploaded, and the upload that other benchmarks fill the queue with.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_tests::{
    client::Client,
    lab::{Lab, Setup},
};
use futures_util::stream;
use reqwest::{Body, Method};
use serde_json::Value;

use crate::{
    burst::photographs,
    measure::{forget_peak, peak_rss_mb, rss_mb, verdict},
};

/// The longest upload.
const WITHIN: Duration = Duration::from_mins(20);

/// Uploads `lines` lines with `image` each to a new batch, made while they are sent; reads the answer meanwhile.
/// Returns the jobs of the lines that were accepted, which must be all.
pub(crate) async fn upload(client: &Client, image: &[u8], lines: usize) -> Result<Vec<String>> {
    let image = STANDARD.encode(image);
    let line = move |n| {
        let line = format!("{{\"custom_id\":\"{n}\",\"images\":[{{\"data\":\"{image}\"}}]}}\n");
        Ok::<_, std::convert::Infallible>(line)
    };
    let body = Body::wrap_stream(stream::iter((0..lines).map(line)));
    let request = client.request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
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
    Ok(jobs)
}

/// One upload of `bytes` while nobody works.
pub(crate) async fn memory(bytes: usize) -> Result<()> {
    let image = photographs(1)?.remove(0);
    let lines = bytes / (image.len() * 4 / 3);
    let lab = Lab::start(Setup::without_workers()).await?;
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
