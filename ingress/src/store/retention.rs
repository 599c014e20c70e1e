//! What of ended jobs is removed, and when. A report's removal leaves the job's record, which is erased later with all
//! that belongs to it.

use deadpool_postgres::Transaction;
use dermflow_auth::{
    audit::{Action, Who},
    db::within,
};
use dermflow_schemas::{
    error::Code,
    id::JobId,
    limits::{MIN_RETENTION_DAYS, RETENTION_DAYS, SWEEP_BATCH, UPLOAD_LEASE},
};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Result, Store};

/// A job that is past its client's retention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Past {
    pub(crate) id: JobId,
    pub(crate) claim_check: bool,
    /// Where its payload was in JOBS, if no worker is known to have taken it from there.
    pub(crate) unworked: Option<i64>,
}

/// How long the jobs of the client in `users` are kept, as PostgreSQL's interval; it may have no row there.
fn kept() -> String {
    format!(
        "make_interval(hours => 24 * greatest(coalesce(users.retention_days, {RETENTION_DAYS}), {MIN_RETENTION_DAYS}))"
    )
}

/// Removes the reports of jobs, if there are any, and what they are searched by. Returns how many were there.
pub(super) async fn remove_reports(
    transaction: &Transaction<'_>,
    jobs: &[Uuid],
    now: OffsetDateTime,
) -> Result<i64> {
    let remove = "WITH gone AS (UPDATE jobs SET deleted_at = $2, answered_at = NULL, search = NULL \
                  WHERE id IN (SELECT id FROM jobs WHERE id = ANY($1) AND deleted_at IS NULL ORDER BY id FOR UPDATE) \
                  RETURNING id), erased AS (DELETE FROM reports USING gone WHERE reports.job = gone.id) \
                  SELECT count(*) FROM gone";
    let remove = transaction.prepare_cached(remove).await?;
    Ok(transaction.query_one(&remove, &[&jobs, &now]).await?.get(0))
}

/// Tells the trail whose jobs, one of `clients` a job, `part` erased, or of which the report.
async fn note(
    transaction: &Transaction<'_>,
    (part, action): (&'static str, Action),
    clients: &[Uuid],
    now: OffsetDateTime,
) -> Result<()> {
    let insert = "INSERT INTO auth.audit (at, actor_kind, actor, action, outcome, client, detail) \
                  SELECT $1, $2, $3, $4, 'success', client, jsonb_build_object('jobs', count(*)) \
                  FROM unnest($5::uuid[]) AS client GROUP BY client";
    let insert = transaction.prepare_cached(insert).await?;
    let actor = Who::part(part).actor;
    transaction.execute(&insert, &[&now, &actor.kind(), &actor.id(), &action.as_str(), &clients]).await?;
    Ok(())
}

impl Store {
    /// Reports that are not kept are on their way to their client: those of `again` may be asked for again for a while,
    /// those of `last` are removed.
    pub(crate) async fn answered(&self, again: &[JobId], last: &[JobId], now: OffsetDateTime) -> Result<()> {
        within(async {
            let ids = |jobs: &[JobId]| jobs.iter().map(|job| job.uuid()).collect::<Vec<Uuid>>();
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            if !again.is_empty() {
                let mark = "UPDATE jobs SET answered_at = $2 WHERE id IN (SELECT id FROM jobs WHERE id = ANY($1) \
                            AND answered_at IS NULL AND deleted_at IS NULL ORDER BY id FOR UPDATE)";
                let mark = transaction.prepare_cached(mark).await?;
                transaction.execute(&mark, &[&ids(again), &now]).await?;
            }
            if !last.is_empty() {
                let last = ids(last);
                remove_reports(&transaction, &last, now).await?;
                let owners = "SELECT client FROM jobs WHERE id = ANY($1)";
                let owners = transaction.prepare_cached(owners).await?;
                let rows = transaction.query(&owners, &[&last]).await?;
                let clients: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
                note(&transaction, ("ingress", Action::ReportsRemoved), &clients, now).await?;
            }
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// Removes some of the reports that were handed out before `before`, of clients that have none kept. Returns whether
    /// there may be more.
    pub(crate) async fn remove_answered(&self, before: OffsetDateTime, now: OffsetDateTime) -> Result<bool> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            // Whose client has them kept by now stays, and is not looked at again.
            let select = "SELECT jobs.id, client, retention_days IS NOT DISTINCT FROM 0 AS goes \
                          FROM jobs LEFT JOIN auth.users ON users.id = client WHERE answered_at < $1 \
                          ORDER BY answered_at LIMIT $2 FOR UPDATE OF jobs SKIP LOCKED";
            let rows = transaction.query(select, &[&before, &SWEEP_BATCH]).await?;
            let (go, stay): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.get::<_, bool>("goes"));
            if !stay.is_empty() {
                let stay: Vec<Uuid> = stay.iter().map(|row| row.get("id")).collect();
                transaction
                    .execute("UPDATE jobs SET answered_at = NULL WHERE id = ANY($1)", &[&stay])
                    .await?;
            }
            if !go.is_empty() {
                let (ids, clients): (Vec<Uuid>, Vec<Uuid>) =
                    go.iter().map(|row| (row.get::<_, Uuid>("id"), row.get::<_, Uuid>("client"))).unzip();
                remove_reports(&transaction, &ids, now).await?;
                note(&transaction, ("sweeper", Action::ReportsRemoved), &clients, now).await?;
            }
            transaction.commit().await?;
            Ok(rows.len() as i64 == SWEEP_BATCH)
        })
        .await
    }

    /// Jobs that are past their client's retention as it is now, [`SWEEP_BATCH`] at most.
    pub(crate) async fn past_retention(&self, now: OffsetDateTime) -> Result<Vec<Past>> {
        within(async {
            // One look into an index a client.
            let select = format!(
                "SELECT past.id, past.claim_check, past.unworked FROM loads LEFT JOIN auth.users ON users.id = loads.client \
                 CROSS JOIN LATERAL (SELECT id, claim_check, CASE WHEN state = 'cancelled' OR failure->>'code' = ANY($3) \
                 THEN stream_seq END AS unworked FROM jobs WHERE jobs.client = loads.client \
                 AND finished_at < $1::timestamptz - {} ORDER BY finished_at LIMIT $2) AS past LIMIT $2",
                kept()
            );
            let unworked = [Code::DeadlineExceeded, Code::PayloadLost, Code::NeverQueued];
            let unworked: Vec<&str> = unworked.iter().map(|code| code.kind().code).collect();
            let rows = self.pool.get().await?.query(&select, &[&now, &SWEEP_BATCH, &unworked]).await?;
            let past = |row: &tokio_postgres::Row| Past {
                id: row.get::<_, Uuid>(0).into(),
                claim_check: row.get(1),
                unworked: row.get(2),
            };
            Ok(rows.iter().map(past).collect())
        })
        .await
    }

    /// Erases ended jobs with all that belongs to them.
    pub(crate) async fn erase(&self, jobs: &[JobId], now: OffsetDateTime) -> Result<()> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let ids: Vec<Uuid> = jobs.iter().map(|job| job.uuid()).collect();
            let erase = "DELETE FROM jobs WHERE id IN \
                         (SELECT id FROM jobs WHERE id = ANY($1) AND finished_at IS NOT NULL ORDER BY id FOR UPDATE) \
                         RETURNING client";
            let rows = transaction.query(erase, &[&ids]).await?;
            let clients: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
            note(&transaction, ("sweeper", Action::JobsErased), &clients, now).await?;
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// Erases batches past their client's retention of which no job is left, and to which nobody uploads.
    pub(crate) async fn erase_batches(&self, now: OffsetDateTime) -> Result<()> {
        within(async {
            let erase = format!(
                "DELETE FROM batches WHERE id IN (SELECT b.id FROM batches b LEFT JOIN auth.users ON users.id = b.client \
                 WHERE b.created_at < $1::timestamptz - {} AND NOT EXISTS (SELECT FROM jobs WHERE batch = b.id) \
                 AND NOT EXISTS (SELECT FROM uploads WHERE batch = b.id AND seen_at > $3) LIMIT $2)",
                kept()
            );
            self.pool.get().await?.execute(&erase, &[&now, &SWEEP_BATCH, &(now - UPLOAD_LEASE)]).await?;
            Ok(())
        })
        .await
    }
}
