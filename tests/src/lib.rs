//! The harness of the proof: a whole system per test, a client, a checker of documents.

pub mod client;
pub mod fhir;
pub mod lab;
pub mod wait;
