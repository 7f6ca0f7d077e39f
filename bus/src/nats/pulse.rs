//! Signs of life: hearts, canaries, epoch records, and answers to the questions of others.
//!
//! Owns: when a domain is up. Must not know: channels' publications.
//!
//! A *heart* goes to all nodes over core subjects, and back to its sender: it proves the way of ephemeral channels.
//! A *canary* is published into each stream and comes back by its RePublish: it proves the way of positioned ones,
//! and carries how far this node published where, so that others see a lost tail. A canary that comes back with a
//! sequence not above the one before it, or a record of an older generation, means that the stream is not the one
//! that was believed.

use std::time::{Duration, Instant};

use async_nats::Message;

use super::api::{ApiError, Which};
use super::life::{In, Life, PEER_MS};
use super::node::{CORE, Node, PEERS_MAX};
use super::streams::Step;
use super::subjects::hash;
use super::wire::{self, Ask, Canary, Heart, Record, Told};
use crate::backend::{CANARY_MS, Domain};

/// Channels named in one canary; those beyond wait for the next.
const TOPS_MAX: usize = 4_096;

/// Canaries on their way; older ones are forgotten.
const CANARIES_MAX: usize = 64;

impl Node {
    /// The nodes that lived at a moment.
    pub(super) fn living(&self, at: Instant) -> Vec<u64> {
        let lived = |heard: &Instant| *heard + Duration::from_millis(PEER_MS) >= at;
        self.peers.iter().filter(|(_, heard)| lived(heard)).map(|(peer, _)| *peer).collect()
    }
}

/// The sequence that a stream gave to a message that it says again.
pub(super) fn sequence_of(message: &Message) -> Option<u64> {
    header(message, "Nats-Sequence")
}

/// A header's number.
pub(super) fn header(message: &Message, name: &str) -> Option<u64> {
    message.headers.as_ref()?.get(name)?.as_str().parse().ok()
}

impl Life<'_> {
    pub(super) async fn pulse_if_due(&mut self, now: Instant) {
        if now - self.pulsed >= Duration::from_millis(CANARY_MS) {
            self.pulse().await;
        }
    }

    /// A heart, and a canary into each stream that is believed.
    pub(super) async fn pulse(&mut self) {
        self.pulsed = Instant::now();
        self.send_heart(false).await;
        for stream in 0..self.node.subjects.streams() {
            if matches!(self.streams[usize::from(stream)].step, Step::Proving | Step::Up) {
                self.send_canary(stream).await;
            }
        }
    }

    async fn send_heart(&mut self, closing: bool) {
        self.node.pulses += 1;
        let (incarnation, number) = (self.node.incarnation, self.node.pulses);
        let (said, more) = self.node.speech.news();
        let heart = wire::write(&Heart { incarnation, number, closing, said });
        let subject = self.node.subjects.heart();
        self.send(subject, None, None, heart.into()).await;
        if more {
            Box::pin(self.send_heart(closing)).await;
        }
    }

    /// Tells the others not to wait for us.
    pub(super) async fn say_goodbye(&mut self) {
        self.send_heart(true).await;
        let flushed = self.client.flush();
        let _ = tokio::time::timeout(Duration::from_millis(CANARY_MS), flushed).await;
    }

    pub(super) async fn send_canary(&mut self, stream: u16) {
        let n = usize::from(stream);
        self.node.pulses += 1;
        let number = self.node.pulses;
        let published = &mut self.streams[n].published;
        let names: Vec<_> = published.keys().take(TOPS_MAX).cloned().collect();
        let tops = names.iter().filter_map(|name| Some((hash(name), published.remove(name)?))).collect();
        let canary = wire::write(&Canary { incarnation: self.node.incarnation, number, tops });
        let canaries = &mut self.streams[n].canaries;
        canaries.push_back((number, canary.clone(), super::read::unix_ms()));
        if canaries.len() > CANARIES_MAX {
            canaries.pop_front();
        }
        let subject = self.node.subjects.stored_canary(stream, self.node.incarnation);
        self.send(subject, None, None, canary.into()).await;
    }

    pub(super) async fn heart(&mut self, message: &Message) {
        let Some(heart) = wire::read::<Heart>(&message.payload) else { return };
        let now = Instant::now();
        self.compare(&heart, now);
        if heart.incarnation != self.node.incarnation {
            if heart.closing {
                self.node.peers.remove(&heart.incarnation);
                self.expected.retain(|peer| *peer != heart.incarnation);
            } else if self.node.peers.len() < PEERS_MAX || self.node.peers.contains_key(&heart.incarnation) {
                self.node.peers.insert(heart.incarnation, now);
            }
            return;
        }
        self.core_heard = now;
        self.node.alive = now;
        let forgotten = now.checked_sub(Duration::from_millis(4 * PEER_MS));
        self.node.peers.retain(|_, heard| forgotten.is_none_or(|at| *heard >= at));
        if !self.core_up {
            self.core_up = true;
            self.node.back(CORE).await;
            self.settle_reach().await;
        }
    }

    /// A canary, ours or another node's.
    pub(super) async fn canary(&mut self, stream: u16, message: &Message) {
        let n = usize::from(stream);
        let (Some(sequence), Some(canary)) = (sequence_of(message), wire::read::<Canary>(&message.payload))
        else {
            return;
        };
        if !matches!(self.streams[n].step, Step::Proving | Step::Up) {
            return;
        }
        let high = &mut self.node.memories[n].witness.high;
        *high = sequence.max(*high);
        if canary.incarnation != self.node.incarnation {
            self.channels.note_tops(&canary.tops, &mut self.streams[n].marks);
            return;
        }
        let life = &mut self.streams[n];
        let Some(place) = life.canaries.iter().position(|(number, ..)| *number == canary.number) else {
            return;
        };
        let sent = life.canaries.drain(..=place).next_back();
        let last = self.node.memories[n].canary.as_ref().map_or(0, |(last, _)| *last);
        if sequence <= last {
            return self.stream_lost(stream).await;
        }
        let Some((number, bytes, sent_ms)) = sent else { return };
        self.node.memories[n].canary = Some((sequence, bytes));
        life.heard = Instant::now();
        life.returned = number;
        self.canary_back(stream, sequence, sent_ms).await;
    }

    async fn canary_back(&mut self, stream: u16, sequence: u64, sent_ms: u64) {
        let n = usize::from(stream);
        if self.streams[n].clock_ahead_ms.is_none() {
            self.streams[n].clock_ahead_ms = Some(0);
            let api = self.api(stream);
            self.walk(async move {
                let ahead_ms = match api.message(Which::At(sequence)).await {
                    Ok(stored) => stored.unix_ms as i64 - sent_ms as i64,
                    Err(_) => 0,
                };
                In::Clock { stream, ahead_ms }
            });
        }
        if matches!(self.streams[n].step, Step::Proving) {
            self.streams[n].step = Step::Up;
            self.node.back(Domain(u32::from(stream) + 1)).await;
            self.settle_reach().await;
        }
        self.tell_tops(stream).await;
        self.confirmed_by_canary(stream).await;
    }

    /// The stream's epoch record was written.
    pub(super) async fn record(&mut self, stream: u16, message: &Message) {
        let n = usize::from(stream);
        let Some(record) = wire::read::<Record>(&message.payload) else { return };
        let ours = self.streams[n].record;
        if !matches!(self.streams[n].step, Step::Proving | Step::Up) || record == ours {
            return;
        }
        tracing::debug!(stream, generation = record.generation, "another record of a stream");
        if record.generation <= ours.generation {
            return self.stream_lost(stream).await;
        }
        // We have watched the stream up to it and through it: nothing is in doubt but the positions.
        let info = self.streams[n].info.clone();
        self.stream_lost(stream).await;
        self.believe(stream, record, None);
        self.streams[n].info = info;
        self.streams[n].heard = Instant::now();
        self.streams[n].step = Step::Proving;
        self.send_canary(stream).await;
    }

    /// Another node asks, or we do.
    pub(super) async fn asked(&mut self, message: Message) {
        let (Some(ask), Some(reply)) = (wire::read::<Ask>(&message.payload), message.reply) else { return };
        let witnesses = self.node.memories.iter().map(|memory| memory.witness).collect();
        let (incarnation, spoken) = (self.node.incarnation, self.node.speech.spoken());
        let told = Told { incarnation, number: ask.number, spoken, witnesses };
        self.send(reply, None, None, wire::write(&told).into()).await;
    }
}

/// Whether trying again may help.
pub(super) fn is_passing(error: &ApiError) -> bool {
    matches!(error, ApiError::NoAnswer | ApiError::Nobody | ApiError::Refused { .. })
}
