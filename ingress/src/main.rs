//! `ingress`: the process that clients talk to.

use std::process::ExitCode;

use clap::Parser;
use dermflow_ingress::{Options, run};
use dermflow_schemas::process;

#[tokio::main]
async fn main() -> ExitCode {
    process::init();
    match run(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ingress: {error:#}");
            ExitCode::FAILURE
        }
    }
}
