//! `Idempotency-Key`: same key and body, same job; through races and restarts.

use std::time::Duration;

use anyhow::Result;
use dermflow_tests::{
    client::sample,
    lab::{Lab, Setup},
};

const LONG: Duration = Duration::from_secs(30);

// Another body under the same key is refused; another client's same key is another job.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_stands_for_one_request_of_one_client() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let key = [("idempotency-key", "k-1")];
    let first = lab.client().analyze(&sample("ham10000-nv.jpg"), &key).await?;
    let again = lab.client().analyze(&sample("ham10000-nv.jpg"), &key).await?;
    assert_eq!((first.status, &first.text), (200, &again.text));
    let other_body = lab.client().analyze(&sample("ham10000-mel.jpg"), &key).await?;
    assert_eq!((other_body.status, other_body.code()), (422, "idempotency-conflict"));
    let other_client = lab.register("other").await?.analyze(&sample("ham10000-mel.jpg"), &key).await?;
    assert_eq!(other_client.status, 200);
    assert_ne!(other_client.body["id"], first.body["id"]);
    lab.stop().await
}

// The key outlives every process: ingress, broker and database.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_survives_the_restart_of_everything() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let headers = [("idempotency-key", "k-2"), ("prefer", "respond-async")];
    let first = lab.client().analyze(&sample("ham10000-nv.jpg"), &headers).await?;
    lab.kill_ingress(0).await?;
    lab.kill_nats().await?;
    lab.kill_postgres().await?;
    lab.restart_postgres().await?;
    lab.restart_nats().await?;
    lab.restart_ingress(0).await?;
    let again = lab.client().analyze(&sample("ham10000-nv.jpg"), &headers).await?;
    assert_eq!((again.status, again.job()), (202, first.job()));
    lab.start_worker(dermflow_tests::lab::Worker::simulated(1)).await?;
    assert_eq!(lab.client().poll(first.job(), LONG).await?.status, 200);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, 1);
    lab.stop().await
}

// A submission that never heard from the queue is taken up by its retry, under the same id.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_takes_up_a_job_that_was_not_queued() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1)).await?;
    let key = [("idempotency-key", "k-3")];
    lab.pause_nats();
    let refused = lab.client().analyze(&sample("ham10000-nv.jpg"), &key).await?;
    assert_eq!((refused.status, refused.code()), (503, "queue-unavailable"), "{}", refused.text);
    assert_eq!(refused.header("retry-after"), "1");
    lab.resume_nats();
    let done = lab.client().analyze(&sample("ham10000-nv.jpg"), &key).await?;
    assert_eq!(done.status, 200, "{}", done.text);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, 1);
    assert_eq!(lab.count("SELECT jobs FROM ingress.usage").await?, 1);
    lab.stop().await
}
