//! Reading the trail.

use deadpool_postgres::GenericClient;
use serde_json::Value;
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

use crate::db::DbError;

/// The columns of [`Recorded`].
pub const COLUMNS: &str = "id, at, actor_kind, actor, action, outcome, code, client, object_kind, object, source, \
                           request, detail::text AS detail";

/// An event as it is in the table: what a newer build recorded is shown, too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Its number.
    pub id: i64,
    /// When.
    pub at: OffsetDateTime,
    /// `user`, `part` or `unknown`.
    pub actor_kind: String,
    /// Id or name.
    pub actor: Option<String>,
    /// See [`super::Action`].
    pub action: String,
    /// See [`super::Outcome`].
    pub outcome: String,
    /// A stable error code.
    pub code: Option<String>,
    /// Whose data.
    pub client: Option<Uuid>,
    /// What kind of thing it was done to.
    pub object_kind: Option<String>,
    /// Which one.
    pub object: Option<String>,
    /// The caller's network address.
    pub source: Option<String>,
    /// The HTTP request.
    pub request: Option<Uuid>,
    /// A JSON object, as PostgreSQL writes it.
    pub detail: String,
}

impl Recorded {
    /// Codes and numbers.
    pub fn detail(&self) -> Value {
        serde_json::from_str(&self.detail).unwrap_or_default()
    }
}

impl From<&Row> for Recorded {
    fn from(row: &Row) -> Self {
        Self {
            id: row.get("id"),
            at: row.get("at"),
            actor_kind: row.get("actor_kind"),
            actor: row.get("actor"),
            action: row.get("action"),
            outcome: row.get("outcome"),
            code: row.get("code"),
            client: row.get("client"),
            object_kind: row.get("object_kind"),
            object: row.get("object"),
            source: row.get("source"),
            request: row.get("request"),
            detail: row.get("detail"),
        }
    }
}

/// Which events.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Not before this.
    pub since: Option<OffsetDateTime>,
    /// Before this.
    pub until: Option<OffsetDateTime>,
    /// By this user or part.
    pub actor: Option<String>,
    /// With one of these outcomes; all when it is empty.
    pub outcomes: Vec<&'static str>,
    /// One of these actions; all when it is empty.
    pub actions: Vec<&'static str>,
    /// To the thing with this id.
    pub object: Option<String>,
    /// Those that come after this event in the order of the list.
    pub cursor: Option<i64>,
}

/// Events, the latest first, `limit` at most.
///
/// # Errors
/// When the database is away.
pub async fn list(
    client: &impl GenericClient,
    filter: &Filter,
    limit: usize,
) -> Result<Vec<Recorded>, DbError> {
    let select = format!(
        "SELECT {COLUMNS} FROM auth.audit WHERE ($1::timestamptz IS NULL OR at >= $1) \
         AND ($2::timestamptz IS NULL OR at < $2) AND ($3::text IS NULL OR actor = $3) \
         AND ($4::text[] = '{{}}' OR outcome = ANY($4)) AND ($5::text[] = '{{}}' OR action = ANY($5)) \
         AND ($6::text IS NULL OR object = $6) \
         AND ($7::bigint IS NULL OR (at, id) < (SELECT at, id FROM auth.audit WHERE id = $7)) \
         ORDER BY at DESC, id DESC LIMIT $8"
    );
    let Filter { since, until, actor, outcomes, actions, object, cursor } = filter;
    // Planned with the values at hand: which index serves depends on what is asked for.
    let rows = client
        .query(&select, &[since, until, actor, outcomes, actions, object, cursor, &(limit as i64)])
        .await?;
    Ok(rows.iter().map(Recorded::from).collect())
}

/// One event.
///
/// # Errors
/// When the database is away.
pub async fn find(client: &impl GenericClient, id: i64) -> Result<Option<Recorded>, DbError> {
    let select = format!("SELECT {COLUMNS} FROM auth.audit WHERE id = $1");
    Ok(client.query_opt(&select, &[&id]).await?.as_ref().map(Recorded::from))
}

/// Events after number `after` up to number `last`, in the order of their numbers, `limit` at most.
///
/// # Errors
/// When the database is away.
pub async fn page(
    client: &impl GenericClient,
    filter: &Filter,
    after: i64,
    last: i64,
    limit: i64,
) -> Result<Vec<Recorded>, DbError> {
    let select = format!(
        "SELECT {COLUMNS} FROM auth.audit WHERE id > $1 AND id <= $2 AND ($3::timestamptz IS NULL OR at >= $3) \
         AND ($4::timestamptz IS NULL OR at < $4) ORDER BY id LIMIT $5"
    );
    let rows = client.query(&select, &[&after, &last, &filter.since, &filter.until, &limit]).await?;
    Ok(rows.iter().map(Recorded::from).collect())
}
