//! What the service publishes about itself in FHIR, against what it does and says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Result, ensure};
use dermflow_http::answer::outcome;
use dermflow_local::stack::repo;
use dermflow_schemas::{
    error::{ApiError, CODES},
    fhir::Resource,
};
use dermflow_tests::{
    client::{Client, parameters, sample, sample_bytes, send},
    fhir,
    lab::{Lab, Setup},
};
use reqwest::Method;
use serde_json::Value;

const OURS: &str = "https://dermflow.dev/fhir/CodeSystem/";
const TYPES: [&str; 4] = ["OperationDefinition", "CodeSystem", "ValueSet", "ConceptMap"];

fn list<'v>(value: &'v Value, member: &str) -> impl Iterator<Item = &'v Value> {
    value[member].as_array().into_iter().flatten()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

// Everything that is published is valid FHIR, is read without a token, and is told by its entity tag.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_published_is_valid_and_has_a_version() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let anonymous = lab.client().clone().with_token("");
    let mut paths = vec!["/fhir/metadata".to_owned()];
    for kind in TYPES {
        let all = anonymous.get(&format!("/fhir/{kind}")).await?;
        assert_eq!((all.status, &all.body["type"]), (200, &"searchset".into()), "{}", all.text);
        assert_eq!(all.body["total"].as_u64(), Some(list(&all.body, "entry").count() as u64));
        for entry in list(&all.body, "entry") {
            let url = text(&entry["resource"]["url"]);
            assert_eq!(text(&entry["fullUrl"]).rsplit('/').next(), url.rsplit('/').next());
            paths.push(format!("/fhir/{kind}/{}", text(&entry["resource"]["id"])));
            let found = anonymous.get(&format!("/fhir/{kind}?url={url}")).await?.body;
            assert_eq!(found["total"], 1, "{url}");
            assert_eq!(found["entry"][0]["resource"], entry["resource"]);
        }
        paths.push(format!("/fhir/{kind}?url=https://nothing.example&_format=json"));
        assert_eq!(anonymous.get(&format!("/fhir/{kind}/nothing")).await?.code(), "not-found");
        assert_eq!(anonymous.get(&format!("/fhir/{kind}?colour=red")).await?.code(), "query-invalid");
    }
    let mut documents = Vec::new();
    for path in paths {
        let answer = anonymous.get(&path).await?;
        assert_eq!(answer.status, 200, "{path}");
        let tag = answer.header("etag");
        for (known, status) in [(tag, 304), ("W/\"x\", *", 304), (&tag[2..], 304), ("W/\"x\"", 200)] {
            let request = anonymous.request(Method::GET, &path).header("if-none-match", known);
            let again = send(request).await?;
            assert_eq!((again.status, again.header("etag")), (status, tag), "{path} {known}");
            assert_eq!(again.text.is_empty(), status == 304, "{path} {known}");
        }
        documents.push((path, answer.body));
    }
    fhir::validate(&documents).await?;
    lab.stop().await
}

// An error can be said in valid FHIR whatever its code, with a place and a hint and without.
#[tokio::test]
async fn every_error_is_a_valid_outcome() -> Result<()> {
    let mut documents = Vec::new();
    for code in CODES {
        let whole =
            ApiError::from(*code).at("Parameters.parameter[0].part[0].value.data").detail("at most 3");
        for error in [ApiError::from(*code), whole] {
            let outcome = Resource::OperationOutcome(outcome(&error)).to_json();
            documents.push((code.to_string(), serde_json::from_slice(&outcome)?));
        }
    }
    fhir::validate(&documents).await
}

/// Interactions and search parameters by type, as the statement has them.
fn stated(statement: &Value) -> BTreeMap<String, (BTreeSet<String>, BTreeSet<String>)> {
    let names =
        |resource: &Value, all: &str, name: &str| list(resource, all).map(|one| text(&one[name])).collect();
    let resource = |resource: &Value| {
        let of = (names(resource, "interaction", "code"), names(resource, "searchParam", "name"));
        (text(&resource["type"]), of)
    };
    list(&statement["rest"][0], "resource").map(resource).collect()
}

/// The same, from the description of the API.
fn described(api: &Value) -> BTreeMap<String, (BTreeSet<String>, BTreeSet<String>)> {
    let mut types = BTreeMap::<String, (BTreeSet<String>, BTreeSet<String>)>::new();
    for (path, item) in api["paths"].as_object().into_iter().flatten() {
        let Some(rest) = path.strip_prefix("/fhir/").filter(|rest| rest.starts_with(char::is_uppercase))
        else {
            continue;
        };
        let (kind, id) = rest.split_once('/').unwrap_or((rest, ""));
        if !["", "{id}"].contains(&id) {
            continue;
        }
        let (interactions, parameters) = types.entry(kind.to_owned()).or_default();
        for method in item.as_object().into_iter().flatten().map(|(method, _)| method.as_str()) {
            interactions.insert(
                match (method, id) {
                    ("get", "") => "search-type",
                    ("get", _) => "read",
                    ("delete", _) => "delete",
                    ("post", "") => "create",
                    _ => "something else",
                }
                .to_owned(),
            );
        }
        let searched = list(&item["get"], "parameters").filter(|parameter| parameter["in"] == "query");
        // What shapes the answer is no search parameter.
        let shapes = ["_sort", "_count", "_cursor", "_format", "_include", "_revinclude"];
        parameters.extend(
            searched
                .map(|one| text(&one["name"]))
                .filter(|name| !shapes.contains(&name.as_str()) && !name.contains(':')),
        );
    }
    types
}

// The statement says what is there, and nothing else; the operation takes what it says.
#[tokio::test(flavor = "multi_thread")]
async fn the_statement_says_what_the_server_does() -> Result<()> {
    let lab = Lab::start(Setup::without_workers()).await?;
    let anonymous = lab.client().clone().with_token("");
    let statement = anonymous.get("/fhir/metadata").await?.body;
    assert_eq!(statement["implementation"]["url"], format!("{}/fhir", lab.url(0)));
    assert_eq!(stated(&statement), described(&anonymous.get("/openapi.json").await?.body));
    let operation = statement["rest"][0]["resource"][0]["operation"][0].clone();
    let url = text(&operation["definition"]);
    let found = anonymous.get(&format!("/fhir/OperationDefinition?url={url}")).await?.body;
    let definition = &found["entry"][0]["resource"];
    let code = text(&definition["code"]);
    assert_eq!((text(&operation["name"]), code.as_str()), (code.clone(), "analyze"));
    let most: usize = text(&definition["parameter"][0]["max"]).parse()?;
    let images = |count| parameters(&vec![sample_bytes("isic2017-nv.png"); count]);
    let path = format!("/fhir/{}/${code}", text(&definition["resource"][0]));
    for (count, status) in [(most, 202), (most + 1, 422)] {
        let request = lab.client().request(Method::POST, &path).header("prefer", "respond-async");
        assert_eq!(send(request.json(&images(count))).await?.status, status, "{count} images");
    }
    lab.stop().await
}

/// The first text in quotes after each of these calls, in a source file.
fn named(source: &str, calls: &[&str]) -> BTreeSet<String> {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let first = |rest: &str| {
        let rest = rest.trim_start();
        rest.strip_prefix('"').and_then(|rest| rest.split('"').next()).map(str::to_owned)
    };
    calls.iter().flat_map(|call| source.split(call).skip(1).filter_map(first)).collect()
}

/// Codes of classes, metrics and whatever else a model's description has.
fn of_model(description: &str) -> BTreeSet<String> {
    let mut codes = BTreeSet::new();
    for section in description.split("\n[[").skip(1) {
        let prefix = if section.starts_with("class]]") { "class-" } else { "" };
        let code = section.lines().find_map(|line| line.strip_prefix("code = \"")?.strip_suffix('"'));
        codes.extend(code.map(|code| format!("{prefix}{code}")));
    }
    codes
}

fn sources(folder: &Path) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            texts.extend(sources(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            texts.push(fs::read_to_string(path)?);
        }
    }
    Ok(texts)
}

/// Codes of ours anywhere in a document, by the name of their system.
fn codes_in(document: &Value, found: &mut BTreeSet<(String, String)>) {
    match document {
        Value::Object(members) => {
            let system = members.get("system").and_then(Value::as_str);
            if let Some(system) = system.and_then(|system| system.strip_prefix(OURS)) {
                found.insert((system.to_owned(), text(&members["code"])));
            }
            members.values().for_each(|value| codes_in(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| codes_in(item, found)),
        _ => {}
    }
}

// Every code of ours that the sources name, and every one in what the service says, is in a code system that it serves.
#[tokio::test(flavor = "multi_thread")]
async fn every_code_of_ours_is_published() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let client = lab.client();
    let mut published = BTreeSet::new();
    for entry in list(&client.get("/fhir/CodeSystem").await?.body, "entry") {
        let system = &entry["resource"];
        assert_eq!(
            (&system["content"], system["count"].as_u64()),
            (&"complete".into(), Some(list(system, "concept").count() as u64))
        );
        published.extend(list(system, "concept").map(|one| (text(&system["id"]), text(&one["code"]))));
    }
    let mut said = BTreeSet::new();
    let calls = ["local(", "component(", "measured("];
    for folder in ["workers/src", "ingress/src"] {
        let sources = sources(&repo().join(folder))?;
        let named = sources.iter().flat_map(|source| named(source, &calls));
        said.extend(named.map(|code| ("skin-image-analysis".to_owned(), code)));
    }
    ensure!(said.len() > 10, "{said:?}");
    let model = fs::read_to_string(repo().join("workers/models/derm7/model.toml"))?;
    said.extend(of_model(&model).into_iter().map(|code| ("skin-image-analysis".to_owned(), code)));
    let documents = spoken(client, &lab).await?;
    for document in &documents {
        codes_in(document, &mut said);
    }
    let named: Vec<_> =
        documents.into_iter().map(|document| (text(&document["resourceType"]), document)).collect();
    fhir::validate(&named).await?;
    ensure!(said.len() > 40, "{said:?}");
    let missing: Vec<_> = said.difference(&published).collect();
    ensure!(missing.is_empty(), "not in its code system: {missing:?}");
    lab.stop().await
}

/// Documents of every kind that has codes of ours in it.
async fn spoken(client: &Client, lab: &Lab) -> Result<Vec<Value>> {
    let password = lab.auth(&["user", "create", "ada", "--role", "auditor"])?;
    let auditor = Client::new(&lab.ca(), &lab.url(0))?.login("ada", &password).await?;
    let two = parameters(&[sample_bytes("ham10000-mel.jpg"), sample_bytes("isic2017-nv.png")]);
    let accepted = client.analyze(&sample("ham10000-nv.jpg"), &[("prefer", "respond-async")]).await?;
    let mut cut = sample_bytes("isic2017-nv.png");
    cut.truncate(cut.len() / 2);
    Ok(vec![
        client.analyze(&two, &[]).await?.body,
        client.analyze(&parameters(&[cut]), &[]).await?.body,
        client.get("/fhir/Task").await?.body,
        client.delete(accepted.header("content-location")).await?.body,
        accepted.body,
        client.get("/fhir/nothing").await?.body,
        auditor.get("/fhir/AuditEvent").await?.body,
    ])
}
