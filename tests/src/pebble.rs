//! Pebble, the ACME server that Let's Encrypt made for tests, with a DNS server that sends it to this machine for every
//! name. It forgets everything when it stops.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Result, ensure};
use dermflow_local::{
    ports,
    process::{Process, Signal},
    servers::debian_package,
    stack::{Ports, repo},
};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::json;

use crate::{client::Client, lab::Lab, wait::eventually};

const READY_WITHIN: Duration = Duration::from_secs(20);
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct Pebble {
    server: Process,
    _names: Process,
    ca: PathBuf,
    acme: u16,
    management: u16,
}

impl Pebble {
    /// Starts one that validates at the plain and HTTPS ports of `at`, and demands an external account binding with this
    /// id and key, if there is one. The programs are Debian's, or from the folder that `DERMFLOW_PEBBLE` names.
    ///
    /// # Errors
    /// When it cannot be had, or does not become ready.
    pub async fn start(lab: &Lab, folder: &Path, at: &Ports, binding: Option<(&str, &str)>) -> Result<Self> {
        let programs = match std::env::var_os("DERMFLOW_PEBBLE") {
            Some(folder) => folder.into(),
            None => debian_package(repo(), "pebble", |step| println!("{step}")).await?.join("usr/bin"),
        };
        let [acme, management, dns, dns_management] =
            [ports::free()?, ports::free()?, ports::free()?, ports::free()?];
        let local = |port| format!("{}:{port}", Ipv4Addr::LOCALHOST);
        let mut names = Process::new("dns", programs.join("pebble-challtestsrv"), folder.join("dns.log"))
            .args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", ""])
            .args(["-dns01", &local(dns), "-management", &local(dns_management)]);
        names.spawn()?;
        let mut config = json!({
            "listenAddress": local(acme),
            "managementListenAddress": local(management),
            "certificate": lab.pki().cert,
            "privateKey": lab.pki().key,
            "httpPort": at.plain,
            "tlsPort": at.https,
        });
        if let Some((id, key)) = binding {
            config["externalAccountBindingRequired"] = true.into();
            config["externalAccountMACKeys"] = json!({ id: key });
        }
        let file = folder.join("pebble.json");
        fs::write(&file, json!({ "pebble": config }).to_string())?;
        let mut server = Process::new("pebble", programs.join("pebble"), folder.join("pebble.log"))
            .args(["-dnsserver", &local(dns), "-config"])
            .arg(file);
        // Every order is validated anew, and at once.
        server.set_env("PEBBLE_AUTHZREUSE", "0");
        server.set_env("PEBBLE_VA_NOSLEEP", "1");
        let mut pebble = Self { server, _names: names, ca: lab.ca(), acme, management };
        pebble.restart().await?;
        Ok(pebble)
    }

    /// Starts it again, as a server that knows nobody.
    ///
    /// # Errors
    /// When it does not become ready.
    pub async fn restart(&mut self) -> Result<()> {
        self.server.spawn()?;
        let client = Client::new(&self.ca, "")?;
        let ready = async || (client.get(&self.directory()).await.ok()?.status == 200).then_some(());
        eventually("Pebble is ready", READY_WITHIN, ready).await
    }

    /// Stops it.
    ///
    /// # Errors
    /// When it had to be killed.
    pub async fn stop(&mut self) -> Result<()> {
        self.server.stop(Signal::TERM, STOP_WITHIN).await
    }

    /// Its origin.
    pub fn origin(&self) -> String {
        format!("https://localhost:{}", self.acme)
    }

    /// The URL of its directory.
    pub fn directory(&self) -> String {
        format!("{}/dir", self.origin())
    }

    /// The root of what it issues.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn root(&self) -> Result<CertificateDer<'static>> {
        let url = format!("https://localhost:{}/roots/0", self.management);
        let answer = Client::new(&self.ca, "")?.get(&url).await?;
        ensure!(answer.status == 200, "{} {}", answer.status, answer.text);
        Ok(CertificateDer::from_pem_slice(answer.text.as_bytes())?)
    }
}
