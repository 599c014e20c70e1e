//! How long to wait before a request is repeated, and when to give up.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::{Failure, access::Trouble, progress::Counters};

/// The pause before the first repetition; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause that we choose ourselves.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A number from 0 to 1, so that clients that were refused together do not come back together.
pub(crate) fn chance() -> f64 {
    f64::from(Uuid::new_v4().as_u128() as u32) / f64::from(u32::MAX)
}

/// The pause before repetition `step` (from 1): doubled with each step, half of it by `chance`, and never
/// less than the server asked for.
pub(crate) fn pause(step: u32, after: Option<Duration>, chance: f64) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << step.saturating_sub(1).min(16)).min(LONGEST_PAUSE);
    let fixed = (doubled / 2).max(after.unwrap_or_default());
    fixed + (doubled / 2).mul_f64(chance.clamp(0.0, 1.0))
}

/// Goes on for as long as the server shows life now and then.
#[derive(Debug)]
pub(crate) struct Patience {
    limit: Duration,
    alive: Mutex<Instant>,
}

impl Patience {
    /// Gives up when no request has succeeded for `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, alive: Mutex::new(Instant::now()) }
    }

    /// A request has succeeded.
    pub(crate) fn alive(&self) {
        *self.alive.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits before repetition `step`.
    ///
    /// # Errors
    /// When another try makes no sense, or patience is at its end.
    pub(crate) async fn rest(&self, trouble: Trouble, step: u32, counters: &Counters) -> Result<(), Failure> {
        let (after, what) = match trouble {
            Trouble::Again(after, what) => (after, what),
            Trouble::Final(_, what) => return Err(Failure::Unfinished(what)),
        };
        let silent = self.alive.lock().unwrap_or_else(PoisonError::into_inner).elapsed();
        if silent >= self.limit {
            return Err(Failure::Unfinished(format!("given up after {} s: {what}", silent.as_secs())));
        }
        let pause = pause(step, after, chance());
        counters.say(format!("{what}; trying again"));
        counters.retries.add(1);
        sleep(pause.min(self.limit.saturating_sub(silent).max(after.unwrap_or_default()))).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_and_obey_the_server() {
        let ms = |step, chance| pause(step, None, chance).as_millis();
        assert_eq!((ms(1, 0.0), ms(1, 1.0)), (125, 250));
        assert_eq!((ms(3, 0.0), ms(3, 1.0)), (500, 1_000));
        assert_eq!((ms(60, 0.0), ms(u32::MAX, 1.0)), (15_000, 30_000));
        let asked = Some(Duration::from_secs(9));
        assert_eq!(pause(1, asked, 0.0), Duration::from_secs(9));
        assert!(pause(20, asked, 0.0) >= Duration::from_secs(9));
        assert!((0..100).map(|_| chance()).all(|chance| (0.0..=1.0).contains(&chance)));
    }

    #[tokio::test]
    async fn patience_ends_when_the_server_shows_no_life() {
        let (patience, counters) = (Patience::new(Duration::from_millis(300)), Counters::default());
        let trouble = || Trouble::Again(None, "refused".into());
        let begin = Instant::now();
        let mut step = 0;
        let end = loop {
            step += 1;
            if let Err(end) = patience.rest(trouble(), step, &counters).await {
                break end;
            }
        };
        assert_eq!(end.exit_code(), 3);
        assert!(begin.elapsed() >= Duration::from_millis(300) && step > 1, "{:?}", begin.elapsed());
        patience.alive();
        assert!(patience.rest(trouble(), 1, &counters).await.is_ok());
        assert!(patience.rest(Trouble::Final(None, "no".into()), 1, &counters).await.is_err());
    }
}
