//! Every limit of the system, with its reason. Nothing in flight is unbounded (invariant I3).

use std::time::Duration;

/// Images in one request: one case, seen up to three times.
pub const MAX_IMAGES: usize = 3;
/// Bytes of one image file. A 12-megapixel photograph as JPEG has 3 to 6 MB.
pub const MAX_IMAGE_BYTES: usize = 10 * 1024 * 1024;
/// Bytes of one request body. Base64 adds a third.
pub const MAX_BODY_BYTES: usize = 24 * 1024 * 1024;
/// The smallest side that an analysis makes sense for, in pixels.
pub const MIN_SIDE_PIXELS: u32 = 80;
/// The largest side, in pixels.
pub const MAX_SIDE_PIXELS: u32 = 12_000;
/// The largest area, in pixels: decoded to RGB it takes 120 MB in a worker.
pub const MAX_PIXELS: u64 = 40_000_000;
/// Memory that one decoder may allocate: [`MAX_PIXELS`] as 16-bit RGBA is refused, as 8-bit RGBA it fits.
pub const MAX_DECODE_BYTES: u64 = 192 * 1024 * 1024;
/// Memory that reading a header may take.
pub const MAX_HEADER_BYTES: u64 = 16 * 1024 * 1024;
/// JSON values in one request: a full request has about 60; more is an attempt to exhaust memory.
pub const MAX_JSON_VALUES: u32 = 2_000;
/// Bytes of a member's name in JSON.
pub const MAX_NAME_BYTES: usize = 128;
/// Characters of a string that is copied into the report.
pub const MAX_TEXT_CHARS: usize = 255;
/// Faults named in one answer.
pub const MAX_FAULTS: usize = 20;

/// Bytes of a login form: a name and the longest password, percent-encoded.
pub const MAX_FORM_BYTES: usize = 8 * 1024;

/// Request bodies held in memory at once, in bytes, per ingress process; the next one gets a 503.
pub const BODY_MEMORY_BYTES: usize = 384 * 1024 * 1024;
/// Sealed payloads on their way to the broker at once, in bytes, per ingress process. A frozen broker holds
/// no more than this of our memory.
pub const PUBLISH_MEMORY_BYTES: usize = 64 * 1024 * 1024;
/// Open connections per listener.
pub const MAX_CONNECTIONS: usize = 1_024;
/// Callers waiting for a result at once, per ingress process.
pub const MAX_WAITERS: usize = 512;
/// The longest synchronous wait.
pub const MAX_WAIT: Duration = Duration::from_mins(1);
/// The synchronous wait when the caller names none. Below the time-outs that HTTP clients start from (30 s).
pub const DEFAULT_WAIT: Duration = Duration::from_secs(25);
/// How often a waiter looks at the record itself, in case a wake-up was lost with a connection.
pub const WAITER_POLL: Duration = Duration::from_secs(1);
/// What a client is told to wait between two polls.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Status polls per second of one client; beyond it, 429.
pub const POLLS_PER_SECOND: u32 = 200;

/// A TLS handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// From the first byte of a request to the end of its header.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// A request body, whatever its size: 24 MiB in 30 s is 7 Mbit/s.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an unwanted body that are read and thrown away so that the answer reaches its caller.
pub const LINGER_BYTES: usize = 2 * MAX_BODY_BYTES;
/// The time for that.
pub const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// What an orderly shutdown of ingress waits for requests in flight: the longest wait, and its answer.
pub const INGRESS_DRAIN: Duration = Duration::from_secs(70);

/// The whole hand-over of a payload to the broker; after it the outcome is unknown and the answer 503.
pub const PUBLISH_DEADLINE: Duration = Duration::from_secs(2);
/// Between two looks, in a cluster, at whether the server that we are connected to still serves the queue, and the
/// time that it has to answer.
pub const CLUSTER_LOOK: Duration = Duration::from_secs(1);
/// Looks in a row without an answer after which we go to another server. Elections of a leader take longer at times,
/// and going elsewhere meanwhile does no harm.
pub const CLUSTER_SILENCE: u32 = 2;
/// A leader that has not heard from another server for this long has lost it: they talk every second.
pub const CLUSTER_CONTACT: Duration = Duration::from_secs(3);
/// Reconnections until we give up finding another server for now: of three, one comes up again once in three times.
pub const CLUSTER_TRIES: u32 = 4;
/// Commands that wait for a connection to the broker that is away: at the largest message, 256 MiB.
pub const BROKER_COMMANDS: usize = 32;
/// A connection from the pool to PostgreSQL, and each statement on it.
pub const DATABASE_DEADLINE: Duration = Duration::from_secs(2);
/// Connections to PostgreSQL per ingress process.
pub const DATABASE_CONNECTIONS: usize = 16;
/// The broker's largest message; a sealed payload that does not fit goes through the object store.
pub const MAX_MESSAGE_BYTES: usize = 8 * 1024 * 1024;
/// The largest payload that is published inline: [`MAX_MESSAGE_BYTES`] less room for the header.
pub const MAX_INLINE_BYTES: usize = MAX_MESSAGE_BYTES - 64 * 1024;

/// Attempts at one job, crashes of workers included, before it goes to the dead letters.
pub const MAX_ATTEMPTS: u32 = 5;
/// The pause before attempt 2, 3, 4, 5.
pub const BACKOFF: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(30), Duration::from_mins(2)];
/// How long the broker waits for a worker's sign of life before it hands the job to another one.
pub const DEFAULT_ACK_WAIT: Duration = Duration::from_secs(30);
/// One attempt at the model, all images together.
pub const DEFAULT_JOB_TIMEOUT: Duration = Duration::from_secs(30);
/// From acceptance to the end, interactive lane: nobody waits longer at a screen.
pub const INTERACTIVE_DEADLINE: Duration = Duration::from_mins(5);
/// From acceptance to the end, bulk lane.
pub const BULK_DEADLINE: Duration = Duration::from_hours(24);
/// A record that never reached the queue is settled after this; until then a retry with its key revives it.
pub const ACCEPTED_GRACE: Duration = Duration::from_mins(10);
/// Between two looks at which users are shut out: less than half of the second within which it must show.
pub const ACCESS_INTERVAL: Duration = Duration::from_millis(400);
/// Between two looks at the database's clock, which all replicas of ingress go by.
pub const CLOCK_INTERVAL: Duration = Duration::from_secs(10);
/// The machine's clock and the database's may differ by this: well below the 30 s of leeway for tokens, and above
/// what the question takes on its way.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(2);
/// Between two rounds of the sweeper.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Records settled or erased in one statement of the sweeper.
pub const SWEEP_BATCH: i64 = 500;
/// How long reports, records and idempotency keys are kept after the job's end.
pub const RETENTION: Duration = Duration::from_hours(24 * 7);
/// Results recorded in one transaction.
pub const RECORD_BATCH: usize = 64;
/// Bulk jobs that an interactive backlog lets through: one in this many.
pub const BULK_FLOOR: u32 = 5;

/// How long a worker's request for a job waits at the broker. Short, because a request that a restart of the
/// broker swallowed is only noticed when its answer is overdue.
pub const PULL_EXPIRES: Duration = Duration::from_secs(2);
/// How late the answer to such a request may be before it counts as lost.
pub const PULL_ANSWER: Duration = Duration::from_secs(2);
/// A worker's pause after a request that the broker refused or lost, and between two tries to publish.
pub const BROKER_PAUSE: Duration = Duration::from_millis(250);
/// How long a worker goes on offering a result to a broker that does not take it; then the job is left to
/// redelivery.
pub const RESULT_PATIENCE: Duration = Duration::from_secs(30);
/// Writing a payload of up to 24 MiB to the object store, in chunks: twice the deadline of a message.
pub const OBJECT_PUT_DEADLINE: Duration = Duration::from_secs(4);
/// Reading a payload from the object store.
pub const OBJECT_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of one sealed payload: [`MAX_IMAGES`] full images and room for the manifest.
pub const MAX_PAYLOAD_BYTES: usize = MAX_IMAGES * MAX_IMAGE_BYTES + 1024 * 1024;
/// Executor threads of one worker process.
pub const MAX_EXECUTORS: usize = 256;
/// The shortest time the broker may wait for a sign of life: progress acks go out every third of it, and must
/// survive a slow round trip.
pub const MIN_ACK_WAIT: Duration = Duration::from_secs(1);
