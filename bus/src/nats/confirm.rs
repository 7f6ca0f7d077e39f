//! When a subscription is confirmed.
//!
//! Owns: rounds of confirmation. Must not know: subscriptions' subjects.
//!
//! A subscription reaches the other servers of a cluster after the one that took it. So it is confirmed by what was
//! sent behind it and came back over the same ways: a canary through its stream; for an ephemeral channel the answers
//! of all living nodes. Many wait for one round; the next begins when it ends.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::life::{Life, PEER_MS};
use super::node::CORE;
use super::wire::{self, Ask, Told};
use crate::backend::{Call, Domain, Reply};

/// How long peers are waited for is bounded by [`PEER_MS`]: who is silent for so long is not asked.
const _: () = assert!(PEER_MS < crate::contract::ANSWER_MS_MAX);

/// A round of confirmations: nothing is confirmed by what was sent before it.
struct Round {
    number: u64,
    calls: Vec<Waiting>,
    /// Streams whose canary of this number or a later one has not come back.
    streams: Vec<(u16, u64)>,
    /// Nodes that have not answered.
    peers: HashSet<u64>,
    /// How far each of the others had spoken.
    spoken: HashMap<u64, u64>,
}

/// A subscription that waits.
struct Waiting {
    call: Call,
    domain: Domain,
    name: Arc<str>,
}

/// Subscriptions that wait for their confirmation.
#[derive(Default)]
pub(super) struct Confirm {
    waiting: Vec<Waiting>,
    round: Option<Round>,
    rounds: u64,
}

impl Confirm {
    /// Takes out the calls of a domain.
    pub(super) fn fail(&mut self, domain: Domain) -> Vec<Call> {
        let mut failed = Vec::new();
        let mut take = |calls: &mut Vec<Waiting>| {
            calls.retain(|waiting| {
                let keep = waiting.domain != domain;
                failed.extend((!keep).then_some(waiting.call));
                keep
            });
        };
        take(&mut self.waiting);
        if let Some(round) = &mut self.round {
            take(&mut round.calls);
            if let Some(stream) = domain.0.checked_sub(1) {
                round.streams.retain(|(waited, _)| u32::from(*waited) != stream);
            }
        }
        failed
    }
}

impl Life<'_> {
    /// Answers a subscription that was just sent, once it is confirmed.
    pub(super) async fn confirm(&mut self, call: Call, domain: Domain, name: Arc<str>) {
        self.confirm.waiting.push(Waiting { call, domain, name });
        self.begin_round().await;
    }

    /// Waits no more for nodes that are gone.
    pub(super) async fn look_after_rounds(&mut self, now: Instant) {
        let living: HashSet<u64> = self.node.living(now).into_iter().collect();
        if let Some(round) = &mut self.confirm.round {
            round.peers.retain(|peer| living.contains(peer) || *peer == self.node.incarnation);
        }
        self.end_round().await;
    }

    async fn begin_round(&mut self) {
        if self.confirm.round.is_some() || self.confirm.waiting.is_empty() {
            return;
        }
        self.confirm.rounds += 1;
        let number = self.confirm.rounds;
        let calls = std::mem::take(&mut self.confirm.waiting);
        let mut streams: Vec<(u16, u64)> = Vec::new();
        let mut peers = HashSet::new();
        for waiting in &calls {
            match waiting.domain.0.checked_sub(1) {
                None => {
                    peers.insert(self.node.incarnation);
                }
                Some(stream) if !streams.iter().any(|(waited, _)| u32::from(*waited) == stream) => {
                    streams.push((stream as u16, 0));
                }
                Some(_) => (),
            }
        }
        for (stream, from) in &mut streams {
            self.send_canary(*stream).await;
            *from = self.node.pulses;
        }
        if !peers.is_empty() {
            peers.extend(self.node.living(Instant::now()));
            let ask = wire::write(&Ask { incarnation: self.node.incarnation, number });
            let (subject, reply) = (self.node.subjects.sync(), format!("{}.c", self.inbox));
            self.send(subject, Some(reply.into()), None, ask.into()).await;
        }
        self.confirm.round = Some(Round { number, calls, streams, peers, spoken: HashMap::new() });
    }

    /// A node has answered a question of a round.
    pub(super) async fn peer_told(&mut self, told: &Told) {
        if let Some(round) = &mut self.confirm.round
            && round.number == told.number
        {
            round.peers.remove(&told.incarnation);
            round.spoken.insert(told.incarnation, told.spoken);
            self.end_round().await;
        }
    }

    pub(super) async fn confirmed_by_canary(&mut self, stream: u16) {
        let returned = self.streams[usize::from(stream)].returned;
        if let Some(round) = &mut self.confirm.round {
            round.streams.retain(|(waited, from)| *waited != stream || returned < *from);
            self.end_round().await;
        }
    }

    /// Ends the round if nothing is waited for, and begins the next.
    async fn end_round(&mut self) {
        let is_over = |round: &Round| round.streams.is_empty() && round.peers.is_empty();
        if !self.confirm.round.as_ref().is_some_and(is_over) {
            return;
        }
        let Some(Round { calls, spoken, .. }) = self.confirm.round.take() else { return };
        let spoken = Rc::new(spoken);
        for Waiting { call, domain, name } in calls {
            if domain == CORE
                && let Some(said) = self.channels.said.get_mut(&name)
            {
                said.confirm(&spoken);
            }
            self.node.tell(Reply::Subscribed { call, result: Ok(domain) }).await;
        }
        Box::pin(self.begin_round()).await;
    }
}
