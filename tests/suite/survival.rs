//! I1, I2: kill, pause and restart whatever there is; no accepted job is lost and none is done twice.

use std::{
    collections::{BTreeSet, HashSet},
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use dermflow_schemas::{
    clock,
    envelope::{Failure, ResultHeader},
    error::Code,
};
use dermflow_tests::{
    client::{Client, sample},
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_mins(1);
// Between two tries of a client that was refused.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

// A request that differs from every other by its order number.
fn order(n: usize) -> Value {
    let mut request = sample("isic2017-nv.jpg");
    let identifier = json!({"name": "identifier", "valueIdentifier": {"value": format!("ORD-{n}")}});
    request["parameter"].as_array_mut().expect("a list").push(identifier);
    request
}

// Submits under the key `n` until the job is accepted, as a careful client does.
async fn submit(client: &Client, n: usize) -> Result<String> {
    let key = format!("order-{n}");
    let headers = [("prefer", "respond-async"), ("idempotency-key", key.as_str())];
    let (request, deadline) = (order(n), Instant::now() + LONG);
    loop {
        match client.analyze(&request, &headers).await {
            // 200 when it is done already: the answer names the report, whose id is the job's.
            Ok(answer) if [200, 202].contains(&answer.status) => return Ok(answer.job().to_owned()),
            Ok(answer) if answer.status != 503 => bail!("order {n}: {} {}", answer.status, answer.text),
            _ => ensure!(Instant::now() < deadline, "order {n} was not accepted within {LONG:?}"),
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

// Submits orders 0 to `jobs`, `at_once` at a time.
async fn submit_all(client: Client, jobs: usize, at_once: usize) -> Result<Vec<String>> {
    let one = |n| {
        let client = client.clone();
        async move { submit(&client, n).await }
    };
    stream::iter(0..jobs).map(one).buffered(at_once).collect::<Vec<_>>().await.into_iter().collect()
}

// The checker: of the jobs that were accepted each has exactly one result, and there is no other.
async fn check(lab: &Lab, accepted: &[String], within: Duration) -> Result<()> {
    let open = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";
    let settled = async || (lab.count(open).await.ok()? == 0).then_some(());
    eventually("every job has ended", within, settled).await?;
    let rows = lab.sql("SELECT job::text FROM ingress.reports ORDER BY job").await?;
    let read: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let (accepted, found): (BTreeSet<_>, BTreeSet<_>) = (accepted.iter().collect(), read.iter().collect());
    let lost: Vec<_> = accepted.difference(&found).collect();
    let unexpected: Vec<_> = found.difference(&accepted).collect();
    ensure!(lost.is_empty(), "lost: {lost:?}");
    ensure!(unexpected.is_empty(), "unexpected: {unexpected:?}");
    ensure!(read.len() == found.len(), "some job has two reports");
    let billed = lab.count("SELECT coalesce(sum(jobs), 0)::bigint FROM ingress.usage").await?;
    ensure!(billed == accepted.len() as i64, "{billed} billed of {}", accepted.len());
    let emptied =
        async || (lab.messages("JOBS").await.ok()? + lab.messages("RESULTS").await.ok()? == 0).then_some(());
    eventually("the queue is empty", within, emptied).await
}

// R1, and the 2,000 jobs of the acceptance test: a worker is killed every 2 s while they are worked off.
#[tokio::test(flavor = "multi_thread")]
async fn r1_two_thousand_jobs_survive_a_worker_killed_every_two_seconds() -> Result<()> {
    const JOBS: usize = 2_000;
    let workers = vec![Worker::simulated(20), Worker::simulated(20)];
    let mut lab = Lab::start(Setup { workers, ack_wait: 3, ..Setup::default() }).await?;
    let client = lab.client().clone();
    let begun = Instant::now();
    let submitting = tokio::spawn(submit_all(client, JOBS, 16));
    let (mut kills, mut tick) = (0, tokio::time::interval(Duration::from_secs(2)));
    tick.tick().await;
    let open = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";
    while !submitting.is_finished() || lab.count(open).await? > 0 {
        tick.tick().await;
        lab.kill_worker(kills % 2).await?;
        lab.restart_worker(kills % 2).await?;
        kills += 1;
        ensure!(begun.elapsed() < Duration::from_mins(5), "not worked off in 5 minutes");
    }
    let accepted = submitting.await??;
    ensure!(accepted.iter().collect::<HashSet<_>>().len() == JOBS, "ids are not distinct");
    check(&lab, &accepted, LONG).await?;
    ensure!(kills >= 3, "only {kills} kills: the test shows nothing");
    println!("{JOBS} jobs, {kills} kills, {:.1} s", begun.elapsed().as_secs_f64());
    lab.stop().await
}

// R2: SIGTERM drains: what runs is finished, nothing is delivered again.
#[tokio::test(flavor = "multi_thread")]
async fn r2_a_worker_told_to_stop_finishes_what_it_has() -> Result<()> {
    let mut lab = Lab::start(Setup {
        workers: vec![Worker::simulated(700), Worker::simulated(700)],
        ..Setup::default()
    })
    .await?;
    let accepted = submit_all(lab.client().clone(), 8, 8).await?;
    lab.until_state(&accepted[0], "running").await?;
    let begun = Instant::now();
    lab.stop_worker(0).await?;
    ensure!(begun.elapsed() < Duration::from_secs(30), "the worker took {:?} to stop", begun.elapsed());
    check(&lab, &accepted, LONG).await?;
    assert_eq!(lab.count("SELECT max(attempts)::bigint FROM ingress.jobs").await?, 1);
    lab.stop().await
}

// A worker killed in the middle of a job: another one has it after `ack_wait`, as a second attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_moves_on_when_its_worker_is_killed() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 2, ..Setup::simulated(1_500) }).await?;
    let job = submit(lab.client(), 0).await?;
    lab.until_state(&job, "running").await?;
    lab.kill_worker(0).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    assert_eq!(lab.client().poll(&job, Duration::from_secs(10)).await?.status, 200);
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.body["attempts"], 2);
    check(&lab, &[job], LONG).await?;
    lab.stop().await
}

// R3: ingress killed while a caller waits: the retry with its key finds the same job.
#[tokio::test(flavor = "multi_thread")]
async fn r3_a_caller_finds_its_job_after_ingress_was_killed() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1_500)).await?;
    let (client, request) = (lab.client().clone(), order(1));
    let key = [("idempotency-key", "r3")];
    let waiting = tokio::spawn({
        let (client, request) = (client.clone(), request.clone());
        async move { client.analyze(&request, &key).await }
    });
    let first = eventually("the job is in the queue", LONG, async || {
        lab.sql("SELECT id::text FROM ingress.jobs WHERE queued_at IS NOT NULL")
            .await
            .ok()?
            .first()
            .map(|row| row.get::<_, String>(0))
    })
    .await?;
    lab.kill_ingress(0).await?;
    assert!(waiting.await?.is_err(), "the connection was not cut");
    lab.restart_ingress(0).await?;
    let again = client.analyze(&request, &key).await?;
    assert_eq!((again.status, again.body["id"].as_str()), (200, Some(first.as_str())), "{}", again.text);
    check(&lab, &[first], LONG).await?;
    lab.stop().await
}

// R4: the broker is killed and restarted under load; submissions in between are refused or retried, never
// lost.
#[tokio::test(flavor = "multi_thread")]
async fn r4_jobs_survive_a_killed_broker() -> Result<()> {
    const JOBS: usize = 300;
    let mut lab = Lab::start(Setup { ack_wait: 3, ..Setup::simulated(5) }).await?;
    let client = lab.client().clone();
    let submitting = tokio::spawn(submit_all(client, JOBS, 8));
    for n in 1..=3 {
        let recorded =
            async || (lab.count("SELECT count(*) FROM ingress.jobs").await.ok()? >= n * 75).then_some(());
        eventually("submissions go on", LONG, recorded).await?;
        lab.kill_nats().await?;
        lab.restart_nats().await?;
    }
    let accepted = submitting.await??;
    check(&lab, &accepted, LONG).await?;
    lab.stop().await
}

// R5: a frozen broker: 503 within 2 s, and at once again when it goes on. Polling still answers.
#[tokio::test(flavor = "multi_thread")]
async fn r5_a_frozen_broker_is_a_quick_503() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1)).await?;
    let done = submit(lab.client(), 0).await?;
    lab.client().poll(&done, LONG).await?;
    lab.pause_nats();
    let begun = Instant::now();
    let refused = lab.client().analyze(&order(1), &[("idempotency-key", "frozen")]).await?;
    assert_eq!((refused.status, refused.code()), (503, "queue-unavailable"));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(lab.client().get(&format!("/fhir/_async/{done}")).await?.status, 200);
    lab.resume_nats();
    let served = async || (lab.client().analyze(&order(2), &[]).await.ok()?.status == 200).then_some(());
    eventually("the broker is back", Duration::from_secs(10), served).await?;
    lab.stop().await
}

// PostgreSQL away: submissions are refused, results wait in the queue; both go on afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn results_wait_while_the_database_is_away() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 3, ..Setup::simulated(1_000) }).await?;
    let job = submit(lab.client(), 0).await?;
    lab.until_state(&job, "running").await?;
    lab.kill_postgres().await?;
    let refused = lab.client().analyze(&order(1), &[]).await?;
    assert_eq!((refused.status, refused.code()), (503, "database-unavailable"), "{}", refused.text);
    let stored = async || (lab.messages("RESULTS").await.ok()? == 1).then_some(());
    eventually("the result waits in the queue", LONG, stored).await?;
    lab.restart_postgres().await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    check(&lab, &[job], LONG).await?;
    lab.stop().await
}

// R10: a worker that sleeps through `ack_wait` and wakes: its result comes second, and is dropped.
#[tokio::test(flavor = "multi_thread")]
async fn r10_the_result_of_a_worker_that_slept_is_dropped() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 2, ..Setup::simulated(1_000) }).await?;
    let job = submit(lab.client(), 0).await?;
    lab.until_state(&job, "running").await?;
    lab.pause_worker(0);
    lab.start_worker(Worker::simulated(1)).await?;
    let report = lab.client().poll(&job, LONG).await?;
    assert_eq!(report.status, 200);
    lab.resume_worker(0);
    let late = async || lab.metric("dermflow_late_results_total").await.filter(|count| *count >= 1.0);
    eventually("the late result is dropped", LONG, late).await?;
    assert_eq!(lab.client().get(&format!("/fhir/_async/{job}")).await?.text, report.text);
    check(&lab, &[job], LONG).await?;
    lab.stop().await
}

// Two replicas of ingress on one queue and one record: a job submitted to one is polled at, waited for at and
// cancelled at the other, and one of them may die.
#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_are_one_service() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::simulated(50) }).await?;
    let second = lab.client().clone().at(&lab.url(1));
    let mut accepted = Vec::new();
    for n in 0..40 {
        let (here, there) = if n % 2 == 0 { (lab.client(), &second) } else { (&second, lab.client()) };
        let job = submit(here, n).await?;
        let ended = there.poll(&job, LONG).await?;
        assert_eq!((ended.status, ended.body["id"].as_str()), (200, Some(job.as_str())));
        accepted.push(job);
    }
    lab.kill_ingress(0).await?;
    accepted.push(submit(&second, 40).await?);
    assert_eq!(second.poll(&accepted[40], LONG).await?.status, 200);
    check(&lab, &accepted, LONG).await?;
    lab.stop().await
}

// Replicas that start at the same moment on an empty database: the tables are made once.
#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_start_together_migrate_once() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 3, ..Setup::simulated(1) }).await?;
    for n in 0..3 {
        lab.kill_ingress(n).await?;
    }
    lab.sql("DROP SCHEMA ingress CASCADE").await?;
    lab.sql("CREATE SCHEMA ingress AUTHORIZATION dermflow_ingress").await?;
    lab.restart_every_ingress().await?;
    let accepted = submit_all(lab.client().clone(), 4, 4).await?;
    check(&lab, &accepted, LONG).await?;
    lab.stop().await
}

// Ingress is told to stop while a caller waits: the caller still gets its answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_caller_is_answered_before_ingress_stops() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1_500)).await?;
    let (client, request) = (lab.client().clone(), order(0));
    let waiting = client.analyze(&request, &[]);
    let stopping = async {
        let running = "SELECT count(*) FROM ingress.jobs WHERE state = 'running'";
        let runs = async || (lab.count(running).await.ok()? == 1).then_some(());
        eventually("the job runs", LONG, runs).await?;
        lab.stop_ingress(0).await
    };
    let (answer, stopped) = tokio::join!(waiting, stopping);
    stopped?;
    assert_eq!(answer?.status, 200);
    lab.stop().await
}

// Two results of one job in one batch, as after an outage of the database: the first one wins, and a failed job
// has no report and is not counted.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_of_two_results_in_a_batch_wins() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let job = submit(lab.client(), 0).await?;
    lab.kill_ingress(0).await?;
    let (id, now) = (job.parse()?, clock::now());
    let failure = Failure { code: Code::AttemptsExhausted, image: None };
    let failed = ResultHeader::failed(id, failure, 5, now, now).encode(&[]);
    let succeeded = ResultHeader::succeeded(id, 4, now, now, 1, "k1".into()).encode(b"sealed");
    let jetstream = lab.jetstream().await?;
    for result in [failed, succeeded] {
        jetstream.publish(format!("results.{job}"), result).await?.await?;
    }
    lab.restart_ingress(0).await?;
    lab.until_state(&job, "failed").await?;
    let drained = async || (lab.messages("RESULTS").await.ok()? == 0).then_some(());
    eventually("both results are taken", LONG, drained).await?;
    assert_eq!(lab.count("SELECT count(*) FROM ingress.reports").await?, 0);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.usage").await?, 0);
    lab.stop().await
}
