//! A distribution as it is printed: hundredths of a per cent that sum to 100.00 %.

use super::Case;
use crate::{
    analyse::{Finding, ranked},
    model::{Indicator, Model},
};

/// A distribution as it is printed.
pub(super) struct Reading {
    /// `1`, `2`… for an image, `joint` for all.
    pub(super) suffix: String,
    /// Images from 1.
    pub(super) images: Vec<usize>,
    /// The probability of skin, in hundredths of a per cent.
    pub(super) skin: Option<u32>,
    /// Hundredths of a per cent, in the order of the model's classes; the sum is 10,000.
    pub(super) points: Vec<u32>,
    /// Classes by descending probability.
    pub(super) order: Vec<usize>,
}

impl Reading {
    fn new(suffix: String, images: Vec<usize>, skin: Option<u32>, probabilities: &[f64]) -> Self {
        Self { suffix, images, skin, points: basis_points(probabilities), order: ranked(probabilities) }
    }

    pub(super) fn of(n: usize, finding: &Finding) -> Self {
        Self::new(n.to_string(), vec![n], finding.skin, &finding.probabilities)
    }

    pub(super) fn is_joint(&self) -> bool {
        self.suffix == "joint"
    }

    pub(super) fn first(&self) -> usize {
        self.order[0]
    }

    /// Whether the indicator has come to its threshold.
    pub(super) fn is_high(&self, indicator: &Indicator, model: &Model) -> bool {
        self.indicated(indicator, model) >= model.threshold(indicator)
    }

    /// Hundredths of a per cent: the sum of the indicator's classes, or the probability of skin.
    pub(super) fn indicated(&self, indicator: &Indicator, model: &Model) -> u32 {
        if indicator.classes.is_empty() {
            return self.skin.unwrap_or(0);
        }
        let counted = self.points.iter().zip(&model.classes);
        counted.filter(|(_, class)| indicator.classes.contains(&class.code)).map(|(points, _)| points).sum()
    }
}

/// Rounds a distribution to hundredths of a per cent that sum to 10,000: the largest remainders are rounded up.
fn basis_points(probabilities: &[f64]) -> Vec<u32> {
    let scaled: Vec<f64> = probabilities.iter().map(|p| p * 10_000.0).collect();
    let mut points: Vec<u32> = scaled.iter().map(|p| *p as u32).collect();
    let mut by_remainder: Vec<usize> = (0..points.len()).collect();
    by_remainder.sort_by(|a, b| scaled[*b].fract().total_cmp(&scaled[*a].fract()));
    let missing = 10_000u32.saturating_sub(points.iter().sum());
    for class in by_remainder.into_iter().cycle().take(missing as usize) {
        points[class] += 1;
    }
    points
}

/// The entropy as a share of the largest possible one, in hundredths of a per cent.
pub(super) fn normalised_entropy(points: &[u32]) -> u32 {
    let term = |points: &u32| {
        let p = f64::from(*points) / 10_000.0;
        if *points == 0 { 0.0 } else { -p * p.ln() }
    };
    let entropy: f64 = points.iter().map(term).sum();
    (entropy / (points.len() as f64).ln() * 10_000.0).round() as u32
}

impl Case<'_> {
    /// The images that were not refused pooled: the arithmetic mean of their probabilities.
    pub(super) fn joint_reading(&self) -> Reading {
        let (images, findings): (Vec<usize>, Vec<&Finding>) = self.valid().unzip();
        let number = findings.len() as f64;
        let mean = |class: usize| findings.iter().map(|f| f.probabilities[class]).sum::<f64>() / number;
        let pooled: Vec<f64> = (0..self.model.classes.len()).map(mean).collect();
        let skin: Option<Vec<f64>> = findings.iter().map(|f| f.skin.map(f64::from)).collect();
        let skin = skin.map(|skin| (skin.iter().sum::<f64>() / number).round() as u32);
        Reading::new("joint".into(), images, skin, &pooled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_sums_to_a_hundred_and_keeps_its_order() {
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f64
        };
        for classes in 2..40 {
            let weights: Vec<f64> = (0..classes).map(|_| random().powi(3)).collect();
            let sum: f64 = weights.iter().sum();
            let probabilities: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
            let reading = Reading::new(String::new(), vec![1], None, &probabilities);
            assert_eq!(reading.points.iter().sum::<u32>(), 10_000);
            assert!(reading.order.is_sorted_by(|a, b| reading.points[*a] >= reading.points[*b]));
            for (points, p) in reading.points.iter().zip(probabilities) {
                assert!((f64::from(*points) - p * 10_000.0).abs() <= 1.0);
            }
        }
        assert_eq!(basis_points(&[1.0, 0.0]), [10_000, 0]);
    }

    /// The figures of a published example.
    #[test]
    fn the_entropy_is_that_of_the_printed_distribution() {
        assert_eq!(normalised_entropy(&[6_142, 2_410, 835, 305, 176, 87, 45]), 5_616);
        assert_eq!(normalised_entropy(&[10_000, 0]), 0);
        assert_eq!(normalised_entropy(&[5_000, 5_000]), 10_000);
    }
}
