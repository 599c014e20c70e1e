//! A small client of the HTTP API: signs in, submits an image, waits or polls, reads the report.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use reqwest::{Method, Response, StatusCode, header::HeaderMap};
use rustls::{
    ClientConfig, RootCertStore,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

/// How long a job may take in all.
const JOB_WITHIN: Duration = Duration::from_mins(2);
/// The FHIR operation.
pub const ANALYZE: &str = "/fhir/DiagnosticReport/$analyze";

/// A finished job.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The report (FHIR R4 `DiagnosticReport`).
    pub report: Value,
    /// Phases and their milliseconds, from the `Server-Timing` header.
    pub timing: Vec<(String, f64)>,
}

impl Answer {
    /// The report's id, which is the job's.
    pub fn id(&self) -> &str {
        self.report["id"].as_str().unwrap_or("?")
    }

    /// Milliseconds of a phase: `queue`, `model` or `total`.
    pub fn phase(&self, name: &str) -> Option<f64> {
        self.timing.iter().find(|(phase, _)| phase == name).map(|(_, ms)| *ms)
    }

    /// The conditions and their probabilities in percent, the most likely one first.
    pub fn conditions(&self) -> Vec<(String, f64)> {
        let contained = self.report["contained"].as_array().map_or(&[][..], Vec::as_slice);
        let distribution = contained.iter().find(|resource| {
            let coding = resource["code"]["coding"].as_array().map_or(&[][..], Vec::as_slice);
            coding.iter().any(|coding| coding["code"] == "condition-distribution")
        });
        let components = distribution.and_then(|found| found["component"].as_array());
        let mut conditions: Vec<_> = components
            .into_iter()
            .flatten()
            .filter_map(|part| {
                Some((part["code"]["text"].as_str()?.to_owned(), part["valueQuantity"]["value"].as_f64()?))
            })
            .collect();
        conditions.sort_by(|a, b| b.1.total_cmp(&a.1));
        conditions
    }
}

/// A client that trusts one CA, and is signed in after [`Client::login`].
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    token: String,
}

impl Client {
    /// A client of the `ingress` at `base`.
    ///
    /// # Errors
    /// When the CA's certificate cannot be read.
    pub fn new(base: &str, ca: &Path) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(ca).context("cannot read the certificate of the CA")?;
        roots.add(ca).context("cannot use the certificate of the CA")?;
        let tls = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .timeout(JOB_WITHIN)
            .no_proxy()
            .build()?;
        Ok(Self { http, base: base.to_owned(), token: String::new() })
    }

    /// Signs in.
    ///
    /// # Errors
    /// When the name or the password is wrong, or ingress does not answer.
    pub async fn login(&mut self, username: &str, password: &str) -> Result<()> {
        let form = [("username", username), ("password", password)];
        let response = self.http.post(format!("{}/login", self.base)).form(&form).send().await?;
        let body = body(response, StatusCode::OK).await.context("cannot sign in")?;
        body["access_token"].as_str().context("the answer holds no token")?.clone_into(&mut self.token);
        Ok(())
    }

    /// Submits one image and returns its report: in the same answer, or by polling from the start.
    ///
    /// # Errors
    /// When the job fails, is refused, or takes more than two minutes.
    pub async fn analyze(&self, image: &Path, polling: bool) -> Result<Answer> {
        let deadline = Instant::now() + JOB_WITHIN;
        let mut request = self
            .http
            .post(format!("{}{ANALYZE}", self.base))
            .header("content-type", "application/fhir+json")
            .body(parameters(image)?.to_string());
        if polling {
            request = request.header("prefer", "respond-async");
        }
        let mut response = request.bearer_auth(&self.token).send().await?;
        let status_url = header(response.headers(), "content-location").unwrap_or_default().to_owned();
        while response.status() == StatusCode::ACCEPTED {
            ensure!(Instant::now() < deadline, "the job is still not done after {} s", JOB_WITHIN.as_secs());
            let pause = header(response.headers(), "retry-after").and_then(|text| text.parse().ok());
            sleep(Duration::from_secs(pause.unwrap_or(1).min(5))).await;
            response = self.http.request(Method::GET, &status_url).bearer_auth(&self.token).send().await?;
        }
        let timing = header(response.headers(), "server-timing").map(parse_timing).unwrap_or_default();
        let report = body(response, StatusCode::OK).await.context("the image was not analysed")?;
        Ok(Answer { report, timing })
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `queue;dur=1.5, model;dur=20` (W3C Server Timing §2).
fn parse_timing(text: &str) -> Vec<(String, f64)> {
    let phase = |metric: &str| {
        let mut parts = metric.split(';').map(str::trim);
        let name = parts.next()?.to_owned();
        Some((name, parts.find_map(|part| part.strip_prefix("dur="))?.parse().ok()?))
    };
    text.split(',').filter_map(phase).collect()
}

/// The JSON body; an unexpected status is an error that quotes the beginning of it.
async fn body(response: Response, expected: StatusCode) -> Result<Value> {
    let status = response.status();
    let text = response.text().await?;
    if status != expected {
        bail!("ingress answered {status}: {}", text.chars().take(300).collect::<String>());
    }
    serde_json::from_str(&text).context("ingress answered something else than JSON")
}

/// The request body for one image.
fn parameters(image: &Path) -> Result<Value> {
    let bytes = std::fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let content = json!({ "contentType": content_type(image), "data": STANDARD.encode(bytes) });
    Ok(json!({
        "resourceType": "Parameters",
        "parameter": [{ "name": "image", "part": [{ "name": "content", "valueAttachment": content }] }],
    }))
}

/// The media type that goes with the file's name.
pub fn content_type(image: &Path) -> &'static str {
    if image.extension().is_some_and(|extension| extension == "png") { "image/png" } else { "image/jpeg" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_and_conditions_are_read() {
        let component =
            |text: &str, value: f64| json!({ "code": { "text": text }, "valueQuantity": { "value": value } });
        let answer = Answer {
            report: json!({ "id": "r1", "contained": [
                { "resourceType": "Device" },
                { "code": { "coding": [{ "code": "condition-distribution" }] },
                  "component": [component("nevus", 12.5), component("melanoma", 80.25), component("other", 7.25)] },
            ] }),
            timing: parse_timing("queue;dur=1.5, model;desc=\"x\";dur=20, odd, total;dur=30.25"),
        };
        assert_eq!(answer.conditions()[0], ("melanoma".into(), 80.25));
        assert_eq!(answer.conditions().len(), 3);
        assert_eq!((answer.phase("queue"), answer.phase("model")), (Some(1.5), Some(20.0)));
        assert_eq!((answer.phase("total"), answer.phase("odd"), answer.id()), (Some(30.25), None, "r1"));
    }
}
