//! A node's port to the simulated broker.
//!
//! Owns: commands in flight, the connection's watching over, bringing channels back after a fault. Must not
//! know: the broker's data; it learns everything from messages, late.
//! Invariants: every command is answered once; `Up` is said only when every open channel is whole; nothing
//! is accepted while `Down`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;

use ringmain_proto::message::Publication;
use ringmain_proto::record::records;
use ringmain_proto::time::Now;

use crate::contract::Bus;
use crate::epoch::Position;
use crate::sim::SimOptions;
use crate::sim::watch::{Next, State, Watch};
use crate::sim::wire::{Link, OwnedId, Push, PushBody, Reply, ReplyBody, Request};
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

    fn notice_cut(&mut self, now: Now, sink: Sink<'_>) {
        let mut link = self.link.borrow_mut();
        if link.cut_seen_ms.is_some_and(|at_ms| at_ms <= now.mono_ms) {
            link.cut_seen_ms = None;
            drop(link);
            self.disconnected(now, sink);
        }
    }

    fn disconnected(&mut self, now: Now, sink: Sink<'_>) {
        self.connected = false;
        self.canary_heard = false;
        self.reconnect_ms = now.mono_ms + RECONNECT_MS;
        if self.health == Health::Up {
            self.health = Health::Down;
            sink(Event::Health(Health::Down));
        }
        let kept = |call: &Call| matches!(call.command, Command::Publish { retry: true, .. });
        let lost: Vec<u64> = self.calls.iter().filter(|(_, call)| !kept(call)).map(|(id, _)| *id).collect();
        for call in lost {
            self.give_up(call, sink);
        }
        let watched: Vec<ChannelId> = self.watches.keys().copied().collect();
        for channel in watched {
            self.fail_opens(now, channel, sink);
        }
        self.resync_all();
    }

    /// Answers the opens of a channel as failed. One that was not open before is not open.
    fn fail_opens(&mut self, now: Now, channel: ChannelId, sink: Sink<'_>) {
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        for token in watch.tokens.drain(..) {
            self.commands -= 1;
            sink(Event::Opened { token, channel, result: Err(BusError::Unavailable) });
        }
        watch.open_by_ms = None;
        if watch.cursor().is_none() {
            self.unwatch(now, channel);
        }
    }

    /// Ends a call without an answer from the broker.
    fn give_up(&mut self, call: u64, sink: Sink<'_>) {
        let Some(Call { command, .. }) = self.calls.remove(&call) else { return };
        match command {
            Command::Publish { token, .. } => {
                sink(Event::Published { token, result: Err(PublishError::Unknown) });
            }
            Command::Read { token } => {
                let publications = records(&[]);
                sink(Event::Read { token, result: Err(BusError::Unavailable), publications });
            }
            Command::Clear { token } => {
                sink(Event::Cleared { token, result: Err(BusError::Unavailable) });
            }
            Command::Sync { .. } => return,
        }
        self.commands -= 1;
    }

    /// Every open channel is subscribed and read again, in turns.
    fn resync_all(&mut self) {
        for watch in self.watches.values_mut() {
            watch.unsync();
        }
        self.recovering = self.watches.keys().copied().collect();
        self.waiting = self.recovering.iter().copied().collect();
        self.calls.retain(|_, call| !matches!(call.command, Command::Sync { .. }));
    }

    fn reconnect(&mut self, now: Now) {
        if self.connected || now.mono_ms < self.reconnect_ms {
            return;
        }
        if !self.link.borrow_mut().connect() {
            self.reconnect_ms = now.mono_ms + RECONNECT_MS;
            return;
        }
        self.connected = true;
        self.canary_ms = now.mono_ms;
        self.heard_ms = now.mono_ms;
        self.push_sequence = 0;
        for call in self.calls.values_mut() {
            resend(&self.link, now, call);
        }
    }

    /// Takes what has come. Returns whether there may be more.
    fn receive(&mut self, now: Now, sink: Sink<'_>) -> bool {
        for _ in 0..MESSAGES_PER_POLL_MAX {
            let mut link = self.link.borrow_mut();
            let reply_first = match (link.replies.next_ms(), link.pushes.next_ms()) {
                (Some(reply), Some(push)) => reply <= push,
                (reply, _) => reply.is_some(),
            };
            if reply_first {
                let Some(reply) = link.replies.take_due(now.mono_ms) else { return false };
                drop(link);
                self.reply(now, reply, sink);
            } else {
                let Some(push) = link.pushes.take_due(now.mono_ms) else { return false };
                drop(link);
                self.push(now, push, sink);
            }
        }
        true
    }

    fn reply(&mut self, now: Now, reply: Reply, sink: Sink<'_>) {
        let Some(Call { command, .. }) = self.calls.remove(&reply.call) else { return };
        match (command, reply.body) {
            (Command::Publish { token, attempts, own_id, .. }, ReplyBody::Published(accepted)) => {
                // A repeat of our own making is none to the caller.
                let repeated = accepted.repeated && !(own_id && attempts > 1);
                sink(Event::Published { token, result: Ok(Accepted { repeated, ..accepted }) });
            }
            (Command::Read { token }, ReplyBody::Read(result)) => match result {
                Ok(reply) => {
                    let publications = records(&reply.records);
                    sink(Event::Read { token, result: Ok(reply.page), publications });
                }
                Err(error) => {
                    sink(Event::Read { token, result: Err(error), publications: records(&[]) });
                }
            },
            (Command::Clear { token }, ReplyBody::Cleared(position)) => {
                sink(Event::Cleared { token, result: Ok(position) });
            }
            (Command::Sync { channel }, ReplyBody::Read(Ok(page))) => {
                let state = State::Reading(reply.call);
                self.advance(now, channel, sink, |watch, sink| {
                    if watch.state == state { watch.read(&page, channel, sink) } else { Next::Nothing }
                });
                return;
            }
            (command, body) => unreachable!("the broker answered {body:?} to {command:?}"),
        }
        self.commands -= 1;
    }

    fn push(&mut self, now: Now, push: Push, sink: Sink<'_>) {
        let expected = self.push_sequence + 1;
        self.push_sequence = push.sequence;
        if push.sequence != expected {
            // Something was lost on this connection, and nobody can say in which channel.
            self.resync_all();
        }
        match push.body {
            PushBody::Canary { generation } => {
                self.heard_ms = now.mono_ms;
                self.canary_heard = true;
                if self.generation.replace(generation).is_some_and(|known| known != generation) {
                    self.resync_all();
                }
            }
            PushBody::Subscribed { name, nonce } => {
                let Some(channel) = self.names.get(&name).copied() else { return };
                self.advance(now, channel, sink, |watch, sink| watch.confirmed(nonce, channel, sink));
            }
            PushBody::Message { name, message } => {
                let Some(channel) = self.names.get(&name).copied() else { return };
                self.advance(now, channel, sink, |watch, sink| watch.message(message, channel, sink));
            }
        }
    }

    /// Lets a channel take a step, and does what it asks for next.
    fn advance(
        &mut self,
        now: Now,
        channel: ChannelId,
        sink: Sink<'_>,
        step: impl FnOnce(&mut Watch, Sink<'_>) -> Next,
    ) {
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        let unanswered = watch.tokens.len();
        let next = step(watch, sink);
        self.commands -= unanswered - watch.tokens.len();
        if watch.state == State::Live {
            self.recovering.remove(&channel);
        }
        if next == Next::Read {
            self.read_position(now, channel);
        }
    }

    fn read_position(&mut self, now: Now, channel: ChannelId) {
        let call = self.call(now, Command::Sync { channel });
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        watch.state = State::Reading(call);
        let (name, options, query) = (watch.name.clone(), watch.options, watch.query());
        self.send(now, Request::Read { call, name, options, query });
    }

    fn read_position_again(&mut self, now: Now, call: u64, channel: ChannelId) {
        self.calls.remove(&call);
        if self.watches.get(&channel).is_some_and(|watch| watch.state == State::Reading(call)) {
            self.read_position(now, channel);
        }
    }

    fn subscribe(&mut self, now: Now, channel: ChannelId) {
        let nonce = self.draw();
        let Some(watch) = self.watches.get_mut(&channel) else { return };
        watch.state = State::Subscribing(nonce);
        let name = watch.name.clone();
        self.send(now, Request::Subscribe { name, nonce });
    }

    fn unwatch(&mut self, now: Now, channel: ChannelId) {
        let Some(watch) = self.watches.remove(&channel) else { return };
        self.names.remove(&watch.name);
        self.recovering.remove(&channel);
        self.waiting.retain(|other| *other != channel);
        self.orphans.extend(watch.tokens.iter().map(|token| (*token, channel)));
        if self.connected {
            self.send(now, Request::Unsubscribe { name: watch.name });
        }
    }

    fn expire_calls(&mut self, now: Now, sink: Sink<'_>) {
        let ids: Vec<u64> = self.calls.keys().copied().collect();
        for id in ids {
            let Some(call) = self.calls.get_mut(&id) else { continue };
            if call.give_up_ms.is_some_and(|at_ms| at_ms <= now.mono_ms) {
                self.give_up(id, sink);
            } else if self.connected && call.resend_ms.is_some_and(|at_ms| at_ms <= now.mono_ms) {
                match call.command {
                    Command::Sync { channel } => self.read_position_again(now, id, channel),
                    _ => resend(&self.link, now, call),
                }
            }
        }
        let late = |watch: &Watch| watch.open_by_ms.is_some_and(|by_ms| by_ms <= now.mono_ms);
        let late: Vec<ChannelId> =
            self.watches.iter().filter(|(_, watch)| late(watch)).map(|(id, _)| *id).collect();
        for channel in late {
            self.fail_opens(now, channel, sink);
        }
    }

    fn watch_over(&mut self, now: Now, sink: Sink<'_>) {
        if !self.connected {
            return;
        }
        if now.mono_ms >= self.heard_ms + SILENCE_MS_MAX {
            self.link.borrow_mut().abandon();
            self.disconnected(now, sink);
        } else if now.mono_ms >= self.canary_ms {
            self.canary_ms = now.mono_ms + CANARY_MS;
            self.send(now, Request::Canary);
        }
    }

    fn sync_more(&mut self, now: Now) {
        while self.connected && self.recovering.len() - self.waiting.len() < SYNCS_IN_FLIGHT_MAX {
            let Some(channel) = self.waiting.pop_front() else { return };
            self.subscribe(now, channel);
        }
    }

    fn settle_health(&mut self, sink: Sink<'_>) {
        let whole = self.connected && self.canary_heard && self.recovering.is_empty();
        if self.health == Health::Down && whole {
            self.health = Health::Up;
            sink(Event::Health(Health::Up));
        }
    }
}

/// Sends a publish again, if it may be.
fn resend(link: &RefCell<Link>, now: Now, call: &mut Call) {
    if let Command::Publish { request, retry: true, attempts, .. } = &mut call.command {
        *attempts += 1;
        link.borrow_mut().request(now.mono_ms, request.clone());
        call.resend_ms = Some(now.mono_ms + RESEND_MS);
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
