//! What is stored follows the key that seals: reports and private keys that older keys seal are sealed anew.
//!
//! Nobody has to tell: what is to be done is what the table of reports says, at any moment and after any interruption.
//! Every replica looks, and the one that has the lock at that moment does a page; half of the time is left to others.

use std::{collections::HashSet, sync::Arc};

use dermflow_auth::db::DbError;
use dermflow_schemas::{
    clock,
    id::JobId,
    limits::RESEAL_INTERVAL,
    seal::{Content, SealError, Sealed},
};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{app::App, store::reseal::Owner};

/// Looks every [`RESEAL_INTERVAL`] until `stop`.
pub(crate) async fn run(app: Arc<App>, stop: CancellationToken) {
    let mut look = interval(RESEAL_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Secrets that do not open, which are made anew when they are needed.
    let mut broken = HashSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            outcome = round(&app, &mut broken) => if let Err(error) = outcome {
                tracing::warn!(%error, "sealing anew goes on later");
            }
        }
    }
}

/// Follows the keys until `stop`.
pub(crate) async fn follow_keys(app: Arc<App>, stop: CancellationToken) {
    tokio::select! {
        () = stop.cancelled() => {}
        never = app.keyring.follow() => match never {},
    }
}

async fn round(app: &App, broken: &mut HashSet<(Owner, String)>) -> Result<(), DbError> {
    let (keys, now) = (app.keyring.keys(), clock::now());
    let sealing = &keys.sealing(now).id;
    let older: Vec<String> = keys.older(now).map(|key| key.id.clone()).collect();
    if older.is_empty() {
        return Ok(());
    }
    for (owner, old) in app.store.secrets(&older, broken).await? {
        if let Err(error) = secret(app, &owner, &old).await? {
            tracing::error!(?owner, %error, "a secret cannot be sealed anew");
            app.metrics.resealed.with_label_values(&["secret", "unopened"]).inc();
            // A key that is missing may come back.
            if matches!(error, SealError::Broken) {
                broken.insert((owner, old.key_id));
            }
        }
    }
    for older in app.store.keys_in_use(&older, sealing).await? {
        reports(app, &older, sealing).await?;
    }
    Ok(())
}

async fn secret(app: &App, owner: &Owner, old: &Sealed) -> Result<Result<(), SealError>, DbError> {
    let content = match owner {
        Owner::AcmeAccount(directory) => Content::AcmeAccount(directory),
        Owner::Certificate(names) => Content::CertificateKey(names),
        Owner::Search(id) => Content::SearchKey(*id),
    };
    match reseal(app, content, old) {
        Ok(new) => {
            let count = app.store.replace_secret(owner, old, &new).await?;
            app.metrics.resealed.with_label_values(&["secret", "done"]).inc_by(count);
            Ok(Ok(()))
        }
        Err(error) => Ok(Err(error)),
    }
}

async fn reports(app: &App, older: &str, sealing: &str) -> Result<(), DbError> {
    let mut after: JobId = Uuid::nil().into();
    let mut count = 0;
    loop {
        let begun = Instant::now();
        let anew = |job, old: &Sealed| reseal(app, Content::Report(job), old);
        let page = app.store.reseal_reports(older, sealing, after, anew).await?;
        for job in &page.broken {
            tracing::error!(%job, "the report cannot be sealed anew: it does not open");
        }
        count += page.resealed;
        app.metrics.resealed.with_label_values(&["report", "done"]).inc_by(page.resealed);
        let broken = page.broken.len() as u64;
        app.metrics.resealed.with_label_values(&["report", "unopened"]).inc_by(broken);
        let Some(last) = page.last else { break };
        after = last;
        sleep(begun.elapsed()).await;
    }
    if count > 0 {
        tracing::info!(older, sealing, count, "reports were sealed anew");
    }
    Ok(())
}

fn reseal(app: &App, content: Content<'_>, old: &Sealed) -> Result<Sealed, SealError> {
    app.keyring.seal(content, app.keyring.open(content, old)?, clock::now())
}
