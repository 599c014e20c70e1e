//! `auth`: the command line with which staff registers accounts, keeps the keys and sees what is encrypted; `auth serve`:
//! registration over HTTPS.

mod audit_command;
mod cli;
mod encryption_command;
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
