//! Gaps: every subscriber is told once, at a bounded pace, and receives nothing beyond the hole.

use ringmain::core::GAP_TOLD_PER_TURN_MAX;
use ringmain::core::config::{CoreConfig, NamespaceConfig};
use ringmain::core::engine::Engine;
use ringmain::core::metrics::Metric;
use serde_json::Value;

use crate::fanout::{Oracle, publish};
use crate::harness::World;
use crate::protocol::{config, open_namespace};

/// A channel of two shards that is homed on the first.
const CHANNEL: &str = "short:a";

/// Publications of this size, and so many of them, are more than a relay keeps.
const LARGE_BYTES: usize = 60_000;
const BEYOND_RELAY: u64 = 20;

/// Histories so short that who misses a few publications cannot recover.
fn short_histories() -> CoreConfig {
    let mut config = config();
    config.client.personal_channel = false;
    let short = NamespaceConfig { history_size: 2, join_leave: false, presence: false, ..open_namespace() };
    config.namespaces.insert("short".into(), short);
    config
}

fn world(seed: u64) -> World {
    assert_eq!(ringmain::core::api::home_of(CHANNEL, 2), 0, "the test wants the home on the first shard");
    World::new(2, seed, &short_histories())
}

fn subscribe(world: &mut World, client: usize) -> u64 {
    let reply = world.ask(client, "subscribe", &format!(r#"{{"channel":"{CHANNEL}"}}"#));
    assert!(reply.get("epoch").is_some(), "{reply}");
    reply["offset"].as_u64().unwrap_or(0)
}

fn subscribers(world: &mut World, count: usize) -> Vec<usize> {
    let clients: Vec<usize> = (0..count).map(|_| world.connected(1, "{}").0).collect();
    for client in &clients {
        subscribe(world, *client);
    }
    clients
}

/// Publishes what the second shard cannot have any more when it runs again.
fn lose_some(world: &mut World, from: u64) -> u64 {
    world.paused = Some(1);
    for n in from..from + BEYOND_RELAY {
        publish(world, CHANNEL, n, LARGE_BYTES);
    }
    world.paused = None;
    from + BEYOND_RELAY - 1
}

fn told(world: &mut World) -> u64 {
    world.cores[1].metrics().get(Metric::DropLost)
}

/// Turns of the second shard until it has met the gap; what the home sent is in its inbox then.
fn turn_until_gap(world: &mut World) {
    for _ in 0..8 {
        world.turn(0);
        world.turn(1);
        if told(world) > 0 {
            return;
        }
    }
    panic!("nobody was told");
}

/// A turn of the second shard, which tells no more than it may and answers a ping.
fn paced_turn(world: &mut World, pinger: usize) {
    let before = told(world);
    world.frame(pinger, 9, b"still there?");
    world.turn(1);
    let step = told(world) - before;
    assert!(step <= GAP_TOLD_PER_TURN_MAX as u64, "{step} told in one turn");
    assert_eq!(world.take_frames(pinger), [(10, b"still there?".to_vec())]);
}

/// How often a client was told that it lost the channel.
fn losses(values: &[Value]) -> usize {
    values.iter().filter(|value| value["push"]["unsubscribe"]["code"] == 2500).count()
}

#[test]
fn a_turn_tells_its_maximum_and_the_next_one_the_rest() {
    for (count, first, rest) in [
        (GAP_TOLD_PER_TURN_MAX, GAP_TOLD_PER_TURN_MAX as u64, 0),
        (GAP_TOLD_PER_TURN_MAX + 1, GAP_TOLD_PER_TURN_MAX as u64, 1),
    ] {
        let mut world = world(1);
        let clients = subscribers(&mut world, count);
        lose_some(&mut world, 1);
        turn_until_gap(&mut world);
        assert_eq!(told(&mut world), first, "{count} subscribers");
        world.turn(1);
        assert_eq!(told(&mut world), first + rest, "{count} subscribers");
        world.run();
        assert_eq!(told(&mut world), count as u64);
        for client in clients {
            assert_eq!(losses(&world.take_json(client)), 1);
        }
        assert_eq!(world.cores[1].metrics().get(Metric::Subscriptions), 0);
    }
}

/// Many subscribers, some of them behind: no turn tells more than its maximum, pings are answered in
/// every one of them, and who subscribes again is served beside those who are still to be told.
#[test]
fn telling_many_leaves_room_for_others() {
    let count = 8 * GAP_TOLD_PER_TURN_MAX;
    let mut world = world(2);
    let clients = subscribers(&mut world, count);
    let (pinger, _) = world.connected(1, "{}");
    for client in clients.iter().step_by(7) {
        world.open_window(*client, Some(50));
    }
    publish(&mut world, CHANNEL, 1, 100);
    let lagging = world.cores[1].metrics().get(Metric::Lagging);
    assert!(lagging > 100, "{lagging} readers are behind when the gap comes");
    let mut top = lose_some(&mut world, 2);
    turn_until_gap(&mut world);
    let mut again: Option<usize> = None;
    let mut turns = 1;
    while told(&mut world) < count as u64 {
        paced_turn(&mut world, pinger);
        turns += 1;
        if again.is_none() {
            // The first who was told comes back: the shard still has others to tell.
            again = clients.iter().copied().find(|client| losses(&world.take_json(*client)) == 1);
            let Some(client) = again else { continue };
            world.send(client, "subscribe", &format!(r#"{{"channel":"{CHANNEL}"}}"#));
            while world.take_json(client).is_empty() {
                world.turn(0);
                paced_turn(&mut world, pinger);
                turns += 1;
            }
            assert!(told(&mut world) < count as u64, "it is back before all are told");
            top += 1;
            world.publish_unanswered(0, CHANNEL, 10);
        }
    }
    assert_eq!(turns, count / GAP_TOLD_PER_TURN_MAX);
    for client in &clients {
        world.open_window(*client, None);
    }
    world.run();
    let again = again.expect("somebody came back");
    for client in clients {
        let values = world.take_json(client);
        let offsets: Vec<_> = values.iter().filter_map(|v| v["push"]["pub"]["offset"].as_u64()).collect();
        if client == again {
            assert_eq!((losses(&values), offsets), (0, vec![top]), "it has what came after it was back");
        } else {
            assert_eq!(losses(&values), 1, "told once");
            let whole: Vec<u64> = (1..).take(offsets.len()).collect();
            assert!(offsets == whole && whole.len() < BEYOND_RELAY as usize, "no hole: {offsets:?}");
        }
    }
    assert_eq!(world.cores[1].metrics().get(Metric::Lagging), 0);
    assert_eq!(world.cores[1].metrics().get(Metric::DropLost), count as u64);
}

/// Who leaves or closes while it is still to be told is told nothing, and nobody else is missed.
#[test]
fn some_leave_before_they_are_told() {
    let count = 2 * GAP_TOLD_PER_TURN_MAX;
    let mut world = world(3);
    let clients = subscribers(&mut world, count);
    lose_some(&mut world, 1);
    turn_until_gap(&mut world);
    // Lists are told from their ends: the first subscribers come last.
    let (leaver, closer, refused) = (clients[0], clients[1], clients[2]);
    world.send(leaver, "unsubscribe", &format!(r#"{{"channel":"{CHANNEL}"}}"#));
    world.frame(closer, 8, &[]);
    world.send(refused, "subscribe", &format!(r#"{{"channel":"{CHANNEL}"}}"#));
    world.run();
    assert_eq!(told(&mut world), count as u64 - 2);
    let values = world.take_json(leaver);
    assert_eq!((losses(&values), values.len()), (0, 1), "only the reply: {values:?}");
    let values = world.take_json(refused);
    assert_eq!(values[0]["error"]["code"], 105, "it is subscribed until it is told");
    assert_eq!(losses(&values), 1);
    for client in &clients[3..] {
        assert_eq!(losses(&world.take_json(*client)), 1);
    }
    let top = BEYOND_RELAY;
    assert_eq!(subscribe(&mut world, leaver), top, "and may come back");
}

/// Gaps on several channels, again and again, among subscribers that come, go, stall and pause: nobody
/// sees a hole that it is not told of, and nothing is left behind.
#[test]
fn gaps_under_churn() {
    for seed in 1..12 {
        println!("seed {seed}");
        let mut world = world(seed);
        world.snapshot_one_in = seed % 3;
        let mut top = 0;
        let mut live: Vec<(usize, Oracle)> = Vec::new();
        for step in 0..60 {
            match world.dice.below(8) {
                0..3 => {
                    let shard = world.dice.below(2) as usize;
                    let (client, _) = world.connected(shard, "{}");
                    let mut oracle = Oracle::default();
                    oracle.last.insert(CHANNEL.to_owned(), subscribe(&mut world, client));
                    live.push((client, oracle));
                }
                3 if !live.is_empty() => {
                    let pick = world.dice.below(live.len() as u64) as usize;
                    let window = world.dice.below(300) as usize;
                    world.open_window(live[pick].0, Some(window));
                }
                4 if live.len() > 3 => {
                    let pick = world.dice.below(live.len() as u64) as usize;
                    let (client, _) = live.swap_remove(pick);
                    world.open_window(client, None);
                    world.frame(client, 8, &[]);
                    world.run();
                }
                5 => {
                    top = lose_some(&mut world, top + 1);
                    world.cut_one_in = 2;
                    world.run();
                    world.cut_one_in = 0;
                }
                6 if !live.is_empty() => {
                    let pick = world.dice.below(live.len() as u64) as usize;
                    let (client, oracle) = &mut live[pick];
                    world.open_window(*client, None);
                    world.run();
                    oracle.look(&world.take_json(*client));
                    if !oracle.last.contains_key(CHANNEL) {
                        oracle.last.insert(CHANNEL.to_owned(), subscribe(&mut world, *client));
                    }
                }
                _ => {
                    top += 1;
                    publish(&mut world, CHANNEL, top, (step * 17) % 300);
                }
            }
        }
        for (client, oracle) in &mut live {
            world.open_window(*client, None);
            world.run();
            oracle.look(&world.take_json(*client));
            let last = oracle.last.get(CHANNEL).copied();
            assert!(last.is_none_or(|last| last == top), "seed {seed}: {last:?} of {top}");
            world.frame(*client, 8, &[]);
        }
        world.run();
        for core in &mut world.cores {
            for metric in [Metric::Lagging, Metric::Subscriptions, Metric::OwnBytes, Metric::LogBytes] {
                assert_eq!(core.metrics().get(metric), 0, "{metric:?} after all are gone, seed {seed}");
            }
        }
    }
}

/// Stalled readers whose sockets take bytes again while they are still to be told, with replays on their
/// way: what they are sent goes up to the hole, and then says so.
#[test]
fn stalled_readers_read_again_before_they_are_told() {
    for seed in 1..8 {
        println!("seed {seed}");
        let mut config = short_histories();
        let short = config.namespaces.get_mut("short").expect("it was put there");
        (short.history_size, short.log_bytes_max) = (10, 16 * 1024);
        let mut world = World::new(2, seed, &config);
        world.sends_max = 512;
        world.snapshot_one_in = seed % 2;
        let clients = subscribers(&mut world, 4 * GAP_TOLD_PER_TURN_MAX);
        for client in &clients {
            let window = world.dice.below(2_000) as usize;
            world.open_window(*client, Some(window));
        }
        for n in 1..=100 {
            publish(&mut world, CHANNEL, n, 300);
        }
        let top = lose_some(&mut world, 101);
        for _ in 0..40 {
            for _ in 0..20 {
                let pick = world.dice.below(clients.len() as u64) as usize;
                world.open_window(clients[pick], None);
            }
            let shard = world.dice.below(2) as usize;
            world.turn(shard);
        }
        for client in &clients {
            world.open_window(*client, None);
        }
        world.run();
        for client in clients {
            let values = world.take_json(client);
            let offsets: Vec<u64> =
                values.iter().filter_map(|v| v["push"]["pub"]["offset"].as_u64()).collect();
            assert!(offsets.iter().copied().eq(1..=offsets.len() as u64), "seed {seed}: {offsets:?}");
            assert!((offsets.len() as u64) < top && losses(&values) == 1, "seed {seed}: {offsets:?}");
            assert!(!world.has_partial(client));
        }
    }
}

/// A server-side subscription that is lost closes its connection, with all it holds, once.
#[test]
fn server_side_subscriptions_that_are_lost_close() {
    let mut config = short_histories();
    config.client.broadcast_channel = true;
    let short = NamespaceConfig { history_size: 2, ..NamespaceConfig::default() };
    config.namespaces.insert("broadcast".into(), short);
    let home = usize::from(ringmain::core::api::home_of("broadcast:global", 2));
    let mut world = World::new(2, 4, &config);
    let clients: Vec<usize> = (0..20).map(|_| world.connected(1 - home, "{}").0).collect();
    world.paused = Some(1 - home);
    for n in 1..=BEYOND_RELAY {
        publish(&mut world, "broadcast:global", n, LARGE_BYTES);
    }
    world.paused = None;
    world.run();
    for client in clients {
        assert_eq!(world.close_code(client), 3010);
    }
    assert_eq!(world.cores[1 - home].metrics().get(Metric::DropLost), 20);
}
