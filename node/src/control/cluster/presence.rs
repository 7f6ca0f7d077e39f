//! Presence between nodes: what is told, what is asked for, what is passed on to the shards.
//!
//! Owns this node's stream of what happens in its channels, the place in every other node's stream, and the
//! questions about channels that are held or asked about here. It must not know members: shards keep them.
//!
//! Every node tells on **one** channel, `node:presence`, in one numbered stream, also the answers to questions: so
//! whatever is told of a channel is in the order in which it happened, one number shows every loss, and what
//! happens in many channels within [`FLUSH_MS`] is one message. A node drops what it holds no copy of after one look
//! into a table. (A channel per presence slot would spare it that look, and nothing else where users are spread over
//! nodes: with more than a few thousand channels every node holds every slot; it would cost a number, a batch and an
//! interest for each.)
//!
//! A hole in a stream, or a gap that the bus tells, makes its node *doubted*: what is held is asked for again,
//! [`WANTS_IN_FLIGHT`] channels at a time.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use ringmain_bus::Bus;
use ringmain_proto::time::Now;

use super::message::{Batch, Body, Item, Sender, Want};
use super::net::To;
use super::peers::Peer;
use super::{Cluster, Effect};
use crate::core::api::home_of;
use crate::core::cluster::{ClusterCall, NodeId, PRESENCE_ASK_MS, PeerId, PresenceItem};
use crate::core::engine::ShardIndex;
use crate::core::mesh::Identity;

/// How long changes are gathered, in milliseconds.
pub const FLUSH_MS: u64 = 20;

/// Bytes of items after which a batch is sent at once; one item more may be in it.
pub const BATCH_BYTES_MAX: usize = 32 * 1024;

/// Bytes of items that wait for the bus at the most. Beyond it they are dropped, and others ask anew.
pub const OUT_BYTES_MAX: usize = 16 << 20;

/// Channels that a node is asked about at the same time when all are asked for.
pub const WANTS_IN_FLIGHT: usize = 512;

/// Questions to one node that wait at the most; beyond it everything held is asked for.
pub const WANTS_MAX: usize = 4_096;

/// Channels of one question at the most.
pub const WANT_CHANNELS_MAX: usize = 256;

/// When a question without an answer is asked again, in milliseconds.
pub const WANT_AGAIN_MS: u64 = 1_000;

/// See the module's doc.
#[derive(Debug, Default)]
pub(super) struct Presence {
    /// Channels with listeners here, and their home.
    held: BTreeMap<Arc<str>, ShardIndex>,
    /// Channels that a shard asks about, and until when.
    asked: BTreeMap<Arc<str>, (ShardIndex, u64)>,
    /// Channels that all nodes are to be asked about.
    fresh: Vec<Arc<str>>,
    out: VecDeque<Item>,
    out_bytes: usize,
    flush_ms: Option<u64>,
    /// The last batch of this incarnation.
    pub(super) top: u64,
}

impl Presence {
    /// Where a channel's copies are kept.
    fn home(&self, channel: &str) -> Option<ShardIndex> {
        self.held.get(channel).copied().or_else(|| self.asked.get(channel).map(|(shard, _)| *shard))
    }

    fn schedule(&mut self, now: Now) {
        self.flush_ms.get_or_insert(now.mono_ms + FLUSH_MS);
    }

    fn push(&mut self, item: Item, now: Now) {
        self.out_bytes += item_bytes(&item);
        self.out.push_back(item);
        self.schedule(now);
        if self.out_bytes > OUT_BYTES_MAX {
            self.lose();
        }
    }

    /// What happened is not told: the next batch leaves a hole.
    pub(super) fn lose(&mut self) {
        self.out = VecDeque::new();
        self.out_bytes = 0;
        self.top += 1;
    }

    /// Another incarnation: its stream begins anew. What waits is still true.
    pub(super) fn start_over(&mut self) {
        self.top = 0;
    }

    /// A shard begins anew: what it holds it will say again.
    pub(super) fn forget_shard(&mut self, shard: ShardIndex) {
        self.held.retain(|_, home| *home != shard);
        self.asked.retain(|_, (home, _)| *home != shard);
    }

    /// A channel has listeners here from now on.
    pub(super) fn hold(&mut self, channel: Arc<str>, shard: ShardIndex, now: Now) {
        self.held.insert(Arc::clone(&channel), shard);
        self.fresh.push(channel);
        self.schedule(now);
    }

    /// It has none any more.
    pub(super) fn release(&mut self, channel: &str) {
        self.held.remove(channel);
    }

    /// A shard asks about it once.
    pub(super) fn ask(&mut self, channel: Arc<str>, shard: ShardIndex, now: Now) {
        self.asked.insert(Arc::clone(&channel), (shard, now.mono_ms + PRESENCE_ASK_MS));
        self.fresh.push(channel);
        // Somebody waits.
        self.flush_ms = Some(now.mono_ms);
    }

    /// Something changed here.
    pub(super) fn changed(&mut self, item: &PresenceItem, now: Now) {
        let bytes = |member: &Identity| member.as_bytes().to_vec();
        self.push(
            match item {
                PresenceItem::Joined { channel, member, listed } => {
                    Item::Joined { channel: channel.to_string(), member: bytes(member), listed: *listed }
                }
                PresenceItem::Left { channel, member, listed } => {
                    Item::Left { channel: channel.to_string(), member: bytes(member), listed: *listed }
                }
                // Shards tell the whole of a channel only to those who ask.
                PresenceItem::Whole { .. } => return,
            },
            now,
        );
    }

    /// Who is in a channel here, in parts.
    pub(super) fn whole(&mut self, to: NodeId, channel: &str, members: &[Identity], now: Now) {
        let (mut rest, mut first) = (members, true);
        loop {
            let mut bytes = 0;
            let fits = |member: &&Identity| {
                bytes += member.as_bytes().len();
                bytes <= BATCH_BYTES_MAX / 2
            };
            let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
            let (part, after) = rest.split_at(count);
            let members = part.iter().map(|member| member.as_bytes().to_vec()).collect();
            let last = after.is_empty();
            self.push(Item::Whole { to, channel: channel.to_owned(), members, first, last }, now);
            if last {
                return;
            }
            (rest, first) = (after, false);
        }
    }

    /// When something is to be sent, in `mono_ms`.
    pub(super) fn next_ms(&self) -> Option<u64> {
        let asked = self.asked.values().map(|(_, until_ms)| *until_ms).min();
        self.flush_ms.into_iter().chain(asked).min()
    }
}

fn item_bytes(item: &Item) -> usize {
    match item {
        Item::Joined { channel, member, .. } | Item::Left { channel, member, .. } => {
            8 + channel.len() + member.len()
        }
        Item::Whole { channel, members, .. } => {
            24 + channel.len() + members.iter().map(|member| 4 + member.len()).sum::<usize>()
        }
    }
}

/// An item as shards take it; `None`: it is not for this node, or it is broken.
fn item_for(me: NodeId, item: Item) -> Option<PresenceItem> {
    let member = |bytes: Vec<u8>| Identity::from_bytes(&bytes);
    Some(match item {
        Item::Joined { channel, member: who, listed } => {
            PresenceItem::Joined { channel: channel.into(), member: member(who)?, listed }
        }
        Item::Left { channel, member: who, listed } => {
            PresenceItem::Left { channel: channel.into(), member: member(who)?, listed }
        }
        Item::Whole { to, channel, members, first, last } if to == me => {
            let members: Option<Vec<Identity>> = members.into_iter().map(member).collect();
            PresenceItem::Whole { channel: channel.into(), members: members?, first, last }
        }
        Item::Whole { .. } => return None,
    })
}

impl Item {
    fn channel(&self) -> &str {
        match self {
            Item::Joined { channel, .. } | Item::Left { channel, .. } | Item::Whole { channel, .. } => {
                channel
            }
        }
    }
}

impl Cluster {
    /// A batch of another node.
    pub(super) fn presence_arrived(&mut self, sender: Sender, batch: Batch) {
        let Some(peer) = self.peers.get_mut(sender) else {
            self.figures.strangers += 1;
            return;
        };
        if batch.sequence < peer.next_batch {
            return;
        }
        let (id, hole) = (peer.id, batch.sequence > peer.next_batch);
        peer.next_batch = batch.sequence + 1;
        if hole {
            self.doubt(sender.node);
        }
        let Some(peer) = self.peers.get_mut(sender) else { return };
        let mut told: BTreeMap<ShardIndex, Vec<PresenceItem>> = BTreeMap::new();
        for item in batch.items {
            let Some(home) = self.presence.home(item.channel()) else { continue };
            let Some(item) = item_for(self.me.node, item) else { continue };
            if let PresenceItem::Whole { channel, last: true, .. } = &item {
                peer.wanted.remove(channel);
            }
            told.entry(home).or_default().push(item);
        }
        for (shard, items) in told {
            self.effects.push(Effect::Shard(shard, ClusterCall::Told { peer: id, items }));
        }
    }

    /// Something of a node's stream was lost, as far as it can be seen.
    pub(super) fn doubt(&mut self, node: NodeId) {
        if let Some(peer) = self.peers.by_node.get_mut(&node) {
            peer.resync = Some(None);
            self.figures.doubts += 1;
            let peer = peer.id;
            self.tell_shards(|| ClusterCall::PeerDoubt { peer });
        }
    }

    /// The same of every node.
    pub(super) fn doubt_all(&mut self) {
        let nodes: Vec<NodeId> = self.peers.by_node.keys().copied().collect();
        nodes.into_iter().for_each(|node| self.doubt(node));
    }

    /// A known node's heartbeat says how far its stream goes. The stream has had the time between two
    /// heartbeats to come.
    pub(super) fn check_tail(&mut self, sender: Sender) {
        let Some(peer) = self.peers.get_mut(sender) else { return };
        if peer.next_batch <= peer.top_before {
            peer.next_batch = peer.top_before + 1;
            self.doubt(sender.node);
        }
    }

    /// Another node asks who is in some channels.
    pub(super) fn want_arrived(&mut self, sender: Sender, want: Want) {
        let mut by_home: BTreeMap<ShardIndex, Vec<Arc<str>>> = BTreeMap::new();
        for channel in want.channels {
            let home = home_of(&channel, self.shards.len() as u16);
            by_home.entry(home).or_default().push(channel.into());
        }
        for (shard, channels) in by_home {
            self.effects.push(Effect::Shard(shard, ClusterCall::Tell { to: sender.node, channels }));
        }
    }

    /// Sends what is due: changes, then questions.
    pub(super) fn drive_presence(&mut self, now: Now, bus: &mut dyn Bus) {
        self.presence.asked.retain(|_, (_, until_ms)| *until_ms > now.mono_ms);
        if !self.net.is_up() {
            // Nobody hears it; it is tried again when somebody may.
            if self.presence.flush_ms.is_some() {
                self.presence.flush_ms = Some(now.mono_ms + FLUSH_MS);
            }
            return;
        }
        let due = self.presence.flush_ms.is_some_and(|at_ms| at_ms <= now.mono_ms);
        while self.presence.out_bytes >= BATCH_BYTES_MAX || due && !self.presence.out.is_empty() {
            self.send_batch(now, bus);
        }
        if due {
            self.presence.flush_ms = None;
            self.ask_everyone(now, bus);
        }
        self.resync(now, bus);
    }

    fn send_batch(&mut self, now: Now, bus: &mut dyn Bus) {
        let (mut items, mut bytes) = (Vec::new(), 0);
        while bytes < BATCH_BYTES_MAX
            && let Some(item) = self.presence.out.pop_front()
        {
            bytes += item_bytes(&item);
            items.push(item);
        }
        self.presence.out_bytes -= bytes;
        self.presence.top += 1;
        let batch = Batch { sequence: self.presence.top, items };
        // Where it cannot be published its number is missing, and others ask.
        self.publish(now, bus, To::Presence, &Body::Presence(batch));
    }

    fn ask_everyone(&mut self, now: Now, bus: &mut dyn Bus) {
        let mut fresh = std::mem::take(&mut self.presence.fresh);
        fresh.retain(|channel| self.presence.home(channel).is_some());
        if fresh.is_empty() || self.peers.by_node.is_empty() {
            return;
        }
        for peer in self.peers.by_node.values_mut() {
            if peer.wanted.len() + fresh.len() > WANTS_MAX {
                peer.resync = Some(None);
            } else {
                peer.wanted.extend(fresh.iter().map(|channel| (Arc::clone(channel), now.mono_ms)));
            }
        }
        self.send_wants(now, bus, To::All, &fresh);
    }

    fn send_wants(&mut self, now: Now, bus: &mut dyn Bus, to: To, channels: &[Arc<str>]) {
        for part in channels.chunks(WANT_CHANNELS_MAX) {
            let want = Want { channels: part.iter().map(|channel| channel.to_string()).collect() };
            self.publish(now, bus, to, &Body::Want(want));
        }
    }

    /// Asks doubted and silent nodes.
    fn resync(&mut self, now: Now, bus: &mut dyn Bus) {
        let mut questions = Vec::new();
        for (node, peer) in &mut self.peers.by_node {
            let mut channels = again(peer, &self.presence, now);
            channels.extend(next_of_resync(peer, &self.presence, now));
            if !channels.is_empty() {
                questions.push((To::Node(*node, peer.index), channels));
            }
        }
        for (to, channels) in questions {
            self.send_wants(now, bus, to, &channels);
        }
    }

    /// When a question is to be asked again, in `mono_ms`.
    pub(super) fn next_want_ms(&self) -> Option<u64> {
        if !self.net.is_up() {
            return None;
        }
        let of_peer = |peer: &Peer| match &peer.resync {
            Some(_) if peer.wanted.len() < WANTS_IN_FLIGHT => Some(0),
            _ => peer.wanted.values().min().map(|asked_ms| asked_ms + WANT_AGAIN_MS),
        };
        self.peers.by_node.values().filter_map(of_peer).min()
    }

    /// Everybody is to know of a peer.
    pub(super) fn peer_up(&mut self, peer: PeerId) {
        self.tell_shards(|| ClusterCall::PeerUp { peer });
    }
}

/// Channels that a node was asked about too long ago; those that nobody needs any more are forgotten.
fn again(peer: &mut Peer, presence: &Presence, now: Now) -> Vec<Arc<str>> {
    let mut again = Vec::new();
    peer.wanted.retain(|channel, asked_ms| {
        if *asked_ms + WANT_AGAIN_MS > now.mono_ms {
            return true;
        }
        *asked_ms = now.mono_ms;
        let needed = presence.home(channel).is_some();
        if needed {
            again.push(Arc::clone(channel));
        }
        needed
    });
    again
}

/// The next channels to ask a doubted node about.
fn next_of_resync(peer: &mut Peer, presence: &Presence, now: Now) -> Vec<Arc<str>> {
    let mut channels = Vec::new();
    while peer.wanted.len() < WANTS_IN_FLIGHT
        && let Some(cursor) = &mut peer.resync
    {
        let after = cursor.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        match presence.held.range::<str, _>((after, Bound::Unbounded)).next() {
            Some((channel, _)) => {
                *cursor = Some(Arc::clone(channel));
                if peer.wanted.insert(Arc::clone(channel), now.mono_ms).is_none() {
                    channels.push(Arc::clone(channel));
                }
            }
            None => peer.resync = None,
        }
    }
    channels
}
