//! The queue as data: every stream, subject and consumer, and the only way to publish.
//!
//! | stream | subjects | holds |
//! |---|---|---|
//! | `JOBS` | `jobs.<lane>.<partition>.<client>` | sealed payloads that wait for a worker |
//! | `RETRIES` | `retry.<job>`, `due.<lane>.<partition>.<client>.<job>` | failed attempts until their back-off ends, then until a worker takes them |
//! | `RESULTS` | `results.<job>` | sealed reports until they are recorded |
//! | `DEAD` | `dead.<lane>.<partition>.<client>` | payloads that were given up, with the reason |
//! | `OBJ_payloads` | object store | sealed payloads beyond the broker's message size |
//!
//! Interactive jobs have one consumer. Bulk jobs have one per client, so that a worker chooses whose job it asks
//! for: what waits is read from the stream's subjects, and `wake.bulk.<client>` tells workers at once. The
//! partition is a function of the client, so that JOBS can be split without any other change. Retries have a stream of their own because the broker refuses message schedules (ADR-51) on a stream
//! that discards new messages, as JOBS must: a full queue refuses, it never forgets.

use std::{collections::HashMap, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use async_nats::{
    Client, ConnectOptions, HeaderMap, RequestErrorKind,
    connection::State,
    jetstream::{
        self, Context,
        consumer::{AckPolicy, PullConsumer, pull},
        context::{GetStreamErrorKind, PublishErrorKind},
        object_store,
        publish::PublishAck,
        response::Response,
        stream::{ClusterInfo, Config, DiscardPolicy, PeerInfo, RetentionPolicy, StorageType},
    },
};
use bytes::Bytes;
use futures_util::future::join_all;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use tokio::{
    sync::Semaphore,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    fhir::instant,
    id::{ClientId, JobId},
    job::Lane,
    limits,
    model::ModelRef,
    process::read_secret,
};

/// Number of partitions in the subject; a client is always in the same one.
pub const PARTITIONS: u8 = 16;
/// The stream of jobs.
pub const JOBS: &str = "JOBS";
/// The stream of failed attempts.
pub const RETRIES: &str = "RETRIES";
/// The consumer of `RETRIES` that all workers share.
pub const DUE: &str = "due";
/// The stream of results.
pub const RESULTS: &str = "RESULTS";
/// The stream of dead letters.
pub const DEAD: &str = "DEAD";
/// The object store's bucket.
pub const PAYLOADS: &str = "payloads";
/// The consumer of `RESULTS` that the recorders of all ingress processes share.
pub const RECORDER: &str = "recorder";
/// Header of a dead letter: the stable error code.
pub const REASON: &str = "Dermflow-Reason";
/// Header of a job: its client's weight among the clients with bulk jobs, 1 to [`limits::MAX_WEIGHT`]; absent, 1.
pub const WEIGHT: &str = "Dermflow-Weight";
/// Every bulk job.
pub const ALL_BULK: &str = "jobs.bulk.>";

/// When the client library gives up on the broker's answer to a publication, long after its caller did.
const ACK_TIMEOUT: Duration = Duration::from_secs(10);
const DEDUPE_WINDOW: Duration = Duration::from_mins(10);
/// How long dead letters, and payloads in the object store, are kept.
pub const DEAD_AGE: Duration = Duration::from_hours(24 * 14);
const GIB: i64 = 1024 * 1024 * 1024;

/// The subject that a job of `client` waits on.
pub fn job_subject(lane: Lane, client: ClientId) -> String {
    format!("jobs.{}.{}.{client}", lane.as_str(), client.partition())
}

/// The subject that a failed attempt is parked on until its back-off ends.
pub fn retry_subject(job: JobId) -> String {
    format!("retry.{job}")
}

/// Every failed attempt whose back-off has not ended.
pub const ALL_RETRIES: &str = "retry.*";

/// The subject that the broker moves it to then.
pub fn due_subject(lane: Lane, client: ClientId, job: JobId) -> String {
    format!("due.{}.{}.{client}.{job}", lane.as_str(), client.partition())
}

/// The due attempt of a job, whosever it is.
pub fn due_filter(job: JobId) -> String {
    format!("due.*.*.*.{job}")
}

/// The subject of a given-up payload.
pub fn dead_subject(lane: Lane, client: ClientId) -> String {
    format!("dead.{}.{}.{client}", lane.as_str(), client.partition())
}

/// The subject among the dead letters for what waited on `subject`, in JOBS or RETRIES.
pub fn dead_subject_of(subject: &str) -> Option<String> {
    let (_, rest) = subject.split_once('.')?;
    let lane_partition_client: Vec<&str> = rest.split('.').take(3).collect();
    Some(format!("dead.{}", lane_partition_client.join(".")))
}

/// Whose bulk job waits on `subject`; `None` when it is none.
pub fn bulk_client(subject: &str) -> Option<ClientId> {
    subject.starts_with("jobs.bulk.").then(|| last_token(subject))?
}

/// Every given-up payload.
pub const ALL_DEAD: &str = "dead.>";

/// The subject of a job's result, which both stores it and wakes who waits.
pub fn result_subject(job: JobId) -> String {
    format!("results.{job}")
}

/// The subject of a worker's note that an attempt began; not stored.
pub fn progress_subject(job: JobId) -> String {
    format!("progress.{job}")
}

/// All progress notes.
pub const ALL_PROGRESS: &str = "progress.*";

/// The subject that tells workers of new bulk jobs of `client`; not stored, may be lost.
pub fn wake_subject(client: ClientId) -> String {
    format!("wake.bulk.{client}")
}

/// All wake-ups.
pub const ALL_WAKES: &str = "wake.bulk.*";

/// The subject that tells the worker which runs a job to stop; not stored, may be lost.
pub fn cancel_subject(job: JobId) -> String {
    format!("cancel.{job}")
}

/// All cancellations.
pub const ALL_CANCELS: &str = "cancel.*";

/// The subject on which workers that have a model say so; not stored. A dot would begin another token.
pub fn model_subject(model: &ModelRef) -> String {
    format!("models.{}", model.to_string().replace('.', "~"))
}

/// The subject on which every worker says that it is there.
pub const ANY_MODEL: &str = "models";

/// Whether anybody answers on `subject`; `None` when that cannot be told in time.
pub async fn answered(client: &Client, subject: String) -> Option<bool> {
    match timeout(limits::MODEL_QUESTION, client.request(subject, Bytes::new())).await.ok()? {
        Ok(_) => Some(true),
        Err(error) => (error.kind() == RequestErrorKind::NoResponders).then_some(false),
    }
}

/// What the replicas of ingress have counted of each client lately, for each other.
pub const COUNTS: &str = "counts";

/// The id that a subject ends with.
pub fn last_token<T: FromStr>(subject: &str) -> Option<T> {
    subject.rsplit('.').next()?.parse().ok()
}

fn stream(name: &str, subjects: &[&str]) -> Config {
    Config {
        name: name.into(),
        subjects: subjects.iter().map(ToString::to_string).collect(),
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        retention: RetentionPolicy::WorkQueue,
        duplicate_window: DEDUPE_WINDOW,
        max_message_size: limits::MAX_MESSAGE_BYTES as i32,
        ..Config::default()
    }
}

/// Every stream.
pub fn streams() -> [Config; 4] {
    [
        Config { max_bytes: 16 * GIB, allow_atomic_publish: true, ..stream(JOBS, &["jobs.>"]) },
        // No limit of its own, which would discard the oldest: what is here was within the limit of JOBS, and
        // the broker's limit on storage refuses what is too much.
        Config {
            allow_message_schedules: true,
            discard: DiscardPolicy::Old,
            ..stream(RETRIES, &["retry.*", "due.>"])
        },
        Config { max_bytes: 4 * GIB, ..stream(RESULTS, &["results.*"]) },
        Config {
            max_bytes: 4 * GIB,
            max_age: DEAD_AGE,
            retention: RetentionPolicy::Limits,
            ..stream(DEAD, &["dead.>"])
        },
    ]
}

/// The object store for large payloads. Its age limit frees what a crash left behind.
pub fn payload_bucket() -> object_store::Config {
    object_store::Config {
        bucket: PAYLOADS.into(),
        storage: StorageType::File,
        max_age: DEAD_AGE,
        max_bytes: 16 * GIB,
        ..object_store::Config::default()
    }
}

/// A durable pull consumer. Redelivery has no limit at the broker, where a message beyond it would become
/// invisible: workers count deliveries and give a job up themselves.
fn consumer(name: &str, filter: &str, ack_wait: Duration) -> pull::Config {
    pull::Config {
        durable_name: Some(name.into()),
        filter_subject: filter.into(),
        ack_policy: AckPolicy::Explicit,
        ack_wait,
        max_deliver: -1,
        max_ack_pending: limits::IN_FLIGHT,
        ..pull::Config::default()
    }
}

/// The consumer of the interactive lane.
pub fn interactive_consumer(ack_wait: Duration) -> pull::Config {
    consumer(Lane::Interactive.as_str(), "jobs.interactive.>", ack_wait)
}

/// The name of the consumer of one client's bulk jobs.
pub fn bulk_consumer_name(client: ClientId) -> String {
    format!("bulk-{client}")
}

/// Whose bulk jobs a consumer of this name has; `None` when it is another one.
pub fn bulk_consumer_client(name: &str) -> Option<ClientId> {
    name.strip_prefix("bulk-")?.parse().ok()
}

/// The consumer of one client's bulk jobs, at most `max_ack_pending` of which are with workers at once. The
/// broker forgets it when nobody has asked for [`limits::BULK_CONSUMER_IDLE`]; jobs that wait then go on
/// waiting in the stream until ingress makes it again.
pub fn bulk_consumer(client: ClientId, ack_wait: Duration, max_ack_pending: i64) -> pull::Config {
    pull::Config {
        max_ack_pending,
        inactive_threshold: limits::BULK_CONSUMER_IDLE,
        ..consumer(&bulk_consumer_name(client), &job_subject(Lane::Bulk, client), ack_wait)
    }
}

/// The subject on which a consumer takes requests for its messages (ADR-13).
pub fn next_subject(stream: &str, consumer: &str) -> String {
    format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}")
}

/// The clients that have bulk jobs in the stream, with workers or waiting: [`limits::BULK_CLIENTS`] at most,
/// from the first page of the broker's answer, which holds 100,000 subjects.
///
/// # Errors
/// When the broker is away or refuses.
pub async fn clients_with_bulk(context: &Context) -> Result<Vec<ClientId>, async_nats::Error> {
    #[derive(Deserialize)]
    struct Info {
        state: Subjects,
    }
    #[derive(Deserialize)]
    struct Subjects {
        #[serde(default)]
        subjects: HashMap<String, u64>,
    }
    let request = json!({ "subjects_filter": ALL_BULK, "offset": 0 });
    match context.request(format!("STREAM.INFO.{JOBS}"), &request).await? {
        Response::Err { error } => Err(error.into()),
        Response::Ok(Info { state: Subjects { subjects } }) => {
            let clients = subjects.keys().filter_map(|subject| bulk_client(subject));
            Ok(clients.take(limits::BULK_CLIENTS).collect())
        }
    }
}

/// The recorders' consumer.
pub fn recorder_consumer(ack_wait: Duration) -> pull::Config {
    consumer(RECORDER, "results.*", ack_wait)
}

/// Every consumer that is always there, and the stream that it is of. Bulk jobs have one a client besides.
fn consumers(ack_wait: Duration) -> Vec<(&'static str, pull::Config)> {
    vec![
        (JOBS, interactive_consumer(ack_wait)),
        (RETRIES, consumer(DUE, "due.>", ack_wait)),
        (RESULTS, recorder_consumer(ack_wait)),
    ]
}

/// Creates or updates everything above, each stream on `replicas` nodes. Safe from several processes at once.
///
/// # Errors
/// When the broker is away or refuses.
pub async fn ensure(context: &Context, ack_wait: Duration, replicas: usize) -> Result<(), async_nats::Error> {
    for config in streams() {
        context.create_or_update_stream(Config { num_replicas: replicas, ..config }).await?;
    }
    for (stream, consumer) in consumers(ack_wait) {
        context.get_stream_no_info(stream).await?.create_consumer(consumer).await?;
    }
    // Builds before fair bulk had one consumer for all clients, whose filter would keep theirs out. It is an
    // error when there is none.
    let _ = context.get_stream_no_info(JOBS).await?.delete_consumer(Lane::Bulk.as_str()).await;
    if context.get_object_store(PAYLOADS).await.is_err() {
        let bucket = object_store::Config { num_replicas: replicas, ..payload_bucket() };
        context.create_object_store(bucket).await?;
    }
    Ok(())
}

/// The streams and their consumers that [`ensure`] makes, by name.
pub fn expected(ack_wait: Duration) -> Vec<(String, Vec<String>)> {
    let consumers = consumers(ack_wait);
    let of = |stream: &str| {
        let own = consumers.iter().filter(|(name, _)| *name == stream);
        own.filter_map(|(_, config)| config.durable_name.clone()).collect()
    };
    let streams = streams().into_iter().map(|config| config.name);
    streams.chain([payload_stream()]).map(|name| (name.clone(), of(&name))).collect()
}

/// Whether a stream is worked off by consumers, so that each of its messages is known to one.
pub fn is_consumed(stream: &str) -> bool {
    [JOBS, RETRIES, RESULTS].contains(&stream)
}

/// The stream that the object store is made of.
pub fn payload_stream() -> String {
    format!("OBJ_{PAYLOADS}")
}

/// The subjects of the object store that end with the names of its objects, in Base64.
pub fn payload_names() -> String {
    format!("$O.{PAYLOADS}.M.*")
}

/// A consumer that [`ensure`] made.
///
/// # Errors
/// When it does not exist or the broker is away.
pub async fn bind(context: &Context, stream: &str, name: &str) -> Result<PullConsumer, async_nats::Error> {
    context.get_consumer_from_stream(name, stream).await.map_err(Into::into)
}

/// How a process reaches the broker.
#[derive(Debug, Clone, clap::Args)]
pub struct NatsOptions {
    /// The broker, `tls://host:port`; several with commas.
    #[arg(long, env = "DERMFLOW_NATS_URL", default_value = "tls://localhost:4222")]
    pub nats_url: String,
    /// The CA that signed the broker's certificate (PEM).
    #[arg(long, env = "DERMFLOW_NATS_CA")]
    pub nats_ca: PathBuf,
    /// The broker's user for this process; also the prefix of its inbox.
    #[arg(long, env = "DERMFLOW_NATS_USER")]
    pub nats_user: String,
    /// File with that user's password.
    #[arg(long, env = "DERMFLOW_NATS_PASSWORD_FILE")]
    pub nats_password_file: PathBuf,
}

impl NatsOptions {
    /// Connects over TLS, and goes on trying for ever when the broker is away later. In a cluster it leaves a server
    /// that has lost the others.
    ///
    /// # Errors
    /// When the password cannot be read, or the broker cannot be reached or refuses.
    pub async fn connect(&self) -> Result<Client, async_nats::Error> {
        let options = self.options()?;
        let servers = self.servers();
        let client = options.clone().connect(servers.as_slice()).await?;
        if servers.len() > 1 {
            tokio::spawn(leave_lonely_servers(client.clone(), options, servers));
        }
        Ok(client)
    }

    /// Connects over TLS to any server, as somebody who does not use the queue.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub(crate) async fn connect_once(&self) -> Result<Client, async_nats::Error> {
        Ok(self.options()?.connect(self.servers().as_slice()).await?)
    }

    fn servers(&self) -> Vec<String> {
        self.nats_url.split(',').map(str::to_owned).collect()
    }

    fn options(&self) -> Result<ConnectOptions, async_nats::Error> {
        let password: SecretString = read_secret(&self.nats_password_file)?;
        Ok(ConnectOptions::new()
            .name(&self.nats_user)
            .user_and_password(self.nats_user.clone(), password.expose_secret().to_owned())
            .add_root_certificates(self.nats_ca.clone())
            .require_tls(true)
            .custom_inbox_prefix(format!("_INBOX_{}", self.nats_user))
            .ping_interval(Duration::from_secs(10))
            .connection_timeout(Duration::from_secs(5))
            .request_timeout(Some(Duration::from_secs(5)))
            .client_capacity(limits::BROKER_COMMANDS)
            .max_reconnects(None)
            .event_callback(|event| async move { tracing::info!(%event, "broker connection") }))
    }
}

/// A server that is cut off from its cluster keeps its connections and serves nothing, which only its clients can
/// notice. When ours does not serve, and another one does, `client` goes there; while a new leader is elected nobody
/// serves, and it stays.
async fn leave_lonely_servers(client: Client, options: ConnectOptions, servers: Vec<String>) {
    let mut look = interval(limits::CLUSTER_LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silent = 0;
    loop {
        look.tick().await;
        silent = if serves(&client).await { 0 } else { silent + 1 };
        if silent < limits::CLUSTER_SILENCE {
            continue;
        }
        for server in &servers {
            let probe = timeout(limits::CLUSTER_LOOK, options.clone().connect(server)).await;
            let Ok(Ok(probe)) = probe else { continue };
            if serves(&probe).await {
                tracing::warn!(
                    server,
                    "the broker's server does not serve the queue; going to one that does"
                );
                go(&client, server, &probe.server_info().server_id).await;
                let _ = client.set_server_pool(servers.as_slice()).await;
                silent = 0;
                break;
            }
        }
    }
}

/// Whether the server at the other end serves JOBS.
async fn serves(client: &Client) -> bool {
    let context = jetstream::new(client.clone());
    match timeout(limits::CLUSTER_LOOK, context.get_stream(JOBS)).await {
        Ok(Ok(stream)) => stream.cached_info().cluster.as_ref().is_none_or(has_majority),
        // Nobody has created it yet: that is an answer.
        Ok(Err(error)) => matches!(error.kind(), GetStreamErrorKind::JetStream(e)
            if e.error_code() == jetstream::ErrorCode::STREAM_NOT_FOUND),
        Err(_) => false,
    }
}

/// Reconnects to this server.
async fn go(client: &Client, server: &str, id: &str) {
    let moved = async {
        client.set_server_pool([server].as_slice()).await.ok()?;
        client.force_reconnect().await.ok()?;
        while client.connection_state() != State::Connected || client.server_info().server_id != id {
            sleep(limits::BROKER_PAUSE / 10).await;
        }
        Some(())
    };
    let _ = timeout(2 * limits::CLUSTER_LOOK, moved).await;
}

/// A leader that is cut off goes on answering for 20 s, and a server that follows none answers without naming one.
fn has_majority(cluster: &ClusterInfo) -> bool {
    // Zero stands for never.
    let contact = |replica: &&PeerInfo| !replica.active.is_zero() && replica.active < limits::CLUSTER_CONTACT;
    let heard = cluster.replicas.iter().filter(contact).count();
    cluster.leader.is_some() && 2 * (heard + 1) > cluster.replicas.len() + 1
}

/// JetStream on `client`, with a time-out that leaves a slow broker to the publisher's own deadline.
pub fn context(client: Client) -> Context {
    let mut context = jetstream::new(client);
    context.set_timeout(ACK_TIMEOUT);
    context
}

/// Why a message may not be in its stream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// No acknowledgement in time: stored or not, nobody knows.
    #[error("the broker did not acknowledge in time")]
    Unknown,
    /// The stream is at its limit; nothing was stored.
    #[error("the stream is full")]
    Full,
    /// The broker refused; nothing was stored.
    #[error("the broker refused: {0}")]
    Refused(String),
}

/// A message on its way into a stream.
#[derive(Debug, Clone)]
pub struct Message {
    /// Where to.
    pub subject: String,
    /// Repetitions with this id inside the dedupe window are stored once. A scheduled message has none: one
    /// schedule per subject is what keeps it single.
    pub id: Option<String>,
    /// Further headers.
    pub headers: HeaderMap,
    /// The bytes.
    pub body: Bytes,
}

impl Message {
    /// A message without further headers.
    pub fn new(subject: String, id: String, body: Bytes) -> Self {
        Self { subject, id: Some(id), headers: HeaderMap::new(), body }
    }

    /// A job's message, first attempt or requeued: the id names job and attempt (fact: a replay under the
    /// first id would be dropped inside the dedupe window). `weight` is the client's, see [`WEIGHT`].
    pub fn job(
        lane: Lane,
        client: ClientId,
        job: JobId,
        attempt: u32,
        weight: Option<u8>,
        body: Bytes,
    ) -> Self {
        let mut message = Self::new(job_subject(lane, client), format!("{job}:{attempt}"), body);
        if let Some(weight) = weight {
            message.headers.insert(WEIGHT, weight.to_string());
        }
        message
    }

    /// The same job again, stored now and delivered at `due` by the broker itself, so that no process has to
    /// stay alive for it.
    pub fn retry(lane: Lane, client: ClientId, job: JobId, due: OffsetDateTime, body: Bytes) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Schedule", format!("@at {}", instant(due)));
        headers.insert("Nats-Schedule-Target", due_subject(lane, client, job));
        Self { subject: retry_subject(job), id: None, headers, body }
    }
}

/// The only way into a stream: bounded in memory and in time.
#[derive(Clone)]
pub struct Publisher {
    context: Context,
    memory: Arc<Semaphore>,
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Publisher({} bytes free)", self.memory.available_permits())
    }
}

impl Publisher {
    /// A publisher on `context` with [`limits::PUBLISH_MEMORY_BYTES`].
    pub fn new(context: Context) -> Self {
        Self { context, memory: Arc::new(Semaphore::new(limits::PUBLISH_MEMORY_BYTES)) }
    }

    /// The JetStream context, for reading.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Publishes and waits for the acknowledgement, `deadline` in all. Returns the stream sequence.
    ///
    /// What was handed to the connection cannot be taken back: after a time-out its memory stays accounted for
    /// until the broker answers or the client library gives up on it. A connection that is known to be down is
    /// handed nothing, and [`limits::BROKER_COMMANDS`] bounds what it holds.
    ///
    /// # Errors
    /// See [`PublishError`].
    pub async fn publish(&self, message: Message, deadline: Duration) -> Result<u64, PublishError> {
        let this = self.clone();
        let cost = message.body.len().clamp(1, limits::MAX_MESSAGE_BYTES) as u32;
        let hand_over = async move {
            let permit =
                this.memory.clone().acquire_many_owned(cost).await.map_err(|_| PublishError::Unknown)?;
            let publish = tokio::spawn(async move {
                let outcome = send(&this.context, message).await;
                drop(permit);
                outcome
            });
            publish.await.map_err(|_| PublishError::Unknown)?
        };
        timeout(deadline, hand_over).await.unwrap_or(Err(PublishError::Unknown))
    }

    /// Publishes messages to one stream, and says of each what [`Self::publish`] would.
    ///
    /// From [`limits::ATOMIC_FROM`] messages on, and within [`limits::ATOMIC_BYTES`], they go as one atomic batch
    /// (ADR-50), which the broker syncs to disk once. What a batch is refused for, such as one message that is
    /// stored already or one too many for the stream, concerns single messages: then each goes by itself, with what is left
    /// of `deadline`.
    pub async fn publish_all(
        &self,
        messages: Vec<Message>,
        deadline: Duration,
    ) -> Vec<Result<u64, PublishError>> {
        let end = Instant::now() + deadline;
        let bytes: usize = messages.iter().map(|message| message.body.len()).sum();
        if (limits::ATOMIC_FROM..=limits::ATOMIC_MESSAGES).contains(&messages.len())
            && bytes <= limits::ATOMIC_BYTES
        {
            let count = messages.len() as u64;
            match self.publish_batch(messages.clone(), bytes, deadline).await {
                Ok(last) => return (last + 1 - count..=last).map(Ok).collect(),
                Err(PublishError::Unknown) => return vec![Err(PublishError::Unknown); messages.len()],
                Err(PublishError::Full | PublishError::Refused(_)) => {}
            }
        }
        let left = end.saturating_duration_since(Instant::now());
        join_all(messages.into_iter().map(|message| self.publish(message, left))).await
    }

    /// The sequence of the last message; the others stand before it without a gap.
    async fn publish_batch(
        &self,
        messages: Vec<Message>,
        bytes: usize,
        deadline: Duration,
    ) -> Result<u64, PublishError> {
        let this = self.clone();
        let hand_over = async move {
            let permit = this.memory.clone().acquire_many_owned(bytes as u32).await;
            let permit = permit.map_err(|_| PublishError::Unknown)?;
            let publish = tokio::spawn(async move {
                let outcome = send_batch(this.context.client(), messages).await;
                drop(permit);
                outcome
            });
            publish.await.map_err(|_| PublishError::Unknown)?
        };
        timeout(deadline, hand_over).await.unwrap_or(Err(PublishError::Unknown))
    }
}

/// ADR-50: the messages carry the batch's id and their number; the last one commits and is answered.
async fn send_batch(client: Client, messages: Vec<Message>) -> Result<u64, PublishError> {
    if client.connection_state() != async_nats::connection::State::Connected {
        return Err(PublishError::Unknown);
    }
    let (batch, count) = (client.new_inbox(), messages.len());
    let batch = batch.rsplit('.').next().unwrap_or(&batch);
    for (number, message) in (1..).zip(messages) {
        let Message { subject, id, mut headers, body } = message;
        headers.insert("Nats-Batch-Id", batch);
        headers.insert("Nats-Batch-Sequence", number.to_string());
        if let Some(id) = id {
            headers.insert(async_nats::header::NATS_MESSAGE_ID, id);
        }
        if number < count {
            let sent = client.publish_with_headers(subject, headers, body).await;
            sent.map_err(|_| PublishError::Unknown)?;
            continue;
        }
        headers.insert("Nats-Batch-Commit", "1");
        let request = async_nats::Request::new().headers(headers).payload(body).timeout(Some(ACK_TIMEOUT));
        let answer = client.send_request(subject, request).await.map_err(|_| PublishError::Unknown)?;
        let answer = serde_json::from_slice(&answer.payload).map_err(|_| PublishError::Unknown)?;
        return match answer {
            Response::Ok(PublishAck { sequence, batch_size: Some(size), .. }) if size == count as u64 => {
                Ok(sequence)
            }
            Response::Ok(_) => Err(PublishError::Unknown),
            Response::Err { error } if error.error_code().0 == STREAM_STORE_FAILED => Err(PublishError::Full),
            Response::Err { error } => Err(PublishError::Refused(error.to_string())),
        };
    }
    Err(PublishError::Refused("a batch without messages".into()))
}

async fn send(context: &Context, message: Message) -> Result<u64, PublishError> {
    if context.client().connection_state() != State::Connected {
        return Err(PublishError::Unknown);
    }
    let mut publish =
        jetstream::message::PublishMessage::build().payload(message.body).headers(message.headers);
    if let Some(id) = message.id {
        publish = publish.message_id(id);
    }
    let ack = context.send_publish(message.subject, publish).await.map_err(|e| classify(&e))?;
    ack.await.map(|ack| ack.sequence).map_err(|e| classify(&e))
}

/// JetStream's error code for a stream at a limit.
const STREAM_STORE_FAILED: u64 = 10077;
/// JetStream's error code for a message whose first copy has not found a majority yet.
const STILL_IN_PROCESS: u64 = 10158;

fn classify(error: &jetstream::context::PublishError) -> PublishError {
    use std::error::Error;
    let api_error =
        error.source().and_then(|source| source.downcast_ref::<jetstream::Error>()).map(|e| e.error_code().0);
    match (error.kind(), api_error) {
        (_, Some(STREAM_STORE_FAILED)) => PublishError::Full,
        (_, Some(STILL_IN_PROCESS)) => PublishError::Unknown,
        (PublishErrorKind::TimedOut | PublishErrorKind::BrokenPipe | PublishErrorKind::MaxAckPending, _) => {
            PublishError::Unknown
        }
        _ => PublishError::Refused(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_name_lane_partition_and_client() {
        let client: ClientId = "7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37".parse().unwrap();
        let subject = job_subject(Lane::Bulk, client);
        assert_eq!(subject, "jobs.bulk.7.7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37");
        assert!(client.partition() < PARTITIONS);
        assert_eq!(bulk_client(&subject), Some(client));
        assert_eq!(bulk_client("jobs.bulk.7.c"), None);
        assert_eq!(bulk_client(&job_subject(Lane::Interactive, client)), None);
        let due = due_subject(Lane::Bulk, client, JobId::new(crate::clock::now()));
        for waiting in [subject, due] {
            assert_eq!(dead_subject_of(&waiting), Some(dead_subject(Lane::Bulk, client)));
        }
    }

    #[test]
    fn consumers_of_clients_do_not_overlap() {
        let ids = ["7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37", "7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b47"];
        let [a, b] = ids.map(|id| bulk_consumer(id.parse().unwrap(), limits::DEFAULT_ACK_WAIT, 7));
        assert_eq!(a.durable_name.as_deref(), Some("bulk-7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37"));
        assert_eq!((a.max_ack_pending, a.filter_subject.contains('*')), (7, false));
        assert_eq!(a.durable_name.as_deref().and_then(bulk_consumer_client), ids[0].parse().ok());
        assert_eq!(bulk_consumer_client(Lane::Interactive.as_str()), None);
        assert_ne!((a.durable_name, a.filter_subject), (b.durable_name, b.filter_subject));
    }
}
