//! A time-out on answers over HTTP/2: one of which its peer takes nothing is given up, and its memory with it.
//!
//! A peer says how much it will take, and may say nothing at all (RFC 9113 §5.2). No write waits then which could take too
//! long, and hyper, which asks a body for its next part only when the peer wants it, waits for as long as the connection
//! is open. So each stream is watched here. Its end is a `RST_STREAM`: the others of its connection go on, which may be
//! those of other callers of a balancer.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

use axum::body::Body;
use bytes::{Buf, Bytes};
use dermflow_schemas::limits::WRITE_TIMEOUT;
use hyper::{
    Response,
    body::{Body as HttpBody, Frame, SizeHint},
    rt::Executor,
};
use tokio::{
    task_local,
    time::{Instant, sleep},
};

task_local! {
    /// What is sent on the stream that the task serves.
    static SENT: Arc<Sent>;
}

/// Runs each stream of a connection in a task of its own, until its peer has taken nothing of the answer for
/// [`WRITE_TIMEOUT`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Streams;

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let sent = Arc::new(Sent::default());
        tokio::spawn(SENT.scope(sent.clone(), serve(stream, sent)));
    }
}

async fn serve(stream: impl Future<Output = ()>, sent: Arc<Sent>) {
    let (mut stream, mut patience) = (pin!(stream), pin!(sleep(WRITE_TIMEOUT)));
    poll_fn(|context| {
        if stream.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        // Parts of the answer are asked for in this task only: until it is polled again there are none but these.
        while let Some(since) = sent.waits_since() {
            patience.as_mut().reset(since + WRITE_TIMEOUT);
            ready!(patience.as_mut().poll(context));
            if sent.waits_since() == Some(since) {
                tracing::info!("an answer is given up as its peer takes nothing of it");
                return Poll::Ready(());
            }
        }
        Poll::Pending
    })
    .await;
}

/// What has been handed to HTTP/2 of an answer.
#[derive(Debug, Default)]
struct Sent(Mutex<Progress>);

#[derive(Debug, Default)]
struct Progress {
    /// Parts of the answer of which the peer has not taken all.
    parts: usize,
    /// When it took something the last time, or when there was something to take.
    since: Option<Instant>,
    /// Who waits for its taking everything.
    waiting: Option<Waker>,
}

impl Sent {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since when something waits to be taken, if anything does.
    fn waits_since(&self) -> Option<Instant> {
        let progress = self.progress();
        progress.since.filter(|_| progress.parts > 0)
    }
}

/// The answer, watched if it is one of a stream.
pub(crate) fn watched(answer: Response<Body>) -> Response<Answer> {
    let sent = SENT.try_with(Arc::clone).ok();
    answer.map(|body| Answer { body, sent, is_at_end: false })
}

/// The body of an answer.
pub(crate) struct Answer {
    body: Body,
    sent: Option<Arc<Sent>>,
    /// The body has nothing more.
    is_at_end: bool,
}

impl HttpBody for Answer {
    type Data = Part;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Part>, axum::Error>>> {
        if !self.is_at_end {
            let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
            if let Some(frame) = frame {
                let sent = self.sent.clone();
                return Poll::Ready(Some(frame.map(|frame| frame.map_data(|bytes| Part::new(bytes, sent)))));
            }
            self.is_at_end = true;
        }
        // A stream whose end has been handed over can be given up with its connection only.
        if let Some(sent) = &self.sent {
            let mut progress = sent.progress();
            if progress.parts > 0 {
                progress.waiting = Some(context.waker().clone());
                return Poll::Pending;
            }
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream() && self.sent.as_ref().is_none_or(|sent| sent.progress().parts == 0)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A part of an answer, until the peer has taken it or nobody sends it any more.
pub(crate) struct Part {
    bytes: Bytes,
    sent: Option<Arc<Sent>>,
}

impl Part {
    fn new(bytes: Bytes, sent: Option<Arc<Sent>>) -> Self {
        if let Some(sent) = &sent {
            let mut progress = sent.progress();
            progress.parts += 1;
            if progress.parts == 1 {
                progress.since = Some(Instant::now());
            }
        }
        Self { bytes, sent }
    }
}

impl Buf for Part {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(sent) = self.sent.as_ref().filter(|_| count > 0) {
            sent.progress().since = Some(Instant::now());
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let Some(sent) = &self.sent else { return };
        let mut progress = sent.progress();
        progress.parts -= 1;
        if progress.parts == 0
            && let Some(waiting) = progress.waiting.take()
        {
            waiting.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use hyper::{Request, body::Incoming, server::conn::http2, service::service_fn};
    use hyper_util::rt::{TokioIo, TokioTimer};
    use tokio::{io::duplex, time::timeout};

    use super::*;
    use crate::keeping::keeping;

    const LARGE: usize = 1024 * 1024;

    /// A connection whose peer opens windows of `window` bytes, and where every answer is large, and keeps `kept`.
    async fn connect(window: u32, kept: Arc<()>) -> h2::client::SendRequest<Bytes> {
        let (ours, theirs) = duplex(64 * 1024);
        let service = service_fn(move |request: Request<Incoming>| {
            let kept = kept.clone();
            async move {
                let size = if request.uri().path() == "/large" { LARGE } else { 2 };
                Ok::<_, Infallible>(watched(keeping(Response::new(vec![b'x'; size].into()), kept)))
            }
        });
        let mut builder = http2::Builder::new(Streams);
        builder.timer(TokioTimer::new());
        tokio::spawn(builder.serve_connection(TokioIo::new(theirs), service));
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(window).initial_connection_window_size(LARGE as u32);
        let (requests, connection) = builder.handshake(ours).await.unwrap();
        tokio::spawn(connection);
        requests.ready().await.unwrap()
    }

    async fn get(requests: &mut h2::client::SendRequest<Bytes>, path: &str) -> h2::RecvStream {
        let request = Request::get(format!("https://localhost{path}")).body(()).unwrap();
        requests.send_request(request, true).unwrap().0.await.unwrap().into_body()
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_not_taken_is_given_up_and_the_others_are_not() {
        for window in [0, 1, 100_000] {
            let kept = Arc::new(());
            let mut requests = connect(window, kept.clone()).await;
            let begun = Instant::now();
            let mut answer = get(&mut requests, "/large").await;
            assert!(Arc::strong_count(&kept) > 2, "it is in memory");
            // What the window has room for comes, and then nothing more.
            let error = loop {
                match timeout(WRITE_TIMEOUT * 2, answer.data()).await.expect("it is kept").unwrap() {
                    Ok(_) => {}
                    Err(error) => break error,
                }
            };
            assert_eq!(error.reason(), Some(h2::Reason::CANCEL), "with a window of {window}");
            assert!(begun.elapsed() >= WRITE_TIMEOUT && begun.elapsed() < WRITE_TIMEOUT * 2);
            assert_eq!(Arc::strong_count(&kept), 2, "its memory is given back");
            drop(answer);
            let mut requests = requests.ready().await.unwrap();
            if window > 1 {
                let mut answer = get(&mut requests, "/small").await;
                assert_eq!(answer.data().await.unwrap().unwrap(), "xx");
                // Its end comes by itself.
                assert!(answer.data().await.is_none_or(|end| end.unwrap().is_empty()));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_taken_bit_by_bit_arrives() {
        let mut requests = connect(LARGE as u32 / 8, Arc::new(())).await;
        let mut answer = get(&mut requests, "/large").await;
        let begun = Instant::now();
        let (mut taken, mut released) = (0, 0);
        while let Some(part) = answer.data().await {
            taken += part.unwrap().len();
            if taken - released == LARGE / 8 {
                sleep(WRITE_TIMEOUT * 9 / 10).await;
                answer.flow_control().release_capacity(taken - released).unwrap();
                released = taken;
            }
        }
        assert_eq!(taken, LARGE);
        assert!(begun.elapsed() > WRITE_TIMEOUT * 4, "{:?}", begun.elapsed());
    }
}
