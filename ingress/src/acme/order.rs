//! One order at the ACME server, from the account to the certificate.

use std::{future::Future, pin::Pin, time::Duration};

use axum::http::{HeaderMap, Method, header};
use dermflow_auth::db::DbError;
use dermflow_http::certificate::{renewal_id, validity};
use dermflow_schemas::{
    clock,
    limits::{ACME_ASK, ACME_ASK_BOUNDS, ACME_SPREAD},
    seal::{Content, SealError},
};
use http_body_util::BodyExt;
use instant_acme::{
    Account, AuthorizationStatus, BodyWrapper, BytesResponse, CertificateIdentifier, ChallengeType,
    HttpClient, Identifier, NewAccount, NewOrder, Order, OrderStatus, RetryPolicy,
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use time::OffsetDateTime;
use tokio::time::sleep;
use uuid::Uuid;

use super::{Acme, ChallengeKind, certified};
use crate::{
    app::App,
    store::acme::{Challenge, Obtained},
};

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the ACME server: {0}")]
    Server(#[from] instant_acme::Error),
    #[error("the order took too long")]
    TimedOut,
    #[error("the ACME server offers no such challenge for {0}")]
    NoChallenge(String),
    #[error("the authorisation of {0} is {1:?}")]
    NotAuthorised(String, AuthorizationStatus),
    #[error("the order is {0:?}")]
    NotReady(OrderStatus),
    #[error("what was issued is no certificate")]
    NoCertificate,
    #[error(transparent)]
    Database(#[from] DbError),
    #[error(transparent)]
    Seal(#[from] SealError),
    #[error("{0}")]
    Key(#[from] rcgen::Error),
    #[error("the account's credentials cannot be written: {0}")]
    Credentials(#[from] serde_json::Error),
}

impl Failure {
    /// In one word: of a refusal by the server, the type of its problem (RFC 8555 §6.7).
    pub(super) fn kind(&self) -> &str {
        match self {
            Self::Server(instant_acme::Error::Api(problem)) => {
                let kind = problem.r#type.as_deref().unwrap_or_default();
                kind.strip_prefix("urn:ietf:params:acme:error:")
                    .filter(|kind| kind.len() <= 40 && kind.bytes().all(|byte| byte.is_ascii_alphanumeric()))
                    .unwrap_or("refused")
            }
            Self::Server(instant_acme::Error::Timeout(_)) | Self::TimedOut => "timeout",
            Self::Server(instant_acme::Error::Other(_)) => "unreachable",
            Self::Server(_) | Self::NoCertificate => "protocol",
            Self::NoChallenge(_) | Self::NotAuthorised(..) | Self::NotReady(_) => "refused",
            Self::Database(_) | Self::Seal(_) | Self::Key(_) | Self::Credentials(_) => "internal",
        }
    }

    /// The server does not know the account, or no longer takes it: another one is needed.
    fn is_of_account(&self) -> bool {
        matches!(self.kind(), "accountDoesNotExist" | "unauthorized")
    }
}

/// When an ACME server wants a certificate renewed (RFC 9773 §4.2).
pub(super) struct Suggestion {
    /// From when to when.
    pub(super) window: [OffsetDateTime; 2],
    /// When to ask again.
    pub(super) again_in: Duration,
}

/// Asks the server when to renew a certificate (PEM); `None` when it has no opinion, or none that can be.
pub(super) async fn suggestion(app: &App, acme: &Acme, chain: &str) -> Result<Option<Suggestion>, Failure> {
    let Some(identifier) = identifier(chain) else { return Ok(None) };
    match account(app, acme).await?.renewal_info(&identifier).await {
        Ok((info, again_in)) => {
            let window = [info.suggested_window.start, info.suggested_window.end];
            Ok((window[0] < window[1]).then_some(Suggestion { window, again_in }))
        }
        Err(instant_acme::Error::Unsupported(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What the server knows the first certificate of a chain (PEM) by.
fn identifier(chain: &str) -> Option<CertificateIdentifier<'static>> {
    let [authority, serial] = renewal_id(&CertificateDer::from_pem_slice(chain.as_bytes()).ok()?)?;
    Some(CertificateIdentifier::new(authority.into(), serial.into()).into_owned())
}

/// Orders a certificate and sees it through.
pub(super) async fn obtain(app: &App, acme: &Acme, holder: Uuid) -> Result<Obtained, Failure> {
    let identifiers: Vec<Identifier> = acme.names.iter().cloned().map(Identifier::Dns).collect();
    let (plain, stored) = (NewOrder::new(&identifiers), app.store.acme_certificate(&acme.key).await?);
    let replacing = stored
        .and_then(|(chain, ..)| identifier(&chain))
        .map(|replaced| NewOrder::new(&identifiers).replaces(replaced));
    let mut placed = place(app, acme, replacing.as_ref().unwrap_or(&plain)).await;
    // Servers refuse what is to be replaced in many words, among them those for an account that is none (RFC 9773 §5).
    if replacing.is_some() && matches!(placed, Err(Failure::Server(_))) {
        placed = place(app, acme, &plain).await;
    }
    if let Err(failure) = &placed
        && failure.is_of_account()
    {
        tracing::warn!(%failure, "the account is gone: another one is made");
        app.store.acme_set_account(&acme.directory, None, clock::now()).await?;
        // What is replaced was another account's.
        placed = place(app, acme, &plain).await;
    }
    let mut order = placed?;
    authorise(app, acme, holder, &mut order).await?;
    match order.poll_ready(&RetryPolicy::default()).await? {
        OrderStatus::Ready => {}
        status => return Err(Failure::NotReady(status)),
    }
    let key = KeyPair::generate()?;
    let mut request = CertificateParams::new(acme.names.clone())?;
    request.distinguished_name = DistinguishedName::new();
    order.finalize_csr(request.serialize_request(&key)?.der()).await?;
    let chain = order.poll_certificate(&RetryPolicy::default()).await?;
    let certified = certified(&chain, PrivateKeyDer::Pkcs8(key.serialize_der().into()));
    let certified = certified.map_err(|_| Failure::NoCertificate)?;
    let validity = certified.cert.first().and_then(validity);
    let (not_before, not_after) = validity.ok_or(Failure::NoCertificate)?;
    let issued_at = clock::now();
    let key = app.keyring.seal(Content::CertificateKey(&acme.key), key.serialize_der(), issued_at)?;
    let renew_at = renew_at(not_before, not_after);
    Ok(Obtained { chain, key, issued_at, not_after, renew_at })
}

async fn place(app: &App, acme: &Acme, order: &NewOrder<'_>) -> Result<Order, Failure> {
    Ok(account(app, acme).await?.new_order(order).await?)
}

/// The account of this system at the server, made when there is none.
async fn account(app: &App, acme: &Acme) -> Result<Account, Failure> {
    let content = Content::AcmeAccount(&acme.directory);
    let http = || Account::builder_with_http(Box::new(Http(acme.http.clone())));
    if let Some(sealed) = app.store.acme_account(&acme.directory).await? {
        match app.keyring.open(content, &sealed) {
            Ok(credentials) => {
                let account = http().from_credentials(serde_json::from_slice(&credentials)?).await?;
                return Ok(account);
            }
            Err(error) => tracing::error!(%error, "the account's key is lost: another one is made"),
        }
    }
    let contact: Vec<&str> = acme.contact.as_deref().into_iter().collect();
    // The options demand it.
    let account =
        NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
    let (account, credentials) =
        http().create(&account, acme.directory.clone(), acme.external.as_ref()).await?;
    let now = clock::now();
    let sealed = app.keyring.seal(content, serde_json::to_vec(&credentials)?, now)?;
    app.store.acme_set_account(&acme.directory, Some(&sealed), now).await?;
    tracing::info!(account = account.id(), "an ACME account was made");
    Ok(account)
}

/// Shows the server that every name is ours.
async fn authorise(app: &App, acme: &Acme, holder: Uuid, order: &mut Order) -> Result<(), Failure> {
    let kind = match acme.challenge {
        ChallengeKind::Http01 => ChallengeType::Http01,
        ChallengeKind::TlsAlpn01 => ChallengeType::TlsAlpn01,
    };
    let mut challenges = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        let name = authorization.identifier().to_string();
        match authorization.status {
            AuthorizationStatus::Pending => {}
            AuthorizationStatus::Valid => continue,
            status => return Err(Failure::NotAuthorised(name, status)),
        }
        let challenge = authorization.challenge(kind.clone()).ok_or(Failure::NoChallenge(name.clone()))?;
        let key_authorization = challenge.key_authorization().as_str().to_owned();
        challenges.push(Challenge { name, token: challenge.token.clone(), key_authorization });
    }
    if challenges.is_empty() {
        return Ok(());
    }
    app.store.acme_challenges(&acme.key, holder, &challenges).await?;
    // The server may ask any replica.
    sleep(ACME_SPREAD).await;
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Pending
            && let Some(mut challenge) = authorization.challenge(kind.clone())
        {
            challenge.set_ready().await?;
        }
    }
    Ok(())
}

/// At two thirds of the life, and up to a thirtieth of it earlier, so that those of many systems do not come at once.
fn renew_at(not_before: OffsetDateTime, not_after: OffsetDateTime) -> OffsetDateTime {
    not_before + (not_after - not_before) * (2.0 / 3.0 - fastrand::f64() / 30.0)
}

/// Our HTTP client, as the library wants it.
struct Http(reqwest::Client);

impl HttpClient for Http {
    fn request(
        &self,
        request: axum::http::Request<BodyWrapper<bytes::Bytes>>,
    ) -> Pin<Box<dyn Future<Output = Result<BytesResponse, instant_acme::Error>> + Send>> {
        let http = self.0.clone();
        let other = |error: reqwest::Error| instant_acme::Error::Other(error.into());
        Box::pin(async move {
            let (parts, body) = request.into_parts();
            let is_read = parts.method == Method::GET;
            let Ok(body) = body.collect().await;
            let request = axum::http::Request::from_parts(parts, body.to_bytes());
            let answer = http.execute(request.try_into().map_err(other)?).await.map_err(other)?;
            let mut answer = axum::http::Response::<reqwest::Body>::from(answer);
            if is_read {
                bound_pause(answer.headers_mut());
            }
            Ok(answer.into())
        })
    }
}

/// The client library takes no renewal information without a `Retry-After`, which may be left out (RFC 9773 §4.3.3), and adds
/// whatever number stands there to the time.
fn bound_pause(headers: &mut HeaderMap) {
    let named = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
    let is_sound = |named: &str| {
        let is_number = named.bytes().all(|byte| byte.is_ascii_digit());
        !is_number || named.parse().is_ok_and(|seconds: u64| seconds <= ACME_ASK_BOUNDS[1].as_secs())
    };
    if !named.is_some_and(is_sound) {
        headers.insert(header::RETRY_AFTER, ACME_ASK.as_secs().into());
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{Issuer, KeyIdMethod};
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_certificate_is_known_by_issuer_and_serial_number() {
        // RFC 9773 §4.1.
        let authority = "69:88:5B:6B:87:46:40:41:E1:B3:7B:84:7B:A0:AE:2C:DE:01:C8:D4";
        let authority = authority.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let (mut ca, ca_key) = (CertificateParams::default(), KeyPair::generate().unwrap());
        ca.key_identifier_method = KeyIdMethod::PreSpecified(authority);
        let (mut leaf, key) = (CertificateParams::default(), KeyPair::generate().unwrap());
        leaf.serial_number = Some(vec![0x87, 0x65, 0x43, 0x21].into());
        leaf.use_authority_key_identifier_extension = true;
        let chain = leaf.signed_by(&key, &Issuer::new(ca, &ca_key)).unwrap().pem();
        assert_eq!(identifier(&chain).unwrap().to_string(), "aYhba4dGQEHhs3uEe6CuLN4ByNQ.AIdlQyE");
        assert!(identifier("nonsense").is_none());
        assert!(identifier(&CertificateParams::default().self_signed(&key).unwrap().pem()).is_none());
    }

    #[test]
    fn a_pause_is_named_and_has_an_end() {
        let bounded = |named: Option<&'static str>| {
            let mut headers = HeaderMap::new();
            headers.extend(named.map(|named| (header::RETRY_AFTER, header::HeaderValue::from_static(named))));
            bound_pause(&mut headers);
            headers[header::RETRY_AFTER].to_str().unwrap().to_owned()
        };
        let six_hours = "21600";
        assert_eq!(bounded(None), six_hours);
        assert_eq!(bounded(Some("18446744073709551615")), six_hours);
        assert_eq!(bounded(Some("99999999999999999999")), six_hours);
        assert_eq!(bounded(Some("3600")), "3600");
        assert_eq!(bounded(Some("Fri, 01 Jan 2027 00:00:00 GMT")), "Fri, 01 Jan 2027 00:00:00 GMT");
    }

    #[test]
    fn renewal_is_at_two_thirds_or_a_little_before() {
        let begins = datetime!(2026-01-01 0:00 UTC);
        let ends = begins + time::Duration::days(90);
        for _ in 0..100 {
            let days = (renew_at(begins, ends) - begins).as_seconds_f64() / 86_400.0;
            assert!((57.0..=60.0).contains(&days), "{days}");
        }
    }
}
