//! The script's face: operations as commands, its answers and messages as values.
//!
//! Owns: the layouts that `bus.lua` writes. Must not know: connections, what answers mean for a channel.
//! Invariant: nothing that a server says panics; what is not of the script is `None`.

use bytes::Bytes;
use redis::Value;

use crate::backend::{OwnedId, Target};
use crate::epoch::Epoch;
use crate::lineage::{Branch, KeyState, Lineage, ReplicationId};
use crate::redis::names::{Names, hash_slot};
use crate::redis::options::RedisOptions;
use crate::types::HistoryQuery;

/// The script.
pub(super) const LUA: &str = include_str!("bus.lua");

/// How long the counter of an ephemeral channel is kept after its last publication, in milliseconds.
const COUNTER_KEEP_MS: u64 = 24 * 3600 * 1000;

/// Longest time in the script's arithmetic, in milliseconds: some 4,000 years.
const TIME_MS_MAX: u64 = 1 << 47;

/// Bytes of a key's state before its lineage.
const STATE_BYTES: usize = 104;

/// Bytes of one branch.
const BRANCH_BYTES: usize = 16;

/// One operation of a call.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    key: String,
    letter: u8,
    arguments: Vec<Bytes>,
}

impl Operation {
    /// The hash slot that it is of.
    pub(super) fn slot(&self) -> u16 {
        hash_slot(&self.key)
    }

    /// About how many bytes it takes.
    pub(super) fn bytes(&self) -> usize {
        self.key.len() + self.arguments.iter().map(|argument| argument.len() + 8).sum::<usize>()
    }
}

/// Builds operations.
#[derive(Clone, Debug)]
pub(super) struct Script {
    pub(super) names: Names,
    publish_command: &'static str,
    ids_window_ms: u64,
    ids_max: u32,
}

impl Script {
    pub(super) fn new(options: &RedisOptions) -> Script {
        Script {
            names: Names::new(options),
            publish_command: if options.is_cluster() { "SPUBLISH" } else { "PUBLISH" },
            ids_window_ms: u64::try_from(options.ids_window.as_millis()).unwrap_or(TIME_MS_MAX),
            ids_max: options.ids_max,
        }
    }

    fn operation(&self, letter: u8, target: &Target, nonce: Epoch, rest: Vec<Bytes>) -> Operation {
        let mut arguments = vec![self.names.unit(&target.name).into(), nonce_bytes(nonce.get())];
        arguments.extend(rest);
        Operation { key: self.names.key(&target.name), letter, arguments }
    }

    /// A publication. `nonce` is the attempt's own (L4).
    pub(super) fn publish(&self, target: &Target, id: &OwnedId, envelope: Bytes, nonce: Epoch) -> Operation {
        let options = &target.options;
        if !options.is_positioned() {
            return self.operation(b'E', target, nonce, vec![number(COUNTER_KEEP_MS), envelope]);
        }
        let (ttl, keep) = times(target);
        let (size, window) = (number(u64::from(options.history_size)), number(self.ids_window_ms));
        let most = number(u64::from(self.ids_max));
        self.operation(b'P', target, nonce, vec![ttl, keep, size, window, most, id_bytes(id), envelope])
    }

    /// A read of position and history.
    pub(super) fn read(&self, target: &Target, query: &HistoryQuery, nonce: Epoch) -> Operation {
        let (ttl, keep) = times(target);
        let since = query.since.map_or_else(Bytes::new, |since| number(since.offset.min(TIME_MS_MAX)));
        let limit = number(u64::from(query.limit));
        let reverse = Bytes::from_static(if query.reverse { b"1" } else { b"0" });
        self.operation(b'R', target, nonce, vec![ttl, keep, since, limit, reverse])
    }

    /// Removes the history.
    pub(super) fn clear(&self, target: &Target, nonce: Epoch) -> Operation {
        let (ttl, keep) = times(target);
        self.operation(b'C', target, nonce, vec![ttl, keep])
    }

    /// The canary. `nonce` names the data if it is new.
    pub(super) fn canary(&self, key: &str, nonce: u64, payload: Bytes) -> Operation {
        Operation { key: key.to_owned(), letter: b'K', arguments: vec![nonce_bytes(nonce), payload] }
    }

    /// The command that runs operations, which are all of one hash slot in a cluster.
    pub(super) fn call(&self, sha: &str, operations: &[Operation]) -> redis::Cmd {
        let mut command = redis::cmd("EVALSHA");
        command.arg(sha).arg(operations.len());
        for operation in operations {
            command.arg(&operation.key);
        }
        command.arg(self.publish_command);
        for operation in operations {
            command.arg(&[operation.letter][..]);
            for argument in &operation.arguments {
                command.arg(&argument[..]);
            }
        }
        command
    }
}

fn times(target: &Target) -> (Bytes, Bytes) {
    let (ttl, meta) = (target.options.history_ttl_ms, target.options.meta_ttl_ms);
    (number(ttl.min(TIME_MS_MAX)), number(keep_ms(ttl, meta)))
}

/// How long a key is kept after its last use.
fn keep_ms(ttl: u64, meta: u64) -> u64 {
    meta.max(ttl).clamp(1, TIME_MS_MAX)
}

fn number(number: u64) -> Bytes {
    number.to_string().into()
}

fn nonce_bytes(nonce: u64) -> Bytes {
    Bytes::copy_from_slice(&nonce.to_be_bytes())
}

fn id_bytes(id: &OwnedId) -> Bytes {
    match id {
        OwnedId::Node(incarnation, sequence) => {
            let mut bytes = b"n".to_vec();
            bytes.extend(incarnation.to_be_bytes());
            bytes.extend(sequence.to_be_bytes());
            bytes.into()
        }
        OwnedId::Key(key) => format!("k{key}").into(),
    }
}

/// Which master, and which data of it: another value of either is another life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    pub(super) replid: ReplicationId,
    pub(super) data: u64,
}

/// What an operation answers.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Published {
        key: KeyState,
        offset: u64,
        repeated: bool,
    },
    Counted {
        key: KeyState,
    },
    Page {
        key: KeyState,
        floor: u64,
        more: bool,
        entries: Vec<(u64, Vec<u8>)>,
    },
    Cleared {
        key: KeyState,
    },
    /// With the replicas that are connected.
    Canary(Life, usize),
    Failed(String),
}

/// The answers of a call; `None` if this is no answer of the script.
pub(super) fn answers(value: Value) -> Option<Vec<Answer>> {
    let Value::Array(items) = value else { return None };
    items.into_iter().map(answer).collect()
}

fn answer(value: Value) -> Option<Answer> {
    let Value::Array(items) = value else { return None };
    let mut items = items.into_iter();
    let letter = bytes_of(items.next()?)?;
    match letter.first()? {
        b'P' => {
            let (key, _) = state(&bytes_of(items.next()?)?)?;
            let offset = std::str::from_utf8(&bytes_of(items.next()?)?).ok()?.parse().ok()?;
            Some(Answer::Published { key, offset, repeated: items.next()? == Value::Int(1) })
        }
        b'E' => Some(Answer::Counted { key: state(&bytes_of(items.next()?)?)?.0 }),
        b'R' => {
            let (key, floor) = state(&bytes_of(items.next()?)?)?;
            let more = items.next()? == Value::Int(1);
            let Value::Array(fields) = items.next()? else { return None };
            Some(Answer::Page { key, floor, more, entries: entries(fields)? })
        }
        b'C' => Some(Answer::Cleared { key: state(&bytes_of(items.next()?)?)?.0 }),
        b'K' => {
            let replid = bytes_of(items.next()?)?;
            let data = bytes_of(items.next()?)?.try_into().ok()?;
            let life = Life { replid: replication_id(&replid)?, data: u64::from_be_bytes(data) };
            let Value::Int(replicas) = items.next()? else { return None };
            Some(Answer::Canary(life, usize::try_from(replicas).ok()?))
        }
        b'X' => Some(Answer::Failed(String::from_utf8_lossy(&bytes_of(items.next()?)?).into_owned())),
        _ => None,
    }
}

fn entries(fields: Vec<Value>) -> Option<Vec<(u64, Vec<u8>)>> {
    let mut entries = Vec::with_capacity(fields.len() / 2);
    let mut fields = fields.into_iter();
    while let (Some(offset), Some(envelope)) = (fields.next(), fields.next()) {
        let offset = std::str::from_utf8(&bytes_of(offset)?).ok()?.parse().ok()?;
        entries.push((offset, bytes_of(envelope)?));
    }
    Some(entries)
}

fn bytes_of(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.into_bytes()),
        _ => None,
    }
}

fn replication_id(hex: &[u8]) -> Option<ReplicationId> {
    ReplicationId::parse(std::str::from_utf8(hex).ok()?)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// A key's state and floor.
fn state(bytes: &[u8]) -> Option<(KeyState, u64)> {
    let replid = replication_id(bytes.get(..40)?)?;
    let epoch = Epoch::new(u64_at(bytes, 40)?);
    let (top, floor) = (u64_at(bytes, 48)?, u64_at(bytes, 56)?);
    let lineage = lineage(bytes.get(STATE_BYTES..)?)?;
    Some((KeyState { epoch, replid, top, lineage }, floor))
}

fn lineage(bytes: &[u8]) -> Option<Lineage> {
    let mut lineage = Lineage::EMPTY;
    for branch in bytes.chunks(BRANCH_BYTES) {
        lineage.push(Branch { epoch: Epoch::new(u64_at(branch, 0)?), top: u64_at(branch, 8)? });
    }
    Some(lineage)
}

/// What comes over a subscription.
#[derive(Clone, Debug)]
pub(super) enum Heard<'a> {
    /// A publication, or word of a position where `envelope` is empty.
    Message {
        key: &'a [u8],
        ephemeral: bool,
        epoch: Epoch,
        lineage: Lineage,
        previous: u64,
        offset: u64,
        envelope: &'a [u8],
    },
    /// A canary, of whichever node.
    Canary { life: Life, payload: &'a [u8] },
}

/// Reads a message; `None` if it is none of the script.
pub(super) fn heard(bytes: &[u8]) -> Option<Heard<'_>> {
    let (kind, rest) = bytes.split_first()?;
    if *kind == 2 {
        let life = Life { replid: replication_id(rest.get(..40)?)?, data: u64_at(rest, 40)? };
        return Some(Heard::Canary { life, payload: rest.get(48..)? });
    }
    if *kind != 1 {
        return None;
    }
    let (flags, rest) = rest.split_first()?;
    let length = usize::from(u16::from_be_bytes(rest.get(..2)?.try_into().ok()?));
    let (key, rest) = rest.get(2..)?.split_at_checked(length)?;
    let (epoch, previous, offset) = (u64_at(rest, 0)?, u64_at(rest, 8)?, u64_at(rest, 16)?);
    let branches = usize::from(*rest.get(24)?);
    let (branches, envelope) = rest.get(25..)?.split_at_checked(branches * BRANCH_BYTES)?;
    Some(Heard::Message {
        key,
        ephemeral: flags & 1 != 0,
        epoch: Epoch::new(epoch),
        lineage: lineage(branches)?,
        previous,
        offset,
        envelope,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ids_of_both_kinds_differ() {
        let key = |text: &str| id_bytes(&OwnedId::Key(text.into()));
        assert_eq!(id_bytes(&OwnedId::Node(1, 2)).len(), 17);
        assert_eq!(key("n"), "kn");
        assert_ne!(key(""), id_bytes(&OwnedId::Node(0, 0)));
    }

    #[test]
    fn a_message_is_read() {
        let mut bytes = vec![1, 1, 0, 3];
        bytes.extend(b"key");
        for number in [7u64, 4, 5] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.push(1);
        bytes.extend(6u64.to_be_bytes());
        bytes.extend(4u64.to_be_bytes());
        bytes.extend(b"envelope");
        let Some(Heard::Message { key, ephemeral, epoch, lineage, previous, offset, envelope }) =
            heard(&bytes)
        else {
            panic!("a message")
        };
        assert_eq!((key, ephemeral, epoch), (&b"key"[..], true, Epoch::new(7)));
        assert_eq!((previous, offset, envelope), (4, 5, &b"envelope"[..]));
        assert_eq!(lineage.left_at(Epoch::new(6)), Some(4));
        for length in 0..bytes.len() - 8 {
            assert!(heard(&bytes[..length]).is_none(), "{length}");
        }
    }

    proptest! {
        #[test]
        fn no_message_panics(bytes: Vec<u8>) {
            let _ = heard(&bytes);
            let _ = state(&bytes);
        }
    }
}
