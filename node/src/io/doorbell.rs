//! The doorbell of a shard: how other threads wake it.
//!
//! Owns one eventfd and the flag that says whether the shard sleeps. It does not know what work waits:
//! the inboxes are looked at after every sleep. A ringer publishes its work first and rings then; the
//! eventfd is written only when the shard sleeps, so a busy shard costs its peers one atomic load.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

mod atomic {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
}
#[path = "bell_flag.rs"]
mod bell_flag;

use atomic::Ordering;
use bell_flag::BellFlag;

/// The doorbell of one shard, shared with everybody who may wake it.
#[derive(Debug)]
pub(crate) struct Doorbell {
    eventfd: OwnedFd,
    flag: BellFlag,
    origin: Instant,
    /// When the last ring that woke the shard was given, in nanoseconds since `origin`; 0: served.
    rung_ns: AtomicU64,
    /// How often the eventfd was written.
    rings: AtomicU64,
}

impl Doorbell {
    /// A doorbell whose times count from `origin`.
    pub(crate) fn new(origin: Instant) -> std::io::Result<Self> {
        // Blocking: a read through the ring waits for a ring of the bell instead of failing, and a
        // write could only block at 2^64 - 1 unread rings.
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC)?;
        Ok(Self {
            eventfd,
            flag: BellFlag::new(),
            origin,
            rung_ns: AtomicU64::new(0),
            rings: AtomicU64::new(0),
        })
    }

    /// Wakes the shard if it sleeps. Call after publishing the work. Safe in a signal handler: it
    /// reads a clock, touches atomics and writes eight bytes.
    pub(crate) fn ring(&self) {
        if self.flag.ring() {
            self.rung_ns.store((self.origin.elapsed().as_nanos() as u64).max(1), Ordering::Relaxed);
            self.rings.fetch_add(1, Ordering::Relaxed);
            self.write();
        }
    }

    /// The shard is about to sleep. It must look at its inboxes once more after this.
    pub(crate) fn fall_asleep(&self) {
        self.flag.fall_asleep();
    }

    /// The shard is awake. Returns when it was rung, in nanoseconds since the origin, if it was.
    pub(crate) fn wake_up(&self) -> Option<u64> {
        self.flag.wake_up();
        match self.rung_ns.swap(0, Ordering::Relaxed) {
            0 => None,
            rung_ns => Some(rung_ns),
        }
    }

    /// How often the eventfd was written since the start.
    pub(crate) fn rings(&self) -> u64 {
        self.rings.load(Ordering::Relaxed)
    }

    fn write(&self) {
        // The only error of a valid, blocking eventfd is EINTR.
        while rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes()) == Err(rustix::io::Errno::INTR) {}
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

/// Wakes one shard from any thread or from a signal handler.
#[derive(Clone, Debug)]
pub struct Waker(pub(crate) Arc<Doorbell>);

impl Waker {
    /// Makes the shard run one turn, if it sleeps. Cheap when it does not.
    pub fn wake(&self) {
        self.0.ring();
    }
}
