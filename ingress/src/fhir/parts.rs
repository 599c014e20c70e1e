//! A report as separate resources: what is contained in it, each with an id and a URL of its own, and where all of it comes
//! from as a Provenance.
//!
//! A part's id is the report's with the part's name behind it, `<uuid>-<name>`, so that it is found without an index.

use dermflow_schemas::fhir::{CANONICAL, hl7};
use serde_json::{Value, json};

/// The name of the Provenance among the parts.
const PROVENANCE: &str = "provenance";

/// The report, then its parts. They refer to each other by relative URLs.
pub(crate) fn separate(mut report: Value) -> Vec<Value> {
    let id = report["id"].as_str().unwrap_or_default().to_owned();
    let mut parts = match report.as_object_mut().and_then(|report| report.remove("contained")) {
        Some(Value::Array(parts)) => parts,
        _ => Vec::new(),
    };
    let names: Vec<(String, String)> = parts
        .iter()
        .map(|part| {
            let (name, kind) = (text(&part["id"]), text(&part["resourceType"]));
            (format!("#{name}"), format!("{kind}/{id}-{name}"))
        })
        .collect();
    let meta = &report["meta"];
    let meta = json!({"lastUpdated": meta["lastUpdated"], "security": meta["security"]});
    for part in &mut parts {
        part["id"] = json!(format!("{id}-{}", text(&part["id"])));
        part["meta"] = meta.clone();
        refer(part, &names);
    }
    refer(&mut report, &names);
    parts.push(provenance(&report, &id, &parts));
    let mut all = vec![report];
    all.append(&mut parts);
    all
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Where a reference leads to something contained, it leads to the part.
fn refer(value: &mut Value, names: &[(String, String)]) {
    match value {
        Value::Object(members) => {
            if let Some(Value::String(reference)) = members.get_mut("reference")
                && let Some((_, url)) = names.iter().find(|(name, _)| name == reference)
            {
                url.clone_into(reference);
            }
            members.values_mut().for_each(|member| refer(member, names));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| refer(item, names)),
        _ => {}
    }
}

/// From which images and which model the report and its findings were made.
fn provenance(report: &Value, id: &str, parts: &[Value]) -> Value {
    let of = |kind: &'static str| parts.iter().filter(move |part| part["resourceType"] == kind);
    let to =
        |part: &Value| json!({"reference": format!("{}/{}", text(&part["resourceType"]), text(&part["id"]))});
    // A picture that a device made is no input.
    let is_made = |part: &&Value| part["device"].is_object();
    let inputs = of("Media").filter(|part| !is_made(part)).map(|part| {
        let mut what = to(part);
        what["identifier"] = part["identifier"][0].clone();
        json!({"role": "source", "what": what})
    });
    let models = of("Device").map(|part| {
        let mut what = to(part);
        what["identifier"] = part["identifier"][0].clone();
        json!({"role": "source", "what": what})
    });
    let agents = of("Device").map(|part| {
        json!({
            "type": {"coding": [hl7("provenance-participant-type", "assembler", "Assembler")]},
            "who": to(part),
        })
    });
    let results = of("Observation").chain(of("Media").filter(is_made));
    let targets: Vec<Value> = std::iter::once(report).chain(results).map(to).collect();
    let (agents, entities): (Vec<Value>, Vec<Value>) = (agents.collect(), inputs.chain(models).collect());
    let label = hl7("v3-ObservationValue", "AIAST", "Artificial Intelligence asserted");
    json!({
        "resourceType": "Provenance",
        "id": format!("{id}-{PROVENANCE}"),
        "target": targets,
        "occurredPeriod": {"start": report["effectiveDateTime"], "end": report["issued"]},
        "recorded": report["issued"],
        "policy": [format!("{CANONICAL}/OperationDefinition/analyze")],
        "reason": [{"coding": [label]}],
        "activity": {"coding": [hl7("v3-DataOperation", "CREATE", "create")]},
        "agent": agents,
        "entity": entities,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_reference_is_left_behind() {
        let report = json!({
            "resourceType": "DiagnosticReport", "id": "r", "meta": {"lastUpdated": "t", "security": []},
            "contained": [
                {"resourceType": "Device", "id": "device", "identifier": [{"value": "sha256:1"}]},
                {"resourceType": "Media", "id": "image-1", "identifier": [{"value": "ab"}]},
                {"resourceType": "Media", "id": "heatmap-1", "device": {"reference": "#device"}},
                {"resourceType": "Observation", "id": "a-1", "device": {"reference": "#device"},
                    "derivedFrom": [{"reference": "#image-1"}]},
            ],
            "result": [{"reference": "#a-1", "display": "#a-1"}],
            "media": [{"link": {"reference": "#image-1"}}],
        });
        let all = separate(report);
        assert!(!Value::from(all.clone()).to_string().contains("\"reference\":\"#"), "{all:?}");
        assert_eq!(all[0]["result"][0], json!({"reference": "Observation/r-a-1", "display": "#a-1"}));
        assert_eq!(all[4]["derivedFrom"][0]["reference"], "Media/r-image-1");
        let provenance = &all[5];
        assert_eq!(provenance["agent"][0]["who"]["reference"], "Device/r-device");
        let targets: Vec<_> =
            provenance["target"].as_array().unwrap().iter().map(|t| text(&t["reference"])).collect();
        assert_eq!(targets, ["DiagnosticReport/r", "Observation/r-a-1", "Media/r-heatmap-1"]);
        assert_eq!(provenance["entity"][0]["what"]["identifier"]["value"], "ab");
        assert_eq!(provenance["entity"][1]["what"]["identifier"]["value"], "sha256:1");
        assert_eq!(provenance["entity"].as_array().unwrap().len(), 2);
    }
}
