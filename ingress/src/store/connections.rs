//! Connections to PostgreSQL, and who waits for one.

use deadpool_postgres::{Object, Pool, PoolError};
use dermflow_http::shares::Shares;
use dermflow_schemas::{
    error::Code,
    id::ClientId,
    limits::{DATABASE_QUEUE, DATABASE_QUEUE_SHARE},
};
use tokio::task::futures::TaskLocalFuture;

use crate::audited::Origin;

tokio::task_local! {
    static ASKING: Origin;
}

/// What `work` waits for is waited for by this caller, as soon as that is known.
pub(crate) fn asking<F: Future>(origin: Origin, work: F) -> TaskLocalFuture<Origin, F> {
    ASKING.scope(origin, work)
}

/// A pool whose queue no client fills. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub(crate) struct Connections {
    pool: Pool,
    waiting: Shares<ClientId>,
}

impl Connections {
    pub(crate) fn new(pool: Pool) -> Self {
        Self { pool, waiting: Shares::new(DATABASE_QUEUE_SHARE) }
    }

    /// For what nobody asks for.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The next connection that is free.
    pub(crate) async fn get(&self) -> Result<Object, PoolError> {
        let client = ASKING.try_with(Origin::user).ok().flatten();
        let _waiting = client.map(|client| self.waiting.add(client, 1));
        self.pool.get().await
    }

    /// New requests are not let in while too many wait: who waits already is answered first.
    ///
    /// # Errors
    /// [`Code::Overloaded`].
    pub(crate) fn has_room(&self) -> Result<(), Code> {
        has_room(&self.pool)
    }

    /// Nor are those of a client of whom too many wait. It is no refusal, which would have to be recorded: that takes a
    /// connection.
    ///
    /// # Errors
    /// [`Code::Overloaded`].
    pub(crate) fn has_room_for(&self, client: ClientId) -> Result<(), Code> {
        if self.waiting.has_room(&client) { Ok(()) } else { Err(Code::Overloaded) }
    }
}

/// See [`Connections::has_room`].
///
/// # Errors
/// [`Code::Overloaded`].
pub(crate) fn has_room(pool: &Pool) -> Result<(), Code> {
    if pool.status().waiting < DATABASE_QUEUE { Ok(()) } else { Err(Code::Overloaded) }
}
