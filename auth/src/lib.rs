//! Who is calling: registered users, their passwords, access tokens, and the way to PostgreSQL.
//!
//! This crate owns credentials and keys. It knows neither queues nor images nor HTTP. Only its command line
//! registers users; the grants in its migrations let ingress read them, add to the audit trail, and nothing more.

pub mod audit;
pub mod db;
pub mod password;
pub mod token;
pub mod users;
