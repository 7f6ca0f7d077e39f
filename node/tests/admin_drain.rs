//! The end of a node: draining by signals, and what systemd is told.

mod admin_support;

use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use admin_support::{Node, PATIENCE, until_some};
use rustix::process::Signal;

#[test]
fn sigterm_turns_readiness_red_then_closes_with_3001_and_exits_with_0() {
    let mut node = Node::start(&[
        "--demo",
        "--shards=2",
        "--server.drain_delay_ms=2000",
        "--server.drain_timeout_ms=8000",
    ]);
    let mut early: Vec<_> = (0..6).map(|_| node.connect()).collect();
    assert_eq!(node.get("/ready").0, 200);
    let signalled = Instant::now();
    node.signal(Signal::TERM);
    until_some(signalled + PATIENCE, || (node.get("/ready").0 == 503).then_some(()));
    assert_eq!(node.get("/ready").1, r#"{"status":"not ready","reasons":["draining"]}"#);
    assert_eq!(node.get("/health").0, 200);
    // Still within the delay: whom a balancer sends now is served.
    let mut late = node.connect();
    assert!(signalled.elapsed().as_millis() < 2_000, "this machine is too slow for the test's delay");
    assert!(late.ask(r#"{"id":2,"subscribe":{"channel":"room:a"}}"#).contains("subscribe"));
    for client in early.iter_mut().chain([&mut late]) {
        assert_eq!(client.closed(), (3001, "shutdown".to_owned()));
    }
    drop((early, late));
    assert_eq!(node.wait().code(), Some(0));
    let took = signalled.elapsed().as_millis();
    assert!((2_000..8_000).contains(&took), "{took} ms");
}

#[test]
fn who_does_not_take_leave_is_cut_at_the_timeout() {
    let mut node =
        Node::start(&["--demo", "--shards=1", "--server.drain_delay_ms=0", "--server.drain_timeout_ms=700"]);
    // Connected and never reading: it answers no close frame.
    let _silent = node.connect();
    let signalled = Instant::now();
    node.signal(Signal::INT);
    assert_eq!(node.wait().code(), Some(0));
    let took = signalled.elapsed().as_millis();
    assert!(took < 3_000, "{took} ms");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let check = |first: Signal, second: Signal, code: i32| {
        let mut node = Node::start(&[
            "--demo",
            "--shards=1",
            "--server.drain_delay_ms=60000",
            "--server.drain_timeout_ms=90000",
        ]);
        node.signal(first);
        until_some(Instant::now() + PATIENCE, || (node.get("/ready").0 == 503).then_some(()));
        assert!(node.runs());
        node.signal(second);
        assert_eq!(node.wait().code(), Some(code));
    };
    check(Signal::TERM, Signal::TERM, 143);
    check(Signal::INT, Signal::INT, 130);
}

#[test]
fn systemd_is_told_of_readiness_and_of_the_end() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let told = || {
        let mut buffer = [0; 256];
        let len = socket.recv(&mut buffer).expect("a message");
        String::from_utf8_lossy(&buffer[..len]).trim().to_owned()
    };
    let path = path.to_str().expect("UTF-8");
    let mut node = Node::start_with(&["--demo", "--shards=1"], &[("NOTIFY_SOCKET", path)]);
    assert_eq!(told(), "READY=1");
    node.signal(Signal::TERM);
    assert_eq!(told(), "STOPPING=1");
    assert_eq!(node.wait().code(), Some(0));
}

#[test]
fn logs_are_lines_of_text_or_json_and_hold_no_secret() {
    let check = |format: &str, is_json: bool| {
        let variables = [("RINGMAIN_API_KEY", "hunter2"), ("RINGMAIN_TOKEN_HMAC_SECRET", "hunter3")];
        let args = ["--demo", "--shards=1", "--log.level=trace", format];
        let mut node = Node::start_with(&args, &variables);
        assert_eq!(node.call_with_key("info", "hunter2", "{}").0, 200);
        assert_eq!(node.call_with_key("info", "hunter4", "{}").0, 401);
        assert_eq!(node.call_with_key("publish", "hunter2", "{\"hunter5\"").0, 400);
        node.signal(Signal::TERM);
        assert_eq!(node.wait().code(), Some(0));
        let logged = node.logged();
        assert!(logged.contains("draining") && !logged.contains("hunter"), "{logged}");
        for line in logged.lines() {
            let parsed = serde_json::from_str::<serde_json::Value>(line);
            assert_eq!(parsed.is_ok_and(|line| line["level"].is_string()), is_json, "{line}");
        }
    };
    check("--log.format=text", false);
    check("--log.format=json", true);
}
