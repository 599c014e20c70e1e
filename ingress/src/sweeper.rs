//! Step 9 of a job's life: what does not move is settled, what is past its retention erased.

use std::sync::Arc;

use dermflow_schemas::{clock, job::State, limits::SWEEP_INTERVAL};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    app::App,
    batches::clear,
    lanes,
    recorder::{clean_up, withdraw},
    store::Settled,
};

/// A round every [`SWEEP_INTERVAL`] until `stop`; the database sees to it that one replica leads.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut round = interval(SWEEP_INTERVAL);
    round.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = round.tick() => {}
        }
        match app.store.sweep(clock::now()).await {
            Ok(settled) => tokio::select! {
                () = stop.cancelled() => return,
                () = sweep_up(&app, &settled) => {}
            },
            Err(error) => tracing::warn!(%error, "sweeper"),
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

async fn sweep_up(app: &App, settled: &[Settled]) {
    for job in settled {
        tracing::warn!(job = %job.id, "settled by the sweeper");
        app.metrics.swept.with_label_values(&[job.lane.as_str()]).inc();
        app.metrics.jobs_ended.with_label_values(&[job.lane.as_str(), State::Failed.as_str()]).inc();
    }
    // The broker may be away, and the next round must not wait for it.
    let clean = async {
        for job in settled {
            withdraw(app, job.id, job.stream_seq).await;
        }
        clean_up(app, settled).await;
    };
    if timeout(SWEEP_INTERVAL, clean).await.is_err() {
        tracing::warn!("not everything that was settled is out of the queue");
    }
}
