//! Reports as they are searched for.

use dermflow_auth::db::within;
use dermflow_schemas::{
    id::{ClientId, JobId},
    limits::REPORT_PAGE_BYTES,
    seal::Sealed,
};
use time::OffsetDateTime;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::{Result, Store};

/// What a client's reports are searched for. All of it has to be so.
#[derive(Debug, Clone, Default)]
pub(crate) struct Search {
    /// One of these, if it is said.
    pub(crate) ids: Option<Vec<Uuid>>,
    /// Of each, one of the digests, or the report itself.
    pub(crate) tokens: Vec<AnyOf>,
    /// When the images came: from, and before.
    pub(crate) accepted: Span,
    /// When the report was made.
    pub(crate) finished: Span,
    /// By which of the two times.
    pub(crate) by_end: bool,
    /// The oldest first.
    pub(crate) ascending: bool,
    /// Those behind this one.
    pub(crate) after: Option<(OffsetDateTime, Uuid)>,
}

/// One of these.
#[derive(Debug, Clone, Default)]
pub(crate) struct AnyOf {
    pub(crate) digests: Vec<Vec<u8>>,
    pub(crate) ids: Vec<Uuid>,
}

/// From, and before.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Span {
    pub(crate) since: Option<OffsetDateTime>,
    pub(crate) until: Option<OffsetDateTime>,
}

impl Span {
    /// What is in both.
    pub(crate) fn and(&mut self, since: Option<OffsetDateTime>, until: Option<OffsetDateTime>) {
        self.since = self.since.max(since);
        self.until = match (self.until, until) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }
}

/// A report that was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) job: JobId,
    /// The time that the list is sorted by.
    pub(crate) at: OffsetDateTime,
    pub(crate) sealed: Sealed,
}

/// The number by which a statement names a value.
fn place<'v>(values: &mut Vec<&'v (dyn ToSql + Sync)>, value: &'v (dyn ToSql + Sync)) -> usize {
    values.push(value);
    values.len()
}

impl Store {
    /// A client's reports, `limit` at most and no further than [`REPORT_PAGE_BYTES`]; and whether there are more.
    pub(crate) async fn search(
        &self,
        client: ClientId,
        search: &Search,
        limit: usize,
    ) -> Result<(Vec<Found>, bool)> {
        within(async {
            // One more tells whether there are more.
            let (client, rows) = (client.uuid(), limit as i64 + 1);
            let bytes = REPORT_PAGE_BYTES as i64;
            let mut values: Vec<&(dyn ToSql + Sync)> = vec![&client, &rows, &bytes];
            let mut conditions =
                vec!["jobs.client = $1 AND state = 'succeeded' AND deleted_at IS NULL".to_owned()];
            let time = if search.by_end { "finished_at" } else { "accepted_at" };
            let (order, beyond) = if search.ascending { ("ASC", ">") } else { ("DESC", "<") };
            if let Some(ids) = &search.ids {
                let n = place(&mut values, ids);
                conditions.push(format!("jobs.id = ANY(${n})"));
            }
            for any in &search.tokens {
                let (digests, ids) = (place(&mut values, &any.digests), place(&mut values, &any.ids));
                conditions.push(format!(
                    "(jobs.id = ANY(${ids}) OR EXISTS (SELECT FROM report_tokens t \
                     WHERE t.client = $1 AND t.job = jobs.id AND t.token = ANY(${digests})))"
                ));
            }
            for (column, span) in [("accepted_at", &search.accepted), ("finished_at", &search.finished)] {
                if let Some(since) = &span.since {
                    conditions.push(format!("{column} >= ${}", place(&mut values, since)));
                }
                if let Some(until) = &span.until {
                    conditions.push(format!("{column} < ${}", place(&mut values, until)));
                }
            }
            if let Some((at, id)) = &search.after {
                let (at, id) = (place(&mut values, at), place(&mut values, id));
                conditions.push(format!("({time}, jobs.id) {beyond} (${at}, ${id})"));
            }
            let select = format!(
                "SELECT id, at, key_id, CASE WHEN before < $3 THEN sealed END FROM \
                 (SELECT *, coalesce(sum(octet_length(sealed)) OVER \
                 (ORDER BY at {order}, id {order} ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before FROM \
                 (SELECT jobs.id, {time} AS at, key_id, sealed FROM jobs JOIN reports ON job = jobs.id WHERE {} \
                 ORDER BY {time} {order}, jobs.id {order} LIMIT $2) AS page) AS measured ORDER BY at {order}, id {order}",
                conditions.join(" AND ")
            );
            let rows = self.pool.get().await?.query(&select, &values).await?;
            let found = rows.iter().take(limit).map_while(|row| {
                Some(Found {
                    job: row.get::<_, Uuid>(0).into(),
                    at: row.get(1),
                    sealed: Sealed { key_id: row.get(2), bytes: row.get::<_, Option<Vec<u8>>>(3)?.into() },
                })
            });
            let found: Vec<Found> = found.collect();
            let more = found.len() < rows.len();
            Ok((found, more))
        })
        .await
    }

    /// The keys of the digests, the latest first.
    pub(crate) async fn search_keys(&self) -> Result<Vec<(Uuid, Sealed)>> {
        within(async {
            let select = "SELECT id, sealing_key, secret FROM search_keys ORDER BY id DESC";
            let rows = self.pool.get().await?.query(select, &[]).await?;
            let key = |row: &tokio_postgres::Row| {
                (row.get(0), Sealed { key_id: row.get(1), bytes: row.get::<_, Vec<u8>>(2).into() })
            };
            Ok(rows.iter().map(key).collect())
        })
        .await
    }

    /// Adds a key, unless there are others than `known` already.
    pub(crate) async fn add_search_key(&self, id: Uuid, sealed: &Sealed, known: &[Uuid]) -> Result<()> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            transaction.execute("LOCK TABLE search_keys IN EXCLUSIVE MODE", &[]).await?;
            let insert = "INSERT INTO search_keys (id, sealing_key, secret) SELECT $1, $2, $3 \
                          WHERE NOT EXISTS (SELECT FROM search_keys WHERE id <> ALL($4))";
            transaction.execute(insert, &[&id, &sealed.key_id, &sealed.bytes.as_ref(), &known]).await?;
            transaction.commit().await?;
            Ok(())
        })
        .await
    }
}
