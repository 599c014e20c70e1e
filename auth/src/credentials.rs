//! What clients prove themselves with at the token endpoint: secrets, public keys (RFC 7523, as SMART Backend Services 2.2
//! profiles it), and certificates (RFC 8705 §2). An account may have several, so that one replaces another with an overlap.

use deadpool_postgres::Pool;
use dermflow_schemas::id::ClientId;
use jsonwebtoken::{
    Algorithm, DecodingKey, Validation,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk},
};
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;
use tokio_postgres::types::Json;
use uuid::Uuid;

use crate::{
    confirmation::Fingerprint,
    db::{self, DbError},
    secret,
    token::LEEWAY,
    users::{self, COLUMNS, OPEN, User},
};

/// How far ahead the expiry of an assertion may be, in seconds (SMART App Launch 2.2, "no more than five minutes").
const ASSERTION_SECONDS: i64 = 300;
/// The longest assertion that is looked at.
const MAX_ASSERTION_BYTES: usize = 8_192;
/// The longest `jti`.
const MAX_JTI_BYTES: usize = 255;
/// The shortest RSA modulus, in bytes: 2,048 bits (NIST SP 800-131A).
const MIN_RSA_BYTES: usize = 256;

/// Why a public key is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    /// Not a JWK (RFC 7517).
    #[error("not a JSON Web Key")]
    NotJwk,
    /// It has private parts.
    #[error("this is a private key: register the public one, and replace this one, as it has been shown")]
    Private,
    /// Neither for ES384 nor for RS384.
    #[error("a key has kty EC with crv P-384, or kty RSA with 2,048 bits or more")]
    Type,
    /// A file without a certificate.
    #[error("no certificate (PEM)")]
    NotCertificate,
    /// It has no id.
    #[error("a key has a kid of 1 to 255 bytes, none of them a control character")]
    NoId,
}

/// A public key that a client may sign assertions with.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct PublicKey(Value);

impl PublicKey {
    /// Checks a JWK.
    ///
    /// # Errors
    /// See [`BadKey`].
    pub fn parse(text: &str) -> Result<Self, BadKey> {
        let value: Value = serde_json::from_str(text).map_err(|_| BadKey::NotJwk)?;
        // PostgreSQL's jsonb has no NUL, whichever member it is in.
        if value.to_string().contains(r"\u0000") {
            return Err(BadKey::NotJwk);
        }
        if ["d", "p", "q", "dp", "dq", "qi", "k"].iter().any(|private| value.get(private).is_some()) {
            return Err(BadKey::Private);
        }
        let jwk: Jwk = serde_json::from_value(value.clone()).map_err(|_| BadKey::NotJwk)?;
        algorithm(&jwk).ok_or(BadKey::Type)?;
        DecodingKey::from_jwk(&jwk).map_err(|_| BadKey::NotJwk)?;
        match jwk.common.key_id {
            Some(id) if is_id(&id) => Ok(Self(value)),
            _ => Err(BadKey::NoId),
        }
    }
}

/// Whether a key may have this `kid`. PostgreSQL's text has no NUL.
fn is_id(kid: &str) -> bool {
    (1..=255).contains(&kid.len()) && !kid.contains(char::is_control)
}

/// The one algorithm that a key is for, whatever a header says.
fn algorithm(jwk: &Jwk) -> Option<Algorithm> {
    match &jwk.algorithm {
        AlgorithmParameters::EllipticCurve(key) if key.curve == EllipticCurve::P384 => Some(Algorithm::ES384),
        // Base64 of n bytes has 4n/3 characters.
        AlgorithmParameters::RSA(key) if key.n.len() * 3 / 4 >= MIN_RSA_BYTES => Some(Algorithm::RS384),
        _ => None,
    }
}

/// A client that has proved itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// The account.
    pub user: User,
    /// The secret, key or certificate.
    pub credential: Uuid,
    /// When that expires.
    pub ends: Option<OffsetDateTime>,
}

/// Checks a client's secret; `None` when it is wrong, or the account may not sign in.
///
/// # Errors
/// When the database is away.
pub async fn check_secret(
    pool: &Pool,
    client: ClientId,
    given: &SecretString,
    now: OffsetDateTime,
) -> Result<Option<Proof>, DbError> {
    find(pool, client, "secret_hash", &secret::hash(given), now).await
}

/// Checks the certificate of a client's connection, which its CA has signed; `None` when it is not one of the client's, or
/// the account may not sign in.
///
/// # Errors
/// When the database is away.
pub async fn check_certificate(
    pool: &Pool,
    client: ClientId,
    shown: &Fingerprint,
    now: OffsetDateTime,
) -> Result<Option<Proof>, DbError> {
    find(pool, client, "certificate", shown, now).await
}

/// The credential of a client that has `value` in a column.
async fn find(
    pool: &Pool,
    client: ClientId,
    column: &str,
    value: &[u8],
    now: OffsetDateTime,
) -> Result<Option<Proof>, DbError> {
    let select = format!(
        "SELECT {COLUMNS}, c.id AS credential, c.expires_at AS ends \
         FROM auth.credentials c JOIN auth.users ON users.id = c.account \
         WHERE c.account = $2 AND c.{column} = $3 AND (c.expires_at IS NULL OR c.expires_at > $1) AND {OPEN}"
    );
    let found = db::within(async {
        Ok::<_, DbError>(pool.get().await?.query_opt(&select, &[&now, &client.uuid(), &value]).await?)
    });
    let proof = found.await?.as_ref().and_then(proof);
    if let Some(Proof { user, credential, .. }) = proof {
        users::used(pool, user.client, Some(credential), now).await?;
    }
    Ok(proof)
}

fn proof(row: &tokio_postgres::Row) -> Option<Proof> {
    Some(Proof { user: User::read(row)?, credential: row.get("credential"), ends: row.get("ends") })
}

#[derive(Debug, Deserialize)]
struct Assertion {
    iss: Uuid,
    sub: Uuid,
    exp: i64,
    jti: String,
    #[serde(default)]
    nbf: Option<i64>,
    #[serde(default)]
    iat: Option<i64>,
}

/// Checks a client's assertion (RFC 7523 §3) for one of `audiences`; `None` when it is not good, was used before, or
/// the account may not sign in.
///
/// # Errors
/// When the database is away.
pub async fn check_assertion(
    pool: &Pool,
    assertion: &str,
    audiences: &[&str],
    now: OffsetDateTime,
) -> Result<Option<Proof>, DbError> {
    if assertion.len() > MAX_ASSERTION_BYTES {
        return Ok(None);
    }
    let Ok(header) = jsonwebtoken::decode_header(assertion) else { return Ok(None) };
    let (Some(kid), None) = (header.kid.filter(|kid| is_id(kid)), header.crit) else { return Ok(None) };
    // Whose key to look for; nothing of it is believed yet.
    let Some(claimed) = unproved(assertion) else { return Ok(None) };
    let select = format!(
        "SELECT {COLUMNS}, c.id AS credential, c.expires_at AS ends, c.jwk \
         FROM auth.credentials c JOIN auth.users ON users.id = c.account \
         WHERE c.account = $2 AND c.jwk->>'kid' = $3 AND (c.expires_at IS NULL OR c.expires_at > $1) AND {OPEN}"
    );
    let rows = db::within(async {
        Ok::<_, DbError>(pool.get().await?.query(&select, &[&now, &claimed, &kid]).await?)
    });
    let rows = rows.await?;
    let good = rows.iter().find_map(|row| {
        let Json(jwk): Json<Jwk> = row.get("jwk");
        let claims = verify(assertion, &jwk, audiences, now)?;
        (claims.sub == claimed).then_some((proof(row)?, claims))
    });
    let Some((proof, claims)) = good else { return Ok(None) };
    if !first_use(pool, &proof, &claims, now).await? {
        return Ok(None);
    }
    users::used(pool, proof.user.client, Some(proof.credential), now).await?;
    Ok(Some(proof))
}

fn unproved(assertion: &str) -> Option<Uuid> {
    let claims = jsonwebtoken::dangerous::insecure_decode::<Assertion>(assertion).ok()?.claims;
    Some(claims.sub)
}

fn verify(assertion: &str, jwk: &Jwk, audiences: &[&str], now: OffsetDateTime) -> Option<Assertion> {
    let mut validation = Validation::new(algorithm(jwk)?);
    // By the clock that is handed in, below.
    validation.validate_exp = false;
    validation.set_audience(audiences);
    validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
    let key = DecodingKey::from_jwk(jwk).ok()?;
    let claims = jsonwebtoken::decode::<Assertion>(assertion, &key, &validation).ok()?.claims;
    let now = now.unix_timestamp();
    let in_time = claims.exp > now - LEEWAY
        && claims.exp <= now + ASSERTION_SECONDS + LEEWAY
        && claims.nbf.is_none_or(|nbf| nbf <= now + LEEWAY)
        && claims.iat.is_none_or(|iat| iat <= now + LEEWAY);
    let named = claims.iss == claims.sub && (1..=MAX_JTI_BYTES).contains(&claims.jti.len());
    (in_time && named).then_some(claims)
}

/// Notes the assertion's id until it has expired; false when it was there.
async fn first_use(
    pool: &Pool,
    proof: &Proof,
    claims: &Assertion,
    now: OffsetDateTime,
) -> Result<bool, DbError> {
    let expires = now + time::Duration::seconds(ASSERTION_SECONDS + 2 * LEEWAY);
    let hash = secret::hash(&claims.jti.clone().into());
    db::within(async {
        let connection = pool.get().await?;
        connection.execute("DELETE FROM auth.assertions WHERE expires_at < $1", &[&now]).await?;
        let insert =
            "INSERT INTO auth.assertions (account, hash, expires_at) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
        Ok(connection.execute(insert, &[&proof.user.client.uuid(), &hash, &expires]).await? == 1)
    })
    .await
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_key_is_public_strong_and_named() {
        // RFC 7515 appendix A.4's size of coordinates, for P-384.
        let coordinate = "A".repeat(64);
        let good = json!({"kty": "EC", "crv": "P-384", "kid": "1", "x": coordinate, "y": coordinate});
        assert!(PublicKey::parse(&good.to_string()).is_ok());
        let cases = [
            ("d", json!("AA"), BadKey::Private),
            ("crv", json!("P-256"), BadKey::Type),
            ("kid", json!(""), BadKey::NoId),
            ("kid", json!("a\tb"), BadKey::NoId),
            ("kid", json!("a\0b"), BadKey::NotJwk),
            ("use", json!("a\0b"), BadKey::NotJwk),
            ("kty", json!("OKP"), BadKey::Type),
            ("x", json!("!"), BadKey::NotJwk),
        ];
        for (name, value, why) in cases {
            let mut bad = good.clone();
            bad[name] = value;
            assert_eq!(PublicKey::parse(&bad.to_string()).unwrap_err(), why, "{name}");
        }
        let short = json!({"kty": "RSA", "kid": "1", "e": "AQAB", "n": "A".repeat(171)});
        assert_eq!(PublicKey::parse(&short.to_string()).unwrap_err(), BadKey::Type);
        assert_eq!(PublicKey::parse("[]").unwrap_err(), BadKey::NotJwk);
    }
}
