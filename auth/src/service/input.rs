//! What handlers read from a request: bodies and queries, within bounds, with no member that is not known.

use axum::{
    Form,
    body::to_bytes,
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, Request as HttpRequest, header, request::Parts},
};
use bytes::Bytes;
use dermflow_http::answer::Problem;
use dermflow_schemas::{
    error::{ApiError, Code},
    limits::{BODY_TIMEOUT, MAX_STAFF_BODY_BYTES},
};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

/// A body of JSON.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) T);

/// A body of JSON; none, or null, for a `T` that is empty.
#[derive(Debug)]
pub(super) struct Perhaps<T>(pub(super) T);

/// A body of JSON or a form.
#[derive(Debug)]
pub(super) struct JsonOrForm<T>(pub(super) T);

/// The query of the URL.
#[derive(Debug)]
pub(super) struct Parameters<T>(pub(super) T);

/// What the path names. Whatever has another form names nothing.
#[derive(Debug)]
pub(super) struct Named<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (headers, bytes) = read(request).await?;
        if !is(&headers, &["application/json", "application/merge-patch+json"]) {
            return Err(Code::MediaType.into());
        }
        parse(&bytes).map(Self)
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Default> FromRequest<S> for Perhaps<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (headers, bytes) = read(request).await?;
        match bytes.is_empty() {
            true => Ok(Self(T::default())),
            false if is(&headers, &["application/json"]) => {
                parse(&bytes).map(|body: Option<T>| Self(body.unwrap_or_default()))
            }
            false => Err(Code::MediaType.into()),
        }
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonOrForm<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (headers, bytes) = read(request).await?;
        if is(&headers, &["application/json"]) {
            return parse(&bytes).map(Self);
        }
        if !is(&headers, &["application/x-www-form-urlencoded"]) {
            return Err(Code::MediaType.into());
        }
        let mut request = HttpRequest::post("/").body(bytes.into()).map_err(|_| Code::FormInvalid)?;
        *request.headers_mut() = headers;
        let form = Form::from_request(request, &()).await.map_err(|_| Code::FormInvalid)?;
        Ok(Self(form.0))
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Parameters<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::from_request_parts(parts, state).await.map_err(|_| Code::QueryInvalid)?;
        Ok(Self(query.0))
    }
}

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Named<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::from_request_parts(parts, state).await.map_err(|_| Code::NotFound)?;
        Ok(Self(path.0))
    }
}

async fn read(request: Request) -> Result<(HeaderMap, Bytes), Problem> {
    let (parts, body) = request.into_parts();
    let bytes = timeout(BODY_TIMEOUT, to_bytes(body, MAX_STAFF_BODY_BYTES)).await;
    let bytes = bytes.map_err(|_| Code::BodyTimeout)?.map_err(|_| {
        ApiError::from(Code::BodyTooLarge).detail(format!("limit {MAX_STAFF_BODY_BYTES} bytes"))
    })?;
    Ok((parts.headers, bytes))
}

fn is(headers: &HeaderMap, types: &[&str]) -> bool {
    let named = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let named = named.split(';').next().unwrap_or_default().trim();
    types.iter().any(|kind| named.eq_ignore_ascii_case(kind))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(bytes).map_err(|error| {
        let message = error.to_string();
        let code = if !error.is_data() {
            Code::JsonMalformed
        } else if message.starts_with("unknown field") {
            Code::ElementUnknown
        } else if message.starts_with("missing field") {
            Code::ElementMissing
        } else if message.starts_with("duplicate field") {
            Code::ElementRepeated
        } else {
            Code::ValueInvalid
        };
        // Other messages may quote a value, and that may be a password.
        let place = format!("line {}, column {}", error.line(), error.column());
        let quotes_names_only = matches!(code, Code::ElementUnknown | Code::ElementMissing);
        ApiError::from(code).detail(if quotes_names_only { message } else { place }).into()
    })
}

#[cfg(test)]
mod tests {
    use dermflow_auth::{registry::Change, users::QuotaChange};
    use serde_json::Value;

    use super::*;

    fn fault(body: &str) -> Value {
        parse::<Change>(body.as_bytes()).unwrap_err().to_json()
    }

    #[test]
    fn what_is_wrong_with_a_body_is_said_without_its_values() {
        assert_eq!(fault(r#"{"is_admin": true}"#)["code"], "element-unknown");
        assert_eq!(fault(r#"{"role": "hunter2"}"#)["code"], "value-invalid");
        assert!(!fault(r#"{"role": "hunter2"}"#).to_string().contains("hunter2"));
        assert_eq!(fault(r#"{"disabled": true, "disabled": false}"#)["code"], "element-repeated");
        assert_eq!(fault(r#"{"disabled": true"#)["code"], "json-malformed");
    }

    #[test]
    fn null_takes_away_and_what_is_left_out_stays() {
        let change: Change = parse(br#"{"contact": null}"#).unwrap();
        assert_eq!((change.contact, change.expires_at), (Some(None), None));
        let quota = |body: &str| parse::<Change>(body.as_bytes()).unwrap().quota;
        let change = quota(r#"{"quota": {"jobs": null, "weight": 3}}"#);
        assert_eq!(change, QuotaChange { jobs: Some(None), weight: Some(Some(3)), ..QuotaChange::default() });
        assert_eq!(quota(r#"{"quota": null}"#), QuotaChange::DEFAULT);
        assert_eq!(quota("{}"), QuotaChange::default());
    }
}
