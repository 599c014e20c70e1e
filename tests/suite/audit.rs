//! The audit trail: everything is in it, nothing secret is, and nobody changes it unseen.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_tests::{
    client::{Answer, Client, sample, sample_bytes, send},
    fhir::validate,
    lab::{Lab, Setup},
    wait::eventually,
};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

const LONG: Duration = Duration::from_mins(1);

async fn auditor(lab: &Lab) -> Result<Client> {
    let password = lab.auth(&["user", "create", "ada", "--role", "auditor"])?;
    Client::new(&lab.ca(), &lab.url(0))?.login("ada", &password).await
}

// The id of a user, as the trail names it.
async fn id_of(lab: &Lab, name: &str) -> Result<String> {
    let rows = lab.sql(&format!("SELECT id::text FROM auth.users WHERE username = '{name}'")).await?;
    Ok(rows.first().context("no such user")?.get(0))
}

async fn events(lab: &Lab, condition: &str) -> Result<i64> {
    lab.count(&format!("SELECT count(*) FROM auth.audit WHERE {condition}")).await
}

async fn upload(client: &Client, names: &[&str]) -> Result<String> {
    let data = STANDARD.encode(sample_bytes("ham10000-nv.jpg"));
    let lines =
        names.iter().map(|name| json!({"custom_id": name, "images": [{"data": data}]}).to_string() + "\n");
    let request = client.request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let answer = send(request.body(lines.collect::<String>())).await?;
    let first: Value = serde_json::from_str(answer.text.lines().next().unwrap_or_default())?;
    Ok(first["batch"].as_str().context("no batch")?.to_owned())
}

async fn with_id(client: &Client, path: &str, request: Uuid) -> Result<Answer> {
    send(client.request(Method::GET, path).header("x-request-id", request.to_string())).await
}

// Every kind of event once, with who, what, whose, from where and by which request; then as FHIR, for auditors
// only; and nothing of it is secret.
#[tokio::test(flavor = "multi_thread")]
async fn everything_is_recorded_and_nothing_secret() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let (client, auditor) = (lab.client(), auditor(&lab).await?);
    let (demo, ada) = (id_of(&lab, "demo").await?, id_of(&lab, "ada").await?);
    let anonymous = client.clone().with_token("");
    let done = async |what: &str, count: i64, condition: &str| -> Result<()> {
        let found = events(&lab, condition).await?;
        ensure!(found == count, "{what}: {found} instead of {count} events with {condition}");
        Ok(())
    };
    done("registered", 1, &format!("action = 'user-created' AND actor = 'auth' AND object = '{demo}'"))
        .await?;
    let login = "action = 'login' AND outcome";
    done("login", 1, &format!("{login} = 'success' AND actor = '{demo}' AND object = '{demo}'")).await?;
    let wrong = "a-wrong-password-81237";
    assert_eq!(anonymous.try_login("demo", wrong).await?.status, 401);
    assert_eq!(anonymous.try_login("nobody-81237", wrong).await?.status, 401);
    let refused = format!("{login} = 'refused' AND code = 'login-failed' AND actor_kind = 'unknown'");
    done("login refused", 1, &format!("{refused} AND object = '{demo}' AND source = '127.0.0.1'")).await?;
    done("login of nobody refused", 1, &format!("{refused} AND object IS NULL")).await?;

    let request = Uuid::new_v4();
    let forged = client.clone().with_token(&format!("{}x", client.token()));
    assert_eq!(with_id(&forged, "/jobs", request).await?.status, 401);
    let denied = "action = 'access' AND outcome = 'refused' AND code";
    done("401", 1, &format!("{denied} = 'unauthenticated' AND actor IS NULL AND request = '{request}'"))
        .await?;
    assert_eq!(auditor.get("/jobs").await?.status, 403);
    done("403", 1, &format!("{denied} = 'forbidden' AND actor = '{ada}'")).await?;
    assert_eq!(with_id(&forged, "/jobs", Uuid::nil()).await?.status, 401);
    let named = forged.request(Method::GET, "/jobs").header("x-request-id", "Mrs.Miller");
    assert_eq!(send(named).await?.header("x-request-id"), "Mrs.Miller");
    done("a name as request id", 1, &format!("{denied} = 'unauthenticated' AND request IS NULL")).await?;

    let mut image = sample("ham10000-mel.jpg");
    let patient = json!({"name": "subject", "valueReference": {"identifier": {"value": "PSEUDONYM-81237"}}});
    image["parameter"].as_array_mut().context("no parameters")?.push(patient);
    let own =
        format!("actor = '{demo}' AND client = '{demo}' AND outcome = 'success' AND source = '127.0.0.1'");
    let submitted = async |job: &str, count| {
        done("submitted", count, &format!("action = 'submit' AND object = '{job}' AND {own}")).await
    };
    let read = async |job: &str, count| {
        let is_read = format!("action = 'read' AND object_kind = 'report' AND object = '{job}' AND {own}");
        done("read", count, &is_read).await
    };
    let answer = client.analyze(&image, &[]).await?;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let job = answer.job().to_owned();
    submitted(&job, 1).await?;
    read(&job, 1).await?;
    let request = Uuid::new_v4();
    assert_eq!(with_id(client, &format!("/fhir/DiagnosticReport/{job}"), request).await?.status, 200);
    done("by its request", 1, &format!("action = 'read' AND request = '{request}' AND object = '{job}'"))
        .await?;
    let bulk = client.submit(&image).await?;
    assert_eq!(client.poll(&bulk, LONG).await?.status, 200);
    // However often it was polled, it was read once.
    read(&bulk, 1).await?;
    assert_eq!(client.delete(&format!("/fhir/_async/{job}")).await?.status, 202);
    done("withdrawn", 1, &format!("action = 'job-withdrawn' AND object = '{job}' AND {own}")).await?;
    assert_eq!(client.get(&format!("/fhir/DiagnosticReport/{job}")).await?.status, 404);
    read(&job, 2).await?;

    let batch = upload(client, &["a", "b", "c"]).await?;
    let of_batch = format!("object_kind = 'batch' AND object = '{batch}' AND {own}");
    let lines =
        format!("SELECT sum((detail->>'jobs')::int) FROM auth.audit WHERE action = 'submit' AND {of_batch}");
    assert_eq!(lab.count(&lines).await?, 3, "the lines of an upload are counted");
    let results = async || {
        let answer = client.get(&format!("/batches/{batch}/results?wait=10")).await.ok()?;
        (answer.text.lines().count() == 3).then_some(())
    };
    eventually("the batch is done", LONG, results).await?;
    ensure!(events(&lab, &format!("action = 'batch-read' AND {of_batch}")).await? > 0);
    assert_eq!(client.delete(&format!("/batches/{batch}")).await?.status, 202);
    done("batch withdrawn", 1, &format!("action = 'batch-withdrawn' AND {of_batch}")).await?;

    let entry = json!({"resource": image, "request": {"method": "POST", "url": "DiagnosticReport/$analyze"}});
    let bundle = json!({"resourceType": "Bundle", "type": "batch", "entry": [entry, entry]});
    let post = client.request(Method::POST, "/fhir").header("content-type", "application/fhir+json");
    let bundle = send(post.body(bundle.to_string())).await?;
    for entry in bundle.body["entry"].as_array().context("no entries")? {
        let job = entry["resource"]["id"].as_str().with_context(|| bundle.text.clone())?;
        submitted(job, 1).await?;
        read(job, 1).await?;
    }
    lab.auth(&["user", "quota", "demo", "--weight", "2"])?;
    done("quota", 1, &format!("action = 'user-changed' AND object = '{demo}'")).await?;
    lab.sql("UPDATE ingress.jobs SET finished_at = finished_at - interval '8 days'").await?;
    let erased = format!(
        "SELECT sum((detail->>'jobs')::int) FROM auth.audit WHERE action = 'jobs-erased' \
                          AND actor = 'sweeper' AND client = '{demo}'"
    );
    let all = async || (lab.count(&erased).await.ok()? == 7).then_some(());
    eventually("the erasure of seven jobs is recorded", LONG, all).await?;

    search(&lab, &auditor, &demo, &ada).await?;
    export(&lab).await?;
    lab.auth(&["user", "disable", "demo"])?;
    done("disabled", 1, &format!("action = 'user-disabled' AND object = '{demo}'")).await?;

    holds_no_secret(&lab, &[wrong, "nobody-81237", "PSEUDONYM", "Miller", "demo"]).await?;
    lab.stop().await
}

async fn holds_no_secret(lab: &Lab, others: &[&str]) -> Result<()> {
    let rows = lab.sql("SELECT e::text FROM auth.audit e").await?;
    let trail: String = rows.iter().map(|row| row.get::<_, String>(0)).collect();
    let base64 = STANDARD.encode(sample_bytes("ham10000-mel.jpg"));
    let (password, token) = (lab.password("demo")?, lab.client().token());
    let secrets = [&password, &token[100..140], &base64[200..240]];
    assert!(trail.len() > 2_000, "too short to show anything: {trail}");
    for secret in secrets.iter().chain(others) {
        assert!(!trail.contains(secret), "the trail holds {secret}");
    }
    Ok(())
}

async fn search(lab: &Lab, auditor: &Client, demo: &str, ada: &str) -> Result<()> {
    let base = "/fhir/AuditEvent";
    for (who, status) in [(lab.client().clone(), 403), (lab.client().clone().with_token(""), 401)] {
        assert_eq!(who.get(base).await?.status, status);
        assert_eq!(who.get(&format!("{base}/1")).await?.status, status);
    }
    // Paged, each event once, the latest first; reading the trail is an event, too.
    let total = events(lab, "true").await?;
    let (mut seen, mut documents, mut pages) = (Vec::new(), Vec::new(), 0);
    let mut next = Some(format!("{base}?_count=7&date=ge2020-01-01"));
    while let Some(path) = next {
        let page = auditor.get(&path).await?;
        assert_eq!(page.status, 200, "{}", page.text);
        let entries = page.body["entry"].as_array().context("no entries")?;
        ensure!(entries.len() <= 7);
        let id = |entry: &Value| entry["resource"]["id"].as_str()?.parse::<i64>().ok();
        seen.extend(entries.iter().filter_map(id));
        for entry in entries {
            ensure!(is_of_balp(&entry["resource"]), "{entry}");
        }
        let links = page.body["link"].as_array().context("no links")?;
        let link = links.iter().find(|link| link["relation"] == "next");
        next = link.and_then(|link| link["url"].as_str()).map(str::to_owned);
        documents.push((format!("page {pages}"), page.body));
        pages += 1;
    }
    let ids: HashSet<i64> = seen.iter().copied().collect();
    assert_eq!((ids.len(), seen.len() as i64), (seen.len(), total), "an event is repeated or left out");
    assert_eq!(
        events(lab, &format!("action = 'trail-read' AND actor = '{ada}' AND client IS NULL")).await?,
        pages
    );
    let counted = async |query: &str| -> Result<i64> {
        let page = auditor.get(&format!("{base}?_count=1000&{query}")).await?;
        ensure!(page.status == 200, "{query}: {}", page.text);
        Ok(page.body["entry"].as_array().map_or(0, Vec::len) as i64)
    };
    for (query, condition) in [
        (format!("agent={demo}"), format!("actor = '{demo}'")),
        ("agent=sweeper".into(), "actor = 'sweeper'".into()),
        ("outcome=4".into(), "outcome = 'refused'".into()),
        ("outcome=4,8".into(), "outcome <> 'success'".into()),
        ("action=D&outcome=0".into(), "action IN ('job-withdrawn', 'batch-withdrawn', 'jobs-erased')".into()),
        ("subtype=login".into(), "action = 'login'".into()),
        (format!("entity={demo}"), format!("object = '{demo}'")),
        ("date=lt2020-01-01".into(), "false".into()),
    ] {
        let found = counted(&query).await?;
        assert_eq!(found, events(lab, &condition).await?, "{query}");
    }
    let at = lab
        .sql("SELECT to_char(at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"') FROM auth.audit WHERE id = 3")
        .await?;
    let at: String = at[0].get(0);
    let at_once = counted(&format!("date={at}")).await?;
    assert_eq!(counted(&format!("date=ge{at}&date=le{at}")).await?, at_once);
    ensure!(at_once >= 1, "the instant of an event does not find it");
    for refused in ["patient=1", "date=yesterday", "outcome=x", "_sort=date", "agent=a%20b", "_count=x"] {
        let answer = auditor.get(&format!("{base}?{refused}")).await?;
        assert_eq!((answer.status, answer.code()), (400, "query-invalid"), "{refused}");
    }
    for missing in ["0", "4711000", "x", "01", "+1"] {
        assert_eq!(auditor.get(&format!("{base}/{missing}")).await?.status, 404, "{missing}");
    }
    let one = auditor.get(&format!("{base}/{}", seen[0])).await?;
    assert_eq!((one.status, one.body["id"].as_str()), (200, Some(&*seen[0].to_string())));
    documents.push(("one event".into(), one.body));
    validate(&documents).await
}

// What IHE BALP 1.1 demands beyond FHIR: who asked and who was asked in the words of DICOM, who observed it, and of a
// REST interaction, which.
fn is_of_balp(event: &Value) -> bool {
    let role = |agent: &Value| agent["type"]["coding"][0]["code"].as_str().map(str::to_owned);
    let roles: Vec<_> = event["agent"].as_array().into_iter().flatten().map(role).collect();
    let requestors: Vec<bool> = event["agent"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|agent| agent["requestor"].as_bool())
        .collect();
    let is_rest = event["type"]["code"] == "rest";
    let interaction = event["subtype"][0]["system"] == "http://hl7.org/fhir/restful-interaction";
    let mut entities = event["entity"].as_array().into_iter().flatten();
    roles == [Some("110153".to_owned()), Some("110152".to_owned())]
        && requestors == [true, false]
        && event["source"]["observer"].is_object()
        && is_rest == interaction
        && (!is_rest || event["agent"][0]["network"].is_null() || entities.any(is_of_request))
}

fn is_of_request(entity: &Value) -> bool {
    entity["type"]["code"] == "XrequestId"
}

async fn export(lab: &Lab) -> Result<()> {
    let before = events(lab, "true").await?;
    let lines = lab.auth(&["audit", "export"])?;
    let lines: Vec<Value> = lines.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(lines.len() as i64, before + 1, "all, and the export itself");
    assert_eq!(lines.last().context("nothing")?["subtype"][0]["code"], "trail-exported");
    assert_eq!(lab.auth(&["audit", "export", "--until", "2020-01-01"])?, "");
    assert_eq!(events(lab, "action = 'trail-exported'").await?, 2);
    let documents: Vec<_> =
        lines.into_iter().enumerate().map(|(n, line)| (format!("line {n}"), line)).collect();
    validate(&documents).await
}

fn head(lab: &Lab) -> Result<String> {
    let verified = lab.auth(&["audit", "verify"])?;
    Ok(verified.rsplit(' ').next().context("no head")?.to_owned())
}

// What `auth audit verify` says of a trail that is not intact; with --json it says the same as a document.
fn broken(lab: &Lab, args: &[&str]) -> Result<String> {
    let found = match lab.auth(&[&["audit", "verify"], args].concat()) {
        Ok(verified) => anyhow::bail!("nothing found: {verified}"),
        Err(error) => error.to_string(),
    };
    let output = lab.auth_command()?.args(["audit", "verify", "--json"]).args(args).output()?;
    let told: Value = serde_json::from_slice(&output.stdout)?;
    ensure!((output.status.code(), &told["intact"]) == (Some(1), &json!(false)), "{told}");
    let reason = told["reason"].as_str().context("no reason")?;
    ensure!(found.ends_with(&format!(": {reason}")), "{found}: {told}");
    let place = match (told["link"].as_i64(), told["event"].as_i64()) {
        (Some(link), Some(event)) => format!("event {event}, at link {link},"),
        (Some(link), None) => format!("link {link} "),
        _ => String::new(),
    };
    let is_whole =
        ["the links up to", "the trail was cut", "under retention"].iter().any(|why| reason.contains(why));
    ensure!(reason.starts_with(&place) && place.is_empty() == is_whole, "{told}");
    Ok(found)
}

const TABLES: [&str; 3] = ["auth.audit", "auth.audit_chain", "auth.audit_checkpoints"];

// Runs statements as the superuser, who turns off what stands in the way.
async fn tamper(lab: &Lab, statements: &[&str]) -> Result<()> {
    for table in TABLES {
        lab.sql(&format!("ALTER TABLE {table} DISABLE TRIGGER ALL")).await?;
    }
    for statement in statements {
        lab.sql(statement).await.with_context(|| (*statement).to_owned())?;
    }
    for table in TABLES {
        lab.sql(&format!("ALTER TABLE {table} ENABLE TRIGGER ALL")).await?;
        lab.sql(&format!("ALTER TABLE {table} ENABLE ALWAYS TRIGGER append_only")).await?;
    }
    Ok(())
}

// A superuser changes, removes, swaps and inserts rows: each time the place is named. A trail that was made anew is
// told from the old one by a head that was kept; what retention removes leaves a chain that verifies.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_changes_the_trail_unseen() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    for _ in 0..20 {
        lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    }
    let chained = "SELECT count(*) FROM auth.audit e WHERE NOT EXISTS (SELECT FROM auth.audit_chain WHERE event = e.id)";
    let all = async || (lab.count(chained).await.ok()? == 0).then_some(());
    eventually("every event is chained", Duration::from_secs(2), all).await?;
    let kept = head(&lab)?;
    // Fields, a row with its place, the hash itself; undone each time.
    let place = |n: i64| format!("event {n}, at link {n},");
    let event = |n: i64| format!("(SELECT event FROM auth.audit_chain WHERE link = {n})");
    for n in 1..=10 {
        let order = format!("SELECT event FROM auth.audit_chain WHERE link = {n}");
        assert_eq!(lab.count(&order).await?, n, "the test goes by the number of the event");
    }
    for (column, other) in [
        ("at", "at - interval '1 microsecond'"),
        ("actor", "'somebody'"),
        ("outcome", "'refused'"),
        ("client", "NULL"),
        ("source", "'192.0.2.1'"),
        ("request", "gen_random_uuid()"),
        ("detail", "detail || '{\"jobs\": 2}'"),
    ] {
        let (save, undo) = (
            "CREATE TEMPORARY TABLE saved AS SELECT * FROM auth.audit WHERE id = 7".to_owned(),
            format!("UPDATE auth.audit SET {column} = (SELECT {column} FROM saved) WHERE id = 7"),
        );
        tamper(&lab, &[&save, &format!("UPDATE auth.audit SET {column} = {other} WHERE id = 7")]).await?;
        let found = broken(&lab, &[])?;
        ensure!(found.contains(&place(7)) && found.contains("changed"), "{column}: {found}");
        tamper(&lab, &[&undo, "DROP TABLE saved"]).await?;
        assert_eq!(head(&lab)?, kept);
    }
    let save = "CREATE TEMPORARY TABLE saved AS SELECT * FROM auth.audit WHERE id = 8";
    tamper(&lab, &[save, "DELETE FROM auth.audit WHERE id = 8"]).await?;
    let found = broken(&lab, &[])?;
    ensure!(found.contains("event 8, at link 8, was removed"), "{found}");
    tamper(&lab, &["INSERT INTO auth.audit OVERRIDING SYSTEM VALUE SELECT * FROM saved"]).await?;
    let link = "CREATE TEMPORARY TABLE link AS SELECT * FROM auth.audit_chain WHERE link = 8";
    tamper(
        &lab,
        &[link, "DELETE FROM auth.audit_chain WHERE link = 8", "DELETE FROM auth.audit WHERE id = 8"],
    )
    .await?;
    let found = broken(&lab, &[])?;
    ensure!(found.contains("link 8 is missing"), "{found}");
    tamper(
        &lab,
        &[
            "INSERT INTO auth.audit OVERRIDING SYSTEM VALUE SELECT * FROM saved",
            "INSERT INTO auth.audit_chain SELECT * FROM link",
        ],
    )
    .await?;
    assert_eq!(head(&lab)?, kept);
    let swap = ["-1", &event(10), &event(9)].map(str::to_owned);
    let swap = |first: &str, second: &str| {
        [
            format!("UPDATE auth.audit_chain SET event = {} WHERE link = 9", swap[0]),
            format!("UPDATE auth.audit_chain SET event = {first} WHERE link = 10"),
            format!("UPDATE auth.audit_chain SET event = {second} WHERE link = 9"),
        ]
    };
    tamper(&lab, &swap("9", "10").each_ref().map(String::as_str)).await?;
    let found = broken(&lab, &[])?;
    ensure!(found.contains("event 10, at link 9,"), "{found}");
    tamper(&lab, &swap("10", "9").each_ref().map(String::as_str)).await?;
    // The end is cut off: what is left is a chain, but not the one that was noted.
    assert_eq!(head(&lab)?, kept);
    lab.auth(&["audit", "verify", "--head", &kept])?;
    let cut = [
        "CREATE TEMPORARY TABLE ends AS SELECT * FROM auth.audit_chain WHERE link > 15",
        "DELETE FROM auth.audit_chain WHERE link > 15",
        "DELETE FROM auth.audit WHERE id IN (SELECT event FROM ends)",
    ];
    tamper(&lab, &cut).await?;
    lab.auth(&["audit", "verify"])?;
    let found = broken(&lab, &["--head", &kept])?;
    ensure!(found.contains("the trail was cut"), "{found}");
    // Made anew with as many links, it is another chain.
    for _ in 0..10 {
        lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    }
    let found = broken(&lab, &["--head", &kept])?;
    ensure!(found.contains("another hash"), "{found}");
    prune(&lab).await?;

    // Put in afterwards, with a time in the past, where no event has that number.
    let insert = "INSERT INTO auth.audit (id, at, actor_kind, actor, action, outcome) OVERRIDING SYSTEM VALUE \
                  VALUES (0, now() - interval '1 day', 'part', 'auth', 'read', 'success')";
    lab.sql(insert).await?;
    let found = broken(&lab, &[])?;
    ensure!(found.contains("event 0,") && found.contains("put in afterwards"), "{found}");
    lab.stop().await
}

async fn prune(lab: &Lab) -> Result<()> {
    // Under retention the oldest go, and the chain goes on from where they ended.
    let early = head(lab)?;
    let old = "UPDATE auth.audit SET at = at - interval '500 days'";
    tamper(lab, &[old, "DELETE FROM auth.audit_chain"]).await?;
    lab.auth(&["audit", "verify"])?;
    for _ in 0..3 {
        lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    }
    let removed = lab.auth(&["audit", "prune", "--yes", "--json"])?;
    assert_eq!(removed, r#"{"removed":25}"#);
    assert_eq!(events(lab, "at < now() - interval '400 days'").await?, 0);
    let pruned = "action = 'trail-pruned' AND (detail->>'events')::int = 25 AND (detail->>'days')::int = 400";
    assert_eq!(events(lab, pruned).await?, 1);
    let later = head(lab)?;
    lab.auth(&["audit", "verify", "--head", &later])?;
    let found = broken(lab, &["--head", &format!("3:{}", early.split(':').nth(1).context("no hash")?)])?;
    ensure!(found.contains("removed under retention"), "{found}");
    assert_eq!(lab.auth(&["audit", "prune", "--yes"])?, "removed 0");
    assert_eq!(head(lab)?, later, "nothing was done, and nothing was said of it");
    Ok(())
}

// Nobody but the owner's one function removes anything; ingress may add and read.
#[tokio::test(flavor = "multi_thread")]
async fn ingress_can_only_add() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    head(&lab)?;
    for table in ["auth.audit", "auth.audit_chain"] {
        for statement in [
            format!("UPDATE {table} SET hash = hash"),
            format!("DELETE FROM {table}"),
            format!("TRUNCATE {table} CASCADE"),
        ] {
            let statement = statement.replace("auth.audit SET hash = hash", "auth.audit SET action = ''");
            for role in ["postgres", "dermflow_auth"] {
                lab.sql(&format!("SET ROLE {role}")).await?;
                let refused = lab.sql(&statement).await.expect_err(&statement);
                ensure!(format!("{:?}", refused.root_cause()).contains("append-only"), "{role}: {refused:?}");
            }
        }
    }
    lab.sql("SET ROLE dermflow_ingress").await?;
    lab.sql("SELECT FROM auth.audit JOIN auth.audit_chain ON event = id").await?;
    for forbidden in [
        "DELETE FROM auth.audit",
        "UPDATE auth.audit SET action = ''",
        "INSERT INTO auth.audit_checkpoints VALUES (1, sha256(''), now())",
        "SELECT auth.audit_prune(now(), 10, '{}')",
        "ALTER TABLE auth.audit DISABLE TRIGGER ALL",
    ] {
        let refused = lab.sql(forbidden).await.expect_err(forbidden);
        let cause = format!("{:?}", refused.root_cause());
        ensure!(
            cause.contains("permission denied") || cause.contains("must be owner"),
            "{forbidden}: {cause}"
        );
    }
    lab.sql("RESET ROLE").await?;
    moved(&lab).await?;
    lab.stop().await
}

// What an earlier build recorded in `ingress.audit` goes along, by ingress's own rights.
async fn moved(lab: &Lab) -> Result<()> {
    let (old, new) = (
        include_str!("../../ingress/migrations/V3__audit.sql"),
        include_str!("../../ingress/migrations/V4__audit_moves.sql"),
    );
    let table = old.split(';').next().context("no table")?;
    let function = old.find("CREATE FUNCTION").context("no function")?;
    let function = &old[function..];
    let function = &function[..function.find("END $$;").context("no end")? + 6];
    let parts: Vec<&str> = new.split_inclusive("END $$;").collect();
    lab.sql("SET ROLE dermflow_ingress").await?;
    for statement in [table, function] {
        lab.sql(statement).await?;
    }
    let user = Uuid::new_v4();
    lab.sql(&format!(
        "INSERT INTO ingress.audit (at, actor, action, client, job, detail) VALUES \
                      ('2026-01-01', 'sweeper', 'job-settled', '{user}', '{user}', '{{\"code\": \"x\"}}'), \
                      ('2026-01-02', '{user}', 'dead-purged', NULL, NULL, '{{}}')"
    ))
    .await?;
    for statement in std::iter::once(parts[0]).chain(parts[1].split_terminator(';')) {
        if !statement.trim().is_empty() {
            lab.sql(statement).await?;
        }
    }
    lab.sql("RESET ROLE").await?;
    let settled = format!(
        "actor_kind = 'part' AND action = 'job-settled' AND object = '{user}' \
                           AND detail->>'at' LIKE '2026-01-01%' AND detail->>'code' = 'x'"
    );
    assert_eq!(events(lab, &settled).await?, 1);
    assert_eq!(
        events(lab, &format!("actor_kind = 'user' AND actor = '{user}' AND object IS NULL")).await?,
        1
    );
    head(lab).map(drop)
}

// Ingress is killed while answers leave: every one that arrived is in the trail.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_is_recorded_whatever_happens() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1)).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    let (path, password) = (format!("/fhir/DiagnosticReport/{job}"), lab.password("demo")?);
    for round in 0..3 {
        let readers: Vec<_> = (0..16)
            .map(|_| {
                let (client, path) = (lab.client().clone(), path.clone());
                tokio::spawn(async move {
                    let mut answered = Vec::new();
                    loop {
                        let request = Uuid::new_v4();
                        match with_id(&client, &path, request).await {
                            Ok(answer) if answer.status == 200 => answered.push(request),
                            _ => return answered,
                        }
                    }
                })
            })
            .collect();
        let enough = async || (events(&lab, "action = 'read'").await.ok()? > 300 * (round + 1)).then_some(());
        eventually("many reports are read", LONG, enough).await?;
        lab.kill_ingress(0).await?;
        let mut answered = Vec::new();
        for reader in readers {
            answered.extend(reader.await?);
        }
        ensure!(answered.len() > 100, "only {} answers", answered.len());
        let list = answered.iter().map(|id| format!("'{id}'")).collect::<Vec<_>>().join(",");
        let found = events(&lab, &format!("action = 'read' AND request IN ({list})")).await?;
        assert_eq!(found, answered.len() as i64, "an answer left before its event was on disk");
        println!("{found} answers, all of them in the trail");
        lab.restart_ingress(0).await?;
    }
    counted_before_answered(&mut lab, &job).await?;
    let token = lab.client().try_login("demo", &password).await?;
    lab.kill_ingress(0).await?;
    assert_eq!((token.status, events(&lab, "action = 'login' AND outcome = 'success'").await?), (200, 2));
    head(&lab)?;
    lab.stop().await
}

// Questions how far a job is, and refusals, in such numbers that most are counted only.
async fn counted_before_answered(lab: &mut Lab, job: &str) -> Result<()> {
    let (known, nobody) = (lab.client().clone(), lab.client().clone().with_token(""));
    for (client, path, status, code) in [
        (&known, format!("/jobs/{job}"), 200, "IS NULL"),
        (&known, format!("/jobs/{}", Uuid::new_v4()), 404, "= 'not-found'"),
        (&nobody, format!("/jobs/{job}"), 401, "= 'unauthenticated'"),
    ] {
        let action = if status == 200 {
            "status-read"
        } else if status == 401 {
            "access"
        } else {
            "request"
        };
        let all = format!(
            "SELECT coalesce(sum(coalesce((detail->>'times')::int, 1)), 0)::bigint FROM auth.audit \
             WHERE action = '{action}' AND code {code}"
        );
        let (before, answers) = (lab.count(&all).await?, Arc::new(AtomicI64::new(0)));
        let callers: Vec<_> = (0..32)
            .map(|_| {
                let (client, path, answers) = (client.clone(), path.clone(), answers.clone());
                tokio::spawn(async move {
                    while client.get(&path).await.is_ok_and(|answer| answer.status == status) {
                        answers.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let enough = async || (answers.load(Ordering::Relaxed) > 1_000).then_some(());
        eventually("many answers", LONG, enough).await?;
        lab.kill_ingress(0).await?;
        for caller in callers {
            caller.await?;
        }
        let (given, found) = (answers.load(Ordering::Relaxed), lab.count(&all).await? - before);
        println!("{status}: {given} answers, {found} in the trail");
        ensure!((given..=given + 32).contains(&found), "{status}: {given} answers, {found} in the trail");
        let rows = all.replace("coalesce(sum(coalesce((detail->>'times')::int, 1)), 0)::bigint", "count(*)");
        ensure!(lab.count(&rows).await? < found, "none were counted together");
        lab.restart_ingress(0).await?;
    }
    Ok(())
}

// Whoever asks how far something is, and whoever is refused anything, is in the trail: the first ones of a second each by
// itself, then with their number.
#[tokio::test(flavor = "multi_thread")]
async fn no_question_and_no_refusal_is_left_out() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (client, stranger) = (lab.client(), lab.register("stranger").await?);
    let (demo, other) = (id_of(&lab, "demo").await?, id_of(&lab, "stranger").await?);
    let times = async |condition: &str, expected: i64| -> Result<()> {
        let all =
            format!("SELECT sum(coalesce((detail->>'times')::int, 1)) FROM auth.audit WHERE {condition}");
        let counted = async || (lab.count(&all).await.ok()? == expected).then_some(());
        eventually(&format!("{expected} times {condition}"), Duration::from_secs(5), counted).await
    };
    let (job, batch) = (client.submit(&sample("ham10000-nv.jpg")).await?, upload(client, &["a"]).await?);
    let looks =
        format!("action = 'status-read' AND actor = '{demo}' AND client = '{demo}' AND outcome = 'success'");
    let (mut asked, path_of_job) = (0, format!("/jobs/{job}"));
    for (path, object) in [
        (path_of_job.clone(), format!("object_kind = 'job' AND object = '{job}'")),
        (format!("/fhir/_async/{job}"), format!("object_kind = 'job' AND object = '{job}'")),
        (format!("/fhir/Task/{job}"), format!("object_kind = 'job' AND object = '{job}'")),
        (format!("/batches/{batch}"), format!("object_kind = 'batch' AND object = '{batch}'")),
        (format!("/fhir/_bulk/{batch}"), format!("object_kind = 'batch' AND object = '{batch}'")),
        ("/jobs".into(), "object IS NULL".into()),
        ("/fhir/Task".into(), "object IS NULL".into()),
    ] {
        // By its request: one of many in a second may be counted only.
        let recorded = async || {
            let request = Uuid::new_v4();
            let answer = with_id(client, &path, request).await.ok()?;
            asked += 1;
            assert!([200, 202].contains(&answer.status), "{path}: {}", answer.status);
            let found = format!("{looks} AND {object} AND request = '{request}'");
            (events(&lab, &found).await.ok()? == 1).then_some(())
        };
        eventually(&path, LONG, recorded).await?;
    }
    let begun = std::time::Instant::now();
    let rows = events(&lab, &looks).await?;
    let flood = futures_util::future::try_join_all((0..200).map(|_| client.get("/jobs"))).await?;
    asked += flood.len() as i64;
    times(&looks, asked).await?;
    let (rows, seconds) = (events(&lab, &looks).await? - rows, begun.elapsed().as_secs() as i64 + 2);
    ensure!(rows <= 25 * seconds && rows < flood.len() as i64, "{rows} events in {seconds} s");
    // A count names what it is about, of somebody who is known.
    let polls = (0..200).map(|_| client.get(&path_of_job));
    asked += futures_util::future::try_join_all(polls).await?.len() as i64;
    let counted = format!("{looks} AND detail->'about' = '[{{\"job\": \"{job}\"}}]'");
    ensure!(events(&lab, &counted).await? > 0, "which job was asked for is not in the trail");
    times(&looks, asked).await?;

    let of = |who: &str, code: &str| {
        format!("action = 'request' AND outcome = 'refused' AND code = '{code}' AND actor {who}")
    };
    let own = format!("= '{demo}'");
    assert_eq!(stranger.get(&format!("/jobs/{job}")).await?.status, 404);
    times(&format!("{} AND object = '{job}'", of(&format!("= '{other}'"), "not-found")), 1).await?;
    assert_eq!(client.clone().with_token("").get("/nothing").await?.status, 404);
    times(&of("IS NULL", "not-found"), 1).await?;
    let post = |path: &str, kind: &str| client.request(Method::POST, path).header("content-type", kind);
    let fhir = "application/fhir+json";
    assert_eq!(send(post("/fhir/DiagnosticReport/$analyze", fhir).body("{")).await?.status, 400);
    times(&of(&own, "json-malformed"), 1).await?;
    assert_eq!(send(post("/fhir/DiagnosticReport/$analyze", "text/plain").body("{}")).await?.status, 415);
    times(&of(&own, "media-type"), 1).await?;
    let parameters = json!({"resourceType": "Parameters", "parameter": []});
    let entry =
        json!({"resource": parameters, "request": {"method": "POST", "url": "DiagnosticReport/$analyze"}});
    let bundle = json!({"resourceType": "Bundle", "type": "batch", "entry": [entry]});
    let bundle = send(post("/fhir", fhir).header("prefer", "respond-async").body(bundle.to_string())).await?;
    let entry = &bundle.body["entry"][0]["response"];
    assert_eq!((bundle.status, &entry["status"]), (200, &json!("422")));
    let code = entry["outcome"]["issue"][0]["details"]["coding"][0]["code"].as_str().context("no code")?;
    times(&format!("{} AND detail->>'number' = '1'", of(&own, code)), 1).await?;
    let lines = "{\"custom_id\": \"a\", \"images\": []}\nnonsense\n";
    let uploaded = send(post("/batches", "application/x-ndjson").body(lines)).await?;
    let answers = uploaded.text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let batch = answers[0]["batch"].as_str().context("no batch")?;
    let refused: Vec<_> = answers.iter().filter(|line| line["error"].is_object()).collect();
    assert_eq!(refused.len(), 2, "{}", uploaded.text);
    for line in refused {
        let found = format!("object = '{batch}' AND detail->>'number' = '{}'", line["line"]);
        let code = line["error"]["code"].as_str().context("no code")?;
        times(&format!("{} AND {found}", of(&own, code)), 1).await?;
    }
    // Sent again with its key, a job is asked for, not submitted.
    let again = [("prefer", "respond-async"), ("idempotency-key", "one")];
    let first = client.analyze(&sample("ham10000-nv.jpg"), &again).await?.job().to_owned();
    let of_job =
        format!("{looks} AND (object = '{first}' OR detail->'about' @> '[{{\"job\": \"{first}\"}}]')");
    assert_eq!(events(&lab, &of_job).await?, 0);
    assert_eq!(client.analyze(&sample("ham10000-nv.jpg"), &again).await?.job(), first);
    times(&of_job, 1).await?;
    lab.stop().await
}

// When the trail cannot be written, nothing is handed out, signed in, submitted, removed or refused. A flood of
// refusals is not a flood of events.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_trail_there_is_no_success_and_a_flood_is_counted() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let job = lab.client().submit(&sample("ham10000-nv.jpg")).await?;
    assert_eq!(lab.client().poll(&job, LONG).await?.status, 200);
    let (path, password) = (format!("/fhir/DiagnosticReport/{job}"), lab.password("demo")?);
    let anonymous = lab.client().clone().with_token("");
    lab.sql("REVOKE INSERT ON auth.audit FROM dermflow_ingress").await?;
    let unavailable = |answer: &Answer| (answer.status, answer.code().to_owned());
    let expected = (503, "database-unavailable".to_owned());
    let read = lab.client().get(&path).await?;
    assert_eq!(unavailable(&read), expected);
    ensure!(!read.text.contains("DiagnosticReport\""), "the report left all the same");
    let login = anonymous.try_login("demo", &password).await?;
    assert_eq!(unavailable(&login), expected);
    ensure!(!login.text.contains("access_token"), "the token left all the same");
    let submit = lab.client().analyze(&sample("ham10000-nv.jpg"), &[("prefer", "respond-async")]).await?;
    assert_eq!(unavailable(&submit), expected);
    assert_eq!(unavailable(&lab.client().delete(&format!("/fhir/_async/{job}")).await?), expected);
    assert_eq!(unavailable(&anonymous.get(&path).await?), expected);
    assert_eq!(unavailable(&anonymous.try_login("demo", "wrong").await?), expected);
    assert_eq!(unavailable(&lab.client().get("/jobs/nothing").await?), expected);
    assert_eq!(lab.metric("dermflow_audit_lost_total").await, Some(0.0));
    let lines = lab.client().request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let uploaded = send(lines.body("nonsense\n")).await?;
    ensure!(uploaded.text.contains("\"database-unavailable\""), "{}", uploaded.text);
    ensure!(!uploaded.text.contains("\"json-malformed\""), "{}", uploaded.text);
    lab.sql("GRANT INSERT ON auth.audit TO dermflow_ingress").await?;
    assert_eq!(lab.client().get(&path).await?.status, 200);
    assert_eq!(lab.count("SELECT count(*) FROM ingress.jobs").await?, 1);

    let flood = 400;
    let begun = std::time::Instant::now();
    let requests = (0..flood).map(|_| anonymous.get(&path));
    for answer in futures_util::future::try_join_all(requests).await? {
        assert_eq!(answer.status, 401);
    }
    let refused = "action = 'access' AND code = 'unauthenticated' AND source = '127.0.0.1'";
    let all = format!("SELECT sum(coalesce((detail->>'times')::int, 1)) FROM auth.audit WHERE {refused}");
    let counted = async || (lab.count(&all).await.ok()? == flood).then_some(());
    eventually("each refusal is counted", Duration::from_secs(5), counted).await?;
    let (rows, seconds) = (events(&lab, refused).await?, begun.elapsed().as_secs() as i64 + 2);
    println!("{flood} refusals: {rows} events");
    ensure!(rows <= 25 * seconds && rows < flood / 2, "{rows} events in {seconds} s");

    // Logins likewise, with those for which there was no place.
    let names: Vec<String> = (0..flood).map(|n| format!("nobody-{n}")).collect();
    let logins = names.iter().map(|name| anonymous.try_login(name, "wrong"));
    let logins = futures_util::future::try_join_all(logins).await?;
    for answer in logins.iter().filter(|answer| answer.code() == "overloaded") {
        let pause: u64 = answer.header("retry-after").parse()?;
        ensure!(answer.status == 503 && (1..=10).contains(&pause), "{} {pause}", answer.status);
    }
    for code in ["login-failed", "login-throttled", "overloaded"] {
        let given = logins.iter().filter(|answer| answer.code() == code).count() as i64;
        let refused = format!("action = 'login' AND outcome = 'refused' AND code = '{code}'");
        let all = format!("SELECT sum(coalesce((detail->>'times')::int, 1)) FROM auth.audit WHERE {refused}");
        let counted = async || (lab.count(&all).await.ok()? == given).then_some(());
        eventually(&format!("{given} logins are {code}"), Duration::from_secs(5), counted).await?;
        ensure!(given > 0 || code != "overloaded", "every login found a place");
    }
    assert_eq!(lab.metric("dermflow_audit_lost_total").await, Some(0.0));
    lab.stop().await
}
