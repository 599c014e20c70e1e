//! What the codes of ours mean: code systems, value sets of the codes that go with them, and the way to ICD-11.

use dermflow_auth::audit::ACTIONS;
use dermflow_schemas::{
    error::{CODES, Retry},
    fhir::{CANONICAL, ICD11, ICD11_VERSION, SNOMED},
};
use serde_json::{Value, json};

use super::definition;
use crate::device::sites::{SITES, Site};

/// A code, and its words.
type Concept = (&'static str, &'static str);

/// Of the code system of reports and jobs, but for the classes. What a report of the bundled model may have is here,
/// whichever part of it says so.
const CONCEPTS: &[Concept] = &[
    ("skin-image-analysis", "Analysis of skin images"),
    ("skin-image-analysis-report", "Skin image analysis report"),
    ("ai-inference", "Artificial intelligence inference"),
    ("condition-distribution", "Probability distribution over skin condition classes"),
    ("normalised-entropy", "Normalised entropy of the distribution"),
    ("malignancy-suspicion", "Suspicion of malignancy"),
    ("pigmented-lesion", "Pigmented lesion"),
    ("urgent-referral", "Urgent referral"),
    ("high-priority-referral", "High-priority referral"),
    ("has-condition", "Skin condition present"),
    ("image-quality", "Dermatology image quality score"),
    ("image-quality-acceptable", "Image quality acceptable"),
    ("image-quality-focus", "Focus"),
    ("image-quality-exposure", "Exposure"),
    ("image-quality-contrast", "Contrast"),
    ("image-quality-resolution", "Resolution"),
    ("image-quality-coverage", "Share of the frame that is image"),
    ("dermatological-domain", "Image shows skin"),
    ("image-modality", "Image modality"),
    ("ai-confidence", "Confidence of the model"),
    ("lesion-area-fraction", "Lesion area as a fraction of the image"),
    ("lesion-polygon", "Lesion outline in pixel coordinates"),
    ("bbox-x", "Bounding box left"),
    ("bbox-y", "Bounding box top"),
    ("bbox-width", "Bounding box width"),
    ("bbox-height", "Bounding box height"),
    ("class-activation-map", "Class activation heat map"),
    ("top1-sensitivity", "Top-1 macro-averaged sensitivity on the locked test set"),
    ("top1-specificity", "Top-1 macro-averaged specificity on the locked test set"),
    ("top1-accuracy", "Top-1 accuracy on the locked test set"),
    ("macro-auc", "Macro-averaged area under the ROC curve on the locked test set"),
    ("melanoma-auc", "Area under the ROC curve of melanoma on the locked test set"),
    ("malignancy-auc", "Area under the ROC curve of malignancy on the locked test set"),
    ("malignancy-sensitivity", "Sensitivity of the malignancy threshold on the locked test set"),
    ("malignancy-specificity", "Specificity of the malignancy threshold on the locked test set"),
    (
        "urgent-sensitivity",
        "Sensitivity of the threshold of urgent referral (melanoma) on the locked test set",
    ),
    (
        "urgent-specificity",
        "Specificity of the threshold of urgent referral (melanoma) on the locked test set",
    ),
    (
        "high-priority-sensitivity",
        "Sensitivity of the threshold of high-priority referral on the locked test set",
    ),
    (
        "high-priority-specificity",
        "Specificity of the threshold of high-priority referral on the locked test set",
    ),
    ("domain-lesions-accepted", "Share of the locked test set that passes for skin"),
    ("domain-objects-refused", "Share of everyday objects that do not pass for skin"),
    ("calibration-error", "Expected calibration error of the first choice on the locked test set"),
    ("out-of-domain-auc", "Area under the ROC curve of everyday objects against lesions"),
    (
        "isic2017-melanoma-auc",
        "Area under the ROC curve of melanoma on the ISIC 2017 test set, of the same archive as part of the training",
    ),
    (
        "outline-iou",
        "Mean overlap (intersection over union) of the map of the lesion with drawn ones on the validation set",
    ),
];

/// A class of the bundled model, and what ICD-11 has for it.
struct Class {
    code: &'static str,
    display: &'static str,
    icd11: Option<Target>,
}

/// A concept of ICD-11. Where the class holds more than that, it says what: the target is narrower then.
struct Target {
    code: &'static str,
    display: &'static str,
    more: Option<&'static str>,
}

const fn class(code: &'static str, display: &'static str, icd11: Option<Target>) -> Class {
    Class { code, display, icd11 }
}

const fn target(code: &'static str, display: &'static str, more: Option<&'static str>) -> Target {
    Target { code, display, more }
}

const CLASSES: &[Class] = &[
    class(
        "class-akiec",
        "Actinic keratosis or Bowen's disease",
        Some(target("EK90.0", "Actinic keratosis", Some("The class holds Bowen's disease, too."))),
    ),
    class("class-bcc", "Basal cell carcinoma", Some(target("2C32", "Basal cell carcinoma of skin", None))),
    class(
        "class-bkl",
        "Benign keratosis (seborrhoeic keratosis, solar lentigo, lichen-planus-like keratosis)",
        Some(target(
            "2F21.0",
            "Seborrhoeic keratosis",
            Some("The class holds solar lentigo and lichen-planus-like keratosis, too."),
        )),
    ),
    class("class-df", "Dermatofibroma", Some(target("2F23.0", "Dermatofibroma", None))),
    class(
        "class-mel",
        "Melanoma",
        Some(target("2C30", "Melanoma of skin", Some("The class holds melanoma in situ, too."))),
    ),
    class(
        "class-nv",
        "Melanocytic naevus (mole)",
        Some(target("2F20.Z", "Melanocytic naevus, unspecified", None)),
    ),
    class("class-vasc", "Vascular lesion (angioma, angiokeratoma, pyogenic granuloma, haemorrhage)", None),
    class("class-other", "Something else than a skin lesion", None),
];

/// Body sites without a side, beside those of the device API.
const UNSIDED: &[Concept] = &[
    ("1902009", "Skin structure of ear"),
    ("371311000", "Skin structure of upper limb"),
    ("181536004", "Skin of posterior surface of elbow"),
    ("33712006", "Skin structure of hand"),
    ("371304004", "Skin structure of lower limb"),
    ("181553006", "Skin of anterior surface of knee"),
    ("60496002", "Skin structure of foot"),
];

/// Body sites that a caller may choose from. Any other concept of SNOMED CT is taken, too.
fn chosen() -> impl Iterator<Item = Concept> {
    SITES.iter().map(|site| (site.snomed, site.display)).chain(UNSIDED.iter().copied())
}

/// Everything that is published.
pub(super) fn definitions() -> Vec<Value> {
    let analysis = CONCEPTS.iter().copied().chain(CLASSES.iter().map(|class| (class.code, class.display)));
    // What is no error is told by a code, too.
    let notes = [("job-accepted", "The analysis goes on."), ("job-deleted", "The job is removed.")];
    let errors = CODES.iter().map(|code| (code.kind().code, code.kind().text)).chain(notes);
    let retries = [
        (Retry::Never, "The same request will fail again."),
        (Retry::Safe, "The same request may be sent again after a while."),
        (Retry::SameKey, "The same request may be sent again with the same Idempotency-Key."),
        (Retry::NewKey, "The request may succeed as a new job."),
        (Retry::Poll, "The job goes on."),
    ];
    let retries = retries.map(|(retry, text)| (retry.as_str(), text));
    let sites = SITES.iter().map(|site| (site.code, site.names[0]));
    let actions = ACTIONS.iter().map(|action| (action.as_str(), action.as_str()));
    vec![
        system("skin-image-analysis", "SkinImageAnalysis", "Skin image analysis", analysis),
        system("error", "Errors", "Errors, and notes that are none", errors),
        system("retry", "Retries", "Whether a request may be repeated", retries),
        system("audit-action", "AuditActions", "What the audit trail records", actions),
        system("body-site", "DeviceBodySites", "Body sites of the device API", sites),
        conditions(),
        body_sites(),
        map(),
        sites_map(),
    ]
}

fn system(id: &str, name: &str, title: &str, concepts: impl IntoIterator<Item = Concept>) -> Value {
    let concepts: Vec<Value> =
        concepts.into_iter().map(|(code, display)| json!({"code": code, "display": display})).collect();
    let mut system = definition("CodeSystem", id, name, title, "Every code of ours of this kind.");
    system["caseSensitive"] = json!(true);
    system["content"] = json!("complete");
    system["count"] = json!(concepts.len());
    system["concept"] = json!(concepts);
    system
}

fn analysis_system() -> String {
    format!("{CANONICAL}/CodeSystem/skin-image-analysis")
}

fn conditions() -> Value {
    let codes: Vec<Value> =
        CLASSES.iter().map(|class| json!({"code": class.code, "display": class.display})).collect();
    let mut set = definition(
        "ValueSet",
        "conditions",
        "Conditions",
        "Classes of skin lesions",
        "What the bundled model tells apart.",
    );
    set["compose"] = json!({"include": [{"system": analysis_system(), "concept": codes}]});
    set
}

const COPYRIGHT: &str = "This has concepts of SNOMED CT, which is of SNOMED International.";

fn body_sites() -> Value {
    let codes: Vec<Value> =
        chosen().map(|(code, display)| json!({"code": code, "display": display})).collect();
    let mut set = definition(
        "ValueSet",
        "body-sites",
        "BodySites",
        "Body sites of skin images",
        "Sites to choose from, many of DICOM CID 4029; any other concept of SNOMED CT is taken, too.",
    );
    set["copyright"] = json!(COPYRIGHT);
    set["compose"] = json!({"include": [{"system": SNOMED, "concept": codes}]});
    set
}

/// From the classes to ICD-11. Equivalence is that of the target, as R4 has it: of a class that holds more than its
/// concept, the concept is narrower.
fn map() -> Value {
    let element = |class: &Class| {
        let target = match &class.icd11 {
            None => json!({"equivalence": "unmatched"}),
            Some(Target { code, display, more: None }) => {
                json!({"code": code, "display": display, "equivalence": "equivalent"})
            }
            Some(Target { code, display, more: Some(more) }) => {
                json!({"code": code, "display": display, "equivalence": "narrower", "comment": more})
            }
        };
        json!({"code": class.code, "display": class.display, "target": [target]})
    };
    let mut map = definition(
        "ConceptMap",
        "conditions-icd-11",
        "ConditionsIcd11",
        "From the classes of skin lesions to ICD-11",
        "A class is no diagnosis, and what it is mapped to is none.",
    );
    map["sourceCanonical"] = json!(format!("{CANONICAL}/ValueSet/conditions"));
    map["group"] = json!([{
        "source": analysis_system(),
        "target": ICD11,
        "targetVersion": ICD11_VERSION,
        "element": CLASSES.iter().map(element).collect::<Vec<_>>(),
    }]);
    map
}

/// From the body sites of the device API to SNOMED CT, as reports have them.
fn sites_map() -> Value {
    let element = |site: &Site| {
        let target = json!({"code": site.snomed, "display": site.display, "equivalence": "equivalent"});
        json!({"code": site.code, "display": site.names[0], "target": [target]})
    };
    let mut map = definition(
        "ConceptMap",
        "body-sites-snomed",
        "BodySitesSnomed",
        "From the body sites of the device API to SNOMED CT",
        "As the place of an image a site and its concept are the same.",
    );
    map["copyright"] = json!(COPYRIGHT);
    map["targetCanonical"] = json!(format!("{CANONICAL}/ValueSet/body-sites"));
    map["group"] = json!([{
        "source": format!("{CANONICAL}/CodeSystem/body-site"),
        "target": SNOMED,
        "element": SITES.iter().map(element).collect::<Vec<_>>(),
    }]);
    map
}

#[cfg(test)]
mod tests {
    use crate::snomed::is_concept_id;

    use super::*;

    #[test]
    fn a_code_is_in_its_system_once() {
        for system in definitions() {
            let mut seen = std::collections::HashSet::new();
            for concept in system["concept"].as_array().into_iter().flatten() {
                assert!(seen.insert(concept["code"].to_string()), "{} in {}", concept["code"], system["id"]);
            }
        }
        let mut seen = std::collections::HashSet::new();
        for (code, display) in chosen() {
            assert!(is_concept_id(code) && seen.insert(code), "{code} {display}");
        }
        assert_eq!(seen.len(), SITES.len() + UNSIDED.len());
    }
}
