//! Round trips of WebSocket pings on every shard of a running demo node, whatever others do to it: how long
//! a large fan-out keeps a bystander waiting.
//!
//! `cargo run --release -p ringmain --example gate_pings -- ADDRESS SHARDS [seconds] [ms between pings]`

#[path = "../tests/wire_support/mod.rs"]
mod wire_support;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use wire_support::websocket::{CLOSE, FIN, PING, PONG, TEXT, WebSocket, frame};

/// Connections opened at the most to find one on every shard.
const TRIES: usize = 1_000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let address: SocketAddr = arguments[0].parse().expect("ADDRESS as 127.0.0.1:8000");
    let shards: usize = arguments[1].parse().expect("SHARDS as a number");
    let number =
        |index: usize, default| arguments.get(index).map_or(default, |text| text.parse().expect("a number"));
    let (seconds, every_ms) = (number(2, 10), number(3, 10));
    let ends = Instant::now() + Duration::from_secs(seconds);
    let pinging: Vec<_> = on_every_shard(address, shards)
        .into_iter()
        .map(|client| std::thread::spawn(move || ping(client, ends, Duration::from_millis(every_ms))))
        .collect();
    let mut all = Vec::new();
    for (shard, thread) in pinging.into_iter().enumerate() {
        let mut round_trips = thread.join().expect("the node answers");
        show(&format!("shard {shard}"), &mut round_trips);
        all.append(&mut round_trips);
    }
    show("all", &mut all);
}

/// A connection on each shard.
fn on_every_shard(address: SocketAddr, shards: usize) -> Vec<WebSocket> {
    let mut found: Vec<Option<WebSocket>> = (0..shards).map(|_| None).collect();
    for _ in 0..TRIES {
        let mut client = WebSocket::open(address, "/connection/websocket?cf_ws_frame_ping_pong=true");
        client.send(FIN | TEXT, br#"{"id":1,"connect":{"name":"ringmain-demo"}}"#);
        let reply = client.text();
        let shard = reply.split(r#""shard":"#).nth(1).expect("serve --demo says which shard it is");
        let shard: usize =
            shard.split(|byte: char| !byte.is_ascii_digit()).next().unwrap_or("").parse().expect("a number");
        found[shard].get_or_insert(client);
        if found.iter().all(Option::is_some) {
            return found.into_iter().flatten().collect();
        }
    }
    panic!("not every shard took one of {TRIES} connections");
}

/// Pings at fixed times, whether or not the one before was answered; a ping carries the time that was meant.
fn ping(mut client: WebSocket, ends: Instant, every: Duration) -> Vec<Duration> {
    let begun = Instant::now();
    let mut sending = client.sender();
    let sender = std::thread::spawn(move || {
        let mut meant = Duration::ZERO;
        while begun + meant < ends {
            std::thread::sleep(meant.saturating_sub(begun.elapsed()));
            sending(&frame(FIN | PING, &(meant.as_nanos() as u64).to_be_bytes()));
            meant += every;
        }
        sending(&frame(FIN | CLOSE, b""));
    });
    let mut round_trips = Vec::new();
    while let Ok((opcode, payload)) = client.receive() {
        if opcode == PONG {
            let meant = u64::from_be_bytes(payload.try_into().expect("the payload of a ping"));
            round_trips.push(begun.elapsed().saturating_sub(Duration::from_nanos(meant)));
        }
    }
    sender.join().expect("the sender");
    round_trips
}

fn show(what: &str, round_trips: &mut [Duration]) {
    round_trips.sort();
    let at = |quantile: f64| round_trips[((round_trips.len() - 1) as f64 * quantile) as usize];
    println!(
        "{what}: {} pings, p50 {:.1?}, p90 {:.1?}, p99 {:.1?}, p99.9 {:.1?}, worst {:.1?}",
        round_trips.len(),
        at(0.5),
        at(0.9),
        at(0.99),
        at(0.999),
        at(1.0)
    );
}
