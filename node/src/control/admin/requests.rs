//! Bodies of the server API's requests, as Centrifugo's HTTP API defines them.
//!
//! Owns their shapes only. Fields that are not known are ignored, as there; fields that would change
//! the meaning and are not built are here so that [`super::methods`] can refuse them.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// A JSON value kept as its text. `null` is a value; only an absent field is `None`.
pub(super) type Json<'a> = Option<&'a RawValue>;

fn json<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Json<'a>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// A text that is borrowed where it has no escapes. `null` is empty.
type Text<'a> = Cow<'a, str>;

/// `publish`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Publish<'a> {
    #[serde(borrow)]
    pub channel: Text<'a>,
    #[serde(borrow, deserialize_with = "json")]
    pub data: Json<'a>,
    #[serde(borrow)]
    pub b64data: Text<'a>,
    pub skip_history: bool,
    pub tags: Option<BTreeMap<String, String>>,
    #[serde(borrow)]
    pub idempotency_key: Text<'a>,
    pub version: u64,
}

/// `broadcast`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Broadcast<'a> {
    #[serde(borrow)]
    pub channels: Vec<Text<'a>>,
    #[serde(borrow, deserialize_with = "json")]
    pub data: Json<'a>,
    #[serde(borrow)]
    pub b64data: Text<'a>,
    pub skip_history: bool,
    pub tags: Option<BTreeMap<String, String>>,
    #[serde(borrow)]
    pub idempotency_key: Text<'a>,
    pub version: u64,
}

/// A position in a stream.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Position {
    pub offset: u64,
    pub epoch: String,
}

/// A truth value that may be absent, as protobuf's wrapper types write it.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct BoolValue {
    pub value: bool,
}

/// Options of the namespace that a subscription overrides.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Override {
    pub presence: Option<BoolValue>,
    pub join_leave: Option<BoolValue>,
    pub force_recovery: Option<BoolValue>,
    pub force_positioning: Option<BoolValue>,
    pub force_push_join_leave: Option<BoolValue>,
}

/// `subscribe`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Subscribe<'a> {
    #[serde(borrow)]
    pub channel: Text<'a>,
    #[serde(borrow)]
    pub user: Text<'a>,
    pub expire_at: i64,
    #[serde(borrow, deserialize_with = "json")]
    pub info: Json<'a>,
    #[serde(borrow)]
    pub b64info: Text<'a>,
    #[serde(borrow)]
    pub client: Text<'a>,
    #[serde(borrow, deserialize_with = "json")]
    pub data: Json<'a>,
    #[serde(borrow)]
    pub b64data: Text<'a>,
    pub recover_since: Option<Position>,
    #[serde(rename = "override")]
    pub overrides: Option<Override>,
    #[serde(borrow)]
    pub session: Text<'a>,
}

/// `unsubscribe`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Unsubscribe<'a> {
    #[serde(borrow)]
    pub channel: Text<'a>,
    #[serde(borrow)]
    pub user: Text<'a>,
    #[serde(borrow)]
    pub client: Text<'a>,
    #[serde(borrow)]
    pub session: Text<'a>,
}

/// A close code and reason.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CloseWith<'a> {
    pub code: u32,
    #[serde(borrow)]
    pub reason: Text<'a>,
}

/// `disconnect`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Disconnect<'a> {
    #[serde(borrow)]
    pub user: Text<'a>,
    #[serde(borrow)]
    pub disconnect: Option<CloseWith<'a>>,
    #[serde(borrow)]
    pub client: Text<'a>,
    pub whitelist: Option<Vec<String>>,
    #[serde(borrow)]
    pub session: Text<'a>,
}

/// `refresh`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Refresh<'a> {
    #[serde(borrow)]
    pub user: Text<'a>,
    #[serde(borrow)]
    pub client: Text<'a>,
    pub expired: bool,
    pub expire_at: i64,
    #[serde(borrow, deserialize_with = "json")]
    pub info: Json<'a>,
    #[serde(borrow)]
    pub session: Text<'a>,
}

/// `presence`, `presence_stats` and `history_remove`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct OfChannel<'a> {
    #[serde(borrow)]
    pub channel: Text<'a>,
}

/// `history`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct History<'a> {
    #[serde(borrow)]
    pub channel: Text<'a>,
    pub limit: i32,
    pub since: Option<Position>,
    pub reverse: bool,
}

/// `channels`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Channels<'a> {
    #[serde(borrow)]
    pub pattern: Text<'a>,
}

/// `info`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Info {}

/// `rpc`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Rpc<'a> {
    #[serde(borrow)]
    pub method: Text<'a>,
}

/// `batch`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Batch<'a> {
    #[serde(borrow)]
    pub commands: Vec<Command<'a>>,
    pub parallel: bool,
}

/// One command of a batch: the first field that is there, in this order.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Command<'a> {
    #[serde(borrow)]
    pub publish: Option<Publish<'a>>,
    #[serde(borrow)]
    pub broadcast: Option<Broadcast<'a>>,
    #[serde(borrow)]
    pub subscribe: Option<Subscribe<'a>>,
    #[serde(borrow)]
    pub unsubscribe: Option<Unsubscribe<'a>>,
    #[serde(borrow)]
    pub disconnect: Option<Disconnect<'a>>,
    #[serde(borrow)]
    pub history: Option<History<'a>>,
    #[serde(borrow)]
    pub history_remove: Option<OfChannel<'a>>,
    #[serde(borrow)]
    pub presence: Option<OfChannel<'a>>,
    #[serde(borrow)]
    pub presence_stats: Option<OfChannel<'a>>,
    pub info: Option<Info>,
    #[serde(borrow)]
    pub rpc: Option<Rpc<'a>>,
    #[serde(borrow)]
    pub refresh: Option<Refresh<'a>>,
    #[serde(borrow)]
    pub channels: Option<Channels<'a>>,
}

/// A call of the API, whichever way it came.
#[derive(Debug)]
pub(super) enum Request<'a> {
    Publish(Publish<'a>),
    Broadcast(Broadcast<'a>),
    Subscribe(Subscribe<'a>),
    Unsubscribe(Unsubscribe<'a>),
    Disconnect(Disconnect<'a>),
    Refresh(Refresh<'a>),
    Presence(OfChannel<'a>),
    PresenceStats(OfChannel<'a>),
    History(History<'a>),
    HistoryRemove(OfChannel<'a>),
    Channels(Channels<'a>),
    Info,
    Rpc(Rpc<'a>),
}

/// Every method with a path of its own, but `batch`.
pub(super) const METHODS: [&str; 13] = [
    "publish",
    "broadcast",
    "subscribe",
    "unsubscribe",
    "disconnect",
    "refresh",
    "presence",
    "presence_stats",
    "history",
    "history_remove",
    "channels",
    "info",
    "rpc",
];

impl<'a> Request<'a> {
    /// Reads the body of a method's request. `None`: no such method.
    pub(super) fn parse(method: &str, body: &'a [u8]) -> Option<serde_json::Result<Self>> {
        fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> serde_json::Result<T> {
            serde_json::from_slice(body)
        }
        Some(match method {
            "publish" => read(body).map(Self::Publish),
            "broadcast" => read(body).map(Self::Broadcast),
            "subscribe" => read(body).map(Self::Subscribe),
            "unsubscribe" => read(body).map(Self::Unsubscribe),
            "disconnect" => read(body).map(Self::Disconnect),
            "refresh" => read(body).map(Self::Refresh),
            "presence" => read(body).map(Self::Presence),
            "presence_stats" => read(body).map(Self::PresenceStats),
            "history" => read(body).map(Self::History),
            "history_remove" => read(body).map(Self::HistoryRemove),
            "channels" => read(body).map(Self::Channels),
            "info" => read::<Info>(body).map(|_| Self::Info),
            "rpc" => read(body).map(Self::Rpc),
            _ => return None,
        })
    }

    /// The name of the method.
    pub(super) fn method(&self) -> &'static str {
        match self {
            Self::Publish(_) => "publish",
            Self::Broadcast(_) => "broadcast",
            Self::Subscribe(_) => "subscribe",
            Self::Unsubscribe(_) => "unsubscribe",
            Self::Disconnect(_) => "disconnect",
            Self::Refresh(_) => "refresh",
            Self::Presence(_) => "presence",
            Self::PresenceStats(_) => "presence_stats",
            Self::History(_) => "history",
            Self::HistoryRemove(_) => "history_remove",
            Self::Channels(_) => "channels",
            Self::Info => "info",
            Self::Rpc(_) => "rpc",
        }
    }
}

impl<'a> Command<'a> {
    /// The call that the command makes; `None` where it names no known method.
    pub(super) fn request(self) -> Option<Request<'a>> {
        let Self { publish, broadcast, subscribe, unsubscribe, disconnect, .. } = self;
        None.or_else(|| publish.map(Request::Publish))
            .or_else(|| broadcast.map(Request::Broadcast))
            .or_else(|| subscribe.map(Request::Subscribe))
            .or_else(|| unsubscribe.map(Request::Unsubscribe))
            .or_else(|| disconnect.map(Request::Disconnect))
            .or_else(|| self.history.map(Request::History))
            .or_else(|| self.history_remove.map(Request::HistoryRemove))
            .or_else(|| self.presence.map(Request::Presence))
            .or_else(|| self.presence_stats.map(Request::PresenceStats))
            .or_else(|| self.info.map(|_| Request::Info))
            .or_else(|| self.rpc.map(Request::Rpc))
            .or_else(|| self.refresh.map(Request::Refresh))
            .or_else(|| self.channels.map(Request::Channels))
    }
}
