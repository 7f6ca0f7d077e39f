//! A state's fingerprint: equal for states that differ only in the names of epochs and lives.
//!
//! Owns: what counts as the same state. Must not know: the steps.
//! Invariant: everything that a later step or check reads is in it.

use std::hash::{DefaultHasher, Hasher};

use super::Bounds;
use super::state::*;
use crate::epoch::Epoch;
use crate::lineage::{KeyState, Lineage, ReplicationId};

#[derive(Default)]
struct Encoder {
    bytes: Vec<u8>,
    epochs: Vec<Epoch>,
    lives: Vec<ReplicationId>,
}

impl State {
    /// 128 bits of the canonical form: two states of 10^9 share one with a chance below 10^-20.
    pub(super) fn fingerprint(&self) -> u128 {
        let mut encoder = Encoder { bytes: Vec::with_capacity(512), ..Encoder::default() };
        encoder.state(self);
        let half = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u8(salt);
            hasher.write(&encoder.bytes);
            u128::from(hasher.finish())
        };
        half(0) << 64 | half(1)
    }
}

impl Encoder {
    fn number(&mut self, number: impl Into<u64>) {
        self.bytes.push(u8::try_from(number.into()).unwrap_or(u8::MAX));
    }

    fn epoch(&mut self, epoch: Epoch) {
        let index = self.epochs.iter().position(|known| *known == epoch).unwrap_or_else(|| {
            self.epochs.push(epoch);
            self.epochs.len() - 1
        });
        self.number(index as u64);
    }

    fn life(&mut self, life: ReplicationId) {
        let index = self.lives.iter().position(|known| *known == life).unwrap_or_else(|| {
            self.lives.push(life);
            self.lives.len() - 1
        });
        self.number(index as u64);
    }

    fn lineage(&mut self, lineage: &Lineage) {
        self.number(lineage.branches().len() as u64);
        for branch in lineage.branches() {
            self.epoch(branch.epoch);
            self.number(branch.top);
        }
    }

    fn key(&mut self, key: &Key) {
        let KeyState { epoch, replid, top: _, lineage } = &key.state;
        self.epoch(*epoch);
        self.life(*replid);
        self.lineage(lineage);
        self.set(&key.log);
    }

    fn set(&mut self, list: &[u8]) {
        self.number(list.len() as u64);
        self.bytes.extend_from_slice(list);
    }

    fn optional(&mut self, key: Option<&Snapshot>) {
        self.number(key.is_some());
        if let Some(key) = key {
            self.key(key);
        }
    }

    fn message(&mut self, message: &Message) {
        self.number(message.has_publication);
        self.key(&message.key);
    }

    fn state(&mut self, state: &State) {
        let Bounds { promotions, cuts, strays, flushes, restarts, old_disks, crashes, .. } = state.left;
        self.bytes.extend([promotions, cuts, strays, flushes, restarts, old_disks, crashes, state.owner()]);
        self.bytes.extend([state.sent, state.executed, state.acked, state.excused]);
        for server in &state.servers {
            self.server(server);
        }
        for node in &state.nodes {
            self.number(node.owner + 1 == state.owners.len());
            self.node(state, node);
        }
        let mut orphans = state.orphans.clone();
        orphans.sort_unstable();
        self.number(orphans.len() as u64);
        orphans.iter().for_each(|(server, publication)| self.bytes.extend([*server, *publication]));
        self.names(&state.names);
    }

    /// A name whose epoch nothing else holds can never be said again.
    fn names(&mut self, names: &[Name]) {
        let known = |name: &Name| self.epochs.iter().position(|epoch| *epoch == name.position.epoch);
        let mut named: Vec<_> = names
            .iter()
            .filter_map(|name| Some((known(name)? as u8, name.position.offset as u8, name.publication)))
            .collect();
        named.sort_unstable();
        named
            .iter()
            .for_each(|(epoch, offset, publication)| self.bytes.extend([*epoch, *offset, *publication]));
    }

    fn server(&mut self, server: &Server) {
        self.optional(server.key.as_ref());
        self.life(server.replid);
        self.number(server.follows.map_or(0u64, |of| u64::from(of % 8) + 1));
        self.number(server.lag.len() as u64);
        server.lag.iter().for_each(|key| self.optional(key.as_ref()));
        self.number(server.strays.len() as u64);
        server.strays.iter().for_each(|message| self.message(message));
    }

    fn node(&mut self, state: &State, node: &Node) {
        self.bytes.extend([node.mode as u8, node.waiting, node.told, node.delivered]);
        self.number(node.seen_after);
        self.set(&node.seen);
        self.number(node.place.is_some());
        if let Some(place) = &node.place {
            self.epoch(place.position.epoch);
            self.number(place.position.offset);
            self.lineage(&place.lineage);
        }
        self.number(node.held.len() as u64);
        for held in &node.held {
            self.number(held.again);
            self.message(&held.message);
        }
        self.number(node.kept.len() as u64);
        for kept in &node.kept {
            self.number(kept.publication);
            self.epoch(kept.ack.position.epoch);
            self.number(kept.ack.position.offset);
            self.life(kept.ack.replid);
        }
        self.wire(state, &node.wire);
        self.number(node.old_wire.is_some());
        if let Some(wire) = &node.old_wire {
            self.wire(state, wire);
        }
    }

    fn wire(&mut self, state: &State, wire: &Wire) {
        self.number(wire.server);
        self.number(wire.settled.is_some());
        if let Some(life) = wire.settled {
            self.life(life);
        }
        self.number(wire.flushes == state.servers[usize::from(wire.server)].flushes);
        self.number(wire.subscribed);
        self.number(wire.requests.len() as u64);
        for request in &wire.requests {
            self.request(*request);
        }
        self.number(wire.replies.len() as u64);
        for reply in &wire.replies {
            self.reply(reply);
        }
        self.number(wire.pushes.len() as u64);
        wire.pushes.iter().for_each(|message| self.message(message));
    }

    fn request(&mut self, request: Request) {
        self.number(match request {
            Request::Read => 100,
            Request::Publish(publication) => publication,
        });
    }

    fn reply(&mut self, reply: &Reply) {
        match reply {
            Reply::Read { key, executed } => {
                self.bytes.extend([1, *executed]);
                self.key(key);
            }
            Reply::Ack { publication, offset, key } => {
                self.bytes.extend([2, *publication]);
                self.number(*offset);
                self.key(key);
            }
            Reply::Refused(request) => {
                self.bytes.push(3);
                self.request(*request);
            }
        }
    }
}
