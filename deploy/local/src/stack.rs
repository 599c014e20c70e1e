//! All parts of one instance, and the flags of our own programs.

use std::{
    ffi::OsStr,
    fs::{self, Permissions},
    iter,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    nats::{self, Nats},
    pki::Pki,
    ports,
    postgres::Postgres,
    process::{Process, Signal},
    servers::Servers,
    state::{State, write_private},
};

/// How long an `ingress` or a `worker` may take to be ready.
pub const READY_WITHIN: Duration = Duration::from_mins(1);
/// How long they may take to end what they work on.
pub const STOP_WITHIN: Duration = Duration::from_secs(100);

/// What an instance is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// The servers and the ONNX Runtime.
    pub servers: Servers,
    /// The folder with our own programs: `ingress`, `worker`, `auth`.
    pub programs: PathBuf,
    /// The models, as a worker's `--model` takes them.
    pub models: Vec<String>,
    /// NATS beyond the ordinary.
    pub nats: nats::Settings,
}

/// The ports of one `ingress`, all on 127.0.0.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// HTTPS for clients.
    pub https: u16,
    /// Plain HTTP, which only redirects.
    pub plain: u16,
    /// Health and metrics.
    pub internal: u16,
}

impl Ports {
    /// The ports of the instance whose HTTPS port is `https`: 8443 goes with 8080 and 9443.
    pub fn around(https: u16) -> Self {
        Self { https, plain: https - 363, internal: https + 1_000 }
    }

    /// Free ports.
    ///
    /// # Errors
    /// When there are none.
    pub fn free() -> Result<Self> {
        Ok(Self { https: ports::free()?, plain: ports::free()?, internal: ports::free()? })
    }

    /// Checks that nobody listens on them.
    ///
    /// # Errors
    /// When another program does.
    pub fn check(self) -> Result<()> {
        for port in [self.https, self.plain, self.internal] {
            ensure!(
                ports::is_free(port),
                "port {port} is taken by another program: choose others with --port"
            );
        }
        Ok(())
    }
}

/// One `ingress`.
#[derive(Debug)]
pub struct Ingress {
    /// Its process; start it with [`Process::spawn_ready`].
    pub process: Process,
    /// Where it listens.
    pub ports: Ports,
}

impl Ingress {
    /// Its origin for clients.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.ports.https)
    }

    /// Its origin for health and metrics.
    pub fn internal_url(&self) -> String {
        format!("https://localhost:{}", self.ports.internal)
    }
}

/// Other addresses than the servers' own, for programs that are added later: something stands in between, or there
/// are several servers.
#[derive(Debug, Clone, Default)]
pub struct Detours {
    /// The broker, for ingress: URLs with commas between them.
    pub ingress_broker: Option<String>,
    /// The broker, for workers.
    pub worker_broker: Option<String>,
    /// The folders of PostgreSQL's sockets, for ingress, with commas between them; or `localhost`.
    pub database: Option<String>,
}

/// The operators' process, `ingress operate`.
#[derive(Debug)]
pub struct Operate {
    /// Its process; start it with [`Process::spawn_ready`].
    pub process: Process,
    /// Where it listens, on 127.0.0.1.
    pub port: u16,
}

impl Operate {
    /// Its origin.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }
}

/// The registration service, `auth serve`.
#[derive(Debug)]
pub struct Registration {
    /// Its process; start it with [`Process::spawn_ready`].
    pub process: Process,
    /// Where it listens for staff, on 127.0.0.1.
    pub port: u16,
    /// Health and metrics.
    pub internal: u16,
}

impl Registration {
    /// Its origin for staff.
    pub fn url(&self) -> String {
        format!("https://localhost:{}", self.port)
    }

    /// Its origin for health and metrics.
    pub fn internal_url(&self) -> String {
        format!("https://localhost:{}", self.internal)
    }
}

/// One instance. Nothing runs until it is started, part by part or with [`Stack::start_servers`].
///
/// Dropping it kills every process at once; [`Stack::stop`] ends them in order.
#[derive(Debug)]
pub struct Stack {
    /// Ingress processes, in the order in which they were added.
    pub ingress: Vec<Ingress>,
    /// The operators' process, if one was added.
    pub operate: Option<Operate>,
    /// The registration service, if it was added.
    pub registration: Option<Registration>,
    /// Worker processes, in the order in which they were added.
    pub workers: Vec<Process>,
    /// The broker.
    pub nats: Nats,
    /// The database.
    pub postgres: Postgres,
    /// The keys and certificates.
    pub pki: Pki,
    /// What the programs are told instead of the servers' own addresses.
    pub detours: Detours,
    /// The state folder, unlocked last.
    pub state: State,
    options: Options,
}

impl Stack {
    /// Makes the keys, passwords and configuration that are missing in `state`.
    ///
    /// # Errors
    /// When something cannot be made, or one of our programs has not been built.
    pub fn prepare(state: State, options: Options) -> Result<Self> {
        let pki = Pki::prepare(&state)?;
        let nats = Nats::prepare(&state, &pki, &options.servers.nats_server, &options.nats)?;
        let postgres = Postgres::prepare(&state, &options.servers.postgres_bin)?;
        Ok(Self {
            ingress: Vec::new(),
            operate: None,
            registration: None,
            workers: Vec::new(),
            nats,
            postgres,
            pki,
            detours: Detours::default(),
            state,
            options,
        })
    }

    /// Starts PostgreSQL and NATS, and prepares the tables of accounts: ingress lets nobody in before it has seen them.
    ///
    /// # Errors
    /// When one of them does not become ready.
    pub async fn start_servers(&mut self) -> Result<()> {
        let (nats, postgres) = tokio::join!(self.nats.start(), self.postgres.start());
        nats.and(postgres)?;
        self.auth(&["migrate"])?;
        Ok(())
    }

    /// Adds an `ingress` with these ports and further flags; it is not started yet. All of one instance say in
    /// links and tokens that they are the first one.
    ///
    /// # Errors
    /// When a path cannot be made.
    pub fn add_ingress(&mut self, ports: Ports, extra: &[&str]) -> Result<&mut Ingress> {
        let number = self.ingress.len();
        let public = self.ingress.first().map_or(ports, |first| first.ports).https;
        let process = self
            .program("ingress", number)?
            .args(["--listen".into(), address(ports.https), "--plain-listen".into(), address(ports.plain)])
            .args(["--internal-listen".into(), address(ports.internal)])
            .args(["--public-url".into(), format!("https://localhost:{public}")])
            .arg("--tls-cert")
            .arg(&self.pki.cert)
            .arg("--tls-key")
            .arg(&self.pki.key)
            .arg("--signing-keys")
            .arg(&self.pki.signing_keys)
            .arg("--database")
            .arg(self.database())
            .arg("--database-password-file")
            .arg(self.postgres.password_file("dermflow_ingress")?)
            .arg("--password-pepper")
            .arg(&self.pki.peppers);
        let broker = self.detours.ingress_broker.clone();
        let process = self.with_queue(process, nats::INGRESS.user, broker)?.args(extra);
        self.ingress.push(Ingress { process, ports });
        Ok(&mut self.ingress[number])
    }

    /// Adds the operators' process, for the origin of the first `ingress`, with further flags; it is not started yet.
    ///
    /// # Errors
    /// When a path cannot be made, or there is no `ingress`.
    pub fn add_operate(&mut self, port: u16, extra: &[&str]) -> Result<&mut Operate> {
        let public = self.ingress.first().context("operators sign in at an ingress")?.url();
        let path = self.options.programs.join("ingress");
        let process = Process::new("operate", path, self.state.log("operate")?)
            .arg("operate")
            .args(["--listen".into(), address(port), "--public-url".into(), public])
            .arg("--tls-cert")
            .arg(&self.pki.cert)
            .arg("--tls-key")
            .arg(&self.pki.key)
            .arg("--signing-keys")
            .arg(&self.pki.signing_keys)
            .arg("--database")
            .arg(self.postgres.url("dermflow_ingress"))
            .arg("--database-password-file")
            .arg(self.postgres.password_file("dermflow_ingress")?);
        let process = self.with_broker(process, nats::OPERATOR.user, None)?.args(extra);
        Ok(self.operate.insert(Operate { process, port }))
    }

    /// Adds the registration service; it is not started yet.
    ///
    /// # Errors
    /// When a path cannot be made.
    pub fn add_registration(&mut self, port: u16, internal: u16) -> Result<&mut Registration> {
        let path = self.options.programs.join("auth");
        let process = Process::new("registration", path, self.state.log("registration")?)
            .arg("--database")
            .arg(self.postgres.url("dermflow_auth"))
            .arg("--database-password-file")
            .arg(self.postgres.password_file("dermflow_auth")?)
            .arg("--password-pepper")
            .arg(&self.pki.peppers)
            .arg("serve")
            .args(["--listen".into(), address(port), "--internal-listen".into(), address(internal)])
            .arg("--tls-cert")
            .arg(&self.pki.cert)
            .arg("--tls-key")
            .arg(&self.pki.key)
            .arg("--staff-ca")
            .arg(&self.pki.staff_ca);
        Ok(self.registration.insert(Registration { process, port, internal }))
    }

    /// Adds a `worker` with further flags; it is not started yet.
    ///
    /// # Errors
    /// When a path cannot be made.
    pub fn add_worker(&mut self, extra: &[&str]) -> Result<&mut Process> {
        let number = self.workers.len();
        let broker = self.detours.worker_broker.clone();
        let process = self.with_queue(self.program("worker", number)?, nats::WORKER.user, broker)?;
        let process = process.arg("--ort-dylib").arg(&self.options.servers.onnxruntime);
        let models = if extra.contains(&"--model") { &[] } else { &self.options.models[..] };
        let process = models.iter().fold(process, |process, model| process.arg("--model").arg(model));
        self.workers.push(process.args(extra));
        Ok(&mut self.workers[number])
    }

    /// Runs the `auth` program with these arguments and returns what it prints, without the line's end.
    ///
    /// # Errors
    /// When it fails; the error is its last line.
    pub fn auth(&self, args: &[&str]) -> Result<String> {
        let output = self
            .auth_command()?
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("cannot start auth: it has not been built")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("auth failed: {}", text.lines().last().unwrap_or("it wrote nothing"));
        }
        Ok(String::from_utf8(output.stdout)
            .context("auth printed something else than text")?
            .trim_end()
            .into())
    }

    /// Writes the file `auth` into the state: a command that is `auth` with this instance's database.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn keep_auth_command(&self) -> Result<PathBuf> {
        let command = self.auth_command()?;
        let quoted = |word: &OsStr| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
        let words: Vec<String> =
            iter::once(command.get_program()).chain(command.get_args()).map(quoted).collect();
        let variables: String = command
            .get_envs()
            .filter_map(|(name, value)| Some(format!("export {}={}\n", name.display(), quoted(value?))))
            .collect();
        let path = self.state.path("auth");
        write_private(&path, &format!("#!/bin/sh\n{variables}exec {} \"$@\"\n", words.join(" ")))?;
        fs::set_permissions(&path, Permissions::from_mode(0o700))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// The `auth` program with this instance's database and what `auth encryption` looks at, to be given a command.
    ///
    /// # Errors
    /// When the database has no such role.
    pub fn auth_command(&self) -> Result<Command> {
        let mut command = Command::new(self.options.programs.join("auth"));
        let ingress = self.ingress.iter().flat_map(|ingress| [ingress.url(), ingress.internal_url()]);
        let operate = self.operate.iter().map(Operate::url);
        let registration =
            self.registration.iter().flat_map(|service| [service.url(), service.internal_url()]);
        let listeners: Vec<String> = ingress.chain(operate).chain(registration).collect();
        command
            .env("DERMFLOW_LISTENERS", listeners.join(","))
            .env("DERMFLOW_LISTENER_CA", &self.pki.ca)
            .env("DERMFLOW_NATS_URL", self.nats.url())
            .env("DERMFLOW_NATS_CA", &self.pki.ca)
            .env("DERMFLOW_NATS_USER", nats::MONITOR.user)
            .env("DERMFLOW_NATS_PASSWORD_FILE", self.nats.password_file(nats::MONITOR.user)?)
            .env("DERMFLOW_SEALING_KEYS", &self.pki.sealing_keys);
        command
            .arg("--database")
            .arg(self.postgres.url("dermflow_auth"))
            .arg("--database-password-file")
            .arg(self.postgres.password_file("dermflow_auth")?)
            .arg("--password-pepper")
            .arg(&self.pki.peppers);
        Ok(command)
    }

    /// Stops everything in order: ingress and workers together, then NATS, then PostgreSQL.
    ///
    /// # Errors
    /// When something had to be killed; the rest is stopped all the same.
    pub async fn stop(&mut self) -> Result<()> {
        let ingress = self.ingress.iter_mut().map(|ingress| &mut ingress.process);
        let operate = self.operate.iter_mut().map(|operate| &mut operate.process);
        let registration = self.registration.iter_mut().map(|registration| &mut registration.process);
        let mut ours: Vec<_> = ingress.chain(operate).chain(registration).chain(&mut self.workers).collect();
        for process in &mut ours {
            process.signal(Signal::TERM);
            process.resume();
        }
        let mut outcome = Ok(());
        for process in ours {
            outcome = outcome.and(process.stop(Signal::TERM, STOP_WITHIN).await);
        }
        outcome = outcome.and(self.nats.stop().await);
        outcome.and(self.postgres.stop().await)
    }

    fn program(&self, name: &str, number: usize) -> Result<Process> {
        let path = self.options.programs.join(name);
        ensure!(path.is_file(), "there is no {}: build it first", path.display());
        let name = format!("{name}-{}", number + 1);
        let log = self.state.log(&name)?;
        Ok(Process::new(name, path, log))
    }

    fn database(&self) -> String {
        match &self.detours.database {
            // Of several servers the one that may be written to.
            Some(sockets) => {
                self.postgres.url_at(sockets, "dermflow_ingress") + " target_session_attrs=read-write"
            }
            None => self.postgres.url("dermflow_ingress"),
        }
    }

    fn with_queue(&self, process: Process, user: &str, broker: Option<String>) -> Result<Process> {
        let process = self.with_broker(process, user, broker)?;
        Ok(process.arg("--sealing-keys").arg(&self.pki.sealing_keys))
    }

    fn with_broker(&self, process: Process, user: &str, broker: Option<String>) -> Result<Process> {
        let broker = broker.unwrap_or_else(|| self.nats.url());
        Ok(process
            .args(["--nats-url".into(), broker, "--nats-user".into(), user.into()])
            .arg("--nats-ca")
            .arg(&self.pki.ca)
            .arg("--nats-password-file")
            .arg(self.nats.password_file(user)?))
    }
}

fn address(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

/// The root of the repository that this was built from.
pub fn repo() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here)
}

/// The folder with our programs: the one that this program, or this test, was built into.
///
/// # Errors
/// When the system does not tell.
pub fn programs() -> Result<PathBuf> {
    let here = std::env::current_exe().context("the system does not tell where this program is")?;
    let folder = here.parent().context("this program is nowhere")?;
    let of_tests = folder.file_name().is_some_and(|name| name == "deps");
    Ok(if of_tests { folder.parent().unwrap_or(folder) } else { folder }.to_owned())
}

/// Checks that the disk of `folder` has room.
///
/// # Errors
/// When less than 1 GB is free there.
pub fn check_disk(folder: &Path) -> Result<()> {
    let disk = rustix::fs::statvfs(folder).with_context(|| format!("cannot look at {}", folder.display()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize) / 1_000_000;
    ensure!(
        free >= 1_000,
        "only {free} MB are free on the disk of {}: Dermflow needs 1 GB",
        folder.display()
    );
    Ok(())
}
