//! What clients build their forms from: the questions of the scores, and the names of clinical signs.

use serde_json::{Value, json};

use super::{
    score::{Item, SCORES, Score, wording::in_all},
    sites::named,
};

/// The body of `GET /questionnaires`, for one score or for a condition by its code of ICD-11, or for all.
pub(crate) fn list(code: Option<&str>, pathology: Option<&str>) -> Value {
    let is_asked = |score: &&Score| {
        let is_for = |wanted: &str| {
            score.conditions.is_empty() || score.conditions.iter().any(|prefix| wanted.starts_with(prefix))
        };
        code.is_none_or(|code| code == score.code) && pathology.is_none_or(is_for)
    };
    SCORES.iter().filter(is_asked).map(questionnaire).collect()
}

fn questionnaire(score: &Score) -> Value {
    json!({
        "identifier": score.code,
        "code": score.code,
        "mode": "local",
        "path": "/severity-assessment/manual",
        "title": named(in_all(score.title)),
        "questions": score.items.iter().map(question).collect::<Vec<_>>(),
    })
}

fn question(item: &Item) -> Value {
    let answer =
        |(value, &word): (usize, &&'static str)| json!({ "value": value, "label": named(in_all(word)) });
    json!({
        "code": item.code,
        "label": named(in_all(item.text)),
        "minimum": item.range.start(),
        "maximum": item.range.end(),
        "integer": item.whole,
        "answers": item.words.iter().enumerate().map(answer).collect::<Vec<_>>(),
    })
}

/// The clinical signs among the items of the scores.
const SIGNS: [(&str, [&str; 4]); 14] = [
    ("abscess", ["Abscess", "Absceso", "Abszess", "Abcès"]),
    ("crusting", ["Crusting", "Costras", "Krusten", "Croûtes"]),
    ("desquamation", ["Desquamation", "Descamación", "Schuppung", "Desquamation"]),
    ("drainingTunnel", ["Draining tunnel", "Túnel drenante", "Drainierender Gang", "Tunnel drainant"]),
    ("dryness", ["Dryness", "Sequedad", "Trockenheit", "Sécheresse"]),
    ("erythema", ["Erythema", "Eritema", "Erythem", "Érythème"]),
    ("excoriation", ["Excoriation", "Excoriación", "Exkoriation", "Excoriation"]),
    ("induration", ["Induration", "Induración", "Induration", "Induration"]),
    ("inflammation", ["Inflammation", "Inflamación", "Entzündung", "Inflammation"]),
    ("lichenification", ["Lichenification", "Liquenificación", "Lichenifikation", "Lichénification"]),
    ("nodule", ["Nodule", "Nódulo", "Knoten", "Nodule"]),
    ("pruritus", ["Itch", "Prurito", "Juckreiz", "Prurit"]),
    ("swelling", ["Swelling", "Hinchazón", "Schwellung", "Gonflement"]),
    ("wheals", ["Wheals", "Habones", "Quaddeln", "Papules ortiées"]),
];

/// The body of `GET /clinical-signs`.
pub(crate) fn signs() -> Value {
    SIGNS.iter().map(|(sign, names)| ((*sign).to_owned(), named(*names))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(list: &Value) -> Vec<&str> {
        list.as_array().unwrap().iter().map(|entry| entry["code"].as_str().unwrap()).collect()
    }

    #[test]
    fn a_condition_has_its_scores() {
        assert_eq!(codes(&list(None, Some("EA90.42"))), ["dlqi", "pasi", "pga", "pure4"]);
        assert_eq!(codes(&list(None, Some("EB05"))), ["dlqi", "uas", "uct"]);
        assert_eq!(codes(&list(None, Some("EA89"))), ["dlqi", "scorad"]);
        assert_eq!(codes(&list(Some("uct"), None)), ["uct"]);
        assert_eq!(codes(&list(Some("uct"), Some("EA90"))), [""; 0]);
        assert_eq!(codes(&list(None, None)).len(), SCORES.len());
        let dlqi = list(Some("dlqi"), None);
        assert_eq!(dlqi[0]["questions"][0]["answers"].as_array().map(Vec::len), Some(4));
        assert_eq!(dlqi[0]["questions"][3]["label"]["de_DE"], "Kleidung");
        assert_eq!(dlqi[0]["questions"][3]["answers"][1]["label"]["fr_FR"], "Un peu");
    }

    #[test]
    fn signs_are_items() {
        for (sign, _) in SIGNS {
            assert!(SCORES.iter().any(|score| score.items.iter().any(|item| item.code == sign)), "{sign}");
        }
        assert_eq!(signs()["pruritus"]["de_DE"], "Juckreiz");
    }
}
