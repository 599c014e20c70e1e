//! `auth encryption`: which links and stores of the running system are encrypted, each with how that is known.
//!
//! Nothing of it is read from a configuration: the broker and the database are asked, listeners are spoken to, and the
//! broker's files are looked at. What cannot be seen counts as not encrypted.

mod broker;
mod database;
mod listener;
mod store;

use std::{
    fmt,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use deadpool_postgres::Pool;
use dermflow_auth::{audit::chain::patient, db::DatabaseOptions};
use dermflow_schemas::{
    queue::NatsOptions,
    seal::{Keyring, SealingOptions},
};
use serde::Serialize;
use serde_json::json;

#[derive(Debug, Args)]
pub(crate) struct EncryptionOptions {
    #[command(flatten)]
    nats: NatsOptions,
    #[command(flatten)]
    sealing: SealingOptions,
    /// Listeners to speak to, `https://host:port`, with commas: of ingress, its replicas, `operate` and `auth serve`.
    #[arg(long, env = "DERMFLOW_LISTENERS", value_delimiter = ',', required = true)]
    listener: Vec<String>,
    /// The CA that signed their certificates (PEM).
    #[arg(long, env = "DERMFLOW_LISTENER_CA")]
    listener_ca: PathBuf,
}

/// How something is kept from others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Protection {
    /// A link over TLS.
    Tls,
    /// A Unix socket in a folder that others cannot enter: never on a network.
    PrivateSocket,
    /// A store that its server encrypts.
    Encrypted,
    /// Sealed by us with AES-256-GCM.
    Sealed,
    /// Only hashes are kept.
    Hashed,
    /// In clear, as it holds no image, report, name of a patient or secret. Counts neither way.
    ClearOnPurpose,
    /// It cannot be seen from here.
    Unknown,
    /// It is in clear.
    Clear,
}

impl Protection {
    fn as_str(self) -> &'static str {
        match self {
            Self::Tls => "TLS",
            Self::PrivateSocket => "private socket",
            Self::Encrypted => "encrypted",
            Self::Sealed => "sealed",
            Self::Hashed => "hashed",
            Self::ClearOnPurpose => "in clear on purpose",
            Self::Unknown => "UNKNOWN",
            Self::Clear => "IN CLEAR",
        }
    }

    /// Whether it is as it should be; `None` when that is not asked.
    fn is_good(self) -> Option<bool> {
        match self {
            Self::Tls | Self::PrivateSocket | Self::Encrypted | Self::Sealed | Self::Hashed => Some(true),
            Self::ClearOnPurpose => None,
            Self::Unknown | Self::Clear => Some(false),
        }
    }

    /// `good`, unless some of it is in clear.
    fn unless(in_clear: i64, good: Self) -> Self {
        if in_clear == 0 { good } else { Self::Clear }
    }
}

/// A link or a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    kind: &'static str,
    name: String,
    protection: Protection,
    /// What was seen.
    seen: String,
    /// Who said so.
    source: &'static str,
}

impl Finding {
    fn link(
        name: impl Into<String>,
        protection: Protection,
        seen: impl Into<String>,
        source: &'static str,
    ) -> Self {
        Self { kind: "link", name: name.into(), protection, seen: seen.into(), source }
    }

    fn store(
        name: impl Into<String>,
        protection: Protection,
        seen: impl Into<String>,
        source: &'static str,
    ) -> Self {
        Self { kind: "store", ..Self::link(name, protection, seen, source) }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, name, protection, seen, source } = self;
        write!(f, "{kind}\t{name}\t{}\t{seen}\t({source})", protection.as_str())
    }
}

/// How many of those that count are as they should be, and how many count.
fn share(findings: &[Finding]) -> (usize, usize) {
    let counted = findings.iter().filter_map(|finding| finding.protection.is_good());
    counted.fold((0, 0), |(good, all), is_good| (good + usize::from(is_good), all + 1))
}

/// # Errors
/// When something is not encrypted or cannot be seen, or the database or a listener does not answer.
pub(crate) async fn run(
    pool: &Pool,
    database: &DatabaseOptions,
    options: EncryptionOptions,
    json: bool,
) -> Result<()> {
    let client = pool.get().await?;
    patient(&client).await?;
    let keys = Keyring::obtain(&options.sealing).await.context("the sealing keys cannot be read")?;
    let mut findings = Vec::new();
    for url in &options.listener {
        findings.push(listener::look(url, &options.listener_ca).await?);
    }
    findings.extend(broker::look(&options.nats).await);
    findings.extend(database::look(&client, database, &keys.keys()).await?);
    let (good, all) = share(&findings);
    let mut out = io::stdout().lock();
    for finding in &findings {
        if json {
            writeln!(out, "{}", json!(finding))?;
        } else {
            writeln!(out, "{finding}")?;
        }
    }
    let percent = 100.0 * good as f64 / all.max(1) as f64;
    if json {
        writeln!(out, "{}", json!({ "encrypted": good, "of": all, "percent": percent }))?;
    } else {
        writeln!(out, "encrypted: {good} of {all}, {percent:.0} %")?;
    }
    out.flush()?;
    ensure!(good == all, "{} of {all} links and stores are not shown to be encrypted", all - good);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_counts_as_not_encrypted() {
        let of = |protection| Finding::link("a", protection, "", "");
        let all = [
            Protection::Tls,
            Protection::PrivateSocket,
            Protection::ClearOnPurpose,
            Protection::Unknown,
            Protection::Clear,
        ];
        assert_eq!(share(&all.map(of)), (2, 4));
        assert_eq!(share(&[]), (0, 0));
        assert_eq!(Protection::unless(1, Protection::Sealed), Protection::Clear);
    }
}
