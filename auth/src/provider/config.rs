//! The file of providers: TOML, read once at start.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use dermflow_schemas::{limits::MAX_PROVIDERS, process::read_secret};
use jsonwebtoken::Algorithm;
use secrecy::SecretString;
use serde::Deserialize;
use serde_json::Value;
use url::Url;

use crate::users::Role;

/// Claims that are checked by themselves and are neither a subject nor a role.
const CHECKED: [&str; 8] = ["iss", "aud", "exp", "iat", "nbf", "jti", "cnf", "active"];
/// Claims whose text is a list separated by spaces: RFC 8693 §4.2, and what one large provider calls the same.
const LISTS: [&str; 2] = ["scope", "scp"];

/// Why a file of providers is not taken.
#[derive(Debug, thiserror::Error)]
#[error("--providers {path}: {reason}")]
pub struct ProviderError {
    path: String,
    reason: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    provider: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    issuer: String,
    audience: String,
    jwks_url: Option<String>,
    #[serde(default)]
    algorithms: Vec<String>,
    #[serde(default)]
    token_type: TokenType,
    #[serde(default = "sub")]
    subject_claim: String,
    ca_file: Option<PathBuf>,
    introspection_url: Option<String>,
    client_id: Option<String>,
    client_secret_file: Option<PathBuf>,
    role: Vec<Rule>,
}

fn sub() -> String {
    "sub".into()
}

/// The `typ` that a provider gives its access tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub(super) enum TokenType {
    /// As RFC 9068 wants it.
    #[default]
    #[serde(rename = "at+jwt")]
    AccessToken,
    /// As most providers were before it; `at+jwt` is taken too.
    #[serde(rename = "JWT")]
    Jwt,
}

/// A claim with this value grants this role.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    claim: String,
    value: String,
    #[serde(deserialize_with = "role")]
    role: Role,
}

fn role<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Role, D::Error> {
    let role = Role::deserialize(deserializer)?;
    // Who registers others signs in to the registration service, with a certificate of ours.
    if role == Role::Administrator {
        return Err(serde::de::Error::custom("a provider grants no administrator"));
    }
    Ok(role)
}

/// Where a provider's keys are found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// At this URL.
    Keys(Url),
    /// At the URL that this document names (OpenID Connect Discovery 1.0 §4).
    Discovery(Url),
}

/// How a provider is asked about opaque tokens (RFC 7662).
#[derive(Debug)]
pub struct Introspection {
    /// Where.
    pub url: Url,
    /// Who we are there.
    pub client_id: String,
    /// What proves it.
    pub client_secret: SecretString,
}

/// A provider whose tokens are taken.
#[derive(Debug)]
pub struct Provider {
    /// `iss` of its tokens.
    pub issuer: String,
    /// Where its keys are; `None` when it gives opaque tokens only.
    pub keys: Option<Source>,
    /// How it is asked about opaque tokens.
    pub introspection: Option<Introspection>,
    /// The CA that its certificate is from (PEM); `None` for those that the system trusts.
    pub ca_file: Option<PathBuf>,
    /// What `aud` must have in it.
    pub(super) audience: String,
    /// Never a symmetric one.
    pub(super) algorithms: Vec<Algorithm>,
    pub(super) token_type: TokenType,
    subject_claim: String,
    rules: Vec<Rule>,
}

impl Provider {
    /// Who the token is about, by the claim that is configured.
    pub(super) fn subject<'a>(&self, claims: &'a Value) -> Option<&'a str> {
        let subject = lookup(claims, &self.subject_claim)?.as_str()?;
        (1..=255).contains(&subject.chars().count()).then_some(subject)
    }

    /// Every role that the claims grant.
    pub(super) fn roles(&self, claims: &Value) -> Vec<Role> {
        self.rules.iter().filter(|rule| rule.grants(claims)).map(|rule| rule.role).collect()
    }
}

impl Rule {
    /// A claim is a text, or a list of texts; nothing else is compared.
    fn grants(&self, claims: &Value) -> bool {
        match lookup(claims, &self.claim) {
            Some(Value::String(text)) if LISTS.contains(&self.claim.as_str()) => {
                text.split(' ').any(|one| one == self.value)
            }
            Some(Value::String(text)) => *text == self.value,
            Some(Value::Array(list)) => list.iter().any(|one| one.as_str() == Some(&self.value)),
            _ => false,
        }
    }
}

/// A claim by its name, or by a JSON pointer (RFC 6901) when it is inside another one.
fn lookup<'a>(claims: &'a Value, name: &str) -> Option<&'a Value> {
    if name.starts_with('/') { claims.pointer(name) } else { claims.get(name) }
}

/// Reads the providers of `path`, for a server whose own tokens are of `own_issuer`. Files that it names are looked for
/// beside it.
///
/// # Errors
/// One sentence when something cannot be read or would not be safe.
pub fn load(path: &Path, own_issuer: &str) -> Result<Vec<Provider>, ProviderError> {
    let bad = |reason: String| ProviderError { path: path.display().to_string(), reason };
    let text = fs::read_to_string(path).map_err(|error| bad(error.to_string()))?;
    let beside = path.parent().unwrap_or(Path::new(""));
    parse(&text, beside, own_issuer).map_err(bad)
}

fn parse(text: &str, beside: &Path, own_issuer: &str) -> Result<Vec<Provider>, String> {
    let file: File = toml::from_str(text).map_err(|error| error.to_string())?;
    if file.provider.len() > MAX_PROVIDERS {
        return Err(format!("more than {MAX_PROVIDERS} providers"));
    }
    let mut issuers = HashSet::from([own_issuer.to_owned()]);
    let mut providers = Vec::new();
    for entry in file.provider {
        let issuer = entry.issuer.clone();
        let bad = |reason: String| format!("{issuer}: {reason}");
        if !issuers.insert(issuer.clone()) {
            return Err(bad("named twice, or our own".into()));
        }
        providers.push(provider(entry, beside).map_err(bad)?);
    }
    // An opaque token does not tell whose it is, and is no business of the others.
    if providers.iter().filter(|provider| provider.introspection.is_some()).count() > 1 {
        return Err("more than one provider has an introspection_url".into());
    }
    Ok(providers)
}

fn provider(entry: Entry, beside: &Path) -> Result<Provider, String> {
    let issuer = url("issuer", &entry.issuer)?;
    if entry.audience.is_empty() {
        return Err("audience is empty".into());
    }
    if entry.role.is_empty() {
        return Err("without a role nothing is granted".into());
    }
    let claims = entry.role.iter().map(|rule| &rule.claim).chain([&entry.subject_claim]);
    for claim in claims {
        if claim.is_empty() || CHECKED.contains(&claim.as_str()) {
            return Err(format!("the claim {claim:?} is neither a subject nor a role"));
        }
    }
    let algorithms: Vec<Algorithm> =
        entry.algorithms.iter().map(|name| algorithm(name)).collect::<Result<_, _>>()?;
    let introspection = introspection(&entry, beside)?;
    if algorithms.is_empty() && introspection.is_none() {
        return Err("algorithms is empty".into());
    }
    let keys = match &entry.jwks_url {
        _ if algorithms.is_empty() => None,
        Some(given) => Some(Source::Keys(url("jwks_url", given)?)),
        None => Some(Source::Discovery(discovery(&issuer)?)),
    };
    Ok(Provider {
        issuer: entry.issuer,
        keys,
        introspection,
        ca_file: entry.ca_file.map(|file| beside.join(file)),
        audience: entry.audience,
        algorithms,
        token_type: entry.token_type,
        subject_claim: entry.subject_claim,
        rules: entry.role,
    })
}

/// Only signatures whose key we do not have ourselves: with a shared secret, who checks tokens could make them.
fn algorithm(name: &str) -> Result<Algorithm, String> {
    match name {
        "RS256" => Ok(Algorithm::RS256),
        "RS384" => Ok(Algorithm::RS384),
        "RS512" => Ok(Algorithm::RS512),
        "PS256" => Ok(Algorithm::PS256),
        "PS384" => Ok(Algorithm::PS384),
        "PS512" => Ok(Algorithm::PS512),
        "ES256" => Ok(Algorithm::ES256),
        "ES384" => Ok(Algorithm::ES384),
        "EdDSA" => Ok(Algorithm::EdDSA),
        _ => Err(format!("{name:?} is none of RS256 RS384 RS512 PS256 PS384 PS512 ES256 ES384 EdDSA")),
    }
}

/// A URL of HTTPS whose parts are all in plain sight.
pub(super) fn url(name: &str, text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("{name}: {error}"))?;
    let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
    if url.scheme() != "https" || url.host().is_none() || !plain {
        return Err(format!("{name} is not of the form https://host/path"));
    }
    Ok(url)
}

/// OpenID Connect Discovery 1.0 §4.1: behind the issuer's path.
fn discovery(issuer: &Url) -> Result<Url, String> {
    if issuer.query().is_some() {
        return Err("the issuer has a query: say jwks_url".into());
    }
    let base = issuer.as_str().trim_end_matches('/');
    url("issuer", &format!("{base}/.well-known/openid-configuration"))
}

fn introspection(entry: &Entry, beside: &Path) -> Result<Option<Introspection>, String> {
    match (&entry.introspection_url, &entry.client_id, &entry.client_secret_file) {
        (None, None, None) => Ok(None),
        (Some(address), Some(client_id), Some(file)) => Ok(Some(Introspection {
            url: url("introspection_url", address)?,
            client_id: client_id.clone(),
            client_secret: read_secret(&beside.join(file)).map_err(|error| error.to_string())?,
        })),
        _ => Err("introspection_url, client_id and client_secret_file go together".into()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    const OURS: &str = "https://dermflow.example";
    pub(in super::super) const GOOD: &str = r#"
[[provider]]
issuer = "https://login.example/realms/clinic"
audience = "https://dermflow.example"
algorithms = ["RS256", "ES256"]
[[provider.role]]
claim = "/realm_access/roles"
value = "dermflow-submit"
role = "integrator"
[[provider.role]]
claim = "scope"
value = "dermflow.audit"
role = "auditor"
"#;

    pub(in super::super) fn read(text: &str) -> Result<Vec<Provider>, String> {
        parse(text, Path::new("/nowhere"), OURS)
    }

    #[test]
    fn keys_are_discovered_unless_their_url_is_given() {
        let provider = &read(GOOD).unwrap()[0];
        let expected = "https://login.example/realms/clinic/.well-known/openid-configuration";
        assert_eq!(provider.keys, Some(Source::Discovery(Url::parse(expected).unwrap())));
        let given = GOOD.replacen("audience", "jwks_url = \"https://keys.example/set\"\naudience", 1);
        let expected = Some(Source::Keys(Url::parse("https://keys.example/set").unwrap()));
        assert_eq!(read(&given).unwrap()[0].keys, expected);
    }

    #[test]
    fn what_would_not_be_safe_is_refused() {
        let twice = format!("{GOOD}{GOOD}");
        let changed = |from: &str, to: &str| {
            assert!(GOOD.contains(from), "{from}");
            GOOD.replacen(from, to, 1)
        };
        let introspection =
            "introspection_url = \"https://login.example/introspect\"\nclient_id = \"a\"\naudience";
        let cases = [
            (twice.as_str(), "named twice"),
            (&changed("https://login.example/realms/clinic", OURS), "our own"),
            (&changed("https://login.example", "http://login.example"), "https"),
            (&changed("https://login.example", "https://a:b@login.example"), "https"),
            (&changed("\"RS256\"", "\"HS256\""), "HS256"),
            (&changed("\"RS256\"", "\"none\""), "none"),
            (&changed("\"RS256\"", "\"rs256\""), "rs256"),
            (&changed("\"RS256\", \"ES256\"", ""), "algorithms is empty"),
            (&changed("\"integrator\"", "\"administrator\""), "administrator"),
            (&changed("\"integrator\"", "\"root\""), "root"),
            (&changed("\"scope\"", "\"aud\""), "aud"),
            (&changed("https://dermflow.example", ""), "audience is empty"),
            (&changed("audience", "subject_claim = \"\"\naudience"), "subject"),
            (&changed("audience", "jwks_uri = \"https://x\"\naudience"), "jwks_uri"),
            (&changed("audience", "jwks_url = \"http://keys.example\"\naudience"), "jwks_url"),
            (&changed("audience", "token_type = \"any\"\naudience"), "any"),
            (&changed("audience", introspection), "go together"),
            ("", "provider"),
        ];
        for (text, why) in cases {
            let error = read(text).expect_err(why);
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn one_provider_is_asked_about_opaque_tokens() {
        let folder = std::env::temp_dir().join(format!("dermflow-provider-{}", uuid::Uuid::new_v4()));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("secret"), "s3cret\n").unwrap();
        let with = GOOD.replacen(
            "audience",
            "introspection_url = \"https://login.example/introspect\"\nclient_id = \"a\"\n\
             client_secret_file = \"secret\"\naudience",
            1,
        );
        let one = parse(&with, &folder, OURS).unwrap();
        assert!(!format!("{one:?}").contains("s3cret"));
        let opaque_only = with.replacen("\"RS256\", \"ES256\"", "", 1);
        assert_eq!(parse(&opaque_only, &folder, OURS).unwrap()[0].keys, None, "it needs no keys");
        let two = format!("{with}{}", with.replace("realms/clinic", "realms/other"));
        assert!(parse(&two, &folder, OURS).unwrap_err().contains("more than one"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn roles_come_from_claims_that_are_texts_or_lists() {
        let provider = &read(GOOD).unwrap()[0];
        let cases = [
            (json!({"realm_access": {"roles": ["x", "dermflow-submit"]}}), vec![Role::Integrator]),
            (json!({"realm_access": {"roles": "dermflow-submit"}}), vec![Role::Integrator]),
            (json!({"scope": "openid dermflow.audit"}), vec![Role::Auditor]),
            (
                json!({"scope": ["dermflow.audit"], "realm_access": {"roles": ["dermflow-submit"]}}),
                vec![Role::Integrator, Role::Auditor],
            ),
            (json!({"realm_access": {"roles": "x dermflow-submit"}}), vec![]),
            (json!({"realm_access": {"roles": {"dermflow-submit": true}}}), vec![]),
            (json!({"realm_access": true, "scope": "dermflow.auditor"}), vec![]),
            (json!({}), vec![]),
        ];
        for (claims, roles) in cases {
            assert_eq!(provider.roles(&claims), roles, "{claims}");
        }
    }

    #[test]
    fn a_subject_is_a_text_of_the_claim_that_is_configured() {
        let provider = &read(GOOD).unwrap()[0];
        assert_eq!(provider.subject(&json!({"sub": "a", "azp": "b"})), Some("a"));
        for bad in
            [json!({"azp": "b"}), json!({"sub": 7}), json!({"sub": ""}), json!({"sub": "x".repeat(256)})]
        {
            assert_eq!(provider.subject(&bad), None, "{bad}");
        }
        let other = GOOD.replacen("audience", "subject_claim = \"azp\"\naudience", 1);
        assert_eq!(read(&other).unwrap()[0].subject(&json!({"sub": "a", "azp": "b"})), Some("b"));
    }
}
