//! How many sockets the process may hold.
//!
//! Owns the arithmetic between `RLIMIT_NOFILE` and a shard's descriptor table: the kernel refuses a
//! table above the soft limit (EMFILE), for each ring by itself, although direct descriptors are not
//! file descriptors of the process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Slots of the table beyond a shard's `slots_max`, one more for each of its listeners apart: accepted
/// sockets on their way to another shard or out of the door stand here. Each is on its way for a turn or
/// two; 64 are what a turn of a full shard accepts without waiting for them.
pub const SLOTS_MARGIN: u32 = 64;

/// Slots of the table of a shard with `listeners` listening sockets.
pub fn table_slots(slots_max: u32, listeners: usize) -> u32 {
    slots_max.saturating_add(SLOTS_MARGIN).saturating_add(listeners as u32)
}

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

/// Keeps the kernel from backing this process's memory with huge pages (`PR_SET_THP_DISABLE`): a table that
/// touches a few bytes of each 2 MiB would otherwise pay for all of it, 18,000 idle connections twice what
/// they need. Best effort: an old kernel or a filter that refuses leaves everything as it was.
pub fn refuse_huge_pages() {
    // SAFETY: this operation takes plain numbers and touches no memory of the process.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0) };
}

/// How many connections one shard may hold when `requested` are asked for: the limit caps each shard's
/// table by itself, with its margin and one slot for each of its `listeners`.
pub fn slots_allowed(requested: u32, limit: &NofileLimit, listeners: usize) -> u32 {
    let table_max = u32::try_from(limit.soft).unwrap_or(u32::MAX).min(TABLE_SLOTS_MAX);
    requested.min(table_max.saturating_sub(table_slots(0, listeners)))
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
            assert_eq!(slots_allowed(requested, &limit, 2), expected, "{requested} of {soft}");
        };
        check(100, 20_000, 100);
        check(19_934, 20_000, 19_934);
        check(19_935, 20_000, 19_934);
        check(65_536, 20_000, 19_934);
        check(10, 66, 0);
        check(10, 67, 1);
        check(u32::MAX, u64::MAX, (1 << 20) - 66);
    }

    #[test]
    fn raising_reaches_the_hard_limit() {
        let limit = raise_nofile();
        assert_eq!(limit.soft, limit.hard);
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u32::MAX)), limit.hard);
    }
}
