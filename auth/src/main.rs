//! `auth`: the command line with which staff registers accounts and keeps the keys; `auth serve`: the same
//! over HTTPS.

mod audit_command;
mod cli;
mod keys_command;
mod service;

use std::process::ExitCode;

use clap::Parser;
use dermflow_schemas::process;

#[tokio::main]
async fn main() -> ExitCode {
    process::init();
    match cli::run(cli::Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("auth: {error:#}");
            ExitCode::FAILURE
        }
    }
}
