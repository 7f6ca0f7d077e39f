//! Connect and what tokens do to a connection: claims, server-side subscriptions, refreshes, expiry.

use serde_json::{Value, json};

use crate::harness::World;
use crate::probe::*;
use crate::protocol::token;

/// What the first frame of a connection gets, on one shard and on three.
#[track_caller]
fn check(connect: &str, expected: &Value) {
    check_frame(&format!(r#"{{"id":1,"connect":{connect}}}"#), std::slice::from_ref(expected), None);
}

#[track_caller]
fn check_frame(frame: &str, expected: &[Value], close: Option<u16>) {
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &probe_config());
        let client = world.websocket(0);
        world.text(client, frame);
        world.run();
        assert_same(&world.take_json(client), expected, &format!("{frame} on {shards} shards"));
        match close {
            Some(code) => assert_eq!(world.close_code(client), code, "{frame}"),
            None => assert!(world.clients[client].gone.is_none(), "{frame}"),
        }
    }
}

#[track_caller]
fn check_close(connect: &str, code: u16) {
    check_frame(&format!(r#"{{"id":1,"connect":{connect}}}"#), &[], Some(code));
}

/// A connect reply with these server-side subscriptions.
fn connected(subs: &Value) -> Value {
    let mut connect = json!({"client": "*", "version": "0.0.0", "ping": 25, "pong": true});
    if subs.as_object().is_some_and(|subs| !subs.is_empty()) {
        connect["subs"] = subs.clone();
    }
    json!({"id": 1, "connect": connect})
}

/// A subscription of a fresh positioned channel.
fn fresh() -> Value {
    json!({"recoverable": true, "positioned": true, "epoch": "*"})
}

#[test]
fn the_first_command_must_be_connect() {
    for frame in [
        "",
        "{}",
        "nonsense",
        r#"{"id":1}"#,
        r#"{"connect":{}}"#,
        r#"{"id":0,"connect":{}}"#,
        r#"{"id":1,"ping":{}}"#,
        r#"{"id":1,"publish":{"channel":"room:a","data":1}}"#,
        r#"{"send":{"data":1}}"#,
        r#"{"id":1,"refresh":{"token":"t"}}"#,
    ] {
        check_frame(frame, &[], Some(3501));
    }
}

#[test]
fn replies_to_connect() {
    check("{}", &connected(&json!({})));
    check(
        r#"{"name":"js","version":"5","data":{"a":1},"headers":{"x":"y"},"flag":1}"#,
        &connected(&json!({})),
    );
    check(&with_token(&json!({"sub": ""})), &connected(&json!({})));
    check(&with_token(&json!({"sub": null, "channels": null})), &connected(&json!({})));
    check(&with_token(&json!({})), &connected(&json!({})));
    check(&with_token(&json!({"sub": "7"})), &connected(&json!({"user:7": fresh()})));
    let mut expiring = connected(&json!({}));
    expiring["connect"]["expires"] = json!(true);
    for (ttl, claims) in [
        (60, json!({"exp": now_s() + 60})),
        (61, json!({"exp": now_s() + 60, "expire_at": now_s() + 61})),
        (61, json!({"expire_at": now_s() + 61})),
        (365 * 24 * 3600, json!({"exp": 9_999_999_999_u64})),
    ] {
        expiring["connect"]["ttl"] = json!(ttl);
        check(&with_token(&claims), &expiring);
    }
    check(&with_token(&json!({"exp": now_s() + 60, "expire_at": 0})), &connected(&json!({})));
    check(&with_token(&json!({"expire_at": -5})), &connected(&json!({})));
}

#[test]
fn claims_that_refuse_a_connection() {
    for (claims, code) in [
        (json!({"exp": now_s()}), 109),
        (json!({"exp": now_s() - 1}), 109),
        (json!({"exp": 0}), 109),
        (json!({"nbf": now_s() + 1}), 109),
        (json!({"exp": now_s() + 60, "expire_at": now_s() - 1}), 110),
        (json!({"channels": ["no:a"]}), 102),
        (json!({"subs": {"no:a": {}}}), 102),
    ] {
        check(&with_token(&claims), &error(1, code));
    }
    check(&with_token(&json!({"nbf": now_s()})), &connected(&json!({})));
    check(&with_token(&json!({"iat": now_s() + 99, "aud": "x", "iss": "y"})), &connected(&json!({})));
    for claims in [
        json!({"sub": 5}),
        json!({"exp": "soon"}),
        json!({"channel": "room:a"}),
        json!({"channels": "room:a"}),
        json!({"channels": [1]}),
        json!({"subs": ["room:a"]}),
        json!({"b64info": "!"}),
        json!({"sub": "x".repeat(256)}),
    ] {
        check_close(&with_token(&claims), 3500);
    }
    check_close(r#"{"token":"x"}"#, 3500);
    let foreign = jsonwebtoken::encode(
        &jsonwebtoken::Header::default(),
        &json!({"sub": "7"}),
        &jsonwebtoken::EncodingKey::from_secret(b"another"),
    );
    check_close(&json!({"token": foreign.expect("claims encode")}).to_string(), 3500);
}

#[test]
fn audience_and_issuer_are_checked_where_configured() {
    let mut config = probe_config();
    (config.token.audience, config.token.issuer) = (Some("us".into()), Some("me".into()));
    for (claims, good) in [
        (json!({"aud": "us", "iss": "me"}), true),
        (json!({"aud": ["them", "us"], "iss": "me"}), true),
        (json!({"aud": "them", "iss": "me"}), false),
        (json!({"iss": "me"}), false),
        (json!({"aud": "us"}), false),
        (json!({"aud": "us", "iss": "you"}), false),
    ] {
        let mut world = World::new(1, 1, &config);
        let client = world.websocket(0);
        world.text(client, &format!(r#"{{"id":1,"connect":{}}}"#, with_token(&claims)));
        world.run();
        if good {
            assert!(world.next(client)["connect"].is_object(), "{claims}");
        } else {
            assert_eq!(world.close_code(client), 3500, "{claims}");
        }
    }
}

#[test]
fn channels_of_the_token() {
    let subs = |claims: &Value| with_token(claims);
    check(
        &subs(&json!({"channels": ["room:a", "closed:b"]})),
        &connected(&json!({"room:a": fresh(), "closed:b": fresh()})),
    );
    // `subs` stands in for `channels`.
    check(
        &subs(&json!({"channels": ["room:a"], "subs": {"room:b": {}}})),
        &connected(&json!({"room:b": fresh()})),
    );
    check(&subs(&json!({"subs": {"room:a": null}})), &connected(&json!({"room:a": fresh()})));
    check(&subs(&json!({"channels": [""]})), &connected(&json!({})));
    check(&subs(&json!({"channels": ["live:a"]})), &connected(&json!({"live:a": {}})));
    let with_data = json!({"recoverable": true, "positioned": true, "epoch": "*", "data": {"n": 1}});
    check(&subs(&json!({"subs": {"room:a": {"data": {"n": 1}}}})), &connected(&json!({"room:a": with_data})));
    check(
        &subs(&json!({"subs": {"room:a": {"b64data": "eyJuIjoxfQ=="}}})),
        &connected(&json!({"room:a": with_data})),
    );
    let off = json!({"override": {"force_recovery": {"value": false}}});
    check(&subs(&json!({"subs": {"room:a": off}})), &connected(&json!({"room:a": {}})));
    let on = json!({"override": {"force_positioning": {"value": true}}});
    let positioned = json!({"positioned": true, "epoch": "*"});
    check(&subs(&json!({"subs": {"plain:a": on}})), &connected(&json!({"plain:a": positioned})));
    check(&subs(&json!({"subs": {"plain:a": {}}})), &connected(&json!({"plain:a": {}})));
}

#[test]
fn channels_are_limited_and_the_automatic_ones_do_not_count() {
    let channels = |count: usize| (0..count).map(|n| format!("room:{n}")).collect::<Vec<_>>();
    let mut config = probe_config();
    config.client.broadcast_channel = true;
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &config);
        let claims = json!({"sub": "7", "channels": channels(128)});
        let (client, reply) = world.connected(0, &with_token(&claims));
        assert_eq!(reply["connect"]["subs"].as_object().expect("subs").len(), 130);
        let more = world.ask(client, "subscribe", r#"{"channel":"room:more"}"#);
        assert_eq!(more["error"]["code"], 106);
        let claims = json!({"sub": "7", "channels": channels(129)});
        let client = world.websocket(0);
        world.text(client, &format!(r#"{{"id":1,"connect":{}}}"#, with_token(&claims)));
        world.run();
        assert_eq!(world.close_code(client), 3505);
        let (client, _) = world.connected(0, &with_token(&json!({"sub": "8"})));
        for n in 0..128 {
            let reply = world.ask(client, "subscribe", &format!(r#"{{"channel":"room:{n}"}}"#));
            assert!(reply["epoch"].is_string(), "{reply}");
        }
        assert_eq!(world.ask(client, "subscribe", r#"{"channel":"room:128"}"#)["error"]["code"], 106);
        assert_eq!(world.ask(client, "subscribe", r#"{"channel":"room:0"}"#)["error"]["code"], 105);
    }
}

#[test]
fn connect_subs_subscribe_where_the_client_might() {
    let body = |subs: &Value| json!({"subs": subs}).to_string();
    check(
        &body(&json!({"room:a": {}, "closed:a": {}, "$room:a": {}, "users:a": {}, "room:ä": {}})),
        &connected(&json!({"room:a": fresh()})),
    );
    check_close(&body(&json!({"no:a": {}})), 3501);
    // Of what it says of them only the position counts.
    let asks = json!({"positioned": true, "recoverable": true, "join_leave": true, "delta": "what", "tf": {}, "flag": 2});
    check(&body(&json!({"plain:a": asks})), &connected(&json!({"plain:a": {}})));
    check(
        &body(&json!({"room:a": {"recover": true, "epoch": "other", "flag": 2}})),
        &connected(&json!({
            "room:a": {"recoverable": true, "positioned": true, "epoch": "*", "was_recovering": true}
        })),
    );
    check(
        &body(&json!({"plain:a": {"recover": true}})),
        &connected(&json!({"plain:a": {"was_recovering": true}})),
    );
}

#[test]
fn server_side_subscriptions_recover_and_live_on() {
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &probe_config());
        let claims = json!({"sub": "7", "channels": ["room:a"]});
        let (writer, reply) = world.connected(0, &with_token(&claims));
        let epoch = reply["connect"]["subs"]["room:a"]["epoch"].as_str().expect("an epoch").to_owned();
        for n in 1..=3 {
            world.ask(writer, "publish", &format!(r#"{{"channel":"room:a","data":{n}}}"#));
        }
        let token = token(&claims);
        let body =
            json!({"token": token, "subs": {"room:a": {"recover": true, "offset": 1, "epoch": epoch}}});
        let (client, reply) = world.connected(usize::from(shards) - 1, &body.to_string());
        let sub = &reply["connect"]["subs"]["room:a"];
        let info = json!({"user": "7", "client": "*"});
        let expected = json!({
            "recoverable": true, "positioned": true, "epoch": epoch, "offset": 1, "recovered": true,
            "was_recovering": true, "publications": [
                {"data": 2, "offset": 2, "info": info}, {"data": 3, "offset": 3, "info": info}
            ]
        });
        assert_same(std::slice::from_ref(sub), &[expected], "recovery in connect");
        world.take_json(writer);
        world.ask(writer, "publish", r#"{"channel":"room:a","data":4}"#);
        let expected = json!({"push": {"channel": "room:a", "pub": {"data": 4, "offset": 4, "info": info}}});
        assert_same(&world.take_json(client), &[expected], "a live publication");
        // It may be left, and then taken again.
        assert_eq!(world.ask(client, "unsubscribe", r#"{"channel":"room:a"}"#), json!({}));
        world.ask(writer, "publish", r#"{"channel":"room:a","data":5}"#);
        assert!(world.take_json(client).is_empty(), "nothing after unsubscribe");
        let again = world.ask(client, "subscribe", r#"{"channel":"room:a"}"#);
        assert_eq!(again["offset"], 5);
        assert_eq!(world.ask(client, "subscribe", r#"{"channel":"user:7"}"#)["error"]["code"], 105);
    }
}

#[test]
fn joins_of_server_side_subscriptions_follow_the_connect_reply() {
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &probe_config());
        let on = json!({"override": {"force_push_join_leave": {"value": true}}, "info": {"c": 2}});
        let claims = json!({"sub": "7", "info": {"n": 1}, "subs": {"room:a": on}});
        let client = world.websocket(0);
        world.text(client, &format!(r#"{{"id":1,"connect":{}}}"#, with_token(&claims)));
        world.run();
        let got = world.take_json(client);
        let info = json!({"user": "7", "client": "*", "conn_info": {"n": 1}, "chan_info": {"c": 2}});
        let join = json!({"push": {"channel": "room:a", "join": {"info": info}}});
        assert_same(
            &got,
            &[connected(&json!({"room:a": fresh(), "user:7": fresh()})), join],
            "reply, then join",
        );
        let presence = world.ask(client, "presence", r#"{"channel":"room:a"}"#);
        let members: Vec<Value> =
            presence["presence"].as_object().expect("members").values().cloned().collect();
        assert_same(&members, &[info], "presence");
    }
}

#[test]
fn nothing_is_answered_after_a_failed_connect() {
    let mut world = World::new(1, 1, &probe_config());
    let client = world.websocket(0);
    let expired = with_token(&json!({"exp": 1}));
    world.text(client, &format!("{{\"id\":1,\"connect\":{expired}}}\n{{\"id\":2,\"rpc\":{{}}}}\nnonsense"));
    world.text(client, r#"{"id":3,"connect":{}}"#);
    world.text(client, "");
    world.run();
    assert_same(&world.take_json(client), &[error(1, 109)], "the error alone");
    world.pass(9_900);
    assert!(world.clients[client].gone.is_none(), "it is closed as one that never connected");
    world.pass(200);
    assert_eq!(world.close_code(client), 3502);
}

// --- refresh ---

/// What a refresh with these claims brings to a connection of user 7.
#[track_caller]
fn check_refresh(claims: &Value, expected: Result<Value, u16>) {
    let connect = with_token(&json!({"sub": "7", "exp": now_s() + 100, "channels": ["room:t"]}));
    let frame = format!(r#"{{"id":2,"refresh":{}}}"#, with_token(claims));
    match expected {
        Ok(reply) => talk(&connect, &[step(frame, reply)]),
        Err(code) => talk(&connect, &[closes(frame, code)]),
    }
}

#[test]
fn refreshes() {
    let good = |more: Value| {
        let mut claims = json!({"sub": "7", "channels": ["room:t"]});
        claims.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        claims
    };
    let expires = |ttl: u64| Ok(json!({"id": 2, "refresh": {"expires": true, "ttl": ttl}}));
    check_refresh(&good(json!({"exp": now_s() + 50})), expires(50));
    check_refresh(&good(json!({"exp": now_s() + 50, "expire_at": now_s() + 20})), expires(20));
    check_refresh(&good(json!({})), Ok(json!({"id": 2, "refresh": {}})));
    check_refresh(&good(json!({"exp": now_s() + 50, "expire_at": 5})), Ok(error(2, 110)));
    check_refresh(&good(json!({"exp": now_s()})), Err(3005));
    check_refresh(&good(json!({"sub": "8"})), Err(3500));
    check_refresh(&good(json!({"channel": "room:t"})), Err(3500));
    check_refresh(&good(json!({"channels": ["no:a"]})), Ok(error(2, 102)));
    // Other channels than before: it begins anew.
    check_refresh(&good(json!({"channels": []})), Err(3010));
    check_refresh(&good(json!({"channels": ["room:t", "room:u"]})), Err(3010));
    check_refresh(&good(json!({"channels": ["room:t", "user:7"]})), Ok(json!({"id": 2, "refresh": {}})));
    let connect = with_token(&json!({"sub": "7"}));
    talk(&connect, &[closes(r#"{"id":2,"refresh":{}}"#, 3501)]);
    talk(&connect, &[closes(r#"{"id":2,"refresh":{"token":"x.y.z"}}"#, 3500)]);
}

#[test]
fn an_expired_connection_closes_unless_refreshed() {
    for refreshed in [false, true] {
        let mut world = World::new(1, 1, &probe_config());
        let (client, _) =
            world.connected(0, &with_token(&json!({"sub": "7", "exp": now_s() + 5, "info": 1})));
        if refreshed {
            let claims = json!({"sub": "7", "exp": now_s() + 60});
            world.ask(client, "refresh", &with_token(&claims));
        }
        let mut answered = 0;
        for _ in 0..299 {
            world.pass(100);
            for _ in world.take_json(client) {
                world.text(client, "{}");
                answered += 1;
            }
        }
        assert!(answered > 0, "a ping in 30 s");
        assert!(world.clients[client].gone.is_none(), "25 s of grace");
        world.pass(200);
        if refreshed {
            assert!(world.clients[client].gone.is_none());
            // The connection's info stays where the new token has none.
            world.take_json(client);
            world.ask(client, "subscribe", r#"{"channel":"room:a"}"#);
            let presence = world.ask(client, "presence", r#"{"channel":"room:a"}"#);
            let members = presence["presence"].as_object().expect("members");
            assert!(members.values().all(|member| member["conn_info"] == 1), "{presence}");
        } else {
            assert_eq!(world.close_code(client), 3005);
        }
    }
}

// --- pings ---

#[test]
fn the_first_ping_leaves_time_and_pongs_are_counted() {
    for seed in 1..20 {
        let mut world = World::new(1, seed, &probe_config());
        let (client, _) = world.connected(0, "{}");
        world.pass(12_400);
        assert!(world.take_json(client).is_empty(), "no ping within half an interval");
        assert!(wait_for_ping(&mut world, client) <= 12_700, "a ping within an interval");
        world.text(client, "{}");
        world.run();
        assert!(world.clients[client].gone.is_none(), "it was owed");
        world.text(client, "{}");
        world.run();
        assert_eq!(world.close_code(client), 3501, "a second pong to one ping");
    }
}

/// Lets time pass until something comes, which must be a ping. Milliseconds.
fn wait_for_ping(world: &mut World, client: usize) -> u64 {
    for waited in (0..26_000).step_by(20) {
        let got = world.take_json(client);
        if !got.is_empty() {
            assert_same(&got, &[json!({})], "a ping");
            return waited;
        }
        world.pass(20);
    }
    panic!("no ping in 26 s");
}

#[test]
fn only_a_pong_counts_as_one() {
    let mut world = World::new(1, 3, &probe_config());
    let (client, _) = world.connected(0, "{}");
    wait_for_ping(&mut world, client);
    for _ in 0..7 {
        world.pass(1_000);
        assert_eq!(world.ask(client, "rpc", "{}")["error"]["code"], 108);
    }
    world.frame(client, 10, b"");
    world.pass(1_100);
    assert_eq!(world.close_code(client), 3012);
}

#[test]
fn frame_pings_stand_in_for_the_protocols() {
    let mut world = World::new(1, 3, &probe_config());
    let client = world.open(0);
    world.upgrade(client, "/connection/websocket?cf_ws_frame_ping_pong=true");
    world.text(client, r#"{"id":1,"connect":{}}"#);
    world.run();
    let expected = json!({"id": 1, "connect": {"client": "*", "version": "0.0.0"}});
    assert_same(&world.take_json(client), &[expected], "no ping, no pong");
    for _ in 0..1_300 {
        world.pass(20);
        assert!(world.take_json(client).is_empty(), "no protocol ping");
        if !world.clients[client].frames.is_empty() {
            break;
        }
    }
    assert_eq!(world.clients[client].frames.pop_front(), Some((9, Vec::new())), "a WebSocket ping");
    world.frame(client, 10, b"");
    world.run();
    world.text(client, "{}");
    world.run();
    assert_eq!(world.close_code(client), 3501, "there is no protocol ping to answer");
}
