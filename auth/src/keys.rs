//! The keys that sign access tokens: a folder of Ed25519 keys, each file named after the moment from which it signs.
//!
//! All replicas read the same folder and go by the same names, so they change keys at the same moment without
//! talking to each other. A key is published and accepted as soon as it is in the folder, [`LEAD`] before it signs;
//! after its successor has begun, it is accepted for as long as a token lives. A key that is taken out of the
//! folder is refused with the next look at it.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
    time::Duration,
};

use aws_lc_rs::{
    digest::{SHA256, digest},
    signature::{Ed25519KeyPair, KeyPair},
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use dermflow_schemas::clock;
use jsonwebtoken::{DecodingKey, EncodingKey};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use serde_json::{Value, json};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::token::{LEEWAY, LIFETIME};

/// How long before its first signature a key is published: twice [`CACHE`].
pub const LEAD: Duration = Duration::from_mins(10);
/// How long others may keep the published keys, `max-age` of the JWK set.
pub const CACHE: Duration = Duration::from_mins(5);
/// The longest name is far shorter; a folder with more keys than this is no folder of keys.
const MAX_KEYS: usize = 64;

/// Why keys cannot be read or made.
#[derive(Debug, thiserror::Error)]
#[error("keys {path}: {reason}")]
pub struct KeyError {
    path: String,
    reason: String,
}

impl KeyError {
    pub(crate) fn new(path: &Path, reason: impl Into<String>) -> Self {
        Self { path: path.display().to_string(), reason: reason.into() }
    }
}

/// One key.
#[derive(Clone)]
pub struct Key {
    /// Its file.
    pub file: PathBuf,
    /// Its JWK thumbprint (RFC 7638), which is its `kid`.
    pub id: String,
    /// From when on it signs.
    pub begins: OffsetDateTime,
    pub(crate) signing: EncodingKey,
    pub(crate) verifying: DecodingKey,
    /// The public key, base64url.
    public: String,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({} from {})", self.id, self.begins)
    }
}

impl Key {
    fn read(path: &Path) -> Result<Self, KeyError> {
        let bad = |reason: String| KeyError::new(path, reason);
        let begins = path.file_stem().and_then(|stem| clock::moment(stem.to_str()?));
        let begins = begins.ok_or_else(|| bad("the name is not of the form 20260131T235959Z.pem".into()))?;
        let pkcs8 = PrivatePkcs8KeyDer::from_pem_file(path).map_err(|error| bad(error.to_string()))?;
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(pkcs8.secret_pkcs8_der())
            .map_err(|error| bad(error.to_string()))?;
        let public = URL_SAFE_NO_PAD.encode(pair.public_key().as_ref());
        let thumbprint = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{public}"}}"#);
        Ok(Self {
            file: path.into(),
            id: URL_SAFE_NO_PAD.encode(digest(&SHA256, thumbprint.as_bytes())),
            begins,
            signing: EncodingKey::from_ed_der(pkcs8.secret_pkcs8_der()),
            verifying: DecodingKey::from_ed_components(&public).map_err(|error| bad(error.to_string()))?,
            public,
        })
    }

    /// The public part as a JWK (RFC 8037 §2).
    fn jwk(&self) -> Value {
        json!({"kty": "OKP", "crv": "Ed25519", "x": self.public, "kid": self.id, "alg": "EdDSA", "use": "sig"})
    }
}

/// The keys of a folder, the oldest first.
#[derive(Debug, Clone)]
pub struct Keys(Vec<Key>);

impl Keys {
    /// Reads every `*.pem` file of `folder`.
    ///
    /// # Errors
    /// When there is none, or one of them is no Ed25519 key in PKCS#8 PEM.
    pub fn read(folder: &Path) -> Result<Self, KeyError> {
        let mut keys = files(folder)?.iter().map(|path| Key::read(path)).collect::<Result<Vec<_>, _>>()?;
        keys.sort_by_key(|key| key.begins);
        if keys.is_empty() { Err(KeyError::new(folder, "no key")) } else { Ok(Self(keys)) }
    }

    /// Whether these are the same keys.
    pub(crate) fn are(&self, others: &Self) -> bool {
        let name = |key: &Key| (key.id.clone(), key.begins);
        self.0.iter().map(name).eq(others.0.iter().map(name))
    }

    /// The one that signs at `now`: the latest that has begun, or the first one when none has.
    pub(crate) fn signing(&self, now: OffsetDateTime) -> &Key {
        self.0.iter().rfind(|key| key.begins <= now).unwrap_or(&self.0[0])
    }

    /// The key with this id, if its tokens may still live at `now`.
    pub(crate) fn accepted(&self, id: &str, now: OffsetDateTime) -> Option<&Key> {
        let at = self.0.iter().position(|key| key.id == id)?;
        self.is_alive(at, now).then(|| &self.0[at])
    }

    /// The JWK set (RFC 7517 §5) of the keys whose tokens may live at `now`, and of those that will sign.
    pub fn published(&self, now: OffsetDateTime) -> Value {
        json!({"keys": self.alive(now).map(Key::jwk).collect::<Vec<_>>()})
    }

    /// The keys that are published at `now`.
    pub fn alive(&self, now: OffsetDateTime) -> impl Iterator<Item = &Key> {
        (0..self.0.len()).filter(move |at| self.is_alive(*at, now)).map(|at| &self.0[at])
    }

    fn is_alive(&self, at: usize, now: OffsetDateTime) -> bool {
        let life = LIFETIME + Duration::from_secs(LEEWAY as u64);
        self.0.get(at + 1).is_none_or(|successor| now <= successor.begins + life)
    }
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, KeyError> {
    let bad = |error: std::io::Error| KeyError::new(folder, error.to_string());
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(bad)? {
        let path = entry.map_err(bad)?.path();
        if path.extension().is_some_and(|extension| extension == "pem") {
            files.push(path);
        }
        if files.len() > MAX_KEYS {
            return Err(KeyError::new(folder, format!("more than {MAX_KEYS} keys")));
        }
    }
    Ok(files)
}

/// Makes a key that signs from `begins` on, in a file that only its owner can read. The folder is made as well.
///
/// # Errors
/// When there is a key for that second already, or the folder cannot be written.
pub fn add(folder: &Path, begins: OffsetDateTime) -> Result<Key, KeyError> {
    let pkcs8 = Ed25519KeyPair::generate().and_then(|pair| pair.to_pkcs8v1());
    let pkcs8 = pkcs8.map_err(|_| KeyError::new(folder, "no randomness"))?;
    let pem = format!(
        "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n",
        STANDARD.encode(pkcs8.as_ref())
    );
    Key::read(&put(folder, begins, "pem", |_| pem)?)
}

/// Gives a new key to who owns the folder, and lets the folder's group read it if the folder is for that group: whoever
/// makes a key, the services that need it can read it.
fn lend(file: &File, folder: &Path) -> io::Result<()> {
    let (own, all) = (file.metadata()?, fs::metadata(folder)?);
    if (own.uid(), own.gid()) != (all.uid(), all.gid()) {
        fchown(file, Some(all.uid()), Some(all.gid()))?;
    }
    let is_for_group = all.mode() & 0o044 == 0o040;
    file.set_permissions(Permissions::from_mode(if is_for_group { 0o640 } else { 0o600 }))
}

/// Writes a new file that is named after a moment and that only the services can read; `text` is given the name.
pub(crate) fn put(
    folder: &Path,
    begins: OffsetDateTime,
    extension: &str,
    text: impl FnOnce(&str) -> String,
) -> Result<PathBuf, KeyError> {
    let bad = |error: std::io::Error| KeyError::new(folder, error.to_string());
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(bad)?;
    let name = clock::name(begins).map_err(|error| KeyError::new(folder, error.to_string()))?;
    let path = folder.join(format!("{name}.{extension}"));
    let text = Zeroizing::new(text(&name));
    // Readers look at the folder at any time: the whole file appears at once, or it does not.
    let part = folder.join(format!("{name}.part"));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part).map_err(bad)?;
    let linked = file
        .write_all(text.as_bytes())
        .and_then(|()| lend(&file, folder))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::hard_link(&part, &path));
    fs::remove_file(&part).map_err(bad)?;
    linked.map_err(|error| KeyError::new(&path, error.to_string()))?;
    // The key may be used at once: a power failure must not take it away.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(bad)?;
    Ok(path)
}

/// Removes the keys that sign no more and whose tokens are all dead, and returns them.
///
/// # Errors
/// When a key cannot be read or removed.
pub fn prune(folder: &Path, now: OffsetDateTime) -> Result<Vec<Key>, KeyError> {
    let keys = Keys::read(folder)?;
    let dead = keys.0.iter().filter(|key| keys.accepted(&key.id, now).is_none());
    dead.map(|key| match fs::remove_file(&key.file) {
        Ok(()) => Ok(key.clone()),
        Err(error) => Err(KeyError::new(&key.file, error.to_string())),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    fn folder() -> PathBuf {
        std::env::temp_dir().join(format!("dermflow-keys-{}", uuid::Uuid::new_v4()))
    }

    #[test]
    fn a_key_signs_from_its_moment_on_and_lives_as_long_as_its_last_token() {
        let (folder, first) = (folder(), datetime!(2026-01-31 12:00 UTC));
        let second = first + Duration::from_hours(24);
        add(&folder, first).unwrap();
        let old = Keys::read(&folder).unwrap().signing(first).id.clone();
        add(&folder, second).unwrap();
        assert!(add(&folder, second).is_err(), "one key a second");
        let keys = Keys::read(&folder).unwrap();
        let count = |now| keys.published(now)["keys"].as_array().unwrap().len();
        let just_before = second - Duration::from_secs(1);
        assert_eq!(keys.signing(first - LEAD).id, old, "rather than none");
        assert_eq!((keys.signing(just_before).id.as_str(), count(just_before)), (old.as_str(), 2));
        assert_ne!(keys.signing(second).id, old);
        assert!(keys.accepted(&old, second + LIFETIME).is_some());
        let later = second + LIFETIME + Duration::from_mins(1);
        assert!(keys.accepted(&old, later).is_none());
        assert_eq!(count(later), 1);
        assert_eq!(prune(&folder, second).unwrap().len(), 0);
        assert_eq!(prune(&folder, later).unwrap().len(), 1);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_is_published_is_public() {
        let folder = folder();
        let path = add(&folder, datetime!(2026-01-31 12:00 UTC)).unwrap().file;
        let keys = Keys::read(&folder).unwrap();
        let key = &keys.published(datetime!(2026-01-31 12:00 UTC))["keys"][0];
        let names: Vec<_> = key.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, ["alg", "crv", "kid", "kty", "use", "x"]);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(&folder, Permissions::from_mode(0o750)).unwrap();
        let shared = add(&folder, datetime!(2026-02-28 12:00 UTC)).unwrap().file;
        assert_eq!(
            fs::metadata(&shared).unwrap().permissions().mode() & 0o777,
            0o640,
            "a folder for a group"
        );
        fs::write(folder.join("next.pem"), "x").unwrap();
        assert!(Keys::read(&folder).is_err(), "a file with another name");
        fs::remove_dir_all(folder).unwrap();
    }
}
