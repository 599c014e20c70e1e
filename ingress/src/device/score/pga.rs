//! Physician Global Assessment of psoriasis.
//!
//! The mean of three signs, 0 to 4 each, rounded to a whole number: clear, almost clear, mild, moderate, severe
//! (Cappelleri et al., Qual Life Res 2013;22:2489-99).

use super::{Band, Intensity, Item, SEVERITY_4, Score, band, graded, sum};

pub(super) const SCORE: Score = Score {
    code: "pga",
    title: "Physician Global Assessment",
    conditions: &["EA90"],
    items: &ITEMS,
    value: |answers| (sum(answers) / ITEMS.len() as f64).round(),
    band: banded,
};

const ITEMS: [Item; 3] = [
    graded("erythema", "Erythema", SEVERITY_4),
    graded("desquamation", "Desquamation", SEVERITY_4),
    graded("induration", "Induration", SEVERITY_4),
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
    use super::{super::tests::scored, *};

    #[test]
    fn the_mean_is_rounded() {
        assert_eq!(scored(&SCORE, &[0.0, 0.0, 1.0]), (0.0, "Clear", 0));
        assert_eq!(scored(&SCORE, &[1.0, 1.0, 0.0]), (1.0, "Almost clear", 1));
        assert_eq!(scored(&SCORE, &[2.0, 2.0, 3.0]), (2.0, "Mild", 1));
        assert_eq!(scored(&SCORE, &[3.0, 3.0, 2.0]), (3.0, "Moderate", 2));
        assert_eq!(scored(&SCORE, &[4.0; 3]), (4.0, "Severe", 3));
    }
}
