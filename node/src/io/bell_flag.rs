//! The flag that keeps a doorbell from being written for a shard that is awake.
//!
//! Owns the protocol between one sleeper and any number of ringers, and nothing else, so that a model
//! checker can run it under its own atomics (`super::atomic`).
//!
//! Invariant: work published before [`BellFlag::ring`] is either seen by the sleeper's check after
//! [`BellFlag::fall_asleep`], or that `ring` answers that the bell must be written.

use super::atomic::{AtomicBool, Ordering, fence};

/// Whether the owner sleeps, or is about to.
#[derive(Debug)]
pub(super) struct BellFlag {
    asleep: AtomicBool,
}

impl BellFlag {
    pub(super) fn new() -> Self {
        Self { asleep: AtomicBool::new(false) }
    }

    /// The owner announces its sleep. It must look for work once more after this, and only then sleep.
    pub(super) fn fall_asleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        // Pairs with the fence of `ring`: of the store here and the ringer's publication before its
        // fence, at least one is seen by the other side.
        fence(Ordering::SeqCst);
    }

    /// The owner is awake again.
    pub(super) fn wake_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// After publishing work: whether the caller must write the bell. Of many callers at most one per
    /// sleep is told so.
    pub(super) fn ring(&self) -> bool {
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed)
    }
}
