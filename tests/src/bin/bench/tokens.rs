//! What checking an access token costs, when it is seen for the first time and after that; and whether another client's
//! job takes as long to be missing as one that is not there.

use std::{
    env::temp_dir,
    fs,
    net::{IpAddr, Ipv4Addr},
    time::Instant,
};

use anyhow::{Result, ensure};
use dermflow_auth::{
    keys,
    token::{Grant, Tokens},
};
use dermflow_schemas::clock;
use dermflow_tests::{
    client::{Client, sample},
    lab::{Lab, Setup},
};
use secrecy::ExposeSecret;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::measure::{median, percentile, verdict};

/// Tokens, three quarters of those that are remembered: of as many as fit a few are forgotten.
const TOKENS: usize = 12_000;
/// Requests of each kind.
const TIMED: usize = 1_000;

pub(crate) async fn tokens() -> Result<()> {
    verification()?;
    existence().await
}

fn verification() -> Result<()> {
    let folder = temp_dir().join(format!("dermflow-bench-{}", Uuid::new_v4()));
    keys::add(&folder, OffsetDateTime::UNIX_EPOCH)?;
    let tokens = Tokens::open(&folder, "https://localhost")?;
    fs::remove_dir_all(folder)?;
    let now = clock::now();
    let grant = || Grant {
        client: Uuid::new_v4().into(),
        credential: Uuid::new_v4(),
        scope: "system/DiagnosticReport.crds".into(),
        ends: None,
        after: None,
        bound_to: None,
    };
    let issued = (0..TOKENS).map(|_| tokens.issue(grant(), now)).collect::<Result<Vec<_>, _>>()?;
    let micros = |goal: f64, what: &str| -> Result<()> {
        let mut times = Vec::with_capacity(TOKENS);
        for token in &issued {
            let begun = Instant::now();
            tokens.verify(token.expose_secret(), now)?;
            times.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        println!("{what}: p50 {:.1} us", percentile(&mut times, 50));
        let p99 = percentile(&mut times, 99);
        verdict(&format!("p99 of a token that is {what}, us"), p99, p99 <= goal, &format!("at most {goal}"));
        Ok(())
    };
    micros(200.0, "seen for the first time")?;
    micros(10.0, "known")
}

/// In turn, over one connection.
async fn existence() -> Result<()> {
    let lab = Lab::in_service(Setup::without_workers()).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    let mut stranger = lab.register("stranger").await?;
    let token = stranger.token().to_owned();
    let (mut theirs, mut nobodys) = (Vec::new(), Vec::new());
    // What is beyond five a second of one address waits for others in the audit trail: each address asks four times.
    let mut source = u32::from(Ipv4Addr::new(127, 1, 0, 0));
    for n in 0..TIMED {
        if n % 2 == 0 {
            source += 1;
            stranger = Client::from_source(&lab.ca(), &lab.url(0), IpAddr::from(Ipv4Addr::from(source)))?
                .with_token(&token);
            ensure!(stranger.get("/.well-known/jwks.json").await?.status == 200, "no connection");
        }
        for (times, id) in [(&mut theirs, job.clone()), (&mut nobodys, Uuid::now_v7().to_string())] {
            let begun = Instant::now();
            let answer = stranger.get(&format!("/jobs/{id}")).await?;
            ensure!(answer.status == 404, "{} {}", answer.status, answer.text);
            times.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    }
    let (theirs, nobodys) = (median(&mut theirs), median(&mut nobodys));
    println!("404: {theirs:.3} ms for another client's job, {nobodys:.3} ms for none (medians of {TIMED})");
    let difference = (theirs / nobodys - 1.0).abs() * 100.0;
    verdict("difference, %", difference, difference <= 5.0, "at most 5");
    lab.stop().await
}
