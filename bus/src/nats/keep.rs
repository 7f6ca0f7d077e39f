//! Keeping what the stream's age limit would take: the epoch's record, and positions of channels that are open and
//! quiet. And not keeping what nobody needs: old canaries.
//!
//! Owns: when to look. Must not know: what is kept how ([`super::read`]).
//!
//! A channel's position is its last publication, and a stream drops that after its `max_age`. While a channel is open
//! at a node, that node looks from time to time and writes a mark in time. The record is written again, unchanged.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::{Api, Which};
use super::life::{In, Life};
use super::wire::{self, Record};

/// Channels looked after in one tick.
const LOOKED_AFTER_MAX: usize = 16;

/// Parts of a stream's age after which a channel is looked after first, and then again.
const FIRST_PART: u32 = 64;
const NEXT_PART: u32 = 4;

/// Time between two removals of canaries, and those that stay: a barrier looks for the last one.
const CANARIES_EVERY: Duration = Duration::from_secs(15);
const CANARIES_KEPT: u64 = 16;

/// What is to be looked after, by when.
#[derive(Default)]
pub(super) struct Keeping {
    /// Channels in the two queues.
    kept: HashSet<Arc<str>>,
    channels: VecDeque<(Instant, Arc<str>)>,
    again: VecDeque<(Instant, Arc<str>)>,
    records_due: Option<Instant>,
    canaries_due: Option<Instant>,
}

impl Life<'_> {
    fn age(&self) -> Duration {
        Duration::from_millis(self.node.options.retention_ms)
    }

    /// A channel is wanted from now on.
    pub(super) fn keep_channel(&mut self, name: &Arc<str>) {
        if self.keeping.kept.insert(name.clone()) {
            self.keeping.channels.push_back((Instant::now() + self.age() / FIRST_PART, name.clone()));
        }
    }

    pub(super) async fn look_after_keeping(&mut self, now: Instant) {
        for _ in 0..LOOKED_AFTER_MAX {
            let is_due =
                |queue: &VecDeque<(Instant, Arc<str>)>| queue.front().is_some_and(|(at, _)| *at <= now);
            let queue = match () {
                () if is_due(&self.keeping.channels) => &mut self.keeping.channels,
                () if is_due(&self.keeping.again) => &mut self.keeping.again,
                () => break,
            };
            let Some((_, name)) = queue.pop_front() else { break };
            if self.channels.heard.contains_key(&name) {
                self.keep_position(&name);
                self.keeping.again.push_back((now + self.age() / NEXT_PART, name));
            } else {
                self.keeping.kept.remove(&name);
            }
        }
        if self.keeping.canaries_due.is_none_or(|due| due <= now) {
            self.keeping.canaries_due = Some(now + CANARIES_EVERY);
            for stream in 0..self.node.subjects.streams() {
                if self.is_stream_up(stream) {
                    self.remove_canaries(stream);
                }
            }
        }
        if self.keeping.records_due.is_none_or(|due| due <= now) {
            self.keeping.records_due = Some(now + self.age() / NEXT_PART);
            for stream in 0..self.node.subjects.streams() {
                if self.is_stream_up(stream) {
                    self.keep_record(stream);
                }
            }
        }
    }

    fn keep_position(&mut self, name: &str) {
        let stream = self.stream_of(name);
        let (place, retention_ms) = (self.place(stream, name), self.node.options.retention_ms);
        self.walk(async move {
            if let Err(error) = place.keep(retention_ms).await {
                tracing::debug!(%error, "a position was not kept; looked after again later");
            }
            In::Done
        });
    }

    fn remove_canaries(&mut self, stream: u16) {
        let api = self.api(stream);
        let subject = self.node.subjects.stored_canary(stream, self.node.incarnation);
        self.walk(async move {
            // What is not removed now is removed the next time, or ends by its age.
            let _ = api.purge_but(&subject, CANARIES_KEPT).await;
            In::Done
        });
    }

    fn keep_record(&mut self, stream: u16) {
        let (api, record) = (self.api(stream), self.streams[usize::from(stream)].record);
        let (subject, retention_ms) =
            (self.node.subjects.stored_epoch(stream), self.node.options.retention_ms);
        self.walk(async move {
            keep(&api, &subject, record, retention_ms).await;
            In::Done
        });
    }
}

/// Writes the record again if half of its time is over and it still is the record.
async fn keep(api: &Api, subject: &str, record: Record, retention_ms: u64) {
    let Ok(stored) = api.message(Which::Last(subject)).await else { return };
    let age_ms = super::read::unix_ms().saturating_sub(stored.unix_ms);
    if wire::read::<Record>(&stored.payload) == Some(record) && age_ms >= retention_ms / 2 {
        // Somebody else was first, or it is tried again in time.
        let _ = api.publish_after(subject, stored.sequence, wire::write(&record)).await;
    }
}
