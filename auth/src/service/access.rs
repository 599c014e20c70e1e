//! Who may do what: the extractors that open a handler.

use std::sync::Arc;

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
    response::{IntoResponse, Response},
};
use dermflow_auth::{
    audit::{Action, Actor, Who},
    session::{self, Refusal},
    users::{Role, User},
};
use dermflow_http::{
    answer::Problem,
    dress::REQUEST_ID,
    serve::{Certificate, Peer},
};
use dermflow_schemas::{clock, error::Code};
use secrecy::SecretString;

use super::{
    Service,
    audited::{Attempt, Refused},
};

/// Somebody who may look: an administrator or an auditor, with a session.
#[derive(Debug)]
pub(super) struct Reader {
    who: Who,
    attempt: Attempt,
    /// Whose session it is.
    pub(super) user: User,
    /// The session.
    pub(super) token: SecretString,
}

impl Reader {
    /// Who, for an act that records itself what comes of it: from here on [`super::audited`] does not.
    pub(super) fn acts(&self) -> &Who {
        self.attempt.acts();
        &self.who
    }
}

/// Somebody who may change accounts: an administrator, with a session.
#[derive(Debug)]
pub(super) struct Registrar(Reader);

impl Registrar {
    /// See [`Reader::acts`].
    pub(super) fn acts(&self) -> &Who {
        self.0.acts()
    }
}

/// Whether a role is one of staff that has business here.
pub(super) fn may_read(role: Role) -> bool {
    matches!(role, Role::Administrator | Role::Auditor)
}

impl FromRequestParts<Arc<Service>> for Reader {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, service: &Arc<Service>) -> Result<Self, Response> {
        let Some(Certificate(certificate)) = parts.extensions.get().copied() else {
            return Err(anonymous(Code::CertificateMissing).into_response());
        };
        let token = bearer(&parts.headers).map_err(|code| anonymous(code).into_response())?;
        let checked = session::check(&service.pool, &token, &certificate, clock::now()).await;
        let checked = checked.map_err(|error| Problem::from(error).into_response())?;
        let user = checked.map_err(|refusal| anonymous(code(refusal)).into_response())?;
        if !may_read(user.role) {
            return Err(forbidden(user).into_response());
        }
        let attempt = parts.extensions.get::<Attempt>().cloned().unwrap_or_default();
        attempt.is(user.client);
        let source = parts.extensions.get::<Peer>().map(|peer| peer.0);
        let request = parts.headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok()?.parse().ok());
        Ok(Self { who: Who { actor: Actor::User(user.client), source, request }, attempt, user, token })
    }
}

impl FromRequestParts<Arc<Service>> for Registrar {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, service: &Arc<Service>) -> Result<Self, Response> {
        let reader = Reader::from_request_parts(parts, service).await?;
        let may_change = reader.user.role == Role::Administrator;
        if may_change { Ok(Self(reader)) } else { Err(forbidden(reader.user).into_response()) }
    }
}

/// The session, from the one `Authorization` header (RFC 6750 §2.1).
fn bearer(headers: &HeaderMap) -> Result<SecretString, Code> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or(Code::SessionMissing)?;
    if values.next().is_some() {
        return Err(Code::SessionUnknown);
    }
    let value = value.to_str().ok().and_then(|value| value.split_once(' '));
    let token = value.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token);
    token.map(SecretString::from).ok_or(Code::SessionUnknown)
}

fn code(refusal: Refusal) -> Code {
    match refusal {
        Refusal::AccessToken => Code::TokenNoSession,
        Refusal::Unknown => Code::SessionUnknown,
        Refusal::Foreign => Code::SessionForeign,
        Refusal::Expired => Code::SessionExpired,
    }
}

/// Every reason looks the same from outside: who holds a stolen session does not learn what it lacks.
fn anonymous(code: Code) -> Refused {
    let answer = Problem::from(Code::SessionNeeded).header(header::WWW_AUTHENTICATE, "Bearer");
    Refused { action: Action::Access, code, user: None, account: None, answer }
}

fn forbidden(user: User) -> Refused {
    let (code, user) = (Code::Forbidden, Some(user.client));
    Refused { action: Action::Access, code, user, account: None, answer: code.into() }
}
