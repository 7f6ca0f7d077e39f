//! Late answers of the bus, and what comes from it unasked.
//!
//! Owns the table of those who wait, by token, and takes the bus's events to whom they concern. The
//! embedded bus answers inline and rarely comes here; a broker always does. It must not know what is
//! done with an answer.
//!
//! Invariant: a token is waited for once, and its entry goes with the answer.

use std::collections::{HashMap, VecDeque};

use ringmain_bus::{Accepted, Bus, BusError, Event, Health, Page, Position, PublishError, Token};
use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use super::history::history_answer;
use super::late::{Late, Recovery};
use super::{Publisher, bus_error, publish_error};
use crate::core::engine::ShardIndex;
use crate::core::mesh::{Origin, SubscribeAtHome};
use crate::core::metrics::Metric;
use crate::core::shard::Core;

/// What waits for a late answer of the bus, by token.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    next: u64,
    /// Names this start of this shard in the ids of its publications; 0 where no broker sees them.
    pub(super) incarnation: u64,
    pub(super) waiting: HashMap<u64, Waiter>,
    /// Subscriptions of channels for which the bus has not confirmed interest yet.
    pub(super) opening: HashMap<u32, VecDeque<(ShardIndex, Box<SubscribeAtHome>)>>,
    /// Channels for which a recovery waits for its page.
    pub(super) late: HashMap<u32, Late>,
}

#[derive(Debug)]
pub(super) enum Waiter {
    Open(u32),
    Publish(ShardIndex, Publisher),
    Subscribe(Recovery),
    Query(ShardIndex, Origin),
    Replay(ShardIndex, Origin, u64),
    Call(u64),
}

impl Waiters {
    pub(super) fn token(&mut self) -> Token {
        self.next += 1;
        Token(self.next)
    }

    /// Whether something waits that names a channel by its index.
    pub(super) fn hold(&self, index: u32) -> bool {
        self.opening.contains_key(&index) || self.late.contains_key(&index)
    }
}

impl Core {
    /// Puts the port of a broker in the place of the embedded bus; before the first connection. `incarnation` is
    /// never the same for two shards or two starts.
    pub fn use_bus(&mut self, bus: Box<dyn Bus + std::marker::Send>, incarnation: u64) {
        self.bus = bus;
        self.waiters.incarnation = incarnation;
    }

    /// Lets the bus do what is due, and takes what it has to say.
    pub(crate) fn poll_bus(&mut self, now: Now) {
        let mut events = Vec::new();
        self.bus.poll(now, &mut |event| events.push(OwnedEvent::from(event)));
        for event in events {
            self.bus_event(event, now);
        }
    }

    fn bus_event(&mut self, event: OwnedEvent, now: Now) {
        match event {
            OwnedEvent::Opened { token, result } => {
                if let Some(Waiter::Open(index)) = self.waiters.waiting.remove(&token) {
                    self.opened(index, result, now);
                }
            }
            OwnedEvent::Published { token, result } => {
                if let Some(Waiter::Publish(from, publisher)) = self.waiters.waiting.remove(&token) {
                    self.published(from, publisher, result.map_err(publish_error), now);
                }
            }
            OwnedEvent::Read { token, result, records } => self.late_read(token, result, records, now),
            OwnedEvent::Cleared { token, result } => {
                if let Some(Waiter::Call(call)) = self.waiters.waiting.remove(&token) {
                    self.call_done(call, result.map(|_| ()).map_err(bus_error));
                }
            }
            OwnedEvent::Arrival { channel, epoch, record } => {
                if let Some((publication, _)) = Publication::read_record(&record)
                    && self.channels.try_get(channel).is_some()
                {
                    self.metrics.add(Metric::Publications, 1);
                    self.deliver(channel, epoch, &publication, now);
                    self.arrived_late(channel, &record, now);
                }
            }
            OwnedEvent::Moved { channel, position } => {
                self.position_lost(channel, position);
                self.recoveries_jumped(channel, now);
            }
            OwnedEvent::Down => self.refuse_recoveries(now),
            OwnedEvent::Idle { channel } => self.drop_channel_if_unused(channel, now),
            OwnedEvent::Nothing => {}
        }
    }

    fn late_read(&mut self, token: u64, result: Result<Page, BusError>, records: Vec<u8>, now: Now) {
        match self.waiters.waiting.remove(&token) {
            Some(Waiter::Subscribe(recovery)) => self.recovery_read(recovery, result, records, now),
            Some(Waiter::Query(from, origin)) => {
                let result = history_answer(result, records);
                self.give_answer(from, origin, result, now);
            }
            Some(Waiter::Replay(from, origin, after)) => {
                let whole = result.is_ok_and(|page| page.floor <= after);
                self.give_replay(from, origin, after, records, whole, now);
            }
            Some(Waiter::Call(call)) => self.call_history(call, history_answer(result, records)),
            _ => {}
        }
    }
}

/// An event of the bus, owned: the sink may not touch the core.
enum OwnedEvent {
    Opened { token: u64, result: Result<Position, BusError> },
    Published { token: u64, result: Result<Accepted, PublishError> },
    Read { token: u64, result: Result<Page, BusError>, records: Vec<u8> },
    Cleared { token: u64, result: Result<Position, BusError> },
    Arrival { channel: u32, epoch: u64, record: Vec<u8> },
    Moved { channel: u32, position: Position },
    Idle { channel: u32 },
    Down,
    Nothing,
}

impl From<Event<'_>> for OwnedEvent {
    fn from(event: Event<'_>) -> Self {
        match event {
            Event::Opened { token, result, .. } => Self::Opened { token: token.0, result },
            Event::Published { token, result } => Self::Published { token: token.0, result },
            Event::Read { token, result, publications } => {
                let mut records = Vec::new();
                publications.for_each(|publication| {
                    publication.write_record(&mut records);
                });
                Self::Read { token: token.0, result, records }
            }
            Event::Cleared { token, result } => Self::Cleared { token: token.0, result },
            Event::Arrival { channel, epoch, publication, .. } => {
                let mut record = Vec::new();
                publication.write_record(&mut record);
                Self::Arrival { channel: channel.0, epoch: epoch.get(), record }
            }
            Event::Gap { channel, resumed } => Self::Moved { channel: channel.0, position: resumed },
            Event::EpochChanged { channel, position } => Self::Moved { channel: channel.0, position },
            Event::Idle { channel } => Self::Idle { channel: channel.0 },
            Event::Health(Health::Down) => Self::Down,
            Event::Health(Health::Up) => Self::Nothing,
        }
    }
}
