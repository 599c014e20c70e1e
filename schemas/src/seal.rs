//! Sealing of images, reports and private keys: AES-256-GCM (NIST SP 800-38D) under a named key, bound to what it is.
//!
//! A sealed blob is `nonce (12 bytes) ‖ ciphertext ‖ tag (16 bytes)`; the associated data is `"<kind>:<of what>"`, such
//! as `report:<job id>`, so a blob that was put in the place of another does not open.
//!
//! Keys change without a restart. All processes read the same ones and go by the same names: a key whose id is a moment
//! seals from then on, and opens as soon as it is there, [`SEALING_LEAD`](crate::limits::SEALING_LEAD) earlier, so that
//! everybody can open what anybody seals. Every key that is there opens.

use std::{
    collections::HashSet,
    convert::Infallible,
    fmt, fs,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, PoisonError, RwLock},
};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use clap::Args;
use time::OffsetDateTime;
use tokio::{
    process::Command,
    time::{MissedTickBehavior, interval, timeout},
};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    clock,
    id::JobId,
    limits::{KEYS_COMMAND_DEADLINE, KEYS_COMMAND_INTERVAL, KEYS_INTERVAL},
};

/// A folder with more keys than this is no folder of keys.
pub const MAX_KEYS: usize = 64;

/// What a blob holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// The images of a job and the request around them.
    Payload(JobId),
    /// The finished report of a job.
    Report(JobId),
    /// The credentials of an account at an ACME server, by the URL of its directory.
    AcmeAccount(&'a str),
    /// The private key of a certificate, by its names.
    CertificateKey(&'a str),
    /// The key of the digests that reports are searched by, by its id.
    SearchKey(Uuid),
}

impl Content<'_> {
    fn aad(self) -> Aad<String> {
        Aad::from(match self {
            Self::Payload(job) => format!("payload:{job}"),
            Self::Report(job) => format!("report:{job}"),
            Self::AcmeAccount(directory) => format!("acme-account:{directory}"),
            Self::CertificateKey(names) => format!("certificate-key:{names}"),
            Self::SearchKey(id) => format!("search-key:{id}"),
        })
    }
}

/// Bytes that only a holder of the key can read. `Debug` prints their length.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Which key seals them.
    pub key_id: String,
    /// `nonce ‖ ciphertext ‖ tag`.
    pub bytes: Bytes,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({}, {} bytes)", self.key_id, self.bytes.len())
    }
}

/// Why a blob cannot be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The key that sealed this blob is not on the ring.
    #[error("sealing key {0} is not on the ring")]
    UnknownKey(String),
    /// The blob was changed, or is of something else.
    #[error("the sealed bytes do not open")]
    Broken,
}

impl SealError {
    /// In one word, for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::UnknownKey(_) => "key",
            Self::Broken => "broken",
        }
    }
}

/// Why keys cannot be read. What is in a line is never shown.
#[derive(Debug, thiserror::Error)]
#[error("sealing keys {path}: {reason}")]
pub struct KeyError {
    path: String,
    reason: String,
}

impl KeyError {
    fn new(path: &Path, reason: impl Into<String>) -> Self {
        Self { path: path.display().to_string(), reason: reason.into() }
    }
}

/// One key.
pub struct Key {
    /// Its name in every blob that it seals: 1 to 32 characters.
    pub id: String,
    /// From when on it seals: what its id says, or the beginning of time when that is no moment.
    pub begins: OffsetDateTime,
    cipher: RandomizedNonceKey,
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} from {})", self.id, self.begins)
    }
}

impl Key {
    fn read(line: &str) -> Option<Self> {
        let (id, key) = line.split_once(' ')?;
        let named =
            (1..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let key = Zeroizing::new(STANDARD.decode(key.trim()).ok().filter(|_| named)?);
        Some(Self {
            id: id.to_owned(),
            begins: clock::moment(id).unwrap_or(OffsetDateTime::UNIX_EPOCH),
            cipher: RandomizedNonceKey::new(&AES_256_GCM, &key).ok()?,
        })
    }
}

/// Keys in the order in which they begin; of those that begin at the same time, the one that was named first is last.
#[derive(Debug)]
pub struct Keys(Vec<Key>);

impl Keys {
    /// Reads a file with a line `<id> <Base64 of 32 bytes>` a key, or of a folder every `*.key` file, which are such
    /// files, in the order of their names.
    ///
    /// # Errors
    /// When there is no key, one is named twice, or a line is malformed.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let files = if path.is_dir() { files(path)? } else { vec![path.to_owned()] };
        let mut keys = Vec::new();
        for file in files {
            let text = fs::read_to_string(&file).map_err(|error| KeyError::new(&file, error.to_string()))?;
            keys.extend(lines(&file, &Zeroizing::new(text))?);
        }
        Self::of(path, keys)
    }

    async fn print(program: &Path) -> Result<Self, KeyError> {
        let bad = |reason: String| KeyError::new(program, reason);
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let run = async { command.spawn()?.wait_with_output().await };
        let output = timeout(KEYS_COMMAND_DEADLINE, run).await;
        let output = output.map_err(|_| bad(format!("no answer within {KEYS_COMMAND_DEADLINE:?}")))?;
        let output = output.map_err(|error| bad(error.to_string()))?;
        let text = Zeroizing::new(output.stdout);
        if !output.status.success() {
            return Err(bad(output.status.to_string()));
        }
        let text = std::str::from_utf8(&text).map_err(|_| bad("prints something else than text".into()))?;
        Self::of(program, lines(program, text)?)
    }

    fn of(path: &Path, mut keys: Vec<Key>) -> Result<Self, KeyError> {
        let mut seen = HashSet::new();
        if let Some(twice) = keys.iter().find(|key| !seen.insert(&key.id)) {
            return Err(KeyError::new(path, format!("key {} is there twice", twice.id)));
        }
        keys.reverse();
        keys.sort_by_key(|key| key.begins);
        if keys.is_empty() { Err(KeyError::new(path, "no key")) } else { Ok(Self(keys)) }
    }

    /// All of them.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Key> {
        self.0.iter()
    }

    /// The one that seals at `now`: the latest that has begun, or the first one when none has.
    pub fn sealing(&self, now: OffsetDateTime) -> &Key {
        self.0.iter().rfind(|key| key.begins <= now).unwrap_or(&self.0[0])
    }

    /// The last one to begin.
    pub fn newest(&self) -> &Key {
        &self.0[self.0.len() - 1]
    }

    /// Those that have sealed and do no more at `now`.
    pub fn older(&self, now: OffsetDateTime) -> impl Iterator<Item = &Key> {
        let sealing = &self.sealing(now).id;
        self.0.iter().filter(move |key| key.begins <= now && key.id != *sealing)
    }

    /// When the next key begins after `key`; `None` when it is the last. One that always sealed may have ended earlier,
    /// nobody knows when.
    pub fn end(&self, key: &Key) -> Option<OffsetDateTime> {
        self.0.iter().map(|other| other.begins).find(|begins| *begins > key.begins)
    }

    /// The key with this id.
    pub fn find(&self, id: &str) -> Option<&Key> {
        self.0.iter().find(|key| key.id == id)
    }
}

/// The `*.key` files of a folder, by name.
///
/// # Errors
/// When the folder cannot be read, or has too many.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>, KeyError> {
    let bad = |error: std::io::Error| KeyError::new(folder, error.to_string());
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(bad)? {
        let path = entry.map_err(bad)?.path();
        if path.extension().is_some_and(|extension| extension == "key") {
            files.push(path);
        }
        if files.len() > MAX_KEYS {
            return Err(KeyError::new(folder, format!("more than {MAX_KEYS} keys")));
        }
    }
    files.sort();
    Ok(files)
}

fn lines(path: &Path, text: &str) -> Result<Vec<Key>, KeyError> {
    let bad = |n: usize| KeyError::new(path, format!("line {} is not `<id> <Base64 of 32 bytes>`", n + 1));
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(n, line)| Key::read(line).ok_or_else(|| bad(n))).collect()
}

/// Where a process has the sealing keys from.
#[derive(Debug, Clone, Args)]
pub struct SealingOptions {
    /// Keys that seal images and reports: a folder with `*.key` files, which `auth keys add` makes, or one file; a line
    /// `<id> <Base64 of 32 bytes>` a key. All processes read the same.
    #[arg(long, env = "DERMFLOW_SEALING_KEYS", required_unless_present = "sealing_keys_command")]
    pub sealing_keys: Option<PathBuf>,
    /// A program that prints such lines instead; it is run at the start and every minute, without arguments.
    #[arg(long, env = "DERMFLOW_SEALING_KEYS_COMMAND", conflicts_with = "sealing_keys")]
    pub sealing_keys_command: Option<PathBuf>,
}

#[derive(Debug)]
enum Source {
    Path(PathBuf),
    Command(PathBuf),
}

impl Source {
    async fn keys(&self) -> Result<Keys, KeyError> {
        match self {
            Self::Path(path) => Keys::read(path),
            Self::Command(program) => Keys::print(program).await,
        }
    }
}

/// The keys of a process, as its source had them last. Cheap to clone; `Debug` prints ids.
#[derive(Clone)]
pub struct Keyring(Arc<Ring>);

struct Ring {
    source: Source,
    keys: RwLock<Arc<Keys>>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.keys().fmt(f)
    }
}

impl Keyring {
    /// Gets the keys.
    ///
    /// # Errors
    /// When they cannot be read.
    pub async fn obtain(options: &SealingOptions) -> Result<Self, KeyError> {
        let source = match (&options.sealing_keys_command, &options.sealing_keys) {
            (Some(program), _) => Source::Command(program.clone()),
            (None, path) => Source::Path(path.clone().unwrap_or_default()),
        };
        let keys = source.keys().await?;
        Ok(Self::new(source, keys))
    }

    /// Reads a file or folder: see [`Keys::read`].
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        Ok(Self::new(Source::Path(path.to_owned()), Keys::read(path)?))
    }

    fn new(source: Source, keys: Keys) -> Self {
        Self(Arc::new(Ring { source, keys: RwLock::new(Arc::new(keys)) }))
    }

    /// The keys at present.
    pub fn keys(&self) -> Arc<Keys> {
        self.0.keys.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks at the source again.
    ///
    /// # Errors
    /// When the keys cannot be read; they stay as they were.
    pub async fn reload(&self) -> Result<(), KeyError> {
        let fresh = Arc::new(self.0.source.keys().await?);
        let old = self.keys();
        let changed = !fresh.iter().map(|key| &key.id).eq(old.iter().map(|key| &key.id));
        if changed {
            tracing::info!(keys = ?fresh, "the sealing keys have changed");
        }
        *self.0.keys.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Looks at the source again and again.
    pub async fn follow(&self) -> Infallible {
        let mut look = interval(match self.0.source {
            Source::Path(_) => KEYS_INTERVAL,
            Source::Command(_) => KEYS_COMMAND_INTERVAL,
        });
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            if let Err(error) = self.reload().await {
                tracing::warn!(%error, "the sealing keys stay as they were");
            }
        }
    }

    /// Seals `plain` with the key whose turn it is at `now`, reusing its memory.
    ///
    /// # Errors
    /// [`SealError::Broken`] when the system gives no randomness.
    pub fn seal(
        &self,
        content: Content<'_>,
        mut plain: Vec<u8>,
        now: OffsetDateTime,
    ) -> Result<Sealed, SealError> {
        let keys = self.keys();
        let Key { id, cipher, .. } = keys.sealing(now);
        let nonce =
            cipher.seal_in_place_append_tag(content.aad(), &mut plain).map_err(|_| SealError::Broken)?;
        plain.splice(0..0, *nonce.as_ref());
        Ok(Sealed { key_id: id.clone(), bytes: plain.into() })
    }

    /// Opens what [`Self::seal`] sealed as the same content.
    ///
    /// # Errors
    /// When the key is missing, or the bytes were changed or belong elsewhere.
    pub fn open(&self, content: Content<'_>, sealed: &Sealed) -> Result<Vec<u8>, SealError> {
        let keys = self.keys();
        let key = keys.find(&sealed.key_id).ok_or_else(|| SealError::UnknownKey(sealed.key_id.clone()))?;
        let (nonce, rest) = sealed.bytes.split_at_checked(NONCE_LEN).ok_or(SealError::Broken)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::Broken)?;
        let mut buffer = rest.to_vec();
        let opened = key.cipher.open_in_place(nonce, content.aad(), &mut buffer);
        let length = opened.map_err(|_| SealError::Broken)?.len();
        buffer.truncate(length);
        Ok(buffer)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use time::macros::datetime;

    use super::*;

    /// Two keys without a moment: the first one seals.
    pub(crate) const TEST_KEYS: &str = "k2 AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n\
                                        k1 AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n";
    const NEXT: &str = "20260131T120000Z AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=\n";
    const LAST: &str = "20260201T120000Z BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ=\n";
    const NOON: OffsetDateTime = datetime!(2026-01-31 12:00 UTC);

    fn parse(text: &str) -> Result<Keys, KeyError> {
        let path = Path::new("keys");
        Keys::of(path, lines(path, text)?)
    }

    fn of(text: &str) -> Keyring {
        Keyring::new(Source::Path(PathBuf::new()), parse(text).unwrap())
    }

    pub(crate) fn ring() -> Keyring {
        of(TEST_KEYS)
    }

    fn job() -> JobId {
        "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f".parse().unwrap()
    }

    fn folder() -> PathBuf {
        let folder = std::env::temp_dir().join(format!("dermflow-seal-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&folder).unwrap();
        folder
    }

    #[test]
    fn opens_only_as_what_it_was_and_unchanged() {
        let ring = ring();
        let sealed = ring.seal(Content::Payload(job()), b"image".to_vec(), NOON).unwrap();
        assert_eq!(ring.open(Content::Payload(job()), &sealed).unwrap(), b"image");
        assert!(ring.open(Content::Report(job()), &sealed).is_err());
        assert!(ring.open(Content::Payload(JobId::new(clock::now())), &sealed).is_err());
        for i in 0..sealed.bytes.len() {
            let mut bytes = sealed.bytes.to_vec();
            bytes[i] ^= 1;
            let flipped = Sealed { bytes: bytes.into(), ..sealed.clone() };
            assert!(matches!(ring.open(Content::Payload(job()), &flipped), Err(SealError::Broken)), "{i}");
        }
    }

    #[test]
    fn a_key_seals_from_its_moment_on_and_opens_at_any_time() {
        let second = std::time::Duration::from_secs(1);
        let ring = of(&format!("{LAST}{TEST_KEYS}{NEXT}"));
        let sealed = |now| {
            ring.seal(Content::Report(job()), b"report".to_vec(), now).map(|sealed| sealed.key_id).unwrap()
        };
        assert_eq!(sealed(NOON - second), "k2", "the first of those that always sealed");
        assert_eq!(sealed(NOON), "20260131T120000Z");
        assert_eq!(sealed(NOON + 86_400 * second), "20260201T120000Z");
        let early = of(NEXT).seal(Content::Report(job()), b"report".to_vec(), NOON - second).unwrap();
        assert_eq!(early.key_id, "20260131T120000Z", "rather than none");
        assert_eq!(ring.open(Content::Report(job()), &early).unwrap(), b"report");

        let keys = ring.keys();
        let older: Vec<&str> = keys.older(NOON).map(|key| key.id.as_str()).collect();
        assert_eq!(older, ["k1", "k2"], "and not the one to come");
        let end = |id| keys.end(keys.find(id).unwrap());
        assert_eq!((end("k1"), end("k2")), (Some(NOON), Some(NOON)));
        assert_eq!((end("20260131T120000Z"), end("20260201T120000Z")), (Some(NOON + 86_400 * second), None));
        assert_eq!(keys.newest().id, "20260201T120000Z");
    }

    #[test]
    fn what_an_absent_key_has_sealed_names_the_key() {
        let newer = ring().seal(Content::Report(job()), b"report".to_vec(), NOON).unwrap();
        let old = of(TEST_KEYS.lines().nth(1).unwrap());
        assert!(
            matches!(old.open(Content::Report(job()), &newer), Err(SealError::UnknownKey(id)) if id == "k2")
        );
    }

    #[test]
    fn malformed_keys_name_the_line_and_nothing_else() {
        for bad in ["k1", "k1 AAAA", "k/1 AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="] {
            let error = parse(bad).unwrap_err().to_string();
            assert_eq!(error, "sealing keys keys: line 1 is not `<id> <Base64 of 32 bytes>`");
        }
        assert_eq!(parse("").unwrap_err().to_string(), "sealing keys keys: no key");
        let twice = parse(&format!("{NEXT}{TEST_KEYS}{NEXT}")).unwrap_err().to_string();
        assert_eq!(twice, "sealing keys keys: key 20260131T120000Z is there twice");
        assert!(!format!("{:?}", ring()).contains("AQEB"));
    }

    #[tokio::test]
    async fn keys_come_and_go_in_a_folder() {
        let folder = folder();
        fs::write(folder.join("b.key"), TEST_KEYS).unwrap();
        fs::write(folder.join("next.part"), "half of a ke").unwrap();
        let ring = Keyring::load(&folder).unwrap();
        fs::write(folder.join("a.key"), NEXT).unwrap();
        assert_eq!(ring.keys().newest().id, "k2");
        ring.reload().await.unwrap();
        assert_eq!(ring.keys().newest().id, "20260131T120000Z");
        let old = ring.seal(Content::Report(job()), b"report".to_vec(), OffsetDateTime::UNIX_EPOCH).unwrap();
        fs::remove_file(folder.join("b.key")).unwrap();
        ring.reload().await.unwrap();
        assert!(matches!(ring.open(Content::Report(job()), &old), Err(SealError::UnknownKey(_))));
        fs::write(folder.join("b.key"), "k1").unwrap();
        assert!(ring.reload().await.is_err());
        assert_eq!(ring.keys().newest().id, "20260131T120000Z", "as they were");
        fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn a_program_prints_keys() {
        let folder = folder();
        let program = folder.join("keys");
        let write = |script: &str| {
            let part = folder.join("part");
            fs::write(&part, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&part, fs::Permissions::from_mode(0o700)).unwrap();
            fs::rename(part, &program).unwrap();
        };
        write(&format!("printf '{}'", TEST_KEYS.replace('\n', "\\n")));
        let options = SealingOptions { sealing_keys: None, sealing_keys_command: Some(program.clone()) };
        let ring = Keyring::obtain(&options).await.unwrap();
        assert_eq!(ring.keys().iter().map(|key| key.id.as_str()).collect::<Vec<_>>(), ["k1", "k2"]);
        for bad in ["echo k1 secret", "exit 3", "true"] {
            write(bad);
            let error = ring.reload().await.unwrap_err().to_string();
            assert!(error.contains(&program.display().to_string()) && !error.contains("secret"), "{error}");
        }
        assert_eq!(ring.keys().newest().id, "k2");
        fs::remove_dir_all(folder).unwrap();
    }
}
