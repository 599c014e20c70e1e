//! R6: links that are cut, swallow everything, are slow, or reset connections.

use std::time::Duration;

use anyhow::{Result, ensure};
use dermflow_tests::{
    chaos::Mode,
    checker::Ledger,
    form::scale,
    lab::{
        Lab,
        Link::{self, IngressBroker, IngressDatabase, WorkerBroker},
        Setup,
    },
};

use super::{SETTLE, jobs};

// Each link in turn, under load, then both at once; then all is well again.
async fn trouble(links: &[Link], mode: Mode) -> Result<()> {
    let lab = Lab::start(Setup { proxies: true, ack_wait: 3, ..Setup::simulated(2) }).await?;
    let ledger = Ledger::default();
    let load = ledger.load(lab.client(), 0, 60);
    let mut groups: Vec<&[Link]> = links.chunks(1).collect();
    if links.len() > 1 {
        groups.push(links);
    }
    let mut tick = tokio::time::interval(scale(Duration::from_secs(2), Duration::from_secs(12)));
    tick.tick().await;
    for group in groups {
        let before: Vec<(u64, u64)> =
            group.iter().map(|link| (lab.link(*link).resets(), lab.link(*link).chunks())).collect();
        let done = ledger.acknowledged();
        for link in group {
            lab.link(*link).set(mode);
        }
        tick.tick().await;
        for (link, (resets, chunks)) in group.iter().zip(before) {
            let proxy = lab.link(*link);
            println!(
                "{link:?} {mode:?}: {} resets, {} chunks, {} accepted",
                proxy.resets() - resets,
                proxy.chunks() - chunks,
                ledger.acknowledged() - done
            );
            let bitten = match mode {
                Mode::Cut | Mode::Reset(_) => proxy.resets() > resets,
                Mode::Delay(_) => proxy.chunks() > chunks,
                // What was being written at that moment may still have left.
                Mode::Blackhole | Mode::Pass => proxy.chunks() <= chunks + 8,
            };
            ensure!(bitten, "{link:?} did not notice {mode:?}: the test shows nothing");
            proxy.set(Mode::Pass);
        }
        tick.tick().await;
    }
    load.end_after(jobs()).await?;
    ledger.check(&lab, &[], SETTLE).await?;
    lab.stop().await
}

const BROKER: [Link; 2] = [IngressBroker, WorkerBroker];

#[tokio::test(flavor = "multi_thread")]
async fn r6_jobs_survive_a_cut_link() -> Result<()> {
    trouble(&BROKER, Mode::Cut).await
}

#[tokio::test(flavor = "multi_thread")]
async fn r6_jobs_survive_a_link_that_swallows_everything() -> Result<()> {
    trouble(&BROKER, Mode::Blackhole).await
}

#[tokio::test(flavor = "multi_thread")]
async fn r6_jobs_survive_a_slow_link() -> Result<()> {
    trouble(&BROKER, Mode::Delay(Duration::from_millis(200))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn r6_jobs_survive_a_link_that_resets_connections() -> Result<()> {
    trouble(&BROKER, Mode::Reset(5)).await
}

// The same on the way to the database.
#[tokio::test(flavor = "multi_thread")]
async fn r6_jobs_survive_trouble_on_the_way_to_the_database() -> Result<()> {
    let modes = [Mode::Cut, Mode::Blackhole, Mode::Delay(Duration::from_millis(200)), Mode::Reset(5)];
    for mode in modes {
        trouble(&[IngressDatabase], mode).await?;
    }
    Ok(())
}
