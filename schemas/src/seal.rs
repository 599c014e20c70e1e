//! Sealing of images, reports and private keys: AES-256-GCM (NIST SP 800-38D) under a named key, bound to what it is.
//!
//! A sealed blob is `nonce (12 bytes) ‖ ciphertext ‖ tag (16 bytes)`; the associated data is `"<kind>:<of what>"`, such
//! as `report:<job id>`, so a blob that was put in the place of another does not open.

use std::{fmt, path::Path};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use zeroize::Zeroizing;

use crate::id::JobId;

/// What a blob holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content<'a> {
    /// The images of a job and the request around them.
    Payload(JobId),
    /// The finished report of a job.
    Report(JobId),
    /// The credentials of an account at an ACME server, by the URL of its directory.
    AcmeAccount(&'a str),
    /// The private key of a certificate, by its names.
    CertificateKey(&'a str),
}

impl Content<'_> {
    fn aad(self) -> Aad<String> {
        Aad::from(match self {
            Self::Payload(job) => format!("payload:{job}"),
            Self::Report(job) => format!("report:{job}"),
            Self::AcmeAccount(directory) => format!("acme-account:{directory}"),
            Self::CertificateKey(names) => format!("certificate-key:{names}"),
        })
    }
}

/// Bytes that only a holder of the key can read. `Debug` prints their length.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Which key seals them.
    pub key_id: String,
    /// `nonce ‖ ciphertext ‖ tag`.
    pub bytes: Bytes,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({}, {} bytes)", self.key_id, self.bytes.len())
    }
}

/// Why a blob cannot be sealed or opened, or a key file not read.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The key that sealed this blob is not on the ring.
    #[error("sealing key {0} is not on the ring")]
    UnknownKey(String),
    /// The blob was changed, or is of something else.
    #[error("the sealed bytes do not open")]
    Broken,
    /// The key file cannot be read.
    #[error("cannot read the sealing keys: {0}")]
    File(#[from] std::io::Error),
    /// A line of the key file is not `<id> <Base64 of 32 bytes>`, or there is none.
    #[error("line {0} of the sealing keys is not `<id> <Base64 of 32 bytes>`")]
    Line(usize),
}

/// The keys: the first one seals, every one opens.
pub struct Keyring(Vec<(String, RandomizedNonceKey)>);

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(id, _)| id)).finish()
    }
}

impl Keyring {
    /// Reads a key file: a line `<id> <Base64 of 32 bytes>` a key; the id is at most 32 characters long.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is malformed (the line's content is never shown).
    pub fn load(path: &Path) -> Result<Self, SealError> {
        Self::parse(&Zeroizing::new(std::fs::read_to_string(path)?))
    }

    fn parse(text: &str) -> Result<Self, SealError> {
        let keys = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(n, line)| key_line(line).ok_or(SealError::Line(n + 1)))
            .collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() { Err(SealError::Line(1)) } else { Ok(Self(keys)) }
    }

    /// Whether it is sealed with the key that seals at present.
    pub fn is_current(&self, sealed: &Sealed) -> bool {
        self.0[0].0 == sealed.key_id
    }

    /// Seals `plain`, reusing its memory.
    ///
    /// # Errors
    /// [`SealError::Broken`] when the system gives no randomness.
    pub fn seal(&self, content: Content<'_>, mut plain: Vec<u8>) -> Result<Sealed, SealError> {
        let (key_id, key) = &self.0[0];
        let nonce = key.seal_in_place_append_tag(content.aad(), &mut plain).map_err(|_| SealError::Broken)?;
        plain.splice(0..0, *nonce.as_ref());
        Ok(Sealed { key_id: key_id.clone(), bytes: plain.into() })
    }

    /// Opens what [`Self::seal`] sealed as the same content.
    ///
    /// # Errors
    /// When the key is missing, or the bytes were changed or belong elsewhere.
    pub fn open(&self, content: Content<'_>, sealed: &Sealed) -> Result<Vec<u8>, SealError> {
        let (_, key) = self
            .0
            .iter()
            .find(|(id, _)| *id == sealed.key_id)
            .ok_or_else(|| SealError::UnknownKey(sealed.key_id.clone()))?;
        let (nonce, rest) = sealed.bytes.split_at_checked(NONCE_LEN).ok_or(SealError::Broken)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::Broken)?;
        let mut buffer = rest.to_vec();
        let length =
            key.open_in_place(nonce, content.aad(), &mut buffer).map_err(|_| SealError::Broken)?.len();
        buffer.truncate(length);
        Ok(buffer)
    }
}

fn key_line(line: &str) -> Option<(String, RandomizedNonceKey)> {
    let (id, key) = line.split_once(' ')?;
    let named = (1..=32).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let key = Zeroizing::new(STANDARD.decode(key.trim()).ok().filter(|_| named)?);
    Some((id.to_owned(), RandomizedNonceKey::new(&AES_256_GCM, &key).ok()?))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const TEST_KEYS: &str = "k2 AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=\n\
                                        k1 AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=\n";

    pub(crate) fn ring() -> Keyring {
        Keyring::parse(TEST_KEYS).unwrap()
    }

    fn job() -> JobId {
        "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f".parse().unwrap()
    }

    #[test]
    fn opens_only_as_what_it_was_and_unchanged() {
        let ring = ring();
        let sealed = ring.seal(Content::Payload(job()), b"image".to_vec()).unwrap();
        assert_eq!(ring.open(Content::Payload(job()), &sealed).unwrap(), b"image");
        assert!(ring.open(Content::Report(job()), &sealed).is_err());
        assert!(ring.open(Content::Payload(JobId::new(crate::clock::now())), &sealed).is_err());
        for i in 0..sealed.bytes.len() {
            let mut bytes = sealed.bytes.to_vec();
            bytes[i] ^= 1;
            let flipped = Sealed { bytes: bytes.into(), ..sealed.clone() };
            assert!(matches!(ring.open(Content::Payload(job()), &flipped), Err(SealError::Broken)), "{i}");
        }
    }

    #[test]
    fn the_first_key_seals_and_older_ones_open() {
        let old = Keyring::parse(TEST_KEYS.lines().nth(1).unwrap()).unwrap();
        let sealed = old.seal(Content::Report(job()), b"report".to_vec()).unwrap();
        assert_eq!(sealed.key_id, "k1");
        assert!(old.is_current(&sealed) && !ring().is_current(&sealed));
        assert_eq!(ring().open(Content::Report(job()), &sealed).unwrap(), b"report");
        let newer = ring().seal(Content::Report(job()), b"report".to_vec()).unwrap();
        assert!(
            matches!(old.open(Content::Report(job()), &newer), Err(SealError::UnknownKey(id)) if id == "k2")
        );
    }

    #[test]
    fn a_malformed_key_file_names_the_line_and_nothing_else() {
        for bad in ["", "k1", "k1 AAAA", "k/1 AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="] {
            assert!(matches!(Keyring::parse(bad), Err(SealError::Line(1))), "{bad}");
        }
        assert!(!format!("{:?}", ring()).contains("AQEB"));
    }
}
