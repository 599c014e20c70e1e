//! PostgreSQL for this machine only: a Unix socket in a private folder, scram-sha-256, one role per service.

use std::{
    fs,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, Config, NoTls};

use crate::{
    pki::Identity,
    ports,
    process::{Process, Signal, TICK},
    state::{State, read, write_private},
    unprivileged::{self, User},
};

const READY_WITHIN: Duration = Duration::from_mins(1);
/// How long a start that fails is repeated, for the sake of a server that was killed a moment ago.
const HANDOVER: Duration = Duration::from_secs(5);
const STOP_WITHIN: Duration = Duration::from_secs(30);
/// What sockets are named after, whether or not it listens there.
const PORT: u16 = 5_432;
/// The database of all services.
pub const DATABASE: &str = "dermflow";
/// The operator's role, who may do everything.
pub const SUPERUSER: &str = "postgres";
/// The roles of the services; each owns the schema named beside it.
pub const ROLES: [(&str, &str); 2] = [("dermflow_auth", "auth"), ("dermflow_ingress", "ingress")];

const SETTINGS: &[&str] = &[
    "listen_addresses=",
    "unix_socket_permissions=0700",
    "shared_buffers=64MB",
    "max_connections=100",
    "fsync=on",
    "synchronous_commit=on",
    // A young table soon outgrows the plans that were made while it was empty.
    "autovacuum_naptime=5s",
    "password_encryption=scram-sha-256",
    // A failing statement may hold what no log may.
    "log_min_error_statement=panic",
    "log_parameter_max_length_on_error=0",
];

/// The folder of the sockets, which goes with the server.
#[derive(Debug)]
struct Sockets(PathBuf);

impl Drop for Sockets {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One PostgreSQL server.
#[derive(Debug)]
pub struct Postgres {
    /// Its process.
    pub process: Process,
    initdb: Process,
    ready: PathBuf,
    data: PathBuf,
    sockets: Sockets,
    port: u16,
    user: Option<User>,
    passwords: Vec<(&'static str, PathBuf)>,
}

impl Postgres {
    /// Makes its folders and passwords.
    ///
    /// The data is in the state folder; when root starts this, and the server's own user could not reach it
    /// there, in `/var/lib/dermflow-<hash>`.
    ///
    /// # Errors
    /// When a folder cannot be made or belongs to another, or the server's own user cannot reach its programs.
    pub fn prepare(state: &State, bin: &Path) -> Result<Self> {
        let user = unprivileged::user()?;
        if user.is_some() && !unprivileged::reachable(bin) {
            bail!("started by root, PostgreSQL runs as `nobody`, who cannot reach {}", bin.display());
        }
        let home = home(state);
        unprivileged::folder(&home, None, if user.is_some() { 0o711 } else { 0o700 })?;
        let sockets = Sockets(sockets(state));
        unprivileged::folder(&sockets.0, user, 0o700)?;
        let mut passwords = Vec::new();
        for role in [SUPERUSER, ROLES[0].0, ROLES[1].0] {
            passwords.push((role, state.password(role)?));
        }
        let (data, log) = (home.join("data"), state.log("postgres")?);
        let initdb = Process::new("initdb", bin.join("initdb"), &log)
            .args(["--username", SUPERUSER, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"])
            .arg("--pwfile")
            .arg(sockets.0.join("password"))
            .arg("--pgdata")
            .arg(&data)
            .user(user);
        let process = server("postgres", bin, &data, &sockets, log).user(user);
        let ready = state.path("postgres.ready");
        Ok(Self { process, initdb, ready, data, sockets, port: PORT, user, passwords })
    }

    /// A second server with a copy of this one, which runs. Once started with [`Postgres::follow`] it repeats every
    /// transaction until it is promoted.
    ///
    /// # Errors
    /// When the copy cannot be made.
    pub async fn standby(&self, state: &State, bin: &Path) -> Result<Self> {
        let data = self.data.with_file_name("data-standby");
        let sockets = Sockets(sockets(state).with_extension("standby"));
        unprivileged::folder(&data, self.user, 0o700)?;
        unprivileged::folder(&sockets.0, self.user, 0o700)?;
        let log = state.log("postgres-standby")?;
        let mut copy = Process::new("pg_basebackup", bin.join("pg_basebackup"), &log)
            .args(["--write-recovery-conf", "--checkpoint=fast", "--username", SUPERUSER, "--host"])
            .arg(self.sockets.0.clone())
            .arg("--pgdata")
            .arg(&data)
            .user(self.user);
        copy.set_env("PGPASSWORD", &read(self.password_file(SUPERUSER)?)?);
        copy.spawn()?;
        if !copy.wait(READY_WITHIN).await?.success() {
            bail!("pg_basebackup failed: {}", copy.last_line());
        }
        let process = server("postgres-standby", bin, &data, &sockets, log).user(self.user);
        let initdb = Process::new("initdb", bin.join("initdb"), state.log("postgres-standby")?);
        let (ready, user, passwords) = (self.ready.clone(), self.user, self.passwords.clone());
        Ok(Self { process, initdb, ready, data, sockets, port: PORT, user, passwords })
    }

    /// Starts a standby and waits until it can be read.
    ///
    /// # Errors
    /// When it ends at its start, or does not answer in time.
    pub async fn follow(&mut self) -> Result<()> {
        self.process.spawn()?;
        let deadline = Instant::now() + READY_WITHIN;
        while self.connect(SUPERUSER).await.is_err() {
            self.process.still_starting(deadline)?;
            sleep(TICK).await;
        }
        Ok(())
    }

    /// Erases what [`Postgres::prepare`] and the server made outside of the state folder.
    ///
    /// # Errors
    /// When something cannot be erased.
    pub fn erase(state: &State) -> Result<()> {
        for folder in [home(state), sockets(state)] {
            if folder.exists() {
                fs::remove_dir_all(&folder).with_context(|| format!("cannot erase {}", folder.display()))?;
            }
        }
        Ok(())
    }

    /// Lets it take connections at a port of 127.0.0.1 as well, from its next start on, with TLS if there is a
    /// certificate: then its programs must be of a build with TLS.
    ///
    /// # Errors
    /// When no port is free, or the certificate cannot be handed over.
    pub fn listen(&mut self, identity: Option<&Identity>) -> Result<()> {
        self.port = ports::free()?;
        // The port is also in the name of the socket.
        let mut settings = vec!["listen_addresses=127.0.0.1".into(), format!("port={}", self.port)];
        if let Some(Identity { cert, key }) = identity {
            settings.push("ssl=on".into());
            for (setting, file) in [("ssl_cert_file", cert), ("ssl_key_file", key)] {
                // Its own user reads it there, and nobody else.
                let own = self.data.with_file_name(setting);
                write_private(&own, &read(file)?)?;
                if let Some(user) = self.user {
                    chown(&own, Some(user.uid), Some(user.gid))
                        .context("cannot hand over the certificate")?;
                }
                settings.push(format!("{setting}={}", own.display()));
            }
        }
        for setting in settings {
            self.process.add_args(["-c".into(), setting]);
        }
        Ok(())
    }

    /// Starts it, makes the database and its roles when they are missing, and returns once they can be used.
    ///
    /// # Errors
    /// When it runs already, ends at its start, or does not answer in time.
    pub async fn start(&mut self) -> Result<()> {
        if !self.ready.exists() {
            self.create().await.context("cannot create the database")?;
        }
        let begun = Instant::now();
        let deadline = begun + READY_WITHIN;
        self.forget_dead_owner();
        self.process.spawn()?;
        let client = loop {
            match self.connect_to(SUPERUSER, SUPERUSER).await {
                Ok(client) => break client,
                // The children of a server that was just killed hold its memory for a moment longer, and write into
                // the same log.
                Err(_) if self.process.exited().is_some() && Instant::now() < begun + HANDOVER => {
                    self.process.spawn()?;
                }
                Err(_) => self.process.still_starting(deadline)?,
            }
            sleep(TICK).await;
        };
        self.set_up(&client).await.context("cannot set up the database")
    }

    /// Kills it (SIGKILL) when it runs, and starts it again.
    ///
    /// # Errors
    /// As [`Postgres::start`].
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill().await;
        self.start().await
    }

    /// Stops it in order; open connections are closed.
    ///
    /// # Errors
    /// When it had to be killed.
    pub async fn stop(&mut self) -> Result<()> {
        self.process.stop(Signal::INT, STOP_WITHIN).await
    }

    /// Connection string for a role, without its password.
    pub fn url(&self, role: &str) -> String {
        self.url_at(&self.sockets.0.display().to_string(), role)
    }

    /// The same through sockets in another folder, or in several with commas between them; or `localhost` after
    /// [`Postgres::listen`].
    pub fn url_at(&self, sockets: &str, role: &str) -> String {
        format!("host={sockets} port={} dbname={DATABASE} user={role}", self.port)
    }

    /// The folder of its socket.
    pub fn sockets(&self) -> &Path {
        &self.sockets.0
    }

    /// The file with a role's password.
    ///
    /// # Errors
    /// When there is no such role.
    pub fn password_file(&self, role: &str) -> Result<&Path> {
        let found = self.passwords.iter().find(|(name, _)| *name == role);
        found.map(|(_, file)| file.as_path()).with_context(|| format!("PostgreSQL has no role {role}"))
    }

    /// The folder with what it has stored.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Connects to [`DATABASE`] as [`SUPERUSER`] or one of [`ROLES`].
    ///
    /// # Errors
    /// When it does not run, or refuses.
    pub async fn connect(&self, role: &str) -> Result<Client> {
        self.connect_to(role, DATABASE).await
    }

    async fn connect_to(&self, role: &str, database: &str) -> Result<Client> {
        let (client, connection) = Config::new()
            .host_path(&self.sockets.0)
            .port(self.port)
            .user(role)
            .password(read(self.password_file(role)?)?)
            .dbname(database)
            .connect_timeout(Duration::from_secs(5))
            .connect(NoTls)
            .await
            .context("cannot connect to PostgreSQL")?;
        tokio::spawn(connection);
        Ok(client)
    }

    async fn create(&mut self) -> Result<()> {
        if self.data.exists() {
            fs::remove_dir_all(&self.data).context("cannot erase a database that was never finished")?;
        }
        unprivileged::folder(&self.data, self.user, 0o700)?;
        let password = self.sockets.0.join("password");
        write_private(&password, &read(self.password_file(SUPERUSER)?)?)?;
        if let Some(user) = self.user {
            chown(&password, Some(user.uid), Some(user.gid)).context("cannot hand over the password")?;
        }
        self.initdb.spawn()?;
        let outcome = self.initdb.wait(READY_WITHIN).await;
        fs::remove_file(&password).context("cannot remove the password's copy")?;
        if !outcome?.success() {
            bail!("initdb failed: {}", self.initdb.last_line());
        }
        write_private(&self.ready, "")
    }

    /// Removes the lock files of a server that is gone. PostgreSQL does so itself unless another process has got
    /// the old one's id, as happens after a reboot or in a new container.
    fn forget_dead_owner(&self) {
        let file = self.data.join("postmaster.pid");
        let Ok(text) = fs::read_to_string(&file) else { return };
        let pid = text.lines().next().unwrap_or_default();
        let owner = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if Path::new("/proc/self").exists()
            && !String::from_utf8_lossy(&owner).contains(&*self.data.to_string_lossy())
        {
            let _ = fs::remove_file(file);
            let _ = fs::remove_file(self.sockets.0.join(format!(".s.PGSQL.{}.lock", self.port)));
        }
    }

    async fn set_up(&self, admin: &Client) -> Result<()> {
        for (role, _) in ROLES {
            if admin.query_opt("SELECT FROM pg_roles WHERE rolname = $1", &[&role]).await?.is_none() {
                // Of letters, digits, - and _ only: it needs no quoting.
                let password = read(self.password_file(role)?)?;
                admin.batch_execute(&format!("CREATE ROLE {role} LOGIN PASSWORD '{password}'")).await?;
            }
        }
        if admin.query_opt("SELECT FROM pg_database WHERE datname = $1", &[&DATABASE]).await?.is_none() {
            admin.batch_execute(&format!("CREATE DATABASE {DATABASE}")).await?;
        }
        let database = self.connect(SUPERUSER).await?;
        database
            .batch_execute(&format!(
                "REVOKE ALL ON SCHEMA public FROM PUBLIC; REVOKE ALL ON DATABASE {DATABASE} FROM PUBLIC"
            ))
            .await?;
        for (role, schema) in ROLES {
            database
                .batch_execute(&format!(
                    "GRANT CONNECT ON DATABASE {DATABASE} TO {role};
                     SET client_min_messages = warning;
                     CREATE SCHEMA IF NOT EXISTS {schema} AUTHORIZATION {role};
                     ALTER ROLE {role} SET search_path = {schema}"
                ))
                .await?;
        }
        Ok(())
    }
}

fn server(name: &str, bin: &Path, data: &Path, sockets: &Sockets, log: PathBuf) -> Process {
    let mut process = Process::new(name, bin.join("postgres"), log).arg("-D").arg(data);
    for setting in SETTINGS {
        process = process.args(["-c", setting]);
    }
    process.arg("-c").arg(format!("unix_socket_directories={}", sockets.0.display()))
}

fn home(state: &State) -> PathBuf {
    unprivileged::home(state.path("postgres"), &state.hash())
}

/// In the folder for temporary files because the path of a socket must be shorter than 108 bytes.
fn sockets(state: &State) -> PathBuf {
    std::env::temp_dir().join(format!("dermflow-{}", state.hash()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        servers::{Given, Servers},
        stack::repo,
    };

    async fn prepare(state: &State) -> Postgres {
        let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await.unwrap();
        Postgres::prepare(state, &servers.postgres_bin).unwrap()
    }

    async fn exercise(dir: &Path) {
        let state = State::open(dir).unwrap();
        let mut postgres = prepare(&state).await;
        postgres.start().await.unwrap();
        let ingress = postgres.connect("dermflow_ingress").await.unwrap();
        ingress.batch_execute("CREATE TABLE kept (id int); INSERT INTO kept VALUES (1)").await.unwrap();
        let schema = "SELECT schemaname FROM pg_tables WHERE tablename = 'kept'";
        assert_eq!(ingress.query_one(schema, &[]).await.unwrap().get::<_, String>(0), "ingress");
        for forbidden in ["CREATE TABLE auth.x (id int)", "CREATE TABLE public.x (id int)", "CREATE ROLE x"] {
            assert!(ingress.batch_execute(forbidden).await.is_err(), "{forbidden}");
        }
        let auth = postgres.connect("dermflow_auth").await.unwrap();
        assert!(auth.query_one("SELECT id FROM ingress.kept", &[]).await.is_err());
        let wrong: Config = postgres.url("dermflow_ingress").parse().unwrap();
        assert!(wrong.clone().password("wrong").connect(NoTls).await.is_err());
        assert!(wrong.connect(NoTls).await.is_err());

        postgres.restart().await.unwrap();
        let ingress = postgres.connect("dermflow_ingress").await.unwrap();
        assert!(ingress.query_one("SELECT id FROM kept", &[]).await.is_ok());
        postgres.stop().await.unwrap();

        // After a reboot another process may have the old one's id.
        fs::write(postgres.data.join("postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        drop(postgres);
        let mut postgres = prepare(&state).await;
        postgres.start().await.unwrap();
        postgres.connect("dermflow_auth").await.unwrap();
        postgres.stop().await.unwrap();
        Postgres::erase(&state).unwrap();
        fs::remove_dir_all(state.path("")).unwrap();
    }

    fn folder() -> PathBuf {
        std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()))
    }

    #[tokio::test]
    async fn roles_keep_to_their_schemas_and_data_survives_a_kill() {
        exercise(&folder()).await;
    }

    /// As when the repository is under /root.
    #[tokio::test]
    async fn a_state_below_a_closed_folder_works_too() {
        let closed = folder();
        unprivileged::folder(&closed, None, 0o700).unwrap();
        exercise(&closed.join("state")).await;
        fs::remove_dir(closed).unwrap();
    }
}
