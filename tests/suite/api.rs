//! Submit, wait, poll, cancel: status codes and headers as integrators rely on them.

use std::{
    io::Cursor,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::{clock, envelope::ResultHeader, limits::PUBLISH_DEADLINE};
use dermflow_tests::{
    client::{distribution, observations, parameters, sample, sample_bytes},
    fhir,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use futures_util::future::try_join_all;
use image::{ImageFormat, imageops};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(30);

// REQ_006, REQ_012: one call, one report.
#[tokio::test(flavor = "multi_thread")]
async fn a_synchronous_call_answers_with_the_report() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let answer = lab.client().analyze(&sample("ham10000-mel.jpg"), &[("prefer", "wait=20")]).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.header("content-type"), "application/fhir+json; fhirVersion=4.0");
    assert_eq!(answer.header("preference-applied"), "wait=20");
    assert_eq!(answer.header("etag"), "W/\"1\"");
    assert!(answer.header("last-modified").ends_with(" GMT") && answer.header("expires").ends_with(" GMT"));
    let id = answer.body["id"].as_str().unwrap();
    assert_eq!(answer.header("content-location"), format!("{}/fhir/DiagnosticReport/{id}", lab.url(0)));
    for part in ["queue;dur=", "model;dur=", "total;dur="] {
        assert!(answer.header("server-timing").contains(part), "{}", answer.header("server-timing"));
    }

    let stored = lab.client().get(&format!("/fhir/DiagnosticReport/{id}")).await?;
    assert_eq!((stored.status, &stored.text), (200, &answer.text));
    let polled = lab.client().get(&format!("/fhir/_async/{id}")).await?;
    assert_eq!((polled.status, &polled.text), (200, &answer.text));
    let job = lab.client().get(&format!("/jobs/{id}")).await?;
    assert_eq!(job.body["status"], "succeeded");
    assert_eq!(job.body["lane"], "interactive");
    assert_eq!(job.body["attempts"], 1);
    assert_eq!(job.body["links"]["report"], answer.header("content-location"));
    assert!(job.body["model_ms"].as_f64().unwrap() > 0.0);
    lab.stop().await
}

// REQ_004: the Rust pipeline gives the probabilities and the lesion's area of the training pipeline, whatever the file
// format; the area is that of the outline that is printed, and the box is around it.
#[tokio::test(flavor = "multi_thread")]
async fn a_report_matches_the_reference_implementation() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let expected: Value = serde_json::from_slice(&sample_bytes("expected.json"))?;
    for (name, expected) in expected.as_object().unwrap() {
        let classes = &expected["classes"];
        let report = lab.client().analyze(&sample(name), &[]).await?.body;
        let found = distribution(observations(&report, "condition-distribution")[0]);
        assert_eq!(found.len(), classes.as_object().unwrap().len());
        for (class, percent) in found {
            let reference = classes[&class].as_f64().unwrap() * 100.0;
            assert!((percent - reference).abs() <= 2.0, "{name} {class}: {percent} against {reference}");
        }
        let extent = observations(&report, "lesion-area-fraction")[0];
        let (area, reference) = (value(&extent["valueQuantity"]), expected["area"].as_f64().unwrap() * 100.0);
        assert!((area - reference).abs() <= 2.0, "{name}: {area} % lesion against {reference}");
        outline_is_consistent(&report, extent).with_context(|| name.clone())?;
    }
    lab.stop().await
}

fn value(quantity: &Value) -> f64 {
    quantity["value"].as_f64().unwrap_or(f64::NAN)
}

fn outline_is_consistent(report: &Value, extent: &Value) -> Result<()> {
    let part = |code: &str| {
        let parts = extent["component"].as_array().context("no components")?;
        let found = parts.iter().find(|part| part["code"]["coding"][0]["code"] == code);
        found.with_context(|| format!("no {code}"))
    };
    let text = part("lesion-polygon")?["valueString"].as_str().context("no text")?;
    let ring =
        text.strip_prefix("POLYGON ((").and_then(|text| text.strip_suffix("))")).context("no polygon")?;
    let point = |at: &str| {
        let (x, y) = at.split_once(' ').context("no point")?;
        Ok((x.parse::<f64>()?, y.parse::<f64>()?))
    };
    let points = ring.split(", ").map(point).collect::<Result<Vec<_>>>()?;
    ensure!(points.len() > 3 && points.first() == points.last(), "{text}");
    let image = &report["contained"].as_array().context("nothing contained")?[1];
    let (width, height) =
        (image["width"].as_f64().context("no width")?, image["height"].as_f64().context("no height")?);
    let doubled: f64 = points.windows(2).map(|edge| edge[0].0 * edge[1].1 - edge[1].0 * edge[0].1).sum();
    let area = doubled.abs() / 2.0 / (width * height) * 100.0;
    ensure!((area - value(&extent["valueQuantity"])).abs() < 0.006, "{area} {}", extent["valueQuantity"]);
    let side = |side: &str| anyhow::Ok(value(&part(side)?["valueQuantity"]));
    for (start, length, whole, along) in [
        ("bbox-x", "bbox-width", width, points.iter().map(|at| at.0).collect::<Vec<_>>()),
        ("bbox-y", "bbox-height", height, points.iter().map(|at| at.1).collect()),
    ] {
        let (least, most) =
            (along.iter().copied().fold(whole, f64::min), along.iter().copied().fold(0.0, f64::max));
        ensure!(
            (side(start)? - least).abs() < 1e-6 && (side(length)? - (most - least)).abs() < 0.051,
            "{start}"
        );
        ensure!(least >= 0.0 && most <= whole, "{start}: outside of the image");
    }
    ensure!((50.0..=100.0).contains(&side("ai-confidence")?), "no confidence");
    Ok(())
}

// A picture that is stored turned and marked so by EXIF is analysed as it is displayed.
#[tokio::test(flavor = "multi_thread")]
async fn exif_orientation_is_applied() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let size = async |name| -> Result<(Value, Value)> {
        let report = lab.client().analyze(&sample(name), &[]).await?.body;
        let media =
            report["contained"].as_array().unwrap().iter().find(|r| r["resourceType"] == "Media").unwrap();
        Ok((media["width"].clone(), media["height"].clone()))
    };
    assert_eq!(size("isic2017-nv.jpg").await?, size("isic2017-nv-exif6.jpg").await?);
    lab.stop().await
}

// REQ_006: respond-async and polling, with the headers of FHIR's asynchronous pattern.
#[tokio::test(flavor = "multi_thread")]
async fn an_asynchronous_call_is_polled_to_its_report() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1_500)).await?;
    let answer = lab.client().analyze(&sample("ham10000-nv.jpg"), &[("prefer", "respond-async")]).await?;
    assert_eq!(answer.status, 202, "{}", answer.text);
    assert_eq!(answer.header("preference-applied"), "respond-async");
    assert_eq!(answer.header("retry-after"), "1");
    assert_eq!(answer.body["issue"][0]["severity"], "information");
    let status_url = answer.header("content-location").to_owned();
    assert!(status_url.starts_with(&format!("{}/fhir/_async/", lab.url(0))));

    let running = async || {
        let poll = lab.client().get(&status_url).await.ok()?;
        assert_eq!(poll.status, 202, "{}", poll.text);
        assert_eq!(poll.header("retry-after"), "1");
        poll.header("x-progress").starts_with("running").then_some(())
    };
    eventually("the job runs", LONG, running).await?;
    let none_yet = lab.client().get(&format!("/fhir/DiagnosticReport/{}", answer.job())).await?;
    assert_eq!(none_yet.status, 404);
    let done = lab.client().poll(answer.job(), LONG).await?;
    assert_eq!((done.status, &done.body["resourceType"]), (200, &json!("DiagnosticReport")));
    assert_eq!(lab.client().get(&format!("/jobs/{}", answer.job())).await?.body["lane"], "bulk");
    lab.stop().await
}

// Between two attempts a job does not run: it waits, and says for which attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_between_its_attempts() -> Result<()> {
    let workers = vec![Worker::simulated(1).fault("panic").attempts(2)];
    let lab = Lab::start(Setup { workers, ..Setup::default() }).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    // The pause before the third attempt is the first that takes longer than a look.
    let waits = async || {
        let poll = lab.client().get(&format!("/fhir/_async/{job}")).await.ok()?;
        (poll.header("x-progress") == "queued, attempt 3").then_some(())
    };
    eventually("the job waits", LONG, waits).await?;
    let record = lab.client().get(&format!("/jobs/{job}")).await?.body;
    assert_eq!((&record["status"], &record["attempts"]), (&json!("queued"), &json!(2)), "{record}");
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.body["attempts"], 3);
    lab.stop().await
}

// REQ_005: a wait that ends is a 504 with the way to the result, or a 202 when the caller prefers; never an
// empty 200.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_ends_leaves_the_job_to_be_polled() -> Result<()> {
    let lab = Lab::start(Setup::simulated(2_500)).await?;
    let late = lab.client().analyze(&sample("ham10000-nv.jpg"), &[("prefer", "wait=1")]).await?;
    assert_eq!((late.status, late.code()), (504, "wait-ended"), "{}", late.text);
    let either =
        lab.client().analyze(&sample("ham10000-mel.jpg"), &[("prefer", "respond-async, wait=1")]).await?;
    assert_eq!((either.status, either.header("preference-applied")), (202, "respond-async"));
    for job in [late.job(), either.job()] {
        assert_eq!(lab.client().poll(job, LONG).await?.status, 200);
    }
    lab.stop().await
}

// A poller that does not heed Retry-After is throttled; the job does not notice.
#[tokio::test(flavor = "multi_thread")]
async fn polling_without_a_pause_is_throttled() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    let path = format!("/fhir/_async/{job}");
    let throttled = async || {
        let polls = try_join_all((0..100).map(|_| lab.client().get(&path))).await.ok()?;
        polls.into_iter().find(|poll| poll.status == 429)
    };
    let refused = eventually("a poll is refused", LONG, throttled).await?;
    assert_eq!(refused.code(), "poll-too-fast");
    assert!(
        (1..=10).contains(&refused.header("retry-after").parse::<u64>()?),
        "{}",
        refused.header("retry-after")
    );
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.body["status"], "queued");
    lab.stop().await
}

// Cancelled while it waits: gone from the queue, from the status URL, and never analysed.
#[tokio::test(flavor = "multi_thread")]
async fn a_queued_job_is_cancelled() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    assert_eq!(lab.messages("JOBS").await?, 1);
    let url = format!("/fhir/_async/{job}");
    assert_eq!(lab.client().delete(&url).await?.status, 202);
    assert_eq!(lab.messages("JOBS").await?, 0);
    for answer in [lab.client().get(&url).await?, lab.client().delete(&url).await?] {
        assert_eq!((answer.status, answer.code()), (404, "not-found"));
    }
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.body["status"], "cancelled");
    lab.stop().await
}

// Cancelled while it runs: whatever the worker publishes afterwards is too late.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_cancelled() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1_000)).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    lab.until_state(&job, "running").await?;
    assert_eq!(lab.client().delete(&format!("/fhir/_async/{job}")).await?.status, 202);
    // As from a worker that did not hear of it.
    let now = clock::now();
    let result = ResultHeader::succeeded(job.parse()?, 1, now, now, 1, "k1".into()).encode(b"sealed");
    lab.jetstream().await?.publish(format!("results.{job}"), result).await?.await?;
    let late = async || lab.metric("dermflow_late_results_total").await.filter(|count| *count >= 1.0);
    eventually("the late result is dropped", LONG, late).await?;
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.body["status"], "cancelled");
    assert_eq!(lab.count("SELECT count(*) FROM ingress.reports").await?, 0);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.usage").await?, 0);
    lab.stop().await
}

// Deleted after the end: the report is removed, the record of the work stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_finished_report_is_removed() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    assert_eq!(lab.client().delete(&format!("/fhir/_async/{job}")).await?.status, 202);
    for path in [format!("/fhir/_async/{job}"), format!("/fhir/DiagnosticReport/{job}")] {
        assert_eq!(lab.client().get(&path).await?.status, 404, "{path}");
    }
    assert_eq!(lab.count("SELECT count(*) FROM ingress.reports").await?, 0);
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.body["links"]["report"], Value::Null);
    lab.stop().await
}

// SRS-007: three images of one case, each for itself and pooled.
#[tokio::test(flavor = "multi_thread")]
async fn three_images_are_pooled() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let names = ["ham10000-mel.jpg", "ham10000-nv.jpg", "isic2017-nv.png"];
    let images: Vec<Vec<u8>> = names.iter().map(|name| sample_bytes(name)).collect();
    let answer = lab.client().analyze(&parameters(&images), &[]).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let found = observations(&answer.body, "condition-distribution");
    assert_eq!(found.len(), 4);
    let (single, joint): (Vec<_>, Vec<_>) =
        found.into_iter().partition(|o| o["derivedFrom"].as_array().unwrap().len() == 1);
    let mean = |class: &str| {
        let each = |o: &&Value| distribution(o).into_iter().find(|(code, _)| code == class).unwrap().1;
        single.iter().map(each).sum::<f64>() / 3.0
    };
    for (class, percent) in distribution(joint[0]) {
        assert!((percent - mean(&class)).abs() < 0.03, "{class}: {percent} against {}", mean(&class));
    }
    lab.stop().await
}

// A request beyond the broker's message size travels by claim check, which is gone when the job ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_request_goes_through_the_object_store() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let images = [noise(1), noise(2), noise(3)];
    assert!(images.iter().map(Vec::len).sum::<usize>() > 9 * 1024 * 1024);
    let answer = lab.client().analyze(&parameters(&images), &[]).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let emptied = async || (lab.object_count().await.ok()? == 0).then_some(());
    eventually("the payload is removed", LONG, emptied).await?;
    lab.stop().await
}

// An object store that takes its time to forget a payload keeps no answer back: the result is on record.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_object_store_keeps_no_answer_back() -> Result<()> {
    let lab = Lab::start(Setup::simulated(2_000)).await?;
    let request = parameters(&[noise(1), noise(2), noise(3)]);
    let jobs = async |state: &str| {
        let count = format!("SELECT count(*) FROM ingress.jobs WHERE claim_check AND state {state}");
        let one = async || (lab.count(&count).await.ok()? == 1).then_some(());
        eventually(&format!("a job with state {state}"), LONG, one).await
    };
    let recorded = async {
        jobs("IN ('queued', 'running')").await?;
        // From now on it says nothing of what it stores.
        let context = lab.jetstream().await?;
        let mut config = context.get_stream("OBJ_payloads").await?.cached_info().config.clone();
        config.no_ack = true;
        context.update_stream(config).await?;
        jobs("= 'succeeded'").await?;
        anyhow::Ok(Instant::now())
    };
    let answered = async { anyhow::Ok((lab.client().analyze(&request, &[]).await?, Instant::now())) };
    let (recorded, (answer, answered)) = tokio::try_join!(recorded, answered)?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let late = answered.saturating_duration_since(recorded);
    assert!(late < PUBLISH_DEADLINE / 2, "{late:?} after its result was on record");
    lab.stop().await
}

// An incompressible PNG of about 3.5 MB, from a seed.
pub(super) fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let image = image::RgbImage::from_fn(1_100, 1_060, |_, _| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        image::Rgb([(state >> 33) as u8, (state >> 41) as u8, (state >> 49) as u8])
    });
    let mut file = std::io::Cursor::new(Vec::new());
    image.write_to(&mut file, image::ImageFormat::Png).expect("memory can be written");
    file.into_inner()
}

/// An image of skin that the quality check refuses.
fn blurred() -> Result<Vec<u8>> {
    let image = image::load_from_memory(&sample_bytes("isic2017-nv.png"))?.to_rgb8();
    let mut file = Cursor::new(Vec::new());
    imageops::fast_blur(&image, 5.0).write_to(&mut file, ImageFormat::Png)?;
    Ok(file.into_inner())
}

// REQ_006: whatever the service says on `/fhir` is valid FHIR R4, errors included.
#[tokio::test(flavor = "multi_thread")]
async fn every_document_is_valid_fhir_r4() -> Result<()> {
    let lab = Lab::start(Setup { workers: vec![Worker::derm7()], ..Setup::default() }).await?;
    let full = json!({"resourceType": "Parameters", "parameter": [
        sample("ham10000-mel.jpg")["parameter"][0],
        {"name": "image", "part": [
            sample("isic2017-nv.png")["parameter"][0]["part"][0],
            {"name": "bodySite", "valueCodeableConcept": {"text": "Back <of> \"trunk\" & more", "coding": [
                {"system": "http://snomed.info/sct", "code": "66643007", "display": "Skin of back"}]}}]},
        {"name": "subject", "valueReference": {"type": "Patient", "identifier": {
            "system": "https://hospital.example.org/pseudonyms", "value": "P-000123"}}},
        {"name": "identifier", "valueIdentifier": {"system": "https://hospital.example.org/orders", "value": "ORD-1"}}
    ]});
    let mut documents = Vec::new();
    let mut keep = |name: &str, status: u16, answer: dermflow_tests::client::Answer| {
        assert_eq!(answer.status, status, "{name}: {}", answer.text);
        documents.push((name.to_owned(), answer.body));
    };
    keep("one image", 200, lab.client().analyze(&sample("ham10000-nv.jpg"), &[]).await?);
    keep("two images, everything given", 200, lab.client().analyze(&full, &[]).await?);
    let accepted = lab.client().analyze(&sample("pad-ufes-bcc.jpg"), &[("prefer", "respond-async")]).await?;
    let job = accepted.job().to_owned();
    keep("accepted", 202, accepted);
    keep("polled", 200, lab.client().poll(&job, LONG).await?);
    keep("deleted", 202, lab.client().delete(&format!("/fhir/_async/{job}")).await?);
    keep("not found", 404, lab.client().get(&format!("/fhir/_async/{job}")).await?);
    keep("faults", 422, lab.client().analyze(&parameters(&[b"GIF89a".to_vec(), vec![0]]), &[]).await?);
    keep("not JSON", 400, lab.client().analyze_raw("{".into(), &[]).await?);
    keep("no token", 401, lab.client().clone().with_token("").analyze(&full, &[]).await?);
    keep("no such method", 405, lab.client().delete("/fhir/DiagnosticReport/$analyze").await?);
    let (good, poor) = (sample_bytes("ham10000-mel.jpg"), blurred()?);
    for language in ["es", "fr"] {
        for files in [vec![good.clone(), poor.clone()], vec![poor.clone()]] {
            let answer = lab.client().analyze(&parameters(&files), &[("accept-language", language)]).await?;
            assert_eq!(answer.header("content-language"), language, "{}", answer.text);
            let quality = observations(&answer.body, "image-quality");
            let mut acceptable = vec![json!(true); files.len() - 1];
            acceptable.push(json!(false));
            let told: Vec<_> =
                quality.iter().map(|one| one["component"][0]["valueBoolean"].clone()).collect();
            assert_eq!(told, acceptable, "{}", answer.text);
            let found = observations(&answer.body, "condition-distribution");
            assert_eq!(found.iter().filter(|one| one["status"] == "cancelled").count(), 1, "{}", answer.text);
            keep(&format!("{language}, {} images, one of them blurred", files.len()), 200, answer);
        }
    }
    fhir::validate(&documents).await?;
    lab.stop().await
}

// The same of a Task in every state; one that failed says why, and one alone has a report.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_in_every_state_are_valid_fhir_r4() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let client = lab.client().clone();
    let mut cut = sample_bytes("isic2017-nv.png");
    cut.truncate(cut.len() / 2);
    let good = client.submit(&sample("ham10000-nv.jpg")).await?;
    let bad = client.submit(&parameters(&[cut])).await?;
    let withdrawn = client.submit(&sample("ham10000-nv.jpg")).await?;
    let task = async |job: &str, status: &str| -> Result<(String, Value)> {
        let answer = client.get(&format!("/fhir/Task/{job}")).await?;
        assert_eq!((answer.status, &answer.body["status"]), (200, &json!(status)), "{}", answer.text);
        let of = [&answer.body["statusReason"], &answer.body["output"]].map(|member| !member.is_null());
        assert_eq!(of, [status == "failed", status == "completed"], "{}", answer.text);
        Ok((status.to_owned(), answer.body))
    };
    let mut documents = vec![task(&good, "ready").await?];
    // As it is before the broker confirms it.
    let accepted =
        format!("UPDATE ingress.jobs SET state = 'accepted', queued_at = NULL WHERE id = '{withdrawn}'");
    lab.sql(&accepted).await?;
    documents.push(task(&withdrawn, "requested").await?);
    assert_eq!(client.delete(&format!("/fhir/_async/{withdrawn}")).await?.status, 202);
    documents.push(task(&withdrawn, "cancelled").await?);
    lab.start_worker(Worker::simulated(1_000)).await?;
    lab.until_state(&good, "running").await?;
    documents.push(task(&good, "in-progress").await?);
    assert_eq!(client.poll(&bad, LONG).await?.code(), "image-undecodable");
    documents.push(task(&bad, "failed").await?);
    assert_eq!(client.poll(&good, LONG).await?.status, 200);
    documents.push(task(&good, "completed").await?);
    documents.push(("all".into(), client.get("/fhir/Task").await?.body));
    fhir::validate(&documents).await?;
    lab.stop().await
}

// The validators refuse what they should: eighteen kinds of broken documents, and every invariant.
#[tokio::test]
async fn the_validators_refuse_broken_documents() -> Result<()> {
    fhir::judge_the_judge().await
}

// One body, many callers: HTTP/2 streams and lanes do not mix answers up.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_callers_get_their_own_reports() -> Result<()> {
    let lab = Lab::start(Setup::simulated(5)).await?;
    let call = async |n: u32| -> Result<()> {
        let mut request = sample(if n.is_multiple_of(2) { "ham10000-nv.jpg" } else { "ham10000-mel.jpg" });
        let order = format!("ORD-{n}");
        request["parameter"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "identifier", "valueIdentifier": {"value": order}}));
        let answer = lab.client().analyze(&request, &[]).await?;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.body["identifier"][1]["value"], order);
        Ok(())
    };
    try_join_all((0..64).map(call)).await?;
    assert_eq!(lab.count("SELECT jobs FROM ingress.usage").await?, 64);
    lab.stop().await
}
