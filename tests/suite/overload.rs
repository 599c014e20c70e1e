//! More than ingress can hold: who came first is served, and who comes then is told so at once.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_schemas::limits::{
    DATABASE_CONNECTIONS, DATABASE_QUEUE, MAX_CONNECTIONS, MAX_SUBMITTERS, MAX_WAITERS, NETWORK_CONNECTIONS,
    PUBLISH_DEADLINE, SHED_CONNECTIONS,
};
use dermflow_tests::{
    chaos::Mode,
    client::{Answer, Client, sample},
    lab::{Lab, Link, Setup, Worker},
    wait::eventually,
};
use tokio::{
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

const LONG: Duration = Duration::from_mins(1);
/// Requests that share a connection.
const STREAMS: usize = 128;
/// A refusal, in a debug build with hundreds of others beside it.
const AT_ONCE: Duration = Duration::from_secs(2);
/// How much ingress may grow meanwhile.
const GROWTH: u64 = 150 << 20;
const JWKS: &str = "/.well-known/jwks.json";

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
    let path = format!("/fhir/_async/{}", lab.client().submit(&sample("ham10000-nv.jpg")).await?);
    let clients = connections(&lab, lab.client().token(), 5).await?;
    let (link, mut answers) = (lab.link(Link::IngressDatabase), Answers::new());
    link.set(Mode::Blackhole);
    for client in &clients {
        for _ in 0..STREAMS {
            let (client, path) = (client.clone(), path.clone());
            ask(&mut answers, async move { client.get(&path).await });
        }
    }
    let all = answers.len();
    for _ in 0..all - DATABASE_QUEUE - DATABASE_CONNECTIONS {
        is_shed(&next(&mut answers).await?)?;
    }
    link.set(Mode::Pass);
    let mut answered = 0;
    while !answers.is_empty() {
        let answer = next(&mut answers).await?;
        if answer.0.status == 202 {
            answered += 1;
        } else {
            is_shed(&answer)?;
        }
    }
    println!("{answered} of {all} waited and were answered");
    // What ingress asks of its own accord waits among them.
    assert!(answered >= DATABASE_QUEUE / 2, "{answered}");
    assert_eq!(clients[0].get(&path).await?.status, 202);
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
