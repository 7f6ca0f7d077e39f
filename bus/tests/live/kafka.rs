//! A real Apache Kafka in KRaft mode: one broker or three, and what can be done to them.
//!
//! Every broker has a listener that is advertised as it is, and one for each node of a cluster under test, which is
//! advertised at a relay of this process: so a node's connections go through that node's proxies, whichever broker
//! they are for, and can be cut.
#![allow(dead_code, reason = "each test uses its part of it")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use ringmain_bus::kafka::{self, KafkaOptions};

use crate::live::process::{self, Process};
use crate::live::proxy::Proxies;
use crate::live::{Broker, Start};

/// Nodes of a cluster under test, at most.
pub(crate) const NODES: usize = 3;

/// How long a broker may take to start on a busy machine, all attempts together, and how long one attempt.
const START_MAX: Duration = Duration::from_secs(180);
const ATTEMPT_MAX: Duration = Duration::from_secs(60);

/// Listeners of a broker that are not some node's.
const FIXED: usize = 4;

/// Who may use the listener with a login.
pub(crate) const USER: &str = "ringmain";
pub(crate) const PASSWORD: &str = "tell:nobody@all";

const VERSION: &str = "4.3.1";
const CLUSTER_ID: &str = "cmluZ21haW4tdGVzdHMtMQ";

/// A port of this process that passes everything on to a port that may change.
struct Relay {
    port: u16,
    to: Arc<AtomicU16>,
}

impl Relay {
    fn new() -> Relay {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let to = Arc::new(AtomicU16::new(0));
        let target = to.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let target = target.load(Ordering::Acquire);
                std::thread::spawn(move || {
                    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else { return };
                    let _ = (client.set_nodelay(true), server.set_nodelay(true));
                    std::thread::scope(|scope| {
                        scope.spawn(|| pass(&client, &server));
                        pass(&server, &client);
                    });
                });
            }
        });
        Relay { port, to }
    }
}

/// Until one side ends.
fn pass(mut from: &TcpStream, mut to: &TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// One broker.
struct Server {
    directory: PathBuf,
    /// Advertised as it is; for the controllers; with a login; encrypted; for each node.
    ports: Vec<u16>,
    relays: Vec<Relay>,
    process: Option<Process>,
    starts: u32,
    is_paused: bool,
}

/// A running cluster of one or three brokers.
pub(crate) struct Servers {
    directory: tempfile::TempDir,
    servers: Vec<Server>,
}

impl Servers {
    /// Formats and starts so many brokers.
    pub(crate) fn new(count: usize) -> Servers {
        let directory = tempfile::Builder::new().prefix("ringmain-kafka-").tempdir().unwrap();
        let ports = free_ports(count * (FIXED + NODES));
        let servers: Vec<Server> = ports
            .chunks(FIXED + NODES)
            .enumerate()
            .map(|(index, ports)| Server {
                directory: directory.path().join(format!("n{}", index + 1)),
                ports: ports.to_vec(),
                relays: (0..NODES).map(|_| Relay::new()).collect(),
                process: None,
                starts: 0,
                is_paused: false,
            })
            .collect();
        certify(directory.path());
        let voters: Vec<String> = servers
            .iter()
            .zip(1..)
            .map(|(server, id)| format!("{id}@127.0.0.1:{}", server.ports[1]))
            .collect();
        let voters = voters.join(",");
        for (server, id) in servers.iter().zip(1..) {
            std::fs::create_dir_all(&server.directory).unwrap();
            let properties = server.properties(id, count, &voters);
            std::fs::write(server.directory.join("server.properties"), properties).unwrap();
        }
        let mut servers = Servers { directory, servers };
        servers.start_all();
        if !archive().exists() {
            servers.servers[0].leave_classes();
            servers.start_all();
        }
        servers
    }

    /// Starts those that do not run, at the same time.
    fn start_all(&mut self) {
        let dead = || self.servers.iter().enumerate().filter(|(_, server)| server.process.is_none());
        let dead: Vec<usize> = dead().map(|(index, _)| index).collect();
        dead.iter().for_each(|index| self.servers[*index].start());
        dead.iter().for_each(|index| self.servers[*index].await_started());
    }

    /// Addresses at which everything is advertised as it is.
    pub(crate) fn brokers(&self) -> Vec<String> {
        self.servers.iter().map(|server| format!("127.0.0.1:{}", server.ports[0])).collect()
    }

    /// Addresses at which user and password are asked for.
    pub(crate) fn brokers_with_login(&self) -> Vec<String> {
        self.servers.iter().map(|server| format!("127.0.0.1:{}", server.ports[2])).collect()
    }

    /// Addresses of encrypted connections, and the file of the authority that vouches for them.
    pub(crate) fn brokers_with_tls(&self) -> (Vec<String>, PathBuf) {
        let brokers = self.servers.iter().map(|server| format!("127.0.0.1:{}", server.ports[3])).collect();
        (brokers, self.directory.path().join("certificate.pem"))
    }

    /// SIGKILL to one broker.
    pub(crate) fn kill(&mut self, server: usize) {
        self.servers[server].kill();
    }

    /// SIGSTOP to one broker.
    pub(crate) fn pause(&mut self, server: usize) {
        self.servers[server].pause();
    }

    /// All run again.
    pub(crate) fn restore(&mut self) {
        self.servers.iter_mut().for_each(Server::resume);
        self.start_all();
    }
}

/// A key and a certificate of its own for 127.0.0.1, where this build's client can encrypt.
fn certify(directory: &Path) {
    if !cfg!(feature = "kafka-tls") {
        return;
    }
    let openssl = process::program("openssl", "kafka");
    let request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"];
    let files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "certificate.pem"];
    let done = std::process::Command::new(openssl).args(request).args(files).current_dir(directory).output();
    let done = done.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let part = |name: &str| std::fs::read_to_string(directory.join(name)).unwrap();
    std::fs::write(directory.join("store.pem"), part("key.pem") + &part("certificate.pem")).unwrap();
}

/// Ports of loopback that nobody has, and that the system gives to nobody who asks for any: a broker that is killed
/// finds them free when it is started again.
fn free_ports(count: usize) -> Vec<u16> {
    const FIRST: u32 = 10_000;
    const LAST: u32 = 32_000;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let begin = std::process::id().wrapping_mul(7_919).wrapping_add(clock.subsec_nanos());
    let mut ports = Vec::new();
    while ports.len() < count {
        let drawn = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = (FIRST + drawn % (LAST - FIRST)) as u16;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            ports.push(port);
        }
    }
    ports
}

impl Server {
    fn properties(&self, id: usize, count: usize, voters: &str) -> String {
        let listener = |name: &str, port: u16| format!("{name}://127.0.0.1:{port}");
        let [direct, controller, login, tls] = self.ports[..FIXED].try_into().unwrap();
        let mut advertised = vec![listener("DIRECT", direct), listener("LOGIN", login)];
        let mut listeners = [advertised.clone(), vec![listener("CONTROLLER", controller)]].concat();
        let mut protocols =
            ["DIRECT:PLAINTEXT", "CONTROLLER:PLAINTEXT", "LOGIN:SASL_PLAINTEXT"].map(str::to_owned).to_vec();
        for (node, relay) in self.relays.iter().enumerate() {
            listeners.push(listener(&format!("NODE{node}"), self.ports[FIXED + node]));
            advertised.push(listener(&format!("NODE{node}"), relay.port));
            protocols.push(format!("NODE{node}:PLAINTEXT"));
        }
        let mut encryption = String::new();
        if cfg!(feature = "kafka-tls") {
            listeners.push(listener("TLS", tls));
            advertised.push(listener("TLS", tls));
            protocols.push("TLS:SSL".to_owned());
            let store = self.directory.with_file_name("store.pem");
            encryption = format!(
                "listener.name.tls.ssl.keystore.type=PEM\nlistener.name.tls.ssl.keystore.location={}\n",
                store.display()
            );
        }
        let (copies, in_sync) = if count >= 3 { (3, 2) } else { (1, 1) };
        format!(
            "process.roles=broker,controller\nnode.id={id}\ncontroller.quorum.voters={voters}\n\
             listeners={}\nadvertised.listeners={}\nlistener.security.protocol.map={}\n\
             controller.listener.names=CONTROLLER\ninter.broker.listener.name=DIRECT\nlog.dirs={}\n\
             num.network.threads=2\nnum.io.threads=2\nbackground.threads=2\nnum.recovery.threads.per.data.dir=1\n\
             default.replication.factor={copies}\nmin.insync.replicas={in_sync}\n\
             offsets.topic.replication.factor={copies}\noffsets.topic.num.partitions=1\n\
             transaction.state.log.replication.factor={copies}\ntransaction.state.log.min.isr={in_sync}\n\
             transaction.state.log.num.partitions=1\nshare.coordinator.state.topic.replication.factor={copies}\n\
             share.coordinator.state.topic.min.isr={in_sync}\nshare.coordinator.state.topic.num.partitions=1\n\
             log.cleaner.dedupe.buffer.size=16777216\nlog.cleaner.threads=1\nlog.index.size.max.bytes=65536\n\
             auto.create.topics.enable=false\nauto.leader.rebalance.enable=false\n\
             broker.session.timeout.ms=2000\nbroker.heartbeat.interval.ms=300\n\
             controller.quorum.fetch.timeout.ms=1000\ncontroller.quorum.election.timeout.ms=500\n\
             controlled.shutdown.enable=false\nsasl.enabled.mechanisms=PLAIN\n\
             listener.name.login.plain.sasl.jaas.config=\
             org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}=\"{PASSWORD}\";\n{encryption}",
            listeners.join(","),
            advertised.join(","),
            protocols.join(","),
            self.data().display(),
        )
    }

    fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    fn log(&self) -> PathBuf {
        self.directory.join(format!("log-{}", self.starts))
    }

    fn start(&mut self) {
        let properties = self.directory.join("server.properties");
        let properties = properties.to_str().unwrap();
        if !self.data().join("meta.properties").exists() {
            self.format(properties);
        }
        self.starts += 1;
        let (java, archive) = (process::program("java", "kafka"), archive());
        let shared = match archive.exists() {
            true => format!("-XX:SharedArchiveFile={}", archive.display()),
            // It writes what it has loaded when it ends in peace.
            false => format!("-XX:ArchiveClassesAtExit={}", self.directory.join("classes.jsa").display()),
        };
        let arguments = arguments(&[&shared], "kafka.Kafka", &[properties]);
        self.process = Some(process::start(&java, &arguments, &self.directory, &self.log()));
    }

    /// An empty disk: made once, and copied when it is needed again.
    fn format(&self, properties: &str) {
        let formatted = self.directory.join("formatted");
        if formatted.exists() {
            return Self::copy(&formatted, &self.data());
        }
        let format = ["format", "-t", CLUSTER_ID, "-c", properties];
        let java = process::program("java", "kafka");
        let arguments = arguments(&[], "kafka.tools.StorageTool", &format);
        let done = std::process::Command::new(java).args(arguments).output().unwrap();
        assert!(done.status.success(), "cannot format:\n{}", String::from_utf8_lossy(&done.stderr));
        Self::copy(&self.data(), &formatted);
    }

    /// Ends a broker that has just started in peace, for the sake of the classes that it has loaded: those that are
    /// started afterwards take half the time.
    fn leave_classes(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        process.signal("TERM");
        let ends = Instant::now() + ATTEMPT_MAX;
        while is_running(&process) && Instant::now() < ends {
            std::thread::sleep(Duration::from_millis(50));
        }
        process.kill();
        // Without it brokers start all the same; another test program may have been faster.
        let (made, archive) = (self.directory.join("classes.jsa"), archive());
        let new = archive.with_extension(std::process::id().to_string());
        if std::fs::copy(made, &new).is_ok() {
            let _ = std::fs::rename(new, archive);
        }
    }

    /// A port that somebody has for a moment makes a broker end at once: then it is started again.
    fn await_started(&mut self) {
        let ends = Instant::now() + START_MAX;
        let mut attempt_ends = Instant::now() + ATTEMPT_MAX;
        loop {
            let log = self.log();
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if text.contains("Kafka Server started") {
                return;
            }
            assert!(Instant::now() < ends, "Kafka did not start:\n{}", process::tail(&log));
            if !self.process.as_ref().is_some_and(is_running) || Instant::now() >= attempt_ends {
                self.kill();
                self.start();
                attempt_ends = Instant::now() + ATTEMPT_MAX;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn kill(&mut self) {
        self.is_paused = false;
        if let Some(mut process) = self.process.take() {
            process.kill();
        }
    }

    fn pause(&mut self) {
        if let Some(process) = &self.process {
            process.signal("STOP");
            self.is_paused = true;
        }
    }

    fn resume(&mut self) {
        if let Some(process) = self.process.as_ref().filter(|_| self.is_paused) {
            process.signal("CONT");
            self.is_paused = false;
        }
    }

    fn copy(from: &Path, to: &Path) {
        let _ = std::fs::remove_dir_all(to);
        let status = std::process::Command::new("cp").arg("-r").args([from, to]).status().unwrap();
        assert!(status.success(), "cannot copy {}", from.display());
    }
}

/// Whether a process is there and has not ended.
fn is_running(process: &Process) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{}/stat", process.pid())).unwrap_or_default();
    // The state is the first field behind the name, which is in parentheses.
    status.rsplit_once(") ").is_some_and(|(_, fields)| !fields.starts_with(['Z', 'X']))
}

fn jars() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/brokers/kafka-{VERSION}"))
}

/// Loaded classes, in the virtual machine's own format. One that does not fit is not used by it.
fn archive() -> PathBuf {
    jars().join("classes.jsa")
}

/// What `java` is given to run one of Kafka's programs.
fn arguments(more: &[&str], main: &str, arguments: &[&str]) -> Vec<String> {
    let jars = jars();
    assert!(
        jars.join(format!("kafka_2.13-{VERSION}.jar")).exists(),
        "no Apache Kafka in {}: deploy/local/install kafka",
        jars.display()
    );
    let options = [
        "-Xms64m",
        "-Xmx256m",
        "-Xss512k",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-XX:MaxMetaspaceSize=128m",
        "-XX:-UsePerfData",
        "-Djava.awt.headless=true",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=info",
    ];
    let jars = format!("{}/*", jars.display());
    let all = options.into_iter().chain(more.iter().copied()).chain(["-cp", jars.as_str(), main]);
    all.chain(arguments.iter().copied()).map(str::to_owned).collect()
}

/// The one Kafka of a test program, as one test uses it.
pub(crate) struct Kafka {
    guard: Guard,
    topic: String,
}

/// Tests that only use the broker use it at the same time, those that break it alone.
enum Guard {
    Shared(RwLockReadGuard<'static, Servers>),
    Alone(RwLockWriteGuard<'static, Servers>),
}

static SERVERS: OnceLock<RwLock<Servers>> = OnceLock::new();
static TOPICS: AtomicU32 = AtomicU32::new(0);

fn servers() -> &'static RwLock<Servers> {
    SERVERS.get_or_init(|| RwLock::new(Servers::new(1)))
}

impl Kafka {
    /// One broker, used by others, too.
    pub(crate) fn shared() -> Kafka {
        let guard = servers().read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Kafka { guard: Guard::Shared(guard), topic: "shared".into() }
    }

    /// One broker for this test alone, with a topic of its own.
    pub(crate) fn alone() -> Kafka {
        let mut guard = servers().write().unwrap_or_else(std::sync::PoisonError::into_inner);
        // A test that failed may have left it broken.
        guard.restore();
        let topic = format!("alone-{}", TOPICS.fetch_add(1, Ordering::Relaxed));
        Kafka { guard: Guard::Alone(guard), topic }
    }

    /// The brokers themselves.
    pub(crate) fn servers(&self) -> &Servers {
        match &self.guard {
            Guard::Shared(servers) => servers,
            Guard::Alone(servers) => servers,
        }
    }

    fn server(&mut self) -> &mut Server {
        match &mut self.guard {
            Guard::Shared(_) => panic!("others use this broker"),
            Guard::Alone(servers) => &mut servers.servers[0],
        }
    }

    /// How a node uses it.
    pub(crate) fn options(&self, node: usize, proxies: &Arc<Proxies>) -> KafkaOptions {
        let servers = self.servers();
        let brokers = match &self.guard {
            Guard::Shared(_) => servers.brokers(),
            Guard::Alone(_) => servers.through(node, proxies),
        };
        KafkaOptions { topic: self.topic.clone(), ..options(brokers, servers.servers.len()) }
    }
}

impl Servers {
    /// Addresses that lead a node through its proxies.
    pub(crate) fn through(&self, node: usize, proxies: &Arc<Proxies>) -> Vec<String> {
        let through = |server: &Server| {
            let (_, port) = proxies.through("127.0.0.1", server.ports[FIXED + node]);
            server.relays[node].to.store(port, Ordering::Release);
            format!("127.0.0.1:{}", server.relays[node].port)
        };
        self.servers.iter().map(through).collect()
    }
}

/// What all tests have in common.
pub(crate) fn options(brokers: Vec<String>, count: usize) -> KafkaOptions {
    KafkaOptions { partitions: 4, small: count < 3, ..KafkaOptions::new(brokers) }
}

impl Broker for Kafka {
    fn backend(&self, node: usize, proxies: &Arc<Proxies>) -> Start {
        let options = self.options(node, proxies);
        Box::new(move |ends| Box::pin(kafka::run(options, ends)))
    }

    fn kill(&mut self) {
        self.server().kill();
    }

    fn pause(&mut self) {
        self.server().pause();
    }

    fn restore(&mut self) {
        match &mut self.guard {
            Guard::Shared(_) => panic!("others use this broker"),
            Guard::Alone(servers) => servers.restore(),
        }
    }

    fn wipe(&mut self) {
        let server = self.server();
        server.kill();
        std::fs::remove_dir_all(server.data()).unwrap();
        self.restore();
    }

    /// There is one copy of everything: what is on its disk now is what will be left.
    fn stop_replication(&mut self) {
        let server = self.server();
        server.pause();
        Server::copy(&server.data(), &server.directory.join("behind"));
        server.resume();
    }

    /// The disk is as it was, as if a replica that was behind had been elected.
    fn fail_over(&mut self) {
        let server = self.server();
        server.kill();
        Server::copy(&server.directory.join("behind"), &server.data());
        self.restore();
    }

    fn patience_ms(&self) -> u64 {
        120_000
    }
}

/// Makes a topic as an operator might, with so many copies of a partition, one of which confirms a publish.
pub(crate) fn make_topic(options: &KafkaOptions, topic: &str, partitions: i32, copies: i32) {
    use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
    let admin: AdminClient<_> =
        rdkafka::ClientConfig::new().set("bootstrap.servers", options.brokers.join(",")).create().unwrap();
    let wanted =
        NewTopic::new(topic, partitions, TopicReplication::Fixed(copies)).set("min.insync.replicas", "1");
    let asked = AdminOptions::new().operation_timeout(Some(Duration::from_secs(30)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let made = runtime.block_on(admin.create_topics([&wanted], &asked)).unwrap();
    assert!(made[0].is_ok(), "{made:?}");
}
