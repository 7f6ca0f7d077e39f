//! The sans-IO core: sessions, channels, history, presence and limits of one shard.
//!
//! It takes bytes, messages and `now`, and is pulled for output (see [`engine`]). It must not name a
//! runtime, a socket, a clock or a random source; a test of the workspace keeps it so.

pub mod api;
pub mod config;
pub mod engine;
pub mod metrics;
