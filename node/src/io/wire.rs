//! A shard's sockets as the loop sees them: the ring, its buffers and its slots together.
//!
//! Owns the operations that concern one slot and no engine: arming receives and POLLOUTs. Accepting,
//! sending and closing have modules of their own that work on it.

use io_uring::{opcode, squeue, types::Fixed};

use super::close::Discards;
use super::doorbell::{Bell, Doorbell};
use super::kernel::StartError;
use super::limits::table_slots;
use super::metrics::{LoopFigures, WireMetric};
use super::options::{Mutation, ShardOptions};
use super::recv::{BUFFER_GROUP, RecvBuffers};
use super::ring::{Ring, RingSizes};
use super::slots::{Phase, SlotState, Slots, flight};
use super::tag::{Op, Tag};
use crate::core::engine::Slot;

/// The sockets of one shard.
pub(super) struct Wire {
    // The ring is dropped before the buffers that it writes into.
    pub(super) ring: Ring,
    pub(super) buffers: RecvBuffers,
    pub(super) slots: Slots,
    pub(super) discards: Discards,
    pub(super) figures: LoopFigures,
    /// Slots of the table.
    pub(super) table_slots: u32,
    /// A fault of the wire's own tests.
    pub(super) mutation: Option<Mutation>,
}

impl Wire {
    /// Sets up the ring of a shard on the calling thread.
    pub(super) fn open(
        options: &ShardOptions,
        doorbell: &Doorbell,
        listeners: usize,
    ) -> Result<Self, StartError> {
        let turn = &options.turn;
        let table_slots = table_slots(options.slots_max, listeners);
        let sizes = RingSizes {
            entries: turn.ring_entries,
            completion_entries: turn.completion_entries,
            table_slots,
        };
        let ring = Ring::open(sizes, doorbell.fd(Bell::Sleep))?;
        let buffers = RecvBuffers::open(&ring, turn.recv_buffers, turn.recv_buffer_bytes)?;
        Ok(Self {
            ring,
            buffers,
            slots: Slots::default(),
            discards: Discards::default(),
            figures: LoopFigures::new(),
            table_slots,
            mutation: options.mutation,
        })
    }

    /// Slots of the table that nothing stands in.
    pub(super) fn free_slots(&self) -> u32 {
        self.table_slots - self.slots.taken()
    }

    /// Queues an operation of a slot's present holder.
    ///
    /// # Safety
    /// As for [`Ring::push`].
    pub(super) unsafe fn push(&mut self, op: Op, slot: Slot, entry: squeue::Entry) {
        let tag = Tag::new(op, slot, self.slots.generation(slot));
        // SAFETY: the caller's promise is the one that is asked for.
        unsafe { self.ring.push(&entry.user_data(tag.pack())) };
    }

    /// Arms the multishot receive.
    pub(super) fn arm_recv(&mut self, slot: Slot) {
        self.slots.state(slot).in_flight |= flight::RECV;
        let entry = opcode::RecvMulti::new(Fixed(slot), BUFFER_GROUP).build();
        // SAFETY: the entry points to no memory: the kernel picks one of the provided buffers, which
        // outlive the ring.
        unsafe { self.push(Op::Recv, slot, entry) };
    }

    /// Arms the receive again if it has ended.
    pub(super) fn keep_receiving(&mut self, slot: Slot) {
        if self.slots.get(slot).in_flight & flight::RECV == 0 {
            self.arm_recv(slot);
        }
    }

    /// Arms one POLLOUT for an open slot, unless one is armed.
    pub(super) fn await_writable(&mut self, slot: Slot) {
        let SlotState { phase, in_flight, .. } = self.slots.get(slot);
        if phase != Phase::Open {
            return self.figures.add(WireMetric::EffectsIgnored, 1);
        }
        if in_flight & flight::WRITABLE != 0 {
            return;
        }
        let state = self.slots.state(slot);
        state.in_flight |= flight::WRITABLE;
        let entry = opcode::PollAdd::new(Fixed(slot), libc::POLLOUT as u32).build();
        // SAFETY: the entry points to no memory.
        unsafe { self.push(Op::Writable, slot, entry) };
    }
}
