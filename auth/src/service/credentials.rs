//! `/accounts/{account}/credentials`: the secrets, public keys and certificates that clients prove themselves with.

use std::sync::Arc;

use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use dermflow_auth::{
    confirmation::fingerprint,
    credentials::{BadKey, PublicKey},
    registry::{self, OVERLAP, RegistryError},
};
use dermflow_http::answer::Problem;
use dermflow_schemas::{clock, id::ClientId};
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

use super::{
    Service,
    access::Registrar,
    done,
    input::{Json, Named, Perhaps},
    openapi::Errors,
};

/// A credential to be: a secret, which is generated, or a public key, or a certificate.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Addition {
    /// What to call it, 1 to 100 characters.
    label: String,
    /// When it expires (RFC 3339).
    #[serde(default, with = "time::serde::rfc3339::option")]
    expires_at: Option<OffsetDateTime>,
    /// A public key (RFC 7517) with a `kid`, for ES384 or RS384.
    #[schema(value_type = Option<Object>)]
    jwk: Option<Value>,
    /// A client certificate (PEM), in place of a key.
    certificate: Option<String>,
}

/// How to replace the secrets of a client.
#[derive(Debug, Default, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Rotation {
    /// For how many days those before stay good; 7 when it is left out. With 0 they end at once, and so do their tokens.
    overlap_days: Option<u16>,
}

/// A credential that was given to a client.
#[derive(Debug, Serialize, utoipa::ToSchema)]
pub(super) struct Given {
    /// The client's id.
    #[schema(value_type = Uuid)]
    client_id: ClientId,
    /// The credential's id.
    credential: Uuid,
    /// The secret. Shown once; there is none for a key or a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    client_secret: Option<String>,
}

impl IntoResponse for Given {
    fn into_response(self) -> Response {
        (StatusCode::CREATED, axum::Json(self)).into_response()
    }
}

impl From<registry::Given> for Given {
    fn from(given: registry::Given) -> Self {
        let client_secret = given.secret.map(|secret| secret.expose_secret().to_owned());
        Self { client_id: given.client, credential: given.credential, client_secret }
    }
}

/// Gives a client a secret, or registers a public key or a certificate of its.
#[utoipa::path(post, path = "/accounts/{account}/credentials",
    params(("account" = String, Path, description = "Name or id.")), request_body = Addition,
    responses((status = 201, description = "Added.", body = Given), Errors))]
pub(super) async fn add(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
    Json(Addition { label, expires_at, jwk, certificate }): Json<Addition>,
) -> Result<Given, Problem> {
    let key = jwk.map(|jwk| PublicKey::parse(&jwk.to_string())).transpose().map_err(RegistryError::from)?;
    let (pool, who, now) = (&service.pool, registrar.acts(), clock::now());
    let certificate = certificate.map(|pem| fingerprint(pem.as_bytes()).ok_or(BadKey::NotCertificate));
    let certificate = certificate.transpose().map_err(RegistryError::from)?;
    let given = match (key, certificate) {
        (None, None) => registry::add_secret(pool, who, &name, &label, expires_at, now).await?,
        (Some(_), Some(_)) => {
            return Err(
                RegistryError::BadValue("certificate", "a credential is a key or a certificate").into()
            );
        }
        (None, Some(certificate)) => {
            registry::add_certificate(pool, who, &name, &label, &certificate, expires_at, now).await?
        }
        (Some(key), None) => registry::add_key(pool, who, &name, &label, &key, expires_at, now).await?,
    };
    Ok(given.into())
}

/// Gives a client a secret in the place of all that it has, which stay good for a while.
#[utoipa::path(post, path = "/accounts/{account}/credentials/rotate",
    params(("account" = String, Path, description = "Name or id.")), request_body = Option<Rotation>,
    responses((status = 201, description = "Added.", body = Given), Errors))]
pub(super) async fn rotate(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named(name): Named<String>,
    Perhaps(Rotation { overlap_days }): Perhaps<Rotation>,
) -> Result<Given, Problem> {
    let overlap = overlap_days.map_or(OVERLAP, |days| Duration::days(days.into()));
    let given = registry::rotate(&service.pool, registrar.acts(), &name, overlap, clock::now()).await?;
    Ok(given.into())
}

/// Removes a secret, key or certificate; every token that was given for it is refused within a second.
#[utoipa::path(delete, path = "/accounts/{account}/credentials/{credential}",
    params(("account" = String, Path, description = "Name or id."),
        ("credential" = Uuid, Path, description = "The credential's id.")),
    responses((status = 204, description = "Removed."), Errors))]
pub(super) async fn remove(
    State(service): State<Arc<Service>>,
    registrar: Registrar,
    Named((name, credential)): Named<(String, Uuid)>,
) -> Result<Response, Problem> {
    registry::remove_credential(&service.pool, registrar.acts(), &name, credential, clock::now()).await?;
    Ok(done())
}
