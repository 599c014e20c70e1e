//! `/fhir/Provenance`: where reports and their parts come from, found by what was made.

use std::sync::Arc;

use axum::{
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use dermflow_schemas::error::{ApiError, Code};

use super::{
    openapi::{Any, Bundle, Guarded, Negotiated, Queried},
    reports::{job_of, separated},
};
use crate::{
    answer::{self, Problem, accepts_fhir},
    app::App,
    audited::{Deed, Deeds},
    extract::{Allowed, Search},
    fhir::search,
};

/// The one that has a report, or a part of one, for its target. Nothing else is searched for.
#[utoipa::path(get, path = "/fhir/Provenance", operation_id = "searchProvenance", tag = "reports",
    params(
        ("target" = String, Query, min_length = 1,
            description = "`DiagnosticReport/` and an id, or a part that was made, as a search with `_include` names it."),
        ("_format" = Option<String>, Query, pattern = "json", description = "FHIR JSON.")),
    responses((status = 200, description = "One, or none.", body = Bundle, content_type = "application/fhir+json"),
        Any, Guarded, Negotiated, Queried))]
pub(crate) async fn search(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Search>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    let invalid = |name: &str| ApiError::from(Code::QueryInvalid).at(name);
    let Query(parameters) = query.map_err(|_| invalid("query"))?;
    let mut wanted = None;
    for (name, value) in &parameters {
        match name.as_str() {
            "target" if wanted.is_none() && !value.is_empty() => wanted = Some(value.as_str()),
            "_format" if value.contains("json") => {}
            _ => return Err(invalid(name).into()),
        }
    }
    let wanted = wanted.ok_or_else(|| invalid("target"))?;
    let job = wanted.split_once('/').and_then(|(_, id)| job_of(id.get(..36)?));
    let (resources, _memory) = match job {
        None => (Vec::new(), None),
        Some(job) => match separated(&app, job, client).await {
            Err(problem) if problem.is(Code::NotFound) || problem.is(Code::ReportRemoved) => {
                (Vec::new(), None)
            }
            separated => separated.map(|(resources, memory)| (resources, Some(memory)))?,
        },
    };
    // A report's Provenance comes last.
    let is_made = |target: &serde_json::Value| target["reference"] == wanted;
    let found =
        resources.last().filter(|one| one["target"].as_array().is_some_and(|all| all.iter().any(is_made)));
    let url = format!("{}/fhir/Provenance", app.public_url);
    let entry = found.map(|one| search::found(&url, one["id"].as_str().unwrap_or_default(), one.clone()));
    let told = job.filter(|_| entry.is_some()).map(|job| vec![Deed::ended(job, true)]);
    let bundle = search::searchset(&url, &parameters, None, entry.into_iter().collect());
    let deeds = told.map_or(Deeds::Status(None), Deeds::Each);
    Ok(deeds.of(answer::fhir(StatusCode::OK, bundle.to_string().into_bytes())))
}
