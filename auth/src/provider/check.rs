//! What is believed of a token of a provider (RFC 8725, RFC 9068), or of its answer about one (RFC 7662).

use aws_lc_rs::digest::{Context, SHA256};
use dermflow_schemas::limits::{EXTERNAL_LIFETIME, INTROSPECTION_CACHE, MAX_EXTERNAL_TOKEN_BYTES};
use jsonwebtoken::{Header, Validation};
use serde::Deserialize;
use serde_json::{Map, Value};
use time::{Duration, OffsetDateTime};
use uuid::{Builder, Uuid};

use super::{
    config::{Provider, TokenType},
    jwks::KeySet,
};
use crate::{
    confirmation::{Confirmation, Fingerprint},
    secret,
    token::LEEWAY,
    users::Role,
};

/// Why a token is not believed. The caller is told nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Whatever keys there are.
    #[error("{0}")]
    Never(&'static str),
    /// Its key is not in the set: it may be in the next one.
    #[error("unknown key")]
    UnknownKey,
}

/// Who a provider says that somebody is, and what it grants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The provider.
    pub issuer: String,
    /// Who it is there.
    pub subject: String,
    /// What the claims grant.
    pub roles: Vec<Role>,
    /// An id that no other token has.
    pub jti: Uuid,
    /// When the token was issued. Where a provider does not say: so long ago that every revocation concerns it.
    pub issued_at: OffsetDateTime,
    /// From when on it is good.
    pub begins_at: OffsetDateTime,
    /// When it expires. Where a provider does not say: when it has to be asked again.
    pub expires_at: OffsetDateTime,
    /// The certificate of the connections on which alone it is good (RFC 8705 §3).
    pub bound_to: Option<Fingerprint>,
}

impl Identity {
    /// Whether the token is good at `now`, by clocks that differ a little.
    pub fn is_in_time(&self, now: OffsetDateTime) -> bool {
        let leeway = Duration::seconds(LEEWAY);
        self.begins_at.saturating_sub(leeway) <= now && now < self.expires_at.saturating_add(leeway)
    }
}

/// What a bearer token looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// It has the three parts of a signed JWT.
    Jwt,
    /// Anything else that RFC 6750 §2.1 allows.
    Opaque,
    /// It is no token of any provider: too long, of other characters, encrypted, or a secret of ours, which nobody is
    /// shown.
    None,
}

/// The shape of a token. What is a damaged token of our own counts as a JWT, so that no provider is asked about it.
pub fn shape(token: &str) -> Shape {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/=".contains(&b);
    if token.is_empty()
        || token.len() > MAX_EXTERNAL_TOKEN_BYTES
        || !token.bytes().all(plain)
        || secret::is_ours(token)
    {
        return Shape::None;
    }
    match token.bytes().filter(|b| *b == b'.').count() {
        2 => Shape::Jwt,
        4 => Shape::None,
        _ => Shape::Opaque,
    }
}

/// Which token it says it is. Nothing of it is believed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// Whose.
    pub issuer: String,
    /// What becomes [`Identity::jti`] if it is believed.
    pub jti: Uuid,
}

impl Claimed {
    /// What a signed token says; `None` when it does not say whose it is.
    pub fn of(token: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Name {
            iss: String,
            jti: Option<String>,
        }
        let name = jsonwebtoken::dangerous::insecure_decode::<Name>(token).ok()?.claims;
        let jti = signed_id(&name.iss, name.jti.as_deref(), token);
        Some(Self { issuer: name.iss, jti })
    }
}

#[derive(Debug, Deserialize)]
struct Claims {
    exp: i64,
    iat: i64,
    nbf: Option<i64>,
    jti: Option<String>,
    cnf: Option<Value>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// RFC 7662 §2.2.
#[derive(Debug, Deserialize)]
struct Answer {
    active: bool,
    iss: Option<String>,
    aud: Option<Value>,
    exp: Option<i64>,
    iat: Option<i64>,
    nbf: Option<i64>,
    jti: Option<String>,
    cnf: Option<Value>,
    token_type: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

/// To which certificate a token is bound. One that is bound to anything else (RFC 7800) is no bearer token.
fn bound_to(cnf: Option<Value>) -> Result<Option<Fingerprint>, Refusal> {
    let confirmation = cnf.map(serde_json::from_value::<Confirmation>).transpose();
    let confirmation = confirmation.map_err(|_| Refusal::Never("bound to a key"))?;
    Ok(confirmation.map(|confirmation| confirmation.certificate))
}

impl Provider {
    /// Who a signed token speaks for at `now`.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn prove(&self, token: &str, keys: &KeySet, now: OffsetDateTime) -> Result<Identity, Refusal> {
        let refused = Refusal::Never;
        let header = jsonwebtoken::decode_header(token).map_err(|_| refused("header"))?;
        self.check_header(&header)?;
        let id = header.kid.as_deref().ok_or(refused("no kid"))?;
        if !keys.has(id) {
            return Err(Refusal::UnknownKey);
        }
        let key = keys.find(id, header.alg).ok_or(refused("the key is for another algorithm"))?;
        let mut validation = Validation::new(header.alg);
        // By the clock that is handed in, below.
        validation.validate_exp = false;
        validation.set_audience(&[&self.audience]);
        validation.set_issuer(&[&self.issuer]);
        validation.set_required_spec_claims(&["exp", "aud", "iss"]);
        let claims = jsonwebtoken::decode::<Claims>(token, key, &validation);
        let claims = claims.map_err(|_| refused("signature or claims"))?.claims;
        let bound_to = bound_to(claims.cnf)?;
        let lifetime = claims.exp.checked_sub(claims.iat);
        if !lifetime.is_some_and(|lifetime| (0..=EXTERNAL_LIFETIME.as_secs() as i64).contains(&lifetime)) {
            return Err(refused("lives too long"));
        }
        let jti = signed_id(&self.issuer, claims.jti.as_deref(), token);
        let identity = self.identity(jti, claims.rest, (Some(claims.iat), claims.nbf, claims.exp), now)?;
        Ok(Identity { bound_to, ..identity })
    }

    /// RFC 8725 §3.1, §3.10 and §3.11. A key that a token brings along, or an address where one would be, proves
    /// nothing and is never looked at.
    fn check_header(&self, header: &Header) -> Result<(), Refusal> {
        let refused = Refusal::Never;
        let kind = header.typ.as_deref().unwrap_or_default().to_ascii_lowercase();
        match kind.strip_prefix("application/").unwrap_or(&kind) {
            "at+jwt" => {}
            "jwt" if self.token_type == TokenType::Jwt => {}
            _ => return Err(refused("type")),
        }
        if header.crit.is_some()
            || header.jwk.is_some()
            || header.jku.is_some()
            || header.x5u.is_some()
            || header.x5c.is_some()
        {
            return Err(refused("header parameters"));
        }
        if !self.algorithms.contains(&header.alg) {
            return Err(refused("algorithm"));
        }
        Ok(())
    }

    /// What the provider's answer says of `token` at `now`.
    ///
    /// # Errors
    /// `None` when it is no answer at all; else see [`Refusal`].
    pub fn described(
        &self,
        token: &str,
        answer: &[u8],
        now: OffsetDateTime,
    ) -> Result<Identity, Option<Refusal>> {
        let answer: Answer = serde_json::from_slice(answer).map_err(|_| None)?;
        self.read(token, answer, now).map_err(Some)
    }

    fn read(&self, token: &str, answer: Answer, now: OffsetDateTime) -> Result<Identity, Refusal> {
        let refused = Refusal::Never;
        if !answer.active {
            return Err(refused("not active"));
        }
        if answer.iss.is_some_and(|issuer| issuer != self.issuer) {
            return Err(refused("of another issuer"));
        }
        // That it is active for somebody does not make it one for us.
        let is_for_us = match answer.aud {
            Some(Value::String(one)) => one == self.audience,
            Some(Value::Array(list)) => list.iter().any(|one| one.as_str() == Some(&self.audience)),
            _ => false,
        };
        if !is_for_us {
            return Err(refused("not for us"));
        }
        // Some providers describe refresh tokens too.
        if answer.token_type.is_some_and(|kind| !kind.eq_ignore_ascii_case("bearer")) {
            return Err(refused("type"));
        }
        let bound_to = bound_to(answer.cnf)?;
        let expires = answer.exp.unwrap_or((now + INTROSPECTION_CACHE).unix_timestamp());
        let times = (answer.iat, answer.nbf, expires);
        let jti = id(&self.issuer, answer.jti.as_deref().unwrap_or(token));
        Ok(Identity { bound_to, ..self.identity(jti, answer.rest, times, now)? })
    }

    fn identity(
        &self,
        jti: Uuid,
        claims: Map<String, Value>,
        (issued, begins, expires): (Option<i64>, Option<i64>, i64),
        now: OffsetDateTime,
    ) -> Result<Identity, Refusal> {
        let time =
            |seconds| OffsetDateTime::from_unix_timestamp(seconds).map_err(|_| Refusal::Never("times"));
        let claims = Value::Object(claims);
        let issued_at = time(issued.unwrap_or(0))?;
        let identity = Identity {
            issuer: self.issuer.clone(),
            subject: self.subject(&claims).ok_or(Refusal::Never("no subject"))?.into(),
            roles: self.roles(&claims),
            jti,
            issued_at,
            begins_at: begins.map(time).transpose()?.map_or(issued_at, |begins| begins.max(issued_at)),
            expires_at: time(expires)?,
            bound_to: None,
        };
        if identity.is_in_time(now) { Ok(identity) } else { Err(Refusal::Never("times")) }
    }
}

/// An id of ours for a signed token: from its `jti`, or else from what is signed, as an ECDSA signature has two forms.
fn signed_id(issuer: &str, jti: Option<&str>, token: &str) -> Uuid {
    let signed = || token.rsplit_once('.').map_or(token, |(signed, _)| signed);
    id(issuer, jti.unwrap_or_else(signed))
}

/// An id of ours for what is unique at a provider.
fn id(issuer: &str, unique: &str) -> Uuid {
    let mut hash = Context::new(&SHA256);
    for part in [issuer.as_bytes(), &[0], unique.as_bytes()] {
        hash.update(part);
    }
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.finish().as_ref()[..16]);
    Builder::from_custom_bytes(bytes).into_uuid()
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
    };
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    use dermflow_schemas::clock;
    use jsonwebtoken::{Algorithm, EncodingKey, jwk::Jwk};
    use serde_json::json;

    use super::*;
    use crate::provider::config::tests::{GOOD, read};

    struct Signer {
        key: EncodingKey,
        algorithm: Algorithm,
        jwk: Value,
    }

    impl Signer {
        fn new(algorithm: Algorithm) -> Self {
            let kind = match algorithm {
                Algorithm::ES256 => &ECDSA_P256_SHA256_FIXED_SIGNING,
                _ => &ECDSA_P384_SHA384_FIXED_SIGNING,
            };
            let pkcs8 = EcdsaKeyPair::generate_pkcs8(kind, &aws_lc_rs::rand::SystemRandom::new()).unwrap();
            let key = EncodingKey::from_ec_der(pkcs8.as_ref());
            let mut jwk = json!(Jwk::from_encoding_key(&key, algorithm).unwrap());
            jwk["kid"] = json!("1");
            Self { key, algorithm, jwk }
        }

        fn keys(&self, provider: &Provider) -> Result<KeySet, crate::provider::BadSet> {
            KeySet::parse(json!({"keys": [self.jwk]}).to_string().as_bytes(), provider)
        }

        fn sign(&self, change: impl FnOnce(&mut Header), claims: &Value) -> String {
            let mut header = Header::new(self.algorithm);
            (header.typ, header.kid) = (Some("at+jwt".into()), Some("1".into()));
            change(&mut header);
            jsonwebtoken::encode(&header, claims, &self.key).unwrap()
        }
    }

    fn provider() -> Provider {
        read(GOOD).unwrap().remove(0)
    }

    fn claims(provider: &Provider, now: OffsetDateTime) -> Value {
        let now = now.unix_timestamp();
        json!({"iss": provider.issuer, "aud": ["account", "https://dermflow.example"], "sub": "device-7", "jti": "j",
               "exp": now + 300, "iat": now, "realm_access": {"roles": ["dermflow-submit"]}})
    }

    #[test]
    fn a_good_token_says_who_and_what() {
        let (provider, signer, now) = (provider(), Signer::new(Algorithm::ES256), clock::now());
        let keys = signer.keys(&provider).unwrap();
        let good = claims(&provider, now);
        let identity = provider.prove(&signer.sign(|_| (), &good), &keys, now).unwrap();
        assert_eq!((identity.subject.as_str(), &identity.roles[..]), ("device-7", &[Role::Integrator][..]));
        let again = provider.prove(&signer.sign(|_| (), &good), &keys, now).unwrap();
        assert_eq!(again, identity, "another signature of the same");
        let later = now + Duration::seconds(301 + LEEWAY);
        assert!(!identity.is_in_time(later) && !identity.is_in_time(now - Duration::seconds(2 + LEEWAY)));
        let claimed = |claims: &Value| Claimed::of(&signer.sign(|_| (), claims));
        assert_eq!(claimed(&good), Some(Claimed { issuer: provider.issuer.clone(), jti: identity.jti }));
        for name in ["nbf", "jti"] {
            let mut without = good.clone();
            without.as_object_mut().unwrap().remove(name);
            let token = signer.sign(|_| (), &without);
            let jti = provider.prove(&token, &keys, now).unwrap_or_else(|_| panic!("without {name}")).jti;
            assert_eq!(Claimed::of(&token).unwrap().jti, jti, "without {name}");
        }
        let long_form = signer.sign(|h| h.typ = Some("application/AT+JWT".into()), &good);
        assert!(provider.prove(&long_form, &keys, now).is_ok());
    }

    #[test]
    fn a_claim_that_is_wrong_or_missing_is_refused() {
        let (provider, signer, now) = (provider(), Signer::new(Algorithm::ES256), clock::now());
        let keys = signer.keys(&provider).unwrap();
        let good = claims(&provider, now);
        for name in ["iss", "aud", "sub", "exp", "iat"] {
            let mut missing = good.clone();
            missing.as_object_mut().unwrap().remove(name);
            assert!(provider.prove(&signer.sign(|_| (), &missing), &keys, now).is_err(), "without {name}");
        }
        let seconds = now.unix_timestamp();
        let wrong = [
            ("iss", json!("https://other.example")),
            ("iss", json!(format!("{}/", provider.issuer))),
            ("aud", json!("other")),
            ("aud", json!([])),
            ("sub", json!(7)),
            ("exp", json!(seconds - 31)),
            ("exp", json!(seconds + 86_401)),
            ("exp", json!((seconds + 300).to_string())),
            ("exp", json!(seconds as f64 + 300.5)),
            ("exp", json!(-1)),
            ("exp", json!(u64::MAX)),
            ("iat", json!(seconds + 60)),
            ("iat", json!(i64::MIN)),
            ("nbf", json!(seconds + 60)),
            ("nbf", json!("now")),
            ("cnf", json!({"jkt": "x"})),
            ("cnf", json!({"jkt": "x", "x5t#S256": "A".repeat(43)})),
            ("cnf", json!({"x5t#S256": "A".repeat(42)})),
            ("cnf", json!({})),
        ];
        for (name, value) in wrong {
            let mut bad = good.clone();
            bad[name] = value.clone();
            assert!(provider.prove(&signer.sign(|_| (), &bad), &keys, now).is_err(), "{name} = {value}");
        }
        let mut bound = good.clone();
        bound["cnf"] = json!({"x5t#S256": "A".repeat(43)});
        let identity = provider.prove(&signer.sign(|_| (), &bound), &keys, now).unwrap();
        assert_eq!(identity.bound_to, Some([0; 32]));
    }

    #[test]
    fn a_header_decides_nothing() {
        let (provider, signer, now) = (provider(), Signer::new(Algorithm::ES256), clock::now());
        let keys = signer.keys(&provider).unwrap();
        let good = claims(&provider, now);
        let changes: [fn(&mut Header); 8] = [
            |h| h.typ = Some("JWT".into()),
            |h| h.typ = None,
            |h| h.kid = None,
            |h| h.kid = Some("2".into()),
            |h| h.crit = Some(vec!["exp".into()]),
            |h| h.jku = Some("https://attacker.example/keys".into()),
            |h| h.x5u = Some("https://attacker.example/certificate".into()),
            |h| h.x5c = Some(vec!["AA".into()]),
        ];
        for change in changes {
            assert!(provider.prove(&signer.sign(change, &good), &keys, now).is_err());
        }
        let own_key: Jwk = serde_json::from_value(signer.jwk.clone()).unwrap();
        assert!(provider.prove(&signer.sign(|h| h.jwk = Some(own_key), &good), &keys, now).is_err());
        let forged = Signer::new(Algorithm::ES256).sign(|_| (), &good);
        assert!(provider.prove(&forged, &keys, now).is_err(), "another key of the same id");
        let unknown = provider.prove(&signer.sign(|h| h.kid = Some("2".into()), &good), &keys, now);
        assert_eq!(unknown, Err(Refusal::UnknownKey));

        // The public key as a shared secret (RFC 8725 §2.1), and no signature at all.
        let public = signer.jwk.to_string();
        let mut header = Header::new(Algorithm::HS256);
        (header.typ, header.kid) = (Some("at+jwt".into()), Some("1".into()));
        let key = EncodingKey::from_secret(public.as_bytes());
        let forged = jsonwebtoken::encode(&header, &good, &key).unwrap();
        assert_eq!(provider.prove(&forged, &keys, now), Err(Refusal::Never("algorithm")));
        let body = URL_SAFE_NO_PAD.encode(good.to_string());
        for alg in ["none", "None", "ES384"] {
            let header = json!({"alg": alg, "typ": "at+jwt", "kid": "1"}).to_string();
            let token = format!("{}.{body}.", URL_SAFE_NO_PAD.encode(header));
            assert!(provider.prove(&token, &keys, now).is_err(), "{alg}");
        }
        // A key for an algorithm that the provider is not allowed is no key.
        assert!(!Signer::new(Algorithm::ES384).keys(&provider).unwrap().has("1"));
    }

    #[test]
    fn the_type_is_jwt_only_where_that_is_configured() {
        let text = GOOD.replacen("audience", "token_type = \"JWT\"\naudience", 1);
        let (provider, signer, now) =
            (read(&text).unwrap().remove(0), Signer::new(Algorithm::ES256), clock::now());
        let keys = signer.keys(&provider).unwrap();
        let good = claims(&provider, now);
        for (kind, taken) in [("JWT", true), ("at+jwt", true), ("logout+jwt", false), ("", false)] {
            let token = signer.sign(|h| h.typ = Some(kind.into()), &good);
            assert_eq!(provider.prove(&token, &keys, now).is_ok(), taken, "{kind}");
        }
    }

    #[test]
    fn a_changed_token_is_refused() {
        let (provider, signer, now) = (provider(), Signer::new(Algorithm::ES256), clock::now());
        let keys = signer.keys(&provider).unwrap();
        let token = signer.sign(|_| (), &claims(&provider, now));
        for i in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[i] = if bytes[i] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(provider.prove(&changed, &keys, now).is_err(), "at {i}");
        }
    }

    /// The order of the group of P-256 (SEC 2 §2.4.2).
    const ORDER: [u8; 32] = [
        0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa,
        0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
    ];

    /// Of an ECDSA signature there are two forms, (r, s) and (r, n - s): what is revoked in one is revoked in both.
    #[test]
    fn the_other_form_of_a_signature_makes_no_other_token() {
        let (provider, signer, now) = (provider(), Signer::new(Algorithm::ES256), clock::now());
        let keys = signer.keys(&provider).unwrap();
        let with_id = claims(&provider, now);
        let mut without_id = with_id.clone();
        without_id.as_object_mut().unwrap().remove("jti");
        for claims in [with_id, without_id] {
            let token = signer.sign(|_| (), &claims);
            let (body, signature) = token.rsplit_once('.').unwrap();
            let mut signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
            let mut borrow = 0;
            for (byte, order) in signature[32..].iter_mut().zip(ORDER).rev() {
                let difference = i16::from(order) - i16::from(*byte) - borrow;
                borrow = i16::from(difference < 0);
                *byte = difference.to_le_bytes()[0];
            }
            let twin = format!("{body}.{}", URL_SAFE_NO_PAD.encode(signature));
            assert_ne!(twin, token);
            assert_eq!(provider.prove(&twin, &keys, now), provider.prove(&token, &keys, now));
            assert!(provider.prove(&twin, &keys, now).is_ok(), "as good as the other");
        }
    }

    #[test]
    fn only_an_opaque_token_goes_to_the_provider() {
        for (token, expected) in [
            ("2YotnFZFEjr1zCsicMWpAA", Shape::Opaque),
            ("a.b", Shape::Opaque),
            ("a.b.c", Shape::Jwt),
            ("a.b.c.d.e", Shape::None),
            ("", Shape::None),
            ("a b", Shape::None),
            ("a\"b", Shape::None),
            ("dfc_2YotnFZFEjr1zCsicMWpAA", Shape::None),
            ("dfr_x", Shape::None),
        ] {
            assert_eq!(shape(token), expected, "{token}");
        }
        assert_eq!(shape(&"a".repeat(MAX_EXTERNAL_TOKEN_BYTES + 1)), Shape::None);
    }

    #[test]
    fn an_answer_about_a_token_is_checked_like_a_token() {
        let (provider, now) = (provider(), clock::now());
        let read = |answer: &Value| provider.described("opaque", answer.to_string().as_bytes(), now);
        let mut good = claims(&provider, now);
        (good["active"], good["token_type"]) = (json!(true), json!("Bearer"));
        let identity = read(&good).unwrap();
        assert_eq!((identity.subject.as_str(), &identity.roles[..]), ("device-7", &[Role::Integrator][..]));
        let mut sparse = good.clone();
        for name in ["iss", "exp", "iat", "jti", "token_type"] {
            sparse.as_object_mut().unwrap().remove(name);
        }
        let identity = read(&sparse).unwrap();
        assert_eq!(identity.issued_at, OffsetDateTime::UNIX_EPOCH, "every revocation concerns it");
        assert!(identity.expires_at <= now + INTROSPECTION_CACHE);
        // Midnight of 9999-12-31, which some providers take for never, and the first second that there is.
        let mut always = good.clone();
        (always["exp"], always["iat"]) = (json!(253_402_300_799_i64), json!(-377_705_116_800_i64));
        assert!(read(&always).is_ok());
        let seconds = now.unix_timestamp();
        for (name, value) in [
            ("active", json!(false)),
            ("iss", json!("https://other.example")),
            ("aud", json!("other")),
            ("aud", Value::Null),
            ("sub", Value::Null),
            ("token_type", json!("refresh_token")),
            ("token_type", json!("DPoP")),
            ("cnf", json!({"jkt": "x"})),
            ("exp", json!(seconds - 31)),
            ("nbf", json!(seconds + 60)),
        ] {
            let mut bad = good.clone();
            bad[name] = value.clone();
            assert!(matches!(read(&bad), Err(Some(_))), "{name} = {value}");
        }
        assert_eq!(read(&json!({"active": "true"})), Err(None));
        assert_eq!(provider.described("opaque", b"<html>", now), Err(None));
    }
}
