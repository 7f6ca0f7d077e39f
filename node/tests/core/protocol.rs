//! The Centrifuge protocol, table by table.

use ringmain::core::config::{CoreConfig, NamespaceConfig, Secret};
use serde_json::{Value, json};

use crate::harness::{START_UNIX_MS, World};

pub(crate) fn open_namespace() -> NamespaceConfig {
    NamespaceConfig {
        presence: true,
        join_leave: true,
        allow_subscribe_for_client: true,
        allow_subscribe_for_anonymous: true,
        allow_publish_for_subscriber: true,
        allow_publish_for_anonymous: true,
        allow_history_for_subscriber: true,
        allow_history_for_anonymous: true,
        allow_presence_for_subscriber: true,
        allow_presence_for_anonymous: true,
        ..NamespaceConfig::default()
    }
}

pub(crate) fn config() -> CoreConfig {
    let mut config = CoreConfig::default();
    config.client.allow_anonymous_connect_without_token = true;
    config.client.broadcast_channel = false;
    config.token.hmac_secret = Some(Secret("secret".into()));
    config.namespaces.insert("room".into(), open_namespace());
    config.namespaces.insert("user".into(), NamespaceConfig::default());
    config.namespaces.insert("broadcast".into(), NamespaceConfig::default());
    let asked = NamespaceConfig { force_recovery: false, ..open_namespace() };
    config.namespaces.insert("asked".into(), asked);
    let ephemeral = NamespaceConfig { history_size: 0, ..open_namespace() };
    config.namespaces.insert("live".into(), ephemeral);
    config
}

pub(crate) fn token(claims: &Value) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(b"secret");
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key).expect("claims encode")
}

fn now_s() -> u64 {
    START_UNIX_MS / 1000
}

/// What a raw message after an anonymous connect gets: replies, and the close code if any.
fn check(message: &str, replies: &[Value], close: Option<u16>) {
    for shards in [1, 3] {
        let mut world = World::new(shards, 1, &config());
        let (client, _) = world.connected(0, "{}");
        world.text(client, message);
        world.run();
        let got = world.take_json(client);
        assert_eq!(got, replies, "{message} on {shards} shards");
        match close {
            Some(code) => assert_eq!(world.close_code(client), code, "{message}"),
            None => assert!(world.clients[client].gone.is_none(), "{message} closed"),
        }
    }
}

fn error(id: u32, code: u32, message: &str) -> Value {
    json!({"id": id, "error": {"code": code, "message": message}})
}

#[test]
fn framing_rules() {
    check("", &[], Some(3501));
    check("{\"id\":2,\"rpc\":{}}\n\n", &[error(2, 108, "not available")], Some(3501));
    check("{\"id\":2,\"rpc\":{}}\n", &[error(2, 108, "not available")], None);
    check("{\"id\":2,\"rpc\":{}}\r\n", &[error(2, 108, "not available")], None);
    check("{\"id\":2,\n\"rpc\":{}}", &[], Some(3501));
    check("{\"id\":2,\"rpc\":{}}\nnonsense", &[error(2, 108, "not available")], Some(3501));
    check("{}", &[], Some(3501));
    check(r#"{"id":2,"ping":{}}"#, &[], Some(3501));
    check(r#"{"id":2}"#, &[], Some(3501));
    check(r#"{"id":2,"connect":{}}"#, &[], Some(3501));
    check(r#"{"send":{"data":1}}"#, &[], Some(3508));
}

#[test]
fn errors_of_commands() {
    let long = "x".repeat(256);
    check(r#"{"id":2,"subscribe":{"channel":""}}"#, &[], Some(3501));
    check(
        &format!(r#"{{"id":2,"subscribe":{{"channel":"{long}"}}}}"#),
        &[error(2, 107, "bad request")],
        None,
    );
    check(r#"{"id":2,"subscribe":{"channel":"no:a"}}"#, &[error(2, 102, "unknown channel")], None);
    check(r#"{"id":2,"subscribe":{"channel":"plain"}}"#, &[error(2, 103, "permission denied")], None);
    check(
        r#"{"id":2,"subscribe":{"channel":"room:a","tf":{"op":"eq"}}}"#,
        &[error(2, 107, "bad request")],
        None,
    );
    check(r#"{"id":2,"subscribe":{"channel":"room:a","delta":"xyz"}}"#, &[], Some(3501));
    check(
        r#"{"id":2,"subscribe":{"channel":"room:a","token":"x"}}"#,
        &[error(2, 103, "permission denied")],
        None,
    );
    check(r#"{"id":2,"publish":{"channel":"room:a","data":1}}"#, &[error(2, 103, "permission denied")], None);
    check(r#"{"id":2,"history":{"channel":"room:a"}}"#, &[error(2, 103, "permission denied")], None);
    check(r#"{"id":2,"history":{"channel":"live:a"}}"#, &[error(2, 108, "not available")], None);
    check(r#"{"id":2,"presence":{"channel":"user:a"}}"#, &[error(2, 108, "not available")], None);
    check(
        r#"{"id":2,"sub_refresh":{"channel":"room:a","token":"x"}}"#,
        &[error(2, 103, "permission denied")],
        None,
    );
    check(r#"{"id":2,"unsubscribe":{"channel":"room:a"}}"#, &[json!({"id":2,"unsubscribe":{}})], None);
}

#[test]
fn commands_before_connect_close() {
    let mut world = World::new(1, 1, &config());
    let client = world.websocket(0);
    world.text(client, r#"{"id":1,"subscribe":{"channel":"room:a"}}"#);
    world.run();
    assert_eq!(world.close_code(client), 3501);
}

#[test]
fn subscribe_publish_and_leave() {
    for shards in [1, 2, 5] {
        let mut world = World::new(shards, 7, &config());
        let (a, _) = world.connected(0, "{}");
        let (b, _) = world.connected(usize::from(shards) - 1, "{}");
        let reply = world.ask(a, "subscribe", r#"{"channel":"room:x"}"#);
        assert_eq!(reply["recoverable"], true);
        assert_eq!(reply["positioned"], true);
        assert!(reply["epoch"].is_string() && reply.get("offset").is_none(), "{reply}");
        world.ask(b, "subscribe", r#"{"channel":"room:x"}"#);
        let again = world.ask(b, "subscribe", r#"{"channel":"room:x"}"#);
        assert_eq!(again["error"]["code"], 105);
        assert_eq!(world.ask(a, "publish", r#"{"channel":"room:x","data":{"n":1.50}}"#), json!({}));
        for client in [a, b] {
            let got = world.take_json(client);
            assert_eq!(got.len(), 1, "{got:?}");
            assert_eq!(got[0]["push"]["channel"], "room:x");
            assert_eq!(got[0]["push"]["pub"]["offset"], 1);
        }
        let presence = world.ask(b, "presence", r#"{"channel":"room:x"}"#);
        assert_eq!(presence["presence"].as_object().expect("members").len(), 2);
        let stats = world.ask(b, "presence_stats", r#"{"channel":"room:x"}"#);
        assert_eq!(stats, json!({"num_clients": 2, "num_users": 1}));
        world.ask(b, "unsubscribe", r#"{"channel":"room:x"}"#);
        world.ask(a, "publish", r#"{"channel":"room:x","data":2}"#);
        assert!(world.take_json(b).is_empty(), "nothing after unsubscribe");
        let history = world.ask(a, "history", r#"{"channel":"room:x","limit":-1}"#);
        assert_eq!(history["publications"].as_array().expect("a page").len(), 2);
        assert_eq!(history["offset"], 2);
    }
}

#[test]
fn joins_and_leaves_follow_the_subscribe_reply() {
    let mut world = World::new(3, 7, &config());
    let (a, connect) = world.connected(0, "{}");
    world.send(a, "subscribe", r#"{"channel":"room:j","join_leave":true}"#);
    world.run();
    let got = world.take_json(a);
    assert!(got[0]["subscribe"].is_object(), "the reply first: {got:?}");
    assert_eq!(got[1]["push"]["join"]["info"]["client"], connect["connect"]["client"]);
    let (b, _) = world.connected(1, "{}");
    world.ask(b, "subscribe", r#"{"channel":"room:j"}"#);
    assert!(world.take_json(b).is_empty(), "not asked for");
    assert!(world.take_json(a)[0]["push"]["join"].is_object());
    world.frame(b, 8, &1000u16.to_be_bytes());
    world.run();
    assert!(world.take_json(a)[0]["push"]["leave"].is_object());
    assert_eq!(world.close_code(b), 1000);
}

#[test]
fn recovery_gives_what_was_missed_or_says_no() {
    for shards in [1, 4] {
        let mut world = World::new(shards, 3, &config());
        let (a, _) = world.connected(0, "{}");
        let epoch =
            world.ask(a, "subscribe", r#"{"channel":"room:r"}"#)["epoch"].as_str().expect("epoch").to_owned();
        for n in 0..5 {
            world.ask(a, "publish", &format!(r#"{{"channel":"room:r","data":{n}}}"#));
        }
        let recover = |world: &mut World, offset: u64, epoch: &str, extra: &str| {
            let (client, _) = world.connected(usize::from(shards) - 1, "{}");
            let body = format!(
                r#"{{"channel":"room:r","recover":true,"offset":{offset},"epoch":"{epoch}"{extra}}}"#
            );
            world.ask(client, "subscribe", &body)
        };
        let good = recover(&mut world, 2, &epoch, "");
        assert_eq!((good["recovered"].clone(), good["offset"].clone()), (json!(true), json!(2)));
        let offsets: Vec<u64> = good["publications"]
            .as_array()
            .expect("missed")
            .iter()
            .map(|p| p["offset"].as_u64().expect("offset"))
            .collect();
        assert_eq!(offsets, [3, 4, 5]);
        let empty_epoch = recover(&mut world, 4, "", "");
        assert_eq!(empty_epoch["recovered"], true);
        let other = recover(&mut world, 2, "0000000000001", "");
        assert_eq!(other.get("recovered"), None);
        assert_eq!((other["was_recovering"].clone(), other["offset"].clone()), (json!(true), json!(5)));
        assert_eq!(other.get("publications"), None);
        let ahead = recover(&mut world, 9, &epoch, "");
        assert_eq!(ahead.get("recovered"), None);
        let strict = recover(&mut world, 2, "0000000000001", r#","flag":2"#);
        assert_eq!(strict["error"]["code"], 112);
    }
}

#[test]
fn tokens() {
    let cases = [
        (json!({"sub": "42"}), Ok(())),
        (json!({"sub": "42", "exp": now_s() + 10}), Ok(())),
        (json!({"sub": "42", "exp": now_s()}), Err(Some(109))),
        (json!({"sub": "42", "nbf": now_s() + 10}), Err(Some(109))),
        (json!({"sub": "42", "channels": ["no:a"]}), Err(Some(102))),
    ];
    for (claims, expected) in cases {
        let mut world = World::new(2, 3, &config());
        let client = world.websocket(0);
        world.text(client, &format!(r#"{{"id":1,"connect":{{"token":"{}"}}}}"#, token(&claims)));
        world.run();
        let reply = world.next(client);
        match expected {
            Ok(()) => assert!(reply["connect"]["subs"]["user:42"].is_object(), "{claims}: {reply}"),
            Err(code) => {
                assert_eq!(reply["error"]["code"], json!(code), "{claims}");
                world.text(client, r#"{"id":2,"rpc":{}}"#);
                world.run();
                assert!(world.take_json(client).is_empty(), "nothing more is answered");
                world.pass(11_000);
                assert_eq!(world.close_code(client), 3502);
            }
        }
    }
}

#[test]
fn everyone_hears_the_broadcast_channel() {
    for shards in [1, 2, 7] {
        let mut config = config();
        config.client.broadcast_channel = true;
        let mut world = World::new(shards, 3, &config);
        let (a, connect) = world.connected(0, "{}");
        assert!(connect["connect"]["subs"]["broadcast:global"].is_object(), "{connect}");
        let (b, _) = world.connected(usize::from(shards) - 1, "{}");
        // Whoever subscribes itself takes the automatic subscription over.
        let reply = world.ask(b, "subscribe", r#"{"channel":"broadcast:global"}"#);
        assert_eq!(reply["positioned"], true);
        let home = ringmain::core::api::home_of("broadcast:global", shards);
        let call = ringmain::core::api::Call::Publish {
            channel: "broadcast:global".into(),
            data: b"1".as_slice().into(),
            tags: Vec::new(),
            skip_history: false,
            idempotency_key: None,
        };
        world.call(usize::from(home), call).result.expect("published");
        for client in [a, b] {
            let got = world.take_json(client);
            assert_eq!(got.len(), 1, "{got:?}");
            assert_eq!(got[0]["push"]["pub"]["offset"], 1);
        }
    }
}

#[test]
fn bad_tokens_close() {
    let mut strict = config();
    strict.client.allow_anonymous_connect_without_token = false;
    for (body, code) in [("{}".to_owned(), 3501), (r#"{"token":"a.b.c"}"#.to_owned(), 3500)] {
        let mut world = World::new(1, 3, &strict);
        let client = world.websocket(0);
        world.text(client, &format!(r#"{{"id":1,"connect":{body}}}"#));
        world.run();
        assert_eq!(world.close_code(client), code);
    }
}

#[test]
fn pings_and_pongs() {
    let mut world = World::new(1, 3, &config());
    let (client, connect) = world.connected(0, "{}");
    assert_eq!((&connect["connect"]["ping"], &connect["connect"]["pong"]), (&json!(25), &json!(true)));
    let next_ping = |world: &mut World| {
        for _ in 0..2_600 {
            world.pass(10);
            if let Some(ping) = world.take_json(client).pop() {
                return ping;
            }
        }
        panic!("no ping in 26 s");
    };
    assert_eq!(next_ping(&mut world), json!({}));
    world.text(client, "{}");
    assert_eq!(next_ping(&mut world), json!({}));
    world.pass(7_900);
    assert!(world.clients[client].gone.is_none(), "it still has time to answer");
    world.pass(200);
    assert_eq!(world.close_code(client), 3012);
}

#[test]
fn a_batch_of_connect_and_subscribe_is_answered_in_order() {
    for shards in [1, 6] {
        let mut world = World::new(shards, 9, &config());
        let client = world.websocket(0);
        let token = token(&json!({"sub": "7"}));
        let batch = format!(
            "{{\"id\":1,\"connect\":{{\"token\":\"{token}\"}}}}\n\
             {{\"id\":2,\"subscribe\":{{\"channel\":\"room:b\"}}}}\n\
             {{\"id\":3,\"publish\":{{\"channel\":\"room:b\",\"data\":1}}}}\n\
             {{\"id\":4,\"unsubscribe\":{{\"channel\":\"room:b\"}}}}"
        );
        world.text(client, &batch);
        world.run();
        let got = world.take_json(client);
        let ids: Vec<u64> = got.iter().filter_map(|value| value["id"].as_u64()).collect();
        assert_eq!(ids[..2], [1, 2], "{got:?}");
        assert!(ids.contains(&3) && ids.contains(&4), "{got:?}");
    }
}
