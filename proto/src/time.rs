//! The two clocks that the pure parts are told about.
//!
//! Owns one type and reads no clock: whoever drives the core (the shard's loop, the simulator) says
//! what time it is.

/// A moment, as told by the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic milliseconds from an arbitrary origin: for timers, never shown to a peer.
    pub mono_ms: u64,
    /// Milliseconds since 1970-01-01 UTC: for token expiry and publication times.
    pub unix_ms: u64,
}

impl Now {
    /// Whole seconds since 1970-01-01 UTC, the unit of token claims.
    pub fn unix_s(self) -> u64 {
        self.unix_ms / 1000
    }
}
