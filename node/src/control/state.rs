//! What the node says of itself: its name, its age and whether it takes connections.
//!
//! Owns the phase of the process. Readiness is green in one phase only; there are no other reasons
//! while the bus is embedded.

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where the process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Shards are coming up.
    Starting = 0,
    /// Connections are welcome.
    Running = 1,
    /// Connections are being sent away.
    Draining = 2,
}

/// See the module's doc.
#[derive(Debug)]
pub struct NodeState {
    phase: AtomicU8,
    started: Instant,
    started_unix: Duration,
    /// Name for people.
    pub name: String,
    /// Unique to this run of the process.
    pub uid: String,
}

impl NodeState {
    /// A node that starts now.
    pub fn new(name: String, uid: String) -> Self {
        let started_unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { phase: AtomicU8::new(Phase::Starting as u8), started: Instant::now(), started_unix, name, uid }
    }

    /// Enters a phase.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Starting,
            1 => Phase::Running,
            _ => Phase::Draining,
        }
    }

    /// Why the node is not ready; empty: it is.
    pub fn not_ready(&self) -> &'static [&'static str] {
        match self.phase() {
            Phase::Starting => &["starting"],
            Phase::Running => &[],
            Phase::Draining => &["draining"],
        }
    }

    /// Time since the start.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// When the node started, in milliseconds since 1970.
    pub fn started_unix_ms(&self) -> u64 {
        self.started_unix.as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_running_node_is_ready() {
        let state = NodeState::new("n".to_owned(), "u".to_owned());
        assert_eq!(state.not_ready(), ["starting"]);
        state.enter(Phase::Running);
        assert!(state.not_ready().is_empty());
        state.enter(Phase::Draining);
        assert_eq!(state.not_ready(), ["draining"]);
    }
}
