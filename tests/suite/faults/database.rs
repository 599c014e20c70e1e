//! PostgreSQL restarted under load, away, and replaced by its standby.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dermflow_tests::{
    checker::{Ledger, order},
    form::scale,
    lab::{Lab, Setup},
    wait::eventually,
};

use super::{SETTLE, jobs};

/// From the moment that PostgreSQL answers again.
const BACK_WITHIN: Duration = Duration::from_secs(5);

async fn until_more(ledger: &Ledger, more: usize) -> Result<()> {
    let enough = ledger.acknowledged() + more;
    let enough = async || (ledger.acknowledged() >= enough).then_some(());
    eventually("jobs are accepted", SETTLE, enough).await
}

// PostgreSQL is killed and restarted under load: jobs are refused meanwhile, and go on 5 s later at most.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_survive_a_killed_database() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 3, ..Setup::simulated(2) }).await?;
    let ledger = Ledger::default();
    let load = ledger.load(lab.client(), 1_000_000, 80);
    let mut slowest = Duration::ZERO;
    for restart in 0..scale(3, 20) {
        until_more(&ledger, 40).await?;
        lab.kill_postgres().await?;
        lab.restart_postgres().await?;
        let back = Instant::now();
        ledger.submit(lab.client(), restart).await?;
        slowest = slowest.max(back.elapsed());
    }
    load.end_after(jobs()).await?;
    ledger.check(&lab, &[], SETTLE).await?;
    println!("slowest return {slowest:?}");
    ensure!(slowest <= BACK_WITHIN, "accepted {slowest:?} after the database was back");
    lab.stop().await
}

// PostgreSQL away: submissions are refused, results wait in the queue; both go on afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn results_wait_while_the_database_is_away() -> Result<()> {
    let mut lab = Lab::start(Setup { ack_wait: 3, ..Setup::simulated(1_000) }).await?;
    let ledger = Ledger::default();
    let job = ledger.submit(lab.client(), 0).await?;
    lab.until_state(&job, "running").await?;
    lab.kill_postgres().await?;
    let refused = lab.client().analyze(&order(1), &[]).await?;
    assert_eq!((refused.status, refused.code()), (503, "database-unavailable"), "{}", refused.text);
    let stored = async || (lab.messages("RESULTS").await.ok()? == 1).then_some(());
    eventually("the result waits in the queue", SETTLE, stored).await?;
    lab.restart_postgres().await?;
    assert_eq!(lab.client().poll(&job, SETTLE).await?.status, 200);
    ledger.check(&lab, &[], SETTLE).await?;
    lab.stop().await
}

// The primary dies for good, and its standby is promoted: ingress, which knows both, goes on without a restart, and
// what was acknowledged is there.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_survive_a_fail_over_of_the_database() -> Result<()> {
    let mut lab = Lab::start(Setup { standby: true, ack_wait: 3, ..Setup::simulated(2) }).await?;
    let ledger = Ledger::default();
    let load = ledger.load(lab.client(), 1_000_000, 80);
    until_more(&ledger, scale(100, 1_000)).await?;
    let pids = lab.pids();
    lab.kill_postgres().await?;
    let died = Instant::now();
    // A promotion can be so quick that nobody notices.
    let refused = async || (ledger.refusals() > 0).then_some(());
    eventually("a submission is refused", SETTLE, refused).await?;
    lab.promote_standby().await?;
    let back = Instant::now();
    ledger.submit(lab.client(), 0).await?;
    println!("accepted {:?} after the death, {:?} after the promotion", died.elapsed(), back.elapsed());
    ensure!(back.elapsed() <= BACK_WITHIN, "accepted {:?} after the promotion", back.elapsed());
    load.end_after(jobs()).await?;
    ledger.check(&lab, &[], SETTLE).await?;
    let ingress = |pids: Vec<(String, u32)>| pids.into_iter().find(|(name, _)| name.starts_with("ingress"));
    assert_eq!(ingress(lab.pids()), ingress(pids), "ingress was restarted");
    lab.stop().await
}
