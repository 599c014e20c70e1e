//! Keeps the queue in being: what is deleted at the broker while the system runs is made again, empty, within
//! seconds, and an alarm goes up. What was in it is for the sweeper to find out. Every replica does this, as it
//! needs neither the database nor a leader.
//!
//! Looking at the queue is also where its gauges come from, and where it shows that staff has changed a client's limit of
//! jobs in flight.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_nats::jetstream::{
    Context,
    context::GetStreamErrorKind,
    stream::{Info, Stream},
};
use dermflow_auth::audit::{Action, Event, Who};
use dermflow_schemas::{
    clock,
    limits::{KEEP_INTERVAL, MAX_CONSUMERS},
    queue,
};
use futures_util::{StreamExt, TryStreamExt};
use serde_json::json;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::{app::App, lanes};

/// What a stream holds, as far as consumers know of it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Held {
    messages: u64,
    pending: u64,
    ack_pending: u64,
    /// Not to be delivered yet: retries in their back-off.
    parked: u64,
}

impl Held {
    /// Messages that no consumer will deliver and none has delivered: the broker has lost track of them.
    fn unaccounted(self) -> u64 {
        self.messages.saturating_sub(self.pending + self.ack_pending + self.parked)
    }
}

/// Looks every [`KEEP_INTERVAL`] until `stop`.
pub(crate) async fn run(app: Arc<App>, ack_wait: Duration, replicas: usize, stop: CancellationToken) {
    let mut round = interval(KEEP_INTERVAL);
    round.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = round.tick() => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            outcome = timeout(2 * KEEP_INTERVAL, keep(&app, ack_wait, replicas)) => match outcome {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "the queue cannot be looked at"),
                Err(_) => tracing::debug!("the broker does not answer"),
            }
        }
    }
}

async fn keep(app: &App, ack_wait: Duration, replicas: usize) -> Result<(), async_nats::Error> {
    let context = app.publisher.context();
    let mut missing = Vec::new();
    for (name, consumers) in queue::expected(ack_wait) {
        let Some(stream) = stream(context, &name).await? else {
            missing.push(name);
            continue;
        };
        let (held, there) = look(&stream).await?;
        show(app, &name, held);
        lanes::align(app, &there).await;
        let gone = consumers.into_iter().filter(|consumer| !there.contains_key(consumer));
        missing.extend(gone.map(|consumer| format!("{name}/{consumer}")));
    }
    if missing.is_empty() { Ok(()) } else { recreate(app, ack_wait, replicas, &missing).await }
}

/// `None` when the broker says that there is no such stream.
async fn stream(context: &Context, name: &str) -> Result<Option<Stream<Info>>, async_nats::Error> {
    use async_nats::jetstream::ErrorCode;
    match context.get_stream(name).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(cause) if cause.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Ok(None)
            }
            _ => Err(error.into()),
        },
    }
}

/// What the stream holds, and its consumers by name with the limits of what they have in flight.
async fn look(stream: &Stream<Info>) -> Result<(Held, HashMap<String, i64>), async_nats::Error> {
    let state = &stream.cached_info().state;
    let mut held = Held { messages: state.messages, ..Held::default() };
    let mut there = HashMap::new();
    let mut consumers = stream.consumers().take(MAX_CONSUMERS);
    while let Some(consumer) = consumers.try_next().await? {
        held.pending += consumer.num_pending;
        held.ack_pending += consumer.num_ack_pending as u64;
        there.insert(consumer.name, consumer.config.max_ack_pending);
    }
    if held.unaccounted() > 0 && stream.cached_info().config.name == queue::RETRIES {
        let parked = stream.info_with_subjects(queue::ALL_RETRIES).await?;
        held.parked = parked.take(MAX_CONSUMERS).count().await as u64;
    }
    Ok((held, there))
}

fn show(app: &App, stream: &str, held: Held) {
    let figures = [
        ("messages", held.messages),
        ("pending", held.pending),
        ("ack_pending", held.ack_pending),
        ("unaccounted", held.unaccounted()),
    ];
    for (kind, count) in figures {
        // Without consumers there is nobody to account for what the stream keeps.
        if kind == "messages" || queue::is_consumed(stream) {
            app.metrics.stream_messages.with_label_values(&[stream, kind]).set(count as i64);
        }
    }
}

async fn recreate(
    app: &App,
    ack_wait: Duration,
    replicas: usize,
    missing: &[String],
) -> Result<(), async_nats::Error> {
    tracing::error!(?missing, "parts of the queue are gone; making them again");
    queue::ensure(app.publisher.context(), ack_wait, replicas).await?;
    for part in missing {
        app.metrics.queue_recreated.with_label_values(&[part]).inc();
    }
    let detail = json!({ "missing": missing });
    let event = Event::new(Action::QueueRecreated, Who::part("ingress"), clock::now()).detail(detail);
    if let Err(error) = app.store.note(event).await {
        tracing::warn!(%error, "not in the audit trail");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_consumer_knows_of_is_unaccounted() {
        let held = Held { messages: 10, pending: 4, ack_pending: 3, parked: 2 };
        assert_eq!(held.unaccounted(), 1);
        // The figures are not taken at the same moment.
        assert_eq!(Held { messages: 8, ..held }.unaccounted(), 0);
    }
}
