//! `dermflow jobs` and `dermflow batch`: the caller's own jobs and batches.

use clap::Subcommand;
use reqwest::Method;
use serde_json::Value;
use uuid::Uuid;

use crate::{
    Failure,
    access::{Api, Trouble},
    table::{self, Table},
};

const COLUMNS: &[(&str, usize)] =
    &[("id", 36), ("status", 10), ("lane", 11), ("attempts", 8), ("accepted_at", 24), ("finished_at", 24)];

/// What to do with jobs.
#[derive(Debug, Clone, Subcommand)]
pub enum JobsCommand {
    /// Lists jobs.
    List {
        /// Only those in this state, such as queued or failed.
        #[arg(long)]
        status: Option<String>,
        /// Only those of this batch.
        #[arg(long, value_name = "ID")]
        batch: Option<Uuid>,
        /// Only those accepted after this time, such as 2026-01-31T12:00:00Z.
        #[arg(long, value_name = "TIME")]
        created_after: Option<String>,
        /// At most so many.
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
    /// Shows one job.
    Show {
        /// Its id.
        id: Uuid,
    },
    /// Cancels jobs that have not ended, and removes the results of those that have.
    Cancel {
        /// Their ids.
        #[arg(required = true)]
        ids: Vec<Uuid>,
    },
}

/// What to do with batches.
#[derive(Debug, Clone, Subcommand)]
pub enum BatchCommand {
    /// Shows how far a batch is.
    Show {
        /// Its id.
        id: Uuid,
    },
    /// Cancels what has not ended, and removes the results of the rest.
    Cancel {
        /// Its id.
        id: Uuid,
    },
}

/// Carries out a command about jobs.
///
/// # Errors
/// When the server does not let us, or cannot be reached.
pub async fn run(api: &Api, command: JobsCommand, json: bool) -> Result<u8, Failure> {
    match command {
        JobsCommand::List { status, batch, created_after, limit } => {
            let batch = batch.map(|id| id.to_string());
            let filters = [("status", status), ("batch", batch), ("created_after", created_after)];
            list(api, &filters, limit, json).await
        }
        JobsCommand::Show { id } => show(api, &format!("/jobs/{id}"), json).await,
        JobsCommand::Cancel { ids } => {
            let mut code = 0;
            for id in ids {
                code |= act(api, &format!("/fhir/_async/{id}"), &id).await?;
            }
            Ok(code)
        }
    }
}

/// Carries out a command about batches.
///
/// # Errors
/// When the server does not let us, or cannot be reached.
pub async fn run_batch(api: &Api, command: BatchCommand, json: bool) -> Result<u8, Failure> {
    match command {
        BatchCommand::Show { id } => show(api, &format!("/batches/{id}"), json).await,
        BatchCommand::Cancel { id } => act(api, &format!("/batches/{id}"), &id).await,
    }
}

async fn list(
    api: &Api,
    filters: &[(&str, Option<String>)],
    limit: Option<usize>,
    json: bool,
) -> Result<u8, Failure> {
    let given =
        filters.iter().filter_map(|(name, value)| Some(format!("{name}={}", encoded(value.as_deref()?))));
    let mut path = Some(format!("/jobs?{}", given.collect::<Vec<_>>().join("&")));
    let (mut table, mut left) = (Table::new(COLUMNS, json), limit.unwrap_or(usize::MAX));
    while let Some(from) = path.filter(|_| left > 0) {
        let body = api.get(&from).await?;
        let jobs = body["jobs"].as_array().map(Vec::as_slice).unwrap_or_default();
        for job in jobs.iter().take(left) {
            table.row(job)?;
        }
        left = left.saturating_sub(jobs.len());
        path = next(&body).filter(|next| *next != from && !jobs.is_empty());
    }
    Ok(0)
}

/// The path of the next page: the server names it with its public origin, which is not always ours.
fn next(body: &Value) -> Option<String> {
    let url = body["next"].as_str()?;
    let (_, rest) = url.split_once("://")?;
    Some(rest[rest.find('/')?..].to_owned())
}

/// Percent-encoding of everything that could mean something in a query.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    text.bytes().map(byte).collect()
}

async fn show(api: &Api, path: &str, json: bool) -> Result<u8, Failure> {
    match api.get(path).await {
        Ok(found) => table::object(&found, json).map(|()| 0),
        Err(Trouble::Final(Some(404), what)) => {
            eprintln!("dermflow: {what}");
            Ok(1)
        }
        Err(trouble) => Err(trouble.into()),
    }
}

async fn act(api: &Api, path: &str, id: &Uuid) -> Result<u8, Failure> {
    match api.act(Method::DELETE, path).await {
        Ok(_) => table::print(&format!("{id}: done")).map(|()| 0),
        Err(Trouble::Final(Some(404 | 409), what)) => {
            eprintln!("dermflow: {id}: {what}");
            Ok(1)
        }
        Err(trouble) => Err(trouble.into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_next_page_is_asked_for_where_the_first_one_was() {
        let page = json!({ "next": "https://public.example/jobs?cursor=a%2Bb" });
        assert_eq!(next(&page).as_deref(), Some("/jobs?cursor=a%2Bb"));
        assert_eq!((next(&json!({ "next": null })), next(&json!({ "next": "x" }))), (None, None));
    }

    #[test]
    fn a_filter_cannot_become_another() {
        assert_eq!(
            encoded("2026-01-31T12:00:00+01:00&a=é"),
            "2026-01-31T12%3A00%3A00%2B01%3A00%26a%3D%C3%A9"
        );
    }
}
