//! A model as a folder: `model.toml`, which says what the network means, `model.onnx` and `golden.toml`.
//!
//! Whatever is wrong with the folder is one clear error when it is loaded, not a surprise in a report.
//!
//! ```toml
//! name = "derm7"                  # with `version`, names the model in requests and reports: letters, digits and . _ + -
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
//! activation = "cam"              # optional, 1 x the number of classes x rows x columns, whose mean the logits are
//! modality = "modality"           # optional, 1 x 1: the logit of a photograph without a dermatoscope
//! [[class]]
//! code = "mel"
//! display = "Melanoma"
//! names = { es = "melanoma", de = "Melanom", fr = "mélanome" }   # optional, as within a sentence
//! icd11 = { code = "2C30", display = "Melanoma of skin" }        # optional
//! prior = 0.5                     # optional, for all or none: ln(prior) is subtracted from the logit
//! [domain]                        # optional
//! class = "other"                 # what is not skin; the probabilities of the other classes are given that it is
//! threshold = 0.8                 # below it, by the probability of skin, an image is refused
//! [modality]                      # optional, a reservation
//! note = "Learned from few photographs"
//! [[indicator]]                   # optional; the narrative and the conclusion tell the first, and those to refer for
//! id = "malignancy"               # of the Observation, before the number of the image
//! code = "malignancy-suspicion"
//! display = "Suspicion of malignancy"
//! names = { de = "Verdacht auf Malignität" }                     # optional
//! classes = ["mel"]               # whose probabilities are summed; absent: the probability of skin
//! threshold = 0.2                 # from here on it reads high; absent for the probability of skin: that of [domain] holds
//! referral = true                 # optional, with classes: above the threshold a referral is suggested
//! note = "What must be known"     # optional
//! [[metric]]                      # a figure of the model, a fraction with its 95 % interval
//! code = "top1-sensitivity"
//! display = "Top-1 sensitivity on the locked test set"
//! value = 0.7
//! low = 0.6
//! high = 0.8
//! ```
//!
//! `golden.toml` beside it holds what the network says of pictures that everybody can draw ([`Golden`]); a network that says
//! something else is not served.
//!
//! A folder with `[simulated]` in place of `[input]`, `[output]` and `model.onnx` describes no model at all
//! ([`Simulated`]); it loads only where that is allowed.

mod check;

use std::{collections::BTreeMap, fs, io, path::Path, sync::Arc};

use aws_lc_rs::digest::{SHA256, digest};
use dermflow_schemas::{fhir::Language, image::hex, model::ModelRef};
use serde::{Deserialize, de::DeserializeOwned};

pub(crate) use self::check::MAX_INPUT_SIDE;
use self::check::check;
use crate::{golden::Golden, language::within};

/// What is wrong with a model folder.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("{0}: {1}")]
    File(String, io::Error),
    /// A file is not TOML of the expected form.
    #[error("{0}: {1}")]
    Toml(&'static str, toml::de::Error),
    /// `model.toml` contradicts itself.
    #[error("model.toml: {0}")]
    Description(String),
    /// `golden.toml` is of another network, or of other pictures.
    #[error("golden.toml: {0}: once the network is the right one, `worker golden FOLDER` writes the file")]
    Golden(String),
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
    /// The name of the tensor whose mean over the places the logits are.
    pub activation: Option<String>,
    /// The name of the tensor that says whether there was no dermatoscope.
    pub modality: Option<String>,
}

/// What something is called in other languages than English, by their tags.
pub type Names = BTreeMap<String, String>;

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
    /// The same within a sentence.
    #[serde(default)]
    pub names: Names,
    /// In ICD-11, when there is one code for the class.
    pub icd11: Option<Icd11>,
    /// Its share in training, between 0 and 1.
    pub prior: Option<f64>,
}

/// What is no skin.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Domain {
    class: String,
    threshold: f64,
}

/// What must be known of the modality.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Modality {
    note: String,
}

/// A number that a clinician may act on: the sum of the probabilities of some classes, or that of skin.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Indicator {
    /// Lower-case letters, digits and hyphens; what the id in a report begins with.
    pub id: String,
    /// The same alphabet.
    pub code: String,
    /// In words.
    pub display: String,
    /// The same in other languages.
    #[serde(default)]
    pub names: Names,
    /// Codes of classes; empty for the probability of skin.
    #[serde(default)]
    pub classes: Vec<String>,
    /// Between 0 and 1; from here on it reads high. Absent without classes: that of the domain holds.
    pub threshold: Option<f64>,
    /// Whether to refer is what the threshold is about.
    #[serde(default)]
    pub referral: bool,
    /// What must be known.
    pub note: Option<String>,
}

/// A fraction in hundredths of a per cent.
pub fn points(fraction: f64) -> u32 {
    (fraction * 10_000.0).round() as u32
}

/// What something is called in `language`, within a sentence.
pub fn name_in<'a>(language: Language, display: &'a str, names: &'a Names) -> std::borrow::Cow<'a, str> {
    names.get(language.tag()).map_or_else(|| within(display).into(), |name| name.as_str().into())
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
    domain: Option<Domain>,
    modality: Option<Modality>,
    #[serde(default)]
    indicator: Vec<Indicator>,
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
#[derive(Clone)]
pub struct Model {
    /// With `version`, the model's name in reports.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Both, as requests name them.
    pub id: ModelRef,
    /// What it tells apart.
    pub title: String,
    /// The licence of the weights.
    pub licence: String,
    /// The conditions, in the order of the logits, without what is no skin; at least two.
    pub classes: Vec<Class>,
    /// In the order of reports.
    pub indicators: Vec<Indicator>,
    /// From how much probability of skin on an image is analysed, in hundredths of a per cent; absent when the model
    /// knows nothing but skin.
    pub domain: Option<u32>,
    /// What must be known of the modality.
    pub modality_note: Option<String>,
    /// Performance figures.
    pub metrics: Vec<Metric>,
    /// SHA-256 of `model.onnx`, or of `model.toml` when simulated, in lower-case hexadecimal.
    pub digest: String,
    /// What computes the logits.
    pub network: Network,
    /// What it must say of known pictures; absent when simulated, or not asked for.
    pub golden: Option<Golden>,
    /// The logarithm of each logit's prior.
    log_priors: Vec<f64>,
    /// Which logit is of what is no skin.
    not_skin: Option<usize>,
}

/// What the logits of an image, or of a place in it, say.
#[derive(Debug, Clone, PartialEq)]
pub struct Opinion {
    /// The probability that it shows skin; absent when the model knows nothing else.
    pub skin: Option<f64>,
    /// Of the conditions, if it does; the sum is 1.
    pub conditions: Vec<f64>,
}

impl Model {
    /// Reads a model folder; `allow_simulated` lets one without a network pass.
    ///
    /// # Errors
    /// See [`ModelError`]. Whether the network fits the description, and says what it must, shows only when an engine
    /// runs it.
    pub fn load(folder: &Path, allow_simulated: bool) -> Result<Self, ModelError> {
        let model = Self::without_golden(folder, allow_simulated)?;
        let golden = (!model.is_simulated()).then(|| Golden::load(folder, &model.digest)).transpose()?;
        Ok(Self { golden, ..model })
    }

    /// The same, whatever the network says.
    pub(crate) fn without_golden(folder: &Path, allow_simulated: bool) -> Result<Self, ModelError> {
        let (document, text): (Document, String) = read_toml(folder, "model.toml")?;
        check(&document).map_err(ModelError::Description)?;
        let id = ModelRef::exact(&document.name, &document.version)
            .map_err(|rule| ModelError::Description(format!("name and version: {rule}")))?;
        let (digest, network) = match (document.input, document.output, document.simulated) {
            (Some(input), Some(output), None) => {
                let file = read(&folder.join("model.onnx"))?;
                (sha256(&file), Network::Onnx { file: file.into(), input, output })
            }
            (None, None, Some(_)) if !allow_simulated => return Err(ModelError::SimulatedRefused),
            (None, None, Some(simulated)) => (sha256(text.as_bytes()), Network::Simulated(simulated)),
            _ => {
                let either = "either [input] and [output], or [simulated] alone, must be there";
                return Err(ModelError::Description(either.to_owned()));
            }
        };
        let log_priors = document.class.iter().map(|class| class.prior.unwrap_or(1.0).ln()).collect();
        let mut classes = document.class;
        let foreign = document.domain.as_ref().map(|domain| domain.class.as_str());
        let not_skin = classes.iter().position(|class| Some(class.code.as_str()) == foreign);
        if let Some(index) = not_skin {
            classes.remove(index);
        }
        Ok(Self {
            name: document.name,
            version: document.version,
            id,
            title: document.title,
            licence: document.licence,
            classes,
            indicators: document.indicator,
            domain: document.domain.map(|domain| points(domain.threshold)),
            modality_note: document.modality.map(|modality| modality.note),
            metrics: document.metric,
            digest,
            network,
            golden: None,
            log_priors,
            not_skin,
        })
    }

    /// How many logits the network gives.
    pub fn logits(&self) -> usize {
        self.log_priors.len()
    }

    /// What the network gives beside the logits.
    fn output(&self) -> Option<&Output> {
        match &self.network {
            Network::Onnx { output, .. } => Some(output),
            Network::Simulated(_) => None,
        }
    }

    /// Whether the model says where the lesion is.
    pub fn outlines(&self) -> bool {
        self.output().is_some_and(|output| output.lesion.is_some())
    }

    /// Whether the model says what speaks for a class in which part of an image.
    pub fn maps_heat(&self) -> bool {
        self.output().is_some_and(|output| output.activation.is_some())
    }

    /// Columns and rows that images are squashed to.
    pub fn input(&self) -> (u32, u32) {
        match &self.network {
            Network::Onnx { input, .. } => (input.width, input.height),
            Network::Simulated(_) => (1, 1),
        }
    }

    /// From where on an indicator reads high, in hundredths of a per cent.
    pub fn threshold(&self, indicator: &Indicator) -> u32 {
        // An indicator without a threshold of its own is not loaded without a domain.
        indicator.threshold.map(points).or(self.domain).unwrap_or(10_000)
    }

    /// Whether reports must say that no model looked at the images.
    pub fn is_simulated(&self) -> bool {
        matches!(self.network, Network::Simulated(_))
    }

    /// Softmax of the logits less the logarithm of the priors. `None` when there are more or fewer logits than
    /// classes, or one is not a finite number.
    pub fn opinion(&self, logits: &[f32]) -> Option<Opinion> {
        if logits.len() != self.logits() || logits.iter().any(|logit| !logit.is_finite()) {
            return None;
        }
        let adjust = |(logit, log_prior): (&f32, &f64)| f64::from(*logit) - log_prior;
        let mut logits: Vec<f64> = logits.iter().zip(&self.log_priors).map(adjust).collect();
        let skin = self.not_skin.map(|index| {
            let not_skin = softmax(&logits)[index];
            logits.remove(index);
            1.0 - not_skin
        });
        Some(Opinion { skin, conditions: softmax(&logits) })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ModelError> {
    fs::read(path).map_err(|error| ModelError::File(path.display().to_string(), error))
}

/// A file of the folder, and its text.
pub(crate) fn read_toml<T: DeserializeOwned>(
    folder: &Path,
    name: &'static str,
) -> Result<(T, String), ModelError> {
    let text = String::from_utf8(read(&folder.join(name))?)
        .map_err(|_| ModelError::Description(format!("{name} is not UTF-8")))?;
    Ok((toml::from_str(&text).map_err(|error| ModelError::Toml(name, error))?, text))
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

#[cfg(test)]
pub(crate) mod tests {
    use dermflow_schemas::fhir::LANGUAGES;

    use super::*;

    pub(crate) const SIMULATED: &str = r#"
        name = "pretend"
        version = "1"
        title = "Nothing"
        licence = "Apache-2.0"
        class = [
            { code = "mel", display = "Melanoma", icd11 = { code = "2C30", display = "Melanoma of skin" }, names = { de = "Melanom" }, prior = 0.25 },
            { code = "bcc", display = "Basal <cell> carcinoma", prior = 0.25 },
            { code = "nv", display = "Naevus", prior = 0.5 },
        ]
        indicator = [
            { id = "malignancy", code = "malignancy-suspicion", display = "Suspicion of malignancy", classes = ["mel", "bcc"], threshold = 0.165, referral = true },
            { id = "pigmented", code = "pigmented-lesion", display = "Pigmented lesion", classes = ["nv"], threshold = 0.5 },
        ]
        metric = [{ code = "auc", display = "AUC", value = 0.9, low = 0.85, high = 0.95 }]
        simulated = { latency_ms = 1 }
    "#;

    /// A `golden.toml` of these bytes.
    fn golden(onnx: &[u8]) -> String {
        let pictures =
            "[[picture]]\nlogits = [1.0, 2.0, 3.0]\nprobabilities = []\n".repeat(crate::golden::PICTURES);
        format!("sha256 = \"{}\"\ntolerance = 0.01\n{pictures}", sha256(onnx))
    }

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
            fs::write(folder.join("golden.toml"), golden(onnx)).unwrap();
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

    /// The same with a fourth class, for what is no skin.
    pub(crate) fn with_domain(changed: &[(&str, &str)]) -> Model {
        let nv = "display = \"Naevus\", prior = 0.5 },";
        let other = format!("{nv} {{ code = \"other\", display = \"Other\", prior = 0.25 }},");
        let domain = "simulated = { latency_ms = 1 }\n domain = { class = \"other\", threshold = 0.8 }";
        let all = [&[(nv, other.as_str()), ("simulated = { latency_ms = 1 }", domain)], changed].concat();
        simulated(&all)
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
        refused(&SIMULATED.replace("version = \"", "version = \"a/"), "name and version: a name, or");
        refused(&SIMULATED.replace("\"Naevus\", prior = 0.5", "\"Naevus\""), "2 of 3 classes");
        refused(&SIMULATED.replace("prior = 0.5", "prior = 0.0"), "the prior 0 ");
        refused(&SIMULATED.replace("0.165", "1.0"), "malignancy threshold 1 is not between");
        refused(&SIMULATED.replace("code = \"bcc\"", "code = \"mel\""), "class mel occurs twice");
        refused(&SIMULATED.replace("code = \"bcc\"", "code = \"b c\""), "lower-case letters");
        refused(&SIMULATED.replace("[\"nv\"]", "[\"vasc\"]"), "pigmented: there is no condition \"vasc\"");
        refused(&SIMULATED.replace("[\"nv\"]", "[\"nv\", \"nv\"]"), "pigmented: a class occurs twice");
        refused(&SIMULATED.replace("[\"nv\"]", "[]"), "pigmented: without classes");
        refused(&SIMULATED.replace("\"pigmented\"", "\"extent\""), "extent: the id is taken");
        refused(
            &SIMULATED.replace("\"pigmented-lesion\"", "\"image-quality\""),
            "code image-quality is taken",
        );
        refused(&SIMULATED.replace("\"nv\"", &format!("\"{}\"", "n".repeat(41))), "at most 40 characters");
        refused(&format!("{SIMULATED}\nmodality = {{ note = \"Few\" }}"), "[modality] is about an output");
        refused(&SIMULATED.replace("names = { de =", "names = { tlh ="), "no language \"tlh\"");
        refused(&SIMULATED.replace(", threshold = 0.5", ""), "pigmented: either classes and a threshold");
        let domain =
            |class: &str| format!("{SIMULATED}\ndomain = {{ class = \"{class}\", threshold = 0.8 }}");
        refused(&domain("other"), "domain: there is no class \"other\"");
        refused(&domain("nv"), "pigmented: there is no condition \"nv\"");
        let skin = domain("nv").replace("classes = [\"nv\"], threshold = 0.5", "referral = true");
        refused(&skin, "pigmented: without classes every image");
        refused(&SIMULATED.replace("low = 0.85", "low = 0.92"), "metric auc");
        refused(&format!("{SIMULATED}\n{input}"), "either [input] and [output]");
        refused(&onnx.replace("[1, 1, 1]", "[1, 0, 1]"), "deviation above zero");
        refused(&onnx.replace("width = 8", "width = 0"), "between 1 and 1024");
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
        let conditions = |logits: &[f32]| model.opinion(logits).map(|opinion| opinion.conditions);
        let even = conditions(&[0.25f32.ln(), 0.25f32.ln(), 0.5f32.ln()]).unwrap();
        assert!(even.iter().all(|p| (p - 1.0 / 3.0).abs() < 1e-6), "{even:?}");
        assert_eq!(conditions(&[1e30, -1e30, 0.0]).unwrap(), [1.0, 0.0, 0.0]);
        assert_eq!(model.opinion(&[0.0, 0.0]), None);
        assert_eq!(model.opinion(&[0.0, f32::NAN, 0.0]), None);
        assert_eq!(model.opinion(&[0.0, f32::INFINITY, 0.0]), None);
    }

    /// What is no skin is no condition, however probable it is.
    #[test]
    fn the_conditions_are_those_of_skin() {
        let model = with_domain(&[]);
        assert_eq!((model.classes.len(), model.logits(), model.domain), (3, 4, Some(8_000)));
        let logits = |other: f32| [0.25f32.ln(), 0.25f32.ln(), 0.5f32.ln(), other];
        let half = model.opinion(&logits(0.75f32.ln())).unwrap();
        assert!((half.skin.unwrap() - 0.5).abs() < 1e-6, "{half:?}");
        for opinion in [half, model.opinion(&logits(1e30)).unwrap()] {
            assert!(opinion.conditions.iter().all(|p| (p - 1.0 / 3.0).abs() < 1e-6), "{opinion:?}");
        }
    }

    /// Of the models of this repository, whatever a report may tell has a name in every language that a report may be in.
    #[test]
    fn no_report_of_a_bundled_model_falls_back_to_english() {
        let folders: Vec<_> = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/models"))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(folders.len() > 1, "{folders:?}");
        for folder in folders {
            let model = Model::load(&folder.path(), false).unwrap();
            let classes = model.classes.iter().map(|class| (&class.code, &class.names));
            let indicators = model.indicators.iter().map(|indicator| (&indicator.id, &indicator.names));
            for (what, names) in classes.chain(indicators) {
                for language in LANGUAGES.into_iter().filter(|language| *language != Language::English) {
                    let name = names.get(language.tag());
                    assert!(
                        name.is_some_and(|name| !name.is_empty()),
                        "{}: {what} in {language:?}",
                        model.id
                    );
                }
            }
        }
    }

    #[test]
    fn a_name_stands_within_a_sentence() {
        let model = simulated(&[]);
        let name = |language, n: usize| name_in(language, &model.classes[n].display, &model.classes[n].names);
        assert_eq!(name(Language::German, 0), "Melanom");
        assert_eq!(name(Language::French, 0), "melanoma");
        assert_eq!(name(Language::English, 1), "basal <cell> carcinoma");
    }
}
