//! What users show of themselves is bounded: each info, and all of them together.

use ringmain::core::MEMBER_BYTES;
use ringmain::core::api::{Call, SubscribeOptions, UserSelector, home_of};
use ringmain::core::config::CoreConfig;
use ringmain::core::engine::Engine;
use ringmain::core::metrics::Metric;
use ringmain_proto::limits::INFO_BYTES_MAX;
use serde_json::{Value, json};

use crate::harness::World;
use crate::protocol::{config, token};

const CHANNEL: &str = "room:infos";

/// A JSON text of so many bytes.
fn info(bytes: usize) -> Value {
    json!("i".repeat(bytes - 2))
}

fn with_token(claims: &Value) -> String {
    json!({"token": token(claims)}).to_string()
}

/// What a command gets: its reply, or the code of the close or of the error.
fn outcome(world: &mut World, client: usize, frame: &str) -> Result<Value, u64> {
    world.text(client, frame);
    world.run();
    if world.clients[client].gone.is_some() {
        return Err(u64::from(world.close_code(client)));
    }
    let reply = world.next(client);
    reply["error"]["code"].as_u64().map_or(Ok(reply), Err)
}

fn connect(world: &mut World, claims: &Value) -> (usize, Result<Value, u64>) {
    let client = world.websocket(0);
    let frame = format!(r#"{{"id":1,"connect":{}}}"#, with_token(claims));
    let result = outcome(world, client, &frame);
    (client, result)
}

fn held(world: &mut World) -> u64 {
    world.cores.iter_mut().map(|core| core.metrics().get(Metric::InfoBytes)).sum()
}

fn without_own_channels() -> CoreConfig {
    let mut config = config();
    config.client.personal_channel = false;
    config
}

/// In every place where one may be given, an info of the maximum is shown and one of a byte more is not.
#[test]
fn an_info_has_a_maximum() {
    for (bytes, fits) in [(INFO_BYTES_MAX, true), (INFO_BYTES_MAX + 1, false)] {
        let code = |code: u64| if fits { None } else { Some(code) };
        let info = info(bytes);
        let world = || World::new(1, 1, &without_own_channels());
        let (_, of_connection) = connect(&mut world(), &json!({"sub": "7", "info": info}));
        assert_eq!(of_connection.err(), code(3500));
        let claims = json!({"sub": "7", "subs": {CHANNEL: {"info": info}}});
        let (_, of_its_channels) = connect(&mut world(), &claims);
        assert_eq!(of_its_channels.err(), code(3500));

        let mut world = world();
        let (client, _) = connect(&mut world, &json!({"sub": "7"}));
        let claims = json!({"sub": "7", "channel": CHANNEL, "info": info});
        let body = json!({"channel": CHANNEL, "token": token(&claims)});
        let of_subscription = outcome(&mut world, client, &json!({"id": 2, "subscribe": body}).to_string());
        assert_eq!(of_subscription.err(), code(103));
        if fits {
            let reply = world.ask(client, "presence", &json!({"channel": CHANNEL}).to_string());
            let members = reply["presence"].as_object().expect("members");
            assert!(members.values().all(|member| member["chan_info"] == info), "{members:?}");
        }
        let call = Call::Subscribe {
            selector: UserSelector { user: "7".into(), ..UserSelector::default() },
            channel: "room:api".into(),
            options: SubscribeOptions {
                info: Some(info.to_string().into_bytes()),
                ..SubscribeOptions::default()
            },
        };
        let of_the_api = world.call(0, call).result;
        assert_eq!(of_the_api.err().map(|error| u64::from(error.code())), code(107));
        world.take_json(client);
        let refresh = json!({"id": 3, "refresh": {"token": token(&json!({"sub": "7", "info": info}))}});
        let of_refresh = outcome(&mut world, client, &refresh.to_string());
        assert_eq!(of_refresh.err(), code(3500));
    }
}

/// Presence holds as many members as the pool has room for, wherever the channel is homed; the next one is
/// asked to try again, and may when somebody has left.
#[test]
fn presence_is_full_at_its_maximum() {
    for shards in [1_u16, 2] {
        let mut one = World::new(shards, 1, &without_own_channels());
        let (client, _) = one.connected(0, "{}");
        one.ask(client, "subscribe", &json!({"channel": CHANNEL}).to_string());
        let each = held(&mut one);
        assert!(each > MEMBER_BYTES as u64 && each < 2 * MEMBER_BYTES as u64, "{each} bytes");

        let mut config = without_own_channels();
        config.limits.info_pool_bytes = 5 * each;
        let mut world = World::new(shards, 1, &config);
        let home = usize::from(home_of(CHANNEL, shards));
        let subscribe = json!({"channel": CHANNEL}).to_string();
        let clients: Vec<usize> =
            (0..7).map(|n| world.connected((home + n) % usize::from(shards), "{}").0).collect();
        for client in &clients[..5] {
            assert!(world.ask(*client, "subscribe", &subscribe).get("epoch").is_some());
        }
        assert_eq!(held(&mut world), 5 * each);
        for client in &clients[5..] {
            assert_eq!(world.ask(*client, "subscribe", &subscribe)["error"]["code"], 111);
        }
        let other = json!({"channel": "live:other"}).to_string();
        world.ask(clients[0], "unsubscribe", &subscribe);
        assert!(world.ask(clients[5], "subscribe", &subscribe).get("epoch").is_some());
        assert_eq!(world.ask(clients[6], "subscribe", &subscribe)["error"]["code"], 111);
        let elsewhere = usize::from(home_of("live:other", shards)) != home;
        assert_eq!(world.ask(clients[6], "subscribe", &other).get("error").is_none(), elsewhere);
        for client in clients {
            world.frame(client, 8, &[]);
        }
        world.run();
        assert_eq!(held(&mut world), 0, "after all are gone");
        assert_eq!(
            world.cores[home].metrics().get(Metric::Channels),
            1,
            "who was refused left no channel behind"
        );
    }
}

/// Sessions count their infos in the same pool, and a refresh only the difference.
#[test]
fn connections_with_infos_are_full_at_their_maximum() {
    let mut config = without_own_channels();
    config.limits.info_pool_bytes = 3_000;
    let mut world = World::new(1, 1, &config);
    let claims = |bytes: usize| json!({"sub": "7", "info": info(bytes)});
    let (first, result) = connect(&mut world, &claims(1_000));
    assert!(result.is_ok());
    let (second, result) = connect(&mut world, &claims(2_000));
    assert!(result.is_ok());
    let (third, result) = connect(&mut world, &claims(3));
    assert_eq!(result.err(), Some(111), "the pool is full");
    let (_, result) = connect(&mut world, &json!({"sub": "7"}));
    assert!(result.is_ok(), "who shows nothing needs no room");
    let refresh = |world: &mut World, client: usize, bytes: usize| {
        let frame = json!({"id": 9, "refresh": {"token": token(&claims(bytes))}}).to_string();
        outcome(world, client, &frame).err()
    };
    assert_eq!(refresh(&mut world, first, 1_001), Some(111));
    assert_eq!(refresh(&mut world, first, 900), None);
    assert_eq!(refresh(&mut world, second, 2_100), None);
    assert_eq!(held(&mut world), 3_000);
    for client in [first, second, third] {
        world.frame(client, 8, &[]);
    }
    world.run();
    assert_eq!(held(&mut world), 0);
}

/// The infos of subscriptions come and go with them.
#[test]
fn infos_of_subscriptions_are_held_as_long_as_they() {
    let mut config = without_own_channels();
    config.namespaces.get_mut("room").expect("the tests have it").presence = false;
    let claims =
        |bytes: usize| json!({"sub": "7", "channel": CHANNEL, "info": info(bytes), "exp": 1_790_000_600});
    for (pool, bytes, error) in [(1_000, 1_000, None), (1_000, 1_001, Some(111))] {
        config.limits.info_pool_bytes = pool;
        let mut world = World::new(1, 1, &config);
        let (client, _) = connect(&mut world, &json!({"sub": "7"}));
        let body = json!({"channel": CHANNEL, "token": token(&claims(bytes))}).to_string();
        assert_eq!(world.ask(client, "subscribe", &body)["error"]["code"].as_u64(), error);
        if error.is_none() {
            let refreshed = json!({"channel": CHANNEL, "token": token(&claims(bytes + 1))}).to_string();
            assert_eq!(world.ask(client, "sub_refresh", &refreshed)["error"]["code"], 111);
            let refreshed = json!({"channel": CHANNEL, "token": token(&claims(500))}).to_string();
            assert!(world.ask(client, "sub_refresh", &refreshed).get("error").is_none());
            assert_eq!(held(&mut world), 500);
            world.ask(client, "unsubscribe", &json!({"channel": CHANNEL}).to_string());
        }
        assert_eq!(held(&mut world), 0);
        assert_eq!(world.cores[0].metrics().get(Metric::Subscriptions), 0);
    }
}
