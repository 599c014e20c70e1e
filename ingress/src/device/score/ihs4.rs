//! International Hidradenitis Suppurativa Severity Score System.
//!
//! Zouboulis et al., Br J Dermatol 2017;177:1401-9: nodules, plus twice the abscesses, plus four times the draining
//! tunnels; up to 3 mild, 4 to 10 moderate, from 11 severe. Who has no lesion at all has nothing to grade.

use super::{Band, Intensity, Item, Score, band, counted, weighted};

pub(super) const SCORE: Score = Score {
    code: "ihs4",
    title: "International Hidradenitis Suppurativa Severity Score System",
    conditions: &["ED92.0"],
    items: &ITEMS,
    value: |answers| weighted(answers, &[1.0, 2.0, 4.0]),
    band: banded,
};

const ITEMS: [Item; 3] = [
    counted("nodule", "Inflammatory nodules"),
    counted("abscess", "Abscesses"),
    counted("drainingTunnel", "Draining tunnels"),
];

fn banded(value: f64) -> Band {
    match value {
        ..1.0 => band("None", Intensity::None),
        ..4.0 => band("Mild", Intensity::Low),
        ..11.0 => band("Moderate", Intensity::Moderate),
        _ => band("Severe", Intensity::High),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};

    #[test]
    fn lesions_weigh_one_two_and_four() {
        assert_eq!(scored(&SCORE, &[1.0, 1.0, 0.0]), (3.0, "Mild", 1));
        assert_eq!(scored(&SCORE, &[0.0, 0.0, 1.0]), (4.0, "Moderate", 2));
        assert_eq!(scored(&SCORE, &[2.0, 2.0, 1.0]), (10.0, "Moderate", 2));
        assert_eq!(scored(&SCORE, &[1.0, 3.0, 1.0]), (11.0, "Severe", 3));
        assert_eq!(scored(&SCORE, &[0.0; 3]), (0.0, "None", 0));
    }
}
