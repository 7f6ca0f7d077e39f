//! What a state of the model consists of.
//!
//! Owns: servers, nodes, what is between them, and what has been seen so far. Must not know: the steps.
//! Invariant: nothing here is read by the rule but keys, places, kept acks and links.

use std::collections::VecDeque;
use std::rc::Rc;

use super::{Bounds, Rule};
use crate::epoch::{Epoch, Position};
use crate::lineage::{KeptAck, KeyState, Place, ReplicationId};

/// A key as a master holds it: the rule's state, and the publications by offset. History is their end; the
/// ids seen are all of them. Offsets are dense here.
#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) state: KeyState,
    pub(super) log: Vec<u8>,
}

/// A key as it was when something was said of it. Not changed afterwards.
pub(super) type Snapshot = Rc<Key>;

/// To subscribers: the key's newest publication, or only that the key was created or renewed.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) key: Snapshot,
    pub(super) has_publication: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read,
    Publish(u8),
}

#[derive(Clone, Debug)]
pub(super) enum Reply {
    /// With the publications that had been executed anywhere by then.
    Read {
        key: Snapshot,
        executed: u8,
    },
    Ack {
        publication: u8,
        offset: u64,
        key: Snapshot,
    },
    /// The server is a replica.
    Refused(Request),
}

/// A node's two connections to one server; each way of each keeps its order.
#[derive(Clone, Debug)]
pub(super) struct Wire {
    pub(super) server: u8,
    pub(super) settled: Option<ReplicationId>,
    /// The server's count of flushes that the node has seen by its canary.
    pub(super) flushes: u8,
    pub(super) subscribed: bool,
    pub(super) requests: VecDeque<Request>,
    pub(super) replies: VecDeque<Reply>,
    pub(super) pushes: VecDeque<Message>,
}

impl Wire {
    pub(super) fn new(server: u8) -> Wire {
        Wire {
            server,
            settled: None,
            flushes: 0,
            subscribed: false,
            requests: VecDeque::new(),
            replies: VecDeque::new(),
            pushes: VecDeque::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) key: Option<Snapshot>,
    pub(super) replid: ReplicationId,
    /// Whose replica it is; none is a master.
    pub(super) follows: Option<u8>,
    /// What it has not applied yet.
    pub(super) lag: VecDeque<Option<Snapshot>>,
    /// What it published and its own links may still carry to other servers.
    pub(super) strays: Vec<Message>,
    pub(super) flushes: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Subscribing,
    Reading,
    Live,
    /// The server is a replica: waits to learn who is the owner.
    Refused,
}

#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) message: Message,
    /// A read was sent after it came.
    pub(super) again: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    pub(super) publication: u8,
    pub(super) ack: KeptAck,
}

/// A node, and its one subscriber.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// The newest owner that it knows, an index of [`State::owners`].
    pub(super) owner: usize,
    pub(super) wire: Wire,
    /// Only where it should have been closed, see [`Clause::ClosedConnections`](super::Clause).
    pub(super) old_wire: Option<Wire>,
    pub(super) mode: Mode,
    pub(super) place: Option<Place>,
    pub(super) held: VecDeque<Held>,
    pub(super) kept: Vec<Kept>,
    /// To be sent (again) when live.
    pub(super) waiting: u8,
    /// What the subscriber was told: everything executed before may be missing.
    pub(super) told: u8,
    pub(super) delivered: u8,
    /// Delivered since it was told last, and the offset before them.
    pub(super) seen: Vec<u8>,
    pub(super) seen_after: u64,
}

impl Node {
    /// Whether a server's number stands in it.
    pub(super) fn names(&self, server: u8) -> bool {
        std::iter::once(&self.wire).chain(&self.old_wire).any(|wire| wire.server == server)
    }
}

/// Something delivered or acknowledged under a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) position: Position,
    pub(super) publication: u8,
}

/// Everything.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// What is left to happen, and constants.
    pub(super) left: Bounds,
    pub(super) rule: Rule,
    pub(super) servers: Vec<Server>,
    /// Who was made the owner, one after the other.
    pub(super) owners: Vec<u8>,
    pub(super) nodes: Vec<Node>,
    /// Sent over a connection that is gone; a server may execute them at any time or never.
    pub(super) orphans: Vec<(u8, u8)>,
    /// Sets of publications, a bit each.
    pub(super) sent: u8,
    pub(super) executed: u8,
    pub(super) acked: u8,
    /// Acks that died with their node before they were confirmed.
    pub(super) excused: u8,
    pub(super) names: Vec<Name>,
    /// Nonces and replication ids drawn.
    pub(super) epochs: u64,
    pub(super) lives: u8,
}

pub(super) fn bit(publication: u8) -> u8 {
    1 << publication
}

impl State {
    pub(super) fn new(bounds: &Bounds, rule: Rule) -> State {
        let life = ReplicationId::new([1; 20]);
        let state = KeyState::touch(None, life, Epoch::new(1)).0;
        let key = (!bounds.fresh).then(|| Rc::new(Key { state, log: Vec::new() }));
        let server = |index| Server {
            key: key.clone(),
            replid: life,
            follows: (index > 0).then_some(0),
            lag: VecDeque::new(),
            strays: Vec::new(),
            flushes: 0,
        };
        let live = Wire { settled: Some(life), subscribed: true, ..Wire::new(0) };
        let node = Node {
            owner: 0,
            wire: if bounds.fresh { Wire::new(0) } else { live },
            old_wire: None,
            mode: if bounds.fresh { Mode::Subscribing } else { Mode::Live },
            place: (!bounds.fresh).then(|| state.place()),
            held: VecDeque::new(),
            kept: Vec::new(),
            waiting: 0,
            told: 0,
            delivered: 0,
            seen: Vec::new(),
            seen_after: 0,
        };
        let mut servers: Vec<Server> = (0..bounds.servers).map(server).collect();
        if bounds.promotions == 0 {
            servers.iter_mut().for_each(Server::forget_if_replica);
        }
        State {
            left: *bounds,
            rule,
            servers,
            owners: vec![0],
            nodes: vec![node.clone(), node],
            orphans: Vec::new(),
            sent: 0,
            executed: 0,
            acked: 0,
            excused: 0,
            names: Vec::new(),
            epochs: 1,
            lives: 1,
        }
    }

    pub(super) fn owner(&self) -> u8 {
        *self.owners.last().expect("the first is there from the start")
    }

    /// History reaches back to here.
    pub(super) fn floor(&self, key: &Key) -> u64 {
        key.state.top.saturating_sub(self.left.history)
    }

    pub(super) fn draw_life(&mut self) -> ReplicationId {
        self.lives += 1;
        ReplicationId::new([self.lives; 20])
    }
}
