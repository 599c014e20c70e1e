//! Refresh tokens (RFC 6749 §6, RFC 9700 §4.14.2): each is good once, none outlives its family, and a second use ends
//! the family, as one of the two who used it has stolen it.

use std::time::Duration;

use deadpool_postgres::Pool;
use dermflow_schemas::id::ClientId;
use secrecy::SecretString;
use time::OffsetDateTime;
use tokio_postgres::{Transaction, types::ToSql};
use uuid::Uuid;

use crate::{
    audit::{self, Action, Actor, Event, Object, Who},
    confirmation::Fingerprint,
    db::{self, DbError},
    revocation, scope,
    secret::{self, Kind, NoRandomness},
    users::{COLUMNS, OPEN, User},
};

/// How long a family lives from its first token on, at the longest.
pub const LIFETIME: Duration = Duration::from_hours(12);
/// Whose a refresh token `r` is, and the secret or key `c` that its family was begun with, unless that was a password.
const BEGUN_WITH: &str =
    "JOIN auth.users ON users.id = r.account LEFT JOIN auth.credentials c ON c.id = r.credential";
/// When such a family ends: none outlives its account, nor what it was begun with.
const ENDS: &str = "least(r.expires_at, c.expires_at, users.expires_at)";

/// Why there is no refresh token.
#[derive(Debug, thiserror::Error)]
pub enum RefreshError {
    /// See [`DbError`].
    #[error(transparent)]
    Db(#[from] DbError),
    /// See [`NoRandomness`].
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    /// The account or the credential was shut out since it proved itself.
    #[error("shut out meanwhile")]
    ShutOut,
}

/// What a refresh token was good for.
#[derive(Debug)]
pub struct Refreshed {
    /// The account.
    pub user: User,
    /// The family, with which tokens are revoked.
    pub family: Uuid,
    /// What was asked for, of what the family's tokens may be used for.
    pub scope: String,
    /// When the family ends.
    pub ends: OffsetDateTime,
    /// The family's next token.
    pub next: SecretString,
}

/// What came of a refresh token.
#[derive(Debug)]
pub enum Outcome {
    /// It was good.
    Good(Box<Refreshed>),
    /// It is good still: more was asked for than it may be used for.
    TooWide,
    /// It was used before: the family of this account is ended.
    Reused(ClientId),
    /// It is none, or no longer.
    Unknown,
}

/// The first token of a new family, for an account that has proved itself with `credential`; it goes on with the
/// certificate `bound_to` only, if there is one. Returns the family's id as well, and when it ends.
///
/// # Errors
/// [`RefreshError::ShutOut`] when the account or the credential has lost its access since; when the database is away.
pub async fn begin(
    pool: &Pool,
    user: User,
    credential: Uuid,
    bound_to: Option<Fingerprint>,
    scope: &str,
    now: OffsetDateTime,
) -> Result<(Uuid, OffsetDateTime, SecretString), RefreshError> {
    let (family, ends, token) = (Uuid::new_v4(), now + LIFETIME, secret::generate(Kind::Refresh)?);
    // Whoever shuts the account out meanwhile waits, or was faster and has changed what is asked for here.
    let lock = format!(
        "SELECT FROM auth.users WHERE id = $2 AND {OPEN} AND valid_after IS NOT DISTINCT FROM $3 \
         AND (NOT certificate_bound OR $4) FOR SHARE"
    );
    let insert = "INSERT INTO auth.refresh_tokens (hash, family, account, credential, scope, expires_at, certificate) \
                  SELECT $1, $2, $3, $4, $5, $6, $7 \
                  WHERE $4::uuid = $3::uuid OR EXISTS (SELECT FROM auth.credentials WHERE id = $4)";
    let begun = db::within(async {
        let mut connection = pool.get().await?;
        connection.execute("DELETE FROM auth.refresh_tokens WHERE expires_at < $1", &[&now]).await?;
        let transaction = connection.transaction().await?;
        let (hash, account) = (secret::hash(&token), user.client.uuid());
        if transaction
            .query_opt(&lock, &[&now, &account, &user.valid_after, &bound_to.is_some()])
            .await?
            .is_none()
        {
            return Ok(0);
        }
        let certificate = bound_to.as_ref().map(<[u8; 32]>::as_slice);
        let parameters: [&(dyn ToSql + Sync); 7] =
            [&hash, &family, &account, &credential, &scope, &ends, &certificate];
        let inserted = transaction.execute(insert, &parameters).await?;
        transaction.commit().await?;
        Ok::<_, DbError>(inserted)
    });
    if begun.await? == 1 { Ok((family, ends, token)) } else { Err(RefreshError::ShutOut) }
}

/// Uses a refresh token, for a client that has proved to be `client`, or that has proved nothing, and that asks for a
/// scope, on a connection with the certificate `shown`; it came from where `from` says. Of an account that is held to
/// certificates only a family that was begun with one goes on. What happens is in the audit trail in the same transaction.
///
/// # Errors
/// When the database is away: the token is as good as before.
pub async fn spend(
    pool: &Pool,
    token: &SecretString,
    client: Option<Uuid>,
    shown: Option<Fingerprint>,
    asked: Option<&str>,
    from: &Who,
    now: OffsetDateTime,
) -> Result<Outcome, RefreshError> {
    // Whose first token was not given for a password must prove itself again (RFC 6749 §6).
    let spend = format!(
        "WITH spent AS (UPDATE auth.refresh_tokens SET used_at = $1 \
           WHERE hash = $2 AND used_at IS NULL AND expires_at > $1 \
           AND CASE WHEN $3::uuid IS NULL THEN credential = account ELSE account = $3 END \
           AND (certificate IS NULL OR certificate = $4) RETURNING *) \
         SELECT {COLUMNS}, family, scope, {ENDS} AS ends FROM spent r {BEGUN_WITH} \
         WHERE {OPEN} AND (r.credential = r.account OR c.id IS NOT NULL) AND {ENDS} > $1 \
         AND (NOT certificate_bound OR r.certificate IS NOT NULL)"
    );
    let next = secret::generate(Kind::Refresh)?;
    let outcome = db::within(async {
        let mut connection = pool.get().await?;
        let transaction = connection.transaction().await?;
        let hash = secret::hash(token);
        lock(&transaction, &hash).await?;
        let select =
            "SELECT family, account, used_at IS NOT NULL AS used FROM auth.refresh_tokens WHERE hash = $1";
        let Some(known) = transaction.query_opt(select, &[&hash]).await? else { return Ok(Outcome::Unknown) };
        if known.get("used") {
            let (family, account): (Uuid, Uuid) = (known.get("family"), known.get("account"));
            transaction.execute("DELETE FROM auth.refresh_tokens WHERE family = $1", &[&family]).await?;
            revocation::within(&transaction, &[family], now).await?;
            let ended = event(Action::TokenRevoked, *from, account.into(), now);
            audit::insert(&transaction, &[ended]).await?;
            transaction.commit().await?;
            return Ok(Outcome::Reused(account.into()));
        }
        let shown = shown.as_ref().map(<[u8; 32]>::as_slice);
        if let Some(row) = transaction.query_opt(&spend, &[&now, &hash, &client, &shown]).await? {
            let insert = "INSERT INTO auth.refresh_tokens (hash, family, account, credential, scope, expires_at, \
                          certificate) SELECT $1, family, account, credential, scope, expires_at, certificate \
                          FROM auth.refresh_tokens WHERE hash = $2";
            transaction.execute(insert, &[&secret::hash(&next), &hash]).await?;
            let Some(user) = User::read(&row) else { return Ok(Outcome::Unknown) };
            let Some(scope) = scope::narrow(row.get("scope"), asked) else { return Ok(Outcome::TooWide) };
            let who = Who { actor: Actor::User(user.client), ..*from };
            audit::insert(&transaction, &[event(Action::Login, who, user.client, now)]).await?;
            transaction.commit().await?;
            let (family, ends) = (row.get("family"), row.get("ends"));
            return Ok(Outcome::Good(Box::new(Refreshed { user, family, scope, ends, next })));
        }
        Ok::<_, DbError>(Outcome::Unknown)
    });
    Ok(outcome.await?)
}

/// Takes the account of a refresh token, as the registry does before it touches any: two never wait for each other, and
/// who ends a family sees its latest token.
async fn lock(transaction: &Transaction<'_>, hash: &[u8]) -> Result<(), tokio_postgres::Error> {
    let lock = "SELECT FROM auth.users WHERE id = (SELECT account FROM auth.refresh_tokens WHERE hash = $1) \
                FOR NO KEY UPDATE";
    transaction.execute(lock, &[&hash]).await.map(drop)
}

fn event(action: Action, who: Who, account: ClientId, now: OffsetDateTime) -> Event {
    Event::new(action, who, now).client(Some(account)).object(Some(Object::account(account)))
}

/// Ends the family of a refresh token that belongs to `account` (RFC 7009 §2.1); false when there is none.
///
/// # Errors
/// When the database is away.
pub async fn end(
    pool: &Pool,
    token: &SecretString,
    account: Uuid,
    now: OffsetDateTime,
) -> Result<bool, DbError> {
    db::within(async {
        let mut connection = pool.get().await?;
        let transaction = connection.transaction().await?;
        let delete = "DELETE FROM auth.refresh_tokens WHERE family = \
                      (SELECT family FROM auth.refresh_tokens WHERE hash = $1 AND account = $2) RETURNING family";
        let hash = secret::hash(token);
        lock(&transaction, &hash).await?;
        let families = transaction.query(delete, &[&hash, &account]).await?;
        if let Some(row) = families.first() {
            revocation::within(&transaction, &[row.get(0)], now).await?;
        }
        transaction.commit().await?;
        Ok(!families.is_empty())
    })
    .await
}

/// Ends the families of `account` that were begun without a certificate, and what was given for them.
pub(crate) async fn end_unbound(
    transaction: &deadpool_postgres::Transaction<'_>,
    account: Uuid,
    now: OffsetDateTime,
) -> Result<(), tokio_postgres::Error> {
    let delete = "WITH ended AS (DELETE FROM auth.refresh_tokens WHERE account = $1 AND certificate IS NULL \
                  RETURNING family) SELECT DISTINCT family FROM ended";
    let families: Vec<Uuid> =
        transaction.query(delete, &[&account]).await?.iter().map(|row| row.get(0)).collect();
    revocation::within(transaction, &families, now).await
}

/// What RFC 7662 tells of a refresh token.
#[derive(Debug)]
pub struct Described {
    /// What the family's tokens may be used for.
    pub scope: String,
    /// When the family ends.
    pub ends: OffsetDateTime,
    /// The certificate with which alone it goes on.
    pub bound_to: Option<Fingerprint>,
}

/// Looks at a refresh token of `account` that may still be used.
///
/// # Errors
/// When the database is away.
pub async fn describe(
    pool: &Pool,
    token: &SecretString,
    account: Uuid,
    now: OffsetDateTime,
) -> Result<Option<Described>, DbError> {
    let select = format!(
        "SELECT scope, {ENDS} AS ends, r.certificate FROM auth.refresh_tokens r {BEGUN_WITH} \
         WHERE hash = $2 AND r.account = $3 AND used_at IS NULL AND {OPEN} \
         AND (r.credential = r.account OR c.id IS NOT NULL) AND {ENDS} > $1 \
         AND (NOT certificate_bound OR r.certificate IS NOT NULL)"
    );
    db::within(async {
        let row = pool.get().await?.query_opt(&select, &[&now, &secret::hash(token), &account]).await?;
        Ok(row.map(|row| Described {
            scope: row.get("scope"),
            ends: row.get("ends"),
            bound_to: row.get::<_, Option<Vec<u8>>>("certificate").and_then(|hash| hash.try_into().ok()),
        }))
    })
    .await
}
