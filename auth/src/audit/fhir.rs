//! Events as FHIR R4 `AuditEvent`, in the shape of IHE BALP 1.1 (Basic Audit Log Patterns).

use dermflow_schemas::{
    error::CODES,
    fhir::{CANONICAL, instant},
};
use serde_json::{Value, json};

use super::{ACTIONS, Action, search::Recorded};

const DCM: &str = "http://dicom.nema.org/resources/ontology/DCM";
const HL7: &str = "http://terminology.hl7.org/CodeSystem";

/// What sort of event an action is, in the words of DICOM and of HL7.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Login,
    Logout,
    Alert,
    Security,
    Application,
    LogUsed,
    Export,
    Operation,
    Read,
    Delete,
}

impl Kind {
    fn coding(self) -> Value {
        let dcm = |code: &str, display: &str| json!({"system": DCM, "code": code, "display": display});
        match self {
            Self::Login | Self::Logout => dcm("110114", "User Authentication"),
            Self::Alert | Self::Security => dcm("110113", "Security Alert"),
            Self::Application => dcm("110100", "Application Activity"),
            Self::LogUsed => dcm("110101", "Audit Log Used"),
            Self::Export => dcm("110106", "Export"),
            Self::Operation | Self::Read | Self::Delete => {
                let system = format!("{HL7}/audit-event-type");
                json!({"system": system, "code": "rest", "display": "RESTful Operation"})
            }
        }
    }

    fn subtype(self) -> Option<Value> {
        let dcm = |code: &str, display: &str| json!({"system": DCM, "code": code, "display": display});
        let rest = |code: &str| json!({"system": "http://hl7.org/fhir/restful-interaction", "code": code, "display": code});
        match self {
            Self::Login => Some(dcm("110122", "Login")),
            Self::Logout => Some(dcm("110123", "Logout")),
            Self::Security => Some(dcm("110137", "User Security Attributes Changed")),
            Self::Operation => Some(rest("operation")),
            Self::Read => Some(rest("read")),
            Self::Delete => Some(rest("delete")),
            Self::Alert | Self::Application | Self::LogUsed | Self::Export => None,
        }
    }
}

/// The outcomes of FHIR's `audit-event-outcome` with our words for them.
pub const OUTCOMES: [(&str, &str); 3] = [("0", "success"), ("4", "refused"), ("8", "failed")];

fn known(word: &str) -> Option<Action> {
    ACTIONS.iter().copied().find(|action| action.as_str() == word)
}

/// The code system of our words for what was done.
fn own(word: &str) -> Value {
    json!({"system": format!("{CANONICAL}/CodeSystem/audit-action"), "code": word})
}

/// The resource.
pub fn resource(event: &Recorded) -> Value {
    let action = known(&event.action);
    // What a newer build records is at least something that the application did.
    let kind = action.map_or(Kind::Application, Action::kind);
    let mut subtype: Vec<Value> = kind.subtype().into_iter().collect();
    subtype.push(own(&event.action));
    let outcome = OUTCOMES.iter().find(|(_, word)| *word == event.outcome).map_or("12", |(code, _)| code);
    let mut resource = json!({
        "resourceType": "AuditEvent",
        "id": event.id.to_string(),
        "text": narrative(event),
        "type": kind.coding(),
        "subtype": subtype,
        "recorded": instant(event.at),
        "outcome": outcome,
        "agent": [source(event), destination()],
        "source": {"observer": system()},
    });
    if let Some(action) = action {
        resource["action"] = json!(action.letter());
    }
    if let Some(code) = &event.code {
        let sentence = CODES.iter().map(|known| known.kind()).find(|kind| kind.code == code);
        resource["outcomeDesc"] =
            json!(sentence.map_or_else(|| code.clone(), |kind| format!("{code}: {}", kind.text)));
    }
    let entities = entities(event);
    if !entities.is_empty() {
        resource["entity"] = json!(entities);
    }
    resource
}

/// Only of words that we choose ourselves.
fn narrative(event: &Recorded) -> Value {
    let escaped = |word: &str| word.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', " ");
    let words = [&*event.action, &*event.outcome, event.code.as_deref().unwrap_or_default()].map(escaped);
    let div = format!("<div xmlns=\"http://www.w3.org/1999/xhtml\"><p>{}</p></div>", words.join(" ").trim());
    json!({"status": "generated", "div": div})
}

fn sid(name: &str) -> String {
    format!("{CANONICAL}/sid/{name}")
}

/// Who did it.
fn source(event: &Recorded) -> Value {
    let who = match &event.actor {
        Some(actor) => {
            let system = if event.actor_kind == "user" { sid("client") } else { sid("part") };
            json!({"identifier": {"system": system, "value": actor}})
        }
        None => json!({"display": "unknown"}),
    };
    let role = json!({"coding": [{"system": DCM, "code": "110153", "display": "Source Role ID"}]});
    let mut agent = json!({"type": role, "who": who, "requestor": true});
    if let Some(address) = &event.source {
        agent["network"] = json!({"address": address, "type": "2"});
    }
    agent
}

/// Who was asked.
fn destination() -> Value {
    let role = json!({"coding": [{"system": DCM, "code": "110152", "display": "Destination Role ID"}]});
    json!({"type": role, "who": system(), "requestor": false})
}

fn system() -> Value {
    json!({"type": "Device", "identifier": {"system": sid("part"), "value": "dermflow"}, "display": "Dermflow"})
}

fn entities(event: &Recorded) -> Vec<Value> {
    let mut entities = Vec::new();
    if let Some(request) = event.request {
        entities.push(json!({
            "what": {"identifier": {"system": sid("request-id"), "value": request}},
            "type": {"system": "https://profiles.ihe.net/ITI/BALP/CodeSystem/BasicAuditEntityType", "code": "XrequestId"},
        }));
    }
    let details = details(event);
    if event.object.is_some() || !details.is_empty() {
        let mut entity = json!({"type": {"system": format!("{HL7}/audit-entity-type"), "code": "2", "display": "System Object"}});
        if let (Some(object), Some(kind)) = (&event.object, &event.object_kind) {
            entity["what"] = what(kind, object);
            if let Some((code, display)) = role(kind) {
                entity["role"] =
                    json!({"system": format!("{HL7}/object-role"), "code": code, "display": display});
            }
        }
        if !details.is_empty() {
            entity["detail"] = json!(details);
        }
        entities.push(entity);
    }
    if let Some(client) = event.client {
        entities.push(json!({
            "what": {"identifier": {"system": sid("client"), "value": client}},
            "type": {"system": format!("{HL7}/audit-entity-type"), "code": "3", "display": "Organization"},
            "role": {"system": format!("{HL7}/object-role"), "code": "19", "display": "Customer"},
        }));
    }
    entities
}

fn what(kind: &str, object: &str) -> Value {
    match kind {
        "report" => json!({"reference": format!("DiagnosticReport/{object}")}),
        "job" => json!({"reference": format!("Task/{object}")}),
        "event" => json!({"reference": format!("AuditEvent/{object}")}),
        _ => json!({"identifier": {"system": sid(kind), "value": object}}),
    }
}

fn role(kind: &str) -> Option<(&'static str, &'static str)> {
    match kind {
        "report" => Some(("3", "Report")),
        "job" | "batch" => Some(("20", "Job")),
        "account" => Some(("11", "Security User Entity")),
        "credential" | "key" => Some(("13", "Security Resource")),
        _ => None,
    }
}

fn details(event: &Recorded) -> Vec<Value> {
    let detail = event.detail();
    let members = detail.as_object().into_iter().flatten();
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let members = members.map(|(name, value)| (name, text(value))).filter(|(_, text)| !text.is_empty());
    members.map(|(name, text)| json!({"type": name, "valueString": text})).collect()
}
