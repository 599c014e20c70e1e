//! The submitted images, without their pixels, and the heat maps over them.

use dermflow_schemas::{
    envelope::ImageEntry,
    fhir::{Attachment, Contained, Language, Media, Resource, contained, hl7, inline, instant, local},
};

use super::{Case, contained_as, image_id, note, observations::modality, sid};
use crate::{analyse::Finding, heat::HeatMap, model::name_in};

impl Case<'_> {
    pub(super) fn images(&self) -> impl Iterator<Item = Contained> {
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
            created: Some(entry.taken.clone().unwrap_or_else(|| instant(self.accepted_at))),
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
    pub(super) fn heat_maps(&self) -> impl Iterator<Item = (String, Contained)> {
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
            created: Some(instant(self.finished_at)),
            device: Some(contained("device", None)),
            height: Some(map.height),
            width: Some(map.width),
            content: inline("image/png", &map.png, title, self.finished_at),
            note: note(format!(
                "The frame of image {n} as displayed, {} x {} pixels of {} x {}. The probability of the class by \
                 {columns} x {rows} places of the image, each by itself, in steps of 1 % from violet (0 %) to \
                 yellow (100 %).",
                map.width, map.height, finding.width, finding.height
            )),
            ..Media::default()
        };
        let id = format!("heatmap-{n}-{}", class.code);
        (format!("Heat map for {name} on image {n}"), contained_as(id, Resource::Media(Box::new(media))))
    }
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::envelope::Manifest;
    use serde_json::json;

    use super::{
        super::tests::{THIRDS, entry, finding, report_of, resource},
        *,
    };
    use crate::model::tests::simulated;

    #[test]
    fn a_photograph_was_made_when_the_caller_says_or_it_reached_us() {
        let told = ImageEntry { taken: Some("2026-02".into()), ..entry(None) };
        let manifest = Manifest::new(vec![told, entry(None)], None, None);
        let report = report_of(&simulated(&[]), &manifest, &[finding(THIRDS), finding(THIRDS)]);
        assert_eq!(resource(&report, "image-1")["createdDateTime"], "2026-02");
        assert_eq!(resource(&report, "image-2")["createdDateTime"], report["effectiveDateTime"]);
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
}
