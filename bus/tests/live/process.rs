//! Processes of brokers: started so that they end with the tests, whatever becomes of these, and stopped by their
//! process id.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long a broker may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(60);

/// A running process; dropped, it is killed.
pub(crate) struct Process {
    child: Child,
    what: String,
}

/// `program` with `arguments`, its output in `log`. It is killed when this process ends: by its parent's death
/// signal, for which its parent is a thread that lives as long as the process.
pub(crate) fn start(program: &Path, arguments: &[String], directory: &Path, log: &Path) -> Process {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(arguments).current_dir(directory);
    let out = std::fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
    command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out).process_group(0);
    let (started, child) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = started.send(command.spawn());
        loop {
            std::thread::park();
        }
    });
    let what = format!("{} {}", program.display(), arguments.join(" "));
    let child = child.recv().unwrap().unwrap_or_else(|error| panic!("cannot start {what}: {error}"));
    Process { child, what }
}

impl Process {
    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGSTOP, SIGCONT, SIGTERM and the like, by name without SIG.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.pid().to_string()]).status().unwrap();
        assert!(status.success(), "cannot send {name} to {}", self.what);
    }

    /// SIGKILL, and waits for the end.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it answers TCP on a port of loopback.
    pub(crate) fn await_port(&mut self, port: u16, log: &Path) {
        let ends = Instant::now() + START_MAX;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            let exited = self.child.try_wait().unwrap();
            assert!(exited.is_none() && Instant::now() < ends, "{} did not start:\n{}", self.what, tail(log));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The end of a log.
pub(crate) fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Ports of loopback that were free a moment ago.
pub(crate) fn free_ports(count: usize) -> Vec<u16> {
    let listeners: Vec<_> =
        (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
    listeners.iter().map(|listener| listener.local_addr().unwrap().port()).collect()
}

/// Where a broker's program is: in the project's `target/brokers`, else on the PATH.
pub(crate) fn program(name: &str, install: &str) -> PathBuf {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/brokers").join(name);
    if ours.exists() {
        return ours;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|directory| directory.join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("no {name} here: deploy/local/install {install}"))
}
