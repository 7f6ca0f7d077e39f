//! A simulated broker with any number of ports, on virtual time, with faults.
//!
//! Owns: a second real implementation of [`Bus`](crate::Bus): one whose positions are sparse, whose answers
//! are late, which vanishes, forgets and goes back. Must not know: clocks, randomness; a seed and `now` are
//! arguments, and the same seed and calls give the same run.
//!
//! [`SimBroker`] is the server and the network, each [`SimPort`] a node's client of it. Drive them with one
//! loop: poll the ports and [`SimBroker::step`] at the least of their deadlines.
//!
//! Invariants: one order per channel, whatever the latencies; an epoch is never used again; what a port
//! knows, it has from a message.

mod port;
mod store;
mod wire;

use std::sync::{Arc, Mutex};

use crate::backend::Target;
use crate::nonce::Nonces;
use port::lock;
pub use port::{MESSAGES_PER_POLL_MAX, RECONNECT_MS, RESEND_MS, SimPort};
use store::{Store, StoreLimits};
use wire::{Link, PushBody, Reply, ReplyBody, Request};

/// What a simulated broker is made with.
#[derive(Clone, Copy, Debug)]
pub struct SimOptions {
    /// Seed of epochs, offsets and latencies.
    pub seed: u64,
    /// Least and most time of one way across, in milliseconds; drawn for each message.
    pub latency_ms: (u64, u64),
    /// Offsets grow by 1 to this.
    pub offset_step_max: u64,
    /// Commands of one port without an answer; above it they are refused as overloaded.
    pub commands_max: usize,
    /// Messages on the way to a port that does not take them; above it the broker cuts its connection.
    pub pushes_max: usize,
    /// Largest record of one publication, in bytes.
    pub record_bytes_max: usize,
    /// Publication ids remembered for each channel.
    pub ids_max: usize,
    /// How long they are remembered, in milliseconds.
    pub ids_window_ms: u64,
    /// Ports try a publish again under its id before they answer that it is unknown.
    pub retries: bool,
}

impl SimOptions {
    /// Latencies of 1 to 20 ms, offsets in steps of 1 to 3, 256 commands, 1,024 messages, records of 64 KiB,
    /// 1,024 ids for a minute, retries.
    pub const fn new(seed: u64) -> SimOptions {
        SimOptions {
            seed,
            latency_ms: (1, 20),
            offset_step_max: 3,
            commands_max: 256,
            pushes_max: 1024,
            record_bytes_max: 64 << 10,
            ids_max: 1024,
            ids_window_ms: 60_000,
            retries: true,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// Takes connections and messages, does nothing with them.
    Paused,
    Down,
}

/// The broker, and the network around it.
#[derive(Debug)]
pub struct SimBroker {
    store: Store,
    replica: Option<Store>,
    links: Vec<Arc<Mutex<Link>>>,
    state: State,
    pushes_max: usize,
}

impl SimBroker {
    /// A broker and its ports.
    pub fn new(options: &SimOptions, ports: usize) -> (SimBroker, Vec<SimPort>) {
        let mut seeds = Nonces::new(options.seed);
        let limits = StoreLimits {
            offset_step_max: options.offset_step_max,
            ids_max: options.ids_max,
            ids_window_ms: options.ids_window_ms,
        };
        let store = Store::new(seeds.draw(), limits);
        let link = |_| Arc::new(Mutex::new(Link::new(seeds.draw(), options.latency_ms)));
        let links: Vec<_> = (0..ports).map(link).collect();
        let ports = links.iter().map(|link| SimPort::new(link.clone(), *options)).collect();
        let pushes_max = options.pushes_max;
        (SimBroker { store, replica: None, links, state: State::Running, pushes_max }, ports)
    }

    /// When the broker has something to do, in `mono_ms`.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.state != State::Running {
            return None;
        }
        self.links.iter().filter_map(|link| lock(link).requests.next_ms()).min()
    }

    /// Does what has reached the broker by now, in the order of its reaching it.
    pub fn step(&mut self, now_ms: u64) {
        while let Some(at_ms) = self.next_deadline().filter(|at_ms| *at_ms <= now_ms) {
            let first = self.links.iter().position(|link| lock(link).requests.next_ms() == Some(at_ms));
            let Some(link) = first.map(|index| self.links[index].clone()) else { return };
            let taken = lock(&link).requests.take_due(at_ms);
            if let Some((connection, request)) = taken {
                self.execute(at_ms, &link, connection, request);
            }
        }
        for link in &self.links {
            let mut link = lock(link);
            if link.pushes.len() > self.pushes_max {
                link.cut(now_ms);
            }
        }
    }

    fn execute(&mut self, now_ms: u64, link: &Mutex<Link>, connection: u64, request: Request) {
        let is_current = {
            let link = lock(link);
            link.connected && link.connection == connection
        };
        if let Request::Publish { target, .. } | Request::Read { target, .. } | Request::Clear { target, .. } =
            &request
            && self.links.iter().any(|link| lock(link).subscriptions.contains_key(&target.name))
        {
            self.store.hold(now_ms, &target.name);
        }
        let (call, body) = match request {
            Request::Publish { call, target, id, record } => {
                let Target { name, options } = target;
                let (accepted, message) = self.store.publish(now_ms, &name, &options, &id, &record);
                for link in self.links.iter().filter(|_| message.is_some()) {
                    let mut link = lock(link);
                    if let (Some(message), true) = (&message, link.subscriptions.contains_key(&name)) {
                        link.push(now_ms, PushBody::Message { name: name.clone(), message: message.clone() });
                    }
                }
                (call, ReplyBody::Published(accepted))
            }
            // What a dead connection asked beside publishing concerns nobody.
            _ if !is_current => return,
            Request::Subscribe { name, nonce } => {
                self.store.hold(now_ms, &name);
                let mut link = lock(link);
                link.subscriptions.insert(name.clone(), nonce);
                return link.push(now_ms, PushBody::Subscribed { nonce });
            }
            Request::Unsubscribe { name } => {
                self.store.hold(now_ms, &name);
                lock(link).subscriptions.remove(&name);
                return;
            }
            Request::Canary => {
                // Should this be the last sign of a listener, the position's time counts from here.
                for name in lock(link).subscriptions.keys() {
                    self.store.hold(now_ms, name);
                }
                let generation = self.store.generation();
                return lock(link).push(now_ms, PushBody::Canary { generation });
            }
            Request::Read { call, target, query } => {
                (call, ReplyBody::Read(self.store.read(now_ms, &target.name, &target.options, &query)))
            }
            Request::Clear { call, target } => {
                (call, ReplyBody::Cleared(self.store.clear(now_ms, &target.name, &target.options)))
            }
        };
        lock(link).reply(now_ms, connection, Reply { call, body });
    }

    /// The broker dies. Its data is on disk.
    pub fn kill(&mut self, now_ms: u64) {
        self.state = State::Down;
        for link in &self.links {
            let mut link = lock(link);
            link.reachable = false;
            link.cut(now_ms);
        }
    }

    /// The broker starts again, or goes on after a pause with what has waited in its sockets.
    pub fn start(&mut self) {
        self.state = State::Running;
        for link in &self.links {
            lock(link).reachable = true;
        }
    }

    /// The broker stops answering, and says nothing.
    pub fn pause(&mut self) {
        self.state = State::Paused;
    }

    /// All data is gone; connections stay.
    pub fn wipe(&mut self) {
        self.store.wipe();
    }

    /// A replica has everything up to here, and nothing of what comes.
    pub fn take_replica(&mut self) {
        self.replica = Some(self.store.clone());
    }

    /// The master is lost, and the replica of [`SimBroker::take_replica`] takes its place, if there is one.
    pub fn fail_over(&mut self, now_ms: u64) {
        self.kill(now_ms);
        if let Some(replica) = self.replica.take() {
            self.store.roll_back_to(&replica);
        }
        self.start();
    }

    /// One port's connection is cut.
    pub fn cut(&mut self, now_ms: u64, port: usize) {
        lock(&self.links[port]).cut(now_ms);
    }

    /// One port is cut off until [`SimBroker::rejoin`].
    pub fn isolate(&mut self, now_ms: u64, port: usize) {
        let mut link = lock(&self.links[port]);
        link.reachable = false;
        link.cut(now_ms);
    }

    /// One port can connect again, if the broker is not down.
    pub fn rejoin(&mut self, port: usize) {
        lock(&self.links[port]).reachable = self.state != State::Down;
    }

    /// The next `count` answers to a port's commands get lost.
    pub fn lose_answers(&mut self, port: usize, count: u32) {
        lock(&self.links[port]).lose_replies += count;
    }

    /// The next `count` publications on their way to a port get lost.
    pub fn lose_arrivals(&mut self, port: usize, count: u32) {
        lock(&self.links[port]).lose_pushes += count;
    }
}
