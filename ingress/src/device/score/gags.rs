//! Global Acne Grading System: the worst lesion of each of six places, weighted by its area and density of glands.
//!
//! Doshi, Zaheer and Stiller, Int J Dermatol 1997;36:416-8: factor times grade (0 none, 1 comedones, 2 papules, 3
//! pustules, 4 nodules), 0 to 44.

use super::{Band, Intensity, Item, Score, band, graded, weighted};

pub(super) const SCORE: Score = Score {
    code: "gags",
    title: "Global Acne Grading System",
    conditions: &["ED80"],
    items: &ITEMS,
    value: |answers| weighted(answers, &[2.0, 2.0, 2.0, 1.0, 1.0, 3.0]),
    band: banded,
};

const LESIONS: &[&str] = &["No lesion", "Comedones", "Papules", "Pustules", "Nodules"];

const ITEMS: [Item; 6] = [
    graded("forehead", "Forehead", LESIONS),
    graded("rightCheek", "Right cheek", LESIONS),
    graded("leftCheek", "Left cheek", LESIONS),
    graded("nose", "Nose", LESIONS),
    graded("chin", "Chin", LESIONS),
    graded("chestAndUpperBack", "Chest and upper back", LESIONS),
];

fn banded(value: f64) -> Band {
    match value {
        ..1.0 => band("None", Intensity::None),
        ..19.0 => band("Mild", Intensity::Low),
        ..31.0 => band("Moderate", Intensity::Moderate),
        ..39.0 => band("Severe", Intensity::High),
        _ => band("Very severe", Intensity::High),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn places_weigh_what_doshi_gives_them() {
        assert_eq!(scored(&SCORE, &[4.0; 6]), (44.0, "Very severe", 3));
        assert_eq!(scored(&SCORE, &[0.0; 6]), (0.0, "None", 0));
        assert_eq!(scored(&SCORE, &[3.0, 2.0, 2.0, 1.0, 2.0, 1.0]), (20.0, "Moderate", 2));
        assert_eq!(scored(&SCORE, &[0.0, 0.0, 0.0, 0.0, 0.0, 4.0]), (12.0, "Mild", 1));
        for (value, category) in
            [(18.0, "Mild"), (19.0, "Moderate"), (30.0, "Moderate"), (31.0, "Severe"), (38.0, "Severe")]
        {
            assert_eq!(banded(value).category, category, "{value}");
        }
    }
}
