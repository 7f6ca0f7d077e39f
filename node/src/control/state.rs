//! What the node says of itself: its name, its age and whether it takes connections.
//!
//! Owns the phase of the process and what is known of its bus. Readiness is green in one phase only, and while the
//! bus is whole.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ringmain_bus::Health;
use ringmain_bus::hub::HubFigures;

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
    bus_is_whole: AtomicBool,
    bus: Mutex<Option<HubFigures>>,
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
        Self {
            phase: AtomicU8::new(Phase::Starting as u8),
            bus_is_whole: AtomicBool::new(true),
            bus: Mutex::new(None),
            started: Instant::now(),
            started_unix,
            name,
            uid,
        }
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

    /// What the hub says of the bus. Never called where the bus is embedded.
    pub fn set_bus(&self, health: Health, figures: HubFigures) {
        let whole = health == Health::Up;
        if self.bus_is_whole.swap(whole, Ordering::AcqRel) != whole {
            match health {
                Health::Up => tracing::info!("the bus is whole"),
                Health::Down => tracing::warn!("the bus cannot be reached, or not all of it: not ready"),
            }
        }
        *self.bus.lock().unwrap_or_else(PoisonError::into_inner) = Some(figures);
    }

    /// What the hub has counted; `None`: the bus is embedded.
    pub fn bus_figures(&self) -> Option<HubFigures> {
        *self.bus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the node is not ready; empty: it is.
    pub fn not_ready(&self) -> &'static [&'static str] {
        match self.phase() {
            Phase::Starting => &["starting"],
            Phase::Running if !self.bus_is_whole.load(Ordering::Acquire) => &["bus"],
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
        state.set_bus(Health::Down, HubFigures::default());
        assert_eq!(state.not_ready(), ["bus"]);
        state.set_bus(Health::Up, HubFigures::default());
        assert!(state.not_ready().is_empty());
        state.enter(Phase::Draining);
        assert_eq!(state.not_ready(), ["draining"]);
    }
}
