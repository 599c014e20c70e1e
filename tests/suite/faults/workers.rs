//! Workers that are killed, stopped or asleep.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dermflow_schemas::clock;
use dermflow_tests::{
    checker::Ledger,
    form::scale,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};

use super::{SETTLE, jobs};

const BETWEEN_KILLS: Duration = Duration::from_secs(2);
const OPEN: &str = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";

// R1, and the 2,000 jobs of the acceptance test: a worker is killed every 2 s while they are worked off. What was
// in a killed worker's hands is done again, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn r1_two_thousand_jobs_survive_a_worker_killed_every_two_seconds() -> Result<()> {
    const JOBS: usize = 2_000;
    // An executor, and one place for what is published meanwhile.
    const SLOTS: i64 = 2;
    let worker = || Worker::simulated(scale(20, 110));
    let mut lab =
        Lab::start(Setup { workers: vec![worker(), worker()], ack_wait: 3, ..Setup::default() }).await?;
    let (ledger, client, begun) = (Ledger::default(), lab.client().clone(), Instant::now());
    let submitting = tokio::spawn({
        let ledger = ledger.clone();
        async move { ledger.submit_all(&client, 0..JOBS, 16).await }
    });
    let (mut kills, mut tick) = (0, tokio::time::interval(BETWEEN_KILLS));
    tick.tick().await;
    while !submitting.is_finished() || lab.count(OPEN).await? > 0 {
        tick.tick().await;
        lab.kill_worker(kills % 2).await?;
        lab.restart_worker(kills % 2).await?;
        kills += 1;
        ensure!(begun.elapsed() < Duration::from_mins(5), "not worked off in 5 minutes");
    }
    submitting.await??;
    let tally = ledger.check(&lab, &[], SETTLE).await?;
    ensure!(tally.succeeded == JOBS, "{tally:?}");
    ensure!(kills >= scale(3, 50), "only {kills} kills: the test shows nothing");
    ensure!(tally.repeated <= kills as i64 * SLOTS, "{} repetitions after {kills} kills", tally.repeated);
    println!("{JOBS} jobs, {kills} kills, {} repeated, {:?}", tally.repeated, begun.elapsed());
    lab.stop().await
}

// R1: the job that a killed worker had begins again at another one within `ack_wait` + 2 s, as a second attempt.
#[tokio::test(flavor = "multi_thread")]
async fn r1_the_job_of_a_killed_worker_moves_on_in_time() -> Result<()> {
    const ACK_WAIT: u64 = 3;
    let mut lab = Lab::start(Setup { ack_wait: ACK_WAIT, ..Setup::simulated(20_000) }).await?;
    let ledger = Ledger::default();
    let job = ledger.submit(lab.client(), 0).await?;
    lab.until_state(&job, "running").await?;
    lab.start_worker(Worker::simulated(1)).await?;
    let killed = clock::now();
    lab.kill_worker(0).await?;
    assert_eq!(lab.client().poll(&job, Duration::from_secs(10)).await?.status, 200);
    let again = format!("SELECT extract(epoch FROM started_at - '{killed}')::bigint FROM ingress.jobs");
    let after = lab.count(&again).await?;
    ensure!(after <= ACK_WAIT as i64 + 2, "begun again {after} s after the kill");
    let tally = ledger.check(&lab, &[], SETTLE).await?;
    ensure!(tally.repeated == 1, "{tally:?}");
    lab.stop().await
}

// R2: SIGTERM drains: what runs is finished, nothing is delivered again, and the worker ends within its grace.
#[tokio::test(flavor = "multi_thread")]
async fn r2_workers_told_to_stop_finish_what_they_have() -> Result<()> {
    let workers = vec![Worker::simulated(30), Worker::simulated(30)];
    let mut lab = Lab::start(Setup { workers, ..Setup::default() }).await?;
    let ledger = Ledger::default();
    let load = ledger.load(lab.client(), 0, 80);
    let mut slowest = Duration::ZERO;
    for stop in 0..scale(6, 25) {
        let more = ledger.acknowledged() + 25;
        eventually("jobs are accepted", SETTLE, async || (ledger.acknowledged() >= more).then_some(()))
            .await?;
        let begun = Instant::now();
        lab.stop_worker(stop % 2).await?;
        slowest = slowest.max(begun.elapsed());
        lab.restart_worker(stop % 2).await?;
    }
    load.end_after(jobs()).await?;
    let tally = ledger.check(&lab, &[], SETTLE).await?;
    ensure!(tally.repeated == 0, "{} jobs were delivered again", tally.repeated);
    ensure!(slowest < Duration::from_secs(30), "a worker took {slowest:?} to stop");
    println!("slowest stop {slowest:?}");
    lab.stop().await
}

// R10: a worker that sleeps through `ack_wait` and wakes: its result comes second, and is dropped.
#[tokio::test(flavor = "multi_thread")]
async fn r10_the_result_of_a_worker_that_slept_is_dropped() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 2, ..Setup::simulated(1_000) }).await?;
    let ledger = Ledger::default();
    let job = ledger.submit(lab.client(), 0).await?;
    lab.until_state(&job, "running").await?;
    lab.pause_worker(0);
    lab.start_worker(Worker::simulated(1)).await?;
    let report = lab.client().poll(&job, SETTLE).await?;
    assert_eq!(report.status, 200);
    lab.resume_worker(0);
    let late = async || lab.metric("dermflow_late_results_total").await.filter(|count| *count >= 1.0);
    eventually("the late result is dropped", SETTLE, late).await?;
    assert_eq!(lab.client().get(&format!("/fhir/_async/{job}")).await?.text, report.text);
    ledger.check(&lab, &[], SETTLE).await?;
    lab.stop().await
}

// R10 under load: each of three workers sleeps through `ack_wait` in turn.
#[tokio::test(flavor = "multi_thread")]
async fn r10_workers_that_sleep_in_turn_lose_and_double_nothing() -> Result<()> {
    let workers = vec![Worker::simulated(20), Worker::simulated(20), Worker::simulated(20)];
    let mut lab = Lab::start(Setup { workers, ack_wait: 2, ..Setup::default() }).await?;
    let ledger = Ledger::default();
    let load = ledger.load(lab.client(), 0, 80);
    for sleep in 0..scale(2, 12) {
        let more = ledger.acknowledged() + 25;
        eventually("jobs are accepted", SETTLE, async || (ledger.acknowledged() >= more).then_some(()))
            .await?;
        lab.pause_worker(sleep % 3);
        let mut asleep = tokio::time::interval(Duration::from_secs(3));
        asleep.tick().await;
        asleep.tick().await;
        lab.resume_worker(sleep % 3);
    }
    load.end_after(jobs()).await?;
    ledger.check(&lab, &[], SETTLE).await?;
    lab.stop().await
}
