//! The route table: the whole API on one screen.

use std::sync::Arc;

use axum::{
    Router,
    extract::{MatchedPath, Request, State},
    http::StatusCode,
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
};
use dermflow_http::{
    dress::{bounded, dressed},
    serve::Certificate,
};
use dermflow_schemas::error::Code;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    answer::Problem,
    app::App,
    audited::{Origin, audited},
    config::{ClientOptions, Group},
    dead::Operators,
    rates,
};

mod analyze;
mod batches;
mod bundle;
mod dead;
mod definitions;
mod device;
mod health;
mod jobs;
pub(crate) mod login;
mod oauth;
mod openapi;
mod provenance;
mod reports;
mod status;
mod tasks;
mod trail;

pub(crate) use login::is_login;

/// What everybody may read, where no handler looks at a token.
const PUBLISHED: [&str; 10] = [
    "/openapi.json",
    "/fhir/metadata",
    "/fhir/OperationDefinition",
    "/fhir/OperationDefinition/{id}",
    "/fhir/CodeSystem",
    "/fhir/CodeSystem/{id}",
    "/fhir/ValueSet",
    "/fhir/ValueSet/{id}",
    "/fhir/ConceptMap",
    "/fhir/ConceptMap/{id}",
];

/// Whether a route is open to everybody, so that nobody looks at a token there.
pub(crate) fn is_open(path: &str) -> bool {
    device::is_open(path) || PUBLISHED.contains(&path) || path.contains("/.well-known/")
}

/// What clients reach.
pub(crate) fn public(app: Arc<App>, needs: &ClientOptions) -> Router {
    let (routes, _) = clients(needs).split_for_parts();
    let routes = bounded(routes)
        .layer(from_fn_with_state(app.clone(), rates::count))
        .layer(from_fn_with_state(app.clone(), audited))
        .layer(from_fn_with_state(app.clone(), rates::tell));
    measured(routes, app)
}

/// The API of clients and auditors, with the document that describes it. Where each is, and for whom, stands above its
/// handler.
fn clients(needs: &ClientOptions) -> OpenApiRouter<Arc<App>> {
    let sign_in = OpenApiRouter::new()
        .routes(routes!(login::post))
        .routes(routes!(oauth::token))
        .routes(routes!(oauth::revoke))
        .routes(routes!(oauth::introspect))
        .merge(device::sign_in());
    let documents = OpenApiRouter::new()
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
        .merge(device::documents());
    let api = OpenApiRouter::new()
        .routes(routes!(analyze::post))
        .routes(routes!(status::report, reports::delete))
        .routes(routes!(reports::search))
        .routes(routes!(reports::search_form))
        .routes(routes!(reports::observation))
        .routes(routes!(reports::media))
        .routes(routes!(reports::device))
        .routes(routes!(reports::provenance))
        .routes(routes!(provenance::search))
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
        .merge(device::api());
    OpenApiRouter::with_openapi(openapi::document())
        .merge(guarded(sign_in, needs.need(Group::SignIn)))
        .merge(documents)
        .merge(guarded(api, needs.need(Group::Api)))
}

/// Closed to who shows no certificate, if one is needed.
fn guarded<S: Clone + Send + Sync + 'static>(routes: OpenApiRouter<S>, is_needed: bool) -> OpenApiRouter<S> {
    if is_needed { routes.route_layer(from_fn(certified)) } else { routes }
}

async fn certified(request: Request, next: Next) -> Response {
    match request.extensions().get::<Certificate>() {
        Some(_) => {
            if let Some(origin) = request.extensions().get::<Origin>() {
                origin.needs_certificate();
            }
            next.run(request).await
        }
        None => Problem::from(Code::ClientCertificateNeeded).into_response(),
    }
}

/// What operators reach, on the loopback interface only.
pub(crate) fn internal(app: Arc<App>) -> Router {
    let (routes, _) = of_this_machine().split_for_parts();
    measured(bounded(routes), app)
}

/// Health and metrics, with the document that describes them.
fn of_this_machine() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(openapi::internal))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
}

/// What operators reach in a process of its own, on the loopback interface only, with a token for it.
pub(crate) fn operators(operators: Arc<Operators>, needs: &ClientOptions) -> Router {
    let (routes, _) = for_operators(needs).split_for_parts();
    let routes = bounded(routes)
        .layer(from_fn_with_state(operators.clone(), rates::count))
        .layer(from_fn_with_state(operators.clone(), audited))
        .layer(from_fn_with_state(operators.clone(), rates::tell));
    dressed(routes, operators)
}

/// The API of operators, with the document that describes it.
fn for_operators(needs: &ClientOptions) -> OpenApiRouter<Arc<Operators>> {
    let api = OpenApiRouter::new()
        .routes(routes!(dead::list))
        .routes(routes!(dead::get, dead::purge))
        .routes(routes!(dead::requeue));
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(openapi::operators))
        .merge(guarded(api, needs.need(Group::Operators)))
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
