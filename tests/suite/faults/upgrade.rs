//! R14: two versions of the envelope side by side, as in a rolling upgrade.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_nats::HeaderMap;
use dermflow_schemas::{
    clock,
    envelope::{Failure, ResultHeader},
    error::Code,
    queue,
};
use dermflow_tests::{
    checker::Ledger,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use futures_util::StreamExt;
use serde_json::Value;

use super::{SETTLE, jobs};

/// Changes the header line of an envelope, as a build of another version would write it.
fn rewritten(message: &[u8], change: impl FnOnce(&mut Value)) -> Result<Vec<u8>> {
    let end = message.iter().position(|byte| *byte == b'\n').context("no header line")?;
    let mut header: Value = serde_json::from_slice(&message[..end])?;
    change(&mut header);
    Ok([header.to_string().as_bytes(), &message[end..]].concat())
}

/// Takes every waiting job out of the queue and puts `change`d ones in their place.
async fn change_waiting(lab: &Lab, change: impl Fn(usize, &mut Value)) -> Result<usize> {
    let context = lab.jetstream().await?;
    let stream = context.get_stream(queue::JOBS).await?;
    let state = stream.cached_info().state.clone();
    let mut changed = 0;
    for sequence in state.first_sequence..=state.last_sequence {
        let message = stream.get_raw_message(sequence).await?;
        stream.delete_message(sequence).await?;
        let body = rewritten(&message.payload, |header| change(changed, header))?;
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", format!("changed-{changed}").as_str());
        context.publish_with_headers(message.subject, headers, body.into()).await?.await?;
        changed += 1;
    }
    Ok(changed)
}

// A newer build may add to the envelope without a new version: this build works on such jobs, and on its own beside
// them; and it reads results with additions.
#[tokio::test(flavor = "multi_thread")]
async fn r14_additions_of_a_newer_build_are_read() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let ledger = Ledger::default();
    let jobs = jobs() / 4;
    ledger.submit_all(lab.client(), 0..jobs, 16).await?;
    let add = |n: usize, header: &mut Value| {
        if n.is_multiple_of(2) {
            header["priority"] = "urgent".into();
            header["trace"] = serde_json::json!({"parent": "00-1", "state": []});
        }
    };
    ensure!(change_waiting(&lab, add).await? == jobs);
    lab.start_worker(Worker::simulated(1)).await?;
    ledger.check(&lab, &[], SETTLE).await?;

    lab.stop_worker(0).await?;
    let job = ledger.submit(lab.client(), jobs).await?;
    let now = clock::now();
    let failure = Failure { code: Code::AnalysisFailed, image: None };
    let result = ResultHeader::failed(job.parse()?, failure, 1, now, now).encode(&[]);
    let result = rewritten(&result, |header| header["gpu_us"] = 7.into())?;
    lab.jetstream().await?.publish(format!("results.{job}"), result.into()).await?.await?;
    lab.until_state(&job, "failed").await?;
    lab.restart_worker(0).await?;
    ledger.check(&lab, &["analysis-failed"], SETTLE).await?;
    lab.stop().await
}

// A job of a version that this build does not know goes to the dead letters as it is; the worker goes on with those
// that it knows. A result of such a version stays in the queue for an ingress that knows it.
#[tokio::test(flavor = "multi_thread")]
async fn r14_an_unknown_version_is_kept_and_stops_nobody() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1)).await?;
    let ledger = Ledger::default();
    lab.stop_worker(0).await?;
    let jobs = jobs() / 4;
    let accepted = ledger.submit_all(lab.client(), 0..jobs, 16).await?;
    let newer = |n: usize, header: &mut Value| {
        if n == 3 {
            header["v"] = 2.into();
            header["job_ref"] = header["job"].take();
        }
    };
    ensure!(change_waiting(&lab, newer).await? == jobs);
    lab.restart_worker(0).await?;
    let pid = lab.pids();
    let done =
        format!("SELECT count(*) FROM ingress.jobs WHERE state = 'succeeded' HAVING count(*) = {}", jobs - 1);
    let done = async || (lab.count(&done).await.ok()? > 0).then_some(());
    eventually("the others are worked on", SETTLE, done).await?;
    let kept = async || (lab.messages(queue::DEAD).await.ok()? == 1).then_some(());
    eventually("it is among the dead letters", SETTLE, kept).await?;
    let letters = lab.jetstream().await?.get_stream(queue::DEAD).await?;
    let letter = letters.get_raw_message(letters.cached_info().state.last_sequence).await?;
    ensure!(letter.payload.starts_with(b"{") && letter.payload.windows(5).any(|bytes| bytes == b"\"v\":2"));
    assert_eq!(lab.pids(), pid, "a process was restarted");

    // Its job is open in the record: a newer build's result ends it, which this one leaves alone.
    let open = lab.sql("SELECT id::text FROM ingress.jobs WHERE finished_at IS NULL").await?;
    let job: String = open.first().context("no job is open")?.get(0);
    ensure!(accepted.contains(&job));
    let now = clock::now();
    let failure = Failure { code: Code::AnalysisFailed, image: None };
    let known = ResultHeader::failed(job.parse()?, failure, 1, now, now).encode(&[]);
    let unknown = rewritten(&known, |header| header["v"] = 2.into())?;
    let context = lab.jetstream().await?;
    let mut heard = lab.broker().await?.subscribe("$JS.ACK.RESULTS.>").await?;
    context.publish(format!("results.{job}"), unknown.into()).await?.await?;
    let nak = async || tokio::time::timeout(Duration::from_secs(1), heard.next()).await.ok().flatten();
    let nak = eventually("the recorder leaves it", SETTLE, nak).await?;
    ensure!(nak.payload.starts_with(b"-NAK"), "{:?}", nak.payload);
    assert_eq!(lab.messages(queue::RESULTS).await?, 1);
    lab.until_state(&job, "queued").await?;
    let results = context.get_stream(queue::RESULTS).await?;
    results.purge().await?;
    context.publish(format!("results.{job}"), known).await?.await?;
    ledger.check(&lab, &["analysis-failed"], SETTLE).await?;
    lab.stop().await
}
