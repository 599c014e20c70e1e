//! Secrets that we make: 256 random bits, of which only the SHA-256 is kept. Nothing shorter would do without a slow
//! hash; nothing longer is harder to guess.

use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};

/// What kind of secret it is: its first letters, so that scanners of code and logs find one that leaked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Of a client, for `/oauth/token`.
    Client,
    /// A refresh token.
    Refresh,
    /// A session of staff.
    Session,
}

impl Kind {
    fn prefix(self) -> &'static str {
        match self {
            Self::Client => "dfc_",
            Self::Refresh => "dfr_",
            Self::Session => "dfs_",
        }
    }
}

/// Whether it has the form of a secret of ours.
pub fn is_ours(text: &str) -> bool {
    [Kind::Client, Kind::Refresh, Kind::Session].iter().any(|kind| text.starts_with(kind.prefix()))
}

/// The system gives no randomness.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("no randomness")]
pub struct NoRandomness;

/// A new secret.
///
/// # Errors
/// When the system gives no randomness.
pub fn generate(kind: Kind) -> Result<SecretString, NoRandomness> {
    let mut bits = [0; 32];
    rand::fill(&mut bits).map_err(|_| NoRandomness)?;
    Ok(format!("{}{}", kind.prefix(), URL_SAFE_NO_PAD.encode(bits)).into())
}

/// What is kept of it.
pub fn hash(secret: &SecretString) -> Vec<u8> {
    digest(&SHA256, secret.expose_secret().as_bytes()).as_ref().to_vec()
}
