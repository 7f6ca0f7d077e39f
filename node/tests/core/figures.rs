//! What is counted: gauges go back to where they were, and every drop has its reason.

use ringmain::core::config::{NamespaceConfig, SlowConsumer};
use ringmain::core::engine::Engine;
use ringmain::core::metrics::Metric;

use crate::fanout::publish;
use crate::harness::World;
use crate::protocol::{config, open_namespace};

const CHANNEL: &str = "room:figures";

fn subscribe(world: &mut World, client: usize) {
    let body = format!(r#"{{"channel":"{CHANNEL}","join_leave":true}}"#);
    assert!(world.ask(client, "subscribe", &body).get("epoch").is_some());
}

fn figure(world: &mut World, shard: usize, metric: Metric) -> u64 {
    world.cores[shard].metrics().get(metric)
}

/// However a cursor of one's own ends, it is counted no longer.
#[test]
fn lagging_subscriptions_are_counted_while_they_lag() {
    type End = fn(&mut World, usize);
    let ends: [(&str, End); 4] = [
        ("reads", |world, client| world.open_window(client, None)),
        ("leaves", |world, client| {
            world.send(client, "unsubscribe", &format!(r#"{{"channel":"{CHANNEL}"}}"#));
        }),
        ("closes", |world, client| world.frame(client, 8, &[])),
        ("breaks", |world, client| {
            let slot = world.clients[client].slot;
            let now = world.now;
            world.cores[0].broken(slot, 104, now);
        }),
    ];
    for (name, end) in ends {
        let mut world = World::new(1, 1, &config());
        let (stopped, _) = world.connected(0, "{}");
        subscribe(&mut world, stopped);
        assert_eq!(figure(&mut world, 0, Metric::Lagging), 0);
        world.open_window(stopped, Some(10));
        publish(&mut world, CHANNEL, 1, 100);
        assert_eq!(figure(&mut world, 0, Metric::Lagging), 1, "{name}");
        end(&mut world, stopped);
        world.run();
        assert_eq!(figure(&mut world, 0, Metric::Lagging), 0, "{name}");
    }
}

/// A reader that falls behind the log and goes on from history, or from the newest, misses the joins in
/// between: that is counted, and only that.
#[test]
fn joins_that_a_slow_reader_misses_are_counted() {
    for policy in [SlowConsumer::Replay, SlowConsumer::Latest] {
        for (joins, publications, missed) in [(0, 60, 0), (3, 10, 0), (3, 60, 1)] {
            let mut config = config();
            let namespace =
                NamespaceConfig { log_bytes_max: 4096, slow_consumer: policy, ..open_namespace() };
            config.namespaces.insert("room".into(), namespace);
            let mut world = World::new(1, 1, &config);
            let (stopped, _) = world.connected(0, "{}");
            subscribe(&mut world, stopped);
            world.run();
            world.take_json(stopped);
            world.open_window(stopped, Some(10));
            for n in 1..=publications {
                publish(&mut world, CHANNEL, n, 100);
                if n <= joins {
                    let (client, _) = world.connected(0, "{}");
                    subscribe(&mut world, client);
                }
            }
            world.open_window(stopped, None);
            world.run();
            let values = world.take_json(stopped);
            let seen = values.iter().filter(|value| value["push"].get("join").is_some()).count() as u64;
            let dropped = figure(&mut world, 0, Metric::DropJoinLeave);
            assert_eq!(dropped, missed, "{policy:?}, {joins} joins, {publications} publications");
            assert_eq!(seen < joins, missed > 0, "{policy:?}: {seen} of {joins} joins seen");
        }
    }
}

/// What waits for a shard is shown while it waits, whether or not a batch could be sent.
#[test]
fn messages_that_wait_for_a_shard_are_shown() {
    let channel = (0..).map(|n| format!("room:{n}"));
    let channel = channel.into_iter().find(|name| ringmain::core::api::home_of(name, 2) == 1);
    let channel = channel.expect("half of the names");
    let mut world = World::new(2, 1, &config());
    let (asker, _) = world.connected(0, "{}");
    world.ask(asker, "subscribe", &format!(r#"{{"channel":"{channel}"}}"#));
    world.paused = Some(1);
    for n in 1..=6 {
        world.send(asker, "presence", &format!(r#"{{"channel":"{channel}"}}"#));
        world.run();
        let in_inbox = world.credits as u64;
        assert_eq!(figure(&mut world, 0, Metric::MeshPending), u64::saturating_sub(n, in_inbox));
    }
    world.paused = None;
    world.run();
    assert_eq!(figure(&mut world, 0, Metric::MeshPending), 0);
}
