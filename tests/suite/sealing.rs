//! The keys that seal what is stored: they change under load, what is stored follows, and a lost one costs what it sealed.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_auth::sealing;
use dermflow_schemas::{
    clock,
    id::JobId,
    seal::{Content, Keyring},
};
use dermflow_tests::{
    checker::order,
    client::{Client, sample, sample_bytes, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use reqwest::Method;
use serde_json::{Value, json};
use time::macros::datetime;
use tokio::task::block_in_place;
use uuid::Uuid;

const LONG: Duration = Duration::from_mins(1);
/// Reports that were there before: enough for an interruption to meet some done and some not.
const REPORTS: usize = 5_000;

/// Records jobs with reports, sealed with the key that seals at present.
async fn plant(lab: &Lab, count: usize) -> Result<Vec<JobId>> {
    let (ring, now) = (Keyring::load(&lab.pki().sealing_keys)?, clock::now());
    let jobs: Vec<JobId> = (0..count).map(|_| JobId::new(now)).collect();
    let report = |job: &JobId| {
        let report = json!({"resourceType": "DiagnosticReport", "id": job.to_string()});
        ring.seal(Content::Report(*job), report.to_string().into_bytes(), now)
    };
    let sealed = jobs.iter().map(report).collect::<Result<Vec<_>, _>>()?;
    let ids: Vec<Uuid> = jobs.iter().map(|job| job.uuid()).collect();
    let keys: Vec<&str> = sealed.iter().map(|sealed| sealed.key_id.as_str()).collect();
    let bytes: Vec<&[u8]> = sealed.iter().map(|sealed| &*sealed.bytes).collect();
    let client = lab.pool("dermflow_ingress")?.get().await?;
    let insert = "INSERT INTO jobs (id, client, lane, state, images, accepted_at, finished_at, deadline, claim_check) \
                  SELECT id, (SELECT client FROM jobs LIMIT 1), 'bulk', 'succeeded', 1, $2::timestamptz, \
                  $2::timestamptz, $2::timestamptz, false FROM unnest($1::uuid[]) AS id";
    client.execute(insert, &[&ids, &now]).await?;
    let insert =
        "INSERT INTO reports (job, key_id, sealed) SELECT * FROM unnest($1::uuid[], $2::text[], $3::bytea[])";
    client.execute(insert, &[&ids, &keys, &bytes]).await?;
    Ok(jobs)
}

/// The key of a file.
fn id(path: &Path) -> Result<String> {
    Ok(path.file_stem().and_then(|stem| stem.to_str()).context("no name")?.to_owned())
}

/// Makes a key that seals in ten seconds, more than a process takes to look: its file and its id.
fn add_soon(folder: &Path) -> Result<(PathBuf, String)> {
    let path = sealing::add(folder, clock::now() + Duration::from_secs(10))?;
    let id = id(&path)?;
    Ok((path, id))
}

async fn sealed_with(lab: &Lab, key: &str) -> Result<i64> {
    lab.count(&format!("SELECT count(*) FROM ingress.reports WHERE key_id = '{key}'")).await
}

async fn until_sealed_with(lab: &Lab, key: &str) -> Result<()> {
    let some = async || (sealed_with(lab, key).await.ok()? > 0).then_some(());
    eventually("something is sealed with the new key", LONG, some).await
}

/// Watches until everything is sealed anew: the summary.
fn reseal(lab: &Lab, folder: &str) -> Result<Value> {
    let told = block_in_place(|| lab.auth(&["keys", "reseal", folder, "--json"]))?;
    Ok(serde_json::from_str(told.lines().last().context("no summary")?)?)
}

async fn check_reports(lab: &Lab, jobs: &[JobId]) -> Result<()> {
    for (n, job) in jobs.iter().enumerate() {
        let client = lab.client().clone().at(&lab.url(n % 2));
        let answer = client.get(&format!("/fhir/DiagnosticReport/{job}")).await?;
        ensure!(answer.status == 200 && answer.body["id"] == job.to_string(), "{job}: {}", answer.text);
    }
    Ok(())
}

/// Has images analysed and reads old reports until `stop`: the jobs. Ends with what is not answered with 200.
async fn call(client: Client, replica: usize, old: Vec<JobId>, stop: Arc<AtomicBool>) -> Result<Vec<JobId>> {
    let mut made: Vec<JobId> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let answer = client.analyze(&order(2 * made.len() + replica), &[]).await?;
        ensure!(answer.status == 200, "after {}: {} {}", made.len(), answer.status, answer.text);
        made.push(answer.body["id"].as_str().context("no id")?.parse()?);
        let job = old[made.len() % old.len()];
        let answer = client.get(&format!("/fhir/DiagnosticReport/{job}")).await?;
        ensure!(answer.status == 200, "{job}: {} {}", answer.status, answer.text);
    }
    Ok(made)
}

// Keys change under load on two replicas, and no request fails. What is stored follows, also when everybody who seals it
// anew is killed half-way; then the old keys are needed no more.
#[tokio::test(flavor = "multi_thread")]
async fn sealing_keys_rotate_and_what_is_stored_follows() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::simulated(1) }).await?;
    let folder = lab.pki().sealing_keys.clone();
    let shown = folder.display().to_string();
    let first = lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?;
    ensure!(first.status == 200, "{}", first.text);
    let first: JobId = first.body["id"].as_str().context("no id")?.parse()?;
    let mut jobs: Vec<JobId> = plant(&lab, REPORTS).await?.into_iter().step_by(REPORTS / 100).collect();
    jobs.push(first);

    let (second_file, second) = add_soon(&folder)?;
    let stop = Arc::new(AtomicBool::new(false));
    let callers = [0, 1].map(|replica| {
        let client = lab.client().clone().at(&lab.url(replica));
        tokio::spawn(call(client, replica, jobs.clone(), stop.clone()))
    });
    until_sealed_with(&lab, &second).await?;
    let sum = reseal(&lab, &shown)?;
    stop.store(true, Ordering::Relaxed);
    let mut made = Vec::new();
    for caller in callers {
        made.extend(caller.await??);
    }
    println!("{} jobs during the rotation, none failed; {sum}", made.len());
    assert!(made.len() > 10, "{}", made.len());
    let count = |name: &str| sum[name].as_i64().unwrap_or_default();
    assert!(count("resealed") + count("already_new") > REPORTS as i64, "{sum}");
    assert_eq!((count("unreadable"), &sum["key"]), (0, &json!(second)));
    jobs.extend(made.iter().step_by(10));

    let (_, third) = add_soon(&folder)?;
    until_sealed_with(&lab, &third).await?;
    lab.kill_ingress(0).await?;
    lab.kill_ingress(1).await?;
    let (left, done) = (sealed_with(&lab, &second).await?, sealed_with(&lab, &third).await?);
    println!("interrupted: {done} done, {left} left");
    assert!(left > 0 && done > 0, "{done} done, {left} left");
    lab.restart_every_ingress().await?;
    reseal(&lab, &shown)?;
    let others = format!("SELECT count(*) FROM ingress.reports WHERE key_id <> '{third}'");
    assert_eq!(lab.count(&others).await?, 0);

    // Payloads may need them for two weeks: nothing is removed.
    assert_eq!(lab.auth(&["keys", "prune", &shown, "--yes"])?, "");
    // As if the first one had been replaced long ago.
    sealing::add(&folder, datetime!(2020-01-01 00:00 UTC))?;
    let pruned = lab.auth(&["keys", "prune", &shown, "--yes"])?;
    assert_eq!(pruned, folder.join("k1.key").display().to_string());
    fs::remove_file(second_file)?;
    for replica in 0..2 {
        lab.kill_ingress(replica).await?;
    }
    lab.restart_every_ingress().await?;
    check_reports(&lab, &jobs).await?;
    lab.stop().await
}

// A key that is lost costs the reports that it sealed, each an error of its own; it costs nothing once it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_sealing_key_costs_what_it_sealed_and_nothing_else() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let folder = lab.pki().sealing_keys.clone();
    let shown = folder.display().to_string();
    let image = json!({"data": STANDARD.encode(sample_bytes("isic2017-nv.jpg"))});
    let line = json!({"custom_id": "a", "images": [image]}).to_string() + "\n";
    let upload =
        lab.client().request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let upload = send(upload.body(line)).await?;
    let batch: Value = serde_json::from_str(upload.text.lines().next().context("no answer")?)?;
    let results = format!("/batches/{}/results?wait=30", batch["batch"].as_str().context("no batch")?);
    let read = async || -> Result<Value> {
        let answer = lab.client().get(&results).await?;
        Ok(serde_json::from_str(answer.text.lines().next().context("no result")?)?)
    };
    let before = read().await?;
    let job = before["job"].as_str().context("no job")?.to_owned();
    assert_eq!(before["report"]["id"], job, "{before}");

    let (lost, kept) = (folder.join("k1.key"), folder.join("k1.kept"));
    // In this order nobody sees both of them.
    fs::rename(&lost, &kept)?;
    let new = id(&sealing::add(&folder, clock::now())?)?;
    let path = format!("/fhir/DiagnosticReport/{job}");
    let told = async || {
        let answer = lab.client().get(&path).await.ok()?;
        (answer.code() == "report-unreadable").then_some(answer.status)
    };
    assert_eq!(eventually("the report cannot be opened", LONG, told).await?, 500);
    let after = read().await?;
    assert_eq!((&after["report"], &after["job"]), (&Value::Null, &json!(job)), "{after}");
    assert_eq!(after["error"]["code"], "report-unreadable", "{after}");
    // A worker may take a moment to see the new key.
    let works = async || {
        let answer = lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await.ok()?;
        (answer.status == 200).then_some(())
    };
    eventually("new jobs are worked on", LONG, works).await?;
    assert!(sealed_with(&lab, &new).await? > 0);
    let metric = lab.metric("dermflow_reports_unreadable_total{reason=\"key\"}").await;
    assert!(metric.is_some_and(|count| count >= 2.0), "{metric:?}");
    let logs = lab.logs()?;
    let named = |line: &&str| line.contains(&job) && line.contains("the report cannot be opened");
    assert!(logs.lines().any(|line| named(&line)), "the log does not name the job");
    let refused = format!("{:#}", block_in_place(|| lab.auth(&["keys", "reseal", &shown])).unwrap_err());
    assert!(refused.contains("cannot be opened"), "{refused}");
    let listed = lab.auth(&["keys", "list", &shown])?;
    assert!(listed.lines().any(|line| line.starts_with("k1\tmissing\t")), "{listed}");

    fs::rename(&kept, &lost)?;
    let back = async || (lab.client().get(&path).await.ok()?.status == 200).then_some(());
    eventually("the report is back", LONG, back).await?;
    reseal(&lab, &shown)?;
    assert_eq!(sealed_with(&lab, "k1").await?, 0);
    assert_eq!(read().await?["report"]["id"], job);
    lab.stop().await
}
