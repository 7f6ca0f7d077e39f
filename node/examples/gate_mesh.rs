//! Gate C: many empty shards with the mesh on few cores. Prints what idling, all-to-all messages and a
//! stalled shard cost, and fails if anything is lost.
//!
//! `cargo run --release -p ringmain --example gate_mesh -- [shards] [stall seconds]`

#[path = "../tests/wire_support/mod.rs"]
mod wire_support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringmain::core::engine::ShardIndex;
use ringmain::io::{SLOTS_MARGIN, WireMetric, cores};
use wire_support::engine::TestEngine;
use wire_support::gossip::{Gossip, Say};
use wire_support::node::{Node, Plan, await_that};
use wire_support::sockets::{connect, private_bytes};

type GossipNode = Node<TestEngine<Gossip>>;

/// Connections that ping, one after the other, all the time.
const PINGERS: usize = 20;
/// Between two pings.
const PING_EVERY: Duration = Duration::from_millis(2);
/// Batches from each shard to each other one.
const TO_ALL: u64 = 100;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (shards, stall_s) = (number(54) as u16, number(10));
    let memory = private_bytes();
    let total = Arc::new(AtomicU64::new(0));
    let plan = Plan {
        shards,
        credits: 4,
        slots_max: 20_000 - SLOTS_MARGIN - 1,
        tune: |options| options.core = Some(cores()[usize::from(options.index) % cores().len()]),
        ..Plan::default()
    };
    let started = Instant::now();
    let node: GossipNode = Node::start(&plan, |index| {
        let total = total.clone();
        move || TestEngine::new(Gossip::new(index, shards, total))
    });
    println!("{shards} shards on {} cores started in {:.0?}", cores().len(), started.elapsed());
    let fixed = private_bytes() - memory;
    println!("fixed private memory: {:.1} MiB, {} KiB a shard", mib(fixed), fixed / 1024 / u64::from(shards));

    idle(&node, shards);
    broadcast(&node, &total, shards);
    all_to_all(&node, &total, shards);
    stalled(&node, &total, shards, Duration::from_secs(stall_s as u64));
    println!("fixed private memory at the end: {:.1} MiB", mib(private_bytes() - memory));
    let blocked = node.wire(WireMetric::MeshBlocked);
    println!("doorbells rung {}, waits for credit {blocked}", node.wire(WireMetric::Rings));
    node.stop();
    println!("nothing lost, nothing out of order, nobody deadlocked");
}

fn idle(node: &GossipNode, shards: u16) {
    let before = Usage::now();
    std::thread::sleep(Duration::from_secs(5));
    before.print("idle", shards);
    let _ = node;
}

/// One shard sends a batch to every other one each second.
fn broadcast(node: &GossipNode, total: &AtomicU64, shards: u16) {
    let before = Usage::now();
    let mut took = Vec::new();
    for _ in 0..10 {
        let expected = total.load(Ordering::Relaxed) + u64::from(shards) - 1;
        let started = Instant::now();
        node.order(0, Say::ToAll(1));
        while total.load(Ordering::Relaxed) != expected {
            std::thread::sleep(Duration::from_micros(50));
        }
        took.push(started.elapsed());
        std::thread::sleep(Duration::from_secs(1).saturating_sub(started.elapsed()));
    }
    before.print("a broadcast a second", shards);
    took.sort();
    println!(
        "  reached all shards in {:.0?} (median), {:.0?} (worst)",
        took[took.len() / 2],
        took[took.len() - 1]
    );
    let pings = Pings::start(node);
    std::thread::sleep(Duration::from_secs(3));
    pings.print("nothing else");
}

fn all_to_all(node: &GossipNode, total: &AtomicU64, shards: u16) {
    let pings = Pings::start(node);
    let before = Usage::now();
    let started = Instant::now();
    let each = u64::from(shards) * u64::from(shards - 1) * TO_ALL;
    let mut batches = 0;
    while started.elapsed() < Duration::from_secs(5) {
        batches += each;
        let expected = total.load(Ordering::Relaxed) + each;
        (0..usize::from(shards)).for_each(|shard| node.order(shard, Say::ToAll(TO_ALL)));
        await_that(|| total.load(Ordering::Relaxed) == expected, || "all to all stands still".into());
    }
    let rate = batches as f64 / started.elapsed().as_secs_f64();
    before.print("all to all", shards);
    println!("  {batches} batches, {rate:.0} a second");
    pings.print("all to all");
}

/// One shard stands still while all talk to all.
fn stalled(node: &GossipNode, total: &AtomicU64, shards: u16, stall: Duration) {
    let pings = Pings::start_without(node, shards - 1);
    let before = Usage::now();
    let begun = total.load(Ordering::Relaxed) + 1;
    node.order(usize::from(shards) - 1, Say::Stall(stall));
    await_that(|| total.load(Ordering::Relaxed) == begun, || "no stall".into());
    let started = Instant::now();
    let others = u64::from(shards - 1);
    (0..usize::from(shards - 1)).for_each(|shard| node.order(shard, Say::ToAll(TO_ALL)));
    let to_the_stalled = others * TO_ALL;
    let to_others = others * (others - 1) * TO_ALL;
    let now = || total.load(Ordering::Relaxed) - begun;
    await_that(|| now() == to_others, || "others wait for the stalled shard".into());
    println!("a shard stalled: all others had theirs after {:.0?}", started.elapsed());
    std::thread::sleep(stall.saturating_sub(started.elapsed()));
    await_that(|| now() == to_others + to_the_stalled, || "the stalled shard lost some".into());
    before.print("a shard stalled", shards);
    pings.print("a shard stalled");
}

/// Context switches and CPU time of this process.
struct Usage {
    switches: u64,
    cpu_ms: u64,
    at: Instant,
}

impl Usage {
    fn now() -> Self {
        let tasks = fs::read_dir("/proc/self/task").expect("proc").flatten();
        let switches = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
        let switches = switches.map(|status| {
            let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
            lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum::<u64>()
        });
        let stat = fs::read_to_string("/proc/self/stat").expect("proc");
        let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        let ticks = |index: usize| fields[index].parse::<u64>().expect("ticks");
        // utime and stime, in ticks of 10 ms (proc_pid_stat(5)).
        Self { switches: switches.sum(), cpu_ms: (ticks(11) + ticks(12)) * 10, at: Instant::now() }
    }

    fn print(&self, what: &str, shards: u16) {
        let (now, seconds) = (Self::now(), self.at.elapsed().as_secs_f64());
        let switches = (now.switches - self.switches) as f64 / seconds;
        let cpu = (now.cpu_ms - self.cpu_ms) as f64 / 10.0 / seconds;
        let each = switches / f64::from(shards);
        println!("{what}: {switches:.0} context switches a second ({each:.1} a shard), {cpu:.1} % of a core");
    }
}

/// Connections that ping while something else happens.
struct Pings {
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Vec<Duration>>,
}

impl Pings {
    fn start(node: &GossipNode) -> Self {
        Self::start_without(node, ShardIndex::MAX)
    }

    /// Pings all shards but one.
    fn start_without(node: &GossipNode, except: ShardIndex) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut streams = Vec::new();
        while streams.len() < PINGERS {
            let before = (except < node.mesh.shards()).then(|| node.mesh.used(except));
            let mut stream = connect(node.address());
            ping(&mut stream);
            if before == (except < node.mesh.shards()).then(|| node.mesh.used(except)) {
                streams.push(stream);
            }
        }
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut took = Vec::new();
            for i in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                took.push(ping(&mut streams[i % PINGERS]));
                std::thread::sleep(PING_EVERY);
            }
            took
        });
        Self { stop, thread }
    }

    fn print(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let mut took = self.thread.join().expect("pings");
        took.sort();
        let at = |quantile: f64| took[((took.len() - 1) as f64 * quantile) as usize];
        let (p50, p99, worst) = (at(0.5), at(0.99), at(1.0));
        println!("  ping, {what}: p50 {p50:.0?}, p99 {p99:.0?}, worst {worst:.0?} ({} pings)", took.len());
    }
}

fn ping(stream: &mut TcpStream) -> Duration {
    let started = Instant::now();
    stream.write_all(b"ping").expect("a ping");
    stream.read_exact(&mut [0; 4]).expect("a pong");
    started.elapsed()
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
