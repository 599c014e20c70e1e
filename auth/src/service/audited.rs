//! What the audit trail and the metrics are told of refused attempts. What is done, and what is tried in vain, is
//! recorded by [`dermflow_auth::registry`]; what does not get as far as that, here, whatever it lacks. While the
//! database is away neither can be.

use std::{
    net::IpAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    extract::{Request, State},
    http::Method,
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_auth::{
    audit::{Action, Actor, Event, Object, Who},
    registry,
};
use dermflow_http::{answer::Problem, dress::REQUEST_ID, serve::Peer};
use dermflow_schemas::{clock, error::Code, id::ClientId};

use super::Service;

/// An answer that shuts the caller out.
#[derive(Debug, Clone)]
pub(super) struct Refused {
    /// What it was.
    pub(super) action: Action,
    /// Why, for the trail; the caller need not know.
    pub(super) code: Code,
    /// Who was refused, as far as that is proved.
    pub(super) user: Option<ClientId>,
    /// Whose account was asked for.
    pub(super) account: Option<ClientId>,
    /// What the caller is told.
    pub(super) answer: Problem,
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = self.answer.clone().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// How far a request has got.
#[derive(Debug, Clone, Default)]
pub(super) struct Attempt(Arc<Progress>);

#[derive(Debug, Default)]
struct Progress {
    user: OnceLock<ClientId>,
    acts: AtomicBool,
}

impl Attempt {
    /// The caller has proved to be this user.
    pub(super) fn is(&self, user: ClientId) {
        let _ = self.0.user.set(user);
    }

    /// What comes of it is recorded elsewhere.
    pub(super) fn acts(&self) {
        self.0.acts.store(true, Ordering::Relaxed);
    }
}

/// Counts every refused attempt, and records those that no act has recorded.
pub(super) async fn audited(
    State(service): State<Arc<Service>>,
    mut request: Request,
    next: Next,
) -> Response {
    let (who, attempt) = (who(&request), Attempt::default());
    request.extensions_mut().insert(attempt.clone());
    let signs_in = request.method() == Method::POST && request.uri().path() == "/sessions";
    let mut response = next.run(request).await;
    let refused = response.extensions_mut().remove().or_else(|| {
        let problem = response.extensions().get::<Problem>()?;
        let action = if signs_in { Action::Login } else { Action::Access };
        let user = attempt.0.user.get().copied();
        Some(Refused { action, code: problem.code(), user, account: None, answer: problem.clone() })
    });
    let Some(Refused { action, code, user, account, .. }) = refused else { return response };
    let has_acted = attempt.0.acts.load(Ordering::Relaxed);
    if code == Code::DatabaseUnavailable || (has_acted && !registry::refuses(code)) {
        return response;
    }
    service.metrics.refuse(code);
    if !has_acted {
        let who = Who { actor: user.map_or(Actor::Unknown, Actor::User), ..who };
        let event = Event::new(action, who, clock::now()).client(account);
        let event = event.object(account.map(Object::account));
        if let Err(code) = service.trail.refused(event, code).await {
            return Problem::from(code).into_response();
        }
    }
    response
}

/// By which way a request came; by whom is not known yet.
pub(super) fn who(request: &Request) -> Who {
    let source = request.extensions().get::<Peer>().map(|peer| peer.0);
    // A caller's own id may be any word; only what is certainly no more than an id is kept.
    let id = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok()?.parse().ok());
    Who { actor: Actor::Unknown, source, request: id }
}

/// Records a handshake that failed: nobody gets as far as a request without a certificate of staff.
pub(super) async fn handshake(service: &Service, source: IpAddr, error: &rustls::Error) {
    let code = reason(error);
    tracing::info!(%error, %source, "handshake");
    service.metrics.refuse(code);
    let who = Who { actor: Actor::Unknown, source: Some(source), request: None };
    let event = Event::new(Action::Access, who, clock::now());
    service.trail.unanswered(service.trail.refused(event, code).await);
}

fn reason(error: &rustls::Error) -> Code {
    match error {
        rustls::Error::NoCertificatesPresented => Code::CertificateMissing,
        rustls::Error::InvalidCertificate(_) => Code::CertificateInvalid,
        _ => Code::HandshakeFailed,
    }
}
