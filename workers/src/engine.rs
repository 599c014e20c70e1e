//! What turns a picture into logits: the ONNX Runtime, or a simulation of it.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use image::RgbImage;
use ort::{environment::Environment, session::Session, value::TensorRef};

use crate::{
    frame::Frame,
    model::{Fault, Input, Model, Network, Output, Simulated},
    outline::Map,
};

/// Why there is no engine, or no logits.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The library cannot be loaded, or is too old.
    #[error("the ONNX Runtime cannot be loaded: {0}")]
    Runtime(String),
    /// The executor has no decoder.
    #[error("the decoder cannot be started: {0}")]
    Decoder(String),
    /// The network cannot be loaded or run.
    #[error("the ONNX Runtime reports: {0}")]
    Network(String),
    /// The network gives something else than its description says.
    #[error("the model does not fit model.toml: {0}")]
    Misfit(String),
    /// The network says something else of a known picture than it must.
    #[error("the model does not say what golden.toml has: {0}")]
    Golden(String),
}

impl<R> From<ort::Error<R>> for EngineError {
    fn from(error: ort::Error<R>) -> Self {
        Self::Network(error.message().to_owned())
    }
}

/// One image on its way through an engine.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// The image, squashed to the model's [`input`](Model::input).
    pub frame: &'a Frame,
    /// SHA-256 of the file, in lower-case hexadecimal.
    pub digest: &'a str,
    /// Which attempt at the job, from 1.
    pub attempt: u32,
}

/// What comes out of the network, not yet checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// In the order of the model's classes.
    pub logits: Vec<f32>,
    /// Where the lesion is, if the model says so.
    pub lesion: Option<Map>,
    /// What each place of the frame says, if the model tells.
    pub activation: Option<Activation>,
    /// Above zero for a photograph without a dermatoscope, if the model says so.
    pub modality: Option<f32>,
}

impl Answer {
    /// Whether every number is one.
    pub fn is_finite(&self) -> bool {
        let lesion = self.lesion.iter().flat_map(|map| &map.logits);
        let activation = self.activation.iter().flat_map(|activation| &activation.logits);
        let all = self.logits.iter().chain(lesion).chain(activation).chain(&self.modality);
        all.into_iter().all(|value| value.is_finite())
    }
}

/// Logits of each place of the squashed frame; their mean are those of the image.
#[derive(Debug, Clone, PartialEq)]
pub struct Activation {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// Class by class, row by row.
    pub logits: Vec<f32>,
}

/// Computes answers; belongs to one thread.
pub trait Engine: Send {
    /// The answer to one image.
    ///
    /// # Errors
    /// When the engine fails; the same image may succeed elsewhere.
    fn classify(&mut self, question: Question<'_>) -> Result<Answer, EngineError>;
}

/// Makes an engine, once per executor and again after a panic.
pub type Factory = Arc<dyn Fn() -> Result<Box<dyn Engine>, EngineError> + Send + Sync>;

/// The ONNX Runtime, of which a process has one; loaded when the first model needs it.
#[derive(Debug)]
pub struct Runtime {
    library: PathBuf,
    environment: OnceLock<Environment>,
}

impl Runtime {
    /// The library in a file, by path or by a name that the system's loader finds.
    pub fn new(library: impl Into<PathBuf>) -> Self {
        Self { library: library.into(), environment: OnceLock::new() }
    }

    fn environment(&self) -> Result<Environment, EngineError> {
        if let Some(environment) = self.environment.get() {
            return Ok(environment.clone());
        }
        let load = ort::init_from(&self.library).map_err(|error| EngineError::Runtime(error.to_string()))?;
        let environment = load.with_name("dermflow").with_telemetry(false).build()?;
        Ok(self.environment.get_or_init(|| environment).clone())
    }
}

/// A factory for `model`, whose engines say what its golden file has.
///
/// # Errors
/// When the model needs the runtime and it cannot be loaded.
pub fn factory(model: &Model, runtime: &Runtime) -> Result<Factory, EngineError> {
    match model.network.clone() {
        Network::Onnx { file, input, output } => {
            let (environment, model) = (runtime.environment()?, model.clone());
            Ok(Arc::new(move || {
                let mut engine = OnnxEngine::new(&environment, &file, input.clone(), output.clone())?;
                engine.try_out(model.logits())?;
                if let Some(golden) = &model.golden {
                    golden.check(&model, &mut engine)?;
                }
                Ok(Box::new(engine))
            }))
        }
        Network::Simulated(simulated) => {
            let classes = model.logits();
            Ok(Arc::new(move || Ok(Box::new(SimulatedEngine { simulated: simulated.clone(), classes }))))
        }
    }
}

/// The ONNX Runtime on one thread.
struct OnnxEngine {
    session: Session,
    input: Input,
    output: Output,
    tensor: Vec<f32>,
}

impl OnnxEngine {
    fn new(
        environment: &Environment,
        file: &[u8],
        input: Input,
        output: Output,
    ) -> Result<Self, EngineError> {
        // More threads per session, or threads that spin while they wait, halve the throughput when cores
        // are shared.
        let session = Session::builder(environment)?
            .with_intra_threads(1)?
            .with_inter_threads(1)?
            .with_intra_op_spinning(false)?
            .with_inter_op_spinning(false)?
            .commit_from_memory(file)?;
        let names = |outlets: &[ort::value::Outlet]| -> Vec<String> {
            outlets.iter().map(|outlet| outlet.name().to_owned()).collect()
        };
        let (inputs, outputs) = (names(session.inputs()), names(session.outputs()));
        if inputs != [input.name.as_str()] {
            return Err(EngineError::Misfit(format!("its inputs are {inputs:?}, not [{:?}]", input.name)));
        }
        let Output { logits, lesion, activation, modality } = &output;
        for named in std::iter::once(logits).chain(lesion).chain(activation).chain(modality) {
            if !outputs.contains(named) {
                return Err(EngineError::Misfit(format!("its outputs are {outputs:?}, without {named:?}")));
            }
        }
        Ok(Self { session, input, output, tensor: Vec::new() })
    }

    /// Runs the network once, so that a wrong shape shows at start.
    fn try_out(&mut self, classes: usize) -> Result<(), EngineError> {
        let answer = self.answer(&RgbImage::new(self.input.width, self.input.height))?;
        let mapped = answer.activation.map(|map| map.logits.len() / (map.width * map.height));
        for found in mapped.into_iter().chain([answer.logits.len()]) {
            if found != classes {
                return Err(EngineError::Misfit(format!("{found} logits for {classes} classes")));
            }
        }
        Ok(())
    }

    fn answer(&mut self, squashed: &RgbImage) -> Result<Answer, EngineError> {
        fill(&mut self.tensor, squashed, &self.input);
        let shape = [1, 3, i64::from(self.input.height), i64::from(self.input.width)];
        let tensor = TensorRef::from_array_view((shape, self.tensor.as_slice()))?;
        let outputs = self.session.run(ort::inputs![self.input.name.as_str() => tensor])?;
        let tensor = |name: &str| -> Result<(Vec<i64>, Vec<f32>), EngineError> {
            let output = outputs.get(name).ok_or_else(|| EngineError::Misfit(format!("no {name:?}")))?;
            let (shape, values) = output.try_extract_tensor::<f32>()?;
            Ok((shape.to_vec(), values.to_vec()))
        };
        let (_, logits) = tensor(&self.output.logits)?;
        let optional = |name: &Option<String>| name.as_deref().map(tensor).transpose();
        Ok(Answer {
            logits,
            lesion: optional(&self.output.lesion)?.map(lesion).transpose()?,
            activation: optional(&self.output.activation)?.map(activation).transpose()?,
            modality: optional(&self.output.modality)?.map(modality).transpose()?,
        })
    }
}

impl Engine for OnnxEngine {
    fn classify(&mut self, question: Question<'_>) -> Result<Answer, EngineError> {
        self.answer(&question.frame.squashed)
    }
}

/// The map of one image: 1 x 1 x rows x columns.
fn lesion((shape, logits): (Vec<i64>, Vec<f32>)) -> Result<Map, EngineError> {
    match shape[..] {
        [1, 1, rows, columns] if rows >= 2 && columns >= 2 => {
            Ok(Map { width: usize::try_from(columns).unwrap_or(usize::MAX), logits })
        }
        _ => Err(EngineError::Misfit(format!(
            "the map of the lesion is {shape:?}, not 1 x 1 x rows x columns"
        ))),
    }
}

/// What each place of one image says: 1 x classes x rows x columns.
fn activation((shape, logits): (Vec<i64>, Vec<f32>)) -> Result<Activation, EngineError> {
    match shape[..] {
        [1, _, rows, columns] if rows >= 1 && columns >= 1 => {
            Ok(Activation { width: columns as usize, height: rows as usize, logits })
        }
        _ => {
            Err(EngineError::Misfit(format!("the activation is {shape:?}, not 1 x classes x rows x columns")))
        }
    }
}

/// How one image was taken: a single number.
fn modality((shape, logits): (Vec<i64>, Vec<f32>)) -> Result<f32, EngineError> {
    match logits[..] {
        [logit] => Ok(logit),
        _ => Err(EngineError::Misfit(format!("the modality is {shape:?}, not 1 x 1"))),
    }
}

/// Fills `tensor` with planes of red, green and blue, normalised.
fn fill(tensor: &mut Vec<f32>, squashed: &RgbImage, input: &Input) {
    tensor.clear();
    for channel in 0..3 {
        let (mean, deviation) = (input.mean[channel], input.deviation[channel]);
        let normalise = |pixel: &image::Rgb<u8>| (f32::from(pixel.0[channel]) / 255.0 - mean) / deviation;
        tensor.extend(squashed.pixels().map(normalise));
    }
}

/// The simulation: a pause, then logits that follow from the image's digest alone.
struct SimulatedEngine {
    simulated: Simulated,
    classes: usize,
}

impl Engine for SimulatedEngine {
    fn classify(&mut self, question: Question<'_>) -> Result<Answer, EngineError> {
        thread::sleep(Duration::from_millis(self.simulated.latency_ms));
        let Simulated { fault_attempts, fault_image, .. } = &self.simulated;
        let faulty = fault_attempts.is_none_or(|last| question.attempt <= last)
            && fault_image.as_ref().is_none_or(|image| question.digest.starts_with(image));
        let logits = match self.simulated.fault.filter(|_| faulty) {
            None => simulated_logits(question.digest, self.classes),
            Some(Fault::Nan) => vec![f32::NAN; self.classes],
            Some(Fault::Panic) => panic!("the simulated model panics"),
            Some(Fault::Abort) => std::process::abort(),
            Some(Fault::Hang) => loop {
                thread::park();
            },
        };
        Ok(Answer { logits, lesion: None, activation: None, modality: None })
    }
}

/// Logits between 0 and 4, from a digest of the image's digest and the class.
fn simulated_logits(image: &str, classes: usize) -> Vec<f32> {
    let logit = |class: usize| {
        let digest =
            aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, format!("{image}:{class}").as_bytes());
        f32::from(digest.as_ref()[0]) / 64.0
    };
    (0..classes).map(logit).collect()
}
