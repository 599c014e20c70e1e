//! `/fhir/Task`: jobs as FHIR R4 Tasks, for callers who follow their orders that way.

use std::sync::Arc;

use axum::{
    extract::{Query, State},
    http::StatusCode,
    response::Response,
};
use dermflow_auth::audit::Object;
use dermflow_schemas::{
    error::{ApiError, Code},
    fhir::{CANONICAL, instant},
    id::JobId,
    job::State as JobState,
    limits::{DEFAULT_PAGE, MAX_PAGE},
};
use serde_json::{Value, json};

use crate::{
    answer::{self, Problem},
    app::App,
    audited::Deeds,
    extract::{Allowed, JobPath, Read, Search},
    fhir::search,
    routes::openapi::{Any, Bundle, Guarded, Own, Queried, Task},
    store::{Record, batches::Filter},
};

/// One job.
#[utoipa::path(get, path = "/fhir/Task/{id}", operation_id = "readTask", tag = "jobs",
    params(("id" = Uuid, Path, description = "The job.")),
    responses((status = 200, description = "The job.", body = Task, content_type = "application/fhir+json"),
        Any, Guarded, Own))]
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Read>,
    JobPath(id): JobPath,
) -> Result<Response, Problem> {
    let record = app.store.find(id, client).await?.ok_or(Code::NotFound)?;
    let response = answer::fhir(StatusCode::OK, task(&record).to_string().into_bytes());
    Ok(Deeds::Status(Some(Object::job(id))).of(response))
}

/// `status`, `authored-on`, which may be repeated to narrow it down, `_sort=-authored-on`, `_count`; the latest first. A
/// parameter that would be passed over in silence is refused: the answer would be another than was asked for.
#[utoipa::path(get, path = "/fhir/Task", operation_id = "searchTasks", tag = "jobs",
    params(
        ("status" = Option<String>, Query,
            description = "Codes of FHIR's task-status, alone or as `system|code`, with commas."),
        ("authored-on" = Option<String>, Query,
            description = "A date, with `eq`, `ge`, `gt`, `sa`, `le`, `lt` or `eb` before it, or an instant."),
        ("_sort" = Option<String>, Query, pattern = "^-authored-on$", description = "The only order."),
        ("_count" = Option<usize>, Query, description = "Entries at most."),
        ("_cursor" = Option<Uuid>, Query, description = "From the link `next`."),
        ("_format" = Option<String>, Query, pattern = "json", description = "FHIR JSON.")),
    responses((status = 200, description = "A page.", body = Bundle, content_type = "application/fhir+json"),
        Any, Guarded, Queried))]
pub(crate) async fn search(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Search>,
    Query(parameters): Query<Vec<(String, String)>>,
) -> Result<Response, Problem> {
    let (mut filter, mut count) = (Filter::default(), DEFAULT_PAGE);
    for (name, value) in &parameters {
        let invalid = || ApiError::from(Code::QueryInvalid).at(name.clone());
        match name.as_str() {
            "status" if filter.states.is_empty() => {
                filter.states = states(value).ok_or_else(invalid)?;
            }
            "authored-on" => {
                let (from, before) = search::period(value).ok_or_else(invalid)?;
                filter.from = filter.from.max(from);
                filter.before = [filter.before, before].into_iter().flatten().min();
            }
            "_count" => count = value.parse::<usize>().map_err(|_| invalid())?.clamp(1, MAX_PAGE),
            "_cursor" => filter.cursor = Some(value.parse::<JobId>().map_err(|_| invalid())?),
            "_sort" if value == "-authored-on" => {}
            "_format" if value.contains("json") => {}
            _ => return Err(invalid().into()),
        }
    }
    let mut records = app.store.list(client, &filter, count + 1).await?;
    let more = records.len() > count;
    records.truncate(count);
    let next = records.last().filter(|_| more).map(|last| last.id.to_string());
    let url = format!("{}/fhir/Task", app.public_url);
    let entries = records.iter().map(|record| search::found(&url, record.id, task(record))).collect();
    let bundle = search::searchset(&url, &parameters, next.as_deref(), entries);
    Ok(Deeds::Status(None).of(answer::fhir(StatusCode::OK, bundle.to_string().into_bytes())))
}

/// What the codes of a task's status are of.
const STATUS: &str = "http://hl7.org/fhir/task-status";

/// The code of FHIR's required `task-status` value set.
fn status(state: JobState) -> &'static str {
    match state {
        JobState::Accepted => "requested",
        JobState::Queued => "ready",
        JobState::Running => "in-progress",
        JobState::Succeeded => "completed",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

fn state_of(code: &str) -> Option<JobState> {
    dermflow_schemas::job::STATES.into_iter().find(|state| status(*state) == code)
}

/// The states that a parameter names; `None` when there is none of a name.
fn states(value: &str) -> Option<Vec<JobState>> {
    search::values(value)?.iter().map(|one| state_of(search::code(one, STATUS)?)).collect()
}

fn task(record: &Record) -> Value {
    let changed = [record.finished_at, record.started_at, record.queued_at];
    let changed = changed.into_iter().flatten().next().unwrap_or(record.accepted_at);
    let system = format!("{CANONICAL}/CodeSystem/skin-image-analysis");
    let mut task = json!({
        "resourceType": "Task",
        "id": record.id,
        "meta": {"lastUpdated": instant(changed)},
        "status": status(record.state),
        "intent": "order",
        "priority": "routine",
        "code": {"coding": [{"system": system, "code": "skin-image-analysis"}]},
        "authoredOn": instant(record.accepted_at),
        "lastModified": instant(changed),
        "restriction": {"period": {"end": instant(record.deadline)}},
    });
    if let Some(started) = record.started_at {
        task["executionPeriod"] = json!({"start": instant(started)});
        if let Some(finished) = record.finished_at {
            task["executionPeriod"]["end"] = json!(instant(finished.max(started)));
        }
    }
    if let Some(failure) = &record.failure {
        let kind = failure.code.kind();
        let coding = json!({"system": format!("{CANONICAL}/CodeSystem/error"), "code": kind.code});
        task["statusReason"] = json!({"coding": [coding], "text": kind.text});
    }
    if let Some(batch) = record.batch {
        task["groupIdentifier"] =
            json!({"system": "urn:ietf:rfc:3986", "value": format!("urn:uuid:{batch}")});
    }
    if record.state == JobState::Succeeded && record.deleted_at.is_none() {
        let reference = format!("DiagnosticReport/{}", record.id);
        task["output"] = json!([{"type": {"text": "report"}, "valueReference": {"reference": reference}}]);
    }
    task
}
