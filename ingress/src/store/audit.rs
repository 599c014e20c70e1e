//! Events of the audit trail that are recorded in the transaction that does what they say.

use deadpool_postgres::Transaction;
use dermflow_auth::audit::{self, Event};
use serde_json::Value;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{Result, Store};

/// Adds the event for each of these jobs, with the client whose job it is.
pub(super) async fn of_jobs(event: &Event, transaction: &Transaction<'_>, jobs: &[Uuid]) -> Result<()> {
    let insert = "INSERT INTO auth.audit (at, actor_kind, actor, action, outcome, code, client, object_kind, object, \
                  source, request, detail) \
                  SELECT $1, $2, $3, $4, $5, $6, client, 'job', id::text, $7, $8, $9 FROM jobs WHERE id = ANY($10)";
    let insert = transaction.prepare_cached(insert).await?;
    let Event { at, who, action, outcome, code, client: _, object: _, detail } = event;
    let (action, outcome, code) = (action.as_str(), outcome.as_str(), code.map(|code| code.kind().code));
    let (kind, actor, source) = (who.actor.kind(), who.actor.id(), who.source());
    let detail: Json<&Value> = Json(detail);
    transaction
        .execute(
            &insert,
            &[at, &kind, &actor, &action, &outcome, &code, &source, &who.request, &detail, &jobs],
        )
        .await?;
    Ok(())
}

impl Store {
    /// Adds an event about the system itself.
    pub(crate) async fn note(&self, event: Event) -> Result<()> {
        audit::record(self.pool(), &[event]).await
    }
}
