//! Physician Global Assessment of psoriasis.
//!
//! The mean of three signs, 0 to 4 each, rounded to a whole number: clear, almost clear, mild, moderate, severe
//! (Cappelleri et al., Qual Life Res 2013;22:2489-99). What the answers are called is no quotation from there: none,
//! minimal, mild, moderate, severe are the usual anchors of a five-point assessment, and keep step with the total.

use super::{Band, Intensity, Item, Score, band, graded, sum};

pub(super) const SCORE: Score = Score {
    code: "pga",
    title: "Physician Global Assessment",
    conditions: &["EA90"],
    items: &ITEMS,
    value: |answers| (sum(answers) / ITEMS.len() as f64).round(),
    band: banded,
};

const DEGREES: &[&str] = &["None", "Minimal", "Mild", "Moderate", "Severe"];

const ITEMS: [Item; 3] = [
    graded("erythema", "Erythema", DEGREES),
    graded("desquamation", "Desquamation", DEGREES),
    graded("induration", "Induration", DEGREES),
];

fn banded(value: f64) -> Band {
    match value {
        ..1.0 => band("Clear", Intensity::None),
        ..2.0 => band("Almost clear", Intensity::Low),
        ..3.0 => band("Mild", Intensity::Low),
        ..4.0 => band("Moderate", Intensity::Moderate),
        _ => band("Severe", Intensity::High),
    }
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::fhir::Language;

    use super::{super::tests::scored, *};

    #[test]
    fn the_mean_is_rounded() {
        assert_eq!(scored(&SCORE, &[0.0, 0.0, 1.0]), (0.0, "Clear", 0));
        assert_eq!(scored(&SCORE, &[1.0, 1.0, 0.0]), (1.0, "Almost clear", 1));
        assert_eq!(scored(&SCORE, &[2.0, 2.0, 3.0]), (2.0, "Mild", 1));
        assert_eq!(scored(&SCORE, &[3.0, 3.0, 2.0]), (3.0, "Moderate", 2));
        assert_eq!(scored(&SCORE, &[4.0; 3]), (4.0, "Severe", 3));
    }

    // A sign that is not there and one that hardly is have words of their own.
    #[test]
    fn answers_that_agree_read_like_the_total() {
        let words = ["None", "Minimal", "Mild", "Moderate", "Severe"];
        let totals = ["Clear", "Almost clear", "Mild", "Moderate", "Severe"];
        for (n, (word, total)) in words.into_iter().zip(totals).enumerate() {
            let answer = n as f64;
            for item in &ITEMS {
                assert_eq!(item.interpretation(answer, Language::English), word);
            }
            let (value, category, _) = scored(&SCORE, &[answer; 3]);
            assert_eq!((value, category), (answer, total));
        }
    }
}
