//! The record of jobs in PostgreSQL, and what else ingress keeps there: every statement on its own tables. Those on accounts,
//! credentials and the trail are in `dermflow_auth`.
//!
//! A job changes state only by a statement whose condition comes from [`job::sources`], so the database and
//! [`job::step`] cannot disagree, and of two racing transitions one finds nothing to do.

use std::collections::BTreeMap;

use deadpool_postgres::{Pool, Transaction};
use dermflow_auth::{
    audit::{Action, Event as AuditEvent, Outcome as AuditOutcome, Who},
    db::{self, DbError, within},
};
use dermflow_schemas::{
    envelope::{Failure, Outcome, Progress, ResultHeader},
    error::Code,
    id::{ClientId, JobId},
    job::{self, Event, Lane, State},
    limits::SWEEP_BATCH,
    seal::Sealed,
};
use time::OffsetDateTime;
use tokio_postgres::{
    Row,
    types::{Json, ToSql},
};
use uuid::Uuid;

pub(crate) mod acme;
mod audit;
pub(crate) mod batches;
pub(crate) mod claim;
pub(crate) mod connections;
mod dead;
pub(crate) mod drain;
pub(crate) mod reports;
pub(crate) mod reseal;
mod retention;
mod sweeping;

use self::connections::Connections;
pub(crate) use self::{
    dead::Requeue,
    sweeping::{InLine, Leader, Open},
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
    /// When its report was first handed out, if it is not kept.
    pub(crate) answered_at: Option<OffsetDateTime>,
    pub(crate) deadline: OffsetDateTime,
    pub(crate) stream_seq: Option<i64>,
    pub(crate) claim_check: bool,
    pub(crate) model_us: Option<i64>,
    pub(crate) failure: Option<Failure>,
    /// When its result was removed.
    pub(crate) deleted_at: Option<OffsetDateTime>,
    pub(crate) ticket: i64,
    pub(crate) batch: Option<Uuid>,
    pub(crate) line: Option<i32>,
    pub(crate) custom_id: Option<String>,
}

const RECORD: &str = "id, lane, state, images, attempts, accepted_at, queued_at, started_at, finished_at, answered_at, \
                      deadline, stream_seq, claim_check, model_us, failure, deleted_at, ticket, batch, line, custom_id";

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
            answered_at: row.try_get("answered_at")?,
            deadline: row.try_get("deadline")?,
            stream_seq: row.try_get("stream_seq")?,
            claim_check: row.try_get("claim_check")?,
            model_us: row.try_get("model_us")?,
            failure: row.try_get::<_, Option<Json<Failure>>>("failure")?.map(|Json(failure)| failure),
            deleted_at: row.try_get("deleted_at")?,
            ticket: row.try_get("ticket")?,
            batch: row.try_get("batch")?,
            line: row.try_get("line")?,
            custom_id: row.try_get("custom_id")?,
        })
    }
}

/// A job whose payload is in the queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queued {
    pub(crate) job: JobId,
    /// In JOBS.
    pub(crate) sequence: u64,
    pub(crate) deadline: OffsetDateTime,
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
    pool: Connections,
}

type Result<T, E = DbError> = std::result::Result<T, E>;

fn open_states(event: Event) -> Vec<&'static str> {
    job::sources(event).map(State::as_str).collect()
}

impl Store {
    pub(crate) fn new(pool: Pool) -> Self {
        Self { pool: Connections::new(pool) }
    }

    pub(crate) fn pool(&self) -> &Pool {
        self.pool.pool()
    }

    pub(crate) fn connections(&self) -> &Connections {
        &self.pool
    }

    pub(crate) async fn migrate(&self) -> Result<()> {
        db::migrate(self.pool(), &migrations::migrations::runner()).await
    }

    pub(crate) async fn ping(&self) -> Result<()> {
        within(async {
            self.pool.get().await?.batch_execute("SELECT 1").await?;
            Ok(())
        })
        .await
    }

    /// The database's clock.
    pub(crate) async fn clock(&self) -> Result<OffsetDateTime> {
        within(async { Ok(self.pool.get().await?.query_one("SELECT clock_timestamp()", &[]).await?.get(0)) })
            .await
    }

    /// The queue acknowledged payloads, whose headers have these deadlines. Returns the jobs that
    /// are on record: not those that the sweeper has given up meanwhile as never queued, whose keys are free.
    pub(crate) async fn queued(&self, marks: &[Queued], now: OffsetDateTime) -> Result<Vec<JobId>> {
        within(async {
            let connection = self.pool.get().await?;
            let update = "WITH mark AS (SELECT m.* FROM unnest($1::uuid[], $2::bigint[], $3::timestamptz[]) \
                      AS m (id, sequence, deadline) JOIN jobs ON jobs.id = m.id ORDER BY m.id FOR UPDATE OF jobs) \
                      UPDATE jobs SET stream_seq = mark.sequence, queued_at = coalesce(queued_at, $4), \
                      deadline = CASE WHEN state = ANY($5) THEN mark.deadline ELSE jobs.deadline END, \
                      state = CASE WHEN state = ANY($5) THEN 'queued' ELSE state END \
                      FROM mark WHERE jobs.id = mark.id \
                      RETURNING jobs.id, coalesce(failure->>'code' = $6, false) AS settled";
            let update = connection.prepare_cached(update).await?;
            let ids: Vec<Uuid> = marks.iter().map(|mark| mark.job.uuid()).collect();
            let sequences: Vec<i64> = marks.iter().map(|mark| mark.sequence as i64).collect();
            let deadlines: Vec<OffsetDateTime> = marks.iter().map(|mark| mark.deadline).collect();
            let open = open_states(Event::Queued);
            let never = Code::NeverQueued.kind().code;
            let rows =
                connection.query(&update, &[&ids, &sequences, &deadlines, &now, &open, &never]).await?;
            let kept = rows.iter().filter(|row| !row.get::<_, bool>("settled"));
            Ok(kept.map(|row| row.get::<_, Uuid>(0).into()).collect())
        })
        .await
    }

    /// The queue refused payloads for certain: nothing was accepted, and nothing is left of the jobs.
    pub(crate) async fn forget(&self, ids: &[JobId], now: OffsetDateTime) -> Result<()> {
        within(async {
            let ids: Vec<Uuid> = ids.iter().map(|id| id.uuid()).collect();
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let lock = format!(
                "SELECT {ENDING} FROM jobs WHERE id = ANY($1) AND state = 'accepted' ORDER BY id FOR UPDATE"
            );
            let rows = transaction.query(&lock, &[&ids]).await?;
            let locked: Vec<Ending> = rows.iter().map(Ending::from).collect();
            release(&transaction, &locked).await?;
            let locked: Vec<Uuid> = locked.iter().map(|open| open.id).collect();
            let event = AuditEvent::new(Action::Submit, Who::part("ingress"), now);
            let event = event.outcome(AuditOutcome::Failed, Code::QueueFull);
            audit::of_jobs(&event, &transaction, &locked).await?;
            transaction.execute("DELETE FROM jobs WHERE id = ANY($1)", &[&locked]).await?;
            transaction.commit().await?;
            Ok(())
        })
        .await
    }

    /// Workers began attempts, or parked jobs for the next one. A note that comes late, or twice, changes nothing.
    pub(crate) async fn started(&self, notes: &[Progress]) -> Result<()> {
        within(async {
            let ids: Vec<Uuid> = notes.iter().map(|note| note.job.uuid()).collect();
            let attempts: Vec<i32> = notes.iter().map(|note| note.attempt as i32).collect();
            let times: Vec<OffsetDateTime> = notes.iter().map(|note| note.started_at).collect();
            let parked: Vec<bool> = notes.iter().map(|note| note.parked).collect();
            let connection = self.pool.get().await?;
            // Of each job the last one; locked in order of their ids, as results of the same jobs are.
            let update = "WITH note AS (SELECT n.* FROM (SELECT DISTINCT ON (id) * \
                      FROM unnest($1::uuid[], $2::int[], $3::timestamptz[], $5::bool[]) AS n (id, attempt, at, parked) \
                      ORDER BY id, attempt DESC, parked DESC) AS n JOIN jobs ON jobs.id = n.id \
                      WHERE state = ANY($4) AND attempts < n.attempt + n.parked::int ORDER BY n.id FOR UPDATE OF jobs) \
                      UPDATE jobs SET state = CASE WHEN note.parked THEN 'queued' ELSE 'running' END, \
                      started_at = note.at, attempts = note.attempt FROM note \
                      WHERE jobs.id = note.id AND state = ANY($4) AND attempts < note.attempt + note.parked::int";
            let update = connection.prepare_cached(update).await?;
            let open = open_states(Event::Started);
            connection.execute(&update, &[&ids, &attempts, &times, &open, &parked]).await?;
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
            // What they are searched by goes where it ends with them.
            let index = "WITH moved AS (UPDATE jobs SET search = NULL WHERE id = ANY($1) AND search IS NOT NULL \
                     RETURNING client, id, old.search AS tokens) \
                     INSERT INTO report_tokens (client, job, token) \
                     SELECT client, id, unnest(tokens) FROM moved ON CONFLICT DO NOTHING";
            let index = transaction.prepare_cached(index).await?;
            let count = "INSERT INTO usage (client, day, jobs, images) \
                     SELECT client, (accepted_at AT TIME ZONE 'UTC')::date AS day, count(*), sum(images) \
                     FROM jobs WHERE id = ANY($1) GROUP BY client, day ORDER BY client, day \
                     ON CONFLICT (client, day) DO UPDATE \
                     SET jobs = usage.jobs + excluded.jobs, images = usage.images + excluded.images";
            let count = transaction.prepare_cached(count).await?;
            // In one round trip.
            let (report, id): (&[&(dyn ToSql + Sync)], &[&(dyn ToSql + Sync)]) = (&[&ids, &keys, &sealed], &[&ids]);
            tokio::try_join!(
                transaction.execute(&insert, report),
                transaction.execute(&index, id),
                transaction.execute(&count, id)
            )?;
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

    /// [`Self::find`], and the sealed report if there is one.
    pub(crate) async fn find_with_report(
        &self,
        job: JobId,
        client: ClientId,
    ) -> Result<Option<(Record, Option<Sealed>)>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = format!(
                "SELECT {RECORD}, key_id, sealed FROM jobs LEFT JOIN reports ON job = id \
                 WHERE id = $1 AND client = $2"
            );
            let select = connection.prepare_cached(&select).await?;
            let Some(row) = connection.query_opt(&select, &[&job.uuid(), &client.uuid()]).await? else {
                return Ok(None);
            };
            let sealed = |key_id| Sealed { key_id, bytes: row.get::<_, Vec<u8>>("sealed").into() };
            Ok(Some((Record::try_from(&row)?, row.get::<_, Option<String>>("key_id").map(sealed))))
        })
        .await
    }

    /// Withdraws a job that is open, and removes the result of one that has ended. Returns the job as it was
    /// when there was something to do.
    pub(crate) async fn delete(
        &self,
        job: JobId,
        client: ClientId,
        who: Who,
        now: OffsetDateTime,
    ) -> Result<Option<Record>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let select =
                format!("SELECT {RECORD}, client, bytes FROM jobs WHERE id = $1 AND client = $2 FOR UPDATE");
            let row = transaction.query_opt(&select, &[&job.uuid(), &client.uuid()]).await?;
            let Some(row) = row else { return Ok(None) };
            let record = Record::try_from(&row)?;
            if record.deleted_at.is_some() || record.state == State::Cancelled {
                return Ok(None);
            }
            if let Some(state) = job::step(record.state, Event::Cancelled) {
                let event = release(&transaction, &[Ending::from(&row)]).await?[0];
                let update =
                    "UPDATE jobs SET state = $2, finished_at = $3, event = $4, search = NULL WHERE id = $1";
                transaction.execute(update, &[&job.uuid(), &state.as_str(), &now, &event]).await?;
            } else {
                retention::remove_reports(&transaction, &[job.uuid()], now).await?;
            }
            let detail = serde_json::json!({ "state": record.state });
            let event = AuditEvent::new(Action::JobWithdrawn, who, now).detail(detail);
            audit::of_jobs(&event, &transaction, &[job.uuid()]).await?;
            transaction.commit().await?;
            Ok(Some(record))
        })
        .await
    }
}

/// Locks the jobs in order of their ids, so that overlapping batches cannot deadlock, then ends those that
/// are open.
async fn settle_jobs(
    transaction: &Transaction<'_>,
    results: &[(ResultHeader, Option<Sealed>)],
) -> Result<Vec<Settled>> {
    let ids: Vec<Uuid> = results.iter().map(|(header, _)| header.job.uuid()).collect();
    let lock = transaction
        .prepare_cached(&format!(
            "SELECT {ENDING}, requeues FROM jobs WHERE id = ANY($1) AND finished_at IS NULL ORDER BY id FOR UPDATE"
        ))
        .await?;
    let rows = transaction.query(&lock, &[&ids]).await?;
    let winners: Vec<(Ending, &ResultHeader)> =
        rows.iter().filter_map(|row| Some((Ending::from(row), winner(row, results)?))).collect();
    // Most results reach us twice: a waiter has recorded them when the recorder comes.
    if winners.is_empty() {
        return Ok(Vec::new());
    }
    let endings: Vec<Ending> = winners.iter().map(|(ending, _)| *ending).collect();
    let events = release(transaction, &endings).await?;
    let ids: Vec<Uuid> = endings.iter().map(|ending| ending.id).collect();
    let headers = winners.iter().map(|(_, header)| header);
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
    let model: Vec<i64> = headers.map(|header| header.model_us as i64).collect();
    // A worker's clock may be wrong; how long a report is kept counts from here.
    let update = format!(
        "UPDATE jobs SET state = r.state, failure = r.failure, attempts = r.attempts, started_at = r.started, \
                         finished_at = greatest(accepted_at, least(r.finished, now())), model_us = r.model, event = r.event \
         FROM unnest($1::uuid[], $2::text[], $3::jsonb[], $4::int[], $5::timestamptz[], $6::timestamptz[], \
                     $7::bigint[], $8::bigint[]) \
              AS r (id, state, failure, attempts, started, finished, model, event) \
         WHERE jobs.id = r.id AND jobs.state = ANY($9) RETURNING {SETTLED}"
    );
    let update = transaction.prepare_cached(&update).await?;
    let open = open_states(Event::Succeeded);
    let rows = transaction
        .query(&update, &[&ids, &states, &failures, &attempts, &started, &finished, &model, &events, &open])
        .await?;
    Ok(rows.iter().map(settled).collect())
}

/// The first result of an open job that counts: a failure from before it was put back into the queue says nothing
/// about it.
fn winner<'r>(row: &Row, results: &'r [(ResultHeader, Option<Sealed>)]) -> Option<&'r ResultHeader> {
    let (id, requeues): (Uuid, i32) = (row.get("id"), row.get("requeues"));
    let counts = |header: &&ResultHeader| {
        header.job.uuid() == id
            && (header.outcome == Outcome::Succeeded || i64::from(header.requeues) >= i64::from(requeues))
    };
    results.iter().map(|(header, _)| header).find(counts)
}

const SETTLED: &str = "jobs.id, jobs.lane, jobs.state, jobs.accepted_at, jobs.stream_seq, jobs.claim_check, jobs.attempts, jobs.failure";

fn settled(row: &Row) -> Settled {
    let state = row.get::<_, &str>("state").parse().unwrap_or(State::Failed);
    let (attempts, failure): (i32, Option<Json<Failure>>) = (row.get("attempts"), row.get("failure"));
    let dead_letter = failure.is_some_and(|Json(failure)| failure.leaves_letter(attempts as u32));
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
    // Numbered as in every statement that has a condition of this kind: $1 now, $3 the bound.
    let lock = format!(
        "SELECT {ENDING} FROM jobs WHERE finished_at IS NULL AND {condition} AND $1::timestamptz IS NOT NULL \
         ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED"
    );
    let rows = transaction.query(&lock, &[&now, &SWEEP_BATCH, before]).await?;
    let open: Vec<Ending> = rows.iter().map(Ending::from).collect();
    fail(transaction, &open, now, code).await
}

/// Fails open jobs that are locked.
pub(crate) async fn fail(
    transaction: &Transaction<'_>,
    open: &[Ending],
    now: OffsetDateTime,
    code: Code,
) -> Result<Vec<Settled>> {
    let events = release(transaction, open).await?;
    let ids: Vec<Uuid> = open.iter().map(|open| open.id).collect();
    let update = format!(
        "UPDATE jobs SET state = 'failed', finished_at = $1, failure = $2, event = ended.event \
         FROM unnest($3::uuid[], $4::bigint[]) AS ended (id, event) \
         WHERE jobs.id = ended.id AND state = ANY($5) RETURNING {SETTLED}"
    );
    let failure = Json(Failure { code, image: None });
    let sources = open_states(Event::Failed);
    let rows = transaction.query(&update, &[&now, &failure, &ids, &events, &sources]).await?;
    Ok(rows.iter().map(settled).collect())
}

/// What is needed of an open job, locked, to end it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ending {
    pub(crate) id: Uuid,
    client: Uuid,
    bytes: i64,
}

/// The columns of [`Ending`].
pub(crate) const ENDING: &str = "id, client, bytes";

impl From<&Row> for Ending {
    fn from(row: &Row) -> Self {
        Self { id: row.get("id"), client: row.get("client"), bytes: row.get("bytes") }
    }
}

/// Takes jobs that end off their clients' loads, and numbers them among all that the client saw end: one number
/// a job, in order. The loads stay locked until the end is on disk, so the numbers become visible in order.
pub(crate) async fn release(transaction: &Transaction<'_>, open: &[Ending]) -> Result<Vec<i64>> {
    let mut loads: BTreeMap<Uuid, (i64, i64)> = BTreeMap::new();
    for job in open {
        let (jobs, bytes) = loads.entry(job.client).or_default();
        *jobs += 1;
        *bytes += job.bytes;
    }
    let clients: Vec<Uuid> = loads.keys().copied().collect();
    if clients.len() > 1 {
        let lock = "SELECT FROM loads WHERE client = ANY($1) ORDER BY client FOR UPDATE";
        let lock = transaction.prepare_cached(lock).await?;
        transaction.execute(&lock, &[&clients]).await?;
    }
    let (jobs, bytes): (Vec<i64>, Vec<i64>) = loads.values().copied().unzip();
    let update = "UPDATE loads SET jobs = loads.jobs - l.jobs, bytes = loads.bytes - l.bytes, \
                  events = events + l.jobs \
                  FROM unnest($1::uuid[], $2::bigint[], $3::bigint[]) AS l (client, jobs, bytes) \
                  WHERE loads.client = l.client RETURNING loads.client, events - l.jobs";
    let update = transaction.prepare_cached(update).await?;
    let rows = transaction.query(&update, &[&clients, &jobs, &bytes]).await?;
    let mut next: BTreeMap<Uuid, i64> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let number = |job: &Ending| {
        let last = next.entry(job.client).or_default();
        *last += 1;
        *last
    };
    Ok(open.iter().map(number).collect())
}
