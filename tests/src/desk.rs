//! `dermflow submit` as people use it: a folder with images, and the program that is killed in the middle.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use dermflow_local::stack::programs;
use serde_json::Value;
use tokio::process::{Child, Command};
use uuid::Uuid;

use crate::{lab::Lab, wait::eventually};

/// A folder with images, a password file, and room for results. Dropping it removes the folder.
#[derive(Debug)]
pub struct Desk {
    folder: PathBuf,
    user: String,
    /// The origin that is submitted to.
    pub url: String,
    /// The CA to trust.
    pub ca: PathBuf,
}

impl Desk {
    /// For the client `user`: so many files in `images`, which are the named `photographs` in turn.
    ///
    /// # Errors
    /// When there is no such client, or a file cannot be written.
    pub fn new(lab: &Lab, user: &str, photographs: &[(&str, Vec<u8>)], files: usize) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("dermflow-submit-{}", Uuid::new_v4().simple()));
        fs::create_dir_all(folder.join("images/deep"))?;
        fs::write(folder.join("password"), format!("{}\n", lab.password(user)?))?;
        let desk = Self { folder, user: user.into(), url: lab.url(0), ca: lab.ca() };
        for (number, (_, photograph)) in photographs.iter().enumerate() {
            fs::write(desk.path(&number.to_string()), photograph)?;
        }
        for number in 0..files {
            let kind = number % photographs.len();
            let inside = if number % 3 == 0 { "images/deep" } else { "images" };
            let image = desk.path(&format!("{inside}/{number:04}-{}", photographs[kind].0));
            // Links: thousands of files take the room of a few.
            fs::hard_link(desk.path(&kind.to_string()), image)?;
        }
        Ok(desk)
    }

    /// A file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// `dermflow` with a command and the access to the lab, in the folder.
    ///
    /// # Errors
    /// When the program is not built.
    pub fn dermflow(&self, args: &[&str]) -> Result<Command> {
        let mut command = Command::new(programs()?.join("dermflow"));
        command.args(args).args(["--url", &self.url, "--user", &self.user]);
        command.arg("--ca").arg(&self.ca).arg("--password-file").arg(self.path("password"));
        command.current_dir(&self.folder).kill_on_drop(true).stdin(Stdio::null());
        Ok(command)
    }

    /// Submits `images`, and waits for the end.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn submit(&self, args: &[&str]) -> Result<Output> {
        Ok(self.dermflow(&[&["submit", "images"], args].concat())?.output().await?)
    }

    /// The same without waiting.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, args: &[&str]) -> Result<Child> {
        let mut command = self.dermflow(&[&["submit", "images"], args].concat())?;
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    }

    /// Waits until `file` has about this many lines, and kills the process (SIGKILL).
    ///
    /// # Errors
    /// When it has not `within` this time, or the process ends by itself.
    pub async fn kill_at(&self, mut child: Child, file: &str, lines: usize, within: Duration) -> Result<()> {
        let mut growing = Growing { path: self.path(file), read: 0, lines: 0 };
        let ready = async || {
            let ended = child.try_wait().is_ok_and(|status| status.is_some());
            (growing.look() >= lines || ended).then_some(())
        };
        eventually(&format!("{file} has {lines} lines"), within, ready).await?;
        child.kill().await.context("it had ended before it was killed")?;
        let status = child.wait().await?;
        ensure!(status.code().is_none(), "it had ended before it was killed: {status}");
        Ok(())
    }

    /// Whole lines of a file; none when it is not there.
    pub fn lines(&self, name: &str) -> usize {
        Growing { path: self.path(name), read: 0, lines: 0 }.look()
    }

    /// The result file by name.
    ///
    /// # Errors
    /// When it is none, or a name comes twice.
    pub fn results(&self, name: &str) -> Result<BTreeMap<String, Value>> {
        let mut results = BTreeMap::new();
        for line in fs::read_to_string(self.path(name))?.lines() {
            let line: Value = serde_json::from_str(line)?;
            let custom_id = line["custom_id"].as_str().context("no custom_id")?.to_owned();
            ensure!(results.insert(custom_id.clone(), line).is_none(), "{custom_id} twice");
        }
        Ok(results)
    }

    /// Every image has its report in the file, and there is nothing else: the job of each.
    ///
    /// # Errors
    /// When it is not so.
    pub fn complete(&self, out: &str, files: usize) -> Result<BTreeMap<String, String>> {
        let results = self.results(out)?;
        ensure!(results.len() == files, "{} lines for {files} files", results.len());
        let mut jobs = BTreeMap::new();
        for (custom_id, line) in results {
            ensure!(self.path(&custom_id).is_file(), "{custom_id} is no file");
            ensure!(line["report"]["resourceType"] == "DiagnosticReport", "{line}");
            ensure!(line["report"]["id"] == line["job"], "a report of another job: {line}");
            jobs.insert(custom_id, line["job"].as_str().context("no job")?.to_owned());
        }
        Ok(jobs)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A file whose lines are counted while it grows; what was read is not read again.
struct Growing {
    path: PathBuf,
    read: u64,
    lines: usize,
}

impl Growing {
    /// Whole lines until now; none when the file is not there.
    fn look(&mut self) -> usize {
        if let Ok(more) = read_from(&self.path, self.read) {
            self.read += more.len() as u64;
            self.lines += more.split(|byte| *byte == b'\n').count() - 1;
        }
        self.lines
    }
}

fn read_from(path: &Path, at: u64) -> std::io::Result<Vec<u8>> {
    let (mut file, mut more) = (fs::File::open(path)?, Vec::new());
    file.seek(SeekFrom::Start(at))?;
    file.read_to_end(&mut more)?;
    Ok(more)
}
