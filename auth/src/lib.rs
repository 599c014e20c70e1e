//! Who is calling: registered accounts, what they prove themselves with, access tokens, and the way to PostgreSQL.
//!
//! This crate owns credentials and keys. It knows neither queues nor images; ingress uses it to let callers in, and
//! may do no more in its tables than that: only the registration service and the command line register anybody.

pub mod credentials;
pub mod db;
pub mod keys;
pub mod password;
pub mod refresh;
pub mod registry;
pub mod revocation;
pub mod scope;
pub mod secret;
pub mod token;
pub mod users;
