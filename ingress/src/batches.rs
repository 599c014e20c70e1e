//! What is left to do for deleted batches.

use dermflow_schemas::{
    clock,
    job::State,
    limits::{SWEEP_BATCH, SWEEP_INTERVAL, WITHDRAWALS},
};
use futures_util::{StreamExt, stream};
use tokio::time::timeout;

use crate::{app::App, recorder};

/// Cancels the open jobs of deleted batches, takes them out of the queue, and removes results, until nothing is
/// left or the next round of the sweeper is due.
pub(crate) async fn clear(app: &App) {
    let _ = timeout(SWEEP_INTERVAL, async { while clear_some(app).await {} }).await;
}

/// Whether there may be more.
async fn clear_some(app: &App) -> bool {
    let (cancelled, erased) = match app.store.clear_deleted(clock::now()).await {
        Ok(done) => done,
        Err(error) => {
            tracing::warn!(%error, "deleted batches are left to the next round");
            return false;
        }
    };
    for job in &cancelled {
        app.metrics.jobs_ended.with_label_values(&[job.lane.as_str(), State::Cancelled.as_str()]).inc();
    }
    let withdraw = stream::iter(&cancelled).for_each_concurrent(WITHDRAWALS, |job| async move {
        recorder::withdraw(app, job.id, job.stream_seq).await;
        if job.claim_check {
            recorder::delete_object(app, job.id).await;
        }
    });
    withdraw.await;
    cancelled.len() as i64 == SWEEP_BATCH || erased == SWEEP_BATCH
}
