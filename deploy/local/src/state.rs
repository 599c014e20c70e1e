//! The state folder: one instance's secrets, data and logs, used by one process at a time.

use std::{
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use aws_lc_rs::{digest, rand};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::unprivileged;

/// Marks a folder as ours, and is what the lock is on.
const MARKER: &str = ".dermflow-state";

/// A state folder, locked until this value is dropped.
#[derive(Debug)]
pub struct State {
    dir: PathBuf,
    _lock: File,
}

impl State {
    /// Opens the state in `dir`, or begins one in a folder that is empty or missing.
    ///
    /// # Errors
    /// When the folder holds something else, when another process uses it, or when it cannot be written.
    pub fn open(dir: &Path) -> Result<Self> {
        let shown = dir.display();
        fs::create_dir_all(dir).with_context(|| format!("cannot create the state folder {shown}"))?;
        let dir = dir.canonicalize().with_context(|| format!("cannot find the state folder {shown}"))?;
        let marker = dir.join(MARKER);
        let entries = fs::read_dir(&dir).with_context(|| format!("cannot read the folder {shown}"))?;
        if !marker.exists() && entries.count() > 0 {
            bail!("{shown} holds files but is not a state folder of Dermflow: choose another with --state");
        }
        // PostgreSQL's own user has to pass through when root starts it; every file is private all the same.
        let mode = if unprivileged::is_root() { 0o711 } else { 0o700 };
        fs::set_permissions(&dir, Permissions::from_mode(mode))
            .with_context(|| format!("cannot make {shown} private"))?;
        let lock = private_file(OpenOptions::new().write(true).create(true), &marker)
            .with_context(|| format!("cannot write into the state folder {shown}"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { dir, _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                bail!(
                    "{shown} is in use by another `up`: stop that one, or choose another folder with --state"
                )
            }
            Err(TryLockError::Error(e)) => Err(e).with_context(|| format!("cannot lock {shown}")),
        }
    }

    /// Erases everything in the state folder. It stays locked.
    ///
    /// # Errors
    /// When something cannot be erased.
    pub fn erase(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).context("cannot read the state folder")? {
            let path = entry.context("cannot read the state folder")?.path();
            if path.file_name().is_some_and(|name| name == MARKER) {
                continue;
            }
            let erased = if path.is_symlink() || !path.is_dir() {
                fs::remove_file(&path)
            } else {
                fs::remove_dir_all(&path)
            };
            erased.with_context(|| format!("cannot erase {}", path.display()))?;
        }
        Ok(())
    }

    /// Where `name` is, or would be, in the state folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Twelve hexadecimal digits that stand for this folder's path, where a path would be too long.
    pub fn hash(&self) -> String {
        short_hash(self.dir.as_os_str().as_encoded_bytes())
    }

    /// A private folder in the state folder, created when missing.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::create_dir_all(&path)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o700)))
            .with_context(|| format!("cannot create the folder {}", path.display()))?;
        Ok(path)
    }

    /// The log file of `name`.
    ///
    /// # Errors
    /// When the folder of logs cannot be created.
    pub fn log(&self, name: &str) -> Result<PathBuf> {
        Ok(self.folder("log")?.join(format!("{name}.log")))
    }

    /// A private file, written with what `make` returns when it is missing.
    ///
    /// # Errors
    /// When `make` fails or the file cannot be written.
    pub fn keep(&self, name: &str, make: impl FnOnce() -> Result<String>) -> Result<PathBuf> {
        let path = self.path(name);
        if !path.exists() {
            write_private(&path, &make()?)?;
        }
        Ok(path)
    }

    /// The file `<name>.password`, made with 32 random bytes in base64url and no line end when it is missing.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn password(&self, name: &str) -> Result<PathBuf> {
        self.keep(&format!("{name}.password"), || Ok(URL_SAFE_NO_PAD.encode(random_bytes()?)))
    }
}

/// Reads a file, naming it when that fails.
///
/// # Errors
/// When it cannot be read.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Writes a file that only its owner reads (mode 0600), whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    let part = path.with_extension("part");
    let write = || -> io::Result<()> {
        let mut file = private_file(OpenOptions::new().write(true).create(true).truncate(true), &part)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&part, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// Opens a file with mode 0600, whatever it had before.
pub(crate) fn private_file(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    let file = options.mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// 256 random bits.
pub(crate) fn random_bytes() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    rand::fill(&mut bytes).ok().context("the system gives no randomness")?;
    Ok(bytes)
}

/// The first twelve hexadecimal digits of the SHA-256 digest.
pub(crate) fn short_hash(bytes: &[u8]) -> String {
    let digest = digest::digest(&digest::SHA256, bytes);
    let number = digest.as_ref().iter().take(6).fold(0_u64, |number, byte| (number << 8) | u64::from(*byte));
    format!("{number:012x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&dir).unwrap();
        dir
    }

    #[test]
    fn a_state_is_private_locked_and_kept() {
        let dir = folder();
        let state = State::open(&dir).unwrap();
        let file = state.password("nats").unwrap();
        let first = read(&file).unwrap();
        assert_eq!(first.len(), 43);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o066, 0);
        assert!(State::open(&dir).unwrap_err().to_string().contains("in use"));
        drop(state);
        let state = State::open(&dir).unwrap();
        assert_eq!(read(&state.password("nats").unwrap()).unwrap(), first);
        state.erase().unwrap();
        assert!(!file.exists());
        assert_ne!(read(&state.password("nats").unwrap()).unwrap(), first);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_folder_of_somebody_else_is_refused() {
        let dir = folder();
        fs::write(dir.join("thesis.txt"), "years of work").unwrap();
        assert!(State::open(&dir).unwrap_err().to_string().contains("is not a state folder"));
        fs::remove_dir_all(dir).unwrap();
    }
}
