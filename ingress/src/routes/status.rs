//! `/fhir/_async/{id}` and `/fhir/DiagnosticReport/{id}`: poll, fetch, cancel.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use dermflow_auth::audit::{Object, Who};
use dermflow_http::keeping::keeping;
use dermflow_schemas::{
    clock,
    envelope::Failure,
    error::{ApiError, Code},
    id::{ClientId, JobId},
    job::State as JobState,
    limits::POLL_INTERVAL,
};
use time::{OffsetDateTime, format_description::well_known::Rfc2822};

use crate::{
    answer::{self, Problem, accepts_fhir},
    app::App,
    audited::{Deed, Deeds},
    drain::{Place, place},
    extract::{Allowed, Delete, JobPath, Read},
    language, recorder,
    routes::openapi::{Any, Failed, GoesOn, Guarded, Negotiated, OperationOutcome, Own, Reported},
    store::Record,
    submit::{Ended, Report, ended, status_url},
};

pub(super) static PROGRESS: HeaderName = HeaderName::from_static("x-progress");
static SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// The state of a job: 202 while it goes on, then exactly what the synchronous call would have answered.
#[utoipa::path(get, path = "/fhir/_async/{id}", operation_id = "poll", tag = "reports",
    params(("id" = Uuid, Path, description = "The job.")),
    responses(Reported, GoesOn, Any, Guarded, Own, Negotiated, Failed))]
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Read>,
    JobPath(id): JobPath,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    let record = app.store.find(id, client).await?.filter(|record| !gone(record)).ok_or(Code::NotFound)?;
    if !record.state.is_terminal() {
        let mut response = accepted(&app, id);
        let place = place(&app, client, &record).await;
        insert(response.headers_mut(), &PROGRESS, &progress(&record, place));
        return Ok(Deeds::Status(Some(Object::job(id))).of(response));
    }
    let ended = ended(&app, id, client).await?.ok_or(Code::NotFound)?;
    Ok(finished(&app, ended))
}

/// The report alone; there is none while the job goes on, or when it failed.
#[utoipa::path(get, path = "/fhir/DiagnosticReport/{id}", operation_id = "readReport", tag = "reports",
    params(("id" = Uuid, Path, description = "The report, and its job.")),
    responses(Reported, Any, Guarded, Own, Negotiated))]
pub(crate) async fn report(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Read>,
    JobPath(id): JobPath,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    let ended = ended(&app, id, client).await?;
    Ok(finished(&app, ended.filter(|ended| ended.report.is_some()).ok_or(Code::NotFound)?))
}

/// Cancels a job that goes on; removes the result of one that has ended.
#[utoipa::path(delete, path = "/fhir/_async/{id}", operation_id = "cancel", tag = "reports",
    params(("id" = Uuid, Path, description = "The job.")),
    responses(
        (status = 202, description = "Done.", body = OperationOutcome, content_type = "application/fhir+json"),
        Any, Guarded, Own))]
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Allowed { client, who, .. }: Allowed<Delete>,
    JobPath(id): JobPath,
) -> Result<Response, Problem> {
    remove(&app, client, who, id).await?;
    let body = answer::information("job-deleted", "The job and what it left behind are removed.");
    Ok(answer::fhir(StatusCode::ACCEPTED, body))
}

/// Withdraws a job that goes on; removes what is left of one that has ended.
pub(super) async fn remove(app: &App, client: ClientId, who: Who, id: JobId) -> Result<(), Problem> {
    let record = app.store.delete(id, client, who, clock::now()).await?.ok_or(Code::NotFound)?;
    if !record.state.is_terminal() {
        let cancelled = [record.lane.as_str(), JobState::Cancelled.as_str()];
        app.metrics.jobs_ended.with_label_values(&cancelled).inc();
        recorder::withdraw(app, id, record.stream_seq).await;
    }
    if record.claim_check {
        recorder::delete_object(app, id).await;
    }
    Ok(())
}

/// 202: the job goes on, here is where to ask.
pub(crate) fn accepted(app: &App, job: JobId) -> Response {
    let text = "The analysis is queued. Poll the URL in Content-Location.";
    let mut response = answer::fhir(StatusCode::ACCEPTED, answer::information("job-accepted", text));
    let headers = response.headers_mut();
    insert(headers, &header::CONTENT_LOCATION, &status_url(&app.public_url, job));
    insert(headers, &header::RETRY_AFTER, &POLL_INTERVAL.as_secs().to_string());
    response
}

/// The report of a job that has ended, or its error.
pub(super) fn finished_record(ended: Ended) -> Result<(Record, Report), Problem> {
    let Ended { record, report, .. } = ended;
    let Some(report) = report else { return Err(failed(&record).into()) };
    Ok((record, report))
}

/// What a job that has ended answers: its report with 200, or its error.
pub(crate) fn finished(app: &App, ended: Ended) -> Response {
    answered(ended, |record, report| {
        let written = language::of_report(&report);
        let mut response = answer::fhir(StatusCode::OK, report);
        let headers = response.headers_mut();
        if let Some(language) = written {
            insert(headers, &header::CONTENT_LANGUAGE, &language);
        }
        let location = format!("{}/fhir/DiagnosticReport/{}", app.public_url, record.id);
        insert(headers, &header::CONTENT_LOCATION, &location);
        insert(headers, &header::ETAG, "W/\"1\"");
        response
    })
}

/// The same in the form that `dress` gives the report.
pub(crate) fn answered(ended: Ended, dress: impl FnOnce(&Record, Vec<u8>) -> Response) -> Response {
    let (job, last, expires) = (ended.record.id, ended.last, ended.expires);
    let (record, report) = match finished_record(ended) {
        Ok(finished) => finished,
        // That the job failed is what is asked for.
        Err(failed) => return Deeds::Status(Some(Object::job(job))).of(failed.into_response()),
    };
    let mut response = dress(&record, report.bytes);
    let headers = response.headers_mut();
    if let Some(finished_at) = record.finished_at {
        insert(headers, &header::LAST_MODIFIED, &http_date(finished_at));
    }
    insert(headers, &header::EXPIRES, &http_date(expires));
    insert(headers, &SERVER_TIMING, &server_timing(&record));
    keeping(Deeds::Each(vec![Deed::ended(record.id, true).last(last)]).of(response), report.memory)
}

/// What a failed job answers.
pub(super) fn failed_with(failure: &Failure) -> ApiError {
    let error = ApiError::from(failure.code);
    match failure.image {
        Some(image) => error.detail(format!("image {} of the request", image + 1)),
        None => error,
    }
}

fn failed(record: &Record) -> ApiError {
    match (&record.failure, record.state) {
        (Some(failure), _) => failed_with(failure),
        (None, JobState::Cancelled) => Code::JobCancelled.into(),
        (None, _) => Code::Internal.into(),
    }
}

/// Milliseconds in the queue, in the model, and from acceptance to the end (W3C Server Timing).
fn server_timing(record: &Record) -> String {
    let millis =
        |end: Option<OffsetDateTime>| end.map_or(0, |end| clock::elapsed_ms(record.accepted_at, end));
    let model = record.model_us.unwrap_or(0) as f64 / 1e3;
    format!(
        "queue;dur={}, model;dur={model:.3}, total;dur={}",
        millis(record.started_at),
        millis(record.finished_at)
    )
}

/// Below 100 characters, as FHIR's asynchronous pattern wants it.
fn progress(record: &Record, place: Option<Place>) -> String {
    match (record.state, place) {
        (JobState::Running, _) => format!("running, attempt {}", record.attempts),
        (_, Some(Place { position, starts_in: Some(wait) })) => {
            format!("queued, position {position}, starts in about {} s", wait.as_secs())
        }
        (_, Some(Place { position, starts_in: None })) => format!("queued, position {position}"),
        (_, None) if record.attempts > 0 => format!("queued, attempt {}", record.attempts + 1),
        (_, None) => "queued".into(),
    }
}

/// Withdrawn: for the client it is not there any more.
fn gone(record: &Record) -> bool {
    record.state == JobState::Cancelled
}

/// RFC 9110 §5.6.7.
fn http_date(at: OffsetDateTime) -> String {
    let date = at.to_offset(time::UtcOffset::UTC).format(&Rfc2822).unwrap_or_default();
    date.replace("+0000", "GMT")
}

pub(super) fn insert(headers: &mut HeaderMap, name: &HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_in_the_form_of_http() {
        assert_eq!(http_date(OffsetDateTime::UNIX_EPOCH), "Thu, 01 Jan 1970 00:00:00 GMT");
    }
}
