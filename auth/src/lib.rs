//! Who is calling: registered accounts, what they prove themselves with, access tokens, and the way to PostgreSQL.
//!
//! This crate owns credentials, keys and the audit trail. It knows neither queues nor images; ingress uses it to let
//! callers in and to add to the trail, and may do no more in its tables than that: only the registration service and
//! the command line register anybody.

pub mod audit;
pub mod confirmation;
pub mod credentials;
pub mod db;
pub mod keys;
pub mod password;
pub mod policy;
pub mod provider;
pub mod refresh;
pub mod registry;
pub mod revocation;
pub mod scope;
pub mod sealing;
pub mod secret;
pub mod session;
pub mod throttle;
pub mod token;
pub mod users;
