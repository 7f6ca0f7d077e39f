//! The server under test: started here and stopped again, or attached to; and the bare servers.
//!
//! Owns processes and the API client. A server that was started is ended by SIGTERM to its own pid, and killed if it
//! has not gone after [`STOP_MAX`]; also when the run fails.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use thiserror::Error;

use crate::bare::script::Script;
use crate::plan::Target;

/// How long a server may take until it accepts connections.
const START_MAX: Duration = Duration::from_secs(20);
/// How long it may take to end after SIGTERM.
const STOP_MAX: Duration = Duration::from_secs(40);
const POLL: Duration = Duration::from_millis(20);
/// One call of the API, at most.
const API_MAX: Duration = Duration::from_secs(30);
/// The largest answer of the API that is read, in bytes.
const API_ANSWER_BYTES_MAX: u64 = 16 << 20;

/// The demo's rooms tell everyone who comes and goes: with n subscribers that is n² messages while they connect, which
/// nothing here means to measure.
const QUIET_ROOMS: [&str; 2] =
    ["--namespaces.room.join_leave=false", "--namespaces.room.force_push_join_leave=false"];

/// The path that Centrifuge clients connect to.
pub(crate) const WEBSOCKET_PATH: &str = "/connection/websocket";

/// The server cannot be had. The message names what to look at; retrying without a change does not help.
#[derive(Debug, Error)]
pub(crate) enum ServerError {
    #[error("cannot start {0}: {1}")]
    Spawn(String, std::io::Error),
    #[error("the server ended with {0} instead of listening; its messages are above")]
    Ended(String),
    #[error("the server does not accept connections on {0} after {START_MAX:?}")]
    NotListening(SocketAddrV4),
    #[error("no free port: {0}")]
    NoPort(std::io::Error),
    #[error("{0:?} is no address of a WebSocket: expected ws://127.0.0.1:8000/connection/websocket")]
    Url(String),
    #[error("the server's API at {0}: {1}")]
    Api(SocketAddrV4, String),
    #[error("the bare server did not say where it listens")]
    BareSilent,
    #[error("cannot pin to core {0}")]
    Core(usize),
}

/// A server to measure.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) target: Target,
    /// Whose CPU and memory count; empty when unknown.
    pub(crate) pids: Vec<u32>,
    pub(crate) api: Option<Api>,
    child: Option<Child>,
}

/// How `ringmain` is started.
#[derive(Clone, Debug)]
pub(crate) struct SpawnOptions<'a> {
    pub(crate) binary: &'a Path,
    /// Added behind what the bench itself passes.
    pub(crate) arguments: &'a [String],
    pub(crate) core: Option<usize>,
    pub(crate) token_secret: Option<&'a str>,
    pub(crate) api_key: Option<&'a str>,
    pub(crate) quiet: bool,
}

impl Server {
    /// Starts `ringmain serve --demo` on free ports, pinned, and waits until it accepts connections.
    pub(crate) fn spawn(options: &SpawnOptions<'_>) -> Result<Server, ServerError> {
        let (listen, admin) = free_addresses()?;
        let mut command = Command::new(options.binary);
        command.args(["serve", "--demo", "--listen", &listen.to_string(), "--admin", &admin.to_string()]);
        let named = |start: &str| options.arguments.iter().any(|argument| argument.starts_with(start));
        if !named("--shards") {
            command.args(["--shards", "1"]);
        }
        if !named("--namespaces.room.") {
            command.args(QUIET_ROOMS);
        }
        command.args(options.arguments);
        if let Some(secret) = options.token_secret {
            command.env("RINGMAIN_TOKEN_HMAC_SECRET", secret);
        }
        if let Some(key) = options.api_key {
            command.env("RINGMAIN_API_KEY", key);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        if options.quiet {
            command.stderr(Stdio::null());
        }
        let name = options.binary.display().to_string();
        let child = spawn_pinned(&mut command, options.core, &name)?;
        let target = Target { address: listen, path: WEBSOCKET_PATH.into() };
        let api = Some(Api { address: admin, key: options.api_key.map(str::to_owned) });
        let mut server = Server { target, pids: vec![child.id()], api, child: Some(child) };
        server.await_listening()?;
        Ok(server)
    }

    /// The ports that clients and the API have.
    pub(crate) fn ports(&self) -> Vec<u16> {
        let api = self.api.as_ref().map(|api| api.address.port());
        api.into_iter().chain([self.target.address.port()]).collect()
    }

    /// Starts a bare server: this very program as `bare ENGINE`.
    pub(crate) fn spawn_bare(
        engine: &str,
        script: &Script,
        core: Option<usize>,
    ) -> Result<Server, ServerError> {
        let name = format!("the bare {engine} server");
        let program = std::env::current_exe().map_err(|error| ServerError::Spawn(name.clone(), error))?;
        let mut command = Command::new(program);
        command.args(["bare", engine]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn_pinned(&mut command, core, &name)?;
        if let Some(mut input) = child.stdin.take() {
            serde_json::to_writer(&mut input, script)
                .map_err(|error| ServerError::Spawn(name, error.into()))?;
        }
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            // Only the first line is ever written; a read error leaves it empty, which is reported below.
            let _ = BufReader::new(output).read_line(&mut line);
        }
        let pids = vec![child.id()];
        let target =
            Target { address: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0), path: WEBSOCKET_PATH.into() };
        let mut server = Server { target, pids, api: None, child: Some(child) };
        server.target.address = line.trim().parse().map_err(|_| ServerError::BareSilent)?;
        Ok(server)
    }

    /// A server that runs already.
    pub(crate) fn attach(url: &str, pids: Vec<u32>, api: Option<Api>) -> Result<Server, ServerError> {
        let target = parse_url(url).ok_or_else(|| ServerError::Url(url.into()))?;
        Ok(Server { target, pids, api, child: None })
    }

    fn await_listening(&mut self) -> Result<(), ServerError> {
        let started = Instant::now();
        while started.elapsed() < START_MAX {
            if let Some(Ok(Some(status))) = self.child.as_mut().map(Child::try_wait) {
                self.child = None;
                return Err(ServerError::Ended(status.to_string()));
            }
            let listening = |address: SocketAddrV4| TcpStream::connect(address).is_ok();
            if listening(self.target.address) && self.api.as_ref().is_none_or(|api| listening(api.address)) {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
        Err(ServerError::NotListening(self.target.address))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        if let Some(pid) = Pid::from_raw(child.id() as i32) {
            // It may have ended by itself; then there is nobody to tell.
            let _ = kill_process(pid, Signal::TERM);
        }
        let asked = Instant::now();
        while asked.elapsed() < STOP_MAX {
            if !matches!(child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(POLL);
        }
        eprintln!("the server did not end within {STOP_MAX:?} of SIGTERM and is killed");
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Starts `command` on `core`: a child inherits the affinity of the thread that starts it.
fn spawn_pinned(command: &mut Command, core: Option<usize>, name: &str) -> Result<Child, ServerError> {
    let before = core_affinity::get_core_ids();
    if let Some(core) = core
        && !core_affinity::set_for_current(core_affinity::CoreId { id: core })
    {
        return Err(ServerError::Core(core));
    }
    let child = command.spawn();
    if core.is_some() {
        set_affinity(&before.unwrap_or_default());
    }
    child.map_err(|error| ServerError::Spawn(name.into(), error))
}

fn set_affinity(cores: &[core_affinity::CoreId]) {
    let mut set = rustix::thread::CpuSet::new();
    cores.iter().for_each(|core| set.set(core.id));
    // It was this thread's own affinity a moment ago; a refusal leaves the parent on the server's core, no worse.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// Two free ports of loopback. Another process may take one before the server does; then the server says so.
fn free_addresses() -> Result<(SocketAddrV4, SocketAddrV4), ServerError> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(ServerError::NoPort);
    let (one, two) = (bind()?, bind()?);
    let port = |listener: &TcpListener| listener.local_addr().map(|address| address.port());
    let address = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    let (one, two) = (port(&one).map_err(ServerError::NoPort)?, port(&two).map_err(ServerError::NoPort)?);
    Ok((address(one), address(two)))
}

/// `ws://ADDRESS:PORT/PATH`, with an IPv4 address or `localhost`.
pub(crate) fn parse_url(url: &str) -> Option<Target> {
    let rest = url.strip_prefix("ws://")?;
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, format!("/{path}")),
        None => (rest, "/".to_owned()),
    };
    Some(Target { address: parse_address(authority)?, path })
}

/// `ADDRESS:PORT`, with or without `http://` before it.
pub(crate) fn parse_address(text: &str) -> Option<SocketAddrV4> {
    let text = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    text.replacen("localhost", "127.0.0.1", 1).parse().ok()
}

/// The server's HTTP API.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) address: SocketAddrV4,
    pub(crate) key: Option<String>,
}

impl Api {
    /// Publishes `data` (JSON text) to one channel.
    pub(crate) fn publish(&self, channel: &str, data: &str) -> Result<(), ServerError> {
        self.call("publish", &json!({"channel": channel, "data": data})).map(|_| ())
    }

    /// Waits until the server says that it is ready: connected to its bus, where it has one.
    pub(crate) fn await_ready(&self, limit: Duration) -> Result<(), ServerError> {
        let started = Instant::now();
        loop {
            let answer = self.request("GET", "/ready", "");
            match answer {
                Ok(answer) if answer.starts_with("HTTP/1.1 200") => return Ok(()),
                _ if started.elapsed() < limit => std::thread::sleep(POLL),
                Ok(answer) => {
                    let reasons = answer.split_once("\r\n\r\n").map_or(&*answer, |(_, body)| body);
                    return Err(ServerError::Api(
                        self.address,
                        format!("not ready after {limit:?}: {reasons}"),
                    ));
                }
                Err(error) => return Err(ServerError::Api(self.address, error.to_string())),
            }
        }
    }

    /// Where `user` belongs: the address that its node was given.
    pub(crate) fn place(&self, user: &str) -> Result<String, ServerError> {
        let failed = |why: String| ServerError::Api(self.address, format!("place: {why}"));
        let answer = self.request("GET", &format!("/v1/place?user={user}"), "");
        let answer = answer.map_err(|error| failed(error.to_string()))?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| failed("no HTTP answer".into()))?;
        let value: Option<Value> = serde_json::from_str(body).ok();
        let address = value.as_ref().and_then(|value| value.get("address")?.as_str().map(str::to_owned));
        address.ok_or_else(|| failed(head.lines().next().unwrap_or_default().into()))
    }

    /// Publishes `data` (JSON text) to many channels.
    pub(crate) fn broadcast(&self, channels: &[String], data: &str) -> Result<(), ServerError> {
        self.call("broadcast", &json!({"channels": channels, "data": data})).map(|_| ())
    }

    fn call(&self, method: &str, body: &Value) -> Result<Value, ServerError> {
        let failed = |why: String| ServerError::Api(self.address, format!("{method}: {why}"));
        let path = format!("/api/{method}");
        let answer = self.request("POST", &path, &body.to_string()).map_err(|error| match error.kind() {
            std::io::ErrorKind::WouldBlock => failed(format!("no answer within {API_MAX:?}")),
            _ => failed(error.to_string()),
        })?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| failed("no HTTP answer".into()))?;
        if !head.starts_with("HTTP/1.1 200") {
            return Err(failed(head.lines().next().unwrap_or_default().into()));
        }
        let value: Value = serde_json::from_str(body).map_err(|error| failed(error.to_string()))?;
        if let Some(error) = value.get("error") {
            return Err(failed(error.to_string()));
        }
        Ok(value)
    }

    fn request(&self, method: &str, path: &str, body: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(API_MAX))?;
        let key = self.key.as_ref().map_or(String::new(), |key| format!("X-API-Key: {key}\r\n"));
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\n{key}Content-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.address,
            body.len()
        )?;
        let mut answer = String::new();
        stream.take(API_ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses() {
        fn check(url: &str, expected: Option<(&str, &str)>) {
            let found = parse_url(url).map(|target| (target.address.to_string(), target.path));
            assert_eq!(found, expected.map(|(address, path)| (address.into(), path.into())), "{url}");
        }
        check("ws://127.0.0.1:8000/connection/websocket", Some(("127.0.0.1:8000", "/connection/websocket")));
        check("ws://localhost:9?x=1", None);
        check("ws://localhost:9", Some(("127.0.0.1:9", "/")));
        check("wss://127.0.0.1:8000/", None);
        check("ws://127.0.0.1", None);
        assert_eq!(parse_address("http://localhost:8001/").map(|a| a.port()), Some(8001));
        assert_eq!(parse_address("nowhere"), None);
    }

    #[test]
    fn the_api_client_understands_answers_and_errors() {
        fn check(answer: &'static str, expected: Result<(), &str>) {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
            let address = listener.local_addr().expect("an address").to_string().parse().expect("IPv4");
            let server = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().expect("a call");
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\"data\":\"x\"}") {
                    stream.read_exact(&mut byte).expect("the request");
                    request.push(byte[0]);
                }
                stream.write_all(answer.as_bytes()).expect("room");
                String::from_utf8(request).expect("text")
            });
            let api = Api { address, key: Some("k".into()) };
            let result = api.publish("room:a", "x");
            let request = server.join().expect("no panic");
            assert!(
                request.starts_with("POST /api/publish HTTP/1.1\r\n") && request.contains("X-API-Key: k\r\n")
            );
            match expected {
                Ok(()) => assert!(result.is_ok(), "{result:?}"),
                Err(part) => assert!(result.expect_err("an error").to_string().contains(part)),
            }
        }
        check("HTTP/1.1 200 OK\r\n\r\n{\"result\":{}}", Ok(()));
        check("HTTP/1.1 200 OK\r\n\r\n{\"error\":{\"code\":102}}", Err("102"));
        check("HTTP/1.1 401 Unauthorized\r\n\r\n", Err("401"));
    }
}
