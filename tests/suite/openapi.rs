//! What `/openapi.json` says, against what the service does.

use std::{collections::BTreeMap, process::Stdio};

use anyhow::{Context, Result, ensure};
use dermflow_local::{servers::python_packages, stack::repo};
use dermflow_tests::{
    client::{Client, sample, send},
    lab::{Lab, Setup},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

/// Seconds of a run. A long one is `DERMFLOW_FUZZ_SECONDS=250 ./tests/run schemathesis`, with a seed of its own.
const SECONDS: &str = "60";
/// Requests of a run at least.
const LEAST: u64 = 500;

// A third party's tool sends what is described and what is not, and finds no server error, and no answer whose status,
// type, headers or body are not described.
#[tokio::test(flavor = "multi_thread")]
async fn schemathesis_finds_nothing_that_is_not_described() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let client = lab.client();
    let password = lab.auth(&["user", "create", "ada", "--role", "auditor"])?;
    let auditor = Client::new(&lab.ca(), &lab.url(0))?.login("ada", &password).await?;
    let report = client.analyze(&sample("ham10000-nv.jpg"), &[]).await?;
    ensure!(report.status == 200, "{}", report.text);
    let (job, batch) = (report.job(), batch(client).await?);
    let ids = json!({
        "/jobs/{id}": [job], "/fhir/Task/{id}": [job], "/fhir/DiagnosticReport/{id}": [job], "/fhir/_async/{id}": [job],
        "/batches/{id}": [batch], "/batches/{id}/results": [batch], "/batches/{id}/errors": [batch],
        "/fhir/_bulk/{id}": [batch], "/fhir/AuditEvent/{id}": ["1", "2"],
    });
    let known = json!({"client": client.token(), "auditor": auditor.token(), "ids": ids}).to_string();
    let folder = repo().join("tests/openapi");
    let pins = std::fs::read_to_string(folder.join("requirements.txt"))?;
    let libs = python_packages(repo(), "openapi", &pins, |step| println!("{step}")).await?;
    let long = std::env::var("DERMFLOW_FUZZ_SECONDS").ok();
    let seed: &[&str] = if long.is_some() { &[] } else { &["--seed", "1"] };
    let mut tool = Command::new("python3")
        .arg(folder.join("fuzz.py"))
        .arg("--libs")
        .arg(libs)
        .arg(lab.url(0))
        .arg(lab.ca())
        .args(["--max-time", long.as_deref().unwrap_or(SECONDS), "--workers", "2", "--request-timeout", "90"])
        .args(seed)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    tool.stdin.take().context("no stdin")?.write_all(known.as_bytes()).await?;
    let output = tool.wait_with_output().await?;
    let told = String::from_utf8_lossy(&output.stdout);
    println!("{told}");
    ensure!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    // It has looked: every operation was called, and many times. The document it has read before it counts.
    let called: BTreeMap<String, u64> = serde_json::from_str(told.lines().last().unwrap_or_default())?;
    let described = operations(client).await?.into_iter().filter(|one| one != "GET /openapi.json");
    let missed: Vec<_> = described.filter(|one| !called.contains_key(one)).collect();
    ensure!(missed.is_empty(), "not called: {missed:?}");
    ensure!(called.values().sum::<u64>() >= LEAST, "{called:?}");
    lab.stop().await
}

/// All that is described, as `GET /path`.
async fn operations(client: &Client) -> Result<Vec<String>> {
    let description = client.get("/openapi.json").await?.body;
    let paths = description["paths"].as_object().context("no paths")?;
    let of = |(path, item): (&String, &Value)| {
        let methods: Vec<_> = item.as_object().into_iter().flatten().collect();
        methods.into_iter().map(|(method, _)| format!("{} {path}", method.to_uppercase())).collect::<Vec<_>>()
    };
    Ok(paths.iter().flat_map(of).collect())
}

async fn batch(client: &Client) -> Result<String> {
    let request = client.request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let answer = send(request.body("{}\n")).await?;
    let first: Value = serde_json::from_str(answer.text.lines().next().unwrap_or_default())?;
    Ok(first["batch"].as_str().context("no batch")?.to_owned())
}
