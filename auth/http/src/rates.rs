//! Counting what callers do against what they may, and what every answer says about it: `RateLimit-Policy` and
//! `RateLimit` (draft-ietf-httpapi-ratelimit-headers-10).
//!
//! The counting is in [`Meter`]; here are its clock, its headers, and the messages in which replicas tell each other.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    http::{HeaderName, HeaderValue},
    response::Response,
};
use dermflow_schemas::{
    clock,
    limits::{COUNT_LINES, IMAGE_WINDOW, REQUEST_WINDOW},
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::meter::{Kind, Left, Line, Meter, Policy, Subject};

static RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
static RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// The counts of a process.
#[derive(Debug)]
pub struct Rates {
    replica: Uuid,
    meter: Mutex<Meter>,
}

impl Default for Rates {
    fn default() -> Self {
        let replica = Uuid::new_v4();
        Self { replica, meter: Mutex::new(Meter::new(replica)) }
    }
}

/// What replicas tell each other.
#[derive(Debug, Serialize, Deserialize)]
struct Message {
    replica: Uuid,
    lines: Vec<Line>,
}

impl Rates {
    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts `amount` if the policy allows it.
    ///
    /// # Errors
    /// How long until it would be allowed, if nothing else came.
    pub fn take(&self, subject: Subject, kind: Kind, policy: Policy, amount: u64) -> Result<(), Duration> {
        self.meter().take(subject, kind, policy, amount, millis())
    }

    /// Says in an answer what its caller may do, and what is left of that of the kinds in `counted`.
    pub fn tell(
        &self,
        response: &mut Response,
        subject: Subject,
        policies: &[(Kind, Policy)],
        counted: &[Kind],
    ) {
        let (policies, left) = self.headers(subject, policies, counted);
        for (name, value) in [(&RATELIMIT_POLICY, policies), (&RATELIMIT, left)] {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(name.clone(), value);
            }
        }
    }

    fn headers(&self, subject: Subject, policies: &[(Kind, Policy)], counted: &[Kind]) -> (String, String) {
        let (meter, now) = (self.meter(), millis());
        let left = policies.iter().filter(|(kind, _)| counted.contains(kind)).map(|(kind, policy)| {
            let Left { amount, reset } = meter.left(subject, *kind, *policy, now);
            format!("\"{}\";r={amount};t={}", name(*kind), reset.as_millis().div_ceil(1_000))
        });
        let left = left.collect::<Vec<_>>().join(", ");
        let policies = policies.iter().map(|(kind, Policy { quota, window })| {
            // The unit is `requests` when none is named.
            let unit = if *kind == Kind::Images { ";qu=\"images\"" } else { "" };
            format!("\"{}\";q={quota};w={}{unit}", name(*kind), window.as_secs())
        });
        (policies.collect::<Vec<_>>().join(", "), left)
    }

    /// Ends a round of the exchange: the messages for the other replicas, one at least, which says that we are there.
    /// What nobody needs any more is forgotten.
    pub fn round(&self) -> Vec<Vec<u8>> {
        let lines = self.meter().round(millis());
        let mut chunks: Vec<&[Line]> = lines.chunks(COUNT_LINES).collect();
        if chunks.is_empty() {
            chunks.push(&[]);
        }
        let message = |lines: &[Line]| Message { replica: self.replica, lines: lines.to_vec() };
        chunks.into_iter().filter_map(|lines| serde_json::to_vec(&message(lines)).ok()).collect()
    }

    /// Takes in a message of a replica, ourselves included.
    pub fn hear(&self, payload: &[u8]) {
        // A newer build may say more than we understand.
        if let Ok(Message { replica, lines }) = serde_json::from_slice(payload) {
            self.meter().hear(replica, &lines, window, millis());
        }
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

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Requests => "requests",
        Kind::Polls => "polls",
        Kind::Images => "images",
    }
}

/// So many a minute, counted over the window of their kind.
pub fn policy(kind: Kind, a_minute: i64) -> Policy {
    let window = window(kind);
    Policy { quota: (a_minute.unsigned_abs() * window.as_secs() / 60).max(1), window }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> Subject {
        Subject::Client(Uuid::from_u128(7).into())
    }

    #[test]
    fn headers_are_structured_fields() {
        let rates = Rates::default();
        let policies =
            [(Kind::Requests, 120), (Kind::Images, 90)].map(|(kind, amount)| (kind, policy(kind, amount)));
        rates.take(client(), Kind::Requests, policies[0].1, 1).unwrap();
        let (said, left) = rates.headers(client(), &policies, &[Kind::Requests, Kind::Images]);
        assert_eq!(said, "\"requests\";q=20;w=10, \"images\";q=90;w=60;qu=\"images\"");
        let (requests, images) = left.split_once(", ").unwrap();
        assert!(requests.starts_with("\"requests\";r=19;t="), "{left}");
        assert!(images.starts_with("\"images\";r=90;t="), "{left}");
        let reset: u64 = requests.rsplit('=').next().unwrap().parse().unwrap();
        assert!((1..=11).contains(&reset), "{left}");
    }

    #[test]
    fn a_message_survives_the_way() {
        for subject in [client(), Subject::Network(u64::MAX)] {
            let line: Line = (subject, Kind::Images, crate::meter::Counts::default());
            let bytes = serde_json::to_vec(&Message { replica: Uuid::nil(), lines: vec![line] }).unwrap();
            let message: Message = serde_json::from_slice(&bytes).unwrap();
            assert_eq!(message.lines, [line]);
            assert!(bytes.len() < 180, "a line grew: {}", bytes.len());
        }
    }

    #[test]
    fn what_one_counted_another_hears() {
        let (one, other, kind) = (Rates::default(), Rates::default(), Kind::Requests);
        let policy = policy(kind, 60);
        one.take(client(), kind, policy, 10).unwrap();
        for message in other.round().into_iter().chain(one.round()) {
            other.hear(&message);
        }
        assert!(other.take(client(), kind, policy, 1).is_err());
        other.hear(b"{}");
    }
}
