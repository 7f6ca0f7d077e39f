//! The server under the Autobahn test suite: the node's handshake, frame reader and writer behind the real
//! ring, echoing every message. Prints its address, and serves until its standard input ends.
//!
//! `cargo run --release -p ringmain --example autobahn_echo`

#[path = "../tests/wire_support/mod.rs"]
mod wire_support;

use std::io::Read;

use wire_support::echo::WebSocketEcho;
use wire_support::engine::TestEngine;
use wire_support::node::{Node, Plan};

fn main() {
    let node = Node::start(&Plan::default(), |_| || TestEngine::new(WebSocketEcho::default()));
    println!("{}", node.address());
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).expect("standard input");
    node.stop();
}
