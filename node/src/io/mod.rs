//! The data plane: the shard loop, the wire and the mesh.
//!
//! Owns everything that names a runtime, a ring, a socket or a clock: listeners, one io_uring per
//! shard with its direct-descriptor table, receiving, sending and closing, the inboxes between
//! shards and the one wake source of a shard. It drives an [`Engine`](crate::core::engine::Engine)
//! and knows nothing of protocols, sessions or channels.
//!
//! Invariants:
//! - a connection is a slot of its shard's direct-descriptor table; no completion of an earlier
//!   holder of the slot reaches the engine;
//! - the kernel keeps no byte of a send after the submission of its turn: pointers into the engine's
//!   bytes live from [`Engine::prepare`](crate::core::engine::Engine::prepare) to the submission;
//! - a shard without work sleeps, and who gives it work rings; nothing polls;
//! - no receiver of the mesh waits for a sender, and no queue is unbounded.
//!
//! `unsafe` is allowed under this folder alone; each block says why it is sound.
//!
//! To start a node: [`raise_nofile`], [`Listeners::bind`], [`Mesh::new`], then [`spawn_shard`] once
//! per shard.

#![allow(unsafe_code)]

mod accept;
#[cfg(test)]
mod bell_model;
mod clock;
mod close;
mod completion;
mod doorbell;
mod handover;
mod holder;
mod inbox;
mod kernel;
mod limits;
mod listen;
mod mesh;
mod metrics;
mod options;
mod prefault;
mod recv;
mod ring;
mod send;
mod shard;
mod sleep;
mod slots;
mod tag;
mod turn;
mod wire;

pub use close::{DISCARD_BYTES_MAX, DISCARD_MS_MAX};
pub use doorbell::Waker;
pub use inbox::{ControlSender, SendError};
pub use kernel::{KERNEL_MIN, KernelFacts, StartError};
pub use limits::{NofileLimit, SLOTS_MARGIN, raise_nofile, refuse_huge_pages, slots_allowed, table_slots};
pub use listen::{
    BoundAddress, Holder, LISTENERS_MAX, ListenError, ListenSpec, Listeners, ParseListenError, ShardListener,
    SocketOptions,
};
pub use mesh::{CREDITS_MAX, Mesh, SHARDS_MAX};
pub use metrics::{
    BUCKET_BOUNDS_US, HistogramSnapshot, PUBLISH_INTERVAL_MS, ShardMetrics, WIRE_METRICS, WireMetric,
};
#[doc(hidden)]
pub use options::Mutation;
pub use options::{ShardOptions, TurnOptions};
pub use prefault::prefault_code;
pub use ring::probe_kernel;
pub use shard::{ShardEvent, ShardHandle, ShardParts, cores, spawn_shard};
