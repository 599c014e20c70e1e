//! For how long reports are kept, by client.
//!
//! An ended job is erased with all that belongs to it after as many days as the quota of its client says, at present: a
//! change is true for what is stored from the sweeper's next round on. With 0 days the report is removed before that, when
//! it has been answered, and the record says so to whoever asks. Answered means that it went out in whichever form: as an
//! answer to who waited, a poll, a read, a page of a search, a line of a batch. A caller who waits and has no
//! `Idempotency-Key` has no way to ask again, so that its report is removed before the answer leaves. The others get the
//! report again for [`ANSWER_GRACE`] after the first time, as nobody knows of an answer whether it arrived. That it was
//! given is on record before it leaves, so that a crash leaves nothing behind.

use dermflow_auth::{db::DbError, users::Quota};
use dermflow_schemas::{
    clock,
    error::Code,
    id::{ClientId, JobId},
    limits::{ANSWER_GRACE, SWEEP_BATCH, SWEEP_INTERVAL},
};
use time::OffsetDateTime;
use tokio::time::timeout;

use crate::{
    app::App,
    recorder::{delete_object, withdraw},
    store::Record,
};

/// A report that goes out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answered {
    pub(crate) job: JobId,
    /// Its client has no way to ask for it again.
    pub(crate) last: bool,
}

/// Until when the report of an ended job can be asked for that goes out now.
pub(crate) fn kept_until(record: &Record, last: bool, quota: Quota, now: OffsetDateTime) -> OffsetDateTime {
    let end = record.finished_at.unwrap_or(now) + quota.keeps_records();
    if quota.keeps_reports() {
        end
    } else if last {
        now
    } else {
        end.min(record.answered_at.unwrap_or(now) + ANSWER_GRACE)
    }
}

/// Notes that reports go out to `client`, and removes those that are not kept. They may leave only after it.
///
/// # Errors
/// When the database is away.
pub(crate) async fn answered(app: &App, client: ClientId, reports: &[Answered]) -> Result<(), Code> {
    if reports.is_empty() || app.access.quota(client).keeps_reports() {
        return Ok(());
    }
    let those = |last: bool| {
        reports.iter().filter(move |report| report.last == last).map(|report| report.job).collect::<Vec<_>>()
    };
    app.store.answered(&those(false), &those(true), clock::now()).await.map_err(|error| {
        tracing::warn!(%error, "that reports go out cannot be recorded");
        Code::DatabaseUnavailable
    })
}

/// Removes what is not kept any longer, until nothing is left or the next round of the sweeper is due: a change may
/// concern much at once.
///
/// # Errors
/// When the database is away.
pub(crate) async fn sweep(app: &App, now: OffsetDateTime) -> Result<(), DbError> {
    let all = async {
        while app.store.remove_answered(now - ANSWER_GRACE, now).await? {}
        while erase(app, now).await? {}
        Ok(())
    };
    timeout(SWEEP_INTERVAL, all).await.unwrap_or(Ok(()))
}

/// Whether there may be more.
async fn erase(app: &App, now: OffsetDateTime) -> Result<bool, DbError> {
    let past = app.store.past_retention(now).await?;
    let mut gone = Vec::new();
    for job in &past {
        // What could not be taken out of the queue at the job's end, and a dead letter's payload in the object store:
        // without the record nobody would find them.
        let is_out = job.unworked.is_none() || withdraw(app, job.id, job.unworked).await;
        if is_out && (!job.claim_check || delete_object(app, job.id).await) {
            gone.push(job.id);
        }
    }
    if gone.is_empty() {
        return Ok(false);
    }
    app.store.erase(&gone, now).await?;
    Ok(gone.len() as i64 == SWEEP_BATCH)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dermflow_schemas::job::{Lane, State};

    use super::*;

    fn record(finished_at: OffsetDateTime, answered_at: Option<OffsetDateTime>) -> Record {
        Record {
            id: JobId::new(finished_at),
            lane: Lane::Bulk,
            state: State::Succeeded,
            images: 1,
            attempts: 1,
            accepted_at: finished_at,
            queued_at: None,
            started_at: None,
            finished_at: Some(finished_at),
            answered_at,
            deadline: finished_at,
            stream_seq: None,
            claim_check: false,
            model_us: None,
            failure: None,
            deleted_at: None,
            ticket: 1,
            batch: None,
            line: None,
            custom_id: None,
        }
    }

    #[test]
    fn a_report_that_is_not_kept_can_be_asked_for_for_a_while_after_its_first_answer() {
        let now = clock::now();
        let day = Duration::from_hours(24);
        let (kept, none) = (
            Quota { retention_days: 3, ..Quota::default() },
            Quota { retention_days: 0, ..Quota::default() },
        );
        let second = Duration::from_secs(1);
        assert_eq!(kept_until(&record(now, Some(now)), true, kept, now), now + 3 * day);
        assert_eq!(kept_until(&record(now, None), true, none, now), now);
        assert_eq!(kept_until(&record(now, None), false, none, now), now + ANSWER_GRACE);
        let again = record(now - 5 * second, Some(now - 2 * second));
        assert_eq!(kept_until(&again, false, none, now), now - 2 * second + ANSWER_GRACE);
        let late = record(now + second - day, None);
        assert_eq!(kept_until(&late, false, none, now), now + second, "no longer than anything is kept");
    }
}
