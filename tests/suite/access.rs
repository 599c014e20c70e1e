//! Who gets in, and over what.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use dermflow_tests::{
    client::{Client, sample, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use reqwest::Method;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

// SRS-008, SWR-009: only a registered name with its password gets a token; wrong names and wrong passwords
// look the same.
#[tokio::test(flavor = "multi_thread")]
async fn login_takes_registered_clients_only() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let anonymous = lab.client().clone().with_token("");
    let unknown = anonymous.try_login("nobody", "wrong").await?;
    let wrong = anonymous.try_login("demo", "wrong").await?;
    assert_eq!((unknown.status, unknown.code()), (401, "login-failed"));
    assert_eq!((wrong.status, &wrong.text), (401, &unknown.text));
    let form = anonymous.request(Method::POST, "/login").form(&[("username", "demo")]);
    assert_eq!(send(form).await?.code(), "element-missing");
    let other = anonymous.request(Method::POST, "/login").json(&["demo"]);
    assert_eq!(send(other).await?.code(), "form-invalid");
    let long = anonymous.try_login("demo", &"x".repeat(10_000)).await?;
    assert_eq!((long.status, long.code()), (413, "body-too-large"));
    let odd = anonymous.try_login("a\0b", "wrong").await?;
    assert_eq!((odd.status, &odd.text), (401, &unknown.text));
    let good = anonymous.try_login("demo", &lab.password("demo")?).await?;
    // As the device API has it.
    assert_eq!(good.body["token_type"], "Bearer token");
    assert_eq!((&good.body["expires_in"], &good.body["expires_in_minutes"]), (&900.into(), &15.into()));
    let stored = lab.sql("SELECT password_hash FROM auth.users").await?;
    assert!(stored.iter().all(|row| row.get::<_, &str>(0).starts_with("$argon2id$")));
    lab.stop().await
}

// I6: a disabled user is refused on every replica within a second, token or not, and after a restart too.
#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_user_is_refused_everywhere_within_a_second() -> Result<()> {
    let mut lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    let (path, other) = (format!("/jobs/{job}"), lab.register("other").await?);
    let replicas = [lab.client().clone(), lab.client().clone().at(&lab.url(1))];
    for replica in &replicas {
        assert_eq!(replica.get(&path).await?.status, 200);
    }
    lab.auth(&["user", "disable", "demo"])?;
    let refused = async || {
        for replica in &replicas {
            (replica.get(&path).await.ok()?.status == 401).then_some(())?;
        }
        Some(())
    };
    eventually("both replicas refuse", Duration::from_secs(1), refused).await?;
    let again = lab.client().try_login("demo", &lab.password("demo")?).await?;
    assert_eq!((again.status, again.code()), (401, "login-failed"));
    assert_eq!(other.get(&path).await?.status, 404, "another user is not touched");
    lab.kill_ingress(0).await?;
    lab.restart_ingress(0).await?;
    assert_eq!(replicas[0].get(&path).await?.status, 401);
    assert!(lab.auth(&["user", "disable", "nobody"]).is_err());
    lab.stop().await
}

// SWR-009: the account that ingress uses can read users and nothing else there.
#[tokio::test(flavor = "multi_thread")]
async fn ingress_cannot_register_anybody() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    lab.sql("SET ROLE dermflow_ingress").await?;
    lab.sql("SELECT username FROM auth.users").await?;
    let insert = "INSERT INTO auth.users SELECT gen_random_uuid(), 'eve', 'x', false, now()";
    for forbidden in [insert, "UPDATE auth.users SET disabled = false", "DELETE FROM auth.users"] {
        let refused = lab.sql(forbidden).await.unwrap_err().to_string();
        assert!(refused.contains("permission denied") || refused.contains("db error"), "{refused}");
    }
    lab.stop().await
}

// SRS-002, PLAN_005: plain HTTP is answered with 308 for every path and method, and no body is read.
#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_redirected_unread() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    for (method, path) in [("GET", "/"), ("POST", "/login"), ("DELETE", "/fhir/_async/x?y=1"), ("BREW", "/z")]
    {
        let mut stream = TcpStream::connect(lab.plain_address()).await?;
        // The body is announced and never sent: an answer shows that nobody waited for it.
        let request =
            format!("{method} {path} HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 1000000\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        assert!(answer.starts_with("HTTP/1.1 308 "), "{answer}");
        assert!(
            answer.to_lowercase().contains(&format!("location: {}{path}\r\n", lab.url(0)).to_lowercase()),
            "{answer}"
        );
    }
    lab.stop().await
}

// OWASP ASVS 5.0 4.1.2: a token that was sent in clear is redirected unprocessed, refused from then on, and in the trail;
// another token of the same client, and words that are no token, change nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_sent_in_clear_is_good_no_longer() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let careless = lab.register("careless").await?;
    let careful = Client::new(&lab.ca(), &lab.url(0))?.login("careless", &lab.password("careless")?).await?;
    let path = format!("/fhir/_async/{}", uuid::Uuid::new_v4());
    assert_eq!(careless.get(&path).await?.status, 404);
    for token in ["nonsense", careless.token(), careless.token()] {
        let authorization = format!("Authorization: Bearer {token}");
        assert!(in_clear(&lab, "POST /jobs", &authorization).await?.starts_with("HTTP/1.1 308 "));
        let open = if token == "nonsense" { 404 } else { 401 };
        assert_eq!(careless.get(&path).await?.status, open);
        assert_eq!(careful.get(&path).await?.status, 404);
    }
    assert!(in_clear(&lab, "POST /login", "Accept: */*").await?.starts_with("HTTP/1.1 308 "));
    for action in ["token-revoked", "login"] {
        let recorded = format!(
            "SELECT count(*) FROM auth.audit WHERE action = '{action}' AND detail->>'reason' = 'sent-in-clear'"
        );
        assert_eq!(lab.count(&recorded).await?, 1, "{action}");
    }
    lab.stop().await
}

/// A plain request whose body is announced and never sent.
async fn in_clear(lab: &Lab, line: &str, header: &str) -> Result<String> {
    let mut stream = TcpStream::connect(lab.plain_address()).await?;
    let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\n{header}\r\nContent-Length: 9\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

// SRS-002: TLS 1.2 and 1.3 are spoken, plain text on the TLS port is not, and a stalled handshake is dropped
// while others are served.
#[tokio::test(flavor = "multi_thread")]
async fn tls_only_and_stalled_handshakes_block_nobody() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let mut stalled = Vec::new();
    for _ in 0..50 {
        stalled.push(TcpStream::connect(lab.address(0)).await?);
    }
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let stream = TcpStream::connect(lab.address(0)).await?;
        let connector = tokio_rustls::TlsConnector::from(Arc::new(lab.tls(&[version])?));
        let stream = connector.connect("localhost".try_into()?, stream).await.context("handshake")?;
        assert_eq!(stream.get_ref().1.protocol_version(), Some(version.version));
    }
    let mut plain = TcpStream::connect(lab.address(0)).await?;
    plain.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"), "plain text was answered");
    // The server hangs up on its own: reading to the end returns within the handshake's time-out.
    for mut stream in stalled {
        let mut nothing = Vec::new();
        let _ = stream.read_to_end(&mut nothing).await;
    }
    lab.stop().await
}

// Health and metrics are on the internal listener, and only there.
#[tokio::test(flavor = "multi_thread")]
async fn health_and_metrics_are_internal() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let internal = Client::new(&lab.ca(), &lab.internal_url(0))?;
    assert_eq!(internal.get("/livez").await?.status, 200);
    assert_eq!(internal.get("/readyz").await?.status, 200);
    let metrics = internal.get("/metrics").await?;
    assert!(metrics.text.contains("dermflow_http_requests_total"), "{}", metrics.text);
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(lab.client().get(path).await?.status, 404);
    }
    lab.stop().await
}

// Every answer carries the security headers and a request id, the caller's own when it is fit to be logged.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_dressed() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let request = lab.client().request(Method::GET, "/nothing").header("x-request-id", "abc-1");
    let answer = send(request).await?;
    assert_eq!(answer.header("x-request-id"), "abc-1");
    assert_eq!(answer.header("strict-transport-security"), "max-age=63072000");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(answer.header("server"), "");
    let unfit = lab.client().request(Method::GET, "/nothing").header("x-request-id", "a b");
    assert_ne!(send(unfit).await?.header("x-request-id"), "a b");
    lab.stop().await
}
