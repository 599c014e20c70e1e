//! Queue in, results out.
//!
//! This crate owns how jobs are pulled, what an attempt is, the model and the report. It knows neither HTTP nor
//! users nor PostgreSQL; adding a worker adds a connection to the broker and nothing else.
//!
//! Invariants kept here: a job is acked only after the broker has stored what replaces it; jobs in hand never
//! exceed the executors by more than one; nothing is decoded beyond the limits; the same image gives the same
//! numbers; whatever a model does, short of ending the process, costs its own job only, and so does whatever a decoder
//! does.
//!
//! `schedule`, `fair` (whom to ask: pure), `watch` (who has jobs), `pull` (the requests), `cancel` (what was
//! withdrawn); `consume` (the loop), `reserved` (a smaller one, for callers who wait) → `attempt` (one message) → `executor`
//! (a thread, its engine and `child`, its decoder's process) → `analyse` → `report`; `model` is a model's folder, `golden`
//! what it must say, `models` which one a job is for; `quality` is how good an image is, `outline` what a report says of a
//! lesion's place, `heat` what speaks for a class, and `language` how it is said. `pixels` is what models are trained on,
//! `outlines` what they are evaluated on beside it, and `memory` what a process keeps of what it has freed.

pub mod analyse;
pub mod attempt;
pub mod cancel;
pub mod child;
pub mod consume;
pub mod decode;
pub mod engine;
pub mod executor;
pub mod fair;
pub mod frame;
pub mod golden;
pub mod heat;
pub mod language;
pub mod memory;
pub mod model;
pub mod models;
pub mod outline;
pub mod outlines;
pub mod pixels;
pub mod pull;
pub mod quality;
pub mod quarantine;
pub mod report;
pub mod reserved;
pub mod resize;
pub mod schedule;
#[cfg(test)]
mod simulation;
pub mod timing;
pub mod watch;
