//! Batches: jobs that were submitted together, what became of them, and lists of jobs.

use dermflow_auth::{
    audit::{Action, Who},
    db::within,
};
use dermflow_schemas::{
    envelope::Failure,
    id::{ClientId, JobId},
    job::{Event, Lane, State},
    limits::{RESULTS_CHUNK, RESULTS_CHUNK_BYTES, SWEEP_BATCH, UPLOAD_LEASE},
    seal::Sealed,
};
use serde_json::Value;
use time::OffsetDateTime;
use tokio_postgres::{Row, types::Json};
use uuid::Uuid;

use super::{ENDING, Ending, RECORD, Record, Result, Store, open_states, release, retention::remove_reports};

/// A batch as recorded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch {
    pub(crate) id: Uuid,
    pub(crate) created_at: OffsetDateTime,
    /// When an upload reached its end, if none goes on.
    pub(crate) closed_at: Option<OffsetDateTime>,
}

/// How a batch's jobs stand.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tally {
    /// Jobs by state; a state that no job is in is left out.
    pub(crate) states: Vec<(State, i64)>,
    /// Lines refused for good.
    pub(crate) refused: i64,
    /// Jobs that ended since the time asked for.
    pub(crate) ended_since: i64,
    /// The client's event of the last job that ended.
    pub(crate) last_event: i64,
    pub(crate) last_finished: Option<OffsetDateTime>,
}

impl Tally {
    /// Jobs in a state.
    pub(crate) fn of(&self, state: State) -> i64 {
        self.states.iter().find(|(found, _)| *found == state).map_or(0, |(_, count)| *count)
    }

    /// All jobs.
    pub(crate) fn total(&self) -> i64 {
        self.states.iter().map(|(_, count)| count).sum()
    }

    /// Jobs that have not ended.
    pub(crate) fn open(&self) -> i64 {
        self.states.iter().filter(|(state, _)| !state.is_terminal()).map(|(_, count)| count).sum()
    }
}

/// A job's report, as a line of a batch's results.
#[derive(Debug)]
pub(crate) struct BatchResult {
    pub(crate) event: i64,
    pub(crate) line: i32,
    pub(crate) custom_id: String,
    pub(crate) job: JobId,
    /// `None` when it has been removed.
    pub(crate) sealed: Option<Sealed>,
}

/// What came of a line that has no report.
#[derive(Debug)]
pub(crate) struct BatchError {
    pub(crate) event: i64,
    pub(crate) line: i32,
    pub(crate) custom_id: Option<String>,
    pub(crate) job: Option<JobId>,
    pub(crate) cause: Cause,
}

/// Why a line has no report.
#[derive(Debug)]
pub(crate) enum Cause {
    /// Its job failed.
    Failed(Failure),
    /// Its job was cancelled.
    Cancelled,
    /// No job could be made of it; the error as the upload was told.
    Refused(Value),
}

/// A job that was cancelled with its batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cancelled {
    pub(crate) id: JobId,
    pub(crate) lane: Lane,
    pub(crate) stream_seq: Option<i64>,
    pub(crate) claim_check: bool,
}

/// Which of a client's jobs a list shows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// Any of these.
    pub(crate) states: Vec<State>,
    /// Accepted at this moment, or later.
    pub(crate) from: Option<OffsetDateTime>,
    /// Accepted earlier.
    pub(crate) before: Option<OffsetDateTime>,
    pub(crate) batch: Option<Uuid>,
    /// Jobs before this one, in the order of the list.
    pub(crate) cursor: Option<JobId>,
}

/// What repeats of a batch's line are known by. The space keeps it apart from every key that a caller can choose.
pub(crate) fn line_key(batch: Uuid, custom_id: &str) -> String {
    format!("batch {batch} {custom_id}")
}

/// The upload `$3` begins, seen at `$4`, to the batch that `opened` gives.
const BEGIN: &str = "INSERT INTO uploads (id, batch, seen_at) SELECT $3::uuid, id, $4::timestamptz FROM opened RETURNING batch";

impl Store {
    /// A new batch, or the one that was made with this key, with an upload that begins; `None` when that one was deleted.
    pub(crate) async fn open_batch(
        &self,
        id: Uuid,
        client: ClientId,
        key: Option<&str>,
        upload: Uuid,
        now: OffsetDateTime,
    ) -> Result<Option<Uuid>> {
        within(async {
            let upsert = format!(
                "WITH opened AS (INSERT INTO batches AS b (id, client, key, created_at) VALUES ($1, $2, $5, $4) \
                 ON CONFLICT (client, key) DO UPDATE SET closed_at = NULL WHERE b.deleted_at IS NULL RETURNING id) \
                 {BEGIN}"
            );
            let connection = self.pool.get().await?;
            let row = connection.query_opt(&upsert, &[&id, &client.uuid(), &upload, &now, &key]).await?;
            Ok(row.map(|row| row.get(0)))
        })
        .await
    }

    /// A batch of this client, with another upload that begins.
    pub(crate) async fn reopen_batch(
        &self,
        id: Uuid,
        client: ClientId,
        upload: Uuid,
        now: OffsetDateTime,
    ) -> Result<Option<Uuid>> {
        within(async {
            let update = format!(
                "WITH opened AS (UPDATE batches SET closed_at = NULL \
                 WHERE id = $1 AND client = $2 AND deleted_at IS NULL RETURNING id) {BEGIN}"
            );
            let connection = self.pool.get().await?;
            let row = connection.query_opt(&update, &[&id, &client.uuid(), &upload, &now]).await?;
            Ok(row.map(|row| row.get(0)))
        })
        .await
    }

    /// An upload goes on; whether its batch does, too.
    pub(crate) async fn upload_seen(&self, upload: Uuid, batch: Uuid, now: OffsetDateTime) -> Result<bool> {
        within(async {
            let update = "WITH seen AS (UPDATE uploads SET seen_at = $3 WHERE id = $1) \
                          SELECT EXISTS (SELECT FROM batches WHERE id = $2 AND deleted_at IS NULL)";
            Ok(self.pool.get().await?.query_one(update, &[&upload, &batch, &now]).await?.get(0))
        })
        .await
    }

    /// An upload ended: it reached its end, or it did not, and then the batch is open again, unless another upload has closed
    /// it after `since`: whoever was cut may have sent everything again before we know of it. Then that is when its last line
    /// came that no other upload had brought; when we ended it, now. Of an upload that has ended it changes nothing.
    pub(crate) async fn end_upload(
        &self,
        upload: Uuid,
        complete: bool,
        since: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<()> {
        within(async {
            let update = "WITH ended AS (DELETE FROM uploads WHERE id = $1 RETURNING batch) UPDATE batches \
                          SET closed_at = CASE WHEN $2 THEN $4::timestamptz WHEN closed_at > $3 THEN closed_at END \
                          FROM ended WHERE id = ended.batch";
            self.pool.get().await?.execute(update, &[&upload, &complete, &since, &now]).await?;
            Ok(())
        })
        .await
    }

    /// A client's own batch; a deleted one does not exist.
    pub(crate) async fn find_batch(
        &self,
        id: Uuid,
        client: ClientId,
        now: OffsetDateTime,
    ) -> Result<Option<Batch>> {
        within(async {
            let select = "SELECT id, created_at, \
                          CASE WHEN NOT EXISTS (SELECT FROM uploads WHERE batch = batches.id AND seen_at > $3) \
                          THEN closed_at END AS closed_at FROM batches WHERE id = $1 AND client = $2 AND deleted_at IS NULL";
            let connection = self.pool.get().await?;
            let select = connection.prepare_cached(select).await?;
            let row = connection.query_opt(&select, &[&id, &client.uuid(), &(now - UPLOAD_LEASE)]).await?;
            Ok(row.as_ref().map(batch))
        })
        .await
    }

    /// How a batch's jobs stand.
    pub(crate) async fn tally(&self, batch: Uuid, since: OffsetDateTime) -> Result<Tally> {
        within(async {
            let connection = self.pool.get().await?;
            let select = "SELECT state, count(*), coalesce(max(event), 0), max(finished_at), \
                          count(*) FILTER (WHERE finished_at > $2) FROM jobs WHERE batch = $1 GROUP BY state";
            let select = connection.prepare_cached(select).await?;
            let mut tally = Tally::default();
            for row in connection.query(&select, &[&batch, &since]).await? {
                let state = row.get::<_, &str>(0).parse().unwrap_or(State::Failed);
                tally.states.push((state, row.get(1)));
                tally.last_event = tally.last_event.max(row.get(2));
                tally.last_finished = tally.last_finished.max(row.get(3));
                tally.ended_since += row.get::<_, i64>(4);
            }
            let refused = "SELECT count(*) FROM batch_refusals WHERE batch = $1";
            let refused = connection.prepare_cached(refused).await?;
            tally.refused = connection.query_one(&refused, &[&batch]).await?.get(0);
            Ok(tally)
        })
        .await
    }

    /// Whether a job of a batch has not ended.
    pub(crate) async fn has_open_jobs(&self, batch: Uuid) -> Result<bool> {
        within(async {
            let connection = self.pool.get().await?;
            let select = "SELECT EXISTS (SELECT FROM jobs WHERE batch = $1 AND finished_at IS NULL)";
            let select = connection.prepare_cached(select).await?;
            Ok(connection.query_one(&select, &[&batch]).await?.get(0))
        })
        .await
    }

    /// Notes that a line was refused for good: by the name in `custom_id`, if that names nothing else in the batch, until a
    /// line of this name is accepted; else by its number, and then it stays. A line that is refused again, as when its upload
    /// is resumed, is noted once. Whether this was the first time.
    pub(crate) async fn refuse_line(
        &self,
        client: ClientId,
        batch: Uuid,
        line: usize,
        custom_id: Option<&str>,
        error: &Value,
    ) -> Result<bool> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let event = "INSERT INTO loads AS l (client, events) VALUES ($1, 1) \
                         ON CONFLICT (client) DO UPDATE SET events = l.events + 1 RETURNING events";
            let event = transaction.prepare_cached(event).await?;
            let event: i64 = transaction.query_one(&event, &[&client.uuid()]).await?.get(0);
            // A job of this name is not in doubt because of another line.
            let taken = "SELECT EXISTS (SELECT FROM idempotency_keys WHERE client = $1 AND key = $2)";
            let taken = transaction.prepare_cached(taken).await?;
            let key = custom_id.map(|custom_id| line_key(batch, custom_id));
            let is_taken: bool = transaction.query_one(&taken, &[&client.uuid(), &key]).await?.get(0);
            let name = custom_id.filter(|_| !is_taken);
            let delete = "DELETE FROM batch_refusals WHERE batch = $1 AND (custom_id = $2 \
                          OR ($2 IS NULL AND custom_id IS NULL AND line = $3 AND error = $4))";
            let delete = transaction.prepare_cached(delete).await?;
            let (line, error) = (line as i32, Json(error));
            let known = transaction.execute(&delete, &[&batch, &name, &line, &error]).await?;
            let insert = "INSERT INTO batch_refusals (batch, event, line, custom_id, error) \
                          VALUES ($1, $2, $3, $4, $5)";
            let insert = transaction.prepare_cached(insert).await?;
            transaction.execute(&insert, &[&batch, &event, &line, &name, &error]).await?;
            transaction.commit().await?;
            Ok(known == 0)
        })
        .await
    }

    /// A line that may have been refused once is accepted now.
    pub(crate) async fn admit_line(&self, batch: Uuid, custom_id: &str) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            let delete = "DELETE FROM batch_refusals WHERE batch = $1 AND custom_id = $2";
            let delete = connection.prepare_cached(delete).await?;
            connection.execute(&delete, &[&batch, &custom_id]).await?;
            Ok(())
        })
        .await
    }

    /// The next reports of a batch after event `after`, in the order in which the jobs ended, or that they were removed.
    pub(crate) async fn batch_results(&self, batch: Uuid, after: i64) -> Result<Vec<BatchResult>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = "SELECT event, line, custom_id, id, key_id, sealed FROM \
                          (SELECT *, coalesce(sum(octet_length(sealed)) OVER (ORDER BY event \
                          ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before FROM \
                          (SELECT event, line, custom_id, id, key_id, sealed FROM jobs LEFT JOIN reports ON job = id \
                          WHERE batch = $1 AND event > $2 AND state = 'succeeded' ORDER BY event LIMIT $3) AS chunk) AS measured \
                          WHERE before < $4 ORDER BY event";
            let select = connection.prepare_cached(select).await?;
            let (rows, bytes) = (RESULTS_CHUNK as i64, RESULTS_CHUNK_BYTES as i64);
            let rows = connection.query(&select, &[&batch, &after, &rows, &bytes]).await?;
            let sealed = |key_id: Option<String>, bytes: Option<Vec<u8>>| {
                Some(Sealed { key_id: key_id?, bytes: bytes?.into() })
            };
            let result = |row: &Row| BatchResult {
                event: row.get(0),
                line: row.get(1),
                custom_id: row.get(2),
                job: row.get::<_, Uuid>(3).into(),
                sealed: sealed(row.get(4), row.get(5)),
            };
            Ok(rows.iter().map(result).collect())
        })
        .await
    }

    /// The next lines of a batch without a report, as [`Self::batch_results`].
    pub(crate) async fn batch_errors(&self, batch: Uuid, after: i64) -> Result<Vec<BatchError>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = "SELECT event, line, custom_id, id, failure, NULL::jsonb AS refused FROM jobs \
                          WHERE batch = $1 AND event > $2 AND state IN ('failed', 'cancelled') \
                          UNION ALL \
                          SELECT event, line, custom_id, NULL, NULL, error FROM batch_refusals \
                          WHERE batch = $1 AND event > $2 ORDER BY event LIMIT $3";
            let select = connection.prepare_cached(select).await?;
            let rows = connection.query(&select, &[&batch, &after, &(RESULTS_CHUNK as i64)]).await?;
            Ok(rows.iter().map(batch_error).collect())
        })
        .await
    }

    /// Marks a batch as deleted: for its client it is not there any more. The rest is [`Self::clear_deleted`]'s.
    pub(crate) async fn delete_batch(
        &self,
        id: Uuid,
        client: ClientId,
        who: Who,
        now: OffsetDateTime,
    ) -> Result<bool> {
        within(async {
            let update = "WITH gone AS (UPDATE batches SET deleted_at = $3 \
                          WHERE id = $1 AND client = $2 AND deleted_at IS NULL RETURNING id, client) \
                          INSERT INTO auth.audit (at, actor_kind, actor, action, outcome, client, object_kind, object, \
                          source, request) SELECT $3, 'user', client::text, $4, 'success', client, 'batch', id::text, \
                          $5, $6 FROM gone";
            let action = Action::BatchWithdrawn.as_str();
            let connection = self.pool.get().await?;
            let withdrawn = connection
                .execute(update, &[&id, &client.uuid(), &now, &action, &who.source(), &who.request])
                .await?;
            Ok(withdrawn == 1)
        })
        .await
    }

    /// Cancels some open jobs of deleted batches and removes some of their results; when it did neither, nothing
    /// is left to do. Returns the cancelled jobs, and how many ended ones were removed.
    pub(crate) async fn clear_deleted(&self, now: OffsetDateTime) -> Result<(Vec<Cancelled>, i64)> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let select = format!(
                "SELECT {ENDING}, lane, state, stream_seq, claim_check FROM jobs \
                 WHERE batch IN (SELECT id FROM batches WHERE deleted_at IS NOT NULL) AND finished_at IS NULL \
                 ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED"
            );
            let rows = transaction.query(&select, &[&SWEEP_BATCH]).await?;
            let open: Vec<Ending> = rows.iter().map(Ending::from).collect();
            let events = release(&transaction, &open).await?;
            let ids: Vec<Uuid> = open.iter().map(|open| open.id).collect();
            let update = "UPDATE jobs SET state = 'cancelled', finished_at = $1, event = ended.event \
                          FROM unnest($2::uuid[], $3::bigint[]) AS ended (id, event) \
                          WHERE jobs.id = ended.id AND state = ANY($4)";
            transaction.execute(update, &[&now, &ids, &events, &open_states(Event::Cancelled)]).await?;
            // One look into an index a batch; without the order all that has been removed might be looked at again.
            let ended = "SELECT ended.id FROM batches CROSS JOIN LATERAL (SELECT id FROM jobs \
                         WHERE batch = batches.id AND finished_at IS NOT NULL AND deleted_at IS NULL \
                         ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED) AS ended \
                         WHERE batches.deleted_at IS NOT NULL LIMIT $1";
            let ended = transaction.query(ended, &[&SWEEP_BATCH]).await?;
            let ended: Vec<Uuid> = ended.iter().map(|row| row.get(0)).collect();
            let erased = remove_reports(&transaction, &ended, now).await?;
            transaction.commit().await?;
            Ok((rows.iter().map(cancelled).collect(), erased))
        })
        .await
    }

    /// A client's jobs, the latest first, `limit` at most.
    pub(crate) async fn list(&self, client: ClientId, filter: &Filter, limit: usize) -> Result<Vec<Record>> {
        within(async {
            let select = format!(
                "SELECT {RECORD} FROM jobs WHERE client = $1 AND ($2::text[] = '{{}}' OR state = ANY($2)) \
                 AND ($3::timestamptz IS NULL OR accepted_at >= $3) \
                 AND ($4::timestamptz IS NULL OR accepted_at < $4) \
                 AND ($5::uuid IS NULL OR batch = $5) AND ($6::uuid IS NULL OR id < $6) \
                 ORDER BY id DESC LIMIT $7"
            );
            let connection = self.pool.get().await?;
            let select = connection.prepare_cached(&select).await?;
            let states: Vec<&str> = filter.states.iter().map(|state| state.as_str()).collect();
            let Filter { from, before, batch, .. } = filter;
            let cursor = filter.cursor.map(JobId::uuid);
            let rows = connection
                .query(&select, &[&client.uuid(), &states, from, before, batch, &cursor, &(limit as i64)])
                .await?;
            Ok(rows.iter().map(Record::try_from).collect::<Result<_, _>>()?)
        })
        .await
    }
}

fn batch(row: &Row) -> Batch {
    Batch { id: row.get("id"), created_at: row.get("created_at"), closed_at: row.get("closed_at") }
}

fn batch_error(row: &Row) -> BatchError {
    let failure: Option<Json<Failure>> = row.get("failure");
    let refused: Option<Json<Value>> = row.get("refused");
    let cause = match (failure, refused) {
        (Some(Json(failure)), _) => Cause::Failed(failure),
        (None, Some(Json(error))) => Cause::Refused(error),
        (None, None) => Cause::Cancelled,
    };
    BatchError {
        event: row.get("event"),
        line: row.get("line"),
        custom_id: row.get("custom_id"),
        job: row.get::<_, Option<Uuid>>("id").map(JobId::from),
        cause,
    }
}

fn cancelled(row: &Row) -> Cancelled {
    Cancelled {
        id: row.get::<_, Uuid>("id").into(),
        lane: row.get::<_, &str>("lane").parse().unwrap_or(Lane::Bulk),
        stream_seq: row.get("stream_seq"),
        claim_check: row.get("claim_check"),
    }
}
