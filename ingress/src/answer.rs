//! How answers look: FHIR resources, and errors as `OperationOutcome` on `/fhir` or as RFC 9457 elsewhere.

use axum::{
    Json,
    body::Body,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_auth::db::DbError;
use dermflow_schemas::{
    error::{ApiError, CODES, Code, Fault, Retry},
    fhir::{CANONICAL, CodeableConcept, Coding, Issue, OperationOutcome, Resource, coding},
};
use serde_json::json;

/// The media type of FHIR R4 JSON.
pub(crate) const FHIR_JSON: &str = "application/fhir+json; fhirVersion=4.0";

/// An error on its way out: handlers return it, [`render`] gives it the form of its path.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    error: ApiError,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// Whether the answer is this error.
    pub(crate) fn is(&self, code: Code) -> bool {
        self.error.kind().code == code.kind().code
    }

    /// Whether a repeat is safe.
    pub(crate) fn retry(&self) -> Retry {
        self.error.kind().retry
    }

    /// As a member of a larger answer.
    pub(crate) fn to_json(&self) -> serde_json::Value {
        error_json(&self.error)
    }

    /// As the outcome of an entry of a FHIR batch.
    pub(crate) fn outcome(&self) -> OperationOutcome {
        outcome(&self.error)
    }

    /// The HTTP status.
    pub(crate) fn status(&self) -> u16 {
        self.error.kind().status
    }

    /// Adds a header, such as the URL to poll.
    pub(crate) fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.push((name, value));
        }
        self
    }
}

impl From<ApiError> for Problem {
    fn from(error: ApiError) -> Self {
        Self { error, headers: Vec::new() }
    }
}

impl From<Code> for Problem {
    fn from(code: Code) -> Self {
        ApiError::from(code).into()
    }
}

impl From<DbError> for Problem {
    /// The cause goes to the log, not to the caller.
    fn from(error: DbError) -> Self {
        tracing::warn!(%error, "database");
        Code::DatabaseUnavailable.into()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.error.kind().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.headers_mut().extend(self.headers.iter().cloned());
        response.extensions_mut().insert(self);
        response
    }
}

/// Gives every error the form of its path. The outermost layer but the headers.
pub(crate) async fn render(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    let Some(Problem { error, .. }) = response.extensions_mut().remove::<Problem>() else { return response };
    let (content_type, body) = if path == "/fhir" || path.starts_with("/fhir/") {
        (FHIR_JSON, Resource::OperationOutcome(outcome(&error)).to_json())
    } else {
        ("application/problem+json", problem(&error, &path).to_string().into_bytes())
    };
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(seconds) = error.retry_after.map(|pause| pause.as_secs().max(1)) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    *response.body_mut() = Body::from(body);
    response.headers_mut().remove(header::CONTENT_LENGTH);
    response
}

/// RFC 9457, with the members `code`, `retry` and `errors` (one a fault) as extensions.
fn problem(error: &ApiError, instance: &str) -> serde_json::Value {
    let kind = error.kind();
    let mut problem = error_json(error);
    problem["type"] = json!(format!("{CANONICAL}/errors/{}", kind.code));
    problem["instance"] = json!(instance);
    problem
}

/// An error in plain JSON: code, sentence, status, whether a repeat is safe and after how many seconds, and one
/// entry a fault.
pub(crate) fn error_json(error: &ApiError) -> serde_json::Value {
    let kind = error.kind();
    let fault = |fault: &Fault| {
        let mut entry = json!({"code": fault.code.kind().code, "detail": fault.code.kind().text});
        if let Some(field) = &fault.field {
            entry["field"] = json!(field);
        }
        if let Some(detail) = &fault.detail {
            entry["hint"] = json!(detail);
        }
        entry
    };
    json!({
        "title": kind.text,
        "status": kind.status,
        "code": kind.code,
        "retry": kind.retry.as_str(),
        "retry_after": error.retry_after.map(|pause| pause.as_secs().max(1)),
        "errors": error.faults.iter().map(fault).collect::<Vec<_>>(),
    })
}

fn outcome(error: &ApiError) -> OperationOutcome {
    let retry = coding(&format!("{CANONICAL}/CodeSystem/retry"), error.kind().retry.as_str(), "");
    let issue = |fault: &Fault| {
        let kind = fault.code.kind();
        let codes = vec![error_coding(kind.code), Coding { display: None, ..retry.clone() }];
        Issue {
            severity: "error",
            code: kind.issue,
            details: CodeableConcept { coding: codes, text: Some(kind.text.into()) },
            diagnostics: fault.detail.clone(),
            expression: fault.field.iter().cloned().collect(),
        }
    };
    OperationOutcome { issue: error.faults.iter().map(issue).collect() }
}

fn error_coding(code: &str) -> Coding {
    Coding { display: None, ..coding(&format!("{CANONICAL}/CodeSystem/error"), code, "") }
}

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
    let issue = Issue {
        severity: "information",
        code: "informational",
        details: CodeableConcept { coding: vec![error_coding(code)], text: Some(text.into()) },
        diagnostics: None,
        expression: Vec::new(),
    };
    Resource::OperationOutcome(OperationOutcome { issue: vec![issue] }).to_json()
}

/// A body of FHIR JSON.
pub(crate) fn fhir(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, FHIR_JSON)], body).into_response()
}

/// A body of plain JSON.
pub(crate) fn json(body: serde_json::Value) -> Response {
    Json(body).into_response()
}

/// Whether the caller takes FHIR R4 JSON (RFC 9110 §12.5.1; quality values do not matter for one form).
pub(crate) fn accepts_fhir(headers: &HeaderMap) -> bool {
    let mut ranges = headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .peekable();
    ranges.peek().is_none() || ranges.any(is_fhir_json)
}

/// Whether a request body calls itself FHIR R4 JSON.
pub(crate) fn sends_fhir(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| !v.contains('*') && is_fhir_json(v))
}

fn is_fhir_json(range: &str) -> bool {
    let mut parts = range.split(';').map(|part| part.trim().to_ascii_lowercase());
    let types = ["*/*", "application/*", "application/json", "application/fhir+json"];
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
        for bad in ["application/fhir+xml", "application/fhir+json; fhirVersion=5.0", "application/json;q=0"]
        {
            assert!(!accepts_fhir(&headers(header::ACCEPT, bad)), "{bad}");
        }
        assert!(accepts_fhir(&HeaderMap::new()));
        assert!(sends_fhir(&headers(header::CONTENT_TYPE, "application/json; charset=UTF-8")));
        assert!(!sends_fhir(&headers(header::CONTENT_TYPE, "text/plain")));
        assert!(!sends_fhir(&headers(header::CONTENT_TYPE, "*/*")));
        assert!(!sends_fhir(&HeaderMap::new()));
    }

    #[test]
    fn a_problem_names_code_retry_and_field() {
        let body = problem(&ApiError::from(Code::HeaderInvalid).at("Idempotency-Key"), "/x");
        assert_eq!(body["code"], "header-invalid");
        assert_eq!(body["retry"], "never");
        assert_eq!(body["errors"][0]["field"], "Idempotency-Key");
    }
}
