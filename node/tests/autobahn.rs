//! The cases of the Autobahn test suite, sections 1 to 7, 9 and 10, by their numbers, against the node's own
//! handshake, reader and writer behind the real ring. `./test` runs the suite itself too; this table needs
//! nothing but this repository, and is stricter: every frame that comes back is compared, and the stream
//! must end with FIN (with FIN or RST where the case sends on after its Close).
//!
//! Cases without a message run against the node itself, the others against an echo.

mod autobahn_support;
mod wire_support;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;

use autobahn_support::{Case, Ending, cases};
use ringmain::core::config::CoreConfig;
use ringmain::core::{Core, CoreOptions};
use ringmain_proto::time::Now;
use wire_support::echo::WebSocketEcho;
use wire_support::engine::TestEngine;
use wire_support::node::{Node, Plan};
use wire_support::sockets::{End, await_live};
use wire_support::websocket::{CLOSE, FIN, Received, WebSocket, close_payload};

const NORMAL: u16 = 1_000;

/// Plays a case; `Err` says what was wrong.
fn play(address: SocketAddr, case: &Case) -> Result<(), String> {
    let mut client = WebSocket::open(address, "/connection/websocket");
    // A thread of its own, for an echo may come before everything is sent.
    let mut sending = client.sender();
    let sent = case.sent.clone();
    let sender = std::thread::spawn(move || sent.iter().for_each(|piece| sending(piece)));
    let mut got: Vec<Received> = Vec::new();
    let mut expected = case.expected.clone();
    let mut sender = Some(sender);
    let mut await_sent = || match sender.take().map(JoinHandle::join) {
        Some(Err(_)) => Err("the server takes nothing".to_owned()),
        _ => Ok(()),
    };
    if case.ending == Ending::Ours {
        while got.len() < expected.len() {
            match client.receive() {
                Ok(received) => got.push(received),
                Err(end) => return Err(format!("{end:?} after {} of {} frames", got.len(), expected.len())),
            }
        }
        // Nothing of the case may follow the Close.
        await_sent()?;
        client.send(FIN | CLOSE, &close_payload(NORMAL, b""));
        expected.push((CLOSE, close_payload(NORMAL, b"")));
    }
    let end = loop {
        match client.receive() {
            Ok(received) => got.push(received),
            Err(end) => break end,
        }
    };
    await_sent()?;
    if let (Ending::Theirs(code), Some((CLOSE, payload))) = (case.ending, got.last_mut()) {
        // The reason's text is the server's own.
        payload.truncate(2);
        expected.push((CLOSE, close_payload(code, b"")));
    }
    // Bytes behind the peer's Close that come after the answer are answered with RST.
    let orderly = end == End::Fin || (end == End::Reset && case.ending == Ending::Sent);
    if !orderly || got != expected {
        return Err(format!("{end:?}, {}, expected {}", shown(&got), shown(&expected)));
    }
    Ok(())
}

fn shown(frames: &[Received]) -> String {
    let shown = |(opcode, payload): &Received| {
        let start = String::from_utf8_lossy(&payload[..payload.len().min(40)]).into_owned();
        format!("opcode {opcode} with {} bytes {start:?}", payload.len())
    };
    frames.iter().map(shown).collect::<Vec<_>>().join(", ")
}

fn play_all(address: SocketAddr, chosen: impl Fn(&Case) -> bool) -> usize {
    let chosen: Vec<Case> = cases().into_iter().filter(chosen).collect();
    let failed: Vec<String> = chosen
        .iter()
        .filter_map(|case| play(address, case).err().map(|error| format!("{}: {error}", case.id)))
        .collect();
    assert!(failed.is_empty(), "{} of {} failed:\n{}", failed.len(), chosen.len(), failed.join("\n"));
    await_live(address.port(), 0);
    chosen.len()
}

#[test]
fn the_wire_echoes() {
    let node = Node::start(&Plan::default(), |_| || TestEngine::new(WebSocketEcho::default()));
    let count = play_all(node.address(), |_| true);
    assert_eq!(count, 301, "cases were lost");
    node.stop();
}

#[test]
fn the_node_answers_what_needs_no_echo() {
    let options = CoreOptions {
        shard: 0,
        shards: 1,
        config: Arc::new(CoreConfig::default()),
        seed: 1,
        proxy_listeners: vec![false],
        version: "0.0.0".into(),
        started_unix_ms: 0,
        assets: Arc::new([]),
    };
    let now = Now { mono_ms: 0, unix_ms: 0 };
    let node = Node::start(&Plan::default(), |_| {
        let options = options.clone();
        move || Core::new(options, now).unwrap()
    });
    let count = play_all(node.address(), |case| !case.has_messages());
    assert_eq!(count, 140, "cases were lost");
    node.stop();
}
