//! Search parameters as FHIR R4 has them (<https://hl7.org/fhir/R4/search.html>).

use std::fmt::Display;

use dermflow_schemas::fhir;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use time::{
    Date, Duration, Month, OffsetDateTime, UtcOffset, format_description::well_known::Rfc3339,
    macros::format_description,
};

/// What stands in a query as it is (RFC 3986 §2.3), and what FHIR separates with.
const PLAIN: AsciiSet = NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b':')
    .remove(b',')
    .remove(b'/')
    .remove(b'$');

/// A page of what was found at `url` with `parameters` (R4 Bundle, `searchset`), and where the next one begins, if there is
/// one.
pub(crate) fn searchset(
    url: &str,
    parameters: &[(String, String)],
    next: Option<&str>,
    entries: Vec<Value>,
) -> Value {
    let pairs = || parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let link = |relation: &str, query: &str| {
        let mark = if query.is_empty() { "" } else { "?" };
        json!({"relation": relation, "url": format!("{url}{mark}{query}")})
    };
    let mut links = vec![link("self", &query(pairs()))];
    if let Some(next) = next {
        let kept = pairs().filter(|(name, _)| *name != CURSOR);
        links.push(link("next", &query(kept.chain([(CURSOR, next)]))));
    }
    let mut bundle = json!({"resourceType": "Bundle", "type": "searchset", "link": links});
    // FHIR has no empty lists.
    if !entries.is_empty() {
        bundle["entry"] = entries.into();
    }
    bundle
}

/// Where a page begins.
const CURSOR: &str = "_cursor";

/// A resource that was found, at `url` with its `id`.
pub(crate) fn found(url: &str, id: impl Display, resource: Value) -> Value {
    entry(&format!("{url}/{id}"), "match", resource)
}

/// A resource, and why it is there (R4 value set `search-entry-mode`).
pub(crate) fn entry(full_url: &str, mode: &str, resource: Value) -> Value {
    let mut entry = json!({"fullUrl": full_url, "search": {"mode": mode}});
    entry["resource"] = resource;
    entry
}

fn query<'p>(parameters: impl IntoIterator<Item = (&'p str, &'p str)>) -> String {
    let escaped = |text: &'p str| utf8_percent_encode(text, &PLAIN);
    let pairs: Vec<String> =
        parameters.into_iter().map(|(name, value)| format!("{}={}", escaped(name), escaped(value))).collect();
    pairs.join("&")
}

/// The values between commas, of which one has to match; a backslash makes a comma, a bar, a dollar sign or itself plain.
/// `None` when one is empty, or something else is behind a backslash.
pub(crate) fn values(text: &str) -> Option<Vec<String>> {
    let (mut values, mut chars) = (vec![String::new()], text.chars());
    while let Some(c) = chars.next() {
        let c = match c {
            ',' => {
                values.push(String::new());
                continue;
            }
            '\\' => chars.next().filter(|c| [',', '|', '$', '\\'].contains(c))?,
            c => c,
        };
        values.last_mut()?.push(c);
    }
    values.iter().all(|value| !value.is_empty()).then_some(values)
}

/// The code that a token is about, where the element has a code alone, of `system`: the code as it is, after that system,
/// or after none, as such an element has none beside it. What is of another system stays whole, and is no code.
/// `None` without a code: a system alone says nothing here.
pub(crate) fn code<'t>(token: &'t str, system: &str) -> Option<&'t str> {
    let code = match token.split_once('|') {
        Some((of, code)) if of.is_empty() || of == system => code,
        _ => token,
    };
    (!code.is_empty() && !code.ends_with('|')).then_some(code)
}

/// From when, and before when.
pub(crate) type Period = (Option<OffsetDateTime>, Option<OffsetDateTime>);

/// What a date with its prefix stands for. A year, a month or a day is the whole of it, an instant its millisecond.
pub(crate) fn period(value: &str) -> Option<Period> {
    let letters = value.bytes().take_while(u8::is_ascii_lowercase).count();
    let (prefix, text) = value.split_at(letters);
    let (start, end) = instant(text).or_else(|| day(text)).or_else(|| month(text)).or_else(|| year(text))?;
    match prefix {
        "" | "eq" => Some((Some(start), Some(end))),
        "ge" => Some((Some(start), None)),
        "gt" | "sa" => Some((Some(end), None)),
        "le" => Some((None, Some(end))),
        "lt" | "eb" => Some((None, Some(start))),
        _ => None,
    }
}

/// A FHIR `dateTime` (R4, Data Types) as a report has it: a year, a month or a day as it is, an instant in UTC.
pub(crate) fn date_time(text: &str) -> Option<String> {
    let (start, _) = instant(text).or_else(|| day(text)).or_else(|| month(text)).or_else(|| year(text))?;
    let start = start.checked_to_offset(UtcOffset::UTC).filter(|start| start.year() > 0)?;
    let is_date = text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    Some(if is_date { text.to_owned() } else { fhir::instant(start) })
}

type Stretch = Option<(OffsetDateTime, OffsetDateTime)>;

fn between(first: Date, next: Date) -> (OffsetDateTime, OffsetDateTime) {
    (first.midnight().assume_utc(), next.midnight().assume_utc())
}

fn instant(text: &str) -> Stretch {
    // By the clock of another zone it may be in a year that UTC has no number for.
    let at = OffsetDateTime::parse(text, &Rfc3339).ok()?.checked_to_offset(UtcOffset::UTC)?;
    Some((at, at.checked_add(Duration::milliseconds(1))?))
}

fn day(text: &str) -> Stretch {
    let date = Date::parse(text, format_description!("[year]-[month]-[day]")).ok()?;
    Some(between(date, date.next_day()?))
}

fn month(text: &str) -> Stretch {
    let (year, month) = text.split_once('-').filter(|(year, month)| year.len() == 4 && month.len() == 2)?;
    let (year, month) = (whole(year)?, Month::try_from(whole(month)? as u8).ok()?);
    let next = if month == Month::December { year + 1 } else { year };
    let first = Date::from_calendar_date(year, month, 1).ok()?;
    Some(between(first, Date::from_calendar_date(next, month.next(), 1).ok()?))
}

fn year(text: &str) -> Stretch {
    let year = whole(text).filter(|_| text.len() == 4)?;
    let first = |year| Date::from_calendar_date(year, Month::January, 1).ok();
    Some(between(first(year)?, first(year + 1)?))
}

/// A number of digits and nothing else.
fn whole(text: &str) -> Option<i32> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> OffsetDateTime {
        OffsetDateTime::parse(text, &Rfc3339).unwrap()
    }

    #[test]
    fn a_date_is_the_whole_of_it() {
        let (day, next) = (Some(at("2026-01-31T00:00:00Z")), Some(at("2026-02-01T00:00:00Z")));
        assert_eq!(period("2026-01-31"), Some((day, next)));
        assert_eq!(period("ge2026-01-31"), Some((day, None)));
        assert_eq!(period("gt2026-01-31"), Some((next, None)));
        assert_eq!(period("le2026-01-31"), Some((None, next)));
        assert_eq!(period("lt2026-01-31"), Some((None, day)));
        assert_eq!(period("gt2026-01-31T00:00:00Z"), Some((Some(at("2026-01-31T00:00:00.001Z")), None)));
        assert_eq!(period("2026-01"), Some((Some(at("2026-01-01T00:00:00Z")), next)));
        let years = (Some(at("2025-01-01T00:00:00Z")), Some(at("2026-01-01T00:00:00Z")));
        assert_eq!(period("2025"), Some(years));
        assert_eq!(period("ge2025-12"), Some((Some(at("2025-12-01T00:00:00Z")), None)));
        for bad in [
            "9999-12-31T23:59:59-00:01",
            "",
            "ge",
            "xx2026-01-31",
            "2026-02-30",
            "31.1.2026",
            "9999-12-31",
            "+026",
            "2026-1",
            "9999",
        ] {
            assert_eq!(period(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_date_and_time_is_as_exact_as_it_is_written() {
        for date in ["2026", "2026-02", "2026-02-28", "0001-01-01"] {
            assert_eq!(date_time(date).as_deref(), Some(date));
        }
        for (text, told) in [
            ("2026-02-13T15:58:25+01:00", "2026-02-13T14:58:25.000Z"),
            ("2026-02-13T14:58:25.4321Z", "2026-02-13T14:58:25.432Z"),
        ] {
            assert_eq!(date_time(text).as_deref(), Some(told));
        }
        for bad in [
            "",
            "0000",
            "26",
            "+026",
            "-2026-01-01",
            "2026-13",
            "2026-02-30",
            "2026-1-1",
            "ge2026",
            "2026-02-13T14:58",
            "2026-02-13T14:58:25",
            "2026-02-13 ",
            "13.2.2026",
            "0001-01-01T00:00:00+14:00",
            "9999-12-31T23:59:59-14:00",
        ] {
            assert_eq!(date_time(bad), None, "{bad}");
        }
    }

    #[test]
    fn commas_separate_unless_they_are_escaped() {
        let strings = |all: &[&str]| Some(all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>());
        assert_eq!(values("a,b"), strings(&["a", "b"]));
        assert_eq!(values(r"a\,b\|c\\"), strings(&[r"a,b|c\"]));
        for bad in ["", "a,", r"a\x", r"a\"] {
            assert_eq!(values(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_code_may_be_after_its_system() {
        let system = "http://hl7.org/fhir/task-status";
        for token in ["ready", "|ready", "http://hl7.org/fhir/task-status|ready"] {
            assert_eq!(code(token, system), Some("ready"), "{token}");
        }
        assert_eq!(code("http://x.example|ready", system), Some("http://x.example|ready"));
        for bad in ["|", "http://hl7.org/fhir/task-status|", "http://x.example|"] {
            assert_eq!(code(bad, system), None, "{bad}");
        }
    }

    #[test]
    fn a_query_is_read_as_it_was_written() {
        let pairs = [("subject:identifier", "urn:x|P 1&=ü+"), ("_id", "a,b")];
        let written = query(pairs);
        assert!(!written.contains(' ') && written.contains("subject:identifier="), "{written}");
        let read: Vec<(String, String)> = written
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(n, v)| (plain(n), plain(v)))
            .collect();
        assert_eq!(read, pairs.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn links_say_what_was_asked_and_nothing_else() {
        let pairs = [("_format", "json&agent=x"), ("_cursor", "7"), ("date", "2026-01-31T12:00:00+01:00")];
        let pairs = pairs.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let bundle = searchset("https://x.example/fhir/Task", &pairs, Some("6"), Vec::new());
        let date = "date=2026-01-31T12:00:00%2B01:00";
        let urls = [
            format!("https://x.example/fhir/Task?_format=json%26agent%3Dx&_cursor=7&{date}"),
            format!("https://x.example/fhir/Task?_format=json%26agent%3Dx&{date}&_cursor=6"),
        ];
        assert_eq!(bundle["link"].as_array().unwrap().len(), 2);
        for (link, url) in bundle["link"].as_array().unwrap().iter().zip(urls) {
            assert_eq!(link["url"], url);
        }
        assert!(bundle.get("entry").is_none());
        let whole = searchset("https://x.example/fhir/Task", &[], None, vec![json!({})]);
        assert_eq!(whole["link"], json!([{"relation": "self", "url": "https://x.example/fhir/Task"}]));
        assert_eq!(whole["entry"], json!([{}]));
    }

    fn plain(text: &str) -> String {
        percent_encoding::percent_decode_str(text).decode_utf8().unwrap().into_owned()
    }
}
