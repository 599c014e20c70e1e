//! Identifiers: parsed once at the edge, then carried as types.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::{NoContext, Timestamp, Uuid};

/// What is wrong with an identifier that came from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not a UUID in its hyphenated lower-case form (RFC 9562 §4).
    #[error("not a UUID")]
    NotUuid,
    /// Not 1 to 255 visible ASCII characters.
    #[error("not 1 to 255 visible ASCII characters")]
    NotKey,
}

/// A job's id and its report's id: a UUIDv7 (RFC 9562 §5.7), so ids sort by time of acceptance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(Uuid);

impl JobId {
    /// A new id for a job accepted at `now`.
    pub fn new(now: OffsetDateTime) -> Self {
        let seconds = u64::try_from(now.unix_timestamp()).unwrap_or(0);
        Self(Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, now.nanosecond())))
    }

    /// The bare UUID, as the database stores it.
    pub fn uuid(self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for JobId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for JobId {
    type Err = IdError;

    /// Accepts exactly the form that [`fmt::Display`] writes: one job has one spelling.
    fn from_str(text: &str) -> Result<Self, IdError> {
        canonical_uuid(text).map(Self)
    }
}

/// A registered client's id: opaque to every process but `auth`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClientId(Uuid);

impl ClientId {
    /// The bare UUID, as the database stores it.
    pub fn uuid(self) -> Uuid {
        self.0
    }

    /// The queue partition of this client, below [`crate::queue::PARTITIONS`].
    pub fn partition(self) -> u8 {
        self.0.as_bytes()[15] % crate::queue::PARTITIONS
    }
}

impl From<Uuid> for ClientId {
    fn from(id: Uuid) -> Self {
        Self(id)
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl FromStr for ClientId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        canonical_uuid(text).map(Self)
    }
}

fn canonical_uuid(text: &str) -> Result<Uuid, IdError> {
    let id = Uuid::from_str(text).map_err(|_| IdError::NotUuid)?;
    let mut buffer = Uuid::encode_buffer();
    if *id.hyphenated().encode_lower(&mut buffer) == *text { Ok(id) } else { Err(IdError::NotUuid) }
}

/// The value of an `Idempotency-Key` header (draft-ietf-httpapi-idempotency-key-header-07): 1 to 255 visible
/// ASCII characters. The draft wants a quoted string; a bare token, as most clients send, is taken as well.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// The key without quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for IdempotencyKey {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let key = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text);
        let visible = |b: u8| b.is_ascii_graphic() && b != b'"';
        if (1..=255).contains(&key.len()) && key.bytes().all(visible) {
            Ok(Self(key.to_owned()))
        } else {
            Err(IdError::NotKey)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_id_sorts_by_time_and_has_one_spelling() {
        let early = JobId::new(OffsetDateTime::UNIX_EPOCH);
        let late = JobId::new(crate::clock::now());
        assert!(early < late);
        let text = late.to_string();
        assert_eq!(text.parse(), Ok(late));
        assert_eq!(text.to_uppercase().parse::<JobId>(), Err(IdError::NotUuid));
        assert_eq!(text.replace('-', "").parse::<JobId>(), Err(IdError::NotUuid));
    }

    #[test]
    fn an_idempotency_key_is_visible_ascii_quoted_or_not() {
        assert_eq!("\"abc\"".parse::<IdempotencyKey>().unwrap().as_str(), "abc");
        assert_eq!("abc".parse::<IdempotencyKey>().unwrap().as_str(), "abc");
        for bad in ["", "\"\"", "a b", "a\"b", "ü", &"x".repeat(256)] {
            assert_eq!(bad.parse::<IdempotencyKey>(), Err(IdError::NotKey), "{bad}");
        }
    }
}
