//! `POST /fhir`: a FHIR batch of a few `$analyze` requests, answered together.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
};
use dermflow_http::keeping::keeping;
use dermflow_schemas::{
    envelope::Payload,
    error::{ApiError, Code},
    fhir::{Resource, instant},
    id::{ClientId, JobId},
    limits::{MAX_BODY_BYTES, MAX_BUNDLE_ENTRIES},
};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    answer::{self, Problem, accepts_fhir, sends_fhir},
    app::App,
    audited::{Deed, Deeds, refused_part},
    bodies::Memory,
    element::{Faults, Node},
    extract::{Allowed, Body, Held, Submit},
    json::Json,
    language, parameters,
    prefer::Prefer,
    routes::{
        analyze::{Turn, cancel_after, idempotency_key},
        openapi::{Any, Bundle, Guarded, Negotiated, Reads, Typed, Wishes},
        status::finished_record,
    },
    submit::{Ended, Patience, Report, Submission, Submitted, blocking, internal, status_url, submit, wait},
};

/// The operation, as entries name it: relative to the base of the service.
const ANALYZE: &str = "DiagnosticReport/$analyze";

/// Every entry is a job of its own and answered as one: what is wrong with an entry concerns no other. An entry
/// that does not end within the wait is answered with 202 and where to poll, as with `respond-async` all are.
#[utoipa::path(post, path = "/fhir", operation_id = "batch", tag = "reports",
    params(Wishes),
    request_body(content((Bundle = "application/fhir+json"), (Bundle = "application/json")),
        description = "A Bundle `batch` of up to 32 entries `POST DiagnosticReport/$analyze`."),
    responses(
        (status = 200, description = "A Bundle `batch-response`.", body = Bundle, content_type = "application/fhir+json"),
        (status = 422, description = "The Bundle is not as it must be."),
        Any, Guarded, Reads, Typed, Negotiated))]
pub(crate) async fn post(
    State(app): State<Arc<App>>,
    Allowed { client, who, .. }: Allowed<Submit>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    if !sends_fhir(&headers) {
        return Err(ApiError::from(Code::MediaType).at("Content-Type").into());
    }
    let key = idempotency_key(&headers)?;
    let (prefer, cancel_after) = (Prefer::from_headers(&headers), cancel_after(&headers)?);
    let turn = || Turn::new(&app, client, prefer.lane());
    let _first = turn()?;
    let Held { bytes, mut memory } = body.read(app.bounds.bodies.share(Some(client)), MAX_BODY_BYTES).await?;
    let entries = blocking(move || parse(&bytes)).await??;
    // Who waits for many waits as many callers do.
    let _others = entries.iter().skip(1).map(|_| turn()).collect::<Result<Vec<_>, _>>()?;
    let end = Instant::now() + prefer.budget();
    let language = language::accepted(&headers);
    let keyless = key.is_none();
    let key = |n| key.as_ref().map(|key| format!("bundle {n} {}", key.as_str()));
    let submissions = entries.into_iter().enumerate().map(|(n, entry)| {
        let memory = memory.split(1);
        let (app, key) = (app.clone(), key(n));
        async move {
            let submitted = async {
                let mut payload = entry?;
                payload.manifest.language = language;
                let submission = Submission {
                    client,
                    who,
                    lane: prefer.lane(),
                    key,
                    payload,
                    cancel_after,
                    member: None,
                    patience: Patience::none(),
                    memory: memory.ok_or(Code::Overloaded)?,
                };
                submit(app.clone(), submission).await
            };
            let submitted = submitted.await;
            if let Err(problem) = &submitted {
                refused_part(app.as_ref(), who, client, None, n + 1, problem.code()).await?;
            }
            submitted
        }
    });
    let submitted: Vec<Result<Submitted, Problem>> = join_all(submissions.collect::<Vec<_>>()).await;
    // What waits from here on are ids.
    drop(memory);
    let jobs: Vec<Option<JobId>> =
        submitted.iter().map(|submitted| Some(submitted.as_ref().ok()?.job)).collect();
    let answers = submitted.into_iter().map(|submitted| answer(&app, client, submitted, end));
    let (entries, kept): (Vec<Value>, Vec<Option<Memory>>) = join_all(answers).await.into_iter().unzip();
    // Who learns that a job goes on has just submitted it.
    let told = jobs.iter().zip(&entries).filter(|(_, entry)| entry["response"]["status"] != "202");
    let deeds = told
        .filter_map(|(job, entry)| Some(Deed::ended((*job)?, entry["resource"].is_object()).last(keyless)));
    let deeds = Deeds::Each(deeds.collect());
    let bundle = json!({"resourceType": "Bundle", "type": "batch-response", "entry": entries});
    Ok(keeping(deeds.of(answer::fhir(StatusCode::OK, bundle.to_string().into_bytes())), kept))
}

/// An entry, and the memory that its report takes.
async fn answer(
    app: &Arc<App>,
    client: ClientId,
    submitted: Result<Submitted, Problem>,
    end: Instant,
) -> (Value, Option<Memory>) {
    let job = submitted.as_ref().ok().map(|submitted| submitted.job);
    let ended = match submitted {
        Ok(submitted) => wait(app, submitted, client, end.saturating_duration_since(Instant::now())).await,
        Err(problem) => Err(problem),
    };
    let entry = match (ended, job) {
        (Ok(Some(ended)), _) => match finished(ended) {
            Ok((entry, memory)) => return (entry, Some(memory)),
            Err(problem) => refused(&problem),
        },
        (Ok(None), Some(job)) => goes_on(app, job),
        (Ok(None), None) => refused(&Code::Internal.into()),
        (Err(problem), _) => refused(&problem),
    };
    (entry, None)
}

fn finished(ended: Ended) -> Result<(Value, Memory), Problem> {
    let (record, Report { bytes, memory }) = finished_record(ended)?;
    let report: Value = serde_json::from_slice(&bytes).map_err(|error| internal(&error))?;
    let response = json!({
        "status": "200",
        "location": format!("DiagnosticReport/{}/_history/1", record.id),
        "etag": "W/\"1\"",
        "lastModified": instant(record.finished_at.unwrap_or(record.accepted_at)),
    });
    Ok((json!({"resource": report, "response": response}), memory))
}

fn goes_on(app: &App, job: JobId) -> Value {
    let outcome = answer::information_outcome("job-accepted", "The analysis is queued. Poll the location.");
    let outcome = Resource::OperationOutcome(outcome);
    json!({"response": {"status": "202", "location": status_url(&app.public_url, job), "outcome": outcome}})
}

fn refused(problem: &Problem) -> Value {
    let outcome = Resource::OperationOutcome(problem.outcome());
    json!({"response": {"status": problem.status().to_string(), "outcome": outcome}})
}

/// One result an entry; an error of the bundle itself concerns all.
fn parse(body: &[u8]) -> Result<Vec<Result<Payload, Problem>>, ApiError> {
    let json = Json::parse(body)?;
    let mut faults = Faults::default();
    let root = Node { json: &json, path: "Bundle".into() };
    let entries = entries(&root, &mut faults).unwrap_or_default();
    if !faults.0.is_empty() {
        return Err(faults.0.into());
    }
    Ok(entries.iter().map(|resource| parameters::read(resource).map_err(Problem::from)).collect())
}

fn entries<'n, 'a>(root: &Node<'n, 'a>, faults: &mut Faults) -> Option<Vec<Node<'n, 'a>>> {
    let names = ["resourceType", "meta", "language", "identifier", "type", "timestamp", "entry"];
    let bundle = root.element(&names, faults)?;
    for (name, expected) in [("resourceType", "Bundle"), ("type", "batch")] {
        let node = bundle.required(name, faults)?;
        if node.string(faults)? != expected {
            faults.add(Code::ValueInvalid, node.path, Some(format!("expected {expected}")));
        }
    }
    let items = bundle.required("entry", faults)?.items(faults);
    if items.len() > MAX_BUNDLE_ENTRIES {
        let rule = format!("at most {MAX_BUNDLE_ENTRIES} entries: send more as NDJSON to /batches");
        faults.add(Code::ValueInvalid, "Bundle.entry", Some(rule));
        return None;
    }
    items.iter().map(|item| entry(item, faults)).collect()
}

/// The resource of an entry whose request is the operation.
fn entry<'n, 'a>(item: &Node<'n, 'a>, faults: &mut Faults) -> Option<Node<'n, 'a>> {
    let entry = item.element(&["fullUrl", "resource", "request"], faults)?;
    let request = entry.required("request", faults)?.element(&["method", "url"], faults)?;
    for (name, expected) in [("method", "POST"), ("url", ANALYZE)] {
        let node = request.required(name, faults)?;
        if node.string(faults)?.trim_start_matches('/') != expected {
            faults.add(Code::ValueInvalid, node.path, Some(format!("only {expected}")));
        }
    }
    entry.required("resource", faults)
}
