//! What travels on the queue: a line of JSON in clear, then sealed bytes.
//!
//! In clear is only what routing and retries need: ids, times, attempt, key id, never a patient field. A
//! version that a reader does not know is refused: a worker puts the job among the dead letters, a recorder
//! leaves the result to one that knows it. Golden files in `schemas/golden` hold the form.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use time::OffsetDateTime;

use crate::{
    error::Code,
    fhir::{CodeableConcept, Identifier, Language, Reference},
    id::{ClientId, JobId},
    image::{Format, ImageBytes},
    job::Lane,
    limits::MAX_ATTEMPTS,
    model::ModelRef,
    seal::Sealed,
};

/// The version this build writes, and the only one that it reads: additions need no new one, as unknown fields are passed
/// over. The build that raises it has to read this one as well, as jobs of it are queued.
pub const VERSION: u32 = 1;

/// Why bytes from the queue are no envelope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Written by a newer build.
    #[error("unknown envelope version {0}")]
    UnknownVersion(u32),
    /// Not the form of its version.
    #[error("malformed envelope: {0}")]
    Malformed(String),
}

/// Where the sealed payload is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Carrier {
    /// Behind the header, in the same message.
    Inline,
    /// In the object store under the job's id: a claim check, for payloads beyond the broker's message size.
    Object,
}

/// A job on its way to a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobHeader {
    v: u32,
    /// The job.
    pub job: JobId,
    /// Whose it is.
    pub client: ClientId,
    /// Where it waits, and waits again after a failed attempt.
    pub lane: Lane,
    /// 1 for the first attempt; redeliveries by the broker come on top.
    pub attempt: u32,
    /// When it was accepted.
    #[serde(with = "time::serde::rfc3339")]
    pub accepted_at: OffsetDateTime,
    /// After this instant no attempt begins.
    #[serde(with = "time::serde::rfc3339")]
    pub deadline: OffsetDateTime,
    /// Which key seals the payload.
    pub key: String,
    /// Where the payload is.
    pub carrier: Carrier,
    /// How often an operator has put it back into the queue.
    #[serde(default, skip_serializing_if = "is_default")]
    pub requeues: u32,
}

/// Fields that have their default in nearly every message are left out, which older builds take for it, too.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The job that a message names, whatever its version; `None` when it names none.
pub fn job_of(message: &[u8]) -> Option<JobId> {
    #[derive(Deserialize)]
    struct Named {
        job: JobId,
    }
    let end = message.iter().position(|byte| *byte == b'\n')?;
    serde_json::from_slice(&message[..end]).ok().map(|Named { job }| job)
}

impl JobHeader {
    /// The header of a first attempt, whose payload is not sealed yet. The deadline is the lane's, or
    /// `cancel_after` acceptance if that is sooner.
    pub fn new(
        job: JobId,
        client: ClientId,
        lane: Lane,
        accepted_at: OffsetDateTime,
        cancel_after: Option<Duration>,
    ) -> Self {
        let (carrier, key, deadline) = (Carrier::Inline, String::new(), accepted_at);
        let mut header = Self {
            v: VERSION,
            job,
            client,
            lane,
            attempt: 1,
            accepted_at,
            deadline,
            key,
            carrier,
            requeues: 0,
        };
        header.accept(accepted_at, cancel_after);
        header
    }

    /// Moves the acceptance, and the deadline with it.
    pub fn accept(&mut self, accepted_at: OffsetDateTime, cancel_after: Option<Duration>) {
        let within = match self.lane {
            Lane::Interactive => crate::limits::INTERACTIVE_DEADLINE,
            Lane::Bulk => crate::limits::BULK_DEADLINE,
        };
        self.accepted_at = accepted_at;
        self.deadline = accepted_at + cancel_after.map_or(within, |after| after.min(within));
    }

    /// The header of a dead letter's job when it goes back into the queue at `now`, for the `requeues`th time:
    /// attempts count afresh, the deadline is a new one.
    #[must_use]
    pub fn requeued(self, requeues: u32, now: OffsetDateTime) -> Self {
        let fresh = Self::new(self.job, self.client, self.lane, now, None);
        Self { attempt: 1, deadline: fresh.deadline, requeues, ..self }
    }

    /// The same header for another attempt.
    #[must_use]
    pub fn at_attempt(self, attempt: u32) -> Self {
        Self { attempt, ..self }
    }

    /// The id of a message about attempt `attempt`: no other message of the job in the same stream has it, also
    /// after the job was put back, or the broker would drop the new one as a repetition.
    pub fn message_id(&self, attempt: u32) -> String {
        match self.requeues {
            0 => format!("{}:{attempt}", self.job),
            requeues => format!("{}:r{requeues}:{attempt}", self.job),
        }
    }

    /// The message: header and `tail`, which is empty for [`Carrier::Object`].
    pub fn encode(&self, tail: &[u8]) -> Bytes {
        frame(self, tail)
    }

    /// Reads a message.
    ///
    /// # Errors
    /// When the version is unknown or the form is wrong.
    pub fn decode(message: &Bytes) -> Result<(Self, Bytes), EnvelopeError> {
        unframe_versioned(message)
    }
}

/// One image as the worker gets it; the bytes stand behind the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageEntry {
    /// Length of the file, in bytes.
    pub bytes: usize,
    /// By magic number.
    pub format: Format,
    /// The caller's title.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// When it was taken, as the caller says: a FHIR dateTime, which may be a year alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<String>,
    /// Where on the body, as the caller coded it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_site: Option<CodeableConcept>,
}

/// What the caller asked for, without the pixels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    v: u32,
    /// One to three images.
    pub images: Vec<ImageEntry>,
    /// The patient, by logical identifier or reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<Reference>,
    /// The caller's identifier of the order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identifier: Option<Identifier>,
    /// For how many classes, the most probable first, there are heat maps of each image.
    #[serde(default, skip_serializing_if = "is_default")]
    pub heat_maps: u32,
    /// What the report is written in.
    #[serde(default, skip_serializing_if = "is_default")]
    pub language: Language,
    /// The model; by the weights of the worker's models when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelRef>,
}

impl Manifest {
    /// A manifest of the current version, for a report in English without heat maps, by whichever model.
    pub fn new(images: Vec<ImageEntry>, subject: Option<Reference>, identifier: Option<Identifier>) -> Self {
        let (heat_maps, language) = (0, Language::default());
        Self { v: VERSION, images, subject, identifier, heat_maps, language, model: None }
    }
}

/// The plain form of a payload: a manifest and the image files. It exists in memory only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// Everything but the pixels.
    pub manifest: Manifest,
    /// The files, in the manifest's order.
    pub images: Vec<ImageBytes>,
}

impl Payload {
    /// The bytes to seal.
    pub fn encode(&self) -> Vec<u8> {
        let images: Vec<&[u8]> = self.images.iter().map(ImageBytes::as_slice).collect();
        frame(&self.manifest, &images.concat()).into()
    }

    /// Reads unsealed bytes.
    ///
    /// # Errors
    /// When the version is unknown, or the lengths do not add up.
    pub fn decode(plain: Vec<u8>) -> Result<Self, EnvelopeError> {
        let (manifest, mut tail): (Manifest, Bytes) = unframe_versioned(&plain.into())?;
        let mut images = Vec::new();
        for entry in &manifest.images {
            if entry.bytes > tail.len() {
                return Err(EnvelopeError::Malformed("an image is cut short".into()));
            }
            images.push(tail.split_to(entry.bytes).into());
        }
        if !tail.is_empty() {
            return Err(EnvelopeError::Malformed("bytes behind the last image".into()));
        }
        Ok(Self { manifest, images })
    }
}

/// Why a job ended without a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The error, as the synchronous caller gets it.
    pub code: Code,
    /// The image at fault, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<usize>,
}

impl Failure {
    /// Whether a job that fails so after `attempts` may be among the dead letters, with its payload: no attempt is left,
    /// or the model is at fault, which would say the same again until it is mended.
    pub fn leaves_letter(&self, attempts: u32) -> bool {
        attempts >= MAX_ATTEMPTS || self.code == Code::AnalysisFailed
    }
}

/// How an attempt ended for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The sealed report stands behind the header.
    Succeeded,
    /// There is none.
    Failed(Failure),
}

/// A job's result on its way to the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultHeader {
    v: u32,
    /// The job.
    pub job: JobId,
    /// How it ended.
    pub outcome: Outcome,
    /// Attempts made, this one included.
    pub attempts: u32,
    /// When the last attempt began.
    #[serde(with = "time::serde::rfc3339")]
    pub started_at: OffsetDateTime,
    /// When it ended.
    #[serde(with = "time::serde::rfc3339")]
    pub finished_at: OffsetDateTime,
    /// Time in the model, all images together, in microseconds.
    pub model_us: u64,
    /// Which key seals the report; empty when there is none.
    pub key: String,
    /// How often the job had been put back into the queue when the attempt was made: a failure from before it was
    /// put back last says nothing about it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub requeues: u32,
    /// Which version of which model it was; empty when the attempt did not come to one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub model: String,
}

impl ResultHeader {
    /// A result without a report.
    pub fn failed(
        job: JobId,
        failure: Failure,
        attempts: u32,
        started_at: OffsetDateTime,
        finished_at: OffsetDateTime,
    ) -> Self {
        let outcome = Outcome::Failed(failure);
        let (key, model) = (String::new(), String::new());
        let (model_us, requeues) = (0, 0);
        Self { v: VERSION, job, outcome, attempts, started_at, finished_at, model_us, key, requeues, model }
    }

    /// A result with a report.
    pub fn succeeded(
        job: JobId,
        attempts: u32,
        started_at: OffsetDateTime,
        finished_at: OffsetDateTime,
        model_us: u64,
        key: String,
    ) -> Self {
        let (outcome, requeues, model) = (Outcome::Succeeded, 0, String::new());
        Self { v: VERSION, job, outcome, attempts, started_at, finished_at, model_us, key, requeues, model }
    }

    /// The same result, of a job that had been put back into the queue this often.
    #[must_use]
    pub fn after_requeues(self, requeues: u32) -> Self {
        Self { requeues, ..self }
    }

    /// The same result, of an attempt with this model.
    #[must_use]
    pub fn of_model(self, model: Option<&ModelRef>) -> Self {
        Self { model: model.map(ModelRef::to_string).unwrap_or_default(), ..self }
    }

    /// The message: header and the sealed report, if there is one.
    pub fn encode(&self, report: &[u8]) -> Bytes {
        frame(self, report)
    }

    /// Reads a message; the sealed report is there exactly when the outcome says so.
    ///
    /// # Errors
    /// When the version is unknown or the form is wrong.
    pub fn decode(message: &Bytes) -> Result<(Self, Option<Sealed>), EnvelopeError> {
        let (header, tail): (Self, Bytes) = unframe_versioned(message)?;
        let report = match (&header.outcome, tail.is_empty()) {
            (Outcome::Succeeded, false) => Some(Sealed { key_id: header.key.clone(), bytes: tail }),
            (Outcome::Failed(_), true) => None,
            _ => return Err(EnvelopeError::Malformed("outcome and report disagree".into())),
        };
        Ok((header, report))
    }
}

/// A worker's note that an attempt began, or that it failed and another one follows. May be lost: the result repeats it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The job.
    pub job: JobId,
    /// Which attempt.
    pub attempt: u32,
    /// When it began.
    #[serde(with = "time::serde::rfc3339")]
    pub started_at: OffsetDateTime,
    /// It failed, and the next one waits for its time.
    #[serde(default, skip_serializing_if = "is_default")]
    pub parked: bool,
}

fn frame(header: &impl Serialize, tail: &[u8]) -> Bytes {
    let mut message = serde_json::to_vec(header).unwrap_or_default();
    message.reserve_exact(tail.len() + 1);
    message.push(b'\n');
    message.extend_from_slice(tail);
    message.into()
}

fn unframe_versioned<H: DeserializeOwned>(message: &Bytes) -> Result<(H, Bytes), EnvelopeError> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let malformed = |error: serde_json::Error| EnvelopeError::Malformed(error.to_string());
    let end = message
        .iter()
        .position(|byte| *byte == b'\n')
        .ok_or_else(|| EnvelopeError::Malformed("no header line".into()))?;
    let header = &message[..end];
    let Version { v } = serde_json::from_slice(header).map_err(malformed)?;
    if v != VERSION {
        return Err(EnvelopeError::UnknownVersion(v));
    }
    Ok((serde_json::from_slice(header).map_err(malformed)?, message.slice(end + 1..)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::{Content, tests::ring};

    const JOB: &[u8] = include_bytes!("../golden/job-v1.bin");
    const RESULT: &[u8] = include_bytes!("../golden/result-v1.bin");
    const FAILED: &[u8] = include_bytes!("../golden/result-failed-v1.bin");

    fn job() -> JobId {
        "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f".parse().unwrap()
    }

    fn client() -> ClientId {
        "7d3f8a52-5c4e-4f0a-9b1d-2e6c8f4a0b37".parse().unwrap()
    }

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_770_000_000 + seconds).unwrap()
    }

    fn payload() -> Payload {
        let entry = |bytes, format| ImageEntry { bytes, format, title: None, taken: None, body_site: None };
        let images = vec![entry(3, Format::Jpeg), entry(2, Format::Png)];
        let subject = Some(Reference { display: Some("P-1".into()), ..Reference::default() });
        Payload {
            manifest: Manifest::new(images, subject, None),
            images: vec![b"abc".to_vec().into(), b"de".to_vec().into()],
        }
    }

    fn job_header() -> JobHeader {
        JobHeader { key: "k2".into(), ..JobHeader::new(job(), client(), Lane::Interactive, at(0), None) }
    }

    fn result_header() -> ResultHeader {
        ResultHeader::succeeded(job(), 2, at(1), at(2), 9_120, "k2".into())
    }

    fn failed_header() -> ResultHeader {
        let failure = Failure { code: Code::ImageUndecodable, image: Some(1) };
        ResultHeader::failed(job(), failure, 1, at(1), at(2))
    }

    #[test]
    fn the_golden_job_opens_and_is_what_this_build_writes() {
        let (header, tail) = JobHeader::decode(&Bytes::from_static(JOB)).unwrap();
        assert_eq!(header, job_header());
        assert_eq!(header.encode(&tail), JOB);
        let sealed = Sealed { key_id: header.key, bytes: tail };
        let plain = ring().open(Content::Payload(job()), &sealed).unwrap();
        assert_eq!(Payload::decode(plain).unwrap(), payload());
    }

    #[test]
    fn the_golden_results_open_and_are_what_this_build_writes() {
        let (header, report) = ResultHeader::decode(&Bytes::from_static(RESULT)).unwrap();
        assert_eq!(header, result_header());
        assert_eq!(ring().open(Content::Report(job()), &report.unwrap()).unwrap(), b"{}");
        let (header, report) = ResultHeader::decode(&Bytes::from_static(FAILED)).unwrap();
        assert_eq!((header.encode(&[]), header, report), (FAILED.into(), failed_header(), None));
    }

    #[test]
    fn a_model_at_fault_leaves_a_dead_letter_as_the_last_attempt_does() {
        let leaves = |code, attempts| Failure { code, image: None }.leaves_letter(attempts);
        assert!(leaves(Code::AnalysisFailed, 1) && leaves(Code::AttemptsExhausted, MAX_ATTEMPTS));
        assert!(!leaves(Code::ImageUndecodable, 1) && !leaves(Code::DeadlineExceeded, MAX_ATTEMPTS - 1));
    }

    #[test]
    fn a_requeued_job_counts_afresh_under_message_ids_of_its_own() {
        let header = JobHeader { attempt: 5, ..job_header() };
        let again = header.clone().requeued(1, at(600));
        assert_eq!((again.attempt, again.requeues, again.accepted_at), (1, 1, at(0)));
        assert_eq!(again.deadline - at(600), header.deadline - at(0));
        assert_ne!(again.message_id(5), header.message_id(5));
        assert_ne!(again.message_id(5), again.clone().requeued(2, at(600)).message_id(5));
        let (read, _) = JobHeader::decode(&again.encode(b"x")).unwrap();
        assert_eq!(read, again);
        let result = failed_header().after_requeues(1).of_model("derm7@2".parse().ok().as_ref());
        assert_eq!(ResultHeader::decode(&result.encode(&[])).unwrap().0, result);
    }

    #[test]
    fn a_message_of_any_version_names_its_job() {
        assert_eq!(job_of(JOB), Some(job()));
        let newer = String::from_utf8_lossy(FAILED).replace("\"v\":1", "\"v\":9,\"new\":[]");
        assert_eq!(job_of(newer.as_bytes()), Some(job()));
        for nameless in [&b""[..], b"{}\n", b"{\"job\":7}\n", b"no header"] {
            assert_eq!(job_of(nameless), None);
        }
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let newer = String::from_utf8_lossy(FAILED).replace("\"v\":1", "\"v\":2");
        let refused = ResultHeader::decode(&newer.into_bytes().into());
        assert_eq!(refused, Err(EnvelopeError::UnknownVersion(2)));
    }

    /// Old builds and new ones run side by side: what is new is left out when it says nothing, and let be by who does
    /// not know it.
    #[test]
    fn what_a_manifest_says_beyond_the_first_build_is_optional() {
        let plain = payload();
        let text = String::from_utf8_lossy(&plain.encode()).into_owned();
        assert!(["heat_maps", "language", "model"].iter().all(|name| !text.contains(name)), "{text}");
        let mut asking = payload();
        (asking.manifest.heat_maps, asking.manifest.language) = (5, Language::German);
        asking.manifest.model = "derm7@2".parse().ok();
        assert_eq!(Payload::decode(asking.encode()).unwrap(), asking);
        let newer =
            String::from_utf8_lossy(&asking.encode()).replace("\"de\"", "\"tlh\",\"more\":{\"x\":[]}");
        asking.manifest.language = Language::English;
        assert_eq!(Payload::decode(newer.into_bytes()).unwrap(), asking);
    }

    #[test]
    fn a_cut_or_padded_payload_is_refused() {
        let whole = payload().encode();
        for cut in 0..whole.len() {
            assert!(Payload::decode(whole[..cut].to_vec()).is_err(), "{cut}");
        }
        assert!(Payload::decode([whole, vec![0]].concat()).is_err());
    }

    #[test]
    fn debug_shows_no_image() {
        let shown = format!("{:?}", payload());
        assert!(shown.contains("ImageBytes(3 bytes") && !shown.contains("abc"), "{shown}");
    }
}
