//! Keeping publications: the way into a history, what gives way when the pool is full, and expiry.
//!
//! Owns: the embedded bus's memory policy. Must not know: epochs, idempotency, answers.
//! Invariant: whatever happens here, a history is the newest `count` publications of its channel without a
//! hole, and the pool's sum is exact.

use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use crate::memory::EmbeddedBus;
use crate::memory::history::History;
use crate::memory::slots::{self, Slot, tick_of};
use crate::types::{Channel, ChannelId, Event};

/// Holders looked at to find the one to evict. As with Redis's sampled LRU, a handful comes close to the
/// true order at a bounded price; each look is about one cache miss.
pub const EVICTION_SAMPLES: usize = 8;

/// Histories evicted for one publication at the most.
pub const EVICTIONS_PER_PUBLISH_MAX: usize = 16;

/// The sweep passes every channel within this time while [`SWEEP_SLOTS_PER_POLL_MAX`] allows, in
/// milliseconds. Expiry is exact on access without it; it only returns the memory of silent channels.
pub const SWEEP_PERIOD_MS: u64 = 30_000;

/// Channels swept in one poll at the most: about 50 us when every one is a cache miss.
pub const SWEEP_SLOTS_PER_POLL_MAX: usize = 512;

/// Longest pause between two sweeps, in milliseconds: few channels need few wake-ups.
const SWEEP_PAUSE_MS_MAX: u64 = 1_000;

/// Where the sweep is, and when it goes on.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    pub(super) next_slot: usize,
    pub(super) next_ms: u64,
}

/// A publication on its way into a history.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewRecord<'a> {
    pub(super) publication: &'a Publication<'a>,
    pub(super) offset: u64,
    /// Length of the record.
    pub(super) bytes: usize,
}

impl NewRecord<'_> {
    fn write(&self, place: &mut [u8]) {
        self.publication.write_record_at(self.offset, place);
    }
}

impl EmbeddedBus {
    /// Puts the record of the newest publication into its channel's history. The slot's top already names
    /// it, so until this returns the history is one short.
    pub(super) fn keep(&mut self, tick: u32, channel: Channel<'_>, record: &NewRecord<'_>) {
        let size = channel.options.history_size;
        let length = record.bytes;
        let ttl_ticks = slots::ticks(channel.options.history_ttl_ms);
        let Some(slot) = self.slots.get_mut(channel.id) else { return };
        let (before, after) = match &mut slot.history {
            Some(history) => {
                history.ttl_ticks = ttl_ticks;
                let expired = history.expired(tick);
                self.counters.expired += u64::from(expired);
                history.drop_front(expired.max(history.count().saturating_sub(size - 1)));
                if history.fits(length) {
                    // The steady state: nothing grows, so the pool has nothing to say.
                    record.write(history.append(length, tick, size));
                    return;
                }
                (history.footprint(), history.footprint_after(length, size))
            }
            None => (0, History::footprint_of_first(length)),
        };
        if !self.pool.has_room(before, after) && !self.make_room(channel.id, before, after) {
            self.keep_within_own(tick, channel, record);
            return;
        }
        self.append(tick, channel, ttl_ticks, record);
    }

    fn append(&mut self, tick: u32, channel: Channel<'_>, ttl_ticks: u32, record: &NewRecord<'_>) {
        let pool = &mut self.pool;
        let Some(slot) = self.slots.get_mut(channel.id) else { return };
        let mut before = 0;
        let history = match &mut slot.history {
            Some(history) => {
                before = history.footprint();
                history
            }
            vacant => {
                let holder = pool.add(channel.id);
                vacant.insert(Box::new(History::new(ttl_ticks, holder)))
            }
        };
        record.write(history.append(record.bytes, tick, channel.options.history_size));
        pool.resize(before, history.footprint());
    }

    /// Evicts other channels' histories until one of `before` bytes may become one of `after`. Returns
    /// whether it may now.
    fn make_room(&mut self, publisher: ChannelId, before: usize, after: usize) -> bool {
        if !self.pool.could_hold(after) {
            return false;
        }
        for _ in 0..EVICTIONS_PER_PUBLISH_MAX {
            let Some(victim) = self.unused_longest(publisher) else { break };
            self.counters.histories_evicted += 1;
            self.counters.publications_evicted += u64::from(self.drop_history(victim));
            if self.pool.has_room(before, after) {
                return true;
            }
        }
        false
    }

    /// The holder, among a few, whose channel was used longest ago.
    fn unused_longest(&mut self, publisher: ChannelId) -> Option<ChannelId> {
        let mut oldest: Option<(u32, ChannelId)> = None;
        let now = self.slots.get(publisher).map_or(0, Slot::last_use);
        for _ in 0..EVICTION_SAMPLES.min(self.pool.holders()) {
            let candidate = self.pool.next_holder()?;
            let Some(slot) = self.slots.get(candidate).filter(|_| candidate != publisher) else { continue };
            let age = now.wrapping_sub(slot.last_use());
            if oldest.is_none_or(|(most, _)| age > most) {
                oldest = Some((age, candidate));
            }
        }
        oldest.map(|(_, candidate)| candidate)
    }

    /// Keeps the newest record in the memory that its channel holds already, or not at all.
    fn keep_within_own(&mut self, tick: u32, channel: Channel<'_>, record: &NewRecord<'_>) {
        let length = record.bytes;
        let Some(slot) = self.slots.get_mut(channel.id) else { return };
        if let Some(history) = &mut slot.history {
            while history.count() > 0 && !history.fits(length) {
                history.drop_front(1);
                self.counters.publications_cut += 1;
            }
            if history.fits(length) {
                record.write(history.append(length, tick, channel.options.history_size));
                return;
            }
        }
        self.drop_history(channel.id);
        if self.pool.has_room(0, History::footprint_of_first(length)) {
            self.append(tick, channel, slots::ticks(channel.options.history_ttl_ms), record);
        } else {
            self.counters.publications_unkept += 1;
        }
    }

    /// Gives the memory of a history back; returns how many publications it held.
    pub(super) fn drop_history(&mut self, channel: ChannelId) -> u32 {
        let Some(history) = self.slots.get_mut(channel).and_then(|slot| slot.history.take()) else {
            return 0;
        };
        self.pool.resize(history.footprint(), 0);
        let place = history.holder;
        let moved = self.pool.remove(place).and_then(|moved| self.slots.get_mut(moved));
        if let Some(moved) = moved.and_then(|slot| slot.history.as_mut()) {
            moved.holder = place;
        }
        history.count()
    }

    /// Drops what has expired of a channel's history.
    pub(super) fn expire(&mut self, channel: ChannelId, tick: u32) {
        let Some(history) = self.slots.get_mut(channel).and_then(|slot| slot.history.as_mut()) else {
            return;
        };
        let expired = history.expired(tick);
        self.counters.expired += u64::from(expired);
        if expired == history.count() {
            self.drop_history(channel);
        } else {
            history.drop_front(expired);
        }
    }

    /// Returns the memory of silent channels and names those that can be forgotten, a bounded number of
    /// channels at a time.
    pub(super) fn sweep(&mut self, now: Now, sink: &mut dyn FnMut(Event<'_>)) {
        if now.mono_ms < self.sweep.next_ms || self.slots.len() == 0 {
            return;
        }
        let tick = tick_of(now.mono_ms);
        for _ in 0..SWEEP_SLOTS_PER_POLL_MAX.min(self.slots.len()) {
            let channel = ChannelId(self.sweep.next_slot as u32);
            self.sweep.next_slot = (self.sweep.next_slot + 1) % self.slots.len();
            self.sweep_slot(channel, tick, sink);
        }
        self.sweep.next_ms = now.mono_ms + self.sweep_pause_ms();
    }

    fn sweep_slot(&mut self, channel: ChannelId, tick: u32, sink: &mut dyn FnMut(Event<'_>)) {
        self.expire(channel, tick);
        let Some(slot) = self.slots.get_mut(channel) else { return };
        if let Some(history) = &mut slot.history {
            let before = history.footprint();
            if history.shrink() {
                self.pool.resize(before, history.footprint());
            }
        } else if !slot.is_vacant() && slot.has_expired(tick) {
            sink(Event::Idle { channel });
        }
    }

    fn sweep_pause_ms(&self) -> u64 {
        let share = SWEEP_PERIOD_MS * SWEEP_SLOTS_PER_POLL_MAX as u64 / self.slots.len().max(1) as u64;
        share.clamp(1, SWEEP_PAUSE_MS_MAX)
    }
}
