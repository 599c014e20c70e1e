//! The routes of the device API, at the root and under `/v1.0`.

use std::sync::Arc;

use async_nats::connection;
use axum::{
    extract::{Query, State, rejection::QueryRejection},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use dermflow_auth::audit::Action;
use dermflow_http::answer::DEVICE_VERSION;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    id::ClientId,
    limits::MAX_BODY_BYTES,
    model::ModelRef,
};
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;
use utoipa::IntoParams;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{
    analyze::{Caller, analysed},
    login,
    openapi::{
        Any, DiagnosticReport, Failed, GoesOn, Guarded, Own, Queried, Reads, Typed, Unavailable, Wishes,
    },
    status::{answered, finished, insert},
};
use crate::{
    answer::{self, Problem, asks_for_fhir, sends_fhir},
    app::App,
    audited::Deeds,
    device::{about, diagnosis, questionnaires, report, severity, sites},
    extract::{Allowed, Body, Held, Submit},
    language,
    submit::{Ended, blocking},
};

/// Where a client signs in, but for `/login` at the root, which is older.
pub(super) fn sign_in() -> OpenApiRouter<Arc<App>> {
    let login = || OpenApiRouter::new().routes(routes!(login::post));
    let versioned = login().nest("/auth", login());
    OpenApiRouter::new().nest("/auth", login()).nest(DEVICE_VERSION, versioned)
}

/// What everybody may read.
pub(super) fn documents() -> OpenApiRouter<Arc<App>> {
    twice(|| {
        OpenApiRouter::new()
            .routes(routes!(health))
            .routes(routes!(body_sites))
            .routes(routes!(clinical_signs))
            .routes(routes!(questions))
    })
}

/// What a token is for.
pub(super) fn api() -> OpenApiRouter<Arc<App>> {
    twice(|| {
        analyses().nest("/clinical", analyses()).routes(routes!(information)).routes(routes!(device_about))
    })
}

fn analyses() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(diagnose))
        .routes(routes!(assess))
        .routes(routes!(assess_image))
        .routes(routes!(assess_images))
}

fn twice(routes: impl Fn() -> OpenApiRouter<Arc<App>>) -> OpenApiRouter<Arc<App>> {
    routes().nest(DEVICE_VERSION, routes())
}

/// Whether a path is one of [`documents`].
pub(super) fn is_open(path: &str) -> bool {
    let path = path.strip_prefix(DEVICE_VERSION).unwrap_or(path);
    ["/device/health", "/body-sites", "/clinical-signs", "/questionnaires"].contains(&path)
}

/// One to three images of a case in, 200 with what was found, as soon as it is; who asks for FHIR gets the report itself.
#[utoipa::path(post, path = "/diagnosis-support", operation_id = "diagnose", tag = "device",
    params(Chosen, Wishes),
    request_body(content = Object, content_type = "application/json"),
    responses(
        (status = 200, description = "What was found, by image and in all.",
            content((Object = "application/json"), (DiagnosticReport = "application/fhir+json"))),
        GoesOn, Any, Guarded, Own, Reads, Typed, Failed))]
async fn diagnose(
    State(app): State<Arc<App>>,
    Allowed { client, who, .. }: Allowed<Submit>,
    chosen: Result<Query<Chosen>, QueryRejection>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let Query(Chosen { model }) = chosen.map_err(|_| Code::QueryInvalid)?;
    let finished = if asks_for_fhir(&headers) { finished } else { diagnosed };
    let caller = Caller { client, who, headers, model };
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

/// Which model.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Chosen {
    /// Its name, or name@version; left out, the operator's weights decide.
    #[param(value_type = Option<String>, pattern = "^[A-Za-z0-9._+-]{1,64}(@[A-Za-z0-9._+-]{1,64})?$")]
    model: Option<ModelRef>,
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

async fn read(app: &App, client: ClientId, headers: &HeaderMap, body: Body) -> Result<Held, Problem> {
    if !sends_fhir(headers) {
        return Err(ApiError::from(Code::MediaType).at("Content-Type").into());
    }
    body.read(app.bounds.bodies.share(Some(client)), MAX_BODY_BYTES).await
}

/// Scores from answers, in the language that `Accept-Language` asks for.
#[utoipa::path(post, path = "/severity-assessment/manual", operation_id = "assess", tag = "device",
    request_body(content = Object, content_type = "application/json"),
    responses((status = 200, description = "Items and score.", body = Object),
        (status = 422, description = "An answer is missing, or out of its range."),
        Any, Guarded, Reads, Typed, Unavailable))]
async fn assess(
    State(app): State<Arc<App>>,
    Allowed { client, .. }: Allowed<Submit>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let begun = Instant::now();
    let Held { bytes, memory: _memory } = read(&app, client, &headers, body).await?;
    let assessment = blocking(move || severity::parse(&bytes)).await??;
    let deed = Deeds::one(Action::Assess, None, json!({ "scores": assessment.codes() }));
    let language = language::accepted(&headers);
    let told = assessment.render(clock::now(), begun.elapsed().as_secs_f64(), language);
    Ok(deed.of(([(header::CONTENT_LANGUAGE, language.tag())], answer::json(told)).into_response()))
}

macro_rules! automatic {
    ($($name:ident $path:literal $id:literal $parse:path;)*) => {$(
        /// Scores from images: nothing here computes one.
        #[utoipa::path(post, path = $path, operation_id = $id, tag = "device",
            request_body(content = Object, content_type = "application/json"),
            responses((status = 422, description = "Something is missing, or out of its range."),
                Any, Guarded, Reads, Typed, Unavailable))]
        async fn $name(
            State(app): State<Arc<App>>,
            Allowed { client, .. }: Allowed<Submit>,
            headers: HeaderMap,
            body: Body,
        ) -> Result<Response, Problem> {
            let Held { bytes, memory: _memory } = read(&app, client, &headers, body).await?;
            Err(blocking(move || $parse(&bytes)).await?.into())
        }
    )*};
}

automatic! {
    assess_image "/severity-assessment/automatic/local" "assessImage" severity::parse_local;
    assess_images "/severity-assessment/automatic/global" "assessImages" severity::parse_global;
}

/// Maker, version, and the largest request.
#[utoipa::path(get, path = "/device-information", operation_id = "deviceInformation", tag = "device",
    responses((status = 200, description = "What is on offer.", body = Object), Any, Guarded))]
async fn information(_: Allowed<Submit>) -> Response {
    answer::json(about::information())
}

/// The same.
#[utoipa::path(get, path = "/device/about", operation_id = "deviceAbout", tag = "device",
    responses((status = 200, description = "What is on offer.", body = Object), Any, Guarded))]
async fn device_about(allowed: Allowed<Submit>) -> Response {
    information(allowed).await
}

/// Whether broker and database were there a moment ago; unlike `/readyz`, asks neither.
#[utoipa::path(get, path = "/device/health", operation_id = "deviceHealth", tag = "device", security(()),
    responses((status = 200, description = "It can be used.", body = Object), Any))]
async fn health(State(app): State<Arc<App>>) -> Result<Response, Problem> {
    if app.access.is_stale() {
        return Err(Code::DatabaseUnavailable.into());
    }
    if app.nats.connection_state() != connection::State::Connected {
        return Err(Code::QueueUnavailable.into());
    }
    Ok(answer::json(json!({ "status": "ready" })))
}

/// The body sites of the device API, with names.
#[utoipa::path(get, path = "/body-sites", operation_id = "bodySites", tag = "device", security(()),
    responses((status = 200, description = "Codes and names.", body = Vec<Object>), Any))]
async fn body_sites() -> Response {
    answer::json(sites::list())
}

/// The signs that are asked for, with names.
#[utoipa::path(get, path = "/clinical-signs", operation_id = "clinicalSigns", tag = "device", security(()),
    responses((status = 200, description = "Keys and names.", body = Object), Any))]
async fn clinical_signs() -> Response {
    answer::json(questionnaires::signs())
}

/// Which systems.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wanted {
    /// Its code.
    code: Option<String>,
    /// A code of ICD-11.
    pathology: Option<String>,
}

/// What each scoring system asks, and which answers it takes.
#[utoipa::path(get, path = "/questionnaires", operation_id = "questionnaires", tag = "device", security(()),
    params(Wanted),
    responses((status = 200, description = "The systems.", body = Vec<Object>), Any, Queried))]
async fn questions(wanted: Result<Query<Wanted>, QueryRejection>) -> Result<Response, Problem> {
    let Query(Wanted { code, pathology }) = wanted.map_err(|_| Code::QueryInvalid)?;
    Ok(answer::json(questionnaires::list(code.as_deref(), pathology.as_deref())))
}
