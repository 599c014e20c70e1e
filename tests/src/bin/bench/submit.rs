//! 10,000 images from four clients, each of which is `dermflow submit`, killed twice and repeated.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use dermflow_tests::{
    client::sample_bytes,
    desk::Desk,
    lab::{Lab, Setup, Worker},
};
use futures_util::future::try_join_all;
use tokio::time::timeout;

use crate::{
    IMAGES,
    measure::{check, verdict},
};

/// The clients.
const CLIENTS: [&str; 4] = ["a", "b", "c", "d"];
/// Images of each.
const FILES: usize = 2_500;
/// Time of the simulated model.
const MODEL_MS: u64 = 5;
/// The result file, beside which is the journal of what was accepted.
const OUT: &str = "results.ndjson";
const JOURNAL: &str = "results.ndjson.journal";
/// The command, every time.
const COMMAND: [&str; 2] = ["--out", OUT];
/// For each part of a submission.
const WITHIN: Duration = Duration::from_mins(10);

/// Every file has one line, one job and one report, whatever was killed in between.
pub(crate) async fn submit() -> Result<()> {
    let workers = vec![Worker::simulated(MODEL_MS); 2];
    let lab = Lab::in_service(Setup { workers, ..Setup::default() }).await?;
    let photographs = IMAGES.map(|name| (name, sample_bytes(name)));
    let mut desks = Vec::new();
    for client in CLIENTS {
        lab.register(client).await?;
        desks.push(Desk::new(&lab, client, &photographs, FILES)?);
    }
    let begun = Instant::now();
    let repeated: usize = try_join_all(desks.iter().map(interrupted)).await?.into_iter().sum();
    println!(
        "{} images from {} clients, each killed twice: {:.1} s, {repeated} more runs that could not finish",
        CLIENTS.len() * FILES,
        CLIENTS.len(),
        begun.elapsed().as_secs_f64()
    );

    let (mut jobs, mut incomplete, mut different) = (Vec::new(), 0, 0);
    for (client, desk) in CLIENTS.iter().zip(&desks) {
        match desk.complete(OUT, FILES) {
            Ok(found) => {
                different += usize::from(found != recorded(&lab, client).await?);
                jobs.extend(found.into_values());
            }
            Err(error) => {
                println!("client {client}: {error:#}");
                incomplete += 1;
            }
        }
    }
    verdict("result files without one report a file", f64::from(incomplete), incomplete == 0, "0");
    verdict("result files other than the record", different as f64, different == 0, "0");
    let lines = jobs.len();
    jobs.sort_unstable();
    jobs.dedup();
    let twice = lines - jobs.len();
    verdict("jobs in two lines", twice as f64, twice == 0, "0");
    let all = CLIENTS.len() * FILES;
    for (what, condition) in [("jobs", "true"), ("jobs with a report", "state = 'succeeded'")] {
        let count = lab.count(&format!("SELECT count(*) FROM ingress.jobs WHERE {condition}")).await?;
        verdict(what, count as f64, count == all as i64, &all.to_string());
    }
    check(&lab, &jobs).await?;
    lab.stop().await
}

/// Killed when a third is accepted and when two thirds have their line, then repeated to the end. How often it could
/// not finish.
async fn interrupted(desk: &Desk) -> Result<usize> {
    desk.kill_at(desk.start(&COMMAND)?, JOURNAL, FILES / 3, WITHIN).await?;
    desk.kill_at(desk.start(&COMMAND)?, OUT, FILES * 2 / 3, WITHIN).await?;
    let mut repeated = 0;
    loop {
        let output = timeout(WITHIN, desk.submit(&COMMAND)).await??;
        match output.status.code() {
            Some(0) => return Ok(repeated),
            // It could not finish: the same command goes on.
            Some(3) => repeated += 1,
            _ => bail!("dermflow submit: {} {}", output.status, String::from_utf8_lossy(&output.stderr)),
        }
    }
}

/// The job of each file as the record has it.
async fn recorded(lab: &Lab, client: &str) -> Result<BTreeMap<String, String>> {
    let query = format!(
        "SELECT custom_id, id::text FROM ingress.jobs \
         WHERE client = (SELECT id FROM auth.users WHERE username = '{client}')"
    );
    Ok(lab.sql(&query).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
}
