//! What the wire's tests share: a node of test engines, an outbox for engines, clients and counts.
//!
//! The engines here are real ones behind the real ring; only their protocols are made for checking.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its own part")]

pub mod echo;
pub mod engine;
pub mod gossip;
pub mod node;
pub mod outbox;
pub mod sockets;
pub mod stream;
pub mod websocket;
