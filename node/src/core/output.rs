//! What connections are to be sent: the turn's arena, own queues, and the list of sends.
//!
//! Owns every outgoing byte that does not lie in a channel's log, one hot byte per slot, and the
//! sends of the turn. It knows no channel and no session; [`super::fanout`] decides what is sent.
//!
//! Invariants:
//! * a slot has at most one send per turn;
//! * a slot whose own queue holds bytes, or whose socket is full, gets nothing into the arena:
//!   later bytes queue behind earlier ones;
//! * between `prepare` and `settle` neither arena nor own queue moves.

use std::collections::VecDeque;

use ringmain_proto::ws::{self, Opcode};

use super::engine::{Send, Slot, Source};
use super::metrics::{Metric, Values};

/// The slot was sent something in this turn.
pub(crate) const SENT: u8 = 1;
/// The slot has bytes in the turn's arena.
pub(crate) const ARENA: u8 = 2;
/// The slot has bytes in its own queue or cursors of its own.
pub(crate) const WAITING: u8 = 4;
/// The slot's socket is full; one POLLOUT is armed.
pub(crate) const BLOCKED: u8 = 8;
/// The slot waits in the queue of ready slots.
pub(crate) const QUEUED: u8 = 16;
/// Nothing is sent to this slot any more.
pub(crate) const DEAD: u8 = 32;

/// The slot's connect reply is not queued yet: nothing of a log may be sent.
pub(crate) const HOLD: u8 = 64;

/// A log's slice that was copied behind a slot's arena bytes, so that both leave in one send.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Merge {
    pub(crate) slot: Slot,
    /// Log of which channel and variant (see [`log_id`]).
    pub(crate) log: u32,
    /// Positions in that log.
    pub(crate) from: u64,
    pub(crate) to: u64,
}

/// Channel index and variant in one number: a channel has at most [`VARIANTS_MAX`] variants.
pub(crate) fn log_id(channel: u32, variant: u8) -> u32 {
    debug_assert!(variant < VARIANTS_MAX);
    channel << 3 | u32::from(variant)
}

/// The inverse of [`log_id`].
pub(crate) fn split_log_id(id: u32) -> (u32, u8) {
    (id >> 3, (id & 7) as u8)
}

/// Variants of a channel at the most.
pub(crate) const VARIANTS_MAX: u8 = 8;

/// A subscriber's own cursor in a channel's log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lag {
    pub(crate) channel: u32,
    /// Position in the log, at a frame's end.
    pub(crate) pos: u64,
    /// Offset of the last publication before it.
    pub(crate) offset: u64,
}

/// What waits for one connection beyond this turn. Exists only while something waits.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    /// Bytes to send first: whole frames, after the rest of a frame that was begun.
    bytes: Vec<u8>,
    read: usize,
    /// Cursors of its own, in the order in which they fell behind.
    pub(crate) lags: VecDeque<Lag>,
    /// Since when the socket takes nothing, in monotonic milliseconds.
    pub(crate) blocked_since_ms: u64,
}

impl Waiting {
    /// Bytes in the own queue.
    pub(crate) fn own_len(&self) -> usize {
        self.bytes.len() - self.read
    }

    fn is_empty(&self) -> bool {
        self.own_len() == 0 && self.lags.is_empty()
    }
}

#[derive(Debug, Default)]
struct SlotOut {
    start: u32,
    len: u32,
    send: u32,
    waiting: Option<Box<Waiting>>,
}

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Output {
    hot: Vec<u8>,
    slots: Vec<SlotOut>,
    arena: Vec<u8>,
    /// Slots with bytes in the arena.
    pub(crate) in_arena: Vec<Slot>,
    /// Slots with something to send besides the arena.
    pub(crate) ready: VecDeque<Slot>,
    pub(crate) sends: Vec<Send>,
    pub(crate) merges: Vec<Merge>,
    /// The slots of this turn whose send was not taken whole.
    pub(crate) failed: Vec<Slot>,
    own_bytes: usize,
    lag_count: usize,
}

/// Capacity beyond which the arena is given back after a turn, in bytes.
const ARENA_KEEP_BYTES: usize = 1024 * 1024;
/// Bytes of the own queue or of a log offered in one send at the most.
pub(crate) const SEND_BYTES_MAX: usize = 64 * 1024;
/// Bytes of a log's slice that are copied behind arena bytes at the most; more leaves in the next turn.
pub(crate) const MERGE_BYTES_MAX: usize = 16 * 1024;

impl Output {
    /// Makes a slot usable.
    pub(crate) fn open(&mut self, slot: Slot) {
        let index = slot as usize;
        if self.hot.len() <= index {
            self.hot.resize(index + 1, 0);
            self.slots.resize_with(index + 1, SlotOut::default);
        }
        self.hot[index] = 0;
        debug_assert!(self.slots[index].waiting.is_none());
    }

    /// Forgets everything that waits for a slot; nothing is accepted for it any more. Its cursors
    /// are the caller's to drop first.
    pub(crate) fn kill(&mut self, slot: Slot) {
        let index = slot as usize;
        let out = &mut self.slots[index];
        if let Some(waiting) = out.waiting.take() {
            self.own_bytes -= waiting.bytes.len();
            self.lag_count -= waiting.lags.len();
        }
        out.len = 0;
        // SENT, ARENA and QUEUED are cleared by those who hold the slot in their lists.
        self.hot[index] = self.hot[index] & (SENT | ARENA | QUEUED) | DEAD;
    }

    /// Forgets a slot that leaves without a word, at once and for good: in no list of the next turn it is
    /// found. Between turns only; its cursors are the caller's to drop first.
    pub(crate) fn forget(&mut self, slot: Slot) {
        debug_assert!(self.hot(slot) & SENT == 0, "nobody leaves within a turn");
        if self.hot(slot) & ARENA != 0 {
            self.in_arena.retain(|listed| *listed != slot);
        }
        if self.hot(slot) & QUEUED != 0 {
            self.ready.retain(|listed| *listed != slot);
        }
        self.kill(slot);
        self.hot[slot as usize] = DEAD;
    }

    /// What waits for a slot beside its cursors: its own queue, or its part of the arena.
    pub(crate) fn pending(&self, slot: Slot) -> &[u8] {
        let SlotOut { start, len, ref waiting, .. } = self.slots[slot as usize];
        match waiting {
            Some(waiting) if waiting.own_len() > 0 => &waiting.bytes[waiting.read..],
            _ if self.hot(slot) & ARENA != 0 => &self.arena[start as usize..(start + len) as usize],
            _ => &[],
        }
    }

    #[inline]
    pub(crate) fn hot(&self, slot: Slot) -> u8 {
        self.hot[slot as usize]
    }

    #[inline]
    pub(crate) fn mark(&mut self, slot: Slot, bits: u8) {
        self.hot[slot as usize] |= bits;
    }

    #[inline]
    pub(crate) fn unmark(&mut self, slot: Slot, bits: u8) {
        self.hot[slot as usize] &= !bits;
    }

    /// Queues a slot for service, unless it cannot be served or is queued already.
    pub(crate) fn make_ready(&mut self, slot: Slot) {
        if self.hot(slot) & (QUEUED | BLOCKED | HOLD | DEAD) == 0 {
            self.mark(slot, QUEUED);
            self.ready.push_back(slot);
        }
    }

    /// Appends one WebSocket frame for a slot: into the arena, or behind what waits already.
    pub(crate) fn frame(&mut self, slot: Slot, opcode: Opcode, encode: impl FnOnce(&mut Vec<u8>)) {
        self.raw(slot, |out| {
            let start = ws::begin_small_frame(out);
            encode(out);
            ws::finish_frame(out, start, opcode);
        });
    }

    /// Appends bytes as they are.
    pub(crate) fn raw(&mut self, slot: Slot, encode: impl FnOnce(&mut Vec<u8>)) {
        let hot = self.hot(slot);
        if hot & DEAD != 0 {
            return;
        }
        if hot & BLOCKED != 0 || self.own_len(slot) > 0 {
            self.append_own(slot, encode);
            return;
        }
        let index = slot as usize;
        if hot & ARENA == 0 {
            self.mark(slot, ARENA);
            self.in_arena.push(slot);
            self.slots[index].start = self.arena.len() as u32;
            self.slots[index].len = 0;
        }
        self.move_to_end(slot);
        encode(&mut self.arena);
        let out = &mut self.slots[index];
        out.len = self.arena.len() as u32 - out.start;
    }

    /// Moves a slot's region to the arena's end, unless it is there.
    fn move_to_end(&mut self, slot: Slot) {
        let out = &mut self.slots[slot as usize];
        let (start, len) = (out.start as usize, out.len as usize);
        if start + len != self.arena.len() {
            out.start = self.arena.len() as u32;
            self.arena.extend_from_within(start..start + len);
        }
    }

    /// Appends to the own queue.
    pub(crate) fn append_own(&mut self, slot: Slot, encode: impl FnOnce(&mut Vec<u8>)) {
        let waiting = self.slots[slot as usize].waiting.get_or_insert_default();
        let before = waiting.bytes.len();
        encode(&mut waiting.bytes);
        self.own_bytes += waiting.bytes.len() - before;
        self.mark(slot, WAITING);
        self.make_ready(slot);
    }

    /// Bytes in a slot's own queue.
    pub(crate) fn own_len(&self, slot: Slot) -> usize {
        self.slots[slot as usize].waiting.as_ref().map_or(0, |waiting| waiting.own_len())
    }

    /// Bytes that wait for a slot in any place of this module.
    pub(crate) fn pending_len(&self, slot: Slot) -> usize {
        let arena = if self.hot(slot) & ARENA != 0 { self.slots[slot as usize].len as usize } else { 0 };
        arena + self.own_len(slot)
    }

    /// Whether nothing at all waits for the slot.
    pub(crate) fn is_idle(&self, slot: Slot) -> bool {
        self.pending_len(slot) == 0 && self.hot(slot) & WAITING == 0
    }

    /// Bytes in all own queues.
    pub(crate) fn own_bytes(&self) -> usize {
        self.own_bytes
    }

    pub(crate) fn waiting(&self, slot: Slot) -> Option<&Waiting> {
        self.slots[slot as usize].waiting.as_deref()
    }

    /// Gives the slot a cursor of its own, behind those it has.
    pub(crate) fn push_lag(&mut self, slot: Slot, lag: Lag) {
        self.slots[slot as usize].waiting.get_or_insert_default().lags.push_back(lag);
        self.lag_count += 1;
        self.mark(slot, WAITING);
        self.make_ready(slot);
    }

    /// The slot's cursor in a channel; whoever is a laggard has one.
    pub(crate) fn lag_mut(&mut self, slot: Slot, channel: u32) -> &mut Lag {
        let waiting = self.slots[slot as usize].waiting.as_mut().expect("a laggard has a cursor");
        waiting.lags.iter_mut().find(|lag| lag.channel == channel).expect("a laggard has a cursor")
    }

    /// Moves the first of them to the end.
    pub(crate) fn rotate_lag(&mut self, slot: Slot) {
        if let Some(waiting) = &mut self.slots[slot as usize].waiting
            && waiting.lags.len() > 1
        {
            waiting.lags.rotate_left(1);
        }
    }

    /// Removes the slot's cursor in a channel.
    pub(crate) fn remove_lag(&mut self, slot: Slot, channel: u32) {
        if let Some(waiting) = &mut self.slots[slot as usize].waiting {
            let before = waiting.lags.len();
            waiting.lags.retain(|lag| lag.channel != channel);
            self.lag_count -= before - waiting.lags.len();
            self.drop_waiting_if_empty(slot);
        }
    }

    fn drop_waiting_if_empty(&mut self, slot: Slot) {
        let waiting = &mut self.slots[slot as usize].waiting;
        if let Some(inner) = waiting
            && inner.is_empty()
        {
            self.own_bytes -= inner.bytes.len();
            *waiting = None;
            self.unmark(slot, WAITING);
        }
    }

    /// Takes `n` bytes off the own queue.
    pub(crate) fn consume_own(&mut self, slot: Slot, n: usize) {
        let Some(waiting) = &mut self.slots[slot as usize].waiting else { return };
        waiting.read += n;
        debug_assert!(waiting.read <= waiting.bytes.len());
        if waiting.read == waiting.bytes.len() {
            self.own_bytes -= waiting.bytes.len();
            waiting.bytes = Vec::new();
            waiting.read = 0;
        } else if waiting.read > waiting.bytes.len() / 2 && waiting.read > SEND_BYTES_MAX {
            self.own_bytes -= waiting.read;
            waiting.bytes.drain(..waiting.read);
            waiting.read = 0;
        }
        self.drop_waiting_if_empty(slot);
    }

    /// Adds a send to the turn.
    #[inline]
    pub(crate) fn push_send(&mut self, slot: Slot, len: u32, source: Source) {
        let index = slot as usize;
        self.slots[index].send = self.sends.len() as u32;
        self.hot[index] |= SENT;
        self.sends.push(Send { slot, len, source });
    }

    /// Offers the head of the own queue.
    pub(crate) fn push_own_send(&mut self, slot: Slot) {
        let len = self.own_len(slot).min(SEND_BYTES_MAX);
        self.push_send(slot, len as u32, Source::Own);
    }

    /// Offers the slot's region of the arena.
    pub(crate) fn push_arena_send(&mut self, slot: Slot) {
        let SlotOut { start, len, .. } = self.slots[slot as usize];
        self.push_send(slot, len, Source::Arena(start));
    }

    /// Copies a slice of a log behind the slot's arena bytes, which may be among the sends already.
    pub(crate) fn merge(&mut self, merge: Merge, bytes: &[u8]) {
        self.move_to_end(merge.slot);
        self.arena.extend_from_slice(bytes);
        let out = &mut self.slots[merge.slot as usize];
        out.len += bytes.len() as u32;
        if self.hot[merge.slot as usize] & SENT != 0 {
            let SlotOut { start, len, send, .. } = *out;
            self.sends[send as usize] = Send { slot: merge.slot, len, source: Source::Arena(start) };
        }
        self.merges.push(merge);
    }

    /// The slot's send of this turn.
    pub(crate) fn send_of(&self, slot: Slot) -> Send {
        let send = self.sends[self.slots[slot as usize].send as usize];
        assert!(send.slot == slot, "a send belongs to its slot");
        send
    }

    /// The bytes of a send that does not come from a log.
    pub(crate) fn bytes(&self, send: &Send) -> &[u8] {
        match send.source {
            Source::Arena(start) => &self.arena[start as usize..(start + send.len) as usize],
            Source::Own => {
                let waiting =
                    self.slots[send.slot as usize].waiting.as_ref().expect("an own send has a queue");
                &waiting.bytes[waiting.read..waiting.read + send.len as usize]
            }
            Source::Log(..) => unreachable!("a log's bytes are its own"),
        }
    }

    /// Moves a part of the slot's arena region (counted from its start) into its own queue.
    pub(crate) fn keep_arena(&mut self, slot: Slot, from: usize, to: usize) {
        if from >= to {
            return;
        }
        let index = slot as usize;
        let start = self.slots[index].start as usize;
        let waiting = self.slots[index].waiting.get_or_insert_default();
        waiting.bytes.extend_from_slice(&self.arena[start + from..start + to]);
        self.own_bytes += to - from;
        self.mark(slot, WAITING);
    }

    /// Notes that the slot's socket is full.
    pub(crate) fn block(&mut self, slot: Slot, now_ms: u64) {
        self.mark(slot, BLOCKED);
        self.slots[slot as usize].waiting.get_or_insert_default().blocked_since_ms = now_ms;
        self.mark(slot, WAITING);
    }

    /// Holds the slot's logs back until [`Output::release`].
    pub(crate) fn hold(&mut self, slot: Slot) {
        self.mark(slot, HOLD);
    }

    /// Lets the slot's logs go on.
    pub(crate) fn release(&mut self, slot: Slot) {
        self.unmark(slot, HOLD);
        if self.hot(slot) & WAITING != 0 {
            self.make_ready(slot);
        }
    }

    /// Notes that the socket takes bytes again.
    pub(crate) fn unblock(&mut self, slot: Slot) {
        self.unmark(slot, BLOCKED);
        self.drop_waiting_if_empty(slot);
        if self.hot(slot) & WAITING != 0 {
            self.make_ready(slot);
        }
    }

    /// Ends the turn: moves what was not sent to own queues, empties the lists.
    pub(crate) fn end_turn(&mut self, metrics: &mut Values) {
        for position in 0..self.in_arena.len() {
            let slot = self.in_arena[position];
            let hot = self.hot(slot);
            if hot & (SENT | DEAD) == 0 {
                let len = self.slots[slot as usize].len as usize;
                self.keep_arena(slot, 0, len);
                self.make_ready(slot);
            }
            self.slots[slot as usize].len = 0;
            self.unmark(slot, ARENA);
        }
        self.in_arena.clear();
        for position in 0..self.sends.len() {
            let slot = self.sends[position].slot;
            self.unmark(slot, SENT);
            if self.hot(slot) & WAITING != 0 {
                self.make_ready(slot);
            }
        }
        self.sends.clear();
        self.merges.clear();
        self.failed.clear();
        self.arena.clear();
        if self.arena.capacity() > ARENA_KEEP_BYTES {
            self.arena = Vec::new();
        }
        metrics.set(Metric::OwnBytes, self.own_bytes as u64);
        metrics.set(Metric::Lagging, self.lag_count as u64);
    }
}
