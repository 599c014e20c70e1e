//! `POST /fhir/DiagnosticReport/$analyze`: one to three images in, a report or a job out.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::Response,
};
use dermflow_auth::audit::Who;
use dermflow_schemas::{
    envelope::Payload,
    error::{ApiError, Code},
    id::{ClientId, IdempotencyKey},
    job::Lane,
    limits::{MAX_BODY_BYTES, MIN_CANCEL_AFTER},
    model::ModelRef,
};
use prometheus::IntGauge;

use crate::{
    answer::{Problem, accepts_fhir, sends_fhir},
    app::{App, Place},
    extract::{Allowed, Body, Held, Submit},
    language, parameters,
    prefer::Prefer,
    routes::{
        openapi::{
            Any, Failed, GoesOn, Guarded, Negotiated, Own, Parameters, Reads, Reported, Typed, Wishes,
        },
        status::{accepted, finished},
    },
    submit::{Ended, Patience, Submission, blocking, submit, wait, with_status_url},
};

static IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
static CANCEL_AFTER: HeaderName = HeaderName::from_static("cancel-after");
static PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");

/// Analyses one to three images: a report, or with `Prefer: respond-async` where to poll.
#[utoipa::path(post, path = "/fhir/DiagnosticReport/$analyze", operation_id = "analyze", tag = "reports",
    params(Wishes),
    request_body(content((Parameters = "application/fhir+json"), (Parameters = "application/json"))),
    responses(Reported, GoesOn, Any, Guarded, Own, Reads, Typed, Negotiated, Failed))]
pub(crate) async fn post(
    State(app): State<Arc<App>>,
    Allowed { client, who, .. }: Allowed<Submit>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    let caller = Caller { client, who, headers, model: None };
    analysed(app, caller, body, parameters::parse, finished).await
}

/// Whose request it is, and how it wants it done.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) client: ClientId,
    pub(super) who: Who,
    pub(super) headers: HeaderMap,
    /// The model, when the body has no place for it.
    pub(super) model: Option<ModelRef>,
}

/// Takes a request in, waits for as long as its caller prefers, and answers: with what `finished` makes of the job's
/// end, or with where to poll.
pub(super) async fn analysed(
    app: Arc<App>,
    Caller { client, who, headers, model }: Caller,
    body: Body,
    parse: fn(&[u8]) -> Result<Payload, ApiError>,
    finished: fn(&App, Ended) -> Response,
) -> Result<Response, Problem> {
    if !sends_fhir(&headers) {
        return Err(ApiError::from(Code::MediaType).at("Content-Type").into());
    }
    let key = idempotency_key(&headers)?;
    let cancel_after = cancel_after(&headers)?;
    let prefer = Prefer::from_headers(&headers);
    let _turn = Turn::new(&app, client, prefer.lane())?;
    let Held { bytes, memory } = body.read(app.bounds.bodies.share(Some(client)), MAX_BODY_BYTES).await?;
    let mut payload = blocking(move || parse(&bytes)).await??;
    payload.manifest.language = language::accepted(&headers);
    payload.manifest.model = model.or(payload.manifest.model);
    let key = key.map(|key| key.as_str().to_owned());
    let (lane, member) = (prefer.lane(), None);
    let patience = Patience::none();
    let submission = Submission { client, who, lane, key, payload, cancel_after, member, patience, memory };
    let submitted = submit(app.clone(), submission).await?;
    let (job, budget) = (submitted.job, prefer.budget());
    // Who does not wait gets the same answer every time, however quick the workers are.
    let ended = if budget.is_zero() && !submitted.ended {
        None
    } else {
        wait(&app, submitted, client, budget).await.map_err(|p| with_status_url(p, &app, job))?
    };
    match ended {
        Some(ended) => {
            let mut response = finished(&app, ended);
            if let Some(wait) = prefer.wait {
                applied(&mut response, &format!("wait={}", wait.as_secs()));
            }
            Ok(response)
        }
        None if prefer.respond_async => {
            let mut response = accepted(&app, job);
            applied(&mut response, "respond-async");
            Ok(response)
        }
        None => Err(with_status_url(Code::WaitEnded.into(), &app, job)),
    }
}

/// A place among the callers who wait, or among those who do not, taken before anything is read, given back however the
/// call ends.
pub(super) struct Turn {
    gauge: IntGauge,
    _place: Place,
}

impl Turn {
    pub(super) fn new(app: &App, client: ClientId, lane: Lane) -> Result<Self, Problem> {
        let (places, gauge) = match lane {
            Lane::Interactive => (&app.bounds.waiters, &app.metrics.waiters),
            Lane::Bulk => (&app.bounds.submitters, &app.metrics.submitters),
        };
        let (place, gauge) = (places.take(client)?, gauge.clone());
        gauge.inc();
        Ok(Self { gauge, _place: place })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<IdempotencyKey>, ApiError> {
    let mut values = headers.get_all(&IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let invalid = || {
        ApiError::from(Code::HeaderInvalid).at("Idempotency-Key").detail("1 to 255 visible ASCII characters")
    };
    if values.next().is_some() {
        return Err(invalid());
    }
    let key = value.to_str().map_err(|_| invalid())?.parse().map_err(|_| invalid())?;
    Ok(Some(key))
}

/// `Cancel-After`: a number of seconds, or of minutes, hours or days with the letter `m`, `h` or `d`.
pub(crate) fn cancel_after(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(&CANCEL_AFTER) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h', 'd']) {
        Some(number) => (number, &text[number.len()..]),
        None => (text, "s"),
    };
    let unit = match unit {
        "d" => 86_400,
        "h" => 3_600,
        "m" => 60,
        _ => 1,
    };
    // A number of Rust may have a sign.
    let number = Some(number).filter(|number| !number.starts_with('+'));
    let seconds = number.and_then(|number| number.parse::<u32>().ok()).map(|number| u64::from(number) * unit);
    let after = seconds.map(Duration::from_secs).filter(|after| *after >= MIN_CANCEL_AFTER);
    after.map(Some).ok_or_else(|| {
        let rule = "at least 5 seconds, such as 90, 90s, 15m or 12h";
        ApiError::from(Code::HeaderInvalid).at("Cancel-After").detail(rule)
    })
}

fn applied(response: &mut Response, preference: &str) {
    if response.status() <= StatusCode::ACCEPTED
        && let Ok(value) = HeaderValue::from_str(preference)
    {
        response.headers_mut().insert(PREFERENCE_APPLIED.clone(), value);
        response.headers_mut().append(header::VARY, HeaderValue::from_static("Prefer"));
    }
}
