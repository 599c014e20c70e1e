//! Which language a caller reads: `Accept-Language` (RFC 9110 §12.5.4).

use std::cmp::Reverse;

use axum::http::{HeaderMap, header};
use dermflow_schemas::fhir::{LANGUAGES, Language};
use serde::Deserialize;

use crate::list;

/// The language of those that reports are written in which the caller likes best; English when there is none. A range of
/// more than a language, such as `de-CH`, is taken for the language (RFC 4647 §3.4), what is malformed is ignored.
pub(crate) fn accepted(headers: &HeaderMap) -> Language {
    let fields = headers.get_all(header::ACCEPT_LANGUAGE).iter().filter_map(|value| value.to_str().ok());
    let ranges: Vec<(String, u32)> =
        fields.flat_map(|field| list::split(field, ',')).filter_map(range).collect();
    let liking = |tag: &str| {
        let named = ranges.iter().enumerate().filter(|(_, (range, _))| range == tag);
        named.map(|(n, (_, quality))| (*quality, Reverse(n))).max()
    };
    let likings =
        LANGUAGES.into_iter().map(|language| (liking(language.tag()).or_else(|| liking("*")), language));
    let liked = likings.filter(|(liking, _)| liking.is_some_and(|(quality, _)| quality > 0));
    // Of equals the first of ours.
    liked.rev().max_by_key(|(liking, _)| *liking).map(|(_, language)| language).unwrap_or_default()
}

/// The language of a range, in lower case, and its quality in thousandths.
fn range(text: &str) -> Option<(String, u32)> {
    let mut parts = list::split(text, ';').map(str::trim);
    let language = parts.next()?.split('-').next()?.to_ascii_lowercase();
    let quality = match parts.next() {
        None => 1_000,
        Some(weight) => thousandths(weight.strip_prefix("q=").or_else(|| weight.strip_prefix("Q="))?)?,
    };
    (!language.is_empty()).then_some((language, quality))
}

/// A quality value: from 0 to 1, with three decimals at most.
fn thousandths(text: &str) -> Option<u32> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    let digits = decimals.bytes().all(|byte| byte.is_ascii_digit()) && decimals.len() <= 3;
    let decimals: u32 = format!("{decimals:0<3}").parse().ok().filter(|_| digits)?;
    match (whole, decimals) {
        ("0", decimals) => Some(decimals),
        ("1", 0) => Some(1_000),
        _ => None,
    }
}

/// The tag of the language that a report is written in.
pub(crate) fn of_report(report: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Written {
        language: String,
    }
    serde_json::from_slice(report).ok().map(|Written { language }| language)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn language(values: &[&'static str]) -> &'static str {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::ACCEPT_LANGUAGE, value.parse().unwrap());
        }
        accepted(&headers).tag()
    }

    #[test]
    fn the_best_liked_language_is_taken() {
        for (values, expected) in [
            (&[][..], "en"),
            (&["de"], "de"),
            (&["DE-ch"], "de"),
            (&["it, fr;q=0.3"], "fr"),
            (&["es;q=0.4, fr;q=0.5, en;q=0.1"], "fr"),
            (&["es;q=0.4", "fr;q=0.5"], "fr"),
            (&["fr, es"], "fr"),
            (&["es, fr"], "es"),
            (&["de-AT;q=0.2, de;q=0.9, fr;q=0.5"], "de"),
            (&["*"], "en"),
            (&["fr;q=0.5, *"], "en"),
            (&["en;q=0, *;q=0.1"], "es"),
            (&["fr;q=0.5, *;q=0.1"], "fr"),
            (&["en;q=0.2, de ; q=1.000"], "de"),
        ] {
            assert_eq!(language(values), expected, "{values:?}");
        }
    }

    #[test]
    fn without_one_of_ours_it_is_english() {
        for value in
            ["it", "de;q=0", "fr;q=1.5", "fr;q=0.1234", "fr;q=+1", "fr;q", "fr;x=1", ";;,", "x=\"de,de\""]
        {
            assert_eq!(language(&[value]), "en", "{value}");
        }
    }

    #[test]
    fn a_report_names_its_language() {
        assert_eq!(
            of_report(br#"{"resourceType":"DiagnosticReport","language":"de"}"#).as_deref(),
            Some("de")
        );
        assert_eq!(of_report(b"{}"), None);
    }
}
