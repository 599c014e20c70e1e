//! What the fuzz targets of `tests/fuzz` reach of the parsers, and nothing else.

use std::{io, sync::LazyLock, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, header},
};
use bytes::Bytes;
use dermflow_schemas::{envelope::Payload, error::ApiError};
use futures_util::{FutureExt, stream};
use tokio::runtime::{Builder, Runtime};

use crate::{
    answer,
    bodies::Bodies,
    json::Json,
    lines::{self, Form},
    ndjson::{Lines, Next},
    parameters,
    prefer::Prefer,
    routes,
};

/// Whether a body is JSON as we take it.
///
/// # Errors
/// As a caller gets them.
pub fn json(body: &[u8]) -> Result<(), ApiError> {
    Json::parse(body).map(drop)
}

/// The body of `$analyze`.
///
/// # Errors
/// As a caller gets them.
pub fn parameters(body: &[u8]) -> Result<Payload, ApiError> {
    parameters::parse(body)
}

/// A line of a batch, of FHIR or plain, with its name.
///
/// # Errors
/// As a caller gets them.
pub fn line(is_fhir: bool, line: &[u8]) -> (Option<String>, Result<Payload, ApiError>) {
    let line = lines::parse(if is_fhir { Form::Fhir } else { Form::Plain }, line);
    (line.custom_id, line.payload)
}

/// The lines of a body that comes in chunks, with their numbers, `None` for one that is longer than `limit`; `None` when
/// that does not fit into `kib` of memory, every line freed once it was read.
pub fn split(chunks: Vec<Vec<u8>>, limit: usize, kib: usize) -> Option<Vec<(usize, Option<Bytes>)>> {
    // The limits of time need a clock; nothing waits for it.
    static RUNTIME: LazyLock<io::Result<Runtime>> =
        LazyLock::new(|| Builder::new_current_thread().enable_time().build());
    let _context = RUNTIME.as_ref().ok()?.enter();
    let chunks = chunks.into_iter().map(|chunk| Ok::<_, io::Error>(Bytes::from(chunk)));
    let memory = Bodies::new(kib, kib);
    let mut lines = Lines::new(Body::from_stream(stream::iter(chunks)), memory.share(None), limit);
    let mut found = Vec::new();
    loop {
        // Everything is there: what waits, waits for memory that does not come.
        match lines.next().now_or_never()?.ok()? {
            Next::Line { number, bytes, memory: _ } => found.push((number, Some(bytes))),
            Next::TooLong { number } => found.push((number, None)),
            Next::End => break,
        }
    }
    drop(lines);
    assert_eq!(memory.held(), 0, "all memory is given back");
    Some(found)
}

/// Whether a caller prefers not to wait, and how long it wants to wait.
pub fn prefer(fields: &[&[u8]]) -> (bool, Option<Duration>) {
    let prefer = Prefer::from_headers(&headers(&HeaderName::from_static("prefer"), fields));
    (prefer.respond_async, prefer.wait)
}

/// Whether a caller takes FHIR.
pub fn accepts(fields: &[&[u8]]) -> bool {
    answer::accepts_fhir(&headers(&header::ACCEPT, fields))
}

/// The name and the password of a form.
pub fn form(body: &[u8]) -> Option<(String, String)> {
    let form = HeaderValue::from_static("application/x-www-form-urlencoded");
    let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, form)]);
    routes::login::form(headers, Bytes::copy_from_slice(body)).now_or_never()?
}

/// Those of the fields that may be one.
fn headers(name: &HeaderName, fields: &[&[u8]]) -> HeaderMap {
    let values = fields.iter().filter_map(|field| HeaderValue::from_bytes(field).ok());
    values.map(|value| (name.clone(), value)).collect()
}
