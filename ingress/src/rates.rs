//! How often a client may call, on all replicas together, and a network whose callers do not show who they are.
//!
//! The counting and the headers are in [`Rates`]; here are the limits, and the exchange between the replicas over the
//! broker.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{Extensions, HeaderValue, Method, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_auth::users::Quota;
use dermflow_http::{
    meter::{Kind, Policy, Subject},
    rates::{self, Rates},
    serve::Peer,
};
use dermflow_schemas::{
    error::{ApiError, Code},
    id::ClientId,
    limits::{ANONYMOUS_REQUESTS_PER_MINUTE, COUNT_INTERVAL, POLL_INTERVAL, POLLS_PER_MINUTE},
    queue,
};
use futures_util::StreamExt;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    access::Gate,
    answer::Problem,
    app::App,
    routes::{is_login, is_open},
    submit::Patience,
};

/// What clients ask again and again until a job or a batch has ended; it has a rate of its own.
const POLLED: [&str; 3] = ["/fhir/_async/{id}", "/batches/{id}", "/fhir/_bulk/{id}"];

fn policy(kind: Kind, quota: Quota) -> Policy {
    let a_minute = match kind {
        Kind::Requests => quota.requests,
        Kind::Polls => POLLS_PER_MINUTE,
        Kind::Images => quota.images,
    };
    rates::policy(kind, a_minute)
}

/// Who a request turned out to come from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counted(Arc<OnceLock<ClientId>>);

fn kind(method: &Method, extensions: &Extensions) -> Kind {
    let path = extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str);
    if method == Method::GET && POLLED.contains(&path) { Kind::Polls } else { Kind::Requests }
}

/// Counts a request of a client that has shown who it is.
pub(crate) fn charge_request<G: Gate>(gate: &G, client: ClientId, parts: &Parts) -> Result<(), Problem> {
    charge(gate, client, parts.extensions.get(), kind(&parts.method, &parts.extensions))
}

/// The same for a request that says in its body who sends it.
pub(crate) fn charge_form<G: Gate>(gate: &G, client: ClientId, counted: &Counted) -> Result<(), Problem> {
    charge(gate, client, Some(counted), Kind::Requests)
}

fn charge<G: Gate>(gate: &G, client: ClientId, counted: Option<&Counted>, kind: Kind) -> Result<(), Problem> {
    if let Some(Counted(counted)) = counted {
        let _ = counted.set(client);
    }
    let code = if kind == Kind::Polls { Code::PollTooFast } else { Code::RateExceeded };
    let policy = policy(kind, gate.access().quota(client));
    let taken = gate.rates().take(Subject::Client(client), kind, policy, 1);
    taken.map_err(|wait| ApiError::from(code).after(wait).into())
}

/// Counts the images of a job; waits for as long as patience lasts when they are too many.
pub(crate) async fn images(
    app: &App,
    client: ClientId,
    images: usize,
    patience: &Patience,
) -> Result<(), Problem> {
    loop {
        let policy = policy(Kind::Images, app.access.quota(client));
        let taken = app.rates.take(Subject::Client(client), Kind::Images, policy, images as u64);
        let Err(wait) = taken else { return Ok(()) };
        if !patience.pause(wait.min(POLL_INTERVAL)).await {
            return Err(ApiError::from(Code::RateExceeded).detail("images").after(wait).into());
        }
    }
}

/// What callers may do of whom nobody knows who they are.
fn anonymous() -> Policy {
    rates::policy(Kind::Requests, ANONYMOUS_REQUESTS_PER_MINUTE)
}

fn network(request: &Request) -> Subject {
    let peer = request.extensions().get().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |Peer(peer)| *peer);
    Subject::network(peer)
}

/// Whether the caller may turn out to be somebody by its header: where no handler looks at that, it does not count.
fn may_prove_itself(request: &Request) -> bool {
    let path = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let header = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
    match path {
        "" => false,
        path if is_login(path) || is_open(path) => false,
        "/oauth/token" => header.is_some_and(|value| value.to_ascii_lowercase().starts_with(b"basic ")),
        _ => header.is_some(),
    }
}

/// Counts a request for the network that it comes from, unless it shows who sends it: before anybody looks at it, or when
/// what it shows turns out to be nothing. What the server fails at is not counted, as nobody knows who asked.
pub(crate) async fn count<G: Gate>(State(gate): State<Arc<G>>, request: Request, next: Next) -> Response {
    let (network, counted) = (network(&request), request.extensions().get::<Counted>().cloned());
    let take = || gate.rates().take(network, Kind::Requests, anonymous(), 1).map_err(too_many);
    if !may_prove_itself(&request) {
        return match take() {
            Ok(()) => next.run(request).await,
            Err(problem) => problem.into_response(),
        };
    }
    let response = next.run(request).await;
    let is_known = counted.is_some_and(|Counted(client)| client.get().is_some());
    if is_known || !response.status().is_client_error() {
        return response;
    }
    match take() {
        Ok(()) => response,
        Err(problem) => problem.into_response(),
    }
}

/// Tells every caller how it stands: a client, or else its network.
pub(crate) async fn tell<G: Gate>(State(gate): State<Arc<G>>, mut request: Request, next: Next) -> Response {
    let (counted, kind) = (Counted::default(), kind(request.method(), request.extensions()));
    let network = network(&request);
    request.extensions_mut().insert(counted.clone());
    let mut response = next.run(request).await;
    if let Some(client) = counted.0.get() {
        let quota = gate.access().quota(*client);
        let policies = [Kind::Requests, Kind::Polls, Kind::Images].map(|kind| (kind, policy(kind, quota)));
        gate.rates().tell(&mut response, Subject::Client(*client), &policies, &[kind, Kind::Images]);
    } else {
        let policies = [(Kind::Requests, anonymous())];
        gate.rates().tell(&mut response, network, &policies, &[Kind::Requests]);
    }
    response
}

fn too_many(wait: Duration) -> Problem {
    ApiError::from(Code::RateExceeded).after(wait).into()
}

/// Tells the other replicas what this one has counted, and hears what they have, until `stop`.
pub(crate) async fn exchange<G: Gate>(gate: Arc<G>, nats: async_nats::Client, stop: CancellationToken) {
    let mut tick = interval(COUNT_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let subscribe = timeout(COUNT_INTERVAL, nats.subscribe(queue::COUNTS));
        let mut messages = tokio::select! {
            () = stop.cancelled() => return,
            Ok(Ok(messages)) = subscribe => messages,
            else => { tick.tick().await; continue }
        };
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => publish(gate.rates(), &nats).await,
                message = messages.next() => match message {
                    Some(message) => gate.rates().hear(&message.payload),
                    None => break,
                },
            }
        }
    }
}

/// What cannot be sent at once is not sent: the next message says it too.
async fn publish(rates: &Rates, nats: &async_nats::Client) {
    let send = async {
        for message in rates.round() {
            if let Err(error) = nats.publish(queue::COUNTS, message.into()).await {
                tracing::debug!(%error, "counts not sent");
            }
        }
    };
    let _ = timeout(COUNT_INTERVAL, send).await;
}
