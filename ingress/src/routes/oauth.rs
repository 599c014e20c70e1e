//! OAuth 2.0 for systems: tokens (RFC 6749 §4.4 and §6, RFC 7523, RFC 8705), revocation (RFC 7009), introspection (RFC 7662), and
//! the documents that let clients find all this (RFC 8414, RFC 7517, SMART App Launch 2.2).
//!
//! Errors have RFC 6749's form here, not the API's, because that is what OAuth libraries read.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use axum::{
    Extension, Json,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
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
use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use utoipa::{
    IntoResponses, ToSchema,
    openapi::{Content, Ref, RefOr, Response as Described, ResponseBuilder},
};
use uuid::Uuid;

use crate::{
    access::Verdict,
    answer::{self, Problem},
    app::App,
    audited::{Deeds, Origin, Refused},
    extract::{Body, Held, bearer, form_pairs, sign_ins_have_room},
    rates::{self, Counted},
    routes::openapi::{Any, Sent},
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
                let mut response = Json(OAuthError { error, error_description: description }).into_response();
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

/// How requests for tokens, and about them, are refused.
pub(super) enum Refusals {}

impl IntoResponses for Refusals {
    fn responses() -> BTreeMap<String, RefOr<Described>> {
        let oauth = |text: &str| {
            let content = Content::new(Some(Ref::from_schema_name("OAuthError")));
            ResponseBuilder::new().description(text).content("application/json", content).build().into()
        };
        let others = <Sent as IntoResponses>::responses();
        let own = [("400", oauth("RFC 6749 §5.2.")), ("401", oauth("The caller did not prove itself."))];
        others.into_iter().chain(own.map(|(status, refusal)| (status.to_owned(), refusal))).collect()
    }
}

/// An error of RFC 6749 §5.2.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct OAuthError {
    /// The code.
    error: &'static str,
    /// One sentence.
    error_description: &'static str,
}

/// A request for a token.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "a description: fields are read one by one, each given once")]
struct TokenRequest {
    /// `client_credentials` or `refresh_token`.
    grant_type: String,
    /// Less than all that the client may do, and `offline_access` for a refresh token.
    scope: Option<String>,
    /// Unless the client proves itself with Basic.
    client_id: Option<String>,
    /// The same.
    client_secret: Option<String>,
    /// `urn:ietf:params:oauth:client-assertion-type:jwt-bearer`.
    client_assertion_type: Option<String>,
    /// A JWT (RFC 7523, `private_key_jwt`).
    client_assertion: Option<String>,
    /// For the grant of this name.
    refresh_token: Option<String>,
}

/// A token that something is asked about, or done to.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "a description: fields are read one by one, each given once")]
struct AboutToken {
    /// An access token or a refresh token.
    token: String,
    /// Unless the caller proves itself by a header.
    client_id: Option<String>,
    /// The same.
    client_secret: Option<String>,
}

/// A token (RFC 6749 §5.1).
#[derive(Debug, Serialize, ToSchema)]
#[expect(clippy::struct_field_names, reason = "the names of RFC 6749")]
pub(super) struct Token {
    /// To be sent as `Authorization: Bearer <token>`.
    access_token: String,
    /// `Bearer`, or at `/login` what clients of the device API look for.
    token_type: String,
    /// Seconds.
    expires_in: u64,
    /// What clients of the device API read.
    expires_in_minutes: u64,
    /// What it is good for.
    scope: String,
    /// Good once.
    #[serde(skip_serializing_if = "Option::is_none")]
    refresh_token: Option<String>,
}

/// What a token is good for (RFC 7662 §2.2): nothing but `active` when it is not good, or not the caller's. A refresh token
/// has neither audience nor id.
#[derive(Debug, Default, Serialize, ToSchema)]
struct Introspection {
    /// Whether it is good.
    active: bool,
    /// Who issued it.
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<String>,
    /// The account.
    #[serde(skip_serializing_if = "Option::is_none")]
    sub: Option<Uuid>,
    /// The same.
    #[serde(skip_serializing_if = "Option::is_none")]
    client_id: Option<Uuid>,
    /// What it is good for.
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<String>,
    /// When it ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    exp: Option<i64>,
    /// For whom it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    aud: Option<&'static str>,
    /// Its id.
    #[serde(skip_serializing_if = "Option::is_none")]
    jti: Option<Uuid>,
    /// Always `Bearer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    token_type: Option<&'static str>,
    /// When it was issued.
    #[serde(skip_serializing_if = "Option::is_none")]
    iat: Option<i64>,
    /// Since when it is good.
    #[serde(skip_serializing_if = "Option::is_none")]
    nbf: Option<i64>,
    /// What it is bound to (RFC 8705 §3.2).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    cnf: Option<Confirmation>,
}

/// The fields of a form, each given once (RFC 6749 §3.2). `Debug` shows none of them.
struct Form(HashMap<String, String>);

impl Form {
    async fn read(app: &App, headers: &HeaderMap, body: Body) -> Result<Self, Refusal> {
        sign_ins_have_room(app)?;
        let Held { bytes, .. } = body.read(app.bounds.bodies.share(None), MAX_FORM_BYTES).await?;
        let malformed = || invalid_request("The body is a form, application/x-www-form-urlencoded.");
        let fields = form_pairs(headers, bytes).await.ok_or_else(malformed)?;
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

/// A token for a client that proves itself (RFC 6749 §4.4), or for a refresh token (§6).
#[utoipa::path(post, path = "/oauth/token", operation_id = "token", tag = "sign-in", security((), ("client" = [])),
    request_body(content = TokenRequest, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "The token.", body = Token), Refusals, Any))]
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
    let token = Token {
        access_token: token.expose_secret().to_owned(),
        token_type: token_type.to_owned(),
        expires_in: seconds,
        expires_in_minutes: seconds / 60,
        scope,
        refresh_token: refresh.map(|refresh| refresh.expose_secret().to_owned()),
    };
    Ok(Json(token).into_response())
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

/// Ends a token: 200 whatever the token was (RFC 7009 §2.2). Another account's token stays as it is.
#[utoipa::path(post, path = "/oauth/revoke", operation_id = "revoke", tag = "sign-in",
    security((), ("client" = []), ("token" = [])),
    request_body(content = AboutToken, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "It is not good, or no longer."), Refusals, Any))]
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

/// What one of one's own tokens is good for (RFC 7662).
#[utoipa::path(post, path = "/oauth/introspect", operation_id = "introspect", tag = "sign-in",
    security((), ("client" = []), ("token" = [])),
    request_body(content = AboutToken, content_type = "application/x-www-form-urlencoded"),
    responses((status = 200, description = "What it is.", body = Introspection), Refusals, Any))]
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
    let told = |told: Introspection| Json(told).into_response();
    let good = |scope, ends: OffsetDateTime, bound_to: Option<Fingerprint>| Introspection {
        active: true,
        iss: Some(app.public_url.clone()),
        sub: Some(account),
        client_id: Some(account),
        scope: Some(scope),
        exp: Some(ends.unix_timestamp()),
        cnf: bound_to.map(|certificate| Confirmation { certificate }),
        ..Introspection::default()
    };
    let Ok(caller) = app.tokens.verify(token.expose_secret(), now) else {
        let described = refresh::describe(&app.sign_ins, &token, account, now).await?;
        let known = described.map(|refresh| good(refresh.scope, refresh.ends, refresh.bound_to));
        return Ok(told(known.unwrap_or_default()));
    };
    if caller.client.uuid() != account || app.access.judge(&caller) != Verdict::Open {
        return Ok(told(Introspection::default()));
    }
    let since = Some(caller.issued_at.unix_timestamp());
    Ok(told(Introspection {
        aud: Some(token::AUDIENCE),
        jti: Some(caller.jti),
        token_type: Some(BEARER),
        iat: since,
        nbf: since,
        ..good(caller.scope, caller.expires_at, caller.bound_to)
    }))
}

/// The keys that tokens are signed with (RFC 7517).
#[utoipa::path(get, path = "/.well-known/jwks.json", operation_id = "keys", tag = "documents", security(()),
    responses((status = 200, description = "A JWK set.", body = Object), Any))]
pub(crate) async fn jwks(State(app): State<Arc<App>>) -> Response {
    cacheable(app.tokens.published(clock::now()))
}

/// What OAuth libraries read (RFC 8414 §2).
#[utoipa::path(get, path = "/.well-known/oauth-authorization-server", operation_id = "authorizationServer",
    tag = "documents", security(()), responses((status = 200, description = "The metadata.", body = Object), Any))]
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

/// What SMART clients read (SMART App Launch 2.2, backend services).
#[utoipa::path(get, path = "/fhir/.well-known/smart-configuration", operation_id = "smartConfiguration",
    tag = "documents", security(()), responses((status = 200, description = "The metadata.", body = Object), Any))]
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
