//! Dermatology Life Quality Index: ten questions about the last week.
//!
//! The sum (Finlay and Khan, Clin Exp Dermatol 1994;19:210-6), 0 to 30; its bands are those of Hongbo et al., J Invest
//! Dermatol 2005;125:659-64.

use super::{Band, Intensity, Item, Score, band, graded, sum};

pub(super) const SCORE: Score = Score {
    code: "dlqi",
    title: "Dermatology Life Quality Index",
    conditions: &[],
    items: &ITEMS,
    value: sum,
    band: banded,
};

const EFFECT: &[&str] = &["Not at all", "A little", "A lot", "Very much"];

const ITEMS: [Item; 10] = [
    graded("question1", "Itch, soreness, pain or stinging", EFFECT),
    graded("question2", "Embarrassment", EFFECT),
    graded("question3", "Shopping, home and garden", EFFECT),
    graded("question4", "Clothes", EFFECT),
    graded("question5", "Social and leisure activities", EFFECT),
    graded("question6", "Sport", EFFECT),
    graded("question7", "Work or study", EFFECT),
    graded("question8", "Partner, friends and relatives", EFFECT),
    graded("question9", "Sexual difficulties", EFFECT),
    graded("question10", "Treatment", EFFECT),
];

fn banded(value: f64) -> Band {
    match value {
        ..2.0 => band("No effect", Intensity::None),
        ..6.0 => band("Small effect", Intensity::Low),
        ..11.0 => band("Moderate effect", Intensity::Moderate),
        ..21.0 => band("Very large effect", Intensity::High),
        _ => band("Extremely large effect", Intensity::High),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn the_bands_are_those_of_hongbo() {
        let answers = [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0];
        assert_eq!(scored(&SCORE, &answers), (19.0, "Very large effect", 3));
        assert_eq!(scored(&SCORE, &[3.0; 10]), (30.0, "Extremely large effect", 3));
        assert_eq!(scored(&SCORE, &[1.0; 10]), (10.0, "Moderate effect", 2));
        let edges = [(1.0, 0), (2.0, 1), (5.0, 1), (6.0, 2), (10.0, 2), (11.0, 3), (20.0, 3), (21.0, 3)];
        for (value, intensity) in edges {
            assert_eq!(banded(value).intensity as u8, intensity, "{value}");
        }
    }
}
