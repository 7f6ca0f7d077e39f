//! The mesh through real shards: nothing lost, nothing out of order, nobody asleep with work waiting.

mod wire_support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ringmain::io::{SendError, WireMetric};
use wire_support::engine::TestEngine;
use wire_support::gossip::{Gossip, Say};
use wire_support::node::{Node, Plan, await_that};
use wire_support::sockets::connect;

type GossipNode = Node<TestEngine<Gossip>>;

fn gossip(plan: &Plan) -> (GossipNode, Arc<AtomicU64>) {
    let total = Arc::new(AtomicU64::new(0));
    let shards = plan.shards;
    let node = Node::start(plan, |index| {
        let total = total.clone();
        move || TestEngine::new(Gossip::new(index, shards, total))
    });
    (node, total)
}

fn await_total(total: &AtomicU64, expected: u64) {
    let now = || total.load(Ordering::Relaxed);
    await_that(|| now() == expected, || format!("{} of {expected} batches", now()));
}

#[test]
fn all_to_all_arrives_complete_and_in_order_whatever_the_credits() {
    for credits in [1, 4] {
        let (node, total) = gossip(&Plan { shards: 8, credits, ..Plan::default() });
        for shard in 0..8 {
            node.order(shard, Say::ToAll(2_000));
        }
        await_total(&total, 8 * 7 * 2_000);
        for shard in 0..8 {
            node.order(shard, Say::Report);
        }
        for _ in 0..8 {
            let report = node.answer();
            assert_eq!((report.sent, report.received), (14_000, 14_000), "shard {}", report.shard);
        }
        let metrics: Vec<_> = node.shards.iter().map(|shard| shard.metrics.clone()).collect();
        node.stop();
        let blocked: u64 = metrics.iter().map(|metrics| metrics.wire(WireMetric::MeshBlocked)).sum();
        assert!(blocked > 0, "no credit ever ran out: the test shows nothing");
    }
}

#[test]
fn single_batches_to_sleepers_are_never_left_lying() {
    // Each batch must wake its target out of whichever way of waiting it is in, and each returned credit
    // its sender: a lost wake-up stops this for good.
    for nap_max_us in [0, 50, 1_000] {
        let plan = Plan {
            shards: 3,
            credits: 1,
            tune: match nap_max_us {
                0 => |options| options.turn.nap_max_us = 0,
                50 => |options| options.turn.nap_max_us = 50,
                _ => |_| {},
            },
            ..Plan::default()
        };
        let (node, total) = gossip(&plan);
        for round in 0..3_000_u64 {
            let from = round % 3;
            let to = (round + 1 + round / 3 % 2) % 3;
            // Pauses around the length of a nap meet shards on their way from one wait to the other.
            let pause = Duration::from_micros(round * 37 % 130);
            let until = Instant::now() + pause;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
            node.order(from as usize, Say::To(to as u16, 1 + round % 3));
            if round % 4 == 0 {
                await_total(&total, (0..=round).map(|round| 1 + round % 3).sum());
            }
        }
        await_total(&total, (0..3_000).map(|round| 1 + round % 3).sum());
        let metrics: Vec<_> = node.shards.iter().map(|shard| shard.metrics.clone()).collect();
        node.stop();
        let rings: u64 = metrics.iter().map(|metrics| metrics.wire(WireMetric::Rings)).sum();
        assert!(rings > 1_000, "nobody slept: the test shows nothing ({rings} rings)");
    }
}

#[test]
fn a_stalled_shard_holds_up_only_what_is_meant_for_it() {
    const STALL: Duration = Duration::from_secs(2);
    let (node, total) = gossip(&Plan { shards: 4, credits: 4, ..Plan::default() });
    let started = Instant::now();
    node.order(3, Say::Stall(STALL));
    await_total(&total, 1);
    for shard in 0..3 {
        node.order(shard, Say::ToAll(1_000));
    }
    // All but what is meant for the stalled one: three shards to two others each.
    await_that(|| total.load(Ordering::Relaxed) == 6_001, || format!("{total:?} while one stalls"));
    assert!(started.elapsed() < STALL, "the others waited for the stalled one");
    await_total(&total, 9_001);
    assert!(started.elapsed() >= STALL);
    node.stop();
}

#[test]
fn a_full_control_inbox_gives_the_command_back() {
    let plan = Plan { tune: |options| options.control_inbox_max = 8, ..Plan::default() };
    let (node, total) = gossip(&plan);
    let control = node.shards[0].control();
    control.try_send(Say::Stall(Duration::from_millis(500))).unwrap();
    await_total(&total, 1);
    // While the shard is blocked the inbox takes as many as it holds, and not one more.
    for _ in 0..8 {
        control.try_send(Say::Report).unwrap();
    }
    assert!(matches!(control.try_send(Say::Report), Err(SendError::Full(Say::Report))));
    for _ in 0..8 {
        node.answer();
    }
    control.try_send(Say::Report).unwrap();
    node.answer();
    node.stop();
}

#[test]
fn an_idle_node_sleeps() {
    let (node, _total) = gossip(&Plan { shards: 4, ..Plan::default() });
    let mut stream = connect(node.address());
    stream.write_all(b"hello").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    let turns = || {
        let turns = |shard: &ringmain::io::ShardHandle<Say>| shard.metrics.turn().count();
        node.shards.iter().map(turns).sum::<u64>()
    };
    // Two intervals of publishing, so that what the start needed is seen.
    std::thread::sleep(Duration::from_millis(300));
    let before = turns();
    std::thread::sleep(Duration::from_secs(1));
    let made = turns() - before;
    assert!(made <= 4, "{made} turns in an idle second");
    node.stop();
}
