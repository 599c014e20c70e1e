//! Metrics, in Prometheus' text format.

use prometheus::{Encoder, Registry, TextEncoder, core::Collector};

/// Registers a metric, and returns it.
///
/// # Errors
/// When there is one of this name.
pub fn add<C: Collector + Clone + 'static>(registry: &Registry, metric: C) -> Result<C, prometheus::Error> {
    registry.register(Box::new(metric.clone()))?;
    Ok(metric)
}

/// The exposition.
pub fn render(registry: &Registry) -> Vec<u8> {
    let mut text = Vec::new();
    if let Err(error) = TextEncoder::new().encode(&registry.gather(), &mut text) {
        tracing::error!(%error, "metrics cannot be rendered");
    }
    text
}
