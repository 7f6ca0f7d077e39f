//! What wakes the hub when commands wait for it.
//!
//! Owns: whether it is muted. Must not know: what is asked.
//!
//! To be woken costs the control thread more than to take a publication. A backend that could send nothing just now,
//! and will have its turn when it can, mutes the bell meanwhile: publications wait for that turn, and go together. With
//! Redis at 10,000 publications a second that halved what a node added to their way (kernel 6.18, two cores).
//!
//! Invariant: whoever unmutes it rings it, so that nothing pushed while it was muted is forgotten.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use super::Wake;

/// Commands of one port from which on it rings a muted bell: so many are worth a wake.
const MUTED_MAX: usize = 64;

/// See the module's doc. One for all ports of a hub.
pub struct Bell {
    wake: Wake,
    muted: AtomicBool,
}

impl Bell {
    /// Rung by `wake`.
    pub fn new(wake: Wake) -> Arc<Bell> {
        Arc::new(Bell { wake, muted: AtomicBool::new(false) })
    }

    /// Publications may wait until [`Bell::unmute`]; other commands ring.
    pub fn mute(&self) {
        self.muted.store(true, Ordering::SeqCst);
    }

    /// Rings, if it was muted.
    pub fn unmute(&self) {
        if self.muted.swap(false, Ordering::SeqCst) {
            // What a port pushed before it read the old value is seen by who is woken now.
            fence(Ordering::SeqCst);
            (self.wake)();
        }
    }

    pub(super) fn ring(&self) {
        (self.wake)();
    }

    /// So many publications were pushed, and perhaps before that.
    pub(super) fn ring_for_publications(&self, waiting: impl FnOnce() -> usize) {
        fence(Ordering::SeqCst);
        if !self.muted.load(Ordering::SeqCst) || waiting() >= MUTED_MAX {
            self.ring();
        }
    }
}

impl Default for Bell {
    /// Wakes nobody: for a hub that is polled, or a backend without one.
    fn default() -> Bell {
        Bell { wake: Arc::new(|| ()), muted: AtomicBool::new(false) }
    }
}

impl fmt::Debug for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bell").field("muted", &self.muted).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    fn bell() -> (Arc<Bell>, Receiver<()>) {
        let (rung, rings): (Sender<()>, _) = channel();
        (Bell::new(Arc::new(move || rung.send(()).unwrap())), rings)
    }

    #[test]
    fn a_muted_bell_rings_once_for_all_that_waited() {
        let (bell, rings) = bell();
        bell.mute();
        for waiting in 1..MUTED_MAX {
            bell.ring_for_publications(|| waiting);
        }
        assert!(rings.try_recv().is_err());
        bell.unmute();
        bell.unmute();
        assert_eq!(rings.try_iter().count(), 1);
        bell.ring_for_publications(|| 1);
        assert_eq!(rings.try_iter().count(), 1);
    }

    #[test]
    fn a_muted_bell_rings_for_many_and_for_what_presses() {
        let (bell, rings) = bell();
        bell.mute();
        bell.ring_for_publications(|| MUTED_MAX);
        bell.ring();
        assert_eq!(rings.try_iter().count(), 2);
    }
}
