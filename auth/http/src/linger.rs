//! Early answers reach their caller.
//!
//! A request may be refused before its body was read. To close the connection then, with the body still
//! arriving, makes TCP reset it, and the caller sees a broken pipe in place of a 401 or a 413 (RFC 9112 §9.6).
//! So the rest of a body that nobody wanted is read and thrown away, within bounds, before the answer leaves.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use axum::{body::Body, extract::Request, middleware::Next, response::Response};
use bytes::Bytes;
use dermflow_schemas::limits::{LINGER_BYTES, LINGER_TIMEOUT};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::timeout;

/// What is left of a body when its handler lets go of it.
type Rest = Arc<Mutex<Option<Body>>>;

struct Returning {
    body: Option<Body>,
    rest: Rest,
}

impl HttpBody for Returning {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(context),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map(HttpBody::size_hint).unwrap_or_default()
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        *self.rest.lock().unwrap_or_else(PoisonError::into_inner) = self.body.take();
    }
}

/// Throws away what the handler left of the body: [`LINGER_BYTES`] and [`LINGER_TIMEOUT`] at most.
pub(crate) async fn linger(request: Request, next: Next) -> Response {
    let rest = Rest::default();
    let keep = rest.clone();
    let request = request.map(|body| Body::new(Returning { body: Some(body), rest: keep }));
    let response = next.run(request).await;
    let rest = rest.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(body) = rest.filter(|body| !body.is_end_stream()) {
        let _ = timeout(LINGER_TIMEOUT, discard(body)).await;
    }
    response
}

async fn discard(mut body: Body) {
    let mut bytes = 0;
    while let Some(Ok(frame)) = body.frame().await {
        bytes += frame.data_ref().map_or(0, Bytes::len);
        if bytes > LINGER_BYTES {
            return;
        }
    }
}
