//! Step 9: no job stays open past its deadline, and nothing is kept past its retention.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Result;
use dermflow_schemas::clock;
use dermflow_tests::{
    client::{Client, sample},
    form::scale,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};

const LONG: Duration = Duration::from_secs(30);
// Within which a loss is reported.
const REPORTED: Duration = Duration::from_mins(1);
// Within which what was deleted at the broker is there again.
const RECREATED: Duration = Duration::from_secs(10);

// Submits `count` jobs; refusals while the broker is away are tried again.
async fn submit(client: &Client, count: usize) -> Result<Vec<String>> {
    let mut jobs = Vec::new();
    for _ in 0..count {
        let accepted = async || client.submit(&sample("isic2017-nv.jpg")).await.ok();
        jobs.push(eventually("a job is accepted", LONG, accepted).await?);
    }
    Ok(jobs)
}

fn list(jobs: &[String]) -> String {
    jobs.iter().map(|job| format!("'{job}'")).collect::<Vec<_>>().join(",")
}

async fn reported(lab: &Lab, jobs: &[String]) -> Option<i64> {
    let lost = "state = 'failed' AND failure ->> 'code' = 'payload-lost'";
    lab.count(&format!("SELECT count(*) FROM ingress.jobs WHERE id IN ({}) AND {lost}", list(jobs)))
        .await
        .ok()
}

// Jobs that replica `n` has settled as never queued.
async fn never_queued_metric(lab: &Lab, n: usize) -> i64 {
    let metric = "dermflow_swept_jobs_total{code=\"never-queued\",lane=\"bulk\"}";
    lab.metric_of(n, metric).await.map_or(0, |count| count as i64)
}

async fn lost_metric(lab: &Lab) -> f64 {
    lab.metric("dermflow_payloads_lost_total").await.unwrap_or(0.0)
}

// A job that nobody works on ends at its deadline, on one replica's account, and leaves the queue.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_past_its_deadline_is_settled() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    lab.sql("UPDATE ingress.jobs SET deadline = now()").await?;
    let answer = lab.client().poll(&job, LONG).await?;
    assert_eq!((answer.status, answer.code()), (504, "deadline-exceeded"), "{}", answer.text);
    let removed = async || (lab.messages("JOBS").await.ok()? == 0).then_some(());
    eventually("the payload is removed", LONG, removed).await?;
    lab.stop().await
}

// A record that never reached the queue is settled, and its key is free again.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_was_never_queued_is_given_up() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let headers = [("idempotency-key", "k"), ("prefer", "respond-async")];
    let first = lab.client().analyze(&sample("ham10000-nv.jpg"), &headers).await?.job().to_owned();
    lab.sql("UPDATE ingress.jobs SET state = 'accepted', deadline = now()").await?;
    lab.until_state(&first, "failed").await?;
    let answer = lab.client().get(&format!("/fhir/_async/{first}")).await?;
    assert_eq!((answer.status, answer.code()), (503, "never-queued"), "{}", answer.text);
    let job = lab.client().get(&format!("/jobs/{first}")).await?;
    assert_eq!(job.body["error"]["code"], "never-queued", "{}", job.text);
    let again = lab.client().analyze(&sample("ham10000-nv.jpg"), &headers).await?;
    assert_eq!(again.status, 202);
    assert_ne!(again.job(), first);
    lab.stop().await
}

// One of two replicas settles what never reached the queue, each job once; when it is killed, the other goes on.
#[tokio::test(flavor = "multi_thread")]
async fn one_replica_sweeps_and_another_takes_its_place() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let never_queued = async |lab: &Lab, client: &Client| {
        let job = client.submit(&sample("ham10000-nv.jpg")).await?;
        let update = "UPDATE ingress.jobs SET state = 'accepted', deadline = now()";
        lab.sql(&format!("{update} WHERE id = '{job}'")).await?;
        lab.until_state(&job, "failed").await?;
        let entries = "SELECT count(*) FROM auth.audit WHERE action = 'job-settled'";
        assert_eq!(lab.count(&format!("{entries} AND object = '{job}'")).await?, 1, "{job}");
        anyhow::Ok(())
    };
    // Two, so that both replicas have had a round since the first.
    never_queued(&lab, lab.client()).await?;
    never_queued(&lab, lab.client()).await?;
    let counted = async || {
        let swept = [never_queued_metric(&lab, 0).await, never_queued_metric(&lab, 1).await];
        (swept.iter().sum::<i64>() >= 2).then_some(swept)
    };
    let swept = eventually("both are counted", LONG, counted).await?;
    let leader = usize::from(swept == [0, 2]);
    assert_eq!(swept[leader], 2, "one sweeps, the other does not: {swept:?}");

    lab.kill_ingress(leader).await?;
    let other = 1 - leader;
    never_queued(&lab, &lab.client().clone().at(&lab.url(other))).await?;
    let counted = async || (never_queued_metric(&lab, other).await == 1).then_some(());
    eventually("the other one has counted it", LONG, counted).await?;
    lab.restart_ingress(leader).await?;
    assert_eq!(lab.count("SELECT count(*) FROM auth.audit WHERE action = 'job-settled'").await?, 3);
    lab.stop().await
}

// Records, reports and keys past their retention are erased.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_past_its_retention_is_erased() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let answer = lab.client().analyze(&sample("ham10000-nv.jpg"), &[("idempotency-key", "old")]).await?;
    assert_eq!(answer.status, 200);
    lab.sql("UPDATE ingress.jobs SET finished_at = finished_at - interval '8 days'").await?;
    let rows = "SELECT (SELECT count(*) FROM ingress.jobs) + (SELECT count(*) FROM ingress.reports) \
                + (SELECT count(*) FROM ingress.idempotency_keys)";
    let erased = async || (lab.count(rows).await.ok()? == 0).then_some(());
    eventually("everything is erased", LONG, erased).await?;
    assert_eq!(lab.client().get(&format!("/jobs/{}", answer.job())).await?.status, 404);
    lab.stop().await
}

// The broker's disk is gone while jobs wait: each of them is reported, by its id, and none of those that came
// later, although the new stream hands out the same sequences again.
#[tokio::test(flavor = "multi_thread")]
async fn every_lost_payload_is_reported_by_its_id() -> Result<()> {
    let count = scale(20, 500);
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let lost = submit(lab.client(), count as usize).await?;
    lab.kill_nats().await?;
    lab.wipe_nats()?;
    lab.restart_nats().await?;
    let begun = Instant::now();
    let kept = submit(lab.client(), 30).await?;
    let all = async || (reported(&lab, &lost).await? == count).then_some(());
    eventually("every loss is reported", REPORTED, all).await?;
    println!("{count} losses reported after {:.1} s", begun.elapsed().as_secs_f64());
    let answer = lab.client().poll(&lost[0], LONG).await?;
    assert_eq!((answer.status, answer.code()), (500, "payload-lost"), "{}", answer.text);
    let logs = lab.logs()?;
    let named = |job: &String| logs.lines().any(|line| line.contains("payload lost") && line.contains(job));
    assert!(lost.iter().all(named), "a loss is not in the log");
    assert!(!kept.iter().any(named), "a false alarm");
    assert!((lost_metric(&lab).await - count as f64).abs() < f64::EPSILON);
    assert_eq!(lab.count("SELECT count(*) FROM auth.audit WHERE action = 'payload-lost'").await?, count);
    assert_eq!(lab.count("SELECT count(*) FROM auth.audit WHERE action = 'queue-recreated'").await?, 1);
    lab.start_worker(Worker::simulated(1)).await?;
    for job in &kept {
        assert_eq!(lab.client().poll(job, LONG).await?.status, 200);
    }
    assert_eq!(reported(&lab, &kept).await, Some(0));
    lab.stop().await
}

// Everything is lost while a client has very many jobs open, in the long form as many as it may: within a minute each of
// them is reported, and nothing else. Records without messages stand for them.
#[tokio::test(flavor = "multi_thread")]
async fn very_many_losses_are_reported_in_time() -> Result<()> {
    let count = scale(20_000, 100_000);
    let lab = Lab::start(Setup::without_workers()).await?;
    let kept = submit(lab.client(), 1).await?;
    let insert = format!(
        "WITH lost AS (INSERT INTO ingress.jobs (id, client, lane, state, images, bytes, accepted_at, queued_at, \
         deadline, stream_seq, claim_check, ticket) SELECT gen_random_uuid(), client, 'bulk', 'queued', 1, 0, \
         now() - interval '1 minute', now() - interval '1 minute', now() + interval '1 day', 1000 + n, false, 1 + n \
         FROM ingress.loads, generate_series(1, {count}) n) \
         UPDATE ingress.loads SET jobs = jobs + {count}, tickets = tickets + {count}"
    );
    lab.sql(&insert).await?;
    let begun = Instant::now();
    let one_left = async || (lab.count("SELECT jobs FROM ingress.loads").await.ok()? == 1).then_some(());
    eventually("every loss is reported", REPORTED, one_left).await?;
    println!("{count} losses reported after {:.1} s", begun.elapsed().as_secs_f64());
    let lost = "SELECT count(*) FROM ingress.jobs WHERE failure ->> 'code' = 'payload-lost'";
    assert_eq!((lab.count(lost).await?, reported(&lab, &kept).await), (count, Some(0)));
    assert_eq!(lab.count("SELECT count(*) FROM auth.audit WHERE action = 'payload-lost'").await?, count);
    // The record comes first.
    let counted = async || ((lost_metric(&lab).await - count as f64).abs() < 0.5).then_some(());
    eventually("every loss is counted", LONG, counted).await?;
    assert_eq!(lab.messages("JOBS").await?, 1);
    lab.stop().await
}

// Reports that are left of deleted batches are found without a look at every job that has been removed before them.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_deleted_batches_is_found_at_once() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let removed = "WITH gone AS (INSERT INTO ingress.batches (id, client, created_at, closed_at, deleted_at) \
         SELECT gen_random_uuid(), id, now(), now(), now() FROM auth.users, generate_series(1, 20) \
         WHERE username = 'demo' RETURNING id, client) \
         INSERT INTO ingress.jobs (id, client, lane, state, images, accepted_at, finished_at, deadline, \
         claim_check, batch, line, deleted_at) SELECT gen_random_uuid(), client, 'bulk', 'succeeded', 1, now(), \
         now(), now(), false, id, n, now() FROM gone, generate_series(1, 1000) n";
    lab.sql(removed).await?;
    lab.sql("ANALYZE ingress.jobs, ingress.batches").await?;
    lab.sql("UPDATE ingress.jobs SET deleted_at = NULL WHERE line = 1").await?;
    let left = "SELECT count(*) FROM ingress.jobs WHERE deleted_at IS NULL";
    let none = async || (lab.count(left).await.ok()? == 0).then_some(());
    eventually("what is left is removed", LONG, none).await?;
    let looks = "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = 'jobs_undeleted'";
    let looked = async || (lab.count(looks).await.ok()? > 0).then_some(());
    eventually("it was looked for where nothing else is", LONG, looked).await?;
    lab.stop().await
}

// R8: one bit of one waiting payload is wrong on the broker's disk. The broker itself notices nothing before it
// reads the message, and then passes over it without a word: that job alone is reported, with nobody to work.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_payload_is_reported_and_no_other() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 2, ..Setup::without_workers() }).await?;
    let jobs = submit(lab.client(), 5).await?;
    let (block, at) = lab.payload_place(&jobs[2]).await?;
    lab.stop_nats().await?;
    let mut bytes = fs::read(&block)?;
    bytes[at + 1_500] ^= 1;
    fs::write(&block, bytes)?;
    lab.restart_nats().await?;
    let begun = Instant::now();
    let one = async || (reported(&lab, &jobs).await? == 1).then_some(());
    eventually("the damaged one is reported", REPORTED, one).await?;
    println!("a damaged payload reported after {:.1} s", begun.elapsed().as_secs_f64());
    assert_eq!(reported(&lab, &jobs[2..3]).await, Some(1));
    lab.start_worker(Worker::simulated(1)).await?;
    for job in [&jobs[0], &jobs[1], &jobs[3], &jobs[4]] {
        assert_eq!(lab.client().poll(job, LONG).await?.status, 200);
    }
    // The broker goes on counting it, and gives it to nobody.
    let unaccounted = "dermflow_stream_messages{kind=\"unaccounted\",stream=\"JOBS\"}";
    let alarm = async || lab.metric(unaccounted).await.filter(|count| *count > 0.0);
    eventually("the alarm", RECREATED, alarm).await?;
    lab.stop().await
}

// R9: streams, consumers and the bucket are deleted while the system runs: they are back within seconds, with an
// alarm; what was in them is reported, and later jobs go through.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_at_the_broker_is_made_again() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 2, ..Setup::without_workers() }).await?;
    let jobs = submit(lab.client(), 3).await?;
    let admin = lab.jetstream().await?;
    let second = "SELECT id::text FROM ingress.jobs WHERE stream_seq = 2";
    let taken: String = lab.sql(second).await?[0].get(0);
    admin.get_stream("JOBS").await?.delete_message(2).await?;
    let only = async || (reported(&lab, &jobs).await? == 1).then_some(());
    eventually("the one that was deleted is reported", REPORTED, only).await?;
    assert_eq!(reported(&lab, std::slice::from_ref(&taken)).await, Some(1));

    for name in ["JOBS", "RETRIES", "RESULTS", "DEAD", "OBJ_payloads"] {
        admin.delete_stream(name).await?;
        let back = async || admin.get_stream(name).await.ok().map(|_| ());
        eventually(name, RECREATED, back).await?;
        let metric = format!("dermflow_queue_recreated_total{{part=\"{name}\"}}");
        let alarm = async || lab.metric(&metric).await.filter(|count| *count >= 1.0);
        eventually("the alarm", RECREATED, alarm).await?;
    }
    for (stream, consumer) in [("JOBS", "interactive"), ("RETRIES", "due"), ("RESULTS", "recorder")] {
        admin.get_stream(stream).await?.delete_consumer(consumer).await?;
        let back =
            async || admin.get_stream(stream).await.ok()?.consumer_info(consumer).await.ok().map(|_| ());
        eventually(consumer, RECREATED, back).await?;
    }
    let all = async || (reported(&lab, &jobs).await? == 3).then_some(());
    eventually("the rest is reported", REPORTED, all).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    for job in submit(lab.client(), 3).await? {
        assert_eq!(lab.client().poll(&job, REPORTED).await?.status, 200);
    }
    lab.stop().await
}

// A result that is stored and not yet recorded, however long: its job is neither lost nor late, although its
// payload is gone and its deadline over. Nor is a job that waits for its second attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_waits_is_worth_more_than_a_deadline() -> Result<()> {
    let worker = Worker::simulated(1).fault("panic").attempts(1);
    let mut lab = Lab::start(Setup { workers: vec![worker], ..Setup::default() }).await?;
    let results = lab.jetstream().await?.get_stream("RESULTS").await?;
    let later = clock::now() + Duration::from_hours(1);
    results.pause_consumer("recorder", later).await?;
    let jobs = submit(lab.client(), 10).await?;
    let stored = async || (lab.messages("RESULTS").await.ok()? == 10).then_some(());
    eventually("the results wait", LONG, stored).await?;
    lab.sql("UPDATE ingress.jobs SET queued_at = now() - interval '1 hour', deadline = now()").await?;
    // A job that nothing is stored of shows that rounds go by.
    lab.stop_worker(0).await?;
    for round in 0..4 {
        let witness = submit(lab.client(), 1).await?;
        lab.sql(&format!("UPDATE ingress.jobs SET deadline = now() WHERE id = '{}'", witness[0])).await?;
        lab.until_state(&witness[0], "failed").await?;
        let open = format!(
            "SELECT count(*) FROM ingress.jobs WHERE id IN ({}) AND finished_at IS NULL",
            list(&jobs)
        );
        assert_eq!(lab.count(&open).await?, 10, "round {round}");
    }
    results.resume_consumer("recorder").await?;
    for job in &jobs {
        assert_eq!(lab.client().poll(job, LONG).await?.status, 200);
    }
    assert!(lost_metric(&lab).await < 1.0);
    lab.stop().await
}

// No false alarm: retries, killed workers, a killed broker and a database that is away, while the sweeper looks.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_called_lost_that_is_not() -> Result<()> {
    const JOBS: usize = 120;
    let workers = vec![Worker::simulated(100).fault("panic").attempts(1)];
    let mut lab = Lab::start(Setup { workers, ack_wait: 2, ..Setup::default() }).await?;
    let jobs = submit(lab.client(), JOBS).await?;
    // As if they had waited for long: every round looks at every one of them.
    lab.sql("UPDATE ingress.jobs SET queued_at = now() - interval '1 hour'").await?;
    let done = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NOT NULL";
    for part in 1..=4 {
        let some = async || (lab.count(done).await.ok()? >= part * 20).then_some(());
        eventually("jobs are worked off", REPORTED, some).await?;
        lab.kill_worker(0).await?;
        match part {
            1 | 3 => {
                lab.kill_nats().await?;
                lab.restart_nats().await?;
            }
            2 => {
                lab.kill_postgres().await?;
                lab.restart_postgres().await?;
            }
            _ => {
                lab.kill_ingress(0).await?;
                lab.restart_ingress(0).await?;
            }
        }
        lab.restart_worker(0).await?;
    }
    for job in &jobs {
        assert_eq!(lab.client().poll(job, 2 * REPORTED).await?.status, 200);
    }
    assert_eq!(lab.count("SELECT count(*) FROM auth.audit WHERE actor = 'sweeper'").await?, 0);
    assert!(lost_metric(&lab).await < 1.0);
    lab.stop().await
}
