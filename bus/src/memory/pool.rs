//! The pool that all histories of a shard draw on.
//!
//! Owns: the sum of their bytes, its maximum, and the list of channels that hold any. Must not know: what
//! they hold, or who is worth keeping.
//! Invariant: `used_bytes` never exceeds `bytes_max`; every holder stands in the list exactly once.

use crate::types::ChannelId;

/// One channel's history in bytes at the most: its index counts in 32 bits.
const CHANNEL_BYTES_MAX: usize = u32::MAX as usize;

/// Accounting of history memory.
#[derive(Debug)]
pub(super) struct Pool {
    used_bytes: usize,
    bytes_max: usize,
    holders: Vec<ChannelId>,
    hand: usize,
}

impl Pool {
    pub(super) fn new(bytes_max: usize) -> Pool {
        Pool { used_bytes: 0, bytes_max, holders: Vec::new(), hand: 0 }
    }

    pub(super) fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    pub(super) fn holders(&self) -> usize {
        self.holders.len()
    }

    /// Whether one channel's history may ever have this many bytes.
    pub(super) fn could_hold(&self, bytes: usize) -> bool {
        bytes <= self.bytes_max && bytes <= CHANNEL_BYTES_MAX
    }

    /// Whether a history of `before` bytes may become one of `after`.
    pub(super) fn has_room(&self, before: usize, after: usize) -> bool {
        self.could_hold(after) && self.used_bytes - before + after <= self.bytes_max
    }

    /// Notes that a history of `before` bytes became one of `after`.
    pub(super) fn resize(&mut self, before: usize, after: usize) {
        self.used_bytes = self.used_bytes - before + after;
        assert!(self.used_bytes <= self.bytes_max);
    }

    /// Lists a new holder; returns its place.
    pub(super) fn add(&mut self, id: ChannelId) -> u32 {
        self.holders.push(id);
        (self.holders.len() - 1) as u32
    }

    /// Takes the holder at `place` off the list. Returns the holder that has moved to that place, if any.
    pub(super) fn remove(&mut self, place: u32) -> Option<ChannelId> {
        self.holders.swap_remove(place as usize);
        self.holders.get(place as usize).copied()
    }

    /// The next holder under the hand that goes around, or none when the list is empty.
    pub(super) fn next_holder(&mut self) -> Option<ChannelId> {
        if self.holders.is_empty() {
            return None;
        }
        self.hand = (self.hand + 1) % self.holders.len();
        Some(self.holders[self.hand])
    }
}
