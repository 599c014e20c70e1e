//! I4: images and reports are sealed at rest; logs hold no image, token, password or patient field.

use std::{fs, path::Path};

use anyhow::Result;
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_tests::{
    client::{sample, sample_bytes},
    lab::{Lab, Setup, Worker},
};
use serde_json::json;

const PATIENT: &str = "PSEUDONYM-81237";

// After jobs of every outcome at the most talkative level, nothing of them is in any log or on any disk.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_patient_is_logged_or_stored_in_clear() -> Result<()> {
    let workers = vec![Worker::derm7()];
    let mut lab = Lab::start(Setup { workers, log: Some("trace"), ..Setup::default() }).await?;
    let image = sample_bytes("ham10000-mel.jpg");
    let base64 = STANDARD.encode(&image);
    let mut request = sample("ham10000-mel.jpg");
    request["parameter"].as_array_mut().unwrap().push(
        json!({"name": "subject", "valueReference": {"identifier": {"value": PATIENT}, "display": PATIENT}}),
    );
    let report = lab.client().analyze(&request, &[]).await?;
    assert_eq!(report.status, 200);
    assert!(report.text.contains(PATIENT), "the report is the caller's own");
    let anonymous = lab.client().clone().with_token("");
    anonymous.try_login("demo", "a-wrong-password-81237").await?;
    let mut bad = request.clone();
    bad["parameter"][0]["part"][0]["valueAttachment"]["data"] = json!(format!("{base64}!"));
    assert_eq!(lab.client().analyze(&bad, &[]).await?.status, 422);
    lab.client().clone().with_token(&format!("{}x", lab.client().token())).get("/jobs/x").await?;
    lab.kill_worker(0).await?;
    lab.client().submit(&request).await?;

    let password = lab.password("demo")?;
    let token = lab.client().token().to_owned();
    let secrets = [&base64[200..260], PATIENT, "a-wrong-password-81237", &password, &token[100..160]];
    let logs = lab.logs()?;
    assert!(logs.len() > 10_000, "the logs are too short to show anything: {} bytes", logs.len());
    for secret in secrets {
        assert!(!logs.contains(secret), "a log holds {}…", &secret[..6]);
    }
    // From the entropy-coded part, which no other file has by chance.
    let pixels = &image[image.len() - 400..image.len() - 360];
    for folder in lab.storage() {
        search(&folder, &[pixels, &base64.as_bytes()[200..260], PATIENT.as_bytes()])?;
    }
    lab.stop().await
}

// Fails when a file below `folder` holds one of `needles`.
fn search(folder: &Path, needles: &[&[u8]]) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            search(&path, needles)?;
        } else if let Ok(bytes) = fs::read(&path) {
            for needle in needles {
                let found = bytes.windows(needle.len()).any(|window| window == *needle);
                assert!(!found, "{} holds patient data in clear", path.display());
            }
        }
    }
    Ok(())
}

// Every test looks through its logs at its end: with one that holds a secret which the client has sent, it fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_leak_into_a_log_is_found_at_the_end_of_any_test() -> Result<()> {
    for leaked in [0, 1, 2] {
        let lab = Lab::start(Setup::without_workers()).await?;
        let mut request = sample("ham10000-mel.jpg");
        request["parameter"]
            .as_array_mut()
            .unwrap()
            .push(json!({"name": "subject", "valueReference": {"identifier": {"value": PATIENT}}}));
        lab.client().submit(&request).await?;
        let image = STANDARD.encode(sample_bytes("ham10000-mel.jpg"))[100..600].to_owned();
        let secret = [lab.client().token().to_owned(), image, PATIENT.to_owned()][leaked].clone();
        let folder = lab.log_folder();
        let log = folder.join("ingress-1.log");
        let written = fs::read_to_string(&log)?;
        fs::write(&log, format!("{written}{{\"message\":\"a caller sent {secret} to us\"}}\n"))?;
        let found = lab.stop().await.unwrap_err();
        assert!(format!("{found:#}").contains("holds what no log may"), "{found:#}");
        fs::remove_dir_all(folder.parent().unwrap())?;
    }
    Ok(())
}
