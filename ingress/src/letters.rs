//! Dead letters are kept for as long as reports of their client, and [`DEAD_AGE`](dermflow_schemas::queue::DEAD_AGE) at
//! most, which the broker sees to.
//!
//! Whose they are is in their subjects, how old they are the broker's to say, and both stay as they are: each letter is
//! read once, and remembered.

use std::collections::BTreeMap;

use dermflow_auth::audit::Who;
use dermflow_schemas::{
    clock,
    id::ClientId,
    limits::{DEAD_PAGE_BYTES, MAX_LETTERS, RESULT_PATIENCE},
};
use time::OffsetDateTime;

use crate::{
    answer::Problem,
    dead::{Letter, Operators, discard, from_on, get},
};

/// The letters that this process has seen.
#[derive(Debug, Default)]
pub(crate) struct Letters {
    /// By their place in DEAD.
    known: BTreeMap<u64, Known>,
    /// The last place that was looked at.
    seen: u64,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    client: Option<ClientId>,
    dead_at: OffsetDateTime,
}

impl From<&Letter> for Known {
    fn from(letter: &Letter) -> Self {
        Self { client: letter.client, dead_at: letter.dead_at }
    }
}

impl Letters {
    /// Removes the letters that are past the retention of their client as it is now.
    ///
    /// # Errors
    /// When broker or database are away.
    pub(crate) async fn sweep(&mut self, operators: &Operators) -> Result<(), Problem> {
        // Whoever does not know the quotas must not go by the usual one.
        if operators.access.is_stale() {
            return Ok(());
        }
        self.look(operators).await?;
        let now = clock::now();
        // Not before the job's failure is on record, which the worker tells after it has written the letter.
        let kept = |client| operators.access.quota(client).retention().max(RESULT_PATIENCE);
        let past = |known: &Known| known.client.is_some_and(|client| known.dead_at + kept(client) <= now);
        let past: Vec<u64> =
            self.known.iter().filter(|(_, known)| past(known)).map(|(place, _)| *place).collect();
        for place in past {
            // It may have left since it was read, and its job have another letter, with the same payload.
            if let Some(letter) = get(operators, place).await? {
                if !discard(operators, &letter, Who::part("sweeper")).await? {
                    continue;
                }
                let job = letter.job.map(tracing::field::display);
                tracing::info!(job, letter = place, "dead letter past its retention");
            }
            self.known.remove(&place);
        }
        Ok(())
    }

    /// Reads the letters that came since the last look, some megabytes at a time.
    async fn look(&mut self, operators: &Operators) -> Result<(), Problem> {
        let Some(first) = from_on(operators, 1).await? else {
            *self = Self::default();
            return Ok(());
        };
        self.known = self.known.split_off(&first.sequence);
        let is_same = self.known.get(&first.sequence).is_some_and(|known| known.dead_at == first.dead_at);
        if first.sequence <= self.seen && !is_same {
            // The stream was made anew, and counts from 1 again.
            *self = Self::default();
        }
        let mut bytes = 0;
        while self.known.len() < MAX_LETTERS && bytes < DEAD_PAGE_BYTES {
            let Some(letter) = from_on(operators, self.seen + 1).await? else { break };
            bytes += letter.bytes;
            self.seen = letter.sequence;
            self.known.insert(letter.sequence, Known::from(&letter));
        }
        Ok(())
    }
}
