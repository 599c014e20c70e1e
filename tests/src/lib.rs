//! The harness of the proof: a whole system per test, a client, a checker of jobs and one of documents, and the
//! means to break things.

pub mod authority;
pub mod balancer;
pub mod chaos;
pub mod checker;
pub mod client;
pub mod cluster;
pub mod desk;
pub mod directory;
pub mod fairness;
pub mod fhir;
pub mod flood;
pub mod form;
pub mod lab;
pub mod model;
pub mod pebble;
mod secrets;
pub mod wait;
