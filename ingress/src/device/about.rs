//! What is on offer: maker, version, and the largest request.

use dermflow_schemas::{
    fhir::CANONICAL,
    limits::{
        MAX_BODY_BYTES, MAX_DECODE_BYTES, MAX_IMAGE_BYTES, MAX_IMAGES, MAX_PIXELS, MAX_SIDE_PIXELS,
        MIN_SIDE_PIXELS,
    },
};
use serde_json::{Value, json};

use super::ISSUER;

/// The body of `GET /device-information`. Which model analysed an image is in each report.
pub(crate) fn information() -> Value {
    let page = CANONICAL.trim_end_matches("/fhir");
    json!({
        "manufacturer": { "name": ISSUER, "address": page },
        "name": [{ "type": "user-friendly-name", "value": "Dermflow skin image analyser" }],
        "version": [{ "type": "software", "value": env!("CARGO_PKG_VERSION") }],
        "classification": "For research; not a medical device.",
        "limits": {
            "images": MAX_IMAGES,
            "imageBytes": MAX_IMAGE_BYTES,
            "bodyBytes": MAX_BODY_BYTES,
            "minimumSidePixels": MIN_SIDE_PIXELS,
            "maximumSidePixels": MAX_SIDE_PIXELS,
            "maximumPixels": MAX_PIXELS,
            "maximumDecodedBytes": MAX_DECODE_BYTES,
            "contentTypes": ["image/jpeg", "image/png"],
        },
    })
}
