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

/// Sequences from here on are no numbers to the script.
const SEQUENCE_MAX: u64 = 1 << 53;

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
        id: OwnedId,
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
            Deed::Publish { envelope, .. } => envelope.len(),
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
            Deed::Publish { times, size, id: id.clone(), envelope }
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

    /// A write to the canary's key that changes nothing: replicas that have it have what was done before. Nobody hears it.
    pub(super) fn write(&self, key: &str, nonce: u64) -> Operation {
        self.canary(key, nonce, Bytes::new())
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
            self.append(&mut command, group);
        }
        command
    }

    /// The arguments of operations that go together.
    fn append(&self, command: &mut Cmd, group: &[Operation]) {
        let Operation { place, nonce, deed } = &group[0];
        let mut parameters = Parameters(Vec::with_capacity(72));
        match deed {
            Deed::Publish { times, size, .. } => {
                parameters.begin(b'P', *nonce).times(times).u32(*size);
                parameters.u64(self.ids_window_ms).u32(self.ids_max).u16(group.len());
                let (node, first, last) = sequence(group).unwrap_or_default();
                parameters.u64(node).u64(first).u64(last);
            }
            Deed::Count { .. } => parameters.begin(b'E', *nonce).u64(COUNTER_KEEP_MS).u16(group.len()).end(),
            Deed::Read { times, since, limit, reverse } => {
                parameters.begin(b'R', *nonce).times(times).u8(since.is_some()).u64(since.unwrap_or(0));
                parameters.u32(*limit).u8(*reverse);
            }
            Deed::Clear { times } => parameters.begin(b'C', *nonce).times(times).end(),
            Deed::Canary { .. } => parameters.begin(b'K', *nonce).end(),
        }
        command.arg(&*place.unit).arg(&parameters.0[..]);
        match deed {
            Deed::Publish { .. } => {
                command.arg(ids(group)).arg(envelopes(group));
            }
            Deed::Count { .. } => {
                command.arg(envelopes(group));
            }
            Deed::Canary { payload } => {
                command.arg(&payload[..]);
            }
            Deed::Read { .. } | Deed::Clear { .. } => (),
        }
    }
}

/// What an operation is told beside names and publications, as bytes: the script reads them with one call.
struct Parameters(Vec<u8>);

impl Parameters {
    fn begin(&mut self, letter: u8, nonce: u64) -> &mut Parameters {
        self.0.push(letter);
        self.u64(nonce)
    }

    fn u8(&mut self, number: impl Into<u8>) -> &mut Parameters {
        self.0.push(number.into());
        self
    }

    /// Of at most [`BATCH_MAX`].
    fn u16(&mut self, number: usize) -> &mut Parameters {
        self.0.extend((number as u16).to_be_bytes());
        self
    }

    fn u32(&mut self, number: u32) -> &mut Parameters {
        self.0.extend(number.to_be_bytes());
        self
    }

    fn u64(&mut self, number: u64) -> &mut Parameters {
        self.0.extend(number.to_be_bytes());
        self
    }

    fn times(&mut self, times: &Times) -> &mut Parameters {
        self.u64(times.history).u64(times.keep)
    }

    fn end(&mut self) {}
}

/// The node whose sequence all ids are of, and the first and last of them, if they rise.
fn sequence(group: &[Operation]) -> Option<(u64, u64, u64)> {
    let (mut node, mut first, mut last) = (0, 0, 0);
    for operation in group {
        let Deed::Publish { id: OwnedId::Node(incarnation, sequence), .. } = operation.deed else {
            return None;
        };
        if first == 0 {
            (node, first) = (incarnation, sequence);
        }
        if incarnation != node || sequence <= last || sequence >= SEQUENCE_MAX {
            return None;
        }
        last = sequence;
    }
    Some((node, first, last))
}

/// The ids of publications, each behind its length.
fn ids(group: &[Operation]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(19 * group.len());
    for operation in group {
        match &operation.deed {
            Deed::Publish { id: OwnedId::Node(incarnation, sequence), .. } => {
                // One that is too high is stored by itself, as a key is.
                let letter = if *sequence < SEQUENCE_MAX { b'n' } else { b'N' };
                bytes.extend(17u16.to_be_bytes());
                bytes.push(letter);
                bytes.extend(incarnation.to_be_bytes());
                bytes.extend(sequence.to_be_bytes());
            }
            Deed::Publish { id: OwnedId::Key(key), .. } => {
                bytes.extend((1 + key.len() as u16).to_be_bytes());
                bytes.push(b'k');
                bytes.extend(key.as_bytes());
            }
            _ => (),
        }
    }
    bytes
}

/// The envelopes of publications, each behind its length.
fn envelopes(group: &[Operation]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(group.iter().map(Operation::bytes).sum());
    for operation in group {
        if let Deed::Publish { envelope, .. } | Deed::Count { envelope } = &operation.deed {
            bytes.extend((envelope.len() as u32).to_be_bytes());
            bytes.extend(&envelope[..]);
        }
    }
    bytes
}

/// Reads what [`envelopes`] wrote.
fn envelopes_of(mut bytes: &[u8]) -> Option<Vec<&[u8]>> {
    let mut envelopes = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let (envelope, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        envelopes.push(envelope);
        bytes = rest;
    }
    bytes.is_empty().then_some(envelopes)
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
        /// One for all that were published together.
        key: Rc<KeyState>,
        offset: u64,
        repeated: bool,
    },
    Counted {
        key: Rc<KeyState>,
    },
    Page {
        key: KeyState,
        floor: u64,
        more: bool,
        /// By offset.
        entries: Vec<(u64, Bytes)>,
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
    let (count, rest) = rest.split_first_chunk::<2>()?;
    let count = usize::from(u16::from_be_bytes(*count));
    if count > BATCH_MAX {
        return None;
    }
    match letter {
        b'N' => {
            let (previous, (key, _)) = (u64_at(rest, 0)?, state(&rest[8..])?);
            let (key, before) = (Rc::new(key), previous..previous.checked_add(count as u64)?);
            answers.extend(before.map(|before| Answer::Published {
                key: key.clone(),
                offset: before + 1,
                repeated: false,
            }));
        }
        b'P' => {
            let (places, rest) = rest.split_at_checked(count * PLACE_BYTES)?;
            let key = Rc::new(state(rest)?.0);
            for place in places.chunks_exact(PLACE_BYTES) {
                let (offset, repeated) = (u64_at(place, 1)?, place[0] == 1);
                answers.push(Answer::Published { key: key.clone(), offset, repeated });
            }
        }
        b'E' => {
            let (key, _) = state(rest)?;
            answers.extend(std::iter::repeat_n(Answer::Counted { key: Rc::new(key) }, count));
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
            let span = bytes_of(items.next()?)?;
            let Value::Array(chunks) = items.next()? else { return None };
            Answer::Page { key, floor, more, entries: entries(u64_at(&span, 0)?, u64_at(&span, 8)?, chunks)? }
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

/// What is in (after, last] of chunks, by offset.
fn entries(after: u64, last: u64, chunks: Vec<Value>) -> Option<Vec<(u64, Bytes)>> {
    let mut entries = Vec::new();
    let mut chunks = chunks.into_iter();
    while let (Some(start), Some(chunk)) = (chunks.next(), chunks.next()) {
        let (start, chunk) = (u64_at(&bytes_of(start)?, 0)?, Bytes::from(bytes_of(chunk)?));
        let envelopes = envelopes_of(&chunk)?;
        let end = start.checked_add(envelopes.len() as u64)?;
        let meant = (start..end).zip(envelopes).filter(|(at, _)| after < *at && *at <= last);
        entries.extend(meant.map(|(offset, envelope)| (offset, chunk.slice_ref(envelope))));
    }
    entries.sort_unstable_by_key(|(offset, _)| *offset);
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
    let (branches, rest) = rest.get(25..)?.split_at_checked(branches * BRANCH_BYTES)?;
    let envelopes = envelopes_of(rest)?;
    if offset.checked_sub(previous) != Some(envelopes.len() as u64) {
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
    fn ids_of_all_kinds_differ() {
        let operations = |ids: &[OwnedId]| -> Vec<Operation> {
            let times = Times { history: 1, keep: 1 };
            let deed =
                |id: &OwnedId| Deed::Publish { times, size: 1, id: id.clone(), envelope: Bytes::new() };
            let place = Rc::new(Place { key: "k".into(), unit: "k".into(), slot: 0 });
            ids.iter().map(|id| Operation { place: place.clone(), nonce: 1, deed: deed(id) }).collect()
        };
        let node = |sequence| OwnedId::Node(7, sequence);
        let bytes = |id: OwnedId| ids(&operations(&[id]));
        assert_eq!(bytes(OwnedId::Key("n".into())), [0, 2, b'k', b'n']);
        assert_eq!(bytes(node(2))[..3], [0, 17, b'n']);
        assert_eq!(bytes(node(SEQUENCE_MAX))[..3], [0, 17, b'N']);
        assert_eq!(sequence(&operations(&[node(2), node(5)])), Some((7, 2, 5)));
        for ids in [
            &[node(2), OwnedId::Key("a".into())][..],
            &[node(2), node(2)],
            &[node(3), node(2)],
            &[node(2), OwnedId::Node(8, 3)],
            &[node(SEQUENCE_MAX)],
            &[node(0)],
        ] {
            assert_eq!(sequence(&operations(ids)), None, "{ids:?}");
        }
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
        fn no_message_panics(bytes: Vec<u8>, start: [u8; 8], count in 0u16..200, letter in prop::sample::select(b"NPE".to_vec())) {
            let _ = heard(&bytes);
            let _ = state(&bytes);
            let answer = [&[letter][..], &count.to_be_bytes(), &bytes].concat();
            let _ = published(&answer, &mut Vec::new());
            let chunk = [start.to_vec(), bytes].map(Value::BulkString).to_vec();
            let _ = entries(0, u64::MAX, chunk);
        }

        #[test]
        fn a_page_is_cut_as_it_was_meant(after in 0u64..50, length in 0u64..50, sizes in prop::collection::vec(1usize..9, 0..9)) {
            let last = after + length;
            let mut chunks = Vec::new();
            let mut top = 0u64;
            for size in sizes {
                let mut chunk = Vec::new();
                for offset in top + 1..=top + size as u64 {
                    chunk.extend(1u32.to_be_bytes());
                    chunk.push(offset as u8);
                }
                chunks.insert(0, [Value::BulkString((top + 1).to_be_bytes().to_vec()), Value::BulkString(chunk)]);
                top += size as u64;
            }
            let read = entries(after, last, chunks.concat()).expect("a page");
            let expected: Vec<u64> = (after + 1..=last.min(top)).collect();
            prop_assert_eq!(read.iter().map(|(offset, _)| *offset).collect::<Vec<_>>(), expected);
            prop_assert!(read.iter().all(|(offset, envelope)| envelope[..] == [*offset as u8]));
        }
    }
}
