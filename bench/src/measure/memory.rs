//! Memory of the server: private pages of its process, and what the kernel holds for sockets.
//!
//! Private memory is what would come back if the process died: Private_Clean + Private_Dirty of smaps_rollup. Slab and
//! socket memory belong to the machine: with client and server on one machine both ends are in them.

use std::fs;

use serde::Serialize;
use thiserror::Error;

/// A number that cannot be had: the process is gone or belongs to another user.
#[derive(Debug, Error)]
#[error("cannot read {path}: {why}")]
pub(crate) struct MemoryError {
    path: String,
    why: String,
}

/// Memory at one moment, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct MemorySample {
    /// Private pages of the server's processes.
    pub(crate) private_bytes: u64,
    /// The kernel's slab caches, whole machine.
    pub(crate) slab_bytes: u64,
    /// Buffers of TCP sockets, whole machine (`mem` of /proc/net/sockstat).
    pub(crate) socket_bytes: u64,
}

/// Samples the memory of `pids` and of the machine's network stack.
pub(crate) fn sample(pids: &[u32]) -> Result<MemorySample, MemoryError> {
    let mut memory = MemorySample::default();
    for pid in pids {
        memory.private_bytes += read(&format!("/proc/{pid}/smaps_rollup"), private_bytes)?;
    }
    memory.slab_bytes = read("/proc/meminfo", slab_bytes)?;
    memory.socket_bytes = read("/proc/net/sockstat", |text| socket_pages(text).map(|n| n * page_bytes()))?;
    Ok(memory)
}

fn read(path: &str, parse: impl Fn(&str) -> Option<u64>) -> Result<u64, MemoryError> {
    let failed = |why: String| MemoryError { path: path.into(), why };
    let text = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    parse(&text).ok_or_else(|| failed("the expected line is missing".into()))
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

fn private_bytes(smaps_rollup: &str) -> Option<u64> {
    Some(kib_line(smaps_rollup, "Private_Clean:")? + kib_line(smaps_rollup, "Private_Dirty:")?)
}

fn slab_bytes(meminfo: &str) -> Option<u64> {
    kib_line(meminfo, "Slab:")
}

/// `TCP: inuse 5 orphan 0 tw 0 alloc 7 mem 1`: the last number, in pages.
fn socket_pages(sockstat: &str) -> Option<u64> {
    let line = sockstat.lines().find(|line| line.starts_with("TCP:"))?;
    line.rsplit_once("mem ")?.1.trim().parse().ok()
}

fn kib_line(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_the_kernel_writes() {
        let rollup =
            "Rss: 9 kB\nShared_Clean:   5 kB\nPrivate_Clean:        12 kB\nPrivate_Dirty:     3000 kB\n";
        assert_eq!(private_bytes(rollup), Some(3012 * 1024));
        assert_eq!(private_bytes("Private_Clean: 1 kB\n"), None);
        assert_eq!(slab_bytes("MemFree: 1 kB\nSlab:   2048 kB\n"), Some(2 << 20));
        let sockstat = "sockets: used 9\nTCP: inuse 6 orphan 0 tw 0 alloc 9 mem 17\nUDP: inuse 2 mem 0\n";
        assert_eq!(socket_pages(sockstat), Some(17));
        assert_eq!(socket_pages("UDP: mem 3"), None);
    }

    #[test]
    fn samples_this_process() {
        let memory = sample(&[std::process::id()]).expect("own process");
        assert!(memory.private_bytes > 0 && memory.slab_bytes > 0);
        assert!(sample(&[u32::MAX]).is_err());
    }
}
