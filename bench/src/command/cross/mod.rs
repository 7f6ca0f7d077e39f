//! `cross`: nodes that share a bus beside the bare client library of its broker, in alternating rounds.
//!
//! [`trial`] measures one contestant once; [`latency`] and [`throughput`] decide what is measured and make tables of
//! it; [`placement`] is another question to the same nodes. The broker is not ours: it runs before and after.

mod latency;
mod placement;
mod throughput;
mod trial;

use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;

use super::workload::client_core;
use super::{CommandError, prepare};
use crate::cli::CrossArgs;
use crate::measure::broker::Broker;
use crate::measure::machine::Machine;
use crate::measure::series::Series;
use crate::report;
use crate::run::{RunError, progress_line};
use crate::server::{Server, SpawnOptions};
use trial::Trial;

/// How long a node may take until its bus is there: it may have to make a topic or streams.
const READY_MAX: Duration = Duration::from_secs(60);

/// Channels without history.
const EPHEMERAL: [&str; 7] = [
    "--namespaces.room.history_size=0",
    "--namespaces.room.allow_positioning=false",
    "--namespaces.room.allow_recovery=false",
    "--namespaces.room.force_recovery=false",
    "--namespaces.room.allow_history_for_subscriber=false",
    "--namespaces.room.allow_history_for_client=false",
    "--namespaces.room.allow_history_for_anonymous=false",
];
/// As the nodes of other commands have them: see `server`.
const QUIET: [&str; 2] =
    ["--namespaces.room.join_leave=false", "--namespaces.room.force_push_join_leave=false"];

/// Who carries the traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contestant {
    Nodes,
    Bare,
}

const CONTESTANTS: [Contestant; 2] = [Contestant::Nodes, Contestant::Bare];

/// Everything that stays the same from round to round.
struct Bench<'a> {
    args: &'a CrossArgs,
    /// Publishers are on the first, subscribers on the second.
    nodes: [Server; 2],
    broker: Broker,
    progress: ProgressBar,
    /// Names of channels are new in each trial.
    trials: u64,
    notes: Vec<String>,
}

pub(super) fn run(args: &CrossArgs) -> Result<(), CommandError> {
    let machine = Machine::look();
    prepare(&args.run)?;
    let progress = progress_line(args.run.quiet);
    progress.set_prefix("cross");
    progress.set_message("starting nodes");
    if args.placement {
        let (table, result) = placement::run(args, &progress)?;
        progress.finish_and_clear();
        return Ok(report::publish(&machine, &[table], &[], &result, args.run.json.as_deref())?);
    }
    let nodes =
        [node(args, 0, Some(args.publish_core), &[])?, node(args, 1, Some(subscribe_core(args)), &[])?];
    let broker = Broker::of(&args.bus, &args.monitor);
    let mut bench = Bench { args, nodes, broker, progress, trials: machine.unix_ms, notes: Vec::new() };
    let (mut tables, latency) = latency::run(&mut bench)?;
    let throughput = throughput::run(&mut bench)?;
    tables.extend(throughput.0);
    bench.progress.finish_and_clear();
    let mut notes = vec![explained(args)];
    bench.notes.sort();
    bench.notes.dedup();
    notes.append(&mut bench.notes);
    let result = json!({
        "bus": scheme(args), "channels": args.channels, "subscribers": args.subscribers, "size": args.size,
        "ephemeral": args.ephemeral, "stored_by_bare": stored(args),
        "latency": latency, "throughput": throughput.1,
    });
    Ok(report::publish(&machine, &tables, &notes, &result, args.run.json.as_deref())?)
}

/// The URL without what may be a secret.
fn scheme(args: &CrossArgs) -> &str {
    args.bus.split_once("://").map_or("?", |(scheme, _)| scheme)
}

/// Whether the bare client's broker stores messages too.
fn stored(args: &CrossArgs) -> bool {
    !args.ephemeral && !args.plain
}

fn subscribe_core(args: &CrossArgs) -> usize {
    args.subscribe_core.unwrap_or_else(|| client_core(&args.run))
}

fn explained(args: &CrossArgs) -> String {
    let kind = if args.ephemeral { "without history" } else { "with history" };
    let bare = match scheme(args) {
        "redis" if stored(args) => "XADD and PUBLISH in pipelines",
        "redis" => "PUBLISH in pipelines",
        "redis+cluster" if stored(args) => "XADD and SPUBLISH in pipelines",
        "redis+cluster" => "SPUBLISH in pipelines",
        "nats" if stored(args) => "publishes into a stream that publishes again",
        "nats" => "core publishes",
        _ => "an idempotent producer, acks=all, and a consumer",
    };
    format!(
        "{} channels {kind}, {} B, {} subscriber(s) each; bare: {bare}; median (min–max) of {} rounds, differences and \
         ratios round by round; latency from the time meant",
        args.channels, args.size, args.subscribers, args.rounds
    )
}

/// Starts node number `number` and waits until it has its bus.
fn node(
    args: &CrossArgs,
    number: usize,
    core: Option<usize>,
    more: &[String],
) -> Result<Server, CommandError> {
    let name = format!("bench-{number}");
    let mut arguments = vec!["--bus".to_owned(), args.bus.clone(), "--server.name".to_owned(), name];
    if args.ephemeral {
        arguments.extend(EPHEMERAL.iter().chain(&QUIET).map(|&argument| argument.to_owned()));
    }
    arguments.extend(more.iter().chain(&args.arguments).cloned());
    let server = Server::spawn(&SpawnOptions {
        binary: &args.spawn,
        arguments: &arguments,
        core,
        token_secret: args.placement.then_some(placement::SECRET),
        api_key: None,
        quiet: !args.verbose,
    })?;
    if let Some(api) = &server.api {
        api.await_ready(READY_MAX)?;
    }
    Ok(server)
}

/// Both contestants' trials, one of each for each round.
type Rounds = [Vec<Trial>; 2];

impl Bench<'_> {
    /// All rounds of one setting, until Ctrl-C.
    fn rounds(&mut self, what: &str, setting: trial::Setting) -> Result<Rounds, CommandError> {
        let mut rounds = Rounds::default();
        for round in 0..self.args.rounds {
            let mut order = CONTESTANTS;
            if round % 2 == 1 {
                order.reverse();
            }
            for contestant in order {
                let who = if contestant == Contestant::Nodes { "nodes" } else { "bare client" };
                self.progress.set_prefix(format!(
                    "cross: {what}, round {}/{} {who}",
                    round + 1,
                    self.args.rounds
                ));
                let trial = match self.trial(contestant, setting) {
                    Err(CommandError::Run(RunError::Interrupted)) => return Ok(rounds),
                    other => other?,
                };
                if crate::io::signals::interrupted() {
                    self.notes.push("interrupted; this is what there is".into());
                    return Ok(rounds);
                }
                let problems = trial.problems.iter();
                self.notes.extend(
                    problems.map(|(problem, count)| format!("PROBLEM {what} {who}: {problem} ({count}x)")),
                );
                rounds[contestant as usize].push(trial);
            }
        }
        Ok(rounds)
    }
}

/// One value of each trial.
fn series(trials: &[Trial], value: impl Fn(&Trial) -> Option<f64>) -> Vec<f64> {
    trials.iter().map(|trial| value(trial).unwrap_or(f64::NAN)).collect()
}

fn text(values: &[f64]) -> String {
    Series::of(values).map_or("unknown".into(), |series| series.text())
}

/// Differences round by round.
fn differences(ours: &[f64], bare: &[f64]) -> Vec<f64> {
    ours.iter().zip(bare).map(|(ours, bare)| ours - bare).collect()
}

fn ratio_text(ours: &[f64], bare: &[f64]) -> String {
    Series::of_ratios(ours, bare).map_or("unknown".into(), |series| series.text())
}
