//! The worst case of memory, added up.
//!
//! Owns the lines of the sum, the budget, and fitting maxima that the operator left open. Process
//! memory is bounded by pools and by tables of a fixed number of entries; kernel memory by sockets
//! times buffer sizes. Nothing here measures what a running node uses.

use super::facts::Facts;
use super::sizes;
use crate::control::config::relations::MESH_MESSAGES_MIN;
use crate::control::config::{Config, Resolved};
use crate::core::BATCH_BYTES_MAX;
use crate::io::TurnOptions;

/// Tenths of the available memory that are the budget where none is configured: the rest is left for
/// what else the machine does.
const BUDGET_TENTHS: u64 = 9;

/// One line of the sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What holds the memory.
    pub what: &'static str,
    /// How many there are at the most.
    pub count: u64,
    /// Bytes of each.
    pub each_bytes: u64,
}

impl Line {
    /// Bytes of all.
    pub fn total_bytes(&self) -> u64 {
        self.count.saturating_mul(self.each_bytes)
    }
}

/// The whole sum and what it is held against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The lines, from the connections inwards.
    pub lines: Vec<Line>,
    /// What may be used.
    pub budget_bytes: u64,
    /// Where the budget comes from.
    pub budget_source: String,
}

impl Memory {
    /// Adds everything up for this many shards.
    pub fn of(config: &Config, shards: u16, facts: &Facts) -> Self {
        let (budget_bytes, budget_source) = budget(config, facts);
        let mut lines = shard_lines(config, shards);
        lines.extend(kernel_lines(config, shards, facts));
        lines.push(Line {
            what: "requests to the admin port (admin.request_pool_bytes)",
            count: 1,
            each_bytes: config.node.admin.request_pool_bytes,
        });
        lines.push(Line { what: "the program itself", count: 1, each_bytes: sizes::PROCESS_BYTES });
        Self { lines, budget_bytes, budget_source }
    }

    /// The worst case in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.lines.iter().fold(0, |sum, line| sum.saturating_add(line.total_bytes()))
    }

    /// Whether the worst case stays within the budget.
    pub fn fits(&self) -> bool {
        self.total_bytes() <= self.budget_bytes
    }
}

fn shard_lines(config: &Config, shards: u16) -> Vec<Line> {
    let shards = u64::from(shards);
    let limits = &config.core.limits;
    let line = |what, count, each_bytes| Line { what, count, each_bytes };
    let connections = shards * u64::from(limits.connections_per_shard);
    let subscriptions = connections * u64::from(config.core.client.channel_limit);
    let pairs = shards * shards.saturating_sub(1);
    vec![
        line("connections (limits.connections_per_shard)", connections, sizes::CONNECTION_BYTES),
        line("subscriptions (client.channel_limit of each)", subscriptions, sizes::SUBSCRIPTION_BYTES),
        line("presence and users' infos (limits.info_pool_bytes)", shards, limits.info_pool_bytes),
        line(
            "channels (limits.channels_per_shard)",
            shards * u64::from(limits.channels_per_shard),
            sizes::CHANNEL_BYTES,
        ),
        line("own queues (limits.own_pool_bytes)", shards, limits.own_pool_bytes),
        line("logs of channels (limits.log_pool_bytes)", shards, limits.log_pool_bytes),
        line("histories (limits.history_pool_bytes)", shards, limits.history_pool_bytes),
        line("partial frames (limits.partial_pool_bytes)", shards, limits.partial_pool_bytes),
        line("messages between shards (limits.mesh_pool_bytes)", meshed(shards), limits.mesh_pool_bytes),
        line(
            "batches on their way (limits.mesh_credits)",
            pairs * u64::from(limits.mesh_credits),
            batch_bytes(config),
        ),
        line("rings, receive buffers, arenas", shards, ring_bytes()),
        line(
            "control inboxes (limits.control_inbox_max)",
            shards * u64::from(limits.control_inbox_max),
            sizes::CONTROL_BYTES,
        ),
    ]
}

/// Shards that have others to talk to.
fn meshed(shards: u64) -> u64 {
    if shards > 1 { shards } else { 0 }
}

/// Bytes of a batch of publications, which needs credit and no room in the pool.
fn batch_bytes(config: &Config) -> u64 {
    (BATCH_BYTES_MAX as u64).max(u64::from(config.core.client.message_bytes_max))
}

fn ring_bytes() -> u64 {
    let turn = TurnOptions::default();
    sizes::SHARD_BYTES
        + u64::from(turn.ring_entries) * sizes::SUBMISSION_BYTES
        + u64::from(turn.completion_entries) * sizes::COMPLETION_BYTES
        + u64::from(turn.recv_buffers) * u64::from(turn.recv_buffer_bytes)
        + turn.send_bytes_max as u64
}

/// What the kernel holds for the sockets. It never lets TCP buffers grow above `net.ipv4.tcp_mem`.
fn kernel_lines(config: &Config, shards: u16, facts: &Facts) -> [Line; 2] {
    let server = &config.node.server;
    let sockets = u64::from(shards) * u64::from(config.core.limits.connections_per_shard);
    let buffers = 2 * (u64::from(server.send_buffer_bytes) + u64::from(server.receive_buffer_bytes));
    let all = sockets.saturating_mul(buffers);
    let buffers = match facts.tcp_memory_bytes {
        Some(cap) if cap < all => {
            Line { what: "kernel: socket buffers (net.ipv4.tcp_mem)", count: 1, each_bytes: cap }
        }
        _ => Line {
            what: "kernel: socket buffers, twice send and receive",
            count: sockets,
            each_bytes: buffers,
        },
    };
    [Line { what: "kernel: sockets", count: sockets, each_bytes: sizes::SOCKET_BYTES }, buffers]
}

fn budget(config: &Config, facts: &Facts) -> (u64, String) {
    if let Some(bytes) = config.node.server.memory_budget_bytes {
        return (bytes, "server.memory_budget_bytes".to_owned());
    }
    let (bytes, source) = match (facts.available_bytes, facts.cgroup_bytes) {
        (Some(available), Some(cgroup)) if cgroup < available => (cgroup, "the control group's limit"),
        (Some(available), _) => (available, "the memory available now"),
        (None, Some(cgroup)) => (cgroup, "the control group's limit"),
        (None, None) => (0, "memory that cannot be read: set server.memory_budget_bytes"),
    };
    (bytes / 10 * BUDGET_TENTHS, format!("nine tenths of {source}"))
}

/// A maximum that may be made smaller where the operator did not set it.
struct Flexible {
    path: &'static str,
    /// The least that is still useful, in the key's unit.
    floor: fn(&Config) -> u64,
    get: fn(&Config) -> u64,
    set: fn(&mut Config, u64),
    /// Bytes per unit of the key on one shard, of this many.
    unit_bytes: fn(&Config, u64) -> u64,
}

/// A pool below this is of no use to anyone, in bytes.
const POOL_BYTES_MIN: u64 = 4 * 1024 * 1024;

/// All but the connections give way together; connections go last.
const FLEXIBLE: [&[Flexible]; 2] = [
    &[
        Flexible {
            path: "limits.history_pool_bytes",
            floor: |_| POOL_BYTES_MIN,
            get: |config| config.core.limits.history_pool_bytes,
            set: |config, bytes| config.core.limits.history_pool_bytes = bytes,
            unit_bytes: |_, _| 1,
        },
        Flexible {
            path: "limits.own_pool_bytes",
            floor: |config| POOL_BYTES_MIN.max(u64::from(config.core.client.own_queue_bytes_max)),
            get: |config| config.core.limits.own_pool_bytes,
            set: |config, bytes| config.core.limits.own_pool_bytes = bytes,
            unit_bytes: |_, _| 1,
        },
        Flexible {
            path: "limits.log_pool_bytes",
            floor: |config| POOL_BYTES_MIN.max(largest_log(config)),
            get: |config| config.core.limits.log_pool_bytes,
            set: |config, bytes| config.core.limits.log_pool_bytes = bytes,
            unit_bytes: |_, _| 1,
        },
        Flexible {
            path: "limits.partial_pool_bytes",
            floor: |config| POOL_BYTES_MIN.max(u64::from(config.core.client.message_bytes_max)),
            get: |config| config.core.limits.partial_pool_bytes,
            set: |config, bytes| config.core.limits.partial_pool_bytes = bytes,
            unit_bytes: |_, _| 1,
        },
        Flexible {
            path: "limits.info_pool_bytes",
            floor: |_| POOL_BYTES_MIN,
            get: |config| config.core.limits.info_pool_bytes,
            set: |config, bytes| config.core.limits.info_pool_bytes = bytes,
            unit_bytes: |_, _| 1,
        },
        Flexible {
            path: "limits.channels_per_shard",
            floor: |_| 10_000,
            get: |config| u64::from(config.core.limits.channels_per_shard),
            set: |config, count| {
                config.core.limits.channels_per_shard = u32::try_from(count).unwrap_or(u32::MAX);
            },
            unit_bytes: |_, _| sizes::CHANNEL_BYTES,
        },
        Flexible {
            path: "limits.mesh_pool_bytes",
            floor: |config| {
                POOL_BYTES_MIN.max(MESH_MESSAGES_MIN * u64::from(config.core.client.message_bytes_max))
            },
            get: |config| config.core.limits.mesh_pool_bytes,
            set: |config, bytes| config.core.limits.mesh_pool_bytes = bytes,
            unit_bytes: |_, shards| u64::from(shards > 1),
        },
    ],
    &[Flexible {
        path: "limits.connections_per_shard",
        floor: |_| 1_000,
        get: |config| u64::from(config.core.limits.connections_per_shard),
        set: |config, count| {
            config.core.limits.connections_per_shard = u32::try_from(count).unwrap_or(u32::MAX);
        },
        // Socket buffers are left out: where there are many sockets, tcp_mem caps them.
        unit_bytes: |config, _| {
            let subscriptions = u64::from(config.core.client.channel_limit) * sizes::SUBSCRIPTION_BYTES;
            sizes::CONNECTION_BYTES + subscriptions + sizes::SOCKET_BYTES
        },
    }],
];

fn largest_log(config: &Config) -> u64 {
    let named = config.core.namespaces.values().map(|namespace| namespace.log_bytes_max);
    u64::from(named.max().unwrap_or(0).max(config.core.channel.log_bytes_max))
}

/// Makes maxima that the operator did not set smaller until the worst case fits, as far as that goes.
/// Returns what was changed, one line each.
pub fn fit(resolved: &mut Resolved, shard_count: u16, facts: &Facts) -> Vec<String> {
    let mut changed = Vec::new();
    let shards = u64::from(shard_count);
    for group in FLEXIBLE {
        let memory = Memory::of(&resolved.config, shard_count, facts);
        let excess = memory.total_bytes().saturating_sub(memory.budget_bytes);
        let open: Vec<_> = group.iter().filter(|key| !resolved.is_set(key.path)).collect();
        let config = &mut resolved.config;
        let spare = |key: &Flexible, config: &Config| {
            let units = (key.get)(config).saturating_sub((key.floor)(config));
            units * (key.unit_bytes)(config, shards) * shards
        };
        let all_spare: u64 = open.iter().map(|key| spare(key, config)).sum();
        if excess == 0 || all_spare == 0 {
            continue;
        }
        let take = excess.min(all_spare);
        for key in open {
            let before = (key.get)(config);
            let share = u128::from(spare(key, config)) * u128::from(take) / u128::from(all_spare);
            let unit_bytes = ((key.unit_bytes)(config, shards) * shards).max(1);
            let less = u64::try_from(share).unwrap_or(u64::MAX).div_ceil(unit_bytes);
            let after = before.saturating_sub(less).max((key.floor)(config).min(before));
            if after < before {
                (key.set)(config, after);
                changed.push(format!("{} = {after} instead of {before}, to fit the memory budget", key.path));
            }
        }
    }
    changed
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;
    use crate::control::config::tests::resolved;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_sum_is_the_sum_of_its_lines() {
        let config = resolved("", &[], &[], false).unwrap().config;
        let memory = Memory::of(&config, 2, &facts());
        let by_hand: u64 = memory.lines.iter().map(|line| line.count * line.each_bytes).sum();
        assert_eq!(memory.total_bytes(), by_hand);
        let pool = memory.lines.iter().find(|line| line.what.contains("history_pool_bytes")).unwrap();
        assert_eq!(pool.total_bytes(), 2 * config.core.limits.history_pool_bytes);
        let pool = memory.lines.iter().find(|line| line.what.contains("presence")).unwrap();
        assert_eq!(
            pool.total_bytes(),
            2 * config.core.limits.info_pool_bytes,
            "whatever namespaces say of it"
        );
    }

    #[test]
    fn socket_buffers_stop_at_tcp_mem() {
        let config = resolved("", &[], &["limits.connections_per_shard=1000"], false).unwrap().config;
        let kernel = |cap: Option<u64>| {
            let facts = Facts { tcp_memory_bytes: cap, ..facts() };
            kernel_lines(&config, 2, &facts)[1].total_bytes()
        };
        let whole = 2 * 1000 * 2 * (64 + 32) * 1024;
        assert_eq!(kernel(None), whole);
        assert_eq!(kernel(Some(whole)), whole);
        assert_eq!(kernel(Some(whole - 1)), whole - 1);
    }

    #[test]
    fn the_budget_is_the_configured_one_or_most_of_what_there_is() {
        let check = |flags: &[&str], available: Option<u64>, cgroup: Option<u64>, expected: u64| {
            let config = resolved("", &[], flags, false).unwrap().config;
            let facts = Facts { available_bytes: available, cgroup_bytes: cgroup, ..facts() };
            assert_eq!(budget(&config, &facts).0, expected, "{flags:?} {available:?} {cgroup:?}");
        };
        check(&["server.memory_budget_bytes=67108864"], Some(GIB), None, 67_108_864);
        check(&[], Some(1000), None, 900);
        check(&[], Some(1000), Some(2000), 900);
        check(&[], Some(1000), Some(500), 450);
        check(&[], None, Some(500), 450);
        check(&[], None, None, 0);
    }

    #[test]
    fn open_maxima_shrink_to_fit_and_set_ones_stay() {
        let check = |flags: &[&str], available: u64, fits: bool, pools_shrink: bool| {
            let mut resolved = resolved("", &[], flags, false).unwrap();
            let before = resolved.config.core.limits.clone();
            let facts = Facts { available_bytes: Some(available), ..facts() };
            let changed = fit(&mut resolved, 2, &facts);
            let memory = Memory::of(&resolved.config, 2, &facts);
            let limits = &resolved.config.core.limits;
            assert_eq!(memory.fits(), fits, "{flags:?} {available} {} {changed:?}", memory.total_bytes());
            assert_eq!(limits.own_pool_bytes < before.own_pool_bytes, pools_shrink, "{flags:?} {available}");
            if flags.iter().any(|flag| flag.starts_with("limits.history_pool_bytes")) {
                assert_eq!(limits.history_pool_bytes, before.history_pool_bytes);
            }
        };
        check(&[], 64 * GIB, true, false);
        check(&[], 4 * GIB, true, true);
        check(&[], 2 * GIB, true, true);
        check(&[], GIB / 16, false, true);
        check(&["limits.history_pool_bytes=536870912"], 4 * GIB, true, true);
        check(&["limits.history_pool_bytes=8589934592"], 4 * GIB, false, true);
    }

    #[test]
    fn many_shards_fit_into_a_small_machine() {
        let mut resolved = resolved("", &[], &["limits.connections_per_shard=19936"], false).unwrap();
        let facts = Facts { available_bytes: Some(24 * GIB), tcp_memory_bytes: Some(2 * GIB), ..facts() };
        fit(&mut resolved, 54, &facts);
        let memory = Memory::of(&resolved.config, 54, &facts);
        assert!(memory.fits(), "{} MiB", memory.total_bytes() >> 20);
        let limits = &resolved.config.core.limits;
        assert!(limits.history_pool_bytes > 2 * POOL_BYTES_MIN, "{}", limits.history_pool_bytes);
        assert!(limits.channels_per_shard > 20_000, "{}", limits.channels_per_shard);
    }

    #[test]
    fn a_budget_met_to_the_byte_fits_and_one_less_does_not() {
        let config = resolved("", &[], &[], false).unwrap().config;
        let mut memory = Memory::of(&config, 1, &facts());
        memory.budget_bytes = memory.total_bytes();
        assert!(memory.fits());
        memory.budget_bytes -= 1;
        assert!(!memory.fits());
    }
}
