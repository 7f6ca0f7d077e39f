//! The traffic of [`super::cross`] through a broker by its bare client library: what a bus cannot be better than.
//!
//! One thread publishes, on the core of the node that publishes, another subscribes; each has a connection of its own.
//! A message says in its first bytes when it was meant to leave. Confirmed is what the broker has answered for. Both
//! threads stop when the phase says finish, or when one of them has failed.

mod kafka;
mod nats;
mod pace;
mod redis;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

use super::worker::pin;
use crate::io::board::{Board, Counter, Phase};
use crate::measure::latency::{Latencies, Recorded};
use crate::plan::{BusPlan, WorkerReport};

/// Board and threads see each other's news this often.
const POLL: Duration = Duration::from_millis(1);
/// What opening connections, a topic or a stream may take.
const OPEN_MAX: Duration = Duration::from_secs(30);
/// Bytes of a message that say when it was meant to leave.
const MEANT_BYTES: usize = 8;

/// The bare client cannot be had.
#[derive(Debug, Error)]
pub(crate) enum BusError {
    #[error("the bare client: {0}")]
    Client(String),
    #[error("the bare client's thread panicked")]
    Panicked,
    #[error("the bare client's timer or clock: {0}")]
    Timer(#[from] Errno),
    #[error("the bare client's runtime: {0}")]
    Runtime(#[from] std::io::Error),
}

/// A client library's error, which may not hold a secret: none of the three shows its URL.
fn failed(what: &str, why: impl std::fmt::Display) -> BusError {
    BusError::Client(format!("{what}: {why}"))
}

/// What the threads of a run share.
#[derive(Default)]
struct Flow {
    phase: AtomicU64,
    ready: AtomicU64,
    failed: AtomicBool,
    confirmed: AtomicU64,
    delivered: AtomicU64,
    problems: Mutex<BTreeMap<String, u64>>,
}

impl Flow {
    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Relaxed) {
            _ if self.failed.load(Ordering::Relaxed) => Phase::Finish,
            0 => Phase::Setup,
            1 => Phase::Warmup,
            2 => Phase::Measure,
            _ => Phase::Finish,
        }
    }

    /// One of the threads is ready.
    fn ready(&self) {
        self.ready.fetch_add(1, Ordering::Relaxed);
    }

    fn problem(&self, what: &str) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        *problems.entry(what.to_owned()).or_default() += 1;
    }
}

/// The subscribing side's books.
struct Receiver {
    flow: Arc<Flow>,
    latencies: Latencies,
    measuring: bool,
}

impl Receiver {
    fn new(flow: Arc<Flow>) -> Receiver {
        Receiver { flow, latencies: Latencies::new(), measuring: false }
    }

    fn take(&mut self, payload: &[u8]) {
        let Some(meant) = payload.first_chunk::<MEANT_BYTES>() else {
            return self.flow.problem("a message that nobody published");
        };
        self.flow.delivered.fetch_add(1, Ordering::Relaxed);
        let measuring = self.flow.phase() == Phase::Measure;
        if measuring && !self.measuring {
            self.latencies.clear();
        }
        self.measuring = measuring;
        if measuring {
            self.latencies.record_ns(pace::now_ns().saturating_sub(u64::from_le_bytes(*meant)));
        }
    }
}

/// A message of `size` bytes.
fn payload(size: usize, meant_ns: u64) -> Vec<u8> {
    let mut bytes = vec![b'x'; size.max(MEANT_BYTES)];
    bytes[..MEANT_BYTES].copy_from_slice(&meant_ns.to_le_bytes());
    bytes
}

fn channel(plan: &BusPlan, number: u64) -> String {
    format!("{}{}", plan.prefix, number % plan.channels)
}

/// A runtime of the calling thread.
fn runtime() -> Result<tokio::runtime::Runtime, BusError> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// Runs until the parent says finish; counts on the board as load process `worker`.
pub(crate) fn run(plan: &BusPlan, worker: usize, board: &Board) -> Result<WorkerReport, BusError> {
    let flow = Arc::new(Flow::default());
    let mut threads = vec![start("publisher", plan, &flow, publish)?];
    if plan.subscribe {
        threads.push(start("subscriber", plan, &flow, subscribe)?);
    }
    let wanted = threads.len() as u64;
    while flow.phase() != Phase::Finish {
        flow.phase.store(board.phase() as u64, Ordering::Relaxed);
        let open = flow.ready.load(Ordering::Relaxed) >= wanted;
        board.set(worker, Counter::Open, u64::from(open));
        let units = if plan.subscribe { &flow.delivered } else { &flow.confirmed };
        board.set(worker, Counter::Units, units.load(Ordering::Relaxed));
        std::thread::sleep(POLL);
    }
    let mut report = WorkerReport::default();
    for thread in threads {
        match thread.join().map_err(|_| BusError::Panicked)? {
            Ok(Some(latencies)) => report.latencies = latencies,
            Ok(None) => {}
            Err(error) => {
                board.set(worker, Counter::Failed, 1);
                flow.problem(&error.to_string());
            }
        }
    }
    while board.phase() != Phase::Finish {
        std::thread::sleep(POLL);
    }
    report.problems = std::mem::take(&mut *flow.problems.lock().unwrap_or_else(PoisonError::into_inner))
        .into_iter()
        .collect();
    Ok(report)
}

type Side = fn(&BusPlan, &Arc<Flow>) -> Result<Option<Recorded>, BusError>;
type Running = std::thread::JoinHandle<Result<Option<Recorded>, BusError>>;

fn start(name: &str, plan: &BusPlan, flow: &Arc<Flow>, side: Side) -> Result<Running, BusError> {
    let (plan, flow) = (plan.clone(), Arc::clone(flow));
    let thread = std::thread::Builder::new().name(name.into());
    Ok(thread.spawn(move || {
        let result = side(&plan, &flow);
        if result.is_err() {
            flow.failed.store(true, Ordering::Relaxed);
        }
        result
    })?)
}

fn publish(plan: &BusPlan, flow: &Arc<Flow>) -> Result<Option<Recorded>, BusError> {
    pin(plan.publish_core).map_err(|error| failed("core", error))?;
    match plan.url.split_once("://").map_or("", |(scheme, _)| scheme) {
        "redis" | "redis+cluster" => runtime()?.block_on(redis::publish(plan, flow))?,
        "nats" => runtime()?.block_on(nats::publish(plan, flow))?,
        "kafka" => kafka::publish(plan, flow)?,
        scheme => return Err(BusError::Client(format!("no bare client for {scheme}://"))),
    }
    Ok(None)
}

fn subscribe(plan: &BusPlan, flow: &Arc<Flow>) -> Result<Option<Recorded>, BusError> {
    let mut receiver = Receiver::new(Arc::clone(flow));
    match plan.url.split_once("://").map_or("", |(scheme, _)| scheme) {
        "redis" | "redis+cluster" => runtime()?.block_on(redis::subscribe(plan, &mut receiver))?,
        "nats" => runtime()?.block_on(nats::subscribe(plan, &mut receiver))?,
        "kafka" => kafka::subscribe(plan, &mut receiver)?,
        scheme => return Err(BusError::Client(format!("no bare client for {scheme}://"))),
    }
    Ok(Some(receiver.latencies.recorded()))
}
