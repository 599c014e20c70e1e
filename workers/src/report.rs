//! From findings to a FHIR R4 `DiagnosticReport`. Pure: times and ids come in as arguments.
//!
//! What the model does not say (domain, modality, outline, heat maps) is absent. Every number that is printed follows from
//! printed numbers: a distribution sums to 100.00 %, an indicator is the sum of its classes, the entropy is that of the
//! distribution as it stands there, an area is that of its outline. An image that is refused has its quality, its domain and
//! its modality, and a classification that was cancelled; all images together are those that were not refused.

use dermflow_schemas::{
    envelope::{ImageEntry, Manifest},
    fhir::{
        Annotation, Attachment, CANONICAL, CodeableConcept, Coding, Component, Contained, Device, DeviceName,
        DeviceProperty, DeviceVersion, DiagnosticReport, Extension, ICD11, ICD11_VERSION, Identifier,
        Language, Media, Meta, Narrative, Observation, Quantity, ReferenceRange, ReportMedia, Resource,
        coding, contained, coordinate, hl7, inline, local, percent, pixels, xhtml,
    },
    id::JobId,
};
use time::OffsetDateTime;

use crate::{
    analyse::{Finding, ranked},
    heat::HeatMap,
    language::{Words, begun, fill, words},
    model::{Class, Indicator, Metric, Model, name_in, points},
    quality,
};

/// The version of decoding and resizing: another one may change the numbers.
const PREPROCESSING: &str = "squash-bilinear-2";
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

/// A distribution as it is printed.
struct Reading {
    /// `1`, `2`… for an image, `joint` for all.
    suffix: String,
    /// Images from 1.
    images: Vec<usize>,
    /// The probability of skin, in hundredths of a per cent.
    skin: Option<u32>,
    /// Hundredths of a per cent, in the order of the model's classes; the sum is 10,000.
    points: Vec<u32>,
    /// Classes by descending probability.
    order: Vec<usize>,
}

impl Reading {
    fn new(suffix: String, images: Vec<usize>, skin: Option<u32>, probabilities: &[f64]) -> Self {
        Self { suffix, images, skin, points: basis_points(probabilities), order: ranked(probabilities) }
    }

    fn of(n: usize, finding: &Finding) -> Self {
        Self::new(n.to_string(), vec![n], finding.skin, &finding.probabilities)
    }

    fn is_joint(&self) -> bool {
        self.suffix == "joint"
    }

    fn first(&self) -> usize {
        self.order[0]
    }

    /// Whether the indicator has a threshold and has come to it.
    fn is_high(&self, indicator: &Indicator, model: &Model) -> bool {
        indicator.threshold_points().is_some_and(|threshold| self.indicated(indicator, model) >= threshold)
    }

    /// Hundredths of a per cent: the sum of the indicator's classes, or the probability of skin.
    fn indicated(&self, indicator: &Indicator, model: &Model) -> u32 {
        if indicator.classes.is_empty() {
            return self.skin.unwrap_or(0);
        }
        let counted = self.points.iter().zip(&model.classes);
        counted.filter(|(_, class)| indicator.classes.contains(&class.code)).map(|(points, _)| points).sum()
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
fn modality(clinical: u32) -> Coding {
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

    /// The images that were not refused pooled: the arithmetic mean of their probabilities.
    fn joint_reading(&self) -> Reading {
        let (images, findings): (Vec<usize>, Vec<&Finding>) = self.valid().unzip();
        let number = findings.len() as f64;
        let mean = |class: usize| findings.iter().map(|f| f.probabilities[class]).sum::<f64>() / number;
        let pooled: Vec<f64> = (0..self.model.classes.len()).map(mean).collect();
        let skin: Option<Vec<f64>> = findings.iter().map(|f| f.skin.map(f64::from)).collect();
        let skin = skin.map(|skin| (skin.iter().sum::<f64>() / number).round() as u32);
        Reading::new("joint".into(), images, skin, &pooled)
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
            modality: finding.clinical.map(|clinical| modality(clinical).into()),
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
                ..Attachment::default()
            },
            note: note(format!(
                "Submitted image {n}. The pixels are not echoed; hash is SHA-1 as FHIR R4 requires, the SHA-256 \
                 is in identifier."
            )),
            ..Media::default()
        }
    }

    /// Heat maps, each with what the report calls it.
    fn heat_maps(&self) -> impl Iterator<Item = (String, Contained)> {
        let images = (1..).zip(self.findings);
        images.flat_map(move |(n, finding)| {
            finding.heat_maps.iter().map(move |map| self.heat_map(n, finding, map))
        })
    }

    fn heat_map(&self, n: usize, finding: &Finding, map: &HeatMap) -> (String, Contained) {
        let class = &self.model.classes[map.class];
        let name = name_in(Language::English, &class.display, &class.names);
        let icd11 = class.icd11.as_ref().map(|icd11| format!(" (ICD-11 {})", icd11.code)).unwrap_or_default();
        let title = format!("Heat map for {name}{icd11} on image {n}");
        let [columns, rows] = map.places;
        let media = Media {
            status: "completed",
            type_: Some(hl7("media-type", "image", "Image").into()),
            view: Some(local("class-activation-map", "Class activation heat map").into()),
            subject: self.manifest.subject.clone(),
            created: Some(self.finished_at),
            device: Some(contained("device", None)),
            height: Some(map.height),
            width: Some(map.width),
            content: inline("image/png", &map.png, title, self.finished_at),
            note: note(format!(
                "RGB; the frame of image {n} ({} x {} pixels) at {} x {}. The probability of the class by {columns} x \
                 {rows} places of the image, each by itself, from violet (0 %) to yellow (100 %).",
                finding.width, finding.height, map.width, map.height
            )),
            ..Media::default()
        };
        let id = format!("heatmap-{n}-{}", class.code);
        (format!("Heat map for {name} on image {n}"), contained_as(id, Resource::Media(Box::new(media))))
    }

    /// What decides whether an image is analysed, and how it was taken.
    fn checks(&self, n: usize, finding: &Finding) -> Vec<Contained> {
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
    fn analysis(&self, n: usize, finding: &Finding, reading: Option<&Reading>) -> Vec<Contained> {
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
    fn findings_of(&self, reading: &Reading) -> Vec<Contained> {
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
        let (which, meaning) = if indicator.referral {
            ("the referral threshold", "no referral suggested by this threshold alone")
        } else {
            ("the threshold", "not high by this threshold alone")
        };
        let counted = self.model.classes.iter().filter(|class| indicator.classes.contains(&class.code));
        let names: Vec<&str> = counted.map(|class| class.display.as_str()).collect();
        let sum = if names.is_empty() {
            "The confidence that the image shows skin.".to_owned()
        } else {
            format!("Sum of the probabilities of: {}.", names.join("; "))
        };
        let more = indicator.note.iter().map(String::as_str);
        let threshold = indicator.threshold_points();
        let read = threshold.map(|_| interpretation(code, display, format!("{side} {which}")));
        let range = threshold.map(|threshold| ReferenceRange {
            high: Some(percent(threshold)),
            text: Some(format!("Below {}: {meaning}", in_words(threshold))),
            ..ReferenceRange::default()
        });
        Resource::Observation(Box::new(Observation {
            value_quantity: Some(percent(value)),
            interpretation: read.unwrap_or_default(),
            note: note(std::iter::once(sum.as_str()).chain(more).collect::<Vec<_>>().join(" ")),
            reference_range: range.into_iter().collect(),
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

    fn narrative(&self, readings: &[Reading]) -> Narrative {
        let words = self.words();
        let warning = self.model.is_simulated().then(|| SIMULATED.to_owned());
        let reviewed = (!readings.is_empty()).then(|| words.not_reviewed.to_owned());
        let images = (1..).zip(self.findings).map(|(n, finding)| {
            let reading = readings.iter().find(|reading| !reading.is_joint() && reading.images == [n]);
            self.image_line(n, finding, reading)
        });
        let joint = readings.iter().filter(|reading| reading.is_joint());
        let joint = joint.map(|reading| {
            let together = words.together[usize::from(reading.images.len() < self.findings.len())];
            format!("{together}: {}", self.reading_line(reading))
        });
        let no_maps = self.manifest.heat_maps > 0 && !self.model.maps_heat();
        let no_maps = no_maps.then(|| words.no_heat_maps.to_owned());
        let lines = warning.into_iter().chain(reviewed).chain(images).chain(joint).chain(no_maps);
        let paragraphs: Vec<String> = lines.map(|line| format!("<p>{}</p>", xhtml(&line))).collect();
        Narrative {
            status: "generated".into(),
            div: format!("<div xmlns=\"http://www.w3.org/1999/xhtml\">{}</div>", paragraphs.concat()),
        }
    }

    /// An image in the narrative.
    fn image_line(&self, n: usize, finding: &Finding, reading: Option<&Reading>) -> String {
        let (words, n) = (self.words(), n.to_string());
        let Some(reading) = reading else {
            return fill(words.no_result, &[&n, &reasons(finding, words)]);
        };
        let taken = finding
            .clinical
            .map(|clinical| if clinical > 5_000 { words.photograph } else { words.dermoscopy });
        let score = format!("{} %", finding.quality.score());
        let quality = fill(words.quality, &[&score, words.grades[finding.quality.grade() as usize]]);
        let seen: Vec<&str> = taken.into_iter().chain([quality.as_str()]).collect();
        let area = finding.outline.as_ref().map(|outline| {
            let share = words.percent(outline.share(finding.width, finding.height));
            format!(" {}", fill(words.area, &[&share]))
        });
        let (image, seen) = (fill(words.image, &[&n]), seen.join(", "));
        format!("{image}: {seen}. {}{}", self.reading_line(reading), area.unwrap_or_default())
    }

    fn reading_line(&self, reading: &Reading) -> String {
        let words = self.words();
        let (name, probability) = self.most_probable(reading);
        let indicators = self.told(reading).map(|indicator| {
            let value = words.percent(reading.indicated(indicator, self.model));
            format!(" {} {value}.", self.name_of(indicator))
        });
        fill(words.most_probable, &[&name, &probability]) + &indicators.collect::<String>()
    }

    /// The indicators that are put in words: the first one, and every further one that suggests a referral.
    fn told<'a>(&'a self, reading: &'a Reading) -> impl Iterator<Item = &'a Indicator> {
        let suggests = |i: &Indicator| i.referral && reading.is_high(i, self.model);
        (0..).zip(&self.model.indicators).filter(move |(n, i)| *n == 0 || suggests(i)).map(|(_, i)| i)
    }

    /// The class and its probability.
    fn most_probable(&self, reading: &Reading) -> (String, String) {
        let first = reading.first();
        let Class { display, names, .. } = &self.model.classes[first];
        let name = name_in(self.language(), display, names).into_owned();
        (name, self.words().percent(reading.points[first]))
    }

    /// An indicator at the beginning of a sentence.
    fn name_of<'a>(&self, indicator: &'a Indicator) -> &'a str {
        indicator.names.get(self.language().tag()).unwrap_or(&indicator.display)
    }

    fn conclusion(&self, last: Option<&Reading>) -> String {
        let words = self.words();
        let refused = (1..).zip(self.findings).filter(|(_, finding)| !finding.is_valid());
        let refused: Vec<String> = refused.map(|(n, finding)| self.refusal(n, finding)).collect();
        let mut sentences: Vec<String> =
            self.model.is_simulated().then(|| SIMULATED.to_owned()).into_iter().collect();
        match last {
            None => sentences.push(fill(words.nothing, &[&refused.join("; ")])),
            Some(reading) => {
                let (name, probability) = self.most_probable(reading);
                sentences.push(fill(words.conclusion, &[&name, &probability]));
                sentences.extend(self.told(reading).filter(|i| i.threshold.is_some()).map(|indicator| {
                    let high = reading.is_high(indicator, self.model);
                    let kind = if indicator.referral { words.referral } else { words.threshold };
                    fill(kind[usize::from(!high)], &[self.name_of(indicator)])
                }));
                sentences.extend(refused.iter().map(|refusal| format!("{}.", begun(refusal))));
                sentences.push(words.no_diagnosis.to_owned());
            }
        }
        sentences.join(" ")
    }

    /// That an image was refused, and by what.
    fn refusal(&self, n: usize, finding: &Finding) -> String {
        let words = self.words();
        let checks = words.checks.into_iter().zip([finding.is_skin, finding.quality.is_acceptable()]);
        let failed: Vec<&str> = checks.filter(|(_, passed)| !passed).map(|(check, _)| check).collect();
        fill(words.refused, &[&n.to_string(), &failed.join(words.and)])
    }
}

/// Why an image is refused.
fn reasons(finding: &Finding, words: &Words) -> String {
    let skin = (!finding.is_skin).then(|| words.not_skin.to_owned());
    let quality = finding.quality;
    let poor = (!quality.is_acceptable()).then(|| {
        let score = format!("{} %", quality.score());
        fill(words.poor, &[score.as_str()])
    });
    skin.into_iter().chain(poor).collect::<Vec<_>>().join(words.and)
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

fn sid(kind: &str, value: String) -> Identifier {
    Identifier { use_: None, system: Some(format!("{CANONICAL}/sid/{kind}")), value: Some(value) }
}

fn property(metric: &Metric) -> DeviceProperty {
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
    use crate::{
        decode::Picture,
        model::tests::{simulated, with_domain},
        quality::Quality,
    };
    use dermflow_schemas::{
        fhir::{Reference, SNOMED},
        image::Format,
    };
    use serde_json::{Value, json};

    /// A sample image is good, and a narrow one is not.
    fn quality(good: bool) -> Quality {
        let file = include_bytes!("../../tests/images/isic2017-nv.png");
        let whole = Picture::decode(file, Format::Png).unwrap().within(256);
        let mut cut = std::io::Cursor::new(Vec::new());
        let side = if good { 256 } else { 80 };
        image::imageops::crop_imm(&whole, 0, 0, 256, side)
            .to_image()
            .write_to(&mut cut, image::ImageFormat::Png)
            .unwrap();
        let quality = Quality::of(&Picture::decode(&cut.into_inner(), Format::Png).unwrap());
        assert_eq!(quality.is_acceptable(), good, "{quality:?}");
        quality
    }

    fn finding(probabilities: [f64; 3]) -> Finding {
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
        report_of(model, &manifest, &findings)
    }

    fn report_of(model: &Model, manifest: &Manifest, findings: &[Finding]) -> Value {
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
            let reading = Reading::new(String::new(), vec![1], None, &probabilities);
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
    fn the_narrative_is_escaped() {
        let report = report(&simulated(&[]), &[(None, [0.0, 1.0, 0.0])]);
        let div = report["text"]["div"].as_str().unwrap();
        assert!(div.contains("class: basal &lt;cell&gt; carcinoma 100.00 %"), "{div}");
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

    /// Melanoma at 13 % and a basal cell carcinoma at 1 %: the sum is below the threshold of the first indicator, and
    /// melanoma by itself above that of another one. Nobody is told the first half only, in whatever language.
    #[test]
    fn every_indicator_that_suggests_a_referral_is_told() {
        let urgent = "threshold = 0.5 },\n { id = \"urgent\", code = \"urgent-referral\", display = \"Urgent referral\", names = { es = \"Derivación urgente\", de = \"Dringende Überweisung\", fr = \"Orientation urgente\" }, classes = [\"mel\"], threshold = 0.12, referral = true },";
        let model = simulated(&[("threshold = 0.5 },", urgent)]);
        let mut manifest = Manifest::new(vec![entry(None)], None, None);
        for (language, name, value) in [
            (Language::English, "Urgent referral", "13.00 %"),
            (Language::Spanish, "Derivación urgente", "13,00 %"),
            (Language::German, "Dringende Überweisung", "13,00 %"),
            (Language::French, "Orientation urgente", "13,00 %"),
        ] {
            manifest.language = language;
            let told = report_of(&model, &manifest, &[finding([0.13, 0.01, 0.86])]);
            assert_eq!(resource(&told, "malignancy-1")["interpretation"][0]["coding"][0]["code"], "N");
            assert_eq!(resource(&told, "urgent-1")["interpretation"][0]["coding"][0]["code"], "H");
            let (conclusion, div) = (&told["conclusion"], &told["text"]["div"]);
            let high = fill(words(language).referral[0], &[name]);
            assert!(conclusion.as_str().unwrap().contains(&high), "{conclusion}");
            assert!(div.as_str().unwrap().contains(&format!("{name} {value}.")), "{div}");
            assert!(!conclusion.as_str().unwrap().contains("Pigmented lesion"), "no referral: {conclusion}");
            let low = report_of(&model, &manifest, &[finding([0.11, 0.03, 0.86])]);
            assert_eq!(resource(&low, "urgent-1")["interpretation"][0]["coding"][0]["code"], "N");
            for place in [&low["conclusion"], &low["text"]["div"]] {
                assert!(!place.as_str().unwrap().contains(name), "{place}");
            }
        }
    }

    /// It has a value, and no threshold by which it would read high for every image that is analysed.
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
            assert!(
                observation.get("interpretation").is_none() && observation.get("referenceRange").is_none()
            );
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

    #[test]
    fn a_heat_map_is_linked_and_hashed() {
        let map = HeatMap { class: 0, width: 30, height: 22, places: [5, 5], png: b"png".to_vec() };
        let mut manifest = Manifest::new(vec![entry(None)], None, None);
        let finding = Finding { heat_maps: vec![map], ..finding(THIRDS) };
        let report = report_of(&simulated(&[]), &manifest, std::slice::from_ref(&finding));
        let media = resource(&report, "heatmap-1-mel");
        assert_eq!(media["view"]["coding"][0]["code"], "class-activation-map");
        assert_eq!(media["content"]["data"], "cG5n");
        assert_eq!(media["content"]["hash"], "kECn1s33oNbKsYI4McbOt9Aa+X8=");
        assert_eq!(media["content"]["size"], 3);
        assert_eq!(media["content"]["title"], "Heat map for melanoma (ICD-11 2C30) on image 1");
        let link =
            json!({"comment": "Heat map for melanoma on image 1", "link": {"reference": "#heatmap-1-mel"}});
        assert_eq!(report["media"][1], link);
        assert!(!report["text"]["div"].as_str().unwrap().contains("heat map"));
        manifest.heat_maps = 1;
        let report = report_of(&simulated(&[]), &manifest, &[Finding { heat_maps: Vec::new(), ..finding }]);
        assert!(report["text"]["div"].as_str().unwrap().contains("This model gives no heat maps."));
    }

    #[test]
    fn the_narrative_is_in_the_language_that_was_asked_for() {
        let mut manifest = Manifest::new(vec![entry(None)], None, None);
        manifest.language = Language::German;
        let report = report_of(&simulated(&[]), &manifest, &[finding([0.614_2, 0.3, 0.085_8])]);
        assert_eq!(report["language"], "de");
        let div = report["text"]["div"].as_str().unwrap();
        assert!(
            div.contains("Bild 1: Qualität ") && div.contains("Wahrscheinlichste Klasse: Melanom 61,42 %."),
            "{div}"
        );
        let conclusion = report["conclusion"].as_str().unwrap();
        assert!(conclusion.contains("Höchste Wahrscheinlichkeit: Melanom (61,42 %)."), "{conclusion}");
        assert_eq!(resource(&report, "classification-1")["valueCodeableConcept"]["text"], "Melanoma");
    }
}
