//! The only source of chance that is no secret; everything else is handed a number.

/// A number from 0 up to, but not including, 1, evenly distributed: for jitter, never for secrets.
pub fn fraction() -> f64 {
    // The low 32 bits of a UUIDv4 are random ones (RFC 9562 §5.4).
    f64::from(uuid::Uuid::new_v4().as_u128() as u32) / 2f64.powi(32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_fill_the_interval() {
        let all: Vec<f64> = (0..2_000).map(|_| fraction()).collect();
        assert!(all.iter().all(|f| (0.0..1.0).contains(f)));
        let mean = all.iter().sum::<f64>() / 2_000.0;
        assert!((0.45..0.55).contains(&mean), "{mean}");
    }
}
