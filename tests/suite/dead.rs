//! Dead letters: what workers gave up is kept, shown to operators only, and can be put back into the queue.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dermflow_local::stack::programs;
use dermflow_schemas::{
    clock,
    envelope::{Failure, ResultHeader},
    error::Code,
};
use dermflow_tests::{
    client::{Client, sample, sample_bytes, send},
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use reqwest::Method;

const LONG: Duration = Duration::from_mins(1);

async fn post(client: &Client, path: &str) -> Result<dermflow_tests::client::Answer> {
    send(client.request(Method::POST, path)).await
}

// A lab whose only worker aborts on every job.
pub(super) async fn deadly() -> Result<Lab> {
    let workers = vec![Worker::simulated(1).fault("abort")];
    Lab::start(Setup { workers, ack_wait: 1, ..Setup::default() }).await
}

// Starts worker `n` again and again until these jobs have ended. Returns how often.
pub(super) async fn until_given_up(lab: &mut Lab, n: usize, jobs: &[String]) -> Result<usize> {
    let list = jobs.iter().map(|job| format!("'{job}'")).collect::<Vec<_>>().join(",");
    let open = format!("SELECT count(*) FROM ingress.jobs WHERE id IN ({list}) AND finished_at IS NULL");
    for restarts in 0..8 * jobs.len() {
        let gone = async || (!lab.worker_is_alive(n) || lab.count(&open).await.ok()? == 0).then_some(());
        eventually("the worker dies or the jobs end", LONG, gone).await?;
        if lab.count(&open).await? == 0 {
            return Ok(restarts);
        }
        // It may die of a job that waits already, before it says that it is ready.
        let _ = lab.restart_worker(n).await;
    }
    anyhow::bail!("the jobs do not end")
}

async fn billed(lab: &Lab) -> Result<i64> {
    lab.count("SELECT coalesce(sum(jobs), 0)::bigint FROM ingress.usage").await
}

// The life of a dead letter: a job that kills its workers, shown to an operator, put back while a healthy worker
// runs, done under the same id and billed once.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_shown_and_put_back() -> Result<()> {
    let mut lab = deadly().await?;
    let operator = lab.start_operate("olga").await?;
    let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
    until_given_up(&mut lab, 0, std::slice::from_ref(&job)).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.code(), "attempts-exhausted");
    assert_eq!(billed(&lab).await?, 0);

    let list = operator.get("/dead").await?;
    assert_eq!(list.status, 200, "{}", list.text);
    let letters = list.body["dead"].as_array().unwrap();
    assert_eq!((letters.len(), list.body["next"].is_null()), (1, true));
    let letter = &letters[0];
    assert_eq!((letter["job"].as_str(), letter["lane"].as_str()), (Some(&*job), Some("bulk")));
    assert_eq!(
        (letter["reason"].as_str(), letter["attempts"].as_u64()),
        (Some("attempts-exhausted"), Some(5))
    );
    ensure!(
        letter["client"].is_string() && letter["accepted_at"].is_string() && letter["dead_at"].is_string()
    );
    ensure!(letter["bytes"].as_u64() > Some(sample_bytes("ham10000-mel.jpg").len() as u64));
    let path = format!("/dead/{}", letter["sequence"]);
    let shown = operator.get(&path).await?;
    assert_eq!(shown.body["record"]["status"], "failed", "{}", shown.text);
    assert_eq!(shown.body["record"], lab.client().get(&format!("/jobs/{job}")).await?.body);
    assert_eq!(operator.get("/dead/77").await?.status, 404);

    lab.stop_worker(0).await?;
    lab.start_worker(Worker::simulated(1)).await?;
    let back = post(&operator, &format!("{path}/requeue")).await?;
    assert_eq!((back.status, back.body["job"].as_str()), (200, Some(&*job)), "{}", back.text);
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    let record = lab.client().get(&format!("/jobs/{job}")).await?.body;
    assert_eq!((record["status"].as_str(), record["attempts"].as_u64()), (Some("succeeded"), Some(1)));
    // Repeated, it is the same job, and nothing runs again.
    let again = post(&operator, &format!("{path}/requeue")).await?;
    assert_eq!((again.status, again.body["job"].as_str()), (200, Some(&*job)), "{}", again.text);
    assert_eq!(again.body["state"], "succeeded");
    assert_eq!(billed(&lab).await?, 1);
    assert_eq!((lab.messages("DEAD").await?, lab.messages("JOBS").await?), (0, 0));
    let entries = "SELECT count(*) FROM auth.audit WHERE action = 'dead-requeued' AND client IS NOT NULL \
                   AND actor = (SELECT id::text FROM auth.users WHERE username = 'olga')";
    assert_eq!(lab.count(entries).await?, 1);
    lab.stop().await
}

// The same with the `dermflow` command, as an operator types it.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_lists_requeues_and_purges() -> Result<()> {
    let mut lab = deadly().await?;
    lab.start_operate("olga").await?;
    let mut jobs = Vec::new();
    for _ in 0..2 {
        jobs.push(lab.client().submit(&sample("ham10000-mel.jpg")).await?);
    }
    until_given_up(&mut lab, 0, &jobs).await?;
    let password = tempfile(&lab.password("olga")?)?;
    let (url, operate_url, ca) = (lab.url(0), lab.operate_url()?, lab.ca());
    let dermflow = |args: &[&str]| -> Result<(Option<i32>, String)> {
        let output = std::process::Command::new(programs()?.join("dermflow"))
            .args(["dead", "--url", &url, "--operate-url", &operate_url, "--user", "olga"])
            .arg("--ca")
            .arg(&ca)
            .arg("--password-file")
            .arg(&password)
            .args(args)
            .output()?;
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        Ok((output.status.code(), text))
    };
    let (code, list) = dermflow(&["list", "--json"])?;
    assert_eq!(code, Some(0), "{list}");
    let letters: Vec<serde_json::Value> = list.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(letters.len(), 2, "{list}");
    let sequence = |n: usize| letters[n]["sequence"].to_string();
    let (code, shown) = dermflow(&["show", &sequence(0), "--json"])?;
    assert!(code == Some(0) && shown.contains("\"record\""), "{shown}");
    assert_eq!(dermflow(&["show", "4711"])?.0, Some(1));
    lab.stop_worker(0).await?;
    let (code, text) = dermflow(&["requeue", &sequence(0)])?;
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = dermflow(&["purge", &sequence(1), "--yes"])?;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(lab.messages("DEAD").await?, 0);
    lab.start_worker(Worker::simulated(1)).await?;
    let again = letters[0]["job"].as_str().context("no job")?;
    assert_eq!(lab.client().poll(again, LONG).await?.status, 200);
    std::fs::remove_file(password)?;
    lab.stop().await
}

// A file that only this test knows.
fn tempfile(text: &str) -> Result<std::path::PathBuf> {
    let path = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4().simple()));
    std::fs::write(&path, text)?;
    Ok(path)
}

// A job that dies again after it was put back is a dead letter again, within the broker's dedupe window, and a
// late failure from its first life does not end its second one.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_dies_twice_and_lives_on() -> Result<()> {
    let mut lab = deadly().await?;
    let operator = lab.start_operate("olga").await?;
    let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
    for life in 0..2 {
        until_given_up(&mut lab, 0, std::slice::from_ref(&job)).await?;
        let letters = operator.get("/dead").await?.body;
        assert_eq!(letters["dead"].as_array().unwrap().len(), 1, "life {life}: {letters}");
        assert_eq!(letters["dead"][0]["attempts"], 5);
        if life == 0 {
            let path = format!("/dead/{}/requeue", letters["dead"][0]["sequence"]);
            let (first, second) = tokio::join!(post(&operator, &path), post(&operator, &path));
            assert_eq!((first?.status, second?.status), (200, 200), "two operators at once");
        }
    }
    lab.stop_worker(0).await?;
    let letters = operator.get("/dead").await?.body;
    let path = format!("/dead/{}/requeue", letters["dead"][0]["sequence"]);
    assert_eq!(post(&operator, &path).await?.status, 200);
    lab.until_state(&job, "queued").await?;
    assert_eq!(
        lab.client().get(&format!("/fhir/_async/{job}")).await?.status,
        202,
        "it is queued for its client"
    );
    let (failure, now) = (Failure { code: Code::AttemptsExhausted, image: None }, clock::now());
    let late = ResultHeader::failed(job.parse()?, failure, 5, now, now).after_requeues(1);
    lab.jetstream().await?.publish(format!("results.{job}"), late.encode(&[])).await?.await?;
    let taken = async || (lab.messages("RESULTS").await.ok()? == 0).then_some(());
    eventually("the late failure is taken", LONG, taken).await?;
    lab.until_state(&job, "queued").await?;
    lab.start_worker(Worker::simulated(1)).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    assert_eq!(billed(&lab).await?, 1);
    lab.stop().await
}

// The operators' process is killed between the steps of a requeue: whoever comes next goes on with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_requeue_that_was_cut_off_is_finished() -> Result<()> {
    let mut lab = deadly().await?;
    let operator = lab.start_operate("olga").await?;
    let job = lab.client().submit(&sample("ham10000-mel.jpg")).await?;
    until_given_up(&mut lab, 0, std::slice::from_ref(&job)).await?;
    lab.stop_worker(0).await?;
    let sequence = operator.get("/dead").await?.body["dead"][0]["sequence"].as_i64().unwrap();
    lab.kill_operate().await?;
    // The record is open, and nothing else has happened.
    lab.sql(&format!(
        "UPDATE ingress.jobs SET state = 'queued', finished_at = NULL, failure = NULL, attempts = 0, \
         stream_seq = NULL, requeues = 1, requeue_of = {sequence}, requeue_pending = true, \
         queued_at = now() - interval '1 minute', deadline = now() + interval '1 hour'"
    ))
    .await?;
    let rounds = "SELECT count(*) FROM ingress.jobs WHERE state = 'queued'";
    lab.restart_operate().await?;
    let moved = async || (lab.messages("DEAD").await.ok()? == 0).then_some(());
    eventually("the letter leaves", LONG, moved).await?;
    assert_eq!((lab.messages("JOBS").await?, lab.count(rounds).await?), (1, 1));
    lab.start_worker(Worker::simulated(1)).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    lab.stop().await
}

// Who may do what: an integrator none of it, an operator nothing else; no secret and no payload in an answer.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_for_operators_only() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let operator = lab.start_operate("olga").await?;
    let integrator = lab.client().clone().at(&lab.operate_url()?);
    let routes = [
        (Method::GET, "/dead"),
        (Method::GET, "/dead/1"),
        (Method::POST, "/dead/1/requeue"),
        (Method::DELETE, "/dead/1"),
    ];
    for (method, path) in routes {
        let forbidden = send(integrator.request(method.clone(), path)).await?;
        assert_eq!((forbidden.status, forbidden.code()), (403, "forbidden"), "{method} {path}");
        let nobody = send(integrator.clone().with_token("").request(method.clone(), path)).await?;
        assert_eq!((nobody.status, nobody.code()), (401, "unauthenticated"), "{method} {path}");
        let public = send(lab.client().request(method.clone(), path)).await?;
        assert_eq!((public.status, public.code()), (404, "not-found"), "{method} {path} in public");
        let found = send(operator.request(method.clone(), path)).await?;
        assert!([200, 404].contains(&found.status), "{method} {path}: {}", found.text);
    }
    for bad in ["/dead?limit=0", "/dead?limit=101", "/dead?cursor=x", "/dead?page=1"] {
        let answer = operator.get(bad).await?;
        assert_eq!((answer.status, answer.code()), (400, "query-invalid"), "{bad}");
    }
    let at_public = operator.clone().at(&lab.url(0));
    let refused = at_public.analyze(&sample("ham10000-nv.jpg"), &[]).await?;
    assert_eq!((refused.status, refused.code()), (403, "forbidden"));
    lab.auth(&["user", "disable", "olga"])?;
    let out = async || (operator.get("/dead").await.ok()?.status == 401).then_some(());
    eventually("a disabled operator is shut out", Duration::from_secs(1), out).await?;
    lab.stop().await
}

// What must not go back: a job that its client has withdrawn, one that goes on, and one that nobody was told of. A purged letter is gone.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_go_back_is_refused_and_purged() -> Result<()> {
    let mut lab = deadly().await?;
    let operator = lab.start_operate("olga").await?;
    let mut jobs = Vec::new();
    for _ in 0..3 {
        let job = lab.client().submit(&sample("isic2017-nv.jpg")).await?;
        until_given_up(&mut lab, 0, std::slice::from_ref(&job)).await?;
        jobs.push(job);
    }
    let first = operator.get("/dead?limit=2").await?.body;
    let next = first["next"].as_u64().unwrap();
    let second = operator.get(&format!("/dead?limit=2&cursor={next}")).await?.body;
    assert!(second["next"].is_null());
    let letters: Vec<_> =
        [first, second].iter().flat_map(|page| page["dead"].as_array().unwrap().clone()).collect();
    let listed: Vec<_> = letters.iter().map(|letter| letter["job"].as_str().unwrap().to_owned()).collect();
    assert_eq!(listed, jobs);
    let requeue = |n: usize| format!("/dead/{}/requeue", letters[n]["sequence"]);

    lab.client().delete(&format!("/fhir/_async/{}", jobs[0])).await?;
    let running = format!(
        "UPDATE ingress.jobs SET state = 'running', failure = NULL, finished_at = NULL WHERE id = '{}'",
        jobs[1]
    );
    lab.sql(&running).await?;
    lab.sql(&format!("DELETE FROM ingress.jobs WHERE id = '{}'", jobs[2])).await?;
    for n in 0..3 {
        let answer = post(&operator, &requeue(n)).await?;
        assert_eq!((answer.status, answer.code()), (409, "requeue-refused"), "{n}: {}", answer.text);
    }
    let unaccepted = format!(
        "UPDATE ingress.jobs SET state = 'failed', failure = '{{\"code\":\"never-queued\"}}', finished_at = now() \
         WHERE id = '{}'",
        jobs[1]
    );
    lab.sql(&unaccepted).await?;
    let answer = post(&operator, &requeue(1)).await?;
    assert_eq!((answer.status, answer.code()), (409, "requeue-refused"), "{}", answer.text);
    assert_eq!((lab.messages("DEAD").await?, lab.messages("JOBS").await?), (3, 0));
    for letter in &letters {
        let path = format!("/dead/{}", letter["sequence"]);
        assert_eq!(operator.delete(&path).await?.status, 204);
        assert_eq!(operator.delete(&path).await?.status, 404);
        assert_eq!(operator.get(&path).await?.status, 404);
    }
    assert_eq!(lab.messages("DEAD").await?, 0);
    assert_eq!(lab.count("SELECT count(*) FROM auth.audit WHERE action = 'dead-purged'").await?, 3);
    assert_eq!(lab.count("SELECT count(*) FROM auth.audit WHERE action = 'job-withdrawn'").await?, 1);
    for forbidden in ["UPDATE auth.audit SET actor = ''", "DELETE FROM auth.audit", "TRUNCATE auth.audit"] {
        assert!(lab.sql(forbidden).await.is_err(), "{forbidden}");
    }
    lab.stop().await
}

// A job that kills its worker is run alone: of those that were beside it at its first attempt none is given up
// with it, and it costs each of them one attempt at most, whatever number of workers it kills.
#[tokio::test(flavor = "multi_thread")]
async fn a_killer_takes_no_other_job_along() -> Result<()> {
    let killer = sample_bytes("ham10000-mel.jpg");
    let worker = Worker::simulated(100).fault("abort").on(&killer).arg("--executors", "3");
    let mut lab = Lab::start(Setup { ack_wait: 1, ..Setup::without_workers() }).await?;
    let mut jobs = Vec::new();
    for n in 0..12 {
        let image = if n == 2 { "ham10000-mel.jpg" } else { "isic2017-nv.jpg" };
        jobs.push(lab.client().submit(&sample(image)).await?);
    }
    // It may die before it says that it is ready.
    let _ = lab.start_worker(worker).await;
    until_given_up(&mut lab, 0, &jobs).await?;
    let innocent = format!("FROM ingress.jobs WHERE id <> '{}'", jobs[2]);
    let failed = lab.count(&format!("SELECT count(*) {innocent} AND state <> 'succeeded'")).await?;
    assert_eq!(failed, 0, "taken along");
    let attempts = lab.count(&format!("SELECT max(attempts)::bigint {innocent}")).await?;
    assert!(attempts <= 2, "an innocent job took {attempts} attempts");
    assert_eq!(lab.client().poll(&jobs[2], LONG).await?.code(), "attempts-exhausted");
    assert_eq!((lab.messages("DEAD").await?, lab.messages("RETRIES").await?), (1, 0));
    lab.stop().await
}
