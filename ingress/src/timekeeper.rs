//! One clock for all replicas: the database's. A job's deadline that one replica writes is judged by others, so a
//! machine whose clock is wrong would end jobs before their time, or refuse tokens that are good.

use dermflow_schemas::{
    clock,
    limits::{CLOCK_INTERVAL, CLOCK_TOLERANCE},
};
use tokio::time::{Instant, MissedTickBehavior, interval_at};
use tokio_util::sync::CancellationToken;

use crate::store::Store;

/// Looks at the database's clock once; the last correction holds while the database is away.
pub(crate) async fn follow(store: &Store) {
    match store.clock().await {
        Ok(reference) => {
            let behind = clock::follow(reference);
            if behind.abs() > CLOCK_TOLERANCE.as_secs_f64() {
                tracing::warn!(seconds = behind, "this machine's clock is wrong; going by the database's");
            }
        }
        Err(error) => tracing::debug!(%error, "the last correction of the clock holds"),
    }
}

/// Looks again and again until `stop`.
pub(crate) async fn run(store: Store, stop: CancellationToken) {
    let mut tick = interval_at(Instant::now() + CLOCK_INTERVAL, CLOCK_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => follow(&store).await,
        }
    }
}
