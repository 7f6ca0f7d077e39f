//! What the protocol probes share: conversations against nodes of one and several shards.
//!
//! A probe says what it sends and what must come back, whole and in order. In what is expected the
//! string `*` stands for any value, so that epochs and client ids need not be known.

use ringmain::core::config::{CoreConfig, NamespaceConfig, RecoveryMode};
use serde_json::{Value, json};

use crate::harness::{START_UNIX_MS, World};
use crate::protocol::{config, open_namespace, token};

/// Now, in seconds since the epoch.
pub(crate) fn now_s() -> u64 {
    START_UNIX_MS / 1000
}

/// Namespaces with one thing each that the others have not, beside those of the protocol tests.
pub(crate) fn probe_config() -> CoreConfig {
    let mut config = config();
    let namespaces = [
        ("closed", NamespaceConfig::default()),
        ("cache", NamespaceConfig { force_recovery_mode: RecoveryMode::Cache, ..open_namespace() }),
        ("loud", NamespaceConfig { force_push_join_leave: true, ..open_namespace() }),
        (
            "plain",
            NamespaceConfig {
                force_recovery: false,
                allow_recovery: false,
                allow_positioning: false,
                allow_history_for_subscriber: false,
                allow_presence_for_subscriber: false,
                ..open_namespace()
            },
        ),
        ("users", NamespaceConfig { allow_subscribe_for_anonymous: false, ..open_namespace() }),
    ];
    config.namespaces.extend(namespaces.map(|(name, namespace)| (name.to_owned(), namespace)));
    config
}

/// Whether `got` is what is expected.
pub(crate) fn same(got: &Value, expected: &Value) -> bool {
    match (got, expected) {
        (_, Value::String(any)) if any == "*" => true,
        (Value::Object(got), Value::Object(expected)) => {
            got.len() == expected.len()
                && expected.iter().all(|(key, value)| got.get(key).is_some_and(|got| same(got, value)))
        }
        (Value::Array(got), Value::Array(expected)) => {
            got.len() == expected.len() && got.iter().zip(expected).all(|(got, value)| same(got, value))
        }
        _ => got == expected,
    }
}

#[track_caller]
pub(crate) fn assert_same(got: &[Value], expected: &[Value], what: &str) {
    let all = got.len() == expected.len() && got.iter().zip(expected).all(|(got, value)| same(got, value));
    assert!(all, "{what}\n     got: {got:?}\nexpected: {expected:?}");
}

/// An error reply.
pub(crate) fn error(id: u32, code: u32) -> Value {
    let message = match code {
        100 => "internal server error",
        102 => "unknown channel",
        103 => "permission denied",
        105 => "already subscribed",
        106 => "limit exceeded",
        107 => "bad request",
        108 => "not available",
        109 => "token expired",
        110 => "expired",
        112 => "unrecoverable position",
        _ => panic!("error {code} has no text here"),
    };
    json!({"id": id, "error": {"code": code, "message": message}})
}

/// The body of a connect command with a token of these claims.
pub(crate) fn with_token(claims: &Value) -> String {
    json!({"token": token(claims)}).to_string()
}

/// One frame, and what it brings: replies and pushes, and the close code if it closes.
pub(crate) type Step<'a> = (String, Vec<Value>, Option<u16>);

/// Plays a conversation against nodes of one and of three shards. `connect` is the connect body.
#[track_caller]
pub(crate) fn talk(connect: &str, steps: &[Step<'_>]) {
    for shards in [1, 3] {
        for shard in 0..shards {
            let mut world = World::new(shards, 1, &probe_config());
            let (client, _) = world.connected(usize::from(shard), connect);
            world.take_json(client);
            play(&mut world, client, steps);
        }
    }
}

/// Plays a conversation on a connection.
#[track_caller]
pub(crate) fn play(world: &mut World, client: usize, steps: &[Step<'_>]) {
    let shards = world.cores.len();
    for (message, expected, close) in steps {
        world.text(client, message);
        world.run();
        let got = world.take_json(client);
        assert_same(&got, expected, &format!("{message} on {shards} shards"));
        match close {
            Some(code) => assert_eq!(world.close_code(client), *code, "{message} on {shards} shards"),
            None => assert!(world.clients[client].gone.is_none(), "{message} closed on {shards} shards"),
        }
    }
}

/// A frame that is answered with this alone.
pub(crate) fn step(message: impl Into<String>, expected: Value) -> Step<'static> {
    (message.into(), vec![expected], None)
}

/// A frame that closes without an answer.
pub(crate) fn closes(message: impl Into<String>, code: u16) -> Step<'static> {
    (message.into(), Vec::new(), Some(code))
}
