//! What was sent in clear: whoever was on the way has read it, so it is good no longer.
//!
//! Plain HTTP is answered with 308, as browsers want it, and a client that does not know better sends its next token in
//! clear again, and again without harm that it could see (OWASP ASVS 5.0 4.1.2 wants APIs not to redirect for that
//! reason). Here it sees that its token has ended.

use std::{net::IpAddr, sync::Arc};

use axum::http::{HeaderMap, Method, header, request::Parts};
use dermflow_auth::{
    audit::{Action, Actor, Event, Object, Who},
    revocation,
};
use dermflow_schemas::{clock, error::Code};
use serde_json::{Value, json};

use crate::{access::Verdict, app::App, routes::is_login};

/// Revokes an access token of ours that came in clear, and records it; of a login that came in clear, whose body nobody
/// has read, it records that.
pub(crate) async fn seen(app: Arc<App>, request: Parts, source: IpAddr) {
    let who = Who { actor: Actor::Unknown, source: Some(source), request: None };
    revoke(&app, &request.headers, who).await;
    let path = request.uri.path();
    if request.method == Method::POST && (is_login(path) || path.starts_with("/oauth/")) {
        tracing::info!("a login was sent in clear");
        let event = Event::new(Action::Login, who, clock::now()).detail(reason());
        app.trail.unanswered(app.trail.refused(event, Code::LoginFailed).await);
    }
}

fn reason() -> Value {
    json!({ "reason": "sent-in-clear" })
}

async fn revoke(app: &App, headers: &HeaderMap, who: Who) {
    let now = clock::now();
    let Some(caller) = token(headers).and_then(|token| app.tokens.verify(token, now).ok()) else {
        return;
    };
    if app.access.judge(&caller) == Verdict::Revoked {
        return;
    }
    let client = caller.client;
    if let Err(error) = revocation::revoke(app.store.pool(), &[caller.jti], now).await {
        tracing::error!(%client, %error, "an access token was sent in clear, and is not revoked");
        return;
    }
    tracing::warn!(%client, "an access token was sent in clear: it is revoked");
    // This replica knows at once.
    app.access.refresh(app.store.pool()).await;
    let event = Event::new(Action::TokenRevoked, who, now).client(Some(client));
    let event = event.object(Some(Object::account(client))).detail(reason());
    app.trail.unanswered(app.trail.record(vec![event]).await);
}

fn token(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token)
}
