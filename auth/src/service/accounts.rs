//! `/accounts`: clients, and staff.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use dermflow_auth::{
    registry::{
        self, Account, Change, Credential, ExternalIdentity, Filter, MAX_PAGE, NewAccount, PAGE,
        State as Standing,
    },
    users::Role,
};
use dermflow_http::answer::Problem;
use dermflow_schemas::{clock, error::Code, id::ClientId};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, Serialize};
use time::{Duration, OffsetDateTime};

use super::{
    Service,
    access::{Reader, Registrar},
    done,
    input::{Json, Named, Parameters, Perhaps},
    openapi::Errors,
};

/// Which accounts to list.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Search {
    /// With this role.
    role: Option<Role>,
    /// That stand like this; all but deleted ones when it is left out.
    state: Option<Standing>,
    /// Whose names begin like this.
    name: Option<String>,
    /// Not used for so many days.
    unused_days: Option<u16>,
    /// Whose names come after this one.
    cursor: Option<String>,
    /// How many, 1 to 500; 50 when it is left out.
    limit: Option<i64>,
}

/// A page of accounts by name.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Page {
    /// The accounts.
    accounts: Vec<Account>,
    /// The `cursor` of the next page; null when this is the last one.
    next: Option<String>,
}

/// An account to register.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Registration {
    /// 1 to 63 of a-z 0-9 . _ @ - beginning with a letter or digit.
    name: String,
    /// `integrator` when it is left out.
    #[serde(default = "integrator")]
    #[schema(default = "integrator")]
    role: Role,
    /// Whom to ask about it, 1 to 200 characters.
    contact: Option<String>,
    /// When it expires (RFC 3339).
    #[serde(default, with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
}

fn integrator() -> Role {
    Role::Integrator
}

/// An account that has just been registered.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Registered {
    /// Its id, which is the `client_id` of OAuth.
    #[schema(value_type = Uuid)]
    id: ClientId,
    /// The name it signs in with.
    name: String,
    /// The generated password. Shown once.
    password: String,
}

/// An account with what it proves itself with.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Whole {
    #[serde(flatten)]
    account: Account,
    /// What it proves itself with besides its password.
    credentials: Vec<Credential>,
    /// Who it is at external identity providers.
    external_identities: Vec<ExternalIdentity>,
}

/// Another password.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Chosen {
    /// The password; one is generated when it is left out.
    #[serde(default, deserialize_with = "secret")]
    #[schema(value_type = Option<String>, format = Password)]
    password: Option<SecretString>,
}

fn secret<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SecretString>, D::Error> {
    super::sessions::secret(deserializer).map(Some)
}

/// A password that was generated.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Generated {
    /// Shown once.
    password: String,
}

/// Lists accounts by name.
#[utoipa::path(get, path = "/accounts", params(Search),
    responses((status = 200, description = "A page.", body = Page), Errors))]
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    reader: Reader,
    Parameters(search): Parameters<Search>,
) -> Result<Response, Problem> {
    let now = clock::now();
    let limit = search.limit.unwrap_or(PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Code::QueryInvalid.into());
    }
    let filter = Filter {
        role: search.role,
        state: search.state,
        name: search.name,
        unused_since: search.unused_days.map(|days| now - Duration::days(days.into())),
        after: search.cursor,
        limit,
    };
    let accounts = registry::list(&service.pool, reader.acts(), &filter, now).await?;
    let is_full = accounts.len() as i64 == limit;
    let next = accounts.last().filter(|_| is_full).map(|last| last.name.clone());
    Ok(axum::Json(Page { accounts, next }).into_response())
}

/// Registers an account, with a generated password.
#[utoipa::path(post, path = "/accounts", request_body = Registration,
    responses((status = 201, description = "Registered.", body = Registered), Errors))]
pub(super) async fn create(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Json(Registration { name, role, contact, expires_at }): Json<Registration>,
) -> Result<Response, Problem> {
    let new = NewAccount { name: &name, role, contact: contact.as_deref(), expires_at };
    let created =
        registry::create(&service.pool, &service.peppers, registrar.acts(), &new, clock::now()).await?;
    let (id, password) = created;
    let location = [(header::LOCATION, format!("/accounts/{id}"))];
    let body = axum::Json(Registered { id, name, password: password.expose_secret().to_owned() });
    Ok((StatusCode::CREATED, location, body).into_response())
}

/// Shows an account with its secrets and keys.
#[utoipa::path(get, path = "/accounts/{account}", params(("account" = String, Path, description = "Name or id.")),
    responses((status = 200, description = "The account.", body = Whole), Errors))]
pub(super) async fn show(
    State(service): State<Arc<Service>>,
    reader: Reader,
    Named(name): Named<String>,
) -> Result<Response, Problem> {
    let (account, credentials) = registry::get(&service.pool, reader.acts(), &name, clock::now()).await?;
    let external_identities = registry::identities(&service.pool, account.id).await?;
    Ok(axum::Json(Whole { account, credentials, external_identities }).into_response())
}

/// Changes an account, shuts it out, or lets it in again. Ingress knows it within a second.
#[utoipa::path(patch, path = "/accounts/{account}", params(("account" = String, Path, description = "Name or id.")),
    request_body = Change, responses((status = 204, description = "Changed."), Errors))]
pub(super) async fn change(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
    Json(change): Json<Change>,
) -> Result<Response, Problem> {
    registry::change(&service.pool, registrar.acts(), &name, &change, clock::now()).await?;
    Ok(done())
}

/// Deletes an account. Nothing personal stays; the audit trail keeps its id.
#[utoipa::path(delete, path = "/accounts/{account}", params(("account" = String, Path, description = "Name or id.")),
    responses((status = 204, description = "Deleted."), Errors))]
pub(super) async fn delete(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
) -> Result<Response, Problem> {
    registry::delete(&service.pool, registrar.acts(), &name, clock::now()).await?;
    Ok(done())
}

/// Gives an account another password, and ends everything that was given for the old one.
#[utoipa::path(post, path = "/accounts/{account}/password",
    params(("account" = String, Path, description = "Name or id.")), request_body = Option<Chosen>,
    responses((status = 200, description = "One was generated.", body = Generated),
        (status = 204, description = "The chosen one is set."), Errors))]
pub(super) async fn password(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
    Perhaps(Chosen { password }): Perhaps<Chosen>,
) -> Result<Response, Problem> {
    let is_chosen = password.is_some();
    let Service { pool, peppers, .. } = service.as_ref();
    let set = registry::set_password(pool, peppers, registrar.acts(), &name, password, clock::now()).await?;
    if is_chosen {
        return Ok(done());
    }
    Ok(axum::Json(Generated { password: set.expose_secret().to_owned() }).into_response())
}

/// Ends everything that an account was given: tokens, refresh tokens, sessions.
#[utoipa::path(post, path = "/accounts/{account}/revoke",
    params(("account" = String, Path, description = "Name or id.")),
    responses((status = 204, description = "Ended."), Errors))]
pub(super) async fn revoke(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
) -> Result<Response, Problem> {
    registry::revoke_all(&service.pool, registrar.acts(), &name, clock::now()).await?;
    Ok(done())
}
