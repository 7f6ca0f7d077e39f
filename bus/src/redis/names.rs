//! Names on the server: keys, pub/sub channels, hash slots.
//!
//! Owns: the way from a channel's name to its key and back. Must not know: connections, topology.
//! Invariant: a channel's key and its pub/sub channel are of one hash slot, whatever the name holds: they are the
//! same text, or share a hash tag that stands before anything of the name.
//!
//! | | key | pub/sub channel |
//! |---|---|---|
//! | by channel | `rm.c:{name}` | the same |
//! | by slot | `rm.s:{s123}:name` | `rm.s:{s123}` |
//! | canary | `rm.k:{7}` | the same |

use crate::backend::Interest;
use crate::redis::options::RedisOptions;
use crate::slot::{crc16, slot_of};

/// Hash slots of a cluster.
pub(super) const HASH_SLOTS: u16 = 16_384;

/// The names of one system.
#[derive(Clone, Debug)]
pub(super) struct Names {
    prefix: String,
    interest: Interest,
}

impl Names {
    pub(super) fn new(options: &RedisOptions) -> Names {
        Names { prefix: options.prefix.clone(), interest: options.interest }
    }

    /// The pub/sub channel of a channel: the unit of interest.
    pub(super) fn unit(&self, name: &str) -> String {
        match self.interest.is_by_slot(name) {
            true => format!("{}.s:{{s{}}}", self.prefix, slot_of(name)),
            false => format!("{}.c:{{{name}}}", self.prefix),
        }
    }

    /// The key of a channel.
    pub(super) fn key(&self, name: &str) -> String {
        let unit = self.unit(name);
        if self.interest.is_by_slot(name) { format!("{unit}:{name}") } else { unit }
    }

    /// The channel's name of a key; `None` if it is no key of a channel of this system.
    pub(super) fn name_of<'a>(&self, key: &'a [u8]) -> Option<&'a str> {
        let rest = std::str::from_utf8(key).ok()?.strip_prefix(&*self.prefix)?;
        match rest.strip_prefix(".c:{") {
            Some(rest) => rest.strip_suffix('}'),
            None => rest.strip_prefix(".s:{").and_then(|rest| rest.split_once("}:")).map(|(_, name)| name),
        }
    }

    /// Key and channel of the canary of a master that owns the hash slots for which `owns` holds.
    pub(super) fn canary(&self, owns: impl Fn(u16) -> bool) -> Option<String> {
        // Each number is in a slot as good as random: far more than it takes to hit any one slot of them all.
        (0..4 * u32::from(HASH_SLOTS))
            .map(|tag| format!("{}.k:{{{tag}}}", self.prefix))
            .find(|key| owns(hash_slot(key)))
    }
}

/// The hash slot of a key or channel.
pub(super) fn hash_slot(key: &str) -> u16 {
    let tag = key.find('{').and_then(|open| {
        let rest = &key[open + 1..];
        rest.find('}').filter(|close| *close > 0).map(|close| &rest[..close])
    });
    crc16(tag.unwrap_or(key).bytes()) % HASH_SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis::options::Deployment;

    fn names(interest: Interest) -> Names {
        Names::new(&RedisOptions { interest, ..RedisOptions::new(Deployment::Cluster, Vec::new()) })
    }

    #[test]
    fn slots_are_those_of_redis() {
        // CLUSTER KEYSLOT of Redis 7.0.
        for (key, slot) in [("123456789", 12739), ("foo", 12182), ("a{foo}b", 12182), ("{}foo", 9500)] {
            assert_eq!(hash_slot(key), slot, "{key}");
        }
    }

    #[test]
    fn key_and_unit_share_a_slot_and_give_the_name() {
        for interest in [Interest::Channels, Interest::Slots] {
            let names = names(interest);
            for name in ["news", "", "}", "{", "{}", "a}b{c", "s1}:x", "user:42", "user:#{1}", "ключ"] {
                let key = names.key(name);
                assert_eq!(hash_slot(&key), hash_slot(&names.unit(name)), "{key}");
                assert_eq!(names.name_of(key.as_bytes()), Some(name), "{key}");
            }
        }
        assert_eq!(names(Interest::Channels).name_of(b"other.c:{x}"), None);
    }

    #[test]
    fn users_go_by_slot() {
        let names = names(Interest::Channels);
        assert_eq!(names.unit("user:7"), format!("rm.s:{{s{}}}", slot_of("user:7")));
        assert_eq!(names.unit("news"), "rm.c:{news}");
    }

    #[test]
    fn every_slot_has_a_canary() {
        let names = names(Interest::Channels);
        for slot in (0..HASH_SLOTS).step_by(997) {
            assert!(names.canary(|owned| owned == slot).is_some(), "{slot}");
        }
        assert_eq!(names.canary(|_| false), None);
    }
}
