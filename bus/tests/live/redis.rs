//! Real Redis servers for tests: one with a replica, a cluster of six, a Sentinel trio.
#![allow(dead_code, reason = "each program of tests uses its part of it")]
use std::collections::HashMap;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use redis::{Cmd, Connection, Value};
use ringmain_bus::ChannelOptions;
use ringmain_bus::redis::{Deployment, RedisOptions};

use crate::live::process::{Process, program, start};
use crate::live::proxy::Proxies;
use crate::live::{Broker, Start};

/// How long servers may take to agree on a busy machine.
const AGREE_MAX: Duration = Duration::from_secs(60);

/// One server or Sentinel.
pub(crate) struct Server {
    pub(crate) port: u16,
    process: Process,
    directory: PathBuf,
    program: PathBuf,
    arguments: Vec<String>,
    paused: bool,
}

/// Which server's program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Redis,
    Valkey,
}

impl Kind {
    fn program(self) -> PathBuf {
        match self {
            Kind::Redis => program("redis-server", "redis"),
            Kind::Valkey => program("valkey-server", "valkey"),
        }
    }
}

/// Ports that nobody listens on, and that nobody gets for a connection going out: a server that is killed and started
/// again has to find its port free.
pub(crate) fn ports(count: usize) -> Vec<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let outgoing = range.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(32_768u32);
    const FIRST: u32 = 10_240;
    // Where all ports are for connections going out, any will do that is free now.
    let room = if outgoing > FIRST + 4_096 { outgoing - FIRST } else { 20_000 };
    let mut found = Vec::new();
    while found.len() < count {
        let number = std::process::id().wrapping_mul(613).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + number % room).unwrap();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            found.push(port);
        }
    }
    found
}

/// A server's own, empty. What earlier runs left is removed once.
fn directory(port: u16) -> PathBuf {
    static SWEPT: std::sync::Once = std::sync::Once::new();
    let all = Path::new(env!("CARGO_TARGET_TMPDIR"));
    SWEPT.call_once(|| {
        for entry in std::fs::read_dir(all).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix("redis-")?.split('-').next());
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
    });
    let directory = all.join(format!("redis-{}-{port}", std::process::id()));
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

impl Server {
    /// A server whose configuration is `lines` beside what all have.
    pub(crate) fn start(kind: Kind, port: u16, lines: &[String]) -> Server {
        Server::start_in(kind, directory(port), port, lines, false)
    }

    /// One that does not answer everybody: ready when it listens.
    pub(crate) fn start_unready(port: u16, lines: &[String]) -> Server {
        Server::launch(Kind::Redis, directory(port), port, lines, false)
    }

    fn start_in(kind: Kind, directory: PathBuf, port: u16, lines: &[String], sentinel: bool) -> Server {
        let server = Server::launch(kind, directory, port, lines, sentinel);
        server.await_ready();
        server
    }

    fn launch(kind: Kind, directory: PathBuf, port: u16, lines: &[String], sentinel: bool) -> Server {
        let mut config = format!("bind 127.0.0.1\nport {port}\ndir {}\n", directory.display());
        if !sentinel {
            config.push_str(
                "save \"\"\nrepl-diskless-sync-delay 0\nrepl-timeout 5\nhz 100\nrepl-backlog-size 8mb\n",
            );
        }
        lines.iter().for_each(|line| config.extend([line.as_str(), "\n"]));
        let file = directory.join("redis.conf");
        std::fs::write(&file, config).unwrap();
        let mut arguments = vec![file.display().to_string()];
        arguments.extend(sentinel.then(|| "--sentinel".to_owned()));
        let program = kind.program();
        let log = directory.join("log");
        let mut process = start(&program, &arguments, &directory, &log);
        process.await_port(port, &log);
        Server { port, process, directory, program, arguments, paused: false }
    }

    /// Waits until it answers: this process and no other at its port.
    fn await_ready(&self) {
        let pid = format!("process_id:{}\r", self.process.pid());
        let has_loaded = || matches!(self.try_ask(&redis::cmd("PING")), Some(Value::SimpleString(_)));
        settle("server that answers", || self.text("INFO server").contains(&pid) && has_loaded());
    }

    fn connect(&self) -> redis::RedisResult<Connection> {
        let client = redis::Client::open(format!("redis://127.0.0.1:{}", self.port))?;
        let connection = client.get_connection_with_timeout(Duration::from_secs(5))?;
        connection.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(connection)
    }

    /// Asks, if it answers.
    pub(crate) fn try_ask(&self, command: &Cmd) -> Option<Value> {
        command.query(&mut self.connect().ok()?).ok()
    }

    /// Asks.
    pub(crate) fn ask(&self, command: &str) -> Value {
        let mut words = command.split(' ');
        let mut command_of = redis::cmd(words.next().unwrap());
        words.for_each(|word| {
            command_of.arg(word);
        });
        let mut connection = self.connect().unwrap();
        command_of.query(&mut connection).unwrap_or_else(|error| panic!("{command}: {error}"))
    }

    /// A text answer; empty if there is none.
    pub(crate) fn text(&self, command: &str) -> String {
        match command
            .split_once(' ')
            .map(|(name, rest)| self.try_ask(redis::cmd(name).arg(rest.split(' ').collect::<Vec<_>>())))
        {
            Some(Some(Value::BulkString(bytes))) => String::from_utf8(bytes).unwrap(),
            Some(Some(Value::SimpleString(text) | Value::VerbatimString { text, .. })) => text,
            _ => String::new(),
        }
    }

    pub(crate) fn is_master(&self) -> bool {
        self.text("INFO replication").contains("role:master")
    }

    fn is_synced(&self) -> bool {
        self.text("INFO replication").contains("master_link_status:up")
    }

    /// Whether this master has its replica, which counts in a WAIT from its first sign of life on. A master that was
    /// started again takes another replication id when its first replica comes: until then its life is not settled.
    fn is_followed(&self) -> bool {
        self.text("INFO replication").contains("state=online")
    }

    /// How far its stream of replication goes, or it has followed another's.
    fn replicated(&self) -> u64 {
        let info = self.text("INFO replication");
        let offset = info.lines().find_map(|line| line.strip_prefix("master_repl_offset:"));
        offset.and_then(|offset| offset.trim().parse().ok()).unwrap_or(0)
    }

    /// Waits until a replica has what this master has now.
    fn await_replica(&self, replica: &Server) {
        let wanted = self.replicated();
        settle("replica that has everything", || replica.replicated() >= wanted);
    }

    pub(crate) fn kill(&mut self) {
        self.paused = false;
        self.process.kill();
    }

    pub(crate) fn pause(&mut self) {
        self.paused = true;
        self.process.signal("STOP");
    }

    pub(crate) fn resume(&mut self) {
        self.paused = false;
        self.process.signal("CONT");
    }

    /// After a kill; its data and configuration are where they were.
    pub(crate) fn restart(&mut self) {
        let log = self.directory.join("log");
        self.process = start(&self.program, &self.arguments, &self.directory, &log);
        self.process.await_port(self.port, &log);
        self.await_ready();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// `cert.pem` and `key.pem` for 127.0.0.1, signed by itself.
pub(crate) fn make_certificate(directory: &Path) {
    let arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1 \
                     -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE \
                     -keyout key.pem -out cert.pem";
    let made = Command::new("openssl").args(arguments.split_whitespace()).current_dir(directory).output();
    let made = made.expect("no openssl here: apt-get install openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// Waits until something holds.
pub(crate) fn settle(what: &str, mut holds: impl FnMut() -> bool) {
    let ends = Instant::now() + AGREE_MAX;
    while !holds() {
        assert!(Instant::now() < ends, "no {what} in {AGREE_MAX:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What changes a test's options.
pub(crate) type Adapt = fn(&mut RedisOptions);

fn backend(
    mut options: RedisOptions,
    proxies: &Arc<Proxies>,
    dialed: impl Fn(&str, u16) -> (String, u16) + Send + Sync + 'static,
) -> Start {
    let proxies = proxies.clone();
    options.addresses = Some(Arc::new(move |host, port| {
        let (host, port) = dialed(host, port);
        proxies.through(&host, port)
    }));
    Box::new(move |ends| {
        Box::pin(async move { ringmain_bus::redis::run(options, ends).await.expect("no files are needed") })
    })
}

fn local(port: u16) -> (String, u16) {
    ("127.0.0.1".to_owned(), port)
}

/// One server for a whole test program.
pub(crate) struct Shared {
    options: RedisOptions,
}

impl Shared {
    pub(crate) fn new(options: RedisOptions) -> Shared {
        Shared { options }
    }
}

impl Broker for Shared {
    fn backend(&self, _: usize, proxies: &Arc<Proxies>) -> Start {
        backend(self.options.clone(), proxies, |host, port| (host.to_owned(), port))
    }
}

/// The ways of all nodes to their servers.
#[derive(Default)]
struct Ways(Mutex<Vec<Arc<Proxies>>>);

impl Ways {
    fn add(&self, proxies: &Arc<Proxies>) {
        self.0.lock().unwrap().push(proxies.clone());
    }

    /// Nothing passes until they are opened.
    fn close(&self) {
        self.0.lock().unwrap().iter().for_each(|proxies| proxies.isolate());
    }

    fn open(&self) {
        self.0.lock().unwrap().iter().for_each(|proxies| proxies.rejoin());
    }
}

/// A master and its replica behind one address, as a service of an orchestrator gives it: `redis://` with a replica
/// that takes over by hand.
pub(crate) struct Pair {
    servers: [Server; 2],
    ways: Ways,
    /// Which of them the address leads to, by node.
    master: Arc<Mutex<HashMap<usize, u16>>>,
    master_index: usize,
    adapt: Adapt,
}

impl Pair {
    pub(crate) fn start(kind: Kind, adapt: Adapt) -> Pair {
        let lines = ["appendonly yes".to_owned(), "appendfsync no".to_owned()];
        let ports = ports(2);
        let servers = [Server::start(kind, ports[0], &lines), Server::start(kind, ports[1], &lines)];
        servers[1].ask(&format!("REPLICAOF 127.0.0.1 {}", ports[0]));
        let pair = Pair { servers, ways: Ways::default(), master: Arc::default(), master_index: 0, adapt };
        pair.await_whole();
        pair
    }

    fn await_whole(&self) {
        let (master, replica) = (&self.servers[self.master_index], &self.servers[1 - self.master_index]);
        settle("replica in step", || replica.is_synced() && master.is_followed());
    }

    pub(crate) fn master(&mut self) -> &mut Server {
        &mut self.servers[self.master_index]
    }

    pub(crate) fn replica(&mut self) -> &mut Server {
        &mut self.servers[1 - self.master_index]
    }

    /// The replica is master and the address leads to it; the old master is as it was.
    pub(crate) fn promote(&mut self) {
        let nodes: Vec<usize> = self.master.lock().unwrap().keys().copied().collect();
        self.promote_for(&nodes);
    }

    /// The same, but only these nodes find it at the address.
    pub(crate) fn promote_for(&mut self, nodes: &[usize]) {
        self.replica().ask("REPLICAOF NO ONE");
        self.master_index = 1 - self.master_index;
        let port = self.master().port;
        nodes.iter().for_each(|node| {
            self.master.lock().unwrap().insert(*node, port);
        });
    }

    /// Who was master before [`Pair::promote_for`].
    pub(crate) fn old_master(&mut self) -> &mut Server {
        self.replica()
    }

    /// The old master follows the new one, and the address leads all nodes there.
    pub(crate) fn follow(&mut self) {
        let port = self.master().port;
        self.replica().ask(&format!("REPLICAOF 127.0.0.1 {port}"));
        self.master.lock().unwrap().values_mut().for_each(|leads_to| *leads_to = port);
        let follower = self.replica();
        settle("follower in step", || follower.is_synced());
    }
}

impl Broker for Pair {
    fn backend(&self, node: usize, proxies: &Arc<Proxies>) -> Start {
        self.ways.add(proxies);
        let mut options = RedisOptions::new(Deployment::Single, vec![local(1)]);
        options.replicas = Some(1);
        (self.adapt)(&mut options);
        let master = self.master.clone();
        master.lock().unwrap().insert(node, self.servers[self.master_index].port);
        backend(options, proxies, move |_, _| local(master.lock().unwrap()[&node]))
    }

    fn restart_is_a_new_life(&self) -> bool {
        true
    }

    fn kill(&mut self) {
        self.master().kill();
    }

    fn pause(&mut self) {
        self.master().pause();
    }

    fn restore(&mut self) {
        if self.master().paused {
            return self.master().resume();
        }
        // Nodes find it whole: see [`Server::is_followed`].
        self.ways.close();
        self.servers[self.master_index].restart();
        self.await_whole();
        self.ways.open();
    }

    fn wipe(&mut self) {
        self.master().ask("FLUSHALL");
    }

    fn stop_replication(&mut self) {
        self.servers[self.master_index].await_replica(&self.servers[1 - self.master_index]);
        // A port where nothing listens: it keeps what it has, and asks in vain.
        self.replica().ask("REPLICAOF 127.0.0.1 1");
    }

    fn fail_over(&mut self) {
        self.master().kill();
        self.promote();
        let port = self.master().port;
        self.replica().restart();
        self.replica().ask(&format!("REPLICAOF 127.0.0.1 {port}"));
    }
}

/// Three masters and their replicas.
pub(crate) struct Redises {
    pub(crate) servers: Vec<Server>,
    ways: Ways,
    adapt: Adapt,
    /// Whose replication was stopped.
    stopped: bool,
}

const MASTERS: usize = 3;

fn cluster_id(index: usize) -> String {
    format!("{index:040x}")
}

/// What all nodes know of each other from the start, as node `me` has it.
fn nodes_conf(me: usize, ports: &[u16], bus_ports: &[u16]) -> String {
    let line = |index: usize| {
        let myself = if index == me { "myself," } else { "" };
        let (port, bus_port) = (ports[index], bus_ports[index]);
        let head = format!("{} 127.0.0.1:{port}@{bus_port}", cluster_id(index + 1));
        let (first, epoch) = (index % MASTERS, index % MASTERS + 1);
        match index < MASTERS {
            true => {
                let slots = 16384 * first / MASTERS..16384 * (first + 1) / MASTERS;
                format!("{head} {myself}master - 0 0 {epoch} connected {}-{}\n", slots.start, slots.end - 1)
            }
            false => format!("{head} {myself}slave {} 0 0 {epoch} connected\n", cluster_id(first + 1)),
        }
    };
    let lines: String = (0..ports.len()).map(line).collect();
    format!("{lines}vars currentEpoch {MASTERS} lastVoteEpoch 0\n")
}

impl Redises {
    pub(crate) fn start(kind: Kind, adapt: Adapt) -> Redises {
        let all = ports(4 * MASTERS);
        let (ports, bus_ports) = all.split_at(2 * MASTERS);
        let server = |index: usize| {
            let directory = directory(ports[index]);
            std::fs::write(directory.join("nodes.conf"), nodes_conf(index, ports, bus_ports)).unwrap();
            let lines = [
                "appendonly yes".to_owned(),
                "appendfsync no".to_owned(),
                "cluster-enabled yes".to_owned(),
                "cluster-config-file nodes.conf".to_owned(),
                "cluster-node-timeout 1500".to_owned(),
                "cluster-require-full-coverage no".to_owned(),
                "cluster-allow-pubsubshard-when-down yes".to_owned(),
                "cluster-replica-validity-factor 0".to_owned(),
                format!("cluster-port {}", bus_ports[index]),
            ];
            Server::start_in(kind, directory, ports[index], &lines, false)
        };
        let servers: Vec<Server> = (0..2 * MASTERS).map(server).collect();
        let cluster = Redises { servers, ways: Ways::default(), adapt, stopped: false };
        cluster.await_whole();
        cluster
    }

    /// Waits until all nodes agree and replicas are in step.
    pub(crate) fn await_whole(&self) {
        for server in &self.servers {
            settle("cluster that agrees", || {
                let info = server.text("CLUSTER INFO");
                let whole = info.contains("cluster_state:ok") && info.contains("cluster_slots_ok:16384");
                whole && if server.is_master() { server.is_followed() } else { server.is_synced() }
            });
        }
    }

    pub(crate) fn options(&self) -> RedisOptions {
        let servers = self.servers.iter().map(|server| local(server.port)).collect();
        let mut options = RedisOptions::new(Deployment::Cluster, servers);
        (self.adapt)(&mut options);
        options
    }

    /// Indices of master and replica of each shard, as they are now.
    pub(crate) fn shards(&self) -> Vec<(usize, usize)> {
        let (one, other) = (0..MASTERS, MASTERS..2 * MASTERS);
        one.zip(other).map(|(a, b)| if self.servers[a].is_master() { (a, b) } else { (b, a) }).collect()
    }

    /// Moves the slot of a key from its master to another, the keys first.
    pub(crate) fn move_slot_of(&self, key: &str) {
        let Value::Int(slot) = self.servers[0].ask(&format!("CLUSTER KEYSLOT {key}")) else {
            panic!("a slot")
        };
        let shards = self.shards();
        let index = (0..MASTERS as i64).find(|index| slot < 16384 * (index + 1) / MASTERS as i64).unwrap();
        let from = &self.servers[shards[index as usize].0];
        let to = &self.servers[shards[(index as usize + 1) % MASTERS].0];
        let id = |server: &Server| server.text("CLUSTER MYID");
        let (from_id, to_id) = (id(from), id(to));
        to.ask(&format!("CLUSTER SETSLOT {slot} IMPORTING {from_id}"));
        from.ask(&format!("CLUSTER SETSLOT {slot} MIGRATING {to_id}"));
        from.ask(&format!("MIGRATE 127.0.0.1 {} {key} 0 5000", to.port));
        for (master, _) in shards {
            self.servers[master].ask(&format!("CLUSTER SETSLOT {slot} NODE {to_id}"));
        }
    }

    fn masters(&self) -> Vec<usize> {
        self.shards().into_iter().map(|(master, _)| master).collect()
    }
}

impl Broker for Redises {
    fn backend(&self, _: usize, proxies: &Arc<Proxies>) -> Start {
        self.ways.add(proxies);
        backend(self.options(), proxies, |host, port| (host.to_owned(), port))
    }

    fn restart_is_a_new_life(&self) -> bool {
        true
    }

    fn kill(&mut self) {
        self.servers.iter_mut().for_each(Server::kill);
    }

    fn pause(&mut self) {
        self.servers.iter_mut().for_each(Server::pause);
    }

    fn restore(&mut self) {
        if self.servers.iter().all(|server| server.paused) {
            return self.servers.iter_mut().for_each(Server::resume);
        }
        // Nodes find it whole: see [`Server::is_followed`].
        self.ways.close();
        self.servers.iter_mut().for_each(Server::restart);
        self.await_whole();
        self.ways.open();
    }

    fn wipe(&mut self) {
        for master in self.masters() {
            self.servers[master].ask("FLUSHALL");
        }
    }

    fn stop_replication(&mut self) {
        self.stopped = true;
        for (master, replica) in self.shards() {
            self.servers[master].await_replica(&self.servers[replica]);
            self.servers[replica].pause();
            // What the replica finds in its socket when it goes on is the end of the connection.
            self.servers[master].ask("CLIENT KILL TYPE replica");
        }
    }

    fn fail_over(&mut self) {
        for (master, replica) in if self.stopped { vec![(0, 3), (1, 4), (2, 5)] } else { self.shards() } {
            self.servers[master].kill();
            if self.servers[replica].paused {
                self.servers[replica].resume();
            }
            // As an operator does it who finds the majority of masters dead.
            let takeover = "CLUSTER FAILOVER TAKEOVER";
            self.servers[replica].ask(takeover);
            let server = &self.servers[replica];
            settle("promoted replica", || server.is_master());
        }
        self.stopped = false;
    }
}

/// A master, a replica and three Sentinels.
pub(crate) struct Trio {
    pub(crate) servers: [Server; 2],
    pub(crate) sentinels: Vec<Server>,
    adapt: Adapt,
}

/// The master's name.
const NAME: &str = "mymaster";

impl Trio {
    pub(crate) fn start(lines: &[&str], adapt: Adapt) -> Trio {
        let kind = Kind::Redis;
        let ports = ports(5);
        let lines: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        let servers = [Server::start(kind, ports[0], &lines), Server::start(kind, ports[1], &lines)];
        servers[1].ask(&format!("REPLICAOF 127.0.0.1 {}", ports[0]));
        settle("replica in step", || servers[1].is_synced());
        let lines = [
            format!("sentinel monitor {NAME} 127.0.0.1 {} 2", ports[0]),
            format!("sentinel down-after-milliseconds {NAME} 1000"),
            format!("sentinel failover-timeout {NAME} 2000"),
        ];
        let sentinels: Vec<Server> = ports[2..]
            .iter()
            .map(|port| Server::start_in(kind, directory(*port), *port, &lines, true))
            .collect();
        for sentinel in &sentinels {
            // One has to know the others and the replica before it can do its work.
            settle("Sentinels that know each other", || {
                let named = sentinel.text("INFO sentinel");
                named.contains("slaves=1,sentinels=3") && named.contains("status=ok")
            });
        }
        Trio { servers, sentinels, adapt }
    }

    pub(crate) fn master(&self) -> usize {
        usize::from(!self.servers[0].is_master())
    }

    pub(crate) fn options(&self) -> RedisOptions {
        let servers = self.sentinels.iter().map(|server| local(server.port)).collect();
        let mut options = RedisOptions::new(Deployment::Sentinel { master: NAME.to_owned() }, servers);
        (self.adapt)(&mut options);
        options
    }
}

impl Broker for Trio {
    fn backend(&self, _: usize, proxies: &Arc<Proxies>) -> Start {
        backend(self.options(), proxies, |host, port| (host.to_owned(), port))
    }
}

/// A single server without replicas, shared by a test program: its options.
pub(crate) fn shared_single() -> RedisOptions {
    static SERVER: std::sync::OnceLock<Server> = std::sync::OnceLock::new();
    let server = SERVER.get_or_init(|| Server::start(Kind::Redis, ports(1)[0], &[]));
    RedisOptions::new(Deployment::Single, vec![local(server.port)])
}

/// A cluster, shared by a test program, which is of one kind.
pub(crate) fn shared_cluster(kind: Kind) -> RedisOptions {
    static CLUSTER: std::sync::OnceLock<Redises> = std::sync::OnceLock::new();
    CLUSTER.get_or_init(|| Redises::start(kind, |_| ())).options()
}

/// A Sentinel trio, shared by a test program.
pub(crate) fn shared_trio() -> RedisOptions {
    static TRIO: std::sync::OnceLock<Trio> = std::sync::OnceLock::new();
    TRIO.get_or_init(|| Trio::start(&[], |_| ())).options()
}

/// History for all that these tests publish.
pub(crate) const ROOM: ChannelOptions =
    ChannelOptions { history_size: 50, history_ttl_ms: 60_000, meta_ttl_ms: 120_000 };
