//! A load process from start to end: plan from standard input, board from the parent, report to standard output.

use std::io::{Read, Write};
use std::ops::Range;
use std::rc::Rc;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, set_parent_process_death_signal, setrlimit};
use thiserror::Error;

use super::bus::{self, BusError};
use super::churn::Churn;
use super::cross::Cross;
use super::echo::Echo;
use super::engine::{Engine, EngineError};
use super::fanout::Fanout;
use super::idle::Idle;
use super::net::Net;
use super::openings::Openings;
use super::scenario::Scenario;
use crate::io::board::Board;
use crate::io::signals::ignore_interrupts;
use crate::plan::{EchoPlan, Load, Plan, WorkerReport};
use crate::wire::token::TokenError;
use crate::wire::upgrade;

/// Descriptors of a load process that are not connections.
const OTHER_DESCRIPTORS: u64 = 64;

/// Why a load process gave up; the parent shows it.
#[derive(Debug, Error)]
pub(crate) enum WorkerError {
    #[error("the plan cannot be read: {0}")]
    Plan(#[from] serde_json::Error),
    #[error("standard input or output: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the kernel refused: {0}")]
    Kernel(#[from] rustix::io::Errno),
    #[error("cannot pin to core {0}")]
    Core(usize),
}

/// How many connections one process can hold under the hard limit of open files.
pub(crate) fn connections_per_worker() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(1 << 20).saturating_sub(OTHER_DESCRIPTORS).max(1)
}

/// Raises the soft limit of open files to the hard one.
pub(crate) fn raise_nofile() -> Result<(), rustix::io::Errno> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
}

/// Pins this thread, and what it starts later, to `core`.
pub(crate) fn pin(core: usize) -> Result<(), WorkerError> {
    let pinned = core_affinity::set_for_current(core_affinity::CoreId { id: core });
    if pinned { Ok(()) } else { Err(WorkerError::Core(core)) }
}

/// Runs load process number `worker`; `board` is the path of the parent's board.
pub(crate) fn run(worker: usize, board: &str) -> Result<(), WorkerError> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    ignore_interrupts();
    raise_nofile()?;
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let plan: Plan = serde_json::from_str(&text)?;
    pin(plan.client_core)?;
    let report = load(&plan, worker, &Rc::new(Board::open(board)?))?;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, &report)?;
    Ok(out.flush()?)
}

/// The numbers of the connections of process `worker`.
fn share(plan: &Plan, worker: usize) -> Range<u64> {
    let at = |worker: usize| plan.connections * worker as u64 / plan.workers.max(1) as u64;
    at(worker)..at(worker + 1)
}

fn load(plan: &Plan, worker: usize, board: &Rc<Board>) -> Result<WorkerReport, WorkerError> {
    let openings = Openings::new(plan.token_secret.as_deref())?;
    let share = share(plan, worker);
    let (first, count) = (share.start, (share.end - share.start) as usize);
    let watched = [Some(0).filter(|_| worker == 0), None];
    match &plan.load {
        Load::Idle(idle) => {
            let scenario = Idle::new(idle.clone(), openings, first, count);
            engine(plan, worker, first, count, scenario, watched)?.run(board)
        }
        Load::Echo(echo) => {
            let pace = echo.pace.of_part(count as f64 / plan.connections as f64);
            let scenario = Echo::new(EchoPlan { pace, ..echo.clone() }, openings, first, count);
            engine(plan, worker, first, count, scenario, watched)?.run(board)
        }
        Load::Churn(churn) => {
            let scenario = Churn::new(churn, &openings, first, count);
            engine(plan, worker, first, count, scenario, watched)?.run(board)
        }
        Load::Bus(bus) => return Ok(bus::run(bus, worker, board)?),
        Load::Cross(cross) => {
            let publishers = cross.publishers as usize;
            let scenario = Cross::new(cross.clone(), openings, count);
            let mut engine = engine(plan, worker, first, count + publishers, scenario, [None, None])?;
            engine.redirect(count, cross.publish_to.clone());
            engine.run(board)
        }
        Load::Fanout(fanout) => {
            let leads = worker == 0;
            let scenario =
                Fanout::new(fanout.clone(), openings, Rc::clone(board), plan.workers, leads, first, count);
            let watched = scenario.watched();
            engine(plan, worker, first, count + usize::from(leads), scenario, watched)?.run(board)
        }
    }
    .map_err(WorkerError::from)
}

fn engine<S: Scenario>(
    plan: &Plan,
    worker: usize,
    first: u64,
    count: usize,
    scenario: S,
    watched: [Option<usize>; 2],
) -> Result<Engine<S>, WorkerError> {
    let churns = matches!(plan.load, Load::Churn(_));
    let connect_window = plan.connect_window / plan.workers.max(1);
    let mut net = Net::new(plan.target.clone(), count, first, connect_window, churns)?;
    if !churns {
        (0..count).for_each(|index| net.want(index));
    }
    let request = upgrade::request(&plan.target.path);
    Ok(Engine::new(net, scenario, request, worker, watched))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{ChurnPlan, Target};

    #[test]
    fn shares_cover_all_connections_once() {
        let plan = |connections, workers| Plan {
            target: Target { address: "127.0.0.1:1".parse().expect("an address"), path: "/".into() },
            token_secret: None,
            connections,
            workers,
            connect_window: 1,
            client_core: 0,
            load: Load::Churn(ChurnPlan { bare: true, channel: String::new() }),
        };
        for (connections, workers) in [(0, 1), (1, 1), (10, 3), (3, 10), (1_000_000, 54)] {
            let plan = plan(connections, workers);
            let mut next = 0;
            for worker in 0..workers {
                let share = share(&plan, worker);
                assert_eq!(share.start, next, "{connections} over {workers}");
                next = share.end;
            }
            assert_eq!(next, connections);
        }
    }
}
