//! The header of every report: the machine, its tuning and the command, without which a figure means nothing.

use std::fs;

use serde::Serialize;

/// Settings of the kernel that move the figures; those that a kernel does not have are left out.
const TUNING: [&str; 12] = [
    "net/core/somaxconn",
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/core/netdev_max_backlog",
    "net/core/busy_poll",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/ipv4/tcp_tw_reuse",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/tcp_congestion_control",
    "kernel/io_uring_disabled",
    "vm/overcommit_memory",
];

/// Where a figure comes from.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    /// The hard limit of open files: it decides how many load processes a run needs.
    pub(crate) nofile: u64,
    pub(crate) hugepages: String,
    /// (sysctl, value).
    pub(crate) tuning: Vec<(String, String)>,
    pub(crate) command: String,
    pub(crate) version: &'static str,
    pub(crate) unix_ms: u64,
}

impl Machine {
    /// Reads all of it; what cannot be read is "unknown".
    pub(crate) fn look() -> Machine {
        let uname = rustix::system::uname();
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let since_epoch =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Machine {
            kernel: format!("{} {}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy()),
            cpu: cpu_model(&cpuinfo).unwrap_or_else(|| "unknown".into()),
            cores: cpuinfo.lines().filter(|line| line.starts_with("processor")).count(),
            memory_bytes: total_memory_bytes(),
            nofile: limit.maximum.unwrap_or(u64::MAX),
            hugepages: setting("/sys/kernel/mm/transparent_hugepage/enabled")
                .unwrap_or_else(|| "unknown".into()),
            tuning: TUNING
                .iter()
                .filter_map(|key| Some((key.replace('/', "."), setting(&format!("/proc/sys/{key}"))?)))
                .collect(),
            command: std::env::args().collect::<Vec<_>>().join(" "),
            version: env!("CARGO_PKG_VERSION"),
            unix_ms: since_epoch.as_millis() as u64,
        }
    }

    /// The header as text, a few lines.
    pub(crate) fn text(&self) -> String {
        let tuning: Vec<String> = self.tuning.iter().map(|(key, value)| format!("{key}={value}")).collect();
        format!(
            "machine  {} · {} · {} cores · {:.1} GiB · nofile {}\ntuning   {}\ncommand  {}",
            self.kernel,
            self.cpu,
            self.cores,
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.nofile,
            tuning.join(" "),
            self.command,
        )
    }
}

fn cpu_model(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn total_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    // The field's width differs between platforms.
    #[allow(clippy::useless_conversion)]
    let total = u64::from(info.totalram);
    total * u64::from(info.mem_unit)
}

fn setting(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.split_whitespace().collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_model() {
        assert_eq!(cpu_model("processor : 0\nmodel name\t: AMD EPYC\nx : y").as_deref(), Some("AMD EPYC"));
        assert_eq!(cpu_model("processor : 0"), None);
    }

    #[test]
    fn the_header_names_kernel_and_command() {
        let machine = Machine::look();
        assert!(machine.cores > 0 && machine.memory_bytes > 0);
        let text = machine.text();
        assert!(text.contains(&machine.kernel) && text.contains(&machine.command));
    }
}
