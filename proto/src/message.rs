//! What every client protocol decodes to and encodes from.
//!
//! Owns the vocabulary between a codec and the core: commands of a client, replies to them, pushes
//! to it. Must not know any wire format, and no policy: a value here is well-formed, not permitted.
//! Everything borrows from the message it was decoded from, so decoding a command allocates only
//! where a string carried escapes, and for the list of `connect.subs`.
//!
//! Invariants: `data`, `info` and `tags_filter` are opaque bytes, forwarded unchanged; over the JSON
//! protocol they hold exactly one complete JSON value. An empty `data` means that it was absent.

use std::borrow::Cow;

use crate::client::ClientId;

pub use crate::tags::{Tags, TagsBuf, TagsFull};

/// One command of a client.
#[derive(Clone, Debug, PartialEq)]
pub struct Command<'a> {
    /// Echoed in the reply; 0 means that the client gave none and expects no reply.
    pub id: u32,
    /// What is asked.
    pub request: Request<'a>,
}

/// The body of a [`Command`].
#[derive(Clone, Debug, PartialEq)]
pub enum Request<'a> {
    /// Authenticate and start the session. Boxed, as is subscribe: they are rare and large, and every
    /// command would be moved at their size.
    Connect(Box<ConnectRequest<'a>>),
    /// Join a channel.
    Subscribe(Box<SubscribeRequest<'a>>),
    /// Leave a channel.
    Unsubscribe {
        /// Channel name, unchecked.
        channel: Cow<'a, str>,
    },
    /// Publish into a channel.
    Publish {
        /// Channel name, unchecked.
        channel: Cow<'a, str>,
        /// Payload; empty when absent.
        data: &'a [u8],
    },
    /// Set or remove a key of a map channel (publish with `type` 1).
    MapPublish {
        /// Channel name, unchecked.
        channel: Cow<'a, str>,
        /// Payload; empty when absent.
        data: &'a [u8],
        /// The key is removed.
        removed: bool,
    },
    /// Who is in the channel.
    Presence {
        /// Channel name, unchecked.
        channel: Cow<'a, str>,
    },
    /// How many are in the channel.
    PresenceStats {
        /// Channel name, unchecked.
        channel: Cow<'a, str>,
    },
    /// Publications of the channel's history.
    History {
        /// Channel name, unchecked.
        channel: Cow<'a, str>,
        /// Publications wanted; 0: only the position, negative: as many as allowed.
        limit: i32,
        /// Only what follows this position (precedes it, when `reverse`).
        since: Option<SincePosition<'a>>,
        /// Newest first.
        reverse: bool,
    },
    /// Call a method of the application.
    Rpc {
        /// Method name; may be empty.
        method: Cow<'a, str>,
        /// Payload; empty when absent.
        data: &'a [u8],
    },
    /// An asynchronous message to the application; never answered.
    Send {
        /// Payload; empty when absent.
        data: &'a [u8],
    },
    /// A new connection token.
    Refresh {
        /// The token.
        token: Cow<'a, str>,
    },
    /// A new subscription token.
    SubRefresh {
        /// Channel name, unchecked.
        channel: Cow<'a, str>,
        /// The token.
        token: Cow<'a, str>,
    },
    /// The protocol's own ping command, which no server of this protocol takes.
    Ping,
    /// The empty command (no id, no body): the answer to a server's ping.
    Pong,
    /// An id, but no method that is known.
    Empty,
}

/// A stream position as a client names it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SincePosition<'a> {
    /// Offset of the last publication seen.
    pub offset: u64,
    /// Epoch that the offset belongs to; empty: not compared.
    pub epoch: Cow<'a, str>,
}

/// Body of a connect command.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConnectRequest<'a> {
    /// Connection token (JWT); empty when absent.
    pub token: Cow<'a, str>,
    /// Application payload; empty when absent.
    pub data: &'a [u8],
    /// Client library's name, as `js`.
    pub name: Cow<'a, str>,
    /// Client library's version.
    pub version: Cow<'a, str>,
    /// Server-side subscriptions that the client wants recovered: channel and position. At most
    /// [`CONNECT_SUBS_MAX`](crate::limits::CONNECT_SUBS_MAX); each channel once.
    pub subs: Vec<(Cow<'a, str>, SubscribeRequest<'a>)>,
    /// Feature bits; none is known yet.
    pub flag: i64,
}

/// Body of a subscribe command, and an entry of `connect.subs` (there `channel` is empty: the key
/// names it).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SubscribeRequest<'a> {
    /// Channel name, unchecked.
    pub channel: Cow<'a, str>,
    /// Subscription token (JWT); empty when absent.
    pub token: Cow<'a, str>,
    /// Application payload; empty when absent.
    pub data: &'a [u8],
    /// Asks for a positioned subscription.
    pub positioned: bool,
    /// Asks for a recoverable subscription.
    pub recoverable: bool,
    /// Asks for joins and leaves.
    pub join_leave: bool,
    /// Feature bits; 2: answer error 112 when the position cannot be recovered.
    pub flag: i64,
    /// Recover from `offset` and `epoch`.
    pub recover: bool,
    /// Offset of the last publication seen.
    pub offset: u64,
    /// Epoch of that offset; empty: not compared.
    pub epoch: Cow<'a, str>,
    /// Delta algorithm asked for (`fossil`); empty when absent.
    pub delta: Cow<'a, str>,
    /// The tag filter `tf`, undecoded; `None` when absent.
    pub tags_filter: Option<&'a [u8]>,
    /// Subscription kind (`type`); 0 is a stream.
    pub kind: i64,
}

/// Who published, joined or left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientInfo<'a> {
    /// User id; empty when anonymous.
    pub user: &'a str,
    /// The connection.
    pub client: ClientId,
    /// `info` of the connection token.
    pub conn_info: Option<&'a [u8]>,
    /// `info` of the subscription token.
    pub chan_info: Option<&'a [u8]>,
}

/// A publication of a channel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Publication<'a> {
    /// Position in the stream; 0 when the channel has no history.
    pub offset: u64,
    /// Payload, forwarded byte for byte.
    pub data: &'a [u8],
    /// Publisher; absent for publications of the server API.
    pub info: Option<ClientInfo<'a>>,
    /// Tags, for filters and for the application.
    pub tags: Tags<'a>,
    /// Milliseconds since 1970; 0 when absent.
    pub time_ms: i64,
    /// Carried where the epoch may be new to subscribers.
    pub epoch: Option<Cow<'a, str>>,
}

/// The answer to a command with an id.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply<'a> {
    /// The command failed; the connection goes on.
    Error {
        /// See [`ErrorCode`](crate::close::ErrorCode); applications may use their own.
        code: u32,
        /// Human-readable.
        message: &'a str,
        /// Whether the client should try again.
        temporary: bool,
    },
    /// Answer to connect.
    Connect(ConnectResult<'a>),
    /// Answer to subscribe.
    Subscribe(SubscribeResult<'a>),
    /// Answer to unsubscribe.
    Unsubscribe,
    /// Answer to publish.
    Publish,
    /// Answer to presence, keyed by client id on the wire.
    Presence(&'a [ClientInfo<'a>]),
    /// Answer to presence_stats.
    PresenceStats {
        /// Connections in the channel.
        num_clients: u32,
        /// Distinct users in the channel.
        num_users: u32,
    },
    /// Answer to history.
    History(HistoryResult<'a>),
    /// Answer to rpc.
    Rpc {
        /// Payload; empty when absent.
        data: &'a [u8],
    },
    /// Answer to refresh.
    Refresh(RefreshResult<'a>),
    /// Answer to sub_refresh (`client` and `version` are not part of it).
    SubRefresh(RefreshResult<'a>),
}

/// Result of connect, and body of a connect push.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ConnectResult<'a> {
    /// Client id given to this connection.
    pub client: &'a str,
    /// Server version.
    pub version: &'a str,
    /// Whether the connection expires.
    pub expires: bool,
    /// Seconds until it does.
    pub ttl: u32,
    /// Application payload; empty when absent.
    pub data: &'a [u8],
    /// Server-side subscriptions.
    pub subs: &'a [(&'a str, SubscribeResult<'a>)],
    /// Seconds between server pings; 0: omitted, no protocol pings.
    pub ping: u32,
    /// Whether the client must answer pings.
    pub pong: bool,
}

/// Result of subscribe.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SubscribeResult<'a> {
    /// Whether the subscription expires.
    pub expires: bool,
    /// Seconds until it does.
    pub ttl: u32,
    /// The client may recover this subscription.
    pub recoverable: bool,
    /// The subscription has a position.
    pub positioned: bool,
    /// Epoch of the stream.
    pub epoch: Cow<'a, str>,
    /// Offset that the client is at before `publications`.
    pub offset: u64,
    /// What was missed, oldest first.
    pub publications: &'a [Publication<'a>],
    /// All that was missed is here.
    pub recovered: bool,
    /// The client asked to recover.
    pub was_recovering: bool,
    /// Application payload; empty when absent.
    pub data: &'a [u8],
    /// Delta compression is on.
    pub delta: bool,
}

/// Result of history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistoryResult<'a> {
    /// The page, in the order asked for.
    pub publications: &'a [Publication<'a>],
    /// Epoch of the stream.
    pub epoch: Cow<'a, str>,
    /// Top offset of the stream.
    pub offset: u64,
}

/// Result of refresh and sub_refresh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefreshResult<'a> {
    /// Client id; omitted when empty.
    pub client: &'a str,
    /// Server version; omitted when empty.
    pub version: &'a str,
    /// Whether it expires again.
    pub expires: bool,
    /// Seconds until it does.
    pub ttl: u32,
}

/// What the server sends on its own account.
#[derive(Clone, Debug, PartialEq)]
pub enum Push<'a> {
    /// A publication of a channel.
    Publication {
        /// Where.
        channel: &'a str,
        /// What.
        publication: &'a Publication<'a>,
    },
    /// Someone subscribed.
    Join {
        /// Where.
        channel: &'a str,
        /// Who.
        info: ClientInfo<'a>,
    },
    /// Someone left.
    Leave {
        /// Where.
        channel: &'a str,
        /// Who.
        info: ClientInfo<'a>,
    },
    /// The server ended a subscription.
    Unsubscribe {
        /// Which; empty: all of them.
        channel: &'a str,
        /// See [`UnsubscribeReason`](crate::close::UnsubscribeReason).
        code: u32,
        /// Human-readable.
        reason: &'a str,
    },
    /// The server made a subscription.
    Subscribe {
        /// Which.
        channel: &'a str,
        /// As in [`SubscribeResult::recoverable`].
        recoverable: bool,
        /// As in [`SubscribeResult::positioned`].
        positioned: bool,
        /// Epoch of the stream.
        epoch: Cow<'a, str>,
        /// Top offset of the stream.
        offset: u64,
        /// Application payload; empty when absent.
        data: &'a [u8],
    },
    /// A message to this connection, outside of any channel.
    Message {
        /// Payload.
        data: &'a [u8],
    },
    /// The connection is about to be closed (unidirectional transports).
    Disconnect {
        /// Close code.
        code: u32,
        /// Close reason.
        reason: &'a str,
        /// Whether the client should come back.
        reconnect: bool,
    },
    /// The server renewed the connection's expiry.
    Refresh {
        /// Whether it expires again.
        expires: bool,
        /// Seconds until it does.
        ttl: u32,
    },
    /// The session began (unidirectional transports).
    Connect(ConnectResult<'a>),
    /// The protocol's ping.
    Ping,
}
