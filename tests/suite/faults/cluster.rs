//! R13: three brokers, each message on all of them.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dermflow_tests::{
    checker::Ledger,
    form::scale,
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::time::interval;

use super::{SETTLE, jobs};

const NODES: usize = 3;
/// How long after a fault a submission that is accepted is sent, at the latest, while two of three brokers run that were in
/// step before. (Three copies survive one failure at a time: the next one comes when the third is up to date again.) A
/// follower of nats-server waits 4 to 9 seconds for its leader before it stands for election; and one second for the rest.
const UNAVAILABLE: Duration = Duration::from_secs(10);

/// Between two attempts.
const PACE: Duration = Duration::from_millis(100);

async fn start() -> Result<(Lab, Ledger)> {
    let workers = vec![Worker::simulated(5), Worker::simulated(5)];
    let lab = Lab::start(Setup { workers, brokers: NODES, ack_wait: 3, ..Setup::default() }).await?;
    Ok((lab, Ledger::default()))
}

async fn until_more(ledger: &Ledger, more: usize) -> Result<()> {
    let enough = ledger.acknowledged() + more;
    let enough = async || (ledger.acknowledged() >= enough).then_some(());
    eventually("jobs are accepted", SETTLE, enough).await
}

/// How long after the fault that happens now a submission is sent that is accepted. One is sent every [`PACE`], as one that
/// came too early is refused only after its deadline; all that were not accepted are sent again. `fault` counts the faults of
/// the test.
async fn available_after(lab: &Lab, ledger: &Ledger, fault: usize) -> Result<Duration> {
    let (begun, mut pace) = (Instant::now(), interval(PACE));
    let (mut attempts, first) = (FuturesUnordered::new(), fault * 10_000);
    let mut order = first;
    let after = loop {
        tokio::select! {
            _ = pace.tick() => {
                let (sent, n) = (begun.elapsed(), order);
                ensure!(sent < SETTLE, "nothing is accepted within {SETTLE:?}");
                attempts.push(async move { (sent, ledger.attempt(lab.client(), n).await) });
                order += 1;
            }
            Some((sent, job)) = attempts.next() => {
                if job?.is_some() {
                    break sent;
                }
            }
        }
    };
    drop(attempts);
    ledger.submit_all(lab.client(), first..order, 16).await?;
    Ok(after)
}

async fn judge(lab: Lab, ledger: Ledger, times: &[Duration]) -> Result<()> {
    println!("available again after {times:?}");
    ledger.check(&lab, &[], SETTLE).await?;
    let slowest = times.iter().max().copied().unwrap_or_default();
    ensure!(slowest <= UNAVAILABLE, "unavailable for {slowest:?}");
    lab.stop().await
}

// The broker that leads the stream of jobs is killed under load; another one takes over.
#[tokio::test(flavor = "multi_thread")]
async fn r13_jobs_survive_the_death_of_the_leader() -> Result<()> {
    let (mut lab, ledger) = start().await?;
    let load = ledger.load(lab.client(), 1_000_000, 60);
    let mut times = Vec::new();
    for kill in 0..scale(2, 10) {
        until_more(&ledger, 40).await?;
        let leader = lab.leader(None).await?;
        lab.node(leader).process.kill().await;
        times.push(available_after(&lab, &ledger, kill).await?);
        ensure!(lab.leader(Some(leader)).await? != leader, "the dead one still leads");
        lab.node(leader).start().await?;
        lab.until_in_step().await?;
    }
    load.end_after(jobs()).await?;
    judge(lab, ledger, &times).await
}

// The leader is cut off from the other two, and comes back: it may not have acknowledged anything meanwhile, and
// those who are connected to it find another one.
#[tokio::test(flavor = "multi_thread")]
async fn r13_jobs_survive_a_partition() -> Result<()> {
    let (lab, ledger) = start().await?;
    let load = ledger.load(lab.client(), 1_000_000, 60);
    let (mut times, mut n) = (Vec::new(), 0);
    for _ in 0..scale(1, 4) {
        until_more(&ledger, 40).await?;
        let leader = lab.leader(None).await?;
        lab.cluster().isolate(leader);
        times.push(available_after(&lab, &ledger, n).await?);
        ensure!(lab.leader(Some(leader)).await? != leader, "the isolated one still leads");
        n += 1;
        until_more(&ledger, 40).await?;
        lab.cluster().heal();
        lab.until_in_step().await?;
    }
    // And each in turn, whether it leads or not.
    for node in 0..NODES {
        lab.cluster().isolate(node);
        times.push(available_after(&lab, &ledger, n).await?);
        n += 1;
        until_more(&ledger, 40).await?;
        lab.cluster().heal();
        lab.until_in_step().await?;
    }
    load.end_after(jobs()).await?;
    judge(lab, ledger, &times).await
}

// Every broker is restarted in order, one after the other, as for a new version.
#[tokio::test(flavor = "multi_thread")]
async fn r13_a_rolling_restart_loses_nothing() -> Result<()> {
    let (mut lab, ledger) = start().await?;
    let load = ledger.load(lab.client(), 1_000_000, 60);
    let mut times = Vec::new();
    for restart in 0..NODES * scale(1, 4) {
        let node = restart % NODES;
        until_more(&ledger, 40).await?;
        lab.node(node).stop().await?;
        times.push(available_after(&lab, &ledger, restart).await?);
        lab.node(node).start().await?;
        lab.until_in_step().await?;
    }
    load.end_after(jobs()).await?;
    judge(lab, ledger, &times).await
}
