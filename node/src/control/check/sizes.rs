//! Bytes of what is counted in the worst case.
//!
//! Owns the few figures that no configuration names. Each says what holds it; those of our own types
//! are checked against them.

/// A connection with what it holds when idle: the session with its user's name, its slot on the wire
/// and its places in the tables of users and timers. (Measured on a node with 6,000: under this.)
pub(super) const CONNECTION_BYTES: u64 = 1_024;

/// A subscription: the session's entry and the channel's, each in a list that doubles as it grows.
pub(super) const SUBSCRIPTION_BYTES: u64 = 48;

/// A channel with its name, its position and one publication's place. (Measured with 100,000: 490.)
pub(super) const CHANNEL_BYTES: u64 = 512;

/// A command of the control plane in a shard's inbox, without its payload, which the admin port's pool
/// holds.
pub(super) const CONTROL_BYTES: u64 = 256;

/// A shard without connections: stack, executor, its own ring and tables at their smallest.
pub(super) const SHARD_BYTES: u64 = 4 * 1024 * 1024;

/// A submission entry of a ring (`struct io_uring_sqe`, io_uring_setup(2)).
pub(super) const SUBMISSION_BYTES: u64 = 64;

/// A completion entry of a ring (`struct io_uring_cqe`).
pub(super) const COMPLETION_BYTES: u64 = 16;

/// A TCP socket in the kernel without its buffers: `TCP`, `sock_inode_cache`, `filp` and `dentry` of
/// /proc/slabinfo, rounded up.
pub(super) const SOCKET_BYTES: u64 = 4 * 1024;

/// Code, the control thread, and the allocator's reserve.
pub(super) const PROCESS_BYTES: u64 = 64 * 1024 * 1024;

const _: () = {
    use crate::core::api::ControlCommand;
    assert!(size_of::<ControlCommand>() as u64 <= CONTROL_BYTES);
};
