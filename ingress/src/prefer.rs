//! The `Prefer` header (RFC 7240): whether, and how long, a caller wants to wait.

use std::time::Duration;

use axum::http::{HeaderMap, header::HeaderName};
use dermflow_schemas::{
    job::Lane,
    limits::{DEFAULT_WAIT, MAX_WAIT},
};

use crate::list;

static PREFER: HeaderName = HeaderName::from_static("prefer");

/// What the caller prefers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prefer {
    /// Answer 202 rather than 504 when the wait ends.
    pub(crate) respond_async: bool,
    /// The wait that the caller named, at most [`MAX_WAIT`].
    pub(crate) wait: Option<Duration>,
}

impl Prefer {
    /// Reads every `Prefer` header. As RFC 7240 §2 wants, what is unknown or malformed is ignored, and the
    /// first of repeated preferences counts.
    pub(crate) fn from_headers(headers: &HeaderMap) -> Self {
        let mut prefer = Self { respond_async: false, wait: None };
        for preference in
            headers.get_all(&PREFER).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| list::split(v, ','))
        {
            let token = list::split(preference, ';').next().unwrap_or_default();
            let (name, value) = token.split_once('=').unwrap_or((token, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "respond-async" => prefer.respond_async = true,
                "wait" if prefer.wait.is_none() => prefer.wait = seconds(value.trim()),
                _ => {}
            }
        }
        prefer
    }

    /// How long to hold the connection for a result.
    pub(crate) fn budget(self) -> Duration {
        match (self.wait, self.respond_async) {
            (Some(wait), _) => wait,
            (None, true) => Duration::ZERO,
            (None, false) => DEFAULT_WAIT,
        }
    }

    /// Where the job waits: behind nobody's bulk when somebody holds the line.
    pub(crate) fn lane(self) -> Lane {
        if self.budget().is_zero() { Lane::Bulk } else { Lane::Interactive }
    }
}

/// Whether search parameters that are not known are to be passed over (FHIR R4, Search, Handling Errors).
pub(crate) fn is_lenient(headers: &HeaderMap) -> bool {
    let preferences = headers.get_all(&PREFER).iter().filter_map(|value| value.to_str().ok());
    let handling = preferences.flat_map(|value| list::split(value, ',')).find_map(|preference| {
        let (name, value) = list::split(preference, ';').next()?.split_once('=')?;
        let is_it = name.trim().eq_ignore_ascii_case("handling");
        is_it.then(|| value.trim().trim_matches('"').to_ascii_lowercase())
    });
    handling.as_deref() == Some("lenient")
}

/// A number of seconds, at most [`MAX_WAIT`], however large it is.
fn seconds(value: &str) -> Option<Duration> {
    let digits = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value);
    let number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    number.then(|| digits.parse().map_or(MAX_WAIT, |seconds| Duration::from_secs(seconds).min(MAX_WAIT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefer(values: &[&'static str]) -> (bool, Option<u64>) {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(&PREFER, value.parse().unwrap());
        }
        let prefer = Prefer::from_headers(&headers);
        (prefer.respond_async, prefer.wait.map(|wait| wait.as_secs()))
    }

    #[test]
    fn preferences_are_read_wherever_they_stand() {
        assert_eq!(prefer(&[]), (false, None));
        assert_eq!(prefer(&["respond-async"]), (true, None));
        assert_eq!(prefer(&["respond-async, wait=10"]), (true, Some(10)));
        assert_eq!(prefer(&["Wait = 10 ; x=1", "respond-async"]), (true, Some(10)));
        assert_eq!(prefer(&["wait=5, wait=9"]), (false, Some(5)));
        assert_eq!(prefer(&["wait=600"]), (false, Some(60)));
        assert_eq!(prefer(&["wait=99999999999999999999"]), (false, Some(60)));
        assert_eq!(prefer(&["wait=\"10\""]), (false, Some(10)));
        assert_eq!(prefer(&["wait=-1, return=minimal"]), (false, None));
        assert_eq!(prefer(&["wait=+1", "wait=\"1", "wait="]), (false, None));
        assert_eq!(prefer(&["x=\"respond-async, wait=5\""]), (false, None));
    }

    #[test]
    fn strictness_is_what_is_said_first() {
        let lenient = |value: &'static str| {
            is_lenient(&HeaderMap::from_iter([(PREFER.clone(), value.parse().unwrap())]))
        };
        assert!(lenient("handling=lenient") && lenient("wait=5, Handling=\"lenient\""));
        assert!(
            !lenient("handling=strict, handling=lenient")
                && !lenient("lenient")
                && !is_lenient(&HeaderMap::new())
        );
    }

    #[test]
    fn a_caller_who_waits_is_interactive() {
        let lane = |respond_async, wait| Prefer { respond_async, wait }.lane();
        assert_eq!(lane(false, None), Lane::Interactive);
        assert_eq!(lane(true, Some(Duration::from_secs(1))), Lane::Interactive);
        assert_eq!(lane(true, None), Lane::Bulk);
    }
}
