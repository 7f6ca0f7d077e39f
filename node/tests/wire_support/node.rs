//! A node of test engines on a free port.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use ringmain::core::engine::Engine;
use ringmain::io::{
    BoundAddress, ListenSpec, Listeners, Mesh, ShardEvent, ShardHandle, ShardOptions, ShardParts,
    SocketOptions, WireMetric, spawn_shard,
};

/// How long anything here may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How a node is made.
pub struct Plan {
    pub shards: u16,
    pub credits: u16,
    pub slots_max: u32,
    pub listen: Vec<ListenSpec>,
    pub sockets: SocketOptions,
    /// Changes the options of every shard.
    pub tune: fn(&mut ShardOptions),
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            shards: 1,
            credits: 4,
            slots_max: 1_000,
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            sockets: SocketOptions::default(),
            tune: |_| {},
        }
    }
}

/// A running node.
pub struct Node<E: Engine> {
    pub mesh: Mesh<E::Mesh>,
    pub shards: Vec<ShardHandle<E::Control>>,
    pub answers: Receiver<E::Answer>,
    pub events: Receiver<ShardEvent>,
    pub addresses: Vec<BoundAddress>,
}

impl<E: Engine + 'static> Node<E> {
    /// Starts a node; `make` gives each shard its engine.
    pub fn start<F, G>(plan: &Plan, make: F) -> Self
    where
        F: Fn(u16) -> G,
        G: FnOnce() -> E + Send + 'static,
    {
        let mut listeners = Listeners::bind(&plan.listen, &plan.sockets, plan.shards).unwrap();
        let mesh = Mesh::new(plan.shards, plan.credits).unwrap();
        let (to_answers, answers) = channel();
        let (to_events, events) = channel();
        let shards = (0..plan.shards).map(|index| {
            let mut options = ShardOptions::new(index, plan.slots_max);
            (plan.tune)(&mut options);
            let (to_answers, to_events) = (to_answers.clone(), to_events.clone());
            let parts = ShardParts {
                listeners: listeners.take(index),
                mesh: mesh.clone(),
                answers: Box::new(move |answer| drop(to_answers.send(answer))),
                events: Box::new(move |event| to_events.send(event).unwrap_or_default()),
            };
            spawn_shard(options, parts, make(index)).unwrap()
        });
        let shards = shards.collect();
        Self { mesh, shards, answers, events, addresses: listeners.addresses().to_vec() }
    }

    /// The first TCP address.
    pub fn address(&self) -> SocketAddr {
        let tcp = |address: &BoundAddress| match address {
            BoundAddress::Tcp(address) => Some(*address),
            BoundAddress::Unix(_) => None,
        };
        self.addresses.iter().find_map(tcp).unwrap()
    }

    /// Sends a command to a shard.
    pub fn order(&self, shard: usize, command: E::Control)
    where
        E::Control: std::fmt::Debug,
    {
        self.shards[shard].control().try_send(command).unwrap();
    }

    /// The next answer.
    pub fn answer(&self) -> E::Answer {
        self.answers.recv_timeout(PATIENCE).expect("an answer in time")
    }

    /// Waits until an answer comes for which `wanted` holds.
    pub fn answer_where(&self, wanted: impl Fn(&E::Answer) -> bool) -> E::Answer {
        loop {
            let answer = self.answer();
            if wanted(&answer) {
                return answer;
            }
        }
    }

    /// Connections of all shards, those that are closing included.
    pub fn used(&self) -> u32 {
        (0..self.mesh.shards()).map(|shard| self.mesh.used(shard)).sum()
    }

    /// Waits until the shards together hold `count` connections.
    pub fn await_used(&self, count: u32) {
        await_that(|| self.used() == count, || format!("{} connections, not {count}", self.used()));
    }

    /// A counter of the wire, all shards together, once it is published.
    pub fn wire(&self, metric: WireMetric) -> u64 {
        self.shards.iter().map(|shard| shard.metrics.wire(metric)).sum()
    }

    /// Stops all shards and waits for them.
    pub fn stop(self) {
        for shard in &self.shards {
            shard.stop();
        }
        for shard in self.shards {
            shard.join().expect("a shard panicked");
        }
    }
}

/// Waits until `done`, or fails with `state`. For what no event tells: it looks every millisecond.
pub fn await_that(done: impl Fn() -> bool, state: impl Fn() -> String) {
    let (_sender, never) = channel::<()>();
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "{}", state());
        assert_eq!(never.recv_timeout(Duration::from_millis(1)), Err(RecvTimeoutError::Timeout));
    }
}
