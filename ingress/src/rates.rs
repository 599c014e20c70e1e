//! How often a client may call, on all replicas together, and what every answer says about it.
//!
//! The counting is in [`Meter`]; here are the limits, the headers `RateLimit-Policy` and `RateLimit`
//! (draft-ietf-httpapi-ratelimit-headers-10), and the exchange between the replicas over the broker.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{Extensions, HeaderName, HeaderValue, Method, request::Parts},
    middleware::Next,
    response::Response,
};
use dermflow_auth::users::Quota;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    id::ClientId,
    limits::{
        COUNT_INTERVAL, COUNTED_CLIENTS, IMAGE_WINDOW, POLL_INTERVAL, POLLS_PER_MINUTE, REQUEST_WINDOW,
    },
    queue,
};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    access::Gate,
    answer::Problem,
    app::App,
    meter::{Kind, Left, Line, Meter, Policy},
};

static RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
static RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// What clients ask again and again until a job or a batch has ended; it has a rate of its own.
const POLLED: [&str; 3] = ["/fhir/_async/{id}", "/batches/{id}", "/fhir/_bulk/{id}"];

/// The rates of all clients.
#[derive(Debug)]
pub(crate) struct Rates {
    replica: Uuid,
    meter: Mutex<Meter>,
}

impl Default for Rates {
    fn default() -> Self {
        let replica = Uuid::new_v4();
        Self { replica, meter: Mutex::new(Meter::new(replica)) }
    }
}

impl Rates {
    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, client: ClientId, kind: Kind, quota: Quota, amount: u64) -> Result<(), Duration> {
        self.meter().take(client, kind, policy(kind, quota), amount, millis())
    }
}

/// The shared clock, in milliseconds.
fn millis() -> u64 {
    (clock::now().unix_timestamp_nanos() / 1_000_000) as u64
}

fn window(kind: Kind) -> Duration {
    match kind {
        Kind::Requests | Kind::Polls => REQUEST_WINDOW,
        Kind::Images => IMAGE_WINDOW,
    }
}

fn policy(kind: Kind, quota: Quota) -> Policy {
    let a_minute = match kind {
        Kind::Requests => quota.requests,
        Kind::Polls => POLLS_PER_MINUTE,
        Kind::Images => quota.images,
    };
    let window = window(kind);
    Policy { quota: (a_minute.unsigned_abs() * window.as_secs() / 60).max(1), window }
}

/// Who a request turned out to come from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counted(Arc<OnceLock<ClientId>>);

fn kind(method: &Method, extensions: &Extensions) -> Kind {
    let path = extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
    if method == Method::GET && POLLED.contains(&path) { Kind::Polls } else { Kind::Requests }
}

/// Counts a request of a client that has shown who it is.
pub(crate) fn count<G: Gate>(gate: &G, client: ClientId, parts: &Parts) -> Result<(), Problem> {
    charge(gate, client, parts.extensions.get(), kind(&parts.method, &parts.extensions))
}

/// The same for a request that says in its body who sends it.
pub(crate) fn count_form<G: Gate>(gate: &G, client: ClientId, counted: &Counted) -> Result<(), Problem> {
    charge(gate, client, Some(counted), Kind::Requests)
}

fn charge<G: Gate>(gate: &G, client: ClientId, counted: Option<&Counted>, kind: Kind) -> Result<(), Problem> {
    if let Some(Counted(counted)) = counted {
        let _ = counted.set(client);
    }
    let code = if kind == Kind::Polls { Code::PollTooFast } else { Code::RateExceeded };
    let taken = gate.rates().take(client, kind, gate.access().quota(client), 1);
    taken.map_err(|wait| ApiError::from(code).after(wait).into())
}

/// Counts the images of a job; waits for as long as patience lasts when they are too many.
pub(crate) async fn images(
    app: &App,
    client: ClientId,
    images: usize,
    patience: Duration,
) -> Result<(), Problem> {
    let end = Instant::now() + patience;
    loop {
        let taken = app.rates.take(client, Kind::Images, app.access.quota(client), images as u64);
        let Err(wait) = taken else { return Ok(()) };
        let pause = wait.min(POLL_INTERVAL).min(end.saturating_duration_since(Instant::now()));
        if pause.is_zero() || app.draining.is_cancelled() {
            return Err(ApiError::from(Code::RateExceeded).detail("images").after(wait).into());
        }
        sleep(pause).await;
    }
}

/// Tells every client that has shown who it is how it stands.
pub(crate) async fn tell<G: Gate>(State(gate): State<Arc<G>>, mut request: Request, next: Next) -> Response {
    let (counted, kind) = (Counted::default(), kind(request.method(), request.extensions()));
    request.extensions_mut().insert(counted.clone());
    let mut response = next.run(request).await;
    let Some(client) = counted.0.get() else { return response };
    let (policies, left) = headers(gate.rates(), *client, gate.access().quota(*client), kind);
    for (name, value) in [(&RATELIMIT_POLICY, policies), (&RATELIMIT, left)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name.clone(), value);
        }
    }
    response
}

/// `RateLimit-Policy` with every policy, and `RateLimit` with those that the request counts for.
fn headers(rates: &Rates, client: ClientId, quota: Quota, kind: Kind) -> (String, String) {
    let policies = [Kind::Requests, Kind::Polls, Kind::Images].map(|kind| {
        let Policy { quota, window } = policy(kind, quota);
        // The unit is `requests` when none is named.
        let unit = if kind == Kind::Images { ";qu=\"images\"" } else { "" };
        format!("\"{}\";q={quota};w={}{unit}", name(kind), window.as_secs())
    });
    let (meter, now) = (rates.meter(), millis());
    let left = [kind, Kind::Images].map(|kind| {
        let Left { amount, reset } = meter.left(client, kind, policy(kind, quota), now);
        format!("\"{}\";r={amount};t={}", name(kind), reset.as_millis().div_ceil(1_000))
    });
    (policies.join(", "), left.join(", "))
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Requests => "requests",
        Kind::Polls => "polls",
        Kind::Images => "images",
    }
}

/// What replicas tell each other.
#[derive(Debug, Serialize, Deserialize)]
struct Message {
    replica: Uuid,
    lines: Vec<Line>,
}

/// Tells the other replicas what this one has counted, and hears what they have, until `stop`.
pub(crate) async fn exchange(app: Arc<App>, stop: CancellationToken) {
    let mut tick = interval(COUNT_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let subscribe = timeout(COUNT_INTERVAL, app.nats.subscribe(queue::COUNTS));
        let mut messages = tokio::select! {
            () = stop.cancelled() => return,
            Ok(Ok(messages)) = subscribe => messages,
            else => { tick.tick().await; continue }
        };
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => publish(&app).await,
                message = messages.next() => match message {
                    Some(message) => hear(&app.rates, &message.payload),
                    None => break,
                },
            }
        }
    }
}

/// What cannot be sent at once is not sent: the next message says it too.
async fn publish(app: &App) {
    let lines = app.rates.meter().round(millis());
    // The first one goes out even when it says nothing but that we are there.
    let mut chunks: Vec<Vec<Line>> = lines.chunks(COUNTED_CLIENTS).map(<[Line]>::to_vec).collect();
    if chunks.is_empty() {
        chunks.push(Vec::new());
    }
    let send = async {
        for lines in chunks {
            let message = Message { replica: app.rates.replica, lines };
            let Ok(bytes) = serde_json::to_vec(&message) else { return };
            if let Err(error) = app.nats.publish(queue::COUNTS, bytes.into()).await {
                tracing::debug!(%error, "counts not sent");
            }
        }
    };
    let _ = timeout(COUNT_INTERVAL, send).await;
}

fn hear(rates: &Rates, payload: &[u8]) {
    // A newer build may say more than we understand.
    if let Ok(Message { replica, lines }) = serde_json::from_slice(payload) {
        rates.meter().hear(replica, &lines, window, millis());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_structured_fields() {
        let (rates, client) = (Rates::default(), ClientId::from(Uuid::from_u128(7)));
        let quota = Quota { requests: 120, images: 90, ..Quota::default() };
        rates.take(client, Kind::Requests, quota, 1).unwrap();
        let (policies, left) = headers(&rates, client, quota, Kind::Requests);
        let polls = POLLS_PER_MINUTE / 6;
        let expected =
            format!("\"requests\";q=20;w=10, \"polls\";q={polls};w=10, \"images\";q=90;w=60;qu=\"images\"");
        assert_eq!(policies, expected);
        let (requests, images) = left.split_once(", ").unwrap();
        assert!(requests.starts_with("\"requests\";r=19;t="), "{left}");
        assert!(images.starts_with("\"images\";r=90;t="), "{left}");
        let reset: u64 = requests.rsplit('=').next().unwrap().parse().unwrap();
        assert!((1..=11).contains(&reset), "{left}");
    }

    #[test]
    fn a_message_survives_the_way() {
        let line: Line = (ClientId::from(Uuid::from_u128(7)), Kind::Images, crate::meter::Counts::default());
        let bytes = serde_json::to_vec(&Message { replica: Uuid::nil(), lines: vec![line] }).unwrap();
        let message: Message = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(message.lines, [line]);
        assert!(bytes.len() < 180, "a line grew: {}", bytes.len());
    }
}
