//! From findings to a FHIR R4 `DiagnosticReport`. Pure: times and ids come in as arguments.
//!
//! What the model does not say (domain, modality, outline, heat maps) is absent. Every number that is printed follows from
//! printed numbers: a distribution sums to 100.00 %, an indicator is the sum of its classes, the entropy is that of the
//! distribution as it stands there, an area is that of its outline. An image that is refused has its quality, its domain and
//! its modality, and a classification that was cancelled; all images together are those that were not refused.

mod device;
mod media;
mod narrative;
mod observations;
mod reading;

use dermflow_schemas::{
    envelope::Manifest,
    fhir::{
        Annotation, CANONICAL, CodeableConcept, Contained, DiagnosticReport, Identifier, Language, Meta,
        ReportMedia, Resource, coding, contained, hl7, local,
    },
    id::JobId,
};
use time::OffsetDateTime;

use self::reading::Reading;
use crate::{
    analyse::Finding,
    language::{Words, words},
    model::Model,
};

const SIMULATED: &str = "SIMULATED: no model looked at the images, the numbers mean nothing.";

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
    let mut readings: Vec<Reading> = case.valid().map(|(n, finding)| Reading::of(n, finding)).collect();
    let numbers = (1..).zip(case.findings);
    let mut observations: Vec<Contained> = numbers
        .flat_map(|(n, finding)| {
            let reading = readings.iter().find(|reading| reading.images == [n]);
            case.checks(n, finding).into_iter().chain(case.analysis(n, finding, reading))
        })
        .collect();
    if several && !readings.is_empty() {
        let joint = case.joint_reading();
        observations.extend(case.findings_of(&joint));
        readings.push(joint);
    }
    let result = observations.iter().map(|o| contained(&o.id, Some(&case.title_of(o)))).collect();
    let submitted = (1..=case.findings.len()).map(|n| ReportMedia {
        comment: Some(format!("Submitted image {n}")),
        link: contained(&image_id(n), None),
    });
    let heat_maps: Vec<(String, Contained)> = case.heat_maps().collect();
    let mapped = heat_maps
        .iter()
        .map(|(comment, map)| ReportMedia { comment: Some(comment.clone()), link: contained(&map.id, None) });
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
        language: case.language().tag(),
        text: case.narrative(&readings),
        identifier: std::iter::once(own).chain(case.manifest.identifier.clone()).collect(),
        status: "preliminary",
        category: vec![hl7("v2-0074", "IMG", "Diagnostic Imaging").into()],
        code,
        subject: case.manifest.subject.clone(),
        effective: Some(case.accepted_at),
        issued: Some(case.finished_at),
        result,
        media: submitted.chain(mapped).collect(),
        // The last reading speaks for all images.
        conclusion: Some(case.conclusion(readings.last())),
        contained: [contained_as("device", Resource::Device(Box::new(case.device())))]
            .into_iter()
            .chain(case.images())
            .chain(observations)
            .chain(heat_maps.into_iter().map(|(_, map)| map))
            .collect(),
    }
}

fn in_words(points: u32) -> String {
    words(Language::English).percent(points)
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

impl Case<'_> {
    /// The images that were not refused, from 1.
    fn valid(&self) -> impl Iterator<Item = (usize, &Finding)> {
        (1..).zip(self.findings).filter(|(_, finding)| finding.is_valid())
    }

    fn language(&self) -> Language {
        self.manifest.language
    }

    fn words(&self) -> &'static Words {
        words(self.language())
    }

    /// The display of an observation's code, and which images it is about when there are several.
    fn title_of(&self, observation: &Contained) -> String {
        let Resource::Observation(resource) = &observation.resource else { return String::new() };
        let code = resource.code.coding.first().and_then(|coding| coding.display.clone()).unwrap_or_default();
        match observation.id.rsplit_once('-') {
            Some((_, "joint")) if resource.derived_from.len() == self.findings.len() => {
                format!("{code}, all images")
            }
            Some((_, "joint")) => format!("{code}, all images that were not refused"),
            Some((_, n)) if self.findings.len() > 1 => format!("{code}, image {n}"),
            _ => code,
        }
    }

    fn meta(&self) -> Meta {
        let mut security = vec![hl7("v3-ObservationValue", "AIAST", "Artificial Intelligence asserted")];
        if self.model.is_simulated() {
            security.push(hl7("v3-ActReason", "HTEST", "test health data"));
        }
        Meta { version_id: Some("1".into()), last_updated: Some(self.finished_at), security }
    }
}

fn sid(kind: &str, value: String) -> Identifier {
    Identifier { use_: None, system: Some(format!("{CANONICAL}/sid/{kind}")), value: Some(value) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decode::Picture,
        frame::Frame,
        model::tests::{simulated, with_domain},
        quality::Quality,
    };
    use dermflow_schemas::{
        envelope::ImageEntry,
        fhir::{Reference, SNOMED},
        image::Format,
    };
    use serde_json::{Value, json};

    /// A sample image is good, and a narrow one is not.
    pub(super) fn quality(good: bool) -> Quality {
        let file = include_bytes!("../../tests/images/isic2017-nv.png");
        let whole = Picture::decode(file, Format::Png).unwrap().within(256);
        let mut cut = std::io::Cursor::new(Vec::new());
        let side = if good { 256 } else { 80 };
        image::imageops::crop_imm(&whole, 0, 0, 256, side)
            .to_image()
            .write_to(&mut cut, image::ImageFormat::Png)
            .unwrap();
        let frame = Frame::of(&Picture::decode(cut.into_inner(), Format::Png).unwrap(), (1, 1));
        let quality = Quality::of(&frame);
        assert_eq!(quality.is_acceptable(), good, "{quality:?}");
        quality
    }

    pub(super) fn finding(probabilities: [f64; 3]) -> Finding {
        Finding {
            width: 300,
            height: 225,
            sha256: "ab".repeat(32),
            sha1: "5NR6OqOJf+99TunbuwywnkxtcnA=".into(),
            quality: quality(true),
            skin: None,
            is_skin: true,
            clinical: None,
            probabilities: probabilities.to_vec(),
            outline: None,
            heat_maps: Vec::new(),
        }
    }

    pub(super) fn entry(site: Option<&str>) -> ImageEntry {
        ImageEntry {
            bytes: 26,
            format: Format::Jpeg,
            title: Some("Close-up".into()),
            taken: None,
            body_site: site.map(|code| coding(SNOMED, code, "Skin").into()),
        }
    }

    pub(super) fn report(model: &Model, images: &[(Option<&str>, [f64; 3])]) -> Value {
        let identifier =
            Identifier { system: Some("urn:x".into()), value: Some("A-1".into()), ..Identifier::default() };
        let subject = Reference { display: Some("P-1".into()), ..Reference::default() };
        let manifest = Manifest::new(
            images.iter().map(|(site, _)| entry(*site)).collect(),
            Some(subject),
            Some(identifier),
        );
        let findings: Vec<Finding> = images.iter().map(|(_, p)| finding(*p)).collect();
        report_of(model, &manifest, &findings)
    }

    pub(super) fn report_of(model: &Model, manifest: &Manifest, findings: &[Finding]) -> Value {
        let case = Case {
            job: "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f".parse().unwrap(),
            accepted_at: OffsetDateTime::UNIX_EPOCH,
            finished_at: OffsetDateTime::UNIX_EPOCH + time::Duration::seconds(2),
            manifest,
            findings,
            model,
        };
        serde_json::from_slice(&Resource::DiagnosticReport(Box::new(build(&case))).to_json()).unwrap()
    }

    pub(super) fn resource<'a>(report: &'a Value, id: &str) -> &'a Value {
        let all = report["contained"].as_array().unwrap();
        all.iter().find(|resource| resource["id"] == id).unwrap_or_else(|| panic!("no {id}"))
    }

    /// Printed percentages of the classes, as hundredths, in printed order; the entropy is last.
    pub(super) fn printed(observation: &Value) -> Vec<(String, i64)> {
        let components = observation["component"].as_array().unwrap();
        let value = |c: &Value| (c["valueQuantity"]["value"].as_f64().unwrap() * 100.0).round() as i64;
        let code = |c: &Value| c["code"]["coding"].as_array().unwrap().last().unwrap()["code"].clone();
        components.iter().map(|c| (code(c).as_str().unwrap().to_owned(), value(c))).collect()
    }

    pub(super) const THIRDS: [f64; 3] = [1.0 / 3.0; 3];
    const SITE: Option<&str> = Some("66643007");

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
        assert_eq!(mixed["result"].as_array().unwrap().len(), 15);
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
    fn without_indicators_there_is_no_word_of_them() {
        let mut model = simulated(&[]);
        model.indicators.clear();
        let report = report(&model, &[(None, THIRDS)]);
        assert!(!report.to_string().to_lowercase().contains("malignan"));
    }

    /// Of three images one shows no skin, and one is poor; a fourth state has none that is left.
    #[test]
    fn a_refused_image_has_its_checks_and_a_cancelled_classification() {
        let model = with_domain(&[]);
        let skin = |skin: u32, p| Finding { skin: Some(skin), is_skin: skin >= 8_000, ..finding(p) };
        let findings = [
            skin(310, THIRDS),
            skin(9_900, [0.2, 0.0, 0.8]),
            Finding { quality: quality(false), ..skin(9_500, THIRDS) },
        ];
        let mut manifest = Manifest::new(vec![entry(SITE), entry(SITE), entry(SITE)], None, None);
        let mixed = report_of(&model, &manifest, &findings);
        let ids: Vec<&str> =
            mixed["result"].as_array().unwrap().iter().map(|r| r["reference"].as_str().unwrap()).collect();
        let refused = |n| [format!("#quality-{n}"), format!("#domain-{n}"), format!("#classification-{n}")];
        let two = ["#quality-2", "#domain-2", "#classification-2", "#malignancy-2", "#pigmented-2"];
        let joint = ["#classification-joint", "#malignancy-joint", "#pigmented-joint"];
        let expected: Vec<String> = refused(1)
            .into_iter()
            .chain(two.map(str::to_owned))
            .chain(refused(3))
            .chain(joint.map(str::to_owned))
            .collect();
        assert_eq!(ids, expected);
        for (n, why) in [(1, "it does not show skin."), (3, "it is of too low quality (")] {
            let cancelled = resource(&mixed, &format!("classification-{n}"));
            assert_eq!(cancelled["status"], "cancelled");
            let reason = &cancelled["dataAbsentReason"];
            assert_eq!(reason["coding"][0]["code"], "not-performed");
            assert!(reason["text"].as_str().unwrap().contains(why), "{reason}");
            assert!(cancelled.get("valueCodeableConcept").is_none() && cancelled.get("component").is_none());
        }
        assert_eq!(resource(&mixed, "domain-1")["valueBoolean"], false);
        assert_eq!(resource(&mixed, "domain-1")["component"][0]["valueQuantity"]["value"], 3.1);
        assert_eq!(resource(&mixed, "quality-3")["interpretation"][0]["text"], "Poor");
        assert_eq!(resource(&mixed, "quality-3")["component"][0]["valueBoolean"], false);
        assert!(resource(&mixed, "quality-3").get("method").is_none(), "no model was asked");
        let div = mixed["text"]["div"].as_str().unwrap();
        assert!(
            div.contains("<p>All images that were not refused: ") && !div.contains("All images: "),
            "{div}"
        );
        let pooled = resource(&mixed, "classification-joint");
        assert_eq!(pooled["derivedFrom"], json!([{"reference": "#image-2"}]));
        assert_eq!(printed(pooled)[..2], printed(resource(&mixed, "classification-2"))[..2]);
        let conclusion = mixed["conclusion"].as_str().unwrap();
        assert!(
            conclusion.contains(
                "Image 1 was refused by the domain check. Image 3 was refused by the quality check. "
            )
        );

        manifest.images.pop();
        let none = report_of(&model, &manifest, &[findings[0].clone(), findings[2].clone()]);
        let no_result =
            "No result: image 1 was refused by the domain check; image 2 was refused by the quality check.";
        assert!(none["conclusion"].as_str().unwrap().ends_with(no_result), "{}", none["conclusion"]);
        assert!(
            none["text"]["div"].as_str().unwrap().contains("<p>No result: image 1 does not show skin.</p>")
        );
        assert!(!none.to_string().contains("joint"));
    }
}
