//! The device API, case by case as the clients that speak it check it, at the root and under `/v1.0`.

use std::{io::Cursor, path::Path, slice, time::Duration};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_auth::token::{Grant, Tokens};
use dermflow_schemas::clock;
use dermflow_tests::{
    client::{Answer, Client, distribution, observations, sample_bytes, send},
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use image::{ImageFormat, Rgb, RgbImage};
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::process::Command;
use uuid::Uuid;

const ROOTS: [&str; 2] = ["", "/v1.0"];
/// Of a naevus, as clients send it: not through a dermatoscope.
const PHOTO: &str = "pad-ufes-bcc.jpg";

async fn post(client: &Client, path: &str, body: &Value) -> Result<Answer> {
    send(client.request(Method::POST, path).json(body)).await
}

fn attachment(file: &[u8]) -> Value {
    json!({ "contentAttachment": { "data": STANDARD.encode(file) } })
}

fn case(files: &[Vec<u8>]) -> Value {
    json!({ "payload": files.iter().map(|file| attachment(file)).collect::<Vec<_>>() })
}

/// A stroke of a pen on paper: JPEG, whatever its name says.
fn scribble() -> Result<Vec<u8>> {
    let mut paper = RgbImage::from_pixel(480, 136, Rgb([255; 3]));
    for step in 0..4_000 {
        let t = f64::from(step) / 4_000.0;
        let (x, y) = (30.0 + 420.0 * t, 68.0 + 45.0 * (t * 40.0).sin());
        for (dx, dy) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            paper.put_pixel(x as u32 + dx, y as u32 + dy, Rgb([20, 20, 60]));
        }
    }
    let mut file = Cursor::new(Vec::new());
    paper.write_to(&mut file, ImageFormat::Jpeg)?;
    Ok(file.into_inner())
}

/// The one entry of a refusal.
fn entry(answer: &Answer) -> Result<(&str, &str, &Value)> {
    let detail = answer.body["detail"].as_array().with_context(|| answer.text.clone())?;
    ensure!(detail.len() == 1, "{}", answer.text);
    let text = |name: &str| detail[0][name].as_str().unwrap_or_default();
    Ok((text("type"), text("msg"), &detail[0]["loc"]))
}

fn is_json(answer: &Answer) -> bool {
    answer.header("content-type").starts_with("application/json") && answer.body.is_object()
}

// Wrong names and passwords are refused in whatever form a name has; a missing field has an entry of its own.
#[tokio::test(flavor = "multi_thread")]
async fn clients_sign_in() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let anonymous = lab.client().clone().with_token("");
    let password = lab.password("demo")?;
    for path in ["/login", "/v1.0/login", "/auth/login", "/v1.0/auth/login"] {
        let login =
            async |fields: &[(&str, &str)]| send(anonymous.request(Method::POST, path).form(&fields)).await;
        for username in ["foo", "foo@example.org"] {
            let refused = login(&[("username", username), ("password", "bar")]).await?;
            assert_eq!((refused.status, refused.code()), (401, "login-failed"), "{path}");
        }
        let good = login(&[("username", "demo"), ("password", &password)]).await?;
        assert_eq!((good.status, &good.body["token_type"]), (200, &json!("Bearer token")), "{path}");
        ensure!(good.body["expires_in_minutes"].as_i64().is_some_and(|minutes| minutes > 0));
        let missing = login(&[("password", "bar")]).await?;
        assert_eq!(missing.status, 422, "{path}");
        assert_eq!(entry(&missing)?, ("missing", "Field required", &json!(["body", "username"])));
        assert_eq!(entry(&login(&[("username", "a")]).await?)?.2, &json!(["body", "password"]));
        let nothing = login(&[]).await?;
        assert_eq!(nothing.body["detail"].as_array().map(Vec::len), Some(2), "{}", nothing.text);
        ensure!(is_json(&nothing));
    }
    // Signed with our key: nothing but the time is wrong.
    let tokens = Tokens::open(&lab.signing_keys(), &lab.url(0))?;
    let (client, credential) = (Uuid::new_v4().into(), Uuid::new_v4());
    let grant = Grant { client, credential, scope: String::new(), ends: None, after: None, bound_to: None };
    let old = tokens.issue(grant, clock::now() - Duration::from_hours(1))?;
    let expired = anonymous.with_token(old.expose_secret()).get("/device-information").await?;
    assert_eq!((expired.status, &expired.body["detail"]), (401, &json!("Expired token")));
    lab.stop().await
}

fn is_percent(value: &Value) -> bool {
    value.as_f64().is_some_and(|value| (0.0..=100.0).contains(&value))
}

fn has_indicators(of: &Value) -> Result<()> {
    let names = ["hasCondition", "pigmentedLesion", "malignancy", "urgentReferral", "highPriorityReferral"];
    for name in names {
        ensure!(is_percent(&of["clinicalIndicator"][name]), "{name}: {of}");
    }
    Ok(())
}

// §3, §8: a photograph of skin and two scribbles are one case. All that clients read is there and right; exactly the
// scribbles are not valid.
#[tokio::test(flavor = "multi_thread")]
async fn a_case_is_told_image_by_image() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let (client, begun) = (lab.client(), clock::now());
    let body = case(&[sample_bytes(PHOTO), scribble()?, scribble()?]);
    for root in ROOTS {
        let path = format!("{root}/diagnosis-support");
        let request = |accept: &str| {
            client
                .request(Method::POST, &path)
                .header("accept", accept)
                .header("idempotency-key", &path)
                .json(&body)
        };
        let answer = send(request("*/*")).await?;
        ensure!(answer.status == 200 && is_json(&answer), "{}", answer.text);
        let told = &answer.body;
        assert_eq!(
            (&told["resourceType"], &told["status"]),
            (&json!("DiagnosticReport"), &json!("preliminary"))
        );
        let issued = told["issued"].as_str().unwrap_or_default();
        let at = OffsetDateTime::parse(issued, &Rfc3339)?;
        ensure!(issued.ends_with('Z') && begun.truncate_to_second() <= at && at <= clock::now(), "{issued}");
        ensure!(told["analysisDuration"].as_f64().is_some_and(|seconds| seconds > 0.0));
        for name in ["sensitivity", "specificity", "entropy"] {
            let figure = &told["performanceIndicator"][name];
            ensure!(is_percent(figure) && figure.as_f64() > Some(1.0), "{name}: {figure}");
        }
        has_indicators(told)?;
        // The same key is the same job: the report that the answer is from.
        let strict = send(request("application/fhir+json")).await?;
        ensure!(strict.header("content-type").starts_with("application/fhir+json"), "{}", strict.text);
        let report = &strict.body;
        assert_eq!(told["identifier"]["value"], report["id"]);
        let read =
            format!("SELECT count(*) FROM auth.audit WHERE action = 'read' AND object = '{}'", strict.job());
        assert_eq!(lab.count(&read).await?, 2, "each time that it was told");
        ensure!(answer.header("link").contains(&format!("/fhir/DiagnosticReport/{}>", strict.job())));
        ensure!(!observations(report, "dermatological-domain").is_empty(), "nothing is said of the domain");
        let images = told["imagingAnalysis"].as_array().context("no images")?;
        let valid: Vec<_> = images.iter().map(|image| image["mediaValidity"]["isValid"].as_bool()).collect();
        assert_eq!(valid, [Some(true), Some(false), Some(false)], "{told}");
        has_distribution(&images[0], report)?;
        for image in images {
            has_indicators(image)?;
            ensure!(is_percent(&image["performanceIndicator"]["entropy"]) && image["conclusion"].is_array());
            let validity = &image["mediaValidity"];
            has_confidence_texts(validity);
            ensure!(
                validity["quality"]["acceptable"].is_boolean() && is_percent(&validity["quality"]["score"])
            );
            ensure!(validity["quality"]["interpretation"].as_str().is_some_and(|text| !text.is_empty()));
            ensure!(
                ["None", "Clinical", "Dermoscopic"]
                    .contains(&validity["modality"]["value"].as_str().unwrap_or(""))
            );
        }
        assert_eq!(images[0]["mediaValidity"]["modality"]["value"], "Clinical");
        for name in ["pigmentedLesion", "urgentReferral", "highPriorityReferral", "hasCondition"] {
            ensure!(told["clinicalIndicator"][name].as_f64() > Some(0.0), "{name}");
        }
    }
    lab.stop().await
}

/// What a client looks for beside the confidences, word for word.
fn has_confidence_texts(validity: &Value) {
    let domain = &validity["domain"]["additionalData"]["aiConfidence"];
    let modality = &validity["modality"]["additionalData"];
    let told = [domain, &modality["aiConfidenceClinical"], &modality["aiConfidenceDermoscopic"]]
        .map(|confidence| confidence["code"]["text"].as_str().unwrap_or_default());
    let texts = [
        "AI model confidence in the image being dermatological",
        "AI model confidence in identifying the image's modality as clinical",
        "AI model confidence in identifying the image's modality as dermoscopic",
    ];
    assert_eq!(told, texts, "{validity}");
}

// §3: what is concluded of a case, and how sure that is, is of all of its images that are good.
#[tokio::test(flavor = "multi_thread")]
async fn a_case_is_concluded_from_all_of_its_images() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let body = case(&["ham10000-mel.jpg", "isic2017-nv.png"].map(sample_bytes));
    let request = |accept: &str| {
        let request = lab.client().request(Method::POST, "/diagnosis-support").header("accept", accept);
        request.header("idempotency-key", "one-case").json(&body)
    };
    let told = send(request("*/*")).await?;
    let report = send(request("application/fhir+json")).await?;
    ensure!(told.status == 200 && report.status == 200, "{} {}", told.text, report.text);
    assert_eq!(told.body["identifier"]["value"], report.body["id"]);
    let found = observations(&report.body, "condition-distribution");
    let of_both = |one: &&&Value| one["derivedFrom"].as_array().is_some_and(|images| images.len() == 2);
    let joint = *found.iter().find(of_both).context("nothing is said of both images")?;
    let percents = |of: &Value| {
        let conclusions = of["conclusion"].as_array().into_iter().flatten();
        conclusions.filter_map(|each| each["probability"].as_f64()).collect::<Vec<_>>()
    };
    let pooled = percents(&told.body);
    assert_eq!(pooled, distribution(joint).into_iter().map(|(_, percent)| percent).collect::<Vec<_>>());
    ensure!(!pooled.is_empty() && (pooled.iter().sum::<f64>() - 100.0).abs() < 0.01, "{pooled:?}");
    let names = |of: &Value, member: &str| {
        let each = of[member].as_array().into_iter().flatten();
        each.map(|each| each["code"]["text"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(&told.body, "conclusion"), names(joint, "component")[..pooled.len()]);
    let entropy = joint["component"].as_array().into_iter().flatten().find_map(|part| {
        let is_it = part["code"]["coding"][0]["code"] == "normalised-entropy";
        is_it.then(|| &part["valueQuantity"]["value"])
    });
    let figure = |of: &Value| of["performanceIndicator"]["entropy"].clone();
    assert_eq!(Some(&figure(&told.body)), entropy);
    let images = told.body["imagingAnalysis"].as_array().context("no images")?;
    assert_eq!(images.len(), 2);
    for image in images {
        assert_eq!(image["mediaValidity"]["isValid"], true, "{}", told.text);
        ensure!(percents(image) != pooled && figure(image) != figure(&told.body), "{}", told.text);
    }
    lab.stop().await
}

/// The conclusions of the first image are the distribution of the report, with a heat map each for the first five.
fn has_distribution(image: &Value, report: &Value) -> Result<()> {
    let conclusions = image["conclusion"].as_array().context("no conclusions")?;
    let told: Vec<_> = conclusions.iter().filter_map(|each| each["probability"].as_f64()).collect();
    let of_first = observations(report, "condition-distribution");
    let expected: Vec<_> = distribution(of_first[0]).into_iter().map(|(_, percent)| percent).collect();
    assert_eq!(told, expected);
    ensure!(
        told[0] > 1.0 && told.is_sorted_by(|a, b| a >= b) && (told.iter().sum::<f64>() - 100.0).abs() < 0.01
    );
    for (rank, conclusion) in conclusions.iter().enumerate() {
        let members = conclusion.as_object().context("no object")?;
        ensure!(members.contains_key("explainability"), "{conclusion}");
        let map = &conclusion["explainability"]["heatMap"];
        assert_eq!(map["data"].is_string() && map["height"].is_u64(), rank < 5, "{rank}");
        let coding = &conclusion["code"]["coding"][0];
        for name in ["code", "display", "system", "systemDisplay", "version"] {
            ensure!(coding.as_object().is_some_and(|keys| keys.contains_key(name)), "{name}: {coding}");
        }
        // Of the classes, vascular lesions alone are no single entity of ICD-11.
        assert_eq!(coding["systemDisplay"] == "ICD-11", coding["code"] != "class-vasc", "{coding}");
        if coding["systemDisplay"] == "ICD-11" {
            assert_eq!(coding["system"], "https://icd.who.int/browse/2025-01/mms/en");
            assert_eq!(coding["version"], "2025-01");
        } else {
            assert_eq!((&coding["system"], &coding["systemDisplay"]), (&Value::Null, &json!("Dermflow")));
        }
    }
    Ok(())
}

// A client with nothing but Python's standard library goes all the way, at either root.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_its_own_reads_every_key() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::temp_dir().join(format!("dermflow-device-{}", Uuid::new_v4().simple()));
    std::fs::create_dir(&folder)?;
    let password = folder.join("password");
    std::fs::write(&password, lab.password("demo")?)?;
    for base in ROOTS {
        let output = Command::new("python3")
            .arg(root.join("device/client.py"))
            .arg("--ca")
            .arg(lab.ca())
            .args(["--user", "demo", "--url", &format!("{}{base}", lab.url(0)), "--password-file"])
            .arg(&password)
            .args([root.join("images").join(PHOTO), root.join("images/ham10000-mel.jpg")])
            .output()
            .await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let outcome: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!(outcome["refused"], json!([]));
        ensure!(outcome["first"][0].as_f64() > Some(1.0), "{outcome}");
    }
    std::fs::remove_dir_all(folder)?;
    lab.stop().await
}

// Every refusal is JSON with `detail`, one entry a fault, and our code; and so are the server's own troubles.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_the_form_that_clients_read() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let client = lab.client();
    let file = sample_bytes("isic2017-nv.png");
    let data = "contentAttachment";
    for root in ROOTS {
        let path = format!("{root}/diagnosis-support");
        let mut prefixed = case(slice::from_ref(&file));
        let plain = STANDARD.encode(&file);
        prefixed["payload"][0][data]["data"] = json!(format!("data:image/jpeg;base64,{plain}"));
        let refused = post(client, &path, &prefixed).await?;
        assert_eq!((refused.status, refused.code()), (422, "image-not-base64"));
        let place = json!(["body", "payload", 0, "contentAttachment", "data"]);
        assert_eq!(entry(&refused)?, ("value_error", "Value error, Only base64 data is allowed", &place));
        let cases: [(Value, u16, &str, Value); 6] = [
            (json!({}), 422, "missing", json!(["body", "payload"])),
            (json!([]), 422, "value_error", json!(["body"])),
            (json!({ "payload": attachment(&file) }), 422, "value_error", json!(["body", "payload"])),
            (case(&vec![file.clone(); 4]), 422, "value_error", json!(["body", "payload"])),
            (
                case(&[file.clone(), b"GIF89a".to_vec()]),
                422,
                "value_error",
                json!(["body", "payload", 1, data, "data"]),
            ),
            (json!({ "payload": [{}] }), 422, "missing", json!(["body", "payload", 0, data])),
        ];
        for (body, status, kind, place) in cases {
            let refused = post(client, &path, &body).await?;
            assert_eq!(refused.status, status, "{}", refused.text);
            let (type_, _, loc) = entry(&refused)?;
            assert_eq!((type_, loc), (kind, &place));
        }
        let json = |client: &Client, body: Vec<u8>| {
            client.request(Method::POST, &path).header("content-type", "application/json").body(body)
        };
        let malformed = send(json(client, b"{".to_vec())).await?;
        assert_eq!((malformed.status, entry(&malformed)?.0), (400, "json_invalid"));
        let large = send(json(client, vec![b' '; 24 * 1024 * 1024 + 1])).await?;
        assert_eq!((large.status, large.code()), (413, "body-too-large"));
        let text = send(client.request(Method::POST, &path).body("{}")).await?;
        assert_eq!(text.status, 415);
        let nobody = post(&client.clone().with_token(""), &path, &json!({})).await?;
        assert_eq!((nobody.status, &nobody.body["detail"]), (401, &json!("Invalid token")));
        let waited =
            send(json(client, case(slice::from_ref(&file)).to_string().into()).header("prefer", "wait=1"))
                .await?;
        assert_eq!((waited.status, waited.code()), (504, "wait-ended"));
        ensure!(waited.header("location").contains("/fhir/_async/"), "{:?}", waited.headers);
        let missing = client.get(&format!("{root}/device/nothing")).await?;
        let method = client.get(&path).await?;
        assert_eq!((missing.status, method.status), (404, 405));
        for answer in [&large, &text, &nobody, &waited, &missing, &method] {
            ensure!(is_json(answer) && answer.body["detail"].is_string(), "{}", answer.text);
            ensure!(!answer.header("x-request-id").is_empty() && !answer.header("ratelimit").is_empty());
        }
        let later = send(
            json(client, case(slice::from_ref(&file)).to_string().into()).header("prefer", "respond-async"),
        );
        let later = later.await?;
        assert_eq!(later.status, 202, "{}", later.text);
        assert_eq!(client.get(&format!("/jobs/{}", later.job())).await?.body["status"], "queued");
    }
    lab.auth(&["user", "quota", "demo", "--requests", "6"])?;
    for root in ROOTS {
        let path = format!("{root}/diagnosis-support");
        let throttled =
            async || post(client, &path, &json!({})).await.ok().filter(|answer| answer.status == 429);
        let throttled = eventually("there are too many requests", Duration::from_secs(30), throttled).await?;
        ensure!(is_json(&throttled) && throttled.body["detail"].is_string(), "{}", throttled.text);
        ensure!(!throttled.header("retry-after").is_empty(), "{:?}", throttled.headers);
        assert_eq!(throttled.code(), "rate-exceeded");
    }
    lab.stop().await
}

// An image that only the worker can refuse is a refusal of the request, too.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_worker_refuses_has_the_same_form() -> Result<()> {
    let lab = Lab::start(Setup { workers: vec![Worker::simulated(1)], ..Setup::default() }).await?;
    let mut cut = sample_bytes("isic2017-nv.png");
    cut.truncate(cut.len() / 2);
    let body = case(&[sample_bytes("isic2017-nv.png"), cut]);
    let refused = post(lab.client(), "/diagnosis-support", &body).await?;
    assert_eq!((refused.status, refused.code()), (422, "image-undecodable"));
    let (kind, _, loc) = entry(&refused)?;
    assert_eq!((kind, loc), ("value_error", &json!(["body", "payload", 1, "contentAttachment", "data"])));
    lab.stop().await
}

/// A request of `/severity-assessment`: manual ones have a list of images, the others one.
fn assessment(is_manual: bool, site: &str, scores: &Value) -> Value {
    let image = attachment(&sample_bytes("isic2017-nv.png"));
    let coding = json!({
        "system": "https://icd.who.int/browse/2025-01/mms/en", "systemDisplay": "ICD-11", "version": "2025-01",
        "code": "2F20.Z", "display": "Melanocytic naevus, unspecified",
    });
    json!({
        "bodySite": site,
        "payload": if is_manual { json!([image]) } else { image },
        "knownCondition": { "conclusion": { "coding": [coding], "text": "Naevus" } },
        "scoringSystem": scores,
    })
}

fn answers(names: &[&str], values: &[u32]) -> Value {
    let item: serde_json::Map<_, _> =
        names.iter().zip(values).map(|(n, v)| ((*n).to_owned(), json!(v))).collect();
    json!({ "questionnaireResponse": { "item": item } })
}

const SCOVID: [&str; 10] = [
    "pain",
    "pruritus",
    "fever",
    "cough",
    "cephalea",
    "myalgiaOrArthralgia",
    "malaise",
    "lossOfTasteOrOlfactory",
    "shortnessOfBreath",
    "otherSkinProblems",
];
const SEVEN: [&str; 7] = [
    "changeInSize",
    "irregularPigmentation",
    "irregularBorder",
    "inflammation",
    "largerThanOtherLesions",
    "itchOrAlteredSensation",
    "crustingOrBleeding",
];
const QUESTIONS: [&str; 10] = [
    "question1",
    "question2",
    "question3",
    "question4",
    "question5",
    "question6",
    "question7",
    "question8",
    "question9",
    "question10",
];

/// Takes away what stands at a place, and says how the refusal names it.
fn without(mut body: Value, place: &str) -> (Value, Value) {
    let steps: Vec<&str> = place.split('.').collect();
    let number = |step: &str| step.parse::<usize>().ok();
    let mut at = &mut body;
    for step in &steps[..steps.len() - 1] {
        at = match number(step) {
            Some(number) => &mut at[number],
            None => &mut at[*step],
        };
    }
    let gone = at.as_object_mut().and_then(|members| members.remove(steps[steps.len() - 1]));
    assert!(gone.is_some(), "{place}");
    let steps =
        steps.into_iter().map(|step| number(step).map_or_else(|| json!(step), |number| json!(number)));
    (body, std::iter::once(json!("body")).chain(steps).collect())
}

/// Sends a request once without each of these.
async fn each_is_missed(client: &Client, path: &str, body: &Value, places: &[String]) -> Result<usize> {
    for place in places {
        let (body, loc) = without(body.clone(), place);
        let refused = post(client, path, &body).await?;
        assert_eq!(refused.status, 422, "{path} {place}: {}", refused.text);
        assert_eq!(entry(&refused)?, ("missing", "Field required", &loc), "{path} {place}");
    }
    Ok(places.len())
}

/// What every request has to have.
fn common(data: &str) -> Vec<String> {
    let coding = ["system", "systemDisplay", "code", "display"];
    let coding = coding.map(|name| format!("knownCondition.conclusion.coding.0.{name}"));
    let others = ["bodySite", data, "knownCondition.conclusion.text"].map(str::to_owned);
    coding.into_iter().chain(others).collect()
}

// 84 fields of the automatic scores and 41 of the manual ones, each missed by name.
#[tokio::test(flavor = "multi_thread")]
async fn every_missing_field_is_one_entry() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let automatic: [(&str, &[&str]); 11] = [
        ("aeasi", &["surface", "patientAge"]),
        ("agppga", &[]),
        ("aihs4", &[]),
        ("aladin", &[]),
        ("apasi", &["surface"]),
        ("asalt", &[]),
        ("ascorad", &["surface", "pruritus", "sleeplessness"]),
        ("auas", &["pruritus"]),
        ("avasi", &[]),
        ("awosi", &[]),
        ("nsil", &[]),
    ];
    let manual: [(&str, &[&str], usize); 3] =
        [("dlqi", &QUESTIONS, 10), ("pure4", &QUESTIONS[..4], 4), ("sevenPc", &SEVEN, 7)];
    for root in ROOTS {
        let (mut of_automatic, mut of_manual) = (0, 0);
        for (code, items) in automatic {
            let answered = if items.is_empty() { json!({}) } else { answers(items, &[1, 1, 1]) };
            let body = assessment(false, "headLeft", &json!({ code: answered }));
            let own =
                items.iter().map(|item| format!("scoringSystem.{code}.questionnaireResponse.item.{item}"));
            let places: Vec<_> = common("payload.contentAttachment.data").into_iter().chain(own).collect();
            let path = format!("{root}/severity-assessment/automatic/local");
            of_automatic += each_is_missed(lab.client(), &path, &body, &places).await?;
            let complete = post(lab.client(), &path, &body).await?;
            assert_eq!((complete.status, complete.code()), (501, "score-unsupported"), "{}", complete.text);
            ensure!(
                complete.body["detail"]
                    .as_str()
                    .is_some_and(|text| text.contains("/severity-assessment/manual"))
            );
        }
        for (code, items, count) in manual {
            let body = assessment(true, "armRight", &json!({ code: answers(items, &[1; 10]) }));
            let own =
                items.iter().map(|item| format!("scoringSystem.{code}.questionnaireResponse.item.{item}"));
            let places: Vec<_> = common("payload.0.contentAttachment.data").into_iter().chain(own).collect();
            assert_eq!(places.len(), 7 + count);
            let path = format!("{root}/severity-assessment/manual");
            of_manual += each_is_missed(lab.client(), &path, &body, &places).await?;
        }
        // One more of the manual ones than clients check.
        assert_eq!((of_automatic, of_manual), (84, 42));
    }
    lab.stop().await
}

// A condition without codes will do, a body site that does not fit will not, and an image is Base64.
#[tokio::test(flavor = "multi_thread")]
async fn scores_from_images_are_checked_and_not_computed() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    for root in ROOTS.map(|root| format!("{root}/severity-assessment/automatic")) {
        let mut body = assessment(false, "armRight", &json!({ "nsil": {} }));
        body["knownCondition"]["conclusion"]["coding"] = Value::Null;
        assert_eq!(post(lab.client(), &format!("{root}/local"), &body).await?.status, 501);
        let data = body["payload"]["contentAttachment"]["data"].as_str().unwrap_or_default();
        body["payload"]["contentAttachment"]["data"] = json!(format!("data:image/jpeg;base64,{data}"));
        let refused = post(lab.client(), &format!("{root}/local"), &body).await?;
        let place = json!(["body", "payload", "contentAttachment", "data"]);
        assert_eq!(entry(&refused)?, ("value_error", "Value error, Only base64 data is allowed", &place));
        let arm = assessment(false, "armLeft", &json!({ "asalt": {} }));
        let refused = post(lab.client(), &format!("{root}/local"), &arm).await?;
        assert_eq!((refused.status, entry(&refused)?.2), (422, &json!(["body", "bodySite"])));
        let zone = json!({ "payload": attachment(&sample_bytes("isic2017-nv.png")) });
        let mut body = assessment(false, "armLeft", &json!({ "apasi": { "item": { "armLeft": zone } } }));
        assert_eq!(post(lab.client(), &format!("{root}/global"), &body).await?.status, 501);
        body["scoringSystem"]["apasi"]["item"]["armLeft"] = json!({});
        let refused = post(lab.client(), &format!("{root}/global"), &body).await?;
        let place = json!(["body", "scoringSystem", "apasi", "item", "armLeft", "payload"]);
        assert_eq!(entry(&refused)?, ("missing", "Field required", &place));
    }
    lab.stop().await
}

// Scores from answers, with the answers.
#[tokio::test(flavor = "multi_thread")]
async fn scores_from_answers_are_computed() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let cases = [
        ("dlqi", &QUESTIONS[..], vec![1, 2, 3, 1, 2, 3, 1, 2, 3, 1], 19.0, "Very large effect", 3),
        ("pure4", &QUESTIONS[..4], vec![1, 0, 1, 0], 2.0, "Positive", 3),
        ("sevenPc", &SEVEN[..], vec![1, 1, 0, 1, 0, 0, 1], 6.0, "High risk", 3),
        (
            "scovid",
            &SCOVID[..],
            vec![7, 2, 3, 0, 1, 0, 0, 2, 0, 1],
            16.0,
            "Not graded: no bands are published",
            0,
        ),
    ];
    for path in [
        "/severity-assessment/manual",
        "/clinical/severity-assessment/manual",
        "/v1.0/severity-assessment/manual",
    ] {
        for (code, names, values, score, category, intensity) in &cases {
            let body = assessment(true, "armLeft", &json!({ *code: answers(names, values) }));
            let answer = post(lab.client(), path, &body).await?;
            assert_eq!(answer.status, 200, "{}", answer.text);
            assert_eq!(answer.body["resourceType"], "DiagnosticReport");
            assert_eq!(answer.header("content-language"), "en");
            ensure!(answer.body["analysisDuration"].as_f64().is_some_and(|seconds| seconds > 0.0));
            let told = &answer.body["patientEvolution"][*code];
            assert_eq!(told["score"]["value"].as_f64(), Some(*score));
            assert_eq!(
                told["score"]["interpretation"],
                json!({ "category": category, "intensity": intensity })
            );
            for (name, value) in names.iter().zip(values) {
                let item = &told["item"][name];
                assert_eq!(item["value"].as_f64(), Some(f64::from(*value)));
                ensure!(item["interpretation"].as_str().is_some_and(|text| !text.is_empty()));
                ensure!(item["code"]["text"].as_str().is_some_and(|text| !text.is_empty()));
                assert_eq!(item["code"]["coding"].as_array().map(Vec::len), Some(1));
                assert_eq!(item["code"]["coding"][0]["code"], *name);
            }
        }
        let mut body =
            assessment(true, "armLeft", &json!({ "uas": answers(&["pruritus", "wheals"], &[4, 1]) }));
        let refused = post(lab.client(), path, &body).await?;
        let place = json!(["body", "scoringSystem", "uas", "questionnaireResponse", "item", "pruritus"]);
        assert_eq!((refused.status, entry(&refused)?.2), (422, &place));
        body["scoringSystem"] = json!({ "resvech": answers(&["edges"], &[1]) });
        assert_eq!(post(lab.client(), path, &body).await?.status, 501);
        let body = assessment(true, "armLeft", &json!({ "uas": answers(&["pruritus", "wheals"], &[3, 1]) }));
        let request = lab.client().request(Method::POST, path).header("accept-language", "de-CH, fr;q=0.5");
        let answer = send(request.json(&body)).await?;
        assert_eq!(answer.header("content-language"), "de", "{}", answer.text);
        let told = &answer.body["patientEvolution"]["uas"];
        assert_eq!(told["score"]["interpretation"], json!({ "category": "Schwer", "intensity": 3 }));
        let itch = &told["item"]["pruritus"];
        assert_eq!((&itch["code"]["text"], &itch["interpretation"]), (&json!("Juckreiz"), &json!("Schwer")));
    }
    let assessed = "SELECT count(*) FROM auth.audit WHERE action = 'assess' AND detail ? 'scores'";
    assert_eq!(lab.count(assessed).await?, 15, "five scores at three paths");
    lab.stop().await
}

// What the device is, and what requests may name, the latter for everybody.
#[tokio::test(flavor = "multi_thread")]
async fn the_device_tells_what_it_is_and_takes() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (client, anonymous) = (lab.client(), lab.client().clone().with_token(""));
    for root in ROOTS {
        let information = client.get(&format!("{root}/device-information")).await?;
        assert_eq!(client.get(&format!("{root}/device/about")).await?.body, information.body);
        let about = &information.body;
        assert_eq!(about["manufacturer"]["name"], "Dermflow");
        for text in
            [&about["manufacturer"]["address"], &about["version"][0]["value"], &about["name"][0]["value"]]
        {
            ensure!(text.as_str().is_some_and(|text| !text.is_empty()), "{about}");
        }
        assert_eq!(about["limits"]["images"], 3);
        assert_eq!(anonymous.get(&format!("{root}/device/health")).await?.body["status"], "ready");
        let sites = anonymous.get(&format!("{root}/body-sites")).await?;
        let sites = sites.body.as_array().context("no list")?;
        assert_eq!(sites.len(), 34);
        for site in sites {
            ensure!(
                site["code"].is_string()
                    && ["en_GB", "es_ES", "de_DE", "fr_FR"]
                        .iter()
                        .all(|locale| site["name"][locale].is_string())
            );
        }
        let signs = anonymous.get(&format!("{root}/clinical-signs")).await?;
        assert_eq!(signs.body["erythema"]["es_ES"], "Eritema");
        let codes = async |query: &str| {
            let list = anonymous.get(&format!("{root}/questionnaires{query}")).await?;
            let list = list.body.as_array().cloned().unwrap_or_default();
            Ok::<_, anyhow::Error>(list.iter().map(|each| each["code"].clone()).collect::<Vec<_>>())
        };
        assert_eq!(codes("?pathology=EA90").await?, ["dlqi", "pasi", "pga", "pure4"]);
        assert_eq!(codes("?code=uct").await?, ["uct"]);
        assert_eq!(codes("").await?.len(), 11);
        let refused = anonymous.get(&format!("{root}/questionnaires?vendor=1")).await?;
        assert_eq!((refused.status, &refused.body["detail"][0]["loc"]), (400, &json!(["query"])));
    }
    lab.stop().await
}

// A line of a batch may name its body site as the device API does; the report has SNOMED CT's concept.
#[tokio::test(flavor = "multi_thread")]
async fn batches_take_the_same_body_sites() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let image =
        json!({ "data": STANDARD.encode(sample_bytes("isic2017-nv.png")), "body_site": "lowerLegRight" });
    let line = json!({ "custom_id": "a", "images": [image] }).to_string() + "\n";
    let upload =
        lab.client().request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let upload = send(upload.body(line)).await?;
    let lines: Vec<Value> = upload.text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let job = lines.iter().find_map(|line| line["job"].as_str()).with_context(|| upload.text.clone())?;
    let report = lab.client().poll(job, Duration::from_secs(30)).await?;
    let site = &observations(&report.body, "condition-distribution")[0]["bodySite"];
    assert_eq!((&site["coding"][0]["code"], &site["text"]), (&json!("32696007"), &json!("Right lower leg")));
    lab.stop().await
}
