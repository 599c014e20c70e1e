//! Every metric of the registration service, described once.

use std::sync::Arc;

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::Response,
};
use dermflow_auth::audit::trail;
use dermflow_http::{
    crowd,
    metrics::{self, add},
};
use dermflow_schemas::error::Code;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

use super::Service;

/// Why an attempt is refused: the labels of [`Metrics::refused`], which are there from the start, so that the first one
/// shows as a rise.
const REFUSALS: [Code; 26] = [
    Code::CertificateMissing,
    Code::CertificateInvalid,
    Code::HandshakeFailed,
    Code::SessionMissing,
    Code::SessionUnknown,
    Code::SessionExpired,
    Code::SessionForeign,
    Code::TokenNoSession,
    Code::LoginFailed,
    Code::LoginThrottled,
    Code::RateExceeded,
    Code::Forbidden,
    Code::LastAdministrator,
    Code::NotFound,
    Code::MethodNotAllowed,
    Code::MediaType,
    Code::BodyTooLarge,
    Code::BodyTimeout,
    Code::JsonMalformed,
    Code::FormInvalid,
    Code::QueryInvalid,
    Code::ElementUnknown,
    Code::ElementMissing,
    Code::ElementRepeated,
    Code::ValueInvalid,
    Code::Overloaded,
];

/// The metrics of the process.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    pub(super) registry: Registry,
    /// Answers by route, method and status.
    requests: IntCounterVec,
    /// Refused attempts, by reason: an alarm when they rise.
    refused: IntCounterVec,
    /// What is not in the audit trail though it happened: an alarm.
    pub(super) audit_lost: IntCounter,
    /// Connections of networks that had as many as they may.
    pub(super) turned_away: IntCounter,
}

impl Metrics {
    /// A registry with every metric in it.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            add(&registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let refused = counter("dermflow_staff_refused_total", "Refused attempts.", &["reason"])?;
        for code in REFUSALS {
            refused.with_label_values(&[code.kind().code]).reset();
        }
        Ok(Self {
            requests: counter("dermflow_http_requests_total", "Answers.", &["route", "method", "status"])?,
            refused,
            audit_lost: trail::counter(&registry)?,
            turned_away: crowd::counter(&registry)?,
            registry: registry.clone(),
        })
    }

    /// Counts a refused attempt.
    pub(super) fn refuse(&self, code: Code) {
        self.refused.with_label_values(&[code.kind().code]).inc();
    }

    /// The exposition.
    pub(super) fn render(&self) -> Vec<u8> {
        metrics::render(&self.registry)
    }
}

/// Counts an answer.
pub(super) async fn measure(
    State(service): State<Arc<Service>>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let method = request.method().clone();
    // Methods are the caller's words too: unknown ones share a label.
    let method = match method.as_str() {
        method @ ("GET" | "POST" | "PATCH" | "DELETE" | "HEAD") => method,
        _ => "other",
    };
    let path = path.as_ref().map_or("none", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    service.metrics.requests.with_label_values(&[&*path, method, response.status().as_str()]).inc();
    response
}
