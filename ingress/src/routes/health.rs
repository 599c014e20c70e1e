//! `/livez`, `/readyz`, `/metrics` on the internal listener.

use std::sync::Arc;

use async_nats::connection;
use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use dermflow_schemas::error::Code;
use serde_json::json;

use crate::{
    answer::{self, Problem},
    app::App,
};

/// The process answers.
#[utoipa::path(get, path = "/livez", operation_id = "live", tag = "operation", security(()),
    responses((status = 200, description = "It does.", body = Object)))]
pub(crate) async fn live() -> Response {
    answer::json(json!({"status": "live"}))
}

/// Broker and database can be reached: send traffic here.
#[utoipa::path(get, path = "/readyz", operation_id = "ready", tag = "operation", security(()),
    responses((status = 200, description = "They can.", body = Object),
        (status = 503, description = "One of them cannot.")))]
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    app.store.ping().await?;
    if app.nats.connection_state() != connection::State::Connected {
        return Err(Code::QueueUnavailable.into());
    }
    Ok(answer::json(json!({"status": "ready"})))
}

/// The Prometheus exposition.
#[utoipa::path(get, path = "/metrics", operation_id = "metrics", tag = "operation", security(()),
    responses((status = 200, description = "The text format, version 0.0.4.", body = String, content_type = "text/plain")))]
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    app.metrics.body_bytes.set(app.bounds.bodies.held() as i64);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render()).into_response()
}
