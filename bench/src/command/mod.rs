//! The subcommands: from arguments to a workload, from outcomes to a report.

mod cross;
mod idle;
mod limit;
mod workload;

use thiserror::Error;

use crate::bare;
use crate::cli::{BareEngine, Cli, Command, LimitArgs, LimitLoad, RunArgs, ServerArgs};
use crate::io::{bare_uring, signals, socket};
use crate::load::worker::{self, WorkerError};
use crate::measure::cpu::CpuMeter;
use crate::measure::machine::Machine;
use crate::measure::memory::MemoryError;
use crate::report::{self, ReportError};
use crate::run::{self, RunError};
use crate::server::{Api, Server, ServerError, SpawnOptions, parse_address};
use workload::Workload;

/// Why there is no result.
#[derive(Debug, Error)]
pub(crate) enum CommandError {
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Worker(#[from] WorkerError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error("{0}")]
    Usage(String),
    #[error("the bare server: {0}")]
    Bare(#[from] std::io::Error),
    #[error("the bare server's script: {0}")]
    Script(String),
}

/// Does what the command line says.
pub(crate) fn execute(cli: Cli) -> Result<(), CommandError> {
    match cli.command {
        Command::Worker { index, board } => return Ok(worker::run(index, &board)?),
        Command::Bare { engine } => return serve_bare(engine),
        _ => signals::catch_interrupts(),
    }
    worker::raise_nofile().map_err(RunError::Board)?;
    match cli.command {
        Command::Idle(args) => idle::run(&args),
        Command::Echo(args) => single("echo", &workload::echo(&args)?, &args.server, &args.run),
        Command::Fanout(args) => single("fan-out", &workload::fanout(&args)?, &args.server, &args.run),
        Command::Churn(args) => single("churn", &workload::churn(&args)?, &args.server, &args.run),
        Command::Cross(args) => cross::run(&args),
        Command::Limit(LimitArgs { load, options }) => match load {
            LimitLoad::Echo(args) => {
                limit::run("echo", &workload::echo(&args)?, &args.server, &args.run, options)
            }
            LimitLoad::Fanout(args) => {
                limit::run("fan-out", &workload::fanout(&args)?, &args.server, &args.run, options)
            }
            LimitLoad::Churn(args) => {
                limit::run("churn", &workload::churn(&args)?, &args.server, &args.run, options)
            }
        },
        Command::Bare { .. } | Command::Worker { .. } => Ok(()),
    }
}

/// A run against one server, reported on its own.
fn single(name: &str, workload: &Workload, server: &ServerArgs, run: &RunArgs) -> Result<(), CommandError> {
    let machine = Machine::look();
    prepare(run)?;
    let progress = run::progress_line(run.quiet);
    progress.set_prefix(name.to_owned());
    let server = start(server)?;
    let meter = meter(&server);
    let plan = workload.plan(&server.server.target, server.secret.as_deref(), run);
    let timing = timing(run);
    let outcome = run::measure(&plan, workload.expected_open(), &timing, meter.as_ref(), &progress);
    progress.finish_and_clear();
    let outcome = outcome?;
    let table =
        report::pairs(&format!("{name}: {}", workload.title), &report::outcome_rows(&outcome, workload.unit));
    let mut notes = report::problem_notes(name, &outcome);
    notes.extend(report::noise_note(&[&outcome]));
    let result = report::outcome_json(name, &outcome);
    Ok(report::publish(&machine, &[table], &notes, &result, run.json.as_deref())?)
}

/// The parent stays on the client's core, and what it starts does unless told otherwise.
fn prepare(run: &RunArgs) -> Result<(), CommandError> {
    Ok(worker::pin(workload::client_core(run))?)
}

/// The server under test and what is needed to measure it.
struct Subject {
    server: Server,
    secret: Option<String>,
    core: usize,
}

/// Starts the server, or attaches to it.
fn start(args: &ServerArgs) -> Result<Subject, CommandError> {
    let server = match (&args.spawn, &args.url) {
        (Some(binary), _) => Server::spawn(&SpawnOptions {
            binary,
            arguments: &args.arguments,
            core: Some(args.server_core),
            token_secret: args.token_secret.as_deref(),
            api_key: args.api_key.as_deref(),
            quiet: !args.verbose,
        })?,
        (None, Some(url)) => {
            let address = |text: &String| {
                parse_address(text).ok_or_else(|| CommandError::Usage(format!("--admin {text}: no address")))
            };
            let address = args.admin.as_ref().map(address).transpose()?;
            let api = address.map(|address| Api { address, key: args.api_key.clone() });
            Server::attach(url, args.pid.clone(), api)?
        }
        (None, None) => return Err(CommandError::Usage("name a server: --spawn or --url".into())),
    };
    Ok(Subject { server, secret: args.token_secret.clone(), core: args.server_core })
}

fn meter(subject: &Subject) -> Option<CpuMeter> {
    let pids = &subject.server.pids;
    (!pids.is_empty()).then(|| CpuMeter::new(pids.clone(), Some(subject.core)))
}

fn timing(run: &RunArgs) -> run::Timing {
    run::Timing { setup_max: run.setup, warmup: run.warmup, measure: run.duration }
}

/// The hidden subcommand `bare`.
fn serve_bare(engine: BareEngine) -> Result<(), CommandError> {
    use std::io::Write;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(std::io::Error::from)?;
    signals::ignore_interrupts();
    worker::raise_nofile().map_err(std::io::Error::from)?;
    let script = serde_json::from_reader(std::io::stdin().lock());
    let script: bare::script::Script = script.map_err(|error| CommandError::Script(error.to_string()))?;
    script.check().map_err(|error| CommandError::Script(error.to_string()))?;
    let nonblocking = engine == BareEngine::Epoll;
    let (listener, address) = socket::listen_on_loopback(nonblocking).map_err(std::io::Error::from)?;
    println!("{address}");
    std::io::stdout().flush()?;
    match engine {
        BareEngine::Epoll => bare::epoll::serve(listener, script).map_err(std::io::Error::from)?,
        BareEngine::Uring => bare_uring::serve(&listener, script)?,
    }
    Ok(())
}
