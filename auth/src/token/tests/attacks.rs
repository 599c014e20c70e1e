//! The attacks on tokens of RFC 8725, RFC 9068 §5 and OWASP's cheat sheet on JWT: each row of the table is one token that
//! must be refused.

use base64::engine::general_purpose::STANDARD;

use super::*;

const ALGORITHMS: [&str; 14] = [
    "none", "None", "nOnE", "HS256", "HS384", "HS512", "RS256", "RS384", "PS256", "PS512", "ES256", "ES384",
    "Ed448", "EdDSA ",
];

/// Tokens that differ from a good one in some of their bytes.
const MUTATIONS: usize = 1_000_000;

/// The order of the group of Ed25519 (RFC 8032 §5.1), little-endian.
const ORDER: [u8; 32] = [
    0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
];

/// Our tokens, one of them, and its three parts as they are in it.
struct Target {
    tokens: Tokens,
    now: OffsetDateTime,
    token: String,
}

impl Target {
    fn new() -> Self {
        let (tokens, now) = (tokens("attacks"), clock::now());
        let token = tokens.issue(grant(client()), now).unwrap().expose_secret().to_owned();
        assert!(tokens.prove(&token, &tokens.keys(), now).is_ok());
        Self { tokens, now, token }
    }

    fn parts(&self) -> [&str; 3] {
        self.token.split('.').collect::<Vec<_>>().try_into().unwrap()
    }

    fn header(&self) -> Value {
        decoded(self.parts()[0])
    }

    fn claims(&self) -> Value {
        decoded(self.parts()[1])
    }

    /// Signed with our own key, so that nothing but what was changed is wrong.
    fn signed(&self, header: &str, claims: &str) -> String {
        let input = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let keys = self.tokens.keys();
        let key = &keys.signing(self.now).signing;
        let signature = jsonwebtoken::crypto::sign(input.as_bytes(), key, Algorithm::EdDSA).unwrap();
        format!("{input}.{signature}")
    }

    fn refuses(&self, what: &str, token: &str) {
        for round in ["unseen", "seen"] {
            assert!(self.tokens.verify(token, self.now).is_err(), "{what}, {round}: {token:.200}");
        }
    }
}

fn decoded(part: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

fn with(object: &Value, name: &str, value: Value) -> String {
    let mut object = object.clone();
    object[name] = value;
    object.to_string()
}

/// Makes sure that what is made here is refused for what is wrong with it, and for nothing else.
#[test]
fn the_forger_signs_as_we_do() {
    let target = Target::new();
    let again = target.signed(&target.header().to_string(), &target.claims().to_string());
    assert!(target.tokens.verify(&again, target.now).is_ok());
}

/// SRS-004
#[test]
fn no_other_key_is_taken() {
    let (target, theirs) = (Target::new(), tokens("theirs"));
    let mut header = Header::new(Algorithm::EdDSA);
    header.typ = Some(TYPE.into());
    for kid in [&target.tokens.keys().signing(target.now).id, &theirs.keys().signing(target.now).id] {
        header.kid = Some(kid.clone());
        let forged =
            jsonwebtoken::encode(&header, &target.claims(), &theirs.keys().signing(target.now).signing);
        target.refuses("another key", &forged.unwrap());
    }
}

/// SRS-004
#[test]
fn no_other_algorithm_is_taken() {
    let target = Target::new();
    let [_, claims, signature] = target.parts();
    for algorithm in ALGORITHMS {
        let header = URL_SAFE_NO_PAD.encode(with(&target.header(), "alg", json!(algorithm)));
        for signature in ["", signature, "AA"] {
            target.refuses(algorithm, &format!("{header}.{claims}.{signature}"));
        }
        target.refuses(algorithm, &format!("{header}.{claims}"));
        let signed =
            target.signed(&with(&target.header(), "alg", json!(algorithm)), &target.claims().to_string());
        target.refuses(algorithm, &signed);
    }
}

/// RFC 8725 §2.1: the public key, in every form in which it is known, as the secret of an HMAC.
#[test]
fn the_public_key_is_no_secret() {
    let target = Target::new();
    let jwks = target.tokens.published(target.now);
    let jwk = &jwks["keys"][0];
    let raw = URL_SAFE_NO_PAD.decode(jwk["x"].as_str().unwrap()).unwrap();
    // SubjectPublicKeyInfo of Ed25519 (RFC 8410 §4).
    let der = [&[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00], &raw[..]].concat();
    let pem = format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(&der));
    let forms = [
        raw.clone(),
        der,
        pem.clone().into_bytes(),
        pem.trim_end().as_bytes().to_vec(),
        jwk["x"].as_str().unwrap().into(),
        jwk.to_string().into_bytes(),
        jwks.to_string().into_bytes(),
        Vec::new(),
    ];
    for algorithm in [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512] {
        for secret in &forms {
            let mut header = Header::new(algorithm);
            header.typ = Some(TYPE.into());
            header.kid = jwk["kid"].as_str().map(str::to_owned);
            let key = jsonwebtoken::EncodingKey::from_secret(secret);
            let forged = jsonwebtoken::encode(&header, &target.claims(), &key).unwrap();
            target.refuses("HMAC with the public key", &forged);
        }
    }
}

#[test]
fn no_other_header_is_taken() {
    let target = Target::new();
    let url = json!("https://attacker.example/keys.json");
    let jwk = target.tokens.published(target.now)["keys"][0].clone();
    let changes = [
        ("kid", json!("unknown")),
        ("kid", json!("../../../../dev/null")),
        ("kid", json!("' OR 1=1 --")),
        ("kid", json!("k".repeat(2_000))),
        ("kid", json!("k".repeat(10_240))),
        ("kid", json!("")),
        ("kid", json!(7)),
        ("kid", Value::Null),
        ("jku", url.clone()),
        ("x5u", url),
        ("jwk", jwk),
        ("x5c", json!(["MIIB"])),
        ("crit", json!(["exp"])),
        ("crit", json!([])),
        ("typ", json!("JWT")),
        ("typ", json!("rt+jwt")),
        ("typ", json!("at+jwt ")),
        ("typ", Value::Null),
        ("alg", Value::Null),
    ];
    for (name, value) in changes {
        let header = with(&target.header(), name, value.clone());
        target.refuses(&format!("{name} = {value}"), &target.signed(&header, &target.claims().to_string()));
    }
    let mut without = target.header();
    without.as_object_mut().unwrap().remove("kid");
    target.refuses("no kid", &target.signed(&without.to_string(), &target.claims().to_string()));
}

#[test]
fn no_other_claim_is_taken() {
    let target = Target::new();
    let (claims, now) = (target.claims(), target.now.unix_timestamp());
    for name in claims.as_object().unwrap().keys() {
        let mut missing = claims.clone();
        missing.as_object_mut().unwrap().remove(name);
        target.refuses(
            &format!("without {name}"),
            &target.signed(&target.header().to_string(), &missing.to_string()),
        );
        target.refuses(
            &format!("{name} = null"),
            &target.signed(&target.header().to_string(), &with(&claims, name, Value::Null)),
        );
    }
    let too_much = 9_223_372_036_854_775_808_u64;
    let changes = [
        ("exp", json!(now - 31)),
        ("exp", json!(now.to_string())),
        ("exp", json!(now as f64 + 900.5)),
        ("exp", json!(-1)),
        ("exp", json!(too_much)),
        ("exp", json!(now + 901)),
        ("nbf", json!(now + 60)),
        ("nbf", json!(now.to_string())),
        ("nbf", json!(now - 1)),
        ("iat", json!(now + 60)),
        ("iat", json!(now.to_string())),
        ("iat", json!(-1)),
        ("aud", json!("other")),
        ("aud", json!(["other"])),
        ("aud", json!([])),
        ("aud", json!("")),
        ("iss", json!("https://other.example")),
        ("iss", json!(["https://localhost"])),
        ("iss", json!("https://localhost/")),
        ("sub", json!("00000000-0000-4000-8000-000000000000")),
        ("client_id", json!("00000000-0000-4000-8000-000000000000")),
        ("jti", json!("1")),
        ("scope", json!(["system/DiagnosticReport.crds"])),
        ("admin", json!(true)),
    ];
    for (name, value) in changes {
        let token = target.signed(&target.header().to_string(), &with(&claims, name, value.clone()));
        target.refuses(&format!("{name} = {value}"), &token);
    }
    let later =
        claims.to_string().replace(&format!("\"exp\":{}", now + 900), &format!("\"exp\":{too_much}0"));
    target.refuses("exp beyond 64 bits", &target.signed(&target.header().to_string(), &later));
}

/// A good token, written in other ways.
fn forms(target: &Target) -> Vec<(&'static str, String)> {
    let (header, claims) = (target.header().to_string(), target.claims().to_string());
    let [first, second, third] = target.parts();
    let twice = |object: &str| format!("{},{}", &object[..object.len() - 1], &object[1..]);
    let deep =
        format!("{},\"deep\":{}{}}}", &claims[..claims.len() - 1], "[".repeat(1_000), "]".repeat(1_000));
    vec![
        ("a claim twice", target.signed(&header, &twice(&claims))),
        ("a header twice", target.signed(&twice(&header), &claims)),
        ("something after the claims", target.signed(&header, &format!("{claims}{{}}"))),
        ("something after the header", target.signed(&format!("{header}x"), &claims)),
        ("padding", format!("{first}.{second}.{third}==")),
        ("a space", format!(" {}", target.token)),
        ("a line end", format!("{}\n", target.token)),
        ("a fourth part", format!("{}.", target.token)),
        ("an encrypted one", format!("{first}..{second}.{third}.AAAA")),
        ("in standard Base64", target.token.replace('-', "+").replace('_', "/") + "+"),
        ("too long", "a".repeat(64 * 1_024)),
        ("too long and signed", target.signed(&header, &format!("{claims}{}", " ".repeat(64 * 1_024)))),
        ("empty", String::new()),
        ("dots", "..".into()),
        ("as long as it may be", target.signed(&header, &format!("{claims}{}", " ".repeat(2_600)))),
        ("deep", target.signed(&header, &deep)),
    ]
}

/// What is one token for us must not be another one for somebody else.
#[test]
fn there_is_one_way_to_write_a_token() {
    let target = Target::new();
    for (what, token) in forms(&target) {
        if what != "as long as it may be" {
            target.refuses(what, &token);
        }
    }
    // The last character carries two bits of the signature; the other four must be 0.
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (rest, last) = target.token.split_at(target.token.len() - 1);
    for other in alphabet.chars().filter(|other| !last.contains(*other)) {
        target.refuses("another last character", &format!("{rest}{other}"));
    }
}

/// Nobody keeps the processor busy with tokens that are none: the fastest of several looks counts, as the machine has
/// other work too.
#[test]
fn an_odd_token_costs_less_than_a_millisecond() {
    let target = Target::new();
    for (what, token) in forms(&target) {
        let looks = (0..20).map(|_| {
            let begun = std::time::Instant::now();
            let _ = target.tokens.prove(&token, &target.tokens.keys(), target.now);
            let _ = target.tokens.verify(&token, target.now);
            begun.elapsed()
        });
        let fastest = looks.min().unwrap();
        assert!(fastest < Duration::from_millis(1), "{what}: {fastest:?}");
    }
}

/// RFC 8032 §5.1.7: a signature's second half is below the order of the group, so that nobody makes a second one of it.
#[test]
fn a_signature_has_one_form() {
    let target = Target::new();
    let [header, claims, signature] = target.parts();
    let mut signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let mut carry = 0_u16;
    for (byte, add) in signature[32..].iter_mut().zip(ORDER) {
        let sum = u16::from(*byte) + u16::from(add) + carry;
        (*byte, carry) = (sum.to_le_bytes()[0], sum >> 8);
    }
    target.refuses("S + L", &format!("{header}.{claims}.{}", URL_SAFE_NO_PAD.encode(&signature)));
}

/// On every core, each a good token with one to three changes: none is taken, none panics. What the changes leave as it
/// was is none of the million.
#[test]
fn a_million_mutations_are_refused() {
    let given = std::env::var("DERMFLOW_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = given.unwrap_or_else(|| target_seed(&client()));
    println!("DERMFLOW_SEED={seed}");
    let target = Target::new();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let refused: usize = std::thread::scope(|scope| {
        let each = |thread| {
            let target = &target;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed + thread as u64);
                let mutated = std::iter::repeat_with(|| mutate(&target.token, &mut random));
                let changed = mutated.filter(|token| *token != target.token);
                let mut refused = 0;
                for (n, token) in (thread..MUTATIONS).step_by(threads).zip(changed) {
                    let taken = target.tokens.verify(&token, target.now).is_ok();
                    assert!(!taken, "DERMFLOW_SEED={seed}, {n}: {}", token.escape_debug());
                    refused += 1;
                }
                refused
            })
        };
        let threads: Vec<_> = (0..threads).map(each).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(refused, MUTATIONS);
}

fn target_seed(client: &ClientId) -> u64 {
    client.uuid().as_u64_pair().0
}

fn mutate(token: &str, random: &mut fastrand::Rng) -> String {
    let mut bytes = token.as_bytes().to_vec();
    for _ in 0..random.usize(1..=3) {
        let at = random.usize(..bytes.len());
        match random.u8(..6) {
            0 => bytes[at] ^= 1 << random.u8(..7),
            1 => bytes[at] = b'-',
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, *random.choice(b"AQgw09_-.=").unwrap_or(&b'.')),
            4 => bytes.swap(at, token.len() / 2),
            _ => {
                // What is in the part, changed, and encoded again.
                let mut parts: Vec<Vec<u8>> = bytes.split(|byte| *byte == b'.').map(<[u8]>::to_vec).collect();
                let n = random.usize(..parts.len());
                if let Ok(mut plain) = URL_SAFE_NO_PAD.decode(&parts[n])
                    && !plain.is_empty()
                {
                    let at = random.usize(..plain.len());
                    plain[at] ^= 1 << random.u8(..8);
                    parts[n] = URL_SAFE_NO_PAD.encode(plain).into_bytes();
                    bytes = parts.join(&b'.');
                }
            }
        }
    }
    // No change leaves ASCII.
    String::from_utf8(bytes).unwrap()
}
