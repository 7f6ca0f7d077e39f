//! What this machine offers, read once.
//!
//! Owns reading `/proc`, `/sys` and the process's limits. What follows from the figures is decided in
//! [`super::kernel`] and [`super::memory`], from a [`Facts`] that a test can write down.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

use crate::io::{NofileLimit, SLOTS_MARGIN, cores, probe_kernel, raise_nofile};

/// Figures of the machine and of the process's limits. `None`: not told, or not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Kernel version.
    pub kernel: Option<(u32, u32)>,
    /// CPUs that this process may run on.
    pub cpus: Vec<usize>,
    /// Limit of file descriptors, raised as far as it goes.
    pub nofile: NofileLimit,
    /// Limit of locked memory, in bytes; `None`: unlimited.
    pub memlock_bytes: Option<u64>,
    /// Memory that could be had now, in bytes.
    pub available_bytes: Option<u64>,
    /// Memory limit of the control group, in bytes.
    pub cgroup_bytes: Option<u64>,
    /// Memory of all TCP sockets at the most (`net.ipv4.tcp_mem`), in bytes.
    pub tcp_memory_bytes: Option<u64>,
    /// Why a ring cannot be had, with the remedy; `None`: one was opened and closed again.
    pub ring_refused: Option<String>,
    /// `net.core.somaxconn`.
    pub somaxconn: Option<u64>,
    /// `net.core.wmem_max`, in bytes.
    pub wmem_max_bytes: Option<u64>,
    /// `net.core.rmem_max`, in bytes.
    pub rmem_max_bytes: Option<u64>,
    /// `net.ipv4.ip_local_port_range`.
    pub local_ports: Option<(u64, u64)>,
    /// `net.netfilter.nf_conntrack_max`, where connections are tracked.
    pub conntrack_max: Option<u64>,
    /// `fs.file-max`.
    pub file_max: Option<u64>,
}

impl Facts {
    /// Reads this machine. Raises the soft limit of file descriptors to the hard one.
    pub fn read() -> Self {
        let proc = Path::new("/proc/sys");
        let number = |name: &str| number_of(&fs::read_to_string(proc.join(name)).ok()?, 0);
        let numbers = |name: &str| fs::read_to_string(proc.join(name)).ok();
        let page_bytes = rustix::param::page_size() as u64;
        Self {
            kernel: kernel_version(rustix::system::uname().release().to_str().unwrap_or_default()),
            cpus: cores(),
            nofile: raise_nofile(),
            memlock_bytes: getrlimit(Resource::Memlock).current,
            available_bytes: fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text)),
            cgroup_bytes: cgroup_limit(),
            tcp_memory_bytes: numbers("net/ipv4/tcp_mem")
                .and_then(|text| number_of(&text, 2))
                .map(|pages| pages.saturating_mul(page_bytes)),
            ring_refused: probe_kernel(SLOTS_MARGIN + 1).err().map(|error| error.to_string()),
            somaxconn: number("net/core/somaxconn"),
            wmem_max_bytes: number("net/core/wmem_max"),
            rmem_max_bytes: number("net/core/rmem_max"),
            local_ports: numbers("net/ipv4/ip_local_port_range")
                .and_then(|text| Some((number_of(&text, 0)?, number_of(&text, 1)?))),
            conntrack_max: number("net/netfilter/nf_conntrack_max"),
            file_max: number("fs/file-max"),
        }
    }
}

fn number_of(text: &str, index: usize) -> Option<u64> {
    text.split_whitespace().nth(index)?.parse().ok()
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(number_of(line, 0)? * 1024)
}

/// The tightest limit on the way from this process's control group to the root, of either version.
fn cgroup_limit() -> Option<u64> {
    let membership = fs::read_to_string("/proc/self/cgroup").ok()?;
    let files = membership.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?.trim_start_matches('/'));
        match controllers {
            "" => Some((PathBuf::from("/sys/fs/cgroup"), path, "memory.max")),
            "memory" => Some((PathBuf::from("/sys/fs/cgroup/memory"), path, "memory.limit_in_bytes")),
            _ => None,
        }
    });
    let limits = files.flat_map(|(root, path, file)| {
        let group = root.join(path);
        let groups: Vec<_> =
            group.ancestors().take_while(|dir| dir.starts_with(&root)).map(Path::to_owned).collect();
        groups.into_iter().filter_map(move |dir| number_of(&fs::read_to_string(dir.join(file)).ok()?, 0))
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_kernels_texts() {
        assert_eq!(kernel_version("6.18.44-fc-v669"), Some((6, 18)));
        assert_eq!(kernel_version("6.1"), Some((6, 1)));
        assert_eq!(kernel_version("unknown"), None);
        assert_eq!(available("MemTotal: 10 kB\nMemAvailable:  24 kB\n"), Some(24 * 1024));
        assert_eq!(number_of("287898\t383867\t575796\n", 2), Some(575_796));
        assert_eq!(number_of("max\n", 0), None);
    }

    #[test]
    fn this_machine_can_be_read() {
        let facts = Facts::read();
        assert!(facts.kernel.is_some_and(|version| version > (2, 6)));
        assert!(!facts.cpus.is_empty());
        assert!(facts.available_bytes.is_some_and(|bytes| bytes > 0));
        assert!(facts.nofile.soft > 0);
    }
}
