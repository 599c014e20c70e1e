//! Bulk is fair between clients, starts at once, and stops when nobody wants it any more.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::queue;
use dermflow_tests::{
    client::{Client, parameters, sample, sample_bytes},
    fairness::{Evenness, evenness},
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use futures_util::{StreamExt, stream};

const LONG: Duration = Duration::from_mins(2);

// Submits a job until it is accepted, as a careful client does; 200 when it is done already.
async fn submit_one(client: &Client) -> Result<String> {
    let (request, key) = (sample("isic2017-nv.jpg"), uuid::Uuid::new_v4().to_string());
    let headers = [("prefer", "respond-async"), ("idempotency-key", key.as_str())];
    eventually("a job is accepted", LONG, async || match client.analyze(&request, &headers).await {
        Ok(answer) if [200, 202].contains(&answer.status) => Some(answer.job().to_owned()),
        _ => None,
    })
    .await
}

// Submits `jobs` jobs without waiting for their ends.
async fn submit(client: &Client, jobs: usize) -> Result<Vec<String>> {
    let one = |_| submit_one(client);
    stream::iter(0..jobs).map(one).buffer_unordered(12).collect::<Vec<_>>().await.into_iter().collect()
}

// Gives a client limits or a weight that ingress knows before its next request.
async fn quota(lab: &mut Lab, client: &str, flags: &[&str]) -> Result<()> {
    lab.auth(&[&["user", "quota", client], flags].concat())?;
    lab.stop_ingress(0).await?;
    lab.restart_ingress(0).await
}

async fn until_all_ended(lab: &Lab) -> Result<()> {
    let open = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";
    let ended = async || (lab.count(open).await.ok()? == 0).then_some(());
    eventually("every job has ended", LONG, ended).await
}

// Three clients, the same backlog each, submitted one after the other: in every window of 5 s in which all three
// have jobs waiting they get the same.
#[tokio::test(flavor = "multi_thread")]
async fn equal_backlogs_get_equal_service() -> Result<()> {
    const JOBS: usize = 320;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let clients = [lab.client().clone(), lab.register("second").await?, lab.register("third").await?];
    for client in &clients {
        submit(client, JOBS).await?;
    }
    for _ in 0..2 {
        lab.start_worker(Worker::simulated(15)).await?;
    }
    until_all_ended(&lab).await?;
    let Evenness { jain, windows } = evenness(&lab, &["demo", "second", "third"], JOBS).await?;
    println!("{windows} windows, Jain >= {jain:.4}");
    ensure!(windows >= 5, "only {windows} windows: the test shows nothing");
    ensure!(jain >= 0.95, "Jain's index was {jain}");
    lab.stop().await
}

// Two clients with 50 jobs each beside one with a backlog: within 4.5 times what the 50 take alone.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_jobs_do_not_wait_behind_a_backlog() -> Result<()> {
    const BACKLOG: usize = 600;
    let workers = vec![Worker::simulated(30), Worker::simulated(30)];
    let mut lab = Lab::start(Setup { workers, ..Setup::default() }).await?;
    let (large, small) = (lab.client().clone(), lab.register("second").await?);
    let third = lab.register("third").await?;
    let fifty = async |lab: &Lab, client: &Client| {
        let begun = Instant::now();
        let jobs = submit(client, 50).await?;
        let list = jobs.iter().map(|job| format!("'{job}'")).collect::<Vec<_>>().join(",");
        let open = format!("SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL AND id IN ({list})");
        let ended = async || (lab.count(&open).await.ok()? == 0).then_some(());
        eventually("50 jobs have ended", LONG, ended).await?;
        anyhow::Ok(begun.elapsed().as_secs_f64())
    };
    let alone = fifty(&lab, &small).await?;
    for n in 0..2 {
        lab.stop_worker(n).await?;
    }
    submit(&large, BACKLOG).await?;
    for n in 0..2 {
        lab.restart_worker(n).await?;
    }
    let (second, third) = tokio::try_join!(fifty(&lab, &small), fifty(&lab, &third))?;
    let left = lab.count("SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL").await?;
    println!("alone {alone:.2} s, beside a backlog {second:.2} and {third:.2} s, {left} jobs still waiting");
    ensure!(left > 50, "the backlog was done first: the test shows nothing");
    for beside in [second, third] {
        ensure!(beside <= 4.5 * alone, "{beside:.2} s instead of {alone:.2} s");
    }
    until_all_ended(&lab).await?;
    lab.stop().await
}

// While workers have bulk to do, callers who wait are served within a few jobs, each of them.
#[tokio::test(flavor = "multi_thread")]
async fn no_caller_waits_beside_a_backlog() -> Result<()> {
    const BACKLOG: usize = 1_000;
    const CALLS: usize = 100;
    let workers = vec![Worker::simulated(30), Worker::simulated(30)];
    let lab = Lab::start(Setup { workers, ..Setup::default() }).await?;
    let (bulk, caller) = (lab.client(), lab.register("caller").await?);
    submit(bulk, BACKLOG).await?;
    let body = sample("ham10000-nv.jpg");
    let mut slowest = Duration::ZERO;
    for _ in 0..CALLS {
        let begun = Instant::now();
        let answer = caller.analyze(&body, &[]).await?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.text);
        slowest = slowest.max(begun.elapsed());
    }
    let left = lab.count("SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL").await?;
    println!("slowest of {CALLS}: {slowest:?}, {left} jobs still waiting");
    ensure!(left > 50, "the backlog was done first: the test shows nothing");
    ensure!(slowest < Duration::from_millis(1_500), "{slowest:?}");
    lab.stop().await
}

// Two replicas record what six workers begin and end, the same jobs at the same time: no two transactions wait for each
// other, which the end of the test would find in the log of PostgreSQL.
#[tokio::test(flavor = "multi_thread")]
async fn records_of_a_burst_do_not_wait_in_a_circle() -> Result<()> {
    const BACKLOG: usize = 600;
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    submit(lab.client(), BACKLOG).await?;
    lab.start_workers(vec![Worker::simulated(1); 6]).await?;
    until_all_ended(&lab).await?;
    lab.stop().await
}

// One worker with an executor for all and one for who waits, and four bulk jobs, the first of which runs.
async fn beside_bulk(worker: Worker) -> Result<Lab> {
    let worker = worker.arg("--reserved-executors", "1");
    let lab = Lab::start(Setup { workers: vec![worker], ..Setup::default() }).await?;
    // Who has asked for a job first, at the start of the worker, is not the first to ask any more.
    let first = lab.client().analyze(&sample("isic2017-mel.jpg"), &[]).await?;
    ensure!(first.status == 200, "{}", first.text);
    submit(lab.client(), 4).await?;
    let running = "SELECT count(started_at) FROM ingress.jobs WHERE lane = 'bulk'";
    let running = async || (lab.count(running).await.ok()? > 0).then_some(());
    eventually("a bulk job runs", LONG, running).await?;
    Ok(lab)
}

// Jobs of a lane that began while a bulk job ran, one of four seconds.
async fn begun_beside_bulk(lab: &Lab, lane: &str) -> Result<i64> {
    let beside = "SELECT count(*) FROM ingress.jobs a JOIN ingress.jobs b ON a.id <> b.id AND b.lane = 'bulk' \
                  AND a.started_at - b.started_at BETWEEN interval '0' AND interval '3500 ms' WHERE a.lane = ";
    lab.count(&format!("{beside} '{lane}'")).await
}

async fn until_begun_beside_bulk(lab: &Lab) -> Result<()> {
    let begun = async || (begun_beside_bulk(lab, "interactive").await.ok()? == 1).then_some(());
    eventually("who waits has the other executor", LONG, begun).await
}

// Bulk jobs have one executor, one after the other; the caller who waits has another one meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn an_executor_is_reserved_for_who_waits() -> Result<()> {
    let lab = beside_bulk(Worker::simulated(4_000)).await?;
    let answer = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?;
    ensure!(answer.status == 200, "{}", answer.text);
    until_begun_beside_bulk(&lab).await?;
    until_all_ended(&lab).await?;
    ensure!(begun_beside_bulk(&lab, "bulk").await? == 0, "a bulk job had the reserved executor");
    lab.stop().await
}

// A worker that is told to stop finishes what a caller waits for as well as what nobody does.
#[tokio::test(flavor = "multi_thread")]
async fn what_runs_on_a_reserved_executor_is_finished_before_a_worker_ends() -> Result<()> {
    let mut lab = beside_bulk(Worker::simulated(4_000)).await?;
    let client = lab.client().clone();
    let waiting = tokio::spawn(async move { client.analyze(&sample("ham10000-mel.jpg"), &[]).await });
    until_begun_beside_bulk(&lab).await?;
    lab.stop_worker(0).await?;
    let answer = waiting.await??;
    ensure!(answer.status == 200, "{}", answer.text);
    ensure!(lab.count("SELECT max(attempts)::bigint FROM ingress.jobs").await? == 1, "one began anew");
    lab.start_worker(Worker::simulated(1)).await?;
    until_all_ended(&lab).await?;
    lab.stop().await
}

// A reserved executor that hangs ends its worker, and the job goes to the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_reserved_executor_that_hangs_ends_its_worker() -> Result<()> {
    let image = sample_bytes("ham10000-mel.jpg");
    let worker = Worker::simulated(4_000).fault("hang").on(&image).attempts(1).timeout(6);
    let mut lab = beside_bulk(worker).await?;
    let client = lab.client().clone();
    let waiting = tokio::spawn(async move { client.analyze(&parameters(&[image]), &[]).await });
    until_begun_beside_bulk(&lab).await?;
    eventually("the worker leaves", LONG, async || (!lab.worker_is_alive(0)).then_some(())).await?;
    lab.restart_worker(0).await?;
    let answer = waiting.await??;
    ensure!([200, 202].contains(&answer.status), "{}", answer.text);
    until_all_ended(&lab).await?;
    let attempts =
        "SELECT max(attempts)::bigint FROM ingress.jobs WHERE lane = 'interactive' AND state = 'succeeded'";
    ensure!(lab.count(attempts).await? == 2, "it was not tried again");
    lab.stop().await
}

// An idle worker starts a bulk job because it was woken, not because it looked.
#[tokio::test(flavor = "multi_thread")]
async fn a_wake_up_starts_a_job_at_once() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    for _ in 0..21 {
        let job = submit_one(lab.client()).await?;
        lab.client().poll(&job, LONG).await?;
    }
    let late = "SELECT (extract(epoch FROM percentile_disc(0.5) WITHIN GROUP \
                (ORDER BY started_at - accepted_at)) * 1000)::bigint FROM ingress.jobs";
    let median = lab.count(late).await?;
    println!("from acceptance to start, median: {median} ms");
    ensure!(median <= 100, "{median} ms");
    lab.stop().await
}

// Takes a job's message out of the queue, as it lies there.
async fn take_out(lab: &Lab) -> Result<(String, Vec<u8>)> {
    let stream = lab.jetstream().await?.get_stream(queue::JOBS).await?;
    let sequence = stream.cached_info().state.first_sequence;
    let message = stream.get_raw_message(sequence).await?;
    stream.delete_message(sequence).await?;
    Ok((message.subject.to_string(), message.payload.to_vec()))
}

// A job that no wake-up tells of, published past ingress: idle workers find it within 2.5 s.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_wake_up_costs_two_seconds_at_most() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let mut messages = Vec::new();
    for _ in 0..3 {
        let job = submit_one(lab.client()).await?;
        messages.push((job, take_out(&lab).await?));
    }
    lab.start_worker(Worker::simulated(1)).await?;
    let jetstream = lab.jetstream().await?;
    for (job, (subject, payload)) in messages {
        let begun = Instant::now();
        jetstream.publish(subject, payload.into()).await?.await?;
        lab.until_state(&job, "succeeded").await?;
        println!("done after {:?}", begun.elapsed());
        ensure!(begun.elapsed() < Duration::from_millis(2_500), "{:?}", begun.elapsed());
    }
    lab.stop().await
}

// The broker has forgotten a client's consumer, or was restored without it: jobs that wait are not stranded.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_that_is_gone_is_made_again() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let job = submit_one(lab.client()).await?;
    let stream = lab.jetstream().await?.get_stream(queue::JOBS).await?;
    let names: Vec<String> = stream.consumer_names().filter_map(async |name| name.ok()).collect().await;
    let own =
        names.into_iter().find(|name| name.starts_with("bulk-")).context("no consumer of the client")?;
    stream.delete_consumer(&own).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    assert_eq!(lab.client().poll(&job, Duration::from_secs(15)).await?.status, 200);
    ensure!(lab.logs()?.contains("waited without a consumer"), "nobody says so");
    ensure!(!lab.logs()?.contains("the broker has no answer"), "a client without a consumer is no alarm");
    lab.stop().await
}

// The same backlog and three times the weight: three times as much of it is done while both wait.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_has_its_weight_of_the_service() -> Result<()> {
    const JOBS: usize = 160;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let heavy = lab.register("heavy").await?;
    quota(&mut lab, "heavy", &["--weight", "3"]).await?;
    submit(lab.client(), JOBS).await?;
    submit(&heavy, JOBS).await?;
    lab.start_worker(Worker::simulated(10)).await?;
    until_all_ended(&lab).await?;
    let shares = "SELECT count(*) FILTER (WHERE username = 'heavy'), count(*) FROM \
                  (SELECT client FROM ingress.jobs ORDER BY finished_at LIMIT 160) done JOIN auth.users ON users.id = client";
    let row = &lab.sql(shares).await?[0];
    let (heavy, all): (i64, i64) = (row.get(0), row.get(1));
    println!("{heavy} of the first {all} jobs");
    ensure!((112..=128).contains(&heavy), "{heavy} of the first {all} jobs");
    lab.stop().await
}

// Callers who wait, more than the worker can serve, on every executor that they may have: bulk still has a fifth of what is
// not reserved, which is a tenth of all with one executor of each kind.
#[tokio::test(flavor = "multi_thread")]
async fn bulk_keeps_a_share_beside_any_number_of_callers() -> Result<()> {
    const BACKLOG: usize = 40;
    let worker = Worker::simulated(20).arg("--reserved-executors", "1");
    let lab = Lab::start(Setup { workers: vec![worker], ..Setup::default() }).await?;
    let callers = lab.register("callers").await?;
    let served = AtomicBool::new(false);
    let calling = stream::iter(0..16).for_each_concurrent(None, |_| async {
        while !served.load(Relaxed) {
            let _ = callers.analyze(&sample("ham10000-nv.jpg"), &[]).await;
        }
    });
    let bulk = async {
        submit(lab.client(), BACKLOG).await?;
        let open = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL AND lane = 'bulk'";
        let ended = async || (lab.count(open).await.ok()? == 0).then_some(());
        let ended = eventually("bulk has ended beside callers", LONG, ended).await;
        served.store(true, Relaxed);
        ended
    };
    tokio::join!(calling, bulk).1?;
    let beside = "SELECT count(*) FROM ingress.jobs WHERE lane = 'interactive' AND finished_at BETWEEN \
                  (SELECT min(accepted_at) FROM ingress.jobs WHERE lane = 'bulk') AND \
                  (SELECT max(finished_at) FROM ingress.jobs WHERE lane = 'bulk')";
    let beside = lab.count(beside).await?;
    let share = BACKLOG as f64 / (BACKLOG as f64 + beside as f64);
    println!("{BACKLOG} bulk jobs beside {beside} of callers: {share:.3}");
    ensure!(beside > 100, "there were few callers: the test shows nothing");
    ensure!(share >= 0.07, "{share:.3}");
    lab.stop().await
}

// A client is refused when its open jobs have as many bytes as it may have, and told to come back when some will have ended;
// its last job in the queue says when it should begin.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_of_bytes_is_exact_and_waits_follow_from_the_rate() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let order = sample("isic2017-nv.jpg");
    let headers = [("prefer", "respond-async")];
    let first = lab.client().analyze(&order, &headers).await?;
    let bytes = lab.count("SELECT bytes FROM ingress.jobs").await?;
    quota(&mut lab, "demo", &["--bytes", &(60 * bytes).to_string()]).await?;
    submit(lab.client(), 59).await?;
    let refused = lab.client().analyze(&order, &headers).await?;
    assert_eq!((refused.status, refused.code()), (429, "quota-exceeded"), "{}", refused.text);
    assert_eq!(refused.header("retry-after"), "30", "nothing is known of the rate");

    lab.start_worker(Worker::simulated(500)).await?;
    lab.client().poll(first.job(), LONG).await?;
    let refused = async || {
        let answer = lab.client().analyze(&order, &headers).await.ok()?;
        (answer.status == 429).then(|| answer.header("retry-after").to_owned())
    };
    let begun = "SELECT count(started_at) FROM ingress.jobs";
    let third = async || (lab.count(begun).await.ok()? > 20).then_some(());
    eventually("a third has begun", LONG, third).await?;
    let wait: u64 = eventually("the client is at its quota again", LONG, refused).await?.parse()?;
    // A tenth of 60 jobs, of which two end in a second.
    ensure!((2..=6).contains(&wait), "{wait} s");
    let last: String = lab.sql("SELECT id::text FROM ingress.jobs ORDER BY id DESC LIMIT 1").await?[0].get(0);
    let record = lab.client().get(&format!("/jobs/{last}")).await?;
    let told = record.body["queue"]["expected_start"].as_str().with_context(|| record.text.clone())?;
    until_all_ended(&lab).await?;
    let since = |at: &str| format!("extract(epoch FROM {at} - '{}'::timestamptz)", record.header("date"));
    let (told, real) = (since(&format!("'{told}'::timestamptz")), since("started_at"));
    let ratio = format!("SELECT ({told} / {real})::float8 FROM ingress.jobs WHERE id = '{last}'");
    let ratio: f64 = lab.sql(&ratio).await?[0].get(0);
    println!("told to wait {wait} s; the start was promised at {ratio:.2} times the real wait");
    ensure!((0.5..=2.0).contains(&ratio), "{ratio}");
    lab.stop().await
}

// A client that may have one job with workers at a time, on two workers: never more, and no stalls between them.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_jobs_in_flight_holds_and_does_not_stall() -> Result<()> {
    const JOBS: usize = 40;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    quota(&mut lab, "demo", &["--running", "1"]).await?;
    submit(lab.client(), JOBS).await?;
    for _ in 0..2 {
        lab.start_worker(Worker::simulated(50)).await?;
    }
    until_all_ended(&lab).await?;
    let overlap = "SELECT count(*) FROM ingress.jobs a JOIN ingress.jobs b ON a.id <> b.id \
                   WHERE a.started_at <= b.started_at AND b.started_at < a.finished_at";
    assert_eq!(lab.count(overlap).await?, 0, "two at once");
    let took = "SELECT (extract(epoch FROM max(finished_at) - min(started_at)) * 1000)::bigint \
                FROM ingress.jobs";
    let took = lab.count(took).await?;
    println!("{JOBS} jobs of 50 ms, one at a time: {took} ms");
    // Stalled it would wait for the workers' next look, a second, again and again.
    ensure!(took < 8 * 50 * JOBS as i64, "{took} ms");
    assert_eq!(lab.count("SELECT max(attempts)::bigint FROM ingress.jobs").await?, 1);
    lab.stop().await
}

// Staff changes how many jobs of a client may be with workers: for those that wait it does, too, though no other comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_limit_of_jobs_in_flight_holds_for_those_that_wait() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    submit(lab.client(), 1).await?;
    let stream = lab.jetstream().await?.get_stream(queue::JOBS).await?;
    for running in [1, 3] {
        lab.auth(&["user", "quota", "demo", "--running", &running.to_string()])?;
        let reached = async || {
            let all: Vec<_> = stream.consumers().filter_map(async |consumer| consumer.ok()).collect().await;
            let own = all.into_iter().find(|consumer| consumer.name.starts_with("bulk-"))?;
            (own.config.max_ack_pending == running).then_some(())
        };
        eventually(&format!("{running} may be with workers"), Duration::from_secs(10), reached).await?;
    }
    lab.stop().await
}

// A running job of three images is withdrawn: its worker is free after the image it is at, and nothing is
// published.
#[tokio::test(flavor = "multi_thread")]
async fn a_withdrawn_job_stops_at_its_next_image() -> Result<()> {
    const IMAGE: u64 = 1_500;
    let lab = Lab::start(Setup::simulated(IMAGE)).await?;
    let image = sample_bytes("isic2017-nv.jpg");
    let job = lab.client().submit(&parameters(&[image.clone(), image.clone(), image])).await?;
    lab.until_state(&job, "running").await?;
    let begun = Instant::now();
    assert_eq!(lab.client().delete(&format!("/fhir/_async/{job}")).await?.status, 202);
    let next = submit_one(lab.client()).await?;
    lab.until_state(&next, "running").await?;
    let free = begun.elapsed();
    println!("the next job runs {free:?} after the withdrawal");
    ensure!(free < Duration::from_millis(2 * IMAGE), "{free:?}");
    assert_eq!(lab.client().poll(&next, LONG).await?.status, 200);
    let empty =
        async || (lab.messages("JOBS").await.ok()? + lab.messages("RESULTS").await.ok()? == 0).then_some(());
    eventually("the queue is empty", LONG, empty).await?;
    let late = lab.metric("dermflow_late_results_total").await.context("no metric")?;
    ensure!(late < 0.5, "a result was published");
    assert_eq!(lab.count("SELECT count(*) FROM ingress.reports").await?, 1);
    lab.stop().await
}
