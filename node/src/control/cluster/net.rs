//! The node's own channels on the bus: which are subscribed, and what is published there.
//!
//! Owns names and ids of the channels, opens that are tried again until they succeed, and closes. It must not know
//! what the messages mean.
//!
//! Channels: `node:all` (every node), `node:presence` (every node, what happened in channels), `node:id:{node}` (one
//! node), `node:slot:{slot}` (nodes with users of that slot). All are ephemeral: what the bus loses it tells as a gap.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};

use ringmain_bus::{
    Accepted, Bus, BusError, Channel, ChannelId, ChannelOptions, Event, Health, Outcome, PublicationId,
    PublishError, Token,
};
use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use crate::core::cluster::{NodeId, SLOTS};

/// Pause before an open that failed is tried again, in milliseconds.
pub(super) const OPEN_AGAIN_MS: u64 = 100;

/// Opens begun in one poll at the most: the queue of the port is shared with what is published.
pub(super) const OPENS_PER_POLL_MAX: usize = 64;

/// A channel of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Line {
    All,
    Presence,
    /// This node's own.
    Inbox,
    Slot(u16),
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    All,
    Presence,
    Slot(u16),
    /// Another node, under its place in the table of peers.
    Node(NodeId, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting(u64),
    Opening(u64),
    Open,
}

/// What came of a poll.
#[derive(Debug)]
pub(super) enum NetEvent {
    Opened(Line),
    Gap(Line),
    Message(Vec<u8>),
    Published(u64, Result<(), PublishError>),
    /// The bus went away, or is back.
    HealthChanged,
}

/// See the module's doc.
#[derive(Debug)]
pub(super) struct Net {
    node: NodeId,
    lines: BTreeMap<Line, State>,
    due: BTreeSet<(u64, Line)>,
    opening: BTreeMap<u64, Line>,
    token: u64,
    pub(super) health: Health,
}

/// Ids 16 to 4111 are slots, those after it other nodes.
const SLOT_ID: u32 = 16;
const NODE_ID: u32 = SLOT_ID + SLOTS as u32;

impl Line {
    fn id(self) -> ChannelId {
        ChannelId(match self {
            Line::All => 0,
            Line::Presence => 1,
            Line::Inbox => 2,
            Line::Slot(slot) => SLOT_ID + u32::from(slot),
        })
    }

    fn of(id: ChannelId) -> Option<Line> {
        match id.0 {
            0 => Some(Line::All),
            1 => Some(Line::Presence),
            2 => Some(Line::Inbox),
            id if (SLOT_ID..NODE_ID).contains(&id) => Some(Line::Slot((id - SLOT_ID) as u16)),
            _ => None,
        }
    }

    fn name(self, node: NodeId) -> String {
        match self {
            Line::All => "node:all".to_owned(),
            Line::Presence => "node:presence".to_owned(),
            Line::Inbox => inbox_name(node),
            Line::Slot(slot) => format!("node:slot:{slot}"),
        }
    }
}

fn inbox_name(node: NodeId) -> String {
    format!("node:id:{node:032x}")
}

impl Net {
    pub(super) fn new(node: NodeId) -> Net {
        Net {
            node,
            lines: BTreeMap::new(),
            due: BTreeSet::new(),
            opening: BTreeMap::new(),
            token: 0,
            health: Health::Down,
        }
    }

    /// Whether messages can be published.
    pub(super) fn is_up(&self) -> bool {
        self.health == Health::Up
    }

    /// Subscribes, now or as soon as it can be.
    pub(super) fn want(&mut self, now: Now, line: Line) {
        if let Entry::Vacant(entry) = self.lines.entry(line) {
            entry.insert(State::Waiting(now.mono_ms));
            self.due.insert((now.mono_ms, line));
        }
    }

    /// Ends a subscription.
    pub(super) fn unwant(&mut self, now: Now, bus: &mut dyn Bus, line: Line) {
        match self.lines.remove(&line) {
            None => return,
            Some(State::Waiting(at_ms)) => {
                self.due.remove(&(at_ms, line));
            }
            Some(State::Opening(token)) => {
                self.opening.remove(&token);
            }
            Some(State::Open) => {}
        }
        bus.close(now, line.id());
    }

    /// When the next open is due, in `mono_ms`.
    pub(super) fn next_ms(&self) -> Option<u64> {
        self.due.first().map(|(at_ms, _)| *at_ms)
    }

    /// Opens what is due.
    pub(super) fn open_due(&mut self, now: Now, bus: &mut dyn Bus, events: &mut Vec<NetEvent>) {
        for _ in 0..OPENS_PER_POLL_MAX {
            if self.next_ms().is_none_or(|at_ms| at_ms > now.mono_ms) {
                return;
            }
            let Some((_, line)) = self.due.pop_first() else { return };
            self.token += 1;
            let token = self.token;
            let name = line.name(self.node);
            let channel = Channel { id: line.id(), name: &name, options: &ChannelOptions::EPHEMERAL };
            match bus.open(now, Token(token), channel) {
                Outcome::Pending => {
                    self.lines.insert(line, State::Opening(token));
                    self.opening.insert(token, line);
                }
                Outcome::Done(result) => self.opened(now, line, result.map(|_| ()), events),
            }
        }
    }

    fn opened(&mut self, now: Now, line: Line, result: Result<(), BusError>, events: &mut Vec<NetEvent>) {
        if result.is_ok() {
            self.lines.insert(line, State::Open);
            events.push(NetEvent::Opened(line));
        } else {
            let at_ms = now.mono_ms + OPEN_AGAIN_MS;
            self.lines.insert(line, State::Waiting(at_ms));
            self.due.insert((at_ms, line));
        }
    }

    /// Publishes. The answer, now or in an event, is under the number given.
    pub(super) fn publish(
        &mut self,
        now: Now,
        bus: &mut dyn Bus,
        to: To,
        bytes: &[u8],
    ) -> (u64, Option<Result<(), PublishError>>) {
        self.token += 1;
        let (id, name) = match to {
            To::All => (Line::All.id(), Line::All.name(self.node)),
            To::Presence => (Line::Presence.id(), Line::Presence.name(self.node)),
            To::Slot(slot) => (Line::Slot(slot).id(), Line::Slot(slot).name(self.node)),
            To::Node(node, index) => (ChannelId(NODE_ID + index), inbox_name(node)),
        };
        let channel = Channel { id, name: &name, options: &ChannelOptions::EPHEMERAL };
        let publication = Publication { data: bytes, ..Publication::default() };
        // The node is random for every run, and the number counts through all its incarnations.
        let id = PublicationId::Node { incarnation: self.node as u64, sequence: self.token };
        let done = |result: Result<Accepted, PublishError>| result.map(|_| ());
        (self.token, bus.publish(now, Token(self.token), channel, id, &publication).done().map(done))
    }

    /// Forgets another node: its place may be given to a third.
    pub(super) fn forget_node(&self, bus: &mut dyn Bus, index: u32) {
        bus.forget(ChannelId(NODE_ID + index));
    }

    /// Takes what the bus has to say.
    pub(super) fn poll(&mut self, now: Now, bus: &mut dyn Bus) -> Vec<NetEvent> {
        let mut events = Vec::new();
        let mut opened = Vec::new();
        bus.poll(now, &mut |event| match event {
            Event::Opened { token, result, .. } => opened.push((token.0, result.map(|_| ()))),
            Event::Published { token, result } => {
                events.push(NetEvent::Published(token.0, result.map(|_| ())));
            }
            Event::Arrival { channel, publication, .. } => {
                if Line::of(channel).is_some() {
                    events.push(NetEvent::Message(publication.data.to_vec()));
                }
            }
            Event::Gap { channel, .. } | Event::EpochChanged { channel, .. } => {
                events.extend(Line::of(channel).map(NetEvent::Gap));
            }
            // Asked for below.
            Event::Health(_) => {}
            Event::Read { .. } | Event::Cleared { .. } | Event::Idle { .. } => {}
        });
        for (token, result) in opened {
            if let Some(line) = self.opening.remove(&token) {
                self.opened(now, line, result, &mut events);
            }
        }
        let health = bus.health();
        if health != self.health {
            self.health = health;
            events.push(NetEvent::HealthChanged);
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_an_id_and_a_name_of_its_own() {
        let lines = [Line::All, Line::Presence, Line::Inbox].into_iter().chain((0..SLOTS).map(Line::Slot));
        let mut ids = BTreeSet::new();
        let mut names = BTreeSet::new();
        for line in lines {
            assert_eq!(Line::of(line.id()), Some(line));
            assert!(ids.insert(line.id()) && names.insert(line.name(7)));
            assert!(line.name(7).starts_with("node:"), "no client can name it");
        }
        assert_eq!(Line::of(ChannelId(NODE_ID)), None);
        assert_eq!(Line::of(ChannelId(3)), None);
    }
}
