//! What the small commands print: a table for people, one JSON object a line for scripts.

use std::io::{self, Write, stdout};

use serde_json::Value;

use crate::Failure;

/// How to print objects.
#[derive(Debug)]
pub(crate) struct Table {
    columns: &'static [(&'static str, usize)],
    json: bool,
    begun: bool,
}

impl Table {
    /// The members to show, each with the width of its column.
    pub(crate) fn new(columns: &'static [(&'static str, usize)], json: bool) -> Self {
        Self { columns, json, begun: false }
    }

    /// Prints one object.
    ///
    /// # Errors
    /// When nobody reads any more.
    pub(crate) fn row(&mut self, object: &Value) -> Result<(), Failure> {
        if self.json {
            return print(&object.to_string());
        }
        if !self.begun {
            self.begun = true;
            print(&self.line(str::to_uppercase))?;
        }
        print(&self.line(|name| text(&object[name])))
    }

    fn line(&self, cell: impl Fn(&str) -> String) -> String {
        let cells = self.columns.iter().map(|(name, width)| format!("{:width$}", cell(name), width = width));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    }
}

/// Prints an object: indented for people, on one line for scripts.
///
/// # Errors
/// When nobody reads any more.
pub(crate) fn object(object: &Value, json: bool) -> Result<(), Failure> {
    print(&if json { object.to_string() } else { format!("{object:#}") })
}

/// Prints a line on standard output.
///
/// # Errors
/// When nobody reads any more.
pub(crate) fn print(line: &str) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::Unfinished(format!("cannot write: {error}"));
    writeln!(stdout().lock(), "{line}").map_err(failed)
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_aligned_and_nothing_is_a_dash() {
        let table = Table::new(&[("sequence", 8), ("job", 4), ("lane", 4)], false);
        assert_eq!(table.line(str::to_uppercase), "SEQUENCE  JOB   LANE");
        let object = json!({"sequence": 7, "job": null, "lane": "bulk", "other": 1});
        assert_eq!(table.line(|name| text(&object[name])), "7         -     bulk");
    }
}
