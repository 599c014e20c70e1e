//! What attackers cost others: the p99 of honest requests beside each attack, in times of that in quiet blocks between.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::limits::MAX_BODY_BYTES;
use dermflow_tests::{
    client::sample,
    flood,
    lab::{Lab, Setup},
};
use tokio::{
    io::{AsyncWriteExt, copy, sink, split},
    time::sleep,
};
use tokio_rustls::TlsConnector;

use crate::{
    degradation::{Arrived, Siege, analyze_head, handshake, slow, stalled},
    measure::{Sent, maximum, median, minimum, open_loop, percentile, verdict},
};

/// Pairs of blocks of each attack.
const BLOCKS: usize = 5;
const BLOCK: Duration = Duration::from_secs(10);
/// Honest requests a second, of which each takes the simulated model 20 ms.
const PER_SECOND: f64 = 20.0;
/// Handshakes that stop, and headers that come byte by byte.
const STALLED: usize = 500;
/// Bodies of which 1 kB arrives a second.
const BODIES: usize = 100;
/// Connections of an attack on HTTP/2.
const FLOODS: usize = 16;

#[derive(Debug, Clone, Copy)]
enum Attack {
    Handshakes,
    Headers,
    Bodies,
    RapidReset,
    Continuation,
}

const ATTACKS: [(Attack, &str); 5] = [
    (Attack::Handshakes, "500 handshakes that stop"),
    (Attack::Headers, "500 headers, byte by byte"),
    (Attack::Bodies, "100 bodies at 1 kB/s"),
    (Attack::RapidReset, "HTTP/2 streams that are reset at once (CVE-2023-44487)"),
    (Attack::Continuation, "HTTP/2 headers without end (CONTINUATION)"),
];

pub(crate) async fn hostile() -> Result<()> {
    let lab = Arc::new(Lab::in_service(Setup::simulated(20)).await?);
    let body = sample("ham10000-nv.jpg").to_string();
    let honest = async || p99(&open_loop(lab.client(), &body, PER_SECOND, BLOCK).await?);
    honest().await?;
    for (attack, name) in ATTACKS {
        let (mut ratios, mut quiet, mut beside) = (Vec::new(), Vec::new(), Vec::new());
        for n in 1..=BLOCKS {
            let without = honest().await?;
            let siege = begin(&lab, attack).await?;
            let with = honest().await?;
            let times = siege.times();
            siege.end().await;
            println!(
                "{name}, block {n}: p99 {without:.1} ms without, {with:.1} ms with ({times} connections)"
            );
            ratios.push(with / without);
            quiet.push(without);
            beside.push(with);
        }
        println!("{name}: medians {:.1} and {:.1} ms", median(&mut quiet), median(&mut beside));
        println!("{name}: ratios {:.2} to {:.2}", minimum(&ratios), maximum(&ratios));
        let ratio = median(&mut ratios);
        verdict(&format!("p99 beside {name}, in times of without"), ratio, ratio <= 1.2, "at most 1.2");
    }
    Arc::into_inner(lab).context("the system is still in use")?.stop().await
}

fn p99(sent: &[Sent]) -> Result<f64> {
    ensure!(sent.iter().all(|sent| sent.status == 200), "an honest request was refused");
    Ok(percentile(&mut sent.iter().map(|sent| sent.millis).collect::<Vec<_>>(), 99))
}

async fn begin(lab: &Lab, attack: Attack) -> Result<Siege> {
    let count = match attack {
        Attack::Handshakes | Attack::Headers => STALLED,
        Attack::Bodies => BODIES,
        Attack::RapidReset | Attack::Continuation => FLOODS,
    };
    let [http1, http2] = [b"http/1.1", &b"h2"[..]].map(|protocol| {
        let mut config = lab.tls(rustls::ALL_VERSIONS)?;
        config.alpn_protocols = vec![protocol.to_vec()];
        anyhow::Ok(TlsConnector::from(Arc::new(config)))
    });
    let (http1, http2, address) = (http1?, http2?, lab.address(0));
    let head = analyze_head(lab, MAX_BODY_BYTES);
    Siege::of(count, move |_, arrived| {
        let (http1, http2, head) = (http1.clone(), http2.clone(), head.clone());
        async move {
            match attack {
                Attack::Handshakes => stalled(address, &arrived).await,
                Attack::Headers => drip(address, &http1, &head, &arrived).await,
                Attack::Bodies => slow(address, &http1, &head, &arrived).await,
                Attack::RapidReset => flood_with(address, &http2, &arrived, flood::reset).await,
                Attack::Continuation => flood_with(address, &http2, &arrived, flood::endless).await,
            }
        }
    })
    .await
}

/// A header that arrives byte by byte, one in half a second.
async fn drip(address: SocketAddr, tls: &TlsConnector, head: &str, arrived: &Arrived) -> Result<()> {
    let mut stream = handshake(address, tls).await?;
    arrived.note();
    for byte in head.bytes() {
        stream.write_all(&[byte]).await?;
        stream.flush().await?;
        sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

/// Bursts of frames, one after the other, until the server has had enough; what it says is read and thrown away.
async fn flood_with(
    address: SocketAddr,
    tls: &TlsConnector,
    arrived: &Arrived,
    burst: impl Fn(u32) -> Vec<u8> + Send,
) -> Result<()> {
    let (mut answers, mut stream) = split(handshake(address, tls).await?);
    stream.write_all(&flood::preface()).await?;
    arrived.note();
    let write = async {
        for n in 0.. {
            stream.write_all(&burst(n)).await?;
            stream.flush().await?;
        }
        anyhow::Ok(())
    };
    let mut nowhere = sink();
    tokio::select! {
        read = copy(&mut answers, &mut nowhere) => read.map(drop).context("read"),
        written = write => written,
    }
}
