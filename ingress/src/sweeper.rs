//! Step 9 of a job's life: what does not move is settled, what is past its retention erased.

use std::{collections::HashMap, sync::Arc, time::Duration};

use dermflow_auth::db::DbError;
use dermflow_schemas::{
    clock,
    error::Code,
    id::JobId,
    job::State,
    limits::{PUBLISH_DEADLINE, SETTLE_PATIENCE, SWEEP_BATCH, SWEEP_INTERVAL},
    queue,
};
use time::OffsetDateTime;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    app::App,
    batches::clear,
    lanes,
    lost::{Watch, jobs_in},
    recorder::{clean_up, delete_object, withdraw},
    retention,
    store::{Leader, Settled},
};

/// A round every [`SWEEP_INTERVAL`] until `stop`. The database sees to it that one replica leads; what is left of deleted
/// batches, and consumers that are gone, are every replica's affair: rows that one has locked another passes over, and what
/// is done twice does no harm.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut sweeper = Sweeper::default();
    let mut round = interval(SWEEP_INTERVAL);
    round.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = round.tick() => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            outcome = sweeper.round(&app) => if let Err(error) = outcome {
                tracing::warn!(%error, "sweeper");
            }
        }
        clear(&app).await;
        if let Err(error) = app.store.erase_batches(clock::now()).await {
            tracing::warn!(%error, "batches past their retention");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = lanes::repair(&app) => {}
        }
    }
}

#[derive(Default)]
struct Sweeper {
    leader: Leader,
    /// Jobs past their deadline that are not settled yet, and since when.
    held: HashMap<JobId, Instant>,
    watch: Watch,
}

impl Sweeper {
    async fn round(&mut self, app: &App) -> Result<(), DbError> {
        if !app.store.lead(&mut self.leader).await? {
            self.held.clear();
            self.watch = Watch::default();
            return Ok(());
        }
        let now = clock::now();
        let unqueued = app.store.settle_unqueued(now).await?;
        sweep_up(app, Code::NeverQueued, &unqueued).await;
        self.settle_late(app, now).await?;
        self.settle_lost(app, now).await?;
        remove_purged(app).await?;
        retention::sweep(app, now).await
    }

    /// Settles jobs past their deadline, but for those whose result waits to be recorded.
    async fn settle_late(&mut self, app: &App, now: OffsetDateTime) -> Result<(), DbError> {
        let held: Vec<Uuid> = self.held.keys().map(|job| job.uuid()).collect();
        let mut late = app.store.late(now, &held).await?;
        late.extend(self.held.keys());
        if late.is_empty() {
            return Ok(());
        }
        let waiting = waiting(app, &late).await;
        let since = Instant::now();
        let mut held = HashMap::new();
        late.retain(|job| {
            let since = self.held.get(job).copied().unwrap_or(since);
            let stays = waiting.contains(job) && since.elapsed() < SETTLE_PATIENCE;
            if stays {
                held.insert(*job, since);
            }
            !stays
        });
        self.held = held;
        for batch in late.chunks(SWEEP_BATCH as usize) {
            let settled = app.store.settle_late(batch, now).await?;
            sweep_up(app, Code::DeadlineExceeded, &settled).await;
        }
        Ok(())
    }

    async fn settle_lost(&mut self, app: &App, now: OffsetDateTime) -> Result<(), DbError> {
        // A broker that answers slowly must not keep the rest from being settled.
        let Ok(lost) = timeout(LOOK_DEADLINE, self.watch.round(app, now)).await else {
            tracing::warn!("the broker is too slow to look for lost payloads");
            return Ok(());
        };
        for batch in lost?.chunks(SWEEP_BATCH as usize) {
            // A whole queue takes longer than the lease.
            if !app.store.lead(&mut self.leader).await? {
                break;
            }
            let settled = app.store.settle_lost(batch, now).await?;
            for job in &settled {
                tracing::error!(job = %job.id, "payload lost");
                app.metrics.payloads_lost.with_label_values::<&str>(&[]).inc();
            }
            sweep_up(app, Code::PayloadLost, &settled).await;
        }
        Ok(())
    }
}

/// For one look at the queue: a hundred thousand records, or thousands of questions, take about a second.
const LOOK_DEADLINE: Duration = Duration::from_secs(15);

/// Those of `late` whose result is in the queue; all of them when the broker does not say.
async fn waiting(app: &App, late: &[JobId]) -> Vec<JobId> {
    let asked = timeout(PUBLISH_DEADLINE, jobs_in(app.publisher.context(), queue::RESULTS)).await;
    match asked {
        Ok(Ok(results)) => late.iter().copied().filter(|job| results.contains(job)).collect(),
        Ok(Err(error)) => {
            tracing::warn!(%error, "whether results wait is not known");
            late.to_vec()
        }
        Err(_) => late.to_vec(),
    }
}

async fn sweep_up(app: &App, code: Code, settled: &[Settled]) {
    for job in settled {
        tracing::warn!(job = %job.id, %code, "settled by the sweeper");
        app.metrics.swept.with_label_values(&[job.lane.as_str(), code.kind().code]).inc();
        app.metrics.jobs_ended.with_label_values(&[job.lane.as_str(), State::Failed.as_str()]).inc();
    }
    // The broker may be away, and the next round must not wait for it.
    let clean = async {
        for job in settled {
            // What is lost is in no stream that would give it up, unless it is its object that is.
            if code == Code::PayloadLost && !job.spent_claim_check {
                lanes::cancel(app, job.id).await;
            } else {
                withdraw(app, job.id, job.stream_seq).await;
            }
        }
        clean_up(app, settled).await;
    };
    if timeout(SWEEP_INTERVAL, clean).await.is_err() {
        tracing::warn!("not everything that was settled is out of the queue");
    }
}

/// Removes claim-checked payloads whose dead letter an operator has removed.
async fn remove_purged(app: &App) -> Result<(), DbError> {
    let purged = app.store.purged_objects().await?;
    if purged.is_empty() {
        return Ok(());
    }
    for job in &purged {
        delete_object(app, *job).await;
    }
    app.store.objects_removed(&purged).await
}
