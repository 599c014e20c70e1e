//! The registration service: what staff does there, and everybody whom it refuses.

use std::{collections::BTreeSet, fs, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use dermflow_local::{
    pki::{self, Pki},
    stack::programs,
    state::State,
};
use dermflow_tests::{
    client::{Answer, Client, send},
    lab::{Lab, Setup},
    wait::eventually,
};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

/// How soon a refused attempt is in the trail, and the metric has risen.
const SOON: Duration = Duration::from_secs(5);

/// Whom a route wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Whoever has a certificate of staff.
    Open,
    /// With a session.
    Reader,
    /// With a session of an administrator.
    Registrar,
}

use Rule::{Open, Reader, Registrar};

const ROUTES: [(&str, &str, Rule); 15] = [
    ("POST", "/sessions", Open),
    ("DELETE", "/sessions", Reader),
    ("GET", "/accounts", Reader),
    ("POST", "/accounts", Registrar),
    ("GET", "/accounts/{account}", Reader),
    ("PATCH", "/accounts/{account}", Registrar),
    ("DELETE", "/accounts/{account}", Registrar),
    ("POST", "/accounts/{account}/password", Registrar),
    ("POST", "/accounts/{account}/revoke", Registrar),
    ("POST", "/accounts/{account}/credentials", Registrar),
    ("POST", "/accounts/{account}/credentials/rotate", Registrar),
    ("DELETE", "/accounts/{account}/credentials/{credential}", Registrar),
    ("POST", "/accounts/{account}/identities", Registrar),
    ("DELETE", "/accounts/{account}/identities", Registrar),
    ("GET", "/openapi.json", Reader),
];

async fn call(client: &Client, method: Method, path: &str, body: &Value) -> Result<Answer> {
    let request = client.request(method, path);
    send(if body.is_null() { request } else { request.json(body) }).await
}

async fn post(client: &Client, path: &str, body: &Value) -> Result<Answer> {
    call(client, Method::POST, path, body).await
}

async fn patch(client: &Client, path: &str, body: &Value) -> Result<Answer> {
    call(client, Method::PATCH, path, body).await
}

async fn try_sign_in(client: &Client, name: &str, password: &str) -> Result<Answer> {
    post(client, "/sessions", &json!({"username": name, "password": password})).await
}

async fn sign_in(client: Client, name: &str, password: &str) -> Result<Client> {
    let answer = try_sign_in(&client, name, password).await?;
    ensure!(answer.status == 201, "{} {}", answer.status, answer.text);
    Ok(client.with_token(answer.body["session"].as_str().context("no session")?))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A running service, with its first administrator.
struct Office {
    lab: Lab,
    password: String,
}

impl Office {
    async fn open() -> Result<Self> {
        let mut lab = Lab::start(Setup::without_workers()).await?;
        lab.start_registration().await?;
        let password = lab.auth(&["bootstrap", "root"])?;
        Ok(Self { lab, password })
    }

    /// The administrator, signed in.
    async fn administrator(&self) -> Result<Client> {
        sign_in(self.lab.staff("root")?, "root", &self.password).await
    }

    /// A member of staff of this role, with a certificate of its own, signed in.
    async fn member(&self, name: &str, role: &str) -> Result<Client> {
        let password = self.lab.auth(&["user", "create", name, "--role", role])?;
        sign_in(self.lab.staff(name)?, name, &password).await
    }

    /// A client of health and metrics.
    fn health(&self) -> Result<Client> {
        Client::new(&self.lab.ca(), &self.lab.registration_internal_url()?)
    }

    /// Refused attempts that were counted for this reason.
    async fn counted(&self, code: &str) -> Result<f64> {
        let text = self.health()?.get("/metrics").await?.text;
        let name = format!("dermflow_staff_refused_total{{reason=\"{code}\"}}");
        text.lines()
            .find_map(|line| line.strip_prefix(&name)?.trim().parse().ok())
            .with_context(|| format!("{name} is not there from the start"))
    }

    /// Refused attempts from this machine in the trail, of this kind and for this reason.
    async fn recorded(&self, action: &str, code: &str) -> Result<i64> {
        let query = format!(
            "SELECT count(*) FROM auth.audit WHERE outcome = 'refused' AND action = '{action}' \
             AND code = '{code}' AND source = '127.0.0.1'"
        );
        self.lab.count(&query).await
    }

    /// Sends a request of the administrator that comes to nothing: it is one event in the trail, with its code.
    async fn is_in_vain(&self, request: RequestBuilder, status: u16, code: &str) -> Result<()> {
        let (id, case) = (uuid::Uuid::new_v4().to_string(), format!("{request:?} {code}"));
        let answer = send(request.header("x-request-id", &id)).await?;
        assert_eq!((answer.status, answer.code()), (status, code), "{case}");
        assert!(answer.header("content-type").starts_with("application/problem+json"), "{case}");
        let events = format!("SELECT count(*) FROM auth.audit WHERE request = '{id}'");
        let right = format!(
            "{events} AND outcome <> 'success' AND code = '{code}' \
             AND actor = (SELECT id::text FROM auth.users WHERE username = 'root')"
        );
        let recorded = (self.lab.count(&events).await?, self.lab.count(&right).await?);
        assert_eq!(recorded, (1, 1), "{case}");
        Ok(())
    }

    /// Makes an attempt that must raise the metric, and the number of events in the trail, by one.
    async fn refuses(
        &self,
        action: &str,
        code: &str,
        attempt: impl AsyncFnOnce() -> Result<()>,
    ) -> Result<()> {
        let before = (self.counted(code).await?, self.recorded(action, code).await?);
        attempt().await.with_context(|| format!("{action} {code}"))?;
        let risen = async || {
            let now = (self.counted(code).await.ok()?, self.recorded(action, code).await.ok()?);
            (now == (before.0 + 1.0, before.1 + 1)).then_some(())
        };
        eventually(&format!("{code} is counted and recorded once"), SOON, risen).await
    }
}

// Create, list, read, change, disable, enable, credentials, password, sessions, delete: all over HTTPS, and each in the
// trail as the administrator's act.
#[tokio::test(flavor = "multi_thread")]
async fn staff_does_everything_to_accounts() -> Result<()> {
    let office = Office::open().await?;
    let root = office.administrator().await?;
    let lab = &office.lab;
    let new = json!({"name": "clinic", "contact": "it@clinic.example", "expires_at": "2999-01-01T00:00:00Z"});
    let created = post(&root, "/accounts", &new).await?;
    assert_eq!(created.status, 201, "{}", created.text);
    let (id, password) = (text(&created.body["id"]), text(&created.body["password"]));
    assert_eq!(created.header("location"), format!("/accounts/{id}"));
    let again = post(&root, "/accounts", &new).await?;
    assert_eq!((again.status, again.code()), (409, "account-exists"));
    let clinic = Client::new(&lab.ca(), &lab.url(0))?;
    let clinic = clinic.login("clinic", &password).await?;
    assert_eq!(clinic.get("/jobs").await?.status, 200);

    let shown = root.get(&format!("/accounts/{id}")).await?;
    assert_eq!(shown.status, 200);
    assert_eq!((&shown.body["role"], &shown.body["state"]), (&json!("integrator"), &json!("active")));
    assert_eq!(root.get("/accounts/clinic").await?.body, shown.body, "by its name");

    let change = json!({"contact": "ops@clinic.example", "expires_at": null,
        "quota": {"jobs": 7, "weight": 3, "requests": 600, "images": 60}});
    assert_eq!(patch(&root, "/accounts/clinic", &change).await?.status, 204);
    let changed = root.get("/accounts/clinic").await?.body;
    assert_eq!((&changed["contact"], &changed["expires_at"]), (&json!("ops@clinic.example"), &Value::Null));
    let quota = &changed["quota"];
    assert_eq!([&quota["jobs"], &quota["weight"], &quota["requests"], &quota["images"]], [7, 3, 600, 60]);
    assert_eq!(&quota["bytes"], &shown.body["quota"]["bytes"], "what was left out stays");
    assert_eq!(patch(&root, "/accounts/clinic", &json!({"contact": null})).await?.status, 204);
    assert_eq!(root.get("/accounts/clinic").await?.body["contact"], Value::Null);
    let back = json!({"quota": {"jobs": null, "images": 70}});
    assert_eq!(patch(&root, "/accounts/clinic", &back).await?.status, 204);
    let quota = &root.get("/accounts/clinic").await?.body["quota"];
    assert_eq!([&quota["weight"], &quota["requests"], &quota["images"]], [3, 600, 70]);
    let usual = &shown.body["quota"];
    assert_eq!(quota["jobs"], usual["jobs"], "null takes the number away");
    assert_eq!(patch(&root, "/accounts/clinic", &json!({"quota": null})).await?.status, 204);
    assert_eq!(root.get("/accounts/clinic").await?.body["quota"], *usual, "and all of them");

    assert_eq!(patch(&root, "/accounts/clinic", &json!({"disabled": true})).await?.status, 204);
    let shut_out = async || (clinic.get("/jobs").await.ok()?.status == 401).then_some(());
    eventually("a disabled client is refused", Duration::from_secs(1), shut_out).await?;
    assert_eq!(patch(&root, "/accounts/clinic", &json!({"disabled": false})).await?.status, 204);

    let given = credentials(&root, "/accounts/clinic").await?;
    assert_eq!(given, 3, "of four one was removed");
    identities(&root, "/accounts/clinic").await?;
    let set = post(&root, "/accounts/clinic/password", &Value::Null).await?;
    let clinic = clinic.login("clinic", &text(&set.body["password"])).await?;
    assert_eq!(clinic.try_login("clinic", &password).await?.status, 401, "the old password");
    let weak = json!({"password": "clinicclinicclinic"});
    let weak = post(&root, "/accounts/clinic/password", &weak).await?;
    assert_eq!((weak.status, weak.code()), (422, "password-refused"));
    let chosen = "Zwölf grüne Kacheln am Ofen";
    let set = post(&root, "/accounts/clinic/password", &json!({"password": chosen})).await?;
    assert_eq!((set.status, set.text.as_str()), (204, ""));
    let clinic = clinic.login("clinic", chosen).await?;
    assert_eq!(post(&root, "/accounts/clinic/revoke", &Value::Null).await?.status, 204);
    let ended = async || (clinic.get("/jobs").await.ok()?.status == 401).then_some(());
    eventually("everything that the client was given is ended", Duration::from_secs(1), ended).await?;

    assert_eq!(root.delete("/accounts/clinic").await?.status, 204);
    assert_eq!(root.get("/accounts/clinic").await?.status, 404);
    assert_eq!(root.get(&format!("/accounts/{id}")).await?.body["state"], "deleted");
    let acts = "SELECT string_agg(DISTINCT action, ' ' ORDER BY action) FROM auth.audit JOIN auth.users ON \
                actor = users.id::text WHERE username = 'root' AND outcome = 'success' AND source = '127.0.0.1' \
                AND request IS NOT NULL";
    let acts: String = lab.sql(acts).await?[0].get(0);
    assert_eq!(
        acts,
        "account-read credential-added credential-removed login password-set sessions-revoked user-changed \
         user-created user-deleted user-disabled user-enabled"
            .replace("login", "identity-linked identity-unlinked login")
    );
    let failed = "SELECT count(*) FROM auth.audit WHERE outcome = 'failed' AND \
                  (action, code) IN (('user-created', 'account-exists'), ('password-set', 'password-refused'), \
                  ('account-read', 'not-found'))";
    assert_eq!(lab.count(failed).await?, 3, "what was tried in vain is recorded too");
    office.lab.stop().await
}

/// Adds a secret and a key, rotates, and removes the key's sibling. Returns how many there are in the end.
async fn credentials(root: &Client, account: &str) -> Result<usize> {
    let path = format!("{account}/credentials");
    let secret = post(root, &path, &json!({"label": "first"})).await?;
    assert_eq!(secret.status, 201, "{}", secret.text);
    assert!(text(&secret.body["client_secret"]).starts_with("dfc_"));
    let x = "A".repeat(64);
    let private =
        json!({"label": "key", "jwk": {"kty": "EC", "crv": "P-384", "kid": "k", "x": x, "y": x, "d": x}});
    let refused = post(root, &path, &private).await?;
    assert_eq!((refused.status, refused.code()), (422, "value-invalid"));
    assert_eq!(refused.body["errors"][0]["field"], "jwk");
    let jwk = json!({"kty": "RSA", "kid": "k1", "e": "AQAB", "n": "w".repeat(512)});
    let key = post(root, &path, &json!({"label": "key", "jwk": jwk})).await?;
    assert_eq!((key.status, &key.body["client_secret"]), (201, &Value::Null), "{}", key.text);
    let rotated = post(root, &format!("{path}/rotate"), &json!({"overlap_days": 2})).await?;
    assert_eq!(rotated.status, 201);
    let usual = post(root, &format!("{path}/rotate"), &Value::Null).await?;
    assert_eq!(usual.status, 201, "{}", usual.text);
    let listed = root.get(account).await?.body;
    let listed = listed["credentials"].as_array().context("no credentials")?;
    let old = listed.iter().find(|one| one["id"] == secret.body["credential"]).context("the first secret")?;
    assert!(old["expires_at"].is_string(), "it ends with the overlap: {old}");
    let removed = root.delete(&format!("{path}/{}", text(&secret.body["credential"]))).await?;
    assert_eq!(removed.status, 204);
    let again = root.delete(&format!("{path}/{}", text(&secret.body["credential"]))).await?;
    assert_eq!((again.status, again.code()), (404, "not-found"));
    let left = root.get(account).await?.body;
    Ok(left["credentials"].as_array().map_or(0, Vec::len))
}

/// Links a subject of a provider, twice, and unlinks it, twice.
async fn identities(root: &Client, account: &str) -> Result<()> {
    let path = format!("{account}/identities");
    let identity = json!({"issuer": "https://login.clinic.example", "subject": "device 7"});
    let linked = post(root, &path, &identity).await?;
    assert_eq!(linked.status, 204, "{}", linked.text);
    let again = post(root, &path, &identity).await?;
    assert_eq!((again.status, again.code()), (409, "subject-linked"));
    let plain = post(root, &path, &json!({"issuer": "http://login.clinic.example", "subject": "7"})).await?;
    assert_eq!((plain.status, plain.code()), (422, "value-invalid"));
    assert_eq!(root.get(account).await?.body["external_identities"], json!([identity]));
    let unlink = format!("{path}?issuer=https%3A%2F%2Flogin.clinic.example&subject=device%207");
    assert_eq!(root.delete(&unlink).await?.status, 204);
    assert_eq!(root.delete(&unlink).await?.status, 404);
    assert_eq!(root.get(account).await?.body["external_identities"], json!([]));
    Ok(())
}

// Pages, filters, and what is malformed: every answer is a 4xx with a code, each is one event in the trail, and nothing
// has changed.
#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_listed_in_pages_and_what_is_malformed_changes_nothing() -> Result<()> {
    let office = Office::open().await?;
    let root = office.administrator().await?;
    for n in 0..5 {
        let new = json!({"name": format!("page-{n}"), "role": if n == 4 { "auditor" } else { "integrator" }});
        assert_eq!(post(&root, "/accounts", &new).await?.status, 201);
    }
    let (mut names, mut path) = (Vec::new(), "/accounts?name=page-&limit=2".to_owned());
    loop {
        let page = root.get(&path).await?;
        assert_eq!(page.status, 200, "{}", page.text);
        names.extend(
            page.body["accounts"].as_array().context("no accounts")?.iter().map(|a| text(&a["name"])),
        );
        let Some(cursor) = page.body["next"].as_str() else { break };
        path = format!("/accounts?name=page-&limit=2&cursor={cursor}");
    }
    assert_eq!(names, ["page-0", "page-1", "page-2", "page-3", "page-4"]);
    let count = async |query: &str| {
        let page = root.get(&format!("/accounts?{query}")).await?;
        ensure!(page.status == 200, "{query}: {}", page.text);
        anyhow::Ok(page.body["accounts"].as_array().map_or(0, Vec::len))
    };
    assert_eq!(count("role=auditor").await?, 1);
    assert_eq!(count("state=disabled").await?, 0);
    let long_ago = "created_at = created_at - interval '91 days'";
    office.lab.sql(&format!("UPDATE auth.users SET {long_ago} WHERE username IN ('page-1', 'demo')")).await?;
    let unused = root.get("/accounts?unused_days=90").await?;
    assert_eq!(
        unused.body["accounts"].as_array().map(Vec::len),
        Some(1),
        "demo has signed in: {}",
        unused.text
    );
    assert_eq!(unused.body["accounts"][0]["name"], "page-1");
    assert_eq!(count("unused_days=92").await?, 0);
    assert_eq!(count("name=%00").await?, 0);

    let accounts = "SELECT md5(string_agg(u::text, '|' ORDER BY id)) FROM auth.users u";
    let before: String = office.lab.sql(accounts).await?[0].get(0);
    let one = "/accounts/page-1";
    let (far, beyond) = ("2001-01-01T00:00:00Z", "9999-12-31T23:59:59-01:00");
    let cases = [
        (Method::POST, "/accounts", json!({"name": "x", "is_admin": true}), 400, "element-unknown"),
        (Method::POST, "/accounts", json!({"role": "integrator"}), 422, "element-missing"),
        (Method::POST, "/accounts", json!({"name": "Upper"}), 422, "value-invalid"),
        (Method::POST, "/accounts", json!({"name": "x", "role": "root"}), 422, "value-invalid"),
        (Method::POST, "/accounts", json!({"name": "x", "expires_at": far}), 422, "value-invalid"),
        (Method::POST, "/accounts", json!({"name": "x", "expires_at": beyond}), 422, "value-invalid"),
        (Method::POST, "/accounts", json!({"name": "x", "contact": "a\0b"}), 422, "value-invalid"),
        (Method::PATCH, one, json!({"password_hash": "x"}), 400, "element-unknown"),
        (Method::PATCH, one, json!({"quota": {"weight": 0}}), 422, "value-invalid"),
        (Method::PATCH, one, json!({"quota": {"weight": 101}}), 422, "value-invalid"),
        (Method::PATCH, one, json!({"quota": {"jobs": -1}}), 422, "value-invalid"),
        (Method::PATCH, one, json!({"quota": {"requests": 0}}), 422, "value-invalid"),
        (Method::PATCH, one, json!({"contact": ""}), 422, "value-invalid"),
        (Method::PATCH, "/accounts/nobody", json!({"disabled": true}), 404, "not-found"),
        (Method::PATCH, "/accounts/a%00b", json!({"disabled": true}), 404, "not-found"),
        (Method::POST, "/accounts/page-4/credentials", json!({"label": "x"}), 409, "not-a-client"),
        (
            Method::POST,
            "/accounts/page-1/credentials",
            json!({"label": "x", "jwk": {}}),
            422,
            "value-invalid",
        ),
        (Method::PATCH, "/accounts/root", json!({"role": "auditor"}), 409, "last-administrator"),
        (Method::DELETE, "/accounts/root", Value::Null, 409, "last-administrator"),
        (Method::GET, "/accounts?limit=0", Value::Null, 400, "query-invalid"),
        (Method::GET, "/accounts?limit=501", Value::Null, 400, "query-invalid"),
        (Method::GET, "/accounts?role=root", Value::Null, 400, "query-invalid"),
        (Method::GET, "/accounts?q=1", Value::Null, 400, "query-invalid"),
        (Method::DELETE, "/accounts/page-1/credentials/nonsense", Value::Null, 404, "not-found"),
        (Method::GET, "/nothing", Value::Null, 404, "not-found"),
        (Method::PUT, one, json!({}), 405, "method-not-allowed"),
    ];
    let mut requests: Vec<_> = cases
        .into_iter()
        .map(|(method, path, body, status, code)| {
            let request = root.request(method, path);
            (if body.is_null() { request } else { request.json(&body) }, status, code)
        })
        .collect();
    let raw = |kind: &str, body: String| {
        root.request(Method::POST, "/accounts").header("content-type", kind).body(body)
    };
    let large = json!({"name": "x".repeat(70_000)}).to_string();
    requests.extend([
        (raw("application/json", large), 413, "body-too-large"),
        (raw("application/json", "{".into()), 400, "json-malformed"),
        (raw("text/plain", "{}".into()), 415, "media-type"),
    ]);
    for (request, status, code) in requests {
        office.is_in_vain(request, status, code).await?;
    }
    let after: String = office.lab.sql(accounts).await?[0].get(0);
    assert_eq!(before, after);
    for (code, times) in [("last-administrator", 2), ("query-invalid", 4), ("method-not-allowed", 1)] {
        assert_eq!(office.counted(code).await? as u32, times, "{code}");
    }
    office.lab.stop().await
}

// No certificate, one of another CA, one without session, a client's token, a session with another certificate, an
// expired one, a wrong role, a wrong password: each is refused, counted and in the trail.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_no_business_here_is_refused_counted_and_recorded() -> Result<()> {
    let office = Office::open().await?;
    let lab = &office.lab;
    let url = lab.registration_url()?;
    let root = office.administrator().await?;
    let denied =
        |answer: &Answer| (answer.status, answer.code().to_owned()) == (401, "session-needed".into());

    let bare = Client::new(&lab.ca(), &url)?;
    for path in ["/accounts", "/livez", "/metrics"] {
        office.refuses("access", "certificate-missing", async || shut(&bare, path).await).await?;
    }
    let folder = std::env::temp_dir().join(format!("dermflow-rogue-{}", uuid::Uuid::new_v4().simple()));
    let rogue = State::open(&folder)?;
    let forged = pki::staff(&rogue, "root")?;
    let forged =
        Client::with_certificate(&lab.ca(), &url, &forged.cert, &forged.key)?.with_token(root.token());
    office.refuses("access", "certificate-invalid", async || shut(&forged, "/accounts").await).await?;
    // A server's certificate is none of staff, not even that of ingress itself.
    for Pki { cert, key, .. } in [&Pki::prepare(&rogue)?, lab.pki()] {
        let server = Client::with_certificate(&lab.ca(), &url, cert, key)?.with_token(root.token());
        office.refuses("access", "certificate-invalid", async || shut(&server, "/accounts").await).await?;
    }
    fs::remove_dir_all(folder)?;
    let distrustful = reqwest::Client::builder().build()?;
    let attempt = async || {
        ensure!(distrustful.get(format!("{url}/accounts")).send().await.is_err());
        Ok(())
    };
    office.refuses("access", "handshake-failed", attempt).await?;

    let without = lab.staff("without")?;
    let mut bodies = Vec::new();
    let mut refuses = async |code: &str, client: &Client| {
        let mut answers = Vec::new();
        let attempt = async || {
            answers.push(client.get("/accounts/root").await?);
            Ok(())
        };
        office.refuses("access", code, attempt).await?;
        assert!(denied(&answers[0]), "{code}: {}", answers[0].text);
        assert_eq!(answers[0].header("www-authenticate"), "Bearer");
        bodies.push(answers.remove(0).text);
        anyhow::Ok(())
    };
    refuses("session-missing", &without).await?;
    refuses("session-unknown", &without.clone().with_token("dfs_nonsense")).await?;
    refuses("token-no-session", &root.clone().with_token(lab.client().token())).await?;
    refuses("session-foreign", &without.clone().with_token(root.token())).await?;
    let late = sign_in(lab.staff("late")?, "root", &office.password).await?;
    lab.sql("UPDATE auth.sessions SET expires_at = now() WHERE created_at = (SELECT max(created_at) FROM auth.sessions)")
        .await?;
    refuses("session-expired", &late).await?;
    let idle = sign_in(lab.staff("idle")?, "root", &office.password).await?;
    lab.sql(
        "UPDATE auth.sessions SET last_used_at = now() - interval '30 minutes' \
             WHERE created_at = (SELECT max(created_at) FROM auth.sessions)",
    )
    .await?;
    refuses("session-expired", &idle).await?;
    assert_eq!(root.delete("/sessions").await?.status, 204);
    refuses("session-unknown", &root).await?;
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "whoever is refused does not learn why");

    let auditor = office.member("eyes", "auditor").await?;
    assert_eq!(auditor.get("/accounts").await?.status, 200);
    for (method, path, _) in ROUTES.into_iter().filter(|(.., rule)| *rule == Registrar) {
        let method = Method::from_bytes(method.as_bytes())?;
        let path = path.replace("{account}", "demo").replace("{credential}", &uuid::Uuid::nil().to_string());
        let attempt = async || {
            let answer = call(&auditor, method.clone(), &path, &json!({"name": "x", "label": "x"})).await?;
            ensure!((answer.status, answer.code()) == (403, "forbidden"), "{method} {path}: {}", answer.text);
            Ok(())
        };
        office.refuses("access", "forbidden", attempt).await?;
    }

    let demo = lab.password("demo")?;
    for (name, password, status, code) in [
        ("root", "wrong", 401, "login-failed"),
        ("nobody", "wrong", 401, "login-failed"),
        ("demo", demo.as_str(), 403, "forbidden"),
    ] {
        let attempt = async || {
            let answer = try_sign_in(&without, name, password).await?;
            ensure!((answer.status, answer.code()) == (status, code), "{name}: {}", answer.text);
            Ok(())
        };
        office.refuses("login", code, attempt).await?;
    }
    let attempt = async || {
        let answer = post(&without, "/sessions", &json!({"username": "root"})).await?;
        ensure!((answer.status, answer.code()) == (422, "element-missing"), "{}", answer.text);
        Ok(())
    };
    office.refuses("login", "element-missing", attempt).await?;
    let verified = lab.auth(&["audit", "verify"])?;
    assert!(verified.starts_with("intact"), "{verified}");
    office.lab.stop().await
}

/// The handshake fails: there is no answer.
async fn shut(client: &Client, path: &str) -> Result<()> {
    let error = client.get(path).await.err().context("there was an answer")?;
    ensure!(!format!("{error:?}").contains("timed out"), "{error:?}");
    Ok(())
}

// The service guesses no better than ingress: wrong passwords in a row must wait.
#[tokio::test(flavor = "multi_thread")]
async fn guessing_is_slowed() -> Result<()> {
    let office = Office::open().await?;
    let guesser = office.lab.staff("guesser")?;
    let throttled = async || {
        for _ in 0..20 {
            let answer = try_sign_in(&guesser, "root", "wrong").await?;
            if answer.status == 429 {
                ensure!(answer.code() == "login-throttled" && !answer.header("retry-after").is_empty());
                return Ok(());
            }
        }
        anyhow::bail!("20 guesses were checked")
    };
    office.refuses("login", "login-throttled", throttled).await?;
    office.lab.stop().await
}

// What an account loses, its sessions lose at once; no more than 16 of them live.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_end_with_what_they_were_opened_for() -> Result<()> {
    let office = Office::open().await?;
    let root = office.administrator().await?;
    let lab = &office.lab;
    let password = lab.auth(&["user", "create", "second", "--role", "administrator"])?;
    let open = async || sign_in(lab.staff("second")?, "second", &password).await;
    let session = open().await?;
    assert_eq!(patch(&root, "/accounts/second", &json!({"disabled": true})).await?.status, 204);
    assert_eq!(session.get("/accounts").await?.status, 401, "disabled");
    assert_eq!(patch(&root, "/accounts/second", &json!({"disabled": false})).await?.status, 204);
    assert_eq!(session.get("/accounts").await?.status, 401, "it does not come back");
    let session = open().await?;
    assert_eq!(post(&root, "/accounts/second/revoke", &Value::Null).await?.status, 204);
    assert_eq!(session.get("/accounts").await?.status, 401, "revoked");
    let session = open().await?;
    lab.sql("UPDATE auth.users SET expires_at = now() WHERE username = 'second'").await?;
    assert_eq!(session.get("/accounts").await?.status, 401, "the account has expired");
    lab.sql("UPDATE auth.users SET expires_at = NULL WHERE username = 'second'").await?;
    let certificate = lab.staff("second")?;
    let first = sign_in(certificate.clone(), "second", &password).await?;
    for _ in 0..16 {
        sign_in(certificate.clone(), "second", &password).await?;
    }
    assert_eq!(first.get("/accounts").await?.status, 401, "the oldest made room");
    let kept = "SELECT count(*) FROM auth.sessions JOIN auth.users ON id = account WHERE username = 'second'";
    assert_eq!(lab.count(kept).await?, 16);
    let form = [("username", "second"), ("password", password.as_str())];
    let by_form = send(certificate.request(Method::POST, "/sessions").form(&form)).await?;
    assert_eq!(by_form.status, 201, "{}", by_form.text);
    let dump = "SELECT count(*) FROM auth.sessions s WHERE s::text LIKE '%dfs\\_%'";
    assert_eq!(lab.count(dump).await?, 0, "only hashes are kept");
    assert!(!lab.logs()?.contains("dfs_"));
    office.lab.stop().await
}

// API5: the public address knows nothing of it, whatever the caller holds.
#[tokio::test(flavor = "multi_thread")]
async fn ingress_does_not_know_the_registration_service() -> Result<()> {
    let office = Office::open().await?;
    let root = office.administrator().await?;
    for origin in [office.lab.url(0), office.lab.internal_url(0)] {
        for client in [root.clone(), office.lab.client().clone()] {
            for path in ["/accounts", "/accounts/demo", "/sessions"] {
                let client = client.clone().at(&origin);
                assert_eq!(client.get(path).await?.status, 404, "{origin}{path}");
                assert_eq!(post(&client, path, &json!({"name": "x"})).await?.status, 404, "{origin}{path}");
            }
        }
    }
    office.lab.stop().await
}

// What is served is described, and what is described is served. A route without a row, or a row without a route, fails.
#[tokio::test(flavor = "multi_thread")]
async fn the_service_describes_itself() -> Result<()> {
    let office = Office::open().await?;
    let root = office.administrator().await?;
    let api = root.get("/openapi.json").await?;
    assert_eq!(api.body["openapi"], "3.1.0");
    let mut described = BTreeSet::new();
    for (path, item) in api.body["paths"].as_object().context("no paths")? {
        for (method, operation) in item.as_object().context("no operations")? {
            let is_open = operation["security"] == json!([{}]);
            described.insert((method.to_uppercase(), path.clone(), is_open));
        }
    }
    let (health, mut internal) = (office.health()?, BTreeSet::new());
    for path in health.get("/openapi.json").await?.body["paths"].as_object().context("no paths")?.keys() {
        assert_eq!(health.get(path).await?.status, 200, "{path}");
        internal.insert(path.clone());
    }
    assert_eq!(internal, BTreeSet::from(["/livez", "/metrics", "/openapi.json"].map(str::to_owned)));
    let rows = ROUTES.map(|(method, path, rule)| (method.to_owned(), path.to_owned(), rule == Open));
    assert_eq!(described, BTreeSet::from(rows));
    let anonymous = office.lab.staff("anonymous")?;
    let auditor = office.member("eyes", "auditor").await?;
    for (method, path, rule) in ROUTES {
        let sent = Method::from_bytes(method.as_bytes())?;
        let path = path.replace("{account}", "demo").replace("{credential}", "nothing");
        let answer = call(&anonymous, sent.clone(), &path, &json!({})).await?;
        assert_eq!(answer.status == 401, rule != Open, "{method} {path}: {}", answer.status);
        assert!(![404, 405, 500].contains(&answer.status), "{method} {path}: {}", answer.status);
        // That one would sign it out.
        if rule == Reader && path != "/sessions" {
            assert_eq!(auditor.get(&path).await?.status, 200, "{method} {path}");
        }
    }
    // What is for who runs the service is on a listener of its own, and nothing else is there.
    let health = office.health()?;
    assert_eq!(health.get("/livez").await?.body["status"], "live");
    for (client, path) in [(&anonymous, "/livez"), (&anonymous, "/metrics")] {
        assert_eq!(client.get(path).await?.status, 401, "{path}");
    }
    assert_eq!(health.get("/accounts").await?.status, 404);
    let requests = health.get("/metrics").await?.text;
    let counted = r#"dermflow_http_requests_total{method="GET",route="/accounts/{account}",status="401"} 1"#;
    assert!(requests.contains(counted), "{requests}");
    office.lab.stop().await
}

// An address that the public may reach is refused unless that is said twice; nothing is bound before.
#[tokio::test(flavor = "multi_thread")]
async fn a_public_address_is_refused_unless_told_twice() -> Result<()> {
    let office = Office::open().await?;
    let port = dermflow_local::ports::free()?;
    for (flags, refused) in [
        (&[][..], true),
        (&["--public"], true),
        (&["--really-public"], true),
        (&["--public", "--really-public"], false),
    ] {
        let output = Command::new(programs()?.join("auth"))
            .args(["--database", "host=/nowhere user=x", "--database-password-file", "/dev/null"])
            .args(["serve", "--listen", &format!("0.0.0.0:{port}")])
            .args(["--tls-cert", "/dev/null", "--tls-key", "/dev/null", "--staff-ca", "/dev/null"])
            .args(flags)
            .output()?;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        // With both it gets as far as the certificate, which is none here.
        assert_eq!(told.contains("the public may reach this address"), refused, "{flags:?}: {told}");
    }
    office.lab.stop().await
}

// However many try at once, there is one first administrator, and every other attempt is in the trail.
#[tokio::test(flavor = "multi_thread")]
async fn of_many_first_administrators_there_is_one() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let outcomes: Vec<bool> = std::thread::scope(|scope| {
        let attempt = |n: usize| {
            let lab = &lab;
            scope.spawn(move || lab.auth(&["bootstrap", &format!("root-{n}")]).is_ok())
        };
        let attempts: Vec<_> = (0..6).map(attempt).collect();
        attempts.into_iter().map(|attempt| attempt.join().unwrap_or(false)).collect()
    });
    assert_eq!(outcomes.iter().filter(|done| **done).count(), 1, "{outcomes:?}");
    assert_eq!(lab.count("SELECT count(*) FROM auth.users WHERE role = 'administrator'").await?, 1);
    let refused = "SELECT count(*) FROM auth.audit WHERE outcome = 'refused' AND code = 'bootstrapped'";
    assert_eq!(lab.count(refused).await?, 5);
    lab.stop().await
}

// Erasure: nothing personal is left anywhere in the database, and the trail is as it was.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_account_leaves_nothing_personal_and_an_intact_trail() -> Result<()> {
    let office = Office::open().await?;
    let root = office.administrator().await?;
    let lab = &office.lab;
    let (name, contact) = ("quillfeather", "Ada Quillfeather-Smythe");
    let new = json!({"name": name, "contact": contact});
    let created = post(&root, "/accounts", &new).await?;
    let (id, password) = (text(&created.body["id"]), text(&created.body["password"]));
    let path = format!("/accounts/{id}");
    let label = json!({"label": "laptop of Ms Quillfeather"});
    assert_eq!(post(&root, &format!("{path}/credentials"), &label).await?.status, 201);
    let client = Client::new(&lab.ca(), &lab.url(0))?.login(name, &password).await?;
    assert_eq!(client.get("/jobs").await?.status, 200);
    assert_eq!(client.try_login(name, "wrong").await?.status, 401);
    // The name as part of a path must not get into the trail either.
    assert_eq!(root.get(&format!("/accounts/{name}-2")).await?.status, 404);
    assert!(found(lab, "quillfeather").await? > 0, "the search finds what is there");
    let trail = "SELECT count(*) FROM auth.audit";
    let before = lab.count(trail).await?;
    assert_eq!(root.delete(&path).await?.status, 204);
    assert_eq!(found(lab, "quillfeather").await?, 0, "nothing personal is left");
    assert_eq!(lab.count(trail).await?, before + 1, "the trail has one event more, and none less");
    let about = format!("SELECT count(*) FROM auth.audit WHERE object = '{id}'");
    assert!(lab.count(&about).await? >= 4, "what was done to the account can still be told");
    let verified = lab.auth(&["audit", "verify"])?;
    assert!(verified.starts_with("intact"), "{verified}");
    let reused = post(&root, "/accounts", &new).await?;
    assert_eq!(reused.status, 201, "the name is free again");
    assert_ne!(text(&reused.body["id"]), id);
    office.lab.stop().await
}

/// Rows of any table of ours that have the word anywhere.
async fn found(lab: &Lab, word: &str) -> Result<i64> {
    let tables = "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname IN ('auth', 'ingress')";
    let mut rows = 0;
    for table in lab.sql(tables).await? {
        let table: String = table.get(0);
        rows += lab.count(&format!("SELECT count(*) FROM {table} t WHERE t::text ILIKE '%{word}%'")).await?;
    }
    Ok(rows)
}
