//! What no log may hold: everything secret that a test has sent or was given, noted on the way, and what looks like it. And
//! what no test may cause.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::Write,
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::{Context, Result, ensure};
use dermflow_local::stack::programs;
use reqwest::{
    Request,
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use serde_json::Value;
use url::form_urlencoded;

/// Shorter values are met by chance.
const SHORTEST: usize = 10;
/// A piece of an image in Base64, which no other one has, and where it begins.
const PIECE: std::ops::Range<usize> = 200..260;
/// How JPEG, PNG and JWT begin in Base64, how JPEG and PNG begin as PostgreSQL prints bytes, and how the first line of every
/// private key in PEM ends.
const LOOKS: [&str; 7] =
    ["/9j/4", "iVBORw0KGgo", "eyJhbGci", "eyJ0eXAi", r"\xffd8ff", r"\x89504e47", "PRIVATE KEY-----"];
/// Whose logs are looked through: those of our programs, and of the servers that they use.
const PROGRAMS: [&str; 6] = ["ingress", "worker", "operate", "registration", "nats-server", "postgres"];
/// What PostgreSQL says when transactions wait for each other: one of them fails, and its caller waits a second for that.
const DEADLOCK: &str = "deadlock detected";
/// Members and fields whose values are secrets.
const SECRET: [&str; 9] = [
    "password",
    "access_token",
    "refresh_token",
    "client_secret",
    "session",
    "token",
    "assertion",
    "client_assertion",
    "secret",
];
/// Members that say who a patient is.
const PATIENT: [&str; 3] = ["subject", "identifier", "valueReference"];

/// In this process, which with nextest is one test's.
static NOTED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn note(secret: &str) {
    if secret.len() >= SHORTEST {
        NOTED.lock().unwrap_or_else(PoisonError::into_inner).insert(secret.to_owned());
    }
}

/// Notes what is secret in a request: its credentials, passwords, images and what names a patient.
pub(crate) fn note_request(request: &Request) {
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if let Some((_, credentials)) = header(AUTHORIZATION).split_once(' ') {
        note(credentials);
    }
    let Some(body) = request.body().and_then(reqwest::Body::as_bytes) else { return };
    if header(CONTENT_TYPE).contains("form") {
        for (name, value) in form_urlencoded::parse(body) {
            if SECRET.contains(&&*name) {
                note(&value);
            }
        }
    } else if let Ok(body) = serde_json::from_slice(body) {
        note_document(&body);
    } else {
        for line in body.split(|byte| *byte == b'\n') {
            let _ = serde_json::from_slice(line).map(|line: Value| note_document(&line));
        }
    }
}

/// Notes what is secret in a request's or an answer's body.
pub(crate) fn note_document(document: &Value) {
    match document {
        Value::Array(items) => items.iter().for_each(note_document),
        Value::Object(members) => {
            for (name, value) in members {
                match value {
                    Value::String(text) if SECRET.contains(&name.as_str()) => note(text),
                    Value::String(text) if name == "data" => {
                        note(
                            text.as_bytes()
                                .get(PIECE)
                                .and_then(|piece| str::from_utf8(piece).ok())
                                .unwrap_or_default(),
                        );
                    }
                    value if PATIENT.contains(&name.as_str()) => note_texts(value),
                    value => note_document(value),
                }
            }
        }
        _ => {}
    }
}

fn note_texts(value: &Value) {
    match value {
        // An id of ours may be logged, and is asked for with the same members.
        Value::String(text) if uuid::Uuid::try_parse(text).is_err() && !text.starts_with("http") => {
            note(text);
        }
        Value::Array(items) => items.iter().for_each(note_texts),
        Value::Object(members) => {
            members.iter().filter(|(name, _)| *name != "system").for_each(|(_, value)| note_texts(value));
        }
        _ => {}
    }
}

/// Notes the passwords and keys in a folder of state.
fn note_files(state: &Path) -> Result<()> {
    for entry in fs::read_dir(state)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".password") || name.starts_with("client-") && path.is_file() {
            note(fs::read_to_string(&path)?.trim());
        }
        if name == "password-pepper" || path.extension().is_some_and(|extension| extension == "key") {
            // Behind the id, which may be told.
            let file = fs::read_to_string(&path)?;
            file.lines().filter_map(|line| line.split_whitespace().last()).for_each(note);
        }
        if path.extension().is_some_and(|extension| extension == "pem") {
            note_private_keys(&fs::read_to_string(&path)?);
        }
        if name == "sealing" || name == "signing-keys" {
            note_files(&path)?;
        }
    }
    Ok(())
}

/// Notes each line of the private keys in a PEM file, which may have certificates as well.
fn note_private_keys(pem: &str) {
    let keys =
        pem.split("-----BEGIN ").filter(|part| part.lines().next().is_some_and(|of| of.contains("PRIVATE")));
    keys.flat_map(str::lines).filter(|line| !line.contains("-----")).for_each(note);
}

/// Looks through the logs of a system; adds to `logs-looked-at.txt`, beside the programs, how many bytes they are.
///
/// # Errors
/// When one of them holds what none may, which names the log and the line, not the secret; or when nothing was written.
pub(crate) fn look(state: &Path) -> Result<()> {
    note_files(state)?;
    let noted = NOTED.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut bytes = 0;
    for entry in fs::read_dir(state.join("log"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if PROGRAMS.iter().any(|program| name.starts_with(program)) {
            let log = fs::read(&path)?;
            bytes += log.len();
            let log = String::from_utf8_lossy(&log);
            leak(&log, &noted).with_context(|| path.display().to_string())?;
            ensure!(!log.contains(DEADLOCK), "{}: {DEADLOCK}", path.display());
        }
    }
    ensure!(bytes > 0, "the logs in {} are empty", state.display());
    let mut looked_at =
        OpenOptions::new().create(true).append(true).open(programs()?.join("logs-looked-at.txt"))?;
    // In one write, as other tests add to it at the same time.
    looked_at.write_all(format!("{bytes}\n").as_bytes())?;
    Ok(())
}

fn leak(log: &str, noted: &BTreeSet<String>) -> Result<()> {
    for secret in noted.iter().map(String::as_str).chain(LOOKS) {
        let at = log.find(secret);
        let line = at.map_or(0, |at| log[..at].matches('\n').count() + 1);
        ensure!(at.is_none(), "line {line} holds what no log may: {}…", &secret[..4]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_request_holds_is_found_in_a_log_and_nothing_else() {
        let image = "A".repeat(150) + &"bCdE1/".repeat(30);
        note_document(&json!({
            "resourceType": "Parameters",
            "parameter": [
                {"part": [{"valueAttachment": {"data": image}}]},
                {"name": "subject", "valueReference": {"identifier": {"system": "urn:clinic:patients", "value": "PSEUDONYM-77"}}},
            ],
            "identifier": "01890b7e-0000-7000-8000-000000000001",
            "password": "Zwölf grüne Kacheln",
        }));
        let certificate = "-----BEGIN CERTIFICATE-----\nMIIBcertificate\n-----END CERTIFICATE-----\n";
        let key = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIsecret\n-----END PRIVATE KEY-----\n";
        note_private_keys(&format!("{certificate}{key}"));
        let noted = NOTED.lock().unwrap().clone();
        for leaked in [
            "PSEUDONYM-77",
            "Zwölf grüne Kacheln",
            &image[100..300],
            "{\"x\":\"/9j/4AAQ\"}",
            "MC4CAQAwBQYDK2VwBCIEIsecret",
            "-----BEGIN EC PRIVATE KEY-----",
        ] {
            for before in ["", "and "] {
                let log = format!("one line\n{before}{leaked} another\n");
                let found = leak(&log, &noted).unwrap_err().to_string();
                assert!(found.starts_with("line 2 "), "{found}");
            }
        }
        let harmless = "01890b7e-0000-7000-8000-000000000001 urn:clinic:patients Parameters image/jpeg";
        assert!(leak(harmless, &noted).is_ok());
        assert!(leak(certificate, &noted).is_ok());
    }
}
