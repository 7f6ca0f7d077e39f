//! The program as it is used, against its own bare servers and a small blocking one: load processes, phases, merged
//! results, JSON, Ctrl-C, orderly closing.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ringmain-bench");

/// The accept value for the fixed key that the bench sends.
const UPGRADE: &str = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                       Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// Runs the bench with short phases and returns its JSON; fails with its messages when it fails.
fn bench(arguments: &str) -> Value {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("result.json");
    let output = Command::new(PROGRAM)
        .args(arguments.split_whitespace())
        .args(["--quiet", "--warmup", "0.1", "--duration", "0.4", "--json"])
        .arg(&file)
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {said}");
    let text = std::fs::read_to_string(&file).expect("a result");
    serde_json::from_str(&text).expect("JSON")
}

/// The single outcome of a run, checked to be a good one.
fn good(outcome: &Value) -> &Value {
    assert!(outcome["units"].as_u64() > Some(0), "{outcome}");
    assert_eq!(outcome["problems"], json!([]), "{outcome}");
    assert_eq!(outcome["failed_connections"], 0, "{outcome}");
    assert!(outcome["cpu_us_per_unit"].as_f64() > Some(0.0), "{outcome}");
    outcome
}

/// Every outcome of a comparison by server.
fn rounds(result: &Value) -> Vec<(&str, &Value)> {
    let servers = result["result"]["servers"].as_array().expect("servers");
    let of = |server: &'_ Value| server["rounds"].as_array().expect("rounds").len();
    assert!(servers.iter().all(|server| of(server) == 2), "{result}");
    servers
        .iter()
        .flat_map(|server| {
            let title = server["server"].as_str().expect("a name");
            server["rounds"].as_array().into_iter().flatten().map(move |outcome| (title, outcome))
        })
        .collect()
}

#[test]
fn echo_against_both_bare_servers() {
    for arguments in ["--mode ping --connections 8 --window 4", "--mode publish --connections 8 --window 4"] {
        let result = bench(&format!("limit echo {arguments} --bare-only --rounds 2 --token-secret secret"));
        let rounds = rounds(&result);
        assert_eq!(rounds.len(), 6, "epoll, io_uring and the control, twice each");
        for (server, outcome) in rounds {
            good(outcome);
            assert!(outcome["latency"]["count"].as_u64() > Some(0), "{server}");
        }
    }
}

#[test]
fn the_open_loop_keeps_its_rate() {
    let result = bench("limit echo --mode ping --connections 5 --rate 500 --bare-only --rounds 2");
    for (server, outcome) in rounds(&result) {
        let rate =
            good(outcome)["units"].as_f64().unwrap_or(0.0) / outcome["seconds"].as_f64().unwrap_or(1.0);
        assert!((100.0..2000.0).contains(&rate), "{server}: {rate}");
    }
}

#[test]
fn fanout_delivers_to_every_subscriber_also_of_several_processes() {
    for arguments in [
        "--connections 60 --window 1",
        "--connections 60 --window 4 --workers 3",
        "--connections 60 --stopped 7",
    ] {
        let result = bench(&format!("limit fanout {arguments} --size 64 --bare-only --rounds 2"));
        for (_, outcome) in rounds(&result) {
            let per_delivery = good(outcome)["bytes_in_per_unit"].as_f64().expect("a number");
            assert!((100.0..200.0).contains(&per_delivery), "{outcome}");
        }
    }
}

#[test]
fn churn_opens_and_closes_in_good_order() {
    for arguments in
        ["--concurrency 8", "--concurrency 8 --bare", "--concurrency 8 --workers 2 --token-secret s"]
    {
        let result = bench(&format!("limit churn {arguments} --bare-only --rounds 2"));
        for (_, outcome) in rounds(&result) {
            good(outcome);
        }
    }
}

/// A bare server that plays the server under test.
struct Stand {
    child: Child,
    address: String,
}

impl Stand {
    fn start(engine: &str, script: &Value) -> Stand {
        let mut child = Command::new(PROGRAM)
            .args(["bare", engine])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut input = child.stdin.take().expect("a pipe");
        input.write_all(script.to_string().as_bytes()).expect("a reader");
        drop(input);
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("the address");
        Stand { child, address: line.trim().to_owned() }
    }

    fn arguments(&self) -> String {
        format!("--url ws://{}/connection/websocket --pid {}", self.address, self.child.id())
    }
}

impl Drop for Stand {
    fn drop(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }
}

fn text_frame(text: &str) -> Vec<u8> {
    let mut frame = vec![0x81];
    if text.len() < 126 {
        frame.push(text.len() as u8);
    } else {
        frame.push(126);
        frame.extend_from_slice(&(text.len() as u16).to_be_bytes());
    }
    frame.extend_from_slice(text.as_bytes());
    frame
}

/// A script for subscribers of `room:bench` and a publisher of 64 bytes, both anonymous.
fn fanout_script() -> Value {
    let request = "GET /connection/websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
    let opening = "{\"id\":1,\"connect\":{\"name\":\"bench\"}}\n{\"id\":2,\"subscribe\":{\"channel\":\"room:bench\",\
                   \"positioned\":true,\"recoverable\":true}}";
    let publish = format!(
        "{{\"id\":1000000000,\"publish\":{{\"channel\":\"room:bench\",\"data\":\"{}\"}}}}",
        "x".repeat(62)
    );
    let delivery =
        format!("{{\"push\":{{\"channel\":\"room:bench\",\"pub\":{{\"data\":\"{}\"}}}}}}", "x".repeat(62));
    json!({
        "opening": [
            {"request_bytes": request.len(), "reply": UPGRADE.as_bytes()},
            {"request_bytes": opening.len() + 6 + if opening.len() > 125 { 2 } else { 0 },
             "reply": text_frame("{\"id\":1,\"connect\":{}}\n{\"id\":2,\"subscribe\":{}}")},
        ],
        "steady": {"request_bytes": publish.len() + 6 + if publish.len() > 125 { 2 } else { 0 },
                   "reply": text_frame("{\"id\":1000000000,\"publish\":{}}")},
        "delivery": text_frame(&delivery),
        "close_reply": [0x88, 2, 3, 0xe8],
    })
}

#[test]
fn limit_learns_the_bytes_of_the_server_under_test() {
    let stand = Stand::start("epoll", &fanout_script());
    let server = stand.arguments();
    let result = bench(&format!("limit fanout --connections 20 --size 64 --rounds 2 {server}"));
    let rounds = rounds(&result);
    assert_eq!(rounds.len(), 8);
    let bytes: Vec<f64> = rounds
        .iter()
        .map(|(_, outcome)| good(outcome)["bytes_in_per_unit"].as_f64().expect("a number"))
        .collect();
    let delivery = fanout_script()["delivery"].as_array().map_or(0, Vec::len) as f64;
    assert!(bytes[0] > delivery && bytes[0] < delivery + 5.0, "{bytes:?} for deliveries of {delivery}");
    // The same figure for each server, up to what the publisher's acknowledgements add.
    assert!(bytes.iter().all(|one| (one - bytes[0]).abs() < 1.0), "{bytes:?}");
}

#[test]
fn a_run_of_its_own_and_its_table() {
    let stand = Stand::start("uring", &fanout_script());
    let server = stand.arguments();
    let result = bench(&format!("fanout --connections 20 --size 64 {server}"));
    good(&result["result"]["outcome"]);
    assert!(result["machine"]["kernel"].as_str().is_some_and(|kernel| kernel.starts_with("Linux")));
}

#[test]
fn ctrl_c_prints_what_there_is() {
    let stand = Stand::start("epoll", &fanout_script());
    let child = Command::new(PROGRAM)
        .args(
            format!(
                "fanout --connections 5 --size 64 --quiet --warmup 0 --duration 600 {}",
                stand.arguments()
            )
            .split(' '),
        )
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // The measurement has begun when the server's CPU time moves on while no connection is being opened any more.
    let busy = |pid: u32| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("alive");
        text.split(' ').next().and_then(|ns| ns.parse().ok()).expect("a number")
    };
    let (started, before) = (Instant::now(), busy(stand.child.id()));
    while busy(stand.child.id()) - before < 50_000_000 {
        assert!(started.elapsed() < Duration::from_secs(60), "no load arrives");
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("our own child");
    let output = child.wait_with_output().expect("it ends by itself");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("interrupted; this is what there is"), "{text}");
    assert!(text.contains("us per delivery"), "{text}");
}

#[test]
fn says_why_there_is_no_result() {
    fn check(arguments: &str, part: &str) {
        let output = Command::new(PROGRAM).args(arguments.split(' ')).output().expect("the program starts");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(part), "{arguments}: {text}");
    }
    let closed = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    check(
        &format!("echo --quiet --connections 3 --url ws://{closed}/"),
        "3 of 3 connections could not be opened",
    );
    check("echo --quiet", "--spawn or --url");
    check("echo --quiet --url http://x", "no address of a WebSocket");
    check("echo --quiet --spawn /nonexistent", "cannot start /nonexistent");
    check("idle --quiet --url ws://127.0.0.1:1/", "--pid");
    check("limit echo --quiet --spawn /bin/false", "ended with");
}

/// One connection of a blocking server that answers pings until the close frame; how the connection ended.
fn serve_pings(mut stream: TcpStream) -> std::io::Result<usize> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    stream.write_all(UPGRADE.as_bytes())?;
    loop {
        let mut header = [0; 6];
        stream.read_exact(&mut header)?;
        let mut payload = vec![0; usize::from(header[1] & 0x7f)];
        stream.read_exact(&mut payload)?;
        let mask = &header[2..];
        payload.iter_mut().enumerate().for_each(|(index, byte)| *byte ^= mask[index & 3]);
        let close = header[0] == 0x88;
        let mut answer = vec![if close { 0x88 } else { 0x8a }, payload.len() as u8];
        answer.extend_from_slice(&payload);
        stream.write_all(&answer)?;
        if close {
            stream.shutdown(std::net::Shutdown::Write)?;
            return stream.read(&mut [0; 16]);
        }
    }
}

#[test]
fn connections_end_with_close_frames_and_fin() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let connections = 6;
    let server = std::thread::spawn(move || {
        let serving: Vec<_> = (0..connections)
            .map(|_| listener.accept().expect("a connection").0)
            .map(|stream| std::thread::spawn(|| serve_pings(stream)))
            .collect();
        serving.into_iter().map(|one| one.join().expect("no panic")).collect::<Vec<_>>()
    });
    let own = std::process::id();
    let result = bench(&format!(
        "echo --raw --window 3 --connections {connections} --url ws://{address}/ --pid {own}"
    ));
    good(&result["result"]["outcome"]);
    for ended in server.join().expect("no panic") {
        assert_eq!(ended.expect("no reset"), 0, "end of input after the close frames");
    }
}
