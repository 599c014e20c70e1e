//! The keys that seal images and reports, as staff sees them: made here, counted, and removed when nothing needs them.
//!
//! Ingress does the sealing, and seals what is stored anew when a key is replaced. Of its tables nothing is seen here but
//! what its functions tell: ids of keys, numbers, ids of jobs.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use aws_lc_rs::rand;
use base64::{Engine, engine::general_purpose::STANDARD};
use deadpool_postgres::Client;
use dermflow_schemas::{id::JobId, limits::BULK_DEADLINE, queue::DEAD_AGE};
use time::OffsetDateTime;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    db::DbError,
    keys::{KeyError, put},
};

/// How long a payload may be at the broker after it was sealed: until its deadline, then as a dead letter.
pub const PAYLOAD_LIFE: Duration = Duration::from_secs(BULK_DEADLINE.as_secs() + DEAD_AGE.as_secs());

/// Makes a key that seals from `begins` on, in a file `<id>.key` that only its owner can read. The folder is made as
/// well.
///
/// # Errors
/// When there is a key for that second already, or the folder cannot be written.
pub fn add(folder: &Path, begins: OffsetDateTime) -> Result<PathBuf, KeyError> {
    let mut key = Zeroizing::new([0; 32]);
    rand::fill(&mut *key).map_err(|_| KeyError::new(folder, "no randomness"))?;
    let key = Zeroizing::new(STANDARD.encode(*key));
    put(folder, begins, "key", |id| format!("{id} {}\n", *key))
}

/// What is stored under one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The key's id.
    pub key: String,
    /// Reports.
    pub reports: i64,
    /// Of these, those that did not open when they were to be sealed anew.
    pub broken: i64,
    /// Accounts at ACME servers, and keys of certificates.
    pub secrets: i64,
}

/// What is stored, by key. `sealing` is the key that seals at present.
///
/// # Errors
/// When the database is away, or no ingress of this version has prepared it.
pub async fn stored(client: &Client, sealing: &str) -> Result<Vec<Stored>, DbError> {
    let select = "SELECT key_id, reports, unopened, secrets FROM ingress.sealed_with($1)";
    let rows = client.query(select, &[&sealing]).await?;
    let stored = rows.iter().map(|row| Stored {
        key: row.get(0),
        reports: row.get(1),
        broken: row.get(2),
        secrets: row.get(3),
    });
    Ok(stored.collect())
}

/// Jobs after `after`, `most` at most, whose report none of `keys` has sealed, or did not open when it was to be sealed
/// with `sealing`.
///
/// # Errors
/// As [`stored`].
pub async fn unreadable(
    client: &Client,
    keys: &[String],
    sealing: &str,
    after: JobId,
    most: i64,
) -> Result<Vec<JobId>, DbError> {
    let select = "SELECT ingress.unreadable($1, $2, $3, $4)";
    let rows = client.query(select, &[&keys, &sealing, &after.uuid(), &most]).await?;
    Ok(rows.iter().map(|row| row.get::<_, Uuid>(0).into()).collect())
}

/// Jobs that were accepted before this moment and whose payload may be needed again.
///
/// # Errors
/// As [`stored`].
pub async fn unsettled_before(client: &Client, moment: OffsetDateTime) -> Result<i64, DbError> {
    Ok(client.query_one("SELECT ingress.unsettled_before($1)", &[&moment]).await?.get(0))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use dermflow_schemas::seal::{Content, Keyring};
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_key_that_is_made_seals_from_its_moment_on() {
        let folder = std::env::temp_dir().join(format!("dermflow-sealing-{}", Uuid::new_v4()));
        let (first, second) = (datetime!(2026-01-31 12:00 UTC), datetime!(2026-02-01 12:00 UTC));
        for begins in [first, second] {
            let path = add(&folder, begins).unwrap();
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert!(add(&folder, second).is_err(), "one key a second");
        let ring = Keyring::load(&folder).unwrap();
        let (content, job) = (Content::Report, JobId::new(first));
        let old = ring.seal(content(job), b"report".to_vec(), first).unwrap();
        let new = ring.seal(content(job), b"report".to_vec(), second).unwrap();
        assert_eq!((old.key_id.as_str(), new.key_id.as_str()), ("20260131T120000Z", "20260201T120000Z"));
        fs::remove_file(folder.join("20260131T120000Z.key")).unwrap();
        let ring = Keyring::load(&folder).unwrap();
        assert!(ring.open(content(job), &old).is_err());
        assert_eq!(ring.open(content(job), &new).unwrap(), b"report");
        fs::remove_dir_all(folder).unwrap();
    }
}
