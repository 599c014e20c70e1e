//! What every router of ours is dressed in, whatever its routes.

use std::any::Any;

use axum::{
    Router,
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, header},
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
};
use dermflow_schemas::error::Code;
use tower_http::{catch_panic::CatchPanicLayer, set_header::SetResponseHeaderLayer};
use uuid::Uuid;

use crate::{
    answer::{Problem, render},
    linger::linger,
};

/// The header with a request's id, in requests and answers.
pub static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// With an answer for what is not in the table.
pub fn bounded<S: Clone + Send + Sync + 'static>(routes: Router<S>) -> Router<S> {
    routes
        .fallback(async || Problem::from(Code::NotFound))
        .method_not_allowed_fallback(async || Problem::from(Code::MethodNotAllowed))
}

/// Answers every request with 503.
pub(crate) fn overloaded() -> Router {
    dressed(Router::new().fallback(async || Problem::from(Code::Overloaded)), ())
}

/// What every answer has: an id, the form of its errors, the headers that browsers and caches go by.
pub fn dressed<S: Clone + Send + Sync + 'static>(routes: Router<S>, state: S) -> Router {
    let header = |name, value| SetResponseHeaderLayer::overriding(name, HeaderValue::from_static(value));
    routes
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(render))
        .layer(from_fn(linger))
        .layer(from_fn(request_id))
        .layer(header(header::STRICT_TRANSPORT_SECURITY, "max-age=63072000"))
        .layer(header(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .layer(SetResponseHeaderLayer::if_not_present(
            header::CACHE_CONTROL,
            HeaderValue::from_static("no-store"),
        ))
        .with_state(state)
}

fn panicked(_: Box<dyn Any + Send>) -> Response {
    // The panic hook has logged place and message; the payload may quote a request.
    Problem::from(Code::Internal).into_response()
}

/// Gives every request an id, the caller's own if it is fit to be logged, and puts it in the answer.
async fn request_id(mut request: Request, next: Next) -> Response {
    let id = callers_id(request.headers()).unwrap_or_else(new_id);
    request.headers_mut().insert(REQUEST_ID.clone(), id.clone());
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default());
    let mut response = tracing::Instrument::instrument(next.run(request), span).await;
    response.headers_mut().insert(REQUEST_ID.clone(), id);
    response
}

fn callers_id(headers: &HeaderMap) -> Option<HeaderValue> {
    let id = headers.get(&REQUEST_ID)?;
    let plain = |b: &u8| b.is_ascii_alphanumeric() || b"._-".contains(b);
    (id.len() <= 64 && !id.is_empty() && id.as_bytes().iter().all(plain)).then(|| id.clone())
}

fn new_id() -> HeaderValue {
    HeaderValue::from_str(&Uuid::new_v4().to_string()).unwrap_or_else(|_| HeaderValue::from_static("-"))
}
