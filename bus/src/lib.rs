//! The Ringmain bus: its contract, its backends and the suite that they pass.
//!
//! | module | owns |
//! |---|---|
//! | [`backend`] | what the client of a real broker is asked and tells |
//! | [`contract`] | the [`Bus`] trait and its numbered clauses |
//! | [`envelope`] | a publication as bytes on a broker |
//! | [`epoch`], [`nonce`], [`types`] | positions, commands, answers, events |
//! | [`position`] | judging a client's position, as a pure function |
//! | [`lineage`] | epochs that follow one another, as pure functions, and their exhaustive search |
//! | [`link`] | a shard's port to a bus on another thread |
//! | [`hub`] | a node's channels on one backend: chains, interest, joined reads, healing |
//! | [`kafka`] | the backend for Kafka |
//! | [`memory`] | the embedded bus of one shard |
//! | [`redis`] | the backend for Redis and Valkey |
//! | [`sim`] | a simulated broker on virtual time, with faults |
//! | [`slot`] | slots and hashes of names |
//! | [`suite`] | the one contract suite |
//!
//! Only the backends and [`hub::run`] know a runtime; the rest must not know sockets, runtimes, clocks or randomness:
//! time and nonces are arguments.

pub mod backend;
mod backoff;
pub mod contract;
pub mod envelope;
pub mod epoch;
pub mod hub;
pub mod kafka;
pub mod lineage;
pub mod link;
pub mod memory;
pub mod nats;
pub mod nonce;
pub mod position;
pub mod redis;
mod runtime;
mod seldom;
pub mod sim;
pub mod slot;
pub mod suite;
pub mod types;
mod url;

pub use contract::{ANSWER_MS_MAX, Bus, HISTORY_LATE_MS, LOSS_VISIBLE_MS_MAX};
pub use epoch::{Epoch, EpochText, Position};

pub use types::{
    Accepted, BusError, Channel, ChannelId, ChannelOptions, Event, Health, HistoryQuery,
    IDEMPOTENCY_KEY_BYTES_MAX, Outcome, Page, PublicationId, PublishError, Since, Token,
};
