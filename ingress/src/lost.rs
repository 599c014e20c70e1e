//! Finds jobs whose payload is gone: a broker that lost its disk, a deleted stream, a damaged block.
//!
//! A job's payload moves JOBS → RETRIES → RESULTS → record, and whoever moves it writes the next place before
//! erasing the one before. So a job that is looked for in this order, and is in none of the places, and is open
//! in the record after that, is lost: however slow a recorder is, whatever is killed meanwhile. A question that is
//! not answered proves nothing: unknown is not lost. Sequences prove little either, as a broker that lost messages
//! hands their numbers out again: a message is a job's only when it names the job.
//!
//! Of most jobs the broker tells at once that nothing is at their place: it is below the first message, above the
//! last, or on the list of those removed. Each round compares that with the record, slice by slice, so that a hundred
//! thousand losses are found within a minute. One by one is asked only where that does not say whose the message is.
//! There are two things that it does not say, which samples show, a few in each round: a damaged message that the
//! broker still counts, until it is read; and, when more than [`MAX_GAPS`] are removed between the first and the last
//! message, what else is gone between them.
//! The samples are the first ones in line of [`LOST_SAMPLES`] clients and lanes, among which a message soon is that the
//! broker has passed over, and as many others in the order of their ids, until [`LOST_SAMPLE_BYTES`] are read. Of jobs that
//! have been on the lists of RETRIES or RESULTS since the last round, as many are read: most leave these within moments, so
//! that a damaged one soon is among few.

use std::collections::{HashMap, HashSet};

use async_nats::jetstream::{Context, stream::RawMessageErrorKind};
use base64::{Engine, engine::general_purpose::URL_SAFE};
use dermflow_auth::db::DbError;
use dermflow_schemas::{
    envelope::job_of,
    id::JobId,
    limits::{
        LOST_AT_ONCE, LOST_GRACE, LOST_LOOKS, LOST_ROUNDS, LOST_SAMPLE_BYTES, LOST_SAMPLES, LOST_SUSPECTS,
        MAX_GAPS,
    },
    queue,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    app::App,
    store::{InLine, Open},
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

/// Which sequences JOBS has no message at.
#[derive(Debug)]
struct Gaps {
    /// Nothing below.
    first: i64,
    /// Nothing above.
    last: i64,
    /// Nothing here, as far as the broker has told; sorted.
    between: Vec<i64>,
}

impl Gaps {
    fn has(&self, sequence: i64) -> bool {
        sequence < self.first || sequence > self.last || self.between.binary_search(&sequence).is_ok()
    }
}

/// What the record and the broker's own account give reason to look for.
#[derive(Debug, Default)]
struct Suspects {
    /// The broker has no message at their place.
    absent: Vec<Open>,
    /// Several claim one place, as after a loss the broker hands places out again: [`LOST_LOOKS`] at most.
    contested: Vec<Open>,
    /// Their payload should be in the object store.
    claims: Vec<Open>,
    /// They are known to be in other streams; in the order of places.
    moved: Vec<Open>,
}

impl Suspects {
    /// Takes in a slice of the record, in the order of places. `elsewhere` are known to be in other streams.
    fn add(&mut self, slice: &[InLine], gaps: &Gaps, elsewhere: &HashSet<JobId>) {
        for place in slice.chunk_by(|a, b| a.job.stream_seq == b.job.stream_seq) {
            for InLine { job, claim_check, .. } in place.iter().filter(|in_line| in_line.is_due) {
                if *claim_check {
                    self.claims.push(*job);
                }
                if elsewhere.contains(&job.id) {
                    self.moved.push(*job);
                    continue;
                }
                if gaps.has(job.stream_seq) {
                    self.absent.push(*job);
                } else if place.len() > 1 && self.contested.len() < LOST_LOOKS {
                    self.contested.push(*job);
                }
            }
        }
    }
}

/// What earlier rounds have seen.
#[derive(Debug)]
pub(crate) struct Watch {
    /// Rounds in a row in which a payload was nowhere.
    missing: HashMap<Open, u32>,
    /// Where the samples go on.
    cursor: JobId,
    /// Jobs that were in other streams in the last round.
    elsewhere: HashSet<JobId>,
    /// Where the samples of these go on, by their places in JOBS.
    place: i64,
}

impl Default for Watch {
    fn default() -> Self {
        Self { missing: HashMap::new(), cursor: Uuid::nil().into(), elsewhere: HashSet::new(), place: 0 }
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
        let Suspects { absent, contested, claims, moved } = suspects(app, before, &gaps, &elsewhere).await?;
        let stayed = self.stayed(moved, elsewhere);
        let samples = self.samples(app, before).await?;
        // Of the others the broker has told again that they are gone.
        let known = self.missing.keys().copied().filter(|job| !gaps.has(job.stream_seq));
        let asked: HashSet<Open> = known.chain(contested).take(LOST_LOOKS).collect();
        let missing = async {
            let mut missing = absent;
            missing.extend(not_at_place(context, asked).await?);
            missing.extend(absent_among(context, samples).await?);
            if missing.is_empty() && claims.is_empty() {
                return Ok(missing);
            }
            let elsewhere = elsewhere_now(context).await?;
            missing.retain(|job| !elsewhere.contains(&job.id));
            missing.extend(without_object(context, claims).await?);
            Ok(missing)
        };
        let Ok(mut missing) = missing.await.map_err(unanswered) else { return Ok(Vec::new()) };
        // A broker that lets us read JOBS only tells the rest all the same.
        missing.extend(self.unreadable(context, stayed).await.map_err(unanswered).unwrap_or_default());
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

    /// Of the jobs in other streams those to read: what could not be read in the last round, and then, of what was there in
    /// it, the next ones.
    fn stayed(&mut self, moved: Vec<Open>, elsewhere: HashSet<JobId>) -> Vec<Open> {
        let before = std::mem::replace(&mut self.elsewhere, elsewhere);
        let stayed = moved.into_iter().filter(|job| before.contains(&job.id));
        let (mut chosen, others): (Vec<Open>, Vec<Open>) =
            stayed.partition(|job| self.missing.contains_key(job));
        let others = others.into_iter().filter(|job| job.stream_seq > self.place);
        chosen.extend(others.take(LOST_SAMPLES as usize));
        chosen
    }

    /// Those of which nothing can be read, until enough bytes are read.
    async fn unreadable(&mut self, context: &Context, stayed: Vec<Open>) -> Answer<Vec<Open>> {
        let (mut unreadable, mut read, mut reached) = (Vec::new(), 0, 0);
        let is_all = stayed.len() < LOST_SAMPLES as usize;
        for job in stayed {
            reached = job.stream_seq;
            match readable(context, job).await? {
                Some(bytes) => read += bytes,
                None => unreadable.push(job),
            }
            if read >= LOST_SAMPLE_BYTES {
                break;
            }
        }
        self.place = if is_all && read < LOST_SAMPLE_BYTES { 0 } else { reached };
        Ok(unreadable)
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

/// Goes through the record of open jobs, a slice at a time, until [`LOST_SUSPECTS`] are found.
async fn suspects(
    app: &App,
    before: OffsetDateTime,
    gaps: &Gaps,
    elsewhere: &HashSet<JobId>,
) -> Result<Suspects, DbError> {
    let (mut suspects, mut after) = (Suspects::default(), 0);
    while suspects.absent.len() < LOST_SUSPECTS {
        let slice = app.store.in_line(before, after).await?;
        let Some(last) = slice.last() else { break };
        after = last.job.stream_seq;
        suspects.add(&slice, gaps, elsewhere);
    }
    Ok(suspects)
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
        gaps.between.sort_unstable();
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

/// Those that are not at their place, each asked for.
async fn not_at_place(context: &Context, jobs: HashSet<Open>) -> Answer<Vec<Open>> {
    let look = |job: Open| async move {
        let found = find(context, job).await?;
        Ok::<_, async_nats::Error>((!matches!(found, Found::Own(_))).then_some(job))
    };
    let found: Vec<Option<Open>> =
        stream::iter(jobs).map(look).buffer_unordered(LOST_AT_ONCE).try_collect().await?;
    Ok(found.into_iter().flatten().collect())
}

/// The bytes of a message of the job that can be read, wherever it waits. It is looked for in the order in which it moves,
/// between the two subjects of RETRIES to and fro: a way that is longer than a question.
async fn readable(context: &Context, job: Open) -> Answer<Option<usize>> {
    if let Found::Own(bytes) = find(context, job).await? {
        return Ok(Some(bytes));
    }
    let (retry, due, result) =
        (queue::retry_subject(job.id), queue::due_filter(job.id), queue::result_subject(job.id));
    for (stream, subject) in
        [(queue::RETRIES, &due), (queue::RETRIES, &retry), (queue::RETRIES, &due), (queue::RESULTS, &result)]
    {
        let stream = context.get_stream_no_info(stream).await?;
        // Of several on a subject the first that is whole will do.
        match stream.get_first_raw_message_by_subject(subject, 1).await {
            Ok(message) => return Ok(Some(message.payload.len())),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
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
    fn what_the_broker_says_of_its_stream_tells_who_is_absent() {
        let gaps = Gaps { first: 10, last: 20, between: vec![12, 15] };
        let absent = [1, 9, 12, 15, 21, i64::MAX].map(|sequence| gaps.has(sequence));
        let present = [10, 11, 13, 20].map(|sequence| gaps.has(sequence));
        assert_eq!((absent, present), ([true; 6], [false; 4]));
        assert!(Gaps { first: 21, last: 20, between: Vec::new() }.has(20), "an empty stream has nothing");
    }

    #[test]
    fn a_slice_of_the_record_is_sorted_into_what_is_to_be_asked() {
        let job = |id, stream_seq| Open { id: Uuid::from_u128(id).into(), stream_seq };
        let due = |job| InLine { job, is_due: true, claim_check: false };
        let slice = [
            due(job(1, 9)),
            due(job(2, 10)),
            InLine { claim_check: true, ..due(job(3, 11)) },
            due(job(4, 12)),
            InLine { is_due: false, ..due(job(5, 12)) },
            due(job(6, 21)),
            InLine { is_due: false, ..due(job(7, 22)) },
        ];
        let (gaps, elsewhere) =
            (Gaps { first: 10, last: 20, between: Vec::new() }, HashSet::from([job(6, 21).id]));
        let mut suspects = Suspects::default();
        suspects.add(&slice, &gaps, &elsewhere);
        assert_eq!(suspects.absent, [job(1, 9)]);
        assert_eq!(suspects.contested, [job(4, 12)], "who is new claims the place, but is not looked for");
        assert_eq!(suspects.claims, [job(3, 11)]);
        assert_eq!(suspects.moved, [job(6, 21)]);
        let contested: Vec<InLine> =
            (0..).take(LOST_LOOKS + 9).map(|n| due(job(n, 15 + n as i64 / 9_000))).collect();
        suspects.add(&contested, &gaps, &elsewhere);
        assert_eq!(suspects.contested.len(), LOST_LOOKS, "what is asked one by one is bounded");
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

    /// What is only passing by is not read; each of the others is, in turn, and what could not be read is at once.
    #[test]
    fn what_stays_in_another_stream_is_read_in_turn() {
        let job = |n: i64| Open { id: Uuid::from_u128(n as u128).into(), stream_seq: n };
        let listed = |last: i64| (1..=last).map(job).collect::<Vec<_>>();
        let ids = |jobs: &[Open]| jobs.iter().map(|job| job.id).collect();
        let (mut watch, jobs) = (Watch::default(), listed(LOST_SAMPLES + 10));
        assert_eq!(watch.stayed(jobs.clone(), ids(&jobs)), [], "they may be gone in a moment");
        let first = watch.stayed(jobs.clone(), ids(&jobs));
        assert_eq!(first, listed(LOST_SAMPLES));
        watch.confirm(&[job(3)]);
        watch.place = LOST_SAMPLES;
        let next = watch.stayed(jobs.clone(), ids(&jobs));
        assert_eq!((next.len(), next[0], next[1]), (11, job(3), job(LOST_SAMPLES + 1)));
    }

    #[test]
    fn an_object_is_named_after_its_job() {
        let job: JobId = Uuid::from_u128(7).into();
        let subject = format!("$O.payloads.M.{}", URL_SAFE.encode(job.to_string()));
        assert_eq!(object_of(&subject), Some(job));
        assert_eq!(object_of("$O.payloads.M.x"), None);
    }
}
