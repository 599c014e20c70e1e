//! `POST /diagnosis-support`: `{"payload": [{"contentAttachment": {"data", "title"}}]}`, one to three images of one case.

use dermflow_schemas::{
    envelope::{ImageEntry, Manifest, Payload},
    error::{ApiError, Code},
    image::ImageBytes,
    limits::{MAX_HEAT_MAPS, MAX_IMAGES},
};

use super::body::{self, Part};
use crate::{element::Faults, parameters::image_file};

/// Reads a body.
pub(crate) fn parse(body: &[u8]) -> Result<Payload, ApiError> {
    body::read(body, |root, faults| {
        let items = root.required("payload", faults)?.items(faults)?;
        if !(1..=MAX_IMAGES).contains(&items.len()) {
            faults.add(Code::ImageCount, "payload", None);
            return None;
        }
        let (entries, images) = items.iter().filter_map(|item| image(item, faults)).unzip();
        let mut manifest = Manifest::new(entries, None, None);
        manifest.heat_maps = MAX_HEAT_MAPS;
        Some(Payload { manifest, images })
    })
}

/// An image as every request of the device API has it. What the caller says of its type is not looked at: clients send
/// JPEG files under the name of PNG.
pub(super) fn image(item: &Part<'_, '_>, faults: &mut Faults) -> Option<(ImageEntry, ImageBytes)> {
    let attachment = item.object(faults)?.required("contentAttachment", faults)?.object(faults)?;
    let title = attachment.get("title").and_then(|title| title.text(faults));
    let title = title.filter(|title| !title.trim().is_empty()).map(str::to_owned);
    let data = attachment.required("data", faults)?;
    let (bytes, format) = image_file(data.string(faults)?, &data.path, faults)?;
    Some((ImageEntry { bytes: bytes.as_slice().len(), format, title, taken: None, body_site: None }, bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use ::image::{GrayImage, ImageFormat};
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde_json::{Value, json};

    use super::*;

    fn image() -> Value {
        let mut file = Cursor::new(Vec::new());
        GrayImage::new(80, 80).write_to(&mut file, ImageFormat::Png).unwrap();
        json!({"contentAttachment": {"data": STANDARD.encode(file.into_inner()), "contentType": "image/jpeg"}})
    }

    fn faults(body: &Value) -> Vec<(&'static str, String)> {
        let error = parse(body.to_string().as_bytes()).unwrap_err();
        error.faults.into_iter().map(|f| (f.code.kind().code, f.field.unwrap_or_default())).collect()
    }

    #[test]
    fn a_request_has_one_to_three_images_whatever_it_calls_them() {
        let mut titled = image();
        titled["contentAttachment"]["title"] = json!("Left");
        let payload = parse(json!({"payload": [image(), titled]}).to_string().as_bytes()).unwrap();
        let [first, second] = &payload.manifest.images[..] else { panic!("not two images") };
        assert_eq!((first.format.media_type(), first.title.as_deref()), ("image/png", None));
        assert_eq!(second.title.as_deref(), Some("Left"));
        assert_eq!((payload.images[0].as_slice().len(), payload.manifest.heat_maps), (first.bytes, 5));
        for payload in [json!([]), json!([image(), image(), image(), image()])] {
            assert_eq!(faults(&json!({ "payload": payload })), [("image-count", "payload".to_owned())]);
        }
    }

    #[test]
    fn every_image_has_its_own_fault() {
        let mut prefixed = image();
        let data = prefixed["contentAttachment"]["data"].as_str().unwrap_or_default();
        prefixed["contentAttachment"]["data"] = json!(format!("data:image/png;base64,{data}"));
        let empty = json!({"contentAttachment": {}});
        let text = json!({"contentAttachment": {"data": "aGVsbG8="}});
        let at = |i: usize| format!("payload[{i}].contentAttachment.data");
        let expected = [("image-not-base64", at(0)), ("element-missing", at(1)), ("image-format", at(2))];
        assert_eq!(faults(&json!({"payload": [prefixed, empty, text]})), expected);
        assert_eq!(faults(&json!({"payload": image()})), [("value-invalid", "payload".to_owned())]);
        assert_eq!(faults(&json!({})), [("element-missing", "payload".to_owned())]);
    }
}
