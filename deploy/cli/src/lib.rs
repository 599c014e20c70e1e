//! The `dermflow` command as a library: a client of the HTTP API and nothing else.
//!
//! It owns the journal and the result file of a submission, and the pace at which a client may repeat itself.
//! It must not know ingress, auth, workers, the queue or the database.
//!
//! Invariants of a submission:
//! - the key of the batch is on disk before the first byte is uploaded, so that a repeated command finds it;
//! - the result file holds at most one line a file, whole but for the last one, which a repeated command mends;
//! - memory grows with the number of names, never with the number or the size of images.

pub mod access;
pub mod dead;
pub mod inputs;
pub mod jobs;
pub mod progress;
pub mod submit;

mod follow;
mod journal;
mod ledger;
mod line;
mod ndjson;
mod pace;
mod table;
mod upload;
mod work;

/// Why a command ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The command cannot be carried out as it was given; nothing was sent.
    #[error("{0}")]
    Usage(String),
    /// The command could not finish; it can be repeated.
    #[error("{0}")]
    Unfinished(String),
}

impl Failure {
    /// The exit code of the process: 2 or 3.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Unfinished(_) => 3,
        }
    }
}

/// Why a step of a submission ended early: to be tried again perhaps, or for good.
#[derive(Debug)]
enum Stop {
    Trouble(access::Trouble),
    Failure(Failure),
}

impl From<access::Trouble> for Stop {
    fn from(trouble: access::Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}
