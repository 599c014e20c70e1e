//! Whom to ask for the next job. Pure: no clock, no broker.

use std::collections::HashSet;

use dermflow_schemas::{
    id::ClientId,
    job::Lane,
    limits::{BULK_FLOOR, BULK_PROBES},
    queue::{DUE, JOBS, RETRIES, bulk_consumer_name},
};

use crate::fair::Fair;

/// Where jobs come from.
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

/// Whom a request goes to: a consumer at the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// All of [`Line::Interactive`].
    Interactive,
    /// One client's part of [`Line::Bulk`].
    Bulk(ClientId),
    /// All of [`Line::Due`].
    Due,
}

impl Source {
    /// The line that it is of.
    pub fn line(self) -> Line {
        match self {
            Self::Interactive => Interactive,
            Self::Bulk(_) => Bulk,
            Self::Due => Due,
        }
    }

    /// The stream.
    pub fn stream(self) -> &'static str {
        match self {
            Self::Interactive | Self::Bulk(_) => JOBS,
            Self::Due => RETRIES,
        }
    }

    /// The consumer's name.
    pub fn consumer(self) -> String {
        match self {
            Self::Interactive => Lane::Interactive.as_str().into(),
            Self::Bulk(client) => bulk_consumer_name(client),
            Self::Due => DUE.into(),
        }
    }
}

/// Interactive first, with a floor for the rest: of [`BULK_FLOOR`] jobs one comes from another line if it has
/// one, bulk and due taking turns at that. Bulk is [`Fair`] between clients.
#[derive(Debug)]
pub struct Schedule {
    /// Jobs taken, modulo two floors.
    taken: u32,
    /// Clients asked in vain since the last job.
    probes: u32,
    /// Whether these lines may have a job.
    interactive: bool,
    due: bool,
    bulk: Fair,
}

impl Schedule {
    /// Nothing is known yet. `seed` is this worker's, see [`Fair::new`].
    pub fn new(seed: u64) -> Self {
        Self { taken: 0, probes: 0, interactive: true, due: true, bulk: Fair::new(seed) }
    }

    /// Whom to ask for the next job, among the lines that are `ready` to be asked; `None` when nobody has one, as
    /// far as is known.
    pub fn next(&self, ready: impl Fn(Line) -> bool) -> Option<Source> {
        let find = |line| match line {
            Interactive => self.interactive.then_some(Source::Interactive),
            Bulk => self.bulk.next().map(Source::Bulk),
            Due => self.due.then_some(Source::Due),
        };
        self.order().into_iter().filter(|line| ready(*line)).find_map(find)
    }

    /// In which order to ask the lines for the next job.
    fn order(&self) -> [Line; 3] {
        const BULK_TURN: u32 = BULK_FLOOR - 1;
        const DUE_TURN: u32 = 2 * BULK_FLOOR - 1;
        match self.taken {
            // A turn does not wait for the last of many clients that have nothing.
            _ if self.probes >= BULK_PROBES => [Interactive, Bulk, Due],
            BULK_TURN => [Bulk, Due, Interactive],
            DUE_TURN => [Due, Bulk, Interactive],
            _ => [Interactive, Bulk, Due],
        }
    }

    /// Notes that a request was made.
    pub fn asked(&mut self, source: Source) {
        match source {
            Source::Interactive => self.interactive = false,
            Source::Due => self.due = false,
            Source::Bulk(client) => self.bulk.asked(client),
        }
    }

    /// Notes that it brought no job.
    pub fn nothing(&mut self, source: Source) {
        if let Source::Bulk(client) = source {
            self.bulk.nothing(client);
            self.probes += 1;
            self.interactive |= self.probes.is_multiple_of(BULK_PROBES);
        }
    }

    /// Notes that a job came; a bulk one with its client's weight and whether there were more behind it. A turn
    /// that its line had nothing for is over all the same, and the next executor asks the other lines anew.
    pub fn took(&mut self, source: Source, weight: u8, more: bool) {
        self.taken = (self.taken + 1) % (2 * BULK_FLOOR);
        self.probes = 0;
        (self.interactive, self.due) = (true, true);
        if let Source::Bulk(client) = source {
            self.bulk.took(client, weight, more);
        }
    }

    /// A client may have bulk jobs.
    pub fn wake(&mut self, client: ClientId) {
        self.bulk.wake(client);
    }

    /// An attempt at a client's bulk job is over.
    pub fn ended(&mut self, client: ClientId) {
        self.bulk.ended(client);
    }

    /// Whether all clients that may have bulk jobs are held: there were more when the last one came, and then none was to
    /// be had.
    pub fn only_held(&self) -> bool {
        self.bulk.only_held()
    }

    /// Who is held may have a job by now.
    pub fn retry(&mut self) {
        self.bulk.retry();
    }

    /// These, and no other clients, have bulk jobs, be it with workers.
    pub fn look_at(&mut self, clients: &HashSet<ClientId>) {
        self.bulk.look(clients);
    }

    /// The line may have a job. Clients are woken one by one.
    pub fn look(&mut self, line: Line) {
        match line {
            Interactive => self.interactive = true,
            Due => self.due = true,
            Bulk => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fair::tests::client;

    /// How many of 100 jobs come from each line while the lines in `backlog` never run dry.
    fn taken(backlog: &[Line]) -> [usize; 3] {
        let mut schedule = Schedule::new(7);
        schedule.wake(client(0));
        let mut count = [0; 3];
        while count.iter().sum::<usize>() < 100 {
            let source = schedule.next(|_| true).unwrap();
            schedule.asked(source);
            if backlog.contains(&source.line()) {
                schedule.took(source, 1, true);
                count[source.line() as usize] += 1;
            } else {
                schedule.nothing(source);
            }
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
        let mut schedule = Schedule::new(7);
        schedule.wake(client(0));
        for job in 1..=20 {
            let source = schedule.next(|_| true).unwrap();
            assert_eq!(source != Source::Interactive, job % BULK_FLOOR == 0, "job {job}");
            schedule.took(source, 1, true);
        }
    }

    /// A thousand clients with nothing, in bulk's own turn: interactive is looked at after every few of them.
    #[test]
    fn clients_asked_in_vain_do_not_keep_interactive_waiting() {
        let mut schedule = Schedule::new(7);
        (0..1_000).for_each(|n| schedule.wake(client(n)));
        for _ in 1..BULK_FLOOR {
            schedule.took(Source::Interactive, 1, true);
        }
        let (mut in_vain, mut looks) = (0, 0);
        while let Some(source) = schedule.next(|_| true) {
            schedule.asked(source);
            schedule.nothing(source);
            in_vain = if source == Source::Interactive { 0 } else { in_vain + 1 };
            looks += u32::from(source == Source::Interactive);
            assert!(in_vain <= BULK_PROBES + 1, "{in_vain} in a row");
        }
        assert!(looks >= 1_000 / BULK_PROBES - 1, "{looks} looks");
    }

    #[test]
    fn a_line_that_is_not_ready_is_passed_over() {
        let mut schedule = Schedule::new(7);
        schedule.wake(client(3));
        assert_eq!(schedule.next(|line| line != Interactive), Some(Source::Bulk(client(3))));
        assert_eq!(schedule.next(|line| line == Due), Some(Source::Due));
        assert_eq!(schedule.next(|_| false), None);
    }
}
