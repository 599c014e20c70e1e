//! `/jobs`: the records of jobs as plain JSON.

use std::sync::Arc;

use axum::{
    Json,
    extract::{OriginalUri, Query, State, rejection::QueryRejection},
    http::Uri,
    response::{IntoResponse, Response},
};
use dermflow_auth::audit::Object;
use dermflow_http::openapi::{codes, retries};
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    fhir::instant,
    id::JobId,
    job::{Lane, State as JobState},
    limits::{DEFAULT_PAGE, MAX_PAGE},
};
use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, UtcOffset};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    answer::Problem,
    app::App,
    audited::Deeds,
    drain::{Place, place},
    extract::{Allowed, JobPath, Read, Search},
    routes::openapi::{Any, Guarded, Own, Queried, lanes, states},
    store::{Record, batches::Filter},
    submit::status_url,
    upload::batch_url,
};

/// One of the caller's jobs.
#[utoipa::path(get, path = "/jobs/{id}", operation_id = "readJob", tag = "jobs",
    params(("id" = Uuid, Path, description = "The job.")),
    responses((status = 200, description = "The job.", body = Job), Any, Guarded, Own))]
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Read>,
    JobPath(id): JobPath,
) -> Result<Response, Problem> {
    let record = app.store.find(id, client).await?.ok_or(Code::NotFound)?;
    let place = place(&app, client, &record).await;
    let response = Json(shown(&app.public_url, &record, place)).into_response();
    Ok(Deeds::Status(Some(Object::job(id))).of(response))
}

/// What a list is asked for.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wanted {
    /// States, with commas.
    #[param(pattern = "^[a-z]+(,[a-z]+)*$")]
    status: Option<String>,
    /// RFC 3339.
    #[serde(default, with = "time::serde::rfc3339::option")]
    created_after: Option<OffsetDateTime>,
    /// Jobs of this batch.
    batch: Option<Uuid>,
    /// Jobs before this one.
    #[param(value_type = Option<Uuid>)]
    cursor: Option<String>,
    /// Jobs at most.
    limit: Option<usize>,
}

/// A page of jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Page {
    /// The latest first.
    jobs: Vec<Job>,
    /// The URL of the next page; null when this is the last one.
    next: Option<String>,
}

/// A job as recorded. Times are RFC 3339 in UTC.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Job {
    /// Its id, which is the report's too.
    #[schema(value_type = Uuid)]
    id: JobId,
    /// Where it stands.
    #[schema(schema_with = states)]
    status: JobState,
    /// Whether its caller waited.
    #[schema(schema_with = lanes)]
    lane: Lane,
    /// How many.
    images: i16,
    /// How many were made.
    attempts: i32,
    /// The batch that it belongs to.
    batch: Option<Uuid>,
    /// The caller's name for its line there.
    custom_id: Option<String>,
    /// The number of its line there, from 1.
    line: Option<i32>,
    /// Where it waits; null in lists, and when it does not wait.
    queue: Option<Queue>,
    /// When it was recorded.
    #[schema(format = DateTime)]
    accepted_at: String,
    /// When the queue had it.
    #[schema(format = DateTime)]
    queued_at: Option<String>,
    /// When the last attempt began.
    #[schema(format = DateTime)]
    started_at: Option<String>,
    /// When it ended.
    #[schema(format = DateTime)]
    finished_at: Option<String>,
    /// When its report was removed, by the client or because it is not kept any longer.
    #[schema(format = DateTime)]
    removed_at: Option<String>,
    /// When it is given up.
    #[schema(format = DateTime)]
    deadline: String,
    /// Milliseconds in the model, all images together.
    model_ms: Option<f64>,
    /// Why it failed.
    error: Option<JobError>,
    /// What belongs to it.
    links: JobLinks,
}

/// A place in the queue.
#[derive(Debug, Serialize, ToSchema)]
struct Queue {
    /// 1 and the open jobs before it: those that run, and those that start earlier.
    position: i64,
    /// Null while nothing drains.
    #[schema(format = DateTime)]
    expected_start: Option<String>,
}

/// Why a job failed.
#[derive(Debug, Serialize, ToSchema)]
struct JobError {
    /// The stable code.
    #[schema(schema_with = codes)]
    code: &'static str,
    /// One sentence.
    title: &'static str,
    /// Whether a retry is safe.
    #[schema(schema_with = retries)]
    retry: &'static str,
    /// The image at fault, from 1.
    image: Option<usize>,
}

/// The URLs of what belongs to a job.
#[derive(Debug, Serialize, ToSchema)]
struct JobLinks {
    /// This record.
    #[serde(rename = "self")]
    own: String,
    /// Where to poll.
    status: String,
    /// The report, when there is one.
    report: Option<String>,
    /// The batch.
    batch: Option<String>,
}

/// The caller's jobs, the latest first. A page begins after the last job of the one before it, so that jobs that
/// come in meanwhile shift nothing.
#[utoipa::path(get, path = "/jobs", operation_id = "listJobs", tag = "jobs", params(Wanted),
    responses((status = 200, description = "A page.", body = Page), Any, Guarded, Queried))]
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
    // By the clock of another zone it may be in a year that UTC has no number for.
    let after = wanted.created_after.map(|after| after.checked_to_offset(UtcOffset::UTC));
    let after = after.map(|after| after.ok_or_else(|| invalid("created_after"))).transpose()?;
    let filter = Filter {
        states: states.map_err(|_| invalid("status"))?,
        from: after.map(|after| after.saturating_add(time::Duration::MICROSECOND)),
        before: None,
        batch: wanted.batch,
        cursor,
    };
    let limit = wanted.limit.unwrap_or(DEFAULT_PAGE).clamp(1, MAX_PAGE);
    // One more tells whether there is another page.
    let mut records = app.store.list(client, &filter, limit + 1).await?;
    let more = records.len() > limit;
    records.truncate(limit);
    let next = records.last().filter(|_| more).map(|last| next_page(&app, &uri.0, last.id));
    let jobs = records.iter().map(|record| shown(&app.public_url, record, None)).collect();
    Ok(Deeds::Status(None).of(Json(Page { jobs, next }).into_response()))
}

/// The same request with another cursor.
fn next_page(app: &App, uri: &Uri, last: JobId) -> String {
    let query = uri.query().unwrap_or_default().split('&');
    let query = query.filter(|pair| !pair.is_empty() && !pair.starts_with("cursor="));
    let query = query.map(str::to_owned).chain([format!("cursor={last}")]).collect::<Vec<_>>().join("&");
    format!("{}{}?{query}", app.public_url, uri.path())
}

/// A record as JSON.
pub(crate) fn shown(public_url: &str, record: &Record, place: Option<Place>) -> Job {
    let has_report = record.state == JobState::Succeeded && record.deleted_at.is_none();
    let error = record.failure.as_ref().map(|failure| {
        let kind = failure.code.kind();
        let image = failure.image.map(|index| index + 1);
        JobError { code: kind.code, title: kind.text, retry: kind.retry.as_str(), image }
    });
    let queue = place.map(|Place { position, starts_in }| Queue {
        position,
        expected_start: starts_in.map(|wait| instant(clock::now() + wait)),
    });
    Job {
        id: record.id,
        status: record.state,
        lane: record.lane,
        images: record.images,
        attempts: record.attempts,
        batch: record.batch,
        custom_id: record.custom_id.clone(),
        line: record.line,
        queue,
        accepted_at: instant(record.accepted_at),
        queued_at: record.queued_at.map(instant),
        started_at: record.started_at.map(instant),
        finished_at: record.finished_at.map(instant),
        removed_at: record.deleted_at.map(instant),
        deadline: instant(record.deadline),
        model_ms: record.model_us.map(|us| us as f64 / 1e3),
        error,
        links: JobLinks {
            own: format!("{public_url}/jobs/{}", record.id),
            status: status_url(public_url, record.id),
            report: has_report.then(|| format!("{public_url}/fhir/DiagnosticReport/{}", record.id)),
            batch: record.batch.map(|batch| batch_url(public_url, batch)),
        },
    }
}
