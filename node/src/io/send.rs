//! Sending: all sends of a turn in few enters, and only failures come back.
//!
//! Owns the submission of a turn's sends. Each is `MSG_DONTWAIT | MSG_WAITALL | MSG_NOSIGNAL` with
//! `CQE_SKIP_SUCCESS`:
//! - `MSG_DONTWAIT`: the kernel finishes or fails the send while it is submitted, and never keeps it;
//! - `MSG_WAITALL`: a send that took only a part fails with the number of bytes it took. Without it a
//!   short send is a success, whose completion is skipped: bytes are lost silently;
//! - `MSG_NOSIGNAL`: a broken socket is an error and no SIGPIPE. Newer kernels (6.18, seen) add it to
//!   every send of a ring by themselves.
//!
//! Invariant: pointers into the engine's bytes live from `prepare` to the return of the submission
//! below, in which time only `Engine::bytes` is called.

use io_uring::types::Fixed;
use io_uring::{opcode, squeue};
use ringmain_proto::time::Now;

use super::options::Mutation;
use super::slots::Phase;
use super::tag::{Op, Tag};
use super::wire::Wire;
use crate::core::engine::{Engine, Send, Slot};

/// What the sends of a turn came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    pub(super) sends: u64,
    pub(super) short: u64,
    pub(super) bytes: u64,
}

impl std::ops::AddAssign for Sent {
    fn add_assign(&mut self, other: Self) {
        self.sends += other.sends;
        self.short += other.short;
        self.bytes += other.bytes;
    }
}

/// The failed sends of a turn: (slot, bytes taken or negative errno). Kept to reuse its memory.
#[derive(Debug, Default)]
pub(super) struct Failures(Vec<(Slot, i32)>);

/// The flags of every send, less what a mutation drops.
pub(super) fn flags(mutation: Option<Mutation>) -> i32 {
    let drops = |fault, flag| if mutation == Some(fault) { 0 } else { flag };
    drops(Mutation::SendMayWait, libc::MSG_DONTWAIT)
        | drops(Mutation::SendMayBeShort, libc::MSG_WAITALL)
        | libc::MSG_NOSIGNAL
}

/// Submits the sends that `engine` has prepared, reports those that failed, and settles the turn.
/// The kernel runs deferred work in the same enter, and its completions wait in the ring's queue; not where
/// `ready_max` wait there already: the queue would only grow.
pub(super) fn send_all<E: Engine>(
    wire: &mut Wire,
    engine: &mut E,
    failures: &mut Failures,
    ready_max: usize,
    now: Now,
) -> Sent {
    let before = wire.ring.ready();
    let mut sent = submit(wire, engine, ready_max);
    let is_send = |user_data| Tag::unpack(user_data).op == Op::Send;
    wire.ring.take_matching(
        before,
        |c| is_send(c.user_data),
        |c| {
            failures.0.push((Tag::unpack(c.user_data).slot, c.result));
        },
    );
    sent.short = failures.0.len() as u64;
    sent.bytes -= refused_bytes(engine.sends(), &failures.0);
    for &(slot, result) in &failures.0 {
        engine.short(slot, result.max(0) as u32, now);
    }
    engine.settle(now);
    for (slot, result) in failures.0.drain(..) {
        if result < 0 && !is_shortage(-result) {
            engine.broken(slot, -result, now);
        }
    }
    sent
}

fn submit<E: Engine>(wire: &mut Wire, engine: &E, ready_max: usize) -> Sent {
    let mut sent = Sent::default();
    let flags = flags(wire.mutation);
    for send in engine.sends() {
        let bytes = engine.bytes(send);
        debug_assert_eq!(bytes.len(), send.len as usize, "the bytes of {send:?}");
        if wire.slots.get(send.slot).phase != Phase::Open {
            debug_assert!(false, "a send to slot {}, which is not open", send.slot);
            continue;
        }
        let entry = opcode::Send::new(Fixed(send.slot), bytes.as_ptr(), bytes.len() as u32).flags(flags);
        let entry = entry.build().flags(squeue::Flags::SKIP_SUCCESS);
        // SAFETY: `bytes` borrows from `engine`, which is borrowed until this function returns, after
        // the submission below; with MSG_DONTWAIT the kernel has then copied or refused them.
        unsafe { wire.push(Op::Send, send.slot, entry) };
        sent.sends += 1;
        sent.bytes += bytes.len() as u64;
    }
    if wire.ring.ready() < ready_max {
        wire.ring.submit_and_run(ready_max);
    } else {
        wire.ring.submit();
    }
    sent
}

/// Bytes that were offered and not taken. Failures come in the order of their sends.
fn refused_bytes(sends: &[Send], failures: &[(Slot, i32)]) -> u64 {
    let mut sends = sends.iter();
    let refused = |&(slot, result): &(Slot, i32)| {
        let send = sends.find(|send| send.slot == slot);
        send.map_or(0, |send| u64::from(send.len).saturating_sub(result.max(0) as u64))
    };
    failures.iter().map(refused).sum()
}

/// Whether an errno says "not now" rather than "never".
fn is_shortage(errno: i32) -> bool {
    matches!(errno, libc::EAGAIN | libc::ENOMEM | libc::ENOBUFS | libc::EINTR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_bytes_are_found_in_the_order_of_the_sends() {
        let send = |slot| Send { slot, len: 100, source: crate::core::engine::Source::Own };
        let sends = [send(3), send(1), send(9), send(4)];
        let check = |failures: &[(Slot, i32)], expected| {
            assert_eq!(refused_bytes(&sends, failures), expected, "{failures:?}");
        };
        check(&[], 0);
        check(&[(1, 30)], 70);
        check(&[(3, -libc::EAGAIN), (4, 99)], 101);
        check(&[(3, 0), (1, 0), (9, 0), (4, -libc::EPIPE)], 400);
    }

    #[test]
    fn each_mutation_drops_its_flag() {
        let all = libc::MSG_DONTWAIT | libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        assert_eq!(flags(None), all);
        assert_eq!(flags(Some(Mutation::SendMayWait)), all & !libc::MSG_DONTWAIT);
        assert_eq!(flags(Some(Mutation::SendMayBeShort)), all & !libc::MSG_WAITALL);
        assert_eq!(flags(Some(Mutation::CloseWithoutCancel)), all);
    }
}
