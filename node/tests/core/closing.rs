//! How the loop is told to end a socket.

use ringmain::core::api::{Answer, Call, UserSelector};
use ringmain::core::engine::Effect;
use serde_json::json;

use crate::harness::World;
use crate::protocol::{config, token};

const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;
const GOING_AWAY: [u8; 2] = 1_001_u16.to_be_bytes();

/// A client that closes, after `before`: the effect on its socket.
fn check(path: &str, before: impl FnOnce(&mut World, usize), expected: fn(u32) -> Effect) {
    let mut world = World::new(1, 1, &config());
    let client = world.open(0);
    world.upgrade(client, path);
    world.text(client, r#"{"id":1,"connect":{}}"#);
    world.run();
    before(&mut world, client);
    world.frame(client, CLOSE, &GOING_AWAY);
    world.run();
    assert_eq!(world.close_code(client), 1_001);
    let slot = world.clients[client].slot;
    assert_eq!(world.clients[client].gone, Some(expected(slot)), "{path}");
}

fn await_ping(world: &mut World, client: usize) {
    world.take_json(client);
    let pinged = |world: &mut World| {
        let texts = world.take_json(client);
        !texts.is_empty() || world.clients[client].frames.iter().any(|(opcode, _)| *opcode == PING)
    };
    while !pinged(world) {
        world.pass(16);
    }
}

/// A close frame is the last that comes, unless it has crossed a ping: its pong may follow the close frame
/// (RFC 6455 section 5.5.2), and a socket that is closed by then answers it with RST, which may destroy what
/// the client has not read yet.
#[test]
fn a_pong_that_is_on_its_way_is_waited_for() {
    type Answer = fn(&mut World, usize);
    let pings: [(&str, Answer); 2] = [
        ("/connection/websocket", |world, client| world.text(client, "{}")),
        ("/connection/websocket?cf_ws_frame_ping_pong=true", |world, client| world.frame(client, PONG, b"")),
    ];
    for (path, answer) in pings {
        check(path, |_, _| {}, Effect::Close);
        check(path, await_ping, Effect::Finish);
        let answered = |world: &mut World, client| {
            await_ping(world, client);
            answer(world, client);
        };
        check(path, answered, Effect::Close);
    }
}

/// Sessions without a user stand in no list; calls find them all the same.
#[test]
fn those_without_a_user_are_one_user() {
    let mut world = World::new(1, 1, &config());
    let anonymous: Vec<usize> = (0..3).map(|_| world.connected(0, "{}").0).collect();
    let connect = json!({"token": token(&json!({"sub": "7"}))}).to_string();
    let (seven, _) = world.connected(0, &connect);
    let users = |world: &mut World| match world.call(0, Call::Info).result {
        Ok(Answer::Info { user_hashes, .. }) => user_hashes.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!(users(&mut world), 2);
    let selector = UserSelector::default();
    let call = Call::Disconnect { selector, code: 4_321, reason: "go".into() };
    assert!(world.call(0, call).result.is_ok());
    for client in anonymous {
        assert_eq!(world.close_code(client), 4_321);
    }
    assert!(world.clients[seven].gone.is_none());
    assert_eq!(users(&mut world), 1);
}
