//! What the numbers are from: the software and its model.

use dermflow_schemas::fhir::{
    CodeableConcept, Device, DeviceName, DeviceProperty, DeviceVersion, coding, local, percent,
};

use super::{Case, SIMULATED, in_words, note, sid};
use crate::model::{Metric, points};

/// The version of decoding and resizing: another one may change the numbers.
const PREPROCESSING: &str = "squash-bilinear-2";

impl Case<'_> {
    /// Without a `udiCarrier`: what is no medical device has no UDI, and whoever makes one of it gets their own.
    pub(super) fn device(&self) -> Device {
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
