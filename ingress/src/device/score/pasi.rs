//! Psoriasis Area and Severity Index of one region.
//!
//! Fredriksson and Pettersson, Dermatologica 1978;157:238-44: the grade of the area (0 to 6) times the sum of three
//! signs (0 to 4 each), 0 to 72. The index of the whole body is the sum of its regions' by weight: head 0.1, arms 0.2,
//! trunk 0.3, legs 0.4. Its bands (below 7, 7 to 12, above 12) are those of Schmitt and Wozel, Dermatology
//! 2005;210:194-9; here they say how bad it were if all of the body looked like this.

use super::{Band, Intensity, Item, SEVERITY_4, Score, band, graded};

pub(super) const SCORE: Score = Score {
    code: "pasi",
    title: "Psoriasis Area and Severity Index",
    conditions: &["EA90"],
    items: &ITEMS,
    value: |answers| answers.first().map_or(0.0, |surface| surface * super::sum(&answers[1..])),
    band: banded,
};

const AREA: &[&str] =
    &["0 %", "1 to 9 %", "10 to 29 %", "30 to 49 %", "50 to 69 %", "70 to 89 %", "90 to 100 %"];

const ITEMS: [Item; 4] = [
    graded("surface", "Affected surface", AREA),
    graded("erythema", "Erythema", SEVERITY_4),
    graded("induration", "Induration", SEVERITY_4),
    graded("desquamation", "Desquamation", SEVERITY_4),
];

/// The weight of the region that a body site is of.
pub(super) fn weight(site: &str) -> Option<f64> {
    let region = site.strip_suffix("Left").or_else(|| site.strip_suffix("Right")).unwrap_or(site);
    match region {
        "head" | "headFront" | "headBack" | "headTop" | "scalp" | "ear" | "perioral" => Some(0.1),
        "arm" | "upperArm" | "elbow" | "lowerArm" | "hand" => Some(0.2),
        "trunkFront" | "trunkBack" => Some(0.3),
        "leg" | "upperLeg" | "knee" | "lowerLeg" | "foot" => Some(0.4),
        _ => None,
    }
}

fn banded(value: f64) -> Band {
    match value {
        ..=0.0 => band("None", Intensity::None),
        ..7.0 => band("Mild", Intensity::Low),
        ..=12.0 => band("Moderate", Intensity::Moderate),
        _ => band("Severe", Intensity::High),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::scored, *};
    use crate::device::sites::SITES;

    #[test]
    fn a_body_site_is_of_one_region_or_of_none() {
        let of = |weight: Option<f64>| {
            SITES.iter().map(|site| site.code).filter(move |code| super::weight(code) == weight)
        };
        let counts = [0.1, 0.2, 0.3, 0.4].map(|weight| of(Some(weight)).count());
        assert_eq!(counts, [9, 10, 2, 10]);
        assert_eq!(of(None).collect::<Vec<_>>(), ["genital", "nails", "tongue"]);
    }

    #[test]
    fn a_region_has_nothing_to_seventy_two() {
        assert_eq!(scored(&SCORE, &[0.0; 4]), (0.0, "None", 0));
        assert_eq!(scored(&SCORE, &[0.0, 4.0, 4.0, 4.0]), (0.0, "None", 0));
        assert_eq!(scored(&SCORE, &[6.0, 4.0, 4.0, 4.0]), (72.0, "Severe", 3));
        assert_eq!(scored(&SCORE, &[2.0, 1.0, 1.0, 1.0]), (6.0, "Mild", 1));
        assert_eq!(scored(&SCORE, &[3.0, 2.0, 1.0, 1.0]), (12.0, "Moderate", 2));
    }
}
