//! The newest publication per key of a channel: what a slow reader is skipped forward to.
//!
//! Owns a bounded map from the tag `key` (empty: no such tag) to a canonical record. Kept only in
//! namespaces whose `slow_consumer` is `latest`. When full, the key updated longest ago goes.

use std::collections::HashMap;

/// Keys of one channel at the most.
pub(crate) const KEYS_MAX: usize = 4096;
/// The tag that names the key.
pub(crate) const KEY_TAG: &str = "key";

/// See the module's doc.
#[derive(Debug, Default)]
pub(crate) struct Latest {
    /// Key to (sequence of arrival, record).
    entries: HashMap<Box<str>, (u64, Box<[u8]>)>,
    sequence: u64,
}

impl Latest {
    /// Notes a publication.
    pub(crate) fn note(&mut self, key: &str, record: &[u8]) {
        self.sequence += 1;
        if let Some(entry) = self.entries.get_mut(key) {
            *entry = (self.sequence, record.into());
            return;
        }
        if self.entries.len() >= KEYS_MAX
            && let Some(oldest) =
                self.entries.iter().min_by_key(|(_, (at, _))| *at).map(|(key, _)| key.clone())
        {
            self.entries.remove(&oldest);
        }
        self.entries.insert(key.into(), (self.sequence, record.into()));
    }

    /// The records in the order of their arrival.
    pub(crate) fn records(&self) -> Vec<&[u8]> {
        let mut all: Vec<_> = self.entries.values().collect();
        all.sort_unstable_by_key(|(at, _)| *at);
        all.into_iter().map(|(_, record)| &**record).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_per_key_in_order() {
        let mut latest = Latest::default();
        for (key, record) in [("a", "a1"), ("b", "b1"), ("a", "a2")] {
            latest.note(key, record.as_bytes());
        }
        assert_eq!(latest.records(), [b"b1", b"a2"]);
    }

    #[test]
    fn at_max_the_oldest_key_goes() {
        let mut latest = Latest::default();
        for key in 0..=KEYS_MAX {
            latest.note(&key.to_string(), b"x");
        }
        assert_eq!(latest.records().len(), KEYS_MAX);
        assert!(!latest.entries.contains_key("0"));
    }
}
