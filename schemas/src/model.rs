//! Which model a caller wants: a name, or a name and a version, such as `derm7` or `derm7@2026.11.1`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::limits::MAX_MODEL_CHARS;

/// A text names no model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a name, or a name, @ and a version, each of letters, digits and . _ + -, {MAX_MODEL_CHARS} at most")]
pub struct NoModelName;

/// A model by its name, in any version or in one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModelRef {
    name: String,
    version: Option<String>,
}

impl ModelRef {
    /// One version of a model.
    ///
    /// # Errors
    /// When name or version has other characters, or too many.
    pub fn exact(name: &str, version: &str) -> Result<Self, NoModelName> {
        Ok(Self { name: part(name)?, version: Some(part(version)?) })
    }

    /// The same in any version.
    #[must_use]
    pub fn any_version(&self) -> Self {
        Self { name: self.name.clone(), version: None }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version, when there is one.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// Whether `model`, of which there is a version, is what is meant.
    pub fn means(&self, model: &Self) -> bool {
        self.name == model.name && (self.version.is_none() || self.version == model.version)
    }
}

fn part(text: &str) -> Result<String, NoModelName> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._+-".contains(&byte);
    let fits = (1..=MAX_MODEL_CHARS).contains(&text.len()) && text.bytes().all(allowed);
    fits.then(|| text.to_owned()).ok_or(NoModelName)
}

impl FromStr for ModelRef {
    type Err = NoModelName;

    fn from_str(text: &str) -> Result<Self, NoModelName> {
        match text.split_once('@') {
            Some((name, version)) => Self::exact(name, version),
            None => Ok(Self { name: part(text)?, version: None }),
        }
    }
}

impl TryFrom<String> for ModelRef {
    type Error = NoModelName;

    fn try_from(text: String) -> Result<Self, NoModelName> {
        text.parse()
    }
}

impl From<ModelRef> for String {
    fn from(model: ModelRef) -> Self {
        model.to_string()
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.version.iter().try_for_each(|version| write!(f, "@{version}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_every_version_and_a_version_itself() {
        let parse = |text: &str| text.parse::<ModelRef>();
        let (old, new) =
            (ModelRef::exact("derm7", "2026.11.1").unwrap(), ModelRef::exact("derm7", "2").unwrap());
        for (wanted, means) in [
            ("derm7", [true, true]),
            ("derm7@2026.11.1", [true, false]),
            ("derm7@2", [false, true]),
            ("derm", [false, false]),
        ] {
            let wanted = parse(wanted).unwrap();
            assert_eq!([&old, &new].map(|model| wanted.means(model)), means, "{wanted}");
            assert_eq!(parse(&wanted.to_string()), Ok(wanted));
        }
        assert_eq!(parse("derm7"), Ok(old.any_version()));
        let long = "m".repeat(MAX_MODEL_CHARS + 1);
        for bad in ["", "@", "a@", "@1", "a@1@2", "a b", "a/b", "a*", "ä", ">", &long] {
            assert_eq!(parse(bad), Err(NoModelName), "{bad}");
        }
    }
}
