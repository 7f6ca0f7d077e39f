//! Values that must go together.
//!
//! Owns the checks between keys, and the few values that follow from others. Single values were
//! checked before.

use super::{ConfigError, Resolved};
use crate::core::config::{NamespaceConfig, RecoveryMode, Secret};

/// HMAC secrets and API keys shorter than this are warned about, in bytes: RFC 7518 section 3.2 asks
/// for a key of at least the hash's size.
const SECRET_BYTES_MIN: usize = 32;

/// What needs a history: off by itself in an ephemeral namespace, an error where it was asked for.
type NeedsHistory = (&'static str, fn(&mut NamespaceConfig) -> &mut bool);
const NEED_HISTORY: [NeedsHistory; 4] = [
    ("allow_positioning", |namespace| &mut namespace.allow_positioning),
    ("force_positioning", |namespace| &mut namespace.force_positioning),
    ("allow_recovery", |namespace| &mut namespace.allow_recovery),
    ("force_recovery", |namespace| &mut namespace.force_recovery),
];

/// Sets what follows from other values: `history_size = 0` alone makes a namespace ephemeral.
pub(super) fn settle(resolved: &mut Resolved) -> Result<(), ConfigError> {
    let origins = &resolved.origins;
    for (path, namespace) in namespaces_mut(&mut resolved.config.core) {
        if namespace.history_size > 0 {
            continue;
        }
        for (name, field) in NEED_HISTORY {
            let key = format!("{path}.{name}");
            let asked_for = *field(namespace) && origins.contains_key(&key);
            if asked_for {
                return Err(relation(
                    format!("{key} = true needs a history, but {path}.history_size = 0"),
                    format!("set {path}.history_size to 1 or more, or leave {key} out"),
                ));
            }
            *field(namespace) = false;
        }
    }
    Ok(())
}

/// Checks every relation; the first that fails is told.
pub(super) fn check(resolved: &Resolved) -> Result<(), ConfigError> {
    check_times(resolved)?;
    check_listeners(resolved)?;
    check_pools(resolved)?;
    check_secrets(resolved)?;
    check_demo(resolved)?;
    let namespaces = &resolved.config.core.namespaces;
    let named = namespaces.iter().map(|(name, options)| (format!("namespaces.{name}"), options));
    let plain = std::iter::once(("channel".to_owned(), &resolved.config.core.channel));
    plain.chain(named).try_for_each(|(path, namespace)| check_namespace(&path, namespace))
}

fn relation(message: String, help: impl Into<String>) -> ConfigError {
    ConfigError::Relation { message, help: help.into() }
}

/// `Err` unless `holds`.
fn require(holds: bool, message: impl FnOnce() -> String, help: &str) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(relation(message(), help)) }
}

fn namespaces_mut(
    core: &mut crate::core::config::CoreConfig,
) -> impl Iterator<Item = (String, &mut NamespaceConfig)> {
    let named = core.namespaces.iter_mut().map(|(name, options)| (format!("namespaces.{name}"), options));
    std::iter::once(("channel".to_owned(), &mut core.channel)).chain(named)
}

fn check_times(resolved: &Resolved) -> Result<(), ConfigError> {
    let client = &resolved.config.core.client;
    let server = &resolved.config.node.server;
    require(
        client.pong_timeout_ms < client.ping_interval_ms,
        || {
            format!(
                "client.pong_timeout_ms = {} is not less than client.ping_interval_ms = {}",
                client.pong_timeout_ms, client.ping_interval_ms
            )
        },
        "a pong is due before the next ping: lower client.pong_timeout_ms",
    )?;
    require(
        server.drain_delay_ms < server.drain_timeout_ms,
        || {
            format!(
                "server.drain_delay_ms = {} is not less than server.drain_timeout_ms = {}",
                server.drain_delay_ms, server.drain_timeout_ms
            )
        },
        "the delay is part of the whole drain: raise server.drain_timeout_ms",
    )
}

fn check_listeners(resolved: &Resolved) -> Result<(), ConfigError> {
    let server = &resolved.config.node.server;
    require(
        !server.listen.is_empty(),
        || "server.listen is empty".to_owned(),
        "name an address for clients, such as --listen 127.0.0.1:8000",
    )?;
    for (index, listen) in server.listen.iter().enumerate() {
        let is_twice = server.listen[..index].iter().any(|other| other.address == listen.address);
        require(!is_twice, || format!("server.listen names {} twice", listen.address), "leave one out")?;
    }
    Ok(())
}

/// Largest messages that the pool between shards holds at the least: a shard that takes nothing gets half of
/// it, and one of that size must still fit.
pub const MESH_MESSAGES_MIN: u64 = 4;

fn check_pools(resolved: &Resolved) -> Result<(), ConfigError> {
    let core = &resolved.config.core;
    let check = |pool: &str, pool_bytes: u64, item: &str, item_bytes: u32| {
        require(
            pool_bytes >= u64::from(item_bytes),
            || format!("limits.{pool} = {pool_bytes} does not hold one {item} = {item_bytes}"),
            "raise the pool or lower the other",
        )
    };
    check(
        "own_pool_bytes",
        core.limits.own_pool_bytes,
        "client.own_queue_bytes_max",
        core.client.own_queue_bytes_max,
    )?;
    check(
        "partial_pool_bytes",
        core.limits.partial_pool_bytes,
        "client.message_bytes_max",
        core.client.message_bytes_max,
    )?;
    check("log_pool_bytes", core.limits.log_pool_bytes, "channel.log_bytes_max", core.channel.log_bytes_max)?;
    let message_bytes_max = u64::from(core.client.message_bytes_max);
    require(
        core.limits.mesh_pool_bytes >= MESH_MESSAGES_MIN * message_bytes_max,
        || {
            format!(
                "limits.mesh_pool_bytes = {} does not hold {MESH_MESSAGES_MIN} of client.message_bytes_max = {}",
                core.limits.mesh_pool_bytes, message_bytes_max
            )
        },
        "raise the pool or lower the other",
    )?;
    let admin = &resolved.config.node.admin;
    require(
        admin.request_pool_bytes >= u64::from(admin.request_bytes_max),
        || {
            format!(
                "admin.request_pool_bytes = {} does not hold one admin.request_bytes_max = {}",
                admin.request_pool_bytes, admin.request_bytes_max
            )
        },
        "raise the pool or lower the other",
    )?;
    core.namespaces.iter().try_for_each(|(name, namespace)| {
        let item = format!("namespaces.{name}.log_bytes_max");
        check("log_pool_bytes", core.limits.log_pool_bytes, &item, namespace.log_bytes_max)
    })
}

fn secrets(resolved: &Resolved) -> impl Iterator<Item = (&'static str, &Secret)> {
    let core = &resolved.config.core;
    let subscription = core.subscription_token.as_ref().and_then(|token| token.hmac_secret.as_ref());
    let all = [
        ("admin.api_key", resolved.config.node.admin.api_key.as_ref()),
        ("token.hmac_secret", core.token.hmac_secret.as_ref()),
        ("subscription_token.hmac_secret", subscription),
        ("cluster.ticket_key", resolved.config.node.cluster.ticket_key.as_ref()),
    ];
    all.into_iter().filter_map(|(path, secret)| Some((path, secret?)))
}

fn check_secrets(resolved: &Resolved) -> Result<(), ConfigError> {
    secrets(resolved).try_for_each(|(path, secret)| {
        let help = "leave it out, or give it 32 random bytes (openssl rand -hex 32)";
        require(!secret.0.is_empty(), || format!("{path} is empty"), help)
    })
}

fn check_demo(resolved: &Resolved) -> Result<(), ConfigError> {
    let admin = &resolved.config.node.admin;
    let is_open = resolved.demo && admin.api_key.is_none();
    require(
        !is_open || admin.listen.0.ip().is_loopback(),
        || format!("--demo without a key opens the API to anyone who reaches {}", admin.listen.0),
        "keep admin.listen on loopback, or set RINGMAIN_API_KEY",
    )
}

fn check_namespace(path: &str, namespace: &NamespaceConfig) -> Result<(), ConfigError> {
    require(
        namespace.history_size == 0 || namespace.history_meta_ttl_ms >= namespace.history_ttl_ms,
        || {
            format!(
                "{path}.history_meta_ttl_ms = {} is less than {path}.history_ttl_ms = {}",
                namespace.history_meta_ttl_ms, namespace.history_ttl_ms
            )
        },
        "a channel's position has to outlive its history: raise history_meta_ttl_ms",
    )?;
    require(
        namespace.history_size > 0 || namespace.force_recovery_mode == RecoveryMode::Stream,
        || format!("{path}.force_recovery_mode = \"cache\" needs a history, but {path}.history_size = 0"),
        "set history_size to 1 or more",
    )?;
    require(
        namespace.join_leave || !namespace.force_push_join_leave,
        || format!("{path}.force_push_join_leave = true needs {path}.join_leave = true"),
        "set join_leave, or leave force_push_join_leave out",
    )?;
    check_anonymous(path, namespace)
}

/// `..._for_anonymous` widens another permission and means nothing alone.
fn check_anonymous(path: &str, namespace: &NamespaceConfig) -> Result<(), ConfigError> {
    let NamespaceConfig { allow_subscribe_for_client, .. } = *namespace;
    let publish = namespace.allow_publish_for_client || namespace.allow_publish_for_subscriber;
    let history = namespace.allow_history_for_client || namespace.allow_history_for_subscriber;
    let presence = namespace.allow_presence_for_client || namespace.allow_presence_for_subscriber;
    let permissions = [
        ("subscribe", namespace.allow_subscribe_for_anonymous, allow_subscribe_for_client),
        ("publish", namespace.allow_publish_for_anonymous, publish),
        ("history", namespace.allow_history_for_anonymous, history),
        ("presence", namespace.allow_presence_for_anonymous, presence),
    ];
    permissions.into_iter().try_for_each(|(what, for_anonymous, for_others)| {
        require(
            !for_anonymous || for_others,
            || format!("{path}.allow_{what}_for_anonymous = true does nothing alone"),
            "it widens allow_…_for_client or allow_…_for_subscriber: set one of them too",
        )
    })
}

/// What deserves a look though the node starts.
pub fn warnings(resolved: &Resolved) -> Vec<String> {
    let mut warnings = Vec::new();
    let admin = &resolved.config.node.admin;
    if resolved.demo {
        warnings.push("DEMO: anyone may connect, and read and write in room: without a token".to_owned());
        if admin.api_key.is_none() {
            warnings.push(format!("DEMO: the server API on {} answers without a key", admin.listen.0));
        }
    } else if resolved.config.core.client.allow_anonymous_connect_without_token {
        warnings.push(
            "clients may connect without a token (client.allow_anonymous_connect_without_token)".to_owned(),
        );
    }
    if !resolved.demo && admin.api_key.is_none() {
        warnings.push("the server API refuses every call: no admin.api_key (RINGMAIN_API_KEY)".to_owned());
    }
    if !admin.listen.0.ip().is_loopback() {
        warnings.push(format!("the admin port {} is not on loopback; it speaks plain HTTP", admin.listen.0));
    }
    for (path, secret) in secrets(resolved) {
        if secret.0.len() < SECRET_BYTES_MIN {
            warnings.push(format!("{path} is shorter than {SECRET_BYTES_MIN} bytes and may be guessed"));
        }
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::super::tests::resolved;
    use super::*;

    #[test]
    fn what_does_not_go_together_is_refused() {
        let check = |flags: &[&str], error: &str| {
            let found = resolved("", &[], flags, false).expect_err(error);
            assert_eq!(found.to_string(), error);
            assert!(!found.help().is_empty());
        };
        check(
            &["client.pong_timeout_ms=25000"],
            "client.pong_timeout_ms = 25000 is not less than client.ping_interval_ms = 25000",
        );
        check(
            &["server.drain_delay_ms=30000"],
            "server.drain_delay_ms = 30000 is not less than server.drain_timeout_ms = 30000",
        );
        check(&["server.listen="], "server.listen is empty");
        check(
            &["server.listen=127.0.0.1:1,127.0.0.1:1 proxy_protocol"],
            "server.listen names 127.0.0.1:1 twice",
        );
        check(
            &["limits.own_pool_bytes=65536"],
            "limits.own_pool_bytes = 65536 does not hold one client.own_queue_bytes_max = 1048576",
        );
        check(
            &["limits.log_pool_bytes=65536", "namespaces.a.presence=true"],
            "limits.log_pool_bytes = 65536 does not hold one channel.log_bytes_max = 262144",
        );
        check(
            &["limits.mesh_pool_bytes=262143"],
            "limits.mesh_pool_bytes = 262143 does not hold 4 of client.message_bytes_max = 65536",
        );
        check(
            &["admin.request_pool_bytes=1024"],
            "admin.request_pool_bytes = 1024 does not hold one admin.request_bytes_max = 4194304",
        );
        check(&["admin.api_key="], "admin.api_key is empty");
        check(&["subscription_token.hmac_secret="], "subscription_token.hmac_secret is empty");
        check(
            &["namespaces.a.history_size=0", "namespaces.a.force_recovery=true"],
            "namespaces.a.force_recovery = true needs a history, but namespaces.a.history_size = 0",
        );
        check(
            &["channel.history_size=0", "channel.allow_positioning=true"],
            "channel.allow_positioning = true needs a history, but channel.history_size = 0",
        );
        check(
            &["channel.history_size=0", "channel.force_recovery_mode=cache"],
            "channel.force_recovery_mode = \"cache\" needs a history, but channel.history_size = 0",
        );
        check(
            &["channel.history_ttl_ms=3600001"],
            "channel.history_meta_ttl_ms = 3600000 is less than channel.history_ttl_ms = 3600001",
        );
        check(
            &["channel.force_push_join_leave=true"],
            "channel.force_push_join_leave = true needs channel.join_leave = true",
        );
        check(
            &["namespaces.a.allow_publish_for_anonymous=true"],
            "namespaces.a.allow_publish_for_anonymous = true does nothing alone",
        );
    }

    #[test]
    fn history_size_zero_alone_makes_a_namespace_ephemeral() {
        let resolved = resolved("", &[], &["namespaces.cursor.history_size=0"], false).unwrap();
        let cursor = &resolved.config.core.namespaces["cursor"];
        assert!(!cursor.allow_positioning && !cursor.allow_recovery && !cursor.force_recovery);
        assert!(resolved.config.core.channel.force_recovery);
    }

    #[test]
    fn the_open_demo_stays_on_loopback() {
        let check = |flags: &[&str], ok: bool| {
            assert_eq!(resolved("", &[], flags, true).is_ok(), ok, "{flags:?}");
        };
        check(&[], true);
        check(&["admin.listen=[::1]:1"], true);
        check(&["admin.listen=0.0.0.0:8001"], false);
        check(&["admin.listen=10.0.0.1:8001"], false);
        check(&["admin.listen=0.0.0.0:8001", "admin.api_key=k"], true);
    }

    #[test]
    fn warnings_name_what_is_open_or_weak_and_no_secret() {
        let check = |flags: &[&str], demo: bool, expected: &[&str]| {
            let warnings = warnings(&resolved("", &[], flags, demo).unwrap());
            assert_eq!(warnings.len(), expected.len(), "{warnings:?}");
            for (warning, part) in warnings.iter().zip(expected) {
                assert!(warning.contains(part), "{warning}");
                assert!(!warning.contains("hunter2"), "{warning}");
            }
        };
        let key = "admin.api_key=0123456789abcdef0123456789abcdef";
        check(&[], false, &["RINGMAIN_API_KEY"]);
        check(&[key], false, &[]);
        check(&[key, "token.hmac_secret=hunter2"], false, &["token.hmac_secret is shorter"]);
        check(&[key, "admin.listen=0.0.0.0:1"], false, &["not on loopback"]);
        check(&[key, "client.allow_anonymous_connect_without_token=true"], false, &["without a token"]);
        check(&[], true, &["anyone may connect", "without a key"]);
        check(&[key], true, &["anyone may connect"]);
    }
}
