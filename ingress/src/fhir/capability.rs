//! The `CapabilityStatement`, and the operation that it names.

use dermflow_schemas::{fhir::CANONICAL, limits::MAX_IMAGES};
use serde_json::{Value, json};

use super::{DATE, definition};

/// A search parameter: its name, and its type in FHIR.
type Parameter = (&'static str, &'static str);

const OF_REPORTS: [Parameter; 8] = [
    ("_id", "token"),
    ("_lastUpdated", "date"),
    ("subject", "reference"),
    ("patient", "reference"),
    ("identifier", "token"),
    ("date", "date"),
    ("issued", "date"),
    ("status", "token"),
];
const OF_PROVENANCES: [Parameter; 1] = [("target", "reference")];
const OF_TASKS: [Parameter; 2] = [("status", "token"), ("authored-on", "date")];
const OF_EVENTS: [Parameter; 6] = [
    ("date", "date"),
    ("agent", "reference"),
    ("outcome", "token"),
    ("action", "token"),
    ("subtype", "token"),
    ("entity", "reference"),
];
/// Of what is published; for everybody.
const OF_DEFINITIONS: [Parameter; 1] = [("url", "uri")];

fn resource(kind: &str, interactions: &[&str], parameters: &[Parameter], more: Value) -> Value {
    let parameters = parameters.iter().map(|(name, kind)| json!({"name": name, "type": kind}));
    let mut resource = json!({
        "type": kind,
        "interaction": interactions.iter().map(|code| json!({"code": code})).collect::<Vec<_>>(),
        "versioning": "no-version",
    });
    let parameters: Vec<Value> = parameters.collect();
    if !parameters.is_empty() {
        resource["searchParam"] = json!(parameters);
    }
    if let (Some(resource), Value::Object(more)) = (resource.as_object_mut(), more) {
        resource.extend(more);
    }
    resource
}

/// What this server does, for who comes by `public_url`.
pub(crate) fn statement(public_url: &str) -> Value {
    let operation =
        json!([{"name": "analyze", "definition": format!("{CANONICAL}/OperationDefinition/analyze")}]);
    let part = |kind| resource(kind, &["read"], &[], json!({"documentation": "A part of a report."}));
    let published = |kind| resource(kind, &["read", "search-type"], &OF_DEFINITIONS, Value::Null);
    let oauth = json!({
        "system": "http://terminology.hl7.org/CodeSystem/restful-security-service",
        "code": "SMART-on-FHIR",
    });
    let endpoints = json!({
        "url": "http://fhir-registry.smarthealthit.org/StructureDefinition/oauth-uris",
        "extension": [
            {"url": "token", "valueUri": format!("{public_url}/oauth/token")},
            {"url": "revoke", "valueUri": format!("{public_url}/oauth/revoke")},
            {"url": "introspect", "valueUri": format!("{public_url}/oauth/introspect")},
        ],
    });
    let mut statement = definition(
        "CapabilityStatement",
        "dermflow",
        "DermflowServer",
        "Dermflow: skin image analysis",
        "Takes skin images and answers with reports. The reports are no diagnosis.",
    );
    let more = json!({
        "date": DATE,
        "kind": "instance",
        "software": {"name": "Dermflow", "version": env!("CARGO_PKG_VERSION")},
        "implementation": {"description": "Dermflow", "url": format!("{public_url}/fhir")},
        "fhirVersion": "4.0.1",
        "format": ["application/fhir+json", "json"],
        "rest": [{
            "mode": "server",
            "documentation": "A client sees what is its own. A search parameter that is not named here is refused.",
            "security": {
                "extension": [endpoints],
                "cors": false,
                "service": [{"coding": [oauth], "text": "OAuth 2.0 client credentials (SMART Backend Services)"}],
                "description": "TLS 1.2 or 1.3, and a bearer token on everything but this statement, \
                    .well-known/smart-configuration, and what is published with it.",
            },
            "resource": [
                resource(
                    "DiagnosticReport",
                    &["read", "search-type", "delete"],
                    &OF_REPORTS,
                    json!({
                        "operation": operation,
                        "searchInclude": ["DiagnosticReport:result", "DiagnosticReport:media"],
                        "searchRevInclude": ["Provenance:target"],
                    }),
                ),
                part("Observation"),
                part("Media"),
                part("Device"),
                resource("Provenance", &["read", "search-type"], &OF_PROVENANCES,
                    json!({"documentation": "What a report and its parts were made from."})),
                resource("Task", &["read", "search-type"], &OF_TASKS, Value::Null),
                resource("AuditEvent", &["read", "search-type"], &OF_EVENTS,
                    json!({"documentation": "For auditors."})),
                published("OperationDefinition"),
                published("CodeSystem"),
                published("ValueSet"),
                published("ConceptMap"),
            ],
            "interaction": [{
                "code": "batch",
                "documentation": "Entries POST DiagnosticReport/$analyze. Thousands go to /batches as NDJSON.",
            }],
        }],
    });
    if let (Some(statement), Value::Object(more)) = (statement.as_object_mut(), more) {
        statement.extend(more);
    }
    statement
}

/// What can be asked for besides what FHIR has of its own.
pub(super) fn operations() -> [Value; 1] {
    let parameter = |name: &str, r#use: &str, min: usize, max: usize, kind: &str, documentation: &str| {
        json!({"name": name, "use": r#use, "min": min, "max": max.to_string(), "type": kind,
            "documentation": documentation})
    };
    let site = json!({"strength": "example", "valueSet": format!("{CANONICAL}/ValueSet/body-sites")});
    let mut body_site = parameter("bodySite", "in", 0, 1, "CodeableConcept", "Where on the body.");
    body_site["binding"] = site;
    let image = json!({
        "name": "image",
        "use": "in",
        "min": 1,
        "max": MAX_IMAGES.to_string(),
        "documentation": "A photograph of a lesion; several are of the same one.",
        "part": [parameter("content", "in", 1, 1, "Attachment", "JPEG or PNG, Base64 in data; when it was taken in creation."), body_site],
    });
    let mut analyze = definition(
        "OperationDefinition",
        "analyze",
        "Analyze",
        "Analyse skin images",
        "Analyses one to three skin images. With `Prefer: respond-async` it answers 202 and where to poll.",
    );
    analyze["kind"] = json!("operation");
    analyze["affectsState"] = json!(true);
    analyze["code"] = json!("analyze");
    analyze["resource"] = json!(["DiagnosticReport"]);
    analyze["system"] = json!(false);
    analyze["type"] = json!(true);
    analyze["instance"] = json!(false);
    analyze["parameter"] = json!([
        image,
        parameter("subject", "in", 0, 1, "Reference", "The patient, by a reference or an identifier."),
        parameter("identifier", "in", 0, 1, "Identifier", "The caller's own number of the order."),
        parameter("heatMap", "in", 0, 1, "code", "none, top-1 or top-5; left out when the model has none."),
        parameter(
            "model",
            "in",
            0,
            1,
            "string",
            "A model's name, or name@version; else the operator's weights decide."
        ),
        parameter("return", "out", 1, 1, "DiagnosticReport", "The report."),
    ]);
    [analyze]
}
