//! What goes into a bus: channels, options, ids, queries; and what comes back: answers, events, errors.
//!
//! Owns: the vocabulary of the `Bus` trait. Must not know: any backend, socket or clock.
//! Invariant: nothing here says where a channel is stored or how offsets are spaced.

use ringmain_proto::message::Publication;
use ringmain_proto::record::Records;

use crate::epoch::{Epoch, Position};

/// Longest idempotency key of a publication, in bytes. A longer one is refused
/// ([`PublishError::KeyTooLong`]): the window remembers keys, and its memory is keys times this.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;

/// The caller's dense id of a channel on this shard. It may be given to another channel after
/// [`Bus::forget`](crate::Bus::forget); backends index tables with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChannelId(pub u32);

impl ChannelId {
    /// The id as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the operator configured for a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelOptions {
    /// Publications kept. 0: the channel is *ephemeral*, it has no history, no offsets and no epoch.
    pub history_size: u32,
    /// How long a publication is kept, in milliseconds.
    pub history_ttl_ms: u64,
    /// How long the position (epoch and top) is kept after the last use of the channel, in milliseconds.
    /// Not below `history_ttl_ms` in a valid configuration; a backend takes the larger of the two.
    pub meta_ttl_ms: u64,
}

impl ChannelOptions {
    /// Ephemeral: no history, no offsets.
    pub const EPHEMERAL: ChannelOptions =
        ChannelOptions { history_size: 0, history_ttl_ms: 0, meta_ttl_ms: 0 };

    /// Whether the channel has positions.
    pub const fn is_positioned(&self) -> bool {
        self.history_size > 0
    }
}

/// A channel as commands name it: by id for tables of this shard, by name for a broker.
#[derive(Clone, Copy, Debug)]
pub struct Channel<'a> {
    /// The caller's id.
    pub id: ChannelId,
    /// The channel's name, as clients write it.
    pub name: &'a str,
    /// Its options. They may change between two commands (a new configuration): the newest count.
    pub options: &'a ChannelOptions,
}

/// Names a command in its late answer. The caller draws it and does not use it again before that answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What a command gives: its answer at once, or later as an [`Event`] under the command's token.
#[derive(Debug)]
#[must_use]
pub enum Outcome<T> {
    /// The answer. No event follows.
    Done(T),
    /// Exactly one event with the command's token will carry the answer.
    Pending,
}

impl<T> Outcome<T> {
    /// The inline answer, if it is one.
    pub fn done(self) -> Option<T> {
        match self {
            Outcome::Done(answer) => Some(answer),
            Outcome::Pending => None,
        }
    }
}

/// Under which name a publication may be tried again without becoming two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublicationId<'a> {
    /// Drawn by this node for this one publication. Backends use it for their own retries; a caller
    /// publishes again under it only after [`PublishError::Unknown`] or a temporary error.
    Node {
        /// The node's incarnation: never the same for two starts.
        incarnation: u64,
        /// Counts within the incarnation.
        sequence: u64,
    },
    /// The API's idempotency key, at most [`IDEMPOTENCY_KEY_BYTES_MAX`] bytes, compared within its channel.
    Key(&'a str),
}

/// The answer to a publish that the bus accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accepted {
    /// Where the publication stands. [`Position::NONE`] on an ephemeral channel.
    pub position: Position,
    /// The id was seen before within the window: this is the first attempt's answer, nothing was added,
    /// and nobody is to be sent anything again.
    pub repeated: bool,
}

/// From where history is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Since {
    /// Publications after this offset, or before it when the query is reversed.
    pub offset: u64,
    /// The epoch as claimed ([`Epoch::from_claim`]); `None` is not compared.
    pub epoch: Option<Epoch>,
}

/// A question to a channel's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryQuery {
    /// Where to begin; `None` is the oldest kept, or the newest when reversed.
    pub since: Option<Since>,
    /// Most publications wanted. 0 asks for the position alone.
    pub limit: u32,
    /// Newest first.
    pub reverse: bool,
}

impl HistoryQuery {
    /// Only the position.
    pub const TOP: HistoryQuery = HistoryQuery { since: None, limit: 0, reverse: false };
}

/// What a read of history tells beside the publications.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// The channel's current position. The page holds every kept publication of the asked range that is
    /// not above it, up to the limit.
    pub top: Position,
    /// The history reaches back to this offset: what its oldest publication names as its predecessor, the
    /// top when nothing is kept. A position below it is not recoverable. A backend looks no further back than was asked:
    /// for a read since an offset that is kept, or of the newest ones, it may reach further.
    pub floor: u64,
    /// The limit cut the page: more of the asked range is kept.
    pub more: bool,
}

/// Whether the broker can be reached and everything that this node holds open there is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Commands go through, and every open channel is confirmed.
    Up,
    /// Publishes fail as temporary, arrivals may be late; see clause `C2`.
    Down,
}

/// What a bus says by itself, or late.
#[derive(Debug)]
pub enum Event<'a> {
    /// The late answer to [`Bus::open`](crate::Bus::open). Arrivals after it continue from its position.
    Opened {
        /// Of the command.
        token: Token,
        /// Of the command.
        channel: ChannelId,
        /// The channel's top.
        result: Result<Position, BusError>,
    },
    /// The late answer to [`Bus::publish`](crate::Bus::publish). Its arrival is an event of its own, before
    /// or after this one.
    Published {
        /// Of the command.
        token: Token,
        /// Where it stands.
        result: Result<Accepted, PublishError>,
    },
    /// The late answer to [`Bus::read`](crate::Bus::read).
    Read {
        /// Of the command.
        token: Token,
        /// The position and what was cut.
        result: Result<Page, BusError>,
        /// The publications in the order asked for; empty on an error.
        publications: Records<'a>,
    },
    /// The late answer to [`Bus::clear`](crate::Bus::clear).
    Cleared {
        /// Of the command.
        token: Token,
        /// The position, unchanged by the clearing.
        result: Result<Position, BusError>,
    },
    /// A publication on an open channel, whoever published it.
    Arrival {
        /// An open channel.
        channel: ChannelId,
        /// Its epoch, the one last told by open, gap or epoch change. None on an ephemeral channel.
        epoch: Epoch,
        /// Offset of the arrival before it; see clause `P2`.
        previous: u64,
        /// With its offset.
        publication: Publication<'a>,
    },
    /// Publications of an open channel may have been missed and cannot be had any more.
    Gap {
        /// An open channel.
        channel: ChannelId,
        /// Arrivals continue from here. [`Position::NONE`] on an ephemeral channel.
        resumed: Position,
    },
    /// The offsets of an open channel started another life: every position of the old one is void.
    EpochChanged {
        /// An open channel.
        channel: ChannelId,
        /// Arrivals continue from here.
        position: Position,
    },
    /// The broker was lost, or everything is whole again.
    Health(Health),
    /// The bus keeps nothing for this closed channel any more: the caller may forget it. Said again at
    /// every sweep until it does.
    Idle {
        /// A closed channel.
        channel: ChannelId,
    },
}

/// Why an open, read or clear failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The broker cannot be reached, or did not answer in time. Nobody's fault here; safe to retry; the
    /// client sees error 100, temporary.
    #[error("the bus cannot be reached")]
    Unavailable,
    /// A queue towards the broker is full. Safe to retry later; error 111 or 100, temporary.
    #[error("the bus has too many commands in flight")]
    Overloaded,
    /// The query's epoch is not the channel's. The client's position is void: error 112.
    #[error("the position belongs to another epoch")]
    UnrecoverableEpoch {
        /// Where the channel is.
        current: Position,
    },
}

impl BusError {
    /// Whether the same command may succeed later.
    pub const fn is_temporary(self) -> bool {
        matches!(self, BusError::Unavailable | BusError::Overloaded)
    }
}

/// Why a publish failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// The broker cannot be reached; the publication was certainly *not* accepted. Safe to retry; error
    /// 100, temporary.
    #[error("the bus cannot be reached")]
    Unavailable,
    /// A queue towards the broker is full; the publication was certainly *not* accepted. Safe to retry
    /// later; error 111 or 100, temporary.
    #[error("the bus has too many commands in flight")]
    Overloaded,
    /// No answer came: it may have been accepted or not. Only a retry under the same id is safe; error
    /// 100, not temporary.
    #[error("whether the bus accepted the publication is unknown")]
    Unknown,
    /// The publication's record is larger than the bus takes. The publisher's fault; error 107.
    #[error("a publication of {bytes} bytes is above the bus's limit of {bytes_max}")]
    TooLarge {
        /// Of the record.
        bytes: usize,
        /// The bus's limit.
        bytes_max: usize,
    },
    /// The idempotency key is longer than [`IDEMPOTENCY_KEY_BYTES_MAX`]. The caller's fault; error 107.
    #[error("an idempotency key of {bytes} bytes is above the limit of {IDEMPOTENCY_KEY_BYTES_MAX}")]
    KeyTooLong {
        /// Of the key.
        bytes: usize,
    },
}

impl PublishError {
    /// Whether the publication was certainly not accepted and the same publish may succeed later.
    pub const fn is_temporary(self) -> bool {
        matches!(self, PublishError::Unavailable | PublishError::Overloaded)
    }
}
