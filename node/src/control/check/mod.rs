//! `ringmain check`, and the same look before `serve`: what a node would run with, whether the machine
//! can give it, and what to do where it cannot.
//!
//! Owns the [`Plan`]: the configuration fitted to this machine. It changes nothing on the machine but
//! the process's soft limit of file descriptors.

pub mod facts;
pub mod kernel;
pub mod memory;
mod sizes;

use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use ringmain_bus::backend::Warning;
use ringmain_proto::time::Now;
use thiserror::Error;

use self::facts::Facts;
use self::kernel::{Finding, Severity};
use self::memory::Memory;
use super::VERSION;
use super::bus::Backend;
use super::cli::say;
use super::config::{Resolved, document, relations};
use super::failure::{EXIT_REFUSED, Failure};
use crate::core::{Core, CoreOptions, KeyError};
use crate::io::{SHARDS_MAX, slots_allowed};

/// Why this machine cannot run the configuration. The operator's to mend.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The maxima add up to more than the budget.
    #[error("the worst case is {} and the budget {} ({budget_source})", mib(*total_bytes), mib(*budget_bytes))]
    OverBudget {
        /// Worst case.
        total_bytes: u64,
        /// What may be used.
        budget_bytes: u64,
        /// Where the budget comes from.
        budget_source: String,
    },
    /// A key that verifies tokens cannot be used.
    #[error("{message}")]
    Key {
        /// Its path, and what is wrong with it.
        message: String,
    },
    /// The broker's address cannot be used.
    #[error("bus.url: {message}")]
    Bus {
        /// What is wrong with it; without user and password.
        message: String,
    },
    /// The kernel or a limit refuses.
    #[error("{what}")]
    Refused {
        /// What was found, and what is needed.
        what: String,
        /// The command that mends it.
        mend: String,
    },
}

impl CheckError {
    /// What to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::OverBudget { .. } => Some(
                "`ringmain check` adds it up: lower limits.* or --shards, or raise server.memory_budget_bytes"
                    .to_owned(),
            ),
            Self::Refused { mend, .. } => Some(mend.clone()).filter(|mend| !mend.is_empty()),
            Self::Bus { .. } => Some("as redis://127.0.0.1:6379; `ringmain genconfig` shows all forms".to_owned()),
            Self::Key { .. } => Some("tokens are verified with it: give a PEM public key".to_owned()),
        }
    }
}

/// What a node would run with on this machine.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The configuration, with open maxima fitted to the machine.
    pub resolved: Resolved,
    /// How many shards.
    pub shards: u16,
    /// The CPU of each shard, in order.
    pub cpus: Vec<usize>,
    /// What was made smaller to fit.
    pub changed: Vec<String>,
    /// The worst case of memory.
    pub memory: Memory,
    /// What was looked at.
    pub findings: Vec<Finding>,
    /// A key that verifies tokens and cannot be used, and why.
    pub bad_key: Option<String>,
    /// The broker, if there is one.
    pub backend: Option<Backend>,
    /// What is wrong with its address.
    pub bad_bus: Option<String>,
}

impl Plan {
    /// Fits a configuration to a machine.
    pub fn new(mut resolved: Resolved, facts: &Facts) -> Self {
        let server = &resolved.config.node.server;
        let named: Vec<_> = server.cpus.iter().copied().map(usize::from).collect();
        let usable = if named.is_empty() { &facts.cpus } else { &named };
        let one_each = u16::try_from(usable.len()).unwrap_or(SHARDS_MAX).clamp(1, SHARDS_MAX);
        let shards = server.shards.unwrap_or(one_each);
        let cpus = usable.iter().copied().cycle().take(usize::from(shards)).collect();
        let mut changed = fit_connections(&mut resolved, facts);
        changed.extend(memory::fit(&mut resolved, shards, facts));
        let memory = Memory::of(&resolved.config, shards, facts);
        let findings = kernel::findings(&resolved, shards, facts);
        let bad_key = try_keys(&resolved).err().map(|error| error.to_string());
        let (backend, bad_bus) = match Backend::from_config(&resolved.config.node.bus, &resolved.config.core)
        {
            Ok(backend) => (backend, None),
            Err(message) => (None, Some(message)),
        };
        Self { resolved, shards, cpus, changed, memory, findings, bad_key, backend, bad_bus }
    }

    /// What keeps a node from starting, if anything.
    pub fn refusal(&self) -> Option<CheckError> {
        let refused = self.findings.iter().find(|finding| finding.severity == Severity::Refuse);
        if let Some(Finding { what, mend, .. }) = refused {
            return Some(CheckError::Refused { what: what.clone(), mend: mend.clone() });
        }
        if let Some(message) = self.bad_key.clone() {
            return Some(CheckError::Key { message });
        }
        if let Some(message) = self.bad_bus.clone() {
            return Some(CheckError::Bus { message });
        }
        (!self.memory.fits()).then(|| CheckError::OverBudget {
            total_bytes: self.memory.total_bytes(),
            budget_bytes: self.memory.budget_bytes,
            budget_source: self.memory.budget_source.clone(),
        })
    }

    /// What deserves a look though the node starts.
    pub fn warnings(&self) -> Vec<String> {
        let found = self.findings.iter().filter(|finding| finding.severity == Severity::Warn);
        let found = found.map(|finding| format!("{} (mend: {})", finding.what, finding.mend));
        relations::warnings(&self.resolved)
            .into_iter()
            .chain(self.changed.iter().cloned())
            .chain(found)
            .collect()
    }
}

/// Makes a core with the configured keys and lets it go again.
fn try_keys(resolved: &Resolved) -> Result<(), KeyError> {
    let options = CoreOptions {
        shard: 0,
        shards: 1,
        config: Arc::new(resolved.config.core.clone()),
        seed: 0,
        proxy_listeners: Vec::new(),
        version: VERSION.into(),
        started_unix_ms: 0,
        assets: Arc::from([]),
    };
    Core::new(options, Now::default()).map(drop)
}

/// An open number of connections is what the limit of descriptors allows.
fn fit_connections(resolved: &mut Resolved, facts: &Facts) -> Vec<String> {
    const KEY: &str = "limits.connections_per_shard";
    let wanted = resolved.config.core.limits.connections_per_shard;
    let sockets = resolved.config.node.server.listening_sockets();
    let allowed = slots_allowed(wanted, &facts.nofile, sockets);
    if allowed == wanted || allowed == 0 || resolved.is_set(KEY) {
        return Vec::new();
    }
    resolved.config.core.limits.connections_per_shard = allowed;
    vec![format!("{KEY} = {allowed} instead of {wanted}, for RLIMIT_NOFILE is {}", facts.nofile.soft)]
}

/// Bytes as MiB, for people.
pub(super) fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

/// Runs `ringmain check`.
pub fn run(resolved: Resolved) -> Result<ExitCode, Failure> {
    let plan = Plan::new(resolved, &Facts::read());
    let bus = plan.backend.as_ref().map(Backend::check);
    say(&report(&plan, bus.as_deref()));
    Ok(if plan.refusal().is_some() { ExitCode::from(EXIT_REFUSED) } else { ExitCode::SUCCESS })
}

/// The whole report as text. `bus` is what the broker gives up, if there is one.
pub fn report(plan: &Plan, bus: Option<&[Warning]>) -> String {
    let mut out = String::from("# Configuration\n\n");
    out.push_str(&document::listing(&plan.resolved));
    write_memory(plan, &mut out);
    write_findings(plan, &mut out);
    if let Some(warnings) = bus {
        write_bus(warnings, &mut out);
    }
    match plan.refusal() {
        None => out.push_str("\nringmain serve would start.\n"),
        Some(error) => {
            let _ = writeln!(out, "\nringmain serve would refuse: {error}");
        }
    }
    out
}

fn write_memory(plan: &Plan, out: &mut String) {
    let _ = writeln!(out, "# Memory at worst, {} shards\n", plan.shards);
    let _ = writeln!(out, "{:<55} {:>11} {:>12} {:>14}", "", "at most", "bytes each", "total");
    for line in &plan.memory.lines {
        let total = mib(line.total_bytes());
        let _ = writeln!(out, "{:<55} {:>11} {:>12} {total:>14}", line.what, line.count, line.each_bytes);
    }
    let total = plan.memory.total_bytes();
    let _ = writeln!(out, "{:<55} {:>39}", "sum", mib(total));
    let budget = format!("budget: {}", plan.memory.budget_source);
    let _ = writeln!(out, "{budget:<55} {:>39}\n", mib(plan.memory.budget_bytes));
}

fn write_findings(plan: &Plan, out: &mut String) {
    out.push_str("# Kernel and limits\n\n");
    for Finding { severity, what, mend } in &plan.findings {
        write_finding(*severity, what, mend, out);
    }
    for warning in relations::warnings(&plan.resolved).iter().chain(&plan.changed) {
        let _ = writeln!(out, "note    {warning}");
    }
}

fn write_finding(severity: Severity, what: &str, mend: &str, out: &mut String) {
    let label = match severity {
        Severity::Fine => "fine  ",
        Severity::Warn => "warn  ",
        Severity::Refuse => "refuse",
    };
    let _ = writeln!(out, "{label}  {what}");
    if !mend.is_empty() {
        let _ = writeln!(out, "        mend: {mend}");
    }
}

fn write_bus(warnings: &[Warning], out: &mut String) {
    out.push_str("\n# Bus\n\n");
    if warnings.is_empty() {
        write_finding(Severity::Fine, "the broker answers and gives up nothing of the contract", "", out);
    }
    for Warning { what, mend } in warnings {
        write_finding(Severity::Warn, what, mend, out);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::control::config::tests::resolved;
    use crate::io::{NofileLimit, table_slots};

    /// A machine that refuses nothing: 4 CPUs, 64 GiB.
    pub(crate) fn facts() -> Facts {
        Facts {
            kernel: Some((6, 18)),
            cpus: vec![0, 1, 2, 3],
            nofile: NofileLimit { soft: 1 << 20, hard: 1 << 20, was: 1024 },
            memlock_bytes: None,
            available_bytes: Some(64 << 30),
            cgroup_bytes: None,
            tcp_memory_bytes: Some(8 << 30),
            ring_refused: None,
            somaxconn: Some(4096),
            wmem_max_bytes: Some(4 << 20),
            rmem_max_bytes: Some(4 << 20),
            local_ports: Some((32_768, 60_999)),
            conntrack_max: None,
            file_max: Some(1 << 30),
        }
    }

    fn plan(flags: &[&str], facts: &Facts) -> Plan {
        Plan::new(resolved("", &[], flags, false).unwrap(), facts)
    }

    #[test]
    fn shards_are_one_per_usable_cpu_unless_told() {
        let check = |flags: &[&str], shards: u16, cpus: &[usize]| {
            let plan = plan(flags, &facts());
            assert_eq!((plan.shards, plan.cpus.as_slice()), (shards, cpus), "{flags:?}");
        };
        check(&[], 4, &[0, 1, 2, 3]);
        check(&["server.cpus=2,3"], 2, &[2, 3]);
        check(&["server.shards=6"], 6, &[0, 1, 2, 3, 0, 1]);
        check(&["server.shards=3", "server.cpus=1"], 3, &[1, 1, 1]);
    }

    #[test]
    fn open_connections_follow_the_limit_of_descriptors_and_set_ones_are_refused() {
        let small = Facts { nofile: NofileLimit { soft: 20_000, hard: 20_000, was: 1024 }, ..facts() };
        let open = plan(&[], &small);
        let allowed = 20_000 - table_slots(0, 1);
        assert_eq!(open.resolved.config.core.limits.connections_per_shard, allowed);
        assert!(open.changed[0].contains(&format!("{allowed} instead of 65536")), "{:?}", open.changed);
        assert!(open.refusal().is_none());
        let set = plan(&["limits.connections_per_shard=20000"], &small);
        let error = set.refusal().expect("more than the limit");
        assert!(error.to_string().contains("RLIMIT_NOFILE = 20000"), "{error}");
        assert!(
            error
                .help()
                .is_some_and(|help| help.contains(&format!("LimitNOFILE={}", table_slots(20_000, 1))))
        );
    }

    #[test]
    fn over_budget_is_refused_with_both_figures() {
        let plan = plan(&["server.memory_budget_bytes=67108864"], &facts());
        let error = plan.refusal().expect("64 MiB are not enough");
        assert!(error.to_string().contains("the budget 64.0 MiB (server.memory_budget_bytes)"), "{error}");
    }

    #[test]
    fn the_report_shows_everything_and_no_secret() {
        let flags = ["admin.api_key=hunter2", "token.hmac_secret=hunter3"];
        let bus = [Warning::new("the broker forgets", "remind it")];
        let report = report(&plan(&flags, &Facts { somaxconn: Some(128), ..facts() }), Some(&bus));
        assert!(!report.contains("hunter"), "{report}");
        for part in [
            "api_key = \"***\"",
            "histories (limits.history_pool_bytes)",
            "kernel: sockets",
            "sum ",
            "budget: nine tenths of the memory available now",
            "warn    net.core.somaxconn = 128",
            "mend: sysctl -w net.core.somaxconn=4096",
            "note    admin.api_key is shorter than 32 bytes",
            "warn    the broker forgets",
            "mend: remind it",
            "ringmain serve would start.",
        ] {
            assert!(report.contains(part), "{part} in\n{report}");
        }
    }
}
