//! What a submission must remember: beside the result file, one JSON object a line, only ever added to.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ndjson::AppendFile;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "kebab-case")]
enum Entry {
    /// The first line, on disk before anything is sent.
    Begin(Begin),
    /// The server has named the batch; on disk before the first image is sent.
    Batch { id: Uuid },
    /// The server has accepted a file. Losing this line costs that the file is offered again.
    Accepted { custom_id: String, job: Option<String> },
}

/// What a submission is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Begin {
    /// The `Idempotency-Key`: whatever happens, it leads to the same batch.
    pub(crate) key: Uuid,
    /// How many files there are.
    pub(crate) files: usize,
    /// The digest of their names and sizes.
    pub(crate) digest: String,
    /// The subject given with them.
    pub(crate) subject: Option<String>,
}

/// What an earlier run left.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) begin: Option<Begin>,
    pub(crate) batch: Option<Uuid>,
    /// In the order of acceptance.
    pub(crate) accepted: Vec<String>,
}

/// The open journal; one process at a time has it.
#[derive(Debug)]
pub(crate) struct Journal {
    file: AppendFile,
    path: PathBuf,
}

impl Journal {
    /// The journal of a result file.
    pub(crate) fn path_of(out: &Path) -> PathBuf {
        let mut name = out.as_os_str().to_owned();
        name.push(".journal");
        name.into()
    }

    /// Opens or makes the journal of `out`.
    pub(crate) fn open(out: &Path) -> io::Result<(Self, Recorded)> {
        let path = Self::path_of(out);
        let mut recorded = Recorded::default();
        let mut number = 0;
        let file = AppendFile::open(&path, |line| {
            number += 1;
            let damaged = || {
                let what = format!("{}, line {number}: no journal of dermflow submit", path.display());
                io::Error::new(io::ErrorKind::InvalidData, what)
            };
            match serde_json::from_slice(line).map_err(|_| damaged())? {
                Entry::Begin(begin) => recorded.begin = Some(begin),
                Entry::Batch { id } => recorded.batch = Some(id),
                Entry::Accepted { custom_id, .. } => recorded.accepted.push(custom_id),
            }
            Ok(())
        })?;
        Ok((Self { file, path }, recorded))
    }

    /// Writes the first line, and returns when it and the file's name are on disk.
    pub(crate) fn begin(&self, begin: &Begin) -> io::Result<()> {
        self.write(&Entry::Begin(begin.clone()))?;
        self.file.sync()?;
        let folder = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// Notes the batch, and returns when that is on disk.
    pub(crate) fn batch(&self, id: Uuid) -> io::Result<()> {
        self.write(&Entry::Batch { id })?;
        self.file.sync()
    }

    /// Notes that a file was accepted.
    pub(crate) fn accepted(&self, custom_id: &str, job: Option<String>) -> io::Result<()> {
        self.write(&Entry::Accepted { custom_id: custom_id.into(), job })
    }

    /// The file, to be brought to disk.
    pub(crate) fn file(&self) -> &AppendFile {
        &self.file
    }

    fn write(&self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        self.file.append(&line)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;

    use super::*;

    /// A folder of one test, removed with it.
    pub(crate) struct Folder(PathBuf);

    impl Folder {
        pub(crate) fn new() -> Self {
            let path = std::env::temp_dir().join(format!("dermflow-cli-{}", Uuid::new_v4().simple()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        pub(crate) fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_journal_cut_at_any_byte_is_read_up_to_its_last_whole_line() {
        let folder = Folder::new();
        let out = folder.path("out");
        let begin = Begin { key: Uuid::new_v4(), files: 2, digest: "d".into(), subject: Some("é".into()) };
        let batch = Uuid::new_v4();
        let (journal, recorded) = Journal::open(&out).unwrap();
        assert_eq!(recorded, Recorded::default());
        journal.begin(&begin).unwrap();
        journal.batch(batch).unwrap();
        journal.accepted("a\"\\é", Some("job".into())).unwrap();
        journal.accepted("b", None).unwrap();
        drop(journal);

        let path = Journal::path_of(&out);
        let whole = fs::read(&path).unwrap();
        for length in 0..=whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let lines = whole[..length].split(|byte| *byte == b'\n').count() - 1;
            let (journal, recorded) = Journal::open(&out).unwrap();
            assert_eq!(recorded.begin, (lines >= 1).then(|| begin.clone()), "cut at {length}");
            assert_eq!(recorded.batch, (lines >= 2).then_some(batch), "cut at {length}");
            assert_eq!(recorded.accepted, ["a\"\\é", "b"][..lines.saturating_sub(2)], "cut at {length}");
            journal.accepted("after", None).unwrap();
            drop(journal);
            let (_, recorded) = Journal::open(&out).unwrap();
            assert_eq!(recorded.accepted.last().map(String::as_str), Some("after"), "cut at {length}");
        }
    }

    #[test]
    fn something_else_is_not_taken_for_a_journal() {
        let folder = Folder::new();
        let out = folder.path("out");
        fs::write(Journal::path_of(&out), "{\"entry\":\"other\"}\n").unwrap();
        assert!(Journal::open(&out).unwrap_err().to_string().contains("line 1: no journal"));
    }
}
