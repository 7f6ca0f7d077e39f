//! The hub of a node: between the ports of its shards and one backend.
//!
//! Owns: open channels and their chains, interest and its linger, commands in flight and their deadlines, reads that
//! are joined, bringing channels back after a loss, health. Must not know: brokers, runtimes, clocks: `now` is an
//! argument, [`run`] drives it on the control thread.
//!
//! Invariants: every command is answered once; a channel is subscribed at the backend while a port has it open and
//! for [`HubOptions::linger_ms`] after; `Up` is said only when every open channel is whole.

mod reads;
mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use ringmain_proto::time::Now;

use crate::backend::{Call, Domain, Reply, Request, Target};
use crate::epoch::Position;
use crate::link::{Command, End, Told};
use crate::types::{BusError, ChannelId, Health, HistoryQuery, PublishError, Token};

pub use crate::runtime::run;
use reads::{Reads, Waiter};
pub use watch::{FILL_PUBLICATIONS_MAX, HELD_MAX};
use watch::{Next, Outlet, State, Watch};

/// When a command is given up, in milliseconds: a publish is unknown then.
pub const COMMAND_MS_MAX: u64 = 3_000;

/// When a subscription or a read of the hub's own is sent again, in milliseconds.
pub const RESEND_MS: u64 = 1_000;

const _: () = assert!(COMMAND_MS_MAX + 500 <= crate::contract::ANSWER_MS_MAX);

/// How a hub works.
#[derive(Clone, Copy, Debug)]
pub struct HubOptions {
    /// How long a channel that nobody has open any more stays subscribed, in milliseconds: clients that come and go
    /// cost the broker nothing.
    pub linger_ms: u64,
    /// Channels brought back at the same time.
    pub syncs_in_flight_max: usize,
    /// Channels open or lingering.
    pub channels_max: usize,
}

impl Default for HubOptions {
    /// A second, 8,192 channels at a time, a million channels.
    fn default() -> Self {
        Self { linger_ms: 1_000, syncs_in_flight_max: 8_192, channels_max: 1_000_000 }
    }
}

/// What a hub has counted since its start.
#[derive(Clone, Copy, Debug, Default)]
pub struct HubFigures {
    /// Publications told to ports.
    pub arrivals: u64,
    /// Gaps told.
    pub gaps: u64,
    /// Epoch changes told.
    pub epochs_changed: u64,
    /// Messages of stale masters, dropped.
    pub stale: u64,
    /// Arrivals that a port did not take.
    pub refused: u64,
    /// Publishes sent, and those answered as unknown.
    pub publishes: u64,
    /// See above.
    pub unknown: u64,
    /// Reads asked for by ports, and those sent to the backend for them.
    pub reads: u64,
    /// See above.
    pub reads_sent: u64,
    /// Losses of domains.
    pub losses: u64,
}

/// A port, by its place among the ends.
pub type PortIndex = usize;

/// A channel that is open, or was a moment ago.
#[derive(Debug)]
struct Open {
    target: Target,
    watch: Watch,
    /// Who has it open; none while it lingers.
    listener: Option<(PortIndex, ChannelId)>,
    domain: Option<Domain>,
    /// When the opens that wait are given up.
    open_by_ms: Option<u64>,
    /// Until when it lingers, once nobody has it open.
    linger_until_ms: u64,
    /// When the subscription or the read under way is sent again.
    resend_ms: u64,
}

/// What a call is for.
#[derive(Debug)]
enum Flight {
    Subscribe(Arc<str>),
    Sync(Arc<str>),
    Publish(PortIndex, Token),
    Clear(PortIndex, Token),
    /// Reads of ports, joined.
    Read(Arc<str>),
}

/// See the module's doc.
#[derive(Debug)]
pub struct Hub {
    options: HubOptions,
    open: HashMap<Arc<str>, Open>,
    flights: HashMap<Call, Flight>,
    /// Commands of ports, in the order of their deadlines.
    deadlines: VecDeque<(u64, Call)>,
    reads: Reads,
    /// Channels that wait to be subscribed again, and all that are not whole.
    waiting: VecDeque<Arc<str>>,
    recovering: BTreeSet<Arc<str>>,
    /// Subscriptions and reads of the hub's own that have no answer.
    syncing: BTreeSet<Arc<str>>,
    /// Channels of each port that took no more.
    overrun: BTreeMap<PortIndex, BTreeSet<Arc<str>>>,
    lingering: VecDeque<(u64, Arc<str>)>,
    /// When to look after opens and syncs next; see [`Hub::poll`].
    look_ms: u64,
    lost: BTreeSet<Domain>,
    reachable: bool,
    /// What the ports were told: health, and whether anything can be reached.
    told: (Health, bool),
    drawn: u64,
    requests: Vec<Request>,
    /// What it has counted.
    pub figures: HubFigures,
}

/// Grain of the deadlines of opens and syncs, in milliseconds.
const LOOK_MS: u64 = 100;

/// Tells one channel's port.
struct ToPort<'a> {
    end: Option<&'a mut End>,
    channel: ChannelId,
    figures: &'a mut HubFigures,
}

impl Outlet for ToPort<'_> {
    fn arrival(&mut self, position: Position, previous: u64, record: Bytes) -> bool {
        let Some(end) = &mut self.end else { return true };
        let (epoch, offset) = (position.epoch, position.offset);
        let told = Told::Arrival { channel: self.channel, epoch, previous, offset, record };
        let took = end.tell(told).is_ok();
        self.figures.arrivals += u64::from(took);
        self.figures.refused += u64::from(!took);
        took
    }

    fn gap(&mut self, resumed: Position) {
        self.figures.gaps += 1;
        self.tell(Told::Gap { channel: self.channel, resumed });
    }

    fn epoch_changed(&mut self, position: Position) {
        self.figures.epochs_changed += 1;
        self.tell(Told::EpochChanged { channel: self.channel, position });
    }

    fn opened(&mut self, token: Token, position: Position) {
        self.tell(Told::Opened { token, channel: self.channel, result: Ok(position) });
    }

    fn stale(&mut self) {
        self.figures.stale += 1;
    }
}

impl ToPort<'_> {
    fn tell(&mut self, told: Told) {
        if let Some(end) = &mut self.end {
            // Only arrivals are refused.
            let _ = end.tell(told);
        }
    }
}

impl Hub {
    /// A hub without channels. The backend is down until it says otherwise.
    pub fn new(options: HubOptions) -> Hub {
        Hub {
            options,
            open: HashMap::new(),
            flights: HashMap::new(),
            deadlines: VecDeque::new(),
            reads: Reads::default(),
            waiting: VecDeque::new(),
            recovering: BTreeSet::new(),
            syncing: BTreeSet::new(),
            overrun: BTreeMap::new(),
            lingering: VecDeque::new(),
            look_ms: 0,
            lost: BTreeSet::new(),
            reachable: false,
            told: (Health::Down, false),
            drawn: 0,
            requests: Vec::new(),
            figures: HubFigures::default(),
        }
    }

    /// Whether everything is whole.
    pub fn health(&self) -> Health {
        self.told.0
    }

    /// Takes what the backend is to be asked, in order.
    pub fn take_requests(&mut self) -> std::vec::Drain<'_, Request> {
        self.requests.drain(..)
    }

    fn draw(&mut self, flight: Flight) -> Call {
        self.drawn += 1;
        let call = Call(self.drawn);
        self.flights.insert(call, flight);
        call
    }

    /// A command of a port.
    pub fn command(&mut self, now: Now, port: PortIndex, command: Command, ends: &mut [End]) {
        match command {
            Command::Open { token, channel, target } => self.open(now, (port, channel), token, target, ends),
            Command::Close { channel, name } => self.close(now, (port, channel), &name, ends),
            Command::Publish { token, target, id, record } => {
                self.figures.publishes += 1;
                let call = self.draw(Flight::Publish(port, token));
                self.deadlines.push_back((now.mono_ms + COMMAND_MS_MAX, call));
                self.requests.push(Request::Publish { call, target, id, record });
            }
            Command::Clear { token, target } => {
                let call = self.draw(Flight::Clear(port, token));
                self.deadlines.push_back((now.mono_ms + COMMAND_MS_MAX, call));
                self.requests.push(Request::Clear { call, target });
            }
            Command::Read { token, target, query } => {
                self.figures.reads += 1;
                let waiter = Waiter { port, token, query };
                if let Some((target, query)) = self.reads.ask(target, waiter) {
                    self.send_read(now, target, query);
                }
            }
        }
    }

    fn open(
        &mut self,
        now: Now,
        listener: (PortIndex, ChannelId),
        token: Token,
        target: Target,
        ends: &mut [End],
    ) {
        let open_by_ms = Some(now.mono_ms + COMMAND_MS_MAX);
        if let Some(open) = self.open.get_mut(&target.name) {
            let is_others = open.listener.is_some_and(|other| other != listener);
            let is_other_kind = open.target.options.is_positioned() != target.options.is_positioned();
            if !is_others && !is_other_kind {
                open.listener = Some(listener);
                open.target.options = target.options;
                if let (State::Live, Some(cursor)) = (open.watch.state, open.watch.cursor()) {
                    return opened(ends, listener, token, Ok(cursor));
                }
                open.watch.tokens.push(token);
                open.open_by_ms = open.open_by_ms.or(open_by_ms);
                return;
            }
            if is_others {
                // A channel has one home in a node; its names are opened there only.
                return opened(ends, listener, token, Err(BusError::Unavailable));
            }
            self.unsubscribe(&target.name);
        }
        if self.open.len() >= self.options.channels_max {
            return opened(ends, listener, token, Err(BusError::Overloaded));
        }
        let name = target.name.clone();
        let watch = Watch::new(&target.options, token);
        let open = Open {
            target,
            watch,
            listener: Some(listener),
            domain: None,
            open_by_ms,
            linger_until_ms: 0,
            resend_ms: 0,
        };
        self.open.insert(name.clone(), open);
        self.subscribe(now, &name);
    }

    /// The port closes its channel: what waits for an open is answered, the subscription lingers.
    fn close(&mut self, now: Now, listener: (PortIndex, ChannelId), name: &Arc<str>, ends: &mut [End]) {
        let Some(open) = self.open.get_mut(name) else { return };
        if open.listener != Some(listener) {
            return;
        }
        for token in open.watch.tokens.drain(..) {
            opened(ends, listener, token, Err(BusError::Unavailable));
        }
        open.listener = None;
        open.open_by_ms = None;
        if let Some(names) = self.overrun.get_mut(&listener.0) {
            names.remove(name);
        }
        if open.watch.state == State::Live && self.options.linger_ms > 0 {
            open.linger_until_ms = now.mono_ms + self.options.linger_ms;
            self.lingering.push_back((open.linger_until_ms, name.clone()));
        } else {
            self.unsubscribe(name);
        }
    }

    fn unsubscribe(&mut self, name: &Arc<str>) {
        let Some(open) = self.open.remove(name) else { return };
        self.recovering.remove(name);
        self.syncing.remove(name);
        self.requests.push(Request::Unsubscribe { target: open.target });
    }

    fn subscribe(&mut self, now: Now, name: &Arc<str>) {
        let call = self.draw(Flight::Subscribe(name.clone()));
        let Some(open) = self.open.get_mut(name) else { return };
        open.watch.state = State::Subscribing(call);
        open.resend_ms = now.mono_ms + RESEND_MS;
        self.syncing.insert(name.clone());
        self.requests.push(Request::Subscribe { call, target: open.target.clone() });
    }

    fn read_position(&mut self, now: Now, name: &Arc<str>) {
        let call = self.draw(Flight::Sync(name.clone()));
        let Some(open) = self.open.get_mut(name) else { return };
        open.watch.state = State::Reading(call);
        open.resend_ms = now.mono_ms + RESEND_MS;
        self.syncing.insert(name.clone());
        let (target, query) = (open.target.clone(), open.watch.query());
        self.requests.push(Request::Read { call, target, query });
    }

    fn send_read(&mut self, now: Now, target: Target, query: HistoryQuery) {
        self.figures.reads_sent += 1;
        let call = self.draw(Flight::Read(target.name.clone()));
        self.deadlines.push_back((now.mono_ms + COMMAND_MS_MAX, call));
        self.requests.push(Request::Read { call, target, query });
    }

    /// Lets a channel take a step, and does what it asks for next.
    fn advance(
        &mut self,
        now: Now,
        name: &Arc<str>,
        ends: &mut [End],
        step: impl FnOnce(&mut Watch, &mut ToPort<'_>) -> Next,
    ) {
        let Some(open) = self.open.get_mut(name) else { return };
        let (end, channel) = match open.listener {
            Some((port, channel)) => (ends.get_mut(port), channel),
            None => (None, ChannelId(0)),
        };
        let next = step(&mut open.watch, &mut ToPort { end, channel, figures: &mut self.figures });
        match open.watch.state {
            State::Live if next == Next::Nothing => {
                open.open_by_ms = None;
                if !self.syncing.is_empty() {
                    self.syncing.remove(name);
                }
                if !self.recovering.is_empty() {
                    self.recovering.remove(name);
                }
            }
            State::Overrun => {
                self.syncing.remove(name);
                self.recovering.remove(name);
                if let Some((port, _)) = open.listener {
                    self.overrun.entry(port).or_default().insert(name.clone());
                }
            }
            _ => (),
        }
        if next == Next::Read {
            self.read_position(now, name);
        }
    }

    /// Something that the backend tells.
    pub fn reply(&mut self, now: Now, reply: Reply, ends: &mut [End]) {
        match reply {
            Reply::Message { name, message } => {
                self.advance(now, &name, ends, |watch, outlet| watch.message(message, outlet));
            }
            Reply::Published { call, result } => {
                if let Some(Flight::Publish(port, token)) = self.flights.remove(&call) {
                    self.figures.unknown += u64::from(result == Err(PublishError::Unknown));
                    tell(ends, port, Told::Published { token, result });
                }
            }
            Reply::Cleared { call, result } => {
                if let Some(Flight::Clear(port, token)) = self.flights.remove(&call) {
                    tell(ends, port, Told::Cleared { token, result });
                }
            }
            Reply::Subscribed { call, result } => self.subscribed(now, call, result, ends),
            Reply::Read { call, result } => match self.flights.remove(&call) {
                Some(Flight::Sync(name)) => match result {
                    Ok(page) => self.advance(now, &name, ends, |watch, outlet| {
                        if watch.state == State::Reading(call) {
                            watch.read(page, outlet)
                        } else {
                            Next::Nothing
                        }
                    }),
                    Err(_) => self.try_again(&name, State::Reading(call)),
                },
                Some(Flight::Read(name)) => {
                    if let Some((target, query)) = self.reads.answered(&name, &result, ends) {
                        self.send_read(now, target, query);
                    }
                }
                _ => (),
            },
            Reply::Doubt { name } => self.advance(now, &name, ends, |watch, outlet| watch.doubt(outlet)),
            Reply::Lost { domain } => self.domain_lost(domain, ends),
            Reply::Back { domain } => self.domain_back(domain),
            Reply::Reachable(reachable) => {
                self.reachable = reachable;
                if !reachable {
                    self.fail_waiting_opens(ends);
                }
            }
        }
        self.settle_health(ends);
    }

    fn subscribed(&mut self, now: Now, call: Call, result: Result<Domain, BusError>, ends: &mut [End]) {
        let Some(Flight::Subscribe(name)) = self.flights.remove(&call) else { return };
        let domain = match result {
            // What it was lost for may have happened after this was said.
            Ok(domain) if !self.lost.contains(&domain) => domain,
            Ok(_) => return self.try_again(&name, State::Subscribing(call)),
            Err(_) => {
                self.try_again(&name, State::Subscribing(call));
                return self.fail_opens(&name, ends);
            }
        };
        if let Some(open) = self.open.get_mut(&name) {
            open.domain = Some(domain);
        }
        self.advance(now, &name, ends, |watch, outlet| {
            if watch.state == State::Subscribing(call) { watch.confirmed(outlet) } else { Next::Nothing }
        });
    }

    /// A step of a channel failed: after [`RESEND_MS`] from its sending it is taken again, from the subscription on.
    fn try_again(&mut self, name: &Arc<str>, state: State) {
        if let Some(open) = self.open.get_mut(name)
            && open.watch.state == state
        {
            open.watch.unsync();
        }
    }

    /// Open channels of a kind, always in the same order.
    fn names(&self, which: impl Fn(&Open) -> bool) -> Vec<Arc<str>> {
        let chosen = self.open.iter().filter(|(_, open)| which(open));
        let mut names: Vec<_> = chosen.map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        names
    }

    fn domain_lost(&mut self, domain: Domain, ends: &mut [End]) {
        self.lost.insert(domain);
        self.figures.losses += 1;
        let names = self.names(|open| open.domain == Some(domain));
        for name in names {
            let Some(open) = self.open.get_mut(&name) else { continue };
            open.watch.unsync();
            open.domain = None;
            let is_wanted = open.listener.is_some();
            self.syncing.remove(&name);
            if !is_wanted {
                self.unsubscribe(&name);
                continue;
            }
            self.fail_opens(&name, ends);
            if self.open.contains_key(&name) {
                self.recovering.insert(name.clone());
                self.waiting.push_back(name);
            }
        }
    }

    /// The broker is lost: opens are answered at once. A channel that was not open before is not open.
    fn fail_waiting_opens(&mut self, ends: &mut [End]) {
        let waits = |open: &Open| !open.watch.tokens.is_empty();
        let names = self.names(waits);
        for name in names {
            self.fail_opens(&name, ends);
        }
    }

    fn fail_opens(&mut self, name: &Arc<str>, ends: &mut [End]) {
        let Some(open) = self.open.get_mut(name) else { return };
        open.open_by_ms = None;
        let Some(listener) = open.listener else { return };
        for token in open.watch.tokens.drain(..) {
            opened(ends, listener, token, Err(BusError::Unavailable));
        }
        if open.watch.cursor().is_none() {
            self.unsubscribe(name);
        }
    }

    /// What waits is subscribed again now, wherever it lives.
    fn domain_back(&mut self, domain: Domain) {
        self.lost.remove(&domain);
        for name in &self.recovering {
            if self.open.get(name).is_some_and(|open| open.watch.state == State::Unsynced) {
                self.syncing.remove(name);
                self.waiting.push_back(name.clone());
            }
        }
    }

    fn settle_health(&mut self, ends: &mut [End]) {
        let whole = self.reachable && self.lost.is_empty() && self.recovering.is_empty();
        let health = if whole { Health::Up } else { Health::Down };
        let reachable = self.reachable;
        if std::mem::replace(&mut self.told, (health, reachable)) != (health, reachable) {
            for port in 0..ends.len() {
                tell(ends, port, Told::Health { health, reachable });
            }
        }
    }

    /// Does what is due.
    pub fn poll(&mut self, now: Now, ends: &mut [End]) {
        while let Some(&(deadline_ms, call)) = self.deadlines.front() {
            if self.flights.contains_key(&call) && deadline_ms > now.mono_ms {
                break;
            }
            self.deadlines.pop_front();
            self.give_up(now, call, ends);
        }
        while let Some(&(at_ms, _)) = self.lingering.front() {
            if at_ms > now.mono_ms {
                break;
            }
            let Some((_, name)) = self.lingering.pop_front() else { break };
            let is_over = |open: &Open| open.listener.is_none() && open.linger_until_ms <= now.mono_ms;
            if self.open.get(&name).is_some_and(is_over) {
                self.unsubscribe(&name);
            }
        }
        self.serve_overrun(now, ends);
        if now.mono_ms >= self.look_ms {
            self.look_ms = now.mono_ms + LOOK_MS;
            self.look(now, ends);
        }
        self.sync_more(now);
        self.settle_health(ends);
    }

    /// A command of a port has no answer in time.
    fn give_up(&mut self, now: Now, call: Call, ends: &mut [End]) {
        match self.flights.remove(&call) {
            Some(Flight::Publish(port, token)) => {
                self.figures.unknown += 1;
                tell(ends, port, Told::Published { token, result: Err(PublishError::Unknown) });
            }
            Some(Flight::Clear(port, token)) => {
                tell(ends, port, Told::Cleared { token, result: Err(BusError::Unavailable) });
            }
            Some(Flight::Read(name)) => {
                if let Some((target, query)) = self.reads.answered(&name, &Err(BusError::Unavailable), ends) {
                    self.send_read(now, target, query);
                }
            }
            Some(Flight::Subscribe(_) | Flight::Sync(_)) | None => (),
        }
    }

    /// Opens that waited too long, and steps without an answer.
    fn look(&mut self, now: Now, ends: &mut [End]) {
        let late: Vec<_> = self
            .syncing
            .iter()
            .filter_map(|name| self.open.get(name).map(|open| (name, open)))
            .filter(|(_, open)| open.resend_ms <= now.mono_ms)
            .map(|(name, open)| (name.clone(), open.open_by_ms.is_some_and(|by_ms| by_ms <= now.mono_ms)))
            .collect();
        for (name, is_over) in late {
            if is_over {
                self.fail_opens(&name, ends);
            }
            let Some(open) = self.open.get_mut(&name) else { continue };
            self.syncing.remove(&name);
            open.watch.unsync();
            self.waiting.push_back(name);
        }
        if self.waiting.is_empty() && self.syncing.is_empty() {
            // Calls of channels that were closed meanwhile.
            self.flights.retain(|_, flight| !matches!(flight, Flight::Subscribe(_) | Flight::Sync(_)));
        }
    }

    /// Ports that took no more: what they missed is read, once they have room.
    fn serve_overrun(&mut self, now: Now, ends: &mut [End]) {
        if self.overrun.is_empty() {
            return;
        }
        let ready: Vec<PortIndex> = self
            .overrun
            .keys()
            .copied()
            .filter(|port| ends.get(*port).is_some_and(|end| end.has_room()))
            .collect();
        for port in ready {
            let Some(names) = self.overrun.remove(&port) else { continue };
            for name in names {
                self.advance(now, &name, ends, |watch, outlet| {
                    if watch.state == State::Overrun { watch.room(outlet) } else { Next::Nothing }
                });
            }
        }
    }

    /// Brings back as many channels as may be under way.
    fn sync_more(&mut self, now: Now) {
        if !self.reachable {
            return;
        }
        while self.syncing.len() < self.options.syncs_in_flight_max {
            let Some(name) = self.waiting.pop_front() else { return };
            if self.open.get(&name).is_some_and(|open| open.watch.state == State::Unsynced) {
                self.subscribe(now, &name);
            }
        }
    }

    /// When to poll next, in `mono_ms`; `None` when nothing is due by time.
    pub fn next_deadline(&self) -> Option<u64> {
        let command = self.deadlines.front().map(|&(at_ms, _)| at_ms);
        let linger = self.lingering.front().map(|&(at_ms, _)| at_ms);
        let look = (!self.syncing.is_empty() || !self.waiting.is_empty()).then_some(self.look_ms);
        [command, linger, look].into_iter().flatten().min()
    }
}

fn tell(ends: &mut [End], port: PortIndex, told: Told) {
    if let Some(end) = ends.get_mut(port) {
        // Only arrivals are refused.
        let _ = end.tell(told);
    }
}

fn opened(
    ends: &mut [End],
    (port, channel): (PortIndex, ChannelId),
    token: Token,
    result: Result<Position, BusError>,
) {
    tell(ends, port, Told::Opened { token, channel, result });
}
