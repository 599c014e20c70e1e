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
pub(crate) async fn live() -> Response {
    answer::json(json!({"status": "live"}))
}

/// Broker and database can be reached: send traffic here.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    app.store.ping().await?;
    if app.nats.connection_state() != connection::State::Connected {
        return Err(Code::QueueUnavailable.into());
    }
    Ok(answer::json(json!({"status": "ready"})))
}

/// The Prometheus exposition.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render()).into_response()
}
