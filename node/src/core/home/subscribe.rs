//! Subscriptions to a channel homed here, from any shard of the node.
//!
//! Owns the steps of a subscribe at home (interest confirmed by the bus, recovery read and judged, counted
//! and answered) and the end of interest. It must not know sessions: the subscriber's shard does.
//!
//! Invariants:
//! * nothing is read for a recovery before the bus has confirmed interest, so nothing falls between what
//!   was read and what follows live;
//! * a channel is forgotten only when neither a subscriber nor the bus needs it.

use std::collections::VecDeque;

use ringmain_bus::{BusError, ChannelId, Epoch, HistoryQuery, Outcome, Page, Position, Since};
use ringmain_proto::close::ErrorCode;
use ringmain_proto::time::Now;

use super::relay::drop_relay;
use super::waiters::Waiter;
use super::{PageRead, Peer, bus_channel, bus_error, no_channel};
use crate::core::channel::Channel;
use crate::core::engine::ShardIndex;
use crate::core::infos::member_bytes;
use crate::core::mesh::{
    ChannelRef, Identity, LeaveAtHome, MeshMessage, Recovered, SubscribeAtHome, Subscribed, ToMember,
};
use crate::core::shard::Core;

impl Core {
    pub(super) fn subscribe_at_home(&mut self, from: ShardIndex, request: Box<SubscribeAtHome>, now: Now) {
        let index = match self.channels.get_or_create(&request.channel) {
            Ok(index) => index,
            Err(reason) => return self.refuse(from, request, no_channel(reason), now),
        };
        if self.channels.get(index).opened {
            return self.subscribe_opened(index, from, request, 0, now);
        }
        if let Some(waiting) = self.waiters.opening.get_mut(&index) {
            return waiting.push_back((from, request));
        }
        let token = self.waiters.token();
        let Self { bus, channels, .. } = self;
        match bus.open(now, token, bus_channel(channels, index)) {
            Outcome::Done(Ok(position)) => {
                self.interest_confirmed(index, position);
                self.subscribe_opened(index, from, request, 0, now);
            }
            Outcome::Done(Err(error)) => self.refuse_opened(index, from, request, bus_error(error), now),
            Outcome::Pending => {
                self.waiters.opening.insert(index, VecDeque::from([(from, request)]));
                self.waiters.waiting.insert(token.0, Waiter::Open(index));
            }
        }
    }

    fn interest_confirmed(&mut self, index: u32, position: Position) {
        let channel = self.channels.get_mut(index);
        channel.opened = true;
        channel.epoch = position.epoch.get();
        channel.top = position.offset;
        self.hold(index);
    }

    /// The bus confirmed interest, or could not.
    pub(super) fn opened(&mut self, index: u32, result: Result<Position, BusError>, now: Now) {
        if self.channels.try_get(index).is_none() {
            return;
        }
        match result {
            Ok(position) => {
                self.interest_confirmed(index, position);
                // What waits keeps the channel, whoever of the first has gone meanwhile.
                let next = |core: &mut Self| core.waiters.opening.get_mut(&index)?.pop_front();
                while let Some((from, request)) = next(self) {
                    self.subscribe_opened(index, from, request, 0, now);
                }
                self.waiters.opening.remove(&index);
                self.close_if_unused(index, now);
            }
            Err(error) => {
                for (from, request) in self.waiters.opening.remove(&index).unwrap_or_default() {
                    self.refuse(from, request, bus_error(error), now);
                }
                self.close_if_unused(index, now);
            }
        }
    }

    fn refuse(&mut self, from: ShardIndex, request: Box<SubscribeAtHome>, error: ErrorCode, now: Now) {
        self.answer_subscribe(from, Subscribed { request, result: Err(error) }, now);
    }

    fn answer_subscribe(&mut self, from: ShardIndex, subscribed: Subscribed, now: Now) {
        if from == self.shard {
            let settled = self.subscribed(subscribed, now);
            self.follow_up(settled, now);
        } else {
            self.send_subscribed(from, subscribed);
        }
    }

    fn send_subscribed(&mut self, to: ShardIndex, subscribed: Subscribed) {
        self.mesh.push(to, MeshMessage::Member(ToMember::Subscribed(Box::new(subscribed))));
    }

    /// The same where interest was confirmed: it ends if nobody else has it.
    pub(super) fn refuse_opened(
        &mut self,
        index: u32,
        from: ShardIndex,
        request: Box<SubscribeAtHome>,
        error: ErrorCode,
        now: Now,
    ) {
        self.refuse(from, request, error, now);
        self.close_if_unused(index, now);
    }

    /// Interest is confirmed: recovers what was asked for, and answers. `reads`: how often that was tried before.
    pub(super) fn subscribe_opened(
        &mut self,
        index: u32,
        from: ShardIndex,
        request: Box<SubscribeAtHome>,
        reads: u8,
        now: Now,
    ) {
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
            Outcome::Pending => self.await_recovery(token.0, index, from, request, reads),
        }
    }

    /// Judges what a recovery read.
    pub(super) fn recovered(
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
            Err(error) => return self.refuse_opened(index, from, request, bus_error(error), now),
            Ok(page) if request.cache => {
                let newest = read.count > 0 && read.last == page.top.offset;
                let has_it = claim.offset == page.top.offset
                    && claim.offset > 0
                    && claim.epoch == Some(page.top.epoch);
                let kept_none = read.count == 0;
                (if newest && !has_it { read.records } else { Vec::new() }, newest || kept_none && has_it)
            }
            // Of another epoch, and answered: that epoch is one which the channel's came from, up to there.
            Ok(page) => match judge(Since { epoch: None, ..claim }, &page) {
                Judgement::Recoverable { .. } if !page.more && !self.never_fits(from, &read.records) => {
                    (read.records, true)
                }
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
        if from != self.shard && !self.mesh.fits(from, records.len()) {
            return self.refuse_opened(index, from, request, ErrorCode::TooManyRequests, now);
        }
        let identity = request.identity.clone();
        if let Some(identity) = identity.as_ref().filter(|_| request.presence)
            && let Err(full) = self.enter(index, identity)
        {
            return self.refuse_opened(index, from, request, full, now);
        }
        if from != self.shard {
            while self.flush_peer(index, from, now) {}
            self.count_peer(index, from, request.member);
        }
        let (announce, presence) = (request.announce, request.presence);
        let Channel { epoch, top, .. } = *self.channels.get(index);
        if let Some(identity) = &identity {
            self.tell_joined(index, identity, presence);
        }
        let subscribed = Subscribed { request, result: Ok(Recovered { epoch, top, records, recovered }) };
        if from != self.shard {
            self.send_subscribed(from, subscribed);
            return self.announce_joined(index, identity.filter(|_| announce), now);
        }
        // Who has gone meanwhile leaves in this call, and may take the channel along.
        let settled = self.subscribed(subscribed, now);
        if settled.stands {
            self.announce_joined(index, identity.filter(|_| announce), now);
        }
        self.follow_up(settled, now);
    }

    fn announce_joined(&mut self, index: u32, identity: Option<Identity>, now: Now) {
        if let Some(identity) = identity {
            self.announce(index, true, &identity, now);
        }
    }

    /// Whether a recovery is too large to travel to another shard, at any time.
    fn never_fits(&self, to: ShardIndex, records: &[u8]) -> bool {
        to != self.shard && self.mesh.never_fits(records.len())
    }

    /// One subscription more through another shard.
    fn count_peer(&mut self, index: u32, shard: ShardIndex, member: ChannelRef) {
        let channel = self.channels.get_mut(index);
        let offset = channel.top;
        let part = channel.home_part.get_or_insert_default();
        if let Some(peer) = part.peers.iter_mut().find(|peer| peer.shard == shard) {
            peer.subs += 1;
            peer.member = member;
        } else {
            let at = part.relay.as_ref().map_or(0, |relay| relay.head());
            part.peers.push(Peer { shard, subs: 1, member, at, offset, listed: false });
        }
    }

    pub(super) fn leave_at_home(&mut self, from: ShardIndex, leave: &LeaveAtHome, now: Now) {
        let Some(index) = self.channels.find(&leave.channel) else { return };
        let channel = self.channels.get_mut(index);
        if let Some(part) = &mut channel.home_part {
            if let Some(position) = part.peers.iter().position(|peer| peer.shard == from) {
                part.peers[position].subs -= 1;
                if part.peers[position].subs == 0 {
                    part.peers.swap_remove(position);
                }
            }
            if let Some(identity) = leave.identity.as_ref().filter(|_| leave.presence)
                && let Some(member) = part.presence.remove(identity.client())
            {
                self.infos.release(member_bytes(&member));
            }
            if part.peers.is_empty() {
                drop_relay(part, &mut self.mesh);
            }
            if part.peers.is_empty() && part.presence.is_empty() {
                channel.home_part = None;
            }
        }
        if let Some(identity) = &leave.identity {
            self.tell_left(index, identity, leave.presence);
            if leave.announce {
                self.announce(index, false, identity, now);
            }
        }
        self.close_if_unused(index, now);
    }

    /// Ends the interest in a channel homed here that nobody in the node is subscribed to. The channel may
    /// be gone already.
    pub(crate) fn close_if_unused(&mut self, index: u32, now: Now) {
        if self.channels.try_get(index).is_none() {
            return;
        }
        let channel = self.channels.get_mut(index);
        if channel.is_unused() && !self.waiters.hold(index) {
            if channel.opened {
                channel.opened = false;
                self.release(index);
                self.bus.close(now, ChannelId(index));
            }
            self.drop_channel_if_unused(index, now);
        }
    }

    /// Forgets a channel that neither this shard nor the bus needs.
    pub(crate) fn drop_channel_if_unused(&mut self, index: u32, now: Now) {
        let Some(channel) = self.channels.try_get(index) else { return };
        let held = channel.opened || self.waiters.hold(index);
        if channel.is_unused()
            && !held
            && (channel.home != self.shard || self.bus.is_idle(now, ChannelId(index)))
        {
            self.bus.forget(ChannelId(index));
            self.channels.remove(index);
        }
    }
}
