//! Files and answers of one JSON object a line.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Seek, SeekFrom, Write},
    path::Path,
    sync::Arc,
};

use reqwest::Response;
use tokio::time::timeout;

use crate::access::{ANSWER_WITHIN, Trouble, cut};

/// Bytes of one line of an answer: a report has some kilobytes.
const MAX_ANSWER_LINE: usize = 16 * 1024 * 1024;

/// A file that only grows by whole lines, held by one process at a time. A crash can tear the last line, and
/// [`AppendFile::open`] mends that.
#[derive(Debug, Clone)]
pub(crate) struct AppendFile(Arc<File>);

impl AppendFile {
    /// Opens or makes the file, shows each whole line to `read`, and cuts off what comes after the last one.
    pub(crate) fn open(path: &Path, mut read: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        // Before anything is mended: what looks torn may be what another process is writing.
        if file.try_lock().is_err() {
            let what = format!("another dermflow is at work with {}", path.display());
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, what));
        }
        let mut reader = BufReader::new(&file);
        let (mut whole, mut line) = (0, Vec::new());
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line)?;
            let Some(text) = line.strip_suffix(b"\n") else { break };
            read(text)?;
            whole += length as u64;
        }
        file.set_len(whole)?;
        (&file).seek(SeekFrom::Start(whole))?;
        Ok(Self(Arc::new(file)))
    }

    /// Appends lines, each with its end, in one write.
    pub(crate) fn append(&self, lines: &[u8]) -> io::Result<()> {
        debug_assert!(lines.ends_with(b"\n"));
        (&*self.0).write_all(lines)
    }

    /// Returns when the lines are on disk.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// The lines of an answer as they arrive.
#[derive(Debug)]
pub(crate) struct Lines {
    response: Response,
    buffer: Vec<u8>,
    /// Where the next line begins.
    begin: usize,
    /// Up to where there is no line's end.
    searched: usize,
}

impl Lines {
    pub(crate) fn new(response: Response) -> Self {
        Self { response, buffer: Vec::new(), begin: 0, searched: 0 }
    }

    /// The next line without its end; `None` at the end of the answer. A line without an end was cut off.
    pub(crate) async fn next(&mut self) -> Result<Option<&[u8]>, Trouble> {
        loop {
            if let Some(found) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let (begin, end) = (self.begin, self.searched + found);
                (self.begin, self.searched) = (end + 1, end + 1);
                return Ok(Some(&self.buffer[begin..end]));
            }
            self.buffer.drain(..self.begin);
            (self.begin, self.searched) = (0, self.buffer.len());
            if self.buffer.len() > MAX_ANSWER_LINE {
                return Err(Trouble::Final(None, "the server answered a line without an end".into()));
            }
            match self.response.chunk().await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) if self.buffer.is_empty() => return Ok(None),
                Ok(None) => return Err(Trouble::Again(None, "the answer broke off within a line".into())),
                Err(error) => return Err(cut(&error)),
            }
        }
    }

    /// The same, from a server that has no reason to be silent.
    pub(crate) async fn next_soon(&mut self) -> Result<Option<&[u8]>, Trouble> {
        let silent = || Trouble::Again(None, "the server fell silent".into());
        timeout(ANSWER_WITHIN, self.next()).await.unwrap_or_else(|_| Err(silent()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::journal::tests::Folder;

    fn read(path: &Path) -> (AppendFile, Vec<String>) {
        let mut lines = Vec::new();
        let file = AppendFile::open(path, |line| {
            lines.push(String::from_utf8(line.to_vec()).unwrap());
            Ok(())
        });
        (file.unwrap(), lines)
    }

    #[test]
    fn a_file_cut_at_any_byte_keeps_its_whole_lines_and_goes_on_after_them() {
        let folder = Folder::new();
        let path = folder.path("lines");
        let text = "{\"a\":1}\n{\"b\":\"é\"}\n\n{\"c\":3}\n";
        for length in 0..=text.len() {
            fs::write(&path, &text.as_bytes()[..length]).unwrap();
            let whole = text.as_bytes()[..length].split(|byte| *byte == b'\n').count() - 1;
            let (file, lines) = read(&path);
            assert_eq!(lines.len(), whole);
            file.append(b"{\"d\":4}\n").unwrap();
            drop(file);
            let (_, lines) = read(&path);
            assert_eq!((lines.len(), lines.last().map(String::as_str)), (whole + 1, Some("{\"d\":4}")));
        }
    }

    #[test]
    fn a_second_process_is_kept_out_and_mends_nothing() {
        let folder = Folder::new();
        let path = folder.path("lines");
        let (first, _) = read(&path);
        fs::write(&path, "half a li").unwrap();
        let error = AppendFile::open(&path, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("another dermflow"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "half a li");
        drop(first);
        assert!(AppendFile::open(&path, |_| Ok(())).is_ok());
    }
}
