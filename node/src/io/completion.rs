//! What each completion means.
//!
//! Owns the step from a completion of the ring to a call of the engine or a step of a slot's life. A
//! completion of a slot's earlier holder is dropped here, after its receive buffer was given back.

use io_uring::cqueue;
use ringmain_proto::time::Now;

use super::accept::Accepted;
use super::handover::Fate;
use super::metrics::WireMetric;
use super::ring::Completion;
use super::sleep::doorbell_completed;
use super::slots::{Phase, flight};
use super::tag::{Op, Tag};
use super::turn::ShardLoop;
use crate::core::engine::{Engine, Slot};

/// Completions between two looks at the clock: 64 are about 0.1 ms.
const CLOCK_STRIDE: usize = 64;

impl<E: Engine> ShardLoop<E> {
    /// Handles completions, as many as a turn may.
    pub(super) fn completions(&mut self, started_ns: u64, now: Now) {
        let mut count = 0;
        while count < self.options.completions_max {
            let Some(completion) = self.wire.ring.pop() else { break };
            count += 1;
            self.completion(completion, now);
            if count % CLOCK_STRIDE == 0 && self.is_over(started_ns) {
                break;
            }
        }
        self.wire.figures.add(WireMetric::Completions, count as u64);
    }

    fn completion(&mut self, completion: Completion, now: Now) {
        let tag = Tag::unpack(completion.user_data);
        match tag.op {
            Op::Accept => self.accepted(completion, now),
            Op::HandOver => self.handed_over(completion, now),
            Op::HandedOver => {
                // The place was taken by the shard that sent it. Failures are completions over there.
                if let Ok(slot) = u32::try_from(completion.result) {
                    self.reclaim_if_closing(slot);
                    self.wire.slots.take(slot, Phase::Open);
                    self.open(slot, tag.slot as u16, now);
                }
            }
            Op::Timer => self.sleeper.timer_completed(),
            Op::Doorbell => doorbell_completed(&mut self.wire.ring, &self.seat.doorbell, completion),
            Op::Recv => self.received(tag, completion, now),
            // A send that completes outside its turn, a missing SO_LINGER, a timer that had just gone
            // off, a cancel whose target had just ended: nothing follows from them.
            Op::Send | Op::Linger | Op::TimerUpdate | Op::AcceptCancel => {}
            Op::Install => self.wire.shut_down(tag, completion.result),
            Op::Writable | Op::Shutdown | Op::CancelAll | Op::Close => self.stepped(tag, now),
            Op::Cancel => self.found_nothing(tag),
        }
    }

    fn accepted(&mut self, completion: Completion, now: Now) {
        let accepted = self.acceptor.completed(&mut self.wire, completion, now.mono_ms);
        let Accepted::Socket { slot, spec } = accepted else { return };
        self.reclaim_if_closing(slot);
        let (mesh, own) = (&self.seat.mesh, self.seat.index);
        match self.handovers.place(&mut self.wire, mesh, own, slot, spec) {
            Fate::Kept => self.open(slot, spec, now),
            Fate::OnItsWay => {}
            Fate::Refused => self.counts.refused += 1,
        }
    }

    fn handed_over(&mut self, completion: Completion, now: Now) {
        let (mesh, own) = (&self.seat.mesh, self.seat.index);
        let (fate, slot, spec) = self.handovers.completed(&mut self.wire, mesh, own, completion);
        match fate {
            Fate::Kept => self.open(slot, spec, now),
            Fate::OnItsWay => self.counts.handed_over += 1,
            Fate::Refused => self.counts.refused += 1,
        }
    }

    fn open(&mut self, slot: Slot, spec: u16, now: Now) {
        self.counts.accepted += 1;
        self.wire.arm_recv(slot);
        self.engine.accept(slot, spec, now);
    }

    /// A new socket in a slot whose close has not completed yet proves that it has: the two completions
    /// may come in either order.
    fn reclaim_if_closing(&mut self, slot: Slot) {
        if self.wire.slots.get(slot).phase == Phase::Closing {
            self.freed(slot);
        }
    }

    fn freed(&mut self, slot: Slot) {
        if self.wire.freed(slot) {
            self.seat.mesh.release(self.seat.index);
            self.engine.released(slot);
        }
    }

    fn received(&mut self, tag: Tag, completion: Completion, now: Now) {
        let buffer = cqueue::buffer_select(completion.flags);
        if self.is_current(tag) {
            let slot = tag.slot;
            if !cqueue::more(completion.flags) {
                self.wire.slots.state(slot).in_flight &= !flight::RECV;
            }
            match self.wire.slots.get(slot).phase {
                Phase::Open => self.input(slot, completion.result, buffer, now),
                Phase::Discarding => self.discarded(slot, completion.result),
                _ => self.wire.close_when_still(slot),
            }
        }
        if let Some(buffer) = buffer {
            self.wire.buffers.give_back(buffer);
        }
    }

    fn input(&mut self, slot: Slot, result: i32, buffer: Option<u16>, now: Now) {
        match (result, buffer) {
            (1.., Some(buffer)) => {
                self.counts.bytes_in += result as u64;
                self.engine.input(slot, self.wire.buffers.chunk(buffer, result as usize), now);
                self.wire.keep_receiving(slot);
            }
            (0, _) => {
                self.wire.slots.state(slot).ended = true;
                self.engine.input_ended(slot, now);
            }
            (result, _) if is_passing(-result) => {
                self.wire.figures.add(WireMetric::RecvStarved, 1);
                self.wire.keep_receiving(slot);
            }
            (result, _) => self.engine.broken(slot, -result, now),
        }
    }

    fn discarded(&mut self, slot: Slot, result: i32) {
        match result {
            1.. => {
                self.wire.discard(slot, result as u32);
                if self.wire.slots.get(slot).phase == Phase::Discarding {
                    self.wire.keep_receiving(slot);
                }
            }
            result if result < 0 && is_passing(-result) => self.wire.keep_receiving(slot),
            _ => self.wire.cancel_or_close(slot),
        }
    }

    /// A step of a slot's life, or its POLLOUT.
    fn stepped(&mut self, tag: Tag, now: Now) {
        if !self.is_current(tag) {
            return;
        }
        let slot = tag.slot;
        if tag.op == Op::Close {
            return self.freed(slot);
        }
        let state = self.wire.slots.state(slot);
        state.in_flight &= !match tag.op {
            Op::Writable => flight::WRITABLE,
            Op::Shutdown => flight::SHUTDOWN,
            _ => flight::CANCEL,
        };
        match state.phase {
            Phase::Open if tag.op == Op::Writable => self.engine.writable(slot, now),
            _ => self.wire.close_when_still(slot),
        }
    }

    /// A cancel failed.
    fn found_nothing(&mut self, tag: Tag) {
        if self.wire.slots.is_current(tag) {
            self.wire.cancel_by_descriptor(tag.slot);
        }
    }

    fn is_current(&mut self, tag: Tag) -> bool {
        let current = self.wire.slots.is_current(tag);
        if !current {
            self.wire.figures.add(WireMetric::Stale, 1);
        }
        current
    }
}

/// Whether a receive that ended with this errno is simply armed again.
fn is_passing(errno: i32) -> bool {
    matches!(errno, libc::ENOBUFS | libc::EAGAIN | libc::EINTR | libc::ENOMEM)
}
