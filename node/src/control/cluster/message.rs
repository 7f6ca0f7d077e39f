//! What nodes tell each other, as bytes.
//!
//! Owns the encoding: a version, a kind, then the sender and the body in bincode. It must not know who gets it.
//!
//! Two releases run beside each other while a cluster is upgraded, so:
//! * a field may be appended to a body; an older node ignores what follows ([`Decoded::is_longer`]);
//! * what is an element of a list may not change: it needs a new kind;
//! * an unknown kind or version is an error by itself, to be counted, and nothing else.

use bincode::{Decode, Encode};
use thiserror::Error;

use crate::core::cluster::NodeId;

/// Version of the encoding. Raised only where an older node must not read what follows.
pub const VERSION: u8 = 1;

/// Bytes of one message at the most. Above what a node sends ([`super::presence::BATCH_BYTES_MAX`] and one item, or
/// one command), below what takes memory.
pub const MESSAGE_BYTES_MAX: usize = 2 << 20;

/// Who tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Sender {
    /// Random for every run of the process.
    pub node: NodeId,
    /// Grows whenever the node was away for so long that others gave it up.
    pub incarnation: u64,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// I live.
    Heartbeat(Heartbeat),
    /// I stop, and my members are gone.
    Leaving,
    /// What happened in my channels.
    Presence(Batch),
    /// Who is in your channels of these names?
    Want(Want),
    /// A command about a user's connections.
    Command(Command),
    /// Tell me again the commands of these slots.
    Again(Again),
    /// A question to every node.
    Ask(Ask),
    /// A part of the answer.
    Answer(Answer),
}

/// See [`Body::Heartbeat`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Heartbeat {
    /// For people, and for the ring: a node keeps its place through a restart.
    pub name: String,
    /// Where clients reach this node and no other; empty: nowhere.
    pub address: String,
    /// Relative to other nodes; 0: no users are placed here.
    pub capacity: u32,
    /// Connections now.
    pub load: u32,
    /// Whether users may be placed here.
    pub accepting: bool,
    /// The last [`Batch::sequence`], so that the loss of the last one is seen.
    pub presence_top: u64,
}

/// See [`Body::Presence`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Batch {
    /// Counts batches of an incarnation from 1.
    pub sequence: u64,
    /// In the order in which they happened, channel by channel.
    pub items: Vec<Item>,
}

/// See [`crate::core::cluster::PresenceItem`]; members as [`crate::core::mesh::Identity::as_bytes`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Item {
    /// Somebody joined.
    Joined {
        /// Which channel.
        channel: String,
        /// Who.
        member: Vec<u8>,
        /// Shown in presence.
        listed: bool,
    },
    /// Somebody left.
    Left {
        /// Which channel.
        channel: String,
        /// Who.
        member: Vec<u8>,
        /// Was shown in presence.
        listed: bool,
    },
    /// All who are listed, in parts.
    Whole {
        /// Who asked; for others it is nothing new.
        to: NodeId,
        /// Which channel.
        channel: String,
        /// Who.
        members: Vec<Vec<u8>>,
        /// Nothing came before.
        first: bool,
        /// Nothing follows.
        last: bool,
    },
}

/// See [`Body::Want`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Want {
    /// Which.
    pub channels: Vec<String>,
}

/// See [`Body::Command`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Command {
    /// Counts commands of a node, through its incarnations.
    pub sequence: u64,
    /// How long ago it was given, in milliseconds, by the clock of the sender.
    pub age_ms: u64,
    /// Which connections.
    pub selector: Selector,
    /// What to do.
    pub action: Action,
}

/// See [`crate::core::api::UserSelector`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Selector {
    /// The user's id.
    pub user: String,
    /// Only this client.
    pub client: Option<String>,
    /// Clients left alone.
    pub whitelist: Vec<String>,
}

/// What is done to a user's connections; see [`crate::core::api::Call`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Action {
    /// Subscribe them.
    Subscribe {
        /// To which channel.
        channel: String,
        /// How.
        options: Box<SubscribeOptions>,
    },
    /// Unsubscribe them.
    Unsubscribe {
        /// From which channel; empty: all.
        channel: String,
    },
    /// Close them.
    Disconnect {
        /// WebSocket close code.
        code: u16,
        /// Close reason.
        reason: String,
    },
    /// Set a new expiry.
    Refresh {
        /// Close them now.
        expired: bool,
        /// Seconds since 1970.
        expire_at: Option<u64>,
    },
    /// Deliver what leaves no trace in history, and so does not go the way of other publications.
    Deliver {
        /// To whom listens to it.
        channel: String,
        /// JSON.
        data: Vec<u8>,
        /// Tags of the publication.
        tags: Vec<(String, String)>,
    },
}

/// See [`crate::core::api::SubscribeOptions`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[expect(missing_docs, reason = "they are those of the call")]
pub struct SubscribeOptions {
    pub info: Option<Vec<u8>>,
    pub data: Option<Vec<u8>>,
    pub expire_at: Option<u64>,
    pub presence: Option<bool>,
    pub join_leave: Option<bool>,
    pub push_join_leave: Option<bool>,
    pub position: Option<bool>,
    pub recover: Option<bool>,
    pub recover_since: Option<(u64, String)>,
}

/// See [`Body::Again`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Again {
    /// Which.
    pub slots: Vec<u16>,
}

/// See [`Body::Ask`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Ask {
    /// Given back with the answer.
    pub id: u64,
    /// What.
    pub question: Question,
}

/// What every node is asked.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Question {
    /// Its figures.
    Info,
    /// Its channels with subscribers.
    Channels {
        /// As in the API.
        pattern: String,
    },
}

/// See [`Body::Answer`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Answer {
    /// Of the question.
    pub id: u64,
    /// Parts of one node come in order; this is the last.
    pub last: bool,
    /// What it says.
    pub part: AnswerPart,
}

/// A part of one node's answer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum AnswerPart {
    /// To [`Question::Info`].
    Info(NodeInfo),
    /// To [`Question::Channels`]: names and subscriptions.
    Channels(Vec<(String, u32)>),
    /// The node could not say.
    Nothing,
}

/// A node's figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[expect(missing_docs, reason = "they are those of the API's `info`")]
pub struct NodeInfo {
    pub uid: String,
    pub name: String,
    pub version: String,
    pub num_clients: u32,
    pub num_users: u32,
    pub num_subs: u32,
    pub num_channels: u32,
    /// Seconds.
    pub uptime: u64,
}

/// Why bytes are no message. All are to be counted and dropped.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DecodeError {
    /// Of a later release that no longer speaks with this one.
    #[error("version {0} is not known here")]
    Version(u8),
    /// Of a later release.
    #[error("a message of kind {0} is not known here")]
    Kind(u8),
    /// Broken, or another's.
    #[error("it is no message of a node")]
    Malformed,
}

/// A message that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Who told it.
    pub sender: Sender,
    /// What.
    pub body: Body,
    /// It ends with fields that are not known here.
    pub is_longer: bool,
}

fn format() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MESSAGE_BYTES_MAX>()
}

/// The bytes of a message; `None`: it is above [`MESSAGE_BYTES_MAX`].
pub fn encode(sender: Sender, body: &Body) -> Option<Vec<u8>> {
    fn rest(kind: u8, sender: Sender, body: impl Encode) -> Option<Vec<u8>> {
        let mut bytes = vec![VERSION, kind];
        bytes.extend(bincode::encode_to_vec((sender, body), format()).ok()?);
        (bytes.len() <= MESSAGE_BYTES_MAX).then_some(bytes)
    }
    match body {
        Body::Heartbeat(body) => rest(0, sender, body),
        Body::Leaving => rest(1, sender, ()),
        Body::Presence(body) => rest(2, sender, body),
        Body::Want(body) => rest(3, sender, body),
        Body::Command(body) => rest(4, sender, body),
        Body::Again(body) => rest(5, sender, body),
        Body::Ask(body) => rest(6, sender, body),
        Body::Answer(body) => rest(7, sender, body),
    }
}

/// The message that `bytes` are.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    fn rest<T: Decode<()>>(bytes: &[u8], body: impl FnOnce(T) -> Body) -> Result<Decoded, DecodeError> {
        let ((sender, read), len): ((Sender, T), usize) =
            bincode::decode_from_slice(bytes, format()).map_err(|_| DecodeError::Malformed)?;
        Ok(Decoded { sender, body: body(read), is_longer: len < bytes.len() })
    }
    let ([version, kind], bytes) = bytes.split_first_chunk::<2>().ok_or(DecodeError::Malformed)?;
    match (version, kind) {
        (&VERSION, 0) => rest(bytes, Body::Heartbeat),
        (&VERSION, 1) => rest(bytes, |()| Body::Leaving),
        (&VERSION, 2) => rest(bytes, Body::Presence),
        (&VERSION, 3) => rest(bytes, Body::Want),
        (&VERSION, 4) => rest(bytes, Body::Command),
        (&VERSION, 5) => rest(bytes, Body::Again),
        (&VERSION, 6) => rest(bytes, Body::Ask),
        (&VERSION, 7) => rest(bytes, Body::Answer),
        (&VERSION, kind) => Err(DecodeError::Kind(*kind)),
        (version, _) => Err(DecodeError::Version(*version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENDER: Sender = Sender { node: 1 << 100 | 7, incarnation: 9 };

    fn samples() -> Vec<Body> {
        let selector = Selector { user: "7".into(), client: None, whitelist: vec!["a".into()] };
        let command =
            |action| Body::Command(Command { sequence: 1, age_ms: 2, selector: selector.clone(), action });
        vec![
            Body::Heartbeat(Heartbeat {
                name: "a".into(),
                address: "a.example:8000".into(),
                capacity: 100,
                load: 3,
                accepting: true,
                presence_top: 8,
            }),
            Body::Leaving,
            Body::Presence(Batch {
                sequence: 4,
                items: vec![
                    Item::Joined { channel: "c".into(), member: vec![1], listed: true },
                    Item::Left { channel: "c".into(), member: vec![1], listed: false },
                    Item::Whole {
                        to: 3,
                        channel: "c".into(),
                        members: vec![vec![2]],
                        first: true,
                        last: false,
                    },
                ],
            }),
            Body::Want(Want { channels: vec!["c".into()] }),
            command(Action::Disconnect { code: 3000, reason: "r".into() }),
            command(Action::Subscribe { channel: "c".into(), options: Box::default() }),
            command(Action::Unsubscribe { channel: String::new() }),
            command(Action::Refresh { expired: false, expire_at: Some(5) }),
            command(Action::Deliver {
                channel: "c".into(),
                data: b"{}".to_vec(),
                tags: vec![("k".into(), "v".into())],
            }),
            Body::Again(Again { slots: vec![1, 4095] }),
            Body::Ask(Ask { id: 1, question: Question::Channels { pattern: "*".into() } }),
            Body::Answer(Answer { id: 1, last: true, part: AnswerPart::Channels(vec![("c".into(), 1)]) }),
            Body::Answer(Answer { id: 1, last: true, part: AnswerPart::Info(NodeInfo::default()) }),
        ]
    }

    #[test]
    fn messages_are_read_as_they_were_written() {
        for body in samples() {
            let bytes = encode(SENDER, &body).expect("it is short");
            assert_eq!(decode(&bytes), Ok(Decoded { sender: SENDER, body, is_longer: false }));
        }
    }

    #[test]
    fn what_a_later_release_appends_is_ignored() {
        for body in samples() {
            let mut bytes = encode(SENDER, &body).expect("it is short");
            bytes.extend(b"more");
            assert_eq!(decode(&bytes), Ok(Decoded { sender: SENDER, body, is_longer: true }));
        }
    }

    #[test]
    fn what_is_unknown_or_broken_is_told_apart() {
        for body in samples() {
            let bytes = encode(SENDER, &body).expect("it is short");
            for len in 0..bytes.len() {
                assert_eq!(decode(&bytes[..len]), Err(DecodeError::Malformed), "{body:?} {len}");
            }
        }
        assert_eq!(decode(&[VERSION, 200, 1, 2]), Err(DecodeError::Kind(200)));
        assert_eq!(decode(&[VERSION + 1, 0, 1, 2]), Err(DecodeError::Version(VERSION + 1)));
        // A length that promises more than there is takes no memory.
        let want = [&[VERSION, 3, 7, 9][..], &[253, 0, 0, 0, 0, 0, 0, 0, 128]].concat();
        assert_eq!(decode(&want), Err(DecodeError::Malformed));
    }

    /// Whatever one byte becomes, something is read or nothing: never a panic, never much memory.
    #[test]
    fn damaged_messages_are_read_as_something_or_nothing() {
        for body in samples() {
            let bytes = encode(SENDER, &body).expect("it is short");
            for at in 0..bytes.len() {
                for byte in [0, 1, 127, 128, 250, 251, 252, 253, 254, 255] {
                    let mut damaged = bytes.clone();
                    damaged[at] = byte;
                    if let Ok(read) = decode(&damaged) {
                        assert!(encode(read.sender, &read.body).is_some());
                    }
                }
            }
        }
    }

    #[test]
    fn too_large_a_message_is_not_made() {
        let large = |bytes: usize| Body::Want(Want { channels: vec!["x".repeat(bytes)] });
        assert!(encode(SENDER, &large(MESSAGE_BYTES_MAX - 100)).is_some());
        assert!(encode(SENDER, &large(MESSAGE_BYTES_MAX)).is_none());
    }
}
