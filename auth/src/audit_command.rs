//! `auth audit`: verifies, exports and prunes the audit trail.

use std::{
    io::{BufWriter, Write},
    time::Duration,
};

use anyhow::Context;
use clap::Subcommand;
use deadpool_postgres::Pool;
use dermflow_auth::audit::{
    self, Action, COMMAND, Event, Who,
    chain::{self, Broken, Head},
    command_detail, fhir,
    search::{self, Filter},
};
use dermflow_schemas::{
    clock,
    limits::{AUDIT_CHAIN_BATCH, AUDIT_PRUNE_BATCH},
};
use serde_json::json;
use time::{Date, OffsetDateTime, format_description::well_known::Rfc3339, macros::format_description};

use crate::cli::Sure;

#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Computes the hash chain anew and prints its head, `<link>:<hash>`; exit code 1 with the first row that was
    /// changed, removed, inserted or moved, in JSON as `reason`, `link` and `event`. Keep the head elsewhere: it is what
    /// later shows that nobody has made the whole chain anew.
    Verify {
        /// A head that was kept: it must still be in the chain.
        #[arg(long)]
        head: Option<Head>,
    },
    /// Writes the trail as FHIR `AuditEvent`, one a line, on standard output. The export itself is recorded first.
    Export {
        /// From this time on: RFC 3339, or a date (UTC).
        #[arg(long, value_parser = date_or_time)]
        since: Option<OffsetDateTime>,
        /// Before this time.
        #[arg(long, value_parser = date_or_time)]
        until: Option<OffsetDateTime>,
    },
    /// Removes events that are older than the retention; the rest verifies as before. For a daily timer.
    Prune {
        /// Days, with the letter `d`.
        #[arg(long, env = "DERMFLOW_AUDIT_RETENTION", default_value = "400d", value_parser = days)]
        older_than: Duration,
        #[command(flatten)]
        sure: Sure,
    },
}

/// Runs a command.
pub(crate) async fn run(pool: &Pool, command: AuditCommand, json: bool) -> anyhow::Result<()> {
    match command {
        AuditCommand::Verify { head } => verify(pool, head, json).await,
        AuditCommand::Export { since, until } => {
            export(pool, &Filter { since, until, ..Filter::default() }).await
        }
        AuditCommand::Prune { older_than, sure } => {
            let days = older_than.as_secs() / 86_400;
            sure.check(&format!("removes every event that is older than {days} days"))?;
            prune(pool, older_than, json).await
        }
    }
}

async fn verify(pool: &Pool, head: Option<Head>, json: bool) -> anyhow::Result<()> {
    let mut client = pool.get().await?;
    match chain::verify(&mut client, head).await {
        Ok(intact) if json => {
            println!("{}", json!({ "intact": true, "links": intact.links, "head": intact.head.to_string() }));
        }
        Ok(intact) => println!("intact, links {}, head {}", intact.links, intact.head),
        // Nothing is known of the trail.
        Err(Broken::Db(error)) => return Err(error).context("cannot verify"),
        Err(broken) => {
            if json {
                let (link, event) = broken.place();
                println!(
                    "{}",
                    json!({ "intact": false, "reason": broken.to_string(), "link": link, "event": event })
                );
            }
            return Err(broken).context("the trail is not intact");
        }
    }
    Ok(())
}

async fn export(pool: &Pool, filter: &Filter) -> anyhow::Result<()> {
    let client = pool.get().await?;
    chain::patient(&client).await?;
    let mut detail = command_detail();
    for (name, at) in [("since", filter.since), ("until", filter.until)] {
        if let Some(at) = at {
            detail[name] = json!(at.unix_timestamp());
        }
    }
    let event = Event::new(Action::TrailExported, Who::part(COMMAND), clock::now()).detail(detail);
    audit::insert(&client, &[event]).await?;
    // What is recorded while this runs is for the next export.
    let last: i64 = client.query_one("SELECT coalesce(max(id), 0) FROM auth.audit", &[]).await?.get(0);
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut after = i64::MIN;
    loop {
        let page = search::page(&client, filter, after, last, AUDIT_CHAIN_BATCH).await?;
        let Some(end) = page.last() else { break };
        after = end.id;
        for event in &page {
            writeln!(out, "{}", fhir::resource(event))?;
        }
    }
    out.flush()?;
    Ok(())
}

async fn prune(pool: &Pool, older_than: Duration, json: bool) -> anyhow::Result<()> {
    let mut client = pool.get().await?;
    chain::patient(&client).await?;
    // An event that is not chained has no place from which it could be removed.
    while chain::extend(&mut client, None).await? > 0 {}
    let before = clock::now() - older_than;
    let mut detail = command_detail();
    detail["days"] = json!(older_than.as_secs() / 86_400);
    let mut removed = 0;
    loop {
        let prune = "SELECT auth.audit_prune($1, $2, $3)";
        let some: i64 = client.query_one(prune, &[&before, &AUDIT_PRUNE_BATCH, &detail]).await?.get(0);
        removed += some;
        if some < AUDIT_PRUNE_BATCH {
            break;
        }
    }
    if json {
        println!("{}", json!({ "removed": removed }));
    } else {
        println!("removed {removed}");
    }
    Ok(())
}

fn date_or_time(text: &str) -> Result<OffsetDateTime, String> {
    let date = Date::parse(text, format_description!("[year]-[month]-[day]"));
    match (OffsetDateTime::parse(text, &Rfc3339), date) {
        (Ok(at), _) => Ok(at),
        (Err(_), Ok(date)) => Ok(date.midnight().assume_utc()),
        _ => Err("neither RFC 3339 nor a date such as 2026-01-31".into()),
    }
}

fn days(text: &str) -> Result<Duration, String> {
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
    let days = days.filter(|days| *days <= 36_500);
    days.map(|days| Duration::from_secs(u64::from(days) * 86_400))
        .ok_or_else(|| "a number of days, such as 400d".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_days_are_read() {
        assert_eq!(date_or_time("1970-01-02").map(OffsetDateTime::unix_timestamp), Ok(86_400));
        assert_eq!(date_or_time("1970-01-01T01:00:00+01:00").map(OffsetDateTime::unix_timestamp), Ok(0));
        assert!(date_or_time("yesterday").is_err());
        assert_eq!(days("400d"), Ok(Duration::from_hours(9_600)));
        for bad in ["", "d", "400", "-1d", "1h", "99999999d"] {
            assert!(days(bad).is_err(), "{bad}");
        }
    }
}
