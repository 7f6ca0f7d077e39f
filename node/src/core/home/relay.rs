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

use super::{HomePart, PageRead, bus_channel};
use crate::core::engine::ShardIndex;
use crate::core::log::Log;
use crate::core::mesh::{MeshMessage, ToMember};
use crate::core::outbox::{BATCH_BYTES_MAX, Outboxes};
use crate::core::shard::Core;

/// Bytes that a channel's relay keeps for member shards that are behind, at the most.
const RELAY_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of one relayed message at the most, beyond one publication.
pub(super) const RELAY_MESSAGE_BYTES_MAX: usize = BATCH_BYTES_MAX;
/// Publications that are read from history for one relayed message at the most.
const REREAD_PUBLICATIONS_MAX: u32 = 1024;

impl Core {
    /// Appends a publication to the relay of a channel homed here, if other shards hold it.
    pub(super) fn append_to_relay(&mut self, index: u32, publication: &Publication<'_>, now: Now) {
        let Self { channels, mesh, .. } = self;
        let channel = channels.get_mut(index);
        let (top, Some(part)) = (channel.top, &mut channel.home_part) else { return };
        if part.peers.is_empty() {
            return;
        }
        let relay = part.relay.get_or_insert_with(|| {
            let mut log = Box::<Log>::default();
            log.reset(top);
            part.peers.iter_mut().for_each(|peer| peer.at = log.base());
            log
        });
        let grown = relay.append(top, |out| {
            publication.write_record(out);
        });
        mesh.note_relay_bytes(grown, 0);
        if relay.len() > RELAY_BYTES_MAX {
            relay.skip_group_to(relay.head());
            mesh.note_relay_bytes(0, relay.cut());
        }
        for peer in &mut part.peers {
            if !peer.listed {
                peer.listed = true;
                mesh.moved(peer.shard, index);
            }
        }
        if self.mesh.relays_are_full() {
            self.relieve_relay(index, now);
        }
    }

    /// Cuts a channel's relay until the relays hold no more than they may. Member shards that take what
    /// they are sent get it first: only those that do not fall behind.
    fn relieve_relay(&mut self, index: u32, now: Now) {
        let relay = self.channels.get(index).home_part.as_ref().and_then(|part| part.relay.as_ref());
        let bytes = relay.map_or(0, |relay| relay.len().min(RELAY_MESSAGE_BYTES_MAX));
        let mut position = 0;
        while let Some((shard, _)) = self.peer_at(index, position) {
            position += 1;
            while self.mesh.fits(shard, bytes) && self.flush_peer(index, shard, now) {}
        }
        let Self { channels, mesh, .. } = self;
        let part = channels.get_mut(index).home_part.as_mut();
        let Some(relay) = part.and_then(|part| part.relay.as_mut()) else { return };
        relay.skip_group_to(relay.head());
        while mesh.relays_are_full() {
            let dropped = relay.cut();
            if dropped == 0 {
                break;
            }
            mesh.note_relay_bytes(0, dropped);
        }
    }

    /// Moves what waits for a shard from relays into its outbox, about a batch.
    pub(crate) fn relay_moved(&mut self, to: ShardIndex, now: Now) {
        while !self.mesh.has_batch(to) {
            let Some(index) = self.mesh.next_moved(to) else { return };
            if self.flush_peer(index, to, now) {
                self.mesh.moved_on(to, index);
                self.list_peer(index, to);
            }
        }
    }

    /// Notes that a peer is listed in the outbox as moved.
    fn list_peer(&mut self, index: u32, to: ShardIndex) {
        let part = self.channels.get_mut(index).home_part.as_mut();
        let peers = part.into_iter().flat_map(|part| &mut part.peers);
        peers.filter(|peer| peer.shard == to).for_each(|peer| peer.listed = true);
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
        let Some(relay) = &part.relay else { return false };
        let (member, head, at) = (peer.member, relay.head(), peer.at);
        if at == head {
            return false;
        }
        let (message, at, offset) = if at < relay.base() {
            let after = peer.offset;
            match self.reread(index, after, now) {
                Some(read) if read.last < top => {
                    (ToMember::Records { member, epoch, records: read.records.into() }, at, read.last)
                }
                Some(read) => (ToMember::Records { member, epoch, records: read.records.into() }, head, top),
                None => (ToMember::Gap { member, epoch, top }, head, top),
            }
        } else {
            let end = relay.bounded_end(at, RELAY_MESSAGE_BYTES_MAX as u64);
            let records = Arc::from(relay.slice(at, end));
            (ToMember::Records { member, epoch, records }, end, relay.offset_at(end))
        };
        self.mesh.push(to, MeshMessage::Member(message));
        let part = self.channels.get_mut(index).home_part.as_mut().expect("it was there");
        for peer in part.peers.iter_mut().filter(|peer| peer.shard == to) {
            (peer.at, peer.offset) = (at, offset);
        }
        if part.peers.iter().all(|peer| peer.at == head) {
            drop_relay(part, &mut self.mesh);
        }
        at < head
    }

    /// What follows `after` in history, about one message's worth; `None`: history does not reach so far.
    fn reread(&mut self, index: u32, after: u64, now: Now) -> Option<PageRead> {
        let top = self.channels.get(index).top;
        let since = Since { offset: after, epoch: None };
        let query = HistoryQuery { since: Some(since), limit: REREAD_PUBLICATIONS_MAX, reverse: false };
        let token = self.waiters.token();
        let mut read = PageRead::bounded(RELAY_MESSAGE_BYTES_MAX);
        let Self { bus, channels, .. } = self;
        let target = bus_channel(channels, index);
        let outcome = bus.read(now, token, target, &query, &mut |publication| read.push(publication));
        let Outcome::Done(Ok(page)) = outcome else { return None };
        let reaches = top > 0 && page.floor <= after && page.top.offset == top;
        (reaches && read.last > after).then_some(read)
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
            drop_relay(part, &mut self.mesh);
            for peer in &mut part.peers {
                (peer.at, peer.offset) = (0, top);
                let message = ToMember::Gap { member: peer.member, epoch, top };
                self.mesh.push(peer.shard, MeshMessage::Member(message));
            }
        }
        self.gap(index);
    }
}

/// Takes a relay away that nobody needs.
pub(super) fn drop_relay(part: &mut HomePart, mesh: &mut Outboxes) {
    if let Some(relay) = part.relay.take() {
        mesh.note_relay_bytes(0, relay.len());
    }
}
