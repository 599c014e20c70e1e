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
use dermflow_schemas::limits::NETWORK_CONNECTIONS;
use dermflow_tests::{
    client::Client,
    lab::{Lab, Setup},
    wait::eventually,
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// How soon a certificate that was renewed is served.
const SOON: Duration = Duration::from_secs(5);
const PATH: &str = "/.well-known/jwks.json";
const TURNED_AWAY: &str = "dermflow_connections_turned_away_total";
const REFUSED: &str = "dermflow_tls_certificate_refused_seconds";

async fn connect(lab: &Lab) -> Result<TlsStream<TcpStream>> {
    let connector = TlsConnector::from(Arc::new(lab.tls(rustls::ALL_VERSIONS)?));
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
    let left = lab.metric("dermflow_tls_certificate_not_after_seconds").await.context("no metric")?
        - lab.metric("dermflow_tls_certificate_loaded_seconds").await.context("no metric")?;
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
