//! Nodes on a real broker as a cluster of the contract suite: each node is a thread with the node's own hub and
//! the backend under test, as in the server; the suite drives its port.
#![allow(dead_code, reason = "each backend's tests use their part of it")]

pub(crate) mod process;
pub(crate) mod proxy;

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proxy::Proxies;
use ringmain_bus::Bus;
use ringmain_bus::backend::{BackendEnds, HubEnds, Reply, ends};
use ringmain_bus::hub::{self, Hub, HubOptions};
use ringmain_bus::link::{self, End, LinkOptions, Port, link};
use ringmain_bus::suite::{Cluster, Faults, Late};
use ringmain_proto::time::Now;
use tokio::sync::Notify;

/// What makes one node's backend, on that node's thread.
pub(crate) type Start = Box<dyn FnOnce(BackendEnds) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// A real broker, and what can be done to it.
pub(crate) trait Broker {
    /// A backend for a node whose connections go through `proxies` ([`Proxies::through`]).
    fn backend(&self, node: usize, proxies: &Arc<Proxies>) -> Start;

    /// The processes die; their data survives.
    fn kill(&mut self) {
        panic!("no `kill` here")
    }

    /// SIGSTOP.
    fn pause(&mut self) {
        panic!("no `pause` here")
    }

    /// After [`Broker::kill`] or [`Broker::pause`].
    fn restore(&mut self) {
        panic!("no `restore` here")
    }

    /// All data goes.
    fn wipe(&mut self) {
        panic!("no `wipe` here")
    }

    /// From now on replicas get nothing.
    fn stop_replication(&mut self) {
        panic!("no `stop_replication` here")
    }

    /// A replica takes the master's place.
    fn fail_over(&mut self) {
        panic!("no `fail_over` here")
    }

    /// See [`Faults::restart_is_a_new_life`].
    fn restart_is_a_new_life(&self) -> bool {
        false
    }

    /// How long its slowest failover takes, with room for a busy machine, in milliseconds.
    fn patience_ms(&self) -> u64 {
        60_000
    }
}

/// Rings the suite when a port has something.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Bell {
    fn ring(&self) {
        *self.rung.lock().unwrap() = true;
        self.bell.notify_one();
    }

    fn wait(&self, timeout: Duration) {
        let rung = self.rung.lock().unwrap();
        let (mut rung, _) = self.bell.wait_timeout_while(rung, timeout, |rung| !*rung).unwrap();
        *rung = false;
    }
}

/// What gets lost between backend and hub.
#[derive(Default)]
struct Losses {
    answers: AtomicU32,
    arrivals: AtomicU32,
}

impl Losses {
    fn takes(count: &AtomicU32) -> bool {
        count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1)).is_ok()
    }

    /// What the hub gets of a reply.
    fn pass(&self, reply: Reply) -> Option<Reply> {
        match reply {
            Reply::Published { .. } | Reply::Read { .. } | Reply::Cleared { .. }
                if Self::takes(&self.answers) =>
            {
                None
            }
            Reply::Message { name, message } if !message.record.is_empty() && Self::takes(&self.arrivals) => {
                // No broker drops one push of a living connection unseen: a client library that does says so.
                message.epoch.is_none().then_some(Reply::Doubt { name })
            }
            reply => Some(reply),
        }
    }
}

/// One node.
struct Node {
    port: Port,
    proxies: Arc<Proxies>,
    losses: Arc<Losses>,
    stop: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

/// How late the machine runs things: a thread that asks to be woken every [`STEP`].
struct Lateness {
    late_us: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

const STEP: Duration = Duration::from_millis(5);

/// An answer passes several threads and processes, each of which may wait for a core as long as this one did.
const HOPS: u64 = 4;

impl Lateness {
    fn watch() -> Self {
        let (late_us, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (late, stopped) = (late_us.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                let asked = Instant::now();
                std::thread::sleep(STEP);
                let over = asked.elapsed().saturating_sub(STEP).as_micros() as u64;
                late.fetch_add(over, Ordering::AcqRel);
            }
        });
        Self { late_us, stop }
    }

    fn ms(&self) -> u64 {
        HOPS * self.late_us.load(Ordering::Acquire) / 1_000
    }
}

impl Drop for Lateness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// See the module's doc.
pub(crate) struct Live<B: Broker> {
    nodes: Vec<Node>,
    bell: Arc<Bell>,
    begun: Instant,
    run_id: u64,
    options: LinkOptions,
    lateness: Lateness,
    /// Dropped last: nodes end before their broker.
    broker: B,
}

/// Room for a port that does not poll; the suite overruns it.
const ARRIVALS_MAX: usize = 512;
const COMMANDS_MAX: usize = 256;
const RECORD_BYTES_MAX: usize = 64 << 10;

impl<B: Broker> Live<B> {
    /// So many nodes on a running broker.
    pub(crate) fn new(broker: B, nodes: usize) -> Self {
        let options = LinkOptions {
            commands_max: COMMANDS_MAX,
            arrivals_max: ARRIVALS_MAX,
            record_bytes_max: RECORD_BYTES_MAX,
            ..LinkOptions::default()
        };
        let (bell, begun) = (Arc::new(Bell::default()), Instant::now());
        let node = |node| {
            let proxies = Arc::new(Proxies::default());
            let start = broker.backend(node, &proxies);
            Node::start(start, proxies, &bell, begun, options)
        };
        let nodes = (0..nodes).map(node).collect();
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let run_id = (unix.as_nanos() as u64) ^ (u64::from(std::process::id()) << 40);
        Self { nodes, bell, begun, run_id, options, lateness: Lateness::watch(), broker }
    }

    /// The broker, for faults of its own kind.
    pub(crate) fn broker(&mut self) -> &mut B {
        &mut self.broker
    }
}

fn now(begun: Instant) -> Now {
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64;
    Now { mono_ms: begun.elapsed().as_millis() as u64 + 1_000_000, unix_ms }
}

/// Runs a future as the control thread does, where tasks need not be `Send`.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build_local(Default::default());
    runtime.unwrap().block_on(future)
}

impl Node {
    fn start(
        start: Start,
        proxies: Arc<Proxies>,
        bell: &Arc<Bell>,
        begun: Instant,
        options: LinkOptions,
    ) -> Self {
        let (commands, stop) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (wake_hub, wake_suite) = (commands.clone(), bell.clone());
        let bell = link::Bell::new(Arc::new(move || wake_hub.notify_one()));
        let (port, end) = link(options, bell.clone(), Arc::new(move || wake_suite.ring()));
        let losses = Arc::new(Losses::default());
        let (losing, stopped) = (losses.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            block_on(async move {
                let (hub_ends, backend_ends) = ends(bell);
                tokio::task::spawn_local(start(backend_ends));
                tokio::select! {
                    () = run(hub_ends, end, losing, commands, begun) => panic!("the backend ended"),
                    () = stopped.notified() => (),
                }
            });
        });
        Self { port, proxies, losses, stop, thread: Some(thread) }
    }
}

/// The hub behind a seam at which replies get lost.
async fn run(backend: HubEnds, end: End, losses: Arc<Losses>, commands: Arc<Notify>, begun: Instant) {
    let HubEnds { requests, mut replies } = backend;
    let (passed, rest) = tokio::sync::mpsc::channel(64);
    let pass = async move {
        while let Some(reply) = replies.recv().await {
            if let Some(reply) = losses.pass(reply)
                && passed.send(reply).await.is_err()
            {
                return;
            }
        }
    };
    let hub = Hub::new(HubOptions { linger_ms: 50, ..HubOptions::default() });
    let hub_ends = HubEnds { requests, replies: rest };
    tokio::join!(pass, hub::run(hub, vec![end], hub_ends, commands, || now(begun), |_| ()));
}

impl<B: Broker> Drop for Live<B> {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.stop.notify_one();
            node.proxies.rejoin();
            let ended = node.thread.take().map(JoinHandle::join);
            if !std::thread::panicking() {
                assert!(matches!(ended, Some(Ok(()))), "a node's thread failed");
            }
        }
    }
}

impl<B: Broker> Cluster for Live<B> {
    fn nodes(&self) -> usize {
        self.nodes.len()
    }

    fn node(&mut self, node: usize) -> &mut dyn Bus {
        &mut self.nodes[node].port
    }

    fn now(&self) -> Now {
        now(self.begun)
    }

    fn pass(&mut self, ms_max: u64) {
        self.bell.wait(Duration::from_millis(ms_max));
    }

    fn run_id(&self) -> u64 {
        self.run_id
    }

    fn patience_ms(&self) -> u64 {
        self.broker.patience_ms()
    }

    fn record_bytes_max(&self) -> usize {
        self.options.record_bytes_max
    }

    fn late_ms(&self) -> u64 {
        self.lateness.ms()
    }
}

impl<B: Broker> Late for Live<B> {
    fn commands_max(&self) -> usize {
        self.options.commands_max
    }

    fn overrun_publications(&self) -> usize {
        self.options.arrivals_max
    }
}

impl<B: Broker> Faults for Live<B> {
    fn kill_broker(&mut self) {
        self.broker.kill();
    }

    fn pause_broker(&mut self) {
        self.broker.pause();
    }

    fn restore_broker(&mut self) {
        self.broker.restore();
    }

    fn restart_is_a_new_life(&self) -> bool {
        self.broker.restart_is_a_new_life()
    }

    fn wipe(&mut self) {
        self.broker.wipe();
    }

    fn stop_replication(&mut self) {
        self.broker.stop_replication();
    }

    fn fail_over(&mut self) {
        self.broker.fail_over();
    }

    fn cut(&mut self, node: usize) {
        self.nodes[node].proxies.cut();
    }

    fn isolate(&mut self, node: usize) {
        self.nodes[node].proxies.isolate();
    }

    fn rejoin(&mut self, node: usize) {
        self.nodes[node].proxies.rejoin();
    }

    fn lose_answers(&mut self, node: usize, count: u32) {
        self.nodes[node].losses.answers.store(count, Ordering::Release);
    }

    fn lose_arrivals(&mut self, node: usize, count: u32) {
        self.nodes[node].losses.arrivals.store(count, Ordering::Release);
    }
}
