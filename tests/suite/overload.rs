//! More than ingress can hold: who came first is served, and who comes then is told so at once.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_schemas::limits::{
    BODY_MEMORY_BYTES, DATABASE_CONNECTIONS, DATABASE_QUEUE, DATABASE_QUEUE_SHARE, MAX_BODY_BYTES,
    MAX_CONNECTIONS, MAX_SUBMITTERS, MAX_WAITERS, NETWORK_CONNECTIONS, PUBLISH_DEADLINE, SHED_CONNECTIONS,
    UPLOAD_BYTES,
};
use dermflow_tests::{
    chaos::Mode,
    client::{Answer, Client, FHIR_JSON, sample, sample_bytes, send},
    lab::{Lab, Link, Setup, Worker},
    wait::eventually,
};
use futures_util::{future::try_join_all, stream};
use reqwest::{Body, Method};
use serde_json::json;
use tokio::{
    net::{TcpSocket, TcpStream},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

const LONG: Duration = Duration::from_mins(1);
/// Requests that share a connection.
const STREAMS: usize = 128;
/// A refusal, in a debug build with hundreds of others beside it.
const AT_ONCE: Duration = Duration::from_secs(2);
/// How much ingress may grow meanwhile.
const GROWTH: u64 = 150 << 20;
const JWKS: &str = "/.well-known/jwks.json";
/// What one statement answers.
const JOBS: &str = "/jobs?limit=1";

/// Clients of one account, each with a connection that is open already.
async fn connections(lab: &Lab, token: &str, count: usize) -> Result<Vec<Client>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let client = Client::over_http2(&lab.ca(), &lab.url(0))?.with_token(token);
        ensure!(client.get(JWKS).await?.status == 200);
        clients.push(client);
    }
    Ok(clients)
}

/// Answers, each with how long it took.
type Answers = JoinSet<Result<(Answer, Duration)>>;

fn ask(answers: &mut Answers, call: impl Future<Output = Result<Answer>> + Send + 'static) {
    let begun = Instant::now();
    answers.spawn(async move { Ok((call.await?, begun.elapsed())) });
}

fn analyze(answers: &mut Answers, client: &Client, body: &str, prefer: &'static str, times: usize) {
    for _ in 0..times {
        let (client, body) = (client.clone(), body.to_owned());
        ask(answers, async move { client.analyze_raw(body, &[("prefer", prefer)]).await });
    }
}

fn list_jobs(answers: &mut Answers, client: &Client, times: usize) {
    for _ in 0..times {
        let client = client.clone();
        ask(answers, async move { client.get(JOBS).await });
    }
}

fn is_shed((answer, took): &(Answer, Duration)) -> Result<()> {
    ensure!((answer.status, answer.code()) == (503, "overloaded"), "{} {}", answer.status, answer.text);
    ensure!(answer.header("retry-after").parse::<u64>()? >= 1);
    ensure!(*took < AT_ONCE, "refused after {took:?}");
    Ok(())
}

async fn next(answers: &mut Answers) -> Result<(Answer, Duration)> {
    answers.join_next().await.context("no more answers")??
}

// More synchronous requests than places: those that came first get their reports, later ones a 503 at once, though the
// first ones wait for a worker that is not there yet.
#[tokio::test(flavor = "multi_thread")]
async fn who_waits_already_is_answered_and_who_comes_then_is_told_at_once() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let (second, third) = (lab.register("second").await?, lab.register("third").await?);
    let mut first = connections(&lab, lab.client().token(), 2).await?;
    first.extend(connections(&lab, second.token(), 2).await?);
    let late = connections(&lab, third.token(), 1).await?.remove(0);
    let (body, memory) = (sample("ham10000-nv.jpg").to_string(), lab.ingress_memory(0)?);
    let (mut waiting, mut sent) = (Answers::new(), 0);
    for client in &first {
        analyze(&mut waiting, client, &body, "wait=60", STREAMS);
        sent += STREAMS;
        let queued = "SELECT count(*) FROM ingress.jobs WHERE state = 'queued'";
        let all = async || (lab.count(queued).await.ok()? == sent as i64).then_some(());
        eventually("they are queued", LONG, all).await?;
    }
    assert_eq!((sent, lab.metric("dermflow_waiters").await), (MAX_WAITERS, Some(MAX_WAITERS as f64)));
    let mut refused = Answers::new();
    analyze(&mut refused, &late, &body, "wait=60", STREAMS);
    while !refused.is_empty() {
        is_shed(&next(&mut refused).await?)?;
    }
    let own = lab.client().analyze_raw(body.clone(), &[]).await?;
    assert_eq!((own.status, own.code()), (429, "concurrency-exceeded"));
    assert_eq!(late.analyze_raw(body.clone(), &[("prefer", "respond-async")]).await?.status, 202);
    let grown = lab.ingress_memory(0)?.saturating_sub(memory);
    println!("ingress grew by {} MB", grown >> 20);
    assert!(grown < GROWTH);
    lab.start_workers(vec![Worker::simulated(1), Worker::simulated(1)]).await?;
    while !waiting.is_empty() {
        let (answer, _) = next(&mut waiting).await?;
        assert_eq!(answer.status, 200, "{}", answer.text);
    }
    assert_eq!(late.analyze_raw(body, &[]).await?.status, 200);
    lab.stop().await
}

// A broker that is paused, and more asynchronous requests than ingress has places for: the first ones are accepted when it
// goes on, and what finds no place is refused meanwhile, not after the deadline that all would miss.
#[tokio::test(flavor = "multi_thread")]
async fn a_paused_broker_holds_up_no_more_than_there_are_places() -> Result<()> {
    const FIRST: usize = 32;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let (second, third) = (lab.register("second").await?, lab.register("third").await?);
    let body = sample("ham10000-nv.jpg").to_string();
    let mut clients = connections(&lab, lab.client().token(), 2).await?;
    clients.extend(connections(&lab, second.token(), 2).await?);
    let late = connections(&lab, third.token(), 2).await?;
    // The consumers of their bulk jobs are there, so that nobody waits for those.
    for client in clients.iter().chain(&late) {
        client.submit(&sample("ham10000-nv.jpg")).await?;
    }
    let memory = lab.ingress_memory(0)?;
    lab.pause_nats();
    let (mut first, mut others) = (Answers::new(), Answers::new());
    analyze(&mut first, &clients[0], &body, "respond-async", FIRST);
    let there = async || lab.metric("dermflow_submitters").await.filter(|places| *places >= FIRST as f64);
    eventually("the first ones are there", LONG, there).await?;
    analyze(&mut others, &clients[0], &body, "respond-async", STREAMS - FIRST);
    for client in clients[1..].iter().chain(&late) {
        analyze(&mut others, client, &body, "respond-async", STREAMS);
    }
    let (surplus, mut shed) = (FIRST + others.len() - MAX_SUBMITTERS, 0);
    assert_eq!(surplus, 2 * STREAMS);
    while shed < surplus {
        is_shed(&next(&mut others).await?)?;
        shed += 1;
    }
    let grown = lab.ingress_memory(0)?.saturating_sub(memory);
    println!("ingress grew by {} MB", grown >> 20);
    assert!(grown < GROWTH);
    lab.resume_nats();
    while !first.is_empty() {
        let (answer, _) = next(&mut first).await?;
        assert_eq!(answer.status, 202, "{}", answer.text);
    }
    let mut accepted = 0;
    while !others.is_empty() {
        let (answer, took) = next(&mut others).await?;
        accepted += u32::from(answer.status == 202);
        ensure!(took < 3 * PUBLISH_DEADLINE, "{} after {took:?}", answer.status);
        ensure!(answer.status == 202 || answer.header("retry-after") == "1", "{}", answer.text);
    }
    println!("{accepted} of {} others were accepted", MAX_SUBMITTERS - FIRST);
    assert_eq!(late[0].analyze_raw(body, &[("prefer", "respond-async")]).await?.status, 202);
    lab.stop().await
}

// A database that does not answer: as many requests wait for it as there are places in its queue, and are answered when it
// goes on; the others are refused at once, and none waits for the time-out of its turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_does_not_answer_holds_up_a_few() -> Result<()> {
    let lab = Lab::start(Setup { proxies: true, ..Setup::without_workers() }).await?;
    // No client has all of the queue.
    let mut clients = Vec::new();
    for name in ["first", "second", "third", "fourth", "fifth"] {
        clients.extend(connections(&lab, lab.register(name).await?.token(), 1).await?);
    }
    let (link, mut answers) = (lab.link(Link::IngressDatabase), Answers::new());
    link.set(Mode::Blackhole);
    for client in &clients {
        list_jobs(&mut answers, client, STREAMS);
    }
    let all = answers.len();
    for _ in 0..all - DATABASE_QUEUE - DATABASE_CONNECTIONS {
        is_shed(&next(&mut answers).await?)?;
    }
    link.set(Mode::Pass);
    let mut answered = 0;
    while !answers.is_empty() {
        let answer = next(&mut answers).await?;
        if answer.0.status == 200 {
            answered += 1;
        } else {
            is_shed(&answer)?;
        }
    }
    println!("{answered} of {all} waited and were answered");
    // What ingress asks of its own accord waits among them.
    assert!(answered >= DATABASE_QUEUE / 2, "{answered}");
    assert_eq!(clients[0].get(JOBS).await?.status, 200);
    lab.stop().await
}

// One client that asks for as much as it can: beyond its share of the queue for the database it is told so at once, and
// another one is served throughout, while the database does not answer, too.
#[tokio::test(flavor = "multi_thread")]
async fn one_client_does_not_fill_the_queue_for_the_database() -> Result<()> {
    const CALM: usize = 100;
    let lab = Lab::start(Setup { proxies: true, ..Setup::without_workers() }).await?;
    let other = connections(&lab, lab.register("other").await?.token(), 1).await?.remove(0);
    let flood = connections(&lab, lab.client().token(), 5).await?;
    let (link, mut flooding, mut asking) = (lab.link(Link::IngressDatabase), Answers::new(), Answers::new());
    link.set(Mode::Blackhole);
    for client in &flood {
        list_jobs(&mut flooding, client, STREAMS);
    }
    // Those who have a connection wait no more, and ask for another one with their next statement.
    let surplus = flooding.len() - DATABASE_QUEUE_SHARE - DATABASE_CONNECTIONS;
    let (mut refused, mut waited) = (0, 0);
    while refused < surplus / 2 {
        let (answer, took) = next(&mut flooding).await?;
        // Who waits may do so in vain.
        if answer.code() != "database-unavailable" {
            is_shed(&(answer, took))?;
            refused += 1;
        }
    }
    list_jobs(&mut asking, &other, STREAMS);
    link.set(Mode::Pass);
    while !asking.is_empty() {
        let (answer, _) = next(&mut asking).await?;
        ensure!(answer.status == 200, "the other client: {} {}", answer.status, answer.text);
    }
    while !flooding.is_empty() {
        let (answer, _) = next(&mut flooding).await?;
        waited += usize::from(answer.status == 200);
    }
    println!("of the flood, {waited} waited and were answered");

    // The same with a database that answers, for as long as the other one asks.
    let (stop, mut refused) = (Arc::new(AtomicBool::new(false)), JoinSet::new());
    for client in flood.iter().flat_map(|client| vec![client.clone(); STREAMS]) {
        let stop = stop.clone();
        refused.spawn(async move {
            let mut refused = 0;
            while !stop.load(Ordering::Relaxed) {
                let answer = client.get(JOBS).await?;
                ensure!([200, 429, 503].contains(&answer.status), "{} {}", answer.status, answer.text);
                refused += usize::from(answer.status == 503);
            }
            Ok(refused)
        });
    }
    let mut slowest = Duration::ZERO;
    for _ in 0..CALM {
        let begun = Instant::now();
        let answer = other.get(JOBS).await?;
        ensure!(answer.status == 200, "the other client: {} {}", answer.status, answer.text);
        slowest = slowest.max(begun.elapsed());
    }
    stop.store(true, Ordering::Relaxed);
    let refused = refused.join_all().await.into_iter().sum::<Result<usize>>()?;
    println!("the other client waited for {slowest:?} at most; {refused} of the flood were refused");
    lab.stop().await
}

/// A request that does not wait, or an upload, whose body comes in parts, on a connection of its own.
struct Piecemeal {
    parts: mpsc::Sender<Result<Vec<u8>, io::Error>>,
    answer: JoinHandle<Result<Answer>>,
}

impl Piecemeal {
    fn begin(lab: &Lab, token: &str) -> Result<Self> {
        Self::post(lab, token, "/fhir/DiagnosticReport/$analyze", FHIR_JSON)
    }

    fn post(lab: &Lab, token: &str, path: &str, kind: &str) -> Result<Self> {
        let client = Client::new(&lab.ca(), &lab.url(0))?.with_token(token);
        let (parts, coming) = mpsc::channel(1);
        let body = stream::unfold(coming, |mut coming| async { Some((coming.recv().await?, coming)) });
        let request = client.request(Method::POST, path);
        let request = request.header("content-type", kind).header("prefer", "respond-async");
        let answer = tokio::spawn(send(request.body(Body::wrap_stream(body))));
        Ok(Self { parts, answer })
    }

    /// White space, which JSON and a line may begin with.
    async fn space(&self, bytes: usize) -> Result<()> {
        Ok(self.parts.send(Ok(vec![b' '; bytes])).await?)
    }

    async fn end(self, rest: &str) -> Result<Answer> {
        self.parts.send(Ok(rest.into())).await?;
        drop(self.parts);
        self.answer.await?
    }
}

// An upload of 200 MB of which its client may have little open: its sender waits, ingress holds what it may have in hand and
// no more, and all of it is accepted when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_finds_no_room_is_not_read_on() -> Result<()> {
    const MIB: usize = 1 << 20;
    const LINES: usize = 200;
    const OPEN: i64 = 8;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    lab.auth(&["user", "quota", "demo", "--jobs", &OPEN.to_string()])?;
    lab.stop_ingress(0).await?;
    lab.restart_ingress(0).await?;
    let image = STANDARD.encode(sample_bytes("isic2017-nv.jpg"));
    let (space, sent) = (" ".repeat(MIB), Arc::new(AtomicUsize::new(0)));
    let taken = sent.clone();
    let lines = (0..LINES).map(move |n| {
        taken.store(n, Ordering::Relaxed);
        Ok::<_, io::Error>(format!(
            "{{\"custom_id\":\"{n}\",{space}\"images\":[{{\"data\":\"{image}\"}}]}}\n"
        ))
    });
    let memory = lab.ingress_memory(0)?;
    let request =
        lab.client().request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let uploading = tokio::spawn(send(request.body(Body::wrap_stream(stream::iter(lines)))));
    let queued = "SELECT count(*) FROM ingress.jobs WHERE state = 'queued'";
    let full = async || (lab.count(queued).await.ok()? == OPEN).then_some(());
    eventually("the client has what it may have", LONG, full).await?;
    let (mut last, mut since) = (0, Instant::now());
    let waits = async || {
        let now = sent.load(Ordering::Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        (since.elapsed() > Duration::from_secs(2)).then_some(last)
    };
    let sent = eventually("the sender waits", LONG, waits).await?;
    let grown = lab.ingress_memory(0)?.saturating_sub(memory);
    println!("{sent} MiB of {LINES} sent, ingress grew by {} MB", grown >> 20);
    ensure!(sent * MIB < OPEN as usize * MIB + 4 * UPLOAD_BYTES, "{sent} MiB were read");
    ensure!(grown < 64 << 20, "ingress grew by {} MB", grown >> 20);
    lab.start_worker(Worker::simulated(1)).await?;
    let answer = uploading.await??;
    let end = answer.text.lines().last().context("no answer")?;
    ensure!(end.contains(&format!("\"accepted\":{LINES},\"")) && end.contains("\"complete\":true"), "{end}");
    lab.stop().await
}

// More of bodies than there is memory for: one that began later is given up for one that began before, which finishes;
// the newest is refused at once, and what ingress holds stays within its bounds.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_do_not_fit_are_refused_from_the_newest_on() -> Result<()> {
    const MIB: usize = 1 << 20;
    let lab = Lab::start(Setup::without_workers()).await?;
    // No client has more than half of it.
    let (second, third) = (lab.register("second").await?, lab.register("third").await?);
    let (token, rest) = (third.token(), sample("ham10000-nv.jpg").to_string());
    let (large, memory) = (MAX_BODY_BYTES - rest.len(), lab.ingress_memory(0)?);
    let held = async |bytes: usize| {
        let held = async || lab.metric("dermflow_body_bytes").await.filter(|held| *held >= bytes as f64);
        eventually("the bodies are there", LONG, held).await
    };
    // All of them but one are as large as they may be; there is room for one more.
    let mut first = Vec::new();
    for n in 0..BODY_MEMORY_BYTES / MAX_BODY_BYTES - 1 {
        first.push(Piecemeal::begin(&lab, [lab.client(), &second][n % 2].token())?);
    }
    try_join_all(first.iter().map(|body| body.space(large))).await?;
    let full = first.len() * large;
    held(full).await?;
    let slow = Piecemeal::begin(&lab, token)?;
    slow.space(MIB).await?;
    held(full + MIB).await?;
    let newest = Piecemeal::begin(&lab, token)?;
    newest.space(20 * MIB).await?;
    held(full + 21 * MIB).await?;
    slow.space(10 * MIB).await?;
    let given_up =
        async || lab.metric("dermflow_body_bytes").await.filter(|held| *held < (full + 12 * MIB) as f64);
    eventually("the newest is given up", LONG, given_up).await?;
    held(full + 11 * MIB).await?;
    // Who goes on sending is answered when that was taken in.
    let begun = Instant::now();
    is_shed(&(newest.end(&rest).await?, begun.elapsed()))?;
    let another = Piecemeal::begin(&lab, token)?;
    another.space(20 * MIB).await?;
    let begun = Instant::now();
    is_shed(&(another.end(&rest).await?, begun.elapsed()))?;
    let grown = lab.ingress_memory(0)?.saturating_sub(memory);
    println!("ingress grew by {} MB", grown >> 20);
    assert!(grown < BODY_MEMORY_BYTES as u64 + GROWTH);
    first.push(slow);
    for body in first {
        let answer = body.end(&rest).await?;
        ensure!(answer.status == 202, "{} {}", answer.status, answer.text);
    }
    assert_eq!(lab.metric("dermflow_body_bytes").await, Some(0.0));
    assert_eq!(lab.client().analyze_raw(rest, &[("prefer", "respond-async")]).await?.status, 202);
    lab.stop().await
}

// One client whose uploads, more of them than there is memory for, each stop in the middle of a line: it holds half of the
// memory and no more, its next body is refused, and another client's is taken.
#[tokio::test(flavor = "multi_thread")]
async fn one_client_does_not_fill_the_memory_for_bodies() -> Result<()> {
    const LINE: usize = 23 << 20;
    let lab = Lab::start(Setup::without_workers()).await?;
    let other = lab.register("other").await?;
    let mut uploads = Vec::new();
    for _ in 0..=BODY_MEMORY_BYTES / LINE {
        uploads.push(Piecemeal::post(&lab, lab.client().token(), "/batches", "application/x-ndjson")?);
    }
    try_join_all(uploads.iter().map(|upload| upload.space(LINE))).await?;
    let (mut last, mut since) = (0, Instant::now());
    let stands = async || {
        let now = lab.metric("dermflow_body_bytes").await? as usize;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        (now > BODY_MEMORY_BYTES / 2 - LINE && since.elapsed() > Duration::from_secs(2)).then_some(now)
    };
    let held = eventually("no more is taken in", LONG, stands).await?;
    assert!(held <= BODY_MEMORY_BYTES / 2, "{} MiB", held >> 20);
    let (small, prefer) = (sample("ham10000-nv.jpg").to_string(), [("prefer", "respond-async")]);
    let body = format!("{}{small}", " ".repeat(LINE));
    let begun = Instant::now();
    is_shed(&(lab.client().analyze_raw(small, &prefer).await?, begun.elapsed()))?;
    let answer = other.analyze_raw(body, &prefer).await?;
    assert_eq!(answer.status, 202, "{}", answer.text);
    for upload in &uploads {
        upload.answer.abort();
    }
    let free = async || (lab.metric("dermflow_body_bytes").await? == 0.0).then_some(());
    eventually("who hangs up holds nothing", LONG, free).await?;
    lab.stop().await
}

// A Bundle whose jobs are queued holds nothing of its body any more, however long its caller waits for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_that_waits_holds_no_body() -> Result<()> {
    const MIB: usize = 1 << 20;
    const ENTRIES: usize = 4;
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let request = json!({"method": "POST", "url": "DiagnosticReport/$analyze"});
    let entry = json!({"resource": sample("ham10000-nv.jpg"), "request": request});
    let bundle = json!({"resourceType": "Bundle", "type": "batch", "entry": vec![entry; ENTRIES]});
    let post = lab.client().request(Method::POST, "/fhir").header("content-type", FHIR_JSON);
    let body = format!("{}{bundle}", " ".repeat(20 * MIB));
    let waiting = tokio::spawn(send(post.header("prefer", "wait=60").body(body)));
    let queued = "SELECT count(*) FROM ingress.jobs WHERE state = 'queued'";
    let all = async || (lab.count(queued).await.ok()? == ENTRIES as i64).then_some(());
    eventually("every entry is queued", LONG, all).await?;
    let free = async || (lab.metric("dermflow_body_bytes").await? == 0.0).then_some(());
    eventually("the body is gone", AT_ONCE, free).await?;
    assert!(!waiting.is_finished(), "nobody waits");
    lab.start_worker(Worker::simulated(1)).await?;
    let answer = waiting.await??;
    let entries = answer.body["entry"].as_array().context(answer.text.clone())?;
    assert!(entries.iter().all(|entry| entry["response"]["status"] == "200"), "{}", answer.text);
    lab.stop().await
}

// More sign in at once than can be served: who finds no place is told when to come back, which is in the trail, and those
// who are signed in do not notice.
#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_place_to_sign_in_is_told_when_to_come_back() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (password, mut answers) = (lab.password("demo")?, Answers::new());
    for client in connections(&lab, "", 4).await? {
        for _ in 0..STREAMS {
            let (client, password) = (client.clone(), password.clone());
            ask(&mut answers, async move { client.try_login("demo", &password).await });
        }
    }
    let (mut signed_in, mut refused) = (0, 0);
    while !answers.is_empty() {
        let (answer, took) = next(&mut answers).await?;
        let meanwhile = lab.client().get(JOBS).await?;
        ensure!(meanwhile.status == 200, "{}", meanwhile.text);
        if answer.status == 200 {
            signed_in += 1;
            continue;
        }
        ensure!((answer.status, answer.code()) == (503, "overloaded"), "{} {}", answer.status, answer.text);
        ensure!((1..=10).contains(&answer.header("retry-after").parse::<u64>()?), "after {took:?}");
        refused += 1;
    }
    println!("{signed_in} signed in, {refused} were refused");
    assert!(signed_in > 0 && refused > 0);
    let recorded = "SELECT count(*) FROM auth.audit WHERE action = 'login' AND code = 'overloaded'";
    assert!(lab.count(recorded).await? > 0);
    assert_eq!(lab.client().try_login("demo", &password).await?.status, 200);
    lab.stop().await
}

// Every connection is taken: one that comes then gets an answer all the same, and one that was there is served.
#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_answered_with_503() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let kept = connections(&lab, "", 1).await?.remove(0);
    let mut silent = Vec::new();
    for n in 0..MAX_CONNECTIONS {
        silent.push(from(&lab, Ipv4Addr::new(127, 0, 0, 2 + (n / NETWORK_CONNECTIONS) as u8)).await?);
    }
    // More than there are places for who is refused: each one is gone as soon as it has its answer.
    for n in 0..2 * SHED_CONNECTIONS {
        let one_more = if n % 2 == 0 {
            Client::from_source(&lab.ca(), &lab.url(0), IpAddr::from([127, 0, 0, 9]))?
        } else {
            Client::over_http2(&lab.ca(), &lab.url(0))?
        };
        let begun = Instant::now();
        is_shed(&(one_more.get(JWKS).await?, begun.elapsed()))?;
    }
    assert_eq!(kept.get(JWKS).await?.status, 200);
    drop(silent);
    let served = async || {
        (Client::new(&lab.ca(), &lab.url(0)).ok()?.get(JWKS).await.ok()?.status == 200).then_some(())
    };
    eventually("there is room again", LONG, served).await?;
    lab.stop().await
}

async fn from(lab: &Lab, address: Ipv4Addr) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, 0).into())?;
    Ok(socket.connect(lab.address(0)).await?)
}
