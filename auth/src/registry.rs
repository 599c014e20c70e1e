//! The registration of accounts: everything that staff does to them, each act in one transaction with its entry in
//! the audit trail, and with one as well when it was not done. The registration service and the command line are two ways
//! into these functions.

mod identities;

use deadpool_postgres::{Pool, Transaction};
use dermflow_http::answer::Problem;
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    id::ClientId,
};
use secrecy::SecretString;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::json;
use time::{Duration, OffsetDateTime, UtcOffset};
use tokio_postgres::{Row, types::Json};
use uuid::Uuid;

use crate::{
    audit::{self, Action, Actor, Event, Object, Outcome, Who},
    confirmation::Fingerprint,
    credentials::{BadKey, PublicKey},
    db::{self, DbError},
    password::{self, PasswordError, Peppers},
    policy::{self, PolicyError},
    refresh, revocation,
    secret::{self, Kind, NoRandomness},
    users::{Quota, QuotaChange, Role, named, valid_name},
};

pub use identities::{ExternalIdentity, identities, link, unlink};

/// Accounts in one page when the caller names no number.
pub const PAGE: i64 = 50;
/// Accounts in one page.
pub const MAX_PAGE: i64 = 500;
/// Secrets and keys of one account.
const MAX_CREDENTIALS: i64 = 20;
/// How long the secrets that a rotation replaces stay good when nothing else is said.
pub const OVERLAP: Duration = Duration::days(7);

/// Why an act of registration did not happen. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The name is taken.
    #[error("the user {0} exists already")]
    Exists(String),
    /// No account has this name or id.
    #[error("there is no user {0}")]
    Unknown(String),
    /// The account has no such credential.
    #[error("there is no credential {0}")]
    UnknownCredential(Uuid),
    /// The name has the wrong form.
    #[error("a user name has 1 to 63 of a-z 0-9 . _ @ - and begins with a letter or digit")]
    BadName,
    /// A text or a number is not one that the named member may have.
    #[error("{1}")]
    BadValue(&'static str, &'static str),
    /// The moment has passed.
    #[error("an expiry lies in the future")]
    Past,
    /// The account has as many credentials as it may.
    #[error("an account has {MAX_CREDENTIALS} credentials at most")]
    TooMany,
    /// The subject is an account already.
    #[error("this subject is linked already")]
    Linked,
    /// The account is not that subject.
    #[error("this subject is not linked to the account")]
    NotLinked,
    /// The account, or the system, has as many subjects as it may.
    #[error("there are too many linked subjects")]
    TooManyIdentities,
    /// Only clients submit with a secret or a key.
    #[error("only an integrator has credentials besides its password")]
    NotAClient,
    /// There has been an administrator.
    #[error("the first administrator is registered already: others are registered by an administrator")]
    Bootstrapped,
    /// The last administrator that can sign in would go.
    #[error("this is the last administrator who can sign in")]
    LastAdministrator,
    /// See [`BadKey`].
    #[error(transparent)]
    Key(#[from] BadKey),
    /// See [`PasswordError`].
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// See [`PolicyError`].
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// See [`NoRandomness`].
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    /// See [`DbError`].
    #[error(transparent)]
    Db(#[from] DbError),
}

impl RegistryError {
    /// The stable code.
    pub fn code(&self) -> Code {
        match self {
            Self::Exists(_) => Code::AccountExists,
            Self::Unknown(_) | Self::UnknownCredential(_) | Self::NotLinked => Code::NotFound,
            Self::BadName | Self::BadValue(..) | Self::Past | Self::Key(_) => Code::ValueInvalid,
            Self::TooMany | Self::TooManyIdentities => Code::CredentialLimit,
            Self::Linked => Code::SubjectLinked,
            Self::NotAClient => Code::NotAClient,
            Self::Bootstrapped => Code::Bootstrapped,
            Self::LastAdministrator => Code::LastAdministrator,
            Self::Policy(_) => Code::PasswordRefused,
            Self::Password(PasswordError::Busy) => Code::Overloaded,
            Self::Password(PasswordError::Failed) | Self::NoRandomness(_) => Code::Internal,
            Self::Db(_) => Code::DatabaseUnavailable,
        }
    }

    /// The member of the request that is at fault.
    fn field(&self) -> Option<&'static str> {
        match self {
            Self::Exists(_) | Self::BadName => Some("name"),
            Self::BadValue(field, _) => Some(field),
            Self::Past => Some("expires_at"),
            Self::Key(BadKey::NotCertificate) => Some("certificate"),
            Self::Key(_) => Some("jwk"),
            Self::Policy(_) => Some("password"),
            _ => None,
        }
    }
}

impl From<RegistryError> for Problem {
    /// Causes that are ours go to the log, not to the caller.
    fn from(error: RegistryError) -> Self {
        let code = error.code();
        if code.kind().status >= 500 {
            tracing::warn!(%error, "registry");
            return code.into();
        }
        let mut answer = ApiError::from(code);
        if let Some(field) = error.field() {
            answer = answer.at(field).detail(error.to_string());
        }
        answer.into()
    }
}

impl From<tokio_postgres::Error> for RegistryError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Db(error.into())
    }
}

impl From<deadpool_postgres::PoolError> for RegistryError {
    fn from(error: deadpool_postgres::PoolError) -> Self {
        Self::Db(error.into())
    }
}

/// Whether an act that ends with `code` was not allowed; the others that do not succeed have failed.
pub fn refuses(code: Code) -> bool {
    matches!(code, Code::Bootstrapped | Code::LastAdministrator)
}

/// How an account stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It may sign in.
    Active,
    /// It was shut out.
    Disabled,
    /// Its time is over.
    Expired,
    /// It is gone, but for what the audit trail needs.
    Deleted,
}

impl std::str::FromStr for State {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "active" => Ok(Self::Active),
            "disabled" => Ok(Self::Disabled),
            "expired" => Ok(Self::Expired),
            "deleted" => Ok(Self::Deleted),
            _ => Err("not a state: active, disabled, expired or deleted"),
        }
    }
}

/// An account as staff sees it: no password, no secret, no hash.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct Account {
    /// Its id, which is the `client_id` of OAuth.
    pub id: Uuid,
    /// The name it signs in with.
    pub name: String,
    /// What it is for.
    pub role: String,
    /// How it stands.
    pub state: State,
    /// Whom to ask about it.
    pub contact: Option<String>,
    /// When it was registered.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// When it signed in last, to the hour.
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_used_at: Option<OffsetDateTime>,
    /// Whether only tokens that are bound to a client certificate are good (RFC 8705).
    pub certificate_bound: bool,
    /// What it may have open at once.
    pub quota: Quota,
}

/// A secret, key or certificate as staff sees it.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct Credential {
    /// Its id.
    pub id: Uuid,
    /// `secret`, `key` or `certificate`.
    pub kind: String,
    /// What staff calls it.
    pub label: String,
    /// When it was made.
    #[serde(with = "time::serde::rfc3339")]
    pub created_at: OffsetDateTime,
    /// When it expires.
    #[serde(with = "time::serde::rfc3339::option")]
    pub expires_at: Option<OffsetDateTime>,
    /// When it was used last, to the hour.
    #[serde(with = "time::serde::rfc3339::option")]
    pub last_used_at: Option<OffsetDateTime>,
}

/// An account to be.
#[derive(Debug)]
pub struct NewAccount<'a> {
    /// The name it signs in with.
    pub name: &'a str,
    /// What it is for.
    pub role: Role,
    /// Whom to ask about it, 1 to 200 characters.
    pub contact: Option<&'a str>,
    /// When it expires.
    pub expires_at: Option<OffsetDateTime>,
}

/// A secret or key that was given to a client.
#[derive(Debug)]
pub struct Given {
    /// The client's id.
    pub client: ClientId,
    /// The credential's id.
    pub credential: Uuid,
    /// The secret, which is kept nowhere in clear; `None` for a key or a certificate.
    pub secret: Option<SecretString>,
}

/// Changes of an account; what is left out stays as it is.
#[derive(Debug, Clone, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// What it is for. With another one its tokens are refused from then on.
    pub role: Option<Role>,
    /// Whom to ask about it, 1 to 200 characters; null for nobody.
    #[serde(default, deserialize_with = "named")]
    #[schema(value_type = Option<String>)]
    pub contact: Option<Option<String>>,
    /// When it expires (RFC 3339); null for never.
    #[serde(default, deserialize_with = "named_moment")]
    #[schema(value_type = Option<OffsetDateTime>)]
    pub expires_at: Option<Option<OffsetDateTime>>,
    /// Whether it is shut out.
    pub disabled: Option<bool>,
    /// Whether only tokens that are bound to a client certificate are good (RFC 8705).
    pub certificate_bound: Option<bool>,
    /// What it may have open at once; null, as a whole or for a number, for what the build gives.
    #[serde(default, deserialize_with = "quota")]
    #[schema(value_type = Option<QuotaChange>)]
    pub quota: QuotaChange,
}

fn quota<'de, D: Deserializer<'de>>(deserializer: D) -> Result<QuotaChange, D::Error> {
    Option::deserialize(deserializer).map(|quota| quota.unwrap_or(QuotaChange::DEFAULT))
}

#[expect(clippy::option_option, reason = "left out, null and a value are three things")]
fn named_moment<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Option<OffsetDateTime>>, D::Error> {
    time::serde::rfc3339::option::deserialize(deserializer).map(Some)
}

/// Which accounts to list.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// With this role.
    pub role: Option<Role>,
    /// That stand like this; none but deleted ones when it is left out.
    pub state: Option<State>,
    /// Whose names begin like this.
    pub name: Option<String>,
    /// Not used since then, and registered before.
    pub unused_since: Option<OffsetDateTime>,
    /// Whose names come after this one.
    pub after: Option<String>,
    /// How many, 1 to [`MAX_PAGE`].
    pub limit: i64,
}

const COLUMNS: &str = "id, username, role, contact, created_at, expires_at, last_used_at, certificate_bound, \
                       quota_jobs, quota_bytes, quota_running, weight, quota_requests, quota_images, retention_days, \
                       CASE WHEN deleted_at IS NOT NULL THEN 'deleted' \
                       WHEN disabled THEN 'disabled' WHEN expires_at <= now() THEN 'expired' ELSE 'active' END AS state";

fn account(row: &Row) -> Account {
    Account {
        id: row.get("id"),
        name: row.get("username"),
        role: row.get("role"),
        state: row.get::<_, &str>("state").parse().unwrap_or(State::Disabled),
        contact: row.get("contact"),
        created_at: row.get("created_at"),
        expires_at: row.get("expires_at"),
        last_used_at: row.get("last_used_at"),
        certificate_bound: row.get("certificate_bound"),
        quota: Quota::read(row),
    }
}

/// Registers an account with a generated password, which is returned and kept nowhere in clear.
///
/// # Errors
/// When the name is taken or something is malformed, or the database is away.
pub async fn create(
    pool: &Pool,
    peppers: &Peppers,
    actor: &Who,
    new: &NewAccount<'_>,
    now: OffsetDateTime,
) -> Result<(ClientId, SecretString), RegistryError> {
    let act = Act { actor, action: Action::UserCreated, who: new.name, now };
    act.run(pool, async |transaction| insert(transaction, peppers, &act, new).await).await
}

/// Registers the first administrator. It works once, however many accounts are deleted later.
///
/// # Errors
/// [`RegistryError::Bootstrapped`] when there has been one, and as [`create`].
pub async fn bootstrap(
    pool: &Pool,
    peppers: &Peppers,
    actor: &Who,
    name: &str,
    now: OffsetDateTime,
) -> Result<(ClientId, SecretString), RegistryError> {
    let act = Act { actor, action: Action::UserCreated, who: name, now };
    act.run(pool, async |transaction| {
        // Two at once: the second waits, then finds the first.
        transaction.batch_execute("LOCK TABLE auth.users IN SHARE ROW EXCLUSIVE MODE").await?;
        let select = "SELECT EXISTS (SELECT FROM auth.users WHERE role = 'administrator')";
        if transaction.query_one(select, &[]).await?.get(0) {
            return Err(RegistryError::Bootstrapped);
        }
        let new = NewAccount { name, role: Role::Administrator, contact: None, expires_at: None };
        insert(transaction, peppers, &act, &new).await
    })
    .await
}

async fn insert(
    transaction: &Transaction<'_>,
    peppers: &Peppers,
    act: &Act<'_>,
    new: &NewAccount<'_>,
) -> Result<(ClientId, SecretString), RegistryError> {
    // What could be taken for another account's id, or for a deleted one.
    let misleads = new.name.starts_with("deleted-") || Uuid::parse_str(new.name).is_ok();
    if !valid_name(new.name) || misleads {
        return Err(RegistryError::BadName);
    }
    check_contact(new.contact)?;
    check_expiry(new.expires_at, act.now)?;
    let password = password::generate()?;
    let (id, hash) = (Uuid::new_v4(), password::hash(&password, peppers)?);
    let insert = "INSERT INTO auth.users (id, username, password_hash, created_at, role, contact, expires_at) \
                  VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (username) DO NOTHING";
    let NewAccount { name, role, contact, expires_at } = new;
    let role = role.as_str();
    let inserted =
        transaction.execute(insert, &[&id, name, &hash, &act.now, &role, contact, expires_at]).await?;
    if inserted == 0 {
        return Err(RegistryError::Exists(new.name.into()));
    }
    let event = act.event(Some(id)).with(json!({ "role": role }));
    audit::insert(transaction, &[event]).await?;
    Ok((id.into(), password))
}

/// A page of accounts by name. Who looked is in the trail before anybody sees it.
///
/// # Errors
/// When the database is away.
pub async fn list(
    pool: &Pool,
    actor: &Who,
    filter: &Filter,
    now: OffsetDateTime,
) -> Result<Vec<Account>, RegistryError> {
    let select = format!(
        "SELECT * FROM (SELECT {COLUMNS}, coalesce(last_used_at, created_at) AS seen FROM auth.users) accounts \
         WHERE ($1::text IS NULL OR role = $1) AND CASE WHEN $2::text IS NULL THEN state <> 'deleted' ELSE state = $2 END \
         AND ($3::text IS NULL OR starts_with(username, $3)) AND ($4::timestamptz IS NULL OR seen < $4) \
         AND ($5::text IS NULL OR username > $5) ORDER BY username LIMIT $6"
    );
    let role = filter.role.map(Role::as_str);
    let state = filter.state.and_then(|state| serde_json::to_value(state).ok());
    let state = state.as_ref().and_then(|state| state.as_str());
    let limit = filter.limit.clamp(1, MAX_PAGE);
    // What PostgreSQL takes for no text begins no name.
    if [&filter.name, &filter.after].into_iter().flatten().any(|text| text.contains('\0')) {
        return Ok(Vec::new());
    }
    db::within(async {
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
            [&role, &state, &filter.name, &filter.unused_since, &filter.after, &limit];
        let connection = pool.get().await?;
        let rows = connection.query(&select, &parameters).await?;
        let event = Event::new(Action::AccountRead, *actor, now).detail(json!({ "accounts": rows.len() }));
        audit::insert(&connection, &[by_hand(event)]).await?;
        Ok(rows.iter().map(account).collect())
    })
    .await
}

/// An account by its name or id, and its secrets and keys. Who looked is in the trail before anybody sees it.
///
/// # Errors
/// When there is none, or the database is away.
pub async fn get(
    pool: &Pool,
    actor: &Who,
    who: &str,
    now: OffsetDateTime,
) -> Result<(Account, Vec<Credential>), RegistryError> {
    let select = format!("SELECT {COLUMNS} FROM auth.users WHERE username = $1 OR id::text = $1");
    let credentials = "SELECT id, label, CASE WHEN jwk IS NOT NULL THEN 'key' WHEN certificate IS NOT NULL \
                       THEN 'certificate' ELSE 'secret' END AS kind, created_at, expires_at, last_used_at \
                       FROM auth.credentials WHERE account = $1 ORDER BY created_at";
    let act = Act { actor, action: Action::AccountRead, who, now };
    act.run(pool, async |transaction| {
        let row = transaction.query_opt(&select, &[&known(who)?]).await?;
        let account = row.as_ref().map(account).ok_or_else(|| RegistryError::Unknown(who.into()))?;
        let rows = transaction.query(credentials, &[&account.id]).await?;
        act.note(transaction, account.id).await?;
        Ok((account, rows.iter().map(credential).collect()))
    })
    .await
}

fn credential(row: &Row) -> Credential {
    Credential {
        id: row.get("id"),
        kind: row.get("kind"),
        label: row.get("label"),
        created_at: row.get("created_at"),
        expires_at: row.get("expires_at"),
        last_used_at: row.get("last_used_at"),
    }
}

/// Changes an account. Ingress knows it within a second, workers with the account's next jobs.
///
/// # Errors
/// When there is no such account, something is malformed, or the database is away.
pub async fn change(
    pool: &Pool,
    actor: &Who,
    who: &str,
    change: &Change,
    now: OffsetDateTime,
) -> Result<(), RegistryError> {
    let action = match (change.role, change.disabled) {
        (None, Some(true)) => Action::UserDisabled,
        (None, Some(false)) => Action::UserEnabled,
        _ => Action::UserChanged,
    };
    let act = Act { actor, action, who, now };
    act.run(pool, async |transaction| {
        check_contact(change.contact.as_ref().and_then(Option::as_deref))?;
        check_expiry(change.expires_at.flatten(), now)?;
        change.quota.check().map_err(|text| RegistryError::BadValue("quota", text))?;
        let id = find(transaction, who).await?;
        let now = clock::now();
        let select = format!("SELECT {COLUMNS} FROM auth.users WHERE id = $1");
        let old = transaction.query_one(&select, &[&id]).await?;
        let new_role = change.role.filter(|role| role.as_str() != old.get::<_, &str>("role"));
        let loses_access = change.disabled == Some(true) || new_role.is_some();
        if change.disabled == Some(true) || new_role.is_some_and(|role| role != Role::Administrator) {
            keep_an_administrator(transaction, id).await?;
        }
        if new_role.is_some() {
            // Only an integrator has any: whoever was one must not get tokens of the new role with them.
            let delete = "DELETE FROM auth.credentials WHERE account = $1";
            transaction.execute(delete, &[&id]).await?;
        }
        let QuotaChange { jobs, bytes, running, weight, requests, images, retention_days } = change.quota;
        let update = "UPDATE auth.users SET role = coalesce($2, role), \
                      contact = CASE WHEN $13 THEN $3 ELSE contact END, \
                      expires_at = CASE WHEN $14 THEN $4 ELSE expires_at END, disabled = coalesce($5, disabled), \
                      valid_after = CASE WHEN $2 <> role OR $5 THEN greatest($6, valid_after + interval '1 second') ELSE valid_after END, \
                      quota_jobs = $7, quota_bytes = $8, quota_running = $9, weight = $10, quota_requests = $11, \
                      quota_images = $12, certificate_bound = coalesce($15, certificate_bound), retention_days = $16 \
                      WHERE id = $1";
        let role = change.role.map(Role::as_str);
        transaction
            .execute(
                update,
                &[
                    &id,
                    &role,
                    &change.contact.as_ref().and_then(Option::as_deref),
                    &change.expires_at.flatten(),
                    &change.disabled,
                    &now,
                    &jobs.unwrap_or_else(|| old.get("quota_jobs")),
                    &bytes.unwrap_or_else(|| old.get("quota_bytes")),
                    &running.unwrap_or_else(|| old.get("quota_running")),
                    &weight.unwrap_or_else(|| old.get("weight")),
                    &requests.unwrap_or_else(|| old.get("quota_requests")),
                    &images.unwrap_or_else(|| old.get("quota_images")),
                    &change.contact.is_some(),
                    &change.expires_at.is_some(),
                    &change.certificate_bound,
                    &retention_days.unwrap_or_else(|| old.get("retention_days")),
                ],
            )
            .await?;
        if loses_access {
            forget(transaction, id).await?;
        }
        if change.certificate_bound == Some(true) {
            refresh::end_unbound(transaction, id, now).await?;
        }
        let event = act.event(Some(id)).with(json!({
            "role": change.role, "disabled": change.disabled,
            "certificate_bound": change.certificate_bound, "contact": change.contact.is_some(),
            "expires_at": change.expires_at.map(|at| at.map(OffsetDateTime::unix_timestamp)),
            "quota": (change.quota != QuotaChange::default()).then_some(change.quota),
        }));
        Ok(audit::insert(transaction, &[event]).await?)
    })
    .await
}

/// Deletes an account: nothing personal stays, nothing that it holds is good any more, and its id is never used again.
///
/// # Errors
/// When there is no such account, or the database is away.
pub async fn delete(pool: &Pool, actor: &Who, who: &str, now: OffsetDateTime) -> Result<(), RegistryError> {
    let act = Act { actor, action: Action::UserDeleted, who, now };
    act.run(pool, async |transaction| {
        let id = find(transaction, who).await?;
        keep_an_administrator(transaction, id).await?;
        let update = "UPDATE auth.users SET username = 'deleted-' || id, contact = NULL, password_hash = NULL, \
                      deleted_at = $2, valid_after = $2 WHERE id = $1";
        transaction.execute(update, &[&id, &now]).await?;
        for table in ["credentials", "external_identities"] {
            let delete = format!("DELETE FROM auth.{table} WHERE account = $1");
            transaction.execute(&delete, &[&id]).await?;
        }
        forget(transaction, id).await?;
        act.note(transaction, id).await
    })
    .await
}

/// Gives an account a new password, `chosen` or generated, which is returned. Everything that was given for the old one
/// is refused from then on.
///
/// # Errors
/// When there is no such account, the password is not good enough, or the database is away.
pub async fn set_password(
    pool: &Pool,
    peppers: &Peppers,
    actor: &Who,
    who: &str,
    chosen: Option<SecretString>,
    now: OffsetDateTime,
) -> Result<SecretString, RegistryError> {
    let is_chosen = chosen.is_some();
    let act = Act { actor, action: Action::PasswordSet, who, now };
    act.run(pool, async |transaction| {
        let password = chosen.map_or_else(password::generate, Ok)?;
        let hash = password::hash(&password, peppers)?;
        let id = find(transaction, who).await?;
        if is_chosen {
            let select = "SELECT username, coalesce(contact, '') FROM auth.users WHERE id = $1";
            let row = transaction.query_one(select, &[&id]).await?;
            policy::check(&password, &[row.get(0), row.get(1)])?;
        }
        let update = "UPDATE auth.users SET password_hash = $2, \
                      valid_after = greatest($3, valid_after + interval '1 second') WHERE id = $1";
        transaction.execute(update, &[&id, &hash, &clock::now()]).await?;
        forget(transaction, id).await?;
        act.note(transaction, id).await?;
        Ok(password)
    })
    .await
}

/// Ends everything that an account was given: tokens, refresh tokens, sessions. It may sign in again.
///
/// # Errors
/// When there is no such account, or the database is away.
pub async fn revoke_all(
    pool: &Pool,
    actor: &Who,
    who: &str,
    now: OffsetDateTime,
) -> Result<(), RegistryError> {
    let act = Act { actor, action: Action::SessionsRevoked, who, now };
    act.run(pool, async |transaction| {
        let id = find(transaction, who).await?;
        let update = "UPDATE auth.users SET valid_after = greatest($2, valid_after + interval '1 second') WHERE id = $1";
        transaction.execute(update, &[&id, &clock::now()]).await?;
        forget(transaction, id).await?;
        act.note(transaction, id).await
    })
    .await
}

/// A new secret for a client, which is returned and kept nowhere in clear.
///
/// # Errors
/// When there is no such client, it has too many, something is malformed, or the database is away.
pub async fn add_secret(
    pool: &Pool,
    actor: &Who,
    who: &str,
    label: &str,
    expires_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> Result<Given, RegistryError> {
    let secret = secret::generate(Kind::Client)?;
    let act = Act { actor, action: Action::CredentialAdded, who, now };
    act.run(pool, async |transaction| {
        let account = find(transaction, who).await?;
        add(transaction, &act, account, label, Proves::Secret(secret), expires_at).await
    })
    .await
}

/// Registers a public key of a client.
///
/// # Errors
/// As [`add_secret`].
pub async fn add_key(
    pool: &Pool,
    actor: &Who,
    who: &str,
    label: &str,
    key: &PublicKey,
    expires_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> Result<Given, RegistryError> {
    let act = Act { actor, action: Action::CredentialAdded, who, now };
    act.run(pool, async |transaction| {
        let account = find(transaction, who).await?;
        add(transaction, &act, account, label, Proves::Key(key), expires_at).await
    })
    .await
}

/// Registers a certificate of a client: who shows it need prove nothing else.
///
/// # Errors
/// As [`add_secret`].
pub async fn add_certificate(
    pool: &Pool,
    actor: &Who,
    who: &str,
    label: &str,
    certificate: &Fingerprint,
    expires_at: Option<OffsetDateTime>,
    now: OffsetDateTime,
) -> Result<Given, RegistryError> {
    let act = Act { actor, action: Action::CredentialAdded, who, now };
    act.run(pool, async |transaction| {
        let account = find(transaction, who).await?;
        add(transaction, &act, account, label, Proves::Certificate(certificate), expires_at).await
    })
    .await
}

/// A new secret in the place of all that a client has, which stay good for `overlap`; without one, they and every token
/// that was given for them end as with [`remove_credential`].
///
/// # Errors
/// As [`add_secret`].
pub async fn rotate(
    pool: &Pool,
    actor: &Who,
    who: &str,
    overlap: Duration,
    now: OffsetDateTime,
) -> Result<Given, RegistryError> {
    let secret = secret::generate(Kind::Client)?;
    let act = Act { actor, action: Action::CredentialAdded, who, now };
    act.run(pool, async |transaction| {
        let account = find(transaction, who).await?;
        if overlap.is_positive() {
            let update = "UPDATE auth.credentials SET expires_at = least(coalesce(expires_at, $2), $2) \
                          WHERE account = $1 AND secret_hash IS NOT NULL";
            transaction.execute(update, &[&account, &(now + overlap)]).await?;
        } else {
            let delete =
                "DELETE FROM auth.credentials WHERE account = $1 AND secret_hash IS NOT NULL RETURNING id";
            end_tokens(transaction, &transaction.query(delete, &[&account]).await?, now).await?;
        }
        add(transaction, &act, account, "rotated", Proves::Secret(secret), None).await
    })
    .await
}

enum Proves<'a> {
    Secret(SecretString),
    Key(&'a PublicKey),
    Certificate(&'a Fingerprint),
}

async fn add(
    transaction: &Transaction<'_>,
    act: &Act<'_>,
    account: Uuid,
    label: &str,
    proves: Proves<'_>,
    expires_at: Option<OffsetDateTime>,
) -> Result<Given, RegistryError> {
    check_text("label", label, 100, "a label has 1 to 100 characters, none of them a control character")?;
    check_expiry(expires_at, act.now)?;
    // No token outlives its credential.
    let expired = "DELETE FROM auth.credentials WHERE account = $1 AND expires_at <= $2";
    transaction.execute(expired, &[&account, &act.now]).await?;
    let select = "SELECT role = 'integrator' AS client, (SELECT count(*) FROM auth.credentials WHERE account = $1) \
                  FROM auth.users WHERE id = $1";
    let row = transaction.query_one(select, &[&account]).await?;
    if !row.get::<_, bool>(0) {
        return Err(RegistryError::NotAClient);
    }
    if row.get::<_, i64>(1) >= MAX_CREDENTIALS {
        return Err(RegistryError::TooMany);
    }
    let (hash, jwk, certificate, secret) = match proves {
        Proves::Secret(secret) => (Some(secret::hash(&secret)), None, None, Some(secret)),
        Proves::Key(key) => (None, Some(Json(key)), None, None),
        Proves::Certificate(certificate) => (None, None, Some(certificate.as_slice()), None),
    };
    let id = Uuid::new_v4();
    let insert = "INSERT INTO auth.credentials (id, account, label, secret_hash, jwk, certificate, created_at, \
                  expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 8] =
        [&id, &account, &label, &hash, &jwk, &certificate, &act.now, &expires_at];
    transaction.execute(insert, &parameters).await?;
    act.note(transaction, account).await?;
    Ok(Given { client: account.into(), credential: id, secret })
}

/// Removes a secret, key or certificate; every token that was given for it is refused within a second.
///
/// # Errors
/// When there is no such account or credential, or the database is away.
pub async fn remove_credential(
    pool: &Pool,
    actor: &Who,
    who: &str,
    credential: Uuid,
    now: OffsetDateTime,
) -> Result<(), RegistryError> {
    let act = Act { actor, action: Action::CredentialRemoved, who, now };
    act.run(pool, async |transaction| {
        let account = find(transaction, who).await?;
        let delete = "DELETE FROM auth.credentials WHERE account = $1 AND id = $2 RETURNING id";
        let gone = transaction.query(delete, &[&account, &credential]).await?;
        if gone.is_empty() {
            return Err(RegistryError::UnknownCredential(credential));
        }
        end_tokens(transaction, &gone, now).await?;
        act.note(transaction, account).await
    })
    .await
}

/// Ends everything that was given for credentials that are `gone`: access tokens, and families of refresh tokens with
/// theirs.
async fn end_tokens(
    transaction: &Transaction<'_>,
    gone: &[Row],
    now: OffsetDateTime,
) -> Result<(), RegistryError> {
    let mut ids: Vec<Uuid> = gone.iter().map(|row| row.get(0)).collect();
    let families = "DELETE FROM auth.refresh_tokens WHERE credential = ANY($1) RETURNING family";
    let families = transaction.query(families, &[&ids]).await?;
    ids.extend(families.iter().map(|row| row.get::<_, Uuid>(0)));
    ids.sort_unstable();
    ids.dedup();
    Ok(revocation::within(transaction, &ids, now).await?)
}

/// One act: who does what to which account, by its name or id, and when.
#[derive(Debug, Clone, Copy)]
struct Act<'a> {
    actor: &'a Who,
    action: Action,
    who: &'a str,
    now: OffsetDateTime,
}

impl Act<'_> {
    /// Does it in one transaction; what was not done is in the trail too.
    async fn run<T>(
        &self,
        pool: &Pool,
        work: impl AsyncFnOnce(&Transaction<'_>) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let done = db::within(async {
            let mut connection = pool.get().await?;
            let transaction = connection.transaction().await?;
            let done = work(&transaction).await?;
            transaction.commit().await?;
            Ok(done)
        });
        let done: Result<T, RegistryError> = done.await;
        match &done {
            Ok(_) => {}
            Err(error) => self.note_failure(pool, error.code()).await,
        }
        done
    }

    /// The entry in the audit trail.
    async fn note(&self, transaction: &Transaction<'_>, account: Uuid) -> Result<(), RegistryError> {
        Ok(audit::insert(transaction, &[self.event(Some(account))]).await?)
    }

    async fn note_failure(&self, pool: &Pool, code: Code) {
        let outcome = if refuses(code) { Outcome::Refused } else { Outcome::Failed };
        let noted = db::within(async {
            let connection = pool.get().await?;
            let select = "SELECT id FROM auth.users WHERE username = $1 OR id::text = $1";
            let row = connection.query_opt(select, &[&known(self.who).unwrap_or_default()]).await?;
            let event = self.event(row.map(|row| row.get(0))).outcome(outcome, code);
            Ok::<_, RegistryError>(audit::insert(&connection, &[event]).await?)
        });
        if let Err(error) = noted.await {
            tracing::error!(%error, action = self.action.as_str(), "not in the audit trail");
        }
    }

    fn event(&self, account: Option<Uuid>) -> Event {
        let account = account.map(ClientId::from);
        let event = Event::new(self.action, *self.actor, self.now).client(account);
        by_hand(event.object(account.map(Object::account)))
    }
}

/// With what is known of the person behind the command line.
fn by_hand(event: Event) -> Event {
    let by_command = event.who.actor == Actor::Part(audit::COMMAND);
    if by_command { event.detail(audit::command_detail()) } else { event }
}

/// A name or id that an account could have: PostgreSQL takes no NUL.
fn known(who: &str) -> Result<&str, RegistryError> {
    if who.contains('\0') { Err(RegistryError::Unknown(String::new())) } else { Ok(who) }
}

/// The id of an account by its name or id, locked until the transaction ends.
async fn find(transaction: &Transaction<'_>, who: &str) -> Result<Uuid, RegistryError> {
    let select =
        "SELECT id FROM auth.users WHERE (username = $1 OR id::text = $1) AND deleted_at IS NULL FOR UPDATE";
    let row = transaction.query_opt(select, &[&known(who)?]).await?;
    row.map(|row| row.get(0)).ok_or_else(|| RegistryError::Unknown(who.into()))
}

/// Ends what an account can get new tokens with, but for its credentials.
async fn forget(transaction: &Transaction<'_>, account: Uuid) -> Result<(), RegistryError> {
    transaction.execute("DELETE FROM auth.refresh_tokens WHERE account = $1", &[&account]).await?;
    transaction.execute("DELETE FROM auth.sessions WHERE account = $1", &[&account]).await?;
    Ok(())
}

/// Refuses what would leave nobody who can register anybody.
async fn keep_an_administrator(transaction: &Transaction<'_>, id: Uuid) -> Result<(), RegistryError> {
    transaction.batch_execute("LOCK TABLE auth.users IN SHARE ROW EXCLUSIVE MODE").await?;
    let select = "SELECT role = 'administrator' AND NOT EXISTS (SELECT FROM auth.users other \
                  WHERE other.role = 'administrator' AND other.id <> $1 AND NOT other.disabled \
                  AND other.deleted_at IS NULL AND coalesce(other.expires_at > now(), true)) \
                  FROM auth.users WHERE id = $1";
    let last: bool = transaction.query_one(select, &[&id]).await?.get(0);
    if last { Err(RegistryError::LastAdministrator) } else { Ok(()) }
}

fn check_contact(contact: Option<&str>) -> Result<(), RegistryError> {
    let rule = "a contact has 1 to 200 characters, none of them a control character";
    contact.map_or(Ok(()), |contact| check_text("contact", contact, 200, rule))
}

fn check_text(
    field: &'static str,
    text: &str,
    longest: usize,
    rule: &'static str,
) -> Result<(), RegistryError> {
    let fits = (1..=longest).contains(&text.chars().count()) && !text.contains(char::is_control);
    if fits { Ok(()) } else { Err(RegistryError::BadValue(field, rule)) }
}

fn check_expiry(expires_at: Option<OffsetDateTime>, now: OffsetDateTime) -> Result<(), RegistryError> {
    // By the clock of another zone it may be in a year that UTC has no number for.
    let is_future = |at: OffsetDateTime| at > now && at.checked_to_offset(UtcOffset::UTC).is_some();
    if expires_at.is_none_or(is_future) { Ok(()) } else { Err(RegistryError::Past) }
}
