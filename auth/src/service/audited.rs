//! What the audit trail and the metrics are told of refused attempts. What is done, and what fails, is recorded by
//! [`dermflow_auth::registry`] in its own transaction.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_auth::audit::{Action, Actor, Event, Object, Who};
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

/// Records every answer that shuts its caller out.
pub(super) async fn audited(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let who = who(&request);
    let mut response = next.run(request).await;
    if let Some(Refused { action, code, user, account, .. }) = response.extensions_mut().remove() {
        let who = Who { actor: user.map_or(Actor::Unknown, Actor::User), ..who };
        let event = Event::new(action, who, clock::now()).client(account);
        service.metrics.refuse(code);
        service.trail.refused(event.object(account.map(Object::account)), code).await;
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
    service.trail.refused(Event::new(Action::Access, who, clock::now()), code).await;
}

fn reason(error: &rustls::Error) -> Code {
    match error {
        rustls::Error::NoCertificatesPresented => Code::CertificateMissing,
        rustls::Error::InvalidCertificate(_) => Code::CertificateInvalid,
        _ => Code::HandshakeFailed,
    }
}
