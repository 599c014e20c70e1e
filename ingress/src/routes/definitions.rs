//! `/fhir/metadata` and what is published with it, for everybody: operations, code systems, value sets, maps.

use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use axum::{
    extract::{Path, Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_schemas::error::{ApiError, Code};
use serde_json::Value;

use crate::{
    answer::{self, Problem, accepts_fhir},
    app::App,
    fhir, list,
    routes::openapi::{Any, Bundle, Definition, Negotiated, Own, Queried},
};

/// What this server does.
#[utoipa::path(get, path = "/fhir/metadata", operation_id = "capabilities", tag = "documents", security(()),
    params(("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has.")),
    responses(
        (status = 200, description = "A CapabilityStatement.", body = Definition, content_type = "application/fhir+json",
            headers(("ETag" = String, description = "Its version."))),
        (status = 304, description = "It is what the caller has.",
            headers(("ETag" = String, description = "Its version."))),
        Any, Negotiated))]
pub(crate) async fn metadata(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, Problem> {
    tagged(&headers, &fhir::statement(&app.public_url))
}

/// A definition with its entity tag, or 304 for who has it already (RFC 9110 §13.1.2).
fn tagged(headers: &HeaderMap, definition: &Value) -> Result<Response, Problem> {
    if !accepts_fhir(headers) {
        return Err(Code::NotAcceptable.into());
    }
    let body = definition.to_string().into_bytes();
    let tag = format!("W/\"{}\"", URL_SAFE_NO_PAD.encode(&digest(&SHA256, &body).as_ref()[..12]));
    let is_known = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| list::split(value, ','))
        .any(|known| known.trim() == "*" || known.trim().trim_start_matches("W/") == &tag[2..]);
    let mut response =
        if is_known { StatusCode::NOT_MODIFIED.into_response() } else { answer::fhir(StatusCode::OK, body) };
    response.headers_mut().extend(HeaderValue::from_str(&tag).ok().map(|tag| (header::ETAG, tag)));
    Ok(response)
}

fn read(kind: &str, id: &str, headers: &HeaderMap) -> Result<Response, Problem> {
    let found = fhir::definitions(kind).into_iter().find(|definition| definition["id"] == id);
    tagged(headers, &found.ok_or(Code::NotFound)?)
}

/// By `url`, or all of them.
fn search(
    kind: &str,
    app: &App,
    parameters: &[(String, String)],
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let mut found = fhir::definitions(kind);
    for (name, value) in parameters {
        match name.as_str() {
            "url" => found.retain(|definition| value.split(',').any(|url| definition["url"] == url)),
            "_format" if value.contains("json") => {}
            _ => return Err(ApiError::from(Code::QueryInvalid).at(name.clone()).into()),
        }
    }
    let url = format!("{}/fhir/{kind}", app.public_url);
    let total = found.len();
    let entry = |definition: Value| {
        let id = definition["id"].as_str().unwrap_or_default().to_owned();
        fhir::search::found(&url, id, definition)
    };
    let entries = found.into_iter().map(entry).collect();
    let mut bundle = fhir::search::searchset(&url, parameters, None, entries);
    bundle["total"] = total.into();
    tagged(headers, &bundle)
}

macro_rules! published {
    ($($kind:literal $read:ident $read_path:literal $read_id:literal $search:ident $search_path:literal $search_id:literal)*) => {$(
        /// What is published of this type, by its id.
        #[utoipa::path(get, path = $read_path, operation_id = $read_id, tag = "documents", security(()),
            params(("id" = String, Path, description = "Its id."),
                ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has.")),
            responses(
                (status = 200, description = "The definition.", body = Definition, content_type = "application/fhir+json",
                    headers(("ETag" = String, description = "Its version."))),
                (status = 304, description = "It is what the caller has.",
                    headers(("ETag" = String, description = "Its version."))),
                Any, Own, Negotiated))]
        pub(crate) async fn $read(Path(id): Path<String>, headers: HeaderMap) -> Result<Response, Problem> {
            read($kind, &id, &headers)
        }

        /// What is published of this type, by its canonical URL.
        #[utoipa::path(get, path = $search_path, operation_id = $search_id, tag = "documents", security(()),
            params(("url" = Option<String>, Query, description = "Canonical URLs, with commas."),
                ("_format" = Option<String>, Query, pattern = "json", description = "FHIR JSON."),
                ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has.")),
            responses(
                (status = 200, description = "Those that there are.", body = Bundle, content_type = "application/fhir+json",
                    headers(("ETag" = String, description = "Its version."))),
                (status = 304, description = "It is what the caller has.",
                    headers(("ETag" = String, description = "Its version."))),
                Any, Queried, Negotiated))]
        pub(crate) async fn $search(
            State(app): State<Arc<App>>,
            parameters: Result<Query<Vec<(String, String)>>, axum::extract::rejection::QueryRejection>,
            headers: HeaderMap,
        ) -> Result<Response, Problem> {
            let Query(parameters) = parameters.map_err(|_| ApiError::from(Code::QueryInvalid).at("query"))?;
            search($kind, &app, &parameters, &headers)
        }
    )*};
}

published! {
    "OperationDefinition" operation "/fhir/OperationDefinition/{id}" "readOperationDefinition"
        operations "/fhir/OperationDefinition" "searchOperationDefinitions"
    "CodeSystem" code_system "/fhir/CodeSystem/{id}" "readCodeSystem"
        code_systems "/fhir/CodeSystem" "searchCodeSystems"
    "ValueSet" value_set "/fhir/ValueSet/{id}" "readValueSet"
        value_sets "/fhir/ValueSet" "searchValueSets"
    "ConceptMap" concept_map "/fhir/ConceptMap/{id}" "readConceptMap"
        concept_maps "/fhir/ConceptMap" "searchConceptMaps"
}
