//! What the kernel or the process's limits refuse, each with the command that mends it.
//!
//! Owns the rules; the figures come from [`Facts`].

use super::facts::Facts;
use crate::control::config::Resolved;
use crate::io::{KERNEL_MIN, slots_allowed, table_slots};

/// Locked memory that glommio wants per executor, in bytes.
const MEMLOCK_BYTES_MIN: u64 = 512 * 1024;

/// Fewer local ports than this and a proxy on the same machine runs out of them early.
const LOCAL_PORTS_MIN: u64 = 28_000;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// As it should be.
    Fine,
    /// The node runs, but less well or less far than configured.
    Warn,
    /// The node does not start.
    Refuse,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub severity: Severity,
    /// What was found, and what is wanted.
    pub what: String,
    /// The command that mends it; empty where nothing is to be mended.
    pub mend: String,
}

fn finding(severity: Severity, what: String, mend: impl Into<String>) -> Finding {
    let mend = if severity == Severity::Fine { String::new() } else { mend.into() };
    Finding { severity, what, mend }
}

fn unless(holds: bool, otherwise: Severity) -> Severity {
    if holds { Severity::Fine } else { otherwise }
}

/// Looks at everything for this many shards. What the machine does not tell is left out.
pub fn findings(resolved: &Resolved, shards: u16, facts: &Facts) -> Vec<Finding> {
    let sockets = u64::from(shards) * u64::from(resolved.config.core.limits.connections_per_shard);
    let found = [
        kernel_version(facts),
        io_uring(facts),
        memlock(facts, shards),
        nofile(resolved, facts),
        cpus(resolved, facts),
        file_max(facts, sockets),
        somaxconn(resolved, facts),
        tcp_mem(resolved, facts, sockets),
        buffers(resolved, facts),
        local_ports(facts),
        conntrack(facts, sockets),
    ];
    found.into_iter().flatten().collect()
}

fn kernel_version(facts: &Facts) -> Option<Finding> {
    let (major, minor) = facts.kernel?;
    let severity = unless((major, minor) >= KERNEL_MIN, Severity::Refuse);
    let what = format!("kernel {major}.{minor}, at least {}.{} needed", KERNEL_MIN.0, KERNEL_MIN.1);
    Some(finding(severity, what, "boot a newer kernel"))
}

/// The shards' own attempt: it also meets seccomp filters, which no file tells of.
fn io_uring(facts: &Facts) -> Option<Finding> {
    Some(match &facts.ring_refused {
        None => finding(Severity::Fine, "io_uring: a ring opens".to_owned(), ""),
        Some(refused) => finding(Severity::Refuse, refused.clone(), ""),
    })
}

fn memlock(facts: &Facts, shards: u16) -> Option<Finding> {
    let bytes = facts.memlock_bytes?;
    let needed = MEMLOCK_BYTES_MIN;
    let what = format!("RLIMIT_MEMLOCK = {bytes}, at least {needed} needed for {shards} shards");
    let mend = "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)";
    Some(finding(unless(bytes >= needed, Severity::Refuse), what, mend))
}

/// The limit caps the table of direct descriptors of each shard.
fn nofile(resolved: &Resolved, facts: &Facts) -> Option<Finding> {
    let wanted = resolved.config.core.limits.connections_per_shard;
    let sockets = resolved.config.node.server.listening_sockets();
    let needed = u64::from(table_slots(wanted, sockets));
    let severity = unless(slots_allowed(wanted, &facts.nofile, sockets) == wanted, Severity::Refuse);
    let what = format!(
        "RLIMIT_NOFILE = {}, {needed} needed for limits.connections_per_shard = {wanted}",
        facts.nofile.soft
    );
    let mend = format!(
        "ulimit -Hn {needed} (systemd: LimitNOFILE={needed}), or more shards of at most {} connections",
        slots_allowed(u32::MAX, &facts.nofile, sockets)
    );
    Some(finding(severity, what, mend))
}

fn cpus(resolved: &Resolved, facts: &Facts) -> Option<Finding> {
    let wanted = &resolved.config.node.server.cpus;
    let missing = wanted.iter().find(|cpu| !facts.cpus.contains(&usize::from(**cpu)))?;
    let what = format!("server.cpus names CPU {missing}, which this process may not use");
    Some(finding(Severity::Refuse, what, format!("leave it out, or taskset -c {missing},…")))
}

fn file_max(facts: &Facts, sockets: u64) -> Option<Finding> {
    let max = facts.file_max?;
    let what = format!("fs.file-max = {max}, {sockets} sockets at the most");
    Some(finding(
        unless(max > sockets, Severity::Warn),
        what,
        format!("sysctl -w fs.file-max={}", sockets * 2),
    ))
}

fn somaxconn(resolved: &Resolved, facts: &Facts) -> Option<Finding> {
    let (max, backlog) = (facts.somaxconn?, u64::from(resolved.config.node.server.backlog));
    let what = format!("net.core.somaxconn = {max}, server.backlog = {backlog}");
    Some(finding(
        unless(max >= backlog, Severity::Warn),
        what,
        format!("sysctl -w net.core.somaxconn={backlog}"),
    ))
}

fn tcp_mem(resolved: &Resolved, facts: &Facts, sockets: u64) -> Option<Finding> {
    let server = &resolved.config.node.server;
    let each = 2 * (u64::from(server.send_buffer_bytes) + u64::from(server.receive_buffer_bytes));
    let (cap, needed) = (facts.tcp_memory_bytes?, sockets.saturating_mul(each));
    let pages = needed.div_ceil(rustix::param::page_size() as u64);
    let what = format!("net.ipv4.tcp_mem allows {cap} bytes, {needed} if every socket's buffers were full");
    let mend = format!(
        "sysctl -w net.ipv4.tcp_mem=\"{} {} {pages}\", or smaller server.…_buffer_bytes",
        pages / 2,
        pages / 4 * 3
    );
    Some(finding(unless(cap >= needed, Severity::Warn), what, mend))
}

fn buffers(resolved: &Resolved, facts: &Facts) -> Option<Finding> {
    let server = &resolved.config.node.server;
    let pairs = [
        ("net.core.wmem_max", facts.wmem_max_bytes, "server.send_buffer_bytes", server.send_buffer_bytes),
        (
            "net.core.rmem_max",
            facts.rmem_max_bytes,
            "server.receive_buffer_bytes",
            server.receive_buffer_bytes,
        ),
    ];
    let short = pairs.into_iter().find(|(_, max, _, wanted)| max.is_some_and(|max| max < u64::from(*wanted)));
    let (sysctl, max, key, wanted) = short?;
    let what = format!("{sysctl} = {}, which cuts {key} = {wanted}", max?);
    Some(finding(Severity::Warn, what, format!("sysctl -w {sysctl}={wanted}")))
}

fn local_ports(facts: &Facts) -> Option<Finding> {
    let (first, last) = facts.local_ports?;
    let ports = last.saturating_sub(first);
    let what = format!("net.ipv4.ip_local_port_range has {ports} ports for a proxy or a load generator here");
    let mend = "sysctl -w net.ipv4.ip_local_port_range=\"1024 65535\"";
    Some(finding(unless(ports >= LOCAL_PORTS_MIN, Severity::Warn), what, mend))
}

fn conntrack(facts: &Facts, sockets: u64) -> Option<Finding> {
    let max = facts.conntrack_max?;
    let what = format!("net.netfilter.nf_conntrack_max = {max}, {sockets} connections at the most");
    let mend = format!("sysctl -w net.netfilter.nf_conntrack_max={}, or do not track the port", sockets * 2);
    Some(finding(unless(max > sockets, Severity::Warn), what, mend))
}

#[cfg(test)]
mod tests {
    use super::super::tests::facts;
    use super::*;
    use crate::control::config::tests::resolved;
    use crate::io::NofileLimit;

    /// The findings that are not fine, for these flags and facts.
    fn found(flags: &[&str], facts: &Facts) -> Vec<Finding> {
        let resolved = resolved("", &[], flags, false).unwrap();
        let mut found = findings(&resolved, 2, facts);
        found.retain(|finding| finding.severity > Severity::Fine);
        found
    }

    fn nofile_of(limit: u64) -> NofileLimit {
        NofileLimit { soft: limit, hard: limit, was: limit }
    }

    #[test]
    fn a_good_machine_has_nothing_to_mend() {
        assert_eq!(found(&["limits.connections_per_shard=1000"], &facts()), []);
    }

    #[test]
    fn each_refusal_names_its_figure_and_its_remedy() {
        let check = |flags: &[&str], change: fn(&mut Facts), severity: Severity, what: &str, mend: &str| {
            let mut facts = facts();
            change(&mut facts);
            let mut flags = flags.to_vec();
            flags.push("limits.connections_per_shard=10000");
            let found = found(&flags, &facts);
            assert_eq!(found.len(), 1, "{what}: {found:?}");
            assert_eq!(found[0].severity, severity, "{what}");
            assert!(found[0].what.contains(what), "{:?}", found[0]);
            assert!(found[0].mend.contains(mend), "{:?}", found[0]);
        };
        use Severity::{Refuse, Warn};
        check(&[], |facts| facts.kernel = Some((6, 0)), Refuse, "kernel 6.0", "newer kernel");
        check(&[], |facts| facts.ring_refused = Some("seccomp".to_owned()), Refuse, "seccomp", "");
        check(
            &[],
            |facts| facts.memlock_bytes = Some(512 * 1024 - 1),
            Refuse,
            "RLIMIT_MEMLOCK",
            "LimitMEMLOCK",
        );
        check(
            &[],
            |facts| facts.nofile = nofile_of(u64::from(table_slots(10_000, 1)) - 1),
            Refuse,
            &format!("{} needed for limits.connections_per_shard = 10000", table_slots(10_000, 1)),
            &format!("LimitNOFILE={}", table_slots(10_000, 1)),
        );
        check(&["server.cpus=0,7"], |_| (), Refuse, "CPU 7", "leave it out");
        check(&[], |facts| facts.file_max = Some(20_000), Warn, "fs.file-max", "sysctl -w fs.file-max=40000");
        check(
            &[],
            |facts| facts.somaxconn = Some(128),
            Warn,
            "somaxconn = 128",
            "sysctl -w net.core.somaxconn=4096",
        );
        check(
            &[],
            |facts| facts.tcp_memory_bytes = Some(1 << 20),
            Warn,
            "tcp_mem",
            "sysctl -w net.ipv4.tcp_mem=",
        );
        check(
            &[],
            |facts| facts.wmem_max_bytes = Some(16_384),
            Warn,
            "wmem_max",
            "sysctl -w net.core.wmem_max=65536",
        );
        check(&[], |facts| facts.local_ports = Some((60_000, 61_000)), Warn, "port_range", "1024 65535");
        check(
            &[],
            |facts| facts.conntrack_max = Some(20_000),
            Warn,
            "conntrack_max",
            "sysctl -w net.netfilter.nf_conntrack_max=40000",
        );
    }

    #[test]
    fn limits_met_exactly_are_fine() {
        let exact = |facts: &mut Facts| {
            facts.nofile = nofile_of(u64::from(table_slots(10_000, 1)));
            facts.kernel = Some(KERNEL_MIN);
            facts.somaxconn = Some(4096);
            facts.memlock_bytes = Some(MEMLOCK_BYTES_MIN);
        };
        let mut facts = facts();
        exact(&mut facts);
        assert_eq!(found(&["limits.connections_per_shard=10000"], &facts), []);
    }
}
