//! One request line of an upload.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use dermflow_schemas::limits::MAX_BODY_BYTES;

use crate::inputs::{Content, Item};

/// Bytes of an image whose line still fits, with room for names: Base64 makes four bytes of three.
const MAX_FILE_BYTES: usize = (MAX_BODY_BYTES - 16 * 1024) / 4 * 3;

/// Why a file cannot be sent at all: a stable code and a sentence.
pub(crate) type Unsendable = (&'static str, String);

/// The line of an item, its end included.
pub(crate) fn build(item: &Item, subject: Option<&str>) -> Result<Bytes, Unsendable> {
    let unreadable = |error: io::Error| ("file-unreadable", format!("The file cannot be read: {error}."));
    let image = match &item.content {
        Content::Ready { file, at, length } => {
            let mut line = vec![0; *length + 1];
            file.read_exact_at(&mut line[..*length], *at).map_err(unreadable)?;
            line[*length] = b'\n';
            return Ok(line.into());
        }
        Content::Image(image) => image.clone(),
        Content::File => read(&item.custom_id).map_err(unreadable)?.into(),
    };
    if image.len() > MAX_FILE_BYTES {
        return Err(("file-too-large", format!("The file has more than {MAX_FILE_BYTES} bytes.")));
    }
    Ok(of_image(&item.custom_id, &image, subject).into())
}

/// The file, up to one byte more than may be sent.
fn read(path: &str) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let expected = file.metadata()?.len().min(MAX_FILE_BYTES as u64);
    let mut bytes = Vec::with_capacity(expected as usize + 1);
    file.take(MAX_FILE_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn of_image(custom_id: &str, image: &[u8], subject: Option<&str>) -> Vec<u8> {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let head = format!("{{\"custom_id\":{},\"images\":[{{\"data\":\"", quoted(custom_id));
    let subject = subject.map(|subject| format!(",\"subject\":{}", quoted(subject))).unwrap_or_default();
    let tail = format!("\"}}]{subject}}}\n");
    let mut line = String::with_capacity(head.len() + image.len().div_ceil(3) * 4 + tail.len());
    line.push_str(&head);
    STANDARD.encode_string(image, &mut line);
    line.push_str(&tail);
    line.into_bytes()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::journal::tests::Folder;

    fn item(custom_id: &str, content: Content) -> Item {
        Item { custom_id: custom_id.into(), content }
    }

    #[test]
    fn a_line_is_json_whatever_the_name() {
        for name in ["a.jpg", "a \"b\" \\ é\u{1F600}.jpg"] {
            for length in 0..5 {
                let image = vec![0xFF; length];
                let content = Content::Image(image.clone().into());
                let line = build(&item(name, content), Some("P\"1")).unwrap();
                assert_eq!(line.split(|byte| *byte == b'\n').count(), 2);
                let value: Value = serde_json::from_slice(&line).unwrap();
                let expected = json!([{ "data": STANDARD.encode(&image) }]);
                assert_eq!(value, json!({ "custom_id": name, "images": expected, "subject": "P\"1" }));
            }
        }
    }

    #[test]
    fn what_cannot_be_sent_says_why() {
        let folder = Folder::new();
        let path = folder.path("large.png").display().to_string();
        assert_eq!(build(&item(&path, Content::File), None).unwrap_err().0, "file-unreadable");
        File::create(&path).unwrap().set_len(MAX_FILE_BYTES as u64 + 1).unwrap();
        assert_eq!(build(&item(&path, Content::File), None).unwrap_err().0, "file-too-large");
        File::options().write(true).open(&path).unwrap().set_len(MAX_FILE_BYTES as u64).unwrap();
        assert!(build(&item(&path, Content::File), None).unwrap().len() <= MAX_BODY_BYTES);
    }
}
