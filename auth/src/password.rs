//! Passwords: argon2id (RFC 9106) on a bounded number of threads.

use std::{sync::Arc, time::Duration};

use argon2::{
    Algorithm, Argon2, Params, Version,
    password_hash::{PasswordHasher, PasswordVerifier, phc::PasswordHash},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};
use tokio::{sync::Semaphore, time::timeout};

/// Memory of one hash, in KiB; OWASP's first choice for argon2id with t = 2, p = 1.
const MEMORY_KIB: u32 = 19_456;
/// How long a login waits for its turn at hashing.
const QUEUE_DEADLINE: Duration = Duration::from_secs(2);
/// The longest password that is hashed; a longer one is wrong.
pub const MAX_PASSWORD_BYTES: usize = 1_024;

/// Why a password could not be hashed or checked.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    /// Every hashing thread is taken: try again later.
    #[error("too many logins at once")]
    Busy,
    /// The stored hash is broken, or there is no memory.
    #[error("hashing failed")]
    Failed,
}

/// Hashes and checks passwords, on as many threads as there are cores but one.
#[derive(Debug, Clone)]
pub struct Hasher {
    threads: Arc<Semaphore>,
    /// What a login for an unknown user is checked against, so that it takes the same time.
    decoy: Arc<str>,
}

impl Hasher {
    /// A hasher for this machine.
    ///
    /// # Errors
    /// [`PasswordError::Failed`] when there is no memory for one hash.
    pub fn new() -> Result<Self, PasswordError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = Arc::new(Semaphore::new(cores.saturating_sub(1).max(1)));
        let decoy = hash(&generate()?)?.into();
        Ok(Self { threads, decoy })
    }

    /// Whether `password` matches `stored`, a PHC string. Without `stored` the answer is no, and takes as long.
    ///
    /// # Errors
    /// [`PasswordError::Busy`] when no thread was free within 2 s.
    pub async fn verify(
        &self,
        password: SecretString,
        stored: Option<String>,
    ) -> Result<bool, PasswordError> {
        let turn = self.threads.clone().acquire_owned();
        let permit = timeout(QUEUE_DEADLINE, turn).await.map_err(|_| PasswordError::Busy)?;
        let decoy = self.decoy.clone();
        let check = move || {
            let _permit = permit;
            let known = stored.is_some();
            Ok(matches(&password, stored.as_deref().unwrap_or(&decoy))? && known)
        };
        tokio::task::spawn_blocking(check).await.map_err(|_| PasswordError::Failed)?
    }
}

fn argon2() -> Result<Argon2<'static>, PasswordError> {
    let params = Params::new(MEMORY_KIB, 2, 1, None).map_err(|_| PasswordError::Failed)?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

/// The PHC string of `password`, with a fresh salt.
///
/// # Errors
/// [`PasswordError::Failed`] when there is no memory or no randomness.
pub fn hash(password: &SecretString) -> Result<String, PasswordError> {
    let mut salt = [0; 16];
    aws_lc_rs::rand::fill(&mut salt).map_err(|_| PasswordError::Failed)?;
    let hash = argon2()?
        .hash_password_with_salt(password.expose_secret().as_bytes(), &salt)
        .map_err(|_| PasswordError::Failed)?;
    Ok(hash.to_string())
}

fn matches(password: &SecretString, stored: &str) -> Result<bool, PasswordError> {
    let password = password.expose_secret().as_bytes();
    if password.len() > MAX_PASSWORD_BYTES {
        return Ok(false);
    }
    let stored = PasswordHash::new(stored).map_err(|_| PasswordError::Failed)?;
    Ok(argon2()?.verify_password(password, &stored).is_ok())
}

/// A password with 192 random bits, 32 characters long.
///
/// # Errors
/// [`PasswordError::Failed`] when the system gives no randomness.
pub fn generate() -> Result<SecretString, PasswordError> {
    let mut bits = [0; 24];
    aws_lc_rs::rand::fill(&mut bits).map_err(|_| PasswordError::Failed)?;
    Ok(URL_SAFE_NO_PAD.encode(bits).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_matches_itself_only() {
        let hasher = Hasher::new().unwrap();
        let password = generate().unwrap();
        let stored = hash(&password).unwrap();
        assert!(stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{stored}");
        assert!(hasher.verify(password.clone(), Some(stored.clone())).await.unwrap());
        assert!(!hasher.verify("wrong".into(), Some(stored.clone())).await.unwrap());
        assert!(!hasher.verify(password, None).await.unwrap());
        let long: SecretString = "x".repeat(MAX_PASSWORD_BYTES + 1).into();
        assert!(!hasher.verify(long, Some(stored)).await.unwrap());
    }

    #[tokio::test]
    async fn a_decoy_is_never_a_way_in() {
        let hasher = Hasher::new().unwrap();
        assert!(!hasher.verify("".into(), None).await.unwrap());
    }
}
