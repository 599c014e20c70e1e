//! The keys that sign access tokens: how they change, and what that ends.

use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use dermflow_tests::{
    client::Answer,
    lab::{Lab, Setup},
    wait::eventually,
};
use tokio::{process::Command, sync::Mutex};

use crate::identity::{secret, token, with};

/// Moves a key so that it signs from another moment on, in the words of `date -d`.
async fn begin(key: &str, when: &str) -> Result<()> {
    let name = Command::new("date").args(["-u", "-d", when, "+%Y%m%dT%H%M%SZ.pem"]).output().await?;
    let name = String::from_utf8(name.stdout)?;
    let key = Path::new(key.trim());
    Ok(fs::rename(key, key.with_file_name(name.trim()))?)
}

// Keys change under load: the new one is published before it signs, the old one believed while its tokens live.
#[tokio::test(flavor = "multi_thread")]
async fn signing_keys_rotate_without_a_false_refusal() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let demo = lab.client().clone();
    lab.auth(&["user", "quota", "demo", "--requests", "1000000"])?;
    let credential = secret(&lab, "demo")?;
    let folder = lab.signing_keys();
    let added = lab.auth(&["signing-key", "add", &folder.to_string_lossy()])?;
    // Ten minutes are brought forward to ten seconds: still more than a replica takes to look.
    begin(&added, "+10 seconds").await?;
    let kid = |answer: &Answer| {
        answer.body["access_token"].as_str().and_then(|token| token.split('.').next()).map(str::to_owned)
    };
    let first = token(&demo, &credential, "").await?;
    let before = kid(&first);
    let published = async || {
        let here = demo.get("/.well-known/jwks.json").await.ok()?;
        (here.body["keys"].as_array()?.len() == 2).then_some(here)
    };
    let keys = eventually("both keys are published", Duration::from_secs(8), published).await?;
    assert_eq!(keys.header("cache-control"), "public, max-age=300");
    let held = Mutex::new(vec![first]);
    let stop = AtomicBool::new(false);
    // Every token, at the replica that did not issue it too.
    let caller = async |_| {
        let mut requests = 0;
        while !stop.load(Ordering::Relaxed) {
            let tokens = held.lock().await.clone();
            for token in &tokens {
                for replica in 0..2 {
                    let answer = with(&demo, token).at(&lab.url(replica)).get("/jobs").await?;
                    ensure!(answer.status == 200, "after {requests} requests: {}", answer.text);
                    requests += 1;
                }
            }
        }
        Ok(requests)
    };
    let rotated = async || {
        let new = token(&demo, &credential, "").await.ok()?;
        let changed = kid(&new) != before;
        let mut held = held.lock().await;
        held.truncate(8);
        held.push(new);
        changed.then_some(())
    };
    let rotation = async {
        eventually("the new key signs", Duration::from_secs(20), rotated).await?;
        // What it signed is taken, too, and what the old one signed.
        let (old, new) = (&held.lock().await[0].clone(), token(&demo, &credential, "").await?);
        for token in [old, &new] {
            for replica in 0..2 {
                ensure!(with(&demo, token).at(&lab.url(replica)).get("/jobs").await?.status == 200);
            }
        }
        stop.store(true, Ordering::Relaxed);
        Ok(0)
    };
    let callers = futures_util::future::try_join_all((0..8).map(caller));
    let (requests, _): (Vec<usize>, usize) = tokio::try_join!(callers, rotation)?;
    println!(
        "{} requests of {} callers at once, none refused",
        requests.iter().sum::<usize>(),
        requests.len()
    );
    lab.stop().await
}

// A key that is taken out of the folder is believed no more, on any replica, within a minute; what its successor signs is.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_taken_away_is_refused_within_a_minute() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let (demo, folder) = (lab.client(), lab.signing_keys());
    let credential = secret(&lab, "demo")?;
    let stolen: Vec<_> = fs::read_dir(&folder)?.map(|file| Ok(file?.path())).collect::<Result<_>>()?;
    begin(&lab.auth(&["signing-key", "add", &folder.to_string_lossy()])?, "-1 second").await?;
    for replica in 0..2 {
        assert_eq!(demo.clone().at(&lab.url(replica)).get("/jobs").await?.status, 200);
    }
    let begun = Instant::now();
    stolen.iter().try_for_each(fs::remove_file)?;
    for replica in 0..2 {
        let old = demo.clone().at(&lab.url(replica));
        let refused = async || (old.get("/jobs").await.ok()?.status == 401).then_some(());
        eventually("what the key has signed is refused", Duration::from_mins(1), refused).await?;
        let new = token(&old, &credential, "").await?;
        ensure!(new.status == 200, "{}", new.text);
        for other in 0..2 {
            let taken = async || {
                let answer = with(demo, &new).at(&lab.url(other)).get("/jobs").await.ok()?;
                (answer.status == 200).then_some(())
            };
            eventually("what its successor signs is taken", Duration::from_secs(10), taken).await?;
        }
    }
    println!("refused on both replicas after {:?}", begun.elapsed());
    lab.stop().await
}
