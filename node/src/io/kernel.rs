//! What this kernel allows, and why it refuses.
//!
//! Owns the translation of a refused io_uring into a cause and its remedy. The translation is a pure
//! function of the error and of [`KernelFacts`].

use std::fs;

use rustix::process::{Resource, getrlimit};

/// The oldest kernel that has what the wire uses: `DEFER_TASKRUN` (6.1).
pub const KERNEL_MIN: (u32, u32) = (6, 1);

/// What is known of the kernel and of the process's limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelFacts {
    /// `uname -r`.
    pub release: String,
    /// `kernel.io_uring_disabled`: 0 open, 1 for privileged processes only, 2 closed; `None`: the
    /// kernel has no such sysctl (before 6.6).
    pub io_uring_disabled: Option<u8>,
    /// Soft limit of locked memory in bytes; `None`: unlimited.
    pub memlock_bytes: Option<u64>,
    /// Soft limit of file descriptors.
    pub nofile: u64,
}

impl KernelFacts {
    /// Asks the kernel.
    pub fn read() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let sysctl = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").ok();
        Self {
            release,
            io_uring_disabled: sysctl.and_then(|text| text.trim().parse().ok()),
            memlock_bytes: getrlimit(Resource::Memlock).current,
            nofile: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
        }
    }

    /// Major and minor number of the release; `None` if it has an unknown shape.
    fn version(&self) -> Option<(u32, u32)> {
        let mut numbers = self.release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    }

    fn is_old(&self) -> bool {
        self.version().is_some_and(|version| version < KERNEL_MIN)
    }
}

/// Why a shard did not start. Each names its remedy; none mends itself by a retry.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The sysctl forbids io_uring.
    #[error(
        "io_uring is switched off by kernel.io_uring_disabled={0}: run `sysctl -w kernel.io_uring_disabled=0` \
         as root (1 also admits members of the group kernel.io_uring_group)"
    )]
    Disabled(u8),
    /// A seccomp filter forbids it, as container runtimes do by default.
    #[error(
        "io_uring is refused with EPERM although kernel.io_uring_disabled allows it: a seccomp filter forbids \
         it. Allow io_uring_setup, io_uring_enter and io_uring_register in the container's profile (docker: \
         --security-opt seccomp=PROFILE.json; Kubernetes: securityContext.seccompProfile)"
    )]
    Seccomp,
    /// No io_uring, or too old a one.
    #[error("this kernel ({release}) is too old: {} or newer is needed ({step} failed: {error})", needed())]
    OldKernel {
        /// `uname -r`.
        release: String,
        /// What it refused.
        step: &'static str,
        /// How.
        error: std::io::Error,
    },
    /// Not enough lockable memory.
    #[error(
        "no memory for {step}: the limit of locked memory is {}; raise it (`ulimit -l unlimited`, systemd: \
         LimitMEMLOCK=infinity), or free memory",
        limit_text(.memlock_bytes.as_ref())
    )]
    Memory {
        /// The soft limit, `None`: unlimited.
        memlock_bytes: Option<u64>,
        /// What needed it.
        step: &'static str,
    },
    /// Too few file descriptors, or a table of connections above their limit.
    #[error(
        "too few file descriptors for {step}: the limit is {nofile}; raise it (`ulimit -n`, systemd: \
         LimitNOFILE=) or ask for fewer connections or shards"
    )]
    Descriptors {
        /// The soft limit.
        nofile: u64,
        /// What needed them.
        step: &'static str,
    },
    /// The core does not exist or is not in this process's cpuset.
    #[error(
        "cannot pin a shard to core {core}: it does not exist or is outside this process's cpuset ({error})"
    )]
    Core {
        /// The core asked for.
        core: usize,
        /// What the kernel said.
        error: std::io::Error,
    },
    /// The executor did not start.
    #[error("the executor of a shard did not start: {0}")]
    Executor(String),
    /// The thread could not be made.
    #[error("cannot start the thread of a shard: {0}")]
    Thread(std::io::Error),
    /// Anything else.
    #[error("cannot set up the ring: {step}: {error}")]
    Ring {
        /// What failed.
        step: &'static str,
        /// How.
        error: std::io::Error,
    },
}

fn needed() -> String {
    format!("{}.{}", KERNEL_MIN.0, KERNEL_MIN.1)
}

fn limit_text(bytes: Option<&u64>) -> String {
    bytes.map_or_else(|| "unlimited".into(), |bytes| format!("{} KiB", bytes / 1024))
}

/// The cause of a refusal.
pub(super) fn explain(step: &'static str, error: std::io::Error, facts: &KernelFacts) -> StartError {
    match error.raw_os_error() {
        Some(libc::EPERM) => match facts.io_uring_disabled {
            Some(setting @ 1..) => StartError::Disabled(setting),
            _ => StartError::Seccomp,
        },
        Some(libc::ENOSYS) => StartError::OldKernel { release: facts.release.clone(), step, error },
        Some(libc::EINVAL) if facts.is_old() => {
            StartError::OldKernel { release: facts.release.clone(), step, error }
        }
        Some(libc::ENOMEM) => StartError::Memory { memlock_bytes: facts.memlock_bytes, step },
        Some(libc::EMFILE | libc::ENFILE) => StartError::Descriptors { nofile: facts.nofile, step },
        _ => StartError::Ring { step, error },
    }
}

/// The cause of an executor that did not start.
pub(super) fn explain_executor(error: glommio::GlommioError<()>) -> StartError {
    use glommio::{GlommioError, ReactorErrorKind};
    let facts = KernelFacts::read();
    let memory = StartError::Memory { memlock_bytes: facts.memlock_bytes, step: "the executor's rings" };
    match error {
        // It wraps its own kind of error into one of IO on the way.
        GlommioError::IoError(error) if error.to_string().contains("MemLockLimit") => memory,
        GlommioError::IoError(error) => explain("the executor's rings", error, &facts),
        GlommioError::ReactorError(ReactorErrorKind::MemLockLimit(..)) => memory,
        other => StartError::Executor(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(release: &str, disabled: Option<u8>) -> KernelFacts {
        KernelFacts {
            release: release.into(),
            io_uring_disabled: disabled,
            memlock_bytes: Some(65_536),
            nofile: 1_024,
        }
    }

    #[test]
    fn every_refusal_names_its_remedy() {
        let check = |errno, facts: &KernelFacts, words: &[&str]| {
            let text = explain("setup", std::io::Error::from_raw_os_error(errno), facts).to_string();
            for word in words {
                assert!(text.contains(word), "{text:?} lacks {word:?}");
            }
        };
        let new = facts("6.18.44-generic", Some(0));
        check(libc::EPERM, &facts("6.18.1", Some(2)), &["sysctl -w kernel.io_uring_disabled=0", "=2"]);
        check(libc::EPERM, &facts("6.18.1", Some(1)), &["sysctl", "kernel.io_uring_group"]);
        check(libc::EPERM, &new, &["seccomp", "io_uring_setup"]);
        check(libc::EPERM, &facts("6.1.0", None), &["seccomp"]);
        check(libc::ENOSYS, &facts("4.19.0", None), &["4.19.0", "too old", "6.1 or newer"]);
        check(libc::EINVAL, &facts("5.15.0-91", None), &["5.15.0-91", "6.1 or newer"]);
        check(libc::EINVAL, &new, &["cannot set up the ring", "setup"]);
        check(libc::ENOMEM, &new, &["64 KiB", "ulimit -l", "LimitMEMLOCK"]);
        check(libc::EMFILE, &new, &["1024", "ulimit -n", "LimitNOFILE"]);
    }

    #[test]
    fn releases_are_compared_by_number() {
        let check = |release, old| assert_eq!(facts(release, None).is_old(), old, "{release}");
        check("6.0.19", true);
        check("6.1.0", false);
        check("6.18.44-fc", false);
        check("10.0", false);
        check("5.19.0-rc1", true);
        check("unknown", false);
    }
}
