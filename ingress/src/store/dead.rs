//! What the record knows of dead letters: which jobs go back into the queue, and how far that has come.

use deadpool_postgres::Transaction;
use dermflow_auth::{
    audit::{Action, Event as AuditEvent, Object, Who, insert},
    db::within,
};
use dermflow_schemas::{
    error::Code,
    id::{ClientId, JobId},
    job::{self, Event, State},
    limits::SWEEP_BATCH,
};
use serde_json::json;
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{RECORD, Record, Result, Store, audit::of_jobs, give_up};

/// A dead letter on its way back into the queue. `pending` until it is out of the dead letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Requeue {
    pub(crate) job: JobId,
    /// Its sequence in DEAD.
    pub(crate) letter: i64,
    pub(crate) state: State,
    /// How often the job was put back, this time included.
    pub(crate) requeues: u32,
    pub(crate) deadline: OffsetDateTime,
    /// Whether it is known to be in JOBS.
    pub(crate) published: bool,
    pub(crate) pending: bool,
}

/// Why a job does not go back into the queue.
pub(crate) type Refused = &'static str;

const REQUEUE: &str = "id, requeue_of, state, requeues, deadline, stream_seq, requeue_pending";

fn requeue(row: &Row) -> Requeue {
    Requeue {
        job: row.get::<_, Uuid>("id").into(),
        letter: row.get("requeue_of"),
        state: row.get::<_, &str>("state").parse().unwrap_or(State::Failed),
        requeues: row.get::<_, i32>("requeues") as u32,
        deadline: row.get("deadline"),
        published: row.get::<_, Option<i64>>("stream_seq").is_some(),
        pending: row.get("requeue_pending"),
    }
}

impl Store {
    /// The record of a job, whosever it is: for operators.
    pub(crate) async fn find_any(&self, job: JobId) -> Result<Option<Record>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = format!("SELECT {RECORD} FROM jobs WHERE id = $1");
            let select = connection.prepare_cached(&select).await?;
            let row = connection.query_opt(&select, &[&job.uuid()]).await?;
            Ok(row.as_ref().map(Record::try_from).transpose()?)
        })
        .await
    }

    /// Opens a failed job again for its dead letter `letter`, on behalf of `operator`, unless it ended before `since`.
    /// Repeated, it changes nothing and gives the same.
    pub(crate) async fn requeue(
        &self,
        job: JobId,
        letter: i64,
        deadline: OffsetDateTime,
        (since, now): (OffsetDateTime, OffsetDateTime),
        operator: Who,
    ) -> Result<std::result::Result<Requeue, Refused>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let lock = format!("SELECT {RECORD}, requeue_of FROM jobs WHERE id = $1 FOR UPDATE");
            let Some(row) = transaction.query_opt(&lock, &[&job.uuid()]).await? else {
                return Ok(Err("the job's record is no longer kept"));
            };
            let record = Record::try_from(&row)?;
            if let Err(refused) = may_reopen(&record, row.get("requeue_of"), letter, since) {
                return Ok(Err(refused));
            }
            if let Some(state) = job::step(record.state, Event::Requeued) {
                // It is open again, and the latest of its client.
                let load = "UPDATE loads SET jobs = loads.jobs + 1, bytes = loads.bytes + j.bytes, \
                            tickets = tickets + 1 FROM jobs j WHERE j.id = $1 AND loads.client = j.client \
                            RETURNING tickets";
                let ticket: i64 = transaction.query_one(load, &[&job.uuid()]).await?.get(0);
                let update = "UPDATE jobs SET ticket = $6, event = NULL, state = $2, finished_at = NULL, failure = NULL, attempts = 0, \
                              started_at = NULL, model_us = NULL, queued_at = $3, deadline = $4, \
                              stream_seq = NULL, purged_at = NULL, requeues = requeues + 1, requeue_of = $5, \
                              requeue_pending = true WHERE id = $1";
                let (id, state) = (job.uuid(), state.as_str());
                transaction.execute(update, &[&id, &state, &now, &deadline, &letter, &ticket]).await?;
                let event = AuditEvent::new(Action::DeadRequeued, operator, now);
                of_jobs(&event.detail(json!({ "letter": letter })), &transaction, &[id]).await?;
            }
            let reopened = current(&transaction, job).await?;
            transaction.commit().await?;
            Ok(Ok(reopened))
        })
        .await
    }

    /// The job that was put back last from this dead letter, whether the letter is still there or not.
    pub(crate) async fn requeued_from(&self, letter: i64) -> Result<Option<Requeue>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = format!(
                "SELECT {REQUEUE} FROM jobs WHERE requeue_of = $1 ORDER BY requeue_pending DESC, id DESC LIMIT 1"
            );
            Ok(connection.query_opt(&select, &[&letter]).await?.as_ref().map(requeue))
        })
        .await
    }

    /// What a crash left between record and queue.
    pub(crate) async fn pending_requeues(&self) -> Result<Vec<Requeue>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = format!("SELECT {REQUEUE} FROM jobs WHERE requeue_pending ORDER BY id LIMIT $1");
            let rows = connection.query(&select, &[&SWEEP_BATCH]).await?;
            Ok(rows.iter().map(requeue).collect())
        })
        .await
    }

    /// The payload is in JOBS again, at `sequence`.
    pub(crate) async fn requeue_published(&self, requeue: &Requeue, sequence: u64) -> Result<()> {
        within(async {
            let update = "UPDATE jobs SET stream_seq = $3 WHERE id = $1 AND requeues = $2";
            let (id, requeues) = (requeue.job.uuid(), requeue.requeues as i32);
            self.pool.get().await?.execute(update, &[&id, &requeues, &(sequence as i64)]).await?;
            Ok(())
        })
        .await
    }

    /// Fails an open job whose payload was lost on its way out of DEAD, unless it has reached JOBS meanwhile.
    pub(crate) async fn settle_unpublished(&self, requeue: &Requeue, now: OffsetDateTime) -> Result<()> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let same = "stream_seq IS NULL AND requeue_pending AND id = $3";
            let id = requeue.job.uuid();
            let settled = give_up(&transaction, same, &id, now, Code::PayloadLost).await?;
            if !settled.is_empty() {
                let event = AuditEvent::new(Action::PayloadLost, Who::part("operate"), now);
                let event = event.code(Code::PayloadLost).detail(json!({ "letter": requeue.letter }));
                of_jobs(&event, &transaction, &[id]).await?;
            }
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// The dead letter is out of DEAD, or stays there for good.
    pub(crate) async fn requeue_done(&self, requeue: &Requeue) -> Result<()> {
        within(async {
            let update = "UPDATE jobs SET requeue_pending = false WHERE id = $1 AND requeues = $2";
            let (id, requeues) = (requeue.job.uuid(), requeue.requeues as i32);
            self.pool.get().await?.execute(update, &[&id, &requeues]).await?;
            Ok(())
        })
        .await
    }

    /// Notes that `operator` has a dead letter removed. What is left of its payload in the object store is
    /// removed by the sweeper.
    pub(crate) async fn purge(
        &self,
        letter: i64,
        client: Option<ClientId>,
        job: Option<JobId>,
        now: OffsetDateTime,
        operator: Who,
    ) -> Result<()> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            if let Some(job) = job {
                // Of a job that goes on, or has gone on, the object is still needed, or its end removes it.
                let mark = "UPDATE jobs SET purged_at = $2 WHERE id = $1 AND state = 'failed'";
                transaction.execute(mark, &[&job.uuid(), &now]).await?;
            }
            let event = AuditEvent::new(Action::DeadPurged, operator, now).client(client);
            let event = event.object(job.map(Object::job)).detail(json!({ "letter": letter }));
            insert(&transaction, &[event]).await?;
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// Claim-checked payloads whose dead letter was removed.
    pub(crate) async fn purged_objects(&self) -> Result<Vec<JobId>> {
        within(async {
            let select =
                "SELECT id FROM jobs WHERE purged_at IS NOT NULL AND claim_check AND state = 'failed' LIMIT $1";
            let rows = self.pool.get().await?.query(select, &[&SWEEP_BATCH]).await?;
            Ok(rows.iter().map(|row| row.get::<_, Uuid>(0).into()).collect())
        })
        .await
    }

    /// These payloads are no longer in the object store.
    pub(crate) async fn objects_removed(&self, jobs: &[JobId]) -> Result<()> {
        within(async {
            let ids: Vec<Uuid> = jobs.iter().map(|job| job.uuid()).collect();
            let update = "UPDATE jobs SET claim_check = false WHERE id IN \
                          (SELECT id FROM jobs WHERE id = ANY($1) ORDER BY id FOR UPDATE)";
            self.pool.get().await?.execute(update, &[&ids]).await?;
            Ok(())
        })
        .await
    }
}

/// Whether the letter may open the job, or has opened it already.
fn may_reopen(
    record: &Record,
    requeue_of: Option<i64>,
    letter: i64,
    since: OffsetDateTime,
) -> Result<(), Refused> {
    match record.state {
        _ if record.deleted_at.is_some() => Err("its client has removed it"),
        State::Cancelled => Err("its client has cancelled it"),
        State::Succeeded => Err("it has succeeded"),
        State::Failed if record.failure.as_ref().is_some_and(|failure| failure.code == Code::NeverQueued) => {
            Err("its client was told that it was not accepted")
        }
        State::Failed if record.finished_at.is_none_or(|at| at < since) => {
            Err("the job's record is no longer kept")
        }
        State::Failed => Ok(()),
        _ if requeue_of == Some(letter) => Ok(()),
        _ => Err("it has not ended"),
    }
}

async fn current(transaction: &Transaction<'_>, job: JobId) -> Result<Requeue> {
    let select = format!("SELECT {REQUEUE} FROM jobs WHERE id = $1");
    Ok(requeue(&transaction.query_one(&select, &[&job.uuid()]).await?))
}
