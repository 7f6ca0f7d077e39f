//! Order, cuts, slow readers and the mesh, under seeds.

use std::collections::HashMap;

use ringmain::core::api::{Answer, Call};
use ringmain::core::config::SlowConsumer;
use ringmain::core::engine::Engine;
use ringmain::core::metrics::Metric;
use serde_json::Value;

use crate::harness::World;
use crate::protocol::{config, open_namespace};

/// Follows what one subscriber of a channel is told.
#[derive(Default)]
pub(crate) struct Oracle {
    pub(crate) last: HashMap<String, u64>,
    pub(crate) delivered: u64,
    pub(crate) told: u64,
}

impl Oracle {
    pub(crate) fn look(&mut self, values: &[Value]) {
        self.look_at_offsets(values);
        let pubs = values.iter().map(|value| &value["push"]["pub"]);
        for push in pubs.filter(|push| !push["offset"].is_null()) {
            assert_eq!(push["data"]["n"], push["offset"], "the publication of that offset");
        }
    }

    /// The same, whatever the publications say.
    pub(crate) fn look_at_offsets(&mut self, values: &[Value]) {
        for value in values {
            let push = &value["push"];
            let Some(channel) = push["channel"].as_str() else { continue };
            if let Some(offset) = push["pub"]["offset"].as_u64() {
                let last = self.last.get(channel).copied().unwrap_or(0);
                assert_eq!(offset, last + 1, "{channel}: a gap, a double or another order");
                self.last.insert(channel.to_owned(), offset);
                self.delivered += 1;
            } else if push["unsubscribe"]["code"] == 2500 {
                self.told += 1;
                self.last.remove(channel);
            }
        }
    }
}

pub(crate) fn publish(world: &mut World, channel: &str, n: u64, size: usize) {
    let home = ringmain::core::api::home_of(channel, world.cores.len() as u16);
    let data = format!(r#"{{"n":{n},"pad":"{}"}}"#, "x".repeat(size));
    let call = Call::Publish {
        channel: channel.into(),
        data: data.into_bytes().into(),
        tags: Vec::new(),
        skip_history: false,
        idempotency_key: None,
    };
    let answer = world.call(usize::from(home), call);
    assert!(matches!(answer.result, Ok(Answer::Published { offset, .. }) if offset == n), "{answer:?}");
}

/// Many subscribers, every send may be cut at any byte, connections become bytes and come back: every subscriber gets every publication whole,
/// once and in order, and the cores forget everything afterwards.
#[test]
fn cuts_at_every_byte() {
    for seed in 1..60 {
        let mut world = World::new(1 + (seed % 4) as u16, seed, &config());
        world.snapshot_one_in = seed % 5;
        println!("seed {seed}");
        let shards = world.cores.len();
        let mut clients = Vec::new();
        for n in 0..12 {
            let (client, _) = world.connected(n % shards, "{}");
            for channel in ["room:a", "room:b"] {
                world.ask(client, "subscribe", &format!(r#"{{"channel":"{channel}"}}"#));
            }
            clients.push(client);
        }
        world.cut_one_in = 2;
        for n in 1..=30 {
            publish(&mut world, "room:a", n, (seed as usize * 7) % 300);
            publish(&mut world, "room:b", n, 10);
        }
        world.cut_one_in = 0;
        world.run();
        assert!(world.snapshots >= 50 || world.snapshot_one_in == 0, "{} snapshots", world.snapshots);
        for client in clients {
            let mut oracle = Oracle::default();
            oracle.look(&world.take_json(client));
            assert_eq!((oracle.delivered, oracle.told), (60, 0), "seed {seed}");
            assert!(!world.has_partial(client));
            world.frame(client, 8, &[]);
        }
        world.run();
        for core in &mut world.cores {
            for metric in [
                Metric::OwnBytes,
                Metric::LogBytes,
                Metric::Subscriptions,
                Metric::Sessions,
                Metric::Connections,
            ] {
                assert_eq!(core.metrics().get(metric), 0, "{metric:?} after all are gone, seed {seed}");
            }
        }
    }
}

/// Stopped readers under `replay`: a reader that stops costs no log, and has everything when it reads
/// again, as long as history reaches back; else it is told.
#[test]
fn stopped_readers_replay_or_are_told() {
    for (publications, told) in [(90, 0), (250, 1)] {
        for seed in 1..20 {
            let mut config = config();
            let namespace =
                ringmain::core::config::NamespaceConfig { log_bytes_max: 4096, ..open_namespace() };
            config.namespaces.insert("room".into(), namespace);
            let mut world = World::new(1 + (seed % 3) as u16, seed, &config);
            world.snapshot_one_in = seed % 4;
            let last = world.cores.len() - 1;
            let (stopped, _) = world.connected(last, "{}");
            let (reader, _) = world.connected(0, "{}");
            for client in [stopped, reader] {
                world.ask(client, "subscribe", r#"{"channel":"room:s"}"#);
            }
            let window = world.dice.below(700) as usize;
            world.open_window(stopped, Some(window));
            for n in 1..=publications {
                publish(&mut world, "room:s", n, 100);
            }
            let mut oracle = Oracle::default();
            oracle.look(&world.take_json(reader));
            assert_eq!(oracle.delivered, publications, "seed {seed}");
            let logs = world.cores[last].metrics().get(Metric::LogBytes);
            assert!(logs <= 8192, "{logs} bytes of log for one stopped reader");
            world.open_window(stopped, None);
            world.run();
            let mut oracle = Oracle::default();
            oracle.look(&world.take_json(stopped));
            assert_eq!(oracle.told, told, "seed {seed}, {} delivered", oracle.delivered);
            if told == 0 {
                assert_eq!(oracle.delivered, publications, "seed {seed}");
            }
            assert!(!world.has_partial(stopped));
        }
    }
}

#[test]
fn latest_skips_and_close_closes() {
    let policies = [SlowConsumer::Latest, SlowConsumer::Close];
    for (policy, seed) in (0..16).map(|seed| (policies[seed % 2], seed as u64)) {
        let mut config = config();
        let namespace = ringmain::core::config::NamespaceConfig {
            log_bytes_max: 4096,
            slow_consumer: policy,
            ..open_namespace()
        };
        config.namespaces.insert("room".into(), namespace);
        let mut world = World::new(2, seed, &config);
        world.snapshot_one_in = seed / 2;
        let (stopped, _) = world.connected(1, "{}");
        world.ask(stopped, "subscribe", r#"{"channel":"room:s"}"#);
        world.open_window(stopped, Some(500));
        for n in 1..=200 {
            publish(&mut world, "room:s", n, 100);
        }
        world.open_window(stopped, None);
        world.run();
        if policy == SlowConsumer::Close {
            assert_eq!(world.close_code(stopped), 3008);
            continue;
        }
        let values = world.take_json(stopped);
        let offsets: Vec<u64> = values.iter().filter_map(|v| v["push"]["pub"]["offset"].as_u64()).collect();
        assert!(offsets.len() < 20 && offsets.last() == Some(&200), "{offsets:?}");
        assert!(offsets.is_sorted());
    }
}

/// Connections that come and go, subscribe and unsubscribe in the middle of frames, on several shards
/// with a shard that pauses: nobody sees a gap, a double or a torn frame.
#[test]
fn churn_in_mid_frame() {
    for seed in 1..40 {
        println!("seed {seed}");
        let mut world = World::new(3, seed, &config());
        world.credits = 1;
        world.snapshot_one_in = seed % 4;
        let mut tops: HashMap<String, u64> = HashMap::new();
        let mut live: Vec<(usize, Oracle)> = Vec::new();
        world.cut_one_in = 3;
        for step in 0..300 {
            let channel = format!("room:{}", world.dice.below(3));
            match world.dice.below(10) {
                0 if live.len() < 8 => {
                    world.cut_one_in = 0;
                    let shard = world.dice.below(3) as usize;
                    world.paused = None;
                    let (client, _) = world.connected(shard, "{}");
                    world.cut_one_in = 3;
                    live.push((client, Oracle::default()));
                }
                1 | 2 if !live.is_empty() => {
                    let pick = world.dice.below(live.len() as u64) as usize;
                    let client = live[pick].0;
                    world.open_window(client, None);
                    world.paused = None;
                    world.run();
                    let values = world.take_json(client);
                    live[pick].1.look(&values);
                    let subscribed = live[pick].1.last.contains_key(&channel);
                    if subscribed {
                        world.send(client, "unsubscribe", &format!(r#"{{"channel":"{channel}"}}"#));
                        world.run();
                        let values = world.take_json(client);
                        live[pick].1.look(&values);
                        live[pick].1.last.remove(&channel);
                    } else {
                        let reply = world.ask(client, "subscribe", &format!(r#"{{"channel":"{channel}"}}"#));
                        let top = reply["offset"].as_u64().unwrap_or(0);
                        assert_eq!(top, tops.get(&channel).copied().unwrap_or(0), "seed {seed} step {step}");
                        live[pick].1.last.insert(channel, top);
                    }
                }
                3 if !live.is_empty() => {
                    let pick = world.dice.below(live.len() as u64) as usize;
                    let window = world.dice.below(400) as usize;
                    world.open_window(live[pick].0, Some(window));
                }
                4 if live.len() > 4 => {
                    let (client, _) = live.swap_remove(0);
                    world.open_window(client, None);
                    world.frame(client, 8, &[]);
                }
                5 => world.paused = Some(world.dice.below(3) as usize),
                6 => world.paused = None,
                _ => {
                    let home = ringmain::core::api::home_of(&channel, 3);
                    if world.paused == Some(usize::from(home)) {
                        world.paused = None;
                    }
                    let n = tops.entry(channel.clone()).or_default();
                    *n += 1;
                    let n = *n;
                    publish(&mut world, &channel, n, (step * 13) % 200);
                }
            }
        }
        world.paused = None;
        world.cut_one_in = 0;
        for (client, oracle) in &mut live {
            world.open_window(*client, None);
            world.run();
            let values = world.take_json(*client);
            oracle.look(&values);
            for (channel, last) in &oracle.last {
                assert_eq!(last, &tops.get(channel).copied().unwrap_or(0), "seed {seed} {channel}");
            }
        }
    }
}
