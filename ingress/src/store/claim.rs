//! Step 2 of a job's life: keys, quotas and records of a group of jobs in one transaction.

use std::collections::HashMap;

use deadpool_postgres::Transaction;
use dermflow_auth::{
    audit::{Action, Who},
    db::{DbError, within},
    users::Quota,
};
use dermflow_schemas::{
    id::{ClientId, JobId},
    image::hex,
    job::Lane,
};
use time::OffsetDateTime;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{RECORD, Record, Result, Store};

/// A job about to be recorded.
#[derive(Debug, Clone)]
pub(crate) struct NewJob {
    pub(crate) id: JobId,
    pub(crate) client: ClientId,
    /// The client, and by which way it came.
    pub(crate) who: Who,
    pub(crate) lane: Lane,
    pub(crate) images: usize,
    pub(crate) bytes: usize,
    pub(crate) accepted_at: OffsetDateTime,
    pub(crate) deadline: OffsetDateTime,
    pub(crate) claim_check: bool,
    /// What repeats of the request are known by.
    pub(crate) key: Option<String>,
    /// SHA-256 of the decoded request.
    pub(crate) digest: Vec<u8>,
    pub(crate) quota: Quota,
    pub(crate) member: Option<Member>,
    /// What its report is searched by.
    pub(crate) search: Vec<Vec<u8>>,
}

/// A job's place in a batch.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) batch: Uuid,
    pub(crate) line: usize,
    pub(crate) custom_id: String,
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
    /// The client has too much open already.
    OverQuota,
}

impl Store {
    /// Claims keys and quotas and inserts jobs, of each job all or nothing. One answer a job, in order.
    ///
    /// The clients' loads are locked first and in order, so that groups cannot deadlock and of two requests with
    /// one key the second one finds the first.
    pub(crate) async fn claim(&self, jobs: &[NewJob]) -> Result<Vec<Claim>> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let mut load = open_tickets(&transaction, jobs).await?;
            let owned = claim_keys(&transaction, jobs).await?;
            let mut claims = Vec::with_capacity(jobs.len());
            let mut tickets = Vec::with_capacity(jobs.len());
            for (job, owned) in jobs.iter().zip(&owned) {
                let load = load.entry(job.client).or_default();
                let ticket = *owned && load.admits(job);
                tickets.push(ticket.then(|| load.take(job)));
                claims.push(match (owned, ticket) {
                    (true, true) => Claim::New,
                    (true, false) => Claim::OverQuota,
                    (false, _) => Claim::Conflict,
                });
            }
            insert_jobs(&transaction, jobs, &tickets).await?;
            if !tickets.iter().all(Option::is_some) {
                give_back(&transaction, jobs, &claims, &load).await?;
                look_up(&transaction, jobs, &mut claims).await?;
            }
            transaction.commit().await?;
            Ok(claims)
        })
        .await
    }
}

impl Store {
    /// Whether a request of the client has had this key.
    pub(crate) async fn has_key(&self, client: ClientId, key: &str) -> Result<bool> {
        within(async {
            let select = "SELECT EXISTS (SELECT FROM idempotency_keys WHERE client = $1 AND key = $2)";
            Ok(self.pool.get().await?.query_one(select, &[&client.uuid(), &key]).await?.get(0))
        })
        .await
    }
}

/// A client's load while a group is recorded.
#[derive(Debug, Default, Clone, Copy)]
struct Load {
    jobs: i64,
    bytes: i64,
    tickets: i64,
}

impl Load {
    fn admits(self, job: &NewJob) -> bool {
        self.jobs < job.quota.jobs && self.bytes + job.bytes as i64 <= job.quota.bytes
    }

    /// Counts the job in, and gives its number.
    fn take(&mut self, job: &NewJob) -> i64 {
        self.jobs += 1;
        self.bytes += job.bytes as i64;
        self.tickets += 1;
        self.tickets
    }
}

/// Counts every job in, as nearly always all of them are new and within quota, and returns what was before.
async fn open_tickets(transaction: &Transaction<'_>, jobs: &[NewJob]) -> Result<HashMap<ClientId, Load>> {
    let clients: Vec<Uuid> = jobs.iter().map(|job| job.client.uuid()).collect();
    let bytes: Vec<i64> = jobs.iter().map(|job| job.bytes as i64).collect();
    let upsert = transaction
        .prepare_cached(
            "INSERT INTO loads AS l (client, jobs, bytes, tickets) \
             SELECT client, count(*), sum(bytes)::bigint, count(*) \
             FROM unnest($1::uuid[], $2::bigint[]) AS j (client, bytes) GROUP BY client ORDER BY client \
             ON CONFLICT (client) DO UPDATE SET jobs = l.jobs + excluded.jobs, bytes = l.bytes + excluded.bytes, \
             tickets = l.tickets + excluded.tickets RETURNING client, jobs, bytes, tickets",
        )
        .await?;
    let mut before: HashMap<ClientId, Load> = HashMap::new();
    for row in transaction.query(&upsert, &[&clients, &bytes]).await? {
        let load = Load { jobs: row.get(1), bytes: row.get(2), tickets: row.get(3) };
        before.insert(row.get::<_, Uuid>(0).into(), load);
    }
    for job in jobs {
        let load = before.entry(job.client).or_default();
        load.jobs -= 1;
        load.bytes -= job.bytes as i64;
        load.tickets -= 1;
    }
    Ok(before)
}

/// Says of each job whether it owns its key; one without a key always does.
async fn claim_keys(transaction: &Transaction<'_>, jobs: &[NewJob]) -> Result<Vec<bool>> {
    let keyed: Vec<_> = jobs.iter().filter_map(|job| Some((job, job.key.as_deref()?))).collect();
    if keyed.is_empty() {
        return Ok(vec![true; jobs.len()]);
    }
    let clients: Vec<Uuid> = keyed.iter().map(|(job, _)| job.client.uuid()).collect();
    let keys: Vec<&str> = keyed.iter().map(|(_, key)| *key).collect();
    let digests: Vec<&[u8]> = keyed.iter().map(|(job, _)| job.digest.as_slice()).collect();
    let ids: Vec<Uuid> = keyed.iter().map(|(job, _)| job.id.uuid()).collect();
    let insert = transaction
        .prepare_cached(
            "INSERT INTO idempotency_keys (client, key, digest, job) \
             SELECT * FROM unnest($1::uuid[], $2::text[], $3::bytea[], $4::uuid[]) \
             ON CONFLICT DO NOTHING RETURNING job",
        )
        .await?;
    let rows = transaction.query(&insert, &[&clients, &keys, &digests, &ids]).await?;
    let owners: Vec<Uuid> = rows.iter().map(|row| row.get(0)).collect();
    Ok(jobs.iter().map(|job| job.key.is_none() || owners.contains(&job.id.uuid())).collect())
}

/// The jobs, and in the same statement what the audit trail says of them: an event a job, and for the lines of an
/// upload an event a batch and transaction, with their number.
async fn insert_jobs(transaction: &Transaction<'_>, jobs: &[NewJob], tickets: &[Option<i64>]) -> Result<()> {
    let new: Vec<(&NewJob, i64)> =
        jobs.iter().zip(tickets).filter_map(|(job, ticket)| Some((job, (*ticket)?))).collect();
    if new.is_empty() {
        return Ok(());
    }
    let insert = transaction
        .prepare_cached(
            "WITH j AS (SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::smallint[], $5::bigint[], \
             $6::timestamptz[], $7::timestamptz[], $8::bool[], $9::bigint[], $10::uuid[], $11::int[], $12::text[], \
             $13::text[], $14::uuid[], $16::jsonb[]) \
             AS j (id, client, lane, images, bytes, accepted_at, deadline, claim_check, ticket, batch, line, \
             custom_id, source, request, search)), \
             recorded AS (INSERT INTO auth.audit (at, actor_kind, actor, action, outcome, client, object_kind, object, \
             source, request, detail) \
             SELECT min(accepted_at), 'user', client::text, $15, 'success', client, \
             CASE WHEN batch IS NULL THEN 'job' ELSE 'batch' END, coalesce(batch, id)::text, source, request, \
             jsonb_build_object('jobs', count(*), 'images', sum(images)) FROM j \
             GROUP BY client, batch IS NULL, coalesce(batch, id), source, request) \
             INSERT INTO jobs (id, client, lane, state, images, bytes, accepted_at, deadline, claim_check, ticket, \
             batch, line, custom_id, search) \
             SELECT id, client, lane, 'accepted', images, bytes, accepted_at, deadline, claim_check, ticket, batch, \
             line, custom_id, (SELECT array_agg(decode(token, 'hex')) FROM jsonb_array_elements_text(search) token) \
             FROM j",
        )
        .await?;
    let of = || new.iter().map(|(job, _)| job);
    let member = || of().map(|job| job.member.as_ref());
    let (ids, clients): (Vec<Uuid>, Vec<Uuid>) = of().map(|job| (job.id.uuid(), job.client.uuid())).unzip();
    let lanes: Vec<&str> = of().map(|job| job.lane.as_str()).collect();
    let images: Vec<i16> = of().map(|job| job.images as i16).collect();
    let bytes: Vec<i64> = of().map(|job| job.bytes as i64).collect();
    let accepted: Vec<OffsetDateTime> = of().map(|job| job.accepted_at).collect();
    let deadlines: Vec<OffsetDateTime> = of().map(|job| job.deadline).collect();
    let claim_checks: Vec<bool> = of().map(|job| job.claim_check).collect();
    let numbers: Vec<i64> = new.iter().map(|(_, ticket)| *ticket).collect();
    let batches: Vec<Option<Uuid>> = member().map(|member| member.map(|m| m.batch)).collect();
    let places: Vec<Option<i32>> = member().map(|member| member.map(|m| m.line as i32)).collect();
    let custom: Vec<Option<&str>> = member().map(|member| member.map(|m| m.custom_id.as_str())).collect();
    let sources: Vec<Option<String>> = of().map(|job| job.who.source()).collect();
    let requests: Vec<Option<Uuid>> = of().map(|job| job.who.request).collect();
    // PostgreSQL has no arrays of arrays of different lengths.
    let search = |job: &NewJob| {
        (!job.search.is_empty()).then(|| Json(job.search.iter().map(|token| hex(token)).collect()))
    };
    let search: Vec<Option<Json<Vec<String>>>> = of().map(|job| search(job)).collect();
    transaction
        .execute(
            &insert,
            &[
                &ids,
                &clients,
                &lanes,
                &images,
                &bytes,
                &accepted,
                &deadlines,
                &claim_checks,
                &numbers,
                &batches,
                &places,
                &custom,
                &sources,
                &requests,
                &Action::Submit.as_str(),
                &search,
            ],
        )
        .await?;
    Ok(())
}

/// Takes back what was claimed for jobs that are not recorded.
async fn give_back(
    transaction: &Transaction<'_>,
    jobs: &[NewJob],
    claims: &[Claim],
    loads: &HashMap<ClientId, Load>,
) -> Result<()> {
    let (clients, load): (Vec<Uuid>, Vec<Load>) =
        loads.iter().map(|(client, load)| (client.uuid(), *load)).unzip();
    let (open, bytes): (Vec<i64>, Vec<i64>) = load.iter().map(|load| (load.jobs, load.bytes)).unzip();
    let tickets: Vec<i64> = load.iter().map(|load| load.tickets).collect();
    let update = "UPDATE loads SET jobs = l.jobs, bytes = l.bytes, tickets = l.tickets \
                  FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[]) AS l (client, jobs, bytes, tickets) \
                  WHERE loads.client = l.client";
    transaction.execute(update, &[&clients, &open, &bytes, &tickets]).await?;
    let refused = jobs.iter().zip(claims).filter(|(_, claim)| matches!(claim, Claim::OverQuota));
    let refused: Vec<Uuid> = refused.map(|(job, _)| job.id.uuid()).collect();
    transaction.execute("DELETE FROM idempotency_keys WHERE job = ANY($1)", &[&refused]).await?;
    Ok(())
}

/// Finds the jobs that keys stand for.
async fn look_up(
    transaction: &Transaction<'_>,
    jobs: &[NewJob],
    claims: &mut [Claim],
) -> Result<(), DbError> {
    let repeated = || jobs.iter().zip(claims.iter()).filter(|(_, claim)| matches!(claim, Claim::Conflict));
    let clients: Vec<Uuid> = repeated().map(|(job, _)| job.client.uuid()).collect();
    let keys: Vec<Option<&str>> = repeated().map(|(job, _)| job.key.as_deref()).collect();
    let select = format!(
        "SELECT k.client AS owner, k.key, k.digest, j.* FROM unnest($1::uuid[], $2::text[]) AS asked (client, key) \
         JOIN idempotency_keys k ON k.client = asked.client AND k.key = asked.key \
         JOIN (SELECT {RECORD} FROM jobs) j ON j.id = k.job"
    );
    let rows = transaction.query(&select, &[&clients, &keys]).await?;
    for (job, claim) in jobs.iter().zip(claims).filter(|(_, claim)| matches!(claim, Claim::Conflict)) {
        let found = rows.iter().find(|row| {
            row.get::<_, Uuid>("owner") == job.client.uuid()
                && Some(row.get::<_, &str>("key")) == job.key.as_deref()
        });
        *claim = match found {
            Some(row) if row.get::<_, &[u8]>("digest") == job.digest => {
                Claim::Known(Box::new(Record::try_from(row)?))
            }
            Some(_) => Claim::Conflict,
            // It was owned by a job of this very group that is over its quota, as this one would be.
            None => Claim::OverQuota,
        };
    }
    Ok(())
}
