//! `auth`: the command line with which staff register clients.

mod audit_command;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use dermflow_auth::{
    db::DatabaseOptions,
    users::{self, QuotaChange, Role},
};
use dermflow_schemas::{clock, process};
use secrecy::ExposeSecret;

use crate::audit_command::AuditCommand;

/// Registers the clients of Dermflow.
#[derive(Debug, Parser)]
#[command(name = "auth", version)]
struct Options {
    #[command(flatten)]
    database: DatabaseOptions,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Users: the clients that may sign in.
    #[command(subcommand)]
    User(UserCommand),
    /// The audit trail.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Makes the tables, or brings them up to date, and does nothing else. Needed before ingress of a new version is
    /// started; every other command does it as well.
    Migrate,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Registers a user and prints the generated password, once, on standard output.
    Create {
        /// 1 to 63 of a-z 0-9 . _ @ - beginning with a letter or digit.
        name: String,
        /// `integrator`, who submits images, `operator`, who looks after the queue, or `auditor`, who reads the audit
        /// trail.
        #[arg(long, default_value = "integrator")]
        role: Role,
    },
    /// Shuts a user out within a second: no new token, and none of its tokens is taken any more.
    Disable {
        /// The user's name.
        name: String,
    },
    /// Sets what a user may have open at once, and its share of the workers.
    Quota {
        /// The user's name.
        name: String,
        #[command(flatten)]
        change: QuotaChange,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    process::init();
    match run(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("auth: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> anyhow::Result<()> {
    let pool = options.database.pool("auth", 2)?;
    users::migrate(&pool).await?;
    match options.command {
        Command::User(UserCommand::Create { name, role }) => {
            let password =
                users::create(&pool, &name, role, clock::now()).await.context("cannot register")?;
            println!("{}", password.expose_secret());
        }
        Command::User(UserCommand::Disable { name }) => {
            users::disable(&pool, &name).await.context("cannot disable")?;
        }
        Command::User(UserCommand::Quota { name, change }) => {
            users::set_quota(&pool, &name, change).await.context("cannot set the quota")?;
        }
        Command::Audit(command) => audit_command::run(&pool, command).await?,
        Command::Migrate => {}
    }
    Ok(())
}
