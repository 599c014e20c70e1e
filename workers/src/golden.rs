//! What a model says of pictures that everybody can draw: `golden.toml`, written where its numbers are known to be right,
//! and held against what the network says wherever it is loaded.
//!
//! So weights that were damaged, a runtime that computes something else, and an input, a prior or an output of
//! `model.toml` that is not the network's own are found before the first job. The pictures ([`picture`]) go the way of an
//! image from after its decoder: they are turned, squashed, normalised.

use std::{fs, io, path::Path};

use dermflow_schemas::model::ModelRef;
use image::{Rgb, RgbImage, metadata::Orientation};
use serde::{Deserialize, Serialize};

use crate::{
    decode::Picture,
    engine::{self, Answer, Engine, EngineError, Question, Runtime},
    frame::Frame,
    model::{Model, ModelError, read_toml},
};

const FILE: &str = "golden.toml";
/// Pictures in a file: a wide one, one that lies on its side, and one smaller than most inputs.
pub const PICTURES: usize = SIZES.len();
const SIZES: [(u32, u32); 3] = [(240, 180), (200, 150), (64, 64)];
/// Values that are kept of a map, evenly from its first one on.
const SAMPLES: usize = 16;
/// How far a value may be off, or how much of itself when it is above 1: several times what processors of different
/// kinds make of the same network in single precision.
pub const TOLERANCE: f64 = 0.005;

/// Why there is no golden file.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// The folder is no model's.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The network cannot be asked.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A number is none.
    #[error(transparent)]
    Toml(#[from] toml::ser::Error),
    /// The file cannot be written.
    #[error("golden.toml: {0}")]
    File(#[from] io::Error),
}

/// What a network must say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    /// SHA-256 of `model.onnx`, in lower-case hexadecimal.
    sha256: String,
    /// See [`TOLERANCE`].
    tolerance: f64,
    /// Of each picture.
    picture: Vec<Said>,
}

/// What a network says of a picture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    /// As the network gives them.
    logits: Vec<f64>,
    /// That of skin, if the model knows anything else, and those of the conditions.
    probabilities: Vec<f64>,
    /// Some values of the map of the lesion.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    lesion: Vec<f64>,
    /// Some values of what each place says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    activation: Vec<f64>,
    /// The logit of a photograph without a dermatoscope.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    modality: Vec<f64>,
}

impl Golden {
    /// Reads the file of a folder, whose network has this digest.
    pub(crate) fn load(folder: &Path, sha256: &str) -> Result<Self, ModelError> {
        let (golden, _): (Self, String) = read_toml(folder, FILE)?;
        let wrong = |what: String| Err(ModelError::Golden(what));
        if golden.sha256 != sha256 {
            return wrong(format!("model.onnx is {sha256}, not {}", golden.sha256));
        }
        if golden.picture.len() != PICTURES {
            return wrong(format!("{} pictures, not {PICTURES}", golden.picture.len()));
        }
        if !(golden.tolerance > 0.0 && golden.tolerance < 1.0) {
            return wrong(format!("the tolerance {} is not between 0 and 1", golden.tolerance));
        }
        Ok(golden)
    }

    /// Asks the network.
    ///
    /// # Errors
    /// When it fails, or does not say what a model says.
    fn record(model: &Model, engine: &mut dyn Engine, tolerance: f64) -> Result<Self, EngineError> {
        let picture = (0..PICTURES).map(|n| said(model, engine, n)).collect::<Result<_, _>>()?;
        Ok(Self { sha256: model.digest.clone(), tolerance, picture })
    }

    /// Asks the network, and holds its answers against these.
    ///
    /// # Errors
    /// [`EngineError::Golden`] where they differ, or what the network fails with.
    pub fn check(&self, model: &Model, engine: &mut dyn Engine) -> Result<(), EngineError> {
        for (n, expected) in self.picture.iter().enumerate() {
            let found = said(model, engine, n)?;
            for ((what, found), (_, expected)) in found.parts().into_iter().zip(expected.parts()) {
                self.compare(found, expected)
                    .map_err(|why| EngineError::Golden(format!("picture {n}, {what}: {why}")))?;
            }
        }
        Ok(())
    }

    fn compare(&self, found: &[f64], expected: &[f64]) -> Result<(), String> {
        if found.len() != expected.len() {
            return Err(format!("{} values, not {}", found.len(), expected.len()));
        }
        let far = |(found, expected): &(&f64, &f64)| {
            let off = (**found - **expected).abs();
            off.is_nan() || off > self.tolerance * expected.abs().max(1.0)
        };
        match found.iter().zip(expected).find(far) {
            Some((found, expected)) => Err(format!("{found:.4}, not {expected:.4}")),
            None => Ok(()),
        }
    }

    /// Asks the network of a folder, and writes the file there.
    ///
    /// # Errors
    /// Whatever is wrong with the folder, the runtime, or the network.
    pub fn write(folder: &Path, runtime: &Runtime, tolerance: f64) -> Result<(), GoldenError> {
        let model = Model::without_golden(folder, false)?;
        let mut engine = engine::factory(&model, runtime)?()?;
        let text = Self::record(&model, &mut *engine, tolerance)?.to_toml(&model.id)?;
        Ok(fs::write(folder.join(FILE), text)?)
    }

    fn to_toml(&self, model: &ModelRef) -> Result<String, toml::ser::Error> {
        let what = format!(
            "# What {model} says of the pictures of workers/src/golden.rs: written by `worker golden`."
        );
        Ok(format!("{what}\n{}", toml::to_string(self)?))
    }
}

impl Said {
    fn parts(&self) -> [(&'static str, &[f64]); 5] {
        [
            ("logits", &self.logits),
            ("probabilities", &self.probabilities),
            ("lesion", &self.lesion),
            ("activation", &self.activation),
            ("modality", &self.modality),
        ]
    }
}

fn said(model: &Model, engine: &mut dyn Engine, n: usize) -> Result<Said, EngineError> {
    let frame = Frame::of(&picture(n), model.input());
    let answer = engine.classify(Question { frame: &frame, digest: "", attempt: 1 })?;
    let opinion = model.opinion(&answer.logits).filter(|_| answer.is_finite());
    let opinion = opinion.ok_or_else(|| EngineError::Golden(format!("picture {n}: not finite numbers")))?;
    let Answer { logits, lesion, activation, modality } = answer;
    let samples = |values: Option<Vec<f32>>| {
        let values = values.unwrap_or_default();
        values.iter().step_by(values.len().div_ceil(SAMPLES).max(1)).map(|value| f64::from(*value)).collect()
    };
    Ok(Said {
        logits: logits.into_iter().map(f64::from).collect(),
        probabilities: opinion.skin.into_iter().chain(opinion.conditions).collect(),
        lesion: samples(lesion.map(|map| map.logits)),
        activation: samples(activation.map(|activation| activation.logits)),
        modality: modality.into_iter().map(f64::from).collect(),
    })
}

/// The picture number `n`: a round spot with a soft edge and noise of 4 x 4 pixels on plain skin, in whole numbers, so that
/// it is the same everywhere.
pub fn picture(n: usize) -> Picture {
    const SKIN: [i32; 3] = [224, 172, 150];
    const SPOTS: [[i32; 3]; 3] = [[90, 50, 40], [150, 60, 60], [60, 40, 70]];
    let (width, height) = SIZES[n % PICTURES];
    let (centre_x, centre_y) = (width as i32 * 9 / 20, height as i32 * 11 / 20);
    let radius = (width.min(height) * 2 / 5) as i32;
    let pixels = RgbImage::from_fn(width, height, |x, y| {
        let (from_x, from_y) = (x as i32 - centre_x, y as i32 - centre_y);
        let inside = (radius * radius - from_x * from_x - from_y * from_y).max(0);
        // In 256ths: full within seven tenths of the radius.
        let share = (inside * 512 / (radius * radius)).min(256);
        let channel = |c: usize| {
            let noise = (noise(n as u32, x / 4, y / 4, c as u32) & 31) as i32 - 16;
            (SKIN[c] - (SKIN[c] - SPOTS[n % PICTURES][c]) * share / 256 + noise).clamp(0, 255) as u8
        };
        Rgb([channel(0), channel(1), channel(2)])
    });
    let orientation = if n == 1 { Orientation::Rotate90 } else { Orientation::NoTransforms };
    Picture::new(pixels, orientation)
}

/// A number that looks like chance, of these four (the finaliser of `MurmurHash3`).
fn noise(n: u32, x: u32, y: u32, channel: u32) -> u32 {
    let mut hash = n.wrapping_mul(0x9e37_79b9) ^ (x << 20) ^ (y << 8) ^ channel;
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
    hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
    hash ^ (hash >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::simulated;

    /// Says the same of every picture.
    struct Fixed([f32; 3]);

    impl Engine for Fixed {
        fn classify(&mut self, _: Question<'_>) -> Result<Answer, EngineError> {
            Ok(Answer { logits: self.0.to_vec(), lesion: None, activation: None, modality: Some(0.5) })
        }
    }

    #[test]
    fn what_is_said_differently_is_refused() {
        let model = simulated(&[]);
        let golden = Golden::record(&model, &mut Fixed([1.0, 2.0, 30.0]), TOLERANCE).unwrap();
        let read: Golden = toml::from_str(&golden.to_toml(&model.id).unwrap()).unwrap();
        assert_eq!(read, golden);
        let check = |logits| read.check(&model, &mut Fixed(logits)).map_err(|error| error.to_string());
        assert_eq!(check([1.0, 2.004, 30.1]), Ok(()));
        let refused = check([1.0, 2.0, 30.2]).unwrap_err();
        assert!(refused.contains("picture 0, logits: 30.2000, not 30.0000"), "{refused}");
        assert!(check([1.0, 2.02, 30.0]).is_err() && check([1.0, f32::NAN, 30.0]).is_err());
        // What the description makes of the same logits.
        let other = simulated(&[("carcinoma\", prior = 0.25", "carcinoma\", prior = 1e-13")]);
        let refused = read.check(&other, &mut Fixed([1.0, 2.0, 30.0])).unwrap_err().to_string();
        assert!(refused.contains("probabilities"), "{refused}");
    }

    #[test]
    fn the_pictures_are_what_they_were() {
        let sums = (0..PICTURES).map(|n| {
            let stored = picture(n);
            stored
                .pixels()
                .iter()
                .fold(0_u32, |sum, value| sum.wrapping_mul(31).wrapping_add(u32::from(*value)))
        });
        assert_eq!(sums.collect::<Vec<_>>(), [198_526_558, 195_182_304, 1_963_703_028]);
        let sizes = (0..PICTURES).map(|n| (picture(n).width(), picture(n).height()));
        assert_eq!(sizes.collect::<Vec<_>>(), [(240, 180), (150, 200), (64, 64)]);
    }
}
