//! The worker process.

use std::{
    env,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use async_nats::{Client, jetstream::Context as JetStream};
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};
use dermflow_schemas::{
    limits::{DEFAULT_JOB_TIMEOUT, MAX_EXECUTORS},
    process,
    queue::{self, NatsOptions, Publisher},
    seal::{Keyring, SealingOptions},
};
use dermflow_workers::{
    attempt::Attempts,
    cancel::Cancels,
    child::{self, Decoding, OWN_PROGRAM},
    consume::{Consumer, End},
    engine::{self, Factory, Runtime},
    executor::Executors,
    golden::{self, Golden},
    memory,
    model::Model,
    models::{Models, Offer},
    outlines, pixels,
    pull::{Pull, find},
    quarantine::Quarantine,
    reserved::Reserved,
    schedule::{LINES, Line, Source},
    timing::Timing,
    watch::Watch,
};
use sd_notify::NotifyState;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Analyses skin images from the queue.
#[derive(Debug, Parser)]
#[command(name = "worker", version, args_override_self = true)]
struct Options {
    #[command(flatten)]
    nats: NatsOptions,
    #[command(flatten)]
    sealing: SealingOptions,
    /// A model's folder, and its part of the jobs that name no model: of two with 95 and 5 the second one gets 5 %. With 0
    /// only those that name it. Repeated, or with commas between.
    #[arg(
        long = "model",
        env = "DERMFLOW_MODEL",
        value_name = "FOLDER[=WEIGHT]",
        value_delimiter = ',',
        required = true
    )]
    models: Vec<Offer>,
    /// Executors for all jobs: one job at a time, one thread and one copy of each model each [default: one per core].
    #[arg(long, env = "DERMFLOW_EXECUTORS")]
    executors: Option<NonZeroUsize>,
    /// As many executors more, for synchronous requests alone: bulk jobs do not keep those waiting, and let them have the
    /// processor first. 0 saves their copies of each model.
    #[arg(long, env = "DERMFLOW_RESERVED_EXECUTORS", default_value_t = 1)]
    reserved_executors: usize,
    /// The ONNX Runtime's library: a path, or a name that the system's loader finds.
    #[arg(long, env = "ORT_DYLIB_PATH", default_value = "libonnxruntime.so")]
    ort_dylib: PathBuf,
    /// Seconds that one attempt may take, all images together.
    #[arg(long, env = "DERMFLOW_JOB_TIMEOUT", default_value_t = DEFAULT_JOB_TIMEOUT.as_secs())]
    job_timeout: u64,
    /// Decode images in the worker's own process. An image that crashes a decoder takes the worker along. For benchmarks.
    #[arg(long)]
    decode_in_process: bool,
    /// Accept a model folder that only simulates a model. Its reports say so. For tests and benchmarks.
    #[arg(long)]
    allow_simulated: bool,
}

/// Writes what a model says of known pictures into its folder, as golden.toml, which workers hold it against from then on.
#[derive(Debug, Parser)]
struct GoldenOptions {
    /// The model's folder.
    folder: PathBuf,
    /// The ONNX Runtime's library.
    #[arg(long, env = "ORT_DYLIB_PATH", default_value = "libonnxruntime.so")]
    ort_dylib: PathBuf,
    /// How far a value may be off, or how much of itself when it is above 1.
    #[arg(long, default_value_t = golden::TOLERANCE)]
    tolerance: f64,
}

const GOLDEN: &str = "golden";
const OUTLINES: &str = "outlines";
const PIXELS: &str = "pixels";

fn main() -> ExitCode {
    let decoder = env::args_os().nth(1).is_some_and(|first| first == child::ARGUMENT);
    memory::keep_little();
    process::init();
    if decoder {
        // The worker says what became of it.
        return if child::serve().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let tools = [
        GoldenOptions::command().name(GOLDEN),
        outlines::Options::command().name(OUTLINES),
        pixels::Options::command().name(PIXELS),
    ];
    let arguments = Options::command().subcommands(tools).subcommand_negates_reqs(true).get_matches();
    let done = match arguments.subcommand() {
        Some((GOLDEN, arguments)) => write_golden(arguments).map(|()| ExitCode::SUCCESS),
        Some((OUTLINES, arguments)) => write_outlines(arguments).map(|()| ExitCode::SUCCESS),
        Some((_, arguments)) => write_pixels(arguments).map(|()| ExitCode::SUCCESS),
        None => work_until_told(&arguments),
    };
    done.unwrap_or_else(|error| {
        tracing::error!("{error:#}");
        ExitCode::FAILURE
    })
}

fn write_golden(arguments: &ArgMatches) -> anyhow::Result<()> {
    let options = GoldenOptions::from_arg_matches(arguments)?;
    Golden::write(&options.folder, &Runtime::new(&options.ort_dylib), options.tolerance)
        .with_context(|| in_folder(&options.folder))
}

fn in_folder(folder: &Path) -> String {
    format!("model {}", folder.display())
}

fn write_outlines(arguments: &ArgMatches) -> anyhow::Result<()> {
    Ok(outlines::run(outlines::Options::from_arg_matches(arguments)?)?)
}

fn write_pixels(arguments: &ArgMatches) -> anyhow::Result<()> {
    Ok(pixels::run(pixels::Options::from_arg_matches(arguments)?)?)
}

#[tokio::main]
async fn work_until_told(arguments: &ArgMatches) -> anyhow::Result<ExitCode> {
    Box::pin(run(Options::from_arg_matches(arguments)?)).await
}

async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let stop = CancellationToken::new();
    let signal = stop.clone();
    tokio::spawn(async move {
        let _ = process::shutdown_requested().await;
        signal.cancel();
    });
    tokio::select! {
        biased;
        () = stop.cancelled() => Ok(ExitCode::SUCCESS),
        prepared = prepare(&options) => {
            let (consumer, reserved, client, grace) = prepared?;
            sd_notify::notify(&[NotifyState::Ready]).context("cannot notify the supervisor")?;
            tracing::info!("ready");
            Ok(work(consumer, reserved, client, stop, grace).await)
        }
    }
}

/// Everything that can be wrong with the surroundings shows here, before the first job is asked for.
async fn prepare(options: &Options) -> anyhow::Result<(Consumer, Vec<Reserved>, Client, Duration)> {
    let (count, reserved) = executors(options)?;
    let keys = Keyring::obtain(&options.sealing).await?;
    let (models, factories) = load(options)?;
    let decoding =
        if options.decode_in_process { Decoding::Here } else { Decoding::InChild(OWN_PROGRAM.into()) };
    let executors = Executors::start(count, reserved, &factories, &decoding).await?;
    tracing::info!(executors = count, reserved, "loaded");
    let broker = || format!("broker {}", options.nats.nats_url);
    let client = options.nats.connect().await.map_err(flat).with_context(broker)?;
    let context = queue::context(client.clone());
    let ack_wait = ack_wait(&context).await;
    let pulls = open_lines(&client, &context).await.map_err(flat)?;
    let watch = Watch::start(&client, context.clone()).await.map_err(flat)?;
    let timing = Timing::new(ack_wait, Duration::from_secs(options.job_timeout))?;
    let followed = keys.clone();
    tokio::spawn(async move { followed.follow().await });
    let cancels = Cancels::default();
    cancels.listen(&client).await.map_err(flat)?;
    models.answer(&client).await.map_err(flat)?;
    let attempts = Arc::new(Attempts {
        publisher: Publisher::new(context.clone()),
        client: client.clone(),
        keys,
        models: Arc::new(models),
        executors: executors.clone(),
        timing,
        cancels,
        quarantine: Quarantine::default(),
    });
    let mut waiting = Vec::new();
    for _ in 0..options.reserved_executors {
        let pull = Pull::open(&client, context.clone(), Line::Interactive).await.map_err(flat)?;
        waiting.push(Reserved::new(pull, attempts.clone()));
    }
    let consumer = Consumer::new(pulls, watch, executors, count, attempts);
    Ok((consumer, waiting, client, timing.grace))
}

/// The models, and what makes an engine of each. Each has made one, so that what is wrong with it is told with its folder.
fn load(options: &Options) -> anyhow::Result<(Models, Vec<Factory>)> {
    let runtime = Runtime::new(&options.ort_dylib);
    let (mut models, mut factories) = (Vec::new(), Vec::new());
    for Offer { folder, weight } in &options.models {
        let model = Model::load(folder, options.allow_simulated).with_context(|| in_folder(folder))?;
        let make = engine::factory(&model, &runtime).with_context(|| hint(&options.ort_dylib))?;
        make().with_context(|| in_folder(folder))?;
        tracing::info!(model = %model.id, sha256 = model.digest, weight, "loaded");
        if model.is_simulated() {
            tracing::warn!("the model is simulated: its reports mean nothing");
        }
        models.push((Arc::new(model), *weight));
        factories.push(make);
    }
    Ok((Models::new(models).context("--model")?, factories))
}

/// How many for all jobs, and how many more for those that somebody waits for.
fn executors(options: &Options) -> anyhow::Result<(NonZeroUsize, Option<NonZeroUsize>)> {
    let count = match options.executors {
        Some(count) => count,
        None => std::thread::available_parallelism().context("cannot count the cores: give --executors")?,
    };
    let most = count.get().max(options.reserved_executors);
    anyhow::ensure!(most <= MAX_EXECUTORS, "at most {MAX_EXECUTORS} executors of a kind, not {most}");
    Ok((count, NonZeroUsize::new(options.reserved_executors)))
}

/// The broker's errors quote their causes already.
#[expect(clippy::needless_pass_by_value, reason = "the form that map_err takes")]
fn flat(error: async_nats::Error) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}

fn hint(library: &Path) -> String {
    format!("--ort-dylib {} (ORT_DYLIB_PATH)", library.display())
}

/// The shortest ack wait, once ingress has made the consumers; it gives the ones of clients the same.
async fn ack_wait(context: &JetStream) -> Duration {
    let mut shortest = Duration::MAX;
    for source in [Source::Interactive, Source::Due] {
        let consumer = find(context.clone(), source).await;
        shortest = shortest.min(consumer.cached_info().config.ack_wait);
    }
    shortest
}

async fn open_lines(client: &Client, context: &JetStream) -> Result<[Pull; LINES.len()], async_nats::Error> {
    let open = |line| Pull::open(client, context.clone(), line);
    Ok([open(LINES[0]).await?, open(LINES[1]).await?, open(LINES[2]).await?])
}

async fn work(
    consumer: Consumer,
    reserved: Vec<Reserved>,
    client: Client,
    stop: CancellationToken,
    grace: Duration,
) -> ExitCode {
    let mut loops = JoinSet::new();
    loops.spawn(consumer.run(stop.clone(), grace));
    for one in reserved {
        loops.spawn(one.run(stop.clone(), grace));
    }
    let mut end = End::Drained;
    while let Some(ended) = loops.join_next().await {
        // Whichever ends first, by a hung executor or by a panic, ends the process, and so the others.
        stop.cancel();
        end = end.max(ended.unwrap_or(End::CutOff));
    }
    // Acks are handed to the connection, not awaited: they must leave before the process does.
    let _ = tokio::time::timeout(Duration::from_secs(5), client.flush()).await;
    match end {
        End::Drained => {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        }
        End::CutOff => {
            tracing::error!("stopped with jobs unfinished; they will be redelivered");
            ExitCode::FAILURE
        }
        End::Hung => {
            tracing::error!(
                "an executor hung and cannot be stopped: the process ends and must be started again"
            );
            ExitCode::FAILURE
        }
    }
}
