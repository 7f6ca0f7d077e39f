//! What the wire knows of every slot of the table: its holder's generation and where it is in its life.
//!
//! Owns 12 bytes per slot that was ever used, and the rule which completions still count. It submits
//! nothing.
//!
//! ```text
//! Free ─accept→ Open ─finish→ Discarding ─FIN, time or bytes→ Cancelling ─all seen→ Closing ─→ Free
//!   │             └────abort──────────────────────────────────────↑            ↑
//!   └─accept→ Transit ─sent to another shard, or refused───────────────────────┘
//! ```

use super::tag::{GENERATION_MASK, Tag};
use crate::core::engine::Slot;

/// Where a slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nobody's.
    Free,
    /// Accepted, but not kept: on its way to another shard or out of the door.
    Transit,
    /// The engine's connection.
    Open,
    /// shutdown(WR) is under way or done; what arrives is discarded.
    Discarding,
    /// What is in flight is being cancelled.
    Cancelling,
    /// The close is submitted.
    Closing,
}

/// What a slot has in flight in the kernel, as bits.
pub(super) mod flight {
    /// The multishot receive.
    pub(in crate::io) const RECV: u8 = 1;
    /// The POLLOUT.
    pub(in crate::io) const WRITABLE: u8 = 2;
    /// The shutdown.
    pub(in crate::io) const SHUTDOWN: u8 = 4;
    /// The cancel by descriptor, where that by name found nothing.
    pub(in crate::io) const CANCEL: u8 = 8;
}

/// One slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct SlotState {
    generation: u32,
    /// Bytes discarded since the shutdown.
    pub(super) discarded_bytes: u32,
    pub(super) phase: Phase,
    /// Bits of [`flight`].
    pub(super) in_flight: u8,
    /// The peer's FIN was seen.
    pub(super) ended: bool,
    /// The engine was told of it, and hears when it is free again.
    pub(super) kept: bool,
}

const _: () = assert!(size_of::<SlotState>() <= 12, "a million slots are 12 MB");

const FREE: SlotState = SlotState {
    generation: 0,
    discarded_bytes: 0,
    phase: Phase::Free,
    in_flight: 0,
    ended: false,
    kept: false,
};

/// The slots of one shard. Grows with the highest slot ever used: the kernel gives out low ones first.
#[derive(Debug, Default)]
pub(super) struct Slots {
    states: Vec<SlotState>,
    taken: u32,
}

impl Slots {
    /// Slots that are not free.
    pub(super) fn taken(&self) -> u32 {
        self.taken
    }

    /// The state of a slot that was used before.
    pub(super) fn get(&self, slot: Slot) -> SlotState {
        self.states.get(slot as usize).copied().unwrap_or(FREE)
    }

    /// The state of a slot that is not free.
    pub(super) fn state(&mut self, slot: Slot) -> &mut SlotState {
        &mut self.states[slot as usize]
    }

    /// The generation that completions of the slot's present holder carry.
    pub(super) fn generation(&self, slot: Slot) -> u32 {
        self.get(slot).generation
    }

    /// Whether a completion belongs to the slot's present holder.
    pub(super) fn is_current(&self, tag: Tag) -> bool {
        let state = self.get(tag.slot);
        state.phase != Phase::Free && state.generation == tag.generation
    }

    /// A socket arrived in a free slot.
    pub(super) fn take(&mut self, slot: Slot, phase: Phase) {
        if self.states.len() <= slot as usize {
            self.states.resize(slot as usize + 1, FREE);
        }
        let state = &mut self.states[slot as usize];
        assert!(state.phase == Phase::Free, "slot {slot} was given away twice");
        *state = SlotState { generation: state.generation, phase, kept: phase == Phase::Open, ..FREE };
        self.taken += 1;
    }

    /// The slot's socket is closed; whatever still completes for it is stale.
    pub(super) fn free(&mut self, slot: Slot) {
        let state = &mut self.states[slot as usize];
        assert!(state.phase == Phase::Closing, "slot {slot} freed in phase {:?}", state.phase);
        *state = SlotState { generation: (state.generation + 1) & GENERATION_MASK, ..FREE };
        self.taken -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tag::Op;
    use super::*;

    #[test]
    fn completions_of_an_earlier_holder_do_not_count() {
        let mut slots = Slots::default();
        slots.take(3, Phase::Open);
        assert_eq!(slots.taken(), 1);
        let first = Tag::new(Op::Recv, 3, slots.generation(3));
        assert!(slots.is_current(first));
        assert!(!slots.is_current(Tag::new(Op::Recv, 2, 0)), "never taken");
        slots.state(3).phase = Phase::Closing;
        slots.free(3);
        assert!(!slots.is_current(first), "freed");
        slots.take(3, Phase::Open);
        assert!(!slots.is_current(first), "taken by another");
        assert!(slots.is_current(Tag::new(Op::Recv, 3, slots.generation(3))));
    }

    #[test]
    fn generations_wrap_within_their_bits() {
        let mut slots = Slots::default();
        slots.take(0, Phase::Open);
        slots.state(0).generation = GENERATION_MASK;
        slots.state(0).phase = Phase::Closing;
        slots.free(0);
        assert_eq!(slots.generation(0), 0);
    }

    #[test]
    #[should_panic(expected = "slot 0 was given away twice")]
    fn a_slot_has_one_holder() {
        let mut slots = Slots::default();
        slots.take(0, Phase::Open);
        slots.take(0, Phase::Open);
    }
}
