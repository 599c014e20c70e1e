//! The life of a job as one pure function, [`step`]; every other piece of code calls it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Recorded, not yet known to be in the queue.
    Accepted,
    /// Recorded and acknowledged by the queue.
    Queued,
    /// A worker has begun an attempt.
    Running,
    /// There is a report. Terminal.
    Succeeded,
    /// There is an error. Terminal.
    Failed,
    /// The client withdrew it. Terminal.
    Cancelled,
}

/// Every state, in the order of a job's life.
pub const STATES: [State; 6] =
    [State::Accepted, State::Queued, State::Running, State::Succeeded, State::Failed, State::Cancelled];

impl State {
    /// Whether nothing can happen to the job any more.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// The word that the API and the database use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that names no state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a job state")]
pub struct UnknownState;

impl FromStr for State {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, UnknownState> {
        STATES.into_iter().find(|state| state.as_str() == text).ok_or(UnknownState)
    }
}

/// What can happen to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The queue acknowledged the payload.
    Queued,
    /// A worker began an attempt.
    Started,
    /// An attempt failed, and another one waits for its time.
    Parked,
    /// A worker published a report.
    Succeeded,
    /// A worker or the sweeper gave the job up.
    Failed,
    /// The client withdrew it.
    Cancelled,
    /// An operator put its dead letter back into the queue.
    Requeued,
}

/// The state after `event`, or `None` when the event comes too late to change anything.
///
/// Events may be lost, repeated or reordered: a result may overtake the queue's acknowledgement. The first
/// terminal event wins, and nothing leaves a terminal state of itself.
///
/// Invariant I1 has one exception, which is an act of a person: [`Event::Requeued`] opens a failed job again, as
/// long as its dead letter exists. The job then ends once more, and as neither success nor cancellation is ever
/// left, it is billed once at most.
pub fn step(state: State, event: Event) -> Option<State> {
    use State::{Accepted, Cancelled, Failed, Queued, Running, Succeeded};
    match (state, event) {
        (Accepted, Event::Queued)
        | (Accepted | Queued | Running, Event::Parked)
        | (Failed, Event::Requeued) => Some(Queued),
        (Succeeded | Failed | Cancelled, _) | (Queued | Running, Event::Queued) | (_, Event::Requeued) => {
            None
        }
        (Accepted | Queued | Running, Event::Started) => Some(Running),
        (Accepted | Queued | Running, Event::Succeeded) => Some(Succeeded),
        (Accepted | Queued | Running, Event::Failed) => Some(Failed),
        (Accepted | Queued | Running, Event::Cancelled) => Some(Cancelled),
    }
}

/// The states that `event` can still change, for statements that test and set in one.
pub fn sources(event: Event) -> impl Iterator<Item = State> {
    STATES.into_iter().filter(move |state| step(*state, event).is_some())
}

/// Which queue a job waits in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Lane {
    /// Somebody waits on the connection: no `Prefer`, or `Prefer: wait`.
    Interactive,
    /// Nobody waits: `Prefer: respond-async` alone.
    Bulk,
}

/// Both lanes, the more urgent one first.
pub const LANES: [Lane; 2] = [Lane::Interactive, Lane::Bulk];

impl Lane {
    /// The word in subjects, records and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
        }
    }

    /// The other lane.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Interactive => Self::Bulk,
            Self::Bulk => Self::Interactive,
        }
    }
}

impl FromStr for Lane {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, UnknownState> {
        LANES.into_iter().find(|lane| lane.as_str() == text).ok_or(UnknownState)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 7] = [
        Event::Queued,
        Event::Started,
        Event::Parked,
        Event::Succeeded,
        Event::Failed,
        Event::Cancelled,
        Event::Requeued,
    ];

    /// I1: whatever the order, the number and the loss of events, a job ends once, and once more each time that
    /// an operator opens it again; a success and a cancellation are final.
    #[test]
    fn every_sequence_of_six_events_ends_at_most_once() {
        for n in 0..EVENTS.len().pow(6) {
            let mut state = State::Accepted;
            let (mut ends, mut reopened, mut finals) = (0, 0, 0);
            let mut rest = n;
            for _ in 0..6 {
                let event = EVENTS[rest % EVENTS.len()];
                if let Some(next) = step(state, event) {
                    let requeue = event == Event::Requeued;
                    assert_eq!(state.is_terminal(), requeue, "{state} left by {event:?}");
                    assert!(!requeue || (state, next) == (State::Failed, State::Queued));
                    ends += u32::from(next.is_terminal());
                    finals += u32::from(matches!(next, State::Succeeded | State::Cancelled));
                    reopened += u32::from(requeue);
                    state = next;
                }
                rest /= EVENTS.len();
            }
            assert_eq!(ends, reopened + u32::from(state.is_terminal()));
            assert!(finals <= 1, "billed or withdrawn twice");
        }
    }

    #[test]
    fn a_result_may_overtake_the_acknowledgement() {
        assert_eq!(step(State::Accepted, Event::Succeeded), Some(State::Succeeded));
        assert_eq!(step(State::Succeeded, Event::Queued), None);
    }

    /// One statement takes notes of both.
    #[test]
    fn what_can_begin_can_wait_again() {
        assert!(sources(Event::Started).eq(sources(Event::Parked)));
        assert_eq!(step(State::Running, Event::Parked), Some(State::Queued));
    }

    #[test]
    fn words_round_trip() {
        for state in STATES {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        assert_eq!("done".parse::<State>(), Err(UnknownState));
    }
}
