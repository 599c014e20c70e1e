//! The command line: the acts of [`registry`] for staff with access to the database, and the keys.
//!
//! A password or secret is read from standard input or shown once on standard output; it is never an argument and never
//! in the environment, where `ps` shows it.

use std::{
    io::{self, BufRead, IsTerminal, Write},
    path::PathBuf,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use deadpool_postgres::Pool;
use dermflow_auth::{
    audit::{self, Who},
    confirmation::fingerprint,
    credentials::{BadKey, PublicKey},
    db::{self, DatabaseOptions},
    keys::{self, Key, Keys},
    password::{PepperOptions, Peppers},
    registry::{self, Account, Change, ExternalIdentity, Filter, Given, NewAccount, State},
    users::{self, QuotaChange, Role},
};
use dermflow_schemas::clock;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};
use uuid::Uuid;

use crate::{
    audit_command::{self, AuditCommand},
    encryption_command::{self, EncryptionOptions},
    keys_command::{self, KeysCommand},
    service::{self, ServeOptions},
};

/// Registers the accounts of Dermflow, and keeps the keys that sign access tokens and seal what is stored.
#[derive(Debug, Parser)]
#[command(name = "auth", version, subcommand_negates_reqs = true)]
pub(crate) struct Options {
    #[command(flatten)]
    database: Option<DatabaseOptions>,
    #[command(flatten)]
    pepper: PepperOptions,
    /// JSON instead of text, for a list one document a line. What has nothing to show prints nothing, and errors are
    /// text on standard error.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Brings the tables of accounts up to date, as every other command does first.
    Migrate,
    /// Registers the first administrator, once, and prints the generated password.
    Bootstrap {
        /// 1 to 63 of a-z 0-9 . _ @ - beginning with a letter or digit.
        name: String,
    },
    /// Accounts: clients, and staff.
    #[command(subcommand)]
    User(UserCommand),
    /// What clients prove themselves with at `/oauth/token`: secrets, public keys and certificates.
    #[command(subcommand)]
    Credential(CredentialCommand),
    /// The audit trail.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Which links and stores of the running system are encrypted, and how that is known; exit code 1 unless all of them
    /// are.
    Encryption(EncryptionOptions),
    /// Serves the registration API over HTTPS, for staff with a certificate, until it is told to stop.
    Serve(ServeOptions),
    /// The keys that sign access tokens. Needs no database.
    #[command(subcommand)]
    SigningKey(KeyCommand),
    /// The keys that seal images and reports.
    #[command(subcommand, alias = "sealing-key")]
    Keys(KeysCommand),
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Registers an account and prints the generated password, once, on standard output.
    Create {
        /// 1 to 63 of a-z 0-9 . _ @ - beginning with a letter or digit.
        name: String,
        /// `integrator`, who submits images, `operator`, who looks after the queue, `auditor`, who reads the audit
        /// trail, or `administrator`, who registers the others.
        #[arg(long, default_value = "integrator")]
        role: Role,
        /// Whom to ask about it.
        #[arg(long)]
        contact: Option<String>,
        /// When it expires (RFC 3339).
        #[arg(long, value_parser = moment)]
        expires: Option<OffsetDateTime>,
    },
    /// Lists accounts by name.
    List {
        /// With this role.
        #[arg(long)]
        role: Option<Role>,
        /// `active`, `disabled`, `expired` or `deleted`; all but deleted ones when left out.
        #[arg(long)]
        state: Option<State>,
        /// Whose names begin like this.
        #[arg(long)]
        name: Option<String>,
        /// Not used for so many days.
        #[arg(long)]
        unused_days: Option<u16>,
    },
    /// Shows an account with its credentials.
    Show {
        /// The account's name or id.
        name: String,
    },
    /// Changes an account. With another role its tokens are refused, and its credentials removed.
    Change {
        /// The account's name or id.
        name: String,
        /// What it is for.
        #[arg(long)]
        role: Option<Role>,
        /// Whom to ask about it.
        #[arg(long)]
        contact: Option<String>,
        /// Nobody is to be asked about it any more.
        #[arg(long, conflicts_with = "contact")]
        no_contact: bool,
        /// When it expires (RFC 3339).
        #[arg(long, value_parser = moment)]
        expires: Option<OffsetDateTime>,
        /// Never expires any more.
        #[arg(long, conflicts_with = "expires")]
        no_expiry: bool,
        /// Whether only tokens that are bound to a client certificate are good, within a second.
        #[arg(long, value_name = "BOOL")]
        certificate_bound: Option<bool>,
        #[command(flatten)]
        sure: Sure,
    },
    /// Shuts an account out within a second: no new token, and none of its tokens is taken any more.
    Disable {
        /// The account's name or id.
        name: String,
    },
    /// Lets it in again.
    Enable {
        /// The account's name or id.
        name: String,
    },
    /// Deletes an account. Nothing personal stays; the audit trail keeps its id.
    Delete {
        /// The account's name or id.
        name: String,
        #[command(flatten)]
        sure: Sure,
    },
    /// Gives an account a new password, and ends everything that was given for the old one.
    Password {
        /// The account's name or id.
        name: String,
        /// Reads it from standard input, one line, instead of generating and printing one.
        #[arg(long)]
        stdin: bool,
    },
    /// Ends everything that an account was given: tokens, refresh tokens, sessions.
    Revoke {
        /// The account's name or id.
        name: String,
    },
    /// Lets the tokens that an external identity provider gives a subject open an account, no further than both
    /// the provider's claims and the account's role go.
    Link {
        /// The account's name or id.
        name: String,
        #[command(flatten)]
        identity: Identity,
    },
    /// Ends that within a second.
    Unlink {
        /// The account's name or id.
        name: String,
        #[command(flatten)]
        identity: Identity,
    },
    /// Sets what an account may have open at once, its share of the workers, and how long its reports are kept: numbers, or
    /// `default` for what every account has.
    Quota {
        /// The account's name or id.
        name: String,
        #[command(flatten)]
        change: QuotaChange,
        /// Puts all of them back.
        #[arg(long, conflicts_with = "QuotaChange")]
        default: bool,
    },
}

#[derive(Debug, Subcommand)]
enum CredentialCommand {
    /// A new secret, printed once with the client's id; or with --key a public key (JWK), with --certificate a client
    /// certificate.
    Add {
        /// The account's name or id.
        name: String,
        /// What to call it.
        #[arg(long)]
        label: String,
        /// A file with the public key, for `private_key_jwt`.
        #[arg(long)]
        key: Option<PathBuf>,
        /// A file with the certificate (PEM), for `tls_client_auth`.
        #[arg(long, conflicts_with = "key")]
        certificate: Option<PathBuf>,
        /// When it expires (RFC 3339).
        #[arg(long, value_parser = moment)]
        expires: Option<OffsetDateTime>,
    },
    /// A new secret, printed once; those before it stay good for a while.
    Rotate {
        /// The account's name or id.
        name: String,
        /// For how many days; with 0 they end at once, and so do their tokens.
        #[arg(long, default_value_t = registry::OVERLAP.whole_days() as u16)]
        overlap_days: u16,
        #[command(flatten)]
        sure: Sure,
    },
    /// Removes a secret, key or certificate; every token that was given for it is refused within a second.
    Remove {
        /// The account's name or id.
        name: String,
        /// The credential's id.
        id: Uuid,
        #[command(flatten)]
        sure: Sure,
    },
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Makes a key that begins to sign in ten minutes, when every replica has published it; the first one at once.
    Add {
        /// The folder, `--signing-keys` of ingress.
        folder: PathBuf,
    },
    /// Lists the published keys by file, in JSON with `kid` and the moment from which each one signs.
    List {
        /// The folder.
        folder: PathBuf,
    },
    /// Removes the keys that have been replaced and whose tokens have expired.
    Prune {
        /// The folder.
        folder: PathBuf,
    },
}

/// A subject of an external identity provider.
#[derive(Debug, Args)]
struct Identity {
    /// The provider: `iss` of its tokens, character by character.
    #[arg(long)]
    issuer: String,
    /// Who it is there: `sub` of its tokens, or what the provider's `subject_claim` names.
    #[arg(long)]
    subject: String,
}

impl From<Identity> for ExternalIdentity {
    fn from(Identity { issuer, subject }: Identity) -> Self {
        Self { issuer, subject }
    }
}

/// Consent to what cannot be undone.
#[derive(Debug, Args)]
pub(crate) struct Sure {
    /// Does not ask.
    #[arg(long)]
    yes: bool,
}

impl Sure {
    /// Goes on when somebody has said that `what` shall be done.
    ///
    /// # Errors
    /// When nobody has.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        if self.yes {
            return Ok(());
        }
        ensure!(io::stdin().is_terminal(), "{what}: say --yes, as there is nobody to ask");
        eprint!("{what}. This cannot be undone. Type yes: ");
        io::stderr().flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if answer.trim() == "yes" { Ok(()) } else { bail!("not done") }
    }
}

fn moment(text: &str) -> Result<OffsetDateTime, String> {
    OffsetDateTime::parse(text, &Rfc3339).map_err(|_| "not of the form 2026-12-31T23:59:59Z".into())
}

/// Runs one command.
///
/// # Errors
/// One sentence.
pub(crate) async fn run(options: Options) -> Result<()> {
    if let Command::SigningKey(command) = options.command {
        return signing_key(command, options.json);
    }
    if let Command::Keys(KeysCommand::Add { folder }) = &options.command {
        return keys_command::add(folder, options.json);
    }
    let database = options.database.context("--database and --database-password-file are needed")?;
    if let Command::Serve(serve) = options.command {
        return service::run(serve, &database, options.pepper.load()?).await;
    }
    let pool = database.pool("auth", 2)?;
    users::migrate(&pool).await?;
    // Ingress goes by the database's clock, and judges by what is written here.
    db::follow_clock(&pool).await?;
    let peppers = options.pepper.load()?;
    let console = Console { pool, peppers, json: options.json, actor: Who::part(audit::COMMAND) };
    match options.command {
        Command::Migrate | Command::SigningKey(_) | Command::Serve(_) => Ok(()),
        Command::Bootstrap { name } => {
            let (id, password) =
                registry::bootstrap(&console.pool, &console.peppers, &console.actor, &name, clock::now())
                    .await?;
            console.secret(json!({ "id": id, "name": name }), "password", &password)
        }
        Command::User(command) => console.user(command).await,
        Command::Credential(command) => console.credential(command).await,
        Command::Audit(command) => audit_command::run(&console.pool, command, options.json).await,
        Command::Encryption(options) => {
            encryption_command::run(&console.pool, &database, options, console.json).await
        }
        Command::Keys(command) => keys_command::run(&console.pool, command, console.json).await,
    }
}

fn signing_key(command: KeyCommand, json: bool) -> Result<()> {
    let now = clock::now();
    let shown = match command {
        KeyCommand::Add { folder } => {
            let begins = if Keys::read(&folder).is_ok() { now + keys::LEAD } else { now };
            vec![keys::add(&folder, begins)?]
        }
        KeyCommand::List { folder } => Keys::read(&folder)?.alive(now).cloned().collect(),
        KeyCommand::Prune { folder } => keys::prune(&folder, now)?,
    };
    for Key { file, id, begins, .. } in shown {
        if json {
            println!("{}", json!({ "file": file, "kid": id, "begins": begins.format(&Rfc3339)? }));
        } else {
            println!("{}", file.display());
        }
    }
    Ok(())
}

struct Console {
    pool: Pool,
    peppers: Peppers,
    json: bool,
    actor: Who,
}

impl Console {
    async fn user(&self, command: UserCommand) -> Result<()> {
        let Self { pool, peppers, actor, .. } = self;
        match command {
            UserCommand::Create { name, role, contact, expires } => {
                let new = NewAccount { name: &name, role, contact: contact.as_deref(), expires_at: expires };
                let created = registry::create(pool, peppers, actor, &new, clock::now())
                    .await
                    .context("cannot register")?;
                return self.secret(json!({ "id": created.0, "name": name }), "password", &created.1);
            }
            UserCommand::List { role, state, name, unused_days } => {
                let unused_since = unused_days.map(|days| clock::now() - Duration::days(days.into()));
                return self
                    .list(Filter { role, state, name, unused_since, after: None, limit: registry::MAX_PAGE })
                    .await;
            }
            UserCommand::Show { name } => {
                let (account, credentials) = registry::get(pool, actor, &name, clock::now()).await?;
                let mut shown = json!(account);
                shown["credentials"] = json!(credentials);
                shown["external_identities"] = json!(registry::identities(pool, account.id).await?);
                println!("{shown:#}");
            }
            UserCommand::Change {
                name,
                role,
                contact,
                no_contact,
                expires,
                no_expiry,
                certificate_bound,
                sure,
            } => {
                if role.is_some() {
                    sure.check(&format!("removes the credentials of {name}"))?;
                }
                let expires_at = if no_expiry { Some(None) } else { expires.map(Some) };
                let contact = if no_contact { Some(None) } else { contact.map(Some) };
                let change = Change { role, contact, expires_at, certificate_bound, ..Change::default() };
                registry::change(pool, actor, &name, &change, clock::now()).await.context("cannot change")?;
            }
            UserCommand::Disable { name } => {
                self.set_disabled(&name, true).await.context("cannot disable")?;
            }
            UserCommand::Enable { name } => {
                self.set_disabled(&name, false).await.context("cannot enable")?;
            }
            UserCommand::Delete { name, sure } => {
                sure.check(&format!("deletes the account {name}"))?;
                registry::delete(pool, actor, &name, clock::now()).await.context("cannot delete")?;
            }
            UserCommand::Password { name, stdin } => {
                let chosen = if stdin { Some(line()?) } else { None };
                let show = chosen.is_none();
                let password =
                    registry::set_password(pool, peppers, actor, &name, chosen, clock::now()).await;
                let password = password.context("cannot set the password")?;
                if show {
                    return self.secret(json!({ "name": name }), "password", &password);
                }
            }
            UserCommand::Revoke { name } => {
                registry::revoke_all(pool, actor, &name, clock::now()).await.context("cannot revoke")?;
            }
            UserCommand::Link { name, identity } => {
                registry::link(pool, actor, &name, &identity.into(), clock::now())
                    .await
                    .context("cannot link")?;
            }
            UserCommand::Unlink { name, identity } => {
                registry::unlink(pool, actor, &name, &identity.into(), clock::now())
                    .await
                    .context("cannot unlink")?;
            }
            UserCommand::Quota { name, change, default } => {
                let quota = if default { QuotaChange::DEFAULT } else { change };
                let change = Change { quota, ..Change::default() };
                registry::change(pool, actor, &name, &change, clock::now())
                    .await
                    .context("cannot set the quota")?;
            }
        }
        Ok(())
    }

    async fn set_disabled(&self, name: &str, disabled: bool) -> Result<()> {
        let change = Change { disabled: Some(disabled), ..Change::default() };
        Ok(registry::change(&self.pool, &self.actor, name, &change, clock::now()).await?)
    }

    /// Every page; a line an account, or in JSON a document an account.
    async fn list(&self, mut filter: Filter) -> Result<()> {
        let mut out = io::stdout().lock();
        loop {
            let page = registry::list(&self.pool, &self.actor, &filter, clock::now()).await?;
            for account in &page {
                if self.json {
                    writeln!(out, "{}", json!(account))?;
                } else {
                    writeln!(out, "{}", row(account))?;
                }
            }
            match page.last() {
                Some(last) if page.len() as i64 == filter.limit => filter.after = Some(last.name.clone()),
                _ => return Ok(()),
            }
        }
    }

    async fn credential(&self, command: CredentialCommand) -> Result<()> {
        let Self { pool, actor, .. } = self;
        match command {
            CredentialCommand::Add { name, label, key: None, certificate: None, expires } => {
                let given = registry::add_secret(pool, actor, &name, &label, expires, clock::now()).await;
                show(&given.context("cannot add a secret")?)
            }
            CredentialCommand::Add { name, label, certificate: Some(file), expires, .. } => {
                let text = std::fs::read(&file).with_context(|| file.display().to_string())?;
                let certificate = fingerprint(&text).ok_or(BadKey::NotCertificate);
                let certificate = certificate.with_context(|| file.display().to_string())?;
                let (pool, now) = (&self.pool, clock::now());
                let given =
                    registry::add_certificate(pool, actor, &name, &label, &certificate, expires, now).await;
                show(&given.context("cannot add the certificate")?)
            }
            CredentialCommand::Add { name, label, key: Some(file), expires, .. } => {
                let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
                let key = PublicKey::parse(&text).with_context(|| file.display().to_string())?;
                let given = registry::add_key(pool, actor, &name, &label, &key, expires, clock::now()).await;
                show(&given.context("cannot add the key")?)
            }
            CredentialCommand::Rotate { name, overlap_days, sure } => {
                if overlap_days == 0 {
                    sure.check(&format!("ends the secrets of {name}"))?;
                }
                let overlap = Duration::days(overlap_days.into());
                let given = registry::rotate(pool, actor, &name, overlap, clock::now()).await;
                show(&given.context("cannot rotate")?)
            }
            CredentialCommand::Remove { name, id, sure } => {
                sure.check(&format!("removes the credential {id} of {name}"))?;
                registry::remove_credential(pool, actor, &name, id, clock::now())
                    .await
                    .context("cannot remove")
            }
        }
    }

    /// What is shown once: alone on a line, or as a member.
    fn secret(&self, mut rest: Value, name: &str, secret: &SecretString) -> Result<()> {
        if self.json {
            rest[name] = json!(secret.expose_secret());
            println!("{rest}");
        } else {
            println!("{}", secret.expose_secret());
        }
        io::stdout().flush().context("the secret could not be shown")
    }
}

/// A credential, with the secret, which is shown once.
fn show(given: &Given) -> Result<()> {
    let mut shown = json!({ "client_id": given.client, "credential": given.credential });
    if let Some(secret) = &given.secret {
        shown["client_secret"] = json!(secret.expose_secret());
    }
    println!("{shown:#}");
    io::stdout().flush().context("the secret could not be shown")
}

fn row(account: &Account) -> String {
    let used = account.last_used_at.and_then(|at| at.date().to_string().into());
    let state = serde_json::to_value(account.state).unwrap_or_default();
    format!(
        "{}\t{}\t{}\t{}\tlast used {}",
        account.name,
        account.role,
        state.as_str().unwrap_or_default(),
        account.id,
        used.as_deref().unwrap_or("never")
    )
}

/// A line of standard input, as it is but for its end.
fn line() -> Result<SecretString> {
    let mut text = String::new();
    io::stdin().lock().read_line(&mut text).context("standard input")?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    Ok(text.strip_suffix('\r').unwrap_or(text).into())
}

#[cfg(test)]
mod tests {
    use std::any::TypeId;

    use clap::{Arg, CommandFactory};

    use super::*;

    /// The options and operands of a command and those below it that take a value and are called like a secret, or
    /// whose environment variable is, and whether they name a file or folder.
    fn telltale(command: &clap::Command) -> Vec<(String, bool)> {
        let is_telltale = |arg: &&Arg| {
            let env = arg.get_env().unwrap_or_default().to_string_lossy().to_lowercase();
            let names = [arg.get_id().as_str(), arg.get_long().unwrap_or_default(), &env];
            let secrets = ["password", "passphrase", "secret", "token", "key", "pepper", "credential"];
            arg.get_action().takes_values()
                && names.iter().any(|name| secrets.iter().any(|secret| name.contains(secret)))
        };
        let is_path = |arg: &Arg| arg.get_value_parser().type_id() == TypeId::of::<PathBuf>();
        let own =
            command.get_arguments().filter(is_telltale).map(|arg| (arg.get_id().to_string(), is_path(arg)));
        own.chain(command.get_subcommands().flat_map(telltale)).collect()
    }

    // `ps` shows arguments, and /proc the environment.
    #[test]
    fn no_secret_is_an_argument_or_in_the_environment() {
        let mut command = Options::command();
        command.build();
        let mut found = telltale(&command);
        found.sort();
        found.dedup();
        let files = [
            "database_password_file",
            "key",
            "nats_password_file",
            "password_pepper",
            "sealing_keys",
            "sealing_keys_command",
            "tls_key",
        ];
        assert_eq!(found, files.map(|name| (name.to_owned(), true)), "a secret comes from a file");
        let options = [
            Arg::new("a").long("api-token"),
            Arg::new("b").env("X_PASSWORD"),
            Arg::new("secret"),
            Arg::new("tokens").action(clap::ArgAction::SetTrue),
        ];
        let bad = clap::Command::new("x").subcommand(clap::Command::new("y").args(options));
        assert_eq!(telltale(&bad), ["a", "b", "secret"].map(|name| (name.to_owned(), false)));
    }

    #[test]
    fn signing_keys_need_no_database() {
        let read =
            |args: &str| Options::try_parse_from(args.split_whitespace()).map(|options| options.database);
        assert!(matches!(read("auth signing-key list keys"), Ok(None)));
        assert!(
            read("auth --database host=/run signing-key list keys").is_err(),
            "half of what a database needs"
        );
        let both = read("auth --database host=/run --database-password-file x user list");
        assert!(matches!(both, Ok(Some(_))), "{both:?}");
    }

    #[test]
    fn a_quota_is_numbers_or_the_default() {
        let quota = |args: &str| {
            let parsed = Options::try_parse_from(format!("auth user quota x {args}").split_whitespace());
            match parsed.map(|options| options.command) {
                Ok(Command::User(UserCommand::Quota { change, default, .. })) => Ok((change, default)),
                other => Err(format!("{other:?}")),
            }
        };
        let some = QuotaChange { jobs: Some(None), weight: Some(Some(3)), ..QuotaChange::default() };
        assert_eq!(quota("--jobs default --weight 3"), Ok((some, false)));
        assert_eq!(quota("--default"), Ok((QuotaChange::default(), true)));
        for bad in ["--jobs many", "--jobs", "--weight 70000", "--default --jobs 7"] {
            assert!(quota(bad).is_err(), "{bad}");
        }
    }
}
