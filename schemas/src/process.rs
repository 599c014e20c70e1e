//! What every process does the same way: log lines, secrets from files, the end of its life.

use std::{io, path::Path};

use secrecy::SecretString;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// Starts logging: one JSON object a line on standard error, level by `RUST_LOG` (`info` when unset).
///
/// Fields never hold an image, a token, a password or a patient's data: types that hold them print without.
/// Installs the process's TLS provider too, so that every connection uses the same one.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let layer = fmt::layer().json().flatten_event(true).with_writer(io::stderr);
    // Both fail only when a test in the same process came first.
    let _ = tracing_subscriber::registry().with(filter).with(layer).try_init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// Reads a secret from a file; white space at the end does not count.
///
/// # Errors
/// When the file cannot be read; the message names the file, never its content.
pub fn read_secret(path: &Path) -> io::Result<SecretString> {
    let text = std::fs::read_to_string(path).map_err(|e| named(path, &e))?;
    let text = zeroize::Zeroizing::new(text);
    Ok(SecretString::from(text.trim_end()))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Waits for SIGTERM or SIGINT.
///
/// # Errors
/// When the handlers cannot be installed.
pub async fn shutdown_requested() -> io::Result<()> {
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
