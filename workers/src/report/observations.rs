//! What was found, as Observations.

use dermflow_schemas::fhir::{
    CANONICAL, CodeableConcept, Coding, Component, Contained, Extension, ICD11, ICD11_VERSION, Language,
    Observation, Quantity, ReferenceRange, Resource, coding, contained, coordinate, hl7, local, percent,
    pixels,
};

use super::{
    Case, contained_as, image_id, in_words,
    narrative::reasons,
    note,
    reading::{Reading, normalised_entropy},
};
use crate::{
    analyse::Finding,
    language::words,
    model::{Class, Indicator},
    quality,
};

fn component(code: &str, display: &str) -> Component {
    Component { code: local(code, display).into(), ..Component::default() }
}

/// How a value reads.
fn interpretation(code: &str, display: &str, text: impl Into<String>) -> Vec<CodeableConcept> {
    let mut concept = CodeableConcept::from(hl7("v3-ObservationInterpretation", code, display));
    concept.text = Some(text.into());
    vec![concept]
}

/// The two modalities, in the order without and with a dermatoscope.
fn modalities() -> [Coding; 2] {
    let dcm = |code, display| coding("http://dicom.nema.org/resources/ontology/DCM", code, display);
    [dcm("XC", "External-camera Photography"), dcm("DMS", "Dermoscopy")]
}

/// The more probable one.
pub(super) fn modality(clinical: u32) -> Coding {
    let [photograph, dermoscopy] = modalities();
    if clinical > 5_000 { photograph } else { dermoscopy }
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
    /// What decides whether an image is analysed, and how it was taken.
    pub(super) fn checks(&self, n: usize, finding: &Finding) -> Vec<Contained> {
        let mut all = vec![contained_as(format!("quality-{n}"), self.quality(n, finding))];
        if let Some(skin) = finding.skin {
            all.push(contained_as(format!("domain-{n}"), self.domain(n, finding, skin)));
        }
        if let Some(clinical) = finding.clinical {
            all.push(contained_as(format!("modality-{n}"), self.modality(n, clinical)));
        }
        all
    }

    /// What the model says of an image, or that it was not asked.
    pub(super) fn analysis(&self, n: usize, finding: &Finding, reading: Option<&Reading>) -> Vec<Contained> {
        let Some(reading) = reading else {
            return vec![contained_as(format!("classification-{n}"), self.cancelled(n, finding))];
        };
        let mut all = self.findings_of(reading);
        if self.model.outlines() {
            all.push(contained_as(format!("extent-{n}"), self.extent(n, finding)));
        }
        all
    }

    /// The distribution, and what follows from it.
    pub(super) fn findings_of(&self, reading: &Reading) -> Vec<Contained> {
        let named = |kind: &str, resource| contained_as(format!("{kind}-{}", reading.suffix), resource);
        let indicators = self.model.indicators.iter().map(|i| named(&i.id, self.indicator(i, reading)));
        [named("classification", self.classification(reading))].into_iter().chain(indicators).collect()
    }

    fn quality(&self, n: usize, finding: &Finding) -> Resource {
        let quality = &finding.quality;
        let (code, display) = if quality.is_acceptable() { ("N", "Normal") } else { ("L", "Low") };
        let acceptable = Component {
            value_boolean: Some(quality.is_acceptable()),
            ..component("image-quality-acceptable", "Image quality acceptable")
        };
        let parts = quality.parts();
        let parts = parts.iter().map(|(code, display, score)| Component {
            value_quantity: Some(percent(score * 100)),
            ..component(&format!("image-quality-{code}"), display)
        });
        let limit = quality::ACCEPTABLE;
        let code_of = local("image-quality", "Dermatology image quality score");
        Resource::Observation(Box::new(Observation {
            value_quantity: Some(percent(quality.score() * 100)),
            interpretation: interpretation(code, display, format!("{:?}", quality.grade())),
            method: None,
            note: note("The least of the parts. Measured on the pixels, without the model."),
            reference_range: vec![ReferenceRange {
                low: Some(percent(limit * 100)),
                text: Some(format!("At least {limit} %: acceptable for analysis")),
                ..ReferenceRange::default()
            }],
            component: std::iter::once(acceptable).chain(parts).collect(),
            ..self.observation(code_of, &[n])
        }))
    }

    fn domain(&self, n: usize, finding: &Finding, skin: u32) -> Resource {
        let confidence = Component {
            value_quantity: Some(percent(skin)),
            ..component("ai-confidence", "Confidence of the model")
        };
        let threshold = self.model.domain.unwrap_or(0);
        Resource::Observation(Box::new(Observation {
            value_boolean: Some(finding.is_skin),
            note: note(format!("True from a confidence of {} on.", in_words(threshold))),
            component: vec![confidence],
            ..self.observation(local("dermatological-domain", "Image shows skin"), &[n])
        }))
    }

    fn modality(&self, n: usize, clinical: u32) -> Resource {
        let shares = modalities().into_iter().zip([clinical, 10_000 - clinical]);
        let component = |(code, points): (Coding, u32)| Component {
            code: code.into(),
            value_quantity: Some(percent(points)),
            ..Component::default()
        };
        Resource::Observation(Box::new(Observation {
            value_codeable_concept: Some(modality(clinical).into()),
            note: self.model.modality_note.clone().map(note).unwrap_or_default(),
            component: shares.map(component).collect(),
            ..self.observation(local("image-modality", "Image modality"), &[n])
        }))
    }

    fn cancelled(&self, n: usize, finding: &Finding) -> Resource {
        let mut reason = CodeableConcept::from(hl7("data-absent-reason", "not-performed", "Not Performed"));
        let why = reasons(finding, words(Language::English));
        reason.text = Some(format!("The image was not analysed because it {why}."));
        Resource::Observation(Box::new(Observation {
            status: "cancelled",
            data_absent_reason: Some(reason),
            ..self.observation(distribution(), &[n])
        }))
    }

    /// Where the lesion is in an image, and how much of it.
    fn extent(&self, n: usize, finding: &Finding) -> Resource {
        let measured = |code: &str, display: &str, value: Quantity| Component {
            value_quantity: Some(value),
            ..component(code, display)
        };
        let (share, extension, component) =
            finding.outline.as_ref().map_or((0, None, Vec::new()), |outline| {
                let [left, top, width, height] = outline.bounds();
                let polygon = Component {
                    value_string: Some(outline.wkt()),
                    ..component("lesion-polygon", "Lesion outline in pixel coordinates")
                };
                let mut parts = vec![
                    polygon,
                    measured("bbox-x", "Bounding box left", pixels(left)),
                    measured("bbox-y", "Bounding box top", pixels(top)),
                    measured("bbox-width", "Bounding box width", pixels(width)),
                    measured("bbox-height", "Bounding box height", pixels(height)),
                ];
                let confidence = outline.confidence().map(percent);
                parts.extend(
                    confidence.map(|value| measured("ai-confidence", "Confidence of the model", value)),
                );
                let share = outline.share(finding.width, finding.height);
                (share, Some(region(outline.ring().flatten())), parts)
            });
        let text = if finding.outline.is_some() {
            "The largest connected lesion, holes in it filled. Columns and rows of the image as displayed, from its upper left corner. No \
             measure of length: the image has no scale."
        } else {
            "No lesion was found in the image."
        };
        let code = local("lesion-area-fraction", "Lesion area as a fraction of the image");
        Resource::Observation(Box::new(Observation {
            extension: extension.into_iter().collect(),
            value_quantity: Some(percent(share)),
            note: note(text),
            component,
            ..self.observation(code, &[n])
        }))
    }

    fn classification(&self, reading: &Reading) -> Resource {
        let classes = &self.model.classes;
        let component = |class: &usize| Component {
            code: class_concept(&classes[*class]),
            value_quantity: Some(percent(reading.points[*class])),
            ..Component::default()
        };
        let entropy = Component {
            value_quantity: Some(percent(normalised_entropy(&reading.points))),
            ..self::component("normalised-entropy", "Normalised entropy of the distribution")
        };
        let mut text =
            "The value is only the class with the highest probability. It is not a diagnosis.".to_owned();
        if reading.skin.is_some() {
            text.push_str(" The probabilities are those given that the image shows skin.");
        }
        if reading.is_joint() {
            text.push_str(
                " Pooled: the arithmetic mean of the probabilities of the images that were not refused.",
            );
        }
        Resource::Observation(Box::new(Observation {
            value_codeable_concept: Some(class_concept(&classes[reading.first()])),
            note: note(text),
            component: reading.order.iter().map(component).chain([entropy]).collect(),
            ..self.observation(distribution(), &reading.images)
        }))
    }

    fn indicator(&self, indicator: &Indicator, reading: &Reading) -> Resource {
        let value = reading.indicated(indicator, self.model);
        let (code, display, side) = if reading.is_high(indicator, self.model) {
            ("H", "High", "At or above")
        } else {
            ("N", "Normal", "Below")
        };
        let (which, meaning) = if indicator.classes.is_empty() {
            ("the threshold", "refused, as the image does not show skin")
        } else if indicator.referral {
            ("the referral threshold", "no referral suggested by this threshold alone")
        } else {
            ("the threshold", "not high by this threshold alone")
        };
        let counted = self.model.classes.iter().filter(|class| indicator.classes.contains(&class.code));
        let names: Vec<&str> = counted.map(|class| class.display.as_str()).collect();
        let sum = if names.is_empty() {
            "The confidence that the image shows skin: high in every image that is analysed.".to_owned()
        } else {
            format!("Sum of the probabilities of: {}.", names.join("; "))
        };
        let more = indicator.note.iter().map(String::as_str);
        let threshold = self.model.threshold(indicator);
        Resource::Observation(Box::new(Observation {
            value_quantity: Some(percent(value)),
            interpretation: interpretation(code, display, format!("{side} {which}")),
            note: note(std::iter::once(sum.as_str()).chain(more).collect::<Vec<_>>().join(" ")),
            reference_range: vec![ReferenceRange {
                high: Some(percent(threshold)),
                text: Some(format!("Below {}: {meaning}", in_words(threshold))),
                ..ReferenceRange::default()
            }],
            ..self.observation(local(&indicator.code, &indicator.display), &reading.images)
        }))
    }

    /// What every observation has in common.
    fn observation(&self, code: Coding, images: &[usize]) -> Observation {
        let mut sites = images.iter().map(|n| &self.manifest.images[n - 1].body_site);
        let site = sites.next().filter(|first| sites.all(|site| site == *first));
        Observation {
            status: "preliminary",
            category: vec![hl7("observation-category", "imaging", "Imaging").into()],
            code: code.into(),
            subject: self.manifest.subject.clone(),
            effective: Some(self.accepted_at),
            issued: Some(self.finished_at),
            body_site: site.cloned().flatten(),
            method: Some(local("ai-inference", "Artificial intelligence inference").into()),
            device: Some(contained("device", None)),
            derived_from: images.iter().map(|n| contained(&image_id(*n), None)).collect(),
            ..Observation::default()
        }
    }
}

fn distribution() -> Coding {
    local("condition-distribution", "Probability distribution over skin condition classes")
}

/// A closed line in an image, from x and y in turn (the `imageRegion2D` of R5's `ImagingSelection`).
fn region(coordinates: impl Iterator<Item = u32>) -> Extension {
    let kind = Extension { url: "regionType".into(), value_code: Some("polyline"), ..Extension::default() };
    Extension {
        url: format!("{CANONICAL}/StructureDefinition/image-region-2d"),
        extension: std::iter::once(kind).chain(coordinates.map(coordinate)).collect(),
        ..Extension::default()
    }
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::envelope::Manifest;

    use super::{
        super::tests::{THIRDS, entry, finding, report_of, resource},
        *,
    };
    use crate::model::tests::{simulated, with_domain};

    /// Its threshold is that of the domain, so that it reads high in every image that is analysed, and says so.
    #[test]
    fn an_indicator_without_classes_is_the_confidence_in_skin() {
        let indicator = "threshold = 0.5 },\n { id = \"has-condition\", code = \"has-condition\", display = \"Condition\" },";
        let model = with_domain(&[("threshold = 0.5 },", indicator)]);
        let skin = |skin| Finding { skin: Some(skin), ..finding(THIRDS) };
        let manifest = Manifest::new(vec![entry(None), entry(None)], None, None);
        let report = report_of(&model, &manifest, &[skin(9_000), skin(9_999)]);
        for (id, value) in
            [("has-condition-1", 90.0), ("has-condition-2", 99.99), ("has-condition-joint", 95.0)]
        {
            let observation = resource(&report, id);
            assert_eq!(observation["valueQuantity"]["value"], value);
            let range = &observation["referenceRange"][0];
            assert_eq!(range["high"]["value"], 80.0);
            assert_eq!(range["text"], "Below 80.00 %: refused, as the image does not show skin");
            assert_eq!(observation["interpretation"][0]["coding"][0]["code"], "H");
            let note = observation["note"][0]["text"].as_str().unwrap();
            assert!(note.contains("high in every image that is analysed"), "{note}");
        }
    }

    #[test]
    fn the_modality_is_the_more_probable_one() {
        for (clinical, code) in [(210, "DMS"), (5_000, "DMS"), (9_000, "XC")] {
            let manifest = Manifest::new(vec![entry(None)], None, None);
            let finding = Finding { clinical: Some(clinical), ..finding(THIRDS) };
            let report = report_of(&simulated(&[]), &manifest, &[finding]);
            let observation = resource(&report, "modality-1");
            assert_eq!(observation["valueCodeableConcept"]["coding"][0]["code"], code);
            assert_eq!(resource(&report, "image-1")["modality"], observation["valueCodeableConcept"]);
            let values: f64 = [0, 1]
                .iter()
                .map(|n| observation["component"][n]["valueQuantity"]["value"].as_f64().unwrap())
                .sum();
            assert!((values - 100.0).abs() < 1e-9);
        }
    }
}
