//! What the OpenAPI documents of our services have in common.

use dermflow_schemas::error::{CODES, Retry};
use serde_json::Value;
use utoipa::{
    ToSchema,
    openapi::{Object, ObjectBuilder, Type},
};

/// An error (RFC 9457).
#[derive(Debug, ToSchema)]
pub struct Problem {
    /// The code as a URL.
    pub r#type: String,
    /// One sentence.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// The stable code.
    #[schema(schema_with = codes)]
    pub code: String,
    /// Whether a retry is safe.
    #[schema(schema_with = retries)]
    pub retry: String,
    /// Seconds to wait before it.
    pub retry_after: Option<u64>,
    /// The path.
    pub instance: String,
    /// What is wrong, and where.
    pub errors: Vec<Fault>,
}

/// A fault.
#[derive(Debug, ToSchema)]
pub struct Fault {
    /// The stable code.
    #[schema(schema_with = codes)]
    pub code: String,
    /// One sentence.
    pub detail: String,
    /// The member at fault.
    pub field: Option<String>,
    /// What helps to mend it.
    pub hint: Option<String>,
}

/// An error of the device API.
#[derive(Debug, ToSchema)]
pub struct DeviceProblem {
    /// With 400 and 422 a list with one entry a fault, otherwise a sentence.
    #[schema(value_type = Value)]
    pub detail: Value,
    /// The stable code.
    #[schema(schema_with = codes)]
    pub code: String,
    /// Whether a retry is safe.
    #[schema(schema_with = retries)]
    pub retry: String,
    /// Seconds to wait before it.
    pub retry_after: Option<u64>,
}

/// One of these words.
pub fn words<'w>(description: &str, words: impl IntoIterator<Item = &'w str>) -> Object {
    let words: Vec<Value> = words.into_iter().map(Value::from).collect();
    ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some(description))
        .enum_values(Some(words))
        .build()
}

/// The stable codes of errors.
pub fn codes() -> Object {
    words("The stable code.", CODES.iter().map(|code| code.kind().code))
}

/// Whether a retry is safe.
pub fn retries() -> Object {
    let all = [Retry::Never, Retry::Safe, Retry::SameKey, Retry::NewKey, Retry::Poll];
    words("Whether a retry is safe.", all.map(Retry::as_str))
}

/// The references of a document that lead nowhere, and how many lead somewhere.
pub fn dangling(document: &Value) -> (Vec<String>, usize) {
    let text = document.to_string();
    let references = text.split("\"$ref\":\"#").skip(1).filter_map(|rest| rest.split('"').next());
    let (sound, dangling): (Vec<&str>, Vec<&str>) =
        references.partition(|pointer| document.pointer(pointer).is_some());
    (dangling.into_iter().map(str::to_owned).collect(), sound.len())
}
