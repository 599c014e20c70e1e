//! What narratives and conclusions are made of: the same sentences in each language.

use dermflow_schemas::fhir::Language;

/// The sentences of a language. `{}` is what [`fill`] puts in, from left to right.
#[derive(Debug)]
pub struct Words {
    /// Between units and decimals.
    point: &'static str,
    /// What every report is.
    pub not_reviewed: &'static str,
    /// An image by its number.
    pub image: &'static str,
    /// More than one image together: all of them, and those that were not refused.
    pub together: [&'static str; 2],
    /// Taken with a dermatoscope.
    pub dermoscopy: &'static str,
    /// Taken without one.
    pub photograph: &'static str,
    /// The score, in per cent and in a word.
    pub quality: &'static str,
    /// From poor to excellent.
    pub grades: [&'static str; 4],
    /// A class and its probability.
    pub most_probable: &'static str,
    /// A share of the image.
    pub area: &'static str,
    /// There is no result, and why.
    pub no_result: &'static str,
    /// Why: an image, and what is wrong with it.
    pub of_image: &'static str,
    /// What is wrong, said of an image.
    pub not_skin: &'static str,
    /// The same, with the score.
    pub poor: &'static str,
    /// Between two reasons.
    pub and: &'static str,
    /// The conclusion: a class and its probability.
    pub conclusion: &'static str,
    /// An indicator that reads high, and one that does not, of those about referral.
    pub referral: [&'static str; 2],
    /// The same of other ones.
    pub threshold: [&'static str; 2],
    /// The end of a conclusion.
    pub no_diagnosis: &'static str,
    /// An image, and which check refused it.
    pub refused: &'static str,
    /// What checks, the domain and the quality.
    pub checks: [&'static str; 2],
    /// Heat maps were asked for, and the model has none.
    pub no_heat_maps: &'static str,
}

const ENGLISH: Words = Words {
    point: ".",
    not_reviewed: "Preliminary result of automatic skin image analysis, not reviewed by a clinician.",
    image: "Image {}",
    together: ["All images", "All images that were not refused"],
    dermoscopy: "dermoscopy",
    photograph: "photograph",
    quality: "quality {} ({})",
    grades: ["poor", "fair", "good", "excellent"],
    most_probable: "Most probable class: {} {}.",
    area: "Lesion area {} of the image.",
    no_result: "No result: {}.",
    of_image: "image {} {}",
    not_skin: "does not show skin",
    poor: "is of too low quality ({})",
    and: " and ",
    conclusion: "Preliminary result of an automatic analysis. Highest probability: {} ({}).",
    referral: ["{} at or above the referral threshold.", "{} below the referral threshold."],
    threshold: ["{} at or above the threshold.", "{} below the threshold."],
    no_diagnosis: "Not a diagnosis; needs review by a clinician.",
    refused: "image {} was refused by {}",
    checks: ["the domain check", "the quality check"],
    no_heat_maps: "This model gives no heat maps.",
};

const SPANISH: Words = Words {
    point: ",",
    not_reviewed: "Resultado preliminar de un análisis automático de imágenes de piel, no revisado por un médico.",
    image: "Imagen {}",
    together: ["Todas las imágenes", "Todas las imágenes no rechazadas"],
    dermoscopy: "dermatoscopia",
    photograph: "fotografía",
    quality: "calidad {} ({})",
    grades: ["mala", "suficiente", "buena", "excelente"],
    most_probable: "Clase más probable: {} {}.",
    area: "Superficie de la lesión: {} de la imagen.",
    no_result: "Sin resultado: {}.",
    of_image: "la imagen {} {}",
    not_skin: "no muestra piel",
    poor: "es de calidad insuficiente ({})",
    and: " y ",
    conclusion: "Resultado preliminar de un análisis automático. Máxima probabilidad: {} ({}).",
    referral: ["{}: igual o superior al umbral de derivación.", "{}: inferior al umbral de derivación."],
    threshold: ["{}: igual o superior al umbral.", "{}: inferior al umbral."],
    no_diagnosis: "No es un diagnóstico; requiere revisión por un médico.",
    refused: "la imagen {} fue rechazada por {}",
    checks: ["la comprobación de dominio", "la comprobación de calidad"],
    no_heat_maps: "Este modelo no ofrece mapas de calor.",
};

const GERMAN: Words = Words {
    point: ",",
    not_reviewed: "Vorläufiges Ergebnis einer automatischen Analyse von Hautbildern, nicht ärztlich geprüft.",
    image: "Bild {}",
    together: ["Alle Bilder", "Alle nicht abgelehnten Bilder"],
    dermoscopy: "Dermatoskopie",
    photograph: "Fotografie",
    quality: "Qualität {} ({})",
    grades: ["schlecht", "ausreichend", "gut", "ausgezeichnet"],
    most_probable: "Wahrscheinlichste Klasse: {} {}.",
    area: "Fläche der Läsion: {} des Bildes.",
    no_result: "Kein Ergebnis: {}.",
    of_image: "Bild {} {}",
    not_skin: "zeigt keine Haut",
    poor: "ist von zu geringer Qualität ({})",
    and: " und ",
    conclusion: "Vorläufiges Ergebnis einer automatischen Analyse. Höchste Wahrscheinlichkeit: {} ({}).",
    referral: ["{}: auf oder über der Überweisungsschwelle.", "{}: unter der Überweisungsschwelle."],
    threshold: ["{}: auf oder über der Schwelle.", "{}: unter der Schwelle."],
    no_diagnosis: "Keine Diagnose; bedarf der ärztlichen Beurteilung.",
    refused: "Bild {} wurde von {} abgelehnt",
    checks: ["der Motivprüfung", "der Qualitätsprüfung"],
    no_heat_maps: "Dieses Modell liefert keine Heatmaps.",
};

const FRENCH: Words = Words {
    point: ",",
    not_reviewed: "Résultat préliminaire d'une analyse automatique d'images de peau, non revu par un médecin.",
    image: "Image {}",
    together: ["Toutes les images", "Toutes les images non refusées"],
    dermoscopy: "dermoscopie",
    photograph: "photographie",
    quality: "qualité {} ({})",
    grades: ["mauvaise", "passable", "bonne", "excellente"],
    most_probable: "Classe la plus probable : {} {}.",
    area: "Surface de la lésion : {} de l'image.",
    no_result: "Pas de résultat : {}.",
    of_image: "l'image {} {}",
    not_skin: "ne montre pas de peau",
    poor: "est de qualité insuffisante ({})",
    and: " et ",
    conclusion: "Résultat préliminaire d'une analyse automatique. Probabilité la plus élevée : {} ({}).",
    referral: [
        "{} : au niveau ou au-dessus du seuil d'orientation.",
        "{} : au-dessous du seuil d'orientation.",
    ],
    threshold: ["{} : au niveau ou au-dessus du seuil.", "{} : au-dessous du seuil."],
    no_diagnosis: "Ce n'est pas un diagnostic ; doit être revu par un médecin.",
    refused: "l'image {} a été refusée par {}",
    checks: ["le contrôle du domaine", "le contrôle de qualité"],
    no_heat_maps: "Ce modèle ne fournit pas de cartes de chaleur.",
};

/// The sentences of a language.
pub fn words(language: Language) -> &'static Words {
    match language {
        Language::English => &ENGLISH,
        Language::Spanish => &SPANISH,
        Language::German => &GERMAN,
        Language::French => &FRENCH,
    }
}

/// A sentence with its parts.
pub fn fill(template: &str, parts: &[&str]) -> String {
    let mut parts = parts.iter();
    let mut pieces = template.split("{}");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |text, piece| text + parts.next().copied().unwrap_or_default() + piece)
}

/// A text as it stands within a sentence.
pub fn within(text: &str) -> String {
    first(text, char::to_lowercase)
}

/// A text as it begins a sentence.
pub fn begun(text: &str) -> String {
    first(text, char::to_uppercase)
}

fn first<L: Iterator<Item = char>>(text: &str, letter: impl Fn(char) -> L) -> String {
    let mut letters = text.chars();
    letters.next().into_iter().flat_map(letter).chain(letters).collect()
}

impl Words {
    /// Hundredths of a per cent.
    pub fn percent(&self, points: u32) -> String {
        format!("{}{}{:02} %", points / 100, self.point, points % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dermflow_schemas::fhir::LANGUAGES;

    /// A sentence of every language has the places of the English one; and none was forgotten.
    #[test]
    fn every_language_says_the_same() {
        let all = |words: &'static Words| {
            let Words { image, quality, most_probable, area, no_result, of_image, poor, .. } = words;
            let Words { conclusion, refused, referral, threshold, grades, checks, .. } = words;
            let Words { together, .. } = words;
            let one = [image, quality, most_probable, area, no_result, of_image, poor, conclusion, refused];
            let lists = referral.iter().chain(threshold).chain(grades).chain(checks).chain(together);
            one.into_iter().chain(lists).copied().collect::<Vec<&str>>()
        };
        let english = all(words(Language::English));
        for language in LANGUAGES.into_iter().skip(1) {
            for (ours, theirs) in english.iter().zip(all(words(language))) {
                assert_eq!(ours.matches("{}").count(), theirs.matches("{}").count(), "{theirs}");
                assert!(ours != &theirs || *ours == "Image {}", "{theirs}");
            }
        }
    }

    #[test]
    fn parts_are_put_in_from_left_to_right() {
        assert_eq!(fill("{} of {}.", &["one", "{}"]), "one of {}.");
        assert_eq!(words(Language::German).percent(6_142), "61,42 %");
        assert_eq!(words(Language::English).percent(5), "0.05 %");
    }
}
