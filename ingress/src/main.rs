//! `ingress`: the process that clients talk to; `ingress operate`: the one that operators talk to.

use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches};
use dermflow_ingress::{OperateOptions, Options, operate, run};
use dermflow_schemas::process;

const OPERATE: &str = "operate";

#[tokio::main]
async fn main() -> ExitCode {
    process::init();
    let command =
        Options::command().subcommand(OperateOptions::command().name(OPERATE)).subcommand_negates_reqs(true);
    match serve(&command.get_matches()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ingress: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(arguments: &ArgMatches) -> anyhow::Result<()> {
    match arguments.subcommand_matches(OPERATE) {
        Some(arguments) => operate(OperateOptions::from_arg_matches(arguments)?).await,
        None => run(Options::from_arg_matches(arguments)?).await,
    }
}
