//! How often staff may call.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use dermflow_http::{
    answer::Problem,
    meter::{Kind, Subject},
    rates,
    serve::Peer,
};
use dermflow_schemas::{
    error::{ApiError, Code},
    limits::STAFF_REQUESTS_PER_MINUTE,
};

use super::Service;

/// Counts every request for the network that it comes from, and tells the caller how it stands.
pub(super) async fn tell(State(service): State<Arc<Service>>, request: Request, next: Next) -> Response {
    let peer = request.extensions().get().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |Peer(peer)| *peer);
    let (network, kind) = (Subject::network(peer), Kind::Requests);
    let policy = rates::policy(kind, STAFF_REQUESTS_PER_MINUTE);
    let mut response = match service.rates.take(network, kind, policy, 1) {
        Ok(()) => next.run(request).await,
        Err(wait) => Problem::from(ApiError::from(Code::RateExceeded).after(wait)).into_response(),
    };
    service.rates.tell(&mut response, network, &[(kind, policy)], &[kind]);
    response
}
