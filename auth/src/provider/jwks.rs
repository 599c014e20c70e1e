//! A provider's published keys (RFC 7517).

use aws_lc_rs::digest::{SHA256, digest};
use dermflow_schemas::limits::MAX_KEY_SET;
use jsonwebtoken::{
    Algorithm, DecodingKey,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse},
};
use serde::Deserialize;
use serde_json::Value;
use url::Url;

use super::config::{Provider, url};

/// The shortest RSA modulus, in bytes: 2,048 bits (RFC 7518 §3.3).
const MIN_RSA_BYTES: usize = 256;

/// Why a set of keys is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSet {
    /// Not a JWK set.
    #[error("not a JSON Web Key Set")]
    NotJwks,
    /// It has too many keys.
    #[error("more than {MAX_KEY_SET} keys")]
    TooMany,
}

struct Key {
    id: String,
    algorithms: Vec<Algorithm>,
    verifying: DecodingKey,
}

/// The keys of a set that a provider's tokens may be signed with.
pub struct KeySet {
    keys: Vec<Key>,
    fingerprint: Vec<u8>,
}

impl std::fmt::Debug for KeySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| &key.id)).finish()
    }
}

impl PartialEq for KeySet {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<Value>,
}

impl KeySet {
    /// Reads a set. One without a key that is taken is a set all the same: the provider has withdrawn them. Keys for something else, of an unknown kind or without a `kid` are left out: RFC 7517 §5 has them
    /// ignored.
    ///
    /// # Errors
    /// See [`BadSet`].
    pub fn parse(bytes: &[u8], provider: &Provider) -> Result<Self, BadSet> {
        let Set { keys: given } = serde_json::from_slice(bytes).map_err(|_| BadSet::NotJwks)?;
        if given.len() > MAX_KEY_SET {
            return Err(BadSet::TooMany);
        }
        let (mut keys, mut used) = (Vec::new(), Vec::new());
        for value in given {
            if let Some(key) = read(&value, &provider.algorithms) {
                keys.push(key);
                used.push(value);
            }
        }
        let fingerprint = digest(&SHA256, Value::from(used).to_string().as_bytes()).as_ref().to_vec();
        Ok(Self { keys, fingerprint })
    }

    /// Whether a key has this id.
    pub(super) fn has(&self, id: &str) -> bool {
        self.keys.iter().any(|key| key.id == id)
    }

    /// The key with this id that is for this algorithm.
    pub(super) fn find(&self, id: &str, algorithm: Algorithm) -> Option<&DecodingKey> {
        let key = self.keys.iter().find(|key| key.id == id && key.algorithms.contains(&algorithm));
        key.map(|key| &key.verifying)
    }
}

fn read(value: &Value, allowed: &[Algorithm]) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(value.clone()).ok()?;
    let id = jwk.common.key_id.clone()?;
    let signs = matches!(jwk.common.public_key_use, None | Some(PublicKeyUse::Signature));
    let operations = jwk.common.key_operations.as_deref();
    let verifies = operations.is_none_or(|operations| operations.contains(&KeyOperations::Verify));
    let algorithms: Vec<Algorithm> =
        algorithms(&jwk).into_iter().filter(|algorithm| allowed.contains(algorithm)).collect();
    if !signs || !verifies || algorithms.is_empty() {
        return None;
    }
    Some(Key { id, algorithms, verifying: DecodingKey::from_jwk(&jwk).ok()? })
}

/// What a key is for, by its kind and by what is said of it, whatever a token's header says (RFC 8725 §3.1).
fn algorithms(jwk: &Jwk) -> Vec<Algorithm> {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    let fit: &[Algorithm] = match &jwk.algorithm {
        // Base64 of n bytes has 4n/3 characters.
        AlgorithmParameters::RSA(key) if key.n.len() * 3 / 4 >= MIN_RSA_BYTES => {
            &[RS256, RS384, RS512, PS256, PS384, PS512]
        }
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P256 => &[ES256],
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => &[ES384],
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => &[EdDSA],
        _ => &[],
    };
    let said = jwk.common.key_algorithm.map(|said| said.to_string());
    let named = |algorithm: &&Algorithm| said.as_ref().is_none_or(|said| *said == format!("{algorithm:?}"));
    fit.iter().filter(named).copied().collect()
}

#[derive(Deserialize)]
struct Metadata {
    issuer: String,
    jwks_uri: String,
}

/// Where a provider's own description says that its keys are.
///
/// # Errors
/// One sentence when the description is of another issuer (OpenID Connect Discovery 1.0 §4.3), or names no HTTPS URL.
pub fn jwks_url(bytes: &[u8], provider: &Provider) -> Result<Url, String> {
    let Metadata { issuer, jwks_uri } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if issuer != provider.issuer {
        return Err("the description is of another issuer".into());
    }
    url("jwks_uri", &jwks_uri)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::provider::config::tests::{GOOD, read as providers};

    fn rsa(kid: &str) -> Value {
        json!({"kty": "RSA", "kid": kid, "e": "AQAB", "n": "A".repeat(342)})
    }

    fn parse(keys: &Value) -> Result<KeySet, BadSet> {
        KeySet::parse(json!({ "keys": keys }).to_string().as_bytes(), &providers(GOOD).unwrap()[0])
    }

    #[test]
    fn only_keys_that_may_sign_tokens_are_taken() {
        // RFC 7515 appendix A.3's key.
        let ec = json!({"kty": "EC", "crv": "P-256", "kid": "ec",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"});
        let with = |name: &str, value: Value| {
            let mut key = rsa("bad");
            key[name] = value;
            key
        };
        let mut other_curve = ec.clone();
        (other_curve["crv"], other_curve["kid"]) = (json!("P-384"), json!("bad"));
        let set = parse(&json!([
            rsa("good"),
            ec,
            with("use", json!("enc")),
            with("key_ops", json!(["sign"])),
            with("alg", json!("RS384")),
            with("alg", json!("RSA-OAEP")),
            with("n", json!("A".repeat(171))),
            with("kty", json!("brand-new")),
            {"kty": "oct", "kid": "bad", "k": "c2VjcmV0", "alg": "RS256"},
            {"kty": "RSA", "e": "AQAB", "n": "A".repeat(342)},
            other_curve,
            "nonsense",
        ]))
        .unwrap();
        assert_eq!(format!("{set:?}"), r#"["good", "ec"]"#);
        assert!(set.find("good", Algorithm::RS256).is_some() && set.find("ec", Algorithm::ES256).is_some());
        for (id, algorithm) in [
            ("good", Algorithm::ES256),
            ("good", Algorithm::PS256),
            ("good", Algorithm::HS256),
            ("ec", Algorithm::RS256),
            ("other", Algorithm::RS256),
        ] {
            assert!(set.find(id, algorithm).is_none(), "{id} {algorithm:?}");
        }
    }

    #[test]
    fn a_set_that_cannot_be_read_replaces_none() {
        assert_eq!(parse(&json!(7)).unwrap_err(), BadSet::NotJwks);
        assert_eq!(parse(&json!(vec![rsa("a"); MAX_KEY_SET + 1])).unwrap_err(), BadSet::TooMany);
        assert_eq!(parse(&json!([rsa("a")])).unwrap(), parse(&json!([rsa("a"), 7])).unwrap());
        assert_ne!(parse(&json!([rsa("a")])).unwrap(), parse(&json!([rsa("b")])).unwrap());
    }

    #[test]
    fn a_description_is_of_its_issuer() {
        let provider = &providers(GOOD).unwrap()[0];
        let found = |issuer: &str, uri: &str| {
            jwks_url(json!({"issuer": issuer, "jwks_uri": uri}).to_string().as_bytes(), provider)
        };
        let issuer = provider.issuer.as_str();
        assert_eq!(found(issuer, "https://keys.example/a").unwrap().as_str(), "https://keys.example/a");
        assert!(found("https://other.example", "https://keys.example/a").is_err());
        assert!(found(issuer, "http://keys.example/a").is_err());
    }
}
