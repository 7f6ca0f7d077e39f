//! The NATS bus: core subjects for ephemeral channels, JetStream with RePublish for positioned ones.
//!
//! Owns: one connection of a node to its NATS servers and all that goes over it. Must not know: ports, watches,
//! deadlines of commands (the hub's).
//!
//! | module | owns |
//! |---|---|
//! | [`options`] | options from a URL, files, the environment |
//! | `subjects` | subjects and tokens |
//! | `wire` | what nodes say to each other |
//! | `api` | JetStream's requests and answers |
//! | `barrier` | when a stream is believed, and its epoch |
//! | `read` | history and positions out of a stream |
//! | `node` | what outlives a connection, and making connections |
//! | `life` | one connection from the first word to its loss; with it: |
//! | `streams`, `pulse` | how far each stream is; hearts and canaries |
//! | `interest`, `confirm` | what is heard; when a subscription is confirmed |
//! | `ephemeral`, `publish` | what is missing of what was said; publishes in flight |
//! | `tops` | positions of many channels at once |
//! | `keep` | what a stream's age limit would take |
//! | [`check`](mod@check) | what a server's configuration gives up |
//!
//! # How the contract is met
//!
//! - **Offsets** are stream sequences: they increase, and are not dense. The channel is a subject of its own, so the
//!   server itself names each publication's predecessor to its hearers (`Nats-Last-Sequence`).
//! - **Epochs** are made of the stream's record (`barrier`) and the channel's name. There is no lineage: a stream
//!   that lost something voids all positions in it, and says so.
//! - **History** is cut when it is read (`read`), so one stream serves all sizes and times, and two nodes whose
//!   configurations differ for a while still meet in it. Its price is room: the stream keeps
//!   [`NatsOptions::history_size_max`] publications of a channel for [`NatsOptions::retention_ms`].
//! - **Clearing** writes a mark into a subject beside the channel's: what has a sequence before it is no history any
//!   more. Then it is purged but for the channel's last publication, which is its position.
//! - **A position** lasts as long as the channel's last publication or mark lies in the stream; while the channel is
//!   open at a node, that sees to it (`keep`).
//! - **A subscription is confirmed** when a canary went through its stream and came back after it, and, for an
//!   ephemeral channel, when every living node has answered a question that was sent behind it: then the interest
//!   has reached their servers.
//! - **An ephemeral publication is accepted** when something sent behind it came back: the server took it.
//!
//! Invariant: one connection is one life. Whatever is in doubt ends it, or ends the stream's part of it, and nothing
//! of it is believed in the next.

mod api;
mod barrier;
pub mod check;
mod confirm;
mod ephemeral;
mod interest;
mod keep;
mod life;
mod node;
pub mod options;
mod publish;
mod pulse;
mod read;
mod replies;
mod streams;
mod subjects;
mod tops;
mod wire;

pub use check::check;
pub use node::run;
pub use options::{Login, NatsOptions, UrlError};
