//! One program for all targets: `DERMFLOW_FUZZ_TARGET` names the one that it runs.

#![no_main]

#[path = "../oracles.rs"]
mod oracles;

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<(&str, fn(&[u8]))> = LazyLock::new(|| {
    let name = std::env::var("DERMFLOW_FUZZ_TARGET").unwrap_or_default();
    let found = oracles::TARGETS.into_iter().find(|(target, _)| *target == name);
    found.unwrap_or_else(|| panic!("no target {name:?}"))
});

fuzz_target!(|input: &[u8]| oracles::run(*TARGET, input));
