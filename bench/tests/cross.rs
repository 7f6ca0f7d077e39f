//! `cross` as it is used: real nodes, a real Redis, and the bare client beside them.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ringmain-bench");
/// Until Redis listens, on a busy machine.
const LISTENS_MAX: Duration = Duration::from_secs(30);

/// The node, which the build of the workspace puts beside the bench.
fn ringmain() -> PathBuf {
    let path = PathBuf::from(PROGRAM).with_file_name("ringmain");
    assert!(path.exists(), "no {}: cargo build -p ringmain", path.display());
    path
}

/// A `redis-server` of our own; killed at the end.
struct Redis {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Redis {
    fn start() -> Redis {
        let folder = tempfile::tempdir().expect("a folder");
        let port =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port").local_addr().expect("bound").port();
        let child = Command::new("redis-server")
            .args([
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
                "--port",
                &port.to_string(),
                "--dir",
            ])
            .arg(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("no redis-server here ({error}): deploy/local/install redis"));
        let redis = Redis { child, port, _folder: folder };
        let started = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(started.elapsed() < LISTENS_MAX, "redis-server does not listen");
            std::thread::yield_now();
        }
        redis
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }
}

/// Runs `cross` on `redis` and returns its result; fails with its messages when it fails.
fn cross(redis: &Redis, arguments: &str) -> Value {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("result.json");
    let output = Command::new(PROGRAM)
        .args(["cross", "--bus", &format!("redis://127.0.0.1:{}", redis.port), "--quiet", "--json"])
        .arg(&file)
        .arg("--spawn")
        .arg(ringmain())
        .args(arguments.split_whitespace())
        .output()
        .expect("the program starts");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments}: {said}");
    let text = std::fs::read_to_string(&file).expect("a result");
    serde_json::from_str::<Value>(&text).expect("JSON")["result"].clone()
}

/// The trials of both contestants in `setting`, checked to be good ones.
fn trials(setting: &Value) -> Vec<&Value> {
    let of = |who: &str| setting[who].as_array().expect("trials").iter();
    let trials: Vec<&Value> = of("nodes").chain(of("bare")).collect();
    assert_eq!(trials.len(), 2, "{setting}");
    for trial in &trials {
        assert!(trial["publications"].as_f64() > Some(0.0), "{trial}");
        // The machine may be too slow for the rate; everything else is wrong.
        let problems = trial["problems"].as_array().expect("problems");
        assert!(problems.iter().all(|problem| problem[0] == json!("the rate was not kept up")), "{trial}");
    }
    trials
}

#[test]
fn latency_cost_and_throughput_beside_the_bare_client() {
    let redis = Redis::start();
    let result = cross(
        &redis,
        "--rates 200 --windows 1,16 --rounds 1 --channels 4 --publishers 2 --subscribers 2 --warmup 0.3 --duration 1",
    );
    let latency = &result["latency"][0];
    for trial in trials(latency) {
        assert!(trial["latency"]["count"].as_u64() > Some(0), "{trial}");
        assert!(trial["latency"]["p99_us"].as_f64() >= trial["latency"]["p50_us"].as_f64(), "{trial}");
        assert!(trial["broker_by_kind"]["publish"].as_f64() > Some(0.0), "a publish for each: {trial}");
        // A publication's data crosses the bus at least once in and once out.
        assert!(trial["broker_in_bytes"].as_f64() > Some(128.0), "{trial}");
        assert!(trial["broker_out_bytes"].as_f64() > Some(128.0), "{trial}");
    }
    assert_eq!(latency["nodes"][0]["cpu_us"].as_array().map(Vec::len), Some(2));
    let median = &latency["comparison"][0];
    assert!(median["ratio"]["median"].as_f64() > Some(0.0), "{median}");
    let throughput = result["throughput"].as_array().expect("windows");
    assert_eq!(throughput.len(), 2);
    throughput.iter().for_each(|window| assert!(window["ratio"]["median"].as_f64() > Some(0.0), "{window}"));
    throughput.iter().for_each(|window| _ = trials(window));
}

#[test]
fn users_who_are_placed_are_reached_on_one_node() {
    let redis = Redis::start();
    let result = cross(&redis, "--placement --users 60");
    let reach = result["placement"].as_array().expect("both ways");
    assert_eq!(reach.len(), 4, "published by one node and by all");
    for way in reach {
        assert_eq!(way["deliveries"], 120, "two connections of each user: {way}");
        let expected = if way["users"] == "placed" { 0.9..1.3 } else { 1.4..2.0 };
        assert!(expected.contains(&way["nodes_per_message"].as_f64().expect("a number")), "{result}");
    }
}

#[test]
fn a_bus_that_is_not_there_is_said() {
    let output = Command::new(PROGRAM)
        .args(["cross", "--quiet", "--bus", "gopher://127.0.0.1:1", "--spawn"])
        .arg(ringmain())
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("ringmain-bench: "), "{text}");
}
