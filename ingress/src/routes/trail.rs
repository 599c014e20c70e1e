//! `/fhir/AuditEvent`: the audit trail, for auditors.

use std::sync::Arc;

use axum::{
    extract::{Path, Query, State, rejection::QueryRejection},
    http::{HeaderMap, StatusCode},
    response::Response,
};
use dermflow_auth::{
    audit::{
        ACTIONS, Action, Object,
        fhir::{OUTCOMES, resource},
        search::{self, Filter},
    },
    db::within,
};
use dermflow_schemas::{
    error::{ApiError, Code},
    limits::{DEFAULT_PAGE, MAX_PAGE},
};
use serde_json::json;

use crate::{
    answer::{self, Problem, accepts_fhir},
    app::App,
    audited::Deeds,
    extract::{Allowed, ReadTrail, SearchTrail},
    fhir::search::{found, period, searchset},
    routes::openapi::{Any, AuditEvent, Bundle, Guarded, Negotiated, Own, Queried},
};

/// One event.
#[utoipa::path(get, path = "/fhir/AuditEvent/{id}", operation_id = "readAuditEvent", tag = "audit trail",
    params(("id" = u64, Path, description = "Its number.")),
    responses((status = 200, description = "The event.", body = AuditEvent, content_type = "application/fhir+json"),
        Any, Guarded, Own, Negotiated))]
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    _: Allowed<ReadTrail>,
    path: Result<Path<String>, axum::extract::rejection::PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    let Path(id) = path.map_err(|_| Code::NotFound)?;
    // Only the one spelling that we give out.
    let id: i64 = id.parse().ok().filter(|n: &i64| n.to_string() == id).ok_or(Code::NotFound)?;
    let found = within(async { search::find(&app.store.connections().get().await?, id).await }).await?;
    let event = found.ok_or(Code::NotFound)?;
    let deed = Deeds::one(Action::TrailRead, Some(Object::event(id)), json!({ "events": 1 }));
    Ok(deed.of(answer::fhir(StatusCode::OK, resource(&event).to_string().into_bytes())))
}

/// `date` (`ge`, `le`, `gt`, `lt`, `sa`, `eb`, or none for the whole day or the millisecond), `agent` (a user's id or
/// the name of a part of the system), `outcome` (0, 4 or 8), `action` (C, R, U, D or E), `subtype` (our word for what
/// was done), `entity` (the id of what it was done to), `_count`; the latest first. Any other parameter is refused.
#[utoipa::path(get, path = "/fhir/AuditEvent", operation_id = "searchAuditEvents", tag = "audit trail",
    params(
        ("date" = Option<String>, Query,
            description = "`ge`, `le`, `gt`, `lt`, `sa`, `eb` or nothing, and a date or an instant."),
        ("agent" = Option<String>, Query, pattern = "^[A-Za-z0-9_-]{1,64}$",
            description = "A user's id, or the name of a part of the system."),
        ("entity" = Option<String>, Query, pattern = "^[A-Za-z0-9_-]{1,64}$", description = "What it was done to."),
        ("outcome" = Option<String>, Query, description = "0, 4 or 8, with commas."),
        ("action" = Option<String>, Query, description = "C, R, U, D or E, with commas."),
        ("subtype" = Option<String>, Query, description = "Our words for what was done, with commas."),
        ("_sort" = Option<String>, Query, pattern = "^-date$", description = "The only order."),
        ("_count" = Option<usize>, Query, description = "Entries at most."),
        ("_cursor" = Option<i64>, Query, description = "From the link `next`."),
        ("_format" = Option<String>, Query, pattern = "json", description = "FHIR JSON.")),
    responses((status = 200, description = "A page.", body = Bundle, content_type = "application/fhir+json"),
        Any, Guarded, Negotiated, Queried))]
pub(crate) async fn search(
    State(app): State<Arc<App>>,
    _: Allowed<SearchTrail>,
    parameters: Result<Query<Vec<(String, String)>>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    if !accepts_fhir(&headers) {
        return Err(Code::NotAcceptable.into());
    }
    let Query(parameters) = parameters.map_err(|_| ApiError::from(Code::QueryInvalid).at("query"))?;
    let (filter, count) = read(&parameters)?;
    // One more tells whether there is another page.
    let listed =
        within(async { search::list(&app.store.connections().get().await?, &filter, count + 1).await });
    let mut events = listed.await?;
    let more = events.len() > count;
    events.truncate(count);
    let next = events.last().filter(|_| more).map(|last| last.id.to_string());
    let url = format!("{}/fhir/AuditEvent", app.public_url);
    let entries = events.iter().map(|event| found(&url, event.id, resource(event))).collect();
    let bundle = searchset(&url, &parameters, next.as_deref(), entries);
    let deed = Deeds::one(Action::TrailRead, None, json!({ "events": events.len() }));
    Ok(deed.of(answer::fhir(StatusCode::OK, bundle.to_string().into_bytes())))
}

fn read(parameters: &[(String, String)]) -> Result<(Filter, usize), ApiError> {
    let (mut filter, mut count) = (Filter::default(), DEFAULT_PAGE);
    for (name, value) in parameters {
        let invalid = || ApiError::from(Code::QueryInvalid).at(name.clone());
        match name.as_str() {
            "date" => {
                let (since, until) = period(value).ok_or_else(invalid)?;
                filter.since = filter.since.max(since);
                filter.until = match (filter.until, until) {
                    (Some(one), Some(other)) => Some(one.min(other)),
                    (one, other) => one.or(other),
                };
            }
            "agent" if is_id(value) => filter.actor = Some(value.clone()),
            "entity" if is_id(value) => filter.object = Some(value.clone()),
            "outcome" => {
                let word =
                    |code: &str| OUTCOMES.iter().find(|(known, _)| *known == code).map(|(_, word)| *word);
                filter.outcomes = value.split(',').map(word).collect::<Option<_>>().ok_or_else(invalid)?;
            }
            "action" | "subtype" if !filter.actions.is_empty() => return Err(invalid()),
            "action" => {
                let wanted: Vec<&str> = value.split(',').collect();
                if !wanted.iter().all(|letter| ["C", "R", "U", "D", "E"].contains(letter)) {
                    return Err(invalid());
                }
                let matches = ACTIONS.iter().filter(|action| wanted.contains(&action.letter()));
                filter.actions = matches.map(|action| action.as_str()).collect();
            }
            "subtype" => {
                let word =
                    |word: &str| ACTIONS.iter().map(|action| action.as_str()).find(|known| *known == word);
                filter.actions = value.split(',').map(word).collect::<Option<_>>().ok_or_else(invalid)?;
            }
            "_count" => count = value.parse::<usize>().map_err(|_| invalid())?.clamp(1, MAX_PAGE),
            "_cursor" => filter.cursor = Some(value.parse().map_err(|_| invalid())?),
            "_sort" if value == "-date" => {}
            "_format" if value.contains("json") => {}
            _ => return Err(invalid()),
        }
    }
    Ok((filter, count))
}

/// What an id or a name of ours looks like.
fn is_id(value: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    (1..=64).contains(&value.len()) && value.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_be_passed_over_in_silence_is_refused() {
        let read = |name: &str, value: &str| read(&[(name.to_owned(), value.to_owned())]);
        for (name, value) in [
            ("date", "2026-01-31"),
            ("agent", "sweeper"),
            ("outcome", "0,4"),
            ("action", "E"),
            ("subtype", "login,access"),
            ("_count", "7"),
        ] {
            assert!(read(name, value).is_ok(), "{name}={value}");
        }
        for (name, value) in [
            ("date", "x"),
            ("agent", "a b"),
            ("outcome", "12"),
            ("outcome", ""),
            ("action", "X"),
            ("subtype", "nothing"),
            ("patient", "1"),
            ("agent:identifier", "x"),
            ("_sort", "date"),
        ] {
            assert!(read(name, value).is_err(), "{name}={value}");
        }
    }
}
