//! How a shard runs: its place, its sizes and the budget of a turn.

use crate::core::engine::ShardIndex;

/// How a shard runs.
#[derive(Clone, Debug)]
pub struct ShardOptions {
    /// Its number, dense from 0.
    pub index: ShardIndex,
    /// The core it is pinned to, as the kernel numbers it ([`super::cores`]); `None`: wherever the
    /// scheduler puts it.
    pub core: Option<usize>,
    /// Connections at the most (see [`super::slots_allowed`]).
    pub slots_max: u32,
    /// Commands of the control plane that may wait.
    pub control_inbox_max: usize,
    /// What a turn may do, and the sizes of the ring.
    pub turn: TurnOptions,
    /// A fault that the wire's own tests build in, to see them fail. `None` everywhere else.
    #[doc(hidden)]
    pub mutation: Option<Mutation>,
}

impl ShardOptions {
    /// Defaults for shard `index`.
    pub fn new(index: ShardIndex, slots_max: u32) -> Self {
        Self {
            index,
            core: None,
            slots_max,
            control_inbox_max: 4_096,
            turn: TurnOptions::default(),
            mutation: None,
        }
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
    /// Sends offered in a turn at the most: a reply to everything that a turn takes in.
    pub sends_max: usize,
    /// Of these, fan-out and what goes to connections that are behind. A send costs the kernel from 2 to
    /// 9 us, so 128 are a millisecond at the most: what a ping waits behind a large fan-out.
    pub background_max: usize,
    /// Bytes offered in a turn at the most: 4 MiB are copied in about a millisecond.
    pub send_bytes_max: usize,
    /// A turn that has taken this long handles no more completions or inbox entries, in microseconds.
    pub time_max_us: u64,
    /// A turn that has taken this long lets other threads of its core run before the next, in
    /// microseconds; `None`: it has its core to itself.
    pub yield_after_us: Option<u64>,
    /// A wait that follows a short one is made inside the ring, for this long at the most, in
    /// microseconds; 0: every wait goes through the executor.
    pub nap_max_us: u64,
    /// Submission entries of the ring: sends per enter.
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
            background_max: 128,
            send_bytes_max: 4 * 1024 * 1024,
            time_max_us: 2_000,
            yield_after_us: None,
            nap_max_us: 1_000,
            ring_entries: 256,
            completion_entries: 2_048,
            recv_buffers: 128,
            recv_buffer_bytes: 4_096,
        }
    }
}

impl TurnOptions {
    /// For a shard whose core `threads` shards take turns on: each gives the core away after a turn, and
    /// its background is so small that a ping which comes a moment too late waits for one short turn of
    /// every other.
    pub fn shared_by(self, threads: usize) -> Self {
        match threads {
            0 | 1 => self,
            _ => Self {
                background_max: (self.background_max / threads).max(SHARED_BACKGROUND_MIN),
                yield_after_us: Some(SHARED_TURN_US),
                ..self
            },
        }
    }
}

/// The least background of a turn on a shared core: below it, what a turn costs beside its sends shows.
const SHARED_BACKGROUND_MIN: usize = 32;
/// A turn of this many microseconds was a long one: fan-out, not a reply.
const SHARED_TURN_US: u64 = 100;

/// One fault each, for mutation tests: a test that checks bytes must fail with it. The last is none: it
/// takes the way of older kernels.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Sends without `MSG_DONTWAIT`: the kernel keeps them, and bytes change under it.
    SendMayWait,
    /// Sends without `MSG_WAITALL`: a short send is a success, and tells nobody.
    SendMayBeShort,
    /// Closes with operations in flight.
    CloseWithoutCancel,
    /// Shuts down as kernels before 6.8 must.
    ShutDownByRing,
}
