//! What the broker's servers say of themselves to the user `monitor`.

use std::time::Duration;

use async_nats::Client;
use futures_util::StreamExt;
use serde_json::Value;
use tokio::time::timeout;

use crate::queue::NatsOptions;

/// How long after the last answer no further server is expected to answer.
const QUIET: Duration = Duration::from_millis(500);
/// How long nobody at all may answer.
const SILENCE: Duration = Duration::from_secs(5);

/// What servers can be asked for; the monitor may ask for nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// The server: its listeners.
    Server,
    /// Its clients, with the version of TLS of each.
    Connections,
    /// Its links to other servers.
    Routes,
    /// Where and what it stores.
    Store,
}

impl Question {
    fn subject(self) -> &'static str {
        match self {
            Self::Server => "$SYS.REQ.SERVER.PING.VARZ",
            Self::Connections => "$SYS.REQ.SERVER.PING.CONNZ",
            Self::Routes => "$SYS.REQ.SERVER.PING.ROUTEZ",
            Self::Store => "$SYS.REQ.SERVER.PING.JSZ",
        }
    }

    fn body(self) -> &'static str {
        match self {
            Self::Server | Self::Routes => "{}",
            Self::Connections => r#"{"auth":true,"limit":65536}"#,
            Self::Store => r#"{"accounts":true,"streams":true,"config":true}"#,
        }
    }
}

/// A connection as monitor.
#[derive(Debug)]
pub struct Monitor {
    client: Client,
    inbox: String,
}

impl Monitor {
    /// Connects to one of the broker's servers.
    ///
    /// # Errors
    /// When it cannot be reached or refuses.
    pub async fn connect(options: &NatsOptions) -> Result<Self, async_nats::Error> {
        let client = options.connect_once().await?;
        Ok(Self { client, inbox: format!("_INBOX_{}", options.nats_user) })
    }

    /// What every server answers that answers soon, as `data` beside the server's own name in `server`.
    ///
    /// # Errors
    /// When no server answers, or not in JSON.
    pub async fn ask(&self, question: Question) -> Result<Vec<Value>, async_nats::Error> {
        let inbox = format!("{}.{question:?}", self.inbox);
        let mut replies = self.client.subscribe(inbox.clone()).await?;
        self.client.publish_with_reply(question.subject(), inbox, question.body().into()).await?;
        let mut answers = Vec::new();
        let mut patience = SILENCE;
        while let Ok(Some(reply)) = timeout(patience, replies.next()).await {
            let answer: Value = serde_json::from_slice(&reply.payload)?;
            if let Some(error) = answer.get("error") {
                return Err(format!("the broker answers {error}").into());
            }
            answers.push(answer);
            patience = QUIET;
        }
        if answers.is_empty() { Err("the broker does not answer the monitor".into()) } else { Ok(answers) }
    }
}
