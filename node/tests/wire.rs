//! The wire with one shard: bytes there and back, every way to close, and what is left after churn.

mod wire_support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ringmain::core::metrics::Metric;
use ringmain::io::{DISCARD_BYTES_MAX, DISCARD_MS_MAX, ListenSpec, PUBLISH_INTERVAL_MS, WireMetric};
use wire_support::engine::{Echo, Order, TestEngine, Told};
use wire_support::node::{Node, Plan, await_that};
use wire_support::sockets::{End, await_live, connect, live_sockets, read_to_end};

type EchoNode = Node<TestEngine<Echo>>;

fn echo(plan: &Plan) -> EchoNode {
    Node::start(plan, |_| || TestEngine::new(Echo::default()))
}

fn telling(plan: &Plan) -> EchoNode {
    Node::start(plan, |_| || TestEngine::new(Echo { tells: true, ..Echo::default() }))
}

fn round_trip(stream: &mut (impl Read + Write), message: &[u8]) {
    stream.write_all(message).unwrap();
    let mut back = vec![0; message.len()];
    stream.read_exact(&mut back).unwrap();
    assert!(back == message, "{} bytes came back changed", message.len());
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

#[test]
fn messages_of_all_sizes_come_back() {
    let node = echo(&Plan::default());
    let mut stream = connect(node.address());
    for len in [1, 2, 125, 126, 4_095, 4_096, 4_097, 8_192, 65_536, 100_000] {
        round_trip(&mut stream, &pattern(len));
    }
    drop(stream);
    node.await_used(0);
    await_live(node.address().port(), 0);
    node.stop();
}

#[test]
fn more_than_all_buffers_hold_comes_back() {
    // 8 MiB through 64 KiB of socket buffer and 512 KiB of receive buffers: short sends on the way.
    let node = echo(&Plan::default());
    let message = pattern(8 * 1024 * 1024);
    let mut stream = connect(node.address());
    let mut writing = stream.try_clone().unwrap();
    let sent = message.clone();
    let writer = std::thread::spawn(move || {
        writing.write_all(&sent).unwrap();
        writing.shutdown(Shutdown::Write).unwrap();
    });
    // Nobody reads until the server has met a full socket.
    let metrics = node.shards[0].metrics.clone();
    await_that(|| metrics.value(Metric::SendsShort) > 0, || "no send was short yet".to_owned());
    let (back, end) = read_to_end(&mut stream);
    assert!(back == message, "{} of {} bytes came back right", back.len(), message.len());
    assert_eq!(end, End::Fin);
    writer.join().unwrap();
    node.await_used(0);
    node.stop();
    assert_eq!(metrics.value(Metric::BytesIn), message.len() as u64);
    assert_eq!(metrics.value(Metric::BytesOut), message.len() as u64);
}

#[test]
fn receive_buffers_that_run_out_only_delay() {
    let plan = Plan {
        tune: |options| {
            options.turn.recv_buffers = 2;
            options.turn.recv_buffer_bytes = 64;
        },
        ..Plan::default()
    };
    let node = echo(&plan);
    let clients: Vec<_> = (0..16)
        .map(|_| {
            let mut stream = connect(node.address());
            std::thread::spawn(move || (0..20).for_each(|_| round_trip(&mut stream, &pattern(5_000))))
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    node.await_used(0);
    let metrics = node.shards[0].metrics.clone();
    node.stop();
    assert!(metrics.wire(WireMetric::RecvStarved) > 0, "no shortage: the test shows nothing");
}

#[test]
fn what_was_sent_before_a_fin_is_answered_after_it() {
    let node = echo(&Plan::default());
    let mut stream = connect(node.address());
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut stream), (b"last words".to_vec(), End::Fin));
    node.await_used(0);
    node.stop();
}

#[test]
fn an_orderly_closing_delivers_everything_to_a_peer_that_goes_on_talking() {
    // The client talks without reading while the server says 100 KB and closes. Closing with unread input
    // would answer with RST and destroy what the client has not read.
    let farewell = pattern(100_000);
    let copy = farewell.clone();
    let plan = Plan::default();
    let node: EchoNode = Node::start(&plan, |_| {
        let farewell = Some(copy.clone());
        move || TestEngine::new(Echo { farewell, ..Echo::default() })
    });
    let mut stream = connect(node.address());
    for _ in 0..100 {
        stream.write_all(&[7; 512]).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let (got, end) = read_to_end(&mut stream);
    assert!(got == farewell, "{} of {} bytes", got.len(), farewell.len());
    assert_eq!(end, End::Fin);
    node.await_used(0);
    node.stop();
}

#[test]
fn a_peer_without_a_fin_is_discarded_for_a_bounded_time() {
    let node = telling(&Plan::default());
    let mut stream = connect(node.address());
    round_trip(&mut stream, b"hello");
    let started = Instant::now();
    node.order(0, Order::FinishAll);
    assert_eq!(read_to_end(&mut stream), (Vec::new(), End::Fin));
    assert!(started.elapsed() < Duration::from_millis(DISCARD_MS_MAX), "the FIN came at once");
    node.answer_where(|told| matches!(told, Told::Released(_)));
    let waited = started.elapsed();
    // Deadlines are whole milliseconds.
    assert!(waited >= Duration::from_millis(DISCARD_MS_MAX - 1), "{waited:?}");
    assert!(waited < Duration::from_millis(2 * DISCARD_MS_MAX), "{waited:?}");
    await_live(node.address().port(), 0);
    let metrics = node.shards[0].metrics.clone();
    node.stop();
    assert_eq!(metrics.wire(WireMetric::DiscardTimeouts), 1);
}

#[test]
fn a_peer_that_floods_a_closing_is_cut_off() {
    let node = telling(&Plan::default());
    let mut stream = connect(node.address());
    round_trip(&mut stream, b"hello");
    node.order(0, Order::FinishAll);
    assert_eq!(read_to_end(&mut stream).1, End::Fin);
    let started = Instant::now();
    let mut written = 0;
    while let Ok(n) = stream.write(&[7; 4_096]) {
        written += n;
        assert!(written < 64 << 20, "the flood is never cut off");
    }
    assert!(written > DISCARD_BYTES_MAX as usize);
    node.answer_where(|told| matches!(told, Told::Released(_)));
    assert!(started.elapsed() < Duration::from_millis(DISCARD_MS_MAX), "by bytes, not by time");
    let metrics = node.shards[0].metrics.clone();
    node.stop();
    assert_eq!(metrics.wire(WireMetric::DiscardOverruns), 1);
}

#[test]
fn an_abort_resets_and_frees_at_once() {
    let node = telling(&Plan::default());
    let mut stream = connect(node.address());
    round_trip(&mut stream, b"hello");
    let started = Instant::now();
    node.order(0, Order::AbortAll);
    node.answer_where(|told| matches!(told, Told::Released(_)));
    assert!(started.elapsed() < Duration::from_millis(DISCARD_MS_MAX));
    assert_eq!(read_to_end(&mut stream), (Vec::new(), End::Reset));
    assert_eq!(live_sockets(node.address().port()), 0);
    node.stop();
}

#[test]
fn an_abort_drops_what_a_stopped_reader_has_not_taken() {
    let node = telling(&Plan::default());
    let mut stream = connect(node.address());
    // More echoes than both sides' buffers hold, and nobody reads them.
    stream.write_all(&pattern(16 << 20)).unwrap();
    node.order(0, Order::AbortAll);
    node.answer_where(|told| matches!(told, Told::Released(_)));
    await_live(node.address().port(), 0);
    node.stop();
}

#[test]
fn a_reset_is_told_with_its_errno() {
    let node = telling(&Plan::default());
    let mut stream = connect(node.address());
    round_trip(&mut stream, b"hello");
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
    drop(stream);
    let told = node.answer_where(|told| matches!(told, Told::Broken(_)));
    assert_eq!(told, Told::Broken(libc::ECONNRESET));
    node.await_used(0);
    node.stop();
}

#[test]
fn sockets_equal_connections_after_churn() {
    let node = echo(&Plan { slots_max: 300, ..Plan::default() });
    let port = node.address().port();
    let mut kept: Vec<TcpStream> = Vec::new();
    let mut random = fastrand(11);
    for round in 0..2_000 {
        let mut stream = connect(node.address());
        round_trip(&mut stream, &pattern(1 + random() as usize % 300));
        match random() % 4 {
            // Unread input makes this a reset.
            0 => stream.write_all(b"and gone").unwrap(),
            1 => stream.shutdown(Shutdown::Write).unwrap(),
            2 if kept.len() < 250 => kept.push(stream),
            _ => {}
        }
        if round % 100 == 99 && random().is_multiple_of(2) {
            kept.truncate(kept.len() / 2);
        }
    }
    node.await_used(kept.len() as u32);
    await_live(port, kept.len());
    // Those that are left still work: no slot was mixed up.
    kept.iter_mut().for_each(|stream| round_trip(stream, b"still here"));
    let count = kept.len();
    node.order(0, Order::Count);
    assert_eq!(node.answer(), Told::Connections(count));
    drop(kept);
    node.await_used(0);
    await_live(port, 0);
    node.stop();
}

#[test]
fn several_listeners_tell_which_one_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ringmain.sock");
    let free: ListenSpec = "127.0.0.1:0".parse().unwrap();
    let listen = vec![free.clone(), ListenSpec::Unix(path.clone()), free];
    let node = telling(&Plan { shards: 2, listen, ..Plan::default() });
    assert_eq!(node.addresses.len(), 3);

    let mut tcp = connect(node.address());
    round_trip(&mut tcp, b"tcp");
    assert_eq!(node.answer(), Told::Accepted(0));
    // All shards accept from the one unix socket; whoever does, it works.
    for _ in 0..20 {
        let mut unix = UnixStream::connect(&path).unwrap();
        round_trip(&mut unix, &pattern(10_000));
        assert_eq!(node.answer_where(|told| matches!(told, Told::Accepted(_))), Told::Accepted(1));
    }
    let last: std::net::SocketAddr = node.addresses[2].to_string().parse().unwrap();
    round_trip(&mut connect(last), b"tcp again");
    assert_eq!(node.answer_where(|told| matches!(told, Told::Accepted(_))), Told::Accepted(2));
    drop(tcp);
    node.await_used(0);
    node.stop();
    assert!(!path.exists(), "the socket file is removed");
}

#[test]
fn a_range_of_ports_is_one_listener() {
    // Ports above those that the kernel hands out; taken ones are tried again elsewhere.
    let node = (0..50)
        .find_map(|attempt| {
            let first = 20_011 + attempt * 7 + (std::process::id() % 9_000) as u16;
            let spec = ListenSpec::Tcp { ip: [127, 0, 0, 1].into(), first, last: first + 3 };
            let ports: Result<Vec<_>, _> =
                (first..=first + 3).map(|port| std::net::TcpListener::bind(("127.0.0.1", port))).collect();
            drop(ports.ok()?);
            Some(telling(&Plan { listen: vec![spec], ..Plan::default() }))
        })
        .expect("four free ports in a row");
    assert_eq!(node.addresses.len(), 4);
    for address in &node.addresses {
        let mut stream = connect(address.to_string().parse().unwrap());
        round_trip(&mut stream, b"hello");
        assert_eq!(node.answer_where(|told| matches!(told, Told::Accepted(_))), Told::Accepted(0));
    }
    node.await_used(0);
    node.stop();
}

#[test]
fn figures_are_published_without_further_work() {
    let node = echo(&Plan::default());
    let metrics = node.shards[0].metrics.clone();
    let mut stream = connect(node.address());
    round_trip(&mut stream, b"hello");
    let started = Instant::now();
    await_that(|| metrics.value(Metric::BytesOut) == 5, || "nothing published".into());
    assert!(started.elapsed() < Duration::from_millis(10 * PUBLISH_INTERVAL_MS));
    assert_eq!(metrics.value(Metric::Accepted), 1);
    assert_eq!(metrics.value(Metric::Connections), 1);
    assert!(metrics.turn().count() > 0);
    node.stop();
}

#[test]
fn a_panicking_engine_ends_its_shard_alone_and_visibly() {
    let node = echo(&Plan { shards: 2, ..Plan::default() });
    node.order(1, Order::Panic);
    assert_eq!(
        node.events.recv_timeout(wire_support::node::PATIENCE),
        Ok(ringmain::io::ShardEvent::Stopped(1))
    );
    node.order(0, Order::Count);
    assert_eq!(node.answer(), Told::Connections(0));
    let Node { mut shards, .. } = node;
    let panicked = shards.pop().unwrap();
    assert!(matches!(panicked.control().try_send(Order::Count), Err(ringmain::io::SendError::Closed(_))));
    assert!(panicked.join().is_err());
    let other = shards.pop().unwrap();
    other.stop();
    other.join().unwrap();
}

/// A small generator of numbers, the same for a seed.
fn fastrand(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
