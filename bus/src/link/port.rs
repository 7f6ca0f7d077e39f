//! A shard's view of a bus whose client lives on the control thread.
//!
//! Owns: commands in flight and their last deadline, which channels are open. Must not know: the broker.
//! Invariants: every command is answered once, also when the control thread is too late (C1); nothing of a closed
//! channel comes out, for between two lives of an id stands the answer to the second open (C5).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ringmain_proto::message::Publication;
use ringmain_proto::record::records;
use ringmain_proto::time::Now;

use super::{Bell, Command, Shared, Told};
use crate::backend::Target;
use crate::contract::{ANSWER_MS_MAX, Bus};
use crate::epoch::Position;
use crate::types::{
    Accepted, BusError, Channel, ChannelId, Event, Health, HistoryQuery, IDEMPOTENCY_KEY_BYTES_MAX, Outcome,
    Page, PublicationId, PublishError, Token,
};

/// When the port answers by itself, in milliseconds: the hub has given up before, so this is a control thread that
/// does not run.
const ANSWER_BY_MS: u64 = 3_800;
const _: () = assert!(ANSWER_BY_MS < ANSWER_MS_MAX);

/// Events given in one poll.
const EVENTS_PER_POLL_MAX: usize = 512;

type Sink<'a> = &'a mut dyn FnMut(Event<'_>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The life of the channel that it opens.
    Open(ChannelId, u64),
    Publish,
    Read,
    Clear,
}

/// A channel between its open and its close.
#[derive(Debug)]
struct Life {
    number: u64,
    name: Arc<str>,
    /// The first open was answered.
    opened: bool,
}

/// See the module's doc.
pub struct Port {
    shared: Arc<Shared>,
    bell: Arc<Bell>,
    /// Commands were pushed since the hub was rung.
    pushed: bool,
    /// Among them others than publications.
    presses: bool,
    /// With the deadline, for a token may be used again after its answer.
    in_flight: HashMap<Token, (Kind, u64)>,
    /// In the order of sending, which is that of the deadlines. Holds those answered too, until their time.
    deadlines: VecDeque<(u64, Token)>,
    lives: HashMap<ChannelId, Life>,
    drawn: u64,
    health: Health,
    reachable: bool,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("in_flight", &self.in_flight.len()).finish_non_exhaustive()
    }
}

impl Port {
    pub(super) fn new(shared: Arc<Shared>, bell: Arc<Bell>) -> Port {
        Port {
            shared,
            bell,
            pushed: false,
            presses: false,
            in_flight: HashMap::new(),
            deadlines: VecDeque::new(),
            lives: HashMap::new(),
            drawn: 0,
            health: Health::Down,
            reachable: false,
        }
    }

    fn admit(&self) -> Result<(), BusError> {
        match () {
            () if !self.reachable => Err(BusError::Unavailable),
            () if self.in_flight.len() >= self.shared.options.commands_max => Err(BusError::Overloaded),
            () => Ok(()),
        }
    }

    fn send(&mut self, now: Now, token: Token, kind: Kind, command: Command) {
        let deadline_ms = now.mono_ms + ANSWER_BY_MS;
        self.in_flight.insert(token, (kind, deadline_ms));
        self.deadlines.push_back((deadline_ms, token));
        self.push(command);
    }

    fn push(&mut self, command: Command) {
        self.presses |= !matches!(command, Command::Publish { .. });
        self.shared.commands.push(command);
        self.pushed = true;
    }

    /// The target of a command; an open channel's name is not copied.
    fn target(&self, channel: Channel<'_>) -> Target {
        let name = match self.lives.get(&channel.id) {
            Some(life) if *life.name == *channel.name => life.name.clone(),
            _ => channel.name.into(),
        };
        Target { name, options: *channel.options }
    }

    /// The command is answered now. `None`: it was before.
    fn answered(&mut self, token: Token) -> Option<Kind> {
        self.in_flight.remove(&token).map(|(kind, _)| kind)
    }

    fn opened(
        &mut self,
        token: Token,
        channel: ChannelId,
        result: Result<Position, BusError>,
        sink: Sink<'_>,
    ) {
        let Some(Kind::Open(_, number)) = self.answered(token) else { return };
        let others_wait = result.is_err() && self.is_opening(channel, number);
        if let Some(life) = self.lives.get_mut(&channel).filter(|life| life.number == number) {
            life.opened |= result.is_ok();
            if !life.opened && !others_wait {
                self.lives.remove(&channel);
            }
        }
        sink(Event::Opened { token, channel, result });
    }

    /// Whether another open of the same life waits for its answer.
    fn is_opening(&self, channel: ChannelId, number: u64) -> bool {
        self.in_flight.values().any(|(kind, _)| *kind == Kind::Open(channel, number))
    }

    fn is_open(&self, channel: ChannelId) -> bool {
        self.lives.get(&channel).is_some_and(|life| life.opened)
    }

    fn told(&mut self, told: Told, sink: Sink<'_>) {
        match told {
            Told::Opened { token, channel, result } => self.opened(token, channel, result, sink),
            Told::Published { token, result } => {
                if self.answered(token).is_some() {
                    sink(Event::Published { token, result });
                }
            }
            Told::Read { token, result, records: page } => {
                if self.answered(token).is_some() {
                    sink(Event::Read { token, result, publications: records(&page) });
                }
            }
            Told::Cleared { token, result } => {
                if self.answered(token).is_some() {
                    sink(Event::Cleared { token, result });
                }
            }
            Told::Arrival { channel, epoch, previous, offset, record } => {
                if self.is_open(channel)
                    && let Some((mut publication, _)) = Publication::read_record(&record)
                {
                    publication.offset = offset;
                    sink(Event::Arrival { channel, epoch, previous, publication });
                }
            }
            Told::Gap { channel, resumed } if self.is_open(channel) => sink(Event::Gap { channel, resumed }),
            Told::EpochChanged { channel, position } if self.is_open(channel) => {
                sink(Event::EpochChanged { channel, position });
            }
            Told::Gap { .. } | Told::EpochChanged { .. } => (),
            Told::Health { health, reachable } => {
                self.reachable = reachable;
                if std::mem::replace(&mut self.health, health) != health {
                    sink(Event::Health(health));
                }
            }
        }
    }

    /// The control thread is too late: what it would say is said here.
    fn answer_for(&mut self, token: Token, kind: Kind, sink: Sink<'_>) {
        match kind {
            Kind::Open(channel, _) => {
                let name = self.lives.get(&channel).map(|life| life.name.clone());
                self.opened(token, channel, Err(BusError::Unavailable), sink);
                if let (Some(name), false) = (name, self.lives.contains_key(&channel)) {
                    // The hub may come to open it yet.
                    self.push(Command::Close { channel, name });
                }
            }
            Kind::Publish => sink(Event::Published { token, result: Err(PublishError::Unknown) }),
            Kind::Read => {
                sink(Event::Read { token, result: Err(BusError::Unavailable), publications: records(&[]) });
            }
            Kind::Clear => sink(Event::Cleared { token, result: Err(BusError::Unavailable) }),
        }
        self.in_flight.remove(&token);
    }
}

impl Bus for Port {
    fn open(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        if let Err(error) = self.admit() {
            return Outcome::Done(Err(error));
        }
        let target = self.target(channel);
        let number = match self.lives.get(&channel.id) {
            Some(life) => life.number,
            None => {
                self.drawn += 1;
                let life = Life { number: self.drawn, name: target.name.clone(), opened: false };
                self.lives.insert(channel.id, life);
                self.drawn
            }
        };
        let command = Command::Open { token, channel: channel.id, target };
        self.send(now, token, Kind::Open(channel.id, number), command);
        Outcome::Pending
    }

    fn close(&mut self, _: Now, channel: ChannelId) {
        if let Some(life) = self.lives.remove(&channel) {
            self.push(Command::Close { channel, name: life.name });
        }
    }

    fn publish(
        &mut self,
        now: Now,
        token: Token,
        channel: Channel<'_>,
        id: PublicationId<'_>,
        publication: &Publication<'_>,
    ) -> Outcome<Result<Accepted, PublishError>> {
        let (bytes, bytes_max) = (publication.record_len(), self.shared.options.record_bytes_max);
        if bytes > bytes_max {
            return Outcome::Done(Err(PublishError::TooLarge { bytes, bytes_max }));
        }
        if let PublicationId::Key(key) = id
            && key.len() > IDEMPOTENCY_KEY_BYTES_MAX
        {
            return Outcome::Done(Err(PublishError::KeyTooLong { bytes: key.len() }));
        }
        match self.admit() {
            Err(BusError::Overloaded) => return Outcome::Done(Err(PublishError::Overloaded)),
            Err(_) => return Outcome::Done(Err(PublishError::Unavailable)),
            Ok(()) => (),
        }
        let mut record = vec![0; bytes];
        publication.write_record_at(0, &mut record);
        let target = self.target(channel);
        let command = Command::Publish { token, target, id: id.into(), record: record.into() };
        self.send(now, token, Kind::Publish, command);
        Outcome::Pending
    }

    fn read(
        &mut self,
        now: Now,
        token: Token,
        channel: Channel<'_>,
        query: &HistoryQuery,
        _: &mut dyn FnMut(&Publication<'_>),
    ) -> Outcome<Result<Page, BusError>> {
        if let Err(error) = self.admit() {
            return Outcome::Done(Err(error));
        }
        if !channel.options.is_positioned() {
            return Outcome::Done(Ok(Page { top: Position::NONE, floor: 0, more: false }));
        }
        let command = Command::Read { token, target: self.target(channel), query: *query };
        self.send(now, token, Kind::Read, command);
        Outcome::Pending
    }

    fn clear(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        if let Err(error) = self.admit() {
            return Outcome::Done(Err(error));
        }
        if !channel.options.is_positioned() {
            return Outcome::Done(Ok(Position::NONE));
        }
        let command = Command::Clear { token, target: self.target(channel) };
        self.send(now, token, Kind::Clear, command);
        Outcome::Pending
    }

    fn is_idle(&self, _: Now, channel: ChannelId) -> bool {
        !self.lives.contains_key(&channel)
    }

    fn forget(&mut self, channel: ChannelId) {
        self.close(Now { mono_ms: 0, unix_ms: 0 }, channel);
    }

    fn flush(&mut self) {
        match (std::mem::take(&mut self.pushed), std::mem::take(&mut self.presses)) {
            (true, true) => self.bell.ring(),
            (true, false) => self.bell.ring_for_publications(|| self.shared.commands.len()),
            (false, _) => (),
        }
    }

    fn poll(&mut self, now: Now, sink: &mut dyn FnMut(Event<'_>)) {
        self.flush();
        let (mut arrivals, mut bytes) = (0, 0);
        for _ in 0..EVENTS_PER_POLL_MAX {
            let Some(told) = self.shared.told.pop() else { break };
            if let Told::Arrival { record, .. } = &told {
                arrivals += 1;
                bytes += record.len();
            }
            self.told(told, sink);
        }
        if arrivals > 0 {
            self.shared.arrivals.fetch_sub(arrivals, Ordering::AcqRel);
            self.shared.arrival_bytes.fetch_sub(bytes, Ordering::AcqRel);
        }
        if self.shared.refused.load(Ordering::Acquire)
            && self.shared.has_room()
            && self.shared.refused.swap(false, Ordering::AcqRel)
        {
            self.bell.ring();
        }
        while let Some(&(deadline_ms, token)) = self.deadlines.front() {
            let waits = self.in_flight.get(&token).filter(|(_, at_ms)| *at_ms == deadline_ms);
            let waits = waits.map(|(kind, _)| *kind);
            if waits.is_some() && deadline_ms > now.mono_ms {
                break;
            }
            self.deadlines.pop_front();
            if let Some(kind) = waits {
                self.answer_for(token, kind, sink);
            }
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        if !self.shared.told.is_empty() {
            return Some(0);
        }
        self.deadlines.front().map(|&(deadline, _)| deadline)
    }

    fn health(&self) -> Health {
        self.health
    }
}
