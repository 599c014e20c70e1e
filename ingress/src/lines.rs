//! A line of an upload to a batch: FHIR Parameters, or the same as a plain JSON object.

use dermflow_schemas::{
    envelope::{ImageEntry, Manifest, Payload},
    error::{ApiError, Code},
    fhir::{CodeableConcept, Coding, Identifier, Reference, SNOMED},
    image::ImageBytes,
    limits::{MAX_CUSTOM_ID_CHARS, MAX_IMAGES},
};

use crate::{
    device::sites,
    element::{Element, Faults, Node},
    json::Json,
    parameters::{self, heat_map, model},
    snomed::is_concept_id,
};

/// In which form the lines are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// `application/fhir+ndjson`: a line is what `$analyze` takes, its `id` the caller's name for it.
    Fhir,
    /// `application/x-ndjson`:
    /// `{"custom_id", "images": [{"data", "title", "body_site"}], "subject", "identifier", "heat_map", "model"}`.
    Plain,
}

/// A line that was read.
#[derive(Debug)]
pub(crate) struct Line {
    /// The caller's name for the line, if it has a fit one.
    pub(crate) custom_id: Option<String>,
    pub(crate) payload: Result<Payload, ApiError>,
}

/// Reads a line.
pub(crate) fn parse(form: Form, line: &[u8]) -> Line {
    let json = match Json::parse(line) {
        Ok(json) => json,
        Err(error) => return Line { custom_id: None, payload: Err(error) },
    };
    let (name, path) = match form {
        Form::Fhir => ("id", "Parameters"),
        Form::Plain => ("custom_id", ""),
    };
    let node = Node { json: &json, path: path.into() };
    let mut faults = Faults::default();
    let custom_id = custom_id(form, name, &node, &mut faults);
    let payload = match form {
        Form::Fhir => parameters::read(&node).map_err(|error| error.faults),
        Form::Plain => plain(&node, &mut faults).ok_or(Vec::new()),
    };
    let payload = match payload {
        Ok(payload) if faults.0.is_empty() => Ok(payload),
        Ok(_) => Err(faults.0.into()),
        Err(others) => {
            faults.0.extend(others);
            Err(faults.0.into())
        }
    };
    Line { custom_id, payload }
}

fn custom_id(form: Form, name: &str, node: &Node<'_, '_>, faults: &mut Faults) -> Option<String> {
    let Json::Object(members) = node.json else { return None };
    let field = if node.path.is_empty() { name.to_owned() } else { format!("{}.{name}", node.path) };
    let Some((_, value)) = members.iter().find(|(member, _)| member == name) else {
        faults.add(Code::ElementMissing, field, None);
        return None;
    };
    let text = Node { json: value, path: field.clone() }.string(faults)?;
    // A FHIR id has a form of its own (R4, Data Types, id).
    let (fits, rule) = match form {
        Form::Fhir => {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
            (text.len() <= 64 && text.bytes().all(allowed), "1 to 64 of A-Z a-z 0-9 - .".to_owned())
        }
        Form::Plain => {
            let fits = text.chars().count() <= MAX_CUSTOM_ID_CHARS && !text.chars().any(char::is_control);
            (fits, format!("1 to {MAX_CUSTOM_ID_CHARS} characters, none of them a control character"))
        }
    };
    if !fits {
        faults.add(Code::ValueInvalid, field, Some(rule));
        return None;
    }
    Some(text.to_owned())
}

fn plain(node: &Node<'_, '_>, faults: &mut Faults) -> Option<Payload> {
    let members = ["custom_id", "images", "subject", "identifier", "heat_map", "model"];
    let root = node.object(&members, faults)?;
    let items = root.required("images", faults)?.items(faults);
    if !(1..=MAX_IMAGES).contains(&items.len()) {
        faults.add(Code::ImageCount, "images", Some(format!("found {}", items.len())));
        return None;
    }
    let (entries, files): (Vec<_>, Vec<_>) =
        items.iter().filter_map(|item| plain_image(item, faults)).unzip();
    let named = |value| Identifier { use_: None, system: None, value: Some(value) };
    let subject = root.text("subject", faults).map(|value| Reference {
        type_: Some("Patient".into()),
        identifier: Some(Box::new(named(value))),
        ..Reference::default()
    });
    let identifier = root.text("identifier", faults).map(named);
    let mut manifest = Manifest::new(entries, subject, identifier);
    manifest.heat_maps = root.get("heat_map").and_then(|node| heat_map(&node, faults)).unwrap_or(0);
    manifest.model = root.get("model").and_then(|node| model(&node, faults));
    Some(Payload { manifest, images: files })
}

fn plain_image(node: &Node<'_, '_>, faults: &mut Faults) -> Option<(ImageEntry, ImageBytes)> {
    let element = node.object(&["data", "title", "body_site"], faults)?;
    let title = element.text("title", faults);
    let body_site = body_site(&element, faults);
    let data = element.required("data", faults)?;
    let (bytes, format) = parameters::image_file(data.string(faults)?, &data.path, faults)?;
    Some((ImageEntry { bytes: bytes.as_slice().len(), format, title, taken: None, body_site }, bytes))
}

/// A SNOMED CT code, or one of the device API's.
fn body_site(element: &Element<'_, '_>, faults: &mut Faults) -> Option<CodeableConcept> {
    let code = element.token("body_site", faults)?;
    if let Some(site) = sites::find(&code) {
        return Some(site.concept());
    }
    if !is_concept_id(&code) {
        let rule =
            "neither a SNOMED CT concept identifier (its check digit is wrong) nor a code of /body-sites";
        faults.add(Code::ValueInvalid, format!("{}.body_site", element.path), Some(rule.into()));
        return None;
    }
    let coding = Coding { system: Some(SNOMED.into()), version: None, code: Some(code), display: None };
    Some(CodeableConcept { coding: vec![coding], text: None })
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use ::image::{GrayImage, ImageFormat};
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde_json::{Value, json};

    use super::*;

    fn png() -> String {
        let mut file = Cursor::new(Vec::new());
        GrayImage::new(80, 80).write_to(&mut file, ImageFormat::Png).unwrap();
        STANDARD.encode(file.into_inner())
    }

    fn faults(form: Form, line: &Value) -> Vec<(&'static str, String)> {
        let error = parse(form, line.to_string().as_bytes()).payload.unwrap_err();
        error.faults.into_iter().map(|f| (f.code.kind().code, f.field.unwrap_or_default())).collect()
    }

    #[test]
    fn both_forms_say_the_same() {
        let image = json!({"data": png(), "title": "One", "body_site": "66643007"});
        let plain = json!({"custom_id": "a/ü 1.png", "images": [image], "subject": "P-1", "identifier": "O-1", "heat_map": "top-5", "model": "derm7"});
        let plain = parse(Form::Plain, plain.to_string().as_bytes());
        assert_eq!(plain.custom_id.as_deref(), Some("a/ü 1.png"));
        let content = json!({"name": "content", "valueAttachment": {"data": png(), "title": "One"}});
        let site = json!({"name": "bodySite", "valueCodeableConcept": {"coding": [{"system": SNOMED, "code": "66643007"}]}});
        let subject = json!({"type": "Patient", "identifier": {"value": "P-1"}});
        let fhir = json!({"resourceType": "Parameters", "id": "a-1", "parameter": [
            {"name": "image", "part": [content, site]},
            {"name": "subject", "valueReference": subject},
            {"name": "identifier", "valueIdentifier": {"value": "O-1"}},
            {"name": "heatMap", "valueCode": "top-5"},
            {"name": "model", "valueString": "derm7"}]});
        let fhir = parse(Form::Fhir, fhir.to_string().as_bytes());
        assert_eq!(fhir.custom_id.as_deref(), Some("a-1"));
        let fhir = fhir.payload.unwrap();
        assert_eq!(fhir.manifest.heat_maps, 5);
        assert_eq!(fhir, plain.payload.unwrap());
    }

    #[test]
    fn the_faults_of_a_line_are_named() {
        let line = json!({"images": [{"data": "!"}, {"data": png(), "body_site": "1"}], "heat_map": 5, "model": "a b", "vendor": 1});
        let found = faults(Form::Plain, &line);
        let expected = [
            ("element-unknown", "vendor"),
            ("element-type", "heat_map"),
            ("element-missing", "custom_id"),
            ("image-not-base64", "images[0].data"),
            ("value-invalid", "images[1].body_site"),
            ("value-invalid", "model"),
        ];
        assert_eq!(found, expected.map(|(code, field)| (code, field.to_owned())));
        let error = parse(Form::Plain, b"7").payload.unwrap_err();
        assert_eq!((error.code(), error.faults[0].field.as_deref()), (Code::ElementType, None));
        assert_eq!(faults(Form::Plain, &json!({"custom_id": "a", "images": []}))[0].0, "element-missing");
        let id = json!({"resourceType": "Parameters", "id": "a b", "parameter": []});
        assert_eq!(faults(Form::Fhir, &id)[0], ("value-invalid", "Parameters.id".to_owned()));
    }

    #[test]
    fn a_body_site_has_a_code_of_snomed_or_of_the_device_api() {
        for (code, snomed, text) in
            [("66643007", "66643007", None), ("armLeft", "80768000", Some("Left arm"))]
        {
            let line = json!({"custom_id": "a", "images": [{"data": png(), "body_site": code}]});
            let payload = parse(Form::Plain, line.to_string().as_bytes()).payload.unwrap();
            let site = payload.manifest.images[0].body_site.as_ref().unwrap();
            assert_eq!(
                (site.coding[0].system.as_deref(), site.coding[0].code.as_deref()),
                (Some(SNOMED), Some(snomed))
            );
            assert_eq!(site.text.as_deref(), text);
        }
    }

    #[test]
    fn a_line_that_cannot_be_used_keeps_its_name() {
        let line = parse(Form::Plain, br#"{"custom_id": "a", "images": [{"data": "!"}]}"#);
        assert_eq!(line.custom_id.as_deref(), Some("a"));
        assert!(parse(Form::Plain, b"{").custom_id.is_none());
    }
}
