//! One hashed wheel of deadlines per shard, one entry per slot, no object per timer.
//!
//! Owns when each slot is looked at next. It knows nothing of why: whoever is woken works out which
//! of its deadlines passed and sets the next one. Deadlines are rounded up to [`TICK_MS`]; one beyond
//! the horizon is looked at early, and set again by its owner.

use super::engine::Slot;

/// Resolution in milliseconds.
pub(crate) const TICK_MS: u64 = 16;
/// Buckets of the wheel: the horizon is [`TICK_MS`] times this, about 65 s.
const BUCKETS: usize = 4096;
const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Entry {
    next: u32,
    previous: u32,
    tick: u32,
}

/// See the module's doc.
#[derive(Debug)]
pub(crate) struct Wheel {
    buckets: Box<[u32]>,
    entries: Vec<Entry>,
    /// One bit per bucket that holds something.
    occupied: [u64; BUCKETS / 64],
    /// Ticks up to and including this one are done.
    done: u64,
    armed: usize,
}

const IDLE: Entry = Entry { next: NONE, previous: NONE, tick: u32::MAX };

impl Wheel {
    pub(crate) fn new(now_ms: u64) -> Self {
        Self {
            buckets: vec![NONE; BUCKETS].into(),
            entries: Vec::new(),
            occupied: [0; BUCKETS / 64],
            done: now_ms / TICK_MS,
            armed: 0,
        }
    }

    /// Sets a slot's deadline, in place of the one it had.
    pub(crate) fn set(&mut self, slot: Slot, at_ms: u64) {
        self.cancel(slot);
        let index = slot as usize;
        if self.entries.len() <= index {
            self.entries.resize(index + 1, IDLE);
        }
        let tick = at_ms.div_ceil(TICK_MS).clamp(self.done + 1, self.done + BUCKETS as u64 - 1);
        let bucket = tick as usize % BUCKETS;
        let head = self.buckets[bucket];
        self.entries[index] = Entry { next: head, previous: NONE, tick: tick as u32 };
        if head != NONE {
            self.entries[head as usize].previous = slot;
        }
        self.buckets[bucket] = slot;
        self.occupied[bucket / 64] |= 1 << (bucket % 64);
        self.armed += 1;
    }

    /// Forgets a slot's deadline.
    pub(crate) fn cancel(&mut self, slot: Slot) {
        let Some(&Entry { next, previous, tick }) = self.entries.get(slot as usize) else { return };
        if tick == IDLE.tick {
            return;
        }
        if previous == NONE {
            let bucket = tick as usize % BUCKETS;
            self.buckets[bucket] = next;
            if next == NONE {
                self.occupied[bucket / 64] &= !(1 << (bucket % 64));
            }
        } else {
            self.entries[previous as usize].next = next;
        }
        if next != NONE {
            self.entries[next as usize].previous = previous;
        }
        self.entries[slot as usize] = IDLE;
        self.armed -= 1;
    }

    /// Takes one slot whose deadline has passed.
    pub(crate) fn pop(&mut self, now_ms: u64) -> Option<Slot> {
        let now = now_ms / TICK_MS;
        while self.done < now {
            let slot = self.buckets[(self.done + 1) as usize % BUCKETS];
            if slot != NONE {
                self.cancel(slot);
                return Some(slot);
            }
            self.done += 1;
        }
        None
    }

    /// When the next deadline passes.
    pub(crate) fn next_ms(&self) -> Option<u64> {
        if self.armed == 0 {
            return None;
        }
        let first = (self.done + 1) as usize % BUCKETS;
        let (word, bit) = (first / 64, first % 64);
        let words = self.occupied.len();
        // The first word is looked at twice: from the bit on, and at last below it.
        for step in 0..=words {
            let index = (word + step) % words;
            let mut bits = self.occupied[index];
            if step == 0 {
                bits &= u64::MAX << bit;
            } else if step == words {
                bits &= !(u64::MAX << bit);
            }
            if bits != 0 {
                let bucket = index * 64 + bits.trailing_zeros() as usize;
                let ahead = (bucket + BUCKETS - first) % BUCKETS;
                return Some((self.done + 1 + ahead as u64) * TICK_MS);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pops_in_time_and_not_before() {
        let mut wheel = Wheel::new(1_000);
        wheel.set(3, 1_500);
        wheel.set(1, 1_200);
        wheel.set(2, 1_200);
        wheel.set(2, 1_900);
        assert_eq!(wheel.pop(1_199), None);
        assert_eq!(wheel.next_ms(), Some(1_200));
        assert_eq!(wheel.pop(1_215), Some(1));
        assert_eq!(wheel.pop(1_215), None);
        wheel.cancel(3);
        assert_eq!(wheel.pop(3_000), Some(2));
        assert_eq!((wheel.pop(3_000), wheel.next_ms()), (None, None));
    }

    #[test]
    fn beyond_the_horizon_is_looked_at_early() {
        let mut wheel = Wheel::new(0);
        wheel.set(0, 10_000_000);
        let next = wheel.next_ms().expect("armed");
        assert!(next < 10_000_000 && next > 60_000);
        assert_eq!(wheel.pop(next), Some(0));
    }

    #[test]
    fn a_deadline_in_the_past_comes_with_the_next_tick() {
        let mut wheel = Wheel::new(5_000);
        wheel.set(7, 10);
        assert_eq!(wheel.pop(5_040), Some(7));
    }
}
