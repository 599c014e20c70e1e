//! `/livez` and `/metrics`, for who runs the service, and the document that describes them: on a listener of this machine
//! only, apart from staff's.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use dermflow_http::{
    answer,
    dress::{bounded, dressed},
};
use serde_json::json;
use utoipa::OpenApi;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::Service;

/// What the listener serves.
pub(super) fn router(service: Arc<Service>) -> Router {
    let (routes, _) = described().split_for_parts();
    dressed(bounded(routes), service)
}

#[derive(OpenApi)]
#[openapi(info(title = "Dermflow: registration", description = "For who runs the service, on its machine."))]
struct Api;

fn described() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::with_openapi(Api::openapi())
        .routes(routes!(live))
        .routes(routes!(metrics))
        .routes(routes!(describe))
}

/// This document.
#[utoipa::path(get, path = "/openapi.json",
    responses((status = 200, description = "OpenAPI 3.1.", body = Object)))]
async fn describe() -> Response {
    answer::json(json!(described().into_openapi()))
}

/// The process answers.
#[utoipa::path(get, path = "/livez", responses((status = 200, description = "It does.", body = Object)))]
async fn live() -> Response {
    answer::json(json!({"status": "live"}))
}

/// The Prometheus exposition.
#[utoipa::path(get, path = "/metrics",
    responses((status = 200, description = "The text format, version 0.0.4.", body = String, content_type = "text/plain")))]
async fn metrics(State(service): State<Arc<Service>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], service.metrics.render()).into_response()
}
