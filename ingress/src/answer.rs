//! How ingress's answers look: FHIR resources, and which forms of them callers take and give.

use axum::{
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
pub(crate) use dermflow_http::answer::{EXPIRED, Problem, error_json, json};
use dermflow_http::answer::{FHIR_JSON, error_coding, outcome};
use dermflow_schemas::{
    error::{ApiError, CODES, Code, Fault},
    fhir::{CodeableConcept, Issue, OperationOutcome, Resource},
};

use crate::list;

/// The outcome of a line of a batch, from the error as [`error_json`] gives it.
pub(crate) fn line_outcome(error: &serde_json::Value, place: &str) -> Vec<u8> {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let code = CODES.iter().find(|code| code.kind().code == error["code"]).copied().unwrap_or(Code::Internal);
    let mut api_error = ApiError::from(code);
    let faults = error["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
    api_error.faults = faults
        .iter()
        .map(|fault| Fault {
            code: CODES.iter().find(|code| code.kind().code == fault["code"]).copied().unwrap_or(code),
            field: fault.get("field").map(text),
            detail: Some(
                fault.get("hint").map_or_else(|| place.to_owned(), |hint| format!("{place}: {}", text(hint))),
            ),
        })
        .collect();
    Resource::OperationOutcome(outcome(&api_error)).to_json()
}

/// An outcome that is no error: the job goes on, or was withdrawn.
pub(crate) fn information(code: &str, text: &str) -> Vec<u8> {
    Resource::OperationOutcome(information_outcome(code, text)).to_json()
}

/// As [`information`], for a place in a larger answer.
pub(crate) fn information_outcome(code: &str, text: &str) -> OperationOutcome {
    let issue = Issue {
        severity: "information",
        code: "informational",
        details: CodeableConcept { coding: vec![error_coding(code)], text: Some(text.into()) },
        diagnostics: None,
        expression: Vec::new(),
    };
    OperationOutcome { issue: vec![issue] }
}

/// A body of FHIR JSON.
pub(crate) fn fhir(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, FHIR_JSON)], body).into_response()
}

/// Whether the caller takes FHIR R4 JSON (RFC 9110 §12.5.1; quality values do not matter for one form).
pub(crate) fn accepts_fhir(headers: &HeaderMap) -> bool {
    let mut ranges = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| list::split(v, ','))
        .peekable();
    ranges.peek().is_none() || ranges.any(|range| is_r4(range, &FHIR_JSON_RANGES))
}

/// Whether the caller takes FHIR R4 JSON and calls it by its name.
pub(crate) fn asks_for_fhir(headers: &HeaderMap) -> bool {
    let ranges = headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok());
    ranges.flat_map(|v| list::split(v, ',')).any(|range| is_r4(range, &FHIR_JSON_RANGES[3..]))
}

/// Whether a request body calls itself FHIR R4 JSON.
pub(crate) fn sends_fhir(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| !v.contains('*') && is_r4(v, &FHIR_JSON_RANGES))
}

/// The media ranges that FHIR JSON is in, its own type last.
const FHIR_JSON_RANGES: [&str; 4] = ["*/*", "application/*", "application/json", "application/fhir+json"];

/// Whether a range is one of `types`, with no parameter that excludes R4.
fn is_r4(range: &str, types: &[&str]) -> bool {
    let mut parts = list::split(range, ';').map(|part| part.trim().to_ascii_lowercase());
    let known = parts.next().is_some_and(|kind| types.contains(&kind.as_str()));
    let refused = |part: String| match part.split_once('=') {
        Some(("fhirversion", version)) => version.trim_matches('"') != "4.0",
        Some(("charset", charset)) => charset.trim_matches('"') != "utf-8",
        Some(("q", quality)) => quality.parse() == Ok(0.0),
        _ => false,
    };
    known && !parts.any(refused)
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn only_fhir_r4_json_is_taken_and_given() {
        for good in [
            "*/*",
            "application/fhir+json",
            "text/html, application/json;q=0.5",
            "application/fhir+json; fhirVersion=4.0",
        ] {
            assert!(accepts_fhir(&headers(header::ACCEPT, good)), "{good}");
        }
        for bad in [
            "text/html; x=\", application/json;\"",
            "application/fhir+xml",
            "application/fhir+json; fhirVersion=5.0",
            "application/json;q=0",
        ] {
            assert!(!accepts_fhir(&headers(header::ACCEPT, bad)), "{bad}");
        }
        for (accept, asks) in [
            ("application/json, application/fhir+json; fhirVersion=4.0", true),
            ("*/*", false),
            ("application/json", false),
            ("application/fhir+json;q=0, */*", false),
        ] {
            assert_eq!(asks_for_fhir(&headers(header::ACCEPT, accept)), asks, "{accept}");
        }
        assert!(accepts_fhir(&HeaderMap::new()) && !asks_for_fhir(&HeaderMap::new()));
        assert!(sends_fhir(&headers(header::CONTENT_TYPE, "application/json; charset=UTF-8")));
        assert!(!sends_fhir(&headers(header::CONTENT_TYPE, "text/plain")));
        assert!(!sends_fhir(&headers(header::CONTENT_TYPE, "*/*")));
        assert!(!sends_fhir(&HeaderMap::new()));
    }
}
