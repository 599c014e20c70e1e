//! A model as a folder: `model.toml`, which says what the network means, and `model.onnx`.
//!
//! Whatever is wrong with the folder is one clear error when it is loaded, not a surprise in a report.
//!
//! ```toml
//! name = "derm7"                  # with `version`, names the model in every report
//! version = "2026.02"
//! title = "What it tells apart"
//! licence = "SPDX expression of the weights"
//! [input]                         # one float32 tensor, 1 x 3 x height x width, RGB
//! name = "image"
//! width = 160
//! height = 160
//! mean = [0.0, 0.0, 0.0]          # subtracted from values between 0 and 1
//! deviation = [1.0, 1.0, 1.0]     # and divided by
//! [output]
//! logits = "logits"               # 1 x the number of classes, in the order below
//! lesion = "outline"              # optional, 1 x 1 x rows x columns: logits of where the lesion is in the frame
//! [[class]]
//! code = "mel"
//! display = "Melanoma"
//! icd11 = { code = "2C30", display = "Melanoma of skin" }   # optional
//! malignant = true
//! prior = 0.5                     # optional, for all or none: ln(prior) is subtracted from the logit
//! [malignancy]                    # optional
//! threshold = 0.2                 # from here on the sum of the malignant classes reads high
//! [[metric]]                      # a figure of the model, a fraction with its 95 % interval
//! code = "top1-sensitivity"
//! display = "Top-1 sensitivity on the locked test set"
//! value = 0.7
//! low = 0.6
//! high = 0.8
//! ```
//!
//! A folder with `[simulated]` in place of `[input]`, `[output]` and `model.onnx` describes no model at all
//! ([`Simulated`]); it loads only where that is allowed.

use std::{fs, io, path::Path, sync::Arc};

use aws_lc_rs::digest::{SHA256, digest};
use dermflow_schemas::image::hex;
use serde::Deserialize;

/// The largest input side, in pixels: more is a typing error.
const MAX_INPUT_SIDE: u32 = 4_096;

/// What is wrong with a model folder.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("{0}: {1}")]
    File(String, io::Error),
    /// `model.toml` is not TOML of the expected form.
    #[error("model.toml: {0}")]
    Toml(#[from] toml::de::Error),
    /// `model.toml` contradicts itself.
    #[error("model.toml: {0}")]
    Description(String),
    /// The folder describes the simulated engine, and that was not asked for.
    #[error("model.toml describes a simulated model, which needs --allow-simulated")]
    SimulatedRefused,
}

/// What the network takes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// The tensor's name.
    pub name: String,
    /// Columns, in pixels.
    pub width: u32,
    /// Rows, in pixels.
    pub height: u32,
    /// Per channel, in the space where values run from 0 to 1.
    pub mean: [f32; 3],
    /// Per channel, in the same space.
    pub deviation: [f32; 3],
}

/// What the network gives.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// The name of the tensor of logits.
    pub logits: String,
    /// The name of the tensor that says where the lesion is.
    pub lesion: Option<String>,
}

/// A code of ICD-11 MMS.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Icd11 {
    /// The code.
    pub code: String,
    /// ICD-11's words for it.
    pub display: String,
}

/// A class that the model tells apart.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Class {
    /// Lower-case letters, digits and hyphens.
    pub code: String,
    /// In words.
    pub display: String,
    /// In ICD-11, when there is one code for the class.
    pub icd11: Option<Icd11>,
    /// Whether it counts towards malignancy.
    pub malignant: bool,
    /// Its share in training, between 0 and 1.
    pub prior: Option<f64>,
}

/// When the sum of the malignant classes reads high.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Malignancy {
    /// Between 0 and 1.
    pub threshold: f64,
}

/// A performance figure of the model, as a fraction.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// Lower-case letters, digits and hyphens.
    pub code: String,
    /// In words.
    pub display: String,
    /// Between 0 and 1.
    pub value: f64,
    /// The lower end of the 95 % interval.
    pub low: f64,
    /// The upper end of the 95 % interval.
    pub high: f64,
}

/// How a simulated model misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// The executor's thread panics.
    Panic,
    /// The executor never returns.
    Hang,
    /// The logits are not numbers.
    Nan,
    /// The process aborts.
    Abort,
}

/// The engine for tests and benchmarks: no network, but a pause and logits that follow from the image's digest.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Simulated {
    /// Time per image, in milliseconds.
    pub latency_ms: u64,
    /// What goes wrong.
    pub fault: Option<Fault>,
    /// The fault happens on attempts up to this one; on every attempt when absent.
    pub fault_attempts: Option<u32>,
    /// The fault happens with images whose SHA-256 begins like this; with every image when absent.
    pub fault_image: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    name: String,
    version: String,
    title: String,
    licence: String,
    input: Option<Input>,
    output: Option<Output>,
    simulated: Option<Simulated>,
    class: Vec<Class>,
    malignancy: Option<Malignancy>,
    #[serde(default)]
    metric: Vec<Metric>,
}

/// What computes the logits.
#[derive(Clone)]
pub enum Network {
    /// An ONNX file.
    Onnx {
        /// The file.
        file: Arc<[u8]>,
        /// What it takes.
        input: Input,
        /// What it gives.
        output: Output,
    },
    /// Nothing: see [`Simulated`].
    Simulated(Simulated),
}

/// A loaded model folder.
pub struct Model {
    /// With `version`, the model's name in reports.
    pub name: String,
    /// Its version.
    pub version: String,
    /// What it tells apart.
    pub title: String,
    /// The licence of the weights.
    pub licence: String,
    /// In the order of the logits; at least two.
    pub classes: Vec<Class>,
    /// Absent when the model says nothing about malignancy.
    pub malignancy: Option<Malignancy>,
    /// Performance figures.
    pub metrics: Vec<Metric>,
    /// SHA-256 of `model.onnx`, or of `model.toml` when simulated, in lower-case hexadecimal.
    pub digest: String,
    /// What computes the logits.
    pub network: Network,
}

impl Model {
    /// Reads a model folder; `allow_simulated` lets one without a network pass.
    ///
    /// # Errors
    /// See [`ModelError`]. Whether the network fits the description shows only when an engine runs it.
    pub fn load(folder: &Path, allow_simulated: bool) -> Result<Self, ModelError> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read(&path).map_err(|error| ModelError::File(path.display().to_string(), error))
        };
        let text = String::from_utf8(read("model.toml")?)
            .map_err(|_| ModelError::Description("not UTF-8".to_owned()))?;
        let document: Document = toml::from_str(&text)?;
        check(&document).map_err(ModelError::Description)?;
        let (digest, network) = match (document.input, document.output, document.simulated) {
            (Some(input), Some(output), None) => {
                let file = read("model.onnx")?;
                (sha256(&file), Network::Onnx { file: file.into(), input, output })
            }
            (None, None, Some(_)) if !allow_simulated => return Err(ModelError::SimulatedRefused),
            (None, None, Some(simulated)) => (sha256(text.as_bytes()), Network::Simulated(simulated)),
            _ => {
                let either = "either [input] and [output], or [simulated] alone, must be there";
                return Err(ModelError::Description(either.to_owned()));
            }
        };
        Ok(Self {
            name: document.name,
            version: document.version,
            title: document.title,
            licence: document.licence,
            malignancy: document.malignancy.filter(|_| document.class.iter().any(|class| class.malignant)),
            classes: document.class,
            metrics: document.metric,
            digest,
            network,
        })
    }

    /// Whether the model says where the lesion is.
    pub fn outlines(&self) -> bool {
        matches!(&self.network, Network::Onnx { output: Output { lesion: Some(_), .. }, .. })
    }

    /// Whether reports must say that no model looked at the images.
    pub fn is_simulated(&self) -> bool {
        matches!(self.network, Network::Simulated(_))
    }

    /// Softmax of the logits less the logarithm of the priors, in the order of the classes; the sum is 1.
    /// `None` when there are more or fewer logits than classes, or one is not a finite number.
    pub fn probabilities(&self, logits: &[f32]) -> Option<Vec<f64>> {
        if logits.len() != self.classes.len() || logits.iter().any(|logit| !logit.is_finite()) {
            return None;
        }
        let adjust = |(logit, class): (&f32, &Class)| f64::from(*logit) - class.prior.unwrap_or(1.0).ln();
        let logits: Vec<f64> = logits.iter().zip(&self.classes).map(adjust).collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits.iter().map(|logit| (logit - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        Some(weights.into_iter().map(|weight| weight / sum).collect())
    }
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

fn check(document: &Document) -> Result<(), String> {
    for (field, value) in [
        ("name", &document.name),
        ("version", &document.version),
        ("title", &document.title),
        ("licence", &document.licence),
    ] {
        if value.trim().is_empty() {
            return Err(format!("{field} is empty"));
        }
    }
    if let Some(input) = &document.input {
        check_input(input)?;
    }
    check_classes(&document.class)?;
    if let Some(Malignancy { threshold }) = document.malignancy
        && !(threshold > 0.0 && threshold < 1.0)
    {
        return Err(format!("the malignancy threshold {threshold} is not between 0 and 1"));
    }
    check_codes("metric", document.metric.iter().map(|metric| (&metric.code, &metric.display)))?;
    let ordered = |m: &&Metric| 0.0 <= m.low && m.low <= m.value && m.value <= m.high && m.high <= 1.0;
    match document.metric.iter().find(|metric| !ordered(metric)) {
        Some(metric) => Err(format!("metric {}: not 0 <= low <= value <= high <= 1", metric.code)),
        None => Ok(()),
    }
}

fn check_input(input: &Input) -> Result<(), String> {
    let side = 1..=MAX_INPUT_SIDE;
    if !side.contains(&input.width) || !side.contains(&input.height) {
        return Err(format!("the input's width and height must be between 1 and {MAX_INPUT_SIDE}"));
    }
    let usable = |deviation: &f32| deviation.is_finite() && *deviation > 0.0;
    if !input.mean.iter().all(|mean| mean.is_finite()) || !input.deviation.iter().all(usable) {
        return Err("the input's mean must be finite and its deviation above zero".to_owned());
    }
    Ok(())
}

fn check_classes(classes: &[Class]) -> Result<(), String> {
    if classes.len() < 2 {
        return Err("at least two classes are needed".to_owned());
    }
    check_codes("class", classes.iter().map(|class| (&class.code, &class.display)))?;
    let priors: Vec<f64> = classes.iter().filter_map(|class| class.prior).collect();
    if !priors.is_empty() && priors.len() != classes.len() {
        return Err(format!("{} of {} classes have a prior: all or none", priors.len(), classes.len()));
    }
    match priors.iter().find(|prior| !(**prior > 0.0 && **prior <= 1.0)) {
        Some(prior) => Err(format!("the prior {prior} is not above 0 and at most 1")),
        None => Ok(()),
    }
}

/// Codes become FHIR codes, so they are plain and occur once.
fn check_codes<'a>(
    kind: &str,
    entries: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let mut seen = std::collections::HashSet::new();
    for (code, display) in entries {
        if code.is_empty() || !code.bytes().all(plain) {
            return Err(format!("{kind} {code:?}: a code has lower-case letters, digits and hyphens"));
        }
        if display.trim().is_empty() {
            return Err(format!("{kind} {code}: display is empty"));
        }
        if !seen.insert(code) {
            return Err(format!("{kind} {code} occurs twice"));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const SIMULATED: &str = r#"
        name = "pretend"
        version = "1"
        title = "Nothing"
        licence = "Apache-2.0"
        class = [
            { code = "mel", display = "Melanoma", icd11 = { code = "2C30", display = "Melanoma of skin" }, malignant = true, prior = 0.25 },
            { code = "bcc", display = "Basal <cell> carcinoma", malignant = true, prior = 0.25 },
            { code = "nv", display = "Naevus", malignant = false, prior = 0.5 },
        ]
        malignancy = { threshold = 0.165 }
        metric = [{ code = "auc", display = "AUC", value = 0.9, low = 0.85, high = 0.95 }]
        simulated = { latency_ms = 1 }
    "#;

    /// Loads a folder with this `model.toml` and, if given, this `model.onnx`.
    pub(crate) fn load(toml: &str, onnx: Option<&[u8]>, allow_simulated: bool) -> Result<Model, ModelError> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique =
            format!("dermflow-model-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(unique);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("model.toml"), toml).unwrap();
        if let Some(onnx) = onnx {
            fs::write(folder.join("model.onnx"), onnx).unwrap();
        }
        let model = Model::load(&folder, allow_simulated);
        fs::remove_dir_all(folder).unwrap();
        model
    }

    pub(crate) fn simulated(changed: &[(&str, &str)]) -> Model {
        let toml = changed.iter().fold(SIMULATED.to_owned(), |toml, (old, new)| {
            assert!(toml.contains(old), "{old}");
            toml.replace(old, new)
        });
        load(&toml, None, true).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn every_fault_of_a_folder_is_named() {
        let input = "input = { name = 'i', width = 8, height = 8, mean = [0, 0, 0], deviation = [1, 1, 1] }\n\
                     output = { logits = 'l' }";
        let onnx = SIMULATED.replace("simulated = { latency_ms = 1 }", input);
        assert!(load(&onnx, Some(b"network"), false).is_ok());
        let refused = |toml: &str, word: &str| {
            let error = load(toml, None, true).err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(word), "{word:?} not in {error:?}");
        };
        refused(&onnx, "model.onnx: No such file");
        refused(&SIMULATED.replace("title =", "titel ="), "unknown field `titel`");
        refused(&SIMULATED.replace("\"Nothing\"", "\" \""), "title is empty");
        refused(&SIMULATED.replace("malignant = false, prior = 0.5", "malignant = false"), "2 of 3 classes");
        refused(&SIMULATED.replace("prior = 0.5", "prior = 0.0"), "the prior 0 ");
        refused(&SIMULATED.replace("0.165", "1.0"), "threshold 1 is not between");
        refused(&SIMULATED.replace("\"bcc\"", "\"mel\""), "class mel occurs twice");
        refused(&SIMULATED.replace("\"bcc\"", "\"b c\""), "lower-case letters");
        refused(&SIMULATED.replace("low = 0.85", "low = 0.92"), "metric auc");
        refused(&format!("{SIMULATED}\n{input}"), "either [input] and [output]");
        refused(&onnx.replace("[1, 1, 1]", "[1, 0, 1]"), "deviation above zero");
        refused(&onnx.replace("width = 8", "width = 0"), "between 1 and 4096");
        let nowhere = Model::load(Path::new("/nowhere"), false).err().map(|error| error.to_string());
        assert!(nowhere.unwrap_or_default().starts_with("/nowhere/model.toml: No such file"));
    }

    #[test]
    fn a_simulated_model_is_refused_unless_asked_for() {
        assert!(matches!(load(SIMULATED, None, false), Err(ModelError::SimulatedRefused)));
        assert!(load(SIMULATED, None, true).unwrap().is_simulated());
    }

    #[test]
    fn probabilities_allow_for_priors_and_sum_to_one() {
        let model = simulated(&[]);
        let even = model.probabilities(&[0.25f32.ln(), 0.25f32.ln(), 0.5f32.ln()]).unwrap();
        assert!(even.iter().all(|p| (p - 1.0 / 3.0).abs() < 1e-6), "{even:?}");
        let huge = model.probabilities(&[1e30, -1e30, 0.0]).unwrap();
        assert_eq!(huge, [1.0, 0.0, 0.0]);
        assert_eq!(model.probabilities(&[0.0, 0.0]), None);
        assert_eq!(model.probabilities(&[0.0, f32::NAN, 0.0]), None);
        assert_eq!(model.probabilities(&[0.0, f32::INFINITY, 0.0]), None);
    }

    #[test]
    fn without_malignant_classes_nothing_is_said_about_malignancy() {
        assert_eq!(simulated(&[("malignant = true", "malignant = false")]).malignancy, None);
    }
}
