//! The direction of dependencies, held against Cargo's own view of them.

use std::{collections::BTreeMap, process::Command};

use anyhow::{Context, Result};
use serde_json::Value;

/// Which of our crates each crate may use, dev-dependencies included.
const ALLOWED: [(&str, &[&str]); 8] = [
    ("dermflow-schemas", &[]),
    ("dermflow-http", &["dermflow-schemas"]),
    ("dermflow-auth", &["dermflow-http", "dermflow-schemas"]),
    ("dermflow-ingress", &["dermflow-auth", "dermflow-http", "dermflow-schemas"]),
    ("dermflow-workers", &["dermflow-schemas"]),
    ("dermflow-cli", &["dermflow-schemas"]),
    ("dermflow-local", &["dermflow-schemas"]),
    (
        "dermflow-tests",
        &[
            "dermflow-auth",
            "dermflow-http",
            "dermflow-ingress",
            "dermflow-local",
            "dermflow-schemas",
            "dermflow-workers",
        ],
    ),
];

/// What only these crates may know.
const OWNED: [(&str, &[&str]); 4] = [
    ("ort", &["dermflow-workers"]),
    ("axum", &["dermflow-http", "dermflow-auth", "dermflow-ingress"]),
    // A client of the tests signs assertions, good and bad ones.
    ("jsonwebtoken", &["dermflow-auth", "dermflow-tests"]),
    ("argon2", &["dermflow-auth"]),
];

/// What a worker must not be able to reach: HTTP, users, PostgreSQL.
const WORKER_MUST_NOT: [&str; 5] = ["axum", "hyper", "reqwest", "tokio-postgres", "deadpool-postgres"];

#[test]
fn crates_depend_in_one_direction() -> Result<()> {
    let graph = dependencies()?;
    assert_eq!(graph.keys().map(String::as_str).collect::<Vec<_>>(), sorted_names());
    for (name, allowed) in ALLOWED {
        for dependency in &graph[name] {
            let ours = dependency.starts_with("dermflow-");
            assert!(!ours || allowed.contains(&dependency.as_str()), "{name} must not use {dependency}");
            for (library, owners) in OWNED {
                assert!(dependency != library || owners.contains(&name), "{name} must not use {library}");
            }
        }
    }
    for forbidden in WORKER_MUST_NOT {
        assert!(
            !graph["dermflow-workers"].iter().any(|used| used == forbidden),
            "a worker knows {forbidden}"
        );
    }
    Ok(())
}

fn sorted_names() -> Vec<&'static str> {
    let mut names: Vec<&str> = ALLOWED.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    names
}

fn dependencies() -> Result<BTreeMap<String, Vec<String>>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .output()?;
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let package = |package: &Value| {
        let used =
            package["dependencies"].as_array().map(|all| all.iter().map(|d| text(&d["name"])).collect());
        (text(&package["name"]), used.unwrap_or_default())
    };
    Ok(metadata["packages"].as_array().context("packages")?.iter().map(package).collect())
}
