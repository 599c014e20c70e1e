//! How fast the queue drains, and for whom.

use dermflow_auth::db::within;
use dermflow_schemas::id::ClientId;
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Result, Store};

/// A client with open jobs, or with jobs that ended of late.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flow {
    pub(crate) client: ClientId,
    /// Open jobs.
    pub(crate) open: i64,
    /// The number of its last job that is not open any more.
    pub(crate) done: i64,
    /// Jobs that workers ended since the time asked for.
    pub(crate) ended: i64,
}

impl Store {
    /// Every client with open jobs, or with jobs that workers ended after `since`.
    pub(crate) async fn flows(&self, since: OffsetDateTime) -> Result<Vec<Flow>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = connection
                .prepare_cached(
                    "SELECT client, coalesce(l.jobs, 0), coalesce(l.tickets - l.jobs, 0), coalesce(e.ended, 0) \
                     FROM (SELECT * FROM loads WHERE jobs > 0) l FULL JOIN \
                     (SELECT client, count(*) AS ended FROM jobs WHERE finished_at > $1 AND started_at IS NOT NULL \
                      GROUP BY client) e USING (client)",
                )
                .await?;
            let rows = connection.query(&select, &[&since]).await?;
            let flow = |row: &tokio_postgres::Row| Flow {
                client: row.get::<_, Uuid>(0).into(),
                open: row.get(1),
                done: row.get(2),
                ended: row.get(3),
            };
            Ok(rows.iter().map(flow).collect())
        })
        .await
    }

    /// Open interactive jobs that were accepted before `at`.
    pub(crate) async fn interactive_before(&self, at: OffsetDateTime) -> Result<i64> {
        within(async {
            let connection = self.pool.get().await?;
            let select = "SELECT count(*) FROM jobs \
                          WHERE finished_at IS NULL AND lane = 'interactive' AND accepted_at < $1";
            let select = connection.prepare_cached(select).await?;
            Ok(connection.query_one(&select, &[&at]).await?.get(0))
        })
        .await
    }
}
