//! Waiting for conditions: with a deadline, never for a time.

use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep};

/// Between two looks at a condition.
const LOOK: Duration = Duration::from_millis(20);

/// Looks at `condition` until it gives a value.
///
/// # Errors
/// When it has given none after `within`; the message is `what`.
pub async fn eventually<T>(
    what: &str,
    within: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("not within {within:?}: {what}");
        }
        sleep(LOOK).await;
    }
}
