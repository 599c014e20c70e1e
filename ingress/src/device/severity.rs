//! `POST /severity-assessment/…`: how bad a known condition is, from answers, or from an image and answers.
//!
//! The former is arithmetic, see [`score`]. The latter needs models that there are none of here; its requests are checked
//! all the same, so that a client hears first what is wrong with them.

use dermflow_schemas::{
    error::{ApiError, Code},
    fhir::Language,
    limits::MAX_IMAGES,
};
use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    body::{self, Object, Part},
    diagnosis::image,
    own_code,
    score::{self, Item, NOT_COMPUTED, Score, wording::in_language},
    sites,
};
use crate::element::Faults;

/// What is asked besides the image, by the scores that need one: name and largest number. All are whole but surfaces.
const AUTOMATIC: [(&str, &[(&str, f64)]); 11] = [
    ("aeasi", &[("surface", 100.0), ("patientAge", 150.0)]),
    ("agppga", &[]),
    ("aihs4", &[]),
    ("aladin", &[]),
    ("apasi", &[("surface", 6.0)]),
    ("asalt", &[]),
    ("ascorad", &[("surface", 100.0), ("pruritus", 10.0), ("sleeplessness", 10.0)]),
    ("auas", &[("pruritus", 3.0)]),
    ("avasi", &[]),
    ("awosi", &[]),
    ("nsil", &[]),
];

/// The scores of a request, with their answers in the order of their items.
type Answered = Vec<(&'static Score, Vec<f64>)>;

/// `POST /severity-assessment/manual`: reads a body.
pub(crate) fn parse(body: &[u8]) -> Result<Assessment, ApiError> {
    let (site, scores, missing) = body::read(body, |root, faults| {
        let site = body_site(root, faults);
        // Images are welcome, and not looked at.
        if let Some(payload) = root.get("payload") {
            images(&payload, faults);
        }
        known_condition(root, faults);
        let (scores, missing) = manual(root, faults)?;
        Some((site?, scores, missing))
    })?;
    match missing {
        Some(code) => Err(ApiError::from(Code::ScoreUnsupported).detail(code)),
        None => Ok(Assessment { site, scores }),
    }
}

/// `POST /severity-assessment/automatic/local`: what is wrong with a request, or that nothing answers it.
pub(crate) fn parse_local(body: &[u8]) -> ApiError {
    let checked = body::read(body, |root, faults| {
        let site = body_site(root, faults);
        if let Some(payload) = root.required("payload", faults) {
            image(&payload, faults);
        }
        known_condition(root, faults);
        for (code, system) in automatic(root, faults)? {
            if code == "asalt" && site.is_some_and(|site| !site.is_head()) {
                let rule = "With asalt, a side of the head or the scalp.".to_owned();
                faults.add(Code::ValueInvalid, "bodySite", Some(rule));
            }
            answers(code, &system, faults);
        }
        Some(())
    });
    checked.err().unwrap_or_else(no_model)
}

/// `POST /severity-assessment/automatic/global`: the same, with an image a body site.
pub(crate) fn parse_global(body: &[u8]) -> ApiError {
    let checked = body::read(body, |root, faults| {
        known_condition(root, faults);
        for (_, system) in automatic(root, faults)? {
            let Some(items) = system.object(faults).and_then(|system| system.required("item", faults)) else {
                continue;
            };
            let Some(by_site) = items.object(faults) else { continue };
            for name in by_site.names() {
                let Some(site) = sites::find(name) else {
                    items.wrong::<()>("codes of /body-sites as names", faults);
                    continue;
                };
                let zone = by_site.required(site.code, faults).and_then(|zone| zone.object(faults));
                if let Some(payload) = zone.and_then(|zone| zone.required("payload", faults)) {
                    image(&payload, faults);
                }
            }
        }
        Some(())
    });
    checked.err().unwrap_or_else(no_model)
}

fn no_model() -> ApiError {
    ApiError::from(Code::ScoreUnsupported).detail(
        "no model here grades images: /severity-assessment/manual takes grades and computes the score",
    )
}

fn body_site(root: &Object<'_, '_>, faults: &mut Faults) -> Option<&'static sites::Site> {
    let node = root.required("bodySite", faults)?;
    let site = sites::find(node.string(faults)?);
    if site.is_none() {
        faults.add(Code::ValueInvalid, node.path, Some("Expected a code of /body-sites.".into()));
    }
    site
}

fn images(payload: &Part<'_, '_>, faults: &mut Faults) -> Option<()> {
    let items = payload.items(faults)?;
    if items.len() > MAX_IMAGES {
        faults.add(Code::ImageCount, &payload.path, None);
        return None;
    }
    for item in items {
        image(&item, faults);
    }
    Some(())
}

/// What the patient has, as the caller codes it. No formula depends on it.
fn known_condition(root: &Object<'_, '_>, faults: &mut Faults) -> Option<()> {
    let condition = root.required("knownCondition", faults)?.object(faults)?;
    let conclusion = condition.required("conclusion", faults)?.object(faults)?;
    if let Some(text) = conclusion.required("text", faults) {
        text.string(faults);
    }
    for coding in conclusion.get("coding")?.items(faults)? {
        let Some(coding) = coding.object(faults) else { continue };
        // Clients send all four, and null for a system or a display that there is not.
        for (name, is_nullable) in
            [("system", true), ("systemDisplay", false), ("code", false), ("display", true)]
        {
            let text =
                if is_nullable { coding.nullable(name, faults) } else { coding.required(name, faults) };
            if let Some(text) = text {
                text.string(faults);
            }
        }
    }
    Some(())
}

/// The scores that are asked for, each with what stands under its name.
fn systems<'n, 'a, S>(
    root: &Object<'n, 'a>,
    find: impl Fn(&str) -> Option<(&'static str, S)>,
    faults: &mut Faults,
) -> Option<Vec<(S, Part<'n, 'a>)>> {
    let node = root.required("scoringSystem", faults)?;
    let object = node.object(faults)?;
    let found: Option<Vec<_>> = object
        .names()
        .map(|name| {
            let (code, system) = find(name)?;
            Some((system, object.required(code, faults)?))
        })
        .collect();
    let found = found.filter(|found| !found.is_empty());
    if found.is_none() {
        node.wrong::<()>("names of scores that this path computes, one or more", faults);
    }
    found
}

fn automatic<'n, 'a>(
    root: &Object<'n, 'a>,
    faults: &mut Faults,
) -> Option<Vec<(&'static str, Part<'n, 'a>)>> {
    let find = |name: &str| AUTOMATIC.iter().find(|(code, _)| *code == name).map(|(code, _)| (*code, *code));
    systems(root, find, faults)
}

/// The answers under `questionnaireResponse.item`.
fn items<'n, 'a>(system: &Part<'n, 'a>, faults: &mut Faults) -> Option<Object<'n, 'a>> {
    let response = system.object(faults)?.required("questionnaireResponse", faults)?.object(faults)?;
    response.required("item", faults)?.object(faults)
}

fn answers(code: &str, system: &Part<'_, '_>, faults: &mut Faults) -> Option<()> {
    let (_, asked) = AUTOMATIC.iter().find(|(known, _)| *known == code)?;
    if asked.is_empty() {
        return system.object(faults).map(drop);
    }
    let items = items(system, faults)?;
    for (name, most) in *asked {
        if let Some(answer) = items.required(name, faults) {
            answer.number(&(0.0..=*most), *name != "surface", faults);
        }
    }
    Some(())
}

/// The answers of every score, and the name of one that is known and not computed.
fn manual(root: &Object<'_, '_>, faults: &mut Faults) -> Option<(Answered, Option<&'static str>)> {
    let find = |name: &str| match score::find(name) {
        Some(score) => Some((score.code, Ok(score))),
        None => (name == NOT_COMPUTED).then_some((NOT_COMPUTED, Err(NOT_COMPUTED))),
    };
    let (mut scores, mut missing) = (Vec::new(), None);
    for (asked, system) in systems(root, find, faults)? {
        let Some(items) = items(&system, faults) else { continue };
        match asked {
            Ok(score) => scores.push((score, graded(score, &items, faults))),
            Err(code) => missing = Some(code),
        }
    }
    Some((scores, missing))
}

fn graded(score: &Score, items: &Object<'_, '_>, faults: &mut Faults) -> Vec<f64> {
    let answer = |item: &Item| items.required(item.code, faults)?.number(&item.range, item.whole, faults);
    score.items.iter().filter_map(answer).collect()
}

/// A request with answers to all questions of its scores.
#[derive(Debug)]
pub(crate) struct Assessment {
    site: &'static sites::Site,
    scores: Answered,
}

impl Assessment {
    /// The names of the scores.
    pub(crate) fn codes(&self) -> Vec<&'static str> {
        self.scores.iter().map(|(score, _)| score.code).collect()
    }

    /// The body of the answer, at `now`; clients want to read how many seconds it took, more than none.
    pub(crate) fn render(&self, now: OffsetDateTime, seconds: f64, language: Language) -> Value {
        let evolution: Map<String, Value> = self
            .scores
            .iter()
            .map(|(score, answers)| (score.code.to_owned(), evolution(self.site, score, answers, language)))
            .collect();
        json!({
            "resourceType": "DiagnosticReport",
            "status": "preliminary",
            "issued": now.format(&Rfc3339).unwrap_or_default(),
            "analysisDuration": seconds.max(f64::MIN_POSITIVE),
            "mediaValidity": null,
            "patientEvolution": evolution,
        })
    }
}

/// What an index of the whole body gets from a region.
pub(super) const CONTRIBUTION: &str = "Contribution of the region to the score of the whole body";

fn evolution(site: &sites::Site, score: &Score, answers: &[f64], language: Language) -> Value {
    let item = |(item, answer): (&Item, &f64)| {
        let body = json!({
            "code": own_code(item.code, in_language(item.text, language)),
            "value": answer,
            "interpretation": item.interpretation(*answer, language),
            "additionalData": null,
        });
        (item.code.to_owned(), body)
    };
    let items: Map<String, Value> = score.items.iter().zip(answers).map(item).collect();
    let value = score.value(answers);
    let band = score.band(value);
    let text = in_language(CONTRIBUTION, language);
    let contribution = score
        .weight(site.code)
        .map(|weight| json!({ "value": weight * value, "code": own_code("globalScoreContribution", text) }));
    json!({
        "item": items,
        "score": {
            "value": value,
            "interpretation": { "category": in_language(band.category, language), "intensity": band.intensity as u8 },
            "additionalData": { "globalScoreContribution": contribution },
        },
        "media": { "attachment": null, "detection": null },
    })
}

#[cfg(test)]
mod tests {
    use super::{super::score::SCORES, *};

    fn request(scores: &Value) -> Value {
        json!({
            "bodySite": "armRight",
            "knownCondition": { "conclusion": { "coding": null, "text": "Naevus" } },
            "scoringSystem": scores,
        })
    }

    fn code(body: &Value) -> &'static str {
        parse(body.to_string().as_bytes()).err().map_or("", |error| error.kind().code)
    }

    #[test]
    fn every_score_answers_with_its_items() {
        for score in SCORES {
            let items: Map<String, Value> =
                score.items.iter().map(|item| (item.code.to_owned(), json!(item.range.end()))).collect();
            let body = request(&json!({ score.code: { "questionnaireResponse": { "item": items } } }));
            let answer = parse(body.to_string().as_bytes()).unwrap().render(
                OffsetDateTime::UNIX_EPOCH,
                0.0,
                Language::default(),
            );
            assert_eq!(answer["issued"], "1970-01-01T00:00:00Z");
            assert!(answer["analysisDuration"].as_f64().unwrap() > 0.0);
            let told = &answer["patientEvolution"][score.code];
            assert!(told["score"]["value"].is_f64() && told["score"]["interpretation"]["intensity"].is_u64());
            let told = told["item"].as_object().unwrap();
            assert_eq!(told.len(), score.items.len());
            for (name, item) in told {
                assert_eq!(item["code"]["coding"].as_array().map(Vec::len), Some(1));
                assert_eq!(item["code"]["coding"][0]["code"], **name);
                assert!(!item["interpretation"].as_str().unwrap().is_empty());
            }
        }
    }

    #[test]
    fn a_coding_may_be_without_system_and_display_in_so_many_words() {
        let faults = |name: &str, value: Option<Value>| {
            let mut coding = json!({
                "system": "https://icd.who.int/browse/2025-01/mms/en", "systemDisplay": "ICD-11", "code": "EA90",
                "display": "Psoriasis",
            });
            match value {
                Some(value) => coding[name] = value,
                None => drop(coding.as_object_mut().unwrap().remove(name)),
            }
            let mut body = request(&json!({ "nsil": {} }));
            body["payload"] = json!({ "contentAttachment": { "data": "!" } });
            body["knownCondition"]["conclusion"]["coding"] = json!([coding]);
            let told = parse_local(body.to_string().as_bytes()).faults.into_iter();
            let told = told.map(|fault| (fault.code.kind().code, fault.field.unwrap_or_default()));
            told.filter(|(_, field)| field.ends_with(name)).map(|(code, _)| code).collect::<Vec<_>>()
        };
        for (name, of_null) in [
            ("system", None),
            ("systemDisplay", Some("value-invalid")),
            ("code", Some("value-invalid")),
            ("display", None),
        ] {
            assert_eq!(faults(name, Some(Value::Null)), Vec::from_iter(of_null), "{name}");
            assert_eq!(faults(name, Some(json!(7))), ["value-invalid"], "{name}");
            assert_eq!(faults(name, None), ["element-missing"], "{name}");
        }
    }

    #[test]
    fn a_region_counts_by_its_weight() {
        let items = json!({ "surface": 2, "erythema": 3, "induration": 1, "desquamation": 1 });
        let mut body = request(&json!({ "pasi": { "questionnaireResponse": { "item": items } } }));
        let mut contribution = |site: &str| {
            body["bodySite"] = json!(site);
            let answer = parse(body.to_string().as_bytes()).unwrap().render(
                OffsetDateTime::UNIX_EPOCH,
                0.0,
                Language::default(),
            );
            answer["patientEvolution"]["pasi"]["score"]["additionalData"]["globalScoreContribution"].clone()
        };
        assert_eq!((&contribution("handLeft")["value"], contribution("tongue")), (&json!(2.0), Value::Null));
        assert_eq!(contribution("legRight")["code"]["coding"][0]["code"], "globalScoreContribution");
    }

    #[test]
    fn what_is_known_and_not_computed_says_so_once_the_request_is_right() {
        let response = json!({ "questionnaireResponse": { "item": {} } });
        assert_eq!(code(&request(&json!({ "resvech": response.clone() }))), "score-unsupported");
        assert_eq!(code(&request(&json!({ "resvech": {} }))), "element-missing");
        assert_eq!(code(&request(&json!({ "unheard": response }))), "value-invalid");
        assert_eq!(code(&request(&json!({}))), "value-invalid");
        assert_eq!(code(&request(&json!([]))), "value-invalid");
    }

    #[test]
    fn an_image_for_hair_is_one_of_the_head() {
        let mut body = request(&json!({ "asalt": {} }));
        body["payload"] = json!({ "contentAttachment": { "data": "!" } });
        let faults = |body: &Value| {
            let error = parse_local(body.to_string().as_bytes());
            error.faults.into_iter().filter_map(|fault| fault.field).collect::<Vec<_>>()
        };
        assert_eq!(faults(&body), ["payload.contentAttachment.data", "bodySite"]);
        body["bodySite"] = json!("scalp");
        assert_eq!(faults(&body), ["payload.contentAttachment.data"]);
    }

    #[test]
    fn an_image_a_body_site_is_checked_each() {
        let body = json!({
            "knownCondition": { "conclusion": { "text": "Psoriasis" } },
            "scoringSystem": { "apasi": { "item": {
                "armLeft": { "payload": { "contentAttachment": {} } }, "moon": {},
            }}},
        });
        let error = parse_global(body.to_string().as_bytes());
        let fields: Vec<_> = error.faults.iter().filter_map(|fault| fault.field.as_deref()).collect();
        assert_eq!(
            fields,
            ["scoringSystem.apasi.item.armLeft.payload.contentAttachment.data", "scoringSystem.apasi.item"]
        );
    }
}
