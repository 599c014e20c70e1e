//! Tokens of external identity providers: fetching what `auth` checks them with, and remembering what came of it.
//!
//! Each provider's keys are fetched by one task and by nobody else: once a minute, and when a token has an unknown
//! `kid`, which anybody can make up, at most once in 30 s. Requests wait for that task and never for a provider, but
//! for opaque tokens, about which it is asked in the request that brought them. Every address that is asked is from the
//! configuration, or from the provider's own description; none is from a token.

mod remote;

use std::{path::Path, sync::Arc, time::Duration};

use aws_lc_rs::digest::{SHA256, digest};
use dermflow_auth::provider::{self, Claimed, Identity, Provider, Refusal, Shape};
use dermflow_schemas::{
    limits::{INTROSPECTION_CACHE, INTROSPECTION_REFUSED, REMEMBERED_EXTERNAL},
    loops::Loops,
};
use prometheus::IntCounterVec;
use quick_cache::sync::Cache;
use time::OffsetDateTime;
use tokio::{sync::OnceCell, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use remote::{Remote, Silent};

/// Why a token is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// It is no token of a provider, or not a good one; with a reason for the log.
    Refused(&'static str),
    /// Only the provider could tell, and it does not.
    Unavailable,
    /// It is asked about as many tokens as it may be.
    Busy,
}

impl From<Silent> for Trouble {
    fn from(silent: Silent) -> Self {
        match silent {
            Silent::Away => Self::Unavailable,
            Silent::Busy => Self::Busy,
        }
    }
}

/// A token that is believed.
#[derive(Debug)]
pub(crate) struct Proof {
    /// Whose it is.
    pub(crate) identity: Identity,
    /// Set when it is in the audit trail that this token was seen.
    pub(crate) noted: Arc<OnceCell<()>>,
    /// The set of keys that it was proved with.
    keys: u64,
}

/// What a provider said of an opaque token, and how long that holds.
#[derive(Debug, Clone)]
struct Word {
    proof: Option<Arc<Proof>>,
    until: Instant,
}

/// A signed token that was believed.
#[derive(Debug)]
struct Believed {
    /// Of the whole token: another one that claims the same id proves itself.
    sha256: [u8; 32],
    proof: Arc<Proof>,
}

/// The providers whose tokens are taken.
#[derive(Debug)]
pub(crate) struct Providers {
    remotes: Vec<Arc<Remote>>,
    /// By the provider and the token's id there.
    signed: Cache<(usize, Uuid), Arc<Believed>>,
    /// By SHA-256, as nothing can be read in them.
    opaque: Cache<[u8; 32], Word>,
}

impl Providers {
    /// Reads the file of providers, if there is one, for a server whose own tokens are of `own_issuer`. `questions`
    /// counts what they are asked.
    ///
    /// # Errors
    /// One sentence when a file cannot be read or would not be safe.
    pub(crate) fn load(
        path: Option<&Path>,
        own_issuer: &str,
        questions: &IntCounterVec,
    ) -> anyhow::Result<Self> {
        let providers = path.map_or(Ok(Vec::new()), |path| provider::load(path, own_issuer))?;
        let remote = |provider: Provider| Remote::new(provider, questions.clone()).map(Arc::new);
        Ok(Self {
            remotes: providers.into_iter().map(remote).collect::<anyhow::Result<_>>()?,
            signed: Cache::new(REMEMBERED_EXTERNAL),
            opaque: Cache::new(REMEMBERED_EXTERNAL),
        })
    }

    /// Every provider's `iss`.
    pub(crate) fn issuers(&self) -> Vec<String> {
        self.remotes.iter().map(|remote| remote.provider().issuer.clone()).collect()
    }

    /// Keeps the keys fresh until `stop`.
    pub(crate) fn start(&self, loops: &mut Loops, stop: &CancellationToken) {
        for remote in &self.remotes {
            loops.spawn("the look at a provider's keys", remote.clone().follow(stop.clone()));
        }
    }

    /// Who a token that is not ours speaks for at `now`.
    pub(crate) async fn verify(&self, token: &str, now: OffsetDateTime) -> Result<Arc<Proof>, Trouble> {
        if self.remotes.is_empty() {
            return Err(Trouble::Refused("not ours"));
        }
        let mut sha256 = [0; 32];
        let proof = match provider::shape(token) {
            Shape::None => return Err(Trouble::Refused("no token")),
            shape => {
                sha256.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
                match shape {
                    Shape::Jwt => self.signed(token, sha256, now).await?,
                    _ => self.opaque(token, sha256, now).await?,
                }
            }
        };
        if proof.identity.is_in_time(now) { Ok(proof) } else { Err(Trouble::Refused("times")) }
    }

    async fn signed(
        &self,
        token: &str,
        sha256: [u8; 32],
        now: OffsetDateTime,
    ) -> Result<Arc<Proof>, Trouble> {
        let Claimed { issuer, jti } = Claimed::of(token).ok_or(Trouble::Refused("no issuer"))?;
        let number = self.remotes.iter().position(|remote| remote.provider().issuer == issuer);
        let number = number.ok_or(Trouble::Refused("of no provider"))?;
        let remote = &self.remotes[number];
        if remote.provider().keys.is_none() {
            return Err(Trouble::Refused("of a provider that signs nothing"));
        }
        let mut keys = remote.keys().ok_or(Trouble::Unavailable)?;
        let remembered = self.signed.get(&(number, jti));
        if let Some(believed) = &remembered
            && (believed.sha256, believed.proof.keys) == (sha256, keys.number)
        {
            return Ok(believed.proof.clone());
        }
        let mut proved = remote.provider().prove(token, &keys.set, now);
        if proved == Err(Refusal::UnknownKey) {
            keys = remote.fresh_keys().await?;
            proved = remote.provider().prove(token, &keys.set, now);
        }
        let identity = proved.map_err(|refusal| match refusal {
            Refusal::Never(why) => Trouble::Refused(why),
            Refusal::UnknownKey => Trouble::Refused("unknown key"),
        })?;
        // Another form of the same token has been seen with it.
        let same = remembered.filter(|believed| believed.proof.identity == identity);
        let noted = same.map(|believed| believed.proof.noted.clone()).unwrap_or_default();
        let proof = Arc::new(Proof { identity, noted, keys: keys.number });
        self.signed.insert((number, jti), Arc::new(Believed { sha256, proof: proof.clone() }));
        Ok(proof)
    }

    async fn opaque(
        &self,
        token: &str,
        sha256: [u8; 32],
        now: OffsetDateTime,
    ) -> Result<Arc<Proof>, Trouble> {
        let remote = self.remotes.iter().find(|remote| remote.provider().introspection.is_some());
        let remote = remote.ok_or(Trouble::Refused("opaque"))?;
        let mut noted = Arc::default();
        loop {
            // Who comes while the provider is asked about the same token waits for that answer.
            let word = match self.opaque.get_value_or_guard_async(&sha256).await {
                Ok(word) if word.until > Instant::now() => word,
                Ok(_) => {
                    let old = self.opaque.remove_if(&sha256, |word| word.until <= Instant::now());
                    if let Some((_, Word { proof: Some(proof), .. })) = old {
                        noted = proof.noted.clone();
                    }
                    continue;
                }
                Err(place) => {
                    let word = ask(remote, token, noted.clone(), now).await?;
                    let _ = place.insert(word.clone());
                    word
                }
            };
            return word.proof.ok_or(Trouble::Refused("not active"));
        }
    }
}

async fn ask(
    remote: &Remote,
    token: &str,
    noted: Arc<OnceCell<()>>,
    now: OffsetDateTime,
) -> Result<Word, Trouble> {
    // From before the question: the word holds no longer than the token lives, however long the answer took.
    let asked = Instant::now();
    let identity = remote.ask(token, now).await?;
    let holds = identity.as_ref().map_or(INTROSPECTION_REFUSED, |identity| {
        Duration::try_from(identity.expires_at - now).unwrap_or_default().min(INTROSPECTION_CACHE)
    });
    let proof = identity.map(|identity| Arc::new(Proof { identity, noted, keys: 0 }));
    Ok(Word { proof, until: asked + holds })
}
