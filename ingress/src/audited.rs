//! What the audit trail is told of a request, on every protected route.
//!
//! Handlers say in their answer what they hand out, as [`Deeds`]; who called, from where, and what was refused is
//! seen from here. What changes the record of jobs is recorded in the transaction that changes it, and not here.
//!
//! Recorded one by one are reports and the files of batches, which say something of a patient. How far jobs and batches
//! are (`/jobs`, `/fhir/Task`, `/batches/{id}`, the manifest of `/fhir/_bulk`, and `/fhir/_async` before there is a
//! report) is numbers, times, codes and the client's own names of lines, and is asked for up to 12,000 times a minute:
//! [`Trail::repeated`] bounds how many of these are written one by one, and [`Trail::refused`] how many refusals.
//!
//! A refusal is every answer that grants nothing, unless the server is what fails: see [`refusal`]. While the database
//! is away nothing can be recorded.
//!
//! [`Trail::repeated`]: dermflow_auth::audit::trail::Trail::repeated
//! [`Trail::refused`]: dermflow_auth::audit::trail::Trail::refused

use std::{
    net::IpAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    extract::{FromRequestParts, MatchedPath, Request, State},
    http::{Method, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_auth::{
    audit::{Action, Actor, Event, Object, Who},
    confirmation::Fingerprint,
};
use dermflow_http::{
    dress::REQUEST_ID,
    serve::{Certificate, Peer, Shows},
};
use dermflow_schemas::{
    clock,
    error::Code,
    id::{ClientId, JobId},
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    access::Gate, answer::Problem, retention::Answered, routes::is_login, store::connections::asking,
};

/// Where a request comes from, and who is behind it as soon as that is known.
#[derive(Debug, Clone, Default)]
pub(crate) struct Origin(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    source: Option<IpAddr>,
    shows: Option<Shows>,
    /// The route needs a certificate.
    certified: OnceLock<()>,
    request: Option<Uuid>,
    is_head: bool,
    user: OnceLock<ClientId>,
    account: OnceLock<ClientId>,
}

impl Origin {
    fn new(request: &Request) -> Self {
        let source = request.extensions().get::<Peer>().map(|peer| peer.0);
        // A caller's own id may be any word; only what is certainly no more than an id is kept.
        let id = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok()?.parse().ok());
        let shows = request.extensions().get().cloned();
        let is_head = request.method() == Method::HEAD;
        Self(Arc::new(Known { source, shows, request: id, is_head, ..Known::default() }))
    }

    /// The certificate of the caller's connection, while it is good.
    pub(crate) fn certificate(&self) -> Option<Fingerprint> {
        self.0.shows.as_ref().and_then(Shows::certificate).map(|Certificate(fingerprint)| fingerprint)
    }

    /// The route is open to who shows a certificate only.
    pub(crate) fn needs_certificate(&self) {
        let _ = self.0.certified.set(());
    }

    /// Whether the route needs a certificate that the connection does not show any more.
    pub(crate) fn lacks_certificate(&self) -> bool {
        self.0.certified.get().is_some() && self.certificate().is_none()
    }

    /// The caller has proved to be this user.
    pub(crate) fn is(&self, user: ClientId) {
        let _ = self.0.user.set(user);
    }

    /// Who the caller is, as far as it has proved that.
    pub(crate) fn user(&self) -> Option<ClientId> {
        self.0.user.get().copied()
    }

    /// The caller says that it is the owner of this account.
    pub(crate) fn claims(&self, account: Option<ClientId>) {
        if let Some(account) = account {
            let _ = self.0.account.set(account);
        }
    }

    /// Who calls, as the trail has it.
    pub(crate) fn who(&self) -> Who {
        let actor = self.user().map_or(Actor::Unknown, Actor::User);
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
pub(crate) struct Deed {
    action: Action,
    object: Option<Object>,
    detail: Value,
    /// The report that goes out.
    report: Option<Answered>,
}

/// What an answer hands out. It leaves only when that is in the trail.
#[derive(Debug, Clone)]
pub(crate) enum Deeds {
    Each(Vec<Deed>),
    /// How far something is: a job, a batch, or all of a client's.
    Status(Option<Object>),
}

impl Deed {
    /// A job that has ended, with its report or without.
    pub(crate) fn ended(job: JobId, has_report: bool) -> Self {
        let (action, object) = if has_report {
            (Action::Read, Object::report(job))
        } else {
            (Action::StatusRead, Object::job(job))
        };
        let report = has_report.then_some(Answered { job, last: false });
        Self { action, object: Some(object), detail: json!({}), report }
    }

    /// The same; `last` says whether the client has no way to ask for the report again.
    pub(crate) fn last(mut self, last: bool) -> Self {
        if let Some(report) = &mut self.report {
            report.last = last;
        }
        self
    }
}

impl Deeds {
    /// Something else.
    pub(crate) fn one(action: Action, object: Option<Object>, detail: Value) -> Self {
        Self::Each(vec![Deed { action, object, detail, report: None }])
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
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let signs_in = is_login(route) || route.starts_with("/oauth/");
    let object = named(request.uri().path());
    let mut response = asking(origin.clone(), next.run(request)).await;
    let now = clock::now();
    if let Some(deeds) = response.extensions_mut().remove() {
        return match hand_out(gate.as_ref(), &origin, deeds, now).await {
            Ok(()) => response,
            Err(code) => Problem::from(code).into_response(),
        };
    }
    let refused = response.extensions_mut().remove().map(|Refused(code)| code);
    let refused = refused
        .or_else(|| response.extensions().get().map(Problem::code).filter(|code| refusal(*code, signs_in)));
    if let Some(code) = refused {
        let account = origin.0.account.get().copied();
        let action = match code {
            _ if signs_in => Action::Login,
            code if shuts_out(code) => Action::Access,
            _ => Action::Request,
        };
        let event = Event::new(action, origin.who(), now).client(account.or(origin.0.user.get().copied()));
        // Who is beyond its rate is refused whatever the path names.
        let object = object.filter(|_| code.kind().status != 429);
        let event = event.object(account.map(Object::account).or(object));
        if let Err(code) = gate.trail().refused(event, code).await {
            return Problem::from(code).into_response();
        }
    }
    response
}

/// What a path names, whether it is there or not.
fn named(path: &str) -> Option<Object> {
    let id: Uuid = path.rsplit('/').find_map(|part| part.parse().ok())?;
    let is_batch = path.starts_with("/batches/") || path.starts_with("/fhir/_bulk/");
    Some(if is_batch { Object::batch(id) } else { Object::job(id.into()) })
}

async fn hand_out<G: Gate>(gate: &G, origin: &Origin, deeds: Deeds, now: OffsetDateTime) -> Result<(), Code> {
    let event = |Deed { action, object, detail, .. }| {
        // The trail is nobody's own, and dead letters are not the operator's.
        let is_own = !matches!(action, Action::TrailRead | Action::DeadRead);
        let client = origin.0.user.get().copied().filter(|_| is_own);
        Event::new(action, origin.who(), now).client(client).object(object).detail(detail)
    };
    match deeds {
        Deeds::Each(deeds) if deeds.is_empty() => Ok(()),
        Deeds::Each(deeds) => {
            let reports: Vec<Answered> = deeds.iter().filter_map(|deed| deed.report).collect();
            gate.trail().record(deeds.into_iter().map(event).collect()).await?;
            match origin.0.user.get() {
                // To HEAD the report itself does not go out.
                Some(client) if !origin.0.is_head => gate.answered(*client, reports).await,
                _ => Ok(()),
            }
        }
        Deeds::Status(object) => {
            let deed = Deed { action: Action::StatusRead, object, detail: json!({}), report: None };
            gate.trail().repeated(event(deed)).await
        }
    }
}

/// Whether `code` refuses something to a caller: all but what the server fails at, and that too when somebody cannot
/// sign in because too many try.
fn refusal(code: Code, signs_in: bool) -> bool {
    code.kind().status < 500 || (signs_in && code == Code::Overloaded)
}

/// Whether another caller, or the same one at another rate, would have got what was asked for.
fn shuts_out(code: Code) -> bool {
    matches!(code.kind().status, 401 | 403 | 429)
}

/// Records that a part of a request is refused with `code`, if that is a refusal: an entry of a Bundle, or a line of an
/// upload.
pub(crate) async fn refused_part<G: Gate>(
    gate: &G,
    who: Who,
    client: ClientId,
    batch: Option<Uuid>,
    number: usize,
    code: Code,
) -> Result<(), Code> {
    if !refusal(code, false) {
        return Ok(());
    }
    let action = if shuts_out(code) { Action::Access } else { Action::Request };
    let event = Event::new(action, who, clock::now()).client(Some(client));
    let event = event.object(batch.map(Object::batch)).detail(json!({ "number": number }));
    gate.trail().refused(event, code).await
}
