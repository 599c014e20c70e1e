//! What the audit trail is told of a request, on every protected route.
//!
//! Handlers say in their answer what they hand out, as [`Deeds`]; who called, from where, and what was refused is
//! seen from here. What changes the record of jobs is recorded in the transaction that changes it, and not here.
//!
//! Recorded as reads are reports and the files of batches, which say something of a patient. How far jobs and batches
//! are (`/jobs`, `/fhir/Task`, `/batches/{id}`, the manifest of `/fhir/_bulk`, and `/fhir/_async` before there is a
//! report) is numbers, times, codes and the client's own names of lines: that is asked for up to 12,000 times a minute,
//! and not recorded.
//!
//! A refusal is an answer that another caller, or the same one at another rate, would not have got: see [`refusal`].
//! What is malformed (400, 413, 415, 422) or not there for this client (404) is none, and while the database is away
//! nothing can be recorded.

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    extract::{FromRequestParts, Request, State},
    http::request::Parts,
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_auth::audit::{Action, Actor, Event, Object, Who};
use dermflow_http::{dress::REQUEST_ID, serve::Peer};
use dermflow_schemas::{
    clock,
    error::Code,
    id::{ClientId, JobId},
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{access::Gate, answer::Problem};

/// Where a request comes from, and who is behind it as soon as that is known.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origin(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    source: Option<IpAddr>,
    request: Option<Uuid>,
    user: OnceLock<ClientId>,
    account: OnceLock<ClientId>,
}

impl Origin {
    fn new(request: &Request) -> Self {
        let source = request.extensions().get::<Peer>().map(|peer| peer.0);
        // A caller's own id may be any word; only what is certainly no more than an id is kept.
        let id = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok()?.parse().ok());
        Self(Arc::new(Known { source, request: id, ..Known::default() }))
    }

    /// The caller has proved to be this user.
    pub(crate) fn is(&self, user: ClientId) {
        let _ = self.0.user.set(user);
    }

    /// The caller says that it is the owner of this account.
    pub(crate) fn claims(&self, account: Option<ClientId>) {
        if let Some(account) = account {
            let _ = self.0.account.set(account);
        }
    }

    /// Who calls, as the trail has it.
    pub(crate) fn who(&self) -> Who {
        let actor = self.0.user.get().map_or(Actor::Unknown, |user| Actor::User(*user));
        Who { actor, source: self.0.source, request: self.0.request }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Origin {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
    }
}

/// Something that an answer hands out.
#[derive(Debug, Clone)]
struct Deed {
    action: Action,
    object: Option<Object>,
    detail: Value,
}

/// What an answer hands out. It leaves only when that is in the trail.
#[derive(Debug, Clone, Default)]
pub(crate) struct Deeds(Vec<Deed>);

impl Deeds {
    /// The reports of these jobs.
    pub(crate) fn reports(jobs: impl IntoIterator<Item = JobId>) -> Self {
        let read = |job| Deed { action: Action::Read, object: Some(Object::report(job)), detail: json!({}) };
        Self(jobs.into_iter().map(read).collect())
    }

    /// Something else.
    pub(crate) fn one(action: Action, object: Option<Object>, detail: Value) -> Self {
        Self(vec![Deed { action, object, detail }])
    }

    /// Attached to an answer.
    pub(crate) fn of(self, mut response: Response) -> Response {
        response.extensions_mut().insert(self);
        response
    }
}

/// Why an answer that has not the API's form shuts the caller out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Refused(pub(crate) Code);

/// Records what is handed out, and every refusal.
pub(crate) async fn audited<G: Gate>(
    State(gate): State<Arc<G>>,
    mut request: Request,
    next: Next,
) -> Response {
    let origin = Origin::new(&request);
    request.extensions_mut().insert(origin.clone());
    let path = request.uri().path();
    let signs_in = path == "/login" || path.starts_with("/oauth/");
    let refused_action = if signs_in { Action::Login } else { Action::Access };
    let mut response = next.run(request).await;
    let now = clock::now();
    if let Some(Deeds(deeds)) = response.extensions_mut().remove()
        && !deeds.is_empty()
    {
        let who = origin.who();
        let event = |Deed { action, object, detail }| {
            // The trail is nobody's own, and dead letters are not the operator's.
            let is_own = !matches!(action, Action::TrailRead | Action::DeadRead);
            let client = origin.0.user.get().copied().filter(|_| is_own);
            Event::new(action, who, now).client(client).object(object).detail(detail)
        };
        return match gate.trail().record(deeds.into_iter().map(event).collect()).await {
            Ok(()) => response,
            Err(code) => Problem::from(code).into_response(),
        };
    }
    let refused = response.extensions_mut().remove().map(|Refused(code)| code);
    let refused = refused
        .or_else(|| response.extensions().get().map(Problem::code).filter(|code| refusal(*code, signs_in)));
    if let Some(code) = refused {
        let account = origin.0.account.get().copied();
        let event = Event::new(refused_action, origin.who(), now);
        let event = event.client(account).object(account.map(Object::account));
        gate.trail().refused(event, code).await;
    }
    response
}

/// Whether an answer with `code` shuts the caller out, for now or for good. [`Trail::refused`] bounds how many of a
/// flood are written one by one.
///
/// [`Trail::refused`]: dermflow_auth::audit::trail::Trail::refused
fn refusal(code: Code, signs_in: bool) -> bool {
    // More passwords at once than can be hashed.
    let is_crowded = signs_in && code == Code::Overloaded;
    let is_refused =
        matches!(code, Code::Unauthenticated | Code::LoginFailed | Code::LoginThrottled | Code::Forbidden);
    let is_too_much = matches!(
        code,
        Code::RateExceeded | Code::PollTooFast | Code::QuotaExceeded | Code::ConcurrencyExceeded
    );
    is_refused || is_too_much || is_crowded
}
