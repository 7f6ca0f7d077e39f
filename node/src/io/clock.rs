//! The one place where the data plane reads a clock.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ringmain_proto::time::Now;

/// The clocks of a shard: monotonic time counts from the start of the process's first clock, so that
/// all shards of a node agree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that counts from `origin`, which all shards of a node share.
    pub(crate) fn new(origin: Instant) -> Self {
        Self { origin }
    }

    /// Nanoseconds since the origin: for measuring.
    pub(crate) fn mono_ns(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    /// Both clocks at the monotonic moment `mono_ns`, which the caller has just read.
    pub(crate) fn at(&self, mono_ns: u64) -> Now {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        // Counted from 1, so that 0 may mean "never".
        Now { mono_ms: mono_ns / 1_000_000 + 1, unix_ms: unix.as_millis() as u64 }
    }
}

/// Nanoseconds since the origin at which `mono_ms` of [`Clock::at`] begins.
pub(crate) fn mono_ns_of(mono_ms: u64) -> u64 {
    mono_ms.saturating_sub(1).saturating_mul(1_000_000)
}
