//! Passwords: argon2id (RFC 9106) with a pepper, on a bounded number of threads.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use argon2::{
    Algorithm, Argon2, Block, Params, ParamsBuilder, Version,
    password_hash::{
        PasswordHasher,
        phc::{Output, PasswordHash},
    },
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use dermflow_schemas::process::read_secret;
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use thread_priority::{
    NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
    thread_native_id,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::timeout,
};

use crate::policy::normalise;

/// Memory of one hash, in KiB; OWASP's first choice for argon2id with t = 2, p = 1.
const MEMORY_KIB: u32 = 19_456;
/// Passes over it.
const PASSES: u32 = 2;
/// How long a login waits for its turn at hashing.
const QUEUE_DEADLINE: Duration = Duration::from_secs(2);
/// Logins in hand for each thread: what it hashes within about a second. The next one is told to come back.
const PLACES: usize = 24;
/// How long a hash may take that gets only what is left over of the machine.
pub const HASH_DEADLINE: Duration = Duration::from_secs(5);
/// More in hand are a flood.
const FEW: usize = 4;
/// Threads that hash in a flood, however many cores there are: each keeps the memory of one hash.
const MAX_THREADS: usize = 8;
/// In a flood of logins a thread rests as long as it hashed, but no longer than this: what follows a right password,
/// and the caches, are others' as well.
const LONGEST_REST: Duration = Duration::from_millis(50);
/// How much few logins stand back behind everybody else (nice(2)).
const NICE: i32 = 15;
/// The longest password that is hashed, after NFKC; a longer one is wrong.
pub const MAX_PASSWORD_BYTES: usize = 1_024;
/// Bytes of a pepper.
const PEPPER_BYTES: usize = 32;

/// Why a password could not be hashed or checked.
#[derive(Debug, thiserror::Error)]
pub enum PasswordError {
    /// Every hashing thread is taken: try again later.
    #[error("too many logins at once")]
    Busy,
    /// The stored hash is broken or has a pepper that we do not know, or there is no memory.
    #[error("hashing failed")]
    Failed,
}

/// Why the peppers cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PepperError {
    /// The file cannot be read.
    #[error("--password-pepper: {0}")]
    File(#[from] std::io::Error),
    /// A line has another form.
    #[error("--password-pepper: line {0} is not `<id of 1 to 8 a-z 0-9> <Base64 of 32 bytes>`")]
    Line(usize),
}

/// Where the peppers are.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct PepperOptions {
    /// File with the peppers of passwords: a line `<id> <Base64 of 32 bytes>` each, the first one is for new hashes.
    /// The same for `auth` and every ingress.
    #[arg(long, env = "DERMFLOW_PASSWORD_PEPPER")]
    pub password_pepper: Option<PathBuf>,
}

impl PepperOptions {
    /// Reads the file; without one there is no pepper.
    ///
    /// # Errors
    /// See [`PepperError`].
    pub fn load(&self) -> Result<Peppers, PepperError> {
        match &self.password_pepper {
            Some(path) => Peppers::parse(&read_secret(path)?),
            None => Ok(Peppers::default()),
        }
    }
}

struct Pepper {
    id: String,
    key: SecretSlice<u8>,
}

/// The secret keys of argon2 (RFC 9106 §3.1, K), kept apart from the database: who has only its content cannot try
/// passwords on it. A hash names its key (`keyid` in the PHC string). An old key stays in the file, after the first,
/// until every user whose hash names it has signed in.
#[derive(Clone, Default)]
pub struct Peppers(Arc<[Pepper]>);

impl fmt::Debug for Peppers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|pepper| &pepper.id)).finish()
    }
}

impl Peppers {
    /// Reads lines as [`PepperOptions`] describes them.
    ///
    /// # Errors
    /// [`PepperError::Line`].
    pub fn parse(text: &SecretString) -> Result<Self, PepperError> {
        let pepper = |(n, line): (usize, &str)| {
            let bad = || PepperError::Line(n + 1);
            let (id, key) = line.split_once(' ').ok_or_else(bad)?;
            let plain = id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            let key = STANDARD.decode(key.trim()).map_err(|_| bad())?;
            let fits = plain && (1..=8).contains(&id.len()) && key.len() == PEPPER_BYTES;
            if fits { Ok(Pepper { id: id.into(), key: key.into() }) } else { Err(bad()) }
        };
        let lines = text.expose_secret().lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        Ok(Self(lines.map(pepper).collect::<Result<Vec<_>, _>>()?.into()))
    }

    /// The key for everything but passwords that must not be recomputed from a copy of the database: it is the
    /// oldest, so that it changes as seldom as can be.
    pub(crate) fn oldest(&self) -> &[u8] {
        self.0.last().map_or(&[], |pepper| pepper.key.expose_secret())
    }

    /// The hasher for the key that `stored` names.
    fn of(&self, stored: &PasswordHash) -> Result<Argon2<'_>, PasswordError> {
        let params = Params::try_from(stored).map_err(|_| PasswordError::Failed)?;
        if params.keyid().is_empty() {
            return Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params));
        }
        let pepper = self.0.iter().find(|pepper| pepper.id.as_bytes() == params.keyid());
        keyed(pepper.ok_or(PasswordError::Failed)?, params)
    }

    /// The hasher for new hashes.
    fn current(&self) -> Result<Argon2<'_>, PasswordError> {
        let mut params = ParamsBuilder::new();
        params.m_cost(MEMORY_KIB).t_cost(PASSES).p_cost(1);
        match self.0.first() {
            None => {
                let params = params.build().map_err(|_| PasswordError::Failed)?;
                Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
            }
            Some(pepper) => {
                let id = pepper.id.as_bytes().try_into().map_err(|_| PasswordError::Failed)?;
                let params = params.keyid(id).build().map_err(|_| PasswordError::Failed)?;
                keyed(pepper, params)
            }
        }
    }

    /// Whether `stored` is weaker than what [`hash`] makes now, or has another pepper.
    fn is_outdated(&self, stored: &str) -> bool {
        let params = PasswordHash::new(stored).ok().and_then(|hash| Params::try_from(&hash).ok());
        let newest = self.0.first().map_or("", |pepper| &pepper.id);
        params.is_none_or(|params| {
            params.m_cost() < MEMORY_KIB || params.t_cost() < PASSES || params.keyid() != newest.as_bytes()
        })
    }
}

fn keyed(pepper: &Pepper, params: Params) -> Result<Argon2<'_>, PasswordError> {
    let key = pepper.key.expose_secret();
    Argon2::new_with_secret(key, Algorithm::Argon2id, Version::V0x13, params)
        .map_err(|_| PasswordError::Failed)
}

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Whether the password is right.
    pub right: bool,
    /// When it is, and the stored hash is outdated: what to store instead.
    pub rehashed: Option<String>,
}

/// What a thread hashes in. It keeps it: so much memory, asked for and given back each time, would stall others.
type Memory = Vec<Block>;
type Work = Box<dyn FnOnce(&mut Memory) + Send>;

/// Threads that hash, and a turn for each.
#[derive(Debug, Clone)]
struct Lane {
    turns: Arc<Semaphore>,
    work: mpsc::Sender<Work>,
}

/// Hashes and checks passwords. All other work goes before logins: up to four in hand get a small share of a busy
/// machine; a flood of them gets only what is left over, on as many threads as there are cores but one.
#[derive(Debug, Clone)]
pub struct Hasher {
    peppers: Peppers,
    places: Arc<Semaphore>,
    /// How many places there are.
    all: usize,
    few: Lane,
    crowd: Lane,
    /// What a login for an unknown user is checked against, so that it takes the same time.
    decoy: Arc<str>,
}

/// A place among the logins in hand.
#[derive(Debug)]
pub struct Place(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

impl Hasher {
    /// A hasher for this machine.
    ///
    /// # Errors
    /// [`PasswordError::Failed`] when there is no memory for one hash, or no thread.
    pub fn new(peppers: Peppers) -> Result<Self, PasswordError> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let count = cores.saturating_sub(1).clamp(1, MAX_THREADS);
        let decoy = hash(&generate()?, &peppers)?.into();
        let (few, crowd) = (Lane::new(1, "login", stand_back)?, Lane::new(count, "logins", stand_aside)?);
        let all = count * PLACES;
        Ok(Self { peppers, places: Semaphore::new(all).into(), all, few, crowd, decoy })
    }

    /// Takes a place among the logins in hand, before anything is done for one.
    ///
    /// # Errors
    /// [`PasswordError::Busy`] when all are taken.
    pub fn place(&self) -> Result<Place, PasswordError> {
        self.places.clone().try_acquire_owned().map(Place).map_err(|_| PasswordError::Busy)
    }

    /// Whether `password` matches `stored`, a PHC string. Without `stored` the answer is no, and takes as long.
    ///
    /// # Errors
    /// [`PasswordError::Busy`] when its turn did not come within 2 s, or all cores were taken for [`HASH_DEADLINE`].
    pub async fn verify(
        &self,
        _place: Place,
        password: SecretString,
        stored: Option<String>,
    ) -> Result<Verdict, PasswordError> {
        let is_flood = self.all - self.places.available_permits() > FEW;
        let lane = if is_flood { &self.crowd } else { &self.few };
        let turn = lane.turns.clone().acquire_owned();
        let permit = timeout(QUEUE_DEADLINE, turn).await.map_err(|_| PasswordError::Busy)?;
        let (decoy, peppers) = (self.decoy.clone(), self.peppers.clone());
        let (tell, told) = oneshot::channel();
        let check = move |memory: &mut Memory| {
            let _permit = permit;
            let begun = Instant::now();
            // Nobody listens when the caller hung up.
            let _ = tell.send(judge(&password, stored.as_deref(), &decoy, &peppers, memory));
            if is_flood {
                thread::sleep(begun.elapsed().min(LONGEST_REST));
            }
        };
        lane.work.send(Box::new(check)).map_err(|_| PasswordError::Failed)?;
        let told = timeout(HASH_DEADLINE, told).await.map_err(|_| PasswordError::Busy)?;
        told.map_err(|_| PasswordError::Failed)?
    }
}

/// For few logins: a small share of a busy machine, so that who has work under way can sign in. On Linux this is a
/// thread's own. Where it cannot be had, hashing has its full share.
fn stand_back() {
    let _ = rustix::process::setpriority_process(None, NICE);
}

/// For a flood of logins: what nobody else wants, and it gives way at once (`SCHED_IDLE`, sched(7)). The way back would
/// need a privilege, so these threads are others than the one for few.
fn stand_aside() {
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle);
}

impl Lane {
    /// Threads that take work from one queue, until its sender is gone.
    fn new(count: usize, name: &str, prepare: fn()) -> Result<Self, PasswordError> {
        let (work, queue) = mpsc::channel::<Work>();
        let queue = Arc::new(Mutex::new(queue));
        for n in 0..count {
            let queue = queue.clone();
            let run = move || {
                prepare();
                let mut memory = Memory::new();
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(work) = next else { return };
                    // The panic hook has told where; the caller is told that it failed, by the channel that closes.
                    let _ = catch_unwind(AssertUnwindSafe(|| work(&mut memory)));
                }
            };
            let thread = thread::Builder::new().name(format!("{name}-{n}"));
            thread.spawn(run).map_err(|_| PasswordError::Failed)?;
        }
        Ok(Self { turns: Semaphore::new(count).into(), work })
    }
}

fn judge(
    password: &SecretString,
    stored: Option<&str>,
    decoy: &str,
    peppers: &Peppers,
    memory: &mut Memory,
) -> Result<Verdict, PasswordError> {
    let right = matches(password, stored.unwrap_or(decoy), peppers, memory)? && stored.is_some();
    let outdated = right && stored.is_some_and(|stored| peppers.is_outdated(stored));
    let rehashed = outdated.then(|| hash(password, peppers)).transpose()?;
    Ok(Verdict { right, rehashed })
}

/// The PHC string of `password` in NFKC, with a fresh salt and the newest pepper.
///
/// # Errors
/// [`PasswordError::Failed`] when there is no memory or no randomness.
pub fn hash(password: &SecretString, peppers: &Peppers) -> Result<String, PasswordError> {
    let mut salt = [0; 16];
    aws_lc_rs::rand::fill(&mut salt).map_err(|_| PasswordError::Failed)?;
    let hash = peppers
        .current()?
        .hash_password_with_salt(normalise(password).as_bytes(), &salt)
        .map_err(|_| PasswordError::Failed)?;
    Ok(hash.to_string())
}

fn matches(
    password: &SecretString,
    stored: &str,
    peppers: &Peppers,
    memory: &mut Memory,
) -> Result<bool, PasswordError> {
    let password = normalise(password);
    if password.len() > MAX_PASSWORD_BYTES {
        return Ok(false);
    }
    let stored = PasswordHash::new(stored).map_err(|_| PasswordError::Failed)?;
    let (Some(salt), Some(expected)) = (&stored.salt, &stored.hash) else {
        return Err(PasswordError::Failed);
    };
    let (hasher, mut output) = (peppers.of(&stored)?, [0; Output::MAX_LENGTH]);
    let output = &mut output[..expected.len()];
    let missing = hasher.params().block_count().saturating_sub(memory.len());
    memory.try_reserve_exact(missing).map_err(|_| PasswordError::Failed)?;
    memory.resize(hasher.params().block_count(), Block::default());
    hasher
        .hash_password_into_with_memory(password.as_bytes(), salt, output, memory)
        .map_err(|_| PasswordError::Failed)?;
    // Outputs compare in constant time.
    Output::new(output).map(|output| output == *expected).map_err(|_| PasswordError::Failed)
}

/// A password with 192 random bits, 32 characters long.
///
/// # Errors
/// [`PasswordError::Failed`] when the system gives no randomness.
pub fn generate() -> Result<SecretString, PasswordError> {
    let mut bits = [0; 24];
    aws_lc_rs::rand::fill(&mut bits).map_err(|_| PasswordError::Failed)?;
    Ok(URL_SAFE_NO_PAD.encode(bits).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peppers(ids: &[&str]) -> Peppers {
        let line = |id: &&str| {
            let mut key = [0; PEPPER_BYTES];
            key[..id.len()].copy_from_slice(id.as_bytes());
            format!("{id} {}\n", STANDARD.encode(key))
        };
        Peppers::parse(&ids.iter().map(line).collect::<String>().into()).unwrap()
    }

    async fn verify(hasher: &Hasher, password: &str, stored: Option<&str>) -> Result<Verdict, PasswordError> {
        hasher.verify(hasher.place().unwrap(), password.into(), stored.map(str::to_owned)).await
    }

    fn matches(password: &SecretString, stored: &str, peppers: &Peppers) -> Result<bool, PasswordError> {
        super::matches(password, stored, peppers, &mut Memory::new())
    }

    const WRONG: Verdict = Verdict { right: false, rehashed: None };
    const RIGHT: Verdict = Verdict { right: true, rehashed: None };

    #[tokio::test]
    async fn a_password_matches_itself_only() {
        let hasher = Hasher::new(Peppers::default()).unwrap();
        let password = generate().unwrap();
        let stored = hash(&password, &Peppers::default()).unwrap();
        assert!(stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{stored}");
        assert_eq!(verify(&hasher, password.expose_secret(), Some(&stored)).await.unwrap(), RIGHT);
        assert_eq!(verify(&hasher, "wrong", Some(&stored)).await.unwrap(), WRONG);
        assert_eq!(verify(&hasher, password.expose_secret(), None).await.unwrap(), WRONG);
        let long = "x".repeat(MAX_PASSWORD_BYTES + 1);
        assert_eq!(verify(&hasher, &long, Some(&stored)).await.unwrap(), WRONG);
    }

    #[tokio::test]
    async fn a_decoy_is_never_a_way_in() {
        let hasher = Hasher::new(Peppers::default()).unwrap();
        assert_eq!(verify(&hasher, "", None).await.unwrap(), WRONG);
    }

    #[test]
    fn nothing_is_cut_off_and_every_spelling_is_the_same() {
        let none = Peppers::default();
        let long = "ä".repeat(MAX_PASSWORD_BYTES / 2);
        let stored = hash(&long.as_str().into(), &none).unwrap();
        assert!(matches(&long.as_str().into(), &stored, &none).unwrap());
        assert!(!matches(&long[..long.len() - 2].into(), &stored, &none).unwrap());
        // The letter with its mark as one character and as two.
        assert!(matches(&"a\u{308}".repeat(MAX_PASSWORD_BYTES / 2).into(), &stored, &none).unwrap());
    }

    #[tokio::test]
    async fn a_hash_from_before_the_pepper_is_replaced_at_the_next_login() {
        let (old, new) = (peppers(&["a"]), peppers(&["b", "a"]));
        let weak = Params::new(8_192, 1, 1, None).unwrap();
        let weak = Argon2::new(Algorithm::Argon2id, Version::V0x13, weak);
        let weak = weak.hash_password_with_salt(b"pw", &[7; 16]).unwrap().to_string();
        let hasher = Hasher::new(new.clone()).unwrap();
        for outdated in
            [weak, hash(&"pw".into(), &Peppers::default()).unwrap(), hash(&"pw".into(), &old).unwrap()]
        {
            assert_eq!(verify(&hasher, "no", Some(&outdated)).await.unwrap(), WRONG);
            let Verdict { right, rehashed } = verify(&hasher, "pw", Some(&outdated)).await.unwrap();
            let fresh = rehashed.unwrap();
            assert!(right && fresh.starts_with("$argon2id$v=19$m=19456,t=2,p=1,keyid="), "{fresh}");
            assert_eq!(verify(&hasher, "pw", Some(&fresh)).await.unwrap(), RIGHT);
        }
        // Who has the hash alone can try nothing.
        let stored = hash(&"pw".into(), &new).unwrap();
        assert!(matches(&"pw".into(), &stored, &old).is_err());
        let forged = Peppers::parse(&format!("b {}", STANDARD.encode([1; 32])).into()).unwrap();
        assert!(!matches(&"pw".into(), &stored, &forged).unwrap());
    }

    #[test]
    fn a_pepper_has_an_id_and_32_bytes() {
        let good = STANDARD.encode([1; 32]);
        for bad in [good.clone(), format!("A {good}"), format!("toolong12 {good}"), "a AAAA".into()] {
            assert!(matches!(Peppers::parse(&bad.into()), Err(PepperError::Line(1))));
        }
        assert_eq!(format!("{:?}", peppers(&["a", "b"])), r#"["a", "b"]"#);
    }

    #[tokio::test]
    async fn who_finds_no_place_is_told_at_once() {
        let hasher = Hasher::new(Peppers::default()).unwrap();
        let places: Vec<Place> = std::iter::from_fn(|| hasher.place().ok()).collect();
        assert_eq!(places.len() % PLACES, 0);
        assert!(matches!(hasher.place(), Err(PasswordError::Busy)));
        drop(places);
        assert!(hasher.place().is_ok());
    }
}
