//! What replicas share about the certificate that an ACME server issues.

use bytes::Bytes;
use dermflow_auth::db::within;
use dermflow_schemas::{
    limits::{ACME_LEASE, ACME_RETRY_MOST},
    seal::Sealed,
};
use time::OffsetDateTime;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{Result, Store};

/// How a certificate stands.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// When the latest one was issued.
    pub(crate) issued_at: Option<OffsetDateTime>,
    /// When the last try failed, and of what.
    pub(crate) failed: Option<(OffsetDateTime, String)>,
    /// It is time for another one, and nobody is at it.
    pub(crate) is_due: bool,
    /// It is time to ask the server when to renew it.
    pub(crate) is_to_be_asked: bool,
    pub(crate) challenges: Vec<Challenge>,
}

/// What the ACME server wants to see (RFC 8555 §8.1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Challenge {
    pub(crate) name: String,
    pub(crate) token: String,
    pub(crate) key_authorization: String,
}

/// A certificate as it is stored.
#[derive(Debug)]
pub(crate) struct Obtained {
    /// PEM.
    pub(crate) chain: String,
    pub(crate) key: Sealed,
    pub(crate) issued_at: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
    pub(crate) renew_at: OffsetDateTime,
}

/// Nobody renews the certificate, and it is time to: of a certificate that was never tried, too.
const DUE: &str =
    "coalesce(c.held_until <= $2, true) AND coalesce(greatest(c.renew_at, c.retry_at) <= $2, true)";

fn sealed(row: &Row, key_id: usize, bytes: usize) -> Sealed {
    Sealed { key_id: row.get(key_id), bytes: Bytes::from(row.get::<_, Vec<u8>>(bytes)) }
}

impl Store {
    /// How the certificate of these names stands.
    pub(crate) async fn acme_standing(&self, names: &str, now: OffsetDateTime) -> Result<Standing> {
        within(async {
            let connection = self.pool.get().await?;
            let select = format!(
                "SELECT issued_at, failed_at, error, {DUE}, chain IS NOT NULL AND coalesce(ask_at <= $2, true) \
                 FROM acme_certificates c WHERE names = $1"
            );
            let select = connection.prepare_cached(&select).await?;
            let Some(row) = connection.query_opt(&select, &[&names, &now]).await? else {
                return Ok(Standing { is_due: true, ..Standing::default() });
            };
            let failed = row.get::<_, Option<OffsetDateTime>>(1).zip(row.get(2));
            let select = "SELECT name, token, key_authorization FROM acme_challenges WHERE names = $1";
            let select = connection.prepare_cached(select).await?;
            let challenges = connection.query(&select, &[&names]).await?;
            let challenge =
                |row: &Row| Challenge { name: row.get(0), token: row.get(1), key_authorization: row.get(2) };
            Ok(Standing {
                issued_at: row.get(0),
                failed,
                is_due: row.get(3),
                is_to_be_asked: row.get(4),
                challenges: challenges.iter().map(challenge).collect(),
            })
        })
        .await
    }

    /// The chain (PEM) of the certificate, its key, and when it was issued.
    pub(crate) async fn acme_certificate(
        &self,
        names: &str,
    ) -> Result<Option<(String, Sealed, OffsetDateTime)>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = "SELECT chain, sealing_key, private_key, issued_at FROM acme_certificates \
                          WHERE names = $1 AND chain IS NOT NULL";
            let row = connection.query_opt(select, &[&names]).await?;
            Ok(row.map(|row| (row.get(0), sealed(&row, 1, 2), row.get(3))))
        })
        .await
    }

    /// Takes the renewal of a certificate for `holder`, for [`ACME_LEASE`]: gives how many tries have failed since the
    /// last success, or `None` when it is not due, or another's.
    pub(crate) async fn acme_claim(
        &self,
        names: &str,
        holder: Uuid,
        now: OffsetDateTime,
    ) -> Result<Option<i32>> {
        within(async {
            let connection = self.pool.get().await?;
            let claim = format!(
                "INSERT INTO acme_certificates AS c (names, holder, held_until) VALUES ($1, $3, $4) \
                 ON CONFLICT (names) DO UPDATE SET holder = $3, held_until = $4 WHERE {DUE} RETURNING failures"
            );
            let row = connection.query_opt(&claim, &[&names, &now, &holder, &(now + ACME_LEASE)]).await?;
            Ok(row.map(|row| row.get(0)))
        })
        .await
    }

    /// Takes the question to the server when to renew a certificate: gives the certificate (PEM), or `None` when another
    /// replica asks. The next one is at `again_at`.
    pub(crate) async fn acme_ask(
        &self,
        names: &str,
        now: OffsetDateTime,
        again_at: OffsetDateTime,
    ) -> Result<Option<String>> {
        within(async {
            let connection = self.pool.get().await?;
            let claim = "UPDATE acme_certificates SET ask_at = $3 WHERE names = $1 AND chain IS NOT NULL \
                         AND coalesce(ask_at <= $2, true) RETURNING chain";
            let row = connection.query_opt(claim, &[&names, &now, &again_at]).await?;
            Ok(row.map(|row| row.get(0)))
        })
        .await
    }

    /// Renews a certificate (PEM) at `renew_at`, an instant in the window that the server suggests, unless it did suggest
    /// this one before, and in any case while a tenth of its life is left; asks again at `again_at`. Nothing happens when
    /// there is another certificate by now.
    pub(crate) async fn acme_suggested(
        &self,
        names: &str,
        chain: &str,
        [start, end]: [OffsetDateTime; 2],
        renew_at: OffsetDateTime,
        again_at: OffsetDateTime,
    ) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            let update = "UPDATE acme_certificates SET window_start = $3, window_end = $4, ask_at = $6, renew_at = \
                          CASE WHEN (window_start, window_end) = ($3, $4) THEN renew_at \
                          ELSE least($5, issued_at + (not_after - issued_at) * 0.9) END \
                          WHERE names = $1 AND chain = $2";
            connection.execute(update, &[&names, &chain, &start, &end, &renew_at, &again_at]).await?;
            Ok(())
        })
        .await
    }

    /// The certificate that was issued then is due: what is stored of it is of no use.
    pub(crate) async fn acme_renew(&self, names: &str, issued_at: OffsetDateTime) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            let renew = "UPDATE acme_certificates SET renew_at = NULL WHERE names = $1 AND issued_at = $2";
            connection.execute(renew, &[&names, &issued_at]).await?;
            Ok(())
        })
        .await
    }

    /// Shows these challenges of `holder`'s, and no earlier ones, on every replica. Nothing happens when its lease went
    /// to another.
    pub(crate) async fn acme_challenges(
        &self,
        names: &str,
        holder: Uuid,
        challenges: &[Challenge],
    ) -> Result<()> {
        within(async {
            let mut connection = self.pool.get().await?;
            let transaction = connection.transaction().await?;
            let holds = "SELECT FROM acme_certificates WHERE names = $1 AND holder = $2 FOR UPDATE";
            if transaction.query_opt(holds, &[&names, &holder]).await?.is_none() {
                return Ok(());
            }
            transaction.execute("DELETE FROM acme_challenges WHERE names = $1", &[&names]).await?;
            for Challenge { name, token, key_authorization } in challenges {
                let insert = "INSERT INTO acme_challenges (names, name, token, key_authorization) \
                              VALUES ($1, $2, $3, $4)";
                transaction.execute(insert, &[&names, name, token, key_authorization]).await?;
            }
            Ok(transaction.commit().await?)
        })
        .await
    }

    /// Stores what was issued to `holder`. Nothing happens when its lease went to another. However it stands, there is
    /// no other before [`ACME_RETRY_MOST`]: replicas that cannot open each other's keys would order without end.
    pub(crate) async fn acme_issued(&self, names: &str, holder: Uuid, issued: &Obtained) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            let Obtained { chain, key, issued_at, not_after, renew_at } = issued;
            let update = "UPDATE acme_certificates SET chain = $3, sealing_key = $4, private_key = $5, \
                          issued_at = $6, not_after = $7, renew_at = $8, held_until = NULL, failures = 0, \
                          retry_at = $9, window_start = NULL, window_end = NULL, ask_at = NULL \
                          WHERE names = $1 AND holder = $2";
            let Sealed { key_id, bytes } = key;
            let (bytes, not_before) = (bytes.as_ref(), *issued_at + ACME_RETRY_MOST);
            connection
                .execute(
                    update,
                    &[&names, &holder, chain, key_id, &bytes, issued_at, not_after, renew_at, &not_before],
                )
                .await?;
            Ok(())
        })
        .await
    }

    /// Notes that `holder` got none, and when the next try is.
    pub(crate) async fn acme_failed(
        &self,
        names: &str,
        holder: Uuid,
        error: &str,
        now: OffsetDateTime,
        retry_at: OffsetDateTime,
    ) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            let update = "UPDATE acme_certificates SET held_until = NULL, failures = failures + 1, error = $3, \
                          failed_at = $4, retry_at = $5 WHERE names = $1 AND holder = $2";
            connection.execute(update, &[&names, &holder, &error, &now, &retry_at]).await?;
            Ok(())
        })
        .await
    }

    /// The credentials of the account at a server.
    pub(crate) async fn acme_account(&self, directory: &str) -> Result<Option<Sealed>> {
        within(async {
            let connection = self.pool.get().await?;
            let select = "SELECT sealing_key, credentials FROM acme_accounts WHERE directory = $1";
            Ok(connection.query_opt(select, &[&directory]).await?.map(|row| sealed(&row, 0, 1)))
        })
        .await
    }

    /// Keeps the credentials of an account, in place of those that were there; `None` forgets them.
    pub(crate) async fn acme_set_account(
        &self,
        directory: &str,
        credentials: Option<&Sealed>,
        now: OffsetDateTime,
    ) -> Result<()> {
        within(async {
            let connection = self.pool.get().await?;
            let Some(Sealed { key_id, bytes }) = credentials else {
                connection.execute("DELETE FROM acme_accounts WHERE directory = $1", &[&directory]).await?;
                return Ok(());
            };
            let upsert = "INSERT INTO acme_accounts (directory, sealing_key, credentials, created_at) \
                          VALUES ($1, $2, $3, $4) ON CONFLICT (directory) \
                          DO UPDATE SET sealing_key = $2, credentials = $3, created_at = $4";
            connection.execute(upsert, &[&directory, key_id, &bytes.as_ref(), &now]).await?;
            Ok(())
        })
        .await
    }
}
