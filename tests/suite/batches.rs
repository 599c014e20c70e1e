//! Bulk: batches as NDJSON, lists of jobs, quotas, FHIR batches.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_auth::token::{Grant, LEEWAY, LIFETIME, Tokens};
use dermflow_schemas::{
    clock,
    limits::{MAX_BUNDLE_ENTRIES, MAX_UPLOADS, MAX_WAITERS, UPLOAD_PATIENCE},
};
use dermflow_tests::{
    client::{Answer, Client, sample, sample_bytes, send},
    fhir::validate,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use futures_util::{StreamExt, stream};
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::identity::secret;

const LONG: Duration = Duration::from_mins(1);
const NDJSON: &str = "application/x-ndjson";
const FHIR_NDJSON: &str = "application/fhir+ndjson";

// A line in plain form.
fn line(custom_id: &str) -> String {
    let image = json!({"data": STANDARD.encode(sample_bytes("isic2017-nv.jpg"))});
    json!({"custom_id": custom_id, "images": [image]}).to_string() + "\n"
}

// Uploads a body and returns the lines of the answer.
async fn upload(client: &Client, path: &str, kind: &str, body: String) -> Result<Vec<Value>> {
    let request = client.request(Method::POST, path).header("content-type", kind).body(body);
    let answer = send(request).await?;
    ensure!(answer.status == 200, "{} {}", answer.status, answer.text);
    lines(&answer)
}

// What an upload sends next. Without it, the upload has reached its end.
type Sender = tokio::sync::mpsc::Sender<Result<String, std::io::Error>>;

// An upload that goes on for as long as its sender is there, and its answer.
async fn stream_to(client: &Client, path: &str) -> Result<(Sender, reqwest::Response)> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let body = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let request = client.request(Method::POST, path).header("content-type", NDJSON);
    let response = request.body(reqwest::Body::wrap_stream(body)).send().await?;
    ensure!(response.status() == 200, "{}", response.status());
    Ok((sender, response))
}

// The last line of an upload's answer.
async fn last(response: reqwest::Response) -> Result<Value> {
    let text = tokio::time::timeout(LONG, response.text()).await??;
    Ok(serde_json::from_str(text.lines().next_back().context("no line")?)?)
}

fn lines(answer: &Answer) -> Result<Vec<Value>> {
    answer.text.lines().map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
}

fn id(answer: &[Value]) -> String {
    answer[0]["batch"].as_str().unwrap_or_default().to_owned()
}

// The answer of a line, by its number.
fn of(answer: &[Value], number: usize) -> &Value {
    answer.iter().find(|line| line["line"] == number).unwrap_or(&Value::Null)
}

async fn one_job_at_a_time(lab: &mut Lab, client: &str) -> Result<()> {
    lab.auth(&["user", "quota", client, "--jobs", "1"])?;
    // A replica knows the quotas before its first request.
    lab.stop_ingress(0).await?;
    lab.restart_ingress(0).await
}

async fn until_status(client: &Client, batch: &str, status: &str) -> Result<Value> {
    let path = format!("/batches/{batch}");
    let reached = async || {
        let answer = client.get(&path).await.ok()?;
        (answer.body["status"] == status).then_some(answer.body)
    };
    eventually(&format!("the batch is {status}"), LONG, reached).await
}

// A batch with good and bad lines: each is answered by number and name, both files say all of it, and once.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_answered_line_by_line_and_read_as_two_files() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let client = lab.client();
    let bad = "{\"custom_id\":\"bad\",\"images\":[{\"data\":\"!\"}]}\n";
    let whole = sample_bytes("ham10000-mel.jpg");
    let broken = &whole[..whole.len() / 2];
    let broken = json!({"custom_id": "broken", "images": [{"data": STANDARD.encode(broken)}]});
    let good: String = (0..10).map(|n| line(&format!("good/{n} ü.jpg"))).collect();
    let body = format!("{good}{bad}\n{broken}\r\n{{\n{}", line("good/0 ü.jpg"));
    let answer = upload(client, "/batches", NDJSON, body).await?;
    let batch = id(&answer);
    let last = answer.last().context("no last line")?;
    assert_eq!(last["complete"], true, "{last}");
    assert_eq!((&last["lines"], &last["accepted"], &last["refused"]), (&json!(14), &json!(11), &json!(3)));
    let code = |number| of(&answer, number)["error"]["code"].as_str().unwrap_or_default();
    assert_eq!((code(11), code(14)), ("image-not-base64", "json-malformed"));
    assert_eq!((code(1), code(15)), ("", "custom-id-repeated"));
    assert_eq!(of(&answer, 11)["error"]["errors"][0]["field"], "images[0].data");
    let state = until_status(client, &batch, "completed-with-errors").await?;
    assert_eq!((&state["percent"], &state["total"], &state["refused"]), (&json!(100), &json!(11), &json!(3)));
    assert_eq!(
        (&state["counts"]["succeeded"], &state["counts"]["failed"]),
        (&json!(10), &json!(1)),
        "{state}"
    );

    let results = lines(&client.get(&format!("/batches/{batch}/results")).await?)?;
    let names: HashSet<&str> = results.iter().filter_map(|line| line["custom_id"].as_str()).collect();
    assert_eq!((results.len(), names.len()), (10, 10));
    for result in &results {
        let number = result["line"].as_u64().context("no line")? as usize;
        assert_eq!(of(&answer, number)["job"], result["job"]);
        assert_eq!(result["report"]["id"], result["job"]);
    }
    let errors = lines(&client.get(&format!("/batches/{batch}/errors")).await?)?;
    let codes: HashSet<&str> = errors.iter().filter_map(|line| line["error"]["code"].as_str()).collect();
    assert_eq!(
        codes,
        HashSet::from(["image-not-base64", "json-malformed", "image-undecodable", "custom-id-repeated"]),
        "{errors:?}"
    );
    assert_eq!(of(&errors, 15)["custom_id"], Value::Null, "the name has a report");
    let cursor = &results[3]["cursor"];
    let rest = client.get(&format!("/batches/{batch}/results?cursor={cursor}&limit=2")).await?;
    assert_eq!(lines(&rest)?, results[4..6], "from where the reader was");

    let manifest = client.get(&format!("/fhir/_bulk/{batch}")).await?;
    assert_eq!(manifest.status, 200);
    let (output, error) = (&manifest.body["output"][0], &manifest.body["error"][0]);
    assert_eq!((&output["type"], &output["count"]), (&json!("DiagnosticReport"), &json!(10)));
    assert_eq!((&error["type"], &error["count"]), (&json!("OperationOutcome"), &json!(4)));
    let mut documents = Vec::new();
    for file in [output, error] {
        let answer = client.get(file["url"].as_str().context("no url")?).await?;
        assert_eq!(answer.header("content-type"), FHIR_NDJSON);
        let resources = lines(&answer)?;
        assert_eq!(json!(resources.len()), file["count"]);
        documents.extend(resources.into_iter().map(|resource| (file["type"].to_string(), resource)));
    }
    validate(&documents).await?;
    lab.stop().await
}

// The same in FHIR: a line is Parameters whose id is the caller's name for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_fhir_parameters() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let parameters = |n: usize| {
        let mut parameters = sample("isic2017-nv.jpg");
        parameters["id"] = json!(format!("line-{n}"));
        parameters.to_string() + "\n"
    };
    let body: String = (0..5).map(parameters).collect();
    let answer = upload(lab.client(), "/batches", FHIR_NDJSON, body).await?;
    assert_eq!(answer.last().context("no last line")?["accepted"], 5, "{answer:?}");
    until_status(lab.client(), &id(&answer), "completed").await?;
    let refused = lab.client().request(Method::POST, "/batches").header("content-type", "application/json");
    let refused = send(refused.body("")).await?;
    assert_eq!((refused.status, refused.code()), (415, "media-type"));
    let empty = upload(lab.client(), "/batches", NDJSON, String::new()).await?;
    until_status(lab.client(), &id(&empty), "completed").await?;
    let manifest = lab.client().get(&format!("/fhir/_bulk/{}", id(&empty))).await?;
    assert_eq!(manifest.body["output"][0]["count"], 0, "both files exist, even when they are empty");
    assert_eq!(manifest.body["error"][0]["count"], 0);
    lab.stop().await
}

// Answers come while the upload goes on; a cut upload is resumed, and no line is a second job.
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_upload_is_resumed_without_a_second_job() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let client = lab.client();
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<String, std::io::Error>>(1);
    let body = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let request = client
        .request(Method::POST, "/batches")
        .header("content-type", NDJSON)
        .header("idempotency-key", "cut")
        .body(reqwest::Body::wrap_stream(body));
    let sent = tokio::spawn(request.send());
    for n in 0..3 {
        sender.send(Ok(line(&format!("l{n}")))).await?;
    }
    let response = sent.await??;
    let location = response.headers()["location"].to_str()?.to_owned();
    let mut answers = response.bytes_stream();
    let mut heard = String::new();
    while heard.matches("\"job\"").count() < 3 {
        let more = tokio::time::timeout(LONG, answers.next()).await?.context("the answer ended")??;
        heard.push_str(std::str::from_utf8(&more)?);
    }
    sender.send(Ok("{\"custom_id\":\"l3\",\"ima".into())).await?;
    sender.send(Err(std::io::Error::other("cut"))).await?;
    drop((sender, answers));
    let state = client.get(&location).await?.body;
    assert_eq!((&state["status"], &state["total"]), (&json!("uploading"), &json!(3)), "{state}");

    let whole: String = (0..6).map(|n| line(&format!("l{n}"))).collect();
    let path = location.split_once("/batches/").context("no batch")?.1.to_owned();
    let again = upload(client, &format!("/batches/{path}"), NDJSON, whole.clone()).await?;
    assert_eq!(again.last().context("no last line")?["accepted"], 6);
    for n in 1..=3 {
        let job = of(&again, n)["job"].as_str().context("no job")?;
        assert!(heard.contains(job), "line {n} is another job");
    }
    // The key of the upload finds the batch as well; another content under a known name is refused.
    let other =
        json!({"custom_id": "l0", "images": [{"data": STANDARD.encode(sample_bytes("ham10000-nv.jpg"))}]});
    let request = client.request(Method::POST, "/batches").header("content-type", NDJSON);
    let request = request.header("idempotency-key", "cut").body(format!("{other}\n{}", line("l1")));
    let third = lines(&send(request).await?)?;
    assert_eq!(id(&third), path);
    assert_eq!(of(&third, 1)["error"]["code"], "idempotency-conflict");
    assert_eq!(of(&third, 2)["job"], of(&again, 2)["job"]);
    let state = until_status(client, &path, "completed-with-errors").await?;
    assert_eq!((&state["total"], &state["counts"]["succeeded"]), (&json!(6), &json!(6)));
    let errors = lines(&client.get(&format!("{location}/errors")).await?)?;
    let [conflict] = errors.as_slice() else { panic!("{errors:?}") };
    assert_eq!(
        (&conflict["line"], &conflict["custom_id"]),
        (&json!(1), &Value::Null),
        "the name has a report"
    );
    assert_eq!(conflict["error"]["code"], "idempotency-conflict");
    lab.stop().await
}

// Cuts an upload, the only one, once it has been answered this line.
async fn cut_behind(
    lab: &Lab,
    (sender, mut answer): (Sender, reqwest::Response),
    line: String,
) -> Result<()> {
    sender.send(Ok(line)).await?;
    let mut told = String::new();
    while !told.contains("\"line\"") {
        let more = tokio::time::timeout(LONG, answer.chunk()).await??.context("the answer ended")?;
        told.push_str(std::str::from_utf8(&more)?);
    }
    sender.send(Err(std::io::Error::other("cut"))).await?;
    drop((sender, answer));
    let ended = async || (lab.count("SELECT count(*) FROM ingress.uploads").await.ok()? == 0).then_some(());
    eventually("the upload's end is on record", LONG, ended).await
}

// A batch has not ended while an upload to it goes on, whatever became of the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_has_not_ended_before_its_last_upload() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1)).await?;
    let client = lab.client().clone();
    let (first, answer) = stream_to(&client, "/batches").await?;
    let batch = answer.headers()["location"].to_str()?.rsplit('/').next().context("no batch")?.to_owned();
    let (path, manifest) = (format!("/batches/{batch}"), format!("/fhir/_bulk/{batch}"));
    let (second, other) = stream_to(&client, &path).await?;
    first.send(Ok(line("a"))).await?;
    drop(first);
    assert_eq!(last(answer).await?["complete"], true);
    let done = async || (client.get(&path).await.ok()?.body["counts"]["succeeded"] == 1).then_some(());
    eventually("the first upload's job has ended", LONG, done).await?;
    let state = client.get(&path).await?.body;
    assert_eq!((&state["status"], &state["closed_at"]), (&json!("uploading"), &Value::Null), "{state}");
    assert_eq!(state["percent"], 99);
    assert_eq!(client.get(&manifest).await?.status, 202);
    second.send(Ok(line("b"))).await?;
    drop(second);
    assert_eq!(last(other).await?["complete"], true);
    assert_eq!(until_status(&client, &batch, "completed").await?["total"], 2);
    assert_eq!(client.get(&manifest).await?.status, 200);

    // Cut without a word since the other one reached its end: nothing of it is missing.
    let (silent, cut) = stream_to(&client, &path).await?;
    upload(&client, &path, NDJSON, line("c")).await?;
    assert_eq!(client.get(&path).await?.body["status"], "uploading");
    silent.send(Err(std::io::Error::other("cut"))).await?;
    drop((silent, cut));
    until_status(&client, &batch, "completed").await?;
    // Cut after a line that came later than the other's end: there may have been more.
    let heard = stream_to(&client, &path).await?;
    upload(&client, &path, NDJSON, line("c")).await?;
    cut_behind(&lab, heard, line("d")).await?;
    assert_eq!(client.get(&path).await?.body["status"], "uploading");
    // Not when the other one had brought that line, good or bad: it was cut before, and was heard late.
    for late in [line("e"), "{\"custom_id\":\"bad\",\"images\":[{\"data\":\"!\"}]}\n".to_owned()] {
        let heard = stream_to(&client, &path).await?;
        upload(&client, &path, NDJSON, late.clone()).await?;
        cut_behind(&lab, heard, late).await?;
        assert_ne!(client.get(&path).await?.body["closed_at"], Value::Null);
    }
    upload(&client, &path, NDJSON, line("bad")).await?;
    until_status(&client, &batch, "completed").await?;

    // One that was given up as dead and lives takes nobody's place when it ends.
    let (alive, answer) = stream_to(&client, &path).await?;
    lab.sql("UPDATE ingress.uploads SET seen_at = seen_at - interval '1 minute'").await?;
    let (other, unended) = stream_to(&client, &path).await?;
    drop(alive);
    assert_eq!(last(answer).await?["complete"], true);
    assert_eq!(client.get(&path).await?.body["status"], "uploading");
    drop(other);
    assert_eq!(last(unended).await?["complete"], true);
    until_status(&client, &batch, "completed").await?;

    // One that dies with its ingress is waited for as long as it might go on elsewhere.
    let dead = stream_to(&client, &path).await?;
    lab.kill_ingress(0).await?;
    lab.restart_ingress(0).await?;
    drop(dead);
    upload(&client, &path, NDJSON, line("d")).await?;
    assert_eq!(client.get(&path).await?.body["status"], "uploading");
    lab.sql("UPDATE ingress.uploads SET seen_at = seen_at - interval '1 minute'").await?;
    until_status(&client, &batch, "completed").await?;
    lab.stop().await
}

/// What an upload is answered that sends a line, and no more until the server ends it.
pub(crate) async fn until_ended(
    client: &Client,
    meanwhile: impl Future<Output = Result<()>>,
) -> Result<Vec<Value>> {
    let (sender, response) = stream_to(client, "/batches").await?;
    sender.send(Ok(line("l0"))).await?;
    meanwhile.await?;
    let text = tokio::time::timeout(LONG, response.text()).await??;
    drop(sender);
    text.lines().map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
}

/// That the server has ended an upload, and why.
pub(crate) fn assert_shut_out(answer: &[Value], code: &str) {
    let [first, line, last] = answer else { panic!("{answer:?}") };
    assert!(first["batch"].is_string() && line["job"].is_string(), "{answer:?}");
    assert_eq!((&last["accepted"], &last["complete"]), (&json!(1), &json!(false)));
    assert_eq!(last["error"]["code"], code, "{last}");
}

// An upload ends with the token that it came with, by whatever way that ends; what was accepted stays, and another token
// goes on.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_does_not_outlive_its_token() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (demo, gone) = (lab.client(), lab.register("gone").await?);
    let tokens = Tokens::open(&lab.signing_keys(), &lab.url(0))?;
    let [client, credential, _] = secret(&lab, "demo")?;
    let (client, credential, scope) =
        (client.parse()?, credential.parse()?, "system/DiagnosticReport.crds".to_owned());
    let grant = Grant { client, credential, scope, ends: None, after: None, bound_to: None };
    let left = Duration::from_secs(3);
    let age = (LIFETIME + Duration::from_secs(LEEWAY as u64)).saturating_sub(left);
    let begun = Instant::now();
    let old = tokens.issue(grant, clock::now() - age)?;
    // The server ends the connection of such an upload: no other request shall be about to use that.
    let connect = || anyhow::Ok(Client::new(&lab.ca(), &lab.url(0))?.with_token(old.expose_secret()));
    let answer = until_ended(&connect()?, async { Ok(()) }).await?;
    assert_shut_out(&answer, "unauthenticated");
    assert!(begun.elapsed() + Duration::from_secs(1) >= left, "{:?}", begun.elapsed());
    let (batch, path) = (id(&answer), format!("/batches/{}", id(&answer)));
    assert_eq!(connect()?.get(&path).await?.status, 401);
    assert_eq!(demo.get(&path).await?.body["total"], 1);
    let whole = line("l0") + &line("l1");
    let again = upload(demo, &path, NDJSON, whole).await?;
    assert_eq!((&again.last().context("no last line")?["accepted"], id(&again)), (&json!(2), batch));
    assert_eq!(of(&again, 1)["job"], answer[1]["job"]);

    let shut_out = async { lab.auth(&["user", "revoke", "gone"]).map(drop) };
    assert_shut_out(&until_ended(&gone, shut_out).await?, "unauthenticated");
    lab.stop().await
}

// What waits for room waits no longer than its upload may go on: a client that is shut out is told so at once, and one that
// deletes the batch, soon.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_waits_does_not_outlive_its_upload() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let gone = lab.register("gone").await?;
    one_job_at_a_time(&mut lab, "gone").await?;
    let (sender, response) = stream_to(&gone, "/batches").await?;
    sender.send(Ok(line("l0") + &line("l1"))).await?;
    drop(sender);
    let first = async || (lab.messages("JOBS").await.ok()? == 1).then_some(());
    eventually("the first line is in the queue", LONG, first).await?;
    let begun = Instant::now();
    lab.auth(&["user", "revoke", "gone"])?;
    let last = last(response).await?;
    assert_eq!(last["error"]["code"], "unauthenticated", "{last}");
    assert_eq!((&last["accepted"], &last["refused"]), (&json!(1), &json!(1)), "{last}");
    assert!(begun.elapsed() < UPLOAD_PATIENCE / 4, "{:?}", begun.elapsed());

    let (client, (sender, mut response)) = (lab.client(), stream_to(lab.client(), "/batches").await?);
    sender.send(Ok(line("l0"))).await?;
    let first = String::from_utf8(response.chunk().await?.context("no line")?.to_vec())?;
    let first: Value = serde_json::from_str(first.lines().next().context("no line")?)?;
    let path = format!("/batches/{}", first["batch"].as_str().context("no batch")?);
    assert_eq!(client.delete(&path).await?.status, 202);
    let last = self::last(response).await?;
    assert_eq!((&last["error"]["code"], &last["complete"]), (&json!("not-found"), &json!(false)), "{last}");
    drop(sender);
    lab.stop().await
}

// One client's uploads leave places for others', and one that ends makes room.
#[tokio::test(flavor = "multi_thread")]
async fn one_client_does_not_take_every_place_for_uploads() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (client, other) = (lab.client(), lab.register("other").await?);
    let open = async |client: &Client| {
        let endless = stream::pending::<Result<String, std::io::Error>>();
        let request = client.request(Method::POST, "/batches").header("content-type", NDJSON);
        Ok::<_, anyhow::Error>(request.body(reqwest::Body::wrap_stream(endless)).send().await?)
    };
    let mut uploads = Vec::new();
    for _ in 0..MAX_UPLOADS / 2 {
        uploads.push(open(client).await?);
    }
    assert!(uploads.iter().all(|upload| upload.status() == 200));
    let request = client.request(Method::POST, "/batches").header("content-type", NDJSON);
    let refused = send(request.body(line("one-more"))).await?;
    assert_eq!((refused.status, refused.code()), (429, "concurrency-exceeded"));
    assert!(!refused.header("retry-after").is_empty());
    assert_eq!(open(&other).await?.status(), 200);
    drop(uploads.pop());
    let taken = async || (open(client).await.ok()?.status() == 200).then_some(());
    eventually("an upload that ended makes room", LONG, taken).await?;
    lab.stop().await
}

// A line that was refused is mended by a later upload, and leaves the errors.
#[tokio::test(flavor = "multi_thread")]
async fn a_mended_line_leaves_the_errors() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let bad = "{\"custom_id\":\"a\",\"images\":[{\"data\":\"!\"}]}\n".to_owned();
    let batch = id(&upload(lab.client(), "/batches", NDJSON, bad).await?);
    until_status(lab.client(), &batch, "completed-with-errors").await?;
    upload(lab.client(), &format!("/batches/{batch}"), NDJSON, line("a")).await?;
    let state = until_status(lab.client(), &batch, "completed").await?;
    assert_eq!(state["refused"], 0);
    assert_eq!(lab.client().get(&format!("/batches/{batch}/errors")).await?.text, "");
    lab.stop().await
}

// A batch is not completed when not one of its lines was taken, and each of them is among its errors once, however often
// it is sent. They are mended by name.
#[tokio::test(flavor = "multi_thread")]
async fn every_refused_line_is_among_the_errors() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let client = lab.client();
    let of_model = |custom_id: &str| {
        let image = json!({"data": STANDARD.encode(sample_bytes("isic2017-nv.jpg"))});
        json!({"custom_id": custom_id, "images": [image], "model": "derm8"}).to_string() + "\n"
    };
    let body: String = ["a", "b", "c"].map(of_model).concat();
    let answer = upload(client, "/batches", NDJSON, body.clone()).await?;
    assert_eq!(answer.last().context("no last line")?["refused"], 3, "{answer:?}");
    let batch = id(&answer);
    let path = format!("/batches/{batch}");
    let refused = async |names: &[&str], code: &str| {
        let state = until_status(client, &batch, "completed-with-errors").await?;
        assert_eq!(state["refused"], json!(names.len()), "{state}");
        let mut errors = lines(&client.get(&format!("{path}/errors")).await?)?;
        errors.sort_by_key(|error| error["line"].as_u64());
        let found: Vec<&str> = errors.iter().filter_map(|error| error["custom_id"].as_str()).collect();
        assert_eq!(found, names, "{errors:?}");
        assert!(errors.iter().all(|error| error["error"]["code"] == code), "{errors:?}");
        anyhow::Ok(())
    };
    refused(&["a", "b", "c"], "model-unknown").await?;
    upload(client, &path, NDJSON, body).await?;
    refused(&["a", "b", "c"], "model-unknown").await?;
    upload(client, &path, NDJSON, line("b")).await?;
    refused(&["a", "c"], "model-unknown").await?;
    upload(client, &path, NDJSON, line("a") + &line("c")).await?;
    assert_eq!(until_status(client, &batch, "completed").await?["refused"], 0);

    // What has no name, or not the first line of it, goes by its number; a name goes with its first line, good or bad.
    let bad = "{\"custom_id\":\"bad\",\"images\":[{\"data\":\"!\"}]}\n";
    let body = format!("{}{}{bad}{}{{\n{bad}", line("first"), line("first"), line("bad"));
    for path in ["/batches".to_owned(), path.clone(), path] {
        let answer = upload(client, &path, NDJSON, body.clone()).await?;
        let batch = id(&answer);
        let state = until_status(client, &batch, "completed-with-errors").await?;
        assert_eq!(state["refused"], 5, "{state}");
        let errors = lines(&client.get(&format!("/batches/{batch}/errors")).await?)?;
        let error = |number| (&of(&errors, number)["custom_id"], &of(&errors, number)["error"]["code"]);
        let (none, repeated) = (Value::Null, json!("custom-id-repeated"));
        assert_eq!((error(2), error(4)), ((&none, &repeated), (&none, &repeated)), "{errors:?}");
        assert_eq!(error(3), (&json!("bad"), &json!("image-not-base64")), "{errors:?}");
        assert_eq!(error(5), (&none, &json!("json-malformed")), "{errors:?}");
        assert_eq!(error(6), (&none, &json!("image-not-base64")), "{errors:?}");
    }
    lab.stop().await
}

// The deadline of an upload is that of each of its lines, and of no other upload's.
#[tokio::test(flavor = "multi_thread")]
async fn the_lines_of_an_upload_have_its_deadline() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let client = lab.client();
    let request = |path: &str, cancel_after: &str| {
        let request = client.request(Method::POST, path).header("content-type", NDJSON);
        request.header("cancel-after", cancel_after)
    };
    let body = line("a") + &line("b");
    let answer = lines(&send(request("/batches", "5s").body(body)).await?)?;
    assert_eq!(answer.last().context("no last line")?["accepted"], 2, "{answer:?}");
    let batch = id(&answer);
    let path = format!("/batches/{batch}");
    for (path, bad) in [("/batches", "4"), (&path, "5x")] {
        let refused = send(request(path, bad).body("")).await?;
        assert_eq!((refused.status, refused.code()), (400, "header-invalid"), "{bad}");
    }
    upload(client, &path, NDJSON, line("c")).await?;
    let failed = async || {
        let counts = client.get(&path).await.ok()?.body["counts"].take();
        (counts["failed"] == 2).then_some(counts)
    };
    let counts = eventually("the deadlines are over", LONG, failed).await?;
    assert_eq!(counts["queued"], 1, "{counts}");
    let errors = lines(&client.get(&format!("{path}/errors")).await?)?;
    let names: HashSet<&str> = errors.iter().filter_map(|error| error["custom_id"].as_str()).collect();
    assert_eq!(names, HashSet::from(["a", "b"]));
    assert!(errors.iter().all(|error| error["error"]["code"] == "deadline-exceeded"), "{errors:?}");

    let answer = lines(&send(request(&path, "5s").body(line("d"))).await?)?;
    let job = answer[1]["job"].as_str().context("no job")?;
    let ended = client.poll(job, LONG).await?;
    assert_eq!((ended.status, ended.code()), (504, "deadline-exceeded"));
    lab.stop().await
}

// A line's deadline counts from when there was room for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_waits_has_its_whole_deadline() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    one_job_at_a_time(&mut lab, "demo").await?;
    let request = lab.client().request(Method::POST, "/batches").header("content-type", NDJSON);
    let request = request.header("cancel-after", "5s").body(line("a") + &line("b"));
    let answer = lines(&send(request).await?)?;
    // There is room for the second when the first one's time is over.
    assert_eq!(answer.last().context("no last line")?["accepted"], 2, "{answer:?}");
    let late = "SELECT count(*) FROM ingress.jobs WHERE deadline <> accepted_at + interval '5s' OR queued_at > deadline";
    assert_eq!(lab.count(late).await?, 0);
    lab.stop().await
}

// Deleted: what waits leaves the queue, results are removed, and nothing of it is found any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_batch_leaves_nothing() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let body: String = (0..40).map(|n| line(&format!("l{n}"))).collect();
    let answer = upload(lab.client(), "/batches", NDJSON, body).await?;
    let (batch, job) = (id(&answer), of(&answer, 7)["job"].as_str().context("no job")?.to_owned());
    let stranger = lab.register("stranger").await?;
    for path in
        [format!("/batches/{batch}"), format!("/batches/{batch}/results"), format!("/fhir/_bulk/{batch}")]
    {
        assert_eq!(stranger.get(&path).await?.status, 404, "{path}");
    }
    assert_eq!(stranger.delete(&format!("/batches/{batch}")).await?.status, 404);
    assert_eq!(lab.client().delete(&format!("/batches/{batch}")).await?.status, 202);
    assert_eq!(lab.client().get(&format!("/batches/{batch}")).await?.status, 404);
    let emptied = async || (lab.messages("JOBS").await.ok()? == 0).then_some(());
    eventually("the queue is empty", LONG, emptied).await?;
    assert_eq!(lab.client().get(&format!("/fhir/_async/{job}")).await?.status, 404);
    assert_eq!(lab.client().delete(&format!("/batches/{batch}")).await?.status, 404);

    lab.start_worker(Worker::simulated(1)).await?;
    let answer = upload(lab.client(), "/batches", NDJSON, line("a")).await?;
    until_status(lab.client(), &id(&answer), "completed").await?;
    lab.client().delete(&format!("/batches/{}", id(&answer))).await?;
    let erased = async || (lab.count("SELECT count(*) FROM ingress.reports").await.ok()? == 0).then_some(());
    eventually("the report is erased", LONG, erased).await?;
    let open = lab.count("SELECT sum(jobs)::bigint + sum(bytes)::bigint FROM ingress.loads").await?;
    assert_eq!(open, 0, "the client's load is given back");
    lab.stop().await
}

// Results are read while they come: a reader with a cursor and a wait sees each exactly once, in order.
#[tokio::test(flavor = "multi_thread")]
async fn results_are_read_while_they_grow() -> Result<()> {
    const LINES: usize = 120;
    let lab = Lab::start(Setup { workers: vec![Worker::simulated(15); 2], ..Setup::default() }).await?;
    let client = lab.client();
    let body: String = (0..LINES).map(|n| line(&format!("l{n}"))).collect();
    let answer = upload(client, "/batches", NDJSON, body).await?;
    let (batch, mut cursor, mut read, mut reads) = (id(&answer), 0, Vec::new(), 0);
    let begun = Instant::now();
    while read.len() < LINES {
        ensure!(begun.elapsed() < LONG, "{} of {LINES}", read.len());
        let answer = client.get(&format!("/batches/{batch}/results?cursor={cursor}&wait=10")).await?;
        for line in lines(&answer)? {
            let next = line["cursor"].as_i64().context("no cursor")?;
            ensure!(next > cursor, "{next} after {cursor}");
            cursor = next;
            read.push(line["custom_id"].to_string());
        }
        reads += 1;
    }
    ensure!(reads > 1, "the results were not read while they came");
    assert_eq!(read.iter().collect::<HashSet<_>>().len(), LINES);
    lab.stop().await
}

// While a batch runs, it tells how fast, and when it will have ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_tells_how_fast_it_is_and_when_it_ends() -> Result<()> {
    const LINES: usize = 80;
    let lab = Lab::start(Setup::simulated(50)).await?;
    let client = lab.client();
    let body: String = (0..LINES).map(|n| line(&format!("l{n}"))).collect();
    let batch = id(&upload(client, "/batches", NDJSON, body).await?);
    let running = async || {
        let asked = clock::now();
        let state = client.get(&format!("/batches/{batch}")).await.ok()?.body;
        (state["counts"]["succeeded"].as_u64()? >= 5).then_some((asked, state))
    };
    let (asked, state) = eventually("some have ended", LONG, running).await?;
    ensure!(state["status"] == "in-progress", "they ended before they were looked at: {state}");
    ensure!(state["rate"].as_f64().context("no rate")? > 0.0, "{state}");
    let end = OffsetDateTime::parse(state["estimated_end"].as_str().context("no end")?, &Rfc3339)?;
    ensure!(end > asked, "asked at {asked}: {state}");
    let state = until_status(client, &batch, "completed").await?;
    assert_eq!(state["estimated_end"], Value::Null, "{state}");
    lab.stop().await
}

// A client over its quota gets a 429 that says when to come back, others do not notice; an upload waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_exact_and_concerns_one_client() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    lab.auth(&["user", "quota", "demo", "--jobs", "5"])?;
    let (client, other) = (lab.client().clone(), lab.register("other").await?);
    let second = client.clone().at(&lab.url(1));
    // A replica knows the quotas before its first request.
    for n in 0..2 {
        lab.stop_ingress(n).await?;
        lab.restart_ingress(n).await?;
    }
    let order = sample("isic2017-nv.jpg");
    let submit = |n: usize| {
        let (client, order) =
            (if n.is_multiple_of(2) { client.clone() } else { second.clone() }, order.clone());
        async move { client.analyze(&order, &[("prefer", "respond-async")]).await }
    };
    let answers: Vec<_> = stream::iter(0..20).map(submit).buffer_unordered(20).collect().await;
    let answers = answers.into_iter().collect::<Result<Vec<_>>>()?;
    assert_eq!(answers.iter().filter(|answer| answer.status == 202).count(), 5);
    let refused = answers.iter().find(|answer| answer.status == 429).context("nobody was refused")?;
    assert_eq!((refused.code(), refused.header("retry-after")), ("quota-exceeded", "30"), "{}", refused.text);
    assert_eq!(other.analyze(&order, &[("prefer", "respond-async")]).await?.status, 202);
    // Single requests are refused; an upload waits until there is room.
    let body: String = (0..8).map(|n| line(&format!("l{n}"))).collect();
    let uploading = tokio::spawn(async move { upload(&client, "/batches", NDJSON, body).await });
    lab.start_worker(Worker::simulated(1)).await?;
    let answer = uploading.await??;
    assert_eq!(answer.last().context("no last line")?["accepted"], 8, "{answer:?}");
    until_status(lab.client(), &id(&answer), "completed").await?;
    lab.stop().await
}

// The list of jobs: own ones only, by state, time and batch, in pages that do not shift.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_listed_in_pages_that_do_not_shift() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let (client, stranger) = (lab.client(), lab.register("stranger").await?);
    let body: String = (0..7).map(|n| line(&format!("l{n}"))).collect();
    let answer = upload(client, "/batches", NDJSON, body).await?;
    let batch = id(&answer);
    until_status(client, &batch, "completed").await?;
    let mut url = format!("/jobs?batch={batch}&status=succeeded,failed&limit=3");
    let (mut seen, mut pages) = (Vec::new(), 0);
    loop {
        let page = client.get(&url).await?;
        assert_eq!(page.status, 200, "{}", page.text);
        seen.extend(page.body["jobs"].as_array().context("no jobs")?.iter().map(|job| job["id"].to_string()));
        pages += 1;
        client.analyze(&sample("isic2017-nv.jpg"), &[]).await?;
        match page.body["next"].as_str() {
            Some(next) => next.clone_into(&mut url),
            None => break,
        }
    }
    assert_eq!((pages, seen.len(), seen.iter().collect::<HashSet<_>>().len()), (3, 7, 7));
    assert!(seen.is_sorted_by(|a, b| a > b), "the latest first");
    assert_eq!(stranger.get("/jobs").await?.body, json!({"jobs": [], "next": null}));
    let later = client.get("/jobs?created_after=2099-01-01T00:00:00Z").await?;
    assert_eq!(later.body["jobs"], json!([]));
    for bad in [
        "status=done",
        "colour=red",
        "cursor=x",
        "created_after=today",
        "created_after=9999-12-31T23:59:59-01:00",
    ] {
        let refused = client.get(&format!("/jobs?{bad}")).await?;
        assert_eq!((refused.status, refused.code()), (400, "query-invalid"), "{bad}");
    }
    let completed = "status=http://hl7.org/fhir/task-status|completed";
    let search = client
        .get(&format!("/fhir/Task?{completed}&authored-on=gt2020-01-01&_sort=-authored-on&_count=2"))
        .await?;
    assert_eq!(search.body["entry"].as_array().map(Vec::len), Some(2), "{}", search.text);
    for (dates, found) in [("2020-01-01", 0), ("le2020-01-01", 0), ("ge2020-01-01&authored-on=lt2099", 10)] {
        let search = client.get(&format!("/fhir/Task?authored-on={dates}")).await?;
        assert_eq!(search.body["entry"].as_array().map_or(0, Vec::len), found, "{dates}: {}", search.text);
    }
    for bad in ["status=ready&status=completed", "status=https://other.example|completed"] {
        assert_eq!(client.get(&format!("/fhir/Task?{bad}")).await?.code(), "query-invalid", "{bad}");
    }
    let next = search.body["link"][1]["url"].as_str().context("no next page")?;
    let second = client.get(next).await?;
    assert_ne!(search.body["entry"][0]["fullUrl"], second.body["entry"][0]["fullUrl"]);
    let task = client.get(&format!("/fhir/Task/{}", seen[0].trim_matches('"'))).await?;
    assert_eq!((task.status, &task.body["status"]), (200, &json!("completed")));
    assert_eq!(client.get("/fhir/Task?colour=red").await?.code(), "query-invalid");
    let documents = [search, second, task].map(|answer| ("Task".to_owned(), answer.body));
    validate(&documents).await?;
    lab.stop().await
}

// Who waits for the entries of a batch has as many places as entries, of those that one client may have.
#[tokio::test(flavor = "multi_thread")]
async fn a_fhir_batch_waits_as_many_callers_do() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let request = json!({"method": "POST", "url": "DiagnosticReport/$analyze"});
    let entry = json!({"resource": sample("isic2017-nv.jpg"), "request": request});
    let bundle = json!({"resourceType": "Bundle", "type": "batch", "entry": vec![entry; MAX_BUNDLE_ENTRIES]})
        .to_string();
    let post = |client: &Client| {
        let kind = ("content-type", "application/fhir+json");
        let request = client.request(Method::POST, "/fhir").header(kind.0, kind.1).header("accept", kind.1);
        send(request.body(bundle.clone()))
    };
    let waiting: Vec<_> =
        (0..MAX_WAITERS / 2 / MAX_BUNDLE_ENTRIES).map(|_| tokio::spawn(post(lab.client()))).collect();
    let jobs = waiting.len() * MAX_BUNDLE_ENTRIES;
    let queued = "SELECT count(*) FROM ingress.jobs WHERE state = 'queued'";
    let queued = async || (lab.count(queued).await.ok()? == jobs as i64).then_some(());
    eventually("every entry is queued", LONG, queued).await?;
    let refused = post(lab.client()).await?;
    assert_eq!((refused.status, refused.code()), (429, "concurrency-exceeded"), "{}", refused.text);
    lab.start_worker(Worker::simulated(1)).await?;
    for answer in waiting {
        let answer = answer.await??;
        assert!(
            (answer.body["entry"].as_array().context(answer.text.clone())?.iter())
                .all(|entry| entry["response"]["status"] == "200")
        );
    }
    lab.stop().await
}

// A FHIR batch: every entry is answered by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_fhir_batch_is_answered_entry_by_entry() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let request = json!({"method": "POST", "url": "DiagnosticReport/$analyze"});
    let mut bad = sample("ham10000-nv.jpg");
    bad["parameter"][0]["part"][0]["valueAttachment"]["data"] = json!("!");
    let entry = |resource: Value| json!({"resource": resource, "request": request});
    let entries = [sample("ham10000-mel.jpg"), bad, sample("ham10000-nv.jpg")].map(entry);
    let bundle = json!({"resourceType": "Bundle", "type": "batch", "entry": entries});
    let send_bundle = async |bundle: &Value, prefer: &str| {
        let request =
            lab.client().request(Method::POST, "/fhir").header("content-type", "application/fhir+json");
        send(request.header("prefer", prefer).body(bundle.to_string())).await
    };
    let answer = send_bundle(&bundle, "wait=30").await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let statuses: Vec<&Value> = (0..3).map(|n| &answer.body["entry"][n]["response"]["status"]).collect();
    assert_eq!(statuses, [&json!("200"), &json!("422"), &json!("200")], "{}", answer.text);
    let outcome = &answer.body["entry"][1]["response"]["outcome"]["issue"][0];
    assert_eq!(
        outcome["expression"][0],
        "Bundle.entry[1].resource.parameter[0].part[0].valueAttachment.data"
    );
    let later = send_bundle(&bundle, "respond-async").await?;
    assert_eq!(later.body["entry"][0]["response"]["status"], "202", "{}", later.text);
    let location = later.body["entry"][0]["response"]["location"].as_str().context("no location")?;
    let job = location.rsplit('/').next().context("no job")?;
    assert_eq!(lab.client().poll(job, LONG).await?.status, 200);
    let documents = [("answer".to_owned(), answer.body), ("later".to_owned(), later.body)];
    validate(&documents).await?;
    let mut transaction = bundle.clone();
    transaction["type"] = json!("transaction");
    let refused = send_bundle(&transaction, "wait=1").await?;
    assert_eq!((refused.status, refused.code()), (422, "value-invalid"), "{}", refused.text);
    assert_eq!(refused.faults()[0].1, "Bundle.type");
    lab.stop().await
}

// A caller's own deadline ends its job, and the place in the queue is told until then.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_after_its_callers_deadline() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let order = sample("isic2017-nv.jpg");
    let headers = [("prefer", "respond-async"), ("cancel-after", "5s")];
    let first = lab.client().submit(&order).await?;
    let second = lab.client().analyze(&order, &headers).await?.job().to_owned();
    let told = async || {
        let answer = lab.client().get(&format!("/fhir/_async/{second}")).await.ok()?;
        (answer.header("x-progress") == "queued, position 2").then_some(())
    };
    eventually("the job's place is told", LONG, told).await?;
    let record = lab.client().get(&format!("/jobs/{first}")).await?;
    assert_eq!(record.body["queue"]["position"], 1, "{}", record.text);
    let ended = lab.client().poll(&second, LONG).await?;
    assert_eq!((ended.status, ended.code()), (504, "deadline-exceeded"));
    for bad in ["4", "5x", "-1", ""] {
        let refused = lab.client().analyze(&order, &[("cancel-after", bad)]).await?;
        assert_eq!((refused.status, refused.code()), (400, "header-invalid"), "{bad}");
    }
    lab.stop().await
}
