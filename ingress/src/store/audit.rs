//! The audit trail: what was done to jobs and to the queue by others than workers, and by whom.

use deadpool_postgres::{GenericClient, Transaction};
use dermflow_auth::db::within;
use dermflow_schemas::id::{ClientId, JobId};
use serde_json::Value;
use time::OffsetDateTime;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{Result, Store};

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// The sweeper ended a job that did not move.
    JobSettled,
    /// The sweeper ended a job whose payload is gone.
    PayloadLost,
    /// A client withdrew its job, or removed the result.
    JobWithdrawn,
    /// An operator put a dead letter back into the queue.
    DeadRequeued,
    /// An operator removed a dead letter.
    DeadPurged,
    /// A stream, consumer or bucket was gone and has been made again, empty.
    QueueRecreated,
}

impl Act {
    /// The word in the table.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::JobSettled => "job-settled",
            Self::PayloadLost => "payload-lost",
            Self::JobWithdrawn => "job-withdrawn",
            Self::DeadRequeued => "dead-requeued",
            Self::DeadPurged => "dead-purged",
            Self::QueueRecreated => "queue-recreated",
        }
    }
}

/// An entry, but for the job that it is about.
#[derive(Debug)]
pub(crate) struct Audit {
    /// When.
    pub(crate) at: OffsetDateTime,
    /// Who: a part of the system, or a user's id.
    pub(crate) actor: String,
    /// What.
    pub(crate) act: Act,
    /// Codes and numbers; nothing personal.
    pub(crate) detail: Value,
}

impl Audit {
    /// Adds the entry for each of these jobs, in the transaction that does what it says.
    pub(super) async fn of_jobs(&self, transaction: &Transaction<'_>, jobs: &[Uuid]) -> Result<()> {
        let insert = "INSERT INTO audit (at, actor, action, client, job, detail) \
                      SELECT $1, $2, $3, client, id, $4 FROM jobs WHERE id = ANY($5)";
        let insert = transaction.prepare_cached(insert).await?;
        let (action, detail) = (self.act.as_str(), Json(&self.detail));
        transaction.execute(&insert, &[&self.at, &self.actor, &action, &detail, &jobs]).await?;
        Ok(())
    }

    /// Adds the entry for a job that may have no record, or for none.
    pub(super) async fn of(
        &self,
        connection: &impl GenericClient,
        client: Option<ClientId>,
        job: Option<JobId>,
    ) -> Result<()> {
        let insert =
            "INSERT INTO audit (at, actor, action, client, job, detail) VALUES ($1, $2, $3, $4, $5, $6)";
        let (action, detail) = (self.act.as_str(), Json(&self.detail));
        let (client, job) = (client.map(ClientId::uuid), job.map(JobId::uuid));
        connection.execute(insert, &[&self.at, &self.actor, &action, &client, &job, &detail]).await?;
        Ok(())
    }
}

impl Store {
    /// Adds an entry about the system itself.
    pub(crate) async fn note(&self, entry: &Audit) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            entry.of(&connection, None, None).await
        })
        .await
    }
}
