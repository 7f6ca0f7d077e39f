//! Publish, presence, history, framing, and what calls of the server do to the wire.

use ringmain::core::api::{Answer, Call, SubscribeOptions, UserSelector, home_of};
use ringmain::core::config::SlowConsumer;
use ringmain::core::engine::Engine;
use serde_json::{Value, json};

use crate::harness::World;
use crate::probe::*;

/// A command of an anonymous connection that is subscribed to room:a and plain:a, and what it gets.
#[track_caller]
fn check(command: &Value, expected: Result<Value, u16>) {
    let mut command = command.clone();
    command["id"] = json!(4);
    let prelude = |id: u32, channel: &str, reply: Value| {
        let command = json!({"id": id, "subscribe": {"channel": channel}});
        step(command.to_string(), json!({"id": id, "subscribe": reply}))
    };
    let last = match expected {
        Ok(reply) => step(command.to_string(), reply),
        Err(code) => closes(command.to_string(), code),
    };
    let room = json!({"recoverable": true, "positioned": true, "epoch": "*"});
    talk("{}", &[prelude(2, "room:a", room), prelude(3, "plain:a", json!({})), last]);
}

#[test]
fn publishing() {
    let long = format!("room:{}", "x".repeat(251));
    for (body, expected) in [
        (json!({"data": 1}), Err(3501)),
        (json!({"channel": "", "data": 1}), Err(3501)),
        (json!({"channel": "no:a"}), Ok(error(4, 102))),
        (json!({"channel": "room:ä", "data": 1}), Ok(error(4, 107))),
        (json!({"channel": long, "data": 1}), Ok(error(4, 107))),
        // What is missing is said before what is not allowed.
        (json!({"channel": "closed:a"}), Ok(error(4, 107))),
        (json!({"channel": "closed:a", "data": 1}), Ok(error(4, 103))),
        (json!({"channel": "room:a"}), Ok(error(4, 107))),
        (json!({"channel": "room:b", "data": 1}), Ok(error(4, 103))),
        (json!({"channel": "live:a", "data": 1}), Ok(error(4, 103))),
        // To a map, which room:a is not.
        (json!({"channel": "", "type": 1}), Err(3501)),
        (json!({"channel": "no:a", "type": 1}), Ok(error(4, 102))),
        (json!({"channel": "room:a", "type": 1}), Ok(error(4, 107))),
        (json!({"channel": "room:a", "type": 1, "data": 1}), Ok(error(4, 103))),
        (json!({"channel": "room:a", "type": 1, "removed": true}), Ok(error(4, 103))),
    ] {
        check(&json!({"publish": body}), expected);
    }
}

/// The reply to a publish, and the push that it causes, which may come in either order.
#[test]
fn a_publisher_hears_itself() {
    for shards in [1, 3] {
        for shard in 0..shards {
            let mut world = World::new(shards, 1, &probe_config());
            let (client, _) = world.connected(usize::from(shard), "{}");
            for channel in ["room:a", "live:a"] {
                world.ask(client, "subscribe", &json!({"channel": channel}).to_string());
            }
            for (n, data) in
                ["1.50", r#""\u00e9\/""#, "123456789012345678901234567890", "null", r#"{"a": [ ]}"#]
                    .iter()
                    .enumerate()
            {
                for channel in ["room:a", "live:a"] {
                    let body = format!(r#"{{"channel":"{channel}","data":{data}}}"#);
                    assert_eq!(world.ask(client, "publish", &body), json!({}));
                    let got = world.take_json(client);
                    assert_eq!(got.len(), 1, "{got:?}");
                    let push = &got[0]["push"]["pub"];
                    assert_eq!(push["data"], serde_json::from_str::<Value>(data).expect("JSON"));
                    let offset = if channel == "room:a" { json!(n + 1) } else { Value::Null };
                    assert_eq!(push["offset"], offset);
                    assert_eq!(
                        push["epoch"].is_string(),
                        channel == "room:a" && n == 0,
                        "the first tells it"
                    );
                }
            }
        }
    }
}

#[test]
fn presence() {
    let member = json!({"user": "", "client": "*"});
    for method in ["presence", "presence_stats"] {
        for (channel, expected) in [
            ("", Err(3501)),
            ("no:a", Ok(error(4, 102))),
            ("room:ä", Ok(error(4, 107))),
            ("closed:a", Ok(error(4, 108))),
            ("user:7", Ok(error(4, 108))),
            ("plain:a", Ok(error(4, 103))),
            ("room:b", Ok(error(4, 103))),
        ] {
            check(&json!({method: {"channel": channel}}), expected);
        }
    }
    check(&json!({"presence": {}}), Err(3501));
    let stats = json!({"id": 4, "presence_stats": {"num_clients": 1, "num_users": 1}});
    check(&json!({"presence_stats": {"channel": "room:a"}}), Ok(stats));
    let mut world = World::new(3, 1, &probe_config());
    let (client, reply) = world.connected(0, "{}");
    world.ask(client, "subscribe", r#"{"channel":"room:a"}"#);
    let got = world.ask(client, "presence", r#"{"channel":"room:a"}"#);
    let id = reply["connect"]["client"].as_str().expect("an id");
    assert_same(&[got], &[json!({"presence": {id: member}})], "presence");
    // Zeros are told.
    let mut config = probe_config();
    config.namespaces.get_mut("room").expect("room").allow_presence_for_client = true;
    let mut world = World::new(3, 1, &config);
    let (client, _) = world.connected(0, "{}");
    assert_eq!(world.ask(client, "presence", r#"{"channel":"room:a"}"#), json!({"presence": {}}));
    let stats = world.ask(client, "presence_stats", r#"{"channel":"room:a"}"#);
    assert_eq!(stats, json!({"num_clients": 0, "num_users": 0}));
}

#[test]
fn history_permissions() {
    for (body, expected) in [
        (json!({}), Err(3501)),
        (json!({"channel": "no:a"}), Ok(error(4, 102))),
        (json!({"channel": "room:ä"}), Ok(error(4, 107))),
        (json!({"channel": "live:a"}), Ok(error(4, 108))),
        (json!({"channel": "plain:a"}), Ok(error(4, 103))),
        (json!({"channel": "room:b"}), Ok(error(4, 103))),
        (json!({"channel": "plain:a", "reverse": true, "since": {}}), Ok(error(4, 103))),
        (json!({"channel": "room:a", "reverse": true, "since": {}}), Ok(error(4, 107))),
        (json!({"channel": "room:a", "since": {"epoch": "other"}}), Ok(error(4, 112))),
    ] {
        check(&json!({"history": body}), expected);
    }
    let empty = json!({"id": 4, "history": {"publications": [], "epoch": "*", "offset": 0}});
    for limit in [-1, 0, 1] {
        check(&json!({"history": {"channel": "room:a", "limit": limit}}), Ok(empty.clone()));
    }
}

/// The offsets of a page of room:a, which holds 3 to 5 of five publications.
#[track_caller]
fn check_page(world: &mut World, client: usize, more: &Value, expected: &[u64]) {
    let mut body = json!({"channel": "room:a"});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    let page = world.ask(client, "history", &body.to_string());
    assert_eq!(page["offset"], 5, "{more}: {page}");
    let page = page["publications"].as_array().expect("a page").iter();
    let got: Vec<u64> = page.map(|publication| publication["offset"].as_u64().expect("an offset")).collect();
    assert_eq!(got, expected, "{more}");
}

#[test]
fn history_pages() {
    let mut config = probe_config();
    config.namespaces.get_mut("room").expect("room").history_size = 3;
    config.client.history_publications_max = 2;
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &config);
        let (client, _) = world.connected(0, "{}");
        world.ask(client, "subscribe", r#"{"channel":"room:a"}"#);
        for n in 1..=5 {
            world.ask(client, "publish", &format!(r#"{{"channel":"room:a","data":{n}}}"#));
        }
        world.take_json(client);
        for (more, expected) in [
            (json!({}), &[] as &[u64]),
            (json!({"limit": 0}), &[]),
            (json!({"limit": 1}), &[3]),
            (json!({"limit": -1}), &[3, 4]),
            (json!({"limit": 9}), &[3, 4]),
            (json!({"limit": -1, "reverse": true}), &[5, 4]),
            (json!({"limit": 1, "reverse": true}), &[5]),
            (json!({"limit": -1, "since": {"offset": 4}}), &[5]),
            (json!({"limit": -1, "since": {"offset": 5}}), &[]),
            (json!({"limit": -1, "since": {"offset": 9}}), &[]),
            // What is left, where some is gone.
            (json!({"limit": -1, "since": {"offset": 1}}), &[3, 4]),
            (json!({"limit": -1, "since": {}}), &[3, 4]),
            (json!({"limit": -1, "since": {"offset": 5}, "reverse": true}), &[4, 3]),
            (json!({"limit": -1, "since": {"offset": 3}, "reverse": true}), &[]),
            (json!({"limit": -1, "since": {"offset": 4}, "reverse": true}), &[3]),
        ] {
            check_page(&mut world, client, &more, expected);
        }
        let call = Call::HistoryRemove { channel: "room:a".into() };
        world.call(usize::from(home_of("room:a", shards)), call).result.expect("removed");
        check_page(&mut world, client, &json!({"limit": -1}), &[]);
        world.ask(client, "publish", r#"{"channel":"room:a","data":6}"#);
        assert_eq!(world.take_json(client)[0]["push"]["pub"]["offset"], 6, "offsets go on");
    }
}

#[test]
fn the_other_commands() {
    check(&json!({"rpc": {"method": "m", "data": 1}}), Ok(error(4, 108)));
    check(&json!({"rpc": {}}), Ok(error(4, 108)));
    check(&json!({"send": {"data": 1}}), Err(3508));
    check(&json!({"ping": {}}), Err(3501));
    check(&json!({"connect": {}}), Err(3501));
    check(&json!({"unknown": {}}), Err(3501));
    check(&json!({"unsubscribe": {}}), Err(3501));
    check(&json!({"unsubscribe": {"channel": "no:a"}}), Ok(json!({"id": 4, "unsubscribe": {}})));
    check(&json!({"unsubscribe": {"channel": "room:a"}}), Ok(json!({"id": 4, "unsubscribe": {}})));
}

// --- framing ---

#[test]
fn what_came_before_a_breach_is_answered_first() {
    let subscribe = r#"{"id":2,"subscribe":{"channel":"room:a"}}"#;
    let publish = r#"{"id":3,"publish":{"channel":"room:a","data":1}}"#;
    let history = r#"{"id":4,"history":{"channel":"room:a"}}"#;
    let bad_token = r#"{"id":5,"sub_refresh":{"channel":"room:a","token":"x"}}"#;
    for (breach, code) in [
        ("nonsense", 3501),
        ("", 3501),
        ("{}", 3501),
        (r#"{"id":5,"ping":{}}"#, 3501),
        (r#"{"id":5,"connect":{}}"#, 3501),
        (r#"{"send":{}}"#, 3508),
        (r#"{"id":5,"refresh":{"token":"x"}}"#, 3500),
        (bad_token, 3500),
    ] {
        for shards in [1, 2, 3] {
            for shard in 0..shards {
                let mut world = World::new(shards, 1, &probe_config());
                let (client, _) = world.connected(usize::from(shard), "{}");
                let after = r#"{"id":6,"rpc":{}}"#;
                world.text(client, &format!("{subscribe}\n{publish}\n{history}\n{breach}\n{after}"));
                world.text(client, after);
                world.run();
                let got = world.take_json(client);
                let ids: Vec<u64> = got.iter().filter_map(|value| value["id"].as_u64()).collect();
                assert_eq!(ids, [2, 3, 4], "{breach} on {shards} shards: {got:?}");
                assert_eq!(world.close_code(client), code, "{breach} on {shards} shards");
            }
        }
    }
}

#[test]
fn a_batch_with_connect_and_a_breach() {
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &probe_config());
        let client = world.websocket(0);
        let connect = format!(r#"{{"id":1,"connect":{}}}"#, with_token(&json!({"sub": "7"})));
        world.text(client, &format!("{connect}\n{{\"id\":2,\"subscribe\":{{\"channel\":\"room:a\"}}}}\n\n"));
        world.run();
        let got = world.take_json(client);
        let ids: Vec<u64> = got.iter().filter_map(|value| value["id"].as_u64()).collect();
        assert_eq!(ids, [1, 2], "{got:?}");
        assert_eq!(world.close_code(client), 3501);
    }
}

#[test]
fn what_came_before_a_fin_is_answered_first() {
    for shards in [1, 3] {
        for shard in 0..usize::from(shards) {
            let mut world = World::new(shards, 1, &probe_config());
            let client = world.websocket(shard);
            let connect = format!(r#"{{"id":1,"connect":{}}}"#, with_token(&json!({"sub": "7"})));
            let subscribe =
                |id: u32, channel: &str| json!({"id": id, "subscribe": {"channel": channel}}).to_string();
            let batch = [connect, subscribe(2, "room:a"), subscribe(3, "room:b"), subscribe(4, "no:a")];
            world.text(client, &batch.join("\n"));
            let slot = world.clients[client].slot;
            world.cores[shard].input_ended(slot, world.now);
            world.run();
            let got = world.take_json(client);
            let mut ids: Vec<u64> = got.iter().filter_map(|value| value["id"].as_u64()).collect();
            ids.sort_unstable();
            assert_eq!(ids, [1, 2, 3, 4], "{got:?} on {shards} shards");
            assert!(world.clients[client].gone.is_some(), "then it ends");
        }
    }
}

#[test]
fn a_stalled_home_does_not_keep_a_breach_open() {
    let mut world = World::new(3, 1, &probe_config());
    let home = usize::from(home_of("room:a", 3));
    let (client, _) = world.connected((home + 1) % 3, "{}");
    world.paused = Some(home);
    world.text(client, "{\"id\":2,\"subscribe\":{\"channel\":\"room:a\"}}\nnonsense");
    world.run();
    assert!(world.clients[client].gone.is_none(), "an answer is owed");
    world.pass(900);
    assert!(world.clients[client].gone.is_none(), "an answer is owed");
    world.pass(200);
    assert_eq!(world.close_code(client), 3501, "a second is enough");
    world.paused = None;
    world.run();
}

#[test]
fn message_sizes_and_frames() {
    let publish = |len: usize| {
        let head = r#"{"id":3,"publish":{"channel":"room:a","data":""#;
        format!("{head}{}\"}}}}", "x".repeat(len - head.len() - 3))
    };
    for (len, code) in [(65_536, None), (65_537, Some(1009))] {
        let mut world = World::new(1, 1, &probe_config());
        let (client, _) = world.connected(0, "{}");
        world.ask(client, "subscribe", r#"{"channel":"room:a"}"#);
        let message = publish(len);
        assert_eq!(message.len(), len);
        world.text(client, &message);
        world.run();
        match code {
            Some(code) => assert_eq!(world.close_code(client), code),
            None => assert_eq!(world.take_json(client).len(), 2),
        }
    }
    // JSON in binary frames is taken, and answered in text.
    let mut world = World::new(1, 1, &probe_config());
    let (client, _) = world.connected(0, "{}");
    world.frame(client, 2, br#"{"id":2,"rpc":{}}"#);
    world.run();
    assert_same(&world.take_json(client), &[error(2, 108)], "a binary frame");
    world.frame(client, 2, b"\xff\xfe");
    world.run();
    assert_eq!(world.close_code(client), 3501);
}

// --- what the server does ---

fn user(user: &str) -> UserSelector {
    UserSelector { user: user.into(), ..UserSelector::default() }
}

/// Asks every shard, as the control plane does.
fn everywhere(world: &mut World, call: &Call) -> Vec<Result<Answer, u32>> {
    let shards = 0..world.cores.len();
    shards.map(|shard| world.call(shard, call.clone()).result.map_err(|error| error.code())).collect()
}

/// A connection of user 7 on every shard, and one of user 8.
fn users(shards: u16) -> (World, Vec<usize>, usize) {
    let mut world = World::new(shards, 1, &probe_config());
    let connect = with_token(&json!({"sub": "7"}));
    let sevens = (0..usize::from(shards)).map(|shard| world.connected(shard, &connect).0).collect();
    let (eight, _) = world.connected(0, &with_token(&json!({"sub": "8"})));
    (world, sevens, eight)
}

#[test]
fn the_server_subscribes() {
    for shards in [1, 3] {
        let (mut world, sevens, eight) = users(shards);
        let options = SubscribeOptions {
            info: Some(b"{\"i\":1}".to_vec()),
            data: Some(b"[1]".to_vec()),
            push_join_leave: Some(true),
            ..SubscribeOptions::default()
        };
        let call = Call::Subscribe { selector: user("7"), channel: "room:a".into(), options };
        assert!(everywhere(&mut world, &call).iter().all(Result::is_ok));
        let push = json!({"push": {"channel": "room:a", "subscribe": {
            "recoverable": true, "positioned": true, "epoch": "*", "data": [1]
        }}});
        for client in &sevens {
            let got = world.take_json(*client);
            assert_same(&got[..1], std::slice::from_ref(&push), "the subscription first");
            let joins =
                got[1..].iter().filter(|push| push["push"]["join"]["info"]["chan_info"] == json!({"i": 1}));
            assert_eq!(joins.count(), got.len() - 1, "then joins: {got:?}");
            assert!(got.len() > 1, "its own at least");
        }
        assert!(world.take_json(eight).is_empty());
        // Again changes nothing; a client cannot double it, but may leave.
        assert!(everywhere(&mut world, &call).iter().all(Result::is_ok));
        assert!(world.take_json(sevens[0]).is_empty());
        assert_eq!(world.ask(sevens[0], "subscribe", r#"{"channel":"room:a"}"#)["error"]["code"], 105);
        assert_eq!(world.ask(sevens[0], "unsubscribe", r#"{"channel":"room:a"}"#), json!({}));
        let unknown = Call::Subscribe {
            selector: user("7"),
            channel: "no:a".into(),
            options: SubscribeOptions::default(),
        };
        assert!(everywhere(&mut world, &unknown).iter().all(|answer| *answer.as_ref().unwrap_err() == 102));
    }
}

#[test]
fn the_server_subscribes_with_recovery() {
    for shards in [1, 3] {
        let (mut world, sevens, _) = users(shards);
        let (writer, _) = world.connected(0, "{}");
        world.ask(writer, "subscribe", r#"{"channel":"room:a"}"#);
        for n in 1..=2 {
            world.ask(writer, "publish", &format!(r#"{{"channel":"room:a","data":{n}}}"#));
        }
        let options =
            SubscribeOptions { recover_since: Some((1, String::new())), ..SubscribeOptions::default() };
        let call = Call::Subscribe { selector: user("7"), channel: "room:a".into(), options };
        assert!(everywhere(&mut world, &call).iter().all(Result::is_ok));
        for client in sevens {
            let got = world.take_json(client);
            assert_eq!(got[0]["push"]["subscribe"]["offset"], 1, "{got:?}");
            assert_eq!(got[1]["push"]["pub"]["offset"], 2, "{got:?}");
        }
    }
}

#[test]
fn the_server_unsubscribes() {
    let push = |channel: &str| json!({"push": {"channel": channel, "unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}});
    for shards in [1, 3] {
        let (mut world, sevens, eight) = users(shards);
        let client = sevens[0];
        for channel in ["room:a", "room:b"] {
            world.ask(client, "subscribe", &json!({"channel": channel}).to_string());
        }
        let call = |channel: &str| Call::Unsubscribe { selector: user("7"), channel: channel.into() };
        assert!(everywhere(&mut world, &call("room:a")).iter().all(Result::is_ok));
        for seven in &sevens {
            assert_same(&world.take_json(*seven), &[push("room:a")], "all are told");
        }
        assert_eq!(world.ask(client, "history", r#"{"channel":"room:a"}"#)["error"]["code"], 103);
        assert!(
            everywhere(&mut world, &call("no:a")).iter().all(|answer| *answer.as_ref().unwrap_err() == 102)
        );
        assert!(everywhere(&mut world, &call("")).iter().all(Result::is_ok));
        let all = json!({"push": {"unsubscribe": {"code": 2000, "reason": "server unsubscribe"}}});
        for seven in &sevens {
            assert_same(&world.take_json(*seven), std::slice::from_ref(&all), "one push for all of them");
        }
        assert_eq!(world.ask(client, "history", r#"{"channel":"room:b"}"#)["error"]["code"], 103);
        assert!(world.take_json(eight).is_empty());
    }
}

#[test]
fn a_subscription_on_its_way_can_be_revoked() {
    let mut world = World::new(3, 1, &probe_config());
    let home = usize::from(home_of("room:a", 3));
    let (client, _) = world.connected((home + 1) % 3, &with_token(&json!({"sub": "7"})));
    world.paused = Some(home);
    world.text(client, r#"{"id":2,"subscribe":{"channel":"room:a"}}"#);
    world.run();
    let call = Call::Unsubscribe { selector: user("7"), channel: "room:a".into() };
    world.call((home + 1) % 3, call).result.expect("done");
    world.paused = None;
    world.run();
    let got = world.take_json(client);
    assert_eq!((&got[0]["id"], &got[1]["push"]["unsubscribe"]["code"]), (&json!(2), &json!(2000)), "{got:?}");
    assert_eq!(world.ask(client, "history", r#"{"channel":"room:a"}"#)["error"]["code"], 103);
}

#[test]
fn the_server_refreshes() {
    let refresh = |expired, expire_at| Call::Refresh { selector: user("7"), expired, expire_at };
    for (call, push) in [
        (refresh(false, Some(now_s() + 60)), Some(json!({"expires": true, "ttl": 60}))),
        (refresh(false, None), Some(json!({}))),
        (refresh(false, Some(now_s())), None),
        (refresh(true, None), None),
    ] {
        let (mut world, sevens, eight) = users(3);
        assert!(everywhere(&mut world, &call).iter().all(Result::is_ok));
        for client in sevens {
            match &push {
                Some(push) => assert_same(
                    &world.take_json(client),
                    &[json!({"push": {"refresh": push}})],
                    "a refresh push",
                ),
                None => assert_eq!(world.close_code(client), 3005),
            }
        }
        assert!(world.clients[eight].gone.is_none() && world.take_json(eight).is_empty());
    }
}

#[test]
fn the_server_disconnects() {
    let (mut world, sevens, eight) = users(3);
    let call = Call::Disconnect { selector: user("7"), code: 4321, reason: "go".into() };
    assert!(everywhere(&mut world, &call).iter().all(Result::is_ok));
    for client in sevens {
        assert!(world.take_json(client).is_empty(), "the close frame says it all");
        assert_eq!(world.close_code(client), 4321);
    }
    assert!(world.clients[eight].gone.is_none());
}

/// Whoever was subscribed by the server cannot subscribe again by itself: it is sent to begin anew.
#[test]
fn a_server_side_subscription_that_is_lost_or_expires_closes() {
    let (mut world, sevens, _) = users(1);
    let options = SubscribeOptions { expire_at: Some(now_s() + 2), ..SubscribeOptions::default() };
    let call = Call::Subscribe { selector: user("7"), channel: "room:a".into(), options };
    everywhere(&mut world, &call);
    let client = sevens[0];
    for _ in 0..280 {
        world.pass(100);
        let pings = world.take_json(client).iter().filter(|value| **value == json!({})).count();
        (0..pings).for_each(|_| world.text(client, "{}"));
    }
    assert_eq!(world.close_code(client), 3006);

    let mut config = probe_config();
    config.namespaces.get_mut("room").expect("room").history_size = 2;
    config.namespaces.get_mut("room").expect("room").slow_consumer = SlowConsumer::Replay;
    config.namespaces.get_mut("room").expect("room").log_bytes_max = 16_384;
    let mut world = World::new(1, 1, &config);
    let (client, _) = world.connected(0, &with_token(&json!({"sub": "7", "channels": ["room:a"]})));
    let (writer, _) = world.connected(0, "{}");
    world.ask(writer, "subscribe", r#"{"channel":"room:a"}"#);
    world.open_window(client, Some(100));
    for n in 0..40 {
        let data = format!("{n}{}", "x".repeat(2_000));
        world.ask(writer, "publish", &json!({"channel": "room:a", "data": data}).to_string());
        world.take_json(writer);
    }
    world.open_window(client, None);
    world.run();
    world.take_json(client);
    assert_eq!(world.close_code(client), 3010);
}

#[test]
fn the_broadcast_channel_may_be_taken_over_and_left() {
    let mut config = probe_config();
    config.client.broadcast_channel = true;
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &config);
        let (client, reply) = world.connected(0, "{}");
        let fresh = json!({"recoverable": true, "positioned": true, "epoch": "*"});
        assert_same(&[reply["connect"]["subs"].clone()], &[json!({"broadcast:global": fresh})], "in connect");
        // A refusal leaves it as it is.
        let refused = world.ask(client, "subscribe", r#"{"channel":"broadcast:global","tf":{}}"#);
        assert_eq!(refused["error"]["code"], 107);
        let home = usize::from(home_of("broadcast:global", shards));
        let publish = |world: &mut World| {
            let call = Call::Publish {
                channel: "broadcast:global".into(),
                data: b"1".as_slice().into(),
                tags: Vec::new(),
                skip_history: false,
                idempotency_key: None,
            };
            world.call(home, call).result.expect("published");
        };
        publish(&mut world);
        assert_eq!(world.take_json(client).len(), 1);
        let taken = world.ask(client, "subscribe", r#"{"channel":"broadcast:global"}"#);
        assert_eq!(taken["offset"], 1, "{taken}");
        assert_eq!(world.ask(client, "subscribe", r#"{"channel":"broadcast:global"}"#)["error"]["code"], 105);
        publish(&mut world);
        assert_eq!(world.take_json(client).len(), 1, "once, not twice");
        world.ask(client, "unsubscribe", r#"{"channel":"broadcast:global"}"#);
        publish(&mut world);
        assert!(world.take_json(client).is_empty());
    }
}

/// Random commands of several connections in random batches, while shards stand still and go on: each
/// is answered once, and subscribing and leaving come out as if one had been done after the other.
#[test]
fn every_command_is_answered_once_and_as_if_in_order() {
    for seed in 1..120 {
        println!("seed {seed}");
        let shards = 1 + (seed % 4) as u16;
        let mut world = World::new(shards, seed, &probe_config());
        world.snapshot_one_in = seed % 3;
        let clients: Vec<usize> = (0..3).map(|n| world.connected(n % usize::from(shards), "{}").0).collect();
        let mut subscribed = [[false; 3]; 3];
        let mut expected: Vec<Vec<(u64, Option<u64>)>> = vec![Vec::new(); 3];
        let mut id = 1;
        for _ in 0..60 {
            match world.dice.below(6) {
                0 => world.paused = Some(world.dice.below(u64::from(shards)) as usize),
                1 => world.paused = None,
                2 => world.run(),
                _ => {
                    let n = world.dice.below(3) as usize;
                    let mut batch = Vec::new();
                    for _ in 0..=world.dice.below(4) {
                        id += 1;
                        let channel = world.dice.below(3) as usize;
                        let body = json!({"channel": format!("room:{channel}"), "data": 1, "limit": 1});
                        let (method, error) = match (world.dice.below(6), &mut subscribed[n][channel]) {
                            (0 | 1, held) if *held => ("subscribe", Some(105)),
                            (0 | 1, held) => {
                                *held = true;
                                ("subscribe", None)
                            }
                            (2 | 3, held) => {
                                *held = false;
                                ("unsubscribe", None)
                            }
                            (4, held) => ("publish", (!*held).then_some(103)),
                            (_, held) => ("history", (!*held).then_some(103)),
                        };
                        expected[n].push((id, error));
                        batch.push(json!({"id": id, method: body}).to_string());
                    }
                    world.text(clients[n], &batch.join("\n"));
                }
            }
        }
        world.paused = None;
        world.run();
        for (client, expected) in clients.iter().zip(&expected) {
            let replies = world.take_json(*client).into_iter().filter(|value| value.get("id").is_some());
            let mut got: Vec<(u64, Option<u64>)> = replies
                .map(|reply| (reply["id"].as_u64().expect("an id"), reply["error"]["code"].as_u64()))
                .collect();
            got.sort_unstable();
            assert_eq!(got, *expected, "seed {seed}");
        }
    }
}
