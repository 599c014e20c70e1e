//! What the service publishes about itself in FHIR R4: what it can do, and what its codes mean.
//!
//! Everything here is at `{CANONICAL}/{type}/{id}` by name and at `/fhir/{type}/{id}` to read.

mod capability;
pub(crate) mod parts;
pub(crate) mod search;
mod terminology;

use dermflow_schemas::fhir::CANONICAL;
use serde_json::{Value, json};

pub(crate) use capability::statement;

/// When these definitions were last changed.
const DATE: &str = "2026-11-22";

/// The definitions of a type, such as `CodeSystem`.
pub(crate) fn definitions(kind: &str) -> Vec<Value> {
    let all = capability::operations().into_iter().chain(terminology::definitions());
    all.filter(|definition| definition["resourceType"] == kind).collect()
}

/// What every definition begins with.
fn definition(kind: &str, id: &str, name: &str, title: &str, description: &str) -> Value {
    json!({
        "resourceType": kind,
        "id": id,
        "url": format!("{CANONICAL}/{kind}/{id}"),
        "version": env!("CARGO_PKG_VERSION"),
        "name": name,
        "title": title,
        "status": "active",
        "experimental": false,
        "date": DATE,
        "publisher": "Dermflow",
        "description": description,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_definition_has_a_name_of_its_own() {
        let mut names = std::collections::HashSet::new();
        for kind in ["OperationDefinition", "CodeSystem", "ValueSet", "ConceptMap"] {
            let definitions = definitions(kind);
            assert!(!definitions.is_empty(), "{kind}");
            for definition in definitions {
                assert!(names.insert(definition["url"].to_string()), "{}", definition["url"]);
                assert!(names.insert(definition["name"].to_string()), "{}", definition["name"]);
            }
        }
    }
}
