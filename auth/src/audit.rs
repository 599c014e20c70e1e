//! The audit trail: who did what to whose data, when, from where, and what came of it.
//!
//! The table only grows; [`chain`] makes every later change of it show. What is in an event is codes, numbers and
//! opaque ids: no image, no token, no password, no name.

pub mod chain;
pub mod fhir;
pub mod search;
pub mod trail;

use std::{borrow::Cow, net::IpAddr};

use deadpool_postgres::{GenericClient, Pool};
use dermflow_schemas::{
    error::Code,
    id::{ClientId, JobId},
};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio_postgres::types::Json;
use uuid::Uuid;

use crate::db::{DbError, within};

macro_rules! actions {
    ($($(#[$doc:meta])* $variant:ident $word:literal $letter:literal $kind:ident,)*) => {
        /// What was done.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Action {
            $($(#[$doc])* $variant,)*
        }

        /// Every action.
        pub const ACTIONS: &[Action] = &[$(Action::$variant),*];

        impl Action {
            /// The word in the table.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }

            /// Create, read, update, delete or execute: the code of FHIR's `audit-event-action`.
            pub fn letter(self) -> &'static str {
                match self {
                    $(Self::$variant => $letter,)*
                }
            }

            fn kind(self) -> fhir::Kind {
                match self {
                    $(Self::$variant => fhir::Kind::$kind,)*
                }
            }
        }
    };
}

actions! {
    /// Somebody tried to sign in.
    Login "login" "E" Login,
    /// Staff signed out.
    Logout "logout" "E" Logout,
    /// A request was refused: no valid token, or not one for this.
    Access "access" "E" Alert,
    /// Jobs were accepted. A failed one: the queue would not have them after all.
    Submit "submit" "E" Operation,
    /// A request asked for what cannot be done: it is malformed, too large, or about what is not there for its client.
    Request "request" "E" Operation,
    /// A score was computed from a client's answers.
    Assess "assess" "E" Operation,
    /// A report was handed out.
    Read "read" "R" Read,
    /// A client asked how far its own jobs or batches are.
    StatusRead "status-read" "R" Read,
    /// The reports, or the errors, of a batch were handed out.
    BatchRead "batch-read" "R" Read,
    /// A client withdrew its job, or removed the result.
    JobWithdrawn "job-withdrawn" "D" Delete,
    /// A client withdrew a batch.
    BatchWithdrawn "batch-withdrawn" "D" Delete,
    /// The sweeper ended jobs that did not move.
    JobSettled "job-settled" "U" Application,
    /// The sweeper ended jobs whose payload is gone.
    PayloadLost "payload-lost" "U" Application,
    /// The sweeper erased jobs with their reports, past their retention.
    JobsErased "jobs-erased" "D" Application,
    /// Reports were removed after, or with, their answer, as their client has none kept.
    ReportsRemoved "reports-removed" "D" Application,
    /// An operator put a dead letter back into the queue.
    DeadRequeued "dead-requeued" "U" Application,
    /// An operator looked at dead letters.
    DeadRead "dead-read" "R" Application,
    /// A dead letter was removed, by an operator or past its client's retention.
    DeadPurged "dead-purged" "D" Application,
    /// A stream, consumer or bucket was gone and has been made again, empty.
    QueueRecreated "queue-recreated" "C" Application,
    /// An auditor read the trail.
    TrailRead "trail-read" "R" LogUsed,
    /// The trail was exported.
    TrailExported "trail-exported" "R" Export,
    /// The oldest events were removed.
    TrailPruned "trail-pruned" "D" LogUsed,
    /// Staff looked at accounts.
    AccountRead "account-read" "R" Read,
    /// A user was registered.
    UserCreated "user-created" "C" Security,
    /// A user was shut out.
    UserDisabled "user-disabled" "U" Security,
    /// A user was let in again.
    UserEnabled "user-enabled" "U" Security,
    /// A user's role, quota, contact or expiry was changed.
    UserChanged "user-changed" "U" Security,
    /// A user was deleted.
    UserDeleted "user-deleted" "D" Security,
    /// A user was given another password.
    PasswordSet "password-set" "U" Security,
    /// Everything that a user was given was ended.
    SessionsRevoked "sessions-revoked" "U" Security,
    /// A client was given a secret, or a key of its was registered.
    CredentialAdded "credential-added" "C" Security,
    /// A secret or key of a client was removed.
    CredentialRemoved "credential-removed" "D" Security,
    /// A subject of an external provider was made an account.
    IdentityLinked "identity-linked" "C" Security,
    /// A subject of an external provider is that account no more.
    IdentityUnlinked "identity-unlinked" "D" Security,
    /// A client revoked a token.
    TokenRevoked "token-revoked" "U" Security,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Success,
    /// It was not allowed.
    Refused,
    /// It was tried and did not succeed.
    Failed,
}

impl Outcome {
    /// The word in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }
}

/// Who did it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Actor {
    /// A registered user.
    User(ClientId),
    /// A part of the system, such as `sweeper`.
    Part(&'static str),
    /// Somebody who did not prove to be anybody.
    Unknown,
}

impl Actor {
    /// The word in the table.
    pub fn kind(self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Part(_) => "part",
            Self::Unknown => "unknown",
        }
    }

    /// The id or name.
    pub fn id(self) -> Option<String> {
        match self {
            Self::User(user) => Some(user.to_string()),
            Self::Part(part) => Some(part.to_owned()),
            Self::Unknown => None,
        }
    }
}

/// Who did it, and by which way it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Who {
    /// Who.
    pub actor: Actor,
    /// The caller's network address.
    pub source: Option<IpAddr>,
    /// The HTTP request.
    pub request: Option<Uuid>,
}

impl Who {
    /// A part of the system, on its own account.
    pub fn part(name: &'static str) -> Self {
        Self { actor: Actor::Part(name), source: None, request: None }
    }

    /// The source as it is recorded.
    pub fn source(&self) -> Option<String> {
        // An address that is IPv4 in truth is written as such.
        self.source.map(|source| source.to_canonical().to_string())
    }
}

/// What it was done to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    kind: &'static str,
    id: Cow<'static, str>,
}

impl Object {
    fn new(kind: &'static str, id: &impl ToString) -> Self {
        Self { kind, id: id.to_string().into() }
    }

    /// A job.
    pub fn job(job: JobId) -> Self {
        Self::new("job", &job)
    }

    /// A job's report.
    pub fn report(job: JobId) -> Self {
        Self::new("report", &job)
    }

    /// A batch.
    pub fn batch(batch: Uuid) -> Self {
        Self::new("batch", &batch)
    }

    /// A user's account.
    pub fn account(user: ClientId) -> Self {
        Self::new("account", &user)
    }

    /// A credential, such as a token, by its id.
    pub fn credential(id: Uuid) -> Self {
        Self::new("credential", &id)
    }

    /// A key, by its id.
    pub fn key(id: &str) -> Self {
        Self::new("key", &id)
    }

    /// An event of the trail.
    pub fn event(event: i64) -> Self {
        Self::new("event", &event)
    }
}

/// An entry of the trail.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// When.
    pub at: OffsetDateTime,
    /// Who, and by which way.
    pub who: Who,
    /// What.
    pub action: Action,
    /// What came of it.
    pub outcome: Outcome,
    /// Why not, or with which code.
    pub code: Option<Code>,
    /// Whose data.
    pub client: Option<ClientId>,
    /// What it was done to.
    pub object: Option<Object>,
    /// Codes and numbers.
    pub detail: Value,
}

impl Event {
    /// Something that was done.
    pub fn new(action: Action, who: Who, at: OffsetDateTime) -> Self {
        let outcome = Outcome::Success;
        Self { at, who, action, outcome, code: None, client: None, object: None, detail: json!({}) }
    }

    /// With the outcome, and why.
    #[must_use]
    pub fn outcome(mut self, outcome: Outcome, code: Code) -> Self {
        (self.outcome, self.code) = (outcome, Some(code));
        self
    }

    /// With the code that it was done with.
    #[must_use]
    pub fn code(mut self, code: Code) -> Self {
        self.code = Some(code);
        self
    }

    /// To this client's data.
    #[must_use]
    pub fn client(mut self, client: Option<ClientId>) -> Self {
        self.client = client;
        self
    }

    /// To this object.
    #[must_use]
    pub fn object(mut self, object: Option<Object>) -> Self {
        self.object = object;
        self
    }

    /// With codes and numbers, a JSON object.
    #[must_use]
    pub fn detail(mut self, detail: Value) -> Self {
        self.detail = detail;
        self
    }

    /// With more of it.
    #[must_use]
    pub fn with(mut self, more: Value) -> Self {
        if let (Some(detail), Value::Object(more)) = (self.detail.as_object_mut(), more) {
            detail.extend(more.into_iter().filter(|(_, value)| !value.is_null()));
        }
        self
    }
}

/// Adds events, all or none, in one statement. Within a transaction they are recorded with what they are about.
///
/// # Errors
/// When the database is away.
pub async fn insert(client: &impl GenericClient, events: &[Event]) -> Result<(), DbError> {
    let insert = client
        .prepare_cached(
            "INSERT INTO auth.audit (at, actor_kind, actor, action, outcome, code, client, object_kind, object, \
             source, request, detail) SELECT * FROM unnest($1::timestamptz[], $2::text[], $3::text[], $4::text[], \
             $5::text[], $6::text[], $7::uuid[], $8::text[], $9::text[], $10::text[], $11::uuid[], $12::jsonb[])",
        )
        .await?;
    let times: Vec<OffsetDateTime> = events.iter().map(|event| event.at).collect();
    let kinds: Vec<&str> = events.iter().map(|event| event.who.actor.kind()).collect();
    let actors: Vec<Option<String>> = events.iter().map(|event| event.who.actor.id()).collect();
    let actions: Vec<&str> = events.iter().map(|event| event.action.as_str()).collect();
    let outcomes: Vec<&str> = events.iter().map(|event| event.outcome.as_str()).collect();
    let codes: Vec<Option<&str>> =
        events.iter().map(|event| event.code.map(|code| code.kind().code)).collect();
    let clients: Vec<Option<Uuid>> = events.iter().map(|event| event.client.map(ClientId::uuid)).collect();
    let objects = || events.iter().map(|event| event.object.as_ref());
    let object_kinds: Vec<Option<&str>> = objects().map(|object| object.map(|object| object.kind)).collect();
    let ids: Vec<Option<&str>> = objects().map(|object| object.map(|object| &*object.id)).collect();
    let sources: Vec<Option<String>> = events.iter().map(|event| event.who.source()).collect();
    let requests: Vec<Option<Uuid>> = events.iter().map(|event| event.who.request).collect();
    let details: Vec<Json<&Value>> = events.iter().map(|event| Json(&event.detail)).collect();
    client
        .execute(
            &insert,
            &[
                &times,
                &kinds,
                &actors,
                &actions,
                &outcomes,
                &codes,
                &clients,
                &object_kinds,
                &ids,
                &sources,
                &requests,
                &details,
            ],
        )
        .await?;
    Ok(())
}

/// As [`insert`], with a connection from the pool.
///
/// # Errors
/// When the database is away.
pub async fn record(pool: &Pool, events: &[Event]) -> Result<(), DbError> {
    within(async { insert(&pool.get().await?, events).await }).await
}

/// Whether there is a trail to write to.
///
/// # Errors
/// When there is none, or the database is away.
pub async fn ready(pool: &Pool) -> Result<(), DbError> {
    within(async {
        pool.get().await?.batch_execute("SELECT FROM auth.audit LIMIT 0").await?;
        Ok(())
    })
    .await
}

/// The part of the system that staff's commands are.
pub const COMMAND: &str = "auth";

/// Who runs the command, by the number of the user of the operating system.
pub fn command_detail() -> Value {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata("/proc/self") {
        Ok(process) => json!({ "uid": process.uid() }),
        Err(_) => json!({}),
    }
}

/// The account of this name. For the trail: a caller who is refused must not learn whether there is one.
///
/// # Errors
/// When the database is away.
pub async fn account_named(pool: &Pool, name: &str) -> Result<Option<ClientId>, DbError> {
    // No account has a name that PostgreSQL cannot hold.
    if name.contains('\0') {
        return Ok(None);
    }
    within(async {
        let select = "SELECT id FROM auth.users WHERE username = $1";
        let row = pool.get().await?.query_opt(select, &[&name]).await?;
        Ok(row.map(|row| row.get::<_, Uuid>(0).into()))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_action_has_a_word_of_its_own() {
        let words: std::collections::HashSet<&str> = ACTIONS.iter().map(|action| action.as_str()).collect();
        assert_eq!(words.len(), ACTIONS.len());
        assert!(ACTIONS.iter().all(|action| "CRUDE".contains(action.letter())));
    }

    #[test]
    fn an_ipv4_caller_on_an_ipv6_socket_is_written_as_ipv4() {
        let source = Some("::ffff:192.0.2.17".parse().unwrap());
        assert_eq!(Who { source, ..Who::part("x") }.source().as_deref(), Some("192.0.2.17"));
    }
}
