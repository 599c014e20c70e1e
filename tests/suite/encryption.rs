//! The links and stores: what they are encrypted with, and what is refused.

use std::{collections::BTreeMap, error::Error, fs, os::unix::fs::PermissionsExt};

use anyhow::{Context, Result, bail, ensure};
use async_nats::ConnectOptions;
use dermflow_auth::db::DatabaseOptions;
use dermflow_local::{
    nats::MONITOR,
    postgres::Postgres,
    servers::{Given, Servers},
    stack::repo,
    state::State,
};
use dermflow_schemas::queue;
use dermflow_tests::{
    client::sample,
    lab::{Lab, Setup},
};
use serde_json::Value;

/// How a connection with these options is encrypted: its version of TLS, if any, and whether it is over the network.
async fn connect(options: &DatabaseOptions) -> Result<(Option<String>, bool)> {
    let select = "SELECT version, client_addr IS NOT NULL FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
                  WHERE pid = pg_backend_pid()";
    let row = options.pool("ingress", 1)?.get().await?.query_one(select, &[]).await?;
    Ok((row.get(0), row.get(1)))
}

/// Why no connection comes about.
async fn refusal(options: &DatabaseOptions) -> Result<String> {
    match connect(options).await {
        Ok(connected) => bail!("{}: connected, {connected:?}", options.database),
        Err(error) => Ok(error.chain().map(<dyn Error>::to_string).collect::<Vec<_>>().join(": ")),
    }
}

// Ingress reaches a PostgreSQL elsewhere over TLS, and nothing in its connection string makes that less; a certificate of
// an unknown CA or of another name is refused, and so is a server without TLS. A socket in a private folder is taken.
#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_reached_over_tls_or_a_private_socket() -> Result<()> {
    const ROLE: &str = "dermflow_ingress";
    let lab = Lab::start(Setup { database_tls: true, ..Setup::simulated(1) }).await?;
    let report = lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?;
    ensure!(report.status == 200, "{}", report.text);
    let of_ingress = |which: &str| {
        format!(
            "SELECT count(*) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) WHERE usename = '{ROLE}' AND {which}"
        )
    };
    let encrypted = lab.count(&of_ingress("ssl AND version = 'TLSv1.3'")).await?;
    assert!(encrypted > 0);
    assert_eq!(lab.count(&of_ingress("NOT ssl")).await?, 0, "beside {encrypted} that are");

    let tls = lab.database_over_tls(ROLE)?;
    for suffix in ["", " sslmode=prefer", " sslmode=disable"] {
        let options = DatabaseOptions { database: tls.database.clone() + suffix, ..tls.clone() };
        assert_eq!(connect(&options).await?, (Some("TLSv1.3".into()), true), "{suffix}");
    }
    let stranger = DatabaseOptions { database_ca: Some(lab.pki().staff_ca.clone()), ..tls.clone() };
    let refused = refusal(&stranger).await?;
    assert!(refused.contains("UnknownIssuer"), "{refused}");
    let other = tls.database.replace("localhost", "127.0.0.1");
    let refused = refusal(&DatabaseOptions { database: other, ..tls.clone() }).await?;
    assert!(refused.contains("not valid for name"), "{refused}");
    let refused = refusal(&DatabaseOptions { database_ca: None, ..tls.clone() }).await?;
    assert!(refused.contains("--database-ca"), "{refused}");

    let dir = std::env::temp_dir().join(format!("dermflow-plain-{}", uuid::Uuid::new_v4().simple()));
    let state = State::open(&dir)?;
    let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
    let mut plain = Postgres::prepare(&state, &servers.postgres_bin)?;
    plain.listen(None)?;
    plain.start().await?;
    let network = DatabaseOptions {
        database: plain.url_at("localhost", ROLE),
        database_password_file: plain.password_file(ROLE)?.to_owned(),
        database_ca: Some(lab.ca()),
    };
    let refused = refusal(&network).await?;
    assert!(refused.contains("server does not support TLS"), "{refused}");
    let socket = DatabaseOptions { database: plain.url(ROLE), database_ca: None, ..network };
    assert_eq!(connect(&socket).await?, (None, false));
    assert_eq!(fs::metadata(plain.sockets())?.permissions().mode() & 0o777, 0o700);
    plain.stop().await?;
    Postgres::erase(&state)?;
    fs::remove_dir_all(dir)?;
    lab.stop().await
}

/// What `auth encryption` finds: whether its exit code is 0, the protection of each link and store, and the percentage.
fn findings(lab: &Lab) -> Result<(bool, BTreeMap<String, String>, f64)> {
    findings_with(lab, &[])
}

fn findings_with(lab: &Lab, further: &[&str]) -> Result<(bool, BTreeMap<String, String>, f64)> {
    let output = lab.auth_command()?.args(["encryption", "--json"]).args(further).output()?;
    let text = String::from_utf8(output.stdout)?;
    let failed = || format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let (mut found, mut percent) = (BTreeMap::new(), None);
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).with_context(failed)?;
        if let Some(share) = line.get("percent") {
            percent = share.as_f64();
            continue;
        }
        let field =
            |name: &str| line[name].as_str().map(str::to_owned).with_context(|| format!("{name}: {line}"));
        ensure!(!field("seen")?.is_empty() && !field("source")?.is_empty(), "{line}");
        println!("{line}");
        ensure!(found.insert(field("name")?, field("protection")?).is_none(), "{line}");
    }
    Ok((output.status.success(), found, percent.with_context(failed)?))
}

// Everything that runs is asked, and every answer is known: 100 %, with the exit code of success.
#[tokio::test(flavor = "multi_thread")]
async fn the_running_system_shows_that_all_of_it_is_encrypted() -> Result<()> {
    let mut lab = Lab::start(Setup::simulated(1)).await?;
    lab.start_operate("olga").await?;
    lab.start_registration().await?;
    let report = lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?;
    ensure!(report.status == 200, "{}", report.text);
    let (succeeded, found, percent) = findings(&lab)?;
    assert!(succeeded && percent > 99.99, "{percent} %");
    let of = |protection: &str| -> Vec<&str> {
        let of = found.iter().filter(|(_, how)| *how == protection);
        of.map(|(name, _)| name.as_str()).collect()
    };
    let listeners = [lab.url(0), lab.internal_url(0), lab.operate_url()?, lab.registration_url()?];
    for listener in listeners {
        assert_eq!(found[&format!("callers to {listener}")], "tls");
    }
    for user in ["ingress", "worker", "operator", "monitor"] {
        assert_eq!(found[&format!("{user} to the broker")], "tls");
    }
    assert_eq!(of("private-socket"), ["auth to the database", "ingress to the database"]);
    assert_eq!(of("encrypted"), ["jobs, payloads and results at the broker dermflow"]);
    assert_eq!(of("sealed"), ["ACME accounts and keys", "reports"]);
    assert_eq!(of("hashed"), ["clients' secrets, refresh tokens, sessions", "passwords"]);
    assert!(of("clear-on-purpose").contains(&"audit trail"));
    let text = lab.auth(&["encryption"])?;
    assert!(text.lines().last().is_some_and(|last| last.ends_with(", 100 %")), "{text}");
    lab.stop().await
}

// Where the broker has no user `monitor`, or one that may not ask, nothing is known of it, and that is what the share says;
// what else there is, is told all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_nobody_may_ask_counts_as_not_encrypted() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let (_, all, _) = findings(&lab)?;
    let password = lab.broker_password("ingress")?.display().to_string();
    for user in ["nobody", "ingress"] {
        let options = ["--nats-user", user, "--nats-password-file", &password];
        let (succeeded, found, percent) = findings_with(&lab, &options)?;
        assert!(!succeeded && percent < 99.0, "{user}: {percent} %");
        let unknown: Vec<_> =
            found.iter().filter(|(_, how)| *how == "unknown").map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            unknown,
            ["all links of the broker", "jobs, payloads and results at the broker"],
            "{user}"
        );
        let others = all.iter().filter(|(name, _)| !name.contains("the broker"));
        assert!(
            others.count() > 5
                && all.iter().all(|(name, how)| name.contains("broker") || found[name] == *how)
        );
    }
    lab.stop().await
}

/// Has answers to the monitor sent where servers take orders: to purge the queue, and to read their configuration anew.
async fn misdirect_answers(lab: &Lab) -> Result<()> {
    let port = lab.broker().await?.server_info().port;
    let password = fs::read_to_string(lab.broker_password(MONITOR.user)?)?;
    let options = ConnectOptions::new().user_and_password(MONITOR.user.into(), password);
    let options = options.add_root_certificates(lab.ca()).custom_inbox_prefix("_INBOX_monitor");
    let monitor = options.connect(format!("tls://localhost:{port}")).await?;
    let reload = format!("$SYS.REQ.SERVER.{}.RELOAD", monitor.server_info().server_id);
    let delete = format!("$JS.API.STREAM.DELETE.{}", queue::RESULTS);
    for question in MONITOR.publish {
        for hostile in ["$JS.API.ACCOUNT.PURGE.QUEUE", "$JS.API.ACCOUNT.PURGE.$G", &delete, &reload] {
            monitor.publish_with_reply(*question, hostile.to_owned(), "{}".into()).await?;
        }
        monitor.request(*question, "{}".into()).await?;
    }
    Ok(())
}

/// Whether a server has done what [`misdirect_answers`] wants.
fn is_misled(lab: &Lab) -> Result<bool> {
    let (mut logs, mut is_misled) = (0, false);
    for entry in fs::read_dir(lab.log_folder())? {
        let path = entry?.path();
        if path.file_stem().is_some_and(|name| name.to_string_lossy().starts_with("nats-server")) {
            let log = fs::read_to_string(&path)?;
            is_misled |= log.contains("Purge request") || log.contains("Reloaded");
            logs += 1;
        }
    }
    ensure!(logs == 3, "{logs} logs");
    Ok(is_misled)
}

// What the role of auth puts into pg_temp is not what the functions of ingress's role look at.
#[tokio::test(flavor = "multi_thread")]
async fn a_temporary_view_does_not_stand_in_for_the_catalog() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    lab.sql("GRANT TEMP ON DATABASE dermflow TO dermflow_auth").await?;
    let auth = lab.pool("dermflow_auth")?.get().await?;
    let plant = "CREATE TEMP VIEW pg_stat_activity AS SELECT 0 AS pid, NULL::inet AS client_addr, \
                 'dermflow_ingress'::name AS usename; \
                 CREATE TEMP VIEW pg_stat_ssl AS SELECT 0 AS pid, 'planted'::text AS version; \
                 CREATE DOMAIN pg_temp.bytea AS pg_catalog.bytea CHECK (false)";
    auth.batch_execute(plant).await?;
    let rows = auth.query("SELECT version FROM ingress.connections()", &[]).await?;
    ensure!(!rows.is_empty());
    for row in rows {
        ensure!(row.get::<_, Option<&str>>(0) != Some("planted"));
    }
    for function in ["reports_in_clear", "secrets_in_clear"] {
        let row = auth.query_one(&format!("SELECT ingress.{function}()"), &[]).await?;
        ensure!(row.get::<_, i64>(0) == 0);
    }
    drop(auth);
    lab.stop().await
}

// What is in clear is found where it is, one thing after another, whatever else is encrypted.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_clear_is_found() -> Result<()> {
    const ROLE: &str = "dermflow_ingress";
    let setup = Setup { database_tls: true, plain_broker: true, brokers: 3, ..Setup::simulated(1) };
    let lab = Lab::start(setup).await?;
    let report = lab.client().analyze(&sample("isic2017-nv.jpg"), &[]).await?;
    ensure!(report.status == 200, "{}", report.text);
    let (succeeded, found, percent) = findings(&lab)?;
    assert!(!succeeded && percent < 99.0, "{percent} %");
    // The routes of the lab's cluster are plain; a broker that may be spoken to without TLS counts, though nobody has.
    assert_eq!(found["between the broker's servers"], "clear");
    assert_eq!(found["clients to the broker dermflow-2"], "clear");
    assert_eq!(found["ingress to the broker"], "tls");
    assert_eq!(found["ingress to the database"], "tls");
    assert_eq!(found["reports"], "sealed");

    let results = async || -> Result<_> {
        Ok(queue::context(lab.broker().await?).get_stream(queue::RESULTS).await?.cached_info().created)
    };
    let made = results().await?;
    misdirect_answers(&lab).await?;

    let address = lab.broker().await?.server_info().port;
    let password = fs::read_to_string(lab.broker_password("ingress")?)?;
    let options = ConnectOptions::new().user_and_password("ingress".into(), password);
    let plain = options.connect(format!("nats://127.0.0.1:{address}")).await?;
    let (_, found, _) = findings(&lab)?;
    assert_eq!(found["ingress to the broker"], "clear");
    assert_eq!(found["worker to the broker"], "tls");
    drop(plain);

    let DatabaseOptions { database, database_password_file, .. } = lab.database_over_tls(ROLE)?;
    let mut config: tokio_postgres::Config = database.parse()?;
    config.password(fs::read_to_string(database_password_file)?);
    config.ssl_mode(tokio_postgres::config::SslMode::Disable);
    let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    let (_, found, _) = findings(&lab)?;
    assert_eq!(found["ingress to the database"], "clear");
    assert_eq!(found["auth to the database"], "private-socket");
    drop(client);

    for (spoil, name) in [
        ("UPDATE ingress.reports SET sealed = '{\"resourceType\":\"DiagnosticReport\"}'", "reports"),
        ("UPDATE auth.users SET password_hash = 'Zehn rote Kacheln'", "passwords"),
    ] {
        lab.sql(spoil).await?;
        let (succeeded, found, _) = findings(&lab)?;
        assert_eq!((succeeded, found[name].as_str()), (false, "clear"));
    }
    lab.sql("UPDATE ingress.reports SET sealed = 'x', key_id = 'lost'").await?;
    assert_eq!(findings(&lab)?.1["reports"], "unknown");
    // Whoever is the monitor cannot make other servers do anything.
    assert!(!is_misled(&lab)? && results().await? == made);
    lab.stop().await
}
