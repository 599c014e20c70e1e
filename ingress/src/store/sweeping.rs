//! What the sweeper reads and settles.

use deadpool_postgres::{ClientWrapper, Object};
use dermflow_auth::{
    audit::{Action, Event, Who},
    db::within,
};
use dermflow_schemas::{
    error::Code,
    id::JobId,
    limits::{ACCEPTED_GRACE, LOST_SLICE, SWEEP_BATCH, SWEEP_LEASE},
};
use time::OffsetDateTime;
use tokio_postgres::{Row, types::Json};
use uuid::Uuid;

use super::{Result, Settled, Store, audit::of_jobs, give_up};

/// The session that holds the lock of the one replica that sweeps.
#[derive(Debug, Default)]
pub(crate) struct Leader {
    session: Option<ClientWrapper>,
}

/// An open job, and the message with its payload in JOBS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Open {
    pub(crate) id: JobId,
    pub(crate) stream_seq: i64,
}

/// An open job that claims a place in JOBS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InLine {
    pub(crate) job: Open,
    /// It was queued long enough ago to be looked for.
    pub(crate) is_due: bool,
    /// Its payload is in the object store.
    pub(crate) claim_check: bool,
}

fn open(row: &Row) -> Open {
    Open { id: row.get::<_, Uuid>(0).into(), stream_seq: row.get(1) }
}

/// Jobs that were in JOBS before `$1` and have not ended.
const QUEUED: &str =
    "finished_at IS NULL AND state <> 'accepted' AND stream_seq IS NOT NULL AND queued_at <= $1";

impl Store {
    /// Whether this replica sweeps. The lock is its session's: it goes to another replica when this process
    /// ends, loses the database, or does not come round for [`SWEEP_LEASE`].
    pub(crate) async fn lead(&self, leader: &mut Leader) -> Result<bool> {
        const LOCK: i64 = 0x7377_6565_7065_7200;
        within(async {
            if let Some(session) = &leader.session {
                if session.simple_query("SELECT 1").await.is_ok() {
                    return Ok(true);
                }
                leader.session = None;
            }
            let connection = self.pool.get().await?;
            let leads: bool = connection.query_one("SELECT pg_try_advisory_lock($1)", &[&LOCK]).await?.get(0);
            if leads {
                let session = Object::take(connection);
                let lease = format!("SET idle_session_timeout = {}", SWEEP_LEASE.as_millis());
                session.batch_execute(&lease).await?;
                leader.session = Some(session);
            }
            Ok(leads)
        })
        .await
    }

    /// Fails jobs that never reached the queue. Nothing was accepted: their keys are free for a new try.
    pub(crate) async fn settle_unqueued(&self, now: OffsetDateTime) -> Result<Vec<Settled>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let stuck = "state = 'accepted' AND (accepted_at <= $3 OR deadline <= $1)";
            let code = Code::NeverQueued;
            let settled = give_up(&transaction, stuck, &(now - ACCEPTED_GRACE), now, code).await?;
            let ids: Vec<Uuid> = settled.iter().map(|job| job.id.uuid()).collect();
            transaction.execute("DELETE FROM idempotency_keys WHERE job = ANY($1)", &[&ids]).await?;
            of_jobs(&event(Action::JobSettled, code, now), &transaction, &ids).await?;
            transaction.commit().await?;
            Ok(settled)
        })
        .await
    }

    /// Jobs past their deadline, but for `held`.
    pub(crate) async fn late(&self, now: OffsetDateTime, held: &[Uuid]) -> Result<Vec<JobId>> {
        within(async {
            let select = "SELECT id FROM jobs WHERE finished_at IS NULL AND state <> 'accepted' \
                          AND deadline <= $1 AND id <> ALL($2) ORDER BY deadline LIMIT $3";
            let rows = self.pool.get().await?.query(select, &[&now, &held, &SWEEP_BATCH]).await?;
            Ok(rows.iter().map(|row| row.get::<_, Uuid>(0).into()).collect())
        })
        .await
    }

    /// Fails those of these jobs that are past their deadline.
    pub(crate) async fn settle_late(&self, jobs: &[JobId], now: OffsetDateTime) -> Result<Vec<Settled>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let ids: Vec<Uuid> = jobs.iter().map(|job| job.uuid()).collect();
            let late = "state <> 'accepted' AND deadline <= $1 AND id = ANY($3)";
            let code = Code::DeadlineExceeded;
            let settled = give_up(&transaction, late, &ids, now, code).await?;
            let ids: Vec<Uuid> = settled.iter().map(|job| job.id.uuid()).collect();
            of_jobs(&event(Action::JobSettled, code, now), &transaction, &ids).await?;
            transaction.commit().await?;
            Ok(settled)
        })
        .await
    }

    /// Fails those of these jobs that are open, and whose payload was in this message and not in a newer one.
    pub(crate) async fn settle_lost(&self, jobs: &[Open], now: OffsetDateTime) -> Result<Vec<Settled>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let pairs: Vec<(Uuid, i64)> = jobs.iter().map(|job| (job.id.uuid(), job.stream_seq)).collect();
            let same = "state <> 'accepted' AND (id, stream_seq) IN \
                        (SELECT (pair ->> 0)::uuid, (pair ->> 1)::bigint FROM jsonb_array_elements($3) pair)";
            let code = Code::PayloadLost;
            let settled = give_up(&transaction, same, &Json(pairs), now, code).await?;
            let ids: Vec<Uuid> = settled.iter().map(|job| job.id.uuid()).collect();
            of_jobs(&event(Action::PayloadLost, code, now), &transaction, &ids).await?;
            transaction.commit().await?;
            Ok(settled)
        })
        .await
    }

    /// Open jobs in the order of their places in JOBS, from behind `after` on: [`LOST_SLICE`], and who else claims the
    /// place of the last one. Those queued before `before` are due.
    pub(crate) async fn in_line(&self, before: OffsetDateTime, after: i64) -> Result<Vec<InLine>> {
        within(async {
            // One statement reads as many entries of an index, however many jobs there are.
            let select = format!(
                "SELECT id, stream_seq, coalesce({QUEUED}, false), claim_check FROM jobs \
                 WHERE finished_at IS NULL AND stream_seq > $2 ORDER BY stream_seq FETCH FIRST $3 ROWS WITH TIES"
            );
            let rows = self.pool.get().await?.query(&select, &[&before, &after, &LOST_SLICE]).await?;
            let in_line =
                |row: &Row| InLine { job: open(row), is_due: row.get(2), claim_check: row.get(3) };
            Ok(rows.iter().map(in_line).collect())
        })
        .await
    }

    /// The job of each client and lane that has waited longest, but for those that wait for another attempt. One that the broker passed over comes to this
    /// place sooner or later, and stays there.
    pub(crate) async fn first_in_line(&self, before: OffsetDateTime, limit: i64) -> Result<Vec<Open>> {
        within(async {
            let select = format!(
                "SELECT id, stream_seq FROM (SELECT DISTINCT ON (client, lane) id, stream_seq FROM jobs \
                 WHERE {QUEUED} AND state = 'queued' AND attempts = 0 ORDER BY client, lane, stream_seq) first \
                 ORDER BY stream_seq LIMIT $2"
            );
            let rows = self.pool.get().await?.query(&select, &[&before, &limit]).await?;
            Ok(rows.iter().map(open).collect())
        })
        .await
    }

    /// Open jobs after `after` in the order of their ids: with each call the next ones.
    pub(crate) async fn next_in_line(
        &self,
        before: OffsetDateTime,
        after: JobId,
        limit: i64,
    ) -> Result<Vec<Open>> {
        within(async {
            let select = format!(
                "SELECT id, stream_seq FROM jobs WHERE {QUEUED} AND state = 'queued' AND attempts = 0 AND id > $2 \
                 ORDER BY id LIMIT $3"
            );
            let rows = self.pool.get().await?.query(&select, &[&before, &after.uuid(), &limit]).await?;
            Ok(rows.iter().map(open).collect())
        })
        .await
    }
}

fn event(action: Action, code: Code, now: OffsetDateTime) -> Event {
    Event::new(action, Who::part("sweeper"), now).code(code)
}
