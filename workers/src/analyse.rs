//! What an executor does with a job: decode every image, judge it, ask the engine, check its answer.

use std::time::{Duration, Instant};

use dermflow_schemas::{
    envelope::Payload,
    error::Code,
    limits::{DECODER_ATTEMPTS, MAX_HEAT_MAPS},
};

use crate::{
    decode::DecodeError,
    engine::{Answer, Engine, EngineError, Question},
    frame::Frame,
    heat::{self, HeatMap},
    model::{Model, Opinion, points},
    outline::Outline,
    quality::Quality,
};

/// What is known about one image after the analysis.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// Columns as displayed, in pixels.
    pub width: u32,
    /// Rows as displayed, in pixels.
    pub height: u32,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub sha256: String,
    /// SHA-1 of the file, in Base64.
    pub sha1: String,
    /// How good it is.
    pub quality: Quality,
    /// The probability that it shows skin, in hundredths of a per cent; absent when the model does not say.
    pub skin: Option<u32>,
    /// Whether it does.
    pub is_skin: bool,
    /// The probability that it was taken without a dermatoscope, in hundredths of a per cent; absent when the model does
    /// not say.
    pub clinical: Option<u32>,
    /// In the order of the model's classes; the sum is 1. They mean nothing unless the image is valid.
    pub probabilities: Vec<f64>,
    /// Where the lesion is; absent when there is none, or the model does not say.
    pub outline: Option<Outline>,
    /// As many as were asked for, of a valid image.
    pub heat_maps: Vec<HeatMap>,
}

impl Finding {
    /// Whether the image is analysed: it shows skin, and is good enough.
    pub fn is_valid(&self) -> bool {
        self.is_skin && self.quality.is_acceptable()
    }
}

/// The indices of a distribution by descending probability.
pub fn ranked(probabilities: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
    order
}

/// A finished analysis.
#[derive(Debug, Clone, PartialEq)]
pub struct Analysis {
    /// In the order of the images.
    pub findings: Vec<Finding>,
    /// Time in the model, all images together.
    pub in_model: Duration,
}

/// Why there is no analysis.
#[derive(Debug, thiserror::Error)]
pub enum AnalysisError {
    /// The image with this index, from 0, does not decode. Permanent, unless its decoder is to blame.
    #[error("image {0} does not decode: {1}")]
    Undecodable(usize, DecodeError),
    /// The model's answer is not one finite number per class and place. Permanent: models are deterministic.
    #[error("the model's answer is not one finite number per class and place")]
    Unusable,
    /// The engine failed. Transient.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Nobody wants the analysis any more.
    #[error("withdrawn")]
    Withdrawn,
}

impl AnalysisError {
    /// What to fail with when no further attempt does better than this one; `None` when none would.
    pub fn transient(&self, attempt: u32) -> Option<Code> {
        match self {
            Self::Undecodable(_, DecodeError::NotStarted(_)) | Self::Engine(_) => Some(Code::AnalysisFailed),
            Self::Undecodable(_, DecodeError::Died(_) | DecodeError::Slow) => {
                (attempt < DECODER_ATTEMPTS).then_some(Code::ImageUndecodable)
            }
            Self::Undecodable(..) | Self::Unusable | Self::Withdrawn => None,
        }
    }
}

/// Analyses every image of `payload`, unless it turns out to be `withdrawn` before one of them. Decoders have the time
/// `decoding` for all of them.
///
/// # Errors
/// See [`AnalysisError`].
pub fn analyse(
    engine: &mut dyn Engine,
    model: &Model,
    payload: &Payload,
    attempt: u32,
    mut decoding: Duration,
    withdrawn: &dyn Fn() -> bool,
) -> Result<Analysis, AnalysisError> {
    let mut analysis = Analysis { findings: Vec::new(), in_model: Duration::ZERO };
    for (index, (file, entry)) in payload.images.iter().zip(&payload.manifest.images).enumerate() {
        if withdrawn() {
            return Err(AnalysisError::Withdrawn);
        }
        let start = Instant::now();
        let frame = Frame::decode(file.as_slice(), entry.format, model.input(), start + decoding)
            .map_err(|error| AnalysisError::Undecodable(index, error))?;
        decoding = decoding.saturating_sub(start.elapsed());
        let quality = Quality::of(&frame);
        let sha256 = file.sha256();
        let start = Instant::now();
        let answer = engine.classify(Question { frame: &frame, digest: &sha256, attempt })?;
        analysis.in_model += start.elapsed();
        if !answer.is_finite() {
            return Err(AnalysisError::Unusable);
        }
        let Answer { logits, lesion, activation, modality } = answer;
        let Opinion { skin, conditions } = model.opinion(&logits).ok_or(AnalysisError::Unusable)?;
        let skin = skin.map(points);
        let Frame { width, height, .. } = frame;
        let mut finding = Finding {
            width,
            height,
            sha256,
            sha1: file.sha1_base64(),
            quality,
            skin,
            is_skin: skin.zip(model.domain).is_none_or(|(skin, threshold)| skin >= threshold),
            clinical: modality.map(|logit| points(1.0 / (1.0 + (-f64::from(logit)).exp()))),
            probabilities: conditions,
            outline: lesion.and_then(|map| Outline::of(&map, width, height)),
            heat_maps: Vec::new(),
        };
        if let Some(activation) = activation.filter(|_| finding.is_valid()) {
            let mut classes = ranked(&finding.probabilities);
            classes.truncate(payload.manifest.heat_maps.min(MAX_HEAT_MAPS) as usize);
            let maps = heat::render(model, &activation, &classes, width, height);
            finding.heat_maps = maps.ok_or(AnalysisError::Unusable)?;
        }
        analysis.findings.push(finding);
    }
    Ok(analysis)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decode::tests::jpeg,
        engine::{Runtime, factory},
        model::tests::simulated,
    };
    use dermflow_schemas::{
        envelope::{ImageEntry, Manifest},
        image::Format,
        limits::{DECODE_DEADLINE, MAX_ATTEMPTS},
    };
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn payload(files: &[Vec<u8>]) -> Payload {
        let entry = |file: &Vec<u8>| ImageEntry {
            bytes: file.len(),
            format: Format::Jpeg,
            title: None,
            taken: None,
            body_site: None,
        };
        Payload {
            manifest: Manifest::new(files.iter().map(entry).collect(), None, None),
            images: files.iter().map(|file| file.clone().into()).collect(),
        }
    }

    fn analysed(model: &Model, files: &[Vec<u8>], attempt: u32) -> Result<Analysis, AnalysisError> {
        let mut engine = factory(model, &Runtime::new("unused")).unwrap()().unwrap();
        analyse(&mut *engine, model, &payload(files), attempt, DECODE_DEADLINE, &|| false)
    }

    #[test]
    fn the_same_image_gets_the_same_answer_and_another_one_another() {
        let model = simulated(&[]);
        let (one, two) = (jpeg(96, 80, Some(6)), jpeg(98, 80, None));
        let analysis = analysed(&model, &[one.clone(), two, one], 1).unwrap();
        let [first, second, third] = &analysis.findings[..] else { panic!("three images") };
        assert_eq!(first, third);
        assert_ne!(first.probabilities, second.probabilities);
        assert_eq!((first.width, first.height), (80, 96));
        assert!((first.probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(analysis.in_model >= Duration::from_millis(3));
    }

    #[test]
    fn a_withdrawn_job_ends_before_its_next_image() {
        struct Counting<'a>(&'a AtomicUsize);
        impl Engine for Counting<'_> {
            fn classify(&mut self, _: Question<'_>) -> Result<Answer, EngineError> {
                self.0.fetch_add(1, Ordering::SeqCst);
                Ok(Answer { logits: vec![0.0; 3], lesion: None, activation: None, modality: None })
            }
        }
        let (model, image) = (simulated(&[]), jpeg(96, 80, None));
        let analysed = AtomicUsize::new(0);
        let mut engine = Counting(&analysed);
        let payload = payload(&[image.clone(), image.clone(), image]);
        let withdrawn = || analysed.load(Ordering::SeqCst) == 1;
        let ended = analyse(&mut engine, &model, &payload, 1, DECODE_DEADLINE, &withdrawn);
        assert!(matches!(ended, Err(AnalysisError::Withdrawn)));
        assert_eq!(analysed.into_inner(), 1);
    }

    #[test]
    fn a_broken_image_is_named() {
        let broken = b"\xff\xd8\xff\xe0 no image".to_vec();
        let error = analysed(&simulated(&[]), &[jpeg(96, 80, None), broken], 1);
        assert!(matches!(error, Err(AnalysisError::Undecodable(1, _))));
    }

    /// A file that does not decode never will; whoever has no decoder, or lost one, tries again.
    #[test]
    fn what_a_decoder_is_to_blame_for_is_tried_again() {
        let transient = |error, attempt| AnalysisError::Undecodable(0, error).transient(attempt);
        for lost in [|| DecodeError::Slow, || DecodeError::Died("signal: 9".into())] {
            assert_eq!(transient(lost(), 1), Some(Code::ImageUndecodable));
            assert_eq!(transient(lost(), DECODER_ATTEMPTS), None);
        }
        let no_decoder = DecodeError::NotStarted("out of memory".into());
        assert_eq!(transient(no_decoder, MAX_ATTEMPTS - 1), Some(Code::AnalysisFailed));
        assert_eq!(transient(DecodeError::CutShort, 1), None);
        const { assert!(DECODER_ATTEMPTS < MAX_ATTEMPTS) };
    }

    #[test]
    fn a_simulated_fault_ends_with_its_last_attempt() {
        let fault = "simulated = { latency_ms = 0, fault = 'nan', fault_attempts = 2 }";
        let model = simulated(&[("simulated = { latency_ms = 1 }", fault)]);
        let image = [jpeg(96, 80, None)];
        assert!(matches!(analysed(&model, &image, 2), Err(AnalysisError::Unusable)));
        assert!(analysed(&model, &image, 3).is_ok());
    }
}
