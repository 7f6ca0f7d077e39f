//! `idle`: what a connection costs in memory when it does nothing.

use std::time::Duration;

use serde::Serialize;

use super::workload::Workload;
use super::{CommandError, Subject, meter, prepare, start};
use crate::cli::IdleArgs;
use crate::io::board::{Counter, Phase};
use crate::measure::machine::Machine;
use crate::measure::memory::{self, MemorySample};
use crate::plan::{Channels, IdlePlan, Load};
use crate::report;
use crate::run::{Fleet, RunError, progress_line};

/// Channels of one call of the API.
const CHANNELS_PER_CALL: u64 = 500;
/// The publications must be there after this, and a second more for every 2,000 connections.
const PUBLISH_MAX: Duration = Duration::from_secs(20);
const PUBLICATIONS_PER_S: u64 = 2_000;

/// What an idle run finds. Bytes, whole machine for slab and sockets.
#[derive(Debug, Serialize)]
struct IdleResult {
    variant: String,
    connections: u64,
    received: u64,
    before: MemorySample,
    idle: MemorySample,
    /// After the connections were closed.
    after: MemorySample,
    private_bytes_per_connection: f64,
    slab_bytes_per_connection: f64,
    /// The server's CPU while nothing happened, in percent of a core; pings included.
    idle_cpu_percent: Option<f64>,
    problems: Vec<(String, u64)>,
    interrupted: bool,
}

pub(super) fn run(args: &IdleArgs) -> Result<(), CommandError> {
    let machine = Machine::look();
    prepare(&args.run)?;
    let progress = progress_line(args.run.quiet);
    progress.set_prefix("idle");
    let subject = start(&args.server)?;
    if subject.server.pids.is_empty() {
        return Err(CommandError::Usage("memory is read from a process: name it with --pid".into()));
    }
    let by_connections = args.publish_by_connections || subject.server.api.is_none();
    let workload = workload(args, by_connections);
    let mut result = measure(args, &subject, &workload, by_connections, &progress)?;
    progress.finish_and_clear();
    result.interrupted = crate::io::signals::interrupted();
    let table = report::pairs(&format!("idle: {}", workload.title), &rows(&result));
    Ok(report::publish(&machine, &[table], &notes(&result), &result, args.run.json.as_deref())?)
}

fn workload(args: &IdleArgs, publish: bool) -> Workload {
    let channels = if args.own {
        Channels::Own(args.own_prefix.clone())
    } else {
        Channels::Shared(args.channel.clone())
    };
    let what = match (args.own, args.server.token_secret.is_some()) {
        (true, true) => "a positioned channel and user: each, authenticated",
        (true, false) => "a positioned channel each, anonymous",
        (false, true) => "one shared channel, authenticated",
        (false, false) => "one shared channel, anonymous",
    };
    Workload {
        title: format!("{} connections, {what}", args.connections),
        unit: "publication",
        connections: args.connections,
        load: Load::Idle(IdlePlan { channels, publish, size: args.size as usize }),
    }
}

fn measure(
    args: &IdleArgs,
    subject: &Subject,
    workload: &Workload,
    by_connections: bool,
    progress: &indicatif::ProgressBar,
) -> Result<IdleResult, CommandError> {
    let pids = &subject.server.pids;
    progress.set_message("settling");
    std::thread::sleep(args.settle);
    let before = memory::sample(pids)?;
    let plan = workload.plan(&subject.server.target, subject.secret.as_deref(), &args.run);
    let mut fleet = Fleet::start(&plan, workload.expected_open(), progress.clone())?;
    fleet.await_open(args.run.setup)?;
    fleet.set_phase(Phase::Measure);
    if !by_connections {
        publish(args, subject)?;
    }
    let limit = PUBLISH_MAX + Duration::from_secs(args.connections / PUBLICATIONS_PER_S);
    fleet.wait("publishing", limit, |fleet| fleet.counter(Counter::Units) >= args.connections)?;
    let received = fleet.counter(Counter::Units);
    let cpu_before = meter(subject).map(|meter| meter.sample()).transpose().map_err(RunError::Cpu)?;
    let settled = fleet.wait("settling", args.settle, |_| false)?;
    let idle = memory::sample(pids)?;
    let cpu_after = meter(subject).map(|meter| meter.sample()).transpose().map_err(RunError::Cpu)?;
    let problems = fleet.finish()?.problems;
    std::thread::sleep(args.settle);
    let after = memory::sample(pids)?;
    let per_connection = |now: u64, then: u64| (now as f64 - then as f64) / args.connections as f64;
    Ok(IdleResult {
        variant: workload.title.clone(),
        connections: args.connections,
        received,
        private_bytes_per_connection: per_connection(idle.private_bytes, before.private_bytes),
        slab_bytes_per_connection: per_connection(idle.slab_bytes, before.slab_bytes),
        idle_cpu_percent: cpu_before.zip(cpu_after).map(|(before, after)| {
            after.since(&before).total_ns() as f64 / settled.as_nanos() as f64 * 100.0
        }),
        before,
        idle,
        after,
        problems,
        interrupted: false,
    })
}

/// One publication to each connection, through the server's API.
fn publish(args: &IdleArgs, subject: &Subject) -> Result<(), CommandError> {
    let Some(api) = &subject.server.api else { return Ok(()) };
    let data = "x".repeat(args.size as usize - 2);
    if !args.own {
        return Ok(api.publish(&args.channel, &data)?);
    }
    let own = Channels::Own(args.own_prefix.clone());
    for first in (0..args.connections).step_by(CHANNELS_PER_CALL as usize) {
        let last = (first + CHANNELS_PER_CALL).min(args.connections);
        let channels: Vec<String> = (first..last).filter_map(|number| own.of(number)).collect();
        api.broadcast(&channels, &data)?;
    }
    Ok(())
}

fn rows(result: &IdleResult) -> Vec<(&'static str, String)> {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let sockets =
        (result.idle.socket_bytes as f64 - result.before.socket_bytes as f64) / result.connections as f64;
    vec![
        ("private memory per connection", format!("{:.0} B", result.private_bytes_per_connection)),
        ("fixed part (before the first connection)", mib(result.before.private_bytes)),
        ("with all connections", mib(result.idle.private_bytes)),
        ("after they have closed", mib(result.after.private_bytes)),
        ("slab per connection, both ends", format!("{:.0} B", result.slab_bytes_per_connection)),
        ("socket buffers per connection, both ends", format!("{sockets:.0} B")),
        ("publications received", format!("{} of {}", result.received, result.connections)),
        (
            "server CPU while idle",
            result.idle_cpu_percent.map_or("unknown".into(), |cpu| format!("{cpu:.2} % of a core")),
        ),
    ]
}

fn notes(result: &IdleResult) -> Vec<String> {
    let mut notes: Vec<String> =
        result.problems.iter().map(|(what, count)| format!("PROBLEM: {what} ({count}x)")).collect();
    if result.received < result.connections {
        notes.push("PROBLEM: not every connection received its publication".into());
    }
    if result.interrupted {
        notes.push("interrupted; this is what there is".into());
    }
    notes
}
