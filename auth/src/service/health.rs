//! `/livez` and `/metrics`: for whom the certificate alone is enough.

use std::sync::Arc;

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use dermflow_http::answer;
use serde_json::json;

use super::Service;

/// The process answers.
#[utoipa::path(get, path = "/livez", security(()), responses((status = 200, description = "The process answers.")))]
pub(super) async fn live() -> Response {
    answer::json(json!({"status": "live"}))
}

/// The Prometheus exposition.
#[utoipa::path(get, path = "/metrics", security(()),
    responses((status = 200, description = "Prometheus text format.", body = String, content_type = "text/plain")))]
pub(super) async fn metrics(State(service): State<Arc<Service>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], service.metrics.render()).into_response()
}
