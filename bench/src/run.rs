//! One run: load processes, phases, samples of the server's CPU, results merged.
//!
//! The parent sleeps between phases on the client's core; what it reads are counters on the board, so the load
//! processes never wait for it. Everything has a limit in time, and Ctrl-C moves on to the end of the run.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use thiserror::Error;

use crate::io::board::{Board, Counter, Phase};
use crate::io::signals::interrupted;
use crate::measure::cpu::{CpuError, CpuMeter, CpuSample, CpuUsed};
use crate::measure::latency::{Latencies, Percentiles};
use crate::plan::{Heard, Plan, WorkerReport};

/// The parent looks at the board this often.
const POLL: Duration = Duration::from_millis(20);
/// What a load process may take to close its connections and report; more for many connections.
const REPORT_MAX: Duration = Duration::from_secs(60);
const CONNECTIONS_CLOSED_PER_S: u64 = 500;

/// A run that gives no result.
#[derive(Debug, Error)]
pub(crate) enum RunError {
    #[error("a load process cannot be started: {0}")]
    Spawn(std::io::Error),
    #[error("load process {0} failed; its message is above")]
    Worker(usize),
    #[error("{failed} of {wanted} connections could not be opened; first of the reasons: {why}")]
    Setup { failed: u64, wanted: u64, why: String },
    #[error("only {open} of {wanted} connections are open after {seconds} s")]
    SetupTime { open: u64, wanted: u64, seconds: u64 },
    #[error(transparent)]
    Cpu(#[from] CpuError),
    #[error("the shared counters: {0}")]
    Board(#[from] rustix::io::Errno),
    #[error("interrupted")]
    Interrupted,
}

/// How long the phases are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    pub(crate) setup_max: Duration,
    pub(crate) warmup: Duration,
    pub(crate) measure: Duration,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) seconds: f64,
    pub(crate) units: u64,
    /// Server CPU for each unit, in microseconds: its threads and its core's ksoftirqd. None: unknown process.
    pub(crate) cpu_us_per_unit: Option<f64>,
    /// The part of it that ran in ksoftirqd, 0 to 1.
    pub(crate) ksoftirqd_share: Option<f64>,
    /// How busy the server was, 0 to 1 of one core.
    pub(crate) server_busy: Option<f64>,
    /// How busy the load processes were, 0 to 1 of their core: at 1 they are the bottleneck.
    pub(crate) client_busy: f64,
    /// What others used of the server's and of the load processes' core, 0 to 1 each: noise.
    pub(crate) server_core_foreign: Option<f64>,
    pub(crate) client_core_foreign: Option<f64>,
    /// The server's CPU for each unit from the kernel's sampled ticks, for comparison.
    pub(crate) cpu_ticks_us_per_unit: Option<f64>,
    pub(crate) bytes_in_per_unit: f64,
    pub(crate) bytes_out_per_unit: f64,
    pub(crate) latency: Percentiles,
    pub(crate) problems: Vec<(String, u64)>,
    pub(crate) failed_connections: u64,
    pub(crate) interrupted: bool,
}

/// What the load processes found, merged; the most frequent problem first.
pub(crate) struct Findings {
    pub(crate) latencies: Latencies,
    pub(crate) problems: Vec<(String, u64)>,
    pub(crate) heard: Heard,
}

/// The load processes of one run.
pub(crate) struct Fleet {
    board: Board,
    workers: Vec<Child>,
    connections: u64,
    client_core: usize,
    expected_open: u64,
    progress: ProgressBar,
}

impl Fleet {
    /// Starts the load processes; they begin to connect at once. `expected_open`: connections when all are there.
    pub(crate) fn start(plan: &Plan, expected_open: u64, progress: ProgressBar) -> Result<Fleet, RunError> {
        let mut fleet = Fleet {
            board: Board::create()?,
            workers: Vec::new(),
            connections: plan.connections,
            client_core: plan.client_core,
            expected_open,
            progress,
        };
        let program = std::env::current_exe().map_err(RunError::Spawn)?;
        for index in 0..plan.workers {
            let mut child = Command::new(&program)
                .args(["worker", &index.to_string(), &fleet.board.path()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .map_err(RunError::Spawn)?;
            let input = child.stdin.take();
            fleet.workers.push(child);
            if let Some(mut input) = input {
                serde_json::to_writer(&mut input, plan).map_err(|error| RunError::Spawn(error.into()))?;
                input.flush().map_err(RunError::Spawn)?;
            }
        }
        Ok(fleet)
    }

    /// The load processes.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.workers.iter().map(Child::id).collect()
    }

    pub(crate) fn counter(&self, counter: Counter) -> u64 {
        self.board.sum(self.workers.len(), counter)
    }

    /// Measures the load processes themselves.
    fn meter(&self) -> CpuMeter {
        CpuMeter::new(self.pids(), Some(self.client_core))
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.board.set_phase(phase);
    }

    /// Waits until every connection is open.
    pub(crate) fn await_open(&mut self, setup_max: Duration) -> Result<(), RunError> {
        let started = Instant::now();
        loop {
            let (open, failed) = (self.counter(Counter::Open), self.counter(Counter::Failed));
            self.progress.set_message(format!("connecting  {open}/{}", self.expected_open));
            if open + failed >= self.expected_open {
                return if failed == 0 { Ok(()) } else { Err(self.setup_failed(failed)) };
            }
            self.check_alive()?;
            if interrupted() {
                // Nothing was measured, but what is open is closed in good order.
                self.finish()?;
                return Err(RunError::Interrupted);
            }
            if started.elapsed() > setup_max {
                let (wanted, seconds) = (self.expected_open, setup_max.as_secs());
                return Err(RunError::SetupTime { open, wanted, seconds });
            }
            std::thread::sleep(POLL);
        }
    }

    fn setup_failed(&mut self, failed: u64) -> RunError {
        let why = match self.finish() {
            Ok(findings) => findings.problems.first().map_or("unknown".into(), |(what, _)| what.clone()),
            Err(error) => error.to_string(),
        };
        RunError::Setup { failed, wanted: self.expected_open, why }
    }

    fn check_alive(&mut self) -> Result<(), RunError> {
        for (index, worker) in self.workers.iter_mut().enumerate() {
            if !matches!(worker.try_wait(), Ok(None)) {
                return Err(RunError::Worker(index));
            }
        }
        Ok(())
    }

    /// Waits for `time`, or until Ctrl-C or `done`, and shows how it goes.
    pub(crate) fn wait(
        &mut self,
        what: &str,
        time: Duration,
        done: impl Fn(&Fleet) -> bool,
    ) -> Result<Duration, RunError> {
        let started = Instant::now();
        let units = self.counter(Counter::Units);
        while started.elapsed() < time && !interrupted() && !done(self) {
            std::thread::sleep(POLL.min(time.saturating_sub(started.elapsed())));
            self.check_alive()?;
            let seconds = started.elapsed().as_secs_f64();
            let rate = (self.counter(Counter::Units) - units) as f64 / seconds.max(1e-3);
            self.progress.set_message(format!("{what}  {seconds:.1} s  {rate:.0}/s"));
        }
        Ok(started.elapsed())
    }

    /// Ends the run in good order and collects what the load processes found.
    pub(crate) fn finish(&mut self) -> Result<Findings, RunError> {
        self.board.set_phase(Phase::Finish);
        self.progress.set_message("closing");
        let limit = REPORT_MAX + Duration::from_secs(self.connections / CONNECTIONS_CLOSED_PER_S);
        let (mut latencies, mut heard) = (Latencies::new(), Heard::default());
        let mut problems = std::collections::BTreeMap::<String, u64>::new();
        let asked = Instant::now();
        for (index, worker) in self.workers.iter_mut().enumerate() {
            let report =
                collect(worker, limit.saturating_sub(asked.elapsed())).ok_or(RunError::Worker(index))?;
            latencies.add(&report.latencies);
            for (what, count) in report.problems {
                *problems.entry(what).or_default() += count;
            }
            if index == 0 {
                heard = report.heard;
            }
        }
        let mut problems: Vec<(String, u64)> = problems.into_iter().collect();
        problems.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        Ok(Findings { latencies, problems, heard })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            // Those that have reported are gone already; the others have no reader any more.
            let _ = worker.kill();
            let _ = worker.wait();
        }
    }
}

/// The report of one load process; `None` when it fails or says nothing in time.
fn collect(worker: &mut Child, limit: Duration) -> Option<WorkerReport> {
    let mut output = worker.stdout.take()?;
    // Reports can be larger than a pipe, so reading must go on while the process ends; the thread ends with the pipe.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).map(|_| text)
    });
    let asked = Instant::now();
    while !reader.is_finished() {
        if asked.elapsed() > limit {
            let _ = worker.kill();
            break;
        }
        std::thread::sleep(POLL);
    }
    let text = reader.join().ok()?.ok()?;
    let ended_well = worker.wait().is_ok_and(|status| status.success());
    if ended_well { serde_json::from_str(&text).ok() } else { None }
}

/// A progress line on standard error; none when `quiet`.
pub(crate) fn progress_line(quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr_with_hz(5) };
    let bar = ProgressBar::with_draw_target(None, target);
    if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

/// The usual run: connect, warm up, measure, close.
pub(crate) fn measure(
    plan: &Plan,
    expected_open: u64,
    timing: &Timing,
    meter: Option<&CpuMeter>,
    progress: &ProgressBar,
) -> Result<Outcome, RunError> {
    let mut fleet = Fleet::start(plan, expected_open, progress.clone())?;
    fleet.await_open(timing.setup_max)?;
    fleet.set_phase(Phase::Warmup);
    fleet.wait("warming up", timing.warmup, |_| false)?;
    fleet.set_phase(Phase::Measure);
    let before = Sample::take(&fleet, meter)?;
    fleet.wait("measuring", timing.measure, |_| false)?;
    let after = Sample::take(&fleet, meter)?;
    let findings = fleet.finish()?;
    let failed_connections = fleet.counter(Counter::Failed);
    Ok(after.outcome(&before, findings, failed_connections))
}

/// Counters and CPU at one moment.
struct Sample {
    at: Instant,
    units: u64,
    bytes_in: u64,
    bytes_out: u64,
    cpu: Option<CpuSample>,
    client: CpuSample,
}

impl Sample {
    fn take(fleet: &Fleet, meter: Option<&CpuMeter>) -> Result<Sample, RunError> {
        Ok(Sample {
            cpu: meter.map(CpuMeter::sample).transpose()?,
            client: fleet.meter().sample()?,
            at: Instant::now(),
            units: fleet.counter(Counter::Units),
            bytes_in: fleet.counter(Counter::BytesIn),
            bytes_out: fleet.counter(Counter::BytesOut),
        })
    }

    fn outcome(&self, before: &Sample, findings: Findings, failed_connections: u64) -> Outcome {
        let units = self.units - before.units;
        let seconds = (self.at - before.at).as_secs_f64();
        let used: Option<CpuUsed> =
            self.cpu.as_ref().zip(before.cpu.as_ref()).map(|(after, before)| after.since(before));
        let client = self.client.since(&before.client);
        let wall_ns = seconds * 1e9;
        let per_unit = |amount: f64| amount / units as f64;
        Outcome {
            seconds,
            units,
            cpu_us_per_unit: used.map(|used| per_unit(used.total_ns() as f64 / 1e3)),
            ksoftirqd_share: used.map(|used| used.ksoftirqd_ns as f64 / used.total_ns().max(1) as f64),
            server_busy: used.map(|used| used.total_ns() as f64 / wall_ns),
            client_busy: client.total_ns() as f64 / wall_ns,
            server_core_foreign: used.and_then(|used| used.foreign_share(wall_ns)),
            client_core_foreign: client.foreign_share(wall_ns),
            cpu_ticks_us_per_unit: used.map(|used| per_unit(used.ticks as f64 * 1e4)),
            bytes_in_per_unit: per_unit((self.bytes_in - before.bytes_in) as f64),
            bytes_out_per_unit: per_unit((self.bytes_out - before.bytes_out) as f64),
            latency: findings.latencies.percentiles(),
            problems: findings.problems,
            failed_connections,
            interrupted: interrupted(),
        }
    }
}
