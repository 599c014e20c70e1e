//! `dermflow submit` as people use it: the program itself, against a whole system, killed and resumed.

use std::{collections::HashSet, fs, process::Output, time::Duration};

use anyhow::{Context, Result};
use dermflow_local::{pki::Pki, state::State};
use dermflow_tests::{
    client::sample_bytes,
    desk::Desk,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use serde_json::Value;
use tokio::process::Command;
use uuid::Uuid;

const LONG: Duration = Duration::from_mins(1);
const SAMPLES: [&str; 4] = ["ham10000-mel.jpg", "isic2017-nv.jpg", "isic2017-nv.png", "pad-ufes-nv.jpg"];

/// The desk of the client `demo`, with so many images.
fn desk(lab: &Lab, files: usize) -> Result<Desk> {
    Desk::new(lab, "demo", &SAMPLES.map(|name| (name, sample_bytes(name))), files)
}

/// Every image has its report, of a job that no other has.
fn assert_complete(desk: &Desk, out: &str, files: usize) -> Result<()> {
    let jobs: HashSet<String> = desk.complete(out, files)?.into_values().collect();
    assert_eq!(jobs.len(), files);
    Ok(())
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

// Killed while it uploads and while it collects: each file has one job and one line. Once more does nothing, and
// needs no server for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_submission_goes_on_without_loss_or_repetition() -> Result<()> {
    const FILES: usize = 200;
    let lab = Lab::start(Setup::simulated(20)).await?;
    let mut desk = desk(&lab, FILES)?;
    let seed = Uuid::new_v4().as_u128();
    println!("seed {seed}");
    let in_upload = 4 + (seed % 150) as usize;
    desk.kill_at(desk.start(&[])?, "results.ndjson.journal", in_upload, LONG).await?;
    let done = desk.lines("results.ndjson");
    let in_results = done + 1 + (seed / 150 % (FILES - done - 40) as u128) as usize;
    let again = desk.start(&["--concurrency", "2"])?;
    desk.kill_at(again, "results.ndjson", in_results, LONG).await?;

    let output = desk.submit(&["--json"]).await?;
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    assert_complete(&desk, "results.ndjson", FILES)?;
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, FILES as i64);
    let summary: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!((&summary["succeeded"], &summary["files"]), (&FILES.into(), &FILES.into()));

    let before = fs::read(desk.path("results.ndjson"))?;
    desk.url = "https://localhost:1".into();
    let output = desk.submit(&[]).await?;
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    assert_eq!(fs::read(desk.path("results.ndjson"))?, before);
    lab.stop().await
}

// A replica that dies in the middle of the uploads costs time only.
#[tokio::test(flavor = "multi_thread")]
async fn a_submission_outlives_the_server() -> Result<()> {
    const FILES: usize = 150;
    let mut lab = Lab::start(Setup::simulated(20)).await?;
    let desk = desk(&lab, FILES)?;
    let child = desk.start(&[])?;
    for lines in [20, 100] {
        let reached = async || (desk.lines("results.ndjson.journal") >= lines).then_some(());
        eventually("files are accepted", LONG, reached).await?;
        lab.kill_ingress(0).await?;
        lab.restart_ingress(0).await?;
    }
    let output = child.wait_with_output().await?;
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    assert_complete(&desk, "results.ndjson", FILES)?;
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, FILES as i64);
    lab.stop().await
}

// What is wrong with a file is in its line; the others do not suffer.
#[tokio::test(flavor = "multi_thread")]
async fn broken_files_are_reported_and_the_exit_code_tells() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let desk = desk(&lab, 12)?;
    fs::write(desk.path("images/text.jpg"), "no image")?;
    fs::write(desk.path("images/empty.png"), "")?;
    fs::File::create(desk.path("images/huge.jpg"))?.set_len(30_000_000)?;
    for _ in 0..2 {
        let output = desk.submit(&["--json"]).await?;
        assert_eq!(code(&output), Some(1), "{}", stderr(&output));
        let summary: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!((&summary["succeeded"], &summary["refused"]), (&12.into(), &3.into()), "{summary}");
    }
    let results = desk.results("results.ndjson")?;
    assert_eq!(results.len(), 15);
    assert_eq!(results["images/text.jpg"]["error"]["code"], "image-format");
    assert_eq!(results["images/huge.jpg"]["error"]["code"], "file-too-large");
    assert_eq!(results["images/empty.png"]["job"], Value::Null);
    assert!(results["images/empty.png"]["error"]["title"].is_string());
    assert_eq!(results.values().filter(|line| line["report"].is_object()).count(), 12);
    lab.stop().await
}

// One sentence, the exit code, and no trace of the password.
#[tokio::test(flavor = "multi_thread")]
async fn what_stops_a_submission_is_told_in_one_sentence() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let mut desk = desk(&lab, 3)?;
    fs::write(desk.path("password"), "wrong-password")?;
    let output = desk.submit(&["--quiet"]).await?;
    let text = stderr(&output);
    assert_eq!(code(&output), Some(3), "{text}");
    assert!(text.contains("cannot sign in") && !text.contains("wrong-password"), "{text}");
    assert_eq!((text.trim().lines().count(), desk.lines("results.ndjson")), (1, 0), "{text}");

    fs::write(desk.path("images/later.jpg"), sample_bytes(SAMPLES[0]))?;
    let output = desk.submit(&["--quiet"]).await?;
    assert_eq!(code(&output), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("3 files then, 4 now"), "{}", stderr(&output));

    let elsewhere = ["--quiet", "--out", "other.ndjson", "--give-up-after", "1"];
    desk.url = "https://localhost:1".into();
    let output = desk.submit(&elsewhere).await?;
    assert_eq!(code(&output), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("given up after"), "{}", stderr(&output));

    // A server that another CA vouches for is not tried twice.
    desk.url = lab.url(0);
    desk.ca = Pki::prepare(&State::open(&desk.path("strange"))?)?.ca;
    let output = desk.submit(&["--quiet", "--out", "third.ndjson"]).await?;
    assert_eq!(code(&output), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("certificate"), "{}", stderr(&output));
    assert_eq!(code(&desk.submit(&["--no-such-flag"]).await?), Some(2));
    lab.stop().await
}

// Ctrl-C ends it cleanly; --no-wait leaves the rest to later; the batch can be followed from elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_submission_is_left_and_taken_up_again() -> Result<()> {
    const FILES: usize = 60;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let desk = desk(&lab, FILES)?;
    let child = desk.start(&[])?;
    let accepted = async || (desk.lines("results.ndjson.journal") >= 10).then_some(());
    eventually("files are accepted", LONG, accepted).await?;
    let id = child.id().context("it has ended")?;
    let interrupt = Command::new("sh").args(["-c", "kill -INT $0", &id.to_string()]).status().await?;
    assert!(interrupt.success());
    let output = child.wait_with_output().await?;
    assert_eq!(code(&output), Some(3), "{}", stderr(&output));
    assert!(stderr(&output).contains("interrupted; the same command goes on"), "{}", stderr(&output));

    let output = desk.submit(&["--no-wait"]).await?;
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    let batch: Uuid = String::from_utf8(output.stdout)?.trim().parse()?;
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, FILES as i64);
    assert_eq!(desk.lines("results.ndjson"), 0);

    lab.start_worker(Worker::simulated(1)).await?;
    let output = desk.submit(&[]).await?;
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    assert_complete(&desk, "results.ndjson", FILES)?;

    let batch = batch.to_string();
    let output = desk.dermflow(&["submit", "--batch", &batch, "--out", "followed.ndjson"])?.output().await?;
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    assert_complete(&desk, "followed.ndjson", FILES)?;
    let output = desk.dermflow(&["batch", "show", &batch, "--json"])?.output().await?;
    let shown: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!((&shown["status"], &shown["counts"]["succeeded"]), (&"completed".into(), &FILES.into()));
    lab.stop().await
}

// File names on standard input, and ready requests, with names that need care.
#[tokio::test(flavor = "multi_thread")]
async fn names_and_ready_requests_are_inputs_too() -> Result<()> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let lab = Lab::start(Setup::simulated(1)).await?;
    let desk = desk(&lab, 3)?;
    let odd = "images/mole \"left\" é.jpg";
    fs::write(desk.path(odd), sample_bytes(SAMPLES[0]))?;
    fs::write(desk.path("names"), format!("{odd}\nimages/0001-{}\n", SAMPLES[1]))?;
    let names = fs::File::open(desk.path("names"))?;
    let output = desk.dermflow(&["submit", "-", "--subject", "p-1"])?.stdin(names).output().await?;
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    let results = desk.results("results.ndjson")?;
    assert_eq!((results.len(), results.contains_key(odd)), (2, true));

    let line = |custom_id: &str, data: &str| {
        serde_json::json!({ "custom_id": custom_id, "images": [{ "data": data }] }).to_string()
    };
    let good = STANDARD.encode(sample_bytes(SAMPLES[1]));
    let ready = [line("good", &good), line("bad", "%%%"), line("also good", &good)].join("\n");
    fs::write(desk.path("ready"), ready)?;
    let output = desk.dermflow(&["submit", "--ndjson", "ready", "--out", "ready.out"])?.output().await?;
    assert_eq!(code(&output), Some(1), "{}", stderr(&output));
    let results = desk.results("ready.out")?;
    assert_eq!(results["bad"]["error"]["code"], "image-not-base64");
    assert!(results["good"]["report"].is_object() && results["also good"]["report"].is_object());
    lab.stop().await
}
