//! Registered users, in the table `auth.users`.

use std::{collections::HashMap, fmt, net::IpAddr, str::FromStr, time::Duration};

use deadpool_postgres::Pool;
use dermflow_schemas::{id::ClientId, limits};
use secrecy::SecretString;
use serde::{Deserialize, Deserializer, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    confirmation::Fingerprint,
    db::{self, DbError},
    password::{Hasher, PasswordError, Verdict},
    throttle::{Admission, Outcome, Throttle},
    token::Grant,
};

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// What a user is for. It decides the scope of the user's tokens, and there is one for each: who operates the
/// system cannot submit images, and the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Submits images and reads the reports: a client's system.
    Integrator,
    /// Looks after the queue: dead letters.
    Operator,
    /// Reads the audit trail.
    Auditor,
    /// Registers the others.
    Administrator,
}

/// Every role.
pub const ROLES: [Role; 4] = [Role::Integrator, Role::Operator, Role::Auditor, Role::Administrator];

impl Role {
    /// The word on the command line and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Integrator => "integrator",
            Self::Operator => "operator",
            Self::Auditor => "auditor",
            Self::Administrator => "administrator",
        }
    }

    /// The widest scope of the user's access tokens.
    pub fn scope(self) -> &'static str {
        match self {
            Self::Integrator => "system/DiagnosticReport.crds",
            Self::Operator => "dermflow/operate",
            Self::Auditor => "system/AuditEvent.rs",
            Self::Administrator => "dermflow/register",
        }
    }
}

/// A word that names no role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a role: integrator, operator, auditor or administrator")]
pub struct UnknownRole;

impl FromStr for Role {
    type Err = UnknownRole;

    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        ROLES.into_iter().find(|role| role.as_str() == text).ok_or(UnknownRole)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An account that may sign in, whatever it proves that with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// The account's id, which is the client's for an integrator.
    pub client: ClientId,
    /// What the account is for.
    pub role: Role,
    /// When it expires.
    pub expires_at: Option<OffsetDateTime>,
    /// Tokens that were issued until then are refused.
    pub valid_after: Option<OffsetDateTime>,
    /// Only tokens that are bound to a certificate are good.
    pub certificate_bound: bool,
}

/// A condition of SQL on `auth.users`: the account may sign in. `$1` is the time.
pub(crate) const OPEN: &str =
    "NOT disabled AND deleted_at IS NULL AND (users.expires_at IS NULL OR users.expires_at > $1)";
/// The columns that [`User::read`] needs.
pub(crate) const COLUMNS: &str =
    "users.id AS user_id, role, users.expires_at AS user_expires_at, valid_after, certificate_bound";

impl User {
    /// `None` for a role that a newer build has introduced: it opens nothing here.
    pub(crate) fn read(row: &tokio_postgres::Row) -> Option<Self> {
        Some(Self {
            client: row.get::<_, Uuid>("user_id").into(),
            role: row.get::<_, &str>("role").parse().ok()?,
            expires_at: row.get("user_expires_at"),
            valid_after: row.get("valid_after"),
            certificate_bound: row.get("certificate_bound"),
        })
    }

    /// What a token for this account is given for. `credential` is what the account proved itself with, and when
    /// that ends; `bound_to` is the certificate of the connection on which it was asked for.
    pub fn grant(
        self,
        credential: Uuid,
        ends: Option<OffsetDateTime>,
        scope: String,
        bound_to: Option<Fingerprint>,
    ) -> Grant {
        let ends = self.expires_at.into_iter().chain(ends).min();
        Grant { client: self.client, credential, scope, ends, after: self.valid_after, bound_to }
    }
}

/// Why a user cannot be created or checked.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The name is taken.
    #[error("the user {0} exists already")]
    Exists(String),
    /// Nobody has this name.
    #[error("there is no user {0}")]
    Unknown(String),
    /// The name has the wrong form.
    #[error("a user name has 1 to 63 of a-z 0-9 . _ @ - and begins with a letter or digit")]
    BadName,
    /// Too many wrong passwords: not before this time has passed.
    #[error("too many wrong passwords")]
    Throttled(Duration),
    /// See [`PasswordError`].
    #[error(transparent)]
    Password(#[from] PasswordError),
    /// See [`DbError`].
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<tokio_postgres::Error> for UserError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Db(error.into())
    }
}

impl From<deadpool_postgres::PoolError> for UserError {
    fn from(error: deadpool_postgres::PoolError) -> Self {
        Self::Db(error.into())
    }
}

/// Brings the `auth` schema up to date.
///
/// # Errors
/// See [`db::migrate`].
pub async fn migrate(pool: &Pool) -> Result<(), DbError> {
    db::migrate(pool, &migrations::migrations::runner()).await
}

/// What checks a login.
#[derive(Debug)]
pub struct Doorkeeper {
    /// Hashes.
    pub hasher: Hasher,
    /// Counts guesses.
    pub throttle: Throttle,
}

/// Checks a name and a password that came from `source`; `None` when either is wrong, in the same time for both.
///
/// # Errors
/// [`UserError::Throttled`] when there were too many wrong ones, for a name that nobody has as for any other. When the
/// database is away or every hashing thread is taken.
pub async fn authenticate(
    pool: &Pool,
    doorkeeper: &Doorkeeper,
    name: &str,
    password: SecretString,
    source: IpAddr,
    now: OffsetDateTime,
) -> Result<Option<User>, UserError> {
    let Doorkeeper { hasher, throttle } = doorkeeper;
    let place = hasher.place()?;
    let guess = match throttle.admit(pool, name, source, now).await? {
        Admission::Granted(guess) => guess,
        Admission::Delayed(wait) => return Err(UserError::Throttled(wait)),
    };
    let checked = async {
        let row = find(pool, name, now).await?;
        let stored = row.as_ref().and_then(|row| row.get::<_, Option<String>>("password_hash"));
        Ok::<_, UserError>((row, stored.clone(), hasher.verify(place, password, stored).await?))
    };
    let checked = checked.await;
    let outcome = match &checked {
        Ok((_, _, Verdict { right: true, .. })) => Outcome::Right,
        Ok(_) => Outcome::Wrong,
        Err(_) => Outcome::Void,
    };
    throttle.settle(pool, guess, outcome, now).await?;
    let (row, stored, verdict) = checked?;
    let Some(row) = row.filter(|_| verdict.right) else { return Ok(None) };
    if let Some(fresh) = verdict.rehashed {
        let rehash = "SELECT auth.rehash($1, $2, $3)";
        pool.get().await?.execute(rehash, &[&row.get::<_, Uuid>("user_id"), &stored, &fresh]).await?;
    }
    let user = User::read(&row);
    if let Some(user) = user {
        used(pool, user.client, None, now).await?;
    }
    Ok(user)
}

/// The account with its hash, unless it is shut out. A name of the wrong form is looked for like any other, so that it
/// takes as long.
async fn find(
    pool: &Pool,
    name: &str,
    now: OffsetDateTime,
) -> Result<Option<tokio_postgres::Row>, UserError> {
    // Nobody has the empty name, and PostgreSQL takes no NUL.
    let name = if valid_name(name) { name } else { "" };
    let select = format!("SELECT {COLUMNS}, password_hash FROM auth.users WHERE username = $2 AND {OPEN}");
    db::within(async {
        let connection = pool.get().await?;
        let select = connection.prepare_cached(&select).await?;
        Ok(connection.query_opt(&select, &[&now, &name]).await?)
    })
    .await
}

/// Whether an account that has proved itself may still sign in, and has not been shut out since it was read.
///
/// # Errors
/// When the database is away.
pub async fn is_unchanged(pool: &Pool, user: &User, now: OffsetDateTime) -> Result<bool, DbError> {
    let select =
        format!("SELECT FROM auth.users WHERE id = $2 AND {OPEN} AND valid_after IS NOT DISTINCT FROM $3");
    db::within(async {
        let connection = pool.get().await?;
        let select = connection.prepare_cached(&select).await?;
        Ok(connection.query_opt(&select, &[&now, &user.client.uuid(), &user.valid_after]).await?.is_some())
    })
    .await
}

/// Notes that an account and, if it was not its password, one of its credentials was used, to the hour: who reads
/// which accounts are unused needs no more, and signing in should not cost a write each time.
///
/// # Errors
/// When the database is away.
pub async fn used(
    pool: &Pool,
    account: ClientId,
    credential: Option<Uuid>,
    now: OffsetDateTime,
) -> Result<(), DbError> {
    let note = "WITH noted AS (UPDATE auth.credentials SET last_used_at = $2 WHERE id = $3 \
                AND (last_used_at IS NULL OR last_used_at < $2::timestamptz - interval '1 hour')) \
                UPDATE auth.users SET last_used_at = $2 WHERE id = $1 \
                AND (last_used_at IS NULL OR last_used_at < $2::timestamptz - interval '1 hour')";
    db::within(async {
        let connection = pool.get().await?;
        let note = connection.prepare_cached(note).await?;
        connection.execute(&note, &[&account.uuid(), &now, &credential]).await?;
        Ok(())
    })
    .await
}

/// What a client may have open at once, its share of the workers, and how long its reports are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Quota {
    /// Jobs that have not ended.
    pub jobs: i64,
    /// Bytes of the images of these jobs.
    pub bytes: i64,
    /// Bulk jobs that workers have in hand.
    pub running: i64,
    /// Share of the workers against other clients with bulk jobs, 1 to [`limits::MAX_WEIGHT`].
    pub weight: i16,
    /// Requests a minute, but for polls.
    pub requests: i64,
    /// Images a minute.
    pub images: i64,
    /// Days that reports are kept after the job's end, 0 to [`limits::MAX_RETENTION_DAYS`]; 0 for no longer than the answer.
    pub retention_days: i16,
}

impl Quota {
    /// How long reports are kept after the job's end; 0 for no longer than the answer.
    pub fn retention(&self) -> Duration {
        Duration::from_hours(24 * u64::from(self.retention_days.unsigned_abs()))
    }

    /// Whether reports are kept when they have been answered.
    pub fn keeps_reports(&self) -> bool {
        self.retention_days > 0
    }

    /// How long the records of jobs are kept after their end, and reports that nobody has asked for.
    pub fn keeps_records(&self) -> Duration {
        self.retention().max(Duration::from_hours(24 * u64::from(limits::MIN_RETENTION_DAYS.unsigned_abs())))
    }

    /// What is NULL is the build's.
    pub(crate) fn read(row: &tokio_postgres::Row) -> Self {
        let usual = Self::default();
        Self {
            jobs: row.get::<_, Option<_>>("quota_jobs").unwrap_or(usual.jobs),
            bytes: row.get::<_, Option<_>>("quota_bytes").unwrap_or(usual.bytes),
            running: row.get::<_, Option<_>>("quota_running").unwrap_or(usual.running),
            weight: row.get::<_, Option<_>>("weight").unwrap_or(usual.weight),
            requests: row.get::<_, Option<_>>("quota_requests").unwrap_or(usual.requests),
            images: row.get::<_, Option<_>>("quota_images").unwrap_or(usual.images),
            retention_days: row.get::<_, Option<_>>("retention_days").unwrap_or(usual.retention_days),
        }
    }
}

impl Default for Quota {
    fn default() -> Self {
        Self {
            jobs: limits::QUOTA_JOBS,
            bytes: limits::QUOTA_BYTES,
            running: limits::QUOTA_RUNNING,
            weight: 1,
            requests: limits::REQUESTS_PER_MINUTE,
            images: limits::IMAGES_PER_MINUTE,
            retention_days: limits::RETENTION_DAYS,
        }
    }
}

/// A number of a [`Quota`], or `None` for the build's.
pub type Amount<T> = Option<T>;

/// Changes of a [`Quota`]; what is `None` stays as it is.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaChange {
    /// Jobs that have not ended, 0 or more.
    #[arg(long, value_parser = amount::<i64>)]
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i64>)]
    pub jobs: Option<Amount<i64>>,
    /// Bytes of the images of these jobs, 0 or more.
    #[arg(long, value_parser = amount::<i64>)]
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i64>)]
    pub bytes: Option<Amount<i64>>,
    /// Bulk jobs that workers have in hand, 1 or more.
    #[arg(long, value_parser = amount::<i64>)]
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i64>)]
    pub running: Option<Amount<i64>>,
    /// Share of the workers against other clients with bulk jobs, 1 to 100.
    #[arg(long, value_parser = amount::<i16>)]
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i16>)]
    pub weight: Option<Amount<i16>>,
    /// Requests a minute, but for polls, 6 or more; a sixth of them in any 10 seconds.
    #[arg(long, value_parser = amount::<i64>)]
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i64>)]
    pub requests: Option<Amount<i64>>,
    /// Images a minute, 1 or more.
    #[arg(long, value_parser = amount::<i64>)]
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i64>)]
    pub images: Option<Amount<i64>>,
    /// Days that reports are kept after the job's end, 0 to 365; 0 for no longer than the answer.
    #[arg(long, value_parser = amount::<i16>)]
    #[serde(deserialize_with = "named", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<i16>)]
    pub retention_days: Option<Amount<i16>>,
}

impl QuotaChange {
    /// Takes every number away that is the account's own.
    pub const DEFAULT: Self = Self {
        jobs: Some(None),
        bytes: Some(None),
        running: Some(None),
        weight: Some(None),
        requests: Some(None),
        images: Some(None),
        retention_days: Some(None),
    };

    /// Whether every number is one that an account may have.
    ///
    /// # Errors
    /// The bound that is broken.
    pub fn check(&self) -> Result<(), &'static str> {
        let below =
            |number: Option<Amount<i64>>, least| number.flatten().is_some_and(|number| number < least);
        let weights = 1..=i16::from(limits::MAX_WEIGHT);
        let retention = 0..=limits::MAX_RETENTION_DAYS;
        if below(self.jobs, 0) || below(self.bytes, 0) {
            Err("jobs and bytes are 0 or more")
        } else if below(self.running, 1) || below(self.images, 1) {
            Err("running and images are 1 or more")
        } else if below(self.requests, 6) {
            Err("requests are 6 or more")
        } else if self.weight.flatten().is_some_and(|weight| !weights.contains(&weight)) {
            Err("a weight is between 1 and 100")
        } else if self.retention_days.flatten().is_some_and(|days| !retention.contains(&days)) {
            Err("reports are kept for 0 to 365 days")
        } else {
            Ok(())
        }
    }
}

/// What an option of the command line says.
fn amount<T: FromStr>(text: &str) -> Result<Amount<T>, &'static str> {
    match text {
        "default" => Ok(None),
        _ => text.parse().map(Some).map_err(|_| "neither a number nor `default`"),
    }
}

/// A member that is there, be it null (RFC 7396).
#[expect(clippy::option_option, reason = "left out, null and a value are three things")]
pub(crate) fn named<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// How a user stands that is not like all the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// Shut out, whatever tokens it holds.
    pub closed: bool,
    /// Tokens that were issued until then are refused.
    pub valid_after: Option<OffsetDateTime>,
    /// Tokens that are not bound to a certificate are refused.
    pub certificate_bound: bool,
    /// Its quota.
    pub quota: Quota,
}

/// The users that are shut out, hold tokens that are refused, or have a quota of their own. What concerns no token
/// that may still live is left out.
///
/// # Errors
/// When the database is away.
pub async fn exceptions(pool: &Pool) -> Result<HashMap<ClientId, Standing>, DbError> {
    let select = "SELECT id, disabled OR deleted_at IS NOT NULL OR coalesce(expires_at <= now(), false) AS closed, \
                  valid_after, certificate_bound, quota_jobs, quota_bytes, quota_running, weight, quota_requests, quota_images, \
                  retention_days FROM auth.users WHERE disabled OR deleted_at > now() - interval '1 hour' \
                  OR expires_at BETWEEN now() - interval '1 hour' AND now() \
                  OR valid_after > now() - interval '1 hour' OR certificate_bound \
                  OR num_nonnulls(quota_jobs, quota_bytes, quota_running, weight) > 0 \
                  OR num_nonnulls(quota_requests, quota_images) > 0 OR retention_days IS NOT NULL";
    db::within(async {
        let rows = pool.get().await?.query(select, &[]).await?;
        Ok(rows.iter().map(|row| (row.get::<_, Uuid>("id").into(), standing(row))).collect())
    })
    .await
}

fn standing(row: &tokio_postgres::Row) -> Standing {
    Standing {
        closed: row.get("closed"),
        valid_after: row.get("valid_after"),
        certificate_bound: row.get("certificate_bound"),
        quota: Quota::read(row),
    }
}

pub(crate) fn valid_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._@-".contains(&b);
    (1..=63).contains(&name.len())
        && name.bytes().all(allowed)
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_has_one_word_and_a_scope_of_its_own() {
        for role in ROLES {
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        let scopes: std::collections::HashSet<&str> = ROLES.iter().map(|role| role.scope()).collect();
        assert_eq!(scopes.len(), ROLES.len());
        assert_eq!("root".parse::<Role>(), Err(UnknownRole));
    }

    #[test]
    fn a_name_is_short_plain_and_lower_case() {
        for good in ["demo", "a", "clinic-7", "it@example.org", &"x".repeat(63)] {
            assert!(valid_name(good), "{good}");
        }
        for bad in ["", "Demo", "-a", "a b", "ä", "a\0", &"x".repeat(64)] {
            assert!(!valid_name(bad), "{bad}");
        }
    }
}
