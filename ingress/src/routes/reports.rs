//! `/fhir/DiagnosticReport`: a client's reports, searched, removed, and read part by part.

use std::sync::Arc;

use axum::{
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use dermflow_http::keeping::keeping;
use dermflow_schemas::{
    error::{ApiError, Code},
    id::{ClientId, JobId},
    job::{Lane, State as JobState},
    limits::{MAX_FORM_BYTES, MAX_REPORT_PAGE, MAX_SEARCH_PARAMETERS, REPORT_PAGE},
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::{
    answer::{self, Problem, accepts_fhir},
    app::App,
    audited::{Deed, Deeds},
    bodies::Memory,
    extract::{Allowed, Body, Delete, Held, JobPath, Read, Search, form_pairs},
    fhir::{parts, search},
    index::{self, Kind},
    prefer,
    routes::{
        analyze::Turn,
        openapi::{Any, Bundle, Guarded, Negotiated, Own, Part, Queried, Reads, Typed},
        status,
    },
    store::reports::{AnyOf, Found, Search as Wanted},
    submit::{blocking, ended, internal, open},
};

/// What reports are searched for; the same in a form.
#[derive(Debug, IntoParams, utoipa::ToSchema)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "a description: parameters may be repeated and have modifiers in their names")]
pub(super) struct Parameters {
    /// Ids, with commas.
    #[param(rename = "_id")]
    #[schema(rename = "_id")]
    id: Option<String>,
    /// A reference to the patient, as it was sent, or its id alone.
    subject: Option<String>,
    /// `system|value`, `|value` or `value`.
    #[param(rename = "subject:identifier")]
    #[schema(rename = "subject:identifier")]
    subject_identifier: Option<String>,
    /// As `subject`, of a Patient.
    patient: Option<String>,
    /// The same as `subject:identifier`.
    #[param(rename = "patient:identifier")]
    #[schema(rename = "patient:identifier")]
    patient_identifier: Option<String>,
    /// The report's own identifier or the caller's: `system|value`, `|value` or `value`.
    identifier: Option<String>,
    /// When the images came: `ge`, `le`, `gt`, `lt`, `sa`, `eb` or nothing, and a date or an instant.
    date: Option<String>,
    /// When the report was made; as `date`.
    issued: Option<String>,
    /// The same as `issued`: a report does not change.
    #[param(rename = "_lastUpdated")]
    #[schema(rename = "_lastUpdated")]
    last_updated: Option<String>,
    /// Codes of FHIR's diagnostic-report-status, alone or as `system|code`, with commas. Reports are `preliminary`.
    status: Option<String>,
    /// `-date` unless it is said, `date`, `-issued`, `issued`, `-_lastUpdated` or `_lastUpdated`.
    #[param(rename = "_sort", pattern = "^-?(date|issued|_lastUpdated)$")]
    #[schema(rename = "_sort")]
    sort: Option<String>,
    /// Reports at most.
    #[param(rename = "_count")]
    #[schema(rename = "_count")]
    count: Option<u64>,
    /// `DiagnosticReport:result`, `DiagnosticReport:media`: whichever it is, every part of the reports as a resource of its
    /// own, and a Provenance.
    #[param(rename = "_include")]
    #[schema(rename = "_include")]
    include: Option<String>,
    /// `Provenance:target`: the same.
    #[param(rename = "_revinclude")]
    #[schema(rename = "_revinclude")]
    revinclude: Option<String>,
    /// From the link `next`.
    #[param(rename = "_cursor")]
    #[schema(rename = "_cursor")]
    cursor: Option<String>,
    /// FHIR JSON.
    #[param(rename = "_format", pattern = "json")]
    #[schema(rename = "_format")]
    format: Option<String>,
}

/// What the codes of a report's status are of.
const STATUS: &str = "http://hl7.org/fhir/diagnostic-report-status";

/// What brings the parts of a report as resources of their own.
const INCLUDES: [&str; 4] =
    ["DiagnosticReport:result", "DiagnosticReport:media", "Observation:device", "Observation:derived-from"];

/// The caller's reports. A parameter that is not known is an error, or with `Prefer: handling=lenient` passed over.
#[utoipa::path(get, path = "/fhir/DiagnosticReport", operation_id = "searchReports", tag = "reports",
    params(Parameters, ("Prefer" = Option<String>, Header, description = "`handling=lenient`.")),
    responses((status = 200, description = "A page.", body = Bundle, content_type = "application/fhir+json"),
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
    let Query(parameters) = query.map_err(|_| ApiError::from(Code::QueryInvalid).at("query"))?;
    found(app, client, &parameters, &headers).await
}

/// The same with a form, whose fields are in no URL.
#[utoipa::path(post, path = "/fhir/DiagnosticReport/_search", operation_id = "searchReportsByForm", tag = "reports",
    params(Parameters, ("Prefer" = Option<String>, Header, description = "`handling=lenient`.")),
    request_body(content = Parameters, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "A page.", body = Bundle, content_type = "application/fhir+json"),
        Any, Guarded, Negotiated, Reads, Typed))]
pub(crate) async fn search_form(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Search>,
    query: Result<Query<Vec<(String, String)>>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    let Query(mut parameters) = query.map_err(|_| ApiError::from(Code::QueryInvalid).at("query"))?;
    let Held { bytes, .. } = body.read(app.bounds.bodies.share(Some(client)), MAX_FORM_BYTES).await?;
    let form = form_pairs(&headers, bytes).await;
    let rule = "application/x-www-form-urlencoded";
    parameters.extend(form.ok_or_else(|| ApiError::from(Code::MediaType).at("Content-Type").detail(rule))?);
    found(app, client, &parameters, &headers).await
}

async fn found(
    app: Arc<App>,
    client: ClientId,
    parameters: &[(String, String)],
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let asked = Asked::read(&app, client, parameters, prefer::is_lenient(headers))?;
    let _turn = Turn::new(&app, client, Lane::Interactive)?;
    let (reports, more) = app.store.search(client, &asked.wanted, asked.count).await?;
    let bytes = reports.iter().map(|found| found.sealed.bytes.len()).sum();
    let memory = app.bounds.bodies.share(Some(client)).take(bytes)?;
    let next = reports.last().filter(|_| more).map(cursor);
    let deeds: Vec<Deed> = reports.iter().map(|found| Deed::ended(found.job, true)).collect();
    let body = blocking(move || {
        let url = format!("{}/fhir/DiagnosticReport", app.public_url);
        let entries = reports.into_iter().flat_map(|found| entries(&app, &found, asked.separate)).collect();
        let bundle = search::searchset(&url, &asked.used, next.as_deref(), entries);
        bundle.to_string().into_bytes()
    });
    let deeds = if deeds.is_empty() { Deeds::Status(None) } else { Deeds::Each(deeds) };
    Ok(keeping(deeds.of(answer::fhir(StatusCode::OK, body.await?)), memory))
}

/// A report, with its parts when they are asked for; or why it cannot be opened.
fn entries(app: &App, found: &Found, separate: bool) -> Vec<Value> {
    let report = open(app, found.job, &found.sealed)
        .and_then(|report| serde_json::from_slice(&report).map_err(|_| Code::ReportUnreadable));
    let report: Value = match report {
        Ok(report) => report,
        Err(code) => {
            let place = format!("DiagnosticReport/{}", found.job);
            let outcome = answer::line_outcome(&answer::error_json(&code.into()), &place);
            let outcome: Value = serde_json::from_slice(&outcome).unwrap_or_default();
            return vec![json!({"resource": outcome, "search": {"mode": "outcome"}})];
        }
    };
    let resources = if separate { parts::separate(report) } else { vec![report] };
    let entry = |(n, resource): (usize, Value)| {
        let text = |name: &str| resource[name].as_str().unwrap_or_default().to_owned();
        let full = format!("{}/fhir/{}/{}", app.public_url, text("resourceType"), text("id"));
        let mode = if n == 0 { "match" } else { "include" };
        search::entry(&full, mode, resource)
    };
    resources.into_iter().enumerate().map(entry).collect()
}

/// A place in a list: the time that it is sorted by in microseconds, and the report.
fn cursor(found: &Found) -> String {
    format!("{}.{}", found.at.unix_timestamp_nanos() / 1_000, found.job)
}

fn place(cursor: &str) -> Option<(OffsetDateTime, Uuid)> {
    let (micros, id) = cursor.split_once('.')?;
    // PostgreSQL has no year -9999.
    let nanos = i128::from(micros.parse::<u64>().ok()?) * 1_000;
    Some((OffsetDateTime::from_unix_timestamp_nanos(nanos).ok()?, id.parse().ok()?))
}

/// A search as it was asked for.
struct Asked {
    wanted: Wanted,
    count: usize,
    separate: bool,
    /// The parameters that were not passed over.
    used: Vec<(String, String)>,
}

impl Asked {
    fn read(
        app: &App,
        client: ClientId,
        parameters: &[(String, String)],
        lenient: bool,
    ) -> Result<Self, ApiError> {
        if parameters.len() > MAX_SEARCH_PARAMETERS {
            let rule = format!("at most {MAX_SEARCH_PARAMETERS} parameters");
            return Err(ApiError::from(Code::QueryInvalid).at("query").detail(rule));
        }
        let wanted = Wanted::default();
        let mut asked = Self { wanted, count: REPORT_PAGE, separate: false, used: Vec::new() };
        for (name, value) in parameters {
            let is_known = asked.take(app, client, name, value);
            match is_known.ok_or_else(|| ApiError::from(Code::QueryInvalid).at(name.clone()))? {
                Known::Used => asked.used.push((name.clone(), value.clone())),
                Known::Not if lenient => {}
                Known::Not => {
                    let rule = "unknown; Prefer: handling=lenient passes it over";
                    return Err(ApiError::from(Code::QueryInvalid).at(name.clone()).detail(rule));
                }
            }
        }
        Ok(asked)
    }

    /// `None` when the value cannot be read.
    fn take(&mut self, app: &App, client: ClientId, name: &str, value: &str) -> Option<Known> {
        let wanted = &mut self.wanted;
        let tokens = |kind, text: &dyn Fn(&str) -> Option<String>| {
            let texts: Option<Vec<String>> = search::values(value)?.iter().map(|one| text(one)).collect();
            let digests = texts?.iter().flat_map(|text| app.index.digests(client, kind, text)).collect();
            Some(AnyOf { digests, ids: Vec::new() })
        };
        match name {
            "_id" => {
                let ids = search::values(value)?.iter().filter_map(|id| own_id(id)).collect();
                narrow(&mut wanted.ids, ids);
            }
            "subject" => wanted.tokens.push(tokens(Kind::Subject, &|one| Some(index::reference(one)))?),
            "patient" => {
                let patient = |one: &str| {
                    Some(index::reference(&if one.contains('/') {
                        one.to_owned()
                    } else {
                        format!("Patient/{one}")
                    }))
                };
                wanted.tokens.push(tokens(Kind::Subject, &patient)?);
            }
            "subject:identifier" | "patient:identifier" => {
                wanted.tokens.push(tokens(Kind::SubjectIdentifier, &token)?);
            }
            "identifier" => {
                let mut any = tokens(Kind::Identifier, &token)?;
                let values = search::values(value)?;
                let own = values.iter().filter_map(|one| {
                    let urn = one.strip_prefix("urn:ietf:rfc:3986|").unwrap_or(one);
                    own_id(urn.strip_prefix("urn:uuid:")?)
                });
                any.ids = own.collect();
                wanted.tokens.push(any);
            }
            "date" => {
                let (since, until) = search::period(value)?;
                wanted.accepted.and(since, until);
            }
            "issued" | "_lastUpdated" => {
                let (since, until) = search::period(value)?;
                wanted.finished.and(since, until);
            }
            "status" => {
                let values = search::values(value)?;
                let codes: Option<Vec<&str>> = values.iter().map(|one| search::code(one, STATUS)).collect();
                // There are no others.
                if !codes?.contains(&"preliminary") {
                    narrow(&mut wanted.ids, Vec::new());
                }
            }
            "_sort" => {
                let by = value.strip_prefix('-').unwrap_or(value);
                wanted.ascending = by == value;
                wanted.by_end = ["issued", "_lastUpdated"].contains(&by);
                (wanted.by_end || by == "date").then_some(())?;
            }
            "_count" => self.count = value.parse::<usize>().ok()?.clamp(1, MAX_REPORT_PAGE),
            "_include" | "_include:iterate" => self.separate = INCLUDES.contains(&value).then_some(true)?,
            "_revinclude" => self.separate = (value == "Provenance:target").then_some(true)?,
            "_format" => value.contains("json").then_some(())?,
            "_cursor" => wanted.after = Some(place(value)?),
            _ => return Some(Known::Not),
        }
        Some(Known::Used)
    }
}

/// Whether a parameter is known.
enum Known {
    Used,
    Not,
}

/// All that is in both.
fn narrow(ids: &mut Option<Vec<Uuid>>, others: Vec<Uuid>) {
    *ids = Some(match ids.take() {
        Some(ids) => ids.into_iter().filter(|id| others.contains(id)).collect(),
        None => others,
    });
}

/// Only the one spelling that we give out.
fn own_id(text: &str) -> Option<Uuid> {
    text.parse::<Uuid>().ok().filter(|id| id.hyphenated().to_string() == text)
}

/// A token with a value: a system alone finds nothing that is indexed.
fn token(text: &str) -> Option<String> {
    (!text.ends_with('|')).then(|| index::form(text))
}

/// Removes a report, and all that came with it.
#[utoipa::path(delete, path = "/fhir/DiagnosticReport/{id}", operation_id = "deleteReport", tag = "reports",
    params(("id" = Uuid, Path, description = "The report.")),
    responses((status = 204, description = "It is removed."), Any, Guarded, Own))]
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Allowed { client, who, .. }: Allowed<Delete>,
    JobPath(id): JobPath,
) -> Result<Response, Problem> {
    let record = app.store.find(id, client).await?;
    record
        .filter(|record| record.state == JobState::Succeeded && record.deleted_at.is_none())
        .ok_or(Code::NotFound)?;
    status::remove(&app, client, who, id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// The job of a report's id.
pub(super) fn job_of(text: &str) -> Option<JobId> {
    own_id(text).map(JobId::from)
}

/// A report as separate resources, with the memory that it takes.
pub(super) async fn separated(
    app: &App,
    job: JobId,
    client: ClientId,
) -> Result<(Vec<Value>, Memory), Problem> {
    let report = ended(app, job, client).await?.and_then(|ended| ended.report).ok_or(Code::NotFound)?;
    let separated = parts::separate(serde_json::from_slice(&report.bytes).map_err(|error| internal(&error))?);
    Ok((separated, report.memory))
}

/// One of the resources that a report consists of.
async fn part(
    app: &App,
    client: ClientId,
    kind: &str,
    id: &str,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    if !accepts_fhir(headers) {
        return Err(Code::NotAcceptable.into());
    }
    let report = id.split_at_checked(36).filter(|(_, name)| name.starts_with('-'));
    let job = report.and_then(|(report, _)| job_of(report)).ok_or(Code::NotFound)?;
    let is_it = |part: &Value| part["resourceType"] == kind && part["id"] == id;
    let (parts, memory) = separated(app, job, client).await?;
    let part = parts.into_iter().skip(1).find(is_it).ok_or(Code::NotFound)?;
    let tag = [(header::ETAG, "W/\"1\"")];
    let response = (tag, answer::fhir(StatusCode::OK, part.to_string().into_bytes())).into_response();
    Ok(keeping(Deeds::Each(vec![Deed::ended(job, true)]).of(response), memory))
}

macro_rules! parts {
    ($($kind:literal $read:ident $path:literal $id:literal)*) => {$(
        /// A part of a report, as a search with `_include` names it.
        #[utoipa::path(get, path = $path, operation_id = $id, tag = "reports",
            params(("id" = String, Path, description = "The report's id, a hyphen, and the part's name.")),
            responses((status = 200, description = "The part.", body = Part, content_type = "application/fhir+json",
                headers(("ETag" = String, description = "Its version."))),
                Any, Guarded, Own, Negotiated))]
        pub(crate) async fn $read(
            State(app): State<Arc<App>>,
            Allowed { client, .. }: Allowed<Read>,
            path: Result<Path<String>, axum::extract::rejection::PathRejection>,
            headers: HeaderMap,
        ) -> Result<Response, Problem> {
            let Path(id) = path.map_err(|_| Code::NotFound)?;
            part(&app, client, $kind, &id, &headers).await
        }
    )*};
}

parts! {
    "Observation" observation "/fhir/Observation/{id}" "readObservation"
    "Media" media "/fhir/Media/{id}" "readMedia"
    "Device" device "/fhir/Device/{id}" "readDevice"
    "Provenance" provenance "/fhir/Provenance/{id}" "readProvenance"
}
