//! Presence of channels homed here, and the joins and leaves that are told.
//!
//! Owns who is listed in a channel ([`Presence`] keeps them), and to whom a join or leave goes. It must
//! not know why somebody came or went.
//!
//! Invariant: a join or leave travels behind the publications that came before it.

use ringmain_proto::close::ErrorCode;
use ringmain_proto::message::{ClientInfo, Push};
use ringmain_proto::time::Now;

use crate::core::api::Member;
use crate::core::channel::Channel;
use crate::core::engine::ShardIndex;
use crate::core::infos::member_bytes;
use crate::core::mesh::{ChannelRef, Identity, MeshMessage, ToMember};
use crate::core::metrics::Metric;
use crate::core::presence::Presence;
use crate::core::shard::Core;

impl Core {
    /// Lists somebody in a channel's presence, if the pool has room.
    pub(super) fn enter(&mut self, index: u32, identity: &Identity) -> Result<(), ErrorCode> {
        self.infos.admit(member_bytes(identity))?;
        let part = self.channels.get_mut(index).home_part.get_or_insert_default();
        if let Some(before) = part.presence.insert(identity) {
            self.infos.release(member_bytes(&before));
        }
        Ok(())
    }

    /// Tells everyone who asked for it that somebody joined or left.
    pub(super) fn announce(&mut self, index: u32, joined: bool, identity: &Identity, now: Now) {
        self.announce_local(index, joined, identity);
        let mut position = 0;
        while let Some((shard, member)) = self.peer_at(index, position) {
            position += 1;
            if !self.mesh.fits(shard, identity.bytes()) {
                self.metrics.add(Metric::DropJoinLeave, 1);
                continue;
            }
            while self.flush_peer(index, shard, now) {}
            let message = ToMember::Presence { member, joined, identity: identity.clone() };
            self.mesh.push(shard, MeshMessage::Member(message));
        }
    }

    pub(super) fn peer_at(&self, index: u32, position: usize) -> Option<(ShardIndex, ChannelRef)> {
        let part = self.channels.get(index).home_part.as_ref()?;
        part.peers.get(position).map(|peer| (peer.shard, peer.member))
    }

    /// A join or leave for this shard's subscribers.
    pub(crate) fn announce_local(&mut self, index: u32, joined: bool, identity: &Identity) {
        let info = identity.as_client_info();
        for variant in 0..self.channels.get(index).variants.len() {
            self.append_to_variant(index, variant as u8, None, |codec, name, out| {
                let push = if joined {
                    Push::Join { channel: name, info }
                } else {
                    Push::Leave { channel: name, info }
                };
                codec.encode_push(&push, out);
            });
        }
    }

    /// The members of a channel homed here, on all nodes as far as they are known.
    pub(crate) fn members_of(&self, channel: &str) -> Vec<Member> {
        let mut members: Vec<Member> = self
            .everyone_in(channel)
            .map(|member| {
                let ClientInfo { user, client, conn_info, chan_info } = member.as_client_info();
                Member {
                    client,
                    user: user.to_owned(),
                    conn_info: conn_info.map(<[u8]>::to_vec),
                    chan_info: chan_info.map(<[u8]>::to_vec),
                }
            })
            .collect();
        members.sort_by_key(|member| member.client);
        // One that moved to this node may still be listed at the other.
        members.dedup_by_key(|member| member.client);
        members
    }

    /// Numbers of clients and of distinct users in a channel homed here, on all nodes as far as they are known.
    pub(crate) fn presence_stats_of(&self, channel: &str) -> (u32, u32) {
        let mut users: Vec<&str> = self.everyone_in(channel).map(Identity::user).collect();
        let clients = users.len() as u32;
        users.sort_unstable();
        users.dedup();
        (clients, users.len() as u32)
    }

    /// Members through this node, and those that other nodes told of.
    fn everyone_in(&self, channel: &str) -> impl Iterator<Item = &Identity> {
        let local = self.presence_of(channel).into_iter().flat_map(Presence::iter);
        local.chain(self.remote.members(channel))
    }

    /// Members through this node.
    pub(super) fn presence_of(&self, channel: &str) -> Option<&Presence> {
        let index = self.channels.find(channel)?;
        Some(&self.channels.get(index).home_part.as_ref()?.presence)
    }

    /// Subscriptions of all shards to a channel homed here.
    pub(crate) fn subscriptions_of(&self, channel: &Channel) -> u32 {
        channel.subs + channel.home_part.as_ref().map_or(0, |part| part.subscriptions())
    }
}
