//! Tokens of an identity provider that is not ours: Authlib's authorization server.

use std::{fmt::Write as _, fs, net::TcpListener, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_local::{
    servers::python_packages,
    stack::{Ports, repo},
};
use dermflow_tests::{
    authority::{Authority, Identity},
    client::{Answer, Client, sample, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use futures_util::future::try_join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::Mutex,
    time::{Instant, sleep_until},
};

/// What staff changes shows within this time (I6).
const SOON: Duration = Duration::from_secs(1);
/// How long the opaque tokens live that live for moments only.
const MOMENTS: Duration = Duration::from_secs(3);
/// How long a provider's word on an opaque token may hold.
const WORD: Duration = Duration::from_mins(1);
/// Between two looks at a provider's keys that unknown ones may cause.
const PAUSE: Duration = Duration::from_secs(30);

/// The provider, in a process and a folder of its own.
struct Provider {
    process: Child,
    pipes: Mutex<(ChildStdin, Lines<BufReader<ChildStdout>>)>,
    folder: PathBuf,
    issuer: String,
    secrets: Value,
    client: Client,
}

impl Provider {
    async fn start() -> Result<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let pins = fs::read_to_string(repo().join("tests/oauth/requirements.txt"))?;
        let libs = python_packages(repo(), "oauth", &pins, |step| println!("{step}")).await?;
        let folder = std::env::temp_dir().join(format!("dermflow-idp-{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir_all(&folder)?;
        let mut process = Command::new("python3")
            .arg(repo().join("tests/oauth/provider.py"))
            .arg("--libs")
            .arg(libs)
            .arg(&folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let input = process.stdin.take().context("no stdin")?;
        let mut lines = BufReader::new(process.stdout.take().context("no stdout")?).lines();
        let about: Value = serde_json::from_str(&lines.next_line().await?.context("no provider")?)?;
        let text = |name: &str| about[name].as_str().unwrap_or_default().to_owned();
        let client = Client::new(text("ca").as_ref(), &text("issuer"))?;
        let (issuer, secrets) = (text("issuer"), about["secrets"].clone());
        Ok(Self { process, pipes: Mutex::new((input, lines)), folder, issuer, secrets, client })
    }

    /// The file for ingress, with further lines for the provider. More algorithms are allowed than the provider's keys
    /// are for: those must tell by themselves.
    fn config(&self, more: &str) -> Result<PathBuf> {
        let path = self.folder.join("providers.toml");
        let secret = self.secrets["dermflow"].as_str().context("no secret")?;
        fs::write(self.folder.join("secret"), secret)?;
        let mut text = format!(
            "[[provider]]\nissuer = {:?}\naudience = \"https://dermflow.example\"\n\
             algorithms = [\"RS256\", \"PS256\", \"ES256\", \"ES384\"]\nca_file = \"provider-ca.pem\"\n{more}",
            self.issuer
        );
        for (value, role) in [("submit", "integrator"), ("audit", "auditor")] {
            write!(
                text,
                "[[provider.role]]\nclaim = \"/realm/roles\"\nvalue = \"{value}\"\nrole = \"{role}\"\n"
            )?;
        }
        fs::write(&path, text)?;
        Ok(path)
    }

    fn introspection(&self) -> String {
        format!(
            "introspection_url = \"{}/introspect\"\nclient_id = \"dermflow\"\nclient_secret_file = \"secret\"\n",
            self.issuer
        )
    }

    async fn form(&self, client: &str, path: &str, fields: &[(&str, &str)]) -> Result<Answer> {
        let request =
            self.client.request(Method::POST, path).basic_auth(client, self.secrets[client].as_str());
        send(request.form(fields)).await
    }

    /// A token as Authlib gives it to a client of this name.
    async fn token(&self, client: &str) -> Result<String> {
        let answer = self.form(client, "/token", &[("grant_type", "client_credentials")]).await?;
        Ok(answer.body["access_token"].as_str().context(answer.text.clone())?.to_owned())
    }

    async fn command(&self, command: Value) -> Result<Value> {
        let mut pipes = self.pipes.lock().await;
        pipes.0.write_all(format!("{command}\n").as_bytes()).await?;
        Ok(serde_json::from_str(&pipes.1.next_line().await?.context("the provider is gone")?)?)
    }

    /// A token like those of `device`, with changes.
    async fn signed(&self, header: Value, claims: Value) -> Result<String> {
        let answer = self.command(json!({"do": "sign", "header": header, "claims": claims})).await?;
        Ok(answer["token"].as_str().context("no token")?.to_owned())
    }

    /// The same token with the other form of its ECDSA signature.
    async fn twin(&self, token: &str) -> Result<String> {
        let answer = self.command(json!({"do": "twin", "token": token})).await?;
        Ok(answer["token"].as_str().context("no token")?.to_owned())
    }

    /// Requests so far.
    async fn count(&self, path: &str) -> Result<u64> {
        Ok(self.command(json!({"do": "counts"})).await?[path].as_u64().unwrap_or(0))
    }

    async fn kill(&mut self) -> Result<()> {
        Ok(self.process.kill().await?)
    }

    async fn stop(mut self) -> Result<()> {
        self.kill().await?;
        Ok(fs::remove_dir_all(self.folder)?)
    }
}

fn link(lab: &Lab, what: &str, account: &str, provider: &Provider, subject: &str) -> Result<String> {
    lab.auth(&["user", what, account, "--issuer", &provider.issuer, "--subject", subject])
}

async fn until_status(what: &str, within: Duration, client: &Client, status: u16) -> Result<()> {
    let mut last = String::new();
    let seen = async || {
        let answer = client.get("/jobs").await.ok()?;
        last = format!("{} {}", answer.status, answer.text);
        (answer.status == status).then_some(())
    };
    eventually(what, within, seen).await.context(last)
}

// A provider's token opens the account that staff has linked, as far as claims and role both go, and no longer than staff
// wants.
#[tokio::test(flavor = "multi_thread")]
async fn a_providers_token_opens_a_linked_account() -> Result<()> {
    let provider = Provider::start().await?;
    let setup = Setup { replicas: 2, providers: Some(provider.config("")?), ..Setup::without_workers() };
    let lab = Lab::start(setup).await?;
    let theirs = |token: &str| lab.client().clone().with_token(token);
    let device = theirs(&provider.token("device").await?);
    let nobody = device.get("/jobs").await?;
    assert_eq!((nobody.status, nobody.code()), (401, "unauthenticated"), "linked to no account");

    link(&lab, "link", "demo", &provider, "device")?;
    until_status("a linked subject is let in", 3 * SOON, &device, 200).await?;
    assert!(link(&lab, "link", "demo", &provider, "device").is_err(), "twice");
    assert!(lab.auth(&["user", "link", "demo", "--issuer", "x", "--subject", "y"]).is_err());
    let shown: Value = serde_json::from_str(&lab.auth(&["user", "show", "demo"])?)?;
    let linked = json!([{"issuer": provider.issuer, "subject": "device"}]);
    assert_eq!(shown["external_identities"], linked);
    // One account, whichever token opens it; and nobody else's.
    let job = device.submit(&sample("ham10000-nv.jpg")).await?;
    assert_eq!(lab.client().get(&format!("/jobs/{job}")).await?.status, 200);
    assert_eq!(device.get(&format!("/jobs/{job}")).await?.status, 200);
    let other = lab.register("other").await?;
    link(&lab, "link", "other", &provider, "device-ec")?;
    let elliptic = theirs(&provider.token("device-ec").await?);
    until_status("another algorithm, another account", 3 * SOON, &elliptic, 200).await?;
    assert_eq!(elliptic.get(&format!("/jobs/{job}")).await?.status, 404);
    let own = elliptic.submit(&sample("ham10000-nv.jpg")).await?;
    assert_eq!(other.get(&format!("/jobs/{own}")).await?.status, 200);

    // The claims grant the auditor's role, the account has the integrator's: neither is enough.
    lab.register("third").await?;
    link(&lab, "link", "third", &provider, "reader")?;
    let reader = theirs(&provider.token("reader").await?);
    until_status("a role that only the provider grants", 3 * SOON, &reader, 403).await?;
    assert_eq!(reader.get("/fhir/AuditEvent").await?.status, 403);
    lab.auth(&["user", "change", "third", "--role", "auditor", "--yes"])?;
    // The tokens from before the change are refused; Authlib's and ours count whole seconds.
    let allowed = async || {
        let token = provider.token("reader").await.ok()?;
        (theirs(&token).get("/fhir/AuditEvent").await.ok()?.status == 200).then_some(())
    };
    eventually("a role that both grant", 3 * SOON, allowed).await?;

    let refused =
        async |what: &str, there: Client| until_status(what, SOON, &there.at(&lab.url(1)), 401).await;
    assert_eq!(device.clone().at(&lab.url(1)).get("/jobs").await?.status, 200);
    lab.auth(&["user", "disable", "demo"])?;
    refused("a disabled account", device.clone()).await?;
    // Or the first replica would take a token of the second in which the account was disabled.
    until_status("a disabled account, at the other replica", SOON, &device, 401).await?;
    lab.auth(&["user", "enable", "demo"])?;
    let device = theirs(&{
        let fresh = async || {
            let token = provider.token("device").await.ok()?;
            (theirs(&token).get("/jobs").await.ok()?.status == 200).then_some(token)
        };
        eventually("an enabled account", 3 * SOON, fresh).await?
    });
    until_status("on both replicas", 3 * SOON, &device.clone().at(&lab.url(1)), 200).await?;
    assert!(link(&lab, "unlink", "other", &provider, "device").is_err(), "another account's");
    link(&lab, "unlink", "demo", &provider, "device")?;
    refused("an unlinked subject", device).await?;
    assert_eq!(elliptic.clone().at(&lab.url(1)).get("/jobs").await?.status, 200);
    lab.auth(&["user", "delete", "other", "--yes"])?;
    refused("a deleted account", elliptic).await?;
    assert_eq!(lab.count("SELECT count(*) FROM auth.external_identities").await?, 1, "the auditor's");

    let actions = "SELECT count(*) FROM auth.audit WHERE outcome = 'success' AND action = ";
    assert_eq!(lab.count(&format!("{actions}'identity-linked'")).await?, 3);
    assert_eq!(lab.count(&format!("{actions}'identity-unlinked'")).await?, 1);
    let login =
        format!("{actions}'login' AND detail->>'issuer' = '{}' AND object = '{}'", provider.issuer, {
            shown["id"].as_str().unwrap_or_default()
        });
    // A token is an event a replica: two tokens, two replicas.
    assert_eq!(lab.count(&login).await?, 4);
    lab.stop().await?;
    provider.stop().await
}

// What is not exactly a token of the provider for us is refused, and nothing in a token makes ingress connect anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_provider_did_not_sign_for_us_is_refused() -> Result<()> {
    let provider = Provider::start().await?;
    let setup = Setup { providers: Some(provider.config("")?), ..Setup::without_workers() };
    let lab = Lab::start(setup).await?;
    link(&lab, "link", "demo", &provider, "device")?;
    let trap = TcpListener::bind("127.0.0.1:0")?;
    trap.set_nonblocking(true)?;
    let url = format!("https://localhost:{}/keys", trap.local_addr()?.port());
    let good = lab.client().clone().with_token(&provider.signed(json!({}), json!({})).await?);
    until_status("a good token", 3 * SOON, &good, 200).await?;
    let bad = [
        (json!({}), json!({"aud": "https://other.example"})),
        (json!({}), json!({"aud": null})),
        (json!({}), json!({"iss": "https://other.example"})),
        (json!({}), json!({"iss": format!("{}/", provider.issuer)})),
        (json!({}), json!({"iss": lab.url(0)})),
        (json!({}), json!({"iss": url})),
        (json!({}), json!({"sub": "stranger"})),
        (json!({}), json!({"sub": null})),
        (json!({}), json!({"exp": 1})),
        (json!({}), json!({"exp": null})),
        (json!({}), json!({"iat": null})),
        (json!({}), json!({"nbf": 4_102_444_800_u64})),
        (json!({}), json!({"cnf": {"jkt": "x"}})),
        (json!({}), json!({"cnf": {"x5t#S256": "A".repeat(43)}})),
        (json!({"alg": "HS256"}), json!({})),
        (json!({"alg": "none"}), json!({})),
        (json!({"alg": "PS256"}), json!({})),
        (json!({"alg": "RS384"}), json!({})),
        (json!({"alg": "ES384"}), json!({})),
        (json!({"typ": "JWT"}), json!({})),
        (json!({"typ": null}), json!({})),
        (json!({"kid": null}), json!({})),
        (json!({"kid": "x".repeat(2_000)}), json!({})),
        (json!({"kid": "x".repeat(10_240)}), json!({})),
        (json!({"crit": ["exp"]}), json!({})),
        (json!({"jku": url}), json!({})),
        (json!({"jku": url, "kid": "theirs"}), json!({})),
        (json!({"x5u": url}), json!({})),
        (json!({"x5u": url, "kid": "theirs"}), json!({})),
        (json!({"kid": url}), json!({})),
    ];
    for (header, claims) in bad {
        let token = provider.signed(header.clone(), claims.clone()).await?;
        let answer = lab.client().clone().with_token(&token).get("/jobs").await?;
        assert_eq!((answer.status, answer.code()), (401, "unauthenticated"), "{header} {claims}");
    }
    // Nobody is asked about opaque tokens, as none is configured for that.
    let opaque = lab.client().clone().with_token(&provider.token("device-opaque").await?);
    assert_eq!(opaque.get("/jobs").await?.status, 401);
    assert_eq!(provider.count("/introspect").await?, 0);
    let connected = trap.accept().map(|(_, from)| from);
    assert!(
        matches!(&connected, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock),
        "{connected:?}"
    );
    assert_eq!(good.get("/jobs").await?.status, 200);
    lab.stop().await?;
    provider.stop().await
}

// RFC 8705 §3: a token that its provider has bound to a certificate is good on connections with that one, and nowhere else.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_a_provider_has_bound_is_good_with_its_certificate() -> Result<()> {
    let provider = Provider::start().await?;
    let config = provider.config("")?;
    let mut lab = Lab::start(Setup { providers: Some(config.clone()), ..Setup::without_workers() }).await?;
    let folder = lab.folder("clients")?;
    let (authority, ca) = (Authority::new(&folder, "Clients")?, folder.join("ca.pem"));
    fs::write(&ca, authority.pem())?;
    let (ca, config) = (ca.display().to_string(), config.display().to_string());
    lab.start_ingress(Ports::free()?, &["--client-ca", &ca, "--providers", &config]).await?;
    link(&lab, "link", "demo", &provider, "device")?;
    let life = time::Duration::days(1);
    let (own, other) = (authority.certify("own", life)?, authority.certify("other", life)?);
    let with = |identity: &Identity, token: &str| -> Result<Client> {
        let client = Client::with_certificate(&lab.ca(), &lab.url(1), &identity.cert, &identity.key)?;
        Ok(client.with_token(token))
    };
    let thumbprint = URL_SAFE_NO_PAD.encode(own.sha256()?);
    let bound = provider.signed(json!({}), json!({"cnf": {"x5t#S256": thumbprint}})).await?;
    until_status("a bound token with its certificate", 3 * SOON, &with(&own, &bound)?, 200).await?;
    for bad in [with(&other, &bound)?, lab.client().clone().at(&lab.url(1)).with_token(&bound)] {
        let answer = bad.get("/jobs").await?;
        assert_eq!((answer.status, answer.code()), (401, "unauthenticated"));
    }
    assert_eq!(with(&own, &provider.signed(json!({}), json!({})).await?)?.get("/jobs").await?.status, 200);
    for cnf in [json!({"jkt": "x"}), json!({"x5t#S256": thumbprint, "jkt": "x"})] {
        let token = provider.signed(json!({}), json!({"cnf": cnf})).await?;
        assert_eq!(with(&own, &token)?.get("/jobs").await?.status, 401, "{cnf}");
    }
    lab.auth(&["user", "change", "demo", "--certificate-bound", "true"])?;
    let free = with(&own, &provider.signed(json!({}), json!({})).await?)?;
    until_status("one that is not bound", SOON, &free, 401).await?;
    assert_eq!(with(&own, &bound)?.get("/jobs").await?.status, 200);
    lab.stop().await?;
    provider.stop().await
}

// Of an ECDSA signature there are two forms, and who has one can make the other. What staff revokes is refused in both: it
// goes by the account and by when a token was issued, never by its bytes. A single token of a provider is for the provider
// to revoke, and has no place at `/oauth/revoke`; the `jti` by which it would be refused is the same in both forms too.
#[tokio::test(flavor = "multi_thread")]
async fn the_other_form_of_a_revoked_token_is_refused() -> Result<()> {
    let provider = Provider::start().await?;
    let setup = Setup { providers: Some(provider.config("")?), ..Setup::without_workers() };
    let lab = Lab::start(setup).await?;
    link(&lab, "link", "demo", &provider, "device")?;
    let pair = async || {
        let token = provider.signed(json!({"alg": "ES256"}), json!({})).await?;
        let twin = provider.twin(&token).await?;
        ensure!(twin != token);
        anyhow::Ok([token, twin].map(|token| lab.client().clone().with_token(&token)))
    };
    let ([first, first_twin], [second, unseen_twin]) = (pair().await?, pair().await?);
    until_status("a good token", 3 * SOON, &first, 200).await?;
    for (what, good) in [("the other form is as good", &first_twin), ("another token", &second)] {
        assert_eq!(good.get("/jobs").await?.status, 200, "{what}");
    }
    let logins = "SELECT count(*) FROM auth.audit WHERE action = 'login' AND detail ? 'issuer'";
    let before = lab.count(logins).await?;
    for _ in 0..10 {
        assert_eq!((first.get("/jobs").await?.status, first_twin.get("/jobs").await?.status), (200, 200));
    }
    assert_eq!(lab.count(logins).await?, before, "both forms are one sign-in");
    lab.auth(&["user", "revoke", "demo"])?;
    until_status("a revoked token", SOON, &first, 401).await?;
    for (what, revoked) in [("seen", &first_twin), ("one form seen", &second), ("unseen", &unseen_twin)] {
        let answer = revoked.get("/jobs").await?;
        assert_eq!((answer.status, answer.code()), (401, "unauthenticated"), "{what}");
    }
    lab.stop().await?;
    provider.stop().await
}

// A provider's word on an opaque token holds no longer than the token lives, even where words usually hold for longer, and
// even when the provider is away by then.
#[tokio::test(flavor = "multi_thread")]
async fn an_opaque_token_is_refused_from_its_end_on() -> Result<()> {
    let mut provider = Provider::start().await?;
    let config = provider.config(&provider.introspection())?;
    let lab = Lab::start(Setup { providers: Some(config), ..Setup::without_workers() }).await?;
    link(&lab, "link", "demo", &provider, "device-opaque")?;
    let theirs = |token: &str| lab.client().clone().with_token(token);
    let long = theirs(&provider.token("device-opaque").await?);
    until_status("a token that lives long", 3 * SOON, &long, 200).await?;
    let began = Instant::now();
    provider.command(json!({"do": "live", "seconds": MOMENTS.as_secs()})).await?;

    let asked = provider.count("/introspect").await?;
    let short = theirs(&provider.token("device-opaque").await?);
    let given = Instant::now();
    assert_eq!(short.get("/jobs").await?.status, 200);
    sleep_until(given + MOMENTS).await;
    let ended = short.get("/jobs").await?;
    assert_eq!((ended.status, ended.code()), (401, "unauthenticated"));
    assert_eq!(provider.count("/introspect").await? - asked, 2, "when it was new, and at its end");

    let short = theirs(&provider.token("device-opaque").await?);
    let given = Instant::now();
    assert_eq!(short.get("/jobs").await?.status, 200);
    provider.kill().await?;
    sleep_until(given + MOMENTS).await;
    let ended = short.get("/jobs").await?;
    assert_eq!((ended.status, ended.code()), (503, "provider-unavailable"), "nobody can tell");
    assert_eq!(long.get("/jobs").await?.status, 200, "its word still holds");
    assert!(began.elapsed() < WORD / 2, "too slow to tell");
    lab.stop().await?;
    provider.stop().await
}

// Keys change at the provider; unknown ones cost it little; opaque tokens are asked about; and then it is away.
#[tokio::test(flavor = "multi_thread")]
async fn a_provider_changes_its_keys_and_goes_away() -> Result<()> {
    let mut provider = Provider::start().await?;
    let config = provider.config(&provider.introspection())?;
    let lab = Lab::start(Setup { providers: Some(config), ..Setup::without_workers() }).await?;
    link(&lab, "link", "demo", &provider, "device-opaque")?;
    // Last: who sees it has seen the other one.
    link(&lab, "link", "demo", &provider, "device")?;
    let theirs = |token: &str| lab.client().clone().with_token(token);

    let before = theirs(&provider.token("device").await?);
    until_status("the first keys", 3 * SOON, &before, 200).await?;
    // Once for everybody who asks at the same time, and once for a while.
    let revoked = provider.token("device-opaque").await?;
    let asked = provider.count("/introspect").await?;
    let twenty = try_join_all((0..20).map(|_| async { theirs(&revoked).get("/jobs").await })).await?;
    assert!(twenty.iter().all(|answer| answer.status == 200), "{:?}", twenty[0]);
    let vouched = Instant::now();
    assert_eq!(theirs(&revoked).get("/jobs").await?.status, 200);
    assert_eq!(provider.count("/introspect").await? - asked, 1);
    let form = [("token", revoked.as_str())];
    assert_eq!(provider.form("device-opaque", "/revoke", &form).await?.status, 200);
    let nonsense = theirs("2YotnFZFEjr1zCsicMWpAA");
    for _ in 0..5 {
        assert_eq!(nonsense.get("/jobs").await?.status, 401);
    }
    assert_eq!(provider.count("/introspect").await? - asked, 2, "that it is none is remembered too");
    // A secret of ours that is sent in the wrong place goes no further.
    let password = lab.password("demo")?;
    let fields = [("username", "demo"), ("password", password.as_str()), ("scope", "offline_access")];
    let login = send(theirs("").request(Method::POST, "/login").form(&fields)).await?;
    let refresh = login.body["refresh_token"].as_str().context("no refresh token")?;
    for secret in [refresh, "dfr_2YotnFZFEjr1zCsicMWpAA"] {
        assert_eq!(theirs(secret).get("/jobs").await?.status, 401);
    }
    assert_eq!(provider.count("/introspect").await? - asked, 2);

    provider.command(json!({"do": "rotate"})).await?;
    let after = theirs(&provider.token("device").await?);
    let looks = provider.count("/jwks").await?;
    let rotated = Instant::now();
    assert_eq!(after.get("/jobs").await?.status, 200, "a new key, at once");
    assert_eq!(provider.count("/jwks").await? - looks, 1);
    assert_eq!(before.get("/jobs").await?.status, 401, "a key that the provider has withdrawn");

    let unknown = async |kid: String| -> Result<()> {
        let token = provider.signed(json!({ "kid": kid }), json!({})).await?;
        ensure!(theirs(&token).get("/jobs").await?.status == 401);
        Ok(())
    };
    let flood = async || try_join_all((0..100).map(|n| unknown(format!("made-up-{n}")))).await;
    let looks = provider.count("/jwks").await?;
    flood().await?;
    assert!(rotated.elapsed() < PAUSE, "too slow to tell");
    assert_eq!(provider.count("/jwks").await?, looks, "not within 30 s");
    sleep_until(rotated + PAUSE).await;
    let looks = provider.count("/jwks").await?;
    let began = Instant::now();
    flood().await?;
    flood().await?;
    assert!(began.elapsed() < PAUSE / 2, "too slow to tell");
    assert_eq!(provider.count("/jwks").await? - looks, 1, "200 unknown keys, one look");

    assert!(vouched.elapsed() < WORD, "too slow to tell");
    assert_eq!(theirs(&revoked).get("/jobs").await?.status, 200, "its word still holds");
    sleep_until(vouched + WORD).await;
    assert_eq!(theirs(&revoked).get("/jobs").await?.status, 401, "revoked at the provider");

    let (vouched_for, unseen) =
        (provider.token("device-opaque").await?, provider.token("device-opaque").await?);
    assert_eq!(theirs(&vouched_for).get("/jobs").await?.status, 200);
    let later = theirs(&provider.token("device").await?);
    provider.kill().await?;
    assert_eq!(later.get("/jobs").await?.status, 200, "a key that is known");
    assert_eq!(theirs(&vouched_for).get("/jobs").await?.status, 200, "a token that was vouched for");
    let away = theirs(&unseen).get("/jobs").await?;
    assert_eq!((away.status, away.code()), (503, "provider-unavailable"));
    assert!(!away.header("retry-after").is_empty());
    lab.stop().await?;
    provider.stop().await
}
