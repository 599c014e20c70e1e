//! The one command that brings everything up.

use std::{fs, net::TcpListener, path::Path, process::Output};

use anyhow::{Result, bail};
use dermflow_local::{
    ports,
    stack::{Ports, programs, repo},
};
use tokio::process::Command;

async fn up(state: &Path, port: u16, models: &[String]) -> Result<Output> {
    let mut command = Command::new(programs()?.join("dermflow-up"));
    command.args(["--check", "--workers", "1", "--port", &port.to_string(), "--state"]).arg(state);
    command.args(models.iter().flat_map(|model| ["--model", model]));
    Ok(command.output().await?)
}

/// A port whose two companions are free as well.
fn port() -> Result<u16> {
    for _ in 0..100 {
        let around = Ports::around(ports::free()?);
        if around.check().is_ok() && ports::take(around.plain) && ports::take(around.internal) {
            return Ok(around.https);
        }
    }
    bail!("no free port")
}

/// The processes that have `text` in their command line.
fn processes(text: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let lines = entries.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| line.contains(text)).collect()
}

// Twice: a new state and an old one, then with two models. The samples are analysed, and no process is left behind.
#[tokio::test]
async fn up_analyses_its_samples_and_leaves_nothing_behind() -> Result<()> {
    let state = std::env::temp_dir().join(format!("dermflow-up-{}", uuid::Uuid::new_v4().simple()));
    let folder = |name: &str| repo().join(name).display().to_string();
    let two = [folder("workers/models/derm7"), folder("tests/models/tiny") + "=0"];
    for models in [&[][..], &two] {
        let output = up(&state, port()?, models).await?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(text.matches("  report ").count(), 2, "{text}");
        assert!(text.contains("Melanoma"), "{text}");
        let left = processes(&state.display().to_string());
        assert!(left.is_empty(), "{left:?}");
    }
    fs::remove_dir_all(state)?;
    Ok(())
}

// What is in the way is one sentence, and exit code 1.
#[tokio::test]
async fn up_says_what_is_in_its_way() -> Result<()> {
    let state = std::env::temp_dir().join(format!("dermflow-up-{}", uuid::Uuid::new_v4().simple()));
    let port = port()?;
    let taken = TcpListener::bind(("127.0.0.1", port))?;
    let output = up(&state, port, &[]).await?;
    drop(taken);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains(&format!("port {port} is taken")), "{text}");
    assert_eq!(text.trim().lines().count(), 1, "{text}");
    let foreign = up(Path::new(env!("CARGO_MANIFEST_DIR")), port, &[]).await?;
    assert_eq!(foreign.status.code(), Some(1));
    fs::remove_dir_all(state)?;
    Ok(())
}
