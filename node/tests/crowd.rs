//! The real program under a crowd: thousands that close at once, and a bystander beside a large fan-out.

mod admin_support;
mod crowd_support;
mod wire_support;

use std::time::{Duration, Instant};

use admin_support::Node;
use crowd_support::{Crowd, Heard, PATIENCE, clients_allowed, subscribers};
use wire_support::sockets::{End, await_live};
use wire_support::websocket::{CLOSE, FIN, PING, PONG, TEXT, WebSocket, close_payload, frame};

const PATH: &str = "/connection/websocket";
/// With pings of WebSocket's own.
const FRAME_PINGS: &str = "/connection/websocket?cf_ws_frame_ping_pong=true";

/// A demo node whose rooms are without presence, joins and leaves.
fn node(args: &[&str]) -> Node {
    let quiet = [
        "--demo",
        "--namespaces.room.presence=false",
        "--namespaces.room.join_leave=false",
        "--namespaces.room.force_push_join_leave=false",
    ];
    Node::start_large(&[&quiet, args].concat(), &[])
}

/// Clients that close at the same time, a third of them with FIN at once, and others whose close frame has
/// crossed a ping, so that their pong follows it (RFC 6455 section 5.5.2): each gets the answer to its close
/// frame and then FIN, and nothing is left.
#[test]
fn thousands_that_close_at_once_all_see_an_orderly_end() {
    const CLIENTS: usize = 3_000;
    let node = node(&["--shards=2", "--client.ping_interval_ms=1000", "--client.pong_timeout_ms=900"]);
    let count = CLIENTS.min(clients_allowed());
    let mut crowd = Crowd::new(node.clients);
    let clients = subscribers(&mut crowd, count, |_| PATH, "room:crowd");
    let pinged = subscribers(&mut crowd, count / 10, |_| FRAME_PINGS, "room:crowd");
    node.await_metric("sessions", (clients.len() + pinged.len()) as u64);
    let close = frame(FIN | CLOSE, &close_payload(1_000, b"bye"));
    for (position, &client) in clients.iter().enumerate() {
        crowd.send(client, &close);
        if position.is_multiple_of(3) {
            crowd.send_fin(client);
        }
    }
    let end = Instant::now() + PATIENCE;
    let mut answered = vec![false; clients.len() + pinged.len()];
    let (mut pongs, mut crossed): (Vec<(usize, Vec<u8>)>, usize) = (Vec::new(), 0);
    while crowd.len() > 0 {
        assert!(Instant::now() < end, "{} clients were not closed in time", crowd.len());
        let heard = crowd.listen(Duration::from_millis(20));
        for (client, pong) in pongs.drain(..) {
            crowd.send(client, &pong);
        }
        for (client, heard) in heard {
            match heard {
                Heard::Frame(CLOSE, payload) => {
                    assert_eq!(payload, close_payload(1_000, b""), "client {client}");
                    answered[client] = true;
                }
                // The pong leaves after the node has seen the close frame.
                Heard::Frame(PING, payload) if pinged.contains(&client) => {
                    crossed += 1;
                    crowd.send(client, &close);
                    pongs.push((client, frame(FIN | PONG, &payload)));
                }
                // A ping of the client protocol; nothing but what WebSocket asks for may follow our close.
                Heard::Frame(opcode, payload) => assert_eq!((opcode, &payload[..]), (TEXT, &b"{}"[..])),
                Heard::Ended(how) => {
                    assert_eq!((how, answered[client]), (End::Fin, true), "client {client}");
                }
            }
        }
    }
    assert_eq!(crossed, pinged.len(), "pings");
    node.await_metric("connections", 0);
    node.await_metric("subscriptions", 0);
    await_live(node.clients.port(), 0);
}

/// Where a broadcast stands.
struct Progress<'c> {
    crowd: &'c Crowd,
    /// Some of the subscribers.
    sample: Vec<usize>,
    /// Of how many.
    subscribers: usize,
    /// Bytes that each has had before this broadcast.
    before: u64,
}

impl Progress<'_> {
    /// Estimates how many have it.
    fn delivered(&self) -> usize {
        let have = self.sample.iter().filter(|&&client| self.crowd.unread(client) > self.before).count();
        have * self.subscribers / self.sample.len()
    }
}

/// While a broadcast goes out to a crowd on its shard, a bystander's ping is answered within about two turns.
/// Counted in deliveries, not in time: a slow machine delivers slowly too.
#[test]
fn a_broadcast_keeps_no_ping_waiting() {
    const SUBSCRIBERS: usize = 15_000;
    const SAMPLE: usize = 256;
    const BROADCASTS: usize = 8;
    /// Sends of a turn.
    const TURN: usize = 512;
    let node = node(&["--shards=1"]);
    let count = SUBSCRIBERS.min(clients_allowed());
    let mut crowd = Crowd::new(node.clients);
    let clients = subscribers(&mut crowd, count, |_| PATH, "room:crowd");
    // Nobody reads from now on: what a broadcast has reached is counted in the sockets.
    clients.iter().for_each(|&client| crowd.set_reading(client, false));
    let mut publisher = node.connect();
    let mut bystander = WebSocket::open(node.clients, FRAME_PINGS);
    let sample: Vec<usize> = (0..SAMPLE).map(|n| clients[n * count / SAMPLE]).collect();
    let mut progress =
        Progress { crowd: &crowd, sample, subscribers: count, before: crowd.unread(clients[0]) };
    let (mut waits, mut slowest) = (Vec::new(), Duration::ZERO);
    for n in 0..BROADCASTS {
        publisher.send(&format!(r#"{{"id":{},"publish":{{"channel":"room:crowd","data":{n}}}}}"#, n + 2));
        let end = Instant::now() + PATIENCE;
        loop {
            let delivered = progress.delivered();
            if delivered == count {
                break;
            }
            assert!(Instant::now() < end, "{delivered} of {count} in time");
            let asked = Instant::now();
            bystander.send(FIN | PING, b"");
            assert_eq!(bystander.receive(), Ok((PONG, Vec::new())));
            // Those before the first delivery waited for nothing.
            if delivered > 0 {
                slowest = slowest.max(asked.elapsed());
                waits.push(progress.delivered() - delivered);
            }
        }
        progress.before = crowd.unread(clients[0]);
        assert!(
            clients.iter().all(|&client| crowd.unread(client) == progress.before),
            "one publication each"
        );
    }
    assert!(waits.len() >= BROADCASTS, "the broadcasts are too short: {} pings", waits.len());
    waits.sort_unstable();
    let median = waits[waits.len() / 2];
    println!("{} pings, {median} deliveries in between, the slowest took {slowest:?}", waits.len());
    // The rest of the turn that was under way, and what the pong's own turn holds; and one for the estimate.
    assert!(median <= 3 * TURN, "a ping waits for {median} deliveries: {waits:?}");
}
