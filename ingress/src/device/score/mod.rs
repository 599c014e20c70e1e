//! Scores that follow from answers alone, each in a file of its own with the publication that it is from. Pure.

mod dlqi;
mod gags;
mod ihs4;
mod pasi;
mod pga;
mod pure4;
mod scorad;
mod scovid;
mod seven_pc;
mod uas;
mod uct;
pub(super) mod wording;

use std::{fmt, ops::RangeInclusive};

use dermflow_schemas::{fhir::Language, limits::MAX_LESIONS};

use wording::in_language;

/// A score.
pub(super) struct Score {
    /// Its name in the device API.
    pub(super) code: &'static str,
    pub(super) title: &'static str,
    /// ICD-11 codes of what it is for, by their beginnings; empty for all.
    pub(super) conditions: &'static [&'static str],
    pub(super) items: &'static [Item],
    /// From the answers, in the order of the items.
    pub(super) value: fn(&[f64]) -> f64,
    pub(super) band: fn(f64) -> Band,
}

/// A question.
pub(super) struct Item {
    pub(super) code: &'static str,
    /// In short; the questionnaires' own words are their authors'.
    pub(super) text: &'static str,
    pub(super) range: RangeInclusive<f64>,
    /// Whether answers are whole numbers.
    pub(super) whole: bool,
    /// What the answers from 0 on are called; empty where a number says it all.
    pub(super) words: &'static [&'static str],
    /// Whether the number says it without the largest one beside it.
    is_count: bool,
}

/// What a value means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Band {
    pub(super) category: &'static str,
    pub(super) intensity: Intensity,
}

/// How bad it is, as the device API counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intensity {
    None = 0,
    Low = 1,
    Moderate = 2,
    High = 3,
}

/// Every score.
pub(super) const SCORES: &[Score] = &[
    dlqi::SCORE,
    gags::SCORE,
    ihs4::SCORE,
    pasi::SCORE,
    pga::SCORE,
    pure4::SCORE,
    scorad::SCORE,
    scovid::SCORE,
    seven_pc::SCORE,
    uas::SCORE,
    uct::SCORE,
];

/// The score that clients may ask for and that is not computed: the answers that they give are not those of RESVECH 2.0
/// (Restrepo-Medrano and Verdú, Gerokomos 2011), where dimensions go to 6, exudate to 3, and signs of infection are yes or
/// no.
pub(super) const NOT_COMPUTED: &str = "resvech";

/// The score of a name.
pub(super) fn find(code: &str) -> Option<&'static Score> {
    SCORES.iter().find(|score| score.code == code)
}

impl fmt::Debug for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code)
    }
}

impl Score {
    pub(super) fn value(&self, answers: &[f64]) -> f64 {
        (self.value)(answers)
    }

    /// How much a region of the body counts in the score of all of it, by a body site of the region.
    pub(super) fn weight(&self, site: &str) -> Option<f64> {
        (self.code == pasi::SCORE.code).then(|| pasi::weight(site))?
    }

    pub(super) fn band(&self, value: f64) -> Band {
        (self.band)(value)
    }
}

impl Item {
    /// An answer in words.
    pub(super) fn interpretation(&self, answer: f64, language: Language) -> String {
        let number = |number: f64| match language {
            Language::English => number.to_string(),
            _ => number.to_string().replace('.', ","),
        };
        let word = self.words.get(answer as usize).filter(|_| self.whole);
        match word {
            Some(word) => in_language(word, language).to_owned(),
            None if self.is_count => answer.to_string(),
            None => [answer, *self.range.end()]
                .into_iter()
                .fold(in_language(NUMBER, language).to_owned(), |text, n| text.replacen("{}", &number(n), 1)),
        }
    }
}

/// A number on a scale, and the largest one.
const NUMBER: &str = "{} of {}";

/// A question with whole answers from 0, each with its word.
const fn graded(code: &'static str, text: &'static str, words: &'static [&'static str]) -> Item {
    Item { code, text, range: 0.0..=(words.len() - 1) as f64, whole: true, words, is_count: false }
}

/// A question with a number on a scale for an answer.
const fn rated(code: &'static str, text: &'static str, most: f64, whole: bool) -> Item {
    Item { code, text, range: 0.0..=most, whole, words: &[], is_count: false }
}

/// A question how many lesions of a kind there are.
const fn counted(code: &'static str, text: &'static str) -> Item {
    Item { code, text, range: 0.0..=MAX_LESIONS, whole: true, words: &[], is_count: true }
}

const fn band(category: &'static str, intensity: Intensity) -> Band {
    Band { category, intensity }
}

fn sum(answers: &[f64]) -> f64 {
    answers.iter().sum()
}

/// Each answer times its weight.
fn weighted(answers: &[f64], weights: &[f64]) -> f64 {
    answers.iter().zip(weights).map(|(answer, weight)| answer * weight).sum()
}

const YES: &[&str] = &["No", "Yes"];
const SEVERITY_3: &[&str] = &["None", "Mild", "Moderate", "Severe"];
const SEVERITY_4: &[&str] = &["None", "Mild", "Moderate", "Severe", "Very severe"];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Value, category and intensity of a score.
    pub(super) fn scored(score: &Score, answers: &[f64]) -> (f64, &'static str, u8) {
        assert_eq!(answers.len(), score.items.len(), "{}", score.code);
        let value = score.value(answers);
        let Band { category, intensity } = score.band(value);
        (value, category, intensity as u8)
    }

    #[test]
    fn every_question_has_words_for_all_its_answers() {
        let codes: BTreeSet<&str> = SCORES.iter().map(|score| score.code).chain([NOT_COMPUTED]).collect();
        assert_eq!(codes.len(), 12);
        for score in SCORES {
            let items: BTreeSet<&str> = score.items.iter().map(|item| item.code).collect();
            assert_eq!(items.len(), score.items.len(), "{}", score.code);
            for item in score.items {
                for answer in [*item.range.start(), *item.range.end()] {
                    assert!(
                        !item.text.is_empty() && !item.interpretation(answer, Language::default()).is_empty()
                    );
                }
            }
        }
        let said = |score: &str, item: usize, answer, language| {
            find(score).unwrap().items[item].interpretation(answer, language)
        };
        assert_eq!(said("pasi", 1, 3.0, Language::English), "Severe");
        assert_eq!(said("pasi", 1, 3.0, Language::Spanish), "Grave");
        assert_eq!(said("scorad", 0, 12.5, Language::English), "12.5 of 100");
        assert_eq!(said("scorad", 0, 12.5, Language::German), "12,5 von 100");
        assert_eq!(said("scorad", 7, 3.0, Language::French), "3 sur 10");
        assert_eq!(said("ihs4", 0, 3.0, Language::French), "3");
    }
}
