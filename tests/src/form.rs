//! How hard a fault test tries. `DERMFLOW_FAULTS=long` asks for the durations and counts of the reliability table
//! and is what `tests/run --faults` sets; without it a test keeps within half a minute.

use std::sync::LazyLock;

/// Whether the long form is asked for.
pub fn is_long() -> bool {
    static LONG: LazyLock<bool> =
        LazyLock::new(|| std::env::var("DERMFLOW_FAULTS").is_ok_and(|form| form == "long"));
    *LONG
}

/// The number for the form that is asked for.
pub fn scale<T>(short: T, long: T) -> T {
    if is_long() { long } else { short }
}

/// The seed of everything random in this process, printed: `DERMFLOW_SEED`, or one that was never used.
pub fn seed() -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(|| {
        let given = std::env::var("DERMFLOW_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
        println!("DERMFLOW_SEED={seed}");
        seed
    });
    *SEED
}
