//! What the database says of its connections, and of what is stored in it.

use std::{fs, os::unix::fs::PermissionsExt};

use anyhow::{Context, Result};
use deadpool_postgres::Client;
use dermflow_auth::{db::DatabaseOptions, sealing};
use dermflow_schemas::{clock, seal::Keys};
use tokio_postgres::Row;

use super::{Finding, Protection};

const PREPARED: &str = "cannot see what ingress has, which it prepares when it starts";

pub(super) async fn look(client: &Client, options: &DatabaseOptions, keys: &Keys) -> Result<Vec<Finding>> {
    let own = "SELECT version, client_addr IS NOT NULL, count(*) FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) \
               WHERE usename = current_user GROUP BY 1, 2";
    let source = "pg_stat_ssl";
    let mut findings = vec![link("auth to the database", &client.query(own, &[]).await?, options, source)];
    let of_ingress = "SELECT version, on_network, number FROM ingress.connections()";
    let rows = client.query(of_ingress, &[]).await.context(PREPARED)?;
    findings.push(link("ingress to the database", &rows, options, source));
    let standbys: i64 = client.query_one("SELECT count(*) FROM pg_stat_replication", &[]).await?.get(0);
    if standbys > 0 {
        let seen = format!("{standbys} standbys, of which this role sees no more");
        findings.push(Finding::link(
            "database to standbys",
            Protection::Unknown,
            seen,
            "pg_stat_replication",
        ));
    }
    findings.extend(sealed(client, keys).await?);
    findings.extend(hashed(client).await?);
    let on_purpose = [
        ("audit trail", "codes, numbers, times, opaque ids, callers' addresses; bound by a hash chain"),
        ("records of jobs", "ids, times, states, numbers; the caller's Idempotency-Key, custom_id"),
        ("accounts", "names, roles, contacts of staff and clients; public keys"),
        ("ACME challenges", "what anybody may ask for at /.well-known/acme-challenge"),
    ];
    findings.extend(
        on_purpose.map(|(name, seen)| Finding::store(name, Protection::ClearOnPurpose, seen, "the schema")),
    );
    Ok(findings)
}

/// The connections of one role: rows of a version of TLS, whether it is over the network, and a number.
fn link(name: &str, rows: &[Row], options: &DatabaseOptions, source: &'static str) -> Finding {
    if rows.is_empty() {
        return Finding::link(name, Protection::Unknown, "no connection", source);
    }
    let (mut plain, mut sockets, mut seen) = (0, 0, Vec::new());
    for row in rows {
        let (version, network, number): (Option<&str>, bool, i64) = (row.get(0), row.get(1), row.get(2));
        match (version, network) {
            (Some(version), _) => seen.push(format!("{number} with {version}")),
            (None, true) => {
                plain += number;
                seen.push(format!("{number} over the network without TLS"));
            }
            (None, false) => {
                sockets += number;
                seen.push(format!("{number} through a Unix socket"));
            }
        }
    }
    let protection = match (plain, sockets) {
        (0, 0) => Protection::Tls,
        (0, _) => match private_sockets(options) {
            Ok(true) => {
                seen.push("judged by the folder that auth's own --database names".into());
                Protection::PrivateSocket
            }
            Ok(false) => {
                seen.push("others can enter its folder".into());
                Protection::Clear
            }
            Err(error) => {
                seen.push(format!("{error:#}"));
                Protection::Unknown
            }
        },
        _ => Protection::Clear,
    };
    Finding::link(name, protection, seen.join(", "), source)
}

/// Whether only their owner, and its group, can enter the folders of the sockets.
fn private_sockets(options: &DatabaseOptions) -> Result<bool> {
    let folders = options.sockets()?;
    anyhow::ensure!(!folders.is_empty(), "--database names no socket, so its folder is not known");
    for folder in folders {
        let mode = fs::metadata(&folder).with_context(|| folder.display().to_string())?.permissions().mode();
        if mode & 0o007 != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn sealed(client: &Client, keys: &Keys) -> Result<Vec<Finding>> {
    let stored = sealing::stored(client, &keys.sealing(clock::now()).id).await.context(PREPARED)?;
    let number = async |select: &str| -> Result<i64> {
        Ok(client.query_one(select, &[]).await.context(PREPARED)?.get(0))
    };
    let reports_in_clear = number("SELECT ingress.reports_in_clear()").await?;
    let secrets_in_clear = number("SELECT ingress.secrets_in_clear()").await?;
    let judge = |name: &str, in_clear: i64, count: fn(&sealing::Stored) -> i64| {
        let all: i64 = stored.iter().map(count).sum();
        let unknown: i64 = stored.iter().filter(|of| keys.find(&of.key).is_none()).map(count).sum();
        let under = stored.iter().filter(|of| count(of) > 0).map(|of| of.key.as_str()).collect::<Vec<_>>();
        let mut seen = vec![format!("{all} under {} keys", under.len())];
        seen.extend(under.iter().map(|&key| key.to_owned()));
        let mut protection = Protection::unless(in_clear, Protection::Sealed);
        if in_clear > 0 {
            seen.push(format!("{in_clear} in clear"));
        } else if unknown > 0 {
            protection = Protection::Unknown;
            seen.push(format!("{unknown} under keys that are not there"));
        }
        Finding::store(name, protection, seen.join(", "), "the key and the first bytes of each")
    };
    Ok(vec![
        judge("reports", reports_in_clear, |of| of.reports),
        judge("ACME accounts and keys", secrets_in_clear, |of| of.secrets),
    ])
}

async fn hashed(client: &Client) -> Result<Vec<Finding>> {
    let passwords = "SELECT count(*), count(*) FILTER (WHERE password_hash NOT LIKE '$argon2id$%') \
                     FROM auth.users WHERE password_hash IS NOT NULL";
    // A hash has 32 bytes; a secret of ours in clear has more, and begins with its kind.
    let secrets = "SELECT count(*), count(*) FILTER (WHERE length(hash) <> 32) FROM ( \
                   SELECT secret_hash AS hash FROM auth.credentials WHERE secret_hash IS NOT NULL \
                   UNION ALL SELECT hash FROM auth.refresh_tokens UNION ALL SELECT hash FROM auth.sessions) AS all_of_them";
    let mut findings = Vec::new();
    for (name, how, select) in [
        ("passwords", "argon2id", passwords),
        ("clients' secrets, refresh tokens, sessions", "SHA-256 of 256 random bits", secrets),
    ] {
        let row = client.query_one(select, &[]).await?;
        let (all, clear): (i64, i64) = (row.get(0), row.get(1));
        let seen = format!("{all} as {how}, {clear} of another form");
        findings.push(Finding::store(
            name,
            Protection::unless(clear, Protection::Hashed),
            seen,
            "the form of each",
        ));
    }
    Ok(findings)
}
