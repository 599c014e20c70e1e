//! `POST /login`: a name and a password for an access token.

use std::sync::Arc;

use axum::{
    Extension, Form,
    extract::{FromRequest, State},
    http::{HeaderMap, Request, header},
    response::Response,
};
use bytes::Bytes;
use dermflow_auth::{
    password::PasswordError,
    token::LIFETIME,
    users::{self, User, UserError},
};
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    limits::MAX_FORM_BYTES,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;

use crate::{
    answer::{self, Problem},
    app::App,
    extract::{Body, Held},
    serve::Peer,
    submit::internal,
};

/// The form. `Debug` shows no password.
#[derive(Debug, Deserialize)]
pub(crate) struct Credentials {
    username: String,
    #[serde(deserialize_with = "secret")]
    password: SecretString,
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SecretString, D::Error> {
    String::deserialize(deserializer).map(SecretString::from)
}

/// `expires_in` is RFC 6749's, in seconds; `expires_in_minutes` is what clients of the device API read.
pub(crate) async fn post(
    State(app): State<Arc<App>>,
    Extension(Peer(source)): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let Held { bytes, .. } = body.read(&app.bounds, MAX_FORM_BYTES).await?;
    let Credentials { username, password } = read(headers, bytes).await?;
    let (pool, now) = (app.store.pool(), clock::now());
    let user = users::authenticate(pool, &app.doorkeeper, &username, password, source, now).await;
    let User { client, role } = user.map_err(unavailable)?.ok_or_else(|| {
        tracing::info!("login refused");
        Problem::from(Code::LoginFailed).header(header::WWW_AUTHENTICATE, "Bearer")
    })?;
    let token = app.tokens.issue(client, role.scope(), clock::now()).map_err(|error| internal(&error))?;
    tracing::info!(%client, "login");
    Ok(answer::json(json!({
        "access_token": token.expose_secret(),
        "token_type": "Bearer",
        "expires_in": LIFETIME.as_secs(),
        "expires_in_minutes": LIFETIME.as_secs() / 60,
    })))
}

async fn read(headers: HeaderMap, bytes: Bytes) -> Result<Credentials, Problem> {
    let mut request = Request::post("/login").body(bytes.into()).map_err(|_| Code::FormInvalid)?;
    *request.headers_mut() = headers;
    let form = Form::from_request(request, &()).await.map_err(|_| Code::FormInvalid)?;
    Ok(form.0)
}

fn unavailable(error: UserError) -> Problem {
    match error {
        UserError::Db(error) => error.into(),
        UserError::Password(PasswordError::Busy) => Code::Overloaded.into(),
        UserError::Throttled(wait) => {
            tracing::info!("login throttled");
            ApiError::from(Code::LoginThrottled).after(wait).into()
        }
        other => internal(&other),
    }
}
