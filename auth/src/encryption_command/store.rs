//! What the broker's files are like: nats-server does not say whether it encrypts them.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde_json::Value;

/// Where a file in clear shows its stream's subjects: in its first message, or in its description.
const HEAD_BYTES: u64 = 4 * 1024;
/// What is in clear on purpose: the time table of retries, with the jobs' ids.
const TIME_TABLE: &str = "sched.db";

/// A stream, as the server describes it.
#[derive(Debug)]
pub(super) struct Stream<'a> {
    pub(super) account: &'a str,
    pub(super) name: &'a str,
    pub(super) subjects: &'a [Value],
}

/// What a store is like.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) files: usize,
    /// Keys, each sealed under the server's own.
    pub(super) keys: usize,
    pub(super) in_clear: Vec<String>,
}

/// Looks at every file: one is in clear that has no key beside it, or that begins with a subject of a stream.
///
/// # Errors
/// When something cannot be read, or a stream is not there.
pub(super) fn look(folder: &Path, streams: &[Stream<'_>]) -> io::Result<Seen> {
    let mut seen = Seen::default();
    let subjects: Vec<&[u8]> = streams
        .iter()
        .flat_map(|stream| stream.subjects)
        .filter_map(|subject| subject.as_str()?.split(['*', '>']).next())
        // Shorter ones would be met by chance.
        .filter(|literal| literal.len() >= 5)
        .map(str::as_bytes)
        .collect();
    for stream in streams {
        let home = folder.join(stream.account).join("streams").join(stream.name);
        if !is_key(&home.join("meta.key"))? {
            seen.in_clear.push(home.display().to_string());
        }
    }
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "key") {
                seen.keys += 1;
            } else if !path.ends_with(TIME_TABLE) {
                // A file may go while we look: a block whose messages are done.
                match is_clear(&path, &subjects) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Ok(false) => {}
                    Ok(true) => seen.in_clear.push(path.display().to_string()),
                    Err(error) => return Err(error),
                }
                seen.files += 1;
            }
        }
    }
    Ok(seen)
}

fn is_key(path: &PathBuf) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(key) => Ok(key.len() > 0),
        // That the stream is not there is another matter.
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.parent().is_some_and(Path::is_dir) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn is_clear(path: &Path, subjects: &[&[u8]]) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(path)?.take(HEAD_BYTES).read_to_end(&mut head)?;
    let block = path.extension().is_some_and(|extension| extension == "blk");
    if block && !head.is_empty() && !fs::exists(path.with_extension("key"))? && fs::exists(path)? {
        return Ok(true);
    }
    Ok(subjects.iter().any(|subject| head.windows(subject.len()).any(|window| window == *subject)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_file_without_a_key_or_with_a_subject_is_in_clear() {
        let root = std::env::temp_dir().join(format!("dermflow-store-{}", uuid::Uuid::new_v4()));
        let messages = root.join("$G/streams/JOBS/msgs");
        fs::create_dir_all(&messages).unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(messages.join(name), bytes).unwrap();
        write("../meta.key", b"sealed");
        write("1.key", b"sealed");
        write("1.blk", &[7; 100]);
        write("2.key", b"sealed");
        write("2.blk", b"");
        write("sched.db", b"jobs.bulk.1");
        let subjects = [json!("jobs.>")];
        let stream = || [Stream { account: "$G", name: "JOBS", subjects: &subjects }];
        assert_eq!(look(&root, &stream()).unwrap(), Seen { files: 2, keys: 3, in_clear: Vec::new() });
        let faults: [(&str, &[u8]); 3] = [
            ("2.blk", b"\x40\0\0\0 jobs.bulk.1"),
            ("3.blk", &[7; 100]),
            ("index.db", b"\x0b\x01 jobs.bulk.1"),
        ];
        for (name, bytes) in faults {
            write(name, bytes);
            assert!(look(&root, &stream()).unwrap().in_clear[0].ends_with(name), "{name}");
            fs::remove_file(messages.join(name)).unwrap();
        }
        write("../meta.key", b"");
        assert!(look(&root, &stream()).unwrap().in_clear[0].ends_with("JOBS"));
        let gone = [Stream { account: "$G", name: "DEAD", subjects: &subjects }];
        assert!(look(&root, &gone).is_err());
        fs::remove_dir_all(root).unwrap();
    }
}
