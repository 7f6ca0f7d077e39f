//! The embedded bus of one shard: channels, positions and histories in this shard's memory.
//!
//! Owns: what the contract asks of a bus, for one node without a broker. Every command is answered
//! inline. Must not know: names beyond the idempotency window, other shards, clocks, randomness.
//!
//! Invariants:
//! - Offsets are dense and start at 1; the history is always the newest `count` of them.
//! - History memory never exceeds [`MemoryOptions::history_bytes_max`]. When a publication finds the pool
//!   full, the channel that was used longest ago among a few under a hand that goes around loses its whole
//!   history (its position stays, so its subscribers are told that they cannot recover). When that does not
//!   make enough room within a bounded number of steps, the publishing channel's own oldest go; if even
//!   that is not enough, the publication is delivered and not kept.
//! - Work per call is bounded: nothing ever walks all channels, all publications or all keys.

mod history;
mod keep;
mod keys;
mod pool;
mod slots;

use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use crate::contract::Bus;
use crate::epoch::{Epoch, Position};
use crate::nonce::Nonces;
use crate::types::{
    Accepted, BusError, Channel, ChannelId, Event, Health, HistoryQuery, IDEMPOTENCY_KEY_BYTES_MAX, Outcome,
    Page, PublicationId, PublishError, Token,
};
pub use keep::{EVICTION_SAMPLES, EVICTIONS_PER_PUBLISH_MAX, SWEEP_PERIOD_MS, SWEEP_SLOTS_PER_POLL_MAX};
use keep::{NewRecord, Sweep};
use keys::Keys;
use pool::Pool;
use slots::{Slot, Slots, tick_of};

/// What an embedded bus is made with.
#[derive(Clone, Copy, Debug)]
pub struct MemoryOptions {
    /// Seed of the epochs: 64 random bits, drawn anew at every start and for every shard.
    pub epoch_seed: u64,
    /// Maximum of history memory in this shard, in bytes; at most 4 GiB are used by one channel.
    pub history_bytes_max: usize,
    /// Largest record of one publication, in bytes; above it publishes are refused as too large.
    pub record_bytes_max: usize,
    /// Idempotency keys remembered at the most.
    pub idempotency_keys_max: usize,
    /// How long an idempotency key is remembered, in milliseconds.
    pub idempotency_window_ms: u64,
}

impl MemoryOptions {
    /// 64 MiB of history, records of up to 128 KiB, 65,536 keys for five minutes.
    pub const fn new(epoch_seed: u64) -> MemoryOptions {
        MemoryOptions {
            epoch_seed,
            history_bytes_max: 64 << 20,
            record_bytes_max: 128 << 10,
            idempotency_keys_max: 65_536,
            idempotency_window_ms: 300_000,
        }
    }
}

/// What the bus has counted since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCounters {
    /// Publications accepted, repeats not counted.
    pub published: u64,
    /// Publishes under a key that was seen before.
    pub repeated: u64,
    /// Publishes refused: record too large, or key too long.
    pub refused: u64,
    /// Publications that reached their time to live.
    pub expired: u64,
    /// Histories dropped because the pool was full.
    pub histories_evicted: u64,
    /// Publications in those.
    pub publications_evicted: u64,
    /// Publications of the publishing channel dropped because the pool was full and eviction not enough.
    pub publications_cut: u64,
    /// Publications accepted and not kept because the pool was full.
    pub publications_unkept: u64,
    /// Idempotency keys dropped before their time because the window was full.
    pub keys_evicted: u64,
}

/// What the bus holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Bytes of histories, structs and indices included.
    pub history_bytes: usize,
    /// Channels with a history.
    pub histories: usize,
    /// Entries of the channel table, vacant ones included.
    pub slots: usize,
    /// Idempotency keys remembered.
    pub keys: usize,
}

/// Records as they lie in a channel's history, for relaying without encoding them again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordRun<'a> {
    /// The channel's top.
    pub top: Position,
    /// The history reaches back to this offset. Above the offset asked for, publications are missing.
    pub floor: u64,
    /// Offset of the last record in the run; the offset asked for, or the floor if that is higher, when
    /// there is none.
    pub last: u64,
    /// Whole records, oldest first; `second` follows `first`.
    pub first: &'a [u8],
    /// The rest, when the ring has come around.
    pub second: &'a [u8],
}

/// The embedded bus. One per shard; the caller's channel ids index its table.
#[derive(Debug)]
pub struct EmbeddedBus {
    slots: Slots,
    pool: Pool,
    keys: Keys,
    epochs: Nonces,
    counters: MemoryCounters,
    record_bytes_max: usize,
    sweep: Sweep,
}

impl EmbeddedBus {
    /// An empty bus.
    pub fn new(options: &MemoryOptions) -> EmbeddedBus {
        EmbeddedBus {
            slots: Slots::default(),
            pool: Pool::new(options.history_bytes_max),
            keys: Keys::new(options.idempotency_keys_max, options.idempotency_window_ms),
            epochs: Nonces::new(options.epoch_seed),
            counters: MemoryCounters::default(),
            record_bytes_max: options.record_bytes_max,
            sweep: Sweep::default(),
        }
    }

    /// What was counted.
    pub fn counters(&self) -> MemoryCounters {
        self.counters
    }

    /// What is held.
    pub fn usage(&self) -> MemoryUsage {
        MemoryUsage {
            history_bytes: self.pool.used_bytes(),
            histories: self.pool.holders(),
            slots: self.slots.len(),
            keys: self.keys.len(),
        }
    }

    /// The channel's position, if it has one here. Does not create it.
    pub fn position(&self, channel: ChannelId) -> Option<Position> {
        self.slots.get(channel).filter(|slot| !slot.epoch.is_none()).map(Slot::position)
    }

    /// The kept records above offset `after`, up to `bytes_max` bytes of them, yet at least one where
    /// there is one. `None`: the channel has no position here.
    pub fn records(
        &mut self,
        now: Now,
        channel: ChannelId,
        after: u64,
        bytes_max: usize,
    ) -> Option<RecordRun<'_>> {
        self.expire(channel, tick_of(now.mono_ms));
        let slot = self.slots.get(channel).filter(|slot| !slot.epoch.is_none())?;
        let (top, floor) = (slot.position(), slot.floor());
        let from = after.max(floor);
        let (first, second, count) = match &slot.history {
            Some(history) if from < top.offset => history.run((from - floor) as u32, bytes_max),
            _ => (&[][..], &[][..], 0),
        };
        Some(RecordRun { top, floor, last: from + u64::from(count), first, second })
    }

    /// The slot of a positioned channel, with an epoch.
    fn touch(&mut self, tick: u32, channel: Channel<'_>) -> &mut Slot {
        let slot = self.slots.ensure(channel.id);
        if slot.epoch.is_none() {
            slot.epoch = Epoch::new(self.epochs.draw());
        }
        slot.touch(tick, channel.options);
        slot
    }

    /// What a key was answered before, if the stream that it was answered in still lives.
    fn find_repeat(&mut self, now: Now, channel: Channel<'_>, key: &str) -> Option<Accepted> {
        let accepted = self.keys.find(now.mono_ms, channel.name, key)?;
        let epoch = match channel.options.is_positioned() {
            true => self.slots.get(channel.id).map_or(Epoch::NONE, |slot| slot.epoch),
            false => Epoch::NONE,
        };
        (accepted.position.epoch == epoch).then_some(Accepted { repeated: true, ..accepted })
    }

    fn accept(
        &mut self,
        now: Now,
        channel: Channel<'_>,
        publication: &Publication<'_>,
        bytes: usize,
    ) -> Accepted {
        if !channel.options.is_positioned() {
            return Accepted { position: Position::NONE, repeated: false };
        }
        let tick = tick_of(now.mono_ms);
        let slot = self.touch(tick, channel);
        slot.top += 1;
        let position = slot.position();
        self.keep(tick, channel, &NewRecord { publication, offset: position.offset, bytes });
        Accepted { position, repeated: false }
    }
}

impl Bus for EmbeddedBus {
    fn open(&mut self, now: Now, _: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        if !channel.options.is_positioned() {
            self.slots.ensure(channel.id).set_open(true);
            return Outcome::Done(Ok(Position::NONE));
        }
        let slot = self.touch(tick_of(now.mono_ms), channel);
        slot.set_open(true);
        Outcome::Done(Ok(slot.position()))
    }

    fn close(&mut self, now: Now, channel: ChannelId) {
        if let Some(slot) = self.slots.get_mut(channel).filter(|slot| slot.is_open()) {
            slot.touch_closed(tick_of(now.mono_ms));
        }
    }

    fn publish(
        &mut self,
        now: Now,
        _: Token,
        channel: Channel<'_>,
        id: PublicationId<'_>,
        publication: &Publication<'_>,
    ) -> Outcome<Result<Accepted, PublishError>> {
        let bytes = publication.record_len();
        if bytes > self.record_bytes_max {
            self.counters.refused += 1;
            return Outcome::Done(Err(PublishError::TooLarge { bytes, bytes_max: self.record_bytes_max }));
        }
        // An inline answer is never lost, so nobody has reason to repeat a node's own id.
        let PublicationId::Key(key) = id else {
            self.counters.published += 1;
            return Outcome::Done(Ok(self.accept(now, channel, publication, bytes)));
        };
        if key.len() > IDEMPOTENCY_KEY_BYTES_MAX {
            self.counters.refused += 1;
            return Outcome::Done(Err(PublishError::KeyTooLong { bytes: key.len() }));
        }
        if let Some(repeat) = self.find_repeat(now, channel, key) {
            self.counters.repeated += 1;
            return Outcome::Done(Ok(repeat));
        }
        self.counters.published += 1;
        let accepted = self.accept(now, channel, publication, bytes);
        self.counters.keys_evicted += u64::from(self.keys.remember(now.mono_ms, channel.name, key, accepted));
        Outcome::Done(Ok(accepted))
    }

    fn read(
        &mut self,
        now: Now,
        _: Token,
        channel: Channel<'_>,
        query: &HistoryQuery,
        out: &mut dyn FnMut(&Publication<'_>),
    ) -> Outcome<Result<Page, BusError>> {
        if !channel.options.is_positioned() {
            return Outcome::Done(Ok(Page { top: Position::NONE, floor: 0, more: false }));
        }
        let tick = tick_of(now.mono_ms);
        self.touch(tick, channel);
        self.expire(channel.id, tick);
        let slot = self.slots.ensure(channel.id);
        let (top, floor) = (slot.position(), slot.floor());
        if query.since.and_then(|since| since.epoch).is_some_and(|epoch| epoch != top.epoch) {
            return Outcome::Done(Err(BusError::UnrecoverableEpoch { current: top }));
        }
        let (begin, end) = range(query, floor, top.offset);
        let wanted = (end - begin).min(u64::from(query.limit));
        for n in 0..wanted {
            let kept = if query.reverse { end - 1 - n } else { begin + n };
            let history = slot.history.as_ref().expect("a range that is not empty lies in the history");
            let record = history.record((kept - floor) as u32);
            let (publication, _) =
                Publication::read_record(record).expect("the ring holds what write_record wrote");
            out(&publication);
        }
        Outcome::Done(Ok(Page { top, floor, more: wanted < end - begin }))
    }

    fn clear(&mut self, now: Now, _: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        if !channel.options.is_positioned() {
            return Outcome::Done(Ok(Position::NONE));
        }
        let position = self.touch(tick_of(now.mono_ms), channel).position();
        self.drop_history(channel.id);
        Outcome::Done(Ok(position))
    }

    fn is_idle(&self, now: Now, channel: ChannelId) -> bool {
        let tick = tick_of(now.mono_ms);
        self.slots.get(channel).is_none_or(|slot| slot.has_expired(tick))
    }

    fn forget(&mut self, channel: ChannelId) {
        self.drop_history(channel);
        if let Some(slot) = self.slots.get_mut(channel) {
            *slot = Slot::default();
        }
    }

    fn poll(&mut self, now: Now, sink: &mut dyn FnMut(Event<'_>)) {
        self.keys.expire(now.mono_ms);
        self.sweep(now, sink);
    }

    fn next_deadline(&self) -> Option<u64> {
        (self.slots.len() > 0).then_some(self.sweep.next_ms)
    }

    fn history_bytes(&self) -> usize {
        self.pool.used_bytes()
    }

    fn health(&self) -> Health {
        Health::Up
    }
}

/// Which kept publications a query asks for, each named by the offset before it: from `begin` up to, not
/// including, `end`.
fn range(query: &HistoryQuery, floor: u64, top: u64) -> (u64, u64) {
    let since = query.since.map(|since| since.offset);
    match (since, query.reverse) {
        (None, _) => (floor, top),
        (Some(since), false) => (since.clamp(floor, top), top),
        (Some(since), true) => (floor, since.saturating_sub(1).clamp(floor, top)),
    }
}
