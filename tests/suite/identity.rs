//! How clients prove who they are, and how soon they stop being believed.

use std::{fs, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, Result, ensure};
use dermflow_local::{servers::python_packages, stack::repo};
use dermflow_tests::{
    client::{Answer, Client, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

/// What is revoked on one replica is refused on the others within this time (I6).
const SOON: Duration = Duration::from_secs(1);

async fn form(client: &Client, path: &str, fields: &[(&str, &str)]) -> Result<Answer> {
    send(client.request(Method::POST, path).form(fields)).await
}

/// A secret of `name`: client id, credential id, secret.
fn secret(lab: &Lab, name: &str) -> Result<[String; 3]> {
    let added: Value = serde_json::from_str(&lab.auth(&["credential", "add", name, "--label", "test"])?)?;
    let text = |name: &str| added[name].as_str().unwrap_or_default().to_owned();
    Ok([text("client_id"), text("credential"), text("client_secret")])
}

async fn token(client: &Client, [id, _, secret]: &[String; 3], scope: &str) -> Result<Answer> {
    let fields = [
        ("grant_type", "client_credentials"),
        ("client_id", id.as_str()),
        ("client_secret", secret.as_str()),
        ("scope", scope),
    ];
    form(&client.clone().with_token(""), "/oauth/token", &fields).await
}

fn with(client: &Client, answer: &Answer) -> Client {
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

fn tempfolder() -> Result<PathBuf> {
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

    lab.auth(&["user", "password", "demo"])?;
    refused("a token from before the new password", &two).await?;
    let after = fresh(&others).await?;
    lab.auth(&["user", "revoke", "demo"])?;
    refused("a token from before the end of all sessions", &after).await?;

    // Another role has other means: the secret of the old one opens nothing.
    lab.register("mover").await?;
    let moved = secret(&lab, "mover")?;
    let before = fresh(&moved).await?;
    lab.auth(&["user", "change", "mover", "--role", "auditor"])?;
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
    let refresh = async |token: &str, secret: &str| {
        let fields = [
            ("grant_type", "refresh_token"),
            ("refresh_token", token),
            ("client_id", &credential[0]),
            ("client_secret", secret),
        ];
        form(&demo.clone().with_token(""), "/oauth/token", &fields).await
    };
    let nobody =
        form(demo, "/oauth/token", &[("grant_type", "refresh_token"), ("refresh_token", &old)]).await?;
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
    let second = refresh(&old, &credential[2]).await?;
    assert_eq!((second.status, &second.body["scope"]), (200, &json!("system/DiagnosticReport.rs")));
    let held = with(demo, &second);
    assert_eq!(held.get("/jobs").await?.status, 200);
    let job = json!({"resourceType": "Parameters"});
    assert_eq!(held.analyze(&job, &[]).await?.status, 403, "a narrower scope");
    let reused = refresh(&old, &credential[2]).await?;
    assert_eq!((reused.status, &reused.body["error"]), (400, &json!("invalid_grant")));
    let next = second.body["refresh_token"].as_str().unwrap_or_default();
    assert_eq!(refresh(next, &credential[2]).await?.status, 400, "the family is ended");
    let ended = "SELECT count(*) FROM auth.audit WHERE action = 'token-revoked' AND outcome = 'success' \
                 AND client IS NOT NULL";
    assert_eq!(lab.count(ended).await?, 1, "and the account is named");
    let dead = async || (held.get("/jobs").await.ok()?.status == 401).then_some(());
    eventually("its access token is refused", SOON, dead).await?;

    let password = lab.password("demo")?;
    let fields = [("username", "demo"), ("password", password.as_str()), ("scope", "offline_access")];
    let login = form(&demo.clone().with_token(""), "/login", &fields).await?;
    let by_password = login.body["refresh_token"].as_str().context("no refresh token")?;
    let fields = [("grant_type", "refresh_token"), ("refresh_token", by_password)];
    assert_eq!(form(&demo.clone().with_token(""), "/oauth/token", &fields).await?.status, 200);
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
    let both = demo.request(Method::POST, "/oauth/token").basic_auth(&id, Some(&secret)).form(&good);
    assert_eq!(send(both).await?.body["error"], "invalid_request", "two ways at once");
    let anonymous = form(&demo, "/oauth/introspect", &[("token", "x")]).await?;
    assert_eq!(anonymous.status, 401);
    let inactive = form(lab.client(), "/oauth/introspect", &[("token", "x")]).await?;
    assert_eq!(inactive.text, r#"{"active":false}"#);
    lab.auth(&["user", "disable", "demo"])?;
    assert_eq!(form(&demo, "/oauth/token", &good).await?.body["error"], "invalid_client");
    lab.stop().await
}

// Keys change under load: the new one is published before it signs, the old one believed while its tokens live.
#[tokio::test(flavor = "multi_thread")]
async fn signing_keys_rotate_without_a_false_refusal() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    let demo = lab.client().clone();
    let credential = secret(&lab, "demo")?;
    let folder = lab.signing_keys();
    let added = lab.auth(&["signing-key", "add", &folder.to_string_lossy()])?;
    // Ten minutes are brought forward to ten seconds: still more than a replica takes to look.
    let soon = Command::new("date").args(["-u", "-d", "+10 seconds", "+%Y%m%dT%H%M%SZ.pem"]).output().await?;
    let soon = String::from_utf8(soon.stdout)?;
    fs::rename(added.trim(), folder.join(soon.trim()))?;
    let kid = |answer: &Answer| {
        answer.body["access_token"].as_str().and_then(|token| token.split('.').next()).map(str::to_owned)
    };
    let first = token(&demo, &credential, "").await?;
    let before = kid(&first);
    let published = async || {
        let here = demo.get("/.well-known/jwks.json").await.ok()?;
        (here.body["keys"].as_array()?.len() == 2).then_some(here)
    };
    let keys = eventually("both keys are published", Duration::from_secs(8), published).await?;
    assert_eq!(keys.header("cache-control"), "public, max-age=300");
    let (mut held, mut requests) = (vec![first], 0);
    let rotated = async || {
        let new = token(&demo, &credential, "").await.ok()?;
        let changed = kid(&new) != before;
        held.push(new);
        // Every token, at the replica that did not issue it too.
        for token in &held {
            for replica in 0..2 {
                let answer = with(&demo, token).at(&lab.url(replica)).get("/jobs").await.ok()?;
                assert_eq!(answer.status, 200, "after {requests} requests: {}", answer.text);
                requests += 1;
            }
        }
        held.truncate(8);
        changed.then_some(())
    };
    eventually("the new key signs", Duration::from_secs(20), rotated).await?;
    println!("{requests} requests, none refused");
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
