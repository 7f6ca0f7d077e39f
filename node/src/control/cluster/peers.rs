//! The other nodes: who lives, and since when.
//!
//! Owns the table of peers and the rule of life and death. A node that was not heard for [`DEAD_MS`] is gone; one that
//! comes back, or comes back under another incarnation, is a new one: nothing that was known of it counts. It must
//! not know what is done about it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::message::{Heartbeat, Sender};
use crate::core::cluster::{NodeId, PeerId};

/// Time between two heartbeats, in milliseconds.
pub const HEARTBEAT_MS: u64 = 500;

/// Silence after which a node is gone, in milliseconds: three heartbeats that did not come, and half of one for their
/// way.
pub const DEAD_MS: u64 = 3 * HEARTBEAT_MS + HEARTBEAT_MS / 2;

/// Nodes of a cluster at the most, this one not counted. More are ignored, and counted.
pub const PEERS_MAX: usize = 1_024;

/// Another node.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) id: PeerId,
    pub(super) incarnation: u64,
    /// Its place, reused when it is gone: the channel to it has an id by this.
    pub(super) index: u32,
    pub(super) says: Heartbeat,
    pub(super) heard_ms: u64,
    /// The next batch of presence that is due from it.
    pub(super) next_batch: u64,
    /// What its heartbeat before the last said was its last batch.
    pub(super) top_before: u64,
    /// Channels that it was asked about and has not answered, and when.
    pub(super) wanted: BTreeMap<Arc<str>, u64>,
    /// Every channel held after this one is to be asked for; `None`: none is.
    pub(super) resync: Option<Option<Arc<str>>>,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(super) struct Peers {
    pub(super) by_node: BTreeMap<NodeId, Peer>,
    drawn: PeerId,
}

/// What a heartbeat meant.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// A node that was not known.
    New,
    /// A node that was known in an earlier life, with this number and place.
    Again(PeerId, u32),
    Known,
    /// Of an earlier life.
    Old,
    /// There are too many nodes.
    TooMany,
}

impl Peers {
    /// A heartbeat.
    pub(super) fn heard(&mut self, sender: Sender, says: Heartbeat, now_ms: u64) -> Heard {
        let is_full = self.by_node.len() >= PEERS_MAX;
        let known = self.by_node.get_mut(&sender.node);
        let (heard, index) = match known {
            Some(peer) if peer.incarnation == sender.incarnation => {
                peer.heard_ms = peer.heard_ms.max(now_ms);
                peer.top_before = peer.says.presence_top;
                peer.says = says;
                return Heard::Known;
            }
            Some(peer) if peer.incarnation > sender.incarnation => return Heard::Old,
            Some(peer) => (Heard::Again(peer.id, peer.index), peer.index),
            None if is_full => return Heard::TooMany,
            None => (Heard::New, self.free_index()),
        };
        self.drawn += 1;
        let peer = Peer {
            id: self.drawn,
            incarnation: sender.incarnation,
            index,
            heard_ms: now_ms,
            next_batch: says.presence_top + 1,
            top_before: says.presence_top,
            says,
            wanted: BTreeMap::new(),
            resync: Some(None),
        };
        self.by_node.insert(sender.node, peer);
        heard
    }

    fn free_index(&self) -> u32 {
        let used = |index: &u32| self.by_node.values().any(|peer| peer.index == *index);
        (0..).find(|index| !used(index)).unwrap_or_default()
    }

    /// A live peer by what it calls itself.
    pub(super) fn get_mut(&mut self, sender: Sender) -> Option<&mut Peer> {
        self.by_node.get_mut(&sender.node).filter(|peer| peer.incarnation == sender.incarnation)
    }

    /// Takes a peer out that has not been heard for too long.
    pub(super) fn pop_dead(&mut self, now_ms: u64) -> Option<(NodeId, Peer)> {
        let dead = self.by_node.iter().find(|(_, peer)| peer.heard_ms + DEAD_MS <= now_ms);
        let node = *dead?.0;
        self.by_node.remove(&node).map(|peer| (node, peer))
    }

    /// Gives every peer the time to be heard again: it was this node that did not listen.
    pub(super) fn renew_leases(&mut self, now_ms: u64) {
        self.by_node.values_mut().for_each(|peer| peer.heard_ms = now_ms);
    }

    /// When the next is gone unless it is heard, in `mono_ms`.
    pub(super) fn next_ms(&self) -> Option<u64> {
        self.by_node.values().map(|peer| peer.heard_ms + DEAD_MS).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(presence_top: u64) -> Heartbeat {
        let (name, address) = ("a".to_owned(), String::new());
        Heartbeat { name, address, capacity: 1, load: 0, accepting: true, presence_top }
    }

    fn sender(node: NodeId, incarnation: u64) -> Sender {
        Sender { node, incarnation }
    }

    #[test]
    fn a_node_lives_as_long_as_it_is_heard() {
        let mut peers = Peers::default();
        assert_eq!(peers.heard(sender(1, 5), says(0), 1_000), Heard::New);
        assert_eq!(peers.heard(sender(1, 5), says(0), 2_000), Heard::Known);
        assert_eq!(peers.next_ms(), Some(2_000 + DEAD_MS));
        assert!(peers.pop_dead(2_000 + DEAD_MS - 1).is_none());
        assert_eq!(peers.pop_dead(2_000 + DEAD_MS).map(|(node, peer)| (node, peer.id)), Some((1, 1)));
        assert_eq!(peers.next_ms(), None);
        assert_eq!(peers.heard(sender(1, 5), says(0), 9_000), Heard::New, "it starts over");
        assert_eq!(peers.by_node[&1].id, 2);
    }

    #[test]
    fn a_later_life_takes_the_place_of_the_earlier_one() {
        let mut peers = Peers::default();
        peers.heard(sender(1, 5), says(7), 0);
        peers.heard(sender(2, 5), says(0), 0);
        assert_eq!(peers.by_node[&1].next_batch, 8);
        assert_eq!(peers.heard(sender(1, 6), says(0), 0), Heard::Again(1, 0));
        assert_eq!(peers.heard(sender(1, 5), says(0), 0), Heard::Old);
        assert!(peers.get_mut(sender(1, 5)).is_none());
        let peer = peers.get_mut(sender(1, 6)).expect("it lives");
        assert_eq!((peer.id, peer.index, peer.next_batch), (3, 0, 1));
    }

    #[test]
    fn there_is_a_maximum_and_places_are_used_again() {
        let mut peers = Peers::default();
        for node in 0..PEERS_MAX as u128 {
            assert_eq!(peers.heard(sender(node, 1), says(0), 0), Heard::New);
        }
        assert_eq!(peers.heard(sender(1 << 90, 1), says(0), 0), Heard::TooMany);
        peers.by_node.remove(&17);
        assert_eq!(peers.heard(sender(1 << 90, 1), says(0), 0), Heard::New);
        assert_eq!(peers.by_node[&(1 << 90)].index, 17);
    }
}
