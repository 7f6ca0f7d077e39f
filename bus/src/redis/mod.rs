//! The Redis backend: Redis 7 and Valkey, as one server, behind Sentinels, or as a cluster.
//!
//! | module | owns |
//! |---|---|
//! | [`options`] | the URL and what else an operator may say |
//! | `script`, `bus.lua` | the one script that publishes, reads and clears, and its layouts |
//! | `names` | keys, pub/sub channels, hash slots |
//! | `wire` | one connection |
//! | `topology` | who is master of what |
//! | `session` | one life of the connections to one master |
//! | `router` | domains, sessions, retries |
//! | `check` | what the servers' configuration gives up |
//!
//! Must not know: the hub's chains, client protocols.
//!
//! The crate `redis` gives commands and the protocol's codec. Connections, topology and subscriptions are ours: its
//! cluster client does not bring subscriptions back after a failover, and its multiplexed connection takes an
//! unsubscription by the server for the answer to whatever was asked last.
//!
//! A channel is one HASH ([`lineage`](crate::lineage) L1), not a stream beside a key: what can be evicted, migrated or
//! expired alone would let a position outlive its ids. The script is called for every publication and for every read
//! of a position; it publishes what it stored in the same step.
//!
//! What a failover takes is published again by the node that passed the ack on, unless that node died too;
//! [`Durability::Replicas`] covers that case as well.

mod canary;
mod check;
mod context;
mod names;
pub mod options;
mod router;
mod script;
mod session;
mod topology;
mod wire;

use std::rc::Rc;

pub use check::check;
pub use options::{Credentials, Deployment, Durability, RedisOptions, Secret, Tls, UrlError};

use crate::backend::BackendEnds;
use context::Context;
use wire::Dialer;

/// Why the backend cannot start. The operator's fault: files that TLS needs.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(String);

/// Runs the backend until the hub's end is dropped. On a [`tokio::runtime::LocalRuntime`].
///
/// # Errors
///
/// Only before anything is dialed; a broker that cannot be reached is waited for.
pub async fn run(options: RedisOptions, ends: BackendEnds) -> Result<(), StartError> {
    let seed = getrandom::u64().map_err(|error| StartError(error.to_string()))?;
    let context = Rc::new(Context::new(options, &ends, seed));
    let dialer = Dialer::new(context.options.clone()).map_err(|error| StartError(error.to_string()))?;
    router::serve(context, dialer, ends).await;
    Ok(())
}
