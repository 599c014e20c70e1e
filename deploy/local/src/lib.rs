//! Dermflow on one machine, without Docker and without root: what `dermflow-up` and the tests start.
//!
//! This crate owns the servers that are fetched ([`servers`]), the state folder and the secrets in it
//! ([`state`], [`pki`]), the [`ports`], the processes ([`process`], [`nats`], [`postgres`]), and how they fit together
//! ([`stack`]). It knows the other programs by their flags and their HTTP API only ([`client`]).
//!
//! Invariants: no secret is readable by another user, or stands on a command line; no process outlives the one
//! that started it, even when that one is killed; readiness is observed, never assumed after a time.

pub mod client;
pub mod nats;
pub mod pki;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod servers;
pub mod stack;
pub mod state;
mod store;
pub mod unprivileged;
