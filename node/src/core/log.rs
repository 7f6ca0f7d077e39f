//! The log of one variant of a channel: encoded frames, contiguous, and who has been sent what.
//!
//! Owns the frames that at least one subscriber has not been offered yet, the cursor that all
//! caught-up subscribers share, and the pass that serves them in chunks. It knows no session and no
//! socket.
//!
//! Invariants:
//! * positions grow; `base <= group <= head`; a cursor is always at the end of a frame: whoever took
//!   a part of a frame keeps the rest of that frame in its own queue;
//! * while a pass is open, the members below `unserved` are at `group`, the others at `pass.to`;
//! * bytes below the cut mark are gone; a cursor below `base` has *fallen* and is served from history.

use super::engine::Slot;

/// The end of one frame in the log, and the offset of the newest publication up to there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    end: u64,
    offset: u64,
}

/// A pass over the caught-up members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass {
    /// Members are served up to here.
    pub(crate) to: u64,
    /// Members with an index below are not served yet; service goes from the last to the first.
    pub(crate) unserved: u32,
}

/// Where a log begins: so that there is a position below its tail from the start.
const FIRST: u64 = 1;

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Log {
    bytes: Vec<u8>,
    marks: Vec<Mark>,
    /// Ends of those frames that are joins and leaves, which no history has.
    joins: Vec<u64>,
    /// The end of the newest join or leave that was cut; 0: none was.
    joins_cut: u64,
    base: u64,
    base_offset: u64,
    /// Where every caught-up member stands (see `pass`).
    pub(crate) group: u64,
    pub(crate) pass: Option<Pass>,
    /// Subscribers with a cursor of their own in this log, or waiting for a replay.
    pub(crate) laggards: Vec<Slot>,
    /// Whether the channel waits in the queue of channels to serve.
    pub(crate) queued: bool,
}

/// Where a cut inside the bytes offered leaves a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// The end of the frame that was begun (or the place itself, between frames).
    pub(crate) boundary: u64,
}

impl Log {
    /// Bytes beyond which an emptied buffer is not kept for reuse.
    pub(crate) const KEEP_BYTES_MAX: usize = 16 * 1024;

    /// The position after the last frame.
    pub(crate) fn head(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// The oldest position that is still there.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Appends what `encode` writes as one frame; `offset` is the newest publication's up to here.
    /// Returns the frame's length.
    pub(crate) fn append(&mut self, offset: u64, encode: impl FnOnce(&mut Vec<u8>)) -> usize {
        let before = self.bytes.len();
        encode(&mut self.bytes);
        self.marks.push(Mark { end: self.base + self.bytes.len() as u64, offset });
        self.bytes.len() - before
    }

    /// Notes that the frame appended last is a join or leave.
    pub(crate) fn note_join(&mut self) {
        self.joins.push(self.head());
    }

    /// Whether a reader that goes from `from` to `to` without what lies between misses a join or leave.
    pub(crate) fn has_join_between(&self, from: u64, to: u64) -> bool {
        let next = self.joins.partition_point(|end| *end <= from);
        from < self.joins_cut && self.joins_cut <= to || self.joins.get(next).is_some_and(|end| *end <= to)
    }

    /// The bytes from `from` to `to`.
    pub(crate) fn slice(&self, from: u64, to: u64) -> &[u8] {
        debug_assert!(self.base <= from && from <= to && to <= self.head());
        &self.bytes[(from - self.base) as usize..(to - self.base) as usize]
    }

    /// A position reached by a send that the kernel cut at `at`: the frame begun there is to be
    /// finished from the own queue, and the cursor goes to that frame's end.
    pub(crate) fn cut_at(&self, at: u64) -> Cut {
        debug_assert!(self.base <= at && at <= self.head());
        let index = self.marks.partition_point(|mark| mark.end < at);
        let boundary = if at == self.base { at } else { self.marks[index].end };
        Cut { boundary }
    }

    /// The largest frame end at most `bytes` after `from`, but at least one frame.
    pub(crate) fn bounded_end(&self, from: u64, bytes: u64) -> u64 {
        if self.head() - from <= bytes {
            return self.head();
        }
        let index = self.marks.partition_point(|mark| mark.end <= from + bytes);
        let first = self.marks.partition_point(|mark| mark.end <= from);
        self.marks[index.saturating_sub(1).max(first)].end
    }

    /// The offset of the newest publication at or before the frame boundary `at`.
    pub(crate) fn offset_at(&self, at: u64) -> u64 {
        if at <= self.base {
            return self.base_offset;
        }
        let index = self.marks.partition_point(|mark| mark.end < at);
        self.marks.get(index).map_or(self.base_offset, |mark| mark.offset)
    }

    /// The boundary after the publication with `offset`, if everything later is in the log.
    pub(crate) fn boundary_after(&self, offset: u64) -> Option<u64> {
        if offset < self.base_offset {
            return None;
        }
        let index = self.marks.partition_point(|mark| mark.offset <= offset);
        Some(if index == 0 { self.base } else { self.marks[index - 1].end })
    }

    /// The boundary after the publication with `offset`, if what follows there has no hole up to `top`. Unlike
    /// [`Log::boundary_after`] it trusts nothing but the marks: a log may have missed what was published
    /// while nobody read it, or go on into another epoch.
    pub(crate) fn resume_after(&self, offset: u64, top: u64) -> Option<u64> {
        let (mut at, mut before, mut last) = (self.base, self.base_offset, offset);
        for mark in &self.marks {
            if mark.offset < before || mark.offset > offset && !(last..=last + 1).contains(&mark.offset) {
                return None;
            }
            before = mark.offset;
            if mark.offset <= offset {
                at = mark.end;
            } else {
                last = mark.offset;
            }
        }
        (offset >= self.base_offset && last == top).then_some(at)
    }

    /// Drops the older half of the log, never what the group still needs. Cursors below the new base
    /// have fallen. Returns the bytes dropped.
    pub(crate) fn cut(&mut self) -> usize {
        let target = self.base + (self.bytes.len() / 2) as u64;
        let index = self.marks.partition_point(|mark| mark.end < target.min(self.group));
        // The mark found may reach beyond the group's cursor: then the one before it is the cut.
        let index = match self.marks.get(index) {
            Some(mark) if mark.end <= self.group => index + 1,
            _ => index,
        };
        if index == 0 {
            return 0;
        }
        let Mark { end, offset } = self.marks[index - 1];
        let dropped = (end - self.base) as usize;
        self.bytes.drain(..dropped);
        self.marks.drain(..index);
        let joins = self.joins.partition_point(|join| *join <= end);
        self.joins_cut = self.joins.drain(..joins).next_back().unwrap_or(self.joins_cut);
        self.base = end;
        self.base_offset = offset;
        dropped
    }

    /// Puts the group's cursor at the end: its members fell behind one by one, or skipped.
    pub(crate) fn skip_group_to(&mut self, at: u64) {
        debug_assert!(self.pass.is_none() && at <= self.head());
        self.group = at;
    }

    /// Whether nobody needs a byte of it.
    pub(crate) fn is_done(&self) -> bool {
        self.pass.is_none() && self.laggards.is_empty() && self.group == self.head()
    }

    /// Prepares an unused log: the next frame follows the publication `offset`.
    pub(crate) fn reset(&mut self, offset: u64) {
        self.bytes.clear();
        self.marks.clear();
        self.joins.clear();
        self.joins_cut = 0;
        self.base = FIRST;
        self.base_offset = offset;
        self.group = FIRST;
        self.pass = None;
        self.laggards.clear();
        self.queued = false;
    }

    /// Whether its buffers are small enough to be kept for another channel.
    pub(crate) fn worth_keeping(&self) -> bool {
        self.bytes.capacity() <= Self::KEEP_BYTES_MAX && self.laggards.capacity() <= 1024
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(frames: &[(u64, &[u8])]) -> Log {
        let mut log = Log::default();
        for (offset, bytes) in frames {
            log.append(*offset, |out| out.extend_from_slice(bytes));
        }
        log
    }

    #[test]
    fn a_cut_in_a_frame_leads_to_its_end() {
        let log = log(&[(1, b"aaa"), (2, b"bb"), (3, b"cccc")]);
        let ends: Vec<u64> = (0..=9).map(|at| log.cut_at(at).boundary).collect();
        assert_eq!(ends, [0, 3, 3, 3, 5, 5, 9, 9, 9, 9]);
    }

    #[test]
    fn offsets_and_boundaries_agree() {
        let log = log(&[(4, b"aaa"), (4, b"J"), (7, b"bb")]);
        assert_eq!([0, 3, 4, 6].map(|at| log.offset_at(at)), [0, 4, 4, 7]);
        assert_eq!(log.boundary_after(4), Some(4), "a join after offset 4 is behind the cursor");
        assert_eq!(log.boundary_after(7), Some(6));
        assert_eq!(log.boundary_after(3), Some(0));
    }

    #[test]
    fn resumes_where_nothing_is_missing() {
        let continuous = log(&[(4, b"aaa"), (4, b"J"), (5, b"bb"), (5, b"J"), (6, b"c")]);
        let at: Vec<_> = (0..8).map(|offset| continuous.resume_after(offset, 6)).collect();
        assert_eq!(at, [None, None, None, Some(0), Some(4), Some(7), Some(8), None]);
        assert_eq!(continuous.resume_after(6, 7), None, "7 was missed");
        let hole = log(&[(4, b"a"), (6, b"b"), (7, b"c")]);
        assert_eq!(
            [4, 5, 6, 7].map(|offset| hole.resume_after(offset, 7)),
            [None, Some(1), Some(2), Some(3)]
        );
        let new_epoch = log(&[(4, b"a"), (1, b"b"), (2, b"c")]);
        assert_eq!([1, 2, 4].map(|offset| new_epoch.resume_after(offset, 2)), [None; 3]);
        assert_eq!(Log::default().resume_after(0, 0), Some(0));
    }

    #[test]
    fn bounded_end_gives_whole_frames_and_at_least_one() {
        let log = log(&[(1, b"aaaa"), (2, b"bb"), (3, b"c")]);
        assert_eq!(log.bounded_end(0, 1), 4);
        assert_eq!(log.bounded_end(0, 5), 4);
        assert_eq!(log.bounded_end(0, 6), 6);
        assert_eq!(log.bounded_end(4, 100), 7);
        assert_eq!(log.bounded_end(4, 1), 6);
    }

    #[test]
    fn a_cut_spares_what_the_group_needs() {
        let mut log = log(&[(1, b"aaaa"), (2, b"bbbb"), (3, b"cccc"), (4, b"dddd")]);
        assert_eq!(log.cut(), 0, "the group is at the base");
        log.group = 4;
        assert_eq!(log.cut(), 4);
        assert_eq!((log.base(), log.boundary_after(1), log.boundary_after(0)), (4, Some(4), None));
        log.group = 16;
        let dropped = log.cut();
        assert_eq!(dropped, 8, "half, rounded to a frame");
        assert_eq!(log.slice(12, 16), b"dddd");
    }

    #[test]
    fn joins_are_missed_by_those_who_pass_over_them() {
        let mut log = log(&[(1, b"aaaa"), (1, b"J"), (2, b"bbbb"), (2, b"L"), (3, b"cccc")]);
        log.joins.extend([5, 10]);
        let check = |log: &Log, from: u64, to: u64, expected: bool| {
            assert_eq!(log.has_join_between(from, to), expected, "{from} {to}");
        };
        for cut in [false, true] {
            if cut {
                log.group = 14;
                assert_eq!(log.cut(), 9);
                assert_eq!((log.joins_cut, &log.joins[..]), (5, &[10][..]));
            }
            check(&log, 0, 4, false);
            check(&log, 4, 5, true);
            check(&log, 5, 9, false);
            check(&log, 9, 10, true);
            check(&log, 10, 14, false);
            check(&log, 0, 14, true);
        }
    }

    #[test]
    fn done_means_that_nobody_waits() {
        let mut log = log(&[(1, b"a")]);
        assert!(!log.is_done());
        log.group = 1;
        assert!(log.is_done());
        log.laggards.push(0);
        assert!(!log.is_done());
    }
}
