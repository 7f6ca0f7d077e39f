//! Channels homed on this shard: publishing, history, presence, and who else in the node holds them.
//!
//! Owns the home's side of every channel ([`HomePart`]) and the way of a message to a home or from it.
//! The behaviour is spread over the modules below: [`publish`] (into the bus, and to this shard's
//! subscribers), [`relay`] (to other shards), [`subscribe`] (recovery, the end of interest), [`joins`]
//! (presence), [`remote`] (presence on other nodes), [`news`] (what other nodes are told), [`history`] (what is
//! asked of it), [`waiters`] (late answers of the bus). None of them knows a session beyond its slot, nor a
//! socket.
//!
//! Invariants:
//! * whatever a subscriber's shard is sent about a channel travels in one order: relay first, then
//!   the answer, so a position told is never overtaken;
//! * each subscription that was answered with success is counted in its peer until its leave.

mod history;
mod joins;
mod late;
mod news;
mod publish;
mod relay;
mod remote;
mod subscribe;
mod waiters;

use ringmain_bus::{BusError, Channel as BusChannel, ChannelId, PublishError};
use ringmain_proto::close::ErrorCode;
use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

pub(crate) use self::news::NewsQueue;
pub(crate) use self::remote::{Asker, Question, Remotes};
pub(crate) use self::waiters::Waiters;

use super::channel::{Channels, NoChannel};
use super::config::CoreConfig;
use super::engine::ShardIndex;
use super::log::Log;
use super::mesh::*;
use super::presence::Presence;
use super::shard::Core;

/// The home's side of a channel; exists while another shard is subscribed, or somebody is present.
#[derive(Debug, Default)]
pub(crate) struct HomePart {
    /// Other shards with subscriptions.
    peers: Vec<Peer>,
    /// What a peer has not been sent yet, as records.
    relay: Option<Box<Log>>,
    presence: Presence,
}

impl HomePart {
    /// Subscriptions of other shards.
    pub(crate) fn subscriptions(&self) -> u32 {
        self.peers.iter().map(|peer| peer.subs).sum()
    }
}

#[derive(Debug)]
struct Peer {
    shard: ShardIndex,
    subs: u32,
    member: ChannelRef,
    /// Position in the relay.
    at: u64,
    /// Offset relayed last.
    offset: u64,
    /// Listed in the outbox as moved.
    listed: bool,
}

/// Who is told what came of a publish.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Publisher {
    /// A connection.
    Client(Origin),
    /// The control plane, under this token.
    Call(u64),
}

/// The embedded bus of a shard, from the configuration.
pub(crate) fn memory_options(config: &CoreConfig, seed: u64) -> ringmain_bus::memory::MemoryOptions {
    ringmain_bus::memory::MemoryOptions {
        history_bytes_max: config.limits.history_pool_bytes as usize,
        ..ringmain_bus::memory::MemoryOptions::new(seed)
    }
}

/// What a read of history found.
#[derive(Debug, Default)]
struct PageRead {
    records: Vec<u8>,
    count: u32,
    last: u64,
    bytes_max: Option<usize>,
}

impl PageRead {
    /// One that takes no more when it has so many bytes.
    fn bounded(bytes_max: usize) -> Self {
        Self { bytes_max: Some(bytes_max), ..Self::default() }
    }

    fn push(&mut self, publication: &Publication<'_>) {
        if self.bytes_max.is_some_and(|max| self.records.len() >= max) {
            return;
        }
        publication.write_record(&mut self.records);
        self.count += 1;
        self.last = publication.offset;
    }
}

impl Core {
    /// Sends a message to a channel's home; handled at once where that is this shard.
    pub(crate) fn send_home(&mut self, home: ShardIndex, message: ToHome, now: Now) {
        if home == self.shard {
            self.at_home(home, message, now);
        } else {
            self.mesh.push(home, MeshMessage::Home(message));
        }
    }

    pub(super) fn send_member(&mut self, to: ShardIndex, message: ToMember, now: Now) {
        if to == self.shard {
            self.at_member(message, now);
        } else {
            self.mesh.push(to, MeshMessage::Member(message));
        }
    }

    /// A message to this shard as a channel's home.
    pub(crate) fn at_home(&mut self, from: ShardIndex, message: ToHome, now: Now) {
        match message {
            ToHome::Publish { origin, channel, identity, data } => {
                let info = identity.as_ref().map(Identity::as_client_info);
                let mut publication = Publication { data: &data, info, ..Publication::default() };
                self.publish_at_home(from, Publisher::Client(origin), &channel, None, &mut publication, now);
            }
            ToHome::Subscribe(request) => self.subscribe_at_home(from, request, now),
            ToHome::Leave(leave) => self.leave_at_home(from, &leave, now),
            ToHome::Query { origin, channel, query } => {
                self.query_at_home(from, origin, &channel, &query, now);
            }
            ToHome::Replay { origin, channel, after, epoch } => {
                self.replay_at_home(from, origin, &channel, after, epoch, now);
            }
        }
    }
}

/// A channel as the bus names it.
fn bus_channel(channels: &Channels, index: u32) -> BusChannel<'_> {
    let channel = channels.get(index);
    BusChannel {
        id: ChannelId(index),
        name: &channel.name,
        options: &channels.namespace(channel.namespace).bus,
    }
}

/// How a missing channel is told.
pub(crate) fn no_channel(reason: NoChannel) -> ErrorCode {
    match reason {
        NoChannel::UnknownNamespace => ErrorCode::UnknownChannel,
        NoChannel::Full => ErrorCode::LimitExceeded,
    }
}

fn bus_error(error: BusError) -> ErrorCode {
    match error {
        BusError::Unavailable => ErrorCode::BusUnavailable,
        BusError::Overloaded => ErrorCode::TooManyRequests,
        BusError::UnrecoverableEpoch { .. } => ErrorCode::UnrecoverablePosition,
    }
}

fn publish_error(error: PublishError) -> ErrorCode {
    match error {
        PublishError::Unavailable => ErrorCode::BusUnavailable,
        PublishError::Unknown => ErrorCode::OutcomeUnknown,
        PublishError::Overloaded => ErrorCode::TooManyRequests,
        PublishError::TooLarge { .. } | PublishError::KeyTooLong { .. } => ErrorCode::BadRequest,
    }
}
