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
    provider::{
        Identity,
        links::{self, Link, Links},
    },
    revocation,
    token::{Caller, Tokens},
    users::{self, Quota, Standing},
};
use dermflow_http::rates::Rates;
use dermflow_schemas::{
    clock,
    error::Code,
    id::ClientId,
    limits::{ACCESS_INTERVAL, ACCESS_STALE, KEYS_INTERVAL},
};
use time::OffsetDateTime;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{providers::Providers, retention::Answered, store::Store};

/// What a process needs to know who may call it.
pub(crate) trait Gate: Send + Sync + 'static {
    /// Checks tokens.
    fn tokens(&self) -> &Tokens;
    /// Whose tokens are taken besides.
    fn providers(&self) -> &Providers;
    /// Who is shut out.
    fn access(&self) -> &Access;
    /// What is recorded of its callers.
    fn trail(&self) -> &Trail;
    /// How often clients may call.
    fn rates(&self) -> &Rates;
    /// Where the users are, and what they have.
    fn store(&self) -> &Store;

    /// Notes that reports go out to `client`, before they do.
    fn answered(
        &self,
        client: ClientId,
        reports: Vec<Answered>,
    ) -> impl Future<Output = Result<(), Code>> + Send;
}

/// Whether a caller with a valid token may call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may.
    Open,
    /// Its account is shut out, its token or what that was given for is revoked, or it is not bound and has to be.
    Revoked,
    /// The view is too old to say.
    Unknown,
}

#[derive(Debug, Default)]
struct View {
    /// The users that are not like all the others.
    exceptions: HashMap<ClientId, Standing>,
    revoked: HashSet<Uuid>,
    links: Links,
    /// When the database was asked for it.
    of: Option<Instant>,
}

impl View {
    fn is_stale(&self) -> bool {
        self.of.is_none_or(|of| of.elapsed() > ACCESS_STALE)
    }
}

/// The view is too old to say anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stale;

/// A token counts whole seconds: one of the same second may be from before.
fn is_from_before(issued_at: OffsetDateTime, after: OffsetDateTime) -> bool {
    issued_at.unix_timestamp() <= after.unix_timestamp()
}

fn speaks_for(link: &Link, identity: &Identity) -> Caller {
    let is_granted = identity.roles.contains(&link.role);
    Caller {
        client: link.client,
        jti: identity.jti,
        credential: link.id,
        issued_at: identity.issued_at,
        expires_at: identity.expires_at,
        scope: if is_granted { link.role.scope().into() } else { String::new() },
        bound_to: identity.bound_to,
    }
}

/// This replica's view of who may call.
#[derive(Debug)]
pub(crate) struct Access {
    view: RwLock<View>,
    /// The external providers, whose links are in the view.
    issuers: Vec<String>,
}

impl Access {
    /// A view that opens nothing yet. `issuers` are the external providers.
    pub(crate) fn new(issuers: Vec<String>) -> Self {
        Self { view: RwLock::default(), issuers }
    }

    /// What an account's token would say that a provider's says in its place: no more than the account's role, and
    /// that only if the provider grants it too. `None` when no account is linked, or none that may sign in.
    ///
    /// # Errors
    /// When the view is too old to say.
    pub(crate) fn caller(&self, identity: &Identity) -> Result<Option<Caller>, Stale> {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        if view.is_stale() {
            return Err(Stale);
        }
        let link = view.links.get(&identity.issuer).and_then(|links| links.get(&identity.subject));
        // The exceptions forget in time what concerns none of our own tokens; those of others live longer.
        let link = link
            .filter(|link| !link.valid_after.is_some_and(|after| is_from_before(identity.issued_at, after)));
        Ok(link.map(|link| speaks_for(link, identity)))
    }

    /// Whether a caller with a valid token may call.
    pub(crate) fn judge(&self, caller: &Caller) -> Verdict {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        if view.is_stale() {
            return Verdict::Unknown;
        }
        let standing = view.exceptions.get(&caller.client).copied().unwrap_or_default();
        let revoked = standing.closed
            || standing.valid_after.is_some_and(|after| is_from_before(caller.issued_at, after))
            || (standing.certificate_bound && caller.bound_to.is_none())
            || view.revoked.contains(&caller.jti)
            || view.revoked.contains(&caller.credential);
        if revoked { Verdict::Revoked } else { Verdict::Open }
    }

    /// Whether the view is too old to say anything, because the database is away.
    pub(crate) fn is_stale(&self) -> bool {
        self.view.read().unwrap_or_else(PoisonError::into_inner).is_stale()
    }

    /// What a client may have open at once.
    pub(crate) fn quota(&self, client: ClientId) -> Quota {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        view.exceptions.get(&client).copied().unwrap_or_default().quota
    }

    /// Looks at the database.
    pub(crate) async fn refresh(&self, pool: &Pool) {
        let of = Some(Instant::now());
        let links = links::all(pool, &self.issuers, clock::now());
        match tokio::try_join!(users::exceptions(pool), revocation::all(pool), links) {
            Ok((exceptions, revoked, links)) => {
                let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
                // Two may look at once: what the later one saw stays.
                if view.of < of {
                    *view = View { exceptions, revoked, links, of };
                }
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
            _ = look.tick() => gate.access().refresh(gate.store().pool()).await,
            _ = keys.tick() => {
                if let Err(error) = gate.tokens().reload() {
                    tracing::warn!(%error, "the signing keys stay as they were");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dermflow_schemas::clock;

    use super::*;

    fn caller() -> Caller {
        let (id, now) = (Uuid::new_v4(), clock::now());
        Caller {
            client: id.into(),
            jti: Uuid::new_v4(),
            credential: id,
            issued_at: now,
            expires_at: now + Duration::from_mins(15),
            scope: String::new(),
            bound_to: None,
        }
    }

    fn access(age: Duration, view: View) -> Access {
        let view = RwLock::new(View { of: Instant::now().checked_sub(age), ..view });
        Access { view, issuers: Vec::new() }
    }

    fn revoked(id: Uuid) -> View {
        View { revoked: HashSet::from([id]), ..View::default() }
    }

    /// I6: whoever was shut out since the last look is not known, so that nobody is let in.
    #[tokio::test]
    async fn an_old_view_lets_nobody_in() {
        assert_eq!(Access::new(Vec::new()).judge(&caller()), Verdict::Unknown, "no view yet");
        let second = Duration::from_secs(1);
        assert_eq!(
            access(ACCESS_STALE.saturating_sub(second), View::default()).judge(&caller()),
            Verdict::Open
        );
        assert_eq!(access(ACCESS_STALE + second, View::default()).judge(&caller()), Verdict::Unknown);
        // Nor is anybody told more than that.
        let caller = caller();
        let revoked = access(ACCESS_STALE + second, revoked(caller.jti));
        assert_eq!(revoked.judge(&caller), Verdict::Unknown);
    }

    /// A token counts whole seconds: one of the second of the revocation may be from before it.
    #[tokio::test]
    async fn a_token_of_the_second_of_the_revocation_is_refused() {
        let caller = caller();
        let judge = |valid_after: time::OffsetDateTime| {
            let standing = Standing { valid_after: Some(valid_after), ..Standing::default() };
            let exceptions = HashMap::from([(caller.client, standing)]);
            access(Duration::ZERO, View { exceptions, ..View::default() }).judge(&caller)
        };
        let second = caller.issued_at.replace_nanosecond(0).unwrap();
        assert_eq!(judge(second - Duration::from_secs(1)), Verdict::Open);
        for after in [second, second + Duration::from_millis(999), second + Duration::from_mins(1)] {
            assert_eq!(judge(after), Verdict::Revoked, "{after}");
        }
    }

    #[tokio::test]
    async fn a_revoked_id_refuses_by_token_and_by_credential() {
        let caller = caller();
        for id in [caller.jti, caller.credential] {
            assert_eq!(access(Duration::ZERO, revoked(id)).judge(&caller), Verdict::Revoked);
        }
    }
}
