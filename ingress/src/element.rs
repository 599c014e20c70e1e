//! Elements of a JSON request, with the places of their faults.
//!
//! Every fault is collected with its FHIRPath, up to a limit, so that one answer mends a whole request.

use std::{borrow::Cow, fmt::Write};

use dermflow_schemas::{
    error::{Code, Fault},
    limits::{MAX_FAULTS, MAX_TEXT_CHARS},
};

use crate::json::Json;

/// What is wrong with a request, as far as was read.
#[derive(Default)]
pub(crate) struct Faults(pub(crate) Vec<Fault>);

impl Faults {
    /// Notes a fault, unless there are too many already. The root of a plain object has no path.
    pub(crate) fn add(&mut self, code: Code, path: impl Into<String>, detail: Option<String>) {
        if self.0.len() < MAX_FAULTS {
            let field = Some(path.into()).filter(|path| !path.is_empty());
            self.0.push(Fault { code, field, detail });
        }
    }
}

/// A value and where it stands, as FHIRPath.
pub(crate) struct Node<'n, 'a> {
    pub(crate) json: &'n Json<'a>,
    pub(crate) path: String,
}

/// An object whose member names have been checked.
pub(crate) struct Element<'n, 'a> {
    members: &'n [(Cow<'a, str>, Json<'a>)],
    pub(crate) path: String,
}

impl<'n, 'a> Node<'n, 'a> {
    /// The FHIR element, if every member is one of `names` or an element of any type.
    pub(crate) fn element(&self, names: &[&str], faults: &mut Faults) -> Option<Element<'n, 'a>> {
        self.read(faults, |name| match name {
            "modifierExtension" | "implicitRules" => Some(Code::ExtensionModifier),
            "id" | "extension" => None,
            known if names.contains(&known.strip_prefix('_').unwrap_or(known)) => None,
            _ => Some(Code::ElementUnknown),
        })
    }

    /// The plain object, if every member is one of `names`.
    pub(crate) fn object(&self, names: &[&str], faults: &mut Faults) -> Option<Element<'n, 'a>> {
        self.read(faults, |name| (!names.contains(&name)).then_some(Code::ElementUnknown))
    }

    fn read(&self, faults: &mut Faults, refuse: impl Fn(&str) -> Option<Code>) -> Option<Element<'n, 'a>> {
        let Json::Object(members) = self.json else {
            let found = format!("expected object, found {}", self.json.kind());
            faults.add(Code::ElementType, &self.path, Some(found));
            return None;
        };
        for (name, value) in members {
            let path = join(&self.path, name);
            match refuse(name) {
                Some(code) => faults.add(code, path, None),
                None if matches!(value, Json::Null) => {
                    faults.add(Code::ElementType, path, Some("null is no value".into()));
                }
                None => {}
            }
        }
        Some(Element { members, path: self.path.clone() })
    }

    /// The items of an array, which may not be empty.
    pub(crate) fn items(&self, faults: &mut Faults) -> Vec<Node<'n, 'a>> {
        let Json::Array(items) = self.json else {
            faults.add(
                Code::ElementType,
                &self.path,
                Some(format!("expected array, found {}", self.json.kind())),
            );
            return Vec::new();
        };
        if items.is_empty() {
            faults.add(Code::ElementMissing, &self.path, Some("an array may not be empty".into()));
        }
        let node = |(i, json)| Node { json, path: format!("{}[{i}]", self.path) };
        items.iter().enumerate().map(node).collect()
    }

    /// A string that is not empty.
    pub(crate) fn string(&self, faults: &mut Faults) -> Option<&'n str> {
        match self.json {
            Json::String(text) if text.is_empty() => {
                faults.add(Code::ValueInvalid, &self.path, Some("a string may not be empty".into()));
                None
            }
            Json::String(text) => Some(text),
            other => {
                faults.add(
                    Code::ElementType,
                    &self.path,
                    Some(format!("expected string, found {}", other.kind())),
                );
                None
            }
        }
    }
}

impl<'n, 'a> Element<'n, 'a> {
    /// A member, if it is there.
    pub(crate) fn get(&self, name: &str) -> Option<Node<'n, 'a>> {
        let (_, json) = self.members.iter().find(|(member, _)| member == name)?;
        Some(Node { json, path: join(&self.path, name) })
    }

    /// A string that is copied into the report.
    pub(crate) fn text(&self, name: &str, faults: &mut Faults) -> Option<String> {
        let node = self.get(name)?;
        let text = node.string(faults)?;
        if text.chars().count() > MAX_TEXT_CHARS
            || text.chars().any(char::is_control)
            || text.trim().is_empty()
        {
            let rule = format!("1 to {MAX_TEXT_CHARS} characters, none of them a control character");
            faults.add(Code::ValueInvalid, node.path, Some(rule));
            return None;
        }
        Some(text.to_owned())
    }

    /// A text without any white space: a code or a URI.
    pub(crate) fn token(&self, name: &str, faults: &mut Faults) -> Option<String> {
        let text = self.text(name, faults)?;
        if text.chars().any(char::is_whitespace) {
            faults.add(Code::ValueInvalid, join(&self.path, name), Some("no white space".into()));
            return None;
        }
        Some(text)
    }

    /// A member that must be there.
    pub(crate) fn required(&self, name: &str, faults: &mut Faults) -> Option<Node<'n, 'a>> {
        let node = self.get(name);
        if node.is_none() {
            faults.add(Code::ElementMissing, join(&self.path, name), None);
        }
        node
    }
}

/// The path of a member; the members of the root of a plain object stand alone.
fn join(path: &str, name: &str) -> String {
    let name = identifier(name);
    if path.is_empty() { name.into_owned() } else { format!("{path}.{name}") }
}

/// A name from outside as an identifier of FHIRPath (N1, grammar): one that is more than letters and digits, or an
/// operator or literal, stands between backticks, with its control characters escaped.
fn identifier(name: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let is_keyword = ["and", "or", "xor", "implies", "div", "mod", "true", "false"].contains(&name);
    if name.chars().all(plain) && name.starts_with(|c: char| !c.is_ascii_digit()) && !is_keyword {
        return name.into();
    }
    let mut text = String::from("`");
    for c in name.chars() {
        let written = match c {
            '`' | '\\' => write!(text, "\\{c}"),
            c if c.is_control() => write!(text, "\\u{:04x}", u32::from(c)),
            c => write!(text, "{c}"),
        };
        written.expect("a string can be written");
    }
    text.push('`');
    text.into()
}
