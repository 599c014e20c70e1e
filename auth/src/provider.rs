//! Identity providers that are not ours: whose access tokens are taken beside our own, and what is believed of them.
//!
//! A provider says who somebody is, and never what we know of that somebody: its token opens no more than an account
//! that staff has linked to the token's subject ([`links`]), and of that account's role no more than the provider's
//! claims grant. This module reads what providers sign or say; fetching it is left to who knows HTTP.

mod check;
mod config;
mod jwks;
pub mod links;

pub use check::{Claimed, Identity, Refusal, Shape, shape};
pub use config::{Introspection, Provider, ProviderError, Source, load};
pub use jwks::{BadSet, KeySet, jwks_url};
