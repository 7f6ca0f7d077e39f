//! Channels homed on this shard: publishing, history, presence, and who else in the node holds them.
//!
//! Owns the home's side of every channel: what it asks of the bus, the members of presence, and the
//! relay to member shards. A member shard that sleeps costs a cursor in the relay: publications wait
//! there once, encoded once, shared by all shards that need the same; below the relay's tail it goes
//! back to history, and where history does not reach it is told ([`ToMember::Gap`]).
//!
//! Invariants:
//! * whatever a subscriber's shard is sent about a channel travels in one order: relay first, then
//!   the answer, so a position told is never overtaken;
//! * each subscription that was answered with success is counted in its peer until its leave.

use std::collections::HashMap;
use std::sync::Arc;

use ringmain_bus::{
    Accepted, BusError, Channel as BusChannel, ChannelId, Epoch, Event, HistoryQuery, Outcome, Page,
    Position, PublicationId, PublishError, Since, Token,
};
use ringmain_proto::close::ErrorCode;
use ringmain_proto::codec::Codec;
use ringmain_proto::message::{ClientInfo, Publication, Push};
use ringmain_proto::time::Now;

use super::api::Member;
use super::channel::{Channel, NoChannel};
use super::config::CoreConfig;
use super::engine::ShardIndex;
use super::latest::KEY_TAG;
use super::log::Log;
use super::mesh::*;
use super::metrics::Metric;
use super::presence::Presence;
use super::shard::Core;
use super::text::ClientText;

/// Bytes that a channel's relay keeps for member shards that are behind, at the most.
const RELAY_BYTES_MAX: usize = 1024 * 1024;
/// Bytes of one relayed message at the most, beyond one publication.
const RELAY_MESSAGE_BYTES_MAX: u64 = 256 * 1024;

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
    /// Something was lost on the way: tell it before anything else.
    gap: bool,
}

/// What waits for a late answer of the bus, by token.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    next: u64,
    waiting: HashMap<u64, Waiter>,
    /// Subscriptions of channels for which the bus has not confirmed interest yet.
    opening: HashMap<u32, Vec<(ShardIndex, Box<SubscribeAtHome>)>>,
}

#[derive(Debug)]
enum Waiter {
    Open(u32),
    Publish(ShardIndex, Publisher),
    Subscribe(u32, ShardIndex, Box<SubscribeAtHome>),
    Query(ShardIndex, Origin),
    Replay(ShardIndex, Origin, u64),
    Call(u64),
}

/// Who is told what came of a publish.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Publisher {
    /// A connection.
    Client(Origin),
    /// The control plane, under this token.
    Call(u64),
}

impl Waiters {
    fn token(&mut self) -> Token {
        self.next += 1;
        Token(self.next)
    }
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
}

impl PageRead {
    fn push(&mut self, publication: &Publication<'_>) {
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

    fn send_member(&mut self, to: ShardIndex, message: ToMember, now: Now) {
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
                let client = identity.as_ref().map(|identity| ClientText::new(identity.client));
                let info = identity.as_ref().zip(client.as_ref()).map(|(identity, client)| ClientInfo {
                    user: &identity.info.user,
                    client: client.as_str(),
                    conn_info: identity.info.conn_info.as_deref(),
                    chan_info: identity.info.chan_info.as_deref(),
                });
                let publication = Publication { data: &data, info, ..Publication::default() };
                self.publish_at_home(from, Publisher::Client(origin), &channel, None, &publication, now);
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

    // --- publishing ---

    /// Publishes into a channel homed here.
    pub(crate) fn publish_at_home(
        &mut self,
        from: ShardIndex,
        publisher: Publisher,
        channel: &str,
        key: Option<&str>,
        publication: &Publication<'_>,
        now: Now,
    ) {
        let index = match self.channels.get_or_create(channel) {
            Ok(index) => index,
            Err(reason) => return self.published(from, publisher, Err(no_channel(reason)), now),
        };
        self.publish_into(from, publisher, index, key, publication, now);
    }

    /// The same for a channel that is known.
    pub(crate) fn publish_into(
        &mut self,
        from: ShardIndex,
        publisher: Publisher,
        index: u32,
        key: Option<&str>,
        publication: &Publication<'_>,
        now: Now,
    ) {
        let token = self.waiters.token();
        let id = match key {
            Some(key) => PublicationId::Key(key),
            None => PublicationId::Node { incarnation: self.started_unix_ms, sequence: token.0 },
        };
        let Self { bus, channels, .. } = self;
        let target = bus_channel(channels, index);
        match bus.publish(now, token, target, id, publication) {
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Publish(from, publisher));
            }
            Outcome::Done(Ok(accepted)) => {
                self.published(from, publisher, Ok(accepted), now);
                if !accepted.repeated {
                    self.metrics.add(Metric::Publications, 1);
                    let publication = Publication { offset: accepted.position.offset, ..publication.clone() };
                    self.deliver(index, accepted.position.epoch.get(), &publication);
                }
            }
            Outcome::Done(Err(error)) => self.published(from, publisher, Err(publish_error(error)), now),
        }
    }

    fn published(
        &mut self,
        from: ShardIndex,
        publisher: Publisher,
        result: Result<Accepted, ErrorCode>,
        now: Now,
    ) {
        match publisher {
            Publisher::Client(origin) => {
                let result = result.map(|_| ());
                self.send_member(from, ToMember::Published { origin, result }, now);
            }
            Publisher::Call(token) => self.call_published(token, result.map(|accepted| accepted.position)),
        }
    }

    /// A publication of a channel homed here: to this shard's subscribers and to the relay.
    pub(crate) fn deliver(&mut self, index: u32, epoch: u64, publication: &Publication<'_>) {
        self.deliver_local(index, epoch, publication);
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

    /// To this shard's subscribers alone: one frame per variant, at the end of its log.
    pub(crate) fn deliver_local(&mut self, index: u32, epoch: u64, publication: &Publication<'_>) {
        let channel = self.channels.get_mut(index);
        let before = channel.top;
        let mut new_epoch = None;
        if publication.offset > 0 {
            // The first of an epoch tells it: to clients it may be new.
            let is_new = publication.offset == 1 || channel.epoch != 0 && channel.epoch != epoch;
            new_epoch = is_new.then(|| Epoch::new(epoch).text());
            channel.epoch = epoch;
            channel.top = publication.offset;
        }
        if let Some(latest) = &mut channel.latest {
            self.scratch.clear();
            publication.write_record(&mut self.scratch);
            latest.note(publication.tags.get(KEY_TAG).unwrap_or(""), &self.scratch);
        }
        for variant in 0..channel.variants.len() {
            self.append_to_variant(index, variant as u8, Some(before), |codec, name, out| {
                let mut publication = publication.clone();
                if let Some(epoch) = &new_epoch {
                    publication.epoch = Some(epoch.as_str().into());
                }
                codec.encode_push(&Push::Publication { channel: name, publication }, out);
            });
        }
    }

    /// Appends one frame to a variant's log, if anybody receives from it. `before` is the channel's top
    /// before this publication; `None`: it is a join or leave.
    fn append_to_variant(
        &mut self,
        index: u32,
        variant: u8,
        before: Option<u64>,
        encode: impl FnOnce(Codec, &str, &mut Vec<u8>),
    ) {
        let channel = self.channels.get(index);
        let (top, namespace) = (channel.top, channel.namespace);
        let receivers = &channel.variants[usize::from(variant)];
        if receivers.is_unheard() || (before.is_none() && !receivers.key.join_leave) {
            return;
        }
        let codec = receivers.key.codec;
        let (log, name) = self.channels.log_of(index, variant, before.unwrap_or(top));
        let grown = log.append(top, |out| {
            let start = ringmain_proto::ws::begin_frame(out);
            encode(codec, name, out);
            ringmain_proto::ws::finish_frame(out, start, codec.opcode());
        });
        let len = log.len();
        self.channels.note_log_bytes(grown, 0);
        self.queue_variant(index, variant);
        let bytes_max = self.channels.namespace(namespace).config.log_bytes_max as usize;
        if len > bytes_max {
            self.bound_log(index, variant, bytes_max);
        }
    }

    // --- relay ---

    /// Moves what waits for a shard from relays into its outbox, about a batch.
    pub(crate) fn relay_moved(&mut self, to: ShardIndex, now: Now) {
        while self.mesh.queued(to) < BATCH_MESSAGES_MAX {
            let Some(index) = self.mesh.next_moved(to) else { return };
            while self.flush_peer(index, to, now) {}
        }
    }

    /// Puts what a peer has not been sent of a channel into its outbox, about one message's worth.
    /// Returns whether there is more.
    fn flush_peer(&mut self, index: u32, to: ShardIndex, now: Now) -> bool {
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
        let message = if peer.gap {
            ToMember::Gap { member, epoch, top }
        } else if peer.at < relay.base() {
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
                (peer.at, peer.offset, peer.gap) = (head, top, false);
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

    // --- subscriptions ---

    fn subscribe_at_home(&mut self, from: ShardIndex, request: Box<SubscribeAtHome>, now: Now) {
        let index = match self.channels.get_or_create(&request.channel) {
            Ok(index) => index,
            Err(reason) => return self.refuse(from, request, no_channel(reason), now),
        };
        if self.channels.get(index).opened {
            return self.subscribe_opened(index, from, request, now);
        }
        let waiting = self.waiters.opening.entry(index).or_default();
        waiting.push((from, request));
        if waiting.len() > 1 {
            return;
        }
        let token = self.waiters.token();
        let Self { bus, channels, .. } = self;
        match bus.open(now, token, bus_channel(channels, index)) {
            Outcome::Done(result) => self.opened(index, result, now),
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Open(index));
            }
        }
    }

    /// The bus confirmed interest, or could not.
    fn opened(&mut self, index: u32, result: Result<Position, BusError>, now: Now) {
        if self.channels.try_get(index).is_none() {
            return;
        }
        let waiting = self.waiters.opening.remove(&index).unwrap_or_default();
        match result {
            Ok(position) => {
                let channel = self.channels.get_mut(index);
                channel.opened = true;
                channel.epoch = position.epoch.get();
                channel.top = position.offset;
                for (from, request) in waiting {
                    self.subscribe_opened(index, from, request, now);
                }
            }
            Err(error) => {
                for (from, request) in waiting {
                    self.refuse(from, request, bus_error(error), now);
                }
                self.close_if_unused(index, now);
            }
        }
    }

    fn refuse(&mut self, from: ShardIndex, request: Box<SubscribeAtHome>, error: ErrorCode, now: Now) {
        let subscribed = Subscribed { request, result: Err(error) };
        self.send_member(from, ToMember::Subscribed(Box::new(subscribed)), now);
    }

    fn subscribe_opened(&mut self, index: u32, from: ShardIndex, request: Box<SubscribeAtHome>, now: Now) {
        let Some(recover) = &request.recover else {
            return self.complete_subscribe(index, from, request, Vec::new(), false, now);
        };
        let query = if request.cache {
            HistoryQuery { since: None, limit: 1, reverse: true }
        } else {
            let since = Since { offset: recover.offset, epoch: Epoch::from_claim(&recover.epoch) };
            let limit = self.config.client.recovery_publications_max;
            HistoryQuery { since: Some(since), limit, reverse: false }
        };
        let token = self.waiters.token();
        let mut read = PageRead::default();
        let Self { bus, channels, .. } = self;
        let target = bus_channel(channels, index);
        match bus.read(now, token, target, &query, &mut |publication| read.push(publication)) {
            Outcome::Done(result) => self.recovered(index, from, request, result, read, now),
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Subscribe(index, from, request));
            }
        }
    }

    /// Judges what a recovery read.
    fn recovered(
        &mut self,
        index: u32,
        from: ShardIndex,
        request: Box<SubscribeAtHome>,
        result: Result<Page, BusError>,
        read: PageRead,
        now: Now,
    ) {
        use ringmain_bus::position::{Judgement, judge};
        let recover = request.recover.as_ref().expect("only a recovery reads");
        let claim = Since { offset: recover.offset, epoch: Epoch::from_claim(&recover.epoch) };
        let (records, recovered) = match result {
            Err(BusError::UnrecoverableEpoch { .. }) => (Vec::new(), false),
            Err(error) => return self.refuse(from, request, bus_error(error), now),
            Ok(page) if request.cache => {
                let newest = read.count > 0 && read.last == page.top.offset;
                let has_it = claim.offset == page.top.offset
                    && claim.offset > 0
                    && claim.epoch == Some(page.top.epoch);
                let kept_none = read.count == 0;
                (if newest && !has_it { read.records } else { Vec::new() }, newest || kept_none && has_it)
            }
            Ok(page) => match judge(claim, &page) {
                Judgement::Recoverable { .. } if !page.more => (read.records, true),
                _ => (Vec::new(), false),
            },
        };
        self.complete_subscribe(index, from, request, records, recovered, now);
    }

    /// Counts the subscription and answers; what the channel sends later follows in the same order.
    fn complete_subscribe(
        &mut self,
        index: u32,
        from: ShardIndex,
        request: Box<SubscribeAtHome>,
        records: Vec<u8>,
        recovered: bool,
        now: Now,
    ) {
        while from != self.shard && self.flush_peer(index, from, now) {}
        let channel = self.channels.get_mut(index);
        let (epoch, top) = (channel.epoch, channel.top);
        if from != self.shard {
            let part = channel.home_part.get_or_insert_default();
            if let Some(peer) = part.peers.iter_mut().find(|peer| peer.shard == from) {
                peer.subs += 1;
                peer.member = request.member;
            } else {
                let at = part.relay.as_ref().map_or(0, |relay| relay.head());
                part.peers.push(Peer {
                    shard: from,
                    subs: 1,
                    member: request.member,
                    at,
                    offset: top,
                    listed: false,
                    gap: false,
                });
            }
        }
        let identity = request.identity.clone();
        if let Some(identity) = identity.as_ref().filter(|_| request.presence) {
            channel.home_part.get_or_insert_default().presence.insert(identity);
        }
        let announce = request.announce;
        let result = Ok(Recovered { epoch, top, records, recovered });
        self.send_member(from, ToMember::Subscribed(Box::new(Subscribed { request, result })), now);
        if let Some(identity) = identity.filter(|_| announce) {
            self.announce(index, true, &identity, now);
        }
    }

    fn leave_at_home(&mut self, from: ShardIndex, leave: &LeaveAtHome, now: Now) {
        let Some(index) = self.channels.find(&leave.channel) else { return };
        let channel = self.channels.get_mut(index);
        if let Some(part) = &mut channel.home_part {
            if let Some(position) = part.peers.iter().position(|peer| peer.shard == from) {
                part.peers[position].subs -= 1;
                if part.peers[position].subs == 0 {
                    part.peers.swap_remove(position);
                }
            }
            if let Some(identity) = leave.identity.as_ref().filter(|_| leave.presence) {
                part.presence.remove(identity.client);
            }
            if part.peers.is_empty() && part.presence.is_empty() {
                channel.home_part = None;
            }
        }
        if let Some(identity) = leave.identity.as_ref().filter(|_| leave.announce) {
            self.announce(index, false, identity, now);
        }
        self.close_if_unused(index, now);
    }

    /// Ends the interest in a channel homed here that nobody in the node is subscribed to.
    pub(crate) fn close_if_unused(&mut self, index: u32, now: Now) {
        let channel = self.channels.get_mut(index);
        if channel.is_unused() && !self.waiters.opening.contains_key(&index) {
            if channel.opened {
                channel.opened = false;
                self.bus.close(now, ChannelId(index));
            }
            self.drop_channel_if_unused(index, now);
        }
    }

    /// Forgets a channel that neither this shard nor the bus needs.
    pub(crate) fn drop_channel_if_unused(&mut self, index: u32, now: Now) {
        let Some(channel) = self.channels.try_get(index) else { return };
        let held = channel.opened || self.waiters.opening.contains_key(&index);
        if channel.is_unused()
            && !held
            && (channel.home != self.shard || self.bus.is_idle(now, ChannelId(index)))
        {
            self.bus.forget(ChannelId(index));
            self.channels.remove(index);
        }
    }

    /// Tells everyone who asked for it that somebody joined or left.
    fn announce(&mut self, index: u32, joined: bool, identity: &Identity, now: Now) {
        self.announce_local(index, joined, identity);
        let mut position = 0;
        while let Some((shard, member)) = self.peer_at(index, position) {
            position += 1;
            if self.mesh.is_full(shard) {
                self.metrics.add(Metric::DropJoinLeave, 1);
                continue;
            }
            while self.flush_peer(index, shard, now) {}
            let message = ToMember::Presence { member, joined, identity: identity.clone() };
            self.mesh.push(shard, MeshMessage::Member(message));
        }
    }

    fn peer_at(&self, index: u32, position: usize) -> Option<(ShardIndex, ChannelRef)> {
        let part = self.channels.get(index).home_part.as_ref()?;
        part.peers.get(position).map(|peer| (peer.shard, peer.member))
    }

    /// A join or leave for this shard's subscribers.
    pub(crate) fn announce_local(&mut self, index: u32, joined: bool, identity: &Identity) {
        let client = ClientText::new(identity.client);
        let info = ClientInfo {
            user: &identity.info.user,
            client: client.as_str(),
            conn_info: identity.info.conn_info.as_deref(),
            chan_info: identity.info.chan_info.as_deref(),
        };
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

    // --- questions ---

    fn query_at_home(&mut self, from: ShardIndex, origin: Origin, channel: &str, query: &Query, now: Now) {
        let result = match query {
            Query::Presence => Ok(QueryAnswer::Presence(self.members_of(channel))),
            Query::PresenceStats => {
                let (clients, users) = self.presence_stats_of(channel);
                Ok(QueryAnswer::PresenceStats { clients, users })
            }
            Query::History { limit, since, reverse } => {
                let max = self.config.client.history_publications_max;
                let limit = u32::try_from(*limit).map_or(max, |limit| limit.min(max));
                let since = since
                    .as_ref()
                    .map(|since| Since { offset: since.offset, epoch: Epoch::from_claim(&since.epoch) });
                let query = HistoryQuery { since, limit, reverse: *reverse };
                let (token, outcome) = self.read_history(channel, &query, now);
                match outcome {
                    Some(result) => result,
                    None => {
                        self.waiters.waiting.insert(token.0, Waiter::Query(from, origin));
                        return;
                    }
                }
            }
        };
        self.send_member(from, ToMember::Answer { origin, result }, now);
    }

    /// The members of a channel homed here.
    pub(crate) fn members_of(&self, channel: &str) -> Vec<Member> {
        let Some(presence) = self.presence_of(channel) else { return Vec::new() };
        let mut members: Vec<Member> = presence
            .iter()
            .map(|(client, info)| Member {
                client: ClientText::new(client).as_str().to_owned(),
                user: info.user.to_string(),
                conn_info: info.conn_info.as_deref().map(<[u8]>::to_vec),
                chan_info: info.chan_info.as_deref().map(<[u8]>::to_vec),
            })
            .collect();
        members.sort_by(|a, b| a.client.cmp(&b.client));
        members
    }

    /// Numbers of clients and of distinct users in a channel homed here.
    pub(crate) fn presence_stats_of(&self, channel: &str) -> (u32, u32) {
        let Some(presence) = self.presence_of(channel) else { return (0, 0) };
        let mut users: Vec<&str> = presence.iter().map(|(_, info)| &*info.user).collect();
        users.sort_unstable();
        users.dedup();
        (presence.len() as u32, users.len() as u32)
    }

    fn presence_of(&self, channel: &str) -> Option<&Presence> {
        let index = self.channels.find(channel)?;
        Some(&self.channels.get(index).home_part.as_ref()?.presence)
    }

    /// Subscriptions of all shards to a channel homed here.
    pub(crate) fn subscriptions_of(&self, channel: &Channel) -> u32 {
        channel.subs + channel.home_part.as_ref().map_or(0, |part| part.subscriptions())
    }

    /// Reads history of a channel homed here; `None`: the answer comes late, under the token.
    pub(crate) fn read_history(
        &mut self,
        channel: &str,
        query: &HistoryQuery,
        now: Now,
    ) -> (Token, Option<Result<QueryAnswer, ErrorCode>>) {
        let token = self.waiters.token();
        let index = match self.channels.get_or_create(channel) {
            Ok(index) => index,
            Err(reason) => return (token, Some(Err(no_channel(reason)))),
        };
        let mut read = PageRead::default();
        let Self { bus, channels, .. } = self;
        let target = bus_channel(channels, index);
        let outcome = bus.read(now, token, target, query, &mut |publication| read.push(publication));
        (token, outcome.done().map(|result| history_answer(result, read.records)))
    }

    /// Removes the history of a channel homed here.
    pub(crate) fn clear_history(
        &mut self,
        channel: &str,
        call: u64,
        now: Now,
    ) -> Option<Result<(), ErrorCode>> {
        let index = match self.channels.get_or_create(channel) {
            Ok(index) => index,
            Err(reason) => return Some(Err(no_channel(reason))),
        };
        let token = self.waiters.token();
        let Self { bus, channels, .. } = self;
        match bus.clear(now, token, bus_channel(channels, index)) {
            Outcome::Done(result) => Some(result.map(|_| ()).map_err(bus_error)),
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Call(call));
                None
            }
        }
    }

    /// Notes that the answer to a read belongs to a call of the control plane.
    pub(crate) fn await_call(&mut self, token: Token, call: u64) {
        self.waiters.waiting.insert(token.0, Waiter::Call(call));
    }

    fn replay_at_home(
        &mut self,
        from: ShardIndex,
        origin: Origin,
        channel: &str,
        after: u64,
        epoch: u64,
        now: Now,
    ) {
        let since = Since { offset: after, epoch: Some(Epoch::new(epoch)) };
        let limit = REPLAY_PUBLICATIONS_MAX;
        let token = self.waiters.token();
        let mut read = PageRead::default();
        let outcome = match self.channels.find(channel) {
            Some(index) if epoch != 0 => {
                let Self { bus, channels, .. } = self;
                let query = HistoryQuery { since: Some(since), limit, reverse: false };
                bus.read(now, token, bus_channel(channels, index), &query, &mut |publication| {
                    read.push(publication);
                })
            }
            _ => Outcome::Done(Err(BusError::Unavailable)),
        };
        match outcome {
            Outcome::Pending => {
                self.waiters.waiting.insert(token.0, Waiter::Replay(from, origin, after));
            }
            Outcome::Done(result) => {
                let whole = result.is_ok_and(|page| page.floor <= after);
                let records = if whole { read.records } else { Vec::new() };
                self.send_member(from, ToMember::Replayed { origin, after, records, whole }, now);
            }
        }
    }

    // --- the bus ---

    /// Lets the bus do what is due, and takes what it has to say.
    pub(crate) fn poll_bus(&mut self, now: Now) {
        let mut events = Vec::new();
        self.bus.poll(now, &mut |event| events.push(OwnedEvent::from(event)));
        for event in events {
            self.bus_event(event, now);
        }
    }

    fn bus_event(&mut self, event: OwnedEvent, now: Now) {
        match event {
            OwnedEvent::Opened { token, result } => {
                if let Some(Waiter::Open(index)) = self.waiters.waiting.remove(&token) {
                    self.opened(index, result, now);
                }
            }
            OwnedEvent::Published { token, result } => {
                if let Some(Waiter::Publish(from, publisher)) = self.waiters.waiting.remove(&token) {
                    self.published(from, publisher, result.map_err(publish_error), now);
                }
            }
            OwnedEvent::Read { token, result, records } => self.late_read(token, result, records, now),
            OwnedEvent::Cleared { token, result } => {
                if let Some(Waiter::Call(call)) = self.waiters.waiting.remove(&token) {
                    self.call_done(call, result.map(|_| ()).map_err(bus_error));
                }
            }
            OwnedEvent::Arrival { channel, epoch, record } => {
                if let Some((publication, _)) = Publication::read_record(&record)
                    && self.channels.try_get(channel).is_some()
                {
                    self.metrics.add(Metric::Publications, 1);
                    self.deliver(channel, epoch, &publication);
                }
            }
            OwnedEvent::Moved { channel, position } => self.position_lost(channel, position, now),
            OwnedEvent::Idle { channel } => self.drop_channel_if_unused(channel, now),
            OwnedEvent::Nothing => {}
        }
    }

    fn late_read(&mut self, token: u64, result: Result<Page, BusError>, records: Vec<u8>, now: Now) {
        match self.waiters.waiting.remove(&token) {
            Some(Waiter::Subscribe(index, from, request)) => {
                let mut read = PageRead { records, ..PageRead::default() };
                for publication in ringmain_proto::record::records(&read.records) {
                    read.count += 1;
                    read.last = publication.offset;
                }
                self.recovered(index, from, request, result, read, now);
            }
            Some(Waiter::Query(from, origin)) => {
                let result = history_answer(result, records);
                self.send_member(from, ToMember::Answer { origin, result }, now);
            }
            Some(Waiter::Replay(from, origin, after)) => {
                let whole = result.is_ok_and(|page| page.floor <= after);
                self.send_member(from, ToMember::Replayed { origin, after, records, whole }, now);
            }
            Some(Waiter::Call(call)) => self.call_history(call, history_answer(result, records)),
            _ => {}
        }
    }

    /// The position of a channel homed here jumped: every subscriber in the node is told.
    fn position_lost(&mut self, index: u32, position: Position, now: Now) {
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
                (peer.at, peer.offset, peer.gap) = (0, top, false);
                let message = ToMember::Gap { member: peer.member, epoch, top };
                self.mesh.push(peer.shard, MeshMessage::Member(message));
            }
        }
        self.tell_gap(index, now);
    }
}

/// Publications of one replay step at the most.
const REPLAY_PUBLICATIONS_MAX: u32 = 256;

/// An event of the bus, owned: the sink may not touch the core.
enum OwnedEvent {
    Opened { token: u64, result: Result<Position, BusError> },
    Published { token: u64, result: Result<Accepted, PublishError> },
    Read { token: u64, result: Result<Page, BusError>, records: Vec<u8> },
    Cleared { token: u64, result: Result<Position, BusError> },
    Arrival { channel: u32, epoch: u64, record: Vec<u8> },
    Moved { channel: u32, position: Position },
    Idle { channel: u32 },
    Nothing,
}

impl From<Event<'_>> for OwnedEvent {
    fn from(event: Event<'_>) -> Self {
        match event {
            Event::Opened { token, result, .. } => Self::Opened { token: token.0, result },
            Event::Published { token, result } => Self::Published { token: token.0, result },
            Event::Read { token, result, publications } => {
                let mut records = Vec::new();
                publications.for_each(|publication| {
                    publication.write_record(&mut records);
                });
                Self::Read { token: token.0, result, records }
            }
            Event::Cleared { token, result } => Self::Cleared { token: token.0, result },
            Event::Arrival { channel, epoch, publication, .. } => {
                let mut record = Vec::new();
                publication.write_record(&mut record);
                Self::Arrival { channel: channel.0, epoch: epoch.get(), record }
            }
            Event::Gap { channel, resumed } => Self::Moved { channel: channel.0, position: resumed },
            Event::EpochChanged { channel, position } => Self::Moved { channel: channel.0, position },
            Event::Idle { channel } => Self::Idle { channel: channel.0 },
            Event::Health(_) => Self::Nothing,
        }
    }
}

/// A channel as the bus names it.
fn bus_channel(channels: &super::channel::Channels, index: u32) -> BusChannel<'_> {
    let channel = channels.get(index);
    BusChannel {
        id: ChannelId(index),
        name: &channel.name,
        options: &channels.namespace(channel.namespace).bus,
    }
}

fn history_answer(result: Result<Page, BusError>, records: Vec<u8>) -> Result<QueryAnswer, ErrorCode> {
    let page = result.map_err(bus_error)?;
    Ok(QueryAnswer::History { records, offset: page.top.offset, epoch: page.top.epoch.get() })
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
        BusError::Unavailable => ErrorCode::Internal,
        BusError::Overloaded => ErrorCode::TooManyRequests,
        BusError::UnrecoverableEpoch { .. } => ErrorCode::UnrecoverablePosition,
    }
}

fn publish_error(error: PublishError) -> ErrorCode {
    match error {
        PublishError::Unavailable | PublishError::Unknown => ErrorCode::Internal,
        PublishError::Overloaded => ErrorCode::TooManyRequests,
        PublishError::TooLarge { .. } | PublishError::KeyTooLong { .. } => ErrorCode::BadRequest,
    }
}
