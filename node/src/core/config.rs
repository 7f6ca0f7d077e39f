//! What the core lets an operator choose.
//!
//! Owns the sections of the configuration file that sessions, channels and tokens read. The doc
//! comments here are the comments of `ringmain genconfig`, and the ranges are what `control` checks.
//! Parsing, files, flags and environment belong to `control`; the core only reads resolved values.
//! "0 means unlimited" does not exist.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The longest time that a key may name, in milliseconds: one year.
const YEAR_MS: u64 = 365 * 24 * 3_600 * 1_000;
/// The largest pool that a key may name, in bytes: 1 TiB, beyond any box.
const POOL_BYTES_MAX: u64 = 1 << 40;

/// Channels whose names begin so need a subscription token, whatever their namespace allows.
pub(crate) const PRIVATE_PREFIX: char = '$';

/// Everything the core reads. Built once, shared by all shards.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CoreConfig {
    /// Connections and sessions.
    pub client: ClientConfig,
    /// Keys that verify connection tokens.
    pub token: TokenConfig,
    /// Keys that verify subscription tokens, where they differ from `[token]`.
    pub subscription_token: Option<TokenConfig>,
    /// Options of channels whose name has no namespace.
    pub channel: NamespaceConfig,
    /// Options of channels named `namespace:rest`, by namespace. A channel of a namespace that is
    /// not listed does not exist (error 102).
    pub namespaces: BTreeMap<String, NamespaceConfig>,
    /// Maxima of one shard.
    pub limits: LimitsConfig,
}

impl Default for CoreConfig {
    /// With the namespaces that personal channels and the broadcast channel live in: positioned, with
    /// history, and clients may not publish there.
    fn default() -> Self {
        let own = ["user", "broadcast"].map(|name| (name.to_owned(), NamespaceConfig::default()));
        Self {
            client: ClientConfig::default(),
            token: TokenConfig::default(),
            subscription_token: None,
            channel: NamespaceConfig::default(),
            namespaces: own.into(),
            limits: LimitsConfig::default(),
        }
    }
}

/// Connections and sessions.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ClientConfig {
    /// Accept connect without a token, as the anonymous user (empty id).
    pub allow_anonymous_connect_without_token: bool,
    /// Subscribe every connection of an authenticated user to `user:ID` on connect.
    pub personal_channel: bool,
    /// Subscribe every connection to `broadcast:global` on connect.
    pub broadcast_channel: bool,
    /// Origins that browsers may connect from, with `*` as wildcard. The page's own host is always
    /// allowed, and so is a client that sends no Origin.
    pub allowed_origins: Vec<String>,
    /// Interval of pings to clients, in milliseconds.
    #[schemars(range(min = 1_000, max = 3_600_000))]
    pub ping_interval_ms: u64,
    /// How long a client may take to answer a ping, in milliseconds. Less than the interval.
    #[schemars(range(min = 100, max = 600_000))]
    pub pong_timeout_ms: u64,
    /// How long a connection may take from accept to the end of its WebSocket handshake, in milliseconds.
    #[schemars(range(min = 100, max = 600_000))]
    pub handshake_timeout_ms: u64,
    /// How long a connection may take from its handshake to a successful connect command, in milliseconds.
    #[schemars(range(min = 100, max = 600_000))]
    pub stale_close_delay_ms: u64,
    /// How long a connection is kept after its token expired, waiting for a refresh, in milliseconds.
    #[schemars(range(min = 0, max = 3_600_000))]
    pub expired_close_delay_ms: u64,
    /// The same for a subscription, in milliseconds.
    #[schemars(range(min = 0, max = 3_600_000))]
    pub expired_sub_close_delay_ms: u64,
    /// How long a peer may take to read its last bytes once its connection closes, in milliseconds.
    #[schemars(range(min = 100, max = 60_000))]
    pub close_timeout_ms: u64,
    /// How long an unfinished frame or message may stay unfinished, in milliseconds (then 1008).
    #[schemars(range(min = 100, max = 600_000))]
    pub frame_timeout_ms: u64,
    /// Subscriptions of one connection at the most. Those to `user:ID` and `broadcast:global` that every
    /// connection gets do not count.
    #[schemars(range(min = 1, max = 100_000))]
    pub channel_limit: u32,
    /// Length of a channel's name at the most, in bytes.
    #[schemars(range(min = 1, max = 255))]
    pub channel_bytes_max: u32,
    /// Length of a user's id at the most, in bytes.
    #[schemars(range(min = 1, max = 255))]
    pub user_bytes_max: u32,
    /// Size of a client's message at the most, in bytes (above: 1009).
    #[schemars(range(min = 1_024, max = 16_777_216))]
    pub message_bytes_max: u32,
    /// Publications in one history reply at the most.
    #[schemars(range(min = 1, max = 10_000))]
    pub history_publications_max: u32,
    /// Publications in one recovery at the most; who missed more is not recovered.
    #[schemars(range(min = 1, max = 10_000))]
    pub recovery_publications_max: u32,
    /// Bytes waiting in one connection's own queue at the most (replies, direct messages; then 3008).
    #[schemars(range(min = 4_096, max = 1_073_741_824))]
    pub own_queue_bytes_max: u32,
    /// Commands of one connection that wait for another shard or for the bus at the most (then 111).
    #[schemars(range(min = 1, max = 65_536))]
    pub pending_commands_max: u32,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            allow_anonymous_connect_without_token: false,
            personal_channel: true,
            broadcast_channel: true,
            allowed_origins: Vec::new(),
            ping_interval_ms: 25_000,
            pong_timeout_ms: 8_000,
            handshake_timeout_ms: 10_000,
            stale_close_delay_ms: 10_000,
            expired_close_delay_ms: 25_000,
            expired_sub_close_delay_ms: 25_000,
            close_timeout_ms: 5_000,
            frame_timeout_ms: 30_000,
            channel_limit: 128,
            channel_bytes_max: 255,
            user_bytes_max: 255,
            message_bytes_max: 65_536,
            history_publications_max: 300,
            recovery_publications_max: 300,
            own_queue_bytes_max: 1024 * 1024,
            pending_commands_max: 1024,
        }
    }
}

/// Keys that verify tokens. Without any, every token is refused.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TokenConfig {
    /// Secret of HS256, HS384 and HS512.
    pub hmac_secret: Option<Secret>,
    /// PEM public key of RS256, RS384, RS512 and the PS family.
    pub rsa_public_key: Option<String>,
    /// PEM public key of ES256 and ES384.
    pub ecdsa_public_key: Option<String>,
    /// PEM public key of EdDSA (Ed25519).
    pub eddsa_public_key: Option<String>,
    /// Required `aud` claim.
    pub audience: Option<String>,
    /// Required `iss` claim.
    pub issuer: Option<String>,
}

/// A value that never shows in logs or in `ringmain check`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
#[schemars(extend("writeOnly" = true))]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Options of the channels of one namespace.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NamespaceConfig {
    /// Publications kept per channel. 0 makes the namespace ephemeral: no history, no offsets, at
    /// most once.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub history_size: u32,
    /// How long a publication is kept, in milliseconds.
    #[schemars(range(min = 1_000, max = YEAR_MS))]
    pub history_ttl_ms: u64,
    /// How long a channel's position (epoch and offset) outlives its last use, in milliseconds.
    #[schemars(range(min = 1_000, max = YEAR_MS))]
    pub history_meta_ttl_ms: u64,
    /// Clients may ask for a positioned subscription.
    pub allow_positioning: bool,
    /// Every subscription is positioned.
    pub force_positioning: bool,
    /// Clients may ask for recovery.
    pub allow_recovery: bool,
    /// Every subscription is recoverable.
    pub force_recovery: bool,
    /// What recovery gives: every missed publication, or only the latest.
    pub force_recovery_mode: RecoveryMode,
    /// Keep track of who is in a channel.
    pub presence: bool,
    /// Announce who joins and leaves.
    pub join_leave: bool,
    /// Send joins and leaves to every subscriber, not only to those who ask.
    pub force_push_join_leave: bool,
    /// Authenticated users may subscribe without a subscription token.
    pub allow_subscribe_for_client: bool,
    /// The anonymous user may subscribe too (with `allow_subscribe_for_client`).
    pub allow_subscribe_for_anonymous: bool,
    /// Subscribers may publish.
    pub allow_publish_for_subscriber: bool,
    /// Any authenticated user may publish.
    pub allow_publish_for_client: bool,
    /// The anonymous user may publish too (with one of the other two).
    pub allow_publish_for_anonymous: bool,
    /// Subscribers may read history.
    pub allow_history_for_subscriber: bool,
    /// Any authenticated user may read history.
    pub allow_history_for_client: bool,
    /// The anonymous user may read history too (with one of the other two).
    pub allow_history_for_anonymous: bool,
    /// Subscribers may read presence.
    pub allow_presence_for_subscriber: bool,
    /// Any authenticated user may read presence.
    pub allow_presence_for_client: bool,
    /// The anonymous user may read presence too (with one of the other two).
    pub allow_presence_for_anonymous: bool,
    /// What happens to a subscriber that falls behind the channel's log.
    pub slow_consumer: SlowConsumer,
    /// A reader is stalled when its socket takes no byte for this long while bytes wait, in milliseconds.
    #[schemars(range(min = 100, max = 600_000))]
    pub stall_ms: u64,
    /// Bytes that a channel's log keeps for subscribers who are behind, per codec, at the most.
    #[schemars(range(min = 16_384, max = 1_073_741_824))]
    pub log_bytes_max: u32,
    /// Channels of a high priority are served before the others in each turn of the loop.
    pub priority: Priority,
}

impl Default for NamespaceConfig {
    fn default() -> Self {
        Self {
            history_size: 100,
            history_ttl_ms: 300_000,
            history_meta_ttl_ms: 3_600_000,
            allow_positioning: true,
            force_positioning: false,
            allow_recovery: true,
            force_recovery: true,
            force_recovery_mode: RecoveryMode::Stream,
            presence: false,
            join_leave: false,
            force_push_join_leave: false,
            allow_subscribe_for_client: false,
            allow_subscribe_for_anonymous: false,
            allow_publish_for_subscriber: false,
            allow_publish_for_client: false,
            allow_publish_for_anonymous: false,
            allow_history_for_subscriber: false,
            allow_history_for_client: false,
            allow_history_for_anonymous: false,
            allow_presence_for_subscriber: false,
            allow_presence_for_client: false,
            allow_presence_for_anonymous: false,
            slow_consumer: SlowConsumer::Replay,
            stall_ms: 10_000,
            log_bytes_max: 256 * 1024,
            priority: Priority::Normal,
        }
    }
}

/// What recovery gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RecoveryMode {
    /// Every publication that was missed, or none and a flag.
    #[default]
    Stream,
    /// The latest publication.
    Cache,
}

/// What happens to a subscriber that falls behind the tail of a channel's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SlowConsumer {
    /// Catch up from history; where history does not reach, be told (unsubscribe 2500).
    #[default]
    Replay,
    /// Skip to the newest publication per tag `key`, or per channel.
    Latest,
    /// Be disconnected (3008), also when merely stalled.
    Close,
}

/// Order of service among channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Served first.
    High,
    /// Served in order of arrival.
    #[default]
    Normal,
}

/// Maxima of one shard. Their sum, plus slots times the fixed bytes, is the worst case that
/// `ringmain check` adds up.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Connections of one shard at the most (its direct-descriptor table; RLIMIT_NOFILE caps it).
    #[schemars(range(min = 1, max = 1_048_576))]
    pub connections_per_shard: u32,
    /// Channels known to one shard at the most (then 106 to subscribers and publishers).
    #[schemars(range(min = 1, max = 16_777_216))]
    pub channels_per_shard: u32,
    /// Bytes in own queues at the most (then the reader stalled longest is closed with 3008).
    #[schemars(range(min = 65_536, max = POOL_BYTES_MAX))]
    pub own_pool_bytes: u64,
    /// Bytes in channel logs at the most (then the longest log is cut).
    #[schemars(range(min = 65_536, max = POOL_BYTES_MAX))]
    pub log_pool_bytes: u64,
    /// Bytes in histories at the most (then the oldest entries go).
    #[schemars(range(min = 65_536, max = POOL_BYTES_MAX))]
    pub history_pool_bytes: u64,
    /// Bytes in partial frames and handshakes at the most (then the slowest is closed with 1008).
    #[schemars(range(min = 65_536, max = POOL_BYTES_MAX))]
    pub partial_pool_bytes: u64,
    /// Bytes of presence and of users' infos at the most (then 111 to those who would add to them).
    #[schemars(range(min = 65_536, max = POOL_BYTES_MAX))]
    pub info_pool_bytes: u64,
    /// Bytes that wait for other shards or are on their way to them at the most, relays included (then
    /// publishes are refused with 111, and relays cut).
    #[schemars(range(min = 65_536, max = POOL_BYTES_MAX))]
    pub mesh_pool_bytes: u64,
    /// Messages that wait for one other shard at the most (then publishes are refused).
    #[schemars(range(min = 16, max = 16_777_216))]
    pub mesh_pending_max: u32,
    /// Batches of one shard in another's inbox at the most.
    #[schemars(range(min = 1, max = 1_024))]
    pub mesh_credits: u32,
    /// Commands of the control plane in a shard's inbox at the most (then 503).
    #[schemars(range(min = 16, max = 1_048_576))]
    pub control_inbox_max: u32,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            connections_per_shard: 65_536,
            channels_per_shard: 1_000_000,
            own_pool_bytes: 128 * 1024 * 1024,
            log_pool_bytes: 128 * 1024 * 1024,
            history_pool_bytes: 512 * 1024 * 1024,
            partial_pool_bytes: 64 * 1024 * 1024,
            info_pool_bytes: 128 * 1024 * 1024,
            mesh_pool_bytes: 64 * 1024 * 1024,
            mesh_pending_max: 65_536,
            mesh_credits: 4,
            control_inbox_max: 4_096,
        }
    }
}

impl CoreConfig {
    /// The options of a channel: those of its namespace, or of `[channel]` where its name has none.
    /// `None`: the namespace does not exist.
    pub fn namespace_of(&self, channel: &str) -> Option<&NamespaceConfig> {
        match namespace_name(channel) {
            "" => Some(&self.channel),
            namespace => self.namespaces.get(namespace),
        }
    }
}

/// The namespace in a channel's name; empty: it has none. The prefix of private channels is not part of it.
pub(crate) fn namespace_name(channel: &str) -> &str {
    let name = channel.strip_prefix(PRIVATE_PREFIX).unwrap_or(channel);
    name.split_once(':').map_or("", |(namespace, _)| namespace)
}
