//! Certificates from a real ACME server.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use dermflow_local::stack::Ports;
use dermflow_schemas::{
    clock,
    seal::{Content, Keyring, Sealed},
};
use dermflow_tests::{
    directory::{Directory, RETRY_AFTER},
    lab::{Lab, Setup},
    pebble::Pebble,
    wait::eventually,
};
use instant_acme::Account;
use rustls::{ClientConfig, RootCertStore, pki_types::CertificateDer};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::interval,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use uuid::Uuid;

const NAME: &str = "dermflow.test";
const LONG: Duration = Duration::from_mins(1);
const FAILED: &str = "dermflow_acme_failed_seconds";

/// A system with an ACME server, which knows its second replica by [`NAME`].
struct Scene {
    lab: Lab,
    pebble: Pebble,
    folder: PathBuf,
    flags: Vec<String>,
}

impl Scene {
    async fn new(binding: Option<(&str, &str)>, flags: &[&str]) -> Result<Self> {
        Ok(Self::build(binding, flags, None).await?.0)
    }

    /// One whose server wants certificates renewed in a window that begins and ends so long from now.
    async fn with_windows(window: [time::Duration; 2]) -> Result<(Self, Directory)> {
        let (scene, directory) = Self::build(None, &[], Some(window)).await?;
        Ok((scene, directory.context("no directory")?))
    }

    async fn build(
        binding: Option<(&str, &str)>,
        flags: &[&str],
        window: Option<[time::Duration; 2]>,
    ) -> Result<(Self, Option<Directory>)> {
        let lab = Lab::start(Setup::without_workers()).await?;
        let folder = std::env::temp_dir().join(format!("dermflow-acme-{}", Uuid::new_v4().simple()));
        fs::create_dir_all(&folder)?;
        let ports = Ports::free()?;
        let pebble = Pebble::start(&lab, &folder, &ports, binding).await?;
        let front = match window {
            Some(window) => Some(Directory::start(&lab, &pebble, window).await?),
            None => None,
        };
        let directory = front.as_ref().map_or_else(|| pebble.directory(), |front| front.url().to_owned());
        let ca = lab.ca().display().to_string();
        let all =
            ["--acme-directory", &directory, "--acme-ca", &ca, "--acme-names", NAME, "--acme-agree-to-terms"];
        let mut all: Vec<String> = all.iter().chain(flags).map(|flag| (*flag).to_owned()).collect();
        if let Some((id, key)) = binding {
            let file = folder.join("eab");
            fs::write(&file, key)?;
            all.extend(["--acme-eab-key-id".into(), id.into(), "--acme-eab-key-file".into()]);
            all.push(file.display().to_string());
        }
        let mut scene = Self { lab, pebble, folder, flags: all };
        scene.add_replica(ports).await?;
        Ok((scene, front))
    }

    async fn add_replica(&mut self, ports: Ports) -> Result<()> {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        self.lab.start_ingress(ports, &flags).await
    }

    async fn connect(&self, n: usize, root: &CertificateDer<'static>) -> Result<TlsStream<TcpStream>> {
        connect(self.lab.address(n).port(), root.clone()).await
    }

    /// Returns when replica `n` serves a certificate of this root that is not `but`, and gives that.
    async fn until_served(
        &self,
        n: usize,
        root: &CertificateDer<'static>,
        but: Option<&CertificateDer<'static>>,
    ) -> Result<CertificateDer<'static>> {
        let served = async || {
            let shown = shown(&self.connect(n, root).await.ok()?)?;
            (Some(&shown) != but).then_some(shown)
        };
        eventually("the certificate is served", LONG, served).await
    }

    /// It is time for another certificate.
    async fn make_due(&self) -> Result<()> {
        let due = "UPDATE ingress.acme_certificates SET renew_at = now(), retry_at = NULL";
        self.lab.sql(due).await?;
        Ok(())
    }

    async fn account(&self) -> Result<Account> {
        let row = self.lab.sql("SELECT sealing_key, credentials FROM ingress.acme_accounts").await?;
        let row = row.first().context("no account")?;
        let sealed = Sealed { key_id: row.get(0), bytes: Bytes::from(row.get::<_, Vec<u8>>(1)) };
        ensure!(!sealed.bytes.windows(4).any(|bytes| bytes == b"key_"), "the account's key is not sealed");
        let keyring = Keyring::load(&self.lab.pki().sealing_keys)?;
        let credentials = keyring.open(Content::AcmeAccount(&self.pebble.directory()), &sealed)?;
        let builder = Account::builder_with_root(self.lab.ca())?;
        Ok(builder.from_credentials(serde_json::from_slice(&credentials)?).await?)
    }

    async fn stop(mut self) -> Result<()> {
        self.pebble.stop().await?;
        self.lab.stop().await?;
        Ok(fs::remove_dir_all(self.folder)?)
    }
}

async fn connect(port: u16, root: CertificateDer<'static>) -> Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(root)?;
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let stream = TcpStream::connect(("127.0.0.1", port)).await?;
    Ok(TlsConnector::from(Arc::new(config)).connect(NAME.try_into()?, stream).await?)
}

fn shown(stream: &TlsStream<TcpStream>) -> Option<CertificateDer<'static>> {
    stream.get_ref().1.peer_certificates()?.first().map(|certificate| certificate.clone().into_owned())
}

/// One request on a connection of its own.
async fn ask(port: u16, root: CertificateDer<'static>) -> Result<()> {
    let mut stream = connect(port, root).await?;
    stream.write_all(b"GET /.well-known/jwks.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    ensure!(answer.starts_with(b"HTTP/1.1 200 OK"), "{}", String::from_utf8_lossy(&answer));
    Ok(())
}

// SRS-002: a certificate is obtained by HTTP-01, whichever replica is asked; a further replica serves the same one; both
// serve the next one, and no request fails meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_obtained_shared_and_renewed() -> Result<()> {
    let mut scene = Scene::new(None, &["--acme-contact", "mailto:operators@dermflow.test"]).await?;
    let root = scene.pebble.root().await?;
    let mut served = scene.until_served(1, &root, None).await?;
    scene.add_replica(Ports::free()?).await?;
    assert_eq!(scene.until_served(2, &root, None).await?, served);
    let stop = Arc::new(AtomicBool::new(false));
    let load = [1, 2].map(|n| {
        let (port, root, stop) = (scene.lab.address(n).port(), root.clone(), stop.clone());
        tokio::spawn(async move {
            // Both together stay within what one network may ask without a token.
            let (mut answered, mut pace) = (0, interval(Duration::from_millis(3)));
            while !stop.load(Ordering::Relaxed) {
                pace.tick().await;
                ask(port, root.clone()).await?;
                answered += 1;
            }
            anyhow::Ok(answered)
        })
    });
    for _ in 0..2 {
        scene.make_due().await?;
        let next = scene.until_served(1, &root, Some(&served)).await?;
        assert_eq!(scene.until_served(2, &root, Some(&served)).await?, next);
        served = next;
    }
    stop.store(true, Ordering::Relaxed);
    for load in load {
        let answered = load.await??;
        println!("{answered} requests on connections of their own");
        assert!(answered > 10, "{answered}");
    }
    assert_eq!(scene.lab.count("SELECT count(*) FROM ingress.acme_accounts").await?, 1);
    assert_eq!(scene.lab.count("SELECT count(*) FROM ingress.acme_challenges").await?, 0);
    let sealed = "SELECT count(*) FROM ingress.acme_certificates \
                  WHERE position(convert_to('PRIVATE KEY', 'UTF8') in private_key) = 0";
    assert_eq!(scene.lab.count(sealed).await?, 1);
    let source = "dermflow_tls_certificate_not_after_seconds{source=\"acme\"}";
    assert!(scene.lab.metric_of(2, source).await.context("no metric")? > 0.0);
    assert_eq!(scene.lab.metric_of(2, FAILED).await, Some(0.0));
    scene.stop().await
}

// While the server is away the certificate is served on, and the failure shown; a server that has forgotten the account,
// or was told to end it, gets another account.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_or_forgets_costs_no_certificate() -> Result<()> {
    let mut scene = Scene::new(None, &[]).await?;
    let root = scene.pebble.root().await?;
    let first = scene.until_served(1, &root, None).await?;
    let account = scene.account().await?;
    let id = account.id().to_owned();
    account.deactivate().await?;
    scene.make_due().await?;
    let second = scene.until_served(1, &root, Some(&first)).await?;
    assert_ne!(scene.account().await?.id(), id);

    scene.pebble.stop().await?;
    scene.make_due().await?;
    let failed = async || scene.lab.metric_of(1, FAILED).await.filter(|at| *at > 0.0);
    eventually("the failure is shown", LONG, failed).await?;
    assert_eq!(scene.lab.metric_of(1, "dermflow_acme_error{kind=\"unreachable\"}").await, Some(1.0));
    assert_eq!(scene.until_served(1, &root, Some(&first)).await?, second);

    scene.pebble.restart().await?;
    let root = scene.pebble.root().await?;
    scene.make_due().await?;
    scene.until_served(1, &root, None).await?;
    scene.stop().await
}

// RFC 9773: the server's window decides when a certificate is renewed, and is asked for again when the server says so; a
// window that has begun renews at once, and the order says what it replaces. Debian's Pebble has none of this: a directory
// in front of it adds it.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_when_the_server_wants_it() -> Result<()> {
    let (scene, directory) = Scene::with_windows([20, 21].map(time::Duration::days)).await?;
    let root = scene.pebble.root().await?;
    let first = scene.until_served(1, &root, None).await?;
    let row = async || {
        let select = "SELECT renew_at, ask_at, window_start, window_end FROM ingress.acme_certificates";
        let row = scene.lab.sql(select).await.ok()?.pop()?;
        let [at, again, start, end] = [0, 1, 2, 3].map(|n| row.get::<_, Option<time::OffsetDateTime>>(n));
        Some((at?, again?, [start?, end?]))
    };
    let (at, again, [start, end]) = eventually("the server was asked", LONG, row).await?;
    assert!(start <= at && at <= end && end - start == time::Duration::DAY, "{at} of {start} to {end}");
    let pause = again - clock::now();
    assert!((RETRY_AFTER - 60..=RETRY_AFTER).contains(&pause.whole_seconds()), "{pause}");
    let (asked, replaced) = directory.told();
    assert_eq!((asked.len(), replaced.as_slice()), (1, &[Value::Null][..]));
    // The same window again is no reason for another instant.
    let ask = "UPDATE ingress.acme_certificates SET ask_at = NULL, retry_at = NULL";
    scene.lab.sql(ask).await?;
    let again = async || (directory.told().0.len() == 2).then_some(());
    eventually("it is asked again", LONG, again).await?;
    let (same, ..) = eventually("the answer is noted", LONG, row).await?;
    assert_eq!(same, at);
    directory.suggest([-2, -1].map(time::Duration::hours));
    scene.lab.sql(ask).await?;
    scene.until_served(1, &root, Some(&first)).await?;
    assert_eq!(directory.told().1, [Value::Null, json!(asked[0])]);
    drop(directory);
    scene.stop().await
}

// By TLS-ALPN-01, with a key that the server's operator gave; who speaks that protocol without a challenge gets nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_by_tls_alpn_with_an_external_account() -> Result<()> {
    let binding = ("kid-1", "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W");
    let scene = Scene::new(Some(binding), &["--acme-challenge", "tls-alpn-01"]).await?;
    let root = scene.pebble.root().await?;
    scene.until_served(1, &root, None).await?;
    let mut config = scene.lab.tls(rustls::ALL_VERSIONS)?;
    config.alpn_protocols = vec![b"acme-tls/1".to_vec()];
    let stream = TcpStream::connect(scene.lab.address(1)).await?;
    let refused = TlsConnector::from(Arc::new(config)).connect(NAME.try_into()?, stream).await;
    assert!(refused.is_err(), "a challenge is answered that nobody has set");
    scene.stop().await
}
