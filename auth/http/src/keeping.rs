//! Answers that keep something for as long as they are in memory, which over HTTP/2 is until their peer takes them.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// Lets `kept` go when the last byte of the answer has been sent, or will not be.
pub fn keeping<T: Send + Sync + 'static>(answer: Response, kept: T) -> Response {
    answer.map(|body| Body::new(Keeping { body, kept: Arc::new(kept) }))
}

struct Keeping<T> {
    body: Body,
    kept: Arc<T>,
}

struct Kept<T> {
    bytes: Bytes,
    _kept: Arc<T>,
}

impl<T> AsRef<[u8]> for Kept<T> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl<T: Send + Sync + 'static> HttpBody for Keeping<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        // Hyper lets go of a body before it has sent all that it had of it.
        let frame = Pin::new(&mut self.body).poll_frame(context);
        let keep = |bytes| Bytes::from_owner(Kept { bytes, _kept: self.kept.clone() });
        frame.map_ok(|frame| frame.map_data(keep))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn what_an_answer_keeps_goes_with_its_bytes() {
        let kept = Arc::new(());
        let held = || Arc::strong_count(&kept) > 1;
        let mut answer = keeping("a report".into_response(), kept.clone()).into_body();
        assert_eq!(answer.size_hint().exact(), Some(8));
        let bytes = answer.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(answer.is_end_stream());
        drop(answer);
        assert!(held(), "the bytes are still there");
        let part = bytes.slice(6..);
        drop(bytes);
        assert!(held() && part == "rt");
        drop(part);
        assert!(!held());
    }
}
