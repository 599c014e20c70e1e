//! I1, I2: kill, pause and restart whatever there is; no accepted job is lost and none is done twice.

use std::time::Duration;

use anyhow::Result;
use dermflow_schemas::{
    clock,
    envelope::{Failure, ResultHeader},
    error::Code,
};
use dermflow_tests::{
    checker::{Ledger, order},
    client::sample,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};

const LONG: Duration = Duration::from_mins(1);

// Two replicas of ingress on one queue and one record: a job submitted to one is polled at, waited for at and
// cancelled at the other, and one of them may die.
#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_are_one_service() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::simulated(50) }).await?;
    let second = lab.client().clone().at(&lab.url(1));
    let ledger = Ledger::default();
    for n in 0..40 {
        let (here, there) = if n % 2 == 0 { (lab.client(), &second) } else { (&second, lab.client()) };
        let job = ledger.submit(here, n).await?;
        let ended = there.poll(&job, LONG).await?;
        assert_eq!((ended.status, ended.body["id"].as_str()), (200, Some(job.as_str())));
    }
    lab.kill_ingress(0).await?;
    let job = ledger.submit(&second, 40).await?;
    assert_eq!(second.poll(&job, LONG).await?.status, 200);
    lab.restart_ingress(0).await?;
    ledger.check(&lab, &[], LONG).await?;
    lab.stop().await
}

// Results that are too much for one transaction are recorded in smaller ones, each once.
#[tokio::test(flavor = "multi_thread")]
async fn results_that_do_not_fit_together_are_recorded_in_parts() -> Result<()> {
    const JOBS: u64 = 24;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    for _ in 0..JOBS {
        lab.client().submit(&sample("isic2017-nv.jpg")).await?;
    }
    lab.kill_ingress(0).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    let waiting = async || (lab.messages("RESULTS").await.ok()? == JOBS).then_some(());
    eventually("all results wait", LONG, waiting).await?;
    let refuse = "CREATE FUNCTION ingress.three_at_most() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                  IF (SELECT count(*) FROM added) > 3 THEN RAISE EXCEPTION 'too much'; END IF; RETURN NULL; END $$";
    lab.sql(refuse).await?;
    let trigger = "CREATE TRIGGER three_at_most AFTER INSERT ON ingress.reports REFERENCING NEW TABLE AS added \
                   FOR EACH STATEMENT EXECUTE FUNCTION ingress.three_at_most()";
    lab.sql(trigger).await?;
    lab.restart_ingress(0).await?;
    let succeeded = "SELECT count(*) FROM ingress.jobs WHERE state = 'succeeded'";
    let all = async || (lab.count(succeeded).await.ok()? == JOBS as i64).then_some(());
    eventually("all results are recorded", LONG, all).await?;
    assert!(lab.logs()?.contains("results not recorded yet"), "they came one by one");
    assert_eq!(lab.count("SELECT count(*) FROM ingress.reports").await?, JOBS as i64);
    assert_eq!(lab.count("SELECT sum(jobs)::bigint FROM ingress.usage").await?, JOBS as i64);
    let gone = async || (lab.messages("RESULTS").await.ok()? == 0).then_some(());
    eventually("none is left in the queue", LONG, gone).await?;
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
    let ledger = Ledger::default();
    ledger.submit_all(lab.client(), 0..4, 4).await?;
    ledger.check(&lab, &[], LONG).await?;
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
    let job = Ledger::default().submit(lab.client(), 0).await?;
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
