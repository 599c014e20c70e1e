//! Which line to ask first. Pure: no clock, no broker.

use dermflow_schemas::{
    job::Lane,
    limits::BULK_FLOOR,
    queue::{DUE, JOBS, RETRIES},
};

/// Where jobs come from: a consumer at the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// First attempts that somebody waits for.
    Interactive,
    /// First attempts that nobody waits for.
    Bulk,
    /// Further attempts whose back-off has ended, of both lanes.
    Due,
}

use Line::{Bulk, Due, Interactive};

/// Every line.
pub const LINES: [Line; 3] = [Interactive, Bulk, Due];

impl Line {
    /// The stream.
    pub fn stream(self) -> &'static str {
        match self {
            Interactive | Bulk => JOBS,
            Due => RETRIES,
        }
    }

    /// The consumer's name.
    pub fn consumer(self) -> &'static str {
        match self {
            Interactive => Lane::Interactive.as_str(),
            Bulk => Lane::Bulk.as_str(),
            Due => DUE,
        }
    }
}

/// Interactive first, with a floor for the rest: of [`BULK_FLOOR`] jobs one comes from another line if it has
/// one, bulk and due taking turns at that.
#[derive(Debug, Default)]
pub struct Schedule {
    /// Jobs taken, modulo two floors.
    taken: u32,
}

impl Schedule {
    /// In which order to ask the lines for the next job.
    pub fn order(&self) -> [Line; 3] {
        const BULK_TURN: u32 = BULK_FLOOR - 1;
        const DUE_TURN: u32 = 2 * BULK_FLOOR - 1;
        match self.taken {
            BULK_TURN => [Bulk, Due, Interactive],
            DUE_TURN => [Due, Bulk, Interactive],
            _ => [Interactive, Bulk, Due],
        }
    }

    /// Notes that a job was taken. A turn that its line had nothing for is over all the same.
    pub fn took(&mut self) {
        self.taken = (self.taken + 1) % (2 * BULK_FLOOR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 100 jobs come from each line while the lines in `backlog` never run dry.
    fn taken(backlog: &[Line]) -> [usize; 3] {
        let mut schedule = Schedule::default();
        let mut count = [0; 3];
        for _ in 0..100 {
            let line = schedule.order().into_iter().find(|line| backlog.contains(line)).unwrap();
            schedule.took();
            count[LINES.iter().position(|l| *l == line).unwrap()] += 1;
        }
        count
    }

    #[test]
    fn interactive_comes_first_and_leaves_one_job_in_five() {
        assert_eq!(taken(&[Interactive, Bulk]), [80, 20, 0]);
        assert_eq!(taken(&[Interactive, Due]), [80, 0, 20]);
        assert_eq!(taken(&[Interactive, Bulk, Due]), [80, 10, 10]);
    }

    #[test]
    fn a_line_alone_gets_every_executor_and_none_starves_behind_bulk() {
        assert_eq!(taken(&[Interactive]), [100, 0, 0]);
        assert_eq!(taken(&[Bulk]), [0, 100, 0]);
        assert_eq!(taken(&[Due]), [0, 0, 100]);
        assert_eq!(taken(&[Bulk, Due]), [0, 90, 10]);
    }

    #[test]
    fn turns_are_spread() {
        let mut schedule = Schedule::default();
        for job in 1..=20 {
            assert_eq!(schedule.order()[0] != Interactive, job % BULK_FLOOR == 0, "job {job}");
            schedule.took();
        }
    }
}
