//! What scores, their questions and answers are called, in the languages of reports. In short, and in words of our own: the
//! questionnaires' are their authors'.

use dermflow_schemas::fhir::{LANGUAGES, Language};

macro_rules! words {
    ($($english:literal $spanish:literal $german:literal $french:literal;)*) => {
        /// In the order of [`LANGUAGES`]. Answers agree with the word for a degree.
        const WORDS: &[[&str; LANGUAGES.len()]] = &[$([$english, $spanish, $german, $french]),*];
    };
}

words! {
    // Scores.
    "Dermatology Life Quality Index" "Índice de calidad de vida en dermatología" "Dermatologischer Lebensqualitätsindex" "Indice de qualité de vie en dermatologie";
    "Global Acne Grading System" "Sistema global de gradación del acné" "Globales Akne-Graduierungssystem" "Système global de gradation de l'acné";
    "International Hidradenitis Suppurativa Severity Score System" "Sistema internacional de puntuación de la gravedad de la hidradenitis supurativa" "Internationaler Schweregrad-Score der Hidradenitis suppurativa" "Score international de sévérité de l'hidradénite suppurée";
    "Psoriasis Area and Severity Index" "Índice de extensión y gravedad de la psoriasis" "Index für Ausdehnung und Schweregrad der Psoriasis" "Indice d'étendue et de sévérité du psoriasis";
    "Physician Global Assessment" "Evaluación global del médico" "Ärztliche Gesamtbeurteilung" "Évaluation globale par le médecin";
    "Psoriatic arthritis screening (PURE-4)" "Cribado de la artritis psoriásica (PURE-4)" "Screening auf Psoriasisarthritis (PURE-4)" "Dépistage du rhumatisme psoriasique (PURE-4)";
    "Scoring Atopic Dermatitis" "Puntuación de la dermatitis atópica" "Score der atopischen Dermatitis" "Score de la dermatite atopique";
    "Symptoms of COVID-19 with skin signs (sum of the answers, 0 to 44; not validated)" "Síntomas de COVID-19 con signos cutáneos (suma de las respuestas, de 0 a 44; sin validar)" "Symptome von COVID-19 mit Hautzeichen (Summe der Antworten, 0 bis 44; nicht validiert)" "Symptômes de COVID-19 avec signes cutanés (somme des réponses, de 0 à 44 ; non validée)";
    "Weighted seven-point checklist" "Lista ponderada de siete puntos" "Gewichtete Sieben-Punkte-Checkliste" "Liste pondérée en sept points";
    "Urticaria Activity Score" "Puntuación de la actividad de la urticaria" "Urtikaria-Aktivitäts-Score" "Score d'activité de l'urticaire";
    "Urticaria Control Test" "Test de control de la urticaria" "Urtikaria-Kontrolltest" "Test de contrôle de l'urticaire";
    // Questions.
    "Itch, soreness, pain or stinging" "Picor, dolor o escozor" "Juckreiz, Wundsein, Schmerz oder Brennen" "Démangeaisons, douleur ou brûlure";
    "Embarrassment" "Vergüenza" "Verlegenheit" "Gêne";
    "Shopping, home and garden" "Compras, casa y jardín" "Einkaufen, Haus und Garten" "Courses, maison et jardin";
    "Clothes" "Ropa" "Kleidung" "Vêtements";
    "Social and leisure activities" "Actividades sociales y de ocio" "Soziale Aktivitäten und Freizeit" "Activités sociales et loisirs";
    "Sport" "Deporte" "Sport" "Sport";
    "Work or study" "Trabajo o estudios" "Arbeit oder Studium" "Travail ou études";
    "Partner, friends and relatives" "Pareja, amistades y familia" "Partnerschaft, Freunde und Angehörige" "Partenaire, amis et proches";
    "Sexual difficulties" "Dificultades sexuales" "Sexuelle Schwierigkeiten" "Difficultés sexuelles";
    "Treatment" "Tratamiento" "Behandlung" "Traitement";
    "Forehead" "Frente" "Stirn" "Front";
    "Right cheek" "Mejilla derecha" "Rechte Wange" "Joue droite";
    "Left cheek" "Mejilla izquierda" "Linke Wange" "Joue gauche";
    "Nose" "Nariz" "Nase" "Nez";
    "Chin" "Mentón" "Kinn" "Menton";
    "Chest and upper back" "Pecho y parte superior de la espalda" "Brust und oberer Rücken" "Poitrine et haut du dos";
    "Inflammatory nodules" "Nódulos inflamatorios" "Entzündliche Knoten" "Nodules inflammatoires";
    "Abscesses" "Abscesos" "Abszesse" "Abcès";
    "Draining tunnels" "Túneles drenantes" "Drainierende Gänge" "Tunnels drainants";
    "Affected surface" "Superficie afectada" "Betroffene Fläche" "Surface atteinte";
    "Erythema" "Eritema" "Erythem" "Érythème";
    "Induration" "Induración" "Induration" "Induration";
    "Desquamation" "Descamación" "Schuppung" "Desquamation";
    "Signs of dactylitis" "Signos de dactilitis" "Zeichen einer Daktylitis" "Signes de dactylite";
    "Inflammatory heel pain" "Dolor inflamatorio del talón" "Entzündlicher Fersenschmerz" "Talalgie inflammatoire";
    "Bilateral buttock pain" "Dolor en ambas nalgas" "Beidseitiger Gesäßschmerz" "Douleur fessière bilatérale";
    "Peripheral joint pain with swelling before the age of 50" "Dolor articular periférico con hinchazón antes de los 50 años" "Schmerz peripherer Gelenke mit Schwellung vor dem 50. Lebensjahr" "Douleur articulaire périphérique avec gonflement avant 50 ans";
    "Oedema or papulation" "Edema o pápulas" "Ödem oder Papeln" "Œdème ou papules";
    "Oozing or crusts" "Exudación o costras" "Nässen oder Krusten" "Suintement ou croûtes";
    "Excoriation" "Excoriación" "Exkoriation" "Excoriation";
    "Lichenification" "Liquenificación" "Lichenifikation" "Lichénification";
    "Dryness of skin that is not affected" "Sequedad de la piel no afectada" "Trockenheit der nicht betroffenen Haut" "Sécheresse de la peau non atteinte";
    "Itch" "Prurito" "Juckreiz" "Prurit";
    "Loss of sleep" "Pérdida de sueño" "Schlafverlust" "Perte de sommeil";
    "Pain" "Dolor" "Schmerz" "Douleur";
    "Fever" "Fiebre" "Fieber" "Fièvre";
    "Cough" "Tos" "Husten" "Toux";
    "Headache" "Cefalea" "Kopfschmerz" "Céphalée";
    "Muscle or joint pain" "Dolor muscular o articular" "Muskel- oder Gelenkschmerz" "Douleur musculaire ou articulaire";
    "Malaise" "Malestar general" "Krankheitsgefühl" "Malaise général";
    "Loss of taste or smell" "Pérdida del gusto o del olfato" "Verlust von Geschmack oder Geruch" "Perte du goût ou de l'odorat";
    "Shortness of breath" "Disnea" "Atemnot" "Essoufflement";
    "Other skin problems" "Otros problemas de la piel" "Andere Hautprobleme" "Autres problèmes de peau";
    "Change in size" "Cambio de tamaño" "Größenänderung" "Changement de taille";
    "Irregular pigmentation" "Pigmentación irregular" "Unregelmäßige Pigmentierung" "Pigmentation irrégulière";
    "Irregular border" "Borde irregular" "Unregelmäßiger Rand" "Bord irrégulier";
    "Inflammation" "Inflamación" "Entzündung" "Inflammation";
    "Larger than other lesions" "Mayor que otras lesiones" "Größer als andere Läsionen" "Plus grande que les autres lésions";
    "Itch or altered sensation" "Prurito o alteración de la sensibilidad" "Juckreiz oder veränderte Empfindung" "Prurit ou altération de la sensibilité";
    "Crusting or bleeding" "Costras o sangrado" "Krusten oder Blutung" "Croûtes ou saignement";
    "Wheals" "Habones" "Quaddeln" "Papules ortiées";
    "Suffering from the symptoms" "Molestias por los síntomas" "Leiden unter den Beschwerden" "Gêne due aux symptômes";
    "Effect on the quality of life" "Efecto sobre la calidad de vida" "Auswirkung auf die Lebensqualität" "Effet sur la qualité de vie";
    "Treatment that was not enough" "Tratamiento insuficiente" "Unzureichende Behandlung" "Traitement insuffisant";
    "Control of the disease" "Control de la enfermedad" "Kontrolle der Erkrankung" "Contrôle de la maladie";
    // Answers.
    "No" "No" "Nein" "Non";
    "Yes" "Sí" "Ja" "Oui";
    "Not at all" "En absoluto" "Überhaupt nicht" "Pas du tout";
    "A little" "Un poco" "Ein wenig" "Un peu";
    "Somewhat" "Algo" "Etwas" "Moyennement";
    "A lot" "Bastante" "Deutlich" "Beaucoup";
    "Much" "Mucho" "Stark" "Fortement";
    "Very much" "Muchísimo" "Sehr stark" "Énormément";
    "Well" "Bien" "Gut" "Bien";
    "Completely" "Totalmente" "Vollständig" "Complètement";
    "Very often" "Muy a menudo" "Sehr oft" "Très souvent";
    "Often" "A menudo" "Oft" "Souvent";
    "Sometimes" "A veces" "Manchmal" "Parfois";
    "Seldom" "Rara vez" "Selten" "Rarement";
    "No lesion" "Sin lesiones" "Keine Läsion" "Aucune lésion";
    "Comedones" "Comedones" "Komedonen" "Comédons";
    "Papules" "Pápulas" "Papeln" "Papules";
    "Pustules" "Pústulas" "Pusteln" "Pustules";
    "Nodules" "Nódulos" "Knoten" "Nodules";
    "0 %" "0 %" "0 %" "0 %";
    "1 to 9 %" "1 a 9 %" "1 bis 9 %" "1 à 9 %";
    "10 to 29 %" "10 a 29 %" "10 bis 29 %" "10 à 29 %";
    "30 to 49 %" "30 a 49 %" "30 bis 49 %" "30 à 49 %";
    "50 to 69 %" "50 a 69 %" "50 bis 69 %" "50 à 69 %";
    "70 to 89 %" "70 a 89 %" "70 bis 89 %" "70 à 89 %";
    "90 to 100 %" "90 a 100 %" "90 bis 100 %" "90 à 100 %";
    "Fewer than 20 in 24 hours" "Menos de 20 en 24 horas" "Weniger als 20 in 24 Stunden" "Moins de 20 en 24 heures";
    "20 to 50 in 24 hours" "De 20 a 50 en 24 horas" "20 bis 50 in 24 Stunden" "De 20 à 50 en 24 heures";
    "More than 50 in 24 hours" "Más de 50 en 24 horas" "Mehr als 50 in 24 Stunden" "Plus de 50 en 24 heures";
    "{} of {}" "{} de {}" "{} von {}" "{} sur {}";
    // Degrees, of answers and of scores.
    "None" "Ausente" "Nicht vorhanden" "Absent";
    "Minimal" "Mínimo" "Minimal" "Minime";
    "Mild" "Leve" "Leicht" "Léger";
    "Moderate" "Moderado" "Mäßig" "Modéré";
    "Severe" "Grave" "Schwer" "Sévère";
    "Very severe" "Muy grave" "Sehr schwer" "Très sévère";
    "No effect" "Sin efecto" "Keine Auswirkung" "Aucun effet";
    "Small effect" "Efecto pequeño" "Geringe Auswirkung" "Effet faible";
    "Moderate effect" "Efecto moderado" "Mäßige Auswirkung" "Effet modéré";
    "Very large effect" "Efecto muy grande" "Sehr große Auswirkung" "Effet très important";
    "Extremely large effect" "Efecto extremadamente grande" "Extrem große Auswirkung" "Effet extrêmement important";
    "Clear" "Sin lesiones" "Erscheinungsfrei" "Blanchi";
    "Almost clear" "Casi sin lesiones" "Fast erscheinungsfrei" "Presque blanchi";
    "Negative" "Negativo" "Negativ" "Négatif";
    "Positive" "Positivo" "Positiv" "Positif";
    "Low risk" "Riesgo bajo" "Geringes Risiko" "Risque faible";
    "High risk" "Riesgo alto" "Hohes Risiko" "Risque élevé";
    "Poorly controlled" "Mal controlada" "Schlecht kontrolliert" "Mal contrôlée";
    "Well controlled" "Bien controlada" "Gut kontrolliert" "Bien contrôlée";
    "Completely controlled" "Totalmente controlada" "Vollständig kontrolliert" "Complètement contrôlée";
    "Not graded: no bands are published" "Sin gradación: no hay intervalos publicados" "Nicht abgestuft: keine Stufen veröffentlicht" "Non gradué : aucun palier n'est publié";
    "Contribution of the region to the score of the whole body" "Contribución de la región a la puntuación de todo el cuerpo" "Beitrag der Region zum Score des ganzen Körpers" "Contribution de la région au score du corps entier";
}

/// A text in every language, in the order of [`LANGUAGES`].
pub(in crate::device) fn in_all(english: &'static str) -> [&'static str; LANGUAGES.len()] {
    let row = WORDS.iter().find(|row| row[0] == english);
    row.copied().unwrap_or([english; LANGUAGES.len()])
}

/// A text in a language.
pub(in crate::device) fn in_language(english: &'static str, language: Language) -> &'static str {
    let mut texts = LANGUAGES.into_iter().zip(in_all(english));
    texts.find(|(of, _)| *of == language).map_or(english, |(_, text)| text)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{
        super::{NUMBER, SCORES},
        *,
    };
    use crate::device::severity::CONTRIBUTION;

    /// Every text of a score is there in every language, once, and nothing else is.
    #[test]
    fn every_text_is_there_in_every_language() {
        let mut used = BTreeSet::from([NUMBER, CONTRIBUTION]);
        for score in SCORES {
            used.insert(score.title);
            used.extend(score.items.iter().flat_map(|item| item.words.iter().copied().chain([item.text])));
            used.extend((0..=1_030).map(|value| score.band(f64::from(value) / 10.0).category));
        }
        let there: Vec<&str> = WORDS.iter().map(|row| row[0]).collect();
        assert_eq!(there.len(), used.len());
        assert_eq!(there.into_iter().collect::<BTreeSet<_>>(), used);
        for row in WORDS {
            assert!(
                row.iter().all(
                    |text| !text.is_empty() && text.matches("{}").count() == row[0].matches("{}").count()
                ),
                "{row:?}"
            );
        }
        assert_eq!(in_language("Itch", Language::German), "Juckreiz");
        assert_eq!(in_all("Yes"), ["Yes", "Sí", "Ja", "Oui"]);
    }
}
