//! What handlers take from a request before they look at it: who calls, its id, its body within bounds.

use std::{marker::PhantomData, sync::Arc};

use axum::{
    body::Body as AxumBody,
    extract::{FromRequest, FromRequestParts, Path, Request},
    http::{HeaderMap, header, request::Parts},
};
use bytes::{Bytes, BytesMut};
use dermflow_auth::{audit::Who, scope::Permission, token};
use dermflow_schemas::{
    clock,
    error::{ApiError, Code},
    id::{ClientId, JobId},
    limits::BODY_TIMEOUT,
};
use futures_util::StreamExt;
use tokio::{sync::OwnedSemaphorePermit, time::timeout};

use crate::{
    access::{Gate, Verdict},
    answer::Problem,
    app::Bounds,
    audited::Origin,
    rates,
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

needs! { Submit Read Search Delete Operate ReadTrail }

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
        let caller = bearer(&parts.headers, gate.as_ref())?;
        let origin = parts.extensions.get::<Origin>().cloned().unwrap_or_default();
        origin.is(caller.client);
        rates::count(gate.as_ref(), caller.client, parts)?;
        if !caller.may(P::PERMISSION) {
            return Err(Code::Forbidden.into());
        }
        Ok(Self { client: caller.client, caller, who: origin.who(), _permission: PhantomData })
    }
}

/// Who calls. The token comes from the one `Authorization` header (RFC 6750 §2.1), never from the URL. Why it is
/// refused goes to the log: every refusal looks the same from outside.
pub(crate) fn bearer<G: Gate>(headers: &HeaderMap, gate: &G) -> Result<Arc<token::Caller>, Problem> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Err(unauthenticated("Bearer")) };
    let refused = || unauthenticated("Bearer error=\"invalid_token\"");
    if values.next().is_some() {
        return Err(refused());
    }
    let value = value.to_str().ok().and_then(|value| value.split_once(' '));
    let token = value.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token);
    let caller = gate.tokens().verify(token.unwrap_or_default(), clock::now()).map_err(|error| {
        tracing::info!(%error, "access refused");
        refused()
    })?;
    match gate.access().judge(&caller) {
        Verdict::Open => Ok(caller),
        Verdict::Revoked => {
            tracing::info!(client = %caller.client, "access refused: revoked");
            Err(refused())
        }
        Verdict::Unknown => Err(Code::DatabaseUnavailable.into()),
    }
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
    pub(crate) memory: OwnedSemaphorePermit,
}

impl Body {
    /// The body, for a handler that reads it bit by bit.
    pub(crate) fn into_inner(self) -> AxumBody {
        self.body
    }

    /// Reads the body: `limit` bytes, within [`BODY_TIMEOUT`], and only while there is memory for it. Memory is
    /// taken as the bytes arrive: who announces much and sends little keeps nobody else out.
    pub(crate) async fn read(self, bounds: &Bounds, limit: usize) -> Result<Held, Problem> {
        if self.announced.is_some_and(|length| length > limit) {
            return Err(too_large(limit));
        }
        let read = async {
            let mut chunks = self.body.into_data_stream();
            let mut memory = take(bounds, 1)?;
            let mut bytes = BytesMut::new();
            while let Some(chunk) = chunks.next().await {
                // The sender is gone: nobody reads the answer.
                let chunk = chunk.map_err(|_| Code::BodyTimeout)?;
                if bytes.len() + chunk.len() > limit {
                    return Err(too_large(limit));
                }
                bytes.extend_from_slice(&chunk);
                let missing = bytes.len().div_ceil(1024).saturating_sub(memory.num_permits());
                memory.merge(take(bounds, missing)?);
            }
            Ok(Held { bytes: bytes.freeze(), memory })
        };
        timeout(BODY_TIMEOUT, read).await.map_err(|_| Code::BodyTimeout)?
    }
}

fn take(bounds: &Bounds, kib: usize) -> Result<OwnedSemaphorePermit, Problem> {
    Ok(bounds.body_kib.clone().try_acquire_many_owned(kib as u32).map_err(|_| Code::Overloaded)?)
}

fn too_large(limit: usize) -> Problem {
    ApiError::from(Code::BodyTooLarge).detail(format!("limit {limit} bytes")).into()
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
