//! CPU time of the server under test: its threads, and the ksoftirqd of its core.
//!
//! `/proc/PID/task/*/schedstat` counts nanoseconds on the CPU, exactly; `/proc/PID/stat` counts sampled ticks, which
//! on a kernel with tick accounting are off by far for a task that sleeps often, and are kept for comparison only.
//! Network and io_uring work that does not fit the task's own context runs in ksoftirqd, hence that thread.
//! The core's idle time tells how much others used of it meanwhile: above a few percent, figures are noise.
//! A thread that ends between two samples loses what it used after the first; servers measured here keep theirs.

use std::collections::BTreeMap;
use std::fs;

use thiserror::Error;

/// The server's process is gone, or cannot be seen: the measurement is void.
#[derive(Debug, Error)]
pub(crate) enum CpuError {
    #[error("process {0} is gone or not ours to see: {1}")]
    Process(u32, std::io::Error),
    #[error("/proc/{0}/stat cannot be understood")]
    Stat(u32),
}

/// Whose CPU time counts.
#[derive(Clone, Debug)]
pub(crate) struct CpuMeter {
    pids: Vec<u32>,
    core: Option<usize>,
    ksoftirqd: Option<u32>,
}

/// CPU time up to one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct CpuSample {
    /// Nanoseconds on the CPU by thread id.
    threads_ns: BTreeMap<u32, u64>,
    ksoftirqd_ns: u64,
    /// utime + stime of the processes, in ticks of 10 ms.
    ticks: u64,
    /// The core's ticks so far.
    core: CoreTicks,
}

/// Ticks of one core, or of all, since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CoreTicks {
    idle: u64,
    total: u64,
}

impl CoreTicks {
    /// All cores together.
    pub(crate) fn of_machine() -> Option<CoreTicks> {
        parse_ticks(&fs::read_to_string("/proc/stat").ok()?, "cpu")
    }

    /// What part was used since, by whomever, 0 to 1: what a hypervisor took counts as used. None: no tick has passed.
    pub(crate) fn busy_since(self, earlier: CoreTicks) -> Option<f64> {
        let total = self.total.checked_sub(earlier.total).filter(|total| *total > 0)?;
        Some(1.0 - self.idle.saturating_sub(earlier.idle) as f64 / total as f64)
    }
}

/// CPU time between two samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuUsed {
    pub(crate) process_ns: u64,
    pub(crate) ksoftirqd_ns: u64,
    /// The same by the kernel's ticks (10 ms each), sampled: a plausibility check.
    pub(crate) ticks: u64,
    /// Ticks of the core in the same time, 0 where no core was named.
    core_idle_ticks: u64,
    core_ticks: u64,
}

impl CpuUsed {
    /// What part of the core others used (or the hypervisor took away), 0 to 1. None: no core was named.
    pub(crate) fn foreign_share(&self, wall_ns: f64) -> Option<f64> {
        let idle = (self.core_ticks > 0).then(|| self.core_idle_ticks as f64 / self.core_ticks as f64)?;
        Some((1.0 - idle - self.total_ns() as f64 / wall_ns).max(0.0))
    }

    /// What counts as the server's cost, in nanoseconds.
    pub(crate) fn total_ns(&self) -> u64 {
        self.process_ns + self.ksoftirqd_ns
    }
}

impl CpuMeter {
    /// Measures `pids` and, when a core is named, that core's ksoftirqd.
    pub(crate) fn new(pids: Vec<u32>, core: Option<usize>) -> CpuMeter {
        let ksoftirqd = core.and_then(|core| find_kernel_thread(&format!("ksoftirqd/{core}")));
        CpuMeter { pids, core, ksoftirqd }
    }

    pub(crate) fn sample(&self) -> Result<CpuSample, CpuError> {
        let mut sample = CpuSample::default();
        for &pid in &self.pids {
            let gone = |error| CpuError::Process(pid, error);
            for entry in fs::read_dir(format!("/proc/{pid}/task")).map_err(gone)? {
                let entry = entry.map_err(gone)?;
                let tid = entry.file_name().to_str().and_then(|name| name.parse().ok());
                let text = fs::read_to_string(entry.path().join("schedstat"));
                if let (Some(tid), Some(ns)) = (tid, text.ok().as_deref().and_then(parse_schedstat)) {
                    sample.threads_ns.insert(tid, ns);
                }
            }
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).map_err(gone)?;
            sample.ticks += parse_stat_ticks(&stat).ok_or(CpuError::Stat(pid))?;
        }
        if let Some(pid) = self.ksoftirqd {
            let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap_or_default();
            sample.ksoftirqd_ns = parse_schedstat(&text).unwrap_or(0);
        }
        if let Some(core) = self.core {
            let text = fs::read_to_string("/proc/stat").unwrap_or_default();
            sample.core = parse_ticks(&text, &format!("cpu{core}")).unwrap_or_default();
        }
        Ok(sample)
    }
}

impl CpuSample {
    /// What was used from `earlier` to `self`. A thread that is new since then counts whole.
    pub(crate) fn since(&self, earlier: &CpuSample) -> CpuUsed {
        let used =
            |(tid, &ns): (&u32, &u64)| ns.saturating_sub(earlier.threads_ns.get(tid).copied().unwrap_or(0));
        CpuUsed {
            process_ns: self.threads_ns.iter().map(used).sum(),
            ksoftirqd_ns: self.ksoftirqd_ns.saturating_sub(earlier.ksoftirqd_ns),
            ticks: self.ticks.saturating_sub(earlier.ticks),
            core_idle_ticks: self.core.idle.saturating_sub(earlier.core.idle),
            core_ticks: self.core.total.saturating_sub(earlier.core.total),
        }
    }
}

/// The first number of a schedstat file: nanoseconds on the CPU.
fn parse_schedstat(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// utime + stime, the fields 14 and 15 of /proc/PID/stat (proc(5)); the name before them may hold blanks.
fn parse_stat_ticks(text: &str) -> Option<u64> {
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// The line `name` in /proc/stat: user nice system idle iowait irq softirq steal …; guest time is in user already.
fn parse_ticks(text: &str, name: &str) -> Option<CoreTicks> {
    let line = text.lines().find(|line| line.split_ascii_whitespace().next() == Some(name))?;
    let ticks: Vec<u64> =
        line.split_ascii_whitespace().skip(1).take(8).filter_map(|tick| tick.parse().ok()).collect();
    Some(CoreTicks { idle: ticks.get(3)? + ticks.get(4)?, total: ticks.iter().sum() })
}

/// The kernel thread of that name. Kernel threads are few and have low ids, so a scan of /proc is cheap enough.
fn find_kernel_thread(name: &str) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?;
    let ids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    ids.filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name))
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_the_kernel_writes() {
        assert_eq!(parse_schedstat("123456789 53269 1\n"), Some(123_456_789));
        assert_eq!(parse_schedstat(""), None);
        let stat = "42 (a (b) c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 12345 1000 200";
        assert_eq!(parse_stat_ticks(stat), Some(300));
        assert_eq!(parse_stat_ticks("42 (short) S 1"), None);
        let stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu1 1 1 1 1 1 1 1 1 1 1\ncpu10 10 20 30 400 50 6 7 8 9 0\n";
        assert_eq!(parse_ticks(stat, "cpu10"), Some(CoreTicks { idle: 450, total: 531 }));
        assert_eq!(parse_ticks(stat, "cpu"), Some(CoreTicks { idle: 18, total: 72 }));
        assert_eq!(parse_ticks(stat, "cpu2"), None);
        let later = CoreTicks { idle: 48, total: 172 };
        assert_eq!(later.busy_since(CoreTicks { idle: 18, total: 72 }), Some(0.7));
        assert_eq!(later.busy_since(later), None);
    }

    #[test]
    fn used_is_summed_over_threads_old_and_new() {
        let sample = |threads: &[(u32, u64)], ksoftirqd_ns, ticks| CpuSample {
            threads_ns: threads.iter().copied().collect(),
            ksoftirqd_ns,
            ticks,
            core: CoreTicks { idle: ticks, total: 10 * ticks },
        };
        let earlier = sample(&[(1, 100), (2, 50)], 10, 3);
        let later = sample(&[(1, 400), (3, 7)], 15, 5);
        let used = later.since(&earlier);
        let expected =
            CpuUsed { process_ns: 307, ksoftirqd_ns: 5, ticks: 2, core_idle_ticks: 2, core_ticks: 20 };
        assert_eq!(used, expected);
        assert_eq!(used.total_ns(), 312);
        assert!((used.foreign_share(624.0).expect("a core") - 0.4).abs() < 1e-9);
        assert_eq!(CpuUsed::default().foreign_share(1.0), None);
    }

    #[test]
    fn sees_its_own_work() {
        let meter = CpuMeter::new(vec![std::process::id()], Some(0));
        let before = meter.sample().expect("own process");
        let mut sum = 0u64;
        // Work until the clock of this very thread has moved, at most 10^10 steps.
        for step in 0..10_000_000_000u64 {
            sum = sum.wrapping_mul(31).wrapping_add(step);
            if step % 1_000_000 == 0 && meter.sample().expect("own process").since(&before).process_ns > 0 {
                break;
            }
        }
        assert!(meter.sample().expect("own process").since(&before).process_ns > 0, "{sum}");
        assert!(CpuMeter::new(vec![u32::MAX], None).sample().is_err());
    }
}
