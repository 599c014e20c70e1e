//! I6: who is shut out, and what is revoked, is refused on every replica within a second, with no question to the
//! database on the way of a request.
//!
//! A view that is older than [`ACCESS_STALE`] opens nothing: the database is away, and so is everything that a caller
//! could want. Who comes then is told to come again.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
};

use deadpool_postgres::Pool;
use dermflow_auth::{
    audit::trail::Trail,
    revocation,
    token::{Caller, Tokens},
    users::{self, Quota, Standing},
};
use dermflow_schemas::{
    id::ClientId,
    limits::{ACCESS_INTERVAL, ACCESS_STALE, KEYS_INTERVAL},
};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::rates::Rates;

/// What a process needs to know who may call it.
pub(crate) trait Gate: Send + Sync + 'static {
    /// Checks tokens.
    fn tokens(&self) -> &Tokens;
    /// Who is shut out.
    fn access(&self) -> &Access;
    /// What is recorded of its callers.
    fn trail(&self) -> &Trail;
    /// How often clients may call.
    fn rates(&self) -> &Rates;
    /// Where the users are.
    fn users(&self) -> &Pool;
}

/// Whether a caller with a valid token may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may.
    Open,
    /// Its account is shut out, or its token or what that was given for is revoked.
    Revoked,
    /// The view is too old to say.
    Unknown,
}

#[derive(Debug, Default)]
struct View {
    /// The users that are not like all the others.
    exceptions: HashMap<ClientId, Standing>,
    revoked: HashSet<Uuid>,
    /// When the database was asked for it.
    of: Option<Instant>,
}

/// This replica's view of who may call.
#[derive(Debug, Default)]
pub(crate) struct Access(RwLock<View>);

impl Access {
    /// Whether a caller with a valid token may call.
    pub(crate) fn judge(&self, caller: &Caller) -> Verdict {
        let view = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if view.of.is_none_or(|of| of.elapsed() > ACCESS_STALE) {
            return Verdict::Unknown;
        }
        let standing = view.exceptions.get(&caller.client).copied().unwrap_or_default();
        // A token counts whole seconds: one of the same second may be from before.
        let too_old =
            |after: time::OffsetDateTime| caller.issued_at.unix_timestamp() <= after.unix_timestamp();
        let revoked = standing.closed
            || standing.valid_after.is_some_and(too_old)
            || view.revoked.contains(&caller.jti)
            || view.revoked.contains(&caller.credential);
        if revoked { Verdict::Revoked } else { Verdict::Open }
    }

    /// What a client may have open at once.
    pub(crate) fn quota(&self, client: ClientId) -> Quota {
        let view = self.0.read().unwrap_or_else(PoisonError::into_inner);
        view.exceptions.get(&client).copied().unwrap_or_default().quota
    }

    /// Looks at the database.
    pub(crate) async fn refresh(&self, pool: &Pool) {
        let of = Some(Instant::now());
        match tokio::try_join!(users::exceptions(pool), revocation::all(pool)) {
            Ok((exceptions, revoked)) => {
                *self.0.write().unwrap_or_else(PoisonError::into_inner) = View { exceptions, revoked, of };
            }
            Err(error) => tracing::debug!(%error, "the last view of the users holds, for a while"),
        }
    }
}

/// Keeps view and keys fresh until `stop`.
pub(crate) async fn run<G: Gate>(gate: Arc<G>, stop: CancellationToken) {
    let (mut look, mut keys) = (interval(ACCESS_INTERVAL), interval(KEYS_INTERVAL));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    keys.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => gate.access().refresh(gate.users()).await,
            _ = keys.tick() => {
                if let Err(error) = gate.tokens().reload() {
                    tracing::warn!(%error, "the signing keys stay as they were");
                }
            }
        }
    }
}
