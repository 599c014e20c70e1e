//! From a FHIR `DiagnosticReport` to the answer of `POST /diagnosis-support`. Pure.
//!
//! What is in the report is told as it is. These clients read every key, and most as numbers, where a report may be
//! silent: because the model does not measure it, or because the image was refused. Then
//!
//! - a clinical indicator is 0: nothing that was looked at speaks for it;
//! - the entropy is 100 % ([`UNKNOWN_ENTROPY`]): nothing is known of the distribution;
//! - sensitivity, specificity, quality and every confidence are 50 % ([`NOT_MEASURED`]), and the words beside them,
//!   where there are words, say [`NOT_ASSESSED`];
//! - an image that was classified counts as acceptable and as skin, and one that was not does not;
//! - the list of conclusions is empty, and an explanation is null.

use dermflow_schemas::{fhir::ICD11, limits::MAX_HEAT_MAPS};
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{ISSUER, own_code};

/// Where nothing was measured, in per cent: what a coin gets.
const NOT_MEASURED: f64 = 50.0;
/// Where there is no distribution, in per cent of the largest entropy.
const UNKNOWN_ENTROPY: f64 = 100.0;
const LOINC: &str = "http://loinc.org";
const NOT_ASSESSED: &str = "Not assessed";
/// The shortest analysis, in seconds: the times of a report are in milliseconds, and clients want more than nothing.
const SHORTEST: f64 = 0.001;

/// The answer.
pub(crate) fn render(report: &Value) -> Value {
    let report = Report { report, contained: list(&report["contained"]) };
    let images =
        report.contained.iter().filter(|resource| resource["id"].as_str().is_some_and(is_image)).count();
    let joint = if images > 1 { "joint".to_owned() } else { "1".to_owned() };
    json!({
        "resourceType": "DiagnosticReport",
        "identifier": { "use": "official", "value": report.report["id"] },
        "status": report.report["status"],
        "category": list(&report.report["category"]).iter().map(concept).collect::<Vec<_>>(),
        "code": concept(&report.report["code"]),
        "issued": report.report["issued"],
        "analysisDuration": report.duration(),
        "clinicalIndicator": report.indicators(&joint),
        "performanceIndicator": {
            "sensitivity": report.property("top1-sensitivity").unwrap_or(NOT_MEASURED),
            "specificity": report.property("top1-specificity").unwrap_or(NOT_MEASURED),
            "entropy": report.entropy(&joint),
        },
        "conclusion": report.conclusions(&joint).map(|(probability, code)| {
            json!({ "probability": probability, "code": concept(code) })
        }).collect::<Vec<_>>(),
        "imagingAnalysis": (1..=images).map(|n| report.image(n)).collect::<Vec<_>>(),
    })
}

fn is_image(id: &str) -> bool {
    id.strip_prefix("image-").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
}

struct Report<'r> {
    report: &'r Value,
    contained: &'r [Value],
}

impl<'r> Report<'r> {
    /// The observation of `code` about image `about`, or about all of them; null when there is none.
    fn observation(&self, code: &str, about: &str) -> &'r Value {
        let is_it = |resource: &&Value| {
            let suffix = resource["id"].as_str().and_then(|id| id.rsplit_once('-')).map(|(_, suffix)| suffix);
            resource["resourceType"] == "Observation"
                && suffix == Some(about)
                && has_code(&resource["code"], code)
        };
        self.contained.iter().find(is_it).unwrap_or(&Value::Null)
    }

    fn image(&self, n: usize) -> Value {
        let about = n.to_string();
        let conclusion = |(rank, (probability, code)): (usize, (f64, &Value))| {
            let explained = if rank < MAX_HEAT_MAPS as usize { self.heat_map(n, code) } else { Value::Null };
            json!({ "probability": probability, "code": concept(code), "explainability": explained })
        };
        json!({
            "conclusion": self.conclusions(&about).enumerate().map(conclusion).collect::<Vec<_>>(),
            "mediaValidity": self.validity(&about),
            "performanceIndicator": { "entropy": self.entropy(&about) },
            "clinicalIndicator": self.indicators(&about),
        })
    }

    fn indicators(&self, about: &str) -> Value {
        let indicator = |code| measured(self.observation(code, about)).unwrap_or(0.0);
        json!({
            "hasCondition": indicator("has-condition"),
            "pigmentedLesion": indicator("pigmented-lesion"),
            "malignancy": indicator("malignancy-suspicion"),
            "urgentReferral": indicator("urgent-referral"),
            "highPriorityReferral": indicator("high-priority-referral"),
        })
    }

    /// The classes with their probabilities, in the order of the report, which is by descending probability.
    fn conclusions(&self, about: &str) -> impl Iterator<Item = (f64, &'r Value)> + use<'r> {
        let components = list(&self.observation("condition-distribution", about)["component"]);
        components.iter().filter_map(|component| {
            class(&component["code"])?;
            Some((measured(component)?, &component["code"]))
        })
    }

    fn entropy(&self, about: &str) -> f64 {
        let distribution = self.observation("condition-distribution", about);
        component(distribution, "normalised-entropy").and_then(measured).unwrap_or(UNKNOWN_ENTROPY)
    }

    fn heat_map(&self, n: usize, code: &Value) -> Value {
        let id = class(code).map(|class| format!("heatmap-{n}-{class}"));
        let media = self.contained.iter().find(|resource| resource["id"].as_str() == id.as_deref());
        let Some(media) = media.filter(|media| media["content"]["data"].is_string()) else {
            return Value::Null;
        };
        json!({ "heatMap": {
            "title": media["content"]["title"].as_str().unwrap_or("Heat map"),
            "contentType": media["content"]["contentType"],
            "data": media["content"]["data"],
            "height": media["height"],
            "width": media["width"],
            "colorModel": "RGB",
        }})
    }

    fn validity(&self, about: &str) -> Value {
        let is_classified = self.conclusions(about).next().is_some();
        let quality = self.observation("image-quality", about);
        let acceptable =
            component(quality, "image-quality-acceptable").and_then(|c| c["valueBoolean"].as_bool());
        let acceptable = acceptable.unwrap_or(is_classified);
        let domain = self.observation("dermatological-domain", about);
        let is_skin = domain["valueBoolean"].as_bool().unwrap_or(is_classified);
        let modality = self.observation("image-modality", about);
        let kind = match coding(&modality["valueCodeableConcept"], |_| true)["code"].as_str() {
            Some("XC") => "Clinical",
            Some("DMS") => "Dermoscopic",
            _ => "None",
        };
        let confidence = |value: Option<f64>, code, text| {
            let interpretation = value.is_none().then_some(NOT_ASSESSED);
            json!({
                "value": value.unwrap_or(NOT_MEASURED), "code": own_code(code, text), "interpretation": interpretation,
            })
        };
        let part = |of, code| component(of, code).and_then(measured);
        json!({
            "isValid": is_classified && acceptable && is_skin,
            "quality": {
                "acceptable": acceptable,
                "score": measured(quality).unwrap_or(NOT_MEASURED),
                "interpretation": quality["interpretation"][0]["text"].as_str().unwrap_or(NOT_ASSESSED),
            },
            "domain": {
                "isDermatological": is_skin,
                "additionalData": {
                    "aiConfidence": confidence(part(domain, "ai-confidence"), "aiConfidence",
                        "AI model confidence in the image being dermatological"),
                },
            },
            "modality": {
                "value": kind,
                "additionalData": {
                    "aiConfidenceClinical": confidence(part(modality, "XC"), "aiConfidenceClinical",
                        "AI model confidence in identifying the image's modality as clinical"),
                    "aiConfidenceDermoscopic": confidence(part(modality, "DMS"), "aiConfidenceDermoscopic",
                        "AI model confidence in identifying the image's modality as dermoscopic"),
                },
            },
        })
    }

    /// A figure of the model's performance.
    fn property(&self, code: &str) -> Option<f64> {
        let device = self.contained.iter().find(|resource| resource["resourceType"] == "Device")?;
        let property = list(&device["property"]).iter().find(|property| has_code(&property["type"], code))?;
        property["valueQuantity"][0]["value"].as_f64()
    }

    /// Seconds from the images' acceptance to the report.
    fn duration(&self) -> f64 {
        let time = |name: &str| OffsetDateTime::parse(self.report[name].as_str()?, &Rfc3339).ok();
        let duration = time("issued").zip(time("effectiveDateTime")).map(|(end, begin)| end - begin);
        duration.map_or(SHORTEST, |duration| duration.as_seconds_f64().max(SHORTEST))
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn measured(of: &Value) -> Option<f64> {
    of["valueQuantity"]["value"].as_f64()
}

fn component<'r>(of: &'r Value, code: &str) -> Option<&'r Value> {
    list(&of["component"]).iter().find(|component| has_code(&component["code"], code))
}

/// The first coding of a concept that is like this, or null.
fn coding(concept: &Value, like: impl Fn(&Value) -> bool) -> &Value {
    list(&concept["coding"]).iter().find(|coding| like(coding)).unwrap_or(&Value::Null)
}

fn has_code(concept: &Value, code: &str) -> bool {
    coding(concept, |coding| coding["code"] == code).is_object()
}

/// The model's own name of the class that a concept is.
fn class(concept: &Value) -> Option<&str> {
    list(&concept["coding"]).iter().find_map(|coding| coding["code"].as_str()?.strip_prefix("class-"))
}

/// A concept as these clients read it: every coding with every key, that of ICD-11 first.
fn concept(concept: &Value) -> Value {
    let mut codings: Vec<&Value> = list(&concept["coding"]).iter().collect();
    codings.sort_by_key(|coding| coding["system"] != ICD11);
    let text = concept["text"].as_str().or(codings.first().and_then(|coding| coding["display"].as_str()));
    json!({
        "text": text.unwrap_or_default(),
        "coding": codings.into_iter().map(told).collect::<Vec<_>>(),
    })
}

/// A coding with every key. Codes of ours have no system.
fn told(coding: &Value) -> Value {
    let version = &coding["version"];
    let (system, issuer) = match coding["system"].as_str().unwrap_or_default() {
        ICD11 => {
            let release = version.as_str().unwrap_or_default();
            (json!(format!("https://icd.who.int/browse/{release}/mms/en")), "ICD-11")
        }
        LOINC => (json!(LOINC), "LOINC"),
        url if url.starts_with("http://terminology.hl7.org/") => (json!(url), "HL7"),
        _ => (Value::Null, ISSUER),
    };
    json!({
        "code": coding["code"].as_str().unwrap_or_default(), "display": coding["display"], "system": system,
        "systemDisplay": issuer, "version": version,
    })
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::fhir::{CodeableConcept, Coding, ICD11_VERSION, coding as icd, local};

    use super::*;

    fn percent(value: f64) -> Value {
        json!({ "value": value, "unit": "%", "system": "http://unitsofmeasure.org", "code": "%" })
    }

    fn observation(id: &str, code: &str, with: &Value) -> Value {
        let mut resource = json!({ "resourceType": "Observation", "id": id, "code": CodeableConcept::from(local(code, code)) });
        resource.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        resource
    }

    fn part(code: Coding, value: f64) -> Value {
        json!({ "code": CodeableConcept::from(code), "valueQuantity": percent(value) })
    }

    /// Seven classes, the first with a code of ICD-11 and the last without.
    fn distribution(about: &str) -> Value {
        let melanoma =
            Coding { version: Some(ICD11_VERSION.into()), ..icd(ICD11, "2C30", "Melanoma of skin") };
        let class = |name: &str, value: f64| part(local(&format!("class-{name}"), name), value);
        let mut first = class("mel", 61.42);
        first["code"] = json!({ "coding": [local("class-mel", "Melanoma"), melanoma], "text": "Melanoma" });
        let rest =
            [("nv", 24.10), ("bkl", 8.35), ("bcc", 3.05), ("akiec", 1.76), ("df", 0.87), ("vasc", 0.45)];
        let classes = std::iter::once(first).chain(rest.map(|(name, value)| class(name, value)));
        let entropy = part(local("normalised-entropy", "Entropy"), 56.16);
        let component: Vec<Value> = classes.chain([entropy]).collect();
        observation(
            &format!("classification-{about}"),
            "condition-distribution",
            &json!({ "component": component }),
        )
    }

    /// Image `n`: a photograph of skin, or something else.
    fn about(n: usize, is_skin: bool) -> Vec<Value> {
        let dcm = |code: &str| icd("http://dicom.nema.org/resources/ontology/DCM", code, code);
        let acceptable = json!({ "code": CodeableConcept::from(local("image-quality-acceptable", "")), "valueBoolean": true });
        let quality = json!({
            "valueQuantity": percent(87.0), "interpretation": [{ "text": "Good" }], "component": [acceptable],
        });
        let confidence = part(local("ai-confidence", ""), if is_skin { 99.2 } else { 3.1 });
        let domain = json!({ "valueBoolean": is_skin, "component": [confidence] });
        let modality = json!({
            "valueCodeableConcept": CodeableConcept::from(dcm("XC")),
            "component": [part(dcm("XC"), 97.9), part(dcm("DMS"), 2.1)],
        });
        let mut all = vec![
            json!({ "resourceType": "Media", "id": format!("image-{n}") }),
            observation(&format!("quality-{n}"), "image-quality", &quality),
            observation(&format!("domain-{n}"), "dermatological-domain", &domain),
            observation(&format!("modality-{n}"), "image-modality", &modality),
        ];
        if is_skin {
            all.push(distribution(&n.to_string()));
            all.extend(indicators(&n.to_string(), 64.47));
            all.extend(["mel", "nv", "bkl", "bcc", "akiec"].map(|class| {
                json!({
                    "resourceType": "Media", "id": format!("heatmap-{n}-{class}"), "height": 24, "width": 32,
                    "content": { "contentType": "image/png", "data": "iVBORw==", "title": format!("Heat map for {class}") },
                })
            }));
        } else {
            let absent = json!({ "dataAbsentReason": { "text": "The image was not analysed." } });
            all.push(observation(&format!("classification-{n}"), "condition-distribution", &absent));
        }
        all
    }

    fn indicators(about: &str, malignancy: f64) -> Vec<Value> {
        let indicator = |id: &str, code: &str, value: f64| {
            observation(&format!("{id}-{about}"), code, &json!({ "valueQuantity": percent(value) }))
        };
        vec![
            indicator("malignancy", "malignancy-suspicion", malignancy),
            indicator("pigmented", "pigmented-lesion", 93.87),
            indicator("urgent", "urgent-referral", 61.42),
            indicator("high-priority", "high-priority-referral", 66.23),
            indicator("has-condition", "has-condition", 75.9),
        ]
    }

    fn report(contained: Vec<Vec<Value>>) -> Value {
        let metric = |code: &str, value: f64| json!({ "type": CodeableConcept::from(local(code, code)), "valueQuantity": [percent(value)] });
        let device = json!({
            "resourceType": "Device", "id": "device",
            "property": [metric("top1-sensitivity", 82.1), metric("top1-specificity", 96.7)],
        });
        let contained: Vec<Value> = std::iter::once(device).chain(contained.into_iter().flatten()).collect();
        json!({
            "resourceType": "DiagnosticReport", "id": "f426f15d-fcea-4bd0-942e-7528bf163c5d", "status": "preliminary",
            "category": [{ "coding": [icd("http://terminology.hl7.org/CodeSystem/v2-0074", "IMG", "Diagnostic Imaging")] }],
            "code": { "coding": [local("skin-image-analysis-report", "Skin image analysis report"),
                icd(LOINC, "100063-7", "Primary skin concern")], "text": "Analysis" },
            "effectiveDateTime": "2026-02-13T14:58:25Z", "issued": "2026-02-13T14:58:27.466Z", "contained": contained,
        })
    }

    #[test]
    fn an_image_is_told_with_every_key() {
        let body = render(&report(vec![about(1, true)]));
        assert_eq!(
            body["identifier"],
            json!({ "use": "official", "value": "f426f15d-fcea-4bd0-942e-7528bf163c5d" })
        );
        assert_eq!(
            (&body["status"], &body["issued"]),
            (&json!("preliminary"), &json!("2026-02-13T14:58:27.466Z"))
        );
        assert_eq!(body["analysisDuration"], 2.466);
        assert_eq!(
            body["performanceIndicator"],
            json!({ "sensitivity": 82.1, "specificity": 96.7, "entropy": 56.16 })
        );
        let indicators = json!({
            "hasCondition": 75.9, "pigmentedLesion": 93.87, "malignancy": 64.47, "urgentReferral": 61.42,
            "highPriorityReferral": 66.23,
        });
        let image = &body["imagingAnalysis"][0];
        assert_eq!((&body["clinicalIndicator"], &image["clinicalIndicator"]), (&indicators, &indicators));
        let melanoma = json!({ "text": "Melanoma", "coding": [{
            "code": "2C30", "display": "Melanoma of skin", "system": "https://icd.who.int/browse/2025-01/mms/en",
            "systemDisplay": "ICD-11", "version": "2025-01",
        }, {
            "code": "class-mel", "display": "Melanoma", "system": null, "systemDisplay": "Dermflow", "version": null,
        }]});
        let loinc = json!({
            "code": "100063-7", "display": "Primary skin concern", "system": "http://loinc.org",
            "systemDisplay": "LOINC", "version": null,
        });
        assert_eq!(body["code"]["coding"][1], loinc);
        assert_eq!(body["conclusion"][0], json!({ "probability": 61.42, "code": melanoma }));
        let last = json!({ "text": "vasc", "coding": [{
            "code": "class-vasc", "display": "vasc", "system": null, "systemDisplay": "Dermflow", "version": null,
        }]});
        assert_eq!(body["conclusion"][6]["code"], last);
        assert_eq!(body["category"][0]["coding"][0]["systemDisplay"], "HL7");
        let heat_map = json!({
            "title": "Heat map for mel", "contentType": "image/png", "data": "iVBORw==", "height": 24, "width": 32,
            "colorModel": "RGB",
        });
        assert_eq!(image["conclusion"][0]["explainability"], json!({ "heatMap": heat_map }));
        let conclusions = image["conclusion"].as_array().unwrap();
        assert_eq!(conclusions.len(), 7);
        assert!(conclusions[..5].iter().all(|c| c["explainability"].is_object()));
        assert!(conclusions[5..].iter().all(|c| c.as_object().unwrap()["explainability"].is_null()));
        let validity = &image["mediaValidity"];
        assert_eq!(validity["isValid"], true);
        assert_eq!(
            validity["quality"],
            json!({ "acceptable": true, "score": 87.0, "interpretation": "Good" })
        );
        assert_eq!(validity["modality"]["value"], "Clinical");
        assert_eq!(validity["modality"]["additionalData"]["aiConfidenceClinical"]["value"], 97.9);
        let confidence = &validity["domain"]["additionalData"]["aiConfidence"];
        assert_eq!((&confidence["value"], &confidence["interpretation"]), (&json!(99.2), &Value::Null));
        let code = &confidence["code"]["coding"][0];
        assert_eq!(
            (&code["code"], &code["systemDisplay"], &code["system"]),
            (&json!("aiConfidence"), &json!("Dermflow"), &Value::Null)
        );
    }

    #[test]
    fn a_refused_image_has_all_blocks_and_the_others_make_the_conclusion() {
        let joint = [vec![distribution("joint")], indicators("joint", 12.5)].concat();
        let body = render(&report(vec![about(1, true), about(2, false), about(3, false), joint]));
        let images = body["imagingAnalysis"].as_array().unwrap();
        let valid: Vec<_> = images.iter().map(|image| image["mediaValidity"]["isValid"].as_bool()).collect();
        assert_eq!(valid, [Some(true), Some(false), Some(false)]);
        assert_eq!(
            (&body["clinicalIndicator"]["malignancy"], body["conclusion"].as_array().unwrap().len()),
            (&json!(12.5), 7)
        );
        let refused = &images[1];
        assert_eq!(refused["mediaValidity"]["domain"]["isDermatological"], false);
        assert_eq!(refused["mediaValidity"]["domain"]["additionalData"]["aiConfidence"]["value"], 3.1);
        assert_eq!(
            (&refused["conclusion"], &refused["performanceIndicator"]["entropy"]),
            (&json!([]), &json!(100.0))
        );
        assert_eq!(refused["clinicalIndicator"]["urgentReferral"], 0.0);
    }

    #[test]
    fn what_a_report_does_not_say_is_neutral() {
        let mut plain =
            report(vec![vec![json!({ "resourceType": "Media", "id": "image-1" }), distribution("1")]]);
        plain["contained"][0]["property"] = Value::Null;
        let body = render(&plain);
        let validity = &body["imagingAnalysis"][0]["mediaValidity"];
        assert_eq!(validity["isValid"], true);
        assert_eq!(
            validity["quality"],
            json!({ "acceptable": true, "score": NOT_MEASURED, "interpretation": NOT_ASSESSED })
        );
        assert_eq!(validity["modality"]["value"], "None");
        assert_eq!(
            validity["modality"]["additionalData"]["aiConfidenceDermoscopic"]["interpretation"],
            NOT_ASSESSED
        );
        assert_eq!(body["performanceIndicator"]["sensitivity"], NOT_MEASURED);
        assert!(body["imagingAnalysis"][0]["conclusion"][0]["explainability"].is_null());
        let nothing = render(&json!({}));
        assert_eq!(
            (&nothing["analysisDuration"], &nothing["imagingAnalysis"]),
            (&json!(SHORTEST), &json!([]))
        );
        assert_eq!(
            (&nothing["conclusion"], &nothing["performanceIndicator"]["entropy"]),
            (&json!([]), &json!(100.0))
        );
    }
}
