//! Accepting: from the kernel's queue of a listener into a slot of the table.
//!
//! Owns the accept operations of every listener. While the table has room one multishot accept per
//! listener is armed. A multishot accept that meets a full table takes one connection, closes it, and
//! leaves the next client hanging; so as the table fills, it is cancelled and connections are accepted
//! one by one, never more at a time than there are free slots.
//!
//! Draining a listener: its accept is cancelled, its queue is cut to nothing and emptied, and then it is
//! closed.

use std::os::fd::AsRawFd;

use io_uring::types::{CancelBuilder, DestinationSlot, Fd};
use io_uring::{cqueue, opcode};

use super::limits::SLOTS_MARGIN;
use super::listen::ShardListener;
use super::metrics::WireMetric;
use super::ring::Completion;
use super::tag::{Op, Tag};
use super::wire::Wire;

/// How long a listener rests after the kernel failed to accept for want of memory or descriptors, in
/// milliseconds.
const RETRY_MS: u64 = 100;

/// What is armed on a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Armed {
    Nothing,
    One,
    Multishot,
    /// A multishot whose cancel is under way.
    Cancelled,
}

#[derive(Debug)]
struct Listening {
    listener: ShardListener,
    armed: Armed,
    /// Not before this moment, after a failure.
    retry_ms: Option<u64>,
}

/// The listeners of one shard.
#[derive(Debug)]
pub(super) struct Acceptor {
    /// `None`: closed. The index is part of the tags.
    listeners: Vec<Option<Listening>>,
    draining: bool,
    /// Where arming begins, so that no listener is always the last to get a slot.
    next: usize,
    /// Free slots below which accepts are single: what all multishots together may take before their
    /// completions are seen, and the margin.
    single_below: u32,
    /// Every listener has its multishot accept: nothing to do until one ends or the table fills.
    settled: bool,
}

/// What an accept brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// A socket in this slot, from a listener of this specification.
    Socket {
        /// The slot.
        slot: u32,
        /// The listener's specification.
        spec: u16,
    },
    /// Nothing.
    Nothing,
}

impl Acceptor {
    /// Accepts from `listeners` once [`Acceptor::arm`] is called.
    pub(super) fn new(listeners: Vec<ShardListener>, completion_entries: u32) -> Self {
        let single_below = completion_entries + listeners.len() as u32 + SLOTS_MARGIN;
        let listening = |listener| Some(Listening { listener, armed: Armed::Nothing, retry_ms: None });
        let listeners = listeners.into_iter().map(listening).collect();
        Self { listeners, draining: false, next: 0, single_below, settled: false }
    }

    /// Stops accepting for good, once what is queued has been accepted.
    pub(super) fn drain(&mut self, wire: &mut Wire) {
        if std::mem::replace(&mut self.draining, true) {
            return;
        }
        for (index, listening) in self.listeners.iter_mut().enumerate() {
            let Some(listening) = listening else { continue };
            if matches!(listening.armed, Armed::One | Armed::Multishot) {
                listening.cancel(wire, index);
            }
            // A queue of 0 keeps further handshakes out while this one is emptied. It cannot fail on a
            // listening socket; if it did, the queue would only be emptied of more.
            let _ = rustix::net::listen(&listening.listener, 0);
            listening.retry_ms = None;
        }
    }

    /// When a listener that rests is to be tried again.
    pub(super) fn next_retry_ms(&self) -> Option<u64> {
        self.listeners.iter().flatten().filter_map(|listening| listening.retry_ms).min()
    }

    /// Brings what is armed in line with how much room the table has. Cheap when nothing changes.
    pub(super) fn arm(&mut self, wire: &mut Wire, now_ms: u64) {
        if self.draining {
            return self.empty_queues(wire, now_ms);
        }
        let free = wire.free_slots();
        let single = free < self.single_below;
        if self.settled && !single {
            return;
        }
        let armed_singles = self.count(Armed::One);
        let mut singles_left = free.saturating_sub(armed_singles);
        for step in 0..self.listeners.len() {
            let index = (self.next + step) % self.listeners.len();
            let Some(listening) = &mut self.listeners[index] else { continue };
            match (listening.armed, single) {
                (Armed::Multishot, true) => listening.cancel(wire, index),
                (Armed::Nothing, _) if listening.rests(now_ms) => {}
                (Armed::Nothing, false) => listening.arm_multishot(wire, index),
                (Armed::Nothing, true) if singles_left > 0 => {
                    singles_left -= 1;
                    listening.arm_one(wire, index);
                    self.next = index + 1;
                }
                _ => {}
            }
        }
        let has_multishot = |listening: &Listening| listening.armed == Armed::Multishot;
        self.settled = self.listeners.iter().flatten().all(has_multishot);
    }

    /// Draining: accepts what still waits, one by one, and closes the listeners where nothing does.
    fn empty_queues(&mut self, wire: &mut Wire, now_ms: u64) {
        let mut slots_left = wire.free_slots().saturating_sub(self.count(Armed::One));
        for (index, place) in self.listeners.iter_mut().enumerate() {
            let Some(listening) = place else { continue };
            match (listening.armed, listening.somebody_waits()) {
                (Armed::Nothing, true) if slots_left > 0 => {
                    slots_left -= 1;
                    listening.arm_one(wire, index);
                    // Another shard may be faster on a unix socket: then nothing completes here.
                    listening.retry_ms = Some(now_ms + RETRY_MS);
                }
                (Armed::Nothing, false) => *place = None,
                (Armed::One, false) => listening.cancel(wire, index),
                _ => {}
            }
        }
    }

    fn count(&self, armed: Armed) -> u32 {
        self.listeners.iter().flatten().filter(|listening| listening.armed == armed).count() as u32
    }

    /// Handles the completion of an accept.
    pub(super) fn completed(&mut self, wire: &mut Wire, completion: Completion, now_ms: u64) -> Accepted {
        let index = Tag::unpack(completion.user_data).slot as usize;
        let listening = self.listeners[index].as_mut().expect("closed only with nothing armed");
        if !cqueue::more(completion.flags) {
            listening.armed = Armed::Nothing;
            self.settled = false;
        }
        if completion.result >= 0 {
            let spec = listening.listener.spec_index;
            return Accepted::Socket { slot: completion.result as u32, spec };
        }
        match -completion.result {
            libc::ECANCELED => {}
            errno => {
                wire.figures.add(WireMetric::AcceptErrors, 1);
                // ECONNABORTED and the errors of the network are the client's (accept(2)); the others
                // are ours and last.
                let ours = matches!(
                    errno,
                    libc::EAGAIN | libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM | libc::EINVAL
                );
                listening.retry_ms = ours.then_some(now_ms + RETRY_MS);
            }
        }
        Accepted::Nothing
    }
}

impl Listening {
    fn rests(&mut self, now_ms: u64) -> bool {
        let rests = self.retry_ms.is_some_and(|retry_ms| retry_ms > now_ms);
        if !rests {
            self.retry_ms = None;
        }
        rests
    }

    /// Whether a connection waits to be accepted.
    fn somebody_waits(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    fn arm_multishot(&mut self, wire: &mut Wire, index: usize) {
        self.armed = Armed::Multishot;
        let entry = opcode::AcceptMulti::new(self.fd()).allocate_file_index(true).build();
        // SAFETY: no address is asked for, so the entry points to no memory.
        unsafe { wire.ring.push(&entry.user_data(Tag::of(Op::Accept, index as u32).pack())) };
    }

    fn arm_one(&mut self, wire: &mut Wire, index: usize) {
        self.armed = Armed::One;
        let entry = opcode::Accept::new(self.fd(), std::ptr::null_mut(), std::ptr::null_mut())
            .file_index(Some(DestinationSlot::auto_target()))
            .build();
        // SAFETY: the addresses are null, so the entry points to no memory.
        unsafe { wire.ring.push(&entry.user_data(Tag::of(Op::Accept, index as u32).pack())) };
    }

    fn cancel(&mut self, wire: &mut Wire, index: usize) {
        self.armed = Armed::Cancelled;
        let builder = CancelBuilder::user_data(Tag::of(Op::Accept, index as u32).pack());
        let entry = opcode::AsyncCancel2::new(builder).build();
        // SAFETY: the entry points to no memory.
        unsafe { wire.ring.push(&entry.user_data(Tag::of(Op::AcceptCancel, index as u32).pack())) };
    }

    fn fd(&self) -> Fd {
        Fd(self.listener.as_raw_fd())
    }
}
