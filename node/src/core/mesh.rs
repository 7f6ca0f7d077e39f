//! What shards tell each other.
//!
//! Owns the messages. Messages to a channel's home are [`ToHome`], messages from the home are
//! [`ToMember`]; both keep their order. What waits to be told is in `outbox`.

use std::sync::Arc;

use ringmain_proto::client::ClientId;
use ringmain_proto::close::ErrorCode;
use ringmain_proto::limits::INFO_BYTES_MAX;
use ringmain_proto::message::ClientInfo;

use super::api::Member;
use super::engine::Slot;
pub use super::outbox::MeshBatch;

/// A message between two shards.
#[derive(Debug)]
pub enum MeshMessage {
    /// To the channel's home.
    Home(ToHome),
    /// From the channel's home.
    Member(ToMember),
}

/// Who waits for an answer: a command of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The connection.
    pub slot: Slot,
    /// Its serial: a slot is reused, a serial is not.
    pub serial: u32,
    /// The command's id (0: nobody is told).
    pub id: u32,
}

/// A channel as a member shard knows it: index and serial, so that neither side hashes a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelRef {
    /// Index in the member shard's table.
    pub index: u32,
    /// Serial of that entry.
    pub serial: u32,
}

/// Who publishes, subscribes or leaves: a client with its user and two JSON infos, in one shared piece of
/// memory, for presence holds one for every member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(Arc<[u8]>);

/// Client id (16 bytes, big endian), lengths of the user (u8) and of conn_info (u32, [`NO_INFO`]: none), marks
/// ([`HAS_CHAN_INFO`], [`ANNOUNCED`]), then user, conn_info and chan_info, which has the rest. Nodes tell each
/// other members in this form.
const IDENTITY_HEADER_BYTES: usize = 16 + 1 + 4 + 1;
const NO_INFO: u32 = u32::MAX;
const HAS_CHAN_INFO: u8 = 1;
const ANNOUNCED: u8 = 2;

impl Identity {
    /// The user's id is at most 255 bytes long.
    pub(crate) fn new(
        client: ClientId,
        user: &str,
        conn_info: Option<&[u8]>,
        chan_info: Option<&[u8]>,
    ) -> Self {
        let user_len = u8::try_from(user.len()).expect("users are at most 255 bytes long");
        let conn_len = conn_info.map_or(NO_INFO, |info| info.len() as u32);
        let parts: [&[u8]; 7] = [
            &client.0.to_be_bytes(),
            &[user_len],
            &conn_len.to_le_bytes(),
            &[if chan_info.is_some() { HAS_CHAN_INFO } else { 0 }],
            user.as_bytes(),
            conn_info.unwrap_or_default(),
            chan_info.unwrap_or_default(),
        ];
        let mut bytes = Vec::with_capacity(parts.iter().map(|part| part.len()).sum());
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        Self(bytes.into())
    }

    /// The client alone: who it is, and nothing of what it shows.
    pub(crate) fn bare(&self) -> Self {
        Self::new(self.client(), "", None, None)
    }

    /// Marks one whose joins and leaves are told to others, before it is shared.
    pub(crate) fn announced(mut self, announced: bool) -> Self {
        if announced && let Some(bytes) = Arc::get_mut(&mut self.0) {
            bytes[21] |= ANNOUNCED;
        }
        self
    }

    /// Whether its joins and leaves are told to others.
    pub fn is_announced(&self) -> bool {
        self.0[21] & ANNOUNCED != 0
    }

    /// As nodes tell each other.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// From what another node told; `None` where it is no identity.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let user_len = usize::from(*bytes.get(16)?);
        let conn_len = u32::from_le_bytes(*bytes.get(17..)?.first_chunk()?);
        let rest = bytes.get(IDENTITY_HEADER_BYTES..)?;
        std::str::from_utf8(rest.get(..user_len)?).ok()?;
        let infos = &rest[user_len..];
        let conn_len = if conn_len == NO_INFO { 0 } else { conn_len as usize };
        let chan_len = infos.len().checked_sub(conn_len)?;
        let long = conn_len > INFO_BYTES_MAX || chan_len > INFO_BYTES_MAX;
        (!long && (chan_len == 0 || bytes[21] & HAS_CHAN_INFO != 0)).then(|| Self(bytes.into()))
    }

    /// Its length in memory, in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.0.len()
    }

    /// The client's id.
    pub(crate) fn client(&self) -> ClientId {
        ClientId(u128::from_be_bytes(*self.0.first_chunk().expect("an identity has a header")))
    }

    /// The user's id.
    pub(crate) fn user(&self) -> &str {
        let user = &self.0[IDENTITY_HEADER_BYTES..][..usize::from(self.0[16])];
        std::str::from_utf8(user).expect("an identity is made of a text")
    }

    /// As a publication, join or leave shows it.
    pub(crate) fn as_client_info(&self) -> ClientInfo<'_> {
        let user = self.user();
        let conn_len = u32::from_le_bytes(*self.0[17..].first_chunk().expect("an identity has a header"));
        let infos = &self.0[IDENTITY_HEADER_BYTES + user.len()..];
        let (conn_info, chan_info) = match conn_len {
            NO_INFO => (None, infos),
            len => (Some(&infos[..len as usize]), &infos[len as usize..]),
        };
        let chan_info = (self.0[21] & HAS_CHAN_INFO != 0).then_some(chan_info);
        ClientInfo { user, client: self.client(), conn_info, chan_info }
    }
}

/// Where a subscriber wants to go on.
#[derive(Clone, Debug)]
pub struct RecoverFrom {
    /// Offset of the last publication it has.
    pub offset: u64,
    /// Epoch as the client gave it; empty: not compared.
    pub epoch: Box<str>,
}

impl RecoverFrom {
    /// As a client names it.
    pub fn new(offset: u64, epoch: &str) -> Self {
        Self { offset, epoch: epoch.into() }
    }
}

/// A subscription asked of the home.
#[derive(Debug)]
pub struct SubscribeAtHome {
    /// Who waits.
    pub origin: Origin,
    /// The channel's name.
    pub channel: Arc<str>,
    /// What the member shard calls it.
    pub member: ChannelRef,
    /// Set if the subscriber shows in presence or announces itself.
    pub identity: Option<Identity>,
    /// Keep it in presence.
    pub presence: bool,
    /// Tell the others that it joined, and later that it left.
    pub announce: bool,
    /// Recover from here.
    pub recover: Option<RecoverFrom>,
    /// Give only the latest publication.
    pub cache: bool,
}

/// The end of a subscription.
#[derive(Debug)]
pub struct LeaveAtHome {
    /// The channel's name.
    pub channel: Arc<str>,
    /// What the member shard calls it.
    pub member: ChannelRef,
    /// The client, if it was in presence or announced.
    pub identity: Option<Identity>,
    /// It was in presence.
    pub presence: bool,
    /// Its join was announced.
    pub announce: bool,
}

/// To the channel's home.
#[derive(Debug)]
pub enum ToHome {
    /// A connection publishes.
    Publish {
        /// Who waits.
        origin: Origin,
        /// Target.
        channel: Arc<str>,
        /// Who publishes.
        identity: Option<Identity>,
        /// JSON.
        data: Box<[u8]>,
    },
    /// A connection subscribes.
    Subscribe(Box<SubscribeAtHome>),
    /// A connection left.
    Leave(LeaveAtHome),
    /// A connection asks.
    Query {
        /// Who waits.
        origin: Origin,
        /// About what.
        channel: Arc<str>,
        /// What.
        query: Query,
    },
    /// A member shard needs what follows `after` for a subscriber that fell behind the log.
    Replay {
        /// The subscriber's connection; `id` is the member shard's channel index.
        origin: Origin,
        /// The channel.
        channel: Arc<str>,
        /// The offset that it has.
        after: u64,
        /// The epoch that it belongs to.
        epoch: u64,
    },
}

/// A question of a client to the channel's home.
#[derive(Debug)]
pub enum Query {
    /// Members.
    Presence,
    /// Numbers of members and users.
    PresenceStats,
    /// Publications.
    History {
        /// As the client gave it.
        limit: i32,
        /// Position given.
        since: Option<RecoverFrom>,
        /// Newest first.
        reverse: bool,
    },
}

impl Query {
    /// Whether it asks for what comes before offset 0, which makes no sense.
    pub(crate) fn is_before_the_first(&self) -> bool {
        matches!(self, Self::History { since: Some(since), reverse: true, .. } if since.offset == 0)
    }
}

/// What the home found for a subscriber.
#[derive(Debug)]
pub struct Subscribed {
    /// What was asked: given back, so that the member shard can undo it for a connection that is gone.
    pub request: Box<SubscribeAtHome>,
    /// What came of it.
    pub result: Result<Recovered, ErrorCode>,
}

/// A position, and what was missed up to it.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The channel's epoch.
    pub epoch: u64,
    /// The channel's top: everything later follows by itself.
    pub top: u64,
    /// Canonical records of what was missed.
    pub records: Vec<u8>,
    /// Nothing is missing.
    pub recovered: bool,
}

/// The answer to a [`Query`].
#[derive(Debug)]
pub enum QueryAnswer {
    /// Members.
    Presence(Vec<Member>),
    /// Numbers.
    PresenceStats {
        /// Connections.
        clients: u32,
        /// Distinct users.
        users: u32,
    },
    /// A page.
    History {
        /// Canonical records.
        records: Vec<u8>,
        /// Top offset.
        offset: u64,
        /// Epoch.
        epoch: u64,
    },
}

/// From the channel's home.
#[derive(Debug)]
pub enum ToMember {
    /// A publish was accepted or not.
    Published {
        /// Who waits.
        origin: Origin,
        /// What came of it.
        result: Result<(), ErrorCode>,
    },
    /// A subscription.
    Subscribed(Box<Subscribed>),
    /// The answer to a query.
    Answer {
        /// Who waits.
        origin: Origin,
        /// What came of it.
        result: Result<QueryAnswer, ErrorCode>,
    },
    /// Publications, in order, shared between the shards that need the same.
    Records {
        /// The member shard's channel.
        member: ChannelRef,
        /// Their epoch.
        epoch: u64,
        /// Canonical records.
        records: Arc<[u8]>,
    },
    /// Somebody joined or left.
    Presence {
        /// The member shard's channel.
        member: ChannelRef,
        /// Joined, else left.
        joined: bool,
        /// Who.
        identity: Identity,
    },
    /// What lies between the member shard's position and `top` cannot be had: every subscriber is told.
    Gap {
        /// The member shard's channel.
        member: ChannelRef,
        /// The epoch now.
        epoch: u64,
        /// The position now.
        top: u64,
    },
    /// What a fallen subscriber asked for.
    Replayed {
        /// The subscriber's connection; `id` is the member shard's channel index.
        origin: Origin,
        /// The member shard's channel serial.
        after: u64,
        /// Canonical records; empty with `whole` false: history no longer reaches back.
        records: Vec<u8>,
        /// Whether everything after `after` is still there.
        whole: bool,
    },
}

impl MeshMessage {
    /// Bytes that it holds beside its place in a queue. What it shares with others is counted in full.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Home(message) => message.bytes(),
            Self::Member(message) => message.bytes(),
        }
    }
}

impl ToHome {
    /// Bytes that it holds beside its place in a queue.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Publish { channel, identity, data, .. } => {
                name_bytes(channel) + identity_bytes(identity) + data.len()
            }
            Self::Subscribe(request) => request.bytes(),
            Self::Leave(leave) => name_bytes(&leave.channel) + identity_bytes(&leave.identity),
            Self::Query { channel, query, .. } => {
                let since = match query {
                    Query::History { since, .. } => since.as_ref(),
                    Query::Presence | Query::PresenceStats => None,
                };
                name_bytes(channel) + since.map_or(0, |since| since.epoch.len())
            }
            Self::Replay { channel, .. } => name_bytes(channel),
        }
    }
}

impl ToMember {
    /// Bytes that it holds beside its place in a queue.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Published { .. } | Self::Gap { .. } => 0,
            Self::Subscribed(subscribed) => {
                let records = subscribed.result.as_ref().map_or(0, |recovered| recovered.records.len());
                size_of::<Subscribed>() + subscribed.request.bytes() + records
            }
            Self::Answer { result, .. } => result.as_ref().map_or(0, QueryAnswer::bytes),
            Self::Records { records, .. } => records.len(),
            Self::Presence { identity, .. } => identity.bytes(),
            Self::Replayed { records, .. } => records.len(),
        }
    }
}

impl SubscribeAtHome {
    fn bytes(&self) -> usize {
        let epoch = self.recover.as_ref().map_or(0, |recover| recover.epoch.len());
        size_of::<Self>() + name_bytes(&self.channel) + identity_bytes(&self.identity) + epoch
    }
}

impl QueryAnswer {
    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> usize {
        let member_bytes = |member: &Member| {
            let infos = [&member.conn_info, &member.chan_info].into_iter().flatten();
            size_of::<Member>() + member.user.len() + infos.map(Vec::len).sum::<usize>()
        };
        match self {
            Self::Presence(members) => members.iter().map(member_bytes).sum(),
            Self::PresenceStats { .. } => 0,
            Self::History { records, .. } => records.len(),
        }
    }
}

fn name_bytes(name: &str) -> usize {
    2 * size_of::<usize>() + name.len()
}

fn identity_bytes(identity: &Option<Identity>) -> usize {
    identity.as_ref().map_or(0, Identity::bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_what_it_was_made_of() {
        for user in ["", "42", "ünal"] {
            for conn_info in [None, Some(&b""[..]), Some(&b"{}"[..])] {
                for chan_info in [None, Some(&b""[..]), Some(&b"[1]"[..])] {
                    let info = ClientInfo { user, client: ClientId(1 << 100 | 7), conn_info, chan_info };
                    let identity = Identity::new(info.client, user, conn_info, chan_info);
                    assert_eq!(identity.as_client_info(), info);
                    assert_eq!((identity.user(), identity.client()), (user, info.client));
                    assert_eq!(Identity::from_bytes(identity.as_bytes()), Some(identity.clone()));
                    assert!(!identity.is_announced());
                    let announced = identity.announced(true);
                    assert!(announced.is_announced());
                    assert_eq!(announced.as_client_info(), info);
                    assert_eq!(Identity::from_bytes(announced.as_bytes()), Some(announced));
                }
            }
        }
    }

    #[test]
    fn bytes_of_another_node_are_an_identity_or_none() {
        let bytes = Identity::new(ClientId(7), "ünal", Some(b"{}"), Some(b"[1]")).as_bytes().to_vec();
        let whole =
            |bytes: &[u8]| Identity::from_bytes(bytes).map(|identity| identity.as_client_info().user.len());
        assert_eq!(whole(&bytes), Some(5));
        for len in 0..IDENTITY_HEADER_BYTES + 5 + 2 {
            assert_eq!(whole(&bytes[..len]), None, "{len}");
        }
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            bytes
        };
        assert_eq!(whole(&with(16, 1)), None, "a user that is no text");
        assert_eq!(whole(&with(20, 1)), None, "a longer info than there is");
        assert_eq!(whole(&with(21, 0)), None, "a chan_info that is none");
        let long = Identity::new(ClientId(7), "u", None, Some(&[b' '; INFO_BYTES_MAX + 1]));
        assert_eq!(whole(long.as_bytes()), None, "more than anybody may show");
    }
}
