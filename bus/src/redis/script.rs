//! The script's face: operations as commands, its answers and messages as values.
//!
//! Owns: the layouts that `bus.lua` writes. Must not know: connections, what answers mean for a channel.
//! Invariant: nothing that a server says panics; what is not of the script is `None`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use redis::{Cmd, Value};

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

/// Operations of one call.
pub(super) const BATCH_MAX: usize = 128;

/// Channels whose places are remembered; above it they are forgotten together.
const PLACES_MAX: usize = 100_000;

/// About what an operation takes beside its key and what is published.
const OPERATION_BYTES: usize = 64;

/// Bytes of a publication's place in an answer.
const PLACE_BYTES: usize = 9;

/// Bytes of a key's state before its lineage.
const STATE_BYTES: usize = 104;

/// Bytes of one branch.
const BRANCH_BYTES: usize = 16;

/// Key and pub/sub channel of a channel, and the hash slot of both.
#[derive(Debug)]
pub(super) struct Place {
    key: String,
    unit: String,
    /// The hash slot that they are of.
    pub(super) slot: u16,
}

/// What is done with a key.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Deed {
    /// Of a positioned channel: times and size of its history, id and envelope.
    Publish {
        times: Times,
        size: u32,
        id: Bytes,
        envelope: Bytes,
    },
    /// Of an ephemeral one.
    Count {
        envelope: Bytes,
    },
    Read {
        times: Times,
        since: Option<u64>,
        limit: u32,
        reverse: bool,
    },
    Clear {
        times: Times,
    },
    Canary {
        payload: Bytes,
    },
}

/// How long history and position are kept, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    history: u64,
    keep: u64,
}

impl Times {
    fn of(target: &Target) -> Times {
        let (history, meta) = (target.options.history_ttl_ms, target.options.meta_ttl_ms);
        Times { history: history.min(TIME_MS_MAX), keep: meta.max(history).clamp(1, TIME_MS_MAX) }
    }
}

/// One operation of a call.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    place: Rc<Place>,
    nonce: u64,
    deed: Deed,
}

impl Operation {
    /// The hash slot that it is of.
    pub(super) fn slot(&self) -> u16 {
        self.place.slot
    }

    /// Its channel's key.
    pub(super) fn key(&self) -> &str {
        &self.place.key
    }

    /// About how many bytes it takes.
    pub(super) fn bytes(&self) -> usize {
        let bytes = match &self.deed {
            Deed::Publish { id, envelope, .. } => id.len() + envelope.len(),
            Deed::Count { envelope } => envelope.len(),
            Deed::Canary { payload } => payload.len(),
            Deed::Read { .. } | Deed::Clear { .. } => 0,
        };
        self.place.key.len() + bytes + OPERATION_BYTES
    }

    /// Whether the script may do both as one: publications on one channel under the same options.
    fn goes_with(&self, next: &Operation) -> bool {
        let alike = match (&self.deed, &next.deed) {
            (Deed::Publish { times, size, .. }, Deed::Publish { times: others, size: other, .. }) => {
                times == others && size == other
            }
            (Deed::Count { .. }, Deed::Count { .. }) => true,
            _ => false,
        };
        alike && self.place.key == next.place.key
    }
}

/// Builds operations.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) names: Names,
    publish_command: &'static str,
    ids_window_ms: u64,
    ids_max: u32,
    /// Of channels used lately, so that names are made and hashed once. Bounded by [`PLACES_MAX`].
    places: RefCell<HashMap<Arc<str>, Rc<Place>>>,
}

impl Script {
    pub(super) fn new(options: &RedisOptions) -> Script {
        Script {
            names: Names::new(options),
            publish_command: if options.is_cluster() { "SPUBLISH" } else { "PUBLISH" },
            ids_window_ms: u64::try_from(options.ids_window.as_millis()).unwrap_or(TIME_MS_MAX),
            ids_max: options.ids_max,
            places: RefCell::default(),
        }
    }

    /// Where a channel lives.
    pub(super) fn place(&self, name: &Arc<str>) -> Rc<Place> {
        let mut places = self.places.borrow_mut();
        if let Some(place) = places.get(name) {
            return place.clone();
        }
        if places.len() >= PLACES_MAX {
            places.clear();
        }
        let (key, unit) = (self.names.key(name), self.names.unit(name));
        let place = Rc::new(Place { slot: hash_slot(&key), key, unit });
        places.insert(name.clone(), place.clone());
        place
    }

    fn operation(&self, target: &Target, nonce: Epoch, deed: Deed) -> Operation {
        Operation { place: self.place(&target.name), nonce: nonce.get(), deed }
    }

    /// A publication. `nonce` is the attempt's own (L4).
    pub(super) fn publish(&self, target: &Target, id: &OwnedId, envelope: Bytes, nonce: Epoch) -> Operation {
        let deed = if target.options.is_positioned() {
            let (times, size) = (Times::of(target), target.options.history_size);
            Deed::Publish { times, size, id: id_bytes(id), envelope }
        } else {
            Deed::Count { envelope }
        };
        self.operation(target, nonce, deed)
    }

    /// A read of position and history.
    pub(super) fn read(&self, target: &Target, query: &HistoryQuery, nonce: Epoch) -> Operation {
        let since = query.since.map(|since| since.offset.min(TIME_MS_MAX));
        let (limit, reverse) = (query.limit, query.reverse);
        self.operation(target, nonce, Deed::Read { times: Times::of(target), since, limit, reverse })
    }

    /// Removes the history.
    pub(super) fn clear(&self, target: &Target, nonce: Epoch) -> Operation {
        self.operation(target, nonce, Deed::Clear { times: Times::of(target) })
    }

    /// The canary. `nonce` names the data if it is new.
    pub(super) fn canary(&self, key: &str, nonce: u64, payload: Bytes) -> Operation {
        let place = Place { key: key.to_owned(), unit: key.to_owned(), slot: hash_slot(key) };
        Operation { place: Rc::new(place), nonce, deed: Deed::Canary { payload } }
    }

    /// The command that runs operations, which are all of one hash slot in a cluster, in their order.
    pub(super) fn call(&self, sha: &str, operations: &[Operation]) -> Cmd {
        let mut command = redis::cmd("EVALSHA");
        let groups = || operations.chunk_by(Operation::goes_with);
        command.arg(sha).arg(groups().count());
        for group in groups() {
            command.arg(group[0].key());
        }
        command.arg(self.publish_command);
        for group in groups() {
            self.write(&mut command, group);
        }
        command
    }

    /// The letter and arguments of operations that go together.
    fn write(&self, command: &mut Cmd, group: &[Operation]) {
        let Operation { place, nonce, deed } = &group[0];
        let (unit, nonce) = (&*place.unit, nonce.to_be_bytes());
        match *deed {
            Deed::Publish { times, size, .. } => {
                command.arg("P").arg(unit).arg(&nonce).arg(times.history).arg(times.keep);
                command.arg(size).arg(self.ids_window_ms).arg(self.ids_max).arg(group.len());
            }
            Deed::Count { .. } => {
                command.arg("E").arg(unit).arg(&nonce).arg(COUNTER_KEEP_MS).arg(group.len());
            }
            Deed::Read { times, since, limit, reverse } => {
                command.arg("R").arg(unit).arg(&nonce).arg(times.history).arg(times.keep);
                match since {
                    Some(since) => command.arg(since),
                    None => command.arg(""),
                };
                command.arg(limit).arg(u8::from(reverse));
            }
            Deed::Clear { times } => {
                command.arg("C").arg(unit).arg(&nonce).arg(times.history).arg(times.keep);
            }
            Deed::Canary { ref payload } => {
                command.arg("K").arg(&nonce).arg(&payload[..]);
            }
        }
        for operation in group {
            match &operation.deed {
                Deed::Publish { id, envelope, .. } => command.arg(&id[..]).arg(&envelope[..]),
                Deed::Count { envelope } => command.arg(&envelope[..]),
                _ => command,
            };
        }
    }
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

/// The answers of a call, one for each of its operations; `None` if this is no answer of the script.
pub(super) fn answers(value: Value) -> Option<Vec<Answer>> {
    let Value::Array(items) = value else { return None };
    let mut answers = Vec::with_capacity(items.len());
    for item in items {
        match item {
            Value::BulkString(bytes) => published(&bytes, &mut answers)?,
            Value::Array(items) => answer(items, &mut answers)?,
            _ => return None,
        }
    }
    Some(answers)
}

/// Publications on one channel.
fn published(bytes: &[u8], answers: &mut Vec<Answer>) -> Option<()> {
    let (letter, rest) = bytes.split_first()?;
    let (count, rest) = rest.split_at_checked(4)?;
    let count = u32::from_be_bytes(count.try_into().ok()?) as usize;
    if count > BATCH_MAX {
        return None;
    }
    match letter {
        b'P' => {
            let (places, rest) = rest.split_at_checked(count * PLACE_BYTES)?;
            let (key, _) = state(rest)?;
            for place in places.chunks_exact(PLACE_BYTES) {
                let (offset, repeated) = (u64_at(place, 1)?, place[0] == 1);
                answers.push(Answer::Published { key, offset, repeated });
            }
        }
        b'E' => {
            let (key, _) = state(rest)?;
            answers.extend(std::iter::repeat_n(Answer::Counted { key }, count));
        }
        _ => return None,
    }
    Some(())
}

fn answer(items: Vec<Value>, answers: &mut Vec<Answer>) -> Option<()> {
    let mut items = items.into_iter();
    let letter = bytes_of(items.next()?)?;
    let answer = match letter.first()? {
        b'R' => {
            let (key, floor) = state(&bytes_of(items.next()?)?)?;
            let more = items.next()? == Value::Int(1);
            let Value::Array(fields) = items.next()? else { return None };
            Answer::Page { key, floor, more, entries: entries(fields)? }
        }
        b'C' => Answer::Cleared { key: state(&bytes_of(items.next()?)?)?.0 },
        b'K' => {
            let replid = bytes_of(items.next()?)?;
            let data = bytes_of(items.next()?)?.try_into().ok()?;
            let life = Life { replid: replication_id(&replid)?, data: u64::from_be_bytes(data) };
            let Value::Int(replicas) = items.next()? else { return None };
            Answer::Canary(life, usize::try_from(replicas).ok()?)
        }
        b'X' => {
            let message = String::from_utf8_lossy(&bytes_of(items.next()?)?).into_owned();
            let Value::Int(count) = items.next()? else { return None };
            let count = usize::try_from(count).ok().filter(|count| *count <= BATCH_MAX)?;
            answers.extend(std::iter::repeat_n(Answer::Failed(message), count));
            return Some(());
        }
        _ => return None,
    };
    answers.push(answer);
    Some(())
}

fn entries(fields: Vec<Value>) -> Option<Vec<(u64, Vec<u8>)>> {
    let mut entries = Vec::with_capacity(fields.len() / 2);
    let mut fields = fields.into_iter();
    while let (Some(offset), Some(envelope)) = (fields.next(), fields.next()) {
        let offset = u64_at(&bytes_of(offset)?, 0)?;
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
    /// The publications (previous, offset]; word of a position where there are none.
    Message {
        key: &'a [u8],
        ephemeral: bool,
        epoch: Epoch,
        lineage: Lineage,
        previous: u64,
        offset: u64,
        envelopes: Vec<&'a [u8]>,
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
    let (branches, mut rest) = rest.get(25..)?.split_at_checked(branches * BRANCH_BYTES)?;
    let mut envelopes = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (envelope, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        envelopes.push(envelope);
        rest = after;
    }
    if !rest.is_empty() || offset.checked_sub(previous) != Some(envelopes.len() as u64) {
        return None;
    }
    Some(Heard::Message {
        key,
        ephemeral: flags & 1 != 0,
        epoch: Epoch::new(epoch),
        lineage: lineage(branches)?,
        previous,
        offset,
        envelopes,
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
        for number in [7u64, 4, 6] {
            bytes.extend(number.to_be_bytes());
        }
        bytes.push(1);
        bytes.extend(6u64.to_be_bytes());
        bytes.extend(4u64.to_be_bytes());
        for envelope in [&b"one"[..], b"other"] {
            bytes.extend((envelope.len() as u32).to_be_bytes());
            bytes.extend(envelope);
        }
        let Some(Heard::Message { key, ephemeral, epoch, lineage, previous, offset, envelopes }) =
            heard(&bytes)
        else {
            panic!("a message")
        };
        assert_eq!((key, ephemeral, epoch), (&b"key"[..], true, Epoch::new(7)));
        assert_eq!((previous, offset, envelopes), (4, 6, vec![&b"one"[..], b"other"]));
        assert_eq!(lineage.left_at(Epoch::new(6)), Some(4));
        for length in 0..bytes.len() {
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
