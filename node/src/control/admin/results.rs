//! Results of the server API, as Centrifugo's HTTP API shapes them.
//!
//! Owns the JSON. Zero values are left out, except where that API shows them: all of `presence`,
//! `presence_stats`, `channels` and `info`, and the position and the list of `history`.

use std::collections::BTreeMap;

use ringmain_proto::message::{ClientInfo, Publication};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::control::cluster::message::NodeInfo;
use crate::core::api::Member;

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn is_false(flag: &bool) -> bool {
    !flag
}

/// An error object.
#[derive(Debug, Serialize)]
pub(super) struct ErrorObject {
    pub code: u32,
    pub message: &'static str,
}

/// `{"result":…}` or `{"error":…}`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Outcome {
    /// What the method gave.
    Result(Box<RawValue>),
    /// Why it gave nothing.
    Error(ErrorObject),
}

/// Of `publish`.
#[derive(Debug, Serialize)]
pub(super) struct Published {
    #[serde(skip_serializing_if = "is_zero")]
    pub offset: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub epoch: String,
}

/// Of `broadcast`.
#[derive(Debug, Serialize)]
pub(super) struct Broadcasted {
    pub responses: Vec<Outcome>,
}

/// Of methods that give nothing.
#[derive(Debug, Serialize)]
pub(super) struct Empty {}

/// A connection of a user, in presence and in publications.
#[derive(Debug, Serialize)]
pub(super) struct Client<'a> {
    pub user: &'a str,
    pub client: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conn_info: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chan_info: Option<&'a RawValue>,
}

/// Of `presence`, by client id.
#[derive(Debug, Serialize)]
pub(super) struct Presence<'a> {
    pub presence: BTreeMap<String, Client<'a>>,
    /// Not every node answered in time; left out where all did.
    #[serde(skip_serializing_if = "is_false")]
    pub partial: bool,
}

/// Of `presence_stats`.
#[derive(Debug, Serialize)]
pub(super) struct PresenceStats {
    pub num_clients: u32,
    pub num_users: u32,
    /// Not every node answered in time; left out where all did.
    #[serde(skip_serializing_if = "is_false")]
    pub partial: bool,
}

/// A publication of `history`.
#[derive(Debug, Serialize)]
pub(super) struct HistoryItem<'a> {
    pub data: &'a RawValue,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub info: Option<Client<'a>>,
    #[serde(skip_serializing_if = "is_zero")]
    pub offset: u64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<&'a str, &'a str>,
}

/// Of `history`.
#[derive(Debug, Serialize)]
pub(super) struct History<'a> {
    pub publications: Vec<HistoryItem<'a>>,
    pub epoch: &'a str,
    pub offset: u64,
}

/// Of `channels`.
#[derive(Debug, Serialize)]
pub(super) struct Channels {
    pub channels: BTreeMap<String, ChannelFigures>,
}

/// One of `channels`.
#[derive(Debug, Default, Serialize)]
pub(super) struct ChannelFigures {
    #[serde(skip_serializing_if = "is_none")]
    pub num_clients: u32,
}

fn is_none(number: &u32) -> bool {
    *number == 0
}

/// Of `info`.
#[derive(Debug, Serialize)]
pub(super) struct Info<'a> {
    /// This one first.
    pub nodes: Vec<Node<'a>>,
}

/// One of `info`.
#[derive(Debug, Serialize)]
pub(super) struct Node<'a> {
    pub uid: &'a str,
    pub name: &'a str,
    pub version: &'a str,
    pub num_clients: u32,
    pub num_users: u32,
    pub num_subs: u32,
    pub num_channels: u32,
    /// Seconds.
    pub uptime: u64,
}

impl<'a> Node<'a> {
    /// A node as it says of itself.
    pub(super) fn of(info: &'a NodeInfo) -> Self {
        let NodeInfo { uid, name, version, num_clients, num_users, num_subs, num_channels, uptime } = info;
        let (num_clients, num_users, num_subs) = (*num_clients, *num_users, *num_subs);
        let (num_channels, uptime) = (*num_channels, *uptime);
        Self { uid, name, version, num_clients, num_users, num_subs, num_channels, uptime }
    }
}

/// Of `GET /v1/place`.
#[derive(Debug, Serialize)]
pub(super) struct Placed<'a> {
    pub node: &'a str,
    pub address: &'a str,
    pub ticket: &'a str,
    /// Seconds since 1970.
    pub expires: u64,
}

/// Of `batch`: no `result` around it.
#[derive(Debug, Serialize)]
pub(super) struct Replies {
    pub replies: Vec<BTreeMap<&'static str, Reply>>,
}

/// What stands under a method's name in a batch's reply, or under `error`.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Reply {
    /// Under the method's name.
    Result(Box<RawValue>),
    /// Under `error`.
    Error(ErrorObject),
}

/// Reads a stored JSON value. `None`: it is none, which the entrances of the node exclude.
pub(super) fn raw(json: &[u8]) -> Option<&RawValue> {
    serde_json::from_slice(json).ok()
}

/// A member as shown; `None` where a stored value is no JSON.
pub(super) fn member(member: &Member) -> Option<Client<'_>> {
    client(ClientInfo {
        user: &member.user,
        client: member.client,
        conn_info: member.conn_info.as_deref(),
        chan_info: member.chan_info.as_deref(),
    })
}

fn client(info: ClientInfo<'_>) -> Option<Client<'_>> {
    let raw = |json: Option<_>| match json {
        Some(json) => raw(json).map(Some),
        None => Some(None),
    };
    Some(Client {
        user: info.user,
        client: info.client.to_string(),
        conn_info: raw(info.conn_info)?,
        chan_info: raw(info.chan_info)?,
    })
}

/// Publications from their records, one after the other; `None` where one is damaged.
pub(super) fn publications(mut records: &[u8]) -> Option<Vec<HistoryItem<'_>>> {
    let mut items = Vec::new();
    while !records.is_empty() {
        let (publication, len) = Publication::read_record(records)?;
        items.push(HistoryItem {
            data: raw(publication.data)?,
            info: match publication.info {
                Some(info) => Some(client(info)?),
                None => None,
            },
            offset: publication.offset,
            tags: publication.tags.iter().collect(),
        });
        records = &records[len..];
    }
    Some(items)
}
