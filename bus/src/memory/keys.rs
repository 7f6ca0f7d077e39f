//! The window of idempotency keys: what the first publish under a key was answered.
//!
//! Owns: keys, their order and their age. Must not know: channels' state; the caller judges whether a
//! remembered position still means something.
//! Invariant: at most `keys_max` keys, none is found that is older than the window; the oldest goes first.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::Arc;

use crate::types::Accepted;

/// Old keys dropped per call, so that a burst which expires at once stalls nobody.
const EXPIRED_PER_CALL_MAX: usize = 64;

#[derive(Debug)]
struct Remembered {
    accepted: Accepted,
    at_ms: u64,
}

/// Remembered answers by channel name and key.
#[derive(Debug)]
pub(super) struct Keys {
    // Keys come from the server API, which is trusted: no seeded hash is needed.
    answers: HashMap<Arc<[u8]>, Remembered, BuildHasherDefault<DefaultHasher>>,
    order: VecDeque<(u64, Arc<[u8]>)>,
    keys_max: usize,
    window_ms: u64,
    scratch: Vec<u8>,
}

impl Keys {
    pub(super) fn new(keys_max: usize, window_ms: u64) -> Keys {
        Keys { answers: HashMap::default(), order: VecDeque::new(), keys_max, window_ms, scratch: Vec::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }

    /// What the first publish under this key was answered, if that is within the window.
    pub(super) fn find(&mut self, now_ms: u64, channel: &str, key: &str) -> Option<Accepted> {
        self.expire(now_ms);
        self.write_scratch(channel, key);
        let remembered = self.answers.get(self.scratch.as_slice())?;
        (now_ms.saturating_sub(remembered.at_ms) < self.window_ms).then_some(remembered.accepted)
    }

    /// Remembers an answer, in place of an older one of the same key. Returns whether the window was full
    /// and the oldest key was dropped for it.
    pub(super) fn remember(&mut self, now_ms: u64, channel: &str, key: &str, accepted: Accepted) -> bool {
        self.write_scratch(channel, key);
        let name: Arc<[u8]> = self.scratch.as_slice().into();
        let replaced = self.answers.insert(name.clone(), Remembered { accepted, at_ms: now_ms }).is_some();
        if replaced {
            // Only when the channel was forgotten within the window: rare enough to search.
            self.order.retain(|(_, other)| *other != name);
        }
        self.order.push_back((now_ms, name));
        let full = self.answers.len() > self.keys_max;
        if full {
            self.drop_oldest();
        }
        full
    }

    /// Drops keys older than the window, a bounded number of them.
    pub(super) fn expire(&mut self, now_ms: u64) {
        for _ in 0..EXPIRED_PER_CALL_MAX {
            match self.order.front() {
                Some((at_ms, _)) if now_ms.saturating_sub(*at_ms) >= self.window_ms => self.drop_oldest(),
                _ => break,
            }
        }
    }

    fn drop_oldest(&mut self) {
        if let Some((_, name)) = self.order.pop_front() {
            self.answers.remove(&name);
        }
    }

    fn write_scratch(&mut self, channel: &str, key: &str) {
        self.scratch.clear();
        // The length before the name keeps ("a", "bc") and ("ab", "c") apart.
        self.scratch.extend_from_slice(&channel.len().to_le_bytes());
        self.scratch.extend_from_slice(channel.as_bytes());
        self.scratch.extend_from_slice(key.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::epoch::{Epoch, Position};

    fn accepted(offset: u64) -> Accepted {
        let position = Position::new(Epoch::new(1), offset);
        Accepted { position, repeated: false }
    }

    #[test]
    fn the_window_ends_by_time() {
        let mut keys = Keys::new(10, 100);
        assert!(!keys.remember(1000, "room:a", "k", accepted(1)));
        assert_eq!(keys.find(1099, "room:a", "k"), Some(accepted(1)));
        assert_eq!(keys.find(1099, "room:b", "k"), None);
        assert_eq!(keys.find(1099, "room:ak", ""), None);
        assert_eq!(keys.find(1100, "room:a", "k"), None);
        assert_eq!(keys.len(), 0);
    }

    #[test]
    fn the_window_ends_by_size() {
        let mut keys = Keys::new(2, 100);
        assert!(!keys.remember(0, "c", "one", accepted(1)));
        assert!(!keys.remember(0, "c", "two", accepted(2)));
        assert!(keys.remember(0, "c", "three", accepted(3)), "max + 1 drops the oldest");
        assert_eq!(keys.len(), 2);
        assert_eq!(keys.find(0, "c", "one"), None);
        assert_eq!(keys.find(0, "c", "two"), Some(accepted(2)));
        assert_eq!(keys.find(0, "c", "three"), Some(accepted(3)));
    }

    #[test]
    fn a_key_remembered_again_counts_once_and_from_then() {
        let mut keys = Keys::new(2, 100);
        keys.remember(0, "c", "k", accepted(1));
        keys.remember(60, "c", "k", accepted(9));
        assert_eq!((keys.len(), keys.order.len()), (1, 1));
        assert_eq!(keys.find(120, "c", "k"), Some(accepted(9)));
    }

    #[test]
    fn a_burst_that_expires_is_dropped_in_steps_and_never_found() {
        let mut keys = Keys::new(1000, 100);
        for n in 0..1000 {
            keys.remember(0, "c", &n.to_string(), accepted(1));
        }
        assert_eq!(keys.find(100, "c", "999"), None);
        assert_eq!(keys.len(), 1000 - EXPIRED_PER_CALL_MAX);
        for _ in 0..20 {
            keys.expire(100);
        }
        assert_eq!((keys.len(), keys.order.len()), (0, 0));
    }
}
