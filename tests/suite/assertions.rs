//! Clients that prove who they are with a signed assertion.

use std::fs;

use anyhow::{Context, Result};
use aws_lc_rs::{
    encoding::{AsDer, PublicKeyX509Der},
    rand::SystemRandom,
    signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use dermflow_schemas::clock;
use dermflow_tests::{
    client::Answer,
    lab::{Lab, Setup},
};
use jsonwebtoken::{Algorithm, EncodingKey, jwk::Jwk};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::identity::{form, tempfolder, text, with};

/// The type of an assertion (RFC 7523 §2.2).
const ASSERTION: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// A client's key for ES384, with what the public half looks like.
struct Key {
    private: EncodingKey,
    der: Vec<u8>,
    jwk: Value,
}

impl Key {
    fn new(id: &str) -> Result<Self> {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, &SystemRandom::new())?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, pkcs8.as_ref())?;
        let der = AsDer::<PublicKeyX509Der<'_>>::as_der(pair.public_key())?.as_ref().to_vec();
        let private = EncodingKey::from_ec_der(pkcs8.as_ref());
        let mut jwk = json!(Jwk::from_encoding_key(&private, Algorithm::ES384)?);
        jwk["kid"] = json!(id);
        Ok(Self { private, der, jwk })
    }

    /// Gives an account the public half; returns the client's id.
    fn add(&self, lab: &Lab, name: &str) -> Result<String> {
        let folder = tempfolder()?;
        let path = folder.join("public.jwk");
        fs::write(&path, self.jwk.to_string())?;
        let added =
            lab.auth(&["credential", "add", name, "--label", "key", "--key", &path.to_string_lossy()])?;
        fs::remove_dir_all(folder)?;
        let added: Value = serde_json::from_str(&added)?;
        Ok(added["client_id"].as_str().context("no client_id")?.to_owned())
    }

    /// The public half in every form in which somebody may have it.
    fn forms(&self) -> [Vec<u8>; 3] {
        let pem =
            format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(&self.der));
        [self.der.clone(), pem.into_bytes(), self.jwk.to_string().into_bytes()]
    }
}

/// A JWT by hand: most of those that are needed here a library would refuse to make.
fn jwt(header: &Value, claims: &Value, signs: Option<(&EncodingKey, Algorithm)>) -> Result<String> {
    let coded = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let input = format!("{}.{}", coded(header), coded(claims));
    let signed = signs.map(|(key, algorithm)| jsonwebtoken::crypto::sign(input.as_bytes(), key, algorithm));
    Ok(format!("{input}.{}", signed.transpose()?.unwrap_or_default()))
}

/// An object with some members changed, or left out for null.
fn changed(object: &Value, changes: &Value) -> Value {
    let members = |value: &Value| value.as_object().cloned().unwrap_or_default();
    let all = members(object).into_iter().chain(members(changes));
    let mut all: serde_json::Map<_, _> = all.collect();
    all.retain(|_, value| !value.is_null());
    Value::Object(all)
}

// RFC 7523 section 3: an assertion is one client's, signed with a key of that client, for us, for five minutes at most, and
// good once, whichever replica it is shown to.
#[tokio::test(flavor = "multi_thread")]
async fn an_assertion_proves_its_client_once() -> Result<()> {
    let lab = Lab::start(Setup { replicas: 2, ..Setup::without_workers() }).await?;
    lab.register("other").await?;
    let [own, same_id, named, nobodys] =
        [Key::new("1")?, Key::new("1")?, Key::new("theirs")?, Key::new("1")?];
    let (id, other) = (own.add(&lab, "demo")?, same_id.add(&lab, "other")?);
    named.add(&lab, "other")?;
    let [by_own, by_same_id, by_named, by_nobodys] =
        [&own, &same_id, &named, &nobodys].map(|key| Some((&key.private, Algorithm::ES384)));
    let anonymous = lab.client().clone().with_token("");
    let sign_in = async |replica: usize, assertion: &str| {
        let fields = [
            ("grant_type", "client_credentials"),
            ("client_assertion_type", ASSERTION),
            ("client_assertion", assertion),
        ];
        form(&anonymous.clone().at(&lab.url(replica)), "/oauth/token", &fields).await
    };
    let refused = |what: &str, answer: &Answer| {
        let found = (answer.status, text(answer, "error"), text(answer, "access_token"));
        assert_eq!(found, (401, "invalid_client", ""), "{what}");
    };
    let audience = format!("{}/oauth/token", lab.url(0));
    let header = json!({"alg": "ES384", "kid": "1", "typ": "JWT"});
    let claims = |id: &str| {
        let exp = clock::now().unix_timestamp() + 240;
        json!({"iss": id, "sub": id, "aud": audience, "exp": exp, "jti": Uuid::new_v4()})
    };

    for replica in 0..2 {
        let claims = claims(&id);
        let (assertion, again) = (jwt(&header, &claims, by_own)?, jwt(&header, &claims, by_own)?);
        assert_ne!(assertion, again, "ECDSA signs nothing twice in the same way");
        let first = sign_in(replica, &assertion).await?;
        assert_eq!(first.status, 200, "{}", first.text);
        for replica in 0..2 {
            refused("a second time", &sign_in(replica, &assertion).await?);
            refused("signed a second time", &sign_in(replica, &again).await?);
        }
        let theirs = changed(&claims, &json!({"iss": other, "sub": other}));
        let theirs = sign_in(replica, &jwt(&header, &theirs, by_same_id)?).await?;
        assert_eq!(theirs.status, 200, "the id is another client's too: {}", theirs.text);
    }
    let assertion = jwt(&header, &claims(&id), by_own)?;
    let both = tokio::try_join!(sign_in(0, &assertion), sign_in(1, &assertion))?;
    let good = [&both.0, &both.1].into_iter().filter(|answer| answer.status == 200).count();
    assert_eq!(good, 1, "at both replicas at once");

    let now = clock::now().unix_timestamp();
    let secrets = own.forms().map(|form| EncodingKey::from_secret(&form));
    let mut cases = vec![
        ("for another server", json!({}), json!({"aud": "https://other.example/oauth/token"}), by_own),
        ("for another endpoint", json!({}), json!({"aud": format!("{audience}/")}), by_own),
        ("for nobody", json!({}), json!({"aud": null}), by_own),
        ("for more than five minutes", json!({}), json!({"exp": now + 400}), by_own),
        ("for ever", json!({}), json!({"exp": i64::MAX}), by_own),
        ("without an end", json!({}), json!({"exp": null}), by_own),
        ("expired", json!({}), json!({"exp": now - 60}), by_own),
        ("not yet good", json!({}), json!({"nbf": now + 200}), by_own),
        ("made later", json!({}), json!({"iat": now + 200}), by_own),
        ("by another client", json!({}), json!({"iss": other}), by_own),
        ("by nobody", json!({}), json!({"iss": null}), by_own),
        ("about another client", json!({}), json!({"sub": other}), by_own),
        ("by and about another client", json!({}), json!({"iss": other, "sub": other}), by_own),
        ("without an id", json!({}), json!({"jti": null}), by_own),
        ("with an empty id", json!({}), json!({"jti": ""}), by_own),
        ("with a long id", json!({}), json!({"jti": "x".repeat(256)}), by_own),
        ("with nobody's key", json!({}), json!({}), by_nobodys),
        ("with another client's key", json!({}), json!({}), by_same_id),
        ("with another client's key and its id", json!({"kid": "theirs"}), json!({}), by_named),
        ("with an unknown key", json!({"kid": "2"}), json!({}), by_own),
        ("with what no key is called", json!({"kid": "a\0b"}), json!({}), by_own),
        ("with no key's id", json!({"kid": null}), json!({}), by_own),
        ("with a condition", json!({"crit": ["x"], "x": 1}), json!({}), by_own),
        ("with a condition that is met", json!({"crit": ["exp"]}), json!({}), by_own),
        ("with another algorithm", json!({"alg": "ES256"}), json!({}), by_own),
        ("with another kind of algorithm", json!({"alg": "RS384"}), json!({}), by_own),
        ("with no algorithm", json!({"alg": "none"}), json!({}), None),
        ("with no algorithm, and signed", json!({"alg": "none"}), json!({}), by_own),
        ("without a signature", json!({}), json!({}), None),
    ];
    for secret in &secrets {
        let signs = Some((secret, Algorithm::HS256));
        cases.push(("with the public key as a secret", json!({"alg": "HS256"}), json!({}), signs));
        cases.push(("the same under its own name", json!({}), json!({}), signs));
    }
    let logins = "SELECT count(*) FROM auth.audit WHERE action = 'login' AND outcome = 'success'";
    let before = lab.count(logins).await?;
    for (what, of_header, of_claims, signs) in cases {
        let assertion = jwt(&changed(&header, &of_header), &changed(&claims(&id), &of_claims), signs)?;
        for replica in 0..2 {
            refused(what, &sign_in(replica, &assertion).await?);
        }
    }
    assert_eq!(lab.count(logins).await?, before);
    for replica in 0..2 {
        let answer = sign_in(replica, &jwt(&header, &claims(&id), by_own)?).await?;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(with(lab.client(), &answer).get("/jobs").await?.status, 200);
    }
    lab.stop().await
}
