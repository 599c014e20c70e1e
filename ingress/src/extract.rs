//! What handlers take from a request before they look at it: who calls, its id, its body within bounds.

use std::{marker::PhantomData, sync::Arc};

use axum::{
    body::Body as AxumBody,
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use bytes::{Bytes, BytesMut};
use dermflow_auth::{
    audit::{Action, Event, Object, Who},
    scope::Permission,
    token::{self, TokenError},
    users,
};
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    id::{ClientId, JobId},
    limits::BODY_TIMEOUT,
};
use futures_util::StreamExt;
use serde_json::json;
use time::OffsetDateTime;
use tokio::{select, time::timeout};

use crate::{
    access::{Gate, Stale, Verdict},
    answer::{EXPIRED, Problem},
    app::App,
    audited::Origin,
    bodies::{Memory, Share, kib_of},
    providers::{Proof, Trouble},
    rates,
    store::connections::has_room,
};

/// What a handler's callers must be permitted.
pub(crate) trait Needs {
    /// The permission.
    const PERMISSION: Permission;
}

macro_rules! needs {
    ($($permission:ident)*) => {
        $(
            #[doc = concat!("See [`Permission::", stringify!($permission), "`].")]
            #[derive(Debug)]
            pub(crate) enum $permission {}

            impl Needs for $permission {
                const PERMISSION: Permission = Permission::$permission;
            }
        )*
    };
}

needs! { Submit Read Search Delete Operate ReadTrail SearchTrail }

/// A caller with a valid access token that permits `P`. A handler that takes one is closed to everybody else: its
/// signature is its access rule.
#[derive(Debug)]
pub(crate) struct Allowed<P> {
    /// Who calls.
    pub(crate) client: ClientId,
    /// What its token says.
    pub(crate) caller: Arc<token::Caller>,
    /// By which way it came, for the audit trail.
    pub(crate) who: Who,
    _permission: PhantomData<P>,
}

impl<G: Gate, P: Needs> FromRequestParts<Arc<G>> for Allowed<P> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, gate: &Arc<G>) -> Result<Self, Problem> {
        gate.store().connections().has_room()?;
        let origin = parts.extensions.get::<Origin>().cloned().unwrap_or_default();
        let caller = bearer(&parts.headers, gate.as_ref(), &origin).await?;
        rates::charge_request(gate.as_ref(), caller.client, parts)?;
        gate.store().connections().has_room_for(caller.client)?;
        if !caller.may(P::PERMISSION) {
            return Err(Code::Forbidden.into());
        }
        Ok(Self { client: caller.client, caller, who: origin.who(), _permission: PhantomData })
    }
}

/// What a caller was let in with, for what goes on for longer than its token, account or certificate may be good.
#[derive(Debug)]
pub(crate) struct Pass {
    /// Its token, which is not printed.
    headers: HeaderMap,
    origin: Origin,
}

impl<S: Send + Sync> FromRequestParts<S> for Pass {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let origin = parts.extensions.get::<Origin>().cloned().unwrap_or_default();
        let token = parts.headers.get(header::AUTHORIZATION).cloned().map(|mut value| {
            value.set_sensitive(true);
            (header::AUTHORIZATION, value)
        });
        Ok(Self { headers: token.into_iter().collect(), origin })
    }
}

impl Pass {
    /// Whether the caller would be let in now.
    ///
    /// # Errors
    /// What a new request would be told.
    pub(crate) async fn check<G: Gate>(&self, gate: &G) -> Result<(), Problem> {
        if self.origin.lacks_certificate() {
            return Err(Code::ClientCertificateNeeded.into());
        }
        bearer(&self.headers, gate, &self.origin).await.map(drop)
    }
}

/// Whether there is room for who signs in. It is the record that is out of reach: that a sign-in found no place would have
/// to be recorded.
///
/// # Errors
/// [`Code::DatabaseUnavailable`].
pub(crate) fn sign_ins_have_room(app: &App) -> Result<(), Problem> {
    Ok(has_room(&app.sign_ins).map_err(|_| Code::DatabaseUnavailable)?)
}

/// Who calls. The token comes from the one `Authorization` header (RFC 6750 §2.1), never from the URL. Why it is
/// refused goes to the log: every refusal looks the same from outside, but that of a token of ours that has expired.
pub(crate) async fn bearer<G: Gate>(
    headers: &HeaderMap,
    gate: &G,
    origin: &Origin,
) -> Result<Arc<token::Caller>, Problem> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Err(unauthenticated("Bearer")) };
    let refused = || unauthenticated("Bearer error=\"invalid_token\"");
    if values.next().is_some() {
        return Err(refused());
    }
    let value = value.to_str().ok().and_then(|value| value.split_once(' '));
    let token = value.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token);
    let (token, now) = (token.unwrap_or_default(), clock::now());
    let (caller, proof) = match gate.tokens().verify(token, now) {
        Ok(caller) => (Arc::new(caller), None),
        Err(error) => match external(gate, token, now).await {
            Ok((caller, proof)) => (Arc::new(caller), Some(proof)),
            Err(Foreign::Refused(why)) => {
                tracing::info!(%error, external = why, "access refused");
                return Err(if matches!(error, TokenError::Expired) { expired() } else { refused() });
            }
            Err(Foreign::Unknown(code)) => return Err(code.into()),
        },
    };
    if caller.bound_to.is_some() && caller.bound_to != origin.certificate() {
        tracing::info!(client = %caller.client, "access refused: bound to another certificate");
        origin.claims(Some(caller.client));
        return Err(refused());
    }
    match gate.access().judge(&caller) {
        Verdict::Open => {
            origin.is(caller.client);
            if let Some(proof) = proof {
                proof.noted.get_or_try_init(|| note(gate, &caller, &proof, origin, now)).await?;
            }
            Ok(caller)
        }
        Verdict::Revoked => {
            tracing::info!(client = %caller.client, "access refused: revoked");
            origin.claims(Some(caller.client));
            Err(refused())
        }
        Verdict::Unknown => Err(Code::DatabaseUnavailable.into()),
    }
}

/// Why a token that is not ours opens nothing.
enum Foreign {
    /// For the log.
    Refused(&'static str),
    /// Nobody can tell at present.
    Unknown(Code),
}

/// Which account a token of an external provider speaks for.
async fn external<G: Gate>(
    gate: &G,
    token: &str,
    now: OffsetDateTime,
) -> Result<(token::Caller, Arc<Proof>), Foreign> {
    let proof = gate.providers().verify(token, now).await.map_err(|trouble| match trouble {
        Trouble::Refused(why) => Foreign::Refused(why),
        Trouble::Unavailable => Foreign::Unknown(Code::ProviderUnavailable),
        Trouble::Busy => Foreign::Unknown(Code::Overloaded),
    })?;
    let caller = gate.access().caller(&proof.identity);
    let caller = caller.map_err(|Stale| Foreign::Unknown(Code::DatabaseUnavailable))?;
    Ok((caller.ok_or(Foreign::Refused("linked to no account that may sign in"))?, proof))
}

/// The first time that a replica sees a token of a provider is what a login is with us.
async fn note<G: Gate>(
    gate: &G,
    caller: &token::Caller,
    proof: &Proof,
    origin: &Origin,
    now: OffsetDateTime,
) -> Result<(), Problem> {
    let event = Event::new(Action::Login, origin.who(), now).client(Some(caller.client));
    let event = event.object(Some(Object::account(caller.client)));
    gate.trail().repeated(event.detail(json!({ "issuer": proof.identity.issuer }))).await?;
    Ok(users::used(gate.store().pool(), caller.client, None, now).await?)
}

/// Who holds a token of ours that is over may know it (RFC 6750 §3.1).
fn expired() -> Problem {
    let challenge = "Bearer error=\"invalid_token\", error_description=\"The access token expired\"";
    Problem::from(ApiError::from(Code::Unauthenticated).detail(EXPIRED))
        .header(header::WWW_AUTHENTICATE, challenge)
}

fn unauthenticated(challenge: &str) -> Problem {
    Problem::from(Code::Unauthenticated).header(header::WWW_AUTHENTICATE, challenge)
}

/// A request body that has not been read: its handler first decides whether it wants it.
#[derive(Debug)]
pub(crate) struct Body {
    announced: Option<usize>,
    body: AxumBody,
}

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse().ok());
        Ok(Self { announced, body: request.into_body() })
    }
}

/// A body in memory, with the permit that accounts for it.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) bytes: Bytes,
    pub(crate) memory: Memory,
}

impl Body {
    /// The body, for a handler that reads it bit by bit.
    pub(crate) fn into_inner(self) -> AxumBody {
        self.body
    }

    /// Reads the body: `limit` bytes, within [`BODY_TIMEOUT`], and only while there is memory for it. Memory is
    /// taken as the bytes arrive: who announces much and sends little keeps nobody else out. When it runs out, see [`Bodies`](crate::bodies::Bodies).
    pub(crate) async fn read(self, share: Share, limit: usize) -> Result<Held, Problem> {
        if self.announced.is_some_and(|length| length > limit) {
            return Err(too_large(limit));
        }
        let read = async {
            let mut chunks = self.body.into_data_stream();
            let mut arrival = share.begin();
            arrival.hold(1).await?;
            let mut bytes = BytesMut::new();
            loop {
                let chunk = select! {
                    chunk = chunks.next() => chunk,
                    () = arrival.given_up() => return Err(Code::Overloaded.into()),
                };
                let Some(chunk) = chunk else { break };
                // The sender is gone: nobody reads the answer.
                let chunk = chunk.map_err(|_| Code::BodyTimeout)?;
                if bytes.len() + chunk.len() > limit {
                    return Err(too_large(limit));
                }
                bytes.extend_from_slice(&chunk);
                arrival.hold(kib_of(bytes.len())).await?;
            }
            Ok(Held { bytes: bytes.freeze(), memory: arrival.arrived()? })
        };
        timeout(BODY_TIMEOUT, read).await.map_err(|_| Code::BodyTimeout)?
    }
}

fn too_large(limit: usize) -> Problem {
    ApiError::from(Code::BodyTooLarge).detail(format!("limit {limit} bytes")).into()
}

/// The fields of a form, in order; `None` when the body is none.
pub(crate) async fn form_pairs(headers: &HeaderMap, bytes: Bytes) -> Option<Vec<(String, String)>> {
    let mut request = Request::post("/").body(bytes.into()).ok()?;
    *request.headers_mut() = headers.clone();
    let form = axum::Form::<Vec<(String, String)>>::from_request(request, &()).await;
    form.ok().map(|axum::Form(fields)| fields)
}

/// The job that a path names. Whatever is no job id names no job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JobPath(pub(crate) JobId);

impl<S: Send + Sync> FromRequestParts<S> for JobPath {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<JobId>::from_request_parts(parts, state).await;
        // Only the one spelling that we give out: what parses in another way is not what we named.
        let last = parts.uri.path().rsplit('/').next().unwrap_or_default();
        match path {
            Ok(Path(id)) if id.to_string() == last => Ok(Self(id)),
            _ => Err(Code::NotFound.into()),
        }
    }
}
