//! PostgreSQL refuses to run as root: started by root it runs as `nobody`, who cannot pass through every folder.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// A user and group by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Whether this process runs as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whom PostgreSQL has to run as: `nobody` when this process is root, else nobody else.
///
/// # Errors
/// When this process is root and the machine has no user `nobody`.
pub fn user() -> Result<Option<User>> {
    if !is_root() {
        return Ok(None);
    }
    let passwd = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    let user = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, uid, gid) = (fields.next()?, fields.nth(1)?, fields.next()?);
        (name == "nobody").then_some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()? })
    });
    user.map(Some).context("PostgreSQL cannot run as root, and this machine has no user `nobody`")
}

/// Whether a user without any rights can pass through `path` and every folder above it.
pub fn reachable(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else { return false };
    path.ancestors().all(|dir| fs::metadata(dir).is_ok_and(|meta| meta.mode() & 0o001 != 0))
}

/// `preferred`, unless root cannot share what lies there with `nobody`: then `/var/lib/dermflow-<name>`.
/// (Not a temporary folder: those are swept, and a database does not survive that.)
pub fn home(preferred: PathBuf, name: &str) -> PathBuf {
    let parent_reachable = preferred.parent().is_some_and(reachable);
    if is_root() && !parent_reachable {
        Path::new("/var/lib").join(format!("dermflow-{name}"))
    } else {
        preferred
    }
}

/// Creates a folder with this mode that belongs to `user` (or to this process's user). One that is already
/// there must belong to that user, and must not be a link.
///
/// # Errors
/// When it cannot be created, or belongs to another.
pub fn folder(path: &Path, user: Option<User>, mode: u32) -> Result<()> {
    let shown = path.display();
    let expected = user.map_or_else(|| rustix::process::geteuid().as_raw(), |user| user.uid);
    match fs::create_dir(path) {
        Ok(()) => {
            if let Some(user) = user {
                chown(path, Some(user.uid), Some(user.gid))
                    .with_context(|| format!("cannot give {shown} away"))?;
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            let meta = fs::symlink_metadata(path).with_context(|| format!("cannot look at {shown}"))?;
            anyhow::ensure!(
                meta.is_dir() && meta.uid() == expected,
                "{shown} belongs to another user or is no folder: remove it"
            );
        }
        Err(e) => return Err(e).with_context(|| format!("cannot create {shown}")),
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("cannot set modes of {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_folder_is_not_reachable_and_sends_root_elsewhere() {
        let dir = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
        fs::create_dir_all(dir.join("a/b")).unwrap();
        fs::set_permissions(dir.join("a"), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(dir.join("a/b"), Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        assert!(!reachable(&dir.join("a/b")));
        let elsewhere = home(dir.join("a/b/postgres"), "x");
        assert_eq!(elsewhere == Path::new("/var/lib/dermflow-x"), is_root());
        fs::set_permissions(&dir, Permissions::from_mode(0o711)).unwrap();
        if reachable(&std::env::temp_dir()) {
            assert_eq!(home(dir.join("a/b/postgres"), "x"), dir.join("a/b/postgres"));
        }
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_folder_of_another_user_is_refused() {
        let dir = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
        folder(&dir, None, 0o700).unwrap();
        folder(&dir, None, 0o700).unwrap();
        let other = User { uid: 12_345, gid: 12_345 };
        assert!(folder(&dir, Some(other), 0o700).unwrap_err().to_string().contains("belongs to another"));
        fs::remove_dir_all(dir).unwrap();
    }
}
