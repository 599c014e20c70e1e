//! `GET /jobs/{id}`: the record of a job as plain JSON.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use dermflow_auth::token::SCOPE_ANALYZE;
use dermflow_schemas::{error::Code, fhir::instant, job::State as JobState};
use serde_json::{Value, json};

use crate::{
    answer::{self, Problem},
    app::App,
    extract::{Caller, JobPath},
    store::Record,
    submit::status_url,
};

pub(crate) async fn get(
    State(app): State<Arc<App>>,
    caller: Caller,
    JobPath(id): JobPath,
) -> Result<Response, Problem> {
    let client = caller.with_scope(SCOPE_ANALYZE)?;
    let record = app.store.find(id, client).await?.ok_or(Code::NotFound)?;
    Ok(answer::json(shown(&app.public_url, &record)))
}

/// A record as JSON. Times are RFC 3339 in UTC; `model_ms` is the time in the model, all images together.
pub(crate) fn shown(public_url: &str, record: &Record) -> Value {
    let has_report = record.state == JobState::Succeeded && !record.deleted;
    let error = record.failure.as_ref().map(|failure| {
        let kind = failure.code.kind();
        json!({"code": kind.code, "title": kind.text, "retry": kind.retry.as_str(), "image": failure.image.map(|i| i + 1)})
    });
    json!({
        "id": record.id,
        "status": record.state,
        "lane": record.lane,
        "images": record.images,
        "attempts": record.attempts,
        "accepted_at": instant(record.accepted_at),
        "queued_at": record.queued_at.map(instant),
        "started_at": record.started_at.map(instant),
        "finished_at": record.finished_at.map(instant),
        "deadline": instant(record.deadline),
        "model_ms": record.model_us.map(|us| us as f64 / 1e3),
        "error": error,
        "links": {
            "self": format!("{public_url}/jobs/{}", record.id),
            "status": status_url(public_url, record.id),
            "report": has_report.then(|| format!("{public_url}/fhir/DiagnosticReport/{}", record.id)),
        },
    })
}
