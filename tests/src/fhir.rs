//! The outside judge of what Dermflow emits: R4 JSON schema, a third-party validator and the R4 invariants
//! (`tests/fhir`), in one Python process for all documents of a test.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, ensure};
use dermflow_local::{servers::python_packages, stack::repo};
use serde_json::Value;
use tokio::{io::AsyncWriteExt, process::Command};

/// Fails with every fault when one of the documents, each with a name for the message, is not valid FHIR R4.
///
/// # Errors
/// See above; and when the validators cannot be installed or run.
pub async fn validate(documents: &[(String, Value)]) -> Result<()> {
    let folder = repo().join("tests/fhir");
    let libs = install(&folder).await?;
    let lines: Vec<String> = documents.iter().map(|(_, document)| document.to_string()).collect();
    let mut judge = Command::new("python3")
        .arg(folder.join("validate.py"))
        .args(["--ndjson", "--libs"])
        .arg(libs)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = judge.stdin.take().context("no stdin")?;
    stdin.write_all(lines.join("\n").as_bytes()).await?;
    drop(stdin);
    let output = judge.wait_with_output().await?;
    let names: Vec<&str> = documents.iter().map(|(name, _)| name.as_str()).collect();
    let faults =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "of {names:?}:\n{faults}");
    Ok(())
}

/// Fails unless the judge itself refuses every kind of fault that it is there for.
///
/// # Errors
/// See above.
pub async fn judge_the_judge() -> Result<()> {
    let folder = repo().join("tests/fhir");
    let libs = install(&folder).await?;
    let output =
        Command::new("python3").arg(folder.join("controls.py")).arg("--libs").arg(libs).output().await?;
    let table =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{table}");
    Ok(())
}

/// The validators' Python packages, pinned, fetched once.
async fn install(folder: &Path) -> Result<PathBuf> {
    let pins = std::fs::read_to_string(folder.join("requirements.txt"))?;
    python_packages(repo(), "fhir", &pins, |step| println!("{step}")).await
}
