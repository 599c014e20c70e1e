//! What is good with one client certificate only (RFC 8705).

use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use dermflow_http::certificate::validity;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

/// SHA-256 of a certificate (DER).
pub type Fingerprint = [u8; 32];

/// That of the first certificate of a PEM file; `None` when there is none.
pub fn fingerprint(pem: &[u8]) -> Option<Fingerprint> {
    let certificate = CertificateDer::from_pem_slice(pem).ok()?;
    validity(&certificate)?;
    digest(&SHA256, &certificate).as_ref().try_into().ok()
}

/// The claim `cnf` of a token: `x5t#S256` (RFC 8705 §3.1) and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirmation {
    /// The certificate of the connections on which the token is good.
    #[serde(rename = "x5t#S256", serialize_with = "code", deserialize_with = "decode")]
    pub certificate: Fingerprint,
}

fn code<S: Serializer>(certificate: &Fingerprint, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&URL_SAFE_NO_PAD.encode(certificate))
}

fn decode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Fingerprint, D::Error> {
    let bytes = URL_SAFE_NO_PAD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)?;
    bytes.try_into().map_err(|_| D::Error::custom("not a SHA-256"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_value, json};

    use super::*;

    #[test]
    fn a_token_is_bound_to_a_certificate_and_to_nothing_else() {
        // RFC 8705 §3.1.
        let good = json!({"x5t#S256": "bwcK0esc3ACC3DB2Y5_lESsXE8o9ltc05O89jdN-dg2"});
        let read = |value: Value| from_value::<Confirmation>(value);
        // The last of 43 characters has two bits to spare, which the example sets.
        assert!(read(good).is_err());
        let confirmation = Confirmation { certificate: [7; 32] };
        let written = json!(confirmation);
        assert_eq!(written["x5t#S256"].as_str().unwrap().len(), 43);
        assert_eq!(read(written).unwrap(), confirmation);
        for bad in [
            json!({}),
            json!({"jkt": "x"}),
            json!({"x5t#S256": "BwcH"}),
            json!({"x5t#S256": "x".repeat(44)}),
            json!({"x5t#S256": URL_SAFE_NO_PAD.encode([7; 32]), "jkt": "x"}),
            json!("x"),
        ] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
    }
}
