//! The channels known to a shard.
//!
//! Owns the table by name and index, and of each channel what this shard needs: its position, who is
//! subscribed here and per which variant, and on its home shard who else holds it. It knows no
//! session beyond its slot and no socket.
//!
//! Invariants:
//! * a channel's serial is never used again, so a message that names (index, serial) cannot reach a
//!   later tenant of the index;
//! * `subs` counts the subscriptions of this shard in every state; members and laggards of its
//!   variants are those that receive, unless a gap has set them aside.

use std::cell::Cell;
use std::sync::Arc;

use hashbrown::HashTable;
use ringmain_bus::ChannelOptions;
use ringmain_proto::codec::Codec;
use ringmain_proto::ws;
use smallvec::SmallVec;

use super::api::hash_name;
use super::config::{CoreConfig, NamespaceConfig, Priority, SlowConsumer};
use super::engine::{ShardIndex, Slot};
use super::gap::Untold;
use super::home::HomePart;
use super::latest::Latest;
use super::log::Log;
use super::mesh::ChannelRef;
use super::output::VARIANTS_MAX;
use super::session::Sub;

/// How frames of a variant are encoded: what distinguishes the logs of one channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VariantKey {
    pub(crate) codec: Codec,
    /// Joins and leaves are part of it.
    pub(crate) join_leave: bool,
}

/// Subscribers of this shard that get the same bytes.
#[derive(Debug)]
pub(crate) struct Variant {
    pub(crate) key: VariantKey,
    /// Caught-up subscribers: they share the log's group cursor.
    pub(crate) members: SmallVec<[Slot; 2]>,
    /// Exists while somebody waits for a byte of it; those who are behind are listed there.
    pub(crate) log: Option<Box<Log>>,
}

/// One channel.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) name: Arc<str>,
    pub(crate) serial: u32,
    pub(crate) namespace: u16,
    pub(crate) home: ShardIndex,
    /// Position of the newest publication delivered here; epoch 0: none known.
    pub(crate) epoch: u64,
    pub(crate) top: u64,
    pub(crate) subs: u32,
    pub(crate) variants: SmallVec<[Variant; 1]>,
    /// Receivers that a gap has set aside, while any are still to be told.
    pub(crate) untold: Option<Box<Untold>>,
    /// On the home shard: the bus has confirmed interest.
    pub(crate) opened: bool,
    /// On the home shard, while another shard is subscribed or somebody is present.
    pub(crate) home_part: Option<Box<HomePart>>,
    /// Newest publication per key, in namespaces that skip slow readers forward.
    pub(crate) latest: Option<Box<Latest>>,
}

impl Variant {
    /// Whether nobody receives it.
    pub(crate) fn is_unheard(&self) -> bool {
        self.members.is_empty() && self.log.as_ref().is_none_or(|log| log.laggards.is_empty())
    }
}

impl Channel {
    /// The variant for `key`, made if there is room for it.
    pub(crate) fn variant_for(&mut self, key: VariantKey) -> Option<u8> {
        if let Some(index) = self.variants.iter().position(|variant| variant.key == key) {
            return Some(index as u8);
        }
        if self.variants.len() >= usize::from(VARIANTS_MAX) {
            return None;
        }
        self.variants.push(Variant { key, members: SmallVec::new(), log: None });
        Some(self.variants.len() as u8 - 1)
    }

    /// Whether a gap has set a subscription aside: nothing more of the channel is sent to it.
    #[inline]
    pub(crate) fn is_set_aside(&self, slot: Slot, sub: &Sub) -> bool {
        self.untold.as_ref().is_some_and(|untold| untold.holds(slot, sub))
    }

    /// Whether nobody subscribed through this shard or, on the home shard, through any (the bus may still
    /// keep something).
    pub(crate) fn is_unused(&self) -> bool {
        self.subs == 0 && self.home_part.is_none()
    }
}

/// A namespace's options, and what is derived from them.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) config: NamespaceConfig,
    pub(crate) bus: ChannelOptions,
}

impl Namespace {
    fn new(config: &NamespaceConfig) -> Self {
        Self {
            config: config.clone(),
            bus: ChannelOptions {
                history_size: config.history_size,
                history_ttl_ms: config.history_ttl_ms,
                meta_ttl_ms: config.history_meta_ttl_ms,
            },
        }
    }

    pub(crate) fn is_positioned(&self) -> bool {
        self.config.history_size > 0
    }

    pub(crate) fn keeps_latest(&self) -> bool {
        self.config.slow_consumer == SlowConsumer::Latest
    }
}

/// All channels of a shard.
#[derive(Debug)]
pub(crate) struct Channels {
    pages: Pages,
    /// Indices from here on were never used.
    next_index: u32,
    free: Vec<u32>,
    by_name: HashTable<u32>,
    /// Clients send several commands about one channel at a time: what was found last is looked at first.
    last_found: Cell<u32>,
    serial: u32,
    max: usize,
    shards: u16,
    namespaces: Vec<(Box<str>, Namespace)>,
    /// Emptied logs, the last used on top: its lines are still in the cache. Boxed, as channels hold them.
    #[expect(clippy::vec_box, reason = "a log moves between a channel and this list as a pointer")]
    spare_logs: Vec<Box<Log>>,
    log_bytes: usize,
}

/// Channels by index, in pages: a table that grows never copies and never doubles.
#[derive(Debug, Default)]
struct Pages(Vec<Box<[Option<Channel>]>>);

/// Channels of one page.
const PAGE: usize = 64;

impl Pages {
    #[inline]
    fn get(&self, index: u32) -> Option<&Channel> {
        self.0.get(index as usize / PAGE)?[index as usize % PAGE].as_ref()
    }

    #[inline]
    fn get_mut(&mut self, index: u32) -> Option<&mut Channel> {
        self.0.get_mut(index as usize / PAGE)?[index as usize % PAGE].as_mut()
    }

    /// The place of an index, made if need be.
    fn place(&mut self, index: u32) -> &mut Option<Channel> {
        while self.0.len() <= index as usize / PAGE {
            self.0.push((0..PAGE).map(|_| None).collect());
        }
        &mut self.0[index as usize / PAGE][index as usize % PAGE]
    }

    /// Where a channel that is in the table by name is hashed.
    fn hash(&self, index: u32) -> u64 {
        hash_name(&self.get(index).expect("a named channel exists").name)
    }
}

/// What became of an append.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Appended {
    /// The variant is to be queued for service.
    pub(crate) is_news: bool,
    pub(crate) priority: Priority,
    /// The log is above its maximum: this many bytes.
    pub(crate) over: Option<usize>,
}

/// Emptied logs kept for reuse at the most.
const SPARE_LOGS_MAX: usize = 64;

/// Why there is no such channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoChannel {
    /// Its namespace does not exist.
    UnknownNamespace,
    /// The shard knows as many as it may.
    Full,
}

impl Channels {
    pub(crate) fn new(config: &CoreConfig, shards: u16) -> Self {
        let mut namespaces = vec![("".into(), Namespace::new(&config.channel))];
        for (name, namespace) in &config.namespaces {
            namespaces.push((name.as_str().into(), Namespace::new(namespace)));
        }
        Self {
            pages: Pages::default(),
            next_index: 0,
            free: Vec::new(),
            by_name: HashTable::new(),
            last_found: Cell::new(0),
            serial: 0,
            max: config.limits.channels_per_shard as usize,
            shards,
            namespaces,
            spare_logs: Vec::new(),
            log_bytes: 0,
        }
    }

    /// The namespace of a channel's name.
    pub(crate) fn namespace_of(&self, name: &str) -> Option<&Namespace> {
        self.namespace_index(name).map(|index| self.namespace(index))
    }

    fn namespace_index(&self, name: &str) -> Option<u16> {
        let namespace = super::config::namespace_name(name);
        self.namespaces.iter().position(|(known, _)| **known == *namespace).map(|index| index as u16)
    }

    pub(crate) fn namespace(&self, index: u16) -> &Namespace {
        &self.namespaces[usize::from(index)].1
    }

    /// The index of a channel that is known.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        let last = self.last_found.get();
        if self.pages.get(last).is_some_and(|channel| *channel.name == *name) {
            return Some(last);
        }
        let found = self.find_by_hash(name);
        if let Some(index) = found {
            self.last_found.set(index);
        }
        found
    }

    fn find_by_hash(&self, name: &str) -> Option<u32> {
        let same = |index: &u32| self.pages.get(*index).is_some_and(|channel| *channel.name == *name);
        self.by_name.find(hash_name(name), same).copied()
    }

    /// The index of a channel, made if need be.
    pub(crate) fn get_or_create(&mut self, name: &str) -> Result<u32, NoChannel> {
        if let Some(index) = self.find(name) {
            return Ok(index);
        }
        let namespace = self.namespace_index(name).ok_or(NoChannel::UnknownNamespace)?;
        if self.by_name.len() >= self.max {
            return Err(NoChannel::Full);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.next_index += 1;
            self.next_index - 1
        });
        self.serial = self.serial.wrapping_add(1);
        let latest = self.namespace(namespace).keeps_latest().then(Box::default);
        *self.pages.place(index) = Some(Channel {
            name: name.into(),
            serial: self.serial,
            namespace,
            home: super::api::home_of(name, self.shards),
            epoch: 0,
            top: 0,
            subs: 0,
            variants: SmallVec::new(),
            untold: None,
            opened: false,
            home_part: None,
            latest,
        });
        let pages = &self.pages;
        self.by_name.insert_unique(hash_name(name), index, |other| pages.hash(*other));
        Ok(index)
    }

    /// Forgets a channel.
    pub(crate) fn remove(&mut self, index: u32) {
        let Some(channel) = self.pages.place(index).take() else { return };
        for variant in channel.variants {
            if let Some(log) = variant.log {
                self.spare_log(log);
            }
        }
        let entry = self.by_name.find_entry(hash_name(&channel.name), |other| *other == index);
        if let Ok(entry) = entry {
            entry.remove();
        }
        self.free.push(index);
    }

    /// A channel by index; the index came from this table and the channel is held by its user.
    #[inline]
    pub(crate) fn get(&self, index: u32) -> &Channel {
        self.pages.get(index).expect("a held channel exists")
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, index: u32) -> &mut Channel {
        self.pages.get_mut(index).expect("a held channel exists")
    }

    /// A channel by index, if there is one.
    pub(crate) fn try_get(&self, index: u32) -> Option<&Channel> {
        self.pages.get(index)
    }

    /// A channel by what another shard calls it.
    pub(crate) fn by_ref(&mut self, member: ChannelRef) -> Option<&mut Channel> {
        self.pages.get_mut(member.index).filter(|channel| channel.serial == member.serial)
    }

    /// Channels known.
    pub(crate) fn len(&self) -> usize {
        self.by_name.len()
    }

    /// All channels, with their indices.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Channel)> {
        let places = self.pages.0.iter().flat_map(|page| page.iter());
        places.enumerate().filter_map(|(index, place)| Some((index as u32, place.as_ref()?)))
    }

    /// Appends one frame to the log of a variant, if anybody receives from it. `before` is the channel's top
    /// before this publication; `None`: it is a join or leave, which only some variants show.
    pub(crate) fn append(
        &mut self,
        index: u32,
        variant: u8,
        before: Option<u64>,
        encode: impl FnOnce(Codec, &str, &mut Vec<u8>),
    ) -> Option<Appended> {
        let spare = &mut self.spare_logs;
        let channel = self.pages.get_mut(index).expect("a held channel exists");
        let (top, namespace) = (channel.top, channel.namespace);
        let receivers = &mut channel.variants[usize::from(variant)];
        if receivers.is_unheard() || (before.is_none() && !receivers.key.join_leave) {
            return None;
        }
        let codec = receivers.key.codec;
        let log = receivers.log.get_or_insert_with(|| {
            let mut log = spare.pop().unwrap_or_default();
            log.reset(before.unwrap_or(top));
            log
        });
        let grown = log.append(top, |out| {
            let start = ws::begin_frame(out);
            encode(codec, &channel.name, out);
            ws::finish_frame(out, start, codec.opcode());
        });
        if before.is_none() {
            log.note_join();
        }
        self.log_bytes += grown;
        let is_news = !std::mem::replace(&mut log.queued, true);
        let config = &self.namespaces[usize::from(namespace)].1.config;
        let bytes_max = config.log_bytes_max as usize;
        Some(Appended {
            is_news,
            priority: config.priority,
            over: (log.len() > bytes_max).then_some(bytes_max),
        })
    }

    /// Takes a variant's log away if nobody needs it.
    pub(crate) fn release_log_if_done(&mut self, index: u32, variant: u8) {
        let Some(channel) = self.pages.get_mut(index) else { return };
        let Some(variant) = channel.variants.get_mut(usize::from(variant)) else { return };
        if variant.log.as_ref().is_some_and(|log| log.is_done())
            && let Some(log) = variant.log.take()
        {
            self.spare_log(log);
        }
    }

    fn spare_log(&mut self, log: Box<Log>) {
        self.log_bytes = self.log_bytes.saturating_sub(log.len());
        if log.worth_keeping() && self.spare_logs.len() < SPARE_LOGS_MAX {
            self.spare_logs.push(log);
        }
    }

    /// Keeps account of the bytes in logs.
    pub(crate) fn note_log_bytes_dropped(&mut self, dropped: usize) {
        self.log_bytes = self.log_bytes.saturating_sub(dropped);
    }

    /// Bytes in the logs of all channels.
    pub(crate) fn log_bytes(&self) -> usize {
        self.log_bytes
    }
}
