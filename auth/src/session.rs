//! Sessions of staff at the registration service: 256 random bits of which only the hash is kept, good with one
//! certificate, until they expire, lie idle, are closed, or the account loses its access.

use deadpool_postgres::Pool;
use dermflow_schemas::limits::{STAFF_IDLE, STAFF_IDLE_STEP, STAFF_SESSION, STAFF_SESSIONS};
use secrecy::{ExposeSecret, SecretString};
use time::OffsetDateTime;

use crate::{
    audit::{self, Action, Event, Object, Who},
    confirmation::Fingerprint,
    db::{self, DbError},
    secret::{self, Kind, NoRandomness},
    users::{COLUMNS, OPEN, User},
};

/// Why a session could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The account was shut out, or its password changed, while it signed in.
    #[error("the account has changed meanwhile")]
    Changed,
    /// See [`NoRandomness`].
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    /// See [`DbError`].
    #[error(transparent)]
    Db(#[from] DbError),
}

impl From<tokio_postgres::Error> for SessionError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Db(error.into())
    }
}

impl From<deadpool_postgres::PoolError> for SessionError {
    fn from(error: deadpool_postgres::PoolError) -> Self {
        Self::Db(error.into())
    }
}

/// Why a session is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is an access token, or looks like one.
    AccessToken,
    /// There is none.
    Unknown,
    /// It was opened with another certificate.
    Foreign,
    /// Its time is over, or that of its account.
    Expired,
}

/// Opens a session for `user`, who has just proved to be that, and returns its token and when it expires. The entry in
/// the audit trail comes with it.
///
/// # Errors
/// See [`SessionError`].
pub async fn open(
    pool: &Pool,
    who: &Who,
    user: User,
    certificate: &Fingerprint,
    now: OffsetDateTime,
) -> Result<(SecretString, OffsetDateTime), SessionError> {
    let token = secret::generate(Kind::Session)?;
    let (hash, expires_at) = (secret::hash(&token), now + STAFF_SESSION);
    let account = user.client.uuid();
    db::within(async {
        let mut connection = pool.get().await?;
        let transaction = connection.transaction().await?;
        let gone = "DELETE FROM auth.sessions WHERE expires_at <= $1 OR last_used_at <= $2";
        transaction.execute(gone, &[&now, &(now - STAFF_IDLE)]).await?;
        // Waits for who is changing the account, and then sees the change.
        let insert = format!(
            "WITH account AS (SELECT id FROM auth.users WHERE id = $2 AND {OPEN} \
             AND valid_after IS NOT DISTINCT FROM $3 FOR SHARE) \
             INSERT INTO auth.sessions (hash, account, certificate, created_at, last_used_at, expires_at) \
             SELECT $4, id, $5, $1, $1, $6 FROM account"
        );
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
            [&now, &account, &user.valid_after, &hash, &certificate.as_slice(), &expires_at];
        if transaction.execute(&insert, &parameters).await? == 0 {
            return Err(SessionError::Changed);
        }
        let surplus = "DELETE FROM auth.sessions WHERE hash IN (SELECT hash FROM auth.sessions WHERE account = $1 \
                       ORDER BY created_at DESC, hash = $2 DESC OFFSET $3)";
        transaction.execute(surplus, &[&account, &hash, &STAFF_SESSIONS]).await?;
        audit::insert(&transaction, &[event(Action::Login, who, user, now)]).await?;
        transaction.commit().await?;
        Ok(())
    })
    .await?;
    Ok((token, expires_at))
}

/// Whose session `token` is, with the role that the account has now, when it is good with this certificate.
///
/// # Errors
/// When the database is away.
pub async fn check(
    pool: &Pool,
    token: &SecretString,
    certificate: &Fingerprint,
    now: OffsetDateTime,
) -> Result<Result<User, Refusal>, DbError> {
    // The three parts of a JWS (RFC 7515 §3.1), which no session has.
    if token.expose_secret().split('.').count() == 3 {
        return Ok(Err(Refusal::AccessToken));
    }
    let hash = secret::hash(token);
    db::within(async {
        let connection = pool.get().await?;
        let select = format!(
            "SELECT s.certificate, s.expires_at AS ends, s.last_used_at AS last_used, {COLUMNS}, {OPEN} AS open \
             FROM auth.sessions s JOIN auth.users ON users.id = s.account WHERE s.hash = $2"
        );
        let select = connection.prepare_cached(&select).await?;
        let Some(row) = connection.query_opt(&select, &[&now, &hash]).await? else {
            return Ok(Err(Refusal::Unknown));
        };
        let kept =
            Kept { certificate: row.get("certificate"), ends: row.get("ends"), last_used: row.get("last_used") };
        if let Err(refusal) = kept.judge(certificate, now) {
            return Ok(Err(refusal));
        }
        let Some(user) = User::read(&row).filter(|_| row.get("open")) else {
            return Ok(Err(Refusal::Expired));
        };
        if now - kept.last_used >= STAFF_IDLE_STEP {
            let note = "UPDATE auth.sessions SET last_used_at = $2 WHERE hash = $1 AND last_used_at < $2";
            connection.execute(note, &[&hash, &now]).await?;
        }
        Ok(Ok(user))
    })
    .await
}

/// Closes a session. The entry in the audit trail comes with it.
///
/// # Errors
/// When the database is away.
pub async fn close(
    pool: &Pool,
    who: &Who,
    user: User,
    token: &SecretString,
    now: OffsetDateTime,
) -> Result<(), DbError> {
    db::within(async {
        let mut connection = pool.get().await?;
        let transaction = connection.transaction().await?;
        let delete = "DELETE FROM auth.sessions WHERE hash = $1";
        transaction.execute(delete, &[&secret::hash(token)]).await?;
        audit::insert(&transaction, &[event(Action::Logout, who, user, now)]).await?;
        transaction.commit().await?;
        Ok(())
    })
    .await
}

fn event(action: Action, who: &Who, user: User, now: OffsetDateTime) -> Event {
    Event::new(action, *who, now).client(Some(user.client)).object(Some(Object::account(user.client)))
}

/// What is kept of a session.
struct Kept {
    certificate: Vec<u8>,
    ends: OffsetDateTime,
    last_used: OffsetDateTime,
}

impl Kept {
    fn judge(&self, certificate: &Fingerprint, now: OffsetDateTime) -> Result<(), Refusal> {
        if self.certificate != certificate {
            Err(Refusal::Foreign)
        } else if now >= self.ends || now - self.last_used >= STAFF_IDLE {
            Err(Refusal::Expired)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use time::Duration;

    use super::*;

    #[test]
    fn a_session_ends_after_its_time_and_when_it_lies_idle() {
        let begun = OffsetDateTime::UNIX_EPOCH;
        let own: Fingerprint = [1; 32];
        let after = |used: Duration, now: Duration| {
            let kept =
                Kept { certificate: own.to_vec(), ends: begun + STAFF_SESSION, last_used: begun + used };
            kept.judge(&own, begun + now)
        };
        let (hours, minutes, moment) = (Duration::hours, Duration::minutes, Duration::milliseconds(1));
        assert_eq!(after(minutes(0), minutes(30) - moment), Ok(()));
        assert_eq!(after(minutes(0), minutes(30)), Err(Refusal::Expired));
        assert_eq!(after(hours(8) - minutes(1), hours(8) - moment), Ok(()));
        assert_eq!(after(hours(8) - minutes(1), hours(8)), Err(Refusal::Expired));
    }

    #[test]
    fn a_session_is_good_with_its_own_certificate_only() {
        let now = OffsetDateTime::UNIX_EPOCH;
        let kept = Kept { certificate: vec![1; 32], ends: now + STAFF_SESSION, last_used: now };
        assert_eq!(kept.judge(&[1; 32], now), Ok(()));
        assert_eq!(kept.judge(&[2; 32], now), Err(Refusal::Foreign));
    }
}
