//! The control plane: configuration, command line, admin HTTP. One tokio thread.
//!
//! Owns everything that an operator or an application's backend touches: the configuration and its
//! check, the server API, health, metrics and logs, start and drain. It may be ordinary: nothing here
//! is on the way of a frame between two connections. It must not know sockets' bytes, sessions or
//! logs; it asks shards by [`crate::core::api`] and they answer.

pub mod admin;
pub mod bus;
pub mod check;
pub mod cli;
pub mod cluster;
pub mod config;
pub mod failure;
pub mod logging;
pub mod router;
pub mod serve;
pub mod state;
pub mod token;

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
