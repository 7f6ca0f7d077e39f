//! Subscriptions: asked of the channel's home, confirmed, replayed, ended.
//!
//! Owns the member shard's side of a subscription from the moment it is permitted. Whether it is
//! permitted is decided before, in [`super::commands`], [`super::connect`] and [`super::calls`].
//!
//! Invariants:
//! * a cursor becomes eligible once its subscribe reply is queued, and is removed before the
//!   unsubscribe reply is queued;
//! * every success that the home answers is followed by exactly one leave.

use std::sync::Arc;

use ringmain_bus::Epoch;
use ringmain_proto::close::{CloseReason, ErrorCode, UnsubscribeReason};
use ringmain_proto::message::{ClientInfo, HistoryResult, Publication, Push, Reply, SubscribeResult};
use ringmain_proto::time::Now;

use super::channel::VariantKey;
use super::engine::{ShardIndex, Slot};
use super::infos::len;
use super::mesh::*;
use super::metrics::Metric;
use super::output::Lag;
use super::session::*;
use super::shard::Core;

/// The part of a connection's own queue that one replay may fill, as a divisor: the rest of it is asked
/// for when these bytes are out, and replies find room meanwhile.
const REPLAY_SHARE: usize = 4;

/// An answered subscription, before what came while it was on its way is done.
#[must_use]
pub(crate) struct Settled {
    /// The subscriber has it.
    pub(crate) stands: bool,
    then: Option<Then>,
}

struct Then {
    slot: Slot,
    name: Arc<str>,
    follow: Vec<Follow>,
    /// A command of the connection was answered by it.
    counts: bool,
}

/// What a permitted subscription is made of.
#[derive(Clone, Debug, Default)]
pub(crate) struct NewSub {
    /// The subscribe command; 0: part of connect, or made by the server.
    pub(crate) id: u32,
    pub(crate) server_side: bool,
    /// Named by the connection token.
    pub(crate) of_token: bool,
    /// Not counted against the channel limit.
    pub(crate) automatic: bool,
    pub(crate) positioned: bool,
    pub(crate) recoverable: bool,
    /// Joins and leaves are sent to it.
    pub(crate) join_leave: bool,
    pub(crate) presence: bool,
    pub(crate) announce: bool,
    pub(crate) recover: Option<RecoverFrom>,
    pub(crate) cache: bool,
    /// Answer 112 where the position cannot be recovered.
    pub(crate) strict: bool,
    pub(crate) chan_info: Option<Box<[u8]>>,
    /// In seconds since the epoch.
    pub(crate) expire_at: Option<u64>,
    /// JSON told with the subscription.
    pub(crate) data: Option<Box<[u8]>>,
}

impl NewSub {
    fn flags(&self) -> u8 {
        [
            (self.server_side, SUB_SERVER_SIDE),
            (self.recoverable, SUB_RECOVERABLE),
            (self.positioned || self.recoverable, SUB_POSITIONED),
            (self.presence, SUB_PRESENCE),
            (self.announce, SUB_ANNOUNCED),
            (self.of_token, SUB_OF_TOKEN),
            (self.automatic, SUB_AUTOMATIC),
        ]
        .into_iter()
        .fold(0, |flags, (set, flag)| if set { flags | flag } else { flags })
    }
}

impl Joining {
    fn of(new: &mut NewSub) -> Self {
        Self {
            id: new.id,
            recover: new.recover.is_some(),
            since_offset: new.recover.as_ref().map_or(0, |recover| recover.offset),
            strict: new.strict,
            data: new.data.take(),
            then: Vec::new(),
        }
    }
}

impl Core {
    /// Asks the home for a subscription. On an error nothing has changed.
    pub(crate) fn subscribe(
        &mut self,
        slot: Slot,
        name: &str,
        mut new: NewSub,
        now: Now,
    ) -> Result<(), ErrorCode> {
        let index = self.channels.get_or_create(name).map_err(super::home::no_channel)?;
        let key = VariantKey { codec: self.sessions.get(slot).codec, join_leave: new.join_leave };
        let channel = self.channels.get_mut(index);
        let Some(variant) = channel.variant_for(key) else {
            self.drop_channel_if_unused(index, now);
            return Err(ErrorCode::LimitExceeded);
        };
        let home = channel.home;
        if let Err(full) = self.admit_sub(home, &new) {
            self.drop_channel_if_unused(index, now);
            return Err(full);
        }
        let channel = self.channels.get_mut(index);
        channel.subs += 1;
        let (channel_name, serial) = (Arc::clone(&channel.name), channel.serial);
        let flags = new.flags();
        let session = self.sessions.get_mut(slot);
        session.pending += u32::from(new.id != 0);
        session.subs.push(Sub { channel: index, index: 0, state: SubState::Joining, variant, flags });
        let extra = session.sub_extra_mut(index);
        extra.joining = Some(Box::new(Joining::of(&mut new)));
        (extra.expire_at, extra.chan_info) = (new.expire_at, new.chan_info);
        let identity =
            (new.presence || new.announce).then(|| session.identity(index).announced(new.announce));
        let origin = Origin { slot, serial: session.serial, id: new.id };
        self.metrics.add(Metric::Subscriptions, 1);
        let request = SubscribeAtHome {
            origin,
            channel: channel_name,
            member: ChannelRef { index, serial },
            identity,
            presence: new.presence,
            announce: new.announce,
            recover: new.recover.filter(|_| new.recoverable),
            cache: new.cache,
        };
        self.send_home(home, ToHome::Subscribe(Box::new(request)), now);
        Ok(())
    }

    /// Whether there is room for a subscription: on its way to the home, and for what it shows.
    fn admit_sub(&mut self, home: ShardIndex, new: &NewSub) -> Result<(), ErrorCode> {
        if home != self.shard && !self.mesh.fits(home, 0) {
            return Err(ErrorCode::TooManyRequests);
        }
        self.infos.admit(len(new.chan_info.as_deref()))
    }

    /// A message from a channel's home.
    pub(crate) fn at_member(&mut self, message: ToMember, now: Now) {
        match message {
            ToMember::Published { origin, result } => self.publish_answered(origin, result, now),
            ToMember::Subscribed(subscribed) => {
                let settled = self.subscribed(*subscribed, now);
                self.follow_up(settled, now);
            }
            ToMember::Answer { origin, result } => self.query_answered(origin, result, now),
            ToMember::Records { member, epoch, records } => {
                if self.channels.by_ref(member).is_none() {
                    return;
                }
                for publication in ringmain_proto::record::records(&records) {
                    self.deliver_local(member.index, epoch, &publication);
                }
            }
            ToMember::Presence { member, joined, identity } => {
                if self.channels.by_ref(member).is_some() {
                    self.announce_local(member.index, joined, &identity);
                }
            }
            ToMember::Gap { member, epoch, top } => {
                if let Some(channel) = self.channels.by_ref(member) {
                    channel.epoch = epoch;
                    channel.top = top;
                    self.gap(member.index);
                }
            }
            ToMember::Replayed { origin, after, records, whole } => {
                self.replayed(origin, after, &records, whole, now);
            }
        }
    }

    /// The home answered a subscription.
    pub(crate) fn subscribed(&mut self, subscribed: Subscribed, now: Now) -> Settled {
        let Subscribed { request, result } = subscribed;
        let (origin, index) = (request.origin, request.member.index);
        let slot = origin.slot;
        let waits = self.sessions.by_serial(slot, origin.serial).is_some_and(|session| {
            session.subs.iter().any(|sub| sub.channel == index && sub.state == SubState::Joining)
        });
        if !waits {
            if result.is_ok() {
                self.leave_home(*request, now);
            }
            self.uncount(index, now);
            return Settled { stands: false, then: None };
        }
        let name = Arc::clone(&request.channel);
        let joining = self.sessions.get_mut(slot).take_joining(index).unwrap_or_default();
        let mut stands = false;
        match result {
            Err(error) => {
                self.forget_sub(slot, index);
                self.uncount(index, now);
                self.refused(slot, &joining, error, now);
            }
            Ok(recovered) if joining.strict && joining.recover && !recovered.recovered => {
                self.forget_sub(slot, index);
                self.leave_home(*request, now);
                self.uncount(index, now);
                self.refused(slot, &joining, ErrorCode::UnrecoverablePosition, now);
            }
            Ok(recovered) => {
                self.confirmed(slot, index, &joining, recovered, now);
                stands = true;
            }
        }
        Settled { stands, then: Some(Then { slot, name, follow: joining.then, counts: origin.id != 0 }) }
    }

    /// Does what came while the subscription was on its way.
    pub(crate) fn follow_up(&mut self, settled: Settled, now: Now) {
        let Some(Then { slot, name, follow, counts }) = settled.then else { return };
        self.follow(slot, &name, follow, now);
        if counts {
            self.command_answered(slot, now);
        }
    }

    /// Carries out what came while a subscription was on its way, up to the next one that is.
    fn follow(&mut self, slot: Slot, name: &str, then: Vec<Follow>, now: Now) {
        let mut then = then.into_iter();
        while let Some(next) = then.next() {
            let index = self.channels.find(name).filter(|index| self.sessions.sub(slot, *index).is_some());
            match (next, index) {
                (Follow::Unsubscribe(id), index) => {
                    if let Some(index) = index {
                        self.unsubscribe(slot, index, now);
                    }
                    self.reply(slot, id, &Reply::Unsubscribe);
                    self.command_answered(slot, now);
                }
                (Follow::Revoke, index) => self.revoke(slot, name, index, now),
                (Follow::Subscribe(new), _) => {
                    let id = new.id;
                    if let Err(error) = self.subscribe(slot, name, *new, now) {
                        self.reply_error(slot, id, error);
                    }
                    self.command_answered(slot, now);
                    if let Some(joining) = self.joining(slot, name) {
                        return joining.then.extend(then);
                    }
                }
            }
        }
    }

    /// The subscription to a channel that is on its way, if there is one.
    pub(crate) fn joining(&mut self, slot: Slot, name: &str) -> Option<&mut Joining> {
        let index = self.channels.find(name)?;
        let extra = self.sessions.get_mut(slot).extra.as_mut()?;
        extra.subs.iter_mut().find(|sub| sub.channel == index)?.joining.as_deref_mut()
    }

    /// A subscription failed after it was permitted.
    fn refused(&mut self, slot: Slot, joining: &Joining, error: ErrorCode, now: Now) {
        if joining.id != 0 {
            self.reply_error(slot, joining.id, error);
        } else if self.sessions.get(slot).stage == Stage::Connecting {
            self.connect_sub_failed(slot, error, now);
        }
    }

    /// A subscription stands: the reply, then the cursor.
    fn confirmed(&mut self, slot: Slot, index: u32, joining: &Joining, recovered: Recovered, now: Now) {
        let flags = self.sessions.sub_mut(slot, index).flags;
        let channel = self.channels.get_mut(index);
        channel.epoch = recovered.epoch;
        channel.top = recovered.top;
        let name = Arc::clone(&channel.name);
        let positioned = flags & SUB_POSITIONED != 0;
        let offset = match (positioned, recovered.recovered) {
            (false, _) => 0,
            (true, true) => joining.since_offset,
            (true, false) => recovered.top,
        };
        let sub = ConnectedSub {
            channel: name,
            recoverable: flags & SUB_RECOVERABLE != 0,
            positioned,
            epoch: recovered.epoch,
            offset,
            records: recovered.records,
            recovered: recovered.recovered,
            was_recovering: joining.recover,
            data: joining.data.clone(),
        };
        if joining.id == 0 && self.sessions.get(slot).stage == Stage::Connecting {
            self.add_receiver(slot, index);
            return self.connect_sub_done(slot, sub, now);
        }
        let epoch = Epoch::new(sub.epoch).text();
        let publications = publications_in(&sub.records, epoch.as_str());
        let result = sub.result(epoch.as_str(), &publications);
        if joining.id == 0 {
            self.told_of(slot, &sub.channel, result);
        } else {
            let expire_at = self.sessions.get(slot).sub_extra(index).and_then(|sub| sub.expire_at);
            let (expires, ttl) = ttl_of(expire_at, now);
            self.reply(slot, joining.id, &Reply::Subscribe(SubscribeResult { expires, ttl, ..result }));
        }
        self.add_receiver(slot, index);
        self.arm_timer(slot, now);
    }

    /// Tells a client of a subscription that the server made, and what it recovered.
    fn told_of(&mut self, slot: Slot, channel: &str, result: SubscribeResult<'_>) {
        let SubscribeResult { recoverable, positioned, epoch, offset, data, .. } = result;
        self.push(slot, &Push::Subscribe { channel, recoverable, positioned, epoch, offset, data });
        for publication in result.publications {
            self.push(slot, &Push::Publication { channel, publication });
        }
    }

    /// Ends a subscription; what the client is told is the caller's affair.
    pub(crate) fn unsubscribe(&mut self, slot: Slot, index: u32, now: Now) {
        let Some(&sub) = self.sessions.sub(slot, index) else { return };
        if sub.state == SubState::Joining {
            // The home's answer finds nobody, and undoes it.
            self.forget_sub(slot, index);
            return;
        }
        self.remove_receiver(slot, index);
        let session = self.sessions.get(slot);
        let announced = sub.flags & SUB_ANNOUNCED != 0;
        let identity = (sub.flags & (SUB_PRESENCE | SUB_ANNOUNCED) != 0)
            .then(|| session.identity(index).announced(announced));
        self.forget_sub(slot, index);
        let channel = self.channels.get(index);
        let home = channel.home;
        let mut leave = LeaveAtHome {
            channel: Arc::clone(&channel.name),
            member: ChannelRef { index, serial: channel.serial },
            identity,
            presence: sub.flags & SUB_PRESENCE != 0,
            announce: sub.flags & SUB_ANNOUNCED != 0,
        };
        if let Some(identity) = &mut leave.identity
            && home != self.shard
            && !self.mesh.fits(home, identity.bytes())
        {
            // The home must know who left; that the others are told is dropped.
            *identity = identity.bare();
            self.metrics.add(Metric::DropJoinLeave, u64::from(leave.announce));
            leave.announce = false;
        }
        self.send_home(home, ToHome::Leave(leave), now);
        self.uncount(index, now);
    }

    /// Ends all subscriptions of a connection.
    pub(crate) fn unsubscribe_all(&mut self, slot: Slot, now: Now) {
        while let Some(sub) = self.sessions.get(slot).subs.last() {
            let channel = sub.channel;
            self.unsubscribe(slot, channel, now);
        }
    }

    /// Ends a subscription and tells the client why.
    pub(crate) fn unsubscribe_push(&mut self, slot: Slot, index: u32, reason: UnsubscribeReason, now: Now) {
        let name = Arc::clone(&self.channels.get(index).name);
        self.unsubscribe(slot, index, now);
        let push = Push::Unsubscribe { channel: &name, code: reason.code(), reason: reason.text() };
        self.push(slot, &push);
    }

    /// The server ends a subscription. The client is told in any case.
    pub(crate) fn revoke(&mut self, slot: Slot, name: &str, index: Option<u32>, now: Now) {
        let reason = UnsubscribeReason::Server;
        match index {
            Some(index) => self.unsubscribe_push(slot, index, reason, now),
            None => self
                .push(slot, &Push::Unsubscribe { channel: name, code: reason.code(), reason: reason.text() }),
        }
    }

    fn forget_sub(&mut self, slot: Slot, index: u32) {
        let session = self.sessions.get_mut(slot);
        let before = session.subs.len();
        session.subs.retain(|sub| sub.channel != index);
        self.metrics.sub(Metric::Subscriptions, (before - session.subs.len()) as u64);
        self.infos.release(len(session.sub_extra(index).and_then(|sub| sub.chan_info.as_deref())));
        session.drop_sub_extra(index);
    }

    /// A subscription was counted at home and does not stand.
    fn leave_home(&mut self, request: SubscribeAtHome, now: Now) {
        let home = super::api::home_of(&request.channel, self.shards);
        let leave = LeaveAtHome {
            channel: request.channel,
            member: request.member,
            identity: request.identity,
            presence: request.presence,
            // Another shard's join was announced with the answer.
            announce: request.announce && home != self.shard,
        };
        self.send_home(home, ToHome::Leave(leave), now);
    }

    /// One subscription less in a channel; the last one lets it go.
    fn uncount(&mut self, index: u32, now: Now) {
        let channel = self.channels.get_mut(index);
        channel.subs -= 1;
        if channel.subs == 0 {
            self.close_if_unused(index, now);
        }
    }

    // --- replay: a cursor below the log's tail goes on from history ---

    /// Asks the home for what follows a fallen cursor.
    pub(crate) fn start_replay(&mut self, slot: Slot, index: u32, now: Now) {
        let sub = self.sessions.sub_mut(slot, index);
        sub.state = SubState::Replaying;
        let after = self.out.lag_mut(slot, index).offset;
        let channel = self.channels.get(index);
        let (home, name, epoch) = (channel.home, Arc::clone(&channel.name), channel.epoch);
        let origin = Origin { slot, serial: self.sessions.get(slot).serial, id: index };
        self.send_home(home, ToHome::Replay { origin, channel: name, after, epoch }, now);
    }

    /// What follows a fallen cursor, or that it cannot be had.
    fn replayed(&mut self, origin: Origin, after: u64, records: &[u8], whole: bool, now: Now) {
        let (slot, index) = (origin.slot, origin.id);
        if self.sessions.by_serial(slot, origin.serial).is_none() {
            return;
        }
        match self.sessions.sub(slot, index) {
            Some(sub)
                if sub.state == SubState::Replaying
                    && !self.channels.get(index).is_set_aside(slot, sub)
                    && self.out.lag_mut(slot, index).offset == after => {}
            _ => return,
        }
        if !whole {
            self.lose(slot, index, now);
            return;
        }
        let variant = self.sessions.sub_mut(slot, index).variant;
        let channel = self.channels.get(index);
        let (name, codec) = (Arc::clone(&channel.name), channel.variants[usize::from(variant)].key.codec);
        // What this shard has not delivered yet comes through its log.
        let top = channel.top;
        let enough = self.config.client.own_queue_bytes_max as usize / REPLAY_SHARE;
        let mut offset = after;
        for publication in publications_of(records).into_iter().take_while(|p| p.offset <= top) {
            if offset > after && self.out.own_len(slot) >= enough {
                break;
            }
            offset = publication.offset;
            self.out.append_own(slot, |out| {
                let start = ringmain_proto::ws::begin_frame(out);
                codec.encode_push(&Push::Publication { channel: &name, publication: &publication }, out);
                ringmain_proto::ws::finish_frame(out, start, codec.opcode());
            });
        }
        let channel = self.channels.get(index);
        let log = channel.variants[usize::from(variant)].log.as_ref().expect("a laggard keeps its log");
        // Not back in the log yet: a position below its tail asks again once these bytes are out.
        let resumed = log.boundary_after(offset).or((offset > after).then(|| log.base().saturating_sub(1)));
        let Some(pos) = resumed else {
            self.lose(slot, index, now);
            return;
        };
        let before = std::mem::replace(self.out.lag_mut(slot, index), Lag { channel: index, pos, offset });
        if log.has_join_between(before.pos, pos) {
            self.metrics.add(Metric::DropJoinLeave, 1);
        }
        self.sessions.sub_mut(slot, index).state = SubState::Lagging;
        self.out.make_ready(slot);
        self.check_own_queue(slot, now);
    }

    /// Closes a connection whose own queue is longer than it may be.
    pub(crate) fn check_own_queue(&mut self, slot: Slot, now: Now) {
        if self.out.own_len(slot) > self.config.client.own_queue_bytes_max as usize {
            self.close(slot, CloseReason::Slow, now);
        }
    }

    // --- answers of the home to commands ---

    pub(crate) fn publish_answered(&mut self, origin: Origin, result: Result<(), ErrorCode>, now: Now) {
        if self.sessions.by_serial(origin.slot, origin.serial).is_some() {
            match result {
                Ok(()) => self.reply(origin.slot, origin.id, &Reply::Publish),
                Err(error) => self.reply_error(origin.slot, origin.id, error),
            }
            self.command_answered(origin.slot, now);
        }
    }

    fn query_answered(&mut self, origin: Origin, result: Result<QueryAnswer, ErrorCode>, now: Now) {
        if self.sessions.by_serial(origin.slot, origin.serial).is_none() {
            return;
        }
        self.answer_query(origin, result);
        self.command_answered(origin.slot, now);
    }

    fn answer_query(&mut self, origin: Origin, result: Result<QueryAnswer, ErrorCode>) {
        let (slot, id) = (origin.slot, origin.id);
        match result {
            Err(error) => self.reply_error(slot, id, error),
            Ok(QueryAnswer::PresenceStats { clients, users }) => {
                self.reply(slot, id, &Reply::PresenceStats { num_clients: clients, num_users: users });
            }
            Ok(QueryAnswer::Presence(members)) => {
                let members: Vec<ClientInfo<'_>> = members
                    .iter()
                    .map(|member| ClientInfo {
                        user: &member.user,
                        client: member.client,
                        conn_info: member.conn_info.as_deref(),
                        chan_info: member.chan_info.as_deref(),
                    })
                    .collect();
                self.reply(slot, id, &Reply::Presence(&members));
            }
            Ok(QueryAnswer::History { records, offset, epoch }) => {
                let epoch = Epoch::new(epoch).text();
                let publications = publications_in(&records, epoch.as_str());
                let result =
                    HistoryResult { publications: &publications, epoch: epoch.as_str().into(), offset };
                self.reply(slot, id, &Reply::History(result));
            }
        }
    }

    /// Notes that a command which waited is answered.
    pub(crate) fn command_answered(&mut self, slot: Slot, now: Now) {
        let session = self.sessions.get_mut(slot);
        session.pending -= 1;
        if session.is(INPUT_ENDED) && session.pending == 0 {
            self.finish_input(slot, now);
        }
        self.check_own_queue(slot, now);
    }
}

/// Whether something expires, and in how many seconds.
pub(crate) fn ttl_of(expire_at: Option<u64>, now: Now) -> (bool, u32) {
    match expire_at {
        Some(at) => (true, u32::try_from(at.saturating_sub(now.unix_s())).unwrap_or(u32::MAX)),
        None => (false, 0),
    }
}

/// A moment in seconds since the epoch, but no later than a year from now: what a connection's or a
/// refreshed subscription's expiry is bounded to.
pub(crate) fn bounded_expiry(expire_at: Option<u64>, now: Now) -> Option<u64> {
    const YEAR_S: u64 = 365 * 24 * 3_600;
    expire_at.map(|at| at.min(now.unix_s() + YEAR_S))
}

impl ConnectedSub {
    /// As it is told.
    pub(crate) fn result<'a>(
        &'a self,
        epoch: &'a str,
        publications: &'a [Publication<'a>],
    ) -> SubscribeResult<'a> {
        SubscribeResult {
            recoverable: self.recoverable,
            positioned: self.positioned,
            epoch: if self.positioned { epoch.into() } else { "".into() },
            offset: self.offset,
            publications,
            recovered: self.recovered,
            was_recovering: self.was_recovering,
            data: self.data.as_deref().unwrap_or_default(),
            ..SubscribeResult::default()
        }
    }
}

/// The publications of a run of records.
pub(crate) fn publications_of(records: &[u8]) -> Vec<Publication<'_>> {
    ringmain_proto::record::records(records).collect()
}

/// The same for a reply: the first publication of an epoch tells it, as it does when it is delivered.
pub(crate) fn publications_in<'a>(records: &'a [u8], epoch: &'a str) -> Vec<Publication<'a>> {
    let mut publications = publications_of(records);
    for publication in publications.iter_mut().filter(|publication| publication.offset == 1) {
        publication.epoch = Some(epoch.into());
    }
    publications
}
