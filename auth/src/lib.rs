//! Who is calling: registered users, their passwords, access tokens, and the way to PostgreSQL.
//!
//! This crate owns credentials and keys. It knows neither queues nor images nor HTTP. Only its command line
//! registers users; the grant in its migration lets ingress read them and nothing more.

pub mod db;
pub mod password;
pub mod policy;
pub mod throttle;
pub mod token;
pub mod users;
