//! The hash chain over the trail.
//!
//! A link holds SHA-256(hash of the link before || every column of its event). Transactions commit in another order
//! than that of the events' numbers, so events are chained after they are committed, about half a second later, one
//! process at a time. Whoever may write to the tables, the superuser included, cannot change, remove, insert or swap
//! rows that are chained without [`verify`] naming the place, unless all later links are made anew as well; and not
//! even then once a later [`Head`] is kept elsewhere.

use std::{fmt, str::FromStr};

use aws_lc_rs::digest::{SHA256, digest};
use deadpool_postgres::{Client, Transaction};
use dermflow_schemas::{
    image::hex,
    limits::{AUDIT_CHAIN_BATCH, AUDIT_COMMAND_DEADLINE, AUDIT_LATE},
};
use time::OffsetDateTime;
use tokio_postgres::{IsolationLevel, Row};

use super::{
    Action,
    search::{COLUMNS, Recorded},
};
use crate::db::DbError;

/// The advisory lock of whoever adds links; `auth.audit_prune` takes the same one.
const LOCK: i64 = 0x6175_6469_7463_6861;
/// The version of [`encode`].
const ENCODING: u8 = 1;
const NOTHING_BEFORE: [u8; 32] = [0; 32];

type Hash = [u8; 32];

/// A link and its hash: with it at hand nobody can change what is at or before it unseen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The number of the link.
    pub link: i64,
    /// Its hash.
    pub hash: Hash,
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.link, hex(&self.hash))
    }
}

/// A text that is no head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not of the form <link>:<hash>, as verify prints it")]
pub struct NoHead;

impl FromStr for Head {
    type Err = NoHead;

    fn from_str(text: &str) -> Result<Self, NoHead> {
        let (link, digits) = text.split_once(':').ok_or(NoHead)?;
        let mut hash = [0; 32];
        if digits.len() != 2 * hash.len() || !digits.is_ascii() {
            return Err(NoHead);
        }
        for (byte, pair) in hash.iter_mut().zip(digits.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| NoHead)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| NoHead)?;
        }
        Ok(Self { link: link.parse().map_err(|_| NoHead)?, hash })
    }
}

/// The first place at which the chain is not what it was.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// A link is not there.
    #[error("link {0} is missing")]
    LinkMissing(i64),
    /// A link is there that cannot be.
    #[error("link {0} was put in")]
    LinkExtra(i64),
    /// A link's event is not there.
    #[error("event {event}, at link {link}, was removed")]
    EventMissing {
        /// The link.
        link: i64,
        /// Its event.
        event: i64,
    },
    /// An event, its link, or their place.
    #[error("event {event}, at link {link}, is not what was chained there: it was changed, or moved")]
    Changed {
        /// The link.
        link: i64,
        /// Its event.
        event: i64,
    },
    /// An event says that it is older than what was chained before it.
    #[error("event {event}, at link {link}, was put in afterwards: it is older than what is before it")]
    Inserted {
        /// The link.
        link: i64,
        /// Its event.
        event: i64,
    },
    /// The beginning is gone, and no event says that it was removed under retention.
    #[error("the links up to {0} were removed, and the trail does not say by whom")]
    CutOff(i64),
    /// The head that was kept elsewhere is beyond the end.
    #[error("the trail was cut: it ends at link {end}, and link {head} was in it")]
    HeadMissing {
        /// The last link there is.
        end: i64,
        /// The one asked for.
        head: i64,
    },
    /// The head that was kept elsewhere is older than what is left under retention.
    #[error("link {0} was removed under retention: it cannot be compared")]
    HeadPruned(i64),
    /// The head that was kept elsewhere is another one.
    #[error("link {0} has another hash than the one that was kept: the trail up to it was made anew")]
    HeadOther(i64),
    /// See [`DbError`].
    #[error(transparent)]
    Db(#[from] DbError),
}

impl Broken {
    /// The link that is not what it was, and the event that it is of, where there is one.
    pub fn place(&self) -> (Option<i64>, Option<i64>) {
        match *self {
            Self::LinkMissing(link) | Self::LinkExtra(link) | Self::HeadOther(link) => (Some(link), None),
            Self::EventMissing { link, event }
            | Self::Changed { link, event }
            | Self::Inserted { link, event } => (Some(link), Some(event)),
            Self::CutOff(_) | Self::HeadMissing { .. } | Self::HeadPruned(_) | Self::Db(_) => (None, None),
        }
    }
}

impl From<tokio_postgres::Error> for Broken {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Db(error.into())
    }
}

/// An intact chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intact {
    /// Links that were looked at.
    pub links: i64,
    /// The last one.
    pub head: Head,
}

/// Every column of an event, each with whether it is there and its length, so that no two events look the same.
fn encode(event: &Recorded) -> Vec<u8> {
    let micros = (event.at.unix_timestamp_nanos() / 1_000) as i64;
    let uuid = |id: &Option<uuid::Uuid>| id.map(uuid::Uuid::into_bytes);
    let (client, request) = (uuid(&event.client), uuid(&event.request));
    let text = |text: &'_ Option<String>| text.as_deref().map(str::as_bytes).map(<[u8]>::to_vec);
    let columns = [
        Some(event.id.to_be_bytes().to_vec()),
        Some(micros.to_be_bytes().to_vec()),
        Some(event.actor_kind.as_bytes().to_vec()),
        text(&event.actor),
        Some(event.action.as_bytes().to_vec()),
        Some(event.outcome.as_bytes().to_vec()),
        text(&event.code),
        client.map(Vec::from),
        text(&event.object_kind),
        text(&event.object),
        text(&event.source),
        request.map(Vec::from),
        Some(event.detail.as_bytes().to_vec()),
    ];
    let mut bytes = vec![ENCODING];
    for column in columns {
        match column {
            None => bytes.push(0),
            Some(column) => {
                bytes.push(1);
                bytes.extend((column.len() as u32).to_be_bytes());
                bytes.extend(column);
            }
        }
    }
    bytes
}

fn link(before: &Hash, event: &Recorded) -> Hash {
    let hash = digest(&SHA256, &[before.as_slice(), &encode(event)].concat());
    let mut bytes = [0; 32];
    bytes.copy_from_slice(hash.as_ref());
    bytes
}

fn hash_of(row: &Row) -> Hash {
    let mut hash = [0; 32];
    let stored: &[u8] = row.get("hash");
    // The table holds nothing of another length.
    if stored.len() == hash.len() {
        hash.copy_from_slice(stored);
    }
    hash
}

/// Chains events that are committed and not chained yet, some at a time. With `recent` only those are looked for
/// whose number is not below those of the latest so many links; without it all of them, and another process that
/// chains is waited for. Returns how many.
///
/// # Errors
/// When the database is away.
pub async fn extend(client: &mut Client, recent: Option<i64>) -> Result<u64, DbError> {
    let transaction = client.transaction().await?;
    // In statements of their own, so that the next one sees what the holder before us has committed.
    if recent.is_none() {
        transaction.execute("SELECT pg_advisory_xact_lock($1)", &[&LOCK]).await?;
    } else {
        let free = transaction.query_one("SELECT pg_try_advisory_xact_lock($1)", &[&LOCK]).await?;
        if !free.get::<_, bool>(0) {
            return Ok(0);
        }
    }
    let select = "SELECT link, hash, (SELECT min(event) FROM \
                  (SELECT event FROM auth.audit_chain ORDER BY link DESC LIMIT $1) latest) AS since \
                  FROM auth.audit_chain ORDER BY link DESC LIMIT 1";
    let select = transaction.prepare_cached(select).await?;
    let last = transaction.query_opt(&select, &[&recent.unwrap_or(1)]).await?;
    let since = last.as_ref().filter(|_| recent.is_some()).map_or(i64::MIN, |row| row.get("since"));
    let (mut number, mut hash) =
        last.as_ref().map_or((0_i64, NOTHING_BEFORE), |row| (row.get("link"), hash_of(row)));
    let select = format!(
        "SELECT {COLUMNS} FROM auth.audit WHERE id >= $1 AND NOT EXISTS \
         (SELECT FROM auth.audit_chain WHERE event = id) ORDER BY id LIMIT $2"
    );
    let select = transaction.prepare_cached(&select).await?;
    let (mut links, mut events, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    for row in transaction.query(&select, &[&since, &AUDIT_CHAIN_BATCH]).await? {
        let event = Recorded::from(&row);
        number += 1;
        hash = link(&hash, &event);
        links.push(number);
        events.push(event.id);
        hashes.push(hash.to_vec());
    }
    if links.is_empty() {
        return Ok(0);
    }
    let insert = "INSERT INTO auth.audit_chain (link, event, hash) \
                  SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bytea[])";
    let insert = transaction.prepare_cached(insert).await?;
    let added = transaction.execute(&insert, &[&links, &events, &hashes]).await?;
    transaction.commit().await?;
    Ok(added)
}

/// Gives statements of a command the time to look at everything.
///
/// # Errors
/// When the database is away.
pub async fn patient(client: &Client) -> Result<(), DbError> {
    let patience = format!("SET statement_timeout = {}", AUDIT_COMMAND_DEADLINE.as_millis());
    Ok(client.batch_execute(&patience).await?)
}

/// Chains what is not chained yet, then computes every link anew. With `kept`, a head that was noted earlier, also
/// shows that what is there now is what was there then, and more.
///
/// # Errors
/// [`Broken`] at the first link that is not as it should be.
pub async fn verify(client: &mut Client, kept: Option<Head>) -> Result<Intact, Broken> {
    patient(client).await?;
    while extend(client, None).await? > 0 {}
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await
        .map_err(DbError::from)?;
    let select = "SELECT link, hash FROM auth.audit_checkpoints ORDER BY link DESC LIMIT 1";
    let begin = transaction.query_opt(select, &[]).await?;
    let begin = begin.map_or(Head { link: 0, hash: NOTHING_BEFORE }, |row| Head {
        link: row.get("link"),
        hash: hash_of(&row),
    });
    let mut walk = Walk { head: begin, newest: OffsetDateTime::UNIX_EPOCH, explained: begin.link == 0, kept };
    let select = format!(
        "SELECT c.link, c.event, c.hash, e.* FROM auth.audit_chain c \
         LEFT JOIN (SELECT {COLUMNS} FROM auth.audit) e ON e.id = c.event WHERE c.link > $1 ORDER BY c.link LIMIT $2"
    );
    let mut after = i64::MIN;
    loop {
        let rows = page(&transaction, &select, after).await?;
        let Some(last) = rows.last() else { break };
        after = last.get("link");
        for row in &rows {
            walk.step(row, begin)?;
        }
    }
    if !walk.explained {
        return Err(Broken::CutOff(begin.link));
    }
    match kept {
        Some(kept) if kept.link > walk.head.link => {
            Err(Broken::HeadMissing { end: walk.head.link, head: kept.link })
        }
        Some(kept) if kept.link < begin.link => Err(Broken::HeadPruned(kept.link)),
        Some(kept) if kept.link == begin.link && kept.hash != begin.hash => Err(Broken::HeadOther(kept.link)),
        _ => Ok(Intact { links: walk.head.link - begin.link, head: walk.head }),
    }
}

async fn page(transaction: &Transaction<'_>, select: &str, after: i64) -> Result<Vec<Row>, DbError> {
    let select = transaction.prepare_cached(select).await?;
    Ok(transaction.query(&select, &[&after, &AUDIT_CHAIN_BATCH]).await?)
}

/// How far [`verify`] has come.
struct Walk {
    head: Head,
    /// The latest time of any event so far.
    newest: OffsetDateTime,
    /// Whether an event says that what was before the beginning was removed.
    explained: bool,
    kept: Option<Head>,
}

impl Walk {
    fn step(&mut self, row: &Row, begin: Head) -> Result<(), Broken> {
        let (number, event): (i64, i64) = (row.get("link"), row.get("event"));
        let expected = self.head.link + 1;
        if number < expected {
            return Err(Broken::LinkExtra(number));
        }
        if number > expected {
            return Err(Broken::LinkMissing(expected));
        }
        if row.get::<_, Option<i64>>("id").is_none() {
            return Err(Broken::EventMissing { link: number, event });
        }
        let recorded = Recorded::from(row);
        let hash = hash_of(row);
        if link(&self.head.hash, &recorded) != hash {
            return Err(Broken::Changed { link: number, event });
        }
        if self.kept.is_some_and(|kept| kept.link == number && kept.hash != hash) {
            return Err(Broken::HeadOther(number));
        }
        if recorded.at + AUDIT_LATE < self.newest {
            return Err(Broken::Inserted { link: number, event });
        }
        self.newest = self.newest.max(recorded.at);
        self.explained |= recorded.action == Action::TrailPruned.as_str()
            && recorded.detail().get("link").and_then(serde_json::Value::as_i64) == Some(begin.link);
        self.head = Head { link: number, hash };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event() -> Recorded {
        Recorded {
            id: 7,
            at: OffsetDateTime::UNIX_EPOCH,
            actor_kind: "part".into(),
            actor: Some("sweeper".into()),
            action: "job-settled".into(),
            outcome: "success".into(),
            code: None,
            client: Some(uuid::Uuid::nil()),
            object_kind: Some("job".into()),
            object: Some("a".into()),
            source: None,
            request: None,
            detail: "{}".into(),
        }
    }

    #[test]
    fn every_column_is_in_the_hash() {
        let base = link(&NOTHING_BEFORE, &event());
        let others = [
            Recorded { id: 8, ..event() },
            Recorded { at: OffsetDateTime::UNIX_EPOCH + time::Duration::microseconds(1), ..event() },
            Recorded { actor_kind: "user".into(), ..event() },
            Recorded { actor: None, ..event() },
            Recorded { action: "read".into(), ..event() },
            Recorded { outcome: "failed".into(), ..event() },
            Recorded { code: Some(String::new()), ..event() },
            Recorded { client: None, ..event() },
            // The same letters in other columns.
            Recorded { object_kind: Some("joba".into()), object: Some(String::new()), ..event() },
            Recorded { object: Some("b".into()), ..event() },
            Recorded { source: Some("::1".into()), ..event() },
            Recorded { request: Some(uuid::Uuid::nil()), ..event() },
            Recorded { detail: "{\"n\": 1}".into(), ..event() },
        ];
        for other in others {
            assert_ne!(link(&NOTHING_BEFORE, &other), base, "{other:?}");
        }
        assert_ne!(link(&base, &event()), base, "the place counts");
        assert_eq!(link(&NOTHING_BEFORE, &event()), base);
    }

    #[test]
    fn a_head_is_read_as_it_is_printed() {
        let head = Head { link: 12, hash: link(&NOTHING_BEFORE, &event()) };
        assert_eq!(head.to_string().parse(), Ok(head));
        for bad in ["", "12", "12:", "x:00", &format!("{head}0"), &format!("12:{}", "ä".repeat(32))] {
            assert_eq!(bad.parse::<Head>(), Err(NoHead), "{bad}");
        }
    }
}
