//! JSON that borrows from the request body and has a bound on its size in memory.
//!
//! `serde_json::Value` would copy every image and let 24 MiB of `[[],[],…` grow to gigabytes. This keeps the
//! images where they are, counts values against [`MAX_JSON_VALUES`], and refuses an object that names a member
//! twice, which two parsers could read in two ways (RFC 8259 §4).

use std::{borrow::Cow, cell::Cell, fmt};

use dermflow_schemas::{
    error::{ApiError, Code},
    limits::{MAX_JSON_VALUES, MAX_NAME_BYTES},
};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// A JSON value. `Debug` prints its kind only: it may hold an image or a patient's name.
pub(crate) enum Json<'a> {
    Null,
    Bool,
    Number(f64),
    String(Cow<'a, str>),
    Array(Vec<Json<'a>>),
    Object(Vec<(Cow<'a, str>, Json<'a>)>),
}

impl fmt::Debug for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind())
    }
}

impl<'a> Json<'a> {
    /// Parses a whole body.
    pub(crate) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let budget = Cell::new(MAX_JSON_VALUES);
        let mut deserializer = serde_json::Deserializer::from_slice(body);
        let value = Value { budget: &budget }
            .deserialize(&mut deserializer)
            .and_then(|value| deserializer.end().map(|()| value));
        value.map_err(|error| {
            if budget.get() == 0 {
                ApiError::from(Code::JsonTooComplex).detail(format!("at most {MAX_JSON_VALUES} values"))
            } else {
                // The parser's own message may quote the body.
                let at = format!("line {}, column {}", error.line(), error.column());
                ApiError::from(Code::JsonMalformed).detail(at)
            }
        })
    }

    /// What it is, in the words of RFC 8259.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool => "boolean",
            Self::Number(_) => "number",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::Object(_) => "object",
        }
    }
}

#[derive(Clone, Copy)]
struct Value<'b> {
    budget: &'b Cell<u32>,
}

impl<'a> DeserializeSeed<'a> for Value<'_> {
    type Value = Json<'a>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Json<'a>, D::Error> {
        match self.budget.get().checked_sub(1) {
            None | Some(0) => {
                self.budget.set(0);
                Err(D::Error::custom("too many values"))
            }
            Some(left) => {
                self.budget.set(left);
                deserializer.deserialize_any(self)
            }
        }
    }
}

impl<'a> Visitor<'a> for Value<'_> {
    type Value = Json<'a>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Json<'a>, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Json<'a>, E> {
        Ok(Json::Bool)
    }

    fn visit_u64<E>(self, number: u64) -> Result<Json<'a>, E> {
        Ok(Json::Number(number as f64))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Json<'a>, E> {
        Ok(Json::Number(number as f64))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Json<'a>, E> {
        Ok(Json::Number(number))
    }

    fn visit_borrowed_str<E>(self, text: &'a str) -> Result<Json<'a>, E> {
        Ok(Json::String(text.into()))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json<'a>, E> {
        Ok(Json::String(text.to_owned().into()))
    }

    fn visit_seq<A: SeqAccess<'a>>(self, mut seq: A) -> Result<Json<'a>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<Json<'a>, A::Error> {
        let mut members: Vec<(Cow<'a, str>, Json<'a>)> = Vec::new();
        while let Some(name) = map.next_key_seed(Name)? {
            if members.iter().any(|(seen, _)| *seen == name) {
                return Err(A::Error::custom("a member is named twice"));
            }
            members.push((name, map.next_value_seed(self)?));
        }
        Ok(Json::Object(members))
    }
}

struct Name;

impl<'a> DeserializeSeed<'a> for Name {
    type Value = Cow<'a, str>;

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Cow<'a, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'a> Visitor<'a> for Name {
    type Value = Cow<'a, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a member's name")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'a str) -> Result<Cow<'a, str>, E> {
        // Names are compared with each other: long ones would make that costly.
        if text.len() > MAX_NAME_BYTES { Err(E::custom("a name is too long")) } else { Ok(text.into()) }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Cow<'a, str>, E> {
        if text.len() > MAX_NAME_BYTES {
            Err(E::custom("a name is too long"))
        } else {
            Ok(text.to_owned().into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(body: &str) -> Option<&'static str> {
        Json::parse(body.as_bytes()).err().map(|error| error.kind().code)
    }

    #[test]
    fn strings_are_borrowed_from_the_body() {
        let body = br#"{"data":"AAEC","title":"a\"b"}"#;
        let Json::Object(members) = Json::parse(body).unwrap() else { panic!("not an object") };
        assert!(matches!(&members[0].1, Json::String(Cow::Borrowed("AAEC"))));
        assert!(matches!(&members[1].1, Json::String(text) if text == "a\"b"));
    }

    #[test]
    fn what_is_not_exactly_one_json_value_is_refused() {
        for bad in
            ["", "{", "{}{}", "{\"a\":1,\"a\":2}", "{\"a\":1,\"\\u0061\":2}", "{'a':1}", "[1,]", "\u{feff}{}"]
        {
            assert_eq!(code(bad), Some("json-malformed"), "{bad}");
        }
        assert_eq!(code(&"[".repeat(100_000)), Some("json-malformed"));
    }

    #[test]
    fn more_values_than_the_limit_are_refused_before_they_take_memory() {
        let many = format!("[{}[]]", "[],".repeat(MAX_JSON_VALUES as usize));
        assert_eq!(code(&many), Some("json-too-complex"));
    }
}
