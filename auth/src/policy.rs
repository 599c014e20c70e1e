//! Which passwords people may choose: NIST SP 800-63B-4 §3.1.1.2 and OWASP ASVS 5.0 V6.2.
//!
//! At least 15 characters, no rule on which kinds of them, and none of those that an attacker tries first. These are
//! found with zxcvbn (Wheeler, USENIX Security 2016), which knows 30,000 passwords of past breaches, names and words,
//! and sees them through capitals, digits for letters, repetition and rows of keys: among passwords of 15 characters
//! hardly any is on a list as it stands, but many are made of two that are. A list of our own has 3,000 that are used
//! most, of which zxcvbn does not know all: one of them, however often it is repeated, is refused too.

use secrecy::{ExposeSecret, SecretString};
use unicode_normalization::UnicodeNormalization;
use zeroize::Zeroizing;
use zxcvbn::{Score, zxcvbn};

/// Characters (Unicode scalar values after NFKC) that a password needs; for a single factor, NIST's own bound.
pub const MIN_CHARS: usize = 15;
/// Characters that a password may have. NIST asks for 64 at least; nothing is cut off.
pub const MAX_CHARS: usize = 256;
/// Of these, characters that are not of words known of the owner or of us.
const MIN_OTHER_CHARS: usize = 8;
/// The most common passwords, a line each, in lower case.
const COMMON: &str = include_str!("../common-passwords.txt");
/// What everybody would think of first, here.
const PRODUCT: [&str; 3] = ["dermflow", "dermatology", "melanoma"];

/// Why a password cannot be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Fewer than [`MIN_CHARS`].
    #[error("the password needs at least {MIN_CHARS} characters")]
    TooShort,
    /// More than [`MAX_CHARS`].
    #[error("the password may have at most {MAX_CHARS} characters")]
    TooLong,
    /// A common password, or one that is made of common ones, of rows of keys, or of what is known of its owner.
    #[error(
        "the password is among the first that an attacker would try: take several words that do not belong together"
    )]
    Guessable,
}

/// The form in which a password is measured and hashed, so that every keyboard gives the same one (NFKC).
pub(crate) fn normalise(password: &SecretString) -> Zeroizing<String> {
    Zeroizing::new(password.expose_secret().nfkc().collect())
}

/// Whether a person may choose `password`. `context` is what is known of its owner: the user's name, the domain of
/// the contact; whole, and in the parts between punctuation.
///
/// # Errors
/// The first rule that it breaks.
pub fn check(password: &SecretString, context: &[&str]) -> Result<(), PolicyError> {
    let password = normalise(password);
    match password.chars().count() {
        ..MIN_CHARS => return Err(PolicyError::TooShort),
        MIN_CHARS..=MAX_CHARS => {}
        _ => return Err(PolicyError::TooLong),
    }
    let parts = context.iter().flat_map(|word| word.split(|c: char| !c.is_alphanumeric()));
    let words = PRODUCT.iter().chain(context).copied().chain(parts).filter(|word| word.chars().count() > 2);
    let words: Vec<String> = words.map(str::to_lowercase).collect();
    let mut rest = Zeroizing::new(password.to_lowercase());
    for word in &words {
        rest = Zeroizing::new(rest.replace(word, ""));
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // The best score: more than 10^10 guesses for who knows the lists.
    if is_common(&password.to_lowercase())
        || rest.chars().count() < MIN_OTHER_CHARS
        || zxcvbn(&password, &words).score() < Score::Four
    {
        return Err(PolicyError::Guessable);
    }
    Ok(())
}

/// The lines of [`COMMON`] but for its comments.
fn common() -> impl Iterator<Item = &'static str> {
    COMMON.lines().filter(|line| !line.starts_with("# "))
}

/// Whether `password` is a common one, once or again and again, whatever separates it.
fn is_common(password: &str) -> bool {
    let password = Zeroizing::new(password.to_owned());
    common().any(|word| {
        let rest = Zeroizing::new(password.replace(word, ""));
        rest.len() < password.len() && !rest.chars().any(char::is_alphanumeric)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(password: &str) -> Result<(), PolicyError> {
        check(&password.into(), &["clinic-7", "it@praxis-lindenhof.example"])
    }

    #[test]
    fn length_is_counted_in_characters_after_normalisation() {
        assert_eq!(verdict("kd7#Qm2vXe9!pL"), Err(PolicyError::TooShort));
        assert_eq!(verdict("kd7#Qm2vXe9!pLz"), Ok(()));
        // Fourteen characters of four bytes each, and a ligature that is three characters in NFKC.
        assert_eq!(verdict("🌲🚲🌊🧲🎻🍋🦉🧵🪁🥁🌵🧭🪵🎲"), Err(PolicyError::TooShort));
        assert_eq!(verdict("kd7#Qm2vXe9!ﬃ"), Ok(()));
        let long: String = (0_u32..257).map(|n| char::from(b'!' + (n * n * 31 % 89) as u8)).collect();
        assert_eq!(verdict(&long[..256]), Ok(()));
        assert_eq!(verdict(&long), Err(PolicyError::TooLong));
    }

    #[test]
    fn no_kind_of_character_is_asked_for() {
        for good in
            ["volatile otter hums brightly", "grüne wiesen im späten mai", "сырой подвал помнит зонтик"]
        {
            assert_eq!(verdict(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_is_tried_first_is_refused() {
        for bad in [
            "passwordpassword",
            "P@ssw0rdP@ssw0rd",
            "iloveyouiloveyou",
            "letmein-letmein-letmein",
            "mypasswordispassword",
            "thisismypassword",
            "123456789012345",
            "qwertyuiop1234567890",
            "1q2w3e4r5t6y7u8i9o0p",
            "zaq12wsxcde34rfv",
            "abcdefghijklmnop",
            "aaaaaaaaaaaaaaaaaaaa",
            "liverpoolfootballclub",
        ] {
            assert_eq!(verdict(bad), Err(PolicyError::Guessable), "{bad}");
        }
    }

    #[test]
    fn what_is_known_of_the_owner_does_not_count() {
        for bad in [
            "Dermflow-2026-Dermflow",
            "clinic-7-dermflow-1",
            "Praxis-Lindenhof-2026!",
            "melanoma-clinic-7-2026",
        ] {
            assert_eq!(verdict(bad), Err(PolicyError::Guessable), "{bad}");
        }
        assert_eq!(check(&"Praxis-Lindenhof-2026!".into(), &[]), Ok(()), "else the words decide nothing");
    }

    /// NIST's block list: as they stand those that are long enough, and all of them repeated until they are.
    #[test]
    fn none_of_three_thousand_common_ones_passes() {
        assert!(common().count() >= 3_000);
        for word in common() {
            let repeated = word.repeat(MIN_CHARS.div_ceil(word.chars().count()));
            for written in [&repeated, &repeated.to_uppercase(), &format!("{repeated}!!")] {
                assert_eq!(verdict(written), Err(PolicyError::Guessable), "{written}");
            }
            if word.chars().count() >= MIN_CHARS {
                assert_eq!(verdict(word), Err(PolicyError::Guessable), "{word}");
            }
        }
    }
}
