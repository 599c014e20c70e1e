//! E, soak: steady load near what the workers can do, and whether anything grows.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dermflow_tests::{
    client::sample,
    lab::{Lab, Setup, Worker},
};

use crate::measure::{
    Sent, all_answered, descriptors, maximum, minimum, open_loop, percentile, rss_mb, verdict,
};

/// Workers, each with a model of [`MODEL_MS`].
const WORKERS: usize = 4;
const MODEL_MS: u64 = 100;
/// Of what the workers could do.
const LOAD: f64 = 0.9;
/// Before the first sample: pools fill, tables grow to their size.
const WARM_UP: Duration = Duration::from_secs(10);
/// The long form. Its second half, of which the growth is taken, begins after the ten minutes for which the broker keeps ids
/// of messages: from then on it forgets as many as come.
const LONG: Duration = Duration::from_mins(25);
const SHORT: Duration = Duration::from_mins(1);
/// Growth that counts as none, in MB a minute: what the allocator and the broker's caches breathe.
const FLAT: f64 = 1.0;

/// What a process held at a moment.
struct Sample {
    seconds: f64,
    rss: f64,
    descriptors: f64,
}

/// At 90 % of the capacity.
pub(crate) async fn soak(long: bool) -> Result<()> {
    let time = if long { LONG } else { SHORT };
    let workers = vec![Worker::simulated(MODEL_MS); WORKERS];
    let lab = Lab::in_service(Setup { workers, ..Setup::default() }).await?;
    let body = sample("ham10000-nv.jpg").to_string();
    let rate = LOAD * WORKERS as f64 * 1e3 / MODEL_MS as f64;
    open_loop(lab.client(), &body, rate, WARM_UP).await?;
    let watched: Vec<(String, u32)> =
        lab.pids().into_iter().filter(|(name, _)| !name.contains("postgres")).collect();
    let load = tokio::spawn({
        let (client, body) = (lab.client().clone(), body.clone());
        async move { open_loop(&client, &body, rate, time).await }
    });
    let mut samples: Vec<Vec<Sample>> = watched.iter().map(|_| Vec::new()).collect();
    let (begun, mut tick) = (Instant::now(), tokio::time::interval(Duration::from_secs(1)));
    while !load.is_finished() {
        tick.tick().await;
        for ((_, pid), samples) in watched.iter().zip(&mut samples) {
            let seconds = begun.elapsed().as_secs_f64();
            samples.push(Sample { seconds, rss: rss_mb(*pid)?, descriptors: descriptors(*pid)? as f64 });
        }
    }
    let sent = load.await??;
    println!("{} requests at {rate:.0} a second for {} s", sent.len(), time.as_secs());
    for ((name, _), samples) in watched.iter().zip(&samples) {
        growth(name, samples)?;
    }
    answers(&sent, time);
    lab.stop().await
}

/// Growth over the second half: in the first, caches still fill.
fn growth(name: &str, samples: &[Sample]) -> Result<()> {
    let (first, last) = samples.first().zip(samples.last()).context("no samples")?;
    let slope = slope(&samples[samples.len() / 2..]) * 60.0;
    println!(
        "{name}: RSS {:.1} to {:.1} MB, descriptors {} to {}",
        first.rss, last.rss, first.descriptors, last.descriptors
    );
    verdict(&format!("{name}: RSS slope, MB a minute"), slope, slope <= FLAT, &format!("at most {FLAT}"));
    // A connection that a pool opens or closes at this moment is no leak.
    let descriptors = |half: &[Sample]| half.iter().map(|sample| sample.descriptors).collect::<Vec<_>>();
    let (before, after) = samples.split_at(samples.len() / 2);
    let more = minimum(&descriptors(after)) - maximum(&descriptors(before));
    verdict(&format!("{name}: descriptors beyond those of the first half"), more, more <= 0.0, "none");
    Ok(())
}

/// Least squares, in MB a second.
fn slope(samples: &[Sample]) -> f64 {
    let mean = |value: fn(&Sample) -> f64| samples.iter().map(value).sum::<f64>() / samples.len() as f64;
    let (time, rss) = (mean(|sample| sample.seconds), mean(|sample| sample.rss));
    let both: f64 = samples.iter().map(|sample| (sample.seconds - time) * (sample.rss - rss)).sum();
    let square: f64 = samples.iter().map(|sample| (sample.seconds - time).powi(2)).sum();
    if square > 0.0 { both / square } else { 0.0 }
}

fn answers(sent: &[Sent], time: Duration) {
    all_answered(sent);
    let window = (time.as_secs_f64() / 4.0).min(60.0);
    let p99 = |from: f64| {
        let within = sent.iter().filter(|sent| (from..from + window).contains(&sent.due));
        percentile(&mut within.map(|sent| sent.millis).collect::<Vec<_>>(), 99)
    };
    let (first, last) = (p99(0.0), p99(time.as_secs_f64() - window));
    println!("p99 of the first {window:.0} s {first:.0} ms, of the last {last:.0} ms");
    verdict("p99 of the last, in times of the first", last / first, last <= 1.1 * first, "at most 1.1");
}
