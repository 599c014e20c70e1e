//! I6: who is shut out is refused on every replica within a second, with no question to the database on the way
//! of a request.
//!
//! While the database is away the last view holds: tokens still verify, as the failure table of the architecture
//! promises, and nobody new can be shut out either.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use deadpool_postgres::Pool;
use dermflow_auth::{
    token::Tokens,
    users::{self, Quota, Standing},
};
use dermflow_schemas::{id::ClientId, limits::ACCESS_INTERVAL};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::rates::Rates;

/// What a process needs to know who may call it.
pub(crate) trait Gate: Send + Sync + 'static {
    /// Checks tokens.
    fn tokens(&self) -> &Tokens;
    /// Who is shut out.
    fn access(&self) -> &Access;
    /// How often clients may call.
    fn rates(&self) -> &Rates;
    /// Where the users are.
    fn users(&self) -> &Pool;
}

/// This replica's view of the users that are not like all the others.
#[derive(Debug, Default)]
pub(crate) struct Access {
    exceptions: RwLock<HashMap<ClientId, Standing>>,
}

impl Access {
    /// Whether a client with a valid token may call.
    pub(crate) fn permits(&self, client: ClientId) -> bool {
        !self.standing(client).disabled
    }

    /// What a client may have open at once.
    pub(crate) fn quota(&self, client: ClientId) -> Quota {
        self.standing(client).quota
    }

    fn standing(&self, client: ClientId) -> Standing {
        let exceptions = self.exceptions.read().unwrap_or_else(PoisonError::into_inner);
        exceptions.get(&client).copied().unwrap_or_default()
    }

    /// Looks at the database.
    pub(crate) async fn refresh(&self, pool: &Pool) {
        match users::exceptions(pool).await {
            Ok(fresh) => *self.exceptions.write().unwrap_or_else(PoisonError::into_inner) = fresh,
            Err(error) => tracing::debug!(%error, "the last view of the users holds"),
        }
    }
}

/// Keeps the view fresh until `stop`.
pub(crate) async fn run<G: Gate>(gate: Arc<G>, stop: CancellationToken) {
    let mut tick = interval(ACCESS_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => gate.access().refresh(gate.users()).await,
        }
    }
}
