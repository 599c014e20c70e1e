//! A request of the device API, member by member.

use std::ops::RangeInclusive;

use dermflow_schemas::{
    error::{ApiError, Code},
    limits::MAX_TEXT_CHARS,
};

use crate::{element::Faults, json::Json};

/// A value and its place, such as `payload[0].contentAttachment.data`; the body's own is empty.
pub(super) struct Part<'n, 'a> {
    json: &'n Json<'a>,
    pub(super) path: String,
}

/// An object and its place.
pub(super) struct Object<'n, 'a> {
    members: &'n [(std::borrow::Cow<'a, str>, Json<'a>)],
    path: String,
}

/// Reads a body.
pub(super) fn read<T>(
    body: &[u8],
    read: impl FnOnce(&Object<'_, '_>, &mut Faults) -> Option<T>,
) -> Result<T, ApiError> {
    let json = Json::parse(body)?;
    let mut faults = Faults::default();
    let root = Part { json: &json, path: String::new() };
    match root.object(&mut faults).and_then(|root| read(&root, &mut faults)) {
        Some(read) if faults.0.is_empty() => Ok(read),
        _ => Err(faults.0.into()),
    }
}

impl<'n, 'a> Part<'n, 'a> {
    pub(super) fn object(&self, faults: &mut Faults) -> Option<Object<'n, 'a>> {
        match self.json {
            Json::Object(members) => Some(Object { members, path: self.path.clone() }),
            _ => self.wrong("an object", faults),
        }
    }

    /// The items of an array.
    pub(super) fn items(&self, faults: &mut Faults) -> Option<Vec<Part<'n, 'a>>> {
        let Json::Array(items) = self.json else { return self.wrong("an array", faults) };
        let item = |(i, json)| Part { json, path: format!("{}[{i}]", self.path) };
        Some(items.iter().enumerate().map(item).collect())
    }

    pub(super) fn string(&self, faults: &mut Faults) -> Option<&'n str> {
        match self.json {
            Json::String(text) => Some(text),
            _ => self.wrong("a string", faults),
        }
    }

    /// A text that may be copied into a report.
    pub(super) fn text(&self, faults: &mut Faults) -> Option<&'n str> {
        let text = self.string(faults)?;
        if text.chars().count() > MAX_TEXT_CHARS || text.chars().any(char::is_control) {
            let rule = format!("At most {MAX_TEXT_CHARS} characters, none of them a control character.");
            faults.add(Code::ValueInvalid, &self.path, Some(rule));
            return None;
        }
        Some(text)
    }

    /// A number in a range, `whole` or not.
    pub(super) fn number(
        &self,
        range: &RangeInclusive<f64>,
        whole: bool,
        faults: &mut Faults,
    ) -> Option<f64> {
        match self.json {
            Json::Number(number) if range.contains(number) && (!whole || number.fract() == 0.0) => {
                Some(*number)
            }
            _ => {
                let kind = if whole { "a whole number" } else { "a number" };
                self.wrong(&format!("{kind} from {} to {}", range.start(), range.end()), faults)
            }
        }
    }

    /// Notes that something else was expected.
    pub(super) fn wrong<T>(&self, expected: &str, faults: &mut Faults) -> Option<T> {
        let rule = format!("Expected {expected}, found {}.", self.json.kind());
        faults.add(Code::ValueInvalid, &self.path, Some(rule));
        None
    }
}

impl<'n, 'a> Object<'n, 'a> {
    /// A member, if it is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<Part<'n, 'a>> {
        let (_, json) = self.members.iter().find(|(member, _)| member == name)?;
        (!matches!(json, Json::Null)).then(|| Part { json, path: self.place(name) })
    }

    /// A member that must be there; one that is null has the wrong type.
    pub(super) fn required(&self, name: &str, faults: &mut Faults) -> Option<Part<'n, 'a>> {
        let path = self.place(name);
        let Some((_, json)) = self.members.iter().find(|(member, _)| member == name) else {
            faults.add(Code::ElementMissing, path, None);
            return None;
        };
        Some(Part { json, path })
    }

    /// A member that must be there, if it is not null.
    pub(super) fn nullable(&self, name: &str, faults: &mut Faults) -> Option<Part<'n, 'a>> {
        self.required(name, faults)?;
        self.get(name)
    }

    /// The names of the members.
    pub(super) fn names(&self) -> impl Iterator<Item = &'n str> {
        self.members.iter().map(|(name, _)| name.as_ref())
    }

    /// `name` is known to us: what callers call their members has no place in a path.
    fn place(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(body: &str) -> Vec<(&'static str, String)> {
        let error = read(body.as_bytes(), |root, faults| {
            let list = root.required("list", faults)?.items(faults)?;
            let first = list.first()?.object(faults)?;
            first.required("name", faults).and_then(|name| name.text(faults).map(drop));
            first.required("count", faults).and_then(|count| count.number(&(0.0..=3.0), true, faults))?;
            first.get("weight").map(|weight| weight.number(&(0.0..=1.0), false, faults));
            Some(())
        });
        let faults = error.err().map(|error| error.faults).unwrap_or_default();
        faults.into_iter().map(|fault| (fault.code.kind().code, fault.field.unwrap_or_default())).collect()
    }

    #[test]
    fn a_fault_is_one_entry_where_the_first_member_is_missing_or_wrong() {
        let one = |code, field: &str| vec![(code, field.to_owned())];
        assert_eq!(faults(r#"{"list":[{"name":"a","count":3,"weight":0.5,"more":null}],"x":1}"#), []);
        assert_eq!(faults(r#"{"list":[{"name":"a","count":3,"weight":null}]}"#), []);
        assert_eq!(faults("{}"), one("element-missing", "list"));
        assert_eq!(faults("7"), one("value-invalid", ""));
        assert_eq!(faults(r#"{"list":null}"#), one("value-invalid", "list"));
        assert_eq!(faults(r#"{"list":[7]}"#), one("value-invalid", "list[0]"));
        assert_eq!(faults(r#"{"list":[{"name":"a"}]}"#), one("element-missing", "list[0].count"));
        for count in ["4", "-1", "1.5", "\"1\"", "true", "1e400"] {
            let body = format!(r#"{{"list":[{{"name":"a","count":{count}}}]}}"#);
            let found = faults(&body);
            assert!(
                found == one("value-invalid", "list[0].count") || found[0].0 == "json-malformed",
                "{found:?}"
            );
        }
        assert_eq!(faults(r#"{"list":[{"name":"\u0000","count":1}]}"#), one("value-invalid", "list[0].name"));
    }
}
