//! The public listener's certificate from an ACME server (RFC 8555), without anybody's help: obtained, renewed when the
//! server suggests (RFC 9773) or at two thirds of its life, shared by all replicas.
//!
//! Account, certificate and open challenges are in the database, keys sealed. Every replica looks there each
//! [`ACME_LOOK`]: it serves a newer certificate, answers the challenges, whichever replica the server asks, and tries to
//! take the renewal when that is due. A lease sees to it that one does at a time.

mod order;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context, ensure};
use aws_lc_rs::digest::{SHA256, digest};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use clap::{Args, ValueEnum};
use dermflow_http::certificate::ServerCertificate;
use dermflow_schemas::{
    clock,
    limits::{ACME_ASK, ACME_ASK_BOUNDS, ACME_DEADLINE, ACME_LEASE, ACME_LOOK, ACME_RETRY, ACME_RETRY_MOST},
    process::read_secret,
    seal::Content,
};
use instant_acme::ExternalAccountKey;
use prometheus::{IntGauge, IntGaugeVec, Opts, Registry};
use rcgen::{CertificateParams, CustomExtension, KeyPair};
use rustls::{
    crypto::aws_lc_rs::{default_provider, sign::any_supported_type},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use secrecy::ExposeSecret;
use time::OffsetDateTime;
use tokio::{
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    app::App,
    config::Origin,
    store::acme::{Challenge, Standing},
};
use order::{Failure, Suggestion};

/// How the server is shown that a name is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ChallengeKind {
    /// Over the plain listener (RFC 8555 §8.3): it has to be what answers on port 80 of the name.
    #[value(name = "http-01")]
    Http01,
    /// Over the public listener (RFC 8737): it has to be what answers on port 443 of the name.
    #[value(name = "tls-alpn-01")]
    TlsAlpn01,
}

/// Where the public listener's certificate comes from, when it is not from files.
#[derive(Debug, Clone, Args)]
pub struct AcmeOptions {
    /// Obtain the public listener's certificate from the ACME server with this directory, an HTTPS URL.
    #[arg(long, env = "DERMFLOW_ACME_DIRECTORY", value_name = "URL")]
    pub acme_directory: Option<String>,
    /// You agree to that server's terms of service.
    #[arg(long, env = "DERMFLOW_ACME_AGREE_TO_TERMS")]
    pub acme_agree_to_terms: bool,
    /// The names of the certificate, with commas between them [default: that of the public URL].
    #[arg(long, env = "DERMFLOW_ACME_NAMES", value_name = "NAMES", value_delimiter = ',')]
    pub acme_names: Vec<String>,
    /// Whom the server may write to, such as `mailto:operators@example.org`.
    #[arg(long, env = "DERMFLOW_ACME_CONTACT", value_name = "URL")]
    pub acme_contact: Option<String>,
    /// How the server is shown that the names are ours.
    #[arg(long, env = "DERMFLOW_ACME_CHALLENGE", value_name = "KIND", value_enum, default_value = "http-01")]
    pub acme_challenge: ChallengeKind,
    /// The CA of the server's own certificate (PEM), when it is not a public one.
    #[arg(long, env = "DERMFLOW_ACME_CA", value_name = "FILE")]
    pub acme_ca: Option<PathBuf>,
    /// External account binding: the key's id, as the server's operator gave it.
    #[arg(long, env = "DERMFLOW_ACME_EAB_KEY_ID", value_name = "ID", requires = "acme_eab_key_file")]
    pub acme_eab_key_id: Option<String>,
    /// External account binding: a file with the MAC key (Base64url).
    #[arg(long, env = "DERMFLOW_ACME_EAB_KEY_FILE", value_name = "FILE", requires = "acme_eab_key_id")]
    pub acme_eab_key_file: Option<PathBuf>,
}

/// Answers to HTTP-01 challenges, by path.
pub(crate) type Answers = Arc<RwLock<HashMap<String, String>>>;

/// A certificate of an ACME server.
pub(crate) struct Acme {
    directory: String,
    contact: Option<String>,
    /// Sorted.
    names: Vec<String>,
    /// All of them, with commas.
    key: String,
    challenge: ChallengeKind,
    external: Option<ExternalAccountKey>,
    http: reqwest::Client,
    served: Arc<ServerCertificate>,
    answers: Answers,
    failed: IntGauge,
    error: IntGaugeVec,
}

impl Acme {
    /// `None` when no server was named. Its metrics go into the registry.
    ///
    /// # Errors
    /// One sentence when an option does not hold.
    pub(crate) fn new(
        options: &AcmeOptions,
        public_url: &Origin,
        registry: &Registry,
    ) -> anyhow::Result<Option<Self>> {
        let Some(directory) = options.acme_directory.clone() else { return Ok(None) };
        ensure!(directory.starts_with("https://"), "--acme-directory: not an HTTPS URL");
        ensure!(options.acme_agree_to_terms, "--acme-directory: --acme-agree-to-terms is needed");
        let mut names = options.acme_names.clone();
        if names.is_empty() {
            names.push(public_url.host().to_owned());
        }
        names.sort();
        names.dedup();
        let mut http = reqwest::Client::builder()
            .https_only(true)
            .redirect(reqwest::redirect::Policy::none())
            .timeout(ACME_DEADLINE / 4);
        if let Some(file) = &options.acme_ca {
            let certificates =
                reqwest::Certificate::from_pem_bundle(&std::fs::read(file).context("--acme-ca")?);
            http = http.tls_certs_only(certificates.context("--acme-ca")?);
        }
        let external = options.acme_eab_key_id.clone().zip(options.acme_eab_key_file.as_ref());
        let external = external.map(|(id, file)| {
            let key = read_secret(file).context("--acme-eab-key-file")?;
            let key = URL_SAFE_NO_PAD.decode(key.expose_secret().trim_end_matches('='));
            Ok::<_, anyhow::Error>(ExternalAccountKey::new(
                id,
                &key.context("--acme-eab-key-file: not Base64url")?,
            ))
        });
        let failed = "When the ACME server last gave no certificate (Unix time; 0: never).";
        let error = Opts::new("dermflow_acme_error", "The kind of the last failure: 1.");
        let acme = Self {
            directory,
            contact: options.acme_contact.clone(),
            key: names.join(","),
            names,
            challenge: options.acme_challenge,
            external: external.transpose()?,
            http: http.build().context("--acme-ca")?,
            served: ServerCertificate::new("acme")?,
            answers: Answers::default(),
            failed: IntGauge::new("dermflow_acme_failed_seconds", failed)?,
            error: IntGaugeVec::new(error, &["kind"])?,
        };
        acme.served.register(registry)?;
        registry.register(Box::new(acme.failed.clone()))?;
        registry.register(Box::new(acme.error.clone()))?;
        Ok(Some(acme))
    }

    /// What the public listener serves.
    pub(crate) fn served(&self) -> Arc<ServerCertificate> {
        self.served.clone()
    }

    /// What the plain listener answers an ACME server with.
    pub(crate) fn answers(&self) -> Answers {
        self.answers.clone()
    }
}

/// What a replica has made of what is in the database.
pub(crate) struct Replica {
    app: Arc<App>,
    acme: Arc<Acme>,
    issued_at: Option<OffsetDateTime>,
    failed_at: Option<OffsetDateTime>,
    challenges: Vec<Challenge>,
    renewal: Option<JoinHandle<()>>,
    question: Option<JoinHandle<()>>,
}

impl Replica {
    /// Serves the certificate that is there already.
    pub(crate) async fn start(app: Arc<App>, acme: Acme) -> Self {
        let (acme, challenges) = (Arc::new(acme), Vec::new());
        let (issued_at, failed_at, renewal, question) = (None, None, None, None);
        let mut replica = Self { app, acme, issued_at, failed_at, challenges, renewal, question };
        replica.look().await;
        replica
    }

    /// Looks every [`ACME_LOOK`] until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut look = interval(ACME_LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                _ = look.tick() => self.look().await,
            }
        }
        for task in [self.renewal, self.question].into_iter().flatten() {
            task.abort();
        }
    }

    async fn look(&mut self) {
        if let Err(error) = self.round().await {
            tracing::warn!(%error, "ACME");
        }
    }

    async fn round(&mut self) -> anyhow::Result<()> {
        let (app, acme) = (&self.app, &self.acme);
        let standing = app.store.acme_standing(&acme.key, clock::now()).await?;
        // First: what is stored may be no good.
        if standing.is_due && self.renewal.as_ref().is_none_or(JoinHandle::is_finished) {
            self.renewal = Some(tokio::spawn(renew(app.clone(), acme.clone())));
        }
        if standing.is_to_be_asked && self.question.as_ref().is_none_or(JoinHandle::is_finished) {
            self.question = Some(tokio::spawn(ask(app.clone(), acme.clone())));
        }
        if standing.issued_at != self.issued_at {
            serve(app, acme).await?;
            self.issued_at = standing.issued_at;
        }
        self.note(&standing);
        if standing.challenges != self.challenges {
            self.challenges = standing.challenges;
            show(&self.acme, &self.challenges)?;
        }
        Ok(())
    }

    fn note(&mut self, standing: &Standing) {
        let Some((at, kind)) = standing.failed.as_ref().filter(|(at, _)| Some(*at) != self.failed_at) else {
            return;
        };
        self.failed_at = Some(*at);
        self.acme.failed.set(at.unix_timestamp());
        self.acme.error.reset();
        self.acme.error.with_label_values(&[kind]).set(1);
    }
}

/// Answers these challenges, in either way: the server asks in the one that it was told.
fn show(acme: &Acme, challenges: &[Challenge]) -> anyhow::Result<()> {
    let path = |challenge: &Challenge| format!("/.well-known/acme-challenge/{}", challenge.token);
    let answers = challenges.iter().map(|challenge| (path(challenge), challenge.key_authorization.clone()));
    *acme.answers.write().unwrap_or_else(PoisonError::into_inner) = answers.collect();
    let certificates = challenges.iter().map(|challenge| {
        let digest = digest(&SHA256, challenge.key_authorization.as_bytes());
        let mut certificate = CertificateParams::new([challenge.name.clone()])?;
        certificate.custom_extensions = vec![CustomExtension::new_acme_identifier(digest.as_ref())];
        let key = KeyPair::generate()?;
        let chain = vec![certificate.self_signed(&key)?.der().clone()];
        // Not `from_der`: it reads the certificate, whose critical extension it does not know.
        let key = any_supported_type(&PrivateKeyDer::Pkcs8(key.serialize_der().into()))?;
        anyhow::Ok((challenge.name.clone(), Arc::new(CertifiedKey::new(chain, key))))
    });
    acme.served.answer_challenges(certificates.collect::<anyhow::Result<_>>()?);
    Ok(())
}

/// Serves the certificate that is in the database. One that cannot be served is due at once.
async fn serve(app: &App, acme: &Acme) -> anyhow::Result<()> {
    let Some((chain, key, issued_at)) = app.store.acme_certificate(&acme.key).await? else { return Ok(()) };
    let opened = app.keyring.open(Content::CertificateKey(&acme.key), &key).map_err(anyhow::Error::from);
    match opened.and_then(|key| certified(&chain, PrivateKeyDer::Pkcs8(key.into()))) {
        Ok(certified) => {
            acme.served.serve(certified);
            tracing::info!(names = acme.key, "the certificate is served");
        }
        Err(error) => {
            acme.served.refuse();
            tracing::error!(%error, "the certificate that is stored cannot be served: another one is needed");
            app.store.acme_renew(&acme.key, issued_at).await?;
        }
    }
    Ok(())
}

/// A chain (PEM) with its key.
fn certified(chain: &str, key: PrivateKeyDer<'static>) -> anyhow::Result<CertifiedKey> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(chain.as_bytes()).collect();
    Ok(CertifiedKey::from_der(chain?, key, &default_provider())?)
}

/// Obtains a certificate, if no other replica does.
async fn renew(app: Arc<App>, acme: Arc<Acme>) {
    let (holder, leased_until) = (Uuid::now_v7(), Instant::now() + ACME_LEASE);
    let failures = match app.store.acme_claim(&acme.key, holder, clock::now()).await {
        Ok(Some(failures)) => failures,
        Ok(None) => return,
        Err(error) => return tracing::warn!(%error, "the renewal cannot be taken"),
    };
    let outcome = order::obtain(&app, &acme, holder);
    let outcome = timeout(ACME_DEADLINE, outcome).await.unwrap_or(Err(Failure::TimedOut));
    let pause = pause(failures);
    match &outcome {
        Ok(obtained) => {
            tracing::info!(names = acme.key, not_after = %obtained.not_after, "a certificate was issued");
        }
        Err(failure) => {
            tracing::error!(names = acme.key, error = %failure, again_in = ?pause, "no certificate was issued");
        }
    }
    // The database may be away for a moment, and a certificate is dear.
    loop {
        let now = clock::now();
        let noted = match &outcome {
            Ok(obtained) => app.store.acme_issued(&acme.key, holder, obtained).await,
            Err(failure) => app.store.acme_failed(&acme.key, holder, failure.kind(), now, now + pause).await,
        };
        let Err(error) = noted else { break };
        tracing::error!(%error, "what came of the renewal is not recorded yet");
        if Instant::now() > leased_until {
            return;
        }
        sleep(ACME_LOOK).await;
    }
    if let Err(error) = app.store.acme_challenges(&acme.key, holder, &[]).await {
        tracing::warn!(%error, "challenges stay");
    }
}

/// Asks the server when it wants the certificate renewed, if no other replica does. Without a word of its, that stays as it
/// is.
async fn ask(app: Arc<App>, acme: Arc<Acme>) {
    let now = clock::now();
    let asked = async {
        let Some(chain) = app.store.acme_ask(&acme.key, now, now + ACME_ASK).await? else { return Ok(()) };
        let Some(Suggestion { window, again_in }) = order::suggestion(&app, &acme, &chain).await? else {
            return Ok(());
        };
        let [least, most] = ACME_ASK_BOUNDS;
        let again_at = now + again_in.clamp(least, most);
        let renew_at = window[0] + (window[1] - window[0]) * fastrand::f64();
        tracing::info!(names = acme.key, start = %window[0], end = %window[1], "the ACME server's window");
        Ok::<_, Failure>(app.store.acme_suggested(&acme.key, &chain, window, renew_at, again_at).await?)
    };
    if let Err(error) = timeout(ACME_DEADLINE, asked).await.unwrap_or(Err(Failure::TimedOut)) {
        tracing::warn!(names = acme.key, %error, "the ACME server does not say when to renew");
    }
}

/// Before the next try after so many that failed: twice as long each time, and not at the same moment as others'.
fn pause(failures: i32) -> Duration {
    let doubled = ACME_RETRY.saturating_mul(1 << failures.clamp(0, 16)).min(ACME_RETRY_MOST);
    doubled.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        for (failures, least) in [(0, ACME_RETRY / 2), (1, ACME_RETRY), (3, ACME_RETRY * 4)] {
            let pause = pause(failures);
            assert!((least..=least * 2).contains(&pause), "{failures}: {pause:?}");
        }
        for failures in [20, i32::MAX] {
            assert!((ACME_RETRY_MOST / 2..=ACME_RETRY_MOST).contains(&pause(failures)));
        }
    }
}
