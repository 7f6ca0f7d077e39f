//! Starting and stopping a shard: one pinned thread with its executor, its ring and its engine.
//!
//! Owns the thread and what the rest of the process holds of a shard. What happens in a turn belongs to
//! the loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::doorbell::Waker;
use super::inbox::{ControlInbox, ControlSender};
use super::listen::ShardListener;
use super::mesh::Mesh;
use super::metrics::ShardMetrics;
use crate::core::engine::{Engine, ShardIndex};

/// How a shard runs.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// Its number, dense from 0.
    pub index: ShardIndex,
    /// The core it is pinned to, as the kernel numbers it; `None`: wherever the scheduler puts it.
    pub core: Option<usize>,
    /// Connections at the most (see [`super::slots_allowed`]).
    pub slots_max: u32,
    /// Commands of the control plane that may wait.
    pub control_inbox_max: usize,
    /// What a turn may do, and the sizes of the ring.
    pub turn: TurnOptions,
}

impl ShardOptions {
    /// Defaults for shard `index`.
    pub fn new(index: ShardIndex, slots_max: u32) -> Self {
        Self { index, core: None, slots_max, control_inbox_max: 4_096, turn: TurnOptions::default() }
    }
}

/// The budget of a turn and the sizes of the ring.
#[derive(Clone, Debug)]
pub struct TurnOptions {
    /// Completions handled in a turn at the most. At about 2 us each, 512 are a millisecond.
    pub completions_max: usize,
    /// Batches taken from the mesh inbox in a turn at the most.
    pub mesh_batches_max: usize,
    /// Commands of the control plane handled in a turn at the most.
    pub controls_max: usize,
    /// Sends offered in a turn at the most. A send costs the kernel about 5 us, so 512 are 2.5 ms:
    /// what a ping waits behind a large fan-out.
    pub sends_max: usize,
    /// Bytes offered in a turn at the most: 4 MiB are copied in about a millisecond.
    pub send_bytes_max: usize,
    /// A turn that has taken this long handles no more completions, in microseconds.
    pub time_max_us: u64,
    /// Submission entries of the ring: sends per enter. Twice as many cost the same within noise.
    pub ring_entries: u32,
    /// Completion entries of the ring. Beyond them the kernel keeps completions on a list of its own.
    pub completion_entries: u32,
    /// Receive buffers of the shard, a power of two; idle connections hold none.
    pub recv_buffers: u16,
    /// Bytes of one receive buffer.
    pub recv_buffer_bytes: u32,
}

impl Default for TurnOptions {
    fn default() -> Self {
        Self {
            completions_max: 512,
            mesh_batches_max: 256,
            controls_max: 64,
            sends_max: 512,
            send_bytes_max: 4 * 1024 * 1024,
            time_max_us: 2_000,
            ring_entries: 256,
            completion_entries: 2_048,
            recv_buffers: 128,
            recv_buffer_bytes: 4_096,
        }
    }
}

/// What a shard is connected to.
pub struct ShardParts<E: Engine> {
    /// Its listeners ([`super::Listeners::take`]).
    pub listeners: Vec<ShardListener>,
    /// The node's mesh; it must have been made for more shards than this one's index.
    pub mesh: Mesh<E::Mesh>,
    /// Called on the shard's thread with every answer to a command. It must not block.
    pub answers: Box<dyn Fn(E::Answer) + Send>,
    /// Called on the shard's thread. It must not block.
    pub events: Box<dyn Fn(ShardEvent) + Send>,
}

/// What a shard tells of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShardEvent {
    /// The engine holds no connections after a drain. The shard goes on running for the mesh.
    Drained(ShardIndex),
    /// The shard's thread ends: it was asked to, or it panicked ([`ShardHandle::join`] tells).
    Stopped(ShardIndex),
}

/// Why a shard did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The thread could not be made.
    #[error("cannot start the thread of a shard: {0}")]
    Thread(std::io::Error),
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
    let doorbell = parts.mesh.doorbell(index).clone();
    let inbox = Arc::new(ControlInbox::new(options.control_inbox_max));
    let metrics = ShardMetrics::new();
    let stop = Arc::new(AtomicBool::new(false));
    let thread = std::thread::Builder::new()
        .name(format!("shard-{index}"))
        .spawn(move || {
            let _engine = make_engine();
            let _parts = parts;
        })
        .map_err(StartError::Thread)?;
    Ok(ShardHandle { index, metrics, control: ControlSender { inbox, doorbell }, stop, thread })
}
