//! The servers' steps: the script, replication, promotion.
//!
//! Owns: what a server does. Must not know: nodes, beyond their wires.
//! Invariant: a key changes only on a master, by the script or a flush, and then on its replicas in order.

use std::rc::Rc;

use super::Clause;
use super::state::{Key, Message, Reply, Request, Server, Snapshot, State, bit};
use crate::epoch::{Epoch, Position};
use crate::lineage::{KeyState, Lineage, Touched};
use crate::types::Accepted;

/// Above all nonces that are drawn.
const NONCES_SHARED: u64 = 1 << 32;

impl State {
    /// The script. The reply is for whoever still listens.
    pub(super) fn execute(&mut self, server: u8, node: u8, request: Request) -> Reply {
        let index = usize::from(server);
        if self.servers[index].follows.is_some() {
            return Reply::Refused(request);
        }
        let (mut key, touched) = self.touch(index, node, request);
        let Request::Publish(publication) = request else {
            let key = Rc::new(key);
            if touched != Touched::Kept {
                self.store(index, &key);
                self.push(index, &Message { key: key.clone(), has_publication: false });
            }
            return Reply::Read { key, executed: self.executed };
        };
        let first = key.log.iter().position(|seen| *seen == publication && !self.rule.lacks(Clause::Ids));
        let first = first
            .map(|at| Accepted { position: Position::new(key.state.epoch, at as u64 + 1), repeated: false });
        let accepted = key.state.publish(first, 1);
        if !accepted.repeated {
            key.log.push(publication);
        }
        self.executed |= bit(publication);
        let key = Rc::new(key);
        if touched != Touched::Kept || !accepted.repeated {
            self.store(index, &key);
            self.push(index, &Message { key: key.clone(), has_publication: !accepted.repeated });
        }
        let offset = accepted.position.offset;
        let key = if self.rule.lacks(Clause::CurrentState) { of_then(&key, offset) } else { key };
        Reply::Ack { publication, offset, key }
    }

    fn touch(&mut self, server: usize, node: u8, request: Request) -> (Key, Touched) {
        let replid = self.servers[server].replid;
        let stored = self.servers[server].key.clone();
        let log = stored.as_ref().map_or_else(Vec::new, |key| key.log.clone());
        let mut stored = stored.map(|key| key.state);
        let by_read = request == Request::Read && self.rule.lacks(Clause::RenewalByReads);
        if let Some(stored) = &mut stored
            && (by_read || self.rule.lacks(Clause::Renewal))
        {
            stored.replid = replid;
        }
        self.epochs += 1;
        let nonce = match () {
            () if self.rule.lacks(Clause::FreshNonces) => Epoch::new(NONCES_SHARED + u64::from(node)),
            () if by_read => Epoch::NONE,
            () => Epoch::new(self.epochs),
        };
        let (state, touched) = KeyState::touch(stored.as_ref(), replid, nonce);
        (Key { state, log }, if by_read { Touched::Kept } else { touched })
    }

    /// Writes the key and hands it to the replicas.
    fn store(&mut self, server: usize, key: &Snapshot) {
        self.servers[server].key = Some(key.clone());
        let is_read = self.left.promotions > 0;
        for follower in self.servers.iter_mut().filter(|other| is_read && other.follows == Some(server as u8))
        {
            follower.lag.push_back(Some(key.clone()));
        }
    }

    fn push(&mut self, server: usize, message: &Message) {
        for node in &mut self.nodes {
            for wire in std::iter::once(&mut node.wire).chain(node.old_wire.as_mut()) {
                if usize::from(wire.server) == server && wire.subscribed {
                    wire.pushes.push_back(message.clone());
                }
            }
        }
        if self.left.strays > 0 && message.has_publication {
            self.servers[server].strays.push(message.clone());
        }
    }

    /// A server becomes a replica of the owner: a full synchronisation.
    pub(super) fn follow(&mut self, server: u8) {
        let owner = self.owner();
        let (key, replid) = {
            let owner = &self.servers[usize::from(owner)];
            (owner.key.clone(), owner.replid)
        };
        let index = usize::from(server);
        let server = &mut self.servers[index];
        (server.key, server.replid, server.follows) = (key, replid, Some(owner));
        server.lag.clear();
        if self.left.promotions == 0 {
            self.servers[index].forget_if_replica();
        }
    }

    /// A server becomes the owner, with the first `applied` of the writes that were on their way to it. One
    /// that never ceased to be a master does not notice.
    pub(super) fn promote(&mut self, server: u8, applied: u8) {
        self.left.promotions -= 1;
        let newest = self.servers[usize::from(server)].lag.drain(..usize::from(applied)).next_back();
        if let Some(newest) = newest {
            self.servers[usize::from(server)].key = newest;
        }
        if self.servers[usize::from(server)].follows.is_some() {
            let life = self.draw_life();
            let server = &mut self.servers[usize::from(server)];
            (server.replid, server.follows) = (life, None);
            server.lag.clear();
        }
        self.owners.push(server);
        if self.left.promotions == 0 {
            self.servers.iter_mut().for_each(Server::forget_if_replica);
        }
    }

    pub(super) fn flush(&mut self, server: u8) {
        self.left.flushes -= 1;
        self.servers[usize::from(server)].key = None;
        self.servers[usize::from(server)].flushes += 1;
        let is_read = self.left.promotions > 0;
        for follower in self.servers.iter_mut().filter(|other| is_read && other.follows == Some(server)) {
            follower.lag.push_back(None);
        }
    }

    /// A master starts again: connections are gone, and the replicas synchronise anew.
    pub(super) fn restart(&mut self, server: u8) {
        let life = self.draw_life();
        self.servers[usize::from(server)].replid = life;
        self.servers[usize::from(server)].strays.clear();
        for other in self.servers.iter_mut().filter(|other| other.follows == Some(server)) {
            // A replica of nobody that still answers.
            other.follows = Some(u8::MAX);
        }
        for node in 0..self.nodes.len() as u8 {
            if self.nodes[usize::from(node)].wire.server == server {
                self.reconnect(node);
            }
        }
        self.orphans.retain(|(at, _)| *at != server);
    }
}

impl Server {
    /// A replica that nobody can promote any more has nothing to say.
    pub(super) fn forget_if_replica(&mut self) {
        if self.follows.is_some() {
            self.key = None;
            self.lag.clear();
        }
    }

    /// The same but for its number.
    pub(super) fn is_like(&self, other: &Server) -> bool {
        let same = |one: &Option<Snapshot>, two: &Option<Snapshot>| match (one, two) {
            (Some(one), Some(two)) => Rc::ptr_eq(one, two),
            (one, two) => one.is_none() && two.is_none(),
        };
        let lags = self.lag.len() == other.lag.len();
        same(&self.key, &other.key)
            && lags
            && self.lag.iter().zip(&other.lag).all(|(one, two)| same(one, two))
            && self.follows == other.follows
            && self.replid == other.replid
            && self.strays.is_empty()
            && other.strays.is_empty()
    }
}

/// The key as it was in the epoch in which an offset was given.
fn of_then(key: &Key, offset: u64) -> Snapshot {
    let mut state = KeyState { lineage: Lineage::EMPTY, ..key.state };
    for branch in key.state.lineage.branches() {
        if offset <= branch.top {
            (state.epoch, state.top) = (branch.epoch, branch.top);
            break;
        }
        state.lineage.push(*branch);
    }
    Rc::new(Key { state, log: key.log.clone() })
}
