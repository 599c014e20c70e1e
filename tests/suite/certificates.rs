//! Certificates of clients: where one is needed, and tokens that are good with one only.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_local::stack::Ports;
use dermflow_tests::{
    authority::{Authority, Identity},
    client::{Answer, Client, sample, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use rustls::{
    ClientConfig, HandshakeKind,
    client::Resumption,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::{TLS12, TLS13},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    batches::{assert_shut_out, until_ended},
    identity::{form, secret, text, token, with},
};

const SOON: Duration = Duration::from_secs(10);
/// What staff changes shows on every replica (I6).
const A_SECOND: Duration = Duration::from_secs(1);
const YEAR: time::Duration = time::Duration::days(365);
const NEEDED: &str = "client-certificate-needed";
const HTTP_BALANCER: &str = "127.0.0.16";

/// A system whose second replica asks for certificates of a CA.
struct Asking {
    lab: Lab,
    folder: PathBuf,
    authority: Authority,
}

impl Asking {
    async fn start(groups: &str) -> Result<Self> {
        let mut lab = Lab::start(Setup::without_workers()).await?;
        let folder = lab.folder("clients")?;
        let authority = Authority::new(&folder, "Clients")?;
        let asking = folder.join("ca.pem");
        fs::write(&asking, authority.pem())?;
        let mut flags =
            vec!["--client-ca", asking.to_str().context("path")?, "--http-balancer", HTTP_BALANCER];
        if !groups.is_empty() {
            flags.extend(["--client-certificates", groups]);
        }
        lab.start_ingress(Ports::free()?, &flags).await?;
        Ok(Self { lab, folder, authority })
    }

    /// A client at the second replica with the token of `demo`, over both versions of HTTP.
    fn with(&self, Identity { cert, key }: &Identity) -> Result<[Client; 2]> {
        let (ca, url, token) = (self.lab.ca(), self.lab.url(1), self.lab.client().token());
        let clients = [
            Client::with_certificate(&ca, &url, cert, key)?,
            Client::with_certificate_over_http2(&ca, &url, cert, key)?,
        ];
        Ok(clients.map(|client| client.with_token(token)))
    }

    fn without(&self) -> Client {
        self.lab.client().clone().at(&self.lab.url(1))
    }

    fn tls(
        &self,
        version: &'static rustls::SupportedProtocolVersion,
        Identity { cert, key }: &Identity,
    ) -> Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.lab.ca())?)?;
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version])?;
        let chain = vec![CertificateDer::from_pem_file(cert)?];
        let builder = builder.with_root_certificates(roots);
        let mut config = builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    async fn connect(&self, config: &ClientConfig, from: &str) -> Result<TlsStream<TcpStream>> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((from.parse::<std::net::IpAddr>()?, 0).into())?;
        let stream = socket.connect(self.lab.address(1)).await?;
        Ok(TlsConnector::from(Arc::new(config.clone())).connect("localhost".try_into()?, stream).await?)
    }

    /// The status of `HEAD /jobs` on a connection that stays open.
    async fn status(&self, stream: &mut TlsStream<TcpStream>) -> Result<u16> {
        let authorization = format!("Authorization: Bearer {}", self.lab.client().token());
        let request = format!("HEAD /jobs HTTP/1.1\r\nHost: localhost\r\n{authorization}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await.context("the connection was closed")?);
        }
        let text = String::from_utf8(answer)?;
        Ok(text.split(' ').nth(1).context("no status")?.parse()?)
    }
}

// The API is closed to who shows no certificate, with one code whatever the token, and open to who shows one; signing in,
// what everybody may know, health and metrics are open to all. The other way round it is the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_routes_needs_a_certificate() -> Result<()> {
    let mut asking = Asking::start("api").await?;
    let identity = asking.authority.certify("device", YEAR)?;
    for client in asking.with(&identity)? {
        assert_eq!(client.get("/jobs").await?.status, 200);
        assert_eq!(client.get("/nothing").await?.status, 404);
        client.submit(&sample("ham10000-nv.jpg")).await?;
    }
    let without = asking.without();
    for client in [&without, &without.clone().with_token(""), &without.clone().with_token("nonsense")] {
        for path in ["/jobs", "/fhir/Task", "/fhir/DiagnosticReport/1", "/batches/1"] {
            let answer = client.get(path).await?;
            assert_eq!((answer.status, answer.code()), (403, NEEDED), "{path}");
        }
        let answer = client.analyze(&sample("ham10000-nv.jpg"), &[]).await?;
        assert_eq!((answer.status, answer.code()), (403, NEEDED));
        assert_eq!(client.get("/nothing").await?.status, 404);
        for path in ["/.well-known/jwks.json", "/fhir/.well-known/smart-configuration"] {
            assert_eq!(client.get(path).await?.status, 200, "{path}");
        }
    }
    let recorded =
        "SELECT count(*) FROM auth.audit WHERE action = 'access' AND code = 'client-certificate-needed'";
    assert!(asking.lab.count(recorded).await? > 0);
    let password = asking.lab.password("demo")?;
    assert_eq!(without.try_login("demo", &password).await?.status, 200);
    assert!(asking.lab.metric_of(1, "dermflow_waiters").await.is_some());
    // Whoever ends TLS in front has a certificate of its own, which is none of its callers'.
    let config = asking.tls(&TLS13, &identity)?;
    assert_eq!(asking.status(&mut asking.connect(&config, "127.0.0.1").await?).await?, 200);
    assert_eq!(asking.status(&mut asking.connect(&config, HTTP_BALANCER).await?).await?, 403);
    let ca = asking.folder.join("ca.pem").display().to_string();
    let flags = ["--client-ca", &ca, "--client-certificates", "sign-in,operators"];
    asking.lab.start_ingress(Ports::free()?, &flags).await?;
    let other = without.at(&asking.lab.url(2));
    let answer = other.try_login("demo", &password).await?;
    assert_eq!((answer.status, answer.code()), (403, NEEDED));
    assert_eq!(other.get("/jobs").await?.status, 200);
    asking.lab.stop().await
}

// The operators' API is closed to who shows no certificate, whatever the token; what describes it is open.
#[tokio::test(flavor = "multi_thread")]
async fn operators_need_a_certificate() -> Result<()> {
    let mut asking = Asking::start("").await?;
    let ca = asking.folder.join("ca.pem").display().to_string();
    let identity = asking.authority.certify("desk", YEAR)?;
    let flags = ["--client-ca", &ca, "--client-certificates", "operators"];
    let without = asking.lab.start_operate_with("olga", &flags).await?;
    let url = asking.lab.operate_url()?;
    for client in [&without, &without.clone().with_token(""), &without.clone().with_token("nonsense")] {
        for (method, path) in
            [("GET", "/dead"), ("GET", "/dead/1"), ("DELETE", "/dead/1"), ("POST", "/dead/1/requeue")]
        {
            let answer = send(client.request(method.parse()?, path)).await?;
            assert_eq!((answer.status, answer.code()), (403, NEEDED), "{method} {path}");
        }
        assert_eq!(client.get("/openapi.json").await?.status, 200);
    }
    for with in asking.with(&identity)? {
        let with = with.at(&url);
        assert_eq!(with.clone().with_token(without.token()).get("/dead").await?.status, 200);
        assert_eq!(with.clone().with_token("").get("/dead").await?.status, 401);
        assert_eq!(with.get("/dead").await?.status, 403, "a client's token");
    }
    let recorded =
        "SELECT count(*) FROM auth.audit WHERE action = 'access' AND code = 'client-certificate-needed'";
    assert!(asking.lab.count(recorded).await? > 0);
    // The other groups are none of its business.
    let flags = ["--client-ca", &ca, "--client-certificates", "api,sign-in"];
    let without = asking.lab.start_operate_with("oleg", &flags).await?;
    assert_eq!(without.get("/dead").await?.status, 200);
    asking.lab.stop().await
}

// A certificate of another CA and one that has ended fail the handshake. What is taken out of the file is good for nothing
// from then on, on open connections too, and what is put back is good again there.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_good_while_its_ca_is_in_the_file() -> Result<()> {
    let asking = Asking::start("api").await?;
    let (other, file) = (Authority::new(&asking.folder, "Others")?, asking.folder.join("ca.pem"));
    let good = asking.authority.certify("good", YEAR)?;
    let foreign = other.certify("foreign", YEAR)?;
    let over = asking.authority.certify("over", -time::Duration::HOUR)?;
    for identity in [&foreign, &over] {
        for client in asking.with(identity)? {
            assert!(client.get("/.well-known/jwks.json").await.is_err(), "the handshake was to fail");
        }
    }
    let config = asking.tls(&TLS13, &good)?;
    let mut kept = asking.connect(&config, "127.0.0.1").await?;
    assert_eq!(asking.status(&mut kept).await?, 200);
    fs::write(&file, "")?;
    let taken_over =
        async || asking.with(&foreign).ok()?[0].get("/jobs").await.ok().filter(|a| a.status == 200);
    fs::write(&file, other.pem())?;
    eventually("the other CA is believed", SOON, taken_over).await?;
    assert_eq!(asking.status(&mut kept).await?, 403);
    assert!(asking.with(&good)?[0].get("/jobs").await.is_err());
    fs::write(&file, [other.pem(), asking.authority.pem()].concat())?;
    let back = async || asking.with(&good).ok()?[0].get("/jobs").await.ok().filter(|a| a.status == 200);
    eventually("both are believed", SOON, back).await?;
    assert_eq!(asking.status(&mut kept).await?, 200);
    // A file without a certificate changes nothing.
    fs::write(&file, "nonsense")?;
    let noticed =
        async || asking.lab.logs().ok()?.contains("the CA of clients stays as it was").then_some(());
    eventually("the file is refused", SOON, noticed).await?;
    assert_eq!(asking.with(&good)?[0].get("/jobs").await?.status, 200);
    // One that ends while its connection is open.
    let short = asking.authority.certify("short", time::Duration::seconds(3))?;
    let mut kept = asking.connect(&asking.tls(&TLS13, &short)?, "127.0.0.1").await?;
    assert_eq!(asking.status(&mut kept).await?, 200);
    let end = tokio::time::Instant::now() + SOON;
    while asking.status(&mut kept).await? == 200 {
        ensure!(tokio::time::Instant::now() < end, "a certificate that has ended is good");
    }
    assert_eq!(asking.status(&mut kept).await?, 403);
    asking.lab.stop().await
}

// An upload ends with its certificate: of a token that is bound to it, and where a certificate is needed.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_does_not_outlive_its_certificate() -> Result<()> {
    let mut asking = Asking::start("").await?;
    let ca = asking.folder.join("ca.pem").display().to_string();
    let flags = ["--client-ca", &ca, "--client-certificates", "api"];
    asking.lab.start_ingress(Ports::free()?, &flags).await?;
    let (secret, demo) = (secret(&asking.lab, "demo")?, asking.lab.client().token());
    for (replica, is_bound, code) in [(1, true, "unauthenticated"), (2, false, NEEDED)] {
        let short = asking.authority.certify("short", time::Duration::seconds(4))?;
        let [http_1, http_2] = asking.with(&short)?;
        let client = if is_bound { http_1 } else { http_2 };
        let given = token(&client, &secret, "").await?;
        let token = if is_bound { text(&given, "access_token") } else { demo };
        let client = client.at(&asking.lab.url(replica)).with_token(token);
        assert_shut_out(&until_ended(&client, async { Ok(()) }).await?, code);
    }
    asking.lab.stop().await
}

// No session is resumed on a listener that asks, whatever a client keeps: every connection proves its certificate anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_session_does_not_outlive_its_certificate() -> Result<()> {
    let asking = Asking::start("").await?;
    let identity = asking.authority.certify("device", YEAR)?;
    for version in [&TLS12, &TLS13] {
        let mut config = asking.tls(version, &identity)?;
        config.resumption = Resumption::in_memory_sessions(8);
        for _ in 0..3 {
            let mut stream = asking.connect(&config, "127.0.0.1").await?;
            assert_eq!(asking.status(&mut stream).await?, 200);
            assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        }
    }
    // Without a CA of clients it is, so the client can do it.
    let mut config = asking.tls(&TLS13, &identity)?;
    config.resumption = Resumption::in_memory_sessions(8);
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let stream = TcpStream::connect(asking.lab.address(0)).await?;
        let connector = TlsConnector::from(Arc::new(config.clone()));
        let mut stream = connector.connect("localhost".try_into()?, stream).await?;
        asking.status(&mut stream).await?;
        kinds.push(stream.get_ref().1.handshake_kind());
    }
    assert_eq!(kinds, [Some(HandshakeKind::Full), Some(HandshakeKind::Resumed)]);
    asking.lab.stop().await
}

/// The claims of an access token, as nobody but its issuer has to read them.
fn claims(token: &str) -> Result<Value> {
    let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1).context("no token")?)?;
    Ok(serde_json::from_slice(&claims)?)
}

fn bound_to(identity: &Identity) -> Result<Value> {
    Ok(json!({"x5t#S256": URL_SAFE_NO_PAD.encode(identity.sha256()?)}))
}

fn is_refused(answer: &Answer) -> bool {
    (answer.status, answer.code()) == (401, "unauthenticated")
        && answer.header("www-authenticate").contains("invalid_token")
}

async fn refresh(client: &Client, [id, _, secret]: &[String; 3], token: &str) -> Result<Answer> {
    let fields = [
        ("grant_type", "refresh_token"),
        ("client_id", id),
        ("client_secret", secret),
        ("refresh_token", token),
    ];
    form(&client.clone().with_token(""), "/oauth/token", &fields).await
}

// RFC 8705 §3: what is asked for over a connection with a certificate is good on connections with that one only, over both
// versions of HTTP and on every replica, whichever way the client has signed in; a listener that asks for none cannot tell.
// Refresh tokens go on with their certificate only, and give tokens that are bound to it.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_with_the_certificate_that_it_was_given_for() -> Result<()> {
    let mut asking = Asking::start("").await?;
    let ca = asking.folder.join("ca.pem").display().to_string();
    asking.lab.start_ingress(Ports::free()?, &["--client-ca", &ca]).await?;
    let lab = &asking.lab;
    let [own, other] = ["own", "other"].map(|name| asking.authority.certify(name, YEAR));
    let (own, other) = (own?, other?);
    let (secret, password, without) = (secret(lab, "demo")?, lab.password("demo")?, asking.without());
    let ([own_1, own_2], others) = (asking.with(&own)?, asking.with(&other)?);
    let tokens = [
        token(&own_1, &secret, "system/DiagnosticReport.rs").await?,
        token(&own_2, &secret, "system/DiagnosticReport.rs").await?,
        own_1.try_login("demo", &password).await?,
    ];
    for given in &tokens {
        assert_eq!(given.status, 200, "{}", given.text);
        let bound = text(given, "access_token");
        assert_eq!(claims(bound)?["cnf"], bound_to(&own)?);
        for good in [&own_1, &own_2, &own_1.clone().at(&lab.url(2)), &own_2.clone().at(&lab.url(2))] {
            assert_eq!(with(good, given).get("/jobs").await?.status, 200);
        }
        for bad in [&without, &others[0], &others[1], &others[0].clone().at(&lab.url(2)), lab.client()] {
            assert!(is_refused(&with(bad, given).get("/jobs").await?));
        }
        // Nor does it open what is about tokens.
        let about = form(&with(&others[0], given), "/oauth/introspect", &[("token", bound)]).await?;
        assert_eq!((about.status, text(&about, "error")), (401, "invalid_client"));
        let about = form(&with(&own_1, given), "/oauth/introspect", &[("token", bound)]).await?;
        assert_eq!((&about.body["active"], &about.body["cnf"]), (&json!(true), &bound_to(&own)?));
    }
    let unbound = token(&without, &secret, "").await?;
    assert_eq!(claims(text(&unbound, "access_token"))?["cnf"], Value::Null);
    assert_eq!(with(&others[0], &unbound).get("/jobs").await?.status, 200);

    let mut last = token(&own_1, &secret, "offline_access").await?;
    for good in [&own_2, &own_1, &own_1.clone().at(&lab.url(2))] {
        let spent = text(&last, "refresh_token");
        for bad in [&without, &others[0], lab.client()] {
            assert_eq!(refresh(bad, &secret, spent).await?.body["error"], "invalid_grant");
        }
        let about = [("client_id", &*secret[0]), ("client_secret", &*secret[2]), ("token", spent)];
        let about = form(&without.clone().with_token(""), "/oauth/introspect", &about).await?;
        assert_eq!((&about.body["active"], &about.body["cnf"]), (&json!(true), &bound_to(&own)?));
        last = refresh(good, &secret, spent).await?;
        assert_eq!(claims(text(&last, "access_token"))?["cnf"], bound_to(&own)?);
        assert!(is_refused(&with(&others[0], &last).get("/jobs").await?));
    }
    // One that was begun without goes on as it likes, and what comes of it is bound where it is asked for.
    let free = token(&without, &secret, "offline_access").await?;
    let bound = refresh(&others[0], &secret, text(&free, "refresh_token")).await?;
    assert_eq!(claims(text(&bound, "access_token"))?["cnf"], bound_to(&other)?);
    let free = refresh(&without, &secret, text(&bound, "refresh_token")).await?;
    assert_eq!(claims(text(&free, "access_token"))?["cnf"], Value::Null);
    asking.lab.stop().await
}

// Of a client whose tokens must be bound, others are refused within a second, and none is given without a certificate.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_may_be_held_to_bound_tokens() -> Result<()> {
    let asking = Asking::start("").await?;
    let lab = &asking.lab;
    let own = asking.authority.certify("own", YEAR)?;
    let (secret, password, without) = (secret(lab, "demo")?, lab.password("demo")?, asking.without());
    let bound = token(&asking.with(&own)?[0], &secret, "offline_access").await?;
    let free = token(&without, &secret, "offline_access").await?;
    // What another client's certificate, of the same CA, has made of a family that was begun without one.
    let other = &asking.with(&asking.authority.certify("other", YEAR)?)?[0];
    let others = refresh(other, &secret, text(&free, "refresh_token")).await?;
    assert_eq!(with(other, &others).get("/jobs").await?.status, 200);
    for client in [lab.client(), &without] {
        assert_eq!(client.get("/jobs").await?.status, 200);
    }
    lab.auth(&["user", "change", "demo", "--certificate-bound", "true"])?;
    assert!(lab.auth(&["user", "show", "demo"])?.contains("\"certificate_bound\": true"));
    for client in [lab.client(), &without] {
        let refused = async || client.get("/jobs").await.ok().filter(is_refused);
        eventually("a token that is not bound is refused", A_SECOND, refused).await?;
    }
    let own = &asking.with(&own)?[0];
    assert_eq!(with(own, &bound).get("/jobs").await?.status, 200);
    assert_eq!(with(own, &token(own, &secret, "").await?).get("/jobs").await?.status, 200);
    for answer in [token(&without, &secret, "").await?, without.try_login("demo", &password).await?] {
        assert_eq!((answer.status, text(&answer, "error")), (400, "invalid_request"), "{}", answer.text);
    }
    let refused = async || with(other, &others).get("/jobs").await.ok().filter(is_refused);
    eventually("what came of the unbound family is refused", A_SECOND, refused).await?;
    // Nor does one go on that a build from before, which ends none, has left.
    let put_back = "INSERT INTO auth.refresh_tokens (hash, family, account, credential, scope, expires_at) \
                    SELECT $1, gen_random_uuid(), account, credential, scope, expires_at \
                    FROM auth.refresh_tokens WHERE certificate IS NOT NULL";
    let left = text(&others, "refresh_token");
    for is_left in [false, true] {
        if is_left {
            // As the programs do, and not in clear.
            let hash = digest(&SHA256, left.as_bytes()).as_ref().to_vec();
            assert_eq!(lab.pool("dermflow_auth")?.get().await?.execute(put_back, &[&hash]).await?, 1);
        }
        for client in [&without, own, other] {
            assert_eq!(refresh(client, &secret, left).await?.body["error"], "invalid_grant");
        }
    }
    assert_eq!(refresh(own, &secret, text(&bound, "refresh_token")).await?.status, 200);
    let told =
        "SELECT count(*) FROM auth.audit WHERE action = 'login' AND code = 'client-certificate-needed'";
    assert_eq!(lab.count(told).await?, 2);
    lab.auth(&["user", "change", "demo", "--certificate-bound", "false"])?;
    let back = async || without.get("/jobs").await.ok().filter(|answer| answer.status == 200);
    eventually("it is as before", A_SECOND, back).await?;
    for (client, asks) in [(lab.client(), false), (&without, true)] {
        for path in ["/.well-known/oauth-authorization-server", "/fhir/.well-known/smart-configuration"] {
            let document = client.get(path).await?.body;
            assert_eq!(document["tls_client_certificate_bound_access_tokens"], asks);
            let ways = document["token_endpoint_auth_methods_supported"].as_array().context("no ways")?;
            assert_eq!(ways.contains(&json!("tls_client_auth")), asks);
        }
    }
    asking.lab.stop().await
}

// RFC 8705 §2: a certificate that staff has noted is all that a client needs to prove itself, as long as it is noted.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_a_credential() -> Result<()> {
    let asking = Asking::start("").await?;
    let lab = &asking.lab;
    let [own, other] = ["own", "other"].map(|name| asking.authority.certify(name, YEAR));
    let (own, other) = (own?, other?);
    let add = |name: &str, file: &std::path::Path| {
        lab.auth(&["credential", "add", name, "--label", "device", "--certificate", &file.to_string_lossy()])
    };
    assert!(add("demo", &own.key).is_err(), "a file without a certificate");
    let added: Value = serde_json::from_str(&add("demo", &own.cert)?)?;
    let (id, credential) = (added["client_id"].as_str().context("no id")?, added["credential"].as_str());
    let credential = credential.context("no credential")?;
    assert!(lab.auth(&["user", "show", "demo"])?.contains("\"kind\": \"certificate\""));
    let stranger = lab.register("stranger").await?;
    let stranger = claims(stranger.token())?["sub"].as_str().context("no sub")?.to_owned();
    let ask = async |client: &Client, id: &str| {
        let fields = [("grant_type", "client_credentials"), ("client_id", id)];
        form(&client.clone().with_token(""), "/oauth/token", &fields).await
    };
    let own_clients = asking.with(&own)?;
    for client in &own_clients {
        let given = ask(client, id).await?;
        assert_eq!(
            (given.status, claims(text(&given, "access_token"))?["cnf"].clone()),
            (200, bound_to(&own)?)
        );
        assert_eq!(with(client, &given).get("/jobs").await?.status, 200);
    }
    let kept = with(&own_clients[0], &ask(&own_clients[0], id).await?);
    for (client, id) in [
        (&own_clients[0], stranger.as_str()),
        (&own_clients[0], "demo"),
        (&asking.with(&other)?[0], id),
        (&asking.without(), id),
        (lab.client(), id),
    ] {
        let answer = ask(client, id).await?;
        assert_eq!((answer.status, text(&answer, "error")), (401, "invalid_client"), "{id}");
    }
    lab.auth(&["credential", "remove", "demo", credential, "--yes"])?;
    assert_eq!(ask(&own_clients[0], id).await?.status, 401);
    let refused = async || kept.get("/jobs").await.ok().filter(is_refused);
    eventually("what was given for it is refused", A_SECOND, refused).await?;
    asking.lab.stop().await
}
