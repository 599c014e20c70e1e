//! The body sites of the device API, with what SNOMED CT calls them.
//!
//! Skin structures are those of DICOM CID 4029; a side is in the concept, as FHIR's `bodySite` has no place for it.

use dermflow_schemas::fhir::{CodeableConcept, SNOMED, coding};
use serde_json::{Value, json};

/// A body site.
#[derive(Debug)]
pub(crate) struct Site {
    /// The code in the device API.
    pub(crate) code: &'static str,
    pub(crate) snomed: &'static str,
    pub(crate) display: &'static str,
    /// In the order of [`LOCALES`].
    pub(crate) names: [&'static str; 4],
}

/// The locales of [`Site::names`].
const LOCALES: [&str; 4] = ["en_GB", "es_ES", "de_DE", "fr_FR"];

macro_rules! sites {
    ($($code:literal $snomed:literal $display:literal, $($name:literal)*;)*) => {
        /// Every body site.
        pub(crate) const SITES: &[Site] =
            &[$(Site { code: $code, snomed: $snomed, display: $display, names: [$($name),*] }),*];
    };
}

sites! {
    "headFront" "73897004" "Skin structure of face", "Face" "Cara" "Gesicht" "Visage";
    "headBack" "79951008" "Skin structure of occipital region", "Back of head" "Parte posterior de la cabeza" "Hinterkopf" "Arrière de la tête";
    "headTop" "61719002" "Skin structure of vertex of scalp", "Top of head" "Parte superior de la cabeza" "Scheitel" "Sommet de la tête";
    "headLeft" "64237003" "Structure of left half of head", "Left side of head" "Lado izquierdo de la cabeza" "Linke Kopfseite" "Côté gauche de la tête";
    "headRight" "29624005" "Structure of right half of head", "Right side of head" "Lado derecho de la cabeza" "Rechte Kopfseite" "Côté droit de la tête";
    "armLeft" "80768000" "Structure of left upper limb", "Left arm" "Brazo izquierdo" "Linker Arm" "Bras gauche";
    "armRight" "6921000" "Structure of right upper limb", "Right arm" "Brazo derecho" "Rechter Arm" "Bras droit";
    "trunkFront" "181491009" "Skin structure of anterior trunk", "Front of trunk" "Parte anterior del tronco" "Rumpf vorn" "Face antérieure du tronc";
    "trunkBack" "66643007" "Skin structure of back", "Back of trunk" "Espalda" "Rücken" "Dos";
    "legLeft" "32153003" "Structure of left lower limb", "Left leg" "Pierna izquierda" "Linkes Bein" "Jambe gauche";
    "legRight" "62175007" "Structure of right lower limb", "Right leg" "Pierna derecha" "Rechtes Bein" "Jambe droite";
    "handLeft" "85151006" "Structure of left hand", "Left hand" "Mano izquierda" "Linke Hand" "Main gauche";
    "handRight" "78791008" "Structure of right hand", "Right hand" "Mano derecha" "Rechte Hand" "Main droite";
    "footLeft" "22335008" "Structure of left foot", "Left foot" "Pie izquierdo" "Linker Fuß" "Pied gauche";
    "footRight" "7769000" "Structure of right foot", "Right foot" "Pie derecho" "Rechter Fuß" "Pied droit";
    "genital" "60944009" "Skin structure of external genitalia", "Genitals" "Genitales" "Genitalien" "Organes génitaux";
    "nails" "770802007" "Nail unit structure", "Nails" "Uñas" "Nägel" "Ongles";
    "scalp" "43067004" "Skin structure of scalp", "Scalp" "Cuero cabelludo" "Kopfhaut" "Cuir chevelu";
    "earLeft" "89644007" "Left ear structure", "Left ear" "Oreja izquierda" "Linkes Ohr" "Oreille gauche";
    "earRight" "25577004" "Right ear structure", "Right ear" "Oreja derecha" "Rechtes Ohr" "Oreille droite";
    "perioral" "110488009" "Skin structure of perioral region of face", "Around the mouth" "Región perioral" "Mundumgebung" "Région péribuccale";
    "tongue" "8001006" "Structure of mucous membrane of tongue", "Tongue" "Lengua" "Zunge" "Langue";
    "elbowLeft" "368148009" "Left elbow region structure", "Left elbow" "Codo izquierdo" "Linker Ellenbogen" "Coude gauche";
    "elbowRight" "368149001" "Right elbow region structure", "Right elbow" "Codo derecho" "Rechter Ellenbogen" "Coude droit";
    "upperArmLeft" "368208006" "Left upper arm structure", "Left upper arm" "Parte superior del brazo izquierdo" "Linker Oberarm" "Haut du bras gauche";
    "upperArmRight" "368209003" "Right upper arm structure", "Right upper arm" "Parte superior del brazo derecho" "Rechter Oberarm" "Haut du bras droit";
    "lowerArmLeft" "66480008" "Structure of left forearm", "Left forearm" "Antebrazo izquierdo" "Linker Unterarm" "Avant-bras gauche";
    "lowerArmRight" "64262003" "Structure of right forearm", "Right forearm" "Antebrazo derecho" "Rechter Unterarm" "Avant-bras droit";
    "kneeLeft" "82169009" "Structure of left knee region", "Left knee" "Rodilla izquierda" "Linkes Knie" "Genou gauche";
    "kneeRight" "6757004" "Structure of right knee region", "Right knee" "Rodilla derecha" "Rechtes Knie" "Genou droit";
    "upperLegLeft" "61396006" "Structure of left thigh", "Left thigh" "Muslo izquierdo" "Linker Oberschenkel" "Cuisse gauche";
    "upperLegRight" "11207009" "Structure of right thigh", "Right thigh" "Muslo derecho" "Rechter Oberschenkel" "Cuisse droite";
    "lowerLegLeft" "48979004" "Structure of left lower leg", "Left lower leg" "Parte inferior de la pierna izquierda" "Linker Unterschenkel" "Bas de la jambe gauche";
    "lowerLegRight" "32696007" "Structure of right lower leg", "Right lower leg" "Parte inferior de la pierna derecha" "Rechter Unterschenkel" "Bas de la jambe droite";
}

/// The body site of a code of the device API.
pub(crate) fn find(code: &str) -> Option<&'static Site> {
    SITES.iter().find(|site| site.code == code)
}

impl Site {
    /// In FHIR.
    pub(crate) fn concept(&self) -> CodeableConcept {
        let text = Some(self.names[0].into());
        CodeableConcept { coding: vec![coding(SNOMED, self.snomed, self.display)], text }
    }

    /// Whether there is hair of the head on it.
    pub(crate) fn is_head(&self) -> bool {
        self.code.starts_with("head") || self.code == "scalp"
    }
}

/// The same text in several languages, as the device API has it.
pub(super) fn named(names: [&str; 4]) -> Value {
    LOCALES.iter().zip(names).map(|(locale, name)| ((*locale).to_owned(), json!(name))).collect()
}

/// The body of `GET /body-sites`.
pub(crate) fn list() -> Value {
    SITES.iter().map(|site| json!({ "code": site.code, "name": named(site.names) })).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::snomed::is_concept_id;

    #[test]
    fn every_site_is_a_concept_of_its_own() {
        assert_eq!(SITES.len(), 34);
        for distinct in
            [SITES.iter().map(|s| s.code).collect::<BTreeSet<_>>(), SITES.iter().map(|s| s.snomed).collect()]
        {
            assert_eq!(distinct.len(), SITES.len());
        }
        for site in SITES {
            assert!(is_concept_id(site.snomed), "{}", site.code);
            let side = ["Left", "Right"].into_iter().find(|side| site.code.ends_with(side));
            let [name, display] = [site.names[0], site.display].map(str::to_lowercase);
            for word in ["left", "right"] {
                let is_said = side.is_some_and(|side| side.eq_ignore_ascii_case(word));
                assert_eq!(
                    (name.contains(word), display.contains(word)),
                    (is_said, is_said),
                    "{}",
                    site.code
                );
            }
        }
        assert_eq!(find("handLeft").unwrap().concept().coding[0].code.as_deref(), Some("85151006"));
        assert!(find("hand").is_none());
    }
}
