//! What the embedded bus costs: nanoseconds per publish and bytes per channel.
//!
//! `cargo run --release -p ringmain-bus --example embedded_cost`
//!
//! Bytes are the growth of the process's resident memory (`/proc/self/statm`), and beside it what the pool
//! has counted. Times are wall time of one thread, the least of five rounds.

use std::hint::black_box;
use std::time::Instant;

use ringmain_bus::memory::{EmbeddedBus, MemoryOptions};
use ringmain_bus::{Bus, Channel, ChannelId, ChannelOptions, HistoryQuery, PublicationId, Since, Token};
use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

const USERS: ChannelOptions =
    ChannelOptions { history_size: 10, history_ttl_ms: 300_000, meta_ttl_ms: 3_600_000 };
const ROOMS: ChannelOptions =
    ChannelOptions { history_size: 100, history_ttl_ms: 300_000, meta_ttl_ms: 3_600_000 };
const ROUNDS: usize = 5;

fn resident_bytes() -> isize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|field| field.parse::<isize>().ok());
    pages.unwrap_or_default() * 4096
}

fn bus() -> EmbeddedBus {
    EmbeddedBus::new(&MemoryOptions { history_bytes_max: 2 << 30, ..MemoryOptions::new(7) })
}

fn now(mono_ms: u64) -> Now {
    Now { mono_ms, unix_ms: mono_ms }
}

fn publish(bus: &mut EmbeddedBus, mono_ms: u64, id: u32, options: &ChannelOptions, data: &[u8]) {
    let channel = Channel { id: ChannelId(id), name: "user:42", options };
    let name = PublicationId::Node { incarnation: 1, sequence: mono_ms };
    let publication = Publication { data, time_ms: mono_ms as i64, ..Publication::default() };
    let _ = black_box(bus.publish(now(mono_ms), Token(0), channel, name, &publication));
}

/// Publishes `count` times round robin over `channels`, after filling their histories; ns per publish.
fn publish_ns(channels: u32, options: &ChannelOptions, bytes: usize, count: u32) -> f64 {
    let mut bus = bus();
    let data = vec![b'x'; bytes];
    // Not in the order of the ids: neighbours must not be each other's cache lines.
    let pick = |n: u32| n.wrapping_mul(2_654_435_761) % channels;
    for n in 0..channels * options.history_size.min(120) {
        publish(&mut bus, 1, pick(n), options, &data);
    }
    let round = |_| {
        let start = Instant::now();
        for n in 0..count {
            publish(&mut bus, 2, pick(n), options, &data);
        }
        start.elapsed().as_nanos() as f64 / f64::from(count)
    };
    (0..ROUNDS).map(round).fold(f64::MAX, f64::min)
}

fn read_ns(behind: u64) -> f64 {
    let mut bus = bus();
    for _ in 0..250 {
        publish(&mut bus, 1, 0, &ROOMS, &[b'x'; 128]);
    }
    let channel = Channel { id: ChannelId(0), name: "room:a", options: &ROOMS };
    let since = Some(Since { offset: 250 - behind, epoch: None });
    let query = HistoryQuery { since, limit: 100, reverse: false };
    let start = Instant::now();
    for _ in 0..100_000 {
        let _ = black_box(bus.read(now(2), Token(0), channel, &query, &mut |publication| {
            black_box(publication.offset);
        }));
    }
    start.elapsed().as_nanos() as f64 / 100_000.0
}

fn main() {
    // First, so that memory freed by the other rounds is not taken for new.
    memory();
    println!("publish, ns:");
    println!("  1 channel, history 100, 128 B        {:7.1}", publish_ns(1, &ROOMS, 128, 2_000_000));
    println!("  1,000 channels, history 100, 128 B   {:7.1}", publish_ns(1_000, &ROOMS, 128, 2_000_000));
    println!("  100,000 channels, history 10, 128 B  {:7.1}", publish_ns(100_000, &USERS, 128, 2_000_000));
    let ephemeral = publish_ns(1, &ChannelOptions::EPHEMERAL, 128, 2_000_000);
    println!("  1 ephemeral channel, 128 B           {ephemeral:7.1}");
    println!(
        "read since, ns: 0 behind {:.0}, 10 behind {:.0}, 100 behind {:.0}",
        read_ns(0),
        read_ns(10),
        read_ns(100)
    );
}

fn memory() {
    const CHANNELS: u32 = 1_000_000;
    let resident = resident_bytes();
    let mut bus = bus();
    for id in 0..CHANNELS {
        let channel = Channel { id: ChannelId(id), name: "user:42", options: &USERS };
        let _ = black_box(bus.open(now(1), Token(0), channel));
    }
    let report = |what: &str, bus: &EmbeddedBus| {
        let per = |bytes: isize| bytes as f64 / f64::from(CHANNELS);
        println!(
            "{what}: {:.0} B resident, {:.0} B in the pool",
            per(resident_bytes() - resident),
            per(bus.usage().history_bytes as isize),
        );
    };
    println!("memory, per channel of {CHANNELS}:");
    report("  open, nothing published", &bus);
    let start = Instant::now();
    for id in 0..CHANNELS {
        publish(&mut bus, 1, id, &USERS, &[b'x'; 100]);
    }
    let first_ns = start.elapsed().as_nanos() as f64 / f64::from(CHANNELS);
    report("  with one publication of 100 B each", &bus);
    println!("  the first publication of a channel: {first_ns:.0} ns");
    let (start, mut polls, mut longest) = (Instant::now(), 0u32, 0u128);
    while bus.usage().histories > 0 {
        let turn = Instant::now();
        let due = bus.next_deadline().unwrap_or_default().max(USERS.history_ttl_ms + 1_000);
        bus.poll(now(due), &mut |_| {});
        longest = longest.max(turn.elapsed().as_micros());
        polls += 1;
    }
    println!(
        "  sweep of all: {polls} polls, {:.1} us each, longest {longest} us",
        start.elapsed().as_micros() as f64 / f64::from(polls)
    );
}
