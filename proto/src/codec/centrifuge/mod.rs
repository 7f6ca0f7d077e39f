//! The Centrifuge v2 client protocol in JSON.
//!
//! Owns the shapes of that protocol's JSON: field names, their order and which are omitted, as
//! Centrifugo writes them. Must not know frames or sessions.

mod decode;
mod encode;
mod usual;

pub(super) use decode::command;
pub(super) use encode::{push, reply};
pub(super) use usual::usual_publish;

#[cfg(test)]
mod decode_tests;
#[cfg(test)]
mod encode_tests;
