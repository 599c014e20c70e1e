//! One provider, at the other end of HTTPS.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use dermflow_auth::provider::{self, Identity, Introspection, KeySet, Provider, Source};
use dermflow_schemas::limits::{
    INTROSPECTION_PAUSE, INTROSPECTIONS, KEY_SET_INTERVAL, KEY_SET_PAUSE, KEY_SET_RETRY, KEY_SET_STALE,
    MAX_PROVIDER_BYTES, PROVIDER_CONNECT, PROVIDER_DEADLINE,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use prometheus::IntCounterVec;
use reqwest::{Certificate, Client, RequestBuilder, Response, StatusCode, Url, header};
use secrecy::ExposeSecret;
use time::OffsetDateTime;
use tokio::{
    sync::{Notify, Semaphore, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

/// RFC 6749 §2.3.1: what is in the header is encoded as in a form.
const FORM: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'*');

/// Why a provider says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silent {
    /// It does not answer.
    Away,
    /// It is asked as much as it may be.
    Busy,
}

/// A provider's keys.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    pub(super) set: Arc<KeySet>,
    /// Another one for each set that differs from the one before.
    pub(super) number: u64,
    /// When the provider was asked for them.
    of: Instant,
}

/// What came of asking for keys.
#[derive(Debug, Clone, Default)]
struct Looks {
    keys: Option<Keys>,
    /// When the last look began.
    last: Option<Instant>,
    failed: bool,
}

/// A provider, its keys, and how it is asked.
#[derive(Debug)]
pub(super) struct Remote {
    provider: Provider,
    http: Client,
    looks: watch::Sender<Looks>,
    /// Wakes up the task that looks.
    wanted: Notify,
    /// When it was woken up.
    woken: Mutex<Option<Instant>>,
    introspections: Semaphore,
    /// When it did not answer about a token.
    silent: Mutex<Option<Instant>>,
    questions: IntCounterVec,
}

impl Remote {
    /// # Errors
    /// When the file of its CA cannot be read.
    pub(super) fn new(provider: Provider, questions: IntCounterVec) -> anyhow::Result<Self> {
        let mut http = Client::builder()
            .https_only(true)
            // Where the provider wants to send us is not where staff has.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .connect_timeout(PROVIDER_CONNECT)
            .timeout(PROVIDER_DEADLINE);
        if let Some(file) = &provider.ca_file {
            let name = || file.display().to_string();
            let certificates = Certificate::from_pem_bundle(&std::fs::read(file).with_context(name)?);
            let certificates = certificates.with_context(name)?;
            ensure!(!certificates.is_empty(), "{}: no certificate", file.display());
            http = http.tls_certs_only(certificates);
        }
        Ok(Self {
            http: http.build()?,
            provider,
            looks: watch::Sender::default(),
            wanted: Notify::new(),
            woken: Mutex::default(),
            introspections: Semaphore::new(INTROSPECTIONS),
            silent: Mutex::default(),
            questions,
        })
    }

    pub(super) fn provider(&self) -> &Provider {
        &self.provider
    }

    /// The keys, unless they are too old to be relied on.
    pub(super) fn keys(&self) -> Option<Keys> {
        self.looks.borrow().keys.clone().filter(|keys| keys.of.elapsed() < KEY_SET_STALE)
    }

    /// The keys after a look at the provider's, if it may be asked, or was a moment ago.
    pub(super) async fn fresh_keys(&self) -> Result<Keys, Silent> {
        let woken = self.wake();
        let mut looks = self.looks.subscribe();
        let looked = looks.wait_for(|looks| looks.last.is_some_and(|last| last >= woken));
        // The look itself has a deadline; two of them, when one is under way.
        let failed = match timeout(2 * PROVIDER_DEADLINE, looked).await {
            Ok(Ok(looks)) => looks.failed,
            _ => true,
        };
        self.keys().filter(|_| !failed).ok_or(Silent::Away)
    }

    /// Wakes up the task that looks, and says when it was woken up last.
    fn wake(&self) -> Instant {
        let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        match *woken {
            Some(at) if at.elapsed() < KEY_SET_PAUSE => at,
            _ => {
                self.wanted.notify_one();
                *woken.insert(Instant::now())
            }
        }
    }

    /// Looks at the provider's keys until `stop`.
    pub(super) async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let Some(source) = &self.provider.keys else { return stop.cancelled().await };
        loop {
            let began = Instant::now();
            let look = tokio::select! {
                () = stop.cancelled() => return,
                look = self.look(source) => look,
            };
            let pause = if look.is_ok() { KEY_SET_INTERVAL } else { KEY_SET_RETRY };
            self.took(look, began);
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(pause) => {}
                () = self.wanted.notified() => {}
            }
        }
    }

    fn took(&self, look: anyhow::Result<KeySet>, began: Instant) {
        let issuer = &self.provider.issuer;
        self.count("keys", look.is_ok());
        self.looks.send_modify(|looks| {
            (looks.last, looks.failed) = (Some(began), look.is_err());
            match (look, &mut looks.keys) {
                (Ok(set), Some(keys)) if *keys.set == set => keys.of = began,
                (Ok(set), keys) => {
                    tracing::info!(issuer, keys = ?set, "the provider's keys");
                    let number = keys.as_ref().map_or(1, |keys| keys.number + 1);
                    *keys = Some(Keys { set: Arc::new(set), number, of: began });
                }
                (Err(error), _) => {
                    let error = format!("{error:#}");
                    tracing::warn!(issuer, error, "the provider's keys stay as they were, for a while");
                }
            }
        });
    }

    async fn look(&self, source: &Source) -> anyhow::Result<KeySet> {
        let url = match source {
            Source::Keys(url) => url.clone(),
            Source::Discovery(url) => {
                let description = self.get(url).await.context("description")?;
                provider::jwks_url(&description, &self.provider).map_err(anyhow::Error::msg)?
            }
        };
        Ok(KeySet::parse(&self.get(&url).await?, &self.provider)?)
    }

    async fn get(&self, url: &Url) -> anyhow::Result<Vec<u8>> {
        body(self.http.get(url.clone())).await
    }

    /// What the provider says of an opaque token at `now`; `None` when it is not good.
    pub(super) async fn ask(&self, token: &str, now: OffsetDateTime) -> Result<Option<Identity>, Silent> {
        let introspection = self.provider.introspection.as_ref().ok_or(Silent::Away)?;
        let permit = timeout(PROVIDER_CONNECT, self.introspections.acquire()).await;
        let _permit = permit.ok().and_then(Result::ok).ok_or(Silent::Busy)?;
        if self.silent().is_some_and(|since| since.elapsed() < INTROSPECTION_PAUSE) {
            return Err(Silent::Away);
        }
        let (issuer, answer) = (&self.provider.issuer, self.introspect(introspection, token).await);
        self.count("introspection", answer.is_ok());
        let answer = answer.map_err(|error| {
            let error = format!("{error:#}");
            tracing::warn!(issuer, error, "the provider does not answer about a token");
            *self.silent.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            Silent::Away
        })?;
        let Some(answer) = answer else { return Ok(None) };
        match self.provider.described(token, &answer, now) {
            Ok(identity) => Ok(Some(identity)),
            Err(Some(refusal)) => {
                tracing::info!(%refusal, "an opaque token is refused");
                Ok(None)
            }
            // About this token: the others' are asked about all the same.
            Err(None) => {
                tracing::warn!(issuer, "the provider's answer about a token is none of RFC 7662");
                Err(Silent::Away)
            }
        }
    }

    fn silent(&self) -> Option<Instant> {
        *self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer; `None` when the provider cannot make anything of the token.
    async fn introspect(&self, at: &Introspection, token: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let encode = |text: &str| utf8_percent_encode(text, FORM).to_string();
        let secret = encode(at.client_secret.expose_secret());
        let form = [("token", token), ("token_type_hint", "access_token")];
        let request = self.http.post(at.url.clone()).basic_auth(encode(&at.client_id), Some(secret));
        let (status, answer) = answer(request.form(&form)).await?;
        ensure!([StatusCode::OK, StatusCode::BAD_REQUEST].contains(&status), "status {status}");
        Ok((status == StatusCode::OK).then_some(answer))
    }

    fn count(&self, kind: &str, is_answered: bool) {
        let outcome = if is_answered { "answered" } else { "failed" };
        self.questions.with_label_values(&[self.provider.issuer.as_str(), kind, outcome]).inc();
    }
}

/// The body of an answer with status 200.
async fn body(request: RequestBuilder) -> anyhow::Result<Vec<u8>> {
    let (status, body) = answer(request).await?;
    ensure!(status == StatusCode::OK, "status {status}");
    Ok(body)
}

/// Status and body, within bounds of size and time.
async fn answer(request: RequestBuilder) -> anyhow::Result<(StatusCode, Vec<u8>)> {
    let read = async {
        let mut response = request.header(header::ACCEPT, "application/json").send().await.map_err(bare)?;
        Ok((response.status(), read(&mut response).await?))
    };
    timeout(PROVIDER_DEADLINE + Duration::from_millis(100), read).await.context("no answer in time")?
}

async fn read(response: &mut Response) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(bare)? {
        ensure!(bytes.len() + chunk.len() <= MAX_PROVIDER_BYTES, "the answer is too long");
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Without the URL, which is in the configuration.
fn bare(error: reqwest::Error) -> reqwest::Error {
    error.without_url()
}
