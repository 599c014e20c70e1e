//! `dermflow-up`: the whole pipeline on this machine, with a sample, until Ctrl-C.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dermflow_local::{
    client::{ANALYZE, Answer, Client, content_type},
    nats,
    postgres::Postgres,
    process::{Backoff, Process, describe},
    servers::{Given, Servers},
    stack::{self, Options, Ports, READY_WITHIN, Stack},
    state::{State, read, write_private},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, sleep},
};

const DEMO: &str = "demo";
const OPERATOR: &str = "operator";
const ADMINISTRATOR: &str = "admin";
const SAMPLES: [&str; 2] = ["tests/images/ham10000-mel.jpg", "tests/images/isic2017-nv.png"];

/// Brings Dermflow up on this machine: NATS, PostgreSQL, ingress and workers, with a demo client and two sample
/// images. Ctrl-C stops everything.
#[derive(Debug, Parser)]
#[command(name = "up")]
struct Args {
    /// Exit after the samples: 0, or 1 with the reason.
    #[arg(long)]
    check: bool,
    /// Number of worker processes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    /// Folder for keys, data and logs [default: .state/local in the repository].
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// HTTPS port; plain HTTP listens on this less 363, health and metrics on this plus 1000, the operators' API
    /// on this plus 1001, the registration service on this plus 1002, its health and metrics on this plus 1003.
    #[arg(long, value_name = "P", default_value_t = 8443, value_parser = clap::value_parser!(u16).range(1_387..=64_533))]
    port: u16,
    /// A model's folder, and its part of the jobs that name no model; repeated, as for a worker [default:
    /// workers/models/derm7 in the repository].
    #[arg(long = "model", value_name = "FOLDER[=WEIGHT]")]
    models: Vec<String>,
    /// Erase this state first: keys, users, jobs and reports.
    #[arg(long)]
    reset: bool,
    /// Fetch the servers and exit.
    #[arg(long)]
    fetch_only: bool,
    #[command(flatten)]
    given: Given,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("up: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn say(step: &str) {
    println!("• {step}");
}

/// SIGINT and SIGTERM.
struct Signals(Signal, Signal);

impl Signals {
    async fn next(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

async fn run(args: Args) -> Result<()> {
    let interrupt = signal(SignalKind::interrupt()).context("cannot listen for Ctrl-C")?;
    let terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut signals = Signals(interrupt, terminate);
    let mut stack = tokio::select! {
        prepared = prepare(&args) => match prepared? {
            Some(stack) => stack,
            None => return Ok(()),
        },
        () = signals.next() => return interrupted(&args),
    };
    let work = tokio::select! {
        outcome = work(&mut stack, &args) => outcome,
        () = signals.next() => interrupted(&args),
    };
    say("stopping; Ctrl-C again kills");
    let stopped = tokio::select! {
        outcome = stack.stop() => outcome,
        () = signals.next() => Ok(()),
    };
    work.and(stopped)
}

/// Being told to end is as it should be, unless there was something to find out.
fn interrupted(args: &Args) -> Result<()> {
    ensure!(!args.check, "interrupted before the samples were analysed");
    Ok(())
}

/// Everything that can be checked or made before the first process starts.
async fn prepare(args: &Args) -> Result<Option<Stack>> {
    let repo = stack::repo();
    if args.fetch_only {
        Servers::obtain(repo, &args.given, say).await?;
        return Ok(None);
    }
    let state = State::open(&args.state.clone().unwrap_or_else(|| repo.join(".state/local")))?;
    if args.reset {
        Postgres::erase(&state)?;
        state.erase()?;
        say("erased the state");
    }
    stack::check_disk(&state.path(""))?;
    Ports::around(args.port).check()?;
    let servers = Servers::obtain(repo, &args.given, say).await?;
    let mut models = args.models.clone();
    if models.is_empty() {
        models.push(repo.join("workers/models/derm7").display().to_string());
    }
    let options = Options { servers, programs: stack::programs()?, models, nats: nats::Settings::default() };
    Stack::prepare(state, options).map(Some)
}

async fn work(stack: &mut Stack, args: &Args) -> Result<()> {
    say("starting NATS and PostgreSQL");
    stack.start_servers().await?;
    let password_file = user(stack, DEMO, "integrator")?;
    user(stack, OPERATOR, "operator")?;
    user(stack, ADMINISTRATOR, "administrator")?;
    say("starting ingress");
    stack.add_ingress(Ports::around(args.port), &[])?.process.spawn_ready(READY_WITHIN).await?;
    stack.add_operate(args.port + 1_001, &[])?.process.spawn_ready(READY_WITHIN).await?;
    stack.add_registration(args.port + 1_002, args.port + 1_003)?.process.spawn_ready(READY_WITHIN).await?;
    // From here on it knows of every listener.
    stack.keep_auth_command()?;
    say(&format!("starting {} workers", args.workers));
    for _ in 0..args.workers {
        stack.add_worker(&[])?.spawn_ready(READY_WITHIN).await?;
    }
    let url = stack.ingress[0].url();
    let mut client = Client::new(&url, &stack.pki.ca)?;
    client.login(DEMO, &read(&password_file)?).await?;
    for (sample, polling) in SAMPLES.into_iter().zip([false, true]) {
        let answer = client.analyze(&stack::repo().join(sample), polling).await?;
        print_answer(sample, polling, &answer);
    }
    if args.check {
        return Ok(());
    }
    print_curl(&url, &stack.pki.ca.display().to_string(), &password_file.display().to_string());
    println!(
        "\nDermflow is up at {url}; logs are in {}. Ctrl-C stops it.",
        stack.state.path("log").display()
    );
    supervise(stack).await
}

/// Registers a user, once. Returns the file with the password.
fn user(stack: &Stack, name: &str, role: &str) -> Result<PathBuf> {
    let file = stack.state.path(&format!("{name}.password"));
    if !file.exists() {
        say(&format!("registering the {role} {name}"));
        let (create, first) = (["user", "create", name, "--role", role], ["bootstrap", name]);
        let password = stack
            .auth(if role == "administrator" { &first } else { &create })
            .with_context(|| format!("cannot register {name}"))?;
        write_private(&file, &password)?;
    }
    Ok(file)
}

fn print_answer(sample: &str, polling: bool, answer: &Answer) {
    let way = if polling { "with polling" } else { "synchronously" };
    println!("\n{sample}, {way}");
    for (condition, percent) in answer.conditions().iter().take(3) {
        println!("  {percent:5.1} %  {condition}");
    }
    let phase = |name| answer.phase(name).map_or_else(|| "?".into(), |ms| format!("{ms:.0} ms"));
    println!("  in the queue {}, in the model {}, in all {}", phase("queue"), phase("model"), phase("total"));
    println!("  report {}", answer.id());
}

/// Lines to paste: they need a shell, curl, python3 and nothing else.
fn print_curl(url: &str, ca: &str, password_file: &str) {
    let image = stack::repo().join(SAMPLES[0]);
    let content_type = content_type(&image);
    let image = image.display();
    println!(
        r#"
Try next (paste line by line):

curl() {{ command curl -sS -w '\n' --cacert '{ca}' "$@"; }}
TOKEN=$(curl '{url}/login' -d username={DEMO} --data-urlencode password@'{password_file}' | python3 -c 'import json,sys; print(json.load(sys.stdin)["access_token"])')
REQUEST=$(mktemp); python3 -c 'import base64,json,sys; print(json.dumps({{"resourceType":"Parameters","parameter":[{{"name":"image","part":[{{"name":"content","valueAttachment":{{"contentType":"{content_type}","data":base64.b64encode(open(sys.argv[1],"rb").read()).decode()}}}}]}}]}}))' '{image}' > "$REQUEST"
# the report in the same answer
curl '{url}{ANALYZE}' -H "Authorization: Bearer $TOKEN" -H 'Content-Type: application/fhir+json' --data-binary @"$REQUEST"
# or accept now, fetch later
STATUS=$(curl '{url}{ANALYZE}' -H "Authorization: Bearer $TOKEN" -H 'Content-Type: application/fhir+json' -H 'Prefer: respond-async' --data-binary @"$REQUEST" -D - -o /dev/null | tr -d '\r' | awk 'tolower($1) == "content-location:" {{ print $2 }}')
curl -i "$STATUS" -H "Authorization: Bearer $TOKEN""#
    );
}

/// Starts again what ends although nobody asked it to. Returns only when NATS or PostgreSQL cannot be revived.
async fn supervise(stack: &mut Stack) -> Result<()> {
    let ours = stack.ingress.len()
        + stack.operate.iter().len()
        + stack.registration.iter().len()
        + stack.workers.len();
    let mut due: Vec<(Backoff, Option<Instant>)> = (0..ours).map(|_| (Backoff::default(), None)).collect();
    loop {
        sleep(Duration::from_millis(100)).await;
        if stack.nats.process.exited().is_some() {
            say("NATS has ended: starting it again");
            stack.nats.start().await?;
        }
        if stack.postgres.process.exited().is_some() {
            say("PostgreSQL has ended: starting it again");
            stack.postgres.start().await?;
        }
        let ingress = stack.ingress.iter_mut().map(|ingress| &mut ingress.process);
        let operate = stack.operate.iter_mut().map(|operate| &mut operate.process);
        let registration = stack.registration.iter_mut().map(|registration| &mut registration.process);
        let processes = ingress.chain(operate).chain(registration).chain(&mut stack.workers);
        for (process, (backoff, due)) in processes.zip(&mut due) {
            revive(process, backoff, due);
        }
    }
}

/// Starts an ended process when its time has come. It is not waited for: the others need looking after, too.
fn revive(process: &mut Process, backoff: &mut Backoff, due: &mut Option<Instant>) {
    let Some(status) = process.exited() else { return };
    let at = *due.get_or_insert_with(|| {
        let pause = backoff.pause();
        let (name, log) = (process.name(), process.log().display());
        say(&format!(
            "{name} has ended ({}, see {log}): again in {} ms",
            describe(status),
            pause.as_millis()
        ));
        Instant::now() + pause
    });
    if Instant::now() >= at {
        *due = None;
        if let Err(error) = process.spawn() {
            say(&format!("{error:#}"));
        }
    }
}
