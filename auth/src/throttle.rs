//! How often a password may be guessed, on all replicas together: counted in PostgreSQL, before anything is hashed.
//!
//! - An account at one source: after [`FREE_FAILURES`] wrong passwords in a row the next one waits 1 s, 2 s, 4 s … up
//!   to [`LONGEST_DELAY`], or to [`KNOWN_DELAY`] where the account has signed in before.
//! - An account at all sources that it has never signed in from, together: no more than 100 guesses in any hour
//!   (NIST SP 800-63B-4 §3.2.2).
//! - A source the account did sign in from within 30 days has a budget of its own, as large, which no stranger can use
//!   up: nobody shuts the owner out (OWASP ASVS 5.0 6.1.1).
//! - A source, over all accounts that it never signed in to: no more than 200 guesses in any hour.
//!
//! A right password costs nothing of it, and access tokens do not notice. Names of users that do not exist count like
//! others, so that nothing tells them apart. A source is an IPv4 address or an IPv6 /64; the tables hold keyed hashes.

use std::{net::IpAddr, time::Duration};

use aws_lc_rs::hmac::{self, HMAC_SHA256};
use deadpool_postgres::Pool;
use dermflow_http::crowd::network;
use time::OffsetDateTime;

use crate::{
    db::{self, DbError},
    password::Peppers,
};

/// Wrong passwords in a row, for an account at one source, before the first delay.
pub const FREE_FAILURES: i32 = 5;
/// The longest of these delays.
pub const LONGEST_DELAY: Duration = Duration::from_mins(15);
/// The same at a source that the account signed in from: strangers behind the same address only slow its owner down.
pub const KNOWN_DELAY: Duration = Duration::from_secs(30);
/// Guesses at an account that may come at once, and again as many an hour: 100 in any hour.
const BURST: f64 = 50.0;
/// Guesses of a source that may come at once, and again as many an hour.
const SOURCE_BURST: f64 = 100.0;
/// How long a source is known to an account after a login.
const REMEMBERED: Duration = Duration::from_hours(24 * 30);
/// Sources that are known to one account; the ones that signed in last.
const SOURCES: i32 = 64;

/// Counts guesses.
#[derive(Debug, Clone)]
pub struct Throttle {
    key: hmac::Key,
}

/// A guess that may be checked, and is counted until [`Throttle::settle`] says what came of it.
#[derive(Debug)]
pub struct Guess {
    pair: Vec<u8>,
    account: Vec<u8>,
    source: Vec<u8>,
    known: bool,
}

/// Whether a guess may be checked.
#[derive(Debug)]
pub enum Admission {
    /// It may.
    Granted(Guess),
    /// Not before this time has passed.
    Delayed(Duration),
}

/// What came of a guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The password was right.
    Right,
    /// It was wrong, or there is no such user.
    Wrong,
    /// It was not checked: it does not count.
    Void,
}

impl Outcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Right => "right",
            Self::Wrong => "wrong",
            Self::Void => "void",
        }
    }
}

impl Throttle {
    /// A throttle whose rows say nothing to who does not have the oldest pepper. With another one every source is
    /// strange again.
    pub fn new(peppers: &Peppers) -> Self {
        Self { key: hmac::Key::new(HMAC_SHA256, peppers.oldest()) }
    }

    /// Asks for one guess at the password of `name` from `source`.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn admit(
        &self,
        pool: &Pool,
        name: &str,
        source: IpAddr,
        now: OffsetDateTime,
    ) -> Result<Admission, DbError> {
        let (account, source) = (self.hash(&[b"account", name.as_bytes()]), network(source));
        let pair = self.hash(&[b"pair", name.as_bytes(), &source]);
        let source = self.hash(&[b"source", &source]);
        db::within(async {
            let connection = pool.get().await?;
            let admit = "SELECT known, wait FROM auth.login_admit($1, $2, $3, $4, $4, $5, $5, $6)";
            let admit = connection.prepare_cached(admit).await?;
            let row = connection
                .query_one(&admit, &[&pair, &account, &source, &BURST, &SOURCE_BURST, &now])
                .await?;
            let wait: f64 = row.get("wait");
            if wait > 0.0 {
                return Ok(Admission::Delayed(Duration::from_secs_f64(wait)));
            }
            Ok(Admission::Granted(Guess { pair, account, source, known: row.get("known") }))
        })
        .await
    }

    /// Says what came of a guess. One about which nothing is ever said stays counted.
    ///
    /// # Errors
    /// When the database is away.
    pub async fn settle(
        &self,
        pool: &Pool,
        guess: Guess,
        outcome: Outcome,
        now: OffsetDateTime,
    ) -> Result<(), DbError> {
        let Guess { pair, account, source, known } = guess;
        let longest = if known { KNOWN_DELAY } else { LONGEST_DELAY }.as_secs_f64();
        let remembered = REMEMBERED.as_secs_f64();
        db::within(async {
            let connection = pool.get().await?;
            let settle = "SELECT auth.login_settle($1, $2, $3, $4, $5, $6, make_interval(secs => $7), \
                          make_interval(secs => $8), $9, $10)";
            let settle = connection.prepare_cached(settle).await?;
            let outcome = outcome.as_str();
            let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 10] = [
                &pair,
                &account,
                &source,
                &known,
                &outcome,
                &FREE_FAILURES,
                &longest,
                &remembered,
                &SOURCES,
                &now,
            ];
            connection.execute(&settle, &parameters).await?;
            Ok(())
        })
        .await
    }

    /// Half of an HMAC over the parts, each after its length.
    fn hash(&self, parts: &[&[u8]]) -> Vec<u8> {
        let mut context = hmac::Context::with_key(&self.key);
        for part in parts {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part);
        }
        context.sign().as_ref()[..16].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_say_nothing_without_the_key() {
        let plain = Throttle::new(&Peppers::default());
        let line = format!("a {}", "AQ".repeat(21) + "E=");
        let keyed = Throttle::new(&Peppers::parse(&line.into()).unwrap());
        assert_ne!(plain.hash(&[b"account", b"demo"]), keyed.hash(&[b"account", b"demo"]));
        assert_ne!(plain.hash(&[b"ab", b"c"]), plain.hash(&[b"a", b"bc"]));
    }
}
