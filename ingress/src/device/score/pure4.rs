//! PURE-4: who with psoriasis should see a rheumatologist, for psoriatic arthritis.
//!
//! The number of positive answers, 0 to 4; positive from 1 on (Audureau et al., J Eur Acad Dermatol Venereol
//! 2018;32:1950-3).

use super::{Band, Intensity, Item, Score, YES, band, graded, sum};

pub(super) const SCORE: Score = Score {
    code: "pure4",
    title: "Psoriatic arthritis screening (PURE-4)",
    conditions: &["EA90"],
    items: &ITEMS,
    value: sum,
    band: banded,
};

const ITEMS: [Item; 4] = [
    graded("question1", "Signs of dactylitis", YES),
    graded("question2", "Inflammatory heel pain", YES),
    graded("question3", "Bilateral buttock pain", YES),
    graded("question4", "Peripheral joint pain with swelling before the age of 50", YES),
];

fn banded(value: f64) -> Band {
    if value < 1.0 { band("Negative", Intensity::None) } else { band("Positive", Intensity::High) }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn one_answer_is_enough() {
        assert_eq!(scored(&SCORE, &[1.0, 0.0, 1.0, 0.0]), (2.0, "Positive", 3));
        assert_eq!(scored(&SCORE, &[0.0, 0.0, 0.0, 1.0]), (1.0, "Positive", 3));
        assert_eq!(scored(&SCORE, &[0.0; 4]), (0.0, "Negative", 0));
    }
}
