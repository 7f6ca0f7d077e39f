//! Wire formats of Ringmain.
//!
//! Owns everything that turns bytes into values and back: PROXY headers, the HTTP upgrade, WebSocket
//! frames, the client protocols, the canonical publication record, close and error codes, and the
//! limits that keep each parser bounded.
//!
//! Must not know sockets, clocks, randomness, runtimes, or who may do what: bytes go in, values come
//! out. Peer input never panics here.

pub mod client;
pub mod close;
pub mod codec;
pub mod http;
pub mod json;
pub mod limits;
pub mod message;
pub mod proxy;
pub mod record;
pub mod tags;
pub mod time;
pub mod ws;
