//! The model: clients, ingress, record, queue, workers, recorders, sweeper. One call of [`World::step`] lets one
//! of them take one step.

use super::Defect;
use crate::{
    job::{Event, State, step},
    limits::MAX_ATTEMPTS,
    random::Rng,
};

/// Ticks until the broker delivers again what was not acked.
const ACK_WAIT: u32 = 6;
/// Ticks of a request, then it is given up.
const REQUEST: u32 = 5;
/// Ticks after which a record that never reached the queue is settled: longer than a request.
const GRACES: [u32; 2] = [REQUEST + 2, 40];
/// Ticks to the deadline of a job in a hurry, and of one that must not miss it.
const DEADLINES: [u32; 2] = [25, 4_000];
/// Ticks in which a calm system must have finished every job that is not in a hurry.
const CALM: u32 = 600;
/// Per cent of attempts at a job that kills its worker, and of those that fail in passing.
const POISON: usize = 3;
const TRANSIENT: usize = 10;

/// What a client wants done, under a key of its own.
#[derive(Debug, Default)]
struct Order {
    /// The job that the key stands for.
    key: Option<usize>,
    /// The jobs of which the client was told 202.
    accepted: Vec<usize>,
    cancelled: bool,
}

/// A line of the record.
#[derive(Debug)]
struct Job {
    order: usize,
    state: State,
    accepted_at: u32,
    deadline: u32,
    /// Whether the deadline is long enough to be met.
    patient: bool,
    poison: bool,
    /// The broker's disk lost the payload.
    lost: bool,
    /// How it ended, and how often.
    ends: Vec<State>,
    /// Settled by the sweeper.
    swept: Option<Sweep>,
    billed: u32,
    reports: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sweep {
    NeverQueued,
    Deadline,
}

/// A request on its way through an ingress process.
#[derive(Debug)]
struct Request {
    order: usize,
    stage: Stage,
    begun: u32,
}

#[derive(Debug, Clone, Copy)]
enum Stage {
    Claim,
    Publish(usize, u32),
    Mark(usize, u32),
    Answer(usize),
}

/// A message in a stream.
#[derive(Debug, Clone)]
struct Message<T> {
    id: u32,
    body: T,
    delivered: u32,
    /// Not delivered before this tick: a back-off, or somebody has it.
    at: u32,
}

#[derive(Debug, Clone, Copy)]
struct Payload {
    job: usize,
    attempt: u32,
    deadline: u32,
}

#[derive(Debug, Clone, Copy)]
struct Outcome {
    job: usize,
    event: Event,
}

/// A stream with one consumer: at least once, in any order.
#[derive(Debug)]
struct Stream<T> {
    messages: Vec<Message<T>>,
    last: u32,
}

impl<T: Copy> Stream<T> {
    fn new() -> Self {
        Self { messages: Vec::new(), last: 0 }
    }

    fn store(&mut self, body: T, at: u32) {
        self.last += 1;
        self.messages.push(Message { id: self.last, body, delivered: 0, at });
    }

    /// Any message that may be delivered now.
    fn deliver(&mut self, rng: &mut Rng, now: u32, again: bool) -> Option<Message<T>> {
        let ready: Vec<usize> = (0..self.messages.len())
            .filter(|n| self.messages[*n].at <= now && (again || self.messages[*n].delivered == 0))
            .collect();
        if ready.is_empty() {
            return None;
        }
        let message = &mut self.messages[ready[rng.below(ready.len())]];
        message.delivered += 1;
        message.at = now + ACK_WAIT;
        Some(message.clone())
    }

    fn ack(&mut self, id: u32) {
        self.messages.retain(|message| message.id != id);
    }
}

/// A job in a worker's hands.
#[derive(Debug)]
struct Attempt {
    message: u32,
    payload: Payload,
    number: u32,
    phase: Phase,
    told_to_stop: bool,
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Delivered,
    Running,
    Result(Event),
    Retry,
    Ack,
}

/// Results in a recorder's hands.
#[derive(Debug)]
struct Batch {
    results: Vec<Message<Outcome>>,
    recorded: bool,
}

/// What happened at least once, over many schedules.
#[derive(Debug, Default, Clone)]
pub(super) struct Covered {
    succeeded: u64,
    failed: u64,
    cancelled: u64,
    never_queued: u64,
    deadline: u64,
    late: u64,
    redelivered: u64,
    exhausted: u64,
    stopped: u64,
    crashes: u64,
}

impl Covered {
    pub(super) fn add(&mut self, other: &Self) {
        for (sum, n) in self.fields().into_iter().zip(other.clone().fields()) {
            *sum += *n;
        }
    }

    pub(super) fn everything(&self) -> bool {
        self.clone().fields().into_iter().all(|n| *n > 100)
    }

    fn fields(&mut self) -> [&mut u64; 10] {
        let Self {
            succeeded,
            failed,
            cancelled,
            never_queued,
            deadline,
            late,
            redelivered,
            exhausted,
            stopped,
            crashes,
        } = self;
        [succeeded, failed, cancelled, never_queued, deadline, late, redelivered, exhausted, stopped, crashes]
    }
}

type Checked = Result<(), String>;

pub(super) struct World {
    rng: Rng,
    defect: Option<Defect>,
    /// Per cent of steps that go wrong.
    faults: usize,
    grace: u32,
    now: u32,
    orders: Vec<Order>,
    jobs: Vec<Job>,
    requests: Vec<Request>,
    /// The ids that the broker drops repetitions of; a restart forgets them.
    dedupe: Vec<usize>,
    queue: Stream<Payload>,
    results: Stream<Outcome>,
    workers: [Option<Attempt>; 3],
    recorders: [Option<Batch>; 2],
    pub(super) covered: Covered,
}

impl World {
    pub(super) fn new(mut rng: Rng, defect: Option<Defect>) -> Self {
        let (orders, faults) = (1 + rng.below(4), [0, 5, 15, 35][rng.below(4)]);
        let grace = GRACES[rng.below(2)];
        Self {
            rng,
            defect,
            faults,
            grace,
            now: 0,
            orders: (0..orders).map(|_| Order::default()).collect(),
            jobs: Vec::new(),
            requests: Vec::new(),
            dedupe: Vec::new(),
            queue: Stream::new(),
            results: Stream::new(),
            workers: [const { None }; 3],
            recorders: [const { None }; 2],
            covered: Covered::default(),
        }
    }

    fn is(&self, defect: Defect) -> bool {
        self.defect == Some(defect)
    }

    /// Whether something goes wrong here.
    fn fault(&mut self) -> bool {
        self.rng.percent(self.faults)
    }

    /// Somebody takes a step.
    pub(super) fn step(&mut self) -> Checked {
        match self.rng.below(20) {
            0..2 => self.now += 1,
            2..4 => self.submit(),
            4..9 => self.serve(),
            9..14 => self.work(),
            14..17 => self.record()?,
            17 => self.waiter_records()?,
            18 => self.sweep()?,
            _ => self.rare()?,
        }
        Ok(())
    }

    /// What seldom happens: a client loses interest, the broker restarts.
    fn rare(&mut self) -> Checked {
        match self.rng.below(4) {
            0 => self.cancel()?,
            1 if self.faults > 0 => self.dedupe.clear(),
            2 if self.fault() => self.lose(),
            _ => {}
        }
        Ok(())
    }

    /// The broker's disk loses a job.
    fn lose(&mut self) {
        if !self.queue.messages.is_empty() {
            let n = self.rng.below(self.queue.messages.len());
            let lost = self.queue.messages.remove(n);
            self.jobs[lost.body.job].lost = true;
        }
    }

    /// The surroundings behave from here on: everything must come to its end, and then be right.
    pub(super) fn calm(&mut self) -> Checked {
        self.faults = 0;
        for order in 0..self.orders.len() {
            self.orders[order].cancelled |= self.orders[order].accepted.is_empty() && self.rng.percent(20);
        }
        let end = self.now + CALM;
        while self.now < end && !(self.is_quiet() && self.all_accepted()) {
            self.round()?;
        }
        for (n, job) in self.jobs.iter().enumerate() {
            let owed = self.orders[job.order].accepted.contains(&n) && job.patient && !job.lost;
            if owed && job.swept.is_some() {
                return Err(format!("job {n} was accepted and then lost: {job:?}"));
            }
            if owed && !job.state.is_terminal() {
                return Err(format!("job {n} was accepted and does not end: {job:?}"));
            }
        }
        self.now += DEADLINES[1] + self.grace;
        self.sweep()?;
        for _ in 0..50 {
            self.round()?;
        }
        self.check()
    }

    /// Everybody takes a step.
    fn round(&mut self) -> Checked {
        self.now += 1;
        self.submit();
        for _ in 0..self.orders.len() {
            self.serve();
        }
        for _ in 0..6 {
            self.work();
        }
        self.record()?;
        self.record()?;
        self.sweep()
    }

    fn is_quiet(&self) -> bool {
        self.queue.messages.is_empty()
            && self.results.messages.is_empty()
            && self.requests.is_empty()
            && self.workers.iter().all(Option::is_none)
            && self.recorders.iter().all(Option::is_none)
    }

    fn all_accepted(&self) -> bool {
        self.orders.iter().all(|order| order.cancelled || !order.accepted.is_empty())
    }

    /// After everything.
    fn check(&mut self) -> Checked {
        if !self.is_quiet() {
            return Err(format!("something is left: {:?} {:?}", self.queue, self.results));
        }
        for (n, job) in self.jobs.iter().enumerate() {
            let ended = usize::from(job.state.is_terminal());
            if ended != 1 || job.ends != [job.state] {
                return Err(format!("job {n} did not end exactly once: {job:?}"));
            }
            let done = u32::from(job.state == State::Succeeded);
            if job.billed != done || job.reports != done {
                return Err(format!("job {n} is counted or reported wrongly: {job:?}"));
            }
        }
        for (n, order) in self.orders.iter().enumerate() {
            if order.accepted.iter().any(|job| *job != order.accepted[0]) {
                return Err(format!("the key of order {n} stands for several jobs: {order:?}"));
            }
        }
        Ok(())
    }

    // The record.

    /// The only way to change a state, with what must hold whenever one changes.
    fn change(&mut self, job: usize, event: Event) -> Result<bool, String> {
        let line = &mut self.jobs[job];
        let overruled = match event {
            Event::Succeeded | Event::Failed if line.state == State::Cancelled => {
                self.defect == Some(Defect::ResultAfterCancel)
            }
            Event::Succeeded | Event::Failed => self.defect == Some(Defect::LastResultWins),
            _ => false,
        };
        let from = if overruled { State::Running } else { line.state };
        let Some(state) = step(from, event) else { return Ok(false) };
        line.state = state;
        if state.is_terminal() {
            line.ends.push(state);
            let ended = match state {
                State::Succeeded => &mut self.covered.succeeded,
                State::Failed => &mut self.covered.failed,
                _ => &mut self.covered.cancelled,
            };
            *ended += 1;
        }
        if line.ends.len() > 1 {
            return Err(format!("job {job} ended twice: {line:?}"));
        }
        Ok(true)
    }

    // Clients and ingress.

    /// A client sends its request, for the first time or again.
    fn submit(&mut self) {
        let order = self.rng.below(self.orders.len());
        let Order { accepted, cancelled, .. } = &self.orders[order];
        let satisfied = !accepted.is_empty() && !self.rng.percent(10);
        let sending = self.requests.iter().filter(|request| request.order == order).count();
        if !satisfied && !cancelled && sending < 2 && self.now < DEADLINES[1] {
            self.requests.push(Request { order, stage: Stage::Claim, begun: self.now });
        }
    }

    /// Some request moves on, or its process dies.
    fn serve(&mut self) {
        if self.requests.is_empty() {
            return;
        }
        let n = self.rng.below(self.requests.len());
        let Request { order, stage, begun } = self.requests[n];
        if self.fault() || self.now > begun + REQUEST {
            self.covered.crashes += 1;
            self.requests.remove(n);
            return;
        }
        let next = match stage {
            Stage::Claim => Some(self.claim(order)),
            Stage::Publish(job, deadline) => self.publish(job, deadline),
            Stage::Mark(job, deadline) => Some(self.mark(job, deadline)),
            Stage::Answer(job) => {
                self.answer(order, job);
                None
            }
        };
        match next {
            Some(stage) => self.requests[n].stage = stage,
            None => drop(self.requests.remove(n)),
        }
    }

    fn claim(&mut self, order: usize) -> Stage {
        if let Some(job) = self.orders[order].key.filter(|_| !self.is(Defect::KeyForgotten)) {
            let known = &self.jobs[job];
            let hurry = DEADLINES[usize::from(known.patient)];
            return match known.state {
                State::Accepted => Stage::Publish(job, self.now + hurry),
                _ => Stage::Answer(job),
            };
        }
        let patient = self.rng.percent(75);
        let deadline = self.now + DEADLINES[usize::from(patient)];
        self.jobs.push(Job {
            order,
            state: State::Accepted,
            accepted_at: self.now,
            deadline,
            patient,
            poison: self.rng.percent(POISON),
            lost: false,
            ends: Vec::new(),
            swept: None,
            billed: 0,
            reports: 0,
        });
        let job = self.jobs.len() - 1;
        self.orders[order].key = Some(job);
        Stage::Publish(job, deadline)
    }

    /// The broker stores the payload and acknowledges; either may fail.
    fn publish(&mut self, job: usize, deadline: u32) -> Option<Stage> {
        let (stored, acknowledged) = (!self.fault(), !self.fault());
        if stored && !self.dedupe.contains(&job) {
            self.dedupe.push(job);
            self.queue.store(Payload { job, attempt: 1, deadline }, self.now);
        }
        let answered = (stored && acknowledged) || self.is(Defect::AnswerUnacknowledged);
        answered.then_some(Stage::Mark(job, deadline))
    }

    fn mark(&mut self, job: usize, deadline: u32) -> Stage {
        // A step that is no end cannot end a job twice.
        if self.change(job, Event::Queued) == Ok(true) {
            self.jobs[job].deadline = deadline;
        }
        Stage::Answer(job)
    }

    /// The client hears of it, or not.
    fn answer(&mut self, order: usize, job: usize) {
        // For a job that was settled as never queued it is an error, and the key is free.
        let settled = self.jobs[job].swept == Some(Sweep::NeverQueued) && !self.is(Defect::AnswerForSettled);
        if !settled && !self.fault() {
            self.orders[order].accepted.push(job);
        }
    }

    fn cancel(&mut self) -> Checked {
        let order = self.rng.below(self.orders.len());
        let Some(job) = self.orders[order].accepted.first().copied() else { return Ok(()) };
        self.orders[order].cancelled = true;
        if self.change(job, Event::Cancelled)? {
            self.withdraw(job);
            for attempt in self.workers.iter_mut().flatten().filter(|attempt| attempt.payload.job == job) {
                attempt.told_to_stop = !self.rng.percent(self.faults);
            }
        }
        Ok(())
    }

    /// Out of the queue, if the broker is there.
    fn withdraw(&mut self, job: usize) {
        if !self.fault() {
            self.queue.messages.retain(|message| message.body.job != job);
        }
    }

    // Workers.

    /// Some worker takes a job, or a step with the one it has, or dies.
    fn work(&mut self) {
        let n = self.rng.below(self.workers.len());
        let Some(mut attempt) = self.workers[n].take() else {
            let again = !self.is(Defect::NoRedelivery);
            let Some(message) = self.queue.deliver(&mut self.rng, self.now, again) else { return };
            self.covered.redelivered += u64::from(message.delivered > 1);
            let redelivered = if self.is(Defect::AttemptsUncounted) { 0 } else { message.delivered - 1 };
            let (message, payload) = (message.id, message.body);
            let number = payload.attempt + redelivered;
            let phase = Phase::Delivered;
            self.workers[n] = Some(Attempt { message, payload, number, phase, told_to_stop: false });
            return;
        };
        let poisoned = matches!(attempt.phase, Phase::Running) && self.jobs[attempt.payload.job].poison;
        if poisoned || self.fault() {
            self.covered.crashes += 1;
            return;
        }
        if attempt.told_to_stop && !matches!(attempt.phase, Phase::Ack) {
            self.covered.stopped += 1;
            if self.is(Defect::CancelKeepsMessage) {
                // As if it were still being worked on.
                self.hold(attempt.message);
                return;
            }
            attempt.phase = Phase::Ack;
        }
        if let Some(phase) = self.advance(&attempt) {
            attempt.phase = phase;
            self.workers[n] = Some(attempt);
        }
    }

    /// The next phase of an attempt; `None` when the worker is done with it.
    fn advance(&mut self, attempt: &Attempt) -> Option<Phase> {
        let Attempt { message, payload, .. } = *attempt;
        match attempt.phase {
            Phase::Delivered if attempt.number > MAX_ATTEMPTS => {
                self.covered.exhausted += 1;
                Some(Phase::Result(Event::Failed))
            }
            Phase::Delivered if self.now > payload.deadline => Some(Phase::Result(Event::Failed)),
            Phase::Delivered => {
                // The note of the start may be lost.
                if !self.fault() {
                    let _ = self.change(payload.job, Event::Started);
                }
                Some(Phase::Running)
            }
            Phase::Running => Some(self.verdict(attempt)),
            Phase::Result(event) => {
                if self.is(Defect::AckBeforePublish) {
                    self.queue.ack(message);
                }
                // Unknown whether it is stored: the worker tries again, or leaves it to redelivery.
                if self.fault() {
                    return self.rng.percent(50).then_some(Phase::Result(event));
                }
                self.results.store(Outcome { job: payload.job, event }, self.now);
                if self.fault() { Some(Phase::Result(event)) } else { Some(Phase::Ack) }
            }
            Phase::Retry => {
                if self.fault() {
                    return self.rng.percent(50).then_some(Phase::Retry);
                }
                if !self.is(Defect::RetryDropped) {
                    let backoff = self.now + 1 + self.rng.below(8) as u32;
                    self.queue.store(Payload { attempt: attempt.number + 1, ..payload }, backoff);
                }
                Some(Phase::Ack)
            }
            Phase::Ack => {
                if !self.fault() {
                    self.queue.ack(message);
                }
                None
            }
        }
    }

    fn verdict(&mut self, attempt: &Attempt) -> Phase {
        match (self.rng.below(100), attempt.number < MAX_ATTEMPTS) {
            (0..TRANSIENT, true) => Phase::Retry,
            (0..TRANSIENT, false) => {
                self.covered.exhausted += 1;
                Phase::Result(Event::Failed)
            }
            (90.., _) => Phase::Result(Event::Failed),
            _ => Phase::Result(Event::Succeeded),
        }
    }

    /// The broker believes that a worker is at it.
    fn hold(&mut self, id: u32) {
        for message in self.queue.messages.iter_mut().filter(|message| message.id == id) {
            message.at = u32::MAX;
        }
    }

    // Results.

    /// Some recorder takes results, or records them, or acks them, or dies.
    fn record(&mut self) -> Checked {
        let n = self.rng.below(self.recorders.len());
        let Some(mut batch) = self.recorders[n].take() else {
            let mut results = Vec::new();
            while results.len() < 3
                && let Some(result) = self.results.deliver(&mut self.rng, self.now, true)
            {
                results.push(result);
            }
            if !results.is_empty() {
                self.recorders[n] = Some(Batch { results, recorded: false });
            }
            return Ok(());
        };
        if self.is(Defect::AckBeforeRecord) {
            for result in &batch.results {
                self.results.ack(result.id);
            }
        }
        if self.fault() {
            self.covered.crashes += 1;
            return Ok(());
        }
        if batch.recorded {
            for result in &batch.results {
                if !self.fault() {
                    self.results.ack(result.id);
                }
            }
            return Ok(());
        }
        // The database may be away; then it is tried again.
        if !self.fault() {
            batch.results.iter().try_for_each(|result| self.settle(result.body))?;
            batch.recorded = true;
        }
        self.recorders[n] = Some(batch);
        Ok(())
    }

    /// A waiting caller's process records what it overheard, and acks nothing.
    fn waiter_records(&mut self) -> Checked {
        if self.results.messages.is_empty() {
            return Ok(());
        }
        let n = self.rng.below(self.results.messages.len());
        self.settle(self.results.messages[n].body)
    }

    /// The first result wins; report and count are of the same transaction.
    fn settle(&mut self, Outcome { job, event }: Outcome) -> Checked {
        let won = self.change(job, event)?;
        self.covered.late += u64::from(!won);
        if event == Event::Succeeded && (won || self.is(Defect::CountEveryResult)) {
            self.jobs[job].billed += 1;
            self.jobs[job].reports = 1;
        }
        Ok(())
    }

    // The sweeper.

    fn sweep(&mut self) -> Checked {
        if self.fault() {
            return Ok(());
        }
        for n in 0..self.jobs.len() {
            let job = &self.jobs[n];
            let (late, old) = (job.deadline <= self.now, job.accepted_at + self.grace <= self.now);
            let why = match job.state {
                State::Accepted if (late || old) && !self.is(Defect::SweepForgetsAccepted) => {
                    Sweep::NeverQueued
                }
                State::Queued if late => Sweep::Deadline,
                State::Running if late && !self.is(Defect::SweepForgetsRunning) => Sweep::Deadline,
                _ => continue,
            };
            if self.change(n, Event::Failed)? {
                self.jobs[n].swept = Some(why);
                if why == Sweep::NeverQueued {
                    self.covered.never_queued += 1;
                    let order = self.jobs[n].order;
                    self.orders[order].key = self.orders[order].key.filter(|job| *job != n);
                } else {
                    self.covered.deadline += 1;
                }
                self.withdraw(n);
            }
        }
        Ok(())
    }
}
