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
/// Bytes that a decoder may take for the pixels of an image: three a pixel, or what the file has of each when that is more,
/// and of a JPEG that is progressive, or comes in several scans, two for each coefficient besides. With its file, its
/// program, and its share of a worker that has two, an executor has 200 MB.
pub const MAX_DECODE_BYTES: u64 = 110_000_000;
/// The largest area, in pixels.
pub const MAX_PIXELS: u64 = MAX_DECODE_BYTES / 3;
/// Address space of a decoder's process: that, the file twice, 20 MB for its program, and what is squashed to.
pub const DECODER_ADDRESS_SPACE: u64 = 192 * 1024 * 1024;
/// All images of an attempt in it, and in the one that takes its place: three times what three of the largest take. A
/// third of the job timeout at most, so that a decoder which hangs is ended before its executor counts as hung.
pub const DECODE_DEADLINE: Duration = Duration::from_secs(10);
/// Attempts at a job over which decoders died or did not finish in time, before its image is to blame: from the second one
/// on, a job has its worker for itself.
pub const DECODER_ATTEMPTS: u32 = 2;
/// After a decoder could not be started, before its executor gives the job back: what is short may come back, and an
/// executor that cannot work must not run through the queue.
pub const DECODER_PAUSE: Duration = Duration::from_secs(1);
/// JSON values in one request: a full request has about 60; more is an attempt to exhaust memory.
pub const MAX_JSON_VALUES: u32 = 2_000;
/// Bytes of a member's name in JSON.
pub const MAX_NAME_BYTES: usize = 128;
/// Characters of a string that is copied into the report.
pub const MAX_TEXT_CHARS: usize = 255;
/// Bytes of a heat map's file: five of each of three images fit into a message of [`MAX_MESSAGE_BYTES`] in Base64. Of 5 x 5
/// places and 12 megapixels it has 130,000 at most.
pub const MAX_HEAT_MAP_BYTES: usize = 400_000;
/// Heat maps of one image.
pub const MAX_HEAT_MAPS: u32 = 5;
/// Lesions of a kind that somebody may count on one patient, for a score.
pub const MAX_LESIONS: f64 = 1_000.0;
/// Faults named in one answer.
pub const MAX_FAULTS: usize = 20;

/// Bytes of a login form: a name and the longest password, percent-encoded.
pub const MAX_FORM_BYTES: usize = 8 * 1024;

/// Request bodies held in memory at once, and reports on their way out, in bytes, per ingress process, half of them of one
/// client; the next one gets a 503.
pub const BODY_MEMORY_BYTES: usize = 384 * 1024 * 1024;
/// How long a body waits for what newer ones were told to leave; more than they need for that, unless uploads are in line
/// before it.
pub const ROOM_PATIENCE: Duration = Duration::from_secs(1);
/// Sealed payloads, or results, on their way to the broker at once, in bytes, per connection that publishes. A frozen
/// broker holds no more than this of our memory: of an ingress process, which has two, 64 MiB.
pub const PUBLISH_MEMORY_BYTES: usize = 32 * 1024 * 1024;
/// Open connections per listener.
pub const MAX_CONNECTIONS: usize = 1_024;
/// Connections beyond them, whose first request is answered with 503. Further ones wait in the kernel's queue.
pub const SHED_CONNECTIONS: usize = 64;
/// Of them, those of one network, unless ingress is told otherwise.
pub const NETWORK_CONNECTIONS: usize = 512;
/// Connections that one network may end by breaking HTTP/2, with floods of frames for example, before it is let in no more
/// until the first of them is forgotten: the next one would be as bad, and begin with a handshake.
pub const BROKEN_CONNECTIONS: usize = 32;
/// How long such an end is remembered.
pub const BROKEN_MEMORY: Duration = Duration::from_mins(1);
/// Jobs that are recorded in one transaction and published together: those that came in while the group before
/// them was on its way.
pub const GROUP_JOBS: usize = 64;
/// Bytes of such a group, unless a single job has more.
pub const GROUP_BYTES: usize = 12 * 1024 * 1024;
/// What a group may lack of [`PUBLISH_DEADLINE`]: who has waited longer for one is refused before anything is recorded,
/// and does not cost the others of the group their time.
pub const GROUP_LEAST: Duration = Duration::from_millis(500);
/// Jobs of requests that wait for a group, of each lane and per ingress process; the next one gets a 503. At 350 a second
/// the last one waits for less than [`PUBLISH_DEADLINE`]. Of lines of uploads as many wait, and the next one waits for a
/// place.
pub const GROUP_QUEUE: usize = 512;

/// Jobs of one client that may be open at once, unless staff gave it another quota; the next one gets a 429.
pub const QUOTA_JOBS: i64 = 100_000;
/// Bytes of the images of one client's open jobs: half of what the queue holds.
pub const QUOTA_BYTES: i64 = 8 * 1024 * 1024 * 1024;
/// Bulk jobs of one client that workers have in hand at once.
pub const QUOTA_RUNNING: i64 = 1_000;

/// Lines of one upload to a batch.
pub const MAX_BATCH_LINES: usize = 50_000;
/// Characters of a line's `custom_id`, which may be a file's path.
pub const MAX_CUSTOM_ID_CHARS: usize = 255;
/// Uploads to batches at once, per ingress process, half of them of one client: its next one gets a 429, the next one
/// of all a 503.
pub const MAX_UPLOADS: usize = 64;
/// Bytes of lines that one upload has in hand; beyond it, the client's socket waits. One line may have more.
pub const UPLOAD_BYTES: usize = 5 * 1024 * 1024;
/// Lines that one upload has in hand.
pub const UPLOAD_LINES: usize = 64;
/// How long a line of an upload waits for the client's quota, or for the queue, to have room again.
pub const UPLOAD_PATIENCE: Duration = Duration::from_mins(1);
/// How long an upload may stay silent, in either direction.
pub const UPLOAD_SILENCE: Duration = Duration::from_secs(30);
/// How long an upload waits for memory for its next line: longer than its lines in hand, which may hold it, wait for room.
pub const UPLOAD_ROOM_PATIENCE: Duration = UPLOAD_PATIENCE.saturating_add(UPLOAD_SILENCE);
/// How long an upload that shows no sign of itself counts as going on: one whose ingress has died shows none.
pub const UPLOAD_LEASE: Duration = Duration::from_secs(30);
/// How often an upload shows that it goes on, and looks whether its batch is still there.
pub const UPLOAD_SHOWN: Duration = Duration::from_secs(5);
/// Entries in one FHIR batch: it is answered when all of them are, within one body.
pub const MAX_BUNDLE_ENTRIES: usize = 32;
/// Records in one page of a list.
pub const MAX_PAGE: usize = 1_000;
/// Records in one page when the caller names no number.
pub const DEFAULT_PAGE: usize = 50;
/// Reports on a page when the caller does not say how many.
pub const REPORT_PAGE: usize = 20;
/// Reports on a page at most: they are opened and held at once.
pub const MAX_REPORT_PAGE: usize = 50;
/// A page of reports ends after as many bytes, and the next one goes on from there: with heat maps one report has up to
/// 8 MB.
pub const REPORT_PAGE_BYTES: usize = 8 * 1024 * 1024;
/// Parameters of a search: FHIR lets them be repeated, and each is a condition of the statement.
pub const MAX_SEARCH_PARAMETERS: usize = 32;
/// Of the digests that reports are searched by: 128 bits, which no two texts share by chance.
pub const SEARCH_TOKEN_BYTES: usize = 16;
/// Reports that are read from the database at once while a batch's results are streamed.
pub const RESULTS_CHUNK: usize = 32;
/// Bytes of them, unless a single report has more.
pub const RESULTS_CHUNK_BYTES: usize = 2 * 1024 * 1024;

/// Callers waiting for a result at once, per ingress process, half of them of one client.
pub const MAX_WAITERS: usize = 512;
/// Callers who do not wait, while their jobs are accepted, per ingress process, half of them of one client.
pub const MAX_SUBMITTERS: usize = 512;
/// The longest synchronous wait.
pub const MAX_WAIT: Duration = Duration::from_mins(1);
/// The synchronous wait when the caller names none. Below the time-outs that HTTP clients start from (30 s).
pub const DEFAULT_WAIT: Duration = Duration::from_secs(25);
/// How often a waiter looks at the record itself, in case a wake-up was lost with a connection.
pub const WAITER_POLL: Duration = Duration::from_secs(1);
/// What a client is told to wait between two polls.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Over how long a client's requests are counted, and its polls, on all replicas together.
pub const REQUEST_WINDOW: Duration = Duration::from_secs(10);
/// Over how long its images are.
pub const IMAGE_WINDOW: Duration = Duration::from_mins(1);
/// Requests of one client a minute, but for polls, unless staff gave it another rate: more than one ingress process
/// can answer on two cores. Beyond it, 429.
pub const REQUESTS_PER_MINUTE: i64 = 60_000;
/// Images of one client a minute, unless staff gave it another rate.
pub const IMAGES_PER_MINUTE: i64 = 60_000;
/// Requests a minute from one IPv4 address, or one IPv6 /64, that do not show who sends them.
pub const ANONYMOUS_REQUESTS_PER_MINUTE: i64 = 60_000;
/// Requests a minute from one address of staff.
pub const STAFF_REQUESTS_PER_MINUTE: i64 = 6_000;
/// Status polls of one client a minute.
pub const POLLS_PER_MINUTE: i64 = 12_000;
/// Between two messages in which a replica tells the others what it has counted.
pub const COUNT_INTERVAL: Duration = Duration::from_millis(100);
/// A replica that was silent for this long is gone; when that is all of them, ourselves included, it is the broker
/// that is away.
pub const COUNT_SILENCE: Duration = Duration::from_secs(2);
/// Lines in one such message: 100 kB.
pub const COUNT_LINES: usize = 1_000;
/// Networks beyond which further ones share counts: 6 MB at each replica, and as much again for each other one.
pub const COUNTED_NETWORKS: usize = 16_384;

/// From a balancer's connection to the end of its PROXY header, which it sends at once.
pub const PROXY_HEADER_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes of such a header: addresses, and what else balancers put there, such as the name in a client's certificate.
pub const MAX_PROXY_HEADER_BYTES: usize = 4 * 1024;
/// A TLS handshake.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a replica looks at what replicas share about an ACME server's certificate.
pub const ACME_LOOK: Duration = Duration::from_secs(1);
/// Until every replica answers a new challenge.
pub const ACME_SPREAD: Duration = Duration::from_secs(3);
/// One try to get a certificate.
pub const ACME_DEADLINE: Duration = Duration::from_secs(100);
/// How long the replica that tries keeps others from it.
pub const ACME_LEASE: Duration = Duration::from_mins(2);
/// The pause after a first failure, doubled after each further one, and up to half of it less: Let's Encrypt lets five
/// failures an hour pass.
pub const ACME_RETRY: Duration = Duration::from_mins(10);
/// Its most, and the least between two certificates.
pub const ACME_RETRY_MOST: Duration = Duration::from_hours(6);
/// How long a peer may take nothing of what it is sent.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// When an ACME server is asked again when it wants a certificate renewed, if it does not say (RFC 9773 §4.3.3).
pub const ACME_ASK: Duration = Duration::from_hours(6);
/// How soon it may want to be asked again, and how late (RFC 9773 §4.3.2).
pub const ACME_ASK_BOUNDS: [Duration; 2] = [Duration::from_mins(1), Duration::from_hours(24)];
/// From the handshake to the end of the first request's header.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// From one request to the end of the next one's header: longer than the pauses of clients that take turns on a
/// connection, or that were told to wait, as over HTTP/1.1 a request may meet the end of its connection.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// A request body, whatever its size: 24 MiB in 30 s is 7 Mbit/s.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an unwanted body that are read and thrown away so that the answer reaches its caller.
pub const LINGER_BYTES: usize = 2 * MAX_BODY_BYTES;
/// The time for that.
pub const LINGER_TIMEOUT: Duration = Duration::from_secs(5);
/// What an orderly shutdown of ingress waits for requests in flight: the longest wait, and its answer.
pub const INGRESS_DRAIN: Duration = Duration::from_secs(70);

/// The whole hand-over of a payload to the broker; after it the outcome is unknown and the answer 503, which the caller
/// has within two seconds.
pub const PUBLISH_DEADLINE: Duration = Duration::from_millis(1_900);
/// Messages that go to the broker as one atomic batch. A batch costs the broker about as much as 20 single
/// messages, however many it holds (`bench publish`).
pub const ATOMIC_FROM: usize = 24;
/// The most messages of a batch; the broker's own limit is 1,000.
pub const ATOMIC_MESSAGES: usize = 500;
/// The most bytes of a batch, which the broker holds until it is complete.
pub const ATOMIC_BYTES: usize = 16 * 1024 * 1024;
/// Between two looks, in a cluster, at whether the server that we are connected to still serves the queue, and the
/// time that it has to answer.
pub const CLUSTER_LOOK: Duration = Duration::from_secs(1);
/// Looks in a row without a good answer after which we ask the other servers.
pub const CLUSTER_SILENCE: u32 = 2;
/// A leader that has not heard from another server for this long has lost it: they talk every second.
pub const CLUSTER_CONTACT: Duration = Duration::from_secs(3);
/// Commands that wait for a connection to the broker that is away: at the largest message, 256 MiB.
pub const BROKER_COMMANDS: usize = 32;
/// A connection from the pool to PostgreSQL, and each statement on it.
pub const DATABASE_DEADLINE: Duration = Duration::from_secs(2);
/// Connections to PostgreSQL per ingress process.
pub const DATABASE_CONNECTIONS: usize = 16;
/// Questions that wait for one of them; while there are as many, new requests get a 503. At a thousand a second the last
/// one waits for half a second.
pub const DATABASE_QUEUE: usize = 512;
/// Those of one client, whose next request gets a 503: the others find places, whatever it does.
pub const DATABASE_QUEUE_SHARE: usize = DATABASE_QUEUE / 2;
/// Between two looks at the certificate's files.
pub const CERTIFICATE_LOOK: Duration = Duration::from_secs(1);
/// Connections beside them for signing in, so that nobody's record waits behind logins.
pub const SIGN_IN_CONNECTIONS: usize = 4;
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
/// How old that look may be: then nobody is let in, as anybody may have been shut out since.
pub const ACCESS_STALE: Duration = Duration::from_secs(5);
/// Between two looks at the folder of signing keys, and at that of sealing keys.
pub const KEYS_INTERVAL: Duration = Duration::from_secs(5);
/// Between two runs of the program that prints the sealing keys.
pub const KEYS_COMMAND_INTERVAL: Duration = Duration::from_mins(1);
/// One run of it.
pub const KEYS_COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// How long before it seals anything a sealing key is there: every process has seen it by then, and those that have to
/// be started again for it have been.
pub const SEALING_LEAD: Duration = Duration::from_mins(10);
/// External identity providers: each costs a request a minute and replica.
pub const MAX_PROVIDERS: usize = 16;
/// Subjects of providers that are linked to accounts; every replica reads all of them with each look.
pub const MAX_LINKS: i64 = 10_000;
/// The longest token of a provider that is looked at: some list a user's groups.
pub const MAX_EXTERNAL_TOKEN_BYTES: usize = 8 * 1024;
/// How long a provider's token may live, from `iat` to `exp`.
pub const EXTERNAL_LIFETIME: Duration = Duration::from_hours(24);
/// Tokens of providers that are remembered as good, of each kind: about 10 MB.
pub const REMEMBERED_EXTERNAL: usize = 16_384;
/// Between two looks at a provider's keys: one that was removed there is refused no later than this after.
pub const KEY_SET_INTERVAL: Duration = Duration::from_mins(1);
/// Between two looks at them after one that failed.
pub const KEY_SET_RETRY: Duration = Duration::from_secs(10);
/// Between two looks at them because of an unknown `kid`, which anybody can make up.
pub const KEY_SET_PAUSE: Duration = Duration::from_secs(30);
/// How long a provider's keys stay in use while it is away.
pub const KEY_SET_STALE: Duration = Duration::from_hours(24);
/// Bytes of a provider's keys, of its description, or of its answer about a token.
pub const MAX_PROVIDER_BYTES: usize = 256 * 1024;
/// Keys in one set.
pub const MAX_KEY_SET: usize = 64;
/// A connection to a provider.
pub const PROVIDER_CONNECT: Duration = Duration::from_secs(2);
/// One question to a provider, the connection included.
pub const PROVIDER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a provider's word that a token is good holds, unless the token expires before.
pub const INTROSPECTION_CACHE: Duration = Duration::from_mins(1);
/// How long its word that a token is not good holds.
pub const INTROSPECTION_REFUSED: Duration = Duration::from_secs(10);
/// Opaque tokens that one provider is asked about at once, per ingress process; further ones wait as long as a
/// question takes.
pub const INTROSPECTIONS: usize = 16;
/// How long a provider that did not answer is not asked again.
pub const INTROSPECTION_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at how fast the queue drains.
pub const DRAIN_INTERVAL: Duration = Duration::from_secs(1);
/// Over how long the rate is measured.
pub const DRAIN_WINDOW: Duration = Duration::from_secs(10);
/// What a refused caller is told to wait when nothing drains.
pub const DRAIN_UNKNOWN: Duration = Duration::from_secs(30);
/// The most that a refused caller is told to wait.
pub const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// The shortest deadline that a caller may set with `Cancel-After`.
pub const MIN_CANCEL_AFTER: Duration = Duration::from_secs(5);
/// Between two looks at the database's clock, which all replicas of ingress go by.
pub const CLOCK_INTERVAL: Duration = Duration::from_secs(10);
/// The machine's clock and the database's may differ by this: well below the 30 s of leeway for tokens, and above
/// what the question takes on its way.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(2);
/// Between two rounds of the sweeper.
pub const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Records settled or erased in one statement of the sweeper.
pub const SWEEP_BATCH: i64 = 500;
/// Jobs of a deleted batch that are taken out of the queue at once, or ended jobs whose payloads are out of the object store.
pub const WITHDRAWALS: usize = 16;
/// How long the replica that sweeps may be silent before another takes its place: four rounds.
pub const SWEEP_LEASE: Duration = Duration::from_secs(20);
/// How long a job past its deadline is left open because its result waits to be recorded, or because the broker
/// cannot tell whether it does: the recorder catches up within seconds of an outage's end.
pub const SETTLE_PATIENCE: Duration = Duration::from_mins(5);
/// A job is looked for in the queue no earlier than this after it was queued: most have ended by then.
pub const LOST_GRACE: Duration = Duration::from_secs(10);
/// Rounds of the sweeper in a row in which a payload must be nowhere before it counts as lost.
pub const LOST_ROUNDS: u32 = 2;
/// Records in one statement when a round compares those of open jobs with what the broker says of its stream.
pub const LOST_SLICE: i64 = 10_000;
/// Jobs that one round may find without a payload, about 20 MB of them; the others are left to later rounds. Twice
/// [`QUOTA_JOBS`]: as many as one client may have open are reported within a minute.
pub const LOST_SUSPECTS: usize = 200_000;
/// Messages that one round asks for one by one, where what the broker says of its stream does not tell whose they are.
pub const LOST_LOOKS: usize = 4_000;
/// Messages that one round reads although nothing speaks against them, as damage on the broker's disk shows only
/// when a message is read: the first ones of clients, as many others, and as many in other streams. Among 10,000 jobs
/// that wait, each has been read after 157 rounds.
pub const LOST_SAMPLES: i64 = 64;
/// Bytes after which a round reads no more of these.
pub const LOST_SAMPLE_BYTES: usize = 32 * 1024 * 1024;
/// Questions to the broker at once while it looks.
pub const LOST_AT_ONCE: usize = 16;
/// Sequences of removed messages that the broker is asked to list: 1 MB. When there are more between the oldest and the
/// newest message, what is gone between these is found by samples only.
pub const MAX_GAPS: u64 = 100_000;
/// Between two looks at whether streams, consumers and the bucket exist: they are made again within 10 s.
pub const KEEP_INTERVAL: Duration = Duration::from_secs(2);
/// Consumers of one stream that are looked at, 256 an answer of the broker.
pub const MAX_CONSUMERS: usize = 20_000;
/// Between two looks for what is sealed with an older key.
pub const RESEAL_INTERVAL: Duration = Duration::from_secs(5);
/// Reports that are sealed anew in one transaction.
pub const RESEAL_BATCH: i64 = 32;
/// Bytes of them, unless a single report has more: they go both ways within [`DATABASE_DEADLINE`].
pub const RESEAL_BYTES: usize = 6 * 1024 * 1024;
/// After so long without progress `auth keys reseal` gives up: nobody seals anew.
pub const RESEAL_SILENCE: Duration = Duration::from_mins(1);
/// Days that reports, records and idempotency keys are kept after the job's end, unless staff gave the client another
/// number. With 0 a report goes with its answer, and all else, or a report that nobody asks for, after a day.
pub const RETENTION_DAYS: i16 = 7;
/// The most of these days: results are handed on, this is no archive.
pub const MAX_RETENTION_DAYS: i16 = 365;
/// The same of what cannot go with an answer: a batch may run for a day before its results are read ([`BULK_DEADLINE`]).
pub const MIN_RETENTION_DAYS: i16 = 1;
/// How long a report that is not kept can be asked for again after its first answer, as nobody knows whether that arrived:
/// longer than callers wait before they give a connection up (30 s to a minute) and come again.
pub const ANSWER_GRACE: Duration = Duration::from_mins(2);
/// Dead letters that the operators' process has in view to remove them in time: as many as fit into their stream at 40 kB.
pub const MAX_LETTERS: usize = 100_000;
/// How long workers' notes that attempts began wait for others: most jobs have ended by then, and what is left is one
/// transaction.
pub const NOTES_TOGETHER: Duration = Duration::from_millis(100);
/// Notes that are held meanwhile at most.
pub const NOTES_HELD: usize = 4_096;
/// Between two transactions with results that nobody waits for: one that comes alone is recorded at once, and those of a
/// burst share what a transaction costs.
pub const RECORD_INTERVAL: Duration = Duration::from_millis(50);
/// Results recorded in one transaction.
pub const RECORD_BATCH: usize = 64;
/// Bytes of them, unless a single result has more: well within [`DATABASE_DEADLINE`]. And more than [`MAX_MESSAGE_BYTES`],
/// as the broker is asked for no more at once.
pub const RECORD_BYTES: usize = 12 * 1024 * 1024;
/// Such transactions at once with results that callers wait for, per ingress process: one is formed while the other is on
/// its way to the disk.
pub const RECORD_GROUPS: usize = 2;
/// Bulk jobs that an interactive backlog lets through: one in this many.
pub const BULK_FLOOR: u32 = 5;
/// The largest weight of a client among those with bulk jobs: beyond it a client of weight 1 would hardly move.
pub const MAX_WEIGHT: u8 = 100;
/// Jobs of a consumer that workers have at once: no more than 16 workers with [`MAX_EXECUTORS`].
pub const IN_FLIGHT: i64 = 4_096;
/// Clients whose bulk jobs a worker, or an ingress process, has in view at once: about 1 MB. Others come in
/// view as soon as one of these has nothing left.
pub const BULK_CLIENTS: usize = 10_000;
/// The broker forgets the consumer of a client for whose bulk jobs no worker has asked for this long. Workers
/// ask at least every [`BULK_LOOK`] while there are any, so it is an idle client's, or no worker runs.
pub const BULK_CONSUMER_IDLE: Duration = Duration::from_hours(1);
/// How long ingress relies on having seen a client's consumer.
pub const BULK_CONSUMER_SEEN: Duration = Duration::from_mins(5);
/// Between two wake-ups for one client: a burst costs workers 20 messages a second.
pub const WAKE_INTERVAL: Duration = Duration::from_millis(50);
/// Wake-ups that a worker may be behind; one that is lost costs up to [`BULK_LOOK`].
pub const WAKE_BACKLOG: usize = 1_024;
/// Between a worker's looks at which clients have bulk jobs, for what wake-ups did not tell.
pub const BULK_LOOK: Duration = Duration::from_secs(1);
/// How long a request for a client's bulk job waits at the broker. Without a wait the broker keeps a request
/// open that comes while the client's jobs in flight are at their limit, and an ack that is on its way, or a
/// job that was stored this moment, would be missed.
pub const BULK_MOMENT: Duration = Duration::from_millis(2);
/// After which an idle worker asks again who had more jobs and then none within [`BULK_MOMENT`]: the broker may have had
/// to read a block of the stream first, or another worker's ack has made room. Twice as long each time, up to
/// [`BULK_RETRY_MAX`].
pub const BULK_RETRY: Duration = Duration::from_millis(2);
/// See [`BULK_RETRY`].
pub const BULK_RETRY_MAX: Duration = Duration::from_millis(64);
/// Clients that a worker asks in vain before it looks at the other lines again.
pub const BULK_PROBES: u32 = 4;

/// Dead letters in one page when the caller names no number.
pub const DEAD_PAGE: usize = 20;
/// Dead letters in one page.
pub const MAX_DEAD_PAGE: usize = 100;
/// A page of dead letters ends after as many bytes of payload, which the broker sends along.
pub const DEAD_PAGE_BYTES: usize = 64 * 1024 * 1024;
/// Connections to PostgreSQL of the operators' process.
pub const OPERATOR_CONNECTIONS: usize = 4;

/// How long a worker's request for a job waits at the broker. Short, because a request that a restart of the
/// broker swallowed is only noticed when its answer is overdue.
pub const PULL_EXPIRES: Duration = Duration::from_secs(2);
/// How late the answer to such a request may be before it counts as lost.
pub const PULL_ANSWER: Duration = Duration::from_secs(2);
/// How long before an executor should be free a worker asks for its next job: what two requests take at a broker that
/// flushes. An interactive job that comes meanwhile waits for as much longer, at most.
pub const ASK_AHEAD: Duration = Duration::from_millis(4);
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
/// Characters of a model's name, and of its version: both are labels of metrics.
pub const MAX_MODEL_CHARS: usize = 64;
/// Models of one worker: each executor has a session of each.
pub const MAX_MODELS: usize = 8;
/// The largest weight of a model: one job in a million is the smallest share.
pub const MAX_MODEL_WEIGHT: u32 = 1_000_000;
/// How long to wait for word whether a worker has a model. None is there at once when the broker says so.
pub const MODEL_QUESTION: Duration = Duration::from_millis(500);
/// A worker hands on a job for another's model until that one takes it, after a quarter of the time since it was
/// accepted, and up to [`PULL_EXPIRES`] more; but at least this.
pub const MODEL_PAUSE: Duration = Duration::from_millis(50);
/// And at most this: a job that waits for hours is handed on a few times a minute.
pub const MODEL_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Executor threads of one worker process.
pub const MAX_EXECUTORS: usize = 256;
/// The shortest time the broker may wait for a sign of life: progress acks go out every third of it, and must
/// survive a slow round trip.
pub const MIN_ACK_WAIT: Duration = Duration::from_secs(1);

/// Audit events that wait to be written, per ingress process; what needs another one is answered with 503.
pub const AUDIT_QUEUE: usize = 4_096;
/// Audit events in one statement: those that came in while the one before it was on its way.
pub const AUDIT_GROUP: usize = 256;
/// How long an event waits for its turn: what one question to a database that does not answer takes. Who waits for it is
/// told then that it cannot be written.
pub const AUDIT_PATIENCE: Duration = Duration::from_secs(4);
/// Such statements at once, per ingress process.
pub const AUDIT_WRITERS: usize = 2;
/// Refusals, or questions how far something is, of one kind, caller and network that are an event each every second;
/// the rest of that second are events together.
pub const AUDIT_SINGLES: u32 = 5;
/// How long these wait for others of their kind.
pub const AUDIT_TOGETHER: Duration = Duration::from_millis(50);
/// Different things that one of their events is about at most.
pub const AUDIT_ABOUT: usize = 64;
/// Kinds of these that are told apart at once; beyond it the network of callers whom nobody knows is left out.
pub const AUDIT_SOURCES: usize = 4_096;
/// Between two looks for events that are not in the hash chain yet.
pub const AUDIT_CHAIN_INTERVAL: Duration = Duration::from_millis(500);
/// Events that are chained in one transaction.
pub const AUDIT_CHAIN_BATCH: i64 = 4_096;
/// The latest links, among whose events those are looked for that were committed late. Beyond it they are found by
/// `auth audit verify`.
pub const AUDIT_CHAIN_RECENT: i64 = 2_048;
/// How much older than an event before it in the chain an event may be: more than any transaction takes and clocks
/// differ. One that is older was put in afterwards.
pub const AUDIT_LATE: Duration = Duration::from_mins(10);
/// Audit events that are removed in one transaction.
pub const AUDIT_PRUNE_BATCH: i64 = 100_000;
/// What `auth audit` commands give a statement: they look at all there is.
pub const AUDIT_COMMAND_DEADLINE: Duration = Duration::from_mins(10);

/// How long staff may stay signed in at the registration service: a working day (NIST SP 800-63B-4 §2.2.3 allows 24
/// hours).
pub const STAFF_SESSION: Duration = Duration::from_hours(8);
/// How long a session of staff may lie idle (NIST allows an hour).
pub const STAFF_IDLE: Duration = Duration::from_mins(30);
/// The use of a session is noted to this: not every request should cost a write.
pub const STAFF_IDLE_STEP: Duration = Duration::from_mins(1);
/// Sessions of one member of staff at once; one more ends the oldest.
pub const STAFF_SESSIONS: i64 = 16;
/// Bytes of a request to the registration service: a public key is the largest thing in one.
pub const MAX_STAFF_BODY_BYTES: usize = 64 * 1024;
/// Connections to PostgreSQL of the registration service.
pub const STAFF_CONNECTIONS: usize = 8;
