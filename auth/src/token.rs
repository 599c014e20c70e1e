//! Access tokens: JWT profile for OAuth 2.0 access tokens (RFC 9068), EdDSA (RFC 8037), 15 minutes.
//!
//! One algorithm, one issuer, one audience, every claim required: RFC 8725 §3 leaves nothing to choose.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_schemas::id::ClientId;
use jsonwebtoken::{Algorithm, Header, Validation};
use quick_cache::sync::Cache;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    confirmation::{Confirmation, Fingerprint},
    keys::{KeyError, Keys},
    scope::Permission,
};

/// How long a token lives.
pub const LIFETIME: Duration = Duration::from_mins(15);
/// Clock difference between replicas that is forgiven, in seconds.
pub const LEEWAY: i64 = 30;
/// The longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 4_096;
/// Tokens whose signature is remembered as good: about 5 MB.
const REMEMBERED: usize = 16_384;
/// Whom tokens are for.
pub const AUDIENCE: &str = "dermflow";
const TYPE: &str = "at+jwt";

/// Why a token cannot be made or not be believed. The caller is told nothing of it, unless it has expired.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Signing failed.
    #[error("cannot sign: {0}")]
    Sign(jsonwebtoken::errors::Error),
    /// Not a token of ours.
    #[error("token refused: {0}")]
    Refused(&'static str),
    /// A token of ours whose time is over.
    #[error("token expired")]
    Expired,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claims {
    iss: String,
    sub: Uuid,
    aud: String,
    exp: i64,
    iat: i64,
    nbf: i64,
    jti: Uuid,
    client_id: Uuid,
    scope: String,
    /// Ours: what the client proved itself with, see [`Caller::credential`].
    credential: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cnf: Option<Confirmation>,
}

/// Who a believed token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The registered account.
    pub client: ClientId,
    /// The token's own id.
    pub jti: Uuid,
    /// What it was given for: the id of a secret or key, of a family of refresh tokens, or the account's own id for
    /// its password. With it the token is revoked.
    pub credential: Uuid,
    /// When it was given.
    pub issued_at: OffsetDateTime,
    /// When it expires.
    pub expires_at: OffsetDateTime,
    /// What it may be used for.
    pub scope: String,
    /// The certificate of the connections on which alone it is good.
    pub bound_to: Option<Fingerprint>,
}

impl Caller {
    /// Whether the token's scope has this permission.
    pub fn may(&self, permission: Permission) -> bool {
        permission.is_in(&self.scope)
    }
}

/// What a token is given for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The account.
    pub client: ClientId,
    /// See [`Caller::credential`].
    pub credential: Uuid,
    /// What the token may be used for.
    pub scope: String,
    /// When account or credential end, which no token outlives.
    pub ends: Option<OffsetDateTime>,
    /// Tokens of the account that were issued until then are refused: this one is not.
    pub after: Option<OffsetDateTime>,
    /// See [`Caller::bound_to`].
    pub bound_to: Option<Fingerprint>,
}

/// Makes and checks tokens with the keys of a folder.
pub struct Tokens {
    issuer: String,
    folder: PathBuf,
    keys: RwLock<Arc<Keys>>,
    validation: Validation,
    /// By `jti`, as all have one `iss`: one a token. Revocation goes by what is in the token, never by its bytes: there
    /// may be several encodings of one.
    believed: Cache<Uuid, Arc<Believed>>,
}

/// A token whose signature is good.
struct Believed {
    /// Of the whole token: another one that claims the same id proves itself.
    sha256: [u8; 32],
    /// The keys that it was proved with.
    keys: Arc<Keys>,
    caller: Caller,
}

/// What a token says of itself, before anything of it is believed.
#[derive(Deserialize)]
struct Name<'a> {
    #[serde(borrow)]
    iss: Cow<'a, str>,
    jti: Uuid,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({}, {:?})", self.issuer, self.keys())
    }
}

impl Tokens {
    /// Reads the signing keys of `folder`, for tokens of `issuer`.
    ///
    /// # Errors
    /// See [`Keys::read`].
    pub fn open(folder: &Path, issuer: &str) -> Result<Self, KeyError> {
        let mut validation = Validation::new(Algorithm::EdDSA);
        // The library would go by the machine's clock, which may be wrong: `verify` has the time handed in.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[issuer]);
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
        Ok(Self {
            issuer: issuer.into(),
            folder: folder.into(),
            keys: RwLock::new(Arc::new(Keys::read(folder)?)),
            validation,
            believed: Cache::new(REMEMBERED),
        })
    }

    /// Looks at the folder again. When it has changed, every token must be proved anew, as its key may be gone.
    ///
    /// # Errors
    /// See [`Keys::read`]; the keys stay as they were.
    pub fn reload(&self) -> Result<(), KeyError> {
        let fresh = Keys::read(&self.folder)?;
        if !fresh.are(&self.keys()) {
            *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
            self.believed.clear();
        }
        Ok(())
    }

    /// Who issues the tokens.
    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The JWK set with which others can check tokens at `now`, and after it.
    pub fn published(&self, now: OffsetDateTime) -> Value {
        self.keys().published(now)
    }

    fn keys(&self) -> Arc<Keys> {
        self.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A token, valid from `now` for [`LIFETIME`] at most.
    ///
    /// # Errors
    /// When signing fails.
    pub fn issue(&self, grant: Grant, now: OffsetDateTime) -> Result<SecretString, TokenError> {
        let keys = self.keys();
        let key = keys.signing(now);
        let expires = grant.ends.map_or(now + LIFETIME, |ends| ends.min(now + LIFETIME));
        // The claims count whole seconds (RFC 7519 §2). A token that must differ from those before has a later one, as
        // long as the clocks of the replicas may be that far apart.
        let after = grant.after.map_or(i64::MIN, |after| after.unix_timestamp() + 1);
        let now = now.unix_timestamp().max(after.min(now.unix_timestamp() + LEEWAY));
        let claims = Claims {
            iss: self.issuer.clone(),
            sub: grant.client.uuid(),
            aud: AUDIENCE.into(),
            exp: expires.unix_timestamp(),
            iat: now,
            nbf: now,
            jti: Uuid::new_v4(),
            client_id: grant.client.uuid(),
            scope: grant.scope,
            credential: grant.credential,
            cnf: grant.bound_to.map(|certificate| Confirmation { certificate }),
        };
        let mut header = Header::new(Algorithm::EdDSA);
        header.typ = Some(TYPE.into());
        header.kid = Some(key.id.clone());
        jsonwebtoken::encode(&header, &claims, &key.signing).map(Into::into).map_err(TokenError::Sign)
    }

    /// Who `token` speaks for at `now`. Needs no database.
    ///
    /// # Errors
    /// [`TokenError::Refused`] with a reason for the log, not for the caller; [`TokenError::Expired`].
    pub fn verify(&self, token: &str, now: OffsetDateTime) -> Result<Caller, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Refused("too long"));
        }
        let jti = self.jti(token).ok_or(TokenError::Refused("claims"))?;
        let mut sha256 = [0; 32];
        sha256.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        let keys = self.keys();
        let known = self.believed.get(&jti);
        let known = known.filter(|known| known.sha256 == sha256 && Arc::ptr_eq(&known.keys, &keys));
        let caller = if let Some(known) = known {
            known.caller.clone()
        } else {
            let caller = self.prove(token, &keys, now)?;
            self.believed.insert(jti, Arc::new(Believed { sha256, keys, caller: caller.clone() }));
            caller
        };
        let leeway = Duration::from_secs(LEEWAY as u64);
        let is_expired = caller.expires_at + leeway < now;
        if is_expired || caller.issued_at - leeway > now {
            self.believed.remove(&jti);
            return Err(if is_expired { TokenError::Expired } else { TokenError::Refused("times") });
        }
        Ok(caller)
    }

    /// The id that a token of ours claims to have.
    fn jti(&self, token: &str) -> Option<Uuid> {
        let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
        let name: Name<'_> = serde_json::from_slice(&claims).ok()?;
        (name.iss == self.issuer).then_some(name.jti)
    }

    /// Everything but what changes with time.
    fn prove(&self, token: &str, keys: &Keys, now: OffsetDateTime) -> Result<Caller, TokenError> {
        let refused = TokenError::Refused;
        let header = jsonwebtoken::decode_header(token).map_err(|_| refused("header"))?;
        if header.typ.as_deref() != Some(TYPE) {
            return Err(refused("type"));
        }
        // RFC 7515 §4.1.11: a `crit` that is not understood must be refused; the library reads but never checks it.
        // A key that a token brings along proves nothing.
        if header.crit.is_some()
            || header.jwk.is_some()
            || header.jku.is_some()
            || header.x5u.is_some()
            || header.x5c.is_some()
        {
            return Err(refused("header parameters"));
        }
        let key = header.kid.and_then(|id| keys.accepted(&id, now)).ok_or_else(|| refused("key"))?;
        let claims = jsonwebtoken::decode::<Claims>(token, &key.verifying, &self.validation)
            .map_err(|_| refused("signature or claims"))?
            .claims;
        // What the library leaves out.
        if claims.nbf != claims.iat
            || claims.exp < claims.iat
            || claims.exp - claims.iat > LIFETIME.as_secs() as i64
        {
            return Err(refused("times"));
        }
        if claims.sub != claims.client_id {
            return Err(refused("subject"));
        }
        let time = |seconds| OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| refused("times"));
        Ok(Caller {
            client: claims.sub.into(),
            jti: claims.jti,
            credential: claims.credential,
            issued_at: time(claims.iat)?,
            expires_at: time(claims.exp)?,
            scope: claims.scope,
            bound_to: claims.cnf.map(|cnf| cnf.certificate),
        })
    }
}

#[cfg(test)]
mod tests {
    mod attacks;

    use dermflow_schemas::clock;
    use secrecy::ExposeSecret;
    use serde_json::{Value, json};

    use super::*;
    use crate::keys;

    const SCOPE: &str = "system/DiagnosticReport.crds";

    fn tokens(name: &str) -> Tokens {
        let folder = std::env::temp_dir().join(format!("dermflow-{name}-{}", Uuid::new_v4()));
        keys::add(&folder, OffsetDateTime::UNIX_EPOCH).unwrap();
        let tokens = Tokens::open(&folder, "https://localhost").unwrap();
        std::fs::remove_dir_all(folder).unwrap();
        tokens
    }

    fn grant(client: ClientId) -> Grant {
        Grant {
            client,
            credential: Uuid::new_v4(),
            scope: SCOPE.into(),
            ends: None,
            after: None,
            bound_to: None,
        }
    }

    fn client() -> ClientId {
        Uuid::new_v4().into()
    }

    /// SRS-004: a token speaks for its client, for as long as it lives.
    #[test]
    fn a_token_speaks_for_its_client_until_it_expires() {
        let (tokens, client, now) = (tokens("ok"), client(), clock::now());
        let token = tokens.issue(grant(client), now).unwrap();
        let caller = tokens.verify(token.expose_secret(), now).unwrap();
        assert_eq!(caller.client, client);
        assert!(caller.may(Permission::Submit) && !caller.may(Permission::Operate));
        let later = now + LIFETIME + Duration::from_secs(31);
        assert!(matches!(tokens.verify(token.expose_secret(), later), Err(TokenError::Expired)));
        let before = now - Duration::from_secs(31);
        assert!(tokens.verify(token.expose_secret(), before).is_err());
    }

    /// SRS-004: one changed character anywhere is one too many.
    #[test]
    fn a_changed_token_is_refused() {
        let (tokens, now) = (tokens("flip"), clock::now());
        let token = tokens.issue(grant(client()), now).unwrap().expose_secret().to_owned();
        for i in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(tokens.verify(&changed, now).is_err(), "at {i}");
        }
        assert!(tokens.verify(&"a".repeat(64_000), now).is_err());
        assert!(tokens.verify("", now).is_err());
    }
    /// What is remembered is bounded, and forgetting costs a proof and nothing else.
    #[test]
    fn no_number_of_tokens_is_remembered_without_bound() {
        let (tokens, now) = (tokens("bound"), clock::now());
        let issue = || tokens.issue(grant(client()), now).unwrap();
        let first = issue();
        tokens.verify(first.expose_secret(), now).unwrap();
        for _ in 0..REMEMBERED + REMEMBERED / 8 {
            tokens.verify(issue().expose_secret(), now).unwrap();
        }
        assert!((REMEMBERED / 2..=REMEMBERED).contains(&tokens.believed.len()), "{}", tokens.believed.len());
        tokens.verify(first.expose_secret(), now).unwrap();
    }

    #[test]
    fn a_bound_token_says_to_what() {
        let (tokens, now) = (tokens("bound-to"), clock::now());
        let bound_to = Some([7; 32]);
        let token = tokens.issue(Grant { bound_to, ..grant(client()) }, now).unwrap();
        // Once proved, and once remembered.
        for _ in 0..2 {
            assert_eq!(tokens.verify(token.expose_secret(), now).unwrap().bound_to, bound_to);
        }
        let claims = token.expose_secret().split('.').nth(1).unwrap();
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
        assert_eq!(claims["cnf"], json!({"x5t#S256": URL_SAFE_NO_PAD.encode([7; 32])}));
    }

    /// Of two tokens with one id each is judged by itself.
    #[test]
    fn the_id_of_a_believed_token_opens_nothing() {
        let (tokens, now) = (tokens("id"), clock::now());
        let token = tokens.issue(grant(client()), now).unwrap();
        let good = token.expose_secret();
        tokens.verify(good, now).unwrap();
        let parts: Vec<&str> = good.split('.').collect();
        let mut claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts[1]).unwrap()).unwrap();
        claims["scope"] = json!("dermflow/operate");
        let forged = format!("{}.{}.{}", parts[0], URL_SAFE_NO_PAD.encode(claims.to_string()), parts[2]);
        assert_eq!(tokens.jti(&forged), tokens.jti(good));
        assert!(tokens.verify(&forged, now).is_err());
        tokens.verify(good, now).unwrap();
        assert_eq!(tokens.believed.len(), 1);
    }
}
