//! The history of one channel: records back to back in a byte ring, with a small index.
//!
//! Owns: where each record lies, trimming, growth, expiry. Must not know: offsets, epochs, the pool's
//! maximum, what a record contains.
//!
//! Invariants:
//! - A record is never split: one that does not fit before the end of the ring starts at 0, and `wrap`
//!   remembers where the upper part ends. So everything lies in at most two contiguous runs.
//! - Trimming looks at the index alone, never at records.
//! - The first index entry lies in the struct, so a history of one publication is one buffer.
//! - Ticks of the entries never decrease.

/// Where a record starts in the ring, and when it was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Entry {
    start: u32,
    tick: u32,
}

const ENTRY_BYTES: usize = size_of::<Entry>();

/// Index slots of the first allocation.
const INDEX_SLOTS_MIN: usize = 4;

/// Rings below this many bytes are not worth shrinking.
const SHRINK_BYTES_MIN: usize = 2048;

/// A ring larger than this many times its records is shrunk by the sweep.
const SHRINK_FACTOR: usize = 4;

/// Records of one channel, oldest first, numbered from 0.
#[derive(Debug, Default)]
pub(super) struct History {
    data: Box<[u8]>,
    /// Entries after the first, as a ring.
    index: Box<[Entry]>,
    first: Entry,
    /// Where the next record goes, if it fits.
    end: u32,
    /// End of the upper part while records have started again at 0, else 0.
    wrap: u32,
    index_head: u32,
    count: u32,
    /// Age in ticks above which records have expired; of the newest publication's options.
    pub(super) ttl_ticks: u32,
    /// This channel's place in the pool's list of holders.
    pub(super) holder: u32,
}

// One cache line and no more: there is one per channel with history.
const _: () = assert!(size_of::<History>() <= 64);

impl History {
    /// An empty one, about to take its first record.
    pub(super) fn new(ttl_ticks: u32, holder: u32) -> History {
        History { ttl_ticks, holder, ..History::default() }
    }

    /// What a history of one record of `length` bytes would take in all, in bytes.
    pub(super) const fn footprint_of_first(length: usize) -> usize {
        size_of::<History>() + round_up(length)
    }

    /// Bytes allocated, the struct included.
    pub(super) fn footprint(&self) -> usize {
        size_of::<History>() + self.data.len() + self.index.len() * ENTRY_BYTES
    }

    /// What [`History::footprint`] will be after appending `length` bytes to at most `entries_max` records.
    pub(super) fn footprint_after(&self, length: usize, entries_max: u32) -> usize {
        let data = if self.place(length).is_some() { self.data.len() } else { self.grown_data_bytes(length) };
        let index = self.grown_index_slots(entries_max).unwrap_or(self.index.len());
        size_of::<History>() + data + index * ENTRY_BYTES
    }

    /// Records kept.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of the records kept.
    pub(super) fn live_bytes(&self) -> usize {
        let (upper, lower) = self.parts();
        upper.len() + lower.len()
    }

    /// When the newest record was written.
    #[cfg(test)]
    pub(super) fn newest_tick(&self) -> Option<u32> {
        self.count.checked_sub(1).map(|last| self.entry(last).tick)
    }

    /// Appends a record of `length` bytes, which the caller writes to the place returned. Grows the ring and the index when they are full: the caller has asked
    /// [`History::footprint_after`] with the same arguments, has room for that, and has trimmed to below
    /// `entries_max`.
    pub(super) fn append(&mut self, length: usize, tick: u32, entries_max: u32) -> &mut [u8] {
        assert!(self.count < entries_max && length > 0);
        let start = match self.place(length) {
            Some(start) => start,
            None => {
                self.rebuild(self.grown_data_bytes(length));
                self.end as usize
            }
        };
        if start < self.end as usize {
            self.wrap = self.end;
        }
        let end = start + length;
        self.end = end as u32;
        self.push_entry(Entry { start: start as u32, tick }, entries_max);
        &mut self.data[start..end]
    }

    /// Whether a record of `length` bytes fits without growing anything.
    pub(super) fn fits(&self, length: usize) -> bool {
        self.place(length).is_some() && self.count as usize <= self.index.len()
    }

    /// Drops the oldest `n` records, or all there are. Keeps the buffers.
    pub(super) fn drop_front(&mut self, n: u32) {
        if n >= self.count {
            (self.end, self.wrap, self.index_head, self.count) = (0, 0, 0, 0);
            self.first = Entry::default();
            return;
        }
        if n == 0 {
            return;
        }
        self.first = self.entry(n);
        self.index_head = self.slot(n) as u32;
        self.advance_index_head();
        self.count -= n;
        if self.wrap != 0 && self.first.start < self.end {
            self.wrap = 0;
        }
    }

    /// How many of the oldest records have expired at tick `now`.
    pub(super) fn expired(&self, now: u32) -> u32 {
        let is_old = |n: u32| now.wrapping_sub(self.entry(n).tick) > self.ttl_ticks;
        if self.count == 0 || !is_old(0) {
            return 0;
        }
        let (mut low, mut high) = (1, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if is_old(middle) { low = middle + 1 } else { high = middle }
        }
        low
    }

    /// Record `n`, counted from the oldest.
    pub(super) fn record(&self, n: u32) -> &[u8] {
        let start = self.entry(n).start;
        &self.data[start as usize..self.end_of(n, start) as usize]
    }

    /// The records from `from` on, as they lie, until `bytes_max` are reached: two runs in order, and how
    /// many records they hold. Always at least one record where there is one.
    pub(super) fn run(&self, from: u32, bytes_max: usize) -> (&[u8], &[u8], u32) {
        if from >= self.count {
            return (&[], &[], 0);
        }
        let (upper, lower) = self.parts();
        let begin = self.linear(from);
        let (mut low, mut high) = (from + 1, self.count);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if self.linear(middle) - begin <= bytes_max { low = middle } else { high = middle - 1 }
        }
        let end = self.linear(low);
        let first = &upper[begin.min(upper.len())..end.min(upper.len())];
        let second = &lower[begin.saturating_sub(upper.len())..end.saturating_sub(upper.len())];
        (first, second, low - from)
    }

    /// Gives memory back if far more is held than the records need. Returns whether it did.
    pub(super) fn shrink(&mut self) -> bool {
        let live = self.live_bytes();
        if self.data.len() < SHRINK_BYTES_MIN || live.saturating_mul(SHRINK_FACTOR) >= self.data.len() {
            return false;
        }
        self.rebuild(round_up(live + live / 4));
        self.reindex(self.count.saturating_sub(1) as usize);
        true
    }

    /// Where `length` bytes can be appended without growing.
    fn place(&self, length: usize) -> Option<usize> {
        let (end, first) = (self.end as usize, self.first.start as usize);
        if self.wrap != 0 {
            return (end + length <= first).then_some(end);
        }
        if end + length <= self.data.len() {
            return Some(end);
        }
        (self.count > 0 && length <= first).then_some(0)
    }

    fn grown_data_bytes(&self, length: usize) -> usize {
        let live = self.live_bytes();
        round_up(live + live / 2 + length)
    }

    /// Slots that the index needs to take one more entry, if it must grow.
    fn grown_index_slots(&self, entries_max: u32) -> Option<usize> {
        if self.count as usize <= self.index.len() {
            return None;
        }
        // The first entry lies in the struct, so the ring never holds more than entries_max - 1.
        let most = (entries_max as usize - 1).max(self.count as usize);
        Some((self.index.len() * 2).max(INDEX_SLOTS_MIN).min(most))
    }

    fn push_entry(&mut self, entry: Entry, entries_max: u32) {
        if self.count == 0 {
            self.first = entry;
        } else {
            if let Some(slots) = self.grown_index_slots(entries_max) {
                self.reindex(slots);
            }
            let slot = self.slot(self.count);
            self.index[slot] = entry;
        }
        self.count += 1;
    }

    fn entry(&self, n: u32) -> Entry {
        if n == 0 { self.first } else { self.index[self.slot(n)] }
    }

    /// Index slot of entry `n` >= 1.
    fn slot(&self, n: u32) -> usize {
        let slot = self.index_head as usize + n as usize - 1;
        if slot >= self.index.len() { slot - self.index.len() } else { slot }
    }

    fn advance_index_head(&mut self) {
        self.index_head += 1;
        if self.index_head as usize >= self.index.len() {
            self.index_head = 0;
        }
    }

    fn end_of(&self, n: u32, start: u32) -> u32 {
        if n + 1 == self.count {
            return self.end;
        }
        let next = self.entry(n + 1).start;
        if next > start { next } else { self.wrap }
    }

    /// Where record `n` starts when the two parts are laid end to end; the length of both for `count`.
    fn linear(&self, n: u32) -> usize {
        let first = self.first.start as usize;
        let upper_bytes = if self.wrap != 0 { self.wrap as usize - first } else { 0 };
        if n == self.count {
            return if self.wrap != 0 { upper_bytes + self.end as usize } else { self.end as usize - first };
        }
        let start = self.entry(n).start as usize;
        if start >= first { start - first } else { upper_bytes + start }
    }

    fn parts(&self) -> (&[u8], &[u8]) {
        let (first, end) = (self.first.start as usize, self.end as usize);
        if self.wrap != 0 {
            (&self.data[first..self.wrap as usize], &self.data[..end])
        } else {
            (&self.data[first..end], &[])
        }
    }

    /// Moves the records into a new ring of `bytes`, from its start.
    fn rebuild(&mut self, bytes: usize) {
        assert!(bytes <= u32::MAX as usize, "the pool's maximum keeps a ring below 4 GiB");
        let mut data = vec![0; bytes].into_boxed_slice();
        let (upper, lower) = self.parts();
        let (upper_bytes, live) = (upper.len(), upper.len() + lower.len());
        data[..upper_bytes].copy_from_slice(upper);
        data[upper_bytes..live].copy_from_slice(lower);
        let first = self.first.start;
        for n in 1..self.count {
            let slot = self.slot(n);
            let start = self.index[slot].start;
            self.index[slot].start = if start >= first { start - first } else { start + upper_bytes as u32 };
        }
        (self.first.start, self.end, self.wrap) = (0, live as u32, 0);
        self.data = data;
    }

    fn reindex(&mut self, slots: usize) {
        let mut index = vec![Entry::default(); slots].into_boxed_slice();
        for n in 1..self.count {
            index[n as usize - 1] = self.entry(n);
        }
        (self.index, self.index_head) = (index, 0);
    }
}

/// Allocators hand out multiples of 16 anyway.
const fn round_up(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u32 = 6;

    fn append(history: &mut History, record: &[u8], tick: u32) {
        history.drop_front(history.count().saturating_sub(SIZE - 1));
        let predicted = history.footprint_after(record.len(), SIZE);
        history.append(record.len(), tick, SIZE).copy_from_slice(record);
        assert_eq!(history.footprint(), predicted);
    }

    fn contents(history: &History) -> Vec<Vec<u8>> {
        (0..history.count()).map(|n| history.record(n).to_vec()).collect()
    }

    /// A record whose bytes tell its number, of a length that depends on it.
    fn record(n: u32, spread: u32) -> Vec<u8> {
        vec![n as u8; (1 + n.wrapping_mul(2_654_435_761) % spread) as usize]
    }

    #[test]
    fn a_ring_that_comes_around_keeps_whole_records_in_order() {
        for spread in [1, 2, 7, 40, 300] {
            let mut history = History::new(100, 0);
            for n in 0..1000u32 {
                append(&mut history, &record(n, spread), n);
                let first = (n + 1).saturating_sub(SIZE);
                let expected: Vec<_> = (first..=n).map(|m| record(m, spread)).collect();
                assert_eq!(contents(&history), expected, "{n} of {spread}");
                let (one, two, count) = history.run(0, usize::MAX);
                assert_eq!([one, two].concat(), expected.concat());
                assert_eq!(count, history.count());
                assert_eq!(history.live_bytes(), expected.concat().len());
            }
            let worst = 3 * (SIZE as usize) * (spread as usize) + 2 * ENTRY_BYTES * SIZE as usize;
            assert!(history.footprint() < size_of::<History>() + worst + 64, "{}", history.footprint());
        }
    }

    #[test]
    fn a_history_of_one_reuses_its_buffer() {
        let mut history = History::new(100, 0);
        for n in 0..10 {
            history.drop_front(u32::MAX);
            history.append(100, 0, 1).fill(n);
            assert_eq!(history.footprint(), History::footprint_of_first(100));
        }
        assert_eq!(contents(&history), [vec![9; 100]]);
    }

    #[test]
    fn runs_hold_whole_records_up_to_a_limit_and_at_least_one() {
        let mut history = History::new(100, 0);
        for n in 0..20 {
            append(&mut history, &[n; 10], 0);
        }
        let run = |from, bytes| {
            let (one, two, count) = history.run(from, bytes);
            ([one, two].concat().len(), count)
        };
        assert_eq!(run(0, 0), (10, 1));
        assert_eq!(run(0, 10), (10, 1));
        assert_eq!(run(0, 19), (10, 1));
        assert_eq!(run(0, 20), (20, 2));
        assert_eq!(run(0, 1000), (60, 6));
        assert_eq!(run(4, 1000), (20, 2));
        assert_eq!(run(5, 1), (10, 1));
        assert_eq!(run(6, 1000), (0, 0));
    }

    #[test]
    fn expiry_is_found_by_the_index() {
        let mut history = History::new(10, 0);
        for n in 0..SIZE {
            append(&mut history, &[1], n);
        }
        for (now, expected) in [(5, 0), (10, 0), (11, 1), (13, 3), (15, 5), (16, 6), (100, 6)] {
            assert_eq!(history.expired(now), expected, "at {now}");
        }
    }

    #[test]
    fn ticks_wrap() {
        let mut history = History::new(10, 0);
        append(&mut history, &[1], u32::MAX - 2);
        append(&mut history, &[2], 1);
        assert_eq!(history.expired(7), 0);
        assert_eq!(history.expired(8), 1);
        assert_eq!(history.expired(12), 2);
        assert_eq!(history.newest_tick(), Some(1));
    }

    #[test]
    fn shrinking_gives_memory_back_and_keeps_the_records() {
        let mut history = History::new(100, 0);
        for n in 0..SIZE {
            append(&mut history, &[n as u8; 4000], n);
        }
        assert!(!history.shrink());
        history.drop_front(SIZE - 1);
        assert!(history.shrink());
        assert!(history.footprint() < 6000, "{}", history.footprint());
        assert_eq!(contents(&history), [vec![5; 4000]]);
        append(&mut history, &[6; 100], 9);
        assert_eq!(contents(&history), [vec![5; 4000], vec![6; 100]]);
    }
}
