//! What is refused although its signature is good: tokens, and everything that was given for a credential.

use std::collections::HashSet;

use deadpool_postgres::{GenericClient, Pool};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    db::{self, DbError},
    token::{LEEWAY, LIFETIME},
};

/// Refuses the tokens with these ids, or that were given for credentials with these ids, on every replica within a
/// second. Once in, it stays until no such token can live.
///
/// # Errors
/// When the database is away.
pub async fn revoke(pool: &Pool, ids: &[Uuid], now: OffsetDateTime) -> Result<(), DbError> {
    db::within(async {
        let connection = pool.get().await?;
        within(&connection, ids, now).await?;
        Ok(())
    })
    .await
}

/// The same in a transaction.
pub(crate) async fn within(
    connection: &impl GenericClient,
    ids: &[Uuid],
    now: OffsetDateTime,
) -> Result<(), tokio_postgres::Error> {
    let gone = now + LIFETIME + time::Duration::seconds(2 * LEEWAY);
    connection.execute("DELETE FROM auth.revocations WHERE expires_at < $1", &[&now]).await?;
    let insert = "INSERT INTO auth.revocations (id, expires_at) SELECT unnest($1::uuid[]), $2 \
                  ON CONFLICT (id) DO UPDATE SET expires_at = greatest(revocations.expires_at, excluded.expires_at)";
    connection.execute(insert, &[&ids, &gone]).await?;
    Ok(())
}

/// Everything that is refused now. As many as were revoked within the life of a token.
///
/// # Errors
/// When the database is away.
pub async fn all(pool: &Pool) -> Result<HashSet<Uuid>, DbError> {
    db::within(async {
        let select = "SELECT id FROM auth.revocations WHERE expires_at > now()";
        Ok(pool.get().await?.query(select, &[]).await?.iter().map(|row| row.get(0)).collect())
    })
    .await
}
