//! The flag that keeps a doorbell from being written for a shard that is awake.
//!
//! Owns the protocol between one sleeper and any number of ringers, and nothing else, so that a model
//! checker can run it under its own atomics (`super::atomic`).
//!
//! Invariant: work published before [`BellFlag::ring`] is either seen by the sleeper's check after
//! [`BellFlag::fall_asleep`], or that `ring` answers which bell must be written.

use super::atomic::{AtomicU8, Ordering, fence};

const AWAKE: u8 = 0;
const NAPPING: u8 = 1;
const SLEEPING: u8 = 2;

/// How the owner waits, and so which bell it hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::io) enum Bell {
    /// It waits inside its ring.
    Nap,
    /// It waits in its executor.
    Sleep,
}

/// Whether and how the owner waits, or is about to.
#[derive(Debug)]
pub(super) struct BellFlag {
    state: AtomicU8,
}

impl BellFlag {
    pub(super) fn new() -> Self {
        Self { state: AtomicU8::new(AWAKE) }
    }

    /// The owner announces its wait. It must look for work once more after this, and only then wait.
    pub(super) fn fall_asleep(&self, bell: Bell) {
        let state = match bell {
            Bell::Nap => NAPPING,
            Bell::Sleep => SLEEPING,
        };
        self.state.store(state, Ordering::Relaxed);
        // Pairs with the fence of `ring`: of the store here and the ringer's publication before its
        // fence, at least one is seen by the other side.
        fence(Ordering::SeqCst);
    }

    /// The owner is awake again.
    pub(super) fn wake_up(&self) {
        self.state.store(AWAKE, Ordering::Relaxed);
    }

    /// After publishing work: which bell the caller must write, if any. Of many callers at most one per
    /// wait is told so.
    pub(super) fn ring(&self) -> Option<Bell> {
        fence(Ordering::SeqCst);
        let mut state = self.state.load(Ordering::Relaxed);
        while state != AWAKE {
            // Of all ringers, the one that takes the wait back writes the bell.
            match self.state.compare_exchange(state, AWAKE, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(NAPPING) => return Some(Bell::Nap),
                Ok(_) => return Some(Bell::Sleep),
                Err(seen) => state = seen,
            }
        }
        None
    }
}
