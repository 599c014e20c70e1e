//! The model: clients, ingress, record, queue, workers, recorders, sweeper, operators. One call of [`World::step`] lets one
//! of them take one step.

use super::{Defect, Rng};
use crate::{
    job::{Event, State, step},
    limits::MAX_ATTEMPTS,
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
/// Per cent of jobs that kill their worker; of attempts that fail in passing, and those with which the model is at fault.
const POISON: usize = 3;
const TRANSIENT: usize = 10;
const AT_FAULT: usize = TRANSIENT + 5;
/// How often operators put a job back, at most.
const REQUEUES: u32 = 2;

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
    /// How many messages of its present life the broker's disk lost.
    lost: u32,
    /// The record knows where in the queue it was put.
    placed: bool,
    /// How often it was put back.
    requeues: u32,
    /// The dead letter that it was put back from last, until that is removed.
    pending: Option<u32>,
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
    Lost,
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
    requeues: u32,
    attempt: u32,
    deadline: u32,
}

#[derive(Debug, Clone, Copy)]
struct Outcome {
    job: usize,
    requeues: u32,
    event: Event,
}

/// A payload that workers gave up.
#[derive(Debug, Clone, Copy)]
struct Letter {
    id: u32,
    job: usize,
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
    Bury,
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
    lost: u64,
    requeued: u64,
    succeeded_again: u64,
    stale: u64,
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

    fn fields(&mut self) -> [&mut u64; 14] {
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
            lost,
            requeued,
            succeeded_again,
            stale,
        } = self;
        [
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
            lost,
            requeued,
            succeeded_again,
            stale,
        ]
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
    /// The ids that the broker drops repetitions of, of a job's first and further lives; a restart forgets them.
    dedupe: Vec<(usize, u32)>,
    queue: Stream<Payload>,
    results: Stream<Outcome>,
    dead: Vec<Letter>,
    letters: u32,
    /// Operators put no further letter back, and finish what they have begun.
    closing: bool,
    /// Jobs, in which life, that the sweeper has not found in the first place where it looked.
    suspects: Vec<(usize, u32)>,
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
            dead: Vec::new(),
            letters: 0,
            closing: false,
            suspects: Vec::new(),
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

    /// What seldom happens: a client loses interest, the broker restarts, or loses something, an operator looks.
    fn rare(&mut self) -> Checked {
        match self.rng.below(4) {
            0 => self.cancel()?,
            1 if self.faults > 0 => self.dedupe.clear(),
            2 if self.fault() => self.lose(),
            3 => self.operate()?,
            _ => {}
        }
        Ok(())
    }

    /// The broker's disk loses a payload, or a result.
    fn lose(&mut self) {
        let (payloads, results) = (self.queue.messages.len(), self.results.messages.len());
        if payloads + results == 0 {
            return;
        }
        let n = self.rng.below(payloads + results);
        let (job, requeues) = if n < payloads {
            let Payload { job, requeues, .. } = self.queue.messages.remove(n).body;
            (job, requeues)
        } else {
            let Outcome { job, requeues, .. } = self.results.messages.remove(n - payloads).body;
            (job, requeues)
        };
        self.jobs[job].lost += u32::from(requeues == self.jobs[job].requeues);
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
            // What is lost while the record does not know where it was put ends at its deadline.
            let found = job.lost == 0 || job.placed;
            let owed = self.orders[job.order].accepted.contains(&n) && job.patient && found;
            if owed && job.swept.is_some_and(|why| why != Sweep::Lost) {
                return Err(format!("job {n} was accepted and then lost: {job:?}"));
            }
            if owed && !job.state.is_terminal() {
                return Err(format!("job {n} was accepted and does not end: {job:?}"));
            }
        }
        self.closing = true;
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
        self.operate()?;
        self.sweep()
    }

    fn is_quiet(&self) -> bool {
        self.queue.messages.is_empty()
            && self.results.messages.is_empty()
            && self.requests.is_empty()
            && self.jobs.iter().all(|job| job.pending.is_none() && (!job.placed || job.state.is_terminal()))
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
            let [failed @ .., last] = job.ends.as_slice() else {
                return Err(format!("job {n} did not end: {job:?}"));
            };
            let reopened =
                failed.len() == job.requeues as usize && failed.iter().all(|end| *end == State::Failed);
            if *last != job.state || !reopened {
                return Err(format!("job {n} did not end exactly once in each of its lives: {job:?}"));
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
            let billed: u32 = self.jobs.iter().filter(|job| job.order == n).map(|job| job.billed).sum();
            if billed > 1 {
                return Err(format!("order {n} is billed {billed} times: {order:?}"));
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
        if line.ends.len() > 1 + line.requeues as usize {
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
            lost: 0,
            placed: false,
            requeues: 0,
            pending: None,
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
        if stored {
            self.put(Payload { job, requeues: 0, attempt: 1, deadline }, 0);
        }
        let answered = (stored && acknowledged) || self.is(Defect::AnswerUnacknowledged);
        answered.then_some(Stage::Mark(job, deadline))
    }

    /// Stores a payload, unless there was one of this id.
    fn put(&mut self, payload: Payload, life: u32) {
        let id = (payload.job, life);
        if !self.dedupe.contains(&id) {
            self.dedupe.push(id);
            self.queue.store(payload, self.now);
        }
    }

    fn mark(&mut self, job: usize, deadline: u32) -> Stage {
        // A step that is no end cannot end a job twice.
        if self.change(job, Event::Queued) == Ok(true) {
            self.jobs[job].deadline = deadline;
        }
        self.jobs[job].placed = true;
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
                Some(Phase::Bury)
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
            // The letter first: what follows deletes the payload.
            Phase::Bury => {
                if self.fault() {
                    return self.rng.percent(50).then_some(Phase::Bury);
                }
                self.letters += 1;
                self.dead.push(Letter { id: self.letters, job: payload.job });
                Some(if self.fault() { Phase::Bury } else { Phase::Result(Event::Failed) })
            }
            Phase::Result(event) => {
                if self.is(Defect::AckBeforePublish) {
                    self.queue.ack(message);
                }
                // Unknown whether it is stored: the worker tries again, or leaves it to redelivery.
                if self.fault() {
                    return self.rng.percent(50).then_some(Phase::Result(event));
                }
                let Payload { job, requeues, .. } = payload;
                self.results.store(Outcome { job, requeues, event }, self.now);
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
                // So may the note of the pause.
                if !self.fault() {
                    let _ = self.change(payload.job, Event::Parked);
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
                Phase::Bury
            }
            (TRANSIENT..AT_FAULT, _) => Phase::Bury,
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
    fn settle(&mut self, Outcome { job, requeues, event }: Outcome) -> Checked {
        // A failure from before it was put back says nothing about it.
        let stale = event == Event::Failed && requeues < self.jobs[job].requeues;
        if stale && !self.is(Defect::StaleFailureCounts) {
            self.covered.stale += 1;
            return Ok(());
        }
        let won = self.change(job, event)?;
        if won && stale {
            return Err(format!("job {job} was ended by a failure of an earlier life: {:?}", self.jobs[job]));
        }
        self.covered.late += u64::from(!won);
        self.covered.succeeded_again +=
            u64::from(won && event == Event::Succeeded && self.jobs[job].requeues > 0);
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
        if self.is(Defect::LossUnnoticed) { Ok(()) } else { self.settle_lost() }
    }

    /// Ends jobs that were not in the queue a while ago and are not among the results now, and looks who is not in the
    /// queue now.
    fn settle_lost(&mut self) -> Checked {
        for (job, requeues) in std::mem::take(&mut self.suspects) {
            let line = &self.jobs[job];
            let same =
                line.requeues == requeues && line.placed && !self.is_in(job, self.is(Defect::LookBackwards));
            if !same || !self.change(job, Event::Failed)? {
                continue;
            }
            let line = &mut self.jobs[job];
            line.swept = Some(Sweep::Lost);
            self.covered.lost += 1;
            if line.lost == 0 {
                return Err(format!("job {job} is called lost, and is not: {line:?}"));
            }
        }
        let looked_for = |n: &usize| {
            let job = &self.jobs[*n];
            job.placed && !job.state.is_terminal() && !self.is_in(*n, !self.is(Defect::LookBackwards))
        };
        self.suspects = (0..self.jobs.len()).filter(looked_for).map(|n| (n, self.jobs[n].requeues)).collect();
        Ok(())
    }

    /// Whether a job is in the queue, or else among the results.
    fn is_in(&self, job: usize, queue: bool) -> bool {
        if queue {
            self.queue.messages.iter().any(|message| message.body.job == job)
        } else {
            self.results.messages.iter().any(|message| message.body.job == job)
        }
    }

    // Operators.

    /// What was begun goes on, or somebody puts a letter back.
    fn operate(&mut self) -> Checked {
        if let Some(job) = self.jobs.iter().position(|job| job.pending.is_some()) {
            self.put_back(job);
            return Ok(());
        }
        if self.dead.is_empty() || self.closing {
            return Ok(());
        }
        let letter = self.dead[self.rng.below(self.dead.len())];
        let job = &self.jobs[letter.job];
        // An operator is slower than a request.
        let is_asked = self.requests.iter().any(|request| request.order == job.order);
        let unaccepted = job.swept == Some(Sweep::NeverQueued) && !self.is(Defect::RequeueUnaccepted);
        if is_asked || unaccepted || job.requeues == REQUEUES || !self.change(letter.job, Event::Requeued)? {
            return Ok(());
        }
        let job = &mut self.jobs[letter.job];
        (job.requeues, job.pending) = (job.requeues + 1, Some(letter.id));
        (job.placed, job.lost, job.swept) = (false, 0, None);
        job.deadline = self.now + DEADLINES[usize::from(job.patient)];
        self.covered.requeued += 1;
        self.put_back(letter.job);
        Ok(())
    }

    /// The payload goes into the queue, the record notes it, the letter is removed. The operators' process may die anywhere.
    fn put_back(&mut self, n: usize) {
        let Job { requeues, deadline, pending, .. } = self.jobs[n];
        let is_open = !self.jobs[n].state.is_terminal();
        if is_open && !self.jobs[n].placed {
            if self.fault() {
                return;
            }
            let life = if self.is(Defect::RequeueUnderOldId) { 0 } else { requeues };
            self.put(Payload { job: n, requeues, attempt: 1, deadline }, life);
            if self.fault() {
                return;
            }
            self.jobs[n].placed = true;
        }
        // One that failed before it is known to be in the queue may still need its letter.
        if is_open || self.jobs[n].placed || self.jobs[n].state != State::Failed {
            self.dead.retain(|letter| Some(letter.id) != pending);
        }
        if !self.fault() {
            self.jobs[n].pending = None;
        }
    }
}
