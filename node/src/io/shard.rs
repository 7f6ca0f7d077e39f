//! Starting and stopping a shard: one pinned thread with its executor, its ring and its engine.
//!
//! Owns the thread and what the rest of the process holds of a shard. What happens in a turn belongs to
//! the loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use glommio::{LocalExecutor, LocalExecutorBuilder, Placement};

use super::accept::Acceptor;
use super::clock::Clock;
use super::doorbell::{Doorbell, Waker};
use super::handover::Handovers;
use super::inbox::{ControlInbox, ControlSender};
use super::kernel::StartError;
use super::listen::ShardListener;
use super::mesh::Mesh;
use super::metrics::ShardMetrics;
use super::options::ShardOptions;
use super::sleep::Sleeper;
use super::turn::{Counts, Outlets, Scratch, Seat, ShardLoop};
use super::wire::Wire;
use crate::core::engine::{Engine, ShardIndex};

/// Entries of the executor's three rings: it does one read at a time. Its minimum would be 1, but it
/// keeps its own timers and its wake-up there too.
const EXECUTOR_RING_DEPTH: usize = 8;

/// Registered memory of the executor, for file reads that nobody makes. It takes no less.
const EXECUTOR_MEMORY_BYTES: usize = 64 * 1024;

/// What a shard is connected to.
pub struct ShardParts<E: Engine> {
    /// Its listeners ([`super::Listeners::take`]).
    pub listeners: Vec<ShardListener>,
    /// The node's mesh; it must have been made for more shards than this one's index.
    pub mesh: Mesh<E::Mesh>,
    /// Called on the shard's thread with every answer to a command. It must not block.
    pub answers: Box<dyn Fn(E::Answer) + Send>,
    /// Called on the shard's thread. It must not block.
    pub events: Box<dyn Fn(ShardEvent) + Send + Sync>,
}

/// What a shard tells of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardEvent {
    /// The engine holds no connections after a drain. The shard goes on running for the mesh.
    Drained(ShardIndex),
    /// The shard's thread ends: it was asked to, or it panicked ([`ShardHandle::join`] tells).
    Stopped(ShardIndex),
}

/// A running shard.
#[derive(Debug)]
pub struct ShardHandle<C> {
    /// Its number.
    pub index: ShardIndex,
    /// Its published figures.
    pub metrics: Arc<ShardMetrics>,
    control: ControlSender<C>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl<C> ShardHandle<C> {
    /// Sends commands to the shard.
    pub fn control(&self) -> ControlSender<C> {
        self.control.clone()
    }

    /// Wakes the shard.
    pub fn waker(&self) -> Waker {
        Waker(self.control.doorbell.clone())
    }

    /// Asks the shard to end after its turn. Its connections are closed by the kernel: drain first.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.control.doorbell.ring();
    }

    /// Whether the shard's thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the shard's end. The error is the payload of its panic.
    pub fn join(self) -> std::thread::Result<()> {
        self.thread.join()
    }
}

/// Starts a shard and waits until its ring is up. `make_engine` runs on the shard's thread.
///
/// Errors name their remedy; none of them mends itself by a retry.
pub fn spawn_shard<E, F>(
    options: ShardOptions,
    parts: ShardParts<E>,
    make_engine: F,
) -> Result<ShardHandle<E::Control>, StartError>
where
    E: Engine + 'static,
    F: FnOnce() -> E + Send + 'static,
{
    let index = options.index;
    let start = Start {
        doorbell: parts.mesh.doorbell(index).clone(),
        inbox: Arc::new(ControlInbox::new(options.control_inbox_max)),
        metrics: ShardMetrics::new(),
        stop: Arc::new(AtomicBool::new(false)),
        options,
    };
    let control = ControlSender { inbox: start.inbox.clone(), doorbell: start.doorbell.clone() };
    let (metrics, stop) = (start.metrics.clone(), start.stop.clone());
    let (started, start_result) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name(format!("shard-{index}"))
        .spawn(move || start.run(parts, make_engine, &started))
        .map_err(StartError::Thread)?;
    match start_result.recv() {
        Ok(Ok(())) => Ok(ShardHandle { index, metrics, control, stop, thread }),
        Ok(Err(error)) => Err(error),
        // The thread died without a word: the engine's maker panicked, which is its caller's to see.
        Err(mpsc::RecvError) => std::panic::resume_unwind(thread.join().expect_err("the thread panicked")),
    }
}

/// The cores that this process may run on, as the kernel numbers them: the cpuset or the mask of
/// `taskset` decides.
pub fn cores() -> Vec<usize> {
    core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect()
}

/// What the new thread is given.
struct Start<C> {
    options: ShardOptions,
    doorbell: Arc<Doorbell>,
    inbox: Arc<ControlInbox<C>>,
    metrics: Arc<ShardMetrics>,
    stop: Arc<AtomicBool>,
}

/// Tells the node that the shard has ended, however it did.
struct Farewell<E: Engine> {
    index: ShardIndex,
    mesh: Mesh<E::Mesh>,
    inbox: Arc<ControlInbox<E::Control>>,
    events: Arc<dyn Fn(ShardEvent) + Send + Sync>,
}

impl<E: Engine> Drop for Farewell<E> {
    fn drop(&mut self) {
        self.mesh.close_seat(self.index);
        self.inbox.close();
        (self.events)(ShardEvent::Stopped(self.index));
    }
}

type Started = mpsc::Sender<Result<(), StartError>>;

impl<C: Send + 'static> Start<C> {
    fn run<E>(self, parts: ShardParts<E>, make_engine: impl FnOnce() -> E + 'static, started: &Started)
    where
        E: Engine<Control = C> + 'static,
    {
        // The ring comes first: where the kernel refuses it the executor would panic without a reason.
        let made = self.wire(parts.listeners.len()).and_then(|wire| Ok((wire, executor()?)));
        let (wire, executor) = match made {
            Ok(made) => made,
            // The starter waits for this; if it is gone, so is the process.
            Err(error) => return drop(started.send(Err(error))),
        };
        let started = started.clone();
        executor.run(async move {
            match self.open(wire, parts, make_engine) {
                Ok((shard, farewell)) => {
                    let _ = started.send(Ok(()));
                    shard.run().await;
                    drop(farewell);
                }
                Err(error) => drop(started.send(Err(error))),
            }
        });
    }

    /// Pins the thread and sets up its ring.
    fn wire(&self, listeners: usize) -> Result<Wire, StartError> {
        if let Some(core) = self.options.core {
            pin(core)?;
        }
        Wire::open(&self.options, &self.doorbell, listeners)
    }

    fn open<E>(
        self,
        mut wire: Wire,
        parts: ShardParts<E>,
        make_engine: impl FnOnce() -> E,
    ) -> Result<(ShardLoop<E>, Farewell<E>), StartError>
    where
        E: Engine<Control = C>,
    {
        let (index, options) = (self.options.index, self.options);
        let sleeper = Sleeper::open(&mut wire, &self.doorbell, options.turn.nap_max_us)?;
        let acceptor = Acceptor::new(parts.listeners, options.turn.completion_entries);
        let events: Arc<dyn Fn(ShardEvent) + Send + Sync> = parts.events.into();
        let clock = Clock::new(parts.mesh.origin());
        let farewell =
            Farewell { index, mesh: parts.mesh.clone(), inbox: self.inbox.clone(), events: events.clone() };
        let engine = make_engine();
        parts.mesh.open_seat(index, wire.ring.fd(), options.slots_max);
        let seat = Seat {
            index,
            mesh: parts.mesh,
            doorbell: self.doorbell,
            inbox: self.inbox,
            stop: self.stop,
            blocked: Vec::new(),
        };
        let (metrics, answers) = (self.metrics, parts.answers);
        let outlets = Outlets { metrics, answers, events, published_ms: 0, stale: true };
        let shard = ShardLoop {
            options: options.turn,
            engine,
            wire,
            acceptor,
            handovers: Handovers::default(),
            sleeper,
            seat,
            outlets,
            clock,
            scratch: Scratch::default(),
            counts: Counts::default(),
        };
        Ok((shard, farewell))
    }
}

/// The executor at its smallest. Unbound: the thread is pinned already, and the executor's own pinning
/// reads the machine's topology, which containers may not show.
fn executor() -> Result<LocalExecutor, StartError> {
    LocalExecutorBuilder::new(Placement::Unbound)
        .io_memory(EXECUTOR_MEMORY_BYTES)
        .ring_depth(EXECUTOR_RING_DEPTH)
        .make()
        .map_err(super::kernel::explain_executor)
}

fn pin(core: usize) -> Result<(), StartError> {
    let mut set = rustix::thread::CpuSet::new();
    if core >= rustix::thread::CpuSet::MAX_CPU {
        let error = std::io::Error::from_raw_os_error(libc::EINVAL);
        return Err(StartError::Core { core, error });
    }
    set.set(core);
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|error| StartError::Core { core, error: error.into() })
}
