//! What TLS costs: the very bytes of requests and answers of ingress, exchanged with a server in this process that does
//! nothing but read and write, in clear and over TLS, beside what the same requests take at ingress.
//!
//! Ingress has no listener without TLS, and gets none for a figure. The server here answers with what ingress has answered,
//! after the time that the model takes, with the same library, versions and kind of certificate.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_tests::{
    client::sample,
    lab::{Lab, Setup},
};
use rustls::{
    ServerConfig,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
    time::sleep,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::measure::{maximum, median, minimum, percentile};

/// Blocks of each kind.
const BLOCKS: usize = 5;
const BLOCK: Duration = Duration::from_secs(5);
/// Connections at once.
const CONNECTIONS: usize = 8;
const MODEL_MS: u64 = 20;

trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Wire for S {}

/// A request as it goes over the wire, and its answer.
#[derive(Clone)]
struct Exchange {
    request: Arc<Vec<u8>>,
    answer: Arc<Vec<u8>>,
}

/// Where a block goes, and how.
#[derive(Clone)]
struct Target {
    address: SocketAddr,
    tls: Option<TlsConnector>,
    /// Every request on a connection of its own, with a whole handshake.
    is_new: bool,
}

pub(crate) async fn tls() -> Result<()> {
    let lab = Lab::in_service(Setup::simulated(MODEL_MS)).await?;
    lab.auth(&["user", "quota", "demo", "--requests", "60000000", "--images", "60000000"])?;
    let mut config = lab.tls(rustls::ALL_VERSIONS)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::disabled();
    let connector = TlsConnector::from(Arc::new(config));
    let ingress = Target { address: lab.address(0), tls: Some(connector.clone()), is_new: false };
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    lab.client().poll(&job, Duration::from_secs(30)).await?;
    let authorization = format!("authorization: Bearer {}", lab.client().token());
    let record = format!("GET /jobs/{job} HTTP/1.1\r\nhost: localhost\r\n{authorization}\r\n\r\n");
    let body = sample("ham10000-nv.jpg").to_string();
    let analyze = format!(
        "POST /fhir/DiagnosticReport/$analyze HTTP/1.1\r\nhost: localhost\r\n{authorization}\r\n\
         content-type: application/fhir+json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    for (what, request, pause) in [
        ("the record of a job", record, Duration::ZERO),
        ("a synchronous request", analyze, Duration::from_millis(MODEL_MS)),
    ] {
        let exchange = capture(&ingress, request.into_bytes()).await?;
        println!("{what}: {} bytes, answered with {}", exchange.request.len(), exchange.answer.len());
        let (clear, clear_server) = replay(None, exchange.clone(), pause).await?;
        let (secure, secure_server) = replay(Some(acceptor(&lab)?), exchange.clone(), pause).await?;
        for is_new in [false, true] {
            let targets = [
                Target { address: clear, tls: None, is_new },
                Target { address: secure, tls: Some(connector.clone()), is_new },
                Target { is_new, ..ingress.clone() },
            ];
            compare(what, &exchange, &targets).await?;
        }
        clear_server.abort();
        secure_server.abort();
    }
    lab.stop().await
}

async fn compare(what: &str, exchange: &Exchange, targets: &[Target; 3]) -> Result<()> {
    let kind = if targets[0].is_new { "new connections" } else { "connections that are reused" };
    let (mut rates, mut times) = ([(); 3].map(|()| Vec::new()), [(); 3].map(|()| Vec::new()));
    for n in 0..=BLOCKS {
        for (target, (rates, times)) in targets.iter().zip(rates.iter_mut().zip(&mut times)) {
            let (rate, p50) = block(target, exchange).await?;
            // The first round warms up.
            if n > 0 {
                rates.push(rate);
                times.push(p50);
            }
        }
    }
    let ratios = |of: &[Vec<f64>; 3]| -> Vec<f64> {
        of[1].iter().zip(&of[0]).map(|(tls, clear)| tls / clear).collect()
    };
    let (mut rate, mut time) = (ratios(&rates), ratios(&times));
    println!(
        "{what}, {kind}: requests a second over TLS / in clear: median {:.2}, {:.2} to {:.2}",
        median(&mut rate),
        minimum(&rate),
        maximum(&rate)
    );
    println!("{what}, {kind}: p50 over TLS / in clear: median {:.2}", median(&mut time));
    let rates = rates.map(|mut rates| median(&mut rates));
    let times = times.map(|mut times| median(&mut times));
    println!(
        "{what}, {kind}: in clear {:.0}/s, {:.3} ms; over TLS {:.0}/s, {:.3} ms; at ingress {:.0}/s, {:.3} ms",
        rates[0], times[0], rates[1], times[1], rates[2], times[2]
    );
    println!(
        "{what}, {kind}: TLS is {:.1} % of the p50 at ingress",
        100.0 * (times[1] - times[0]) / times[2]
    );
    Ok(())
}

/// Requests a second, and the p50 in milliseconds, of [`CONNECTIONS`] clients that ask again as soon as they are answered.
async fn block(target: &Target, exchange: &Exchange) -> Result<(f64, f64)> {
    let (begun, mut clients) = (Instant::now(), JoinSet::new());
    for _ in 0..CONNECTIONS {
        let (target, exchange) = (target.clone(), exchange.clone());
        clients.spawn(async move {
            let (mut times, mut kept) = (Vec::new(), None);
            while begun.elapsed() < BLOCK {
                let asked = Instant::now();
                let mut stream = match kept.take() {
                    Some(stream) => stream,
                    None => connect(&target).await?,
                };
                stream.write_all(&exchange.request).await?;
                stream.flush().await?;
                let answer = message(&mut stream).await?.context("the connection was closed")?;
                ensure!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
                times.push(asked.elapsed().as_secs_f64() * 1e3);
                kept = Some(stream).filter(|_| !target.is_new);
            }
            Ok(times)
        });
    }
    let mut times = Vec::new();
    for client in clients.join_all().await {
        times.extend(client?);
    }
    Ok((times.len() as f64 / begun.elapsed().as_secs_f64(), percentile(&mut times, 50)))
}

async fn connect(target: &Target) -> Result<BufReader<Box<dyn Wire>>> {
    let stream = TcpStream::connect(target.address).await?;
    stream.set_nodelay(true)?;
    let stream: Box<dyn Wire> = match &target.tls {
        Some(tls) => Box::new(tls.connect(ServerName::try_from("localhost")?, stream).await?),
        None => Box::new(stream),
    };
    Ok(BufReader::new(stream))
}

/// What ingress answers.
async fn capture(ingress: &Target, request: Vec<u8>) -> Result<Exchange> {
    let mut stream = connect(ingress).await?;
    stream.write_all(&request).await?;
    stream.flush().await?;
    let answer = message(&mut stream).await?.context("no answer")?;
    Ok(Exchange { request: Arc::new(request), answer: Arc::new(answer) })
}

/// A head of HTTP/1.1 and as much as its `Content-Length` says; `None` when the connection has ended.
async fn message(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => bytes.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && bytes.is_empty() => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let head = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let (length, begin) = (length.map_or(Ok(0), |length| length.trim().parse::<usize>())?, bytes.len());
    bytes.resize(begin + length, 0);
    stream.read_exact(&mut bytes[begin..]).await?;
    Ok(Some(bytes))
}

fn acceptor(lab: &Lab) -> Result<TlsAcceptor> {
    let chain = vec![CertificateDer::from_pem_file(&lab.pki().cert)?];
    let key = PrivateKeyDer::from_pem_file(&lab.pki().key)?;
    let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A server that answers every request alike, after a pause.
async fn replay(
    tls: Option<TlsAcceptor>,
    exchange: Exchange,
    pause: Duration,
) -> Result<(SocketAddr, JoinHandle<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let serving = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (tls, exchange) = (tls.clone(), exchange.clone());
            tokio::spawn(async move {
                // Who hangs up has what it wanted.
                let _ = serve(stream, tls, &exchange, pause).await;
            });
        }
    });
    Ok((address, serving))
}

async fn serve(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    exchange: &Exchange,
    pause: Duration,
) -> Result<()> {
    stream.set_nodelay(true)?;
    let stream: Box<dyn Wire> = match tls {
        Some(tls) => Box::new(tls.accept(stream).await?),
        None => Box::new(stream),
    };
    let mut stream = BufReader::new(stream);
    while message(&mut stream).await?.is_some() {
        if !pause.is_zero() {
            sleep(pause).await;
        }
        stream.write_all(&exchange.answer).await?;
        stream.flush().await?;
    }
    Ok(())
}
