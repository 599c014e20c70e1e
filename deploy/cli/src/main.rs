//! `dermflow`: submits many images, shows jobs and batches, handles dead letters.

use std::{
    io::{Write, stderr, stdin, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use dermflow_cli::{
    Failure,
    access::{AccessOptions, Api},
    dead::{self, DeadCommand},
    inputs::Inputs,
    jobs::{self, BatchCommand, JobsCommand},
    progress::{self, Counters},
    submit::{Acceptance, Options, Submission, Summary},
};
use dermflow_schemas::process::shutdown_requested;
use uuid::Uuid;

const EXIT_CODES: &str = "\
Exit codes:
  0  all is well: every file has a report
  1  finished, but some files failed or were refused: their lines in the result file say why
  2  the command cannot be carried out as it was given; nothing was sent
  3  could not finish (server not reachable, not signed in, interrupted): the same command goes on";

/// Submits many images to Dermflow, shows jobs and batches, handles dead letters.
#[derive(Debug, Parser)]
#[command(name = "dermflow", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    access: Access,
    /// JSON for scripts: one object a line; at the end of submit a summary.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

/// How to reach the server: needed by every command, and welcome at any place of the command line.
#[derive(Debug, Args)]
struct Access {
    /// The server's origin, such as `https://dermflow.example.org`.
    #[arg(long, global = true, env = "DERMFLOW_URL", value_name = "URL")]
    url: Option<String>,
    /// A PEM file with the CA to trust, instead of those that the system trusts.
    #[arg(long, global = true, env = "DERMFLOW_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The name to sign in with.
    #[arg(long, global = true, env = "DERMFLOW_USER", value_name = "NAME")]
    user: Option<String>,
    /// A file that holds the password.
    #[arg(long, global = true, env = "DERMFLOW_PASSWORD_FILE", value_name = "FILE")]
    password_file: Option<PathBuf>,
}

impl Access {
    fn api(self) -> Result<Api, Failure> {
        let missing = |flag: &str| Failure::Usage(format!("{flag} is needed"));
        Api::new(&AccessOptions {
            url: self.url.ok_or_else(|| missing("--url"))?,
            ca: self.ca,
            user: self.user.ok_or_else(|| missing("--user"))?,
            password_file: self.password_file.ok_or_else(|| missing("--password-file"))?,
        })
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Submits image files as one batch and writes one line a file into the result file.
    ///
    /// After a crash, a power cut or an interruption the same command goes on where it was: nothing is analysed
    /// twice, no result is missing or doubled. Beside the result file it keeps a journal for that.
    #[command(after_help = EXIT_CODES)]
    Submit(SubmitOptions),
    /// The caller's jobs.
    #[command(subcommand)]
    Jobs(JobsCommand),
    /// One batch.
    #[command(subcommand)]
    Batch(BatchCommand),
    /// Jobs that were given up: for operators.
    Dead {
        /// The origin of the operators' API, which only the server's own network reaches.
        #[arg(
            long,
            global = true,
            env = "DERMFLOW_OPERATE_URL",
            value_name = "URL",
            default_value = "https://localhost:9444"
        )]
        operate_url: String,
        #[command(subcommand)]
        command: DeadCommand,
    },
}

#[derive(Debug, Args)]
struct SubmitOptions {
    /// Image files, directories (searched at any depth for .jpg, .jpeg and .png), or - for file names, one a
    /// line, on standard input.
    #[arg(value_name = "DIR|FILE", conflicts_with = "ndjson", required_unless_present_any = ["ndjson", "batch"])]
    paths: Vec<PathBuf>,
    /// A file of ready requests, one a line, instead of images.
    #[arg(long, value_name = "FILE")]
    ndjson: Option<PathBuf>,
    /// The result file, one JSON object a line: `custom_id` is the path as given here, and with it comes `report` or
    /// `error`.
    #[arg(long, value_name = "FILE", default_value = "results.ndjson")]
    out: PathBuf,
    /// Parallel uploads.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    concurrency: u8,
    /// Files that one upload has sent and the server has not answered yet: with 1, each waits for the one before it.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=1000))]
    in_flight: u16,
    /// Add to this batch instead of a new one; without files: only fetch its results.
    #[arg(long, value_name = "ID")]
    batch: Option<Uuid>,
    /// The patient's identifier, for all files.
    #[arg(long, value_name = "ID", conflicts_with = "ndjson")]
    subject: Option<String>,
    /// Submit, print the batch's id, and leave. The same command without this fetches the results.
    #[arg(long)]
    no_wait: bool,
    /// Seconds without any successful request after which to give up.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    give_up_after: u32,
    /// Show nothing on the way.
    #[arg(long)]
    quiet: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = tokio::select! {
        outcome = run(cli) => outcome,
        signal = shutdown_requested() => Err(Failure::Unfinished(match signal {
            Ok(()) => "interrupted; the same command goes on where this one was".into(),
            Err(error) => format!("cannot watch for signals: {error}"),
        })),
    };
    match outcome {
        Ok(code) => code.into(),
        Err(failure) => {
            let _ = writeln!(stderr(), "dermflow: {failure}");
            failure.exit_code().into()
        }
    }
}

async fn run(cli: Cli) -> Result<u8, Failure> {
    let (api, json) = (cli.access.api()?, cli.json);
    match cli.command {
        Command::Submit(options) => submit(&api, options, json).await,
        Command::Jobs(command) => jobs::run(&api, command, json).await,
        Command::Batch(command) => jobs::run_batch(&api, command, json).await,
        Command::Dead { operate_url, command } => dead::run(&api.at(&operate_url)?, command, json).await,
    }
}

async fn submit(api: &Api, options: SubmitOptions, json: bool) -> Result<u8, Failure> {
    let (quiet, wait) = (options.quiet, !options.no_wait);
    let inputs = inputs(&options)?;
    let counters = Arc::<Counters>::default();
    let options = Options {
        inputs,
        out: options.out,
        concurrency: options.concurrency.into(),
        in_flight: options.in_flight.into(),
        subject: options.subject,
        batch: options.batch,
        wait,
        patience: Duration::from_secs(options.give_up_after.into()),
    };
    // The progress begins where an earlier run ended: only when the files are read is that known.
    let submission = Submission::open(options, counters.clone())?;
    let progress = progress::show(counters);
    let show = async { if quiet { std::future::pending().await } else { progress.await } };
    let summary = tokio::select! {
        summary = submission.run(api) => summary?,
        () = show => return Err(Failure::Unfinished("the progress ended before the work".into())),
    };
    report(&summary, quiet, json, wait)?;
    Ok(summary.exit_code())
}

fn inputs(options: &SubmitOptions) -> Result<Inputs, Failure> {
    let standard_input = options.paths.iter().any(|path| path == Path::new("-"));
    match (&options.ndjson, options.paths.len()) {
        (Some(file), _) => Inputs::of_ready(file),
        (None, 1) if standard_input => Inputs::of_names(stdin().lock()),
        (None, _) if standard_input => Err(Failure::Usage("- stands alone".into())),
        (None, 0) => Ok(Inputs::none()),
        (None, _) => Inputs::of_paths(&options.paths),
    }
}

fn report(summary: &Summary, quiet: bool, json: bool, wait: bool) -> Result<(), Failure> {
    let failed = |error: std::io::Error| Failure::Unfinished(format!("cannot write: {error}"));
    if json {
        let text = serde_json::to_string(summary).map_err(|error| failed(error.into()))?;
        writeln!(stdout(), "{text}").map_err(failed)?;
    } else if let Some(batch) = summary.batch.filter(|_| !wait) {
        writeln!(stdout(), "{batch}").map_err(failed)?;
    }
    if !quiet {
        let Summary { files, accepted, succeeded, failed, refused, seconds, out, acceptance, .. } = summary;
        let out = out.display();
        eprintln!(
            "{files} files: {accepted} accepted, {succeeded} with a report, {failed} failed, {refused} refused; \
             {seconds:.1} s, {out}"
        );
        if let Some(Acceptance { seconds, p50_ms, p99_ms, max_ms, .. }) = acceptance {
            eprintln!(
                "accepted in {seconds:.1} s; a file p50 {p50_ms:.0}, p99 {p99_ms:.0}, max {max_ms:.0} ms"
            );
        }
    }
    Ok(())
}
