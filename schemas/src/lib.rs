//! The contract between Dermflow's processes.
//!
//! This crate owns what more than one process must agree on: identifiers, the states of a job, the layout of
//! the queue, the sealed envelopes that travel on it, the checks on image bytes, the FHIR R4 subset, the error
//! codes and every limit. It knows neither HTTP nor PostgreSQL nor ONNX.
//!
//! Invariants kept here: a job enters a terminal state once ([`job::step`]); image bytes leave a process only
//! sealed ([`seal`]); nothing in flight is unbounded ([`limits`]); no `Debug` shows an image or a secret.

pub mod clock;
pub mod envelope;
pub mod error;
pub mod fhir;
pub mod id;
pub mod image;
pub mod job;
pub mod limits;
pub mod loops;
pub mod model;
pub mod monitor;
pub mod process;
pub mod queue;
pub mod random;
pub mod seal;
#[cfg(test)]
mod simulation;
