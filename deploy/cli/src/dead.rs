//! `dermflow dead`: jobs that were given up, for operators.

use std::{
    io::{IsTerminal, stderr, stdin},
    time::Duration,
};

use clap::{Args, Subcommand};
use dermflow_schemas::clock;
use reqwest::Method;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    Failure,
    access::{Api, Trouble},
    table::{self, Table},
};

/// Dead letters asked for at once.
const PAGE: usize = 100;
const COLUMNS: &[(&str, usize)] = &[
    ("sequence", 8),
    ("dead_at", 24),
    ("reason", 20),
    ("attempts", 8),
    ("lane", 11),
    ("bytes", 9),
    ("client", 36),
    ("job", 36),
];

/// What to do with dead letters.
#[derive(Debug, Clone, Subcommand)]
pub enum DeadCommand {
    /// Lists dead letters, the oldest first.
    List {
        /// Begin after this sequence number.
        #[arg(long, value_name = "SEQ", default_value_t = 0)]
        after: u64,
        /// At most so many.
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
    },
    /// Shows one dead letter with its job's record.
    Show {
        /// Its sequence number.
        sequence: u64,
    },
    /// Queues jobs again, each under its old id.
    Requeue(Chosen),
    /// Removes dead letters with their images, for good.
    Purge {
        /// Which ones.
        #[command(flatten)]
        chosen: Chosen,
        /// Do not ask.
        #[arg(long)]
        yes: bool,
    },
}

/// Which dead letters.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub struct Chosen {
    /// Sequence numbers.
    #[arg(value_name = "SEQ")]
    sequences: Vec<u64>,
    /// All there are.
    #[arg(long)]
    all: bool,
    /// Those that were given up longer ago than this, such as 90m, 12h or 7d.
    #[arg(long, value_name = "AGE", value_parser = age)]
    older_than: Option<Duration>,
}

/// Carries out a command; the exit code tells whether each dead letter did what it should.
///
/// # Errors
/// When the server does not let us, or cannot be reached.
pub async fn run(api: &Api, command: DeadCommand, json: bool) -> Result<u8, Failure> {
    match command {
        DeadCommand::List { after, limit } => list(api, after, limit, json).await,
        DeadCommand::Show { sequence } => match api.get(&format!("/dead/{sequence}")).await {
            Ok(found) => table::object(&found, json).map(|()| 0),
            Err(Trouble::Final(Some(404), _)) => {
                eprintln!("dermflow: there is no dead letter {sequence}");
                Ok(1)
            }
            Err(trouble) => Err(trouble.into()),
        },
        DeadCommand::Requeue(chosen) => {
            let sequences = chosen.sequences(api).await?;
            each(api, &sequences, &Method::POST, "/requeue", json).await
        }
        DeadCommand::Purge { chosen, yes } => {
            let sequences = chosen.sequences(api).await?;
            if !yes && !sequences.is_empty() {
                confirm(sequences.len())?;
            }
            each(api, &sequences, &Method::DELETE, "", json).await
        }
    }
}

async fn list(api: &Api, after: u64, limit: Option<usize>, json: bool) -> Result<u8, Failure> {
    let mut table = Table::new(COLUMNS, json);
    let mut left = limit.unwrap_or(usize::MAX);
    let mut cursor = Some(after);
    while let Some(from) = cursor.filter(|_| left > 0) {
        let (page, next) = page(api, from, left.min(PAGE)).await?;
        for letter in page.iter().take(left) {
            table.row(letter)?;
        }
        left = left.saturating_sub(page.len());
        cursor = next;
    }
    Ok(0)
}

/// The dead letters after `cursor`, and the next cursor when there are more.
async fn page(api: &Api, cursor: u64, limit: usize) -> Result<(Vec<Value>, Option<u64>), Failure> {
    let mut body = api.get(&format!("/dead?cursor={cursor}&limit={limit}")).await?;
    let Value::Array(letters) = body["dead"].take() else {
        return Err(Failure::Unfinished("the server's list cannot be read".into()));
    };
    // A server that named the same place again would be asked for ever.
    Ok((letters, body["next"].as_u64().filter(|next| *next > cursor)))
}

impl Chosen {
    async fn sequences(&self, api: &Api) -> Result<Vec<u64>, Failure> {
        if !self.sequences.is_empty() {
            return Ok(self.sequences.clone());
        }
        let before = self.older_than.map(|age| clock::now() - age);
        let (mut chosen, mut cursor) = (Vec::new(), Some(0));
        while let Some(from) = cursor {
            let (letters, next) = page(api, from, PAGE).await?;
            let old = letters.iter().filter(|letter| before.is_none_or(|before| died_before(letter, before)));
            chosen.extend(old.filter_map(|letter| letter["sequence"].as_u64()));
            cursor = next;
        }
        Ok(chosen)
    }
}

/// False when the time cannot be read: what is not known to be old is kept.
fn died_before(letter: &Value, before: OffsetDateTime) -> bool {
    let died = letter["dead_at"].as_str().and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
    died.is_some_and(|died| died < before)
}

/// Does the same to each. One that is gone does not keep the others.
async fn each(api: &Api, sequences: &[u64], method: &Method, verb: &str, json: bool) -> Result<u8, Failure> {
    let mut failed = 0;
    for sequence in sequences {
        match api.act(method.clone(), &format!("/dead/{sequence}{verb}")).await {
            Ok(mut done) if json => {
                if !done.is_object() {
                    done = json!({});
                }
                done["sequence"] = json!(sequence);
                table::object(&done, true)?;
            }
            Ok(done) => {
                let job = done["job"].as_str().map(|job| format!(", job {job}")).unwrap_or_default();
                table::print(&format!("{sequence}: done{job}"))?;
            }
            Err(Trouble::Final(Some(401 | 403), what)) => return Err(Failure::Unfinished(what)),
            Err(Trouble::Final(_, what)) => {
                failed += 1;
                eprintln!("dermflow: {sequence}: {what}");
            }
            Err(Trouble::Again(_, what)) => {
                return Err(Failure::Unfinished(format!("{sequence}: {what}; the rest is untouched")));
            }
        }
    }
    if !json {
        eprintln!("{} done, {failed} failed", sequences.len() - failed);
    }
    Ok(u8::from(failed > 0))
}

fn confirm(count: usize) -> Result<(), Failure> {
    if !stdin().is_terminal() || !stderr().is_terminal() {
        return Err(Failure::Usage("there is no terminal to ask on: say --yes".into()));
    }
    eprint!("Remove {count} dead letters and their images for good? [y/N] ");
    let mut answer = String::new();
    let read = stdin().read_line(&mut answer);
    if read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Failure::Usage("nothing was removed".into()))
    }
}

fn age(text: &str) -> Result<Duration, String> {
    let wrong = || "an age is a number and m, h or d, such as 90m, 12h or 7d".to_owned();
    let unit = text.chars().last().ok_or_else(wrong)?;
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    let seconds = match unit {
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    // A century is enough, and cannot overflow a date.
    Ok(Duration::from_secs(number.saturating_mul(seconds).min(100 * 366 * 86_400)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_read() {
        let seconds = |text| age(text).map(|age| age.as_secs());
        assert_eq!((seconds("90m"), seconds("12h"), seconds("7d")), (Ok(5_400), Ok(43_200), Ok(604_800)));
        for wrong in ["", "d", "7", "-1d", "7é", "1.5h"] {
            assert!(age(wrong).is_err(), "{wrong}");
        }
        assert!(
            OffsetDateTime::UNIX_EPOCH
                .checked_sub(age("99999999999d").unwrap().try_into().unwrap())
                .is_some()
        );
    }

    #[test]
    fn what_is_not_known_to_be_old_is_kept() {
        let before = OffsetDateTime::parse("2026-01-02T00:00:00Z", &Rfc3339).unwrap();
        let died = |at: &str| died_before(&json!({ "dead_at": at }), before);
        assert!(died("2026-01-01T23:59:59.5Z") && !died("2026-01-02T00:00:00Z"));
        assert!(!died("yesterday") && !died_before(&json!({}), before));
    }
}
