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
    /// Sends offered in a turn at the most. A send costs the kernel about 5 us, so 512 are 2.5 ms:
    /// what a ping waits behind a large fan-out.
    pub sends_max: usize,
    /// Bytes offered in a turn at the most: 4 MiB are copied in about a millisecond.
    pub send_bytes_max: usize,
    /// A turn that has taken this long handles no more completions or inbox entries, in microseconds.
    pub time_max_us: u64,
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
            send_bytes_max: 4 * 1024 * 1024,
            time_max_us: 2_000,
            nap_max_us: 1_000,
            ring_entries: 256,
            completion_entries: 2_048,
            recv_buffers: 128,
            recv_buffer_bytes: 4_096,
        }
    }
}

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
