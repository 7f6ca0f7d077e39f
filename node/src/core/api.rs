//! What the control plane may ask of a shard, and what it answers.
//!
//! Owns the vocabulary between the admin API and the hub, free of HTTP and JSON shapes. Calls about
//! a channel go to its home shard ([`home_of`]); calls about a user go to every shard, and the
//! caller adds the answers up.

use std::sync::Arc;

use ringmain_proto::client::ClientId;
use ringmain_proto::close::ErrorCode;

use super::cluster::{ClusterCall, Report};
use super::engine::ShardIndex;

/// The token of what a shard tells unasked ([`Answer::Report`]): no call has it.
pub const REPORT_TOKEN: u64 = 0;

/// The home shard of a channel in a node of `shards` shards. Stable for one process.
pub fn home_of(channel: &str, shards: u16) -> ShardIndex {
    debug_assert!(shards > 0);
    let hash = hash_name(channel);
    ((u128::from(hash) * u128::from(shards)) >> 64) as ShardIndex
}

/// The process-wide hash of a channel's or user's name: seeded by a constant, so that shards agree.
pub fn hash_name(name: &str) -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = foldhash::quality::FixedState::with_seed(0x5249_4e47).build_hasher();
    hasher.write(name.as_bytes());
    hasher.finish()
}

/// A call of the control plane to one shard, answered once under the same token.
#[derive(Clone, Debug)]
pub struct ControlCommand {
    /// Given back with the answer.
    pub token: u64,
    /// What to do.
    pub call: Call,
}

/// The answer of one shard.
#[derive(Clone, Debug)]
pub struct ControlAnswer {
    /// The call's token.
    pub token: u64,
    /// Which shard answers.
    pub shard: ShardIndex,
    /// What came of it.
    pub result: Result<Answer, ErrorCode>,
}

/// Which connections of a user a call is about.
#[derive(Clone, Debug, Default)]
pub struct UserSelector {
    /// The user's id.
    pub user: Arc<str>,
    /// Only this client id, if given.
    pub client: Option<String>,
    /// Client ids left alone.
    pub whitelist: Vec<String>,
}

/// The calls. `Home` marks those for the channel's home shard, `Each` those for every shard.
#[derive(Clone, Debug)]
pub enum Call {
    /// Home: publish `data` (JSON). Answer: [`Answer::Published`].
    Publish {
        /// Target.
        channel: Arc<str>,
        /// One JSON value, kept byte for byte.
        data: Arc<[u8]>,
        /// Tags of the publication.
        tags: Vec<(String, String)>,
        /// Deliver without an entry in history (and so without an offset).
        skip_history: bool,
        /// Repeats under the same key answer with the first position.
        idempotency_key: Option<String>,
    },
    /// Each: subscribe the user's connections. Answer: [`Answer::Done`].
    Subscribe {
        /// Whose connections.
        selector: UserSelector,
        /// To which channel.
        channel: Arc<str>,
        /// Options of the subscription.
        options: SubscribeOptions,
    },
    /// Each: unsubscribe the user's connections; an empty channel means all. Answer: [`Answer::Done`].
    Unsubscribe {
        /// Whose connections.
        selector: UserSelector,
        /// From which channel.
        channel: Arc<str>,
    },
    /// Each: close the user's connections. Answer: [`Answer::Done`].
    Disconnect {
        /// Whose connections.
        selector: UserSelector,
        /// WebSocket close code.
        code: u16,
        /// Close reason, at most 123 bytes.
        reason: Arc<str>,
    },
    /// Each: set a new expiry for the user's connections. Answer: [`Answer::Done`].
    Refresh {
        /// Whose connections.
        selector: UserSelector,
        /// Close them with 3005 now.
        expired: bool,
        /// Seconds since the epoch; `None`: they no longer expire.
        expire_at: Option<u64>,
    },
    /// Home: who is in the channel. Answer: [`Answer::Presence`].
    Presence {
        /// Which channel.
        channel: Arc<str>,
    },
    /// Home: how many are in the channel. Answer: [`Answer::PresenceStats`].
    PresenceStats {
        /// Which channel.
        channel: Arc<str>,
    },
    /// Home: publications of the channel. Answer: [`Answer::History`].
    History {
        /// Which channel.
        channel: Arc<str>,
        /// How many at the most; 0: none (the position only); negative: as many as allowed.
        limit: i32,
        /// Only what follows this position (or precedes it, reversed).
        since: Option<(u64, String)>,
        /// Newest first.
        reverse: bool,
    },
    /// Home: forget the channel's history; offsets go on. Answer: [`Answer::Done`].
    HistoryRemove {
        /// Which channel.
        channel: Arc<str>,
    },
    /// Each: channels homed on this shard that have subscribers. Answer: [`Answer::Channels`].
    Channels {
        /// Glob pattern (`*` and `?`); empty: all.
        pattern: Arc<str>,
    },
    /// Each: figures of the shard. Answer: [`Answer::Info`].
    Info,
    /// Each: what the traffic port's `/ready` says from now on. Answer: [`Answer::Done`].
    Readiness {
        /// Green.
        ready: bool,
    },
    /// Each: refuse what is new, close what is there with 3001 at this pace. Answer: [`Answer::Done`].
    Drain {
        /// Connections closed per second by this shard.
        closes_per_second: u32,
    },
    /// What the cluster's services tell this shard. Never answered.
    Cluster(ClusterCall),
}

/// Options of a subscription made by the server.
#[derive(Clone, Debug, Default)]
pub struct SubscribeOptions {
    /// JSON shown as `chan_info` in presence and joins: at most [`ringmain_proto::limits::INFO_BYTES_MAX`]
    /// bytes, else error 107.
    pub info: Option<Vec<u8>>,
    /// JSON sent with the subscribe push.
    pub data: Option<Vec<u8>>,
    /// Expiry in seconds since the epoch.
    pub expire_at: Option<u64>,
    /// Overrides of the namespace's options.
    pub presence: Option<bool>,
    /// Announce this subscriber's join and leave.
    pub join_leave: Option<bool>,
    /// Send joins and leaves to this subscriber.
    pub push_join_leave: Option<bool>,
    /// Keep a position.
    pub position: Option<bool>,
    /// Allow recovery.
    pub recover: Option<bool>,
    /// Recover from here.
    pub recover_since: Option<(u64, String)>,
}

/// What a shard answers.
#[derive(Clone, Debug)]
pub enum Answer {
    /// Done, nothing to tell.
    Done,
    /// Accepted at this position; zero and empty where the channel has no history.
    Published {
        /// Offset of the publication.
        offset: u64,
        /// Epoch of the channel.
        epoch: String,
    },
    /// Members of a channel.
    Presence {
        /// Members, by client id.
        members: Vec<Member>,
        /// Another node did not answer in time.
        partial: bool,
    },
    /// Numbers of members and of distinct users.
    PresenceStats {
        /// Connections.
        num_clients: u32,
        /// Distinct users.
        num_users: u32,
        /// Another node did not answer in time.
        partial: bool,
    },
    /// A page of history.
    History {
        /// Canonical publication records (`ringmain_proto::record`), one after the other.
        records: Vec<u8>,
        /// The channel's top offset.
        offset: u64,
        /// The channel's epoch.
        epoch: String,
    },
    /// Channels with their numbers of subscribers on this node.
    Channels(Vec<(Arc<str>, u32)>),
    /// Figures of the shard.
    Info {
        /// Connections that completed connect.
        num_clients: u32,
        /// Distinct users, by 64-bit hash, so that shards can be added up.
        user_hashes: Vec<u64>,
        /// Channels homed on this shard with subscribers.
        num_channels: u32,
        /// Subscriptions.
        num_subs: u32,
    },
    /// What other nodes are to know, under [`REPORT_TOKEN`].
    Report(Arc<Report>),
}

/// One member of a channel's presence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The connection.
    pub client: ClientId,
    /// User id; empty when anonymous.
    pub user: String,
    /// JSON of the connection token's `info`.
    pub conn_info: Option<Vec<u8>>,
    /// JSON of the subscription token's `info`.
    pub chan_info: Option<Vec<u8>>,
}
