//! What `model.toml` must not say.

use dermflow_schemas::fhir::Language;

use super::{Class, Document, Indicator, Input, Metric, Names};

/// The largest input side, in pixels: a decoder has the memory to squash to that, and not to much more.
pub(crate) const MAX_INPUT_SIDE: u32 = 1_024;
/// What the ids of other resources in a report begin with.
const RESERVED: [&str; 8] =
    ["device", "image", "heatmap", "quality", "domain", "modality", "classification", "extent"];

/// The codes of the other observations in a report.
const BUILT_IN: [&str; 5] = [
    "image-quality",
    "dermatological-domain",
    "image-modality",
    "condition-distribution",
    "lesion-area-fraction",
];
/// Characters of a code: ids in a report are made of codes, and have 64 at most.
const MAX_CODE_CHARS: usize = 40;

pub(super) fn check(document: &Document) -> Result<(), String> {
    for (field, value) in [
        ("name", &document.name),
        ("version", &document.version),
        ("title", &document.title),
        ("licence", &document.licence),
    ] {
        if value.trim().is_empty() {
            return Err(format!("{field} is empty"));
        }
    }
    if let Some(input) = &document.input {
        check_input(input)?;
    }
    if document.modality.is_some() && document.output.as_ref().is_none_or(|output| output.modality.is_none())
    {
        return Err("[modality] is about an output that is not there".to_owned());
    }
    check_classes(&document.class)?;
    check_indicators(document)?;
    check_codes("metric", document.metric.iter().map(|metric| (&metric.code, &metric.display)))?;
    let ordered = |m: &&Metric| 0.0 <= m.low && m.low <= m.value && m.value <= m.high && m.high <= 1.0;
    match document.metric.iter().find(|metric| !ordered(metric)) {
        Some(metric) => Err(format!("metric {}: not 0 <= low <= value <= high <= 1", metric.code)),
        None => Ok(()),
    }
}

/// What is said of classes must be of those that are there.
fn check_indicators(document: &Document) -> Result<(), String> {
    let codes = || document.class.iter().map(|class| class.code.as_str());
    let no_skin = document.domain.as_ref().map(|domain| domain.class.as_str());
    if let Some(class) = no_skin.filter(|class| codes().all(|code| code != *class)) {
        return Err(format!("domain: there is no class {class:?}"));
    }
    if no_skin.is_some() && document.class.len() < 3 {
        return Err("at least two classes are needed beside that of the domain".to_owned());
    }
    let indicators = &document.indicator;
    check_codes("indicator", indicators.iter().map(|indicator| (&indicator.id, &indicator.display)))?;
    check_codes("indicator", indicators.iter().map(|indicator| (&indicator.code, &indicator.display)))?;
    for Indicator { id, code, classes, threshold, referral, .. } in indicators {
        if BUILT_IN.contains(&code.as_str()) {
            return Err(format!("indicator {id}: the code {code} is taken"));
        }
        if RESERVED.contains(&id.as_str()) {
            return Err(format!("indicator {id}: the id is taken"));
        }
        if classes.is_empty() && no_skin.is_none() {
            return Err(format!("indicator {id}: without classes a [domain] is needed"));
        }
        if classes.is_empty() == threshold.is_some() {
            return Err(format!("indicator {id}: either classes and a threshold, or neither, must be there"));
        }
        if classes.is_empty() && *referral {
            // It has the threshold of the domain, and what does not come to that is refused.
            return Err(format!("indicator {id}: without classes every image would suggest a referral"));
        }
        let strange = |class: &&String| no_skin == Some(class) || codes().all(|code| code != class.as_str());
        if let Some(class) = classes.iter().find(strange) {
            return Err(format!("indicator {id}: there is no condition {class:?}"));
        }
        if classes.iter().collect::<std::collections::HashSet<_>>().len() < classes.len() {
            return Err(format!("indicator {id}: a class occurs twice"));
        }
    }
    let indicated = indicators.iter().filter_map(|i| Some((i.id.as_str(), i.threshold?)));
    let domain = document.domain.iter().map(|domain| ("domain", domain.threshold));
    for (what, threshold) in indicated.chain(domain) {
        if !(threshold > 0.0 && threshold < 1.0) {
            return Err(format!("the {what} threshold {threshold} is not between 0 and 1"));
        }
    }
    let names = document.class.iter().map(|c| &c.names).chain(indicators.iter().map(|i| &i.names));
    match names.flat_map(Names::keys).find(|tag| Language::from_tag(tag).is_none()) {
        Some(tag) => Err(format!("names: there is no language {tag:?}")),
        None => Ok(()),
    }
}

fn check_input(input: &Input) -> Result<(), String> {
    let side = 1..=MAX_INPUT_SIDE;
    if !side.contains(&input.width) || !side.contains(&input.height) {
        return Err(format!("the input's width and height must be between 1 and {MAX_INPUT_SIDE}"));
    }
    let usable = |deviation: &f32| deviation.is_finite() && *deviation > 0.0;
    if !input.mean.iter().all(|mean| mean.is_finite()) || !input.deviation.iter().all(usable) {
        return Err("the input's mean must be finite and its deviation above zero".to_owned());
    }
    Ok(())
}

fn check_classes(classes: &[Class]) -> Result<(), String> {
    if classes.len() < 2 {
        return Err("at least two classes are needed".to_owned());
    }
    check_codes("class", classes.iter().map(|class| (&class.code, &class.display)))?;
    let priors: Vec<f64> = classes.iter().filter_map(|class| class.prior).collect();
    if !priors.is_empty() && priors.len() != classes.len() {
        return Err(format!("{} of {} classes have a prior: all or none", priors.len(), classes.len()));
    }
    match priors.iter().find(|prior| !(**prior > 0.0 && **prior <= 1.0)) {
        Some(prior) => Err(format!("the prior {prior} is not above 0 and at most 1")),
        None => Ok(()),
    }
}

/// Codes become FHIR codes, so they are plain and occur once.
fn check_codes<'a>(
    kind: &str,
    entries: impl Iterator<Item = (&'a String, &'a String)>,
) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let mut seen = std::collections::HashSet::new();
    for (code, display) in entries {
        if code.is_empty() || !code.bytes().all(plain) {
            return Err(format!("{kind} {code:?}: a code has lower-case letters, digits and hyphens"));
        }
        if code.len() > MAX_CODE_CHARS {
            return Err(format!("{kind} {code}: a code has at most {MAX_CODE_CHARS} characters"));
        }
        if display.trim().is_empty() {
            return Err(format!("{kind} {code}: display is empty"));
        }
        if !seen.insert(code) {
            return Err(format!("{kind} {code} occurs twice"));
        }
    }
    Ok(())
}
