//! Who may call which route: a row for every one that `ingress` has, and none more. Each describes how it answers.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use dermflow_tests::{
    client::{Answer, Client, sample, sample_bytes, send},
    lab::{Lab, Setup},
};
use reqwest::Method;
use serde_json::{Value, json};

/// What a route is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Object {
    Nothing,
    /// One of the caller's own.
    Job,
    Batch,
    /// Nobody's own.
    Event,
    DeadLetter,
    /// Everybody's.
    Definition(&'static str),
}

/// Whom a route wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Everybody.
    Open,
    /// Whoever proves itself in the form; one that proves nothing is answered with this status.
    Form(u16),
    /// A client whose scope has this letter (SMART App Launch 2.2).
    Client(char),
    /// An auditor whose scope has this letter.
    Auditor(char),
    Operator,
}

use Object::{Batch, DeadLetter, Definition, Event, Job, Nothing};
use Rule::{Auditor, Client as May, Form, Open, Operator};

const ROUTES: [(&str, &str, Rule, Object); 50] = [
    ("POST", "/login", Form(422), Nothing),
    ("POST", "/oauth/token", Form(400), Nothing),
    ("POST", "/oauth/revoke", Form(401), Nothing),
    ("POST", "/oauth/introspect", Form(401), Nothing),
    ("GET", "/.well-known/jwks.json", Open, Nothing),
    ("GET", "/.well-known/oauth-authorization-server", Open, Nothing),
    ("GET", "/fhir/.well-known/smart-configuration", Open, Nothing),
    ("GET", "/openapi.json", Open, Nothing),
    ("GET", "/fhir/metadata", Open, Nothing),
    ("GET", "/fhir/OperationDefinition", Open, Nothing),
    ("GET", "/fhir/OperationDefinition/{id}", Open, Definition("analyze")),
    ("GET", "/fhir/CodeSystem", Open, Nothing),
    ("GET", "/fhir/CodeSystem/{id}", Open, Definition("skin-image-analysis")),
    ("GET", "/fhir/ValueSet", Open, Nothing),
    ("GET", "/fhir/ValueSet/{id}", Open, Definition("conditions")),
    ("GET", "/fhir/ConceptMap", Open, Nothing),
    ("GET", "/fhir/ConceptMap/{id}", Open, Definition("conditions-icd-11")),
    ("POST", "/fhir/DiagnosticReport/$analyze", May('c'), Nothing),
    ("GET", "/fhir/DiagnosticReport/{id}", May('r'), Job),
    ("DELETE", "/fhir/DiagnosticReport/{id}", May('d'), Job),
    ("GET", "/fhir/DiagnosticReport", May('s'), Nothing),
    ("POST", "/fhir/DiagnosticReport/_search", May('s'), Nothing),
    ("GET", "/fhir/Observation/{id}", May('r'), Job),
    ("GET", "/fhir/Media/{id}", May('r'), Job),
    ("GET", "/fhir/Device/{id}", May('r'), Job),
    ("GET", "/fhir/Provenance/{id}", May('r'), Job),
    ("GET", "/fhir/Provenance", May('s'), Nothing),
    ("GET", "/fhir/_async/{id}", May('r'), Job),
    ("DELETE", "/fhir/_async/{id}", May('d'), Job),
    ("POST", "/fhir", May('c'), Nothing),
    ("GET", "/fhir/Task", May('s'), Nothing),
    ("GET", "/fhir/Task/{id}", May('r'), Job),
    ("GET", "/fhir/AuditEvent", Auditor('s'), Nothing),
    ("GET", "/fhir/AuditEvent/{id}", Auditor('r'), Event),
    ("GET", "/fhir/_bulk/{id}", May('r'), Batch),
    ("POST", "/batches", May('c'), Nothing),
    ("GET", "/batches/{id}", May('r'), Batch),
    ("POST", "/batches/{id}", May('c'), Batch),
    ("DELETE", "/batches/{id}", May('d'), Batch),
    ("GET", "/batches/{id}/results", May('r'), Batch),
    ("GET", "/batches/{id}/errors", May('r'), Batch),
    ("GET", "/jobs", May('s'), Nothing),
    ("GET", "/jobs/{id}", May('r'), Job),
    // On the internal listener, which is on this machine only.
    ("GET", "/livez", Open, Nothing),
    ("GET", "/readyz", Open, Nothing),
    ("GET", "/metrics", Open, Nothing),
    // In the operators' process.
    ("GET", "/dead", Operator, Nothing),
    ("GET", "/dead/{sequence}", Operator, DeadLetter),
    ("DELETE", "/dead/{sequence}", Operator, DeadLetter),
    ("POST", "/dead/{sequence}/requeue", Operator, DeadLetter),
];

/// Those of the device API, which are there under `/v1.0` too.
const DEVICE: [(&str, &str, Rule, Object); 15] = [
    ("POST", "/auth/login", Form(422), Nothing),
    ("POST", "/diagnosis-support", May('c'), Nothing),
    ("POST", "/clinical/diagnosis-support", May('c'), Nothing),
    ("POST", "/severity-assessment/manual", May('c'), Nothing),
    ("POST", "/clinical/severity-assessment/manual", May('c'), Nothing),
    ("POST", "/severity-assessment/automatic/local", May('c'), Nothing),
    ("POST", "/clinical/severity-assessment/automatic/local", May('c'), Nothing),
    ("POST", "/severity-assessment/automatic/global", May('c'), Nothing),
    ("POST", "/clinical/severity-assessment/automatic/global", May('c'), Nothing),
    ("GET", "/device-information", May('c'), Nothing),
    ("GET", "/device/about", May('c'), Nothing),
    ("GET", "/device/health", Open, Nothing),
    ("GET", "/body-sites", Open, Nothing),
    ("GET", "/clinical-signs", Open, Nothing),
    ("GET", "/questionnaires", Open, Nothing),
];

/// A row for every path.
fn rows() -> Vec<(&'static str, String, Rule, Object)> {
    let row = |root: &str, (method, path, rule, object): (&'static str, &str, Rule, Object)| {
        (method, format!("{root}{path}"), rule, object)
    };
    let versioned = DEVICE.into_iter().chain([("POST", "/login", Form(422), Nothing)]);
    let rows = ROUTES.into_iter().chain(DEVICE).map(|each| row("", each));
    rows.chain(versioned.map(|each| row("/v1.0", each))).collect()
}

/// Operations by method and path.
struct Described {
    operations: BTreeMap<(String, String), Value>,
    /// The paths of the internal listener alone.
    internal: BTreeSet<String>,
}

impl Described {
    /// What clients, operators and who runs the service are told. The document itself stands in each.
    async fn read(lab: &Lab, callers: &Callers) -> Result<Self> {
        let (mut operations, mut internal) = (BTreeMap::new(), BTreeSet::new());
        let (operate, this_machine) = (callers.operate.clone(), lab.internal_url(0));
        for base in [&this_machine, &lab.url(0), &operate] {
            let document = callers.client.clone().with_token("").at(base).get("/openapi.json").await?.body;
            assert_eq!(document["openapi"], "3.1.0");
            for (path, item) in document["paths"].as_object().context("no paths")? {
                for (method, operation) in item.as_object().context("no operations")? {
                    operations.insert((method.to_uppercase(), path.clone()), operation.clone());
                    if *base == this_machine {
                        internal.insert(path.clone());
                    } else {
                        internal.remove(path);
                    }
                }
            }
        }
        Ok(Self { operations, internal })
    }

    fn routes(&self) -> BTreeSet<(String, String)> {
        self.operations.keys().cloned().collect()
    }

    /// Fails when the answer has a status, or a form, that its route does not describe.
    fn check(&self, method: &str, path: &str, answer: &Answer) {
        let operation = &self.operations[&(method.to_owned(), path.to_owned())];
        let response = &operation["responses"][answer.status.to_string()];
        let kind = answer.header("content-type").split(';').next().unwrap_or_default();
        assert!(response.is_object(), "{method} {path} {} is not described", answer.status);
        let is_described = answer.text.is_empty() || response["content"][kind].is_object();
        assert!(is_described, "{method} {path} {} {kind} is not described", answer.status);
    }
}

/// Whoever calls.
struct Callers {
    client: Client,
    stranger: Client,
    auditor: Client,
    operator: Client,
    /// The auditor's.
    password: String,
    operate: String,
    secret: [String; 2],
}

impl Callers {
    async fn new(lab: &mut Lab) -> Result<Self> {
        let password = lab.auth(&["user", "create", "ada", "--role", "auditor"])?;
        let auditor = Client::new(&lab.ca(), &lab.url(0))?.login("ada", &password).await?;
        let operator = lab.start_operate("olga").await?;
        let added: Value =
            serde_json::from_str(&lab.auth(&["credential", "add", "demo", "--label", "test"])?)?;
        let text = |name: &str| added[name].as_str().unwrap_or_default().to_owned();
        Ok(Self {
            client: lab.client().clone(),
            stranger: lab.register("stranger").await?,
            auditor,
            password,
            operator,
            operate: lab.operate_url()?,
            secret: [text("client_id"), text("client_secret")],
        })
    }

    /// The client with everything but this letter in its scope.
    async fn without(&self, letter: char) -> Result<Client> {
        let letters: String = "crds".chars().filter(|other| *other != letter).collect();
        let [id, secret] = &self.secret;
        let form = [
            ("grant_type", "client_credentials"),
            ("client_id", id),
            ("client_secret", secret),
            ("scope", &format!("system/DiagnosticReport.{letters}")),
        ];
        let token =
            send(self.client.clone().with_token("").request(Method::POST, "/oauth/token").form(&form))
                .await?;
        Ok(self.client.clone().with_token(token.body["access_token"].as_str().context("no token")?))
    }

    /// The auditor with everything but this letter in its scope.
    async fn auditor_without(&self, letter: char) -> Result<Client> {
        let letters: String = "rs".chars().filter(|other| *other != letter).collect();
        let scope = format!("system/AuditEvent.{letters}");
        let form = [("username", "ada"), ("password", &self.password), ("scope", &scope)];
        let anonymous = self.auditor.clone().with_token("");
        let token = send(anonymous.request(Method::POST, "/login").form(&form)).await?;
        Ok(self.auditor.clone().with_token(token.body["access_token"].as_str().context("no token")?))
    }
}

async fn call(client: &Client, method: &str, path: &str) -> Result<Answer> {
    let request = client.request(method.parse()?, path);
    // What is refused is refused before anybody looks at the body.
    let request = if method == "POST" {
        request.header("content-type", "application/x-ndjson").body("{}\n")
    } else {
        request
    };
    send(request).await
}

async fn batch(client: &Client) -> Result<String> {
    let data = STANDARD.encode(sample_bytes("ham10000-nv.jpg"));
    let line = json!({"custom_id": "a", "images": [{"data": data}]}).to_string() + "\n";
    let request = client.request(Method::POST, "/batches").header("content-type", "application/x-ndjson");
    let answer = send(request.body(line)).await?;
    let first: Value = serde_json::from_str(answer.text.lines().next().unwrap_or_default())?;
    Ok(first["batch"].as_str().context("no batch")?.to_owned())
}

/// Reached without a token, and with one that is none; those of the internal listener there only.
async fn opens(lab: &Lab, described: &Described, client: &Client, path: &str) -> Result<()> {
    let is_internal = described.internal.contains(path);
    let base = if is_internal { lab.internal_url(0) } else { lab.url(0) };
    for token in ["", "nonsense"] {
        let client = client.clone().with_token(token);
        let answer = client.clone().at(&base).get(path).await?;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text);
        if is_internal {
            described.check("GET", path, &answer);
            assert_eq!(client.get(path).await?.status, 404, "{path} is not for clients");
        }
        if path == "/fhir/.well-known/smart-configuration" {
            is_smart(&answer.body, &base)?;
        }
    }
    Ok(())
}

/// What SMART App Launch 2.2 requires of the document ("Metadata"), and what its backend services go by.
fn is_smart(document: &Value, base: &str) -> Result<()> {
    let has = |member: &str, value: &str| {
        let list = document[member].as_array().map(Vec::as_slice).unwrap_or_default();
        ensure!(list.contains(&json!(value)), "{value} is not in {member}: {document}");
        Ok(())
    };
    has("grant_types_supported", "client_credentials")?;
    has("capabilities", "client-confidential-asymmetric")?;
    has("capabilities", "permission-v2")?;
    has("token_endpoint_auth_methods_supported", "private_key_jwt")?;
    has("token_endpoint_auth_signing_alg_values_supported", "ES384")?;
    has("token_endpoint_auth_signing_alg_values_supported", "RS384")?;
    has("scopes_supported", "system/DiagnosticReport.crds")?;
    ensure!(document["code_challenge_methods_supported"].is_array(), "{document}");
    assert_eq!(document["token_endpoint"], format!("{base}/oauth/token"));
    assert_eq!(document["jwks_uri"], format!("{base}/.well-known/jwks.json"));
    Ok(())
}

// SRS-004, I5: each route with no token, with tokens that are none, with another role's, with a scope that lacks one
// letter, and about what is another client's, which answers as what does not exist.
#[tokio::test(flavor = "multi_thread")]
async fn every_route_keeps_to_its_rule() -> Result<()> {
    let mut lab = Lab::start(Setup::without_workers()).await?;
    let callers = Callers::new(&mut lab).await?;
    let (job, batch) =
        (callers.client.submit(&sample("ham10000-nv.jpg")).await?, batch(&callers.client).await?);
    let missing = "0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f";
    let described = Described::read(&lab, &callers).await?;
    let routes = rows().into_iter().map(|(method, path, ..)| (method.to_owned(), path));
    assert_eq!(routes.collect::<BTreeSet<_>>(), described.routes());
    assert_eq!(described.internal.len(), 3, "{:?}", described.internal);
    for (method, path, rule, object) in rows() {
        let path = path.as_str();
        let id = match object {
            Nothing => "",
            Job => &job,
            Batch => &batch,
            Event => "1",
            DeadLetter => "4711",
            Definition(id) => id,
        };
        let with = |id: &str| path.replace("{id}", id).replace("{sequence}", id);
        let (right, wrong) = match rule {
            Open => {
                opens(&lab, &described, &callers.client, &with(id)).await?;
                continue;
            }
            Form(status) => {
                // Who holds a token has proved itself to those two: they miss the rest of the form.
                let holder = if status == 401 { 400 } else { status };
                for (token, status) in [("", status), ("nonsense", status), (callers.client.token(), holder)]
                {
                    let client = callers.client.clone().with_token(token);
                    let answer = send(client.request(Method::POST, path).form(&[("a", "b")])).await?;
                    assert_eq!(answer.status, status, "{path} {token}: {}", answer.text);
                    described.check(method, path, &answer);
                }
                continue;
            }
            May(letter) => (
                callers.client.clone(),
                vec![callers.without(letter).await?, callers.auditor.clone(), callers.operator.clone()],
            ),
            Auditor(letter) => (
                callers.auditor.clone(),
                vec![
                    callers.auditor_without(letter).await?,
                    callers.client.clone(),
                    callers.operator.clone(),
                ],
            ),
            Operator => (callers.operator.clone(), vec![callers.client.clone(), callers.auditor.clone()]),
        };
        let base = if rule == Operator { callers.operate.clone() } else { lab.url(0) };
        let right = right.at(&base);
        let mut refusals = BTreeSet::new();
        for token in ["", "nonsense", &format!("{}x", &right.token()[..right.token().len() - 1])] {
            let answer = call(&right.clone().with_token(token), method, &with(id)).await?;
            assert_eq!((answer.status, answer.code()), (401, "unauthenticated"), "{method} {path} {token}");
            ensure!(answer.header("www-authenticate").starts_with("Bearer"));
            described.check(method, path, &answer);
            refusals.insert(answer.text);
        }
        assert_eq!(refusals.len(), 1, "{method} {path}: {refusals:?}");
        let anonymous = right.clone().with_token("");
        let basic = anonymous
            .request(method.parse()?, &with(id))
            .header("authorization", format!("Basic {}", right.token()));
        assert_eq!(send(basic).await?.status, 401, "{method} {path}");
        let in_url =
            call(&anonymous, method, &format!("{}?access_token={}", with(id), right.token())).await?;
        assert_eq!(in_url.status, 401, "{method} {path}");
        let twice = right
            .request(method.parse()?, &with(id))
            .header("authorization", format!("Bearer {}", right.token()));
        assert_eq!(send(twice).await?.status, 401, "two tokens at {method} {path}");
        for wrong in wrong {
            let answer = call(&wrong.at(&base), method, &with(id)).await?;
            assert_eq!((answer.status, answer.code()), (403, "forbidden"), "{method} {path}");
            described.check(method, path, &answer);
        }
        if matches!(object, Job | Batch) {
            let stranger = &callers.stranger;
            let theirs = call(stranger, method, &with(id)).await?;
            let nothing = call(stranger, method, &with(missing)).await?;
            let nonsense = call(stranger, method, &with("..%2f")).await?;
            assert_eq!((theirs.status, nothing.status, nonsense.status), (404, 404, 404), "{method} {path}");
            assert_eq!(theirs.text.replace(id, missing), nothing.text, "{method} {path}");
            described.check(method, path, &theirs);
        }
        // Nobody is kept out who may come in; what is removed comes last.
        if method != "DELETE" {
            let answer = call(&right, method, &with(id)).await?;
            ensure!(![401, 403].contains(&answer.status), "{method} {path}: {}", answer.text);
            described.check(method, path, &answer);
        }
    }
    assert_eq!(callers.client.get(&format!("/jobs/{job}")).await?.body["status"], "queued");
    let removed = callers.client.delete(&format!("/batches/{batch}")).await?;
    assert_eq!(removed.status, 202);
    lab.stop().await
}
