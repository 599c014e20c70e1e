//! The queue as data: every stream, subject and consumer, and the only way to publish.
//!
//! | stream | subjects | holds |
//! |---|---|---|
//! | `JOBS` | `jobs.<lane>.<partition>.<client>` | sealed payloads that wait for a worker |
//! | `RETRIES` | `retry.<job>`, `due.<lane>.<partition>.<client>` | failed attempts until their back-off ends, then until a worker takes them |
//! | `RESULTS` | `results.<job>` | sealed reports until they are recorded |
//! | `DEAD` | `dead.<lane>.<partition>.<client>` | payloads that were given up, with the reason |
//! | `OBJ_payloads` | object store | sealed payloads beyond the broker's message size |
//!
//! The partition is a function of the client, so that fair scheduling can filter on it without any other
//! change. Retries have a stream of their own because the broker refuses message schedules (ADR-51) on a stream
//! that discards new messages, as JOBS must: a full queue refuses, it never forgets.

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_nats::{
    Client, ConnectOptions, HeaderMap,
    connection::State,
    jetstream::{
        self, Context,
        consumer::{AckPolicy, PullConsumer, pull},
        context::{GetStreamErrorKind, PublishErrorKind},
        object_store,
        stream::{ClusterInfo, Config, DiscardPolicy, RetentionPolicy, StorageType},
    },
};
use bytes::Bytes;
use secrecy::{ExposeSecret, SecretString};
use time::OffsetDateTime;
use tokio::{
    sync::Semaphore,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use crate::{
    fhir::instant,
    id::{ClientId, JobId},
    job::{LANES, Lane},
    limits,
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

const DEDUPE_WINDOW: Duration = Duration::from_mins(10);
const DEAD_AGE: Duration = Duration::from_hours(24 * 14);
const GIB: i64 = 1024 * 1024 * 1024;

/// The subject that a job of `client` waits on.
pub fn job_subject(lane: Lane, client: ClientId) -> String {
    format!("jobs.{}.{}.{client}", lane.as_str(), client.partition())
}

/// The subject that a failed attempt is parked on until its back-off ends.
pub fn retry_subject(job: JobId) -> String {
    format!("retry.{job}")
}

/// The subject that the broker moves it to then.
pub fn due_subject(lane: Lane, client: ClientId) -> String {
    format!("due.{}.{}.{client}", lane.as_str(), client.partition())
}

/// The subject of a given-up payload.
pub fn dead_subject(lane: Lane, client: ClientId) -> String {
    format!("dead.{}.{}.{client}", lane.as_str(), client.partition())
}

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
        Config { max_bytes: 16 * GIB, ..stream(JOBS, &["jobs.>"]) },
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
        max_ack_pending: 4_096,
        ..pull::Config::default()
    }
}

/// The consumer of a lane.
pub fn lane_consumer(lane: Lane, ack_wait: Duration) -> pull::Config {
    consumer(lane.as_str(), &format!("jobs.{}.>", lane.as_str()), ack_wait)
}

/// The recorders' consumer.
pub fn recorder_consumer(ack_wait: Duration) -> pull::Config {
    consumer(RECORDER, "results.*", ack_wait)
}

/// Creates or updates everything above, each stream on `replicas` nodes. Safe from several processes at once.
///
/// # Errors
/// When the broker is away or refuses.
pub async fn ensure(context: &Context, ack_wait: Duration, replicas: usize) -> Result<(), async_nats::Error> {
    for config in streams() {
        context.create_or_update_stream(Config { num_replicas: replicas, ..config }).await?;
    }
    let jobs = context.get_stream_no_info(JOBS).await?;
    for lane in LANES {
        jobs.create_consumer(lane_consumer(lane, ack_wait)).await?;
    }
    let retries = context.get_stream_no_info(RETRIES).await?;
    retries.create_consumer(consumer(DUE, "due.>", ack_wait)).await?;
    let results = context.get_stream_no_info(RESULTS).await?;
    results.create_consumer(recorder_consumer(ack_wait)).await?;
    if context.get_object_store(PAYLOADS).await.is_err() {
        let bucket = object_store::Config { num_replicas: replicas, ..payload_bucket() };
        context.create_object_store(bucket).await?;
    }
    Ok(())
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
        let password: SecretString = read_secret(&self.nats_password_file)?;
        let client = ConnectOptions::new()
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
            .event_callback(|event| async move { tracing::info!(%event, "broker connection") })
            .connect(self.nats_url.split(',').collect::<Vec<_>>())
            .await?;
        if self.nats_url.contains(',') {
            tokio::spawn(leave_lonely_servers(client.clone()));
        }
        Ok(client)
    }
}

/// A server that is cut off from its cluster keeps its connections and serves nothing, which only its clients can
/// notice: they ask for JOBS, and go to another server when there is no good answer several times in a row.
async fn leave_lonely_servers(client: Client) {
    let context = jetstream::new(client.clone());
    let mut look = interval(limits::CLUSTER_LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut silent = 0;
    loop {
        look.tick().await;
        let served = match timeout(limits::CLUSTER_LOOK, context.get_stream(JOBS)).await {
            Ok(Ok(stream)) => stream.cached_info().cluster.as_ref().is_none_or(has_majority),
            // Nobody has created it yet: that is an answer.
            Ok(Err(error)) => matches!(error.kind(), GetStreamErrorKind::JetStream(e)
                if e.error_code() == jetstream::ErrorCode::STREAM_NOT_FOUND),
            Err(_) => false,
        };
        silent = if served { 0 } else { silent + 1 };
        if silent == limits::CLUSTER_SILENCE {
            tracing::warn!("the broker's server does not serve the queue; going to another one");
            leave(&client).await;
            silent = 0;
        }
    }
}

/// A leader that is cut off goes on answering for 20 s, and a server that follows none answers without naming one.
fn has_majority(cluster: &ClusterInfo) -> bool {
    let heard = cluster.replicas.iter().filter(|replica| replica.active < limits::CLUSTER_CONTACT).count();
    cluster.leader.is_some() && 2 * (heard + 1) > cluster.replicas.len() + 1
}

/// Reconnects until the server is another one: the client library takes any, perhaps the same.
async fn leave(client: &Client) {
    let lonely = client.server_info().server_id;
    let elsewhere = async {
        while client.connection_state() != State::Connected || client.server_info().server_id == lonely {
            sleep(limits::BROKER_PAUSE / 10).await;
        }
    };
    tokio::pin!(elsewhere);
    for _ in 0..limits::CLUSTER_TRIES {
        let _ = client.force_reconnect().await;
        if timeout(limits::CLUSTER_LOOK, &mut elsewhere).await.is_ok() {
            return;
        }
    }
}

/// JetStream on `client`, with a time-out that leaves a slow broker to the publisher's own deadline.
pub fn context(client: Client) -> Context {
    let mut context = jetstream::new(client);
    context.set_timeout(Duration::from_secs(10));
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
    /// first id would be dropped inside the dedupe window).
    pub fn job(lane: Lane, client: ClientId, job: JobId, attempt: u32, body: Bytes) -> Self {
        Self::new(job_subject(lane, client), format!("{job}:{attempt}"), body)
    }

    /// The same job again, stored now and delivered at `due` by the broker itself, so that no process has to
    /// stay alive for it.
    pub fn retry(lane: Lane, client: ClientId, job: JobId, due: OffsetDateTime, body: Bytes) -> Self {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Schedule", format!("@at {}", instant(due)));
        headers.insert("Nats-Schedule-Target", due_subject(lane, client));
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

fn classify(error: &jetstream::context::PublishError) -> PublishError {
    use std::error::Error;
    let api_error =
        error.source().and_then(|source| source.downcast_ref::<jetstream::Error>()).map(|e| e.error_code().0);
    match (error.kind(), api_error) {
        (_, Some(STREAM_STORE_FAILED)) => PublishError::Full,
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
    }
}
