//! Urticaria Activity Score of a day: wheals and itch, 0 to 3 each.
//!
//! The sum (Zuberbier et al., Allergy 2018;73:1393-414). The bands are those of a week, 1 to 15, 16 to 27, 28 to 42 (Stull
//! et al., Br J Dermatol 2017;177:1093-101, with well controlled and mild in one), divided by seven.

use super::{Band, Intensity, Item, SEVERITY_3, Score, band, graded, sum};

pub(super) const SCORE: Score = Score {
    code: "uas",
    title: "Urticaria Activity Score",
    // Spontaneous, inducible, and of unspecified type.
    conditions: &["EB00", "EB01", "EB05"],
    items: &ITEMS,
    value: sum,
    band: banded,
};

const ITEMS: [Item; 2] = [
    graded("pruritus", "Itch", SEVERITY_3),
    graded(
        "wheals",
        "Wheals",
        &["None", "Fewer than 20 in 24 hours", "20 to 50 in 24 hours", "More than 50 in 24 hours"],
    ),
];

fn banded(value: f64) -> Band {
    match value * 7.0 {
        ..1.0 => band("None", Intensity::None),
        ..16.0 => band("Mild", Intensity::Low),
        ..28.0 => band("Moderate", Intensity::Moderate),
        _ => band("Severe", Intensity::High),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn a_week_of_such_days_is_in_the_same_band() {
        assert_eq!(scored(&SCORE, &[0.0, 0.0]), (0.0, "None", 0));
        assert_eq!(scored(&SCORE, &[1.0, 1.0]), (2.0, "Mild", 1));
        assert_eq!(scored(&SCORE, &[2.0, 1.0]), (3.0, "Moderate", 2));
        assert_eq!(scored(&SCORE, &[2.0, 2.0]), (4.0, "Severe", 3));
        assert_eq!(scored(&SCORE, &[3.0, 3.0]), (6.0, "Severe", 3));
    }
}
