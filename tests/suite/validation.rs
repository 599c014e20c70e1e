//! What is refused before anything is queued: each fault with its status, its code and its place.

use anyhow::Result;
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_tests::{
    client::{parameters, sample, sample_bytes},
    lab::{Lab, Setup},
};
use reqwest::Method;
use serde_json::{Value, json};

// REQ_007: every fault names its element and has a stable code, and nothing reaches the queue.
#[tokio::test(flavor = "multi_thread")]
async fn every_fault_is_named_and_nothing_is_queued() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let content = "Parameters.parameter[0].part[0].valueAttachment";
    let data = format!("{content}.data");
    let good = sample("isic2017-nv.png");
    let change = |pointer: &str, value: Value| {
        let mut changed = good.clone();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        match changed.pointer_mut(parent).unwrap() {
            Value::Array(items) => items.push(value),
            other => other[name] = value,
        }
        changed
    };
    let image = |bytes: Vec<u8>| parameters(&[bytes]);
    let base64 = |text: &str| change("/parameter/0/part/0/valueAttachment/data", json!(text));
    let png = STANDARD.encode(sample_bytes("isic2017-nv.png"));
    let cases: Vec<(Value, u16, &str, &str)> = vec![
        (json!([]), 400, "element-type", "Parameters"),
        (json!({}), 422, "element-missing", "Parameters.resourceType"),
        (change("/resourceType", json!("Patient")), 422, "value-invalid", "Parameters.resourceType"),
        (change("/vendor", json!(1)), 400, "element-unknown", "Parameters.vendor"),
        (change("/parameter/0/value", json!(1)), 400, "element-unknown", "Parameters.parameter[0].value"),
        (
            change("/parameter/0/modifierExtension", json!([])),
            422,
            "modifier-extension",
            "Parameters.parameter[0].modifierExtension",
        ),
        (
            change("/parameter/-", json!({"name": "colour", "valueCode": "red"})),
            422,
            "parameter-unknown",
            "Parameters.parameter[1].name",
        ),
        (
            change("/parameter/-", json!({"name": "heatMap", "valueCode": "top-3"})),
            422,
            "value-invalid",
            "Parameters.parameter[1].valueCode",
        ),
        (
            change("/parameter/-", json!({"name": "subject", "valueReference": {}})),
            422,
            "element-missing",
            "Parameters.parameter[1].valueReference.identifier",
        ),
        (
            json!({"resourceType": "Parameters", "parameter": [{"name": "heatMap", "valueCode": "none"}]}),
            422,
            "image-count",
            "Parameters.parameter",
        ),
        (parameters(&vec![sample_bytes("isic2017-nv.png"); 4]), 422, "image-count", "Parameters.parameter"),
        (base64(&format!("data:image/png;base64,{png}")), 422, "image-not-base64", &data),
        (base64(&format!("{}\n{}", &png[..76], &png[76..])), 422, "image-not-base64", &data),
        (base64(png.trim_end_matches('=').get(..png.len() - 3).unwrap()), 422, "image-not-base64", &data),
        (base64(&png.replace(['+', '/'], "-")), 422, "image-not-base64", &data),
        (base64(""), 422, "value-invalid", &data),
        (image(b"GIF89a, and so on".to_vec()), 422, "image-format", &data),
        (image(b"<svg xmlns='http://www.w3.org/2000/svg'/>".to_vec()), 422, "image-format", &data),
        (image(b"\xff\xd8\xff\xe0 and nothing".to_vec()), 422, "image-header", &data),
        (image(png_of(79, 400)), 422, "image-too-small", &data),
        (image(png_of(12_001, 80)), 422, "image-too-large", &data),
        (image(vec![0; 10 * 1024 * 1024 + 1]), 422, "image-too-many-bytes", &data),
    ];
    for (body, status, code, field) in cases {
        let answer = lab.client().analyze(&body, &[]).await?;
        assert_eq!(answer.status, status, "{code}: {}", answer.text);
        assert_eq!(answer.faults(), [(code.to_owned(), field.to_owned())]);
    }
    assert_eq!(lab.messages("JOBS").await?, 0);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, 0);
    lab.stop().await
}

fn png_of(width: u32, height: u32) -> Vec<u8> {
    let mut file = std::io::Cursor::new(Vec::new());
    image::GrayImage::new(width, height)
        .write_to(&mut file, image::ImageFormat::Png)
        .expect("memory can be written");
    file.into_inner()
}

/// Body, headers, status, code.
type Case<'a> = (String, &'a [(&'a str, &'a str)], u16, &'a str);

// What is wrong with a request as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn headers_and_bodies_out_of_bounds_are_refused() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let good = sample("isic2017-nv.png");
    let huge = "x".repeat(24 * 1024 * 1024 + 1);
    let nested = format!("{}{}", "[".repeat(500), "]".repeat(500));
    let cases: Vec<Case> = vec![
        ("not json".into(), &[], 400, "json-malformed"),
        (String::new(), &[], 400, "json-malformed"),
        (nested, &[], 400, "json-malformed"),
        (format!("[{}1]", "1,".repeat(5_000)), &[], 400, "json-too-complex"),
        (r#"{"resourceType":"Parameters","resourceType":"Parameters"}"#.into(), &[], 400, "json-malformed"),
        (huge, &[], 413, "body-too-large"),
        (good.to_string(), &[("content-type", "text/plain")], 415, "media-type"),
        (good.to_string(), &[("content-type", "application/fhir+xml")], 415, "media-type"),
        (good.to_string(), &[("accept", "application/fhir+xml")], 406, "not-acceptable"),
        (good.to_string(), &[("accept", "application/fhir+json; fhirVersion=5.0")], 406, "not-acceptable"),
        (good.to_string(), &[("idempotency-key", "with space")], 400, "header-invalid"),
    ];
    for (body, headers, status, code) in cases {
        let answer = lab.client().analyze_raw(body, headers).await?;
        assert_eq!((answer.status, answer.code()), (status, code), "{}", answer.text);
        assert_eq!(answer.body["resourceType"], "OperationOutcome");
    }
    let put = lab.client().request(Method::PUT, "/fhir/DiagnosticReport/$analyze");
    assert_eq!(dermflow_tests::client::send(put).await?.status, 405);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, 0);
    lab.stop().await
}

// The header passes, the content does not: a failed job with the reason and the image, at the first attempt.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_no_decoder_opens_fails_its_job_once() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let mut cut = sample_bytes("isic2017-nv.png");
    cut.truncate(cut.len() / 2);
    let request = parameters(&[sample_bytes("ham10000-nv.jpg"), cut]);
    let answer = lab.client().analyze(&request, &[]).await?;
    assert_eq!((answer.status, answer.code()), (422, "image-undecodable"), "{}", answer.text);
    let failed = lab.sql("SELECT id::text, attempts FROM ingress.jobs WHERE state = 'failed'").await?;
    assert_eq!((failed.len(), failed[0].get::<_, i32>(1)), (1, 1));
    let id: String = failed[0].get(0);
    let job = lab.client().get(&format!("/jobs/{id}")).await?;
    assert_eq!(job.body["error"]["code"], "image-undecodable");
    assert_eq!(job.body["error"]["image"], 2);
    assert_eq!(lab.messages("DEAD").await?, 0);
    lab.stop().await
}
