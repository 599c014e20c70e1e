//! Symptoms of COVID-19 with signs on the skin: pain and itch, 0 to 10 each, and eight symptoms, 0 to 3 each.
//!
//! Names and ranges of the items are those that clients of the device API send. There is no publication of the scale, its
//! formula or its bands: this is the plain sum, 0 to 44, and its category says that nothing grades it.

use super::{Intensity, Item, SEVERITY_3, Score, band, graded, rated, sum};

pub(super) const SCORE: Score = Score {
    code: "scovid",
    title: "Symptoms of COVID-19 with skin signs (sum of the answers, 0 to 44; not validated)",
    conditions: &["RA01"],
    items: &ITEMS,
    value: sum,
    band: |_| band("Not graded: no bands are published", Intensity::None),
};

const ITEMS: [Item; 10] = [
    rated("pain", "Pain", 10.0, true),
    rated("pruritus", "Itch", 10.0, true),
    graded("fever", "Fever", SEVERITY_3),
    graded("cough", "Cough", SEVERITY_3),
    graded("cephalea", "Headache", SEVERITY_3),
    graded("myalgiaOrArthralgia", "Muscle or joint pain", SEVERITY_3),
    graded("malaise", "Malaise", SEVERITY_3),
    graded("lossOfTasteOrOlfactory", "Loss of taste or smell", SEVERITY_3),
    graded("shortnessOfBreath", "Shortness of breath", SEVERITY_3),
    graded("otherSkinProblems", "Other skin problems", SEVERITY_3),
];

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn answers_are_summed_and_not_graded() {
        let category = "Not graded: no bands are published";
        assert_eq!(scored(&SCORE, &[0.0; 10]), (0.0, category, 0));
        let some = [7.0, 2.0, 3.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0, 1.0];
        assert_eq!(scored(&SCORE, &some), (16.0, category, 0));
        let most = [10.0, 10.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0];
        assert_eq!(scored(&SCORE, &most), (44.0, category, 0));
    }
}
