//! The device API: the JSON that clients of other analysers speak, over the same jobs, rates and audit trail.
//!
//! A request is read leniently, as those clients are used to: members that nobody knows are let be, and every fault is
//! one entry, at the first member that is missing or wrong on its way.

pub(crate) mod about;
mod body;
pub(crate) mod diagnosis;
pub(crate) mod questionnaires;
pub(crate) mod report;
mod score;
pub(crate) mod severity;
pub(crate) mod sites;

use serde_json::{Value, json};

/// Who defines a code that is in no public code system.
const ISSUER: &str = "Dermflow";

/// A code of our own: these clients want every key there.
fn own_code(code: &str, text: &str) -> Value {
    let coding = json!({
        "code": code, "display": null, "system": null, "systemDisplay": ISSUER, "version": null,
    });
    json!({ "text": text, "coding": [coding] })
}
