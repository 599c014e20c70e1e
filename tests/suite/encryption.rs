//! The links and stores: what they are encrypted with, and what is refused.

use std::{error::Error, fs, os::unix::fs::PermissionsExt};

use anyhow::{Result, bail, ensure};
use dermflow_auth::db::DatabaseOptions;
use dermflow_local::{
    postgres::Postgres,
    servers::{Given, Servers},
    stack::repo,
    state::State,
};
use dermflow_tests::{
    client::sample,
    lab::{Lab, Setup},
};

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
