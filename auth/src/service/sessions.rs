//! `/sessions`: staff signs in and out.

use std::sync::Arc;

use axum::{
    Extension,
    extract::{Request, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use dermflow_auth::{
    audit::{self, Action, Actor, Who},
    password::PasswordError,
    session::{self, SessionError},
    users::{self, UserError},
};
use dermflow_http::{
    answer::Problem,
    serve::{Certificate, Peer},
};
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::{
    Service,
    access::{Reader, may_read},
    audited::{Refused, who},
    done,
    input::JsonOrForm,
    openapi::Errors,
};

/// The name and the password of an account of staff.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Credentials {
    /// The account's name.
    username: String,
    /// Its password.
    #[serde(deserialize_with = "secret")]
    #[schema(value_type = String, format = Password)]
    password: SecretString,
}

pub(super) fn secret<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SecretString, D::Error> {
    String::deserialize(deserializer).map(SecretString::from)
}

/// A session.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Opened {
    /// To be sent as `Authorization: Bearer <session>`, over connections with the same certificate. Shown once.
    session: String,
    /// When it ends at the latest. It ends after 30 minutes without use, too.
    #[serde(with = "time::serde::rfc3339")]
    expires_at: OffsetDateTime,
}

/// Signs in: an administrator, or an auditor, who may look only.
#[utoipa::path(post, path = "/sessions", security(()),
    request_body(content((Credentials = "application/json"), (Credentials = "application/x-www-form-urlencoded"))),
    responses((status = 201, description = "Signed in.", body = Opened), Errors))]
pub(super) async fn open(
    State(service): State<Arc<Service>>,
    Extension(Peer(source)): Extension<Peer>,
    Extension(Certificate(certificate)): Extension<Certificate>,
    request: Request,
) -> Result<Response, Response> {
    let origin = who(&request);
    let body = <JsonOrForm<Credentials> as axum::extract::FromRequest<()>>::from_request(request, &()).await;
    let JsonOrForm(Credentials { username, password }) = body.map_err(IntoResponse::into_response)?;
    let (pool, now) = (&service.pool, clock::now());
    let checked = users::authenticate(pool, &service.doorkeeper, &username, password, source, now).await;
    // Asked whatever comes of it, so that both take the same time.
    let account = audit::account_named(pool, &username).await;
    let account = account.map_err(|error| Problem::from(error).into_response())?;
    let refuse =
        |code, user, answer| Refused { action: Action::Login, code, user, account, answer }.into_response();
    let failed = || {
        let answer = Problem::from(Code::LoginFailed).header(header::WWW_AUTHENTICATE, "Bearer");
        refuse(Code::LoginFailed, None, answer)
    };
    let user = match checked {
        Ok(user) => user.ok_or_else(failed)?,
        Err(UserError::Throttled(wait)) => {
            let answer = ApiError::from(Code::LoginThrottled).after(wait).into();
            return Err(refuse(Code::LoginThrottled, None, answer));
        }
        Err(error) => return Err(unavailable(error).into_response()),
    };
    if !may_read(user.role) {
        return Err(refuse(Code::Forbidden, Some(user.client), Code::Forbidden.into()));
    }
    let actor = Who { actor: Actor::User(user.client), ..origin };
    match session::open(pool, &actor, user, &certificate, now).await {
        Ok((token, expires_at)) => {
            let opened = Opened { session: token.expose_secret().to_owned(), expires_at };
            Ok((StatusCode::CREATED, axum::Json(opened)).into_response())
        }
        Err(SessionError::Changed) => Err(failed()),
        Err(SessionError::Db(error)) => Err(Problem::from(error).into_response()),
        Err(SessionError::NoRandomness(error)) => Err(internal(&error).into_response()),
    }
}

/// Signs out.
#[utoipa::path(delete, path = "/sessions", responses((status = 204, description = "Signed out."), Errors))]
pub(super) async fn close(State(service): State<Arc<Service>>, reader: Reader) -> Result<Response, Problem> {
    session::close(&service.pool, reader.acts(), reader.user, &reader.token, clock::now()).await?;
    Ok(done())
}

fn unavailable(error: UserError) -> Problem {
    match error {
        UserError::Db(error) => error.into(),
        UserError::Password(PasswordError::Busy) => Code::Overloaded.into(),
        other => internal(&other),
    }
}

fn internal(error: &dyn std::error::Error) -> Problem {
    tracing::error!(%error, "internal");
    Code::Internal.into()
}
