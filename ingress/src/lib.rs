//! HTTPS in, answers out.
//!
//! Ingress owns TLS, tokens on requests, validation, admission, submit, wait, poll, the recorder and the
//! sweeper. It is stateless: run as many as the load balancer needs. It knows nothing of ONNX.
//!
//! Invariants kept here: no 202 and no 200 before record and payload are on disk; the first result of a job
//! wins and is counted once; a client sees only its own jobs; every body, wait and queue has a bound.

mod access;
mod acme;
mod answer;
mod app;
mod audited;
mod batches;
mod bodies;
mod chainer;
mod clear;
mod commit;
mod config;
mod dead;
mod device;
mod drain;
mod element;
mod extract;
mod fhir;
#[doc(hidden)]
pub mod fuzz;
mod index;
mod json;
mod keeper;
mod lanes;
mod language;
mod letters;
mod lines;
mod list;
mod lost;
mod metrics;
mod ndjson;
mod parameters;
mod prefer;
mod providers;
mod rates;
mod recorder;
mod resealer;
mod retention;
mod routes;
mod snomed;
mod store;
mod submit;
mod sweeper;
mod timekeeper;
mod upload;

pub use config::{AcmeOptions, ChallengeKind, ClientOptions, Group, OperateOptions, Options};

use std::sync::{Arc, PoisonError};

use anyhow::Context;
use dermflow_auth::{
    audit::{self, trail::Trail},
    password::Hasher,
    throttle::Throttle,
    token::Tokens,
    users::Doorkeeper,
};
use dermflow_http::{
    balancer::Balancers,
    certificate::CertificateFiles,
    crowd::Crowd,
    door::Door,
    rates::Rates,
    serve::{self, tls_config},
};
use dermflow_schemas::{
    limits::{DATABASE_CONNECTIONS, NETWORK_CONNECTIONS, OPERATOR_CONNECTIONS, SIGN_IN_CONNECTIONS},
    loops::Loops,
    process::told_to_stop,
    queue::{self, NatsOptions, Publisher},
    seal::Keyring,
};
use tokio_util::sync::CancellationToken;

use crate::{
    access::Access,
    acme::Acme,
    app::{App, Bounds},
    commit::{Commits, Entries},
    dead::Operators,
    drain::Drain,
    index::Index,
    lanes::Lanes,
    metrics::Metrics,
    providers::Providers,
    recorder::{Awaited, AwaitedResults},
    store::Store,
};

/// Runs an ingress process until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// One clear sentence when something it needs at start is missing, broken or out of reach, or when one of its loops ended.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let files = CertificateFiles::open(&options.tls_cert, &options.tls_key)?;
    let tls = tls_config(files.served())?;
    let tokens = Tokens::open(&options.signing_keys, options.public_url.as_str())?;
    let peppers = options.pepper.load()?;
    let keyring = Keyring::obtain(&options.sealing).await?;
    let store = Store::new(options.database.pool("ingress", DATABASE_CONNECTIONS)?);
    let sign_ins = options.database.pool("ingress", SIGN_IN_CONNECTIONS)?;
    prepare(&store).await?;
    timekeeper::follow(&store).await;
    let index = Index::open(&store, &keyring).await?;
    let (nats, for_bulk) = (connect(&options.nats).await?, connect(&options.nats).await?);
    let context = prepare_queue(&nats, &options).await?;
    let (commits, entries) = Commits::new();
    let (awaited, results) = Awaited::new();
    let metrics = Metrics::new()?;
    files.served().register(&metrics.registry)?;
    let acme = Acme::new(&options.acme, &options.public_url, &metrics.registry)?;
    let public_tls = options.clients.tls(acme.as_ref().map_or_else(|| files.served(), Acme::served))?;
    let public_url = options.public_url.as_str();
    let providers = Providers::load(options.providers.as_deref(), public_url, &metrics.provider_questions)?;
    let trail = Trail::start(store.pool().clone(), metrics.audit_lost.clone());
    let app = Arc::new(App {
        public_url: options.public_url.as_str().into(),
        asks_for_certificates: options.clients.client_ca.is_some(),
        store,
        tokens,
        access: Access::new(providers.issuers()),
        providers,
        trail,
        rates: Rates::default(),
        doorkeeper: Doorkeeper { throttle: Throttle::new(&peppers), hasher: Hasher::new(peppers)? },
        sign_ins,
        keyring,
        index,
        nats,
        publisher: Publisher::new(context),
        bulk_publisher: Publisher::new(queue::context(for_bulk)),
        commits,
        awaited,
        drain: Drain::default(),
        draining: CancellationToken::new(),
        lanes: Lanes::new(options.ack_wait()),
        metrics,
        bounds: Bounds::new(),
    });
    // Before the first request: a restart forgets nobody who was shut out.
    app.access.refresh(app.store.pool()).await;
    let mut groups = start_groups(&app, entries, results);
    let public = serve::bind("listen", options.listen).await?;
    let plain = serve::bind("plain-listen", options.plain_listen).await?;
    let internal = serve::bind("internal-listen", options.internal_listen.into()).await?;
    let challenge = challenges(acme.as_ref());
    let stop_loops = CancellationToken::new();
    let mut loops = start_loops(&app, &options, &stop_loops);
    loops.spawn("the look at the certificate", files.follow(stop_loops.clone()));
    loops.spawn("the look at the CA of clients", public_tls.clone().follow(stop_loops.clone()));
    if let Some(acme) = acme {
        let replica = acme::Replica::start(app.clone(), acme).await;
        loops.spawn("ACME", replica.run(stop_loops.clone()));
    }
    let in_clear = app.clone();
    let seen = move |request, source| clear::seen(in_clear.clone(), request, source);
    let crowd = || Crowd::new(options.network_connections as usize, app.metrics.turned_away.clone());
    let balancers = Balancers::new(&options.balancers, &options.http_balancers);
    let door = || Door::new(crowd(), balancers.clone(), app.metrics.proxy_headers_refused.clone());
    let (routes, own_routes) = (routes::public(app.clone(), &options.clients), routes::internal(app.clone()));
    let (public_url, stop) = (public_url.into(), app.draining.clone());
    let mut listeners = Loops::default();
    listeners.spawn("the listener", serve::https(public, public_tls, routes, door(), stop.clone()));
    let redirect = serve::redirect(plain, public_url, challenge, seen, door(), stop.clone());
    listeners.spawn("the plain listener", redirect);
    listeners.spawn("the internal listener", serve::https(internal, tls, own_routes, crowd(), stop.clone()));
    tracing::info!(listen = %options.listen, "ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let told = told_to_stop([&mut listeners, &mut loops, &mut groups]).await;
    tracing::info!("draining");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    // Waiting callers need the recorder and its neighbours to the end: listeners first.
    stop.cancel();
    let served = listeners.ended().await;
    stop_loops.cancel();
    let ended = loops.ended().await;
    told?;
    served?;
    Ok(ended?)
}

/// What callers wait for goes on in groups, of each lane and of results, until nobody waits any longer.
fn start_groups(app: &Arc<App>, [interactive, bulk]: [Entries; 2], results: AwaitedResults) -> Loops {
    let mut groups = Loops::default();
    groups.spawn("the commits of one lane", commit::run(app.clone(), interactive));
    groups.spawn("the commits of the other lane", commit::run(app.clone(), bulk));
    groups.spawn("the recorder of awaited results", recorder::run_awaited(app.clone(), results));
    groups
}

/// What goes on beside requests until `stop`.
fn start_loops(app: &Arc<App>, options: &Options, stop: &CancellationToken) -> Loops {
    let mut loops = Loops::default();
    let ack_wait = options.ack_wait();
    loops.spawn("the recorder", recorder::run(app.clone(), stop.clone()));
    loops.spawn("the recorder of progress", recorder::run_progress(app.clone(), stop.clone()));
    loops.spawn("the sweeper", sweeper::run(app.clone(), stop.clone()));
    loops.spawn("the keeper", keeper::run(app.clone(), ack_wait, options.replicas, stop.clone()));
    loops.spawn("the look at accounts", access::run(app.clone(), stop.clone()));
    loops.spawn("the exchange of rates", rates::exchange(app.clone(), app.nats.clone(), stop.clone()));
    loops.spawn("the look at the queue's speed", drain::run(app.clone(), stop.clone()));
    loops.spawn("the timekeeper", timekeeper::run(app.store.clone(), stop.clone()));
    loops.spawn("the chainer", chainer::run(app.clone(), stop.clone()));
    loops.spawn("the resealer", resealer::run(app.clone(), stop.clone()));
    loops.spawn("the look at the sealing keys", resealer::follow_keys(app.clone(), stop.clone()));
    app.providers.start(&mut loops, stop);
    loops
}

/// What the plain listener answers to a certificate authority, by path.
fn challenges(acme: Option<&Acme>) -> impl Fn(&str) -> Option<String> + Clone + Send + Sync + 'static {
    let answers = acme.map(Acme::answers).unwrap_or_default();
    move |path| answers.read().unwrap_or_else(PoisonError::into_inner).get(path).cloned()
}

/// Brings our tables up to date, and looks for those of `auth` that nothing goes without.
async fn prepare(store: &Store) -> anyhow::Result<()> {
    audit::ready(store.pool()).await.context("there is no audit trail: run `auth migrate` first")?;
    store.migrate().await.context("cannot prepare the database")
}

async fn connect(broker: &NatsOptions) -> anyhow::Result<async_nats::Client> {
    broker.connect().await.map_err(anyhow::Error::from_boxed).context("cannot reach the broker")
}

/// JetStream, with the streams that there have to be.
async fn prepare_queue(
    nats: &async_nats::Client,
    options: &Options,
) -> anyhow::Result<async_nats::jetstream::Context> {
    let context = queue::context(nats.clone());
    let ensured = queue::ensure(&context, options.ack_wait(), options.replicas).await;
    ensured.map_err(anyhow::Error::from_boxed).context("cannot prepare the queue")?;
    Ok(context)
}

/// Runs the operators' process until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// One clear sentence when something it needs at start is missing, broken or out of reach, or when one of its loops ended.
pub async fn operate(options: OperateOptions) -> anyhow::Result<()> {
    let files = CertificateFiles::open(&options.tls_cert, &options.tls_key)?;
    let tls = options.clients.tls(files.served())?;
    let tokens = Tokens::open(&options.signing_keys, options.public_url.as_str())?;
    let store = Store::new(options.database.pool("ingress", OPERATOR_CONNECTIONS)?);
    prepare(&store).await?;
    timekeeper::follow(&store).await;
    let nats = connect(&options.nats).await?;
    let (metrics, public_url) = (Metrics::new()?, options.public_url.as_str());
    let providers = Providers::load(options.providers.as_deref(), public_url, &metrics.provider_questions)?;
    let trail = Trail::start(store.pool().clone(), metrics.audit_lost);
    let operators = Arc::new(Operators {
        public_url: options.public_url.as_str().into(),
        store,
        tokens,
        access: Access::new(providers.issuers()),
        providers,
        trail,
        rates: Rates::default(),
        publisher: Publisher::new(queue::context(nats.clone())),
    });
    operators.access.refresh(operators.store.pool()).await;
    let address = options.listen.into();
    let listener = serve::bind("listen", address).await?;
    // Revocations are followed until the last request has ended.
    let (stop_loops, stop) = (CancellationToken::new(), CancellationToken::new());
    let (mut loops, mut requests) = (Loops::default(), Loops::default());
    operators.providers.start(&mut loops, &stop_loops);
    loops.spawn("the look at accounts", access::run(operators.clone(), stop_loops.clone()));
    loops.spawn("the exchange of rates", rates::exchange(operators.clone(), nats, stop_loops.clone()));
    loops.spawn("the timekeeper", timekeeper::run(operators.store.clone(), stop_loops.clone()));
    loops.spawn("the look at the certificate", files.follow(stop_loops.clone()));
    loops.spawn("the look at the CA of clients", tls.clone().follow(stop_loops.clone()));
    let crowd = Crowd::new(NETWORK_CONNECTIONS, metrics.turned_away);
    let routes = routes::operators(operators.clone(), &options.clients);
    requests.spawn("the look at dead letters", dead::resume(operators.clone(), stop.clone()));
    requests.spawn("the listener", serve::https(listener, tls, routes, crowd, stop.clone()));
    tracing::info!(listen = %address, "ready for operators");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let told = told_to_stop([&mut requests, &mut loops]).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.cancel();
    let served = requests.ended().await;
    stop_loops.cancel();
    let ended = loops.ended().await;
    told?;
    served?;
    Ok(ended?)
}
