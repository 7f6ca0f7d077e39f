//! What a shard and the control plane tell each other about other nodes.
//!
//! Owns the vocabulary: presence of channels as it travels between nodes, the slots of users, and the
//! stream of reports of a shard. It must not know how it travels: the node's services on the control
//! thread (`control::cluster`) carry it, a shard only tells what is so here and is told what is so elsewhere.
//!
//! Invariants:
//! * a shard that was never told [`ClusterCall::Start`] reports nothing, and keeps nothing for this;
//! * the reports of a shard are one stream: what they say of a channel is in the order in which it
//!   happened there, also [`PresenceItem::Whole`].

use std::sync::Arc;

pub use ringmain_bus::slot::SLOTS;
use ringmain_bus::slot::crc16;

use super::mesh::Identity;

/// A life of another node, as this node's control plane calls it; none is used twice.
pub type PeerId = u32;

/// Another node as it calls itself: random for every run of its process.
pub type NodeId = u128;

/// The slot of a user: that of the user's own channel on the bus. The same on every node and in every release.
pub fn slot_of(user: &str) -> u16 {
    crc16(b"user:".iter().copied().chain(user.bytes())) % SLOTS
}

/// What the control plane tells a shard. None is answered but by reports.
#[derive(Clone, Debug)]
pub enum ClusterCall {
    /// The node is part of a cluster: begin a stream of reports from the start, and forget what was told.
    Start {
        /// Number of the stream, above 0 and above any before.
        stream: u32,
    },
    /// A report was taken; the next may be sent.
    Ack {
        /// The stream's number: others are ignored.
        stream: u32,
        /// The report's.
        sequence: u32,
    },
    /// Another node lives. Nothing is known of its members.
    PeerUp {
        /// Which.
        peer: PeerId,
    },
    /// It is gone, and with it its members.
    PeerDown {
        /// Which.
        peer: PeerId,
    },
    /// Something that it told was lost: each channel's copy is uncertain until it is told as a whole.
    PeerDoubt {
        /// Which.
        peer: PeerId,
    },
    /// What it told of channels homed here, in its order.
    Told {
        /// Which.
        peer: PeerId,
        /// What.
        items: Vec<PresenceItem>,
    },
    /// Another node asks who is in these channels homed here.
    Tell {
        /// Who asks.
        to: NodeId,
        /// Which.
        channels: Vec<Arc<str>>,
    },
}

/// A change of presence, or the whole of it, on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PresenceItem {
    /// Somebody joined.
    Joined {
        /// Which channel.
        channel: Arc<str>,
        /// Who; announced or not ([`Identity::is_announced`]).
        member: Identity,
        /// Shown in presence; otherwise only announced.
        listed: bool,
    },
    /// Somebody left.
    Left {
        /// Which channel.
        channel: Arc<str>,
        /// Who; of one that was listed, the client id alone.
        member: Identity,
        /// Was shown in presence.
        listed: bool,
    },
    /// All who are listed, in parts: `first`, any number, `last`; one part may be both.
    Whole {
        /// Which channel.
        channel: Arc<str>,
        /// Who.
        members: Vec<Identity>,
        /// Nothing came before.
        first: bool,
        /// Nothing follows.
        last: bool,
    },
}

impl PresenceItem {
    /// The channel that it is about.
    pub fn channel(&self) -> &Arc<str> {
        match self {
            Self::Joined { channel, .. } | Self::Left { channel, .. } | Self::Whole { channel, .. } => {
                channel
            }
        }
    }
}

/// What a shard tells the control plane of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// Somebody here listens to a channel with presence: who else is in it is to be told.
    Held {
        /// Which.
        channel: Arc<str>,
    },
    /// Nobody here does any more.
    Released {
        /// Which.
        channel: Arc<str>,
    },
    /// Somebody here asks who is in a channel that is not held; the answer counts for
    /// [`PRESENCE_ASK_MS`].
    Asked {
        /// Which.
        channel: Arc<str>,
    },
    /// A change of presence here.
    Changed(PresenceItem),
    /// Who is in a channel here, for one who asked.
    Whole {
        /// Who asked.
        to: NodeId,
        /// Which channel.
        channel: Arc<str>,
        /// All who are listed.
        members: Vec<Identity>,
    },
}

/// One report of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Of [`ClusterCall::Start`].
    pub stream: u32,
    /// Counts reports from 1. A report may come twice.
    pub sequence: u32,
    /// News were lost before this report: what is held follows anew, joins and leaves are missing.
    pub lost: bool,
    /// Slots of users, and whether any of their users is connected here now.
    pub slots: Vec<(u16, bool)>,
    /// What happened, in order.
    pub news: Vec<News>,
}

/// How long a question waits for the other nodes, in milliseconds. Then it is answered as partial.
pub const PRESENCE_ASK_MS: u64 = 500;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        // `CLUSTER KEYSLOT 123456789` is 12739; of 16384 slots, so the lower bits are ours.
        assert_eq!(crc16(b"123456789".iter().copied()), 0x31c3);
        assert_eq!(slot_of("42"), crc16(b"user:42".iter().copied()) % SLOTS);
        let used: std::collections::BTreeSet<u16> = (0..100_000).map(|n| slot_of(&n.to_string())).collect();
        assert_eq!(used.len(), usize::from(SLOTS), "every slot has its users");
    }
}
