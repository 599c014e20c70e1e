//! What every process does the same way: log lines, panics, secrets from files, the end of its life.

use std::{
    io,
    panic::{self, PanicHookInfo},
    path::Path,
    thread,
};

use futures_util::future::select_all;
use secrecy::SecretString;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

use crate::loops::Loops;

/// Starts logging: one JSON object a line on standard error, level by `RUST_LOG` (`info` when unset); panics too.
///
/// Fields never hold an image, a token, a password or a patient's data: types that hold them print without.
/// Installs the process's TLS provider too, so that every connection uses the same one.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let layer = fmt::layer().json().flatten_event(true).with_writer(io::stderr);
    // Both fail only when a test in the same process came first.
    let _ = tracing_subscriber::registry().with(filter).with(layer).try_init();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    panic::set_hook(Box::new(log_panic));
}

/// A panic is a log line with its place. Its message stays out: it may quote what it was working on.
fn log_panic(panic: &PanicHookInfo<'_>) {
    let at = panic.location().map(ToString::to_string).unwrap_or_default();
    tracing::error!(at, thread = thread::current().name(), "panic");
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

/// Waits for SIGTERM or SIGINT while `loops` go on.
///
/// # Errors
/// When the handlers cannot be installed, or one of the loops ends: whoever supervises the process has to start it again.
pub async fn told_to_stop<const N: usize>(loops: [&mut Loops; N]) -> io::Result<()> {
    tokio::select! {
        told = shutdown_requested() => told,
        (lost, ..) = select_all(loops.map(|loops| Box::pin(loops.lost()))) => {
            tracing::error!(%lost, "the process cannot go on");
            Err(io::Error::other(lost))
        }
    }
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex, PoisonError};

    use super::*;

    /// Log lines, kept.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_process_ends_when_one_of_its_loops_does() {
        let (mut listeners, mut loops) = (Loops::default(), Loops::default());
        listeners.spawn("the listener", std::future::pending());
        loops.spawn("the keeper", std::future::pending());
        loops.spawn("the recorder", async { panic!("as it may happen") });
        let error = told_to_stop([&mut listeners, &mut loops]).await.unwrap_err();
        assert_eq!(error.to_string(), "the recorder panicked");
    }

    #[test]
    fn a_panic_is_a_line_of_json_that_quotes_nothing() {
        let kept = Kept::default();
        let writer = kept.clone();
        let log = fmt::layer().json().flatten_event(true).with_writer(move || writer.clone());
        let usual = panic::take_hook();
        init();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(log), || {
            let patient = "Jane Doe";
            panic::catch_unwind(|| panic!("no image of {patient}")).unwrap_err();
        });
        panic::set_hook(usual);
        let line = kept.0.lock().unwrap_or_else(PoisonError::into_inner);
        let line: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!((&line["level"], &line["message"]), (&"ERROR".into(), &"panic".into()));
        assert!(line["at"].as_str().unwrap().contains(file!()), "{line}");
        assert!(!line.to_string().contains("Doe"), "{line}");
    }
}
