//! D: more workers, more jobs a second; workers that come, leave and die while jobs wait.

use std::time::{Duration, Instant};

use anyhow::Result;
use dermflow_schemas::clock;
use dermflow_tests::{
    client::sample_bytes,
    lab::{Lab, Setup, Worker},
};

use crate::{
    measure::{check, until_ended, verdict},
    upload::upload,
};

/// Time of the simulated model.
const MODEL_MS: u64 = 100;
/// Jobs a second of one worker that does nothing but wait for its model.
const IDEAL: f64 = 10.0;
/// About 20 kB.
const IMAGE: &str = "ham10000-nv.jpg";
/// How long a rate is measured.
const WINDOW: Duration = Duration::from_secs(5);
/// Seconds until the broker hands a dead worker's job to another.
const ACK_WAIT: u64 = 3;
/// For everything to be worked off.
const DRAINED: Duration = Duration::from_mins(3);

/// Rates with more and more workers, then the same with workers that change.
pub(crate) async fn scale(long: bool) -> Result<()> {
    let mut sizes = vec![1, 2, 4, 8, 16];
    if long {
        sizes.extend([32, 64]);
    }
    for workers in sizes {
        steady(workers).await?;
    }
    if long { elastic(4, 32).await } else { elastic(4, 16).await }
}

fn workers(count: usize) -> Vec<Worker> {
    vec![Worker::simulated(MODEL_MS); count]
}

/// Jobs that so many workers have in so many seconds, at best.
fn worth(workers: usize, seconds: f64) -> usize {
    (workers as f64 * IDEAL * seconds) as usize
}

/// The rate of `count` workers while there is a backlog.
async fn steady(count: usize) -> Result<()> {
    let mut lab = Lab::in_service(Setup::without_workers()).await?;
    let jobs = upload(lab.client(), &sample_bytes(IMAGE), worth(count, 12.0)).await?;
    lab.start_workers(workers(count)).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let from = clock::now();
    tokio::time::sleep(WINDOW).await;
    let query = format!(
        "SELECT count(*) FROM ingress.jobs WHERE finished_at >= '{from}' \
         AND finished_at < '{from}'::timestamptz + interval '{} s'",
        WINDOW.as_secs()
    );
    until_ended(&lab, DRAINED).await?;
    let rate = lab.count(&query).await? as f64 / WINDOW.as_secs_f64();
    let (share, goal) = (rate / (count as f64 * IDEAL), if count <= 16 { 0.97 } else { 0.9 });
    println!("{count} workers: {rate:.1} jobs/s of {:.0}", count as f64 * IDEAL);
    verdict(&format!("share of the ideal with {count}"), share, share >= goal, &format!("at least {goal}"));
    check(&lab, &jobs).await?;
    lab.stop().await
}

/// From `few` to `many` workers, then half of them are told to leave, come back, and are killed.
pub(crate) async fn elastic(few: usize, many: usize) -> Result<()> {
    let half = many / 2;
    let mut lab = Lab::in_service(Setup { ack_wait: ACK_WAIT, ..Setup::without_workers() }).await?;
    let jobs = upload(lab.client(), &sample_bytes(IMAGE), worth(many, 16.0)).await?;
    lab.start_workers(workers(few)).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (from, begun) = (clock::now(), Instant::now());
    lab.start_workers(workers(many - few)).await?;
    let ready = begun.elapsed().as_secs_f64();
    tokio::time::sleep(WINDOW).await;
    let per_second = format!(
        "SELECT finished_at - '{from}'::timestamptz AS at, count(*) OVER \
         (ORDER BY finished_at RANGE BETWEEN CURRENT ROW AND interval '1 s' FOLLOWING) AS jobs \
         FROM ingress.jobs WHERE finished_at >= '{from}'"
    );
    let goal = many as f64 * IDEAL * 0.95;
    let reached = lab
        .sql(&format!(
            "SELECT extract(epoch FROM min(at) FILTER (WHERE jobs >= {goal}))::float8, max(jobs)::float8 \
             FROM ({per_second}) AS window_of_a_second"
        ))
        .await?;
    let (reached, best): (Option<f64>, Option<f64>) =
        reached.first().map(|row| (row.get(0), row.get(1))).unwrap_or_default();
    println!(
        "{few} to {many} workers: the new ones ready after {ready:.2} s; best second {:.0} jobs",
        best.unwrap_or_default()
    );
    let seconds = reached.unwrap_or(f64::INFINITY);
    verdict("seconds until 95 % of the new ideal", seconds, seconds <= 5.0, "at most 5");

    for n in 0..half {
        lab.stop_worker(n).await?;
    }
    // A job in a worker's hands would be delivered again within this time.
    tokio::time::sleep(Duration::from_secs(ACK_WAIT + 1)).await;
    let again = "SELECT count(*) FROM ingress.jobs WHERE attempts > 1";
    let redelivered = lab.count(again).await?;
    verdict(&format!("redelivered after SIGTERM of {half}"), redelivered as f64, redelivered == 0, "0");
    lab.start_workers(workers(half)).await?;
    let killed = clock::now();
    for n in half..many {
        lab.kill_worker(n).await?;
    }
    until_ended(&lab, DRAINED).await?;
    check(&lab, &jobs).await?;
    let late = format!(
        "SELECT coalesce(extract(epoch FROM max(started_at) - '{killed}'), 0)::float8 FROM ingress.jobs \
         WHERE attempts > 1"
    );
    let late: f64 = lab.sql(&late).await?.first().map_or(0.0, |row| row.get(0));
    let repeated = lab.count(again).await?;
    println!("SIGKILL of {half}: {repeated} jobs were done again");
    let goal = ACK_WAIT + 2;
    verdict("seconds until the last began again", late, late <= goal as f64, &format!("at most {goal}"));
    lab.stop().await
}
