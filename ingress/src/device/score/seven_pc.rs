//! Weighted seven-point checklist for pigmented lesions.
//!
//! MacKie and Doherty, Clin Exp Dermatol 1991;16:151-2: three major signs weigh two points, four minor ones weigh one; from 3 on a
//! lesion is suspicious, as in NICE guideline NG12.

use super::{Band, Intensity, Item, Score, YES, band, graded, weighted};

pub(super) const SCORE: Score = Score {
    code: "sevenPc",
    title: "Weighted seven-point checklist",
    conditions: &["2C30", "2F20"],
    items: &ITEMS,
    value: |answers| weighted(answers, &[2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]),
    band: banded,
};

const ITEMS: [Item; 7] = [
    graded("changeInSize", "Change in size", YES),
    graded("irregularPigmentation", "Irregular pigmentation", YES),
    graded("irregularBorder", "Irregular border", YES),
    graded("inflammation", "Inflammation", YES),
    graded("largerThanOtherLesions", "Larger than other lesions", YES),
    graded("itchOrAlteredSensation", "Itch or altered sensation", YES),
    graded("crustingOrBleeding", "Crusting or bleeding", YES),
];

fn banded(value: f64) -> Band {
    if value < 3.0 { band("Low risk", Intensity::Low) } else { band("High risk", Intensity::High) }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn major_signs_count_twice() {
        assert_eq!(scored(&SCORE, &[1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]), (6.0, "High risk", 3));
        assert_eq!(scored(&SCORE, &[1.0; 7]), (10.0, "High risk", 3));
        assert_eq!(scored(&SCORE, &[1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]), (3.0, "High risk", 3));
        assert_eq!(scored(&SCORE, &[0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), (2.0, "Low risk", 1));
    }
}
