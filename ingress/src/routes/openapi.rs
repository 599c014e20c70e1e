//! `/openapi.json`: the API described from its own handlers, and what all of its answers have in common.

use std::{borrow::Cow, collections::BTreeMap, sync::LazyLock};

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use dermflow_http::{
    answer::{DEVICE_VERSION, is_device},
    openapi::{DeviceProblem, Fault, Problem, words},
};
use dermflow_schemas::job::{Lane, STATES};
use serde_json::{Value, json};
use utoipa::{
    IntoParams, IntoResponses, OpenApi, PartialSchema, ToSchema,
    openapi::{
        Object, ObjectBuilder, RefOr, Response as Described, ResponseBuilder, Schema, Type,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use crate::config::ClientOptions;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Dermflow",
        description = "Skin images in, HL7 FHIR R4 reports out. The reports are no diagnosis."
    ),
    security(("token" = []))
)]
struct Api;

/// What handlers add to.
pub(super) fn document() -> utoipa::openapi::OpenApi {
    let mut document = Api::openapi();
    let components = document.components.get_or_insert_default();
    let scheme = |scheme, text: &str| HttpBuilder::new().scheme(scheme).description(Some(text)).build();
    let token =
        scheme(HttpAuthScheme::Bearer, "An access token of /login or /oauth/token, or of a provider.");
    let client = scheme(HttpAuthScheme::Basic, "client_id and client_secret (RFC 6749 §2.3.1).");
    components.add_security_scheme("token", SecurityScheme::Http(token));
    components.add_security_scheme("client", SecurityScheme::Http(client));
    components.schemas.insert("Problem".into(), Problem::schema());
    components.schemas.insert("Fault".into(), Fault::schema());
    components.schemas.insert(OperationOutcome::name().into(), OperationOutcome::schema());
    components.schemas.insert(DeviceProblem::name().into(), DeviceProblem::schema());
    document
}

/// The document as it is served. Every answer has an id and says what its caller may do; an error has the form of its
/// path.
fn finished(document: &utoipa::openapi::OpenApi) -> Value {
    let mut document = json!(document);
    let header = |text: &str, required: bool| json!({"description": text, "required": required, "schema": {"type": "string"}});
    document["components"]["headers"] = json!({
        "RequestId": header("The caller's own id of the request, if it is fit to be logged, or a new one.", true),
        "RateLimitPolicy": header("What the caller may do (draft-ietf-httpapi-ratelimit-headers-10).", false),
        "RateLimit": header("What is left of it.", false),
        "RetryAfter": {"description": "Seconds.", "required": true, "schema": {"type": "integer", "minimum": 0}},
        "Challenge": header("RFC 6750 §3, or of Basic.", true),
    });
    document["components"]["parameters"] = json!({
        "RequestId": {
            "name": "X-Request-Id", "in": "header", "schema": {"type": "string"},
            "description": "An id of the caller's own: up to 64 letters, digits, dots, hyphens and underscores."
        }
    });
    let paths = document["paths"].as_object_mut().into_iter().flatten();
    for (path, item) in paths {
        for (_, operation) in item.as_object_mut().into_iter().flatten() {
            finish(path, operation);
        }
    }
    document
}

fn finish(path: &str, operation: &mut Value) {
    let parameter = json!({"$ref": "#/components/parameters/RequestId"});
    match &mut operation["parameters"] {
        Value::Array(parameters) => parameters.push(parameter),
        none => *none = json!([parameter]),
    }
    // The device API has its operations in several places.
    let mut place = path;
    for (prefix, suffix) in [(DEVICE_VERSION, "V1"), ("/clinical", "Clinical"), ("/auth", "Auth")] {
        if let (Some(rest), Value::String(id)) = (place.strip_prefix(prefix), &mut operation["operationId"]) {
            place = rest;
            id.push_str(suffix);
        }
    }
    let is_fhir = path == "/fhir" || path.starts_with("/fhir/");
    let (kind, schema) = if is_fhir {
        ("application/fhir+json", "OperationOutcome")
    } else if is_device(path) {
        ("application/json", "DeviceProblem")
    } else {
        ("application/problem+json", "Problem")
    };
    for (status, response) in operation["responses"].as_object_mut().into_iter().flatten() {
        let mut has = |name: &str, header: &str| {
            response["headers"][name] = json!({"$ref": format!("#/components/headers/{header}")});
        };
        has("X-Request-Id", "RequestId");
        has("RateLimit-Policy", "RateLimitPolicy");
        has("RateLimit", "RateLimit");
        match status.as_str() {
            "401" => has("WWW-Authenticate", "Challenge"),
            "429" | "503" => has("Retry-After", "RetryAfter"),
            _ => {}
        }
        if !status.starts_with(['4', '5']) {
            continue;
        }
        let own = json!({"$ref": format!("#/components/schemas/{schema}")});
        let content = &mut response["content"];
        if content.is_null() {
            content[kind] = json!({"schema": own});
        } else if is_device(path)
            && content.as_object_mut().and_then(|types| types.remove("application/problem+json")).is_some()
        {
            // What a login elsewhere says in two types it says in one here.
            let other = content[kind]["schema"].take();
            content[kind]["schema"] = json!({"oneOf": [other, own]});
        }
    }
}

macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident: $($status:literal $text:literal),*;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub(super) enum $name {}

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Described>> {
                BTreeMap::from([$(described($status, $text)),*])
            }
        }
    )*};
}

fn described(status: &str, text: &str) -> (String, RefOr<Described>) {
    (status.to_owned(), RefOr::T(ResponseBuilder::new().description(text).build()))
}

answers! {
    /// What every route may answer.
    Any:
        "429" "More requests came than the caller, or its network, may send.",
        "500" "The server failed.",
        "503" "The server, or something that it needs, has no room or cannot be reached.";
    /// What routes answer that want a token.
    Guarded:
        "401" "A valid access token is needed.",
        "403" "The token does not permit this.";
    /// What routes answer about something of the caller's own.
    Own: "404" "There is nothing here for this client.";
    /// What routes answer that read a body.
    Reads:
        "400" "The request cannot be read.",
        "408" "The body did not arrive in time.",
        "413" "The body is too large.";
    /// What routes answer that somebody signs in at.
    Sent:
        "403" "The connection has no client certificate where one is needed.",
        "408" "The body did not arrive in time.",
        "413" "The body is too large.";
    /// What routes answer that take one kind of body.
    Typed: "415" "The body has another media type.";
    /// What routes answer that look at `Accept`.
    Negotiated: "406" "The answer is FHIR R4 JSON only.";
    /// What routes answer that read the query.
    Queried: "400" "A parameter is unknown, or has a value that cannot be read.";
    /// What routes answer for which something is missing here.
    Unavailable: "501" "No model of this server computes that.";
    /// How jobs end that have no report.
    Failed:
        "409" "The job was cancelled.",
        "422" "An image, or the request, is not as it must be.",
        "504" "The analysis did not finish in time.";
}

/// How a request wants to be done.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "a description")]
pub(super) struct Wishes {
    /// `respond-async`, `wait=` seconds up to 60, or both (RFC 7240).
    #[param(rename = "Prefer")]
    prefer: Option<String>,
    /// The same key with the same request is the same job, or the same jobs.
    #[param(rename = "Idempotency-Key", pattern = "^[!-~]{1,255}$")]
    idempotency_key: Option<String>,
    /// The deadline of its jobs, at least 5 seconds: seconds, or a number with s, m, h or d.
    #[param(rename = "Cancel-After", pattern = "^[0-9]{1,9}[smhd]?$")]
    cancel_after: Option<String>,
}

/// How a report is answered.
#[derive(Debug, IntoResponses)]
#[response(
    status = 200,
    description = "The report.",
    content_type = "application/fhir+json",
    headers(
        ("Content-Location" = String, description = "The report's URL."),
        ("ETag" = String, description = "Its version."),
        ("Last-Modified" = String, description = "When it was made."),
        ("Expires" = String, description = "Until when it is kept."),
        ("Server-Timing" = String, description = "Milliseconds in the queue, in the model, and in all."),
        ("Preference-Applied" = String, description = "RFC 7240.")
    )
)]
pub(super) struct Reported(DiagnosticReport);

/// How a job is answered that goes on.
#[derive(Debug, IntoResponses)]
#[response(
    status = 202,
    description = "The job goes on.",
    content_type = "application/fhir+json",
    headers(
        ("Content-Location" = String, description = "Where to poll."),
        ("X-Progress" = String, description = "How far it is."),
        ("Retry-After" = u64, description = "Seconds."),
        ("Preference-Applied" = String, description = "RFC 7240.")
    )
)]
pub(super) struct GoesOn(OperationOutcome);

/// The types of what is published.
const PUBLISHED: &[&str] =
    &["CapabilityStatement", "OperationDefinition", "CodeSystem", "ValueSet", "ConceptMap"];

/// The types of a report's parts.
const PARTS: &[&str] = &["Observation", "Media", "Device", "Provenance"];

macro_rules! resources {
    ($($(#[$doc:meta])* $name:ident $schema:expr;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub(super) enum $name {}

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let schema: fn(ObjectBuilder) -> ObjectBuilder = $schema;
                let names: &[&str] = match stringify!($name) {
                    "Definition" => PUBLISHED,
                    "Part" => PARTS,
                    name => &[name],
                };
                let kind = words("The type.", names.iter().copied());
                let object = ObjectBuilder::new().property("resourceType", kind).required("resourceType");
                schema(object).build().into()
            }
        }

        impl ToSchema for $name {
            fn name() -> Cow<'static, str> {
                stringify!($name).into()
            }
        }
    )*};
}

fn text() -> Object {
    Object::with_type(Type::String)
}

fn list(item: Object) -> utoipa::openapi::Array {
    utoipa::openapi::ArrayBuilder::new().items(item).min_items(Some(1)).build()
}

resources! {
    /// FHIR R4, Parameters of `$analyze`.
    Parameters |object| {
        let name = words("Which one.", ["image", "subject", "identifier", "heatMap", "model"]);
        let parameter = ObjectBuilder::new().property("name", name).required("name").build();
        object
            .description(Some("FHIR R4 Parameters: `image` once to three times, with the parts `content` and optionally \
                `bodySite`; optionally `subject`, `identifier`, `heatMap` and `model`."))
            .property("parameter", list(parameter))
            .required("parameter")
            .examples([analyze_example()])
    };
    /// FHIR R4, a Bundle.
    Bundle |object| {
        let kinds = ["batch", "batch-response", "searchset"];
        object
            .description(Some("FHIR R4 Bundle."))
            .property("type", words("What it is.", kinds))
            .required("type")
            .property("entry", list(Object::with_type(Type::Object)))
    };
    /// FHIR R4, something that is published.
    Definition |object| {
        object
            .description(Some("FHIR R4: a CapabilityStatement, OperationDefinition, CodeSystem, ValueSet or ConceptMap."))
            .property("id", text())
            .property("url", text())
            .required("id")
            .required("url")
            .required("status")
    };
    /// FHIR R4, a part of a report.
    Part |object| {
        object
            .description(Some("FHIR R4: an Observation, Media, Device or Provenance."))
            .property("id", text())
            .required("id")
    };
    /// FHIR R4, a report.
    DiagnosticReport |object| {
        object
            .description(Some("FHIR R4 DiagnosticReport with everything that it refers to contained in it."))
            .property("id", text())
            .property("status", words("Never reviewed by a clinician.", ["preliminary"]))
            .required("id")
            .required("status")
            .required("code")
    };
    /// FHIR R4, a job.
    Task |object| {
        let states = ["requested", "ready", "in-progress", "completed", "failed", "cancelled"];
        object
            .description(Some("FHIR R4 Task."))
            .property("id", text())
            .property("status", words("Where the job stands.", states))
            .required("id")
            .required("status")
            .required("intent")
    };
    /// FHIR R4, an event of the audit trail.
    AuditEvent |object| {
        object.description(Some("FHIR R4 AuditEvent as IHE BALP has it.")).property("id", text()).required("id")
    };
    /// FHIR R4, an error or a note.
    OperationOutcome |object| {
        let issue = ObjectBuilder::new()
            .property("severity", words("Whether it is an error.", ["error", "information"]))
            .property("code", text())
            .property("details", Object::with_type(Type::Object))
            .property("diagnostics", text())
            .property("expression", list(text()))
            .required("severity")
            .required("code")
            .build();
        object.description(Some("FHIR R4 OperationOutcome.")).property("issue", list(issue)).required("issue")
    };
}

/// A request with the smallest image that is taken, all of it grey.
fn analyze_example() -> Value {
    const IMAGE: &str = "iVBORw0KGgoAAAANSUhEUgAAAFAAAABQCAAAAACreq1xAAAAMUlEQVR42u3MQREAAAwCIKMb3RJ77SAA6bEIhUKhUC\
                         gUCoVCoVAoFAqFQqFQKBT+Cgde44C1JKmC2wAAAABJRU5ErkJggg==";
    let content = json!({"name": "content", "valueAttachment": {"contentType": "image/png", "data": IMAGE}});
    let site = json!({"system": "http://snomed.info/sct", "code": "66643007", "display": "Skin of back"});
    let site = json!({"name": "bodySite", "valueCodeableConcept": {"coding": [site]}});
    json!({
        "resourceType": "Parameters",
        "parameter": [
            {"name": "image", "part": [content, site]},
            {"name": "subject", "valueReference": {"type": "Patient", "identifier": {"value": "P-1"}}}
        ]
    })
}

/// The states of jobs.
pub(super) fn states() -> Object {
    words("Where the job stands.", STATES.map(dermflow_schemas::job::State::as_str))
}

/// The lanes of jobs.
pub(super) fn lanes() -> Object {
    words("Whether its caller waited.", [Lane::Interactive, Lane::Bulk].map(Lane::as_str))
}

fn served(document: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], document.to_string()).into_response()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "describe", tag = "documents", security(()),
    responses((status = 200, description = "OpenAPI 3.1.", body = Object), Any))]
pub(super) async fn clients() -> Response {
    static DOCUMENT: LazyLock<Value> =
        LazyLock::new(|| finished(&super::clients(&ClientOptions::default()).into_openapi()));
    served(&DOCUMENT)
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "describe", tag = "documents", security(()),
    responses((status = 200, description = "OpenAPI 3.1.", body = Object), Any))]
pub(super) async fn operators() -> Response {
    static DOCUMENT: LazyLock<Value> =
        LazyLock::new(|| finished(&super::for_operators(&ClientOptions::default()).into_openapi()));
    served(&DOCUMENT)
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "describe", tag = "documents", security(()),
    responses((status = 200, description = "OpenAPI 3.1.", body = Object)))]
pub(super) async fn internal() -> Response {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(|| finished(&super::of_this_machine().into_openapi()));
    served(&DOCUMENT)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use dermflow_http::openapi::dangling;

    use super::*;

    fn documents() -> [Value; 3] {
        [
            finished(&super::super::clients(&ClientOptions::default()).into_openapi()),
            finished(&super::super::for_operators(&ClientOptions::default()).into_openapi()),
            finished(&super::super::of_this_machine().into_openapi()),
        ]
    }

    #[test]
    fn every_route_has_a_name_of_its_own_and_says_how_it_fails() {
        for document in documents() {
            assert_eq!(document["openapi"], "3.1.0");
            let mut ids = HashSet::new();
            for (path, item) in document["paths"].as_object().unwrap() {
                for (method, operation) in item.as_object().unwrap() {
                    assert!(ids.insert(operation["operationId"].to_string()), "{method} {path}");
                    let is_open =
                        operation["security"].as_array().is_some_and(|ways| ways.contains(&json!({})));
                    for status in ["401", "403"] {
                        let is_described = operation["responses"][status].is_object();
                        assert!(is_open || is_described, "{method} {path} {status}");
                    }
                    for (status, response) in operation["responses"].as_object().unwrap() {
                        assert!(response["headers"]["X-Request-Id"].is_object(), "{method} {path} {status}");
                        let has_body = response["content"].is_object();
                        assert_eq!(response.get("content").is_some(), has_body, "{method} {path} {status}");
                        assert!(has_body || !status.starts_with(['4', '5']), "{method} {path} {status}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_reference_in_the_documents_leads_somewhere() {
        for (document, least) in documents().iter().zip([300, 50, 10]) {
            let (dangling, sound) = dangling(document);
            assert!(dangling.is_empty(), "{dangling:?}");
            assert!(sound > least, "{sound}");
        }
    }
}
