//! Server CPU per echoed message: a shard with a bare echo engine against a bare epoll loop, interleaved
//! in one run, one core for the server and one for the client. A rough figure for the loop's own work;
//! the load generator measures the whole node.
//!
//! `cargo run --release -p ringmain --example gate_echo -- [rounds] [connections] [window]`

#[path = "../tests/wire_support/mod.rs"]
mod wire_support;

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ringmain::core::engine::{Effect, Engine, Send, ShardIndex, Slot, Source, TurnBudget};
use ringmain::core::metrics::Values;
use ringmain::io::{ShardOptions, WireMetric, cores};
use ringmain_proto::time::Now;
use rustix::event::epoll;
use wire_support::node::{Node, Plan};

const MESSAGE: [u8; 64] = [7; 64];
const ROUND: Duration = Duration::from_millis(1_500);

type Tune = fn(&mut ShardOptions);

/// Echoes from one arena, as a hub's own bytes of a turn do.
#[derive(Debug, Default)]
struct LeanEcho {
    arena: Vec<u8>,
    sends: Vec<Send>,
    /// What came for a connection that already sends in this turn.
    later: Vec<(Slot, Vec<u8>)>,
    sending: Vec<bool>,
    effects: Vec<Effect>,
    values: Values,
    connections: usize,
}

impl LeanEcho {
    fn offer(&mut self, slot: Slot, chunk: &[u8]) {
        let start = self.arena.len() as u32;
        if std::mem::replace(&mut self.sending[slot as usize], true) {
            match self.sends.last_mut() {
                Some(last) if last.slot == slot => last.len += chunk.len() as u32,
                _ => return self.later.push((slot, chunk.to_vec())),
            }
        } else {
            self.sends.push(Send { slot, len: chunk.len() as u32, source: Source::Arena(start) });
        }
        self.arena.extend_from_slice(chunk);
    }
}

impl Engine for LeanEcho {
    type Mesh = ();
    type Control = ();
    type Answer = ();

    fn accept(&mut self, slot: Slot, _listener: u16, _now: Now) {
        self.connections += 1;
        let len = self.sending.len().max(slot as usize + 1);
        self.sending.resize(len, false);
    }
    fn input(&mut self, slot: Slot, chunk: &mut [u8], _now: Now) {
        self.offer(slot, chunk);
    }
    fn input_ended(&mut self, slot: Slot, _now: Now) {
        self.effects.push(Effect::Finish(slot));
    }
    fn broken(&mut self, slot: Slot, _errno: i32, _now: Now) {
        self.effects.push(Effect::Abort(slot));
    }
    fn released(&mut self, _slot: Slot) {
        self.connections -= 1;
    }
    fn inbox(&mut self, _from: ShardIndex, (): (), _now: Now) {}
    fn control(&mut self, (): (), _now: Now) {}
    fn tick(&mut self, _now: Now) {}
    fn next_deadline_ms(&self) -> Option<u64> {
        None
    }
    fn prepare(&mut self, _now: Now, _budget: TurnBudget) -> bool {
        !self.later.is_empty()
    }
    fn sends(&self) -> &[Send] {
        &self.sends
    }
    fn bytes(&self, send: &Send) -> &[u8] {
        let Source::Arena(start) = send.source else { unreachable!("all bytes are in the arena") };
        &self.arena[start as usize..start as usize + send.len as usize]
    }
    fn short(&mut self, slot: Slot, _accepted: u32, _now: Now) {
        panic!("the socket of {slot} is full: the client keeps to its window");
    }
    fn settle(&mut self, _now: Now) {
        for send in self.sends.drain(..) {
            self.sending[send.slot as usize] = false;
        }
        self.arena.clear();
        for (slot, chunk) in std::mem::take(&mut self.later) {
            self.offer(slot, &chunk);
        }
    }
    fn writable(&mut self, _slot: Slot, _now: Now) {}
    fn mesh_targets(&self) -> &[ShardIndex] {
        &[]
    }
    fn take_mesh(&mut self, _to: ShardIndex, _now: Now) -> Option<()> {
        None
    }
    fn take_effects(&mut self, into: &mut Vec<Effect>) {
        into.append(&mut self.effects);
    }
    fn take_answers(&mut self, _into: &mut Vec<()>) {}
    fn metrics(&mut self) -> &mut Values {
        &mut self.values
    }
    fn connections(&self) -> usize {
        self.connections
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (rounds, connections, window) = (number(5), number(128), number(1));
    let contenders: [(&str, Tune); 2] = [
        ("shard", |_| {}),
        ("shard, every wait through the executor", |options| options.turn.nap_max_us = 0),
    ];
    let mut costs: HashMap<&str, Vec<f64>> = HashMap::new();
    println!("{connections} connections, window {window}, {} bytes", MESSAGE.len());
    for _ in 0..rounds {
        costs.entry("bare epoll").or_default().push(bare_epoll(connections, window));
        for (name, tune) in contenders {
            costs.entry(name).or_default().push(shard(tune, connections, window));
        }
    }
    let bare = median(&costs["bare epoll"]);
    for name in ["bare epoll", contenders[0].0, contenders[1].0] {
        let cost = median(&costs[name]);
        println!(
            "{name}: {cost:.2} us a message, {:.2} x bare epoll; rounds {:.2?}",
            cost / bare,
            costs[name]
        );
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// CPU microseconds a message of a shard.
fn shard(tune: Tune, connections: usize, window: usize) -> f64 {
    let plan = Plan { slots_max: 2_000, tune, ..Plan::default() };
    let before = threads();
    let node = Node::<LeanEcho>::start(&plan, |_| LeanEcho::default);
    let thread = new_thread(&before, "shard-0");
    pin(thread, 0);
    let cost = drive(node.address(), thread, connections, window);
    let wire = |metric| node.shards[0].metrics.wire(metric);
    if std::env::var_os("GATE_COUNTS").is_some() {
        let (enters, naps, sleeps) =
            (wire(WireMetric::Enters), wire(WireMetric::Naps), wire(WireMetric::Sleeps));
        println!(
            "  {enters} enters, {naps} naps, {sleeps} sleeps, {} completions",
            wire(WireMetric::Completions)
        );
    }
    node.stop();
    cost
}

/// CPU microseconds a message of a thread that does recv and send after epoll_wait.
fn bare_epoll(connections: usize, window: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let before = threads();
    let server = std::thread::Builder::new().name("bare-epoll".into());
    let server = server.spawn(move || serve_epoll(&listener, connections, &stopped)).expect("a thread");
    let thread = new_thread(&before, "bare-epoll");
    pin(thread, 0);
    let cost = drive(address, thread, connections, window);
    stop.store(true, Ordering::Relaxed);
    server.join().expect("the bare server");
    cost
}

fn serve_epoll(listener: &TcpListener, connections: usize, stop: &AtomicBool) {
    let poll = epoll::create(epoll::CreateFlags::empty()).expect("epoll");
    let mut streams: Vec<TcpStream> = Vec::new();
    for _ in 0..connections {
        let (stream, _) = listener.accept().expect("a client");
        stream.set_nonblocking(true).expect("non-blocking");
        stream.set_nodelay(true).expect("no delay");
        watch(&poll, &stream, streams.len());
        streams.push(stream);
    }
    let mut buffer = [0; 4_096];
    each_ready(&poll, stop, |index| {
        let n = streams[index].read(&mut buffer).unwrap_or(0);
        streams[index].write_all(&buffer[..n]).unwrap_or_default();
    });
}

/// Echoes for a while; gives the CPU microseconds of `thread` per message.
fn drive(address: SocketAddr, thread: u32, connections: usize, window: usize) -> f64 {
    let client = std::thread::spawn(move || {
        pin(rustix::thread::gettid().as_raw_nonzero().get() as u32, 1);
        let poll = epoll::create(epoll::CreateFlags::empty()).expect("epoll");
        let mut streams: Vec<TcpStream> = (0..connections)
            .map(|index| {
                let stream = TcpStream::connect(address).expect("the server");
                stream.set_nodelay(true).expect("no delay");
                watch(&poll, &stream, index);
                stream
            })
            .collect();
        for stream in &mut streams {
            (0..window).for_each(|_| stream.write_all(&MESSAGE).expect("a message"));
            stream.set_nonblocking(true).expect("non-blocking");
        }
        let (stop, started) = (AtomicBool::new(false), Instant::now());
        let (mut bytes, mut begun) = (0, None);
        let mut buffer = [0; 4_096];
        each_ready(&poll, &stop, |index| {
            let n = streams[index].read(&mut buffer).expect("an echo");
            streams[index].write_all(&buffer[..n]).expect("a message");
            bytes += n;
            if begun.is_none() && started.elapsed() > ROUND / 5 {
                begun = Some((bytes, cpu_ns(thread)));
            }
            if started.elapsed() > ROUND {
                stop.store(true, Ordering::Relaxed);
            }
        });
        let (bytes_before, ns_before) = begun.expect("a warm server");
        let messages = (bytes - bytes_before) / MESSAGE.len();
        (cpu_ns(thread) - ns_before) as f64 / 1_000.0 / messages as f64
    });
    client.join().expect("the client")
}

fn watch(poll: &impl AsFd, stream: &TcpStream, index: usize) {
    epoll::add(poll, stream, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)
        .expect("a watch");
}

fn each_ready(poll: &impl AsFd, stop: &AtomicBool, mut serve: impl FnMut(usize)) {
    let mut events = Vec::with_capacity(256);
    let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    while !stop.load(Ordering::Relaxed) {
        events.clear();
        let _ = epoll::wait(poll, rustix::buffer::spare_capacity(&mut events), Some(&timeout));
        events.iter().for_each(|event| serve(event.data.u64() as usize));
    }
}

/// The ids of this process's threads.
fn threads() -> Vec<u32> {
    let tasks = fs::read_dir("/proc/self/task").expect("proc").flatten();
    tasks.filter_map(|task| task.file_name().to_str()?.parse::<u32>().ok()).collect()
}

/// The first thread with this name that was not there `before`: a shard's executor has a helper thread of
/// the same name, which comes later.
fn new_thread(before: &[u32], name: &str) -> u32 {
    let started = Instant::now();
    loop {
        let named = |id: &u32| {
            fs::read_to_string(format!("/proc/self/task/{id}/comm")).is_ok_and(|comm| comm.trim() == name)
        };
        if let Some(id) = threads().into_iter().filter(|id| !before.contains(id) && named(id)).min() {
            return id;
        }
        assert!(started.elapsed() < Duration::from_secs(5), "no thread {name}");
    }
}

/// Nanoseconds that a thread has run (/proc/PID/task/TID/schedstat).
fn cpu_ns(thread: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).expect("schedstat");
    stat.split_whitespace().next().and_then(|ns| ns.parse().ok()).expect("a number")
}

fn pin(thread: u32, nth: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cores()[nth % cores().len()]);
    let thread = rustix::process::Pid::from_raw(thread as i32);
    // Where pinning is not allowed the figure is rougher, not wrong.
    let _ = rustix::thread::sched_setaffinity(thread, &set);
}
