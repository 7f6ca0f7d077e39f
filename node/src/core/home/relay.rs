//! From a channel's home to the other shards that hold it.
//!
//! Owns the cursors of member shards in a channel's relay. A member shard that sleeps costs a cursor:
//! publications wait in the relay once, encoded once, shared by all shards that need the same; below the
//! relay's tail it goes back to history, and where history does not reach it is told ([`ToMember::Gap`]).
//! It must not know credits and inboxes: the loop asks for a batch when it may send.
//!
//! Invariant: what a shard is sent of a channel has no hole that it is not told of.

use std::sync::Arc;

use ringmain_bus::{HistoryQuery, Outcome, Position, Since};
use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use super::{PageRead, bus_channel};
use crate::core::engine::ShardIndex;
use crate::core::log::Log;
use crate::core::mesh::{BATCH_MESSAGES_MAX, ChannelRef, MeshMessage, ToMember};
use crate::core::shard::Core;

/// Bytes that a channel's relay keeps for member shards that are behind, at the most.
const RELAY_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of one relayed message at the most, beyond one publication.
const RELAY_MESSAGE_BYTES_MAX: u64 = 256 * 1024;

impl Core {
    /// Appends a publication to the relay of a channel homed here, if other shards hold it.
    pub(super) fn append_to_relay(&mut self, index: u32, publication: &Publication<'_>) {
        let channel = self.channels.get_mut(index);
        let (top, Some(part)) = (channel.top, &mut channel.home_part) else { return };
        if part.peers.is_empty() {
            return;
        }
        let relay = part.relay.get_or_insert_with(|| {
            let mut log = Box::<Log>::default();
            log.reset(top);
            part.peers.iter_mut().for_each(|peer| peer.at = 0);
            log
        });
        relay.append(top, |out| {
            publication.write_record(out);
        });
        if relay.len() > RELAY_BYTES_MAX {
            relay.skip_group_to(relay.head());
            relay.cut();
        }
        for peer in &mut part.peers {
            if !peer.listed {
                peer.listed = true;
                self.mesh.moved(peer.shard, index);
            }
        }
    }

    /// Moves what waits for a shard from relays into its outbox, about a batch.
    pub(crate) fn relay_moved(&mut self, to: ShardIndex, now: Now) {
        while self.mesh.queued(to) < BATCH_MESSAGES_MAX {
            let Some(index) = self.mesh.next_moved(to) else { return };
            while self.flush_peer(index, to, now) {}
        }
    }

    /// Puts what a peer has not been sent of a channel into its outbox, about one message's worth.
    /// Returns whether there is more.
    pub(super) fn flush_peer(&mut self, index: u32, to: ShardIndex, now: Now) -> bool {
        if self.channels.try_get(index).is_none() {
            return false;
        }
        let channel = self.channels.get_mut(index);
        let (epoch, top) = (channel.epoch, channel.top);
        let Some(part) = &mut channel.home_part else { return false };
        let Some(peer) = part.peers.iter_mut().find(|peer| peer.shard == to) else { return false };
        peer.listed = false;
        let Some(relay) = &mut part.relay else { return false };
        let mut more = false;
        let member = peer.member;
        let message = if peer.at < relay.base() {
            let after = peer.offset;
            self.reread(index, member, after, now)
        } else if peer.at < relay.head() {
            let end = relay.bounded_end(peer.at, RELAY_MESSAGE_BYTES_MAX);
            let records = Arc::from(relay.slice(peer.at, end));
            peer.at = end;
            peer.offset = relay.offset_at(end);
            more = end < relay.head();
            ToMember::Records { member, epoch, records }
        } else {
            return false;
        };
        let whole = !matches!(message, ToMember::Gap { .. });
        self.mesh.push(to, MeshMessage::Member(message));
        let part = self.channels.get_mut(index).home_part.as_mut().expect("it was there");
        let relay = part.relay.as_mut().expect("it was there");
        let head = relay.head();
        for peer in &mut part.peers {
            if peer.shard == to && (!whole || peer.at < relay.base()) {
                (peer.at, peer.offset) = (head, top);
            }
        }
        if part.peers.iter().all(|peer| peer.at == head) {
            part.relay = None;
        }
        more
    }

    /// What a shard missed that fell behind the relay's tail: from history, or a gap.
    fn reread(&mut self, index: u32, member: ChannelRef, after: u64, now: Now) -> ToMember {
        let channel = self.channels.get(index);
        let (epoch, top) = (channel.epoch, channel.top);
        let since = Since { offset: after, epoch: None };
        let query = HistoryQuery { since: Some(since), limit: u32::MAX, reverse: false };
        let token = self.waiters.token();
        let mut read = PageRead::default();
        let Self { bus, channels, .. } = self;
        let target = bus_channel(channels, index);
        match bus.read(now, token, target, &query, &mut |publication| read.push(publication)) {
            Outcome::Done(Ok(page)) if top > 0 && page.floor <= after && page.top.offset == top => {
                ToMember::Records { member, epoch, records: read.records.into() }
            }
            _ => ToMember::Gap { member, epoch, top },
        }
    }

    /// The position of a channel homed here jumped: every subscriber in the node is told.
    pub(super) fn position_lost(&mut self, index: u32, position: Position) {
        if self.channels.try_get(index).is_none() {
            return;
        }
        let channel = self.channels.get_mut(index);
        channel.epoch = position.epoch.get();
        channel.top = position.offset;
        let (epoch, top) = (channel.epoch, channel.top);
        if let Some(part) = &mut channel.home_part {
            part.relay = None;
            for peer in &mut part.peers {
                (peer.at, peer.offset) = (0, top);
                let message = ToMember::Gap { member: peer.member, epoch, top };
                self.mesh.push(peer.shard, MeshMessage::Member(message));
            }
        }
        self.gap(index);
    }
}
