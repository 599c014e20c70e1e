//! The certificate that is served, and how it is renewed.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use dermflow_local::{
    servers::python_packages,
    stack::{Ports, repo},
};
use dermflow_schemas::limits::{BROKEN_CONNECTIONS, NETWORK_CONNECTIONS, WRITE_TIMEOUT};
use dermflow_tests::{
    client::{Client, sample},
    flood,
    lab::{Lab, Setup},
    wait::eventually,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy, sink, split},
    net::{TcpSocket, TcpStream},
    process::Command,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// How soon a certificate that was renewed is served.
const SOON: Duration = Duration::from_secs(5);
/// Types of HTTP/2 frames (RFC 9113 §6).
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const PATH: &str = "/.well-known/jwks.json";
const TURNED_AWAY: &str = "dermflow_connections_turned_away_total";
const REFUSED: &str = "dermflow_tls_certificate_refused_seconds{source=\"files\"}";

async fn connect(lab: &Lab) -> Result<TlsStream<TcpStream>> {
    connect_for(lab, b"http/1.1").await
}

async fn connect_for(lab: &Lab, protocol: &[u8]) -> Result<TlsStream<TcpStream>> {
    let mut config = lab.tls(rustls::ALL_VERSIONS)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let stream = TcpStream::connect(lab.address(0)).await?;
    Ok(connector.connect("localhost".try_into()?, stream).await?)
}

/// The certificate that the server has shown.
fn shown(stream: &TlsStream<TcpStream>) -> Option<CertificateDer<'static>> {
    stream.get_ref().1.peer_certificates()?.first().map(|certificate| certificate.clone().into_owned())
}

/// One request on a connection that stays open.
async fn head(stream: &mut TlsStream<TcpStream>) -> Result<String> {
    stream.write_all(format!("HEAD {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.context("the connection was closed")?);
    }
    Ok(String::from_utf8(answer)?.lines().next().unwrap_or_default().to_owned())
}

/// Returns when a new connection is shown what is in the file, and gives that.
async fn until_served(lab: &Lab) -> Result<CertificateDer<'static>> {
    let file = CertificateDer::from_pem_file(&lab.pki().cert)?;
    let served = async || (shown(&connect(lab).await.ok()?).as_ref() == Some(&file)).then_some(());
    eventually("the new certificate is served", SOON, served).await?;
    Ok(file)
}

// SRS-002: five renewals while others open connections and make requests; nobody notices, and a connection from before
// goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_served_and_nobody_notices() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let mut kept = connect(&lab).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let (ca, url, stopped) = (lab.ca(), lab.url(0), stop.clone());
    let load = tokio::spawn(async move {
        let mut answered = 0;
        while !stopped.load(Ordering::Relaxed) {
            let answer = Client::new(&ca, &url)?.get(PATH).await?;
            ensure!(answer.status == 200, "{} {}", answer.status, answer.text);
            answered += 1;
        }
        anyhow::Ok(answered)
    });
    let mut before = shown(&kept).context("no certificate")?;
    for _ in 0..5 {
        lab.renew_certificate()?;
        let after = until_served(&lab).await?;
        assert_ne!(before, after);
        before = after;
        assert_eq!(head(&mut kept).await?, "HTTP/1.1 200 OK");
    }
    stop.store(true, Ordering::Relaxed);
    let answered = load.await??;
    println!("{answered} requests on connections of their own");
    assert!(answered > 10, "{answered}");
    let left = lab
        .metric("dermflow_tls_certificate_not_after_seconds{source=\"files\"}")
        .await
        .context("no metric")?
        - lab
            .metric("dermflow_tls_certificate_loaded_seconds{source=\"files\"}")
            .await
            .context("no metric")?;
    assert!((89.9..=90.0).contains(&(left / 86_400.0)), "{left}");
    assert_eq!(lab.metric(REFUSED).await, Some(0.0));
    lab.stop().await
}

// One address opens as many connections as it may and more: those are closed at once and counted, other addresses are
// served, and who leaves makes room.
#[tokio::test(flavor = "multi_thread")]
async fn one_address_does_not_take_every_connection() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let other = Client::from_source(&lab.ca(), &lab.url(0), "127.0.0.3".parse()?)?;
    let mut open = Vec::new();
    for _ in 0..NETWORK_CONNECTIONS {
        open.push(from_other_address(&lab).await?);
    }
    let mut one_more = from_other_address(&lab).await?;
    let closed = async || one_more.read_u8().await.is_err().then_some(());
    eventually("one more is closed", SOON, closed).await?;
    assert_eq!(lab.metric(TURNED_AWAY).await, Some(1.0));
    assert_eq!(other.get(PATH).await?.status, 200);
    drop(open);
    let connector = TlsConnector::from(Arc::new(lab.tls(rustls::ALL_VERSIONS)?));
    let served = async || {
        let stream = from_other_address(&lab).await.ok()?;
        connector.connect("localhost".try_into().ok()?, stream).await.ok().map(drop)
    };
    eventually("who left makes room", SOON, served).await?;
    lab.stop().await
}

// Who floods us over HTTP/2, in whatever way, loses its connection, and after some of them comes in no more; others do, and
// who is in already stays.
#[tokio::test(flavor = "multi_thread")]
async fn who_floods_is_let_in_no_more() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let mut config = lab.tls(rustls::ALL_VERSIONS)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(config));
    let inside = Client::from_source(&lab.ca(), &lab.url(0), "127.0.0.2".parse()?)?;
    assert_eq!(inside.get(PATH).await?.status, 200);
    let mut floods = 0;
    let shut_out = loop {
        let stream = from_other_address(&lab).await?;
        let Ok(stream) = connector.connect("localhost".try_into()?, stream).await else { break floods };
        let burst = [flood::reset, flood::endless, flood::reset_after_goaway][floods % 3];
        timeout(SOON, until_ended(stream, burst)).await.context("a flood goes on")?;
        floods += 1;
        ensure!(floods <= NETWORK_CONNECTIONS, "a flood is let in again and again");
    };
    println!("shut out after {shut_out} floods");
    // One or two may come in while the last one is being counted.
    assert!((BROKEN_CONNECTIONS..BROKEN_CONNECTIONS + 3).contains(&shut_out), "{shut_out}");
    assert!(lab.metric(TURNED_AWAY).await > Some(0.0));
    assert_eq!(inside.get(PATH).await?.status, 200);
    assert_eq!(Client::new(&lab.ca(), &lab.url(0))?.get(PATH).await?.status, 200);
    lab.stop().await
}

/// Floods a connection until the server has ended it.
async fn until_ended(stream: TlsStream<TcpStream>, burst: impl Fn(u32) -> Vec<u8>) {
    let (mut answers, mut stream) = split(stream);
    let write = async {
        stream.write_all(&flood::preface()).await?;
        for n in 0.. {
            stream.write_all(&burst(n)).await?;
        }
        std::io::Result::Ok(())
    };
    let mut nowhere = sink();
    tokio::select! {
        _ = copy(&mut answers, &mut nowhere) => {}
        _ = write => {}
    }
}

async fn from_other_address(lab: &Lab) -> Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind("127.0.0.2:0".parse()?)?;
    Ok(socket.connect(lab.address(0)).await?)
}

// Files that do not belong together, or hold nothing, are refused, and what was served is served on.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_certificate_is_not_served() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (file, good) = (&lab.pki().cert, until_served(&lab).await?);
    let mut refused = 0.0;
    let staff = fs::read_to_string(&lab.pki().staff.cert)?;
    for bad in [staff.as_str(), "", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        fs::write(file, bad)?;
        let noticed = async || lab.metric(REFUSED).await.filter(|at| *at > refused);
        refused = eventually("the files are refused", SOON, noticed).await?;
        assert_eq!(shown(&connect(&lab).await?).as_ref(), Some(&good));
    }
    lab.renew_certificate()?;
    assert_ne!(until_served(&lab).await?, good);
    lab.stop().await
}

// Who shakes hands and asks for nothing loses its connection, without a word of HTTP/2 or with its first ones, and those
// are answered with GOAWAY (RFC 9113 §6.8): a request that is on its way then is not lost. Who has asked once keeps its
// connection for longer.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_nothing_is_told_to_leave() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let mut kept = connect(&lab).await?;
    head(&mut kept).await?;
    let mut mute = connect(&lab).await?;
    let mut mute_over_http2 = connect_for(&lab, b"h2").await?;
    let mut greets = connect_for(&lab, b"h2").await?;
    greets.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    greets.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await?;
    let last_words = timeout(Duration::from_secs(20), async {
        let mut words = Vec::new();
        for stream in [&mut mute, &mut mute_over_http2, &mut greets] {
            words.clear();
            let _ = stream.read_to_end(&mut words).await;
        }
        words
    });
    let last_words = last_words.await.context("a silent peer keeps its connection")?;
    assert!(frames(&last_words).contains(&GOAWAY), "{last_words:?}");
    assert_eq!(head(&mut kept).await?, "HTTP/1.1 200 OK");
    lab.stop().await
}

// SRS-002: SSLyze finds nothing that Mozilla's intermediate configuration does not want but the CA, which is of the test,
// and that TLS 1.0 and 1.1 are refused; on a listener that asks for certificates, too.
#[tokio::test(flavor = "multi_thread")]
async fn sslyze_finds_mozillas_intermediate_configuration() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let ca = lab.pki().staff_ca.display().to_string();
    lab.start_ingress(Ports::free()?, &["--client-ca", &ca]).await?;
    let pins = fs::read_to_string(repo().join("tests/tls/requirements.txt"))?;
    let libs = python_packages(repo(), "sslyze", &pins, |step| println!("{step}")).await?;
    for n in 0..2 {
        let mut scan = Command::new("python3");
        scan.arg(repo().join("tests/tls/scan.py")).arg("--libs").arg(&libs);
        let output = scan.arg(lab.address(n).port().to_string()).output().await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout)?;
        println!("{found:#}");
        let issues: Vec<&String> = found["issues"].as_object().context("no issues")?.keys().collect();
        assert_eq!(issues, ["certificate_path_validation"], "replica {n}: {}", found["issues"]);
        let accepted = |version: &str| found["accepted"][version].as_u64().context("not scanned");
        for version in ["ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1"] {
            assert_eq!(accepted(version)?, 0, "replica {n}: {version}");
        }
        assert!(accepted("tls_1_2")? > 0 && accepted("tls_1_3")? > 0);
    }
    lab.stop().await
}

// Who sends requests and reads no answer loses its connection; who reads gets all of them.
#[tokio::test(flavor = "multi_thread")]
async fn who_reads_no_answer_is_left() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4_096)?;
    let connector = TlsConnector::from(Arc::new(lab.tls(rustls::ALL_VERSIONS)?));
    let stream = socket.connect(lab.address(0)).await?;
    let mut stream = connector.connect("localhost".try_into()?, stream).await?;
    let request =
        "GET /.well-known/oauth-authorization-server HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(100);
    let begun = tokio::time::Instant::now();
    let sending =
        async { while stream.write_all(request.as_bytes()).await.is_ok() && stream.flush().await.is_ok() {} };
    timeout(WRITE_TIMEOUT + Duration::from_secs(20), sending).await.context("it is kept")?;
    assert!(begun.elapsed() >= WRITE_TIMEOUT, "{:?}", begun.elapsed());
    lab.stop().await
}

// Who asks for reports over HTTP/2 and opens no window for them: they count as memory that is held, and are given up, each by
// itself, when the time to take something of them is over. The connection goes on.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_takes_over_http2_are_given_up() -> Result<()> {
    const HELD: &str = "dermflow_body_bytes";
    const ANSWERS: usize = 64;
    let lab = Lab::start(Setup::simulated(1)).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    let report = lab.client().poll(&job, Duration::from_secs(30)).await?;
    assert_eq!((report.status, lab.metric(HELD).await), (200, Some(0.0)), "{}", report.text);
    let stream = connect_for(&lab, b"h2").await?;
    let (mut requests, connection) =
        h2::client::Builder::new().initial_window_size(0).handshake::<_, Bytes>(stream).await?;
    tokio::spawn(connection);
    let request = |method: &str, path: &str| {
        let request = hyper::Request::builder().method(method).uri(format!("{}{path}", lab.url(0)));
        request.header("authorization", format!("Bearer {}", lab.client().token())).body(())
    };
    let (begun, mut answers) = (tokio::time::Instant::now(), Vec::new());
    for _ in 0..ANSWERS {
        requests = requests.ready().await?;
        let report = request("GET", &format!("/fhir/DiagnosticReport/{job}"))?;
        let answer = requests.send_request(report, true)?.0.await?;
        assert_eq!(answer.status(), 200);
        answers.push(answer.into_body());
    }
    let held = lab.metric(HELD).await.context("no metric")?;
    println!("{held} bytes are held for answers of {} bytes", report.text.len());
    assert!(held >= (ANSWERS * report.text.len()) as f64, "{held}");
    for answer in &mut answers {
        let part = timeout(WRITE_TIMEOUT + Duration::from_secs(20), answer.data()).await;
        let end = part.context("an answer is kept")?.context("an answer ended")?.unwrap_err();
        assert_eq!(end.reason(), Some(h2::Reason::CANCEL), "{end}");
    }
    assert!(begun.elapsed() >= WRITE_TIMEOUT, "{:?}", begun.elapsed());
    let free = async || (lab.metric(HELD).await? == 0.0).then_some(());
    eventually("their memory is given back", SOON, free).await?;
    let mut requests = requests.ready().await?;
    assert_eq!(requests.send_request(request("HEAD", PATH)?, true)?.0.await?.status(), 200);
    lab.stop().await
}

/// The types of HTTP/2 frames (RFC 9113 §4.1).
fn frames(mut bytes: &[u8]) -> Vec<u8> {
    let mut types = Vec::new();
    while let Some((header, rest)) = bytes.split_at_checked(9) {
        types.push(header[3]);
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        bytes = rest.get(length as usize..).unwrap_or_default();
    }
    types
}

// Ingress is told to stop while requests that share a connection wait for their reports: each is answered.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_over_http2_outlives_a_shutdown() -> Result<()> {
    const REQUESTS: usize = 20;
    let mut lab = Lab::start(Setup::simulated(100)).await?;
    let client = Client::over_http2(&lab.ca(), &lab.url(0))?.with_token(lab.client().token());
    let body = sample("ham10000-nv.jpg");
    let mut requests = JoinSet::new();
    for _ in 0..REQUESTS {
        let (client, body) = (client.clone(), body.clone());
        requests.spawn(async move { client.analyze(&body, &[]).await });
    }
    let jobs = "SELECT count(*) FROM ingress.jobs";
    let accepted = async || (lab.count(jobs).await.ok()? == REQUESTS as i64).then_some(());
    eventually("all are accepted", SOON, accepted).await?;
    lab.stop_ingress(0).await?;
    for answer in requests.join_all().await {
        let answer = answer?;
        assert!([200, 202].contains(&answer.status), "{} {}", answer.status, answer.text);
    }
    lab.stop().await
}
