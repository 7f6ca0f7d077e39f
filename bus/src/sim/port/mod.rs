//! A node's port to the simulated broker.
//!
//! Owns: commands in flight, the connection's watching over, bringing channels back after a fault. Must not
//! know: the broker's data; it learns everything from messages, late.
//! Invariants: every command is answered once; `Up` is said only when every open channel is whole; nothing
//! is accepted while `Down`.

mod connection;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;

use ringmain_proto::message::Publication;
use ringmain_proto::time::Now;

use crate::contract::Bus;
use crate::epoch::Position;
use crate::sim::SimOptions;
use crate::sim::watch::{State, Watch};
use crate::sim::wire::{Link, OwnedId, Request};
use crate::types::{
    Accepted, BusError, Channel, ChannelId, Event, Health, HistoryQuery, IDEMPOTENCY_KEY_BYTES_MAX, Outcome,
    Page, PublicationId, PublishError, Token,
};

/// Time between two canaries, in milliseconds.
pub const CANARY_MS: u64 = 250;

/// Silence after which the broker counts as lost, in milliseconds.
pub const SILENCE_MS_MAX: u64 = 800;

/// Pause before connecting again, in milliseconds.
pub const RECONNECT_MS: u64 = 50;

/// When a command is given up, in milliseconds: a publish is unknown then.
pub const COMMAND_MS_MAX: u64 = 3_000;

/// When a publish or a position read without an answer is sent again, in milliseconds.
pub const RESEND_MS: u64 = 1_000;

/// Channels brought back at the same time.
pub const SYNCS_IN_FLIGHT_MAX: usize = 64;

/// Messages taken in one poll.
pub const MESSAGES_PER_POLL_MAX: usize = 256;

// Loss must be visible, and every answer given, within the contract's times whatever the poll's grain.
const _: () = assert!(SILENCE_MS_MAX + RECONNECT_MS < crate::contract::LOSS_VISIBLE_MS_MAX);
const _: () = assert!(COMMAND_MS_MAX + RESEND_MS <= crate::contract::ANSWER_MS_MAX);

type Sink<'a> = &'a mut dyn FnMut(Event<'_>);

#[derive(Debug)]
enum Command {
    /// `retry`: may be sent again under its id.
    Publish {
        token: Token,
        request: Request,
        retry: bool,
        attempts: u32,
        own_id: bool,
    },
    Read {
        token: Token,
    },
    Clear {
        token: Token,
    },
    /// A position read for an open channel.
    Sync {
        channel: ChannelId,
    },
}

#[derive(Debug)]
struct Call {
    command: Command,
    /// When it is sent again, if it may be.
    resend_ms: Option<u64>,
    /// When it is given up; a position read never is.
    give_up_ms: Option<u64>,
}

/// One node's view of the simulated broker.
#[derive(Debug)]
pub struct SimPort {
    link: Rc<RefCell<Link>>,
    options: SimOptions,
    watches: BTreeMap<ChannelId, Watch>,
    names: HashMap<Rc<str>, ChannelId>,
    calls: BTreeMap<u64, Call>,
    drawn: u64,
    /// The caller's commands that are not answered yet.
    commands: usize,
    /// Opens whose channel was closed before their answer.
    orphans: VecDeque<(Token, ChannelId)>,
    /// Open channels that are not whole, and those of them whose turn has not come.
    recovering: BTreeSet<ChannelId>,
    waiting: VecDeque<ChannelId>,
    health: Health,
    connected: bool,
    reconnect_ms: u64,
    canary_ms: u64,
    canary_heard: bool,
    heard_ms: u64,
    polled_ms: u64,
    generation: Option<u64>,
    push_sequence: u64,
}

impl SimPort {
    pub(super) fn new(link: Rc<RefCell<Link>>, options: SimOptions) -> SimPort {
        SimPort {
            link,
            options,
            watches: BTreeMap::new(),
            names: HashMap::new(),
            calls: BTreeMap::new(),
            drawn: 0,
            commands: 0,
            orphans: VecDeque::new(),
            recovering: BTreeSet::new(),
            waiting: VecDeque::new(),
            health: Health::Down,
            connected: false,
            reconnect_ms: 0,
            canary_ms: 0,
            canary_heard: false,
            heard_ms: 0,
            polled_ms: 0,
            generation: None,
            push_sequence: 0,
        }
    }

    fn draw(&mut self) -> u64 {
        self.drawn += 1;
        self.drawn
    }

    fn send(&self, now: Now, request: Request) {
        self.link.borrow_mut().request(now.mono_ms, request);
    }

    /// Whether a command can be taken.
    fn admit(&self) -> Result<(), BusError> {
        if self.health == Health::Down {
            Err(BusError::Unavailable)
        } else if self.commands >= self.options.commands_max {
            Err(BusError::Overloaded)
        } else {
            Ok(())
        }
    }

    fn call(&mut self, now: Now, command: Command) -> u64 {
        let call = self.draw();
        let is_sync = matches!(command, Command::Sync { .. });
        let may_resend = is_sync || matches!(command, Command::Publish { retry: true, .. });
        self.commands += usize::from(!is_sync);
        let resend_ms = may_resend.then_some(now.mono_ms + RESEND_MS);
        let give_up_ms = (!is_sync).then_some(now.mono_ms + COMMAND_MS_MAX);
        self.calls.insert(call, Call { command, resend_ms, give_up_ms });
        call
    }
}

impl Bus for SimPort {
    fn open(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        if let Err(error) = self.admit() {
            return Outcome::Done(Err(error));
        }
        let open_by_ms = Some(now.mono_ms + COMMAND_MS_MAX);
        if let Some(watch) = self.watches.get_mut(&channel.id) {
            if let (State::Live, Some(cursor)) = (watch.state, watch.cursor()) {
                return Outcome::Done(Ok(cursor));
            }
            watch.tokens.push(token);
            watch.open_by_ms = watch.open_by_ms.or(open_by_ms);
            self.commands += 1;
            return Outcome::Pending;
        }
        let name: Rc<str> = channel.name.into();
        self.names.insert(name.clone(), channel.id);
        self.watches.insert(channel.id, Watch::new(name, *channel.options, token, open_by_ms));
        self.commands += 1;
        self.subscribe(now, channel.id);
        Outcome::Pending
    }

    fn close(&mut self, now: Now, channel: ChannelId) {
        self.unwatch(now, channel);
    }

    fn publish(
        &mut self,
        now: Now,
        token: Token,
        channel: Channel<'_>,
        id: PublicationId<'_>,
        publication: &Publication<'_>,
    ) -> Outcome<Result<Accepted, PublishError>> {
        let (bytes, bytes_max) = (publication.record_len(), self.options.record_bytes_max);
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
        let mut record = Vec::with_capacity(bytes);
        publication.write_record(&mut record);
        let request = Request::Publish {
            call: self.drawn + 1,
            name: channel.name.into(),
            options: *channel.options,
            id: OwnedId::new(id),
            record: record.into(),
        };
        // An ephemeral channel's publication is never tried again: at most once.
        let retry = self.options.retries && channel.options.is_positioned();
        let own_id = matches!(id, PublicationId::Node { .. });
        self.send(now, request.clone());
        self.call(now, Command::Publish { token, request, retry, attempts: 1, own_id });
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
        let call = self.call(now, Command::Read { token });
        let (name, options) = (channel.name.into(), *channel.options);
        self.send(now, Request::Read { call, name, options, query: *query });
        Outcome::Pending
    }

    fn clear(&mut self, now: Now, token: Token, channel: Channel<'_>) -> Outcome<Result<Position, BusError>> {
        if let Err(error) = self.admit() {
            return Outcome::Done(Err(error));
        }
        if !channel.options.is_positioned() {
            return Outcome::Done(Ok(Position::NONE));
        }
        let call = self.call(now, Command::Clear { token });
        self.send(now, Request::Clear { call, name: channel.name.into(), options: *channel.options });
        Outcome::Pending
    }

    fn is_idle(&self, _: Now, channel: ChannelId) -> bool {
        !self.watches.contains_key(&channel)
    }

    fn forget(&mut self, channel: ChannelId) {
        let mono_ms = self.polled_ms;
        self.unwatch(Now { mono_ms, unix_ms: 0 }, channel);
    }

    fn poll(&mut self, now: Now, sink: &mut dyn FnMut(Event<'_>)) {
        // While nobody polled, nobody listened: that is no silence of the broker.
        self.heard_ms += now.mono_ms.saturating_sub(self.polled_ms + CANARY_MS);
        self.polled_ms = now.mono_ms;
        while let Some((token, channel)) = self.orphans.pop_front() {
            self.commands -= 1;
            sink(Event::Opened { token, channel, result: Err(BusError::Unavailable) });
        }
        self.notice_cut(now, sink);
        self.reconnect(now);
        if !self.receive(now, sink) {
            self.watch_over(now, sink);
        }
        self.expire_calls(now, sink);
        self.sync_more(now);
        self.settle_health(sink);
    }

    fn next_deadline(&self) -> Option<u64> {
        if !self.orphans.is_empty() {
            return Some(self.polled_ms);
        }
        let link = self.link.borrow();
        let due = |call: &Call| {
            let resend_ms = call.resend_ms.filter(|_| self.connected);
            resend_ms.into_iter().chain(call.give_up_ms).min()
        };
        let calls = self.calls.values().filter_map(due).min();
        let opens = self.watches.values().filter_map(|watch| watch.open_by_ms).min();
        let connection = match self.connected {
            true => self.canary_ms.min(self.heard_ms + SILENCE_MS_MAX),
            false => self.reconnect_ms,
        };
        let messages = [link.cut_seen_ms, link.replies.next_ms(), link.pushes.next_ms()];
        messages.into_iter().chain([calls, opens, Some(connection)]).flatten().min()
    }

    fn health(&self) -> Health {
        self.health
    }
}
