//! Timers of the kernel: precise to its own latency, without spinning.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;

/// A timer that is not set. Readable, without blocking, once its time has come.
pub(crate) fn create() -> Result<OwnedFd, Errno> {
    timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)
}

/// The same, watched by the runtime that this is called in.
pub(crate) fn watched() -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names one and the same open descriptor until it is dropped, and nobody replaces the one inside
    // the AsyncFd, which takes it out of the runtime before it drops it.
    unsafe { AsyncFd::register(create()?) }.map_err(std::io::Error::from)
}

/// Sets it to `at_ns` of the monotonic clock; one that has passed is due at once.
pub(crate) fn set(timer: &OwnedFd, at_ns: u64) -> Result<(), Errno> {
    // Zero would take the timer back.
    let at_ns = at_ns.max(1);
    let it_value = Timespec { tv_sec: (at_ns / 1_000_000_000) as _, tv_nsec: (at_ns % 1_000_000_000) as _ };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
    timerfd_settime(timer, TimerfdTimerFlags::ABSTIME, &once).map(drop)
}
