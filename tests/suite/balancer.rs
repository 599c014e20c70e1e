//! Behind balancers: limits and audit trail go by the caller's own address, and nobody but a balancer can say which one
//! that is.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use dermflow_local::stack::Ports;
use dermflow_schemas::limits::{MAX_CONNECTIONS, PROXY_HEADER_TIMEOUT};
use dermflow_tests::{
    balancer::{Balancer, SIGNATURE, connect, local, version_1, version_2},
    client::{Answer, Client, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use reqwest::Method;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use uuid::Uuid;

/// Who has to send a PROXY header.
const BALANCER: &str = "127.0.0.8";
const OTHER_BALANCER: &str = "127.0.0.9";
/// Whose `Forwarded` counts.
const HTTP_BALANCER: &str = "127.0.0.16";
const INNER_HTTP_BALANCER: &str = "127.0.0.17";
const STRANGER: &str = "127.0.0.5";
const CALLER: &str = "192.0.2.7";
const CALLER_OF_V6: &str = "2001:db8:7::1";
/// Another address of the same /64.
const NEIGHBOUR: &str = "2001:db8:7::ffff:9";
const OTHER_CALLER: &str = "198.51.100.9";
const OTHER_CALLER_OF_V6: &str = "2001:db8:8::1";

const SOON: Duration = Duration::from_secs(5);
/// Until a header's deadline has certainly ended.
const DEADLINE: Duration = Duration::from_secs(PROXY_HEADER_TIMEOUT.as_secs() + 3);
const JWKS: &str = "/.well-known/jwks.json";
const PROXY_REFUSED: &str = "dermflow_proxy_headers_refused_total";
const TURNED_AWAY: &str = "dermflow_connections_turned_away_total";

fn ip(address: &str) -> Result<IpAddr> {
    Ok(address.parse()?)
}

/// A system whose second replica is behind the balancers.
struct Behind {
    lab: Lab,
    https: SocketAddr,
    plain: SocketAddr,
}

impl Behind {
    async fn start(flags: &[&str]) -> Result<Self> {
        let mut lab = Lab::start(Setup::without_workers()).await?;
        let ports = Ports::free()?;
        let balancers = ["--balancer", "127.0.0.8/31", "--http-balancer", "127.0.0.16,127.0.0.17"];
        lab.start_ingress(ports, &[&balancers, flags].concat()).await?;
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Ok(Self { lab, https: at(ports.https), plain: at(ports.plain) })
    }

    /// A client, not signed in, whose connections come through a balancer with this header.
    async fn through(&self, header: Vec<u8>) -> Result<(Balancer, Client)> {
        let balancer = Balancer::start(ip(BALANCER)?, self.https, header).await?;
        let client = Client::new(&self.lab.ca(), &balancer.url())?;
        Ok((balancer, client))
    }

    /// A client, not signed in, with another address of this machine.
    fn from(&self, address: &str) -> Result<Client> {
        Client::from_source(&self.lab.ca(), &self.lab.url(1), ip(address)?)
    }

    async fn handshake(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>> {
        let connector = TlsConnector::from(Arc::new(self.lab.tls(rustls::ALL_VERSIONS)?));
        Ok(timeout(SOON, connector.connect("localhost".try_into()?, stream)).await??)
    }

    /// Sends a request that is refused, and gives the address that the trail has for it.
    async fn source_of(&self, client: &Client, headers: &[(&str, &str)]) -> Result<String> {
        let id = Uuid::new_v4();
        let mut request = client.request(Method::GET, "/jobs").header("x-request-id", id.to_string());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = send(request).await?;
        ensure!(answer.status == 401, "{} {}", answer.status, answer.text);
        let rows = self.lab.sql(&format!("SELECT source FROM auth.audit WHERE request = '{id}'")).await?;
        Ok(rows.first().context("not in the trail")?.get(0))
    }

    /// Events that say that something was sent in clear, from this address.
    async fn in_clear(&self, action: &str, source: &str) -> Result<i64> {
        let found = format!(
            "SELECT count(*) FROM auth.audit WHERE action = '{action}' AND source = '{source}' \
             AND detail->>'reason' = 'sent-in-clear'"
        );
        self.lab.count(&found).await
    }
}

/// What is left of the requests of the caller's network.
fn left(answer: &Answer) -> Result<u64> {
    let field = answer.header("ratelimit");
    let left = field.split(';').find_map(|part| part.strip_prefix("r="));
    Ok(left.with_context(|| format!("no RateLimit: {field}"))?.parse()?)
}

/// A plain request, and everything that comes back.
async fn plain(mut stream: TcpStream, header: &[u8], request: &str) -> Result<String> {
    stream.write_all(&[header, request.as_bytes()].concat()).await?;
    let mut answer = Vec::new();
    // A connection that is closed before it was read to its end is reset.
    let _ = timeout(SOON, stream.read_to_end(&mut answer)).await.context("not closed")?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

// A balancer's PROXY header says who calls, in IPv4 and IPv6, version 1 and 2: that address is in the trail, and what it
// asks for counts for its network and no other. Health checks, which the balancer sends for itself, are the balancer's.
#[tokio::test(flavor = "multi_thread")]
async fn trail_and_rates_go_by_the_caller_behind_a_balancer() -> Result<()> {
    let behind = Behind::start(&[]).await?;
    let password = behind.lab.password("demo")?;
    for (caller, neighbour, stranger) in
        [(CALLER, CALLER, OTHER_CALLER), (CALLER_OF_V6, NEIGHBOUR, OTHER_CALLER_OF_V6)]
    {
        let (_first, client) = behind.through(version_2(ip(caller)?)).await?;
        let (_second, neighbour_of_it) = behind.through(version_1(ip(neighbour)?)).await?;
        let (_third, other) = behind.through(version_2(ip(stranger)?)).await?;
        assert_eq!(behind.source_of(&client, &[]).await?, caller);
        assert_eq!(behind.source_of(&neighbour_of_it, &[]).await?, neighbour);
        assert_eq!(client.try_login("demo", &password).await?.status, 200);
        let login = "SELECT count(*) FROM auth.audit WHERE action = 'login' AND outcome = 'success'";
        assert_eq!(behind.lab.count(&format!("{login} AND source = '{caller}'")).await?, 1, "{caller}");
        for _ in 0..20 {
            assert_eq!(client.get(JWKS).await?.status, 200);
        }
        let (here, there) = (left(&neighbour_of_it.get(JWKS).await?)?, left(&other.get(JWKS).await?)?);
        // Twenty documents, two refusals, a login, and the last request.
        assert!(here <= 10_000 - 24, "{caller}: {here}");
        // One, and what the other replica may have let through in the same moment.
        assert!(there >= 10_000 - 2, "{stranger}: {there}");
    }
    let (_balancer, health_check) = behind.through(local()).await?;
    assert_eq!(behind.source_of(&health_check, &[]).await?, BALANCER);
    // `Forwarded` is for HTTP balancers to write, and this caller is none.
    let (_balancer, client) = behind.through(version_2(ip(CALLER)?)).await?;
    let forwarded = [("forwarded", "for=203.0.113.1"), ("x-forwarded-for", "203.0.113.1")];
    assert_eq!(behind.source_of(&client, &forwarded).await?, CALLER);
    behind.lab.stop().await
}

// A network has its number of connections, whichever balancers they come through, and the balancers' callers do not take
// each other's.
#[tokio::test(flavor = "multi_thread")]
async fn connections_are_counted_for_the_caller_behind_a_balancer() -> Result<()> {
    const MOST: usize = 3;
    let behind = Behind::start(&["--network-connections", &MOST.to_string()]).await?;
    let open = async |balancer: &str, caller: &str| {
        let mut stream = connect(ip(balancer)?, behind.https).await?;
        stream.write_all(&version_2(ip(caller)?)).await?;
        behind.handshake(stream).await
    };
    let mut turned_away = 0.0;
    for (caller, neighbour, other) in
        [(CALLER, CALLER, OTHER_CALLER), (CALLER_OF_V6, NEIGHBOUR, OTHER_CALLER_OF_V6)]
    {
        let mut kept = Vec::new();
        for n in 0..MOST {
            kept.push(open(if n == 0 { OTHER_BALANCER } else { BALANCER }, caller).await?);
        }
        assert!(open(BALANCER, neighbour).await.is_err(), "{neighbour} has one more than it may");
        assert!(open(OTHER_BALANCER, caller).await.is_err(), "{caller} has one more than it may");
        turned_away += 2.0;
        assert_eq!(behind.lab.metric_of(1, TURNED_AWAY).await, Some(turned_away));
        open(BALANCER, other).await.context("another caller")?;
        drop(kept);
        let served = async || open(BALANCER, neighbour).await.ok();
        eventually("who left makes room", SOON, served).await?;
        turned_away = behind.lab.metric_of(1, TURNED_AWAY).await.context("no metric")?;
    }
    behind.lab.stop().await
}

// Who is no balancer and sends what one would send is not believed: a PROXY header is garbage like any other, and
// `Forwarded` is not read.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_cannot_choose_its_address() -> Result<()> {
    let behind = Behind::start(&[]).await?;
    let stranger = behind.from(STRANGER)?;
    let spoofed = ip("203.0.113.1")?;
    for header in [version_2(spoofed), version_1(spoofed), local()] {
        let mut stream = connect(ip(STRANGER)?, behind.https).await?;
        stream.write_all(&header).await?;
        assert!(behind.handshake(stream).await.is_err(), "a stranger's header was taken off");
        let stream = connect(ip(STRANGER)?, behind.plain).await?;
        let answer = plain(stream, &header, "POST /login HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
        assert!(!answer.contains(" 308 "), "{answer}");
    }
    let forwarded = "for=203.0.113.1";
    let headers =
        [("forwarded", forwarded), ("x-forwarded-for", "203.0.113.1"), ("x-real-ip", "203.0.113.1")];
    assert_eq!(behind.source_of(&stranger, &headers).await?, STRANGER);
    let stream = connect(ip(STRANGER)?, behind.plain).await?;
    let request = format!("POST /login HTTP/1.1\r\nHost: localhost\r\nForwarded: {forwarded}\r\n\r\n");
    assert!(plain(stream, &[], &request).await?.starts_with("HTTP/1.1 308 "));
    assert_eq!(behind.in_clear("login", STRANGER).await?, 1);
    let events = "SELECT count(*) FROM auth.audit WHERE source = '203.0.113.1'";
    assert_eq!(behind.lab.count(events).await?, 0, "somebody chose its address");
    // The internal listener has no balancer in front, whatever the address.
    let internal = Client::from_source(&behind.lab.ca(), &behind.lab.internal_url(1), ip(BALANCER)?)?;
    assert_eq!(internal.get("/livez").await?.status, 200);
    behind.lab.stop().await
}

// A balancer's connection that does not begin with a PROXY header is closed, at once when it begins with anything else,
// and at the deadline when the rest never comes or comes drop by drop, on both listeners.
#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_that_says_nothing_is_hung_up_on() -> Result<()> {
    let behind = Behind::start(&[]).await?;
    let whole = version_2(ip(CALLER)?);
    let oversized = [SIGNATURE, &[0x21, 0x11, 0xff, 0xff], &[0; 5_000]].concat();
    let client_hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec();
    let http = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
    for to in [behind.https, behind.plain] {
        for (what, bytes, at_once) in [
            ("TLS", client_hello.clone(), true),
            ("HTTP", http.clone(), true),
            ("a header that is too long", oversized.clone(), true),
            ("nothing", Vec::new(), false),
            ("half a header", whole[..20].to_vec(), false),
            ("half a line", b"PROXY TCP4 192.0.2.7".to_vec(), false),
        ] {
            let (begun, mut stream) = (Instant::now(), connect(ip(BALANCER)?, to).await?);
            stream.write_all(&bytes).await?;
            let mut answer = Vec::new();
            let closed = timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
            let _ = closed.with_context(|| format!("{what} keeps its connection"))?;
            assert!(answer.is_empty(), "{what}: {answer:?}");
            let at_once_indeed = begun.elapsed() < PROXY_HEADER_TIMEOUT;
            assert_eq!(at_once_indeed, at_once, "{what}: closed after {:?}", begun.elapsed());
        }
        // A byte at each look: all of it would take a minute.
        let mut stream = connect(ip(BALANCER)?, to).await?;
        let mut drops = [SIGNATURE, &[0x21, 0x11, 0x0f, 0xff], &[0; 0x0fff]].concat().into_iter();
        let closed = async || {
            let drop = drops.next()?;
            if stream.write_all(&[drop]).await.is_err() {
                return Some(());
            }
            let mut byte = [0];
            match stream.try_read(&mut byte) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => None,
                _ => Some(()),
            }
        };
        eventually("a header that comes drop by drop is cut off", DEADLINE, closed).await?;
    }
    assert_eq!(behind.lab.metric_of(1, PROXY_REFUSED).await, Some(14.0));
    behind.lab.stop().await
}

// Connections whose caller is not known yet have places of the listener's, no more than there are, and only until the
// deadline: then others are served. They count for nobody's network.
#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_of_a_balancer_do_not_keep_their_places() -> Result<()> {
    let behind = Behind::start(&[]).await?;
    let direct = behind.from(STRANGER)?;
    let begun = Instant::now();
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(connect(ip(BALANCER)?, behind.https).await?);
    }
    assert_eq!(direct.get(JWKS).await?.status, 503);
    // Until the first of them have to go.
    let served = async || (direct.get(JWKS).await.ok()?.status == 200).then_some(());
    eventually("others are served", DEADLINE, served).await?;
    let waited = begun.elapsed();
    println!("served after {waited:?}");
    assert!((PROXY_HEADER_TIMEOUT..DEADLINE).contains(&waited), "{waited:?}");
    for mut stream in silent {
        let end = timeout(DEADLINE, stream.read_u8()).await.context("a silent connection is kept")?;
        assert!(end.is_err());
    }
    assert_eq!(behind.lab.metric_of(1, TURNED_AWAY).await, Some(0.0));
    assert_eq!(behind.lab.metric_of(1, PROXY_REFUSED).await, Some(MAX_CONNECTIONS as f64));
    let (_balancer, client) = behind.through(version_2(ip(CALLER)?)).await?;
    assert_eq!(client.get(JWKS).await?.status, 200);
    behind.lab.stop().await
}

// The listener for plain HTTP is behind the same balancers: a token that is sent there in clear is revoked and recorded
// with its caller's address.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_in_clear_through_a_balancer_is_recorded_with_its_caller() -> Result<()> {
    let behind = Behind::start(&[]).await?;
    for (caller, header) in
        [(CALLER, version_2(ip(CALLER)?)), (CALLER_OF_V6, version_1(ip(CALLER_OF_V6)?)), (BALANCER, local())]
    {
        let careless = Client::new(&behind.lab.ca(), &behind.lab.url(0))?
            .login("demo", &behind.lab.password("demo")?)
            .await?;
        let authorization = format!("Authorization: Bearer {}", careless.token());
        let request = format!("POST /jobs HTTP/1.1\r\nHost: localhost\r\n{authorization}\r\n\r\n");
        let stream = connect(ip(BALANCER)?, behind.plain).await?;
        assert!(plain(stream, &header, &request).await?.starts_with("HTTP/1.1 308 "), "{caller}");
        assert_eq!(behind.in_clear("token-revoked", caller).await?, 1, "{caller}");
    }
    // An HTTP balancer names its caller there, too.
    let request =
        "POST /login HTTP/1.1\r\nHost: localhost\r\nForwarded: for=203.0.113.1, for=192.0.2.7\r\n\r\n";
    let stream = connect(ip(HTTP_BALANCER)?, behind.plain).await?;
    assert!(plain(stream, &[], request).await?.starts_with("HTTP/1.1 308 "));
    assert_eq!(behind.in_clear("login", CALLER).await?, 1);
    behind.lab.stop().await
}

// An HTTP balancer names the caller of each request at the end of `Forwarded`; what the caller has written there itself,
// to the left, does not win, and without an address it is the balancer that called.
#[tokio::test(flavor = "multi_thread")]
async fn trail_and_rates_go_by_the_caller_that_an_http_balancer_names() -> Result<()> {
    let behind = Behind::start(&[]).await?;
    let balancer = behind.from(HTTP_BALANCER)?;
    let spoof = "for=203.0.113.1";
    for (appended, caller) in [
        ("for=192.0.2.7", CALLER),
        ("for=\"[2001:db8:7::1]:4711\";proto=https;host=\"x, for=203.0.113.1\"", CALLER_OF_V6),
        ("for=192.0.2.7, for=127.0.0.17", CALLER),
        ("for=unknown", HTTP_BALANCER),
        ("for=_hidden", HTTP_BALANCER),
        ("for=nonsense", HTTP_BALANCER),
    ] {
        for written in [spoof, "for=\"203.0.113.1", "for=127.0.0.17", ";=,\"\\\""] {
            let field = format!("{written}, {appended}");
            // Questions of one network that are more than five a second are recorded as one event.
            let source = async || behind.source_of(&balancer, &[("forwarded", &field)]).await.ok();
            assert_eq!(eventually(&field, SOON, source).await?, caller, "{field}");
        }
    }
    assert_eq!(behind.source_of(&balancer, &[("x-forwarded-for", "203.0.113.1")]).await?, HTTP_BALANCER);
    // In front of it a balancer that passes connections on: the PROXY header names the HTTP balancer.
    let (_balancer, both) = behind.through(version_2(ip(INNER_HTTP_BALANCER)?)).await?;
    let field = format!("{spoof}, for={OTHER_CALLER}, for={HTTP_BALANCER}");
    assert_eq!(behind.source_of(&both, &[("forwarded", &field)]).await?, OTHER_CALLER);
    // On one connection each request counts for its own caller.
    let ask = async |caller: &str| {
        let request =
            balancer.request(Method::GET, JWKS).header("forwarded", format!("{spoof}, for={caller}"));
        left(&send(request).await?)
    };
    for n in 1..=10 {
        let left = ask("203.0.113.50").await?;
        assert!(left <= 10_000 - n, "{left} after {n}");
    }
    let (there, here) = (ask("203.0.113.51").await?, ask("203.0.113.50").await?);
    assert!(there >= 10_000 - 2 && here <= 10_000 - 11, "{there} and {here}");
    behind.lab.stop().await
}
