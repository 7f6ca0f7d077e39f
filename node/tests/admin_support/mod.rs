//! A real node as a child process, an HTTP client for its admin port and a WebSocket client.

#![allow(dead_code)] // each test program uses its own part

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tungstenite::protocol::frame::coding::CloseCode;
use tungstenite::{Message, WebSocket};

/// How long anything may take that a node does at once.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A running node; killed when dropped.
pub(crate) struct Node {
    child: Child,
    /// Where clients connect.
    pub(crate) clients: SocketAddr,
    /// The admin port.
    pub(crate) admin: SocketAddr,
    /// What it said at the start.
    pub(crate) banner: String,
}

impl Node {
    /// Starts a node on free ports and waits until it is ready.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::start_with(args, &[])
    }

    /// The same with variables.
    pub(crate) fn start_with(args: &[&str], variables: &[(&str, &str)]) -> Self {
        // Small tables: many nodes start at the same time here.
        let small = ["--limits.connections_per_shard=200", "--limits.channels_per_shard=10000"];
        Self::start_large(&[&small, args].concat(), variables)
    }

    /// The same with tables as large as they are by default.
    pub(crate) fn start_large(args: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ringmain"))
            .args(["serve", "--listen=127.0.0.1:0", "--admin=127.0.0.1:0"])
            .args(args)
            .env_clear()
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut banner = String::new();
        loop {
            let line = lines.next().unwrap_or_else(|| panic!("the node ended early: {banner}"));
            let line = line.expect("UTF-8");
            if line.is_empty() {
                break;
            }
            banner.push_str(&line);
            banner.push('\n');
        }
        let address = |prefix: &str| -> SocketAddr {
            let text = banner.split(prefix).nth(1).expect(prefix);
            let end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != ':').expect("an end");
            text[..end].parse().expect(prefix)
        };
        Self { clients: address("ws://"), admin: address("admin    http://"), banner, child }
    }

    /// The process's id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The sum over all shards of a metric, with a label where one is given. It may be 100 ms old.
    pub(crate) fn metric(&self, name: &str, label: &str) -> u64 {
        let (_, text) = self.get("/metrics");
        let lines = text.lines().filter(|line| {
            line.strip_prefix("ringmain_")
                .and_then(|rest| rest.strip_prefix(name))
                .is_some_and(|rest| rest.starts_with('{') && rest.contains(label))
        });
        let values: Vec<f64> = lines
            .map(|line| line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect(line))
            .collect();
        assert!(!values.is_empty(), "no metric {name} {label}");
        values.iter().sum::<f64>() as u64
    }

    /// Waits until a metric has a value.
    pub(crate) fn await_metric(&self, name: &str, expected: u64) {
        let until = Instant::now() + PATIENCE;
        until_some(until, || (self.metric(name, "") == expected).then_some(()));
    }

    /// Sends a signal by its number.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("the node runs");
    }

    /// Waits for the end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        until_some(until, || self.child.try_wait().expect("our child"))
    }

    /// What an ended node had logged.
    pub(crate) fn logged(&mut self) -> String {
        let mut text = String::new();
        // A node logs a few lines in a test: the pipe never fills while it runs.
        let mut stderr = self.child.stderr.take().expect("taken once");
        stderr.read_to_string(&mut text).expect("UTF-8");
        text
    }

    /// Whether the process still runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_none()
    }

    /// Calls a method of the server API with a key (none if empty).
    pub(crate) fn call_with_key(&self, method: &str, key: &str, body: &str) -> (u16, String) {
        let key = if key.is_empty() { String::new() } else { format!("X-API-Key: {key}\r\n") };
        http(self.admin, "POST", &format!("/api/{method}"), &key, body)
    }

    /// Calls a method without a key and expects 200.
    pub(crate) fn call(&self, method: &str, body: &str) -> String {
        let (status, reply) = self.call_with_key(method, "", body);
        assert_eq!(status, 200, "{method} {body}: {reply}");
        reply
    }

    /// Gets a page of the admin port.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        http(self.admin, "GET", path, "", "")
    }

    /// A client that has opened its WebSocket.
    pub(crate) fn open(&self) -> Client {
        Client::open(self.clients)
    }

    /// A client that is connected as the anonymous user.
    pub(crate) fn connect(&self) -> Client {
        let mut client = self.open();
        client.ask(r#"{"id":1,"connect":{}}"#);
        client
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail where the node has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() && self.child.stderr.is_some() {
            eprintln!("the node logged:\n{}", self.logged());
        }
    }
}

/// Asks again and again until there is a value: for what another process does in its own time.
pub(crate) fn until_some<T>(until: Instant, mut ask: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(value) = ask() {
            return value;
        }
        assert!(Instant::now() < until, "not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One HTTP request on a connection of its own.
pub(crate) fn http(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("the port is open");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n"
    );
    stream.write_all(format!("{head}{headers}\r\n{body}").as_bytes()).expect("sent");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("an answer");
    let (head, body) = response.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
    (status, body.to_owned())
}

/// A client of the JSON protocol.
pub(crate) struct Client {
    socket: WebSocket<TcpStream>,
    /// Lines of a message that were not asked for yet.
    waiting: std::collections::VecDeque<String>,
}

impl Client {
    /// Opens a WebSocket.
    pub(crate) fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("the port is open");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        let url = format!("ws://{address}/connection/websocket");
        let (socket, _) = tungstenite::client(url, stream).expect("a WebSocket");
        Self { socket, waiting: std::collections::VecDeque::new() }
    }

    /// Sends one message.
    pub(crate) fn send(&mut self, text: &str) {
        self.socket.send(Message::text(text)).expect("sent");
    }

    /// The next reply or push.
    pub(crate) fn next(&mut self) -> String {
        while self.waiting.is_empty() {
            match self.socket.read().expect("a message") {
                Message::Text(text) => self.waiting.extend(text.lines().map(str::to_owned)),
                Message::Close(frame) => panic!("closed: {frame:?}"),
                _ => {}
            }
        }
        self.waiting.pop_front().expect("there is one")
    }

    /// Sends a command and gives its reply; pushes before it are passed over.
    pub(crate) fn ask(&mut self, command: &str) -> String {
        self.send(command);
        loop {
            let line = self.next();
            if line.starts_with("{\"id\":") {
                return line;
            }
        }
    }

    /// The next line that contains `part`; pings and other lines are passed over.
    pub(crate) fn next_with(&mut self, part: &str) -> String {
        loop {
            let line = self.next();
            if line.contains(part) {
                return line;
            }
        }
    }

    /// Waits for the close frame and gives its code and reason.
    pub(crate) fn closed(&mut self) -> (u16, String) {
        loop {
            match self.socket.read().expect("a close frame") {
                Message::Close(Some(frame)) => return (code(frame.code), frame.reason.to_string()),
                Message::Close(None) => panic!("closed without a code"),
                _ => {}
            }
        }
    }

    /// The client id of a connect reply or of this connection's presence.
    pub(crate) fn client_id(connect_reply: &str) -> &str {
        connect_reply
            .split(r#""client":""#)
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .expect("a client id")
    }
}

fn code(code: CloseCode) -> u16 {
    code.into()
}
