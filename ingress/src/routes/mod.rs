//! The route table: the whole API on one screen.

use std::sync::Arc;

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::Response,
    routing::{get, post},
};
use dermflow_http::dress::{bounded, dressed};

use crate::{app::App, audited::audited, dead::Operators, rates};

mod analyze;
mod batches;
mod bundle;
mod dead;
mod health;
mod jobs;
pub(crate) mod login;
mod oauth;
mod status;
mod tasks;
mod trail;

/// What clients reach.
pub(crate) fn public(app: Arc<App>) -> Router {
    let routes = Router::new()
        .route("/login", post(login::post))
        .route("/oauth/token", post(oauth::token))
        .route("/oauth/revoke", post(oauth::revoke))
        .route("/oauth/introspect", post(oauth::introspect))
        .route("/.well-known/jwks.json", get(oauth::jwks))
        .route("/.well-known/oauth-authorization-server", get(oauth::metadata))
        .route("/fhir/.well-known/smart-configuration", get(oauth::smart))
        .route("/fhir/DiagnosticReport/$analyze", post(analyze::post))
        .route("/fhir/DiagnosticReport/{id}", get(status::report))
        .route("/fhir/_async/{id}", get(status::get).delete(status::delete))
        .route("/fhir", post(bundle::post))
        .route("/fhir/Task", get(tasks::search))
        .route("/fhir/Task/{id}", get(tasks::get))
        .route("/fhir/AuditEvent", get(trail::search))
        .route("/fhir/AuditEvent/{id}", get(trail::get))
        .route("/fhir/_bulk/{id}", get(batches::manifest))
        .route("/batches", post(batches::create))
        .route("/batches/{id}", get(batches::get).post(batches::resume).delete(batches::delete))
        .route("/batches/{id}/results", get(batches::results))
        .route("/batches/{id}/errors", get(batches::errors))
        .route("/jobs", get(jobs::list))
        .route("/jobs/{id}", get(jobs::get));
    let routes = bounded(routes)
        .layer(from_fn_with_state(app.clone(), rates::count))
        .layer(from_fn_with_state(app.clone(), audited))
        .layer(from_fn_with_state(app.clone(), rates::tell));
    measured(routes, app)
}

/// What operators reach, on the loopback interface only.
pub(crate) fn internal(app: Arc<App>) -> Router {
    let routes = Router::new()
        .route("/livez", get(health::live))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(health::metrics));
    measured(bounded(routes), app)
}

/// What operators reach in a process of its own, on the loopback interface only, with a token for it.
pub(crate) fn operators(operators: Arc<Operators>) -> Router {
    let routes = Router::new()
        .route("/dead", get(dead::list))
        .route("/dead/{sequence}", get(dead::get).delete(dead::purge))
        .route("/dead/{sequence}/requeue", post(dead::requeue));
    let routes = bounded(routes)
        .layer(from_fn_with_state(operators.clone(), rates::count))
        .layer(from_fn_with_state(operators.clone(), audited))
        .layer(from_fn_with_state(operators.clone(), rates::tell));
    dressed(routes, operators)
}

fn measured(routes: Router<Arc<App>>, app: Arc<App>) -> Router {
    dressed(routes.layer(from_fn_with_state(app.clone(), measure)), app)
}

async fn measure(
    State(app): State<Arc<App>>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let method = request.method().clone();
    // Methods are the caller's words too: unknown ones share a label.
    let method = if matches!(method.as_str(), "GET" | "POST" | "DELETE" | "HEAD") {
        method.to_string()
    } else {
        "other".into()
    };
    let path = path.as_ref().map_or("none", MatchedPath::as_str).to_owned();
    let timer = app.metrics.request_seconds.with_label_values(&[&path]).start_timer();
    let response = next.run(request).await;
    timer.observe_duration();
    let status: StatusCode = response.status();
    app.metrics.requests.with_label_values(&[path.as_str(), &method, status.as_str()]).inc();
    response
}
