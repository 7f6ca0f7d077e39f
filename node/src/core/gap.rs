//! Who is still to be told that publications may be missing, and how many are told in one turn.
//!
//! Owns the receivers that a gap has set aside. A channel may have 100,000 subscribers on one shard, and
//! telling one ends a subscription: so a gap takes the lists of its receivers away as they are, which
//! costs nothing per subscriber, and every turn tells the next of them. It must not know why there is
//! a gap.
//!
//! Invariants:
//! * a subscription that receives is in one list: its variant's members or laggards, or one set aside
//!   here; [`Sub::index`] is its place in that list;
//! * who is set aside is sent nothing more of the channel but that it is lost, exactly once: what is
//!   published meanwhile reaches those who subscribed after the gap.

use std::collections::VecDeque;

use ringmain_proto::close::{CloseReason, UnsubscribeReason};
use ringmain_proto::time::Now;
use smallvec::SmallVec;

use super::channel::Variant;
use super::engine::Slot;
use super::mesh::ChannelRef;
use super::metrics::Metric;
use super::output::log_id;
use super::session::{SUB_SERVER_SIDE, Sessions, Sub, SubState};
use super::shard::Core;

/// Subscriptions that one turn ends at the most to tell of gaps. Half of the sends of a turn: each is told
/// by one push, so that what is told leaves in the same turn, and as many others are served beside it.
/// One connection may be more than that: all its subscriptions end with it.
pub const GAP_TOLD_PER_TURN_MAX: usize = 256;

/// Receivers of one variant, as they were listed when the gap was met.
#[derive(Debug)]
struct Batch {
    variant: u8,
    members: SmallVec<[Slot; 2]>,
    laggards: Vec<Slot>,
}

/// A channel's subscribers that are still to be told. No batch is empty.
#[derive(Debug, Default)]
pub(crate) struct Untold {
    batches: Vec<Batch>,
}

/// The channels with somebody to be told, each once: as many as the shard knows, at the most.
#[derive(Debug, Default)]
pub(crate) struct Gaps(VecDeque<ChannelRef>);

impl Gaps {
    /// Whether nobody is to be told.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Untold {
    /// Takes a variant's receivers away, and from its log whatever they were not sent.
    fn set_aside(&mut self, number: u8, variant: &mut Variant) {
        let members = std::mem::take(&mut variant.members);
        let laggards = variant.log.as_mut().map_or_else(Vec::new, |log| {
            log.pass = None;
            log.skip_group_to(log.head());
            std::mem::take(&mut log.laggards)
        });
        if !(members.is_empty() && laggards.is_empty()) {
            self.batches.push(Batch { variant: number, members, laggards });
        }
    }

    /// The batch that a subscription is in.
    fn position(&self, slot: Slot, sub: &Sub) -> Option<usize> {
        self.batches.iter().position(|batch| {
            let list = match sub.state {
                SubState::Joining => return false,
                SubState::Member => &batch.members[..],
                SubState::Lagging | SubState::Replaying => &batch.laggards,
            };
            batch.variant == sub.variant && list.get(sub.index as usize) == Some(&slot)
        })
    }

    /// Whether a subscription is in a batch.
    pub(crate) fn holds(&self, slot: Slot, sub: &Sub) -> bool {
        self.position(slot, sub).is_some()
    }

    /// Takes a subscription out of its batch. Returns whether it was in one.
    pub(crate) fn remove(&mut self, slot: Slot, sub: &Sub, sessions: &mut Sessions) -> bool {
        let Some(position) = self.position(slot, sub) else { return false };
        let batch = &mut self.batches[position];
        let hole = sub.index as usize;
        let moved = if sub.state == SubState::Member {
            batch.members.swap_remove(hole);
            batch.members.get(hole)
        } else {
            batch.laggards.swap_remove(hole);
            batch.laggards.get(hole)
        };
        if let Some(moved) = moved {
            sessions.sub_mut(*moved, sub.channel).index = sub.index;
        }
        if batch.members.is_empty() && batch.laggards.is_empty() {
            self.batches.swap_remove(position);
        }
        true
    }

    /// One who is still to be told: from a list's end, whence nobody moves.
    fn next(&self) -> Option<Slot> {
        let batch = self.batches.last()?;
        batch.laggards.last().or(batch.members.last()).copied()
    }
}

impl Core {
    /// Publications of a channel may be missing: whoever receives it from this shard now is told, in the
    /// turns that follow.
    pub(crate) fn gap(&mut self, index: u32) {
        let Self { channels, gaps, served, snapshots, .. } = self;
        snapshots.missed(index);
        let channel = channels.get_mut(index);
        let known = channel.untold.is_some();
        let mut untold = channel.untold.take().unwrap_or_default();
        for (number, variant) in channel.variants.iter_mut().enumerate() {
            untold.set_aside(number as u8, variant);
            served.push(log_id(index, number as u8));
        }
        if known || !untold.batches.is_empty() {
            channel.untold = Some(untold);
        }
        if !known && channel.untold.is_some() {
            gaps.0.push_back(ChannelRef { index, serial: channel.serial });
        }
    }

    /// Tells the next of those who are to be told. Each turn begins with another channel.
    pub(crate) fn tell_gaps(&mut self, now: Now) {
        let mut ended = 0;
        while ended < GAP_TOLD_PER_TURN_MAX {
            let Some(member) = self.gaps.0.front().copied() else { return };
            let channel = self.channels.by_ref(member);
            match channel.and_then(|channel| channel.untold.as_ref()).and_then(|untold| untold.next()) {
                Some(slot) => ended += self.lose(slot, member.index, now),
                None => {
                    self.gaps.0.pop_front();
                    if let Some(channel) = self.channels.by_ref(member) {
                        channel.untold = None;
                    }
                    ended += 1;
                }
            }
        }
        if self.gaps.0.len() > 1 {
            self.gaps.0.rotate_left(1);
        }
    }

    /// A subscriber may have missed something: it begins anew. What the server subscribed it to it cannot
    /// subscribe to again, so there the whole connection does. Returns how many subscriptions that ended.
    pub(crate) fn lose(&mut self, slot: Slot, index: u32, now: Now) -> usize {
        self.metrics.add(Metric::DropLost, 1);
        if self.sessions.sub(slot, index).is_some_and(|sub| sub.flags & SUB_SERVER_SIDE != 0) {
            let subs = self.sessions.get(slot).subs.len();
            self.close(slot, CloseReason::InsufficientState, now);
            subs
        } else {
            self.unsubscribe_push(slot, index, UnsubscribeReason::InsufficientState, now);
            1
        }
    }
}
