//! What is submitted: names of image files, or ready request lines, in a fixed order.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use aws_lc_rs::digest;
use bytes::Bytes;
use dermflow_schemas::limits::{MAX_BODY_BYTES, MAX_CUSTOM_ID_CHARS};
use serde::Deserialize;

use crate::Failure;

/// The media type of plain request lines.
const NDJSON: &str = "application/x-ndjson";
/// The media type of FHIR `Parameters`, one a line.
const FHIR_NDJSON: &str = "application/fhir+ndjson";
/// The files that a directory is searched for.
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// Where the image of an [`Item`] is.
#[derive(Debug, Clone)]
pub enum Content {
    /// In the file that the `custom_id` names.
    File,
    /// In memory: for load generators.
    Image(Bytes),
    /// In a file of ready request lines.
    Ready {
        /// The file.
        file: Arc<File>,
        /// Where the line begins, in bytes.
        at: u64,
        /// Its bytes without the line's end.
        length: usize,
    },
}

/// One line of the upload.
#[derive(Debug, Clone)]
pub struct Item {
    /// The caller's name for it: the path of the file as it was given.
    pub custom_id: Box<str>,
    /// The image.
    pub content: Content,
}

/// All lines of a submission.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The lines; no two have the same `custom_id`.
    pub items: Vec<Item>,
    /// The media type of the upload.
    pub media_type: &'static str,
    /// Hexadecimal SHA-256 of names and sizes: the same inputs have the same.
    pub digest: String,
}

impl Inputs {
    /// No inputs: a batch is only followed.
    pub fn none() -> Self {
        Self { items: Vec::new(), media_type: NDJSON, digest: "none".into() }
    }

    /// Image files, and the image files in directories at any depth.
    ///
    /// # Errors
    /// [`Failure::Usage`] when one is not there, or has a name that cannot be a `custom_id`.
    pub fn of_paths(paths: &[PathBuf]) -> Result<Self, Failure> {
        let mut files = Vec::new();
        for path in paths {
            let kind = fs::metadata(path).map_err(|error| unreadable(path, &error))?;
            if kind.is_dir() { walk(path, &mut files)? } else { files.push(path.clone()) }
        }
        let mut seen = HashSet::new();
        files.retain(|file| seen.insert(file.clone()));
        let mut digest = Digest::new();
        let item = |file: &PathBuf| {
            let custom_id = named(file)?;
            digest.add(custom_id, fs::metadata(file).map_err(|error| unreadable(file, &error))?.len());
            Ok(Item { custom_id: custom_id.into(), content: Content::File })
        };
        let items = files.iter().map(item).collect::<Result<_, Failure>>()?;
        Ok(Self { items, media_type: NDJSON, digest: digest.finish() })
    }

    /// Names of image files, one a line; empty lines do not count.
    ///
    /// # Errors
    /// As [`Inputs::of_paths`], and when the names cannot be read.
    pub fn of_names(names: impl BufRead) -> Result<Self, Failure> {
        let lines: Result<Vec<String>, io::Error> = names.lines().collect();
        let lines = lines.map_err(|error| Failure::Usage(format!("cannot read the file names: {error}")))?;
        let paths: Vec<PathBuf> = lines.iter().filter(|line| !line.is_empty()).map(PathBuf::from).collect();
        Self::of_paths(&paths)
    }

    /// Images in memory, with their names.
    ///
    /// # Errors
    /// [`Failure::Usage`] when a name is given twice or cannot be a `custom_id`.
    pub fn of_images(images: impl IntoIterator<Item = (String, Bytes)>) -> Result<Self, Failure> {
        let (mut digest, mut seen, mut items) = (Digest::new(), HashSet::new(), Vec::new());
        for (custom_id, image) in images {
            check_name(&custom_id)?;
            if !seen.insert(custom_id.clone()) {
                return Err(Failure::Usage(format!("{custom_id} is given twice")));
            }
            digest.add(&custom_id, image.len() as u64);
            items.push(Item { custom_id: custom_id.into(), content: Content::Image(image) });
        }
        Ok(Self { items, media_type: NDJSON, digest: digest.finish() })
    }

    /// Ready request lines: all plain, or all FHIR `Parameters`.
    ///
    /// # Errors
    /// [`Failure::Usage`] when the file cannot be read, or a line has no usable or a repeated name.
    pub fn of_ready(path: &Path) -> Result<Self, Failure> {
        let file = Arc::new(File::open(path).map_err(|error| unreadable(path, &error))?);
        let (mut reader, mut line) = (BufReader::new(&*file), Vec::new());
        let (mut items, mut seen, mut digest) = (Vec::new(), HashSet::new(), Digest::new());
        let (mut at, mut number, mut fhir) = (0, 0, None);
        loop {
            line.clear();
            let limit = MAX_BODY_BYTES as u64 + 1;
            let read = reader.by_ref().take(limit).read_until(b'\n', &mut line);
            let read = read.map_err(|error| unreadable(path, &error))?;
            if read == 0 {
                break;
            }
            number += 1;
            let wrong = |what: &str| Failure::Usage(format!("{}, line {number}: {what}", path.display()));
            if read as u64 == limit && !line.ends_with(b"\n") {
                return Err(wrong("longer than the server accepts"));
            }
            let text = line.trim_ascii_end();
            if !text.is_empty() {
                let (custom_id, is_fhir) = head(text).map_err(wrong)?;
                if *fhir.get_or_insert(is_fhir) != is_fhir {
                    return Err(wrong("plain requests and FHIR Parameters do not go together"));
                }
                check_name(&custom_id)?;
                if !seen.insert(custom_id.clone()) {
                    return Err(wrong("its name was used before"));
                }
                digest.add(&custom_id, text.len() as u64);
                let content = Content::Ready { file: file.clone(), at, length: text.len() };
                items.push(Item { custom_id: custom_id.into(), content });
            }
            at += read as u64;
        }
        let media_type = if fhir == Some(true) { FHIR_NDJSON } else { NDJSON };
        Ok(Self { items, media_type, digest: digest.finish() })
    }
}

/// The name in a request line, and whether it is FHIR.
fn head(line: &[u8]) -> Result<(String, bool), &'static str> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(rename = "resourceType")]
        resource_type: Option<String>,
        custom_id: Option<String>,
        id: Option<String>,
    }
    let head: Head = serde_json::from_slice(line).map_err(|_| "not a JSON object")?;
    let fhir = head.resource_type.is_some();
    let name = if fhir { head.id.ok_or("no id") } else { head.custom_id.ok_or("no custom_id") };
    Ok((name?, fhir))
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::Usage(format!("cannot read {}: {error}", path.display()))
}

fn named(path: &Path) -> Result<&str, Failure> {
    let name = path.to_str().ok_or_else(|| Failure::Usage(format!("{} is not UTF-8", path.display())))?;
    check_name(name)?;
    Ok(name)
}

fn check_name(name: &str) -> Result<(), Failure> {
    if name.is_empty() || name.chars().count() > MAX_CUSTOM_ID_CHARS || name.chars().any(char::is_control) {
        let what =
            format!("{name:?} names its result, for which 1 to {MAX_CUSTOM_ID_CHARS} printable characters");
        return Err(Failure::Usage(format!(
            "{what} are needed: give a shorter path, such as a relative one"
        )));
    }
    Ok(())
}

/// Adds the image files below `folder`, in the order of their names. Links to folders are not followed.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Failure> {
    let mut open = vec![folder.to_owned()];
    let begin = files.len();
    while let Some(folder) = open.pop() {
        let wrong = |error: io::Error| unreadable(&folder, &error);
        for entry in fs::read_dir(&folder).map_err(wrong)? {
            let entry = entry.map_err(wrong)?;
            let path = entry.path();
            let kind = entry.file_type().map_err(wrong)?;
            if kind.is_dir() {
                open.push(path);
            } else if is_image(&path) && path.is_file() {
                files.push(path);
            }
        }
    }
    files[begin..].sort();
    Ok(())
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

struct Digest(digest::Context);

impl Digest {
    fn new() -> Self {
        Self(digest::Context::new(&digest::SHA256))
    }

    fn add(&mut self, name: &str, size: u64) {
        self.0.update(&(name.len() as u64).to_be_bytes());
        self.0.update(name.as_bytes());
        self.0.update(&size.to_be_bytes());
    }

    fn finish(self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for byte in self.0.finish().as_ref() {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests::Folder;

    fn names(inputs: &Inputs) -> Vec<&str> {
        inputs.items.iter().map(|item| item.custom_id.rsplit('/').next().unwrap()).collect()
    }

    #[test]
    fn a_directory_is_searched_for_images_in_a_fixed_order() {
        let folder = Folder::new();
        fs::create_dir(folder.path("b")).unwrap();
        for name in ["z.PNG", "a.jpg", "b/c.jpeg", "notes.txt", "jpg"] {
            fs::write(folder.path(name), name).unwrap();
        }
        let root = folder.path("");
        let inputs = Inputs::of_paths(std::slice::from_ref(&root)).unwrap();
        assert_eq!(names(&inputs), ["a.jpg", "c.jpeg", "z.PNG"]);
        let twice = Inputs::of_paths(&[root.clone(), folder.path("a.jpg")]).unwrap();
        assert_eq!(twice.digest, inputs.digest);
        let list = format!("{}\n\n{}", folder.path("z.PNG").display(), folder.path("notes.txt").display());
        assert_eq!(names(&Inputs::of_names(list.as_bytes()).unwrap()), ["z.PNG", "notes.txt"]);
        fs::write(folder.path("a.jpg"), "other").unwrap();
        assert_eq!(Inputs::of_paths(std::slice::from_ref(&root)).unwrap().digest, inputs.digest);
        fs::write(folder.path("a.jpg"), "longer than before").unwrap();
        assert_ne!(Inputs::of_paths(&[root]).unwrap().digest, inputs.digest);
        assert!(Inputs::of_paths(&[folder.path("missing.jpg")]).is_err());
    }

    #[test]
    fn ready_lines_are_found_again_by_their_place() {
        let folder = Folder::new();
        let path = folder.path("ready");
        let lines = ["{\"custom_id\":\"a\",\"images\":[]}", "{\"custom_id\":\"é\"}", "{\"custom_id\":\"c\"}"];
        fs::write(&path, format!("{}\n\n{}\r\n{}", lines[0], lines[1], lines[2])).unwrap();
        let inputs = Inputs::of_ready(&path).unwrap();
        assert_eq!((names(&inputs), inputs.media_type), (vec!["a", "é", "c"], NDJSON));
        for (item, line) in inputs.items.iter().zip(lines) {
            assert_eq!(crate::line::build(item, None).unwrap(), format!("{line}\n").as_bytes());
        }
        let refused = |text: &str| {
            fs::write(&path, text).unwrap();
            Inputs::of_ready(&path).unwrap_err().to_string()
        };
        assert!(refused("{\"custom_id\":\"a\"}\n{\"custom_id\":\"a\"}\n").contains("line 2: its name"));
        assert!(refused("{\"custom_id\":\"a\"}\n{\"id\":\"b\"}\n").contains("line 2: no custom_id"));
        assert!(
            refused("{\"custom_id\":\"a\"}\n{\"resourceType\":\"Parameters\",\"id\":\"b\"}")
                .contains("go together")
        );
        assert!(refused("[]").contains("line 1: not a JSON object"));
        fs::write(&path, "{\"resourceType\":\"Parameters\",\"id\":\"b\"}").unwrap();
        assert_eq!(Inputs::of_ready(&path).unwrap().media_type, FHIR_NDJSON);
    }

    #[test]
    fn a_name_that_the_server_would_refuse_is_refused_before_anything_is_sent() {
        let image = |name: &str| vec![(name.to_owned(), Bytes::new())];
        assert!(Inputs::of_images(image(&"é".repeat(255))).is_ok());
        for name in [String::new(), "a".repeat(256), "a\tb".into()] {
            assert!(matches!(Inputs::of_images(image(&name)), Err(Failure::Usage(_))), "{name:?}");
        }
    }
}
