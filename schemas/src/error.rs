//! What can go wrong, as a client sees it: a stable code, a status, whether a retry is safe, one sentence.
//!
//! The table [`Code::kind`] is the whole catalogue. Causes are logged where they happen and never sent.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// Whether and how a request may be repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same request will fail again: change it.
    Never,
    /// The same request may be sent again after `Retry-After`; nothing was accepted.
    Safe,
    /// The outcome is unknown: send the same request again with the same `Idempotency-Key`.
    SameKey,
    /// The request may succeed another time, as a new job: send it without the `Idempotency-Key`, or with another.
    NewKey,
    /// The job goes on: poll the URL in `Content-Location` instead.
    Poll,
}

impl Retry {
    /// The word in error bodies.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Safe => "safe",
            Self::SameKey => "same-key",
            Self::NewKey => "new-key",
            Self::Poll => "poll",
        }
    }
}

/// A row of the catalogue.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// The stable machine code.
    pub code: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// The code of FHIR's required `issue-type` value set.
    pub issue: &'static str,
    /// Whether a retry is safe.
    pub retry: Retry,
    /// One sentence for the reader.
    pub text: &'static str,
}

macro_rules! catalogue {
    ($($variant:ident $code:literal $status:literal $issue:literal $retry:ident $text:literal)*) => {
        /// A stable error code. The variant's documentation is the sentence a client reads.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Code {
            $(#[doc = $text] #[serde(rename = $code)] $variant,)*
        }

        /// Every code.
        pub const CODES: &[Code] = &[$(Code::$variant),*];

        impl Code {
            /// The row of the catalogue.
            pub fn kind(self) -> Kind {
                match self {
                    $(Self::$variant => Kind {
                        code: $code, status: $status, issue: $issue, retry: Retry::$retry, text: $text,
                    },)*
                }
            }
        }
    };
}

catalogue! {
    JsonMalformed        "json-malformed"         400 "structure"     Never   "The body is not well-formed JSON."
    JsonTooComplex       "json-too-complex"       400 "too-costly"    Never   "The body has more JSON values than any request needs."
    ElementUnknown       "element-unknown"        400 "structure"     Never   "The body has an element that its type does not have."
    ElementType          "element-type"           400 "structure"     Never   "An element has the wrong JSON type."
    HeaderInvalid        "header-invalid"         400 "invalid"       Never   "A request header has a value that cannot be read."
    QueryInvalid         "query-invalid"          400 "invalid"       Never   "A parameter of the URL is unknown or has a value that cannot be read."
    FormInvalid          "form-invalid"           400 "required"      Never   "The form needs the fields username and password."
    ElementMissing       "element-missing"        422 "required"      Never   "A required element is missing."
    ElementRepeated      "element-repeated"       422 "invariant"     Never   "An element is given more often than allowed."
    ValueInvalid         "value-invalid"          422 "value"         Never   "An element has a value that is not allowed."
    ModelUnknown         "model-unknown"          422 "not-found"     Never   "No worker has the model that was asked for."
    ParameterUnknown     "parameter-unknown"      422 "not-supported" Never   "The operation has no parameter of this name."
    ExtensionModifier    "modifier-extension"     422 "extension"     Never   "A modifierExtension may change the meaning of the request and is not understood."
    ImageCount           "image-count"            422 "business-rule" Never   "A request has one to three images."
    ImageNotBase64       "image-not-base64"       422 "value"         Never   "The image is not plain Base64: standard alphabet, padding, no white space, no data: prefix."
    ImageTooManyBytes    "image-too-many-bytes"   422 "too-long"      Never   "The image file has more bytes than this server accepts."
    ImageFormat          "image-format"           422 "not-supported" Never   "The image is neither JPEG nor PNG."
    ImageHeader          "image-header"           422 "value"         Never   "The image's header cannot be read."
    ImageTooSmall        "image-too-small"        422 "value"         Never   "The image has too few pixels for an analysis."
    ImageTooLarge        "image-too-large"        422 "value"         Never   "The image has more pixels than this server accepts."
    ImageKindTooLarge    "image-kind-too-large"   422 "value"         Never   "The image has more pixels than this server accepts of a progressive JPEG, or of a PNG with alpha or of 16 bits: save it as a baseline JPEG, or as a PNG of 8 bits without alpha."
    ImageUndecodable     "image-undecodable"      422 "value"         Never   "The image's header is right but its content cannot be decoded."
    IdempotencyConflict  "idempotency-conflict"   422 "conflict"      Never   "This Idempotency-Key was used with another request."
    PasswordRefused      "password-refused"       422 "value"         Never   "The password is too short, too long, or among the first that an attacker would try."
    Unauthenticated      "unauthenticated"        401 "login"         Never   "A valid access token is needed."
    LoginFailed          "login-failed"           401 "login"         Never   "The user name or the password is wrong."
    SessionNeeded        "session-needed"         401 "login"         Never   "A session of staff is needed, opened with the same certificate."
    SessionMissing       "session-missing"        401 "login"         Never   "A certificate of staff came without a session."
    SessionUnknown       "session-unknown"        401 "login"         Never   "There is no such session, or no longer."
    SessionExpired       "session-expired"        401 "login"         Never   "The session, or its account, has expired."
    SessionForeign       "session-foreign"        401 "login"         Never   "The session was opened with another certificate."
    TokenNoSession       "token-no-session"       401 "login"         Never   "An access token of a client is no session of staff."
    CertificateMissing   "certificate-missing"    401 "login"         Never   "The caller has shown no certificate."
    CertificateInvalid   "certificate-invalid"    401 "login"         Never   "The caller has shown a certificate that is not of staff, or no longer."
    HandshakeFailed      "handshake-failed"       401 "login"         Never   "The caller does not speak TLS as it is spoken here."
    Forbidden            "forbidden"              403 "forbidden"     Never   "The caller is not permitted to do this."
    ClientCertificateNeeded "client-certificate-needed" 403 "forbidden"  Never   "This is answered on connections with a client certificate only."
    NotFound             "not-found"              404 "not-found"     Never   "There is nothing here for this client."
    ReportRemoved        "report-removed"         404 "deleted"       NewKey  "The report of this job is not kept any more: send the images again."
    MethodNotAllowed     "method-not-allowed"     405 "not-supported" Never   "This resource does not have this method."
    NotAcceptable        "not-acceptable"         406 "not-supported" Never   "The answer is only available as FHIR R4 JSON."
    BodyTimeout          "body-timeout"           408 "timeout"       Safe    "The request body did not arrive in time."
    JobCancelled         "job-cancelled"          409 "conflict"      Never   "The job was cancelled."
    AccountExists        "account-exists"         409 "duplicate"     Never   "An account of this name exists already."
    SubjectLinked        "subject-linked"         409 "duplicate"     Never   "The subject of that provider is an account already."
    CredentialLimit      "credential-limit"       409 "business-rule" Never   "The account has as many credentials as it may."
    NotAClient           "not-a-client"           409 "business-rule" Never   "Only an integrator has credentials besides its password."
    LastAdministrator    "last-administrator"     409 "business-rule" Never   "This is the last administrator who can sign in."
    Bootstrapped         "bootstrapped"           409 "business-rule" Never   "The first administrator is registered already."
    BodyTooLarge         "body-too-large"         413 "too-long"      Never   "The request body is larger than this server accepts."
    MediaType            "media-type"             415 "not-supported" Never   "The body must be application/fhir+json or application/json."
    CustomIdRepeated     "custom-id-repeated"     422 "duplicate"     Never   "This upload has a line of the same name already."
    BatchTooLong         "batch-too-long"         413 "too-long"      Never   "An upload has more lines than this server accepts: put the rest into another upload."
    QuotaExceeded        "quota-exceeded"         429 "throttled"     Safe    "This client has as many open jobs, or bytes in them, as its quota allows."
    RateExceeded         "rate-exceeded"          429 "throttled"     Safe    "More requests, or images, came from this client, or from its network, than their rate allows."
    ConcurrencyExceeded  "concurrency-exceeded"   429 "throttled"     Safe    "This client has as many requests of this kind at once as it may."
    LoginThrottled       "login-throttled"        429 "throttled"     Safe    "There were too many wrong passwords: try again later, or from where you signed in before."
    RequeueRefused       "requeue-refused"        409 "conflict"      Never   "Only a failed job whose record and payload are kept can be put back into the queue."
    PollTooFast          "poll-too-fast"          429 "throttled"     Safe    "The status was asked for too often."
    Internal             "internal"               500 "exception"     SameKey "The server failed to handle the request."
    AnalysisFailed       "analysis-failed"        500 "exception"     NewKey  "The model gave no usable result for these images."
    AttemptsExhausted    "attempts-exhausted"     500 "exception"     NewKey  "The analysis was tried several times and did not finish."
    PayloadLost          "payload-lost"           500 "exception"     NewKey  "The images were lost from the queue before they were analysed: send them again."
    ReportUnreadable     "report-unreadable"      500 "exception"     NewKey  "The stored report of this job cannot be opened any more: send the images again."
    ScoreUnsupported     "score-unsupported"      501 "not-supported" Never   "This server does not compute this score."
    PayloadUnreadable    "payload-unreadable"     500 "exception"     NewKey  "The worker could not read the queued request."
    Overloaded           "overloaded"             503 "transient"     Safe    "The server has as much work as it can hold."
    ProviderUnavailable  "provider-unavailable"   503 "transient"     Safe    "The identity provider that issued the access token cannot be reached."
    DatabaseUnavailable  "database-unavailable"   503 "transient"     SameKey "The record of jobs cannot be reached."
    QueueUnavailable     "queue-unavailable"      503 "transient"     SameKey "The queue did not confirm the job in time."
    QueueFull            "queue-full"             503 "transient"     Safe    "The queue is full."
    NeverQueued          "never-queued"           503 "transient"     Safe    "The queue never confirmed the job, which was given up."
    WaitEnded            "wait-ended"             504 "timeout"       Poll    "The analysis did not finish within the wait; it goes on."
    DeadlineExceeded     "deadline-exceeded"      504 "timeout"       NewKey  "The analysis did not finish before its deadline and was stopped."
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind().code)
    }
}

/// One fault in a request: what, where, and the detail that helps to mend it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong.
    pub code: Code,
    /// The offending element as a FHIRPath, such as `Parameters.parameter[0].part[0].value.data`, or the name
    /// of a header; `None` when it is the request as a whole.
    pub field: Option<String>,
    /// Limits and offsets; never content of the request.
    pub detail: Option<String>,
}

/// An error as a client sees it, whatever the form of the answer. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// Every fault found; the first gives status and retry class.
    pub faults: Vec<Fault>,
    /// The value of `Retry-After`.
    pub retry_after: Option<Duration>,
}

impl ApiError {
    /// The code of the answer as a whole.
    pub fn code(&self) -> Code {
        self.faults.first().map_or(Code::Internal, |fault| fault.code)
    }

    /// Its row of the catalogue.
    pub fn kind(&self) -> Kind {
        self.code().kind()
    }

    /// Says when the request may be sent again; a part of a second counts as one.
    #[must_use]
    pub fn after(mut self, pause: Duration) -> Self {
        self.retry_after = Some(Duration::from_secs(pause.as_secs() + u64::from(pause.subsec_nanos() > 0)));
        self
    }

    /// Names the element, or the header, at fault.
    #[must_use]
    pub fn at(mut self, field: impl Into<String>) -> Self {
        if let Some(fault) = self.faults.first_mut() {
            fault.field = Some(field.into());
        }
        self
    }

    /// Adds a limit or an offset.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        if let Some(fault) = self.faults.first_mut() {
            fault.detail = Some(detail.into());
        }
        self
    }
}

impl From<Code> for ApiError {
    fn from(code: Code) -> Self {
        let retriable = matches!(code.kind().retry, Retry::Safe | Retry::SameKey);
        let retry_after = retriable.then_some(Duration::from_secs(1));
        Self { faults: vec![Fault { code, field: None, detail: None }], retry_after }
    }
}

impl From<Vec<Fault>> for ApiError {
    /// Faults of structure (400) come before faults of content (422), as the one hides the other.
    fn from(mut faults: Vec<Fault>) -> Self {
        faults.sort_by_key(|fault| fault.code.kind().status);
        faults.truncate(crate::limits::MAX_FAULTS);
        Self { faults, retry_after: None }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind().code)
    }
}

impl std::error::Error for ApiError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_read_like_codes() {
        let mut seen = std::collections::HashSet::new();
        for code in CODES {
            let kind = code.kind();
            assert!(seen.insert(kind.code), "{} twice", kind.code);
            assert!(kind.code.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'));
            assert!((400..600).contains(&kind.status));
            assert!(kind.text.ends_with('.'));
            assert_eq!(serde_json::to_value(code).unwrap(), kind.code);
        }
    }

    #[test]
    fn what_can_be_retried_says_when() {
        assert!(ApiError::from(Code::QueueFull).retry_after.is_some());
        assert!(ApiError::from(Code::NotFound).retry_after.is_none());
    }
}
