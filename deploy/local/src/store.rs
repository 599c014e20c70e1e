//! The broker's files, encrypted by nats-server under a key in a private file that its configuration includes.
//!
//! nats-server 2.15 answers under a key that does not fit as if nothing were stored, and what is made anew then takes the
//! place of what was: such a key is refused here. What is in clear, from an earlier build, or under the key before, it
//! encrypts in place while it starts, so that a kill meanwhile would cost messages. It is given a copy; the original is
//! removed once it serves from that.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::state::{State, random_bytes, read, short_hash, write_private};

/// Which key encrypts a store; beside what nats-server keeps there.
const MARK: &str = "key.sha256";
/// Subjects with numbers of messages, which nats-server would leave in clear; it makes them anew from the messages.
const INDEX: &str = "index.db";
/// Consumers, which nats-server 2.15 cannot bring under another key. Ingress makes them anew, and what was with workers
/// is handed out again.
const CONSUMERS: &str = "obs";

/// The store of one server.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) folder: PathBuf,
    /// The file with the key, to be included; `None` when the store is not encrypted.
    pub(crate) key: Option<PathBuf>,
    original: PathBuf,
}

impl Store {
    /// The store `name` in clear, as earlier builds have it.
    ///
    /// # Errors
    /// When its encryption has begun.
    pub(crate) fn in_clear(state: &State, name: &str) -> Result<Self> {
        let (folder, original) = (state.folder(name)?, original(state, name));
        if original.exists() {
            bail!("{} is being encrypted: start it with its key", folder.display());
        }
        Ok(Self { folder, key: None, original })
    }

    /// The store `name` under the key of `<name>-key.conf`, both of which are made when they are missing.
    ///
    /// # Errors
    /// When a file cannot be read or written, or the key is not the store's.
    pub(crate) fn encrypted(state: &State, name: &str) -> Result<Self> {
        let (folder, original) = (state.folder(name)?, original(state, name));
        let make = || Ok(format!("key: \"{}\"\n", URL_SAFE_NO_PAD.encode(random_bytes()?)));
        let key = state.keep(&format!("{name}-key.conf"), make)?;
        let marks = marks(&read(&key)?);
        let current = marks.first().with_context(|| format!("{} holds no key", key.display()))?;
        let source = if original.exists() { &original } else { &folder };
        let mark = mark(source)?;
        let fits = match &mark {
            Some(mark) => marks.contains(mark),
            None => !holds(source, "meta.key")?,
        };
        if !fits {
            bail!(
                "{} is not the key of {}: put that one back, or its messages are lost",
                key.display(),
                folder.display()
            );
        }
        let empty = !source.join("jetstream").exists();
        if source == &folder && (empty || mark.as_ref() == Some(current)) {
            write_private(&folder.join(MARK), current)?;
        } else {
            let left_out = if mark.is_some() { &[INDEX, CONSUMERS][..] } else { &[INDEX] };
            let begin = || -> io::Result<()> {
                if source == &folder {
                    fs::rename(&folder, &original)?;
                } else {
                    fs::remove_dir_all(&folder)?;
                }
                copy(&original, &folder, left_out)
            };
            begin().with_context(|| format!("cannot copy the messages of {}", original.display()))?;
            state.folder(name)?;
            write_private(&folder.join(MARK), current)?;
        }
        Ok(Self { folder, key: Some(key), original })
    }

    /// Removes the streams whose key was not on the disk yet when the power failed: nobody can read them, and nats-server
    /// 2.15 ends when one is made in their place.
    ///
    /// # Errors
    /// When a folder cannot be read or removed.
    pub(crate) fn discard_unreadable(&self) -> Result<()> {
        let discard = || {
            for account in folders(&self.folder.join("jetstream"))? {
                for stream in folders(&account.join("streams"))? {
                    if fs::metadata(stream.join("meta.key")).is_ok_and(|key| key.len() == 0) {
                        fs::remove_dir_all(&stream)?;
                    }
                }
            }
            io::Result::Ok(())
        };
        discard().with_context(|| format!("cannot look at {}", self.folder.display()))
    }

    /// Whether the server has a copy to encrypt before it answers, which takes longer than a start.
    pub(crate) fn is_copy(&self) -> bool {
        self.original.exists()
    }

    /// Removes what the store was copied from, now that the server serves from the copy.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub(crate) fn settle(&self) -> Result<()> {
        if !self.is_copy() {
            return Ok(());
        }
        rustix::fs::sync();
        // In one step: the rest of an original must not be taken for a whole one.
        let done = self.original.with_extension("done");
        let remove = || {
            fs::rename(&self.original, &done)?;
            // An original that comes back with the power would be copied again, without what has come since.
            rustix::fs::sync();
            fs::remove_dir_all(&done)
        };
        remove().with_context(|| format!("cannot remove {}", done.display()))
    }
}

fn original(state: &State, name: &str) -> PathBuf {
    // What a removal that was cut off has left.
    let _ = fs::remove_dir_all(state.path(&format!("{name}.done")));
    state.path(&format!("{name}.original"))
}

/// What stands for the keys of a file, `key` first, in front of `prev_encryption_key`.
fn marks(text: &str) -> Vec<String> {
    let value = |name: &str| {
        let values = text.lines().filter_map(|line| line.trim().strip_prefix(name)?.trim().strip_prefix(':'));
        values.map(|value| short_hash(value.trim().trim_matches('"').as_bytes())).next_back()
    };
    let Some(key) = value("key") else { return Vec::new() };
    [Some(key), value("prev_encryption_key")].into_iter().flatten().collect()
}

fn mark(folder: &Path) -> Result<Option<String>> {
    match fs::read_to_string(folder.join(MARK)) {
        Ok(mark) => Ok(Some(mark)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot read {}", folder.join(MARK).display())),
    }
}

/// The folders in a folder, if it is there.
fn folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.is_dir()).collect())
}

/// Whether a file of this name is anywhere below a folder.
fn holds(folder: &Path, name: &str) -> Result<bool> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.ends_with(name) || path.is_dir() && holds(&path, name)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn copy(from: &Path, to: &Path, left_out: &[&str]) -> io::Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        if left_out.iter().any(|left_out| name == *left_out) {
            continue;
        }
        if path.is_dir() {
            copy(&path, &to.join(name), left_out)?;
        } else {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use async_nats::{
        HeaderMap,
        jetstream::{
            self,
            consumer::{AckPolicy, pull},
            stream::Config,
        },
    };

    use super::*;
    use crate::{
        nats::{Nats, Settings},
        pki::Pki,
        servers::{Given, Servers},
        stack::repo,
    };

    const SUBJECT: &str = "jobs.MARK-OF-A-SUBJECT";
    const HEADER: &str = "MARK-OF-A-HEADER";
    const MESSAGES: u64 = 60;

    fn body(number: u64) -> Vec<u8> {
        [format!("MARK-OF-A-BODY-{number}").into_bytes(), vec![7; 100_000]].concat()
    }

    struct Broker {
        state: State,
        pki: Pki,
        server: PathBuf,
    }

    impl Broker {
        async fn new() -> Self {
            let dir = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
            let state = State::open(&dir).unwrap();
            let pki = Pki::prepare(&state).unwrap();
            let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await.unwrap();
            Self { state, pki, server: servers.nats_server }
        }

        fn prepare(&self, encrypted: bool) -> Result<Nats> {
            let settings = Settings { encrypted, ..Settings::default() };
            Nats::prepare(&self.state, &self.pki, &self.server, &settings)
        }

        async fn start(&self, encrypted: bool) -> Nats {
            let mut nats = self.prepare(encrypted).unwrap();
            nats.start().await.unwrap();
            nats
        }

        /// The names of the files of the store that hold what is in clear in a message.
        fn in_clear(&self) -> Vec<String> {
            let mut found = Vec::new();
            let mut folders = vec![self.state.path("nats")];
            while let Some(folder) = folders.pop() {
                for entry in fs::read_dir(folder).unwrap() {
                    let path = entry.unwrap().path();
                    if path.is_dir() {
                        folders.push(path);
                        continue;
                    }
                    let bytes = fs::read(&path).unwrap();
                    let marks = [SUBJECT, HEADER, "MARK-OF-A-BODY", "MARK-OF-A-CONSUMER"].map(str::as_bytes);
                    if marks.iter().any(|mark| bytes.windows(mark.len()).any(|window| window == *mark)) {
                        found.push(path.file_name().unwrap().to_string_lossy().into_owned());
                    }
                }
            }
            found.sort();
            found.dedup();
            found
        }

        fn key(&self) -> PathBuf {
            self.state.path("nats-key.conf")
        }

        fn remove(self) {
            fs::remove_dir_all(self.state.path("")).unwrap();
        }
    }

    async fn make_consumer(nats: &Nats) {
        let context = jetstream::new(nats.connect("admin").await.unwrap());
        let consumer = pull::Config {
            durable_name: Some("C".into()),
            description: Some("MARK-OF-A-CONSUMER".into()),
            ack_policy: AckPolicy::Explicit,
            ..pull::Config::default()
        };
        context.get_stream("S").await.unwrap().create_consumer(consumer).await.unwrap();
    }

    async fn fill(nats: &Nats) {
        let context = jetstream::new(nats.connect("admin").await.unwrap());
        let stream = Config { name: "S".into(), subjects: vec!["jobs.*".into()], ..Config::default() };
        context.create_stream(stream).await.unwrap();
        make_consumer(nats).await;
        for number in 1..=MESSAGES {
            let mut headers = HeaderMap::new();
            headers.insert("Mark", HEADER);
            let stored = context.publish_with_headers(SUBJECT, headers, body(number).into()).await;
            stored.unwrap().await.unwrap();
        }
    }

    async fn consumers(nats: &Nats) -> usize {
        let context = jetstream::new(nats.connect("admin").await.unwrap());
        context.get_stream("S").await.unwrap().cached_info().state.consumer_count
    }

    async fn check(nats: &Nats) {
        let context = jetstream::new(nats.connect("admin").await.unwrap());
        let stream = context.get_stream("S").await.unwrap();
        assert_eq!(stream.cached_info().state.messages, MESSAGES);
        for number in 1..=MESSAGES {
            let message = stream.get_raw_message(number).await.unwrap();
            assert_eq!((message.subject.as_str(), &*message.payload), (SUBJECT, &*body(number)));
            assert_eq!(message.headers.get("Mark").unwrap().as_str(), HEADER);
        }
    }

    // Nothing of a message is in clear in the broker's files, in which it is found without encryption; and the key is
    // nowhere but in a private file. A kill, a start in order and a further instance keep every message.
    #[tokio::test]
    async fn what_is_stored_is_encrypted_and_kept() {
        let broker = Broker::new().await;
        let mut nats = broker.start(true).await;
        fill(&nats).await;
        assert_eq!(broker.in_clear(), Vec::<String>::new());
        nats.restart().await.unwrap();
        check(&nats).await;
        nats.stop().await.unwrap();
        assert_eq!(broker.in_clear(), Vec::<String>::new());
        let mut nats = broker.start(true).await;
        check(&nats).await;
        assert_eq!(consumers(&nats).await, 1);
        nats.stop().await.unwrap();

        let mode = fs::metadata(broker.key()).unwrap().permissions().mode();
        let key = read(&broker.key()).unwrap();
        let key = key.split('"').nth(1).unwrap();
        assert_eq!((mode & 0o777, key.len()), (0o600, 43));
        for file in [broker.state.path("nats.conf"), nats.process.log().to_owned()] {
            assert!(!read(&file).unwrap().contains(key), "{}", file.display());
        }

        let clear = Broker::new().await;
        let mut nats = clear.start(false).await;
        fill(&nats).await;
        nats.stop().await.unwrap();
        assert_eq!(clear.in_clear(), ["1.blk", "index.db", "meta.inf"]);
        broker.remove();
        clear.remove();
    }

    // A store that an earlier build left in clear is encrypted at the next start, with every message and consumer; also
    // when that was cut off before.
    #[tokio::test]
    async fn a_store_in_clear_is_encrypted_whatever_interrupts_it() {
        let broker = Broker::new().await;
        let mut nats = broker.start(false).await;
        fill(&nats).await;
        nats.stop().await.unwrap();
        assert!(!broker.in_clear().is_empty());

        drop(broker.prepare(true).unwrap());
        let block = broker.state.path("nats/jetstream/$G/streams/S/msgs/1.blk");
        fs::write(&block, "half of it").unwrap();
        let mut nats = broker.prepare(true).unwrap();
        assert!(fs::metadata(&block).unwrap().len() > 100_000);
        nats.start().await.unwrap();
        check(&nats).await;
        assert_eq!((consumers(&nats).await, broker.in_clear()), (1, Vec::new()));
        let left = |name: &str| broker.state.path(name).exists();
        assert!(!left("nats.original") && !left("nats.done"));
        nats.restart().await.unwrap();
        check(&nats).await;
        nats.stop().await.unwrap();
        assert_eq!(broker.in_clear(), Vec::<String>::new());
        broker.remove();
    }

    // A key that is not the store's is refused before the broker could begin anew under it. With the one before it as
    // `prev_encryption_key` it takes that one's place; the consumers have to be made again.
    #[tokio::test]
    async fn a_key_that_does_not_fit_is_refused_and_one_that_follows_is_taken() {
        let broker = Broker::new().await;
        let mut nats = broker.start(true).await;
        fill(&nats).await;
        nats.stop().await.unwrap();
        let first = read(&broker.key()).unwrap();
        let second = format!("key: \"{}\"\n", "s".repeat(43));
        fs::remove_file(broker.key()).unwrap();
        for _ in 0..2 {
            let refused = broker.prepare(true).unwrap_err().to_string();
            assert!(refused.contains("nats-key.conf is not the key of"), "{refused}");
        }
        write_private(&broker.key(), &second).unwrap();
        assert!(broker.prepare(true).is_err());

        write_private(&broker.key(), &format!("{second}prev_encryption_{first}")).unwrap();
        drop(broker.prepare(true).unwrap());
        let mut nats = broker.start(true).await;
        check(&nats).await;
        assert_eq!(consumers(&nats).await, 0);
        make_consumer(&nats).await;
        nats.stop().await.unwrap();
        assert_eq!(broker.in_clear(), Vec::<String>::new());
        write_private(&broker.key(), &first).unwrap();
        assert!(broker.prepare(true).is_err());
        write_private(&broker.key(), &second).unwrap();
        let mut nats = broker.start(true).await;
        check(&nats).await;
        assert_eq!(consumers(&nats).await, 1);
        nats.stop().await.unwrap();
        broker.remove();
    }
}
