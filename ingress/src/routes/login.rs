//! `POST /login`, and where else clients of the device API look for it: a name and a password for an access token.

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
use dermflow_http::{answer::DEVICE_VERSION, openapi, serve::Peer};
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    limits::MAX_FORM_BYTES,
};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use utoipa::ToSchema;

use crate::{
    answer::Problem,
    app::App,
    audited::Origin,
    element::Faults,
    extract::{Body, Held, sign_ins_have_room},
    routes::{
        oauth::{self, OAuthError, Refusal, Token},
        openapi::{Any, Sent},
    },
    submit::internal,
};

/// The form. `Debug` shows no password.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct Credentials {
    /// The account's name.
    #[schema(required, nullable = false)]
    username: Option<String>,
    /// Its password.
    #[serde(default, deserialize_with = "secret")]
    #[schema(required, value_type = String, format = Password)]
    password: Option<SecretString>,
    /// Less than all that the account may do, and `offline_access` for a refresh token.
    scope: Option<String>,
}

fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<SecretString>, D::Error> {
    String::deserialize(deserializer).map(|secret| Some(secret.into()))
}

/// Whether a path is one of the routes of a login.
pub(crate) fn is_login(path: &str) -> bool {
    matches!(path.strip_prefix(DEVICE_VERSION).unwrap_or(path), "/login" | "/auth/login")
}

/// What clients of the device API look for; standard ones use `/oauth/token`.
const TOKEN_TYPE: &str = "Bearer token";

/// A token for a name and a password; the answer is that of `/oauth/token`.
#[utoipa::path(post, path = "/login", operation_id = "login", tag = "sign-in", security(()),
    request_body(content = Credentials, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "The token.", body = Token),
        (status = 400, description = "The form is not as it must be, or more was asked for than is granted.",
            content((OAuthError = "application/json"), (openapi::Problem = "application/problem+json"))),
        (status = 401, description = "Name or password are wrong.",
            content((OAuthError = "application/json"), (openapi::Problem = "application/problem+json"))),
        (status = 422, description = "Name or password are missing.", body = openapi::DeviceProblem),
        Sent, Any))]
pub(crate) async fn post(
    State(app): State<Arc<App>>,
    origin: Origin,
    Extension(Peer(source)): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    sign_ins_have_room(&app)?;
    let Held { bytes, .. } = body.read(app.bounds.bodies.share(None), MAX_FORM_BYTES).await?;
    let (username, password, scope) = read(headers, bytes).await?;
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

async fn read(headers: HeaderMap, bytes: Bytes) -> Result<(String, SecretString, Option<String>), Problem> {
    let mut request = Request::post("/login").body(bytes.into()).map_err(|_| Code::FormInvalid)?;
    *request.headers_mut() = headers;
    let form = Form::from_request(request, &()).await.map_err(|_| Code::FormInvalid)?;
    let Credentials { username, password, scope } = form.0;
    let mut faults = Faults::default();
    for (name, is_there) in [("username", username.is_some()), ("password", password.is_some())] {
        if !is_there {
            faults.add(Code::ElementMissing, name, None);
        }
    }
    match (username, password) {
        (Some(username), Some(password)) => Ok((username, password, scope)),
        _ => Err(ApiError::from(faults.0).into()),
    }
}

/// The name and the password of a form, for `fuzz`.
pub(crate) async fn form(headers: HeaderMap, bytes: Bytes) -> Option<(String, String)> {
    let (username, password, _) = read(headers, bytes).await.ok()?;
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
