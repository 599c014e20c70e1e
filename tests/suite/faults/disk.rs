//! What is on the broker's disk: cut off by a power loss, damaged, deleted.

use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dermflow_schemas::{
    clock,
    envelope::JobHeader,
    limits::PUBLISH_DEADLINE,
    queue::{self, Message, Publisher},
};
use dermflow_tests::{
    checker::Ledger,
    form::scale,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};

use super::SETTLE;

/// An accepted job whose payload is gone ends with this code, soon.
const LOST: &str = "payload-lost";
const REPORTED_WITHIN: Duration = Duration::from_mins(1);
const RECREATED_WITHIN: Duration = Duration::from_secs(10);
const LOST_JOBS: &str = "SELECT count(*) FROM ingress.jobs WHERE failure->>'code' = 'payload-lost'";

/// How many jobs are in the queue when the disk fails.
fn jobs() -> usize {
    scale(60, 2_000)
}

/// The broker loses its power: it stands still, its disk is copied without what the kernel has not written yet, and
/// it starts again from the copy. Returns how many pages were lost.
async fn lose_power(lab: &mut Lab) -> Result<u64> {
    let store = lab.storage()[0].clone();
    let copy = store.with_extension("copy");
    lab.pause_nats();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("faults/power_loss.py");
    let output = Command::new("python3").arg(script).arg(&store).arg(&copy).output()?;
    lab.kill_nats().await?;
    if output.status.code() == Some(3) {
        bail!("this kernel does not tell which pages are on the disk: cachestat(2) came with Linux 6.5");
    }
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    println!("lost pages and files: {}", text.trim());
    fs::remove_dir_all(&store)?;
    fs::rename(&copy, &store)?;
    lab.restart_nats().await?;
    Ok(text.split_whitespace().next().context("no count")?.parse()?)
}

// R7: with `sync_interval: always` a power loss under load costs nothing that was acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn r7_a_power_loss_costs_nothing_that_was_acknowledged() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 3, ..Setup::simulated(10) }).await?;
    let ledger = Ledger::default();
    let load = ledger.load(lab.client(), 0, 200);
    for _ in 0..scale(2, 8) {
        let more = ledger.acknowledged() + jobs();
        eventually("jobs are accepted", SETTLE, async || (ledger.acknowledged() >= more).then_some(()))
            .await?;
        lose_power(&mut lab).await?;
    }
    load.end_after(jobs()).await?;
    // More came in than one worker does meanwhile.
    ledger.check(&lab, &[], SETTLE * scale(1, 5)).await?;
    lab.stop().await
}

// R7: with JetStream's own setting it does cost some, and each of those is reported.
#[tokio::test(flavor = "multi_thread")]
async fn r7_what_a_power_loss_costs_without_flushing_is_reported() -> Result<()> {
    let mut lab = Lab::start(Setup { sync_interval: "2m", ..Setup::without_workers() }).await?;
    let ledger = Ledger::default();
    let accepted = ledger.submit_all(lab.client(), 0..jobs(), 16).await?;
    let pages = lose_power(&mut lab).await?;
    ensure!(pages > 0, "everything was on the disk: the test shows nothing");
    let left = left_in_queue(&lab).await;
    println!("{left} of {} payloads are left", accepted.len());
    ensure!(left < accepted.len() as u64, "nothing was lost: the test shows nothing");
    lab.start_worker(Worker::simulated(1)).await?;
    report_losses(&lab, &ledger, accepted.len() as u64 - left).await?;
    lab.stop().await
}

/// Messages in JOBS; none when the stream itself is gone.
async fn left_in_queue(lab: &Lab) -> u64 {
    lab.messages(queue::JOBS).await.unwrap_or(0)
}

/// Waits until at least `lost` jobs are failed as lost, and checks that nothing else is wrong.
async fn report_losses(lab: &Lab, ledger: &Ledger, lost: u64) -> Result<Vec<String>> {
    let begun = Instant::now();
    let reported = async || (lab.count(LOST_JOBS).await.ok()? >= lost as i64).then_some(());
    eventually(&format!("{lost} lost jobs are reported"), REPORTED_WITHIN, reported).await?;
    println!("{lost} lost jobs reported after {:?}", begun.elapsed());
    let mut tally = ledger.check(lab, &[LOST], SETTLE).await?;
    let named = tally.failed.remove(LOST).unwrap_or_default();
    ensure!(tally.failed.is_empty(), "{tally:?}");
    let metric =
        lab.metric("dermflow_payloads_lost_total").await.context("no dermflow_payloads_lost_total")?;
    ensure!(metric >= lost as f64, "the metric says {metric}, {lost} were lost");
    for job in &named {
        let record = lab.client().get(&format!("/jobs/{job}")).await?;
        ensure!(record.body["error"]["code"] == LOST, "{}", record.text);
    }
    Ok(named)
}

#[derive(Debug, Clone, Copy)]
enum Damage {
    /// One bit of the sealed bytes.
    Flip,
    /// The file ends in the middle of them.
    Truncate,
}

/// Damages a file behind a payload's first bytes.
fn damage(path: &Path, at: usize, damage: Damage) -> Result<()> {
    let at = at + 1_500;
    let mut file = fs::OpenOptions::new().read(true).write(true).open(path)?;
    match damage {
        Damage::Flip => {
            let mut byte = [0];
            file.seek(SeekFrom::Start(at as u64))?;
            file.read_exact(&mut byte)?;
            file.seek(SeekFrom::Start(at as u64))?;
            file.write_all(&[byte[0] ^ 4])?;
        }
        Damage::Truncate => file.set_len(at as u64)?,
    }
    Ok(file.sync_all()?)
}

/// Damages one payload while the broker is down, and lets the workers come. Whatever that costs is reported, and the
/// damaged job is among it.
async fn damaged_payload(kind: Damage, in_order: bool) -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let ledger = Ledger::default();
    let accepted = ledger.submit_all(lab.client(), 0..jobs(), 16).await?;
    let damaged = &accepted[accepted.len() / 2];
    let (path, at) = lab.payload_place(damaged).await?;
    if in_order {
        lab.node(0).stop().await?;
    } else {
        lab.kill_nats().await?;
    }
    damage(&path, at, kind)?;
    lab.restart_nats().await?;
    println!("{} of {} payloads are left", left_in_queue(&lab).await, accepted.len());
    lab.start_worker(Worker::simulated(1)).await?;
    let named = report_losses(&lab, &ledger, 1).await?;
    ensure!(named.contains(damaged), "{damaged} is not among the reported: {named:?}");
    // The queue goes on, and the numbers that the lost messages had are given to others.
    ledger.submit_all(lab.client(), jobs()..jobs() + 20, 8).await?;
    let tally = ledger.check(&lab, &[LOST], SETTLE).await?;
    ensure!(tally.failed[LOST].len() == named.len(), "jobs after the damage were lost too: {tally:?}");
    lab.stop().await
}

// R8: one bit. After a crash the broker rebuilds its index and drops everything behind the damage in that file.
#[tokio::test(flavor = "multi_thread")]
async fn r8_a_flipped_bit_is_reported_after_a_crash() -> Result<()> {
    damaged_payload(Damage::Flip, false).await
}

// R8: one bit. With its index in order, the broker skips the message in silence.
#[tokio::test(flavor = "multi_thread")]
async fn r8_a_flipped_bit_that_the_broker_skips_in_silence_is_reported() -> Result<()> {
    damaged_payload(Damage::Flip, true).await
}

// R8: a file that ends too early.
#[tokio::test(flavor = "multi_thread")]
async fn r8_a_truncated_file_is_reported() -> Result<()> {
    damaged_payload(Damage::Truncate, false).await
}

/// Damages the message at `place` while the broker is down, whose index stays in order: it counts the message, and gives it
/// to nobody. Its job is reported, and no other.
async fn damaged_elsewhere(
    lab: &mut Lab,
    ledger: &Ledger,
    job: &str,
    (path, at): (PathBuf, usize),
    meanwhile: impl AsyncFnOnce(&mut Lab) -> Result<()>,
) -> Result<()> {
    lab.node(0).stop().await?;
    damage(&path, at, Damage::Flip)?;
    lab.restart_nats().await?;
    meanwhile(lab).await?;
    let named = report_losses(lab, ledger, 1).await?;
    ensure!(named == [job], "{job} is lost, and reported are {named:?}");
    Ok(())
}

// R8: one bit of a result that waits to be recorded. The recorder never sees it, and the payload is gone.
#[tokio::test(flavor = "multi_thread")]
async fn r8_a_damaged_result_is_reported() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let ledger = Ledger::default();
    let accepted = ledger.submit_all(lab.client(), 0..20, 8).await?;
    lab.kill_ingress(0).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    let waiting = async || {
        let (jobs, results) = (left_in_queue(&lab).await, lab.messages(queue::RESULTS).await.ok()?);
        (jobs == 0 && results == 20).then_some(())
    };
    eventually("every result waits, and no payload", SETTLE, waiting).await?;
    let job = &accepted[10];
    let results = lab.jetstream().await?.get_stream_no_info(queue::RESULTS).await?;
    let result = results.get_last_raw_message_by_subject(&queue::result_subject(job.parse()?)).await?;
    ensure!(result.payload.len() > 2_000, "the damage would be behind it");
    let place = lab.message_place(queue::RESULTS, i64::try_from(result.sequence)?).await?;
    let restart = async |lab: &mut Lab| lab.restart_ingress(0).await;
    damaged_elsewhere(&mut lab, &ledger, job, place, restart).await?;
    lab.stop().await
}

// R8: one bit of an attempt that waits for its back-off to end, as a worker stores it.
#[tokio::test(flavor = "multi_thread")]
async fn r8_a_damaged_retry_is_reported() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let ledger = Ledger::default();
    let accepted = ledger.submit_all(lab.client(), 0..1, 1).await?;
    let context = lab.jetstream().await?;
    let jobs = context.get_stream_no_info(queue::JOBS).await?;
    let first = jobs.get_raw_message(1).await?;
    let (header, tail) = JobHeader::decode(&first.payload)?;
    let JobHeader { job, lane, client, .. } = header;
    let body = header.at_attempt(2).encode(&tail);
    let retry = Message::retry(lane, client, job, clock::now() + REPORTED_WITHIN / 4, body);
    Publisher::new(context).publish(retry, PUBLISH_DEADLINE).await?;
    jobs.delete_message(1).await?;
    let place = lab.message_place(queue::RETRIES, 1).await?;
    damaged_elsewhere(&mut lab, &ledger, &accepted[0], place, async |lab| {
        lab.start_worker(Worker::simulated(1)).await
    })
    .await?;
    lab.stop().await
}

async fn consumers(lab: &Lab, stream: &str) -> Result<Vec<String>> {
    use futures_util::TryStreamExt;
    let stream = lab.jetstream().await?.get_stream(stream).await?;
    let mut names: Vec<String> = stream.consumer_names().try_collect().await?;
    names.sort();
    Ok(names)
}

/// Whether ingress has raised the alarm about `name`.
fn alarmed(lab: &Lab, name: &str) -> Result<bool> {
    let logs = lab.logs()?;
    let alarm = |line: &str| line.contains("\"WARN\"") || line.contains("\"ERROR\"");
    Ok(logs.lines().any(|line| alarm(line) && line.contains("ingress") && line.contains(name)))
}

// R9: every consumer is deleted under load: all are there again within 10 s, and no job is lost.
#[tokio::test(flavor = "multi_thread")]
async fn r9_deleted_consumers_come_back() -> Result<()> {
    let lab = Lab::start(Setup { ack_wait: 3, ..Setup::simulated(5) }).await?;
    let ledger = Ledger::default();
    let load = ledger.load(lab.client(), 0, 60);
    for stream in [queue::JOBS, queue::RETRIES, queue::RESULTS] {
        let more = ledger.acknowledged() + 20;
        eventually("jobs are accepted", SETTLE, async || (ledger.acknowledged() >= more).then_some(()))
            .await?;
        let before = consumers(&lab, stream).await?;
        ensure!(!before.is_empty(), "{stream} has no consumer");
        let handle = lab.jetstream().await?.get_stream(stream).await?;
        for name in &before {
            handle.delete_consumer(name).await?;
        }
        let deleted = Instant::now();
        let back = async || {
            let now = consumers(&lab, stream).await.ok()?;
            before.iter().all(|name| now.contains(name)).then_some(())
        };
        eventually(&format!("the consumers of {stream} are back"), RECREATED_WITHIN, back).await?;
        println!("{before:?} of {stream} back after {:?}", deleted.elapsed());
        ensure!(alarmed(&lab, stream)?, "no alarm about {stream}");
    }
    load.end_after(super::jobs()).await?;
    ledger.check(&lab, &[], SETTLE).await?;
    lab.stop().await
}

// R9: the streams themselves are deleted: they are there again within 10 s, jobs are accepted and worked on again,
// and what was in them is reported.
#[tokio::test(flavor = "multi_thread")]
async fn r9_deleted_streams_come_back_and_their_jobs_are_reported() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 3, ..Setup::without_workers() }).await?;
    let ledger = Ledger::default();
    let accepted = ledger.submit_all(lab.client(), 0..jobs(), 16).await?;
    for stream in [queue::JOBS, queue::RETRIES, queue::RESULTS] {
        lab.jetstream().await?.delete_stream(stream).await?;
        let deleted = Instant::now();
        let back = async || lab.messages(stream).await.ok();
        eventually(&format!("{stream} is back"), RECREATED_WITHIN, back).await?;
        println!("{stream} back after {:?}", deleted.elapsed());
        ensure!(alarmed(&lab, stream)?, "no alarm about {stream}");
    }
    lab.start_worker(Worker::simulated(1)).await?;
    report_losses(&lab, &ledger, accepted.len() as u64).await?;
    ledger.submit_all(lab.client(), jobs()..2 * jobs(), 8).await?;
    let tally = ledger.check(&lab, &[LOST], SETTLE).await?;
    ensure!(tally.succeeded == jobs(), "{tally:?}");
    lab.stop().await
}
