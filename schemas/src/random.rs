//! The only source of chance that is no secret; everything else is handed a number, or a seed from which numbers follow.

/// A number from 0 up to, but not including, 1, evenly distributed: for jitter, never for secrets.
pub fn fraction() -> f64 {
    // The low 32 bits of a UUIDv4 are random ones (RFC 9562 §5.4).
    f64::from(uuid::Uuid::new_v4().as_u128() as u32) / 2f64.powi(32)
}

/// Numbers that follow from a seed, the same on every run: `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014).
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// What its state moves on by: 2^64 over the golden ratio.
    pub const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::STEP);
        mix(self.0)
    }

    /// Below `n`, which is above zero.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n as u64) as usize
    }

    /// From `low` to `high`.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.number() % (high - low + 1)
    }

    /// True `n` times in a hundred.
    pub fn percent(&mut self, n: usize) -> bool {
        self.below(100) < n
    }
}

/// The finisher of `SplitMix64`: numbers that differ in a bit have little in common then.
pub fn mix(bits: u64) -> u64 {
    let bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    // The numbers of the authors' own program (splitmix64.c, by Vigna) for this seed.
    #[test]
    fn a_seed_gives_the_published_numbers() {
        let mut rng = Rng(1_234_567);
        let numbers = [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!([rng.number(), rng.number(), rng.number()], numbers);
    }

    #[test]
    fn fractions_fill_the_interval() {
        let all: Vec<f64> = (0..2_000).map(|_| fraction()).collect();
        assert!(all.iter().all(|f| (0.0..1.0).contains(f)));
        let mean = all.iter().sum::<f64>() / 2_000.0;
        assert!((0.45..0.55).contains(&mean), "{mean}");
    }
}
