//! I1, I2: the fault tests of the reliability table, each named after its row, and those of the database.
//!
//! Every one puts the system under load through TLS, breaks something, and leaves the verdict to the checker: lost,
//! unexpected and doubled are empty. Without `DERMFLOW_FAULTS=long` they run in a short form.

mod broker;
mod cluster;
mod database;
mod disk;
mod ingress;
mod network;
mod upgrade;
mod workers;

use std::time::Duration;

/// For every job to end after the last fault.
const SETTLE: Duration = Duration::from_mins(2);

/// How many jobs a test takes, at least.
fn jobs() -> usize {
    dermflow_tests::form::scale(200, 2_000)
}
