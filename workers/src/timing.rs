//! The times that must fit together, checked once at start.

use std::time::Duration;

use dermflow_schemas::limits::{DECODE_DEADLINE, INTERACTIVE_DEADLINE, MIN_ACK_WAIT, RESULT_PATIENCE};

/// Times that do not fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TimingError {
    /// Progress acks would not arrive in time.
    #[error("the consumers have an ack wait of {0:?}, at least {MIN_ACK_WAIT:?} is needed")]
    AckWait(Duration),
    /// An attempt could not end before an interactive job's deadline, or not at all.
    #[error("the job timeout is {0:?}, it must be above zero and at most {INTERACTIVE_DEADLINE:?}")]
    JobTimeout(Duration),
}

/// Times derived from the consumers' ack wait and the job timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two signs of life for a delivered message: a third of the ack wait.
    pub progress: Duration,
    /// One attempt on an executor, all images together; beyond it the executor counts as hung.
    pub job: Duration,
    /// What decoders have of it, all images together: [`DECODE_DEADLINE`], or a third.
    pub decoding: Duration,
    /// What an orderly shutdown waits: a job may have to wait for the one before it, then runs itself, then
    /// its result is offered to the broker.
    pub grace: Duration,
}

impl Timing {
    /// Derives the times.
    ///
    /// # Errors
    /// When no consistent set of times follows.
    pub fn new(ack_wait: Duration, job: Duration) -> Result<Self, TimingError> {
        if ack_wait < MIN_ACK_WAIT {
            return Err(TimingError::AckWait(ack_wait));
        }
        if job.is_zero() || job > INTERACTIVE_DEADLINE {
            return Err(TimingError::JobTimeout(job));
        }
        let decoding = DECODE_DEADLINE.min(job / 3);
        Ok(Self { progress: ack_wait / 3, job, decoding, grace: job * 2 + RESULT_PATIENCE })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inconsistent_times_are_refused() {
        let second = Duration::from_secs(1);
        assert!(matches!(Timing::new(second / 2, second), Err(TimingError::AckWait(_))));
        assert!(matches!(Timing::new(30 * second, Duration::ZERO), Err(TimingError::JobTimeout(_))));
        assert!(matches!(Timing::new(30 * second, 301 * second), Err(TimingError::JobTimeout(_))));
        let timing = Timing::new(30 * second, 30 * second).unwrap();
        assert_eq!(timing.progress, 10 * second);
        assert_eq!(timing.decoding, 10 * second);
        assert_eq!(Timing::new(30 * second, 6 * second).unwrap().decoding, 2 * second);
        assert_eq!(Timing::new(30 * second, 60 * second).unwrap().decoding, DECODE_DEADLINE);
        assert!(timing.grace >= timing.job);
    }
}
