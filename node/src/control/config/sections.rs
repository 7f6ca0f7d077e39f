//! The sections of the configuration file that only the control plane and the wire read.
//!
//! Owns their fields, defaults and ranges; the core's sections are in [`crate::core::config`]. The
//! doc comments are the comments of `ringmain genconfig`.

use std::net::Ipv4Addr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::listen::{AdminListen, Listen};
use crate::core::config::Secret;
use crate::io::ListenSpec;

/// Everything of the file that the core does not read.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// The traffic listeners, the shards and their sockets.
    pub server: ServerConfig,
    /// The admin port: server API, health, readiness and metrics.
    pub admin: AdminConfig,
    /// What joins several nodes into one system.
    pub bus: BusConfig,
    /// This node among those that share the bus.
    pub cluster: ClusterConfig,
    /// Logs, written to standard error.
    pub log: LogConfig,
}

/// The traffic listeners, the shards and their sockets.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Addresses that clients connect to: `IP:PORT`, a range `IP:FIRST-LAST`, or `unix:/path`, each
    /// followed by ` proxy_protocol` where a proxy puts a PROXY header (v1 or v2) in front.
    #[schemars(extend("x-alias" = "listen"))]
    pub listen: Vec<Listen>,
    /// Name of this node in `info`; the host's name where it is not given.
    pub name: Option<String>,
    /// Shards, each a thread with its own connections. Without it: one per CPU in `cpus`, or one per
    /// CPU that the process may use.
    #[schemars(range(min = 1, max = 1_024), extend("x-alias" = "shards"))]
    pub shards: Option<u16>,
    /// CPUs that the shards are pinned to, in turn. Empty: those that the process may use.
    #[schemars(inner(range(min = 0, max = 4_095)))]
    pub cpus: Vec<u16>,
    /// Send buffer of a client's socket (SO_SNDBUF), in bytes. The kernel accounts for twice as much.
    #[schemars(range(min = 4_096, max = 16_777_216))]
    pub send_buffer_bytes: u32,
    /// Receive buffer of a client's socket (SO_RCVBUF), in bytes. The kernel accounts for twice as much.
    #[schemars(range(min = 4_096, max = 16_777_216))]
    pub receive_buffer_bytes: u32,
    /// Bytes not yet sent above which a socket counts as full (TCP_NOTSENT_LOWAT).
    #[schemars(range(min = 4_096, max = 16_777_216))]
    pub tcp_notsent_lowat_bytes: u32,
    /// How long sent bytes may stay unacknowledged before the kernel gives the connection up
    /// (TCP_USER_TIMEOUT), in milliseconds.
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub tcp_user_timeout_ms: u32,
    /// Connections that wait in each listening socket to be accepted (listen(2)); net.core.somaxconn
    /// caps it.
    #[schemars(range(min = 16, max = 65_535))]
    pub backlog: u32,
    /// How long a draining node is not ready but still accepts, in milliseconds: what a balancer takes
    /// to notice.
    #[schemars(range(min = 0, max = 600_000))]
    pub drain_delay_ms: u64,
    /// How long a drain takes at the most, `drain_delay_ms` included, in milliseconds. What is still
    /// connected then is cut.
    #[schemars(range(min = 100, max = 3_600_000))]
    pub drain_timeout_ms: u64,
    /// What the node may use at worst, in bytes, kernel memory of its sockets included. Without it:
    /// nine tenths of what is available at start. The node refuses to run where its maxima add up to
    /// more; maxima that are not set are made smaller to fit.
    #[schemars(range(min = 67_108_864, max = MEMORY_BYTES_MAX))]
    pub memory_budget_bytes: Option<u64>,
}

/// The largest memory budget that can be named, in bytes: 16 TiB.
const MEMORY_BYTES_MAX: u64 = 1 << 44;

impl ServerConfig {
    /// Listening sockets of each shard.
    pub fn listening_sockets(&self) -> usize {
        self.listen.iter().map(|listen| listen.address.sockets()).sum()
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        let address = ListenSpec::Tcp { ip: Ipv4Addr::LOCALHOST.into(), first: 8000, last: 8000 };
        Self {
            listen: vec![Listen { address, proxy_protocol: false }],
            name: None,
            shards: None,
            cpus: Vec::new(),
            send_buffer_bytes: 64 * 1024,
            receive_buffer_bytes: 32 * 1024,
            tcp_notsent_lowat_bytes: 32 * 1024,
            tcp_user_timeout_ms: 30_000,
            backlog: 4_096,
            drain_delay_ms: 5_000,
            drain_timeout_ms: 30_000,
            memory_budget_bytes: None,
        }
    }
}

/// The admin port: server API, health, readiness and metrics.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdminConfig {
    /// Address and port. Not for clients: keep it on loopback or on a private network.
    #[schemars(extend("x-alias" = "admin"))]
    pub listen: AdminListen,
    /// Key of the server API, sent as `X-API-Key`. Without it the API refuses every call (401).
    #[schemars(extend("x-alias" = "api_key"))]
    pub api_key: Option<Secret>,
    /// Size of a request's body at the most, in bytes (above: 413).
    #[schemars(range(min = 1_024, max = 67_108_864))]
    pub request_bytes_max: u32,
    /// Bytes of all requests' bodies under way at the most (above: 503).
    #[schemars(range(min = 1_024, max = REQUEST_POOL_BYTES_MAX))]
    pub request_pool_bytes: u64,
    /// Calls of the API under way at the most (above: 503).
    #[schemars(range(min = 1, max = 65_536))]
    pub inflight_max: u32,
    /// Connections to the admin port at the most; further ones wait in the kernel.
    #[schemars(range(min = 1, max = 65_536))]
    pub connections_max: u32,
}

/// The largest pool of request bodies that can be named, in bytes: 1 TiB.
const REQUEST_POOL_BYTES_MAX: u64 = 1 << 40;

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            listen: AdminListen(([127, 0, 0, 1], 8001).into()),
            api_key: None,
            request_bytes_max: 4 * 1024 * 1024,
            request_pool_bytes: 64 * 1024 * 1024,
            inflight_max: 1_024,
            connections_max: 1_024,
        }
    }
}

/// What joins several nodes into one system.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BusConfig {
    /// `memory`: none, this node alone, with its histories in its own memory. Else the brokers:
    /// `redis://host:6379`, `redis+cluster://host:7000,host:7001`, `redis+sentinel://host:26379,host:26380/mymaster`
    /// (`rediss…` for TLS), `nats://host:4222,host:4222` (`tls://`), `kafka://host:9092,host:9092/topic`
    /// (`kafkas://`). User and password may stand in it, percent-encoded; it is never shown.
    #[schemars(extend("x-alias" = "bus"))]
    pub url: BusUrl,
    /// What a node subscribes to: each channel that it has subscribers of, or the slot (one of 4,096) of each. By
    /// slot costs a node messages that it drops, and bears more than some 50,000 channels a node. The same on all nodes.
    pub interest: BusInterest,
    /// What a publish waits for on Redis: the master, or a replica too.
    pub durability: BusDurability,
}

/// This node among those that share the bus.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClusterConfig {
    /// Where clients reach this node and no other, as `wss://node-1.example.com/connection/websocket`: what
    /// `GET /v1/place?user=…` answers for users that belong here. Without it none do.
    pub address: Option<String>,
    /// This node's share of users, relative to the others'.
    #[schemars(range(min = 1, max = 1_000))]
    pub capacity: u32,
    /// Signs the tickets of `/v1/place`; the same on every node. Without it nobody is placed.
    pub ticket_key: Option<Secret>,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self { address: None, capacity: 100, ticket_key: None }
    }
}

/// What a node subscribes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BusInterest {
    /// Each channel; channels of users by slot.
    #[default]
    Channels,
    /// Slots.
    Slots,
}

/// What a publish waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BusDurability {
    /// The master. What a failover takes is published again by the node that was told, or told.
    #[default]
    Master,
    /// A replica too: a failover takes nothing.
    Replica,
}

/// Schemes of addresses that are built in.
const BUS_SCHEMES: [&str; 11] = [
    "redis",
    "rediss",
    "redis+cluster",
    "rediss+cluster",
    "redis+sentinel",
    "rediss+sentinel",
    "nats",
    "tls",
    "kafka",
    "kafkas",
    "memory",
];

/// Which bus.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum BusUrl {
    /// None: the embedded one.
    #[default]
    Memory,
    /// A broker's address, which may hold a password.
    Broker(String),
}

impl BusUrl {
    /// What comes before `://`; `memory` without.
    pub fn scheme(&self) -> &str {
        match self {
            Self::Memory => "memory",
            Self::Broker(url) => url.split_once("://").map_or("", |(scheme, _)| scheme),
        }
    }

    /// The address without user and password.
    pub fn shown(&self) -> String {
        let Self::Broker(url) = self else { return "memory".to_owned() };
        let Some((scheme, rest)) = url.split_once("://") else { return "***".to_owned() };
        let rest = rest.split('?').next().unwrap_or_default();
        match rest.rsplit_once('@') {
            Some((_, servers)) => format!("{scheme}://***@{servers}"),
            None => format!("{scheme}://{rest}"),
        }
    }
}

impl std::fmt::Debug for BusUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown())
    }
}

impl TryFrom<String> for BusUrl {
    type Error = String;

    /// Names the scheme only: the rest of an address may hold a password. The rest is read at the start.
    fn try_from(text: String) -> Result<Self, String> {
        match text.split_once("://") {
            None if text == "memory" => Ok(Self::Memory),
            Some(("memory", "")) => Ok(Self::Memory),
            Some((scheme, _)) if BUS_SCHEMES.contains(&scheme) && scheme != "memory" => {
                Ok(Self::Broker(text))
            }
            Some((scheme, _)) => Err(format!("bus `{scheme}://…` is none of {}", BUS_SCHEMES.join(", "))),
            None => Err("bus: expected `memory` or an address as redis://127.0.0.1:6379".to_owned()),
        }
    }
}

impl From<BusUrl> for String {
    fn from(url: BusUrl) -> Self {
        url.shown()
    }
}

/// Logs, written to standard error.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// What is logged.
    #[schemars(extend("x-alias" = "log"))]
    pub level: LogLevel,
    /// How a line looks.
    pub format: LogFormat,
}

/// What is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What should wake someone.
    Error,
    /// And what deserves a look.
    Warn,
    /// And starts, stops and changes of state.
    #[default]
    Info,
    /// And single requests of the admin port.
    Debug,
    /// And everything else.
    Trace,
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}
