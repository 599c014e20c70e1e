//! Finds jobs whose payload is gone: a broker that lost its disk, a deleted stream, a damaged block.
//!
//! A job's payload moves JOBS → RETRIES → RESULTS → record, and whoever moves it writes the next place before
//! erasing the one before. So a job that is looked for in this order, and is in none of the places, and is open
//! in the record after that, is lost: however slow a recorder is, whatever is killed meanwhile. A question that is
//! not answered proves nothing: unknown is not lost. Sequences prove little either, as a broker that lost messages
//! hands their numbers out again: a message is a job's only when it names the job.
//!
//! What to look for comes from the record and from the gaps that the broker knows of; and as a damaged message
//! shows only when it is read, a few others are read in each round.

use std::collections::{HashMap, HashSet};

use async_nats::jetstream::{Context, stream::RawMessageErrorKind};
use base64::{Engine, engine::general_purpose::URL_SAFE};
use dermflow_auth::db::DbError;
use dermflow_schemas::{
    envelope::job_of,
    id::JobId,
    limits::{LOST_AT_ONCE, LOST_GRACE, LOST_LOOKS, LOST_ROUNDS, LOST_SAMPLE_BYTES, LOST_SAMPLES, MAX_GAPS},
    queue,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    app::App,
    store::{Gaps, Open},
};

type Answer<T> = Result<T, async_nats::Error>;

/// What a message at a sequence turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// The job's own, of so many bytes.
    Own(usize),
    /// Another job's, or none, or one that the broker counts and can neither read nor remove.
    Not,
}

/// What earlier rounds have seen.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Rounds in a row in which a payload was nowhere.
    missing: HashMap<Open, u32>,
    /// Where the samples go on.
    cursor: JobId,
}

impl Default for Watch {
    fn default() -> Self {
        Self { missing: HashMap::new(), cursor: Uuid::nil().into() }
    }
}

impl Watch {
    /// One round. Returns the jobs whose payload is lost; none when the broker does not answer.
    pub(crate) async fn round(&mut self, app: &App, now: OffsetDateTime) -> Result<Vec<Open>, DbError> {
        let context = app.publisher.context();
        let unanswered = |error: async_nats::Error| tracing::debug!(%error, "nothing is known of payloads");
        let before = now - LOST_GRACE;
        let Ok((gaps, elsewhere)) = overview(context).await.map_err(unanswered) else {
            return Ok(Vec::new());
        };
        let ids: Vec<Uuid> = elsewhere.iter().map(|job| job.uuid()).collect();
        let mut suspects: HashSet<Open> = self.missing.keys().copied().collect();
        suspects.extend(app.store.misplaced(before, &gaps, &ids, LOST_LOOKS).await?);
        let samples = self.samples(app, before).await?;
        let claims = app.store.claim_checked(before, LOST_LOOKS).await?;
        let missing = async {
            let mut missing = absent(context, suspects.into_iter().collect()).await?;
            missing.extend(absent_among(context, samples).await?);
            if missing.is_empty() && claims.is_empty() {
                return Ok(missing);
            }
            let elsewhere = elsewhere_now(context).await?;
            missing.retain(|job| !elsewhere.contains(&job.id));
            missing.extend(without_object(context, claims).await?);
            Ok(missing)
        };
        let Ok(missing) = missing.await.map_err(unanswered) else { return Ok(Vec::new()) };
        Ok(self.confirm(&missing))
    }

    /// Those of `missing` that have been so for [`LOST_ROUNDS`] rounds.
    fn confirm(&mut self, missing: &[Open]) -> Vec<Open> {
        let before = std::mem::take(&mut self.missing);
        let rounds = missing.iter().map(|job| (*job, before.get(job).map_or(1, |rounds| rounds + 1)));
        let (lost, missing): (HashMap<_, _>, HashMap<_, _>) =
            rounds.partition(|(_, rounds)| *rounds >= LOST_ROUNDS);
        self.missing = missing;
        lost.into_keys().collect()
    }

    /// Messages to read although nothing speaks against them: the first of each client, and some of the others.
    async fn samples(&mut self, app: &App, before: OffsetDateTime) -> Result<Vec<Open>, DbError> {
        let mut samples = app.store.first_in_line(before, LOST_SAMPLES).await?;
        let others = app.store.next_in_line(before, self.cursor, LOST_SAMPLES).await?;
        self.cursor = others.last().map_or(Uuid::nil().into(), |job| job.id);
        samples.extend(others);
        let mut seen = HashSet::new();
        samples.retain(|job| seen.insert(*job));
        Ok(samples)
    }
}

/// What the broker itself says about where jobs are, before anything is looked for.
async fn overview(context: &Context) -> Answer<(Gaps, HashSet<JobId>)> {
    Ok((gaps(context).await?, elsewhere_now(context).await?))
}

async fn gaps(context: &Context) -> Answer<Gaps> {
    let stream = context.get_stream(queue::JOBS).await?;
    let state = &stream.cached_info().state;
    let known = state.deleted_count.unwrap_or(0);
    let mut gaps =
        Gaps { first: state.first_sequence as i64, last: state.last_sequence as i64, between: Vec::new() };
    if (1..=MAX_GAPS).contains(&known) {
        let detailed = stream.info_builder().with_deleted(true).fetch().await?;
        let deleted = detailed.info.state.deleted.unwrap_or_default();
        gaps.between = deleted.into_iter().map(|sequence| sequence as i64).collect();
    }
    Ok(gaps)
}

/// Jobs that wait for another attempt, and jobs whose result waits: in this order, in which they move.
async fn elsewhere_now(context: &Context) -> Answer<HashSet<JobId>> {
    let mut jobs = jobs_in(context, queue::RETRIES).await?;
    jobs.extend(jobs_in(context, queue::RESULTS).await?);
    Ok(jobs)
}

/// The jobs that the subjects of a stream's messages end with.
pub(crate) async fn jobs_in(context: &Context, stream: &str) -> Answer<HashSet<JobId>> {
    let stream = context.get_stream(stream).await?;
    if stream.cached_info().state.messages == 0 {
        return Ok(HashSet::new());
    }
    let subjects = stream.info_with_subjects(">").await?;
    Ok(subjects
        .try_filter_map(async |(subject, _)| Ok(queue::last_token::<JobId>(&subject)))
        .try_collect()
        .await?)
}

/// Whether the message at the job's sequence is its own.
pub(crate) async fn find(context: &Context, job: Open) -> Answer<Found> {
    let Ok(sequence) = u64::try_from(job.stream_seq) else { return Ok(Found::Not) };
    let stream = context.get_stream_no_info(queue::JOBS).await?;
    match stream.get_raw_message(sequence).await {
        Ok(message) if job_of(&message.payload) == Some(job.id) => Ok(Found::Own(message.payload.len())),
        Ok(_) => Ok(Found::Not),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(Found::Not),
        Err(error) => Err(error.into()),
    }
}

/// Those that are not at their place.
async fn absent(context: &Context, jobs: Vec<Open>) -> Answer<Vec<Open>> {
    let look = |job: Open| async move {
        let found = find(context, job).await?;
        Ok::<_, async_nats::Error>((!matches!(found, Found::Own(_))).then_some(job))
    };
    let found: Vec<Option<Open>> =
        stream::iter(jobs).map(look).buffer_unordered(LOST_AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

/// The same for samples: one after the other, until enough bytes are read.
async fn absent_among(context: &Context, samples: Vec<Open>) -> Answer<Vec<Open>> {
    let (mut missing, mut read) = (Vec::new(), 0);
    for job in samples {
        match find(context, job).await? {
            Found::Own(bytes) => read += bytes,
            Found::Not => missing.push(job),
        }
        if read >= LOST_SAMPLE_BYTES {
            break;
        }
    }
    Ok(missing)
}

/// Those whose payload is not in the object store, where it is from before the job is queued until it has ended.
async fn without_object(context: &Context, claims: Vec<Open>) -> Answer<Vec<Open>> {
    if claims.is_empty() {
        return Ok(Vec::new());
    }
    let stream = context.get_stream(queue::payload_stream()).await?;
    let subjects = stream.info_with_subjects(queue::payload_names()).await?;
    let kept: HashSet<JobId> =
        subjects.try_filter_map(async |(subject, _)| Ok(object_of(&subject))).try_collect().await?;
    Ok(claims.into_iter().filter(|job| !kept.contains(&job.id)).collect())
}

/// The object store's subjects end with an object's name in Base64.
fn object_of(subject: &str) -> Option<JobId> {
    let name = URL_SAFE.decode(subject.rsplit('.').next()?).ok()?;
    String::from_utf8(name).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(sequence: i64) -> Open {
        Open { id: Uuid::from_u128(7).into(), stream_seq: sequence }
    }

    #[test]
    fn lost_is_what_is_missing_in_rounds_in_a_row() {
        let mut watch = Watch::default();
        for _ in 1..LOST_ROUNDS {
            assert_eq!(watch.confirm(&[open(1), open(2)]), []);
        }
        assert_eq!(watch.confirm(&[open(2)]), [open(2)]);
        assert_eq!(watch.confirm(&[open(1)]), [], "it was back in between");
        assert_eq!(watch.confirm(&[]), []);
        assert!(watch.missing.is_empty(), "nothing is remembered of what is found");
    }

    #[test]
    fn an_object_is_named_after_its_job() {
        let job: JobId = Uuid::from_u128(7).into();
        let subject = format!("$O.payloads.M.{}", URL_SAFE.encode(job.to_string()));
        assert_eq!(object_of(&subject), Some(job));
        assert_eq!(object_of("$O.payloads.M.x"), None);
    }
}
