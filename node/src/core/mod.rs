//! The sans-IO core: sessions, channels, history, presence and limits of one shard.
//!
//! It takes bytes, messages and `now`, and is pulled for output (see [`engine`]). It must not name a
//! runtime, a socket, a clock or a random source; a test of the workspace keeps it so.

pub mod api;
mod auth;
mod calls;
mod channel;
pub mod cluster;
mod commands;
pub mod config;
mod connect;
pub mod engine;
mod fanout;
mod gap;
mod home;
mod infos;
mod latest;
mod log;
pub mod mesh;
pub mod metrics;
mod outbox;
mod output;
mod permission;
mod presence;
mod refresh;
mod session;
mod shard;
mod snapshot;
mod subscribe;
mod timer;
mod timers;
mod wire;

pub use auth::KeyError;
pub use gap::GAP_TOLD_PER_TURN_MAX;
pub use infos::MEMBER_BYTES;
pub use outbox::BATCH_BYTES_MAX;
pub use shard::{Asset, Core, CoreOptions};
pub use snapshot::{ImportError, NotNow, SNAPSHOT_VERSION};
