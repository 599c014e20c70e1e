//! What a durable publication costs: single, several at once, in atomic batches; and what the API makes of it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::{
    clock,
    id::{ClientId, JobId},
    job::Lane,
    limits,
    queue::{JOBS, Message, Publisher},
};
use dermflow_tests::{
    client::{parameters, sample_bytes},
    lab::{Lab, Setup},
};
use futures_util::{StreamExt, stream};

use crate::{
    measure::{maximum, median, minimum, submit_all},
    upload::upload,
};

/// Rounds of all ways, in turn.
const ROUNDS: usize = 5;
/// One block.
const BLOCK: Duration = Duration::from_secs(1);
/// Bytes of a message.
const BYTES: usize = 30_000;
/// Jobs of a block through the API.
const ACCEPTS: usize = 400;
/// Connections of who posts one by one.
const CONNECTIONS: usize = 16;
/// For one publication: it is the broker's rate that is asked for, not the deadline's effect.
const PATIENCE: Duration = Duration::from_secs(10);

/// How messages go to the broker: so many at once, each so many together.
#[derive(Debug, Clone, Copy)]
struct Way {
    at_once: usize,
    together: usize,
}

const fn single(at_once: usize) -> Way {
    Way { at_once, together: 1 }
}

const fn batches(together: usize) -> Way {
    Way { at_once: 1, together }
}

const WAYS: [Way; 8] =
    [single(1), single(16), single(64), batches(4), batches(16), batches(32), batches(64), batches(200)];

impl Way {
    fn name(self) -> String {
        let Self { at_once, together } = self;
        match together {
            1 => format!("single, {at_once} in flight"),
            n if n < limits::ATOMIC_FROM => format!("{n} together, too few for an atomic batch"),
            n => format!("atomic batches of {n}"),
        }
    }
}

/// Publications into the stream of jobs, then accepted jobs, all with `sync_interval: always`.
pub(crate) async fn publish() -> Result<()> {
    let lab = Lab::in_service(Setup::without_workers()).await?;
    let publisher = Publisher::new(lab.jetstream().await?);
    let mut rates = WAYS.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (way, rates) in WAYS.into_iter().zip(&mut rates) {
            rates.push(published(&publisher, way).await?);
            // Else the disk would fill up.
            publisher.context().get_stream(JOBS).await?.purge().await?;
        }
    }
    let [alone, ..] = &mut rates;
    let base = median(alone);
    for (way, rates) in WAYS.into_iter().zip(&mut rates) {
        report(&format!("publications a second, {}", way.name()), rates, base);
    }
    lab.stop().await?;
    accepts().await
}

fn report(what: &str, rates: &mut [f64], base: f64) {
    let middle = median(rates);
    println!(
        "{what}: median {middle:.0} ({:.0} to {:.0}), {:.2} times the first",
        minimum(rates),
        maximum(rates),
        middle / base
    );
}

/// Messages a second, acknowledged, for [`BLOCK`].
async fn published(publisher: &Publisher, way: Way) -> Result<f64> {
    let client: ClientId = "7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37".parse()?;
    let job = || JobId::new(clock::now());
    let first = Message::job(Lane::Bulk, client, job(), 1, None, vec![7; BYTES].into());
    let message = || Message { id: Some(format!("{}:1", job())), ..first.clone() };
    let begun = Instant::now();
    let call = |_| {
        let messages: Vec<Message> = (0..way.together).map(|_| message()).collect();
        publisher.publish_all(messages, PATIENCE)
    };
    let going = stream::iter(0..).take_while(|_| std::future::ready(begun.elapsed() < BLOCK));
    let outcomes: Vec<_> = going.map(call).buffer_unordered(way.at_once).collect().await;
    let seconds = begun.elapsed().as_secs_f64();
    let mut count = 0;
    for outcome in outcomes.into_iter().flatten() {
        outcome?;
        count += 1;
    }
    Ok(f64::from(count) / seconds)
}

/// One by one on [`CONNECTIONS`] connections, against the lines of one upload.
async fn accepts() -> Result<()> {
    let lab = Lab::in_service(Setup::without_workers()).await?;
    let image = sample_bytes("ham10000-nv.jpg");
    let bodies = Arc::new(vec![parameters(std::slice::from_ref(&image)).to_string()]);
    let (mut single, mut lines) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        submit_all(lab.client().clone(), bodies.clone(), ACCEPTS, CONNECTIONS).await?;
        single.push(ACCEPTS as f64 / begun.elapsed().as_secs_f64());
        let begun = Instant::now();
        upload(lab.client(), &image, ACCEPTS).await?;
        lines.push(ACCEPTS as f64 / begun.elapsed().as_secs_f64());
    }
    let base = median(&mut single);
    report(&format!("accepts a second, {CONNECTIONS} connections"), &mut single, base);
    report("accepts a second, lines of one upload", &mut lines, base);
    let held = lab.messages(JOBS).await?;
    ensure!(held == (2 * ROUNDS * ACCEPTS) as u64, "the stream holds {held}");
    let group =
        lab.metric("dermflow_group_jobs_sum").await.zip(lab.metric("dermflow_group_jobs_count").await);
    let (jobs, groups) = group.context("no metric of groups")?;
    println!("jobs committed together: {:.1} on average", jobs / groups);
    lab.stop().await
}
