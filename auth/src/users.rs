//! Registered users, in the table `auth.users`.

use std::{collections::HashMap, net::IpAddr, str::FromStr, time::Duration};

use deadpool_postgres::Pool;
use dermflow_schemas::{id::ClientId, limits};
use secrecy::SecretString;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    db::{self, DbError},
    password::{self, Hasher, PasswordError, Peppers, Verdict},
    throttle::{Admission, Outcome, Throttle},
    token::{SCOPE_ANALYZE, SCOPE_OPERATE},
};

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// What a user is for. It decides the scope of the user's tokens, and there is one for each: who operates the
/// system cannot submit images, and the other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Submits images and reads the reports: a client's system.
    Integrator,
    /// Looks after the queue: dead letters.
    Operator,
}

/// Every role.
pub const ROLES: [Role; 2] = [Role::Integrator, Role::Operator];

impl Role {
    /// The word on the command line and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Integrator => "integrator",
            Self::Operator => "operator",
        }
    }

    /// The scope of the user's access tokens.
    pub fn scope(self) -> &'static str {
        match self {
            Self::Integrator => SCOPE_ANALYZE,
            Self::Operator => SCOPE_OPERATE,
        }
    }
}

/// A word that names no role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a role: integrator or operator")]
pub struct UnknownRole;

impl FromStr for Role {
    type Err = UnknownRole;

    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        ROLES.into_iter().find(|role| role.as_str() == text).ok_or(UnknownRole)
    }
}

/// A user whose password was right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// The user's id, which is the client's for an integrator.
    pub client: ClientId,
    /// What the user is for.
    pub role: Role,
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

/// Registers a user with a generated password, which is returned and kept nowhere in clear.
///
/// # Errors
/// When the name is taken or malformed, or the database is away.
pub async fn create(
    pool: &Pool,
    peppers: &Peppers,
    name: &str,
    role: Role,
    now: OffsetDateTime,
) -> Result<SecretString, UserError> {
    if !valid_name(name) {
        return Err(UserError::BadName);
    }
    let password = password::generate()?;
    let hash = password::hash(&password, peppers)?;
    let inserted = pool
        .get()
        .await?
        .execute(
            "INSERT INTO auth.users (id, username, password_hash, created_at, role) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (username) DO NOTHING",
            &[&Uuid::new_v4(), &name, &hash, &now, &role.as_str()],
        )
        .await?;
    if inserted == 1 { Ok(password) } else { Err(UserError::Exists(name.into())) }
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
        let row = find(pool, name).await?;
        let stored = row.as_ref().map(|(_, hash)| hash.clone());
        Ok::<_, UserError>((row, hasher.verify(place, password, stored).await?))
    };
    let checked = checked.await;
    let outcome = match &checked {
        Ok((_, Verdict { right: true, .. })) => Outcome::Right,
        Ok(_) => Outcome::Wrong,
        Err(_) => Outcome::Void,
    };
    throttle.settle(pool, guess, outcome, now).await?;
    let (row, verdict) = checked?;
    let Some(((client, role), stored)) = row.filter(|_| verdict.right) else { return Ok(None) };
    if let Some(fresh) = verdict.rehashed {
        let rehash = "SELECT auth.rehash($1, $2, $3)";
        pool.get().await?.execute(rehash, &[&client, &stored, &fresh]).await?;
    }
    // A role that a newer build has introduced opens nothing here.
    Ok(role.parse().ok().map(|role| User { client: client.into(), role }))
}

/// Id, role and hash of a user who is not shut out. A name of the wrong form is looked for like any other, so that it
/// takes as long.
async fn find(pool: &Pool, name: &str) -> Result<Option<((Uuid, String), String)>, UserError> {
    // Nobody has the empty name, and PostgreSQL takes no NUL.
    let name = if valid_name(name) { name } else { "" };
    let select = "SELECT id, role, password_hash FROM auth.users WHERE username = $1 AND NOT disabled";
    db::within(async {
        let connection = pool.get().await?;
        let select = connection.prepare_cached(select).await?;
        let row = connection.query_opt(&select, &[&name]).await?;
        Ok(row.map(|row| ((row.get(0), row.get(1)), row.get(2))))
    })
    .await
}

/// Shuts a user out: no new token, and those it holds are refused by every replica within a second.
///
/// # Errors
/// When there is no such user, or the database is away.
pub async fn disable(pool: &Pool, name: &str) -> Result<(), UserError> {
    let update = "UPDATE auth.users SET disabled = true WHERE username = $1";
    match pool.get().await?.execute(update, &[&name]).await? {
        0 => Err(UserError::Unknown(name.into())),
        _ => Ok(()),
    }
}

/// What a client may have open at once, and its share of the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        }
    }
}

/// Changes of a [`Quota`]; what is `None` stays as it is.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct QuotaChange {
    /// Jobs that have not ended.
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    pub jobs: Option<i64>,
    /// Bytes of the images of these jobs.
    #[arg(long, value_parser = clap::value_parser!(i64).range(0..))]
    pub bytes: Option<i64>,
    /// Bulk jobs that workers have in hand.
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    pub running: Option<i64>,
    /// Share of the workers against other clients with bulk jobs.
    #[arg(long, value_parser = clap::value_parser!(i16).range(1..=i64::from(limits::MAX_WEIGHT)))]
    pub weight: Option<i16>,
    /// Requests a minute, but for polls; a sixth of them in any 10 seconds.
    #[arg(long, value_parser = clap::value_parser!(i64).range(6..))]
    pub requests: Option<i64>,
    /// Images a minute.
    #[arg(long, value_parser = clap::value_parser!(i64).range(1..))]
    pub images: Option<i64>,
}

/// Changes a user's quota; ingress knows it within a second, workers with the user's next jobs.
///
/// # Errors
/// When there is no such user, or the database is away.
pub async fn set_quota(pool: &Pool, name: &str, change: QuotaChange) -> Result<(), UserError> {
    let update = "UPDATE auth.users SET quota_jobs = coalesce($2, quota_jobs), \
                  quota_bytes = coalesce($3, quota_bytes), quota_running = coalesce($4, quota_running), \
                  weight = coalesce($5, weight), quota_requests = coalesce($6, quota_requests), \
                  quota_images = coalesce($7, quota_images) WHERE username = $1";
    let QuotaChange { jobs, bytes, running, weight, requests, images } = change;
    let set = pool.get().await?;
    match set.execute(update, &[&name, &jobs, &bytes, &running, &weight, &requests, &images]).await? {
        0 => Err(UserError::Unknown(name.into())),
        _ => Ok(()),
    }
}

/// How a user stands that is not like all the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// Shut out, whatever tokens it holds.
    pub disabled: bool,
    /// Its quota.
    pub quota: Quota,
}

/// The users that are shut out or have a quota of their own.
///
/// # Errors
/// When the database is away.
pub async fn exceptions(pool: &Pool) -> Result<HashMap<ClientId, Standing>, DbError> {
    let select = "SELECT id, disabled, quota_jobs, quota_bytes, quota_running, weight, quota_requests, quota_images \
                  FROM auth.users WHERE disabled OR num_nonnulls(quota_jobs, quota_bytes, quota_running, weight) > 0 \
                  OR num_nonnulls(quota_requests, quota_images) > 0";
    db::within(async {
        let rows = pool.get().await?.query(select, &[]).await?;
        Ok(rows.iter().map(|row| (row.get::<_, Uuid>("id").into(), standing(row))).collect())
    })
    .await
}

fn standing(row: &tokio_postgres::Row) -> Standing {
    let usual = Quota::default();
    let quota = Quota {
        jobs: row.get::<_, Option<_>>("quota_jobs").unwrap_or(usual.jobs),
        bytes: row.get::<_, Option<_>>("quota_bytes").unwrap_or(usual.bytes),
        running: row.get::<_, Option<_>>("quota_running").unwrap_or(usual.running),
        weight: row.get::<_, Option<_>>("weight").unwrap_or(usual.weight),
        requests: row.get::<_, Option<_>>("quota_requests").unwrap_or(usual.requests),
        images: row.get::<_, Option<_>>("quota_images").unwrap_or(usual.images),
    };
    Standing { disabled: row.get("disabled"), quota }
}

fn valid_name(name: &str) -> bool {
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
        assert_ne!(ROLES[0].scope(), ROLES[1].scope());
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
