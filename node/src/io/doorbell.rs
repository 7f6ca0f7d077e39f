//! The doorbell of a shard: how other threads wake it.
//!
//! Owns two eventfds, one for each way in which a shard waits, and the flag that says whether and how it
//! does. It does not know what work waits: the inboxes are looked at after every wait. A ringer publishes
//! its work first and rings then; an eventfd is written only when the shard waits, so a busy shard costs
//! its peers one atomic load.
//!
//! Why two: the sleep's eventfd is also the one that the kernel signals when the ring has work. Were it
//! (or any eventfd) polled by the ring at the same time, a write would signal it from within an eventfd's
//! own wake-up; the kernel defers that by an RCU grace period, and 6.18 loses it the second time (seen).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

mod atomic {
    pub(super) use std::sync::atomic::{AtomicU8, Ordering, fence};
}
#[path = "bell_flag.rs"]
mod bell_flag;

use atomic::Ordering;
pub(super) use bell_flag::Bell;
use bell_flag::BellFlag;

/// The doorbell of one shard, shared with everybody who may wake it.
#[derive(Debug)]
pub(crate) struct Doorbell {
    nap: OwnedFd,
    sleep: OwnedFd,
    flag: BellFlag,
    origin: Instant,
    /// When the last ring that woke the shard was given, in nanoseconds since `origin`; 0: served.
    rung_ns: AtomicU64,
    /// How often an eventfd was written.
    rings: AtomicU64,
}

impl Doorbell {
    /// A doorbell whose times count from `origin`.
    pub(crate) fn new(origin: Instant) -> std::io::Result<Self> {
        Ok(Self {
            // Blocking: a read through a ring waits for a write instead of failing, and a write could
            // only block at 2^64 - 1 unread ones.
            nap: eventfd(0, EventfdFlags::CLOEXEC)?,
            sleep: eventfd(0, EventfdFlags::CLOEXEC)?,
            flag: BellFlag::new(),
            origin,
            rung_ns: AtomicU64::new(0),
            rings: AtomicU64::new(0),
        })
    }

    /// Wakes the shard if it waits. Call after publishing the work. Safe in a signal handler: it reads a
    /// clock, touches atomics and writes eight bytes.
    pub(crate) fn ring(&self) {
        let Some(bell) = self.flag.ring() else { return };
        self.rung_ns.store((self.origin.elapsed().as_nanos() as u64).max(1), Ordering::Relaxed);
        self.rings.fetch_add(1, Ordering::Relaxed);
        let eventfd = self.fd(bell);
        // The only error of a valid, blocking eventfd is EINTR.
        while rustix::io::write(eventfd, &1_u64.to_ne_bytes()) == Err(rustix::io::Errno::INTR) {}
    }

    /// The eventfd that is written for a shard that waits like this.
    pub(super) fn fd(&self, bell: Bell) -> BorrowedFd<'_> {
        match bell {
            Bell::Nap => self.nap.as_fd(),
            Bell::Sleep => self.sleep.as_fd(),
        }
    }

    /// The shard is about to wait. It must look at its inboxes once more after this.
    pub(super) fn fall_asleep(&self, bell: Bell) {
        self.flag.fall_asleep(bell);
    }

    /// The shard is awake. Returns when it was rung, in nanoseconds since the origin, if it was.
    pub(crate) fn wake_up(&self) -> Option<u64> {
        self.flag.wake_up();
        match self.rung_ns.load(Ordering::Relaxed) {
            0 => None,
            rung_ns => {
                self.rung_ns.store(0, Ordering::Relaxed);
                Some(rung_ns)
            }
        }
    }

    /// How often an eventfd was written since the start.
    pub(crate) fn rings(&self) -> u64 {
        self.rings.load(Ordering::Relaxed)
    }
}

/// Wakes one shard from any thread or from a signal handler.
#[derive(Clone, Debug)]
pub struct Waker(pub(crate) Arc<Doorbell>);

impl Waker {
    /// Makes the shard run one turn, if it waits. Cheap when it does not.
    pub fn wake(&self) {
        self.0.ring();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bell_is_written_once_per_wait_and_only_then() {
        let doorbell = Doorbell::new(Instant::now()).unwrap();
        let count = |bell| {
            rustix::io::ioctl_fionbio(doorbell.fd(bell), true).unwrap();
            let mut bytes = [0; 8];
            match rustix::io::read(doorbell.fd(bell), &mut bytes) {
                Ok(_) => u64::from_ne_bytes(bytes),
                Err(_) => 0,
            }
        };
        doorbell.ring();
        assert_eq!((count(Bell::Nap), count(Bell::Sleep)), (0, 0), "awake");
        doorbell.fall_asleep(Bell::Nap);
        doorbell.ring();
        doorbell.ring();
        assert_eq!((count(Bell::Nap), count(Bell::Sleep)), (1, 0), "napping");
        assert!(doorbell.wake_up().is_some());
        assert!(doorbell.wake_up().is_none(), "a ring is served once");
        doorbell.fall_asleep(Bell::Sleep);
        doorbell.ring();
        assert_eq!((count(Bell::Nap), count(Bell::Sleep)), (0, 1), "sleeping");
        doorbell.wake_up();
        doorbell.ring();
        assert_eq!((count(Bell::Nap), count(Bell::Sleep)), (0, 0), "awake again");
        assert_eq!(doorbell.rings(), 2);
    }
}
