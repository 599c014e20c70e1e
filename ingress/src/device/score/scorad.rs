//! Scoring Atopic Dermatitis.
//!
//! European Task Force on Atopic Dermatitis, Dermatology 1993;186:23-31: A / 5 + 7 B / 2 + C, where A is the affected
//! surface in per cent, B the sum of six signs (0 to 3 each), C that of itch and loss of sleep (0 to 10 each); 0 to 103.
//! Mild below 25, severe above 50: Kunz et al., Dermatology 1997;195:10-9.

use super::{Band, Intensity, Item, SEVERITY_3, Score, band, graded, rated, sum};

pub(super) const SCORE: Score = Score {
    code: "scorad",
    title: "Scoring Atopic Dermatitis",
    // Atopic eczema, and the generalised one of unspecified type, which may be that.
    conditions: &["EA80", "EA89"],
    items: &ITEMS,
    value: |answers| match answers {
        [surface, signs @ .., itch, sleep] => surface / 5.0 + 7.0 * sum(signs) / 2.0 + itch + sleep,
        _ => 0.0,
    },
    band: banded,
};

const ITEMS: [Item; 9] = [
    rated("surface", "Affected surface", 100.0, false),
    graded("erythema", "Erythema", SEVERITY_3),
    graded("swelling", "Oedema or papulation", SEVERITY_3),
    graded("crusting", "Oozing or crusts", SEVERITY_3),
    graded("excoriation", "Excoriation", SEVERITY_3),
    graded("lichenification", "Lichenification", SEVERITY_3),
    graded("dryness", "Dryness of skin that is not affected", SEVERITY_3),
    rated("pruritus", "Itch", 10.0, true),
    rated("sleeplessness", "Loss of sleep", 10.0, true),
];

fn banded(value: f64) -> Band {
    match value {
        ..=0.0 => band("None", Intensity::None),
        ..25.0 => band("Mild", Intensity::Low),
        ..=50.0 => band("Moderate", Intensity::Moderate),
        _ => band("Severe", Intensity::High),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn the_most_is_one_hundred_and_three() {
        assert_eq!(scored(&SCORE, &[100.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 10.0, 10.0]), (103.0, "Severe", 3));
        assert_eq!(scored(&SCORE, &[0.0; 9]), (0.0, "None", 0));
        assert_eq!(scored(&SCORE, &[20.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 5.0, 3.0]), (40.0, "Moderate", 2));
        assert_eq!(scored(&SCORE, &[12.5, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 2.0, 0.0]), (15.0, "Mild", 1));
        assert_eq!(
            (banded(25.0).category, banded(50.0).category, banded(50.1).category),
            ("Moderate", "Moderate", "Severe")
        );
    }
}
