//! Step 9: no job stays open past its deadline, and nothing is kept past its retention.

use std::time::Duration;

use anyhow::Result;
use dermflow_tests::{
    client::sample,
    lab::{Lab, Setup},
    wait::eventually,
};

const LONG: Duration = Duration::from_secs(30);

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
