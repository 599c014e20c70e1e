//! nats-server with JetStream: TLS, one user per service, every acknowledged message on disk, encrypted.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use async_nats::{Client, ConnectOptions, jetstream};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    pki::Pki,
    ports,
    process::{Process, Signal, TICK},
    state::{State, read, write_private},
    store::Store,
};

const READY_WITHIN: Duration = Duration::from_secs(30);
/// The same when what is stored is encrypted first: 16 GiB at 50 MB/s.
const ENCRYPTED_WITHIN: Duration = Duration::from_mins(6);
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// The subjects that a user may use; everything else is refused.
#[derive(Debug, Clone, Copy)]
pub struct Permissions {
    /// The user's name, also in the prefix of its inbox.
    pub user: &'static str,
    /// Subjects it may publish to.
    pub publish: &'static [&'static str],
    /// Subjects it may subscribe to.
    pub subscribe: &'static [&'static str],
    /// Whether it may answer, once, who has asked on one of these.
    pub answers: bool,
}

/// Ingress makes the streams and consumers, submits jobs, stores large payloads, and drains the results. It
/// cannot read the dead letters.
pub const INGRESS: Permissions = Permissions {
    user: "ingress",
    publish: &[
        "jobs.>",
        "wake.bulk.*",
        "cancel.*",
        "counts",
        "models",
        "models.*",
        "$O.payloads.>",
        "$JS.API.INFO",
        "$JS.API.STREAM.CREATE.JOBS",
        "$JS.API.STREAM.UPDATE.JOBS",
        "$JS.API.STREAM.INFO.JOBS",
        "$JS.API.STREAM.MSG.GET.JOBS",
        "$JS.API.STREAM.MSG.DELETE.JOBS",
        "$JS.API.STREAM.CREATE.RETRIES",
        "$JS.API.STREAM.UPDATE.RETRIES",
        "$JS.API.STREAM.INFO.RETRIES",
        "$JS.API.STREAM.MSG.GET.RETRIES",
        "$JS.API.STREAM.PURGE.RETRIES",
        "$JS.API.STREAM.CREATE.RESULTS",
        "$JS.API.STREAM.UPDATE.RESULTS",
        "$JS.API.STREAM.INFO.RESULTS",
        "$JS.API.STREAM.MSG.GET.RESULTS",
        "$JS.API.STREAM.CREATE.DEAD",
        "$JS.API.STREAM.UPDATE.DEAD",
        "$JS.API.STREAM.INFO.DEAD",
        "$JS.API.STREAM.CREATE.OBJ_payloads",
        "$JS.API.STREAM.INFO.OBJ_payloads",
        "$JS.API.STREAM.PURGE.OBJ_payloads",
        "$JS.API.DIRECT.GET.OBJ_payloads.>",
        "$JS.API.CONSUMER.CREATE.JOBS.>",
        "$JS.API.CONSUMER.NAMES.JOBS",
        "$JS.API.CONSUMER.DELETE.JOBS.bulk",
        "$JS.API.CONSUMER.CREATE.RETRIES.>",
        "$JS.API.CONSUMER.DURABLE.CREATE.RETRIES.>",
        "$JS.API.CONSUMER.CREATE.RESULTS.>",
        "$JS.API.CONSUMER.LIST.*",
        "$JS.API.CONSUMER.INFO.RESULTS.*",
        "$JS.API.CONSUMER.MSG.NEXT.RESULTS.*",
        "$JS.ACK.RESULTS.>",
    ],
    subscribe: &["results.*", "progress.*", "counts", "_INBOX_ingress.>"],
    answers: false,
};

/// A worker pulls jobs, reads large payloads, and publishes what came of a job. It cannot submit one: a retry
/// goes through `retry.*`, from where the broker itself moves it to `due.>`.
pub const WORKER: Permissions = Permissions {
    user: "worker",
    publish: &[
        "results.*",
        "progress.*",
        "retry.*",
        "dead.>",
        "models.*",
        "$JS.API.STREAM.INFO.JOBS",
        "$JS.API.CONSUMER.INFO.JOBS.*",
        "$JS.API.CONSUMER.MSG.NEXT.JOBS.*",
        "$JS.ACK.JOBS.>",
        "$JS.API.STREAM.INFO.RETRIES",
        "$JS.API.CONSUMER.INFO.RETRIES.*",
        "$JS.API.CONSUMER.MSG.NEXT.RETRIES.*",
        "$JS.ACK.RETRIES.>",
        "$JS.API.STREAM.INFO.OBJ_payloads",
        "$JS.API.DIRECT.GET.OBJ_payloads.>",
        "$JS.API.CONSUMER.CREATE.OBJ_payloads",
        "$JS.API.CONSUMER.CREATE.OBJ_payloads.>",
        "$JS.API.CONSUMER.DELETE.OBJ_payloads.>",
        "$JS.FC.OBJ_payloads.>",
    ],
    subscribe: &["wake.bulk.*", "cancel.*", "models", "models.*", "_INBOX_worker.>"],
    answers: true,
};

/// The operators' API reads and removes dead letters, puts them back into the queue, and counts its callers with
/// ingress. It can read nothing else, and it creates nothing.
pub const OPERATOR: Permissions = Permissions {
    user: "operator",
    publish: &["jobs.>", "counts", "$JS.API.STREAM.MSG.GET.DEAD", "$JS.API.STREAM.MSG.DELETE.DEAD"],
    subscribe: &["counts", "_INBOX_operator.>"],
    answers: false,
};

/// The user of who runs the broker, who may do everything.
pub const ADMIN: Permissions =
    Permissions { user: "admin", publish: &[">"], subscribe: &[">"], answers: false };

/// Who looks whether connections and stores are encrypted, `auth encryption`: it sees no message and may ask the system
/// account for nothing but this.
pub const MONITOR: Permissions = Permissions {
    user: "monitor",
    publish: &[
        "$SYS.REQ.SERVER.PING.VARZ",
        "$SYS.REQ.SERVER.PING.CONNZ",
        "$SYS.REQ.SERVER.PING.ROUTEZ",
        "$SYS.REQ.SERVER.PING.JSZ",
    ],
    subscribe: &["_INBOX_monitor.>"],
    answers: false,
};

/// Every user of the account that has the queue.
pub const USERS: [Permissions; 4] = [INGRESS, WORKER, OPERATOR, ADMIN];

/// What a benchmark or a fault test changes.
#[derive(Debug, Clone)]
pub struct Settings {
    /// JetStream's `sync_interval`: `always`, or a duration such as `2m`.
    pub sync_interval: String,
    /// JetStream's `max_file_store`. The streams reserve 40 GiB among them, and the broker's own default is
    /// three quarters of the free disk, which may be less.
    pub max_file_store: String,
    /// Whether it encrypts its files. Builds before this one did not.
    pub encrypted: bool,
    /// Whether it takes connections without TLS as well, which a test of `auth encryption` wants.
    pub plain: bool,
    /// Its part in a cluster; `None` for a single server.
    pub member: Option<Member>,
}

/// A server's part in a cluster.
#[derive(Debug, Clone)]
pub struct Member {
    /// In its name, its files and its log; the servers of one cluster differ in it.
    pub number: usize,
    /// Where the others connect, on 127.0.0.1.
    pub port: u16,
    /// Where it finds the others, on 127.0.0.1. No other way is told to anybody, so a fault test can stand in
    /// between.
    pub routes: Vec<u16>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            sync_interval: "always".into(),
            max_file_store: "64G".into(),
            encrypted: true,
            plain: false,
            member: None,
        }
    }
}

/// One nats-server.
#[derive(Debug)]
pub struct Nats {
    /// Its process.
    pub process: Process,
    port: u16,
    store: Store,
    ca: PathBuf,
    passwords: Vec<(&'static str, PathBuf)>,
}

impl Nats {
    /// Writes its configuration; it listens on a free port of the loopback address, the same at every start of
    /// this value.
    ///
    /// # Errors
    /// When a file cannot be written, no port is free, or the key is not that of what is stored.
    pub fn prepare(state: &State, pki: &Pki, server: &Path, settings: &Settings) -> Result<Self> {
        let port = ports::free()?;
        let mut passwords = Vec::new();
        for user in USERS.iter().chain([&MONITOR]) {
            passwords.push((user.user, state.password(&format!("nats-{}", user.user))?));
        }
        let suffix = settings.member.as_ref().map(|member| format!("-{}", member.number)).unwrap_or_default();
        let config = state.path(&format!("nats{suffix}.conf"));
        let store = if settings.encrypted { Store::encrypted } else { Store::in_clear };
        let store = store(state, &format!("nats{suffix}"))?;
        let mut text = configuration(port, pki, &store, &passwords, settings)?;
        if let Some(member) = &settings.member {
            text += &cluster(member, &read(&state.password("nats-route")?)?);
        }
        write_private(&config, &text)?;
        let name = format!("nats-server{suffix}");
        let log = state.log(&name)?;
        let process = Process::new(name, server, log).arg("--config").arg(config);
        Ok(Self { process, port, store, ca: pki.ca.clone(), passwords })
    }

    /// Starts it and waits until JetStream answers.
    ///
    /// # Errors
    /// When it runs already, ends at its start, or does not answer in time.
    pub async fn start(&mut self) -> Result<()> {
        self.store.discard_unreadable()?;
        self.process.spawn()?;
        let deadline = Instant::now() + if self.store.is_copy() { ENCRYPTED_WITHIN } else { READY_WITHIN };
        loop {
            let answer = timeout(Duration::from_secs(5), async {
                let client = self.connect("admin").await?;
                jetstream::new(client).query_account().await.context("JetStream does not answer")
            });
            if let Ok(Ok(_)) = answer.await {
                return self.store.settle();
            }
            self.process.still_starting(deadline)?;
            sleep(TICK).await;
        }
    }

    /// Kills it (SIGKILL) when it runs, and starts it on the same port and store.
    ///
    /// # Errors
    /// As [`Nats::start`].
    pub async fn restart(&mut self) -> Result<()> {
        self.process.kill().await;
        self.start().await
    }

    /// Stops it in order.
    ///
    /// # Errors
    /// When it had to be killed.
    pub async fn stop(&mut self) -> Result<()> {
        self.process.stop(Signal::TERM, STOP_WITHIN).await
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder with what it has stored.
    pub fn store(&self) -> &Path {
        &self.store.folder
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("tls://localhost:{}", self.port)
    }

    /// The file with a user's password.
    ///
    /// # Errors
    /// When there is no such user.
    pub fn password_file(&self, user: &str) -> Result<&Path> {
        let found = self.passwords.iter().find(|(name, _)| *name == user);
        found.map(|(_, file)| file.as_path()).with_context(|| format!("NATS has no user {user}"))
    }

    /// Connects as one of [`USERS`], or as [`MONITOR`], with the inbox that this user is allowed.
    ///
    /// # Errors
    /// When it does not run, or refuses.
    pub async fn connect(&self, user: &str) -> Result<Client> {
        // Installed already when somebody else in this process uses TLS.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        ConnectOptions::new()
            .user_and_password(user.into(), read(self.password_file(user)?)?)
            .add_root_certificates(self.ca.clone())
            .require_tls(true)
            .custom_inbox_prefix(format!("_INBOX_{user}"))
            .connect(self.url())
            .await
            .map_err(|e| anyhow!(e).context("cannot connect to NATS"))
    }
}

fn configuration(
    port: u16,
    pki: &Pki,
    store: &Store,
    passwords: &[(&str, PathBuf)],
    settings: &Settings,
) -> Result<String> {
    let Settings { sync_interval, max_file_store, plain, member, .. } = settings;
    let name = member.as_ref().map_or("dermflow".into(), |member| format!("dermflow-{}", member.number));
    let line = |user: &Permissions| -> Result<String> {
        let Permissions { user, publish, subscribe, answers } = user;
        let answers = if *answers { ", allow_responses: true" } else { "" };
        let file = passwords.iter().find(|(name, _)| name == user);
        let password = read(&file.with_context(|| format!("no password of {user}"))?.1)?;
        Ok(format!(
            "    {{ user: {user:?}, password: {password:?}, permissions: {{ publish: {publish:?}, subscribe: {subscribe:?}{answers} }} }}\n"
        ))
    };
    let users = USERS.iter().map(line).collect::<Result<String>>()?;
    let accounts = accounts(&users, &line(&MONITOR)?, member.is_some());
    // The path is relative to the configuration's own folder, where nats-server looks for it.
    let encryption = match store.key.as_deref().and_then(Path::file_name) {
        Some(key) => format!("cipher: aes, include {:?}", key.to_string_lossy()),
        None => String::new(),
    };
    Ok(format!(
        r#"# Written anew at every start.
listen: "127.0.0.1:{port}"
server_name: {name:?}
max_payload: 8MB
max_control_line: 4KB
ping_interval: "10s"
ping_max: 3
write_deadline: "10s"
tls {{ cert_file: {cert:?}, key_file: {key:?}, timeout: 5 }}
jetstream {{ store_dir: {store:?}, sync_interval: {sync_interval:?}, max_file_store: {max_file_store}, {encryption} }}
{accounts}allow_non_tls: {plain}
"#,
        cert = pki.cert.to_string_lossy(),
        key = pki.key.to_string_lossy(),
        store = store.folder.to_string_lossy(),
    ))
}

/// Who is in which account. A server answers with its own rights wherever a request wants the answer, and every other server
/// of a cluster does there what it is told: in a cluster the monitor gets its answers in an account of its own. A lone
/// server does not hear itself, and keeps the queue in the global account, whose name is in the keys of what is stored and
/// which has no JetStream beside others.
fn accounts(users: &str, monitor: &str, clustered: bool) -> String {
    if !clustered {
        return format!(
            "authorization {{\n  timeout: 5\n  users: [\n{users}  ]\n}}\naccounts {{\n  $SYS {{ users: [\n{monitor}  ] }}\n}}\n"
        );
    }
    let list =
        |line: fn(&str) -> String| MONITOR.publish.iter().map(|subject| line(subject)).collect::<String>();
    let exports = list(|subject| {
        format!("    {{ service: {subject:?}, response_type: stream, accounts: [MONITOR] }}\n")
    });
    let imports =
        list(|subject| format!("    {{ service: {{ account: \"$SYS\", subject: {subject:?} }} }}\n"));
    format!(
        r"authorization {{ timeout: 5 }}
accounts {{
  QUEUE {{ jetstream: enabled, users: [
{users}  ] }}
  MONITOR {{ users: [
{monitor}  ], imports: [
{imports}  ] }}
  $SYS {{ exports: [
{exports}  ] }}
}}
"
    )
}

/// The routes stay on the loopback address, with a password and without TLS.
fn cluster(member: &Member, password: &str) -> String {
    let Member { port, routes, .. } = member;
    let routes: Vec<String> =
        routes.iter().map(|port| format!("nats://route:{password}@127.0.0.1:{port}")).collect();
    format!(
        r#"cluster {{
  name: "dermflow"
  listen: "127.0.0.1:{port}"
  advertise: "127.0.0.1:1"
  no_advertise: true
  authorization {{ user: "route", password: {password:?}, timeout: 5 }}
  routes: {routes:?}
}}
"#
    )
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::{id::ClientId, job::Lane, queue};
    use futures_util::StreamExt;
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::{servers::Servers, stack::repo};

    async fn nats() -> (State, Nats) {
        let dir = std::env::temp_dir().join(format!("dermflow-test-{}", uuid::Uuid::new_v4()));
        let state = State::open(&dir).unwrap();
        let pki = Pki::prepare(&state).unwrap();
        let servers = Servers::obtain(repo(), &crate::servers::Given::default(), |_| ()).await.unwrap();
        let mut nats = Nats::prepare(&state, &pki, &servers.nats_server, &Settings::default()).unwrap();
        nats.start().await.unwrap();
        (state, nats)
    }

    fn violations(nats: &Nats) -> Vec<String> {
        let log = read(nats.process.log()).unwrap();
        log.lines().filter(|line| line.contains("Violation")).map(str::to_owned).collect()
    }

    async fn count(admin: &Client, stream: &str) -> u64 {
        jetstream::new(admin.clone()).get_stream(stream).await.unwrap().cached_info().state.messages
    }

    /// A client's bulk jobs: ingress makes its consumer, more than once, wakes workers and cancels; a worker finds
    /// and takes them.
    async fn bulk(ingress: &Client, worker: &Client) {
        let (at_ingress, at_worker) = (queue::context(ingress.clone()), queue::context(worker.clone()));
        let client: ClientId = "7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37".parse().unwrap();
        let mut wakes = worker.subscribe(queue::ALL_WAKES).await.unwrap();
        let mut cancels = worker.subscribe(queue::ALL_CANCELS).await.unwrap();
        worker.flush().await.unwrap();
        for limit in [4, 4, 5] {
            let consumer = queue::bulk_consumer(client, Duration::from_secs(30), limit);
            at_ingress.create_consumer_on_stream(consumer, queue::JOBS).await.unwrap();
        }
        let jobs = at_ingress.get_stream_no_info(queue::JOBS).await.unwrap();
        let names: Vec<String> = jobs.consumer_names().map(Result::unwrap).collect().await;
        assert!(names.contains(&queue::bulk_consumer_name(client)), "{names:?}");
        let subject = queue::job_subject(Lane::Bulk, client);
        at_ingress.publish(subject, "job".into()).await.unwrap().await.unwrap();
        ingress.publish(queue::wake_subject(client), "".into()).await.unwrap();
        ingress.publish("cancel.j1", "".into()).await.unwrap();
        let woken = wakes.next().await.unwrap().subject;
        assert_eq!(queue::last_token(&woken), Some(client));
        assert!(cancels.next().await.is_some());
        assert_eq!(queue::clients_with_bulk(&at_worker).await.unwrap(), [client]);
        let own = queue::bind(&at_worker, queue::JOBS, &queue::bulk_consumer_name(client)).await.unwrap();
        let mut jobs = own.fetch().max_messages(1).expires(Duration::from_secs(5)).messages().await.unwrap();
        jobs.next().await.unwrap().unwrap().double_ack().await.unwrap();
        assert!(queue::clients_with_bulk(&at_worker).await.unwrap().is_empty());
    }

    async fn refused(client: &Client, subjects: &[&'static str]) {
        for subject in subjects {
            let request = client.request(*subject, "{\"seq\":1}".into());
            let answer = timeout(Duration::from_millis(200), request).await;
            assert!(!matches!(answer, Ok(Ok(_))), "{subject} was answered");
        }
    }

    /// What ingress, a worker and the operators' API do with the queue, and then what they must not do.
    #[tokio::test]
    async fn each_user_can_do_its_work_and_no_more() {
        let (state, mut nats) = nats().await;
        let (admin, ingress, worker, operator) = tokio::try_join!(
            nats.connect("admin"),
            nats.connect("ingress"),
            nats.connect("worker"),
            nats.connect("operator")
        )
        .unwrap();
        let (at_ingress, at_worker) = (queue::context(ingress.clone()), queue::context(worker.clone()));
        queue::ensure(&at_ingress, Duration::from_secs(30), 1).await.unwrap();
        queue::ensure(&at_ingress, Duration::from_secs(31), 1).await.unwrap();

        let mut wake = ingress.subscribe("results.j1").await.unwrap();
        let mut progress = ingress.subscribe("progress.*").await.unwrap();
        let bucket = at_ingress.get_object_store(queue::PAYLOADS).await.unwrap();
        let payload = vec![7; 300_000];
        bucket.put("j1", &mut payload.as_slice()).await.unwrap();
        at_ingress.publish("jobs.interactive.3.c", "job".into()).await.unwrap().await.unwrap();

        let lane = queue::bind(&at_worker, queue::JOBS, "interactive").await.unwrap();
        let mut jobs = lane.fetch().max_messages(1).expires(Duration::from_secs(5)).messages().await.unwrap();
        let job = jobs.next().await.unwrap().unwrap();
        job.ack_with(jetstream::AckKind::Progress).await.unwrap();
        worker.publish("progress.j1", "".into()).await.unwrap();
        let mut read_back = Vec::new();
        let objects = at_worker.get_object_store(queue::PAYLOADS).await.unwrap();
        objects.get("j1").await.unwrap().read_to_end(&mut read_back).await.unwrap();
        assert_eq!(read_back, payload);
        for subject in ["results.j1", "dead.interactive.3.c"] {
            at_worker.publish(subject, "bytes".into()).await.unwrap().await.unwrap();
        }
        for (job, year) in [("j1", "20"), ("j2", "99")] {
            let mut headers = async_nats::HeaderMap::new();
            headers.insert("Nats-Schedule", format!("@at 20{year}-01-01T00:00:00Z").as_str());
            headers.insert("Nats-Schedule-Target", format!("due.interactive.3.c.{job}").as_str());
            let parked = at_worker.publish_with_headers(format!("retry.{job}"), headers, "job".into()).await;
            parked.unwrap().await.unwrap();
        }
        let due = queue::bind(&at_worker, queue::RETRIES, queue::DUE).await.unwrap();
        let mut retries =
            due.fetch().max_messages(1).expires(Duration::from_secs(5)).messages().await.unwrap();
        retries.next().await.unwrap().unwrap().double_ack().await.unwrap();
        job.double_ack().await.unwrap();
        assert!(progress.next().await.is_some() && wake.next().await.is_some());

        for (stream, subject) in [(queue::RETRIES, "retry.j2"), (queue::RESULTS, "results.j1")] {
            let stream = at_ingress.get_stream_no_info(stream).await.unwrap();
            stream.get_first_raw_message_by_subject(subject, 1).await.unwrap();
        }
        bulk(&ingress, &worker).await;
        let recorder = queue::bind(&at_ingress, queue::RESULTS, queue::RECORDER).await.unwrap();
        let mut results =
            recorder.fetch().max_messages(1).expires(Duration::from_secs(5)).messages().await.unwrap();
        results.next().await.unwrap().unwrap().double_ack().await.unwrap();
        bucket.delete("j1").await.unwrap();
        at_ingress.get_stream(queue::RETRIES).await.unwrap().purge().filter("retry.j2").await.unwrap();
        at_ingress.get_stream(queue::RETRIES).await.unwrap().purge().filter("due.*.*.*.j2").await.unwrap();
        let withdrawn = at_ingress.publish("jobs.bulk.3.c", "job".into()).await.unwrap().await.unwrap();
        let stream = at_ingress.get_stream(queue::JOBS).await.unwrap();
        stream.get_raw_message(withdrawn.sequence).await.unwrap();
        stream.delete_message(withdrawn.sequence).await.unwrap();
        for (stream, left) in [(queue::JOBS, 0), (queue::RETRIES, 0), (queue::RESULTS, 0), (queue::DEAD, 1)] {
            assert_eq!(count(&admin, stream).await, left, "{stream}");
        }
        let at_operator = queue::context(operator.clone());
        let dead = at_operator.get_stream_no_info(queue::DEAD).await.unwrap();
        let first = dead.raw_message_builder().sequence(1).next_by_subject(queue::ALL_DEAD).send();
        let letter = first.await.unwrap();
        at_operator.publish("jobs.interactive.3.c", letter.payload).await.unwrap().await.unwrap();
        dead.delete_message(letter.sequence).await.unwrap();
        assert_eq!((count(&admin, queue::DEAD).await, count(&admin, queue::JOBS).await), (0, 1));
        jetstream::new(admin.clone()).get_stream(queue::JOBS).await.unwrap().purge().await.unwrap();
        assert_eq!(violations(&nats), Vec::<String>::new());

        let mut spied = worker.subscribe("jobs.>").await.unwrap();
        let mut dead = ingress.subscribe("dead.>").await.unwrap();
        worker.flush().await.unwrap();
        worker.publish("jobs.interactive.3.c", "forged".into()).await.unwrap();
        worker.publish("due.interactive.3.c.j1", "forged".into()).await.unwrap();
        worker.publish("wake.bulk.c", "forged".into()).await.unwrap();
        worker.publish("cancel.j1", "forged".into()).await.unwrap();
        worker.publish("$O.payloads.C.x", "forged".into()).await.unwrap();
        let queue_of_others = ["$JS.API.STREAM.MSG.GET.JOBS", "$JS.API.STREAM.MSG.GET.RESULTS", "results.j1"];
        let dead_letters = ["$JS.API.STREAM.MSG.GET.DEAD", "$JS.API.CONSUMER.CREATE.DEAD.x"];
        refused(&ingress, &dead_letters).await;
        refused(&ingress, &["$JS.API.STREAM.DELETE.JOBS"]).await;
        refused(&operator, &queue_of_others).await;
        refused(&operator, &["$JS.API.STREAM.PURGE.DEAD", "$JS.API.CONSUMER.CREATE.DEAD.x"]).await;
        worker.flush().await.unwrap();
        let at_admin = jetstream::new(admin.clone());
        for subject in ["dead.interactive.3.d", "jobs.interactive.3.d"] {
            at_admin.publish(subject, "x".into()).await.unwrap().await.unwrap();
        }
        assert_eq!(count(&admin, queue::JOBS).await, 1);
        for spy in [&mut spied, &mut dead] {
            let heard = timeout(Duration::from_millis(200), spy.next()).await;
            assert!(!matches!(heard, Ok(Some(_))), "{heard:?}");
        }
        assert_eq!(violations(&nats).len(), 10 + 5);
        nats.stop().await.unwrap();
        std::fs::remove_dir_all(state.path("")).unwrap();
    }

    #[tokio::test]
    async fn the_monitor_sees_no_message_and_asks_for_nothing_else() {
        let (state, mut nats) = nats().await;
        let (admin, monitor) = tokio::try_join!(nats.connect("admin"), nats.connect("monitor")).unwrap();
        for subject in MONITOR.publish {
            let answer = monitor.request(*subject, "{}".into()).await.unwrap();
            assert!(answer.payload.starts_with(b"{\"server\":"), "{subject}");
        }
        let others = [
            "$SYS.REQ.SERVER.PING.SUBSZ",
            "$SYS.REQ.SERVER.PING.ACCOUNTZ",
            "$SYS.REQ.SERVER.PING.CONFIG",
            "$SYS.REQ.SERVER.PING.RELOAD",
            "$SYS.REQ.ACCOUNT.PING.CONNZ",
            "$JS.API.INFO",
        ];
        refused(&monitor, &others).await;
        let server = monitor.server_info().server_id;
        for hostile in [format!("$SYS.REQ.SERVER.{server}.RELOAD"), "$JS.API.ACCOUNT.PURGE.$G".into()] {
            monitor.publish_with_reply(MONITOR.publish[0], hostile, "{}".into()).await.unwrap();
        }
        monitor.request(MONITOR.publish[0], "{}".into()).await.unwrap();
        let log = read(nats.process.log()).unwrap();
        assert!(!log.contains("Purge request") && !log.contains("Reloaded"), "{log}");
        let mut spied = monitor.subscribe("jobs.>").await.unwrap();
        monitor.flush().await.unwrap();
        admin.publish("jobs.interactive.3.c", "job".into()).await.unwrap();
        admin.flush().await.unwrap();
        let heard = timeout(Duration::from_millis(200), spied.next()).await;
        assert!(!matches!(heard, Ok(Some(_))), "{heard:?}");
        assert_eq!(violations(&nats).len(), others.len() + 1);
        nats.stop().await.unwrap();
        std::fs::remove_dir_all(state.path("")).unwrap();
    }

    #[tokio::test]
    async fn messages_and_port_survive_a_kill_and_a_pause_is_noticed() {
        let (state, mut nats) = nats().await;
        let admin = nats.connect("admin").await.unwrap();
        let stream =
            jetstream::stream::Config { name: "S".into(), subjects: vec!["s".into()], ..Default::default() };
        let context = jetstream::new(admin.clone());
        context.create_stream(stream).await.unwrap();
        context.publish("s", "kept".into()).await.unwrap().await.unwrap();
        let port = nats.port();
        nats.restart().await.unwrap();
        assert_eq!(nats.port(), port);
        let again = nats.connect("admin").await.unwrap();
        assert_eq!(count(&again, "S").await, 1);
        nats.process.pause();
        assert!(timeout(Duration::from_millis(300), count(&again, "S")).await.is_err());
        nats.process.resume();
        assert_eq!(count(&again, "S").await, 1);
        nats.stop().await.unwrap();
        assert!(nats.connect("admin").await.is_err());
        std::fs::remove_dir_all(state.path("")).unwrap();
    }
}
