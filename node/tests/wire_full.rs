//! Full tables: places are exact, sockets go to the emptiest shard, and only a full node refuses.

mod wire_support;

use std::io::{Read, Write};
use std::net::TcpStream;

use ringmain::core::metrics::Metric;
use ringmain::io::WireMetric;
use wire_support::engine::{Echo, Order, TestEngine, Told};
use wire_support::node::{Node, Plan, await_that};
use wire_support::sockets::{End, await_live, connect, read_to_end};

type EchoNode = Node<TestEngine<Echo>>;

fn echo(plan: &Plan) -> EchoNode {
    Node::start(plan, |_| || TestEngine::new(Echo::default()))
}

/// Whether the server serves this connection, rather than closing it.
fn is_served(stream: &mut TcpStream) -> bool {
    let mut back = [0; 4];
    // A refused connection is closed at once: the write may still succeed, the read does not.
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut back).is_ok()
}

/// The sum of a metric over all shards, once the node has stopped.
fn stopped_sum(node: EchoNode, metric: Metric) -> u64 {
    let metrics: Vec<_> = node.shards.iter().map(|shard| shard.metrics.clone()).collect();
    node.stop();
    metrics.iter().map(|metrics| metrics.value(metric)).sum()
}

#[test]
fn a_full_shard_refuses_exactly_the_next_one() {
    let node = echo(&Plan { slots_max: 10, ..Plan::default() });
    let mut kept: Vec<_> = (0..10).map(|_| connect(node.address())).collect();
    assert!(kept.iter_mut().all(is_served), "10 of 10 are served");
    let mut eleventh = connect(node.address());
    assert!(!is_served(&mut eleventh), "the eleventh is refused");
    assert_eq!(node.used(), 10);
    // A slot that frees is taken by the next.
    kept.pop();
    node.await_used(9);
    let mut next = connect(node.address());
    assert!(is_served(&mut next));
    assert!(!is_served(&mut connect(node.address())));
    await_live(node.address().port(), 10);
    assert_eq!(stopped_sum(node, Metric::Refused), 2);
}

#[test]
fn a_burst_fills_the_node_exactly_whatever_shard_it_hits() {
    // SO_REUSEPORT spreads by hash: some shards are hit beyond their table while others have room.
    const SHARDS: u16 = 4;
    const SLOTS: u32 = 50;
    let node = echo(&Plan { shards: SHARDS, slots_max: SLOTS, ..Plan::default() });
    let capacity = usize::from(SHARDS) * SLOTS as usize;
    let mut kept: Vec<_> = (0..capacity).map(|_| connect(node.address())).collect();
    for (i, stream) in kept.iter_mut().enumerate() {
        assert!(is_served(stream), "connection {i} of {capacity} is refused");
    }
    for shard in 0..SHARDS {
        assert_eq!(node.mesh.used(shard), SLOTS, "shard {shard}");
    }
    let mut beyond: Vec<_> = (0..40).map(|_| connect(node.address())).collect();
    assert!(!beyond.iter_mut().any(is_served), "max + 1 and more are refused");
    assert!(kept.iter_mut().all(is_served), "and those that are there are not disturbed");
    drop(beyond);
    await_live(node.address().port(), capacity);
    // The whole node empties and fills again.
    drop(kept);
    node.await_used(0);
    let mut again: Vec<_> = (0..capacity).map(|_| connect(node.address())).collect();
    assert!(again.iter_mut().all(is_served));
    drop(again);
    node.await_used(0);
    await_live(node.address().port(), 0);
    assert!(stopped_sum(node, Metric::HandedOver) > 0, "no socket was handed over: the test shows nothing");
}

#[test]
fn a_burst_onto_a_multishot_accept_loses_nobody_as_the_table_fills() {
    // A short completion queue lets a table of 400 be accepted from in both ways: first by multishot,
    // from some point on one by one. All connect before the first is served.
    let plan = Plan {
        slots_max: 400,
        tune: |options| {
            options.turn.completion_entries = 64;
            options.turn.ring_entries = 32;
        },
        ..Plan::default()
    };
    let node = echo(&plan);
    for round in 0..3 {
        let mut all: Vec<_> = (0..450).map(|_| connect(node.address())).collect();
        let served = all.iter_mut().filter_map(|stream| is_served(stream).then_some(())).count();
        assert_eq!(served, 400, "round {round}");
        drop(all);
        node.await_used(0);
    }
    let metrics = node.shards[0].metrics.clone();
    assert_eq!(stopped_sum(node, Metric::Refused), 150);
    assert_eq!(metrics.wire(WireMetric::AcceptErrors), 0);
}

#[test]
fn more_listeners_than_the_margin_share_the_last_slots() {
    let listen = (0..100).map(|_| "127.0.0.1:0".parse().unwrap()).collect();
    let node = echo(&Plan { slots_max: 5, listen, ..Plan::default() });
    let addresses: Vec<_> =
        node.addresses.iter().map(|address| address.to_string().parse().unwrap()).collect();
    for round in 0..3 {
        let mut kept: Vec<_> = (0..5).map(|i| connect(addresses[(i * 19 + round) % 100])).collect();
        assert!(kept.iter_mut().all(is_served), "round {round}");
        // Whatever listener it comes through, the next one is refused and does not hang.
        assert!(!is_served(&mut connect(addresses[50 + round])));
        drop(kept);
        node.await_used(0);
    }
    node.stop();
}

#[test]
fn churn_at_the_brim_keeps_the_count_exact() {
    let node = echo(&Plan { shards: 3, slots_max: 20, ..Plan::default() });
    let address = node.address();
    let clients: Vec<_> = (0..8)
        .map(|seed| {
            std::thread::spawn(move || {
                let mut served = 0;
                let mut held: Vec<TcpStream> = Vec::new();
                for i in 0..300_usize {
                    let mut stream = connect(address);
                    if is_served(&mut stream) {
                        served += 1;
                        held.push(stream);
                    }
                    if held.len() > 7 + (i * 31 + seed) % 5 {
                        held.remove((i * 7) % held.len());
                    }
                }
                served
            })
        })
        .collect();
    let served: u32 = clients.into_iter().map(|client| client.join().unwrap()).sum();
    assert!(served > 300, "{served}");
    node.await_used(0);
    await_live(address.port(), 0);
    let mut kept: Vec<_> = (0..60).map(|_| connect(address)).collect();
    assert!(kept.iter_mut().all(is_served), "all 60 places are there again");
    node.stop();
}

#[test]
fn a_draining_shard_accepts_what_waits_and_then_closes_its_listeners() {
    let node = echo(&Plan { shards: 2, ..Plan::default() });
    let address = node.address();
    // They are connected, and many not yet accepted, when the orders come.
    let mut waiting: Vec<_> = (0..200).map(|_| TcpStream::connect(address).unwrap()).collect();
    node.order(0, Order::StopAccepting);
    node.order(1, Order::StopAccepting);
    assert!(waiting.iter_mut().all(is_served), "those in the queue are served");
    await_that(|| TcpStream::connect(address).is_err(), || "still listening".into());
    assert!(waiting.iter_mut().all(is_served), "and go on being served");
    node.order(0, Order::FinishAll);
    node.order(1, Order::FinishAll);
    for stream in &waiting {
        assert_eq!(read_to_end(stream).1, End::Fin);
    }
    drop(waiting);
    node.await_used(0);
    node.order(0, Order::Count);
    assert_eq!(node.answer(), Told::Connections(0));
    node.stop();
}
