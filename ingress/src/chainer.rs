//! Chains the audit trail: every replica looks, and the one that has the lock at that moment does it.

use std::sync::Arc;

use dermflow_auth::{
    audit::chain,
    db::{DbError, within},
};
use dermflow_schemas::limits::{AUDIT_CHAIN_BATCH, AUDIT_CHAIN_INTERVAL, AUDIT_CHAIN_RECENT};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::app::App;

/// Looks every [`AUDIT_CHAIN_INTERVAL`] until `stop`.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut look = interval(AUDIT_CHAIN_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut stands_still = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        let extended = extend(&app).await;
        if let (Err(error), false) = (&extended, stands_still) {
            tracing::warn!(%error, "the audit trail is chained later");
        }
        stands_still = extended.is_err();
    }
}

async fn extend(app: &App) -> Result<(), DbError> {
    loop {
        let added = within(async {
            let mut client = app.store.pool().get().await?;
            chain::extend(&mut client, Some(AUDIT_CHAIN_RECENT)).await
        });
        if added.await? < AUDIT_CHAIN_BATCH as u64 {
            return Ok(());
        }
    }
}
