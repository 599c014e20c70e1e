//! Whose bulk job comes next: stride scheduling over clients. Pure: no clock, no broker.
//!
//! Every client has a pass, the virtual time at which its next job is due; a job moves it on by a stride that is
//! the shorter the larger the client's weight. The smallest pass is served. A client that comes back starts at
//! the present virtual time: it neither catches up on its idleness nor waits behind anybody's backlog. Workers
//! need not agree on anything: each is fair, so all together are.

use std::collections::{BTreeSet, HashMap, HashSet};

use dermflow_schemas::{
    id::ClientId,
    limits::{BULK_CLIENTS, BULK_PROBES, MAX_WEIGHT},
    random::mix,
};

/// The stride of a client of weight 1. Passes overflow after 2^40 jobs.
const STRIDE: u64 = 1 << 24;

/// What is known of a client's jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// There may be one.
    Waiting,
    /// There was none.
    Idle,
    /// There were more when the last one came, and then none was to be had: it has as many with workers as it
    /// may, or other workers were faster.
    Held,
}

#[derive(Debug)]
struct Share {
    pass: u64,
    /// Between equal passes: every worker has an order of its own, or all would serve the same client at once.
    order: u64,
    standing: Standing,
    /// Whether there were more jobs when the last one came.
    more: bool,
    /// Whether a wake-up came, or an attempt ended, since it was asked last.
    woken: bool,
}

/// The clients that may have bulk jobs, [`BULK_CLIENTS`] at most.
#[derive(Debug, Default)]
pub struct Fair {
    seed: u64,
    /// The virtual time: the pass of whoever was served last.
    now: u64,
    clients: HashMap<ClientId, Share>,
    /// Those that wait, by pass and order.
    waiting: BTreeSet<(u64, u64, ClientId)>,
    /// Those that were held since the last look at them.
    held: HashSet<ClientId>,
    /// Jobs since then.
    taken: u32,
}

impl Fair {
    /// No clients yet. `seed` is this worker's, and decides between equals only.
    pub fn new(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Who shall be asked for a job.
    pub fn next(&self) -> Option<ClientId> {
        self.waiting.first().map(|(_, _, client)| *client)
    }

    /// A client may have jobs. One that there is no room for comes in view later, with another wake-up.
    pub fn wake(&mut self, client: ClientId) {
        if self.enter(client) {
            self.change(client, |share| {
                share.woken = true;
                share.standing = Standing::Waiting;
            });
        }
    }

    /// A client was asked for a job.
    pub fn asked(&mut self, client: ClientId) {
        self.change(client, |share| share.woken = false);
    }

    /// It had none, unless it was woken meanwhile.
    pub fn nothing(&mut self, client: ClientId) {
        let mut held = false;
        self.change(client, |share| {
            share.standing = match (share.woken, share.more) {
                (true, _) => Standing::Waiting,
                (false, true) => Standing::Held,
                (false, false) => Standing::Idle,
            };
            held = share.standing == Standing::Held;
        });
        if held {
            self.held.insert(client);
        }
    }

    /// A job came, from a client of this weight, and behind it there were `more`.
    pub fn took(&mut self, client: ClientId, weight: u8, more: bool) {
        if !self.enter(client) {
            return;
        }
        let mut served = 0;
        self.change(client, |share| {
            served = share.pass;
            share.pass += STRIDE / u64::from(weight.clamp(1, MAX_WEIGHT));
            share.more = more;
            share.standing = if more || share.woken { Standing::Waiting } else { Standing::Idle };
        });
        self.now = self.now.max(served);
        self.taken += 1;
        // Other workers' acks make room too, and nobody tells of them.
        if self.taken >= BULK_PROBES {
            self.retry();
        }
    }

    /// An attempt at a client's job is over: there is room for the next one.
    pub fn ended(&mut self, client: ClientId) {
        let now = self.now;
        self.change(client, |share| {
            share.woken |= share.more;
            if share.standing == Standing::Held {
                share.standing = Standing::Waiting;
                share.pass = share.pass.max(now);
            }
        });
    }

    /// Whether clients are held, and none waits.
    pub fn only_held(&self) -> bool {
        self.waiting.is_empty() && !self.held.is_empty()
    }

    /// Who is held may have a job by now.
    pub fn retry(&mut self) {
        self.taken = 0;
        for client in std::mem::take(&mut self.held) {
            self.ended(client);
        }
    }

    /// These, and no others, have jobs, be it with workers.
    pub fn look(&mut self, clients: &HashSet<ClientId>) {
        for client in clients {
            self.wake(*client);
        }
        // Who is not among them and gets a job meanwhile is woken.
        for (_, share) in self.clients.iter_mut().filter(|(client, _)| !clients.contains(client)) {
            share.more = false;
        }
    }

    /// Makes sure that there is a share, at the present virtual time when it was not waiting. Returns false when
    /// there is no room for it.
    fn enter(&mut self, client: ClientId) -> bool {
        if let Some(share) = self.clients.get_mut(&client) {
            if share.standing != Standing::Waiting {
                share.pass = share.pass.max(self.now);
            }
            return true;
        }
        if self.clients.len() >= BULK_CLIENTS {
            // Whose pass is behind would start anew anyway.
            let now = self.now;
            self.clients.retain(|_, share| share.standing == Standing::Waiting || share.pass > now);
        }
        if self.clients.len() >= BULK_CLIENTS {
            return false;
        }
        let (high, low) = client.uuid().as_u64_pair();
        let order = mix(mix(self.seed ^ high) ^ low);
        let (pass, standing) = (self.now, Standing::Idle);
        self.clients.insert(client, Share { pass, order, standing, more: false, woken: false });
        true
    }

    /// Changes a share, and keeps [`Self::waiting`] in step with it.
    fn change(&mut self, client: ClientId, change: impl FnOnce(&mut Share)) {
        let Some(share) = self.clients.get_mut(&client) else { return };
        self.waiting.remove(&(share.pass, share.order, client));
        change(share);
        if share.standing == Standing::Waiting {
            self.waiting.insert((share.pass, share.order, client));
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The client with this number.
    pub(crate) fn client(n: usize) -> ClientId {
        format!("00000000-0000-4000-8000-{n:012x}").parse().unwrap()
    }

    /// And the other way round.
    pub(crate) fn number(client: ClientId) -> usize {
        (client.uuid().as_u64_pair().1 & 0xffff_ffff_ffff) as usize
    }

    /// How many of `jobs` jobs each client gets while nobody's backlog ends.
    fn served(fair: &mut Fair, jobs: usize, weights: &[u8]) -> Vec<usize> {
        let mut count = vec![0; weights.len()];
        for _ in 0..jobs {
            let next = fair.next().unwrap();
            let number = number(next);
            fair.asked(next);
            fair.took(next, weights[number], true);
            count[number] += 1;
        }
        count
    }

    fn with_backlog(clients: usize) -> Fair {
        let mut fair = Fair::new(7);
        (0..clients).for_each(|n| fair.wake(client(n)));
        fair
    }

    #[test]
    fn equals_take_turns_and_weights_are_proportions() {
        assert_eq!(served(&mut with_backlog(4), 400, &[1; 4]), [100; 4]);
        assert_eq!(served(&mut with_backlog(3), 700, &[1, 2, 4]), [100, 200, 400]);
        assert_eq!(served(&mut with_backlog(2), 1_010, &[100, 1]), [1_000, 10]);
    }

    #[test]
    fn who_comes_late_neither_catches_up_nor_waits() {
        let mut fair = with_backlog(2);
        assert_eq!(served(&mut fair, 1_000, &[1; 2]), [500, 500]);
        fair.wake(client(2));
        assert_eq!(served(&mut fair, 300, &[1; 3]), [100; 3]);
    }

    #[test]
    fn going_idle_between_jobs_wins_nothing() {
        let mut fair = with_backlog(2);
        let mut count = [0; 2];
        for _ in 0..100 {
            let next = fair.next().unwrap();
            let number = number(next);
            fair.asked(next);
            // Client 1 has one job at a time, and the next one as soon as that is taken.
            fair.took(next, 1, number == 0);
            fair.wake(client(1));
            count[number] += 1;
        }
        assert_eq!(count, [50, 50]);
    }

    #[test]
    fn an_empty_client_is_left_alone_until_it_is_woken() {
        let mut fair = with_backlog(1);
        fair.asked(client(0));
        fair.nothing(client(0));
        assert_eq!(fair.next(), None);
        fair.ended(client(0));
        assert_eq!(fair.next(), None);
        fair.wake(client(0));
        assert_eq!(fair.next(), Some(client(0)));
    }

    #[test]
    fn a_wake_up_that_crosses_the_answer_counts() {
        let mut fair = with_backlog(1);
        fair.asked(client(0));
        fair.wake(client(0));
        fair.nothing(client(0));
        assert_eq!(fair.next(), Some(client(0)));
        fair.asked(client(0));
        fair.wake(client(0));
        fair.took(client(0), 1, false);
        assert_eq!(fair.next(), Some(client(0)));
    }

    #[test]
    fn who_is_held_goes_on_when_an_attempt_ends() {
        let mut fair = with_backlog(1);
        fair.asked(client(0));
        fair.took(client(0), 1, true);
        fair.asked(client(0));
        fair.nothing(client(0));
        assert_eq!(fair.next(), None);
        fair.ended(client(0));
        assert_eq!(fair.next(), Some(client(0)));
    }

    #[test]
    fn an_end_that_crosses_the_answer_counts() {
        let mut fair = with_backlog(1);
        fair.asked(client(0));
        fair.took(client(0), 1, true);
        fair.asked(client(0));
        fair.ended(client(0));
        fair.nothing(client(0));
        assert_eq!(fair.next(), Some(client(0)));
        fair.asked(client(0));
        fair.nothing(client(0));
        assert_eq!(fair.next(), None, "one end is asked about once");
    }

    #[test]
    fn who_has_no_jobs_left_is_not_asked_again() {
        let mut fair = with_backlog(2);
        fair.asked(client(0));
        fair.took(client(0), 1, true);
        fair.look(&HashSet::from([client(1)]));
        fair.asked(client(0));
        fair.nothing(client(0));
        assert!(fair.held.is_empty());
        fair.retry();
        assert_eq!(fair.next(), Some(client(1)));
    }

    #[test]
    fn workers_differ_in_whom_they_serve_first() {
        let first = |seed| {
            let mut fair = Fair::new(seed);
            (0..4).for_each(|n| fair.wake(client(n)));
            fair.next().unwrap()
        };
        let firsts: std::collections::HashSet<_> = (0..64).map(first).collect();
        assert_eq!(firsts.len(), 4);
    }

    #[test]
    fn the_number_of_clients_is_bounded_and_nobody_is_shut_out_for_good() {
        let mut fair = with_backlog(BULK_CLIENTS + 1);
        let last = client(BULK_CLIENTS);
        assert_eq!((fair.clients.len(), fair.waiting.len()), (BULK_CLIENTS, BULK_CLIENTS));
        assert!(!fair.clients.contains_key(&last));
        let empty = fair.next().unwrap();
        fair.asked(empty);
        fair.nothing(empty);
        fair.wake(last);
        assert!(fair.clients.contains_key(&last));
        assert_eq!(fair.clients.len(), BULK_CLIENTS);
    }
}
