//! Which clients have bulk jobs: wake-ups from ingress, and a look at the stream for what they missed.

use std::collections::HashSet;

use async_nats::{Client, jetstream::Context};
use dermflow_schemas::{
    id::ClientId,
    limits::{BULK_LOOK, PULL_ANSWER, WAKE_BACKLOG},
    queue, random,
};
use futures_util::StreamExt;
use tokio::{
    sync::mpsc::{Receiver, Sender, channel},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;

/// What was heard.
#[derive(Debug)]
pub enum News {
    /// This client has a new job.
    Woken(ClientId),
    /// The time of a look, and the clients that had jobs then; none when the broker did not answer.
    Look(Option<HashSet<ClientId>>),
}

/// Listens and looks until it is dropped.
#[derive(Debug)]
pub struct Watch {
    news: Receiver<News>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

impl Watch {
    /// Subscribes, then looks for the first time.
    ///
    /// # Errors
    /// When the connection is closed.
    pub async fn start(client: &Client, context: Context) -> Result<Self, async_nats::Error> {
        let mut wakes = client.subscribe(queue::ALL_WAKES).await?;
        let (sender, news) = channel(WAKE_BACKLOG);
        let woken = sender.clone();
        let listen = async move {
            while let Some(message) = wakes.next().await {
                if let Some(client) = queue::last_token(&message.subject) {
                    // Whoever is this far behind finds out at the next look.
                    let _ = woken.try_send(News::Woken(client));
                }
            }
        };
        let tasks = [tokio::spawn(listen), tokio::spawn(look(context, sender))].map(AbortOnDropHandle::new);
        Ok(Self { news, _tasks: tasks })
    }

    /// The next piece of news. Cancel safe.
    pub async fn next(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
        }
    }
}

async fn look(context: Context, news: Sender<News>) {
    loop {
        let clients = match timeout(PULL_ANSWER, queue::clients_with_bulk(&context)).await {
            Ok(Ok(clients)) => Some(clients.into_iter().collect()),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no look at the stream");
                None
            }
            Err(_) => None,
        };
        if news.send(News::Look(clients)).await.is_err() {
            return;
        }
        // The broker's schedules fire in whole seconds: of workers that look once a second, the same one would always be
        // the next.
        sleep(BULK_LOOK.mul_f64(1.0 - random::fraction() / 2.0)).await;
    }
}
