//! What waits for other shards is bounded, and what does not fit has a policy.

use ringmain::core::api::home_of;
use ringmain::core::config::CoreConfig;
use ringmain::core::engine::Engine;
use ringmain::core::metrics::Metric;
use serde_json::{Value, json};

use crate::fanout::{Oracle, publish};
use crate::harness::World;
use crate::protocol::config;

/// The first channel of a namespace that is homed on this shard.
fn channel_at(namespace: &str, home: u16, shards: u16) -> String {
    let mut names = (0..).map(|n| format!("{namespace}:{n}"));
    names.find(|name| home_of(name, shards) == home).expect("one of so many")
}

fn with_pool(bytes: u64) -> CoreConfig {
    let mut config = config();
    config.client.personal_channel = false;
    config.limits.mesh_pool_bytes = bytes;
    config
}

fn figure(world: &mut World, shard: usize, metric: Metric) -> u64 {
    world.cores[shard].metrics().get(metric)
}

fn body(channel: &str) -> String {
    json!({"channel": channel}).to_string()
}

/// A client that is subscribed to a channel.
fn subscriber(world: &mut World, shard: usize, channel: &str) -> usize {
    let (client, _) = world.connected(shard, "{}");
    let subscribe = json!({"channel": channel, "join_leave": true}).to_string();
    assert!(world.ask(client, "subscribe", &subscribe).get("error").is_none());
    world.run();
    world.take_json(client);
    client
}

fn send_publish(world: &mut World, client: usize, channel: &str, bytes: usize) {
    world.send(client, "publish", &json!({"channel": channel, "data": "x".repeat(bytes)}).to_string());
    world.run();
}

fn errors(values: &[Value]) -> Vec<u64> {
    values.iter().filter_map(|value| value["error"]["code"].as_u64()).collect()
}

fn pushes<'a>(values: &'a [Value], kind: &str) -> Vec<&'a Value> {
    values.iter().map(|value| &value["push"][kind]).filter(|push| !push.is_null()).collect()
}

/// Bytes of a publish of this size that waits for another shard.
fn publish_bytes(size: usize) -> u64 {
    let channel = channel_at("room", 1, 3);
    let mut world = World::new(3, 1, &with_pool(1 << 30));
    let client = subscriber(&mut world, 0, &channel);
    world.credits = 0;
    send_publish(&mut world, client, &channel, size);
    figure(&mut world, 0, Metric::MeshBytes)
}

/// Publishes wait for a shard that takes nothing up to what they leave free, to the byte; then they are
/// refused, and others go on. Once it takes them, all are answered.
#[test]
fn publishes_wait_up_to_the_maximum() {
    let each = publish_bytes(1_000);
    assert!(each > 1_000 && each < 2_000, "{each} bytes");
    for (pool, fits) in [(9 * each, 5), (9 * each - 1, 4)] {
        let (stalled, other) = (channel_at("room", 1, 3), channel_at("room", 2, 3));
        let mut world = World::new(3, 1, &with_pool(pool));
        let client = subscriber(&mut world, 0, &stalled);
        world.ask(client, "subscribe", &body(&other));
        world.run();
        assert_eq!(figure(&mut world, 0, Metric::MeshBytes), 0);
        world.take_json(client);
        world.credits = 0;
        for n in 1..=fits {
            send_publish(&mut world, client, &stalled, 1_000);
            assert_eq!(figure(&mut world, 0, Metric::MeshBytes), n * each);
        }
        assert_eq!(errors(&world.take_json(client)), [0; 0], "{fits} fit");
        send_publish(&mut world, client, &stalled, 1_000);
        assert_eq!(errors(&world.take_json(client)), [111]);
        assert_eq!(figure(&mut world, 0, Metric::DropPublishRefused), 1);
        assert_eq!(figure(&mut world, 0, Metric::MeshBytes), fits * each);
        send_publish(&mut world, client, &other, 1_000);
        assert_eq!(errors(&world.take_json(client)), [0; 0], "there is room for another shard");
        world.credits = 2;
        world.run();
        assert_eq!(figure(&mut world, 0, Metric::MeshBytes), 0);
        let answered = world.take_json(client);
        let acks = answered.iter().filter(|value| value.get("publish").is_some()).count() as u64;
        assert_eq!((acks, errors(&answered)), (fits + 1, vec![]));
    }
}

/// What is on its way still counts, until the other shard has handled it.
#[test]
fn what_is_on_its_way_counts() {
    let each = publish_bytes(1_000);
    let channel = channel_at("room", 1, 3);
    let mut world = World::new(3, 1, &with_pool(3 * each - 1));
    let client = subscriber(&mut world, 0, &channel);
    world.paused = Some(1);
    for (sent, refused) in [(1, 0), (2, 0), (2, 1)] {
        send_publish(&mut world, client, &channel, 1_000);
        assert_eq!(figure(&mut world, 0, Metric::MeshPending), 0, "it left");
        assert_eq!(figure(&mut world, 0, Metric::MeshBytes), sent * each);
        assert_eq!(figure(&mut world, 0, Metric::DropPublishRefused), refused);
    }
    world.paused = None;
    world.run();
    assert_eq!(figure(&mut world, 0, Metric::MeshBytes), 0);
}

/// The count of messages has its maximum too: joins beyond it are dropped, and told to nobody.
#[test]
fn joins_wait_up_to_the_maximum() {
    let channel = channel_at("room", 0, 2);
    let mut config = with_pool(1 << 30);
    config.limits.mesh_pending_max = 16;
    let mut world = World::new(2, 1, &config);
    let listener = subscriber(&mut world, 1, &channel);
    world.credits = 0;
    for (joins, dropped) in [(16, 0), (1, 1)] {
        for _ in 0..joins {
            subscriber(&mut world, 0, &channel);
        }
        assert_eq!(figure(&mut world, 0, Metric::DropJoinLeave), dropped);
    }
    world.credits = 2;
    world.run();
    assert_eq!(pushes(&world.take_json(listener), "join").len(), 16);
}

/// A subscription is refused where the way to its home is full, and leaves nothing behind. Who leaves then
/// leaves presence, and the others are not told.
#[test]
fn subscriptions_are_refused_and_leaves_are_not() {
    let each = publish_bytes(1_000);
    let channel = channel_at("room", 1, 3);
    let mut world = World::new(3, 1, &with_pool(3 * each));
    let listener = subscriber(&mut world, 1, &channel);
    let client = subscriber(&mut world, 0, &channel);
    let (late, _) = world.connected(0, "{}");
    world.credits = 0;
    for _ in 0..3 {
        send_publish(&mut world, client, &channel, 1_000);
    }
    assert_eq!(errors(&world.take_json(client)), [111]);
    let subscriptions = figure(&mut world, 0, Metric::Subscriptions);
    let reply = world.ask(late, "subscribe", &body(&channel));
    assert_eq!(reply["error"]["code"], 111);
    assert_eq!(figure(&mut world, 0, Metric::Subscriptions), subscriptions);
    assert_eq!(world.ask(late, "presence", &body(&channel))["error"]["code"], 103);
    world.ask(client, "unsubscribe", &body(&channel));
    assert_eq!(figure(&mut world, 0, Metric::DropJoinLeave), 1);
    world.credits = 2;
    world.run();
    let values = world.take_json(listener);
    assert_eq!((pushes(&values, "pub").len(), pushes(&values, "leave").len()), (2, 0));
    let reply = world.ask(listener, "presence", &body(&channel));
    assert_eq!(reply["presence"].as_object().map(|members| members.len()), Some(1), "{reply}");
    assert!(world.ask(late, "subscribe", &body(&channel)).get("error").is_none());
    assert_eq!(figure(&mut world, 0, Metric::MeshBytes), 0);
}

/// Pages of history wait for a shard that takes nothing up to the maximum; those that never fit are refused
/// for good.
#[test]
fn answers_wait_up_to_the_maximum() {
    let channel = channel_at("room", 1, 2);
    let pool = 300_000;
    let mut world = World::new(2, 1, &with_pool(pool));
    let client = subscriber(&mut world, 0, &channel);
    for n in 1..=10 {
        publish(&mut world, &channel, n, 15_000);
    }
    world.take_json(client);
    let page = |limit: u32| json!({"channel": channel, "limit": limit}).to_string();
    let reply = world.ask(client, "history", &page(9));
    assert_eq!(reply["publications"].as_array().map(Vec::len), Some(9));
    assert_eq!(world.ask(client, "history", &page(10))["error"]["code"], 106, "more than half of the pool");
    let ids: Vec<u32> = (0..20).map(|_| world.send(client, "history", &page(3))).collect();
    world.turn(0);
    world.paused = Some(0);
    world.run();
    let waiting = figure(&mut world, 1, Metric::MeshBytes);
    assert!(waiting > pool / 3 && waiting <= pool, "{waiting} of {pool} bytes");
    world.paused = None;
    world.run();
    let replies = world.take_json(client);
    let mut answered: Vec<u32> =
        replies.iter().filter_map(|reply| Some(reply["id"].as_u64()? as u32)).collect();
    answered.sort_unstable();
    assert_eq!(answered, ids, "each is answered once");
    let refused = errors(&replies);
    assert!(!refused.is_empty() && refused.len() < ids.len(), "{} refused", refused.len());
    assert!(refused.iter().all(|code| *code == 111), "{refused:?}");
    assert_eq!(figure(&mut world, 1, Metric::MeshBytes), 0);
}

/// Who missed more than can travel to its shard is not recovered.
#[test]
fn recoveries_that_never_fit_are_not_recovered() {
    for (publications, recovered) in [(9, true), (10, false)] {
        let channel = channel_at("room", 1, 2);
        let mut world = World::new(2, 1, &with_pool(300_000));
        let (client, _) = world.connected(0, "{}");
        let epoch = world.ask(client, "subscribe", &body(&channel))["epoch"].clone();
        world.ask(client, "unsubscribe", &body(&channel));
        for n in 1..=publications {
            publish(&mut world, &channel, n, 15_000);
        }
        let recover = json!({"channel": channel, "recover": true, "epoch": epoch});
        let reply = world.ask(client, "subscribe", &recover.to_string());
        assert_eq!(reply.get("recovered").is_some(), recovered, "{publications}");
        assert_eq!(
            reply["publications"].as_array().map_or(0, Vec::len) as u64,
            if recovered { 9 } else { 0 }
        );
    }
}

/// Relays of many channels stay within the pool while a shard takes nothing. The other shard has
/// everything, also where there is no history; the stalled one gets from history what that has, and is told of
/// the rest.
#[test]
fn relays_of_many_channels_stay_within_the_pool() {
    let pool = 400_000;
    for namespace in ["room", "live"] {
        let names = (0..).map(|n| format!("{namespace}:{n}")).filter(|name| home_of(name, 3) == 0);
        // The last of them are quiet until the relays are full.
        let names: Vec<String> = names.take(18).collect();
        let (busy, quiet) = names.split_at(12);
        let mut world = World::new(3, 1, &with_pool(pool));
        let (stalled, _) = world.connected(1, "{}");
        let (lively, _) = world.connected(2, "{}");
        for name in &names {
            for client in [stalled, lively] {
                assert!(world.ask(client, "subscribe", &body(name)).get("error").is_none());
            }
        }
        world.run();
        for client in [stalled, lively] {
            world.take_json(client);
        }
        world.paused = Some(1);
        let mut most = 0;
        for _ in 1..=15 {
            for name in busy {
                world.publish_unanswered(0, name, 7_000);
                most = most.max(figure(&mut world, 0, Metric::MeshBytes));
                world.run();
            }
        }
        for name in quiet {
            world.publish_unanswered(0, name, 7_000);
            most = most.max(figure(&mut world, 0, Metric::MeshBytes));
        }
        world.run();
        let published = 15 * busy.len() + quiet.len();
        assert!(most > pool / 2 && most <= pool, "{most} of {pool} bytes");
        let values = world.take_json(lively);
        assert_eq!(pushes(&values, "pub").len(), published, "{namespace}");
        assert_eq!(pushes(&values, "unsubscribe").len(), 0);
        world.paused = None;
        world.run();
        let values = world.take_json(stalled);
        let (delivered, told) = (pushes(&values, "pub").len(), pushes(&values, "unsubscribe").len());
        if namespace == "room" {
            assert_eq!((delivered, told), (published, 0));
            let mut oracle = Oracle::default();
            oracle.look_at_offsets(&values);
        } else {
            assert!(told > 0 && delivered < published, "{delivered} delivered, {told} told");
        }
        assert_eq!(figure(&mut world, 0, Metric::MeshBytes), 0, "nothing is left behind");
    }
}

/// A shard that comes back to a long history is served from it message by message, without a hole.
#[test]
fn a_long_history_travels_in_pieces() {
    let channel = channel_at("long", 0, 2);
    let mut config = with_pool(1 << 30);
    let long =
        ringmain::core::config::NamespaceConfig { history_size: 3_000, ..config.namespaces["room"].clone() };
    config.namespaces.insert("long".into(), long);
    let mut world = World::new(2, 1, &config);
    let client = subscriber(&mut world, 1, &channel);
    world.paused = Some(1);
    for n in 1..=2_500 {
        publish(&mut world, &channel, n, 1_000);
    }
    world.paused = None;
    world.run();
    let mut oracle = Oracle::default();
    oracle.look(&world.take_json(client));
    assert_eq!((oracle.delivered, oracle.told), (2_500, 0));
    assert_eq!(figure(&mut world, 0, Metric::MeshBytes), 0);
}
