//! What the broker's servers say of their listeners, connections, routes and stores.

use std::{
    collections::BTreeMap,
    fs,
    net::{ToSocketAddrs, UdpSocket},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use dermflow_schemas::{
    monitor::{Monitor, Question},
    queue::NatsOptions,
};
use serde_json::Value;

use super::{Finding, Protection, store};

const CONNZ: &str = "CONNZ of every server";
const STORED: &str = "the files in the folder that JSZ names";

const QUESTIONS: &str = "VARZ, CONNZ, ROUTEZ, JSZ";

/// What there is to see; where nobody may ask, as in a cluster that has no user `monitor`, that nothing is known.
pub(super) async fn look(options: &NatsOptions) -> Vec<Finding> {
    ask(options).await.unwrap_or_else(|error| {
        let seen = format!("{error:#}");
        let link = Finding::link("all links of the broker", Protection::Unknown, seen.clone(), QUESTIONS);
        let stored = "jobs, payloads and results at the broker";
        vec![link, Finding::store(stored, Protection::Unknown, seen, QUESTIONS)]
    })
}

async fn ask(options: &NatsOptions) -> Result<Vec<Finding>> {
    let monitor = Monitor::connect(options).await.map_err(|e| anyhow!(e)).context("the broker")?;
    let mut answers = Vec::new();
    for question in [Question::Server, Question::Connections, Question::Routes, Question::Store] {
        answers.push(monitor.ask(question).await.map_err(|e| anyhow!(e)).context("the broker")?);
    }
    let [servers, connections, routes, stores] = &answers[..] else { unreachable!("four questions") };
    let mut findings = silent(&answers);
    findings.extend(listeners(servers));
    findings.extend(clients(connections));
    findings.extend(cluster(servers, routes));
    findings.extend(jetstreams(stores));
    findings.push(Finding::store(
        "names at the broker",
        Protection::ClearOnPurpose,
        "names of streams and consumers, some with a client's opaque id; ids of jobs in sched.db",
        "nats-server 2.15",
    ));
    Ok(findings)
}

/// A finding for each server that has answered one question and not another in time.
fn silent(answers: &[Vec<Value>]) -> Vec<Finding> {
    let mut answered: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
    for server in answers.iter().flatten().map(|answer| &answer["server"]) {
        answered.entry(text(&server["id"])).or_insert((text(&server["name"]), 0)).1 += 1;
    }
    let all = answers.len();
    let silent = answered.into_values().filter(|&(_, number)| number != all);
    let finding = |(name, number)| {
        let seen = format!("{number} answers to {all} questions");
        Finding::link(format!("all of the broker {name}"), Protection::Unknown, seen, QUESTIONS)
    };
    silent.map(finding).collect()
}

fn listeners(servers: &[Value]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for server in servers {
        let (name, server) = (text(&server["server"]["name"]), &server["data"]);
        let tls = server["tls_required"] == true;
        let seen = if tls { "TLS required" } else { "takes connections without TLS" };
        let protection = if tls { Protection::Tls } else { Protection::Clear };
        findings.push(Finding::link(format!("clients to the broker {name}"), protection, seen, "VARZ"));
        if server["http_port"].as_u64().is_some_and(|port| port != 0) {
            let seen = "a port for monitoring without TLS";
            findings.push(Finding::link(format!("monitors to {name}"), Protection::Clear, seen, "VARZ"));
        }
    }
    findings
}

/// A finding a user: how its connections are encrypted.
fn clients(servers: &[Value]) -> Vec<Finding> {
    let mut users: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    let mut unseen = 0;
    for server in servers.iter().map(|server| &server["data"]) {
        let connections = server["connections"].as_array().map_or(&[][..], Vec::as_slice);
        unseen += server["total"].as_u64().unwrap_or(u64::MAX).saturating_sub(connections.len() as u64);
        for connection in connections {
            let user = connection["authorized_user"].as_str().unwrap_or("nobody");
            let version = connection["tls_version"].as_str().unwrap_or_default();
            *users.entry(user).or_default().entry(version).or_default() += 1;
        }
    }
    let mut findings: Vec<Finding> =
        users.into_iter().map(|(user, versions)| of_user(user, &versions)).collect();
    if unseen > 0 {
        let seen = format!("{unseen} connections are beyond what the broker lists");
        findings.push(Finding::link("others to the broker", Protection::Unknown, seen, CONNZ));
    }
    findings
}

fn of_user(user: &str, versions: &BTreeMap<&str, usize>) -> Finding {
    let plain = versions.get("").copied().unwrap_or(0);
    let seen = versions.iter().map(|(version, number)| match *version {
        "" => format!("{number} without TLS"),
        version => format!("{number} with TLS {version}"),
    });
    let seen = seen.collect::<Vec<_>>().join(", ");
    Finding::link(
        format!("{user} to the broker"),
        Protection::unless(plain as i64, Protection::Tls),
        seen,
        CONNZ,
    )
}

/// The links between servers, if there are any. A server that another one has a route to and that does not answer is none
/// of which anything is known.
fn cluster(servers: &[Value], routes: &[Value]) -> Option<Finding> {
    let links = routes.iter().filter_map(|server| server["data"]["routes"].as_array()).flatten();
    let answered: Vec<&str> =
        servers.iter().filter_map(|server| server["data"]["server_id"].as_str()).collect();
    let (mut number, mut silent) = (0, 0);
    for link in links {
        number += 1;
        silent += usize::from(!link["remote_id"].as_str().is_some_and(|id| answered.contains(&id)));
    }
    let plain = servers.iter().filter(|server| server["data"]["cluster"]["tls_required"] != true).count();
    let protection = match (plain, silent) {
        (0, 0) => Protection::Tls,
        (0, _) => Protection::Unknown,
        _ => Protection::Clear,
    };
    let seen = format!("{number} routes; {plain} of {} servers without TLS, {silent} silent", servers.len());
    (number > 0).then(|| Finding::link("between the broker's servers", protection, seen, "ROUTEZ, VARZ"))
}

/// A finding a store. A folder says nothing when it is that of another machine, or of two servers, of which at most one has
/// its files here.
fn jetstreams(servers: &[Value]) -> Vec<Finding> {
    let folder = |server: &Value| -> Option<PathBuf> {
        let named = Path::new(server["data"]["config"]["store_dir"].as_str()?);
        Some(fs::canonicalize(named).unwrap_or_else(|_| named.to_owned()))
    };
    let folders: Vec<_> = servers.iter().map(folder).collect();
    let finding = |(server, folder): (&Value, &Option<PathBuf>)| {
        let why = match folder {
            None => "no folder".to_owned(),
            Some(shared) if folders.iter().filter(|other| *other == folder).count() > 1 => {
                format!("{}: named by several servers", shared.display())
            }
            Some(_) if !is_here(text(&server["server"]["host"])) => {
                format!("not known to be on this machine: it listens at {}", text(&server["server"]["host"]))
            }
            Some(folder) => return jetstream(server, folder),
        };
        Finding::store(store_name(server), Protection::Unknown, why, STORED)
    };
    servers.iter().zip(&folders).map(finding).collect()
}

/// Whether `host` is an address of this machine: we can have a port there. One that stands for all addresses does not tell.
fn is_here(host: &str) -> bool {
    let Ok(addresses) = (host, 0).to_socket_addrs() else { return false };
    let addresses: Vec<_> = addresses.collect();
    let here = addresses.iter().all(|at| !at.ip().is_unspecified() && UdpSocket::bind(at).is_ok());
    here && !addresses.is_empty()
}

fn store_name(server: &Value) -> String {
    format!("jobs, payloads and results at the broker {}", text(&server["server"]["name"]))
}

fn jetstream(server: &Value, folder: &Path) -> Finding {
    let (name, store, source) = (store_name(server), &server["data"], STORED);
    let accounts = store["account_details"].as_array().map_or(&[][..], Vec::as_slice);
    let streams: Vec<store::Stream<'_>> = accounts
        .iter()
        .flat_map(|account| {
            let streams = account["stream_detail"].as_array().map_or(&[][..], Vec::as_slice);
            streams.iter().map(|stream| store::Stream {
                account: text(&account["id"]),
                name: text(&stream["name"]),
                subjects: stream["config"]["subjects"].as_array().map_or(&[][..], Vec::as_slice),
            })
        })
        .collect();
    match store::look(folder, &streams) {
        Ok(seen) if seen.in_clear.is_empty() => {
            let seen = format!("{} streams, {} files under {} keys", streams.len(), seen.files, seen.keys);
            Finding::store(name, Protection::Encrypted, seen, source)
        }
        Ok(seen) => {
            let seen =
                format!("{} of {} files, such as {}", seen.in_clear.len(), seen.files, seen.in_clear[0]);
            Finding::store(name, Protection::Clear, seen, source)
        }
        Err(error) => {
            Finding::store(name, Protection::Unknown, format!("{}: {error}", folder.display()), source)
        }
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_connection_without_tls_is_found_among_others() {
        let connection =
            |user: &str, tls: Option<&str>| json!({ "authorized_user": user, "tls_version": tls });
        let both = [
            connection("ingress", Some("1.3")),
            connection("ingress", None),
            connection("worker", Some("1.3")),
        ];
        let found = clients(&[json!({ "data": { "total": 3, "connections": both } })]);
        let protections: Vec<_> = found.iter().map(|finding| finding.protection).collect();
        assert_eq!(protections, [Protection::Clear, Protection::Tls]);
        assert_eq!(found[0].seen, "1 without TLS, 1 with TLS 1.3");
        let cut = clients(&[json!({ "data": { "total": 4, "connections": [] } })]);
        assert_eq!(cut[0].protection, Protection::Unknown);
    }

    #[test]
    fn a_server_that_answers_late_is_not_forgotten() {
        let answer = |id: &str| json!({ "server": { "id": id, "name": id } });
        let (both, one) = (vec![answer("a"), answer("b")], vec![answer("a")]);
        assert!(silent(&[both.clone(), both.clone()]).is_empty());
        for answers in [[both.clone(), one.clone()], [one, both]] {
            let found = silent(&answers);
            assert_eq!(found.len(), 1);
            assert_eq!(
                (found[0].name.as_str(), found[0].protection),
                ("all of the broker b", Protection::Unknown)
            );
        }
    }

    #[test]
    fn a_folder_counts_for_one_server_on_this_machine() {
        let root = std::env::temp_dir().join(format!("dermflow-stores-{}", uuid::Uuid::new_v4()));
        let store = |host: &str, folder: &str| {
            let folder = root.join(folder);
            fs::create_dir_all(&folder).unwrap();
            json!({ "server": { "host": host }, "data": { "config": { "store_dir": folder } } })
        };
        let judged =
            |servers: &[Value]| jetstreams(servers).iter().map(|found| found.protection).collect::<Vec<_>>();
        let (good, unknown) = (Protection::Encrypted, Protection::Unknown);
        assert_eq!(judged(&[store("127.0.0.1", "a"), store("localhost", "b")]), [good, good]);
        assert_eq!(judged(&[store("127.0.0.1", "a"), store("127.0.0.1", "a/.")]), [unknown, unknown]);
        for host in ["192.0.2.1", "0.0.0.0", "::", ""] {
            assert_eq!(judged(&[store(host, "a"), store("127.0.0.1", "b")]), [unknown, good], "{host}");
        }
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn routes_are_judged_by_every_server() {
        let server =
            |id: &str, tls: bool| json!({ "data": { "server_id": id, "cluster": { "tls_required": tls } } });
        let route = |to: &str| json!({ "data": { "routes": [{ "remote_id": to }] } });
        let judged =
            |servers: &[Value], routes: &[Value]| cluster(servers, routes).map(|found| found.protection);
        let both = [route("a"), route("b")];
        assert_eq!(judged(&[server("a", true), server("b", true)], &both), Some(Protection::Tls));
        assert_eq!(judged(&[server("a", true), server("b", false)], &both), Some(Protection::Clear));
        assert_eq!(judged(&[server("a", true)], &both), Some(Protection::Unknown));
        assert_eq!(judged(&[server("a", false)], &[]), None);
    }
}
