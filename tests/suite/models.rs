//! Models: any folder works, a faulty model costs its own job only, a simulated one cannot pass for real.

use std::time::Duration;

use anyhow::Result;
use dermflow_tests::{
    client::{distribution, observations, sample},
    lab::{Lab, Setup, Worker},
    wait::eventually,
};

const LONG: Duration = Duration::from_mins(1);

fn one(worker: Worker) -> Setup {
    Setup { workers: vec![worker], ack_wait: 2, ..Setup::default() }
}

// A classifier with other classes, another input and no ICD-11 codes runs without a change of code.
#[tokio::test(flavor = "multi_thread")]
async fn another_model_is_another_folder() -> Result<()> {
    let lab = Lab::start(one(Worker::tiny())).await?;
    let report = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?.body;
    let found = distribution(observations(&report, "condition-distribution")[0]);
    let codes: Vec<&str> = found.iter().map(|(code, _)| code.as_str()).collect();
    assert_eq!(codes.len(), 3);
    assert!(["red", "green", "blue"].iter().all(|code| codes.contains(code)), "{codes:?}");
    lab.stop().await
}

// A simulated model says so wherever a reader could look.
#[tokio::test(flavor = "multi_thread")]
async fn a_simulated_report_says_so() -> Result<()> {
    let lab = Lab::start(one(Worker::simulated(1))).await?;
    let report = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?.body;
    let labels: Vec<&str> = report["meta"]["security"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|label| label["code"].as_str())
        .collect();
    assert!(labels.contains(&"HTEST") && labels.contains(&"AIAST"), "{labels:?}");
    for text in [&report["conclusion"], &report["text"]["div"]] {
        assert!(text.as_str().unwrap().to_lowercase().contains("simulated"), "{text}");
    }
    lab.stop().await
}

// NaN is the model's fault and will be again: failed at the first attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_without_a_usable_result_fails_the_job_once() -> Result<()> {
    let lab = Lab::start(one(Worker::simulated(1).fault("nan"))).await?;
    let answer = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?;
    assert_eq!((answer.status, answer.code()), (500, "analysis-failed"), "{}", answer.text);
    assert_eq!(lab.count("SELECT attempts::bigint FROM ingress.jobs").await?, 1);
    lab.stop().await
}

// A panic costs the attempt, not the process: the job is published again and succeeds.
#[tokio::test(flavor = "multi_thread")]
async fn a_panicking_model_is_tried_again() -> Result<()> {
    let mut lab = Lab::start(one(Worker::simulated(1).fault("panic").attempts(1))).await?;
    let answer = lab.client().analyze(&sample("ham10000-mel.jpg"), &[]).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(lab.count("SELECT attempts::bigint FROM ingress.jobs").await?, 2);
    assert!(lab.worker_is_alive(0));
    lab.stop().await
}

// A model that hangs is cut off at the job's time-out; the worker leaves, and its successor has the job.
#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_model_is_cut_off() -> Result<()> {
    let mut lab = Lab::start(one(Worker::simulated(1).fault("hang").attempts(1).timeout(2))).await?;
    let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
    let gone = async || (!lab.worker_is_alive(0)).then_some(());
    eventually("the worker leaves", LONG, gone).await?;
    lab.restart_worker(0).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    assert_eq!(lab.count("SELECT attempts::bigint FROM ingress.jobs").await?, 2);
    lab.stop().await
}

// A model that takes the whole process down on every attempt: the job ends in the dead letters with its sealed
// payload, and other jobs do not notice.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_kills_its_workers_ends_in_the_dead_letters() -> Result<()> {
    let mut lab = Lab::start(one(Worker::simulated(1).fault("abort"))).await?;
    let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
    let ended = async |lab: &Lab| {
        lab.client().get(&format!("/fhir/_async/{job}")).await.is_ok_and(|a| a.status != 202)
    };
    for _ in 0..20 {
        let gone = async || (!lab.worker_is_alive(0) || ended(&lab).await).then_some(());
        eventually("the worker dies or the job ends", LONG, gone).await?;
        if ended(&lab).await {
            break;
        }
        lab.restart_worker(0).await?;
    }
    let answer = lab.client().poll(&job, LONG).await?;
    assert_eq!((answer.status, answer.code()), (500, "attempts-exhausted"), "{}", answer.text);
    assert_eq!(lab.messages("DEAD").await?, 1);
    assert_eq!(lab.messages("JOBS").await?, 0);
    lab.stop_worker(0).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    assert_eq!(lab.client().analyze(&sample("ham10000-nv.jpg"), &[]).await?.status, 200);
    lab.stop().await
}

// What a worker cannot do without is one clear sentence at start.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_cannot_work_says_why() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    for (worker, reason) in [
        (Worker::derm7().arg("--ort-dylib", "/nowhere/libonnxruntime.so"), "/nowhere/libonnxruntime.so"),
        (Worker::derm7().arg("--model", "/nowhere"), "/nowhere"),
        (Worker::simulated(1).forbidden(), "--allow-simulated"),
        (Worker::derm7().arg("--sealing-keys", "/nowhere/keys"), "/nowhere/keys"),
    ] {
        let refused = lab.start_worker(worker).await.unwrap_err();
        assert!(format!("{refused:#}").contains(reason), "{refused:#}");
    }
    lab.stop().await
}
