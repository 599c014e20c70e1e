//! Urticaria Control Test: four questions about the last four weeks.
//!
//! The sum, 0 to 16, where more is better; controlled from 12 on (Weller et al., J Allergy Clin Immunol
//! 2014;133:1365-72), completely at 16.

use super::{Band, Intensity, Item, Score, band, graded, sum};

pub(super) const SCORE: Score = Score {
    code: "uct",
    title: "Urticaria Control Test",
    // Spontaneous, inducible, and of unspecified type.
    conditions: &["EB00", "EB01", "EB05"],
    items: &ITEMS,
    value: sum,
    band: banded,
};

const EXTENT: &[&str] = &["Very much", "Much", "Somewhat", "A little", "Not at all"];
const CONTROL: &[&str] = &["Not at all", "A little", "Somewhat", "Well", "Completely"];

const ITEMS: [Item; 4] = [
    graded("manifestations", "Suffering from the symptoms", EXTENT),
    graded("qualityOfLife", "Effect on the quality of life", EXTENT),
    graded(
        "treatmentNotEnough",
        "Treatment that was not enough",
        &["Very often", "Often", "Sometimes", "Seldom", "Not at all"],
    ),
    graded("overallUnderControl", "Control of the disease", CONTROL),
];

fn banded(value: f64) -> Band {
    match value {
        ..12.0 => band("Poorly controlled", Intensity::High),
        ..16.0 => band("Well controlled", Intensity::Low),
        _ => band("Completely controlled", Intensity::None),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn twelve_is_controlled() {
        assert_eq!(scored(&SCORE, &[3.0; 4]), (12.0, "Well controlled", 1));
        assert_eq!(scored(&SCORE, &[3.0, 3.0, 3.0, 2.0]), (11.0, "Poorly controlled", 3));
        assert_eq!(scored(&SCORE, &[4.0; 4]), (16.0, "Completely controlled", 0));
    }
}
