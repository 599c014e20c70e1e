//! What every request handler shares.

use std::sync::Arc;

use deadpool_postgres::Pool;
use dermflow_auth::{audit::trail::Trail, token::Tokens, users::Doorkeeper};
use dermflow_http::{
    rates::Rates,
    shares::{Share, Shares},
};
use dermflow_schemas::{error::Code, id::ClientId, job::Lane, limits, queue::Publisher, seal::Keyring};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{Access, Gate},
    bodies::Bodies,
    commit::Commits,
    drain::Drain,
    index::Index,
    lanes::Lanes,
    metrics::Metrics,
    providers::Providers,
    recorder::Awaited,
    retention::{self, Answered},
    store::Store,
};

/// The state of an ingress process: nothing in it outlives a request but bounds and connections.
#[derive(Debug)]
pub(crate) struct App {
    /// The origin that clients see, such as `https://localhost:8443`, without a slash at the end.
    pub(crate) public_url: String,
    /// The public listener asks for certificates of clients.
    pub(crate) asks_for_certificates: bool,
    pub(crate) store: Store,
    pub(crate) tokens: Tokens,
    pub(crate) providers: Providers,
    pub(crate) access: Access,
    pub(crate) trail: Trail,
    pub(crate) rates: Rates,
    pub(crate) doorkeeper: Doorkeeper,
    /// For signing in, beside the store's.
    pub(crate) sign_ins: Pool,
    pub(crate) keyring: Keyring,
    pub(crate) index: Index,
    pub(crate) nats: async_nats::Client,
    /// For all but bulk payloads.
    pub(crate) publisher: Publisher,
    /// For these, on a connection of its own: the broker flushes each message of a connection before it reads the next
    /// one, and nobody who waits shall stand behind a backlog.
    pub(crate) bulk_publisher: Publisher,
    pub(crate) commits: Commits,
    pub(crate) awaited: Awaited,
    pub(crate) drain: Drain,
    /// Cancelled when the process is told to stop: what could go on for long ends.
    pub(crate) draining: CancellationToken,
    pub(crate) lanes: Lanes,
    pub(crate) metrics: Metrics,
    pub(crate) bounds: Bounds,
}

impl App {
    /// The publisher of a lane's payloads.
    pub(crate) fn publisher_of(&self, lane: Lane) -> &Publisher {
        match lane {
            Lane::Interactive => &self.publisher,
            Lane::Bulk => &self.bulk_publisher,
        }
    }
}

impl Gate for App {
    fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    fn providers(&self) -> &Providers {
        &self.providers
    }

    fn access(&self) -> &Access {
        &self.access
    }

    fn trail(&self) -> &Trail {
        &self.trail
    }

    fn rates(&self) -> &Rates {
        &self.rates
    }

    fn store(&self) -> &Store {
        &self.store
    }

    async fn answered(&self, client: ClientId, reports: Vec<Answered>) -> Result<(), Code> {
        retention::answered(self, client, &reports).await
    }
}

/// What bounds the work in flight.
#[derive(Debug)]
pub(crate) struct Bounds {
    pub(crate) bodies: Arc<Bodies>,
    /// For callers who wait.
    pub(crate) waiters: Places,
    /// For those who do not.
    pub(crate) submitters: Places,
    /// For uploads to batches.
    pub(crate) uploads: Places,
}

impl Bounds {
    /// The bounds of [`limits`].
    pub(crate) fn new() -> Self {
        let kib = limits::BODY_MEMORY_BYTES / 1024;
        Self {
            bodies: Bodies::new(kib, kib / 2),
            waiters: Places::new(limits::MAX_WAITERS),
            submitters: Places::new(limits::MAX_SUBMITTERS),
            uploads: Places::new(limits::MAX_UPLOADS),
        }
    }
}

/// Places, of which one client has no more than half: the others find some, whatever it does.
#[derive(Debug)]
pub(crate) struct Places {
    all: Arc<Semaphore>,
    shares: Shares<ClientId>,
}

impl Places {
    fn new(places: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(places)), shares: Shares::new(places / 2) }
    }

    /// One of them, for `client`.
    ///
    /// # Errors
    /// [`Code::ConcurrencyExceeded`] when the client has its half, [`Code::Overloaded`] when none is left.
    pub(crate) fn take(&self, client: ClientId) -> Result<Place, Code> {
        let share = self.shares.take(client).ok_or(Code::ConcurrencyExceeded)?;
        let place = self.all.clone().try_acquire_owned().map_err(|_| Code::Overloaded)?;
        Ok(Place { _place: place, _share: share })
    }
}

/// A place that is taken until it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _place: OwnedSemaphorePermit,
    _share: Share<ClientId>,
}
