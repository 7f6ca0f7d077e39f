//! One partition as this node has read it: streams, histories, ids seen, and the generation.
//!
//! Owns: what a partition's messages mean, one after the other. Must not know: how they are fetched, who waits.
//!
//! Every node that reads a partition applies the same messages in the same order, so all agree which is a
//! publication, what it follows, and in which epoch it stands, without asking one another. A publisher learns its
//! answer by reading its own message back.
//!
//! Offsets here are Kafka's plus one, for 0 is before the first. Where reading began above the partition's start
//! ([`PartitionLog::base`]), a channel not seen since stands at that base, and its history reaches back to it.
//!
//! Invariants: messages are applied without a hole; within a generation an offset names one publication; what is
//! kept is at most [`LogLimits`], the oldest goes first.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;

use super::wire::{Body, Generation, Stamp, epoch_of};
use crate::backend::{OwnedId, ReadPage, append_record};
use crate::epoch::{Epoch, Position};
use crate::lineage::Lineage;
use crate::types::{Accepted, BusError, ChannelOptions, HistoryQuery, Page};

/// Bounds of one partition's memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct LogLimits {
    /// Records kept, in bytes.
    pub(super) bytes_max: usize,
    /// Channels remembered that nobody here subscribes.
    pub(super) channels_max: usize,
    /// Ids remembered of each kind: keys, and nodes' own.
    pub(super) ids_max: usize,
    /// How long an id is remembered, in milliseconds of the log's time.
    pub(super) ids_window_ms: u64,
}

/// What the message at an offset was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Kafka's offset.
    pub(super) offset: i64,
    /// Who wrote it, and its number there; zeros for what is not ours.
    pub(super) writer: (u64, u64),
}

/// What a message did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Applied {
    /// A mark, or something that is not ours.
    Nothing,
    /// It was written in another generation than the current one: it is as if it were not there.
    Stale,
    /// The generation changed: every epoch of the partition is another one from here.
    Fenced,
    /// A publication, or (`repeated`) none.
    Publication { name: Arc<str>, accepted: Accepted, previous: u64, record: Bytes },
    /// A publication of an ephemeral channel.
    Ephemeral { name: Arc<str>, record: Bytes },
    /// A channel's history is empty now.
    Cleared { position: Position },
}

/// A message is missing between the last one applied and this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hole;

#[derive(Debug)]
struct Kept {
    offset: u64,
    previous: u64,
    time_ms: i64,
    record: Bytes,
}

#[derive(Debug)]
struct Stream {
    top: u64,
    kept: VecDeque<Kept>,
    /// Subscribed here: not to be forgotten.
    pinned: bool,
    /// Used since it was last looked at.
    used: bool,
}

/// See the module's doc.
#[derive(Debug)]
pub(super) struct PartitionLog {
    limits: LogLimits,
    generation: Generation,
    last: Option<Seen>,
    base: u64,
    streams: HashMap<Arc<str>, Stream>,
    /// Streams in the order in which they are looked at to be forgotten.
    oldest: VecDeque<Arc<str>>,
    /// What is kept, oldest first; entries whose record is gone already are skipped.
    kept: VecDeque<(Arc<str>, u64)>,
    kept_bytes: usize,
    kept_count: usize,
    keys: Window,
    nodes: Window,
    /// Time of the last message, and when (of the caller's clock) it was applied.
    time_ms: i64,
    applied_ms: u64,
}

impl PartitionLog {
    pub(super) fn new(limits: LogLimits) -> PartitionLog {
        PartitionLog {
            limits,
            generation: Generation::NONE,
            last: None,
            base: 0,
            streams: HashMap::new(),
            oldest: VecDeque::new(),
            kept: VecDeque::new(),
            kept_bytes: 0,
            kept_count: 0,
            keys: Window::default(),
            nodes: Window::default(),
            time_ms: 0,
            applied_ms: 0,
        }
    }

    /// The current generation.
    pub(super) fn generation(&self) -> Generation {
        self.generation
    }

    /// The last message applied.
    pub(super) fn last(&self) -> Option<Seen> {
        self.last
    }

    /// The channel's current epoch.
    pub(super) fn epoch(&self, channel: &str) -> Epoch {
        epoch_of(self.generation.nonce, channel)
    }

    /// The channel's top.
    pub(super) fn position(&self, channel: &str) -> Position {
        let top = self.streams.get(channel).map_or(self.base, |stream| stream.top);
        Position::new(self.epoch(channel), top)
    }

    /// Keeps the channel's position in memory while it is subscribed here.
    pub(super) fn pin(&mut self, channel: &Arc<str>, pinned: bool) {
        if pinned || self.streams.contains_key(channel) {
            self.stream(channel).pinned = pinned;
        }
    }

    /// Applies the next message. `now_ms` is the caller's clock, `time_ms` the message's.
    pub(super) fn apply(
        &mut self,
        now_ms: u64,
        offset: i64,
        time_ms: i64,
        message: Option<(Stamp, Body<'_>)>,
    ) -> Result<Applied, Hole> {
        match self.last {
            None => self.base = offset.cast_unsigned(),
            Some(last) if offset == last.offset + 1 => (),
            Some(_) => return Err(Hole),
        }
        let writer = message.as_ref().map_or((0, 0), |(stamp, _)| (stamp.node, stamp.sequence));
        self.last = Some(Seen { offset, writer });
        (self.time_ms, self.applied_ms) = (time_ms, now_ms);
        let Some((stamp, body)) = message else { return Ok(Applied::Nothing) };
        if stamp.generation.number > self.generation.number {
            self.adopt(stamp.generation, offset.cast_unsigned());
        }
        Ok(self.apply_body(offset.cast_unsigned() + 1, &stamp, body))
    }

    /// Reading began behind the fence of this generation. What was taken for the current one before was not.
    fn adopt(&mut self, generation: Generation, base: u64) {
        if self.generation != Generation::NONE {
            let last = self.last;
            let (time_ms, applied_ms) = (self.time_ms, self.applied_ms);
            *self = PartitionLog { last, base, time_ms, applied_ms, ..PartitionLog::new(self.limits) };
        }
        self.generation = generation;
    }

    fn apply_body(&mut self, offset: u64, stamp: &Stamp, body: Body<'_>) -> Applied {
        let is_current = stamp.generation == self.generation && stamp.generation != Generation::NONE;
        match body {
            Body::Mark => Applied::Nothing,
            Body::Fence { from, next }
                if from == self.generation.nonce && next.number == self.generation.number + 1 =>
            {
                self.generation = next;
                Applied::Fenced
            }
            Body::Fence { .. } => Applied::Stale,
            _ if !is_current => Applied::Stale,
            Body::Publication { channel, id, options, record } => {
                self.append(offset, channel, id, &options, record)
            }
            Body::Ephemeral { channel, record } => Applied::Ephemeral { name: channel.into(), record },
            Body::Clear { channel } => {
                let channel: Arc<str> = channel.into();
                let gone = std::mem::take(&mut self.stream(&channel).kept);
                self.kept_count -= gone.len();
                self.kept_bytes -= gone.iter().map(|kept| kept.record.len()).sum::<usize>();
                Applied::Cleared { position: self.position(&channel) }
            }
        }
    }

    fn append(
        &mut self,
        offset: u64,
        channel: &str,
        id: Option<OwnedId>,
        options: &ChannelOptions,
        record: Bytes,
    ) -> Applied {
        let name =
            self.streams.get_key_value(channel).map_or_else(|| channel.into(), |(name, _)| name.clone());
        let epoch = self.epoch(channel);
        let (limits, time_ms) = (self.limits, self.time_ms);
        let window = match &id {
            Some(OwnedId::Key(_)) => &mut self.keys,
            _ => &mut self.nodes,
        };
        window.expire(time_ms, &limits);
        let key = id.map(|id| (name.clone(), id));
        if let Some(first) = key.as_ref().and_then(|key| window.seen.get(key)).copied() {
            let accepted = Accepted { position: Position::new(epoch, first), repeated: true };
            return Applied::Publication { name, accepted, previous: 0, record };
        }
        let previous = self.stream(&name).top;
        if let Some(key) = key {
            let window = if matches!(key.1, OwnedId::Key(_)) { &mut self.keys } else { &mut self.nodes };
            window.add(time_ms, key, offset, limits.ids_max);
        }
        self.keep(&name, options, Kept { offset, previous, time_ms, record: record.clone() });
        let accepted = Accepted { position: Position::new(epoch, offset), repeated: false };
        Applied::Publication { name, accepted, previous, record }
    }

    fn keep(&mut self, name: &Arc<str>, options: &ChannelOptions, kept: Kept) {
        self.kept_bytes += kept.record.len();
        self.kept_count += 1;
        self.kept.push_back((name.clone(), kept.offset));
        let (mut gone, mut gone_bytes) = (0, 0);
        let stream = self.stream(name);
        stream.top = kept.offset;
        stream.kept.push_back(kept);
        while stream.kept.len() > options.history_size as usize {
            gone += 1;
            gone_bytes += stream.kept.pop_front().map_or(0, |kept| kept.record.len());
        }
        self.kept_count -= gone;
        self.kept_bytes -= gone_bytes;
        self.evict();
    }

    /// Lets the oldest go where there is too much.
    fn evict(&mut self) {
        while self.kept_bytes > self.limits.bytes_max {
            let Some((name, offset)) = self.kept.pop_front() else { break };
            let Some(stream) = self.streams.get_mut(&name) else { continue };
            if stream.kept.front().is_some_and(|kept| kept.offset == offset) {
                self.kept_count -= 1;
                self.kept_bytes -= stream.kept.pop_front().map_or(0, |kept| kept.record.len());
            }
        }
        // Names of what is gone already must not outnumber what is there.
        if self.kept.len() > 2 * self.kept_count + 1024 {
            let streams = &self.streams;
            self.kept.retain(|(name, offset)| {
                let front = streams.get(name).and_then(|stream| stream.kept.front());
                front.is_some_and(|kept| kept.offset <= *offset)
            });
        }
    }

    fn stream(&mut self, name: &Arc<str>) -> &mut Stream {
        if !self.streams.contains_key(name) {
            self.forget_some();
            self.oldest.push_back(name.clone());
        }
        let base = self.base;
        let fresh = || Stream { top: base, kept: VecDeque::new(), pinned: false, used: false };
        let stream = self.streams.entry(name.clone()).or_insert_with(fresh);
        stream.used = true;
        stream
    }

    /// Makes room for one more stream. Who is forgotten raises the base: a position below it is not answered for.
    fn forget_some(&mut self) {
        let mut looks = 2 * self.oldest.len();
        while self.streams.len() >= self.limits.channels_max && looks > 0 {
            looks -= 1;
            let Some(name) = self.oldest.pop_front() else { return };
            let Some(stream) = self.streams.get_mut(&name) else { continue };
            if stream.pinned || std::mem::take(&mut stream.used) {
                self.oldest.push_back(name);
                continue;
            }
            self.base = self.base.max(stream.top);
            self.kept_count -= stream.kept.len();
            self.kept_bytes -= stream.kept.iter().map(|kept| kept.record.len()).sum::<usize>();
            self.streams.remove(&name);
        }
    }

    /// Answers a read from what is kept.
    pub(super) fn read(
        &mut self,
        now_ms: u64,
        channel: &str,
        options: &ChannelOptions,
        query: &HistoryQuery,
    ) -> Result<ReadPage, BusError> {
        let top = self.position(channel);
        if query.since.and_then(|since| since.epoch).is_some_and(|epoch| epoch != top.epoch) {
            return Err(BusError::UnrecoverableEpoch { current: top });
        }
        self.expire(now_ms, channel, options);
        let empty = VecDeque::new();
        let kept = self.streams.get(channel).map_or(&empty, |stream| &stream.kept);
        let skipped = kept.len().saturating_sub(options.history_size as usize);
        let floor = kept.get(skipped).map_or(top.offset, |oldest| oldest.previous);
        let asked: Vec<&Kept> = match (query.since, query.reverse) {
            (since, true) => {
                let before = since.map_or(u64::MAX, |since| since.offset);
                kept.iter().skip(skipped).rev().filter(|kept| kept.offset < before).collect()
            }
            (since, false) => {
                let after = since.map_or(0, |since| since.offset);
                kept.iter().skip(skipped).filter(|kept| kept.offset > after).collect()
            }
        };
        let mut records = Vec::new();
        for kept in asked.iter().take(query.limit as usize) {
            append_record(&mut records, kept.offset, &kept.record);
        }
        let more = asked.len() > query.limit as usize;
        Ok(ReadPage { page: Page { top, floor, more }, lineage: Lineage::EMPTY, records })
    }

    fn expire(&mut self, now_ms: u64, channel: &str, options: &ChannelOptions) {
        let elapsed_ms = now_ms.saturating_sub(self.applied_ms).cast_signed();
        let oldest_ms = self.time_ms + elapsed_ms - options.history_ttl_ms.min(1 << 50).cast_signed();
        let Some(stream) = self.streams.get_mut(channel) else { return };
        stream.used = true;
        while stream.kept.front().is_some_and(|kept| kept.time_ms <= oldest_ms) {
            self.kept_count -= 1;
            self.kept_bytes -= stream.kept.pop_front().map_or(0, |kept| kept.record.len());
        }
    }
}

type IdKey = (Arc<str>, OwnedId);

/// Ids seen, and at which offset what they name stands.
#[derive(Debug, Default)]
struct Window {
    seen: HashMap<IdKey, u64>,
    order: VecDeque<(i64, IdKey)>,
}

impl Window {
    fn add(&mut self, time_ms: i64, key: IdKey, offset: u64, ids_max: usize) {
        while self.order.len() >= ids_max.max(1) {
            self.forget_oldest();
        }
        self.order.push_back((time_ms, key.clone()));
        self.seen.insert(key, offset);
    }

    fn expire(&mut self, time_ms: i64, limits: &LogLimits) {
        let oldest_ms = time_ms - limits.ids_window_ms.min(1 << 50).cast_signed();
        while self.order.front().is_some_and(|(at_ms, _)| *at_ms <= oldest_ms) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((_, key)) = self.order.pop_front() {
            self.seen.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests;
