//! What a completion belongs to: (operation, generation, slot) in the 64 bits of `user_data`.
//!
//! Owns the packing only. The generation is 24 bits of a slot's life counter: a completion of an earlier
//! holder is told apart unless the slot changed hands 16 million times while it was under way.

/// Operations of the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Op {
    /// Accept on the listener in place of a slot.
    Accept = 1,
    /// Cancel of a listener's accept.
    AcceptCancel,
    /// Multishot receive.
    Recv,
    /// Send; completes only when it failed or was short.
    Send,
    /// One POLLOUT.
    Writable,
    /// A file descriptor of its own for a socket that is to be shut down.
    Install,
    /// shutdown(WR) where the kernel gives no such descriptor.
    Shutdown,
    /// SO_LINGER 0 before an abort; completes only when it failed.
    Linger,
    /// Cancel of one thing that a slot has in flight; completes only when it found nothing.
    Cancel,
    /// Cancel of all that a slot has in flight.
    CancelAll,
    /// Close of a direct descriptor.
    Close,
    /// A socket on its way to another shard.
    HandOver,
    /// A socket that another shard handed over; the listener's specification is in place of a slot.
    HandedOver,
    /// The timer that ends a sleep.
    Timer,
    /// An earlier time for that timer; completes only when it failed.
    TimerUpdate,
    /// The doorbell rang.
    Doorbell,
}

const OPS: [Op; 16] = [
    Op::Accept,
    Op::AcceptCancel,
    Op::Recv,
    Op::Send,
    Op::Writable,
    Op::Install,
    Op::Shutdown,
    Op::Linger,
    Op::Cancel,
    Op::CancelAll,
    Op::Close,
    Op::HandOver,
    Op::HandedOver,
    Op::Timer,
    Op::TimerUpdate,
    Op::Doorbell,
];

/// The bits of a slot's life counter that a tag carries.
pub(super) const GENERATION_MASK: u32 = 0x00ff_ffff;

/// An unpacked `user_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) op: Op,
    pub(super) generation: u32,
    /// The slot, or what the operation puts in its place.
    pub(super) slot: u32,
}

impl Tag {
    pub(super) fn new(op: Op, slot: u32, generation: u32) -> Self {
        debug_assert!(generation <= GENERATION_MASK);
        Self { op, generation, slot }
    }

    /// A tag of something that is no connection.
    pub(super) fn of(op: Op, index: u32) -> Self {
        Self::new(op, index, 0)
    }

    pub(super) fn pack(self) -> u64 {
        u64::from(self.op as u8) << 56 | u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// # Panics
    /// On a value that was never packed: the kernel gives back what it was given.
    pub(super) fn unpack(user_data: u64) -> Self {
        let op = OPS[(user_data >> 56) as usize - 1];
        Self { op, generation: (user_data >> 32) as u32 & GENERATION_MASK, slot: user_data as u32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_survives_packing() {
        for op in OPS {
            for (slot, generation) in [(0, 0), (1, 1), (u32::MAX, GENERATION_MASK), (7, 0x0080_0000)] {
                let tag = Tag::new(op, slot, generation);
                assert_eq!(Tag::unpack(tag.pack()), tag);
            }
        }
    }
}
