//! `auth`: the command line with which staff register clients.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use dermflow_auth::{
    db::DatabaseOptions,
    password::PepperOptions,
    users::{self, QuotaChange, Role},
};
use dermflow_schemas::{clock, process};
use secrecy::ExposeSecret;

/// Registers the clients of Dermflow.
#[derive(Debug, Parser)]
#[command(name = "auth", version)]
struct Options {
    #[command(flatten)]
    database: DatabaseOptions,
    #[command(flatten)]
    pepper: PepperOptions,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Users: the clients that may sign in.
    #[command(subcommand)]
    User(UserCommand),
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Registers a user and prints the generated password, once, on standard output.
    Create {
        /// 1 to 63 of a-z 0-9 . _ @ - beginning with a letter or digit.
        name: String,
        /// `integrator`, who submits images, or `operator`, who looks after the queue.
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
            let created = users::create(&pool, &options.pepper.load()?, &name, role, clock::now()).await;
            let password = created.context("cannot register")?;
            println!("{}", password.expose_secret());
        }
        Command::User(UserCommand::Disable { name }) => {
            users::disable(&pool, &name).await.context("cannot disable")?;
        }
        Command::User(UserCommand::Quota { name, change }) => {
            users::set_quota(&pool, &name, change).await.context("cannot set the quota")?;
        }
    }
    Ok(())
}
