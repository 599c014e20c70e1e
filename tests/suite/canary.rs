//! Several models in one worker, versions side by side: by name, by weight, by whichever worker has them; each report says
//! which one it was.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::{envelope::JobHeader, id::JobId, image::hex, limits::MAX_ATTEMPTS, queue};
use dermflow_tests::{
    client::{Answer, Client, distribution, observations, sample, sample_bytes, send},
    lab::{Lab, Setup, Worker},
    model::{Folder, initializers},
    wait::eventually,
};
use dermflow_workers::{
    model::Model,
    models::{Models, Offer},
};
use futures_util::{StreamExt, stream};
use reqwest::Method;
use serde_json::{Value, json};

use crate::models::has_dot_products;

const LONG: Duration = Duration::from_mins(2);
const DERM7: &str = "workers/models/derm7";

fn with(models: &[String]) -> Setup {
    Setup { workers: vec![Worker::models(models)], ..Setup::default() }
}

/// A request for a model.
fn asking(model: &str) -> Value {
    let mut request = sample("ham10000-mel.jpg");
    if let Some(parameters) = request["parameter"].as_array_mut() {
        parameters.push(json!({"name": "model", "valueString": model}));
    }
    request
}

fn device(report: &Value) -> Result<&Value> {
    let contained = report["contained"].as_array().context("nothing contained")?;
    contained.iter().find(|resource| resource["resourceType"] == "Device").context("no device")
}

/// The version of the model that a report names.
fn version(report: &Value) -> Result<&str> {
    let versions = device(report)?["version"].as_array().context("no versions")?;
    let model = versions.iter().find(|version| version["type"]["text"] == "model").context("no model")?;
    let named = model["value"].as_str().context("no text")?;
    Ok(named.split_once('-').context("no version")?.1)
}

fn threshold(report: &Value) -> &Value {
    &observations(report, "malignancy-suspicion")[0]["referenceRange"][0]["high"]["value"]
}

/// What a worker with these models makes of a job.
fn models(offers: &[String]) -> Result<Models> {
    let load = |offer: &String| -> Result<_> {
        let Offer { folder, weight } = offer.parse()?;
        Ok((Model::load(&folder, true)?.into(), weight))
    };
    Ok(Models::new(offers.iter().map(load).collect::<Result<_>>()?)?)
}

fn chosen(models: &Models, job: &str) -> Result<String> {
    let (_, model) = models.choose(job.parse::<JobId>()?, None).context("no model")?;
    Ok(model.version.clone())
}

// The default model and a copy with another version, other weights and another threshold: who names one gets it, in each
// form of a request; the report names it with its digest, and reads by its threshold.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_names_its_model() -> Result<()> {
    let copy = Folder::of(DERM7)?;
    let current = Model::load(copy.path(), false)?;
    let named = format!("version = \"{}\"", current.version);
    copy.replace("model.toml", &named, "version = \"rc-1\"")?;
    let malignancy =
        current.indicators.iter().find(|indicator| indicator.id == "malignancy").context("none")?;
    let threshold_now = malignancy.threshold.context("no threshold")?;
    copy.replace("model.toml", &format!("threshold = {threshold_now}\n"), "threshold = 0.0123\n")?;
    let mut file = copy.network()?;
    let bias = initializers(&file)?.into_iter().find(|found| found.name == "network.classifier.bias");
    bias.context("no bias")?.scale(&mut file, 8.0)?;
    copy.set_network(&file)?;
    copy.write_golden().await?;
    let digest = hex(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &file).as_ref());
    let default = dermflow_local::stack::repo().join(DERM7).display().to_string();
    let lab = Lab::start(with(&[default, copy.weighing(0)])).await?;
    let client = lab.client();
    let is_new = |report: &Value| -> Result<bool> {
        let (new, old) = (format!("sha256:{digest}"), format!("sha256:{}", current.digest));
        let identifier = device(report)?["identifier"][0]["value"].as_str().context("no digest")?;
        let percent = (threshold_now * 10_000.0).round() / 100.0;
        match version(report)? {
            "rc-1" => ensure!(identifier == new && threshold(report) == 1.23, "{identifier}"),
            other => ensure!(
                other == current.version && identifier == old && threshold(report) == percent,
                "{other}"
            ),
        }
        Ok(version(report)? == "rc-1")
    };

    let plain = client.analyze(&sample("ham10000-mel.jpg"), &[]).await?.body;
    ensure!(!is_new(&plain)?, "the weights are not heard");
    ensure!(!is_new(&client.analyze(&asking("derm7"), &[]).await?.body)?, "the weights are not heard");
    let new = client.analyze(&asking("derm7@rc-1"), &[]).await?.body;
    ensure!(is_new(&new)?, "the name is not heard");
    let found = |report| observations(report, "condition-distribution")[0]["component"].clone();
    ensure!(found(&new) != found(&plain), "the weights of the network make no difference");

    let case =
        json!({"payload": [{"contentAttachment": {"data": base64(&sample_bytes("ham10000-mel.jpg"))}}]});
    for (query, new) in
        [("", false), ("?model=derm7", false), ("?model=derm7@rc-1", true), ("?model=derm7%40rc-1", true)]
    {
        let request = client.request(Method::POST, &format!("/v1.0/diagnosis-support{query}"));
        let request =
            request.header("content-type", "application/json").header("accept", "application/fhir+json");
        let answer = send(request.body(case.to_string())).await?;
        ensure!(answer.status == 200, "{}", answer.text);
        assert_eq!(is_new(&answer.body)?, new, "{query}");
    }
    let about = client.get("/device-information").await?;
    assert_eq!(about.body["version"][0]["type"], "software");
    ensure!(!about.text.contains("rc-1") && !about.text.contains("derm7"), "{}", about.text);

    let line = |id: &str, model: &str| {
        let image = json!({"data": base64(&sample_bytes("ham10000-mel.jpg"))});
        json!({"custom_id": id, "images": [image], "model": model}).to_string()
    };
    let lines = [line("old", "derm7"), line("new", "derm7@rc-1"), line("none", "derm8")].join("\n");
    let request = client.request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let answer = send(request.body(lines)).await?;
    let answers: Vec<Value> = answer.text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let refused: Vec<&Value> = answers.iter().filter(|answer| answer["custom_id"] == "none").collect();
    ensure!(refused.len() == 1 && refused[0].to_string().contains("model-unknown"), "{}", answer.text);
    for (id, new) in [("old", false), ("new", true)] {
        let job = answers.iter().find(|answer| answer["custom_id"] == id).context("not accepted")?;
        let job = job["job"].as_str().context("no job")?;
        assert_eq!(is_new(&client.poll(job, LONG).await?.body)?, new, "{id}");
    }

    // What there is not is refused before there is a job; a name that is none, before that.
    let jobs = lab.count("SELECT count(*) FROM ingress.jobs").await?;
    for (model, expected) in
        [("derm8", "model-unknown"), ("derm7@9", "model-unknown"), ("derm7@", "value-invalid")]
    {
        let answer = client.analyze(&asking(model), &[("prefer", "respond-async")]).await?;
        assert_eq!((answer.status, answer.code()), (422, expected), "{}", answer.text);
    }
    let request = client.request(Method::POST, "/diagnosis-support?model=a%20b");
    let answer = send(request.header("content-type", "application/json").body(case.to_string())).await?;
    assert_eq!((answer.status, answer.code()), (400, "query-invalid"), "{}", answer.text);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, jobs);

    for (version, at_least) in [(current.version.as_str(), 5.0), ("rc-1", 4.0)] {
        let name =
            format!("dermflow_model_jobs_total{{model=\"derm7\",state=\"succeeded\",version=\"{version}\"}}");
        let counted = lab.metric(&name).await.with_context(|| format!("no {name}"))?;
        ensure!(counted >= at_least, "{name} {counted}");
        let labels = format!("lane=\"interactive\",model=\"derm7\",version=\"{version}\"");
        ensure!(
            lab.metric(&format!("dermflow_job_model_seconds_count{{{labels}}}")).await > Some(1.0),
            "{labels}"
        );
    }
    lab.stop().await
}

// The default model and the same in 8 bits, side by side in one worker: each answers to its name, nearly alike.
#[tokio::test(flavor = "multi_thread")]
async fn eight_bits_are_served_beside_the_default_model() -> Result<()> {
    if !has_dot_products()? {
        println!("nothing is shown: this processor has no VNNI");
        return Ok(());
    }
    let names = ["derm7", "derm7-int8"];
    let folders = names.map(|name| dermflow_local::stack::repo().join("workers/models").join(name));
    let digests = folders.iter().map(|folder| Ok(Model::load(folder, false)?.digest));
    let digests = digests.collect::<Result<Vec<_>>>()?;
    let lab = Lab::start(with(&folders.map(|folder| folder.display().to_string()))).await?;
    for image in ["ham10000-mel.jpg", "ham10000-bcc.jpg", "isic2017-nv.png", "pad-ufes-bcc.jpg"] {
        let mut found = Vec::new();
        for (name, digest) in names.iter().zip(&digests) {
            let mut request = sample(image);
            let asked = json!({"name": "model", "valueString": name});
            request["parameter"].as_array_mut().context("no parameters")?.push(asked);
            let answer = lab.client().analyze(&request, &[]).await?;
            ensure!(answer.status == 200, "{}", answer.text);
            let identifier = &device(&answer.body)?["identifier"][0]["value"];
            ensure!(*identifier == format!("sha256:{digest}"), "{name}: {identifier}");
            let classes = distribution(observations(&answer.body, "condition-distribution")[0]);
            found.push(BTreeMap::from_iter(classes));
        }
        ensure!(found[0].keys().eq(found[1].keys()), "{found:?}");
        let off = found[0].iter().map(|(code, p)| (p - found[1][code]).abs()).fold(0.0, f64::max);
        println!("{image}: off by {off} per cent");
        ensure!(off > 0.0 && off <= 15.0, "{image}: {off} per cent, {found:?}");
    }
    lab.stop().await
}

fn base64(file: &[u8]) -> String {
    use ::base64::{Engine, engine::general_purpose::STANDARD};
    STANDARD.encode(file)
}

/// Submits so many jobs, and gives the reports by job.
async fn reports(client: &Client, jobs: usize, request: &Value) -> Result<BTreeMap<String, Value>> {
    let one = async || -> Result<(String, Value)> {
        let job = client.submit(request).await?;
        let answer = client.poll(&job, LONG).await?;
        ensure!(answer.status == 200, "{}", answer.text);
        Ok((job, answer.body))
    };
    let all: Vec<_> = stream::iter(0..jobs).map(|_| one()).buffer_unordered(16).collect().await;
    all.into_iter().collect()
}

// A canary with 15 of 100 gets as many of 500 jobs as chance allows: within five standard deviations, beyond which it is
// one run in a million. Which jobs these are follows from their ids: two workers, which have the models in another order,
// agree with each other and with what is computed here.
#[tokio::test(flavor = "multi_thread")]
async fn a_canary_gets_its_share() -> Result<()> {
    const JOBS: usize = 500;
    const SHARE: f64 = 0.15;
    let (old, new) = (Folder::simulated("1", 1, "")?, Folder::simulated("2", 1, "")?);
    let offers = [old.weighing(85), new.weighing(15)];
    let setup = Setup {
        workers: vec![Worker::models(&offers), Worker::models(&[offers[1].clone(), offers[0].clone()])],
        ..Setup::default()
    };
    let lab = Lab::start(setup).await?;
    let models = models(&offers)?;
    let reports = reports(lab.client(), JOBS, &sample("ham10000-mel.jpg")).await?;
    let mut canary = 0;
    for (job, report) in &reports {
        assert_eq!(version(report)?, chosen(&models, job)?, "{job}");
        canary += usize::from(version(report)? == "2");
    }
    let expected = JOBS as f64 * SHARE;
    let bound = 5.0 * (expected * (1.0 - SHARE)).sqrt();
    println!("{canary} of {} jobs for the canary; {expected} within {bound:.1}", reports.len());
    ensure!(reports.len() == JOBS && (canary as f64 - expected).abs() <= bound, "{canary}");
    lab.stop().await
}

// Every first attempt panics, of either model: the second one is with the model of the first.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_stays_with_its_model() -> Result<()> {
    const JOBS: usize = 16;
    let fault = "fault = \"panic\"\nfault_attempts = 1";
    let (old, new) = (Folder::simulated("1", 1, fault)?, Folder::simulated("2", 1, fault)?);
    let offers = [old.weighing(1), new.weighing(1)];
    let lab = Lab::start(Setup { workers: vec![Worker::models(&offers); 2], ..Setup::default() }).await?;
    let reports = reports(lab.client(), JOBS, &sample("ham10000-mel.jpg")).await?;
    let logs = lab.logs()?;
    for (job, report) in &reports {
        let attempts: Vec<&str> =
            logs.lines().filter(|line| line.contains(job) && line.contains("outcome")).collect();
        let outcome = |outcome: &str| {
            let mut found = attempts.iter().filter(|line| line.contains(outcome));
            found.next().with_context(|| format!("no {outcome} in {attempts:#?}"))
        };
        let model = format!("simulated@{}", version(report)?);
        for line in [outcome("retry")?, outcome("report")?] {
            ensure!(line.contains(&model), "{line}, not {model}");
        }
    }
    assert_eq!(lab.count("SELECT min(attempts)::bigint FROM ingress.jobs").await?, 2);
    lab.stop().await
}

// Each worker has a model of its own: a job that comes to the wrong one is handed on, whichever way it came.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_to_a_worker_that_has_its_model() -> Result<()> {
    let (old, new) = (Folder::simulated("1", 1, "")?, Folder::simulated("2", 1, "")?);
    let setup = Setup {
        workers: vec![Worker::models(&[old.weighing(1)]), Worker::models(&[new.weighing(1)])],
        ..Setup::default()
    };
    let mut lab = Lab::start(setup).await?;
    for wanted in ["1", "2"] {
        let request = asking(&format!("simulated@{wanted}"));
        for (job, report) in reports(lab.client(), 20, &request).await? {
            assert_eq!(version(&report)?, wanted, "{job}");
        }
        let report = lab.client().analyze(&request, &[("prefer", "wait=60")]).await?;
        ensure!(report.status == 200 && version(&report.body)? == wanted, "{}", report.text);
    }
    ensure!(lab.logs()?.contains("handed on"), "every job came to the right worker at once");
    assert_eq!(lab.count("SELECT max(attempts)::bigint FROM ingress.jobs").await?, 1, "an attempt was spent");

    // When the last worker that has it is gone, new jobs are refused; the repeat of an old one finds it all the same.
    let key = [("idempotency-key", "k1"), ("prefer", "respond-async")];
    let first = lab.client().analyze(&asking("simulated@2"), &key).await?;
    lab.client().poll(first.job(), LONG).await?;
    lab.stop_worker(1).await?;
    let refused = async || {
        let answer = lab.client().analyze(&asking("simulated@2"), &[]).await.ok()?;
        (answer.code() == "model-unknown").then_some(answer)
    };
    let answer = eventually("the model is unknown", LONG, refused).await?;
    assert_eq!(answer.status, 422);
    let again = lab.client().analyze(&asking("simulated@2"), &key).await?;
    assert_eq!((again.status, again.body["id"].as_str()), (200, Some(first.job())), "{}", again.text);
    let other = lab.client().analyze(&asking("simulated@1"), &key).await?;
    assert_eq!(other.code(), "idempotency-conflict", "{}", other.text);
    lab.stop().await
}

// A job that was accepted for a model that no worker has later ends with that as its reason, after as many attempts as any
// other, in the dead letters; or at its deadline, if that is sooner.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_gone_ends_its_jobs() -> Result<()> {
    let old = Folder::simulated("1", 1, "")?;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let brief = [("prefer", "respond-async"), ("cancel-after", "5")];
    let brief = lab.client().analyze(&asking("simulated@2"), &brief).await?.job().to_owned();
    let job = lab.client().submit(&asking("simulated@2")).await?;
    // The last attempt, as after the back-offs of the others, which take minutes.
    let stream = lab.jetstream().await?.get_stream(queue::JOBS).await?;
    let mut last = None;
    for sequence in 1..=2 {
        let message = stream.get_raw_message(sequence).await?;
        let (header, tail) = JobHeader::decode(&message.payload)?;
        if header.job.to_string() == job {
            last = Some((message.subject.clone(), header.at_attempt(MAX_ATTEMPTS).encode(&tail)));
            stream.delete_message(sequence).await?;
        }
    }
    let (subject, body) = last.context("not in the queue")?;
    lab.jetstream().await?.publish(subject, body).await?.await?;
    lab.start_worker(Worker::models(&[old.weighing(1)])).await?;
    let ended: Answer = lab.client().poll(&job, LONG).await?;
    assert_eq!((ended.status, ended.code()), (422, "model-unknown"), "{}", ended.text);
    assert_eq!(lab.messages(queue::DEAD).await?, 1);
    let ended = lab.client().poll(&brief, LONG).await?;
    assert_eq!(ended.code(), "deadline-exceeded", "{}", ended.text);
    assert_eq!(lab.messages(queue::JOBS).await?, 0);
    assert_eq!(lab.client().analyze(&sample("ham10000-nv.jpg"), &[]).await?.status, 200);
    lab.stop().await
}

// What cannot be served together is a sentence at start.
#[tokio::test(flavor = "multi_thread")]
async fn models_that_do_not_go_together_are_refused() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let (old, new) = (Folder::simulated("1", 1, "")?, Folder::simulated("2", 1, "")?);
    for (offers, reason) in [
        (vec![old.weighing(1), old.weighing(2)], "the model simulated@1 is given twice"),
        (vec![old.weighing(0), new.weighing(0)], "no model has a weight above 0"),
        (vec![old.weighing(1), new.weighing(1_000_001)], "a weight is at most 1000000"),
        (vec![old.weighing(1), "/nowhere".into()], "/nowhere/model.toml"),
    ] {
        let refused = lab.start_worker(Worker::models(&offers)).await.err().context("it starts")?;
        ensure!(format!("{refused:#}").contains(reason), "{refused:#}");
    }
    lab.stop().await
}
