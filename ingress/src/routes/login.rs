//! `POST /login`: a name and a password for an access token.

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Form,
    extract::{FromRequest, State},
    http::{HeaderMap, Request, header},
    response::Response,
};
use bytes::Bytes;
use dermflow_auth::{
    audit,
    credentials::Proof,
    password::PasswordError,
    users::{self, UserError},
};
use dermflow_http::serve::Peer;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    limits::MAX_FORM_BYTES,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use crate::{
    answer::Problem,
    app::App,
    audited::Origin,
    extract::{Body, Held},
    routes::oauth::{self, Refusal},
    submit::internal,
};

/// The form. `Debug` shows no password.
#[derive(Debug, Deserialize)]
pub(crate) struct Credentials {
    username: String,
    #[serde(deserialize_with = "secret")]
    password: SecretString,
    /// Less than all that the account may do, and `offline_access` for a refresh token.
    scope: Option<String>,
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SecretString, D::Error> {
    String::deserialize(deserializer).map(SecretString::from)
}

/// What clients of the device API look for; standard ones use `/oauth/token`.
const TOKEN_TYPE: &str = "Bearer token";

/// The answer is that of `/oauth/token`.
pub(crate) async fn post(
    State(app): State<Arc<App>>,
    origin: Origin,
    Extension(Peer(source)): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let Held { bytes, .. } = body.read(&app.bounds, MAX_FORM_BYTES).await?;
    let Credentials { username, password, scope } = read(headers, bytes).await?;
    let (pool, now) = (&app.sign_ins, clock::now());
    let user = users::authenticate(pool, &app.doorkeeper, &username, password, source, now).await;
    if let Err(UserError::Password(PasswordError::Busy)) = user {
        return Err(Problem::from(ApiError::from(Code::Overloaded).after(pause())).into());
    }
    // Asked whatever comes of it, so that both take the same time.
    origin.claims(audit::account_named(pool, &username).await?);
    let user = user.map_err(unavailable)?.ok_or_else(|| {
        tracing::info!("login refused");
        Problem::from(Code::LoginFailed).header(header::WWW_AUTHENTICATE, "Bearer")
    })?;
    let proof = Proof { user, credential: user.client.uuid(), ends: None };
    oauth::granted(&app, &origin, &proof, scope.as_deref(), TOKEN_TYPE).await
}

async fn read(headers: HeaderMap, bytes: Bytes) -> Result<Credentials, Problem> {
    let mut request = Request::post("/login").body(bytes.into()).map_err(|_| Code::FormInvalid)?;
    *request.headers_mut() = headers;
    let form = Form::from_request(request, &()).await.map_err(|_| Code::FormInvalid)?;
    Ok(form.0)
}

/// The name and the password of a form, for `fuzz`.
pub(crate) async fn form(headers: HeaderMap, bytes: Bytes) -> Option<(String, String)> {
    let Credentials { username, password, .. } = read(headers, bytes).await.ok()?;
    Some((username, password.expose_secret().to_owned()))
}

/// When to come back who found no place: at different times, or they would all find the same again.
fn pause() -> Duration {
    Duration::from_secs(fastrand::u64(1..=10))
}

fn unavailable(error: UserError) -> Problem {
    match error {
        UserError::Db(error) => error.into(),
        UserError::Throttled(wait) => {
            tracing::info!("login throttled");
            ApiError::from(Code::LoginThrottled).after(wait).into()
        }
        other => internal(&other),
    }
}
