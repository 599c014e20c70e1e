//! A client of the API, as an integrator would write it.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use reqwest::{Method, RequestBuilder, StatusCode, header::HeaderMap};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};

use crate::{secrets, wait::eventually};

/// The media type of requests.
pub const FHIR_JSON: &str = "application/fhir+json";

/// An answer, read whole.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, as it came.
    pub text: String,
    /// The body as JSON; null when it is none.
    pub body: Value,
}

impl Answer {
    /// A header's text; empty when absent.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The stable code of an error answer, in either form.
    pub fn code(&self) -> &str {
        let outcome = self.body["issue"][0]["details"]["coding"][0]["code"].as_str();
        outcome.or(self.body["code"].as_str()).unwrap_or_default()
    }

    /// Every fault's code and element.
    pub fn faults(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let issue =
            |issue: &Value| (text(&issue["details"]["coding"][0]["code"]), text(&issue["expression"][0]));
        self.body["issue"].as_array().map(|issues| issues.iter().map(issue).collect()).unwrap_or_default()
    }

    /// The job that the answer is about: the last segment of `Content-Location`.
    pub fn job(&self) -> &str {
        self.header("content-location").rsplit('/').next().unwrap_or_default()
    }
}

/// A signed-in client of one ingress process.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    token: String,
}

impl Client {
    /// A client that trusts the CA at `ca` only, not signed in.
    ///
    /// # Errors
    /// When the CA cannot be read.
    pub fn new(ca: &Path, base: &str) -> anyhow::Result<Self> {
        Self::build(ca, base, None, None, &[])
    }

    /// The same, which speaks HTTP/2 only: all of its requests share one connection.
    ///
    /// # Errors
    /// When the CA cannot be read.
    pub fn over_http2(ca: &Path, base: &str) -> anyhow::Result<Self> {
        Self::build(ca, base, None, None, &[b"h2"])
    }

    /// The same, from another address of this machine: of 127.0.0.0/8, Linux lets a client take any.
    ///
    /// # Errors
    /// When the CA cannot be read.
    pub fn from_source(ca: &Path, base: &str, source: IpAddr) -> anyhow::Result<Self> {
        Self::build(ca, base, Some(source), None, &[])
    }

    /// The same, which shows a certificate (mutual TLS) of the given PEM file, with its key.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn with_certificate(ca: &Path, base: &str, certificate: &Path, key: &Path) -> anyhow::Result<Self> {
        Self::build(ca, base, None, Some((certificate, key)), &[])
    }

    /// The same over HTTP/2.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn with_certificate_over_http2(
        ca: &Path,
        base: &str,
        certificate: &Path,
        key: &Path,
    ) -> anyhow::Result<Self> {
        Self::build(ca, base, None, Some((certificate, key)), &[b"h2"])
    }

    fn build(
        ca: &Path,
        base: &str,
        source: Option<IpAddr>,
        identity: Option<(&Path, &Path)>,
        alpn: &[&[u8]],
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_file_iter(ca)? {
            roots.add(certificate?)?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut tls = match identity {
            Some((certificate, key)) => {
                let chain = vec![CertificateDer::from_pem_file(certificate)?];
                tls.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
            }
            None => tls.with_no_client_auth(),
        };
        tls.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(90))
            .local_address(source)
            .build()?;
        Ok(Self { http, base: base.trim_end_matches('/').into(), token: String::new() })
    }

    /// The same client with another token.
    #[must_use]
    pub fn with_token(mut self, token: &str) -> Self {
        token.clone_into(&mut self.token);
        self
    }

    /// The same client, talking to another replica.
    #[must_use]
    pub fn at(mut self, base: &str) -> Self {
        base.trim_end_matches('/').clone_into(&mut self.base);
        self
    }

    /// The access token.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Signs in.
    ///
    /// # Errors
    /// When the answer is not a token.
    pub async fn login(self, username: &str, password: &str) -> anyhow::Result<Self> {
        let answer = self.try_login(username, password).await?;
        ensure!(answer.status == 200, "login: {} {}", answer.status, answer.text);
        let token = answer.body["access_token"].as_str().context("no access_token")?.to_owned();
        Ok(self.with_token(&token))
    }

    /// Tries to sign in, and shows what came of it.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn try_login(&self, username: &str, password: &str) -> anyhow::Result<Answer> {
        let form = [("username", username), ("password", password)];
        send(self.http.post(format!("{}/login", self.base)).form(&form)).await
    }

    /// A request to a path, or to an absolute URL, with the token.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = if path.starts_with("https://") { path.to_owned() } else { format!("{}{path}", self.base) };
        let request = self.http.request(method, url);
        if self.token.is_empty() { request } else { request.bearer_auth(&self.token) }
    }

    /// `GET`.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<Answer> {
        send(self.request(Method::GET, path)).await
    }

    /// `DELETE`.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn delete(&self, path: &str) -> anyhow::Result<Answer> {
        send(self.request(Method::DELETE, path)).await
    }

    /// `$analyze` with further headers.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn analyze(&self, parameters: &Value, headers: &[(&str, &str)]) -> anyhow::Result<Answer> {
        self.analyze_raw(parameters.to_string(), headers).await
    }

    /// `$analyze` with any body.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn analyze_raw(&self, body: String, headers: &[(&str, &str)]) -> anyhow::Result<Answer> {
        let mut request = self.request(Method::POST, "/fhir/DiagnosticReport/$analyze");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
            request = request.header("content-type", FHIR_JSON);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        send(request.body(body)).await
    }

    /// Submits without waiting, and returns the job's id.
    ///
    /// # Errors
    /// When the job is not accepted.
    pub async fn submit(&self, parameters: &Value) -> anyhow::Result<String> {
        let answer = self.analyze(parameters, &[("prefer", "respond-async")]).await?;
        ensure!(answer.status == 202, "submit: {} {}", answer.status, answer.text);
        Ok(answer.job().to_owned())
    }

    /// Polls until the job has ended.
    ///
    /// # Errors
    /// When it has not after `within`.
    pub async fn poll(&self, job: &str, within: Duration) -> anyhow::Result<Answer> {
        let path = format!("/fhir/_async/{job}");
        let ended = async || match self.get(&path).await {
            Ok(answer) if ![202, 429, 503].contains(&answer.status) => Some(answer),
            _ => None,
        };
        eventually(&format!("job {job} ends"), within, ended).await
    }
}

/// Sends a request and reads the answer whole. What is secret in them no log may hold.
///
/// # Errors
/// When there is no answer.
pub async fn send(request: RequestBuilder) -> anyhow::Result<Answer> {
    let (client, request) = request.build_split();
    let request = request?;
    secrets::note_request(&request);
    let response = client.execute(request).await?;
    let (status, headers) = (response.status(), response.headers().clone());
    let text = response.text().await?;
    let body = serde_json::from_str(&text).unwrap_or_default();
    secrets::note_document(&body);
    Ok(Answer { status: StatusCode::as_u16(&status), headers, text, body })
}

/// The Parameters of `$analyze` for image files.
pub fn parameters(images: &[Vec<u8>]) -> Value {
    let image = |bytes: &Vec<u8>| {
        let attachment = json!({"contentType": "image/jpeg", "data": STANDARD.encode(bytes)});
        json!({"name": "image", "part": [{"name": "content", "valueAttachment": attachment}]})
    };
    json!({"resourceType": "Parameters", "parameter": images.iter().map(image).collect::<Vec<_>>()})
}

/// The Parameters of `$analyze` for one sample image.
pub fn sample(name: &str) -> Value {
    parameters(&[sample_bytes(name)])
}

/// A sample image's file.
///
/// # Panics
/// When there is none of this name.
pub fn sample_bytes(name: &str) -> Vec<u8> {
    let path = format!("{}/images/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The contained Observations of a report with this code.
pub fn observations<'a>(report: &'a Value, code: &str) -> Vec<&'a Value> {
    let contained = report["contained"].as_array().map(Vec::as_slice).unwrap_or_default();
    let matches = |resource: &&Value| {
        resource["resourceType"] == "Observation" && resource["code"]["coding"][0]["code"] == code
    };
    contained.iter().filter(matches).collect()
}

/// The classes of a condition distribution, in per cent, in the order of the report.
pub fn distribution(observation: &Value) -> Vec<(String, f64)> {
    let class = |component: &Value| {
        let codings = component["code"]["coding"].as_array()?;
        let code = codings.iter().find_map(|coding| coding["code"].as_str()?.strip_prefix("class-"))?;
        Some((code.to_owned(), component["valueQuantity"]["value"].as_f64()?))
    };
    observation["component"].as_array().map(|all| all.iter().filter_map(class).collect()).unwrap_or_default()
}
