//! How long reports are kept, by client: nothing after the answer, some days, and what a change does.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_tests::{
    client::{Answer, Client, parameters, sample, sample_bytes, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    api::noise,
    dead::{deadly, until_given_up},
};

const LONG: Duration = Duration::from_mins(1);
const REPORTS: &str = "SELECT count(*) FROM ingress.reports";

// Sets the client's quota; replicas know it before their first request.
async fn keep(lab: &mut Lab, days: &str) -> Result<()> {
    let replicas = lab.pids().iter().filter(|(name, _)| name.starts_with("ingress")).count();
    lab.auth(&["user", "quota", "demo", "--retention-days", days])?;
    for n in 0..replicas {
        lab.kill_ingress(n).await?;
        lab.restart_ingress(n).await?;
    }
    Ok(())
}

// A request about a patient.
fn order() -> Value {
    let mut order = sample("ham10000-mel.jpg");
    let subject = json!({"name": "subject", "valueReference": {"reference": "Patient/ada"}});
    if let Some(list) = order["parameter"].as_array_mut() {
        list.push(subject);
    }
    order
}

// Whatever there could be of a report, an image or a patient, in PostgreSQL and at the broker.
async fn left(lab: &Lab) -> Result<Vec<(String, u64)>> {
    let mut left = Vec::new();
    for what in ["reports", "report_tokens", "batch_refusals", "jobs WHERE search IS NOT NULL"] {
        left.push((
            what.to_owned(),
            lab.count(&format!("SELECT count(*) FROM ingress.{what}")).await? as u64,
        ));
    }
    for stream in ["JOBS", "RETRIES", "RESULTS", "DEAD"] {
        left.push((stream.to_owned(), lab.messages(stream).await?));
    }
    left.push(("objects".to_owned(), lab.object_count().await? as u64));
    left.retain(|(_, count)| *count > 0);
    Ok(left)
}

async fn until_nothing_is_left(lab: &Lab) -> Result<()> {
    let nothing = async || left(lab).await.ok()?.is_empty().then_some(());
    if let Err(error) = eventually("nothing is left", LONG, nothing).await {
        bail!("{error}: {:?}", left(lab).await?);
    }
    Ok(())
}

async fn is_removed(client: &Client, job: &str) -> Result<()> {
    for path in [format!("/fhir/DiagnosticReport/{job}"), format!("/fhir/_async/{job}")] {
        let answer = client.get(&path).await?;
        ensure!((answer.status, answer.code()) == (404, "report-removed"), "{path}: {}", answer.text);
        ensure!(answer.body["issue"][0]["code"] == "deleted", "{}", answer.text);
    }
    let record = client.get(&format!("/jobs/{job}")).await?.body;
    ensure!(record["status"] == "succeeded" && record["links"]["report"].is_null(), "{record}");
    ensure!(record["removed_at"].is_string(), "{record}");
    let task = client.get(&format!("/fhir/Task/{job}")).await?.body;
    ensure!(task["status"] == "completed" && task["output"].is_null(), "{task}");
    let found = client.get(&format!("/fhir/DiagnosticReport?_id={job}")).await?;
    ensure!(found.status == 200 && found.body["entry"].is_null(), "{}", found.text);
    Ok(())
}

// With 0 days a synchronous answer leaves nothing behind: not when it arrives, and not at the broker. Whichever way it
// is asked for, heat maps and claim-checked payloads included.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_kept_after_a_synchronous_answer() -> Result<()> {
    let mut lab = Lab::start(Setup::derm7()).await?;
    keep(&mut lab, "0").await?;
    let client = lab.client();
    let mut with_maps = order();
    if let Some(list) = with_maps["parameter"].as_array_mut() {
        list.push(json!({"name": "heatMap", "valueCode": "top-1"}));
    }
    let answer = client.analyze(&with_maps, &[]).await?;
    ensure!(answer.status == 200 && answer.text.contains("image/png"), "{}", answer.text);
    assert_eq!(lab.count(REPORTS).await?, 0, "when the answer is there, the report is not");
    is_removed(client, answer.job()).await?;
    let mut parts = client.request(Method::POST, "/fhir").header("content-type", "application/fhir+json");
    let entry =
        json!({"resource": order(), "request": {"method": "POST", "url": "DiagnosticReport/$analyze"}});
    parts = parts.body(json!({"resourceType": "Bundle", "type": "batch", "entry": [entry]}).to_string());
    let bundle = send(parts).await?;
    assert_eq!(bundle.body["entry"][0]["response"]["status"], "200", "{}", bundle.text);
    assert_eq!(lab.count(REPORTS).await?, 0);
    let case = STANDARD.encode(sample_bytes("pad-ufes-nv.jpg"));
    let case = json!({"payload": [{"contentAttachment": {"data": case}}]}).to_string();
    let request =
        client.request(Method::POST, "/diagnosis-support").header("content-type", "application/json");
    assert_eq!(send(request.body(case)).await?.status, 200);
    assert_eq!(lab.count(REPORTS).await?, 0);
    until_nothing_is_left(&lab).await?;
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs WHERE state = 'succeeded'").await?, 3);
    let told = "SELECT sum((detail->>'jobs')::bigint)::bigint FROM auth.audit WHERE action = 'reports-removed' \
                AND client IS NOT NULL AND actor = 'ingress'";
    assert_eq!(lab.count(told).await?, 3);
    assert_eq!(lab.count("SELECT sum(jobs)::bigint FROM ingress.usage").await?, 3, "it is billed");
    lab.stop().await
}

// With 0 days who can ask again gets the report for two minutes after the first time, from every replica; that it was
// given outlives a kill right after the answer, and whoever sweeps then removes it.
#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_is_polled_goes_a_while_after_its_first_answer() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::simulated(1) }).await?;
    keep(&mut lab, "0").await?;
    let (first, second) = (lab.client().clone(), lab.client().clone().at(&lab.url(1)));
    let headers = [("prefer", "respond-async"), ("idempotency-key", "k")];
    let polled = first.analyze(&order(), &headers).await?.job().to_owned();
    let read = first.submit(&sample("isic2017-nv.jpg")).await?;
    let unread = first.submit(&sample("isic2017-nv.jpg")).await?;
    for job in [&polled, &read, &unread] {
        lab.until_state(job, "succeeded").await?;
    }
    let path = format!("/fhir/_async/{polled}");
    let answered = "SELECT count(*) FROM ingress.jobs WHERE answered_at IS NOT NULL";
    assert_eq!(send(first.request(Method::HEAD, &path)).await?.status, 200);
    assert_eq!(lab.count(answered).await?, 0, "nothing was handed out");
    let given = first.poll(&polled, LONG).await?;
    for again in [second.get(&path).await?, second.analyze(&order(), &headers).await?] {
        assert_eq!((again.status, &again.text), (200, &given.text));
        assert_eq!(again.header("expires"), given.header("expires"));
    }
    assert_eq!(second.get(&format!("/fhir/DiagnosticReport/{read}")).await?.status, 200);
    assert_eq!(lab.count(answered).await?, 2);
    for n in 0..2 {
        lab.kill_ingress(n).await?;
    }
    lab.sql("UPDATE ingress.jobs SET answered_at = answered_at - interval '2 minutes'").await?;
    lab.restart_ingress(1).await?;
    let removed = async || (lab.count(REPORTS).await.ok()? == 1).then_some(());
    eventually("both are removed", LONG, removed).await?;
    lab.restart_ingress(0).await?;
    for job in [&polled, &read] {
        is_removed(&first, job).await?;
    }
    // The same request is the same job, which has no report; another one under its key is a mistake.
    let again = second.analyze(&order(), &headers).await?;
    assert_eq!(
        (again.status, again.code(), again.job()),
        (404, "report-removed", &*polled),
        "{}",
        again.text
    );
    let other = second.analyze(&sample("isic2017-nv.jpg"), &headers).await?;
    assert_eq!((other.status, other.code()), (422, "idempotency-conflict"));
    assert_eq!(first.delete(&path).await?.status, 404);

    // Nobody has asked for the third one: it goes with its record, a day after its end.
    lab.sql("UPDATE ingress.jobs SET finished_at = finished_at - interval '23 hours'").await?;
    lab.sql(&format!(
        "UPDATE ingress.jobs SET finished_at = finished_at - interval '1 hour' WHERE id <> '{unread}'"
    ))
    .await?;
    let records = "SELECT count(*) FROM ingress.jobs";
    let erased = async || (lab.count(records).await.ok()? == 1).then_some(());
    eventually("the others are erased", LONG, erased).await?;
    assert_eq!(lab.count(REPORTS).await?, 1);
    lab.sql("UPDATE ingress.jobs SET finished_at = finished_at - interval '1 hour'").await?;
    let erased = async || (lab.count(records).await.ok()? == 0).then_some(());
    eventually("it is erased", LONG, erased).await?;
    until_nothing_is_left(&lab).await?;
    assert_eq!(first.get(&format!("/fhir/_async/{unread}")).await?.code(), "not-found");
    assert_eq!(second.analyze(&order(), &headers).await?.status, 202, "the key is free");
    lab.stop().await
}

fn lines(answer: &Answer) -> Result<Vec<Value>> {
    answer.text.lines().map(|line| serde_json::from_str(line).context(line.to_owned())).collect()
}

// A batch's reports go a while after they were read; their lines stay where they were, and say so.
#[tokio::test(flavor = "multi_thread")]
async fn lines_of_a_batch_say_that_their_reports_are_removed() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1)).await?;
    keep(&mut lab, "0").await?;
    let client = lab.client();
    let image = json!({"data": STANDARD.encode(sample_bytes("isic2017-nv.jpg"))});
    let body: String = (0..4)
        .map(|n| json!({"custom_id": format!("l{n}"), "images": [image], "subject": "ada"}))
        .map(|line| line.to_string() + "\n")
        .collect();
    let upload = client.request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let batch = lines(&send(upload.body(body.clone())).await?)?[0]["batch"].clone();
    let batch = format!("/batches/{}", batch.as_str().context("no batch")?);
    let completed = async || (client.get(&batch).await.ok()?.body["status"] == "completed").then_some(());
    eventually("the batch ends", LONG, completed).await?;
    let results = format!("{batch}/results");
    let two = lines(&client.get(&format!("{results}?limit=2")).await?)?;
    assert_eq!(two.len(), 2);
    ensure!(two.iter().all(|line| line["report"]["id"] == line["job"]), "{two:?}");
    lab.sql("UPDATE ingress.jobs SET answered_at = answered_at - interval '2 minutes'").await?;
    let removed = async || (lab.count(REPORTS).await.ok()? == 2).then_some(());
    eventually("what was read is removed", LONG, removed).await?;
    let all = lines(&client.get(&results).await?)?;
    let told =
        |line: &Value| (line["cursor"].clone(), line["report"].is_null(), line["error"]["code"].clone());
    assert_eq!(all.len(), 4);
    for (line, before) in all.iter().zip(&two) {
        assert_eq!(told(line), (before["cursor"].clone(), true, json!("report-removed")));
    }
    ensure!(all[2..].iter().all(|line| line["report"]["id"] == line["job"]), "{all:?}");
    let rest = lines(&client.get(&format!("{results}?cursor={}", two[1]["cursor"])).await?)?;
    assert_eq!(rest, all[2..], "from where the reader was");
    lab.sql("UPDATE ingress.jobs SET answered_at = answered_at - interval '2 minutes'").await?;
    until_nothing_is_left(&lab).await?;
    // The lines sent again are the same jobs.
    let again = client.request(Method::POST, &batch).header("content-type", "application/x-ndjson");
    let again = lines(&send(again.body(body)).await?)?;
    let job = |lines: &[Value]| {
        let mut jobs: Vec<String> =
            lines.iter().filter_map(|line| line["job"].as_str()).map(str::to_owned).collect();
        jobs.sort();
        jobs
    };
    assert_eq!(job(&again), job(&all));
    lab.sql("UPDATE ingress.jobs SET finished_at = finished_at - interval '1 day'").await?;
    lab.sql("UPDATE ingress.batches SET created_at = created_at - interval '1 day'").await?;
    let gone = "SELECT (SELECT count(*) FROM ingress.jobs) + (SELECT count(*) FROM ingress.batches) \
                + (SELECT count(*) FROM ingress.idempotency_keys)";
    let gone = async || (lab.count(gone).await.ok()? == 0).then_some(());
    eventually("the batch is erased", LONG, gone).await?;
    assert_eq!(client.get(&batch).await?.status, 404);
    lab.stop().await
}

// The number that staff sets, as it is seen and taken back; with more days than usual reports stay, with fewer those go
// that are stored already, and no other client notices.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_true_for_what_is_stored() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let (client, other) = (lab.client(), lab.register("other").await?);
    let of = |name: &str| {
        format!(
            "SELECT count(*) FROM ingress.reports JOIN ingress.jobs ON id = job \
                 WHERE client = (SELECT id FROM auth.users WHERE username = '{name}')"
        )
    };
    let job = client.analyze(&order(), &[]).await?.job().to_owned();
    assert_eq!(other.analyze(&order(), &[]).await?.status, 200);
    let quota = |args: &[&str]| lab.auth(&[&["user", "quota", "demo"][..], args].concat());
    for bad in ["366", "-1", "1.5", "week"] {
        assert!(quota(&[format!("--retention-days={bad}").as_str()]).is_err(), "{bad}");
    }
    let shown = || -> Result<Value> {
        let shown: Value = serde_json::from_str(&lab.auth(&["user", "show", "demo", "--json"])?)?;
        Ok(shown["quota"]["retention_days"].clone())
    };
    assert_eq!(shown()?, 7);
    quota(&["--retention-days", "30"])?;
    assert_eq!(shown()?, 30);
    lab.sql("UPDATE ingress.jobs SET finished_at = finished_at - interval '8 days'").await?;
    let erased = async || (lab.count(&of("other")).await.ok()? == 0).then_some(());
    eventually("the other's is erased after a week", LONG, erased).await?;
    assert_eq!(client.get(&format!("/fhir/DiagnosticReport/{job}")).await?.status, 200);
    assert_eq!(other.analyze(&order(), &[]).await?.status, 200);

    quota(&["--retention-days", "9"])?;
    lab.sql("UPDATE ingress.jobs SET finished_at = finished_at - interval '23 hours'").await?;
    // What is erased of somebody else shows that a round went by.
    let witness = lab.register("witness").await?;
    assert_eq!(witness.analyze(&order(), &[]).await?.status, 200);
    lab.auth(&["user", "quota", "witness", "--retention-days", "1"])?;
    lab.sql(
        "UPDATE ingress.jobs SET finished_at = finished_at - interval '1 day' \
             WHERE client = (SELECT id FROM auth.users WHERE username = 'witness')",
    )
    .await?;
    let erased = async || (lab.count(&of("witness")).await.ok()? == 0).then_some(());
    eventually("the witness's is erased after a day", LONG, erased).await?;
    assert_eq!(lab.count(&of("demo")).await?, 1, "eight days and 23 hours");
    quota(&["--retention-days", "default"])?;
    assert_eq!(shown()?, 7);
    let erased = async || (lab.count(&of("demo")).await.ok()? == 0).then_some(());
    eventually("it is erased by the next round", LONG, erased).await?;
    assert_eq!(lab.count(&of("other")).await?, 1);
    assert_eq!(client.get(&format!("/fhir/DiagnosticReport/{job}")).await?.code(), "not-found");
    let recorded = "SELECT count(*) FROM auth.audit WHERE action = 'user-changed' \
                    AND detail->'quota' = '{\"retention_days\": 30}'";
    assert_eq!(lab.count(recorded).await?, 1);
    lab.stop().await
}

// Dead letters go with the reports of their client; with 0 days as soon as the failure is on record, claim check and all.
// Another client's letter stays.
#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_kept_no_longer_than_reports() -> Result<()> {
    let mut lab = deadly().await?;
    let operator = lab.start_operate("olga").await?;
    lab.auth(&["user", "quota", "demo", "--retention-days", "0"])?;
    let other = lab.register("other").await?;
    let kept = other.submit(&sample("isic2017-nv.jpg")).await?;
    until_given_up(&mut lab, 0, std::slice::from_ref(&kept)).await?;
    // Too large for a message.
    let job = lab.client().submit(&parameters(&[noise(1), noise(2), noise(3)])).await?;
    until_given_up(&mut lab, 0, std::slice::from_ref(&job)).await?;
    let one = async || (lab.messages("DEAD").await.ok()? == 1).then_some(());
    eventually("its letter is removed", LONG, one).await?;
    let no_payload = async || (lab.object_count().await.ok()? == 0).then_some(());
    eventually("its payload is removed", LONG, no_payload).await?;
    let letters = operator.get("/dead").await?.body;
    assert_eq!(letters["dead"][0]["job"], json!(kept), "{letters}");
    let answer = lab.client().get(&format!("/fhir/_async/{job}")).await?;
    assert_eq!(answer.code(), "attempts-exhausted", "{}", answer.text);
    let told = format!(
        "SELECT count(*) FROM auth.audit WHERE action = 'dead-purged' AND actor = 'sweeper' \
                        AND object = '{job}'"
    );
    assert_eq!(lab.count(&told).await?, 1);
    lab.stop().await
}

// A letter that was put back while an older one stays is not removed once more at its retention: its job may have another
// one by then, with the same payload.
#[tokio::test(flavor = "multi_thread")]
async fn a_letter_that_was_put_back_is_not_removed_again() -> Result<()> {
    let mut lab = deadly().await?;
    let operator = lab.start_operate("olga").await?;
    let (other, brief) = (lab.register("other").await?, lab.register("brief").await?);
    lab.auth(&["user", "quota", "brief", "--retention-days", "0"])?;
    let kept = other.submit(&sample("isic2017-nv.jpg")).await?;
    let job = lab.client().submit(&parameters(&[noise(1), noise(2), noise(3)])).await?;
    // When its letter is removed, the two before it have been seen, and are older than any letter has to be.
    let witness = brief.submit(&sample("isic2017-nv.jpg")).await?;
    for job in [kept, job.clone(), witness] {
        until_given_up(&mut lab, 0, &[job]).await?;
    }
    let two = async || (lab.messages("DEAD").await.ok()? == 2).then_some(());
    eventually("the witness's letter is removed", LONG, two).await?;
    let letters = operator.get("/dead").await?.body;
    assert_eq!(letters["dead"][1]["job"], json!(job), "{letters}");
    let requeue = format!("/dead/{}/requeue", letters["dead"][1]["sequence"]);
    assert_eq!(send(operator.request(Method::POST, &requeue)).await?.status, 200);
    lab.auth(&["user", "quota", "demo", "--retention-days", "0"])?;
    until_given_up(&mut lab, 0, std::slice::from_ref(&job)).await?;
    let one = async || (lab.messages("DEAD").await.ok()? == 1).then_some(());
    eventually("its second letter is removed", LONG, one).await?;
    let told = format!("SELECT count(*) FROM auth.audit WHERE action = 'dead-purged' AND object = '{job}'");
    assert_eq!(lab.count(&told).await?, 1, "of its two letters one was removed");
    let no_payload = async || (lab.object_count().await.ok()? == 0).then_some(());
    eventually("its payload is removed", LONG, no_payload).await?;
    lab.stop().await
}
