//! How clients prove who they are, and how soon they stop being believed.

use std::{
    fs,
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_auth::token::{Grant, Tokens};
use dermflow_local::{servers::python_packages, stack::repo};
use dermflow_schemas::clock;
use dermflow_tests::{
    chaos::Mode,
    client::{Answer, Client, send},
    lab::{Lab, Link, Setup},
    wait::eventually,
};
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

/// What is revoked on one replica is refused on the others within this time (I6).
const SOON: Duration = Duration::from_secs(1);
/// All that is said of a token that is none (RFC 7662 §2.2).
const INACTIVE: &str = r#"{"active":false}"#;

pub(crate) async fn form(client: &Client, path: &str, fields: &[(&str, &str)]) -> Result<Answer> {
    send(client.request(Method::POST, path).form(fields)).await
}

/// A secret of `name`: client id, credential id, secret.
pub(crate) fn secret(lab: &Lab, name: &str) -> Result<[String; 3]> {
    let added: Value = serde_json::from_str(&lab.auth(&["credential", "add", name, "--label", "test"])?)?;
    let text = |name: &str| added[name].as_str().unwrap_or_default().to_owned();
    Ok([text("client_id"), text("credential"), text("client_secret")])
}

pub(crate) async fn token(client: &Client, [id, _, secret]: &[String; 3], scope: &str) -> Result<Answer> {
    let fields = [
        ("grant_type", "client_credentials"),
        ("client_id", id.as_str()),
        ("client_secret", secret.as_str()),
        ("scope", scope),
    ];
    form(&client.clone().with_token(""), "/oauth/token", &fields).await
}

/// Uses a refresh token, as the client that a secret is of, or as nobody.
async fn refresh(client: &Client, proof: Option<&[String; 3]>, token: &str) -> Result<Answer> {
    let mut fields = vec![("grant_type", "refresh_token"), ("refresh_token", token)];
    fields.extend(proof.into_iter().flat_map(|[id, _, secret]| proves(id, secret)));
    form(&client.clone().with_token(""), "/oauth/token", &fields).await
}

/// Introspects or revokes a token, as the client that a secret is of.
async fn about(client: &Client, path: &str, [id, _, secret]: &[String; 3], token: &str) -> Result<Answer> {
    let fields = [&proves(id, secret)[..], &[("token", token)]].concat();
    form(&client.clone().with_token(""), path, &fields).await
}

fn proves<'a>(id: &'a str, secret: &'a str) -> [(&'static str, &'a str); 2] {
    [("client_id", id), ("client_secret", secret)]
}

pub(crate) fn text<'a>(answer: &'a Answer, name: &str) -> &'a str {
    answer.body[name].as_str().unwrap_or_default()
}

pub(crate) fn with(client: &Client, answer: &Answer) -> Client {
    client.clone().with_token(answer.body["access_token"].as_str().unwrap_or_default())
}

async fn python(arguments: &[&str], input: &str) -> Result<String> {
    let pins = fs::read_to_string(repo().join("tests/oauth/requirements.txt"))?;
    let libs = python_packages(repo(), "oauth", &pins, |step| println!("{step}")).await?;
    let mut script = Command::new("python3")
        .arg(repo().join("tests/oauth/authlib_client.py"))
        .arg("--libs")
        .arg(libs)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    script.stdin.take().context("no stdin")?.write_all(input.as_bytes()).await?;
    let output = script.wait_with_output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

// A library of the ecosystem signs in by secret and by key, refreshes, revokes and introspects.
#[tokio::test(flavor = "multi_thread")]
async fn authlib_signs_in_in_every_way() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let [id, _, secret] = secret(&lab, "demo")?;
    let folder = tempfolder()?;
    let path = folder.to_string_lossy().into_owned();
    python(&["keys", &path], "").await?;
    for algorithm in ["ES384", "RS384"] {
        let key = folder.join(format!("{algorithm}.jwk"));
        lab.auth(&["credential", "add", "demo", "--label", algorithm, "--key", &key.to_string_lossy()])?;
        let private = folder.join(format!("{algorithm}.pem"));
        let refused =
            lab.auth(&["credential", "add", "demo", "--label", "x", "--key", &private.to_string_lossy()]);
        assert!(refused.is_err(), "a file that is no JWK");
    }
    let ca = lab.ca().to_string_lossy().into_owned();
    let outcomes = python(&["sign-in", &lab.url(0), &ca, &path, &id], &secret).await?;
    let outcomes: Value = serde_json::from_str(&outcomes)?;
    for way in ["client_secret_basic", "client_secret_post", "ES384", "RS384"] {
        let outcome = &outcomes[way];
        assert_eq!(
            (&outcome["scope"], &outcome["jobs"]),
            (&json!("system/DiagnosticReport.rs"), &json!(200)),
            "{way}"
        );
        assert_eq!(
            (&outcome["about"]["active"], &outcome["about"]["client_id"]),
            (&json!(true), &json!(id)),
            "{way}"
        );
    }
    let refresh = json!({"rotated": true, "revoked": 200, "about": {"active": false}});
    assert_eq!(outcomes["refresh"], refresh);
    fs::remove_dir_all(folder)?;
    lab.stop().await
}

pub(crate) fn tempfolder() -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("dermflow-oauth-{}", uuid::Uuid::new_v4().simple()));
    fs::create_dir_all(&folder)?;
    Ok(folder)
}

// I6: tokens, credentials, passwords, accounts: revoked on one replica, refused on the other within a second.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_revoked_is_refused_everywhere_within_a_second() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let demo = lab.client().clone();
    let others = secret(&lab, "demo")?;
    let refused = async |what: &str, token: &Client| {
        let there = token.clone().at(&lab.url(1));
        let answer = async || (there.get("/jobs").await.ok()?.status == 401).then_some(());
        eventually(what, SOON, answer).await
    };
    let fresh = async |credential: &[String; 3]| {
        let answer = token(&demo, credential, "").await?;
        ensure!(answer.status == 200, "{}", answer.text);
        let token = with(&demo, &answer);
        ensure!(token.clone().at(&lab.url(1)).get("/jobs").await?.status == 200);
        anyhow::Ok(token)
    };

    let (one, two) = (fresh(&others).await?, fresh(&others).await?);
    let revoked = form(&one, "/oauth/revoke", &[("token", one.token())]).await?;
    assert_eq!(revoked.status, 200);
    refused("a revoked token", &one).await?;
    assert_eq!(two.get("/jobs").await?.status, 200, "another token of the same secret");
    let stranger = lab.register("stranger").await?;
    let in_vain = form(&stranger, "/oauth/revoke", &[("token", two.token())]).await?;
    assert_eq!(in_vain.status, 200);
    assert!(!in_vain.header("ratelimit").is_empty(), "it counts like any other request");
    let ended = "SELECT count(*) FROM auth.audit WHERE action = 'token-revoked'";
    assert_eq!(lab.count(ended).await?, 1, "the stranger has ended nothing");

    let own = secret(&lab, "demo")?;
    let held = fresh(&own).await?;
    lab.auth(&["credential", "remove", "demo", &own[1], "--yes"])?;
    refused("a token of a removed credential", &held).await?;
    assert_eq!(token(&demo, &own, "").await?.status, 401);
    assert_eq!(two.get("/jobs").await?.status, 200, "neither a stranger nor another secret's end revoked it");

    lab.register("turner").await?;
    let replaced = secret(&lab, "turner")?;
    let held = fresh(&replaced).await?;
    let refreshed = with(&demo, &token(&demo, &replaced, "offline_access").await?);
    assert_eq!(refreshed.get("/jobs").await?.status, 200);
    lab.auth(&["credential", "rotate", "turner", "--overlap-days", "0", "--yes"])?;
    refused("a token of a secret that was replaced without an overlap", &held).await?;
    refused("a token of a family that was begun with it", &refreshed).await?;
    assert_eq!(token(&demo, &replaced, "").await?.status, 401);

    lab.auth(&["user", "password", "demo"])?;
    refused("a token from before the new password", &two).await?;
    let after = fresh(&others).await?;
    lab.auth(&["user", "revoke", "demo"])?;
    refused("a token from before the end of all sessions", &after).await?;

    // Another role has other means: the secret of the old one opens nothing.
    lab.register("mover").await?;
    let moved = secret(&lab, "mover")?;
    let before = fresh(&moved).await?;
    lab.auth(&["user", "change", "mover", "--role", "auditor", "--yes"])?;
    refused("a token of another role", &before).await?;
    assert_eq!(token(&demo, &moved, "").await?.status, 401);

    let last = fresh(&others).await?;
    assert!(lab.auth(&["user", "delete", "demo"]).is_err(), "not without consent");
    lab.auth(&["user", "delete", "demo", "--yes"])?;
    refused("a token of a deleted account", &last).await?;
    assert_eq!(token(&demo, &others, "").await?.status, 401);
    let row = &lab
        .sql("SELECT username, contact, password_hash FROM auth.users WHERE deleted_at IS NOT NULL")
        .await?[0];
    assert!(row.get::<_, String>(0).starts_with("deleted-"));
    assert_eq!((row.get::<_, Option<String>>(1), row.get::<_, Option<String>>(2)), (None, None));
    lab.stop().await
}

// Staff shuts an account out while a login of it is under way: its password was right, and the note of its use waits
// here for the account's row. Neither an access token nor a refresh token comes of it.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_shut_out_while_signing_in_stays_out() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let staff = lab.pool("dermflow_auth")?;
    let mut connection = staff.get().await?;
    for (name, scope) in [("late-0", ""), ("late-1", "offline_access")] {
        let password = lab.auth(&["user", "create", name])?;
        let transaction = connection.transaction().await?;
        transaction.query("SELECT FROM auth.users WHERE username = $1 FOR UPDATE", &[&name]).await?;
        let client = lab.client().clone();
        let login = tokio::spawn(async move {
            let fields = [("username", name), ("password", password.trim()), ("scope", scope)];
            form(&client.with_token(""), "/login", &fields).await
        });
        let waits = "SELECT count(*) FROM pg_stat_activity \
                     WHERE wait_event_type = 'Lock' AND query LIKE '%SET last_used_at%'";
        let waits = async || (lab.count(waits).await.ok()? > 0).then_some(());
        eventually("the login waits", 3 * SOON, waits).await?;
        let shut_out = "UPDATE auth.users SET valid_after = now() WHERE username = $1";
        transaction.execute(shut_out, &[&name]).await?;
        transaction.commit().await?;
        let answer = login.await??;
        assert_eq!(
            (answer.status, &answer.body["error"]),
            (401, &json!("invalid_client")),
            "{}",
            answer.text
        );
    }
    lab.stop().await
}

// RFC 9700 section 4.14.2: each refresh token is good once, and the second use of one ends all that came of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_token_is_good_once() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let demo = lab.client();
    let credential = secret(&lab, "demo")?;
    let first = token(demo, &credential, "system/DiagnosticReport.rs offline_access").await?;
    let old = first.body["refresh_token"].as_str().context("no refresh token")?.to_owned();
    let nobody = refresh(demo, None, &old).await?;
    assert_eq!(
        (nobody.status, &nobody.body["error"]),
        (400, &json!("invalid_grant")),
        "without the client's secret"
    );
    let wider = [
        ("grant_type", "refresh_token"),
        ("refresh_token", old.as_str()),
        ("client_id", &credential[0]),
        ("client_secret", &credential[2]),
        ("scope", "system/DiagnosticReport.crds"),
    ];
    let wider = form(&demo.clone().with_token(""), "/oauth/token", &wider).await?;
    assert_eq!((wider.status, &wider.body["error"]), (400, &json!("invalid_scope")), "and it is good still");
    let second = refresh(demo, Some(&credential), &old).await?;
    assert_eq!((second.status, &second.body["scope"]), (200, &json!("system/DiagnosticReport.rs")));
    let held = with(demo, &second);
    assert_eq!(held.get("/jobs").await?.status, 200);
    let job = json!({"resourceType": "Parameters"});
    assert_eq!(held.analyze(&job, &[]).await?.status, 403, "a narrower scope");
    let reused = refresh(demo, Some(&credential), &old).await?;
    assert_eq!((reused.status, &reused.body["error"]), (400, &json!("invalid_grant")));
    let next = second.body["refresh_token"].as_str().unwrap_or_default();
    assert_eq!(refresh(demo, Some(&credential), next).await?.status, 400, "the family is ended");
    let ended = "SELECT count(*) FROM auth.audit WHERE action = 'token-revoked' AND outcome = 'success' \
                 AND client IS NOT NULL";
    assert_eq!(lab.count(ended).await?, 1, "and the account is named");
    let dead = async || (held.get("/jobs").await.ok()?.status == 401).then_some(());
    eventually("its access token is refused", SOON, dead).await?;

    let password = lab.password("demo")?;
    let fields = [("username", "demo"), ("password", password.as_str()), ("scope", "offline_access")];
    let login = form(&demo.clone().with_token(""), "/login", &fields).await?;
    let by_password = login.body["refresh_token"].as_str().context("no refresh token")?;
    assert_eq!(refresh(demo, None, by_password).await?.status, 200);
    lab.stop().await
}

// A family of refresh tokens has an end that its use does not move, and no token outlives that, nor the secret that the
// family was begun with; and a refresh token opens nothing by itself.
#[tokio::test(flavor = "multi_thread")]
async fn no_refresh_token_outlives_its_family() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let demo = lab.client();
    let (own, other, password) = (secret(&lab, "demo")?, secret(&lab, "demo")?, lab.password("demo")?);
    let sign_in = [("username", "demo"), ("password", password.as_str()), ("scope", "offline_access")];
    let secrets_end = format!("auth.credentials SET expires_at = $ WHERE id = '{}'", own[1]);
    let cases = [
        ("a password's", None, "auth.refresh_tokens SET expires_at = $"),
        ("a secret's", Some(&other), "auth.refresh_tokens SET expires_at = $"),
        ("the secret's own end", Some(&other), secrets_end.as_str()),
    ];
    for (what, proof, end) in cases {
        let end = async |at: &str| lab.sql(&format!("UPDATE {}", end.replace('$', at))).await;
        let first = match proof {
            None => form(&demo.clone().with_token(""), "/login", &sign_in).await?,
            Some(_) => token(demo, &own, "system/DiagnosticReport.rs offline_access").await?,
        };
        let second = refresh(demo, proof, text(&first, "refresh_token")).await?;
        assert_eq!(second.status, 200, "{what}: {}", second.text);
        let ends = "SELECT count(*) FROM auth.refresh_tokens WHERE expires_at > now() GROUP BY expires_at";
        assert_eq!(lab.count(ends).await?, 2, "{what}: both tokens of the family have one end");
        let opens = demo.clone().with_token(text(&second, "refresh_token")).get("/jobs").await?;
        assert_eq!((opens.status, opens.code()), (401, "unauthenticated"), "{what}");

        end("now() + interval '60 seconds'").await?;
        let third = refresh(demo, proof, text(&second, "refresh_token")).await?;
        let seconds = third.body["expires_in"].as_u64().unwrap_or_default();
        assert!((1..=60).contains(&seconds), "{what}: {}", third.text);
        let described = about(demo, "/oauth/introspect", &other, text(&third, "refresh_token")).await?;
        let left = described.body["exp"].as_i64().unwrap_or_default() - clock::now().unix_timestamp();
        assert!((1..=60).contains(&left), "{what}: {}", described.text);

        end("now() - interval '1 second'").await?;
        let ended = refresh(demo, proof, text(&third, "refresh_token")).await?;
        assert_eq!((ended.status, text(&ended, "error")), (400, "invalid_grant"), "{what}");
        assert!(ended.body["access_token"].is_null() && ended.body["refresh_token"].is_null(), "{what}");
        let described = about(demo, "/oauth/introspect", &other, text(&third, "refresh_token")).await?;
        assert_eq!(described.text, INACTIVE, "{what}");
    }
    lab.stop().await
}

// RFC 7009 and RFC 7662: who owns a token ends it and is told of it, and nobody else; what is no token, or no longer, is
// neither an error nor described.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_revoked_by_and_described_to_their_owner() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let demo = lab.client();
    lab.register("other").await?;
    let (own, theirs) = (secret(&lab, "demo")?, secret(&lab, "other")?);
    let scope = "system/DiagnosticReport.rs offline_access";
    let (first, foreign) = (token(demo, &own, scope).await?, token(demo, &theirs, scope).await?);
    let spent = text(&first, "refresh_token");
    let second = refresh(demo, Some(&own), spent).await?;
    let (access, next) = (text(&second, "access_token"), text(&second, "refresh_token"));
    let introspect = async |token: &str| about(demo, "/oauth/introspect", &own, token).await;
    let revoke = async |token: &str| about(demo, "/oauth/revoke", &own, token).await;
    // Who proves itself to ask has signed in for that, which is in the trail.
    let logins = "SELECT count(*) FROM auth.audit WHERE action = 'login' AND outcome = 'success'";
    let before = lab.count(logins).await?;
    assert_eq!(introspect("nonsense").await?.text, INACTIVE);
    assert_eq!(revoke("nonsense").await?.status, 200);
    assert_eq!(lab.count(logins).await?, before + 2);

    // Signed with our key: nothing but the time tells them apart.
    let tokens = Tokens::open(&lab.signing_keys(), &lab.url(0))?;
    let issued = |ago: u64| {
        let (client, credential) = (own[0].parse()?, own[1].parse()?);
        let grant =
            Grant { client, credential, scope: String::new(), ends: None, after: None, bound_to: None };
        let token = tokens.issue(grant, clock::now() - Duration::from_secs(ago))?;
        anyhow::Ok(token.expose_secret().to_owned())
    };
    assert_eq!(introspect(&issued(0)?).await?.body["active"], true);
    let expired = issued(3_600)?;

    let mut claims = claims(access)?;
    claims.as_object_mut().context("no claims")?.remove("credential");
    (claims["active"], claims["token_type"]) = (json!(true), json!("Bearer"));
    assert_eq!(introspect(access).await?.body, claims);
    let ends = format!(
        "SELECT floor(extract(epoch FROM max(expires_at)))::bigint FROM auth.refresh_tokens WHERE account = '{}'",
        own[0]
    );
    let refresh_token = json!({
        "active": true, "iss": lab.url(0), "sub": own[0], "client_id": own[0], "exp": lab.count(&ends).await?,
        "scope": "system/DiagnosticReport.rs",
    });
    assert_eq!(introspect(next).await?.body, refresh_token);

    let made_up = "dfr_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    let foreign = [text(&foreign, "access_token"), text(&foreign, "refresh_token")];
    for token in ["x", made_up, &own[2], &expired, foreign[0], foreign[1]] {
        assert_eq!(introspect(token).await?.text, INACTIVE);
        let revoked = revoke(token).await?;
        assert_eq!((revoked.status, revoked.text.as_str()), (200, ""));
    }
    assert_eq!(introspect(spent).await?.text, INACTIVE);
    let anonymous = demo.clone().with_token("");
    for path in ["/oauth/introspect", "/oauth/revoke"] {
        let unknown = "00000000-0000-4000-8000-000000000000";
        let (wrong, nobody) = (proves(&own[0], &theirs[2]), proves(unknown, &own[2]));
        for proof in [&wrong[..], &nobody[..], &[]] {
            for token in [access, next] {
                let answer = form(&anonymous, path, &[proof, &[("token", token)]].concat()).await?;
                assert_eq!((answer.status, text(&answer, "error")), (401, "invalid_client"), "{path}");
                assert!(!answer.header("www-authenticate").is_empty(), "{path}");
            }
        }
        let nothing = form(&anonymous, path, &proves(&own[0], &own[2])).await?;
        assert_eq!((nothing.status, text(&nothing, "error")), (400, "invalid_request"), "{path}");
    }
    let ended = "SELECT count(*) FROM auth.audit WHERE action = 'token-revoked' AND outcome = 'success'";
    assert_eq!(lab.count(ended).await?, 0, "none of that has ended anything");
    assert_eq!(with(demo, &second).get("/jobs").await?.status, 200);
    for token in foreign {
        assert_eq!(about(demo, "/oauth/introspect", &theirs, token).await?.body["active"], true);
    }

    // Of an access token no more than itself is ended; a refresh token, spent or not, ends its family.
    assert_eq!(revoke(access).await?.status, 200);
    assert_eq!(introspect(access).await?.text, INACTIVE);
    assert_eq!(with(demo, &second).get("/jobs").await?.status, 401);
    let third = refresh(demo, Some(&own), next).await?;
    let fourth = token(demo, &own, scope).await?;
    let fifth = refresh(demo, Some(&own), text(&fourth, "refresh_token")).await?;
    let families = [
        ("its last token", &first, &third, text(&third, "refresh_token")),
        ("a spent one", &fourth, &fifth, text(&fourth, "refresh_token")),
    ];
    for (what, begun, last, revoked) in families {
        for held in [begun, last] {
            assert_eq!(with(demo, held).get("/jobs").await?.status, 200, "{what}");
        }
        assert_eq!(revoke(revoked).await?.status, 200);
        for token in [revoked, text(last, "refresh_token")] {
            assert_eq!(introspect(token).await?.text, INACTIVE, "{what}");
            let refused = refresh(demo, Some(&own), token).await?;
            assert_eq!((refused.status, text(&refused, "error")), (400, "invalid_grant"), "{what}");
        }
        for held in [begun, last] {
            assert_eq!(with(demo, held).get("/jobs").await?.status, 401, "{what}");
            assert_eq!(introspect(text(held, "access_token")).await?.text, INACTIVE, "{what}");
        }
    }
    assert_eq!(lab.count(ended).await?, 3);
    lab.stop().await
}

fn claims(token: &str) -> Result<Value> {
    let part = token.split('.').nth(1).context("no claims")?;
    Ok(serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part)?)?)
}

// A secret that is replaced is good until the overlap ends, then only the new one; what has expired, credential or
// account, opens nothing, and no token outlives it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_outlives_its_credential_or_its_account() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let demo = lab.client();
    let old = secret(&lab, "demo")?;
    let given = token(demo, &old, "offline_access").await?;
    let refresh = given.body["refresh_token"].as_str().context("no refresh token")?.to_owned();
    let rotated: Value =
        serde_json::from_str(&lab.auth(&["credential", "rotate", "demo", "--overlap-days", "1"])?)?;
    let text = |name: &str| rotated[name].as_str().unwrap_or_default().to_owned();
    let new = [text("client_id"), text("credential"), text("client_secret")];
    for credential in [&old, &new] {
        assert_eq!(token(demo, credential, "").await?.status, 200, "during the overlap");
    }
    let ends = async |moment: &str| {
        let update = "UPDATE auth.credentials SET expires_at = date_trunc('second', now()) + interval";
        let update = format!(
            "{update} '{moment}' WHERE id = '{}' RETURNING extract(epoch FROM expires_at)::bigint",
            old[1]
        );
        lab.count(&update).await
    };
    let spend = async |refresh: &str| {
        let fields = [
            ("grant_type", "refresh_token"),
            ("refresh_token", refresh),
            ("client_id", &new[0]),
            ("client_secret", &new[2]),
        ];
        form(&demo.clone().with_token(""), "/oauth/token", &fields).await
    };
    let told = async |token: &str| {
        Ok::<_, anyhow::Error>(form(demo, "/oauth/introspect", &[("token", token)]).await?.body)
    };

    // The family ends with the secret that it was begun with, whatever else the client proves itself with.
    let end = ends("5 minutes").await?;
    let refreshed = spend(&refresh).await?;
    assert_eq!(refreshed.status, 200, "{}", refreshed.text);
    let seconds = refreshed.body["expires_in"].as_i64().context("no lifetime")?;
    assert!((200..=300).contains(&seconds), "{seconds}");
    let next = refreshed.body["refresh_token"].as_str().context("no refresh token")?;
    for token in [with(demo, &refreshed).token(), next] {
        assert_eq!(told(token).await?["exp"], end);
    }
    ends("-1 second").await?;
    assert_eq!(token(demo, &old, "").await?.body["error"], "invalid_client", "the overlap is over");
    assert_eq!(token(demo, &new, "").await?.status, 200);
    assert_eq!(told(next).await?, json!({"active": false}));
    assert_eq!(spend(next).await?.body["error"], "invalid_grant");

    let (password, held) = (lab.password("demo")?, with(demo, &token(demo, &new, "").await?));
    let fields = [("username", "demo"), ("password", password.as_str()), ("scope", "offline_access")];
    let login = form(&demo.clone().with_token(""), "/login", &fields).await?;
    let by_password = login.body["refresh_token"].as_str().context("no refresh token")?;
    assert_eq!(held.get("/jobs").await?.status, 200);
    lab.sql("UPDATE auth.users SET expires_at = now() - interval '1 second' WHERE username = 'demo'").await?;
    let ended = async || (held.get("/jobs").await.ok()?.status == 401).then_some(());
    eventually("a token of an expired account is refused", SOON, ended).await?;
    assert_eq!(demo.try_login("demo", &password).await?.code(), "login-failed");
    assert_eq!(token(demo, &new, "").await?.body["error"], "invalid_client");
    let fields = [("grant_type", "refresh_token"), ("refresh_token", by_password)];
    let refused = form(&demo.clone().with_token(""), "/oauth/token", &fields).await?;
    assert_eq!(refused.body["error"], "invalid_grant");
    lab.stop().await
}

// The token endpoint's refusals have RFC 6749's form, and tell nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_token_endpoint_refuses_what_is_wrong() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let demo = lab.client().clone().with_token("");
    let [id, _, secret] = secret(&lab, "demo")?;
    let good = [
        ("grant_type", "client_credentials"),
        ("client_id", id.as_str()),
        ("client_secret", secret.as_str()),
    ];
    assert_eq!(form(&demo, "/oauth/token", &good).await?.status, 200);
    let change = |name: &str, value: &'static str| {
        let mut fields = good.to_vec();
        fields.iter_mut().filter(|field| field.0 == name).for_each(|field| field.1 = value);
        fields
    };
    let unknown = "00000000-0000-4000-8000-000000000000";
    let cases = [
        (change("client_secret", "wrong"), 401, "invalid_client"),
        (change("client_id", unknown), 401, "invalid_client"),
        (change("client_id", "demo"), 401, "invalid_client"),
        (change("grant_type", "password"), 400, "unsupported_grant_type"),
        ([&good[..], &[("scope", "dermflow/operate")]].concat(), 400, "invalid_scope"),
        ([&good[..], &[("client_id", unknown)]].concat(), 400, "invalid_request"),
        (good[..1].to_vec(), 401, "invalid_client"),
        (vec![], 400, "invalid_request"),
    ];
    for (fields, status, error) in cases {
        let answer = form(&demo, "/oauth/token", &fields).await?;
        assert_eq!((answer.status, answer.body["error"].as_str()), (status, Some(error)), "{fields:?}");
        assert_eq!(answer.header("www-authenticate").is_empty(), status != 401);
    }
    let too_wide = format!(
        "SELECT count(*) FROM auth.audit WHERE action = 'login' AND outcome = 'refused' AND code = 'forbidden' \
         AND actor = '{id}'"
    );
    assert_eq!(lab.count(&too_wide).await?, 1, "who asks for more than it is granted is in the trail");
    let both = demo.request(Method::POST, "/oauth/token").basic_auth(&id, Some(&secret)).form(&good);
    assert_eq!(send(both).await?.body["error"], "invalid_request", "two ways at once");
    let anonymous = form(&demo, "/oauth/introspect", &[("token", "x")]).await?;
    assert_eq!(anonymous.status, 401);
    let inactive = form(lab.client(), "/oauth/introspect", &[("token", "x")]).await?;
    assert_eq!(inactive.text, INACTIVE);
    lab.auth(&["user", "disable", "demo"])?;
    assert_eq!(form(&demo, "/oauth/token", &good).await?.body["error"], "invalid_client");
    lab.stop().await
}

// A replica that hears of no revocations lets nobody in from five seconds on, though it could check every token; then it
// does again.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hears_nothing_lets_nobody_in() -> Result<()> {
    let lab = Lab::start(Setup { proxies: true, ..Setup::without_workers() }).await?;
    // What is refused for its form needs no database; of many in a second, nor does the trail of most.
    let refused = async || {
        let request = || lab.client().request(Method::POST, "/fhir/DiagnosticReport/$analyze");
        let one = || Box::pin(send(request().header("content-type", "text/plain").body("")));
        let (first, ..) = futures_util::future::select_all((0..8).map(|_| one())).await;
        Some(first.ok()?.status)
    };
    assert_eq!(refused().await, Some(415));
    let database = lab.link(Link::IngressDatabase);
    database.set(Mode::Blackhole);
    let begun = Instant::now();
    let shut = async || (refused().await? == 503).then_some(());
    eventually("nobody is let in", Duration::from_secs(8), shut).await?;
    println!("shut after {:?}", begun.elapsed());
    ensure!(begun.elapsed() > Duration::from_secs(3), "{:?}: the view was not too old yet", begun.elapsed());
    database.set(Mode::Pass);
    let open = async || (refused().await? == 415).then_some(());
    eventually("everybody is let in again", Duration::from_secs(20), open).await?;
    lab.stop().await
}

// The first administrator comes from the command line, once; the last one stays.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_one_first_administrator() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    lab.auth(&["bootstrap", "root"])?;
    assert!(lab.auth(&["bootstrap", "toor"]).is_err());
    assert!(lab.auth(&["user", "disable", "root"]).is_err(), "nobody would be left");
    assert!(lab.auth(&["user", "delete", "root", "--yes"]).is_err());
    lab.auth(&["user", "create", "second", "--role", "administrator", "--contact", "it@example.org"])?;
    lab.auth(&["user", "delete", "root", "--yes"])?;
    assert!(lab.auth(&["bootstrap", "toor"]).is_err(), "not even when the first one is gone");
    let shown: Value = serde_json::from_str(&lab.auth(&["user", "show", "second"])?)?;
    assert_eq!(
        (&shown["role"], &shown["state"], &shown["contact"]),
        (&json!("administrator"), &json!("active"), &json!("it@example.org"))
    );
    let aged = "UPDATE auth.users SET created_at = now() - interval '31 days'";
    lab.sql(aged).await?;
    let unused = lab.auth(&["user", "list", "--unused-days", "30", "--json"])?;
    assert!(unused.contains("\"second\"") && !unused.contains("\"demo\""), "{unused}");
    lab.stop().await
}
