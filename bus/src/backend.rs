//! The seam between a node's hub and the client of a real broker: requests, replies, and who does what.
//!
//! Owns: the vocabulary of a backend. Must not know: any broker.
//!
//! One *hub* ([`crate::hub`]) per node, on the control thread, stands between the ports of the shards and one
//! *backend*. The hub keeps chains whole (P2), counts interest, joins reads, gives up what is not answered (C1),
//! and brings channels back after a loss. The backend speaks to the broker: it finds the server that owns a
//! channel, keeps connections, subscribes, draws epochs, proves by a canary that the way there and back works, and
//! says when it does not.
//!
//! A backend is a task of the control thread: it takes [`Request`]s and gives [`Reply`]s, in no order but those
//! named here:
//!
//! - every request that carries a [`Call`] is answered by exactly one reply with it, in time the backend cannot
//!   promise: the hub gives up first, and a reply after that is dropped;
//! - messages of a channel are given in the order in which the broker sent them; a message that the broker sent
//!   after it confirmed the subscription comes after [`Reply::Subscribed`];
//! - what was sent to the broker before a read, or was read by it, is not later than the read's answer tells;
//! - after [`Reply::Lost`] nothing of that domain is given until [`Reply::Back`]; then the hub subscribes and
//!   reads every channel again that it holds there. A backend does not remember subscriptions of a lost domain;
//! - a request for a lost domain is answered at once: `Unavailable` (a publish that was not sent), or `Unknown`
//!   (a publish that may have been).
//!
//! A doubt is a loss: a cut connection, a canary that does not come back in [`SILENCE_MS_MAX`], a subscription
//! ended by the server, an owner that changed, a life of the server that changed (a new replication id), a push
//! that was dropped for want of room.

use std::sync::Arc;

use bytes::Bytes;

use crate::epoch::{Epoch, Position};
use crate::lineage::Lineage;
pub use crate::runtime::{BackendEnds, HubEnds, REPLIES_MAX, ends};
use crate::types::{Accepted, BusError, ChannelOptions, HistoryQuery, Page, PublicationId, PublishError};

/// Time between two canaries of a domain, in milliseconds.
pub const CANARY_MS: u64 = 250;

/// Silence of a domain after which it counts as lost, in milliseconds, the control thread's own delay apart.
pub const SILENCE_MS_MAX: u64 = 800;

/// Where to dial instead of an address that a URL or a server names: for brokers behind address translation.
pub type AddressMap = Arc<dyn Fn(&str, u16) -> (String, u16) + Send + Sync>;

/// What a broker's subscription is of. The same on all nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Interest {
    /// One channel; channels of users by slot.
    #[default]
    Channels,
    /// One of 4,096 slots; what is not wanted is dropped at the node.
    Slots,
}

impl Interest {
    /// Whether a channel is subscribed by its slot.
    pub fn is_by_slot(self, channel: &str) -> bool {
        self == Interest::Slots || channel.starts_with("user:")
    }
}

/// Names a request at the backend. Drawn by the hub, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Call(pub u64);

/// A part of the broker that is lost and comes back as one: a Redis master, a JetStream stream, a leader of
/// partitions. Drawn by the backend; small, and used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Domain(pub u32);

/// A channel as a backend is told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The channel's name, as clients write it.
    pub name: Arc<str>,
    /// Its options; they may change between two requests, the newest count.
    pub options: ChannelOptions,
}

/// A [`PublicationId`] that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum OwnedId {
    /// Incarnation and sequence of a node.
    Node(u64, u64),
    /// The API's key.
    Key(Arc<str>),
}

impl From<PublicationId<'_>> for OwnedId {
    fn from(id: PublicationId<'_>) -> OwnedId {
        match id {
            PublicationId::Node { incarnation, sequence } => OwnedId::Node(incarnation, sequence),
            PublicationId::Key(key) => OwnedId::Key(key.into()),
        }
    }
}

/// What the hub asks of a backend.
#[derive(Clone, Debug)]
pub enum Request {
    /// Subscribe at the broker. Answered by [`Reply::Subscribed`] once the broker has confirmed. Sent again after
    /// [`Reply::Back`], and while a subscription of the same channel lives (then it is confirmed again).
    Subscribe {
        /// Names the answer.
        call: Call,
        /// The channel.
        target: Target,
    },
    /// End the subscription. No answer; messages may come for a moment and are dropped by the hub.
    Unsubscribe {
        /// The channel.
        target: Target,
    },
    /// Publish. Answered by [`Reply::Published`]. Where the broker covers the id (or the window of the key), the
    /// backend tries a positioned publish again by itself before it says `Unknown`; an ephemeral one never.
    Publish {
        /// Names the answer.
        call: Call,
        /// The channel.
        target: Target,
        /// For repeats.
        id: OwnedId,
        /// The canonical record ([`ringmain_proto::record`]) with the offset 0.
        record: Bytes,
    },
    /// Read history and position; a positioned channel without an epoch gets one (C7). Answered by [`Reply::Read`].
    /// Only for positioned channels.
    Read {
        /// Names the answer.
        call: Call,
        /// The channel.
        target: Target,
        /// What. `since.epoch` may be one that the current epoch came from: then it is judged by the lineage.
        query: HistoryQuery,
    },
    /// Remove the history (P11). Answered by [`Reply::Cleared`]. Only for positioned channels.
    Clear {
        /// Names the answer.
        call: Call,
        /// The channel.
        target: Target,
    },
}

impl Request {
    /// The channel that it is about.
    pub fn target(&self) -> &Target {
        match self {
            Request::Subscribe { target, .. }
            | Request::Unsubscribe { target }
            | Request::Publish { target, .. }
            | Request::Read { target, .. }
            | Request::Clear { target, .. } => target,
        }
    }

    /// Its answer where it cannot be served and nothing was sent for it; `None`: it is not answered.
    pub fn refusal(&self) -> Option<Reply> {
        let unavailable = BusError::Unavailable;
        Some(match *self {
            Request::Subscribe { call, .. } => Reply::Subscribed { call, result: Err(unavailable) },
            Request::Publish { call, .. } => {
                Reply::Published { call, result: Err(PublishError::Unavailable) }
            }
            Request::Read { call, .. } => Reply::Read { call, result: Err(unavailable) },
            Request::Clear { call, .. } => Reply::Cleared { call, result: Err(unavailable) },
            Request::Unsubscribe { .. } => return None,
        })
    }
}

/// A publication on its way to subscribers, or word of a position without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Its epoch; none on an ephemeral channel.
    pub epoch: Epoch,
    /// The epochs that its epoch came from; [`Lineage::EMPTY`] where the backend has none.
    pub lineage: Lineage,
    /// Offset of the publication before it; 0 on an ephemeral channel.
    pub previous: u64,
    /// Its offset; 0 on an ephemeral channel.
    pub offset: u64,
    /// Its record, whatever offset stands in it. Empty: no publication, only word that the channel's top is
    /// `offset` (a key created or renewed, a high-water mark on the canary); then `previous` is `offset`.
    pub record: Bytes,
}

/// The answer to a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPage {
    /// Position, reach and whether the limit cut.
    pub page: Page,
    /// The epochs that the page's epoch came from.
    pub lineage: Lineage,
    /// The records in the order asked for, one behind the other, each with its offset
    /// ([`append_record`]).
    pub records: Vec<u8>,
}

/// What a backend tells the hub.
#[derive(Clone, Debug)]
pub enum Reply {
    /// A subscription is confirmed (in which domain) or failed.
    Subscribed {
        /// Of the request.
        call: Call,
        /// Where the channel lives now.
        result: Result<Domain, BusError>,
    },
    /// The answer to a publish.
    Published {
        /// Of the request.
        call: Call,
        /// Where it stands.
        result: Result<Accepted, PublishError>,
    },
    /// The answer to a read.
    Read {
        /// Of the request.
        call: Call,
        /// Position and publications.
        result: Result<ReadPage, BusError>,
    },
    /// The answer to a clear.
    Cleared {
        /// Of the request.
        call: Call,
        /// The position, unchanged.
        result: Result<Position, BusError>,
    },
    /// Something on a subscribed channel.
    Message {
        /// The channel's name.
        name: Arc<str>,
        /// What.
        message: Message,
    },
    /// One channel is to be read again: its subscription goes on, but something is in doubt (a kept ack was
    /// published again, a position may be lost).
    Doubt {
        /// The channel's name.
        name: Arc<str>,
    },
    /// A domain cannot be reached, or what it said cannot be relied on.
    Lost {
        /// Which.
        domain: Domain,
    },
    /// A lost domain answers again: canary there and back, owner known.
    Back {
        /// Which.
        domain: Domain,
    },
    /// Whether all that this node uses of the broker can be reached. `Down` at the start; the hub says `Up` to its
    /// ports when all channels are whole too.
    Reachable(bool),
}

/// What a broker's configuration gives up of the contract, or that it cannot be asked: something that an operator
/// should know before a node relies on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// What is given up, and where. Shows no secret.
    pub what: String,
    /// What mends it.
    pub mend: String,
}

impl Warning {
    /// A warning.
    pub fn new(what: impl Into<String>, mend: impl Into<String>) -> Warning {
        Warning { what: what.into(), mend: mend.into() }
    }
}

/// Appends a publication's record to a page with its real offset, whatever offset it was stored under. `false`:
/// these bytes are no record, nothing was appended.
pub fn append_record(page: &mut Vec<u8>, offset: u64, record: &[u8]) -> bool {
    use ringmain_proto::message::Publication;
    let Some((mut publication, _)) = Publication::read_record(record) else { return false };
    publication.offset = offset;
    publication.write_record(page);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringmain_proto::message::Publication;

    #[test]
    fn records_get_their_offsets() {
        let mut record = Vec::new();
        Publication { data: b"x", ..Publication::default() }.write_record(&mut record);
        let mut page = Vec::new();
        assert!(append_record(&mut page, 7, &record));
        assert!(!append_record(&mut page, 8, b"no record"));
        let offsets: Vec<u64> =
            ringmain_proto::record::records(&page).map(|publication| publication.offset).collect();
        assert_eq!(offsets, [7]);
    }
}
