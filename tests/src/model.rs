//! Model folders made of others: another version, other thresholds, other weights.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::digest::{SHA256, digest};
use dermflow_local::{
    servers::{Given, Servers},
    stack::{programs, repo},
};
use dermflow_schemas::image::hex;
use tokio::process::Command;

/// A copy of a model folder, removed when it is dropped.
#[derive(Debug)]
pub struct Folder {
    folder: PathBuf,
}

impl Folder {
    /// Copies what a worker reads of `original`, a folder of this repository.
    ///
    /// # Errors
    /// When a file cannot be copied.
    pub fn of(original: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("dermflow-model-{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&folder)?;
        for name in ["model.toml", "model.onnx", "golden.toml"] {
            fs::copy(repo().join(original).join(name), folder.join(name)).context(name)?;
        }
        Ok(Self { folder })
    }

    /// A simulated model of this version that takes `latency_ms`; `more` is of its `[simulated]`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn simulated(version: &str, latency_ms: u64, more: &str) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("dermflow-model-{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&folder)?;
        let class = |code| format!("[[class]]\ncode = \"{code}\"\ndisplay = \"Class {code}\"\n");
        let toml = format!(
            "name = \"simulated\"\nversion = \"{version}\"\ntitle = \"Simulated model\"\nlicence = \"Apache-2.0\"\n\
             [simulated]\nlatency_ms = {latency_ms}\n{more}\n{}{}",
            class("mel"),
            class("nv")
        );
        fs::write(folder.join("model.toml"), toml)?;
        Ok(Self { folder })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.folder
    }

    /// What `--model` takes.
    pub fn weighing(&self, weight: u32) -> String {
        format!("{}={weight}", self.folder.display())
    }

    /// A file of it.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, name: &str) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join(name))?)
    }

    /// Replaces a text that a file has once.
    ///
    /// # Errors
    /// When it does not.
    pub fn replace(&self, name: &str, old: &str, new: &str) -> Result<()> {
        let text = self.read(name)?;
        ensure!(text.matches(old).count() == 1, "{old:?} is not once in {name}");
        Ok(fs::write(self.folder.join(name), text.replace(old, new))?)
    }

    /// The network.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn network(&self) -> Result<Vec<u8>> {
        Ok(fs::read(self.folder.join("model.onnx"))?)
    }

    /// Puts another network in its place.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_network(&self, file: &[u8]) -> Result<()> {
        Ok(fs::write(self.folder.join("model.onnx"), file)?)
    }

    /// Has the golden file be of the network that is there, but for what it says.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn adapt_digest(&self, old: &[u8]) -> Result<()> {
        let sha256 = |file: &[u8]| hex(digest(&SHA256, file).as_ref());
        self.replace("golden.toml", &sha256(old), &sha256(&self.network()?))
    }

    /// `worker golden`.
    ///
    /// # Errors
    /// When it fails; the error is what it says.
    pub async fn write_golden(&self) -> Result<()> {
        let servers = Servers::obtain(repo(), &Given::default(), |_| ()).await?;
        let mut worker = Command::new(programs()?.join("worker"));
        worker.arg("golden").arg(&self.folder).arg("--ort-dylib").arg(&servers.onnxruntime);
        let output = worker.output().await?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// An initializer of an ONNX file, in single precision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initializer {
    /// Its name.
    pub name: String,
    /// Where in the file its values are.
    pub values: Range<usize>,
}

impl Initializer {
    /// Multiplies every value.
    ///
    /// # Errors
    /// When it is of another file.
    pub fn scale(&self, file: &mut [u8], factor: f32) -> Result<()> {
        for value in file.get_mut(self.values.clone()).context("outside")?.chunks_exact_mut(4) {
            let number = f32::from_le_bytes(value.try_into()?);
            value.copy_from_slice(&(number * factor).to_le_bytes());
        }
        Ok(())
    }
}

/// The initializers of an ONNX file: `ModelProto.graph.initializer` (7, 5), of each `data_type` (2), `name` (8) and `raw_data`
/// (9).
///
/// # Errors
/// When it is no Protocol Buffers message of this form.
pub fn initializers(file: &[u8]) -> Result<Vec<Initializer>> {
    const FLOAT: usize = 1;
    let mut found = Vec::new();
    let graphs = fields(file, 0..file.len())?.into_iter().filter(|(number, _)| *number == 7);
    for (_, graph) in graphs {
        for (_, tensor) in fields(file, graph)?.into_iter().filter(|(number, _)| *number == 5) {
            let parts = fields(file, tensor)?;
            let part =
                |wanted| parts.iter().find(|(number, _)| *number == wanted).map(|(_, range)| range.clone());
            let kind = part(2).context("no type")?;
            ensure!(varint(file, &mut kind.start.clone())? == FLOAT, "not in single precision");
            let name = String::from_utf8(file[part(8).context("no name")?].to_vec())?;
            found.push(Initializer { name, values: part(9).context("no values")? });
        }
    }
    Ok(found)
}

/// The fields of a message with where they are; of a number where it begins.
fn fields(file: &[u8], message: Range<usize>) -> Result<Vec<(usize, Range<usize>)>> {
    let mut found = Vec::new();
    let mut at = message.start;
    while at < message.end {
        let key = varint(file, &mut at)?;
        let begin = at;
        let range = match key & 7 {
            0 => {
                varint(file, &mut at)?;
                begin..at
            }
            1 => begin..begin + 8,
            2 => {
                let length = varint(file, &mut at)?;
                at..at + length
            }
            5 => begin..begin + 4,
            other => anyhow::bail!("wire type {other}"),
        };
        at = range.end;
        ensure!(at <= message.end, "a field is cut short");
        found.push((key >> 3, range));
    }
    Ok(found)
}

fn varint(file: &[u8], at: &mut usize) -> Result<usize> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let byte = *file.get(*at).context("cut short")?;
        *at += 1;
        value |= usize::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    anyhow::bail!("a number of more than 63 bits")
}
