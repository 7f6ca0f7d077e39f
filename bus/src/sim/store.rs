//! The simulated broker's data: streams by name.
//!
//! Owns: offsets, epochs, histories, ids seen. Must not know: connections and time beyond what it is told.
//! Invariants: every read or write of a position goes through [`Store::touch`], so there is no position
//! without an epoch, and a stream that survived from another life of the broker gets a new one before
//! anything is said in its name.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use ringmain_proto::message::Publication;

use crate::backend::{Message, OwnedId, ReadPage};
use crate::epoch::{Epoch, Position};
use crate::lineage::{Branch, Lineage};
use crate::nonce::Nonces;
use crate::types::{Accepted, BusError, ChannelOptions, HistoryQuery, Page};

/// Bounds of the store.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoreLimits {
    pub(super) offset_step_max: u64,
    pub(super) ids_max: usize,
    pub(super) ids_window_ms: u64,
}

#[derive(Clone, Debug)]
struct Kept {
    offset: u64,
    previous: u64,
    at_ms: u64,
    record: Bytes,
}

#[derive(Clone, Debug)]
struct Stream {
    epoch: Epoch,
    lineage: Lineage,
    /// The broker's life in which the epoch was drawn.
    generation: u64,
    top: u64,
    kept: VecDeque<Kept>,
    ttl_ms: u64,
    meta_ms: u64,
    last_use_ms: u64,
    ids: VecDeque<(u64, OwnedId, Accepted)>,
}

/// All streams.
#[derive(Clone, Debug)]
pub(super) struct Store {
    streams: HashMap<Arc<str>, Stream>,
    generation: u64,
    nonces: Nonces,
    limits: StoreLimits,
}

impl Store {
    pub(super) fn new(seed: u64, limits: StoreLimits) -> Store {
        Store { streams: HashMap::new(), generation: 1, nonces: Nonces::new(seed), limits }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Everything is gone, and the broker is another one.
    pub(super) fn wipe(&mut self) {
        self.streams.clear();
        self.generation += 1;
    }

    /// Goes back to what `older` held. Epochs never come back: nonces go on, and the life is a new one.
    pub(super) fn roll_back_to(&mut self, older: &Store) {
        self.streams.clone_from(&older.streams);
        self.generation += 1;
    }

    /// Accepts a publication, or answers what the same id was answered before. The message is what
    /// subscribers get; none for a repeat.
    pub(super) fn publish(
        &mut self,
        now_ms: u64,
        name: &Arc<str>,
        options: &ChannelOptions,
        id: &OwnedId,
        record: &[u8],
    ) -> (Accepted, Option<Message>) {
        let limits = self.limits;
        let step = 1 + self.nonces.below(limits.offset_step_max);
        let stream = self.touch(now_ms, name, options);
        while stream.ids.front().is_some_and(|(at_ms, ..)| now_ms - at_ms >= limits.ids_window_ms) {
            stream.ids.pop_front();
        }
        if let Some((.., first)) = stream.ids.iter().find(|(_, seen, _)| seen == id) {
            return (Accepted { repeated: true, ..*first }, None);
        }
        let (accepted, message) = stream.append(now_ms, options, step, record);
        stream.ids.push_back((now_ms, id.clone(), accepted));
        if stream.ids.len() > limits.ids_max {
            stream.ids.pop_front();
        }
        (accepted, Some(message))
    }

    pub(super) fn read(
        &mut self,
        now_ms: u64,
        name: &Arc<str>,
        options: &ChannelOptions,
        query: &HistoryQuery,
    ) -> Result<ReadPage, BusError> {
        let stream = self.touch(now_ms, name, options);
        let top = stream.position();
        if let Some((offset, epoch)) = query.since.and_then(|since| Some((since.offset, since.epoch?)))
            && epoch != top.epoch
            && stream.lineage.left_at(epoch).is_none_or(|branch| offset > branch)
        {
            return Err(BusError::UnrecoverableEpoch { current: top });
        }
        let floor = stream.kept.front().map_or(top.offset, |oldest| oldest.previous);
        let mut asked: Vec<&Kept> = stream.kept.iter().collect();
        if query.reverse {
            asked.reverse();
            asked.retain(|kept| query.since.is_none_or(|since| kept.offset < since.offset));
        } else {
            asked.retain(|kept| query.since.is_none_or(|since| kept.offset > since.offset));
        }
        let more = asked.len() > query.limit as usize;
        let records =
            asked.iter().take(query.limit as usize).flat_map(|kept| kept.record.iter().copied()).collect();
        Ok(ReadPage { page: Page { top, floor, more }, lineage: stream.lineage, records })
    }

    pub(super) fn clear(&mut self, now_ms: u64, name: &Arc<str>, options: &ChannelOptions) -> Position {
        let stream = self.touch(now_ms, name, options);
        stream.kept.clear();
        stream.position()
    }

    /// The stream of a name, made or renewed as needed, with what has expired gone.
    fn touch(&mut self, now_ms: u64, name: &Arc<str>, options: &ChannelOptions) -> &mut Stream {
        let (generation, nonces) = (self.generation, &mut self.nonces);
        let mut draw = || if options.is_positioned() { Epoch::new(nonces.draw()) } else { Epoch::NONE };
        let stream = self.streams.entry(name.clone()).or_insert_with(|| Stream {
            epoch: draw(),
            lineage: Lineage::EMPTY,
            generation,
            top: 0,
            kept: VecDeque::new(),
            ttl_ms: options.history_ttl_ms,
            meta_ms: options.meta_ttl_ms,
            last_use_ms: now_ms,
            ids: VecDeque::new(),
        });
        let expired = now_ms - stream.last_use_ms > stream.meta_ms.max(stream.ttl_ms);
        if options.is_positioned() && (stream.epoch.is_none() || expired) {
            (stream.epoch, stream.lineage, stream.top) = (draw(), Lineage::EMPTY, 0);
            stream.kept.clear();
            stream.ids.clear();
        } else if stream.generation != generation {
            stream.renew(draw());
        }
        stream.generation = generation;
        stream.last_use_ms = now_ms;
        stream.meta_ms = options.meta_ttl_ms;
        while stream.kept.front().is_some_and(|oldest| now_ms - oldest.at_ms >= stream.ttl_ms) {
            stream.kept.pop_front();
        }
        stream
    }

    /// Keeps a position: somebody is subscribed to its channel.
    pub(super) fn hold(&mut self, now_ms: u64, name: &Arc<str>) {
        if let Some(stream) = self.streams.get_mut(name) {
            stream.last_use_ms = now_ms;
        }
    }
}

impl Stream {
    /// Another life over the same publications. What an id was answered stands at the same offset of it.
    fn renew(&mut self, epoch: Epoch) {
        self.lineage.push(Branch { epoch: self.epoch, top: self.top });
        self.epoch = epoch;
        for (.., accepted) in &mut self.ids {
            accepted.position.epoch = epoch;
        }
    }

    fn position(&self) -> Position {
        Position::new(self.epoch, self.top)
    }

    fn append(
        &mut self,
        now_ms: u64,
        options: &ChannelOptions,
        step: u64,
        record: &[u8],
    ) -> (Accepted, Message) {
        if !options.is_positioned() {
            let accepted = Accepted { position: Position::NONE, repeated: false };
            let record = Bytes::copy_from_slice(record);
            let (epoch, lineage) = (Epoch::NONE, Lineage::EMPTY);
            return (accepted, Message { epoch, lineage, previous: 0, offset: 0, record });
        }
        let previous = self.top;
        self.top += step;
        let record = with_offset(record, self.top);
        self.ttl_ms = options.history_ttl_ms;
        self.kept.push_back(Kept { offset: self.top, previous, at_ms: now_ms, record: record.clone() });
        while self.kept.len() > options.history_size as usize {
            self.kept.pop_front();
        }
        let accepted = Accepted { position: self.position(), repeated: false };
        let (epoch, lineage) = (self.epoch, self.lineage);
        (accepted, Message { epoch, lineage, previous, offset: self.top, record })
    }
}

/// The record of the same publication at the offset that the broker gave it.
fn with_offset(record: &[u8], offset: u64) -> Bytes {
    let mut moved = Vec::new();
    if let Some((publication, _)) = Publication::read_record(record) {
        Publication { offset, ..publication }.write_record(&mut moved);
    }
    moved.into()
}
