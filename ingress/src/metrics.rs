//! Every metric, described once. Prometheus text format on the internal listener.

use dermflow_auth::audit::trail;
use dermflow_http::{
    crowd, door,
    metrics::{self, add},
};
use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

/// From a millisecond to the longest wait.
const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

const GROUP_SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

/// The metrics of an ingress process.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    pub(crate) registry: Registry,
    /// Answers by route, method and status.
    pub(crate) requests: IntCounterVec,
    /// Time to answer by route.
    pub(crate) request_seconds: HistogramVec,
    /// Jobs that reached a terminal state on this process's account, by lane and state.
    pub(crate) jobs_ended: IntCounterVec,
    /// From acceptance to the start of the last attempt, by lane.
    pub(crate) queue_seconds: HistogramVec,
    /// Jobs that a worker ended, by model, version and state: of a canary and of what it is to replace.
    pub(crate) model_jobs: IntCounterVec,
    /// In the model, by lane, model and version.
    pub(crate) model_seconds: HistogramVec,
    /// Results of jobs that had ended: second ones, and those that a waiting caller had recorded already.
    pub(crate) late_results: IntCounterVec,
    /// Jobs that the sweeper settled, by lane and code.
    pub(crate) swept: IntCounterVec,
    /// Jobs that were committed together.
    pub(crate) group_jobs: HistogramVec,
    /// Jobs whose payload was lost at the broker: an alarm.
    pub(crate) payloads_lost: IntCounterVec,
    /// Reports that were asked for and cannot be opened, by reason: their key is not there, or they are broken. An alarm.
    pub(crate) reports_unreadable: IntCounterVec,
    /// What was sealed anew with a newer key, and what could not be, by kind and outcome.
    pub(crate) resealed: IntCounterVec,
    /// Streams, consumers and buckets that were gone and were made again: an alarm.
    pub(crate) queue_recreated: IntCounterVec,
    /// What the streams hold: messages, pending, with workers, and unaccounted for, which is an alarm.
    pub(crate) stream_messages: IntGaugeVec,
    /// Callers waiting for a result.
    pub(crate) waiters: IntGauge,
    /// Callers who do not wait, while their jobs are accepted.
    pub(crate) submitters: IntGauge,
    /// Memory that bodies hold, and reports on their way out.
    pub(crate) body_bytes: IntGauge,
    /// What external identity providers were asked, by issuer, kind (keys, introspection) and outcome.
    pub(crate) provider_questions: IntCounterVec,
    /// What is not in the audit trail though it happened: an alarm.
    pub(crate) audit_lost: IntCounter,
    /// Connections of networks that had as many as they may.
    pub(crate) turned_away: IntCounter,
    /// Connections of balancers without a good PROXY header.
    pub(crate) proxy_headers_refused: IntCounter,
}

impl Metrics {
    /// A registry with every metric in it.
    pub(crate) fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            add(&registry, IntCounterVec::new(Opts::new(name, help), labels)?)
        };
        let seconds = |name: &str, help: &str, labels: &[&str]| {
            let options = HistogramOpts::new(name, help).buckets(SECONDS.to_vec());
            add(&registry, HistogramVec::new(options, labels)?)
        };
        Ok(Self {
            requests: counter("dermflow_http_requests_total", "Answers.", &["route", "method", "status"])?,
            request_seconds: seconds("dermflow_http_request_seconds", "Time to answer.", &["route"])?,
            jobs_ended: counter(
                "dermflow_jobs_ended_total",
                "Jobs that reached a terminal state.",
                &["lane", "state"],
            )?,
            queue_seconds: seconds(
                "dermflow_job_queue_seconds",
                "From acceptance to the last attempt.",
                &["lane"],
            )?,
            model_jobs: counter(
                "dermflow_model_jobs_total",
                "Jobs that a worker ended.",
                &["model", "version", "state"],
            )?,
            model_seconds: seconds(
                "dermflow_job_model_seconds",
                "Time in the model.",
                &["lane", "model", "version"],
            )?,
            late_results: counter(
                "dermflow_late_results_total",
                "Results of jobs that had ended already.",
                &[],
            )?,
            swept: counter("dermflow_swept_jobs_total", "Jobs that the sweeper settled.", &["lane", "code"])?,
            payloads_lost: counter("dermflow_payloads_lost_total", "Jobs whose payload was lost.", &[])?,
            reports_unreadable: counter(
                "dermflow_reports_unreadable_total",
                "Reports that were asked for and cannot be opened.",
                &["reason"],
            )?,
            resealed: counter(
                "dermflow_resealed_total",
                "What was to be sealed with a newer key.",
                &["kind", "outcome"],
            )?,
            queue_recreated: counter(
                "dermflow_queue_recreated_total",
                "Parts of the queue that were gone and were made again.",
                &["part"],
            )?,
            group_jobs: add(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new("dermflow_group_jobs", "Jobs that were committed together.")
                        .buckets(GROUP_SIZES.to_vec()),
                    &[],
                )?,
            )?,
            stream_messages: add(
                &registry,
                IntGaugeVec::new(
                    Opts::new("dermflow_stream_messages", "What a stream holds."),
                    &["stream", "kind"],
                )?,
            )?,
            waiters: add(&registry, IntGauge::new("dermflow_waiters", "Callers waiting for a result.")?)?,
            submitters: add(
                &registry,
                IntGauge::new("dermflow_submitters", "Callers whose jobs are being accepted.")?,
            )?,
            body_bytes: add(
                &registry,
                IntGauge::new("dermflow_body_bytes", "Memory that bodies and reports hold.")?,
            )?,
            provider_questions: counter(
                "dermflow_provider_questions_total",
                "What external identity providers were asked.",
                &["issuer", "kind", "outcome"],
            )?,
            audit_lost: trail::counter(&registry)?,
            turned_away: crowd::counter(&registry)?,
            proxy_headers_refused: door::counter(&registry)?,
            registry: registry.clone(),
        })
    }

    /// The exposition.
    pub(crate) fn render(&self) -> Vec<u8> {
        metrics::render(&self.registry)
    }
}
