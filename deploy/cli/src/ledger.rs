//! Journal and result file together: which files are still to be sent, and which have their line.

use std::{collections::HashMap, io, path::Path, sync::Arc};

use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    Failure,
    inputs::Inputs,
    journal::{Begin, Journal},
    ndjson::AppendFile,
    progress::Counters,
};

/// Where a file stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The server has not accepted it, as far as we know.
    Open,
    /// The server has a job for it.
    Accepted,
    /// It has its line in the result file.
    Ended,
}

/// The two lists that the server keeps of a batch, each with a cursor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum List {
    Results,
    Errors,
}

/// The members of a result line that matter here.
#[derive(Debug, Deserialize)]
struct Line {
    cursor: Option<u64>,
    custom_id: Option<String>,
    job: Option<IgnoredAny>,
    /// Whether there is such a member; it is null when the server can no longer open the report.
    #[serde(default, deserialize_with = "is_there")]
    report: bool,
    error: Option<IgnoredAny>,
}

impl Line {
    fn list(&self) -> List {
        if self.report { List::Results } else { List::Errors }
    }
}

fn is_there<'de, D: Deserializer<'de>>(value: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(value).map(|_| true)
}

/// The state of one submission, on disk and in memory.
#[derive(Debug)]
pub(crate) struct Ledger {
    journal: Journal,
    out: AppendFile,
    /// The `Idempotency-Key` of the batch.
    pub(crate) key: Uuid,
    /// The batch, once the server has named it.
    pub(crate) batch: Option<Uuid>,
    index: HashMap<Arc<str>, usize>,
    names: Vec<Arc<str>>,
    phases: Vec<Phase>,
    /// Files that are neither accepted nor ended.
    pub(crate) open: usize,
    /// Files without a line.
    pub(crate) unended: usize,
    /// A batch without inputs of ours: every name is welcome.
    follows: bool,
    cursors: [u64; 2],
    counters: Arc<Counters>,
}

impl Ledger {
    /// Opens the result file and its journal, and compares them with the inputs.
    ///
    /// # Errors
    /// [`Failure::Usage`] when they belong to something else, or cannot be read.
    pub(crate) fn open(
        path: &Path,
        inputs: &Inputs,
        subject: Option<&str>,
        batch: Option<Uuid>,
        counters: Arc<Counters>,
    ) -> Result<Self, Failure> {
        let unusable = |error: io::Error| Failure::Usage(format!("cannot use {}: {error}", path.display()));
        if !Journal::path_of(path).exists() && path.metadata().is_ok_and(|found| found.len() > 0) {
            let what = "exists, and has no journal beside it: give another --out";
            return Err(Failure::Usage(format!("{} {what}", path.display())));
        }
        let (journal, recorded) = Journal::open(path).map_err(unusable)?;
        let begin = Begin {
            key: Uuid::new_v4(),
            files: inputs.items.len(),
            digest: inputs.digest.clone(),
            subject: subject.map(Into::into),
        };
        let key = if let Some(earlier) = recorded.begin {
            compare(path, &earlier, &begin)?;
            earlier.key
        } else {
            journal.begin(&begin).map_err(unusable)?;
            begin.key
        };
        match (recorded.batch, batch) {
            (Some(earlier), Some(given)) if earlier != given => {
                let what = format!("{} belongs to batch {earlier}: give another --out", path.display());
                return Err(Failure::Usage(what));
            }
            (None, Some(given)) => journal.batch(given).map_err(unusable)?,
            _ => {}
        }
        let names: Vec<Arc<str>> = inputs.items.iter().map(|item| Arc::from(&*item.custom_id)).collect();
        let out = AppendFile::open(path, |_| Ok(())).map_err(unusable)?;
        let mut ledger = Self {
            journal,
            out,
            key,
            batch: recorded.batch.or(batch),
            index: names.iter().cloned().zip(0..).collect(),
            phases: vec![Phase::Open; names.len()],
            open: names.len(),
            unended: names.len(),
            follows: names.is_empty(),
            names,
            cursors: [0; 2],
            counters,
        };
        ledger.counters.total.add(ledger.names.len() as u64);
        for custom_id in &recorded.accepted {
            if let Some(item) = ledger.index.get(custom_id.as_str()).copied() {
                ledger.note_accepted(item);
            }
        }
        ledger.replay(path).map_err(unusable)?;
        Ok(ledger)
    }

    /// Reads the result file of an earlier run.
    fn replay(&mut self, path: &Path) -> io::Result<()> {
        use std::io::BufRead;
        let reader = io::BufReader::new(std::fs::File::open(path)?);
        for (number, text) in (1..).zip(reader.split(b'\n')) {
            let line: Line = serde_json::from_slice(&text?).map_err(|_| {
                let what = format!("line {number}: not written by dermflow submit");
                io::Error::new(io::ErrorKind::InvalidData, what)
            })?;
            self.advance(line.list(), line.cursor);
            if let Some(item) = self.find(line.custom_id.as_deref()) {
                self.note_ended(item, &line);
            }
        }
        Ok(())
    }

    /// The files that the server has not accepted yet.
    pub(crate) fn to_send(&self) -> impl Iterator<Item = usize> {
        (0..self.phases.len()).filter(|item| self.phases[*item] == Phase::Open)
    }

    /// The entry after which the next ones are wanted.
    pub(crate) fn cursor(&self, list: List) -> u64 {
        self.cursors[list as usize]
    }

    /// The server has named the batch. On disk when this returns.
    ///
    /// # Errors
    /// When it cannot be written, or is another batch than before.
    pub(crate) fn named(&mut self, batch: Uuid) -> Result<(), Failure> {
        match self.batch {
            Some(known) if known == batch => Ok(()),
            Some(known) => Err(Failure::Unfinished(format!("the server calls batch {known} now {batch}"))),
            None => {
                self.batch = Some(batch);
                self.journal.batch(batch).map_err(|error| unwritten(&error))
            }
        }
    }

    /// The server has accepted a file.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(crate) fn accepted(&mut self, item: usize, job: Option<String>) -> Result<(), Failure> {
        if self.phases[item] == Phase::Open {
            self.journal.accepted(&self.names[item], job).map_err(|error| unwritten(&error))?;
            self.note_accepted(item);
        }
        Ok(())
    }

    /// A file will never become a job: its line is written at once.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn refused(&mut self, item: usize, error: &Value) -> Result<(), Failure> {
        let text = json!({ "custom_id": &*self.names[item], "job": null, "error": error }).to_string();
        self.ended(List::Errors, text.as_bytes())
    }

    /// A line of the server's lists. A file that has its line already gets no second one.
    ///
    /// # Errors
    /// When it is not such a line, or cannot be written.
    pub(crate) fn ended(&mut self, list: List, text: &[u8]) -> Result<(), Failure> {
        let line: Line = serde_json::from_slice(text)
            .map_err(|error| Failure::Unfinished(format!("the server sent no result line: {error}")))?;
        if let Some(item) = self.find(line.custom_id.as_deref())
            && self.phases[item] != Phase::Ended
        {
            let mut whole = Vec::with_capacity(text.len() + 1);
            whole.extend_from_slice(text);
            whole.push(b'\n');
            self.out.append(&whole).map_err(|error| unwritten(&error))?;
            self.note_ended(item, &line);
        }
        // A line that is not ours moves the cursor all the same.
        self.advance(list, line.cursor);
        Ok(())
    }

    /// The two files, to be brought to disk.
    pub(crate) fn files(&self) -> [AppendFile; 2] {
        [self.journal.file().clone(), self.out.clone()]
    }

    fn advance(&mut self, list: List, cursor: Option<u64>) {
        let known = &mut self.cursors[list as usize];
        *known = cursor.unwrap_or_default().max(*known);
    }

    /// The file of this name; a batch that is only followed gets to know it.
    fn find(&mut self, custom_id: Option<&str>) -> Option<usize> {
        let custom_id = custom_id?;
        if let Some(known) = self.index.get(custom_id) {
            return Some(*known);
        }
        self.follows.then(|| {
            let (item, name): (_, Arc<str>) = (self.names.len(), custom_id.into());
            self.index.insert(name.clone(), item);
            self.names.push(name);
            self.phases.push(Phase::Open);
            (self.open, self.unended) = (self.open + 1, self.unended + 1);
            self.counters.total.add(1);
            self.note_accepted(item);
            item
        })
    }

    fn note_accepted(&mut self, item: usize) {
        if self.phases[item] == Phase::Open {
            self.phases[item] = Phase::Accepted;
            self.open -= 1;
            self.counters.accepted.add(1);
        }
    }

    fn note_ended(&mut self, item: usize, line: &Line) {
        match self.phases[item] {
            Phase::Ended => return,
            Phase::Open => self.open -= 1,
            Phase::Accepted => {}
        }
        self.phases[item] = Phase::Ended;
        self.unended -= 1;
        let counter = match (line.list(), &line.error, &line.job) {
            (List::Results, None, _) => &self.counters.succeeded,
            (_, _, Some(_)) => &self.counters.failed,
            (_, _, None) => &self.counters.refused,
        };
        counter.add(1);
    }
}

fn unwritten(error: &io::Error) -> Failure {
    Failure::Unfinished(format!("cannot write the results: {error}"))
}

fn compare(path: &Path, earlier: &Begin, now: &Begin) -> Result<(), Failure> {
    if earlier.digest == now.digest && earlier.subject == now.subject {
        return Ok(());
    }
    let path = path.display();
    Err(Failure::Usage(format!(
        "{path} belongs to other inputs ({} files then, {} now, names, sizes or the subject differ): \
         give another --out, or remove {path} and its journal",
        earlier.files, now.files
    )))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bytes::Bytes;

    use super::*;
    use crate::journal::tests::Folder;

    fn inputs(names: &[&str]) -> Inputs {
        Inputs::of_images(names.iter().map(|name| ((*name).to_owned(), Bytes::new()))).unwrap()
    }

    fn open(path: &Path, names: &[&str]) -> Result<Ledger, Failure> {
        Ledger::open(path, &inputs(names), None, None, Arc::default())
    }

    fn result(cursor: u64, name: &str) -> Vec<u8> {
        json!({"cursor": cursor, "line": 1, "custom_id": name, "job": "j", "report": {"id": "j"}})
            .to_string()
            .into()
    }

    fn failure(cursor: u64, name: &str, job: Option<&str>) -> Vec<u8> {
        json!({"cursor": cursor, "line": 1, "custom_id": name, "job": job, "error": {"code": "x"}})
            .to_string()
            .into()
    }

    #[test]
    fn a_repeated_run_goes_on_where_the_first_one_was() {
        let folder = Folder::new();
        let path = folder.path("out");
        let names = ["a", "b", "c", "d", "e"];
        let mut first = open(&path, &names).unwrap();
        let (key, batch) = (first.key, Uuid::new_v4());
        first.named(batch).unwrap();
        first.accepted(0, Some("j".into())).unwrap();
        first.accepted(1, None).unwrap();
        first.accepted(2, None).unwrap();
        first.refused(3, &json!({"code": "image-format"})).unwrap();
        first.ended(List::Results, &result(7, "a")).unwrap();
        first.ended(List::Errors, &failure(4, "b", Some("j"))).unwrap();
        drop(first);

        let again = open(&path, &names).unwrap();
        assert_eq!((again.key, again.batch), (key, Some(batch)));
        assert_eq!(again.to_send().collect::<Vec<_>>(), [4]);
        assert_eq!((again.cursor(List::Results), again.cursor(List::Errors)), (7, 4));
        assert_eq!((again.open, again.unended), (1, 2));
        let counters = &again.counters;
        assert_eq!((counters.succeeded.get(), counters.failed.get(), counters.refused.get()), (1, 1, 1));
        assert_eq!((counters.total.get(), counters.accepted.get()), (5, 3));
    }

    #[test]
    fn a_report_that_the_server_cannot_open_is_a_failure_among_the_results() {
        let folder = Folder::new();
        let path = folder.path("out");
        let mut first = open(&path, &["a", "b"]).unwrap();
        let lost = json!({
            "cursor": 9, "line": 1, "custom_id": "a", "job": "j", "report": null, "error": {"code": "report-unreadable"}
        });
        first.ended(List::Results, lost.to_string().as_bytes()).unwrap();
        drop(first);
        let again = open(&path, &["a", "b"]).unwrap();
        assert_eq!((again.counters.succeeded.get(), again.counters.failed.get()), (0, 1));
        assert_eq!((again.cursor(List::Results), again.cursor(List::Errors)), (9, 0));
    }

    #[test]
    fn a_file_has_one_line_whatever_the_server_repeats() {
        let folder = Folder::new();
        let path = folder.path("out");
        let mut ledger = open(&path, &["a", "b"]).unwrap();
        ledger.refused(1, &json!({"code": "image-format"})).unwrap();
        for _ in 0..2 {
            ledger.ended(List::Results, &result(1, "a")).unwrap();
            ledger.ended(List::Errors, &failure(2, "b", None)).unwrap();
            ledger.ended(List::Errors, &failure(3, "not ours", None)).unwrap();
        }
        assert_eq!((ledger.unended, ledger.cursor(List::Results), ledger.cursor(List::Errors)), (0, 1, 3));
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
        assert!(ledger.ended(List::Results, b"{").is_err());
    }

    #[test]
    fn a_result_file_cut_at_any_byte_ends_up_the_same() {
        let folder = Folder::new();
        let path = folder.path("out");
        let names = ["a", "b", "c"];
        let lines = [result(1, "a"), result(2, "b"), result(3, "c")];
        let mut ledger = open(&path, &names).unwrap();
        for line in &lines {
            ledger.ended(List::Results, line).unwrap();
        }
        drop(ledger);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            let mut ledger = open(&path, &names).unwrap();
            // What the server has after the cursor.
            for line in &lines[ledger.cursor(List::Results) as usize..] {
                ledger.ended(List::Results, line).unwrap();
            }
            assert_eq!(ledger.unended, 0);
            drop(ledger);
            assert_eq!(fs::read(&path).unwrap(), whole, "cut at {length}");
        }
    }

    #[test]
    fn other_inputs_another_batch_and_foreign_files_are_refused() {
        let folder = Folder::new();
        let path = folder.path("out");
        let mut ledger = open(&path, &["a", "b"]).unwrap();
        ledger.named(Uuid::new_v4()).unwrap();
        assert!(ledger.named(Uuid::new_v4()).is_err());
        assert!(open(&path, &["a", "b"]).unwrap_err().to_string().contains("another dermflow"));
        drop(ledger);
        let refused = |names: &[&str], subject, batch| {
            let opened = Ledger::open(&path, &inputs(names), subject, batch, Arc::default());
            matches!(opened, Err(Failure::Usage(_)))
        };
        assert!(refused(&["a", "c"], None, None) && refused(&["a"], None, None));
        assert!(refused(&["a", "b"], Some("p"), None) && refused(&["a", "b"], None, Some(Uuid::new_v4())));
        assert!(!refused(&["a", "b"], None, None));
        let foreign = folder.path("notes");
        fs::write(&foreign, "mine\n").unwrap();
        assert!(open(&foreign, &["a"]).unwrap_err().to_string().contains("no journal"));
        assert_eq!(fs::read_to_string(&foreign).unwrap(), "mine\n");
    }

    #[test]
    fn a_batch_that_is_only_followed_takes_every_name_once() {
        let folder = Folder::new();
        let batch = Some(Uuid::new_v4());
        let follow =
            || Ledger::open(&folder.path("out"), &Inputs::none(), None, batch, Arc::default()).unwrap();
        let mut ledger = follow();
        for _ in 0..2 {
            ledger.ended(List::Results, &result(1, "a")).unwrap();
            ledger.ended(List::Errors, &failure(1, "b", Some("j"))).unwrap();
        }
        drop(ledger);
        let ledger = follow();
        assert_eq!((ledger.batch, ledger.names.len(), ledger.unended), (batch, 2, 0));
        assert_eq!(ledger.counters.failed.get(), 1);
    }
}
