//! The routes of the device API, at the root and under `/v1.0`.

use std::sync::Arc;

use async_nats::connection;
use axum::{
    Router,
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use dermflow_http::answer::DEVICE_VERSION;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    limits::MAX_BODY_BYTES,
};
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::{
    analyze::{Caller, analysed},
    login,
    status::{answered, finished, insert},
};
use crate::{
    answer::{self, Problem, asks_for_fhir, sends_fhir},
    app::App,
    device::{about, diagnosis, questionnaires, report, severity, sites},
    extract::{Allowed, Body, Held, Submit},
    submit::{Ended, blocking},
};

/// The routes, but `/login` at the root, which is older.
pub(super) fn routes() -> Router<Arc<App>> {
    Router::new().merge(both()).nest(DEVICE_VERSION, both().route("/login", post(login::post)))
}

fn both() -> Router<Arc<App>> {
    Router::new()
        .route("/auth/login", post(login::post))
        .route("/diagnosis-support", post(diagnose))
        .route("/clinical/diagnosis-support", post(diagnose))
        .route("/severity-assessment/manual", post(assess))
        .route("/clinical/severity-assessment/manual", post(assess))
        .route("/severity-assessment/automatic/local", post(assess_image))
        .route("/clinical/severity-assessment/automatic/local", post(assess_image))
        .route("/severity-assessment/automatic/global", post(assess_images))
        .route("/clinical/severity-assessment/automatic/global", post(assess_images))
        .route("/device-information", get(information))
        .route("/device/about", get(information))
        .route("/device/health", get(health))
        .route("/body-sites", get(body_sites))
        .route("/clinical-signs", get(clinical_signs))
        .route("/questionnaires", get(questions))
}

/// Whether a path is one of the routes above that are open to everybody.
pub(super) fn is_open(path: &str) -> bool {
    let path = path.strip_prefix(DEVICE_VERSION).unwrap_or(path);
    ["/device/health", "/body-sites", "/clinical-signs", "/questionnaires"].contains(&path)
}

/// One to three images of a case in, 200 with what was found, as soon as it is; who asks for FHIR gets the report itself.
async fn diagnose(
    State(app): State<Arc<App>>,
    Allowed { client, who, .. }: Allowed<Submit>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let finished = if asks_for_fhir(&headers) { finished } else { diagnosed };
    let caller = Caller { client, who, headers };
    match analysed(app, caller, body, diagnosis::parse, finished).await {
        Err(problem) if problem.is(Code::WaitEnded) => {
            let mut response = problem.into_response();
            if let Some(url) = response.headers().get(header::CONTENT_LOCATION).cloned() {
                response.headers_mut().insert(header::LOCATION, url);
            }
            Ok(response)
        }
        answer => answer,
    }
}

/// The end of a job in the device API's form, with where the report is, or which image is at fault.
fn diagnosed(app: &App, ended: Ended) -> Response {
    let image = ended.record.failure.as_ref().and_then(|failure| failure.image);
    let mut response = answered(ended, |record, report| {
        let Ok(read) = serde_json::from_slice(&report) else {
            return Problem::from(Code::ReportUnreadable).into_response();
        };
        let mut response = answer::json(report::render(&read));
        let url = format!("{}/fhir/DiagnosticReport/{}", app.public_url, record.id);
        let link = format!("<{url}>; rel=\"alternate\"; type=\"application/fhir+json\"");
        insert(response.headers_mut(), &header::LINK, &link);
        response
    });
    if let (Some(image), Some(problem)) = (image, response.extensions_mut().remove::<Problem>()) {
        response.extensions_mut().insert(problem.at(format!("payload[{image}].contentAttachment.data")));
    }
    response
}

async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<Held, Problem> {
    if !sends_fhir(headers) {
        return Err(ApiError::from(Code::MediaType).at("Content-Type").into());
    }
    body.read(&app.bounds, MAX_BODY_BYTES).await
}

/// A score from answers.
async fn assess(
    State(app): State<Arc<App>>,
    _: Allowed<Submit>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let begun = Instant::now();
    let Held { bytes, memory: _memory } = read(&app, &headers, body).await?;
    let assessment = blocking(move || severity::parse(&bytes)).await??;
    Ok(answer::json(assessment.render(clock::now(), begun.elapsed().as_secs_f64())))
}

/// A score from an image: nothing here computes one.
async fn assess_image(
    State(app): State<Arc<App>>,
    _: Allowed<Submit>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let Held { bytes, memory: _memory } = read(&app, &headers, body).await?;
    Err(blocking(move || severity::parse_local(&bytes)).await?.into())
}

/// A score from images of several body sites: nothing here computes one.
async fn assess_images(
    State(app): State<Arc<App>>,
    _: Allowed<Submit>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let Held { bytes, memory: _memory } = read(&app, &headers, body).await?;
    Err(blocking(move || severity::parse_global(&bytes)).await?.into())
}

async fn information(_: Allowed<Submit>) -> Response {
    answer::json(about::information())
}

/// Whether broker and database were there a moment ago; unlike `/readyz`, asks neither.
async fn health(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    if app.access.is_stale() {
        return Err(Code::DatabaseUnavailable.into());
    }
    if app.nats.connection_state() != connection::State::Connected {
        return Err(Code::QueueUnavailable.into());
    }
    Ok(answer::json(json!({ "status": "ready" })))
}

async fn body_sites() -> Response {
    answer::json(sites::list())
}

async fn clinical_signs() -> Response {
    answer::json(questionnaires::signs())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    code: Option<String>,
    /// A code of ICD-11.
    pathology: Option<String>,
}

async fn questions(wanted: Result<Query<Wanted>, QueryRejection>) -> Result<Response, Problem> {
    let Query(Wanted { code, pathology }) = wanted.map_err(|_| Code::QueryInvalid)?;
    Ok(answer::json(questionnaires::list(code.as_deref(), pathology.as_deref())))
}
