//! `/openapi.json`: the service described from its own handlers.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use dermflow_http::openapi::{Fault, Problem};
use utoipa::{
    IntoResponses, OpenApi, PartialSchema,
    openapi::{
        Content, Ref, RefOr, Response as Described, ResponseBuilder,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use super::{Service, access::Reader};

#[derive(OpenApi)]
#[openapi(
    info(title = "Dermflow: registration", description = "For staff, over mutual TLS only."),
    security(("session" = []))
)]
struct Api;

/// What handlers add to.
pub(super) fn document() -> utoipa::openapi::OpenApi {
    let mut document = Api::openapi();
    let components = document.components.get_or_insert_default();
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(
        "The session that POST /sessions gives, over connections with the same client certificate.",
    ));
    components.add_security_scheme("session", SecurityScheme::Http(scheme.build()));
    components.schemas.insert("Problem".into(), Problem::schema());
    components.schemas.insert("Fault".into(), Fault::schema());
    document
}

/// The answers that every route may give.
#[derive(Debug)]
pub(super) enum Errors {}

impl IntoResponses for Errors {
    fn responses() -> BTreeMap<String, RefOr<Described>> {
        let described = [
            ("400", "The request cannot be read."),
            ("401", "A session of staff is needed, or name and password are wrong."),
            ("403", "The role of the session's account does not allow it."),
            ("404", "There is no such account, or credential."),
            ("408", "The body did not arrive in time."),
            ("409", "The account does not stand so that this could be done."),
            ("413", "The body is too large."),
            ("415", "The body has another media type."),
            ("422", "A value is not allowed."),
            ("429", "There were too many wrong passwords, or requests."),
            ("500", "The server failed."),
            ("503", "The database cannot be reached, or too many sign in at once."),
        ];
        let answer = |(status, text): (&str, &str)| {
            let content = Content::new(Some(Ref::from_schema_name("Problem")));
            let response =
                ResponseBuilder::new().description(text).content("application/problem+json", content);
            (status.to_owned(), RefOr::T(response.build()))
        };
        described.map(answer).into()
    }
}

/// This document.
#[utoipa::path(get, path = "/openapi.json",
    responses((status = 200, description = "OpenAPI 3.1.", body = Object), Errors))]
pub(super) async fn describe(State(service): State<Arc<Service>>, _: Reader) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], service.api.clone()).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use dermflow_http::openapi::dangling;
    use serde_json::{Value, json};

    use super::super::routes;

    #[test]
    fn the_document_has_every_route_and_says_which_ones_are_open() {
        let (_, api) = routes().split_for_parts();
        let api: Value = serde_json::to_value(api).unwrap();
        assert_eq!(api["openapi"], "3.1.0");
        let (mut open, mut ids) = (Vec::new(), HashSet::new());
        for (path, item) in api["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                assert!(ids.insert(operation["operationId"].to_string()), "{method} {path}");
                if operation["security"] == json!([{}]) {
                    open.push(format!("{method} {path}"));
                } else {
                    assert!(operation["security"].is_null(), "{method} {path}");
                    assert!(operation["responses"]["401"].is_object(), "{method} {path}");
                }
            }
        }
        assert_eq!(open, ["post /sessions"]);
        assert_eq!(api["security"], json!([{"session": []}]));
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere() {
        let (_, api) = routes().split_for_parts();
        let api: Value = serde_json::to_value(api).unwrap();
        let (dangling, sound) = dangling(&api);
        assert!(dangling.is_empty(), "{dangling:?}");
        assert!(sound > 100, "{sound}");
    }
}
