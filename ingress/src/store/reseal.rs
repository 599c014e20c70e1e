//! What is sealed with older keys.

use std::collections::HashSet;

use bytes::Bytes;
use dermflow_auth::db::within;
use dermflow_schemas::{
    id::JobId,
    limits::{RESEAL_BATCH, RESEAL_BYTES},
    seal::{SealError, Sealed},
};
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Result, Store};

/// What came of a page of reports.
#[derive(Debug)]
pub(crate) struct Page {
    /// The last report that was looked at; `None` when there is none left, or another replica is at them.
    pub(crate) last: Option<JobId>,
    pub(crate) resealed: u64,
    /// Jobs whose report does not open.
    pub(crate) broken: Vec<JobId>,
}

/// A private key, or what belongs to one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// An account at the ACME server with this directory.
    AcmeAccount(String),
    /// The certificate of these names.
    Certificate(String),
    /// A key of searches.
    Search(Uuid),
}

fn secret(row: &Row) -> (Owner, Sealed) {
    let owner = match row.get(0) {
        "account" => Owner::AcmeAccount(row.get(1)),
        "certificate" => Owner::Certificate(row.get(1)),
        _ => Owner::Search(row.get::<_, &str>(1).parse().unwrap_or_default()),
    };
    (owner, Sealed { key_id: row.get(2), bytes: Bytes::from(row.get::<_, Vec<u8>>(3)) })
}

impl Store {
    /// Those of `keys` that reports are sealed with which can be sealed with `sealing` instead, as far as is known.
    pub(crate) async fn keys_in_use(&self, keys: &[String], sealing: &str) -> Result<Vec<String>> {
        within(async {
            let select = "SELECT key FROM unnest($1::text[]) AS key WHERE EXISTS \
                          (SELECT FROM reports WHERE key_id = key AND unopened IS DISTINCT FROM $2)";
            let connection = self.pool.get().await?;
            let select = connection.prepare_cached(select).await?;
            let rows = connection.query(&select, &[&keys, &sealing]).await?;
            Ok(rows.iter().map(|row| row.get(0)).collect())
        })
        .await
    }

    /// Seals a page of reports anew: those that are sealed with `older`, of jobs after `after`, in the order of their
    /// jobs. What is broken is noted under `sealing`, and not on a later page for that key. One replica does this at a
    /// time; a report that is gone by then stays gone.
    pub(crate) async fn reseal_reports(
        &self,
        older: &str,
        sealing: &str,
        after: JobId,
        reseal: impl Fn(JobId, &Sealed) -> std::result::Result<Sealed, SealError>,
    ) -> Result<Page> {
        const LOCK: i64 = 0x7265_7365_616c_0000;
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let mut page = Page { last: None, resealed: 0, broken: Vec::new() };
            let lock = "SELECT pg_try_advisory_xact_lock($1)";
            if !transaction.query_one(lock, &[&LOCK]).await?.get::<_, bool>(0) {
                return Ok(page);
            }
            let select = "SELECT job, sealed FROM (SELECT *, coalesce(sum(octet_length(sealed)) OVER (ORDER BY job \
                          ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before FROM \
                          (SELECT job, sealed FROM reports WHERE key_id = $1 AND job > $2 \
                          AND unopened IS DISTINCT FROM $3 ORDER BY job LIMIT $4) AS page) AS measured \
                          WHERE before < $5 ORDER BY job";
            let select = transaction.prepare_cached(select).await?;
            let (after, bytes) = (after.uuid(), RESEAL_BYTES as i64);
            let rows =
                transaction.query(&select, &[&older, &after, &sealing, &RESEAL_BATCH, &bytes]).await?;
            let (mut jobs, mut keys, mut sealed) = (Vec::new(), Vec::new(), Vec::new());
            for row in &rows {
                let job: JobId = row.get::<_, Uuid>(0).into();
                let old = Sealed { key_id: older.into(), bytes: Bytes::from(row.get::<_, Vec<u8>>(1)) };
                page.last = Some(job);
                match reseal(job, &old) {
                    Ok(new) => {
                        jobs.push(job.uuid());
                        keys.push(new.key_id);
                        sealed.push(new.bytes);
                    }
                    Err(SealError::Broken) => page.broken.push(job),
                    // It was taken away a moment ago, and may come back.
                    Err(SealError::UnknownKey(_)) => {}
                }
            }
            let sealed: Vec<&[u8]> = sealed.iter().map(|bytes| &**bytes).collect();
            let update = "UPDATE reports SET key_id = new.key_id, sealed = new.sealed, unopened = NULL \
                          FROM unnest($1::uuid[], $2::text[], $3::bytea[]) AS new (job, key_id, sealed) \
                          WHERE reports.job = new.job AND reports.key_id = $4";
            let update = transaction.prepare_cached(update).await?;
            page.resealed = transaction.execute(&update, &[&jobs, &keys, &sealed, &older]).await?;
            let broken: Vec<Uuid> = page.broken.iter().map(|job| job.uuid()).collect();
            let note = "UPDATE reports SET unopened = $2 WHERE job = ANY($1) AND key_id = $3";
            transaction.execute(note, &[&broken, &sealing, &older]).await?;
            transaction.commit().await?;
            Ok(page)
        })
        .await
    }

    /// The secrets that are sealed with one of `keys`, but for those of `except`: a handful.
    pub(crate) async fn secrets(
        &self,
        keys: &[String],
        except: &HashSet<(Owner, String)>,
    ) -> Result<Vec<(Owner, Sealed)>> {
        within(async {
            let select = "SELECT 'account', directory, sealing_key, credentials FROM acme_accounts \
                          WHERE sealing_key = ANY($1) UNION ALL \
                          SELECT 'certificate', names, sealing_key, private_key FROM acme_certificates \
                          WHERE sealing_key = ANY($1) UNION ALL \
                          SELECT 'search', id::text, sealing_key, secret FROM search_keys \
                          WHERE sealing_key = ANY($1)";
            let rows = self.pool.get().await?.query(select, &[&keys]).await?;
            let is_known =
                |(owner, sealed): &(Owner, Sealed)| except.contains(&(owner.clone(), sealed.key_id.clone()));
            Ok(rows.iter().map(secret).filter(|secret| !is_known(secret)).collect())
        })
        .await
    }

    /// Puts `new` in the place of `old`. Nothing happens when another has taken that place meanwhile.
    pub(crate) async fn replace_secret(&self, owner: &Owner, old: &Sealed, new: &Sealed) -> Result<u64> {
        within(async {
            let (update, name) = match owner {
                Owner::AcmeAccount(directory) => (
                    "UPDATE acme_accounts SET sealing_key = $2, credentials = $3 \
                     WHERE directory = $1 AND sealing_key = $4 AND credentials = $5",
                    directory.clone(),
                ),
                Owner::Certificate(names) => (
                    "UPDATE acme_certificates SET sealing_key = $2, private_key = $3 \
                     WHERE names = $1 AND sealing_key = $4 AND private_key = $5",
                    names.clone(),
                ),
                Owner::Search(id) => (
                    "UPDATE search_keys SET sealing_key = $2, secret = $3 \
                     WHERE id::text = $1 AND sealing_key = $4 AND secret = $5",
                    id.to_string(),
                ),
            };
            let (new_bytes, old_bytes) = (new.bytes.as_ref(), old.bytes.as_ref());
            let connection = self.pool.get().await?;
            let values: &[&(dyn tokio_postgres::types::ToSql + Sync)] =
                &[&name, &new.key_id, &new_bytes, &old.key_id, &old_bytes];
            Ok(connection.execute(update, values).await?)
        })
        .await
    }
}
