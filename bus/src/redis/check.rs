//! What the servers' configuration gives up, for `ringmain check`.
//!
//! Owns: the questions and their words. Must not know: the bus.
//! Invariant: asks, never changes anything.

use std::rc::Rc;

use redis::Value;

use crate::backend::Warning;
use crate::redis::options::{Deployment, Durability, RedisOptions};
use crate::redis::topology::field;
use crate::redis::wire::{Connection, Dialer, WireError};

/// Asks every server or Sentinel that the options name. What cannot be reached or asked is a warning too.
pub async fn check(options: &RedisOptions) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let options = Rc::new(options.clone());
    let dialer = match Dialer::new(options.clone()) {
        Ok(dialer) => dialer,
        Err(error) => {
            return vec![Warning::new(format!("Redis: {error}"), "see the files that bus.url names")];
        }
    };
    let mut servers = options.servers.clone();
    if let Deployment::Sentinel { master } = &options.deployment {
        servers = behind_sentinels(&options, &dialer, master, &mut warnings).await;
    }
    for (host, port) in servers {
        let server = format!("Redis {host}:{port}");
        match dialer.server(&(host, port)).await {
            Err(error) => warnings.push(unreachable(&server, &error)),
            Ok(mut connection) => ask(&options, &mut connection, &server, &mut warnings).await,
        }
    }
    warnings
}

fn unreachable(server: &str, error: &WireError) -> Warning {
    Warning::new(format!("{server} cannot be reached: {error}"), "start it, or mend its address in bus.url")
}

async fn behind_sentinels(
    options: &RedisOptions,
    dialer: &Dialer,
    master: &str,
    warnings: &mut Vec<Warning>,
) -> Vec<(String, u16)> {
    let mut masters = Vec::new();
    for address in &options.servers {
        let server = format!("Sentinel {}:{}", address.0, address.1);
        let mut sentinel = match dialer.sentinel(address).await {
            Ok(sentinel) => sentinel,
            Err(error) => {
                warnings.push(unreachable(&server, &error));
                continue;
            }
        };
        match sentinel.ask(redis::cmd("SENTINEL").arg("MASTER").arg(master)).await {
            Err(error) => warnings.push(Warning::new(
                format!("{server} does not know {master}: {error}"),
                "mend the master's name in bus.url, or let this Sentinel monitor it",
            )),
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

async fn ask(options: &RedisOptions, connection: &mut Connection, server: &str, warnings: &mut Vec<Warning>) {
    let mut warn = |what: &str, mend: &str| warnings.push(Warning::new(format!("{server}: {what}"), mend));
    if setting(connection, "maxmemory").await.is_none() {
        return warn("CONFIG GET is not answered, so nothing could be checked", "allow this user CONFIG|GET");
    }
    let policy = setting(connection, "maxmemory-policy").await.unwrap_or_default();
    if policy.starts_with("allkeys") || policy.starts_with("volatile") {
        warn(
            "channels may be evicted: their positions are lost and clients are told",
            "CONFIG SET maxmemory-policy noeviction, which refuses publishes instead",
        );
    }
    let at_least = setting(connection, "min-replicas-to-write").await.unwrap_or_default();
    let is_fenced = at_least != "0" && !at_least.is_empty();
    if matches!(options.deployment, Deployment::Sentinel { .. }) && !is_fenced {
        warn(
            "a master that is cut off goes on taking publications that are lost when it returns",
            "CONFIG SET min-replicas-to-write 1",
        );
    }
    if options.durability == Durability::Master && options.deployment != Deployment::Single {
        warn(
            "a publication is lost, and told, if this master and the node that published it die together",
            "bus.durability = \"replica\", which waits for a replica",
        );
    }
    let shards = setting(connection, "cluster-allow-pubsubshard-when-down").await;
    if options.deployment == Deployment::Cluster && shards.as_deref() == Some("no") {
        warn(
            "subscriptions end while any slot has no owner",
            "CONFIG SET cluster-allow-pubsubshard-when-down yes",
        );
    }
}
