//! The report in words: the narrative and the conclusion, in the language that was asked for.

use dermflow_schemas::fhir::{Narrative, xhtml};

use super::{Case, SIMULATED, reading::Reading};
use crate::{
    analyse::Finding,
    language::{Words, begun, fill},
    model::{Class, Indicator, name_in},
};

impl Case<'_> {
    pub(super) fn narrative(&self, readings: &[Reading]) -> Narrative {
        let words = self.words();
        let warning = self.model.is_simulated().then(|| SIMULATED.to_owned());
        let reviewed = (!readings.is_empty()).then(|| words.not_reviewed.to_owned());
        let images = (1..).zip(self.findings).map(|(n, finding)| {
            let reading = readings.iter().find(|reading| !reading.is_joint() && reading.images == [n]);
            self.image_line(n, finding, reading)
        });
        let joint = readings.iter().filter(|reading| reading.is_joint());
        let joint = joint.map(|reading| {
            let together = words.together[usize::from(reading.images.len() < self.findings.len())];
            format!("{together}: {}", self.reading_line(reading))
        });
        let no_maps = self.manifest.heat_maps > 0 && !self.model.maps_heat();
        let no_maps = no_maps.then(|| words.no_heat_maps.to_owned());
        let lines = warning.into_iter().chain(reviewed).chain(images).chain(joint).chain(no_maps);
        let paragraphs: Vec<String> = lines.map(|line| format!("<p>{}</p>", xhtml(&line))).collect();
        Narrative {
            status: "generated".into(),
            div: format!("<div xmlns=\"http://www.w3.org/1999/xhtml\">{}</div>", paragraphs.concat()),
        }
    }

    /// An image in the narrative.
    fn image_line(&self, n: usize, finding: &Finding, reading: Option<&Reading>) -> String {
        let (words, n) = (self.words(), n.to_string());
        let Some(reading) = reading else {
            let why = fill(words.of_image, &[&n, &reasons(finding, words)]);
            return fill(words.no_result, &[&why]);
        };
        let taken = finding
            .clinical
            .map(|clinical| if clinical > 5_000 { words.photograph } else { words.dermoscopy });
        let score = format!("{} %", finding.quality.score());
        let quality = fill(words.quality, &[&score, words.grades[finding.quality.grade() as usize]]);
        let seen: Vec<&str> = taken.into_iter().chain([quality.as_str()]).collect();
        let area = finding.outline.as_ref().map(|outline| {
            let share = words.percent(outline.share(finding.width, finding.height));
            format!(" {}", fill(words.area, &[&share]))
        });
        let (image, seen) = (fill(words.image, &[&n]), seen.join(", "));
        format!("{image}: {seen}. {}{}", self.reading_line(reading), area.unwrap_or_default())
    }

    fn reading_line(&self, reading: &Reading) -> String {
        let words = self.words();
        let (name, probability) = self.most_probable(reading);
        let indicators = self.told(reading).map(|indicator| {
            let value = words.percent(reading.indicated(indicator, self.model));
            format!(" {} {value}.", self.name_of(indicator))
        });
        fill(words.most_probable, &[&name, &probability]) + &indicators.collect::<String>()
    }

    /// The indicators that are put in words: the first one, and every further one that suggests a referral.
    fn told<'a>(&'a self, reading: &'a Reading) -> impl Iterator<Item = &'a Indicator> {
        let suggests = |i: &Indicator| i.referral && reading.is_high(i, self.model);
        (0..).zip(&self.model.indicators).filter(move |(n, i)| *n == 0 || suggests(i)).map(|(_, i)| i)
    }

    /// The class and its probability.
    fn most_probable(&self, reading: &Reading) -> (String, String) {
        let first = reading.first();
        let Class { display, names, .. } = &self.model.classes[first];
        let name = name_in(self.language(), display, names).into_owned();
        (name, self.words().percent(reading.points[first]))
    }

    /// An indicator at the beginning of a sentence.
    fn name_of<'a>(&self, indicator: &'a Indicator) -> &'a str {
        indicator.names.get(self.language().tag()).unwrap_or(&indicator.display)
    }

    pub(super) fn conclusion(&self, last: Option<&Reading>) -> String {
        let words = self.words();
        let refused = (1..).zip(self.findings).filter(|(_, finding)| !finding.is_valid());
        let refused: Vec<String> = refused.map(|(n, finding)| self.refusal(n, finding)).collect();
        let mut sentences: Vec<String> =
            self.model.is_simulated().then(|| SIMULATED.to_owned()).into_iter().collect();
        match last {
            None => sentences.push(fill(words.no_result, &[&refused.join("; ")])),
            Some(reading) => {
                let (name, probability) = self.most_probable(reading);
                sentences.push(fill(words.conclusion, &[&name, &probability]));
                sentences.extend(self.told(reading).filter(|i| i.threshold.is_some()).map(|indicator| {
                    let high = reading.is_high(indicator, self.model);
                    let kind = if indicator.referral { words.referral } else { words.threshold };
                    fill(kind[usize::from(!high)], &[self.name_of(indicator)])
                }));
                sentences.extend(refused.iter().map(|refusal| format!("{}.", begun(refusal))));
                sentences.push(words.no_diagnosis.to_owned());
            }
        }
        sentences.join(" ")
    }

    /// That an image was refused, and by what.
    fn refusal(&self, n: usize, finding: &Finding) -> String {
        let words = self.words();
        let checks = words.checks.into_iter().zip([finding.is_skin, finding.quality.is_acceptable()]);
        let failed: Vec<&str> = checks.filter(|(_, passed)| !passed).map(|(check, _)| check).collect();
        fill(words.refused, &[&n.to_string(), &failed.join(words.and)])
    }
}

/// Why an image is refused.
pub(super) fn reasons(finding: &Finding, words: &Words) -> String {
    let skin = (!finding.is_skin).then(|| words.not_skin.to_owned());
    let quality = finding.quality;
    let poor = (!quality.is_acceptable()).then(|| {
        let score = format!("{} %", quality.score());
        fill(words.poor, &[score.as_str()])
    });
    skin.into_iter().chain(poor).collect::<Vec<_>>().join(words.and)
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::{envelope::Manifest, fhir::Language};

    use super::{
        super::tests::{entry, finding, report, report_of, resource},
        *,
    };
    use crate::{language::words, model::tests::simulated};

    #[test]
    fn the_narrative_is_escaped() {
        let report = report(&simulated(&[]), &[(None, [0.0, 1.0, 0.0])]);
        let div = report["text"]["div"].as_str().unwrap();
        assert!(div.contains("class: basal &lt;cell&gt; carcinoma 100.00 %"), "{div}");
    }

    /// Melanoma at 13 % and a basal cell carcinoma at 1 %: the sum is below the threshold of the first indicator, and
    /// melanoma by itself above that of another one. Nobody is told the first half only, in whatever language.
    #[test]
    fn every_indicator_that_suggests_a_referral_is_told() {
        let urgent = "threshold = 0.5 },\n { id = \"urgent\", code = \"urgent-referral\", display = \"Urgent referral\", names = { es = \"Derivación urgente\", de = \"Dringende Überweisung\", fr = \"Orientation urgente\" }, classes = [\"mel\"], threshold = 0.12, referral = true },";
        let model = simulated(&[("threshold = 0.5 },", urgent)]);
        let mut manifest = Manifest::new(vec![entry(None)], None, None);
        for (language, name, value) in [
            (Language::English, "Urgent referral", "13.00 %"),
            (Language::Spanish, "Derivación urgente", "13,00 %"),
            (Language::German, "Dringende Überweisung", "13,00 %"),
            (Language::French, "Orientation urgente", "13,00 %"),
        ] {
            manifest.language = language;
            let told = report_of(&model, &manifest, &[finding([0.13, 0.01, 0.86])]);
            assert_eq!(resource(&told, "malignancy-1")["interpretation"][0]["coding"][0]["code"], "N");
            assert_eq!(resource(&told, "urgent-1")["interpretation"][0]["coding"][0]["code"], "H");
            let (conclusion, div) = (&told["conclusion"], &told["text"]["div"]);
            let high = fill(words(language).referral[0], &[name]);
            assert!(conclusion.as_str().unwrap().contains(&high), "{conclusion}");
            assert!(div.as_str().unwrap().contains(&format!("{name} {value}.")), "{div}");
            assert!(!conclusion.as_str().unwrap().contains("Pigmented lesion"), "no referral: {conclusion}");
            let low = report_of(&model, &manifest, &[finding([0.11, 0.03, 0.86])]);
            assert_eq!(resource(&low, "urgent-1")["interpretation"][0]["coding"][0]["code"], "N");
            for place in [&low["conclusion"], &low["text"]["div"]] {
                assert!(!place.as_str().unwrap().contains(name), "{place}");
            }
        }
    }

    #[test]
    fn the_narrative_is_in_the_language_that_was_asked_for() {
        let mut manifest = Manifest::new(vec![entry(None)], None, None);
        manifest.language = Language::German;
        let report = report_of(&simulated(&[]), &manifest, &[finding([0.614_2, 0.3, 0.085_8])]);
        assert_eq!(report["language"], "de");
        let div = report["text"]["div"].as_str().unwrap();
        assert!(
            div.contains("Bild 1: Qualität ") && div.contains("Wahrscheinlichste Klasse: Melanom 61,42 %."),
            "{div}"
        );
        let conclusion = report["conclusion"].as_str().unwrap();
        assert!(conclusion.contains("Höchste Wahrscheinlichkeit: Melanom (61,42 %)."), "{conclusion}");
        assert_eq!(resource(&report, "classification-1")["valueCodeableConcept"]["text"], "Melanoma");
    }
}
