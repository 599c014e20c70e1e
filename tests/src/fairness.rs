//! How evenly clients with the same backlog are served.

use anyhow::{Context, Result, ensure};

use crate::lab::Lab;

/// Over how long shares are compared, in seconds.
const WINDOW: f64 = 5.0;
/// From the beginning of one window to that of the next, in seconds.
const STEP: f64 = 0.1;

/// The shares of clients in all windows in which each of them had jobs waiting.
#[derive(Debug)]
pub struct Evenness {
    /// The least of Jain's index.
    pub jain: f64,
    /// How many windows there were.
    pub windows: usize,
}

/// Compares what these clients were given, `jobs` each: from when all have begun, until one has nothing left.
///
/// # Errors
/// When one of them has another number of jobs that succeeded.
pub async fn evenness(lab: &Lab, clients: &[&str], jobs: usize) -> Result<Evenness> {
    let mut finishes = Vec::new();
    let (mut begin, mut end) = (f64::MIN, f64::MAX);
    for client in clients {
        let query = format!(
            "SELECT extract(epoch FROM started_at)::float8, extract(epoch FROM finished_at)::float8 \
             FROM ingress.jobs WHERE state = 'succeeded' \
             AND client = (SELECT id FROM auth.users WHERE username = '{client}')"
        );
        let rows = lab.sql(&query).await?;
        ensure!(rows.len() == jobs, "{} jobs of {client} succeeded, of {jobs}", rows.len());
        let [starts, ends] =
            [0, 1].map(|column| rows.iter().map(|row| row.get(column)).collect::<Vec<f64>>());
        begin = begin.max(starts.into_iter().min_by(f64::total_cmp).context("no jobs")?);
        end = end.min(ends.iter().copied().max_by(f64::total_cmp).context("no jobs")?);
        finishes.push(ends);
    }
    let mut evenness = Evenness { jain: 1.0, windows: 0 };
    let mut from = begin;
    while from + WINDOW <= end {
        let within =
            |times: &Vec<f64>| times.iter().filter(|at| (from..from + WINDOW).contains(*at)).count() as f64;
        evenness.jain = evenness.jain.min(jain(&finishes.iter().map(within).collect::<Vec<_>>()));
        evenness.windows += 1;
        from += STEP;
    }
    Ok(evenness)
}

/// Jain's index of fairness: 1 when all are equal, 1/n when one has everything (Jain, Chiu, Hawe: DEC TR-301, 1984).
fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(s, q), x| (s + x, q + x * x));
    sum * sum / (shares.len() as f64 * squares)
}
