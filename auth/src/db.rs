//! The way to PostgreSQL: verified TLS or a Unix socket, a bounded pool, migrations that replicas may race.

use std::{path::PathBuf, sync::Arc, time::Duration};

use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use dermflow_http::answer::Problem;
use dermflow_schemas::{clock, error::Code, limits, process::read_secret};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use secrecy::ExposeSecret;
use tokio_postgres::config::{Host, SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Why the database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The connection string has a host that is no Unix socket, and no CA was given.
    #[error("--database names a network host: --database-ca must name the CA that signed its certificate")]
    PlainNetwork,
    /// The connection string has a password, which `ps` would show.
    #[error("--database has a password, where others can read it: put it into --database-password-file")]
    Password,
    /// The connection string cannot be read.
    #[error("--database: {0}")]
    Config(tokio_postgres::Error),
    /// A file cannot be read.
    #[error("{0}")]
    File(#[from] std::io::Error),
    /// The CA file holds no certificate.
    #[error("--database-ca holds no PEM certificate: {0}")]
    Ca(String),
    /// No connection from the pool within the deadline, or none can be made.
    #[error("no connection to the database: {0}")]
    Pool(#[from] deadpool_postgres::PoolError),
    /// A statement failed.
    #[error("database statement failed: {0}")]
    Statement(#[from] tokio_postgres::Error),
    /// A migration failed, or the database was migrated by a newer build.
    #[error("migration failed: {0}")]
    Migration(#[from] refinery::Error),
    /// The server did not answer within twice [`limits::DATABASE_DEADLINE`].
    #[error("the database does not answer")]
    Silent,
    /// The pool cannot be built.
    #[error("cannot build the pool: {0}")]
    Build(#[from] deadpool_postgres::BuildError),
}

impl From<DbError> for Problem {
    /// The cause goes to the log, not to the caller.
    fn from(error: DbError) -> Self {
        tracing::warn!(%error, "database");
        Code::DatabaseUnavailable.into()
    }
}

/// How a process reaches PostgreSQL.
#[derive(Debug, Clone, clap::Args)]
pub struct DatabaseOptions {
    /// libpq connection string without a password; `host` is a Unix socket's folder, or a host that speaks TLS.
    #[arg(long, env = "DERMFLOW_DATABASE")]
    pub database: String,
    /// File with the password.
    #[arg(long, env = "DERMFLOW_DATABASE_PASSWORD_FILE")]
    pub database_password_file: PathBuf,
    /// The CA that signed the server's certificate (PEM); required for anything but a Unix socket.
    #[arg(long, env = "DERMFLOW_DATABASE_CA")]
    pub database_ca: Option<PathBuf>,
}

impl DatabaseOptions {
    /// A pool of at most `size` connections whose tables are in `schema`. Connects lazily.
    ///
    /// Every wait on it is bounded by [`limits::DATABASE_DEADLINE`], and so is every statement.
    ///
    /// # Errors
    /// When the options are not usable: see [`DbError`].
    pub fn pool(&self, schema: &str, size: usize) -> Result<Pool, DbError> {
        let mut config: tokio_postgres::Config = self.database.parse().map_err(DbError::Config)?;
        // `hostaddr` overrules `host`.
        let on_network = config.get_hosts().iter().any(|host| matches!(host, Host::Tcp(_)))
            || !config.get_hostaddrs().is_empty();
        if config.get_password().is_some() {
            return Err(DbError::Password);
        }
        if (on_network || config.get_hosts().is_empty()) && self.database_ca.is_none() {
            return Err(DbError::PlainNetwork);
        }
        config
            .password(read_secret(&self.database_password_file)?.expose_secret())
            .ssl_mode(if on_network { SslMode::Require } else { SslMode::Disable })
            .connect_timeout(limits::DATABASE_DEADLINE)
            .keepalives_idle(Duration::from_secs(10))
            .application_name("dermflow");
        let tls = MakeRustlsConnect::new(self.tls()?);
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let session = format!(
            "SET search_path = {schema}; SET statement_timeout = {}; SET timezone = 'UTC'",
            limits::DATABASE_DEADLINE.as_millis()
        );
        let prepare = Hook::async_fn(move |client: &mut deadpool_postgres::ClientWrapper, _| {
            let session = session.clone();
            Box::pin(async move { client.batch_execute(&session).await.map_err(HookError::Backend) })
        });
        let pool = Pool::builder(Manager::from_config(config, tls, recycling))
            .max_size(size)
            .wait_timeout(Some(limits::DATABASE_DEADLINE))
            .create_timeout(Some(limits::DATABASE_DEADLINE))
            .recycle_timeout(Some(limits::DATABASE_DEADLINE))
            .post_create(prepare)
            .runtime(Runtime::Tokio1)
            .build()?;
        Ok(pool)
    }

    /// The folders of the Unix sockets that it names.
    ///
    /// # Errors
    /// When the connection string cannot be read.
    pub fn sockets(&self) -> Result<Vec<PathBuf>, DbError> {
        let config: tokio_postgres::Config = self.database.parse().map_err(DbError::Config)?;
        let folder = |host: &Host| if let Host::Unix(folder) = host { Some(folder.clone()) } else { None };
        Ok(config.get_hosts().iter().filter_map(folder).collect())
    }

    fn tls(&self) -> Result<ClientConfig, DbError> {
        let mut roots = RootCertStore::empty();
        if let Some(path) = &self.database_ca {
            let bad = |error: String| DbError::Ca(format!("{}: {error}", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(|e| bad(e.to_string()))? {
                let certificate = certificate.map_err(|e| bad(e.to_string()))?;
                roots.add(certificate).map_err(|e| bad(e.to_string()))?;
            }
            if roots.is_empty() {
                return Err(bad("empty".into()));
            }
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| DbError::Ca(e.to_string()))?;
        Ok(builder.with_root_certificates(roots).with_no_client_auth())
    }
}

/// Goes by the database's clock from now on; returns how many seconds this machine's is behind.
///
/// # Errors
/// When the database is away.
pub async fn follow_clock(pool: &Pool) -> Result<f64, DbError> {
    within(async {
        let reference = pool.get().await?.query_one("SELECT clock_timestamp()", &[]).await?.get(0);
        Ok(clock::follow(reference))
    })
    .await
}

/// Puts a limit on `work` that holds even when the server is too far gone to keep its own.
///
/// # Errors
/// [`DbError::Silent`] after twice [`limits::DATABASE_DEADLINE`]; else what `work` gives.
pub async fn within<T, E: From<DbError>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let answer = tokio::time::timeout(2 * limits::DATABASE_DEADLINE, work).await;
    answer.unwrap_or_else(|_| Err(DbError::Silent.into()))
}

/// Applies `migrations` once, however many processes call this at the same time: the others wait for the one
/// that holds the advisory lock, then find nothing left to do.
///
/// # Errors
/// When the database is away, or a migration fails.
pub async fn migrate(pool: &Pool, migrations: &refinery::Runner) -> Result<(), DbError> {
    const LOCK: i64 = 0x0064_6572_6d66_6c6f;
    let mut client = pool.get().await?;
    client.batch_execute(&format!("SET statement_timeout = '60s'; SELECT pg_advisory_lock({LOCK})")).await?;
    let outcome = migrations.run_async(&mut **client).await;
    // The lock and the setting are the session's: they end with it.
    drop(deadpool_postgres::Object::take(client));
    outcome?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(database: &str, ca: Option<&str>) -> DatabaseOptions {
        DatabaseOptions {
            database: database.into(),
            database_password_file: "/dev/null".into(),
            database_ca: ca.map(Into::into),
        }
    }

    #[test]
    fn only_a_unix_socket_goes_without_a_ca() {
        let plain = |database| options(database, None).pool("auth", 1);
        assert!(plain("host=/run/postgresql user=a dbname=b").is_ok());
        for network in [
            "host=localhost user=a",
            "host=127.0.0.1 user=a",
            "host=/run,db.internal user=a",
            "user=a",
            "host=/run hostaddr=10.0.0.5 user=a",
        ] {
            assert!(matches!(plain(network), Err(DbError::PlainNetwork)), "{network}");
        }
    }

    #[test]
    fn no_password_is_an_argument() {
        for database in ["host=/run/postgresql user=a password=b", "postgres://a:b@%2Frun%2Fpostgresql/c"] {
            assert!(matches!(options(database, None).pool("auth", 1), Err(DbError::Password)), "{database}");
        }
    }

    #[test]
    fn a_ca_file_without_a_certificate_is_refused() {
        let pool = options("host=db.internal user=a", Some("/dev/null")).pool("auth", 1);
        assert!(matches!(pool, Err(DbError::Ca(_))));
    }
}
