//! The subset of HL7 FHIR R4 (4.0.1) that Dermflow writes, as plain serde types, and the languages it writes in.
//!
//! Field names and cardinalities are those of <https://hl7.org/fhir/R4/>; absent elements are not written, as
//! FHIR forbids empty arrays and objects. What is built here is checked from outside by the R4 JSON schema,
//! the R4 invariants and a third-party validator (`tests/fhir`).

use base64::{Engine, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize, Serializer};
use time::OffsetDateTime;

use crate::image::ImageBytes;

/// The base of every URL that Dermflow defines: code systems, naming systems.
pub const CANONICAL: &str = "https://dermflow.dev/fhir";
/// SNOMED CT.
pub const SNOMED: &str = "http://snomed.info/sct";
/// ICD-11 for mortality and morbidity statistics, linearisation codes.
pub const ICD11: &str = "http://id.who.int/icd/release/11/mms";
/// The release of ICD-11 that the codes are taken from.
pub const ICD11_VERSION: &str = "2025-01";
const UCUM: &str = "http://unitsofmeasure.org";
const TERMINOLOGY: &str = "http://terminology.hl7.org/CodeSystem";

macro_rules! resource {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Default, Serialize)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            $($(#[$field_doc])* #[serde(skip_serializing_if = "Absent::absent")] pub $field: $type,)*
        }
    )*};
}

macro_rules! datatype {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            $($(#[$field_doc])* #[serde(default, skip_serializing_if = "Absent::absent")] pub $field: $type,)*
        }
    )*};
}

/// Whether an element is not there, and so must not be written.
trait Absent {
    fn absent(&self) -> bool;
}

impl<T> Absent for Option<T> {
    fn absent(&self) -> bool {
        self.is_none()
    }
}

impl<T> Absent for Vec<T> {
    fn absent(&self) -> bool {
        self.is_empty()
    }
}

impl<T> Absent for Box<T> {
    fn absent(&self) -> bool {
        false
    }
}

macro_rules! always_present {
    ($($type:ty),*) => {$(
        impl Absent for $type {
            fn absent(&self) -> bool {
                false
            }
        }
    )*};
}

always_present!(String, &'static str, CodeableConcept, Reference, Quantity, Meta, Attachment, Narrative);

datatype! {
    /// A code in a code system.
    Coding {
        /// The code system's URI.
        system: Option<String>,
        /// Its version.
        version: Option<String>,
        /// The code.
        code: Option<String>,
        /// The code system's words for it.
        display: Option<String>,
    }
    /// A concept, by codes, by text, or both.
    CodeableConcept {
        /// The same concept in one or more code systems.
        coding: Vec<Coding>,
        /// In plain words.
        text: Option<String>,
    }
    /// A business identifier.
    Identifier {
        /// `usual`, `official`, `temp`, `secondary` or `old`.
        #[serde(rename = "use")]
        use_: Option<String>,
        /// The namespace.
        system: Option<String>,
        /// The value in it.
        value: Option<String>,
    }
    /// A reference to another resource, literal or logical.
    Reference {
        /// Literal: a relative or absolute URL, or `#id` for a contained resource.
        reference: Option<String>,
        /// The target's resource type.
        #[serde(rename = "type")]
        type_: Option<String>,
        /// Logical: the target's business identifier.
        identifier: Option<Box<Identifier>>,
        /// In plain words.
        display: Option<String>,
    }
}

/// A language of narratives and conclusions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(into = "&'static str", from = "String")]
pub enum Language {
    /// English, which stands in for every language that is not here.
    #[default]
    English,
    /// Spanish.
    Spanish,
    /// German.
    German,
    /// French.
    French,
}

/// Every language.
pub const LANGUAGES: [Language; 4] =
    [Language::English, Language::Spanish, Language::German, Language::French];

impl Language {
    /// The tag of BCP 47.
    pub fn tag(self) -> &'static str {
        match self {
            Self::English => "en",
            Self::Spanish => "es",
            Self::German => "de",
            Self::French => "fr",
        }
    }

    /// The language with this tag, in lower case.
    pub fn from_tag(tag: &str) -> Option<Self> {
        LANGUAGES.into_iter().find(|language| language.tag() == tag)
    }
}

impl From<Language> for &'static str {
    fn from(language: Language) -> Self {
        language.tag()
    }
}

/// A newer build may know more languages than this one.
impl From<String> for Language {
    fn from(tag: String) -> Self {
        Self::from_tag(&tag).unwrap_or_default()
    }
}

/// A coding with a display.
pub fn coding(system: &str, code: &str, display: &str) -> Coding {
    Coding {
        system: Some(system.into()),
        version: None,
        code: Some(code.into()),
        display: Some(display.into()),
    }
}

/// A coding in Dermflow's own code system for skin image analysis.
pub fn local(code: &str, display: &str) -> Coding {
    coding(&format!("{CANONICAL}/CodeSystem/skin-image-analysis"), code, display)
}

/// A coding in one of HL7's terminology code systems.
pub fn hl7(system: &str, code: &str, display: &str) -> Coding {
    coding(&format!("{TERMINOLOGY}/{system}"), code, display)
}

impl From<Coding> for CodeableConcept {
    fn from(coding: Coding) -> Self {
        Self { coding: vec![coding], text: None }
    }
}

/// A reference to a contained resource.
pub fn contained(id: &str, display: Option<&str>) -> Reference {
    Reference {
        reference: Some(format!("#{id}")),
        display: display.map(str::to_owned),
        ..Reference::default()
    }
}

resource! {
    /// A measured amount in UCUM units.
    Quantity {
        /// The number; FHIR decimals keep their precision, so it is rounded before it gets here.
        value: Option<serde_json::Number>,
        /// The unit in words.
        unit: Option<&'static str>,
        /// Always UCUM.
        system: Option<&'static str>,
        /// The UCUM code.
        code: Option<&'static str>,
    }
    /// Metadata of a resource.
    Meta {
        /// The version of this resource.
        version_id: Option<String>,
        /// When it last changed.
        #[serde(serialize_with = "instant_opt")]
        last_updated: Option<OffsetDateTime>,
        /// Security labels.
        security: Vec<Coding>,
    }
    /// The human-readable summary.
    Narrative {
        /// Always `generated`.
        status: String,
        /// XHTML.
        div: String,
    }
    /// An extension with a value or with extensions in it.
    Extension {
        /// Which one.
        url: String,
        /// The value, a code.
        value_code: Option<&'static str>,
        /// The value, a number.
        value_decimal: Option<serde_json::Number>,
        /// The parts.
        extension: Vec<Extension>,
    }
    /// A file, with its content when that is ours.
    Attachment {
        /// The media type.
        content_type: Option<String>,
        /// The content in Base64.
        data: Option<String>,
        /// Length in bytes.
        size: Option<usize>,
        /// SHA-1 in Base64.
        hash: Option<String>,
        /// The caller's title, or ours.
        title: Option<String>,
        /// When it was made.
        #[serde(serialize_with = "instant_opt")]
        creation: Option<OffsetDateTime>,
    }
    /// A comment.
    Annotation {
        /// Markdown.
        text: String,
    }
    /// A name of a device.
    DeviceName {
        /// The name.
        name: String,
        /// A code of FHIR's `device-nametype`.
        #[serde(rename = "type")]
        type_: &'static str,
    }
    /// A version of a part of a device.
    DeviceVersion {
        /// Which part.
        #[serde(rename = "type")]
        type_: CodeableConcept,
        /// Its version.
        value: String,
    }
    /// A property of a device: here a performance figure of the model.
    DeviceProperty {
        /// Which property.
        #[serde(rename = "type")]
        type_: CodeableConcept,
        /// Its value.
        value_quantity: Vec<Quantity>,
    }
    /// The software and model that made the report.
    Device {
        /// The model by digest.
        identifier: Vec<Identifier>,
        /// Always `active`.
        status: &'static str,
        /// Who makes it.
        manufacturer: Option<String>,
        /// Names of software and model.
        device_name: Vec<DeviceName>,
        /// What it is.
        #[serde(rename = "type")]
        type_: Option<CodeableConcept>,
        /// Versions of software, model and preprocessing.
        version: Vec<DeviceVersion>,
        /// Performance figures of the model.
        property: Vec<DeviceProperty>,
        /// What a reader must know about it.
        note: Vec<Annotation>,
    }
    /// A submitted photograph, without its pixels, or a heat map.
    Media {
        /// The file by SHA-256.
        identifier: Vec<Identifier>,
        /// Always `completed`.
        status: &'static str,
        /// Always an image.
        #[serde(rename = "type")]
        type_: Option<CodeableConcept>,
        /// How the photograph was taken.
        modality: Option<CodeableConcept>,
        /// What a heat map is.
        view: Option<CodeableConcept>,
        /// The patient.
        subject: Option<Reference>,
        /// When the photograph was taken, or else reached us, or when the heat map was made.
        #[serde(rename = "createdDateTime")]
        created: Option<String>,
        /// Where on the body.
        body_site: Option<CodeableConcept>,
        /// What made a heat map.
        device: Option<Reference>,
        /// Rows as displayed, in pixels.
        height: Option<u32>,
        /// Columns as displayed, in pixels.
        width: Option<u32>,
        /// The file's type, size, hash and title.
        content: Attachment,
        /// What a reader must know about it.
        note: Vec<Annotation>,
    }
    /// A range against which a value reads.
    ReferenceRange {
        /// Values below are not in the range.
        low: Option<Quantity>,
        /// Values from here on are not in the range.
        high: Option<Quantity>,
        /// In plain words.
        text: Option<String>,
    }
    /// A part of an observation.
    Component {
        /// What is observed.
        code: CodeableConcept,
        /// The value, a number.
        value_quantity: Option<Quantity>,
        /// The value, a text.
        value_string: Option<String>,
        /// The value, yes or no.
        value_boolean: Option<bool>,
    }
    /// A finding of the analysis.
    Observation {
        /// What R4 has no element for.
        extension: Vec<Extension>,
        /// `preliminary`: not reviewed by a clinician; `cancelled`: not made.
        status: &'static str,
        /// Always imaging.
        category: Vec<CodeableConcept>,
        /// What is observed.
        code: CodeableConcept,
        /// The patient.
        subject: Option<Reference>,
        /// When the photographs reached us.
        #[serde(rename = "effectiveDateTime", serialize_with = "instant_opt")]
        effective: Option<OffsetDateTime>,
        /// When the finding was made.
        #[serde(serialize_with = "instant_opt")]
        issued: Option<OffsetDateTime>,
        /// A number.
        value_quantity: Option<Quantity>,
        /// A concept.
        value_codeable_concept: Option<CodeableConcept>,
        /// Yes or no.
        value_boolean: Option<bool>,
        /// Why there is no value.
        data_absent_reason: Option<CodeableConcept>,
        /// High, normal or low.
        interpretation: Vec<CodeableConcept>,
        /// What a reader must know about it.
        note: Vec<Annotation>,
        /// Where on the body, when all images agree.
        body_site: Option<CodeableConcept>,
        /// How it was made.
        method: Option<CodeableConcept>,
        /// What made it.
        device: Option<Reference>,
        /// The threshold.
        reference_range: Vec<ReferenceRange>,
        /// The images it rests on.
        derived_from: Vec<Reference>,
        /// The parts.
        component: Vec<Component>,
    }
    /// An image of the report.
    ReportMedia {
        /// Which one.
        comment: Option<String>,
        /// The contained Media.
        link: Reference,
    }
    /// The report.
    DiagnosticReport {
        /// The job's id.
        id: String,
        /// Version and the label that a machine made it.
        meta: Meta,
        /// The language of narrative and conclusion, BCP 47.
        language: &'static str,
        /// The narrative.
        text: Narrative,
        /// Everything that the report refers to.
        contained: Vec<Contained>,
        /// Its own identifier, then the caller's.
        identifier: Vec<Identifier>,
        /// Always `preliminary`.
        status: &'static str,
        /// Always imaging.
        category: Vec<CodeableConcept>,
        /// The kind of report.
        code: CodeableConcept,
        /// The patient.
        subject: Option<Reference>,
        /// When the photographs reached us.
        #[serde(rename = "effectiveDateTime", serialize_with = "instant_opt")]
        effective: Option<OffsetDateTime>,
        /// When the report was made.
        #[serde(serialize_with = "instant_opt")]
        issued: Option<OffsetDateTime>,
        /// The findings.
        result: Vec<Reference>,
        /// The images.
        media: Vec<ReportMedia>,
        /// In one sentence.
        conclusion: Option<String>,
    }
    /// One issue of an outcome.
    Issue {
        /// `error` or `information`.
        severity: &'static str,
        /// A code of FHIR's `issue-type`.
        code: &'static str,
        /// The stable code and its sentence.
        details: CodeableConcept,
        /// Limits and offsets.
        diagnostics: Option<String>,
        /// The elements at fault, as FHIRPath.
        expression: Vec<String>,
    }
    /// How a request went.
    OperationOutcome {
        /// At least one.
        issue: Vec<Issue>,
    }
}

/// A resource inside a report, under the id that references to it use.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Contained {
    /// Unique in the report.
    pub id: String,
    /// The resource.
    #[serde(flatten)]
    pub resource: Resource,
}

/// A resource with its type's name.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "resourceType")]
pub enum Resource {
    /// See [`Device`].
    Device(Box<Device>),
    /// See [`Media`].
    Media(Box<Media>),
    /// See [`Observation`].
    Observation(Box<Observation>),
    /// See [`DiagnosticReport`].
    DiagnosticReport(Box<DiagnosticReport>),
    /// See [`OperationOutcome`].
    OperationOutcome(OperationOutcome),
}

impl Resource {
    /// The resource as JSON.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }
}

/// Per cent with two decimals. `basis_points` are hundredths of a per cent, so parts that sum to 10,000 print
/// as numbers that sum to 100.
pub fn percent(basis_points: u32) -> Quantity {
    Quantity {
        value: serde_json::Number::from_f64(f64::from(basis_points) / 100.0),
        unit: Some("%"),
        system: Some(UCUM),
        code: Some("%"),
    }
}

/// A length in pixels, from tenths of one.
pub fn pixels(tenths: u32) -> Quantity {
    Quantity {
        value: serde_json::Number::from_f64(f64::from(tenths) / 10.0),
        unit: Some("pixels"),
        system: Some(UCUM),
        code: Some("{pixels}"),
    }
}

/// A coordinate of a region in an image, from tenths of a pixel.
pub fn coordinate(tenths: u32) -> Extension {
    Extension {
        url: "coordinate".into(),
        value_decimal: serde_json::Number::from_f64(f64::from(tenths) / 10.0),
        ..Extension::default()
    }
}

/// A file of ours, with its content.
pub fn inline(content_type: &str, file: &[u8], title: String, creation: OffsetDateTime) -> Attachment {
    Attachment {
        content_type: Some(content_type.into()),
        data: Some(STANDARD.encode(file)),
        size: Some(file.len()),
        hash: Some(ImageBytes::from(file.to_vec()).sha1_base64()),
        title: Some(title),
        creation: Some(creation),
    }
}

/// FHIR `instant`: RFC 3339 in UTC with milliseconds.
pub fn instant(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    let (date, (h, m, s, ms)) = (at.date(), at.to_hms_milli());
    format!("{date}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
}

#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn instant_opt<S: Serializer>(at: &Option<OffsetDateTime>, serializer: S) -> Result<S::Ok, S::Error> {
    at.map(instant).serialize(serializer)
}

/// Text made safe inside XHTML, control characters left out.
pub fn xhtml(text: &str) -> String {
    let escape = |c: char| match c {
        '&' => "&amp;".to_owned(),
        '<' => "&lt;".to_owned(),
        '>' => "&gt;".to_owned(),
        '"' => "&quot;".to_owned(),
        c if c.is_control() => String::new(),
        c => c.to_string(),
    };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_has_milliseconds_and_a_zone() {
        assert_eq!(instant(OffsetDateTime::UNIX_EPOCH), "1970-01-01T00:00:00.000Z");
    }

    #[test]
    fn absent_elements_are_not_written() {
        let json = String::from_utf8(Resource::Device(Box::default()).to_json()).unwrap();
        assert_eq!(json, r#"{"resourceType":"Device","status":""}"#);
    }

    #[test]
    fn a_language_that_is_not_known_is_english() {
        for language in LANGUAGES {
            let tag = serde_json::to_string(&language).unwrap();
            assert_eq!(serde_json::from_str::<Language>(&tag).unwrap(), language);
        }
        assert_eq!(serde_json::from_str::<Language>("\"tlh\"").unwrap(), Language::English);
    }

    #[test]
    fn a_narrative_holds_no_markup_of_the_caller() {
        assert_eq!(xhtml("<b a=\"1\">&\u{7}"), "&lt;b a=&quot;1&quot;&gt;&amp;");
    }
}
