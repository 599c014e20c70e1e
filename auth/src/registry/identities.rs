//! Which subjects of external providers an account is.

use deadpool_postgres::Pool;
use dermflow_schemas::limits::MAX_LINKS;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use super::{Act, RegistryError, find};
use crate::{
    audit::{Action, Who},
    db, revocation,
};

/// Subjects of one account.
const MAX_IDENTITIES: i64 = 20;

/// A subject of a provider as staff sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ExternalIdentity {
    /// The provider.
    pub issuer: String,
    /// Who the account is there.
    pub subject: String,
}

impl ExternalIdentity {
    fn check(&self) -> Result<(), RegistryError> {
        let fits =
            |text: &str| (1..=255).contains(&text.chars().count()) && !text.chars().any(char::is_control);
        if !self.issuer.starts_with("https://") || !fits(&self.issuer) {
            return Err(RegistryError::BadValue(
                "issuer",
                "an issuer is an https URL of 255 characters at most",
            ));
        }
        if fits(&self.subject) {
            Ok(())
        } else {
            Err(RegistryError::BadValue("subject", "a subject has 1 to 255 characters"))
        }
    }
}

/// From now on the subject's tokens open the account.
///
/// # Errors
/// When there is no such account, the subject is an account already, there are too many, or the database is away.
pub async fn link(
    pool: &Pool,
    actor: &Who,
    who: &str,
    identity: &ExternalIdentity,
    now: OffsetDateTime,
) -> Result<(), RegistryError> {
    let act = Act { actor, action: Action::IdentityLinked, who, now };
    act.run(pool, async |transaction| {
        identity.check()?;
        let account = find(transaction, who).await?;
        transaction.batch_execute("LOCK TABLE auth.external_identities IN SHARE ROW EXCLUSIVE MODE").await?;
        let counts = "SELECT count(*), count(*) FILTER (WHERE account = $1) FROM auth.external_identities";
        let row = transaction.query_one(counts, &[&account]).await?;
        if row.get::<_, i64>(0) >= MAX_LINKS || row.get::<_, i64>(1) >= MAX_IDENTITIES {
            return Err(RegistryError::TooManyIdentities);
        }
        let insert = "INSERT INTO auth.external_identities (id, issuer, subject, account, created_at) \
                      VALUES ($1, $2, $3, $4, $5)";
        let inserted = transaction
            .execute(insert, &[&Uuid::new_v4(), &identity.issuer, &identity.subject, &account, &now])
            .await;
        match inserted {
            Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
                return Err(RegistryError::Linked);
            }
            other => other?,
        };
        act.note(transaction, account).await
    })
    .await
}

/// Within a second the subject's tokens open nothing.
///
/// # Errors
/// When there is no such account, it is not that subject, or the database is away.
pub async fn unlink(
    pool: &Pool,
    actor: &Who,
    who: &str,
    identity: &ExternalIdentity,
    now: OffsetDateTime,
) -> Result<(), RegistryError> {
    let act = Act { actor, action: Action::IdentityUnlinked, who, now };
    act.run(pool, async |transaction| {
        identity.check()?;
        let account = find(transaction, who).await?;
        let delete =
            "DELETE FROM auth.external_identities WHERE account = $1 AND issuer = $2 AND subject = $3 RETURNING id";
        let row = transaction.query_opt(delete, &[&account, &identity.issuer, &identity.subject]).await?;
        // What it has begun ends too.
        revocation::within(transaction, &[row.ok_or(RegistryError::NotLinked)?.get(0)], now).await?;
        act.note(transaction, account).await
    })
    .await
}

/// The subjects that an account is, by its id.
///
/// # Errors
/// When the database is away.
pub async fn identities(pool: &Pool, account: Uuid) -> Result<Vec<ExternalIdentity>, RegistryError> {
    let select = "SELECT issuer, subject FROM auth.external_identities WHERE account = $1 \
                  ORDER BY issuer, subject";
    db::within(async {
        let rows = pool.get().await?.query(select, &[&account]).await?;
        let identity = |row: &tokio_postgres::Row| ExternalIdentity {
            issuer: row.get("issuer"),
            subject: row.get("subject"),
        };
        Ok(rows.iter().map(identity).collect())
    })
    .await
}
