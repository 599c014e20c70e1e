//! Patients and orders by keyed digests, so that reports are found by them and nobody reads them in the database.
//!
//! The key is none of those that seal, because digests have to stay the same when those change: it is made once, and
//! stored sealed with them, as every secret that is sealed anew. Should it be lost, with the key that sealed it, another
//! one takes over, and reports from before are found by everything else.

use anyhow::{Context, Result};
use aws_lc_rs::{hmac, rand};
use dermflow_schemas::{
    clock,
    envelope::Manifest,
    fhir::Identifier,
    id::ClientId,
    limits::SEARCH_TOKEN_BYTES,
    seal::{Content, Keyring},
};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::store::Store;

/// What a digest is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A reference to the patient, as it was written.
    Subject,
    /// The patient's identifier.
    SubjectIdentifier,
    /// The order's.
    Identifier,
}

impl Kind {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Subject => b"subject",
            Self::SubjectIdentifier => b"subject-identifier",
            Self::Identifier => b"identifier",
        }
    }
}

/// What digests are made with.
#[derive(Debug)]
pub(crate) struct Index {
    /// The latest first.
    keys: Vec<hmac::Key>,
}

impl Index {
    /// Reads the keys, and makes the first one.
    ///
    /// # Errors
    /// When the database cannot be reached.
    pub(crate) async fn open(store: &Store, keyring: &Keyring) -> Result<Self> {
        loop {
            let stored = store.search_keys().await.context("cannot read the search keys")?;
            let mut keys = Vec::new();
            for (id, sealed) in &stored {
                match keyring.open(Content::SearchKey(*id), sealed) {
                    Ok(secret) => keys.push(hmac::Key::new(hmac::HMAC_SHA256, &Zeroizing::new(secret))),
                    Err(error) => tracing::error!(%id, %error, "a search key cannot be opened"),
                }
            }
            if !keys.is_empty() {
                return Ok(Self { keys });
            }
            let (id, mut secret) = (Uuid::now_v7(), Zeroizing::new(vec![0; 32]));
            rand::fill(&mut secret).map_err(|_| anyhow::anyhow!("no randomness"))?;
            let sealed = keyring.seal(Content::SearchKey(id), secret.to_vec(), clock::now());
            let known: Vec<Uuid> = stored.iter().map(|(id, _)| *id).collect();
            // Of replicas that start at once one makes it, and the others read it.
            store.add_search_key(id, &sealed.context("cannot seal the search key")?, &known).await?;
        }
    }

    /// All that a job's report is to be found by.
    pub(crate) fn of(&self, client: ClientId, manifest: &Manifest) -> Vec<Vec<u8>> {
        let subject = manifest.subject.as_ref();
        let literal = subject.and_then(|subject| subject.reference.as_deref());
        let patient = subject.and_then(|subject| subject.identifier.as_deref());
        // FHIR asks for a resource of the caller's own server by its id alone, too.
        let id = literal.and_then(|literal| literal.split_once('/').filter(|_| !literal.contains(':')));
        let texts = literal.into_iter().chain(id.map(|(_, id)| id));
        let texts = texts.map(|text| (Kind::Subject, reference(text)));
        let texts = texts.chain(forms(Kind::SubjectIdentifier, patient));
        let texts = texts.chain(forms(Kind::Identifier, manifest.identifier.as_ref()));
        texts.filter_map(|(kind, text)| Some(digest(self.keys.first()?, client, kind, &text))).collect()
    }

    /// The digests of a text that is looked for, with every key.
    pub(crate) fn digests(&self, client: ClientId, kind: Kind, text: &str) -> Vec<Vec<u8>> {
        self.keys.iter().map(|key| digest(key, client, kind, text)).collect()
    }
}

/// An identifier as FHIR's searches name it: with its system, or with nothing before the bar when it has none, and the
/// value alone (R4, Search, token).
fn forms(kind: Kind, identifier: Option<&Identifier>) -> impl Iterator<Item = (Kind, String)> {
    let found =
        identifier.and_then(|identifier| Some((identifier.system.as_deref(), identifier.value.as_ref()?)));
    let both = found
        .map(|(system, value)| [format!("{}|{value}", system.unwrap_or_default()), format!("any|{value}")]);
    let [exact, any] = both.map_or([None, None], |[exact, any]| [Some(exact), Some(any)]);
    exact.map(|text| format!("in {text}")).into_iter().chain(any).map(move |text| (kind, text))
}

/// How a reference is written: a URL, `Patient/7`, or the id alone.
pub(crate) fn reference(text: &str) -> String {
    let place = if text.contains(['/', ':']) { "at" } else { "id" };
    format!("{place} {text}")
}

/// How [`forms`] writes a token that is looked for: `system|value`, `|value` or `value`.
pub(crate) fn form(token: &str) -> String {
    if token.contains('|') { format!("in {token}") } else { format!("any|{token}") }
}

fn digest(key: &hmac::Key, client: ClientId, kind: Kind, text: &str) -> Vec<u8> {
    let mut context = hmac::Context::with_key(key);
    context.update(client.uuid().as_bytes());
    context.update(kind.label());
    context.update(&[0]);
    context.update(text.as_bytes());
    context.sign().as_ref()[..SEARCH_TOKEN_BYTES].to_vec()
}

#[cfg(test)]
mod tests {
    use dermflow_schemas::fhir::Reference;

    use super::*;

    fn index(byte: u8) -> Index {
        Index { keys: vec![hmac::Key::new(hmac::HMAC_SHA256, &[byte; 32])] }
    }

    fn manifest(system: Option<&str>) -> Manifest {
        let identifier = |value: &str| Identifier {
            use_: None,
            system: system.map(str::to_owned),
            value: Some(value.to_owned()),
        };
        let subject = Reference {
            reference: Some("Patient/7".into()),
            identifier: Some(Box::new(identifier("P-1"))),
            ..Reference::default()
        };
        Manifest::new(Vec::new(), Some(subject), Some(identifier("O-1")))
    }

    #[test]
    fn a_report_is_found_by_what_was_said_and_by_nothing_else() {
        let (index, client) = (index(1), ClientId::from(Uuid::from_u128(1)));
        let tokens = index.of(client, &manifest(Some("urn:x")));
        let finds = |client, kind, text: &str| {
            index.digests(client, kind, text).iter().any(|digest| tokens.contains(digest))
        };
        let patient = Kind::SubjectIdentifier;
        assert!(
            finds(client, Kind::Subject, &reference("Patient/7"))
                && finds(client, Kind::Subject, &reference("7"))
        );
        assert!(finds(client, patient, &form("urn:x|P-1")) && finds(client, patient, &form("P-1")));
        assert!(finds(client, Kind::Identifier, &form("urn:x|O-1")));
        for (kind, text) in
            [(patient, "|P-1"), (patient, "urn:y|P-1"), (patient, "P-2"), (Kind::Identifier, "P-1")]
        {
            assert!(!finds(client, kind, &form(text)), "{kind:?} {text}");
        }
        assert!(
            !finds(Uuid::from_u128(2).into(), Kind::Subject, &reference("Patient/7")),
            "another client's"
        );
        let bare = index.of(client, &manifest(None));
        let found = index.digests(client, patient, &form("|P-1"));
        assert!(found.iter().all(|digest| bare.contains(digest)));
        assert!(bare.iter().all(|token| token.len() == SEARCH_TOKEN_BYTES));
    }

    #[test]
    fn digests_of_an_older_key_are_looked_for_too() {
        let (client, both) = (ClientId::from(Uuid::from_u128(1)), [index(2), index(1)]);
        let keys = both.into_iter().flat_map(|index| index.keys).collect();
        let looked_for = Index { keys }.digests(client, Kind::Subject, &reference("Patient/7"));
        for byte in [1, 2] {
            let tokens = index(byte).of(client, &manifest(None));
            assert!(looked_for.iter().any(|digest| tokens.contains(digest)), "{byte}");
        }
    }
}
