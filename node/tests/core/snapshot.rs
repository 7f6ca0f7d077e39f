//! Connections that become bytes and connections again: nothing is lost, doubled, told or forgotten.

use ringmain::core::config::{CoreConfig, NamespaceConfig, SlowConsumer};
use ringmain::core::engine::Engine;
use ringmain::core::metrics::Metric;
use ringmain::core::{ImportError, NotNow, SNAPSHOT_VERSION};
use serde_json::{Value, json};

use crate::fanout::{Oracle, publish};
use crate::harness::{START_UNIX_MS, World};
use crate::protocol::{config, open_namespace, token};

const START_S: u64 = START_UNIX_MS / 1000;

fn subscribe(world: &mut World, client: usize, channel: &str) -> Value {
    let reply = world.ask(client, "subscribe", &format!(r#"{{"channel":"{channel}"}}"#));
    assert!(reply.get("error").is_none(), "{reply}");
    reply
}

fn with_policy(policy: SlowConsumer) -> CoreConfig {
    let mut config = config();
    let room = NamespaceConfig { log_bytes_max: 4096, slow_consumer: policy, ..open_namespace() };
    config.namespaces.insert("room".into(), room);
    config
}

fn offsets(values: &[Value]) -> Vec<u64> {
    values.iter().filter_map(|value| value["push"]["pub"]["offset"].as_u64()).collect()
}

/// What is held when nobody is connected any more.
fn assert_nothing_is_left(world: &mut World) {
    for core in &mut world.cores {
        for metric in [
            Metric::OwnBytes,
            Metric::LogBytes,
            Metric::Subscriptions,
            Metric::Sessions,
            Metric::Connections,
            Metric::Lagging,
            Metric::PartialBytes,
            Metric::InfoBytes,
        ] {
            assert_eq!(core.metrics().get(metric), 0, "{metric:?} after all are gone");
        }
    }
}

/// The socket is full after every byte of what two channels send, and the connection becomes bytes there.
#[test]
fn in_mid_frame_at_every_byte() {
    for window in 0..700 {
        let mut world = World::new(2, 7, &config());
        let (client, _) = world.connected(1, "{}");
        for channel in ["room:a", "room:b", "live:c"] {
            subscribe(&mut world, client, channel);
        }
        world.take_json(client);
        world.open_window(client, Some(window));
        for n in 1..=3 {
            publish(&mut world, "room:a", n, 60);
            publish(&mut world, "room:b", n, 10);
            world.publish_unanswered(1, "live:c", 20);
            world.run();
            assert_eq!(world.renew(client), Ok(()), "window {window}");
        }
        world.renew(client).expect("again");
        world.open_window(client, None);
        world.run();
        let values = world.take_json(client);
        let mut oracle = Oracle::default();
        oracle.look(&values);
        assert_eq!((oracle.delivered, oracle.told), (6, 0), "window {window}");
        let live = values.iter().filter(|value| value["push"]["channel"] == "live:c").count();
        assert_eq!(live, 3, "window {window}: {values:?}");
        assert!(!world.has_partial(client));
        world.frame(client, 8, &[]);
        world.run();
        assert_nothing_is_left(&mut world);
    }
}

/// A client's frames arrive byte by byte, and after every byte the connection becomes bytes.
#[test]
fn in_mid_message_at_every_byte() {
    let mut world = World::new(1, 1, &config());
    let (client, _) = world.connected(0, "{}");
    subscribe(&mut world, client, "room:a");
    world.take_json(client);
    let payload = br#"{"id":9,"publish":{"channel":"room:a","data":"gr\u00fc\u00df"}}"#;
    let (first, second) = payload.split_at(20);
    let mut bytes = Vec::new();
    for (opcode, part) in [(0x01, first), (0x89, &b"ping"[..]), (0x80, second)] {
        bytes.extend([opcode, 0x80 | part.len() as u8, 9, 8, 7, 6]);
        bytes.extend(part.iter().enumerate().map(|(at, byte)| byte ^ [9, 8, 7, 6][at % 4]));
    }
    for byte in bytes {
        world.bytes(client, &[byte]);
        world.renew(client).expect("a partial message is data");
    }
    world.run();
    let frames = world.take_frames(client);
    assert_eq!(frames[0], (10, b"ping".to_vec()));
    let texts: Vec<Value> =
        frames[1..].iter().map(|(_, text)| serde_json::from_slice(text).expect("JSON")).collect();
    assert_eq!(texts[0], json!({"id": 9, "publish": {}}));
    assert_eq!(texts[1]["push"]["pub"]["data"], "gr\u{fc}\u{df}");
    assert_eq!(texts.len(), 2);
    world.frame(client, 8, &[]);
    world.run();
    assert_nothing_is_left(&mut world);
}

/// A reader that is far behind, renewed again and again, under each policy.
#[test]
fn laggards_keep_what_their_policy_gives_them() {
    for policy in [SlowConsumer::Replay, SlowConsumer::Latest, SlowConsumer::Close] {
        for (publications, seed) in [(20, 1), (90, 2), (250, 3)] {
            let mut world = World::new(2, seed, &with_policy(policy));
            let (stopped, _) = world.connected(1, "{}");
            subscribe(&mut world, stopped, "room:s");
            world.open_window(stopped, Some(500));
            for n in 1..=publications {
                publish(&mut world, "room:s", n, 100);
                let fallen_to_be_closed = policy == SlowConsumer::Close && n > 20;
                match world.renew(stopped) {
                    Err(NotNow::Ending) if fallen_to_be_closed => {}
                    result => assert_eq!(result, Ok(()), "{policy:?} {n}"),
                }
            }
            let logs = world.cores[1].metrics().get(Metric::LogBytes);
            assert!(logs <= 8192, "{logs} bytes of log for one stopped reader");
            world.open_window(stopped, None);
            world.run();
            if policy == SlowConsumer::Close && publications > 20 {
                assert_eq!(world.close_code(stopped), 3008);
                continue;
            }
            let values = world.take_json(stopped);
            match policy {
                SlowConsumer::Latest if publications > 20 => {
                    let offsets = offsets(&values);
                    assert!(offsets.is_sorted() && offsets.len() < 30, "{offsets:?}");
                    assert_eq!(offsets.last(), Some(&publications));
                }
                _ => {
                    let mut oracle = Oracle::default();
                    oracle.look(&values);
                    let told = u64::from(publications > 100);
                    assert_eq!(oracle.told, told, "{policy:?} {publications}");
                    if told == 0 {
                        assert_eq!(oracle.delivered, publications, "{policy:?}");
                    }
                }
            }
        }
    }
}

/// What is published while a connection is bytes: it goes on from the log, from history in several steps,
/// or is told.
#[test]
fn what_came_meanwhile_follows_or_is_told() {
    for policy in [SlowConsumer::Replay, SlowConsumer::Latest, SlowConsumer::Close] {
        for others in [0, 1] {
            for (meanwhile, whole) in [(0, true), (1, true), (90, true), (200, false)] {
                let mut world = World::new(2, 5, &with_policy(policy));
                let (client, _) = world.connected(1, "{}");
                subscribe(&mut world, client, "room:s");
                for _ in 0..others {
                    let (other, _) = world.connected(1, "{}");
                    subscribe(&mut world, other, "room:s");
                }
                publish(&mut world, "room:s", 1, 100);
                world.take_json(client);
                let slot = world.clients[client].slot;
                let bytes = world.cores[1].export_connection(slot, world.now).expect("it is idle");
                for n in 2..2 + meanwhile {
                    publish(&mut world, "room:s", n, 100);
                }
                world.cores[1].import_connection(slot, &bytes, world.now).expect("it comes back");
                publish(&mut world, "room:s", 2 + meanwhile, 100);
                let values = world.take_json(client);
                let offsets = offsets(&values);
                let told = values.iter().any(|value| value["push"]["unsubscribe"]["code"] == 2500);
                let context = format!("{policy:?}, {meanwhile} meanwhile, {others} others: {offsets:?}");
                if policy == SlowConsumer::Latest && meanwhile > 0 {
                    assert!(
                        !told && offsets.is_sorted() && offsets.last() == Some(&(2 + meanwhile)),
                        "{context}"
                    );
                } else if whole {
                    assert!(!told && (2..=2 + meanwhile).eq(offsets.iter().copied()), "{context}");
                } else {
                    assert!(told && offsets.is_empty(), "{context}");
                }
            }
        }
    }
}

/// A replay of more publications than one step gives, into a log that knows nothing of them.
#[test]
fn a_replay_goes_on_over_several_steps() {
    let mut config = config();
    config.namespaces.get_mut("room").expect("it is there").history_size = 1000;
    let mut world = World::new(2, 5, &config);
    let (client, _) = world.connected(1, "{}");
    subscribe(&mut world, client, "room:s");
    let slot = world.clients[client].slot;
    let bytes = world.cores[1].export_connection(slot, world.now).expect("it is idle");
    for n in 1..=700 {
        publish(&mut world, "room:s", n, 10);
    }
    world.cores[1].import_connection(slot, &bytes, world.now).expect("it comes back");
    world.run();
    assert!((1..=700).eq(offsets(&world.take_json(client))));
}

/// Positions tell nothing where nothing is kept: who missed something is told, who did not is not.
#[test]
fn ephemeral_channels_tell_what_was_missed() {
    for meanwhile in [0, 1] {
        let mut world = World::new(1, 5, &config());
        let (client, _) = world.connected(0, "{}");
        subscribe(&mut world, client, "live:s");
        let slot = world.clients[client].slot;
        let bytes = world.cores[0].export_connection(slot, world.now).expect("it is idle");
        for _ in 0..meanwhile {
            world.publish_unanswered(0, "live:s", 10);
            world.run();
        }
        world.cores[0].import_connection(slot, &bytes, world.now).expect("it comes back");
        world.publish_unanswered(0, "live:s", 10);
        world.run();
        let values = world.take_json(client);
        assert_eq!(values.len(), 1, "{values:?}");
        let told = values[0]["push"]["unsubscribe"]["code"] == 2500;
        assert_eq!(told, meanwhile > 0, "{values:?}");
    }
}

/// Nobody sees that somebody became bytes: not in presence, not by joins and leaves, not by numbers.
#[test]
fn presence_and_timers_go_on() {
    let mut config = config();
    config.client.ping_interval_ms = 10_000;
    config.client.pong_timeout_ms = 3_000;
    let mut world = World::new(2, 3, &config);
    let claims = json!({"sub": "u", "exp": START_S + 60, "info": {"name": "U"}});
    let (client, _) = world.connected(1, &format!(r#"{{"token":"{}"}}"#, token(&claims)));
    let (watcher, _) = world.connected(0, "{}");
    for who in [client, watcher] {
        subscribe(&mut world, who, "room:p");
    }
    world.take_json(watcher);
    let before = world.ask(watcher, "presence", r#"{"channel":"room:p"}"#);
    assert_eq!(before["presence"].as_object().map(serde_json::Map::len), Some(2));
    world.take_json(client);
    for _ in 0..3 {
        world.renew(client).expect("it is idle");
        world.run();
    }
    assert_eq!(world.ask(watcher, "presence", r#"{"channel":"room:p"}"#), before);
    assert!(world.take_json(watcher).is_empty(), "no join, no leave");
    // Its pings come in time, whatever happens between.
    let mut pings = 0;
    for _ in 0..80 {
        world.pass(250);
        world.renew(client).expect("it is idle");
        if !world.take_json(client).is_empty() {
            pings += 1;
            world.text(client, "{}");
            world.renew(client).expect("it is idle");
        }
        world.text(watcher, "{}");
    }
    assert_eq!(pings, 2, "in 20 seconds");
    // And so does the end of one that does not answer.
    for _ in 0..80 {
        world.pass(250);
        let _ = world.renew(client);
    }
    assert_eq!(world.close_code(client), 3012);
}

#[test]
fn expiry_goes_on() {
    let mut world = World::new(1, 3, &config());
    let claims = json!({"sub": "u", "exp": START_S + 5});
    let (client, _) = world.connected(0, &format!(r#"{{"token":"{}"}}"#, token(&claims)));
    let sub = json!({"sub": "u", "channel": "room:x", "exp": START_S + 2, "info": {"role": "R"}});
    let body = format!(r#"{{"channel":"room:x","token":"{}"}}"#, token(&sub));
    let reply = world.ask(client, "subscribe", &body);
    assert_eq!(reply["expires"], true, "{reply}");
    world.take_json(client);
    let mut ended = false;
    for _ in 0..200 {
        world.pass(250);
        let _ = world.renew(client);
        let done = world.clients[client].gone.is_some();
        if done {
            break;
        }
        let values = world.take_json(client);
        ended |= values.iter().any(|value| value["push"]["unsubscribe"]["code"].is_u64());
        if values.iter().any(|value| *value == json!({})) {
            world.text(client, "{}");
        }
    }
    assert!(ended, "the subscription expired");
    assert_eq!(world.close_code(client), 3005);
}

#[test]
fn not_now() {
    let mut world = World::new(2, 1, &config());
    let export = |world: &mut World, client: usize| {
        let slot = world.clients[client].slot;
        let now = world.now;
        world.cores[1].export_connection(slot, now)
    };
    assert_eq!(world.cores[1].export_connection(77, world.now), Err(NotNow::NotConnected), "no such slot");
    let client = world.open(1);
    assert_eq!(export(&mut world, client), Err(NotNow::NotConnected), "no handshake");
    world.upgrade(client, "/connection/websocket");
    assert_eq!(export(&mut world, client), Err(NotNow::NotConnected), "no connect command");
    world.send(client, "connect", "{}");
    world.run();
    world.take_json(client);
    // Of two channels one is homed on the other shard, which has not answered yet.
    let away = (0..).map(|n| format!("room:{n}")).find(|name| ringmain::core::api::home_of(name, 2) == 0);
    let away = away.expect("hashes differ");
    world.send(client, "subscribe", &format!(r#"{{"channel":"{away}"}}"#));
    assert_eq!(export(&mut world, client), Err(NotNow::Pending), "a subscription on its way");
    world.run();
    world.send(client, "publish", &format!(r#"{{"channel":"{away}","data":1}}"#));
    assert_eq!(export(&mut world, client), Err(NotNow::Pending), "a publish on its way");
    world.run();
    let values = world.take_json(client);
    assert!(values.iter().any(|value| value["publish"].is_object()), "and it changed nothing: {values:?}");
    world.open_window(client, Some(0));
    world.frame(client, 8, &[]);
    world.run();
    assert_eq!(export(&mut world, client), Err(NotNow::NotConnected), "closing");
}

/// A world with a connection that is bytes, and those bytes: everything that can be is in them.
fn absent() -> (World, usize, Vec<u8>) {
    let mut world = World::new(1, 1, &config());
    let claims = json!({"sub": "u", "exp": START_S + 5, "info": {"name": "U"}});
    let (client, _) = world.connected(0, &format!(r#"{{"token":"{}"}}"#, token(&claims)));
    for channel in ["room:a", "live:b"] {
        subscribe(&mut world, client, channel);
    }
    world.take_json(client);
    world.open_window(client, Some(5));
    publish(&mut world, "room:a", 1, 20);
    world.bytes(client, &[0x01, 0x83, 0, 0, 0, 0, b'a', b'b', b'c', 0x80, 0x85, 1, 2, 3, 4, 0x60]);
    let slot = world.clients[client].slot;
    let bytes = world.cores[0].export_connection(slot, world.now).expect("it is idle");
    (world, client, bytes)
}

#[test]
fn bytes_from_anywhere_are_refused() {
    let (mut world, client, bytes) = absent();
    let (slot, now) = (world.clients[client].slot, world.now);
    let import = |world: &mut World, bytes: &[u8]| world.cores[0].import_connection(slot, bytes, now);
    for len in 0..bytes.len() {
        assert_eq!(import(&mut world, &bytes[..len]), Err(ImportError::Malformed), "cut at {len}");
    }
    let mut other = bytes.clone();
    other[..2].copy_from_slice(&(SNAPSHOT_VERSION + 1).to_le_bytes());
    assert_eq!(import(&mut world, &other), Err(ImportError::Version(SNAPSHOT_VERSION + 1)));
    assert_eq!(world.cores[0].connections(), 0, "nothing has changed");
    assert_eq!(import(&mut world, &bytes), Ok(()), "and the good ones are still good");
    assert_eq!(import(&mut world, &bytes), Err(ImportError::SlotTaken));
    let free = slot + 1000;
    assert_eq!(world.cores[0].import_connection(free, &bytes, now), Err(ImportError::Unknown), "once");
    world.open_window(client, None);
    world.run();
    let mut oracle = Oracle::default();
    oracle.look(&world.take_json(client));
    assert_eq!(oracle.delivered, 1);
}

/// Every byte changed in every bit: refused, or a connection that lives and dies as others do.
#[test]
fn changed_bytes_never_panic() {
    let (_, _, bytes) = absent();
    let (mut refused, mut taken) = (0, 0);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let (mut world, client, bytes) = absent();
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            let (slot, now) = (world.clients[client].slot, world.now);
            let core = &mut world.cores[0];
            match core.import_connection(slot, &changed, now) {
                Err(_) => {
                    refused += 1;
                    core.import_connection(slot, &bytes, now).expect("the good ones are still good");
                }
                Ok(()) => taken += 1,
            }
            core.writable(slot, now);
            core.broken(slot, 104, now);
            core.settle(now);
            core.released(slot);
            assert_eq!(core.metrics().get(Metric::Subscriptions), 0, "byte {at}, bit {bit}");
            assert_eq!(core.metrics().get(Metric::InfoBytes), 0, "byte {at}, bit {bit}");
        }
    }
    assert!(refused > 0 && taken > 0, "{refused} refused, {taken} taken");
}
