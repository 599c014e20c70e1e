//! The registration service: the acts of [`dermflow_auth::registry`] over HTTPS, for staff only.
//!
//! Who comes here shows a certificate that the CA of staff has signed, or the handshake fails; signs in with name and
//! password; and from then on sends the session, which is good with that certificate only. A handler's signature is its
//! access rule: [`access::Reader`] or [`access::Registrar`]. Every attempt is in the audit trail, and what was refused
//! raises a metric.

mod access;
mod accounts;
mod audited;
mod credentials;
mod health;
mod identities;
mod input;
mod listen;
mod metrics;
mod openapi;
mod rates;
mod sessions;

use std::sync::Arc;

use anyhow::Context;
use axum::{Router, middleware::from_fn_with_state, response::Response};
use deadpool_postgres::Pool;
use dermflow_auth::{
    audit::trail::Trail,
    db::{self, DatabaseOptions},
    password::{Hasher, Peppers},
    throttle::Throttle,
    users::{self, Doorkeeper},
};
use dermflow_http::{
    answer::Problem,
    certificate::CertificateFiles,
    crowd::Crowd,
    dress::dressed,
    rates::Rates,
    serve::{bind, https, https_or, mutual_tls_config, tls_config},
};
use dermflow_schemas::{
    error::Code,
    limits::{CLOCK_INTERVAL, NETWORK_CONNECTIONS, STAFF_CONNECTIONS},
    loops::Loops,
    process::told_to_stop,
};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use utoipa_axum::{router::OpenApiRouter, routes};

pub(crate) use listen::ServeOptions;

use self::{access::Reader, metrics::Metrics};

/// What every handler shares.
#[derive(Debug)]
struct Service {
    pool: Pool,
    peppers: Peppers,
    doorkeeper: Doorkeeper,
    trail: Trail,
    rates: Rates,
    metrics: Metrics,
    /// The document that describes the API.
    api: String,
}

/// Serves until SIGTERM or SIGINT, then lets requests in flight finish.
///
/// # Errors
/// One clear sentence when something it needs at start is missing, broken or out of reach, when the address is open to
/// the public and that was not said twice, or when one of its loops ended.
pub(crate) async fn run(
    options: ServeOptions,
    database: &DatabaseOptions,
    peppers: Peppers,
) -> anyhow::Result<()> {
    let address = options.address()?;
    let files = CertificateFiles::open(&options.tls_cert, &options.tls_key)?;
    let tls = mutual_tls_config(files.served(), &options.staff_ca)?;
    let internal_tls = tls_config(files.served())?;
    let pool = database.pool("auth", STAFF_CONNECTIONS)?;
    users::migrate(&pool).await?;
    db::follow_clock(&pool).await?;
    let metrics = Metrics::new()?;
    files.served().register(&metrics.registry)?;
    let (routes, api) = routes().split_for_parts();
    let service = Arc::new(Service {
        trail: Trail::start(pool.clone(), metrics.audit_lost.clone()),
        doorkeeper: Doorkeeper {
            throttle: Throttle::new(&peppers),
            hasher: Hasher::new(peppers.clone()).context("cannot hash passwords")?,
        },
        pool,
        peppers,
        rates: Rates::default(),
        metrics,
        api: api.to_json().context("the OpenAPI document")?,
    });
    let listener = bind("listen", address).await?;
    let internal = bind("internal-listen", options.internal_listen.into()).await?;
    let crowd = || Crowd::new(NETWORK_CONNECTIONS, service.metrics.turned_away.clone());
    let (crowd, internal_crowd) = (crowd(), crowd());
    let stop = CancellationToken::new();
    let handshakes = service.clone();
    let refused = move |source, error| {
        let service = handshakes.clone();
        async move { audited::handshake(&service, source, &error).await }
    };
    let (mut listeners, mut loops) = (Loops::default(), Loops::default());
    loops.spawn("the look at the certificate", files.follow(stop.clone()));
    loops.spawn("the timekeeper", keep_time(service.clone(), stop.clone()));
    let health = health::router(service.clone());
    listeners
        .spawn("the internal listener", https(internal, internal_tls, health, internal_crowd, stop.clone()));
    let routes = router(routes, service);
    listeners.spawn("the listener", https_or(listener, tls, routes, refused, crowd, stop.clone()));
    tracing::info!(listen = %address, "ready for staff");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let told = told_to_stop([&mut listeners, &mut loops]).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    stop.cancel();
    let served = listeners.ended().await;
    let ended = loops.ended().await;
    told?;
    served?;
    Ok(ended?)
}

/// Goes by the database's clock, as ingress does, which judges by what is written here; and forgets who has not called
/// for long.
async fn keep_time(service: Arc<Service>, stop: CancellationToken) {
    let mut tick = interval(CLOCK_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
        }
        // There is nobody to exchange counts with.
        let _ = service.rates.round();
        if let Err(error) = db::follow_clock(&service.pool).await {
            tracing::debug!(%error, "the last correction of the clock holds");
        }
    }
}

/// The whole API, and the document that describes it.
fn routes() -> OpenApiRouter<Arc<Service>> {
    OpenApiRouter::with_openapi(openapi::document())
        .routes(routes!(sessions::open, sessions::close))
        .routes(routes!(accounts::list, accounts::create))
        .routes(routes!(accounts::show, accounts::change, accounts::delete))
        .routes(routes!(accounts::password))
        .routes(routes!(accounts::revoke))
        .routes(routes!(credentials::add))
        .routes(routes!(credentials::rotate))
        .routes(routes!(credentials::remove))
        .routes(routes!(identities::link, identities::unlink))
        .routes(routes!(openapi::describe))
}

fn router(routes: Router<Arc<Service>>, service: Arc<Service>) -> Router {
    // Who is not signed in does not learn what there is.
    let routes = routes
        .fallback(async |_: Reader| Problem::from(Code::NotFound))
        .method_not_allowed_fallback(async |_: Reader| Problem::from(Code::MethodNotAllowed))
        .layer(from_fn_with_state(service.clone(), rates::tell))
        .layer(from_fn_with_state(service.clone(), audited::audited))
        .layer(from_fn_with_state(service.clone(), metrics::measure));
    dressed(routes, service)
}

/// 204.
fn done() -> Response {
    axum::response::IntoResponse::into_response(axum::http::StatusCode::NO_CONTENT)
}
