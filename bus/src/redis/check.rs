//! What the servers' configuration gives up, for `ringmain check`.
//!
//! Owns: the questions and their words. Must not know: the bus.
//! Invariant: asks, never changes anything.

use std::rc::Rc;

use redis::Value;

use crate::redis::options::{Deployment, Durability, RedisOptions};
use crate::redis::topology::field;
use crate::redis::wire::{Connection, Dialer};

/// Something that an operator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Of which server, or of all.
    pub server: String,
    /// What is given up, and what mends it.
    pub text: String,
}

/// Asks every server or Sentinel that the options name. What cannot be reached or asked is a warning too.
pub async fn check(options: &RedisOptions) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let options = Rc::new(options.clone());
    let dialer = match Dialer::new(options.clone()) {
        Ok(dialer) => dialer,
        Err(error) => return vec![Warning { server: "all".to_owned(), text: error.to_string() }],
    };
    let mut servers = options.servers.clone();
    if let Deployment::Sentinel { master } = &options.deployment {
        servers = behind_sentinels(&options, &dialer, master, &mut warnings).await;
    }
    for address in servers {
        let server = format!("{}:{}", address.0, address.1);
        let mut warn = |text: &str| warnings.push(Warning { server: server.clone(), text: text.to_owned() });
        match dialer.server(&address).await {
            Err(error) => warn(&format!("cannot be reached: {error}")),
            Ok(mut connection) => ask(&options, &mut connection, &mut warn).await,
        }
    }
    warnings
}

async fn behind_sentinels(
    options: &RedisOptions,
    dialer: &Dialer,
    master: &str,
    warnings: &mut Vec<Warning>,
) -> Vec<(String, u16)> {
    let mut masters = Vec::new();
    for address in &options.servers {
        let server = format!("{}:{}", address.0, address.1);
        let mut warn = |text: String| warnings.push(Warning { server: server.clone(), text });
        let mut sentinel = match dialer.sentinel(address).await {
            Ok(sentinel) => sentinel,
            Err(error) => {
                warn(format!("cannot be reached: {error}"));
                continue;
            }
        };
        match sentinel.ask(redis::cmd("SENTINEL").arg("MASTER").arg(master)).await {
            Err(error) => warn(format!("does not name {master}: {error}")),
            Ok(named) => {
                let port = field(&named, "port").and_then(|port| port.parse().ok());
                if let (Some(host), Some(port)) = (field(&named, "ip"), port)
                    && !masters.contains(&(host.clone(), port))
                {
                    masters.push((host, port));
                }
            }
        }
    }
    masters
}

async fn setting(connection: &mut Connection, name: &str) -> Option<String> {
    let value: Value = connection.ask(redis::cmd("CONFIG").arg("GET").arg(name)).await.ok()?;
    field(&value, name)
}

async fn ask(options: &RedisOptions, connection: &mut Connection, warn: &mut impl FnMut(&str)) {
    if setting(connection, "maxmemory").await.is_none() {
        return warn("does not answer CONFIG GET: nothing else could be checked");
    }
    let policy = setting(connection, "maxmemory-policy").await.unwrap_or_default();
    if policy.starts_with("allkeys") || policy.starts_with("volatile") {
        warn(
            "maxmemory-policy may evict channels: their positions are lost and clients are told. \
             `CONFIG SET maxmemory-policy noeviction` refuses publishes instead",
        );
    }
    let at_least = setting(connection, "min-replicas-to-write").await.unwrap_or_default();
    let is_fenced = at_least != "0" && !at_least.is_empty();
    if matches!(options.deployment, Deployment::Sentinel { .. }) && !is_fenced {
        warn(
            "min-replicas-to-write is 0: a master that was cut off goes on taking publications that are lost when it \
             returns. `CONFIG SET min-replicas-to-write 1`",
        );
    }
    if options.durability == Durability::Master && options.deployment != Deployment::Single {
        warn(
            "durability is the master's alone: a publication is lost, and told, if its master and the node that \
             published it die together. `durability = \"replica\"` waits for a replica",
        );
    }
    let shards = setting(connection, "cluster-allow-pubsubshard-when-down").await;
    if options.deployment == Deployment::Cluster && shards.as_deref() == Some("no") {
        warn("cluster-allow-pubsubshard-when-down is no: subscriptions end while any slot has no owner");
    }
}
