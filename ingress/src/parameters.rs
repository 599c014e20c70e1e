//! The body of `$analyze`: FHIR R4 Parameters, read strictly.
//!
//! Every fault is collected with its FHIRPath, up to a limit, so that one answer mends a whole request. A
//! name that FHIR R4 does not know is refused; an element that it knows and we do not use is let be; a
//! `modifierExtension` and `implicitRules` may turn the meaning round and are refused.

use dermflow_schemas::{
    envelope::{ImageEntry, Manifest, Payload},
    error::{ApiError, Code},
    fhir::{CodeableConcept, Coding, Identifier, Reference, SNOMED},
    image::{self, ImageBytes, ImageFault},
    limits::{MAX_HEAT_MAPS, MAX_IMAGES},
    model::{ModelRef, NoModelName},
};

use crate::{
    element::{Element, Faults, Node},
    fhir::search,
    json::Json,
    snomed::is_concept_id,
};

/// Reads a request body.
pub(crate) fn parse(body: &[u8]) -> Result<Payload, ApiError> {
    let json = Json::parse(body)?;
    read(&Node { json: &json, path: "Parameters".into() })
}

/// Reads Parameters that stand in something larger.
pub(crate) fn read(node: &Node<'_, '_>) -> Result<Payload, ApiError> {
    let mut faults = Faults::default();
    let payload = parameters(node, &mut faults);
    match payload {
        Some(payload) if faults.0.is_empty() => Ok(payload),
        _ => Err(faults.0.into()),
    }
}

fn parameters(node: &Node<'_, '_>, faults: &mut Faults) -> Option<Payload> {
    let root = node.element(&["resourceType", "meta", "language", "parameter"], faults)?;
    let kind = root.required("resourceType", faults)?;
    if kind.string(faults) != Some("Parameters") {
        faults.add(
            Code::ValueInvalid,
            format!("{}.resourceType", root.path),
            Some("expected Parameters".into()),
        );
        return None;
    }
    let (mut entries, mut files, mut images) = (Vec::new(), Vec::new(), 0);
    let (mut subject, mut identifier, mut heat_maps, mut wanted) = (None, None, None, None);
    for item in root.required("parameter", faults)?.items(faults) {
        let names = ["name", "part", "valueReference", "valueIdentifier", "valueCode", "valueString"];
        let Some(parameter) = item.element(&names, faults) else { continue };
        let Some(name) = parameter.required("name", faults).and_then(|name| name.string(faults)) else {
            continue;
        };
        match name {
            "image" => {
                images += 1;
                // Beyond the limit nothing is decoded.
                if images <= MAX_IMAGES
                    && let Some((entry, file)) = analysed_image(&parameter, faults)
                {
                    entries.push(entry);
                    files.push(file);
                }
            }
            "subject" => once(&mut subject, &parameter, "valueReference", reference, faults),
            "identifier" => once(&mut identifier, &parameter, "valueIdentifier", business_identifier, faults),
            "heatMap" => once(&mut heat_maps, &parameter, "valueCode", heat_map, faults),
            "model" => once(&mut wanted, &parameter, "valueString", model, faults),
            _ => faults.add(Code::ParameterUnknown, format!("{}.name", item.path), None),
        }
    }
    if !(1..=MAX_IMAGES).contains(&images) {
        faults.add(Code::ImageCount, format!("{}.parameter", root.path), Some(format!("found {images}")));
    }
    let mut manifest = Manifest::new(entries, subject, identifier);
    manifest.heat_maps = heat_maps.unwrap_or(0);
    manifest.model = wanted;
    Some(Payload { manifest, images: files })
}

/// Reads a parameter that may be there once, from the one value type it may have.
fn once<T>(
    slot: &mut Option<T>,
    parameter: &Element<'_, '_>,
    value: &str,
    read: impl FnOnce(&Node<'_, '_>, &mut Faults) -> Option<T>,
    faults: &mut Faults,
) {
    if slot.is_some() {
        return faults.add(Code::ElementRepeated, &parameter.path, None);
    }
    if let Some(node) = parameter.required(value, faults) {
        *slot = read(&node, faults);
    }
}

/// For how many classes of each image there are heat maps.
pub(crate) fn heat_map(node: &Node<'_, '_>, faults: &mut Faults) -> Option<u32> {
    match node.string(faults)? {
        "none" => Some(0),
        "top-1" => Some(1),
        "top-5" => Some(MAX_HEAT_MAPS),
        _ => {
            faults.add(Code::ValueInvalid, &node.path, Some("none, top-1 or top-5".into()));
            None
        }
    }
}

/// Which model is wanted.
pub(crate) fn model(node: &Node<'_, '_>, faults: &mut Faults) -> Option<ModelRef> {
    let parsed = node.string(faults)?.parse();
    parsed
        .map_err(|rule: NoModelName| faults.add(Code::ValueInvalid, &node.path, Some(rule.to_string())))
        .ok()
}

fn analysed_image(parameter: &Element<'_, '_>, faults: &mut Faults) -> Option<(ImageEntry, ImageBytes)> {
    let (mut content, mut body_site) = (None, None);
    for item in parameter.required("part", faults)?.items(faults) {
        let part = item.element(&["name", "valueAttachment", "valueCodeableConcept"], faults)?;
        match part.required("name", faults)?.string(faults)? {
            "content" => once(&mut content, &part, "valueAttachment", attachment, faults),
            "bodySite" => once(&mut body_site, &part, "valueCodeableConcept", body_site_concept, faults),
            _ => faults.add(Code::ParameterUnknown, format!("{}.name", item.path), None),
        }
    }
    let Some((entry, bytes)) = content else {
        if faults.0.is_empty() {
            faults.add(
                Code::ElementMissing,
                format!("{}.part", parameter.path),
                Some("a part named content".into()),
            );
        }
        return None;
    };
    Some((ImageEntry { body_site, ..entry }, bytes))
}

/// A file and what is said of it, without its body site.
fn attachment(node: &Node<'_, '_>, faults: &mut Faults) -> Option<(ImageEntry, ImageBytes)> {
    let names = ["contentType", "language", "data", "url", "size", "hash", "title", "creation"];
    let attachment = node.element(&names, faults)?;
    let title = attachment.text("title", faults);
    let taken = attachment.get("creation").and_then(|node| date_time(&node, faults));
    let data = attachment.required("data", faults)?;
    let (bytes, format) = image_file(data.string(faults)?, &data.path, faults)?;
    let entry = ImageEntry { bytes: bytes.as_slice().len(), format, title, taken, body_site: None };
    Some((entry, bytes))
}

fn date_time(node: &Node<'_, '_>, faults: &mut Faults) -> Option<String> {
    let read = search::date_time(node.string(faults)?);
    if read.is_none() {
        let rule = "a dateTime: YYYY, YYYY-MM, YYYY-MM-DD, or with a time of day and its zone";
        faults.add(Code::ValueInvalid, &node.path, Some(rule.into()));
    }
    read
}

/// The image file that stands in a request as Base64, whatever the request calls it.
pub(crate) fn image_file(text: &str, path: &str, faults: &mut Faults) -> Option<(ImageBytes, image::Format)> {
    let checked = image::decode_base64(text).and_then(|bytes| Ok((image::check(&bytes)?.format, bytes)));
    match checked {
        Ok((format, bytes)) => Some((bytes, format)),
        Err(fault) => {
            faults.add(image_code(fault), path, Some(fault.to_string()));
            None
        }
    }
}

fn image_code(fault: ImageFault) -> Code {
    match fault {
        ImageFault::NotBase64(_) => Code::ImageNotBase64,
        ImageFault::TooManyBytes(_) => Code::ImageTooManyBytes,
        ImageFault::Format => Code::ImageFormat,
        ImageFault::Header => Code::ImageHeader,
        ImageFault::TooSmall(..) => Code::ImageTooSmall,
        ImageFault::TooLarge(..) => Code::ImageTooLarge,
        ImageFault::KindTooLarge(..) => Code::ImageKindTooLarge,
    }
}

fn body_site_concept(node: &Node<'_, '_>, faults: &mut Faults) -> Option<CodeableConcept> {
    let concept = node.element(&["coding", "text"], faults)?;
    let text = concept.text("text", faults);
    let nodes = concept.get("coding").map(|list| list.items(faults)).unwrap_or_default();
    let coding = nodes.iter().filter_map(|node| body_site_coding(node, faults)).collect::<Vec<_>>();
    if text.is_none() && nodes.is_empty() {
        faults.add(Code::ElementMissing, format!("{}.coding", node.path), None);
    }
    Some(CodeableConcept { coding, text })
}

fn body_site_coding(node: &Node<'_, '_>, faults: &mut Faults) -> Option<Coding> {
    let element = node.element(&["system", "version", "code", "display", "userSelected"], faults)?;
    let coding = Coding {
        system: element.token("system", faults),
        version: element.text("version", faults),
        code: element.token("code", faults),
        display: element.text("display", faults),
    };
    if coding.code.is_none() {
        faults.add(Code::ElementMissing, format!("{}.code", node.path), None);
    }
    let wrong = |code: &String| !is_concept_id(code);
    if coding.system.as_deref() == Some(SNOMED) && coding.code.as_ref().is_some_and(wrong) {
        let rule = "not a SNOMED CT concept identifier (its check digit is wrong)";
        faults.add(Code::ValueInvalid, format!("{}.code", node.path), Some(rule.into()));
    }
    Some(coding)
}

fn reference(node: &Node<'_, '_>, faults: &mut Faults) -> Option<Reference> {
    let element = node.element(&["reference", "type", "identifier", "display"], faults)?;
    let literal = element.token("reference", faults);
    if literal.as_ref().is_some_and(|literal| literal.starts_with('#')) {
        let rule = "a contained resource cannot be referred to";
        faults.add(Code::ValueInvalid, format!("{}.reference", node.path), Some(rule.into()));
    }
    let type_ = element.token("type", faults);
    let is_type = |name: &String| name.starts_with(|c: char| c.is_ascii_uppercase()) && name.is_ascii();
    if !type_.as_ref().is_none_or(is_type) {
        let rule = "a resource type, such as Patient";
        faults.add(Code::ValueInvalid, format!("{}.type", node.path), Some(rule.into()));
    }
    let identifier =
        element.get("identifier").and_then(|node| business_identifier(&node, faults)).map(Box::new);
    let display = element.text("display", faults);
    if literal.is_none() && identifier.is_none() && display.is_none() {
        faults.add(Code::ElementMissing, format!("{}.identifier", node.path), None);
    }
    Some(Reference { reference: literal, type_, identifier, display })
}

fn business_identifier(node: &Node<'_, '_>, faults: &mut Faults) -> Option<Identifier> {
    let element = node.element(&["use", "type", "system", "value", "period", "assigner"], faults)?;
    let use_ = element.token("use", faults);
    let allowed = ["usual", "official", "temp", "secondary", "old"];
    if !use_.as_deref().is_none_or(|text| allowed.contains(&text)) {
        faults.add(Code::ValueInvalid, format!("{}.use", node.path), Some(allowed.join(", ")));
    }
    let identifier =
        Identifier { use_, system: element.token("system", faults), value: element.text("value", faults) };
    if identifier.value.is_none() {
        faults.add(Code::ElementMissing, format!("{}.value", node.path), None);
    }
    Some(identifier)
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

    fn request() -> Value {
        json!({
            "resourceType": "Parameters",
            "parameter": [
                {"name": "image", "part": [
                    {"name": "content", "valueAttachment": {"contentType": "image/png", "data": png(), "title": "One"}},
                    {"name": "bodySite", "valueCodeableConcept": {"coding": [
                        {"system": SNOMED, "code": "66643007", "display": "Skin of back"}]}}]},
                {"name": "subject", "valueReference": {"type": "Patient", "identifier": {"value": "P-1"}}},
                {"name": "identifier", "valueIdentifier": {"system": "https://h.example/orders", "value": "ORD-1"}},
                {"name": "heatMap", "valueCode": "none"}
            ]
        })
    }

    fn faults(request: &Value) -> Vec<(&'static str, String)> {
        let error = parse(request.to_string().as_bytes()).unwrap_err();
        error.faults.into_iter().map(|f| (f.code.kind().code, f.field.unwrap_or_default())).collect()
    }

    /// Changes a request by JSON pointer and expects exactly one fault.
    fn expect_one(pointer: &str, value: Value, code: &str, field: &str) {
        let mut changed = request();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        match changed.pointer_mut(parent).unwrap() {
            Value::Object(members) => drop(members.insert(name.into(), value)),
            Value::Array(items) => items.push(value),
            _ => panic!("{pointer} has no members"),
        }
        assert_eq!(faults(&changed), [(code_of(code), field.to_owned())], "{pointer}");
    }

    fn code_of(code: &str) -> &'static str {
        dermflow_schemas::error::CODES.iter().map(|c| c.kind().code).find(|c| *c == code).unwrap()
    }

    #[test]
    fn a_complete_request_is_read() {
        let payload = parse(request().to_string().as_bytes()).unwrap();
        assert_eq!(payload.images.len(), 1);
        assert_eq!(payload.manifest.images[0].title.as_deref(), Some("One"));
        let site = payload.manifest.images[0].body_site.as_ref().unwrap();
        assert_eq!(site.coding[0].code.as_deref(), Some("66643007"));
        assert_eq!(payload.manifest.identifier.unwrap().value.as_deref(), Some("ORD-1"));
    }

    #[test]
    fn heat_maps_are_asked_for_by_their_number() {
        let mut request = request();
        for (code, number) in [("none", 0), ("top-1", 1), ("top-5", 5)] {
            request["parameter"][3]["valueCode"] = json!(code);
            assert_eq!(parse(request.to_string().as_bytes()).unwrap().manifest.heat_maps, number);
        }
        request["parameter"].as_array_mut().unwrap().pop();
        assert_eq!(parse(request.to_string().as_bytes()).unwrap().manifest.heat_maps, 0);
    }

    #[test]
    fn a_model_is_asked_for_by_name_and_version() {
        let mut request = request();
        assert_eq!(parse(request.to_string().as_bytes()).unwrap().manifest.model, None);
        for text in ["derm7", "derm7@2026.11.1"] {
            request["parameter"][3] = json!({"name": "model", "valueString": text});
            let wanted = parse(request.to_string().as_bytes()).unwrap().manifest.model;
            assert_eq!(wanted.map(|wanted| wanted.to_string()).as_deref(), Some(text));
        }
        request["parameter"][3]["valueString"] = json!("derm7@");
        let place = "Parameters.parameter[3].valueString".to_owned();
        assert_eq!(faults(&request), [("value-invalid", place)]);
    }

    #[test]
    fn each_fault_is_named_with_its_place() {
        let content = "Parameters.parameter[0].part[0].valueAttachment";
        let attachment = "/parameter/0/part/0/valueAttachment";
        let data = format!("{content}.data");
        expect_one("/vendor", json!(1), "element-unknown", "Parameters.vendor");
        expect_one("/a \u{1}`b", json!(1), "element-unknown", "Parameters.`a \\u0001\\`b`");
        expect_one("/implicitRules", json!("http://x"), "modifier-extension", "Parameters.implicitRules");
        expect_one(
            "/parameter/1/modifierExtension",
            json!([]),
            "modifier-extension",
            "Parameters.parameter[1].modifierExtension",
        );
        expect_one("/resourceType", json!("Bundle"), "value-invalid", "Parameters.resourceType");
        expect_one("/parameter/-", json!({"name": "x"}), "parameter-unknown", "Parameters.parameter[4].name");
        expect_one("/parameter/-", json!(7), "element-type", "Parameters.parameter[4]");
        let again = json!({"name": "heatMap", "valueCode": "none"});
        expect_one("/parameter/-", again, "element-repeated", "Parameters.parameter[4]");
        expect_one(
            "/parameter/3/valueCode",
            json!("all"),
            "value-invalid",
            "Parameters.parameter[3].valueCode",
        );
        expect_one(
            &format!("{attachment}/data"),
            json!("data:image/png;base64,AAEC"),
            "image-not-base64",
            &data,
        );
        expect_one(&format!("{attachment}/data"), json!("AAEC"), "image-format", &data);
        expect_one(&format!("{attachment}/data"), json!(7), "element-type", &data);
        expect_one(&format!("{attachment}/foo"), json!(7), "element-unknown", &format!("{content}.foo"));
        expect_one(
            &format!("{attachment}/title"),
            json!("a\u{0}"),
            "value-invalid",
            &format!("{content}.title"),
        );
        let site = "/parameter/0/part/1/valueCodeableConcept/coding/0";
        let place = "Parameters.parameter[0].part[1].valueCodeableConcept.coding[0].code";
        expect_one(&format!("{site}/code"), json!("66643008"), "value-invalid", place);
        let subject = "Parameters.parameter[1].valueReference.reference";
        expect_one("/parameter/1/valueReference/reference", json!("#p"), "value-invalid", subject);
    }

    #[test]
    fn an_image_may_say_when_it_was_taken() {
        let mut request = request();
        assert_eq!(parse(request.to_string().as_bytes()).unwrap().manifest.images[0].taken, None);
        for (creation, taken) in
            [("2026-02", "2026-02"), ("2026-02-13T15:58:25+01:00", "2026-02-13T14:58:25.000Z")]
        {
            request["parameter"][0]["part"][0]["valueAttachment"]["creation"] = json!(creation);
            let payload = parse(request.to_string().as_bytes()).unwrap();
            assert_eq!(payload.manifest.images[0].taken.as_deref(), Some(taken));
        }
        let place = "Parameters.parameter[0].part[0].valueAttachment.creation";
        let creation = "/parameter/0/part/0/valueAttachment/creation";
        expect_one(creation, json!("yesterday"), "value-invalid", place);
        expect_one(creation, json!("2026-02-13T15:58:25"), "value-invalid", place);
        expect_one(creation, json!(2026), "element-type", place);
    }

    #[test]
    fn legal_elements_that_are_not_used_are_let_be() {
        let mut full = request();
        full["id"] = json!("r1");
        full["meta"] = json!({"tag": [{"code": "x"}]});
        full["parameter"][0]["part"][0]["valueAttachment"]["size"] = json!(1);
        full["parameter"][0]["part"][0]["valueAttachment"]["_title"] = json!({"extension": []});
        full["parameter"][1]["valueReference"]["extension"] =
            json!([{"url": "http://x", "valueBoolean": true}]);
        assert!(parse(full.to_string().as_bytes()).is_ok());
    }

    #[test]
    fn one_to_three_images_and_every_fault_at_once() {
        let mut none = request();
        none["parameter"].as_array_mut().unwrap().remove(0);
        assert_eq!(faults(&none), [("image-count", "Parameters.parameter".to_owned())]);
        let mut four = request();
        let image = four["parameter"][0].clone();
        four["parameter"].as_array_mut().unwrap().extend([image.clone(), image.clone(), image]);
        assert_eq!(faults(&four), [("image-count", "Parameters.parameter".to_owned())]);
        let mut two = request();
        let mut bad = two["parameter"][0].clone();
        bad["part"][0]["valueAttachment"]["data"] = json!("R0lG");
        two["parameter"].as_array_mut().unwrap().push(bad);
        two["parameter"][0]["part"][0]["valueAttachment"]["data"] = json!("####");
        assert_eq!(
            faults(&two).iter().map(|(code, _)| *code).collect::<Vec<_>>(),
            ["image-not-base64", "image-format"]
        );
    }
}
