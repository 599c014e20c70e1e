//! Ingress that is killed, has a wrong clock, or hears the same request again and again.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dermflow_auth::token::{Grant, LEEWAY, LIFETIME, Tokens};
use dermflow_schemas::clock;
use dermflow_tests::{
    checker::{Executions, Ledger, order},
    client::{Answer, Client},
    form::scale,
    lab::{Lab, Setup},
    wait::eventually,
};
use futures_util::future::join_all;
use secrecy::ExposeSecret;
use uuid::Uuid;

use super::{SETTLE, jobs};

const HOUR: i64 = 3_600;

// R3: ingress is killed every 3 s under load. Every client finds its job again with its key, and no job is worked
// on twice.
#[tokio::test(flavor = "multi_thread")]
async fn r3_jobs_survive_an_ingress_killed_every_three_seconds() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(2)).await?;
    let (ledger, executions) = (Ledger::default(), Executions::watch(&lab).await?);
    let load = ledger.load(lab.client(), 0, 120);
    let mut tick = tokio::time::interval(Duration::from_secs(3));
    tick.tick().await;
    for _ in 0..scale(3, 12) {
        tick.tick().await;
        lab.kill_ingress(0).await?;
        lab.restart_ingress(0).await?;
    }
    load.end_after(jobs()).await?;
    let acknowledged = ledger.acknowledged();
    // Every key again, when all is over.
    ledger.submit_all(lab.client(), 0..acknowledged, 16).await?;
    let tally = ledger.check(&lab, &[], SETTLE).await?;
    let (begun, twice) = executions.counts();
    ensure!(twice.is_empty() && begun == tally.succeeded, "{begun} begun, twice: {twice:?}");
    ensure!(tally.refusals > 0, "no request was cut off: the test shows nothing");
    lab.stop().await
}

// R3: ingress killed while a caller waits: the retry with its key finds the same job.
#[tokio::test(flavor = "multi_thread")]
async fn r3_a_caller_finds_its_job_after_ingress_was_killed() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1_500)).await?;
    let (client, request) = (lab.client().clone(), order(1));
    let key = [("idempotency-key", "order-1")];
    let waiting = tokio::spawn({
        let (client, request) = (client.clone(), request.clone());
        async move { client.analyze(&request, &key).await }
    });
    let first = eventually("the job is in the queue", SETTLE, async || {
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
    let ledger = Ledger::default();
    assert_eq!(ledger.submit(&client, 1).await?, first);
    ledger.check(&lab, &[], SETTLE).await?;
    lab.stop().await
}

// A token of the client `demo` that was given out `age` seconds ago, signed with our key.
async fn token_of_age(lab: &Lab, age: i64) -> Result<String> {
    let account: Uuid = lab.sql("SELECT id FROM auth.users WHERE username = 'demo'").await?[0].get(0);
    let tokens = Tokens::open(&lab.signing_keys(), &lab.url(0))?;
    let (client, scope) = (account.into(), "system/DiagnosticReport.crds".to_owned());
    let grant = Grant { client, credential: account, scope, ends: None, after: None, bound_to: None };
    let token = tokens.issue(grant, clock::now() - Duration::from_secs(age.unsigned_abs()))?;
    Ok(token.expose_secret().to_owned())
}

// R12: an ingress whose clock is an hour off beside one whose clock is right: it goes by the database's. A job that
// enters there does not expire before its time, on either; and a token is not taken for longer than its life and half
// a minute.
async fn clock_is_off_by(seconds: i64) -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(20)).await?;
    lab.start_ingress_with_clock(seconds).await?;
    let wrong = lab.client().clone().at(&lab.url(1));
    // The HTTP library's clock is the machine's: the shift is there.
    let hour =
        async |client: &Client| anyhow::Ok(client.get("/jobs/none").await?.header("date")[17..19].to_owned());
    ensure!(hour(&wrong).await? != hour(lab.client()).await?, "the clock is right: the test shows nothing");
    let password = lab.password("demo")?;
    let at_wrong = wrong.clone().login("demo", &password).await?;
    let lifetime = i64::try_from(LIFETIME.as_secs())?;
    for (age, status) in [(lifetime - LEEWAY, 200), (lifetime + LEEWAY + 5, 401)] {
        let old = wrong.clone().with_token(&token_of_age(&lab, age).await?);
        let answer = old.get("/jobs").await?;
        assert_eq!(answer.status, status, "a token of {age} s: {}", answer.text);
    }
    let ledger = Ledger::default();
    let mut expired = Vec::new();
    for n in 0..scale(20, 2_000) {
        // Submitted to the one with the wrong clock, with its own token and with the other's.
        let client = if n % 2 == 0 { &at_wrong } else { &wrong };
        match client.analyze(&order(n), &[("idempotency-key", &format!("order-{n}"))]).await? {
            Answer { status: 200, .. } => drop(ledger.submit(lab.client(), n).await?),
            other => expired.push(format!("{n}: {} {}", other.status, other.code())),
        }
    }
    ensure!(expired.is_empty(), "{expired:?}");
    // The sweeper of either must leave open jobs alone.
    lab.stop_worker(0).await?;
    for (n, client) in [(1_000_000, lab.client()), (1_000_001, &at_wrong)] {
        let (key, prefer) = (format!("order-{n}"), ("prefer", "wait=1"));
        let answer = client.analyze(&order(n), &[("idempotency-key", &key), prefer]).await?;
        ensure!([202, 504].contains(&answer.status), "{} {}", answer.status, answer.text);
    }
    let mut rounds =
        tokio::time::interval(2 * dermflow_schemas::limits::SWEEP_INTERVAL + Duration::from_secs(1));
    rounds.tick().await;
    rounds.tick().await;
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs WHERE state = 'queued'").await?, 2);
    lab.restart_worker(0).await?;
    ledger.submit_all(lab.client(), 1_000_000..1_000_002, 1).await?;
    ledger.check(&lab, &[], SETTLE).await?;
    lab.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn r12_a_clock_an_hour_ahead_expires_no_job() -> Result<()> {
    clock_is_off_by(HOUR).await
}

#[tokio::test(flavor = "multi_thread")]
async fn r12_a_clock_an_hour_behind_expires_no_job() -> Result<()> {
    clock_is_off_by(-HOUR).await
}

// R15: a client that loses patience with a request, and retries: a hundred times at once, at two replicas. One job,
// one execution, one body.
#[tokio::test(flavor = "multi_thread")]
async fn r15_a_hundred_retries_at_once_are_one_job() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::simulated(300) }).await?;
    let (ledger, executions) = (Ledger::default(), Executions::watch(&lab).await?);
    let second = lab.client().clone().at(&lab.url(1));
    let orders = scale(2, 20);
    for n in 0..orders {
        let (request, key) = (order(n), format!("order-{n}"));
        let headers = [("idempotency-key", key.as_str())];
        // The first try is given up by the client before there is an answer.
        let impatient = lab.client().analyze(&request, &headers);
        let _ = tokio::time::timeout(Duration::from_millis(60), impatient).await;
        let call = async |m: usize| {
            let client = if m.is_multiple_of(2) { lab.client() } else { &second };
            client.analyze(&request, &headers).await
        };
        let begun = Instant::now();
        let answers: Vec<Answer> = join_all((0..100).map(call)).await.into_iter().collect::<Result<_>>()?;
        let bodies: HashSet<&str> = answers.iter().map(|answer| answer.text.as_str()).collect();
        assert!(answers.iter().all(|answer| answer.status == 200), "{bodies:?}");
        assert_eq!(bodies.len(), 1);
        println!("100 answers in {:?}", begun.elapsed());
        ledger.submit(lab.client(), n).await?;
    }
    let tally = ledger.check(&lab, &[], SETTLE).await?;
    assert_eq!((tally.succeeded, tally.repeated), (orders, 0));
    assert_eq!(executions.counts(), (orders, Vec::new()));
    lab.stop().await
}
