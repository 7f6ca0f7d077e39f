//! Subscriptions asked for by clients: the order of the checks, tokens, options, recovery, leaving.

use ringmain::core::api::{Call, home_of};
use serde_json::{Value, json};

use crate::harness::World;
use crate::probe::*;
use crate::protocol::token;

fn subscribe(id: u32, body: &Value) -> String {
    json!({"id": id, "subscribe": body}).to_string()
}

/// What a subscribe command with this body gets, on a connection of user 7.
#[track_caller]
fn check(body: &Value, expected: &Value) {
    let frame = subscribe(2, body);
    talk(&with_token(&json!({"sub": "7"})), &[step(frame, reply(expected))]);
}

/// The same for a connection without a user.
#[track_caller]
fn check_anonymous(body: &Value, expected: &Value) {
    talk("{}", &[step(subscribe(2, body), reply(expected))]);
}

#[track_caller]
fn check_close(body: &Value, code: u16) {
    talk(&with_token(&json!({"sub": "7"})), &[closes(subscribe(2, body), code)]);
}

/// An error's code, or the fields of a reply.
fn reply(expected: &Value) -> Value {
    match expected.as_u64() {
        Some(code) => error(2, code as u32),
        None => json!({"id": 2, "subscribe": expected}),
    }
}

/// A reply to a subscription of a fresh positioned channel.
fn fresh() -> Value {
    json!({"recoverable": true, "positioned": true, "epoch": "*"})
}

#[test]
fn the_order_of_the_checks() {
    let long = format!("room:{}", "x".repeat(251));
    check_close(&json!({}), 3501);
    check_close(&json!({"channel": ""}), 3501);
    check_close(&json!({"channel": "no:a", "delta": "other"}), 3501);
    check_close(&json!({"channel": long, "delta": "other"}), 3501);
    check(&json!({"channel": long}), &json!(107));
    check(&json!({"channel": format!("no{long}")}), &json!(107));
    check(&json!({"channel": "no:a", "token": "x", "tf": {}}), &json!(102));
    check(&json!({"channel": "no:ä"}), &json!(102));
    check(&json!({"channel": "room:ä"}), &json!(107));
    check(&json!({"channel": "closed:a"}), &json!(103));
    check(&json!({"channel": "closed:a", "tf": {"op": "eq"}}), &json!(103));
    check(&json!({"channel": "plain"}), &json!(103));
    check(&json!({"channel": ":a"}), &json!(103));
    check(&json!({"channel": "user:8"}), &json!(103));
    check(&json!({"channel": "user:7"}), &json!(105));
    check(&json!({"channel": "room:a", "token": "x", "tf": {}}), &json!(103));
    check(&json!({"channel": "room:a", "tf": {"op": "eq", "key": "k", "val": "v"}}), &json!(107));
    check(&json!({"channel": "room:a", "tf": {}}), &json!(107));
    check(&json!({"channel": "room:a", "tf": null}), &fresh());
    check(&json!({"channel": &long[..255]}), &fresh());
}

#[test]
fn who_may() {
    check(&json!({"channel": "users:a"}), &fresh());
    check_anonymous(&json!({"channel": "users:a"}), &json!(103));
    check_anonymous(&json!({"channel": "room:a"}), &fresh());
    check_anonymous(&json!({"channel": "user:"}), &json!(103));
    check(&json!({"channel": "$room:a"}), &json!(103));
    check(&json!({"channel": "$no:a"}), &json!(102));
    let grant = token(&json!({"sub": "7", "channel": "$room:a"}));
    check(&json!({"channel": "$room:a", "token": grant}), &fresh());
}

#[test]
fn kinds_of_subscriptions() {
    for (kind, expected) in [(0, fresh()), (-1, fresh()), (4, json!(108)), (5, json!(107))] {
        check(&json!({"channel": "room:a", "type": kind}), &expected);
    }
    for kind in 1..=3 {
        check(&json!({"channel": "room:a", "type": kind}), &json!(103));
        check(&json!({"channel": "room:a", "type": kind, "delta": "other"}), &json!(103));
        check(&json!({"channel": "no:a", "type": kind}), &json!(102));
        check(&json!({"channel": "user:7", "type": kind}), &json!(105));
    }
    check(&json!({"channel": "no:a", "type": 4}), &json!(108));
    check_close(&json!({"channel": "", "type": 4}), 3501);
}

#[test]
fn subscription_tokens() {
    let with = |claims: &Value| json!({"channel": "closed:a", "token": token(claims)});
    let good = |more: Value| {
        let mut claims = json!({"sub": "7", "channel": "closed:a"});
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        with(&claims)
    };
    let mut expiring = fresh();
    (expiring["expires"], expiring["ttl"]) = (json!(true), json!(60));
    check(&good(json!({})), &fresh());
    check(&good(json!({"exp": now_s() + 60})), &expiring);
    check(&good(json!({"exp": now_s() + 10, "expire_at": now_s() + 60})), &expiring);
    check(&good(json!({"exp": now_s() + 60, "expire_at": 0})), &fresh());
    check(&good(json!({"exp": now_s()})), &json!(109));
    check(&good(json!({"nbf": now_s() + 1})), &json!(109));
    check(&good(json!({"expire_at": now_s() - 1})), &json!(110));
    check(&good(json!({"channel": ""})), &json!(103));
    check(&good(json!({"channel": 5})), &json!(103));
    check(&good(json!({"channel": "no:a"})), &json!(102));
    check(&json!({"channel": "closed:a", "token": "a.b.c"}), &json!(103));
    // Valid, but for another channel, user or client.
    check_close(&good(json!({"channel": "closed:b"})), 3500);
    check_close(&good(json!({"sub": "8"})), 3500);
    check_close(&with(&json!({"channel": "closed:a"})), 3500);
    check_close(&good(json!({"client": "somebody"})), 3500);
    let anonymous = with(&json!({"channel": "closed:a"}));
    check_anonymous(&anonymous, &fresh());
    let data = json!({"recoverable": true, "positioned": true, "epoch": "*", "data": [1]});
    check(&good(json!({"data": [1]})), &data);
    let on = json!({"override": {"force_recovery": {"value": false}}});
    check(&good(on), &json!({}));
}

#[test]
fn a_token_may_name_its_client() {
    let mut world = World::new(3, 1, &probe_config());
    let (client, reply) = world.connected(0, &with_token(&json!({"sub": "7"})));
    let id = reply["connect"]["client"].clone();
    let claims = json!({"sub": "7", "client": id, "channel": "closed:a", "info": {"c": 1}});
    let body = json!({"channel": "closed:a", "token": token(&claims)});
    assert!(world.ask(client, "subscribe", &body.to_string())["epoch"].is_string());
    // A client alone does not make up for the user.
    let claims = json!({"client": id, "channel": "closed:b"});
    world.text(client, &subscribe(3, &json!({"channel": "closed:b", "token": token(&claims)})));
    world.run();
    assert_eq!(world.close_code(client), 3500);
}

#[test]
fn what_is_asked_for_and_what_is_given() {
    let positioned = json!({"positioned": true, "epoch": "*"});
    check(&json!({"channel": "asked:a"}), &json!({}));
    check(&json!({"channel": "asked:a", "positioned": true}), &positioned);
    check(&json!({"channel": "asked:a", "recoverable": true}), &fresh());
    check(&json!({"channel": "plain:a", "recoverable": true, "positioned": true}), &json!({}));
    check(&json!({"channel": "live:a", "recoverable": true, "positioned": true}), &json!({}));
    check(&json!({"channel": "room:a", "delta": "fossil"}), &fresh());
    check(&json!({"channel": "room:a", "flag": 1, "data": {"a": 1}, "unknown": []}), &fresh());
}

#[test]
fn joins_and_leaves_go_to_those_who_may_see_presence() {
    let join =
        |channel: &str| json!({"push": {"channel": channel, "join": {"info": {"user": "7", "client": "*"}}}});
    let connect = with_token(&json!({"sub": "7"}));
    let body = |channel: &str, asked: bool| subscribe(2, &json!({"channel": channel, "join_leave": asked}));
    for (channel, asked, told, reply) in [
        ("room:a", false, false, fresh()),
        ("room:a", true, true, fresh()),
        ("loud:a", false, true, fresh()),
        ("plain:a", true, false, json!({})),
    ] {
        let mut expected = vec![json!({"id": 2, "subscribe": reply})];
        expected.extend(told.then(|| join(channel)));
        talk(&connect, &[(body(channel, asked), expected, None)]);
    }
}

/// A world in which `channel` holds publications 1 to 3, and its epoch.
fn published(shards: u16, channel: &str) -> (World, String) {
    let mut world = World::new(shards, 1, &probe_config());
    let (client, _) = world.connected(0, "{}");
    let reply = world.ask(client, "subscribe", &json!({"channel": channel, "positioned": true}).to_string());
    for n in 1..=3 {
        world.ask(client, "publish", &json!({"channel": channel, "data": n}).to_string());
    }
    (world, reply["epoch"].as_str().unwrap_or_default().to_owned())
}

/// What recovering from a position of a channel with publications 1 to 3 brings, on every shard.
#[track_caller]
fn check_recovery(channel: &str, offset: u64, epoch: &str, more: &Value, expected: &Value) {
    for shards in [1, 3] {
        for shard in 0..shards {
            let (mut world, real) = published(shards, channel);
            let (client, _) = world.connected(usize::from(shard), "{}");
            let epoch = if epoch == "*" { &real } else { epoch };
            let mut body = json!({"channel": channel, "recover": true, "offset": offset, "epoch": epoch});
            body.as_object_mut().expect("an object").extend(more.as_object().expect("one").clone());
            let got = world.ask(client, "subscribe", &body.to_string());
            assert_same(&[got], std::slice::from_ref(expected), &format!("{body} on {shards} shards"));
        }
    }
}

fn publications(offsets: &[u64]) -> Value {
    let one = |offset: &u64| {
        let mut one = json!({"data": offset, "offset": offset, "info": {"user": "", "client": "*"}});
        if *offset == 1 {
            one["epoch"] = json!("*");
        }
        one
    };
    offsets.iter().map(one).collect()
}

#[test]
fn recovery() {
    let none = json!({});
    let base = json!({"recoverable": true, "positioned": true, "epoch": "*", "was_recovering": true});
    let with = |more: Value| {
        let mut all = base.clone();
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        all
    };
    for epoch in ["*", ""] {
        let some = json!({"offset": 1, "recovered": true, "publications": publications(&[2, 3])});
        check_recovery("room:a", 1, epoch, &none, &with(some));
        check_recovery("room:a", 3, epoch, &none, &with(json!({"offset": 3, "recovered": true})));
        let all = json!({"recovered": true, "publications": publications(&[1, 2, 3])});
        check_recovery("room:a", 0, epoch, &none, &with(all));
        check_recovery("room:a", 4, epoch, &none, &with(json!({"offset": 3})));
        check_recovery(
            "room:a",
            4,
            epoch,
            &json!({"flag": 2}),
            &json!({"error": error(2, 112)["error"], "id": 2}),
        );
    }
    check_recovery("room:a", 1, "other", &none, &with(json!({"offset": 3})));
    check_recovery("room:a", 1, "other", &json!({"flag": 2}), &error(2, 112));
    let good = json!({"offset": 3, "recovered": true});
    check_recovery("room:a", 3, "*", &json!({"flag": 2}), &with(good));
    // Where it is not recoverable, it only says that it was asked.
    let asked = json!({"was_recovering": true});
    for more in [json!({}), json!({"flag": 2})] {
        check_recovery("plain:a", 1, "other", &more, &asked);
        check_recovery("live:a", 1, "other", &more, &asked);
        let positioned = json!({"positioned": true, "epoch": "*", "offset": 3, "was_recovering": true});
        let mut more = more;
        more["positioned"] = json!(true);
        check_recovery("asked:a", 1, "other", &more, &positioned);
    }
}

#[test]
fn recovery_of_the_cached_publication() {
    let base = |more: Value| {
        let mut all = json!({"recoverable": true, "positioned": true, "epoch": "*", "was_recovering": true});
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        all
    };
    for flag in [0, 2] {
        let more = json!({"flag": flag});
        for (offset, epoch) in [(1, "*"), (1, ""), (1, "other"), (9, "*"), (3, ""), (3, "other")] {
            let expected =
                base(json!({"recovered": true, "offset": offset, "publications": publications(&[3])}));
            check_recovery("cache:a", offset, epoch, &more, &expected);
        }
        let expected = base(json!({"recovered": true, "publications": publications(&[3])}));
        check_recovery("cache:a", 0, "", &more, &expected);
        check_recovery("cache:a", 3, "*", &more, &base(json!({"recovered": true, "offset": 3})));
    }
    for (offset, recovered) in [(3, true), (2, false)] {
        let (mut world, epoch) = published(1, "cache:a");
        let call = Call::HistoryRemove { channel: "cache:a".into() };
        world.call(usize::from(home_of("cache:a", 1)), call).result.expect("removed");
        let (client, _) = world.connected(0, "{}");
        let body = json!({"channel": "cache:a", "recover": true, "offset": offset, "epoch": epoch});
        let got = world.ask(client, "subscribe", &body.to_string());
        let mut expected = base(json!({"offset": 3}));
        if recovered {
            expected["recovered"] = json!(true);
        }
        assert_same(&[got], &[expected], "nothing is kept");
    }
}

#[test]
fn too_much_missed_is_not_recovered() {
    let mut config = probe_config();
    config.client.recovery_publications_max = 2;
    let mut world = World::new(1, 1, &config);
    let (client, _) = world.connected(0, "{}");
    world.ask(client, "subscribe", r#"{"channel":"room:a"}"#);
    for n in 1..=3 {
        world.ask(client, "publish", &format!(r#"{{"channel":"room:a","data":{n}}}"#));
    }
    let (client, _) = world.connected(0, "{}");
    let three = world.ask(client, "subscribe", r#"{"channel":"room:a","recover":true}"#);
    assert_eq!((three.get("recovered"), &three["offset"]), (None, &json!(3)), "{three}");
    assert_eq!(three.get("publications"), None, "never a part");
    world.ask(client, "unsubscribe", r#"{"channel":"room:a"}"#);
    let two = world.ask(client, "subscribe", r#"{"channel":"room:a","recover":true,"offset":1}"#);
    assert_eq!((&two["recovered"], &two["offset"]), (&json!(true), &json!(1)), "{two}");
}

#[test]
fn leaving_and_coming_back_in_one_batch() {
    let connect = with_token(&json!({"sub": "7"}));
    let unsubscribe = |id: u32| json!({"id": id, "unsubscribe": {"channel": "room:a"}}).to_string();
    let on = |id: u32| subscribe(id, &json!({"channel": "room:a", "flag": 0}));
    let good = |id: u32| json!({"id": id, "subscribe": fresh()});
    let gone = |id: u32| json!({"id": id, "unsubscribe": {}});
    let batch = |commands: &[String]| commands.join("\n");
    talk(&connect, &[(batch(&[on(2), unsubscribe(3)]), vec![good(2), gone(3)], None), step(on(4), good(4))]);
    talk(
        &connect,
        &[
            (batch(&[on(2), unsubscribe(3), on(4)]), vec![good(2), gone(3), good(4)], None),
            step(on(5), error(5, 105)),
        ],
    );
    for shards in [1, 3] {
        for shard in 0..shards {
            let mut world = World::new(shards, 1, &probe_config());
            let (client, _) = world.connected(usize::from(shard), &connect);
            world.text(
                client,
                &batch(&[on(2), unsubscribe(3), unsubscribe(4), on(5), on(6), unsubscribe(7), on(8)]),
            );
            world.run();
            let mut got = world.take_json(client);
            // What is wrong at once may be said at once; the rest keeps its order.
            let duplicate = got.iter().position(|reply| reply["id"] == 6).expect("an answer to 6");
            assert_same(&[got.remove(duplicate)], &[error(6, 105)], "a duplicate");
            assert_same(&got, &[good(2), gone(3), gone(4), good(5), gone(7), good(8)], "the batch");
            let presence = world.ask(client, "presence", r#"{"channel":"room:a"}"#);
            assert_eq!(presence["presence"].as_object().expect("members").len(), 1);
            world.ask(client, "unsubscribe", r#"{"channel":"room:a"}"#);
            let call = Call::PresenceStats { channel: "room:a".into() };
            let answer = world.call(usize::from(home_of("room:a", shards)), call);
            assert!(format!("{answer:?}").contains("num_clients: 0"), "{answer:?}");
        }
    }
}

// --- expiry and sub_refresh ---

/// A connection of user 7 with a subscription to `closed:a` that expires in 5 s.
fn expiring(shards: u16) -> (World, usize) {
    let mut world = World::new(shards, 1, &probe_config());
    let (client, _) = world.connected(usize::from(shards) - 1, &with_token(&json!({"sub": "7"})));
    let claims = json!({"sub": "7", "channel": "closed:a", "exp": now_s() + 5});
    let body = json!({"channel": "closed:a", "token": token(&claims)});
    let reply = world.ask(client, "subscribe", &body.to_string());
    assert_eq!((&reply["expires"], &reply["ttl"]), (&json!(true), &json!(5)));
    (world, client)
}

/// What a sub_refresh gets, with these claims.
#[track_caller]
fn check_sub_refresh(claims: &Value, expected: &Result<Value, u16>) {
    let mut all = json!({"sub": "7", "channel": "closed:a"});
    all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
    for shards in [1, 3] {
        let (mut world, client) = expiring(shards);
        let frame =
            json!({"id": 9, "sub_refresh": {"channel": "closed:a", "token": token(&all)}}).to_string();
        match expected {
            Ok(reply) => play(&mut world, client, &[step(frame, reply.clone())]),
            Err(code) => play(&mut world, client, &[closes(frame, *code)]),
        }
    }
}

#[test]
fn sub_refreshes() {
    let good = |result: Value| Ok(json!({"id": 9, "sub_refresh": result}));
    check_sub_refresh(&json!({"exp": now_s() + 60}), &good(json!({"expires": true, "ttl": 60})));
    check_sub_refresh(&json!({}), &good(json!({})));
    check_sub_refresh(&json!({"exp": now_s()}), &good(json!({})));
    check_sub_refresh(&json!({"expire_at": now_s() - 1}), &Ok(error(9, 110)));
    check_sub_refresh(&json!({"channel": "closed:b"}), &Err(3500));
    check_sub_refresh(&json!({"sub": "8"}), &Err(3500));
    check_sub_refresh(&json!({"client": "x"}), &Err(3500));
    check_sub_refresh(&json!({"channel": ""}), &Err(3500));
    for (body, expected) in [
        (json!({"channel": "closed:a", "token": ""}), Ok(error(9, 107))),
        (json!({"channel": "closed:a", "token": "x"}), Err(3500)),
        (json!({"channel": "", "token": "x"}), Err(3501)),
        (json!({"channel": "closed:b", "token": ""}), Ok(error(9, 103))),
        // The server refreshes what it subscribed itself.
        (json!({"channel": "user:7", "token": "x"}), Err(3501)),
    ] {
        let (mut world, client) = expiring(3);
        let frame = json!({"id": 9, "sub_refresh": body}).to_string();
        match expected {
            Ok(reply) => play(&mut world, client, &[step(frame, reply)]),
            Err(code) => play(&mut world, client, &[closes(frame, code)]),
        }
    }
}

/// Lets time pass and answers pings. What else came.
fn wait(world: &mut World, client: usize, ms: u64) -> Vec<Value> {
    let mut got = Vec::new();
    for _ in 0..ms / 100 {
        world.pass(100);
        for value in world.take_json(client) {
            if value == json!({}) {
                world.text(client, "{}");
            } else {
                got.push(value);
            }
        }
    }
    got
}

#[test]
fn an_expired_subscription_is_ended_and_the_connection_stays() {
    let (mut world, client) = expiring(3);
    assert_eq!(wait(&mut world, client, 29_500), [] as [Value; 0], "25 s of grace");
    let push = json!({"push": {
        "channel": "closed:a", "unsubscribe": {"code": 2501, "reason": "subscription expired"}
    }});
    assert_same(&wait(&mut world, client, 1_000), &[push], "the end");
    assert!(world.clients[client].gone.is_none());
    assert_eq!(world.ask(client, "history", r#"{"channel":"closed:a"}"#)["error"]["code"], 103);

    let (mut world, client) = expiring(3);
    let claims = json!({"sub": "7", "channel": "closed:a", "exp": now_s() + 50});
    let body = json!({"channel": "closed:a", "token": token(&claims)});
    world.ask(client, "sub_refresh", &body.to_string());
    assert_eq!(wait(&mut world, client, 60_000), [] as [Value; 0], "refreshed");

    // An expired token is answered, and changes nothing.
    let (mut world, client) = expiring(3);
    let claims = json!({"sub": "7", "channel": "closed:a", "exp": 1});
    let body = json!({"channel": "closed:a", "token": token(&claims)});
    assert_eq!(world.ask(client, "sub_refresh", &body.to_string()), json!({}));
    assert_eq!(wait(&mut world, client, 31_000).len(), 1);
}
