//! Access to a server: TLS, signing in and staying so, one request and what became of it.

use std::{
    error::Error as _,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use dermflow_schemas::process::read_secret;
use reqwest::{Certificate, Method, RequestBuilder, Response, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use crate::{Failure, pace};

/// A connection, TLS included.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// The head of an answer. The server itself may wait for a minute before it answers.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(90);
/// Tries of a request that a person waits for.
const TRIES: u32 = 4;

/// How to reach the server, and as whom.
#[derive(Debug, Clone)]
pub struct AccessOptions {
    /// The server's origin, such as `https://dermflow.example.org`.
    pub url: String,
    /// A PEM file with the CA to trust, instead of those that the system trusts.
    pub ca: Option<PathBuf>,
    /// The name to sign in with.
    pub user: String,
    /// A file that holds the password.
    pub password_file: PathBuf,
}

fn origin(text: &str) -> Result<String, Failure> {
    if text.starts_with("https://") {
        Ok(text.trim_end_matches('/').to_owned())
    } else {
        let why = "images and passwords do not travel in clear text";
        Err(Failure::Usage(format!("{text} is no https:// origin: {why}")))
    }
}

/// Why a request did not do what it should.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The same request may be sent again, after this time when the server names one.
    Again(Option<Duration>, String),
    /// The same request would fail again. The status is absent when there was no answer.
    Final(Option<u16>, String),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Again(_, what) | Trouble::Final(_, what) => Self::Unfinished(what),
        }
    }
}

/// A token, and when to fetch the next one.
#[derive(Debug)]
struct Session {
    token: SecretString,
    renew_at: Instant,
}

/// A signed-in client of one server.
#[derive(Debug)]
pub struct Api {
    http: reqwest::Client,
    /// Where it signs in.
    login: String,
    base: String,
    user: String,
    password: SecretString,
    session: Mutex<Option<Session>>,
}

impl Api {
    /// A client; it signs in with its first request.
    ///
    /// # Errors
    /// [`Failure::Usage`] when the CA or the password cannot be read, or the URL is no HTTPS origin.
    pub fn new(options: &AccessOptions) -> Result<Self, Failure> {
        // Fails only when the process has a provider already.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let usage = |error: io::Error| Failure::Usage(format!("cannot read the password: {error}"));
        let password = read_secret(&options.password_file).map_err(usage)?;
        // HTTP/1.1, so that connections share nothing: with HTTP/2 all uploads would take turns on one.
        let mut http = reqwest::Client::builder()
            .http1_only()
            .connect_timeout(CONNECT_WITHIN)
            .redirect(reqwest::redirect::Policy::none());
        if let Some(ca) = &options.ca {
            http = http.tls_certs_only(certificates(ca)?);
        }
        let http = http.build().map_err(|error| Failure::Usage(described(&error)))?;
        let (base, user) = (origin(&options.url)?, options.user.clone());
        Ok(Self { http, login: base.clone(), base, user, password, session: Mutex::new(None) })
    }

    /// The same client of another server, which takes the tokens of this one.
    ///
    /// # Errors
    /// [`Failure::Usage`] when the URL is no HTTPS origin.
    pub fn at(self, url: &str) -> Result<Self, Failure> {
        Ok(Self { base: origin(url)?, ..self })
    }

    /// The server's origin.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends a request to a path of the server, signing in before when needed and again after a 401; `dress` adds
    /// headers and body and may be called twice.
    ///
    /// # Errors
    /// When the answer is not 2xx, or there is none.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        mut dress: impl FnMut(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, Trouble> {
        let url = format!("{}{path}", self.base);
        let token = self.token().await?;
        let request =
            |token: &SecretString| self.http.request(method.clone(), &url).bearer_auth(token.expose_secret());
        let response = answer(dress(request(&token))).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return checked(response).await;
        }
        // The token ended early: the server was given other keys, or the user another password.
        self.forget(&token).await;
        let token = self.token().await?;
        checked(answer(dress(request(&token))).await?).await
    }

    /// The JSON that a path answers with. What is safe to repeat is, a few times.
    ///
    /// # Errors
    /// When the answer is not 2xx, or not JSON.
    pub async fn get(&self, path: &str) -> Result<Value, Trouble> {
        let mut tries = 1;
        loop {
            match self.get_once(path).await {
                Err(Trouble::Again(after, _)) if tries < TRIES => {
                    tokio::time::sleep(pace::pause(tries, after, pace::chance())).await;
                    tries += 1;
                }
                outcome => return outcome,
            }
        }
    }

    pub(crate) async fn get_once(&self, path: &str) -> Result<Value, Trouble> {
        let response = self.send(Method::GET, path, |request| request).await?;
        json(response).await
    }

    /// Carries out `method` on a path, once, and returns the JSON of the answer; null when it has none.
    ///
    /// # Errors
    /// When the answer is not 2xx.
    pub async fn act(&self, method: Method, path: &str) -> Result<Value, Trouble> {
        let response = self.send(method, path, |request| request).await?;
        let text = response.text().await.map_err(|error| cut(&error))?;
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    /// The token in use, or a new one. Callers that come at once share one sign-in.
    async fn token(&self) -> Result<SecretString, Trouble> {
        let mut session = self.session.lock().await;
        if let Some(known) = session.as_ref().filter(|known| Instant::now() < known.renew_at) {
            return Ok(known.token.clone());
        }
        let new = self.sign_in().await?;
        let token = new.token.clone();
        *session = Some(new);
        Ok(token)
    }

    async fn forget(&self, token: &SecretString) {
        let mut session = self.session.lock().await;
        if session.as_ref().is_some_and(|known| known.token.expose_secret() == token.expose_secret()) {
            *session = None;
        }
    }

    async fn sign_in(&self) -> Result<Session, Trouble> {
        #[derive(Deserialize)]
        struct Granted {
            access_token: String,
            expires_in: u64,
        }
        let form = [("username", self.user.as_str()), ("password", self.password.expose_secret())];
        let asked = Instant::now();
        let response = answer(self.http.post(format!("{}/login", self.login)).form(&form)).await?;
        let response = checked(response).await.map_err(|trouble| match trouble {
            Trouble::Final(status, what) => Trouble::Final(status, format!("cannot sign in: {what}")),
            again @ Trouble::Again(..) => again,
        })?;
        let granted: Granted = serde_json::from_value(json(response).await?)
            .map_err(|_| Trouble::Final(None, "cannot sign in: the answer holds no token".into()))?;
        // A fifth of its life early: an upload that begins with it goes on for a while.
        let renew_at = asked + Duration::from_secs(granted.expires_in) * 4 / 5;
        Ok(Session { token: granted.access_token.into(), renew_at })
    }
}

fn certificates(path: &Path) -> Result<Vec<Certificate>, Failure> {
    let usage = |error: &dyn std::fmt::Display| {
        Failure::Usage(format!("cannot read the CA {}: {error}", path.display()))
    };
    let pem = std::fs::read(path).map_err(|error| usage(&error))?;
    let found = Certificate::from_pem_bundle(&pem).map_err(|error| usage(&error))?;
    if found.is_empty() { Err(usage(&"it holds no certificate")) } else { Ok(found) }
}

async fn answer(request: RequestBuilder) -> Result<Response, Trouble> {
    match timeout(ANSWER_WITHIN, request.send()).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(unreachable_or_distrusted(&error)),
        Err(_) => Err(Trouble::Again(
            None,
            format!("the server did not answer within {} s", ANSWER_WITHIN.as_secs()),
        )),
    }
}

/// Time does not heal a certificate that is not trusted, nor a URL that is none.
fn unreachable_or_distrusted(error: &reqwest::Error) -> Trouble {
    let what = described(error);
    if error.is_builder() || distrusted(error) {
        Trouble::Final(None, what)
    } else {
        Trouble::Again(None, what)
    }
}

/// Looks for the verdict of TLS at any depth: an I/O error hides the error that it carries from its own chain.
fn distrusted(error: &(dyn std::error::Error + 'static)) -> bool {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return matches!(tls, rustls::Error::InvalidCertificate(_));
    }
    let carried = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    carried.is_some_and(|inner| distrusted(inner)) || error.source().is_some_and(distrusted)
}

/// An answer that broke off.
pub(crate) fn cut(error: &reqwest::Error) -> Trouble {
    Trouble::Again(None, format!("the answer broke off: {}", described(error)))
}

/// The whole chain of causes, without the URL, which the reader knows.
fn described(error: &reqwest::Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text = if text.is_empty() { part } else { format!("{text}: {part}") };
        }
        cause = error.source();
    }
    if text.is_empty() { error.to_string() } else { text }
}

async fn json(response: Response) -> Result<Value, Trouble> {
    let text = response.text().await.map_err(|error| cut(&error))?;
    serde_json::from_str(&text).map_err(|_| Trouble::Final(None, "the server answered no JSON".into()))
}

/// The members of an RFC 9457 answer that are read here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Problem {
    code: Option<String>,
    title: Option<String>,
    retry: Option<String>,
}

/// The answer when it is 2xx; otherwise what the server says about another try.
async fn checked(response: Response) -> Result<Response, Trouble> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let after = after.and_then(|text| text.parse().ok()).map(Duration::from_secs);
    let text = response.text().await.unwrap_or_default();
    let problem: Problem = serde_json::from_str(&text).unwrap_or_default();
    Err(judged(status, after, &problem))
}

/// The server's word counts; without one, the status does.
fn judged(status: StatusCode, after: Option<Duration>, problem: &Problem) -> Trouble {
    let again = match problem.retry.as_deref() {
        Some("safe" | "same-key") => true,
        Some(_) => false,
        None => status.is_server_error() || matches!(status.as_u16(), 408 | 429),
    };
    let what = match (&problem.title, &problem.code) {
        (Some(title), Some(code)) => format!("{title} ({} {code})", status.as_u16()),
        _ => format!("the server answered {status}"),
    };
    if again { Trouble::Again(after, what) } else { Trouble::Final(Some(status.as_u16()), what) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> Problem {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn the_servers_word_on_retries_counts_before_the_status() {
        let after = Some(Duration::from_secs(7));
        let full = problem(r#"{"code":"queue-full","title":"The queue is full.","retry":"safe","more":1}"#);
        let said = "The queue is full. (503 queue-full)".to_owned();
        assert_eq!(judged(StatusCode::SERVICE_UNAVAILABLE, after, &full), Trouble::Again(after, said));
        let failed = problem(r#"{"code":"internal","title":"It failed.","retry":"never"}"#);
        let said = "It failed. (500 internal)".to_owned();
        assert_eq!(judged(StatusCode::INTERNAL_SERVER_ERROR, None, &failed), Trouble::Final(Some(500), said));
    }

    #[test]
    fn an_answer_of_something_in_between_is_judged_by_its_status() {
        let again = |status| matches!(judged(status, None, &Problem::default()), Trouble::Again(None, _));
        assert!(again(StatusCode::BAD_GATEWAY) && again(StatusCode::TOO_MANY_REQUESTS));
        assert!(!again(StatusCode::FORBIDDEN) && !again(StatusCode::PERMANENT_REDIRECT));
    }

    #[test]
    fn an_origin_in_clear_text_is_refused() {
        assert_eq!(origin("https://a.example:8443/").unwrap(), "https://a.example:8443");
        assert!(origin("http://a.example").is_err() && origin("a.example").is_err());
    }
}
