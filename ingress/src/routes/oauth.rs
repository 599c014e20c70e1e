//! OAuth 2.0 for systems: tokens (RFC 6749 §4.4 and §6, RFC 7523, RFC 8705), revocation (RFC 7009), introspection (RFC 7662), and
//! the documents that let clients find all this (RFC 8414, RFC 7517, SMART App Launch 2.2).
//!
//! Errors have RFC 6749's form here, not the API's, because that is what OAuth libraries read.

use std::{borrow::Cow, collections::HashMap, sync::Arc};

use axum::{
    Extension,
    extract::{FromRequest, State},
    http::{HeaderMap, HeaderValue, Request, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_auth::{
    audit::{Action, Event, Object},
    confirmation::{Confirmation, Fingerprint},
    credentials::{self, Proof},
    db::DbError,
    keys,
    refresh::{self, Outcome, RefreshError},
    revocation, scope,
    token::{self, Grant},
    users::{self, ROLES, Role},
};
use dermflow_schemas::{clock, error::Code, id::ClientId, limits::MAX_FORM_BYTES};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    access::Verdict,
    answer::{self, Problem},
    app::App,
    audited::{Deeds, Origin, Refused},
    extract::{Body, Held, bearer, sign_ins_have_room},
    rates::{self, Counted},
    submit::internal,
};

/// The scope that asks for a refresh token (OpenID Connect Core §11, as SMART uses it).
const OFFLINE: &str = "offline_access";
const ASSERTION: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// An error of RFC 6749 §5.2, or one of the API's where that has none.
pub(crate) enum Refusal {
    OAuth(StatusCode, &'static str, &'static str),
    Api(Problem),
}

use Refusal::OAuth;

const INVALID_CLIENT: Refusal =
    OAuth(StatusCode::UNAUTHORIZED, "invalid_client", "The client did not prove itself.");
const INVALID_GRANT: Refusal =
    OAuth(StatusCode::BAD_REQUEST, "invalid_grant", "The refresh token is not good, or no longer.");
const INVALID_SCOPE: Refusal =
    OAuth(StatusCode::BAD_REQUEST, "invalid_scope", "More than this client is granted.");

/// Of a client whose tokens have to be bound.
const NO_CERTIFICATE: &str = "Tokens of this client are bound to a certificate: connect with one.";

fn invalid_request(why: &'static str) -> Refusal {
    OAuth(StatusCode::BAD_REQUEST, "invalid_request", why)
}

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self::Api(problem)
    }
}

impl From<DbError> for Refusal {
    fn from(error: DbError) -> Self {
        Self::Api(error.into())
    }
}

impl From<RefreshError> for Refusal {
    fn from(error: RefreshError) -> Self {
        match error {
            RefreshError::Db(error) => error.into(),
            RefreshError::NoRandomness(error) => Self::Api(internal(&error)),
            RefreshError::ShutOut => INVALID_CLIENT,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        match self {
            Self::Api(problem) => problem.into_response(),
            OAuth(status, error, description) => {
                let mut response = answer::json(json!({ "error": error, "error_description": description }));
                *response.status_mut() = status;
                let refused = match error {
                    "invalid_client" | "invalid_grant" => Code::LoginFailed,
                    "invalid_scope" => Code::Forbidden,
                    _ if description == NO_CERTIFICATE => Code::ClientCertificateNeeded,
                    _ => Code::FormInvalid,
                };
                response.extensions_mut().insert(Refused(refused));
                if status == StatusCode::UNAUTHORIZED {
                    let challenge = HeaderValue::from_static("Basic realm=\"dermflow\"");
                    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
                }
                response
            }
        }
    }
}

/// The fields of a form, each given once (RFC 6749 §3.2). `Debug` shows none of them.
struct Form(HashMap<String, String>);

impl Form {
    async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<Self, Refusal> {
        sign_ins_have_room(app)?;
        let Held { bytes, .. } = body.read(&app.bounds, MAX_FORM_BYTES).await?;
        let malformed = || invalid_request("The body is a form, application/x-www-form-urlencoded.");
        let mut request = Request::post("/").body(bytes.into()).map_err(|_| malformed())?;
        *request.headers_mut() = headers.clone();
        let fields = axum::Form::<Vec<(String, String)>>::from_request(request, &());
        let axum::Form(fields) = fields.await.map_err(|_| malformed())?;
        let mut form = HashMap::new();
        for (name, value) in fields {
            // What is empty counts as left out (RFC 6749 §3.2).
            if !value.is_empty() && form.insert(name, value).is_some() {
                return Err(invalid_request("A parameter is given twice."));
            }
        }
        Ok(Self(form))
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn secret(&self, name: &str) -> Option<SecretString> {
        self.get(name).map(SecretString::from)
    }
}

/// The client, by the one way in which it proves itself: `client_secret_basic`, `client_secret_post`, `private_key_jwt`, or
/// else `tls_client_auth`. `None` when it tries none.
async fn client(
    app: &App,
    origin: &Origin,
    counted: &Counted,
    headers: &HeaderMap,
    form: &Form,
) -> Result<Option<Proof>, Refusal> {
    let basic = basic(headers)?;
    let ways = [basic.is_some(), form.get("client_secret").is_some(), form.get("client_assertion").is_some()];
    if ways.iter().filter(|way| **way).count() > 1 {
        return Err(invalid_request("A client proves itself in one way only."));
    }
    let (pool, now) = (&app.sign_ins, clock::now());
    let proof = if let Some(assertion) = form.get("client_assertion") {
        if form.get("client_assertion_type") != Some(ASSERTION) {
            return Err(invalid_request("client_assertion_type is not that of a JWT."));
        }
        let endpoint = format!("{}/oauth/token", app.public_url);
        credentials::check_assertion(pool, assertion, &[&endpoint, &app.public_url], now).await?
    } else {
        let given = match (basic, form.get("client_id"), form.secret("client_secret")) {
            (Some(given), _, _) => given,
            (None, Some(id), Some(secret)) => (id.to_owned(), secret),
            (None, None, Some(_)) => return Err(invalid_request("client_id is missing.")),
            (None, id, None) => {
                let id = id.and_then(|id| id.parse().ok());
                let Some((id, shown)) = id.zip(origin.certificate()) else { return Ok(None) };
                // A certificate may be there for other reasons.
                let proof = credentials::check_certificate(pool, id, &shown, now).await?;
                return proof.map(|proof| known(app, origin, counted, proof)).transpose();
            }
        };
        match given.0.parse::<ClientId>() {
            Ok(id) => credentials::check_secret(pool, id, &given.1, now).await?,
            Err(_) => None,
        }
    };
    let proof = proof.ok_or_else(|| {
        tracing::info!("client refused");
        INVALID_CLIENT
    })?;
    let proof = known(app, origin, counted, proof)?;
    // What is said besides must not contradict it.
    let contradicts = form.get("client_id").is_some_and(|id| id != proof.user.client.to_string());
    if contradicts { Err(INVALID_CLIENT) } else { Ok(Some(proof)) }
}

/// Notes who the client has proved to be, and counts its request.
fn known(app: &App, origin: &Origin, counted: &Counted, proof: Proof) -> Result<Proof, Refusal> {
    origin.is(proof.user.client);
    rates::charge_form(app, proof.user.client, counted)?;
    Ok(proof)
}

/// RFC 6749 §2.3.1: id and secret are form-encoded, then Base64. `None` when the header is none or of another scheme.
fn basic(headers: &HeaderMap) -> Result<Option<(String, SecretString)>, Refusal> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return if headers.contains_key(header::AUTHORIZATION) { Err(INVALID_CLIENT) } else { Ok(None) };
    };
    let Some((scheme, coded)) = value.to_str().ok().and_then(|value| value.split_once(' ')) else {
        return Err(INVALID_CLIENT);
    };
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(None);
    }
    let text = STANDARD.decode(coded.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let pair = text.as_deref().and_then(|text| text.split_once(':')).ok_or(INVALID_CLIENT)?;
    // A `+` is in neither of ours.
    let plain =
        |coded| percent_decode_str(coded).decode_utf8().map(Cow::into_owned).map_err(|_| INVALID_CLIENT);
    Ok(Some((plain(pair.0)?, plain(pair.1)?.into())))
}

/// `POST /oauth/token`.
pub(crate) async fn token(
    State(app): State<Arc<App>>,
    origin: Origin,
    Extension(counted): Extension<Counted>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let form = Form::read(&app, &headers, body).await?;
    let proof = client(&app, &origin, &counted, &headers, &form).await?;
    match form.get("grant_type") {
        Some("client_credentials") => {
            let proof = proof.ok_or(INVALID_CLIENT)?;
            granted(&app, &origin, &proof, form.get("scope"), BEARER).await
        }
        Some("refresh_token") => refreshed(&app, &origin, &form, proof).await,
        Some(_) => Err(OAuth(
            StatusCode::BAD_REQUEST,
            "unsupported_grant_type",
            "The grants are client_credentials and refresh_token.",
        )),
        None => Err(invalid_request("grant_type is missing.")),
    }
}

/// A scope without [`OFFLINE`], and whether that was in it.
fn without_offline(scope: Option<&str>) -> (Option<String>, bool) {
    let Some(scope) = scope else { return (None, false) };
    let (offline, others): (Vec<&str>, Vec<&str>) = scope.split(' ').partition(|scope| *scope == OFFLINE);
    (Some(others.join(" ")), !offline.is_empty())
}

/// The `token_type` of RFC 6750.
const BEARER: &str = "Bearer";

/// An access token for an account that has proved itself, and a refresh token if it asked for that.
pub(crate) async fn granted(
    app: &App,
    origin: &Origin,
    proof: &Proof,
    asked: Option<&str>,
    token_type: &str,
) -> Result<Response, Refusal> {
    let now = clock::now();
    let Proof { user, credential, ends } = *proof;
    origin.is(user.client);
    let bound_to = origin.certificate();
    if user.certificate_bound && bound_to.is_none() {
        return Err(invalid_request(NO_CERTIFICATE));
    }
    let (asked, offline) = without_offline(asked);
    let scope = scope::narrow(user.role.scope(), asked.as_deref()).ok_or(INVALID_SCOPE)?;
    tracing::info!(client = %user.client, offline, "signed in");
    let login = Deeds::one(Action::Login, Some(Object::account(user.client)), json!({}));
    if !offline {
        // The token is from before the look: what is shut out after it is later than the token.
        if !users::is_unchanged(&app.sign_ins, &user, now).await? {
            return Err(INVALID_CLIENT);
        }
        let grant = user.grant(credential, ends, scope, bound_to);
        return Ok(login.of(tokens(app, grant, None, token_type, now)?));
    }
    let begun = refresh::begin(&app.sign_ins, user, credential, bound_to, &scope, now);
    let (family, until, refresh) = begun.await?;
    let ends = ends.map_or(until, |ends| ends.min(until));
    let grant = user.grant(family, Some(ends), scope, bound_to);
    Ok(login.of(tokens(app, grant, Some(refresh), token_type, now)?))
}

async fn refreshed(
    app: &App,
    origin: &Origin,
    form: &Form,
    proof: Option<Proof>,
) -> Result<Response, Refusal> {
    let spent = form.secret("refresh_token").ok_or(invalid_request("refresh_token is missing."))?;
    let client = proof.map(|proof| proof.user.client.uuid());
    let (asked, _) = without_offline(form.get("scope"));
    let (pool, who, now) = (&app.sign_ins, origin.who(), clock::now());
    let shown = origin.certificate();
    let refreshed = match refresh::spend(pool, &spent, client, shown, asked.as_deref(), &who, now).await? {
        Outcome::Good(refreshed) => refreshed,
        Outcome::TooWide => return Err(INVALID_SCOPE),
        Outcome::Reused(client) => {
            tracing::warn!(%client, "a refresh token was used twice: its family is ended");
            origin.claims(Some(client));
            return Err(INVALID_GRANT);
        }
        Outcome::Unknown => return Err(INVALID_GRANT),
    };
    origin.is(refreshed.user.client);
    let grant = refreshed.user.grant(refreshed.family, Some(refreshed.ends), refreshed.scope, shown);
    tokens(app, grant, Some(refreshed.next), BEARER, now)
}

/// RFC 6749 §5.1; `expires_in_minutes` is what clients of the device API read.
fn tokens(
    app: &App,
    grant: Grant,
    refresh: Option<SecretString>,
    token_type: &str,
    now: OffsetDateTime,
) -> Result<Response, Refusal> {
    let scope = grant.scope.clone();
    let seconds = grant.ends.map_or(token::LIFETIME.as_secs(), |ends| {
        u64::try_from((ends - now).whole_seconds()).unwrap_or(0).min(token::LIFETIME.as_secs())
    });
    let token = app.tokens.issue(grant, now).map_err(|error| internal(&error))?;
    let mut body = json!({
        "access_token": token.expose_secret(),
        "token_type": token_type,
        "expires_in": seconds,
        "expires_in_minutes": seconds / 60,
        "scope": scope,
    });
    if let Some(refresh) = refresh {
        body["refresh_token"] = json!(refresh.expose_secret());
    }
    Ok(answer::json(body))
}

/// The account that asks about a token or revokes one: a client, or whoever holds an access token.
async fn holder(
    app: &App,
    origin: &Origin,
    counted: &Counted,
    headers: &HeaderMap,
    form: &Form,
) -> Result<Uuid, Refusal> {
    if let Some(proof) = client(app, origin, counted, headers, form).await? {
        // For this one request it has signed in.
        let (client, now) = (proof.user.client, clock::now());
        let login = Event::new(Action::Login, origin.who(), now).client(Some(client));
        app.trail.repeated(login.object(Some(Object::account(client)))).await.map_err(Problem::from)?;
        return Ok(client.uuid());
    }
    let caller = bearer(headers, app, origin)
        .await
        .map_err(|problem| if problem.is(Code::Unauthenticated) { INVALID_CLIENT } else { problem.into() })?;
    rates::charge_form(app, caller.client, counted)?;
    Ok(caller.client.uuid())
}

/// `POST /oauth/revoke`: 200 whatever the token was (RFC 7009 §2.2). Another account's token stays as it is.
pub(crate) async fn revoke(
    State(app): State<Arc<App>>,
    origin: Origin,
    Extension(counted): Extension<Counted>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let form = Form::read(&app, &headers, body).await?;
    let account = holder(&app, &origin, &counted, &headers, &form).await?;
    let revoked = form.secret("token").ok_or(invalid_request("token is missing."))?;
    let (pool, now) = (&app.sign_ins, clock::now());
    let is_ended = match app.tokens.verify(revoked.expose_secret(), now) {
        Ok(caller) if caller.client.uuid() == account => {
            revocation::revoke(pool, &[caller.jti], now).await?;
            true
        }
        Ok(_) => false,
        Err(_) => refresh::end(pool, &revoked, account, now).await?,
    };
    let answer = StatusCode::OK.into_response();
    if !is_ended {
        return Ok(answer);
    }
    // This replica knows at once.
    app.access.refresh(pool).await;
    let deed = Deeds::one(Action::TokenRevoked, Some(Object::account(account.into())), json!({}));
    Ok(deed.of(answer))
}

/// `POST /oauth/introspect`, about one's own tokens.
pub(crate) async fn introspect(
    State(app): State<Arc<App>>,
    origin: Origin,
    Extension(counted): Extension<Counted>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Refusal> {
    let form = Form::read(&app, &headers, body).await?;
    let account = holder(&app, &origin, &counted, &headers, &form).await?;
    let token = form.secret("token").ok_or(invalid_request("token is missing."))?;
    let now = clock::now();
    let inactive = || answer::json(json!({ "active": false }));
    let Ok(caller) = app.tokens.verify(token.expose_secret(), now) else {
        let described = refresh::describe(&app.sign_ins, &token, account, now).await?;
        return Ok(described.map_or_else(inactive, |refresh| {
            let description = json!({
                "active": true, "iss": app.public_url, "sub": account, "client_id": account,
                "scope": refresh.scope, "exp": refresh.ends.unix_timestamp(),
            });
            answer::json(confirmed(description, refresh.bound_to))
        }));
    };
    if caller.client.uuid() != account || app.access.judge(&caller) != Verdict::Open {
        return Ok(inactive());
    }
    let description = json!({
        "active": true, "iss": app.public_url, "sub": caller.client, "client_id": caller.client,
        "aud": token::AUDIENCE, "jti": caller.jti, "token_type": "Bearer", "scope": caller.scope,
        "iat": caller.issued_at.unix_timestamp(), "nbf": caller.issued_at.unix_timestamp(),
        "exp": caller.expires_at.unix_timestamp(),
    });
    Ok(answer::json(confirmed(description, caller.bound_to)))
}

/// With the certificate that a token is bound to (RFC 8705 §3.2).
fn confirmed(mut description: Value, bound_to: Option<Fingerprint>) -> Value {
    if let Some(certificate) = bound_to {
        description["cnf"] = json!(Confirmation { certificate });
    }
    description
}

/// `GET /.well-known/jwks.json`.
pub(crate) async fn jwks(State(app): State<Arc<App>>) -> Response {
    cacheable(app.tokens.published(clock::now()))
}

/// `GET /.well-known/oauth-authorization-server` (RFC 8414 §2).
pub(crate) async fn metadata(State(app): State<Arc<App>>) -> Response {
    let url = &app.public_url;
    let mut document = endpoints(&app);
    document["revocation_endpoint_auth_methods_supported"] =
        document["token_endpoint_auth_methods_supported"].clone();
    document["introspection_endpoint_auth_methods_supported"] =
        document["token_endpoint_auth_methods_supported"].clone();
    // Required by RFC 8414; there is no authorization endpoint.
    document["response_types_supported"] = json!([]);
    document["service_documentation"] = json!(format!("{url}/"));
    cacheable(document)
}

/// `GET /fhir/.well-known/smart-configuration` (SMART App Launch 2.2, backend services).
pub(crate) async fn smart(State(app): State<Arc<App>>) -> Response {
    let mut document = endpoints(&app);
    let capabilities = ["client-confidential-asymmetric", "client-confidential-symmetric", "permission-v2"];
    document["capabilities"] = json!(capabilities);
    document["code_challenge_methods_supported"] = json!([]);
    cacheable(document)
}

fn endpoints(app: &App) -> Value {
    let url = &app.public_url;
    let scopes: Vec<&str> = ROLES.into_iter().map(Role::scope).chain([OFFLINE]).collect();
    let mut ways = vec!["client_secret_basic", "client_secret_post", "private_key_jwt"];
    if app.asks_for_certificates {
        ways.push("tls_client_auth");
    }
    json!({
        "issuer": url,
        "jwks_uri": format!("{url}/.well-known/jwks.json"),
        "token_endpoint": format!("{url}/oauth/token"),
        "revocation_endpoint": format!("{url}/oauth/revoke"),
        "introspection_endpoint": format!("{url}/oauth/introspect"),
        "grant_types_supported": ["client_credentials", "refresh_token"],
        "token_endpoint_auth_methods_supported": ways,
        "tls_client_certificate_bound_access_tokens": app.asks_for_certificates,
        "token_endpoint_auth_signing_alg_values_supported": ["ES384", "RS384"],
        "scopes_supported": scopes,
    })
}

/// What everybody may know, for as long as a key is published before it signs.
fn cacheable(document: Value) -> Response {
    let mut response = answer::json(document);
    let age = format!("public, max-age={}", keys::CACHE.as_secs());
    if let Ok(age) = HeaderValue::from_str(&age) {
        response.headers_mut().insert(header::CACHE_CONTROL, age);
    }
    response
}
