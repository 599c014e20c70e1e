//! `auth keys`: makes, counts, rotates and prunes the keys that seal images and reports.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Subcommand;
use deadpool_postgres::{Client, Pool};
use dermflow_auth::{
    audit::chain::patient,
    sealing::{self, PAYLOAD_LIFE, Stored},
};
use dermflow_schemas::{
    clock,
    id::JobId,
    limits::{RESEAL_SILENCE, SEALING_LEAD},
    seal::{Key, Keys, MAX_KEYS, files},
};
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use crate::cli::Sure;

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_secs(1);
/// Jobs in one page of those that are named at the end.
const PAGE: i64 = 1_000;

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Makes a key that begins to seal in ten minutes, when every process has seen it; the first one at once. Needs no
    /// database.
    Add {
        /// The folder, `--sealing-keys` of ingress and workers.
        folder: PathBuf,
    },
    /// Lists the keys and what is stored under each; those that are not in the folder, too.
    List {
        /// The folder.
        folder: PathBuf,
    },
    /// Makes a key as `add` does, then goes on as `reseal` for it.
    Rotate {
        /// The folder.
        folder: PathBuf,
        /// Only makes the key: the rest is done without anybody looking.
        #[arg(long)]
        detach: bool,
    },
    /// Shows how ingress seals what is stored with the key that seals at present, until it has; then names the jobs whose
    /// report cannot be opened, with exit code 1. May be interrupted and repeated: ingress goes on all the same.
    Reseal {
        /// The folder.
        folder: PathBuf,
    },
    /// Removes the keys that nothing needs any more: nothing is stored under them, and no payload at the broker can be.
    /// Says of the others why and until when they are kept. Every process must have seen the newer keys: one that was never
    /// told of them still seals with an old one.
    Prune {
        /// The folder.
        folder: PathBuf,
        #[command(flatten)]
        sure: Sure,
    },
}

/// `auth keys add`.
pub(crate) fn add(folder: &Path, json: bool) -> Result<()> {
    show(&make(folder)?, json);
    Ok(())
}

/// The file of a key; in JSON a document.
fn show(file: &Path, json: bool) {
    if json {
        println!("{}", json!({ "file": file }));
    } else {
        println!("{}", file.display());
    }
}

/// Every other command.
pub(crate) async fn run(pool: &Pool, command: KeysCommand, json: bool) -> Result<()> {
    let client = pool.get().await?;
    patient(&client).await?;
    match command {
        KeysCommand::Add { folder } => add(&folder, json),
        KeysCommand::List { folder } => list(&client, &folder, json).await,
        KeysCommand::Rotate { folder, detach } => {
            // Before anything is made: a folder that is not the services' own has no key to rotate.
            stored(&client, &Keys::read(&folder)?.newest().id).await?;
            add(&folder, json)?;
            if detach { Ok(()) } else { follow(&client, &folder, json, true).await }
        }
        KeysCommand::Reseal { folder } => follow(&client, &folder, json, false).await,
        KeysCommand::Prune { folder, sure } => {
            sure.check(&format!("removes the keys of {} that nothing needs", folder.display()))?;
            prune(&client, &folder, json).await
        }
    }
}

fn make(folder: &Path) -> Result<PathBuf> {
    ensure!(
        !folder.is_file(),
        "{} is a file: put it into a folder, as k1.key, and name the folder",
        folder.display()
    );
    // A folder whose keys cannot be read is no empty one.
    let count = if folder.exists() { files(folder)?.len() } else { 0 };
    ensure!(
        count < MAX_KEYS,
        "{} has {MAX_KEYS} keys, as many as may be: see `auth keys prune`",
        folder.display()
    );
    let empty = count == 0;
    if !empty {
        Keys::read(folder)?;
    }
    let begins = if empty { clock::now() } else { clock::now() + SEALING_LEAD };
    Ok(sealing::add(folder, begins)?)
}

async fn stored(client: &Client, sealing: &str) -> Result<Vec<Stored>> {
    let stored = sealing::stored(client, sealing).await;
    stored.context("cannot see what is sealed, which is prepared by ingress when it starts")
}

fn time(moment: OffsetDateTime) -> String {
    moment.format(&Rfc3339).unwrap_or_default()
}

/// A line, or in JSON a document, a key.
async fn list(client: &Client, folder: &Path, json: bool) -> Result<()> {
    let (keys, now) = (Keys::read(folder)?, clock::now());
    let sealing = &keys.sealing(now).id;
    let stored = stored(client, sealing).await?;
    let missing = stored.iter().filter(|stored| keys.find(&stored.key).is_none());
    let known = keys.iter().map(|key| {
        let state = match key {
            key if key.id == *sealing => "seals",
            key if key.begins > now => "will seal",
            _ => "opens",
        };
        (key.id.as_str(), Some(key.begins), state)
    });
    let mut out = io::stdout().lock();
    for (id, begins, state) in known.chain(missing.map(|stored| (stored.key.as_str(), None, "missing"))) {
        let of = stored.iter().find(|stored| stored.key == id);
        let (reports, secrets) = of.map_or((0, 0), |of| (of.reports, of.secrets));
        let begins = begins.map(time);
        if json {
            let key = json!({ "key": id, "begins": begins, "state": state, "reports": reports, "secrets": secrets });
            writeln!(out, "{key}")?;
        } else {
            let begins = begins.as_deref().unwrap_or("unknown");
            writeln!(out, "{id}\t{state}\tfrom {begins}\treports {reports}\tsecrets {secrets}")?;
        }
    }
    Ok(())
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    /// Sealed with the key already.
    new: i64,
    /// Sealed with older keys that are there.
    left: i64,
    /// Sealed with keys that are not there, or broken.
    unreadable: i64,
}

impl Standing {
    fn of(stored: &[Stored], keys: &Keys, sealing: &str) -> Self {
        let mut standing = Self { new: 0, left: 0, unreadable: 0 };
        for Stored { key, reports, broken, secrets } in stored {
            let all = reports + secrets;
            if key == sealing {
                standing.new += all;
            } else if keys.find(key).is_some() {
                standing.left += all - broken;
                standing.unreadable += broken;
            } else {
                standing.unreadable += all;
            }
        }
        standing
    }
}

/// What is told on the way.
struct Progress {
    json: bool,
    begun: Instant,
    new: i64,
    total: i64,
    left: i64,
    moved: Instant,
}

impl Progress {
    fn new(standing: Standing, json: bool) -> Self {
        let (begun, left) = (Instant::now(), standing.left);
        Self { json, begun, new: standing.new, total: left, left, moved: begun }
    }

    /// # Errors
    /// When nothing has moved for too long.
    fn note(&mut self, standing: Standing) -> Result<()> {
        if standing.left == self.left {
            ensure!(
                self.moved.elapsed() < RESEAL_SILENCE,
                "{} left, and nobody has sealed any of them anew for {RESEAL_SILENCE:?}: does ingress run, with this \
                 folder? Its log says what is in the way",
                self.left
            );
            return Ok(());
        }
        (self.left, self.moved) = (standing.left, Instant::now());
        self.total = self.total.max(self.left);
        self.tell();
        Ok(())
    }

    fn done(&self) -> i64 {
        self.total - self.left
    }

    fn tell(&self) {
        let Self { total, left, .. } = *self;
        let done = self.done();
        let rate = done as f64 / self.begun.elapsed().as_secs_f64().max(0.001);
        let seconds = (done > 0).then(|| (left as f64 / rate).ceil() as i64);
        if self.json {
            let told = json!({
                "done": done, "total": total, "per_second": rate.round(), "left": left, "seconds_left": seconds
            });
            eprintln!("{told}");
        } else {
            let seconds = seconds.map(|seconds| format!(", {seconds} s")).unwrap_or_default();
            eprintln!("{done}/{total} sealed anew, {rate:.0} a second, {left} left{seconds}");
        }
    }
}

/// Watches until nothing is left to seal anew with the key that seals, or with the newest one as soon as it does.
async fn follow(client: &Client, folder: &Path, json: bool, newest: bool) -> Result<()> {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut waits, mut progress) = (false, None);
    loop {
        look.tick().await;
        let (keys, now) = (Keys::read(folder)?, clock::now());
        let key = if newest { keys.newest() } else { keys.sealing(now) };
        if key.begins > now {
            if !waits {
                tell_wait(key, json);
            }
            waits = true;
            continue;
        }
        let standing = Standing::of(&stored(client, &key.id).await?, &keys, &key.id);
        let progress = progress.get_or_insert_with(|| {
            let progress = Progress::new(standing, json);
            progress.tell();
            progress
        });
        progress.note(standing)?;
        if standing.left == 0 {
            return conclude(client, &keys, key, progress, standing).await;
        }
    }
}

fn tell_wait(key: &Key, json: bool) {
    let begins = time(key.begins);
    if json {
        eprintln!("{}", json!({ "key": key.id, "begins": begins }));
    } else {
        eprintln!("key {} begins to seal at {begins}, and what is stored follows it then", key.id);
    }
}

/// Names what cannot be opened, then sums up.
async fn conclude(
    client: &Client,
    keys: &Keys,
    sealing: &Key,
    progress: &Progress,
    standing: Standing,
) -> Result<()> {
    let ids: Vec<String> = keys.iter().map(|key| key.id.clone()).collect();
    let mut out = io::stdout().lock();
    let mut after: JobId = Uuid::nil().into();
    loop {
        let jobs = sealing::unreadable(client, &ids, &sealing.id, after, PAGE).await?;
        for job in &jobs {
            if progress.json {
                writeln!(out, "{}", json!({ "unreadable": job.to_string() }))?;
            } else {
                writeln!(out, "unreadable {job}")?;
            }
        }
        match jobs.last() {
            Some(last) if jobs.len() as i64 == PAGE => after = *last,
            _ => break,
        }
    }
    let (done, new, unreadable) = (progress.done(), progress.new, standing.unreadable);
    if progress.json {
        let sum =
            json!({ "key": sealing.id, "resealed": done, "already_new": new, "unreadable": unreadable });
        writeln!(out, "{sum}")?;
    } else {
        writeln!(out, "key {}: resealed {done}, already new {new}, unreadable {unreadable}", sealing.id)?;
    }
    out.flush()?;
    if unreadable > 0 {
        bail!("{unreadable} cannot be opened: their keys are gone, or they are broken");
    }
    Ok(())
}

async fn prune(client: &Client, folder: &Path, json: bool) -> Result<()> {
    let (keys, now) = (Keys::read(folder)?, clock::now());
    let stored = stored(client, &keys.sealing(now).id).await?;
    for file in files(folder)? {
        let mut needs = Vec::new();
        for of in Keys::read(&file)?.iter() {
            let Some(end) = keys.find(&of.id).and_then(|key| keys.end(key)).filter(|end| *end <= now) else {
                needs.push(None);
                continue;
            };
            let sealed = stored.iter().find(|stored| stored.key == of.id);
            let sealed = sealed.map_or(0, |stored| stored.reports + stored.secrets);
            let unsettled = sealing::unsettled_before(client, end).await?;
            needs.extend(need(now, end, sealed, unsettled).map(Some));
        }
        match needs.into_iter().next() {
            // It seals, or will.
            Some(None) => {}
            Some(Some(need)) => eprintln!("{} is kept: {need}", file.display()),
            None => {
                fs::remove_file(&file).with_context(|| file.display().to_string())?;
                show(&file, json);
            }
        }
    }
    Ok(())
}

/// What a key is still needed for that stopped to seal at `end`.
fn need(now: OffsetDateTime, end: OffsetDateTime, sealed: i64, unsettled: i64) -> Option<String> {
    let until = end + PAYLOAD_LIFE;
    if now < until {
        return Some(format!("payloads and dead letters may need it until {}", time(until)));
    }
    if sealed > 0 {
        return Some(format!("{sealed} reports and secrets are sealed with it, see `auth keys reseal`"));
    }
    (unsettled > 0)
        .then(|| format!("{unsettled} jobs from before its end are open, or may go back into the queue"))
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_key_is_kept_as_long_as_anything_may_need_it() {
        let end = datetime!(2026-01-31 12:00 UTC);
        let late = end + PAYLOAD_LIFE;
        let early = need(late - LOOK, end, 0, 0).unwrap();
        assert!(early.ends_with("until 2026-02-15T12:00:00Z"), "{early}");
        assert!(need(late, end, 3, 1).unwrap().starts_with("3 reports"));
        assert!(need(late, end, 0, 1).unwrap().starts_with("1 jobs"));
        assert_eq!(need(late, end, 0, 0), None);
    }

    #[test]
    fn what_is_left_is_what_can_be_opened() {
        let folder = std::env::temp_dir().join(format!("dermflow-keys-{}", Uuid::new_v4()));
        let now = clock::now();
        assert!(make(&folder).is_ok());
        assert!(Keys::read(&folder).unwrap().newest().begins <= now, "the first one seals at once");
        make(&folder).unwrap();
        let keys = Keys::read(&folder).unwrap();
        let ids: Vec<&str> = keys.iter().map(|key| key.id.as_str()).collect();
        assert!(keys.newest().begins > now + SEALING_LEAD - LOOK, "the second one does not");
        let stored =
            |key: &str, reports, broken, secrets| Stored { key: key.into(), reports, broken, secrets };
        let all = [stored(ids[1], 5, 0, 1), stored(ids[0], 10, 2, 1), stored("lost", 3, 0, 1)];
        let expected = Standing { new: 6, left: 9, unreadable: 6 };
        assert_eq!(Standing::of(&all, &keys, ids[1]), expected);
        fs::write(folder.join("x.key"), "x").unwrap();
        assert!(make(&folder).is_err(), "no key beside what cannot be read");
        fs::remove_dir_all(folder).unwrap();
    }
}
