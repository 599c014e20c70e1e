//! Access tokens: JWT profile for OAuth 2.0 access tokens (RFC 9068), EdDSA (RFC 8037), 15 minutes.
//!
//! One algorithm, one issuer, one audience, every claim required: RFC 8725 §3 leaves nothing to choose.

use std::{path::Path, time::Duration};

use aws_lc_rs::{
    digest,
    signature::{Ed25519KeyPair, KeyPair},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_schemas::{id::ClientId, image::hex};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

/// How long a token lives.
pub const LIFETIME: Duration = Duration::from_mins(15);
/// Clock difference between replicas that is forgiven, in seconds.
const LEEWAY: i64 = 30;
/// The longest token that is looked at.
const MAX_TOKEN_BYTES: usize = 4_096;
/// The scope that submitting and reading one's own analyses needs (SMART App Launch 2.2 syntax: create, read,
/// search).
pub const SCOPE_ANALYZE: &str = "system/DiagnosticReport.crs";
/// The scope that reading the audit trail needs.
pub const SCOPE_AUDIT: &str = "system/AuditEvent.rs";
/// The scope that the operators' API needs.
pub const SCOPE_OPERATE: &str = "dermflow/operate";
const AUDIENCE: &str = "dermflow";
const TYPE: &str = "at+jwt";

/// Why a key cannot be used, a token not be made or not be believed. The caller is told nothing of it.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The key file cannot be read or is no Ed25519 key in PKCS#8 PEM.
    #[error("signing key {0}: {1}")]
    Key(String, String),
    /// Signing failed.
    #[error("cannot sign: {0}")]
    Sign(jsonwebtoken::errors::Error),
    /// Not a token of ours, or no longer.
    #[error("token refused: {0}")]
    Refused(&'static str),
}

#[derive(Debug, Serialize, Deserialize)]
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
}

/// Who a believed token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The registered client.
    pub client: ClientId,
    /// The token's own id.
    pub jti: Uuid,
    scope: String,
}

impl Caller {
    /// Whether the token carries `scope`.
    pub fn may(&self, scope: &str) -> bool {
        self.scope.split(' ').any(|granted| granted == scope)
    }
}

/// Makes and checks tokens with one Ed25519 key.
pub struct Tokens {
    issuer: String,
    key_id: String,
    signing: EncodingKey,
    verifying: DecodingKey,
    validation: Validation,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({}, key {})", self.issuer, self.key_id)
    }
}

impl Tokens {
    /// Reads the signing key, PKCS#8 in PEM, for tokens of `issuer`.
    ///
    /// # Errors
    /// When the file is missing or holds no Ed25519 key.
    pub fn load(path: &Path, issuer: &str) -> Result<Self, TokenError> {
        let bad = |why: String| TokenError::Key(path.display().to_string(), why);
        let pkcs8 = PrivatePkcs8KeyDer::from_pem_file(path).map_err(|e| bad(e.to_string()))?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8.secret_pkcs8_der())
            .map_err(|e| bad(e.to_string()))?;
        let public = pair.public_key().as_ref();
        let verifying = DecodingKey::from_ed_components(&URL_SAFE_NO_PAD.encode(public))
            .map_err(|e| bad(e.to_string()))?;
        let key_id = hex(&digest::digest(&digest::SHA256, public).as_ref()[..8]);
        let mut validation = Validation::new(Algorithm::EdDSA);
        // The library would go by the machine's clock, which may be wrong: `verify` has the time handed in.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.set_audience(&[AUDIENCE]);
        validation.set_issuer(&[issuer]);
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
        Ok(Self {
            issuer: issuer.into(),
            key_id,
            signing: EncodingKey::from_ed_der(pkcs8.secret_pkcs8_der()),
            verifying,
            validation,
        })
    }

    /// A token for `client` with one scope, valid from `now` for [`LIFETIME`].
    ///
    /// # Errors
    /// When signing fails.
    pub fn issue(
        &self,
        client: ClientId,
        scope: &str,
        now: OffsetDateTime,
    ) -> Result<SecretString, TokenError> {
        let now = now.unix_timestamp();
        let claims = Claims {
            iss: self.issuer.clone(),
            sub: client.uuid(),
            aud: AUDIENCE.into(),
            exp: now + LIFETIME.as_secs() as i64,
            iat: now,
            nbf: now,
            jti: Uuid::new_v4(),
            client_id: client.uuid(),
            scope: scope.into(),
        };
        let mut header = Header::new(Algorithm::EdDSA);
        header.typ = Some(TYPE.into());
        header.kid = Some(self.key_id.clone());
        jsonwebtoken::encode(&header, &claims, &self.signing).map(Into::into).map_err(TokenError::Sign)
    }

    /// Who `token` speaks for at `now`. Needs no database.
    ///
    /// # Errors
    /// [`TokenError::Refused`] with a reason for the log, not for the caller.
    pub fn verify(&self, token: &str, now: OffsetDateTime) -> Result<Caller, TokenError> {
        let refused = TokenError::Refused;
        if token.len() > MAX_TOKEN_BYTES {
            return Err(refused("too long"));
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| refused("header"))?;
        if header.typ.as_deref() != Some(TYPE) || header.kid.as_deref() != Some(&self.key_id) {
            return Err(refused("type or key"));
        }
        // RFC 7515 §4.1.11: a `crit` that is not understood must be refused; the library reads but never checks it.
        if header.crit.is_some() || header.jwk.is_some() || header.jku.is_some() || header.x5u.is_some() {
            return Err(refused("header parameters"));
        }
        let claims = jsonwebtoken::decode::<Claims>(token, &self.verifying, &self.validation)
            .map_err(|_| refused("signature or claims"))?
            .claims;
        // What the library leaves out, and the times, against the same clock as everything else.
        let now = now.unix_timestamp();
        if claims.exp + LEEWAY < now
            || claims.nbf - LEEWAY > now
            || claims.iat - LEEWAY > now
            || claims.exp - claims.iat > LIFETIME.as_secs() as i64
        {
            return Err(refused("times"));
        }
        if claims.sub != claims.client_id {
            return Err(refused("subject"));
        }
        Ok(Caller { client: claims.sub.into(), jti: claims.jti, scope: claims.scope })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use aws_lc_rs::signature::Ed25519KeyPair;
    use base64::engine::general_purpose::STANDARD;
    use dermflow_schemas::clock;
    use secrecy::ExposeSecret;
    use serde_json::{Value, json};

    use super::*;

    fn tokens(name: &str) -> Tokens {
        let der = Ed25519KeyPair::generate().unwrap().to_pkcs8v1().unwrap();
        let pem = format!(
            "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
            STANDARD.encode(der.as_ref())
        );
        let path = std::env::temp_dir().join(format!("dermflow-{name}-{}.pem", Uuid::new_v4()));
        std::fs::File::create(&path).unwrap().write_all(pem.as_bytes()).unwrap();
        let tokens = Tokens::load(&path, "https://localhost").unwrap();
        std::fs::remove_file(path).unwrap();
        tokens
    }

    fn client() -> ClientId {
        Uuid::new_v4().into()
    }

    fn claims(now: OffsetDateTime) -> Value {
        let (now, id) = (now.unix_timestamp(), Uuid::new_v4());
        json!({"iss": "https://localhost", "sub": id, "aud": AUDIENCE, "exp": now + 900, "iat": now, "nbf": now,
               "jti": Uuid::new_v4(), "client_id": id, "scope": SCOPE_ANALYZE})
    }

    fn sign(tokens: &Tokens, change: impl FnOnce(&mut Header), claims: &Value) -> String {
        let mut header = Header::new(Algorithm::EdDSA);
        header.typ = Some(TYPE.into());
        header.kid = Some(tokens.key_id.clone());
        change(&mut header);
        jsonwebtoken::encode(&header, claims, &tokens.signing).unwrap()
    }

    /// SRS-004: a token speaks for its client, for as long as it lives.
    #[test]
    fn a_token_speaks_for_its_client_until_it_expires() {
        let (tokens, client, now) = (tokens("ok"), client(), clock::now());
        let token = tokens.issue(client, SCOPE_ANALYZE, now).unwrap();
        let caller = tokens.verify(token.expose_secret(), now).unwrap();
        assert_eq!(caller.client, client);
        assert!(caller.may(SCOPE_ANALYZE) && !caller.may("system/DiagnosticReport"));
        let later = now + LIFETIME + Duration::from_secs(31);
        assert!(tokens.verify(token.expose_secret(), later).is_err());
        let before = now - Duration::from_secs(31);
        assert!(tokens.verify(token.expose_secret(), before).is_err());
    }

    /// SRS-004: every claim is required and every one is checked.
    #[test]
    fn a_token_with_a_claim_missing_or_wrong_is_refused() {
        let (tokens, now) = (tokens("claims"), clock::now());
        let good = claims(now);
        assert!(tokens.verify(&sign(&tokens, |_| (), &good), now).is_ok());
        for name in ["iss", "sub", "aud", "exp", "iat", "nbf", "jti", "client_id", "scope"] {
            let mut missing = good.clone();
            missing.as_object_mut().unwrap().remove(name);
            assert!(tokens.verify(&sign(&tokens, |_| (), &missing), now).is_err(), "without {name}");
        }
        let seconds = now.unix_timestamp();
        let wrong = [
            ("iss", json!("https://other")),
            ("aud", json!("other")),
            ("aud", json!(["other"])),
            ("exp", json!(seconds - 60)),
            ("exp", json!(seconds + 100_000)),
            ("exp", json!((seconds + 900).to_string())),
            ("exp", json!(u64::MAX)),
            ("nbf", json!(seconds + 60)),
            ("iat", json!(seconds + 60)),
            ("client_id", json!(Uuid::new_v4())),
            ("admin", json!(true)),
        ];
        for (name, value) in wrong {
            let mut bad = good.clone();
            bad[name] = value.clone();
            assert!(tokens.verify(&sign(&tokens, |_| (), &bad), now).is_err(), "{name} = {value}");
        }
    }

    /// SRS-004: no other key, algorithm or header parameter gets through.
    #[test]
    fn a_token_with_another_header_or_key_is_refused() {
        let (ours, theirs, now) = (tokens("ours"), tokens("theirs"), clock::now());
        let good = claims(now);
        let forged = jsonwebtoken::encode(
            &Header {
                typ: Some(TYPE.into()),
                kid: Some(ours.key_id.clone()),
                ..Header::new(Algorithm::EdDSA)
            },
            &good,
            &theirs.signing,
        );
        assert!(ours.verify(&forged.unwrap(), now).is_err());
        let changes: [fn(&mut Header); 5] = [
            |h| h.typ = Some("JWT".into()),
            |h| h.typ = None,
            |h| h.kid = Some("../../etc/passwd".into()),
            |h| h.crit = Some(vec!["exp".into()]),
            |h| h.jku = Some("https://attacker.example/keys".into()),
        ];
        for change in changes {
            assert!(ours.verify(&sign(&ours, change, &good), now).is_err());
        }
        let body = URL_SAFE_NO_PAD.encode(good.to_string());
        for alg in ["none", "None", "HS256"] {
            let header = json!({"alg": alg, "typ": TYPE, "kid": ours.key_id}).to_string();
            let token = format!("{}.{body}.", URL_SAFE_NO_PAD.encode(header));
            assert!(ours.verify(&token, now).is_err(), "{alg}");
        }
    }

    /// SRS-004: one changed character anywhere is one too many.
    #[test]
    fn a_changed_token_is_refused() {
        let (tokens, now) = (tokens("flip"), clock::now());
        let token = tokens.issue(client(), SCOPE_ANALYZE, now).unwrap().expose_secret().to_owned();
        for i in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(tokens.verify(&changed, now).is_err(), "at {i}");
        }
        assert!(tokens.verify(&"a".repeat(64_000), now).is_err());
        assert!(tokens.verify("", now).is_err());
    }
}
