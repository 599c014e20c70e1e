//! What Debian's Pebble does not have: an ACME directory with renewal information (RFC 9773), in front of the real server.
//!
//! Everything but that goes to Pebble and comes back as it is; as Pebble goes by the `Host` of a request, its URLs are
//! those of this server, and what is signed for one is good at the other.

use std::{
    fmt::Write,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_schemas::clock;
use reqwest::{Method, StatusCode};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use crate::{lab::Lab, pebble::Pebble};

/// The seconds of its `Retry-After`.
pub const RETRY_AFTER: i64 = 7_200;

/// What it says, and what it was told.
#[derive(Debug)]
struct Told {
    window: [OffsetDateTime; 2],
    /// What it was asked about.
    asked: Vec<String>,
    /// What orders replace.
    replaced: Vec<Value>,
}

/// A running server. Dropping it stops it.
#[derive(Debug)]
pub struct Directory {
    url: String,
    told: Arc<Mutex<Told>>,
    serving: JoinHandle<()>,
}

impl Drop for Directory {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Directory {
    /// Starts one in front of `pebble`, which suggests a window that begins and ends so long from now.
    ///
    /// # Errors
    /// When there is no port for it.
    pub async fn start(lab: &Lab, pebble: &Pebble, window: [Duration; 2]) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let host = format!("localhost:{}", listener.local_addr()?.port());
        let chain = vec![CertificateDer::from_pem_file(&lab.pki().cert)?];
        let key = PrivateKeyDer::from_pem_file(&lab.pki().key)?;
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let ca = reqwest::Certificate::from_pem(&std::fs::read(lab.ca())?)?;
        let http = reqwest::Client::builder().tls_certs_only([ca]).http1_only().build()?;
        let window = window.map(|from_now| clock::now() + from_now);
        let told = Arc::new(Mutex::new(Told { window, asked: Vec::new(), replaced: Vec::new() }));
        let front = Front { host: host.clone(), behind: pebble.origin(), http, told: told.clone() };
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, front) = (acceptor.clone(), front.clone());
                tokio::spawn(async move {
                    // Who breaks off has its reasons.
                    let _ = front.serve(acceptor, stream).await;
                });
            }
        });
        Ok(Self { url: format!("https://{host}/dir"), told, serving })
    }

    /// The URL of the directory.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Suggests another window.
    pub fn suggest(&self, window: [Duration; 2]) -> [OffsetDateTime; 2] {
        let window = window.map(|from_now| clock::now() + from_now);
        self.told.lock().unwrap_or_else(PoisonError::into_inner).window = window;
        window
    }

    /// The certificates that it was asked about, and those that orders replaced; an order without is null.
    pub fn told(&self) -> (Vec<String>, Vec<Value>) {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        (told.asked.clone(), told.replaced.clone())
    }
}

#[derive(Clone)]
struct Front {
    host: String,
    behind: String,
    http: reqwest::Client,
    told: Arc<Mutex<Told>>,
}

impl Front {
    /// One request on each connection.
    async fn serve(&self, acceptor: TlsAcceptor, stream: TcpStream) -> Result<()> {
        let mut stream = BufReader::new(acceptor.accept(stream).await?);
        let (mut lines, mut line) = (Vec::new(), String::new());
        while stream.read_line(&mut line).await? > 2 {
            lines.push(std::mem::take(&mut line));
        }
        let field = |name: &str| {
            let found = lines.iter().find_map(|line| {
                let (field, value) = line.split_once(':')?;
                field.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            });
            found.unwrap_or_default()
        };
        let mut words = lines.first().context("no request")?.split(' ');
        let (method, path) = (words.next().context("no method")?, words.next().context("no path")?);
        let mut body = vec![0; field("content-length").parse().unwrap_or(0)];
        stream.read_exact(&mut body).await?;
        let (head, body) = match path.strip_prefix("/renewal-info/") {
            Some(certificate) => self.renewal_info(certificate)?,
            None => self.pass(method, path, &field("content-type"), body).await?,
        };
        let head = format!("HTTP/1.1 {head}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).await?;
        if method != "HEAD" {
            stream.write_all(&body).await?;
        }
        Ok(stream.shutdown().await?)
    }

    fn renewal_info(&self, certificate: &str) -> Result<(String, Vec<u8>)> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.asked.push(certificate.to_owned());
        let [start, end] = told.window;
        let window = json!({"start": start.format(&Rfc3339)?, "end": end.format(&Rfc3339)?});
        let head = format!("200 OK\r\nContent-Type: application/json\r\nRetry-After: {RETRY_AFTER}\r\n");
        Ok((head, json!({ "suggestedWindow": window }).to_string().into_bytes()))
    }

    async fn pass(&self, method: &str, path: &str, kind: &str, body: Vec<u8>) -> Result<(String, Vec<u8>)> {
        let replaces = replaced(path, &body)?;
        let request =
            self.http.request(Method::from_bytes(method.as_bytes())?, format!("{}{path}", self.behind));
        let request = request.header("host", &self.host).header("content-type", kind).body(body);
        let answer = request.send().await?;
        let status = answer.status();
        let mut head = format!("{status}\r\n");
        for (name, value) in answer.headers() {
            if !["content-length", "connection", "transfer-encoding"].contains(&name.as_str()) {
                write!(head, "{name}: {}\r\n", value.to_str()?)?;
            }
        }
        let mut body = answer.bytes().await?.to_vec();
        let mut change = |name: &str, value: Value| -> Result<()> {
            let mut document: Value = serde_json::from_slice(&body)?;
            document[name] = value;
            body = document.to_string().into_bytes();
            Ok(())
        };
        if path == "/dir" {
            change("renewalInfo", json!(format!("https://{}/renewal-info", self.host)))?;
        }
        // One that is refused, for its nonce for example, is sent again. RFC 9773 §5: who takes it repeats it.
        if let Some(replaces) = replaces.filter(|_| status == StatusCode::CREATED) {
            self.told.lock().unwrap_or_else(PoisonError::into_inner).replaced.push(replaces.clone());
            if !replaces.is_null() {
                change("replaces", replaces)?;
            }
        }
        Ok((head, body))
    }
}

/// What an order replaces, if this is one.
fn replaced(path: &str, body: &[u8]) -> Result<Option<Value>> {
    if path != "/order-plz" {
        return Ok(None);
    }
    let signed: Value = serde_json::from_slice(body)?;
    let payload = URL_SAFE_NO_PAD.decode(signed["payload"].as_str().context("no payload")?)?;
    Ok(Some(serde_json::from_slice::<Value>(&payload)?["replaces"].clone()))
}
