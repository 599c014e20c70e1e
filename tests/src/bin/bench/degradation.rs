//! E: what goes wrong, case by case, each on a system of its own.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dermflow_schemas::{
    clock,
    limits::{MAX_ATTEMPTS, MAX_BODY_BYTES},
    queue::JOBS,
};
use dermflow_tests::{
    checker::Ledger,
    client::{parameters, sample, sample_bytes},
    lab::{Lab, Setup, Worker},
    wait::eventually,
};
use futures_util::{TryStreamExt, future::join_all};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    measure::{
        Offered, Sent, all_answered, check, jobs_of, maximum, median, millis_of, minimum, offer, offer_all,
        open_loop, peak_rss_mb, percentile, submit_all, until_ended, verdict,
    },
    soak::soak,
};

/// The cases.
const ROWS: [&str; 8] =
    ["poison", "abort", "slow-worker", "no-workers", "slow-clients", "hang-up", "paused-broker", "soak"];
/// A good image, and one that a model is told to fail with.
const GOOD: &str = "isic2017-nv.jpg";
const BAD: &str = "isic2017-mel.jpg";
/// For everything to be worked off.
const DRAINED: Duration = Duration::from_mins(5);

/// Every row; one that cannot be finished does not keep the others back.
pub(crate) async fn all(long: bool) -> Result<()> {
    let mut failed = Vec::new();
    for row in ROWS {
        if let Err(error) = Box::pin(one(row, long)).await {
            println!("{row}: FAILED: {error:#}");
            failed.push(row);
        }
    }
    ensure!(failed.is_empty(), "not finished: {failed:?}");
    Ok(())
}

/// One row.
pub(crate) async fn one(row: &str, long: bool) -> Result<()> {
    println!("-- {row}");
    let begun = Instant::now();
    match row {
        "poison" => poison(long).await,
        "abort" => abort(long).await,
        "slow-worker" => slow_worker(long).await,
        "no-workers" => no_workers(long).await,
        "slow-clients" => slow_clients(long).await,
        "hang-up" => hang_up(long).await,
        "paused-broker" => paused_broker(Duration::from_secs(if long { 30 } else { 10 })).await,
        "soak" => soak(long).await,
        _ => bail!("no such row: {row}; there are {ROWS:?}"),
    }?;
    println!("-- {row}: {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

fn request(file: &[u8]) -> String {
    parameters(&[file.to_vec()]).to_string()
}

fn good() -> Arc<Vec<String>> {
    Arc::new(vec![sample(GOOD).to_string()])
}

/// A JPEG cut in the middle, a PNG that promises 30,000 × 30,000 pixels, a JPEG as the content of a PNG, and an image
/// with which the model answers NaN.
fn poisons() -> [Vec<u8>; 4] {
    let (jpeg, png) = (sample_bytes(GOOD), sample_bytes("isic2017-nv.png"));
    let mut bomb = png.clone();
    bomb[16..20].copy_from_slice(&30_000_u32.to_be_bytes());
    bomb[20..24].copy_from_slice(&30_000_u32.to_be_bytes());
    // The checksum of the changed header, so that only the size is wrong.
    bomb[29..33].copy_from_slice(&0xe945_6fed_u32.to_be_bytes());
    // Signature and IHDR, which are right, and a chunk that is not what it says.
    let polyglot = [&png[..33], &(jpeg.len() as u32).to_be_bytes(), b"IDAT", &jpeg].concat();
    [jpeg[..jpeg.len() / 2].to_vec(), bomb, polyglot, sample_bytes(BAD)]
}

async fn poison(long: bool) -> Result<()> {
    const BLOCK: usize = 400;
    let pairs = if long { 10 } else { 3 };
    let workers = vec![Worker::simulated(50).fault("nan").on(&sample_bytes(BAD)); 4];
    let lab = Lab::in_service(Setup { workers, ..Setup::default() }).await?;
    let pids = lab.pids();
    let mut mixed = vec![sample(GOOD).to_string(); BLOCK];
    for (n, file) in poisons().iter().enumerate() {
        mixed[n * BLOCK / 4 + BLOCK / 8] = request(file);
    }
    let mixed = Arc::new(mixed);
    block(&lab, good(), BLOCK).await?;
    let (mut ratios, mut offered) = (Vec::new(), Vec::new());
    for _ in 0..pairs {
        let (clean, accepted) = block(&lab, good(), BLOCK).await?;
        offered.extend(accepted);
        let (poisoned, more) = block(&lab, mixed.clone(), BLOCK).await?;
        offered.extend(more);
        println!("good jobs a second: {clean:.1} without, {poisoned:.1} with 1 % poison");
        ratios.push(poisoned / clean);
    }
    let ratio = median(&mut ratios);
    verdict("good jobs, in times of the clean rate", ratio, ratio >= 0.97, "at least 0.97");
    let mut refused: Vec<_> = offered.iter().filter(|offered| !offered.is_accepted()).collect();
    refused.sort_by_key(|refused| &refused.code);
    for same in refused.chunk_by(|a, b| a.code == b.code) {
        println!("{} were refused with {} {}", same.len(), same[0].status, same[0].code);
    }
    let for_good = refused.iter().filter(|refused| refused.status == 422).count();
    verdict("refused otherwise", (refused.len() - for_good) as f64, refused.len() == for_good, "0");
    let failed = "SELECT failure->>'code', attempts::bigint, count(*) FROM ingress.jobs WHERE state = 'failed' \
                  GROUP BY 1, 2";
    let (mut once, mut again) = (0, 0);
    for row in lab.sql(failed).await? {
        let (code, attempts, count): (String, i64, i64) = (row.get(0), row.get(1), row.get(2));
        println!("{count} failed with {code} in attempt {attempts}");
        *if attempts == 1 { &mut once } else { &mut again } += count;
    }
    let once = once + for_good as i64;
    verdict(
        "poison refused, or failed in its only attempt",
        once as f64,
        once == 4 * i64::from(pairs),
        "all of it",
    );
    verdict("failed in a later attempt", again as f64, again == 0, "0");
    let failed = lab.sql("SELECT id::text FROM ingress.jobs WHERE state = 'failed'").await?;
    let failed: Vec<String> = failed.iter().map(|row| row.get(0)).collect();
    let good: Vec<String> = jobs_of(&offered).into_iter().filter(|job| !failed.contains(job)).collect();
    check(&lab, &good).await?;
    for (name, pid) in pids.iter().filter(|(name, _)| name.starts_with("worker")) {
        let rss = peak_rss_mb(*pid)? as f64;
        verdict(&format!("{name}: peak RSS, MB"), rss, rss <= 256.0, "at most 256");
    }
    let restarts = pids.iter().filter(|pid| !lab.pids().contains(pid)).count();
    verdict("restarts", restarts as f64, restarts == 0, "0");
    lab.stop().await
}

/// Submits a block and waits for its end: the good jobs a second, and what was submitted.
async fn block(lab: &Lab, bodies: Arc<Vec<String>>, jobs: usize) -> Result<(f64, Vec<Offered>)> {
    let from = clock::now();
    let offered = offer_all(lab.client().clone(), bodies, jobs, 16).await?;
    until_ended(lab, DRAINED).await?;
    let rate = format!(
        "SELECT (count(*) FILTER (WHERE state = 'succeeded') \
         / extract(epoch FROM max(finished_at) - min(accepted_at)))::float8 \
         FROM ingress.jobs WHERE accepted_at >= '{from}'"
    );
    Ok((lab.sql(&rate).await?.first().context("no row")?.get(0), offered))
}

async fn abort(long: bool) -> Result<()> {
    const ACK_WAIT: u64 = 2;
    let jobs = if long { 2_000 } else { 400 };
    let workers = vec![Worker::simulated(20).fault("abort").on(&sample_bytes(BAD)); 2];
    let mut lab = Lab::in_service(Setup { workers, ack_wait: ACK_WAIT, ..Setup::default() }).await?;
    let submitting = tokio::spawn(submit_all(lab.client().clone(), good(), jobs, 16));
    let fatal = offer(lab.client(), request(&sample_bytes(BAD))).await?;
    ensure!(fatal.is_accepted(), "{} {}", fatal.status, fatal.code);
    let (begun, mut restarts) = (Instant::now(), Vec::new());
    let open = "SELECT count(*) FROM ingress.jobs WHERE finished_at IS NULL";
    while !submitting.is_finished() || lab.count(open).await? > 0 {
        ensure!(begun.elapsed() < DRAINED, "not worked off within {DRAINED:?}");
        for n in 0..2 {
            if !lab.worker_is_alive(n) {
                // As its supervisor does, at once.
                let dead = Instant::now();
                lab.restart_worker(n).await?;
                restarts.push(dead.elapsed().as_secs_f64());
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let end = format!(
        "SELECT failure->>'code', attempts::bigint FROM ingress.jobs WHERE id = '{}' AND state = 'failed'",
        fatal.job
    );
    let rows = lab.sql(&end).await?;
    let (code, attempts): (String, i64) =
        rows.first().map(|row| (row.get(0), row.get(1))).context("the job did not fail")?;
    println!("the job ended as {code} in attempt {attempts}, {:.1} s", begun.elapsed().as_secs_f64());
    let dead = lab.messages("DEAD").await?;
    verdict("dead letters", dead as f64, dead == 1 && code == "attempts-exhausted", "1, attempts-exhausted");
    let most = i64::from(MAX_ATTEMPTS);
    verdict("attempts", attempts as f64, attempts == most, &most.to_string());
    let others = format!("SELECT count(*) FROM ingress.jobs WHERE attempts > 1 AND id <> '{}'", fatal.job);
    println!("{} other jobs were with a worker that aborted, and done again", lab.count(&others).await?);
    let slowest = maximum(&restarts);
    println!("{} restarts", restarts.len());
    verdict("slowest restart, s", slowest, slowest <= 2.0, "at most 2");
    check(&lab, &jobs_of(&submitting.await??)).await?;
    lab.stop().await
}

async fn slow_worker(long: bool) -> Result<()> {
    const MODEL_MS: u64 = 50;
    const PER_SECOND: f64 = 20.0;
    let time = Duration::from_secs(if long { 60 } else { 8 });
    let body = sample(GOOD).to_string();
    let workers = vec![Worker::simulated(MODEL_MS); 3];
    let mut lab = Lab::in_service(Setup { workers, ..Setup::default() }).await?;
    open_loop(lab.client(), &body, PER_SECOND, Duration::from_secs(2)).await?;
    let p95 = |sent: &[Sent]| {
        let others = sent.iter().filter(|sent| sent.model < (5 * MODEL_MS) as f64);
        percentile(&mut others.map(|sent| sent.millis).collect::<Vec<_>>(), 95)
    };
    let without = open_loop(lab.client(), &body, PER_SECOND, time).await?;
    lab.start_worker(Worker::simulated(10 * MODEL_MS)).await?;
    let with = open_loop(lab.client(), &body, PER_SECOND, time).await?;
    all_answered(&without);
    all_answered(&with);
    let slow = with.iter().filter(|sent| sent.model >= (5 * MODEL_MS) as f64).count();
    ensure!(slow > 0, "the slow worker had nothing: this shows nothing");
    let (without, with) = (p95(&without), p95(&with));
    println!("{slow} requests were with the slow worker; p95 of others {without:.0} ms before, {with:.0} ms");
    let times = with / without;
    verdict("p95 of others, in times of without it", times, (0.9..=1.1).contains(&times), "0.9 to 1.1");
    let flood = submit_all(lab.client().clone(), good(), 100, 16).await?;
    let all = in_flight(&lab).await?;
    verdict("in flight at 4 workers of 1 executor", all as f64, all <= 8, "at most 8");
    for n in 0..3 {
        lab.stop_worker(n).await?;
    }
    let alone = submit_all(lab.client().clone(), good(), 10, 10).await?;
    let mut most = 0;
    for _ in 0..20 {
        most = in_flight(&lab).await?.max(most);
    }
    verdict("in flight at the slow worker alone", most as f64, most <= 2, "at most 2");
    for n in 0..3 {
        lab.restart_worker(n).await?;
    }
    until_ended(&lab, DRAINED).await?;
    check(&lab, &jobs_of(&[flood, alone].concat())).await?;
    lab.stop().await
}

/// Jobs that workers have, over all consumers.
async fn in_flight(lab: &Lab) -> Result<usize> {
    let stream = lab.jetstream().await?.get_stream(JOBS).await?;
    let consumers: Vec<_> = stream.consumers().try_collect().await?;
    Ok(consumers.iter().map(|consumer| consumer.num_ack_pending).sum())
}

async fn no_workers(long: bool) -> Result<()> {
    let (cap, excess) = if long { (5_000, 500) } else { (300, 100) };
    let mut lab = Lab::in_service(Setup::without_workers()).await?;
    let jetstream = lab.jetstream().await?;
    let mut config = jetstream.get_stream(JOBS).await?.cached_info().config.clone();
    config.max_messages = cap as i64;
    jetstream.update_stream(config).await?;
    let offered = offer_all(lab.client().clone(), good(), cap + excess, 8).await?;
    let accepted = jobs_of(&offered);
    verdict("accepted", accepted.len() as f64, accepted.len() == cap, &format!("the cap, {cap}"));
    let refused = offered.iter().filter(|offered| [429, 503].contains(&offered.status)).count();
    verdict("refused with 429 or 503", refused as f64, refused == excess, &excess.to_string());
    lab.start_workers(vec![Worker::simulated(5); 2]).await?;
    until_ended(&lab, DRAINED).await?;
    check(&lab, &accepted).await?;
    lab.stop().await
}

async fn slow_clients(long: bool) -> Result<()> {
    let (blocks, jobs) = if long { (7, 1_000) } else { (3, 300) };
    let lab = Arc::new(
        Lab::in_service(Setup { workers: vec![Worker::simulated(1); 2], ..Setup::default() }).await?,
    );
    let honest = async || {
        let offered = offer_all(lab.client().clone(), good(), jobs, 4).await?;
        let refused = offered.iter().filter(|offered| !offered.is_accepted()).count();
        until_ended(&lab, DRAINED).await?;
        anyhow::Ok((percentile(&mut millis_of(&offered), 99), refused, jobs_of(&offered)))
    };
    let (mut ratios, mut refusals, mut accepted) = (Vec::new(), 0, honest().await?.2);
    for _ in 0..blocks {
        let before = honest().await?;
        let siege = Siege::begin(&lab, 180_000).await?;
        let under = honest().await?;
        siege.end().await;
        println!("accept p99: {:.0} ms without, {:.0} ms with slow clients", before.0, under.0);
        ratios.push(under.0 / before.0);
        refusals += before.1 + under.1;
        accepted.extend([before.2, under.2].concat());
    }
    let ratio = median(&mut ratios);
    println!("ratios {:.2} to {:.2}", minimum(&ratios), maximum(&ratios));
    verdict("honest accept p99, in times of without", ratio, ratio <= 1.2, "at most 1.2");
    verdict("honest requests refused", refusals as f64, refusals == 0, "0");
    let siege = Siege::begin(&lab, MAX_BODY_BYTES).await?;
    let under = honest().await?;
    siege.end().await;
    let what = "honest requests refused while the slow bodies announce the largest size";
    verdict(what, under.1 as f64, under.1 == 0, "0");
    accepted.extend(under.2);
    check(&lab, &accepted).await?;
    Arc::into_inner(lab).context("the system is still in use")?.stop().await
}

/// Clients that do harm. Who is thrown out comes again.
pub(crate) struct Siege {
    clients: JoinSet<()>,
    times: Arc<AtomicUsize>,
}

/// How a client says that it is where it wants to be.
#[derive(Clone, Default)]
pub(crate) struct Arrived {
    is_there: Arc<AtomicBool>,
    times: Arc<AtomicUsize>,
}

impl Arrived {
    pub(crate) fn note(&self) {
        self.is_there.store(true, Ordering::Relaxed);
        self.times.fetch_add(1, Ordering::Relaxed);
    }
}

impl Siege {
    const IDLE: usize = 500;
    const STALLED: usize = 50;
    const SLOW: usize = 50;

    /// 500 idle connections, 50 handshakes that stop, 50 bodies of which 1 kB arrives a second.
    async fn begin(lab: &Arc<Lab>, announced: usize) -> Result<Self> {
        let tls = TlsConnector::from(Arc::new(lab.tls(rustls::ALL_VERSIONS)?));
        let (address, head) = (lab.address(0), analyze_head(lab, announced));
        Self::of(Self::IDLE + Self::STALLED + Self::SLOW, move |n, arrived| {
            let (tls, head) = (tls.clone(), head.clone());
            async move {
                match n {
                    n if n < Self::IDLE => idle(address, &tls, &arrived).await,
                    n if n < Self::IDLE + Self::STALLED => stalled(address, &arrived).await,
                    _ => slow(address, &tls, &head, &arrived).await,
                }
            }
        })
        .await
    }

    /// So many clients, each of which does `harm` again and again. Returns when all are there.
    pub(crate) async fn of<F: Future<Output = Result<()>> + Send>(
        count: usize,
        harm: impl Fn(usize, Arrived) -> F + Clone + Send + 'static,
    ) -> Result<Self> {
        SIEGES.fetch_add(1, Ordering::Relaxed);
        let (mut clients, times) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
        let mut there = Vec::new();
        for n in 0..count {
            let arrived = Arrived { times: times.clone(), ..Arrived::default() };
            there.push(arrived.is_there.clone());
            let harm = harm.clone();
            clients.spawn(async move {
                loop {
                    // It ends when the server has had enough.
                    let _ = harm(n, arrived.clone()).await;
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
        }
        let complete = async || there.iter().all(|there| there.load(Ordering::Relaxed)).then_some(());
        eventually("all of the siege are there", Duration::from_secs(30), complete).await?;
        Ok(Self { clients, times })
    }

    /// How often one of them was where it wanted to be.
    pub(crate) fn times(&self) -> usize {
        self.times.load(Ordering::Relaxed)
    }

    pub(crate) async fn end(mut self) {
        self.clients.shutdown().await;
    }
}

/// The head of a request that announces so many bytes, and the first of them.
pub(crate) fn analyze_head(lab: &Lab, announced: usize) -> String {
    format!(
        "POST /fhir/DiagnosticReport/$analyze HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\n\
         content-type: application/fhir+json\r\ncontent-length: {announced}\r\n\r\n{{",
        lab.client().token()
    )
}

/// Sieges so far.
static SIEGES: AtomicUsize = AtomicUsize::new(0);

/// From four addresses that only this siege has: one may have only so many connections, and is not let in when it was bad.
async fn connect(address: std::net::SocketAddr) -> Result<TcpStream> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let (siege, last) = (SIEGES.load(Ordering::Relaxed), 2 + COUNT.fetch_add(1, Ordering::Relaxed) % 4);
    let socket = TcpSocket::new_v4()?;
    socket.bind(([127, 0, siege as u8, last as u8], 0).into())?;
    Ok(socket.connect(address).await?)
}

pub(crate) async fn handshake(
    address: std::net::SocketAddr,
    tls: &TlsConnector,
) -> Result<TlsStream<TcpStream>> {
    let stream = connect(address).await?;
    Ok(tls.connect(ServerName::try_from("localhost")?, stream).await?)
}

async fn idle(address: std::net::SocketAddr, tls: &TlsConnector, arrived: &Arrived) -> Result<()> {
    let mut stream = handshake(address, tls).await?;
    arrived.note();
    stream.read_u8().await?;
    Ok(())
}

pub(crate) async fn stalled(address: std::net::SocketAddr, arrived: &Arrived) -> Result<()> {
    let mut stream = connect(address).await?;
    // The head of a record with a ClientHello that never comes.
    stream.write_all(&[22, 3, 1, 2, 0]).await?;
    arrived.note();
    stream.read_u8().await?;
    Ok(())
}

pub(crate) async fn slow(
    address: std::net::SocketAddr,
    tls: &TlsConnector,
    head: &str,
    arrived: &Arrived,
) -> Result<()> {
    let mut stream = handshake(address, tls).await?;
    stream.write_all(head.as_bytes()).await?;
    arrived.note();
    let (mut answer, mut body) = tokio::io::split(stream);
    let trickle = async {
        loop {
            body.write_all(&[b' '; 1_000]).await?;
            body.flush().await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        _ = answer.read_u8() => Ok(()),
        failed = trickle => failed,
    }
}

async fn hang_up(long: bool) -> Result<()> {
    const MODEL_MS: u64 = 1_000;
    let callers = if long { 256 } else { 16 };
    let workers = vec![Worker::simulated(MODEL_MS); 4];
    let lab = Lab::in_service(Setup { workers, ..Setup::default() }).await?;
    let body = sample(GOOD).to_string();
    let mut calls = JoinSet::new();
    for _ in 0..callers {
        let (client, body) = (lab.client().clone(), body.clone());
        calls.spawn(async move { client.analyze_raw(body, &[("prefer", "wait=60")]).await });
    }
    let queued = "SELECT count(*) FROM ingress.jobs WHERE queued_at IS NOT NULL";
    let arrived = async || (lab.count(queued).await.ok()? == callers).then_some(());
    eventually("every call is a job", Duration::from_secs(30), arrived).await?;
    let waiting = lab.metric("dermflow_waiters").await.context("no metric")?;
    let left = Instant::now();
    calls.shutdown().await;
    let free = async || lab.metric("dermflow_waiters").await.filter(|waiters| *waiters < 1.0);
    eventually("nobody waits", Duration::from_secs(30), free).await?;
    let free = left.elapsed().as_secs_f64();
    ensure!(waiting >= 1.0, "nobody waited: this shows nothing");
    println!("{waiting} of {callers} callers still waited, and hung up");
    verdict("seconds until their permits were free", free, free <= 0.5, "at most 0.5");
    until_ended(&lab, DRAINED).await?;
    let jobs = lab.sql("SELECT id::text FROM ingress.jobs").await?;
    let jobs: Vec<String> = jobs.iter().map(|row| row.get(0)).collect();
    let polled = join_all(jobs.iter().map(|job| lab.client().poll(job, DRAINED))).await;
    let found = polled.iter().flatten().filter(|answer| answer.status == 200).count();
    verdict("found by polling", found as f64, found == callers as usize, &callers.to_string());
    let again = lab.count("SELECT count(*) FROM ingress.jobs WHERE attempts <> 1").await?;
    verdict("not done exactly once", again as f64, again == 0, "0");
    check(&lab, &jobs).await?;
    lab.stop().await
}

async fn paused_broker(pause: Duration) -> Result<()> {
    let mut lab =
        Lab::in_service(Setup { workers: vec![Worker::simulated(5); 2], ..Setup::default() }).await?;
    let (client, ledger) = (lab.client().clone(), Ledger::default());
    ledger.submit_all(&client, 0..100, 8).await?;
    lab.pause_nats();
    let (paused, mut orders, mut accepted, mut seconds) = (Instant::now(), 100, 0, Vec::new());
    let attempt = async |n| {
        let begun = Instant::now();
        anyhow::Ok((ledger.attempt(&client, n).await?.is_some(), begun.elapsed().as_secs_f64()))
    };
    while paused.elapsed() < pause {
        for tried in join_all((orders..orders + 8).map(attempt)).await {
            let (is_accepted, took) = tried?;
            accepted += usize::from(is_accepted);
            seconds.push(took);
        }
        orders += 8;
    }
    lab.resume_nats();
    let resumed = Instant::now();
    ledger.submit(&client, orders).await?;
    let back = resumed.elapsed().as_secs_f64();
    verdict("accepted meanwhile", accepted as f64, accepted == 0, "0");
    let (slowest, half) = (maximum(&seconds), median(&mut seconds));
    println!("{} requests were refused, half of them within {half:.2} s", ledger.refusals());
    verdict("slowest refusal, s", slowest, slowest <= 2.0, "at most 2");
    verdict("back after, s", back, back <= 2.0, "at most 2");
    // The same orders again, as careful clients do.
    ledger.submit_all(&client, 0..orders, 8).await?;
    let checked = ledger.check(&lab, &[], DRAINED).await;
    verdict("nothing lost, doubled, unexpected", f64::from(u8::from(checked.is_ok())), checked.is_ok(), "1");
    checked?;
    lab.stop().await
}
