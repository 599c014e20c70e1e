//! `/livez` and `/metrics`, for who runs the service: on a listener of this machine only, apart from staff's.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
};
use dermflow_http::{
    answer,
    dress::{bounded, dressed},
};
use serde_json::json;

use super::Service;

/// What the listener serves.
pub(super) fn router(service: Arc<Service>) -> Router {
    let routes = Router::new().route("/livez", get(live)).route("/metrics", get(metrics));
    dressed(bounded(routes), service)
}

/// The process answers.
async fn live() -> Response {
    answer::json(json!({"status": "live"}))
}

/// The Prometheus exposition.
async fn metrics(State(service): State<Arc<Service>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], service.metrics.render()).into_response()
}
