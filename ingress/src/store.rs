//! The record of jobs in PostgreSQL: every statement that ingress sends.
//!
//! A job changes state only by a statement whose condition comes from [`job::sources`], so the database and
//! [`job::step`] cannot disagree, and of two racing transitions one finds nothing to do.

use deadpool_postgres::{Pool, Transaction};
use dermflow_auth::db::{self, DbError, within};
use dermflow_schemas::{
    envelope::{Failure, Outcome, Progress, ResultHeader},
    error::Code,
    id::{ClientId, IdempotencyKey, JobId},
    job::{self, Event, Lane, State},
    limits::{MAX_ATTEMPTS, SWEEP_BATCH},
    seal::Sealed,
};
use time::OffsetDateTime;
use tokio_postgres::{
    Row,
    types::{Json, ToSql},
};
use uuid::Uuid;

mod audit;
mod dead;
mod sweeping;

pub(crate) use self::{
    audit::{Act, Audit},
    dead::Requeue,
    sweeping::{Gaps, Leader, Open},
};

mod migrations {
    refinery::embed_migrations!("migrations");
}

/// A job as recorded.
#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) id: JobId,
    pub(crate) lane: Lane,
    pub(crate) state: State,
    pub(crate) images: i16,
    pub(crate) attempts: i32,
    pub(crate) accepted_at: OffsetDateTime,
    pub(crate) queued_at: Option<OffsetDateTime>,
    pub(crate) started_at: Option<OffsetDateTime>,
    pub(crate) finished_at: Option<OffsetDateTime>,
    pub(crate) deadline: OffsetDateTime,
    pub(crate) stream_seq: Option<i64>,
    pub(crate) claim_check: bool,
    pub(crate) model_us: Option<i64>,
    pub(crate) failure: Option<Failure>,
    pub(crate) deleted: bool,
}

const RECORD: &str = "id, lane, state, images, attempts, accepted_at, queued_at, started_at, finished_at, \
                      deadline, stream_seq, claim_check, model_us, failure, deleted_at";

impl TryFrom<&Row> for Record {
    type Error = tokio_postgres::Error;

    fn try_from(row: &Row) -> Result<Self, Self::Error> {
        Ok(Self {
            id: row.try_get::<_, Uuid>("id")?.into(),
            lane: row.try_get::<_, &str>("lane")?.parse().unwrap_or(Lane::Bulk),
            state: row.try_get::<_, &str>("state")?.parse().unwrap_or(State::Failed),
            images: row.try_get("images")?,
            attempts: row.try_get("attempts")?,
            accepted_at: row.try_get("accepted_at")?,
            queued_at: row.try_get("queued_at")?,
            started_at: row.try_get("started_at")?,
            finished_at: row.try_get("finished_at")?,
            deadline: row.try_get("deadline")?,
            stream_seq: row.try_get("stream_seq")?,
            claim_check: row.try_get("claim_check")?,
            model_us: row.try_get("model_us")?,
            failure: row.try_get::<_, Option<Json<Failure>>>("failure")?.map(|Json(failure)| failure),
            deleted: row.try_get::<_, Option<OffsetDateTime>>("deleted_at")?.is_some(),
        })
    }
}

/// A job about to be recorded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewJob {
    pub(crate) id: JobId,
    pub(crate) client: ClientId,
    pub(crate) lane: Lane,
    pub(crate) images: usize,
    pub(crate) accepted_at: OffsetDateTime,
    pub(crate) deadline: OffsetDateTime,
    pub(crate) claim_check: bool,
}

/// What came of recording a job.
#[derive(Debug)]
pub(crate) enum Claim {
    /// Recorded as new.
    New,
    /// The key stands for this job already, with the same request.
    Known(Box<Record>),
    /// The key stands for another request.
    Conflict,
}

/// A result that was the first one of its job.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) id: JobId,
    pub(crate) lane: Lane,
    pub(crate) state: State,
    pub(crate) accepted_at: OffsetDateTime,
    pub(crate) stream_seq: Option<i64>,
    /// The payload is in the object store and not among the dead letters.
    pub(crate) spent_claim_check: bool,
}

/// The record. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    pool: Pool,
}

type Result<T, E = DbError> = std::result::Result<T, E>;

fn open_states(event: Event) -> Vec<&'static str> {
    job::sources(event).map(State::as_str).collect()
}

impl Store {
    pub(crate) fn new(pool: Pool) -> Self {
        Self { pool }
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(crate) async fn migrate(&self) -> Result<()> {
        db::migrate(&self.pool, &migrations::migrations::runner()).await
    }

    pub(crate) async fn ping(&self) -> Result<()> {
        within(async {
            self.pool.get().await?.batch_execute("SELECT 1").await?;
            Ok(())
        })
        .await
    }

    /// Step 2 of a job's life: claims the key and inserts the job, both or neither.
    pub(crate) async fn claim(
        &self,
        job: &NewJob,
        key: Option<&IdempotencyKey>,
        digest: &[u8],
    ) -> Result<Claim> {
        within(async {
        let mut connection = self.pool.get().await?;
        let transaction = connection.transaction().await?;
        if let Some(key) = key {
            let insert = "INSERT INTO idempotency_keys (client, key, digest, job) VALUES ($1, $2, $3, $4) \
                          ON CONFLICT DO NOTHING";
            let insert = transaction.prepare_cached(insert).await?;
            let client = job.client.uuid();
            let claimed =
                transaction.execute(&insert, &[&client, &key.as_str(), &digest, &job.id.uuid()]).await?;
            if claimed == 0 {
                return known(&transaction, job.client, key, digest).await;
            }
        }
        insert_job(&transaction, job).await?;
        transaction.commit().await?;
        Ok(Claim::New)
        })
        .await
    }

    /// The queue acknowledged the payload, whose header has this deadline.
    pub(crate) async fn queued(
        &self,
        job: JobId,
        sequence: u64,
        now: OffsetDateTime,
        deadline: OffsetDateTime,
    ) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            let update = "UPDATE jobs SET stream_seq = $2, queued_at = coalesce(queued_at, $3), \
                      deadline = CASE WHEN state = ANY($4) THEN $5 ELSE deadline END, \
                      state = CASE WHEN state = ANY($4) THEN 'queued' ELSE state END WHERE id = $1";
            let update = connection.prepare_cached(update).await?;
            let open = open_states(Event::Queued);
            connection.execute(&update, &[&job.uuid(), &(sequence as i64), &now, &open, &deadline]).await?;
            Ok(())
        })
        .await
    }

    /// Workers began attempts. A note that comes late, or twice, changes nothing.
    pub(crate) async fn started(&self, notes: &[Progress]) -> Result<()> {
        within(async {
            let ids: Vec<Uuid> = notes.iter().map(|note| note.job.uuid()).collect();
            let attempts: Vec<i32> = notes.iter().map(|note| note.attempt as i32).collect();
            let times: Vec<OffsetDateTime> = notes.iter().map(|note| note.started_at).collect();
            let connection = self.pool.get().await?;
            let update = "UPDATE jobs SET state = 'running', started_at = note.at, attempts = note.attempt \
                      FROM unnest($1::uuid[], $2::int[], $3::timestamptz[]) AS note (id, attempt, at) \
                      WHERE jobs.id = note.id AND state = ANY($4) AND attempts < note.attempt";
            let update = connection.prepare_cached(update).await?;
            connection.execute(&update, &[&ids, &attempts, &times, &open_states(Event::Started)]).await?;
            Ok(())
        })
        .await
    }

    /// Step 8: records results. The first result of a job wins; usage is counted with it. Returns the winners.
    pub(crate) async fn settle(&self, results: &[(ResultHeader, Option<Sealed>)]) -> Result<Vec<Settled>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let winners = settle_jobs(&transaction, results).await?;
            if winners.is_empty() {
                return Ok(winners);
            }
            let won =
                |id: JobId| winners.iter().any(|winner| winner.id == id && winner.state == State::Succeeded);
            let reports: Vec<_> = results
                .iter()
                .filter_map(|(h, r)| Some((h.job, r.as_ref()?)))
                .filter(|(id, _)| won(*id))
                .collect();
            let ids: Vec<Uuid> = reports.iter().map(|(id, _)| id.uuid()).collect();
            let keys: Vec<&str> = reports.iter().map(|(_, report)| report.key_id.as_str()).collect();
            let sealed: Vec<&[u8]> = reports.iter().map(|(_, report)| &*report.bytes).collect();
            let insert = "INSERT INTO reports (job, key_id, sealed) \
                      SELECT * FROM unnest($1::uuid[], $2::text[], $3::bytea[]) ON CONFLICT DO NOTHING";
            let insert = transaction.prepare_cached(insert).await?;
            transaction.execute(&insert, &[&ids, &keys, &sealed]).await?;
            let count = "INSERT INTO usage (client, day, jobs, images) \
                     SELECT client, (accepted_at AT TIME ZONE 'UTC')::date AS day, count(*), sum(images) \
                     FROM jobs WHERE id = ANY($1) GROUP BY client, day ORDER BY client, day \
                     ON CONFLICT (client, day) DO UPDATE \
                     SET jobs = usage.jobs + excluded.jobs, images = usage.images + excluded.images";
            let count = transaction.prepare_cached(count).await?;
            transaction.execute(&count, &[&ids]).await?;
            transaction.commit().await?;
            Ok(winners)
        })
        .await
    }

    /// A client's own job; another client's does not exist for it.
    pub(crate) async fn find(&self, job: JobId, client: ClientId) -> Result<Option<Record>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = format!("SELECT {RECORD} FROM jobs WHERE id = $1 AND client = $2");
            let select = connection.prepare_cached(&select).await?;
            let row = connection.query_opt(&select, &[&job.uuid(), &client.uuid()]).await?;
            Ok(row.as_ref().map(Record::try_from).transpose()?)
        })
        .await
    }

    /// The sealed report of a job.
    pub(crate) async fn report(&self, job: JobId) -> Result<Option<Sealed>> {
        within(async {
            let connection = self.pool.get().await?;
            let select =
                connection.prepare_cached("SELECT key_id, sealed FROM reports WHERE job = $1").await?;
            let row = connection.query_opt(&select, &[&job.uuid()]).await?;
            Ok(row.map(|row| Sealed { key_id: row.get(0), bytes: row.get::<_, Vec<u8>>(1).into() }))
        })
        .await
    }

    /// Withdraws a job that is open, and removes the result of one that has ended. Returns the job as it was
    /// when there was something to do.
    pub(crate) async fn delete(
        &self,
        job: JobId,
        client: ClientId,
        now: OffsetDateTime,
    ) -> Result<Option<Record>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let select = format!("SELECT {RECORD} FROM jobs WHERE id = $1 AND client = $2 FOR UPDATE");
            let row = transaction.query_opt(&select, &[&job.uuid(), &client.uuid()]).await?;
            let Some(record) = row.as_ref().map(Record::try_from).transpose()? else { return Ok(None) };
            if record.deleted || record.state == State::Cancelled {
                return Ok(None);
            }
            if let Some(state) = job::step(record.state, Event::Cancelled) {
                let update = "UPDATE jobs SET state = $2, finished_at = $3 WHERE id = $1";
                transaction.execute(update, &[&job.uuid(), &state.as_str(), &now]).await?;
            } else {
                transaction.execute("DELETE FROM reports WHERE job = $1", &[&job.uuid()]).await?;
                transaction
                    .execute("UPDATE jobs SET deleted_at = $2 WHERE id = $1", &[&job.uuid(), &now])
                    .await?;
            }
            let detail = serde_json::json!({ "state": record.state });
            let entry = Audit { at: now, actor: client.to_string(), act: Act::JobWithdrawn, detail };
            entry.of_jobs(&transaction, &[job.uuid()]).await?;
            transaction.commit().await?;
            Ok(Some(record))
        })
        .await
    }
}

async fn known(
    transaction: &Transaction<'_>,
    client: ClientId,
    key: &IdempotencyKey,
    digest: &[u8],
) -> Result<Claim> {
    let select = format!(
        "SELECT k.digest, j.* FROM idempotency_keys k JOIN (SELECT {RECORD} FROM jobs) j ON j.id = k.job \
         WHERE k.client = $1 AND k.key = $2"
    );
    let row = transaction.query_one(&select, &[&client.uuid(), &key.as_str()]).await?;
    if row.get::<_, &[u8]>("digest") == digest {
        Ok(Claim::Known(Box::new(Record::try_from(&row)?)))
    } else {
        Ok(Claim::Conflict)
    }
}

async fn insert_job(transaction: &Transaction<'_>, job: &NewJob) -> Result<()> {
    let insert = "INSERT INTO jobs (id, client, lane, state, images, accepted_at, deadline, claim_check) \
                  VALUES ($1, $2, $3, 'accepted', $4, $5, $6, $7)";
    let insert = transaction.prepare_cached(insert).await?;
    let (id, client, images) = (job.id.uuid(), job.client.uuid(), job.images as i16);
    let (lane, claim_check) = (job.lane.as_str(), job.claim_check);
    transaction
        .execute(&insert, &[&id, &client, &lane, &images, &job.accepted_at, &job.deadline, &claim_check])
        .await?;
    Ok(())
}

/// Locks the jobs in order of their ids, so that overlapping batches cannot deadlock, then ends those that
/// are open.
async fn settle_jobs(
    transaction: &Transaction<'_>,
    results: &[(ResultHeader, Option<Sealed>)],
) -> Result<Vec<Settled>> {
    let ids: Vec<Uuid> = results.iter().map(|(header, _)| header.job.uuid()).collect();
    let lock = transaction
        .prepare_cached(
            "SELECT id FROM jobs WHERE id = ANY($1) AND finished_at IS NULL ORDER BY id FOR UPDATE",
        )
        .await?;
    // Most results reach us twice: a waiter has recorded them when the recorder comes.
    if transaction.execute(&lock, &[&ids]).await? == 0 {
        return Ok(Vec::new());
    }
    let headers = results.iter().map(|(header, _)| header);
    let ended: Vec<(&str, Option<Json<&Failure>>)> = headers
        .clone()
        .map(|header| match &header.outcome {
            Outcome::Succeeded => (State::Succeeded.as_str(), None),
            Outcome::Failed(failure) => (State::Failed.as_str(), Some(Json(failure))),
        })
        .collect();
    let states: Vec<&str> = ended.iter().map(|(state, _)| *state).collect();
    let failures: Vec<&Option<Json<&Failure>>> = ended.iter().map(|(_, failure)| failure).collect();
    let attempts: Vec<i32> = headers.clone().map(|header| header.attempts as i32).collect();
    let started: Vec<OffsetDateTime> = headers.clone().map(|header| header.started_at).collect();
    let finished: Vec<OffsetDateTime> = headers.clone().map(|header| header.finished_at).collect();
    let model: Vec<i64> = headers.clone().map(|header| header.model_us as i64).collect();
    // A failure from before the job was put back into the queue says nothing about it.
    let requeues: Vec<i32> = headers.map(|header| header.requeues as i32).collect();
    // A batch may hold two results of one job: DISTINCT ON takes the earlier one.
    let update = format!(
        "UPDATE jobs SET state = r.state, failure = r.failure, attempts = r.attempts, started_at = r.started, \
                         finished_at = r.finished, model_us = r.model \
         FROM (SELECT DISTINCT ON (r.id) r.* FROM unnest($1::uuid[], $2::text[], $3::jsonb[], $4::int[], \
               $5::timestamptz[], $6::timestamptz[], $7::bigint[], $9::int[]) WITH ORDINALITY \
               AS r (id, state, failure, attempts, started, finished, model, requeues, n) JOIN jobs ON \
               jobs.id = r.id AND (r.state = 'succeeded' OR r.requeues >= jobs.requeues) ORDER BY r.id, n) r \
         WHERE jobs.id = r.id AND jobs.state = ANY($8) RETURNING {SETTLED}"
    );
    let update = transaction.prepare_cached(&update).await?;
    let open = open_states(Event::Succeeded);
    let rows = transaction
        .query(&update, &[&ids, &states, &failures, &attempts, &started, &finished, &model, &open, &requeues])
        .await?;
    Ok(rows.iter().map(settled).collect())
}

const SETTLED: &str =
    "jobs.id, jobs.lane, jobs.state, jobs.accepted_at, jobs.stream_seq, jobs.claim_check, jobs.attempts";

fn settled(row: &Row) -> Settled {
    let state = row.get::<_, &str>("state").parse().unwrap_or(State::Failed);
    let dead_letter = state == State::Failed && row.get::<_, i32>("attempts") >= MAX_ATTEMPTS as i32;
    Settled {
        id: row.get::<_, Uuid>("id").into(),
        lane: row.get::<_, &str>("lane").parse().unwrap_or(Lane::Bulk),
        state,
        accepted_at: row.get("accepted_at"),
        stream_seq: row.get("stream_seq"),
        spent_claim_check: row.get("claim_check") && !dead_letter,
    }
}

/// Fails open jobs that meet `condition` on `$3`.
async fn give_up(
    transaction: &Transaction<'_>,
    condition: &str,
    before: &(dyn ToSql + Sync),
    now: OffsetDateTime,
    code: Code,
) -> Result<Vec<Settled>> {
    let update = format!(
        "UPDATE jobs SET state = 'failed', finished_at = $1, failure = $2 WHERE id IN (SELECT id FROM jobs \
         WHERE finished_at IS NULL AND {condition} LIMIT $4 FOR UPDATE SKIP LOCKED) AND state = ANY($5) \
         RETURNING {SETTLED}"
    );
    let failure = Json(Failure { code, image: None });
    let open = open_states(Event::Failed);
    let rows = transaction.query(&update, &[&now, &failure, before, &SWEEP_BATCH, &open]).await?;
    Ok(rows.iter().map(settled).collect())
}
