//! Real NATS servers with JetStream on loopback, one or a cluster of three, and what can be done to them.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ringmain_bus::nats::{self, NatsOptions};

use crate::live::process::{self, Process};
use crate::live::proxy::Proxies;
use crate::live::{Broker, Start};

/// How long a server may take to start on a busy machine.
const START_MAX: Duration = Duration::from_secs(60);

/// How often a port that was free is taken by somebody else before it is used.
const ATTEMPTS_MAX: usize = 5;

/// Which server: the newest, or Debian's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Newest,
    Debian,
}

impl Version {
    fn program(self) -> PathBuf {
        let debian = [Path::new("/usr/sbin/nats-server"), Path::new("/usr/bin/nats-server")];
        match self {
            Version::Newest => process::program("nats-server", "nats"),
            Version::Debian => {
                let found = debian.into_iter().find(|path| path.exists());
                found.expect("no nats-server of Debian here: deploy/local/install nats").to_owned()
            }
        }
    }
}

struct Server {
    directory: PathBuf,
    port: u16,
    process: Option<Process>,
    is_paused: bool,
}

impl Server {
    fn log(&self) -> PathBuf {
        self.directory.join("log")
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }
}

/// Servers of one test.
pub(crate) struct Nats {
    directory: tempfile::TempDir,
    version: Version,
    servers: Vec<Server>,
    /// Of no other test: a port that was free may be another's by now.
    name: String,
    /// Ports of the routes of a cluster.
    routes: Vec<u16>,
    /// Where each server listens now; a node names it by its number.
    ports: Arc<Mutex<Vec<u16>>>,
    options: NatsOptions,
    /// More of the configuration.
    extra: String,
}

impl Nats {
    /// One server.
    pub(crate) fn single(version: Version) -> Nats {
        Nats::new(version, 1, NatsOptions::default(), "")
    }

    /// A cluster of three, whose streams have three copies.
    pub(crate) fn cluster(version: Version) -> Nats {
        Nats::new(version, 3, NatsOptions { replicas: Some(3), ..NatsOptions::default() }, "")
    }

    /// So many servers, with more of their configuration and options of the nodes.
    pub(crate) fn new(version: Version, count: usize, options: NatsOptions, extra: &str) -> Nats {
        let directory = tempfile::Builder::new().prefix("ringmain-nats-").tempdir().unwrap();
        let server = |n: usize| Server {
            directory: directory.path().join(format!("n{n}")),
            port: 0,
            process: None,
            is_paused: false,
        };
        let servers: Vec<Server> = (0..count).map(server).collect();
        let names = (0..count).map(|n| (format!("n{n}"), 4222)).collect();
        let mut nats = Nats {
            name: directory.path().file_name().unwrap().to_string_lossy().into_owned(),
            routes: process::free_ports(count),
            ports: Arc::new(Mutex::new(vec![0; count])),
            options: NatsOptions { servers: names, ..options },
            extra: extra.to_owned(),
            directory,
            version,
            servers,
        };
        nats.start_all();
        nats
    }

    /// Starts those that do not run.
    fn start_all(&mut self) {
        for attempt in 1..=ATTEMPTS_MAX {
            let dead = |server: &Server| server.process.is_none();
            let dead: Vec<usize> = (0..self.servers.len()).filter(|n| dead(&self.servers[*n])).collect();
            dead.iter().for_each(|n| self.start(*n));
            let failed: Vec<usize> = dead.into_iter().filter(|n| !self.is_started(*n)).collect();
            if failed.is_empty() {
                return;
            }
            let log = self.servers[failed[0]].log();
            assert!(attempt < ATTEMPTS_MAX, "NATS does not start:\n{}", process::tail(&log));
            for n in failed {
                self.servers[n].process = None;
                // The others learn it when it joins them.
                self.routes[n] = process::free_ports(1)[0];
            }
        }
    }

    fn start(&mut self, n: usize) {
        let routes: Vec<_> =
            self.routes.iter().map(|port| format!("\"nats-route://127.0.0.1:{port}\"")).collect();
        let cluster = match self.servers.len() {
            1 => String::new(),
            _ => format!(
                "cluster {{ name: \"{}\", listen: \"127.0.0.1:{}\", routes: [ {} ] }}\n",
                self.name,
                self.routes[n],
                routes.join(", ")
            ),
        };
        let server = &mut self.servers[n];
        server.port = process::free_ports(1)[0];
        self.ports.lock().unwrap()[n] = server.port;
        std::fs::create_dir_all(&server.directory).unwrap();
        let configuration = format!(
            "server_name: {}-{n}\nlisten: \"127.0.0.1:{}\"\n\
             jetstream {{ store_dir: \"{}\", max_mem: 64M, max_file: 1G }}\n{cluster}{}\n",
            self.name,
            server.port,
            server.data().display(),
            self.extra,
        );
        let path = server.directory.join("conf");
        std::fs::write(&path, configuration).unwrap();
        let arguments = ["-c".to_owned(), path.display().to_string()];
        let started = process::start(&self.version.program(), &arguments, &server.directory, &server.log());
        server.process = Some(started);
    }

    /// Waits until a server listens; `false` if it ended instead.
    fn is_started(&mut self, n: usize) -> bool {
        let server = &mut self.servers[n];
        let ends = Instant::now() + START_MAX;
        loop {
            let said = said_first(server.port);
            if said.contains(&format!("\"server_name\":\"{}-{n}\"", self.name)) {
                return true;
            }
            if server.process.as_ref().is_none_or(|process| has_ended(process.pid())) {
                return false;
            }
            // Another listens there.
            if said.starts_with("INFO") {
                return false;
            }
            assert!(Instant::now() < ends, "NATS did not start:\n{}", process::tail(&server.log()));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The same servers for nodes that want this history.
    pub(crate) fn wanting(mut self, history_size_max: u32) -> Nats {
        self.options.history_size_max = history_size_max;
        self
    }

    /// SIGKILL to one server.
    pub(crate) fn kill_one(&mut self, n: usize) {
        if let Some(mut process) = self.servers[n].process.take() {
            process.kill();
        }
        self.servers[n].is_paused = false;
    }

    /// SIGSTOP to one server.
    pub(crate) fn pause_one(&mut self, n: usize) {
        let server = &mut self.servers[n];
        if let Some(process) = server.process.as_ref().filter(|_| !server.is_paused) {
            process.signal("STOP");
            server.is_paused = true;
        }
    }

    fn resume(&mut self) {
        for server in &mut self.servers {
            if let Some(process) = server.process.as_ref().filter(|_| server.is_paused) {
                process.signal("CONT");
                server.is_paused = false;
            }
        }
    }

    fn each(&mut self, act: impl Fn(&mut Nats, usize)) {
        (0..self.servers.len()).for_each(|n| act(self, n));
    }

    fn snapshot(&self, n: usize) -> PathBuf {
        self.directory.path().join(format!("snapshot-{n}"))
    }

    /// The server that leads the nodes' first stream, once there is one.
    pub(crate) fn leader(&self) -> usize {
        let ports = self.ports.lock().unwrap().clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let led_by = async || {
            let client = async_nats::connect(format!("127.0.0.1:{}", ports[0])).await.ok()?;
            let subject = format!("$JS.API.STREAM.INFO.{}_0", self.options.prefix);
            let answer = client.request(subject, "".into()).await.ok()?;
            let info: serde_json::Value = serde_json::from_slice(&answer.payload).ok()?;
            info["cluster"]["leader"].as_str()?.rsplit('-').next()?.parse::<usize>().ok()
        };
        let ends = Instant::now() + START_MAX;
        loop {
            if let Some(leader) = runtime.block_on(led_by()) {
                return leader;
            }
            assert!(Instant::now() < ends, "the stream has no leader");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// How a node uses them.
    pub(crate) fn options(&self, proxies: &Arc<Proxies>) -> NatsOptions {
        let (ports, proxies) = (self.ports.clone(), proxies.clone());
        let map = move |host: &str, _: u16| {
            let n: usize = host[1..].parse().unwrap();
            let port = ports.lock().unwrap()[n];
            proxies.through("127.0.0.1", port)
        };
        NatsOptions { addresses: Some(Arc::new(map)), ..self.options.clone() }
    }
}

/// The first line that a server says to whoever connects; empty if there is none.
fn said_first(port: u16) -> String {
    let mut line = String::new();
    if let Ok(stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        let _ = BufReader::new(stream).read_line(&mut line);
    }
    line
}

/// Whether a child of ours has ended: it is a zombie until it is waited for.
fn has_ended(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with('Z') || rest.is_empty())
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    let status = std::process::Command::new("cp").arg("-r").args([from, to]).status().unwrap();
    assert!(status.success(), "cannot copy {}", from.display());
}

impl Drop for Nats {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for server in &self.servers {
                eprintln!("{}:\n{}", server.log().display(), process::tail(&server.log()));
            }
        }
    }
}

impl Broker for Nats {
    fn backend(&self, _node: usize, proxies: &Arc<Proxies>) -> Start {
        let options = self.options(proxies);
        Box::new(|ends| Box::pin(nats::run(options, ends)))
    }

    fn kill(&mut self) {
        self.each(Nats::kill_one);
    }

    fn pause(&mut self) {
        self.each(Nats::pause_one);
    }

    fn restore(&mut self) {
        self.resume();
        self.start_all();
    }

    fn wipe(&mut self) {
        self.kill();
        for server in &self.servers {
            let _ = std::fs::remove_dir_all(server.data());
        }
        self.restore();
    }

    /// What is stored from now on is gone at [`Broker::fail_over`]: as when power fails behind servers that do not
    /// sync.
    fn stop_replication(&mut self) {
        self.pause();
        (0..self.servers.len()).for_each(|n| copy(&self.servers[n].data(), &self.snapshot(n)));
        self.resume();
    }

    fn fail_over(&mut self) {
        self.kill();
        (0..self.servers.len()).for_each(|n| copy(&self.snapshot(n), &self.servers[n].data()));
        self.restore();
    }
}
