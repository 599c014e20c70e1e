//! `worker outlines`: the outline that a report would have of each image file, refused or not, so that what evaluation holds
//! against drawn masks is what the service says.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::Parser;

use crate::{
    engine::{self, EngineError, Question, Runtime},
    frame::Frame,
    model::{Model, ModelError},
    outline::Outline,
    pixels::{self, NoPixels},
};

/// Writes the outline of the lesion in image files to standard output, one a line, as well-known text in pixels of the image as
/// displayed; `POLYGON EMPTY` where the model sees none.
#[derive(Debug, Parser)]
pub struct Options {
    /// The model's folder.
    folder: PathBuf,
    /// The ONNX Runtime's library.
    #[arg(long, env = "ORT_DYLIB_PATH", default_value = "libonnxruntime.so")]
    ort_dylib: PathBuf,
    /// JPEG or PNG.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

/// Why a file has no line.
#[derive(Debug, thiserror::Error)]
pub enum NoOutlines {
    /// The folder is no model's.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The network cannot be asked.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// It does not say where the lesion is.
    #[error("the model has no map of the lesion")]
    NoMap,
    /// The service would refuse the file before the model.
    #[error(transparent)]
    File(#[from] NoPixels),
    /// Nobody takes the lines.
    #[error(transparent)]
    Output(#[from] io::Error),
}

/// Writes them.
///
/// # Errors
/// Of the model, or of the first file that has no line. Those of the files before it were written.
pub fn run(Options { folder, ort_dylib, files }: Options) -> Result<(), NoOutlines> {
    let model = Model::load(&folder, false)?;
    let mut engine = engine::factory(&model, &Runtime::new(ort_dylib))?()?;
    let mut out = io::stdout().lock();
    for file in files {
        let frame = Frame::of(&pixels::picture(&file)?, model.input());
        let answer = engine.classify(Question { frame: &frame, digest: "", attempt: 1 })?;
        let map = answer.lesion.ok_or(NoOutlines::NoMap)?;
        let outline = Outline::of(&map, frame.width, frame.height);
        writeln!(out, "{}", outline.map_or_else(|| "POLYGON EMPTY".into(), |outline| outline.wkt()))?;
    }
    Ok(())
}
