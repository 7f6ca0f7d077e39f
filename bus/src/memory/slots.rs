//! The table of channels: 32 bytes for each, indexed by the caller's id.
//!
//! Owns: slots and their time of last use. Must not know: names, records.
//! Invariant: a slot never moves, and growing the table copies no slots: it grows by chunks.

use crate::epoch::{Epoch, Position};
use crate::memory::history::History;
use crate::types::{ChannelId, ChannelOptions};

/// Time inside the embedded bus: `mono_ms` / 64, in 32 bits, compared by wrapping difference. Ages up to
/// eight years are told apart.
pub(super) const TICK_MS: u64 = 64;

/// Ages above this many ticks (four years) are configured as this.
const TICKS_MAX: u64 = (1 << 31) - 1;

/// Slots of a chunk: 32 KiB.
const CHUNK_SLOTS: usize = 1024;

/// Top bit of `meta`: the channel is open.
const OPEN: u32 = 1 << 31;

/// One channel.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// None while the slot is vacant, or its channel ephemeral.
    pub(super) epoch: Epoch,
    /// Offset of the newest publication.
    pub(super) top: u64,
    /// Null while nothing is kept.
    pub(super) history: Option<Box<History>>,
    last_use: u32,
    /// Ticks that the position outlives its last use, and the open bit.
    meta: u32,
}

// What an idle channel costs inline.
const _: () = assert!(size_of::<Slot>() == 32);

impl Slot {
    pub(super) fn position(&self) -> Position {
        Position::new(self.epoch, self.top)
    }

    /// The history reaches back to this offset.
    pub(super) fn floor(&self) -> u64 {
        self.top - self.history.as_ref().map_or(0, |history| u64::from(history.count()))
    }

    pub(super) fn last_use(&self) -> u32 {
        self.last_use
    }

    pub(super) fn is_open(&self) -> bool {
        self.meta & OPEN != 0
    }

    pub(super) fn set_open(&mut self, open: bool) {
        self.meta = if open { self.meta | OPEN } else { self.meta & !OPEN };
    }

    /// Nothing was ever said about this id, or it was forgotten.
    pub(super) fn is_vacant(&self) -> bool {
        self.epoch.is_none() && !self.is_open()
    }

    /// Notes a use of the position under `options`.
    pub(super) fn touch(&mut self, tick: u32, options: &ChannelOptions) {
        let meta = ticks(options.meta_ttl_ms.max(options.history_ttl_ms));
        self.meta = self.meta & OPEN | meta;
        self.last_use = tick;
    }

    /// Notes the end of the interest.
    pub(super) fn touch_closed(&mut self, tick: u32) {
        self.set_open(false);
        self.last_use = tick;
    }

    /// Whether the position has outlived its use: closed, without history, past its time.
    pub(super) fn has_expired(&self, tick: u32) -> bool {
        !self.is_open()
            && self.history.is_none()
            && (self.epoch.is_none() || tick.wrapping_sub(self.last_use) > self.meta)
    }
}

/// The tick of a time.
pub(super) const fn tick_of(mono_ms: u64) -> u32 {
    (mono_ms / TICK_MS) as u32
}

/// An age in ticks, rounded up: something older than this many ticks is certainly older than `ms`.
pub(super) fn ticks(ms: u64) -> u32 {
    ms.div_ceil(TICK_MS).min(TICKS_MAX) as u32
}

/// All slots of a shard.
#[derive(Debug, Default)]
pub(super) struct Slots {
    chunks: Vec<Box<[Slot]>>,
}

impl Slots {
    /// Slots that exist, vacant ones included; the ids are below this.
    pub(super) fn len(&self) -> usize {
        self.chunks.len() * CHUNK_SLOTS
    }

    pub(super) fn get(&self, id: ChannelId) -> Option<&Slot> {
        self.chunks.get(id.index() / CHUNK_SLOTS).map(|chunk| &chunk[id.index() % CHUNK_SLOTS])
    }

    pub(super) fn get_mut(&mut self, id: ChannelId) -> Option<&mut Slot> {
        self.chunks.get_mut(id.index() / CHUNK_SLOTS).map(|chunk| &mut chunk[id.index() % CHUNK_SLOTS])
    }

    /// The slot of an id, grown into existence. Ids are the caller's and dense: the table is as large as
    /// the highest of them.
    pub(super) fn ensure(&mut self, id: ChannelId) -> &mut Slot {
        let chunk = id.index() / CHUNK_SLOTS;
        while self.chunks.len() <= chunk {
            self.chunks.push((0..CHUNK_SLOTS).map(|_| Slot::default()).collect());
        }
        &mut self.chunks[chunk][id.index() % CHUNK_SLOTS]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_certain() {
        for ms in [0, 1, 63, 64, 65, 1000, 60_000] {
            // Written at any moment of tick 0: not before `ms` have passed is it older than ticks(ms).
            for written in [0, 1, 63] {
                let gone = (ms..).find(|age| tick_of(written + age) > ticks(ms)).unwrap_or(u64::MAX);
                assert!(gone <= ms + 2 * TICK_MS, "{ms} {gone}");
                assert!((0..ms).all(|age| tick_of(written + age) <= ticks(ms)), "{ms}");
            }
        }
        assert_eq!(u64::from(ticks(u64::MAX)), TICKS_MAX);
    }

    #[test]
    fn the_table_grows_by_chunks_and_keeps_its_slots() {
        let mut slots = Slots::default();
        assert!(slots.get(ChannelId(0)).is_none());
        slots.ensure(ChannelId(5)).top = 7;
        let before = std::ptr::from_ref(slots.get(ChannelId(5)).unwrap());
        slots.ensure(ChannelId(CHUNK_SLOTS as u32 * 3)).top = 8;
        assert_eq!(slots.len(), CHUNK_SLOTS * 4);
        assert_eq!(before, std::ptr::from_ref(slots.get(ChannelId(5)).unwrap()));
        assert_eq!(slots.get(ChannelId(5)).unwrap().top, 7);
        assert!(slots.get(ChannelId(CHUNK_SLOTS as u32 * 4)).is_none());
    }
}
