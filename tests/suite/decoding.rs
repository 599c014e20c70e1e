//! A decoder in a process of its own: what happens to it costs the image that it had in hand, and nothing else.

use std::{collections::BTreeSet, fs, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::limits::{DECODER_ADDRESS_SPACE, DECODER_ATTEMPTS};
use dermflow_tests::{
    client::{parameters, sample},
    lab::{Lab, Setup, Worker},
    wait::eventually,
};

use crate::images::memory_bomb;

const WITHIN: Duration = Duration::from_mins(1);

fn lab(executors: &str) -> Setup {
    let worker = Worker::simulated(1).arg("--executors", executors);
    Setup { workers: vec![worker], ..Setup::default() }
}

fn worker(lab: &Lab) -> Result<u32> {
    let pids = lab.pids();
    Ok(pids.iter().find(|(name, _)| name == "worker-1").context("no worker")?.1)
}

/// The decoders of a worker: the processes that it has started.
fn decoders(worker: u32) -> Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
        // Behind the name, which may hold anything: state, parent.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        if fields.next() != Some("Z") && fields.next() == Some(&worker.to_string()) {
            found.insert(pid);
        }
    }
    Ok(found)
}

fn signal(pid: u32, signal: &str) -> Result<()> {
    let sent = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status()?;
    ensure!(sent.success(), "kill -{signal} {pid}");
    Ok(())
}

// Killed while it has an image in hand, in whatever way: the image is decoded by the next one, at the same attempt. The
// job beside it, and the worker, notice nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_decoder_that_is_killed_is_replaced_and_the_job_goes_on() -> Result<()> {
    let lab = Lab::start(lab("2")).await?;
    let worker = worker(&lab)?;
    for how in ["KILL", "SEGV", "ABRT"] {
        let before = decoders(worker)?;
        ensure!(before.len() == 2, "a decoder an executor: {before:?}");
        let victim = *before.first().context("no decoder")?;
        // It stands still with a job in hand, whichever of the two that is.
        signal(victim, "STOP")?;
        let jobs = [
            lab.client().submit(&sample("isic2017-nv.jpg")).await?,
            lab.client().submit(&sample("ham10000-nv.jpg")).await?,
        ];
        let states = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";
        let one_is_left = async || (lab.count(states).await.ok()? == 1).then_some(());
        eventually("the other job ends", WITHIN, one_is_left).await?;
        signal(victim, how)?;
        signal(victim, "CONT").or_else(|error| if how == "KILL" { Ok(()) } else { Err(error) })?;
        for job in &jobs {
            let answer = lab.client().poll(job, WITHIN).await?;
            ensure!(answer.status == 200, "{how}: {}", answer.text);
        }
        let after = decoders(worker)?;
        assert!(after.len() == 2 && !after.contains(&victim), "{how}: {before:?} {after:?}");
    }
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs WHERE attempts <> 1").await?, 0);
    assert_eq!(self::worker(&lab)?, worker);
    lab.stop().await
}

// One that hangs, as in a frozen container, is ended after its deadline, a third of the job's; its job is tried again, and
// the other executor works on meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_decoder_that_hangs_costs_an_attempt() -> Result<()> {
    let mut setup = lab("2");
    setup.workers = setup.workers.into_iter().map(|worker| worker.timeout(9)).collect();
    let lab = Lab::start(setup).await?;
    let worker = worker(&lab)?;
    let victim = *decoders(worker)?.first().context("no decoder")?;
    signal(victim, "STOP")?;
    let mut jobs = Vec::new();
    for _ in 0..4 {
        jobs.push(lab.client().submit(&sample("isic2017-nv.jpg")).await?);
    }
    for job in &jobs {
        let answer = lab.client().poll(job, WITHIN).await?;
        ensure!(answer.status == 200, "{}", answer.text);
    }
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs WHERE attempts = 1").await?, 3);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs WHERE attempts = 2").await?, 1);
    assert!(!decoders(worker)?.contains(&victim));
    assert_eq!(lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?.status, 200);
    assert_eq!(self::worker(&lab)?, worker);
    lab.stop().await
}

// An image that takes more memory than a decoder has is refused, each time, once its second attempt has failed as well; the
// worker stays, and so do those beside it.
#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_takes_too_much_memory_is_refused() -> Result<()> {
    let lab = Lab::start(lab("1")).await?;
    let worker = worker(&lab)?;
    let before = decoders(worker)?;
    for _ in 0..2 {
        let answer = lab.client().analyze(&parameters(&[memory_bomb()]), &[]).await?;
        assert_eq!((answer.status, answer.code()), (422, "image-undecodable"), "{}", answer.text);
        assert_eq!(lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?.status, 200);
    }
    let refused = format!("SELECT count(*) FROM ingress.jobs WHERE attempts = {DECODER_ATTEMPTS}");
    assert_eq!(lab.count(&refused).await?, 2);
    assert!(decoders(worker)?.is_disjoint(&before), "they died of it");
    let logs = lab.logs()?;
    assert!(logs.contains("a decoder has died") && logs.contains("SIGABRT"), "{logs}");
    assert_eq!(self::worker(&lab)?, worker);
    assert_eq!(lab.messages("DEAD").await?, 0);
    lab.stop().await
}

// It may open no file and no connection, has so much memory and no more, and ends with its worker.
#[tokio::test(flavor = "multi_thread")]
async fn a_decoder_has_limits_and_ends_with_its_worker() -> Result<()> {
    let mut lab = Lab::start(lab("1")).await?;
    let decoder = *decoders(worker(&lab)?)?.first().context("no decoder")?;
    let limits = fs::read_to_string(format!("/proc/{decoder}/limits"))?;
    let limit =
        |name: &str| limits.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
    assert_eq!(limit("Max open files"), Some("0"));
    let status = fs::read_to_string(format!("/proc/{decoder}/status"))?;
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
    let environment = fs::read_to_string(format!("/proc/{decoder}/environ"))?;
    let names = environment.split_terminator('\0').filter_map(|pair| Some(pair.split_once('=')?.0));
    assert!(names.clone().all(|name| ["RUST_LOG", "LD_LIBRARY_PATH"].contains(&name)), "{names:?}");
    assert_eq!(limit("Max address space"), Some(&*DECODER_ADDRESS_SPACE.to_string()));
    // A service manager sends it to every process of a service.
    signal(decoder, "TERM")?;
    assert_eq!(lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?.status, 200);
    assert_eq!(decoders(worker(&lab)?)?.into_iter().collect::<Vec<_>>(), [decoder]);
    lab.kill_worker(0).await?;
    let gone = async || (!fs::exists(format!("/proc/{decoder}")).ok()?).then_some(());
    eventually("the decoder ends with its worker", WITHIN, gone).await?;
    lab.stop().await
}
