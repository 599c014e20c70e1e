//! `/accounts/{account}/identities`: who an account is at external identity providers.

use std::sync::Arc;

use axum::{extract::State, response::Response};
use dermflow_auth::registry::{self, ExternalIdentity};
use dermflow_http::answer::Problem;
use dermflow_schemas::clock;

use super::{
    Service,
    access::Registrar,
    done,
    input::{Json, Named, Parameters},
    openapi::Errors,
};

/// From now on the subject's tokens open the account.
#[utoipa::path(post, path = "/accounts/{account}/identities",
    params(("account" = String, Path, description = "Name or id.")), request_body = ExternalIdentity,
    responses((status = 204, description = "Linked."), Errors))]
pub(super) async fn link(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
    Json(identity): Json<ExternalIdentity>,
) -> Result<Response, Problem> {
    registry::link(&service.pool, registrar.acts(), &name, &identity, clock::now()).await?;
    Ok(done())
}

/// Within a second the subject's tokens open nothing.
#[utoipa::path(delete, path = "/accounts/{account}/identities",
    params(("account" = String, Path, description = "Name or id."), ExternalIdentity),
    responses((status = 204, description = "Unlinked."), Errors))]
pub(super) async fn unlink(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
    Parameters(identity): Parameters<ExternalIdentity>,
) -> Result<Response, Problem> {
    registry::unlink(&service.pool, registrar.acts(), &name, &identity, clock::now()).await?;
    Ok(done())
}
