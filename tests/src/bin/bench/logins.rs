//! What logins cost others: the p99 of `$analyze` while 200 at a time sign in, and how long a login takes for a name
//! that nobody has.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_tests::{
    client::{Client, sample},
    lab::{Lab, Setup},
};
use tokio::{task::JoinSet, time::sleep};

use crate::measure::{
    Sent, forget_peak, maximum, median, minimum, open_loop, peak_rss_mb, percentile, rss_mb, verdict,
};

/// Logins at once.
const LOGINS: usize = 200;
/// Users that sign in; an account has a budget of its own at each source.
const USERS: usize = 20;
/// Pairs of blocks.
const BLOCKS: usize = 7;
const BLOCK: Duration = Duration::from_secs(15);
/// `$analyze` requests a second.
const PER_SECOND: f64 = 20.0;
/// Logins of each kind whose time is compared.
const TIMED: usize = 150;

pub(crate) async fn logins() -> Result<()> {
    let lab = Lab::in_service(Setup::simulated(20)).await?;
    let mut users = Vec::new();
    for n in 0..USERS {
        let name = format!("user-{n}");
        lab.register(&name).await?;
        users.push((name.clone(), lab.password(&name)?));
    }
    let (_, pid) =
        lab.pids().into_iter().find(|(name, _)| name.starts_with("ingress")).context("no ingress")?;
    same_time(&lab, &users[0]).await?;
    let body = sample("ham10000-nv.jpg").to_string();
    open_loop(lab.client(), &body, PER_SECOND, BLOCK / 3).await?;
    forget_peak(pid)?;
    let idle = rss_mb(pid)?;
    let (mut ratios, mut without, mut with) = (Vec::new(), Vec::new(), Vec::new());
    let mut statuses = BTreeMap::new();
    for n in 1..=BLOCKS {
        let calm = p99(&open_loop(lab.client(), &body, PER_SECOND, BLOCK).await?)?;
        let stop = Arc::new(AtomicBool::new(false));
        let storm = tokio::spawn(storm(Client::new(&lab.ca(), &lab.url(0))?, users.clone(), stop.clone()));
        sleep(Duration::from_secs(1)).await;
        let busy = p99(&open_loop(lab.client(), &body, PER_SECOND, BLOCK).await?)?;
        stop.store(true, Ordering::Relaxed);
        for (status, count) in storm.await?? {
            *statuses.entry(status).or_insert(0) += count;
        }
        println!(
            "block {n}: p99 of $analyze {calm:.1} ms without, {busy:.1} ms with {LOGINS} logins at once"
        );
        ratios.push(busy / calm);
        without.push(calm);
        with.push(busy);
    }
    println!("logins by status: {statuses:?}");
    println!("medians: {:.1} and {:.1} ms", median(&mut without), median(&mut with));
    println!("ratios: {:.2} to {:.2}", minimum(&ratios), maximum(&ratios));
    let ratio = median(&mut ratios);
    verdict("p99 of $analyze, in times of that without logins", ratio, ratio <= 1.2, "at most 1.2");
    let grown = peak_rss_mb(pid)? as f64 - idle;
    verdict(
        "peak RSS of ingress above idle, MB",
        grown,
        grown <= 119.0,
        "at most 119: a hash a thread, and 100",
    );
    let others = statuses.keys().filter(|status| ![200, 503].contains(*status)).count();
    verdict("statuses of logins other than 200 and 503", others as f64, others == 0, "0");
    lab.stop().await
}

fn p99(sent: &[Sent]) -> Result<f64> {
    ensure!(sent.iter().all(|sent| sent.status == 200), "a request was refused");
    Ok(percentile(&mut sent.iter().map(|sent| sent.millis).collect::<Vec<_>>(), 99))
}

/// [`LOGINS`] callers who sign in again and again; who is told to wait does. Counts answers by status.
async fn storm(
    client: Client,
    users: Vec<(String, String)>,
    stop: Arc<AtomicBool>,
) -> Result<BTreeMap<u16, usize>> {
    let mut callers = JoinSet::new();
    for n in 0..LOGINS {
        let (client, (name, password), stop) = (client.clone(), users[n % users.len()].clone(), stop.clone());
        callers.spawn(async move {
            let mut statuses = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let answer = client.try_login(&name, &password).await?;
                if ![200, 503].contains(&answer.status) {
                    println!("{} {}", answer.status, answer.text);
                }
                statuses.push(answer.status);
                if let Ok(pause) = answer.header("retry-after").parse() {
                    sleep(Duration::from_secs(pause)).await;
                }
            }
            anyhow::Ok(statuses)
        });
    }
    let mut counts = BTreeMap::new();
    for statuses in callers.join_all().await {
        for status in statuses? {
            *counts.entry(status).or_insert(0) += 1;
        }
    }
    Ok(counts)
}

/// Wrong passwords for a name that exists and for one that does not, in turn. The owner signs in before each, so that
/// nothing is throttled; of the names that nobody has, each is tried once.
async fn same_time(lab: &Lab, (name, password): &(String, String)) -> Result<()> {
    let client = lab.client();
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for n in 0..TIMED {
        // The source's own budget.
        lab.sql("DELETE FROM auth.login_guesses").await?;
        client.clone().login(name, password).await?;
        for (times, name) in [(&mut known, name.clone()), (&mut unknown, format!("nobody-{n}"))] {
            let begun = Instant::now();
            let answer = client.try_login(&name, "not the password at all").await?;
            ensure!(answer.status == 401, "{} {}", answer.status, answer.text);
            times.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    let (known, unknown) = (median(&mut known), median(&mut unknown));
    println!(
        "a wrong password: {known:.2} ms for a known name, {unknown:.2} ms for an unknown one (medians of {TIMED})"
    );
    let difference = (known / unknown - 1.0).abs() * 100.0;
    verdict("difference, %", difference, difference <= 5.0, "at most 5");
    Ok(())
}
