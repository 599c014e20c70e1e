//! A client's reports: searched, read part by part, removed.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use dermflow_tests::{
    client::{Answer, Client, sample, send},
    fhir,
    lab::{Lab, Setup},
};
use reqwest::Method;
use serde_json::{Value, json};

const PATIENTS: &str = "https://clinic.example/patients";
const STATUS: &str = "http://hl7.org/fhir/diagnostic-report-status";

/// The report of a patient, and its id.
async fn report_of(client: &Client, patient: &str, order: &str) -> Result<String> {
    let mut request = sample("ham10000-nv.jpg");
    let subject = json!({"reference": format!("Patient/{patient}"), "identifier": {"system": PATIENTS, "value": patient}});
    let parameters = request["parameter"].as_array_mut().context("no parameters")?;
    parameters.push(json!({"name": "subject", "valueReference": subject}));
    parameters.push(json!({"name": "identifier", "valueIdentifier": {"value": order}}));
    let answer = client.analyze(&request, &[]).await?;
    ensure!(answer.status == 200, "{}", answer.text);
    Ok(answer.job().to_owned())
}

async fn search(client: &Client, query: &str) -> Result<Value> {
    let answer = client.get(&format!("/fhir/DiagnosticReport?{query}")).await?;
    ensure!(answer.status == 200, "{query}: {}", answer.text);
    Ok(answer.body)
}

fn entries(bundle: &Value) -> impl Iterator<Item = &Value> {
    bundle["entry"].as_array().into_iter().flatten()
}

/// The ids of what matches, in order.
fn matches(bundle: &Value) -> Vec<&str> {
    let found = entries(bundle).filter(|entry| entry["search"]["mode"] == "match");
    found.filter_map(|entry| entry["resource"]["id"].as_str()).collect()
}

fn link<'b>(bundle: &'b Value, relation: &str) -> Option<&'b str> {
    let mut links = bundle["link"].as_array()?.iter();
    links.find(|link| link["relation"] == relation)?["url"].as_str()
}

// A patient's reports are found by whatever names the patient, by nobody else, and as a series that stays in place while
// it grows; nothing of it is in the database in clear.
#[tokio::test(flavor = "multi_thread")]
async fn a_patients_reports_are_a_series_in_time() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let (client, stranger) = (lab.client(), lab.register("stranger").await?);
    let theirs = report_of(&stranger, "Jane-7", "O-1").await?;
    let mut series = Vec::new();
    for order in ["O-1", "O-2", "O-3"] {
        series.push(report_of(client, "Jane-7", order).await?);
    }
    let other = report_of(client, "John-8", "O-4").await?;
    let (oldest_first, mut latest_first) = (series.clone(), series.clone());
    latest_first.reverse();
    let today = &client.get("/jobs?limit=1").await?.body["jobs"][0]["accepted_at"];
    let day = today.as_str().context("no time")?.get(..10).context("no day")?.to_owned();
    for (query, found) in [
        (format!("subject:identifier={PATIENTS}|Jane-7"), &latest_first[..]),
        ("subject:identifier=Jane-7".into(), &latest_first),
        ("subject=Patient/Jane-7&_sort=date".into(), &oldest_first),
        ("subject=Jane-7&_sort=-issued".into(), &latest_first),
        (format!("patient=Jane-7&date=ge{day}&_lastUpdated=ge{day}&status=preliminary,final"), &latest_first),
        (format!("patient=Jane-7&status={STATUS}|preliminary"), &latest_first),
        (format!("patient=Jane-7&status={STATUS}|final,|preliminary"), &latest_first),
        ("patient:identifier=Jane-7&identifier=O-2".into(), &series[1..2]),
        (
            format!("identifier=urn:ietf:rfc:3986|urn:uuid:{},|O-3&_sort=date", series[0]),
            &[series[0].clone(), series[2].clone()],
        ),
        (format!("_id={other},{theirs}"), std::slice::from_ref(&other)),
        (format!("_id={}&subject=John-8", series[0]), &[]),
        ("subject:identifier=https://other.example|Jane-7".into(), &[]),
        ("patient=Jane-7&status=final".into(), &[]),
        (format!("patient=Jane-7&status={STATUS}|final"), &[]),
        ("patient=Jane-7&status=https://other.example|preliminary".into(), &[]),
        (format!("patient=Jane-7&date=lt{day}"), &[]),
        ("identifier=Jane-7".into(), &[]),
    ] {
        let bundle = search(client, &query).await?;
        assert_eq!(matches(&bundle), found.iter().map(String::as_str).collect::<Vec<_>>(), "{query}");
        let own = link(&bundle, "self").context("no link")?;
        assert_eq!(client.get(own).await?.body, bundle, "{query}");
    }
    assert_eq!(matches(&search(&stranger, "patient=Jane-7").await?), [&theirs]);
    for sort in ["-date", "_lastUpdated"] {
        let mut page = search(client, &format!("patient=Jane-7&_count=1&_sort={sort}")).await?;
        let mut seen = BTreeSet::new();
        // What comes meanwhile is at one end of the list.
        let meanwhile = report_of(client, "Jane-7", "O-5").await?;
        loop {
            ensure!(matches(&page).iter().all(|id| seen.insert((*id).to_owned())), "twice: {page}");
            let Some(next) = link(&page, "next").map(str::to_owned) else { break };
            page = client.get(&next).await?.body;
        }
        seen.remove(&meanwhile);
        ensure!(series.iter().all(|id| seen.contains(id)), "{sort}: {seen:?}");
        lab.client().delete(&format!("/fhir/DiagnosticReport/{meanwhile}")).await?;
    }
    for table in ["jobs", "report_tokens", "search_keys"] {
        let clear = format!(
            "SELECT count(*) FROM ingress.{table} t WHERE t::text LIKE '%Jane%' OR t::text LIKE '%O-1%' \
                             OR t::text LIKE '%' || encode('Jane-7', 'hex') || '%'"
        );
        assert_eq!(lab.count(&clear).await?, 0, "{table}");
    }
    lab.stop().await
}

/// A form, as searches take it.
async fn by_form(client: &Client, form: &[(&str, &str)], prefer: &str) -> Result<Answer> {
    let request = client.request(Method::POST, "/fhir/DiagnosticReport/_search").header("prefer", prefer);
    send(request.form(form)).await
}

// A parameter that is not known is an error unless the caller says otherwise; a value that cannot be read always is.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_understood_is_not_passed_over_in_silence() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let client = lab.client();
    let report = report_of(client, "Jane-7", "O-1").await?;
    for query in ["colour=red", "subject:missing=true", "_summary=true", "performer=1"] {
        let path = format!("/fhir/DiagnosticReport?{query}");
        assert_eq!(client.get(&path).await?.code(), "query-invalid", "{query}");
        let lenient = client.request(Method::GET, &path).header("prefer", "handling=lenient");
        let answer = send(lenient).await?;
        assert_eq!(matches(&answer.body), [&report], "{query}");
        let own = link(&answer.body, "self").context("no link")?;
        ensure!(!own.contains('?'), "{own}");
    }
    for query in [
        "date=yesterday",
        "date=9999-12-31T23:59:59-01:00",
        "_count=few",
        "_sort=colour",
        "_cursor=x",
        "_cursor=-377705116800000000.019a0000-0000-7000-8000-000000000000",
        "_include=DiagnosticReport:subject",
        "subject:identifier=https://x.example|",
        "status=",
        "status=http://hl7.org/fhir/diagnostic-report-status|",
        "_format=xml",
    ] {
        let lenient = client.request(Method::GET, &format!("/fhir/DiagnosticReport?{query}"));
        let answer = send(lenient.header("prefer", "handling=lenient")).await?;
        assert_eq!((answer.status, answer.code()), (400, "query-invalid"), "{query}");
    }
    let found = by_form(client, &[("patient", "Jane-7"), ("_count", "5")], "").await?;
    assert_eq!(matches(&found.body), [&report], "{}", found.text);
    assert_eq!(by_form(client, &[("colour", "red")], "").await?.code(), "query-invalid");
    assert_eq!(by_form(client, &[("colour", "red")], "handling=lenient").await?.status, 200);
    let json =
        client.request(Method::POST, "/fhir/DiagnosticReport/_search").json(&json!({"patient": "Jane-7"}));
    assert_eq!(send(json).await?.code(), "media-type");
    lab.stop().await
}

// With _include a report is separate resources that refer to each other, valid, each with a URL of its own; one that was
// removed is gone with all of them, and with what it was found by.
#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_taken_apart_and_removed_as_a_whole() -> Result<()> {
    let lab = Lab::start(Setup::derm7()).await?;
    let (client, stranger) = (lab.client(), lab.register("stranger").await?);
    let report = report_of(client, "Jane-7", "O-1").await?;
    let path = format!("/fhir/DiagnosticReport/{report}");
    let whole = client.get(&path).await?.body;
    let mut documents = Vec::new();
    let mut parts = Vec::new();
    for include in [
        "",
        "&_include=DiagnosticReport:result&_include=DiagnosticReport:media",
        "&_revinclude=Provenance:target",
    ] {
        let bundle = search(client, &format!("_id={report}{include}")).await?;
        let resources = entries(&bundle).count();
        let contained = whole["contained"].as_array().context("nothing contained")?.len();
        assert_eq!(resources, if include.is_empty() { 1 } else { contained + 2 }, "{include}");
        if !include.is_empty() {
            ensure!(bundle["entry"][0]["resource"]["contained"].is_null(), "{bundle}");
            parts = entries(&bundle).skip(1).cloned().collect();
        }
        documents.push((include.to_owned(), bundle));
    }
    let known: BTreeSet<String> = parts
        .iter()
        .chain([&json!({"fullUrl": path})])
        .filter_map(|part| part["fullUrl"].as_str()?.split("/fhir/").nth(1).map(str::to_owned))
        .collect();
    for part in &parts {
        ensure!(part["search"]["mode"] == "include", "{part}");
        let url = part["fullUrl"].as_str().context("no URL")?;
        assert_eq!(client.get(url).await?.body, part["resource"], "{url}");
        assert_eq!(stranger.get(url).await?.code(), "not-found", "{url}");
        for reference in
            part.to_string().split("\"reference\":\"").skip(1).filter_map(|rest| rest.split('"').next())
        {
            ensure!(known.contains(reference) || reference.starts_with("Patient/"), "{reference}");
        }
        documents.push((url.to_owned(), part["resource"].clone()));
    }
    let provenance = &parts.last().context("no parts")?["resource"];
    assert_eq!(provenance["resourceType"], "Provenance");
    let media =
        whole["contained"].as_array().into_iter().flatten().find(|one| one["resourceType"] == "Media");
    let digest = &media.context("no image")?["identifier"][0]["value"];
    assert_eq!(&provenance["entity"][0]["what"]["identifier"]["value"], digest);
    ensure!(
        provenance["entity"][1]["what"]["identifier"]["value"]
            .as_str()
            .is_some_and(|model| model.starts_with("sha256:"))
    );
    // It is found by what was made, and by nothing else; nobody else finds it.
    let found_by = async |client: &Client, target: &str| {
        let answer = client.get(&format!("/fhir/Provenance?target={target}")).await?;
        ensure!(answer.status == 200, "{target}: {}", answer.text);
        Ok::<_, anyhow::Error>(answer.body)
    };
    let of_report = format!("DiagnosticReport/{report}");
    for (target, n) in [
        (of_report.as_str(), 1),
        (&format!("Observation/{report}-classification-1"), 1),
        (&format!("Media/{report}-image-1"), 0),
        (&format!("Observation/{report}"), 0),
        ("DiagnosticReport/0198f3a2-9c1e-7c55-8f0e-1d2c3b4a5e6f", 0),
        ("Patient/Jane-7", 0),
    ] {
        let bundle = found_by(client, target).await?;
        assert_eq!(entries(&bundle).count(), n, "{target}");
        ensure!(entries(&bundle).all(|entry| &entry["resource"] == provenance), "{bundle}");
        assert_eq!(entries(&found_by(&stranger, target).await?).count(), 0, "{target}");
        documents.push((format!("Provenance of {target}"), bundle));
    }
    for query in ["", "?target=", "?target=a&target=b", "?patient=Jane-7", "?_format=json"] {
        let refused = client.get(&format!("/fhir/Provenance{query}")).await?;
        assert_eq!((refused.status, refused.code()), (400, "query-invalid"), "{query}");
    }
    fhir::validate(&documents).await?;

    assert_eq!(stranger.delete(&path).await?.code(), "not-found");
    assert_eq!(lab.count("SELECT count(*) FROM ingress.report_tokens").await?, 6);
    let removed = client.delete(&path).await?;
    assert_eq!((removed.status, removed.text.as_str()), (204, ""));
    for gone in
        [path.as_str(), &format!("/fhir/_async/{report}"), parts[0]["fullUrl"].as_str().context("no URL")?]
    {
        let gone = client.get(gone).await?;
        assert_eq!((gone.status, gone.code()), (404, "report-removed"), "{}", gone.text);
    }
    assert_eq!(client.delete(&path).await?.code(), "not-found");
    assert_eq!(entries(&found_by(client, &of_report).await?).count(), 0);
    assert!(matches(&search(client, "patient=Jane-7").await?).is_empty());
    for table in ["reports", "report_tokens"] {
        assert_eq!(lab.count(&format!("SELECT count(*) FROM ingress.{table}")).await?, 0, "{table}");
    }
    let recorded =
        format!("SELECT count(*) FROM auth.audit WHERE action = 'job-withdrawn' AND object = '{report}'");
    assert_eq!(lab.count(&recorded).await?, 1);
    lab.stop().await
}

// A page ends by bytes, too, and the next one goes on from there.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_large_reports_is_short() -> Result<()> {
    let lab = Lab::start(Setup::simulated(1)).await?;
    let client = lab.client();
    for order in ["O-1", "O-2", "O-3"] {
        report_of(client, "Jane-7", order).await?;
    }
    assert_eq!(entries(&search(client, "patient=Jane-7").await?).count(), 3);
    // They cannot be opened then, which an entry says of each.
    lab.sql("UPDATE ingress.reports SET sealed = sealed || decode(repeat('00', 5000000), 'hex')").await?;
    let first = search(client, "patient=Jane-7").await?;
    let next = client.get(link(&first, "next").context("no link")?).await?.body;
    assert_eq!((entries(&first).count(), entries(&next).count()), (2, 1));
    ensure!(link(&next, "next").is_none(), "{next}");
    lab.stop().await
}
