//! From probabilities to a FHIR R4 `DiagnosticReport`. Pure: times and ids come in as arguments.
//!
//! What the model does not measure (quality, domain, modality) is absent. Every number that is printed
//! follows from printed numbers: a distribution sums to 100.00 %, the suspicion of malignancy is the sum of its
//! classes, the entropy is that of the distribution as it stands there, an area is that of its outline.

use dermflow_schemas::{
    envelope::{ImageEntry, Manifest},
    fhir::{
        Annotation, Attachment, CANONICAL, CodeableConcept, Coding, Component, Contained, Device, DeviceName,
        DeviceProperty, DeviceVersion, DiagnosticReport, ICD11, ICD11_VERSION, Identifier, Media, Meta,
        Narrative, Observation, Quantity, ReferenceRange, ReportMedia, Resource, coding, contained, hl7,
        local, percent, pixels, xhtml,
    },
    id::JobId,
};
use time::OffsetDateTime;

use crate::{
    analyse::Finding,
    model::{Class, Metric, Model},
};

/// The version of decoding and resizing: another one may change the numbers.
const PREPROCESSING: &str = "squash-bilinear-1";
const SIMULATED: &str = "SIMULATED: no model looked at the images, the numbers mean nothing.";
const NOT_REVIEWED: &str =
    "Preliminary result of automatic skin image analysis, not reviewed by a clinician.";

/// All that a report is made from.
#[derive(Clone, Copy)]
pub struct Case<'a> {
    /// The job, and so the report.
    pub job: JobId,
    /// When the images reached us.
    pub accepted_at: OffsetDateTime,
    /// When the analysis was finished.
    pub finished_at: OffsetDateTime,
    /// What the caller said.
    pub manifest: &'a Manifest,
    /// One per image of the manifest.
    pub findings: &'a [Finding],
    /// What the numbers are from.
    pub model: &'a Model,
}

/// The report.
pub fn build(case: &Case<'_>) -> DiagnosticReport {
    let several = case.findings.len() > 1;
    let mut readings: Vec<Reading> = (1..)
        .zip(case.findings)
        .map(|(n, finding)| Reading::new(n.to_string(), n..=n, &finding.probabilities))
        .collect();
    if several {
        readings.push(case.joint_reading());
    }
    let observations: Vec<Contained> = readings.iter().flat_map(|r| case.observations(r, several)).collect();
    let result = observations.iter().map(|o| contained(&o.id, Some(&title_of(o, several)))).collect();
    let media = (1..=case.findings.len()).map(|n| ReportMedia {
        comment: Some(format!("Submitted image {n}")),
        link: contained(&image_id(n), None),
    });
    let mut code = CodeableConcept::from(local("skin-image-analysis-report", "Skin image analysis report"));
    code.coding.push(coding("http://loinc.org", "100063-7", "Primary skin concern"));
    code.text = Some("Automatic skin image analysis".into());
    let own = Identifier {
        use_: Some("official".into()),
        system: Some("urn:ietf:rfc:3986".into()),
        value: Some(format!("urn:uuid:{}", case.job)),
    };
    DiagnosticReport {
        id: case.job.to_string(),
        meta: case.meta(),
        language: "en".into(),
        text: case.narrative(&readings),
        identifier: std::iter::once(own).chain(case.manifest.identifier.clone()).collect(),
        status: "preliminary",
        category: vec![hl7("v2-0074", "IMG", "Diagnostic Imaging").into()],
        code,
        subject: case.manifest.subject.clone(),
        effective: Some(case.accepted_at),
        issued: Some(case.finished_at),
        result,
        media: media.collect(),
        // The last reading speaks for all images.
        conclusion: readings.last().map(|reading| case.conclusion(reading)),
        contained: [contained_as("device", Resource::Device(Box::new(case.device())))]
            .into_iter()
            .chain(case.images())
            .chain(observations)
            .collect(),
    }
}

/// A distribution as it is printed.
struct Reading {
    /// `1`, `2`… for an image, `joint` for all.
    suffix: String,
    /// Images from 1.
    images: std::ops::RangeInclusive<usize>,
    /// Hundredths of a per cent, in the order of the model's classes; the sum is 10,000.
    points: Vec<u32>,
    /// Classes by descending probability.
    order: Vec<usize>,
}

impl Reading {
    fn new(suffix: String, images: std::ops::RangeInclusive<usize>, probabilities: &[f64]) -> Self {
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|a, b| probabilities[*b].total_cmp(&probabilities[*a]));
        Self { suffix, images, points: basis_points(probabilities), order }
    }

    fn first(&self) -> usize {
        self.order[0]
    }

    /// Hundredths of a per cent of the malignant classes together, when the model judges that.
    fn malignancy(&self, model: &Model) -> Option<u32> {
        model.malignancy?;
        let malignant = self.points.iter().zip(&model.classes).filter(|(_, class)| class.malignant);
        Some(malignant.map(|(points, _)| points).sum())
    }
}

/// Rounds a distribution to hundredths of a per cent that sum to 10,000: the largest remainders are rounded up.
fn basis_points(probabilities: &[f64]) -> Vec<u32> {
    let scaled: Vec<f64> = probabilities.iter().map(|p| p * 10_000.0).collect();
    let mut points: Vec<u32> = scaled.iter().map(|p| *p as u32).collect();
    let mut by_remainder: Vec<usize> = (0..points.len()).collect();
    by_remainder.sort_by(|a, b| scaled[*b].fract().total_cmp(&scaled[*a].fract()));
    let missing = 10_000u32.saturating_sub(points.iter().sum());
    for class in by_remainder.into_iter().cycle().take(missing as usize) {
        points[class] += 1;
    }
    points
}

/// The entropy as a share of the largest possible one, in hundredths of a per cent.
fn normalised_entropy(points: &[u32]) -> u32 {
    let term = |points: &u32| {
        let p = f64::from(*points) / 10_000.0;
        if *points == 0 { 0.0 } else { -p * p.ln() }
    };
    let entropy: f64 = points.iter().map(term).sum();
    (entropy / (points.len() as f64).ln() * 10_000.0).round() as u32
}

fn in_words(points: u32) -> String {
    format!("{}.{:02} %", points / 100, points % 100)
}

fn image_id(n: usize) -> String {
    format!("image-{n}")
}

fn contained_as(id: impl Into<String>, resource: Resource) -> Contained {
    Contained { id: id.into(), resource }
}

fn note(text: impl Into<String>) -> Vec<Annotation> {
    vec![Annotation { text: text.into() }]
}

/// The display of an observation's code, and which images it is about when there are several.
fn title_of(observation: &Contained, several: bool) -> String {
    let Resource::Observation(resource) = &observation.resource else { return String::new() };
    let code = resource.code.coding.first().and_then(|coding| coding.display.clone()).unwrap_or_default();
    match observation.id.rsplit_once('-') {
        Some((_, "joint")) => format!("{code}, all images"),
        Some((_, n)) if several => format!("{code}, image {n}"),
        _ => code,
    }
}

fn class_concept(class: &Class) -> CodeableConcept {
    let icd11 = class.icd11.as_ref().map(|icd11| Coding {
        version: Some(ICD11_VERSION.into()),
        ..coding(ICD11, &icd11.code, &icd11.display)
    });
    let own = local(&format!("class-{}", class.code), &class.display);
    CodeableConcept { coding: icd11.into_iter().chain([own]).collect(), text: Some(class.display.clone()) }
}

impl Case<'_> {
    /// All images pooled: the arithmetic mean of their probabilities.
    fn joint_reading(&self) -> Reading {
        let images = self.findings.len();
        let mean = |class: usize| {
            self.findings.iter().map(|finding| finding.probabilities[class]).sum::<f64>() / images as f64
        };
        let pooled: Vec<f64> = (0..self.model.classes.len()).map(mean).collect();
        Reading::new("joint".into(), 1..=images, &pooled)
    }

    fn meta(&self) -> Meta {
        let mut security = vec![hl7("v3-ObservationValue", "AIAST", "Artificial Intelligence asserted")];
        if self.model.is_simulated() {
            security.push(hl7("v3-ActReason", "HTEST", "test health data"));
        }
        Meta { version_id: Some("1".into()), last_updated: Some(self.finished_at), security }
    }

    fn device(&self) -> Device {
        let model = self.model;
        let (mark, warning) =
            if model.is_simulated() { ("SIMULATED ", format!(" {SIMULATED}")) } else { ("", String::new()) };
        let name = |name: &str, type_| DeviceName { name: format!("{mark}{name}"), type_ };
        let version = |part: &str, value: String| DeviceVersion {
            type_: CodeableConcept { text: Some(part.into()), ..CodeableConcept::default() },
            value,
        };
        let mut type_ = CodeableConcept::from(coding(
            "http://hl7.org/fhir/uv/aitransparency/CodeSystem/AIdeviceTypeCS",
            "Artificial-Intelligence",
            "All kinds of Artificial Intelligence",
        ));
        type_.text = Some("Image classification software".into());
        Device {
            identifier: vec![sid("model", format!("sha256:{}", model.digest))],
            status: "active",
            manufacturer: Some("Dermflow".into()),
            device_name: vec![
                name("Dermflow skin image analyser", "user-friendly-name"),
                name(&model.name, "model-name"),
            ],
            type_: Some(type_),
            version: vec![
                version("software", env!("CARGO_PKG_VERSION").into()),
                version("model", format!("{}-{}", model.name, model.version)),
                version("preprocessing", PREPROCESSING.into()),
            ],
            property: model.metrics.iter().map(property).collect(),
            note: note(format!(
                "Model: {}. Licence of the model: {}. Not a medical device.{warning}",
                model.title, model.licence
            )),
        }
    }

    fn images(&self) -> impl Iterator<Item = Contained> {
        let pairs = self.manifest.images.iter().zip(self.findings).enumerate();
        pairs.map(|(index, (entry, finding))| {
            let media = self.media(index + 1, entry, finding);
            contained_as(image_id(index + 1), Resource::Media(Box::new(media)))
        })
    }

    fn media(&self, n: usize, entry: &ImageEntry, finding: &Finding) -> Media {
        Media {
            identifier: vec![sid("image-sha256", finding.sha256.clone())],
            status: "completed",
            type_: Some(hl7("media-type", "image", "Image").into()),
            subject: self.manifest.subject.clone(),
            created: Some(self.accepted_at),
            body_site: entry.body_site.clone(),
            height: Some(finding.height),
            width: Some(finding.width),
            content: Attachment {
                content_type: Some(entry.format.media_type().into()),
                size: Some(entry.bytes),
                hash: Some(finding.sha1.clone()),
                title: entry.title.clone(),
            },
            note: note(format!(
                "Submitted image {n}. The pixels are not echoed; hash is SHA-1 as FHIR R4 requires, the SHA-256 \
                 is in identifier."
            )),
        }
    }

    fn observations(&self, reading: &Reading, several: bool) -> Vec<Contained> {
        let pooled = several && reading.images.clone().count() > 1;
        let name = |kind: &str| format!("{kind}-{}", reading.suffix);
        let classification = self.classification(reading, pooled);
        let mut all = vec![contained_as(name("classification"), classification)];
        if let Some(points) = reading.malignancy(self.model) {
            all.push(contained_as(name("malignancy"), self.malignancy(reading, points)));
        }
        if !pooled && self.model.outlines() {
            all.push(contained_as(name("extent"), self.extent(reading)));
        }
        all
    }

    /// Where the lesion is in an image, and how much of it.
    fn extent(&self, reading: &Reading) -> Resource {
        let finding = &self.findings[*reading.images.start() - 1];
        let measured = |code: &str, display: &str, value: Quantity| Component {
            code: local(code, display).into(),
            value_quantity: Some(value),
            ..Component::default()
        };
        let (share, component) = finding.outline.as_ref().map_or((0, Vec::new()), |outline| {
            let [left, top, width, height] = outline.bounds();
            let polygon = Component {
                code: local("lesion-polygon", "Lesion outline in pixel coordinates").into(),
                value_string: Some(outline.wkt()),
                ..Component::default()
            };
            let mut parts = vec![
                polygon,
                measured("bbox-x", "Bounding box left", pixels(left)),
                measured("bbox-y", "Bounding box top", pixels(top)),
                measured("bbox-width", "Bounding box width", pixels(width)),
                measured("bbox-height", "Bounding box height", pixels(height)),
            ];
            let confidence = outline.confidence().map(percent);
            parts.extend(confidence.map(|value| measured("ai-confidence", "Confidence of the model", value)));
            (outline.share(finding.width, finding.height), parts)
        });
        let text = if finding.outline.is_some() {
            "The largest connected lesion, holes in it filled. Columns and rows of the image as displayed, from its upper left corner. No \
             measure of length: the image has no scale."
        } else {
            "No lesion was found in the image."
        };
        let code = local("lesion-area-fraction", "Lesion area as a fraction of the image");
        Resource::Observation(Box::new(Observation {
            value_quantity: Some(percent(share)),
            note: note(text),
            component,
            ..self.observation(code, reading)
        }))
    }

    fn classification(&self, reading: &Reading, pooled: bool) -> Resource {
        let classes = &self.model.classes;
        let component = |class: &usize| Component {
            code: class_concept(&classes[*class]),
            value_quantity: Some(percent(reading.points[*class])),
            ..Component::default()
        };
        let entropy = Component {
            code: local("normalised-entropy", "Normalised entropy of the distribution").into(),
            value_quantity: Some(percent(normalised_entropy(&reading.points))),
            ..Component::default()
        };
        let mut text =
            "The value is only the class with the highest probability. It is not a diagnosis.".to_owned();
        if pooled {
            text.push_str(" Pooled: the arithmetic mean of the probabilities of all images.");
        }
        let code = local("condition-distribution", "Probability distribution over skin condition classes");
        Resource::Observation(Box::new(Observation {
            value_codeable_concept: Some(class_concept(&classes[reading.first()])),
            note: note(text),
            component: reading.order.iter().map(component).chain([entropy]).collect(),
            ..self.observation(code, reading)
        }))
    }

    fn malignancy(&self, reading: &Reading, points: u32) -> Resource {
        let threshold = self.threshold();
        let (code, display, text) = if points >= threshold {
            ("H", "High", "At or above the referral threshold")
        } else {
            ("N", "Normal", "Below the referral threshold")
        };
        let mut interpretation = CodeableConcept::from(hl7("v3-ObservationInterpretation", code, display));
        interpretation.text = Some(text.into());
        let range = ReferenceRange {
            high: Some(percent(threshold)),
            text: Some(format!(
                "Below {}: no referral suggested by this threshold alone",
                in_words(threshold)
            )),
        };
        let malignant = self.model.classes.iter().filter(|class| class.malignant);
        let names: Vec<&str> = malignant.map(|class| class.display.as_str()).collect();
        Resource::Observation(Box::new(Observation {
            value_quantity: Some(percent(points)),
            interpretation: vec![interpretation],
            note: note(format!("Sum of the probabilities of: {}.", names.join("; "))),
            reference_range: vec![range],
            ..self.observation(local("malignancy-suspicion", "Suspicion of malignancy"), reading)
        }))
    }

    /// In hundredths of a per cent.
    fn threshold(&self) -> u32 {
        self.model.malignancy.map_or(0, |malignancy| (malignancy.threshold * 10_000.0).round() as u32)
    }

    /// What every observation has in common.
    fn observation(&self, code: Coding, reading: &Reading) -> Observation {
        let sites = &self.manifest.images[reading.images.start() - 1..*reading.images.end()];
        let agreed = sites.iter().all(|entry| entry.body_site == sites[0].body_site);
        Observation {
            status: "preliminary",
            category: vec![hl7("observation-category", "imaging", "Imaging").into()],
            code: code.into(),
            subject: self.manifest.subject.clone(),
            effective: Some(self.accepted_at),
            issued: Some(self.finished_at),
            body_site: sites[0].body_site.clone().filter(|_| agreed),
            method: Some(local("ai-inference", "Artificial intelligence inference").into()),
            device: Some(contained("device", None)),
            derived_from: reading.images.clone().map(|n| contained(&image_id(n), None)).collect(),
            ..Observation::default()
        }
    }

    fn narrative(&self, readings: &[Reading]) -> Narrative {
        let warning = self.model.is_simulated().then(|| SIMULATED.to_owned());
        let line = |reading: &Reading| {
            let images = match reading.suffix.as_str() {
                "joint" => "All images".to_owned(),
                n => format!("Image {n}"),
            };
            let first = reading.first();
            let malignancy = reading.malignancy(self.model);
            format!(
                "{images}: most probable class: {} {}.{}",
                self.model.classes[first].display,
                in_words(reading.points[first]),
                malignancy.map(|p| format!(" Suspicion of malignancy {}.", in_words(p))).unwrap_or_default()
            )
        };
        let lines = warning.into_iter().chain([NOT_REVIEWED.to_owned()]).chain(readings.iter().map(line));
        let paragraphs: Vec<String> = lines.map(|line| format!("<p>{}</p>", xhtml(&line))).collect();
        Narrative {
            status: "generated".into(),
            div: format!("<div xmlns=\"http://www.w3.org/1999/xhtml\">{}</div>", paragraphs.concat()),
        }
    }

    fn conclusion(&self, reading: &Reading) -> String {
        let first = reading.first();
        let warning = if self.model.is_simulated() { format!("{SIMULATED} ") } else { String::new() };
        let malignancy = match reading.malignancy(self.model) {
            Some(points) if points >= self.threshold() => {
                " Suspicion of malignancy at or above the referral threshold."
            }
            Some(_) => " Suspicion of malignancy below the referral threshold.",
            None => "",
        };
        format!(
            "{warning}Preliminary result of an automatic analysis. Highest probability: {} ({}).{malignancy} Not \
             a diagnosis; needs review by a clinician.",
            self.model.classes[first].display,
            in_words(reading.points[first])
        )
    }
}

fn sid(kind: &str, value: String) -> Identifier {
    Identifier { use_: None, system: Some(format!("{CANONICAL}/sid/{kind}")), value: Some(value) }
}

fn property(metric: &Metric) -> DeviceProperty {
    let points = |fraction: f64| (fraction * 10_000.0).round() as u32;
    let mut type_ = CodeableConcept::from(local(&metric.code, &metric.display));
    type_.text = Some(format!(
        "{}, 95 % interval {} to {}",
        metric.display,
        in_words(points(metric.low)),
        in_words(points(metric.high))
    ));
    DeviceProperty { type_, value_quantity: vec![percent(points(metric.value))] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::simulated;
    use dermflow_schemas::{
        fhir::{Reference, SNOMED},
        image::Format,
    };
    use serde_json::{Value, json};

    fn finding(probabilities: [f64; 3]) -> Finding {
        Finding {
            width: 300,
            height: 225,
            sha256: "ab".repeat(32),
            sha1: "5NR6OqOJf+99TunbuwywnkxtcnA=".into(),
            probabilities: probabilities.to_vec(),
            outline: None,
        }
    }

    fn entry(site: Option<&str>) -> ImageEntry {
        ImageEntry {
            bytes: 26,
            format: Format::Jpeg,
            title: Some("Close-up".into()),
            body_site: site.map(|code| coding(SNOMED, code, "Skin").into()),
        }
    }

    fn report(model: &Model, images: &[(Option<&str>, [f64; 3])]) -> Value {
        let identifier =
            Identifier { system: Some("urn:x".into()), value: Some("A-1".into()), ..Identifier::default() };
        let subject = Reference { display: Some("P-1".into()), ..Reference::default() };
        let manifest = Manifest::new(
            images.iter().map(|(site, _)| entry(*site)).collect(),
            Some(subject),
            Some(identifier),
        );
        let findings: Vec<Finding> = images.iter().map(|(_, p)| finding(*p)).collect();
        let case = Case {
            job: "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f".parse().unwrap(),
            accepted_at: OffsetDateTime::UNIX_EPOCH,
            finished_at: OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(2),
            manifest: &manifest,
            findings: &findings,
            model,
        };
        serde_json::from_slice(&Resource::DiagnosticReport(Box::new(build(&case))).to_json()).unwrap()
    }

    fn resource<'a>(report: &'a Value, id: &str) -> &'a Value {
        let all = report["contained"].as_array().unwrap();
        all.iter().find(|resource| resource["id"] == id).unwrap_or_else(|| panic!("no {id}"))
    }

    /// Printed percentages of the classes, as hundredths, in printed order; the entropy is last.
    fn printed(observation: &Value) -> Vec<(String, i64)> {
        let components = observation["component"].as_array().unwrap();
        let value = |c: &Value| (c["valueQuantity"]["value"].as_f64().unwrap() * 100.0).round() as i64;
        let code = |c: &Value| c["code"]["coding"].as_array().unwrap().last().unwrap()["code"].clone();
        components.iter().map(|c| (code(c).as_str().unwrap().to_owned(), value(c))).collect()
    }

    const THIRDS: [f64; 3] = [1.0 / 3.0; 3];
    const SITE: Option<&str> = Some("66643007");

    #[test]
    fn a_distribution_sums_to_a_hundred_and_keeps_its_order() {
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f64
        };
        for classes in 2..40 {
            let weights: Vec<f64> = (0..classes).map(|_| random().powi(3)).collect();
            let sum: f64 = weights.iter().sum();
            let probabilities: Vec<f64> = weights.iter().map(|weight| weight / sum).collect();
            let reading = Reading::new(String::new(), 1..=1, &probabilities);
            assert_eq!(reading.points.iter().sum::<u32>(), 10_000);
            assert!(reading.order.is_sorted_by(|a, b| reading.points[*a] >= reading.points[*b]));
            for (points, p) in reading.points.iter().zip(probabilities) {
                assert!((f64::from(*points) - p * 10_000.0).abs() <= 1.0);
            }
        }
        assert_eq!(basis_points(&[1.0, 0.0]), [10_000, 0]);
    }

    /// The figures of a published example.
    #[test]
    fn the_entropy_is_that_of_the_printed_distribution() {
        assert_eq!(normalised_entropy(&[6_142, 2_410, 835, 305, 176, 87, 45]), 5_616);
        assert_eq!(normalised_entropy(&[10_000, 0]), 0);
        assert_eq!(normalised_entropy(&[5_000, 5_000]), 10_000);
    }

    #[test]
    fn what_is_printed_agrees_with_itself() {
        let report = report(&simulated(&[]), &[(SITE, [0.111_111, 0.222_222, 0.666_667])]);
        let classification = printed(resource(&report, "classification-1"));
        let codes: Vec<&str> = classification.iter().map(|(code, _)| code.as_str()).collect();
        assert_eq!(codes, ["class-nv", "class-bcc", "class-mel", "normalised-entropy"]);
        let [nv, bcc, mel, _] = [0, 1, 2, 3].map(|n: usize| classification[n].1);
        assert_eq!(nv + bcc + mel, 10_000);
        let malignancy = resource(&report, "malignancy-1");
        let value = malignancy["valueQuantity"]["value"].as_f64().unwrap() * 100.0;
        assert_eq!(value.round() as i64, bcc + mel);
        assert_eq!(malignancy["interpretation"][0]["coding"][0]["code"], "H");
        assert_eq!(malignancy["referenceRange"][0]["high"]["value"], json!(16.5));
        assert_eq!(report["status"], "preliminary");
        assert_eq!(report["issued"], "1970-01-01T00:00:02.000Z");
        assert_eq!(report["identifier"][1]["value"], "A-1");
        assert!(report["conclusion"].as_str().unwrap().ends_with("needs review by a clinician."));
    }

    #[test]
    fn several_images_are_pooled_and_the_site_is_theirs_when_they_agree() {
        let model = simulated(&[]);
        let images = [(SITE, [0.0, 0.0, 1.0]), (SITE, [0.0, 0.1, 0.9]), (Some("1902009"), THIRDS)];
        let mixed = report(&model, &images);
        let joint = resource(&mixed, "classification-joint");
        assert_eq!(
            joint["derivedFrom"],
            json!([1, 2, 3].map(|n| json!({"reference": format!("#image-{n}")})))
        );
        assert_eq!(printed(joint)[0], ("class-nv".to_owned(), 7_444));
        assert!(joint.get("bodySite").is_none());
        assert_eq!(resource(&mixed, "malignancy-2")["interpretation"][0]["coding"][0]["code"], "N");
        assert_eq!(mixed["result"].as_array().unwrap().len(), 8);
        let agreeing = report(&model, &images[..2]);
        assert_eq!(resource(&agreeing, "malignancy-joint")["bodySite"]["coding"][0]["code"], "66643007");
    }

    /// FHIR's dom-3 (no contained resource unused), and no reference to nothing.
    #[test]
    fn contained_resources_and_references_match() {
        let report = report(&simulated(&[]), &[(None, THIRDS), (None, THIRDS)]);
        let text = report.to_string();
        let ids: Vec<&str> =
            report["contained"].as_array().unwrap().iter().map(|c| c["id"].as_str().unwrap()).collect();
        for id in &ids {
            assert!(text.contains(&format!("\"reference\":\"#{id}\"")), "{id} is not referred to");
        }
        for reference in text.split("\"reference\":\"#").skip(1) {
            let id = reference.split('"').next().unwrap();
            assert!(ids.contains(&id), "{id} is not there");
        }
    }

    #[test]
    fn a_simulated_report_says_so_everywhere() {
        let report = report(&simulated(&[]), &[(None, THIRDS)]);
        let device = resource(&report, "device");
        let places = [
            &report["text"]["div"],
            &report["conclusion"],
            &device["note"][0]["text"],
            &device["deviceName"][0]["name"],
            &device["deviceName"][1]["name"],
        ];
        for place in places {
            assert!(place.as_str().unwrap().contains("SIMULATED"), "{place}");
        }
        let labels: Vec<&str> = report["meta"]["security"]
            .as_array()
            .unwrap()
            .iter()
            .map(|label| label["code"].as_str().unwrap())
            .collect();
        assert_eq!(labels, ["AIAST", "HTEST"]);
    }

    #[test]
    fn the_narrative_is_escaped() {
        let report = report(&simulated(&[]), &[(None, [0.0, 1.0, 0.0])]);
        let div = report["text"]["div"].as_str().unwrap();
        assert!(div.contains("Basal &lt;cell&gt; carcinoma 100.00 %"), "{div}");
    }

    #[test]
    fn without_a_threshold_there_is_no_word_of_malignancy() {
        let report = report(&simulated(&[("malignancy = { threshold = 0.165 }", "")]), &[(None, THIRDS)]);
        assert!(!report.to_string().to_lowercase().contains("malignan"));
    }
}
