//! One whole system for one test: servers, ingress, workers, a registered client, and the means to break it.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use async_nats::jetstream::{self, Context};
use base64::{Engine, engine::general_purpose::STANDARD};
use deadpool_postgres::Pool;
use dermflow_auth::db::DatabaseOptions;
use dermflow_local::{
    nats::{ADMIN, Nats, Settings},
    pki::{self, Identity, Pki},
    ports,
    postgres::{Postgres, SUPERUSER},
    process::{Process, Signal},
    servers::{Given, Servers, tls_postgres},
    stack::{Options, Ports, READY_WITHIN, STOP_WITHIN, Stack, programs, repo},
    state::State,
};
use dermflow_schemas::{image::ImageBytes, queue};
use rustls::{
    ClientConfig, RootCertStore, SupportedProtocolVersion,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde_json::{Value, json};
use tokio_postgres::Row;

use crate::{
    chaos::Proxy,
    client::Client,
    cluster::{Cluster, in_step, leader},
    secrets,
    wait::eventually,
};

/// A worker to start.
#[derive(Debug, Clone)]
pub struct Worker {
    model: Model,
    timeout: Option<u32>,
    allow_simulated: bool,
    args: Vec<String>,
}

#[derive(Debug, Clone)]
enum Model {
    Folder(PathBuf),
    Simulated { latency_ms: u64, fault: Option<&'static str>, attempts: Option<u32>, image: Option<String> },
}

impl Worker {
    fn new(model: Model, allow_simulated: bool) -> Self {
        Self { model, timeout: None, allow_simulated, args: Vec::new() }
    }

    /// The default model.
    pub fn derm7() -> Self {
        Self::model(&repo().join("workers/models/derm7"))
    }

    /// The model of a folder.
    pub fn model(folder: &Path) -> Self {
        Self::new(Model::Folder(folder.into()), false)
    }

    /// Several models, as `--model` takes them; simulated ones may be among them.
    pub fn models(offers: &[String]) -> Self {
        let worker = Self { allow_simulated: true, ..Self::derm7() };
        offers.iter().fold(worker, |worker, offer| worker.arg("--model", offer))
    }

    /// A real model of another kind.
    pub fn tiny() -> Self {
        Self::model(&repo().join("tests/models/tiny"))
    }

    /// A model that takes `latency_ms` and knows nothing.
    pub fn simulated(latency_ms: u64) -> Self {
        Self::new(Model::Simulated { latency_ms, fault: None, attempts: None, image: None }, true)
    }

    /// A simulated model that does `fault` instead: `panic`, `hang`, `nan` or `abort`.
    #[must_use]
    pub fn fault(mut self, name: &'static str) -> Self {
        if let Model::Simulated { fault, .. } = &mut self.model {
            *fault = Some(name);
        }
        self
    }

    /// The fault happens on the first `n` attempts only.
    #[must_use]
    pub fn attempts(mut self, n: u32) -> Self {
        if let Model::Simulated { attempts, .. } = &mut self.model {
            *attempts = Some(n);
        }
        self
    }

    /// The fault happens with the image of this file only.
    #[must_use]
    pub fn on(mut self, file: &[u8]) -> Self {
        if let Model::Simulated { image, .. } = &mut self.model {
            *image = Some(ImageBytes::from(file.to_vec()).sha256());
        }
        self
    }

    /// Seconds for one attempt.
    #[must_use]
    pub fn timeout(mut self, seconds: u32) -> Self {
        self.timeout = Some(seconds);
        self
    }

    /// Without `--allow-simulated`.
    #[must_use]
    pub fn forbidden(mut self) -> Self {
        self.allow_simulated = false;
        self
    }

    /// With `--decode-in-process`.
    #[must_use]
    pub fn decoding_in_process(mut self) -> Self {
        self.args.push("--decode-in-process".to_owned());
        self
    }

    /// A further flag, instead of the usual one of that name.
    #[must_use]
    pub fn arg(mut self, flag: &str, value: &str) -> Self {
        self.args.extend([flag.to_owned(), value.to_owned()]);
        self
    }

    fn flags(&self, state: &State, number: usize) -> Result<Vec<String>> {
        let mut flags: Vec<_> = ["--executors", "1", "--reserved-executors", "0"].map(str::to_owned).into();
        if !self.args.contains(&"--model".to_owned()) {
            let folder = match &self.model {
                Model::Folder(folder) => folder.clone(),
                Model::Simulated { latency_ms, fault, attempts, image } => {
                    let folder = state.folder(&format!("model-{number}"))?;
                    let toml = simulated_toml(*latency_ms, *fault, *attempts, image.as_deref());
                    fs::write(folder.join("model.toml"), toml)?;
                    folder
                }
            };
            flags.extend(["--model".to_owned(), folder.display().to_string()]);
        }
        if self.allow_simulated {
            flags.push("--allow-simulated".to_owned());
        }
        if let Some(seconds) = self.timeout {
            flags.extend(["--job-timeout".to_owned(), seconds.to_string()]);
        }
        flags.extend(self.args.iter().cloned());
        Ok(flags)
    }
}

fn simulated_toml(
    latency_ms: u64,
    fault: Option<&str>,
    attempts: Option<u32>,
    image: Option<&str>,
) -> String {
    let fault = fault.map(|fault| format!("fault = \"{fault}\"\n")).unwrap_or_default();
    let attempts = attempts.map(|attempts| format!("fault_attempts = {attempts}\n")).unwrap_or_default();
    let image = image.map(|image| format!("fault_image = \"{image}\"\n")).unwrap_or_default();
    let class = |code| format!("[[class]]\ncode = \"{code}\"\ndisplay = \"Class {code}\"\n");
    let classes: String = ["mel", "nv", "bkl"].map(class).concat();
    format!(
        "name = \"simulated\"\nversion = \"1\"\ntitle = \"Simulated model\"\nlicence = \"Apache-2.0\"\n\
         [simulated]\nlatency_ms = {latency_ms}\n{fault}{attempts}{image}{classes}\
         [[indicator]]\nid = \"malignancy\"\ncode = \"malignancy-suspicion\"\ndisplay = \"Suspicion of malignancy\"\n\
         classes = [\"mel\"]\nthreshold = 0.5\nreferral = true\n"
    )
}

/// PostgreSQL logs every change with its parameters: what our programs tell it is looked through as well.
const LOG_STATEMENTS: [&str; 3] = [
    "ALTER SYSTEM SET log_statement = 'mod'",
    "ALTER SYSTEM SET log_parameter_max_length = 1024",
    "SELECT pg_reload_conf()",
];

fn log_more(process: &mut Process, log: Option<&str>) {
    if let Some(log) = log {
        process.set_env("RUST_LOG", log);
    }
}

/// What a system consists of.
#[expect(clippy::struct_excessive_bools, reason = "each is something that a test may want besides")]
#[derive(Debug, Clone)]
pub struct Setup {
    /// Ingress processes.
    pub replicas: usize,
    /// Worker processes.
    pub workers: Vec<Worker>,
    /// Seconds until the broker hands a silent worker's job to another.
    pub ack_wait: u64,
    /// `RUST_LOG` of our programs, beside which PostgreSQL logs statements, too. `None`: all log as they do in service.
    pub log: Option<&'static str>,
    /// JetStream's `sync_interval`.
    pub sync_interval: &'static str,
    /// Servers of the broker; each message is on all of them.
    pub brokers: usize,
    /// Whether the broker takes connections without TLS as well.
    pub plain_broker: bool,
    /// Whether a proxy is on each link of [`Link`].
    pub proxies: bool,
    /// Whether ingress reaches PostgreSQL over TLS, at a port of this machine.
    pub database_tls: bool,
    /// Whether a second PostgreSQL follows the first one, which waits for it at every commit.
    pub standby: bool,
    /// The identity providers whose tokens ingress takes, `--providers`.
    pub providers: Option<PathBuf>,
}

/// A link that can have a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Between ingress and broker.
    IngressBroker,
    /// Between workers and broker.
    WorkerBroker,
    /// Between ingress and PostgreSQL.
    IngressDatabase,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            replicas: 1,
            workers: Vec::new(),
            ack_wait: 30,
            log: Some("debug"),
            sync_interval: "always",
            brokers: 1,
            plain_broker: false,
            proxies: false,
            database_tls: false,
            standby: false,
            providers: None,
        }
    }
}

impl Setup {
    /// One ingress and one worker with the default model.
    pub fn derm7() -> Self {
        Self { workers: vec![Worker::derm7()], ..Self::default() }
    }

    /// One ingress and one worker with a simulated model.
    pub fn simulated(latency_ms: u64) -> Self {
        Self { workers: vec![Worker::simulated(latency_ms)], ..Self::default() }
    }

    /// One ingress, and nobody to work.
    pub fn without_workers() -> Self {
        Self::default()
    }
}

/// A running system. Dropping it kills every process.
#[derive(Debug)]
pub struct Lab {
    stack: Stack,
    client: Client,
    sql: tokio_postgres::Client,
    log: Option<&'static str>,
    cluster: Cluster,
    proxies: Vec<Proxy>,
    standby: Option<Postgres>,
}

impl Lab {
    /// Starts a system in a folder of its own and registers the client `demo`.
    ///
    /// # Errors
    /// When a part does not become ready.
    pub async fn start(setup: Setup) -> Result<Self> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let say = |step: &str| println!("{step}");
        let mut servers = Servers::obtain(repo(), &Given::default(), say).await?;
        if setup.database_tls {
            servers.postgres_bin = tls_postgres(repo(), say).await?;
        }
        let mut cluster = Cluster::plan(setup.brokers).await?;
        let member = cluster.member(0);
        let (sync_interval, plain) = (setup.sync_interval.into(), setup.plain_broker);
        let nats = Settings { sync_interval, plain, member, ..Settings::default() };
        let models = vec![repo().join("workers/models/derm7").display().to_string()];
        let (nats_server, postgres_bin) = (servers.nats_server.clone(), servers.postgres_bin.clone());
        let options = Options { servers, programs: programs()?, models, nats: nats.clone() };
        let dir = std::env::temp_dir().join(format!("dermflow-lab-{}", uuid::Uuid::new_v4().simple()));
        let mut stack = Stack::prepare(State::open(&dir)?, options)?;
        if setup.database_tls {
            let identity = pki::server(&stack.state, "database", &["localhost"])?;
            stack.postgres.listen(Some(&identity))?;
            stack.detours.database = Some("localhost".into());
        }
        cluster.prepare(&stack, &nats_server, &nats)?;
        tokio::try_join!(stack.start_servers(), cluster.start())?;
        if setup.brokers > 1 {
            cluster.until_placed(&stack.nats).await?;
            let urls: Vec<String> = [&stack.nats].into_iter().chain(cluster.peers()).map(Nats::url).collect();
            stack.detours.ingress_broker = Some(urls.join(","));
            stack.detours.worker_broker = Some(urls.join(","));
        }
        let proxies = if setup.proxies { add_proxies(&mut stack).await? } else { Vec::new() };
        let standby = if setup.standby { Some(add_standby(&mut stack, &postgres_bin).await?) } else { None };
        let (ack_wait, brokers) = (setup.ack_wait.to_string(), setup.brokers.to_string());
        let mut flags = vec!["--ack-wait", &ack_wait, "--replicas", &brokers];
        let providers = setup.providers.map(|path| path.display().to_string());
        flags.extend(providers.iter().flat_map(|path| ["--providers", path]));
        let ca = stack.pki.ca.display().to_string();
        if setup.database_tls {
            flags.extend(["--database-ca", &ca]);
        }
        for _ in 0..setup.replicas {
            let ingress = stack.add_ingress(Ports::free()?, &flags)?;
            log_more(&mut ingress.process, setup.log);
            ingress.process.spawn_ready(READY_WITHIN).await?;
        }
        let sql = stack.postgres.connect(SUPERUSER).await?;
        for setting in LOG_STATEMENTS.iter().filter(|_| setup.log.is_some()) {
            sql.batch_execute(setting).await?;
        }
        let client = register(&stack, "demo").await?;
        let mut lab = Self { stack, client, sql, log: setup.log, cluster, proxies, standby };
        for worker in setup.workers {
            lab.start_worker(worker).await?;
        }
        Ok(lab)
    }

    /// A system that logs what it does in service, which is little, to be measured.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub async fn in_service(setup: Setup) -> Result<Self> {
        Box::pin(Self::start(Setup { log: None, ..setup })).await
    }

    /// Stops everything in order, looks through all logs, and removes the folder.
    ///
    /// # Errors
    /// When something had to be killed, or a log holds what none may; then the folder stays.
    pub async fn stop(mut self) -> Result<()> {
        let dir = self.stack.state.path("");
        let mut outcome = self.stack.stop().await;
        outcome = outcome.and(self.cluster.stop().await);
        if let Some(standby) = &mut self.standby {
            outcome = outcome.and(standby.stop().await);
        }
        drop(self);
        secrets::look(&dir)?;
        fs::remove_dir_all(dir)?;
        outcome
    }

    /// The client `demo`, signed in at the first replica.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Registers another client and signs it in.
    ///
    /// # Errors
    /// When the name is taken.
    pub async fn register(&self, name: &str) -> Result<Client> {
        register(&self.stack, name).await
    }

    /// Runs the `auth` command.
    ///
    /// # Errors
    /// When it fails.
    pub fn auth(&self, args: &[&str]) -> Result<String> {
        self.stack.auth(args)
    }

    /// The `auth` command, to be run.
    ///
    /// # Errors
    /// When there is no database for it.
    pub fn auth_command(&self) -> Result<Command> {
        self.stack.auth_command()
    }

    /// Starts the operators' process, registers an operator, and gives its client, signed in, at that process.
    ///
    /// # Errors
    /// When the process does not become ready, or the name is taken.
    pub async fn start_operate(&mut self, name: &str) -> Result<Client> {
        self.start_operate_with(name, &[]).await
    }

    /// The same with further flags.
    ///
    /// # Errors
    /// When the process does not become ready, or the name is taken.
    pub async fn start_operate_with(&mut self, name: &str, flags: &[&str]) -> Result<Client> {
        let url = self.stack.add_operate(ports::free()?, flags)?.url();
        self.restart_operate().await?;
        Ok(self.register_operator(name).await?.at(&url))
    }

    /// Registers an operator and signs it in, at the first replica.
    ///
    /// # Errors
    /// When the name is taken.
    pub async fn register_operator(&self, name: &str) -> Result<Client> {
        let password = self.auth(&["user", "create", name, "--role", "operator"])?;
        fs::write(self.stack.state.path(&format!("client-{name}")), &password)?;
        Client::new(&self.ca(), &self.url(0))?.login(name, &password).await
    }

    /// The origin of the operators' process.
    ///
    /// # Errors
    /// When it was never started.
    pub fn operate_url(&self) -> Result<String> {
        Ok(self.stack.operate.as_ref().context("no operators' process")?.url())
    }

    /// Starts the operators' process again.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart_operate(&mut self) -> Result<()> {
        let operate = self.stack.operate.as_mut().context("no operators' process")?;
        log_more(&mut operate.process, self.log);
        operate.process.spawn_ready(READY_WITHIN).await
    }

    /// SIGKILL for the operators' process.
    ///
    /// # Errors
    /// When it was never started.
    pub async fn kill_operate(&mut self) -> Result<()> {
        self.stack.operate.as_mut().context("no operators' process")?.process.kill().await;
        Ok(())
    }

    /// Starts the registration service.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_registration(&mut self) -> Result<()> {
        let registration = self.stack.add_registration(ports::free()?, ports::free()?)?;
        log_more(&mut registration.process, self.log);
        registration.process.spawn_ready(READY_WITHIN).await
    }

    /// A client of the registration service with a certificate of staff of this name, not signed in.
    ///
    /// # Errors
    /// When the service was never started.
    pub fn staff(&self, name: &str) -> Result<Client> {
        let Identity { cert, key } = pki::staff(&self.stack.state, name)?;
        Client::with_certificate(&self.ca(), &self.registration_url()?, &cert, &key)
    }

    /// The origin of the registration service.
    ///
    /// # Errors
    /// When it was never started.
    pub fn registration_url(&self) -> Result<String> {
        Ok(self.stack.registration.as_ref().context("no registration service")?.url())
    }

    /// The origin of its health and metrics.
    ///
    /// # Errors
    /// When it was never started.
    pub fn registration_internal_url(&self) -> Result<String> {
        Ok(self.stack.registration.as_ref().context("no registration service")?.internal_url())
    }

    /// The password of a registered client.
    ///
    /// # Errors
    /// When there is none.
    pub fn password(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.stack.state.path(&format!("client-{name}"))).context("no such client")
    }

    /// The origin of replica `n`.
    pub fn url(&self, n: usize) -> String {
        self.stack.ingress[n].url()
    }

    /// The origin of health and metrics of replica `n`.
    pub fn internal_url(&self, n: usize) -> String {
        self.stack.ingress[n].internal_url()
    }

    /// A folder for what a test needs besides.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        self.stack.state.folder(name)
    }

    /// Where replica `n` speaks TLS.
    pub fn address(&self, n: usize) -> SocketAddr {
        ([127, 0, 0, 1], self.stack.ingress[n].ports.https).into()
    }

    /// Where the first replica speaks plain HTTP.
    pub fn plain_address(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.stack.ingress[0].ports.plain).into()
    }

    /// The CA's certificate.
    pub fn ca(&self) -> PathBuf {
        self.stack.pki.ca.clone()
    }

    /// The folder of the keys that sign access tokens.
    pub fn signing_keys(&self) -> PathBuf {
        self.stack.pki.signing_keys.clone()
    }

    /// The keys and certificates.
    pub fn pki(&self) -> &Pki {
        &self.stack.pki
    }

    /// Puts a new server certificate in the place of the one that is served.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn renew_certificate(&self) -> Result<()> {
        Pki::prepare(&self.stack.state).map(drop)
    }

    /// A TLS client that speaks these versions only.
    ///
    /// # Errors
    /// When the CA cannot be read.
    pub fn tls(&self, versions: &[&'static SupportedProtocolVersion]) -> Result<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.ca())?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions)?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }

    /// Runs SQL as the superuser.
    ///
    /// # Errors
    /// When it fails.
    pub async fn sql(&self, statement: &str) -> Result<Vec<Row>> {
        Ok(self.sql.query(statement, &[]).await?)
    }

    /// What one of our programs is told of the database: through its socket.
    ///
    /// # Errors
    /// When there is no such role.
    pub fn database(&self, role: &str) -> Result<DatabaseOptions> {
        let postgres = &self.stack.postgres;
        Ok(DatabaseOptions {
            database: postgres.url(role),
            database_password_file: postgres.password_file(role)?.to_owned(),
            database_ca: None,
        })
    }

    /// The same over the network, see [`Setup::database_tls`].
    ///
    /// # Errors
    /// When there is no such role.
    pub fn database_over_tls(&self, role: &str) -> Result<DatabaseOptions> {
        let (database, ca) = (self.stack.postgres.url_at("localhost", role), self.ca());
        Ok(DatabaseOptions { database, database_ca: Some(ca), ..self.database(role)? })
    }

    /// Connections to the database, as one of our programs has them.
    ///
    /// # Errors
    /// When there is no such role.
    pub fn pool(&self, role: &str) -> Result<Pool> {
        Ok(self.database(role)?.pool("ingress", 4)?)
    }

    /// The one number that a query gives; 0 when it gives no row, or NULL.
    ///
    /// # Errors
    /// When it fails.
    pub async fn count(&self, query: &str) -> Result<i64> {
        Ok(self.sql(query).await?.first().and_then(|row| row.get(0)).unwrap_or(0))
    }

    /// Waits until the record says that `job` is in `state`.
    ///
    /// # Errors
    /// When it does not within 30 s.
    pub async fn until_state(&self, job: &str, state: &str) -> Result<()> {
        let query = format!("SELECT count(*) FROM ingress.jobs WHERE id = '{job}' AND state = '{state}'");
        let reached = async || (self.count(&query).await.ok()? == 1).then_some(());
        eventually(&format!("{job} is {state}"), Duration::from_secs(30), reached).await
    }

    /// JetStream with all permissions.
    ///
    /// # Errors
    /// When the broker is away.
    pub async fn jetstream(&self) -> Result<Context> {
        Ok(jetstream::new(self.broker().await?))
    }

    /// A connection to the broker with all permissions; in a cluster, to the first server that runs.
    ///
    /// # Errors
    /// When the broker is away.
    pub async fn broker(&self) -> Result<async_nats::Client> {
        let mut outcome = self.stack.nats.connect(ADMIN.user).await;
        for peer in self.cluster.peers() {
            if outcome.is_err() {
                outcome = peer.connect(ADMIN.user).await;
            }
        }
        outcome
    }

    /// The file with the password of a user of the broker.
    ///
    /// # Errors
    /// When there is no such user.
    pub fn broker_password(&self, user: &str) -> Result<&Path> {
        self.stack.nats.password_file(user)
    }

    /// The proxy on a link.
    ///
    /// # Panics
    /// When the system was set up without proxies.
    pub fn link(&self, link: Link) -> &Proxy {
        &self.proxies[link as usize]
    }

    /// The brokers' cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Server `n` of the brokers' cluster.
    pub fn node(&mut self, n: usize) -> &mut Nats {
        if n == 0 { &mut self.stack.nats } else { &mut self.cluster.peers_mut()[n - 1] }
    }

    /// The server of the brokers' cluster that leads the stream of jobs, asking every server but `except`.
    ///
    /// # Errors
    /// When there is none within 30 s.
    pub async fn leader(&self, except: Option<usize>) -> Result<usize> {
        let nodes: Vec<&Nats> = [&self.stack.nats].into_iter().chain(self.cluster.peers()).collect();
        let find = async || {
            for (n, node) in nodes.iter().enumerate().filter(|(n, _)| Some(*n) != except) {
                if let Ok(Ok(leader)) = tokio::time::timeout(Duration::from_secs(2), leader(node)).await {
                    println!("server {n} says that {leader} leads");
                    return Some(leader);
                }
            }
            None
        };
        eventually("somebody leads the stream of jobs", Duration::from_secs(30), find).await
    }

    /// Waits until every copy of every stream and consumer is up to date: from then on the brokers' cluster
    /// survives another failure.
    ///
    /// # Errors
    /// When one is not within a minute.
    pub async fn until_in_step(&self) -> Result<()> {
        let begun = std::time::Instant::now();
        let context = self.jetstream().await?;
        let reached = async || in_step(&context).await.ok()?.then_some(());
        eventually("every copy is up to date", Duration::from_mins(1), reached).await?;
        println!("in step after {:?}", begun.elapsed());
        Ok(())
    }

    /// The resident memory of replica `n`, in bytes.
    ///
    /// # Errors
    /// When it does not run, or the system does not tell.
    pub fn ingress_memory(&self, n: usize) -> Result<u64> {
        let pid = self.stack.ingress[n].process.id().context("it does not run")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
    }

    /// Starts a further ingress, as the last replica, with further flags.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn start_ingress(&mut self, ports: Ports, flags: &[&str]) -> Result<()> {
        let ingress = self.stack.add_ingress(ports, flags)?;
        log_more(&mut ingress.process, self.log);
        ingress.process.spawn_ready(READY_WITHIN).await
    }

    /// Starts a further ingress, as the last replica, with the clock set wrong by `seconds`; see `clock.c`.
    ///
    /// # Errors
    /// When it does not become ready, or there is no C compiler.
    pub async fn start_ingress_with_clock(&mut self, seconds: i64) -> Result<()> {
        let library = self.stack.state.path("clock.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("faults/clock.c");
        let mut compile = Process::new("cc", "/usr/bin/env", self.stack.state.log("cc")?)
            .args(["cc", "-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(source);
        compile.spawn()?;
        let compiled = compile.wait(READY_WITHIN).await?;
        anyhow::ensure!(compiled.success(), "cc: {}", compile.last_line());
        let ingress = self.stack.add_ingress(Ports::free()?, &[])?;
        ingress.process.set_env("LD_PRELOAD", &library.display().to_string());
        ingress.process.set_env("CLOCK_SHIFT_SECONDS", &seconds.to_string());
        log_more(&mut ingress.process, self.log);
        ingress.process.spawn_ready(READY_WITHIN).await
    }

    /// Messages in a stream.
    ///
    /// # Errors
    /// When the broker is away.
    pub async fn messages(&self, stream: &str) -> Result<u64> {
        Ok(self.jetstream().await?.get_stream(stream).await?.cached_info().state.messages)
    }

    /// Payloads in the object store.
    ///
    /// # Errors
    /// When the broker is away.
    pub async fn object_count(&self) -> Result<usize> {
        use futures_util::StreamExt;
        let bucket = self.jetstream().await?.get_object_store(queue::PAYLOADS).await?;
        Ok(bucket.list().await?.count().await)
    }

    /// A metric of the first replica, by its name, with its labels if it has any.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        self.metric_of(0, name).await
    }

    /// A metric of replica `n`.
    pub async fn metric_of(&self, n: usize, name: &str) -> Option<f64> {
        let client = Client::new(&self.ca(), &self.internal_url(n)).ok()?;
        let text = client.get("/metrics").await.ok()?.text;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    /// Every process with its id; PostgreSQL by its first process only.
    pub fn pids(&self) -> Vec<(String, u32)> {
        let ingress = self.stack.ingress.iter().map(|ingress| &ingress.process);
        let servers = [&self.stack.nats.process, &self.stack.postgres.process];
        let all = ingress.chain(&self.stack.workers).chain(servers);
        all.filter_map(|process| Some((process.name().to_owned(), process.id()?))).collect()
    }

    /// Everything that any process has logged.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub fn logs(&self) -> Result<String> {
        let ingress = self.stack.ingress.iter().map(|ingress| &ingress.process);
        let registration = self.stack.registration.iter().map(|registration| &registration.process);
        let servers = [&self.stack.nats.process, &self.stack.postgres.process];
        let read = |process: &Process| fs::read_to_string(process.log()).context(process.name().to_owned());
        ingress.chain(registration).chain(&self.stack.workers).chain(servers).map(read).collect()
    }

    /// The folder of the logs.
    pub fn log_folder(&self) -> PathBuf {
        self.stack.state.path("log")
    }

    /// The folders in which broker and database keep their data.
    pub fn storage(&self) -> [PathBuf; 2] {
        [self.stack.nats.store().to_owned(), self.stack.postgres.data().to_owned()]
    }

    /// Starts a further worker.
    ///
    /// # Errors
    /// When it does not become ready; the error quotes its last line.
    pub async fn start_worker(&mut self, worker: Worker) -> Result<()> {
        self.start_workers(vec![worker]).await
    }

    /// Starts further workers, all at once.
    ///
    /// # Errors
    /// When one does not become ready; the error quotes its last line.
    pub async fn start_workers(&mut self, workers: Vec<Worker>) -> Result<()> {
        let first = self.stack.workers.len();
        for worker in workers {
            let flags = worker.flags(&self.stack.state, self.stack.workers.len())?;
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            log_more(self.stack.add_worker(&flags)?, self.log);
        }
        let start = self.stack.workers[first..].iter_mut().map(|worker| worker.spawn_ready(READY_WITHIN));
        futures_util::future::try_join_all(start).await?;
        Ok(())
    }

    /// SIGKILL for worker `n`.
    ///
    /// # Errors
    /// Never; like its siblings.
    pub async fn kill_worker(&mut self, n: usize) -> Result<()> {
        self.stack.workers[n].kill().await;
        Ok(())
    }

    /// Starts worker `n` again.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart_worker(&mut self, n: usize) -> Result<()> {
        self.stack.workers[n].spawn_ready(READY_WITHIN).await
    }

    /// SIGTERM for worker `n`.
    ///
    /// # Errors
    /// When it had to be killed in the end.
    pub async fn stop_worker(&mut self, n: usize) -> Result<()> {
        self.stack.workers[n].stop(Signal::TERM, STOP_WITHIN).await
    }

    /// SIGSTOP for worker `n`.
    pub fn pause_worker(&mut self, n: usize) {
        self.stack.workers[n].pause();
    }

    /// SIGCONT for worker `n`.
    pub fn resume_worker(&mut self, n: usize) {
        self.stack.workers[n].resume();
    }

    /// Whether worker `n` runs.
    pub fn worker_is_alive(&mut self, n: usize) -> bool {
        self.stack.workers[n].is_running()
    }

    /// SIGKILL for replica `n`.
    ///
    /// # Errors
    /// Never; like its siblings.
    pub async fn kill_ingress(&mut self, n: usize) -> Result<()> {
        self.stack.ingress[n].process.kill().await;
        Ok(())
    }

    /// Starts replica `n` again.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart_ingress(&mut self, n: usize) -> Result<()> {
        self.stack.ingress[n].process.spawn_ready(READY_WITHIN).await
    }

    /// Starts every replica again, all at once.
    ///
    /// # Errors
    /// When one does not become ready.
    pub async fn restart_every_ingress(&mut self) -> Result<()> {
        let start = self.stack.ingress.iter_mut().map(|ingress| ingress.process.spawn_ready(READY_WITHIN));
        futures_util::future::try_join_all(start).await?;
        Ok(())
    }

    /// SIGTERM for replica `n`.
    ///
    /// # Errors
    /// When it had to be killed in the end.
    pub async fn stop_ingress(&mut self, n: usize) -> Result<()> {
        self.stack.ingress[n].process.stop(Signal::TERM, STOP_WITHIN).await
    }

    /// Where in the broker's files the sealed payload of a job begins that waits in JOBS, from which nothing was removed.
    ///
    /// # Errors
    /// When it does not wait there, or the broker is away.
    pub async fn payload_place(&self, job: &str) -> Result<(PathBuf, usize)> {
        let sequence = format!("SELECT stream_seq FROM ingress.jobs WHERE id = '{job}'");
        self.message_place(queue::JOBS, self.count(&sequence).await?).await
    }

    /// Where in the broker's files the body of a message of a stream begins, from which nothing was removed.
    ///
    /// The files are encrypted without moving a byte. They hold the messages in order, each as 22 bytes, the subject, the
    /// header with four bytes of its length, the body, and 8 bytes of checksum.
    ///
    /// # Errors
    /// When there is no such message, or the broker is away.
    pub async fn message_place(&self, stream: &str, wanted: i64) -> Result<(PathBuf, usize)> {
        let (context, folder) = (self.jetstream().await?, self.stack.nats.store());
        let block = |number: usize| -> Result<(PathBuf, usize)> {
            let path = folder.join(format!("jetstream/$G/streams/{stream}/msgs/{number}.blk"));
            let size = fs::metadata(&path).with_context(|| path.display().to_string())?.len();
            Ok((path, usize::try_from(size)?))
        };
        let (mut number, mut at) = (1, 0);
        for sequence in 1..=wanted {
            let request = json!({ "seq": sequence });
            let found: Value = context.request(format!("STREAM.MSG.GET.{stream}"), &request).await?;
            let bytes = |name: &str| STANDARD.decode(found["message"][name].as_str().unwrap_or_default());
            let subject = found["message"]["subject"].as_str().context("it is gone")?;
            let (header, body) = (bytes("hdrs")?.len(), bytes("data")?.len());
            if at == block(number)?.1 {
                (number, at) = (number + 1, 0);
            }
            let begin = at + 22 + subject.len() + 4 + header;
            if sequence == wanted {
                return Ok((block(number)?.0, begin));
            }
            at = begin + body + 8;
        }
        anyhow::bail!("nothing was ever in {stream}")
    }

    /// SIGKILL for the broker.
    ///
    /// # Errors
    /// Never; like its siblings.
    pub async fn kill_nats(&mut self) -> Result<()> {
        self.stack.nats.process.kill().await;
        Ok(())
    }

    /// SIGTERM for the broker.
    ///
    /// # Errors
    /// When it had to be killed in the end.
    pub async fn stop_nats(&mut self) -> Result<()> {
        self.stack.nats.stop().await
    }

    /// Erases everything that the broker has stored. It must not run.
    ///
    /// # Errors
    /// When something cannot be erased.
    pub fn wipe_nats(&self) -> Result<()> {
        let store = self.stack.nats.store();
        fs::remove_dir_all(store)?;
        Ok(fs::create_dir(store)?)
    }

    /// Starts the broker again.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart_nats(&mut self) -> Result<()> {
        self.stack.nats.start().await
    }

    /// SIGSTOP for the broker.
    pub fn pause_nats(&mut self) {
        self.stack.nats.process.pause();
    }

    /// SIGCONT for the broker.
    pub fn resume_nats(&mut self) {
        self.stack.nats.process.resume();
    }

    /// SIGKILL for PostgreSQL.
    ///
    /// # Errors
    /// Never; like its siblings.
    pub async fn kill_postgres(&mut self) -> Result<()> {
        self.stack.postgres.process.kill().await;
        Ok(())
    }

    /// Promotes the standby, which takes the place of the first PostgreSQL; that one must be dead.
    ///
    /// # Errors
    /// When there is no standby, or it does not take over.
    pub async fn promote_standby(&mut self) -> Result<()> {
        let standby = self.standby.take().context("there is no standby")?;
        let dead = std::mem::replace(&mut self.stack.postgres, standby);
        self.standby = Some(dead);
        self.sql = self.stack.postgres.connect(SUPERUSER).await?;
        let promoted = self.sql.query_one("SELECT pg_promote(wait => true)", &[]).await?;
        anyhow::ensure!(promoted.get::<_, bool>(0), "the standby was not promoted");
        Ok(())
    }

    /// Starts PostgreSQL again.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart_postgres(&mut self) -> Result<()> {
        self.stack.postgres.start().await?;
        self.sql = self.stack.postgres.connect(SUPERUSER).await?;
        Ok(())
    }
}

async fn add_proxies(stack: &mut Stack) -> Result<Vec<Proxy>> {
    let broker = stack.nats.port();
    let folder = stack.state.folder("sockets")?;
    let socket = ".s.PGSQL.5432";
    let proxies = vec![
        Proxy::tcp(broker).await?,
        Proxy::tcp(broker).await?,
        Proxy::unix(&folder.join(socket), &stack.postgres.sockets().join(socket))?,
    ];
    // The certificate is valid for this name.
    let url = |proxy: &Proxy| Some(format!("tls://localhost:{}", proxy.port()));
    stack.detours.ingress_broker = url(&proxies[0]);
    stack.detours.worker_broker = url(&proxies[1]);
    stack.detours.database = Some(folder.display().to_string());
    Ok(proxies)
}

async fn add_standby(stack: &mut Stack, bin: &Path) -> Result<Postgres> {
    let mut standby = stack.postgres.standby(&stack.state, bin).await?;
    standby.follow().await?;
    let primary = stack.postgres.connect(SUPERUSER).await?;
    // What is acknowledged is on both disks.
    primary.batch_execute("ALTER SYSTEM SET synchronous_standby_names = '*'").await?;
    primary.batch_execute("SELECT pg_reload_conf()").await?;
    let query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
    let in_step = async || (primary.query_one(query, &[]).await.ok()?.get::<_, i64>(0) == 1).then_some(());
    eventually("the standby is in step", READY_WITHIN, in_step).await?;
    let sockets = [stack.postgres.sockets(), standby.sockets()].map(|folder| folder.display().to_string());
    stack.detours.database = Some(sockets.join(","));
    Ok(standby)
}

async fn register(stack: &Stack, name: &str) -> Result<Client> {
    let password = stack.auth(&["user", "create", name])?;
    fs::write(stack.state.path(&format!("client-{name}")), &password)?;
    Client::new(&stack.pki.ca, &stack.ingress[0].url())?.login(name, &password).await
}
