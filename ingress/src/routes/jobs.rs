//! `/jobs`: the records of jobs as plain JSON.

use std::sync::Arc;

use axum::{
    extract::{OriginalUri, Query, State, rejection::QueryRejection},
    http::Uri,
    response::Response,
};
use dermflow_auth::audit::Object;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    fhir::instant,
    id::JobId,
    job::State as JobState,
    limits::{DEFAULT_PAGE, MAX_PAGE},
};
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    answer::{self, Problem},
    app::App,
    audited::Deeds,
    drain::{Place, place},
    extract::{Allowed, JobPath, Read, Search},
    store::{Record, batches::Filter},
    submit::status_url,
    upload::batch_url,
};

/// One of the caller's jobs.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Read>,
    JobPath(id): JobPath,
) -> Result<Response, Problem> {
    let record = app.store.find(id, client).await?.ok_or(Code::NotFound)?;
    let place = place(&app, client, &record).await;
    let response = answer::json(shown(&app.public_url, &record, place));
    Ok(Deeds::Status(Some(Object::job(id))).of(response))
}

/// What a list is asked for.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    /// States, with commas.
    status: Option<String>,
    /// RFC 3339.
    #[serde(default, with = "time::serde::rfc3339::option")]
    created_after: Option<OffsetDateTime>,
    batch: Option<Uuid>,
    /// Jobs before this one.
    cursor: Option<String>,
    limit: Option<usize>,
}

/// The caller's jobs, the latest first. A page begins after the last job of the one before it, so that jobs that
/// come in meanwhile shift nothing.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Search>,
    wanted: Result<Query<Wanted>, QueryRejection>,
    uri: OriginalUri,
) -> Result<Response, Problem> {
    let invalid = |field: &str| ApiError::from(Code::QueryInvalid).at(field);
    let Query(wanted) = wanted.map_err(|_| invalid("query"))?;
    let states = wanted.status.as_deref().map(|list| list.split(',').map(str::parse).collect());
    let states: Result<Vec<JobState>, _> = states.unwrap_or(Ok(Vec::new()));
    let cursor = wanted.cursor.as_deref().map(str::parse).transpose().map_err(|_| invalid("cursor"))?;
    let filter = Filter {
        states: states.map_err(|_| invalid("status"))?,
        created_after: wanted.created_after,
        created_before: None,
        batch: wanted.batch,
        cursor,
    };
    let limit = wanted.limit.unwrap_or(DEFAULT_PAGE).clamp(1, MAX_PAGE);
    // One more tells whether there is another page.
    let mut records = app.store.list(client, &filter, limit + 1).await?;
    let more = records.len() > limit;
    records.truncate(limit);
    let next = records.last().filter(|_| more).map(|last| next_page(&app, &uri.0, last.id));
    let jobs: Vec<_> = records.iter().map(|record| shown(&app.public_url, record, None)).collect();
    Ok(Deeds::Status(None).of(answer::json(json!({"jobs": jobs, "next": next}))))
}

/// The same request with another cursor.
fn next_page(app: &App, uri: &Uri, last: JobId) -> String {
    let query = uri.query().unwrap_or_default().split('&');
    let query = query.filter(|pair| !pair.is_empty() && !pair.starts_with("cursor="));
    let query = query.map(str::to_owned).chain([format!("cursor={last}")]).collect::<Vec<_>>().join("&");
    format!("{}{}?{query}", app.public_url, uri.path())
}

/// A record as JSON. Times are RFC 3339 in UTC; `model_ms` is the time in the model, all images together.
pub(crate) fn shown(public_url: &str, record: &Record, place: Option<Place>) -> serde_json::Value {
    let has_report = record.state == JobState::Succeeded && !record.deleted;
    let error = record.failure.as_ref().map(|failure| {
        let kind = failure.code.kind();
        json!({"code": kind.code, "title": kind.text, "retry": kind.retry.as_str(), "image": failure.image.map(|i| i + 1)})
    });
    let queue = place.map(|Place { position, starts_in }| {
        json!({"position": position, "expected_start": starts_in.map(|wait| instant(clock::now() + wait))})
    });
    json!({
        "id": record.id,
        "status": record.state,
        "lane": record.lane,
        "images": record.images,
        "attempts": record.attempts,
        "batch": record.batch,
        "custom_id": record.custom_id,
        "line": record.line,
        "queue": queue,
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
            "batch": record.batch.map(|batch| batch_url(public_url, batch)),
        },
    })
}
