//! `/dead`: the dead letters, for operators. Nothing of what is sealed in them is shown.

use std::sync::Arc;

use axum::{
    Json,
    extract::{FromRequestParts, Path, Query, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use dermflow_auth::audit::{Action, Object};
use dermflow_schemas::{
    error::{ApiError, Code},
    fhir::instant,
    id::{ClientId, JobId},
    job::{Lane, State as JobState},
    limits::{DEAD_PAGE, MAX_DEAD_PAGE},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{IntoParams, ToSchema};

use crate::{
    answer::Problem,
    audited::Deeds,
    dead::{self, Letter, Operators},
    extract::{Allowed, Operate},
    routes::{
        jobs,
        openapi::{Any, Guarded, Own, Queried, states},
    },
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
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Wanted {
    /// Letters after this one.
    #[serde(default)]
    cursor: u64,
    /// Letters at most, 1 to 100.
    #[param(minimum = 1, maximum = 100)]
    limit: Option<usize>,
}

/// A page of dead letters.
#[derive(Debug, Serialize, ToSchema)]
struct DeadPage {
    /// The oldest first.
    dead: Vec<DeadLetter>,
    /// The `cursor` of the next page; null when this is the last one.
    next: Option<u64>,
}

/// A dead letter. Nothing of what is sealed in it is shown.
#[derive(Debug, Serialize, ToSchema)]
struct DeadLetter {
    /// Its number.
    sequence: u64,
    /// Whose payload it is; null when that cannot be read.
    #[schema(value_type = Option<Uuid>)]
    job: Option<JobId>,
    /// Whose job that is.
    #[schema(value_type = Option<Uuid>)]
    client: Option<ClientId>,
    /// Where it waited.
    #[schema(value_type = Option<String>)]
    lane: Option<Lane>,
    /// Why it is here.
    reason: String,
    /// How many were made.
    attempts: Option<u32>,
    /// When the job was accepted.
    #[schema(format = DateTime)]
    accepted_at: Option<String>,
    /// When it came here.
    #[schema(format = DateTime)]
    dead_at: String,
    /// Of the message.
    bytes: usize,
}

/// A dead letter, with the record of its job.
#[derive(Debug, Serialize, ToSchema)]
struct DeadJob {
    #[serde(flatten)]
    letter: DeadLetter,
    /// Null when there is none.
    record: Option<jobs::Job>,
}

/// A job that is in the queue again.
#[derive(Debug, Serialize, ToSchema)]
struct Requeued {
    /// The job.
    #[schema(value_type = Uuid)]
    job: JobId,
    /// Where it stands.
    #[schema(schema_with = states)]
    state: JobState,
}

/// The dead letters after `cursor`, oldest first.
#[utoipa::path(get, path = "/dead", operation_id = "listDeadLetters", tag = "operators", params(Wanted),
    responses((status = 200, description = "A page.", body = DeadPage), Any, Guarded, Queried))]
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
    let deed = Deeds::one(Action::DeadRead, None, json!({ "letters": page.letters.len() }));
    let page = DeadPage { dead: page.letters.iter().map(shown).collect(), next: page.next };
    Ok(deed.of(Json(page).into_response()))
}

/// One dead letter, with the record of its job.
#[utoipa::path(get, path = "/dead/{sequence}", operation_id = "readDeadLetter", tag = "operators",
    params(("sequence" = u64, Path, description = "Its number.")),
    responses((status = 200, description = "The letter.", body = DeadJob), Any, Guarded, Own))]
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
    let record = record.map(|record| jobs::shown(&operators.public_url, &record, None));
    let deed = Deeds::one(Action::DeadRead, letter.job.map(Object::job), json!({ "letters": 1 }));
    Ok(deed.of(Json(DeadJob { letter: shown(&letter), record }).into_response()))
}

/// Back into the queue.
#[utoipa::path(post, path = "/dead/{sequence}/requeue", operation_id = "requeueDeadLetter", tag = "operators",
    params(("sequence" = u64, Path, description = "Its number.")),
    responses((status = 200, description = "It is in the queue.", body = Requeued),
        (status = 409, description = "Its job is not as it would have to be."), Any, Guarded, Own))]
pub(crate) async fn requeue(
    State(operators): State<Arc<Operators>>,
    Allowed { who: operator, .. }: Allowed<Operate>,
    Sequence(sequence): Sequence,
) -> Result<Response, Problem> {
    // In a task of its own: what has begun is finished when the caller hangs up.
    let put_back = tokio::spawn(async move { dead::requeue(&operators, sequence, operator).await });
    let (job, state) = put_back.await.map_err(|error| crate::submit::internal(&error))??;
    Ok(Json(Requeued { job, state }).into_response())
}

/// Removed for good.
#[utoipa::path(delete, path = "/dead/{sequence}", operation_id = "purgeDeadLetter", tag = "operators",
    params(("sequence" = u64, Path, description = "Its number.")),
    responses((status = 204, description = "Removed."), Any, Guarded, Own))]
pub(crate) async fn purge(
    State(operators): State<Arc<Operators>>,
    Allowed { who: operator, .. }: Allowed<Operate>,
    Sequence(sequence): Sequence,
) -> Result<Response, Problem> {
    dead::purge(&operators, sequence, operator).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

fn shown(letter: &Letter) -> DeadLetter {
    let header = letter.header.as_ref();
    DeadLetter {
        sequence: letter.sequence,
        job: letter.job,
        client: letter.client,
        lane: letter.lane,
        reason: letter.reason.clone(),
        attempts: header.map(|header| header.attempt),
        accepted_at: header.map(|header| instant(header.accepted_at)),
        dead_at: instant(letter.dead_at),
        bytes: letter.bytes,
    }
}
