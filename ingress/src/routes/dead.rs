//! `/dead`: the dead letters, for operators. Nothing of what is sealed in them is shown.

use std::sync::Arc;

use axum::{
    extract::{FromRequestParts, Path, Query, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use dermflow_auth::audit::{Action, Object};
use dermflow_schemas::{
    error::{ApiError, Code},
    fhir::instant,
    limits::{DEAD_PAGE, MAX_DEAD_PAGE},
};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    answer::{self, Problem},
    audited::Deeds,
    dead::{self, Letter, Operators},
    extract::{Allowed, Operate},
    routes::jobs,
};

/// The dead letter that a path names. Whatever is no sequence names none.
pub(crate) struct Sequence(u64);

impl<S: Send + Sync> FromRequestParts<S> for Sequence {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<u64>::from_request_parts(parts, state).await;
        match path {
            // The broker counts from 1.
            Ok(Path(sequence)) if sequence > 0 => Ok(Self(sequence)),
            _ => Err(Code::NotFound.into()),
        }
    }
}

/// Which page.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Wanted {
    #[serde(default)]
    cursor: u64,
    limit: Option<usize>,
}

/// The dead letters after `cursor`, oldest first.
pub(crate) async fn list(
    State(operators): State<Arc<Operators>>,
    _: Allowed<Operate>,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Problem> {
    let invalid = || ApiError::from(Code::QueryInvalid).detail(format!("cursor, limit 1 to {MAX_DEAD_PAGE}"));
    let Query(Wanted { cursor, limit }) = wanted.map_err(|_| invalid())?;
    let limit = limit.unwrap_or(DEAD_PAGE);
    if !(1..=MAX_DEAD_PAGE).contains(&limit) {
        return Err(invalid().into());
    }
    let page = dead::page(&operators, cursor, limit).await?;
    let letters: Vec<Value> = page.letters.iter().map(shown).collect();
    let deed = Deeds::one(Action::DeadRead, None, json!({ "letters": letters.len() }));
    Ok(deed.of(answer::json(json!({ "dead": letters, "next": page.next }))))
}

/// One dead letter, with the record of its job.
pub(crate) async fn get(
    State(operators): State<Arc<Operators>>,
    _: Allowed<Operate>,
    Sequence(sequence): Sequence,
) -> Result<Response, Problem> {
    let letter = dead::get(&operators, sequence).await?.ok_or(Code::NotFound)?;
    let record = match letter.job {
        Some(job) => operators.store.find_any(job).await?,
        None => None,
    };
    let mut body = shown(&letter);
    body["record"] = json!(record.map(|record| jobs::shown(&operators.public_url, &record, None)));
    let deed = Deeds::one(Action::DeadRead, letter.job.map(Object::job), json!({ "letters": 1 }));
    Ok(deed.of(answer::json(body)))
}

/// Back into the queue.
pub(crate) async fn requeue(
    State(operators): State<Arc<Operators>>,
    Allowed { who: operator, .. }: Allowed<Operate>,
    Sequence(sequence): Sequence,
) -> Result<Response, Problem> {
    // In a task of its own: what has begun is finished when the caller hangs up.
    let put_back = tokio::spawn(async move { dead::requeue(&operators, sequence, operator).await });
    let (job, state) = put_back.await.map_err(|error| crate::submit::internal(&error))??;
    Ok(answer::json(json!({ "job": job, "state": state })))
}

/// Removed for good.
pub(crate) async fn purge(
    State(operators): State<Arc<Operators>>,
    Allowed { who: operator, .. }: Allowed<Operate>,
    Sequence(sequence): Sequence,
) -> Result<Response, Problem> {
    dead::purge(&operators, sequence, operator).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

fn shown(letter: &Letter) -> Value {
    json!({
        "sequence": letter.sequence,
        "job": letter.job,
        "client": letter.client,
        "lane": letter.lane,
        "reason": letter.reason,
        "attempts": letter.header.as_ref().map(|header| header.attempt),
        "accepted_at": letter.header.as_ref().map(|header| instant(header.accepted_at)),
        "dead_at": instant(letter.dead_at),
        "bytes": letter.bytes,
    })
}
