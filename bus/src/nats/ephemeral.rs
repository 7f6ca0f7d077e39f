//! Ephemeral channels: who said what, and whether all of it was heard.
//!
//! Owns: the numbers that publications carry, and what is missing of them. Must not know: streams.
//!
//! Between two servers of a cluster a message can be lost without any connection of ours being cut: a server dies
//! with what it had accepted and not passed on, a route breaks for a moment. So a node numbers its ephemeral
//! publications, each names the one before it on its channel, and the node's hearts name the last one of each channel
//! for a while, also after a cut. Who hears a number and not the one before it doubts the channel: it is told.
//!
//! Invariant: a publication that was accepted, and sent after a subscription was confirmed, is told on it, or the
//! channel is doubted; unless the publisher's process ends within a second of it *and* it was lost.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::Message as Received;

use super::interest::{UnitKey, record_of};
use super::life::Life;
use super::subjects::{channel_of_subject, hash};
use super::wire::Heart;
use crate::backend::{Message, Reply};
use crate::envelope;
use crate::epoch::Epoch;
use crate::lineage::Lineage;

/// Hearts that name a channel's last publication.
const TELLINGS: u8 = 4;

/// Channels named in one heart; with more, another heart follows.
const NAMED_MAX: usize = 8_192;

/// How long what a heart names may still be on its way, in milliseconds: it comes by another subscription.
const ON_ITS_WAY_MS: u64 = 250;

/// Bytes that a publication carries for this.
const EXTRA_BYTES: usize = 24;

/// What this node has said.
#[derive(Debug, Default)]
pub(super) struct Speech {
    spoken: u64,
    /// By channel: the last number, and how many hearts have named it.
    recent: HashMap<u64, (u64, u8)>,
}

impl Speech {
    /// How many publications were sent.
    pub(super) fn spoken(&self) -> u64 {
        self.spoken
    }

    /// Numbers a publication: what it carries.
    pub(super) fn say(&mut self, incarnation: u64, name: &str) -> [u8; EXTRA_BYTES] {
        self.spoken += 1;
        let (before, _) = self.recent.insert(hash(name), (self.spoken, 0)).unwrap_or_default();
        Extra { incarnation, number: self.spoken, before }.write()
    }

    /// What a heart names, and whether there is more.
    pub(super) fn news(&mut self) -> (Vec<(u64, u64)>, bool) {
        // Where not all can be named, those named least.
        let fewest = self.recent.values().map(|(_, told)| *told).min().unwrap_or(0);
        let named_max = if self.recent.len() > NAMED_MAX { fewest } else { TELLINGS };
        let (mut news, mut more) = (Vec::new(), false);
        self.recent.retain(|hash, (number, told)| {
            if *told > named_max {
                return true;
            }
            if news.len() == NAMED_MAX {
                more = true;
                return true;
            }
            news.push((*hash, *number));
            *told += 1;
            *told < TELLINGS
        });
        (news, more)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extra {
    incarnation: u64,
    /// Of this publication.
    number: u64,
    /// Of the one before it by the same node on the same channel; 0: none a moment ago.
    before: u64,
}

impl Extra {
    fn write(self) -> [u8; EXTRA_BYTES] {
        let mut bytes = [0; EXTRA_BYTES];
        for (place, number) in bytes.chunks_exact_mut(8).zip([self.incarnation, self.number, self.before]) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    /// `None`: another release wrote it, or nobody of ours.
    fn read(bytes: &[u8]) -> Option<Extra> {
        let number = |n: usize| Some(u64::from_le_bytes(bytes.get(8 * n..8 * n + 8)?.try_into().ok()?));
        Some(Extra { incarnation: number(0)?, number: number(1)?, before: number(2)? })
    }
}

/// An ephemeral channel that is heard.
pub(super) struct Said {
    name: Arc<str>,
    pub(super) unit: UnitKey,
    /// How far each node had spoken when the subscription was confirmed; none before that.
    since: Option<Rc<HashMap<u64, u64>>>,
    /// The last number heard of each node.
    heard: Vec<(u64, u64)>,
}

/// What a publication is by its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Next,
    Repeat,
    /// Something before it was not heard.
    Hole,
}

impl Said {
    pub(super) fn new(name: Arc<str>, unit: UnitKey) -> Said {
        Said { name, unit, since: None, heard: Vec::new() }
    }

    /// The subscription is confirmed; what is confirmed again goes on.
    pub(super) fn confirm(&mut self, spoken: &Rc<HashMap<u64, u64>>) {
        self.since.get_or_insert_with(|| spoken.clone());
    }

    fn last_heard(&self, incarnation: u64) -> u64 {
        self.heard.iter().find(|(node, _)| *node == incarnation).map_or(0, |(_, number)| *number)
    }

    /// Whether a publication of a node was heard, or need not have been.
    fn is_settled(&self, incarnation: u64, number: u64) -> bool {
        let Some(since) = &self.since else { return true };
        number <= self.last_heard(incarnation).max(since.get(&incarnation).copied().unwrap_or(0))
    }

    fn hear(&mut self, extra: &Extra) -> Place {
        if extra.number <= self.last_heard(extra.incarnation) {
            return Place::Repeat;
        }
        let place = if self.is_settled(extra.incarnation, extra.before) { Place::Next } else { Place::Hole };
        self.note(extra.incarnation, extra.number);
        place
    }

    fn note(&mut self, incarnation: u64, number: u64) {
        match self.heard.iter_mut().find(|(node, _)| *node == incarnation) {
            Some((_, heard)) => *heard = number,
            None => self.heard.push((incarnation, number)),
        }
    }
}

/// Publications that hearts named and that were not heard: until when they may still come.
#[derive(Default)]
pub(super) struct Suspects {
    by_channel: HashMap<(Arc<str>, u64), (u64, Instant)>,
}

impl Life<'_> {
    /// An ephemeral channel's publication.
    pub(super) async fn said(&mut self, unit: u64, received: &Received) {
        if !self.channels.living.contains(&unit) {
            return;
        }
        let Some(name) = channel_of_subject(&received.subject) else { return };
        let Some(said) = self.channels.said.get_mut(name.as_str()) else { return };
        let name = said.name.clone();
        let extra = envelope::decode(&received.payload).ok().and_then(|read| Extra::read(read.extra));
        let place = extra.map_or(Place::Next, |extra| said.hear(&extra));
        let record = record_of(&received.payload);
        if place == Place::Repeat {
            return;
        }
        if place == Place::Hole || record.is_none() {
            self.node.tell(Reply::Doubt { name: name.clone() }).await;
        }
        let Some(record) = record else { return };
        let message = Message { epoch: Epoch::NONE, lineage: Lineage::EMPTY, previous: 0, offset: 0, record };
        self.node.tell(Reply::Message { name, message }).await;
    }

    /// Compares what a node says that it said with what was heard of it.
    pub(super) fn compare(&mut self, heart: &Heart, now: Instant) {
        let until = now + Duration::from_millis(ON_ITS_WAY_MS);
        for (hash, number) in &heart.said {
            let Some(name) = self.channels.said_by_hash(*hash) else { continue };
            let is_settled =
                self.channels.said.get(&name).is_none_or(|said| said.is_settled(heart.incarnation, *number));
            if !is_settled {
                let key = (name, heart.incarnation);
                self.suspects.by_channel.entry(key).or_insert((*number, until));
            }
        }
    }

    /// Doubts channels of which something should have come by now.
    pub(super) async fn look_after_suspects(&mut self, now: Instant) {
        if self.suspects.by_channel.is_empty() {
            return;
        }
        let mut due = Vec::new();
        self.suspects.by_channel.retain(|(name, incarnation), (number, until)| {
            if *until <= now {
                due.push((name.clone(), *incarnation, *number));
            }
            *until > now
        });
        for (name, incarnation, number) in due {
            let Some(said) = self.channels.said.get_mut(&name) else { continue };
            if !said.is_settled(incarnation, number) {
                said.note(incarnation, number);
                self.node.tell(Reply::Doubt { name }).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nats::interest::{Plane, Scope};

    fn said(since: &[(u64, u64)]) -> Said {
        let mut said = Said::new("c".into(), (Plane::Core, Scope::Slot(0)));
        said.confirm(&Rc::new(since.iter().copied().collect()));
        said
    }

    #[test]
    fn what_is_missing_is_seen() {
        let mut said = said(&[(7, 10)]);
        let mut check = |number, before, expected| {
            assert_eq!(
                said.hear(&Extra { incarnation: 7, number, before }),
                expected,
                "{number} after {before}"
            );
        };
        // What was before the subscription is not missed.
        check(12, 9, Place::Next);
        check(13, 12, Place::Next);
        check(13, 12, Place::Repeat);
        check(20, 13, Place::Next);
        check(30, 25, Place::Hole);
        check(31, 30, Place::Next);
        // A pause of the publisher.
        check(40, 0, Place::Next);
        assert!(said.is_settled(7, 40) && !said.is_settled(7, 41));
        // A node that came later.
        assert_eq!(said.hear(&Extra { incarnation: 8, number: 2, before: 1 }), Place::Hole);
        // Not confirmed yet.
        assert!(Said::new("c".into(), (Plane::Core, Scope::Slot(0))).is_settled(7, 99));
    }

    #[test]
    fn a_channel_is_named_for_some_hearts() {
        let mut speech = Speech::default();
        let extra = Extra::read(&speech.say(3, "a")).unwrap();
        assert_eq!(extra, Extra { incarnation: 3, number: 1, before: 0 });
        let extra = Extra::read(&speech.say(3, "a")).unwrap();
        assert_eq!((extra.number, extra.before), (2, 1));
        for _ in 0..TELLINGS {
            assert_eq!(speech.news(), (vec![(hash("a"), 2)], false));
        }
        assert_eq!(speech.news(), (vec![], false));
        assert_eq!(Extra::read(&[0; EXTRA_BYTES - 1]), None);
    }

    #[test]
    fn more_channels_than_a_heart_names_take_another() {
        for (count, expected) in [(NAMED_MAX, false), (NAMED_MAX + 1, true)] {
            let mut speech = Speech::default();
            for n in 0..count {
                let _ = speech.say(1, &n.to_string());
            }
            let (news, more) = speech.news();
            assert_eq!((news.len(), more), (NAMED_MAX, expected));
        }
    }
}
