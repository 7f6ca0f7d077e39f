//! How many sockets the process may hold.
//!
//! Owns the arithmetic between `RLIMIT_NOFILE` and a shard's descriptor table: the kernel refuses a
//! table above the soft limit (EMFILE), for each ring by itself, although direct descriptors are not
//! file descriptors of the process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Slots of the table beyond a shard's `slots_max`: accepted sockets on their way to another shard or
/// out of the door stand here. 64, because a turn of a full shard accepts one socket per listener at
/// a time and each is on its way for a turn or two.
pub const SLOTS_MARGIN: u32 = 64;

/// The process's limit of file descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NofileLimit {
    /// In force now.
    pub soft: u64,
    /// What it may be raised to without privilege.
    pub hard: u64,
    /// What was in force before it was raised.
    pub was: u64,
}

/// Raises the soft limit of file descriptors to the hard one.
pub fn raise_nofile() -> NofileLimit {
    let before = getrlimit(Resource::Nofile);
    // `None` is "unlimited", which the kernel caps by fs.nr_open anyway.
    let hard = before.maximum.unwrap_or(u64::from(u32::MAX));
    let was = before.current.unwrap_or(hard);
    let raised = Rlimit { current: before.maximum, maximum: before.maximum };
    let soft = if was < hard && setrlimit(Resource::Nofile, raised).is_ok() { hard } else { was };
    NofileLimit { soft, hard, was }
}

/// How many connections one shard may hold when `requested` are asked for: the limit caps each
/// shard's table by itself, [`SLOTS_MARGIN`] included. Never 0 below a limit of `SLOTS_MARGIN + 1`.
pub fn slots_allowed(requested: u32, limit: &NofileLimit) -> u32 {
    let table_max = u32::try_from(limit.soft).unwrap_or(u32::MAX).min(TABLE_SLOTS_MAX);
    requested.min(table_max.saturating_sub(SLOTS_MARGIN))
}

/// The kernel's own maximum for a table of direct descriptors (`IORING_MAX_FIXED_FILES`).
const TABLE_SLOTS_MAX: u32 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_capped_by_the_limit_less_the_margin() {
        let check = |requested, soft, expected| {
            let limit = NofileLimit { soft, hard: soft, was: soft };
            assert_eq!(slots_allowed(requested, &limit), expected, "{requested} of {soft}");
        };
        check(100, 20_000, 100);
        check(19_936, 20_000, 19_936);
        check(19_937, 20_000, 19_936);
        check(65_536, 20_000, 19_936);
        check(10, 64, 0);
        check(u32::MAX, u64::MAX, (1 << 20) - 64);
    }

    #[test]
    fn raising_reaches_the_hard_limit() {
        let limit = raise_nofile();
        assert_eq!(limit.soft, limit.hard);
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u32::MAX)), limit.hard);
    }
}
