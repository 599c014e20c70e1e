//! Which account a subject of a provider is here, in the table `auth.external_identities`.

use std::collections::HashMap;

use deadpool_postgres::Pool;
use dermflow_schemas::{id::ClientId, limits::MAX_LINKS};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    db::{self, DbError},
    users::{COLUMNS, OPEN, Role, User},
};

/// An account that a subject signs in to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its id.
    pub id: Uuid,
    /// The account.
    pub client: ClientId,
    /// What the account is for.
    pub role: Role,
    /// Tokens that were issued until then are refused.
    pub valid_after: Option<OffsetDateTime>,
}

/// Links by issuer and subject.
pub type Links = HashMap<String, HashMap<String, Link>>;

/// The links of these issuers to accounts that may sign in at `now`: no more than [`MAX_LINKS`].
///
/// # Errors
/// When the database is away.
pub async fn all(pool: &Pool, issuers: &[String], now: OffsetDateTime) -> Result<Links, DbError> {
    if issuers.is_empty() {
        return Ok(Links::new());
    }
    let select = format!(
        "SELECT issuer, subject, e.id AS link, {COLUMNS} \
         FROM auth.external_identities e JOIN auth.users ON users.id = e.account \
         WHERE issuer = ANY($2) AND {OPEN} LIMIT $3"
    );
    db::within(async {
        let connection = pool.get().await?;
        let select = connection.prepare_cached(&select).await?;
        let rows = connection.query(&select, &[&now, &issuers, &MAX_LINKS]).await?;
        let mut links = Links::new();
        for row in &rows {
            let Some(User { client, role, valid_after, .. }) = User::read(row) else { continue };
            let link = Link { id: row.get("link"), client, role, valid_after };
            links.entry(row.get("issuer")).or_default().insert(row.get("subject"), link);
        }
        Ok(links)
    })
    .await
}
