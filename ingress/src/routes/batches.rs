//! `/batches`: tens of thousands of images at a time. NDJSON in, NDJSON out, both while they grow.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body as AxumBody,
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use dermflow_auth::{
    audit::{Action, Object},
    token::Caller,
};
use dermflow_http::openapi::words;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    fhir::instant,
    id::{ClientId, IdempotencyKey},
    job::{Lane, STATES, State as JobState},
    limits::{DRAIN_WINDOW, MAX_WAIT, POLL_INTERVAL, WAITER_POLL},
};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::time::{Instant, sleep};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::{
    access::Verdict,
    answer::{self, Problem},
    app::App,
    audited::Deeds,
    batches::clear,
    extract::{Allowed, Body, Delete, Pass, Read, Submit},
    language,
    lines::Form,
    retention::{self, Answered},
    routes::{
        analyze::{Turn, cancel_after, idempotency_key},
        openapi::{Any, Guarded, Own, Queried, Typed},
        status::failed_with,
    },
    store::batches::{Batch, BatchError, BatchResult, Cause, Tally},
    submit::{internal, open},
    upload::{self, NDJSON, Upload, batch_url},
};

/// A line for the description of the API, with an image that cannot be read.
const LINE: &str = "{\"custom_id\": \"lesion-1\", \"images\": [{\"data\": \"iVBORw0KGgo=\"}]}\n";

const FHIR_NDJSON: &str = "application/fhir+ndjson";

/// A new batch, or with a known `Idempotency-Key` the one that was made with it.
#[utoipa::path(post, path = "/batches", operation_id = "createBatch", tag = "batches",
    params(("Idempotency-Key" = Option<String>, Header, pattern = "^[!-~]{1,255}$",
        description = "The same key is the same batch."),
        ("Cancel-After" = Option<String>, Header, pattern = "^[0-9]{1,9}[smhd]?$",
            description = "The deadline of its jobs, at least 5 seconds: seconds, or a number with s, m, h or d.")),
    request_body(description = "A line an analysis: `custom_id`, `images`; `subject`, `identifier`, `heat_map`, `model`.",
        content((Value = "application/x-ndjson", example = json!(LINE)), (Value = "application/fhir+ndjson"))),
    responses(
        (status = 200, description = "A line an input line, while the upload goes on; the first says which batch it is, the \
            last how many lines there were.", body = String, content_type = "application/x-ndjson",
            headers(("Location" = String, description = "The batch's URL."))),
        (status = 400, description = "A header cannot be read."), Any, Guarded, Own, Typed))]
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    caller: Allowed<Submit>,
    pass: Pass,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let target = Target::New(idempotency_key(&headers)?);
    begin(app, caller, pass, target, &headers, body).await
}

/// More lines for a batch, or the same ones again after a cut.
#[utoipa::path(post, path = "/batches/{id}", operation_id = "resumeBatch", tag = "batches",
    params(("id" = Uuid, Path, description = "The batch."),
        ("Cancel-After" = Option<String>, Header, pattern = "^[0-9]{1,9}[smhd]?$",
            description = "The deadline of its jobs, at least 5 seconds: seconds, or a number with s, m, h or d.")),
    request_body(description = "A line an analysis: `custom_id`, `images`; `subject`, `identifier`, `heat_map`, `model`.",
        content((Value = "application/x-ndjson", example = json!(LINE)), (Value = "application/fhir+ndjson"))),
    responses(
        (status = 200, description = "As to the first upload.", body = String, content_type = "application/x-ndjson",
            headers(("Location" = String, description = "The batch's URL."))),
        (status = 400, description = "A header cannot be read."),
        Any, Guarded, Own, Typed))]
pub(crate) async fn resume(
    State(app): State<Arc<App>>,
    caller: Allowed<Submit>,
    pass: Pass,
    BatchPath(batch): BatchPath,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    begin(app, caller, pass, Target::Known(batch), &headers, body).await
}

/// Which batch an upload is to.
enum Target {
    /// A new one, or the one that was made with this key.
    New(Option<IdempotencyKey>),
    /// This one.
    Known(Uuid),
}

async fn begin(
    app: Arc<App>,
    Allowed { client, who, .. }: Allowed<Submit>,
    pass: Pass,
    target: Target,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let (form, cancel_after) = (form(headers)?, cancel_after(headers)?);
    let language = language::accepted(headers);
    let place = app.bounds.uploads.take(client)?;
    // Runs to its end even when the caller hangs up half-way: an upload that the record counts is one that ends.
    let begun = tokio::spawn(async move {
        let (id, now) = (Uuid::now_v7(), clock::now());
        let (batch, mending) = match target {
            Target::New(key) => {
                let key = key.as_ref().map(IdempotencyKey::as_str);
                (app.store.open_batch(Uuid::now_v7(), client, key, id, now).await?, key.is_some())
            }
            Target::Known(batch) => (app.store.reopen_batch(batch, client, id, now).await?, true),
        };
        let batch = batch.ok_or(Code::NotFound)?;
        let over = app.draining.child_token();
        let upload = Upload {
            id,
            pass,
            client,
            who,
            batch,
            form,
            language,
            cancel_after,
            mending,
            over,
            _place: place,
        };
        Ok(upload::start(app, upload, body.into_inner()))
    });
    begun.await.map_err(|error| internal(&error))?
}

fn form(headers: &HeaderMap) -> Result<Form, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    match kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase().as_str() {
        FHIR_NDJSON => Ok(Form::Fhir),
        NDJSON => Ok(Form::Plain),
        _ => {
            let rule = format!("{FHIR_NDJSON} or {NDJSON}");
            Err(ApiError::from(Code::MediaType).at("Content-Type").detail(rule))
        }
    }
}

/// How a batch stands.
#[utoipa::path(get, path = "/batches/{id}", operation_id = "readBatch", tag = "batches",
    params(("id" = Uuid, Path, description = "The batch.")),
    responses((status = 200, description = "The batch.", body = BatchStatus), Any, Guarded, Own))]
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Read>,
    BatchPath(id): BatchPath,
) -> Result<Response, Problem> {
    let now = clock::now();
    let batch = app.store.find_batch(id, client, now).await?.ok_or(Code::NotFound)?;
    let progress = Progress::new(batch, app.store.tally(id, now - DRAIN_WINDOW).await?, now);
    Ok(Deeds::Status(Some(Object::batch(id))).of(Json(progress.shown(&app)).into_response()))
}

/// A batch. Times are RFC 3339 in UTC.
#[derive(Debug, Serialize, ToSchema)]
struct BatchStatus {
    /// Its id.
    id: Uuid,
    /// How it stands.
    #[schema(schema_with = statuses)]
    status: &'static str,
    /// When it was made.
    #[schema(format = DateTime)]
    created_at: String,
    /// When an upload reached its end, if none goes on.
    #[schema(format = DateTime)]
    closed_at: Option<String>,
    /// Jobs.
    total: i64,
    /// Lines that no job could be made of.
    refused: i64,
    /// Jobs by their state.
    counts: BTreeMap<&'static str, i64>,
    /// 100 exactly when everything has ended.
    #[schema(minimum = 0, maximum = 100)]
    percent: i64,
    /// Jobs a second.
    rate: f64,
    /// When the last job will have ended, at this rate.
    #[schema(format = DateTime)]
    estimated_end: Option<String>,
    /// What belongs to it.
    links: BatchLinks,
}

const STATUSES: [&str; 5] = ["uploading", "in-progress", "cancelled", "completed-with-errors", "completed"];

fn statuses() -> utoipa::openapi::Object {
    words("How it stands.", STATUSES)
}

/// The URLs of what belongs to a batch.
#[derive(Debug, Serialize, ToSchema)]
struct BatchLinks {
    /// This.
    #[serde(rename = "self")]
    own: String,
    /// The reports.
    results: String,
    /// The lines without one.
    errors: String,
    /// The manifest.
    manifest: String,
}

/// The manifest of FHIR Bulk Data.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    /// When the last job ended.
    #[schema(format = DateTime)]
    transaction_time: String,
    /// The batch.
    request: String,
    /// Always.
    requires_access_token: bool,
    /// The reports.
    output: [ManifestFile; 1],
    /// The lines without one.
    error: [ManifestFile; 1],
}

/// A file of the manifest.
#[derive(Debug, Serialize, ToSchema)]
struct ManifestFile {
    /// The type of its resources.
    r#type: &'static str,
    /// Where it is.
    url: String,
    /// How many resources it has.
    count: i64,
}

/// How far a batch is.
struct Progress {
    batch: Batch,
    tally: Tally,
    /// Jobs a second, over the last [`DRAIN_WINDOW`].
    rate: f64,
    now: OffsetDateTime,
}

impl Progress {
    fn new(batch: Batch, tally: Tally, now: OffsetDateTime) -> Self {
        let window = (now - batch.created_at).as_seconds_f64().clamp(1.0, DRAIN_WINDOW.as_secs_f64());
        let rate = tally.ended_since as f64 / window;
        Self { batch, tally, rate, now }
    }

    fn ended(&self) -> bool {
        self.batch.closed_at.is_some() && self.tally.open() == 0
    }

    fn status(&self) -> &'static str {
        let Tally { refused, .. } = self.tally;
        let (total, of) = (self.tally.total(), |state| self.tally.of(state));
        match (self.ended(), self.batch.closed_at) {
            (false, None) => "uploading",
            (false, Some(_)) => "in-progress",
            _ if total > 0 && of(JobState::Cancelled) == total => "cancelled",
            _ if of(JobState::Failed) + of(JobState::Cancelled) + refused > 0 => "completed-with-errors",
            _ => "completed",
        }
    }

    /// 100 exactly when everything has ended.
    fn percent(&self) -> i64 {
        let (total, open) = (self.tally.total(), self.tally.open());
        if self.ended() { 100 } else { ((total - open) * 100 / total.max(1)).min(99) }
    }

    fn estimated_end(&self) -> Option<OffsetDateTime> {
        let open = self.tally.open();
        (open > 0 && self.rate > 0.0).then(|| self.now + Duration::from_secs_f64(open as f64 / self.rate))
    }

    fn shown(&self, app: &App) -> BatchStatus {
        let url = batch_url(&app.public_url, self.batch.id);
        BatchStatus {
            id: self.batch.id,
            status: self.status(),
            created_at: instant(self.batch.created_at),
            closed_at: self.batch.closed_at.map(instant),
            total: self.tally.total(),
            refused: self.tally.refused,
            counts: STATES.iter().map(|state| (state.as_str(), self.tally.of(*state))).collect(),
            percent: self.percent(),
            rate: (self.rate * 10.0).round() / 10.0,
            estimated_end: self.estimated_end().map(instant),
            links: BatchLinks {
                results: format!("{url}/results"),
                errors: format!("{url}/errors"),
                manifest: manifest_url(app, self.batch.id),
                own: url,
            },
        }
    }
}

fn manifest_url(app: &App, batch: Uuid) -> String {
    format!("{}/fhir/_bulk/{batch}", app.public_url)
}

/// The manifest of FHIR Bulk Data (STU 2, Response - Complete Status); 202 until everything has ended.
#[utoipa::path(get, path = "/fhir/_bulk/{id}", operation_id = "readManifest", tag = "batches",
    params(("id" = Uuid, Path, description = "The batch.")),
    responses((status = 200, description = "The manifest.", body = Manifest),
        (status = 202, description = "The batch goes on.",
            headers(("X-Progress" = String, description = "How far it is."),
                ("Retry-After" = u64, description = "Seconds."))),
        Any, Guarded, Own))]
pub(crate) async fn manifest(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Read>,
    BatchPath(id): BatchPath,
) -> Result<Response, Problem> {
    let now = clock::now();
    let batch = app.store.find_batch(id, client, now).await?.ok_or(Code::NotFound)?;
    let progress = Progress::new(batch, app.store.tally(id, now - DRAIN_WINDOW).await?, now);
    if !progress.ended() {
        let mut response = StatusCode::ACCEPTED.into_response();
        let open = progress.tally.open();
        let text = format!("{} %, {open} of {} open", progress.percent(), progress.tally.total());
        let headers = response.headers_mut();
        headers.extend(HeaderValue::from_str(&text).ok().map(|text| (super::status::PROGRESS.clone(), text)));
        headers.insert(header::RETRY_AFTER, HeaderValue::from(POLL_INTERVAL.as_secs()));
        return Ok(Deeds::Status(Some(Object::batch(id))).of(response));
    }
    let url = batch_url(&app.public_url, id);
    let failed = progress.tally.of(JobState::Failed) + progress.tally.of(JobState::Cancelled);
    let file = |r#type, name: &str, count| {
        let url = format!("{url}/{name}?_format=application/fhir%2Bndjson");
        [ManifestFile { r#type, url, count }]
    };
    let ended = progress.tally.last_finished.or(batch.closed_at).unwrap_or(now);
    let manifest = Manifest {
        transaction_time: instant(ended),
        output: file("DiagnosticReport", "results", progress.tally.of(JobState::Succeeded)),
        error: file("OperationOutcome", "errors", failed + progress.tally.refused),
        request: url,
        requires_access_token: true,
    };
    Ok(Deeds::Status(Some(Object::batch(id))).of(Json(manifest).into_response()))
}

/// How much of a file a caller wants.
#[derive(Debug, Clone, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wanted {
    /// Entries after this one.
    #[serde(default)]
    cursor: i64,
    /// Seconds to wait when there is nothing yet; more than 60 are 60.
    #[serde(default)]
    wait: u64,
    /// Entries at most.
    limit: Option<usize>,
    /// The media type, for callers that cannot set `Accept` (FHIR R4, General Parameters).
    #[serde(rename = "_format")]
    format: Option<String>,
}

/// Which of a batch's two files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum File {
    Results,
    Errors,
}

/// The reports of a batch, in the order in which its jobs ended.
#[utoipa::path(get, path = "/batches/{id}/results", operation_id = "readResults", tag = "batches",
    params(("id" = Uuid, Path, description = "The batch."), Wanted),
    responses(
        (status = 200, description = "A line a report.",
            content((String = "application/x-ndjson"), (String = "application/fhir+ndjson"))),
        Any, Guarded, Own, Queried))]
pub(crate) async fn results(
    State(app): State<Arc<App>>,
    Allowed { caller, .. }: Allowed<Read>,
    BatchPath(batch): BatchPath,
    headers: HeaderMap,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Problem> {
    file(app, caller, batch, &headers, wanted, File::Results).await
}

/// The lines of a batch that have no report, and why.
#[utoipa::path(get, path = "/batches/{id}/errors", operation_id = "readErrors", tag = "batches",
    params(("id" = Uuid, Path, description = "The batch."), Wanted),
    responses(
        (status = 200, description = "A line an error.",
            content((String = "application/x-ndjson"), (String = "application/fhir+ndjson"))),
        Any, Guarded, Own, Queried))]
pub(crate) async fn errors(
    State(app): State<Arc<App>>,
    Allowed { caller, .. }: Allowed<Read>,
    BatchPath(batch): BatchPath,
    headers: HeaderMap,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Problem> {
    file(app, caller, batch, &headers, wanted, File::Errors).await
}

async fn file(
    app: Arc<App>,
    caller: Arc<Caller>,
    batch: Uuid,
    headers: &HeaderMap,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
    file: File,
) -> Result<Response, Problem> {
    let Query(wanted) = wanted.map_err(|_| {
        let rule = "cursor, wait and limit are whole numbers";
        ApiError::from(Code::QueryInvalid).at("query").detail(rule)
    })?;
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let form = match wanted.format.as_deref().unwrap_or(accept) {
        // Most callers write the plus as it is, which a query reads as a space.
        format if format.contains("fhir+ndjson") || format.contains("fhir ndjson") => Form::Fhir,
        _ => Form::Plain,
    };
    let client = caller.client;
    app.store.find_batch(batch, client, clock::now()).await?.ok_or(Code::NotFound)?;
    if wanted.wait > 0 {
        let _turn = Turn::new(&app, client, Lane::Interactive)?;
        wait(&app, client, batch, &wanted, file).await?;
    }
    let kind = if form == Form::Fhir { FHIR_NDJSON } else { NDJSON };
    let after = wanted.cursor;
    let entries = Reader { app, caller, batch, file, form, after, left: wanted.limit.unwrap_or(usize::MAX) };
    // An error on the way cuts the answer off, so that nobody takes it for a whole one.
    let chunks = stream::try_unfold(entries, |mut entries| async {
        Ok::<_, std::io::Error>(entries.next().await?.map(|chunk| (chunk, entries)))
    });
    // On record before the first byte leaves: nobody knows yet how many lines there will be.
    let deed = Deeds::one(Action::BatchRead, Some(Object::batch(batch)), json!({ "cursor": after }));
    Ok(deed.of(([(header::CONTENT_TYPE, kind)], AxumBody::from_stream(chunks)).into_response()))
}

/// Waits until there is an entry, or none will come any more.
async fn wait(app: &App, client: ClientId, batch: Uuid, wanted: &Wanted, file: File) -> Result<(), Problem> {
    let end = Instant::now() + Duration::from_secs(wanted.wait).min(MAX_WAIT);
    loop {
        let more = match file {
            File::Results => !app.store.batch_results(batch, wanted.cursor).await?.is_empty(),
            File::Errors => !app.store.batch_errors(batch, wanted.cursor).await?.is_empty(),
        };
        if more || Instant::now() + WAITER_POLL > end || app.draining.is_cancelled() {
            return Ok(());
        }
        let found = app.store.find_batch(batch, client, clock::now()).await?.ok_or(Code::NotFound)?;
        if found.closed_at.is_some() && !app.store.has_open_jobs(batch).await? {
            return Ok(());
        }
        sleep(WAITER_POLL / 4).await;
    }
}

/// Reads a file in chunks.
struct Reader {
    app: Arc<App>,
    caller: Arc<Caller>,
    batch: Uuid,
    file: File,
    form: Form,
    after: i64,
    left: usize,
}

impl Reader {
    async fn next(&mut self) -> std::io::Result<Option<Bytes>> {
        if self.app.access.judge(&self.caller) != Verdict::Open {
            return Err(std::io::Error::other("shut out"));
        }
        if self.left == 0 {
            return Ok(None);
        }
        let chunk = match self.file {
            File::Results => self.results().await,
            File::Errors => self.errors().await,
        };
        chunk.map_err(|_| std::io::Error::other("the record cannot be reached"))
    }

    async fn results(&mut self) -> Result<Option<Bytes>, Problem> {
        let mut results = self.app.store.batch_results(self.batch, self.after).await?;
        results.truncate(self.left);
        self.left -= results.len();
        let Some(last) = results.last() else { return Ok(None) };
        self.after = last.event;
        let given = results.iter().filter(|result| result.sealed.is_some());
        let given: Vec<Answered> = given.map(|result| Answered { job: result.job, last: false }).collect();
        retention::answered(&self.app, self.caller.client, &given).await?;
        let mut chunk = Vec::new();
        for result in results {
            let report = result.sealed.as_ref().ok_or(Code::ReportRemoved);
            match report.and_then(|sealed| open(&self.app, result.job, sealed)) {
                Ok(report) => write_result(&mut chunk, &result, &report, self.form),
                Err(code) => write_unreadable(&mut chunk, &result, code, self.form),
            }
        }
        Ok(Some(chunk.into()))
    }

    async fn errors(&mut self) -> Result<Option<Bytes>, Problem> {
        let mut errors = self.app.store.batch_errors(self.batch, self.after).await?;
        errors.truncate(self.left);
        self.left -= errors.len();
        let Some(last) = errors.last() else { return Ok(None) };
        self.after = last.event;
        let mut chunk = Vec::new();
        for error in &errors {
            write_error(&mut chunk, error, self.form);
        }
        Ok(Some(chunk.into()))
    }
}

fn write_result(chunk: &mut Vec<u8>, result: &BatchResult, report: &[u8], form: Form) {
    if form == Form::Plain {
        let BatchResult { event, line, custom_id, job, .. } = result;
        let entry = json!({"cursor": event, "line": line, "custom_id": custom_id, "job": job}).to_string();
        chunk.extend_from_slice(entry.trim_end_matches('}').as_bytes());
        chunk.extend_from_slice(b",\"report\":");
        chunk.extend_from_slice(report);
        chunk.push(b'}');
    } else {
        chunk.extend_from_slice(report);
    }
    chunk.push(b'\n');
}

/// A report that was removed, or cannot be opened, in its place.
fn write_unreadable(chunk: &mut Vec<u8>, result: &BatchResult, code: Code, form: Form) {
    let BatchResult { event, line, custom_id, job, .. } = result;
    let error = answer::error_json(&code.into());
    if form == Form::Plain {
        let entry = json!({
            "cursor": event, "line": line, "custom_id": custom_id, "job": job, "report": null, "error": error
        });
        chunk.extend_from_slice(entry.to_string().as_bytes());
    } else {
        chunk.extend_from_slice(&answer::line_outcome(&error, &format!("line {line}, {custom_id}")));
    }
    chunk.push(b'\n');
}

fn write_error(chunk: &mut Vec<u8>, error: &BatchError, form: Form) {
    let BatchError { event, line, custom_id, job, cause } = error;
    let known = match cause {
        Cause::Failed(failure) => Some(failed_with(failure)),
        Cause::Cancelled => Some(Code::JobCancelled.into()),
        Cause::Refused(_) => None,
    };
    let plain = match (&known, cause) {
        (None, Cause::Refused(error)) => error.clone(),
        (known, _) => known.as_ref().map_or(Value::Null, answer::error_json),
    };
    if form == Form::Plain {
        let entry =
            json!({"cursor": event, "line": line, "custom_id": custom_id, "job": job, "error": plain});
        chunk.extend_from_slice(entry.to_string().as_bytes());
    } else {
        let place =
            custom_id.as_ref().map_or_else(|| format!("line {line}"), |id| format!("line {line}, {id}"));
        chunk.extend_from_slice(&answer::line_outcome(&plain, &place));
    }
    chunk.push(b'\n');
}

/// Cancels what has not ended, and removes the results.
#[utoipa::path(delete, path = "/batches/{id}", operation_id = "deleteBatch", tag = "batches",
    params(("id" = Uuid, Path, description = "The batch.")),
    responses((status = 202, description = "Done."), Any, Guarded, Own))]
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Allowed { client, who, .. }: Allowed<Delete>,
    BatchPath(batch): BatchPath,
) -> Result<Response, Problem> {
    if !app.store.delete_batch(batch, client, who, clock::now()).await? {
        return Err(Code::NotFound.into());
    }
    // From here on it is gone for its client; the rest is done here, or by the sweeper.
    tokio::spawn(async move { clear(&app).await });
    Ok(StatusCode::ACCEPTED.into_response())
}

/// The batch that a path names, in the one spelling that we give out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchPath(Uuid);

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for BatchPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Ok(Path(text)) = path else { return Err(Code::NotFound.into()) };
        match text.parse::<Uuid>() {
            Ok(id) if id.hyphenated().to_string() == text => Ok(Self(id)),
            _ => Err(Code::NotFound.into()),
        }
    }
}
