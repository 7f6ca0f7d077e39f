//! Handing accepted sockets to the emptiest shard.
//!
//! Owns the choice what becomes of an accepted socket: kept, handed over, or refused when the whole node
//! is full. `SO_REUSEPORT` goes on choosing a full shard, so only the shard itself can mend that: it
//! sends the socket to another shard's table (`IORING_MSG_SEND_FD`) before its first receive, and closes
//! its own descriptor. A place in the other shard is taken before, so that it cannot overflow.

use io_uring::opcode;
use io_uring::types::{DestinationSlot, Fd, Fixed};

use super::mesh::Mesh;
use super::ring::Completion;
use super::slots::Phase;
use super::tag::{Op, Tag};
use super::wire::Wire;
use crate::core::engine::{ShardIndex, Slot};

/// What becomes of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It stays in this shard: a place was taken for it.
    Kept,
    /// It is on its way to another shard.
    OnItsWay,
    /// The node is full.
    Refused,
}

/// A socket on its way.
#[derive(Clone, Copy, Debug)]
struct Transit {
    slot: Slot,
    to: ShardIndex,
    spec: u16,
}

/// The sockets that a shard is handing over.
#[derive(Debug, Default)]
pub(super) struct Handovers {
    /// At most as many as the table has slots beyond `slots_max`: each stands in one of them.
    transits: Vec<Transit>,
}

impl Handovers {
    /// Decides about a socket that was accepted into the free slot `slot`, and sets it on its way.
    pub(super) fn place<M>(
        &mut self,
        wire: &mut Wire,
        mesh: &Mesh<M>,
        own: ShardIndex,
        slot: Slot,
        spec: u16,
    ) -> Fate {
        if mesh.reserve(own) {
            wire.slots.take(slot, Phase::Open);
            return Fate::Kept;
        }
        wire.slots.take(slot, Phase::Transit);
        let target = mesh.reserve_emptiest(own).map(|to| (to, mesh.ring_fd(to)));
        match target {
            Some((to, Some(ring_fd))) => {
                self.send(wire, ring_fd, Transit { slot, to, spec });
                Fate::OnItsWay
            }
            Some((to, None)) => {
                mesh.release(to);
                wire.close(slot);
                Fate::Refused
            }
            None => {
                wire.close(slot);
                Fate::Refused
            }
        }
    }

    fn send(&mut self, wire: &mut Wire, ring_fd: i32, transit: Transit) {
        self.transits.push(transit);
        let there = Tag::of(Op::HandedOver, u32::from(transit.spec)).pack();
        let entry = opcode::MsgRingSendFd::new(
            Fd(ring_fd),
            Fixed(transit.slot),
            DestinationSlot::auto_target(),
            there,
        );
        // SAFETY: the entry points to no memory. The ring's descriptor belongs to a shard of this
        // process; if that shard has just stopped, the operation fails, or the message is lost with it.
        unsafe { wire.push(Op::HandOver, transit.slot, entry.build()) };
    }

    /// The completion of a hand-over. A socket that did not get through is kept if there is room again,
    /// or refused. Gives the listener's specification with the fate; `OnItsWay` means that it arrived.
    pub(super) fn completed<M>(
        &mut self,
        wire: &mut Wire,
        mesh: &Mesh<M>,
        own: ShardIndex,
        completion: Completion,
    ) -> (Fate, Slot, u16) {
        let slot = Tag::unpack(completion.user_data).slot;
        let position = self.transits.iter().position(|transit| transit.slot == slot);
        let transit = self.transits.swap_remove(position.expect("completions are of what was sent"));
        let fate = if completion.result >= 0 {
            Fate::OnItsWay
        } else {
            mesh.release(transit.to);
            if mesh.reserve(own) { Fate::Kept } else { Fate::Refused }
        };
        if fate == Fate::Kept {
            let state = wire.slots.state(slot);
            state.phase = Phase::Open;
            state.kept = true;
        } else {
            wire.close(slot);
        }
        (fate, slot, transit.spec)
    }
}
