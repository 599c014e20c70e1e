//! How answers look: FHIR resources, and errors as `OperationOutcome` on `/fhir`, in the form of the device API on its
//! paths, or as RFC 9457 elsewhere.

use axum::{
    Json,
    body::Body,
    extract::Request,
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_schemas::{
    error::{ApiError, Code, Fault, Retry},
    fhir::{CANONICAL, CodeableConcept, Coding, Issue, OperationOutcome, Resource, coding},
};
use serde_json::json;

/// The media type of FHIR R4 JSON.
pub const FHIR_JSON: &str = "application/fhir+json; fhirVersion=4.0";

/// An error on its way out: handlers return it, [`render`] gives it the form of its path.
#[derive(Debug, Clone)]
pub struct Problem {
    error: ApiError,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl Problem {
    /// The code of the answer as a whole.
    pub fn code(&self) -> Code {
        self.error.code()
    }

    /// Whether the answer is this error.
    pub fn is(&self, code: Code) -> bool {
        self.code() == code
    }

    /// Whether a repeat is safe.
    pub fn retry(&self) -> Retry {
        self.error.kind().retry
    }

    /// As a member of a larger answer.
    pub fn to_json(&self) -> serde_json::Value {
        error_json(&self.error)
    }

    /// As the outcome of an entry of a FHIR batch.
    pub fn outcome(&self) -> OperationOutcome {
        outcome(&self.error)
    }

    /// The HTTP status.
    pub fn status(&self) -> u16 {
        self.error.kind().status
    }

    /// Names the element at fault.
    #[must_use]
    pub fn at(self, field: impl Into<String>) -> Self {
        Self { error: self.error.at(field), ..self }
    }

    /// Adds a header, such as the URL to poll.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: &str) -> Self {
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
pub async fn render(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    let Some(Problem { error, .. }) = response.extensions_mut().remove::<Problem>() else { return response };
    let (content_type, body) = if path == "/fhir" || path.starts_with("/fhir/") {
        (FHIR_JSON, Resource::OperationOutcome(outcome(&error)).to_json())
    } else if is_device(&path) || (path == "/login" && error.code() == Code::ElementMissing) {
        ("application/json", device(&error).to_string().into_bytes())
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

/// The version of the device API that its paths may begin with.
pub const DEVICE_VERSION: &str = "/v1.0";
/// What else they begin with.
const DEVICE: [&str; 9] = [
    "auth",
    "body-sites",
    "clinical",
    "clinical-signs",
    "device",
    "device-information",
    "diagnosis-support",
    "questionnaires",
    "severity-assessment",
];

/// Whether a path is the device API's, whose clients take an error for none unless it has its form.
pub fn is_device(path: &str) -> bool {
    let mut parts = path.split('/').skip(1);
    parts
        .next()
        .is_some_and(|first| DEVICE_VERSION.strip_prefix('/') == Some(first) || DEVICE.contains(&first))
}

/// The device API's: `detail` is a list with one entry a fault where the request is at fault (400, 422), else a
/// sentence. Our code and retry class stand beside it.
fn device(error: &ApiError) -> serde_json::Value {
    let kind = error.kind();
    let hint = error.faults.first().and_then(|fault| fault.detail.as_deref());
    let detail = match (error.code(), hint) {
        _ if [400, 422].contains(&kind.status) => error.faults.iter().map(device_entry).collect(),
        // Sentences that clients look for.
        (Code::Unauthenticated, Some(EXPIRED)) => json!("Expired token"),
        (Code::Unauthenticated, _) => json!("Invalid token"),
        (_, Some(hint)) => json!(format!("{} ({hint})", kind.text)),
        (_, None) => json!(kind.text),
    };
    let retry_after = error.retry_after.map(|pause| pause.as_secs().max(1));
    json!({ "detail": detail, "code": kind.code, "retry": kind.retry.as_str(), "retry_after": retry_after })
}

/// The hint at an access token of ours that was good until a while ago.
pub const EXPIRED: &str = "expired";

/// What is wrong, and where: the steps to the member, positions in arrays as numbers.
fn device_entry(fault: &Fault) -> serde_json::Value {
    let (type_, msg) = match fault.code {
        Code::ElementMissing => ("missing", "Field required".to_owned()),
        Code::ImageNotBase64 => ("value_error", "Value error, Only base64 data is allowed".to_owned()),
        Code::JsonMalformed | Code::JsonTooComplex => ("json_invalid", "JSON decode error".to_owned()),
        code => {
            let text = code.kind().text;
            let detail =
                fault.detail.as_ref().map_or_else(|| text.into(), |detail| format!("{text} {detail}"));
            ("value_error", format!("Value error, {detail}"))
        }
    };
    let part = match fault.code {
        Code::HeaderInvalid => "header",
        Code::QueryInvalid => "query",
        _ => "body",
    };
    let step = |step: &str| match step.strip_suffix(']').and_then(|number| number.parse::<usize>().ok()) {
        Some(number) => json!(number),
        None => json!(step),
    };
    let field = fault.field.as_deref().unwrap_or_default();
    let steps = field.split(['.', '[']).filter(|step| !step.is_empty()).map(step);
    json!({ "type": type_, "loc": std::iter::once(json!(part)).chain(steps).collect::<Vec<_>>(), "msg": msg })
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
pub fn error_json(error: &ApiError) -> serde_json::Value {
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

/// As FHIR's outcome of an operation.
pub fn outcome(error: &ApiError) -> OperationOutcome {
    let retry = coding(&format!("{CANONICAL}/CodeSystem/retry"), error.kind().retry.as_str(), "");
    let issue = |fault: &Fault| {
        let kind = fault.code.kind();
        // An entry of a batch has no Retry-After of its own.
        let pause = error.retry_after.map(|pause| format!("retry after {} s", pause.as_secs().max(1)));
        let diagnostics = [fault.detail.clone(), pause].into_iter().flatten().collect::<Vec<_>>().join("; ");
        let codes = vec![error_coding(kind.code), Coding { display: None, ..retry.clone() }];
        Issue {
            severity: "error",
            code: kind.issue,
            details: CodeableConcept { coding: codes, text: Some(kind.text.into()) },
            diagnostics: (!diagnostics.is_empty()).then_some(diagnostics),
            expression: fault.field.iter().cloned().collect(),
        }
    };
    OperationOutcome { issue: error.faults.iter().map(issue).collect() }
}

/// An error's code in FHIR.
pub fn error_coding(code: &str) -> Coding {
    Coding { display: None, ..coding(&format!("{CANONICAL}/CodeSystem/error"), code, "") }
}

/// A body of plain JSON.
pub fn json(body: serde_json::Value) -> Response {
    Json(body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_names_code_retry_and_field() {
        let body = problem(&ApiError::from(Code::HeaderInvalid).at("Idempotency-Key"), "/x");
        assert_eq!(body["code"], "header-invalid");
        assert_eq!(body["retry"], "never");
        assert_eq!(body["errors"][0]["field"], "Idempotency-Key");
    }

    #[test]
    fn the_device_api_knows_its_paths() {
        for path in ["/v1.0/login", "/v1.0/nothing", "/auth/login", "/diagnosis-support", "/device/about"] {
            assert!(is_device(path), "{path}");
        }
        for path in ["/", "/login", "/v1.00/login", "/devices", "/jobs/device", "device"] {
            assert!(!is_device(path), "{path}");
        }
    }

    #[test]
    fn the_device_api_has_an_entry_a_fault_or_a_sentence() {
        let fault = |code, field: &str| Fault { code, field: Some(field.into()), detail: None };
        let data = "payload[0].contentAttachment.data";
        let error =
            ApiError::from(vec![fault(Code::ElementMissing, "bodySite"), fault(Code::ImageNotBase64, data)]);
        let body = device(&error);
        let expected = json!([
            {"type": "missing", "loc": ["body", "bodySite"], "msg": "Field required"},
            {"type": "value_error", "loc": ["body", "payload", 0, "contentAttachment", "data"],
             "msg": "Value error, Only base64 data is allowed"},
        ]);
        assert_eq!((&body["detail"], &body["code"]), (&expected, &json!("element-missing")));
        let body = device(&Code::JsonMalformed.into());
        assert_eq!(
            body["detail"],
            json!([{"type": "json_invalid", "loc": ["body"], "msg": "JSON decode error"}])
        );
        let header = device(&ApiError::from(Code::HeaderInvalid).at("Cancel-After"));
        assert_eq!(header["detail"][0]["loc"], json!(["header", "Cancel-After"]));
        assert_eq!(device(&Code::Unauthenticated.into())["detail"], "Invalid token");
        assert_eq!(device(&ApiError::from(Code::Unauthenticated).detail(EXPIRED))["detail"], "Expired token");
        let full = device(&Code::QueueFull.into());
        assert_eq!((&full["detail"], &full["retry_after"]), (&json!("The queue is full."), &json!(1)));
    }
}
