//! Which channels this node hears, and what it hears on them.
//!
//! Owns: subscriptions at the server (units) and their counts, each channel's last sequence, confirmations. Must not
//! know: publishing.
//!
//! A *unit* is one subscription at the server: a channel's subject or a slot's. A channel holds its unit while the hub
//! wants it. Invariant: a channel's publications are told in the order of their sequences and once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use async_nats::Message as Received;
use bytes::Bytes;
use tokio::task::JoinHandle;

use super::ephemeral::Said;
use super::life::{In, Life};
use super::node::CORE;
use super::pulse::{header, sequence_of};
use super::subjects::hash;
use crate::backend::{Call, Domain, Message, Reply, Target};
use crate::envelope;
use crate::epoch::Epoch;
use crate::lineage::Lineage;
use crate::slot::slot_of;

/// Where something is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Plane {
    Core,
    Stream(u16),
}

/// What a unit covers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Scope {
    Channel(Arc<str>),
    Slot(u16),
}

pub(super) type UnitKey = (Plane, Scope);

struct Unit {
    id: u64,
    channels: usize,
    task: JoinHandle<()>,
}

impl Drop for Unit {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A positioned channel that is heard.
pub(super) struct Heard {
    pub(super) name: Arc<str>,
    unit: UnitKey,
    stream: u16,
    epoch: Epoch,
    /// Sequence of the last publication heard; 0: none yet.
    pub(super) last: u64,
}

/// Channels heard in this life, by their subjects.
#[derive(Default)]
pub(super) struct Channels {
    units: HashMap<UnitKey, Unit>,
    /// Scopes of units that live, so that what comes late from a dead one is dropped.
    pub(super) living: HashSet<u64>,
    drawn: u64,
    pub(super) heard: HashMap<Arc<str>, Heard>,
    by_hash: HashMap<u64, Arc<str>>,
    pub(super) said: HashMap<Arc<str>, Said>,
    said_by_hash: HashMap<u64, Arc<str>>,
}

impl Channels {
    fn release(&mut self, key: &UnitKey) {
        if let Some(unit) = self.units.get_mut(key) {
            unit.channels -= 1;
            if unit.channels == 0 {
                let id = unit.id;
                self.units.remove(key);
                self.living.remove(&id);
            }
        }
    }

    fn drop_heard(&mut self, name: &str) {
        if let Some(heard) = self.heard.remove(name) {
            self.by_hash.remove(&hash(name));
            self.release(&heard.unit);
        }
    }

    pub(super) fn said_by_hash(&self, hash: u64) -> Option<Arc<str>> {
        self.said_by_hash.get(&hash).cloned()
    }

    pub(super) fn forget_stream(&mut self, stream: u16) {
        let names: Vec<_> = self
            .heard
            .values()
            .filter(|heard| heard.stream == stream)
            .map(|heard| heard.name.clone())
            .collect();
        names.iter().for_each(|name| self.drop_heard(name));
    }

    /// Another node published: what we hear of it should be as far.
    pub(super) fn note_tops(&self, tops: &[(u64, u64)], marks: &mut HashMap<Arc<str>, u64>) {
        for (hash, top) in tops {
            if let Some(name) = self.by_hash.get(hash)
                && self.heard.get(name).is_some_and(|heard| heard.last < *top)
            {
                let mark = marks.entry(name.clone()).or_insert(0);
                *mark = (*mark).max(*top);
            }
        }
    }
}

impl Life<'_> {
    fn scope_of(&self, name: &Arc<str>) -> Scope {
        if self.node.options.interest.is_by_slot(name) {
            Scope::Slot(slot_of(name))
        } else {
            Scope::Channel(name.clone())
        }
    }

    /// Counts one more channel on a unit, and subscribes it if it is the first.
    async fn hold(&mut self, key: &UnitKey) {
        if let Some(unit) = self.channels.units.get_mut(key) {
            unit.channels += 1;
            return;
        }
        self.channels.drawn += 1;
        let id = self.channels.drawn;
        let subjects = &self.node.subjects;
        let subject = match key {
            (Plane::Core, Scope::Channel(name)) => subjects.ephemeral_channel(name),
            (Plane::Core, Scope::Slot(slot)) => subjects.ephemeral_slot(*slot),
            (Plane::Stream(_), Scope::Channel(name)) => subjects.heard_channel(name),
            (Plane::Stream(_), Scope::Slot(slot)) => subjects.heard_slot(*slot),
        };
        let task = match key.0 {
            Plane::Core => self.subscribe(subject, move |message| In::Said { unit: id, message }).await,
            Plane::Stream(_) => self.subscribe(subject, move |message| In::Heard { unit: id, message }).await,
        };
        if let Some(task) = task {
            self.channels.living.insert(id);
            self.channels.units.insert(key.clone(), Unit { id, channels: 1, task });
        }
    }

    /// The hub wants a channel.
    pub(super) async fn want(&mut self, call: Call, target: &Target) {
        let domain = if target.options.is_positioned() {
            let stream = self.stream_of(&target.name);
            self.hear(&target.name, stream).await;
            Domain(u32::from(stream) + 1)
        } else {
            if !self.channels.said.contains_key(&target.name) {
                let key = (Plane::Core, self.scope_of(&target.name));
                self.hold(&key).await;
                let name = target.name.clone();
                self.channels.said_by_hash.insert(hash(&name), name.clone());
                self.channels.said.insert(name.clone(), Said::new(name, key));
            }
            CORE
        };
        self.confirm(call, domain, target.name.clone()).await;
    }

    async fn hear(&mut self, name: &Arc<str>, stream: u16) {
        if self.channels.heard.contains_key(name) {
            return;
        }
        let unit = (Plane::Stream(stream), self.scope_of(name));
        self.hold(&unit).await;
        let epoch = self.epoch_of(stream, name);
        let heard = Heard { name: name.clone(), unit, stream, epoch, last: 0 };
        self.channels.by_hash.insert(hash(name), name.clone());
        self.channels.heard.insert(name.clone(), heard);
        self.keep_channel(name);
    }

    pub(super) fn unsubscribe(&mut self, target: &Target) {
        if let Some(said) = self.channels.said.remove(&target.name) {
            self.channels.said_by_hash.remove(&hash(&target.name));
            self.channels.release(&said.unit);
        }
        self.channels.drop_heard(&target.name);
    }

    /// A positioned channel's publication.
    pub(super) async fn heard(&mut self, unit: u64, received: &Received) {
        let (Some(sequence), Some(last)) = (sequence_of(received), header(received, "Nats-Last-Sequence"))
        else {
            return;
        };
        if !self.channels.living.contains(&unit) {
            return;
        }
        let Some(name) = super::subjects::channel_of_subject(&received.subject) else { return };
        let Some(heard) = self.channels.heard.get_mut(name.as_str()) else { return };
        let n = usize::from(heard.stream);
        let high = &mut self.node.memories[n].witness.high;
        *high = sequence.max(*high);
        if sequence <= heard.last {
            return;
        }
        // 0: it expired, or there was none; if we heard it, it is the one.
        let previous = if last == 0 { heard.last } else { last };
        heard.last = sequence;
        let (name, epoch) = (heard.name.clone(), heard.epoch);
        self.streams[n].moved.insert(name.clone());
        let reply = match record_of(&received.payload) {
            Some(record) => {
                let message = Message { epoch, lineage: Lineage::EMPTY, previous, offset: sequence, record };
                Reply::Message { name, message }
            }
            None => Reply::Doubt { name },
        };
        self.node.tell(reply).await;
    }

    /// A canary is back: how far the channels are that moved before it, and that others say have moved.
    pub(super) async fn tell_tops(&mut self, stream: u16) {
        let life = &mut self.streams[usize::from(stream)];
        let mut tops = std::mem::take(&mut life.marks);
        for name in std::mem::take(&mut life.moved) {
            tops.entry(name).or_insert(0);
        }
        for (name, told) in tops {
            let Some(heard) = self.channels.heard.get(&name) else { continue };
            let top = told.max(heard.last);
            let (epoch, record) = (heard.epoch, Bytes::new());
            let message = Message { epoch, lineage: Lineage::EMPTY, previous: top, offset: top, record };
            self.node.tell(Reply::Message { name, message }).await;
        }
    }
}

/// The record in an envelope.
pub(super) fn record_of(payload: &Bytes) -> Option<Bytes> {
    match envelope::decode(payload).ok()?.record {
        std::borrow::Cow::Borrowed(record) => Some(payload.slice_ref(record)),
        std::borrow::Cow::Owned(record) => Some(record.into()),
    }
}
