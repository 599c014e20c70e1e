//! The route table: the whole API on one screen.

use std::sync::Arc;

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::Response,
    routing::get,
};
use dermflow_http::dress::{bounded, dressed};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{app::App, audited::audited, dead::Operators, rates};

mod analyze;
mod batches;
mod bundle;
mod dead;
mod definitions;
mod health;
mod jobs;
mod login;
mod oauth;
mod openapi;
mod reports;
mod status;
mod tasks;
mod trail;

/// What clients reach.
pub(crate) fn public(app: Arc<App>) -> Router {
    let (routes, _) = clients().split_for_parts();
    let routes = bounded(routes)
        .layer(from_fn_with_state(app.clone(), rates::count))
        .layer(from_fn_with_state(app.clone(), audited))
        .layer(from_fn_with_state(app.clone(), rates::tell));
    measured(routes, app)
}

/// The API of clients and auditors, with the document that describes it. Where each is, and for whom, stands above its
/// handler.
fn clients() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(login::post))
        .routes(routes!(oauth::token))
        .routes(routes!(oauth::revoke))
        .routes(routes!(oauth::introspect))
        .routes(routes!(oauth::jwks))
        .routes(routes!(oauth::metadata))
        .routes(routes!(oauth::smart))
        .routes(routes!(openapi::clients))
        .routes(routes!(definitions::metadata))
        .routes(routes!(definitions::operations))
        .routes(routes!(definitions::operation))
        .routes(routes!(definitions::code_systems))
        .routes(routes!(definitions::code_system))
        .routes(routes!(definitions::value_sets))
        .routes(routes!(definitions::value_set))
        .routes(routes!(definitions::concept_maps))
        .routes(routes!(definitions::concept_map))
        .routes(routes!(analyze::post))
        .routes(routes!(status::report, reports::delete))
        .routes(routes!(reports::search))
        .routes(routes!(reports::search_form))
        .routes(routes!(reports::observation))
        .routes(routes!(reports::media))
        .routes(routes!(reports::device))
        .routes(routes!(reports::provenance))
        .routes(routes!(status::get, status::delete))
        .routes(routes!(bundle::post))
        .routes(routes!(tasks::search))
        .routes(routes!(tasks::get))
        .routes(routes!(trail::search))
        .routes(routes!(trail::get))
        .routes(routes!(batches::manifest))
        .routes(routes!(batches::create))
        .routes(routes!(batches::get, batches::resume, batches::delete))
        .routes(routes!(batches::results))
        .routes(routes!(batches::errors))
        .routes(routes!(jobs::list))
        .routes(routes!(jobs::get))
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
    let (routes, _) = for_operators().split_for_parts();
    let routes = bounded(routes)
        .layer(from_fn_with_state(operators.clone(), rates::count))
        .layer(from_fn_with_state(operators.clone(), audited))
        .layer(from_fn_with_state(operators.clone(), rates::tell));
    dressed(routes, operators)
}

/// The API of operators, with the document that describes it.
fn for_operators() -> OpenApiRouter<Arc<Operators>> {
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(openapi::operators))
        .routes(routes!(dead::list))
        .routes(routes!(dead::get, dead::purge))
        .routes(routes!(dead::requeue))
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
