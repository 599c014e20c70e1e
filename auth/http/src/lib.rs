//! What every HTTPS listener of ours does the same way: the accept loop with its time-outs, TLS, the id of a request,
//! the headers and errors of an answer, how often callers may call.
//!
//! This crate knows neither routes nor callers: `ingress` serves clients with it, `auth` serves staff.

pub mod answer;
pub mod balancer;
pub mod certificate;
pub mod clients;
pub mod crowd;
pub mod door;
pub mod dress;
mod forwarded;
#[doc(hidden)]
pub mod fuzz;
pub mod keeping;
mod linger;
pub mod meter;
pub mod metrics;
pub mod openapi;
mod patient;
pub mod rates;
pub mod serve;
pub mod shares;
mod streams;
