//! A test engine around a small protocol.

use ringmain::core::engine::{Effect, Engine, Send, ShardIndex, Slot, TurnBudget};
use ringmain::core::metrics::{Metric, Values};
use ringmain_proto::time::Now;

use super::outbox::Outbox;

/// What a protocol may touch besides itself.
#[derive(Debug)]
pub struct Desk<M, A> {
    pub outbox: Outbox,
    pub answers: Vec<A>,
    /// Batches that wait, by shard.
    pub mesh: Vec<(ShardIndex, std::collections::VecDeque<M>)>,
    pub targets: Vec<ShardIndex>,
    pub values: Values,
    pub connections: usize,
}

impl<M, A> Desk<M, A> {
    /// Queues a batch for another shard.
    pub fn post(&mut self, to: ShardIndex, batch: M) {
        match self.mesh.iter_mut().find(|(shard, _)| *shard == to) {
            Some((_, queue)) => queue.push_back(batch),
            None => self.mesh.push((to, [batch].into())),
        }
        if !self.targets.contains(&to) {
            self.targets.push(to);
        }
    }
}

/// A protocol: what to do with what arrives. Everything has a default but the input.
pub trait Protocol: 'static {
    type Mesh: core::marker::Send + 'static;
    type Control: core::marker::Send + 'static;
    type Answer: core::marker::Send + 'static;

    fn accept(&mut self, _desk: &mut Desk<Self::Mesh, Self::Answer>, _slot: Slot, _listener: u16, _now: Now) {
    }
    fn input(&mut self, desk: &mut Desk<Self::Mesh, Self::Answer>, slot: Slot, chunk: &mut [u8], now: Now);
    fn input_ended(&mut self, desk: &mut Desk<Self::Mesh, Self::Answer>, slot: Slot, _now: Now) {
        desk.outbox.finish(slot);
    }
    fn broken(&mut self, desk: &mut Desk<Self::Mesh, Self::Answer>, slot: Slot, _errno: i32, _now: Now) {
        desk.outbox.abort(slot);
    }
    fn released(&mut self, _desk: &mut Desk<Self::Mesh, Self::Answer>, _slot: Slot) {}
    fn inbox(
        &mut self,
        _desk: &mut Desk<Self::Mesh, Self::Answer>,
        _from: ShardIndex,
        _batch: Self::Mesh,
        _now: Now,
    ) {
    }
    fn control(&mut self, _desk: &mut Desk<Self::Mesh, Self::Answer>, _command: Self::Control, _now: Now) {}
    fn tick(&mut self, _desk: &mut Desk<Self::Mesh, Self::Answer>, _now: Now) {}
    fn next_deadline_ms(&self) -> Option<u64> {
        None
    }
}

/// The engine of a protocol.
#[derive(Debug)]
pub struct TestEngine<P: Protocol> {
    pub protocol: P,
    pub desk: Desk<P::Mesh, P::Answer>,
}

impl<P: Protocol> TestEngine<P> {
    pub fn new(protocol: P) -> Self {
        let desk = Desk {
            outbox: Outbox::default(),
            answers: Vec::new(),
            mesh: Vec::new(),
            targets: Vec::new(),
            values: Values::default(),
            connections: 0,
        };
        Self { protocol, desk }
    }
}

impl<P: Protocol> Engine for TestEngine<P> {
    type Mesh = P::Mesh;
    type Control = P::Control;
    type Answer = P::Answer;

    fn accept(&mut self, slot: Slot, listener: u16, now: Now) {
        self.desk.connections += 1;
        self.desk.outbox.open(slot);
        self.protocol.accept(&mut self.desk, slot, listener, now);
    }
    fn input(&mut self, slot: Slot, chunk: &mut [u8], now: Now) {
        assert!(self.desk.outbox.is_open(slot) && !chunk.is_empty());
        self.protocol.input(&mut self.desk, slot, chunk, now);
    }
    fn input_ended(&mut self, slot: Slot, now: Now) {
        assert!(self.desk.outbox.is_open(slot));
        self.protocol.input_ended(&mut self.desk, slot, now);
    }
    fn broken(&mut self, slot: Slot, errno: i32, now: Now) {
        assert!(self.desk.outbox.is_open(slot) && errno > 0);
        self.protocol.broken(&mut self.desk, slot, errno, now);
    }
    fn released(&mut self, slot: Slot) {
        self.desk.connections -= 1;
        self.desk.outbox.released(slot);
        self.protocol.released(&mut self.desk, slot);
    }
    fn inbox(&mut self, from: ShardIndex, batch: Self::Mesh, now: Now) {
        self.protocol.inbox(&mut self.desk, from, batch, now);
    }
    fn control(&mut self, command: Self::Control, now: Now) {
        self.protocol.control(&mut self.desk, command, now);
    }
    fn tick(&mut self, now: Now) {
        self.protocol.tick(&mut self.desk, now);
    }
    fn next_deadline_ms(&self) -> Option<u64> {
        self.protocol.next_deadline_ms()
    }
    fn prepare(&mut self, _now: Now, budget: TurnBudget) -> bool {
        self.desk.outbox.prepare(budget)
    }
    fn sends(&self) -> &[Send] {
        self.desk.outbox.sends()
    }
    fn bytes(&self, send: &Send) -> &[u8] {
        self.desk.outbox.bytes(send)
    }
    fn short(&mut self, slot: Slot, accepted: u32, _now: Now) {
        self.desk.outbox.short(slot, accepted);
    }
    fn settle(&mut self, _now: Now) {
        self.desk.outbox.settle();
    }
    fn writable(&mut self, slot: Slot, _now: Now) {
        self.desk.outbox.writable(slot);
    }
    fn mesh_targets(&self) -> &[ShardIndex] {
        &self.desk.targets
    }
    fn take_mesh(&mut self, to: ShardIndex, _now: Now) -> Option<Self::Mesh> {
        let queue = &mut self.desk.mesh.iter_mut().find(|(shard, _)| *shard == to)?.1;
        let batch = queue.pop_front();
        if queue.is_empty() {
            self.desk.targets.retain(|&shard| shard != to);
        }
        batch
    }
    fn take_effects(&mut self, into: &mut Vec<Effect>) {
        into.append(&mut self.desk.outbox.effects);
    }
    fn take_answers(&mut self, into: &mut Vec<Self::Answer>) {
        into.append(&mut self.desk.answers);
    }
    fn metrics(&mut self) -> &mut Values {
        self.desk.values.set(Metric::Connections, self.desk.connections as u64);
        &mut self.desk.values
    }
    fn connections(&self) -> usize {
        self.desk.connections
    }
}

/// Commands that every simple protocol below understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Close all connections in the orderly way.
    FinishAll,
    /// Close all connections at once.
    AbortAll,
    /// Stop accepting.
    StopAccepting,
    /// Answer with [`Told::Connections`].
    Count,
    /// Block the shard's thread until the other end of this is dropped.
    Panic,
}

/// What those protocols answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// Connections held.
    Connections(usize),
    /// A socket failed with this errno.
    Broken(i32),
    /// A connection was accepted from the listener with this index.
    Accepted(u16),
    /// A slot was released.
    Released(Slot),
}

/// Sends back what it gets.
#[derive(Debug, Default)]
pub struct Echo {
    pub open: std::collections::BTreeSet<Slot>,
    /// Tell of accepts, failures and releases.
    pub tells: bool,
    /// Say this at once to everybody, and close.
    pub farewell: Option<Vec<u8>>,
}

impl Protocol for Echo {
    type Mesh = ();
    type Control = Order;
    type Answer = Told;

    fn accept(&mut self, desk: &mut Desk<(), Told>, slot: Slot, listener: u16, _now: Now) {
        assert!(self.open.insert(slot));
        if self.tells {
            desk.answers.push(Told::Accepted(listener));
        }
        if let Some(farewell) = &self.farewell {
            desk.outbox.push(slot, farewell);
            desk.outbox.finish(slot);
        }
    }
    fn input(&mut self, desk: &mut Desk<(), Told>, slot: Slot, chunk: &mut [u8], _now: Now) {
        desk.outbox.push(slot, chunk);
    }
    fn broken(&mut self, desk: &mut Desk<(), Told>, slot: Slot, errno: i32, _now: Now) {
        if self.tells {
            desk.answers.push(Told::Broken(errno));
        }
        desk.outbox.abort(slot);
    }
    fn released(&mut self, desk: &mut Desk<(), Told>, slot: Slot) {
        assert!(self.open.remove(&slot));
        if self.tells {
            desk.answers.push(Told::Released(slot));
        }
    }
    fn control(&mut self, desk: &mut Desk<(), Told>, command: Order, _now: Now) {
        match command {
            Order::FinishAll => self.open.iter().for_each(|&slot| desk.outbox.finish(slot)),
            Order::AbortAll => self.open.iter().for_each(|&slot| desk.outbox.abort(slot)),
            Order::StopAccepting => desk.outbox.effects.push(Effect::StopAccepting),
            Order::Count => desk.answers.push(Told::Connections(self.open.len())),
            Order::Panic => panic!("asked to"),
        }
    }
}
