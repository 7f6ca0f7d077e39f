//! Closing a connection so that the peer sees the end of the stream and nothing of it is left.
//!
//! Owns the way of a slot from `Open` to `Free`. An orderly closing is: shutdown(WR) → discard what
//! arrives for [`DISCARD_MS_MAX`] or [`DISCARD_BYTES_MAX`], until the peer's FIN → cancel what the slot has
//! in flight and see its completions → close the direct descriptor → free. Closing without the discard
//! would answer late bytes with RST, which may destroy what the peer has not read yet (RFC 1122,
//! 4.2.2.13). Closing with a receive armed closes nothing: the peer sees no FIN, and the kernel gives the
//! slot to the next connection.

use std::collections::VecDeque;
use std::os::fd::{FromRawFd, OwnedFd};

use io_uring::types::{CancelBuilder, Fixed};
use io_uring::{opcode, squeue};
use rustix::net::Shutdown;

use super::metrics::WireMetric;
use super::options::Mutation;
use super::slots::{Phase, flight};
use super::tag::{Op, Tag};
use super::wire::Wire;
use crate::core::engine::Slot;

/// How long a closing waits for the peer's FIN, in milliseconds.
pub const DISCARD_MS_MAX: u64 = 1_000;
/// How much a closing reads and throws away while it waits.
pub const DISCARD_BYTES_MAX: u32 = 64 * 1024;

/// `SO_LINGER` with a time of 0: close sends RST and drops what is unsent.
static LINGER_NONE: libc::linger = libc::linger { l_onoff: 1, l_linger: 0 };

/// The closings that wait for a FIN, in the order of their deadlines.
#[derive(Debug, Default)]
pub(super) struct Discards {
    /// (deadline, slot, generation). One entry per closing of the last [`DISCARD_MS_MAX`] at the most.
    waiting: VecDeque<(u64, Slot, u32)>,
}

impl Wire {
    /// Begins the orderly closing of an open slot.
    pub(super) fn finish(&mut self, slot: Slot, now_ms: u64) {
        if !self.is_open(slot) {
            return;
        }
        if self.slots.state(slot).ended {
            // The peer is done and all it sent was read: close sends the FIN, and nothing can answer.
            return self.cancel_or_close(slot);
        }
        let state = self.slots.state(slot);
        state.phase = Phase::Discarding;
        state.in_flight |= flight::SHUTDOWN;
        if self.mutation == Some(Mutation::ShutDownByRing) {
            self.shut_down_by_ring(slot);
        } else {
            let entry = opcode::FixedFdInstall::new(Fixed(slot), 0).build();
            // SAFETY: the entry points to no memory.
            unsafe { self.push(Op::Install, slot, entry) };
        }
        let generation = self.slots.generation(slot);
        self.discards.waiting.push_back((now_ms + DISCARD_MS_MAX, slot, generation));
    }

    /// The socket of a slot got a file descriptor of its own, for a moment: shuts it down by that.
    ///
    /// The ring's own shutdown runs on a worker thread, always; where connections come and go that was a
    /// fifth of the CPU (seen). It stays for kernels before 6.8 and for want of a file descriptor.
    pub(super) fn shut_down(&mut self, tag: Tag, result: i32) {
        let installed = (result >= 0).then(|| {
            // SAFETY: the kernel has just made this descriptor for this completion alone.
            unsafe { OwnedFd::from_raw_fd(result) }
        });
        if !self.slots.is_current(tag) {
            return self.figures.add(WireMetric::Stale, 1);
        }
        match installed {
            Some(fd) => {
                // ENOTCONN: the peer has reset the connection, and the receive says so.
                let _ = rustix::net::shutdown(&fd, Shutdown::Write);
                self.slots.state(tag.slot).in_flight &= !flight::SHUTDOWN;
                self.close_when_still(tag.slot);
            }
            None => self.shut_down_by_ring(tag.slot),
        }
    }

    fn shut_down_by_ring(&mut self, slot: Slot) {
        let entry = opcode::Shutdown::new(Fixed(slot), libc::SHUT_WR).build();
        // SAFETY: the entry points to no memory.
        unsafe { self.push(Op::Shutdown, slot, entry) };
    }

    /// Closes an open slot at once; unsent bytes are dropped and the peer may see RST.
    pub(super) fn abort(&mut self, slot: Slot) {
        if !self.is_open(slot) {
            return;
        }
        let value = (&raw const LINGER_NONE).cast();
        let length = size_of::<libc::linger>() as u32;
        let entry = opcode::SetSockOpt::new(
            Fixed(slot),
            libc::SOL_SOCKET as u32,
            libc::SO_LINGER as u32,
            value,
            length,
        );
        let entry = entry.build().flags(squeue::Flags::SKIP_SUCCESS);
        // SAFETY: the value is static. Kernels before 6.7 know no such operation and fail it, which is a
        // completion that nobody minds: then it is a plain close, and the unsent bytes live until the
        // peer takes them or the user timeout ends.
        unsafe { self.push(Op::Linger, slot, entry) };
        self.cancel_or_close(slot);
    }

    /// Closes a socket whose peer has sent its last byte: neither a shutdown nor a wait goes before it.
    pub(super) fn close_after_peer(&mut self, slot: Slot) {
        if self.is_open(slot) {
            self.cancel_or_close(slot);
        }
    }

    fn is_open(&mut self, slot: Slot) -> bool {
        let open = self.slots.get(slot).phase == Phase::Open;
        if !open {
            self.figures.add(WireMetric::EffectsIgnored, 1);
        }
        open
    }

    /// Bytes arrived for a slot that is closing.
    pub(super) fn discard(&mut self, slot: Slot, bytes: u32) {
        let state = self.slots.state(slot);
        state.discarded_bytes = state.discarded_bytes.saturating_add(bytes);
        if state.discarded_bytes > DISCARD_BYTES_MAX {
            self.figures.add(WireMetric::DiscardOverruns, 1);
            self.cancel_or_close(slot);
        }
    }

    /// Ends the closings whose peers sent no FIN in time.
    pub(super) fn end_discards(&mut self, now_ms: u64) {
        while let Some(&(deadline, slot, generation)) = self.discards.waiting.front() {
            let state = self.slots.get(slot);
            let waits = state.phase == Phase::Discarding && self.slots.generation(slot) == generation;
            if waits && deadline > now_ms {
                return;
            }
            self.discards.waiting.pop_front();
            if waits {
                self.figures.add(WireMetric::DiscardTimeouts, 1);
                self.cancel_or_close(slot);
            }
        }
    }

    /// When [`Wire::end_discards`] has work next.
    pub(super) fn next_discard_ms(&self) -> Option<u64> {
        self.discards.waiting.front().map(|&(deadline, ..)| deadline)
    }

    /// Cancels what the slot has in flight; without any, closes it.
    pub(super) fn cancel_or_close(&mut self, slot: Slot) {
        if self.mutation == Some(Mutation::CloseWithoutCancel) {
            return self.close(slot);
        }
        let state = self.slots.state(slot);
        state.phase = Phase::Cancelling;
        if state.in_flight == 0 {
            return self.close(slot);
        }
        let in_flight = state.in_flight;
        for (bit, op) in [(flight::RECV, Op::Recv), (flight::WRITABLE, Op::Writable)] {
            if in_flight & bit != 0 {
                self.cancel(slot, op);
            }
        }
    }

    /// Cancels one operation by its name, which the kernel finds in one bucket of its table: by descriptor
    /// it would look at every operation of every connection. What is cancelled completes by itself; the
    /// cancel completes only when it found nothing.
    fn cancel(&mut self, slot: Slot, op: Op) {
        let target = Tag::new(op, slot, self.slots.generation(slot)).pack();
        let entry = opcode::AsyncCancel::new(target).build().flags(squeue::Flags::SKIP_SUCCESS);
        // SAFETY: the entry points to no memory.
        unsafe { self.push(Op::Cancel, slot, entry) };
    }

    /// A cancel found nothing. Mostly the operation had completed a moment before, and its completion was
    /// seen by now; should it still be out, it is looked for by its descriptor.
    pub(super) fn cancel_by_descriptor(&mut self, slot: Slot) {
        let state = self.slots.state(slot);
        let out = state.in_flight & (flight::RECV | flight::WRITABLE) != 0;
        if state.phase != Phase::Cancelling || !out || state.in_flight & flight::CANCEL != 0 {
            return;
        }
        state.in_flight |= flight::CANCEL;
        let builder = CancelBuilder::fd(Fixed(slot)).all();
        // SAFETY: the entry points to no memory.
        unsafe { self.push(Op::CancelAll, slot, opcode::AsyncCancel2::new(builder).build()) };
    }

    /// A completion of a slot in `Cancelling` was seen and its bit cleared.
    pub(super) fn close_when_still(&mut self, slot: Slot) {
        let state = self.slots.get(slot);
        if state.phase == Phase::Cancelling && state.in_flight == 0 {
            self.close(slot);
        }
    }

    /// Closes the direct descriptor. Nothing of the slot is in flight.
    pub(super) fn close(&mut self, slot: Slot) {
        self.slots.state(slot).phase = Phase::Closing;
        // SAFETY: the entry points to no memory.
        unsafe { self.push(Op::Close, slot, opcode::Close::new(Fixed(slot)).build()) };
    }

    /// The slot's close completed, or the kernel has given the slot to the next connection, which proves
    /// the same. Returns whether the engine has to hear of it.
    pub(super) fn freed(&mut self, slot: Slot) -> bool {
        let kept = self.slots.state(slot).kept;
        self.slots.free(slot);
        kept
    }
}
