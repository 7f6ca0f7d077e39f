//! Who is sent what: passes over caught-up subscribers, cursors of those behind, own queues.
//!
//! Owns the way of a publication from a channel's log to its subscribers' sends, the membership of
//! variants, and what becomes of a cursor when the kernel takes only a part. Service is in chunks:
//! a turn's budget is shared between replies (first, so that they leave first), fan-out (channels in turn,
//! so that a small one waits for a chunk of a large one at the most), and connections that are behind.
//!
//! Invariants:
//! * a subscription in a variant is either a *member* (at the log's group cursor) or a *laggard*
//!   (cursor of its own at a frame's end, or waiting for a replay), never both; one that a gap has set
//!   aside ([`super::gap`]) is neither, whatever it was before;
//! * a frame that was begun is finished before anything else is sent: its rest is the head of the
//!   own queue, and the own queue goes first.

use ringmain_proto::time::Now;

use super::channel::{Appended, Channels};
use super::config::{Priority, SlowConsumer};
use super::engine::{Effect, Send, Slot, Source, TurnBudget};
use super::log::{Log, Pass};
use super::metrics::Metric;
use super::output::{
    ARENA, BLOCKED, DEAD, HOLD, Lag, MERGE_BYTES_MAX, Merge, Output, QUEUED, SEND_BYTES_MAX, SENT, WAITING,
    log_id, split_log_id,
};
use super::session::{Sessions, SubState};
use super::shard::Core;

/// The part of the turn's background after which fan-out leaves the rest to those behind, where there are
/// any.
const FANOUT_SHARE: (usize, usize) = (3, 4);

impl Core {
    /// Queues a variant whose log has news, and keeps that log in its bounds.
    pub(crate) fn appended(&mut self, channel: u32, variant: u8, appended: Appended) {
        if appended.is_news {
            let queue = match appended.priority {
                Priority::High => &mut self.dirty_high,
                Priority::Normal => &mut self.dirty,
            };
            queue.push_back(log_id(channel, variant));
        }
        if let Some(bytes_max) = appended.over {
            self.bound_log(channel, variant, bytes_max);
        }
    }

    /// Builds the turn's sends; see [`super::engine::Engine::prepare`].
    pub(crate) fn prepare_turn(&mut self, now: Now, budget: TurnBudget) -> bool {
        let part = |whole: usize| whole * FANOUT_SHARE.0 / FANOUT_SHARE.1;
        let behind = !self.out.ready.is_empty();
        let alone = !behind && self.dirty.is_empty() && self.dirty_high.is_empty();
        let mut bytes = 0;
        let mut replies = budget;
        if !alone {
            replies.sends_max -= budget.background_max.min(budget.sends_max / 2);
        }
        self.serve_arena(replies, &mut bytes);
        let offered = self.out.sends.len();
        let background = budget.background_max.min(budget.sends_max - offered);
        let late = TurnBudget { sends_max: offered + background, ..budget };
        let mut fanout = late;
        if behind {
            fanout.sends_max = offered + part(background);
            fanout.bytes_max = part(budget.bytes_max);
        }
        self.serve_dirty(true, fanout, &mut bytes);
        self.serve_dirty(false, fanout, &mut bytes);
        self.serve_ready(now, late, &mut bytes);
        self.serve_arena(budget, &mut bytes);
        !(self.out.ready.is_empty() && self.dirty.is_empty() && self.dirty_high.is_empty())
    }

    /// Whether there is something to send now: the next turn must not wait.
    pub(crate) fn has_output(&self) -> bool {
        let nothing = self.out.ready.is_empty()
            && self.out.in_arena.is_empty()
            && self.dirty.is_empty()
            && self.dirty_high.is_empty();
        !nothing
    }

    /// Serves each queued channel once, until the budget is spent. One that is not done goes behind the
    /// others.
    fn serve_dirty(&mut self, high: bool, budget: TurnBudget, bytes: &mut usize) {
        let rounds = if high { self.dirty_high.len() } else { self.dirty.len() };
        for _ in 0..rounds {
            if self.is_spent(budget, *bytes) {
                return;
            }
            let queue = if high { &mut self.dirty_high } else { &mut self.dirty };
            let Some(id) = queue.pop_front() else { return };
            let end = self.serve_pass(id, budget, bytes);
            let queue = if high { &mut self.dirty_high } else { &mut self.dirty };
            match end {
                PassEnd::More => queue.push_back(id),
                PassEnd::Done => self.served.push(id),
            }
        }
    }

    /// Whether a turn that has offered so many bytes may offer no more.
    fn is_spent(&self, budget: TurnBudget, bytes: usize) -> bool {
        self.out.sends.len() >= budget.sends_max || bytes >= budget.bytes_max
    }

    /// Goes on with a variant's pass, or begins one.
    fn serve_pass(&mut self, id: u32, budget: TurnBudget, bytes: &mut usize) -> PassEnd {
        let (index, variant_index) = split_log_id(id);
        let Core { channels, sessions, out, metrics, .. } = self;
        if channels.try_get(index).is_none() {
            return PassEnd::Done;
        }
        let channel = channels.get_mut(index);
        let Some(variant) = channel.variants.get_mut(usize::from(variant_index)) else {
            return PassEnd::Done;
        };
        let Some(log) = &mut variant.log else { return PassEnd::Done };
        let mut pass = log.pass.unwrap_or_else(|| Pass {
            to: log.bounded_end(log.group, SEND_BYTES_MAX as u64),
            unserved: variant.members.len() as u32,
        });
        let (from, to) = (log.group, pass.to);
        let len = (to - from) as usize;
        let source = Source::Log(id, from);
        let begun = pass.unserved;
        while pass.unserved > 0 && len > 0 {
            if out.sends.len() >= budget.sends_max || *bytes >= budget.bytes_max {
                log.pass = Some(pass);
                metrics.add(Metric::Deliveries, u64::from(begun - pass.unserved));
                return PassEnd::More;
            }
            let position = pass.unserved as usize - 1;
            let slot = variant.members[position];
            let hot = out.hot(slot);
            pass.unserved -= 1;
            if hot == 0 {
                out.push_send(slot, len as u32, source);
                *bytes += len;
            } else if hot & !SENT == ARENA && len <= MERGE_BYTES_MAX {
                *bytes += if hot & SENT != 0 { len } else { 0 };
                out.merge(Merge { slot, log: id, from, to }, log.slice(from, to));
            } else {
                let offset = log.offset_at(from);
                variant.members.swap_remove(position);
                if let Some(moved) = variant.members.get(position) {
                    sessions.sub_mut(*moved, index).index = position as u32;
                }
                lag(log, sessions, out, slot, Lag { channel: index, pos: from, offset });
            }
        }
        metrics.add(Metric::Deliveries, u64::from(begun - pass.unserved));
        log.group = to;
        log.pass = None;
        if log.group < log.head() {
            return PassEnd::More;
        }
        log.queued = false;
        PassEnd::Done
    }

    /// Sends what lies in the arena: replies and pings of this turn, with what was merged behind.
    fn serve_arena(&mut self, budget: TurnBudget, bytes: &mut usize) {
        for position in 0..self.out.in_arena.len() {
            if self.is_spent(budget, *bytes) {
                return;
            }
            let slot = self.out.in_arena[position];
            let hot = self.out.hot(slot);
            if hot & (SENT | BLOCKED | DEAD) == 0
                && self.out.own_len(slot) == 0
                && self.out.pending_len(slot) > 0
            {
                self.out.push_arena_send(slot);
                *bytes += self.out.send_of(slot).len as usize;
            }
        }
    }

    /// Serves connections that are behind: own queue first, then their logs in order.
    fn serve_ready(&mut self, now: Now, budget: TurnBudget, bytes: &mut usize) {
        for _ in 0..self.out.ready.len() {
            if self.is_spent(budget, *bytes) {
                return;
            }
            let Some(slot) = self.out.ready.pop_front() else { return };
            self.out.unmark(slot, QUEUED);
            let hot = self.out.hot(slot);
            if hot & (DEAD | BLOCKED | HOLD) != 0 {
                continue;
            }
            if hot & (SENT | ARENA) != 0 {
                if hot & WAITING != 0 {
                    self.out.make_ready(slot);
                }
                continue;
            }
            *bytes += self.serve_waiting(slot, now);
        }
    }

    /// One send for a connection that is behind. Returns its bytes.
    fn serve_waiting(&mut self, slot: Slot, now: Now) -> usize {
        loop {
            if self.out.own_len(slot) > 0 {
                self.out.push_own_send(slot);
                return self.out.send_of(slot).len as usize;
            }
            let front = self.out.waiting(slot).and_then(|waiting| waiting.lags.front().copied());
            let Some(Lag { channel: index, pos, .. }) = front else { return 0 };
            let sub = *self.sessions.sub_mut(slot, index);
            if self.channels.get(index).is_set_aside(slot, &sub) {
                self.out.remove_lag(slot, index);
                continue;
            }
            if sub.state == SubState::Replaying {
                // The home answers; the rest of the connection's channels go on.
                return self.serve_other_lag(slot, index);
            }
            let channel = self.channels.get_mut(index);
            let log =
                channel.variants[usize::from(sub.variant)].log.as_ref().expect("a laggard keeps its log");
            if pos < log.base() {
                self.fallen_behind(slot, index, now);
                if self.out.hot(slot) & DEAD != 0 {
                    return 0;
                }
                continue;
            }
            if pos == log.head() {
                self.rejoin(slot, index);
                if self.sessions.sub_mut(slot, index).state == SubState::Lagging {
                    // The group is on its way to the same place: look again next turn.
                    self.out.rotate_lag(slot);
                    self.out.make_ready(slot);
                    return 0;
                }
                continue;
            }
            let to = log.bounded_end(pos, SEND_BYTES_MAX as u64);
            let len = (to - pos) as u32;
            self.out.push_send(slot, len, Source::Log(log_id(index, sub.variant), pos));
            self.lag_sends.push(LagSend { slot, channel: index, to });
            self.metrics.add(Metric::Deliveries, 1);
            return len as usize;
        }
    }

    /// The first channel waits for a replay: tries the next one, if any is not waiting.
    fn serve_other_lag(&mut self, slot: Slot, replaying: u32) -> usize {
        let other = self.out.waiting(slot).and_then(|waiting| {
            waiting.lags.iter().map(|lag| lag.channel).find(|other| {
                let sub = self.sessions.sub(slot, *other);
                *other != replaying && sub.is_some_and(|sub| sub.state == SubState::Lagging)
            })
        });
        if other.is_some() {
            self.out.rotate_lag(slot);
            self.out.make_ready(slot);
        }
        0
    }

    /// A cursor below the log's tail: the namespace's policy decides.
    fn fallen_behind(&mut self, slot: Slot, index: u32, now: Now) {
        let channel = self.channels.get(index);
        match self.channels.namespace(channel.namespace).config.slow_consumer {
            SlowConsumer::Close => self.close(slot, ringmain_proto::close::CloseReason::Slow, now),
            SlowConsumer::Latest => self.skip_to_latest(slot, index),
            SlowConsumer::Replay => self.start_replay(slot, index, now),
        }
    }

    /// Puts the newest publication per key into the own queue and the cursor at the log's head.
    fn skip_to_latest(&mut self, slot: Slot, index: u32) {
        use ringmain_proto::message::{Publication, Push};
        let sub = *self.sessions.sub_mut(slot, index);
        let Lag { pos: at, offset: seen, .. } = *self.out.lag_mut(slot, index);
        let channel = self.channels.get(index);
        let variant = &channel.variants[usize::from(sub.variant)];
        let codec = variant.key.codec;
        let name = std::sync::Arc::clone(&channel.name);
        let records = channel.latest.as_ref().map(|latest| latest.records()).unwrap_or_default();
        let mut frames = Vec::new();
        for record in records {
            let Some((publication, _)) = Publication::read_record(record) else { continue };
            if publication.offset == 0 || publication.offset > seen {
                let start = ringmain_proto::ws::begin_frame(&mut frames);
                codec.encode_push(
                    &Push::Publication { channel: &name, publication: &publication },
                    &mut frames,
                );
                ringmain_proto::ws::finish_frame(&mut frames, start, codec.opcode());
            }
        }
        self.metrics.add(Metric::DropSkipped, 1);
        let log = variant.log.as_ref().expect("a laggard keeps its log");
        let (head, top) = (log.head(), channel.top);
        if log.has_join_between(at, head) {
            self.metrics.add(Metric::DropJoinLeave, 1);
        }
        self.out.append_own(slot, |out| out.extend_from_slice(&frames));
        *self.out.lag_mut(slot, index) = Lag { channel: index, pos: head, offset: top };
    }

    /// Makes a laggard that has everything a member again, where that is possible now.
    pub(crate) fn rejoin(&mut self, slot: Slot, index: u32) {
        let sub = *self.sessions.sub_mut(slot, index);
        let Core { channels, sessions, out, .. } = self;
        let variant = &mut channels.get_mut(index).variants[usize::from(sub.variant)];
        let log = variant.log.as_mut().expect("a laggard keeps its log");
        if !group_is_at(log, out.lag_mut(slot, index).pos) {
            return;
        }
        remove_laggard(log, sessions, index, sub.index);
        let position = variant.members.len() as u32;
        variant.members.push(slot);
        let sub = sessions.sub_mut(slot, index);
        sub.state = SubState::Member;
        sub.index = position;
        out.remove_lag(slot, index);
        self.served.push(log_id(index, sub.variant));
    }

    /// Adds a subscription whose position is the channel's top.
    pub(crate) fn add_receiver(&mut self, slot: Slot, index: u32) {
        let variant_index = self.sessions.sub_mut(slot, index).variant;
        let Core { channels, sessions, out, .. } = self;
        let channel = channels.get_mut(index);
        let offset = channel.top;
        let variant = &mut channel.variants[usize::from(variant_index)];
        match &mut variant.log {
            Some(log) if !group_is_at(log, log.head()) => {
                let pos = log.head();
                lag(log, sessions, out, slot, Lag { channel: index, pos, offset });
            }
            _ => {
                let sub = sessions.sub_mut(slot, index);
                sub.state = SubState::Member;
                sub.index = variant.members.len() as u32;
                variant.members.push(slot);
            }
        }
    }

    /// Takes a subscription out of its variant: nothing more of the channel is sent to it. What was
    /// begun is finished, for its rest lies in the own queue.
    pub(crate) fn remove_receiver(&mut self, slot: Slot, index: u32) {
        let sub = *self.sessions.sub_mut(slot, index);
        if sub.state == SubState::Joining {
            return;
        }
        let Core { channels, sessions, out, .. } = self;
        let channel = channels.get_mut(index);
        if channel.untold.as_mut().is_some_and(|untold| untold.remove(slot, &sub, sessions)) {
            return out.remove_lag(slot, index);
        }
        let variant = &mut channel.variants[usize::from(sub.variant)];
        if sub.state == SubState::Member {
            remove_member(&mut variant.members, variant.log.as_deref_mut(), sessions, index, sub.index);
        } else {
            let log = variant.log.as_mut().expect("a laggard keeps its log");
            remove_laggard(log, sessions, index, sub.index);
            out.remove_lag(slot, index);
        }
        if variant.members.is_empty()
            && let Some(log) = &mut variant.log
        {
            log.pass = None;
            log.skip_group_to(log.head());
        }
        self.served.push(log_id(index, sub.variant));
    }

    /// The kernel did not take a send whole.
    pub(crate) fn short_send(&mut self, slot: Slot, accepted: u32, now: Now) {
        if self.out.hot(slot) & DEAD != 0 {
            return;
        }
        let send = self.out.send_of(slot);
        self.out.failed.push(slot);
        match send.source {
            Source::Own => self.out.consume_own(slot, accepted as usize),
            Source::Arena(_) => self.short_arena(slot, &send, accepted as usize),
            Source::Log(id, from) => {
                let (index, _) = split_log_id(id);
                let lagging = self.lag_sends.iter().position(|lag| lag.slot == slot);
                if let Some(position) = lagging {
                    self.lag_sends.swap_remove(position);
                }
                self.set_back(slot, index, from, from + u64::from(accepted));
            }
        }
        if self.out.hot(slot) & BLOCKED == 0 {
            self.out.block(slot, now.mono_ms);
            self.effects.push(Effect::AwaitWritable(slot));
            // From now on it may stall.
            self.arm_timer(slot, now);
        }
    }

    /// Cuts a send from the arena: its own part goes to the own queue, each merged slice back to its log.
    fn short_arena(&mut self, slot: Slot, send: &Send, accepted: usize) {
        let merges: Vec<Merge> = self.out.merges.iter().copied().filter(|merge| merge.slot == slot).collect();
        let merged: usize = merges.iter().map(|merge| (merge.to - merge.from) as usize).sum();
        let own = send.len as usize - merged;
        self.out.keep_arena(slot, accepted.min(own), own);
        let mut start = own;
        for merge in merges {
            let end = start + (merge.to - merge.from) as usize;
            if accepted < end {
                let taken = accepted.saturating_sub(start) as u64;
                self.set_back(slot, split_log_id(merge.log).0, merge.from, merge.from + taken);
            }
            start = end;
        }
    }

    /// Gives a subscription a cursor at the end of the frame that `at` is in; the rest of that frame goes
    /// to the own queue.
    fn set_back(&mut self, slot: Slot, index: u32, from: u64, at: u64) {
        let Core { channels, sessions, out, .. } = self;
        let sub = *sessions.sub_mut(slot, index);
        let variant = &mut channels.get_mut(index).variants[usize::from(sub.variant)];
        let log = variant.log.as_mut().expect("what was sent lies in the log");
        let boundary = if at == from { at } else { log.cut_at(at).boundary };
        if boundary > at {
            out.append_own(slot, |own| own.extend_from_slice(log.slice(at, boundary)));
        }
        let cursor = Lag { channel: index, pos: boundary, offset: log.offset_at(boundary) };
        if sub.state == SubState::Member {
            remove_member(&mut variant.members, Some(log), sessions, index, sub.index);
            lag(log, sessions, out, slot, cursor);
        } else {
            *out.lag_mut(slot, index) = cursor;
        }
    }

    /// Ends the turn: see [`super::engine::Engine::settle`].
    pub(crate) fn settle_turn(&mut self, _now: Now) {
        for position in 0..self.out.sends.len() {
            let send = self.out.sends[position];
            if send.source == Source::Own && !self.out.failed.contains(&send.slot) {
                self.out.consume_own(send.slot, send.len as usize);
            }
        }
        let mut lag_sends = std::mem::take(&mut self.lag_sends);
        for LagSend { slot, channel, to } in lag_sends.drain(..) {
            self.advance(slot, channel, to);
        }
        self.lag_sends = lag_sends;
        self.out.end_turn(&mut self.metrics);
        let mut served = std::mem::take(&mut self.served);
        for id in served.drain(..) {
            let (index, variant) = split_log_id(id);
            self.channels.release_log_if_done(index, variant);
        }
        self.served = served;
        self.finish_flushed();
    }

    /// A cursor's send was taken whole.
    fn advance(&mut self, slot: Slot, index: u32, to: u64) {
        if self.out.hot(slot) & DEAD != 0 {
            return;
        }
        let variant = self.sessions.sub_mut(slot, index).variant;
        let log = self.channels.get(index).variants[usize::from(variant)].log.as_ref();
        let log = log.expect("a laggard keeps its log");
        let at_head = to == log.head();
        *self.out.lag_mut(slot, index) = Lag { channel: index, pos: to, offset: log.offset_at(to) };
        if at_head {
            self.rejoin(slot, index);
        } else {
            self.out.rotate_lag(slot);
        }
    }

    /// Keeps a log within its bytes: cuts it, and where the group itself is behind, gives each of its
    /// members a cursor of its own first.
    pub(crate) fn bound_log(&mut self, index: u32, variant_index: u8, bytes_max: usize) {
        let Core { channels, sessions, out, metrics, .. } = self;
        let channel = channels.get_mut(index);
        let variant = &mut channel.variants[usize::from(variant_index)];
        let Some(log) = &mut variant.log else { return };
        if log.len() <= bytes_max {
            return;
        }
        let mut dropped = log.cut();
        if log.len() > bytes_max {
            spread_group(variant, sessions, out, index);
            let log = variant.log.as_mut().expect("it was there");
            while log.len() > bytes_max {
                let more = log.cut();
                if more == 0 {
                    break;
                }
                dropped += more;
            }
        }
        channels.note_log_bytes_dropped(dropped);
        metrics.set(Metric::LogBytes, channels.log_bytes() as u64);
    }
}

/// Gives every member that is still behind a cursor of its own, so that the log can be cut.
fn spread_group(
    variant: &mut super::channel::Variant,
    sessions: &mut Sessions,
    out: &mut Output,
    index: u32,
) {
    let log = variant.log.as_mut().expect("a log that is too long exists");
    let (group, head) = (log.group, log.head());
    let pass = log.pass.take();
    let offset = log.offset_at(group);
    let served_to = pass.map(|pass| (pass.to, log.offset_at(pass.to)));
    let unserved = pass.map_or(variant.members.len(), |pass| pass.unserved as usize);
    for (position, slot) in std::mem::take(&mut variant.members).into_iter().enumerate() {
        let (pos, offset) = match served_to {
            Some(served) if position >= unserved => served,
            _ => (group, offset),
        };
        lag(log, sessions, out, slot, Lag { channel: index, pos, offset });
    }
    log.skip_group_to(head);
}

/// A laggard's send of the turn.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LagSend {
    slot: Slot,
    channel: u32,
    to: u64,
}

/// How far a pass came.
enum PassEnd {
    /// The budget is spent, or there is newer news for another pass.
    More,
    /// The group is at the head.
    Done,
}

/// Whether somebody at `at` stands where the members stand, or will when the pass ends.
pub(crate) fn group_is_at(log: &Log, at: u64) -> bool {
    log.pass.map_or(log.group, |pass| pass.to) == at
}

/// Removes a member. In an open pass, those not served stay below `unserved`.
fn remove_member(
    members: &mut smallvec::SmallVec<[Slot; 2]>,
    log: Option<&mut Log>,
    sessions: &mut Sessions,
    channel: u32,
    index: u32,
) {
    let mut hole = index as usize;
    if let Some(pass) = log.and_then(|log| log.pass.as_mut())
        && index < pass.unserved
    {
        pass.unserved -= 1;
        let last_unserved = pass.unserved as usize;
        members.swap(hole, last_unserved);
        if hole != last_unserved {
            sessions.sub_mut(members[hole], channel).index = hole as u32;
        }
        hole = last_unserved;
    }
    members.swap_remove(hole);
    if let Some(moved) = members.get(hole) {
        sessions.sub_mut(*moved, channel).index = hole as u32;
    }
}

/// Makes a subscriber a laggard, with this cursor.
pub(crate) fn lag(log: &mut Log, sessions: &mut Sessions, out: &mut Output, slot: Slot, cursor: Lag) {
    let sub = sessions.sub_mut(slot, cursor.channel);
    sub.state = SubState::Lagging;
    sub.index = log.laggards.len() as u32;
    log.laggards.push(slot);
    out.push_lag(slot, cursor);
}

fn remove_laggard(log: &mut Log, sessions: &mut Sessions, channel: u32, index: u32) {
    let hole = index as usize;
    log.laggards.swap_remove(hole);
    if let Some(moved) = log.laggards.get(hole) {
        sessions.sub_mut(*moved, channel).index = hole as u32;
    }
}

impl Channels {
    /// The bytes of a send from a log.
    #[inline]
    pub(crate) fn log_bytes_of(&self, id: u32, from: u64, len: u32) -> &[u8] {
        let (index, variant) = split_log_id(id);
        let log = self.get(index).variants[usize::from(variant)].log.as_ref();
        log.expect("what is sent lies in the log").slice(from, from + u64::from(len))
    }
}
